"""`python -m perf_tests history`: list and filter nights, show where levels changed, rebuild."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fluxfast.levels import place_of
from perf_tests.harness import store as baselines
from perf_tests.harness.files import StoreError, printable
from perf_tests.harness.replay import ROOT
from perf_tests.harness.schema import AnnotatedStep, Outcome
from perf_tests.history import changes, store
from perf_tests.history.store import Point

WORST_FIRST = [Outcome.ERROR, Outcome.REGRESSED, Outcome.INCOMPARABLE, Outcome.NO_BASELINE, Outcome.VOID]
WORST_FIRST += [Outcome.IMPROVED, Outcome.PASS]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 after one sentence on stderr."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.last < 0:
        parser.error(f"--last is {asked.last}, expected 0 (all) or more")
    path = asked.history or asked.results / store.NAME
    try:
        if asked.rebuild:
            held, left = store.rebuild(path, asked.results)
            print(f"{path}: {held} run(s) of {asked.results}")
            for sentence in left:
                print(f"left out: {sentence}", file=sys.stderr)
            return 0
        found = [point for point in store.points(path, **_equal(asked)) if _is_asked(point, asked)]
        lines = _changes(found, path, asked.baselines) if asked.changes else _table(found, asked)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print("\n".join(lines))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf_tests history", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of runs")
    parser.add_argument("--history", type=Path, help=f"the file; default: {store.NAME} below --results")
    parser.add_argument("--baselines", type=Path, default=ROOT / "baselines", help="whose annotated steps are known")
    parser.add_argument("--rebuild", action="store_true", help="put every run below --results into the history")
    parser.add_argument("--changes", action="store_true", help="where levels changed over the nights (advisory)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: every level of every night")
    parser.add_argument("--last", type=int, default=20, help="how many nights to list; 0 for all (default 20)")
    for name in ("run", "slug", "workload", "level"):
        parser.add_argument(f"--{name}", help=f"only this {name}")
    day = datetime.date.fromisoformat
    parser.add_argument("--since", type=day, default=datetime.date.min, metavar="YYYY-MM-DD", help="from this day on")
    parser.add_argument("--until", type=day, default=datetime.date.max, metavar="YYYY-MM-DD", help="to this day")
    parser.add_argument("--outcome", choices=[o.value for o in Outcome], help="only levels with such a verdict")
    return parser


def _equal(asked: argparse.Namespace) -> dict[str, str | None]:
    return {name: getattr(asked, name) for name in ("run", "slug", "workload", "level")}


def _is_asked(point: Point, asked: argparse.Namespace) -> bool:
    is_then = asked.since.isoformat() <= point.date[:10] <= asked.until.isoformat()
    return is_then and (asked.outcome is None or f"={asked.outcome}" in point.outcomes)


def _table(found: Sequence[Point], asked: argparse.Namespace) -> list[str]:
    if not found:
        return ["no night fits"]
    if asked.json:
        return [json.dumps(vars(point)) for point in found]
    found = sorted(found, key=lambda p: (p.date, p.run, place_of(p.level)))
    runs = [list(own) for _, own in itertools.groupby(found, key=lambda point: point.run)][-asked.last :]
    if asked.level or asked.run:
        header = [
            "date",
            "slug",
            "workload",
            "level",
            "value",
            "unit",
            "of baseline",
            "verdict",
            "not in trends",
            "run",
        ]
        return _aligned([header, *(_level_row(point) for own in runs for point in own)])
    header = ["date", "slug", "workload", "levels", "verdict", "not in trends", "run"]
    return _aligned([header, *(_run_row(own) for own in runs)])


def _level_row(point: Point) -> list[str]:
    value = "" if point.value is None else f"{point.value:.4g}"
    ratio = "" if point.ratio is None else f"{100 * (point.ratio - 1):+.2f} %"
    day = point.date[:16].replace("T", " ")
    verdict, mark = worst([point]), point.mark or ""
    return [day, point.slug, point.workload, point.level, value, point.unit, ratio, verdict, mark, point.run]


def _run_row(own: Sequence[Point]) -> list[str]:
    first = own[0]
    marked = ", ".join(f"{point.level} ({point.mark})" for point in own if point.mark)
    day = first.date[:16].replace("T", " ")
    return [day, first.slug, first.workload, str(len(own)), worst(own), marked, first.run]


def worst(points: Iterable[Point]) -> str:
    """The worst outcome of any test, and which tests have it; "not judged" if the run left no verdicts."""
    said: dict[str, list[str]] = {}
    for point in points:
        for test, outcome in point.outcome_by_test().items():
            said.setdefault(outcome, []).append(f"{test}[{point.level}]")
    for outcome in WORST_FIRST:
        if tests := said.get(outcome):
            if outcome is Outcome.PASS:
                return outcome.value
            return f"{outcome.value}: {tests[0]}" + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")
    return "not judged"


def _changes(found: Sequence[Point], path: Path, folder: Path) -> list[str]:
    documents = store.documents(path)
    rows, nights = [], 0
    for (slug, workload, *_), own in itertools.groupby(sorted(found, key=_series), key=_series):
        points = list(own)
        nights = max(nights, len(changes.trend(points)))
        for change in changes.find_changes(points, steps_of(folder / slug, workload), documents):
            known = f"accepted: {change.known}" if change.known is not None else "not accepted by anyone"
            moved = ", ".join(change.moved) or "nothing in the environment"
            ratio = f"{100 * (change.ratio - 1):+.2f} %"
            rows.append([change.date, slug, workload, change.level, ratio, known, f"moved: {moved}", change.run])
    if rows:
        return _aligned([["first night", "slug", "workload", "level", "change", "", "", "run"], *rows])
    if nights < changes.MIN_NIGHTS:
        return [f"no level has {changes.MIN_NIGHTS} sound nights yet (the most is {nights}): nothing can be said"]
    return ["no level changed"]


def _series(point: Point) -> tuple[str, ...]:
    return point.slug, point.workload, point.level, point.series


def steps_of(folder: Path, workload: str) -> list[AnnotatedStep]:
    """The annotated steps of the newest baseline of a machine; none without one.

    Raises:
        BaselineError: if it cannot be read.
    """
    path = baselines.find_baseline(folder, workload) if folder.is_dir() else None
    return list(baselines.read_baseline(path).steps) if path else []


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[printable(cell) for cell in row] for row in rows]  # names of folders and faults come from anyone
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]

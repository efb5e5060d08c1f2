"""From a stored run to its report. Verdicts come from `replay.judge` and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxfast.levels import LEVELS, place_of
from perf_tests.harness.files import StoreError
from perf_tests.harness.obstacles import measured
from perf_tests.harness.replay import TESTS, ReadOnlySession, judge, open_run
from perf_tests.harness.schema import AnnotatedStep, Environment, Outcome
from perf_tests.history.night import VERDICTS_FILE, Night, RunRecord, night_of, read_record
from perf_tests.report.model import Fact, Finding, Report, Rung, Stages
from perf_tests.report.nights import Nights, read_nights
from perf_tests.report.pictures import comparisons


def build_report(folder: Path, baselines: Path, history: Path | None) -> Report:
    """The report of a stored run.

    Args:
        baselines: folder of baselines.
        history: SQLite file; None if there is none.

    Raises:
        StoreError: one sentence, if the run or its baseline cannot be read. A history that cannot be read is a note.
    """
    session = open_run(folder, baselines)
    notes: list[str] = []
    record = _record(folder, notes)
    night = night_of(session, record)
    findings = _findings(session, record)
    compared, pictures = comparisons(session)
    baseline = session.baseline
    report = Report(
        run=folder,
        date=night.date,
        slug=session.slug,
        workload=dataclasses.asdict(session.workload),
        state="green",
        headline="",
        notes=notes,
        tests=list(TESTS),
        findings=findings,
        unavailable=dict(session.unavailable),
        rungs=_rungs(session, findings),
        stages=_stages(session),
        nights=_nights(history, night, list(baseline.steps) if baseline else [], notes),
        comparisons=compared,
        pictures=pictures,
        facts=_facts(baseline.environment if baseline else None, session.environment),
        has_baseline=baseline is not None,
        traces=find_traces(folder),
    )
    state, headline = _headline(report)
    return dataclasses.replace(report, state=state, headline=headline)


def _record(folder: Path, notes: list[str]) -> RunRecord | None:
    if not (folder / VERDICTS_FILE).exists():
        notes.append(f"The run left no {VERDICTS_FILE}: what it was judged to be on its own night is not known.")
        return None
    try:
        return read_record(folder)
    except StoreError as error:
        notes.append(str(error))
        return None


def _nights(history: Path | None, night: Night, steps: Sequence[AnnotatedStep], notes: list[str]) -> Nights:
    if history is None:
        notes.append("No history was given, so no trend is drawn: name one with --history.")
        return Nights(trends=[])
    try:
        nights = read_nights(history, night, steps)
    except StoreError as error:
        notes.append(f"No trend is drawn: {error}")
        return Nights(trends=[])
    if nights.no_changes:
        notes.append(f"Trends are drawn without changes: {nights.no_changes}")
    if not nights.has_this:
        notes.append("This run is not in the history, so its own point is missing in the trends.")
    return nights


def _findings(session: ReadOnlySession, record: RunRecord | None) -> dict[str, dict[str, Finding]]:
    then = {(own.test, own.verdict.level): own for own in (record.judged if record else ())}
    found: dict[str, dict[str, Finding]] = {}
    for level, row in judge(session).items():
        found[level] = {}
        for test, verdict in row.items():
            own = then.get((test, level))
            differs = own is not None and own.verdict.outcome is not verdict.outcome
            found[level][test] = Finding(
                test=test,
                level=level,
                verdict=verdict,
                excuse=own.excuse if own and not verdict.ok else None,
                then=own.verdict.outcome.value if own and differs else None,
            )
    return found


def _headline(report: Report) -> tuple[str, str]:
    count = sum(map(len, report.findings.values()))
    said = [finding.verdict.outcome for finding in report.bad]
    void, improved = said.count(Outcome.VOID), said.count(Outcome.IMPROVED)
    excused = sum(finding.excuse is not None for finding in report.bad)
    more = f"; {excused} excused by quarantine" if excused else ""
    more += f"; {improved} improved, so the baseline is stale" if improved else ""
    if report.red:
        levels = sorted({finding.level for finding in report.red}, key=place_of)
        return "red", f"Red: {len(report.red)} of {count} tests, at {', '.join(levels)}{more}"
    if void:
        return "inconclusive", f"Inconclusive: {void} of {count} tests were disturbed{more}"
    return "green", f"Green: {count} tests{more}"


OF_THE_CALL = ("ratio", "low", "high", "limit", "smallest_visible")
"""Numbers of a latency verdict. Where loops are judged too, those without a prefix are of the part that decided."""


def _rungs(session: ReadOnlySession, findings: dict[str, dict[str, Finding]]) -> list[Rung]:
    times = {}
    for level, own in session.results.items():
        if all(result.measurement for result in own):
            medians = [statistics.median(measurement.samples_s) for measurement in measured(own)]
            times[level] = statistics.geometric_mean(medians)
    slowest = max(times.values(), default=1.0) * 1.1  # room for a baseline that was slower
    rungs = []
    for known in LEVELS.values():
        if known.id not in session.results:
            continue
        latency = findings.get(known.id, {}).get("test_latency")
        numbers = latency.verdict.numbers if latency else {}
        seconds, parent = times.get(known.id), times.get(session.policy.parents.get(known.id) or "")
        sound = measured(session.results[known.id])
        rungs.append(
            Rung(
                level=known.id,
                adds=str(known.own_field or "eager"),
                outcome=latency.verdict.outcome if latency else None,
                seconds=seconds,
                share=seconds / slowest if seconds else 0.0,
                step=seconds / parent if seconds and parent else None,
                setup_s={n: statistics.median(getattr(m, n) for m in sound) for n in ("load_s", "apply_s", "warmup_s")}
                if sound
                else {},
                peak_memory_bytes=min((m.peak_memory_bytes for m in sound), default=None),
                loop_visible=numbers.get("loop_smallest_visible"),
                **{name: numbers.get(f"call_{name}", numbers.get(name)) for name in OF_THE_CALL},
            )
        )
    return rungs


def _stages(session: ReadOnlySession) -> list[Stages]:
    """Denoising steps are added up; the rest as the worker names it."""
    sums: list[tuple[str, dict[str, float]]] = []
    for level, own in session.results.items():
        parts: dict[str, float] = {}
        for stage in dict.fromkeys(stage for m in measured(own) for stage in m.stages_s):
            rounds = [seconds for m in measured(own) for seconds in m.stages_s.get(stage, [])]
            name = "denoise" if stage.startswith("step_") else stage
            if rounds and math.isfinite(median := statistics.median(rounds)) and median >= 0:
                parts[name] = parts.get(name, 0.0) + median
        if parts:
            sums.append((level, parts))
    largest = max((sum(parts.values()) for _, parts in sums), default=0.0) or 1.0
    return [
        Stages(level=level, parts=[(name, seconds, seconds / largest) for name, seconds in parts.items()])
        for level, parts in sums
    ]


def _facts(baseline: Environment | None, run: Environment | None) -> list[Fact]:
    before = baseline.model_dump(mode="json") if baseline else {}
    after = run.model_dump(mode="json") if run else {}

    def shown(side: dict[str, Any], name: str) -> str:
        return "none" if side.get(name) is None else str(side[name])

    return [
        Fact(
            name=name,
            baseline=shown(before, name) if before else "no baseline",
            run=shown(after, name) if after else "not known",
            moved=bool(before and after) and before.get(name) != after.get(name),
        )
        for name in {**before, **after}
    ]


def find_traces(folder: Path) -> list[Path]:
    """Profiler traces that lie in the run: regular files, reached through no link; at most 100."""
    found = []
    for path in sorted(folder.rglob("*trace*")):
        is_own = path.resolve() == folder.resolve() / path.relative_to(folder)
        if is_own and path.is_file() and path.name.endswith((".json", ".json.gz", ".pickle", ".html")):
            found.append(path)
    return found[:100]

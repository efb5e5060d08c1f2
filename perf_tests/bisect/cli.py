"""`python -m perf_tests bisect`: the first bad version of one component, by the suite's own verdict."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fluxfast.workloads import get_workload
from perf_tests.bisect import answer, versions
from perf_tests.bisect.bisection import Bisection
from perf_tests.bisect.environments import recipe_here
from perf_tests.bisect.known import require_good
from perf_tests.bisect.machines import BASELINES, Here, Machines, NoMachine
from perf_tests.bisect.oracle import NOISELESS, split_test
from perf_tests.bisect.printed import asked_by
from perf_tests.bisect.search import Contradiction, Found
from perf_tests.bisect.several import Several, kind_of_search
from perf_tests.bisect.state import Question, State, load
from perf_tests.harness.culprit import AXES
from perf_tests.harness.files import StoreError
from perf_tests.harness.runner import ROOT
from perf_tests.history.store import NAME
from perf_tests.sweep.dispatch import stored_sweep
from perf_tests.sweep.pools import open_pool
from perf_tests.sweep.serial import SerialPool
from perf_tests.sweep.work import describe_machine

FOUND: Final = 0
NO_ANSWER: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(prog="python -m perf_tests bisect", description=__doc__)
    own.add_argument("--axis", required=True, choices=AXES, help="the component that moved")
    own.add_argument("--good", required=True, metavar="VERSION")
    own.add_argument("--bad", required=True, metavar="VERSION")
    own.add_argument("--test", required=True, metavar="NAME[LEVEL]", help="e.g. 'test_latency[float8]'")
    own.add_argument("--junit", metavar="FILE", help="instead of these four: what the first red test of a run printed")
    own.add_argument("--versions", metavar="A,B,C", help="what to search, ends included; default: ask the index")
    own.add_argument("--index-url", help="where nightlies lie, beside the usual index")
    own.add_argument("--pre", action="store_true", help="take pre-releases")
    own.add_argument(
        "--base-env", action="store_true", help="install the component alone, over the packages of this Python"
    )
    own.add_argument(
        "--against", choices=("good", "committed", "none"), default="good",
        help="baseline to judge by: recorded with the good version first (default), the committed one, or none, which "
        "only test_structure can do",
    )  # fmt: skip
    own.add_argument("--bad-is", choices=("regressed", "error"), default="regressed", help="whether an error is bad")
    own.add_argument("--workload", help="as for the suite")
    own.add_argument("--processes", type=int, help="as for the suite")
    own.add_argument("--state", type=Path, help="folder of this search; default: below results/bisect")
    own.add_argument(
        "--history", type=Path, default=ROOT / "results" / NAME, help="nights that may know the good version as bad"
    )
    own.add_argument(
        "--ray", choices=("auto", "local"), help="several versions at once: the running cluster, or one of this machine"
    )
    own.add_argument("--cache", type=Path, help="with --ray: for environments, on every machine; default: .cache")
    return own


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 with an answer, 1 without one, 2 after one sentence if it cannot be asked, 130 if stopped."""
    try:
        question = _with_printed(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if question is None:
        print("no red test of that run names a package that moved since its baseline: there is nothing to search")
        return NO_ANSWER
    return _search(parser().parse_args(question))


def _with_printed(arguments: Sequence[str]) -> Sequence[str] | None:
    """The arguments, with what a red run printed in front of them if they name its JUnit file."""
    reader = argparse.ArgumentParser(add_help=False)
    reader.add_argument("--junit", type=Path)
    known, more = reader.parse_known_args(list(arguments))
    return more if known.junit is None else asked_by(known.junit, more)


def _search(asked: argparse.Namespace) -> int:
    try:
        folder, question = question_of(asked)
        state = load(folder, question)
        if not (state.judged or state.closed):
            require_good(asked.history, question)
        _make_folder(folder)
        machines = _machines(asked, folder, state)
    except (ValueError, ConnectionError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    stored = "state and runs" if asked.ray else "state, runs and environments"
    _say(f"{len(question.versions)} versions; {stored} lie in {folder}")
    search = Bisection(state, folder, _say, machines)
    try:
        step = search.run()
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        return INTERRUPTED
    except (NoMachine, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER
    finally:
        machines.close()
    return _tell(search.state, step)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--state {folder}: cannot be made ({error.strerror}); name a folder to write to") from error


def _machines(asked: argparse.Namespace, folder: Path, state: State) -> Machines:
    """Those that judge.

    Raises:
        ValueError, ConnectionError, StoreError: one sentence.
    """
    recipe = recipe_here(asked.axis, index_url=asked.index_url, over_base=asked.base_env)
    if not asked.ray:
        if stored_sweep(folder).cells:  # begun on a pool, perhaps of another kind of machine
            kind_of_search(folder, state, SerialPool(describe_machine()).nodes())
        return Here(folder, state.question, recipe, _say)
    pool = open_pool(asked.ray, _say)
    try:
        nodes = pool.nodes()
        kind = kind_of_search(folder, state, nodes)
        cache = (asked.cache or ROOT / ".cache").resolve()
        several = Several(folder, state.question, recipe, pool, kind, cache, _say)
        idle = sorted({node.kind for node in nodes} - {kind})
        _say(
            f"up to {several.width()} version(s) at a time on {kind}{'; left idle: ' if idle else ''}{', '.join(idle)}"
        )
    except BaseException:
        pool.close()
        raise
    return several


def question_of(asked: argparse.Namespace) -> tuple[Path, Question]:
    """What is asked, and the folder of its answer; nothing is built.

    Raises:
        ValueError: one sentence.
    """
    name, level = split_test(asked.test)
    if asked.workload:
        get_workload(asked.workload)
    if asked.processes is not None and asked.processes < 1:
        raise ValueError(f"--processes is {asked.processes}, expected at least 1")
    if asked.against == "none" and name != NOISELESS:
        raise ValueError(f"--against none: {name} compares with a baseline; only {NOISELESS} can do without")
    if asked.cache and not asked.ray:
        raise ValueError("--cache goes with --ray; without it environments lie in the --state folder")
    if asked.good == asked.bad:
        raise ValueError(f"--good and --bad are both {asked.good}: there is nothing between them to search")
    names = (
        asked.versions.split(",")
        if asked.versions
        else versions.published(asked.axis, index_url=asked.index_url, pre=asked.pre)
    )
    chosen = versions.between(names, asked.good, asked.bad)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{asked.axis}-{chosen[0]}-{chosen[-1]}-{name}-{level}")
    folder = (asked.state or ROOT / "results" / "bisect" / slug).resolve()
    return folder, Question(
        axis=asked.axis,
        versions=chosen,
        test=f"{name}[{level}]",
        against=asked.against,
        over_base=asked.base_env,
        bad_is_error=asked.bad_is == "error",
        workload=asked.workload,
        processes=asked.processes,
        index_url=asked.index_url,
        pre=asked.pre,
        baseline_folder=str(folder / BASELINES) if asked.against == "good" else None,
    )


def _tell(state: State, step: Contradiction | Found) -> int:
    print(answer.describe(state, step))
    return FOUND if isinstance(step, Found) else NO_ANSWER


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

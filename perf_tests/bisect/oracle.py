"""The suite itself as oracle: `pytest perf_tests` for one test in one version's environment, and what it said."""

from __future__ import annotations

import dataclasses
import errno
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fluxfast.levels import get_level
from perf_tests.bisect.environments import environment_without, last_line
from perf_tests.bisect.state import Judged, Kind, Question
from perf_tests.harness import store
from perf_tests.harness.process_group import process_group
from perf_tests.harness.runner import ROOT
from perf_tests.harness.schema import Result

FILES: Final = {
    "test_image": "test_fidelity.py",
    "test_latency": "test_latency.py",
    "test_memory": "test_memory.py",
    "test_step_error": "test_fidelity.py",
    "test_structure": "test_structure.py",
}
NOISELESS: Final = "test_structure"
"""Counts: judged once where times, images and bytes are judged twice."""
INCONCLUSIVE_STATUS: Final = 9
USAGE_STATUS: Final = 4
NO_VERDICT_STATUS: Final = (2, USAGE_STATUS)
"""The measuring ended, or did not begin: a full disk, a held GPU, a driver that does not answer."""
CANNOT_IMPORT: Final = re.compile(r"exit status \d+: (ImportError|ModuleNotFoundError): (?!libcuda\.|libnvidia-)")
"""Of the process that the suite asks about the machine before all else; the driver's libraries are the machine's."""
DISK: Final = re.compile(rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EIO}|{errno.EROFS})\]")
"""A worker met it, whose result is an error like any other."""
LOG: Final = "log.txt"
JUNIT: Final = "junit.xml"


@dataclasses.dataclass(frozen=True)
class Case:
    """The one test in the JUnit file."""

    message: str
    properties: Mapping[str, str]


def split_test(test: str) -> tuple[str, str]:
    """Name and level of a test id such as `test_latency[float8]`, with or without its file.

    Raises:
        ValueError: if the suite has no such test or level.
    """
    name, bracket, level = test.rpartition("::")[2].partition("[")
    if name not in FILES or not bracket or not level.endswith("]"):
        raise ValueError(f"--test {test!r}: expected NAME[LEVEL] with NAME one of {', '.join(FILES)}")
    return name, get_level(level[:-1]).id


def suite_command(question: Question, python: Path, folder: Path, *, is_recording: bool = False) -> list[str]:
    """What judges one version, or records the good one's baseline.

    Args:
        folder: of this run: results, JUnit file and log.
    """
    name, level = split_test(question.test)
    command = [str(python), "-m", "pytest", f"perf_tests/{FILES[name]}::{name}[{level}]", "--levels", level]
    command += ["-p", "no:cacheprovider", "--results", str(folder / "results"), "--junitxml", str(folder / JUNIT)]
    # Compiled code of this version only: what another one left in a shared cache must not decide.
    command += ["--cache", str(python.parents[1] / "cache")]
    command += ["--workload", question.workload] if question.workload else []
    command += ["--baselines", question.baseline_folder] if question.baseline_folder else []
    if is_recording:
        return [*command, "--record-baseline", "--partial-baseline"]
    command += ["--processes", str(question.processes)] if question.processes else []
    return [*command, "--benchmark-compare"] if question.against != "none" else command


def run_suite(command: Sequence[str], folder: Path) -> int:
    """Exit status of the suite, whose output goes to `log.txt`. It and its workers end with this process."""
    folder.mkdir(parents=True)
    with process_group(command, cwd=ROOT, env=environment_without(), log=folder / LOG) as suite:
        return suite.wait()


def new_folder(root: Path) -> Path:
    """The next of `root/1`, `root/2`, ...; not made yet."""
    return root / str(1 + max((int(path.name) for path in root.glob("*") if path.name.isdecimal()), default=0))


def record(question: Question, python: Path, root: Path) -> Judged:
    """Record the good version's baseline: GOOD if it is stored, else why not."""
    folder = new_folder(root)
    status = run_suite(suite_command(question, python, folder, is_recording=True), folder)
    name, level = split_test(question.test)
    case, said = read_case(folder / JUNIT, f"{name}[{level}]"), last_line(folder / LOG)
    if status == 0:
        return Judged(kind=Kind.GOOD, why="baseline recorded", folder=str(folder))
    kind, why = classify(status, case, said, bad_is_error=question.bad_is_error)
    # A green test of a run that may not be recorded: the suite's last words say why.
    return Judged(kind=Kind.UNUSABLE if kind is Kind.GOOD else kind, why=why, folder=str(folder))


def judge(question: Question, python: Path, root: Path) -> Judged:
    """One run of the suite in a version's environment; everything it left is below `root`."""
    folder = new_folder(root)
    status = run_suite(suite_command(question, python, folder), folder)
    name, level = split_test(question.test)
    case = read_case(folder / JUNIT, f"{name}[{level}]")
    kind, why = classify(status, case, last_line(folder / LOG), bad_is_error=question.bad_is_error)
    results = _stored(folder / "results")
    return Judged(
        kind=kind,
        why=why,
        numbers=_numbers(case),
        samples_s={
            id: samples
            for id in results
            if (samples := [m.measurement.samples_s for m in results[id] if m.measurement])
        },
        facts={
            proof.what: proof.observed
            for own in results.get(level, [])[:1]
            if own.measurement
            for proof in own.measurement.proofs
        },
        folder=str(folder),
    )


def classify(status: int, case: Case | None, said: str, *, bad_is_error: bool) -> tuple[Kind, str]:
    """What the suite's exit status and its one test say about the version.

    A level that cannot be built or run says nothing about its speed, so an error is no vote unless it is what is
    searched for. A step that was not applied is what the suite exists to find, and always bad. What the machine says
    of itself says nothing about the version, and is asked again.
    """
    verdict = case.properties.get("verdict") if case else None
    rule = case.properties.get("rule", "") if case else ""
    if case is None or verdict is None:
        why = f"no verdict (exit status {status}): {case.message if case else said}"
        if status == USAGE_STATUS and CANNOT_IMPORT.search(said):
            return Kind.BAD if bad_is_error else Kind.UNUSABLE, why
        return Kind.INCONCLUSIVE if status in NO_VERDICT_STATUS or status < 0 else Kind.UNUSABLE, why
    why = f"{verdict} ({rule}): {_message(case.message)}" if case.message else f"{verdict} ({rule})"
    if verdict == "void" or status == INCONCLUSIVE_STATUS or (verdict == "error" and DISK.search(why)):
        return Kind.INCONCLUSIVE, why
    if verdict in ("pass", "improved"):
        return (Kind.GOOD, why) if status == 0 else (Kind.UNUSABLE, f"passed, but exit status {status}: {said}")
    if verdict == "regressed" or rule == "step_not_applied":
        return Kind.BAD, why
    if verdict == "error":
        return Kind.BAD if bad_is_error else Kind.UNUSABLE, why
    return Kind.UNUSABLE, why


def read_case(junit: Path, test: str) -> Case | None:
    """The test in a JUnit file; None if the run wrote none or did not come to the test."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    for case in cases:
        if case.get("name") == test:
            told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            properties = {own.get("name", ""): own.get("value", "") for own in case.iter("property")}
            return Case(message=(told.get("message") or "") if told is not None else "", properties=properties)
    return None


def _message(text: str) -> str:
    """A verdict's first paragraph, without the outcome that stands before it."""
    first = text.split("Reproduce with")[0].strip().splitlines()[0]
    return first.partition("): ")[2] or first


def _numbers(case: Case | None) -> dict[str, float]:
    numbers = {}
    for name, value in (case.properties if case else {}).items():
        try:
            number = float(value)
        except ValueError:  # the outcome, the rule, and "None" where a number does not apply
            continue
        if math.isfinite(number):
            numbers[name] = number
    return numbers


def _stored(results: Path) -> dict[str, list[Result]]:
    """Level -> its results in the one run below `results`, as far as they can be read."""
    found: dict[str, list[Result]] = {}
    for path in sorted(results.glob("*/*/*/result.json")):
        try:
            found.setdefault(path.parents[1].name, []).append(store.read_result(path))
        except store.ResultError:  # the verdict says what is wrong with it
            continue
    return found

"""A stored run as a `Session` that judges it again, outside pytest. No torch, nothing is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxfast.levels import LEVELS
from fluxfast.workloads import Workload, get_workload
from perf_tests.harness import store
from perf_tests.harness.files import StoreError
from perf_tests.harness.schema import Outcome, Verdict
from perf_tests.harness.session import Session
from perf_tests.harness.stored_run import read_facts

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class ReadOnlySession(Session):
    """A `Session` that leaves the run's folder as it is: no difference maps are written. It reads an image once."""

    _images: dict[tuple[str, int], Any] = dataclasses.field(default_factory=dict)

    def image(self, level: str, index: int) -> Any:
        """As `Session.image`."""
        if (level, index) not in self._images:
            self._images[level, index] = super().image(level, index)
        return self._images[level, index]

    def show_difference(self, level: str) -> str:
        """Where the maps are drawn instead."""
        return f"Look at {self.image_path(level, self.worst_process(level))} and at the difference map of the report."


def open_run(folder: Path, baselines: Path | None) -> ReadOnlySession:
    """The stored run in `folder`, read whole, against the newest baseline of its machine and workload.

    Args:
        baselines: folder of baselines; None if only what was measured counts.

    Raises:
        StoreError: one sentence: not a run, of another schema, partial, damaged, or a baseline that cannot be read.
    """
    if not os.path.isdir(folder):  # False where is_dir() raises: a name that no folder can have
        raise store.ResultError(f"{folder} is not a folder: name the folder of one run, as in results/<run>")
    facts = read_facts(folder)
    try:
        workload = get_workload(facts.workload)
    except ValueError as error:
        raise store.ResultError(f"{folder}: {error}") from error
    levels = [level for level in LEVELS if level in facts.levels]
    place = (baselines or ROOT / "baselines") / facts.slug
    path = store.find_baseline(place, workload.id) if baselines is not None and place.is_dir() else None
    session = ReadOnlySession(
        folder=folder,
        workload=workload,
        levels=levels,
        unavailable=facts.unavailable,
        processes=facts.processes,
        slug=facts.slug,
        baseline=store.read_baseline(path) if path else None,
        baseline_folder=place,
        is_compared=baselines is not None,
        measure=None,
    )
    session.results  # noqa: B018  # a partial run is refused here
    return session


TESTS: dict[str, Callable[[Session, str], Verdict]] = {
    "test_structure": Session.structure,
    "test_latency": Session.latency,
    "test_image": Session.fidelity,
    "test_step_error": Session.step_error,
    "test_memory": Session.memory,
}
"""Name of a test of perf_tests -> the verdict that it asserts on, in the order of a report."""

FILES = {
    "test_structure": "perf_tests/test_structure.py",
    "test_latency": "perf_tests/test_latency.py",
    "test_image": "perf_tests/test_fidelity.py",
    "test_step_error": "perf_tests/test_fidelity.py",
    "test_memory": "perf_tests/test_memory.py",
}


def tests_of(workload: Workload) -> list[str]:
    """Names of the tests that judge each level of a workload; images of random weights are noise and not judged."""
    return [test for test in TESTS if test != "test_image" or not workload.has_random_weights]


def judge(session: Session) -> dict[str, dict[str, Verdict]]:
    """Level -> test -> verdict, as `pytest perf_tests --replay RUN --benchmark-compare` gives them.

    What a test would skip is left out: images of random weights, and every other test of a level whose step had no
    effect. A file that cannot be read is an error of its test, in the words of the failure.
    """
    found: dict[str, dict[str, Verdict]] = {}
    for level in session.levels:
        found[level] = {}
        for test in tests_of(session.workload):
            try:
                verdict = TESTS[test](session, level)
            except StoreError as error:
                verdict = Verdict(outcome=Outcome.ERROR, level=level, rule="unreadable", message=str(error))
            if verdict.rule == "step_not_applied" and test != "test_structure":
                continue
            found[level][test] = verdict
    return found

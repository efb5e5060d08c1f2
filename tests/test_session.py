"""Sessions with made-up workers: what is measured, how often, and into which folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from suite_samples import LEVELS, UNAVAILABLE, changed, failed, put, sample

from fluxfast.workloads import TINY
from perf_tests.harness.schema import Counters, Result
from perf_tests.harness.session import Session
from perf_tests.harness.stored_run import read_facts, read_run


class Machine:
    """A `measure` that stores what it is told and counts the calls."""

    def __init__(self, *first: Result) -> None:
        self.first = {(result.level, result.process): result for result in first}
        self.calls: list[tuple[tuple[str, ...], int, Path]] = []

    def __call__(self, levels: Sequence[str], processes: int, folder: Path) -> dict[str, list[Result]]:
        self.calls.append((tuple(levels), processes, folder))
        for level in levels:
            for process in range(processes):
                own = self.first.get((level, process)) if len(self.calls) == 1 else None
                put(folder, own or sample(level, process))
        return read_run(folder, levels, processes)


def session(tmp: Path, machine: Machine, levels: Sequence[str] = LEVELS) -> Session:
    made = iter([tmp / "run"])
    (tmp / "run").mkdir()
    return Session(
        folder=tmp, workload=TINY, levels=levels, unavailable=UNAVAILABLE, processes=2, slug="cpu", baseline=None,
        baseline_folder=tmp / "baselines", is_compared=False, measure=machine, make_folder=lambda: next(made),
    )  # fmt: skip


def test_one_folder_even_if_every_worker_fails(tmp_path: Path) -> None:
    """The folder is made once, and measured once, however many tests ask."""
    machine = Machine(*(failed(level, process=process) for level in LEVELS for process in (0, 1)))
    own = session(tmp_path, machine)
    assert {own.structure(level).rule for level in LEVELS} == {"oom"}
    assert {own.latency(level).rule for level in LEVELS} == {"oom"}
    assert len(machine.calls) == 1
    assert own.unmeasured() == list(LEVELS)
    assert own.folder == tmp_path / "run"
    assert read_facts(own.folder).processes == 2


def test_what_ended_the_measuring_is_not_tried_again(tmp_path: Path) -> None:
    """Neither the run nor a confirmation is measured after one of them raised."""
    calls = []

    def measure(levels: Sequence[str], processes: int, folder: Path) -> dict[str, list[Result]]:
        calls.append(folder)
        raise OSError(28, "No space left on device")

    own = session(tmp_path, Machine())
    own.measure = measure
    for ask in (own.structure, own.latency, own.memory):
        with pytest.raises(OSError, match="No space left"):
            ask("aoti")
    assert calls == [tmp_path / "run"]


def test_references_are_measured_with_a_chosen_level(tmp_path: Path) -> None:
    """fp32, bf16 and the parent come along; for an unavailable parent the nearest level below it that runs."""
    machine = Machine()
    own = session(tmp_path, machine, ["float8"])
    assert own.structure("float8").ok
    assert machine.calls[0][0] == ("fp32", "bf16", "channels_last", "float8")
    assert own.unmeasured() == []


def test_disturbed_level_is_measured_once_more(tmp_path: Path) -> None:
    """Only that level, into `rerun`; images are then taken from there."""
    machine = Machine(changed("compile", 1, result={"counters": Counters(foreign_pids=[7])}))
    own = session(tmp_path, machine)
    assert own.results["compile"][1].counters == Counters()
    assert [call[0] for call in machine.calls] == [LEVELS, ("compile",)]
    assert own.image_path("compile", 0) == tmp_path / "run" / "rerun" / "compile" / "0" / "image.png"
    assert own.image_path("bf16", 0) == tmp_path / "run" / "bf16" / "0" / "image.png"


def test_disturbed_confirmation_is_measured_once_more(tmp_path: Path) -> None:
    """As the run itself is, and a replay reads the same."""
    machine = Machine()
    own = session(tmp_path, machine)
    own.structure("aoti")
    machine.first = {("aoti", 3): changed("aoti", 3, result={"counters": Counters(thermal_violation_ns=1)})}
    machine.calls.clear()
    assert all(result.counters == Counters() for result in own.confirm("aoti")["aoti"])
    confirming = tmp_path / "run" / "confirm" / "aoti"
    assert [(call[0][-1], call[2]) for call in machine.calls] == [("aoti", confirming), ("aoti", confirming / "rerun")]
    own.measure = None
    assert all(result.counters == Counters() for result in own.confirm("aoti")["aoti"])

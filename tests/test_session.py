"""Sessions with made-up workers: what is measured, how often, and into which folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gate_samples
import pytest
from suite_samples import LEVELS, UNAVAILABLE, changed, failed, put, sample, write_run

from fluxfast.workloads import TINY
from perf_tests.harness.lanes import Job
from perf_tests.harness.replay import TESTS, open_run
from perf_tests.harness.runner import schedule
from perf_tests.harness.schema import Counters, ErrorKind, Outcome, Result
from perf_tests.harness.session import Session
from perf_tests.harness.store import ResultError, read_result
from perf_tests.harness.stored_run import read_facts, refuse_other_workload


class Machine:
    """A `measure` that stores what it is told, of the first call and of reruns, and remembers the calls."""

    def __init__(self, *first: Result, again: Result | None = None) -> None:
        self.first = {(result.level, result.process): result for result in first}
        self.again = again
        self.calls: list[tuple[list[Job], Path]] = []

    def __call__(self, jobs: Sequence[Job], folder: Path) -> dict[Job, Result]:
        self.calls.append((list(jobs), folder))
        again = {(own.level, own.process): own for own in (self.again,) if own}
        for job in jobs:
            put(folder, (self.first if len(self.calls) == 1 else again).get(job) or sample(*job))
        return {(level, at): read_result(folder / level / str(at) / "result.json") for level, at in jobs}


def session(tmp: Path, machine: Machine, levels: Sequence[str] = LEVELS, processes: int = 2) -> Session:
    made = iter([tmp / "run"])
    (tmp / "run").mkdir()
    return Session(
        folder=tmp, workload=TINY, levels=levels, unavailable=UNAVAILABLE, processes=processes, slug="cpu",
        baseline=None, baseline_folder=tmp / "baselines", is_compared=False, measure=machine,
        make_folder=lambda: next(made),
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

    def measure(jobs: Sequence[Job], folder: Path) -> dict[Job, Result]:
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
    assert machine.calls[0][0] == schedule(["fp32", "bf16", "channels_last", "float8"], 2)
    assert own.unmeasured() == []


HOT = {"counters": Counters(thermal_violation_ns=1)}


def first(result: Result) -> float:
    """The first round, seconds."""
    assert result.measurement is not None
    return result.measurement.samples_s[0]


def first_samples(own: Session, level: str) -> list[float]:
    return [first(result) for result in own.results[level]]


def replayed(own: Session) -> Session:
    return dataclasses.replace(own, measure=None, _results={}, _latency={})


def test_disturbed_process_is_measured_once_more(tmp_path: Path) -> None:
    """It alone, into `rerun`, and it replaces itself: time, image and verdict are those of the rerun, replayed too."""
    machine = Machine(*(changed("compile", at, 3.0, HOT if at == 1 else None) for at in range(3)))
    own = session(tmp_path, machine, processes=3)
    slow, good = ([changed("compile", at, scale) for at in range(3)] for scale in (3.0, 1.0))
    expected = [first(slow[0]), first(good[1]), first(slow[2])]
    assert first_samples(own, "compile") == expected
    run = tmp_path / "run"
    assert machine.calls[1:] == [([("compile", 1)], run / "rerun")]
    places = [run / "compile/0", run / "rerun/compile/1", run / "compile/2"]
    assert [own.image_path("compile", at).parent for at in range(3)] == places
    again = replayed(own)
    assert first_samples(again, "compile") == expected
    assert again.results == own.results
    assert [again.latency(level) for level in LEVELS] == [own.latency(level) for level in LEVELS]


def test_reruns_are_in_the_order_of_the_schedule(tmp_path: Path) -> None:
    """Forward, backward, as the run itself, so that a drift moves all levels alike."""
    disturbed = [("bf16", 0), ("compile", 1), ("bf16", 1)]
    machine = Machine(*(changed(*job, result=HOT) for job in disturbed))
    session(tmp_path, machine).structure("bf16")
    assert machine.calls[0][0] == schedule(LEVELS, 2)
    assert machine.calls[1][0] == disturbed


def test_disturbed_twice_is_void(tmp_path: Path) -> None:
    """Nothing is measured a third time, and a replay says the same."""
    machine = Machine(changed("compile", 1, result=HOT), again=changed("compile", 1, result=HOT))
    own = session(tmp_path, machine)
    verdict = own.latency("compile")
    assert (verdict.outcome, len(machine.calls)) == (Outcome.VOID, 2) and "process 1 was disturbed" in verdict.message
    assert replayed(own).latency("compile") == verdict


def test_a_level_that_failed_is_not_measured_again(tmp_path: Path) -> None:
    """Whatever disturbed its other processes: it has no time to judge."""
    machine = Machine(failed("compile"), changed("compile", 1, result=HOT))
    own = session(tmp_path, machine)
    assert own.latency("compile").rule == "oom" and len(machine.calls) == 1


def test_another_power_limit_is_measured_again(tmp_path: Path) -> None:
    """Only in the process that ran at it; the baseline says which is the right one."""
    limits_w = {job: 700 for job in schedule(LEVELS, 2)} | {("compile", 1): 500}
    told = {job: {"environment": gate_samples.environment(limit_w)} for job, limit_w in limits_w.items()}
    machine = Machine(*(changed(*job, result=result) for job, result in told.items()))
    own = session(tmp_path, machine)
    own.baseline = gate_samples.baseline()
    own.structure("compile")
    assert [call[0] for call in machine.calls[1:]] == [[("compile", 1)]]


def test_reruns_of_undisturbed_processes_count(tmp_path: Path) -> None:
    """Older runs hold all processes of a disturbed level there, and so may one that is resumed."""
    own = session(tmp_path, machine := Machine(changed("compile", 1, result=HOT)))
    run = tmp_path / "run"
    for process in range(2):
        put(run / "rerun", sample("compile", process, 2.0))
    expected = [first(sample("compile", 0, 2.0)), first(sample("compile", 1))]
    assert first_samples(own, "compile") == expected and machine.calls[1][0] == [("compile", 1)]
    assert own.image_path("compile", 0).parent == run / "rerun/compile/0"
    assert first_samples(replayed(own), "compile") == expected


def test_rerun_that_left_no_result_does_not_count(tmp_path: Path) -> None:
    """A run that was killed while it measured again is judged by what it has."""
    own = session(tmp_path, Machine(changed("compile", 1, result=HOT)))
    own.structure("compile")
    rerun = tmp_path / "run/rerun/compile/1"
    (rerun / "result.json").unlink()
    again = replayed(own)
    assert again.latency("compile").outcome is Outcome.VOID
    assert again.image_path("compile", 1).parent == tmp_path / "run/compile/1"


@pytest.mark.parametrize("kind", [ErrorKind.INTERRUPTED, ErrorKind.OOM])
def test_rerun_that_failed_takes_no_measurement_away(tmp_path: Path, kind: ErrorKind) -> None:
    """After Ctrl-C or an oom the disturbed process counts: no red, latency void with both reasons. Replayed too."""
    machine = Machine(changed("compile", 1, 3.0, HOT), again=failed("compile", kind, 1))
    own = session(tmp_path, machine)
    assert own.results["compile"][1].measurement is not None and own.unmeasured() == []
    assert machine.calls[1:] == [([("compile", 1)], tmp_path / "run/rerun")]
    for run in (own, replayed(own)):
        assert run.results == own.results
        assert all(test(run, "compile").ok for name, test in TESTS.items() if name != "test_latency")
        verdict = run.latency("compile")
        assert verdict.outcome is Outcome.VOID and "process 1 was disturbed" in verdict.message
        assert f"the rerun of process 1 gave no measurement ({kind.value} in stage 'apply')" in verdict.message
        assert run.image_path("compile", 1).parent == tmp_path / "run/compile/1"


def test_rerun_that_the_code_failed_counts(tmp_path: Path) -> None:
    """A disturbance excuses no step that had no effect; replayed too."""
    again = failed("compile", ErrorKind.STEP_NOT_APPLIED, 1)
    own = session(tmp_path, Machine(changed("compile", 1, 3.0, HOT), again=again))
    assert own.results
    for run in (own, replayed(own)):
        assert run.structure("compile").rule == "step_not_applied"
        assert run.place("compile", 1) == tmp_path / "run/rerun/compile/1"


def test_run_of_a_changed_workload_can_be_read(tmp_path: Path) -> None:
    """Report and history show old runs; what judges, draws or goes on with one refuses it."""
    run = write_run(tmp_path / "run", workload_digest="0" * 16)
    put(run, changed("compile", result={"workload_digest": "0" * 16}))
    old = open_run(run, None)
    assert old.structure("compile").ok
    with pytest.raises(ResultError, match="with digest 0000000000000000, in this checkout it is"):
        refuse_other_workload(run, read_facts(run), old.workload, old.results)


@pytest.mark.parametrize("is_confirming", [False, True])
def test_rerun_of_a_process_that_the_run_lacks(tmp_path: Path, is_confirming: bool) -> None:
    """A damaged run, in one sentence."""
    own = session(tmp_path, Machine())
    own.confirm("aoti")
    folder = own.folder / "confirm/aoti" if is_confirming else own.folder
    put(folder / "rerun", sample("aoti", 10))
    again = replayed(own)
    with pytest.raises(ResultError, match=r"rerun of level 'aoti', process 10, and of that level itself only .*1"):
        again.confirm("aoti")


def test_disturbed_confirmation_is_measured_once_more(tmp_path: Path) -> None:
    """As the run itself is: one process, below the confirmation, and a replay reads the same."""
    machine = Machine()
    own = session(tmp_path, machine)
    own.structure("aoti")
    machine.first = {("aoti", 3): changed("aoti", 3, 2.0, HOT)}
    machine.calls.clear()
    confirmed = own.confirm("aoti")
    assert [result.process for result in confirmed["aoti"]] == list(range(own.policy.confirmation_processes))
    assert confirmed["aoti"][3].counters == Counters()
    assert first(confirmed["aoti"][3]) == first(sample("aoti", 3))
    confirming = tmp_path / "run" / "confirm" / "aoti"
    assert [call[1] for call in machine.calls] == [confirming, confirming / "rerun"]
    assert machine.calls[1][0] == [("aoti", 3)]
    assert [path.parent.name for path in (confirming / "rerun").rglob("result.json")] == ["3"]
    assert replayed(own).confirm("aoti") == confirmed

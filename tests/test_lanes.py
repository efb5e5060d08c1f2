"""Workers on several GPUs side by side: who runs where and when, and what ends them all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from ctrl_c import interrupted_after
from suite_samples import sample

from perf_tests.harness import progress, runner
from perf_tests.harness.lanes import Gpu, Job, RunStopped, run_jobs
from perf_tests.harness.progress import Deadlines, OnProgress, Turn
from perf_tests.harness.schema import ErrorKind, Result

FAKE = (sys.executable, str(pathlib.Path(__file__).with_name("fake_worker.py")), "--behave")
DEADLINES = Deadlines(load_s=20, apply_s=20, warmup_s=20, measure_s=60, finish_s=20)
JOBS = runner.schedule(["bf16", "compile"], 3)


def run(
    folder: pathlib.Path,
    jobs: Sequence[Job],
    gpus: Sequence[Gpu],
    behave: Callable[[Job], str] = lambda job: "slow",
    *,
    is_ahead: bool = True,
    on_progress: OnProgress = lambda *_: None,
) -> dict[Job, Result]:
    """The jobs in stand-in workers that do as `behave` says of each."""

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        started_s = time.monotonic()
        result = runner.run_level(
            level,
            "tiny",
            process,
            folder,
            deadlines=DEADLINES,
            gpu=gpu,
            on_progress=on_progress,
            turn=turn,
            worker_command=(*FAKE, behave((level, process))),
        )
        (folder / level / str(process) / "ran").write_text(json.dumps([started_s, time.monotonic()]))
        return result

    return run_jobs(jobs, gpus, run_job, on_progress, is_ahead=is_ahead)


def gpu_of(out: pathlib.Path) -> str:
    """CUDA_VISIBLE_DEVICES as the worker in `out` had it."""
    lines = (out / "environment").read_text().splitlines()
    (found,) = [line.partition("=")[2] for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return found


@dataclasses.dataclass(frozen=True)
class Times:
    """When a worker started, had imported, was let in, measured, had measured and ended; on this machine's clock."""

    start: float
    imported: float
    load: float
    measure: float
    finish: float
    end: float


def times_of(out: pathlib.Path) -> Times:
    lines = [json.loads(line) for line in (out / progress.PROGRESS_FILE).read_text().splitlines()]
    at = {line["stage"]: line["t"] for line in lines if "stage" in line}
    imported = next((line["t"] for line in lines if line.get("waits") == "load"), at["load"])
    started, ended = json.loads((out / "ran").read_text())
    return Times(started, imported, at["load"], at.get("measure", ended), at.get("finish", ended), ended)


def times_on(folder: pathlib.Path, gpu: str) -> list[Times]:
    """Of each worker of a GPU, in the order in which they were let in."""
    outs = [path.parent for path in folder.rglob(progress.PROGRESS_FILE) if gpu_of(path.parent) == gpu]
    return sorted(map(times_of, outs), key=lambda own: own.load)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_one_worker_has_a_gpu(tmp_path: pathlib.Path, is_ahead: bool) -> None:
    """Each job once, on both GPUs; a GPU's next one imports ahead, where it may, but not while one measures."""
    results = run(tmp_path, JOBS, [3, "GPU-8a"], is_ahead=is_ahead)
    assert {job: (own.level, own.process) for job, own in results.items()} == {job: job for job in JOBS}
    assert all(own.failure is None for own in results.values())
    of = {gpu: times_on(tmp_path, gpu) for gpu in ("3", "GPU-8a")}
    assert min(map(len, of.values())) > 1 and sum(map(len, of.values())) == len(JOBS)
    for own in of.values():
        for before, after in itertools.pairwise(own):
            assert before.end - 0.2 < after.load, "the runner looks for the end ten times a second"
        ahead = [after.imported < before.end for before, after in itertools.pairwise(own)]
        assert ahead[0] == is_ahead and any(ahead) == is_ahead, "the last jobs are left for whichever is free"
        for one, other in itertools.permutations(own, 2):
            assert other.imported < one.measure or one.finish < other.start
    first, other = (own[0] for own in of.values())
    assert first.load < other.finish and other.load < first.finish, "side by side"


def test_who_measures_knows_who_waits(tmp_path: pathlib.Path) -> None:
    """NVML may show the context of a worker that waits; it is no stranger. The last one has nobody beside it."""
    run(tmp_path, JOBS[:3], [0])
    told = [json.loads((tmp_path / level / str(process) / "waiting").read_text()) for level, process in JOBS[:3]]
    pids = [int((tmp_path / level / str(process) / "pid").read_text()) for level, process in JOBS[:3]]
    assert told == [[pids[1]], [pids[2]], []]


@pytest.mark.parametrize("behave", ["import", "impatient"])
def test_no_import_begins_while_one_measures(tmp_path: pathlib.Path, behave: str) -> None:
    """Also where the one that imported ahead is gone, before it waits or while it does, and a place is free."""
    jobs = [("bf16", 0), ("bf16", 1), ("bf16", 2)]
    results = run(tmp_path, jobs, [0], lambda job: behave if job == jobs[1] else "very slow")
    assert [results[job].failure is None for job in jobs] == [True, False, True]
    one, gone, other = (times_of(tmp_path / level / str(process)) for level, process in jobs)
    assert other.imported < one.measure or one.finish - 0.2 < other.start
    assert behave == "import" or one.measure < gone.end < one.finish, "it was gone while the first one measured"


@pytest.mark.parametrize(("count", "gpus"), [(2, 2), (4, 4), (3, 2)])
def test_no_gpu_is_idle_for_want_of_a_job_that_waits(count: int, gpus: int) -> None:
    """A job is only begun ahead where the other GPUs have some too."""
    on: dict[Job, Gpu] = {}

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        assert turn is not None
        while turn("load", 1) is None:
            time.sleep(0.01)
        on[level, process] = gpu
        end = time.monotonic() + 10
        while len(set(on.values())) < gpus and time.monotonic() < end:
            time.sleep(0.01)
        return sample(level, process)

    jobs = [("bf16", process) for process in range(count)]
    assert len(run_jobs(jobs, list(range(gpus)), run_job, lambda *_: None, is_ahead=True)) == count
    assert set(on.values()) == set(range(gpus))


def test_each_level_runs_on_all_gpus() -> None:
    """GPUs differ: each prefers the level that it has had least, and one GPU keeps the schedule's order."""
    on: dict[str, list[Gpu]] = {}
    lock = threading.Lock()

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        with lock:
            on.setdefault(level, []).append(gpu)
        time.sleep(0.02 if gpu else 0.03)
        return sample(level, process)

    levels = ["fp32", "bf16", "compile", "fused_qkv", "channels_last"]
    run_jobs(runner.schedule(levels, 4), [0, 1], run_job, lambda *_: None, is_ahead=False)
    assert all(1 <= own.count(0) <= 3 for own in on.values()) and sum(own.count(0) for own in on.values()) <= 10
    jobs = runner.schedule(levels, 3)
    assert list(run_jobs(jobs, [0], run_job, lambda *_: None, is_ahead=False)) == jobs


@pytest.mark.parametrize("is_ahead", [True, False])
def test_disturbed_job_runs_on_another_gpu(is_ahead: bool) -> None:
    """Also if all were disturbed on one GPU, which then has nothing to do; one alone takes it all the same."""
    on: dict[Job, Gpu] = {}

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        while turn is not None and turn("load", 1) is None:
            time.sleep(0.01)
        on[level, process] = gpu
        return sample(level, process)

    jobs = [("fp32", 0), ("fp32", 3), ("bf16", 1)]
    for before in ({jobs[0]: 0, jobs[1]: 1, jobs[2]: 0}, dict.fromkeys(jobs, 1)):
        on.clear()
        run_jobs(jobs, [0, 1], run_job, lambda *_: None, is_ahead=is_ahead, elsewhere=before)
        assert on == {job: 1 - gpu for job, gpu in before.items()}
    assert len(run_jobs(jobs, [1], run_job, lambda *_: None, is_ahead=is_ahead, elsewhere=before)) == len(jobs)


def test_progress_is_of_the_worker_whose_turn_it_is(tmp_path: pathlib.Path) -> None:
    """One after the other, as if nobody imported ahead."""
    said: list[Job] = []
    run(tmp_path, JOBS, [0], on_progress=lambda level, process, *_: said.append((level, process)))
    assert [job for job, _ in itertools.groupby(said)] == JOBS


def test_jobs_are_taken_in_order() -> None:
    """One lane's jobs are those of the schedule, first to last."""
    started: list[Job] = []

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        assert turn is not None
        while turn("load", 1) is None:
            time.sleep(0.01)
        started.append((level, process))
        return sample(level, process)

    run_jobs(JOBS, [None], run_job, lambda *_: None, is_ahead=True)
    assert started == JOBS


def test_an_error_ends_the_other_lanes(tmp_path: pathlib.Path) -> None:
    """It is what is raised; the other worker is gone and recorded, what was measured stays, nothing new starts."""
    (tmp_path / "compile").write_text("no folder can be made here")
    jobs = [("bf16", 0), ("bf16", 1), ("compile", 0), ("bf16", 2)]
    began = time.monotonic()
    with pytest.raises(OSError, match="compile"):
        run(tmp_path, jobs, [0, 1], lambda job: "hang" if job == ("bf16", 0) else "slow", is_ahead=False)
    assert time.monotonic() - began < 15
    failure = Result.model_validate_json((tmp_path / "bf16/0/result.json").read_bytes()).failure
    assert failure is not None and failure.kind is ErrorKind.INTERRUPTED and "RunStopped" in failure.message
    assert not is_alive(tmp_path / "bf16/0/pid")
    assert Result.model_validate_json((tmp_path / "bf16/1/result.json").read_bytes()).measurement is not None
    assert not (tmp_path / "bf16/2").exists()


def test_a_failed_worker_ends_nothing(tmp_path: pathlib.Path) -> None:
    """It is a result, and frees its GPU without having reached `finish`."""
    results = run(tmp_path, JOBS[:3], [0], lambda job: "oom" if job == JOBS[0] else "slow")
    failures = [results[job].failure for job in JOBS[:3]]
    assert failures[0] is not None and failures[0].kind is ErrorKind.OOM and failures[1:] == [None, None]


def test_ctrl_c_ends_all_lanes(tmp_path: pathlib.Path) -> None:
    """Each worker is gone and recorded, those that wait too; none starts after it."""

    def all_run() -> None:
        end = time.monotonic() + 20
        wanted = {"grandchild": 2, "pid": 4}
        while any(len(list(tmp_path.glob(f"*/*/{name}"))) < count for name, count in wanted.items()):
            assert time.monotonic() < end
            time.sleep(0.02)

    with interrupted_after(all_run):
        run(tmp_path, JOBS, [0, 1], lambda job: "hang")
    found = {path.parent: Result.model_validate_json(path.read_bytes()) for path in tmp_path.rglob("result.json")}
    assert len(found) == 4
    for out, result in found.items():
        assert result.failure is not None and result.failure.kind is ErrorKind.INTERRUPTED
        assert not is_alive(out / "pid")


def test_the_first_error_is_raised() -> None:
    """Not that of a worker that it ended, whichever lane comes first."""
    is_failed = threading.Event()

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
        if gpu == 1:
            is_failed.set()
            raise ValueError("first")
        is_failed.wait(20)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                on_progress(level, process, "load", "", 0.0)
            except RunStopped as error:
                raise OSError("second") from error
        raise AssertionError("nobody stopped it")

    with pytest.raises(ValueError, match="first"):
        run_jobs(JOBS, [0, 1], run_job, lambda *_: None, is_ahead=False)


def is_alive(path: pathlib.Path) -> bool:
    """Whether the process whose number is in `path` is there; the runner has waited for its end."""
    return pathlib.Path(f"/proc/{path.read_text()}").exists()

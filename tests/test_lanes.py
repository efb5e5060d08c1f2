"""Workers on several GPUs side by side: who runs where and when, and what ends them all."""

from __future__ import annotations

import inspect
import itertools
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from ctrl_c import interrupted_after
from suite_samples import failed, sample

from perf_tests.harness import progress, runner, worker
from perf_tests.harness.lanes import IMPORTING, Gpu, Job, RunStopped, run_jobs
from perf_tests.harness.progress import Deadlines, OnProgress
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
    is_overlapping: bool = True,
) -> dict[Job, Result]:
    """The jobs in stand-in workers that do as `behave` says of each."""

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress) -> Result:
        started_s = time.monotonic()
        result = runner.run_level(
            level,
            "tiny",
            process,
            folder,
            deadlines=DEADLINES,
            gpu=gpu,
            on_progress=on_progress,
            worker_command=(*FAKE, behave((level, process))),
        )
        (folder / level / str(process) / "ran").write_text(json.dumps([started_s, time.monotonic()]))
        return result

    return run_jobs(jobs, gpus, run_job, lambda *_: None, is_overlapping=is_overlapping)


def gpu_of(out: pathlib.Path) -> str:
    """CUDA_VISIBLE_DEVICES as the worker in `out` had it."""
    lines = (out / "environment").read_text().splitlines()
    (found,) = [line.partition("=")[2] for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return found


def times_s(folder: pathlib.Path, gpu: str) -> list[tuple[float, float, float]]:
    """Of each worker of a GPU, in the order of their starts: start, end of `measure`, end; on this machine's clock."""
    found = []
    for path in folder.rglob(progress.PROGRESS_FILE):
        if gpu_of(path.parent) == gpu:
            at = {line["stage"]: line["t"] for line in map(json.loads, path.read_text().splitlines())}
            started, ended = json.loads((path.parent / "ran").read_text())
            found.append((started, at["finish"], ended))
    return sorted(found)


@pytest.mark.parametrize("is_overlapping", [True, False])
def test_one_worker_a_gpu_is_before_the_end_of_measuring(tmp_path: pathlib.Path, is_overlapping: bool) -> None:
    """Each job once, on both GPUs; a GPU's next one begins while the last one ends, where it may, and not before."""
    results = run(tmp_path, JOBS, [3, "GPU-8a"], is_overlapping=is_overlapping)
    assert {job: (own.level, own.process) for job, own in results.items()} == {job: job for job in JOBS}
    assert all(own.failure is None for own in results.values())
    of = {gpu: times_s(tmp_path, gpu) for gpu in ("3", "GPU-8a")}
    assert min(map(len, of.values())) > 1 and sum(map(len, of.values())) == len(JOBS)
    for own in of.values():
        for (_, measured, ended), (start, _, _) in itertools.pairwise(own):
            assert measured < start
            assert (start < ended) == is_overlapping
    first, other = (own[0] for own in of.values())
    assert first[0] < other[1] and other[0] < first[1], "side by side"


def test_jobs_are_taken_in_order() -> None:
    """One lane's jobs are those of the schedule, first to last."""
    started: list[Job] = []

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress) -> str:
        started.append((level, process))
        for stage in progress.STAGES:
            on_progress(level, process, stage, "", 0.0)
        return level

    run_jobs(JOBS, [None], run_job, lambda *_: None, is_overlapping=True)
    assert started == JOBS


def test_an_error_ends_the_other_lanes(tmp_path: pathlib.Path) -> None:
    """It is what is raised; the other worker is gone and recorded, what was measured stays, nothing new starts."""
    (tmp_path / "compile").write_text("no folder can be made here")
    jobs = [("bf16", 0), ("bf16", 1), ("compile", 0), ("bf16", 2)]
    began = time.monotonic()
    with pytest.raises(OSError, match="compile"):
        run(tmp_path, jobs, [0, 1], lambda job: "hang" if job == ("bf16", 0) else "slow")
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


A, B, C = ("bf16", 0), ("bf16", 1), ("bf16", 2)


@pytest.mark.parametrize(
    ("kind", "lingers_until", "left_out"),
    [
        (ErrorKind.OOM, "the end", {B, C}),
        (ErrorKind.OOM, "the next imports", set()),
        (ErrorKind.OOM, "the next loads", {B}),
        (ErrorKind.CRASH, "the end", set()),
    ],
)
def test_out_of_memory_beside_a_former_worker(kind: ErrorKind, lingers_until: str, left_out: set[Job]) -> None:
    """Who loaded while another worker of its GPU had not ended is left out: that one may have held the memory."""
    is_ending = threading.Event()

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress) -> Result:
        job = (level, process)
        if job == A:
            on_progress(*job, "finish", "", 0.0)
            assert is_ending.wait(20)
            return sample(*job)
        # The runner tells of a worker that has not said anything yet, too.
        for what, detail in (("", ""), ("the next imports", IMPORTING), ("the next loads", "")):
            on_progress(*job, "load", detail, 0.0)
            if what == lingers_until:
                is_ending.set()
                time.sleep(0.5)
                on_progress(*job, "load", detail, 0.0)
        if job == C:
            is_ending.set()
        return failed(level, kind, process)

    results = run_jobs([A, B, C], [0], run_job, lambda *_: None, is_overlapping=True)
    assert set(results) == {A, B, C} - left_out


def test_out_of_memory_alone_counts() -> None:
    """Whoever starts after the former worker's end has nobody to blame."""

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress) -> Result:
        on_progress(level, process, "finish", "", 0.0)
        return failed(level, process=process)

    assert set(run_jobs([A, B], [0], run_job, lambda *_: None, is_overlapping=False)) == {A, B}


def test_worker_says_that_it_is_importing() -> None:
    """Else no worker would be known to have loaded alone, and every oom would be measured again."""
    assert f'report_stage(out, "load", "{IMPORTING}")' in inspect.getsource(worker.main)


def test_ctrl_c_ends_all_lanes(tmp_path: pathlib.Path) -> None:
    """Each worker is gone and recorded; none starts after it."""

    def both_run() -> None:
        end = time.monotonic() + 20
        while len(list(tmp_path.glob("*/*/grandchild"))) < 2 and time.monotonic() < end:
            time.sleep(0.02)

    with interrupted_after(both_run):
        run(tmp_path, JOBS, [0, 1], lambda job: "hang")
    found = {path.parent: Result.model_validate_json(path.read_bytes()) for path in tmp_path.rglob("result.json")}
    assert len(found) == 2
    for out, result in found.items():
        assert result.failure is not None and result.failure.kind is ErrorKind.INTERRUPTED
        assert not is_alive(out / "pid")


def test_the_first_error_is_raised() -> None:
    """Not that of a worker that it ended, whichever lane comes first."""
    is_failed = threading.Event()

    def run_job(level: str, process: int, gpu: Gpu, on_progress: OnProgress) -> Result:
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
        run_jobs(JOBS, [0, 1], run_job, lambda *_: None, is_overlapping=False)


def is_alive(path: pathlib.Path) -> bool:
    """Whether the process whose number is in `path` is there; the runner has waited for its end."""
    return pathlib.Path(f"/proc/{path.read_text()}").exists()

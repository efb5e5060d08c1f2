"""Runs a schedule's workers on several GPUs side by side, one timed worker a GPU. No torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from perf_tests.harness.progress import OnProgress, Stage
from perf_tests.harness.schema import ErrorKind, Result

Job = tuple[str, int]
"""Level and process index."""
IMPORTING = "importing torch"
"""Detail of a worker that has not begun to load."""
Gpu = int | str | None
"""NVML's name; None leaves the choice to the environment."""
RunJob = Callable[[str, int, Gpu, OnProgress], Result]


class RunStopped(Exception):
    """Ends a worker of a run that another worker's error or Ctrl-C has ended."""


def run_jobs(
    jobs: Sequence[Job], gpus: Sequence[Gpu], run_job: RunJob, on_progress: OnProgress, *, is_overlapping: bool
) -> dict[Job, Result]:
    """Run every job once, each on the GPU that is free first.

    Left out of what is returned are jobs that ran out of memory beside a former worker of their lane, which may have
    held it, as one that hangs at its exit does: they say nothing of their levels.

    Args:
        jobs: in the order in which they are started.
        gpus: one a lane.
        run_job: `runner.run_level` of one job; calls what it is given about once a second and lets it raise.
        on_progress: called from several threads.
        is_overlapping: start a lane's next worker when the one before is in stage "finish", not when it has ended.

    Raises:
        KeyboardInterrupt: and whatever `run_job` raises, the first if several do, when no worker is left. Those of the
            other lanes are ended by `RunStopped`, and no further one is started.
    """
    waiting = iter(jobs)
    results: dict[Job, Result] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()
    is_stopped = threading.Event()

    def work(gpu: Gpu, free: threading.Semaphore, running: set[Job]) -> None:
        while True:
            with contextlib.ExitStack() as turn:
                turn.enter_context(free)
                with lock:
                    job = None if is_stopped.is_set() else next(waiting, None)
                if job is None:
                    return
                running.add(job)
                is_alone = len(running) == 1

                def follow(level: str, process: int, stage: Stage, detail: str, elapsed_s: float) -> None:
                    nonlocal is_alone
                    if is_stopped.is_set():
                        raise RunStopped(f"level {level!r}, process {process}: the run was stopped")
                    on_progress(level, process, stage, detail, elapsed_s)
                    # The next worker imports torch for many seconds; this one has stopped its clocks and read its
                    # counters, and only writes. A trace would be drawn in "finish", but no suite asks for one. Should
                    # this one linger, the next one's counters find a foreign process, and it is measured again; if it
                    # has no memory left, it is left out.
                    if stage == "finish":
                        turn.close()
                    # Who is gone by now holds nothing while this one loads.
                    is_alone = is_alone or (detail == IMPORTING and len(running) == 1)

                try:
                    result = run_job(*job, gpu, follow)
                    if is_alone or result.failure is None or result.failure.kind is not ErrorKind.OOM:
                        results[job] = result
                except BaseException as error:
                    with lock:
                        errors.append(error)
                    is_stopped.set()  # before the lane is free
                    raise
                finally:
                    running.discard(job)

    threads_each = 2 if is_overlapping else 1
    with ThreadPoolExecutor(threads_each * len(gpus)) as pool:
        try:
            lanes = [(gpu, threading.Semaphore(), set[Job]()) for gpu in gpus]
            wait([pool.submit(work, *lane) for lane in lanes for _ in range(threads_each)], return_when=FIRST_EXCEPTION)
        finally:
            is_stopped.set()
    if errors:
        raise errors[0]
    return results

"""Runs a schedule's workers on several GPUs side by side, one a GPU, the next one's imports ahead. No torch.

A worker spends a third of its time importing. So each GPU has two: one that loads, measures and ends, and one that
imports while the first loads and compiles, and then waits. While a worker measures, none of its GPU imports. A job that
is begun ahead is its GPU's, so none is while there are not enough for the other GPUs.

GPUs of one kind differ: at their power limit, by the clock that each can hold. So a GPU takes the level that it has
measured least, and each level's processes are spread over all of them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from perf_tests.harness.progress import OnProgress, Stage, Turn
from perf_tests.harness.schema import Result

Job = tuple[str, int]
"""Level and process index."""
Gpu = int | str | None
"""NVML's name; None leaves the choice to the environment."""
RunJob = Callable[[str, int, Gpu, OnProgress, Turn | None], Result]
STOP_POLL_S = 0.1


class RunStopped(Exception):
    """Ends a worker of a run that another worker's error or Ctrl-C has ended."""


def run_jobs(
    jobs: Sequence[Job],
    gpus: Sequence[Gpu],
    run_job: RunJob,
    on_progress: OnProgress,
    *,
    is_ahead: bool,
    elsewhere: Mapping[Job, Gpu] | None = None,
) -> dict[Job, Result]:
    """Run every job once, each on the GPU that is free first.

    Args:
        jobs: in the order in which they are begun, but that one of several GPUs prefers levels it has had less often.
        gpus: one a lane.
        run_job: `runner.run_level` of one job; calls what it is given about once a second and lets it raise.
        on_progress: called from several threads, of the worker that has the GPU or gets it next.
        is_ahead: let a lane's next worker import while the one before runs.
        elsewhere: the GPU on which a job may not run, where there are several: it was disturbed there.

    Raises:
        KeyboardInterrupt: and whatever `run_job` raises, the first if several do, when no worker is left. The others
            are ended by `RunStopped`, and no further one is started.
    """
    untaken = list(jobs)
    results: dict[Job, Result] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()
    is_stopped = threading.Event()

    def work(lane: _Lane) -> None:
        while (job := lane.next_job(untaken, len(gpus), elsewhere or {}, lock, is_stopped)) is not None:

            def follow(level: str, process: int, stage: Stage, detail: str, elapsed_s: float, job: Job = job) -> None:
                if is_stopped.is_set():
                    raise RunStopped(f"level {level!r}, process {process}: the run was stopped")
                if stage == "finish":
                    lane.measured()
                if lane.is_first(job):
                    on_progress(level, process, stage, detail, elapsed_s)

            def turn(stage: Stage, pid: int, job: Job = job) -> Sequence[int] | None:
                return lane.turn(job, stage, pid)

            try:
                results[job] = run_job(*job, lane.gpu, follow, turn if is_ahead else None)
            except BaseException as error:
                with lock:
                    errors.append(error)
                is_stopped.set()  # before the lane is free
                raise
            finally:
                lane.ended(job)

    threads_each = 2 if is_ahead else 1
    with ThreadPoolExecutor(threads_each * len(gpus)) as pool:
        try:
            lanes = [_Lane(gpu) for gpu in gpus]
            wait([pool.submit(work, lane) for lane in lanes for _ in range(threads_each)], return_when=FIRST_EXCEPTION)
        finally:
            is_stopped.set()
    if errors:
        raise errors[0]
    return results


@dataclasses.dataclass
class _Lane:
    """One GPU and its workers: the first has it, or gets it when it has imported."""

    gpu: Gpu
    _jobs: list[Job] = dataclasses.field(default_factory=list)
    _had: Counter[str] = dataclasses.field(default_factory=Counter)
    """Level -> how many of its jobs were taken."""
    _waiting: dict[Job, int] = dataclasses.field(default_factory=dict)
    """Those that have imported and wait for the first to end, and their pids."""
    _is_measuring: bool = False
    """Or about to."""
    _changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def next_job(
        self,
        untaken: list[Job],
        lanes: int,
        elsewhere: Mapping[Job, Gpu],
        lock: threading.Lock,
        is_stopped: threading.Event,
    ) -> Job | None:
        """Take a job, when no import would disturb a measurement; None if none is left for it or the run is stopped."""
        with self._changed:
            while not is_stopped.is_set():
                with lock:
                    own = [job for job in untaken if lanes == 1 or job not in elsewhere or elsewhere[job] != self.gpu]
                    if not own:
                        return None
                    if not self._is_measuring and (not self._jobs or len(untaken) >= lanes):
                        # The first of several that it had as often.
                        job = own[0] if lanes == 1 else min(own, key=lambda job: self._had[job[0]])
                        untaken.remove(job)
                        self._had[job[0]] += 1
                        self._jobs.append(job)
                        return job
                self._changed.wait(STOP_POLL_S)
            return None

    def turn(self, job: Job, stage: Stage, pid: int) -> Sequence[int] | None:
        """A `progress.Turn` of one of the lane's workers."""
        with self._changed:
            if stage == "load":
                if self._jobs[0] == job:
                    self._waiting.pop(job, None)
                    return []
                self._waiting[job] = pid
                return None
            self._is_measuring = True  # from now on: should one who imports fail, no other may begin
            others = self._jobs[1:]
            if not all(other in self._waiting for other in others):
                return None
            return [self._waiting[other] for other in others]

    def is_first(self, job: Job) -> bool:
        """Whether `job` has the GPU or gets it next."""
        with self._changed:
            return self._jobs[0] == job

    def measured(self) -> None:
        """Of the worker that has the GPU: imports disturb it no longer."""
        with self._changed:
            self._is_measuring = False
            self._changed.notify_all()

    def ended(self, job: Job) -> None:
        """The worker is gone, however it ended, or sits in a driver call that SIGKILL does not end."""
        with self._changed:
            if self._jobs[0] == job:
                self._is_measuring = False
            self._jobs.remove(job)
            self._waiting.pop(job, None)
            self._changed.notify_all()

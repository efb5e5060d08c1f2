"""Runs what a run folder has no measurement of, so that a new run and a resumed one are the same thing. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fluxfast.workloads import Workload
from perf_tests.bench.progress import BarPrinter
from perf_tests.harness import lease, runner, store
from perf_tests.harness.lanes import Gpu, Job, run_jobs
from perf_tests.harness.progress import RESULT_FILE, Deadlines, OnProgress, Turn
from perf_tests.harness.schema import Environment, Result
from perf_tests.harness.session import with_references
from perf_tests.harness.stored_run import RERUN, RunFacts

TRACED_PROCESS = 0
"""One process of a level is traced: another one would look the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """A `session.Measure` that keeps every measurement that is there.

    Args:
        gpu: NVML's name of the GPU that is held while workers run; None without one.
        cache: compiled code, kept between runs.
        is_traced: whether the first process of a level writes a trace.
        run_level: `runner.run_level` or a stand-in.
    """

    workload: Workload
    deadlines: Deadlines
    gpu: str | None
    cache: Path
    is_traced: bool
    run_level: Callable[..., Result] = runner.run_level

    def __call__(self, jobs: Sequence[Job], folder: Path) -> dict[Job, Result]:
        """Job -> result, kept or new.

        Raises:
            GpuBusy: if another suite holds the GPU.
            KeyboardInterrupt: and what else interrupts; what was measured lies in `folder`.
        """
        found = {job: kept(folder, *job, self.workload.digest) for job in jobs}
        results = {job: result for job, result in found.items() if result is not None}
        missing = [job for job in jobs if job not in results]
        known_s: dict[str, list[float]] = {}
        for (level, _), result in results.items():
            known_s.setdefault(level, []).append(took_s(result))
        printer = BarPrinter(self.deadlines, missing, known_s)

        def run_job(level: str, process: int, own: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
            set_aside(folder / level / str(process))
            return self.run_level(
                level,
                self.workload.id,
                process,
                folder,
                deadlines=self.deadlines,
                cache=self.cache,
                is_traced=self.is_traced and process == TRACED_PROCESS,
                gpu=own,
                on_progress=on_progress,
                turn=turn,
            )

        with lease.gpu_lease(self.gpu), contextlib.closing(printer):
            return results | run_jobs(missing, [None], run_job, printer, is_ahead=self.gpu is not None)


def kept(folder: Path, level: str, process: int, digest: str) -> Result | None:
    """The measurement that is already there, None if the worker has to run.

    A place without one whole measurement is passed over with a line that says why.

    Raises:
        ResultError: if what is there measured something else, which the folder then does not say of itself.
    """
    place = folder / level / str(process)
    if not place.exists():
        return None
    try:
        result = store.read_result(place / RESULT_FILE)
        if result.measurement is None:
            assert result.failure is not None
            why = f"{result.failure.kind.value} in stage {result.failure.stage!r}"
        else:
            store.result_image(place / RESULT_FILE, result)
            why = "" if (place / result.measurement.step_output).is_file() else "its step output is missing"
    except store.ResultError as error:
        why = str(error)
    if why:
        print(f"{level} #{process} has no measurement and runs again: {why}", file=sys.stderr)
        return None
    if (result.level, result.process, result.workload_digest, result.injection) != (level, process, digest, None):
        raise store.ResultError(
            f"{place / RESULT_FILE} is of level {result.level!r}, process {result.process}, workload digest "
            f"{result.workload_digest}, fault {result.injection}; expected {level!r}, {process}, {digest}, None: "
            "start a new folder"
        )
    return result


def set_aside(place: Path) -> None:
    """Rename what a failed worker left, so that the next one finds its place free and the log is not lost."""
    if not place.exists():
        return
    number = 1
    while (target := place.with_name(f"{place.name}_set_aside_{number}")).exists():
        number += 1
    place.rename(target)


def took_s(result: Result) -> float:
    """About how long a worker ran, seconds."""
    measurement = result.measurement
    assert measurement is not None
    return measurement.load_s + measurement.apply_s + measurement.warmup_s + sum(measurement.wall_s)


def refuse_other_environment(folder: Path, facts: RunFacts, now: Environment) -> None:
    """Numbers of two environments do not belong into one table.

    Raises:
        ResultError: naming what differs from a measurement in `folder`.
    """
    for result in _stored_results(folder, facts):
        if result.measurement is None or result.environment is None:
            continue
        then, here = result.environment.model_dump(), now.model_dump()
        if differences := [f"{name} was {then[name]}, is {here[name]}" for name in then if then[name] != here[name]]:
            raise store.ResultError(
                f"{folder} was measured in another environment: {'; '.join(differences)}; go back to that one, or "
                "start a new folder"
            )


def _stored_results(folder: Path, facts: RunFacts) -> Iterator[Result]:
    for root in (folder, folder / RERUN):
        for level, process in runner.schedule(with_references(facts.levels, facts.unavailable), facts.processes):
            # What cannot be read is measured again, and `kept` says so.
            with contextlib.suppress(store.ResultError):
                yield store.read_result(root / level / str(process) / RESULT_FILE)

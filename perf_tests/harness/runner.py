"""Runs each level in a process of its own and always comes back with a `Result`. No torch.

The parent holds the deadlines and reads the exit: a worker may hang in native code, crash or be killed, and the next
level still runs. `progress` is what the worker must do, `process_group` why none is left behind.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pydantic

from fluxfast.levels import get_level
from fluxfast.workloads import get_workload
from perf_tests.harness import exit_status, faults
from perf_tests.harness.process_group import dump_stacks, process_group
from perf_tests.harness.progress import (
    RESULT_FILE,
    Deadlines,
    OnProgress,
    StageReader,
    Turn,
    give_turn,
    write_result,
)
from perf_tests.harness.schema import ErrorKind, Failure, Result

ROOT: Final = Path(__file__).resolve().parents[2]
WORKER_COMMAND: Final[tuple[str, ...]] = (sys.executable, "-m", "perf_tests.harness.worker")
LOG_FILE: Final = "log.txt"
NVML_ORDER: Final = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Of every process that names a GPU: NVML, by which the slug is found, counts by the bus, CUDA the fastest first."""
LOG_TAIL_LINES: Final = 50
LOG_TAIL_BYTES: Final = 64 * 1024
POLL_S: Final = 0.1


def schedule(levels: Sequence[str], processes: int) -> list[tuple[str, int]]:
    """Every (level, process index) in the order to run: forward, backward, forward, ...

    A machine that warms up or slows down during a run then moves all levels alike, not the last ones most.
    """
    return [
        (level, process) for process in range(processes) for level in (levels if process % 2 == 0 else reversed(levels))
    ]


def new_run_folder(root: Path, sha: str) -> Path:
    """Make `root/<utc>-<sha>-<pid>`, which did not exist before.

    Raises:
        FileExistsError: if this process made one for the same commit within the same second.
    """
    folder = root / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{sha[:12]}-{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    return folder


def run_level(
    level: str,
    workload: str,
    process: int,
    folder: Path,
    *,
    deadlines: Deadlines,
    cache: Path | None = None,
    inject: str | None = None,
    is_traced: bool = False,
    gpu: int | str | None = None,
    on_progress: OnProgress | None = None,
    turn: Turn | None = None,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> Result:
    """Build and measure `level` once, in one fresh process.

    Args:
        process: index of this process among those of the level, from 0.
        folder: the run's, from `new_run_folder`; everything lands in `folder/level/process`.
        cache: for Inductor, Triton and ahead-of-time packages, kept between runs; None leaves them their defaults.
        inject: a fault, as `faults.parse` reads it.
        is_traced: whether the worker profiles one more call, after all that is timed, into `TRACE_FILE`.
        gpu: the one that the worker sees, as NVML knows it; None leaves it those that we see.
        on_progress: called about once a second and at each change of stage.
        turn: asked, again and again, when the worker has imported and when it would measure; None lets it go on.

    Returns:
        What the worker measured or, whatever became of it, a result with a `failure`; `result.json` holds the same.

    Raises:
        ValueError: unknown level, workload or fault; nothing was started.
        FileExistsError: this level and process have been run in `folder`.
        KeyboardInterrupt: and whatever else interrupts the wait, as what `on_progress` raises, after the worker is gone
            and recorded as interrupted.
    """
    get_level(level), get_workload(workload)
    if inject is not None:
        faults.parse(inject)
    out = (folder / level / str(process)).resolve()
    out.mkdir(parents=True)
    job = _Job(
        level=level,
        workload=workload,
        process=process,
        out=out,
        inject=inject,
        deadlines=deadlines,
        arguments=(*worker_command, "--level", level, "--workload", workload, "--process", str(process)),
        options=(
            *(("--inject", inject) if inject else ()),
            *(("--cache", str(cache.resolve())) if cache else ()),
            *(("--trace",) if is_traced else ()),
        ),
        variables=_variables(cache, gpu),
        turn=turn,
    )
    try:
        result = _judge(job, _supervise(job, on_progress))
    except BaseException as error:
        if isinstance(_read_result(job), str):  # else it had just finished, and what was measured is kept
            said = StageReader(out, 0.0)
            said.read(0.0)
            message = f"interrupted by {type(error).__name__} in stage {said.stage!r}; run it again for a measurement"
            _record(job, _failed(job, _Ended(said), ErrorKind.INTERRUPTED, message))
        raise
    if result.failure is not None:
        _record(job, result)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    level: str
    workload: str
    process: int
    out: Path
    inject: str | None
    deadlines: Deadlines
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    variables: Mapping[str, str]
    turn: Turn | None

    @property
    def argv(self) -> list[str]:
        turns = () if self.turn is None else ("--takes-turns",)  # not in `reproduction`: nobody would let it go on
        return [*self.arguments, "--out", str(self.out), *self.options, *turns]

    @property
    def reproduction(self) -> str:
        """A shell line that runs the same worker again and leaves this run's folder as it is."""
        variables = shlex.join(f"{name}={value}" for name, value in self.variables.items())
        worker = f'{shlex.join(self.arguments)} --out "$(mktemp -d)" {shlex.join(self.options)}'.rstrip()
        return f"cd {shlex.quote(str(ROOT))} && env {variables} {worker}"


@dataclasses.dataclass(frozen=True)
class _Ended:
    """How a worker ended: its exit status (None: it did not), what it had said, and whether its time was up."""

    said: StageReader
    status: int | None = None
    is_expired: bool = False


def _variables(cache: Path | None, gpu: int | str | None) -> dict[str, str]:
    """What the worker's environment has beyond ours."""
    variables = {
        "PYTHONFAULTHANDLER": "1",
        **NVML_ORDER,
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS reads it when its first handle is made
        "HF_HUB_OFFLINE": "1",  # a timing must not depend on a network
        # Spinning OpenMP threads on a shared CPU made compiled code up to 30 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpu)
    if cache is not None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve() / "inductor")
        variables["TRITON_CACHE_DIR"] = str(cache.resolve() / "triton")
        variables["QUACK_CACHE_DIR"] = str(cache.resolve() / "quack")
    return variables


def _supervise(job: _Job, on_progress: OnProgress | None) -> _Ended:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLUXFAST_")}
    with process_group(job.argv, cwd=ROOT, env={**environment, **job.variables}, log=job.out / LOG_FILE) as worker:
        said = StageReader(job.out, time.monotonic())
        is_expired = _watch(job, worker, said, on_progress)
        if is_expired:
            dump_stacks(worker)
    return _Ended(said, worker.returncode, is_expired)


def _watch(job: _Job, worker: subprocess.Popen[bytes], said: StageReader, on_progress: OnProgress | None) -> bool:
    """Wait for the worker's end; True if it overstayed a stage's deadline."""
    told_s, waits_since = -1.0, None
    while True:
        is_running = worker.poll() is None
        now = time.monotonic()
        is_changed = said.read(now)
        if on_progress is not None and (is_changed or now - told_s >= 1.0):
            on_progress(job.level, job.process, said.stage, said.detail, now - said.since)
            told_s = now
        if not is_running:
            return False
        if said.awaits is not None and job.turn is not None:
            said.since += now - (now if waits_since is None else waits_since)
            waits_since = now
            if (waiting := job.turn(said.awaits, worker.pid)) is not None:
                give_turn(job.out, said.awaits, waiting)
                said.awaits = waits_since = None
        if now - said.since > job.deadlines.of(said.stage):
            return True
        time.sleep(POLL_S)


def _judge(job: _Job, ended: _Ended) -> Result:
    """The worker's own result if it ended as it should, else why not."""
    stage, status = ended.said.stage, ended.status
    where = f"in stage {stage!r}" + (f" ({ended.said.detail})" if ended.said.detail else "")
    if ended.is_expired:
        message = (
            f"the worker was still {where} after the {job.deadlines.of(stage):g} s that this stage may take; "
            f"its stacks are at the end of {job.out / LOG_FILE}"
        )
        if status is None:
            message += "; SIGKILL did not end it, so it sits in a driver call and may disturb later levels"
        return _failed(job, ended, ErrorKind.HANG, message)
    assert status is not None
    if status < 0:
        message = f"the worker was killed by {_signal_name(-status)} {where}"
        if status == -signal.SIGKILL:
            message += "; the suite did not send it: often the kernel's out-of-memory killer (see dmesg)"
        return _failed(job, ended, ErrorKind.CRASH, message)
    if status > 0:
        kind = exit_status.KINDS.get(status, ErrorKind.EXCEPTION)
        message = ended.said.error or f"{_last_line(job.out)} (the worker ended {where} with exit status {status})"
        return _failed(job, ended, kind, message)
    result = _read_result(job)
    if isinstance(result, str):
        return _failed(job, ended, ErrorKind.CRASH, f"the worker ended {where} with exit status 0 but {result}")
    return result


def _read_result(job: _Job) -> Result | str:
    """The worker's result, or what is wrong with it."""
    try:
        result = Result.model_validate_json((job.out / RESULT_FILE).read_bytes())
    except FileNotFoundError:
        return f"wrote no {RESULT_FILE}"
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return f"its {RESULT_FILE} is not valid at {'.'.join(map(str, first['loc'])) or 'the top'}: {first['msg']}"
    digest = get_workload(job.workload).digest
    asked = (job.level, job.workload, digest, job.process, job.inject)
    given = (result.level, result.workload, result.workload_digest, result.process, result.injection)
    if given != asked:
        return f"its {RESULT_FILE} is of {given}, and {asked} was asked for (level, workload, digest, process, fault)"
    if result.measurement is None or result.failure is not None:
        return f"its {RESULT_FILE} must hold a measurement and no failure"
    return result


def _failed(job: _Job, ended: _Ended, kind: ErrorKind, message: str) -> Result:
    return Result(
        level=job.level,
        workload=job.workload,
        workload_digest=get_workload(job.workload).digest,
        process=job.process,
        fields=get_level(job.level).fields(),
        unavailable={},
        injection=job.inject,
        environment=None,
        failure=Failure(
            kind=kind,
            stage=ended.said.stage,
            message=f"level {job.level!r}, process {job.process}: {message}",
            exit_status=ended.status,
            log_tail="\n".join(_log_tail(job.out)),
            command=job.reproduction,
        ),
    )


def _record(job: _Job, result: Result) -> None:
    """Store a failure; a `result.json` that the worker wrote all the same is kept beside it."""
    written = job.out / RESULT_FILE
    if written.exists():
        written.rename(job.out / f"rejected_{RESULT_FILE}")
    write_result(job.out, result)


def _log_tail(out: Path) -> list[str]:
    path = out / LOG_FILE
    if not path.exists():
        return []
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]


def _last_line(out: Path) -> str:
    return next((line.strip() for line in reversed(_log_tail(out)) if line.strip()), "it printed nothing")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"

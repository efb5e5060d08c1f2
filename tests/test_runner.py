"""The runner against a worker that fails in every way there is."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import pytest
from ctrl_c import interrupted_after

from perf_tests.harness import progress, runner
from perf_tests.harness.progress import CPU_DEADLINES, Deadlines, ProgressPrinter, Stage
from perf_tests.harness.schema import ErrorKind, Failure, Result

FAKE = (sys.executable, str(pathlib.Path(__file__).with_name("fake_worker.py")))
DEADLINES = Deadlines(load_s=20, apply_s=20, warmup_s=20, measure_s=20, finish_s=20)


def run(folder: pathlib.Path, behave: str = "", *, hang_in: str = "", **options: Any) -> Result:
    """One run of the stand-in worker at level `compile`."""
    options.setdefault("deadlines", DEADLINES)
    command = (*FAKE, *(("--behave", behave) if behave else ()), *(("--hang-in", hang_in) if hang_in else ()))
    return runner.run_level("compile", "tiny", 0, folder, worker_command=command, **options)


def failure_of(folder: pathlib.Path, result: Result) -> Failure:
    """The failure, once it is sure that the run folder holds the same."""
    assert Result.model_validate_json((folder / "compile/0/result.json").read_bytes()) == result
    assert result.measurement is None and result.failure is not None
    return result.failure


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is only waiting to be reaped does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(path: pathlib.Path) -> None:
    """The process whose number is in `path` ends soon; left alone, it would run for minutes."""
    pid, end = int(path.read_text()), time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < end, f"{path.name} {pid} is still there"
        time.sleep(0.02)


def wait_for(path: pathlib.Path) -> None:
    """Until a process has written `path`, 20 s at the most."""
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_success(tmp_path: pathlib.Path) -> None:
    """A worker that does its work gives its own measurement, and every stage was shown."""
    seen: list[str] = []
    result = run(tmp_path, on_progress=lambda level, process, stage, detail, elapsed_s: seen.append(stage))
    assert result.failure is None and result.measurement is not None
    assert result.measurement.samples_s == [0.1, 0.1]
    assert seen[-1] == "finish"


def test_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker starts offline, with our caches and no FLUXFAST_ variable."""
    monkeypatch.setenv("FLUXFAST_DEBUG", "1")
    assert run(tmp_path, "environment", cache=tmp_path / "cache").failure is None
    lines = (tmp_path / "compile/0/environment").read_text().splitlines()
    assert {"CUBLAS_WORKSPACE_CONFIG=:4096:8", "HF_HUB_OFFLINE=1", "PYTHONFAULTHANDLER=1"} <= set(lines)
    for name, folder in (("TORCHINDUCTOR", "inductor"), ("TRITON", "triton"), ("QUACK", "quack")):
        assert f"{name}_CACHE_DIR={tmp_path / 'cache' / folder}" in lines
    assert not [line for line in lines if line.startswith("FLUXFAST_")]


@pytest.mark.parametrize(("gpu", "expected"), [(None, "5,6"), (1, "1"), ("GPU-8a", "GPU-8a")])
def test_worker_sees_the_gpu_that_is_its_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, gpu: int | str | None, expected: str
) -> None:
    """By NVML's order, in the command that repeats it too; without one, those that we see."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    run(tmp_path / "good", "environment", gpu=gpu)
    lines = (tmp_path / "good/compile/0/environment").read_text().splitlines()
    assert f"CUDA_VISIBLE_DEVICES={expected}" in lines
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in lines
    command = failure_of(tmp_path / "bad", run(tmp_path / "bad", "oom", gpu=gpu)).command
    assert (f"CUDA_VISIBLE_DEVICES={expected}" in command) == (gpu is not None)


@pytest.mark.parametrize(
    ("behave", "kind", "status", "sentence"),
    [
        ("raise", ErrorKind.EXCEPTION, 1, "RuntimeError: the model said no"),
        ("oom", ErrorKind.OOM, 10, "the device has no memory left"),
        ("step-not-applied", ErrorKind.STEP_NOT_APPLIED, 11, "0 of 57 blocks"),
        ("bad-input", ErrorKind.BAD_INPUT, 12, "no file vae/config.json"),
        ("import", ErrorKind.IMPORT, 13, "No module named 'torch'"),
        ("non-finite", ErrorKind.NON_FINITE, 14, "192 NaN"),
        ("segv", ErrorKind.CRASH, -11, "killed by SIGSEGV in stage 'measure'"),
        ("killed", ErrorKind.CRASH, -9, "SIGKILL"),
        ("silent", ErrorKind.CRASH, 0, "wrote no result.json"),
        ("torn", ErrorKind.CRASH, 0, "result.json is not valid"),
        ("late-crash", ErrorKind.CRASH, -11, "SIGSEGV in stage 'finish'"),
    ],
)
def test_failure(tmp_path: pathlib.Path, behave: str, kind: ErrorKind, status: int, sentence: str) -> None:
    """Every end but a good one is a named failure."""
    failure = failure_of(tmp_path, run(tmp_path, behave))
    assert (failure.kind, failure.exit_status) == (kind, status)
    assert sentence in failure.message and "level 'compile'" in failure.message
    assert len(failure.log_tail.splitlines()) <= 50
    assert kind is not ErrorKind.BAD_INPUT or "Traceback" not in failure.log_tail


@pytest.mark.parametrize(
    ("raised", "kind"), [("sanity.NonFinite('192 NaN')", ErrorKind.NON_FINITE), ("1 / 0", ErrorKind.EXCEPTION)]
)
def test_only_a_number_that_cannot_be_is_non_finite(tmp_path: pathlib.Path, raised: str, kind: ErrorKind) -> None:
    """An arithmetic error from anywhere else in the real worker is an exception with its traceback."""
    broken = f"""
from perf_tests.harness import sanity, worker
def run(arguments, out):
    raise {raised}
worker.run = run
worker.main()
"""
    command = (sys.executable, "-c", broken)
    result = runner.run_level("compile", "tiny", 0, tmp_path, worker_command=command, deadlines=CPU_DEADLINES)
    failure = failure_of(tmp_path, result)
    assert failure.kind is kind
    assert ("Traceback" in failure.log_tail) == (kind is ErrorKind.EXCEPTION)
    assert kind is ErrorKind.NON_FINITE or "ZeroDivisionError: division by zero" in failure.message


def test_deadlines_stand_still_while_a_worker_waits(tmp_path: pathlib.Path) -> None:
    """For its turn, which others decide; not while it takes it."""
    asked: list[tuple[Stage, int]] = []
    let_in_at = time.monotonic() + 9.0

    def turn(stage: Stage, pid: int) -> list[int] | None:
        asked.append((stage, pid))
        return [7, 8] if time.monotonic() > let_in_at else None

    deadlines = dataclasses.replace(DEADLINES, load_s=6)
    assert run(tmp_path, turn=turn, deadlines=deadlines).failure is None
    assert [stage for stage, _ in itertools.groupby(asked, lambda ask: ask[0])] == ["load", "measure"]
    assert {pid for _, pid in asked} == {int((tmp_path / "compile/0/pid").read_text())}
    assert json.loads((tmp_path / "compile/0/waiting").read_text()) == [7, 8]
    hanging = run(tmp_path / "hanging", "circle", hang_in="load", turn=turn, deadlines=deadlines)
    assert failure_of(tmp_path / "hanging", hanging).kind is ErrorKind.HANG


def test_command_of_a_worker_that_takes_turns_runs_alone(tmp_path: pathlib.Path) -> None:
    """Whoever repeats a failure by hand has nobody who would let the worker go on."""
    failure = failure_of(tmp_path, run(tmp_path, "oom", turn=lambda stage, pid: []))
    assert failure.kind is ErrorKind.OOM and "--takes-turns" not in failure.command


def test_the_real_worker_takes_turns(tmp_path: pathlib.Path) -> None:
    """It has imported, and neither loaded before its turn nor measured before the other one."""
    asked: list[Stage] = []

    def turn(stage: Stage, pid: int) -> list[int] | None:
        asked.append(stage)
        return [] if asked.count(stage) > 5 else None

    result = runner.run_level("bf16", "tiny", 0, tmp_path, deadlines=CPU_DEADLINES, turn=turn)
    assert result.failure is None, result.failure
    lines = (tmp_path / "bf16/0" / progress.PROGRESS_FILE).read_text().splitlines()
    said = [line.get("stage") or f"waits to {line['waits']}" for line in map(json.loads, lines)]
    assert [one for one, _ in itertools.groupby(said)] == [
        "load", "waits to load", "load", "apply", "warmup", "waits to measure", "warmup", "measure", "finish",
    ]  # fmt: skip


def test_log_tail(tmp_path: pathlib.Path) -> None:
    """A failure carries the last 50 lines of the log, not the first."""
    lines = failure_of(tmp_path, run(tmp_path, "raise")).log_tail.splitlines()
    assert len(lines) == 50
    assert lines[-1] == "RuntimeError: the model said no" and "log line 199" in lines


def test_rejected_result_is_kept(tmp_path: pathlib.Path) -> None:
    """What a worker wrote before it crashed is kept, under a name that nobody judges."""
    run(tmp_path, "late-crash")
    kept = (tmp_path / "compile/0/rejected_result.json").read_bytes()
    assert Result.model_validate_json(kept).measurement is not None


def test_command_reproduces(tmp_path: pathlib.Path) -> None:
    """The command of a failure, given to a shell, fails the same way and leaves the run folder alone."""
    failure = failure_of(tmp_path, run(tmp_path, "bad-input"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    again = subprocess.run(failure.command, shell=True, capture_output=True, text=True, check=False)
    assert again.returncode == 12 and "vae/config.json" in again.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_ignored_fault(tmp_path: pathlib.Path) -> None:
    """A worker that was told to go wrong and does not say so is not believed."""
    failure = failure_of(tmp_path, run(tmp_path, "forgetful", inject="hole"))
    assert failure.kind is ErrorKind.CRASH and "'hole'" in failure.message


def test_fault_is_passed_on(tmp_path: pathlib.Path) -> None:
    """A fault arrives in the worker and is recorded in its result."""
    assert run(tmp_path, inject="latency=+5%").injection == "latency=+5%"


@pytest.mark.parametrize("is_traced", [False, True])
def test_trace_is_asked_for(tmp_path: pathlib.Path, is_traced: bool) -> None:
    """A worker writes a trace only if it is told to."""
    assert run(tmp_path, is_traced=is_traced).failure is None
    assert (tmp_path / "compile/0" / progress.TRACE_FILE).exists() is is_traced


@pytest.mark.parametrize(
    ("change", "known"),
    [({"level": "nope"}, "fused_qkv"), ({"workload": "nope"}, "schnell"), ({"inject": "nope"}, "colour-cast")],
)
def test_unknown_names(tmp_path: pathlib.Path, change: dict[str, str], known: str) -> None:
    """Unknown names are refused before anything starts, with the known ones."""
    arguments: dict[str, Any] = {"level": "compile", "workload": "tiny", "inject": None, **change}
    with pytest.raises(ValueError, match=known):
        runner.run_level(process=0, folder=tmp_path, deadlines=DEADLINES, worker_command=FAKE, **arguments)
    assert not list(tmp_path.iterdir())


def test_hang_with_the_gil_held(tmp_path: pathlib.Path) -> None:
    """A native hang ends soon after its deadline, with the stacks in the log and the compile pool gone."""
    deadlines = Deadlines(load_s=20, apply_s=20, warmup_s=20, measure_s=1, finish_s=20)
    entered: dict[str, float] = {}

    def on_progress(level: str, process: int, stage: str, detail: str, elapsed_s: float) -> None:
        entered.setdefault(stage, time.monotonic())

    result = run(tmp_path, "hang", deadlines=deadlines, on_progress=on_progress)
    assert time.monotonic() - entered["measure"] < 1 + 5
    failure = failure_of(tmp_path, result)
    assert (failure.kind, failure.stage) == (ErrorKind.HANG, "measure")
    assert "Fatal Python error: Aborted" in failure.log_tail and "hang_forever" in failure.log_tail
    assert "1 s that this stage may take" in failure.message
    assert_gone(tmp_path / "compile/0/pid")
    assert_gone(tmp_path / "compile/0/grandchild")


@pytest.mark.parametrize("stage", progress.STAGES)
def test_each_stage_has_its_deadline(tmp_path: pathlib.Path, stage: str) -> None:
    """The deadline that counts is that of the stage in which the worker stays."""
    deadlines = Deadlines(**{f"{name}_s": 0.5 if name == stage else 20 for name in progress.STAGES})
    # The interpreter's start counts as `load`; half a second is enough for it only on an idle machine.
    failure = failure_of(tmp_path, run(tmp_path, hang_in=stage, deadlines=deadlines))
    assert (failure.kind, failure.stage) == (ErrorKind.HANG, stage)


def test_going_round_in_circles_is_a_hang(tmp_path: pathlib.Path) -> None:
    """Reports of progress in the same or an earlier stage do not extend a deadline."""
    deadlines = Deadlines(load_s=20, apply_s=20, warmup_s=0.5, measure_s=20, finish_s=20)
    failure = failure_of(tmp_path, run(tmp_path, "circle", hang_in="warmup", deadlines=deadlines))
    assert (failure.kind, failure.stage) == (ErrorKind.HANG, "warmup")


def test_grandchild_left_by_a_healthy_worker(tmp_path: pathlib.Path) -> None:
    """What a worker leaves running is killed before the next level starts."""
    assert run(tmp_path, "grandchild").failure is None
    assert_gone(tmp_path / "compile/0/grandchild")


def test_ctrl_c(tmp_path: pathlib.Path) -> None:
    """Ctrl-C ends the worker, is recorded, and passes on."""
    out = tmp_path / "compile/0"
    with interrupted_after(lambda: wait_for(out / "grandchild")):
        run(tmp_path, "hang")
    failure = Result.model_validate_json((out / "result.json").read_bytes()).failure
    assert failure is not None and (failure.kind, failure.stage) == (ErrorKind.INTERRUPTED, "measure")
    assert_gone(out / "pid")
    assert_gone(out / "grandchild")


def test_ctrl_c_keeps_a_finished_measurement(tmp_path: pathlib.Path) -> None:
    """An interruption while a worker that has written its result takes its time to end loses nothing."""

    def interrupt(level: str, process: int, stage: str, detail: str, elapsed_s: float) -> None:
        if (tmp_path / "compile/0/result.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "lingers", on_progress=interrupt)
    assert Result.model_validate_json((tmp_path / "compile/0/result.json").read_bytes()).measurement is not None


def test_killed_parent_leaves_nothing(tmp_path: pathlib.Path) -> None:
    """kill -9 of the suite ends worker and compile pool, even while the worker holds its GIL in native code."""
    program = (
        "import pathlib, sys; from perf_tests.harness import progress, runner; "
        f"runner.run_level('compile', 'tiny', 0, pathlib.Path({str(tmp_path)!r}), deadlines=progress.CPU_DEADLINES, "
        f"worker_command=(*{FAKE!r}, '--behave', 'hang'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=runner.ROOT)
    wait_for(tmp_path / "compile/0/grandchild")
    parent.kill()
    parent.wait()
    assert_gone(tmp_path / "compile/0/pid")
    assert_gone(tmp_path / "compile/0/grandchild")


def test_a_level_and_process_run_once(tmp_path: pathlib.Path) -> None:
    """A second run of the same process index must not overwrite the first."""
    run(tmp_path)
    with pytest.raises(FileExistsError):
        run(tmp_path)


def test_schedule_alternates() -> None:
    """Levels run forward, backward, forward."""
    order = runner.schedule(["a", "b", "c"], 3)
    assert [level for level, _ in order] == list("abccbaabc")
    assert [process for _, process in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_run_folders_are_exclusive(tmp_path: pathlib.Path) -> None:
    """A run folder is new and named after time, commit and process."""
    folder = runner.new_run_folder(tmp_path / "results", "0123456789abcdef")
    assert folder.is_dir() and folder.name.endswith(f"Z-0123456789ab-{os.getpid()}")


def test_progress_lines_without_a_terminal(tmp_path: pathlib.Path) -> None:
    """A CI log gets a line at each new stage and every 15 s, not one a second."""
    stream = io.StringIO()
    printer = ProgressPrinter(DEADLINES, workers=9, stream=stream)
    for second in range(31):
        printer("compile", 0, "warmup", f"round {second}", float(second))
    printer("compile", 0, "measure", "", 0.0)
    printer.close()
    assert stream.getvalue().splitlines() == [
        "[1/9] compile #0 warmup 0 s of at most 20 s round 0",
        "[1/9] compile #0 warmup 15 s of at most 20 s round 15",
        "[1/9] compile #0 warmup 30 s of at most 20 s round 30",
        "[1/9] compile #0 measure 0 s of at most 20 s",
    ]


def test_progress_lines_of_workers_side_by_side(tmp_path: pathlib.Path) -> None:
    """Each has its own stages and its own 15 s."""
    stream = io.StringIO()
    printer = ProgressPrinter(DEADLINES, workers=9, stream=stream)
    for second in range(17):
        printer("compile", 0, "measure", "", float(second))
        printer("bf16", 0, "load", "", 10.0 + second)
    assert stream.getvalue().splitlines() == [
        "[1/9] compile #0 measure 0 s of at most 20 s",
        "[2/9] bf16 #0 load 10 s of at most 20 s",
        "[1/9] compile #0 measure 15 s of at most 20 s",
        "[2/9] bf16 #0 load 25 s of at most 20 s",
    ]


def test_unreadable_progress_is_passed_over(tmp_path: pathlib.Path) -> None:
    """Half a line is read once it is whole, and nonsense does not stop the runner."""
    path = tmp_path / progress.PROGRESS_FILE
    reader = progress.StageReader(tmp_path, 0.0)
    path.write_text('nonsense\n{"stage": "bake"}\n[]\n{"stage": "ap')
    assert not reader.read(1.0) and reader.stage == "load"
    with path.open("a") as file:
        file.write('ply", "detail": "x"}\n')
    assert reader.read(2.0) and (reader.stage, reader.detail, reader.since) == ("apply", "x", 2.0)


def test_unknown_stage_is_refused(tmp_path: pathlib.Path) -> None:
    """A worker cannot report a stage that has no deadline."""
    with pytest.raises(ValueError, match="warmup"):
        progress.report_stage(tmp_path, "bake")  # type: ignore[arg-type]


def test_command_is_quoted(tmp_path: pathlib.Path) -> None:
    """Folders with spaces survive the shell."""
    result = run(tmp_path, "bad-input", cache=tmp_path / "a cache")
    assert str(tmp_path / "a cache") in shlex.split(failure_of(tmp_path, result).command)

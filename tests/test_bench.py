"""`python -m fluxfast bench` as a command: what it writes, keeps, resumes and refuses. Workers are made up."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_samples import FakeWorkers, bench, on_this_machine, read_rows, staged
from suite_samples import LEVELS, changed, failed, put, run_suite

import fluxfast.__main__
import perf_tests.__main__
from fluxfast.workloads import get_workload
from perf_tests.bench import cli
from perf_tests.bench.interval import ROUNDS
from perf_tests.bench.workers import Workers
from perf_tests.harness.progress import CPU_DEADLINES, TRACE_FILE
from perf_tests.harness.schema import Counters, Environment, ErrorKind, Result


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `full` and nothing in `empty`."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        on_this_machine(patch)
        bench(FakeWorkers(), "--levels", "bf16", "-o", folder / "full")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_a_table_a_plot_and_images_that_a_replay_judges(tmp_path: Path) -> None:
    """One .csv, one .png, one image a level; with a level beside the ladder the folder is green under --replay."""
    folder = tmp_path / "run"
    assert bench(FakeWorkers(), "--levels", "bf16,compile,flux_fast", "-o", folder) == 0
    assert [path.name for path in folder.glob("*.csv")] == ["bench.csv"]
    assert [path.name for path in folder.glob("*.png")] == ["bench.png"]
    measured = ["fp32", "bf16", "compile", "aoti", "flux_fast"]
    assert list(read_rows(folder)) == measured
    assert {path.stem for path in (folder / "images").iterdir()} == set(measured)
    ran = run_suite(tmp_path, "--replay", folder)
    assert ran.status == 0 and "test_latency[compile]" in ran.of("passed"), ran.text


def test_replay_draws_what_was_measured_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table and plot without a worker, whatever this machine is; nothing else is written."""
    folder = tmp_path / "run"
    assert bench(FakeWorkers(), "--levels", "bf16,compile", "-o", folder) == 0
    made = everything(folder)
    (folder / "bench.csv").unlink(), (folder / "bench.png").unlink()
    on_this_machine(monkeypatch, torch="9.9.9")
    workers = FakeWorkers()
    assert bench(workers, "--replay", folder) == 0 and workers.ran == []
    assert everything(folder) == made


def test_default_is_the_ladder(tmp_path: Path) -> None:
    """Without --levels every rung that this machine can run is measured, and what is beside the ladder is not."""
    workers = FakeWorkers()
    assert bench(workers, "--processes", "2", "-o", tmp_path / "run") == 0
    assert workers.ran == [(level, 0) for level in LEVELS] + [(level, 1) for level in reversed(LEVELS)]


def test_failed_level_keeps_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed level is a row without numbers and with its error; the exit status is 1 and the rest is whole."""
    assert bench(FakeWorkers(failed("compile")), "--levels", "compile,fused_qkv", "-o", tmp_path / "run") == 1
    table = read_rows(tmp_path / "run")
    assert list(table) == ["fp32", "bf16", "compile", "fused_qkv"]
    assert table["bf16"]["interval_of"] == ROUNDS
    assert table["compile"]["error"] == "oom: the oom that was asked for."
    kept = {"level", "error", "workload", "workload_digest", "slug"}
    assert {name for name, cell in table["compile"].items() if cell and name not in Environment.model_fields} == kept
    assert table["fused_qkv"]["parent"] == "bf16" and float(table["fused_qkv"]["speedup_to_parent"]) > 1
    assert not (tmp_path / "run/images/compile.png").exists()
    assert "compile failed: oom" in capsys.readouterr().err


def test_all_failed(tmp_path: Path) -> None:
    """A run in which nothing was measured still has a table and a plot that say so."""
    assert bench(FakeWorkers(failed("fp32"), failed("bf16")), "--levels", "bf16", "-o", tmp_path / "run") == 1
    assert all(row["error"] and not row["median_s"] for row in read_rows(tmp_path / "run").values())


def test_resume_runs_what_has_no_measurement(tmp_path: Path) -> None:
    """A failed worker and one whose image is gone run again; the others, and the failed one's log, are kept."""
    folder = tmp_path / "run"
    bench(FakeWorkers(failed("compile")), "--levels", "compile", "-o", folder)
    before = everything(folder / "fp32")
    (folder / "bf16/0/image.png").unlink()
    workers = FakeWorkers()
    assert bench(workers, "--resume", folder) == 0
    assert workers.ran == [("bf16", 0), ("compile", 0)]
    assert all(row["median_s"] and not row["error"] for row in read_rows(folder).values())
    assert everything(folder / "fp32") == before
    assert "the oom that was asked for" in (folder / "compile/0_set_aside_1/result.json").read_text()
    again = FakeWorkers()
    assert bench(again, "--resume", folder, "--workload", "tiny") == 0 and again.ran == []


def test_ctrl_c_then_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C names the command that goes on, which runs the rest and writes the table of all."""
    folder = tmp_path / "run"
    options = ("--levels", "compile", "--processes", "2", "--trace")
    assert bench(FakeWorkers(interrupt_at=("compile", 0)), *options, "-o", folder) == 130
    assert f"--resume {folder}" in capsys.readouterr().err
    workers = FakeWorkers()
    assert bench(workers, "--resume", folder) == 0
    assert workers.ran == [("compile", 0), ("compile", 1), ("bf16", 1), ("fp32", 1)]
    assert read_rows(folder)["compile"]["processes"] == "2"
    assert (folder / "compile/0" / TRACE_FILE).is_file()  # asked for in the first part


def test_disturbed_process_is_measured_again_and_named(tmp_path: Path) -> None:
    """It alone, and once, however often the run is resumed; if it stays disturbed, the level's row says so."""
    shared = staged("compile", 1).model_copy(update={"counters": Counters(foreign_pids=[7])})
    workers = FakeWorkers(shared)
    assert bench(workers, "--levels", "compile", "--processes", "2", "-o", tmp_path / "run") == 0
    assert workers.ran[6:] == [("compile", 1)]
    row = read_rows(tmp_path / "run")["compile"]
    assert "pid 7" in row["disturbed"] and row["median_s"]
    again = FakeWorkers()
    assert bench(again, "--resume", tmp_path / "run") == 0 and again.ran == []
    assert read_rows(tmp_path / "run")["compile"] == row


def test_rerun_that_failed_is_named_and_runs_again(tmp_path: Path) -> None:
    """The disturbed measurement stays, marked with both; --resume measures the process once more."""
    shared = staged("compile").model_copy(update={"counters": Counters(foreign_pids=[7])})
    folder = tmp_path / "run"
    assert bench(FakeWorkers(shared), "--levels", "compile", "-o", folder) == 0
    (folder / "rerun/compile/0/result.json").unlink()
    put(folder / "rerun", failed("compile", ErrorKind.INTERRUPTED))
    for _ in range(2):
        assert bench(FakeWorkers(), "--replay", folder) == 0
        row = read_rows(folder)["compile"]
        assert "pid 7" in row["disturbed"] and row["median_s"] and not row["error"]
        assert "the rerun of process 0 gave no measurement (interrupted in stage 'apply')" in row["disturbed"]
    workers = FakeWorkers()
    assert bench(workers, "--resume", folder) == 0 and workers.ran == [("compile", 0)]
    assert read_rows(folder)["compile"]["disturbed"] == ""


@pytest.mark.parametrize("gpu", ["GPU-8a", None])
def test_next_worker_imports_ahead_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None) -> None:
    """Workers take turns there; without one, imports would take the processor from what is measured."""
    monkeypatch.setenv("HOME", str(tmp_path))
    turns = []

    def run_level(level: str, workload: str, process: int, folder: Path, **options: Any) -> Result:
        turns.append(options["turn"])
        while options["turn"] is not None and options["turn"]("load", process) is None:
            time.sleep(0.01)
        return staged(level, process)

    workers = Workers(
        workload=get_workload("tiny"), deadlines=CPU_DEADLINES, gpu=gpu, cache=tmp_path, is_traced=False,
        run_level=run_level,
    )  # fmt: skip
    assert set(workers([("bf16", 0), ("bf16", 1)], tmp_path)) == {("bf16", 0), ("bf16", 1)}
    assert [turn is not None for turn in turns] == [gpu is not None] * 2


@pytest.mark.parametrize("is_tracing", [True, False])
def test_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str], is_tracing: bool) -> None:
    """The first process of every level is traced; a trace that is missing is said and makes the status 1."""
    folder = tmp_path / "run"
    workers = FakeWorkers(is_tracing=is_tracing)
    status = bench(workers, "--levels", "bf16", "--processes", "2", "--trace", "-o", folder)
    assert status == (0 if is_tracing else 1)
    assert len(list(folder.glob(f"*/0/{TRACE_FILE}"))) == (2 if is_tracing else 0)
    assert not list(folder.glob(f"*/1/{TRACE_FILE}"))
    assert ("bf16 left no trace" in capsys.readouterr().err) is not is_tracing


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--levels", "fp99"], "unknown level 'fp99'; known levels: fp32"),
        (["--levels", ""], "unknown level ''"),
        (["--levels", "fa3_fp8"], "needs compute capability 9.0"),
        (["--workload", "huge"], "unknown workload 'huge'"),
        (["--processes", "0"], "--processes is 0, expected at least 1"),
        (["--output", "{full}"], "not an empty folder"),
        (["--resume", "{empty}"], "run.json"),
        (["--resume", "{full}", "--workload", "schnell"], "is of 'tiny'"),
        (["--resume", "{full}", "--levels", "bf16"], "leave --levels and --processes away"),
        (["--replay", "{empty}"], "run.json"),
        (["--replay", "{full}", "--levels", "bf16"], "measures nothing: leave every other option away"),
    ],
)
def test_bad_input(stored: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    """One sentence and status 2; nothing is run and nothing that was there is touched."""
    before, workers = everything(stored), FakeWorkers()
    places = {"full": stored / "full", "empty": stored / "empty"}
    assert bench(workers, *(argument.format(**places) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    assert workers.ran == [] and everything(stored) == before


def test_resume_refuses_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of two versions of torch do not come into one table; the sentence names both."""
    bench(FakeWorkers(failed("bf16")), "--levels", "bf16", "-o", tmp_path / "run")
    on_this_machine(monkeypatch, torch="2.14.0", power_limit_w=700)
    workers = FakeWorkers()
    assert bench(workers, "--resume", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "torch was 2.13.0, is 2.14.0; power_limit_w was None, is 700" in said and workers.ran == []


@pytest.mark.parametrize("option", ["--resume", "--replay"])
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("run.json", "in this checkout it is {digest}: the workload was changed; measure again, or go back to"),
        ("bf16/0/result.json", "digest 0000000000000000"),
    ],
)
def test_changed_workload_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, what: str, sentence: str
) -> None:
    """A workload of the same name with another digest is another workload, with other steps and warm-ups."""
    bench(FakeWorkers(), "--levels", "bf16", "-o", tmp_path / "run")
    digest, path = staged("bf16").workload_digest, tmp_path / "run" / what
    path.write_text(path.read_text().replace(digest, "0" * 16))
    before, workers = everything(tmp_path / "run"), FakeWorkers()
    capsys.readouterr()
    assert bench(workers, option, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert sentence.format(digest=digest) in said and said.count("error: ") == 1 and "Traceback" not in said
    assert workers.ran == [] and everything(tmp_path / "run") == before


@pytest.mark.parametrize("option", ["--resume", "--replay"])
def test_injected_fault_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """A level that was broken on purpose never reaches a table, nor do ratios to it."""
    folder = tmp_path / "run"
    bench(FakeWorkers(), "--levels", "bf16,compile", "-o", folder)
    put(folder, changed("bf16", result={"injection": "latency=+20%"}))
    before = everything(folder)
    capsys.readouterr()
    assert bench(FakeWorkers(), option, folder) == 2
    said = capsys.readouterr().err
    assert "level 'bf16', process 0" in said and "fault latency=+20%" in said and said.count("error: ") == 1
    assert everything(folder) == before


def test_command_is_handed_to_the_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m fluxfast bench` passes its arguments on and ends with the suite's status."""
    monkeypatch.delitem(sys.modules, "perf_tests.__main__")
    monkeypatch.setattr(sys, "argv", ["fluxfast", "bench", "--processes", "0"])
    with pytest.raises(SystemExit) as ended:
        fluxfast.__main__.main()
    assert ended.value.code == 2 and "--processes is 0" in capsys.readouterr().err


def test_without_the_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The package alone says what `bench` needs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["fluxfast", "bench"])
    assert fluxfast.__main__.main() == 2
    assert "pip install -e '.[perf]'" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing package is a sentence before anything is measured."""
    for module in ("perf_tests.bench.cli", "perf_tests.bench.plot"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delattr("perf_tests.bench.plot")
    monkeypatch.setattr(sys, "argv", ["perf_tests", "bench"])
    assert perf_tests.__main__.main() == 2
    said = capsys.readouterr().err
    assert "'bench' needs the package 'matplotlib.figure'" in said and said.count("\n") == 1


def test_full_disk_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be written is said with the command that goes on; measurements stay."""
    folder = tmp_path / "run"

    def full(path: Path, raw: bytes) -> None:
        raise OSError(28, os.strerror(28), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_over", full)
        assert bench(FakeWorkers(), "--levels", "bf16", "-o", folder) == 2
    assert f"--resume {folder}" in capsys.readouterr().err
    workers = FakeWorkers()
    assert bench(workers, "--resume", folder) == 0 and workers.ran == []


def test_error_kinds_are_words(tmp_path: Path) -> None:
    """One failed process of several empties the row and is counted."""
    broken = failed("bf16", ErrorKind.HANG, process=1)
    assert bench(FakeWorkers(broken), "--levels", "bf16", "--processes", "2", "-o", tmp_path / "run") == 1
    row = read_rows(tmp_path / "run")["bf16"]
    assert row["error"].startswith("hang: ") and row["error"].endswith("(1 of 2 processes failed)")
    assert row["median_s"] == ""

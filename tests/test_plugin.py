"""Every verdict as pytest tells it: outcome, exit status, JUnit. Stored runs are made up, so nothing is measured."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from baseline_samples import ENVIRONMENT
from suite_samples import (
    LEVELS,
    UNAVAILABLE,
    changed,
    failed,
    picture,
    put,
    run_suite,
    sample,
    step_output,
    write_run,
)

from fluxfast.workloads import TINY, get_workload
from perf_tests.harness.faults import apply_image_fault, parse
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import Counters, ErrorKind, Proof
from perf_tests.harness.store import read_baseline, write_baseline
from perf_tests.harness.stored_run import RunFacts, read_run
from perf_tests.harness.suite import ROOT
from perf_tests.issues import merged, read_cases

LATENCY, FIDELITY, STRUCTURE, MEMORY = (
    f"perf_tests/test_{name}.py" for name in ("latency", "fidelity", "structure", "memory")
)
INCONCLUSIVE = 9
OTHER_SEED = dataclasses.replace(TINY, seed=43)
OTHER_WORKLOAD = {"workload": dataclasses.asdict(OTHER_SEED), "workload_digest": OTHER_SEED.digest}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of five processes and the baseline that was recorded of it, as `tox -e perf` records it."""
    folder = tmp_path_factory.mktemp("recorded")
    options = ("--replay", write_run(folder / "run5", 5), "--record-baseline", "--benchmark-compare")
    ran = run_suite(folder, *options)
    assert ran.status == 0, ran.text
    assert "baseline written" in ran.text
    return folder


@pytest.fixture
def tmp(tmp_path: Path, recorded: Path) -> Path:
    """A folder with that baseline and a run of one process to change."""
    shutil.copytree(recorded / "baselines", tmp_path / "baselines")
    write_run(tmp_path / "run")
    return tmp_path


def older(tmp: Path, **change: object) -> None:
    """The newest baseline becomes one of another workload, method or ladder."""
    old = read_baseline(only_baseline(tmp)).model_copy(update=change)
    write_baseline(tmp / "baselines" / "cpu", "tiny", old, stock_json(old), {})


def only_baseline(tmp: Path) -> Path:
    (path,) = (tmp / "baselines" / "cpu").glob("*.json")
    return path


def test_quiet_run_is_green_and_stock_tools_read_it(tmp: Path) -> None:
    """All tests pass against the newest baseline of the workload, and the stock JSON holds the samples."""
    other = json.loads(only_baseline(tmp).read_text())
    assert other["fluxfast"]["workload"]["id"] == "tiny"
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", f"--benchmark-json={tmp / 'b.json'}")
    assert ran.status == 0, ran.text
    assert ran.of("passed") == {name for name in ran.outcomes if "fa3_fp8" not in name}
    assert len(ran.outcomes) == 5 * (len(LEVELS) + 1)
    assert "needs compute capability 9.0" in ran.messages["test_latency[fa3_fp8]"]
    assert ran.properties["test_latency[compile]"]["verdict"] == "pass"
    assert ran.suite_properties == [{"name": "slug", "value": "cpu"}, {"name": "workload", "value": "tiny"}]
    assert float(ran.properties["test_latency[compile]"]["ratio"]) == pytest.approx(1, abs=0.01)
    assert "(0001_tiny)" in ran.text, "the table compares with the baseline"
    assert "machine_info is different" not in ran.text
    stock = {entry["param"]: entry for entry in json.loads((tmp / "b.json").read_text())["benchmarks"]}
    assert stock["compile"]["stats"]["data"] == sample("compile").measurement.samples_s
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp / "b.json"), str(only_baseline(tmp))],
        cwd=tmp, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert compared.returncode == 0
    assert "test_latency[compile]" in compared.stdout + compared.stderr


def test_histogram(tmp: Path) -> None:
    """The stock histogram draws a chart."""
    pytest.importorskip("pygal")
    ran = run_suite(
        tmp, "--replay", tmp / "run", "--benchmark-compare", f"--benchmark-histogram={tmp / 'h'}", paths=(LATENCY,)
    )
    assert ran.status == 0, ran.text
    assert list(tmp.glob("h*.svg"))


def test_recorded_baseline_reads_back(recorded: Path) -> None:
    """Five processes a level, scores against the image that is stored with it."""
    baseline = read_baseline(only_baseline(recorded))
    assert only_baseline(recorded).name == "0001_tiny.json"
    assert set(baseline.levels) == set(LEVELS)
    assert {len(level.processes) for level in baseline.levels.values()} == {5}
    assert baseline.levels["compile"].fidelity["ssim_stored"] == [1.0] * 5


def test_unfit_step_output_is_not_recorded(tmp_path: Path) -> None:
    """NaN in the first step, or an error that bfloat16 does not explain, is red before there is a baseline."""
    run = write_run(tmp_path / "run", 5)
    np.save(run / "fused_qkv" / "3" / "step_output.npy", np.full((1, 16, 16), np.nan, np.float32))
    shutil.copy(run / "aoti" / "0" / "step_output.npy", run / "compile" / "2" / "step_output.npy")
    ran = run_suite(tmp_path, "--replay", run, "--record-baseline")
    assert ran.status == 1
    assert ran.of("failure") == {"test_step_error[compile]", "test_step_error[fused_qkv]"}
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (failed("compile"), "not green"),
        (changed("compile", result={"injection": "latency=+30%"}), "injection"),
        (sample("compile"), "holds 1 of"),
    ],
    ids=["failed", "injected", "too few processes"],
)
def test_unfit_run_is_not_recorded(tmp_path: Path, result: object, said: str) -> None:
    """No file is written, and the exit status is red."""
    processes = 1 if said == "holds 1 of" else 5
    run = write_run(tmp_path / "run", processes)
    put(run, result)
    ran = run_suite(tmp_path, "--replay", run, "--record-baseline")
    assert ran.status == 1, ran.text
    assert "no baseline was written" in ran.text
    assert said in ran.text or "expected at least 5" in ran.text
    assert not (tmp_path / "baselines").exists()


def test_partial_ladder_is_not_recorded(tmp: Path) -> None:
    """--levels and --record-baseline do not go together."""
    ran = run_suite(tmp, "--replay", tmp / "run", "--levels=compile", "--record-baseline")
    assert ran.status == 4
    assert "whole ladder" in ran.text


@pytest.mark.parametrize("option", ["--record-baseline", "--update-baseline"])
def test_narrowed_run_is_not_recorded_when_replayed(tmp: Path, option: str) -> None:
    """A stored run of `--levels` holds a part of the machine's ladder, though it is whole by itself."""
    run = write_run(tmp / "narrow", 5, ("fp32", "bf16", "compile"))
    ran = run_suite(tmp, "--replay", run, option)
    assert ran.status == 4, ran.text
    assert "this run is without fused_qkv, channels_last, float8, inductor_flags, aoti: " in ran.text
    assert run_suite(tmp, "--replay", run).status == 0


def test_update_needs_a_reason_to_accept_something_slower(tmp: Path) -> None:
    """Without one the level is red and nothing is written; with one the next file holds the new times."""
    run = write_run(tmp / "slow", 5)
    for process in range(5):
        put(run, sample("compile", process, 1.3))
    options = ("--replay", run, "--update-baseline")
    refused = run_suite(tmp, *options)
    assert refused.status == 1
    assert "no baseline was written" in refused.text
    ran = run_suite(tmp, *options, "--reason=the old kernel was wrong")
    assert ran.status == 0, ran.text
    assert "x1.3" in ran.text
    new = read_baseline(tmp / "baselines" / "cpu" / "0002_tiny.json")
    assert [step.reason for step in new.steps if step.level == "compile"] == ["the old kernel was wrong"]


def test_update_of_what_did_not_move(tmp: Path, recorded: Path) -> None:
    """A run like the baseline leaves it alone."""
    ran = run_suite(tmp, "--replay", recorded / "run5", "--update-baseline")
    assert ran.status == 0, ran.text
    assert "baseline unchanged" in ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"


@pytest.mark.parametrize("reason", [[], ["--reason=why"]])
def test_update_passes_over_what_the_confirmation_denied(tmp: Path, reason: list[str]) -> None:
    """Green, said, and the old level stays, with a reason too."""
    run = write_run(tmp / "denied", 5)
    for process in range(5):
        put(run, sample("aoti", process, 3.0))
    for process in range(10):
        for level in ("bf16", "inductor_flags", "aoti"):
            put(run / "confirm" / "aoti", sample(level, process))
    ran = run_suite(tmp, "--replay", run, "--update-baseline", *reason)
    assert ran.status == 0, ran.text
    assert "aoti: kept as it was, since the confirmation did not agree" in ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"


@pytest.mark.parametrize("package", ["torch", "cutlass_dsl"])
def test_another_environment_is_warned_of_and_a_key_that_came_later_is_not(tmp: Path, package: str) -> None:
    """A file from before a package was looked for says nothing of it."""
    old = read_baseline(only_baseline(tmp))
    stock = stock_json(old)
    del stock["machine_info"]["cutlass_dsl"]
    write_baseline(tmp / "baselines" / "cpu", "tiny", old, stock, {})
    for level in LEVELS:
        put(tmp / "run", changed(level, 0, result={"environment": ENVIRONMENT.model_copy(update={package: "9.9"})}))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare")
    assert ran.status == 0 and ("machine_info is different" in ran.text) is (package == "torch"), ran.text


ADD_NIGHT = ("--benchmark-compare", "--add-night")


def test_a_green_run_is_added_as_a_night(tmp: Path) -> None:
    """3 % at one level is remembered, and nothing else changes; a second time, or of a red run, it is not."""
    run = write_run(tmp / "night")
    put(run, sample("compile", 0, 1.03))
    ran = run_suite(tmp, "--replay", run, *ADD_NIGHT)
    assert ran.status == 0, ran.text
    assert "0002_tiny.json, with this night of " in ran.text
    old, new = (read_baseline(tmp / "baselines" / "cpu" / f"000{number}_tiny.json") for number in (1, 2))
    assert [own.nights for own in old.levels.values()] == 8 * [[]]
    assert new.levels["compile"].nights == [pytest.approx(math.log(1.03), abs=0.002)]
    assert new.levels["aoti"].nights == [pytest.approx(0, abs=0.002)]
    assert new.levels["compile"].processes == old.levels["compile"].processes
    assert "baseline unchanged: it has this night" in run_suite(tmp, "--replay", run, *ADD_NIGHT).text
    put(run, sample("compile", 0, 3.0))
    ran = run_suite(tmp, "--replay", run, *ADD_NIGHT)
    assert ran.status == 1 and "no baseline was written: the run is not green" in ran.text


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"injection": "slow:0.04"}, "'compile' was broken on purpose"),
        (
            {"environment": ENVIRONMENT.model_copy(update={"torch": "9.9"})},
            "'compile': a night tells how levels move when nothing changes, and since the baseline was recorded torch ",
        ),
    ],
)
def test_what_is_no_night(tmp: Path, result: dict[str, object], said: str) -> None:
    """Another environment or a fault, be it of one process, is what changed."""
    put(tmp / "run", changed("compile", 0, result=result))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADD_NIGHT)
    assert ran.status == 1 and f"no baseline was written: {said}" in ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"


def test_what_could_be_no_night_is_refused_at_once(tmp: Path) -> None:
    """A part of the tests, another number of processes, and no baseline to add to."""
    for replayed, paths, said in (
        (tmp / "run", ("perf_tests/test_structure.py",), "a run in which every test judged: name no files"),
        (write_run(tmp / "five", 5), ("perf_tests",), "a night is of 1 process(es) a level on 'cpu'"),
    ):
        ran = run_suite(tmp, "--replay", replayed, *ADD_NIGHT, paths=paths)
        assert ran.status == 4 and said in ran.text, ran.text
    only_baseline(tmp).unlink()
    ran = run_suite(tmp, "--replay", tmp / "run", *ADD_NIGHT)
    assert ran.status == 4 and "adds to a recorded baseline, and there is none of 'tiny'" in ran.text


@pytest.mark.parametrize(("again", "status"), [(1.3, 1), (1.0, 0), (None, 1)], ids=["agrees", "does not", "not there"])
def test_slower_level(tmp: Path, again: float | None, status: int) -> None:
    """30 % is red if fresh processes agree, or if the stored run has none."""
    put(tmp / "run", sample("aoti", 0, 1.3))
    for process in range(10 if again else 0):
        for level in ("bf16", "inductor_flags", "aoti"):
            put(tmp / "run" / "confirm" / "aoti", sample(level, process, again if level == "aoti" else 1.0))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(LATENCY,))
    assert ran.status == status, ran.text
    assert ran.of("failure") == ({"test_latency[aoti]"} if status else set())
    assert ran.properties["test_latency[aoti]"]["rule"] == (
        "unconfirmed" if again is None else "interval" if status else "confirmation"
    )
    if status:
        assert "regressed [aoti]" in ran.messages["test_latency[aoti]"]
        assert "Traceback" not in ran.text


def test_faster_level_warns_and_is_red_when_strict(tmp: Path) -> None:
    """Improved is loud, and a failure under --strict."""
    for process in range(3):
        put(tmp / "run", sample("aoti", process, 0.7))
    facts = json.loads((tmp / "run" / "run.json").read_text())
    (tmp / "run" / "run.json").write_text(json.dumps({**facts, "processes": 3}))
    for level in LEVELS:
        for process in range(3):
            put(tmp / "run", sample(level, process, 0.7 if level == "aoti" else 1.0))
    options = ("--replay", tmp / "run", "--benchmark-compare")
    ran = run_suite(tmp, *options, paths=(LATENCY,))
    assert ran.status == 0, ran.text
    assert "baseline is stale" in ran.text
    strict = run_suite(tmp, *options, "--strict", paths=(LATENCY,))
    assert strict.status == 1
    assert strict.of("failure") == {"test_latency[aoti]"}
    assert strict.messages["test_latency[aoti]"].startswith("improved") or "improved [aoti]" in strict.text
    assert run_suite(tmp, *options, "-o", "addopts=--strict", paths=(LATENCY,)).of("failure") == {"test_latency[aoti]"}


def test_disturbed_level_is_neither_green_nor_red(tmp: Path) -> None:
    """Void is skipped, and the run has an exit status of its own; the rerun counts where there is one."""
    hot = changed("compile", result={"counters": Counters(thermal_violation_ns=5)})
    put(tmp / "run", hot)
    options = ("--replay", tmp / "run", "--benchmark-compare")
    ran = run_suite(tmp, *options, paths=(LATENCY,))
    assert ran.status == INCONCLUSIVE, ran.text
    assert ran.of("skipped") == {"test_latency[compile]"}
    assert "void [compile]" in ran.messages["test_latency[compile]"]
    put(tmp / "run" / "rerun", sample("compile"))
    assert run_suite(tmp, *options, paths=(LATENCY,)).status == 0


def test_other_workload_does_not_compare(tmp: Path) -> None:
    """A baseline of a workload that was changed since is red in every test."""
    change = {**OTHER_WORKLOAD, "reference_image": None, "reference_sha256": None}
    old = read_baseline(only_baseline(tmp)).model_copy(update=change)
    write_baseline(tmp / "baselines" / "cpu", "tiny", old, stock_json(old), {})
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare")
    assert ran.status == 1
    assert ran.of("failure") == {name for name in ran.outcomes if "fa3_fp8" not in name}
    assert {ran.properties[name]["verdict"] for name in ran.of("failure")} == {"incomparable"}


def test_no_baseline(tmp_path: Path) -> None:
    """Red under --benchmark-compare, naming the command; green without, saying that nothing was compared."""
    run = write_run(tmp_path / "run")
    ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare")
    assert ran.status == 1
    assert len(ran.of("failure")) == 5 * len(LEVELS)
    assert "pytest perf_tests --workload tiny --record-baseline" in ran.messages["test_latency[compile]"]
    for test in ("structure", "latency", "image", "step_error", "memory"):
        said = f"None of workload 'tiny' is in {tmp_path / 'baselines' / 'cpu'}."
        assert said in ran.messages[f"test_{test}[compile]"]
    ran = run_suite(tmp_path, "--replay", run)
    assert ran.status == 0, ran.text
    assert {ran.properties[name]["rule"] for name in ran.of("passed")} == {"count", "not_compared"} - (
        set() if ran.properties["test_structure[bf16]"]["rule"] == "count" else {"count"}
    )
    assert not (tmp_path / "baselines").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("change", [OTHER_WORKLOAD, {"fidelity_method": {}}], ids=["workload", "method"])
def test_meant_change_is_recorded_by_the_documented_command(
    tmp: Path, recorded: Path, change: dict[str, object]
) -> None:
    """Another workload or method is red, is no obstacle to a new baseline, and compares with that one."""
    older(tmp, **change)
    judged = ("--replay", tmp / "run", "--benchmark-compare")
    ran = run_suite(tmp, *judged)
    assert ran.status == 1
    assert {ran.properties[name]["verdict"] for name in ran.of("failure")} == {"incomparable"}
    ran = run_suite(tmp, "--replay", recorded / "run5", "--record-baseline", "--benchmark-compare")
    assert ran.status == 0, ran.text
    assert "0003_tiny.json" in ran.text
    assert run_suite(tmp, *judged).status == 0


def test_a_level_that_is_no_longer_available_is_red(tmp: Path) -> None:
    """A package that is gone takes no level out of a night, or of a new baseline, in silence; `--levels` may."""
    lost = {"float8": "float8: needs torchao", **UNAVAILABLE}
    shutil.rmtree(tmp / "run")
    run = write_run(tmp / "run", 5, [level for level in LEVELS if level != "float8"], unavailable=lost)
    ran = run_suite(tmp, "--replay", run, "--benchmark-compare")
    assert ran.status == 1, ran.text
    tests = ("structure", "latency", "image", "step_error", "memory")
    assert ran.of("failure") == {f"test_{test}[float8]" for test in tests}
    assert "cannot run there now: float8: needs torchao" in ran.messages["test_latency[float8]"]
    assert ran.properties["test_structure[float8]"]["rule"] == "unavailable"
    for option in ("--record-baseline", "--update-baseline"):
        ran = run_suite(tmp, "--replay", run, option)
        assert ran.status == 4 and "cannot run there now: float8: needs torchao" in ran.text, ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"
    ran = run_suite(tmp, "--replay", run, "--benchmark-compare", "--levels=compile", paths=(LATENCY,))
    assert ran.status == 0, ran.text


def test_a_recording_compares_with_the_last_baseline(tmp: Path) -> None:
    """Something slower is not recorded without a word, and not by naming the files that would not see it."""
    run = write_run(tmp / "slow", 5)
    for process in range(5):
        put(run, sample("compile", process, 1.3))
    ran = run_suite(tmp, "--replay", run, "--record-baseline")
    assert ran.status == 1 and ran.of("failure") == {"test_latency[compile]"}, ran.text
    for option in ("--record-baseline", "--update-baseline"):
        ran = run_suite(tmp, "--replay", run, option, paths=(STRUCTURE,))
        assert ran.status == 4 and "name no files or node ids to record" in ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"


def test_a_replay_of_some_tests_keeps_what_the_night_said(tmp: Path) -> None:
    """Only all tests, compared, replace the verdicts beside the results."""
    options = ("--replay", tmp / "run", f"--history={tmp / 'h.db'}")
    assert run_suite(tmp, *options, "--benchmark-compare").status == 0
    said = (tmp / "run" / "verdicts.json").read_bytes()
    for narrowed in ({"paths": (LATENCY,)}, {}):
        more = ("--benchmark-compare",) if narrowed else ()
        ran = run_suite(tmp, *options, *more, **narrowed)
        assert ran.status == 0 and "only a replay of all tests" in ran.text
        assert (tmp / "run" / "verdicts.json").read_bytes() == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--benchmark-min-rounds=9",), "--benchmark-min-rounds=9 would change nothing"),
        (("--benchmark-autosave",), "use --record-baseline"),
        (("--benchmark-save=x",), "use --record-baseline"),
    ],
)
def test_stock_options_that_would_do_nothing_are_refused(tmp: Path, options: tuple[str, ...], said: str) -> None:
    """One sentence each, and nothing is written."""
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", *options, paths=(LATENCY,))
    assert ran.status == 4 and said in ran.text


def test_recording_over_what_does_not_compare_still_refuses_the_rest(tmp: Path) -> None:
    """A slower level that does compare, and a step that is not finite in one that does not, are red as ever."""
    levels = read_baseline(only_baseline(tmp)).levels
    fields = {**levels["aoti"].fields, "packaging": "jit"}
    older(tmp, levels=levels | {"aoti": levels["aoti"].model_copy(update={"fields": fields})})
    run = write_run(tmp / "run5", 5)
    for process in range(5):
        put(run, sample("compile", process, 1.3))
    np.save(run / "aoti" / "0" / "step_output.npy", np.full((1, 16, 16), np.nan, np.float32))
    ran = run_suite(tmp, "--replay", run, "--benchmark-compare", "--record-baseline")
    assert ran.status == 1
    assert ran.of("failure") == {"test_latency[compile]", "test_step_error[aoti]"}
    assert {ran.properties[f"test_{test}[aoti]"]["verdict"] for test in ("image", "latency")} == {"incomparable"}
    assert "no baseline was written" in ran.text


@pytest.mark.parametrize("kind", [ErrorKind.OOM, ErrorKind.HANG, ErrorKind.CRASH, ErrorKind.IMPORT])
def test_failed_level(tmp: Path, kind: ErrorKind) -> None:
    """Each failure is an error verdict with its kind, the log and the command; the rest of the ladder is judged."""
    put(tmp / "run", failed("aoti", kind))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(LATENCY, STRUCTURE))
    assert ran.status == 1
    assert ran.of("failure") == {"test_latency[aoti]", "test_structure[aoti]"}
    red = [case for case in read_cases(tmp / "junit.xml", "cpu") if case.state == "red"]
    assert list(merged(red)) == ["test_latency, test_structure[aoti]"]
    message = ran.messages["test_latency[aoti]"]
    assert f"error [aoti] ({kind.value})" in message
    assert "the last line of its log" in message
    assert "perf_tests.harness.worker" in message


@pytest.mark.parametrize("level", ["bf16", "fused_qkv", "aoti"])
def test_step_without_effect(tmp: Path, level: str) -> None:
    """Exactly the structure test of the level is red, even of the level that all others are divided by."""
    put(tmp / "run", failed(level, ErrorKind.STEP_NOT_APPLIED))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare")
    assert ran.status == 1
    assert ran.of("failure") == {f"test_structure[{level}]"}
    assert f"test_latency[{level}]" in ran.of("skipped")
    assert "a step had no effect" in ran.messages[f"test_image[{level}]"]


def test_unmeasured_reference_is_not_green(tmp: Path) -> None:
    """bf16 is not among --levels, yet nothing can be judged without it."""
    put(tmp / "run", failed("bf16", ErrorKind.STEP_NOT_APPLIED))
    ran = run_suite(tmp, "--replay", tmp / "run", "--levels=aoti", "--benchmark-compare")
    assert ran.status == 1
    assert "not green: bf16 gave no measurement. error [bf16] (step_not_applied)" in ran.text
    assert "the step_not_applied that was asked for" in ran.text and "-k" not in ran.text.partition("not green")[2]


@pytest.mark.parametrize("fault", ["colour-cast", "hole", "wrong-seed"])
def test_wrong_image(tmp: Path, fault: str) -> None:
    """Red, with the difference maps written and named."""
    image = picture(9) if fault == "wrong-seed" else apply_image_fault(parse(fault), picture())
    put(tmp / "run", sample("aoti"), image)
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(FIDELITY,))
    assert ran.status == 1
    assert ran.of("failure") == {"test_image[aoti]"}
    for name in ("stored", "this_run"):
        path = tmp / "run" / "aoti" / "0" / f"difference_from_{name}.png"
        assert path.exists()
        assert str(path) in ran.messages["test_image[aoti]"]


def test_changed_count_or_missing_proof(tmp: Path) -> None:
    """A count that does not hold, and a fact that is no longer counted, are red in test_structure alone."""
    put(tmp / "run", changed("aoti", proofs=[Proof(field="dtype", what="parameters", observed=376, expected=377)]))
    put(tmp / "run", changed("float8", proofs=[Proof(field="dtype", what="other", observed=1, expected=1)]))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare")
    assert ran.status == 1
    assert ran.of("failure") == {"test_structure[aoti]", "test_structure[float8]"}
    assert ran.properties["test_structure[aoti]"]["observed"] == "376.0"


def test_other_weights(tmp: Path) -> None:
    """One byte more of weights is red in test_memory alone."""
    put(tmp / "run", changed("aoti", transformer_weight_bytes=18_000_001))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare")
    assert ran.of("failure") == {"test_memory[aoti]"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels=quick"], "unknown level 'quick'; known levels: fp32"),
        (["--levels=fa3_fp8"], "needs compute capability 9.0"),
        (["--workload=huge"], "--workload huge"),
        (["--inject=compile:oom"], "--replay starts none"),
        (["--processes=3"], "--replay starts none"),
        (["--gpus=2"], "--gpus says on how many GPUs workers run, and --replay starts none"),
        (["--fresh-compiles"], "--fresh-compiles says that workers compile anew, and --replay starts none"),
        (["--require-machine=h200-700w"], "--require-machine h200-700w: this machine is 'cpu'"),
        (["--record-baseline", "--update-baseline"], "leave one away"),
        (["--add-night"], "give --benchmark-compare, and leave --record-baseline, --update-baseline and --inject away"),
        (["--reason=why not"], "give both"),
        (["--record-baseline", "--reason=why not"], "give both"),
        (["--update-baseline", "--reason="], "give both"),
        (["--partial-baseline"], "--partial-baseline goes with --record-baseline"),
        (["--partial-baseline", "--update-baseline"], "--partial-baseline goes with --record-baseline"),
        (["--benchmark-disable"], "leave tests out"),
        (["--benchmark-skip"], "leave tests out"),
        (["--benchmark-only"], "leave tests out"),
        (["-p", "no:benchmark"], "pytest-benchmark"),
        (["-n2"], "cannot run under xdist"),
        ([f"--baselines={300 * 'x'}"], "File name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(tmp_path: Path, recorded: Path, options: list[str], said: str) -> None:
    """One sentence, exit status 4, no traceback."""
    ran = run_suite(tmp_path, "--replay", recorded / "run5", *options)
    assert ran.status == 4, ran.text
    assert said in ran.text
    assert "Traceback" not in ran.text


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["compile:fire"], "known faults"),
        (["fa3_fp8:oom"], "expected LEVEL:FAULT"),
        (["aoti:latency=+20%", "compile:oom", "aoti:latency=+30%"], "'aoti' has a fault already"),
        (["bf16:unapplied:quantization"], "'bf16' does not have quantization"),
    ],
    ids=["unknown", "of an unavailable level", "two of a level", "of a field that is off"],
)
def test_faults_that_cannot_be_injected(tmp_path: Path, faults: list[str], said: str) -> None:
    """One sentence, nothing is measured; a level takes one fault."""
    ran = run_suite(tmp_path, "-p", "fake_machine", *(f"--inject={fault}" for fault in faults))
    assert ran.status == 4, ran.text
    assert said in ran.text
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus=0"], "--gpus is 0, expected at least 1"),
        (["--gpus=2"], "--gpus 2: expected so many GPUs, and workers find none here"),
        (["--gpus=2", "--cards=h200-700w,h100-700w"], "expected GPUs of one kind, and 0 is h200-700w, 1 is h100-700w"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_gpus_that_cannot_measure_side_by_side(tmp_path: Path, options: list[str], said: str) -> None:
    """One sentence, nothing is measured."""
    ran = run_suite(tmp_path, "-p", "fake_machine", f"--cache={tmp_path / 'cache'}", *options)
    assert ran.status == 4, ran.text
    assert said in ran.text and "Traceback" not in ran.text
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("is_fresh", [True, False])
def test_processes_compile_anew_if_asked(tmp_path: Path, is_fresh: bool) -> None:
    """Each in a folder of its own that goes with it; else all share one, which is kept."""
    cache = tmp_path / "cache"
    options = ["--fresh-compiles"] if is_fresh else []
    ran = run_suite(tmp_path, "-p", "fake_machine", f"--cache={cache}", "--processes=2", *options)
    assert ran.status == 0, ran.text
    seen = [Path(path.read_text()) for path in (tmp_path / "results").glob("*/*/*/cache")]
    assert len(seen) == 2 * len(LEVELS)
    assert len(set(seen)) == (len(seen) if is_fresh else 1)
    assert {path.parent if is_fresh else path for path in seen} == {cache}
    assert any(path.exists() for path in seen) != is_fresh


@pytest.mark.parametrize("count", [1, 2])
def test_workers_share_the_gpus(tmp_path: Path, count: int) -> None:
    """Each of two runs some of the workers, and is held; a single one is what the environment says."""
    cache = tmp_path / "cache"
    cards = f"--cards={','.join(['h200-700w'] * 3)}"
    ran = run_suite(tmp_path, "-p", "fake_machine", f"--cache={cache}", cards, f"--gpus={count}", "--processes=2")
    assert ran.status == 0, ran.text
    seen = [path.read_text() for path in (tmp_path / "results").glob("*/*/*/gpu")]
    assert len(seen) == 2 * len(LEVELS)
    assert set(seen) == ({"0", "1"} if count == 2 else {"None"})
    assert {path.name for path in (cache / "leases").iterdir()} == {f"{gpu}.lock" for gpu in range(count)}
    (folder,) = (tmp_path / "results").glob("*/run.json")
    assert json.loads(folder.read_text())["slug"] == "h200-700w"
    for level, results in read_run(folder.parent, LEVELS, 2).items():
        assert [result.process for result in results] == [0, 1], level


@pytest.mark.parametrize(
    ("options", "is_filled"),
    [
        (["--gpus=2", "--record-baseline"], True),
        (["--gpus=1", "--record-baseline"], False),
        (["--gpus=2", "--record-baseline", "--fresh-compiles"], False),
        (["--gpus=2", "--processes=5"], False),
    ],
)
def test_a_recording_on_several_gpus_compiles_first(tmp_path: Path, options: list[str], is_filled: bool) -> None:
    """Every level that compiles, before any worker whose time counts; what is measured once more finds it compiled."""
    machine = ("-p", "fake_machine", f"--cache={tmp_path / 'cache'}", "--cards=h200-700w,h200-700w", "--hot=bf16:1")
    ran = run_suite(tmp_path, *machine, *options, f"--baselines={tmp_path / 'baselines'}")
    assert ran.status == 0, ran.text
    (folder,) = (path.parent for path in (tmp_path / "results").glob("*/run.json"))
    first = list(folder.glob("compiled_first/*/*/result.json"))
    compiled = {level for level in LEVELS if level not in ("fp32", "bf16")}
    assert sorted(path.parts[-3:-1] for path in first) == sorted((level, "0") for level in compiled if is_filled)
    counted = [path.stat().st_mtime_ns for path in folder.glob("*/*/result.json")]
    assert len(counted) == 5 * len(LEVELS) and all(path.stat().st_mtime_ns < min(counted) for path in first)
    assert (folder / "rerun/bf16/1/result.json").exists() and not (folder / "rerun/compiled_first").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--benchmark-compare", "perf_tests"],
        ["--benchmark-compare", "perf_tests/"],
        ["--benchmark-compare", f"{LATENCY}::test_latency[aoti]"],
        ["--benchmark-compare", "."],
        [STRUCTURE, "--benchmark-compare", LATENCY],
        ["perf_tests", "--benchmark-compare="],
    ],
    ids=" ".join,
)
def test_benchmark_compare_takes_no_path(tmp_path: Path, arguments: list[str]) -> None:
    """A path behind the flag would be its value, and an empty value compares nothing."""
    ran = run_suite(tmp_path, f"--replay={write_run(tmp_path / 'run')}", paths=arguments)
    assert ran.status == 4, ran.text
    assert "give the flag last" in ran.text
    assert "Traceback" not in ran.text


def damaged(tmp: Path, how: str) -> Path:
    """A stored run with one defect."""
    if how == "empty folder":
        (tmp / "bad").mkdir()
        return tmp / "bad"
    run = write_run(tmp / "bad")
    facts, result = run / "run.json", run / "aoti" / "0" / "result.json"
    if how == "partial":
        result.unlink()
    elif how == "fewer processes than told":
        facts.write_text(
            RunFacts.model_validate_json(facts.read_bytes()).model_copy(update={"processes": 2}).model_dump_json()
        )
    elif how == "other schema":
        result.write_text(result.read_text().replace('"result_schema": 1', '"result_schema": 2'))
    elif how == "truncated result":
        result.write_bytes(result.read_bytes()[:300])
    elif how == "no level":
        facts.write_text(
            RunFacts.model_validate_json(facts.read_bytes()).model_copy(update={"levels": []}).model_dump_json()
        )
    elif how == "another workload's result":
        put(run, changed("aoti", result={"workload_digest": "0123456789abcdef"}))
    elif how == "a workload as it was":
        facts.write_text(facts.read_text().replace(TINY.digest, "0123456789abcdef"))
    elif how == "another level's result":
        result.write_bytes((run / "float8" / "0" / "result.json").read_bytes())
    elif how == "rerun of a process that it lacks":
        put(run / "rerun", sample("aoti", 1))
    elif how == "run.json is a list":
        facts.write_text("[]")
    else:
        facts.write_text(facts.read_text().replace('"aoti"', '"other"'))
    return run


@pytest.mark.parametrize(
    "how",
    [
        "empty folder", "partial", "fewer processes than told", "other schema", "truncated result",
        "another level's result", "run.json is a list", "unknown level", "no level", "another workload's result",
        "a workload as it was", "rerun of a process that it lacks",
    ],
)  # fmt: skip
def test_damaged_run(tmp_path: Path, how: str) -> None:
    """One sentence before any test."""
    ran = run_suite(tmp_path, "--replay", damaged(tmp_path, how))
    assert ran.status == 4, ran.text
    assert "Traceback" not in ran.text
    assert ran.text.count("ERROR") == 1


def test_damaged_artefacts_are_red_without_a_traceback(tmp: Path) -> None:
    """Images that are not the measured ones or of another size; step outputs truncated, NaN, or of another kind."""
    run = tmp / "run"
    (run / "aoti" / "0" / "image.png").write_bytes((run / "aoti" / "0" / "image.png").read_bytes()[:-20])
    put(run, sample("float8"), picture()[:96])
    (run / "compile" / "0" / "step_output.npy").write_bytes(b"\x93NUMPY")
    np.save(run / "fused_qkv" / "0" / "step_output.npy", np.full((1, 16, 16), np.nan, np.float32))
    np.save(run / "channels_last" / "0" / "step_output.npy", step_output("channels_last")[:, :8])
    np.save(run / "float8" / "0" / "step_output.npy", np.full((1, 16, 16), "1"))
    with (run / "inductor_flags" / "0" / "step_output.npy").open("wb") as file:
        np.savez(file, step_output("inductor_flags"), step_output("fp32"))
    (run / "aoti" / "0" / "step_output.npy").write_bytes(b"PK\x03\x04" + bytes(40))
    ran = run_suite(tmp, "--replay", run, "--benchmark-compare", paths=(FIDELITY,))
    assert ran.status == 1
    assert ran.of("failure") == {
        "test_image[aoti]", "test_image[float8]", *(f"test_step_error[{level}]" for level in LEVELS[2:]),
    }  # fmt: skip
    for level, said in {
        "channels_last": "shapes are (1, 8, 16) and (1, 16, 16)",
        "float8": "holds <U1, expected an array of float32",
        "inductor_flags": "holds an archive, expected an array of float32",
        "aoti": "not a whole .npy file",
    }.items():
        assert said in ran.messages[f"test_step_error[{level}]"]
    assert "Traceback" not in ran.text
    assert "raise " not in ran.text


def test_deselection_is_not_green(tmp: Path) -> None:
    """-k leaves levels unjudged; nothing collected is red too."""
    ran = run_suite(tmp, "--replay", tmp / "run", "-k", "compile")
    assert ran.status == 1
    assert "not green" in ran.text
    assert "narrow with --levels" in ran.text
    assert run_suite(tmp, "--replay", tmp / "run", "-k", "nosuchtest").status == 5
    assert run_suite(tmp, "--replay", tmp / "run", "--levels=compile").status == 0


def test_difference_map_that_cannot_be_written(tmp: Path) -> None:
    """The verdict stands, and says why there is no map."""
    put(tmp / "run", sample("aoti"), apply_image_fault(parse("hole"), picture()))
    (tmp / "run" / "aoti" / "0" / "difference_from_stored.png").mkdir()
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(FIDELITY,))
    assert ran.of("failure") == {"test_image[aoti]"}
    assert ran.properties["test_image[aoti]"]["verdict"] == "regressed"
    assert "its difference map cannot be written ([Errno 21]" in ran.messages["test_image[aoti]"]
    assert "Traceback" not in ran.text


@pytest.mark.parametrize("option", ["--update-baseline", "--record-baseline"])
def test_run_without_its_bf16_image_is_not_recorded(tmp: Path, option: str) -> None:
    """One sentence, and the tests of the run are reported."""
    run = write_run(tmp / "run5", 5)
    (run / "bf16" / "0" / "image.png").unlink()
    ran = run_suite(tmp, "--replay", run, option)
    assert ran.status == 1, ran.text
    assert "no baseline was written" in ran.text and "image.png: cannot be read" in ran.text
    assert ran.of("passed") and "Traceback" not in ran.text and "INTERNALERROR" not in ran.text
    assert only_baseline(tmp).name == "0001_tiny.json"


ONE = f"{STRUCTURE}::test_structure[aoti]"


@pytest.mark.parametrize(
    ("options", "paths", "said"),
    [
        (["-k", "not test_structure"], ["perf_tests"], f"left out were test_structure of {', '.join(LEVELS)}."),
        ([f"--deselect={ONE}"], ["perf_tests"], "left out were test_structure of aoti."),
        (["--ignore=perf_tests/test_structure.py"], ["perf_tests"], "left out were test_structure of fp32, "),
        ([f"--deselect={ONE}"], [STRUCTURE, MEMORY], "left out were test_structure of aoti."),
        ([f"--deselect={STRUCTURE}::test_structure[fa3_fp8]"], ["perf_tests"], ""),
        ([], [STRUCTURE, f"{MEMORY}::test_memory[aoti]"], ""),
    ],
    ids=["-k", "--deselect", "--ignore", "--deselect beside files", "not on this machine", "files"],
)
def test_a_compared_run_judges_every_test(tmp: Path, options: list[str], paths: list[str], said: str) -> None:
    """A test of a level that was left out is named; files and node ids say what is wanted."""
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", *options, paths=paths)
    assert ran.status == (1 if said else 0), ran.text
    assert said in ran.text
    assert ("not green" in ran.text) == bool(said)


def quarantine(tmp: Path, added: datetime.date, expires: datetime.date) -> Path:
    path = tmp / "quarantine.toml"
    path.write_text(
        f'[[quarantine]]\ntest = "{LATENCY}::test_latency[aoti]"\nissue = "https://example.org/1"\n'
        f'owner = "someone"\nadded = {added}\nexpires = {expires}\n'
    )
    return path


def test_quarantine(tmp: Path) -> None:
    """A quarantined failure is excused with its reason but never recorded; an expired row is a usage error."""
    today = datetime.datetime.now(datetime.UTC).date()
    put(tmp / "run", sample("aoti", 0, 1.3))
    options = ("--replay", tmp / "run", "--benchmark-compare")
    row = quarantine(tmp, today, today + datetime.timedelta(days=7))
    ran = run_suite(tmp, *options, f"--quarantine={row}", paths=(LATENCY,))
    assert ran.status == 0, ran.text
    assert "quarantined until" in ran.messages["test_latency[aoti]"]
    ran = run_suite(tmp, *options, f"--quarantine={row}", "--record-baseline")
    assert ran.status == 1
    assert "is quarantined and regressed" in ran.text
    row = quarantine(tmp, today - datetime.timedelta(days=9), today - datetime.timedelta(days=2))
    ran = run_suite(tmp, *options, f"--quarantine={row}", paths=(LATENCY,))
    assert ran.status == 4
    assert "in quarantine only until" in ran.text


def test_other_tests_are_left_alone(tmp_path: Path) -> None:
    """`pytest tests/...` asks no machine, makes no folder and takes no option of the suite's into account."""
    ran = run_suite(tmp_path, "--replay", tmp_path / "nowhere", paths=("tests/test_quarantine.py",))
    assert ran.status == 0, ran.text
    assert "fluxfast verdicts" not in ran.text
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]


def test_run_of_a_baseline_folder_that_holds_two_workloads(tmp: Path) -> None:
    """The newest file of this run's workload is compared with, not the newest file; another number is refused."""
    named = dataclasses.replace(TINY, id="dev")
    change = {"workload": dataclasses.asdict(named), "workload_digest": named.digest}
    other = read_baseline(only_baseline(tmp)).model_copy(
        update={**change, "reference_image": None, "reference_sha256": None}
    )
    path = write_baseline(tmp / "baselines" / "cpu", "dev", other, stock_json(other), {})
    assert path.name == "0002_dev.json"
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(LATENCY,))
    assert ran.status == 0, ran.text
    assert "0001_tiny" in ran.text
    assert "0002_dev" not in ran.text
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare=0002", paths=(LATENCY,))
    assert ran.status == 4
    assert "only the newest baseline judges" in ran.text


def test_red_test_prints_the_bisect_command(tmp: Path) -> None:
    """A package that is another than the baseline's gives axis, good and bad; without one nothing is printed."""
    for process, environment in ((0, ENVIRONMENT.model_copy(update={"torchao": "0.19.0"})),):
        for level in LEVELS:
            put(tmp / "run", changed(level, process, result={"environment": environment}))
    slow = changed("float8", proofs=[Proof(field="quantization", what="Linears", observed=0, expected=350)])
    put(tmp / "run", slow.model_copy(update={"environment": environment}))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(STRUCTURE,))
    command = ran.properties["test_structure[float8]"]["bisect"]
    assert command in ran.messages["test_structure[float8]"].splitlines()
    assert command.startswith(
        "python -m perf_tests bisect --axis torchao --good 0.18.0 --bad 0.19.0 --test 'test_structure[float8]' "
        "--workload tiny"
    )
    put(tmp / "run", slow)
    for level in LEVELS:
        put(tmp / "run", slow if level == "float8" else sample(level))
    ran = run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", paths=(STRUCTURE,))
    assert ran.status == 1 and "perf_tests bisect" not in ran.text


def test_disturbed_reference_stays_out_of_a_partial_baseline(tmp_path: Path) -> None:
    """Its outputs still judge the others, its times do not stand; the line says how it is added."""
    run = write_run(tmp_path / "run", 5)
    put(run, changed("fp32", 3, result={"counters": Counters(thermal_violation_ns=5)}))
    chosen = ("--replay", run, "--levels=bf16,compile", "--record-baseline", "--partial-baseline")
    ran = run_suite(tmp_path, *chosen)
    assert ran.status == 0, ran.text
    assert set(read_baseline(only_baseline(tmp_path)).levels) == {"bf16", "compile"}
    assert "fp32: not in it, since it was disturbed (thermal_violation_ns rose by 5" in ran.text
    put(run, changed("compile", 3, result={"counters": Counters(thermal_violation_ns=5)}))
    ran = run_suite(tmp_path, *chosen)
    assert ran.status != 0 and "no baseline was written" in ran.text


def test_noise_is_no_part_of_a_baseline(tmp_path: Path) -> None:
    """Random weights draw noise: its scores would judge nothing, and its picture is megabytes of it."""
    schnell = get_workload("schnell")
    named = {"workload": schnell.id, "workload_digest": schnell.digest}
    run = write_run(tmp_path / "run5", 5, **named)
    for level, process in itertools.product(LEVELS, range(5)):
        put(run, sample(level, process).model_copy(update=named))
    ran = run_suite(tmp_path, "--replay", run, "--record-baseline")
    assert ran.status == 0, ran.text
    (path,) = (tmp_path / "baselines" / "cpu").iterdir()
    baseline = read_baseline(path)
    assert baseline.reference_image is None and not any(own.fidelity for own in baseline.levels.values())
    assert all(len(baseline.levels[level].step_error) == 5 for level in LEVELS if level != "fp32")


def test_partial_baseline_of_one_level(tmp_path: Path) -> None:
    """The chosen level and what it needs, in a folder of its own; never beside the committed baselines."""
    run = write_run(tmp_path / "run", 5)
    node = f"{STRUCTURE}::test_structure[compile]"
    chosen = ("--replay", run, "--levels=compile", "--record-baseline", "--partial-baseline")
    ran = run_suite(tmp_path, *chosen, paths=(node,))
    assert ran.status == 0, ran.text
    assert set(read_baseline(only_baseline(tmp_path)).levels) == {"fp32", "bf16", "compile"}
    judged = run_suite(tmp_path, "--replay", run, "--levels=compile", "--benchmark-compare", paths=(node,))
    assert judged.properties["test_structure[compile]"]["verdict"] == "pass", judged.text
    refused = run_suite(tmp_path, *chosen, f"--baselines={ROOT / 'baselines'}", paths=(node,))
    assert refused.status == 4 and "folder of your own" in refused.text

"""Levels added to a baseline that another run recorded: measured with their references only, the rest left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from baseline_samples import ENVIRONMENT, sample_baseline, sample_run
from suite_samples import LEVELS, SPEED_S, UNAVAILABLE, changed, picture, put, run_suite, sample, write_run

from fluxfast.levels import get_level
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import Baseline, Outcome, Proof, Verdict
from perf_tests.harness.store import BaselineError, read_baseline, write_baseline
from perf_tests.harness.updating import extend_baseline, other_environment

GPU = "h200-700w"
NEW = "float8"
REFERENCES = ("fp32", "bf16", "channels_last")
HELD = tuple(level for level in LEVELS if level != NEW)
OTHER = ENVIRONMENT.model_copy(update={"torch": "2.14.0", "driver": "600.1"})
ADDING = ("--update-baseline", f"--levels={NEW}")


def witness(level: str, low: float = 0.999, high: float = 1.001, rule: str = "interval") -> Verdict:
    """The gate's word on a level that may move by 2 %."""
    numbers = {"ratio": (low + high) / 2, "low": low, "high": high, "limit": 0.02}
    return Verdict(outcome=Outcome.PASS, level=level, rule=rule, message="", numbers=numbers)


WITNESSES = {level: witness(level) for level in ("fp32", "bf16")}


def without(baseline: Baseline, level: str) -> Baseline:
    return baseline.model_copy(update={"levels": {k: v for k, v in baseline.levels.items() if k != level}})


def test_the_new_level_is_taken_and_the_rest_stays() -> None:
    """In the project's order, what it does not know last; from the new run neither times nor image."""
    whole = sample_baseline()
    levels = {"gone": whole.levels["fp32"], "compile": whole.levels["compile"], "fp32": whole.levels["fp32"]}
    old = whole.model_copy(update={"levels": levels})
    new = sample_baseline(sample_run({"fp32": 1.01, "bf16": 3.0, "compile": 0.99}), reference_png=None)
    updated, lines = extend_baseline(old, new, ["bf16"], WITNESSES)
    assert list(updated.levels) == ["fp32", "bf16", "compile", "gone"]
    assert updated.levels["bf16"] == new.levels["bf16"]
    assert without(updated, "bf16") == old
    assert lines == ["bf16: added, 0.605408 s in 5 processes"]


def test_a_level_that_widens_others_is_told() -> None:
    """Its runs say how far the step errors of levels of its format may move, which is no number of theirs."""
    old = sample_baseline().model_copy(update={"slug": "h200-700w"})
    noisy = {"step_error": [0.02, 0.022], "fields": get_level("fused_qkv").fields()}
    levels = {**old.levels, "fused_qkv": old.levels["compile"].model_copy(update=noisy)}
    _, lines = extend_baseline(old, old.model_copy(update={"levels": levels}), ["fused_qkv"], WITNESSES)
    assert lines[1:] == ["step errors of compile: may move by 9.5%, by 5.0% before"]


def test_what_only_came_along_is_not_added() -> None:
    """A level of the new run that was not asked for stays out, whatever its time."""
    whole = sample_baseline()
    updated, _ = extend_baseline(without(without(whole, "compile"), "bf16"), whole, ["compile"], WITNESSES)
    assert set(updated.levels) == {"fp32", "compile"}


@pytest.mark.parametrize("field", ["slug", "workload_digest", "method", "source", "fidelity_method"])
def test_runs_that_do_not_compare_are_not_mixed(field: str) -> None:
    """As in an update."""
    value: Any = {} if field == "fidelity_method" else "published" if field == "source" else "other"
    old, new = without(sample_baseline(), "compile"), sample_baseline().model_copy(update={field: value})
    with pytest.raises(BaselineError, match=f"{field} is .* do not compare"):
        extend_baseline(old, new, ["compile"], WITNESSES)


def test_one_file_says_one_environment() -> None:
    """Whatever differs is named."""
    old = without(sample_baseline(), "compile")
    new = sample_baseline().model_copy(update={"environment": OTHER})
    with pytest.raises(BaselineError, match=r"\(torch 2\.13\.0 -> 2\.14\.0, driver None -> 600\.1\).*--record"):
        extend_baseline(old, new, ["compile"], WITNESSES)


@pytest.mark.parametrize(
    ("low", "high", "is_refused"),
    [(1.019, 1.1, False), (1.021, 1.1, True), (0.9, 0.981, False), (0.9, 0.979, True), (0.5, 2.0, False)],
)
def test_a_reference_whose_interval_is_beyond_its_limit_is_refused(low: float, high: float, is_refused: bool) -> None:
    """Slower or faster, whatever its outcome: the machine is not the one that the other seconds are of."""
    old, new = without(sample_baseline(), "compile"), sample_baseline()
    seen = {**WITNESSES, "bf16": witness("bf16", low, high)}
    if not is_refused:
        assert "compile" in extend_baseline(old, new, ["compile"], seen)[0].levels
        return
    said = (
        rf"as they were, bf16 x{(low + high) / 2:.4f} \(interval x{low:.4f} to x{high:.4f}, limit 2\.00%\), so .* again"
    )
    with pytest.raises(BaselineError, match=said):
        extend_baseline(old, new, ["compile"], seen)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({**WITNESSES, "bf16": witness("bf16", rule="confirmation")}, "bf16 .* and fresh processes did not agree"),
        ({"fp32": witness("fp32").model_copy(update={"numbers": {}})}, r"fp32 was not compared \(interval\)"),
        ({}, "no level of this run is in the baseline, .* --record-baseline`"),
    ],
    ids=["not settled", "no numbers", "none"],
)
def test_who_does_not_know_is_no_witness(seen: dict[str, Verdict], said: str) -> None:
    """A slow phase that passed, nothing to compare, nobody there."""
    with pytest.raises(BaselineError, match=said):
        extend_baseline(without(sample_baseline(), "compile"), sample_baseline(), ["compile"], seen)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPU's baseline of the time when it could not run the new level, and a `cpu`'s."""
    folder = tmp_path_factory.mktemp("recorded")
    for slug in (GPU, "cpu"):
        run = write_run(folder / slug, 5, HELD, slug=slug, unavailable={**UNAVAILABLE, NEW: "not here yet"})
        ran = run_suite(folder, "--replay", run, "--record-baseline")
        assert ran.status == 0, ran.text
    return folder


@pytest.fixture
def tmp(tmp_path: Path, recorded: Path) -> Path:
    """A folder with these baselines and a run of the new level and its references, five processes each."""
    shutil.copytree(recorded / "baselines", tmp_path / "baselines")
    narrow(tmp_path / "run")
    return tmp_path


def narrow(folder: Path, processes: int = 5, slug: str = GPU) -> Path:
    """What `--levels NEW` stores."""
    write_run(folder, processes, (*REFERENCES, NEW), slug=slug)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "levels": [NEW]}))
    return folder


def names(tmp: Path) -> list[str]:
    return sorted(path.name for path in (tmp / "baselines" / GPU).glob("*.json"))


def block(tmp: Path, name: str) -> dict[str, Any]:
    own: dict[str, Any] = json.loads((tmp / "baselines" / GPU / name).read_text())["fluxfast"]
    return own


@pytest.mark.parametrize("options", [ADDING, ("--update-baseline", "--benchmark-compare")], ids=["named", "compared"])
def test_a_level_is_added(tmp: Path, options: tuple[str, ...]) -> None:
    """Green, with the references judged; every byte of the others stays; the whole ladder is green against it."""
    ran = run_suite(tmp, "--replay", tmp / "run", *options)
    assert ran.status == 0, ran.text
    assert f"{NEW}: added, " in ran.text and " s in 5 processes" in ran.text
    assert len(ran.of("passed")) == 5 * len((*REFERENCES, NEW))
    assert ran.properties["test_latency[bf16]"]["rule"] == "interval"
    assert ran.properties[f"test_latency[{NEW}]"]["rule"] == "not_compared"
    assert names(tmp) == ["0001_tiny.json", "0002_tiny.json"]
    old, new = block(tmp, "0001_tiny.json"), block(tmp, "0002_tiny.json")
    assert list(new["levels"]) == list(LEVELS)
    added = new["levels"].pop(NEW)
    assert json.dumps(new) == json.dumps(old)
    assert len(added["processes"]) == len(added["fidelity"]["ssim"]) == len(added["fidelity"]["ssim_stored"]) == 5
    whole = run_suite(tmp, "--replay", write_run(tmp / "whole", slug=GPU), "--benchmark-compare")
    assert whole.status == 0, whole.text
    assert whole.properties[f"test_latency[{NEW}]"]["verdict"] == "pass"


def test_a_parent_that_is_not_named_is_not_added(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung over a rung that the baseline lacks too: the lower one is proven and left out."""
    child = "float8_rowwise"
    monkeypatch.setitem(SPEED_S, child, 0.2)
    monkeypatch.setitem(SPEED_S, "fused_quantize", 0.1)
    monkeypatch.setattr("suite_samples.LEVELS", (*LEVELS, child, "fused_quantize"))
    run = write_run(tmp / "child", 5, ("fp32", "bf16", child, "fused_quantize"), slug=GPU)
    ran = run_suite(tmp, "--replay", run, "--update-baseline", "--levels=fused_quantize")
    assert ran.status == 0, ran.text
    assert f"test_structure[{child}]" in ran.of("passed")
    assert list(block(tmp, "0002_tiny.json")["levels"]) == [*HELD, "fused_quantize"]


@pytest.mark.parametrize(
    ("test", "level"),
    [("structure", NEW), ("image", NEW), ("step_error", NEW), ("memory", "bf16"), ("latency", "channels_last")],
)
def test_what_is_red_is_not_added(tmp: Path, test: str, level: str) -> None:
    """Counts and absolute bounds of the new level, everything of a reference."""
    result, image = sample(level, 2), None
    if test == "structure":
        result = changed(level, 2, proofs=[Proof(field="quantization", what="Linears", observed=0, expected=350)])
    elif test == "memory":
        result = changed(level, 2, transformer_weight_bytes=1)
    elif test == "image":
        image = np.zeros_like(picture())
    put(tmp / "run", result, image)
    if test == "step_error":
        np.save(tmp / "run" / level / "2" / "step_output.npy", np.ones((1, 16, 16), np.float32))
    for process in range(5 if test == "latency" else 0):
        put(tmp / "run", sample(level, process, 1.3))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING, "--benchmark-compare")
    assert ran.status == 1
    assert ran.of("failure") == {f"test_{test}[{level}]"}
    assert "no baseline was written: the run is not green" in ran.text
    assert names(tmp) == ["0001_tiny.json"]


def test_a_faster_reference_is_refused(tmp: Path) -> None:
    """Green as a test, and no witness that the machine is as it was."""
    for process in range(5):
        put(tmp / "run", sample("bf16", process, 0.9))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 1
    assert not ran.of("failure")
    assert "are not as they were, bf16 x0.9000 (interval x" in ran.text
    assert names(tmp) == ["0001_tiny.json"]


def replace_baseline(tmp: Path, levels: dict[str, Any], **change: Any) -> None:
    """The newest baseline of the GPU gets other levels."""
    folder = tmp / "baselines" / GPU
    old = read_baseline(max(folder.glob("*.json"))).model_copy(update={"levels": levels, **change})
    write_baseline(folder, "tiny", old, stock_json(old), {})


def held(tmp: Path) -> dict[str, Any]:
    return dict(read_baseline(max((tmp / "baselines" / GPU).glob("*.json"))).levels)


def test_a_slow_phase_that_was_not_confirmed_is_refused(tmp: Path) -> None:
    """Ten fresh processes came after it, and the new level was measured in it."""
    for process in range(5):
        put(tmp / "run", sample("bf16", process, 1.3))
        put(tmp / "run", sample(NEW, process, 1.3))
    for process in range(10):
        for level in ("fp32", "bf16"):
            put(tmp / "run" / "confirm" / "bf16", sample(level, process))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 1 and not ran.of("failure"), ran.text
    assert ran.properties["test_latency[bf16]"]["rule"] == "confirmation"
    assert "are not as they were, bf16 x1.3000 (interval x" in ran.text
    assert names(tmp) == ["0001_tiny.json"]


def test_a_slower_reference_that_overlaps_the_slowest_process_is_refused(tmp: Path) -> None:
    """The gate lets a level be as slow as the slowest process ever seen; a witness has to be as it was."""
    levels = held(tmp)
    *most, last = levels["bf16"].processes
    slow = last.model_copy(update={"samples_s": [1.2 * seconds for seconds in last.samples_s]})
    replace_baseline(tmp, {**levels, "bf16": levels["bf16"].model_copy(update={"processes": [*most, slow]})})
    for process in range(5):
        put(tmp / "run", sample("bf16", process, 1.15))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.properties["test_latency[bf16]"]["verdict"] == "pass"
    assert ran.status == 1 and "are not as they were, bf16 x1.1" in ran.text
    assert names(tmp) == ["0001_tiny.json", "0002_tiny.json"]


def test_without_a_reference_in_the_baseline_nothing_is_added(tmp: Path) -> None:
    """Nobody could tell whether the machine is as it was; said before measuring."""
    levels = held(tmp)
    replace_baseline(tmp, {level: levels[level] for level in HELD if level not in REFERENCES})
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 4, ran.text
    assert "the baseline holds none of fp32, bf16, channels_last, float8, by which" in ran.text


def test_a_reference_within_its_noise_is_a_witness(tmp: Path) -> None:
    """What the gate cannot tell from noise has not moved, however tight its limit is."""
    for process, scale in enumerate((0.955, 1.04, 0.985, 0.985, 1.03)):
        put(tmp / "run", sample("bf16", process, scale))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 0, ran.text
    assert f"{NEW}: added" in ran.text


def test_another_environment_is_refused(tmp: Path) -> None:
    """One file says one."""
    for level in (*REFERENCES, NEW):
        for process in range(5):
            put(tmp / "run", changed(level, process, result={"environment": OTHER}))
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 1
    assert "no baseline was written: the environment is not the baseline's (torch 2.13.0 -> 2.14.0, driver" in ran.text


def test_a_package_that_no_held_level_used_may_come_with_an_added_one(tmp: Path) -> None:
    """A file from before quack was used takes levels that need it, and says its version from then on."""
    with_quack = ENVIRONMENT.model_copy(update={"quack": "0.6.5"})
    for level in (*REFERENCES, NEW):
        for process in range(5):
            put(tmp / "run", changed(level, process, result={"environment": with_quack}))
    advised = run_suite(tmp, "--replay", tmp / "run", f"--levels={NEW}", "--benchmark-compare")
    assert f"add it on a quiet machine with `pytest perf_tests --workload tiny --levels {NEW} --upd" in advised.text
    ran = run_suite(tmp, "--replay", tmp / "run", *ADDING)
    assert ran.status == 0, ran.text
    written = read_baseline(sorted((tmp / "baselines" / GPU).glob("*.json"))[-1])
    assert written.environment == with_quack and NEW in written.levels
    told = other_environment(written, with_quack.model_copy(update={"quack": "0.7.0"}))
    assert told is not None and "quack 0.6.5 -> 0.7.0" in told


def test_too_few_processes_are_refused(tmp: Path) -> None:
    """As of a whole baseline."""
    ran = run_suite(tmp, "--replay", narrow(tmp / "few", 4), *ADDING)
    assert ran.status == 1
    assert "expected at least 5 different ones" in ran.text
    assert names(tmp) == ["0001_tiny.json"]


@pytest.mark.parametrize(
    ("slug", "options", "said"),
    [
        ("cpu", ADDING, f"on 'cpu' a time is a ratio to 'bf16' of the same run, so {NEW} cannot be added"),
        (GPU, (*ADDING, "--reason=why"), f"adding {NEW} accepts nothing"),
        (GPU, ("--update-baseline", f"--levels=bf16,{NEW}"), f" --levels {NEW} --update-baseline`"),
        (GPU, ("--record-baseline", f"--levels={NEW}"), "a baseline holds the whole ladder"),
        ("h100-700w", ADDING, "there is no baseline of 'tiny', and --update-baseline changes what was recorded"),
    ],
    ids=["ratios", "reason", "one is held", "recording", "no baseline"],
)
def test_what_cannot_be_added_is_said_before_measuring(
    tmp: Path, slug: str, options: tuple[str, ...], said: str
) -> None:
    """One sentence, exit status 4."""
    run = write_run(tmp / "other", 5, (*REFERENCES, NEW), slug=slug)
    ran = run_suite(tmp, "--replay", run, *options)
    assert ran.status == 4, ran.text
    assert said in ran.text

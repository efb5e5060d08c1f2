"""Every command that a red message names, followed as the documented job runs it: then what was red passes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from suite_samples import LEVELS, Ran, changed, picture, put, run_suite, sample, step_output, write_run

from perf_tests.harness.faults import apply_image_fault, parse
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import Baseline, Proof
from perf_tests.harness.store import read_baseline, write_baseline

ADVICE = re.compile(r"`(?:pytest perf_tests --workload tiny )?(--(?:update|record)-baseline)( --reason)?`")
PROCESSES = 5
LATENCY, MEMORY, STRUCTURE = (f"perf_tests/test_{name}.py" for name in ("latency", "memory", "structure"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and the baseline that was recorded of it."""
    folder = tmp_path_factory.mktemp("recorded")
    options = ("--replay", write_run(folder / "run", PROCESSES), "--record-baseline")
    ran = run_suite(folder, *options)
    assert ran.status == 0, ran.text
    return folder


@pytest.fixture
def tmp(tmp_path: Path, recorded: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def baseline(tmp: Path) -> Baseline:
    return read_baseline(max((tmp / "baselines" / "cpu").glob("*.json")))


def replace_baseline(tmp: Path, **change: object) -> None:
    """The newest baseline becomes another."""
    old = baseline(tmp).model_copy(update=change)
    write_baseline(tmp / "baselines" / "cpu", "tiny", old, stock_json(old), {})


def judge(tmp: Path, *options: str, path: str = "perf_tests") -> Ran:
    return run_suite(tmp, "--replay", tmp / "run", "--benchmark-compare", *options, paths=(path,))


def advice(ran: Ran) -> dict[str, tuple[str, ...]]:
    """Red test -> the options that its message names."""
    found = {name: set(ADVICE.findall(ran.messages[name])) for name in ran.of("failure")}
    assert all(len(named) == 1 for named in found.values()), found
    return {
        name: (option, *(["--reason=it is meant"] if reason else [])) for name, ((option, reason),) in found.items()
    }


def follow(tmp: Path, red: dict[str, tuple[str, ...]], *options: str, path: str = "perf_tests") -> None:
    """Do what all red tests advise; nothing is red after it."""
    (advised,) = set(red.values())
    before = len(list((tmp / "baselines" / "cpu").glob("*.json")))
    ran = judge(tmp, *advised, path=path)
    assert ran.status == 0, ran.text
    assert len(list((tmp / "baselines" / "cpu").glob("*.json"))) == before + 1
    ran = judge(tmp, *options, path=path)
    assert ran.status == 0, ran.text


def test_what_differs_is_accepted_with_a_reason(tmp: Path) -> None:
    """An image, a step error, a peak, weights, facts and a confirmed time, each at a level of its own."""
    run = tmp / "run"
    other = [Proof(field="dtype", what="parameters", observed=9, expected=9)]
    for process in range(PROCESSES):
        put(run, changed("compile", process, proofs=other))
        put(run, changed("fused_qkv", process, peak_memory_bytes=700_000_000))
        put(run, changed("channels_last", process, transformer_weight_bytes=18_000_001))
        put(run, sample("float8", process), apply_image_fault(parse("colour-cast"), picture()))
        exact, own = step_output("fp32"), step_output("inductor_flags")
        np.save(run / "inductor_flags" / str(process) / "step_output.npy", exact + 2 * (own - exact))
        put(run, sample("aoti", process, 1.3))
    for process in range(10):
        for level in ("bf16", "inductor_flags", "aoti"):
            put(run / "confirm" / "aoti", sample(level, process, 1.3 if level == "aoti" else 1.0))
    red = advice(judge(tmp))
    assert set(red) == {
        "test_structure[compile]", "test_memory[fused_qkv]", "test_memory[channels_last]", "test_image[float8]",
        "test_step_error[inductor_flags]", "test_latency[aoti]",
    }  # fmt: skip
    assert set(red.values()) == {("--update-baseline", "--reason=it is meant")}
    follow(tmp, red)
    assert {step.level for step in baseline(tmp).steps} == set(LEVELS) - {"fp32", "bf16"}


def test_less_memory_is_updated(tmp: Path) -> None:
    """An improvement is red under --strict only, and needs no reason."""
    for process in range(PROCESSES):
        put(tmp / "run", changed("aoti", process, peak_memory_bytes=500_000_000))
    red = advice(judge(tmp, "--strict"))
    assert red == {"test_memory[aoti]": ("--update-baseline",)}
    follow(tmp, red, "--strict")


def test_what_the_baseline_lacks_is_recorded(tmp: Path) -> None:
    """A level, its image, a metric, and a level whose fields were others."""
    levels = dict(baseline(tmp).levels)
    del levels["aoti"]
    for level, change in (
        ("float8", {"fidelity": {}}),
        ("channels_last", {"fidelity": {"ssim": [1.0] * PROCESSES}}),
        ("fused_qkv", {"fields": {**levels["fused_qkv"].fields, "fused_projections": False}}),
    ):
        levels[level] = levels[level].model_copy(update=change)
    replace_baseline(tmp, levels=levels)
    red = advice(judge(tmp))
    lacking = {"test_image[float8]", "test_image[channels_last]"}
    tests = ("structure", "latency", "image", "step_error", "memory")
    assert set(red) == lacking | {f"test_{test}[{level}]" for test in tests for level in ("aoti", "fused_qkv")}
    assert set(red.values()) == {("--record-baseline",)}
    follow(tmp, red)


def test_a_baseline_without_the_divisor_is_recorded(tmp: Path) -> None:
    """On a CPU no time compares without bf16."""
    replace_baseline(tmp, levels={level: own for level, own in baseline(tmp).levels.items() if level != "bf16"})
    red = advice(judge(tmp))
    tests = ("structure", "image", "step_error", "memory")
    assert set(red) == {f"test_latency[{level}]" for level in LEVELS} | {f"test_{test}[bf16]" for test in tests}
    follow(tmp, red)


def test_a_damaged_baseline_is_removed_and_recorded(tmp: Path) -> None:
    """It is refused before anything is measured, by a recording too, as the message says."""
    (path,) = (tmp / "baselines" / "cpu").glob("*.json")
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole.replace(b"a cpu", b"b cpu"), b"{}"):
        path.write_bytes(damaged)
        refused = judge(tmp, "--record-baseline")
        assert refused.status == 4 and "restore the file" in refused.text and "or remove it and" in refused.text
    path.unlink()
    assert judge(tmp, "--record-baseline").status == 0
    assert judge(tmp, path=MEMORY).status == 0

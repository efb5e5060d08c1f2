"""The committed CPU baselines' image limits: what they catch, and what SSIM alone would have let through."""

import functools
from pathlib import Path

import pytest

from perf_tests.harness import faults, fidelity, gate, store
from perf_tests.harness.files import read_png
from perf_tests.harness.schema import Outcome

FOLDERS = sorted((Path(__file__).parents[1] / "baselines").glob("cpu-*"))


@functools.cache
def read(folder):
    """The newest baseline of the tiny workload, and its reference image."""
    baseline = store.read_baseline(store.find_baseline(folder, "tiny"))
    return baseline, read_png(folder / baseline.reference_image, baseline.reference_sha256)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def shipped(request):
    """A committed baseline and its reference image."""
    return read(request.param)


def judge(shipped, level, image):
    """The verdict on `image` as this level's, where the level drew the reference exactly before the fault."""
    baseline, reference = shipped
    own = baseline.levels[level]
    scores = fidelity.compare(image, reference).as_dict()
    values = {f"{name}{suffix}": value for suffix in ("", "_stored") for name, value in scores.items()}
    values = {name: value for name, value in values.items() if name in own.fidelity}
    return gate.judge_fidelity(level, values, fidelity.METHOD, baseline, gate.policy_for(baseline.slug))


LEVELS = ["compile", "fused_qkv", "channels_last", "float8", "inductor_flags", "aoti"]


@pytest.mark.parametrize("spec", ["colour-cast", "hole"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_cast_and_a_hole_are_red(shipped, level, spec):
    """A 6 % red cast and a 32-px grey hole are beyond the limits at every level."""
    _, reference = shipped
    verdict = judge(shipped, level, faults.apply_image_fault(faults.parse(spec), reference))
    assert verdict.outcome is Outcome.REGRESSED and verdict.rule == "limit"


def small_hole(image):
    """A 12-px grey square: SSIM's mean sees the fault's 32-px one in so small a picture."""
    holed = image.copy()
    holed[128:140, 128:140] = faults.GREY
    return holed


def colour_cast(image):
    """Red +6 %, blue -6 %."""
    return faults.apply_image_fault(faults.parse("colour-cast"), image)


@pytest.mark.parametrize("spoil", [colour_cast, small_hole])
@pytest.mark.parametrize("level", LEVELS)
def test_ssim_alone_would_let_through(shipped, level, spoil):
    """A 6 % red cast and a 12-px hole are red while SSIM's mean is within its limit: why there are four metrics."""
    _, reference = shipped
    verdict = judge(shipped, level, spoil(reference))
    assert verdict.outcome is Outcome.REGRESSED and verdict.rule == "limit"
    assert verdict.numbers["ssim"] > verdict.numbers["ssim_limit"]


@pytest.mark.parametrize("level", ["bf16", "compile", "float8", "aoti"])
def test_the_reference_itself_passes(shipped, level):
    """The stored image is within the limits of every level."""
    _, reference = shipped
    assert judge(shipped, level, reference).outcome is Outcome.PASS


def test_every_level_of_a_cpu_is_there(shipped):
    """The committed baseline holds at least five processes of every level that a CPU runs."""
    baseline, _ = shipped
    assert list(baseline.levels) == [
        "fp32", "bf16", "compile", "fused_qkv", "channels_last", "float8", "inductor_flags", "aoti"
    ]  # fmt: skip
    assert min(len(level.processes) for level in baseline.levels.values()) >= 5

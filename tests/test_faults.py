"""Faults on demand: parsing, and the effects that need no model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from perf_tests.harness import faults, runner
from perf_tests.harness.sanity import NonFinite


@pytest.mark.parametrize("spec", ["oom", "hang", "segv", "nan-image", "wrong-seed", "colour-cast", "hole"])
def test_plain_faults(spec: str) -> None:
    """A fault without a parameter is its own name."""
    assert faults.parse(spec) == faults.Fault(spec=spec, kind=spec)  # type: ignore[arg-type]


def test_faults_with_a_parameter() -> None:
    """Per cent and field are read."""
    assert faults.parse("latency=+2.5%").percent == 2.5
    assert faults.parse("unapplied:quantization").field == "quantization"


@pytest.mark.parametrize(
    "spec", ["", "latency", "latency=5%", "latency=-5%", "latency=+5", "latency=+nan%", "unapplied", "Hole"]
)
def test_unknown_fault(spec: str) -> None:
    """Anything else is refused with the list of known faults."""
    with pytest.raises(ValueError, match=r"latency=\+N%, oom, hang, segv, .*unapplied:<field>"):
        faults.parse(spec)


def test_useless_faults() -> None:
    """A fault without an effect is refused, or it would prove nothing."""
    with pytest.raises(ValueError, match="changes nothing"):
        faults.parse("latency=+0%")
    with pytest.raises(ValueError, match="known fields: dtype, compile_mode"):
        faults.parse("unapplied:fused")


def test_image_faults() -> None:
    """A cast changes red and blue by 6 %, a hole 32 px of 256, and other faults nothing."""
    image = np.full((256, 256, 3), 100, dtype=np.uint8)
    image[0, 0] = 255
    cast = faults.apply_image_fault(faults.parse("colour-cast"), image)
    assert cast[5, 5].tolist() == [106, 100, 94] and cast[0, 0].tolist() == [255, 255, 240]
    holed = faults.apply_image_fault(faults.parse("hole"), image)
    assert int((holed != image).any(axis=2).sum()) == 32 * 32
    assert (image[5, 5] == 100).all() and image[130, 130, 0] == 100
    assert faults.apply_image_fault(faults.parse("oom"), image) is image
    assert faults.apply_image_fault(None, image) is image


def test_nan_image() -> None:
    """A NaN is put into the float image and found there."""
    decoded = np.zeros((64, 64, 3), dtype=np.float32)
    faults.require_finite(faults.apply_float_fault(None, decoded), "the image")
    with pytest.raises(NonFinite, match="the image has 192 of 12288 values that are NaN"):
        faults.require_finite(faults.apply_float_fault(faults.parse("nan-image"), decoded), "the image")


def test_oom() -> None:
    """The host refuses an absurd request without being disturbed."""
    with pytest.raises(MemoryError):
        faults.exhaust_memory()


def test_stretch() -> None:
    """20 % of 0.5 s is a tenth of a second of work; 20 times it would be ten."""
    started = time.perf_counter()
    faults.stretch(0.5, 20)
    assert 0.1 <= time.perf_counter() - started < 5


def test_segv() -> None:
    """The process dies of the signal and its stack is on stderr."""
    program = "from perf_tests.harness import faults; faults.segv()"
    ended = subprocess.run([sys.executable, "-c", program], cwd=runner.ROOT, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGSEGV and b"Segmentation fault" in ended.stderr

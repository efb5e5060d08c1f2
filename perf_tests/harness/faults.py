"""Faults on demand: what the suite must notice, made to order. No torch.

A fault reaches a worker only as the runner's `inject` argument and is recorded in `Result.injection`. Here are the
parser and the effects that need no model; the worker applies the others (`wrong-seed`, `unapplied:<field>`, and `oom`
and `latency` on a GPU).
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import re
import signal
import time
from typing import Any, Final, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from fluxfast.levels import FIELDS
from perf_tests.harness.sanity import NonFinite

FaultKind = Literal["latency", "oom", "hang", "segv", "nan-image", "wrong-seed", "colour-cast", "hole", "unapplied"]
KNOWN: Final = ("latency=+N%", *get_args(FaultKind)[1:-1], "unapplied:<field>")
COLOUR_CAST: Final = (1.06, 1.0, 0.94)
"""Factors of red, green, blue. SSIM alone scores this 0.998."""
HOLE_SHARE: Final = 8
"""The hole's side is the image's height over this: 32 px of 256. SSIM alone scores it 0.992."""
GREY: Final = 128
WRONG_SEED_OFFSET: Final = 1
"""Added to the workload's seed by `wrong-seed`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A parsed `--inject`.

    Attributes:
        spec: as written; goes into `Result.injection` unchanged.
        percent: of `latency`: how much longer each timed call takes; 0 for the others.
        field: of `unapplied`: the optimisation field that is silently left out; None for the others.
    """

    spec: str
    kind: FaultKind
    percent: float = 0.0
    field: str | None = None


def parse(spec: str) -> Fault:
    """The fault that `spec` names.

    Raises:
        ValueError: naming the known faults, or for `unapplied:` the known fields.
    """
    if match := re.fullmatch(r"latency=\+(\d+(?:\.\d+)?)%", spec):
        percent = float(match[1])
        if percent == 0:
            raise ValueError(f"fault {spec!r} changes nothing; give more than 0 %")
        return Fault(spec=spec, kind="latency", percent=percent)
    if spec.startswith("unapplied:"):
        field = spec.removeprefix("unapplied:")
        if field not in FIELDS:
            raise ValueError(f"fault {spec!r}: unknown field {field!r}; known fields: {', '.join(FIELDS)}")
        return Fault(spec=spec, kind="unapplied", field=field)
    for kind in get_args(FaultKind):
        if spec == kind and spec in KNOWN:
            return Fault(spec=spec, kind=kind)
    raise ValueError(f"unknown fault {spec!r}; known faults: {', '.join(KNOWN)}")


def apply_image_fault(fault: Fault | None, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`image` (height x width x 3) with `colour-cast` or `hole` in a copy; any other fault returns it as it is."""
    if fault is None or fault.kind not in ("colour-cast", "hole"):
        return image
    if fault.kind == "colour-cast":
        cast = image.astype(np.float32) * np.asarray(COLOUR_CAST, dtype=np.float32)
        return np.rint(cast).clip(0, 255).astype(np.uint8)
    holed = image.copy()
    holed[_hole(image)] = GREY
    return holed


def apply_float_fault(fault: Fault | None, decoded: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The decoded float image (height x width x 3) with a NaN square in a copy for `nan-image`, else as it is.

    Conversion to uint8 turns a NaN into some number without a word, so `require_finite` must look before it.
    """
    if fault is None or fault.kind != "nan-image":
        return decoded
    poisoned = decoded.copy()
    poisoned[_hole(decoded)] = np.nan
    return poisoned


def require_finite(decoded: npt.NDArray[Any], what: str) -> None:
    """Raise unless every value of `decoded` is a finite number.

    Raises:
        NonFinite: saying how many are not.
    """
    bad = decoded.size - int(np.isfinite(decoded).sum())
    if bad:
        raise NonFinite(f"{what} has {bad} of {decoded.size} values that are NaN or infinite, expected none")


def _hole(image: npt.NDArray[Any]) -> tuple[slice, slice]:
    """A square below and right of the centre: inside one 64-px tile at 256 px, so the worst tile sees it whole."""
    height, width = image.shape[:2]
    side = height // HOLE_SHARE
    return slice(height // 2, height // 2 + side), slice(width // 2, width // 2 + side)


def hang_forever() -> NoReturn:
    """Sleep in C with the GIL held: no Python thread and no Python signal handler of this process runs again."""
    libc = ctypes.PyDLL(None)
    while True:
        libc.pause()


def segv() -> NoReturn:
    """Die of SIGSEGV on this thread, with the stacks on stderr."""
    if not faulthandler.is_enabled():
        faulthandler.enable()
    signal.raise_signal(signal.SIGSEGV)
    raise AssertionError("SIGSEGV did not end this process")


def exhaust_memory() -> NoReturn:
    """Fail to get 4 EiB from the host; nothing else is disturbed.

    Raises:
        MemoryError: always.
    """
    bytearray(1 << 62)
    raise AssertionError("the host gave 4 EiB")


def stretch(seconds: float, percent: float) -> None:
    """Keep this thread busy for `percent` of `seconds`: after work of `seconds`, what `latency=+N%` means on a CPU."""
    end = time.perf_counter() + seconds * percent / 100
    while time.perf_counter() < end:
        pass

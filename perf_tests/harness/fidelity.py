"""How far an image is from its reference, by several metrics, because each is blind to something. No torch.

SSIM's mean hardly sees a colour cast, FLIP's mean hardly sees a hole; the worst tile of both sees what is local.
`METHOD` is stored with a baseline: numbers of two methods do not compare.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import flip_evaluator
import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

TILE = 64
STRIDE = 32
"""Tiles overlap by half, so that a defect of up to 32 px always lies whole within one and is never spread over four."""

VIEWING = [0.7, 3840.0, 0.7]
"""FLIP's default: 0.7 m from a display of 3840 px on 0.7 m, 67 pixels a degree."""

# Of the libraries the tested versions are named; that another version gives the same numbers is held by
# tests/test_fidelity_metrics.py, which pins values, not by refusing it.
_SSIM = {
    "library": "scikit-image",
    "tested_version": "0.26.0",
    "variant": "gaussian (Wang et al. 2004), mean of R, G, B",
    "window": 11,
    "sigma": 1.5,
    "use_sample_covariance": False,
    "data_range": 1.0,
}
_FLIP = {
    "library": "flip-evaluator",
    "tested_version": "1.7",
    "variant": "LDR, sRGB input",
    "viewing": VIEWING,
}
_WORST = {"tile": TILE, "stride": STRIDE}
METHOD: dict[str, dict[str, Any]] = {
    "ssim": {**_SSIM, "better": "higher"},
    "ssim_worst_tile": {**_SSIM, **_WORST, "better": "higher"},
    "flip": {**_FLIP, "better": "lower"},
    "flip_worst_tile": {**_FLIP, **_WORST, "better": "lower"},
    "psnr_db": {"variant": "all channels, peak 1.0; null if identical; for information", "better": "higher"},
}
"""Metric -> variant and parameters; the keys are `Scores`' fields."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `compare` finds; `METHOD` tells how.

    Attributes:
        ssim, ssim_worst_tile: 1.0 for identical images; mean and lowest 64-px tile.
        flip, flip_worst_tile: perceived error, 0.0 for identical images; mean and highest 64-px tile.
        psnr_db: for information; None for identical images.
    """

    ssim: float
    ssim_worst_tile: float
    flip: float
    flip_worst_tile: float
    psnr_db: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Metric -> value."""
        return dataclasses.asdict(self)


def compare(image: Array, reference: Array) -> Scores:
    """Score an image against its reference.

    Args:
        image, reference: uint8, (height, width, 3), RGB, both sides at least 64.

    Raises:
        ValueError: one sentence on what is wrong with either.
    """
    a, b = _unit_range(image, reference)
    ssim, ssim_map = structural_similarity(
        b, a, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    flip_map, flip = _flip(a, b, magma=False)
    mean_square = float(np.mean((a - b) ** 2))
    return Scores(
        ssim=float(ssim),
        ssim_worst_tile=_worst_tile(ssim_map.mean(axis=2), min),
        flip=flip,
        flip_worst_tile=_worst_tile(flip_map[..., 0], max),
        psnr_db=None if mean_square == 0 else float(-10 * np.log10(mean_square)),
    )


def difference_map(image: Array, reference: Array) -> bytes:
    """FLIP's error map as PNG, in magma: black where nothing is seen, towards yellow where the error is large.

    Args, Raises:
        As `compare`.
    """
    error, _ = _flip(*_unit_range(image, reference), magma=True)
    file = io.BytesIO()
    Image.fromarray(np.round(np.clip(error, 0, 1) * 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def relative_l2(a: Array, b: Array) -> float:
    """`||a - b|| / ||b||` in float64, over all elements.

    Args:
        a: any real array.
        b: the reference, of the same shape.

    Raises:
        ValueError: shapes differ, an element is NaN or infinite, or the reference is all zero.
    """
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"shapes are {a.shape} and {b.shape}, expected two equal, not empty ones")
    for name, array in (("a", a), ("b", b)):
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"{name} is {array.dtype}, expected real numbers")
        _refuse_non_finite(array, name)
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(y))
    if norm == 0:
        raise ValueError("the reference b is zero everywhere, so a relative error has no meaning")
    return float(np.linalg.norm(x - y)) / norm


def _unit_range(image: Array, reference: Array) -> tuple[Array, Array]:
    """Both as float64 in [0, 1], checked: flip_evaluator ends the process on what it does not like."""
    for name, array in (("image", image), ("reference", reference)):
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is a {type(array).__name__}, expected a numpy array")
        _refuse_non_finite(array, name)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected uint8 (height, width, 3)")
        if min(array.shape[:2]) < TILE:
            raise ValueError(f"{name} is {array.shape[1]}x{array.shape[0]} px, expected at least {TILE}x{TILE}")
    if image.shape != reference.shape:
        raise ValueError(f"image is {image.shape}, reference is {reference.shape}: they must be of one size")
    return image.astype(np.float64) / 255, reference.astype(np.float64) / 255


def _refuse_non_finite(array: Array, name: str) -> None:
    if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        raise ValueError(f"{name} holds {nan} NaN and {infinite} infinite of {array.size} values, expected none")


def _flip(image: Array, reference: Array, *, magma: bool) -> tuple[Array, float]:
    error, mean, _ = flip_evaluator.evaluate(
        np.ascontiguousarray(reference, np.float32),
        np.ascontiguousarray(image, np.float32),
        "LDR",
        inputsRGB=True,
        applyMagma=magma,
        computeMeanError=True,
        parameters={"vc": VIEWING},
    )
    return error, float(mean)


def _worst_tile(error: Array, worst: Callable[..., float]) -> float:
    """`worst` of the means of the tiles of (height, width); the last row and column are aligned to the border."""
    tops, lefts = (sorted({*range(0, side - TILE + 1, STRIDE), side - TILE}) for side in error.shape)
    return float(worst(error[top : top + TILE, left : left + TILE].mean() for top in tops for left in lefts))

"""The metrics see what they are there for, and refuse what they cannot score."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from perf_tests.harness.fidelity import METHOD, Scores, compare, difference_map, relative_l2


def scene(side: int = 256) -> np.ndarray:
    """A shaded red disc and a blue square on a green checkered background, uint8 (side, side, 3)."""
    y, x = np.mgrid[0:side, 0:side] / side
    picture = np.stack([0.2 + 0 * x, 0.55 + 0.15 * ((x * 8 // 1 + y * 8 // 1) % 2), 0.25 + 0.1 * y], axis=2)
    disc = (x - 0.33) ** 2 + (y - 0.45) ** 2 < 0.04
    picture[disc] = np.stack([0.9 - 0.4 * y, 0.15 + 0 * y, 0.1 + 0.1 * x], axis=2)[disc]
    picture[int(0.6 * side) : int(0.8 * side), int(0.65 * side) : int(0.85 * side)] = (0.1, 0.2, 0.8)
    picture += np.random.default_rng(0).normal(0, 0.01, picture.shape)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def colour_cast(image: np.ndarray, amount: float) -> np.ndarray:
    """More red and less blue by `amount` of the full range."""
    shifted = image / 255 + np.array([amount, 0.0, -amount])
    return np.round(np.clip(shifted, 0, 1) * 255).astype(np.uint8)


def punch_hole(image: np.ndarray, side: int, top: int = 100, left: int = 70) -> np.ndarray:
    """A grey square; by default across the corners of four tiles of a 64-px grid, where it is hardest to see."""
    holed = image.copy()
    holed[top : top + side, left : left + side] = 128
    return holed


REFERENCE = scene()
MEAN_SSIM_LIMIT = 0.95
"""Where a limit on mean SSIM alone would stand: noise of 4/255, which no one sees, already scores 0.86 on a photo."""
NOISE = np.random.default_rng(1).integers(-1, 2, REFERENCE.shape)
ONE_LSB = np.clip(REFERENCE.astype(int) + NOISE, 0, 255).astype(np.uint8)


def test_identical_images_are_perfect() -> None:
    """An image scores 1, 1, 0, 0 against itself, and no decibels rather than infinitely many."""
    scores = compare(REFERENCE, REFERENCE)
    assert scores == Scores(ssim=1.0, ssim_worst_tile=1.0, flip=0.0, flip_worst_tile=0.0, psnr_db=None)
    assert list(scores.as_dict()) == list(METHOD)


def test_a_colour_cast_is_seen_by_flip_and_missed_by_ssim() -> None:
    """6 % of red keeps mean SSIM above its limit while mean FLIP is more than ten times that of rounding noise."""
    cast, noise = compare(colour_cast(REFERENCE, 0.06), REFERENCE), compare(ONE_LSB, REFERENCE)
    assert cast.ssim > MEAN_SSIM_LIMIT
    assert cast.ssim_worst_tile > 0.9
    assert cast.flip > 0.15 > 10 * noise.flip


@pytest.mark.parametrize(("top", "left"), [(112, 112), (100, 70), (0, 0), (224, 224), (48, 200)])
def test_a_hole_is_seen_by_the_tiles_and_missed_by_the_means(top: int, left: int) -> None:
    """A 32-px hole keeps both means harmless and moves both worst tiles, wherever it lies."""
    hole, noise = compare(punch_hole(REFERENCE, 32, top, left), REFERENCE), compare(ONE_LSB, REFERENCE)
    assert hole.ssim > 0.98 > MEAN_SSIM_LIMIT
    assert hole.flip < 0.02
    assert hole.ssim_worst_tile < 0.92 < 0.99 < noise.ssim_worst_tile
    assert hole.flip_worst_tile > 0.14 > 8 * noise.flip_worst_tile


def test_all_black_is_bad_by_every_metric() -> None:
    """A black image fails all of them."""
    black = compare(np.zeros_like(REFERENCE), REFERENCE)
    assert black.ssim < 0.3
    assert black.ssim_worst_tile < 0.1
    assert black.flip > 0.5
    assert black.flip_worst_tile > 0.6
    assert black.psnr_db is not None
    assert black.psnr_db < 10


def test_values_are_pinned() -> None:
    """A library version that computes something else is found here and not in a baseline."""
    scores = dataclasses.astuple(compare(colour_cast(REFERENCE, 0.06), REFERENCE))
    assert scores == pytest.approx((0.976428, 0.948118, 0.191767, 0.283199, 26.369891), abs=1e-4)


def test_ssim_is_the_variant_that_method_names() -> None:
    """The window that METHOD names is scikit-image's for that sigma: at its size it fits, below it does not."""
    image = np.zeros((METHOD["ssim"]["window"],) * 2)
    arguments = {"data_range": 1.0, "gaussian_weights": True, "sigma": METHOD["ssim"]["sigma"]}
    assert structural_similarity(image, image, **arguments) == 1.0
    with pytest.raises(ValueError, match="win_size exceeds"):
        structural_similarity(image[1:], image[1:], **arguments)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (REFERENCE[:, :-1], r"image is \(256, 255, 3\), reference is \(256, 256, 3\)"),
        (REFERENCE[:63], "image is 256x63 px, expected at least 64x64"),
        (REFERENCE[..., 0], r"uint8 \(256, 256\), expected uint8 \(height, width, 3\)"),
        (np.concatenate([REFERENCE, REFERENCE[..., :1]], axis=2), r"\(256, 256, 4\), expected"),
        (REFERENCE / 255, r"float64 \(256, 256, 3\), expected uint8"),
        (np.full(REFERENCE.shape, np.nan, np.float32), "image holds 196608 NaN and 0 infinite of 196608"),
        (np.full(REFERENCE.shape, "x"), "expected uint8"),
        ("image.png", "image is a str"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(image: np.ndarray, message: str) -> None:
    """Wrong size, type or NaN is a ValueError on one line, not an exit of the process, on either side."""
    with pytest.raises(ValueError, match=message) as raised:
        compare(image, REFERENCE)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"image|reference"):
        difference_map(REFERENCE, image)


def test_the_difference_map_shows_where() -> None:
    """The map is a PNG of the image's size, black outside a hole and bright inside."""
    with Image.open(io.BytesIO(difference_map(punch_hole(REFERENCE, 32), REFERENCE))) as opened:
        shown = np.asarray(opened)
    assert shown.shape == REFERENCE.shape
    assert shown[116, 86].sum() > 300
    assert shown[10:40, 200:].max() < 10


@pytest.mark.parametrize("odd_side", [64, 65, 100, 130])
def test_any_size_from_one_tile_up_is_scored(odd_side: int) -> None:
    """Sizes that tiles do not divide are covered to the border."""
    image = scene(odd_side)
    assert compare(punch_hole(image, 16, odd_side - 16, odd_side - 16), image).flip_worst_tile > 0.01


def test_relative_l2_is_the_ratio_of_norms() -> None:
    """Half of the reference is half off, whatever the float type."""
    b = np.arange(1, 7, dtype=np.float16).reshape(2, 3)
    assert relative_l2(b / 2, b) == 0.5
    assert relative_l2(b, b) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, np.nan], [1.0, 2.0], "a holds 1 NaN and 0 infinite of 2"),
        ([1.0, 2.0], [np.inf, 2.0], "b holds 0 NaN and 1 infinite of 2"),
        ([1.0], [1.0, 2.0], "shapes are"),
        ([], [], "shapes are"),
        ([1.0], [0.0], "zero everywhere"),
        ([1j], [1.0], "expected real numbers"),
    ],
)
def test_relative_l2_refuses_what_has_no_ratio(a: list[float], b: list[float], message: str) -> None:
    """NaN, infinity, other shapes and a zero reference are errors, not a number."""
    with pytest.raises(ValueError, match=message):
        relative_l2(np.array(a), np.array(b))

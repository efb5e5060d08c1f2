"""Images that FLUX.1-Kontext edits, drawn by the project: the same pixels everywhere, nothing to download.

Integer arithmetic only, so that no rounding differs between machines. A drawing never changes under its name:
`tests/test_kontext.py` holds its pixels, and another picture gets another name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]

UNIT = 1024
"""Drawings are described on a square of this side and stretched to the size that is asked for."""


def still_life_1(height: int, width: int) -> Picture:
    """A red ball and a green box on a wooden table before a light wall; (height, width, 3)."""
    y, x = (axis.astype(np.int64) for axis in np.mgrid[:height, :width])
    y, x = y * UNIT // height, x * UNIT // width
    scene = np.stack([225 - y // 16, 222 - y // 14, 210 - y // 12], axis=2)
    grain = (x // 7 + (y * y) // 4000) % 9
    table = y > 620
    scene[table] = np.stack([168 - grain * 3, 116 - grain * 3, 70 - grain * 2], axis=2)[table]
    scene[table & (25 * (x - 390) ** 2 + 400 * (y - 800) ** 2 < 25 * 240**2)] = (84, 56, 34)
    scene[(x > 610) & (x < 870) & (y > 430) & (y < 780)] = (58, 132, 74)
    scene[(x > 790) & (x < 870) & (y > 430) & (y < 780)] = (38, 96, 52)
    radius = (x - 360) ** 2 + (y - 600) ** 2
    towards_light = ((x - 290) ** 2 + (y - 520) ** 2) // 640
    ball = np.stack([235 - towards_light, 62 - towards_light // 3, 48 - towards_light // 3], axis=2)
    is_ball = radius < 200**2
    scene[is_ball] = ball[is_ball]
    return scene.clip(0, 255).astype(np.uint8)


INPUT_IMAGES: dict[str, Callable[[int, int], Picture]] = {"still_life_1": still_life_1}


@functools.cache
def draw(name: str, height: int, width: int) -> Image.Image:
    """The drawing called `name`, (height, width) RGB; made once a process, so that no timed call draws.

    Raises:
        ValueError: naming the known drawings.
    """
    if name not in INPUT_IMAGES:
        raise ValueError(f"unknown input image {name!r}; known input images: {', '.join(INPUT_IMAGES)}")
    return Image.fromarray(INPUT_IMAGES[name](height, width))

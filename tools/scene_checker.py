"""Finds the coloured shapes in a picture and compares them with the caption. Deterministic, NumPy only.

It looks at colours and positions and at nothing else: a square where a star should be passes. Backgrounds have little
saturation and shapes have much (scenes.py), so a pixel belongs to a shape when it is saturated, and its hue says which
colour of the eight is nearest.
"""

import colorsys
import re
from dataclasses import dataclass

import numpy as np
from scenes import CELLS_PX, COLOURS, IMAGE_PX, POSITIONS

MIN_SATURATION = 0.38  # the most saturated ground (slate) has 0.23, the palest shape (pink) 0.58
MIN_VALUE = 0.22
# The smallest shape, a small star, covers about 610 pixels, of which gloss hides some.
MIN_AREA_PX = 250
WINDOW_PX = 37  # half of a cell: windows of neighbours, 76 px apart, do not overlap
# The sum of JITTER_PX in both axes (6), the lowest centroid of a triangle (7) and 3 px of tolerance.
MAX_OFFSET_PX = 16.0

_THING = re.compile(rf"({'|'.join(COLOURS)}) \w+ at the ((?:top |bottom )?(?:left|right)|top|bottom|centre)")


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the caption asks for and what the picture holds, both {position: colour}."""

    wanted: dict
    found: dict

    @property
    def ok(self):
        """Every wanted colour at its place, and nothing anywhere else."""
        return self.wanted == self.found

    @property
    def hits(self):
        """How many of the wanted shapes have the right colour at the right place."""
        return sum(self.found.get(position) == colour for position, colour in self.wanted.items())


def wanted(caption):
    """{position: colour} that the caption names; ValueError for a sentence that is no caption of scenes.py."""
    things = {position: colour for colour, position in _THING.findall(caption)}
    if not things:
        raise ValueError(f"no '<colour> <shape> at the <position>' in {caption!r}")
    return things


def classify(image):
    """(H, W, 3) uint8 -> (H, W) index into COLOURS of each pixel, -1 where the ground is."""
    rgb = np.asarray(image, dtype=np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = np.maximum(value - low, 1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = (
        np.select(
            [value == red, value == green],
            [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
            (red - green) / chroma + 4,
        )
        / 6
    )
    known = np.array([colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0] for colour in COLOURS.values()])
    away = np.abs(hue[..., None] - known)
    nearest = np.minimum(away, 1 - away).argmin(-1)
    return np.where((chroma > MIN_SATURATION * value) & (value > MIN_VALUE), nearest, -1)


def find(image):
    """{position: colour} of the shapes in a (256, 256, 3) uint8 picture or PIL image."""
    labels = classify(image)
    if labels.shape != (IMAGE_PX, IMAGE_PX):
        raise ValueError(f"picture is {labels.shape}, expected {(IMAGE_PX, IMAGE_PX)} (scenes.IMAGE_PX)")
    found = {}
    for index, position in enumerate(POSITIONS):
        cell_x, cell_y = int(CELLS_PX[index % 3]), int(CELLS_PX[index // 3])
        window = labels[cell_y - WINDOW_PX : cell_y + WINDOW_PX, cell_x - WINDOW_PX : cell_x + WINDOW_PX]
        areas = np.bincount(window[window >= 0], minlength=len(COLOURS))
        colour = int(areas.argmax())
        if areas[colour] < MIN_AREA_PX:
            continue
        ys, xs = np.nonzero(window == colour)
        if np.hypot(xs.mean() - WINDOW_PX, ys.mean() - WINDOW_PX) <= MAX_OFFSET_PX:
            found[position] = tuple(COLOURS)[colour]
    return found


def check(image, caption):
    """Compares one picture with its caption."""
    return Check(wanted=wanted(caption), found=find(image))

"""Images of a run as small data URIs, and what they are compared with."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from perf_tests.harness import fidelity
from perf_tests.harness.files import Picture, StoreError, decode_png
from perf_tests.harness.policy import worst
from perf_tests.harness.replay import ReadOnlySession
from perf_tests.harness.session import REFERENCE_LEVEL

BUDGET_BYTES = 3 << 19
"""Of all images of a page together, as data URIs: half of a page of at most 3 MiB."""
SIDES_PX = (512, 384, 256, 128, 64)
"""Longest side that is tried, until the budget holds."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture as it is shown; `width` and `height` are of the data URI."""

    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One level's image beside what it is compared with.

    Attributes:
        file: the image that was judged.
        reference: what it is beside: "bf16 of this run" or "bf16 of the baseline"; None if there is nothing.
        image, other, difference: names of pictures; None where `problem` says why.
        scores: metric -> worst value of the processes.
        problem: why there is no image, or no comparison.
    """

    level: str
    file: Path | None = None
    reference: str | None = None
    image: str | None = None
    other: str | None = None
    difference: str | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    problem: str | None = None


def comparisons(session: ReadOnlySession) -> tuple[list[Comparison], dict[str, Shown]]:
    """One a level, and the pictures by name: a picture that several levels show is there once."""
    pictures: dict[str, Picture] = {}

    def name(picture: Picture) -> str:
        known = next((name for name, other in pictures.items() if other is picture), f"picture{len(pictures)}")
        pictures[known] = picture
        return known

    found = [_compare(session, level, name) for level in session.levels]
    for side in SIDES_PX:
        shown = {name: shrink(picture, side) for name, picture in pictures.items()}
        if sum(len(own.uri) for own in shown.values()) <= BUDGET_BYTES:
            break
    return found, shown


def _compare(session: ReadOnlySession, level: str, name: Callable[[Picture], str]) -> Comparison:
    if not all(result.measurement for result in session.results[level]):
        return Comparison(level=level, problem="not measured, so there is no image")
    try:
        if session.workload.has_random_weights:
            why = "the weights are random: this is noise, and no image is judged; use --workload tiny for that"
            return Comparison(level=level, file=session.image_path(level, 0), problem=why)
        stored, index = session.stored_reference(), session.worst_process(level)
        file, image = session.image_path(level, index), session.image(level, index)
        reference, other = _reference(session, level, stored)
        scores = worst(session.image_scores(level, stored))
    except StoreError as error:
        return Comparison(level=level, problem=str(error))
    if other is None:
        why = "there is nothing to compare it with"
        return Comparison(level=level, file=file, image=name(image), problem=why)
    difference = decode_png(fidelity.difference_map(image, other), file, StoreError)
    return Comparison(
        level=level, file=file, reference=reference, image=name(image), other=name(other), difference=name(difference),
        scores=scores,
    )  # fmt: skip


def _reference(session: ReadOnlySession, level: str, stored: Picture | None) -> tuple[str | None, Picture | None]:
    if level != REFERENCE_LEVEL and all(result.measurement for result in session.results[REFERENCE_LEVEL]):
        return f"{REFERENCE_LEVEL} of this run", session.image(REFERENCE_LEVEL, 0)
    return (None, None) if stored is None else (f"{REFERENCE_LEVEL} of the baseline", stored)


def shrink(picture: Picture, side: int) -> Shown:
    """The picture as WebP, its longest side at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return Shown("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), *image.size)

"""Numbers -> coordinates of the page's charts. The template draws them as SVG."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence

from perf_tests.harness.schema import AnnotatedStep
from perf_tests.history.changes import Change, trend
from perf_tests.history.store import Point

WIDTH, HEIGHT = 720, 150
LEFT, TOP, BOTTOM = 4, 8, 4
"""Room that dots and lines need at the borders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """Something at one night: a dot or a vertical line, and what it says."""

    x: float
    y: float = 0.0
    text: str
    kind: str
    """`step`, `change`, `regressed`, `improved`, `this`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trend:
    """One level over the nights.

    Attributes:
        line: SVG points of the nightly values.
        limits: SVG points of what each night's baseline allowed, upper and lower; in pieces where there was none.
        marks: annotated steps, changes, red nights, this run.
        low, high: of the axis.
        excluded: mark -> how many nights it kept out.
    """

    level: str
    unit: str
    nights: int
    first: str = ""
    last: str = ""
    newest: float | None = None
    low: float = 0.0
    high: float = 0.0
    line: str = ""
    limits: list[str] = dataclasses.field(default_factory=list)
    marks: list[Mark] = dataclasses.field(default_factory=list)
    changes: list[Change] = dataclasses.field(default_factory=list)
    creep: float | None = None
    excluded: dict[str, int] = dataclasses.field(default_factory=dict)


class _Axes:
    """Days since the first night, and logarithms of values: equal ratios are equal heights."""

    def __init__(self, days: Sequence[float], values: Sequence[float]) -> None:
        self.days = min(days), max(max(days), min(days) + 1)
        # A tight level still gets an axis of 2 %, so that its noise does not look like news.
        middle = math.sqrt(min(values) * max(values))
        self.low, self.high = min(*values, middle / 1.01), max(*values, middle * 1.01)

    def x(self, day: float) -> float:
        share = (day - self.days[0]) / (self.days[1] - self.days[0])
        return round(LEFT + min(max(share, 0), 1) * (WIDTH - 2 * LEFT), 1)

    def y(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def trend_chart(
    level: str,
    points: Sequence[Point],
    steps: Sequence[AnnotatedStep],
    found: Sequence[Change],
    creep: float | None,
    this: str,
) -> Trend:
    """The chart of one level.

    Args:
        points: of the level, oldest first, marked ones included.
        steps: of the level.
        found: its changes.
        this: name of the run that the report is about.
    """
    nights = trend(points)
    excluded: dict[str, int] = {}
    for point in points:
        if point.mark is not None:
            kind = point.mark.split(" ")[0].rstrip(":")
            excluded[kind] = excluded.get(kind, 0) + 1
    unit = points[-1].unit if points else "s"
    if not nights:
        return Trend(level=level, unit=unit, nights=0, excluded=excluded)
    days = [_day(night.date) for night in nights]
    values = [_value(night) for night in nights]
    bands = [_band(night) for night in nights]
    axes = _Axes(days, [*values, *(edge for band in bands if band for edge in band)])
    return Trend(
        level=level, unit=unit, nights=len(nights), first=nights[0].date[:10], last=nights[-1].date[:10],
        newest=values[-1], low=axes.low, high=axes.high,
        line=" ".join(f"{axes.x(day)},{axes.y(value)}" for day, value in zip(days, values, strict=True)),
        limits=_limits(axes, days, bands), marks=_marks(axes, nights, steps, found, this), changes=list(found),
        creep=creep, excluded=excluded,
    )  # fmt: skip


def _value(point: Point) -> float:
    assert point.value is not None
    return point.value


def _day(date: str) -> float:
    return datetime.datetime.fromisoformat(date).timestamp() / 86400


def _band(point: Point) -> tuple[float, float] | None:
    """Least and most that the night's baseline let pass, in the unit of the values."""
    if point.ratio is None or point.limit is None:
        return None
    expected = _value(point) / point.ratio
    return expected / (1 + point.limit), expected * (1 + point.limit)


def _limits(axes: _Axes, days: Sequence[float], bands: Sequence[tuple[float, float] | None]) -> list[str]:
    """Polylines of the upper and the lower limit; a night that repeats its neighbours' limits is left out."""
    lines = []
    for side in (0, 1):
        piece: list[tuple[float, float]] = []
        for day, band in zip([*days, 0.0], [*bands, None], strict=True):
            if band is not None:
                at = axes.x(day), axes.y(band[side])
                if len(piece) > 1 and piece[-1][1] == piece[-2][1] == at[1]:
                    piece.pop()
                piece.append(at)
            elif piece:
                lines.append(" ".join(f"{x},{y}" for x, y in piece))
                piece = []
    return lines


def _marks(
    axes: _Axes, nights: Sequence[Point], steps: Sequence[AnnotatedStep], found: Sequence[Change], this: str
) -> list[Mark]:
    marks = [
        Mark(
            x=axes.x(_day(step.date + "T00:00:00Z")),
            kind="step",
            text=f"{step.date} {_percent(step.ratio)}: {step.reason}",
        )
        for step in steps
    ]
    for change in found:
        if change.known is None:
            text = (
                f"{change.date} {_percent(change.ratio)}, not accepted; moved: {', '.join(change.moved) or 'nothing'}"
            )
            marks.append(Mark(x=axes.x(_day(change.date + "T00:00:00Z")), kind="change", text=text))
    for night in nights:
        said = [kind for kind in ("regressed", "improved") if f"test_latency={kind}" in night.outcomes]
        kind = "this" if night.run == this else said[0] if said else None
        if kind:
            words = ", ".join(["this run"] * (kind == "this") + said)
            text = f"{night.date[:10]} {words}: {_value(night):.4g} {night.unit}"
            marks.append(Mark(x=axes.x(_day(night.date)), y=axes.y(_value(night)), kind=kind, text=text))
    return marks


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"

"""Where a level's nights changed: a second, advisory detector for creep that no single night shows.

PELT on the logarithm of the nightly values, with ruptures (Killick et al. 2012; Truong et al. 2020), in units of the
night-to-night noise. It never turns a night red: the gate does, on evidence of one night.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perf_tests.harness.files import StoreError
from perf_tests.harness.quarantine import LONGEST
from perf_tests.harness.schema import AnnotatedStep
from perf_tests.history.store import Point

MIN_NIGHTS = 20
"""Fewer nights do not tell how far nights differ when nothing changed."""
MIN_SEGMENT = 5
"""A change lasts at least so many nights; a single odd night is the gate's to judge."""
ODD = 4.0
"""Standard deviations from the neighbours' median beyond which a night counts as odd."""
PENALTY = 6.0
"""Of one change, times log(nights), in variances. `python -m tools.simulate_changes` says how often it is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A level that moved.

    Attributes:
        date: of the first night after the change, ISO.
        run: that night.
        ratio: mean after over mean before, up to the neighbouring changes.
        moved: `name before -> after` of everything in the environment that differs between the two nights around it.
        known: the reason of the annotated step that explains it; None if no one has accepted it.
    """

    level: str
    date: str
    run: str
    ratio: float
    moved: list[str]
    known: str | None


def trend(points: Sequence[Point]) -> list[Point]:
    """The nights that are evidence of speed: measured, undisturbed, nothing injected, comparable."""
    return [point for point in points if point.mark is None and point.value is not None]


def find_changes(
    points: Sequence[Point], steps: Sequence[AnnotatedStep], documents: Mapping[str, Mapping[str, Any]]
) -> list[Change]:
    """Changes of one level, oldest first; [] while there are too few nights to tell.

    Args:
        points: of one level, machine, workload and method, oldest first; marked ones are left out here.
        steps: the baseline's; those of this level and of the level that divides it explain a change.
        documents: of the history, for what moved.

    Raises:
        StoreError: if ruptures is not installed.
    """
    nights = trend(points)
    if len(nights) < MIN_NIGHTS:
        return []
    logs = _without_odd_nights(np.log([night.value or math.nan for night in nights]))
    edges = _edges(logs)
    found = []
    for before, at, after in zip(edges, edges[1:], edges[2:], strict=False):
        ratio = math.exp(logs[at:after].mean() - logs[before:at].mean())
        moved = differences(*(documents.get(nights[i].environment or "", {}) for i in (at - 1, at)))
        found.append(
            Change(
                level=nights[at].level, date=nights[at].date[:10], run=nights[at].run, ratio=ratio, moved=moved,
                known=None,
            )
        )  # fmt: skip
    divisor = nights[-1].unit.removeprefix("of ")
    return _explain(found, [step for step in steps if step.level in (nights[-1].level, divisor)])


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`name before -> after` of every key whose value differs; "none" where there is no value."""
    return [
        f"{name} {_shown(before.get(name))} -> {_shown(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _edges(logs: np.ndarray[Any, Any]) -> list[int]:
    """0, the first index of every new segment, and the number of nights."""
    try:
        import ruptures
    except ImportError as error:
        raise StoreError("change points need ruptures, which is not installed: pip install ruptures") from error
    noise = _noise(logs)
    if noise == 0:
        return [0, len(logs)]
    search = ruptures.KernelCPD(kernel="linear", min_size=MIN_SEGMENT).fit((logs / noise).reshape(-1, 1))
    return [0, *search.predict(pen=PENALTY * math.log(len(logs)))]


def _noise(logs: np.ndarray[Any, Any]) -> float:
    """Standard deviation of a night, from differences of neighbours: neither steps nor creep enter much.

    1.4826: of the median absolute deviation of a normal; sqrt(2): a difference holds two nights.
    """
    steps = np.diff(logs)
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2))


def _without_odd_nights(logs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Nights far from their neighbours' median are drawn to `ODD` standard deviations from it; steps stay."""
    window = 2 * MIN_SEGMENT - 1
    # "reflect" has the last night once: tonight alone, however odd, is not its own neighbourhood.
    padded = np.pad(logs, window // 2, mode="reflect")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
    allowed = ODD * _noise(logs)
    return np.clip(logs, middle - allowed, middle + allowed)


def _explain(changes: list[Change], steps: Sequence[AnnotatedStep]) -> list[Change]:
    """Each step explains one change: the nearest of its direction, seen up to `LONGEST` before it was accepted.

    A step is dated when it was accepted, which is after the night that first showed it.
    """
    explained = dict.fromkeys(range(len(changes)))
    for step in steps:
        accepted = datetime.date.fromisoformat(step.date)
        distances = {}
        for index, change in enumerate(changes):
            late = (accepted - datetime.date.fromisoformat(change.date)).days
            is_alike = (change.ratio > 1) == (step.ratio > 1) or step.level != change.level
            if explained[index] is None and is_alike and -MIN_SEGMENT <= late <= LONGEST.days:
                distances[index] = abs(late)
        if distances:
            explained[min(distances, key=distances.__getitem__)] = step.reason
    return [dataclasses.replace(change, known=explained[index]) for index, change in enumerate(changes)]


def creep(points: Sequence[Point], changes: Sequence[Change]) -> float | None:
    """How far the level moved since the last accepted change, by the changes no one accepted; None if there are none.

    Many small steps that the gate let pass one by one add up here.
    """
    last = max((index for index, change in enumerate(changes) if change.known is not None), default=-1)
    unknown = changes[last + 1 :]
    if not unknown:
        return None
    nights = trend(points)
    dates = [night.date[:10] for night in nights]
    start = bisect.bisect_left(dates, changes[last].date) if last >= 0 else 0
    first, after = bisect.bisect_left(dates, unknown[0].date), bisect.bisect_left(dates, unknown[-1].date)
    logs = _without_odd_nights(np.log([night.value or math.nan for night in nights]))
    return math.exp(float(logs[after:].mean() - logs[start:first].mean()))

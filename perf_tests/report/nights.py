"""The trends that a report draws, from the history."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fluxfast.levels import place_of
from perf_tests.harness.files import StoreError
from perf_tests.harness.schema import AnnotatedStep
from perf_tests.history import changes, store
from perf_tests.history.night import Night
from perf_tests.report.charts import Trend, trend_chart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nights:
    """One chart a level of the history, in ladder order; levels that the ladder no longer has come last."""

    trends: list[Trend]
    has_this: bool = False
    no_changes: str | None = None
    """Why no one looked for changes."""

    @property
    def changes(self) -> list[changes.Change]:
        """Every change that no one has accepted."""
        return [change for trend in self.trends for change in trend.changes if change.known is None]


def read_nights(history: Path, night: Night, steps: Sequence[AnnotatedStep]) -> Nights:
    """Every level of the machine, workload and method of `night`.

    Raises:
        StoreError: if the history cannot be read.
    """
    points = store.points(
        history,
        slug=night.slug,
        workload=night.workload,
        workload_digest=night.workload_digest,
        method=night.method,
    )
    documents = store.documents(history)
    by_level: dict[str, list[store.Point]] = {}
    for point in points:
        by_level.setdefault(point.level, []).append(point)
    trends, no_changes = [], None
    for level in sorted(by_level, key=lambda level: (place_of(level), level)):
        try:
            found = changes.find_changes(by_level[level], steps, documents)
        except StoreError as error:
            found, no_changes = [], str(error)
        own = [step for step in steps if step.level == level]
        creep = changes.creep(by_level[level], found)
        trends.append(trend_chart(level, by_level[level], own, found, creep, night.run))
    has_this = any(point.run == night.run for point in points)
    return Nights(trends=trends, has_this=has_this, no_changes=no_changes)

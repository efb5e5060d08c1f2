"""The suite's progress line with a bar and the time left in front. No torch."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from perf_tests.harness.progress import Deadlines, ProgressPrinter, Stage

BAR_WIDTH = 12


class BarPrinter(ProgressPrinter):
    """A `ProgressPrinter` that estimates the time left from the workers that have finished.

    Args:
        jobs: (level, process index) in the order in which they will run.
        known_s: level -> what its workers took in an earlier part of the run, seconds.
        clock: seconds.
    """

    def __init__(
        self,
        deadlines: Deadlines,
        jobs: Sequence[tuple[str, int]],
        known_s: Mapping[str, Sequence[float]],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(deadlines, len(jobs), stream)
        self._jobs = list(jobs)
        self._took_s: defaultdict[str, list[float]] = defaultdict(list, {k: list(v) for k, v in known_s.items()})
        self._clock = clock
        self._current: tuple[str, int] | None = None
        self._since_s = 0.0

    def __call__(self, level: str, process: int, stage: Stage, detail: str, elapsed_s: float) -> None:
        """As `ProgressPrinter`; a new worker means that the one before has finished."""
        if (level, process) != self._current:
            now_s = self._clock()
            if self._current is not None:
                self._took_s[self._current[0]].append(now_s - self._since_s)
            self._current, self._since_s = (level, process), now_s
        super().__call__(level, process, stage, detail, elapsed_s)

    def _line(self, level: str, process: int, stage: Stage, detail: str, elapsed_s: float) -> str:
        finished = self._jobs.index((level, process))
        full = BAR_WIDTH * finished // len(self._jobs)
        bar = "#" * full + "." * (BAR_WIDTH - full)
        return f"{bar} {self._time_left(finished)} {super()._line(level, process, stage, detail, elapsed_s)}"

    def _time_left(self, finished: int) -> str:
        """A level's own workers say how long its next one takes, those of the others if it has none yet."""
        every = [seconds for own in self._took_s.values() for seconds in own]
        if not every:
            return "time left: known after the first worker"
        expected = [statistics.mean(self._took_s.get(level) or every) for level, _ in self._jobs[finished:]]
        current_s, rest_s = expected[0] - (self._clock() - self._since_s), sum(expected[1:])
        if current_s > 0:
            return f"about {readable(current_s + rest_s)} left"
        return (
            f"slower than those before; then {readable(rest_s)}" if rest_s else "last worker, slower than those before"
        )


def readable(seconds: float) -> str:
    """A duration in the unit in which one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

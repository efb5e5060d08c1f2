"""Median and interval of a level. Processes decide where there are several, rounds where there is one.

Several processes: the gate's statistics (`harness/noise.py`). One number a process, the log of the median of its
rounds; Student's interval about their mean, its spread drawn towards that of the other levels. One process: the order
statistics of its rounds, which hold for any distribution. They say nothing of how processes differ, which on a GPU is
more than rounds do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from perf_tests.harness import noise
from perf_tests.harness.noise import Array
from perf_tests.harness.policy import Policy

CONFIDENCE = 0.95
PROCESSES = "processes: Student, log medians"
ROUNDS = "rounds: order statistics"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a level's median lies, seconds.

    Attributes:
        confidence: that the interval covers; of an interval of few rounds it can be below `CONFIDENCE`.
        interval_of: `PROCESSES` or `ROUNDS`.
    """

    low_s: float
    high_s: float
    confidence: float
    interval_of: str


def median(samples: Sequence[Sequence[float]]) -> float:
    """Geometric mean of the medians of each process's rounds, seconds."""
    return float(np.exp(_log_medians(samples).mean()))


def interval(level: str, run: Mapping[str, Sequence[Sequence[float]]], policy: Policy) -> Interval | None:
    """The interval of `level`'s median.

    Args:
        run: level -> for each process its rounds, seconds; other levels lend their spread between processes.

    Returns:
        None for a single round in a single process.
    """
    own = run[level]
    return of_rounds(own[0]) if len(own) == 1 else _of_processes(level, run, policy)


def of_rounds(samples: Sequence[float]) -> Interval | None:
    """The narrowest pair of order statistics that covers the median with `CONFIDENCE`, else the widest pair."""
    ordered, count = sorted(samples), len(samples)
    if count < 2:
        return None
    # bdtr(k, n, 1/2): so many of n rounds, or fewer, lie below the median.
    covers = [1 - 2 * float(special.bdtr(rank, count, 0.5)) for rank in range(count // 2)]
    rank = max((rank for rank, share in enumerate(covers) if share >= CONFIDENCE), default=0)
    return Interval(low_s=ordered[rank], high_s=ordered[-1 - rank], confidence=covers[rank], interval_of=ROUNDS)


def _of_processes(level: str, run: Mapping[str, Sequence[Sequence[float]]], policy: Policy) -> Interval:
    logs = _log_medians(run[level])
    others = [noise.squares(_log_medians(samples)) for other, samples in run.items() if other != level]
    spread = noise.spread(noise.squares(logs), others, policy)
    half = float(noise.quantile(spread.df, (1 - CONFIDENCE) / 2) * spread.sd / np.sqrt(len(logs)))
    low_s, high_s = np.exp([logs.mean() - half, logs.mean() + half])
    return Interval(low_s=float(low_s), high_s=float(high_s), confidence=CONFIDENCE, interval_of=PROCESSES)


def _log_medians(samples: Sequence[Sequence[float]]) -> Array:
    return np.log([float(np.median(rounds)) for rounds in samples])

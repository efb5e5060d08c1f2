"""The statistics of the latency gate: numpy arrays in, numbers out. Pure.

Every function takes leading batch dimensions, so that `tools/simulate_gate.py` decides thousands of nights with the
very code that decides one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from perf_tests.harness.policy import Policy

Array = npt.NDArray[np.float64]

POWER = 0.9
"""A change is visible if at least this share of nights finds it, confirmation included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Between-process standard deviation of a log latency (or log ratio) and the degrees of freedom behind it."""

    sd: Any
    df: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tonight against the baseline, in log ratios: positive is slower."""

    ratio: Any
    low: Any
    high: Any
    limit: Any
    above: Any
    """Every process of tonight is slower than every process of the baseline."""
    below: Any

    @property
    def slower(self) -> Any:
        """The whole interval is beyond the limit and no process overlaps with the baseline."""
        return (self.low > self.limit) & self.above

    @property
    def faster(self) -> Any:
        """The mirror image of slower."""
        return (self.high < -self.limit) & self.below


def squares(logs: Array) -> tuple[Any, int]:
    """Sum of squared deviations from the mean along the last axis, and its degrees of freedom."""
    return np.square(logs - logs.mean(axis=-1, keepdims=True)).sum(axis=-1), logs.shape[-1] - 1


def spread(own: tuple[Any, float], others: tuple[Any, float], policy: Policy) -> Spread:
    """A level's spread from its own processes, drawn towards that of the other levels.

    A few processes say little about their own spread: five that saw one of two modes look tight. The other levels
    weigh up to `pool_df` degrees of freedom, and `prior_sd` stands in where there are none.
    """
    others_df = policy.prior_df + others[1]
    others_var = (policy.prior_df * policy.prior_sd**2 + others[0]) / others_df
    weight = np.minimum(policy.pool_df, others_df)
    df = weight + own[1]
    return Spread(sd=np.sqrt((weight * others_var + own[0]) / df), df=df)


def quantile(df: Any, alpha: float) -> Any:
    """The upper `alpha` point of Student's t."""
    return special.stdtrit(df, 1 - alpha)


def error(base: int, tonight: int, spread: Spread) -> Any:
    """Standard error of the difference between the means of so many processes."""
    return spread.sd * np.sqrt(1 / tonight + 1 / base)


def limit(nights: Array, standard_error: Any, policy: Policy) -> Any:
    """The log ratio up to which this level moves when nothing changed: three standard deviations of its nights.

    A night's own process noise is taken out; the interval accounts for it. The floor counts as `night_weight` nights.
    The cap keeps a slow drift, accepted night by night, from widening the limit for ever.
    """
    count = nights.shape[-1]
    moved = np.maximum(0, np.square(nights).sum(axis=-1) - count * np.square(standard_error))
    total = policy.night_weight * (policy.floor / 3) ** 2 + moved
    return np.clip(3 * np.sqrt(total / (policy.night_weight + count)), policy.floor, policy.cap)


def compare(base: Array, tonight: Array, noise: Spread, limit: Any, policy: Policy) -> Comparison:
    """The mean log ratio, its Student interval, and whether the two groups of processes are apart.

    The interval alone false-alarms when a baseline happened to see one of two modes; that no process of tonight may
    overlap with the baseline holds for any distribution.
    """
    ratio = tonight.mean(axis=-1) - base.mean(axis=-1)
    half = quantile(noise.df, policy.alpha) * error(base.shape[-1], tonight.shape[-1], noise)
    return Comparison(
        ratio=ratio,
        low=ratio - half,
        high=ratio + half,
        limit=limit,
        above=tonight.min(axis=-1) > base.max(axis=-1),
        below=tonight.max(axis=-1) < base.min(axis=-1),
    )


def visible(base: Array, processes: int, noise: Spread, limit: Any, policy: Policy) -> Any:
    """The smallest log ratio found in at least `POWER` of nights, if processes spread as `noise` says.

    The larger of what the interval needs (first run, the smaller sample) and of what it takes for all processes of run
    and confirmation to clear the slowest of the baseline.
    """
    miss = (1 - POWER) / 2
    interval = limit + (quantile(noise.df, policy.alpha) + quantile(noise.df, miss)) * error(
        base.shape[-1], processes, noise
    )
    drawn = processes + policy.confirmation_processes
    lowest = -special.ndtri(1 - (1 - miss) ** (1 / drawn)) * noise.sd
    return np.maximum(interval, base.max(axis=-1) - base.mean(axis=-1) + lowest)

"""The statistics of the latency gate: numpy arrays in, numbers out. Pure.

Every function takes leading batch dimensions, so that `tools/simulate_gate.py` decides thousands of nights with the
very code that decides one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from perf_tests.harness.policy import Policy

Array = npt.NDArray[np.float64]
Squares = tuple[Any, int]
"""Sum of squared deviations from their means, and its degrees of freedom."""

POWER = 0.9
"""A change is visible if at least this share of nights finds it, confirmation included."""
FEW = 3
"""Fewer levels than this cannot say how alike they are."""
REACH = 2.5
"""A level's variance lies off the others' by so many standard deviations at most, theirs or those of mere chance."""


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


def squares(logs: Array) -> Squares:
    """Sum of squared deviations from the mean along the last axis, and its degrees of freedom."""
    return np.square(logs - logs.mean(axis=-1, keepdims=True)).sum(axis=-1), logs.shape[-1] - 1


def spread(own: Squares, others: Sequence[Squares], policy: Policy) -> Spread:
    """A level's spread from its own processes, drawn towards that of the other levels.

    A few processes say little about their own spread: five that saw one of two modes look tight. The other levels weigh
    as many degrees of freedom as they are alike, from `prior_df` to `pool_df`; fewer than `FEW` are pooled with the
    prior, which stands in where there are none. Of nights, `df` may be one a night.
    """
    shown = [(total, df) for total, df in others if df]
    variance, weight = _usual(shown, policy) if len(shown) >= FEW else _pooled(shown, policy)
    df = weight + own[1]
    return Spread(sd=np.sqrt((weight * variance + own[0]) / df), df=df)


def _pooled(others: Sequence[Squares], policy: Policy) -> tuple[Any, Any]:
    """One variance for all, of which the prior is `prior_df` observations, and what it weighs."""
    df = policy.prior_df + sum(df for _, df in others)
    variance = (policy.prior_df * policy.prior_sd**2 + sum(total for total, _ in others)) / df
    return variance, min(policy.pool_df, df)


def _usual(others: Sequence[Squares], policy: Policy) -> tuple[Any, Any]:
    """The variance that levels have, at least half of the prior, and the degrees of freedom by how little they differ.

    Moderated variances (Smyth 2004, doi:10.2202/1544-6115.1027): a level's variance is taken for a draw from a scaled
    inverse chi-squared distribution, whose two parameters follow from mean and variance of the logarithms. Levels far
    off are drawn in first, as by Phipson et al. (2016, doi:10.1214/16-AOAS920), who also draw these levels less to the
    others; here what they are judged with is drawn like any other's.
    """
    least = policy.prior_sd**2 / 2
    freedom = np.array([float(df) for _, df in others])
    variances = np.stack([total / df for total, df in others], axis=-1)
    # Equal clocks give a variance of zero. The floor itself comes last: at it levels differ less than by chance.
    logs = np.log(np.maximum(variances, 1e-4 * least)) - _mean_log(freedom)
    by_chance = special.polygamma(1, freedom / 2).mean()
    middle = np.median(logs, axis=-1, keepdims=True)
    deviation = 1.4826 * np.median(np.abs(logs - middle), axis=-1, keepdims=True)
    reach = REACH * np.maximum(deviation, np.sqrt(by_chance))
    logs = np.clip(logs, middle - reach, middle + reach)
    alike = np.maximum(policy.prior_df, _freedom_of(logs.var(axis=-1, ddof=1) - by_chance))
    variance = np.maximum(np.exp(logs.mean(axis=-1) + _mean_log(alike)), least)
    return variance, np.minimum(alike, policy.pool_df)


def _mean_log(df: Any) -> Any:
    """The mean of log(chi-squared / df)."""
    return special.digamma(df / 2) - np.log(df / 2)


def _freedom_of(variance: Any) -> Any:
    """Degrees of freedom of a chi-squared variable whose logarithm has this variance; few thousand at most."""
    x = np.maximum(variance, 1e-3)
    return (1 + np.sqrt(1 + 2 * x)) / x  # of the trigamma function's first two terms, at y = df / 2: 1 / y + 1 / 2y^2


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


def apart(base: Array, tonight: Array) -> tuple[Any, Any]:
    """Whether every process of tonight is slower than every one of the baseline, and whether it is faster."""
    above = tonight.min(axis=-1) > base.max(axis=-1)
    return above, tonight.max(axis=-1) < base.min(axis=-1)


def compare(base: Array, tonight: Array, noise: Spread, limit: Any, policy: Policy) -> Comparison:
    """The mean log ratio, its Student interval, and whether the two groups of processes are apart.

    The interval alone false-alarms when a baseline happened to see one of two modes; that no process of tonight may
    overlap with the baseline holds for any distribution.
    """
    ratio = tonight.mean(axis=-1) - base.mean(axis=-1)
    half = quantile(noise.df, policy.alpha) * error(base.shape[-1], tonight.shape[-1], noise)
    above, below = apart(base, tonight)
    return Comparison(ratio=ratio, low=ratio - half, high=ratio + half, limit=limit, above=above, below=below)


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

"""A level's spread, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from perf_tests.harness import noise
from perf_tests.harness.policy import policy_for

GPU = policy_for("h200-700w")
UNIT = 6 * 0.01**2 * np.exp(0.92278434 - np.log(3))
"""Squares with six degrees of freedom, as 1 % leaves them in the mean of the logarithm: digamma(3) - log(3)."""


@pytest.mark.parametrize(
    ("others", "variance", "weight"),
    [
        # Alike: the geometric mean, and the cap.
        ([1] * 8, 0.9995, 20),
        # Logs of +-0.805 vary by 0.740 (eight of them), by 0.345 beyond trigamma(3) = 0.395: 6.66 degrees of freedom.
        ([1, 5] * 4, 5**0.5 * 0.8543, 6.664),
        # Nothing alike: the prior's degrees of freedom, and exp(digamma(1)).
        ([1, 100] * 4, 10 * 0.5615, 2),
        # One far off the median counts as 2.5 * sqrt(0.395) = 1.571 off.
        ([1] * 7 + [1e9], np.exp(1.571 / 8) * 0.9995, 20),
        # Levels that differ by e^2 on average: far off is 2.5 * 1.4826 * 2 = 7.413, and weighs its share of five.
        (np.exp([0, 2, 4, 6, 40]), np.exp(4 + (-4 - 2 + 2 + 7.413) / 5) * 0.5615, 2),
        (np.exp([0, 34, 36, 38, 40]), np.exp(36 + (-7.413 - 2 + 2 + 4) / 5) * 0.5615, 2),
    ],
)
def test_levels_lend_their_spread_as_they_are_alike(others, variance, weight):
    """Variance and degrees of freedom of eight levels, or five, that have so many times the squares of 1 %."""
    found = noise.spread((6 * 0.01**2, 6), [(UNIT * factor, 6) for factor in others], GPU)
    assert found.df == pytest.approx(weight + 6, rel=1e-3)
    assert found.sd**2 * found.df / 0.01**2 == pytest.approx(weight * variance + 6, rel=1e-3)


def test_levels_of_few_and_of_many_processes_are_alike_if_only_chance_differs():
    """A confirmation: four degrees of freedom for most, fifteen for the levels measured again."""
    mean_log = {4: 0.42278434 - np.log(2), 15: 1.94675748 - np.log(7.5)}  # digamma(2), digamma(7.5)
    others = [(df * 0.01**2 * np.exp(mean_log[df]), df) for df in (4, 15, 4, 15)]
    found = noise.spread((0.0, 15), others, GPU)
    assert (found.df, found.sd**2 * 35 / 20) == (35, pytest.approx(0.9995 * 0.01**2, rel=1e-3))


@pytest.mark.parametrize("sd", [0.0, 1e-6, 0.001])
def test_what_is_lent_is_at_least_half_of_the_prior(sd):
    """Of levels whose processes agree, even to the last digit."""
    found = noise.spread((0.0, 6), [(6 * sd**2, 6)] * 8, GPU)
    assert found.sd**2 * found.df / 20 == pytest.approx(0.003**2 / 2)


def test_quiet_levels_are_not_made_alike_by_the_least_spread():
    """Below it they still tell how levels differ: the loud ones among them get little of the quiet ones' spread."""
    others = []
    for sd, many in ((0.001, 17), (0.04, 12)):
        shares = (np.arange(many) + 0.5) / many
        others += [(sd**2 * total, 6) for total in stats.chi2.ppf(shares, 6)]
    assert noise.spread((0.0, 6), others, GPU).df == 2 + 6
    raised = [(max(total, 6 * 0.003**2 / 2), 6) for total, _ in others]
    assert noise.spread((0.0, 6), raised, GPU).df > 9 + 6


def test_two_levels_with_freedom_are_pooled():
    """With the prior; a level of one process on either side says nothing of its spread."""
    found = noise.spread((0.0, 6), [(UNIT, 6), (9 * UNIT, 6), (0.0, 0), (0.0, 0)], GPU)
    assert (found.df, found.sd**2 * 20 / 14) == (20, pytest.approx((2 * 0.003**2 + 10 * UNIT) / 14))
    assert noise.spread((0.0, 6), [], GPU).df == 8


def test_nights_are_decided_one_by_one():
    """A batch gives every night the spread that it has alone."""
    rng = np.random.default_rng(0)
    own, *others = [(rng.chisquare(6, 5) * 10.0 ** -rng.integers(3, 6), 6) for _ in range(7)]
    batch = noise.spread(own, others, GPU)
    for night in range(5):
        alone = noise.spread((own[0][night], 6), [(total[night], 6) for total, _ in others], GPU)
        assert (alone.sd, alone.df) == pytest.approx((batch.sd[night], batch.df[night]))

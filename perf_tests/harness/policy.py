"""What the gate assumes and tolerates, as frozen data. Every number says where it comes from.

Logarithms of ratios throughout: 0.02 is +2 % to within 0.02 %. The figures that these numbers lead to are in
docs/gate.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fluxfast.levels import LEVELS
from perf_tests.harness.cpu import is_cpu

Direction = Literal["lower_is_worse", "higher_is_worse", "informational"]

PARENTS: dict[str, str | None] = {level.id: level.parent for level in LEVELS.values()}
OWN_FIELDS: dict[str, str | None] = {level.id: level.own_field for level in LEVELS.values()}

ROUNDOFF: dict[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float8_e4m3": 2.0**-4}
"""Unit roundoff by format: half the distance from 1 to the next number (24, 8 and 4 significant bits)."""
MOST_BF16_ERROR = 0.25
"""Relative L2 of bf16's first step to float32's. Unrelated outputs have 1.41; the shipped checkpoint has 0.006, and two
ways of computing FLUX.1's shape in bf16 are 0.015 apart."""
MOST_STEP_ERROR = 0.5
"""The same of any level, however much its formats' roundoff would explain: float8 levels have 0.039 to 0.065."""

ALIKE: dict[str, float] = {"ssim": 0.5, "flip": 0.3}
"""What any level's image reaches against the same run's bf16, with a baseline or without: float8 levels of the shipped
checkpoint have SSIM 0.94 to 0.99 and FLIP up to 0.08, a black image 0.00 and 0.97, one shade all over 0.83 and 0.36."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How one class of machine is judged.

    Attributes:
        slug: the machine, for messages.
        relative_to: level whose processes of the same run divide every latency; None compares seconds with seconds.
        floor: log ratio that is never red, whatever the noise.
        cap: the history of nights cannot widen the limit beyond this.
        night_weight: how many nights of history the floor counts for.
        alpha: one-sided error of one latency interval.
        prior_sd, prior_df: between-process spread assumed before any process is seen, and what it weighs in degrees of
            freedom; the spread of other levels never weighs less.
        pool_df: what the spread of the other levels weighs, at most, beside a level's own.
        confirmation_processes: fresh processes that a confirmation runs; the stated error rates assume that many.
        min_processes: baseline processes below which a message says that the interval is wide for lack of them.
        published_margin: log ratio above a published number that counts as clearly slower.
        exact_alpha: one-sided error of one limit on fidelity or step error; these are never retried.
        memory_floor: relative rise of peak memory that is never red.
        step_error_floor: relative change of a step error that is never red; where compilations of one level of
            the same format differ by more in the baseline, that, up to `step_error_cap`.
        rounding_level: level whose distance from bf16 in the baseline says how far rounding alone moves an image; no
            image limit is tighter. None where the machine that recorded is the machine that is judged.
        parents, own_fields: the ladder as data: level -> level below, level -> the field that it changes.
    """

    slug: str
    relative_to: str | None
    floor: float
    cap: float
    prior_sd: float
    night_weight: float = 5.0
    alpha: float = 1e-3
    prior_df: float = 2.0
    pool_df: float = 20.0
    confirmation_processes: int = 10
    min_processes: int = 5
    published_margin: float = 0.05
    exact_alpha: float = 3e-5
    memory_floor: float = 0.01
    step_error_floor: float = 0.05
    step_error_cap: float = 0.25
    rounding_level: str | None = None
    parents: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: PARENTS)
    own_fields: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: OWN_FIELDS)

    @property
    def usual_processes(self) -> int:
        """Processes a level of a run by default: where ratios to a level of the same run are judged, one."""
        return 1 if self.relative_to else 3

    def divisor(self, level: str) -> str | None:
        """The level that divides `level`'s latency: `relative_to`, or the parent where that is the level itself."""
        return self.parents.get(level) if level == self.relative_to else self.relative_to

    def sharing(self, series: int) -> Policy:
        """The same, if a level is looked at in so many series, and red in any is red."""
        return dataclasses.replace(self, alpha=self.alpha / series)


def nearest_parents(unavailable: Collection[str]) -> dict[str, str | None]:
    """Level -> the nearest level below that the machine can run: what `unavailable` leaves of the ladder."""

    def below(level: str) -> str | None:
        parent = PARENTS[level]
        return parent if parent is None or parent not in unavailable else below(parent)

    return {level: below(level) for level in PARENTS if level not in unavailable}


def policy_for(slug: str, unavailable: Collection[str] = ()) -> Policy:
    """The policy of a machine: a CPU by ratio to the same run's bf16, anything else in seconds.

    A level whose parent is `unavailable` is compared with the nearest one below that runs.

    GPU: the floor is a quarter of the 2 % that has to be found; the spread is assumed, at two degrees of freedom (the
    quietest levels of the H100 baseline show 0.2 to 0.5 % between processes). A night there has up to 33 levels, whose
    two-mode noise takes four more processes to confirm.
    CPU: shared machines move by several per cent between processes, and seconds do not travel between them. Nor does
    the last bit: other caches and cores may add in another order, so images may differ as float32's does from bf16's,
    a step error by a quarter.
    """
    parents = nearest_parents(unavailable)
    if is_cpu(slug):
        return Policy(
            slug=slug,
            parents=parents,
            relative_to="bf16",
            floor=0.05,
            cap=0.25,
            prior_sd=0.03,
            step_error_floor=0.25,
            rounding_level="fp32",
        )
    return Policy(
        slug=slug, parents=parents, relative_to=None, floor=0.005, cap=0.03, prior_sd=0.003, confirmation_processes=14
    )


def direction(metric: str) -> Direction:
    """Which way a fidelity metric gets worse.

    Raises:
        ValueError: for a metric of no known direction, so that no new metric is silently unjudged.
    """
    if metric.startswith("psnr"):
        return "informational"
    if metric.startswith(("ssim", "ms_ssim")):
        return "lower_is_worse"
    if metric.startswith(("flip", "lpips")):
        return "higher_is_worse"
    raise ValueError(f"fidelity metric {metric!r} has no known direction; add it to perf_tests/harness/policy.py")


def worst(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metric -> the worst of the processes' values."""
    return {
        metric: (max if direction(metric) == "higher_is_worse" else min)(own[metric] for own in scores)
        for metric in scores[0]
        if all(metric in own for own in scores)  # PSNR has no value for identical images
    }


def fidelity_floor(metric: str) -> float:
    """Change of a metric that is never red: less than +-1 LSB of noise does to it (mean forms, worst-tile forms)."""
    return 0.015 if "tile" in metric else 0.005


def roundoff_factor(fields: Mapping[str, Any]) -> tuple[float, str]:
    """k of `error(level) <= k x error(bf16)`, and where it comes from.

    Twice (flash-attention's own tests allow twice the reference's error) the coarsest unit roundoff among the
    formats that the level computes in, over bfloat16's.
    """
    fp8 = str(fields.get("attention", "")).startswith("fa3_fp8") or fields.get("quantization", "none") != "none"
    coarsest = "float8_e4m3" if fp8 else str(fields.get("dtype", "bfloat16"))
    factor = 2 * ROUNDOFF[coarsest] / ROUNDOFF["bfloat16"]
    return factor, f"2 x unit roundoff of {coarsest} over bfloat16's"

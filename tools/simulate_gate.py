"""False alarms and power of the latency gate, simulated: `python -m tools.simulate_gate` prints docs/gate.md's tables.

A simulated night is a baseline, a run and a confirmation, all drawn anew, for a whole ladder; it is decided by
`perf_tests.harness.noise`, which also decides real nights. `tests/test_gate_errors.py` holds the two to the same
verdicts. All values are logarithms of process medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from fluxfast.levels import LADDER
from perf_tests.harness import noise
from perf_tests.harness.noise import Array, Comparison
from perf_tests.harness.policy import Policy
from tools.night_models import (
    CPU,
    CPU_SPREAD,
    GPU,
    GPU_SPREAD,
    LOOP_SHARE,
    NIGHTS,
    REST_SPREAD,
    Draw,
    Model,
    gaussian,
    null_models,
)

BASELINE_PROCESSES = 5
LARGEST = 33
"""Levels of the largest committed baseline, and of the nights over it."""
SLOWED = 4
"""Position of the level that the power simulations slow down: in the middle, with a parent and a child."""

NAMES = {"visible": "the smallest visible", "twice": "twice the smallest visible"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nights:
    """Log medians, each of shape (nights, levels, processes)."""

    base: Array
    run: Array
    confirmation: Array
    history: Array
    """Log ratios of earlier nights to the baseline, of shape (nights, levels, dates)."""
    loop: Nights | None = None
    """The denoising loops of the same calls, if they are looked at."""

    def slowed(self, level: int, log_ratio: Any) -> Nights:
        """The same nights with one level slower in run and confirmation, by one log ratio or one a night."""
        run, confirmation = self.run.copy(), self.confirmation.copy()
        run[:, level] += np.reshape(log_ratio, (-1, 1))
        confirmation[:, level] += np.reshape(log_ratio, (-1, 1))
        return dataclasses.replace(self, run=run, confirmation=confirmation)

    def with_slower_loop(self, level: int, log_ratio: float) -> Nights:
        """The same nights with the loop of one level slower, and the call by the loop's share of it."""
        assert self.loop is not None
        of_call = math.log1p(LOOP_SHARE * math.expm1(log_ratio))
        return dataclasses.replace(self.slowed(level, of_call), loop=self.loop.slowed(level, log_ratio))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions:
    """Each of shape (nights, levels)."""

    first: Any
    """Looked red before the confirmation."""
    interval: Any
    ladder: Any
    improved: Any
    visible: Any
    """Smallest visible log ratio; NaN where it was not asked for."""

    @property
    def red(self) -> Any:
        return self.interval | self.ladder


def chain(policy: Policy, levels: int) -> Policy:
    """The policy of a ladder of so many levels: the real ids, then made-up rungs."""
    ids = [level.id for level in LADDER][:levels]
    ids += [f"rung_{number}" for number in range(len(ids), levels)]
    return dataclasses.replace(policy, parents=dict(zip(ids, [None, *ids[:-1]], strict=True)))


def nights(
    draw: Draw,
    policy: Policy,
    *,
    levels: int,
    count: int = NIGHTS,
    history: int = 0,
    seed: int = 0,
    rest_sd: float | None = None,
) -> Nights:
    """Null nights; `history` earlier ones with the same baseline widen the limit as accepted nights do.

    With `rest_sd`, `draw` gives the loops of the calls: `LOOP_SHARE` of each, and the rest spreads by so much.
    """
    rng, processes = np.random.default_rng(seed), policy.usual_processes
    wanted = (0, BASELINE_PROCESSES), *((2 + date, processes) for date in range(history))
    base, *earlier = (draw(rng, date, count, levels, drawn) for date, drawn in wanted)
    run = draw(rng, 1, count, levels, processes)
    confirmation = draw(rng, 1, count, levels, policy.confirmation_processes)
    drawn = _nights(base, run, confirmation, earlier)
    if rest_sd is None:
        return drawn
    rest = np.random.default_rng((seed, 1))

    def call(loop: Array) -> Array:
        return np.log(LOOP_SHARE * np.exp(loop) + (1 - LOOP_SHARE) * np.exp(rest.normal(0, rest_sd, loop.shape)))

    calls = _nights(call(base), call(run), call(confirmation), [call(night) for night in earlier])
    return dataclasses.replace(calls, loop=drawn)


def _nights(base: Array, run: Array, confirmation: Array, earlier: Sequence[Array]) -> Nights:
    moved = [night.mean(axis=-1) - base.mean(axis=-1) for night in earlier]
    history = np.stack(moved, axis=-1) if moved else np.zeros((*base.shape[:2], 0))
    return Nights(base=base, run=run, confirmation=confirmation, history=history)


def decide(night: Nights, policy: Policy, *, visible: bool = True) -> Decisions:
    """`gate.judge_latency` for all nights at once.

    Args:
        visible: also the smallest visible change, which takes the spread of every level in every night. Without it
            spreads are taken where no process of tonight overlaps with the baseline: nothing else is red or improved.
    """
    if night.loop is None:
        return _decide(night, policy, visible=visible)
    policy = policy.sharing(2)
    call = _decide(night, policy, visible=visible)
    loop = _decide(night.loop, policy, visible=visible, has_ladder=False)
    first = call.first | loop.first
    return Decisions(
        first=first,
        interval=call.interval | loop.interval,
        ladder=call.ladder,
        improved=(call.improved | loop.improved) & ~first,
        visible=loop.visible,
    )


def _decide(night: Nights, policy: Policy, *, visible: bool, has_ladder: bool = True) -> Decisions:
    """Decisions on one part of a call."""
    ids = list(policy.parents)
    at = {id: number for number, id in enumerate(ids)}
    absolute_over = {at[id]: None if (d := policy.divisor(id)) is None else at[d] for id in ids}
    ladder_over = {at[id]: at[up] for id, up in policy.parents.items() if up is not None and has_ladder}
    # With a history the limit needs the spread too.
    everywhere = visible or night.history.shape[-1] > 0
    looks = []
    for tonight in (night.run, night.confirmation):
        absolute, seen = _look(night, tonight, absolute_over, None, policy, everywhere=everywhere)
        limits = {level: found.limit for level, found in absolute.items()}
        of_steps = {level: np.maximum(limits[level], limits[parent]) for level, parent in ladder_over.items()}
        looks.append((absolute, _look(night, tonight, ladder_over, of_steps, policy, everywhere=visible)[0], seen))
    (absolute, ladder, seen), (again, ladder_again, _) = looks
    moved = np.stack([absolute[level].ratio for level in range(len(ids))], axis=-1)
    shape = moved.shape
    interval_1, interval, ladder_1, ladder_2, improved = (np.zeros(shape, bool) for _ in range(5))
    for level in range(len(ids)):
        interval_1[:, level] = absolute[level].slower
        interval[:, level] = absolute[level].slower & again[level].slower
        improved[:, level] = absolute[level].faster
        if level in ladder and ladder[level].slower.any():
            drift = np.median(np.delete(moved, level, axis=-1), axis=-1)
            behind = absolute[level].slower | (moved[:, level] - drift > absolute[level].limit)
            ladder_1[:, level] = ladder[level].slower & behind
            ladder_2[:, level] = ladder_1[:, level] & ladder_again[level].slower
    return Decisions(
        first=interval_1 | ladder_1, interval=interval, ladder=ladder_2, improved=improved & ~ladder_1, visible=seen
    )


def _look(
    night: Nights,
    tonight: Array,
    over: Mapping[int, int | None],
    limits: Mapping[int, Any] | None,
    policy: Policy,
    *,
    everywhere: bool,
) -> tuple[dict[int, Comparison], Array]:
    """Each level's comparison and smallest visible change; without `limits` they come from the history.

    Unless `everywhere`, an interval is infinite where the processes of both sides overlap.
    """

    def series(logs: Array, level: int) -> Array:
        divisor = over[level]
        return logs[:, level] if divisor is None else logs[:, level] - logs[:, divisor]

    squares = {}
    for level in over:
        (a, n), (b, m) = noise.squares(series(night.base, level)), noise.squares(series(tonight, level))
        squares[level] = a + b, n + m
    found, visible = {}, np.full(night.base.shape[:2], np.nan)
    for level in over:
        base, now = series(night.base, level), series(tonight, level)
        above, below = noise.apart(base, now)
        at = np.arange(len(base)) if everywhere else np.flatnonzero(above | below)
        own, *others = (
            (squares[id][0][at], squares[id][1])
            for id in (level, *(id for id in over if id not in (level, over[level])))
        )
        spread = noise.spread(own, others, policy)
        error = noise.error(base.shape[-1], night.run.shape[-1], spread) if everywhere else 0.0
        limit = noise.limit(night.history[:, level], error, policy) if limits is None else limits[level]
        compared = noise.compare(base[at], now[at], spread, limit[at], policy)
        low, high = np.full((2, len(base)), [[-np.inf], [np.inf]])
        low[at], high[at] = compared.low, compared.high
        ratio = now.mean(axis=-1) - base.mean(axis=-1)
        found[level] = Comparison(ratio=ratio, low=low, high=high, limit=limit, above=above, below=below)
        if everywhere:
            visible[:, level] = noise.visible(base, now.shape[-1], spread, limit, policy)
    return found, visible


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """The one-sided Clopper-Pearson bound on a rate."""
    return float(stats.beta.ppf(confidence, events + 1, trials - events)) if events < trials else 1.0


def false_alarms(model: Model, levels: int) -> tuple[int, int]:
    """Of the model's nights, how many have any level red: before confirmation, and after it."""
    policy = chain(model.policy, levels)
    first = red = 0
    for seed in range(model.nights // NIGHTS):
        null = nights(model.draw, policy, levels=levels, history=model.history, seed=seed, rest_sd=model.rest_sd)
        decisions = decide(null, policy, visible=False)
        first += int(decisions.first.any(axis=1).sum())
        red += int(decisions.red.any(axis=1).sum())
    return first, red


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """Shares of nights."""

    found: float
    in_ladder_terms: float
    elsewhere: float
    smallest_visible: float
    """Median over the nights, 0.02 is +2 %."""


def power(effect: float | str, policy: Policy, sd: float, count: int = NIGHTS, history: int = 0) -> Power:
    """One level of nine slowed by `effect` (0.02 is +2 %), or by "visible" or "twice": that many smallest visibles."""
    policy = chain(policy, len(LADDER))
    null = nights(gaussian(sd), policy, levels=len(LADDER), count=count, history=history, seed=1)
    visible = decide(null, policy).visible[:, SLOWED]
    scale = {"visible": 1.0, "twice": 2.0}
    shift = np.log1p(effect) if isinstance(effect, float) else np.log1p(scale[effect] * np.expm1(visible))
    decisions = decide(null.slowed(SLOWED, shift), policy)
    return Power(
        found=float(decisions.red[:, SLOWED].mean()),
        in_ladder_terms=float(decisions.ladder[:, SLOWED].mean()),
        elsewhere=float(np.delete(decisions.red, SLOWED, axis=1).any(axis=1).mean()),
        smallest_visible=float(np.expm1(np.median(visible))),
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.perf_counter()
    print("| null nights | levels | red before confirmation, per 1,000 | false alarms | per 1,000 | 95 % bound |")
    print("|---|---|---|---|---|---|")
    for name, model in null_models().items():
        for levels in (len(LADDER), LARGEST):
            count = model.nights
            first, red = false_alarms(model, levels)
            bound = 1000 * upper_bound(red, count)
            rate = f"{1000 * first / count:.2f} | {red} of {count} | {1000 * red / count:.2f} | {bound:.2f}"
            print(f"| {name} | {levels} | {rate} |")
    print(
        "\n| share of slow processes | baselines that saw only the fast mode | red nights per 1,000 over such a one |"
    )
    print("|---|---|---|")
    for slow in (0.3, 0.5, 0.65, 0.8):
        drawn = GPU.usual_processes + GPU.confirmation_processes
        print(f"| {100 * slow:.0f} % | {100 * (1 - slow) ** BASELINE_PROCESSES:.2f} % | {1000 * slow**drawn:.2f} |")
    print("\n| machine | slowed by | found | also in ladder terms | red elsewhere | smallest visible (median) |")
    print("|---|---|---|---|---|---|")
    gpu: tuple[float | str, ...] = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, "visible", "twice")
    cpu: tuple[float | str, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, "visible", "twice")
    machines = (
        ("GPU, 0.3 %, 3 processes", GPU, GPU_SPREAD, gpu, 0),
        ("the same, 10 nights of history", GPU, GPU_SPREAD, (0.02, 0.05, "visible"), 10),
        ("CPU, 2 %, 1 process", CPU, CPU_SPREAD, cpu, 0),
    )
    for machine, policy, sd, effects, history in machines:
        for effect in effects:
            found = power(effect, policy, sd, history=history)
            label = f"+{100 * effect:g} %" if isinstance(effect, float) else NAMES[effect]
            print(
                f"| {machine} | {label} | {100 * found.found:.2f} % | {100 * found.in_ladder_terms:.2f} % "
                f"| {100 * found.elsewhere:.3f} % | +{100 * found.smallest_visible:.1f} % |"
            )
    print("\n| loop slowed by | call by | found | by the call alone | smallest visible of the loop, of the call |")
    print("|---|---|---|---|---|")
    policy = chain(GPU, len(LADDER))
    for effect, history in ((0.01, 0), (0.015, 0), (0.02, 0), (0.03, 0), (0.05, 0), (0.02, 10), (0.05, 10)):
        null = nights(gaussian(GPU_SPREAD), policy, levels=len(LADDER), history=history, seed=1, rest_sd=REST_SPREAD)
        slower = null.with_slower_loop(SLOWED, math.log1p(effect))
        either, alone = (decide(own, policy) for own in (slower, dataclasses.replace(slower, loop=None)))
        seen = [100 * float(np.expm1(np.median(own.visible[:, SLOWED]))) for own in (either, alone)]
        found = [100 * float(own.red[:, SLOWED].mean()) for own in (either, alone)]
        print(
            f"| +{100 * effect:g} %{', 10 nights of history' if history else ''} | +{100 * LOOP_SHARE * effect:.1f} % "
            f"| {found[0]:.2f} % | {found[1]:.2f} % "
            f"| +{seen[0]:.1f} %, +{seen[1]:.1f} % |"
        )
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

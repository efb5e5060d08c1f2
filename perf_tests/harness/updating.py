"""From an old baseline and a new run's to an updated one: only what moved, or what is new. Pure.

Nothing gets slower without a reason.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Collection, Mapping

from fluxfast.levels import DEFAULTS, place_of
from perf_tests.harness.exact import step_error_floor
from perf_tests.harness.obstacles import command, facts_of, record_command
from perf_tests.harness.policy import policy_for
from perf_tests.harness.schema import AnnotatedStep, Baseline, Environment, LevelBaseline, Verdict
from perf_tests.harness.store import BaselineError

NIGHTS_KEPT = 30
"""Older nights tell of another driver and another season; thirty know a spread to an eighth of itself."""


def update_baseline(
    old: Baseline,
    new: Baseline,
    limits: Mapping[str, float],
    reason: str | None,
    *,
    accepted: Collection[str] = (),
    leaner: Collection[str] = (),
    loop_limits: Mapping[str, float] | None = None,
    divisors: Mapping[str, str | None] | None = None,
    unsettled: Collection[str] = (),
    today: datetime.date | None = None,
) -> tuple[Baseline, list[str]]:
    """`old` with the levels that moved beyond a third of their limit, or are `accepted`, taken from `new`.

    What moved less stays, so that many small updates do not add up to an unseen regression. Without a reason a level
    may become faster or `leaner` only, and keeps its fidelity and step error.

    Args:
        old, new: of the same machine, workload and method; `new` from `baseline_from_results`. What `new` lacks stays
            as it is, but for times of which only ratios within a run count.
        limits: level id -> latency limit as the gate has it, the natural log of a ratio (0.02 is about +2 %).
        accepted: level ids of which anything was red and is let pass for `reason`: image, memory, counts or time.
        leaner: level ids whose peak memory improved; it is taken from `new`.
        loop_limits: level id -> the same as `limits` for the denoising loop, where that is judged. It tells whether a
            level moved as well as the call does.
        reason: why slower is accepted; needed too if a level is accepted, or its effective fields or proofs changed.
        divisors: level id -> the policy's divisor, by whose median the level's is divided first. Where there is any,
            one level that moved replaces all: times of two runs do not mix where only ratios within a run count.
        unsettled: level ids that looked slower until fresh processes disagreed: which of the two is true is not known,
            so that neither is kept.
        today: date of the annotation; default: now, UTC.

    Returns:
        The baseline, equal to `old` if nothing moved, and one line a level that is `unsettled` or that is rewritten for
        its own sake.

    Raises:
        BaselineError: not comparable, a level is missing, a loosening without reason, or times of an `unsettled` level
            that would have to be stored.
    """
    over = divisors or {}
    _refuse_other(old, new, ())
    missing = set(new.levels) - (set(old.levels) & set(limits))
    if any(over.values()):
        missing |= set(old.levels) - set(new.levels)
    if missing:
        raise BaselineError(
            f"levels {', '.join(sorted(missing))} are not in all of baseline, run and limits: {_anew(old)}"
        )
    both = [level for level in old.levels if level in new.levels]
    ratios = {level: _unit(new, level, over.get(level)) / _unit(old, level, over.get(level)) for level in both}
    loops = {
        level: _median_s(new, level, is_loop=True) / _median_s(old, level, is_loop=True) for level in loop_limits or {}
    }
    changed = {*accepted, *(level for level in both if not _is_built_alike(old.levels[level], new.levels[level]))}
    beyond: dict[str, list[float]] = {level: [] for level in both}
    for of_part, own_limits in ((ratios, limits), (loops, loop_limits or {})):
        for level in of_part:
            if abs(math.log(of_part[level])) > own_limits[level] / 3:
                beyond[level].append(of_part[level])
    moved = [level for level in both if level in changed or (level not in unsettled and beyond[level])]
    # Of two parts of a call, one that got slower tells; else the one that got faster by more.
    told = {
        level: max(beyond[level], key=lambda ratio: (ratio > 1, abs(math.log(ratio))), default=ratios[level])
        for level in moved
    }
    loosened = [f"{level} x{told[level]:.4f}" for level in moved if level in changed or told[level] > 1]
    if loosened and not (reason and reason.strip()):
        raise BaselineError(
            f"slower, or built otherwise, than the baseline: {', '.join(loosened)}; "
            'say why it is accepted with --reason "...", or fix it'
        )
    replaced = list(old.levels) if moved and any(over.values()) else moved
    if mixed := [level for level in unsettled if level in replaced]:
        raise BaselineError(
            f"levels {', '.join(mixed)} looked slower in this run and not in the fresh processes that should confirm "
            f"it, and {', '.join(moved)} cannot be stored without these times: measure again on a quiet machine"
        )
    lines = [f"{level}: kept as it was, since the confirmation did not agree" for level in unsettled]
    lines += [f"{level}: kept as it was, since it was not measured" for level in old.levels if level not in both]
    levels = dict(old.levels)
    for level in both:
        was = old.levels[level]
        leaned = {"peak_memory_bytes": new.levels[level].peak_memory_bytes} if level in leaner else {}
        kept = was.model_copy(update=leaned)
        levels[level] = _merge(kept, new.levels[level], level in moved and bool(reason)) if level in replaced else kept
        changes = _changes(was, levels[level])
        if level in moved:
            changes.insert(0, _times(old, new, level, ratios[level], limits[level]))
            if level in loops:
                changes.insert(1, f"its loop x{loops[level]:.4f}")
        if changes:
            lines.append(f"{level}: {', '.join(changes)}")
    if not moved:
        return old.model_copy(update={"levels": levels}), lines
    date = (today or datetime.datetime.now(datetime.UTC).date()).isoformat()
    steps = [
        AnnotatedStep(level=level, date=date, ratio=told[level], reason=reason or "faster; no reason given")
        for level in moved
    ]
    update = {"environment": new.environment, "levels": levels, "steps": [*old.steps, *steps]}
    updated = old.model_copy(update=update)
    return updated, lines + _moved_floors(old, updated)


def add_night(old: Baseline, nights: Mapping[str, tuple[float, float | None]]) -> Baseline:
    """`old` with tonight's change as one of each level's `nights`, from which the gate learns how much it moves.

    However far, short of red: nights of which only the quiet ones are kept say that nothing ever moves.

    Args:
        nights: level id -> tonight's log ratio to `old` of call and, where it is judged, loop, of levels that passed.
    """
    levels = {level: _with_night(own, *nights.get(level, (None, None))) for level, own in old.levels.items()}
    return old.model_copy(update={"levels": levels})


def extend_baseline(
    old: Baseline, new: Baseline, added: Collection[str], witnesses: Mapping[str, Verdict]
) -> tuple[Baseline, list[str]]:
    """`old` with the levels `added` taken from `new`; the levels that it holds stay as they are.

    The environment is `new`'s, which says as much as `old`'s and the versions of what only the added levels use.

    The levels that both hold, bf16, fp32 and parents, are the witnesses: where they take as long as they took, seconds
    of the two runs stand in one file. Where the policy has a divisor they never do. A gate that is to cry no wolf
    passes a witness that looked slower until fresh processes disagreed, or that overlaps with the slowest process of
    old; neither shows that the machine was as it was.

    Args:
        old, new: of the same machine, workload and method; `new` from `baseline_from_results`.
        added: level ids that `old` lacks and `new` holds.
        witnesses: latency verdicts of `new` over `old`, of the levels that both hold.

    Returns:
        The baseline, its levels in the project's order, and one line an added level.

    Raises:
        BaselineError: not comparable, another environment, no witness, or one whose interval lies beyond its limit,
            either way, or whose confirmation did not agree.
    """
    anew = _anew(old, added)
    _refuse_other(old, new, added)
    if told := other_environment(old, new.environment):
        raise BaselineError(f"{told}: {anew}")
    if not witnesses:
        raise BaselineError(
            f"no level of this run is in the baseline, to tell whether the machine is as it was: {anew}"
        )
    if moved := [f"{level} {told}" for level, verdict in witnesses.items() if (told := _moved(verdict))]:
        raise BaselineError(
            f"the baseline's own levels are not as they were, {', '.join(moved)}, so that this run's seconds do not "
            f"belong beside its: measure again on a quiet machine or, if the machine changed, {anew}"
        )
    levels = {**old.levels, **{level: new.levels[level] for level in added}}
    ordered = {level: levels[level] for level in sorted(levels, key=place_of)}
    lines = [
        f"{level}: added, {_median_s(new, level):.6g} s in {len(new.levels[level].processes)} processes"
        for level in ordered
        if level in added
    ]
    extended = old.model_copy(update={"levels": ordered, "environment": new.environment})
    return extended, lines + _moved_floors(old, extended)


def _moved_floors(old: Baseline, new: Baseline) -> list[str]:
    """A line for each floor of a step error that the runs of other levels have moved: it is no number of its own."""
    policy = policy_for(new.slug)
    moved: dict[str, list[str]] = {}
    for level in [id for id in new.levels if id in old.levels]:
        was, now = (step_error_floor(level, baseline, policy) for baseline in (old, new))
        if was != now:
            moved.setdefault(f"may move by {now:.1%}, by {was:.1%} before", []).append(level)
    return [f"step errors of {', '.join(levels)}: {told}" for told, levels in moved.items()]


def no_night(old: Baseline, environment: Environment) -> str | None:
    """Why a run in `environment` tells more than how levels move when nothing changes; None if it does not."""
    changes = environment.changes(old.environment)
    if not changes:
        return None
    return (
        "a night tells how levels move when nothing changes, and since the baseline was recorded "
        f"{', '.join(changes)} did: give a run of its versions, driver and kernel"
    )


def other_environment(old: Baseline, environment: Environment | None) -> str | None:
    """Why a level measured in `environment` cannot stand in the file of `old`; None if it can."""
    changes = environment.changes(old.environment) if environment else []
    if not changes:
        return None
    return f"the environment is not the baseline's ({', '.join(changes)}), and a file says one for all levels"


def _moved(witness: Verdict) -> str | None:
    """How a level, in whatever part of its call, says that the machine is another than it was; None if it does not."""
    parts = ("call_", "loop_") if "loop_ratio" in witness.numbers else ("",)
    return next((said for part in parts if (said := _moved_in(part, witness))), None)


def _moved_in(part: str, witness: Verdict) -> str | None:
    ratio, low, high, limit = (witness.numbers.get(f"{part}{name}") for name in ("ratio", "low", "high", "limit"))
    if ratio is None or low is None or high is None or limit is None:
        return f"was not compared ({witness.rule})"
    told = f"x{ratio:.4f} (interval x{low:.4f} to x{high:.4f}, limit {limit:.2%}"
    if witness.rule == "confirmation":
        return f"{told}, and fresh processes did not agree)"
    return f"{told})" if low > 1 + limit or high < 1 / (1 + limit) else None


def _anew(old: Baseline, added: Collection[str] = ()) -> str:
    start = command(str(old.workload["id"]))
    return f"record a new baseline with `{record_command(added, old.levels, start)}`"


def _refuse_other(old: Baseline, new: Baseline, added: Collection[str]) -> None:
    for field in ("slug", "workload_digest", "method", "fidelity_method", "source"):
        if getattr(old, field) != getattr(new, field):
            raise BaselineError(
                f"{field} is {getattr(new, field)!r}, the baseline's is {getattr(old, field)!r}: they do not compare; "
                f"{_anew(old, added)}"
            )


def _with_night(level: LevelBaseline, night: float | None, loop_night: float | None) -> LevelBaseline:
    # No change at all is the baseline's own run, and the same change to the last bit is a run that was kept before.
    if not night or night in level.nights:
        return level
    loops = level.loop_nights if loop_night is None else [*level.loop_nights, loop_night]
    return level.model_copy(
        update={"nights": [*level.nights, night][-NIGHTS_KEPT:], "loop_nights": loops[-NIGHTS_KEPT:]}
    )


def _median_s(baseline: Baseline, level: str, *, is_loop: bool = False) -> float:
    processes = baseline.levels[level].processes
    return statistics.median(statistics.median(own.loop_s if is_loop else own.samples_s) for own in processes)


def _unit(baseline: Baseline, level: str, over: str | None) -> float:
    return _median_s(baseline, level) / (1.0 if over is None else _median_s(baseline, over))


def _is_built_alike(old: LevelBaseline, new: LevelBaseline) -> bool:
    """As the gate has it: a field that came later was off in `old`, and facts that came later prove more."""
    is_counted = facts_of(old.proofs) <= facts_of(new.proofs)
    return DEFAULTS | old.fields == DEFAULTS | new.fields and old.unavailable == new.unavailable and is_counted


def _merge(old: LevelBaseline, new: LevelBaseline, with_reason: bool) -> LevelBaseline:
    # Nights stay as they are: each tells how far this level moved from its baseline of then when nothing had changed.
    kept: tuple[str, ...] = ("nights", "loop_nights")
    if not with_reason:
        kept += ("fidelity", "step_error", "peak_memory_bytes")
    return new.model_copy(update={field: getattr(old, field) for field in kept})


def _times(old: Baseline, new: Baseline, level: str, ratio: float, limit: float) -> str:
    seconds = f"{_median_s(old, level):.6g} s -> {_median_s(new, level):.6g} s, x{ratio:.4f}"
    return seconds if math.isinf(limit) else f"{seconds} (a third of its limit is {limit / 3:.2%})"


def _changes(old: LevelBaseline, new: LevelBaseline) -> list[str]:
    """Effective fields, and means of what is judged beside time, where they differ."""
    fields = [
        f"{name} {old.fields.get(name)} -> {new.fields.get(name)}"
        for name in {**old.fields, **new.fields}
        if old.fields.get(name) != new.fields.get(name)
    ]
    before, after = _judged(old), _judged(new)
    return fields + [
        f"{name} {before[name]:.10g} -> {after[name]:.10g}"
        for name in after
        if before.get(name, after[name]) != after[name]
    ]


def _judged(level: LevelBaseline) -> dict[str, float]:
    values: dict[str, list[float]] = {
        **level.fidelity,
        "step error": level.step_error,
        "peak memory in bytes": [float(peak) for peak in level.peak_memory_bytes],
        "weights in bytes": [float(level.transformer_weight_bytes or 0)],
    }
    return {name: statistics.fmean(own) for name, own in values.items() if own}

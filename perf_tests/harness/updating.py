"""From an old baseline and a new run's to an updated one: only what moved, nothing slower without a reason. Pure."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping
from typing import Any

from perf_tests.harness.schema import AnnotatedStep, Baseline, LevelBaseline
from perf_tests.harness.store import BaselineError

NIGHTS_KEPT = 30
"""Older nights tell of another driver and another season; thirty know a spread to an eighth of itself."""


def update_baseline(
    old: Baseline,
    new: Baseline,
    limits: Mapping[str, float],
    reason: str | None,
    *,
    nights: Mapping[str, float] | None = None,
    relative_to: str | None = None,
    today: datetime.date | None = None,
) -> tuple[Baseline, list[str]]:
    """`old` with the levels that moved beyond a third of their limit taken from `new`.

    What moved less stays, so that many small updates do not add up to an unseen regression; there tonight's change is
    kept as one of the level's `nights`, from which the gate learns how much it moves when nothing changed. Without a
    reason a level may become faster only, and keeps its fidelity, step error and memory.

    Args:
        old, new: of the same machine, workload and method; `new` from `baseline_from_results`.
        limits: level id -> latency limit as the gate has it, the natural log of a ratio (0.02 is about +2 %).
        nights: level id -> tonight's log ratio to `old`, of those levels that passed.
        reason: why slower is accepted; needed too if a level's effective fields or proofs changed.
        relative_to: the policy's: level by whose median all others are divided first (`bf16` on slug `cpu`). Then one
            level that moved replaces all: times of two runs do not mix where only ratios within a run count.
        today: date of the annotation; default: now, UTC.

    Returns:
        The baseline, equal to `old` if nothing moved and no night is given, and one line a level that moved.

    Raises:
        BaselineError: not comparable, a level is missing, or a loosening without reason.
    """
    for field in ("slug", "workload_digest", "method", "fidelity_method", "source"):
        if getattr(old, field) != getattr(new, field):
            raise BaselineError(
                f"{field} is {getattr(new, field)!r}, the baseline's is {getattr(old, field)!r}: they do not compare; "
                "record a new baseline with `pytest perf_tests --record-baseline`"
            )
    if missing := (set(old.levels) | set(new.levels)) - (set(old.levels) & set(new.levels) & set(limits)):
        raise BaselineError(
            f"levels {', '.join(sorted(missing))} are not in all of baseline, run and limits: "
            "record a new baseline with `pytest perf_tests --record-baseline`"
        )
    ratios = {level: _unit(new, level, relative_to) / _unit(old, level, relative_to) for level in old.levels}
    changed = {level for level in old.levels if _identity(old, level) != _identity(new, level)}
    moved = [level for level in old.levels if level in changed or abs(math.log(ratios[level])) > limits[level] / 3]
    loosened = [f"{level} x{ratios[level]:.4f}" for level in moved if level in changed or ratios[level] > 1]
    if loosened and not (reason and reason.strip()):
        raise BaselineError(
            f"slower, or built otherwise, than the baseline: {', '.join(loosened)}; "
            'say why it is accepted with --reason "...", or fix it'
        )
    levels = {level: _with_night(kept, (nights or {}).get(level)) for level, kept in old.levels.items()}
    if not moved:
        return old.model_copy(update={"levels": levels}), []
    lines = [_difference(old, new, level, ratios[level], limits[level]) for level in moved]
    date = (today or datetime.datetime.now(datetime.UTC).date()).isoformat()
    steps = [
        AnnotatedStep(level=level, date=date, ratio=ratios[level], reason=reason or "faster; no reason given")
        for level in moved
    ]
    replaced = moved if relative_to is None else list(old.levels)
    return old.model_copy(
        update={
            "environment": new.environment,
            "levels": {
                level: _merge(old.levels[level], new.levels[level], bool(reason)) if level in replaced else kept
                for level, kept in levels.items()
            },
            "steps": [*old.steps, *steps],
        }
    ), lines


def _with_night(level: LevelBaseline, night: float | None) -> LevelBaseline:
    # No change at all is the baseline's own run, and the same change to the last bit is a run that was kept before.
    if not night or night in level.nights:
        return level
    return level.model_copy(update={"nights": [*level.nights, night][-NIGHTS_KEPT:]})


def _median_s(baseline: Baseline, level: str) -> float:
    return statistics.median(statistics.median(process.samples_s) for process in baseline.levels[level].processes)


def _unit(baseline: Baseline, level: str, relative_to: str | None) -> float:
    return _median_s(baseline, level) / (1.0 if relative_to is None else _median_s(baseline, relative_to))


def _identity(baseline: Baseline, level: str) -> tuple[Any, ...]:
    own = baseline.levels[level]
    return own.fields, own.unavailable, own.proofs


def _merge(old: LevelBaseline, new: LevelBaseline, with_reason: bool) -> LevelBaseline:
    # Nights stay as they are: each tells how far this level moved from its baseline of then when nothing had changed.
    kept = ("nights",) if with_reason else ("nights", "fidelity", "step_error", "peak_memory_bytes")
    return new.model_copy(update={field: getattr(old, field) for field in kept})


def _difference(old: Baseline, new: Baseline, level: str, ratio: float, limit: float) -> str:
    own = f"{level}: {_median_s(old, level):.6g} s -> {_median_s(new, level):.6g} s, x{ratio:.4f}"
    before, after = old.levels[level].fields, new.levels[level].fields
    fields = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    return ", ".join([f"{own} (a third of its limit is {limit / 3:.2%})", *fields])

"""Results x baseline x policy -> Verdict. Pure: no torch, no files, no clock. The formulas are in docs/gate.md.

Latency is here; what needs no statistics of processes is in `exact`. Every judge asks in the same order: did it fail,
was it disturbed, does it compare, is there a baseline (`obstacles`); only then come numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from perf_tests.harness import noise
from perf_tests.harness.exact import judge_fidelity, judge_memory, judge_step_error, judge_structure
from perf_tests.harness.noise import Array, Comparison
from perf_tests.harness.obstacles import ACCEPT, measured, no_divisor, obstacle, verdict
from perf_tests.harness.policy import Policy, direction, nearest_parents, policy_for
from perf_tests.harness.schema import Baseline, Measurement, Outcome, ProcessSamples, Result, Verdict

__all__ = [
    "Policy",
    "direction",
    "judge_fidelity",
    "judge_latency",
    "judge_memory",
    "judge_step_error",
    "judge_structure",
    "nearest_parents",
    "policy_for",
]

Run = Mapping[str, Sequence[Result]]
Logs = Mapping[str, Array]
Over = Mapping[str, str | None]
"""Level -> the level of the same run that divides it, None for plain seconds."""

CALL, LOOP = "call", "loop"
MANY = 3
"""So many other levels have to be there before their median says how far the whole machine moved."""
WIDEST = 50.0
"""Log ratios beyond this are told as this: the end of an interval may lie anywhere."""


def judge_latency(
    level: str,
    run: Run,
    baseline: Baseline | None,
    policy: Policy,
    confirmation: Run | None = None,
) -> Verdict:
    """Is `level` slower than its baseline, or does it pay less over its parent than it did?

    Judged is the whole call and, where seconds are compared and the baseline holds it, the denoising loop in it by the
    same rules: text encoding is Python on the host and several times as restless. Red is what is red in either.

    Args:
        run: level id -> one result a process, for all levels of this run: the divisor, the parent and the spread of
            the others are taken from it.
        confirmation: the same for `policy.confirmation_processes` fresh processes of the level, its parent and
            `policy.relative_to`, measured because a first verdict had the rule `unconfirmed`.

    Returns:
        REGRESSED with rule `unconfirmed` if the run looks red and there is no confirmation; with rule `interval` or
        `ladder` if the confirmation agrees; a pass that says both if it does not.

    Raises:
        ValueError: if `run` or `confirmation` has no result of the level.
    """
    for side in (run,) if confirmation is None else (run, confirmation):
        if found := obstacle(level, side.get(level, ()), baseline, clocked=True):
            return found
        assert baseline is not None
        if found := no_divisor(level, side, baseline, policy):
            return found
    assert baseline is not None
    looks = _looks(level, run, baseline, policy, len(run[level]))
    again = {} if confirmation is None else _looks(level, confirmation, baseline, policy, len(run[level]))
    others = () if confirmation is None else confirmation[level]
    verdicts = {part: _judge(level, look, again.get(part), run[level], others) for part, look in looks.items()}
    decisive = min(verdicts, key=lambda part: _weight(verdicts[part]))
    found = verdicts[decisive]
    if len(verdicts) == 1:
        return found
    rest = [f"{looks[part].describe(level)[0]}{_told(own)}" for part, own in verdicts.items() if part != decisive]
    parts = {f"{part}_{name}": value for part, own in verdicts.items() for name, value in own.numbers.items()}
    return found.model_copy(update={"message": " ".join([found.message, *rest]), "numbers": found.numbers | parts})


def _weight(found: Verdict) -> int:
    """Which of two verdicts on parts of a call is the call's: the lower one."""
    if found.outcome is Outcome.REGRESSED:
        return 1 if found.rule == "unconfirmed" else 0
    if found.rule == "confirmation":
        return 2
    return 3 if found.outcome is Outcome.IMPROVED else 4


def _told(found: Verdict) -> str:
    """What became of the part of a call that did not decide."""
    if found.outcome is Outcome.REGRESSED:
        return (
            " That looks red and is not confirmed." if found.rule == "unconfirmed" else " That is red too, confirmed."
        )
    return " That looked red, and the confirmation does not agree." if found.rule == "confirmation" else ""


def _judge(
    level: str, first: _Look, second: _Look | None, results: Sequence[Result], confirming: Sequence[Result]
) -> Verdict:
    """The verdict on one part of the call."""
    policy, rules = first.policy, first.red(level)
    text, numbers = first.describe(level)
    if not rules:
        if first.absolute(level).faster and first.baseline.source == "recorded":
            stale = "The baseline is stale: look at what made it faster, then run with `--update-baseline`."
            return verdict(Outcome.IMPROVED, level, "interval", f"{text} {stale}", results, numbers)
        return verdict(Outcome.PASS, level, "interval", text, results, numbers)
    if second is None or (rules == ["ladder"] and second.ladder(level) is None):
        message = (
            f"{text} This looks red ({' and '.join(rules)}) but is not confirmed: measure {level!r} and its parent "
            f"{policy.parents.get(level)!r} again in {policy.confirmation_processes} fresh processes."
        )
        return verdict(Outcome.REGRESSED, level, "unconfirmed", message, results, numbers)
    again, counts = second.describe(level)
    numbers |= {"confirmed_ratio": counts["ratio"], "confirmed_processes": counts["processes"]}
    agreed = [rule for rule in rules if second.looks_red(level, rule)]
    both = f"{text} Confirmation in fresh processes: {again}"
    if not agreed:
        message = f"The confirmation does not agree, so this is not red. First run: {both}"
        return verdict(Outcome.PASS, level, "confirmation", message, [*results, *confirming], numbers)
    if len(second.tonight[level]) < policy.confirmation_processes:
        both += f" The stated error rates assume {policy.confirmation_processes} processes here."
    message = f"{both} Fired: {' and '.join(agreed)}. {first.blame(level)}"
    return verdict(Outcome.REGRESSED, level, agreed[0], message, [*results, *confirming], numbers)


def _log_medians(samples: Sequence[Sequence[float]]) -> Array:
    """The unit of decision: one number a process, because GPU timings are tight within a process and not between."""
    return np.log([float(np.median(of_process)) for of_process in samples])


def _part_logs(levels: Mapping[str, Sequence[Measurement | ProcessSamples]], part: str) -> dict[str, Array]:
    """Log medians of one part of the call, of those levels that were timed in it in every process."""
    parts = {id: [own.samples_s if part == CALL else own.loop_s for own in levels[id]] for id in levels}
    return {id: _log_medians(samples) for id, samples in parts.items() if all(samples)}


def _looks(level: str, run: Run, baseline: Baseline, policy: Policy, processes: int) -> dict[str, _Look]:
    """CALL and, where it is judged, LOOP -> this run beside the baseline."""
    call = _Look.of(run, baseline, policy, processes)
    if policy.relative_to is not None or baseline.source == "published":
        return {CALL: call}
    loop = _Look.of(run, baseline, policy.sharing(2), processes, LOOP)
    if level not in loop.base or level not in loop.tonight:
        return {CALL: call}
    return {CALL: dataclasses.replace(call, policy=loop.policy), LOOP: loop}


def _series(logs: Logs, level: str, over: str | None) -> Array:
    """`level`'s log medians over those of another level, process by process: neighbours in time share a drift."""
    if over is None:
        return logs[level]
    n = min(len(logs[level]), len(logs[over]))
    return logs[level][:n] - logs[over][:n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Look:
    """One run beside the baseline, in log medians of those levels that can be judged in both."""

    base: Logs
    tonight: Logs
    baseline: Baseline
    policy: Policy
    processes: int
    """Of a night: what one of the baseline's `nights` was averaged over."""
    part: str = CALL

    @classmethod
    def of(cls, run: Run, baseline: Baseline, policy: Policy, processes: int, part: str = CALL) -> _Look:
        sound = {id: r for id, r in run.items() if r and not obstacle(id, r, baseline, clocked=True)}
        base = _part_logs({id: level.processes for id, level in baseline.levels.items()}, part)
        tonight = _part_logs({id: measured(results) for id, results in sound.items() if id in base}, part)
        return cls(base=base, tonight=tonight, baseline=baseline, policy=policy, processes=processes, part=part)

    @property
    def _over(self) -> Over:
        return {id: self.policy.divisor(id) for id in self.base}

    def absolute(self, level: str) -> Comparison:
        """Seconds, or the ratio to the policy's divisor, against the baseline's."""
        return self._compare(level, self._over, level)

    def ladder(self, level: str) -> Comparison | None:
        """The ratio to the parent against the same ratio in the baseline; None where the parent cannot be judged."""
        parent = self.policy.parents.get(level)
        if parent is None or parent not in self.base or parent not in self.tonight:
            return None
        if self.baseline.source == "published":
            return None
        over = {id: up for id in self.base if (up := self.policy.parents.get(id)) in self.base}
        return self._compare(level, over, level, parent)

    def drift(self, level: str) -> float | None:
        """How far the other levels moved, as a log ratio: their median, None if they are too few to tell."""
        others = [id for id in self.tonight if id != level and self.policy.divisor(id) in (None, *self.tonight)]
        moved = [float(self.absolute(id).ratio) for id in others]
        return float(np.median(moved)) if len(moved) >= MANY else None

    def looks_red(self, level: str, rule: str) -> bool:
        found = self.absolute(level) if rule == "interval" else self.ladder(level)
        return bool(found is not None and found.slower)

    def red(self, level: str) -> list[str]:
        """The rules that fire.

        A step over a parent also shrinks when only the parent got faster. That is no regression, so the ladder alone
        fires only for a level that is also slower than the rest of the ladder moved.
        """
        own, drift = self.absolute(level), self.drift(level)
        behind = drift is not None and own.ratio - drift > own.limit
        # A second ladder would make one night in a thousand red for nothing, where a few levels have two modes.
        asked = ("interval", "ladder") if self.part == CALL else ("interval",)
        return [rule for rule in asked if self.looks_red(level, rule) and (rule == "interval" or own.slower or behind)]

    def blame(self, level: str) -> str:
        """Where to look: the divisor, the optimisation that stopped paying, a level below, or the machine."""
        divisor = self.policy.divisor(level)
        if divisor and self.policy.divisor(divisor) in {*self.tonight} - {level} and self.absolute(divisor).faster:
            return f"{divisor!r} itself got faster, which raises every ratio to it: if that is meant, {ACCEPT}."
        at: str | None = level
        while at is not None and at in self.tonight and not self.looks_red(at, "ladder"):
            at = self.policy.parents.get(at)
        if at is not None and at in self.tonight:
            parent = self.policy.parents[at]
            was = float(np.exp(-_series(self.base, at, parent).mean()))
            now = float(np.exp(-_series(self.tonight, at, parent).mean()))
            inherited = "" if at == level else f"{level!r} inherits this: its own step is unchanged. "
            return (
                f"{inherited}The optimisation that stopped paying is {self.policy.own_fields.get(at)} "
                f"({parent} -> {at}): it was worth x{was:.3f} and is worth x{now:.3f}. "
                f"Bisect what changed in that step, or {ACCEPT}."
            )
        drift = self.drift(level)
        if drift is not None and drift > self.absolute(level).limit:
            return (
                f"No step of the ladder changed, but the other levels moved by {_percent(drift)} (median): look at "
                f"the machine, driver and torch build{' and the divisor' if self.policy.relative_to else ''} first."
            )
        return "No single step of the ladder stands out: look at this level and at what changed since the baseline."

    def describe(self, level: str) -> tuple[str, dict[str, float | None]]:
        """The observation as text, and its numbers: ratios, except `limit` and `smallest_visible` (0.02 is +2 %)."""
        own, step, over = self.absolute(level), self.ladder(level), self.policy.divisor(level)
        base, tonight = (_series(logs, level, over) for logs in (self.base, self.tonight))
        visible = noise.visible(base, len(tonight), self._spread(level, self._over), own.limit, self.policy)
        unit = " s" if over is None else f" of {over}"
        kind = "published" if self.baseline.source == "published" else "recorded"
        what = f"{level!r}" if self.part == CALL else f"The denoising loop of {level!r}"
        text = (
            f"{what} took {math.exp(tonight.mean()):.4g}{unit} ({len(tonight)} process(es)); the {kind} baseline "
            f"of {self.baseline.slug!r} says {math.exp(base.mean()):.4g}{unit} ({len(base)} process(es)). That is "
            f"{_percent(own.ratio)}, interval {_percent(own.low)} to {_percent(own.high)}, limit "
            f"{_percent(own.limit)}, {'no' if own.above else 'some'} overlap with the baseline's slowest process; "
            f"smallest visible change {_percent(visible)}."
        )
        if step is not None:
            text += (
                f" Over its parent {self.policy.parents[level]!r}: {_percent(step.ratio)}, interval "
                f"{_percent(step.low)} to {_percent(step.high)}, limit {_percent(step.limit)}."
            )
        if kind == "published":
            text += f" Published numbers bound from above only ({self.baseline.source_note})."
        elif len(base) < self.policy.min_processes:
            text += f" The interval is wide because the baseline has under {self.policy.min_processes} processes."
        ratios = {"ratio": own.ratio, "low": own.low, "high": own.high, "drift": self.drift(level)}
        for name in ("ratio", "low", "high"):
            ratios[f"ladder_{name}"] = None if step is None else getattr(step, name)
        numbers = {name: None if value is None else math.exp(min(value, WIDEST)) for name, value in ratios.items()}
        numbers |= {"limit": math.expm1(own.limit), "smallest_visible": math.expm1(min(visible, WIDEST))}
        return text, numbers | {"processes": float(len(tonight)), "baseline_processes": float(len(base))}

    def _squares(self, level: str, over: Over) -> noise.Squares:
        """Squared deviations within the baseline and within tonight, each about its own mean, and their freedom."""
        parts = [
            noise.squares(_series(logs, level, over[level]))
            for logs in (self.base, self.tonight)
            if level in logs and (over[level] is None or over[level] in logs)
        ]
        return sum(s for s, _ in parts), sum(n for _, n in parts)

    def _spread(self, level: str, over: Over) -> noise.Spread:
        # Not the divisor's own series: it shares noise with this one, or is this one upside down.
        others = [self._squares(id, over) for id in over if id not in (level, over[level])]
        return noise.spread(self._squares(level, over), others, self.policy)

    def _compare(self, level: str, over: Over, *limits: str) -> Comparison:
        base, tonight = (_series(logs, level, over[level]) for logs in (self.base, self.tonight))
        limit = max(self._limit(id) for id in limits)
        return noise.compare(base, tonight, self._spread(level, over), limit, self.policy)

    def _limit(self, level: str) -> float:
        if self.baseline.source == "published":
            return self.policy.published_margin
        error = noise.error(len(self.base[level]), self.processes, self._spread(level, self._over))
        own = self.baseline.levels[level]
        nights = np.array(own.nights if self.part == CALL else own.loop_nights, dtype=float)
        return float(noise.limit(np.clip(nights, -WIDEST, WIDEST), error, self.policy))


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(min(log_ratio, WIDEST)):+z.2f} %"

"""What comes before numbers: did it fail, was it disturbed, does it compare, is there a baseline. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fluxfast.levels import DEFAULTS, LADDER, LEVELS
from perf_tests.harness.cpu import is_cpu
from perf_tests.harness.policy import Policy
from perf_tests.harness.schema import Baseline, Counters, Measurement, Outcome, Proof, Result, Verdict

ACCEPT = "accept it with `--update-baseline --reason`"
"""Only beside the rules of `plugin.ACCEPTABLE`."""


def command(workload: str) -> str:
    """How a command that measures `workload` begins: what is measured by default depends on the machine."""
    return f"pytest perf_tests --workload {workload}"


def record_advice(workload: str, levels: Iterable[str] = (), held: Collection[str] = ()) -> str:
    """The clause that tells how to record; for the rest as `record_command`."""
    return f"record one on a quiet machine with `{record_command(levels, held, command(workload))}`"


def record_command(levels: Iterable[str], held: Collection[str], start: str) -> str:
    """The command that records a baseline in which `levels` are.

    Args:
        held: levels of the baseline that judges, which a recording measures anyway; those beside the ladder have to be
            named once `--levels` is given.
        start: what the command begins with.
    """
    beside = [level for level in LEVELS if level not in {own.id for own in LADDER}]
    if not any(level in beside and level not in held for level in levels):
        return f"{start} --record-baseline"
    named = ",".join(["ladder", *(level for level in beside if level in {*levels, *held})])
    return f"{start} --levels {named} --record-baseline"


def verdict(
    outcome: Outcome,
    level: str,
    rule: str,
    message: str,
    results: Sequence[Result] = (),
    numbers: Mapping[str, float | None] | None = None,
) -> Verdict:
    """A verdict whose message begins with the faults injected into `results`, so that no red is taken for real."""
    injected = sorted({result.injection for result in results if result.injection})
    prefix = f"[fault injected on purpose: {', '.join(injected)}] " if injected else ""
    return Verdict(outcome=outcome, level=level, rule=rule, message=prefix + message, numbers=dict(numbers or {}))


def obstacle(level: str, results: Sequence[Result], baseline: Baseline | None, *, clocked: bool) -> Verdict | None:
    """The verdict that comes before numbers, None if the numbers may be judged.

    Args:
        clocked: whether times are judged; throttling and neighbours change times, not counts and bytes.

    Raises:
        ValueError: if there is no result at all.
    """
    if not results:
        raise ValueError(f"level {level!r} has no result to judge; the runner writes one a process, even for a hang")
    return (
        _failed(level, results)
        or (_disturbed(level, results, baseline) if clocked else None)
        or _uncomparable(level, results, baseline)
    )


def no_divisor(level: str, run: Mapping[str, Sequence[Result]], baseline: Baseline, policy: Policy) -> Verdict | None:
    """The verdict where latency is a ratio to a level that this run cannot be divided by, else None."""
    divisor = policy.divisor(level)
    if policy.relative_to is None:
        return None
    if divisor is None or not run.get(divisor) or divisor not in baseline.levels:
        workload = run[level][0].workload
        missing, action = "the baseline", record_advice(workload).capitalize()
        if divisor in baseline.levels:
            missing, action = "it", f"Run both together: `{command(workload)} --levels {divisor},{level}`"
        message = (
            f"on {policy.slug!r} latency is a ratio to {divisor!r} of this run, which is not in {missing}. {action}."
        )
        return verdict(Outcome.INCOMPARABLE, level, "divisor", message, run[level])
    if found := obstacle(divisor, run[divisor], baseline, clocked=True):
        message = f"latency of {level!r} is a ratio to {divisor!r} of the same run, and that gave: {found.explain()}"
        is_own = found.outcome in (Outcome.VOID, Outcome.ERROR)
        return verdict(found.outcome if is_own else Outcome.INCOMPARABLE, level, "divisor", message, run[level])
    return None


def measured(results: Sequence[Result]) -> list[Measurement]:
    """The measurements in process order."""
    return [r.measurement for r in sorted(results, key=lambda r: r.process) if r.measurement]


def _failed(level: str, results: Sequence[Result]) -> Verdict | None:
    for result in results:
        if failure := result.failure:
            message = (
                f"process {result.process} failed in stage {failure.stage!r} with exit status {failure.exit_status}: "
                f"{failure.message} Reproduce with `{failure.command}`. End of its log:\n{failure.log_tail}"
            )
            return verdict(Outcome.ERROR, level, failure.kind.value, message, results)
        if result.measurement is None:
            raise ValueError(f"process {result.process} of level {level!r} has neither a measurement nor a failure")
    return None


def disturbances(counters: Counters | None) -> list[str]:
    """What the counters say against a timing. A GPU at its software power cap is normal at full load and is nothing."""
    if counters is None:
        return []
    why = [
        f"{name} rose by {nanoseconds} during the timed rounds"
        for name in ("thermal_violation_ns", "hw_slowdown_ns", "power_brake_ns")
        if (nanoseconds := getattr(counters, name))
    ]
    if counters.foreign_pids:
        why.append(f"another process used the same GPU (pid {', '.join(map(str, counters.foreign_pids))})")
    return why


def why_disturbed(result: Result, baseline: Baseline | None) -> list[str]:
    """What speaks against a process's times: its `disturbances`, and another power limit than the baseline's."""
    why = disturbances(result.counters)
    expected = baseline.environment.power_limit_w if baseline and baseline.environment else None
    observed = result.environment.power_limit_w if result.environment else None
    if expected is not None and observed != expected:
        why.append(f"the power limit is {observed} W, but {expected} W when the baseline was recorded")
    return why


def _disturbed(level: str, results: Sequence[Result], baseline: Baseline | None) -> Verdict | None:
    for result in results:
        if why := why_disturbed(result, baseline):
            message = (
                f"process {result.process} was disturbed: {'; '.join(why)}. This is neither pass nor fail: "
                "quiet the machine and run again."
            )
            return verdict(Outcome.VOID, level, "disturbed", message, results)
    return None


def _uncomparable(level: str, results: Sequence[Result], baseline: Baseline | None) -> Verdict | None:
    if baseline is None:
        advice = record_advice(results[0].workload, [level])
        message = f"there is no baseline for this machine, so level {level!r} cannot be judged: {advice}."
        return verdict(Outcome.NO_BASELINE, level, "no_baseline", message, results)
    for result in results:
        differences = _differences(level, result, baseline)
        if differences:
            message = (
                f"process {result.process} measured something else than the baseline of {baseline.slug!r}: "
                f"{'; '.join(differences)}. Undo the change or, if it is meant, "
                f"{_recording(level, baseline, result.workload)}."
            )
            return verdict(Outcome.INCOMPARABLE, level, "changed", message, results)
    if level not in baseline.levels:
        message = (
            f"the baseline of {baseline.slug!r} has no level {level!r}, only {', '.join(baseline.levels)}: "
            f"if the level is new or renamed, {_adding(level, baseline, results)}."
        )
        return verdict(Outcome.NO_BASELINE, level, "no_baseline", message, results)
    return None


def facts_of(proofs: Sequence[Proof]) -> set[tuple[str, str, int]]:
    """What makes a fact the same in two runs: field, what is counted, how often it is expected."""
    return {(proof.field, proof.what, proof.expected) for proof in proofs}


def _adding(level: str, baseline: Baseline, results: Sequence[Result]) -> str:
    """How a baseline comes to hold a level beside those that it holds; a file says one environment for all of them."""
    is_as_it_was = not any(
        result.environment and result.environment.changes(baseline.environment) for result in results
    )
    if baseline.source == "recorded" and not is_cpu(baseline.slug) and is_as_it_was:
        start = command(results[0].workload)
        return f"add it on a quiet machine with `{start} --levels {level} --update-baseline`"
    return _recording(level, baseline, results[0].workload)


def _recording(level: str, baseline: Baseline, workload: str) -> str:
    return record_advice(workload, [level], baseline.levels if baseline.source == "recorded" else ())


def _differences(level: str, result: Result, baseline: Baseline) -> list[str]:
    found = []
    # A published number came about by its publisher's method; it only bounds from above.
    if result.method != baseline.method and baseline.source == "recorded":
        found.append(f"method {result.method!r}, baseline {baseline.method!r}")
    if result.workload_digest != baseline.workload_digest:
        found.append(f"workload digest {result.workload_digest}, baseline {baseline.workload_digest}")
    if expected := baseline.levels.get(level):
        # An optimisation that came after the baseline was off in it.
        own, theirs = DEFAULTS | result.fields, DEFAULTS | expected.fields
        for field in sorted(own.keys() | theirs.keys()):
            if own.get(field) != theirs.get(field):
                found.append(f"{field}={own.get(field)!r}, baseline {theirs.get(field)!r}")
        for field in sorted(result.unavailable.keys() - expected.unavailable.keys()):
            found.append(f"{field} is no longer available here ({result.unavailable[field]})")
        for field in sorted(expected.unavailable.keys() - result.unavailable.keys()):
            found.append(f"{field} is now available, but was not for the baseline ({expected.unavailable[field]})")
    return found

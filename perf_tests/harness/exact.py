"""The judges of counts, images, errors and bytes: one look, no retry. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perf_tests.harness import noise
from perf_tests.harness.obstacles import ACCEPT, facts_of, measured, obstacle, record_advice, verdict
from perf_tests.harness.policy import (
    ALIKE,
    MOST_BF16_ERROR,
    MOST_STEP_ERROR,
    Policy,
    direction,
    fidelity_floor,
    roundoff_factor,
)
from perf_tests.harness.schema import Baseline, LevelBaseline, Outcome, Result, Verdict


def judge_structure(level: str, results: Sequence[Result], baseline: Baseline | None) -> Verdict:
    """Did every optimisation take effect as often as expected, and is every fact of the baseline still counted?

    A count that does not hold is red with or without a baseline. Facts that came after the baseline have nothing to be
    compared with.
    """
    found = obstacle(level, results, baseline, clocked=False)
    if found and found.outcome is Outcome.ERROR:
        return found
    for measurement in measured(results):
        for proof in measurement.proofs:
            if not proof.holds:
                message = (
                    f"field {proof.field!r} did not take effect: {proof.what} was counted {proof.observed} times, "
                    f"expected {proof.expected}. This level's timing is that of a level below: mend the step."
                )
                numbers = {"observed": float(proof.observed), "expected": float(proof.expected)}
                return verdict(Outcome.REGRESSED, level, "count", message, results, numbers)
    if found:
        return found
    assert baseline is not None
    expected = facts_of(baseline.levels[level].proofs)
    for measurement in measured(results):
        observed = facts_of(measurement.proofs)
        if missing := expected - observed:
            instead = {fact for fact in observed - expected if fact[0] in {field for field, _, _ in missing}}
            message = (
                f"facts of the baseline of {baseline.slug!r} are missing: {sorted(missing)}; counted instead: "
                f"{sorted(instead) or 'none'}. A missing fact is an optimisation no longer proven; if the "
                f"change is meant, {ACCEPT}."
            )
            return verdict(Outcome.REGRESSED, level, "facts", message, results)
    count = len(measured(results)[0].proofs)
    return verdict(Outcome.PASS, level, "count", f"all {count} counted facts hold in every process.", results)


def judge_fidelity(
    level: str,
    values: Mapping[str, float],
    method: Mapping[str, Any],
    baseline: Baseline | None,
    policy: Policy,
    results: Sequence[Result] = (),
    reference: Mapping[str, float] | None = None,
) -> Verdict:
    """Is any metric of the image worse than the baseline's fresh runs allow?

    An image that has next to nothing in common with the same run's bf16 is red with or without a baseline.
    The limit is a Student prediction bound on one more run, at least `fidelity_floor` away from the baseline's mean.
    A sixth of the floor is the spread assumed before runs show their own: a baseline of one value gives a
    wide limit. How far the baseline's `policy.rounding_level` is from a perfect score is the least floor.

    Args:
        values: metric -> the worst of this run's processes.
        method: metric -> variant and parameters, as the baseline stores them.
        results: of the level, for what comes before numbers.
        reference: `values` of the same run's bf16, which may be what changed.
    """
    found = obstacle(level, results, baseline, clocked=False) if results else None
    if found and found.outcome is Outcome.ERROR:
        return found
    blamed = ""
    if baseline and method == baseline.fidelity_method:
        blamed = _blame_bf16(reference or {}, baseline, policy)
    for metric, bound in ALIKE.items():
        if metric in values and not _sign(metric) * (values[metric] - bound) <= 0:
            message = (
                f"{metric} to the same run's bf16 image is {values[metric]:.3f}, expected "
                f"{'at most' if _sign(metric) > 0 else 'at least'} {bound}: the two are different pictures, and no "
                f"number format explains that. {blamed or 'Look at both, and at this level first.'}"
            )
            return verdict(Outcome.REGRESSED, level, "wrong_image", message, results, {metric: _finite(values[metric])})
    if found:
        return found
    stored = baseline.levels.get(level) if baseline else None
    if baseline is None or stored is None or not stored.fidelity:
        advice = _recording(results, baseline)
        message = f"there is no fidelity of level {level!r} for {policy.slug!r} to compare with: {advice}."
        return verdict(Outcome.NO_BASELINE, level, "no_baseline", message, results)
    if method != baseline.fidelity_method:
        theirs = baseline.fidelity_method
        changed = sorted(name for name in method.keys() | theirs.keys() if method.get(name) != theirs.get(name))
        message = (
            f"{', '.join(changed)} of an image came about otherwise in the baseline of {baseline.slug!r}, so the "
            f"numbers do not compare. Undo the change of method or, if it is meant, {_recording(results, baseline)}."
        )
        return verdict(Outcome.INCOMPARABLE, level, "method", message, results)
    numbers: dict[str, float | None] = {}
    worse, text = [], []
    for metric in sorted(values.keys() | stored.fidelity.keys()):
        way = direction(metric)
        value = values.get(metric)
        if way == "informational":
            numbers[metric] = _finite(value)
            continue
        if value is None or not math.isfinite(value):
            what = "was not measured, but the baseline has it" if value is None else f"is {value}"
            message = f"{metric} {what}: look for NaN in the output of {level!r}, or a missing reference image."
            return verdict(Outcome.REGRESSED, level, "not_finite", message, results, numbers)
        if not stored.fidelity.get(metric):
            message = (
                f"the baseline of {policy.slug!r} has no {metric} of level {level!r}: {_recording(results, baseline)}."
            )
            return verdict(Outcome.NO_BASELINE, level, "no_baseline", message, results, numbers)
        known = [_clamped(one) for one in stored.fidelity[metric]]
        limit = _image_limit(metric, known, baseline, policy)
        numbers |= {metric: value, f"{metric}_limit": limit}
        text.append(f"{metric} {value:.4f} (limit {limit:.4f}, {len(known)} baseline runs around {np.mean(known):.4f})")
        if _sign(metric) * (value - limit) > 0:
            worse.append(metric)
    if worse:
        action = f"Look at the saved difference map; if it is a new kernel that rounds otherwise, {ACCEPT}."
        if blamed and not any(metric.endswith("_stored") for metric in worse):
            action = f"This level's image did not leave the stored one. {blamed}"
        message = f"{' and '.join(worse)} beyond the limit: {'; '.join(text)}. {action}"
        return verdict(Outcome.REGRESSED, level, "limit", message, results, numbers)
    return verdict(Outcome.PASS, level, "limit", f"{'; '.join(text)}.", results, numbers)


def judge_step_error(
    level: str,
    results: Sequence[Result],
    error: float,
    bf16_error: float,
    baseline: Baseline | None,
    policy: Policy,
) -> Verdict:
    """Is the one-step output's relative L2 error against float32 what the level's number formats explain?

    Two bounds: k x error(bf16) of the same run with k from the formats' roundoff, short of the error of unrelated
    outputs, and what the baseline's runs show. The first holds with or without a baseline.

    Args:
        results: of the level; its effective fields say in which formats it computes.
        error, bf16_error: the largest of the processes of this level and of bf16.
    """
    found = obstacle(level, results, baseline, clocked=False)
    if found and found.outcome is Outcome.ERROR:
        return found
    if not (math.isfinite(error) and math.isfinite(bf16_error) and bf16_error > 0):
        message = (
            f"step error {error} with bf16's {bf16_error}: both have to be finite and bf16's positive. Look for NaN "
            f"in the first step of {level!r}, or for a bf16 that ran in float32."
        )
        return verdict(Outcome.REGRESSED, level, "not_finite", message, results)
    factor, source = roundoff_factor(results[0].fields)
    numbers: dict[str, float | None] = {"step_error": error, "bf16_step_error": bf16_error}
    # A level finer than bf16 is allowed next to nothing of it, whatever it is.
    if bf16_error > MOST_BF16_ERROR and factor > 1:
        message = f"bf16's first step is {bf16_error:.3g} from float32's, expected at most {MOST_BF16_ERROR}"
        if level != "bf16":
            message = f"not judged: {message}, and a multiple of that allows anything. Mend bf16: its own test is red."
            return verdict(Outcome.ERROR, level, "reference", message, results, numbers)
        message += (
            ": either bf16 computes something wrong, or the two do not start from the same weights and noise. Look at "
            "what changed in bf16's kernels, and at what is drawn in the pipeline's own dtype."
        )
        return verdict(Outcome.REGRESSED, level, "reference", message, results, numbers)
    bounds = {"roundoff": min(factor * bf16_error, MOST_STEP_ERROR)}
    text = (
        f"{factor:.3g} x bf16's {bf16_error:.3g}, {MOST_STEP_ERROR} at most = {bounds['roundoff']:.3g} (k = {source})"
    )
    if baseline and not found and baseline.levels[level].step_error:
        known = np.array([_clamped(one) for one in baseline.levels[level].step_error])
        floor, mean = step_error_floor(level, baseline, policy), float(known.mean())
        own = _prediction_margin(known, policy.step_error_floor * mean, policy)
        bounds["baseline"] = mean + max(floor * mean, own)
        text += f", and {bounds['baseline']:.3g} from {len(known)} baseline runs around {known.mean():.3g}"
        text += f" ({floor:.0%} at least)"
    else:
        text += "; no baseline's step error to compare with, so only this bound applies"
    numbers |= {f"{name}_limit": bound for name, bound in bounds.items()}
    message = f"one-step error against float32 is {error:.3g}; allowed: {text}."
    for rule, bound in bounds.items():
        # Two runs of one float32 program differ by a rounding of the result, whatever the baseline shows.
        if error > bound + 2.0**-23:
            action = "The level computes in a coarser format or a wrong one: look at its own field first."
            if rule == "baseline":
                action += f" If another kernel rounds otherwise, {ACCEPT}."
            return verdict(Outcome.REGRESSED, level, rule, f"{message} {action}", results, numbers)
    return found or verdict(Outcome.PASS, level, "limit", message, results, numbers)


def judge_memory(level: str, results: Sequence[Result], baseline: Baseline | None, policy: Policy) -> Verdict:
    """Are the transformer's weights exactly, and peak memory at most, what the baseline has?

    Peak: red beyond the baseline's largest by more than its own range or `memory_floor`, whichever is larger.
    """
    if found := obstacle(level, results, baseline, clocked=False):
        return found
    assert baseline is not None
    expected = baseline.levels[level]
    if expected.transformer_weight_bytes is None or not expected.peak_memory_bytes:
        holds = f"the {baseline.source} baseline of {baseline.slug!r} holds no memory of level {level!r}"
        message = f"{holds}: {_recording(results, baseline)}."
        return verdict(Outcome.NO_BASELINE, level, "no_baseline", message, results)
    low, high = min(expected.peak_memory_bytes), max(expected.peak_memory_bytes)
    tolerance = max(high - low, policy.memory_floor * high)
    weights = [m.transformer_weight_bytes for m in measured(results)]
    peak = min(m.peak_memory_bytes for m in measured(results))
    numbers: dict[str, float | None] = {
        "transformer_weight_bytes": float(weights[0]),
        "peak_memory_bytes": float(peak),
        "peak_memory_limit_bytes": high + tolerance,
    }
    for observed in weights:
        if observed != expected.transformer_weight_bytes:
            message = (
                f"the transformer holds {observed} bytes of weights, the baseline exactly "
                f"{expected.transformer_weight_bytes}: another dtype, quantization or model. Mend it or, if it is "
                f"meant, {ACCEPT}."
            )
            return verdict(Outcome.REGRESSED, level, "weights", message, results, numbers)
    text = (
        f"peak memory {peak / 2**20:.1f} MiB (smallest of {len(weights)} process(es)); baseline {low / 2**20:.1f} to "
        f"{high / 2**20:.1f} MiB, tolerance {tolerance / 2**20:.1f} MiB; weights equal."
    )
    if peak > high + tolerance:
        action = "Look for a second copy of weights or a larger workspace in this level's own step; if it is meant, "
        action += f"{ACCEPT}."
        return verdict(Outcome.REGRESSED, level, "peak", f"{text} {action}", results, numbers)
    if peak < low - tolerance:
        stale = "The baseline is stale: run with `--update-baseline`."
        return verdict(Outcome.IMPROVED, level, "peak", f"{text} {stale}", results, numbers)
    return verdict(Outcome.PASS, level, "peak", text, results, numbers)


def _clamped(value: float) -> float:
    """Of a stored number whose square and mean still have a place in a float: more is no measurement of anything."""
    return float(max(-1e18, min(value, 1e18)))


def _finite(value: float | None) -> float | None:
    """What a verdict can hold as a number."""
    return value if value is not None and math.isfinite(value) else None


def _sign(metric: str) -> float:
    """By which a metric grows as it gets worse."""
    return 1.0 if direction(metric) == "higher_is_worse" else -1.0


def _image_limit(metric: str, known: Sequence[float], baseline: Baseline, policy: Policy) -> float:
    """What one more run of a level whose baseline runs had `known` may have."""
    floor = max(fidelity_floor(metric), _rounding(metric, baseline.levels.get(policy.rounding_level or "")))
    runs = np.array([_clamped(one) for one in known])
    return float(runs.mean()) + _sign(metric) * _prediction_margin(runs, floor, policy)


def _recording(results: Sequence[Result], baseline: Baseline | None) -> str:
    return record_advice(str(baseline.workload["id"]) if baseline else results[0].workload)


def _blame_bf16(values: Mapping[str, float], baseline: Baseline, policy: Policy) -> str:
    """That bf16's image is not the stored one, which every level's is compared with; empty if it is."""
    known = baseline.levels["bf16"].fidelity if "bf16" in baseline.levels else {}
    left = [
        metric
        for metric, value in values.items()
        if known.get(metric) and direction(metric) != "informational"
        if not _sign(metric) * (value - _image_limit(metric, known[metric], baseline, policy)) <= 0
    ]
    return f"bf16's own image left the stored one ({' and '.join(left)}): mend bf16." if left else ""


def _rounding(metric: str, level: LevelBaseline | None) -> float:
    """How far a metric of `level` against bf16 is from that of two identical images."""
    known = level.fidelity.get(metric.removesuffix("_stored")) if level else None
    if not known:
        return 0.0
    return abs(float(np.mean([_clamped(one) for one in known])) - (0.0 if _sign(metric) > 0 else 1.0))


def step_error_floor(level: str, baseline: Baseline, policy: Policy) -> float:
    """The relative change of `level`'s step error that another way to round explains.

    Runs of one compiled level differ by what its compilations round otherwise. Another version may do that to a level
    whose own compilations agree, so of those with the same coarsest format the one that differs most speaks for all.
    """
    own = baseline.levels[level].fields
    if own.get("compile_mode") == "none":
        return policy.step_error_floor
    ranges = [policy.step_error_floor]
    for other in baseline.levels.values():
        is_alike = other.fields.get("compile_mode") != "none" and roundoff_factor(other.fields) == roundoff_factor(own)
        runs = np.array([_clamped(one) for one in other.step_error])
        if is_alike and len(runs) and runs.mean() > 0:
            ranges.append(float(np.ptp(runs) / runs.mean()))
    return min(max(ranges), policy.step_error_cap)


def _prediction_margin(known: noise.Array, floor: float, policy: Policy) -> float:
    """How far one more run may lie from the mean of `known`; a sixth of the floor is assumed before any is seen."""
    squares, df = noise.squares(known)
    weight = policy.night_weight
    sd = math.sqrt((weight * (floor / 6) ** 2 + squares) / (weight + df))
    one_more = noise.quantile(weight + df, policy.exact_alpha) * sd * math.sqrt(1 + 1 / len(known))
    return max(floor, float(one_more))

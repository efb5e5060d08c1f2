"""From results to a baseline, and the stock pytest-benchmark part of one; `store.write_baseline` writes both."""

from __future__ import annotations

import datetime
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest_benchmark
from pydantic import ValidationError
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

from perf_tests.harness.cpu import is_cpu
from perf_tests.harness.obstacles import disturbances
from perf_tests.harness.schema import (
    METHOD,
    Baseline,
    Counters,
    Environment,
    LevelBaseline,
    Measurement,
    ProcessSamples,
    Result,
)
from perf_tests.harness.store import MIN_PROCESSES as MIN_PROCESSES
from perf_tests.harness.store import BaselineError, level_samples

UNACCEPTABLE = "a run with a failed, void, injected or partial result can never become a baseline"


def void_reason(counters: Counters | None) -> str | None:
    """Why a number measured under these counters is neither good nor bad; None if it stands."""
    return "; ".join(disturbances(counters)) or None


def baseline_from_results(
    results: Mapping[str, Sequence[Result]],
    *,
    levels: Sequence[str],
    workload: Mapping[str, Any],
    slug: str,
    fidelity: Mapping[str, Mapping[str, Sequence[float]]],
    step_errors: Mapping[str, Sequence[float]],
    fidelity_method: Mapping[str, Any],
    reference_png: bytes | None,
) -> Baseline:
    """A baseline of one complete, undisturbed run.

    Args:
        results: level id -> one result a fresh process.
        levels: ids that the run must hold, no more and no fewer.
        workload: `dataclasses.asdict` of the workload; its `id` and `rounds` are read.
        slug: of the machine; anything but a CPU needs NVML counters in every result.
        fidelity: level id -> metric -> one value a process.
        step_errors: level id -> one relative L2 of the one-step output a process.
        fidelity_method: metric -> variant and parameters.
        reference_png: the run's bf16 image; write it as `images={baseline.reference_image: reference_png}`.

    Raises:
        BaselineError: naming the first result that is failed, void, injected, partial or of another workload, method
            or environment than the rest.
    """
    if odd := set(results) ^ set(levels):
        raise BaselineError(f"levels missing or not expected: {', '.join(sorted(odd))}; {UNACCEPTABLE}")
    first = next((result for own in results.values() for result in own), None)
    if first is None:
        raise BaselineError(f"the run holds no result; {UNACCEPTABLE}")
    for level, own in results.items():
        if len(own) < MIN_PROCESSES or len({result.process for result in own}) != len(own):
            raise BaselineError(
                f"level {level!r}: {len(own)} results of processes {[result.process for result in own]}, "
                f"expected at least {MIN_PROCESSES} different ones; {UNACCEPTABLE}"
            )
        for result in own:
            _refuse_unfit(result, level, first, workload, slug)
        _refuse_disagreement(own, level)
    name, sha256 = None, None
    if reference_png is not None:
        sha256 = hashlib.sha256(reference_png).hexdigest()
        # Named by content: a later baseline's image never collides with one that an earlier baseline still needs.
        name = f"reference/{workload['id']}-{sha256[:12]}.png"
    try:
        return Baseline(
            method=METHOD,
            source="recorded",
            slug=slug,
            workload=dict(workload),
            workload_digest=first.workload_digest,
            environment=first.environment,
            levels={
                level: _level_baseline(level, results[level], fidelity.get(level, {}), step_errors.get(level, ()))
                for level in levels
            },
            reference_image=name,
            reference_sha256=sha256,
            fidelity_method=dict(fidelity_method),
        )
    except ValidationError as bad:
        raise _invalid(bad, "the baseline") from bad


def machine_info(slug: str, environment: Environment | None) -> dict[str, Any]:
    """pytest-benchmark's `machine_info` without host name and current clock, so that it compares equal between runs.

    For `pytest_benchmark_generate_machine_info` too: a difference makes pytest-benchmark warn.
    """
    facts = {} if environment is None else environment.model_dump(mode="json")
    return {"node": slug, "machine": slug, "cpu": {"brand_raw": facts.get("cpu_name")}, **facts}


def stock_json(
    baseline: Baseline, nodeid_prefix: str = "perf_tests/test_latency.py::test_latency", moment: str | None = None
) -> dict[str, Any]:
    """The stock part of a baseline file: what pytest-benchmark would have saved of the same samples.

    Args:
        baseline: the block.
        nodeid_prefix: of the latency tests; `--benchmark-compare` pairs by `<prefix>[<level>]`.
        moment: ISO date and time; default: now, UTC.
    """
    benchmarks = []
    for level, expected in baseline.levels.items():
        stats = Stats()
        for sample in level_samples(baseline, level):
            stats.update(sample)
        benchmarks.append(
            {
                "group": None,
                "name": f"{nodeid_prefix.rpartition('::')[2]}[{level}]",
                "fullname": f"{nodeid_prefix}[{level}]",
                "params": {"level": level},
                "param": level,
                "extra_info": {"process_medians_s": [statistics.median(p.samples_s) for p in expected.processes]},
                "options": {"disable_gc": False, "timer": baseline.method, "min_rounds": 1, "warmup": False},
                "stats": {**stats.as_dict(), "data": list(stats.data), "iterations": 1},
            }
        )
    return {
        "machine_info": machine_info(baseline.slug, baseline.environment),
        "commit_info": get_commit_info(),
        "benchmarks": benchmarks,
        "datetime": moment or datetime.datetime.now(datetime.UTC).isoformat(),
        "version": pytest_benchmark.__version__,
    }


def _refuse_unfit(result: Result, level: str, first: Result, workload: Mapping[str, Any], slug: str) -> None:
    observed = None
    if result.failure is not None or result.measurement is None:
        observed = f"failed ({result.failure.kind.value if result.failure else 'nothing measured'})"
    elif result.injection is not None:
        observed = f"ran with the injection {result.injection!r}"
    elif result.level != level or result.workload != workload["id"]:
        observed = f"is of level {result.level!r}, workload {result.workload!r}, expected workload {workload['id']!r}"
    elif len(result.measurement.samples_s) < workload["rounds"]:
        observed = f"holds {len(result.measurement.samples_s)} of {workload['rounds']} rounds"
    elif not all(proof.holds for proof in result.measurement.proofs):
        observed = "has a proof that does not hold"
    elif not is_cpu(slug) and result.counters is None:
        observed = "has no NVML counters, so that it may have been throttled"
    elif reason := void_reason(result.counters):
        observed = f"is void: {reason}"
    elif result.method != METHOD or result.workload_digest != first.workload_digest:
        observed = f"has method, workload {result.method, result.workload_digest}, not {METHOD, first.workload_digest}"
    elif result.environment is None or result.environment != first.environment:
        observed = "was measured in another environment than the first"
    if observed is not None:
        raise BaselineError(f"level {level!r}, process {result.process}: {observed}; {UNACCEPTABLE}")


def _refuse_disagreement(results: Sequence[Result], level: str) -> None:
    for result in results[1:]:
        for name in ("fields", "unavailable"):
            if getattr(result, name) != getattr(results[0], name):
                raise BaselineError(f"level {level!r}: {name} differ between its processes; {UNACCEPTABLE}")
        if _measured(result).proofs != _measured(results[0]).proofs:
            raise BaselineError(f"level {level!r}: proofs differ between its processes; {UNACCEPTABLE}")


def _measured(result: Result) -> Measurement:
    assert result.measurement is not None
    return result.measurement


def _invalid(bad: ValidationError, what: str) -> BaselineError:
    first = bad.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return BaselineError(f"{what}: {where} is {first['input']!r}: {first['msg']}; measure again")


def _level_baseline(
    level: str, results: Sequence[Result], fidelity: Mapping[str, Sequence[float]], step_error: Sequence[float]
) -> LevelBaseline:
    measured = [_measured(result) for result in results]
    try:
        return LevelBaseline(
            fields=results[0].fields,
            unavailable=results[0].unavailable,
            processes=[
                ProcessSamples(samples_s=m.samples_s, wall_s=m.wall_s, loop_s=m.loop_s, counters=result.counters)
                for m, result in zip(measured, results, strict=True)
            ],
            proofs=measured[0].proofs,
            peak_memory_bytes=[m.peak_memory_bytes for m in measured],
            transformer_weight_bytes=measured[0].transformer_weight_bytes,
            fidelity={metric: list(values) for metric, values in fidelity.items()},
            step_error=list(step_error),
        )
    except ValidationError as bad:
        raise _invalid(bad, f"level {level!r}") from bad

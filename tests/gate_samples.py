"""Results and baselines for the tests of the gate, from log medians; no measuring, no randomness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fluxfast.levels import LADDER, LEVELS
from perf_tests.harness.policy import policy_for
from perf_tests.harness.schema import (
    METHOD,
    Baseline,
    Counters,
    Environment,
    ErrorKind,
    Failure,
    LevelBaseline,
    Measurement,
    ProcessSamples,
    Proof,
    Result,
)

GPU, CPU = policy_for("h200-700w"), policy_for("cpu")
IDS = tuple(level.id for level in LADDER)
SPEED_S = {id: 3.0 * 0.8**number for number, id in enumerate(LEVELS)}
DIGEST = "0123456789abcdef"

BASE = (-0.003, -0.0015, 0.0, 0.0015, 0.003)
RUN = (-0.002, 0.0, 0.002)
CONFIRMATION = (-0.003, -0.002, -0.002, -0.001, -0.001, 0.0, 0.0, 0.001, 0.001, 0.002, 0.002, 0.003)
"""Log medians of quiet processes: a spread of a quarter of a per cent."""


def turned(logs: Sequence[float], level: str) -> list[float]:
    """In another order at every level: noise that all levels share would cancel between a level and its parent."""
    turn = 2 * list(LEVELS).index(level) % len(logs)
    return [*logs[turn:], *logs[:turn]]


PROOF = Proof(field="dtype", what="bfloat16 weights", observed=7, expected=7)


def environment(power_limit_w: int | None = 700) -> Environment:
    return Environment(
        python="3.11.0", torch="2.13.0", triton=None, torchao="0.18.0", diffusers="0.42.1", transformers="5.0.0",
        fa3=None, cuda=None, driver=None, device_name="a device", capability=None, power_limit_w=power_limit_w,
        cpu_name="a cpu", cpu_threads=2, platform="linux",
    )  # fmt: skip


def measurement(seconds: float, **change: Any) -> Measurement:
    """Samples whose median is `seconds`; their mean and least are not."""
    measured = Measurement(
        clock="wall", samples_s=[seconds, seconds * 1.5, seconds * 0.9], wall_s=[seconds] * 3, stages_s={}, load_s=1.0,
        apply_s=1.0, warmup_s=1.0, peak_memory_bytes=10_000_000, transformer_weight_bytes=500, proofs=[PROOF],
        inductor_config={}, image="image.png", image_sha256="0" * 64, step_output="step.npy",
    )  # fmt: skip
    return measured.model_copy(update=change)


def result(level: str, process: int = 0, log_ratio: float = 0.0, **change: Any) -> Result:
    return Result(
        level=level, workload="tiny", workload_digest=DIGEST, process=process, fields=LEVELS[level].fields(),
        unavailable={}, environment=environment(), counters=Counters(),
        measurement=measurement(SPEED_S[level] * math.exp(log_ratio)),
    ).model_copy(update=change)  # fmt: skip


def failed(level: str, process: int = 0) -> Result:
    failure = Failure(
        kind=ErrorKind.OOM, stage="warmup", message="out of memory.", exit_status=10, log_tail="the last line",
        command="python -m perf_tests.harness.worker x",
    )  # fmt: skip
    return result(level, process, measurement=None, failure=failure)


def run(
    slower: Mapping[str, float] | None = None, logs: Sequence[float] = RUN, levels: Sequence[str] = IDS
) -> dict[str, list[Result]]:
    """One run; `slower` holds the log ratio of levels that are."""
    shift = slower or {}
    return {id: [result(id, i, log + shift.get(id, 0.0)) for i, log in enumerate(turned(logs, id))] for id in levels}


def confirmation(slower: Mapping[str, float] | None = None, levels: Sequence[str] = IDS) -> dict[str, list[Result]]:
    return run(slower, CONFIRMATION, levels)


LOOP_SHARE = 0.8
REST = (0.11, -0.09, 0.03, -0.05, 0.07, -0.11, 0.09, -0.03, 0.05, -0.07)
"""Log ratios of the rest of a call in the processes of a level: text encoding on the host is restless."""


def with_loops(
    run: Mapping[str, Sequence[Result]], slower: Mapping[str, float] | None = None
) -> dict[str, list[Result]]:
    """The same run with its times as those of loops, `slower` by so much, and restless calls around them."""
    found = {}
    for level, results in run.items():
        found[level] = []
        for own, rest in zip(results, turned(REST, level), strict=False):
            assert own.measurement is not None
            loop_s = own.measurement.samples_s[0] * LOOP_SHARE * math.exp((slower or {}).get(level, 0.0))
            call_s = loop_s + SPEED_S[level] * (1 - LOOP_SHARE) * math.exp(rest)
            steps = {"step_0": [loop_s / 4] * 3, "step_1": [3 * loop_s / 4] * 3, "decode": [0.1] * 3}
            found[level].append(own.model_copy(update={"measurement": measurement(call_s, stages_s=steps)}))
    return found


def baseline_with_loops(levels: Sequence[str] = IDS, **change: Any) -> Baseline:
    """A baseline of restless calls around quiet loops; only `levels` have loops in it."""
    base = baseline(**change)
    found = with_loops(run(logs=BASE))
    for level in IDS:
        measured = [own.measurement for own in found[level] if own.measurement]
        processes = [
            ProcessSamples(samples_s=m.samples_s, loop_s=m.loop_s if level in levels else []) for m in measured
        ]
        base = with_level(base, level, processes=processes)
    return base


def level_baseline(level: str, logs: Sequence[float] = BASE, **change: Any) -> LevelBaseline:
    seconds = [SPEED_S[level] * math.exp(log) for log in turned(logs, level)]
    return LevelBaseline(
        fields=LEVELS[level].fields(),
        processes=[ProcessSamples(samples_s=[s, s * 1.5, s * 0.9]) for s in seconds],
        proofs=[PROOF],
        peak_memory_bytes=[10_000_000] * 5,
        transformer_weight_bytes=500,
        fidelity={"ssim": [0.97] * 5, "flip": [0.03] * 5, "flip_worst_tile": [0.1] * 5},
        step_error=[0.02] * 5,
    ).model_copy(update=change)


def baseline(
    slug: str = "h200-700w",
    logs: Mapping[str, Sequence[float]] | None = None,
    levels: Sequence[str] = IDS,
    **change: Any,
) -> Baseline:
    return Baseline(
        method=METHOD, source="recorded", slug=slug, workload={"id": "tiny"}, workload_digest=DIGEST,
        environment=environment(), levels={id: level_baseline(id, (logs or {}).get(id, BASE)) for id in levels},
    ).model_copy(update=change)  # fmt: skip


def with_level(base: Baseline, level: str, **change: Any) -> Baseline:
    """The same baseline with one level changed."""
    return base.model_copy(update={"levels": base.levels | {level: base.levels[level].model_copy(update=change)}})

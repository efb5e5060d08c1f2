"""A finished run -> one row a level -> `bench.csv`. What was not measured is empty, never a 0."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxfast.workloads import Workload
from perf_tests.bench.interval import interval, median
from perf_tests.harness import sanity
from perf_tests.harness.obstacles import disturbances, measured
from perf_tests.harness.policy import PARENTS, worst
from perf_tests.harness.schema import Environment, Measurement, Result
from perf_tests.harness.session import EXACT_LEVEL, REFERENCE_LEVEL, Session
from perf_tests.harness.store import ResultError

STAGES = ("text_encode", "steps", "decode", "postprocess", "other")
"""The parts of a call, in time's order; `other` is the call less its stages: noise, scheduler, host work."""
IMAGE_METRICS = ("ssim", "ssim_worst_tile", "flip", "flip_worst_tile")
Samples = dict[str, list[list[float]]]
"""Level -> for each process its rounds, seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One level. The fields are the columns, and those of `environment` follow them. None is an empty cell.

    Attributes:
        parent: the nearest level below that was measured in this run.
        error: why there are no numbers: the kind of failure, a colon, a sentence.
        disturbed: what throttled the device or shared it during the timed rounds, after one repetition, or without one
            that gave a measurement.
        without: fields of the level that this machine cannot run, each with the reason.
        processes, samples: fresh processes, and timed rounds in all of them.
        median_s: geometric mean of the medians of each process's rounds; seconds a `pipeline(...)` call on `clock`.
        low_s, high_s, confidence, interval_of: where the median lies, how sure, and how that was found (`interval.py`).
        min_s, max_s: fastest and slowest round.
        speedup_to_bf16, speedup_to_parent: the other's median over this one's.
        text_encode_s ... other_s: medians of all rounds; `steps_s` is all denoising steps of a call, `step_s` one.
        load_s, apply_s, warmup_s: medians of the processes: weights loaded, level applied, untimed calls.
        compile_s: `apply_s` and `warmup_s` less what the warm-up's calls take once warm; at least 0.
        peak_memory_bytes: the largest of the processes.
        ssim ... flip_worst_tile: the worst process's image against this run's bf16; none for random weights.
        step_error: relative L2 of the first step's output against this run's fp32, the worst process.
        samples_s: every round's seconds, separated by spaces, process after process.
    """

    level: str
    parent: str | None = None
    error: str | None = None
    disturbed: str | None = None
    without: str | None = None
    processes: int | None = None
    samples: int | None = None
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    confidence: float | None = None
    interval_of: str | None = None
    min_s: float | None = None
    max_s: float | None = None
    speedup_to_bf16: float | None = None
    speedup_to_parent: float | None = None
    text_encode_s: float | None = None
    steps_s: float | None = None
    step_s: float | None = None
    decode_s: float | None = None
    postprocess_s: float | None = None
    other_s: float | None = None
    load_s: float | None = None
    apply_s: float | None = None
    warmup_s: float | None = None
    compile_s: float | None = None
    peak_memory_bytes: int | None = None
    transformer_weight_bytes: int | None = None
    ssim: float | None = None
    ssim_worst_tile: float | None = None
    flip: float | None = None
    flip_worst_tile: float | None = None
    step_error: float | None = None
    workload: str
    workload_digest: str
    slug: str
    clock: str | None = None
    samples_s: str | None = None
    environment: Environment | None = None

    def stages(self) -> dict[str, float]:
        """Stage -> seconds, in `STAGES`' order; empty if the worker told none."""
        values = {stage: getattr(self, f"{stage}_s") for stage in STAGES}
        return {stage: seconds for stage, seconds in values.items() if seconds is not None}


COLUMNS = (
    *(field.name for field in dataclasses.fields(Row) if field.name != "environment"),
    *Environment.model_fields,
)


def rows(session: Session) -> list[Row]:
    """One row for every level that was run, lowest first.

    Raises:
        ResultError: if an image or a step's output is not the one that was measured, or if one ran with a fault: the
            ratios of the other levels would be wrong as well.
    """
    for result in itertools.chain.from_iterable(session.results.values()):
        if result.injection is not None:
            raise ResultError(
                f"{session.folder}: level {result.level!r}, process {result.process} ran with the fault "
                f"{result.injection} injected on purpose, and a table holds measurements only; measure again without "
                "--inject"
            )
    samples: Samples = {
        level: [m.samples_s for m in measured(results)]
        for level, results in session.results.items()
        if _is_whole(results)
    }
    return [_row(session, level, samples) for level in session.results]


def to_csv(table: Sequence[Row]) -> bytes:
    """RFC 4180 with a header line; floats are written so that they read back the same."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in table:
        environment = row.environment.model_dump() if row.environment else {}
        cells = {**{name: getattr(row, name, None) for name in COLUMNS}, **environment}
        writer.writerow(["" if cells[name] is None else cells[name] for name in COLUMNS])
    return file.getvalue().encode()


def _is_whole(results: Sequence[Result]) -> bool:
    return all(result.measurement is not None for result in results)


def _row(session: Session, level: str, samples: Samples) -> Row:
    results = session.results[level]
    base = Row(
        level=level,
        workload=session.workload.id,
        workload_digest=session.workload.digest,
        slug=session.slug,
        without="; ".join(f"{field} ({why})" for field, why in results[0].unavailable.items()) or None,
        environment=next((result.environment for result in results if result.environment), None),
    )
    if level not in samples:
        return dataclasses.replace(base, error=_error(results))
    own, parent = measured(results), _nearest_below(level, samples)
    why_disturbed = [why for result in results for why in disturbances(result.counters)]
    seconds, found = median(samples[level]), interval(level, samples, session.policy)
    return dataclasses.replace(
        base,
        parent=parent,
        disturbed="; ".join(dict.fromkeys([*why_disturbed, *session.lost_reruns(level)])) or None,
        processes=len(own),
        samples=sum(map(len, samples[level])),
        median_s=seconds,
        **(dataclasses.asdict(found) if found else {}),
        min_s=min(map(min, samples[level])),
        max_s=max(map(max, samples[level])),
        speedup_to_bf16=median(samples[REFERENCE_LEVEL]) / seconds if REFERENCE_LEVEL in samples else None,
        speedup_to_parent=median(samples[parent]) / seconds if parent else None,
        **_stage_cells(own, session.workload),
        **_build_cells(own, session.workload.warmup_rounds * seconds),
        **_fidelity_cells(session, level, samples),
        clock=own[0].clock,
        samples_s=" ".join(str(sample) for rounds in samples[level] for sample in rounds),
    )


def _error(results: Sequence[Result]) -> str:
    failures = [result.failure for result in results if result.failure]
    sentence = f"{failures[0].kind.value}: {' '.join(failures[0].message.split())}"
    return sentence if len(results) == 1 else f"{sentence} ({len(failures)} of {len(results)} processes failed)"


def _nearest_below(level: str, samples: Samples) -> str | None:
    below = PARENTS[level]
    while below is not None and below not in samples:
        below = PARENTS[below]
    return below


def _stage_cells(own: Sequence[Measurement], workload: Workload) -> dict[str, Any]:
    """Medians over the rounds of all processes."""
    names = own[0].stages_s
    if not names:
        return {}
    stages = {name: np.concatenate([m.stages_s[name] for m in own]) for name in names}
    parts = {name: values for name, values in stages.items() if name in STAGES}
    parts["other"] = np.concatenate([m.samples_s for m in own]) - sum(stages.values())
    if steps := [stages[name] for name in names if name.startswith("step_") or name == "denoise"]:
        parts["step"] = np.concatenate([sanity.step_seconds(workload, m.stages_s) for m in own])
        parts["steps"] = np.sum(steps, axis=0)
    return {f"{name}_s": float(np.median(values)) for name, values in parts.items()}


def _build_cells(own: Sequence[Measurement], warm_calls_s: float) -> dict[str, Any]:
    load_s, apply_s, warmup_s = (
        float(np.median([getattr(m, name) for m in own])) for name in ("load_s", "apply_s", "warmup_s")
    )
    return {
        "load_s": load_s,
        "apply_s": apply_s,
        "warmup_s": warmup_s,
        "compile_s": max(0.0, apply_s + warmup_s - warm_calls_s),
        "peak_memory_bytes": max(m.peak_memory_bytes for m in own),
        "transformer_weight_bytes": max(m.transformer_weight_bytes for m in own),
    }


def _fidelity_cells(session: Session, level: str, samples: Samples) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    # Random weights draw noise, and its SSIM is noise too.
    is_picture = not session.workload.has_random_weights
    if is_picture and level != REFERENCE_LEVEL and REFERENCE_LEVEL in samples:
        scores = session.image_scores(level, None)
        cells |= worst([{metric: score[metric] for metric in IMAGE_METRICS} for score in scores])
    if level != EXACT_LEVEL and EXACT_LEVEL in samples:
        cells["step_error"] = max(session.step_errors(level))
    return cells

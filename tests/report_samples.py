"""A stored run with a baseline, made without measuring and without pytest: what reports and exports are tested on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from suite_samples import picture, png, put, sample, write_run

from fluxfast.workloads import TINY
from perf_tests.harness import fidelity, recording, store
from perf_tests.harness.schema import Result

RUN = "20260901T010203Z-abc-1"
LEVELS = ("fp32", "bf16", "compile", "fused_qkv")
IDENTICAL = {"ssim": 1.0, "ssim_worst_tile": 1.0, "flip": 0.0, "flip_worst_tile": 0.0}


def small(shift: int = 0) -> Any:
    """`picture` at half its size: the smallest that can be scored, because scoring is what takes the time."""
    return picture(shift)[::2, ::2].copy()


def replace(folder: Path, result: Result, shift: int = 0) -> None:
    """Store another result in a run of `stored_run`."""
    put(folder, result, small(shift))


def stored_run(folder: Path, processes: int = 1, levels: tuple[str, ...] = LEVELS) -> Path:
    """`folder/results/<run>`, quiet, to be changed."""
    run = write_run(folder / "results" / RUN, processes, levels)
    for level in levels:
        for process in range(processes):
            replace(run, sample(level, process))
    return run


def write_baseline(folder: Path) -> Path:
    """`folder/baselines`, of five quiet processes a level that all drew the same picture."""
    raw = png(small())
    stored = {f"{metric}_stored": [value] * 5 for metric, value in IDENTICAL.items()}
    scores = {level: stored | {metric: [value] * 5 for metric, value in IDENTICAL.items()} for level in LEVELS}
    baseline = recording.baseline_from_results(
        {level: [sample(level, process) for process in range(5)] for level in LEVELS},
        levels=LEVELS,
        workload=dataclasses.asdict(TINY),
        slug="cpu",
        fidelity=scores | {"bf16": stored},
        step_errors={level: [0.005] * 5 for level in LEVELS if level != "fp32"},
        fidelity_method=fidelity.METHOD,
        reference_png=raw,
    )
    assert baseline.reference_sha256 == hashlib.sha256(raw).hexdigest()
    stock = recording.stock_json(baseline)
    store.write_baseline(folder / "baselines" / "cpu", "tiny", baseline, stock, {baseline.reference_image or "": raw})
    return folder / "baselines"

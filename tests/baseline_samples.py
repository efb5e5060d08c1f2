"""Results and baselines for the tests of the store: small, valid, made without measuring."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxfast.levels import get_level
from fluxfast.workloads import TINY
from perf_tests.harness.recording import baseline_from_results, stock_json
from perf_tests.harness.schema import (
    Baseline,
    Counters,
    Environment,
    ErrorKind,
    Failure,
    Measurement,
    Proof,
    Result,
)
from perf_tests.harness.store import write_baseline

LEVELS = ("fp32", "bf16", "compile")
SPEED_S = {"fp32": 0.4, "bf16": 0.2, "compile": 0.1}
WORKLOAD = dataclasses.replace(TINY, rounds=3)
ENVIRONMENT = Environment(
    python="3.11.0", torch="2.13.0", triton=None, torchao="0.18.0", diffusers="0.42.1", transformers="5.0.0", fa3=None,
    cuda=None, driver=None, device_name="cpu", capability=None, power_limit_w=None, cpu_name="a cpu", cpu_threads=2,
    platform="linux",
)  # fmt: skip


def picture_png(side: int = 16, shade: int = 90) -> bytes:
    """An RGB PNG of one shade."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample_result(level: str = "bf16", process: int = 0, scale: float = 1.0, **change: Any) -> Result:
    """One good worker's result; `scale` multiplies its samples."""
    base = SPEED_S.get(level, 0.3) * scale * (1 + 0.001 * process)
    measurement = Measurement(
        clock="wall", samples_s=[base, base * 1.01, base * 1.007], wall_s=[base] * 3, stages_s={"decode": [0.01] * 3},
        load_s=1.0, apply_s=1.0, warmup_s=1.0, peak_memory_bytes=1000, transformer_weight_bytes=500,
        proofs=[Proof(field="dtype", what="bfloat16 weights", observed=7, expected=7)], inductor_config={},
        image="image.png", image_sha256="0" * 64, step_output="step.npy",
    )  # fmt: skip
    return Result(
        level=level, workload=WORKLOAD.id, workload_digest=WORKLOAD.digest, process=process,
        fields=get_level(level).fields(), unavailable={}, environment=ENVIRONMENT, counters=Counters(),
        measurement=measurement,
    ).model_copy(update=change)  # fmt: skip


def sample_failure() -> Failure:
    """A worker that ran out of memory."""
    return Failure(
        kind=ErrorKind.OOM, stage="warmup", message="out of memory", exit_status=10, log_tail="", command="python -m x"
    )


def sample_run(scale: dict[str, float] | None = None, processes: int = 5) -> dict[str, list[Result]]:
    """A complete run; `scale` multiplies the samples of a level."""
    return {
        level: [sample_result(level, process, (scale or {}).get(level, 1.0)) for process in range(processes)]
        for level in LEVELS
    }


def sample_baseline(results: dict[str, list[Result]] | None = None, **change: Any) -> Baseline:
    """A baseline of `sample_run`, arguments of `baseline_from_results` changed."""
    arguments: dict[str, Any] = {
        "levels": LEVELS,
        "workload": dataclasses.asdict(WORKLOAD),
        "slug": "cpu",
        "fidelity": {level: {"ssim": [0.99] * 5} for level in LEVELS},
        "step_errors": {level: [0.01] * 5 for level in LEVELS},
        "fidelity_method": {"ssim": {"variant": "gaussian"}},
        "reference_png": picture_png(),
    }
    return baseline_from_results(results or sample_run(), **{**arguments, **change})


def write_sample(folder: Path, tag: str = "tiny", baseline: Baseline | None = None) -> Path:
    """A whole baseline file with its reference image."""
    baseline = baseline or sample_baseline()
    images = {} if baseline.reference_image is None else {baseline.reference_image: picture_png()}
    return write_baseline(folder, tag, baseline, stock_json(baseline), images)

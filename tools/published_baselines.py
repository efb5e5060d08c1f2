"""Writes `baselines/h100-700w/`: what flux-fast published, as upper bounds until `schnell-hub` is recorded on an H100.

    python -m tools.published_baselines [FOLDER]

Only rows whose recipe is that of a level here, field by field, are taken. flux-fast's rows for FlashAttention-3, float8
and the Inductor flags are not: its attention casts to e4m3 within the op (here only `flux_fast` does), and its float8
sets two of the Inductor flags. `flux_fast` itself ends in AOTInductor packages, which the published list does not hold.
Its `compile` also searched GEMMs and launch parameters, `gemm_search` and `coordinate_descent` here; in bf16 the search
of GEMMs bought nothing on an H200 (docs/performance.md).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fluxfast.levels import DEFAULTS, get_level
from fluxfast.workloads import WORKLOADS
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import Baseline, LevelBaseline, ProcessSamples
from perf_tests.harness.store import write_baseline

SLUG = "h100-700w"
SECONDS = {"fp32": 7.5, "bf16": 1.134, "compile": 0.716, "fused_qkv": 0.713, "channels_last": 0.700}
"""Whole call, one number a level. `fp32` is "~7.5 s" in flux-fast's README, the others are of its pull request 13."""
METHOD = "flux-fast: time.time() around pipeline(...), 10 runs after 3 warm-ups, one number"
NOTE = (
    "huggingface/flux-fast on an H100 of 700 W: README (fp32, about 7.5 s) and pull request 13 (the rest); one number "
    "a level, the whole transformer compiled as one graph in max-autotune mode with coordinate descent"
)
IDS = ("schnell-hub", "schnell-hub-full")
"""Released weights, as published, in both scopes of compilation. By blocks, the default here, a bf16 step of an H200
was measured at 125.8 ms against 122.5 for the full graph, 3 % more; the margin above a published number is 5 %."""
MOMENT = "2026-11-25T00:00:00+00:00"
"""When the numbers were written down here; a fixed one, so that the files come out the same."""


def published(id: str) -> Baseline:
    """The baseline of the workload called `id`."""
    workload = WORKLOADS[id]
    return Baseline(
        method=METHOD,
        source="published",
        source_note=NOTE,
        slug=SLUG,
        workload=dataclasses.asdict(workload),
        workload_digest=workload.digest,
        environment=None,
        levels={
            level: LevelBaseline(fields=_on(level), processes=[ProcessSamples(samples_s=[seconds])])
            for level, seconds in SECONDS.items()
        },
    )


def _on(level: str) -> dict[str, Any]:
    """What the level has on: a field that a baseline does not know counts as off, so new ones change no file."""
    return {name: value for name, value in get_level(level).fields().items() if value != DEFAULTS[name]}


def write(folder: Path) -> list[Path]:
    """One new file a workload in `folder`/h100-700w."""
    paths = []
    for id in IDS:
        baseline = published(id)
        stock = stock_json(baseline, moment=MOMENT) | {"commit_info": {}}
        paths.append(write_baseline(folder / SLUG, f"{id}.published", baseline, stock, {}))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "baselines"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="of baselines: %(default)s")
    for path in write(parser.parse_args().folder):
        print(path)

"""Numbers that cannot be: times that this chip cannot reach, or no numbers at all. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fluxfast.workloads import Workload

BLOCKS: Final = 19 + 38
WIDTH: Final = 24 * 128
"""FLUX.1's, as in its configuration: heads times head size."""
CEILING_TFLOPS: Final = {"bfloat16": 1069.0, "float8": 2171.0}
"""Hopper's dense datasheet rates (989, 1979 TFLOP/s at 1.83 GHz) at the highest clock it boosts to, 1.98 GHz.

They make 65 ms a bf16 step and 32 ms a float8 step of 256 text tokens at 1024x1024.
"""


class NonFinite(Exception):
    """A measurement holds a number that cannot be, so it is wrong, whatever it says: `exit_status.NON_FINITE`."""


def step_seconds(workload: Workload, stages_s: Mapping[str, Sequence[float]]) -> list[float]:
    """Seconds of every timed step; of a loop in one graph, which shows no steps, its equal parts."""
    steps = [s for name, samples in stages_s.items() if name.startswith("step_") for s in samples]
    return steps or [s / workload.num_inference_steps for s in stages_s["denoise"]]


def step_tflop(tokens: int) -> float:
    """Arithmetic of one transformer step: the blocks' Linears (12 width^2 multiply-adds a token) and attention.

    69.4 for schnell's 4352 tokens; modulation and embedders, a thousandth more, are left out.
    """
    return BLOCKS * tokens * (24 * WIDTH**2 + 4 * WIDTH * tokens) / 1e12


def require_possible_steps(
    workload: Workload, fields: Mapping[str, Any], is_gpu: bool, stages_s: Mapping[str, Sequence[float]]
) -> None:
    """Raise if the median step of a full-size workload beats the chip.

    Raises:
        NonFinite: with both times.
    """
    if not is_gpu or not workload.is_full_size:
        return
    dtype = "bfloat16" if fields["quantization"] == "none" else "float8"
    floor_s = step_tflop(workload.tokens) / CEILING_TFLOPS[dtype]
    step_s = statistics.median(step_seconds(workload, stages_s))
    if step_s < floor_s:
        raise NonFinite(
            f"a step took {step_s * 1e3:.1f} ms and its arithmetic alone takes {floor_s * 1e3:.1f} ms in {dtype} on "
            "this chip: the clock, a cached output or a skipped block is to be found, not celebrated"
        )

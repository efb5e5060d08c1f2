"""Row-wise dynamic float8: what the fused kernels and `RowwiseFloat8Linear` mean by `(q, scale)`, in plain PyTorch.

A row of length K becomes K e4m3 codes and one float32 scale, so that `q * scale` approximates the row and
`torch._scaled_mm(q, w.t(), scale_a=scale, ...)` undoes the scaling in the epilogue of the GEMM.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-12
"""Rows whose largest magnitude is below this are scaled as if it were this (torchao's `float8_utils.EPS`)."""


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every row of `x` to e4m3 with one scale a row.

    Args:
        x: (..., K), any floating type; computed in float32.

    Returns:
        q (..., K) float8_e4m3fn and scale (..., 1) float32, `scale = amax / 448`.

    Bit for bit the codes and scales of torchao 0.18's `Float8Tensor.from_hp(x, granularity=PerRow())` for float32 rows
    with amax >= 1e-12. Three differences, all on purpose:
      * all-zero rows: zeros and the scale 1e-12 / 448; torchao divides 0 by 0 and returns NaN;
      * bfloat16 rows: torchao run eagerly rounds the scale itself to bfloat16 (relative error up to 2^-9, and the
        largest element then saturates); compiled by Inductor it does not, and neither is it done here;
      * a row that holds NaN is NaN throughout, codes and scale, as in torchao. A row that holds an infinity gets an
        infinite scale, NaN where the infinity was and zeros elsewhere, so that 0 * inf makes its whole product NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=AMAX_FLOOR) / E4M3_MAX
    # The clamp is for eager PyTorch <= 2.11, whose cast turns what rounds above 448 into NaN.
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def dequantize_rowwise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`q * scale` in float32; inverse of `quantize_rowwise` up to rounding."""
    return q.float() * scale


def cast_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Unscaled, saturating cast: magnitudes past 448, infinities included, become 448; NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

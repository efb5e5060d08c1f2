"""A float8 GEMM with GELU and the e4m3 cast in its epilogue, of the quack library (CuTe DSL), for Hopper.

cuBLASLt writes what a single block's MLP projects in bfloat16, and a kernel behind it reads it again: at FLUX's size
4352 * 12288 * (2 + 2 + 1) bytes = 267 MB a block, where the epilogue writes 53. A row's largest element is not known
before the row is, so its scale comes from a bound: see `linear.RowwiseFloat8GeluLinear`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from cutlass import cute
from quack.activation import tanh
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecLoad, RowVecLoad

from fluxfast.kernels.activations import quantize_beside
from fluxfast.kernels.rowwise import E4M3

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
FEW_ROWS = 1024
"""Up to here a GEMM has too few tiles for all processors, and the text stream's 256 or 512 rows are its whole time."""


@gemm_epilogue(
    ops={
        "scale": ColVecLoad("scale"),
        "weight_scale": RowVecLoad("weight_scale"),
        "bias": RowVecLoad("bias"),
        "out_scale": ColVecLoad("out_scale"),
    }
)
def _gelu(acc, scale, weight_scale, bias, out_scale):
    """gelu_tanh(acc * scale * weight_scale + bias) / out_scale, an element; the store rounds and saturates."""
    y = acc * scale * weight_scale + bias
    half = y * (0.5 * cute.arch.rcp_approx(out_scale))
    return {"D": half * tanh(y * (y * y * CUBIC + SLOPE)) + half}


def tiles(rows: int) -> dict[str, Any]:
    """How quack cuts a product of so many rows; measured, see docs/performance.md.

    Two consumer warp groups take turns, one multiplies while the other runs its epilogue ("ping-pong"); 128 x 160 is
    the widest tile whose epilogue finds room in the registers.
    """
    width = 160 if rows > FEW_ROWS else 192
    return {"tile_M": 128, "tile_N": width, "cluster_M": 2, "cluster_N": 1, "pingpong": True}


@torch.library.custom_op("fluxfast::gelu_linear_quantize", mutates_args=())
def gelu_linear_quantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bound: torch.Tensor,
    left: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[left, gelu_tanh(a @ w.T + bias)], quantised row by row with scales that are known before the product.

    Args:
        q, scale: (M, K) float8_e4m3fn and (M, 1) float32, a = q * scale.
        weight, weight_scale: (N, K) float8_e4m3fn and (1, N) float32; bias: (N,) bfloat16 or float32.
        bound: (2,) float32, see `linear.RowwiseFloat8GeluLinear`: a row's scale is `scale * bound[0] + bound[1]`.
        left: (M, D), bfloat16 or float32, or None for D = 0. Rows may be strided. Where a row of it needs a larger
            scale, see `activations.quantize_beside`.

    Returns:
        codes (M, D + N) float8_e4m3fn and scale (M, 1) float32. The tensor cores accumulate as they do for
        `use_fast_accum`, tanh is the GPU's own (relative error 2^-11), and nothing is rounded to bfloat16 in between.
        A row with NaN or an infinity in q or scale is NaN.

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA.
    """
    if q.device.type != "cuda":
        raise ValueError(f"quack's GEMM got a tensor on {q.device}; it runs on CUDA, `reference` anywhere")
    rows, width = len(q), len(weight)
    d = 0 if left is None else left.shape[1]
    shapes = {"scale": (rows, 1), "weight_scale": (1, width), "bias": (width,), "bound": (2,)}
    given = {"scale": scale, "weight_scale": weight_scale, "bias": bias, "bound": bound}
    if wrong := {name: tuple(given[name].shape) for name, shape in shapes.items() if given[name].shape != shape}:
        raise ValueError(f"expected {shapes} for {rows} rows and {width} outputs, got {wrong}")
    codes = torch.empty((rows, d + width), dtype=E4M3, device=q.device)
    out_scale = torch.addcmul(bound[1], scale, bound[0])
    _gelu.gemm(
        q,
        weight,
        codes[:, d:],
        epi_args={
            "scale": scale.view(1, rows),
            "weight_scale": weight_scale,
            "bias": bias.view(1, width),
            "out_scale": out_scale.view(1, rows),
        },
        # As `use_fast_accum` of `torch._scaled_mm`; quack's default adds up in registers after every 128 columns.
        post_init_attrs=(("fp8_slow_accum", False),),
        **tiles(rows),
    )
    if left is not None:
        quantize_beside(left, codes, out_scale)
    return codes, out_scale


@gelu_linear_quantize.register_fake
def _(q, scale, weight, weight_scale, bias, bound, left=None):
    width = len(weight) + (0 if left is None else left.shape[1])
    return q.new_empty((len(q), width), dtype=E4M3), q.new_empty((len(q), 1), dtype=torch.float32)

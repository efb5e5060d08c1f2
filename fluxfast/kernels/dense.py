"""GEMMs of the quack library without float8, with what a kernel behind them did in their epilogue: T5's.

T5-XXL on 256 tokens does little more than read weights. On an H100 both Linears in front of its gate, 4096 -> 20480,
take 70 us as one with GELU and gate, where cuBLAS takes 76 without and Triton's kernel behind it 6.5; adding to the
stream takes the 45 us of the feed-forward's last Linear one more.
"""

from __future__ import annotations

from typing import Any

import torch
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.library import linear_act_mod

from fluxfast.kernels.gemm import FEW_TILES_WIDTHS, GELU_WIDTHS, WIDTHS, _check, tiles
from fluxfast.machine import processors

GATED_ONE_WAVE_WIDTHS = tuple(width for width in FEW_TILES_WIDTHS if width % 32 == 0)
"""Of the pairs in a tile quack stores halves of it, whose columns are a multiple of 16."""
GATED = "mAuxOut"
"""What quack calls it."""
gated_gelu = linear_act_mod("geglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
"""gelu_tanh(acc[2j]) * acc[2j + 1], an element; the store rounds."""


@gemm_epilogue()
def add_residual(acc, c):
    """c + acc, an element; the store rounds."""
    return {"D": c + acc}


def tiles_of(rows: int, columns: int, at_once: int, *, gated: bool = False) -> dict[str, Any]:
    """`gemm.tiles` of a product, both Linears' columns in front of a gate."""
    if gated:
        return tiles(rows, columns, GELU_WIDTHS, at_once, GATED_ONE_WAVE_WIDTHS)
    return tiles(rows, columns, WIDTHS, at_once)


@torch.library.custom_op("fluxfast::gated_gelu_linear", mutates_args=())
def gated_gelu_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x @ gate.T) * (x @ up.T), rounded once.

    Args:
        x: (M, K) bfloat16 or float16.
        weight: (2 * N, K), rows of gate and up in turn, the gate's first.

    Returns:
        (M, N) in the type of x. tanh is the GPU's own (relative error 2^-11).

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA. What else quack cannot do, widths
            that are no multiples of 8 among it, it says itself.
    """
    rows, width, k = len(x), len(weight) // 2, weight.shape[1]
    _check(rows, width, x=(x, (rows, k)), weight=(weight, (2 * width, k)))
    out = x.new_empty((rows, width))
    gated_gelu.gemm(x, weight, None, epi_args={GATED: out}, **tiles_of(rows, 2 * width, processors(), gated=True))
    return out


@gated_gelu_linear.register_fake
def _(x, weight):
    return x.new_empty((len(x), len(weight) // 2))


@torch.library.custom_op("fluxfast::residual_dense_linear", mutates_args=())
def residual_dense_linear(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual + x @ weight.T, rounded once.

    Args:
        x, weight: (M, K) and (N, K), bfloat16 or float16. residual: (M, N).

    Returns:
        (M, N) in the type of the residual.

    Raises:
        ValueError: as `gated_gelu_linear`.
    """
    rows, width = len(x), len(weight)
    _check(rows, width, x=(x, (rows, weight.shape[1])), residual=(residual, (rows, width)))
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    add_residual.gemm(x, weight, out, residual, epi_args={}, **tiles_of(rows, width, processors()))
    return out


@residual_dense_linear.register_fake
def _(x, weight, residual):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)

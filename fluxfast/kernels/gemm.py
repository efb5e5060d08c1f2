"""Float8 GEMMs of the quack library (CuTe DSL) for Hopper, with what a kernel behind them did in their epilogue.

GELU and the e4m3 cast: cuBLASLt writes what a single block's MLP projects in bfloat16, and a kernel behind it reads it
again, at FLUX's size 4352 * 12288 * (2 + 2 + 1) bytes = 267 MB a block, where the epilogue writes 53. A row's largest
element is not known before the row is, so its scale comes from a bound: see `linear.RowwiseFloat8GeluLinear`.

The gated residual: the norm behind it then reads one stream and writes its codes, 40 MB at 4352 x 3072 instead of 93,
and the epilogue reads 27 that the GEMM did not.
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
from fluxfast.machine import processors

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
TILE_ROWS = 128
WIDTHS = (128, 160, 176, 192, 208)
"""Columns of a tile that one warp group can hold; with half the rows each, two can hold any of them."""
GELU_WIDTHS = (128, 160)
"""Those among them with GELU, which spills registers with 192; 176 was once faster than 160 and once slower."""
FEW_TILES_WIDTHS = (48, 64, 96, *WIDTHS)
"""For products with so few rows that there is one tile a processor at most: the narrowest is shared by the most."""

ALIGNMENT = 16
"""Bytes, of the address of every operand."""
FAST_ACCUMULATION = (("fp8_slow_accum", False),)
"""As `use_fast_accum` of `torch._scaled_mm`; quack's default adds up in registers after every 128 columns."""


def _vectors(*, columns: tuple[str, ...], rows: tuple[str, ...]) -> dict[str, ColVecLoad | RowVecLoad]:
    """Operands with an element a row of the product (quack's column vectors), and with one a column."""
    return {name: ColVecLoad(name) for name in columns} | {name: RowVecLoad(name) for name in rows}


@gemm_epilogue(ops=_vectors(columns=("scale", "out_scale"), rows=("weight_scale", "bias")))
def gelu(acc, scale, weight_scale, bias, out_scale):
    """gelu_tanh(acc * scale * weight_scale + bias) / out_scale, an element; the store rounds and saturates."""
    y = acc * scale * weight_scale + bias
    half = y * (0.5 * cute.arch.rcp_approx(out_scale))
    return {"D": half * tanh(y * (y * y * CUBIC + SLOPE)) + half}


@gemm_epilogue(ops=_vectors(columns=("scale",), rows=("weight_scale", "bias", "gate")))
def gated_residual(acc, c, scale, weight_scale, bias, gate):
    """c + gate * (acc * scale * weight_scale + bias), an element; the store rounds."""
    return {"D": c + gate * (acc * scale * weight_scale + bias)}


def tiles(rows: int, columns: int, widths: tuple[int, ...], at_once: int) -> dict[str, Any]:
    """How quack cuts a product: by the width of a tile with which all waves of tiles together are the shortest.

    Where there is more than one wave, the two consumer warp groups of a processor take turns: one multiplies while the
    other runs its epilogue ("ping-pong"). Where one wave is enough, both work on one tile. On the shapes of FLUX.1 this
    finds what was the fastest of those measured, see docs/performance.md.

    Args:
        widths: to choose from where there is more than one wave. at_once: tiles of a wave, one a processor (SM).
    """
    high = -(-rows // TILE_ROWS)

    def waves(width: int) -> int:
        return -(-high * -(-columns // width) // at_once)

    one_wave = [width for width in FEW_TILES_WIDTHS if waves(width) == 1]
    width = min(one_wave or widths, key=lambda width: (waves(width) * width, -width))
    return {"tile_M": TILE_ROWS, "tile_N": width, "cluster_M": 2, "cluster_N": 1, "pingpong": not one_wave}


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A vector, or a copy where quack would refuse its address: a sample's scales begin anywhere in the batch's."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def multiply(
    epilogue: Any,
    cut: dict[str, Any],
    q: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *c: torch.Tensor,
    **vectors: torch.Tensor,
) -> None:
    """`out` (M, N) = epilogue(q @ weight.T, ...), cut by `tiles`; c is like `out`, vectors have M or N elements."""
    epilogue.gemm(
        q,
        weight,
        out,
        *c,
        epi_args={name: _aligned(vector.view(1, -1)) for name, vector in vectors.items()},
        post_init_attrs=FAST_ACCUMULATION,
        **cut,
    )


def _check(rows: int, width: int, **given: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: for tensors that are not of the shape beside them, or not on CUDA.
    """
    if wrong := {name: tuple(x.shape) for name, (x, shape) in given.items() if x.shape != shape}:
        expected = {name: shape for name, (_, shape) in given.items()}
        raise ValueError(f"expected {expected} for {rows} rows and {width} outputs, got {wrong}")
    if elsewhere := {x.device.type for x, _ in given.values()} - {"cuda"}:
        raise ValueError(f"quack's GEMM got tensors on {', '.join(elsewhere)}; it runs on CUDA, `reference` anywhere")


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
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA. What else quack cannot do, widths
            that are no multiples of 16 among it, it says itself.
    """
    rows, width = len(q), len(weight)
    d = 0 if left is None else left.shape[1]
    vectors = {"scale": (scale, (rows, 1)), "weight_scale": (weight_scale, (1, width)), "bias": (bias, (width,))}
    _check(rows, width, q=(q, (rows, weight.shape[1])), **vectors, bound=(bound, (2,)))
    codes = torch.empty((rows, d + width), dtype=E4M3, device=q.device)
    out_scale = torch.addcmul(bound[1], scale, bound[0])
    given = {name: vector for name, (vector, _) in vectors.items()}
    cut = tiles(rows, width, GELU_WIDTHS, processors())
    multiply(gelu, cut, q, weight, codes[:, d:], **given, out_scale=out_scale)
    if left is not None:
        quantize_beside(left, codes, out_scale)
    return codes, out_scale


@gelu_linear_quantize.register_fake
def _(q, scale, weight, weight_scale, bias, bound, left=None):
    width = len(weight) + (0 if left is None else left.shape[1])
    return q.new_empty((len(q), width), dtype=E4M3), q.new_empty((len(q), 1), dtype=torch.float32)


@torch.library.custom_op("fluxfast::residual_linear", mutates_args=())
def residual_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """residual + gate * (a @ w.T + bias), rounded once.

    Args:
        q, scale, weight, weight_scale, bias: as for `gelu_linear_quantize`.
        residual: (M, N) bfloat16 or float32. gate: (B, N), M a multiple of B; rows may be strided.

    Returns:
        (M, N) in the type of the residual.

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA.
    """
    rows, width, samples = len(q), len(weight), len(gate)
    vectors = {"scale": (scale, (rows, 1)), "weight_scale": (weight_scale, (1, width)), "bias": (bias, (width,))}
    shaped = {
        "q": (q, (rows, weight.shape[1])),
        "residual": (residual, (rows, width)),
        "gate": (gate, (samples, width)),
    }
    _check(rows, width, **vectors, **shaped)
    if rows % samples:
        raise ValueError(f"{rows} rows cannot be shared evenly by {samples} samples: M must be a multiple of B")
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    cut = tiles(rows // samples, width, WIDTHS, processors())
    for a, a_scale, c, d, its_gate in zip(*(x.chunk(samples) for x in (q, scale, residual, out, gate)), strict=True):
        vectors = {"scale": a_scale, "weight_scale": weight_scale, "bias": bias, "gate": its_gate}
        multiply(gated_residual, cut, a, weight, d, c, **vectors)
    return out


@residual_linear.register_fake
def _(q, scale, weight, weight_scale, bias, residual, gate):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)

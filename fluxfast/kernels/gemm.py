"""Float8 GEMMs of the quack library (CuTe DSL) for Hopper, with what a kernel behind them did in their epilogue.

GELU and the e4m3 cast: cuBLASLt writes what a single block's MLP projects in bfloat16, and a kernel behind it reads it
again, at FLUX's size 4352 * 12288 * (2 + 2 + 1) bytes = 267 MB a block, where the epilogue writes 53. A row's largest
element is not known before the row is, so its scale comes from a bound: see `linear.RowwiseFloat8GeluLinear`.

The gated residual: the norm behind it then reads one stream and writes its codes, 40 MB at 4352 x 3072 instead of 93,
and the epilogue reads 27 that the GEMM did not.
"""

from __future__ import annotations

import functools
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


@gemm_epilogue(ops=_vectors(columns=("scale",), rows=("weight_scale", "bias")))
def linear(acc, scale, weight_scale, bias):
    """acc * scale * weight_scale + bias, an element; the store rounds."""
    return {"D": acc * scale * weight_scale + bias}


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


def tiles(
    rows: int, columns: int, widths: tuple[int, ...], at_once: int, one_wave_widths: tuple[int, ...] = FEW_TILES_WIDTHS
) -> dict[str, Any]:
    """How quack cuts a product: by the width of a tile with which all waves of tiles together are the shortest.

    Where there is more than one wave, the two consumer warp groups of a processor take turns: one multiplies while the
    other runs its epilogue ("ping-pong"). Where one wave is enough, both work on one tile. On the shapes of FLUX.1 this
    finds what was the fastest of those measured, see docs/performance.md.

    Args:
        widths: to choose from where there is more than one wave. at_once: tiles of a wave, one a processor (SM).
        one_wave_widths: to choose from where one is enough.
    """
    high = -(-rows // TILE_ROWS)

    def waves(width: int) -> int:
        return -(-high * -(-columns // width) // at_once)

    one_wave = [width for width in one_wave_widths if waves(width) == 1]
    width = min(one_wave or widths, key=lambda width: (waves(width) * width, -width))
    return tile_options(width, takes_turns=not one_wave)


def tile_options(width: int, *, takes_turns: bool) -> dict[str, Any]:
    """What quack calls it: tiles of `width` columns, which two warp groups work on in turn, or both on one."""
    return {"tile_M": TILE_ROWS, "tile_N": width, "cluster_M": 2, "cluster_N": 1, "pingpong": takes_turns}


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Vectors, or a copy where quack would refuse an address: a sample's scales begin anywhere in the batch's."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.clone(memory_format=torch.contiguous_format) if any(step % ALIGNMENT for step in steps) else x


def multiply(
    epilogue: Any,
    cut: dict[str, Any],
    q: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    *c: torch.Tensor,
    begins: torch.Tensor | None = None,
    outputs: dict[str, torch.Tensor] | None = None,
    **vectors: torch.Tensor,
) -> None:
    """`out` (M, N) = epilogue(q @ weight.T, ...), cut by `tiles`; c is like `out`.

    Args:
        out: None for an epilogue that writes nothing but `outputs`, by name.
        vectors: of M or N elements.
        begins: None, or int32, where each group of rows begins and the last one ends: `weight` is (groups, N, K) then,
            vectors are (M,) or (groups, N).
    """
    shaped = {name: vector.view(1, -1) if begins is None else vector for name, vector in vectors.items()}
    epilogue.gemm(
        q,
        weight,
        out,
        *c,
        epi_args={name: _aligned(vector) for name, vector in shaped.items()} | (outputs or {}),
        post_init_attrs=FAST_ACCUMULATION,
        cu_seqlens_m=begins,
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


def _check_samples(rows: int, samples: int) -> None:
    """
    Raises:
        ValueError: for rows that the samples cannot share.
    """
    if rows % samples:
        raise ValueError(f"{rows} rows cannot be shared evenly by {samples} samples: M must be a multiple of B")


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


@torch.library.custom_op("fluxfast::gelu_linear_quantize_beside", mutates_args={"codes"})
def gelu_linear_quantize_beside(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    codes: torch.Tensor,
    out_scale: torch.Tensor,
) -> None:
    """gelu_tanh(a @ w.T + bias) in the last columns of rows of codes, whose scales are known and large enough.

    Args:
        q, scale, weight, weight_scale, bias: as for `gelu_linear_quantize`.
        codes: (M, D + N) float8_e4m3fn, written from column D on. out_scale: (M, 1) float32, at least the bound there.

    Raises:
        ValueError: as there.
    """
    rows, width = len(q), len(weight)
    vectors = {"scale": (scale, (rows, 1)), "weight_scale": (weight_scale, (1, width)), "bias": (bias, (width,))}
    vectors |= {"out_scale": (out_scale, (rows, 1))}
    d = max(codes.shape[1] - width, 0)
    _check(rows, width, q=(q, (rows, weight.shape[1])), **vectors, codes=(codes, (rows, d + width)))
    given = {name: vector for name, (vector, _) in vectors.items()}
    multiply(gelu, tiles(rows, width, GELU_WIDTHS, processors()), q, weight, codes[:, d:], **given)


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
        residual: (M, N) bfloat16, float16 or float32. gate: (B, N), M a multiple of B; rows may be strided.

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
    _check_samples(rows, samples)
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    cut = tiles(rows // samples, width, WIDTHS, processors())
    for a, a_scale, c, d, its_gate in zip(*(x.chunk(samples) for x in (q, scale, residual, out, gate)), strict=True):
        its = {"scale": a_scale, "weight_scale": weight_scale, "bias": bias, "gate": its_gate}
        multiply(gated_residual, cut, a, weight, d, c, **its)
    return out


@residual_linear.register_fake
def _(q, scale, weight, weight_scale, bias, residual, gate):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


@functools.cache
def begins(text_tokens: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Of the groups of one sample. Kept: to make it is a copy from the host, which no CUDA graph takes."""
    return torch.tensor([0, text_tokens, tokens], dtype=torch.int32, device=device)


def grouped_rows(text_tokens: int, tokens: int) -> int:
    """Rows of the tiles of both streams of a sample: each stream's come in pairs, a cluster's."""
    pair = 2 * TILE_ROWS
    return sum(-(-part // pair) * pair for part in (text_tokens, tokens - text_tokens))


def _check_groups(text_tokens: int, tokens: int) -> None:
    """
    Raises:
        ValueError: unless there are tokens of both.
    """
    if not 0 < text_tokens < tokens:
        raise ValueError(f"expected tokens of text and of the image, got {text_tokens} of {tokens} that are text")


def _multiply_grouped(
    epilogue: Any,
    widths: tuple[int, ...],
    text_tokens: int,
    operands: dict[str, tuple[torch.Tensor, tuple[int, ...]]],
    out: torch.Tensor,
    **gates: torch.Tensor,
) -> None:
    """Sample by sample; `operands` are given with their shapes, gates are (B, 2, N).

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA.
    """
    (batch, tokens, width) = out.shape
    _check_groups(text_tokens, tokens)
    _check(batch * tokens, width, **operands)
    given = {name: x for name, (x, _) in operands.items()}
    q, weight, residual = given.pop("q"), given.pop("weight"), given.pop("residual", None)
    cut = tiles(grouped_rows(text_tokens, tokens), width, widths, processors())
    borders = begins(text_tokens, tokens, q.device)
    for sample in range(batch):
        c = () if residual is None else (residual[sample],)
        by_token = {name: given[name][sample, :, 0] for name in ("scale", "out_scale") if name in given}
        both = {name: given[name] for name in ("weight_scale", "bias")}
        both |= {name: gate[sample] for name, gate in gates.items()}
        multiply(epilogue, cut, q[sample], weight, out[sample], *c, begins=borders, **by_token, **both)


def _grouped_operands(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """What every grouped product has, with the shapes that it should be of."""
    batch, tokens = q.shape[:2]
    width, k = weight.shape[1:]
    return {
        "q": (q, (batch, tokens, k)),
        "scale": (scale, (batch, tokens, 1)),
        "weight": (weight, (2, width, k)),
        "weight_scale": (weight_scale, (2, width)),
        "bias": (bias, (2, width)),
    }


@torch.library.custom_op("fluxfast::grouped_linear", mutates_args=())
def grouped_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    text_tokens: int,
) -> torch.Tensor:
    """a @ w.T + bias in one GEMM for two streams with weights of their own: a grouped GEMM.

    Args:
        q, scale: (B, T + S, K) float8_e4m3fn and (B, T + S, 1) float32, a = q * scale, the text's tokens first.
        weight, weight_scale, bias: (2, N, K) float8_e4m3fn, (2, N) float32 and (2, N) bfloat16 or float32, the text's
            first.
        text_tokens: T, at least one; S too.

    Returns:
        (B, T + S, N) bfloat16. The tensor cores accumulate as they do for `use_fast_accum`.

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA.
    """
    out = torch.empty((*q.shape[:2], weight.shape[1]), dtype=torch.bfloat16, device=q.device)
    operands = _grouped_operands(q, scale, weight, weight_scale, bias)
    _multiply_grouped(linear, WIDTHS, text_tokens, operands, out)
    return out


@grouped_linear.register_fake
def _(q, scale, weight, weight_scale, bias, text_tokens):
    return q.new_empty((*q.shape[:2], weight.shape[1]), dtype=torch.bfloat16)


@torch.library.custom_op("fluxfast::grouped_gelu_linear_quantize", mutates_args=())
def grouped_gelu_linear_quantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bound: torch.Tensor,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gelu_linear_quantize`, nothing to the left, for two streams as in `grouped_linear`.

    Args:
        bound: (2, 2) float32, of each stream as there, the text's first.

    Returns:
        codes (B, T + S, N) float8_e4m3fn and scale (B, T + S, 1) float32.
    """
    codes = torch.empty((*q.shape[:2], weight.shape[1]), dtype=E4M3, device=q.device)
    out_scale = torch.empty_like(scale)
    for tokens, (slope, offset) in zip((slice(0, text_tokens), slice(text_tokens, None)), bound.unbind(), strict=True):
        torch.addcmul(offset, scale[:, tokens], slope, out=out_scale[:, tokens])
    operands = _grouped_operands(q, scale, weight, weight_scale, bias)
    operands |= {"out_scale": (out_scale, tuple(scale.shape))}
    _multiply_grouped(gelu, GELU_WIDTHS, text_tokens, operands, codes)
    return codes, out_scale


@grouped_gelu_linear_quantize.register_fake
def _(q, scale, weight, weight_scale, bias, bound, text_tokens):
    codes = q.new_empty((*q.shape[:2], weight.shape[1]), dtype=E4M3)
    return codes, q.new_empty((*q.shape[:2], 1), dtype=torch.float32)


@torch.library.custom_op("fluxfast::grouped_residual_linear", mutates_args=())
def grouped_residual_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    text_tokens: int,
) -> torch.Tensor:
    """As `residual_linear`, for two streams as in `grouped_linear`.

    Args:
        residual: (B, T + S, N) bfloat16, float16 or float32. gate: (B, 2, N), the text's first.

    Returns:
        (B, T + S, N) in the type of the residual.
    """
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    operands = _grouped_operands(q, scale, weight, weight_scale, bias)
    shape = (*q.shape[:2], weight.shape[1])
    operands |= {"residual": (residual, shape)}
    if gate.shape != (shape[0], 2, shape[2]):
        raise ValueError(f"expected a gate of {(shape[0], 2, shape[2])}, got {tuple(gate.shape)}")
    _multiply_grouped(gated_residual, WIDTHS, text_tokens, operands, out, gate=gate)
    return out


@grouped_residual_linear.register_fake
def _(q, scale, weight, weight_scale, bias, residual, gate, text_tokens):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)

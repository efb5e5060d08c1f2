"""The GEMM of QKV, of quack, with an epilogue that writes what `flash.coded_attention_quantize` takes.

V in e4m3 and transposed: what the GEMM would write in bfloat16 a kernel behind it would read again, at FLUX's size 27
MB a block, to write 13. A thread of a tensor core has two neighbouring channels of two tokens that are eight apart. As
tokens stand in `reference.transposed_values`, those two are neighbours: 16 bits a channel, and eight by eight of these
are transposed between the threads of a warp by one instruction (movmatrix). It has four tokens of a channel then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cutlass
import torch
from cutlass import Float32, Int32, cute
from cutlass.cutlass_dsl import dsl_user_op
from quack.compile_utils import make_fake_tensor
from quack.epilogue.frontend import EpiMod
from quack.epilogue.ops import EpiOp, TileStore

from fluxfast.kernels import flash
from fluxfast.kernels.flash import HEAD_DIM, VALUE_ROWS, _four_codes, _ptx
from fluxfast.kernels.gemm import (
    _check,
    _check_groups,
    _check_samples,
    _grouped_operands,
    _vectors,
    begins,
    multiply,
    tile_options,
)
from fluxfast.kernels.reference import PADDING, transposed_shape
from fluxfast.kernels.rowwise import E4M3

WIDTHS = (192, 128)
"""Columns of a tile: the first of which Q, K and V each have a multiple, so that none is of two of them."""
SOURCE = hashlib.sha256(Path(__file__).read_bytes() + flash.SOURCE.encode()).hexdigest()
"""For quack's cache on disk, which knows an epilogue's operations by their names."""


@dsl_user_op
def _transpose(pairs, *, loc=None, ip=None):
    """Eight rows of eight elements of 16 bits, a row in four threads, become eight columns."""
    return _ptx("movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", pairs, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _larger(a, b, *, loc=None, ip=None):
    """The larger magnitude of two float32; of a number and NaN, the number's."""
    ptx = "{.reg .f32 x, y; abs.f32 x, {$r0}; abs.f32 y, {$r1}; max.f32 {$w0}, x, y;}"
    return _ptx(ptx, a, b, out=(Float32,), loc=loc, ip=ip)


@dsl_user_op
def _raise(address, x, *, loc=None, ip=None):
    """The number there to x, if that is larger; neither is negative, so that their bits are in the same order."""
    ptx = "{.reg .b32 b; mov.b32 b, {$r1}; red.relaxed.gpu.global.max.u32 [{$r0}], b;}"
    _ptx(ptx, address, x, out=(), loc=loc, ip=ip)


@dsl_user_op
def _rounded(x, *, loc=None, ip=None):
    """float32 in e4m3 and back, saturating."""
    to = "cvt.rn.satfinite.e4m3x2.f32 c, {$r0}, {$r0}; cvt.rn.f16x2.e4m3x2 h, c;"
    ptx = "{.reg .b16 c, l, u; .reg .b32 h; " + to + " mov.b32 {l, u}, h; cvt.f32.f16 {$w0}, l;}"
    return _ptx(ptx, x, out=(Float32,), loc=loc, ip=ip)


class _Tensor(EpiOp):
    """An operation of an epilogue with a tensor, which the kernel gets as it is."""

    def config_key(self):
        return (SOURCE,)

    def param_fields(self):
        return [(self.name, object, None)]

    def to_params(self, gemm, args):
        return {self.name: getattr(args, self.name)}


class _Largest(_Tensor):
    """Where `_Values` leaves the largest magnitude of V: one float32, zero beforehand."""

    def host_fake_arg(self, key, fctx):
        return make_fake_tensor(Float32, (1,))

    def begin(self, gemm, param, smem_tensor, ctx):
        gemm.largest = param


class _Values(_Tensor):
    """V's codes, (heads * VALUE_ROWS, tokens / 4) int32, four tokens each, and the rows of ones behind each head."""

    fn_port = "sink"

    def host_fake_arg(self, key, fctx):
        return make_fake_tensor(Int32, (cute.sym_int(), cute.sym_int()), 4)

    def epi_m_major_score(self, arg_tensor, gemm):
        # Along a row first: with two halves of a tile in turn, what belongs to columns is kept, and registers spill.
        return -100

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        coordinates = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        token = first
        if cutlass.const_expr(ctx.varlen_manager.varlen_m):
            token = first + ctx.varlen_manager.params.cu_seqlens_m[ctx.batch_idx]
        # How many rows there are from the tile's first on, and which token that is.
        rows = ctx.varlen_manager.len_m(ctx.batch_idx) - first
        column = ctx.tile_coord_mnkl[1] * ctx.tile_N - _columns_before(param)
        peak = cute.make_rmem_tensor(1, Float32)
        peak.fill(0.0)
        return (param, coordinates, column, rows, token, peak)

    def begin_loop(self, gemm, state, epi_coord):
        values, coordinates, *rest = state
        return (values, coordinates[None, None, None, epi_coord[0], epi_coord[1]], *rest)

    @cute.jit
    def fn_sink_flush(self, gemm, state, frag):
        values, coordinates, column, rows, token, peak = state
        if column >= 0:
            at = _places(coordinates, gemm.cta_tile_shape_mnk[:2])
            lane = cute.arch.lane_idx()
            # Of the warp's sixteen tokens the first, and of the part of the tile the first column.
            row, channel = coordinates[0][0] - lane // 4, column + coordinates[0][1] - lane % 4 * 2
            keep = Int32(0)
            for i in cutlass.range_constexpr(2):
                top = Float32(0.0)
                for j in cutlass.range_constexpr(len(at) // 4):
                    for k in cutlass.range_constexpr(2):
                        top = _larger(top, frag[at[8 * i, 8 * j + k]])
                exists = row + lane // 4 + 8 * i < rows
                peak[0] = cutlass.select_(exists, cute.arch.fmax(peak[0], top), peak[0])
                keep = keep | cutlass.select_(exists, Int32(0x00FF00FF << 8 * i), Int32(0))
            words = [
                _transpose(_four_codes(*(frag[at[row, 8 * i + j]] for j in (0, 1) for row in (0, 8))) & keep)
                for i in range(len(at) // 4)
            ]
            if row < rows:
                head, inner = channel // HEAD_DIM, channel % HEAD_DIM
                own = lane // 4
                # The order of channels of `reference.transposed_values` with `mixed`.
                to = head * VALUE_ROWS + inner + own % 4 // 2 * 8 + own // 4 * 2 + own % 2
                place = (token + row) // 4 + lane % 4
                for i in cutlass.range_constexpr(len(words)):
                    values[to + i // 2 * 16 + i % 2 * 4, place] = words[i]
                if inner + 8 * len(words) == HEAD_DIM:
                    ones = Int32(0)
                    if own == 0:
                        ones = _ones(rows - row, lane % 4)
                    values[head * VALUE_ROWS + HEAD_DIM + own, place] = ones

    @cute.jit
    def end(
        self,
        gemm,
        param,
        state,
        epi_tile,
        tiled_copy_t2r,
        tiled_copy_r2s,
        tile_coord_mnkl,
        varlen_manager,
        tidx,
    ):
        column, peak = state[2], state[5]
        largest = gemm.largest.iterator.toint()
        if column >= 0:
            top = peak[0]
            for offset in (1, 2, 4, 8, 16):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=offset))
            if cute.arch.lane_idx() == 0:
                _raise(largest, _rounded(top))


@cute.jit
def _ones(left, quarter):
    """Of the word with the tokens 2q, 2q + 8, 2q + 1 and 2q + 9 of sixteen, ones for those that are left."""
    word = Int32(0)
    for i in cutlass.range_constexpr(4):
        if 2 * quarter + i // 2 + i % 2 * 8 < left:
            word = word | Int32(0x38 << 8 * i)
    return word


def _columns_before(values: cute.Tensor) -> Any:
    """Q's and K's columns, which are in front of V's."""
    return values.shape[0] // VALUE_ROWS * (2 * HEAD_DIM)


def _places(coordinates: cute.Tensor, sizes: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Where in a thread's part of a tile an element is, by its row and column from the thread's first."""
    layouts = [
        cute.composition(cute.make_layout(sizes, stride=stride), coordinates.layout) for stride in ((1, 0), (0, 1))
    ]
    found = {tuple(cute.crd2idx(i, layout) for layout in layouts): i for i in range(cute.size(coordinates))}
    width = len(found) // 4
    assert set(found) == {(row, 8 * i + j) for row in (0, 8) for i in range(width) for j in (0, 1)} and width % 2 == 0
    return found


class _QueriesAndKeys(TileStore):
    """Rows of Q and K, as wide as those two."""

    def __init__(self, name: str) -> None:
        # Any function: quack takes the width of the product for the output's without one.
        super().__init__(name, epi_tile_fn=_whole)

    def config_key(self):
        return (SOURCE,)

    def store_setup(self, gemm, params, smem_tensor, tiled_copy_r2s, tiled_copy_t2r, tile_coord_mnkl, *rest):
        copy, to, write, always = super().store_setup(
            gemm, params, smem_tensor, tiled_copy_r2s, tiled_copy_t2r, tile_coord_mnkl, *rest
        )
        assert always is None, "what quack asks before it writes a tile is the last of what it is given here"
        columns = _columns_before(params.values)
        return copy, to, write, tile_coord_mnkl[1] * gemm.cta_tile_shape_mnk[1] < columns


def _whole(gemm, epi_tile):
    return epi_tile


def _product(acc, scale, weight_scale, bias):
    """acc * scale * weight_scale + bias, an element: a row's of Q and K, or V's."""
    y = acc * scale * weight_scale + bias
    return {"qk": y, "values": y}


product = EpiMod(
    _product,
    outputs=(_QueriesAndKeys("qk"),),
    ops=_vectors(columns=("scale",), rows=("weight_scale", "bias")),
    outs={"values": _Values("values")},
    extra_ops=(_Largest("largest"),),
)


def tiles_of(width: int) -> dict[str, Any]:
    """How quack cuts a product that is `width` wide, Q, K and V."""
    inner = width // 3
    return tile_options(next(columns for columns in WIDTHS if inner % columns == 0), takes_turns=True)


def _outputs(q: torch.Tensor, batch: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qk as (batch * tokens, 2 * inner) and values of a product that is `width` wide, not written yet, and zeros."""
    inner = width // 3
    values = q.new_empty(transposed_shape(batch, tokens, inner // HEAD_DIM, HEAD_DIM), dtype=E4M3)
    largest = q.new_zeros(batch, dtype=torch.float32)
    # With room for what `_multiply` takes for the last row's V.
    qk = q.new_empty(batch * tokens * 2 * inner + inner, dtype=torch.bfloat16)
    return qk[: batch * tokens * 2 * inner].view(-1, 2 * inner), values, largest


def _multiply(
    cut: dict[str, Any],
    q: torch.Tensor,
    weight: torch.Tensor,
    qk: torch.Tensor,
    values: torch.Tensor,
    largest: torch.Tensor,
    begins: torch.Tensor | None = None,
    **vectors: torch.Tensor,
) -> None:
    """One sample's qk (S, 2 * inner), values (H, VALUE_ROWS, S') and largest (1,); all else as for `gemm.multiply`."""
    rows, inner = len(q), weight.shape[-2] // 3
    outputs = {
        # As wide as the product: nothing is written where V would be, which is the next row.
        "qk": qk.as_strided((rows, 3 * inner), (2 * inner, 1)),
        "values": values.view(torch.int32).flatten(0, 1),
        "largest": largest,
    }
    multiply(product, cut, q, weight, None, begins=begins, outputs=outputs, **vectors)


def _check_width(width: int) -> None:
    """
    Raises:
        ValueError: unless Q, K and V have heads of 128 channels.
    """
    if width % (3 * HEAD_DIM):
        raise ValueError(f"expected Q, K and V with heads of {HEAD_DIM} channels, got {width} columns of the three")


def _check_text(text_tokens: int, tokens: int) -> None:
    """
    Raises:
        ValueError: unless there are tokens of both streams, and the image's begin where sixteen tokens do.
    """
    if text_tokens % PADDING:
        raise ValueError(
            f"expected a multiple of {PADDING} tokens of text, got {text_tokens}: ask the pipeline for such a "
            "max_sequence_length"
        )
    _check_groups(text_tokens, tokens)


@torch.library.custom_op("fluxfast::qkv_linear", mutates_args=())
def qkv_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    samples: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a @ w.T + bias, Q and K as they are, and V as attention takes it.

    Args:
        q, scale: (B * S, K) float8_e4m3fn and (B * S, 1) float32, a = q * scale.
        weight, weight_scale: (3 * H * 128, K) float8_e4m3fn, of Q, K and V, and (1, 3 * H * 128) float32.
        bias: (3 * H * 128,) bfloat16 or float32. samples: B.

    Returns:
        Q and K side by side, (B * S, 2 * H * 128) bfloat16; V, (B, H, 136, S') float8_e4m3fn as
        `reference.transposed_values(v, mixed=True)` has it, rounded once and saturating; and (B,) float32, of each
        sample the largest magnitude in V, of what is not NaN. The tensor cores accumulate as they do for
        `use_fast_accum`.

    Raises:
        ValueError: for shapes that do not fit, and for tensors that are not on CUDA.
    """
    rows, width = len(q), len(weight)
    _check_width(width)
    vectors = {"scale": (scale, (rows, 1)), "weight_scale": (weight_scale, (1, width)), "bias": (bias, (width,))}
    _check(rows, width, q=(q, (rows, weight.shape[1])), **vectors)
    _check_samples(rows, samples)
    outputs = _outputs(q, samples, rows // samples, width)
    qk, values, largest = outputs
    by_sample = zip(*(x.chunk(samples) for x in (q, scale, qk)), values, largest[:, None], strict=True)
    for a, a_scale, rows_of_qk, v, top in by_sample:
        _multiply(tiles_of(width), a, weight, rows_of_qk, v, top, scale=a_scale, weight_scale=weight_scale, bias=bias)
    return outputs


@qkv_linear.register_fake
def _(q, scale, weight, weight_scale, bias, samples):
    return _outputs(q, samples, len(q) // samples, len(weight))


@torch.library.custom_op("fluxfast::grouped_qkv_linear", mutates_args=())
def grouped_qkv_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `qkv_linear`, for two streams as in `gemm.grouped_linear`.

    Args:
        text_tokens: T, a multiple of 16: V's tokens change places in sixteens, none of which two weights can write.

    Returns:
        As there, Q and K as (B, T + S, 2 * H * 128).
    """
    (batch, tokens), width = q.shape[:2], weight.shape[1]
    _check_width(width)
    _check_text(text_tokens, tokens)
    _check(batch * tokens, width, **_grouped_operands(q, scale, weight, weight_scale, bias))
    qk, values, largest = _outputs(q, batch, tokens, width)
    qk = qk.view(batch, tokens, -1)
    borders = begins(text_tokens, tokens, q.device)
    for a, a_scale, rows_of_qk, v, top in zip(q, scale[..., 0], qk, values, largest[:, None], strict=True):
        its = {"scale": a_scale, "weight_scale": weight_scale, "bias": bias}
        _multiply(tiles_of(width), a, weight, rows_of_qk, v, top, borders, **its)
    return qk, values, largest


@grouped_qkv_linear.register_fake
def _(q, scale, weight, weight_scale, bias, text_tokens):
    qk, values, largest = _outputs(q, len(q), q.shape[1], weight.shape[1])
    return qk.view(*q.shape[:2], -1), values, largest

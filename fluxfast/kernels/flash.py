"""Attention of e4m3 q, k, v for Hopper that writes its probabilities as codes: flash attention without exponentials.

e4m3's code of 2^x is nearly 8 * x plus a constant: its mantissa is linear between powers of two, where 2^x is not, and
the difference is at most 6 %, as much as the code's own rounding. Queries come scaled so that a product is a number of
codes, and a probability costs one fused multiply-add, for two elements at once in half precision: it adds the constant
and rounds to an integer, instead of an exponential of the special-function unit and a conversion. What a row is scaled
by are powers of two only, which move codes by multiples of 8, exactly. Sums are of the codes' values, so that what is
linear cancels: V gets a row of ones, and the tensor cores add up.

One thread block a processor (SM) works through tiles of 128 queries: a warp loads K and V (TMA), two groups of four
warps take 64 queries each. While one group makes codes of its scores, the tensor cores are the other's. Two thread
blocks, a cluster, take tiles of one head at a time, and each loads half of its keys and values for both. Where the last
wave of tiles would leave most processors idle, its keys are divided into parts, which `_combine_kernel` adds up.

The tensor cores add up e4m3 products with 13 bits behind the largest, whatever type the sum is kept in: a sum of 4352
probabilities in one register would lose 7 %. Sums leave the registers after every 256 keys; V's products, of both
signs, stay, as in FlashAttention-3. Scores are added up in half precision, which is what codes are made of, and takes
half of the registers and of their traffic.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import cutlass
import torch
import triton
import triton.language as tl
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Float16, Float32, Int16, Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineUserType, pipeline_init_arrive, pipeline_init_wait
from cutlass.tensor_utils import LayoutEnum
from quack import copy_utils, layout_utils, sm90_utils
from quack.cache import jit_cache
from quack.compile_utils import make_fake_stream, make_fake_tensor
from quack.fast_math import FastDivmod
from quack.pipeline import PipelineTmaAsync, make_pipeline_state
from torch.library import wrap_triton

from fluxfast.kernels.device import FLOOR, MAX, require_runnable, to_bfloat16, to_e4m3
from fluxfast.kernels.reference import CODES_A_BINADE, LARGEST_BINADE, PADDING, SUM_ROWS, TOP_CODE, transposed_shape
from fluxfast.kernels.rowwise import AMAX_FLOOR, E4M3, E4M3_MAX
from fluxfast.machine import processors

HEAD_DIM = 128
GROUPS = 2
"""Of four warps that multiply; each takes 64 queries, the height of a tensor core instruction."""
GROUP_ROWS = 64
QUERIES = GROUPS * GROUP_ROWS
KEYS = 256
CLUSTER = 2
"""Thread blocks that share keys and values: each loads its part of a block of keys for all of them (TMA multicast)."""
PART = KEYS // CLUSTER
"""128 keys or a multiple, so that values lie in shared memory as those of a whole block do."""
assert PART % 128 == 0
STAGES = 2
"""Blocks of keys, and of values, that are in shared memory."""
QUERY_STAGES = 2
"""Tiles of queries that are."""
VALUE_ROWS = HEAD_DIM + SUM_ROWS
THREADS = 128 * (GROUPS + 1)
REGISTERS = (24, 240)
"""Of a thread that loads and of one that multiplies; together what a processor has."""
COMBINED_ROWS = 8
"""Of a program, two a warp."""

F8 = cutlass.Float8E4M3FN
UNIT = 2.0**-24
"""The smallest half."""
SUMS = 4 * (HEAD_DIM // 8)
"""Where a thread's accumulators of the row of ones begin: behind four for each eight columns."""
CONSTANTS = (CODES_A_BINADE, LARGEST_BINADE, PADDING, SUM_ROWS, TOP_CODE, AMAX_FLOOR, E4M3_MAX)
SOURCE = hashlib.sha256(Path(__file__).read_bytes() + repr(CONSTANTS).encode()).hexdigest()
"""All that the kernel is made from, but for the libraries."""


def _ptx(instruction: str, *args: Any, out: tuple[Any, ...], loc: Any, ip: Any) -> Any:
    return cute.arch.inline_ptx(instruction, write_only_types=list(out), read_only_args=list(args), loc=loc, ip=ip)


@dsl_user_op
def _pack(low, high, *, loc=None, ip=None):
    """Two float32 as halves."""
    return _ptx("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", low, high, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _unpack(pair, *, loc=None, ip=None):
    """Two halves as float32."""
    ptx = "{.reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h;}"
    return _ptx(ptx, pair, out=(Float32, Float32), loc=loc, ip=ip)


@dsl_user_op
def _largest(a, b, *, loc=None, ip=None):
    """Of halves, two at once; of a number and NaN, the number."""
    return _ptx("max.f16x2 {$w0}, {$r0}, {$r1};", a, b, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _bytes(a, b, chosen, *, loc=None, ip=None):
    """Four of eight bytes, by number from the lowest."""
    return _ptx("prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", a, b, Int32(chosen), out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _two_codes(scores, shift, *, loc=None, ip=None):
    """Of halves, max(0, scores + shift / UNIT) rounded to integers, in the lowest byte of each half.

    Subnormal halves are the multiples of UNIT, their bits the integers: one multiplication by UNIT, which is exact, and
    an addition that rounds. NaN, a multiplication's own, is 0x7FFF, and so ends in e4m3's NaN.
    """
    ptx = "{.reg .b32 m; mov.b32 m, 0x00010001; fma.rn.relu.f16x2 {$w0}, {$r0}, m, {$r1};}"
    return _ptx(ptx, scores, shift, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _four_codes(a, b, c, d, *, loc=None, ip=None):
    """float32 in e4m3, to nearest even, saturating, the first in the lowest byte."""
    low = "cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0};"
    high = "cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2};"
    ptx = "{.reg .b16 l, h; " + low + high + " mov.b32 {$w0}, {l, h};}"
    return _ptx(ptx, a, b, c, d, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _ceil(x, *, loc=None, ip=None):
    return _ptx("cvt.rpi.f32.f32 {$w0}, {$r0};", x, out=(Float32,), loc=loc, ip=ip)


@dsl_user_op
def _zero(x, *, loc=None, ip=None):
    """Zero in the register of `x`: a constant would get one of its own, and ptxas would wait between products."""
    return _ptx("mul.f32 {$w0}, {$r0}, 0f00000000;", x, out=(Float32,), loc=loc, ip=ip)


@dsl_user_op
def _peer(address, rank, *, loc=None, ip=None):
    """Where the same shared memory of another thread block of the cluster is."""
    return _ptx("mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", address, rank, out=(Int32,), loc=loc, ip=ip)


@dsl_user_op
def _arrive(address, *, loc=None, ip=None):
    """At a barrier of any thread block of the cluster. With `.release.cluster`, ptxas would fence the whole GPU."""
    ptx = "mbarrier.arrive.shared::cluster.b64 _, [{$r0}];"
    _ptx(ptx, address, out=(), loc=loc, ip=ip)


@cute.jit
def _release(emptied, stage, thread):
    """A warp tells all thread blocks of the cluster that it has read a buffer."""
    if thread % 32 < CLUSTER:
        _arrive(emptied + 8 * stage)


@cute.jit
def _mask_scores(pairs: cute.Tensor, left):
    """-inf for the columns from `left` on, counted from a thread's first."""
    for i in cutlass.range_constexpr(cute.size(pairs)):
        for half in cutlass.range_constexpr(2):
            if 8 * (i // 2) + half >= left:
                pairs[i] = _bytes(pairs[i], Int32(0xFC00), (0x3254, 0x5410)[half])


@cute.jit
def _write_codes(pairs: cute.Tensor, bins):
    """Scores become codes, in place.

    Args:
        pairs: of halves, a thread's accumulators: for each eight columns two neighbours in a row and the two of the row
            8 below.
        bins: for each row, the power of two that its codes are relative to.

    Returns:
        The new bins: at least the old ones, and no smaller than the largest score.
    """
    top = [pairs[i] for i in range(4)]
    for i in cutlass.range_constexpr(4, cute.size(pairs)):
        top[i % 4] = _largest(top[i % 4], pairs[i])
    first, second = _largest(top[0], top[2]), _largest(top[1], top[3])
    # The four threads of a quad share two rows: a half for each.
    rows = _largest(_bytes(first, second, 0x5410), _bytes(first, second, 0x7632))
    for offset in (1, 2):
        rows = _largest(rows, cute.arch.shuffle_sync_bfly(rows, offset=offset))
    new, shifts = [], []
    for old, score in zip(bins, _unpack(rows), strict=True):
        row = cute.arch.fmax(old, _ceil(score * (1 / CODES_A_BINADE)))
        # Past that, halves do not hold every code's place.
        shift = cutlass.select_(row <= LARGEST_BINADE, (TOP_CODE - CODES_A_BINADE * row) * UNIT, Float32(math.nan))
        new.append(row)
        shifts.append(_pack(shift, shift))
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = _two_codes(pairs[i], shifts[i % 2])
    return new


@cute.jit
def _gather_codes(pairs: cute.Tensor, probabilities: cute.Tensor):
    """Codes in the order in which a thread holds the left operand of a product, four a register.

    It holds columns 4t to 4t + 3 where the accumulators had 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16 columns. They go
    there as 2t, 2t + 8, 2t + 1 and 2t + 9, and V's tokens stand in that order (`reference.transposed_values`).
    """
    for i in cutlass.range_constexpr(cute.size(probabilities)):
        at = i // 2 * 4 + i % 2
        probabilities[i] = _bytes(pairs[at], pairs[at + 2], 0x6240)


@cute.jit
def _rescale(out: cute.Tensor, count: cutlass.Constexpr[int], sums, old, new):
    """Accumulators and sums, to be relative to new bins, if a row of the warp has one."""
    if cute.arch.vote_any_sync((new[0] > old[0]) | (new[1] > old[1])):
        by = [cute.math.exp2(old[row] - new[row], fastmath=True) for row in (0, 1)]
        for i in cutlass.range_constexpr(count):
            out[i] *= by[i // 2 % 2]
        sums[0] *= by[0]
        sums[1] *= by[1]
    return sums


@cute.jit
def _place(item, rank, whole, tall: FastDivmod, heads: FastDivmod, parts: FastDivmod, part_blocks, blocks):
    """Of an item, this thread block's tile of queries, head and sample, its blocks of keys, from one on, up to another,
    and where its partial output goes."""
    tile, begin, end = item, Int32(0), blocks
    place = Int32(0)
    if item >= whole:
        tile, part = divmod(item - whole, parts)
        place = (CLUSTER * tile + rank) * parts.divisor + part
        tile, begin = tile + whole, part * part_blocks
        end = cutlass.min(begin + part_blocks, blocks)
    lane, row = divmod(tile, tall)
    sample, head = divmod(lane, heads)
    return CLUSTER * row + rank, head, sample, begin, end, place


@cute.jit
def _unit(largest: cute.Tensor, sample):
    """The scale with which no output saturates: they are means of V's codes."""
    return cute.arch.fmax(largest[sample], Float32(AMAX_FLOOR)) * (1 / E4M3_MAX)


class _Forward:
    """The kernel; CuTe DSL compiles it once for all sizes.

    Attributes:
        at_once: processors (SMs).
        quantized: whether outputs are codes, see `coded_attention_quantize`; if not, all that is about scales is None.
        bounded: whether a row's scale has a bound of its own.
    """

    def __init__(self, at_once: int, *, quantized: bool, bounded: bool) -> None:
        self.at_once = at_once
        self.quantized = quantized
        self.bounded = bounded

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        partial: cute.Tensor,
        weights: cute.Tensor,
        largest: Any,
        row_scale: Any,
        bound: Any,
        out_scale: Any,
        parts: Int32,
        stream: CUstream,
    ):
        """q, k, v, out: see `coded_attention`, codes two an element of `out`; partial (items, QUERIES, HEAD_DIM) and
        weights (items, QUERIES) for the tiles whose keys are divided into `parts`. largest (B,), row_scale and
        out_scale (B * S,) and bound (2,): see `coded_attention_quantize`."""
        # Rows and channels first, then head and sample.
        q, k, out = [layout_utils.select(x, [1, 3, 2, 0]) for x in (q, k, out)]
        v, partial = layout_utils.select(v, [2, 3, 1, 0]), layout_utils.select(partial, [1, 2, 0])
        q_layout = sm90_utils.make_smem_layout(F8, LayoutEnum.ROW_MAJOR, (QUERIES, HEAD_DIM), QUERY_STAGES)
        k_layout = sm90_utils.make_smem_layout(F8, LayoutEnum.ROW_MAJOR, (KEYS, HEAD_DIM), STAGES)
        v_layout = sm90_utils.make_smem_layout(F8, LayoutEnum.ROW_MAJOR, (VALUE_ROWS, KEYS), STAGES)
        # The same memory, in parts that one thread block loads for all.
        k_loaded = sm90_utils.make_smem_layout(F8, LayoutEnum.ROW_MAJOR, (PART, HEAD_DIM), CLUSTER * STAGES)
        v_loaded = sm90_utils.make_smem_layout(F8, LayoutEnum.ROW_MAJOR, (VALUE_ROWS, PART), CLUSTER * STAGES)
        partial_layout = sm90_utils.make_smem_layout(BFloat16, LayoutEnum.ROW_MAJOR, (GROUP_ROWS, HEAD_DIM), GROUPS)
        width = HEAD_DIM // 2 if self.quantized else HEAD_DIM
        out_layout = sm90_utils.make_smem_layout(BFloat16, LayoutEnum.ROW_MAJOR, (GROUP_ROWS, width), GROUPS)
        q_tile, k_tile, v_tile, out_tile, partial_tile = [
            cute.select(layout, mode=[0, 1]) for layout in (q_layout, k_loaded, v_loaded, out_layout, partial_layout)
        ]
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        q_copy, q = cpasync.make_tiled_tma_atom(load, q, q_tile, (QUERIES, HEAD_DIM))
        shared_load = cpasync.CopyBulkTensorTileG2SMulticastOp()
        k_copy, k = cpasync.make_tiled_tma_atom(shared_load, k, k_tile, (PART, HEAD_DIM))
        v_copy, v = cpasync.make_tiled_tma_atom(shared_load, v, v_tile, (VALUE_ROWS, PART))
        out_copy, out = cpasync.make_tiled_tma_atom(store, out, out_tile, (GROUP_ROWS, width))
        partial_copy, partial = cpasync.make_tiled_tma_atom(store, partial, partial_tile, (GROUP_ROWS, HEAD_DIM))
        groups = {"atom_layout_mnk": (GROUPS, 1, 1)}
        score_product = sm90_utils.make_tiled_mma(F8, "K", "K", KEYS, acc_dtype=Float16, **groups)
        value_product = sm90_utils.make_tiled_mma(F8, "K", "K", VALUE_ROWS, source="RS", **groups)
        # Never multiplied with: it says which thread of a group holds what of an output without sums.
        held = sm90_utils.make_tiled_mma(F8, "K", "K", HEAD_DIM, source="RS")
        held_codes = sm90_utils.make_tiled_mma(F8, "K", "K", HEAD_DIM // 2, source="RS")
        narrow = cute.cosize(out_layout) if self.quantized else 0

        @cute.struct
        class Storage:
            q_barriers: cute.struct.MemRange[Int64, 2 * QUERY_STAGES]
            k_barriers: cute.struct.MemRange[Int64, 2 * STAGES]
            v_barriers: cute.struct.MemRange[Int64, 2 * STAGES]
            q: cute.struct.Align[cute.struct.MemRange[F8, cute.cosize(q_layout)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[F8, cute.cosize(k_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[F8, cute.cosize(v_layout)], 1024]
            partial: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(partial_layout)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[BFloat16, narrow], 1024]

        self.storage = Storage
        # All in clusters from here on.
        tall, blocks = cute.ceil_div(q.shape[0], CLUSTER * QUERIES), cute.ceil_div(k.shape[0], KEYS)
        at_once = self.at_once // CLUSTER
        tiles = tall * q.shape[2] * q.shape[3]
        whole = tiles
        if parts > 1:
            whole = tiles // at_once * at_once
        items = whole + (tiles - whole) * parts
        self.kernel(
            q_copy, q, k_copy, k, v_copy, v, out_copy, out, partial_copy, partial, weights,
            largest, row_scale, bound, out_scale, score_product, value_product, held, held_codes,
            q_layout, k_layout, v_layout, k_loaded, v_loaded, out_layout, partial_layout,
            FastDivmod(tall), FastDivmod(q.shape[2]), FastDivmod(parts),
            whole, items, cute.ceil_div(blocks, parts),
        ).launch(
            grid=[CLUSTER * cutlass.min(items, at_once), 1, 1], block=[THREADS, 1, 1], cluster=[CLUSTER, 1, 1],
            stream=stream, min_blocks_per_mp=1,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q_copy: cute.CopyAtom,
        q: cute.Tensor,
        k_copy: cute.CopyAtom,
        k: cute.Tensor,
        v_copy: cute.CopyAtom,
        v: cute.Tensor,
        out_copy: cute.CopyAtom,
        out: cute.Tensor,
        partial_copy: cute.CopyAtom,
        partial: cute.Tensor,
        weights: cute.Tensor,
        largest: Any,
        row_scale: Any,
        bound: Any,
        out_scale: Any,
        score_product: cute.TiledMma,
        value_product: cute.TiledMma,
        held: cute.TiledMma,
        held_codes: cute.TiledMma,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        v_layout: cute.ComposedLayout,
        k_loaded: cute.ComposedLayout,
        v_loaded: cute.ComposedLayout,
        out_layout: cute.ComposedLayout,
        partial_layout: cute.ComposedLayout,
        tall: FastDivmod,
        heads: FastDivmod,
        parts: FastDivmod,
        whole: Int32,
        items: Int32,
        part_blocks: Int32,
    ):
        """Items from the cluster's own number on: `whole` sets of tiles, one a thread block of it, then parts of
        `part_blocks` blocks of keys of such sets."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for copy in (q_copy, k_copy, v_copy, out_copy, partial_copy):
                cpasync.prefetch_descriptor(copy)
        storage = SmemAllocator().allocate(self.storage)
        create = functools.partial(
            PipelineTmaAsync.create,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            defer_sync=True,
        )
        own = {"consumer_group": pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * GROUPS)}
        # The warps of all thread blocks of the cluster tell each of them that they have read.
        shared = {
            "consumer_group": pipeline.CooperativeGroup(pipeline.Agent.Thread, CLUSTER * 4 * GROUPS),
            "num_stages": STAGES,
        }
        q_ready = create(
            barrier_storage=storage.q_barriers.data_ptr(), num_stages=QUERY_STAGES, tx_count=QUERIES * HEAD_DIM, **own
        )
        k_ready = create(barrier_storage=storage.k_barriers.data_ptr(), tx_count=KEYS * HEAD_DIM, **shared)
        v_ready = create(barrier_storage=storage.v_barriers.data_ptr(), tx_count=VALUE_ROWS * KEYS, **shared)
        pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)
        q_shared = storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        k_shared = storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        v_shared = storage.v.get_tensor(v_layout.outer, swizzle=v_layout.inner)
        k_parts = storage.k.get_tensor(k_loaded.outer, swizzle=k_loaded.inner)
        v_parts = storage.v.get_tensor(v_loaded.outer, swizzle=v_loaded.inner)
        partial_shared = storage.partial.get_tensor(partial_layout.outer, swizzle=partial_layout.inner)
        out_memory = storage.codes if cutlass.const_expr(self.quantized) else storage.partial
        out_shared = out_memory.get_tensor(out_layout.outer, swizzle=out_layout.inner)
        pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

        rank = cute.arch.block_idx()[0] % CLUSTER
        item, at_once = cute.arch.block_idx()[0] // CLUSTER, cute.arch.grid_dim()[0] // CLUSTER
        tokens = k.shape[0]
        blocks = cute.ceil_div(tokens, KEYS)
        if warp < 4:
            cute.arch.setmaxregister_decrease(REGISTERS[0])
            if warp == 0:
                q_at = make_pipeline_state(PipelineUserType.Producer, QUERY_STAGES)
                k_at = make_pipeline_state(PipelineUserType.Producer, STAGES)
                v_at = make_pipeline_state(PipelineUserType.Producer, STAGES)
                while item < items:
                    row, head, sample, begin, end, _ = _place(
                        item, rank, whole, tall, heads, parts, part_blocks, blocks
                    )
                    q_tiles = cute.local_tile(q[None, None, head, sample], (QUERIES, HEAD_DIM), (None, 0))
                    k_tiles = cute.local_tile(k[None, None, head, sample], (PART, HEAD_DIM), (None, 0))
                    v_tiles = cute.local_tile(v[None, None, head, sample], (VALUE_ROWS, PART), (0, None))
                    one = cute.make_layout(1)
                    to_all = {"mcast_mask": Int16(2**CLUSTER - 1)}
                    q_load, _, _ = copy_utils.tma_get_copy_fn(q_copy, 0, one, q_tiles, q_shared)
                    k_load, _, _ = copy_utils.tma_get_copy_fn(k_copy, 0, one, k_tiles, k_parts, **to_all)
                    v_load, _, _ = copy_utils.tma_get_copy_fn(v_copy, 0, one, v_tiles, v_parts, **to_all)
                    q_ready.producer_acquire(q_at)
                    q_load(src_idx=row, dst_idx=q_at.index, tma_bar_ptr=q_ready.producer_get_barrier(q_at))
                    q_at.advance()
                    for i in cutlass.range(end - begin, unroll=1):
                        block = end - 1 - i
                        k_ready.producer_acquire(k_at)
                        its = {"src_idx": CLUSTER * block + rank, "dst_idx": CLUSTER * k_at.index + rank}
                        k_load(**its, tma_bar_ptr=k_ready.producer_get_barrier(k_at))
                        k_at.advance()
                        v_ready.producer_acquire(v_at)
                        its = {"src_idx": CLUSTER * block + rank, "dst_idx": CLUSTER * v_at.index + rank}
                        v_load(**its, tma_bar_ptr=v_ready.producer_get_barrier(v_at))
                        v_at.advance()
                    item += at_once
                # Others of the cluster tell this thread block's barriers that they have read: it has to be there still.
                k_ready.producer_tail(k_at)
                v_ready.producer_tail(v_at)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[1])
            thread = cute.arch.thread_idx()[0] - 128
            group = cute.arch.make_warp_uniform(thread // 128)
            thread %= 128
            quad_thread = thread % 4
            score_slice = score_product.get_slice(128 * group)
            value_slice = value_product.get_slice(128 * group)
            q_operand = score_slice.make_fragment_A(score_slice.partition_A(q_shared))
            k_operand = score_slice.make_fragment_B(score_slice.partition_B(k_shared))
            v_operand = value_slice.make_fragment_B(value_slice.partition_B(v_shared))
            p_operand = value_slice.make_fragment_A(value_slice.partition_shape_A((QUERIES, KEYS)))
            probabilities = cute.recast_tensor(p_operand, Int32)
            scores = cute.make_rmem_tensor(score_slice.partition_shape_C((QUERIES, KEYS)), Float16)
            pairs = cute.recast_tensor(scores, Int32)
            summed = cute.make_rmem_tensor(value_slice.partition_shape_C((QUERIES, VALUE_ROWS)), Float32)
            to_shared = cute.make_tiled_copy_C(copy_utils.get_smem_store_atom(BFloat16), held).get_slice(thread)
            rounded = cute.make_rmem_tensor(held.get_slice(thread).partition_shape_C((GROUP_ROWS, HEAD_DIM)), BFloat16)
            rounded_shared = to_shared.partition_D(partial_shared[None, None, group])
            if cutlass.const_expr(self.quantized):
                store_atom = copy_utils.get_smem_store_atom(BFloat16)
                codes_to_shared = cute.make_tiled_copy_C(store_atom, held_codes).get_slice(thread)
                code_pairs = cute.make_rmem_tensor(
                    held_codes.get_slice(thread).partition_shape_C((GROUP_ROWS, HEAD_DIM // 2)), BFloat16
                )
                codes = cute.recast_tensor(code_pairs, Int32)
                codes_shared = codes_to_shared.partition_D(out_shared[None, None, group])
            q_at = make_pipeline_state(PipelineUserType.Consumer, QUERY_STAGES)
            k_at = make_pipeline_state(PipelineUserType.Consumer, STAGES)
            v_at = make_pipeline_state(PipelineUserType.Consumer, STAGES)
            multiply = sm90_utils.gemm_w_idx
            # Beforehand: with an address to be found in each step, ptxas keeps the loop's numbers in every thread.
            k_emptied, v_emptied = [
                _peer((barriers.data_ptr() + STAGES).toint(), thread % CLUSTER)
                for barriers in (storage.k_barriers, storage.v_barriers)
            ]
            slope, offset = Float32(0.0), Float32(0.0)
            if cutlass.const_expr(self.bounded):
                slope, offset = bound[0], bound[1]
            while item < items:
                row, head, sample, begin, end, place = _place(
                    item, rank, whole, tall, heads, parts, part_blocks, blocks
                )
                # The last block of keys first: the only one that may not be full.
                q_ready.consumer_wait(q_at)
                k_ready.consumer_wait(k_at)
                multiply(
                    score_product, scores, q_operand, k_operand, True, A_idx=q_at.index, B_idx=k_at.index, wg_wait=0
                )
                _release(k_emptied, k_at.index, thread)
                k_at.advance()
                if end * KEYS > tokens:
                    # Of `blocks`, which is `end` here: with that, ptxas keeps the loop's numbers in every thread.
                    _mask_scores(pairs, tokens - (blocks - 1) * KEYS - 2 * quad_thread)
                summed.fill(0.0)
                sums = [Float32(0.0), Float32(0.0)]
                bins = _write_codes(pairs, [Float32(-LARGEST_BINADE)] * 2)
                _gather_codes(pairs, probabilities)
                for _ in cutlass.range(end - begin - 1, unroll=1):
                    # The probabilities of one block times its values, and the scores of the next. Meanwhile the other
                    # group makes codes.
                    v_ready.consumer_wait(v_at)
                    multiply(value_product, summed, p_operand, v_operand, False, B_idx=v_at.index)
                    k_ready.consumer_wait(k_at)
                    multiply(score_product, scores, q_operand, k_operand, True, A_idx=q_at.index, B_idx=k_at.index)
                    # Of both products, not only of the first: ptxas would else serialise all of them.
                    warpgroup.wait_group(0)
                    _release(v_emptied, v_at.index, thread)
                    v_at.advance()
                    _release(k_emptied, k_at.index, thread)
                    k_at.advance()
                    for i in cutlass.range_constexpr(2):
                        sums[i] += summed[SUMS + 2 * i]
                        summed[SUMS + 2 * i] = _zero(summed[SUMS + 2 * i])
                    new_bins = _write_codes(pairs, bins)
                    sums = _rescale(summed, SUMS, sums, bins, new_bins)
                    bins = new_bins
                    _gather_codes(pairs, probabilities)
                q_ready.consumer_release(q_at)
                q_at.advance()
                v_ready.consumer_wait(v_at)
                multiply(value_product, summed, p_operand, v_operand, False, B_idx=v_at.index, wg_wait=0)
                _release(v_emptied, v_at.index, thread)
                v_at.advance()

                # The first thread of a quad has the column of the row of ones.
                totals = [
                    cute.arch.shuffle_sync(sums[i] + summed[SUMS + 2 * i], offset=thread % 32 // 4 * 4) for i in (0, 1)
                ]
                inverse = [cute.arch.rcp_approx(total) for total in totals]
                at = GROUP_ROWS * group + thread // 32 * 16 + thread % 32 // 4
                if thread < 32:
                    # What the store of the tile before reads.
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
                if cutlass.const_expr(self.quantized):
                    if item >= whole:
                        self.store_rounded(summed, inverse, rounded, to_shared, rounded_shared)
                    else:
                        for i in cutlass.range_constexpr(2):
                            # Rows past the end do as the last one: without a branch, which would cost ptxas its idea
                            # of what is the same in all threads.
                            token = cutlass.min(QUERIES * row + at + 8 * i, tokens - 1)
                            unit = _unit(largest, sample)
                            if cutlass.const_expr(self.bounded):
                                unit = cute.arch.fmax(unit, row_scale[sample * tokens + token] * slope + offset)
                            if (head == 0) & (quad_thread == 0):
                                out_scale[sample * tokens + token] = unit
                            by = inverse[i] * cute.arch.rcp_approx(unit)
                            # Of sixteen channels a thread has four neighbours: `reference.transposed_values`.
                            for j in cutlass.range_constexpr(HEAD_DIM // 16):
                                four = [summed[8 * j + 2 * i + k] * by for k in (0, 1, 4, 5)]
                                codes[2 * j + i] = _four_codes(*four)
                        cute.copy(codes_to_shared, codes_to_shared.retile(code_pairs), codes_shared)
                else:
                    self.store_rounded(summed, inverse, rounded, to_shared, rounded_shared)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
                if thread < 32:
                    one = cute.make_layout(1)
                    if item >= whole:
                        tiles = cute.local_tile(partial[None, None, place], (GROUP_ROWS, HEAD_DIM), (None, 0))
                        write, _, _ = copy_utils.tma_get_copy_fn(partial_copy, 0, one, partial_shared, tiles)
                        write(src_idx=group, dst_idx=group)
                    else:
                        width = cutlass.const_expr(HEAD_DIM // 2 if self.quantized else HEAD_DIM)
                        tiles = cute.local_tile(out[None, None, head, sample], (GROUP_ROWS, width), (None, 0))
                        write, _, _ = copy_utils.tma_get_copy_fn(out_copy, 0, one, out_shared, tiles)
                        write(src_idx=group, dst_idx=GROUPS * row + group)
                    cute.arch.cp_async_bulk_commit_group()
                if (item >= whole) & (quad_thread == 0):
                    for i in cutlass.range_constexpr(2):
                        weights[place, at + 8 * i] = bins[i] + cute.math.log2(totals[i], fastmath=True)
                item += at_once
            if thread < 32:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def store_rounded(self, summed, inverse, rounded, to_shared, rounded_shared):
        """A thread's outputs, in bfloat16, into shared memory."""
        for i in cutlass.range_constexpr(cute.size(rounded)):
            rounded[i] = BFloat16(summed[i] * inverse[i // 2 % 2])
        cute.copy(to_shared, to_shared.retile(rounded), rounded_shared)


@jit_cache
def coded_attention_kernel(at_once: int, quantized: bool, bounded: bool, source: str) -> Any:
    """Compile the kernel for the GPU at hand, or for the one that CUTE_DSL_ARCH names.

    Args:
        at_once, quantized, bounded: see `_Forward`.
        source: `SOURCE`, lest quack's cache on disk keeps the kernel of another version.
    """
    batch, tokens, heads, items = (cute.sym_int() for _ in range(4))
    q, k = (make_fake_tensor(F8, (batch, tokens, heads, HEAD_DIM), 16) for _ in range(2))
    v = make_fake_tensor(F8, (batch, heads, VALUE_ROWS, cute.sym_int(divisibility=PADDING)), 16)
    out = make_fake_tensor(BFloat16, (batch, tokens, heads, HEAD_DIM // 2 if quantized else HEAD_DIM), 8)
    partial = make_fake_tensor(BFloat16, (items, QUERIES, HEAD_DIM), 8)
    weights = make_fake_tensor(Float32, (items, QUERIES), 4)
    largest = make_fake_tensor(Float32, (batch,)) if quantized else None
    row_scale = make_fake_tensor(Float32, (cute.sym_int(),)) if bounded else None
    bound = make_fake_tensor(Float32, (2,)) if bounded else None
    out_scale = make_fake_tensor(Float32, (cute.sym_int(),)) if quantized else None
    kernel = _Forward(at_once, quantized=quantized, bounded=bounded)
    operands = q, k, v, out, partial, weights, largest, row_scale, bound, out_scale
    return cute.compile(kernel, *operands, Int32(1), make_fake_stream(), options="--enable-tvm-ffi")


@triton.jit
def _combine_kernel(
    partial_ptr, weights_ptr, out_ptr, largest_ptr, row_scale_ptr, bound_ptr, out_scale_ptr,
    tall, first_tile, tokens, parts, out_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    QUANTIZED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """A few rows of a tile: the mean of its parts, whose weights are given as logarithms to base 2."""
    tile = tl.program_id(0) // (TILE // ROWS)
    row = tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    top = tl.load(weights_ptr + tile * parts * TILE + row)
    for part in range(1, parts):
        top = tl.maximum(top, tl.load(weights_ptr + (tile * parts + part) * TILE + row))
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for part in range(parts):
        at = (tile * parts + part) * TILE + row
        weight = tl.exp2(tl.load(weights_ptr + at) - top)
        value = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dims[None, :]).to(tl.float32)
        # A part without a code but zero has no mean: it is NaN.
        out += tl.where(weight[:, None] == 0, 0.0, weight[:, None] * value)
        total += weight
    lane, token = (first_tile + tile) // tall, (first_tile + tile) % tall * TILE + row
    sample, head, exists = lane // HEADS, lane % HEADS, token < tokens
    place = sample.to(tl.int64) * tokens + token
    mean = out / total[:, None]
    to = out_ptr + place[:, None] * out_stride + head * HEAD_DIM
    if QUANTIZED:
        amax = tl.load(largest_ptr + sample)
        unit = tl.zeros([ROWS], tl.float32) + tl.where(amax > FLOOR, amax, FLOOR) * (1 / MAX)
        if BOUNDED:
            least = tl.load(row_scale_ptr + place, mask=exists, other=0.0) * tl.load(bound_ptr) + tl.load(bound_ptr + 1)
            unit = tl.where(least > unit, least, unit)
        if head == 0:
            tl.store(out_scale_ptr + place, unit, mask=exists)
        channel = dims // 16 * 16 + dims % 8 // 2 * 4 + dims % 16 // 8 * 2 + dims % 2
        tl.store(to + channel[None, :], to_e4m3(mean / unit[:, None]), mask=exists[:, None])
    else:
        tl.store(to + dims[None, :], to_bfloat16(mean), mask=exists[:, None])


def tall_of(tokens: int) -> int:
    """Tiles of queries of a head, some past its end perhaps: a multiple of a cluster's."""
    return CLUSTER * -(-tokens // (CLUSTER * QUERIES))


def parts_of(batch: int, tokens: int, heads: int, at_once: int) -> tuple[int, int]:
    """Into how many parts the keys of the last wave of tiles are divided, and how many tiles that are.

    FLUX.1 at 1024x1024 has 816 tiles on 132 processors: 24 after six full waves, whose keys 120 processors share.

    Args:
        at_once: processors (SMs).

    Returns:
        (1, 0) if nothing is divided. A part has a block of keys at least.
    """
    tiles, blocks = batch * heads * tall_of(tokens), -(-tokens // KEYS)
    at_once = at_once // CLUSTER * CLUSTER
    left = tiles % at_once
    if tiles < at_once or left == 0:
        return 1, 0

    def fits(parts: int) -> bool:
        return blocks > (parts - 1) * -(-blocks // parts)

    parts = max((parts for parts in range(1, at_once // left + 1) if fits(parts)), default=1)
    return (parts, left) if parts > 1 else (1, 0)


def combine_parts(
    partial: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    parts: int,
    *,
    largest: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Write the last tiles of `out` (B, S, H, Dh): the means of their parts.

    Args:
        partial: (tiles * parts, QUERIES, Dh) bfloat16, the parts of a tile side by side.
        weights: (tiles * parts, QUERIES) float32, of each row, as logarithms to base 2. Of -inf, a row may be NaN.
        out: of bfloat16, or of e4m3 with `largest`, as all else in `coded_attention_quantize`; tokens may be strided.
            For e4m3 the channels of `partial` are in the order of `reference.transposed_values`.
    """
    batch, tokens, heads, dim = out.shape
    require_runnable(partial, weights, out)
    tiles, tall = len(partial) // parts, tall_of(tokens)
    scales = (weights if x is None else x for x in (largest, row_scale, bound, out_scale))
    wrap_triton(_combine_kernel)[(tiles * QUERIES // COMBINED_ROWS,)](
        partial,
        weights,
        out,
        *scales,
        tall,
        batch * heads * tall - tiles,
        tokens,
        parts,
        out.stride(1),
        heads,
        dim,
        QUERIES,
        COMBINED_ROWS,
        largest is not None,
        bound is not None,
        num_warps=COMBINED_ROWS // 2,
    )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    largest: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Attention into `out` (B, S, H, 128); see `coded_attention`, and `coded_attention_quantize` for what is optional.

    Raises:
        ValueError: for shapes and types that do not fit, and for tensors that are not on CUDA.
    """
    batch, tokens, heads, dim = query.shape
    given = {"key": key, "value": value, "largest": largest, "scale": row_scale, "bound": bound}
    expected = {
        "key": query.shape,
        "value": transposed_shape(*query.shape),
        "largest": (batch,),
        "scale": (batch * tokens, 1),
        "bound": (2,),
    }
    got = {name: tuple(x.shape) for name, x in given.items() if x is not None}
    if wrong := {name: shape for name, shape in got.items() if shape != tuple(expected[name])}:
        fitting = {name: tuple(expected[name]) for name in got}
        raise ValueError(f"expected {fitting} beside a query of {tuple(query.shape)}, got {wrong}")
    if dim != HEAD_DIM:
        raise ValueError(f"expected heads of {HEAD_DIM}, got {dim}")
    if types := {x.dtype for x in (query, key, value)} - {E4M3}:
        raise ValueError(f"expected e4m3 q, k and v, got {', '.join(map(str, types))}")
    tensors = [query, *(x for x in given.values() if x is not None)]
    if elsewhere := {x.device.type for x in tensors} - {"cuda"}:
        raise ValueError(f"attention got tensors on {', '.join(elsewhere)}; it runs on CUDA, `reference` anywhere")
    at_once = processors()
    parts, tiles = parts_of(batch, tokens, heads, at_once)
    partial = torch.empty((max(parts * tiles, 1), QUERIES, dim), dtype=torch.bfloat16, device=query.device)
    weights = torch.empty((len(partial), QUERIES), dtype=torch.float32, device=query.device)
    operands = (x.contiguous() for x in (query, key, value))
    by_row = [None if x is None else x.reshape(-1) for x in (row_scale, out_scale)]
    kernel = coded_attention_kernel(at_once, largest is not None, bound is not None, SOURCE)
    # Codes go two an element: 16 bits are what a matrix of the tensor cores' layout is stored in.
    stored = out.view(torch.bfloat16)
    kernel(*operands, stored, partial, weights, largest, by_row[0], bound, by_row[1], parts)
    if tiles:
        scales = {"largest": largest, "row_scale": row_scale, "bound": bound, "out_scale": out_scale}
        combine_parts(partial, weights, out, parts, **scales)


@torch.library.custom_op("fluxfast::coded_attention", mutates_args=())
def coded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q @ k.T * ln(2) / 8) @ v, with probabilities in e4m3.

    Args:
        query, key: (B, S, H, 128) float8_e4m3fn; queries are multiplied by `reference.code_scale` beforehand.
        value: (B, H, 136, S') float8_e4m3fn, see `reference.transposed_values`.

    Returns:
        (B, S, H, 128) bfloat16. A probability is within 6 % of itself and e4m3's own rounding, and where products of
        queries and keys are past 500, the halves that they are added up in lose as much again. One below 2^-13 of a
        row's largest may be smaller than it should be, one below 2^-14 zero. A row is NaN if q is, if the exponential
        of a score is past 2^256, and if those of all scores are so far below 2^-256 that none has a code; NaN in k
        makes its head NaN, in v its channel.

    Raises:
        ValueError: for shapes and types that do not fit, and for tensors that are not on CUDA.
    """
    out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
    _attend(query, key, value, out)
    return out


@coded_attention.register_fake
def _(query, key, value):
    return torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)


@torch.library.custom_op("fluxfast::coded_attention_quantize", mutates_args=())
def coded_attention_quantize(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    largest: torch.Tensor,
    scale: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    beside: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`coded_attention` of all heads of a token as one row of codes, whose scale is known before the row is.

    An output is a mean of V, so that with a scale of V's largest magnitude / 448 nothing saturates.

    Args:
        query, key: as there. value: as there, its channels in the order of `reference.transposed_values`'s `mixed`.
        largest: (B,) float32, of each sample the largest magnitude in `value`, of what is not NaN.
        scale, bound: (B * S, 1) and (2,) float32, or None: a row's scale is at least `scale * bound[0] + bound[1]`,
            which is that of what goes beside it, see `gemm.gelu_linear_quantize_beside`.
        beside: columns that are left to be written by others.

    Returns:
        codes (B * S, H * 128 + beside) float8_e4m3fn and scale (B * S, 1) float32. What `coded_attention` says of NaN
        is true of codes; a row with one has a scale all the same.

    Raises:
        ValueError: as there, and for a scale without a bound.
    """
    batch, tokens, heads, dim = query.shape
    if (scale is None) != (bound is None):
        raise ValueError("scale and bound are given together or not at all")
    codes = torch.empty((batch * tokens, heads * dim + beside), dtype=E4M3, device=query.device)
    out_scale = torch.empty((batch * tokens, 1), dtype=torch.float32, device=query.device)
    out = codes[:, : heads * dim].view(batch, tokens, heads, dim)
    _attend(query, key, value, out, largest, scale, bound, out_scale)
    return codes, out_scale


@coded_attention_quantize.register_fake
def _(query, key, value, largest, scale=None, bound=None, beside=0):
    batch, tokens, heads, dim = query.shape
    codes = query.new_empty((batch * tokens, heads * dim + beside), dtype=E4M3)
    return codes, query.new_empty((batch * tokens, 1), dtype=torch.float32)

"""Device functions that the Triton kernels share: casts, the row maximum, and rows whose length is no power of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxfast.kernels.rowwise import AMAX_FLOOR, E4M3_MAX

MAX = tl.constexpr(E4M3_MAX)
FLOOR = tl.constexpr(AMAX_FLOOR)


def require_runnable(*tensors: torch.Tensor) -> None:
    """
    Raises:
        ValueError: for CPU tensors outside the interpreter, and for tensors whose last axis is strided.
    """
    for tensor in tensors:
        if not INTERPRETED and tensor.device.type != "cuda":
            raise ValueError(
                f"a Triton kernel got a tensor on {tensor.device}; it runs on CUDA, or on the CPU when "
                "TRITON_INTERPRET=1 is set before the first import. The reference operations run anywhere: "
                "fluxfast.kernels.reference."
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last axis must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}"
            )


def split_row(length: int) -> tuple[int, int]:
    """Two power-of-two spans that cover a row: 12288 -> (8192, 4096), 3072 -> (2048, 1024), 4096 -> (4096, 0).

    One span of the next power of two would leave a quarter of the lanes idle at FLUX's sizes.
    """
    if length == 0:
        return 0, 0
    head = 1 << (length.bit_length() - 1)
    return head, triton.next_power_of_2(length - head) if length > head else 0


@triton.jit
def load_span(row, START: tl.constexpr, LENGTH: tl.constexpr, SPAN: tl.constexpr):
    """Elements START .. START + SPAN of a row of LENGTH, as float32, zero past its end."""
    columns = START + tl.arange(0, SPAN)
    if START + SPAN <= LENGTH:  # noqa: SIM108 - decided when the kernel is compiled
        x = tl.load(row + columns)
    else:
        x = tl.load(row + columns, mask=columns < LENGTH, other=0.0)
    return x.to(tl.float32)


INTERPRETED = not isinstance(load_span, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1` when this module is imported): on CPU tensors."""

# The interpreter (3.6 to 3.9) truncates to bfloat16, its cast to e4m3 rounds ties up, loses carries and turns NaN into
# 384, and it has no inline PTX. There, and only there, the functions below compute in software what a GPU does in one
# or two instructions.
SOFTWARE = tl.constexpr(INTERPRETED)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|: as integers they sort like the magnitudes, infinity above all numbers and NaN above infinity.

    So an integer maximum propagates NaN, which `tl.max` on floats drops, and reduces with Hopper's `redux.sync`.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(max_bits):
    """The scale of a row whose largest magnitude has these bits; NaN for NaN, positive for zero."""
    amax = max_bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(amax < FLOOR, FLOOR, amax), MAX)


@triton.jit
def to_e4m3(x):
    """float32 -> e4m3, to nearest even, saturating at 448 (infinities too), NaN kept."""
    if SOFTWARE:
        bits = magnitude_bits(x)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the codes are multiples of 2^-9; adding 1.5 * 2^23 leaves that multiple in the low mantissa bits.
        small = tl.where(bits < 0x3C800000, bits, 0).to(tl.float32, bitcast=True)
        subnormal = (small * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(bits < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(bits > 0x7F800000, 0x7F, code) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        # cvt.rn.satfinite.e4m3x2.f32: a clamp in front of it would be two more instructions an element.
        return x.to(tl.float8e4nv)


@triton.jit
def inverse_of_one_plus_exp2(x):
    """1 / (1 + 2^x), within 4 float32 roundings; 0 where 2^x overflows.

    On a GPU two instructions of the special-function unit, without the handling of denormals that `tl.exp` and `/`
    bring along: with that and a clamp in `to_e4m3` the GELU kernel has 1336 SASS instructions a warp instead of 880;
    about 1250 can be issued in the time of its memory traffic (counted with Triton 3.6 for sm_90, not timed).
    """
    if SOFTWARE:
        return 1.0 / (1.0 + tl.exp2(x))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def to_bfloat16(x):
    """float32 -> bfloat16, to nearest even, NaN kept."""
    if SOFTWARE:
        bits = x.to(tl.int32, bitcast=True)
        code = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        code = tl.where(magnitude_bits(x) > 0x7F800000, 0x7FC0, code)
        return code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def store_columns(row, x, START: tl.constexpr, LENGTH: tl.constexpr, SPAN: tl.constexpr):
    """Store a span of a row of LENGTH, nothing past its end."""
    columns = START + tl.arange(0, SPAN)
    if START + SPAN <= LENGTH:
        tl.store(row + columns, x)
    else:
        tl.store(row + columns, x, mask=columns < LENGTH)


@triton.jit
def store_span(row, x, inverse_scale, START: tl.constexpr, LENGTH: tl.constexpr, SPAN: tl.constexpr):
    """Quantise a span with the inverse of its row's scale and store it."""
    store_columns(row, to_e4m3(x * inverse_scale), START, LENGTH, SPAN)

"""GELU + concatenation + row-wise e4m3 in one pass: the input of the second MLP GEMM of either kind of block.

One program holds a whole row in registers, so every element is read once and written once. Traffic at FLUX's size
(M = 4352 rows): single block 4352 * 15360 * (2 + 1) bytes = 200 MB, a floor of 47 us at 4.3 TB/s; double block, image
stream, 4096 * 12288 * 3 = 151 MB, 35 us. Without GELU and concatenation it quantises a double block's attention output,
4352 * 3072 * 3 = 40 MB, 9.3 us; a second kernel does that for a single block's, beside codes that are there already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from fluxfast.kernels.device import (
    inverse_of_one_plus_exp2,
    load_span,
    magnitude_bits,
    require_runnable,
    row_scale,
    split_row,
    store_span,
    to_e4m3,
)
from fluxfast.kernels.rowwise import E4M3

NUM_WARPS = 8
ROWS_NUM_WARPS = 2
"""Of `quantize_rows`: its rows are as short as those of the norms, whose number of warps this is."""


@triton.jit
def gelu_tanh(x):
    """x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which has no cancellation for negative x."""
    # -2 log2(e) sqrt(2/pi), and the same times 0.044715
    return x * inverse_of_one_plus_exp2(x * (-2.302208198144325 - 0.10294323957002359 * x * x))


@triton.jit
def _gelu_concat_kernel(
    attn_ptr,
    mlp_ptr,
    q_ptr,
    scale_ptr,
    attn_stride,
    mlp_stride,
    D: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_TAIL: tl.constexpr,
    H: tl.constexpr,
    H_HEAD: tl.constexpr,
    H_TAIL: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    attn = attn_ptr + row * attn_stride
    mlp = mlp_ptr + row * mlp_stride
    q = q_ptr + row * (D + H)

    mlp_head = load_span(mlp, 0, H, H_HEAD)
    if H_TAIL > 0:
        mlp_tail = load_span(mlp, H_HEAD, H, H_TAIL)
    if D > 0:
        attn_head = load_span(attn, 0, D, D_HEAD)
    if D_TAIL > 0:
        attn_tail = load_span(attn, D_HEAD, D, D_TAIL)

    if GELU:
        mlp_head = gelu_tanh(mlp_head)
    max_bits = tl.max(magnitude_bits(mlp_head), axis=0)
    if H_TAIL > 0:
        if GELU:
            mlp_tail = gelu_tanh(mlp_tail)
        max_bits = tl.maximum(max_bits, tl.max(magnitude_bits(mlp_tail), axis=0))
    if D > 0:
        max_bits = tl.maximum(max_bits, tl.max(magnitude_bits(attn_head), axis=0))
    if D_TAIL > 0:
        max_bits = tl.maximum(max_bits, tl.max(magnitude_bits(attn_tail), axis=0))

    scale = row_scale(max_bits)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    if D > 0:
        store_span(q, attn_head, inverse, 0, D, D_HEAD)
    if D_TAIL > 0:
        store_span(q, attn_tail, inverse, D_HEAD, D, D_TAIL)
    store_span(q + D, mlp_head, inverse, 0, H, H_HEAD)
    if H_TAIL > 0:
        store_span(q + D, mlp_tail, inverse, H_HEAD, H, H_TAIL)


@triton_op("fluxfast::gelu_concat_quantize", mutates_args={})
def gelu_concat_quantize(attn_out: torch.Tensor, mlp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[attn_out, gelu_tanh(mlp)], quantised row by row.

    Args:
        attn_out: (M, D); mlp: (M, H); bfloat16 or float32. Rows may be strided (a view of a merged GEMM's output).

    Returns:
        q (M, D + H) float8_e4m3fn and scale (M, 1) float32, as `rowwise.quantize_rowwise` defines them, except that the
        kernel multiplies by the inverse of the scale: an element within one float32 rounding of the midpoint of two
        codes may take the other code. NaN and infinities as there; gelu(-inf) is NaN, as in PyTorch.

    Raises:
        ValueError: if the rows differ in number, or for tensors that Triton cannot reach.
    """
    if attn_out.dim() != 2 or mlp.dim() != 2 or len(attn_out) != len(mlp):
        raise ValueError(f"expected (M, D) and (M, H), got {tuple(attn_out.shape)} and {tuple(mlp.shape)}")
    require_runnable(attn_out, mlp)
    (rows, d), h = attn_out.shape, mlp.shape[1]
    q = torch.empty((rows, d + h), dtype=E4M3, device=mlp.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=mlp.device)
    wrap_triton(_gelu_concat_kernel)[(rows,)](
        attn_out,
        mlp,
        q,
        scale,
        attn_out.stride(0),
        mlp.stride(0),
        d,
        *split_row(d),
        h,
        *split_row(h),
        True,
        num_warps=NUM_WARPS,
    )
    return q, scale


@gelu_concat_quantize.register_fake
def _(attn_out: torch.Tensor, mlp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = mlp.shape[0], attn_out.shape[1] + mlp.shape[1]
    return mlp.new_empty((rows, width), dtype=E4M3), mlp.new_empty((rows, 1), dtype=torch.float32)


def _launch_alone(x: torch.Tensor, *, gelu: bool, num_warps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The concatenating kernel without anything in front: with D = 0 its first pointer is never read."""
    require_runnable(x)
    rows, h = x.shape
    q = torch.empty((rows, h), dtype=E4M3, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    wrap_triton(_gelu_concat_kernel)[(rows,)](
        x, x, q, scale, x.stride(0), x.stride(0), 0, 0, 0, h, *split_row(h), gelu, num_warps=num_warps
    )
    return q, scale


@triton_op("fluxfast::gelu_quantize", mutates_args={})
def gelu_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu_tanh(x), quantised row by row: (M, H) -> q (M, H), scale (M, 1); otherwise as `gelu_concat_quantize`."""
    if x.dim() != 2:
        raise ValueError(f"expected (M, H), got {tuple(x.shape)}")
    return _launch_alone(x, gelu=True, num_warps=NUM_WARPS)


@triton_op("fluxfast::quantize_rows", mutates_args={})
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rowwise.quantize_rowwise` in one kernel.

    Args:
        x: (..., K), bfloat16 or float32. (M, K) may have strided rows; with more axes, what cannot be viewed as rows of
            one stride is copied first.

    Returns:
        q (..., K) and scale (..., 1), contiguous; rounding as in `gelu_concat_quantize`.

    Raises:
        ValueError: for fewer than two axes, or for tensors that Triton cannot reach.
    """
    if x.dim() < 2:
        raise ValueError(f"expected (..., K) with two axes or more, got {tuple(x.shape)}")
    q, scale = _launch_alone(x.flatten(0, -2), gelu=False, num_warps=ROWS_NUM_WARPS)
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)


@triton.jit
def _quantize_beside_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    x_stride,
    D: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_TAIL: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = x_ptr + row * x_stride
    codes = codes_ptr + row * (D + H)
    head = load_span(x, 0, D, D_HEAD)
    max_bits = tl.max(magnitude_bits(head), axis=0)
    if D_TAIL > 0:
        tail = load_span(x, D_HEAD, D, D_TAIL)
        max_bits = tl.maximum(max_bits, tl.max(magnitude_bits(tail), axis=0))

    known = tl.load(scale_ptr + row)
    needed = row_scale(max_bits)
    scale = known
    # NaN in x wins; NaN in the known scale stays, because it is not below anything.
    if (needed > known) | (needed != needed):
        scale = needed
        # No warp may find the new scale where it looks for the known one.
        tl.debug_barrier()
        tl.store(scale_ptr + row, scale)
        for start in range(0, H, STEP):
            columns = start + tl.arange(0, STEP)
            beside = codes + D + columns
            old = tl.load(beside, mask=columns < H, other=0.0).to(tl.float32)
            tl.store(beside, to_e4m3(old * (known / needed)), mask=columns < H)
    inverse = tl.div_rn(1.0, scale)
    store_span(codes, head, inverse, 0, D, D_HEAD)
    if D_TAIL > 0:
        store_span(codes, tail, inverse, D_HEAD, D, D_TAIL)


@triton_op("fluxfast::quantize_beside", mutates_args={"codes", "scale"})
def quantize_beside(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """x quantised into the first columns of rows whose other columns are quantised already.

    Args:
        x: (M, D) bfloat16 or float32, rows may be strided.
        codes: (M, D + H) float8_e4m3fn, contiguous; the last H columns are codes of `scale`.
        scale: (M, 1) float32, contiguous. Where a row of x is too large for it, it becomes that of x alone, and the H
            codes are rounded again to go with it. An infinity or NaN in x does to the row what it does to
            `quantize_rowwise`'s.

    Raises:
        ValueError: for shapes that do not fit and tensors that Triton cannot reach.
    """
    (rows, d), width = x.shape, codes.shape[1]
    if len(codes) != rows or width < d or scale.shape != (rows, 1) or not codes.is_contiguous():
        raise ValueError(
            f"expected (M, D), contiguous (M, D + H) and (M, 1), got {tuple(x.shape)}, {tuple(codes.shape)} of strides "
            f"{codes.stride()} and {tuple(scale.shape)}"
        )
    require_runnable(x, codes, scale)
    wrap_triton(_quantize_beside_kernel)[(rows,)](
        x, codes, scale, x.stride(0), d, *split_row(d), width - d, 1024, num_warps=ROWS_NUM_WARPS
    )


@gelu_quantize.register_fake
@quantize_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format), x.new_empty(
        (*x.shape[:-1], 1), dtype=torch.float32
    )

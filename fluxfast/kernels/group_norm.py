"""GroupNorm + SiLU over NHWC activations: the norms of the VAE decoder.

The norms of FLUX.1's decoder read 3.67 GB at 1024x1024 for their statistics, read it again and write as much: 11.0 GB,
a floor of 2.6 ms at 4.3 TB/s. Of `F.group_norm` Inductor makes statistics that walk a group channel by channel, each
over all pixels, so that NHWC memory is read once for every channel of a group, 4 to 16 times (docs/performance.md).
Here a program reads whole pixels.

Three launches: mean and sum of squared deviations (M2) of every tile of pixels, their combination, and one pass that
normalises. No atomics and no dependence on the GPU, so a result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from fluxfast.kernels.device import INTERPRETED, inverse_of_one_plus_exp2, to_bfloat16

NUM_WARPS = 4
STEP_ELEMENTS = 2048
"""What a program holds at a time: whole pixels, at least one."""
MAX_TILES = 1024
"""Tiles of a sample: several for each of 132 SMs, and few enough for one program to combine them."""


@triton.jit
def _channels(GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr):
    """Of every column of a padded pixel: its channel, its group, and whether there is such a channel."""
    column = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    group = column // SIZE_PAD
    # Said in two ways because the compiler sees contiguous addresses only in the first.
    channel = column if SIZE == SIZE_PAD else group * SIZE + column % SIZE_PAD
    return channel, group, (column % SIZE_PAD < SIZE) & (group < GROUPS)


@triton.jit
def _pixel_mask(first, end, exists, PIXELS: tl.constexpr, PADDED: tl.constexpr):
    """(PIXELS, columns), or (PIXELS, 1) where every column is a channel."""
    mask = (first + tl.arange(0, PIXELS) < end)[:, None]
    if PADDED:
        mask = mask & exists[None, :]
    return mask


@triton.jit
def _load_vector(pointer, offsets, exists, PADDED: tl.constexpr):
    """Elements as float32, zero for columns that are no channel."""
    if PADDED:  # noqa: SIM108 - decided when the kernel is compiled
        x = tl.load(pointer + offsets, mask=exists, other=0.0)
    else:
        x = tl.load(pointer + offsets)
    return x.to(tl.float32)


@triton.jit
def _sum_groups(x, PIXELS: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr):
    """(PIXELS, columns) -> (GROUPS_PAD,)."""
    return tl.sum(tl.reshape(tl.sum(x, axis=0), (GROUPS_PAD, SIZE_PAD)), axis=1)


@triton.jit
def _spread(x, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr):
    """(GROUPS_PAD,) -> (1, columns)."""
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUPS_PAD, SIZE_PAD)), (1, GROUPS_PAD * SIZE_PAD))


@triton.jit
def _statistics_kernel(
    x_ptr,
    x_bias_ptr,
    mean_ptr,
    m2_ptr,
    pixels,
    tile_pixels,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    PIXELS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
):
    """Mean and M2 of every group of a tile, by Welford's recurrence in every lane and Chan's formula over the lanes."""
    C: tl.constexpr = GROUPS * SIZE
    PADDED: tl.constexpr = GROUPS_PAD * SIZE_PAD != C
    tile, sample = tl.program_id(0), tl.program_id(1)
    channel, _, exists = _channels(GROUPS, SIZE, GROUPS_PAD, SIZE_PAD)
    start = tile * tile_pixels
    end = tl.minimum(start + tile_pixels, pixels)
    row = tl.arange(0, PIXELS)
    mean = tl.zeros((PIXELS, GROUPS_PAD * SIZE_PAD), tl.float32)
    m2 = tl.zeros((PIXELS, GROUPS_PAD * SIZE_PAD), tl.float32)
    count = 0.0
    if HAS_X_BIAS:
        x_bias = _load_vector(x_bias_ptr, channel, exists, PADDED)
    for first in range(start, end, PIXELS):
        mask = _pixel_mask(first, end, exists, PIXELS, PADDED)
        # 64 bits for the first pixel, 32 for what lies behind it in this step.
        pixel = x_ptr + (sample.to(tl.int64) * pixels + first) * C
        x = tl.load(pixel + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_X_BIAS:
            x += x_bias[None, :]
        count += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (x - mean)

    # How many pixels each lane has seen: a lane without one counts for nothing.
    seen = tl.where(row < end - start, (end - start - row + PIXELS - 1) // PIXELS, 0).to(tl.float32)
    share = seen[:, None] / ((end - start) * SIZE).to(tl.float32)
    # Deviations from one lane's mean, so that a constant group keeps its value exactly.
    head = (row[:, None] == 0) & (tl.arange(0, GROUPS_PAD * SIZE_PAD) % SIZE_PAD == 0)[None, :]
    pivot = _sum_groups(tl.where(head, mean, 0.0), PIXELS, GROUPS_PAD, SIZE_PAD)
    inside = (row[:, None] < end - start) & exists[None, :]
    deviation = tl.where(inside, mean - _spread(pivot, GROUPS_PAD, SIZE_PAD), 0.0)
    shift = _sum_groups(deviation * share, PIXELS, GROUPS_PAD, SIZE_PAD)
    deviation = tl.where(inside, deviation - _spread(shift, GROUPS_PAD, SIZE_PAD), 0.0)
    total = _sum_groups(tl.where(inside, m2, 0.0), PIXELS, GROUPS_PAD, SIZE_PAD)
    total += _sum_groups(deviation * deviation * seen[:, None], PIXELS, GROUPS_PAD, SIZE_PAD)

    group = tl.arange(0, GROUPS_PAD)
    place = (sample * tl.num_programs(0) + tile) * GROUPS + group
    tl.store(mean_ptr + place, pivot + shift, mask=group < GROUPS)
    tl.store(m2_ptr + place, total, mask=group < GROUPS)


@triton.jit
def _combine_kernel(
    mean_ptr,
    m2_ptr,
    group_mean_ptr,
    inverse_std_ptr,
    pixels,
    tile_pixels,
    tiles,
    eps: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILES_PAD: tl.constexpr,
):
    """The tiles of one group of one sample by Chan's formula -> mean and 1 / sqrt(variance + eps)."""
    group, sample = tl.program_id(0), tl.program_id(1)
    tile = tl.arange(0, TILES_PAD)
    exists = tile < tiles
    place = (sample * tiles + tile) * GROUPS + group
    mean = tl.load(mean_ptr + place, mask=exists, other=0.0)
    m2 = tl.load(m2_ptr + place, mask=exists, other=0.0)
    seen = tl.where(exists, tl.minimum(pixels - tile * tile_pixels, tile_pixels), 0).to(tl.float32)
    pivot = tl.load(mean_ptr + sample * tiles * GROUPS + group)
    deviation = tl.where(exists, mean - pivot, 0.0)
    shift = tl.sum(deviation * (seen / pixels), axis=0)
    deviation = tl.where(exists, deviation - shift, 0.0)
    total = tl.sum(m2, axis=0) + tl.sum(deviation * deviation * seen, axis=0) * SIZE
    # In two divisions: pixels * SIZE may not fit in 32 bits.
    variance = total / pixels / SIZE
    tl.store(group_mean_ptr + sample * GROUPS + group, pivot + shift)
    tl.store(inverse_std_ptr + sample * GROUPS + group, tl.rsqrt(variance + eps))


@triton.jit
def _normalise_kernel(
    x_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    inverse_std_ptr,
    y_ptr,
    pixels,
    tile_pixels,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    PIXELS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    C: tl.constexpr = GROUPS * SIZE
    PADDED: tl.constexpr = GROUPS_PAD * SIZE_PAD != C
    # From the end, because the statistics read that last: it is what the L2 cache still holds.
    tile, sample = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    channel, group, exists = _channels(GROUPS, SIZE, GROUPS_PAD, SIZE_PAD)
    mean = _load_vector(mean_ptr, sample * GROUPS + group, exists, PADDED)
    scale = _load_vector(inverse_std_ptr, sample * GROUPS + group, exists, PADDED)
    scale *= _load_vector(weight_ptr, channel, exists, PADDED)
    bias = _load_vector(bias_ptr, channel, exists, PADDED)
    if HAS_X_BIAS:
        x_bias = _load_vector(x_bias_ptr, channel, exists, PADDED)
    start = tile * tile_pixels
    end = tl.minimum(start + tile_pixels, pixels)
    offsets = tl.arange(0, PIXELS)[:, None] * C + channel[None, :]
    for first in range(start, end, PIXELS):
        mask = _pixel_mask(first, end, exists, PIXELS, PADDED)
        before = (sample.to(tl.int64) * pixels + first) * C
        x = tl.load(x_ptr + before + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_X_BIAS:
            x += x_bias[None, :]
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            # y * sigmoid(y); the factor is -log2(e).
            y = y * inverse_of_one_plus_exp2(y * -1.4426950408889634)
        if y_ptr.dtype.element_ty == tl.bfloat16:
            y = to_bfloat16(y)
        tl.store(y_ptr + before + offsets, y, mask=mask)


def _check(x: torch.Tensor, groups: int, *vectors: torch.Tensor) -> None:
    if x.dim() < 3 or x.shape[1] % groups or any(vector.shape != x.shape[1:2] for vector in vectors):
        raise ValueError(
            f"expected (B, C, ...) with C a multiple of {groups} groups and vectors (C,), got "
            + ", ".join(str(tuple(t.shape)) for t in (x, *vectors))
        )
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"expected bfloat16 or float32, got {x.dtype}")
    if not x.movedim(1, -1).is_contiguous():
        raise ValueError(f"expected channels_last memory, got strides {x.stride()} for {tuple(x.shape)}")
    if not INTERPRETED and x.device.type != "cuda":
        raise ValueError(f"a Triton kernel got a tensor on {x.device}; reference.group_norm_silu runs anywhere")


def _empty(x: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) -> (B, ..., C), contiguous."""
    return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format)


@triton_op("fluxfast::group_norm_silu", mutates_args={})
def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(group_norm(x + x_bias)), or without the SiLU; computed in float32, rounded once.

    Args:
        x: (B, C, ...) bfloat16 or float32 in channels_last memory, C a multiple of `groups`.
        weight, bias: (C,), of the norm.
        x_bias: (C,), what the convolution in front has left out. Inductor takes a bias off a cuDNN convolution and
            would write the sum out, a read and a write of everything, for a kernel that it cannot see into.

    Returns:
        The shape, type and memory order of `x`. A NaN or an infinity makes its group NaN, as in PyTorch.

    Raises:
        ValueError: for shapes, types and memory orders that do not fit, and for tensors that Triton cannot reach.
    """
    _check(x, groups, weight, bias, *(() if x_bias is None else (x_bias,)))
    batch, channels = x.shape[:2]
    y = _empty(x)
    pixels, size = y.shape[1:-1].numel(), channels // groups
    if x.numel() == 0:
        return y.movedim(-1, 1)
    padded = (triton.next_power_of_2(groups), triton.next_power_of_2(size))
    step = max(1, STEP_ELEMENTS // (padded[0] * padded[1]))
    tile_pixels = triton.cdiv(triton.cdiv(pixels, MAX_TILES), step) * step
    tiles = triton.cdiv(pixels, tile_pixels)
    mean, m2 = (torch.empty((batch, tiles, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    group_mean, inverse_std = (torch.empty((batch, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    # Without a bias the pointer is never read.
    x_bias_or_any, has_x_bias = (weight if x_bias is None else x_bias), x_bias is not None
    shape = (groups, size, *padded, step)
    wrap_triton(_statistics_kernel)[(tiles, batch)](
        x, x_bias_or_any, mean, m2, pixels, tile_pixels, *shape, has_x_bias, num_warps=NUM_WARPS
    )
    wrap_triton(_combine_kernel)[(groups, batch)](
        mean,
        m2,
        group_mean,
        inverse_std,
        pixels,
        tile_pixels,
        tiles,
        eps,
        groups,
        size,
        triton.next_power_of_2(tiles),
        num_warps=4,
    )
    wrap_triton(_normalise_kernel)[(tiles, batch)](
        x,
        x_bias_or_any,
        weight,
        bias,
        group_mean,
        inverse_std,
        y,
        pixels,
        tile_pixels,
        *shape,
        has_x_bias,
        silu,
        num_warps=NUM_WARPS,
    )
    return y.movedim(-1, 1)


group_norm_silu.register_fake(lambda x, weight, bias, groups, eps, silu, x_bias=None: _empty(x).movedim(-1, 1))

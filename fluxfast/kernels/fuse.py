"""Replaces the blocks of a `FluxTransformer2DModel` by fused ones, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fluxfast.kernels.blocks import (
    Attention,
    FusedFluxSingleTransformerBlock,
    FusedFluxTransformerBlock,
    GroupedFluxTransformerBlock,
    Pending,
    Stream,
    _ModulatedBlock,
    add_pending,
)
from fluxfast.kernels.ops import BlockOps

STREAM_UNIT = 64.0
"""What a float16 stream counts in. It holds up to 65504 of them, 4.2 million. Magnitudes below 2^-14 of one, 0.004, are
multiples of 4e-6, which is as fine as bfloat16's down to 0.001, and nothing to a norm of the whole row."""


def _join(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    joint = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
    return args, kwargs | {"hidden_states": joint}


def _split(block: nn.Module, args: tuple[()], output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    text, joint = output
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


def _enter_float16(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    # Divided first: float16 itself overflows. Both are exact for bfloat16 that float16 can hold.
    joint = (kwargs["hidden_states"] / STREAM_UNIT).to(torch.float16)
    return args, kwargs | {"hidden_states": joint}


def _leave_float16(
    block: nn.Module, args: tuple[()], output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    text, joint = output
    # Multiplied last, for the same reason.
    return text, joint.to(text.dtype) * STREAM_UNIT


def _begin(block: _ModulatedBlock, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Streams as a block before would have left them, so that the first block is compiled like the others.

    The gate is zero and `y` the stream itself, which costs no memory traffic: the norm's kernel finds it in the cache.
    """
    streams = {name: kwargs[name] for name in block.GATES}
    x, like = kwargs["hidden_states"], block.modulation
    if like is None:
        modulation = x.new_zeros(len(x), block.modulation_width)
    else:
        # With its strides, which `zeros_like` would not keep: Dynamo compiles for them.
        modulation = like.new_empty_strided(like.shape, like.stride()).zero_()
    # Another tensor of the same memory: Dynamo would compile for `y is residual` too.
    pending = {name: Pending(x, x.view_as(x), modulation, block.GATES[name]) for name, x in streams.items()}
    return args, kwargs | pending


def _end(block: nn.Module, args: tuple[()], output: tuple[Stream, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(add_pending(x) if isinstance(x, Pending) else x for x in output)


def fuse_blocks(
    transformer: nn.Module,
    *,
    attention: Attention,
    ops: BlockOps,
    merged_projections: bool = False,
    chained: bool = False,
    fused_residuals: bool = False,
    float16_stream: bool = False,
) -> list[nn.Module]:
    """Swap every block for its fused counterpart and return the new blocks, double ones first.

    Each old block is released before the next is converted, so the peak is one block above the final size.

    Args:
        transformer: diffusers' FluxTransformer2DModel, with or without `fuse_qkv_projections`; weights unquantised.
        attention: (q, k, v) -> output, see `blocks.Attention`.
        merged_projections: QKV and MLP of the single blocks as one GEMM.
        chained: the single blocks hand the joint stream on instead of splitting and concatenating it between blocks
            (53 MB a block at FLUX's size). ControlNet residuals, which diffusers adds between blocks, then do not fit.
            Joining and splitting is done in hooks around the chain: all blocks stay alike and compile once.
        ops: with `grouped`, streams are joined in front of the first double block already.
        fused_residuals: a block's last gated residual is added by the norm of the next one, see `blocks.Pending`, and
            behind the last of either kind in a hook.
        float16_stream: the joint stream is float16 and counts in `STREAM_UNIT`, from `ops.grouped`'s first block on.

    Raises:
        ValueError: for `fused_residuals` of single blocks, and for grouped double ones, that are not `chained`; for a
            `float16_stream` of blocks whose streams are not one, or whose residuals no GEMM adds.
    """
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    if ops.grouped is not None and not chained:
        raise ValueError("grouped double blocks need chained: single blocks take their joint stream as it is")
    if float16_stream and (ops.grouped is None or ops.residual_linear is None):
        raise ValueError(
            "float16_stream is for grouped blocks, whose streams are one, with residuals added by the GEMMs"
        )
    for index, block in enumerate(doubles):
        if ops.grouped is not None:
            doubles[index] = GroupedFluxTransformerBlock(block, attention=attention, ops=ops)
        else:
            doubles[index] = FusedFluxTransformerBlock(
                block, attention=attention, ops=ops, fused_residuals=fused_residuals
            )
    for index, block in enumerate(singles):
        singles[index] = FusedFluxSingleTransformerBlock(
            block,
            attention=attention,
            ops=ops,
            merged_projections=merged_projections,
            chained=chained,
            fused_residuals=fused_residuals,
        )
    joint = [*doubles, *singles] if ops.grouped is not None else [*singles]
    # Hooks of one block run in the order in which they are registered.
    if chained and joint:
        joint[0].register_forward_pre_hook(_join, with_kwargs=True)
    if float16_stream and joint:
        for block in joint:
            block.count_in(STREAM_UNIT)
        joint[0].register_forward_pre_hook(_enter_float16, with_kwargs=True)
        joint[-1].register_forward_hook(_leave_float16)
    for blocks in (doubles, singles) if fused_residuals else ():
        if len(blocks):
            blocks[0].register_forward_pre_hook(_begin, with_kwargs=True)
            blocks[-1].register_forward_hook(_end)
    if chained and joint:
        joint[-1].register_forward_hook(_split)
    return [*doubles, *singles]

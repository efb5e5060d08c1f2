"""Replaces the blocks of a `FluxTransformer2DModel` by fused ones, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fluxfast.kernels.blocks import Attention, FusedFluxSingleTransformerBlock, FusedFluxTransformerBlock
from fluxfast.kernels.ops import BlockOps


def _join(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    joint = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
    return args, kwargs | {"hidden_states": joint}


def _split(block: nn.Module, args: tuple[()], output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    text, joint = output
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


def fuse_blocks(
    transformer: nn.Module,
    *,
    attention: Attention,
    ops: BlockOps,
    merged_projections: bool = False,
    chained: bool = False,
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
    """
    for index, block in enumerate(transformer.transformer_blocks):
        transformer.transformer_blocks[index] = FusedFluxTransformerBlock(block, attention=attention, ops=ops)
    singles = transformer.single_transformer_blocks
    for index, block in enumerate(singles):
        singles[index] = FusedFluxSingleTransformerBlock(
            block,
            attention=attention,
            ops=ops,
            merged_projections=merged_projections,
            chained=chained,
        )
    if chained and len(singles):
        singles[0].register_forward_pre_hook(_join, with_kwargs=True)
        singles[-1].register_forward_hook(_split)
    return [*transformer.transformer_blocks, *singles]

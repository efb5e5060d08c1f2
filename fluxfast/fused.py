"""Swaps diffusers' blocks for the fused ones of `fluxfast.kernels`, with the operations that a level asks for.

Without `fused_quantize`, `fused_qk_rope` or `fused_residuals` an operation is the plain PyTorch one, which Inductor
fuses as well as it can: a rung changes which kernel computes something, not what is computed. Five rungs change float8
codes too: `hadamard_qk`, in another basis of q and k, `gelu_epilogue` and `attention_epilogue`, with scales that are
known beforehand, `coded_softmax`, which rounds probabilities otherwise, and `value_epilogue`, which rounds V once
instead of twice. `float16_residuals` rounds streams less.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from fluxfast.attention import Fa3Fp8Processor
from fluxfast.kernels.blocks import Attention
from fluxfast.kernels.fuse import fuse_blocks
from fluxfast.kernels.ops import EXACT, REFERENCE, BlockOps, triton_ops
from fluxfast.levels import Level


def fuse(transformer: nn.Module, level: Level) -> list[nn.Module]:
    """Replace every block by its fused counterpart, quantised by row.

    Args:
        transformer: diffusers' FluxTransformer2DModel with unquantised weights; its attention processors say which
            attention the new blocks launch.
        level: with `has_fused_blocks`.

    Returns:
        The new blocks, double ones first.
    """
    attention = _attention(transformer)
    coded = level.coded_softmax and attention is not sdpa
    if coded:
        from fluxfast.kernels.flash import coded_attention as attention
    kernels = {
        "quantize": level.fused_quantize,
        "qk_rope": level.fused_qk_rope,
        "quantize_rows": level.fused_residuals,
        "hadamard": level.hadamard_qk and level.fused_qk_rope,
        "transposed_v": coded,
        "gelu_epilogue": level.gelu_epilogue,
        "residual_epilogue": level.residual_epilogue,
        "attention_epilogue": level.attention_epilogue,
        "grouped": level.grouped_gemms,
        "value_epilogue": level.value_epilogue,
    }
    ops = triton_ops(**kernels) if any(kernels.values()) else REFERENCE
    if attention is sdpa:
        ops = _with_exact_attention_inputs(ops)
    return fuse_blocks(
        transformer,
        attention=attention,
        ops=ops,
        merged_projections=level.merged_projections and not level.gelu_epilogue,
        chained=True,
        fused_residuals=level.fused_residuals and not level.residual_epilogue,
        float16_stream=level.float16_residuals,
    )


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention in the fused blocks' layout: (batch, sequence, heads, head_dim) in and out."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _attention(transformer: nn.Module) -> Attention:
    processor = transformer.transformer_blocks[0].attn.processor
    if not isinstance(processor, Fa3Fp8Processor):
        return sdpa
    if not processor.cast_outside:
        raise ValueError("the fused blocks cast to e4m3 themselves, so their attention is 'fa3_fp8' or 'sdpa'")
    return processor.attention


def _with_exact_attention_inputs(ops: BlockOps) -> BlockOps:
    """q, k and v stay in bfloat16 where no float8 attention takes them."""
    return dataclasses.replace(ops, qk_norm_rope=EXACT.qk_norm_rope)

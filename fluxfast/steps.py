"""One small function per optimisation field. Each acts on the pipeline in place; `build.py` orders them.

torch.compile is in `compilation.py`, packages in `aoti.py`, CUDA graphs in `cudagraph.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from fluxfast.attention import Fa3Fp8Processor, fa3_fp8, fa3_fp8_cast_inside, fa3_fp8_split_tail
from fluxfast.kernels.linear import ROWWISE_FLOAT8

UNFUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Projections that a fused attention no longer calls."""


def attentions(module: nn.Module) -> list[nn.Module]:
    """Every attention module of a transformer or a VAE."""
    return [m for m in module.modules() if isinstance(m, FluxAttention | Attention)]


def fuse_projections(pipeline: FluxPipeline) -> None:
    """One QKV GEMM in every attention of transformer and VAE, the separate projections removed.

    diffusers keeps the dead ones: 2.15 B parameters of FLUX.1 that float8 would convert as well.
    """
    for model in (pipeline.transformer, pipeline.vae):
        model.fuse_qkv_projections()
        for attention in attentions(model):
            for name in UNFUSED:
                if getattr(attention, name, None) is not None:
                    delattr(attention, name)


def channels_last(pipeline: FluxPipeline) -> None:
    """The VAE's convolution weights in NHWC."""
    pipeline.vae.to(memory_format=torch.channels_last)


def fa3_attention(pipeline: FluxPipeline, cast_outside: bool, split_tail: bool = False) -> None:
    """FlashAttention-3 on e4m3 in every block of the transformer."""
    op = fa3_fp8_cast_inside if not cast_outside else fa3_fp8_split_tail if split_tail else fa3_fp8
    pipeline.transformer.set_attn_processor(Fa3Fp8Processor(op, cast_outside=cast_outside))


def float8_candidates(model: nn.Module) -> list[nn.Linear]:
    """Linears that float8 GEMMs take: both feature counts a multiple of 16. torchao skips the others silently."""
    return [m for m in linears(model) if m.in_features % 16 == 0 and m.out_features % 16 == 0]


def linears(model: nn.Module) -> list[nn.Linear]:
    """Every Linear of `model`."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, double ones first."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def block_linears(transformer: nn.Module) -> list[nn.Module]:
    """Linears of the blocks that work on every token, quantised ones included: all but AdaLN's, which see one row."""
    return [
        module
        for block in blocks_of(transformer)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | ROWWISE_FLOAT8) and not name.startswith(("norm", "adaln"))
    ]


def float8_tensorwise(pipeline: FluxPipeline) -> None:
    """torchao's dynamic float8, one scale a tensor, on every Linear of the transformer."""
    from torchao.quantization import PerTensor

    _float8(pipeline.transformer, float8_candidates(pipeline.transformer), PerTensor())


def float8_rowwise(pipeline: FluxPipeline) -> None:
    """torchao's dynamic float8, one scale a row, on the Linears of the blocks.

    AdaLN's products are matrix-vector, whose time is the bandwidth of their weights; embedders and the output
    projection are small and sensitive. torchao's own benchmark leaves the same layers out.
    """
    from torchao.quantization import PerRow

    _float8(pipeline.transformer, block_linears(pipeline.transformer), PerRow())


def _float8(transformer: nn.Module, chosen: list[nn.Module], granularity: Any) -> None:
    """Convert the chosen Linears.

    torchao's config refuses machines without float8 GEMMs. On a CPU the same `Float8Tensor` weights are made directly;
    its matrix product is then done in float32 on the dequantised operands.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    if transformer.device.type == "cuda":
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=granularity,
            kernel_preference=KernelPreference.TORCH,
            # The level `inductor_flags` sets Inductor's flags; torchao would set two of them here, for the process.
            set_inductor_config=False,
        )
        quantize_(transformer, config, filter_fn=lambda module, name: module in chosen)
        return
    for linear in chosen:
        linear.weight = nn.Parameter(_float8_tensor(linear.weight, granularity), requires_grad=False)


def _float8_tensor(weight: torch.Tensor, granularity: Any) -> torch.Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    return Float8Tensor.from_hp(
        weight,
        granularity=granularity,
        mm_config=Float8MMConfig(use_fast_accum=True),
        kernel_preference=KernelPreference.TORCH,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            granularity=granularity, kernel_preference=KernelPreference.TORCH
        ),
    )

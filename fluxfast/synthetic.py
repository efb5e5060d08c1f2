"""The full-size FLUX.1 with seeded random weights, made on the device: right shapes and costs, no meaning.

For latency only; images of random weights judge noise. Tokenizers are the shipped tiny checkpoint's: their ids are
valid in the large vocabularies and the padded length, which sets the cost, is the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SEED = 0
MODULATION_GAIN = 0.2
"""Standard deviation of shifts, scales and gates: small enough that 57 residual blocks stay in bf16's comfort."""

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
}
"""Source of all three: the configuration files of black-forest-labs/FLUX.1-schnell."""


def make_synthetic(checkpoint: str, dtype: torch.dtype, device: str, tokenizers: Path) -> FluxPipeline:
    """The FLUX.1-schnell shape ("synthetic-2") or FLUX.1-dev's ("synthetic-2-dev", with the guidance embedding).

    Args:
        checkpoint: one of `workloads.RANDOM`.
        dtype: of all weights.
        device: where they are made; the same seed gives other numbers on another kind of device.
        tokenizers: a pipeline folder to take both tokenizers from.

    Returns:
        A pipeline on `device`.
    """
    dev = checkpoint == "synthetic-2-dev"
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Not on "meta": transformers keeps position buffers that `to_empty` would leave unset.
        with torch.device(device):
            transformer = FluxTransformer2DModel(guidance_embeds=dev)
            vae = AutoencoderKL(**VAE_CONFIG)
            clip = CLIPTextModel(CLIPTextConfig(**CLIP_L))
            t5 = T5EncoderModel(T5Config(**T5_XXL))
    finally:
        torch.set_default_dtype(default_dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    for model in (transformer, vae, clip, t5):
        randomise(model, generator)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=AutoTokenizer.from_pretrained(tokenizers / "tokenizer", model_max_length=77),
        text_encoder_2=t5,
        tokenizer_2=AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2", model_max_length=512),
        transformer=transformer,
    ).to(device)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Seeded weights that keep a unit-variance signal at unit variance, the same in every dtype.

    Drawn in bfloat16, as FLUX.1's were released: the generator gives other numbers for float32, and a float32 pipeline
    of other weights is no reference for anything.

    Linear and convolution: normal, std 1/sqrt(fan in); modulation Linears `MODULATION_GAIN` of that; embeddings unit
    normal; biases zero; norm weights one. T5 does not divide its scores by the square root of a head's size, which its
    queries carry instead, as in its own initialisation (Raffel et al. 2020): with scores of standard deviation 8 each
    token attends to one other, and a rounding decides to which.
    """

    def draw(weight: nn.Parameter, std: float) -> None:
        weight.copy_(torch.empty_like(weight, dtype=torch.bfloat16).normal_(0.0, std, generator=generator))

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = MODULATION_GAIN if ".norm" in f".{name}" else 1.0
            if name.endswith(".SelfAttention.q"):
                gain = model.config.d_kv**-0.5
            draw(weight, gain / math.sqrt(weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            draw(weight, 1.0)
        else:
            weight.fill_(1.0)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.zero_()

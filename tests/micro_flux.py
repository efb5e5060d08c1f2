"""A FLUX checkpoint small enough to compile in seconds: one block of each kind, two heads, a narrow VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

from fluxfast.checkpoints import TINY as SHIPPED
from fluxfast.workloads import TINY, Workload

BLOCKS = 2
STEPS = 2


def micro_transformer(**change: Any) -> FluxTransformer2DModel:
    """One double and one single block, two heads of 128; text widths are those of the shipped text encoders.

    Not one head: torchao 0.18 takes a 128 x 128 weight with one scale for a blockwise one and wants Triton.
    """
    configuration = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 2,
        "joint_attention_dim": 128,
        "pooled_projection_dim": 128,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    }
    return FluxTransformer2DModel(**(configuration | change)).eval()


def micro_vae() -> AutoencoderKL:
    """Four levels, so that a latent is an eighth of the image, each as narrow as its norm groups allow."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def micro_pipeline(**transformer: Any) -> FluxPipeline:
    """A micro FLUX with the shipped text encoders and tokenizers; `transformer` changes its configuration."""
    torch.manual_seed(0)
    return FluxPipeline.from_pretrained(SHIPPED, transformer=micro_transformer(**transformer), vae=micro_vae())


def make_micro_flux(folder: Path) -> Workload:
    """Save a micro checkpoint with the shipped text encoders and tokenizers in `folder`; two steps at 64 x 64 px."""
    micro_pipeline().save_pretrained(folder)
    return dataclasses.replace(
        TINY,
        id="micro",
        checkpoint=str(folder),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        max_sequence_length=16,
        warmup_rounds=1,
        rounds=1,
    )


def make_micro_kontext(folder: Path) -> Workload:
    """The same as a FLUX.1-Kontext-dev: it has a guidance embedding and edits the still life at 64 x 64 px."""
    workload = make_micro_flux(folder / "flux")
    torch.manual_seed(0)
    plain = FluxPipeline.from_pretrained(workload.checkpoint, transformer=micro_transformer(guidance_embeds=True))
    FluxKontextPipeline(**plain.components).save_pretrained(folder / "kontext")
    return dataclasses.replace(
        workload,
        id="micro_kontext",
        checkpoint=str(folder / "kontext"),
        guidance_scale=2.5,
        input_image="still_life_1",
    )

"""The full shape with random weights, made small here: repeatable, finite, and a signal that neither dies nor grows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxfast import synthetic
from fluxfast.build import input_arguments
from fluxfast.checkpoints import load, pipeline_class
from fluxfast.synthetic import CLIP_L, T5_XXL, VAE_CONFIG
from fluxfast.workloads import RANDOM, WORKLOADS
from perf_tests.harness.fidelity import relative_l2

SMALL_CLIP = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_T5 = {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "num_layers": 2}
SMALL_VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 16}


def small_transformer(**arguments: Any) -> FluxTransformer2DModel:
    """diffusers' defaults are FLUX.1's; the same class with 6 blocks of one head."""
    return FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=3,
        num_attention_heads=1,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        **arguments,
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "FluxTransformer2DModel", small_transformer)
    monkeypatch.setattr(synthetic, "CLIP_L", CLIP_L | SMALL_CLIP)
    monkeypatch.setattr(synthetic, "T5_XXL", T5_XXL | SMALL_T5)
    monkeypatch.setattr(synthetic, "VAE_CONFIG", VAE_CONFIG | SMALL_VAE)


def draw(pipeline: FluxPipeline, **changes: Any) -> torch.Tensor:
    """The latents or the picture of two steps at 64 x 64."""
    arguments = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**arguments, generator=generator, **{"output_type": "pt"} | changes).images


@pytest.mark.parametrize("checkpoint", RANDOM)
def test_weights_repeat(checkpoint: str) -> None:
    """Two processes on one kind of device measure the same numbers, whatever the global seed was."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pipeline = load(checkpoint, torch.bfloat16, "cpu")
        states.append(
            {
                f"{name}.{key}": value
                for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
                for key, value in getattr(pipeline, name).state_dict().items()
            }
        )
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []


@pytest.mark.parametrize("checkpoint", RANDOM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_signal_stays_finite_and_near_one(checkpoint: str, dtype: torch.dtype) -> None:
    """Neither the transformer nor the decoder dies or overflows; latents keep the order of the noise."""
    pipeline = load(checkpoint, dtype, "cpu")
    latents, picture = draw(pipeline, output_type="latent"), draw(pipeline)
    assert latents.isfinite().all() and 0.1 < latents.float().std() < 10
    assert picture.isfinite().all() and picture.float().std() > 0.01


def test_prompt_reaches_the_picture() -> None:
    """Both text encoders feed the transformer: another prompt gives other latents."""
    pipeline = load("synthetic-2", torch.float32, "cpu")
    cat, dog = (draw(pipeline, output_type="latent", **{"prompt_2": prompt}) for prompt in ("a red cat", "a blue ring"))
    assert not torch.equal(cat, dog)


def test_dev_has_guidance_and_schnell_has_none() -> None:
    """FLUX.1-dev embeds its guidance and shifts its schedule by resolution; schnell does neither."""
    schnell, dev = (load(checkpoint, torch.float32, "cpu") for checkpoint in RANDOM)
    assert dev.transformer.config.guidance_embeds and not schnell.transformer.config.guidance_embeds
    assert dev.scheduler.config.use_dynamic_shifting and not schnell.scheduler.config.use_dynamic_shifting
    weak, strong = (draw(dev, output_type="latent", guidance_scale=scale) for scale in (1.0, 9.0))
    assert not torch.equal(weak, strong)


def test_full_size_is_that_of_the_released_weights() -> None:
    """Parameter by parameter: counted on the meta device, against the published configurations' counts."""
    with torch.device("meta"):
        schnell, dev = FluxTransformer2DModel(), FluxTransformer2DModel(guidance_embeds=True)
        decoder = AutoencoderKL(**VAE_CONFIG).decoder
        clip, t5 = CLIPTextModel(CLIPTextConfig(**CLIP_L)), T5EncoderModel(T5Config(**T5_XXL))
    counted = [sum(p.numel() for p in model.parameters()) for model in (schnell, dev, decoder, clip, t5)]
    assert counted == [11_891_178_560, 11_901_408_320, 49_545_475, 123_060_480, 4_762_310_656]


def test_text_is_as_long_as_the_workload_says() -> None:
    """512 tokens reach FLUX.1-dev's transformer, 256 schnell's: the padded length sets the cost."""
    for id in ("schnell", "dev"):
        workload = WORKLOADS[id]
        pipeline = load(workload.checkpoint, torch.float32, "cpu")
        embeds, _, ids = pipeline.encode_prompt(
            workload.prompt, None, device="cpu", max_sequence_length=workload.max_sequence_length
        )
        assert embeds.shape[1] == ids.shape[0] == workload.max_sequence_length


def test_kontext_edits_on_random_weights() -> None:
    """`kontext` runs on FLUX.1-dev's shape: finite, and another image to edit gives other latents."""
    workload = dataclasses.replace(WORKLOADS["kontext"], height=64, width=64)
    assert workload.has_random_weights
    pipeline = load(workload.checkpoint, torch.bfloat16, "cpu", pipeline_class(workload))
    given = input_arguments(workload)
    upright = draw(pipeline, output_type="latent", **given)
    turned = draw(pipeline, output_type="latent", **given | {"image": given["image"].rotate(180)})
    assert upright.isfinite().all() and 0.1 < upright.float().std() < 10
    assert not torch.equal(upright, turned)


def test_default_dtype_is_put_back() -> None:
    """Making weights in bfloat16 leaves the process as it was."""
    load("synthetic-2", torch.bfloat16, "cpu")
    assert torch.get_default_dtype() == torch.float32


def test_bfloat16_text_is_near_float32s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the transformer gets differs by roundings: else each level's error would be the text encoder's own."""
    monkeypatch.setattr(synthetic, "T5_XXL", T5_XXL | SMALL_T5 | {"num_layers": 12})
    embeds = [
        load("synthetic-2", dtype, "cpu").encode_prompt("a cat", None, device="cpu", max_sequence_length=16)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for exact, rounded in zip(*(own[:2] for own in embeds), strict=True):
        assert 0 < relative_l2(rounded.float().numpy(), exact.numpy()) < 0.02

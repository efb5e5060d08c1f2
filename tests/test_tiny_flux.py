"""The shipped checkpoint: its size, its shape, and that it draws what its prompt says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from fluxfast.build import Built, build, generate
from fluxfast.checkpoints import TINY as FOLDER
from fluxfast.levels import FP32
from fluxfast.steps import float8_candidates, linears
from fluxfast.workloads import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from scene_checker import check, wanted

CAPTIONS = (
    "a medium flat orange cross at the right on a dotted beige background",
    "a large glossy blue circle at the top left and a small matte red star at the bottom right on a plain white "
    "background",
)


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    """As anyone would load it."""
    return FluxPipeline.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def built() -> Built:
    return build(TINY, FP32)


@pytest.fixture(scope="module")
def image(built: Built) -> np.ndarray:
    return np.asarray(generate(built, TINY).images[0])


def test_it_is_small_enough_to_ship() -> None:
    """24 MiB in all, so that a clone stays quick."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 24 * 2**20


def test_stock_diffusers_loads_it_with_finite_weights(pipeline: FluxPipeline) -> None:
    """No code of this project is needed to read it."""
    models = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert all(parameter.isfinite().all() for model in models for parameter in model.parameters())


def test_it_has_flux_schnells_shape(pipeline: FluxPipeline) -> None:
    """Head dimension, rotary axes and latent channels are FLUX.1-schnell's: kernels see no other."""
    config = pipeline.transformer.config
    assert config.attention_head_dim == 128 and tuple(config.axes_dims_rope) == (16, 56, 56)
    assert pipeline.vae.config.latent_channels == 16 and config.in_channels == 64 and not config.guidance_embeds
    assert pipeline.vae_scale_factor == 8


def test_every_linear_takes_float8(pipeline: FluxPipeline) -> None:
    """All feature counts are multiples of 16: the float8 level converts every Linear, as it does for FLUX.1."""
    every = linears(pipeline.transformer)
    assert len(every) > 50 and len(float8_candidates(pipeline.transformer)) == len(every)


def test_prompt_of_the_workload_is_drawn(image: np.ndarray) -> None:
    """Each colour at its place and no shape anywhere else: the images that the suite judges mean something."""
    assert len(wanted(TINY.prompt)) == 3 and check(image, TINY.prompt).ok


@pytest.mark.parametrize("caption", CAPTIONS)
def test_other_prompts_are_drawn(built: Built, caption: str) -> None:
    """It reads the prompt and does not draw one picture by heart."""
    assert check(generate(built, dataclasses.replace(TINY, prompt=caption)).images[0], caption).ok


def test_another_seed_is_another_image(built: Built, image: np.ndarray) -> None:
    """The seed decides what the caption leaves open, and the caption still holds."""
    other = np.asarray(generate(built, dataclasses.replace(TINY, seed=TINY.seed + 1)).images[0])
    assert np.abs(other.astype(int) - image).mean() > 1 and check(other, TINY.prompt).ok


def test_the_same_seed_is_the_same_image(built: Built, image: np.ndarray) -> None:
    """Eager float32 on one machine repeats itself bit for bit."""
    assert np.array_equal(np.asarray(generate(built, TINY).images[0]), image)


def test_card_and_configuration_agree(pipeline: FluxPipeline) -> None:
    """The card's parameter counts are those of the files beside it."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        count = sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        assert f"| {name} | {count:,} |" in card


def test_stock_loading_gives_float32(pipeline: FluxPipeline) -> None:
    """The first level of the ladder starts from there."""
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "FluxPipeline"

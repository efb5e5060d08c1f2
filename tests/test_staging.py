"""What is computed once a call or a resolution is what the transformer would have computed in every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from micro_flux import micro_pipeline

from fluxfast.fused import sdpa
from fluxfast.kernels.fuse import fuse_blocks
from fluxfast.kernels.ops import EXACT
from fluxfast.staging import StagedModulation, StagedRotary

CALL: dict[str, Any] = {"prompt": "a red heart", "num_inference_steps": 3, "max_sequence_length": 16}


@pytest.fixture(params=[False, True], ids=["schnell", "dev"])
def pipeline(request: pytest.FixtureRequest) -> FluxPipeline:
    """A micro FLUX in float32 on fused blocks, with and without guidance."""
    made = micro_pipeline(guidance_embeds=request.param, num_layers=2, num_single_layers=2).to(torch.float32)
    made.set_progress_bar_config(disable=True)
    fuse_blocks(made.transformer.requires_grad_(False), attention=sdpa, ops=EXACT, chained=True)
    return made


def draw(pipeline: FluxPipeline, **change: Any) -> torch.Tensor:
    """Latents, (batch, tokens, channels)."""
    arguments = CALL | {"height": 64, "width": 64, "guidance_scale": 3.5} | change
    generator = torch.Generator().manual_seed(0)
    return pipeline(**arguments, generator=generator, output_type="latent").images


CHANGES: list[dict[str, Any]] = [
    {},
    {"prompt": "a blue square"},
    {"num_inference_steps": 4},
    {"guidance_scale": 7.0},
    {"prompt": ["a blue square", "a red heart"]},
    {},
]


def test_staged_modulation_is_each_steps_own(pipeline: FluxPipeline) -> None:
    """Whatever changes between calls, the image is the one without a table, and every call fills it once."""
    want = [draw(pipeline, **change) for change in CHANGES]
    staged = StagedModulation(pipeline)
    for number, (change, expected) in enumerate(zip(CHANGES, want, strict=True)):
        torch.testing.assert_close(draw(pipeline, **change), expected, rtol=1e-4, atol=1e-4)
        assert staged.fills == number + 1


def test_timestep_that_is_not_the_schedulers_gives_nan(pipeline: FluxPipeline) -> None:
    """A step that the table does not hold cannot pass for another one's."""
    StagedModulation(pipeline)
    seen: list[dict[str, Any]] = []
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda **kwargs: seen.append(kwargs) or forward(**kwargs)
    draw(pipeline)
    assert pipeline.transformer(**seen[1])[0].isfinite().all()
    assert pipeline.transformer(**seen[1] | {"timestep": seen[1]["timestep"] * 0.9})[0].isnan().all()


def test_batches_of_two_sizes_keep_their_addresses(pipeline: FluxPipeline) -> None:
    """A CUDA graph captured for one batch size reads the right modulation after another size was drawn."""
    staged, addresses = StagedModulation(pipeline), []
    for prompt in ("a", ["a", "b"], "a", ["a", "b"]):
        draw(pipeline, prompt=prompt)
        addresses.append(staged.tables.current.data_ptr())
    assert addresses[:2] == addresses[2:] and addresses[0] != addresses[1]


def test_staged_tables_are_those_of_the_resolution(pipeline: FluxPipeline) -> None:
    """Equal images bit for bit, also for two shapes of as many tokens, and one table a resolution."""
    sizes = [(64, 64), (32, 128), (128, 32), (64, 64), (32, 128)]
    want = [draw(pipeline, height=height, width=width) for height, width in sizes]
    staged = StagedRotary(pipeline)
    for (height, width), expected in zip(sizes, want, strict=True):
        assert torch.equal(draw(pipeline, height=height, width=width), expected)
    assert staged.fills == 3
    assert len({tables[0].data_ptr() for tables in staged.tables._static.values()}) == 1


def test_ids_written_to_are_other_ids(pipeline: FluxPipeline) -> None:
    """Tables follow the values of ids that someone changed in place."""
    staged = StagedRotary(pipeline)
    first = draw(pipeline)
    staged.image_ids(1, 4, 4, torch.device("cpu"), torch.float32).add_(5)
    assert staged.fills == 1 and not torch.equal(draw(pipeline), first) and staged.fills == 2

"""FLUX.1-Kontext: another pipeline class, an image to edit, twice the image tokens; every count holds as before."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from micro_flux import BLOCKS, STEPS, make_micro_kontext
from test_build import hopper, run_and_prove, untouched_process  # noqa: F401

from fluxfast import input_images
from fluxfast.build import build, generate, input_arguments
from fluxfast.checkpoints import load
from fluxfast.errors import CheckpointError, LevelUnavailable
from fluxfast.input_images import INPUT_IMAGES, draw
from fluxfast.levels import BF16, COMPILE, FA3_FP8, FP32, get_level
from fluxfast.machine import Machine
from fluxfast.workloads import WORKLOADS, Workload
from perf_tests.harness.clock import Clock, StageClock

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts of a CPU; a GPU is held by perf_tests")


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return make_micro_kontext(tmp_path_factory.mktemp("micro_kontext"))


def eager(id: str):
    return dataclasses.replace(get_level(id), compile_mode="none")


@pytest.mark.parametrize("id", ["bf16", "channels_last", "float8"])
def test_steps_apply(kontext: Workload, id: str) -> None:
    """Fusing, layout and float8 count as on FluxPipeline, and the picture has the workload's size."""
    run_and_prove(build(kontext, eager(id)), kontext)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces, guards and counts as ever; Inductor's code, which test_build compiles, is left out."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph.forward)


@pytest.mark.usefixtures("traced_only", "hopper")
def test_compiles_once_a_class(kontext: Workload) -> None:
    """The longer sequence, through a Hopper's attention: one graph a block class and the decoder's, nothing again."""
    facts = run_and_prove(build(kontext, FA3_FP8), kontext)
    assert facts["compiled graphs, recompilations included"] == 3
    assert facts["calls of compiled regions"] == STEPS * BLOCKS + 1
    assert facts["launches of the FA3 op"] == STEPS * BLOCKS


@pytest.mark.usefixtures("traced_only")
def test_full_scope_is_one_graph(kontext: Workload) -> None:
    """The whole transformer is one graph without a break, beside the decoder's."""
    workload = dataclasses.replace(kontext, compile_scope="full")
    facts = run_and_prove(build(workload, COMPILE), workload)
    assert facts["compiled graphs, recompilations included"] == 2
    assert facts["calls of compiled regions"] == STEPS + 1


def test_transformer_sees_both_images(kontext: Workload) -> None:
    """Text, noise and edited image are in the sequence, as long as `tokens` says; 1024 x 1024 at full size."""
    built = build(kontext, BF16)
    lengths = []
    forward = built.pipeline.transformer.forward

    def spy(*args, **kwargs):
        lengths.append(kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1])
        return forward(*args, **kwargs)

    built.pipeline.transformer.forward = spy
    generate(built, kontext)
    assert lengths == [kontext.tokens] * STEPS
    assert [WORKLOADS[id].tokens for id in ("schnell", "dev", "kontext")] == [4352, 4608, 8704]


def test_edited_image_and_guidance_reach_the_picture(kontext: Workload) -> None:
    """Another image to edit, or another guidance, gives another picture; the same gives the same."""
    built = build(kontext, FP32)

    def picture(**overrides):
        return np.asarray(generate(built, kontext, output_type="np", **overrides).images[0])

    first = picture()
    assert np.array_equal(first, picture())
    assert not np.array_equal(first, picture(image=draw("still_life_1", 64, 64).rotate(180)))
    assert not np.array_equal(first, picture(guidance_scale=9.0))


def test_stages_are_timed(kontext: Workload) -> None:
    """The encoding of the edited image is a stage beside the others."""
    built = build(kontext, BF16)
    stages = StageClock(built.pipeline, Clock("cpu"), lambda image: image)
    _, timed = stages.round(lambda: generate(built, kontext), lambda seconds: None)
    assert set(timed.stages_s) == {"text_encode", "image_encode", "step_0", "step_1", "decode", "postprocess"}


def test_checkpoint_of_the_other_kind_is_refused(kontext: Workload, micro: Workload) -> None:
    """A FLUX.1-dev does not edit and a Kontext does not draw: one sentence names both classes."""
    with pytest.raises(CheckpointError, match="does not describe a FluxPipeline but 'FluxKontextPipeline'"):
        load(kontext.checkpoint, torch.float32, "cpu", FluxPipeline)
    with pytest.raises(CheckpointError, match="does not describe a FluxKontextPipeline but 'FluxPipeline'"):
        load(micro.checkpoint, torch.float32, "cpu", FluxKontextPipeline)


@pytest.mark.parametrize(
    ("level", "said"), [("whole_loop_graph", "draws from text alone"), ("fused_qk_rope", "one tensor of image ids")]
)
def test_rungs_for_text_alone_are_refused(
    kontext: Workload, monkeypatch: pytest.MonkeyPatch, level: str, said: str
) -> None:
    """The loop of one CUDA graph takes no image, RoPE's tables know one grid: a sentence before anything is loaded."""
    machine = Machine(device="cuda", capability=(9, 0), fa3_module="flash_attn_interface", triton=True)
    monkeypatch.setattr("fluxfast.build.this_machine", lambda: machine)
    with pytest.raises(LevelUnavailable, match=said):
        build(kontext, get_level(level))


def test_text_workloads_pass_no_image() -> None:
    """FluxPipeline takes neither an image nor an area."""
    assert input_arguments(WORKLOADS["dev"]) == {}
    assert input_arguments(WORKLOADS["kontext"]).keys() == {"image", "max_area", "_auto_resize"}


@pytest.mark.parametrize(
    ("name", "digest"), [("still_life_1", "f58ec73e986cdc2be2379360e31687a581bf30176d8c6ee1bc6e9b2c7b93580a")]
)
def test_pixels_are_frozen(name: str, digest: str) -> None:
    """A drawing is part of its workload's identity: other pixels need another name."""
    assert hashlib.sha256(draw(name, 1024, 1024).tobytes()).hexdigest() == digest
    assert {workload.input_image for workload in WORKLOADS.values()} == {None, *INPUT_IMAGES}


def test_drawing_is_made_once_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timed call draws; any size has the whole scene; an unknown name lists the known."""
    assert draw("still_life_1", 48, 80).size == (80, 48)
    monkeypatch.setattr(input_images, "INPUT_IMAGES", {})
    assert draw("still_life_1", 48, 80) is draw("still_life_1", 48, 80)
    with pytest.raises(ValueError, match="unknown input image 'cat'"):
        draw("cat", 8, 8)

"""The pipeline whose denoising loop is one function draws what FluxPipeline draws, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from micro_flux import micro_pipeline

from fluxfast.ahead import AheadPipeline, ConcurrentPipeline
from fluxfast.compilation import keep_masks_in_capture
from fluxfast.cudagraph import GraphedCallable
from fluxfast.fused import sdpa
from fluxfast.kernels.fuse import fuse_blocks
from fluxfast.kernels.ops import EXACT
from fluxfast.loop import LoopPipeline
from fluxfast.staging import StagedModulation, StagedRotary
from fluxfast.workloads import TINY
from perf_tests.harness import clock, sanity
from perf_tests.harness.clock import StageClock

DEV_SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams beside each other: needs a CUDA GPU")
CALLS: list[dict[str, Any]] = [
    {"height": 64, "width": 64, "num_inference_steps": 2},
    {"height": 32, "width": 96, "num_inference_steps": 3},
    {"height": 64, "width": 64, "num_inference_steps": 3, "prompt": ["a blue square", "a red heart"]},
    {"height": 64, "width": 64, "num_inference_steps": 2},
]


def pipelines(dev: bool, dtype: torch.dtype) -> tuple[FluxPipeline, LoopPipeline]:
    """The stock pipeline and one with a loop, of the same components."""
    stock = micro_pipeline(guidance_embeds=dev).to(dtype)
    if dev:
        stock.scheduler = FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULE)
    return stock, LoopPipeline.of(stock)


def draw(pipeline: FluxPipeline, output_type: str = "pil", **change: Any) -> Any:
    arguments = {"prompt": "a red heart", "guidance_scale": 3.5, "max_sequence_length": 16} | change
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**arguments, generator=generator, output_type=output_type).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dev", [False, True], ids=["schnell", "dev"])
def test_loop_draws_what_flux_pipeline_draws(dev: bool, dtype: torch.dtype) -> None:
    """Equal images, whatever size, steps and batch; dev with its guidance embedding and its dynamic shifting."""
    stock, loop = pipelines(dev, dtype)
    for change in CALLS:
        for own, theirs in zip(draw(loop, **change), draw(stock, **change), strict=True):
            assert np.array_equal(np.asarray(own), np.asarray(theirs))
    for output_type in ("pt", "latent"):
        assert torch.equal(draw(loop, output_type, **CALLS[1]), draw(stock, output_type, **CALLS[1]))
    assert loop.loops == len(CALLS) + 2


def test_noise_is_drawn_behind_the_text_encoders() -> None:
    """Given as what makes it, the image is the stock pipeline's from the same noise, and the encoders are launched."""
    stock, loop = pipelines(False, torch.float32)
    noise, order = torch.randn(1, 16, 64), []
    encode = loop.encode_prompt

    def watched(**arguments: Any) -> Any:
        order.append("encode")
        return encode(**arguments)

    def late() -> torch.Tensor:
        order.append("noise")
        return noise

    loop.encode_prompt = watched
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    own, theirs = draw(loop, "pt", **size, latents=late), draw(stock, "pt", **size, latents=noise)
    assert torch.equal(own, theirs) and order == ["encode", "noise"]


def test_pixels_are_those_of_the_stock_processor() -> None:
    """Every value that rounding could send either way becomes the same byte, in bfloat16 and float32."""
    _, loop = pipelines(False, torch.float32)
    stock = super(type(loop.image_processor), loop.image_processor).postprocess
    for dtype in (torch.float32, torch.bfloat16):
        image = torch.linspace(-1.2, 1.2, 3 * 512 * 512).reshape(1, 3, 512, 512).to(dtype)
        own, theirs = loop.image_processor.postprocess(image)[0], stock(image, output_type="pil")[0]
        assert np.array_equal(np.asarray(own), np.asarray(theirs))


def test_arguments_that_a_loop_cannot_take_are_refused() -> None:
    """A callback that would silently never be called is an error."""
    _, loop = pipelines(False, torch.float32)
    with pytest.raises(TypeError, match="callback_on_step_end"):
        draw(loop, **CALLS[0], callback_on_step_end=print)


@pytest.mark.parametrize("dev", [False, True], ids=["schnell", "dev"])
def test_stages_within_the_loop(dev: bool) -> None:
    """With modulation and RoPE staged too: the same images, a table for every loop, tables of RoPE outside of it."""
    stock, loop = pipelines(dev, torch.float32)
    want = [draw(stock, "latent", **change) for change in CALLS]
    fuse_blocks(loop.transformer.requires_grad_(False), attention=sdpa, ops=EXACT, chained=True)
    loop.modulation = modulation = StagedModulation(loop)
    within, rotary = [], None

    def denoise(**kwargs: Any) -> Any:
        within.append(rotary.fills)
        outcome = inner(**kwargs)
        assert rotary.fills == within[-1]
        return outcome

    inner, loop.denoise = loop.denoise, denoise
    rotary = StagedRotary(loop)
    for change, expected in zip(CALLS, want, strict=True):
        torch.testing.assert_close(draw(loop, "latent", **change), expected, rtol=1e-3, atol=1e-4)
    assert modulation.fills == len(CALLS) and within == [1, 2, 2, 2]


@pytest.mark.parametrize("dev", [False, True], ids=["schnell", "dev"])
def test_modulation_in_front_of_the_loop(dev: bool) -> None:
    """Computed beside T5, it is what the loop would have computed: the same latents bit for bit, one table a call."""
    within, beside = (concurrent_or_not(kind, dev) for kind in (AheadPipeline, ConcurrentPipeline))
    given = []
    inner, beside.denoise = beside.denoise, lambda **kwargs: given.append(kwargs["modulation"]) or inner(**kwargs)
    for change in (*CALLS, CALLS[0] | {"guidance_scale": 7.0}, CALLS[0] | {"prompt": "a blue square"}):
        assert torch.equal(draw(beside, "latent", **change), draw(within, "latent", **change))
    assert beside.modulation.fills == within.modulation.fills == len(given) == 6 and beside.beside == 12
    assert all(len(table) == change["num_inference_steps"] for table, change in zip(given, CALLS, strict=False))


def test_blocks_without_a_table_get_none() -> None:
    """Where the blocks compute their own modulation, CLIP alone is beside T5."""
    stock, _ = pipelines(False, torch.float32)
    beside = ConcurrentPipeline.of(stock)
    assert torch.equal(draw(beside, "latent", **CALLS[1]), draw(stock, "latent", **CALLS[1])) and beside.beside == 1


def concurrent_or_not(kind: type[AheadPipeline], dev: bool, device: str = "cpu") -> Any:
    """A micro FLUX of fused blocks that compute as FLUX does, its modulation staged."""
    stock, _ = pipelines(dev, torch.float32)
    own = kind.of(stock.to(device))
    fuse_blocks(own.transformer.requires_grad_(False), attention=sdpa, ops=EXACT, chained=True)
    own.modulation = StagedModulation(own)
    return own


@on_a_gpu
@pytest.mark.parametrize("dev", [False, True], ids=["schnell", "dev"])
def test_what_is_beside_t5_does_not_wait_for_it(dev: bool) -> None:
    """With T5 held up the rest ends before it, and the images stay what they were, from graphs too."""
    within, beside = (concurrent_or_not(kind, dev, "cuda") for kind in (AheadPipeline, ConcurrentPipeline))
    keep_masks_in_capture(beside.text_encoder)
    beside.text_encoder.forward = GraphedCallable(beside.text_encoder.forward, beside.stream)
    beside.compute_modulation = GraphedCallable(beside.compute_modulation, beside.stream)
    for change in CALLS:  # a capture waits for everything
        assert torch.equal(draw(beside, "latent", **change), draw(within, "latent", **change))
    for change in CALLS:
        with beside.t5_held_up():
            own = draw(beside, "latent", **change)
        assert beside.overlaps() and torch.equal(own, draw(within, "latent", **change))


@on_a_gpu
def test_what_waits_for_t5_is_told() -> None:
    """A CLIP that begins behind T5 is no overlap; nor is a call that never was."""
    beside = concurrent_or_not(ConcurrentPipeline, False, "cuda")
    assert not beside.overlaps()
    main = torch.cuda.current_stream()
    beside.text_encoder.register_forward_pre_hook(lambda *_: torch.cuda.current_stream().wait_stream(main))
    draw(beside, "latent", **CALLS[0])
    with beside.t5_held_up():
        draw(beside, "latent", **CALLS[0])
    assert not beside.overlaps()


def test_loop_that_runs_twice_is_a_loop_that_ran_once() -> None:
    """A capture calls the function several times on the same tensors: nothing may be left over from the last time."""
    _, loop = pipelines(True, torch.float32)
    results = []
    inner = loop.denoise
    loop.denoise = lambda **kwargs: [results.append(inner(**kwargs)) for _ in range(2)] and results[-1]
    draw(loop, **CALLS[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clock_shows_the_loop_as_one_stage() -> None:
    """Without steps to time, the loop's equal parts are held against the chip's limits; the first output is kept."""
    _, loop = pipelines(False, torch.float32)
    stages = StageClock(loop, clock.Clock("cpu"), lambda image: image)
    _, timed = stages.round(lambda: draw(loop, **CALLS[0]), lambda seconds: None)
    assert list(timed.stages_s) == ["text_encode", "denoise", "decode", "postprocess"]
    assert stages.first_step_output.shape == (1, 16, 64) and stages.decoded.shape == (1, 3, 64, 64)
    seconds = {name: [value] for name, value in timed.stages_s.items()}
    assert sanity.step_seconds(TINY, seconds) == [timed.stages_s["denoise"] / TINY.num_inference_steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_encoded_ahead_is_the_stock_pipelines(dtype: torch.dtype) -> None:
    """The same embeddings and ids for one prompt and several, of any length, and the same image."""
    stock = micro_pipeline().to(dtype)
    ahead = AheadPipeline.of(stock)
    for prompt, length in (("a red heart", 16), (["a blue square", "a red heart on " * 9], 32), ("", 16)):
        arguments = {"prompt": prompt, "prompt_2": None, "device": torch.device("cpu"), "max_sequence_length": length}
        own = ahead.encode_prompt(**arguments)
        for mine, theirs in zip(own, stock.encode_prompt(**arguments), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        assert ahead.encode_prompt(**arguments)[2] is own[2]
    assert ahead.encoded == 6
    assert np.array_equal(np.asarray(draw(ahead, **CALLS[1])[0]), np.asarray(draw(stock, **CALLS[1])[0]))


def test_longer_encoder_is_launched_first() -> None:
    """CLIP's tokens are made while T5 runs."""
    ahead, order = AheadPipeline.of(micro_pipeline()), []
    for name in ("tokenizer_2", "text_encoder_2", "tokenizer", "text_encoder"):
        part, kind = getattr(ahead, name), type(getattr(ahead, name))

        def watched(self: Any, *args: Any, name: str = name, call: Any = kind.__call__, **kwargs: Any) -> Any:
            order.append(name)
            return call(self, *args, **kwargs)

        part.__class__ = type(kind.__name__, (kind,), {"__call__": watched})
    ahead.encode_prompt("a red heart", max_sequence_length=16)
    assert order == ["tokenizer_2", "text_encoder_2", "tokenizer", "text_encoder"]


def test_cut_prompt_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What no encoder sees is named; a prompt that just fits, and one that is padded, say nothing."""
    ahead = AheadPipeline.of(micro_pipeline())
    whole = ahead.tokenizer_2("a red heart on a plain white background", return_tensors="pt").input_ids.shape[1]
    for length in (whole + 1, whole):
        ahead.encode_prompt("a red heart on a plain white background", max_sequence_length=length)
    assert not caplog.records
    ahead.encode_prompt("a red heart on a plain white background", max_sequence_length=whole - 2)
    assert "are used, and this was cut" in caplog.text and "background" in caplog.text


def test_textual_inversions_are_refused() -> None:
    """Tokens that no prompt is searched for would silently do nothing."""
    with pytest.raises(ValueError, match="looks for no textual inversions"):
        AheadPipeline.of(micro_pipeline()).load_textual_inversion("somewhere")


def test_device_is_known_without_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module asked for hooks would cost more than the tokens."""
    ahead = AheadPipeline.of(micro_pipeline())
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: pytest.fail("asked every module"))
    assert ahead._execution_device == torch.device("cpu")

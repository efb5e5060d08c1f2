"""A level as data -> a pipeline that runs it, with the proof of every field.

The one legal order of application, which is not the ladder's order:

1. `no_gemm_workspace`, which cuBLASLt reads when it is first used, then load in `dtype`, as the pipeline that
   `whole_loop_graph`, `no_host_waits` or `concurrent_encode` asks for,
2. `fused_projections` (before float8, which would convert the separate projections),
3. `memory_format` (before anything records strides), then `fast_decode`, whose norms want NHWC, and
   `subpixel_upsampling`, whose convolutions write it,
4. `attention` (before compilation traces the processor),
5. `quantization`; or the fused blocks, which quantise their own Linears, for `levels.FUSED_BLOCK_FIELDS`; then
   `fused_t5`, whose temporary weights find room beside a transformer that is in float8,
6. `compile_mode` with `inductor_flags`, or `packaging` of the same regions,
7. CUDA graphs around what was compiled: one a step or, with `whole_loop_graph`, one for the loop; `fast_encode`
   adds the text encoders to both, and `concurrent_encode` the modulation to the graphs,
8. what every step reads is computed once a call or a resolution, for `precomputed_modulation` and `fused_qk_rope`:
   before the transformer and outside of its graph. In the graph of a whole loop the modulation is within it, but for
   `concurrent_encode`, which has it beside T5.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxfast import ahead, aoti, convolution, decoder, fused, proof, scaled_mm, steps, t5, upsampling, workspace
from fluxfast.attention import COUNT, LaunchCount, has_tail
from fluxfast.checkpoints import Pipeline, load, pipeline_class
from fluxfast.compilation import (
    Compiler,
    block_lists,
    compile_forward,
    compile_transformer,
    inductor_options,
    keep_masks_in_capture,
    lay_out_position_bias,
    text_encoder_layers,
    unify_single_block_inputs,
)
from fluxfast.cudagraph import GraphedCallable
from fluxfast.errors import LevelUnavailable
from fluxfast.input_images import draw
from fluxfast.levels import DEFAULTS, Level
from fluxfast.loop import LoopPipeline
from fluxfast.machine import effective, this_machine, why_not
from fluxfast.staging import StagedModulation, StagedRotary
from fluxfast.workloads import Workload

OnStage = Callable[[str, str], None]
"""Called with a stage, "load" or "apply", and a detail of it, empty at its beginning."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT_ONLY = {
    "whole_loop_graph": "the loop of whole_loop_graph draws from text alone",
    "fused_qk_rope": "fused_qk_rope keeps one tensor of image ids a size, where an edit needs two",
}
"""Fields that cannot serve a workload with an input image, and why."""


@dataclasses.dataclass
class Built:
    """A pipeline at one level and what is needed to prove it.

    Attributes:
        pipeline: ready to be called; just-in-time compilation and graph capture happen in the first call.
        level: the effective level, without the fields that this machine cannot run.
        unavailable: those fields, each with its reason.
        facts: the counts taken while building.
        has_tail: whether attention of the workload's size has a tail that `split_attention_tail` launches by itself.
        waits: of the host for the device in the call that `watch` counted them in; None if there was none.
        overlaps: whether all that does not depend on T5 ran beside it in that call, likewise.
    """

    pipeline: Pipeline
    level: Level
    unavailable: dict[str, str]
    device: str
    scope: str
    facts: list[proof.Fact]
    compiler: Compiler
    packages: list[aoti.Package] = dataclasses.field(default_factory=list)
    graphed: dict[str, GraphedCallable] = dataclasses.field(default_factory=dict)
    text_compiler: Compiler | None = None
    modulation: StagedModulation | None = None
    rotary: StagedRotary | None = None
    has_tail: bool = False
    waits: int | None = None
    overlaps: bool | None = None
    _fa3_before: LaunchCount = dataclasses.field(default_factory=LaunchCount)

    @property
    def fa3(self) -> LaunchCount:
        """Calls of FA3's ops since the pipeline was built."""
        return COUNT.since(self._fa3_before)

    def forwards(self, calls: int, num_steps: int) -> dict[str, int]:
        """How often loop and models ran in Python during `calls` pipeline calls; a graph's replay does not count."""
        ran = dict.fromkeys(("loop", "modulation", *TEXT_ENCODERS), calls)
        ran |= {name: graph.function_calls for name, graph in self.graphed.items()}
        return {"transformer": ran["loop"] * num_steps, "decoder": calls} | ran

    def watch(self, call: Callable[[], Any]) -> int:
        """Count the host's waits in one more pipeline call, where the level says that it does not wait.

        Where it says that T5 does not keep the rest from running, that call's T5 is held up, to see it.

        Returns:
            How many calls that was, 0 or 1, for `prove`.
        """
        if self.device != "cuda" or not self.level.no_host_waits:
            return 0
        if not isinstance(self.pipeline, ahead.ConcurrentPipeline):
            self.waits = ahead.waits(call)
            return 1
        with self.pipeline.t5_held_up():
            self.waits = ahead.waits(call)
        self.overlaps = self.pipeline.overlaps()
        return 1

    def prove(self, calls: int, num_steps: int) -> list[proof.Fact]:
        """All facts, after exactly `calls` calls of `num_steps` steps.

        Raises:
            StepNotApplied: if one does not hold.
        """
        facts = [*self.facts, *proof.run_facts(self, calls, num_steps)]
        proof.require(self.level, facts)
        return facts


def generate(built: Built, workload: Workload, **overrides: Any) -> Any:
    """One `pipeline(...)` call of the workload: prompt to PIL image.

    Returns:
        The `FluxPipelineOutput`; its `images[0]` is (height, width) RGB unless `overrides` say otherwise.
    """
    noise = functools.partial(initial_noise, built.pipeline, workload)
    latents = noise if isinstance(built.pipeline, LoopPipeline) else noise()
    return built.pipeline(**(workload.call_arguments() | input_arguments(workload) | {"latents": latents} | overrides))


def initial_noise(pipeline: Pipeline, workload: Workload) -> torch.Tensor:
    """What the denoising starts from: (1, image tokens, channels) float32 on the pipeline's device.

    Drawn by a CPU generator in float32 whatever the pipeline's dtype is, as every level has to start from the same
    noise: up to torch 2.11 the same seed gives other numbers in bfloat16 (pytorch issue 166853).
    """
    generator = torch.Generator("cpu").manual_seed(workload.seed)
    sides = [2 * (side // (2 * pipeline.vae_scale_factor)) for side in (workload.height, workload.width)]
    shape = (1, pipeline.transformer.config.in_channels // 4, *sides)
    device = next(pipeline.transformer.parameters()).device  # `pipeline.device` goes through every module
    # From pinned memory the copy does not wait for the device.
    noise = torch.randn(shape, generator=generator, pin_memory=device.type == "cuda")
    return pipeline._pack_latents(noise.to(device, non_blocking=True), *shape)


def input_arguments(workload: Workload) -> dict[str, Any]:
    """Further keyword arguments where an image is edited: it, and that neither it nor the output changes size.

    Without them `FluxKontextPipeline` brings both to about a megapixel, whatever `height` and `width` say.
    """
    if workload.input_image is None:
        return {}
    return {
        "image": draw(workload.input_image, workload.height, workload.width),
        "max_area": workload.height * workload.width,
        "_auto_resize": False,
    }


def build(
    workload: Workload,
    level: Level,
    *,
    cache_dir: Path | None = None,
    unapplied: str | None = None,
    on_stage: OnStage = lambda stage, detail: None,
) -> Built:
    """Load the workload's checkpoint and apply `level` to it.

    Args:
        workload: what will be generated; its scope decides what is compiled.
        level: as on the ladder; fields that this machine cannot run are taken out and named in the result.
        cache_dir: private folder for AOTInductor packages; None means a new temporary one.
        unapplied: a field to leave out although the level has it, for tests of the proofs.
        on_stage: called with "load" and "apply" when they begin, and with a detail where one of them goes on for long.

    Raises:
        LevelUnavailable: if this machine cannot run the very field that the level adds.
        CheckpointError: if the checkpoint cannot be loaded.
        StepNotApplied: if a field had no effect.
    """
    machine = this_machine()
    if reason := why_not(level, machine):
        raise LevelUnavailable(f"level {level.id!r} cannot run on this machine: {reason}")
    target, reasons = effective(level, machine)
    for field, why in TEXT_ONLY.items() if workload.input_image is not None else ():
        if getattr(target, field):
            raise LevelUnavailable(
                f"level {level.id!r}: {why}, and workload {workload.id!r} edits an image; measure another level"
            )
    applied = dataclasses.replace(target, **({unapplied: DEFAULTS[unapplied]} if unapplied else {}))

    on_stage("load", "")
    if machine.device == "cpu" and not convolution.has_bfloat16():
        convolution.replace_slow_bfloat16()
    if machine.device == "cpu" and scaled_mm.is_slow():
        scaled_mm.replace_reference()
    if applied.no_gemm_workspace:
        workspace.drop()
    pipeline = load(workload.checkpoint, getattr(torch, applied.dtype), machine.device, kind=pipeline_class(workload))
    if applied.whole_loop_graph:
        ahead_of_device = ahead.ConcurrentPipeline if applied.concurrent_encode else ahead.AheadPipeline
        pipeline = (ahead_of_device if applied.no_host_waits else LoopPipeline).of(pipeline)
    on_stage("apply", "")
    facts = apply_static_fields(pipeline, applied, target)
    built = Built(
        pipeline=pipeline,
        level=target,
        unavailable=reasons,
        device=machine.device,
        scope=workload.compile_scope,
        facts=facts,
        compiler=Compiler(inductor_options(applied)),
        has_tail=target.split_attention_tail
        and has_tail(workload.tokens, pipeline.transformer.config.num_attention_heads),
    )
    if applied.compile_mode != "none":
        if workload.compile_scope == "blocks" and not applied.has_fused_blocks:
            unify_single_block_inputs(pipeline.transformer)
        if applied.packaging == "aoti":
            folder = cache_dir or Path(tempfile.mkdtemp(prefix="fluxfast-"))
            package(built, workload, folder, lambda detail: on_stage("apply", detail))
        else:
            compile_transformer(pipeline.transformer, built.compiler, workload.compile_scope)
            compile_forward(pipeline.vae.decoder, built.compiler)
    if applied.compile_mode != "none" and applied.fast_encode:
        # Without max-autotune's search, which would add every GEMM shape of T5-XXL and CLIP to a cold process.
        built.text_compiler = Compiler({})
        for layer in text_encoder_layers(pipeline.text_encoder, pipeline.text_encoder_2):
            compile_forward(layer, built.text_compiler)
        for name in TEXT_ENCODERS:
            keep_masks_in_capture(getattr(pipeline, name))
        lay_out_position_bias(pipeline.text_encoder_2)
    if applied.precomputed_modulation and applied.has_fused_blocks and applied.whole_loop_graph:
        built.modulation = pipeline.modulation = StagedModulation(pipeline)
    if applied.compile_mode != "none" and machine.device == "cuda":
        capture(built, applied)
    if applied.precomputed_modulation and applied.has_fused_blocks and not applied.whole_loop_graph:
        built.modulation = StagedModulation(pipeline)
    if applied.fused_qk_rope and applied.has_fused_blocks:
        built.rotary = StagedRotary(pipeline)
    built._fa3_before = dataclasses.replace(COUNT)
    return built


def apply_static_fields(pipeline: Pipeline, applied: Level, target: Level) -> list[proof.Fact]:
    """Steps 2 to 5, each followed by its count; `applied` is done, `target` is what the counts must show.

    Raises:
        StepNotApplied: if a count does not hold.
    """
    facts = proof.dtype_facts(pipeline, target) + proof.workspace_facts(target)
    if applied.fused_projections:
        steps.fuse_projections(pipeline)
    facts += proof.fusion_facts(pipeline, target)
    if applied.memory_format == "channels_last":
        steps.channels_last(pipeline)
    if applied.fast_decode:
        decoder.fuse_norms(pipeline.vae.decoder)
        decoder.use_gemms_for_attention(pipeline.vae.decoder)
    if applied.subpixel_upsampling:
        upsampling.use_subpixels(pipeline.vae.decoder)
    # After every convolution that the fields above have made.
    facts += proof.memory_format_facts(pipeline.vae, target)
    facts += proof.decoder_facts(pipeline.vae.decoder, target)
    if applied.attention != "sdpa":
        cast_outside = applied.attention == "fa3_fp8"
        steps.fa3_attention(pipeline, cast_outside, split_tail=applied.split_attention_tail)
    facts += proof.attention_facts(pipeline.transformer, target)
    if applied.has_fused_blocks:
        fused.fuse(pipeline.transformer, applied)
    elif applied.quantization == "float8_tensorwise":
        steps.float8_tensorwise(pipeline)
    elif applied.quantization == "float8_rowwise":
        steps.float8_rowwise(pipeline)
    facts += proof.quantization_facts(pipeline.transformer, target)
    if applied.fused_t5:
        t5.fuse(pipeline.text_encoder_2)
    facts += proof.t5_facts(pipeline.text_encoder_2, target)
    proof.require(target, facts)
    return facts


def package(built: Built, workload: Workload, cache_dir: Path, on_detail: Callable[[str], None]) -> None:
    """Step 6 ahead of time: export, compile and attach one package a region.

    Raises:
        ValueError: for fused blocks. The last one's hooks, which take the joint stream apart, would be in all.
    """
    pipeline = built.pipeline
    if built.level.has_fused_blocks:
        raise ValueError(f"level {built.level.id!r}: fused blocks are not packaged: compile them just in time")
    if workload.compile_scope == "full":
        regions = {"transformer": [pipeline.transformer]}
    else:
        regions = dict(zip(("double", "single"), map(list, block_lists(pipeline.transformer)), strict=True))
    regions["decoder"] = [pipeline.vae.decoder]
    # The last instance of a class is exported: the first single block carries the input hook.
    exported = {name: instances[-1] for name, instances in regions.items()}
    on_detail("examples of arguments")
    examples = aoti.capture_examples(exported, lambda: generate(built, workload, num_inference_steps=1))
    with torch.no_grad():
        for name, instances in regions.items():
            on_detail(f"package {name}")
            made = aoti.make_package(
                name, exported[name], examples[name], built.compiler.options, built.level, cache_dir / "aoti"
            )
            on_detail(f"package {name}, {'reused' if made.reused else 'compiled'}, {len(instances)} times")
            for instance in instances:
                made.attach(instance)
            built.packages.append(made)


def capture(built: Built, applied: Level) -> None:
    """Step 7: one CUDA graph around the transformer, one around the decoder, as max-autotune's mode would."""
    pipeline = built.pipeline
    steps_graph = ("transformer", pipeline.transformer, "forward")
    if applied.whole_loop_graph:
        steps_graph = ("loop", pipeline, "denoise")
    graphs = [steps_graph, ("decoder", pipeline.vae.decoder, "forward")]
    if applied.fast_encode:
        graphs += [(name, getattr(pipeline, name), "forward") for name in TEXT_ENCODERS]
    beside: dict[str, torch.cuda.Stream | None] = {}
    if isinstance(pipeline, ahead.ConcurrentPipeline):
        if pipeline.modulation is not None:
            graphs.append(("modulation", pipeline, "compute_modulation"))
        beside = dict.fromkeys(("text_encoder", "modulation"), pipeline.stream)
    for name, owner, method in graphs:
        built.graphed[name] = GraphedCallable(getattr(owner, method), beside.get(name))
        setattr(owner, method, built.graphed[name])

"""A level as data -> a pipeline that runs it, with the proof of every field.

The one legal order of application, which is not the ladder's order:

1. load in `dtype`,
2. `fused_projections` (before float8, which would convert the separate projections),
3. `memory_format` (before anything records strides),
4. `attention` (before compilation traces the processor),
5. `quantization`,
6. `compile_mode` with `inductor_flags`, or `packaging` of the same regions,
7. CUDA graphs around what was compiled.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxfast import aoti, proof, steps
from fluxfast.attention import COUNT
from fluxfast.checkpoints import Pipeline, load, pipeline_class
from fluxfast.compilation import (
    Compiler,
    block_lists,
    compile_forward,
    compile_transformer,
    inductor_options,
    unify_single_block_inputs,
)
from fluxfast.cudagraph import GraphedCallable
from fluxfast.errors import LevelUnavailable
from fluxfast.input_images import draw
from fluxfast.levels import DEFAULTS, Level
from fluxfast.machine import effective, this_machine, why_not
from fluxfast.workloads import Workload


@dataclasses.dataclass
class Built:
    """A pipeline at one level and what is needed to prove it.

    Attributes:
        pipeline: ready to be called; just-in-time compilation and graph capture happen in the first call.
        level: the effective level, without the fields that this machine cannot run.
        unavailable: those fields, each with its reason.
        facts: the counts taken while building.
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
    _launches_before: int = 0

    @property
    def fa3_launches(self) -> int:
        """Launches of the FA3 op since the pipeline was built."""
        return COUNT.launches - self._launches_before

    def forwards(self, calls: int, num_steps: int) -> dict[str, int]:
        """How often transformer and decoder ran in Python during `calls` calls; a graph replay does not count."""
        eager = {"transformer": calls * num_steps, "decoder": calls}
        return eager | {name: graph.function_calls for name, graph in self.graphed.items()}

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
    generator = torch.Generator("cpu").manual_seed(workload.seed)
    return built.pipeline(
        **(workload.call_arguments() | input_arguments(workload) | {"generator": generator} | overrides)
    )


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
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Built:
    """Load the workload's checkpoint and apply `level` to it.

    Args:
        workload: what will be generated; its scope decides what is compiled.
        level: as on the ladder; fields that this machine cannot run are taken out and named in the result.
        cache_dir: private folder for AOTInductor packages; None means a new temporary one.
        unapplied: a field to leave out although the level has it, for tests of the proofs.
        on_stage: called with "load" and "apply" when they begin.

    Raises:
        LevelUnavailable: if this machine cannot run the very field that the level adds.
        CheckpointError: if the checkpoint cannot be loaded.
        StepNotApplied: if a field had no effect.
    """
    machine = this_machine()
    if reason := why_not(level, machine):
        raise LevelUnavailable(f"level {level.id!r} cannot run on this machine: {reason}")
    target, reasons = effective(level, machine)
    applied = dataclasses.replace(target, **({unapplied: DEFAULTS[unapplied]} if unapplied else {}))

    on_stage("load")
    pipeline = load(workload.checkpoint, getattr(torch, applied.dtype), machine.device, kind=pipeline_class(workload))
    on_stage("apply")
    facts = apply_static_fields(pipeline, applied, target)
    built = Built(
        pipeline=pipeline,
        level=target,
        unavailable=reasons,
        device=machine.device,
        scope=workload.compile_scope,
        facts=facts,
        compiler=Compiler(inductor_options(applied)),
    )
    if applied.compile_mode != "none":
        if applied.packaging == "aoti":
            package(built, workload, cache_dir or Path(tempfile.mkdtemp(prefix="fluxfast-")))
        else:
            compile_transformer(pipeline.transformer, built.compiler, workload.compile_scope)
            compile_forward(pipeline.vae.decoder, built.compiler)
        if machine.device == "cuda":
            capture(built)
    built._launches_before = COUNT.launches
    return built


def apply_static_fields(pipeline: Pipeline, applied: Level, target: Level) -> list[proof.Fact]:
    """Steps 2 to 5, each followed by its count; `applied` is done, `target` is what the counts must show.

    Raises:
        StepNotApplied: if a count does not hold.
    """
    facts = proof.dtype_facts(pipeline, target)
    if applied.fused_projections:
        steps.fuse_projections(pipeline)
    facts += proof.fusion_facts(pipeline, target)
    if applied.memory_format == "channels_last":
        steps.channels_last(pipeline)
    facts += proof.memory_format_facts(pipeline.vae, target)
    if applied.attention != "sdpa":
        steps.fa3_attention(pipeline, cast_outside=applied.attention == "fa3_fp8")
    facts += proof.attention_facts(pipeline.transformer, target)
    if applied.quantization == "float8_tensorwise":
        steps.float8_tensorwise(pipeline)
    facts += proof.quantization_facts(pipeline.transformer, target)
    proof.require(target, facts)
    return facts


def package(built: Built, workload: Workload, cache_dir: Path) -> None:
    """Step 6 ahead of time: export, compile and attach one package a region."""
    pipeline = built.pipeline
    if workload.compile_scope == "full":
        regions = {"transformer": [pipeline.transformer]}
    else:
        unify_single_block_inputs(pipeline.transformer)
        regions = dict(zip(("double", "single"), map(list, block_lists(pipeline.transformer)), strict=True))
    regions["decoder"] = [pipeline.vae.decoder]
    # The last instance of a class is exported: the first single block carries the input hook.
    exported = {name: instances[-1] for name, instances in regions.items()}
    examples = aoti.capture_examples(exported, lambda: generate(built, workload, num_inference_steps=1))
    with torch.no_grad():
        for name, instances in regions.items():
            made = aoti.make_package(
                name, exported[name], examples[name], built.compiler.options, built.level, cache_dir / "aoti"
            )
            for instance in instances:
                made.attach(instance)
            built.packages.append(made)


def capture(built: Built) -> None:
    """Step 7: one CUDA graph around the transformer, one around the decoder, as max-autotune's mode would."""
    for name, module in (("transformer", built.pipeline.transformer), ("decoder", built.pipeline.vae.decoder)):
        built.graphed[name] = GraphedCallable(module.forward)
        module.forward = built.graphed[name]

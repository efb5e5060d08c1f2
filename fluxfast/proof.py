"""Counts that show that each field of a level took effect, whether it is on or off.

Every function returns facts: what was counted, and how often it has to be there at this level. `require` raises on the
first that does not hold. Counting both ways catches a step that did nothing and one that leaked into another level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fluxfast import t5, workspace
from fluxfast.attention import Fa3Fp8Processor
from fluxfast.compilation import block_lists, position_biases_in_order, text_encoder_layers
from fluxfast.decoder import FusedGroupNorm, GemmAttnProcessor, norms
from fluxfast.decoder import attentions as decoder_attentions
from fluxfast.errors import StepNotApplied
from fluxfast.kernels.linear import ROWWISE_FLOAT8
from fluxfast.levels import COORDINATE_DESCENT, INDUCTOR_FLAGS, TRITON_GEMMS, Level
from fluxfast.steps import UNFUSED, attentions, block_linears, blocks_of, float8_candidates, linears
from fluxfast.upsampling import SubpixelUpsample, upsamplings

if TYPE_CHECKING:
    from diffusers import FluxPipeline

    from fluxfast.build import Built


@dataclasses.dataclass(frozen=True)
class Fact:
    """`what` was observed `observed` times and has to be there `expected` times for `field` to be as the level says."""

    field: str
    what: str
    observed: int
    expected: int

    @property
    def holds(self) -> bool:
        """Whether the count is exact."""
        return self.observed == self.expected


def require(level: Level, facts: Iterable[Fact]) -> None:
    """Raise on the first fact that does not hold.

    Raises:
        StepNotApplied: naming level, field, both counts and the library.
    """
    for fact in facts:
        if not fact.holds:
            raise StepNotApplied(
                f"level {level.id!r} ({fact.field}={getattr(level, fact.field)!r}): {fact.observed} {fact.what}, "
                f"expected {fact.expected} (diffusers {version('diffusers')}, torch {torch.__version__}). "
                f"Its timing would not be that of this level: find what changed in how {fact.field} is applied."
            )


def _all_if(on: bool, count: int) -> int:
    return count if on else 0


def dtype_facts(pipeline: FluxPipeline, level: Level) -> list[Fact]:
    """Floating-point parameters in the level's dtype."""
    models = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [p for model in models for p in model.parameters() if p.is_floating_point()]
    right = sum(p.dtype == getattr(torch, level.dtype) for p in parameters)
    return [Fact("dtype", f"parameters in {level.dtype}", right, len(parameters))]


def workspace_facts(level: Level) -> list[Fact]:
    """Memory cleared for a GEMM of a block's size. Levels with a workspace leave that to the library."""
    if not level.no_gemm_workspace:
        return []
    return [Fact("no_gemm_workspace", "memsets in front of a float8 GEMM", workspace.memsets_of_a_gemm(), 0)]


def fusion_facts(pipeline: FluxPipeline, level: Level) -> list[Fact]:
    """Attention modules with one QKV projection, and projections left beside it."""
    modules = [*attentions(pipeline.transformer), *attentions(pipeline.vae)]
    fused = sum(m.fused_projections and hasattr(m, "to_qkv") for m in modules)
    facts = [
        Fact("fused_projections", "attention modules with fused projections",
             fused, _all_if(level.fused_projections, len(modules)))
    ]  # fmt: skip
    if level.fused_projections:
        dead = sum(getattr(m, name, None) is not None for m in modules for name in UNFUSED)
        facts.append(Fact("fused_projections", "dead projections", dead, 0))
    return facts


def memory_format_facts(vae: nn.Module, level: Level) -> list[Fact]:
    """Convolution weights of the VAE in NHWC, among those whose layout can tell."""
    weights = [m.weight for m in vae.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[1:]) > 1]
    in_nhwc = sum(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    expected = _all_if(level.memory_format == "channels_last", len(weights))
    return [Fact("memory_format", "VAE convolutions in channels_last", in_nhwc, expected)]


def decoder_facts(decoder: nn.Module, level: Level) -> list[Fact]:
    """Of the VAE's decoder: norms that are one operation with their activation, activations left beside them,
    attentions, and upsamplings."""
    found = norms(decoder)
    fused = sum(isinstance(norm, FusedGroupNorm) for norm in found)
    facts = [Fact("fast_decode", "fused norms in the decoder", fused, _all_if(level.fast_decode, len(found)))]
    if level.fast_decode:
        apart = sum(isinstance(module, nn.SiLU) for module in decoder.modules())
        facts.append(Fact("fast_decode", "activations of the decoder apart from its norms", apart, 0))
    attended = decoder_attentions(decoder)
    as_gemms = sum(isinstance(attn.processor, GemmAttnProcessor) for attn in attended)
    expected = _all_if(level.fast_decode, len(attended))
    facts.append(Fact("fast_decode", "attentions of the decoder as two GEMMs", as_gemms, expected))
    doubled = upsamplings(decoder)
    summed = sum(isinstance(module, SubpixelUpsample) for module in doubled)
    expected = _all_if(level.subpixel_upsampling, len(doubled))
    return [*facts, Fact("subpixel_upsampling", "upsamplings as one 2x2 convolution", summed, expected)]


def attention_facts(transformer: nn.Module, level: Level) -> list[Fact]:
    """Attention modules whose processor is FA3's, and those among them that cast within the op."""
    modules = attentions(transformer)
    ours = [m.processor for m in modules if isinstance(m.processor, Fa3Fp8Processor)]
    inside = sum(not processor.cast_outside for processor in ours)
    expected = _all_if(level.attention != "sdpa", len(modules))
    facts = [Fact("attention", "FA3 attention processors", len(ours), expected)]
    if ours:
        cast_inside = level.attention == "fa3_fp8_cast_inside"
        facts.append(Fact("attention", "casts to e4m3 within the FA3 op", inside, _all_if(cast_inside, len(modules))))
    return facts


def scaling(linear: nn.Module) -> str | None:
    """How a Linear's float8 product is scaled: "tensor", "row", or None if its weight is not float8.

    "weight-only" is none of them: the weight is unpacked and the product done in bfloat16, without a float8 GEMM.
    """
    from torchao.quantization import Float8Tensor

    if isinstance(linear, ROWWISE_FLOAT8):
        return "row"
    if not isinstance(linear.weight, Float8Tensor):
        return None
    if linear.weight.act_quant_kwargs is None:
        return "weight-only"
    return "row" if tuple(linear.weight.block_size) == (1, linear.in_features) else "tensor"


def quantization_facts(transformer: nn.Module, level: Level) -> list[Fact]:
    """Linears with a float8 weight of the level's scaling, and those that must not have one."""
    everywhere = [m for m in transformer.modules() if isinstance(m, nn.Linear | ROWWISE_FLOAT8)]
    if level.quantization == "float8_rowwise":
        inner = block_linears(transformer)
        right = sum(scaling(m) == "row" for m in inner)
        other = sum(scaling(m) is not None for m in everywhere) - sum(scaling(m) is not None for m in inner)
        return [
            Fact("quantization", "block Linears with row-wise float8 weights", right, len(inner)),
            Fact("quantization", "Linears outside the blocks or of AdaLN with float8 weights", other, 0),
        ]
    candidates = float8_candidates(transformer)
    on = level.quantization == "float8_tensorwise"
    # A level without float8 must not have it in any form, one with a scale a tensor in no other.
    converted = sum(scaling(m) == "tensor" if on else scaling(m) is not None for m in everywhere)
    facts = [Fact("quantization", "Linears with float8 weights", converted, _all_if(on, len(candidates)))]
    if on:
        skipped = len(linears(transformer)) - len(candidates)
        facts.append(Fact("quantization", "Linears skipped for their shape", skipped, 0))
    return facts


def t5_facts(encoder: nn.Module, level: Level) -> list[Fact]:
    """Blocks of T5 with one QKV projection, and Linears left of the gated GELU."""
    expected = _all_if(level.fused_t5, encoder.config.num_layers)
    facts = [Fact("fused_t5", "T5 blocks whose q, k and v are one Linear", t5.with_one_projection(encoder), expected)]
    if level.fused_t5:
        apart = sum(name.endswith((".wi_0", ".wi_1")) for name, _ in encoder.named_modules())
        facts.append(Fact("fused_t5", "Linears of T5's gated GELU apart from each other", apart, 0))
    return facts


QUANTIZING = ("gelu_quantize", "layernorm_modulate_quantize", "residual_layernorm_modulate_quantize")
"""Triton operations of a double block, each once a stream; with `fused_residuals` the third instead of the second, with
`residual_epilogue` the second instead of the third, and with `grouped_gemms` another for both streams."""
QUANTIZING_SINGLE = ("layernorm_modulate_quantize", "gelu_concat_quantize")
"""Of a single block; with `fused_residuals` the norm is the one with the residual. `gelu_epilogue` leaves the norms."""

VALUES = ("fluxfast::qkv_linear", "fluxfast::grouped_qkv_linear")
"""GEMMs of QKV that write V as attention takes it; the second is of both streams of a double block."""
TRANSPOSED = ("fluxfast::qk_norm_rope_hadamard_quantize_transposed", "fluxfast::qk_norm_rope_hadamard_quantize_mixed")
BEHIND_VALUES = "fluxfast::qk_norm_rope_hadamard_quantize_without_values"
HADAMARD = ("fluxfast::qk_norm_rope_hadamard_quantize", *TRANSPOSED, BEHIND_VALUES)
CODED = ("fluxfast::coded_attention", "fluxfast::coded_attention_quantize")
"""Attentions without exponentials; the second quantises its own output."""
GROUPED = (
    "fluxfast::grouped_linear",
    "fluxfast::grouped_gelu_linear_quantize",
    "fluxfast::grouped_residual_linear",
    VALUES[1],
)
"""GEMMs of both streams of a double block; all but the first have the epilogues that others have for one stream."""
GELU = ("fluxfast::gelu_linear_quantize", "fluxfast::gelu_linear_quantize_beside", GROUPED[1])
RESIDUAL = ("fluxfast::residual_linear", GROUPED[2])


def fused_block_facts(built: Built, tables: int, forwards: int) -> list[Fact]:
    """What ran during `forwards` forwards of the transformer in Python, whose modulation is computed `tables` times.

    Compiled code is counted by the operators in its graphs and the graphs' calls.
    """
    level, compiler = built.level, built.compiler
    double, single = (len(blocks) for blocks in block_lists(built.pipeline.transformer))
    norm = "grouped_layernorm_modulate_quantize"
    kernels = {f"fluxfast::{name}" for name in (*QUANTIZING, *QUANTIZING_SINGLE, norm)}
    # What a double block does with each stream: with both at once it does it once.
    streams = 1 if level.grouped_gemms else 2
    # A GEMM with GELU in its epilogue takes the place of one of cuBLASLt's and of a kernel of Triton's.
    activated = _all_if(level.gelu_epilogue, streams * double + single)
    merged = level.merged_projections and not level.gelu_epilogue
    attended = forwards * (double + single)
    added = _all_if(level.residual_epilogue, 2 * streams * double + single)
    grouped = _all_if(level.grouped_gemms, double)
    gemms = 4 * streams * double + (2 if merged else 3) * single - activated - added - grouped
    gemms -= _all_if(level.value_epilogue, single)
    launches = forwards * (double * streams * len(QUANTIZING) + single * len(QUANTIZING_SINGLE) - activated)
    # In the middle of a double block anyway; with the field at the beginning of every block too.
    sums = _all_if(not level.residual_epilogue, 2 * double + _all_if(level.fused_residuals, 2 * double + single))
    facts = [
        # Before the other fields', whose counts it changes; so are the next three.
        Fact("value_epilogue", "GEMMs of QKV that write V transposed",
             compiler.calls_of(*VALUES), _all_if(level.value_epilogue, attended)),
        Fact("grouped_gemms", "GEMMs of both streams of a double block",
             compiler.calls_of(*GROUPED), forwards * 4 * grouped),
        Fact("gelu_epilogue", "GEMMs with GELU and its quantisation in their epilogue",
             compiler.calls_of(*GELU), forwards * activated),
        Fact("residual_epilogue", "GEMMs with a gated residual in their epilogue",
             compiler.calls_of(*RESIDUAL), forwards * added),
        Fact("float16_residuals", "GEMMs with a gated residual that is float16",
             compiler.calls_of(*RESIDUAL, dtype=torch.float16), forwards * _all_if(level.float16_residuals, added)),
        Fact("fused_quantize", "launches of Triton's quantising kernels",
             compiler.calls_of(*kernels), _all_if(level.fused_quantize, launches)),
        Fact("precomputed_modulation", "modulation tables computed",
             built.modulation.fills if built.modulation else 0, _all_if(level.precomputed_modulation, tables)),
    ]  # fmt: skip
    facts += [
        Fact("fused_qk_rope", "launches of Triton's QK norm and RoPE kernel",
             compiler.calls_of("fluxfast::qk_norm_rope_quantize", *HADAMARD),
             _all_if(level.fused_qk_rope, attended)),
        Fact("hadamard_qk", "launches of Triton's QK norm and RoPE kernel with a Hadamard transform",
             compiler.calls_of(*HADAMARD), _all_if(level.hadamard_qk, attended)),
        Fact("coded_softmax", "launches of Triton's kernel that transposes V",
             compiler.calls_of(*TRANSPOSED), _all_if(level.coded_softmax and not level.value_epilogue, attended)),
        # Once for the one resolution of all calls.
        Fact("fused_qk_rope", "RoPE tables computed",
             built.rotary.fills if built.rotary else 0, _all_if(level.fused_qk_rope, 1)),
        Fact("merged_projections", "single blocks with QKV and MLP in one GEMM",
             sum(getattr(block, "proj_mlp", block) is None for block in blocks_of(built.pipeline.transformer)),
             _all_if(merged, single)),
        Fact("merged_projections", "float8 GEMMs called by the fused blocks",
             compiler.calls_of("_scaled_mm"), _all_if(level.has_fused_blocks, forwards * gemms)),
        Fact("fused_residuals", "launches of Triton's gated residual and norm kernel",
             compiler.calls_of("fluxfast::residual_layernorm_modulate_quantize"),
             _all_if(level.fused_quantize, forwards * sums)),
        Fact("fused_residuals", "launches of Triton's kernel that quantises rows alone",
             compiler.calls_of("fluxfast::quantize_rows"),
             _all_if(level.fused_residuals and not level.attention_epilogue, forwards * double)),
    ]  # fmt: skip
    if level.has_fused_blocks and built.scope == "blocks":
        # All other Linears of these blocks are float8 GEMMs of another name; the VAE's attention has no such GEMM.
        adaln = forwards * (2 * double + single)
        facts.append(
            Fact("precomputed_modulation", "AdaLN Linears called by the blocks",
                 compiler.calls_of("linear", beside=("_scaled_mm", GROUPED[0], *VALUES)),
                 _all_if(not level.precomputed_modulation, adaln))
        )  # fmt: skip
    return facts


def text_encoder_facts(built: Built, forwards: Mapping[str, int]) -> list[Fact]:
    """What ran of the text encoders' compiled layers."""
    compiler, on = built.text_compiler, built.level.fast_encode
    calls = sum(
        forwards[name] * len(text_encoder_layers(getattr(built.pipeline, name)))
        for name in ("text_encoder", "text_encoder_2")
    )
    fused = _all_if(built.level.fused_t5, forwards["text_encoder_2"] * built.pipeline.text_encoder_2.config.num_layers)
    return [
        # CLIP's layer, T5's first, which makes the position bias, and T5's others.
        Fact("fast_encode", "compiled graphs of text encoder layers",
             len(compiler.graphs) if compiler else 0, _all_if(on, 3)),
        Fact("fast_encode", "calls of compiled text encoder layers",
             compiler.calls if compiler else 0, _all_if(on, calls)),
        Fact("fast_encode", "position biases in an order that a fused attention takes",
             position_biases_in_order(built.pipeline.text_encoder_2), _all_if(on, 1)),
        Fact("fused_t5", "GEMMs with T5's gated GELU in their epilogue",
             compiler.calls_of("fluxfast::gated_gelu_linear") if compiler else 0, fused),
        Fact("fused_t5", "GEMMs that add to T5's stream in their epilogue",
             compiler.calls_of("fluxfast::residual_dense_linear") if compiler else 0, 2 * fused),
    ]  # fmt: skip


def _with(options: dict[str, Any], configs: Iterable[dict[str, Any]]) -> int:
    return sum(all(config.get(name) == value for name, value in options.items()) for config in configs)


def run_facts(built: Built, calls: int, steps: int) -> list[Fact]:
    """What `calls` pipeline calls of `steps` steps each did, since the pipeline was built.

    Under a CUDA graph Python runs at capture only, so what runs inside the graph is counted against the forwards that
    ran in Python, and the graph's replays against the steps.
    """
    level = built.level
    compiled = level.compile_mode != "none"
    packaged = compiled and level.packaging == "aoti"
    blocks = len(blocks_of(built.pipeline.transformer))
    regions = blocks if built.scope == "blocks" else 1
    forwards = built.forwards(calls, steps)
    region_calls = forwards["transformer"] * regions + forwards["decoder"]
    classes = (2 if built.scope == "blocks" else 1) + 1
    expected_graphs = _all_if(compiled and not packaged, classes)
    # Both ways of compiling leave the options that Inductor really had; a package's are in its manifest.
    configs = [*(graph.config for graph in built.compiler.graphs), *(package.options for package in built.packages)]
    attended = forwards["transformer"] * blocks
    # Our own attention takes the place of FA3's op, tail included.
    by_fa3 = _all_if(not level.coded_softmax, attended)
    facts = [
        # Before compile_mode's: regions that were not packaged are compiled just in time, and packaging is at fault.
        Fact("packaging", "AOTInductor packages loaded", len(built.packages), _all_if(packaged, classes)),
        Fact("packaging", "calls of packages",
             sum(package.calls for package in built.packages), _all_if(packaged, region_calls)),
        Fact("compile_mode", "compiled graphs, recompilations included", len(built.compiler.graphs), expected_graphs),
        Fact("compile_mode", "graphs or packages with max_autotune",
             sum(config.get("max_autotune") is True for config in configs), _all_if(compiled, classes)),
        Fact("compile_mode", "graph breaks", sum(torch._dynamo.utils.counters["graph_break"].values()), 0),
        Fact("compile_mode", "calls of compiled regions",
             built.compiler.calls, _all_if(compiled and not packaged, region_calls)),
        Fact("inductor_flags", "graphs or packages compiled with flux-fast's flags",
             _with(INDUCTOR_FLAGS, configs), _all_if(compiled and level.inductor_flags, classes)),
        Fact("gemm_search", "graphs or packages compiled with a search of Triton's GEMMs",
             _with(TRITON_GEMMS, configs), _all_if(compiled and level.gemm_search, classes)),
        Fact("coordinate_descent", "graphs or packages compiled with coordinate descent",
             _with(COORDINATE_DESCENT, configs), _all_if(compiled and level.coordinate_descent, classes)),
        # Before attention's: where FA3's op runs instead, that it should not have is what follows.
        Fact("coded_softmax", "attentions without exponentials",
             built.compiler.calls_of(*CODED), _all_if(level.coded_softmax, attended)),
        Fact("attention_epilogue", "attentions that quantise their own output",
             built.compiler.calls_of(CODED[1]), _all_if(level.attention_epilogue, attended)),
        Fact("attention", "launches of the FA3 op",
             built.fa3.launches, _all_if(level.attention != "sdpa", by_fa3)),
        Fact("split_attention_tail", "calls of the FA3 op that looks for a tail",
             built.fa3.looked, _all_if(level.split_attention_tail, by_fa3)),
    ]  # fmt: skip
    if level.split_attention_tail:
        splits = _all_if(built.has_tail, by_fa3)
        facts.append(Fact("split_attention_tail", "tails with a launch of their own", built.fa3.split, splits))
    through = getattr(built.pipeline, "loops", 0)
    facts.append(
        Fact("whole_loop_graph", "calls whose denoising loop is one function",
             through, _all_if(level.whole_loop_graph, calls))
    )  # fmt: skip
    encoded = getattr(built.pipeline, "encoded", 0)
    facts.append(
        Fact("no_host_waits", "calls whose prompt is encoded without waiting",
             encoded, _all_if(level.no_host_waits, calls))
    )  # fmt: skip
    if built.waits is not None:
        facts.append(
            Fact("no_host_waits", "waits of the host in one call, that for the image included", built.waits, 1)
        )
    parts = _all_if(level.concurrent_encode, 2 if built.modulation else 1)
    facts.append(
        Fact("concurrent_encode", "pieces of work launched beside T5",
             getattr(built.pipeline, "beside", 0), calls * parts)
    )  # fmt: skip
    if level.concurrent_encode and built.overlaps is not None:
        facts.append(Fact("concurrent_encode", "calls whose T5 kept nothing from running", int(built.overlaps), 1))
    # In a graph the table is computed in every replay, and in Python at capture.
    where = "modulation" if level.concurrent_encode else "loop" if level.whole_loop_graph else None
    facts += fused_block_facts(built, forwards[where] if where else calls, forwards["transformer"])
    facts += text_encoder_facts(built, forwards)
    fused_norms = forwards["decoder"] * len(norms(built.pipeline.vae.decoder))
    facts.append(
        Fact("fast_decode", "calls of Triton's GroupNorm",
             built.compiler.calls_of("fluxfast::group_norm_silu"), _all_if(level.fast_decode, fused_norms))
    )  # fmt: skip
    nearest = _all_if(compiled and not packaged and not level.subpixel_upsampling, forwards["decoder"])
    facts.append(
        Fact("subpixel_upsampling", "nearest-neighbour upsamplings in compiled code",
             built.compiler.calls_of("interpolate"), nearest * len(upsamplings(built.pipeline.vae.decoder)))
    )  # fmt: skip
    if built.device == "cuda":
        stepwise = compiled and not level.whole_loop_graph
        for field, name, expected in (
            ("compile_mode", "transformer", _all_if(stepwise, calls * steps)),
            ("compile_mode", "decoder", _all_if(compiled, calls)),
            ("whole_loop_graph", "loop", _all_if(compiled and level.whole_loop_graph, calls)),
            ("fast_encode", "text_encoder", _all_if(level.fast_encode, calls)),
            ("fast_encode", "text_encoder_2", _all_if(level.fast_encode, calls)),
            (
                "concurrent_encode",
                "modulation",
                _all_if(level.concurrent_encode and built.modulation is not None, calls),
            ),
        ):
            replays = built.graphed[name].replays if name in built.graphed else 0
            facts.append(Fact(field, f"CUDA graph replays of the {name}", replays, expected))
    return facts

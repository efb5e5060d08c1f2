"""The rungs beside the ladder, built for real on a tiny model, and each sabotaged.

What is counted is in the graphs that Dynamo hands to the compiler, so Inductor itself is left out: a level takes two
seconds instead of thirty.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from fake_hopper import CPU, HOPPER, pretend_to_be, triton_on_a_cpu
from micro_flux import BLOCKS, STEPS, micro_pipeline
from torch import nn
from torch.utils import _pytree as pytree

from fluxfast import build as building
from fluxfast import proof
from fluxfast.build import Built, build, generate
from fluxfast.compilation import lay_out_position_bias, position_biases_in_order
from fluxfast.cudagraph import WARMUP_CALLS, signature
from fluxfast.errors import LevelUnavailable, StepNotApplied
from fluxfast.kernels.blocks import GroupedFluxTransformerBlock
from fluxfast.levels import BEYOND, get_level
from fluxfast.machine import why_not
from fluxfast.workloads import Workload
from perf_tests.harness.schema import Proof

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts of a CPU; a GPU is held by perf_tests")

IDS = [level.id for level in BEYOND]
ON_CPU = [level.id for level in BEYOND if why_not(level, CPU) is None]


@pytest.fixture(autouse=True)
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled regions run the graph that Dynamo made, in eager mode."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, example_inputs: graph)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it is a Hopper and computes on the CPU, Triton's operations as their references do."""
    pretend_to_be(HOPPER, monkeypatch)
    triton_on_a_cpu(monkeypatch)


@pytest.fixture(autouse=True)
def small_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm, convolutions and a Linear for the VAE's decoder, whose tracing would take most of the time."""
    load = building.load

    def load_small(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        pipeline.vae.decoder = SmallDecoder().to(pipeline.dtype)
        return pipeline

    monkeypatch.setattr(building, "load", load_small)


class SmallDecoder(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(16, 3, 3, padding=1)
        self.conv_norm_out, self.conv_act = nn.GroupNorm(4, 16), nn.SiLU()
        self.attention = nn.Linear(3, 3)
        self.upsample = Upsample2D(3, use_conv=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(self.conv_act(self.conv_norm_out(x)))
        x = self.upsample(self.attention(x.movedim(1, -1)).movedim(-1, 1))
        return x.repeat_interleave(4, -1).repeat_interleave(4, -2)


def run_and_prove(built: Built, workload: Workload, calls: int = 2) -> dict[str, int]:
    """Two images, then the proof: what was counted, by its description."""
    for _ in range(calls):
        assert generate(built, workload).images[0].size == (workload.width, workload.height)
    return {fact.what: fact.observed for fact in built.prove(calls=calls, num_steps=STEPS)}


@pytest.mark.parametrize("id", IDS)
def test_rung_builds_generates_and_proves_on_a_hopper(micro: Workload, hopper: None, id: str) -> None:
    """Every rung draws on a Hopper with nothing taken out, in as many graphs as before."""
    built = build(micro, get_level(id))
    facts = run_and_prove(built, micro)
    assert built.unavailable == {}
    assert facts["compiled graphs, recompilations included"] == 3
    ours, attended = get_level(id).coded_softmax, 2 * STEPS * BLOCKS
    assert facts["launches of the FA3 op"] == (0 if ours else attended)
    assert facts["attentions without exponentials"] == (attended if ours else 0)


@pytest.mark.parametrize("id", IDS)
def test_rung_left_out_is_noticed(micro: Workload, hopper: None, id: str) -> None:
    """A rung without the field that it adds never passes as itself: the error names both."""
    field = get_level(id).own_field
    with pytest.raises(StepNotApplied, match=rf"level '{id}' \({field}="):
        run_and_prove(build(micro, get_level(id), unapplied=field), micro, calls=1)


@pytest.mark.parametrize("id", sorted(set(IDS) - set(ON_CPU)))
def test_rung_that_a_cpu_cannot_be_is_refused_there(micro: Workload, id: str) -> None:
    """PyTorch's own operations are never passed off as the kernels'."""
    with pytest.raises(LevelUnavailable, match=f"'{id}' cannot run on this machine: {id}: "):
        build(micro, get_level(id))


def test_last_rung_on_a_cpu(micro: Workload) -> None:
    """What a CPU can honestly do of all rungs is proven there too, and the rest is named."""
    ids = "float8_rowwise precomputed_modulation merged_projections fast_encode subpixel_upsampling"
    assert " ".join(ON_CPU) == ids
    built = build(micro, get_level(ON_CPU[-1]))
    facts = run_and_prove(built, micro)
    without = "attention fused_quantize fused_qk_rope whole_loop_graph fast_decode no_gemm_workspace"
    assert {*built.unavailable} == {*without.split(), "split_attention_tail", "no_host_waits"}
    assert facts["modulation tables computed"] == 2 and facts["AdaLN Linears called by the blocks"] == 0
    assert facts["float8 GEMMs called by the fused blocks"] == 2 * STEPS * (8 + 2)
    assert facts["upsamplings as one 2x2 convolution"] == 1
    assert facts["nearest-neighbour upsamplings in compiled code"] == 0


@pytest.mark.parametrize(("scope", "graphs"), [("blocks", 3), ("full", 2)])
def test_residuals_go_from_block_to_block(
    micro: Workload, hopper: None, tmp_path: Path, scope: str, graphs: int
) -> None:
    """With several blocks of either kind nothing is compiled twice, and no norm is left without a sum in front."""
    micro_pipeline(num_layers=2, num_single_layers=3).save_pretrained(tmp_path)
    workload = dataclasses.replace(micro, checkpoint=str(tmp_path), compile_scope=scope)
    built = build(workload, get_level("fused_residuals"))
    facts = run_and_prove(built, workload)
    assert facts["compiled graphs, recompilations included"] == graphs
    assert facts["launches of Triton's gated residual and norm kernel"] == 2 * STEPS * (4 * 2 + 3)
    assert facts["launches of Triton's kernel that quantises rows alone"] == 2 * STEPS * 2
    assert built.compiler.calls_of("fluxfast::layernorm_modulate_quantize") == 0


@pytest.mark.parametrize("id", ["grouped_gemms", "float16_residuals"])
@pytest.mark.parametrize(("scope", "graphs"), [("blocks", 3), ("full", 2)])
def test_joint_stream_goes_from_block_to_block(
    micro: Workload, hopper: None, tmp_path: Path, scope: str, graphs: int, id: str
) -> None:
    """Double blocks hand on the joint stream that single ones take, and each kind is compiled once."""
    micro_pipeline(num_layers=2, num_single_layers=3).save_pretrained(tmp_path)
    workload = dataclasses.replace(micro, checkpoint=str(tmp_path), compile_scope=scope)
    facts = run_and_prove(build(workload, get_level(id)), workload)
    assert facts["compiled graphs, recompilations included"] == graphs
    assert facts["GEMMs of both streams of a double block"] == 2 * STEPS * 4 * 2
    assert facts["float8 GEMMs called by the fused blocks"] == 2 * STEPS * 3


@pytest.mark.parametrize("id", ["grouped_gemms", "value_epilogue"])
def test_modulation_of_grouped_blocks_is_counted(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch, id: str
) -> None:
    """A double block without a GEMM of cuBLASLt's that computes its own modulation beside the table is noticed."""

    def computed(block: GroupedFluxTransformerBlock, temb: torch.Tensor, kwargs: object) -> torch.Tensor:
        return block.compute_modulation(block.modulation[:, : block.norm_q.weight.shape[0] * 2]) + block.modulation

    monkeypatch.setattr(GroupedFluxTransformerBlock, "_modulation", computed)
    with pytest.raises(StepNotApplied, match=rf"{2 * STEPS * 2} AdaLN Linears called by the blocks, expected 0"):
        run_and_prove(build(micro, get_level(id)), micro)


@pytest.mark.parametrize("field", ["coded_softmax", "gelu_epilogue", "residual_epilogue"])
def test_last_rung_without_what_it_stands_on_is_refused(micro: Workload, hopper: None, field: str) -> None:
    """What quantises or multiplies both streams in an epilogue has none: the sentence says what to ask for."""
    with pytest.raises(ValueError, match=r"is for v transposed|ask for both|beside both"):
        build(micro, get_level("grouped_gemms"), unapplied=field)


def test_blocks_of_t5_are_counted(micro: Workload, hopper: None) -> None:
    """One projection a block, one gate and two sums a block and forward, in as many graphs as before."""
    facts = run_and_prove(build(micro, get_level("fused_t5")), micro)
    assert facts["T5 blocks whose q, k and v are one Linear"] == 2
    assert facts["Linears of T5's gated GELU apart from each other"] == 0
    assert facts["GEMMs with T5's gated GELU in their epilogue"] == 2 * 2
    assert facts["GEMMs that add to T5's stream in their epilogue"] == 2 * 2 * 2
    assert facts["compiled graphs of text encoder layers"] == 3


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gated_gelu_linear", "0 GEMMs with T5's gated GELU in their epilogue, expected 2"),
        ("residual_dense_linear", "0 GEMMs that add to T5's stream in their epilogue, expected 4"),
    ],
)
def test_blocks_of_t5_without_an_epilogue_are_noticed(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    """What PyTorch computes in the place of quack is the same and does not pass."""
    from fluxfast.kernels import dense, reference

    monkeypatch.setattr(dense, name, getattr(reference, name))
    with pytest.raises(StepNotApplied, match=what):
        run_and_prove(build(micro, get_level("fused_t5")), micro, calls=1)


def test_text_encoders_see_the_same_masks_in_a_capture(micro: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks whether a stream captures; that must not compile the layers again."""
    built = build(micro, get_level("fast_encode"))
    generate(built, micro)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    generate(built, micro)
    assert {fact.what: fact.observed for fact in built.prove(calls=2, num_steps=STEPS)}[
        "compiled graphs of text encoder layers"
    ] == 3


def test_row_wise_level_leaves_other_linears_alone(micro: Workload) -> None:
    """All eight and three block Linears are converted; AdaLN, embedders and the output projection are not."""
    facts = {fact.what: fact.observed for fact in build(micro, get_level("float8_rowwise")).facts}
    assert facts["block Linears with row-wise float8 weights"] == 11


def test_float8_everywhere_is_not_row_wise(micro: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale a tensor on every Linear, flux-fast's recipe, does not pass as the row-wise level."""
    from fluxfast import steps

    monkeypatch.setattr(steps, "float8_rowwise", steps.float8_tensorwise)
    with pytest.raises(StepNotApplied, match="0 block Linears with row-wise float8 weights, expected 11"):
        build(micro, get_level("float8_rowwise"))


def test_waits_are_counted_where_there_is_a_device(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call more, and only by a level that says that its host does not wait."""
    for id, calls in (("no_host_waits", 1), ("split_attention_tail", 0)):
        built, made = build(micro, get_level(id)), []
        assert built.watch(lambda made=made: made.append(1)) == 0 and not made
        monkeypatch.setattr(built, "device", "cuda")
        monkeypatch.setattr(building.ahead, "waits", lambda call: (call(), 3)[1])
        assert built.watch(lambda made=made: made.append(1)) == calls == len(made)
        waits = [fact for fact in proof.run_facts(built, 0, STEPS) if "waits of the host" in fact.what]
        assert [(fact.observed, fact.expected) for fact in waits] == [(3, 1)] * calls


def test_t5_is_held_up_in_the_call_that_is_watched(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in no other; what waited for it turns the level red."""
    built = build(micro, get_level("concurrent_encode"))
    facts = run_and_prove(built, micro)
    assert facts["pieces of work launched beside T5"] == 4 and facts["modulation tables computed"] == 2
    monkeypatch.setattr(built, "device", "cuda")
    monkeypatch.setattr(building.ahead, "waits", lambda call: (call(), 1)[1])
    for overlaps in (True, False):
        held = []
        monkeypatch.setattr(built.pipeline, "overlaps", lambda overlaps=overlaps: overlaps)
        assert built.watch(lambda held=held: held.append(built.pipeline._held_cycles)) == 1
        assert held == [building.ahead.HELD_CYCLES] and built.pipeline._held_cycles == 0
        told = [fact for fact in proof.run_facts(built, 0, STEPS) if "T5 kept nothing" in fact.what]
        assert [(fact.field, fact.holds) for fact in told] == [("concurrent_encode", overlaps)]
        assert [Proof(**dataclasses.asdict(fact)).observed for fact in told] == [overlaps]


class ReplayedOnACpu:
    """`GraphedCallable` without graphs: a capture runs the function as often, a replay gives what it gave."""

    def __init__(self, function: Callable[..., Any], stream: None = None) -> None:
        self.function, self.function_calls, self.replays = function, 0, 0
        self._captured: dict[object, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = signature(*pytree.tree_flatten((args, kwargs)))
        if key not in self._captured:
            self._captured[key] = [self.function(*args, **kwargs) for _ in range(WARMUP_CALLS + 1)][-1]
            self.function_calls += WARMUP_CALLS + 1
        self.replays += 1
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._captured[key])


@pytest.mark.parametrize("scope", ["blocks", "full"])
@pytest.mark.parametrize(
    "field",
    [None, "concurrent_encode", "no_host_waits", "fast_encode", "whole_loop_graph", "precomputed_modulation"],
)
def test_what_is_left_out_among_graphs_is_named(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch, field: str | None, scope: str
) -> None:
    """Under graphs Python runs at capture only, and a field that others stand on changes their counts as well."""
    load = building.load
    pretend_to_be(dataclasses.replace(HOPPER, device="cuda"), monkeypatch)
    monkeypatch.setattr(building, "load", lambda name, dtype, device, kind: load(name, dtype, "cpu", kind=kind))
    monkeypatch.setattr(building, "GraphedCallable", ReplayedOnACpu)
    workload = dataclasses.replace(micro, compile_scope=scope)
    built = build(workload, get_level("fused_t5"), unapplied=field)
    for _ in range(4):
        generate(built, workload)
    failed = [fact.field for fact in (*built.facts, *proof.run_facts(built, 4, STEPS)) if not fact.holds]
    assert failed[:1] == [field] * (field is not None)


def test_synchronisations_are_counted_and_the_mode_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tells of them in warnings, beside which others may stand, and a call may fail."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        for said in ("called a synchronizing CUDA operation (Triggered internally)", "a prototype feature"):
            for _ in range(2):
                warnings.warn(said, stacklevel=1)

    assert building.ahead.waits(call) == 2 and modes == ["default", "warn", "default"]
    with pytest.raises(ZeroDivisionError):
        building.ahead.waits(lambda: 1 // 0)
    assert modes[-1] == "default"


def test_position_bias_that_was_left_alone_is_no_count(micro: Workload) -> None:
    """However transformers lays it out: one that happens to be in order turns no level below red."""
    encoder = micro_pipeline().text_encoder_2
    maker = encoder.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        before = maker.compute_bias(8, 8)
        assert before.stride(-1) != 1 and position_biases_in_order(encoder) == 0
        lay_out_position_bias(encoder)
        assert position_biases_in_order(encoder) == 1 and torch.equal(maker.compute_bias(8, 8), before)
        maker.compute_bias = lambda *lengths: before
        assert position_biases_in_order(encoder) == 0

"""Every level built for real on a tiny model, and every field sabotaged: a step that did nothing has to be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from fake_hopper import CPU, HOPPER, pretend_to_be
from micro_flux import BLOCKS, STEPS
from torch import nn
from torch._inductor import compile_fx

from fluxfast import build as building
from fluxfast import steps
from fluxfast.attention import reference_fp8_attention
from fluxfast.build import Built, build, generate
from fluxfast.errors import LevelUnavailable, StepNotApplied
from fluxfast.levels import BF16, COMPILE, FA3_FP8, FLOAT8, FUSED_QKV, LADDER, Level, get_level
from fluxfast.machine import why_not
from fluxfast.workloads import Workload

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts of a CPU; a GPU is held by perf_tests")

# The package of `aoti` is built once, in a test of its own.
ON_CPU = [level.id for level in LADDER if why_not(level, CPU) is None and level.packaging == "jit"]
SABOTAGED = [(level.id, level.own_field) for level in LADDER if level.own_field and why_not(level, CPU) is None]


@pytest.fixture(scope="module", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Inductor cache for the whole run, xdist's workers included; unoptimised C++, since counts need no speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp().parent / "inductor"))
        patch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")
        yield


@pytest.fixture(autouse=True)
def untouched_process() -> Iterator[None]:
    """Each test starts without compiled code and must leave Inductor's process-global configuration as it was."""
    from torch._inductor import config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = config.get_config_copy()
    yield
    # torch 2.13 itself notes there what the last AOTInductor package was built on; it steers no compilation.
    noted = {"aot_inductor.metadata"}
    after = config.get_config_copy()
    assert {name for name in before if before[name] != after[name]} <= noted


def run_and_prove(built: Built, workload: Workload) -> dict[str, int]:
    """One image of the workload's size, then the proof: what was counted, by its description."""
    image = generate(built, workload).images[0]
    assert image.size == (workload.width, workload.height)
    return {fact.what: fact.observed for fact in built.prove(calls=1, num_steps=STEPS)}


@pytest.fixture
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled regions run the graphs that Dynamo made, in eager mode, as in `test_beyond`."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, example_inputs: graph)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it is a Hopper with FA3 and computes on the CPU."""
    pretend_to_be(HOPPER, monkeypatch)


@pytest.mark.parametrize("id", ON_CPU)
def test_level_builds_generates_and_proves(micro: Workload, request: pytest.FixtureRequest, id: str) -> None:
    """Every level that a CPU runs draws an image and shows each of its fields.

    Inductor compiles for two of them here, and for every one in the main job.
    """
    if id not in ("compile", "float8"):
        request.getfixturevalue("dynamo_alone")
    level = get_level(id)
    built = build(micro, level)
    facts = run_and_prove(built, micro)
    assert facts["compiled graphs, recompilations included"] == (3 if level.compile_mode != "none" else 0)
    assert set(built.unavailable) == ({"attention"} if level.attention != "sdpa" else set())


def test_aoti_level_builds_generates_and_proves(micro: Workload, tmp_path) -> None:
    """The last level runs from three packages, and nothing is compiled just in time; its minutes are told apart."""
    said: list[tuple[str, str]] = []
    built = build(micro, get_level("aoti"), cache_dir=tmp_path, on_stage=lambda *stage: said.append(stage))
    assert said[:3] == [("load", ""), ("apply", ""), ("apply", "examples of arguments")]
    assert [detail for stage, detail in said if "package" in detail and stage == "apply"] == [
        f"package {name}{told}"
        for name, count in (("double", BLOCKS // 2), ("single", BLOCKS // 2), ("decoder", 1))
        for told in ("", f", compiled, {count} times")
    ]
    facts = run_and_prove(built, micro)
    assert facts["AOTInductor packages loaded"] == 3
    assert facts["calls of packages"] == STEPS * BLOCKS + 1
    assert facts["compiled graphs, recompilations included"] == 0


@pytest.mark.parametrize(("id", "field"), SABOTAGED)
def test_field_left_out_is_noticed(micro: Workload, tmp_path, id: str, field: str) -> None:
    """A level without the field that it adds never passes as itself: the error names both."""
    with pytest.raises(StepNotApplied, match=rf"level '{id}' \({field}="):
        run_and_prove(build(micro, get_level(id), cache_dir=tmp_path, unapplied=field), micro)


def test_fa3_builds_generates_and_proves(micro: Workload, hopper: None, dynamo_alone: None) -> None:
    """On a Hopper every block of every step launches FA3, and the processor compiles without a break."""
    facts = run_and_prove(build(micro, FA3_FP8), micro)
    assert facts["launches of the FA3 op"] == STEPS * BLOCKS


def test_fa3_left_out_is_noticed(micro: Workload, hopper: None) -> None:
    """A Hopper whose blocks kept the stock processors never passes as fa3_fp8."""
    with pytest.raises(StepNotApplied, match=r"level 'fa3_fp8' \(attention='fa3_fp8'\): 0 FA3 .* expected 2"):
        build(micro, FA3_FP8, unapplied="attention")


def test_fa3_that_never_launches_is_noticed(micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors in place whose op does not run are a stock attention with another name."""
    eager = dataclasses.replace(FA3_FP8, compile_mode="none")
    monkeypatch.setattr(steps, "fa3_fp8", reference_fp8_attention)
    with pytest.raises(StepNotApplied, match=r"0 launches of the FA3 op, expected 4"):
        run_and_prove(build(micro, eager), micro)


def test_cast_on_the_wrong_side_of_fa3_is_noticed(
    micro: Workload, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flux_fast differs from its parent in nothing else, so its processors have to tell."""
    outside = steps.fa3_attention
    monkeypatch.setattr(steps, "fa3_attention", lambda pipeline, *_, **__: outside(pipeline, cast_outside=True))
    with pytest.raises(StepNotApplied, match=r"'flux_fast' .*: 0 casts to e4m3 within the FA3 op, expected 2"):
        build(micro, get_level("flux_fast"))


def test_fa3_without_hopper_is_refused(micro: Workload) -> None:
    """A machine without FA3 does not fall back silently at the level that adds it."""
    with pytest.raises(LevelUnavailable, match=r"'fa3_fp8' cannot run on this machine: .* capability 9.0"):
        build(micro, FA3_FP8)


@pytest.mark.parametrize("library", [FluxTransformer2DModel, AutoencoderKL])
def test_fusion_that_silently_does_nothing_is_noticed(
    micro: Workload, monkeypatch: pytest.MonkeyPatch, library: type
) -> None:
    """A diffusers whose fuse_qkv_projections became a no-op, for one model only, is noticed by its count."""
    monkeypatch.setattr(library, "fuse_qkv_projections", lambda self: None)
    with pytest.raises(StepNotApplied, match=r"level 'fused_qkv' .* attention modules with fused projections"):
        build(micro, FUSED_QKV)


def test_layout_that_silently_does_nothing_is_noticed(micro: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that ignores memory_format is noticed by its weights' strides."""
    monkeypatch.setattr(steps, "channels_last", lambda pipeline: None)
    with pytest.raises(StepNotApplied, match="0 VAE convolutions in channels_last"):
        build(micro, get_level("channels_last"))


def test_linear_that_float8_skips_is_noticed(micro: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao leaves a Linear of 24 features as it is and says nothing; the count says it."""
    load = building.load

    def load_odd(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        pipeline.transformer.odd = nn.Linear(24, 16, dtype=torch.bfloat16)
        return pipeline

    monkeypatch.setattr(building, "load", load_odd)
    with pytest.raises(StepNotApplied, match=r"\(quantization='float8_tensorwise'\): 1 Linears skipped"):
        build(micro, FLOAT8)


@pytest.mark.parametrize("id", ["float8", "float8_rowwise"])
def test_float8_weights_without_float8_products_are_noticed(
    micro: Workload, monkeypatch: pytest.MonkeyPatch, id: str
) -> None:
    """Weight-only float8 saves memory and no time: its products are bfloat16's, so it never passes as float8."""
    quantize = steps._float8_tensor

    def weight_only(*args):
        tensor = quantize(*args)
        tensor.act_quant_kwargs = None
        return tensor

    monkeypatch.setattr(steps, "_float8_tensor", weight_only)
    with pytest.raises(StepNotApplied, match=rf"level '{id}' \(quantization=.*: 0 .* float8 weights, expected [1-9]"):
        build(micro, get_level(id))


def test_step_that_leaks_into_another_level_is_noticed(micro: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is on although the level has it off is as wrong as one that is missing."""
    monkeypatch.setattr(building, "load", channels_last_of(building.load))
    with pytest.raises(StepNotApplied, match=r"level 'bf16' \(memory_format='contiguous'\): .* expected 0"):
        build(micro, BF16)


def channels_last_of(load):
    def loaded(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        steps.channels_last(pipeline)
        return pipeline

    return loaded


def test_second_build_is_free_of_the_first(micro: Workload) -> None:
    """Building the richest level leaves no trace in a lower one that follows in the same process."""
    build(micro, get_level("inductor_flags"))
    assert set(run_and_prove(build(micro, BF16), micro).items()) >= {("Linears with float8 weights", 0)}


def test_full_scope_is_one_graph(micro: Workload, dynamo_alone: None) -> None:
    """The whole transformer compiles as one graph beside the decoder's, and runs once a step."""
    workload = dataclasses.replace(micro, compile_scope="full")
    facts = run_and_prove(build(workload, COMPILE), workload)
    assert facts["compiled graphs, recompilations included"] == 2
    assert facts["calls of compiled regions"] == STEPS + 1


def test_recompilation_is_noticed(micro: Workload, dynamo_alone: None) -> None:
    """A run that compiled its regions a second time is refused: its timing holds compilations."""
    built = build(micro, COMPILE)
    generate(built, micro)
    torch._dynamo.reset()
    generate(built, micro)
    with pytest.raises(StepNotApplied, match=r"level 'compile' .*: 6 compiled graphs"):
        built.prove(calls=2, num_steps=STEPS)


def test_levels_below_float8_draw_nearly_the_same_image(micro: Workload) -> None:
    """Fusing and layout change no more than rounding does."""
    plain, fused = (generate(build(micro, level), micro, output_type="pt").images for level in eager_pair())
    assert (plain - fused).abs().max() < 0.05


def eager_pair() -> tuple[Level, Level]:
    return BF16, dataclasses.replace(get_level("channels_last"), compile_mode="none")

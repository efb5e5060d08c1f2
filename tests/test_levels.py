"""The ladder and the workloads as data, and what a machine can run of them."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from fluxfast.levels import BEYOND, DEFAULTS, FIELDS, FLUX_FAST, FP32, LADDER, LEVELS, Level, get_level
from fluxfast.machine import FA3_MODULES, NEEDS_QUACK, TRITON_FIELDS, Machine, effective, unavailable, why_not
from fluxfast.workloads import TINY, WORKLOADS, Workload, get_workload

CPU = Machine(device="cpu", capability=None, fa3_module=None, triton=True)
ADA_WITH_FA3 = Machine(device="cuda", capability=(8, 9), fa3_module="fa3_fwd_interface", triton=True)
AMPERE = Machine(device="cuda", capability=(8, 0), fa3_module=None, triton=True)
HOPPER = Machine(
    device="cuda", capability=(9, 0), cuda=(13, 0), fa3_module="flash_attn_interface", triton=True, quack=True
)
HOPPER_WITHOUT_FA3 = Machine(device="cuda", capability=(9, 0), fa3_module=None, triton=True)
OTHER_VALUE = {int: 7, float: 1.25, str: "other", type(None): "other"}


def test_ids_are_frozen() -> None:
    """Baselines, file names and test ids are made of these."""
    ids = "fp32 bf16 compile fused_qkv channels_last fa3_fp8 float8 inductor_flags aoti"
    assert " ".join(level.id for level in LADDER) == ids


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_level_differs_from_its_parent_in_one_field(level: Level) -> None:
    """A red level names the optimisation that broke."""
    parent = get_level(level.parent) if level.parent else level
    different = [name for name in FIELDS if getattr(level, name) != getattr(parent, name)]
    assert different == ([level.own_field] if level.parent else [])


def test_rungs_without_a_measurement_are_beside_the_ladder() -> None:
    """Their ids are frozen too; they form a chain of their own that branches off at fa3_fp8."""
    fused = "fused_quantize precomputed_modulation fused_qk_rope merged_projections"
    ids = f"float8_rowwise {fused} whole_loop_graph fast_encode fast_decode no_gemm_workspace"
    last = "split_attention_tail no_host_waits subpixel_upsampling fused_residuals hadamard_qk"
    assert (
        " ".join(level.id for level in BEYOND)
        == f"{ids} {last} gelu_epilogue residual_epilogue coded_softmax attention_epilogue grouped_gemms "
        "float16_residuals concurrent_encode value_epilogue fused_t5 gemm_search"
    )
    assert [level.parent for level in BEYOND] == ["fa3_fp8", *(level.id for level in BEYOND[:-1])]
    assert not set(BEYOND) & set(LADDER) and all(level.packaging == "jit" for level in BEYOND)


def test_ladder_is_a_chain() -> None:
    """Each rung stands on the one before, and the first on nothing."""
    assert [level.parent for level in LADDER] == [None, *(level.id for level in LADDER[:-1])]
    assert LADDER[0].fields() == DEFAULTS and FLUX_FAST not in LADDER


@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16", "packaging": "aoti"}, {"dtype": "float32"}])
def test_rung_of_not_exactly_one_change_is_refused(change: dict[str, str]) -> None:
    """None, two, and one that changes nothing."""
    with pytest.raises(ValueError, match="level 'next': a rung changes exactly one field of its parent 'fp32'"):
        FP32.then("next", **change)


def test_rung_of_an_unknown_field_is_refused() -> None:
    """A misspelt field is an error at import."""
    with pytest.raises((TypeError, AttributeError), match="dtpye"):
        FP32.then("next", dtpye="bfloat16")


@pytest.mark.parametrize(("get", "known"), [(get_level, LEVELS), (get_workload, WORKLOADS)])
def test_unknown_name_lists_the_known_ones(get, known) -> None:
    """The error is the help."""
    with pytest.raises(ValueError, match=rf"unknown \w+ 'fp23'; known \w+: {', '.join(known)}"):
        get("fp23")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Workload)])
def test_digest_changes_with_any_field(name: str) -> None:
    """Two results compare only if they are of exactly the same workload."""
    other = dataclasses.replace(TINY, **{name: OTHER_VALUE[type(getattr(TINY, name))]})
    assert other.digest != TINY.digest


def test_digest_is_of_the_values() -> None:
    """An equal workload made elsewhere has the same digest, and no two that ship have."""
    assert dataclasses.replace(TINY).digest == TINY.digest
    assert all(a.digest != b.digest for a, b in itertools.combinations(WORKLOADS.values(), 2))


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (CPU, {"attention": "fa3_fp8: needs compute capability 9.0 and one of .*; found cpu and neither module"}),
        (ADA_WITH_FA3, {"attention": "needs compute capability 9.0 .*; found 8.9 and fa3_fwd_interface"}),
        (HOPPER_WITHOUT_FA3, {"attention": f"one of {', '.join(FA3_MODULES)}; found 9.0 and neither module"}),
        (
            AMPERE,
            {
                "attention": "found 8.0 and neither module",
                "quantization": "float8_tensorwise: needs compute capability 8.9 .*; found 8.0",
            },
        ),
        (HOPPER, {}),
    ],
)
def test_unavailable_fields_say_what_is_missing(machine: Machine, words: dict[str, str]) -> None:
    """Each reason names what is needed and what was found; what is left runs here."""
    rest, reasons = effective(LADDER[-1], machine)
    assert reasons.keys() == words.keys() and unavailable(rest, machine) == {}
    assert all(re.search(words[field], reason) for field, reason in reasons.items())


@pytest.mark.parametrize("field", TRITON_FIELDS)
@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (CPU, "its Triton kernels need compute capability 9.0 and Triton; found cpu and Triton"),
        (ADA_WITH_FA3, "need compute capability 9.0 and Triton; found 8.9"),
        (dataclasses.replace(HOPPER, triton=False), "found 9.0 and no Triton"),
        (AMPERE, "is built on float8_rowwise: needs compute capability 8.9"),
    ],
)
def test_triton_rung_says_what_is_missing(machine: Machine, words: str, field: str) -> None:
    """Neither a machine without Hopper nor one without Triton times PyTorch's operations as the kernels'."""
    reason = why_not(get_level(field), machine)
    assert reason is not None and reason.startswith(f"{field}: ")
    # The decoder has nothing in float8.
    assert words in reason or (field == "fast_decode" and "found 8.0" in reason)


@pytest.mark.parametrize("field", NEEDS_QUACK)
@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (CPU, "found cpu, Triton and no quack"),
        (dataclasses.replace(HOPPER, quack=False), "found 9.0, Triton and no quack"),
        (dataclasses.replace(HOPPER, triton=False), "found 9.0, no Triton and quack"),
        (dataclasses.replace(HOPPER, capability=(10, 0)), "found 10.0, Triton and quack"),
    ],
)
def test_rung_of_quack_says_what_is_missing(machine: Machine, found: str, field: str) -> None:
    """A library that is not there is named, with the command that installs it."""
    reason = why_not(get_level(field), machine)
    assert reason is not None and reason.startswith(f"{field}: ") and reason.endswith(found)
    assert "pip install -e '.[gpu]'" in reason
    assert why_not(get_level(field), HOPPER) is None


@pytest.mark.parametrize(
    "field", ["fused_qk_rope", "hadamard_qk", "split_attention_tail", "coded_softmax", "attention_epilogue"]
)
def test_rung_of_float8_attention_says_that_there_is_none(field: str) -> None:
    """What is cast for FlashAttention-3, launches it or takes its place is nothing without it."""
    reason = why_not(get_level(field), dataclasses.replace(HOPPER_WITHOUT_FA3, quack=True))
    assert reason is not None and reason.startswith(f"{field}: ") and "fa3_fp8: needs compute capability 9.0" in reason


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (CPU, "found cpu and no CUDA"),
        (dataclasses.replace(ADA_WITH_FA3, cuda=(13, 0)), "found 8.9 and CUDA 13.0"),
        (dataclasses.replace(HOPPER, cuda=(12, 8)), "found 9.0 and CUDA 12.8"),
    ],
)
def test_workspace_is_dropped_only_where_cublaslt_multiplies(machine: Machine, found: str) -> None:
    """Where CUTLASS does, no GEMM was ever preceded by a memset, and the count of none would prove nothing."""
    reason = why_not(get_level("no_gemm_workspace"), machine)
    assert reason is not None and reason.startswith("no_gemm_workspace: ") and reason.endswith(found)
    assert why_not(get_level("no_gemm_workspace"), HOPPER) is None


def test_level_is_left_out_only_for_its_own_field() -> None:
    """A CPU skips fa3_fp8 and still measures the rungs above it, without that field."""
    assert [level.id for level in LADDER if why_not(level, CPU)] == ["fa3_fp8"]
    assert [level.id for level in LADDER if why_not(level, AMPERE)] == ["fa3_fp8", "float8"]
    assert not any(why_not(level, HOPPER) for level in LEVELS.values())


def test_effective_level_keeps_its_other_fields() -> None:
    """Only what cannot run is put back to its default."""
    rest, _ = effective(LADDER[-1], CPU)
    assert rest.fields() == LADDER[-1].fields() | {"attention": "sdpa"} and rest.id == "aoti"

"""A machine that says it is a Hopper and computes on the CPU, so that what a Hopper would run can be counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxfast import build as building
from fluxfast import steps, workspace
from fluxfast.attention import COUNT, reference_fp8_attention
from fluxfast.kernels import reference
from fluxfast.machine import Machine

CPU = Machine(device="cpu", capability=None, fa3_module=None, triton=True)
HOPPER = Machine(
    device="cpu", capability=(9, 0), cuda=(13, 0), fa3_module="flash_attn_interface", triton=True, quack=True
)


@torch.library.custom_op("fluxfast_tests::fp8_attention", mutates_args=())
def fp8_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The FA3 op's numerics and count where there is no Hopper."""
    COUNT.launches += 1
    return reference_fp8_attention(query, key, value).contiguous()


@torch.library.custom_op("fluxfast_tests::fp8_attention_split_tail", mutates_args=())
def fp8_attention_split_tail(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same for the op with a tail of its own."""
    COUNT.looked += 1
    COUNT.split += 1
    COUNT.launches += 1
    return reference_fp8_attention(query, key, value).contiguous()


@fp8_attention.register_fake
@fp8_attention_split_tail.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)


def pretend_to_be(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` asks for this machine and is told `machine`; FA3's ops compute on the CPU, and cuBLASLt is a list."""
    monkeypatch.setattr(building, "this_machine", lambda: machine)
    monkeypatch.setattr(steps, "fa3_fp8", fp8_attention)
    monkeypatch.setattr(steps, "fa3_fp8_split_tail", fp8_attention_split_tail)
    monkeypatch.setattr(building, "has_tail", lambda tokens, heads: True)
    memsets = ["of the schedule"]
    monkeypatch.setattr(workspace, "drop", memsets.clear)
    monkeypatch.setattr(workspace, "memsets_of_a_gemm", lambda: len(memsets))


def triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of Triton and quack compute as their references do; to Dynamo they stay what they are."""
    for name, operation in triton_operations().items():
        # What a custom operator calls where no kernel of the device's own is registered.
        monkeypatch.setitem(operation._backend_fns, None, getattr(reference, name))


def triton_operations() -> dict[str, Any]:
    """The operations that the fused blocks and the decoder use, by name."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
    pytest.importorskip("quack", reason="quack is not installed: pip install -e '.[dev]'")
    from fluxfast.kernels import activations, dense, flash, gemm, group_norm, norms, projections, qkv

    operations = (
        gemm.gelu_linear_quantize,
        gemm.gelu_linear_quantize_beside,
        gemm.residual_linear,
        gemm.grouped_linear,
        gemm.grouped_gelu_linear_quantize,
        gemm.grouped_residual_linear,
        dense.gated_gelu_linear,
        dense.residual_dense_linear,
        activations.gelu_quantize,
        activations.gelu_concat_quantize,
        activations.quantize_rows,
        norms.layernorm_modulate_quantize,
        norms.residual_layernorm_modulate_quantize,
        norms.grouped_layernorm_modulate_quantize,
        qkv.qk_norm_rope_quantize,
        qkv.qk_norm_rope_hadamard_quantize,
        qkv.qk_norm_rope_hadamard_quantize_transposed,
        qkv.qk_norm_rope_hadamard_quantize_mixed,
        qkv.qk_norm_rope_hadamard_quantize_without_values,
        projections.qkv_linear,
        projections.grouped_qkv_linear,
        flash.coded_attention,
        flash.coded_attention_quantize,
        group_norm.group_norm_silu,
    )
    return {operation._name: operation for operation in operations}

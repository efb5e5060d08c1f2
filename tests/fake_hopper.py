"""A machine that says it is a Hopper and computes on the CPU, so that what a Hopper would run can be counted."""

from __future__ import annotations

import pytest
import torch

from fluxfast import build as building
from fluxfast import steps
from fluxfast.attention import COUNT, reference_fp8_attention
from fluxfast.machine import Machine

CPU = Machine(device="cpu", capability=None, fa3_module=None)
HOPPER = Machine(device="cpu", capability=(9, 0), fa3_module="flash_attn_interface")


@torch.library.custom_op("fluxfast_tests::fp8_attention", mutates_args=())
def fp8_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The FA3 op's numerics and count where there is no Hopper."""
    COUNT.launches += 1
    return reference_fp8_attention(query, key, value).contiguous()


@fp8_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)


def pretend_to_be(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` asks for this machine and is told `machine`; FA3's op computes on the CPU."""
    monkeypatch.setattr(building, "this_machine", lambda: machine)
    monkeypatch.setattr(steps, "fa3_fp8", fp8_attention)

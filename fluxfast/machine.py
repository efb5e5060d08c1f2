"""What this machine can run. Availability is asked here, once, and never guessed by a step."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import torch

from fluxfast.levels import DEFAULTS, Level

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
"""FlashAttention-3's own build, and the forward-only wheel of PyPI's `fa3-fwd`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What availability depends on.

    Attributes:
        device: "cuda" or "cpu".
        capability: CUDA compute capability, None without a GPU.
        fa3_module: the first of `FA3_MODULES` that is installed, None if neither is.
    """

    device: str
    capability: tuple[int, int] | None
    fa3_module: str | None


@functools.cache
def this_machine() -> Machine:
    """The machine this process runs on; device 0 of CUDA where there is one."""
    fa3_module = next((name for name in FA3_MODULES if importlib.util.find_spec(name) is not None), None)
    if not torch.cuda.is_available():
        return Machine(device="cpu", capability=None, fa3_module=fa3_module)
    return Machine(device="cuda", capability=torch.cuda.get_device_capability(), fa3_module=fa3_module)


def unavailable(level: Level, machine: Machine) -> dict[str, str]:
    """Fields of `level` that `machine` cannot run, each with the reason."""
    reasons = {}
    if level.attention != "sdpa" and (machine.capability != (9, 0) or machine.fa3_module is None):
        found = f"{machine.capability[0]}.{machine.capability[1]}" if machine.capability else machine.device
        reasons["attention"] = (
            f"{level.attention}: needs compute capability 9.0 and one of {', '.join(FA3_MODULES)}; "
            f"found {found} and {machine.fa3_module or 'neither module'}"
        )
    if level.quantization != "none" and machine.capability is not None and machine.capability < (8, 9):
        reasons["quantization"] = (
            f"{level.quantization}: needs compute capability 8.9 or newer for float8 GEMMs; "
            f"found {machine.capability[0]}.{machine.capability[1]}"
        )
    return reasons


def effective(level: Level, machine: Machine) -> tuple[Level, dict[str, str]]:
    """`level` without the fields that `machine` cannot run, and why each was taken out."""
    reasons = unavailable(level, machine)
    return dataclasses.replace(level, **{field: DEFAULTS[field] for field in reasons}), reasons


def why_not(level: Level, machine: Machine) -> str | None:
    """Why `level` cannot be measured here, None if it can.

    A level is left out when the field that it adds is unavailable: it would repeat its parent.
    """
    own = level.own_field
    return unavailable(level, machine).get(own) if own else None

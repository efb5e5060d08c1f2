"""Fused float8 kernels for FLUX on Hopper, each beside its reference in plain PyTorch, and the blocks built from them.

Importing this package needs neither Triton nor a GPU; `ops.triton_ops()` needs Triton, and its kernels a GPU.
"""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["unavailable_reason"]


def unavailable_reason() -> str | None:
    """Why the fused kernels cannot run here, in one sentence; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with CUDA builds of PyTorch)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        return f"e4m3 row-wise GEMMs and FlashAttention-3 need compute capability 9.0, this GPU has {capability}"
    return None

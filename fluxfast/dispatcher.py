"""Kernels of ours in the place of PyTorch's own on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def override_on_cpu(operator: str, kernel: Callable[..., Any], *, with_keyset: bool = False) -> torch.library.Library:
    """Have `aten::operator` call `kernel` for CPU tensors.

    Args:
        with_keyset: hand the kernel the dispatch keys as its first argument, with which it can call the native one.

    Returns:
        What holds the replacement; it lives as long as this does.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        library.impl(operator, kernel, "CPU", with_keyset=with_keyset)
    return library

"""How many bytes a level holds. Used by the worker alone; imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, the parts of quantised tensors included."""
    return sum(_tensor_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(pipeline: Any, device: str, call: Callable[[], object]) -> int:
    """The most that tensors took at once.

    CUDA: the allocator's peak since the process began. CPU: the weights of all models and the peak of what one more
    call allocates, counted by the profiler. The resident set would say how much was compiled in this process: it
    differs by 100 MiB between a cold and a warm cache.

    Args:
        pipeline: a `FluxPipeline`.
        device: "cuda" or "cpu".
        call: one whole call, warm; runs on a CPU only.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    models = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return sum(weight_bytes(model) for model in models) + _peak_of_allocations(call)


def _peak_of_allocations(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # `recorded.events()` leaves out allocations within operators; the raw list has them all.
    raw = recorded.profiler.kineto_results.events()
    total = peak = 0
    for event in sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    if peak <= 0:
        raise RuntimeError(
            "torch.profiler recorded no allocation during a whole call; its memory events must have changed: see "
            "perf_tests/harness/memory.py"
        )
    return peak


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()

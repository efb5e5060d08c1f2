"""One CUDA graph per signature of a call: captured on first sight, replayed after.

Written by hand because `torch.compile(mode="reduce-overhead")` of single blocks makes one graph a block and copies
every block's output; one graph around the whole forward is one launch a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils import _pytree as pytree

WARMUP_CALLS = 2
"""Calls on a side stream before the capture: compiled code must be there and allocations settled."""


@dataclasses.dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: Any


def signature(leaves: list[Any], spec: pytree.TreeSpec) -> Hashable:
    """What a capture depends on: structure, and of each leaf shape, stride, dtype, device, or the value itself.

    Positional and keyword arguments alike; flux-fast keyed by keyword tensors only and replayed wrong VAE shapes.
    """
    return (
        spec,
        tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ),
    )


class GraphedCallable:
    """Calls `function` through CUDA graphs.

    Args:
        function: reads its tensors from its arguments and fixed weights, and synchronises nowhere.
        stream: to capture in, for a graph that is replayed while others are: a workspace of cuBLAS belongs to a
            stream, and all graphs that were captured in one share it. None is the stream in which torch captures.

    Attributes:
        captures: graphs captured.
        function_calls: calls of `function` itself, all for warm-up and capture.
        replays: graphs replayed.
    """

    def __init__(self, function: Callable[..., Any], stream: torch.cuda.Stream | None = None) -> None:
        self.function = function
        self.stream = stream
        self.captures = 0
        self.function_calls = 0
        self.replays = 0
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result in fresh tensors: the graph's own are overwritten by the next replay."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = signature(leaves, spec)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(leaves, spec)
        else:
            torch._foreach_copy_(captured.inputs, tensors)
        captured.graph.replay()
        self.replays += 1
        return pytree.tree_map_only(torch.Tensor, torch.clone, captured.output)

    def _capture(self, leaves: list[Any], spec: pytree.TreeSpec) -> _Captured:
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self.function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            output = self.function(*args, **kwargs)
        self.captures += 1
        self.function_calls += WARMUP_CALLS + 1
        return _Captured(graph, [leaf for leaf in static if isinstance(leaf, torch.Tensor)], output)

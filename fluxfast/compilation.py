"""torch.compile of the transformer's blocks and the VAE decoder, with a recorder that counts what was compiled.

Regional by default: each of the two block classes is compiled once and serves all 57 blocks; as fast as the full graph
under one CUDA graph, and 10-20 s instead of 70-110 s to compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Attention, T5Block
from transformers.utils import import_utils

from fluxfast.levels import COORDINATE_DESCENT, INDUCTOR_FLAGS, TRITON_GEMMS, Level

MAX_AUTOTUNE: dict[str, Any] = {
    "max_autotune": True,
    # The "max-autotune" mode of torch.compile sets this one too; here it is the field `coordinate_descent`.
    "coordinate_descent_tuning": False,
    # Searching Triton convolutions for the VAE took over 4 minutes on an H200 and lost to cuDNN.
    "max_autotune_conv_backends": "ATEN",
    # Triton's templates belong to `gemm_search`. The C++ one lost to oneDNN in every search on a CPU (2 to 7 times
    # slower) and took 5 s a shape.
    "max_autotune_gemm_backends": "ATEN",
}


def inductor_options(level: Level) -> dict[str, Any]:
    """Inductor options of `level` beyond the defaults. Given per compilation: no process-global state is touched."""
    if level.compile_mode == "none":
        return {}
    chosen = (
        (level.gemm_search, TRITON_GEMMS),
        (level.inductor_flags, INDUCTOR_FLAGS),
        (level.coordinate_descent, COORDINATE_DESCENT),
    )
    return MAX_AUTOTUNE | {name: value for is_on, options in chosen if is_on for name, value in options.items()}


@dataclasses.dataclass
class CompiledGraph:
    """What is known of one compilation.

    Attributes:
        config: what Inductor's own config held for every option while compiling it.
        operators: how often each operator stands in the graph, by name, "linear" or "fluxfast::gelu_quantize", and by
            type of the tensor that it gives, None for several or none.
        calls: of the compiled code. A CUDA graph calls at capture only.
    """

    config: dict[str, Any]
    operators: Counter[tuple[str, torch.dtype | None]]
    calls: int = 0

    def count(self, *names: str, dtype: torch.dtype | None = None) -> int:
        """How often operators of these names stand in the graph; only those that give a tensor of `dtype`, if given."""
        found = self.operators.items()
        return sum(count for (name, gives), count in found if name in names and dtype in (None, gives))


@dataclasses.dataclass
class Compiler:
    """A Dynamo backend: Inductor with `options`, and a count of everything that passes through.

    Attributes:
        graphs: compilations; a recompilation is another one.
    """

    options: dict[str, Any]
    graphs: list[CompiledGraph] = dataclasses.field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls of compiled code."""
        return sum(graph.calls for graph in self.graphs)

    def calls_of(self, *operators: str, beside: Sequence[str] | None = None, dtype: torch.dtype | None = None) -> int:
        """How often operators of these names ran within compiled code; only in graphs that hold one of `beside`, and
        only those that give a tensor of `dtype`, if given."""
        graphs = [graph for graph in self.graphs if beside is None or graph.count(*beside)]
        return sum(graph.calls * graph.count(*operators, dtype=dtype) for graph in graphs)

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph. Called by Dynamo."""
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(self.options):
            seen = {name: getattr(config, name) for name in MAX_AUTOTUNE | INDUCTOR_FLAGS | COORDINATE_DESCENT}
            # Before Inductor, which takes the graph apart.
            nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
            record = CompiledGraph(seen, Counter((_name(node.target), _type(node)) for node in nodes))
            compiled = compile_fx(graph, example_inputs)
        self.graphs.append(record)

        def call(*args: Any) -> Any:
            record.calls += 1
            return compiled(*args)

        return call


def _type(node: torch.fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("example_value"), "dtype", None)


def _name(target: Any) -> str:
    return target.name() if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def block_lists(transformer: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The double-stream and the single-stream blocks."""
    return transformer.transformer_blocks, transformer.single_transformer_blocks


def unify_single_block_inputs(transformer: nn.Module) -> None:
    """Give the first single block its inputs in the layout that every later one gets: two slices of one tensor.

    Otherwise its class is compiled twice just for the batch stride, and an ahead-of-time package of it would be wrong
    for batches of more than one. One copy of the joint sequence a step (50 MB for FLUX.1 at 1024x1024).
    """

    def join(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        joint = torch.cat([text, image], dim=1)
        sliced = {"encoder_hidden_states": joint[:, : text.shape[1]], "hidden_states": joint[:, text.shape[1] :]}
        return args, kwargs | sliced

    transformer.single_transformer_blocks[0].register_forward_pre_hook(join, with_kwargs=True)


def compile_transformer(transformer: nn.Module, compiler: Compiler, scope: str) -> int:
    """Compile in place, blocks or whole.

    Args:
        transformer: a `FluxTransformer2DModel`.
        compiler: the backend.
        scope: "blocks" or "full".

    Returns:
        The number of graphs to expect: one a block class, or one.
    """
    if scope == "full":
        compile_forward(transformer, compiler)
        return 1
    for blocks in block_lists(transformer):
        for block in blocks:
            compile_forward(block, compiler)
    return len(block_lists(transformer))


def text_encoder_layers(*encoders: nn.Module) -> list[nn.Module]:
    """The layers of CLIP and T5 encoders."""
    return [m for encoder in encoders for m in encoder.modules() if isinstance(m, CLIPEncoderLayer | T5Block)]


def keep_masks_in_capture(encoder: nn.Module) -> None:
    """Let a text encoder make the same masks while a stream captures as before: none, without padding.

    transformers treats a capture as tracing and then makes every mask in full, so that layers which ran without one in
    the warm-up would be compiled again, within the capture.
    """
    forward = encoder.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        asked = import_utils.is_cuda_stream_capturing
        import_utils.is_cuda_stream_capturing = lambda: False
        try:
            return forward(*args, **kwargs)
        finally:
            import_utils.is_cuda_stream_capturing = asked

    encoder.forward = call


def lay_out_position_bias(encoder: nn.Module) -> None:
    """Have T5's position bias in the order of its shape, so that PyTorch finds a fused attention for it.

    transformers permutes an embedding's rows into (1, heads, queries, keys), keys far apart in memory. Every fused
    attention refuses such a mask, and what is left computes in float32 without tensor cores.
    """
    for attention in _bias_makers(encoder):
        attention.compute_bias = _contiguous(attention.compute_bias)


def position_biases_in_order(encoder: nn.Module) -> int:
    """How many position biases were laid out and have their keys side by side; all of T5's layers use the first's.

    How transformers lays out one that was left alone is its own affair.
    """
    laid_out = [attention for attention in _bias_makers(encoder) if "compute_bias" in vars(attention)]
    with torch.no_grad():
        return sum(attention.compute_bias(8, 8).stride(-1) == 1 for attention in laid_out)


def _bias_makers(encoder: nn.Module) -> list[T5Attention]:
    return [m for m in encoder.modules() if isinstance(m, T5Attention) and m.has_relative_attention_bias]


def _contiguous(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        return function(*args, **kwargs).contiguous()

    return call


def compile_forward(module: nn.Module, compiler: Compiler) -> None:
    """Compile `module.forward` in place: hooks stay outside, instances of one class share their graphs."""
    module.forward = torch.compile(module.forward, backend=compiler, fullgraph=True, dynamic=False)

"""T5's blocks with fewer GEMMs and nothing between them but norms and attention.

transformers' block and its attention stay what they are: the position bias, the mask and what fuses them are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fluxfast.compilation import text_encoder_layers

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
"""GELU in its tanh form as transformers calls it."""


class Third(nn.Module):
    """Of q, k and v side by side the one at `place`; stands where T5's attention has a Linear."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """(..., 3 * D) -> (..., D), a view."""
        return qkv.chunk(3, dim=-1)[self.place]


class FusedT5SelfAttention(nn.Module):
    """Takes the place of a `T5LayerSelfAttention`: norm, attention, residual.

    Its attention gets q, k and v where it expects what is normed, and leaves its output as it is.

    Raises:
        ImportError: if quack is not installed.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        from fluxfast.kernels import dense

        self.add = dense.residual_dense_linear
        self.layer_norm, self.SelfAttention = layer.layer_norm, layer.SelfAttention
        projections = [getattr(self.SelfAttention, name) for name in ("q", "k", "v")]
        weight = torch.cat([linear.weight for linear in projections])
        self.to_qkv = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        self.to_qkv.weight = nn.Parameter(weight, requires_grad=False)
        self.o = self.SelfAttention.o.weight
        for place, name in enumerate(("q", "k", "v")):
            setattr(self.SelfAttention, name, Third(place))
        self.SelfAttention.o = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(B, S, D) -> the same, and what else transformers' attention returns."""
        qkv = self.to_qkv(self.layer_norm(hidden_states))
        attended, *others = self.SelfAttention(qkv, mask=attention_mask, position_bias=position_bias, **kwargs)
        return self.add(_rows(attended), self.o, _rows(hidden_states)).view_as(hidden_states), *others


class FusedT5FeedForward(nn.Module):
    """Takes the place of a `T5LayerFF` with a gate: norm, gated GELU, residual.

    Raises:
        ImportError: if quack is not installed.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        from fluxfast.kernels import dense

        self.gated, self.add = dense.gated_gelu_linear, dense.residual_dense_linear
        self.layer_norm, inner = layer.layer_norm, layer.DenseReluDense
        in_turn = torch.stack([inner.wi_0.weight, inner.wi_1.weight], dim=1).flatten(0, 1)
        self.wi, self.wo = nn.Parameter(in_turn, requires_grad=False), inner.wo.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> the same."""
        activated = self.gated(_rows(self.layer_norm(hidden_states)), self.wi)
        return self.add(activated, self.wo, _rows(hidden_states)).view_as(hidden_states)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2)


def fuse(encoder: nn.Module) -> None:
    """Fuse every block of a T5 encoder in place. Weights stay as many bytes, with those of one layer twice meanwhile.

    Its hidden states can be asked for as before, its attentions no longer: transformers records them of its own layers.

    Args:
        encoder: transformers' `T5EncoderModel`, in eval mode: there is no dropout here.

    Raises:
        ValueError: for an encoder of other blocks or of another feed-forward layer, with biases, with weights of
            several types, or in training mode. It is left as it was.
        ImportError: if quack is not installed.
    """
    config, found = encoder.config, text_encoder_layers(encoder)
    if len(found) != config.num_layers or with_one_projection(encoder):
        raise ValueError(
            f"fused_t5 is for the {config.num_layers} blocks that transformers makes of T5, got {len(found)} of them, "
            f"{with_one_projection(encoder)} fused before"
        )
    if not config.is_gated_act or config.dense_act_fn not in TANH_GELU:
        raise ValueError(
            f"fused_t5 is for a feed-forward of gated GELU in its tanh form ({' or '.join(TANH_GELU)}), got "
            f"{config.feed_forward_proj!r} with {config.dense_act_fn!r}: load another level"
        )
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    if biased := [name for name, linear in linears.items() if linear.bias is not None]:
        raise ValueError(f"fused_t5 is for Linears without a bias, and {len(biased)} have one, {biased[0]} among them")
    types = {linear.weight.dtype for linear in linears.values()}
    if len(types) > 1:
        # In float16 transformers keeps `wo` in float32.
        names = " and ".join(sorted(map(str, types)))
        raise ValueError(f"fused_t5 is for Linears of one type, got {names}: load the encoder in torch.bfloat16")
    if encoder.training:
        raise ValueError("fused_t5 has no dropout: call eval() on the encoder first")
    for block in found:
        block.layer[0] = FusedT5SelfAttention(block.layer[0])
        block.layer[-1] = FusedT5FeedForward(block.layer[-1])


def with_one_projection(encoder: nn.Module) -> int:
    """How many blocks have q, k and v from one Linear and from no other."""
    return sum(
        isinstance(layer, FusedT5SelfAttention)
        and isinstance(layer.to_qkv, nn.Linear)
        and not any(isinstance(m, nn.Linear) for m in layer.SelfAttention.modules())
        for layer in (block.layer[0] for block in text_encoder_layers(encoder))
    )

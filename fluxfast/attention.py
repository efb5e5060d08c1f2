"""FlashAttention-3 on e4m3 q, k, v as a diffusers attention processor, and its reference for machines without it.

The kernel is an opaque custom op with a fake, so that `torch.compile(fullgraph=True)` and `torch.export` see one node.
In `fa3_fp8` the cast stands outside the op, where Inductor fuses it with RoPE; flux-fast casts inside
(`fa3_fp8_cast_inside`), which costs three extra passes over q, k, v.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, _get_qkv_projections

from fluxfast.machine import processors, this_machine

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


TILE = 128
"""Query rows that one thread block of FA3's float8 kernel works on, at a head size of 128."""
MOST_SPLITS = 8
LEAST_GAIN = 0.25
"""Waves that a second launch has to save: it takes as long as a fifth of one to start and to add up its parts."""


@dataclasses.dataclass
class LaunchCount:
    """How often an FA3 op ran in Python: every call in eager and compiled code, one a capture in a CUDA graph.

    Attributes:
        launches: calls of any of the ops.
        looked: those among them of the op that looks for a tail.
        split: those among these that gave the tail a launch of its own.
    """

    launches: int = 0
    looked: int = 0
    split: int = 0

    def since(self, before: LaunchCount) -> LaunchCount:
        """What was added to `before`, a copy of earlier."""
        return LaunchCount(self.launches - before.launches, self.looked - before.looked, self.split - before.split)


COUNT = LaunchCount()


@functools.cache
def _interface() -> Any:
    module = this_machine().fa3_module
    if module is None:
        raise ImportError("fa3_fp8 attention needs one of flash_attn_interface, fa3_fwd_interface; found neither")
    return importlib.import_module(module)


def _kernel() -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    return _interface().flash_attn_func


def _kernel_into() -> Callable[..., Any]:
    """The operator below `flash_attn_func`, which writes into `out` and takes `num_splits`."""
    library = "fa3_fwd" if _interface().__name__ == "fa3_fwd_interface" else "flash_attn_3"
    return getattr(torch.ops, library).fwd


def _launch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    COUNT.launches += 1
    out = _kernel()(query, key, value)
    # Builds before flash-attention's 2025-08 returned (out, softmax_lse).
    return out if isinstance(out, torch.Tensor) else out[0]


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Saturating e4m3 cast: what a bare `.to` makes of values past 448 (448 or NaN) depends on the backend."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@torch.library.custom_op("fluxfast::fa3_fp8", mutates_args=(), device_types="cuda")
def fa3_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of e4m3 q, k, v without scales.

    Args:
        query, key, value: (batch, sequence, heads, 128), float8_e4m3fn.

    Returns:
        (batch, sequence, heads, 128), bfloat16.
    """
    return _launch(query, key, value)


def tail_of(batch: int, tokens: int, heads: int, processors: int) -> tuple[int, int]:
    """Which of FA3's query rows a second launch should take, so that no wave of tiles runs on a near-empty GPU.

    One launch works through `heads * ceil(tokens / TILE)` tiles, `processors` at a time, and its last wave takes as
    long as the others however few tiles are left. FLUX.1 at 1024x1024 has 816 on 132 processors: seven waves for 6.2.

    Args:
        processors: of the GPU (SMs).

    Returns:
        Rows at the end of the sequence, and the parts into which their launch splits the keys; (0, 1) if one launch
        of everything is as good.
    """
    tiles = -(-tokens // TILE)
    waves = batch * heads * tiles // processors
    kept = waves * processors // (batch * heads)
    left = batch * heads * (tiles - kept)
    if kept == 0 or left == 0:
        return 0, 1

    def waves_of(splits: int) -> float:
        return -(-left * splits // processors) / splits

    splits = min(range(1, MOST_SPLITS + 1), key=waves_of)
    at_once = -(-batch * heads * tiles // processors)
    if at_once - waves - waves_of(splits) < LEAST_GAIN:
        return 0, 1
    return tokens - kept * TILE, splits


def has_tail(tokens: int, heads: int) -> bool:
    """Whether `fa3_fp8_split_tail` launches twice here for one image of `tokens` tokens in the joint sequence."""
    return tail_of(1, tokens, heads, processors())[0] > 0


@torch.library.custom_op("fluxfast::fa3_fp8_split_tail", mutates_args=(), device_types="cuda")
def fa3_fp8_split_tail(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As `fa3_fp8`, the rows of `tail_of` in a launch of their own."""
    batch, tokens, heads, _ = query.shape
    rows, splits = tail_of(batch, tokens, heads, processors())
    COUNT.looked += 1
    if rows == 0:
        return _launch(query, key, value)
    COUNT.launches += 1
    COUNT.split += 1
    out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
    for part, parts in ((slice(0, tokens - rows), 1), (slice(tokens - rows, None), splits)):
        _kernel_into()(query[:, part], key, value, out=out[:, part], num_splits=parts)
    return out


@torch.library.custom_op("fluxfast::fa3_fp8_cast_inside", mutates_args=(), device_types="cuda")
def fa3_fp8_cast_inside(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """flux-fast's op: bfloat16 (batch, sequence, heads, 128) in and out, cast to e4m3 within, unscaled and unfused."""
    return _launch(query.to(E4M3), key.to(E4M3), value.to(E4M3))


@fa3_fp8.register_fake
@fa3_fp8_split_tail.register_fake
@fa3_fp8_cast_inside.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)


def reference_fp8_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FA3's fp8 numerics in plain PyTorch, for tests: e4m3 q, k, v, attention in float32.

    FA3 also rounds the probabilities to e4m3 inside; this does not, so it bounds the op's error from below.

    Args:
        query, key, value: (batch, sequence, heads, head_dim), float8_e4m3fn.

    Returns:
        The same shape, bfloat16.
    """
    query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).to(torch.bfloat16)


class Fa3Fp8Processor:
    """Processor for `FluxAttention`: the stock one up to RoPE, then FA3 on e4m3.

    Args:
        attention: (q, k, v) -> out, all (batch, sequence, heads, head_dim).
        cast_outside: cast to e4m3 here instead of within `attention`.
    """

    def __init__(
        self,
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = fa3_fp8,
        cast_outside: bool = True,
    ) -> None:
        self.attention = attention
        self.cast_outside = cast_outside

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of `hidden_states` (batch, sequence, dim), joined after `encoder_hidden_states` where given.

        Raises:
            ValueError: for an attention mask, which FA3 in fp8 does not take.
        """
        if attention_mask is not None:
            raise ValueError("fa3_fp8 takes no attention mask; FluxPipeline passes none: remove the mask")
        query, key, value, text_query, text_key, text_value = _get_qkv_projections(
            attn, hidden_states, encoder_hidden_states
        )
        heads = (-1, attn.head_dim)
        query = attn.norm_q(query.unflatten(-1, heads))
        key = attn.norm_k(key.unflatten(-1, heads))
        value = value.unflatten(-1, heads)
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(text_query.unflatten(-1, heads)), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key.unflatten(-1, heads)), key], dim=1)
            value = torch.cat([text_value.unflatten(-1, heads), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if self.cast_outside:
            query, key, value = to_e4m3(query), to_e4m3(key), to_e4m3(value)
        out = self.attention(query, key, value).flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        text_length = encoder_hidden_states.shape[1]
        text_out, out = out[:, :text_length], out[:, text_length:]
        return attn.to_out[1](attn.to_out[0](out.contiguous())), attn.to_add_out(text_out.contiguous())

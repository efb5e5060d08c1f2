"""FLUX's two transformer blocks around the fused kernels: same signature and weights as diffusers', other GEMMs.

Only the block Linears are quantised (row-wise e4m3); the AdaLN Linears stay as they are. What a block computes from the
time step, its modulation, can be set from outside: see `modulation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fluxfast.kernels.ops import BlockOps

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v), each (B, S, H, Dh) in e4m3 (unquantised for `ops.EXACT`) -> (B, S, H, Dh) in bfloat16."""
Rotary = tuple[torch.Tensor, torch.Tensor]
EPS = 1e-6


def qkv_linears(attn: nn.Module, *, text: bool = False) -> list[nn.Linear]:
    """The QKV projections of a `FluxAttention`, whether diffusers' `fuse_qkv_projections` was applied before or not."""
    if attn.fused_projections:
        return [attn.to_added_qkv if text else attn.to_qkv]
    return [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj] if text else [attn.to_q, attn.to_k, attn.to_v]


def rows(x: torch.Tensor) -> torch.Tensor:
    """(B, S, D) -> (B * S, D); a view if the batch is one or the memory contiguous."""
    return x.reshape(-1, x.shape[-1])


class _ModulatedBlock(nn.Module):
    """What both blocks share: AdaLN Linears and the modulation made from them or set from outside.

    Attributes:
        modulation: None, or (B, `modulation_width`): every shift, scale and gate of this block for the current step.
            While it is set, `temb` is not looked at. It is a plain attribute, not a buffer, because it is a view into
            one static tensor for all blocks that is refreshed between steps, under a captured CUDA graph too.
    """

    def __init__(self, adaln: Sequence[nn.Module], attention: Attention, ops: BlockOps) -> None:
        super().__init__()
        self.adaln_linears = nn.ModuleList(norm.linear for norm in adaln)
        self.modulation_width = sum(linear.out_features for linear in self.adaln_linears)
        self.modulation: torch.Tensor | None = None
        self.attention = attention
        self.ops = ops

    def compute_modulation(self, temb: torch.Tensor) -> torch.Tensor:
        """(B, D) time-and-text embedding -> (B, modulation_width)."""
        activated = nn.functional.silu(temb)
        return torch.cat([linear(activated) for linear in self.adaln_linears], dim=-1)

    def _modulation(self, temb: torch.Tensor, kwargs: dict[str, Any] | None) -> torch.Tensor:
        if kwargs:
            raise ValueError(f"the fused blocks take no joint_attention_kwargs, got {sorted(kwargs)}")
        return self.compute_modulation(temb) if self.modulation is None else self.modulation


class FusedFluxTransformerBlock(_ModulatedBlock):
    """A double-stream block: `FluxTransformerBlock` with merged QKV GEMMs and fused quantisation."""

    def __init__(self, block: nn.Module, *, attention: Attention, ops: BlockOps) -> None:
        super().__init__([block.norm1, block.norm1_context], attention, ops)
        attn = block.attn
        self.to_qkv = ops.linear(qkv_linears(attn))
        self.to_added_qkv = ops.linear(qkv_linears(attn, text=True))
        self.to_out, self.to_add_out = ops.linear([attn.to_out[0]]), ops.linear([attn.to_add_out])
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.norm_added_q, self.norm_added_k = attn.norm_added_q, attn.norm_added_k
        self.ff_in, self.ff_out = ops.linear([block.ff.net[0].proj]), ops.linear([block.ff.net[2]])
        self.ff_context_in = ops.linear([block.ff_context.net[0].proj])
        self.ff_context_out = ops.linear([block.ff_context.net[2]])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, S, D) and text (B, T, D) streams -> (text, image), as diffusers' block returns them."""
        modulation = self._modulation(temb, joint_attention_kwargs)
        return self.forward_modulated(hidden_states, encoder_hidden_states, modulation, image_rotary_emb)

    def forward_modulated(
        self, image: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block as a function of tensors alone, for export: `modulation` is (B, modulation_width)."""
        image_vectors, text_vectors = (half.chunk(6, dim=-1) for half in modulation.chunk(2, dim=-1))
        qkv = self._project(self.to_qkv, image, image_vectors)
        text_qkv = self._project(self.to_added_qkv, text, text_vectors)
        weights = (self.norm_q.weight, self.norm_k.weight)
        text_weights = (self.norm_added_q.weight, self.norm_added_k.weight)
        q, k, v = self.ops.qk_norm_rope(qkv, *weights, *rotary, EPS, text_qkv, *text_weights)

        attended, scale = self.ops.quantize(self.attention(q, k, v).flatten(2))
        tokens = text.shape[1]
        text_out, image_out = (
            linear.forward_quantized(rows(attended[:, part]), None if scale is None else rows(scale[:, part]))
            for linear, part in ((self.to_add_out, slice(0, tokens)), (self.to_out, slice(tokens, None)))
        )
        image = self._feed_forward(self.ff_in, self.ff_out, image, image_out, image_vectors)
        text = self._feed_forward(self.ff_context_in, self.ff_context_out, text, text_out, text_vectors)
        return text, image

    def _project(self, linear: nn.Module, x: torch.Tensor, vectors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        shift, scale = vectors[:2]
        q, q_scale = self.ops.layernorm_modulate(rows(x), shift, scale, EPS)
        return linear.forward_quantized(q, q_scale).unflatten(0, x.shape[:2])

    def _feed_forward(
        self, up: nn.Module, down: nn.Module, x: torch.Tensor, attended: torch.Tensor, vectors: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Both residual additions of one stream and the MLP between them."""
        gate_attention, shift, scale, gate_mlp = vectors[2:]
        residual, q, q_scale = self.ops.residual_layernorm_modulate(
            rows(x), attended, gate_attention, shift, scale, EPS
        )
        y = down.forward_quantized(*self.ops.gelu(up.forward_quantized(q, q_scale)))
        return residual.unflatten(0, x.shape[:2]) + gate_mlp[:, None] * y.unflatten(0, x.shape[:2])


class FusedFluxSingleTransformerBlock(_ModulatedBlock):
    """A single-stream block: `FluxSingleTransformerBlock` with one or two GEMMs in front of attention and MLP.

    Attributes:
        merged_projections: QKV and MLP as one GEMM (3072 -> 21504 in FLUX.1).
        chained: `hidden_states` is the joint stream, text first, on the way in and out, and `encoder_hidden_states`
            goes along untouched, as the reminder of how many text tokens there are. Otherwise the block concatenates
            the two streams first and takes them apart at its end, as diffusers' does.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        attention: Attention,
        ops: BlockOps,
        merged_projections: bool = False,
        chained: bool = False,
    ) -> None:
        super().__init__([block.norm], attention, ops)
        qkv = qkv_linears(block.attn)
        self.merged_projections, self.chained = merged_projections, chained
        self.to_qkv = ops.linear([*qkv, block.proj_mlp] if merged_projections else qkv)
        self.proj_mlp = None if merged_projections else ops.linear([block.proj_mlp])
        self.proj_out = ops.linear([block.proj_out])
        self.norm_q, self.norm_k = block.attn.norm_q, block.attn.norm_k
        self.qkv_width = sum(linear.out_features for linear in qkv)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, S, D) and text (B, T, D) streams -> (text, image), or the joint stream: see `chained`."""
        modulation = self._modulation(temb, joint_attention_kwargs)
        x = hidden_states if self.chained else torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = self.forward_modulated(x, modulation, image_rotary_emb)
        tokens = encoder_hidden_states.shape[1]
        return (encoder_hidden_states, x) if self.chained else (x[:, :tokens], x[:, tokens:])

    def forward_modulated(self, x: torch.Tensor, modulation: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """The joint stream (B, T + S, D) through the block, as a function of tensors alone, for export."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        q, q_scale = self.ops.layernorm_modulate(rows(x), shift, scale, EPS)
        projected = self.to_qkv.forward_quantized(q, q_scale)
        if self.proj_mlp is None:
            mlp, projected = projected[:, self.qkv_width :], projected[:, : self.qkv_width]
        else:
            mlp = self.proj_mlp.forward_quantized(q, q_scale)
        qkv = projected.unflatten(0, x.shape[:2])
        q, k, v = self.ops.qk_norm_rope(qkv, self.norm_q.weight, self.norm_k.weight, *rotary, EPS)
        attended = rows(self.attention(q, k, v).flatten(2))
        y = self.proj_out.forward_quantized(*self.ops.gelu_concat(attended, mlp))
        return x + gate[:, None] * y.unflatten(0, x.shape[:2])

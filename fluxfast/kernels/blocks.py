"""FLUX's two transformer blocks around the fused kernels: same signature and weights as diffusers', other GEMMs.

Only the block Linears are quantised (row-wise e4m3); the AdaLN Linears stay as they are. What a block computes from the
time step, its modulation, can be set from outside: see `modulation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import nn

from fluxfast.kernels.linear import GroupedRowwiseFloat8Linear
from fluxfast.kernels.ops import BlockOps

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v), each (B, S, H, Dh) in e4m3 (unquantised for `ops.EXACT`) -> (B, S, H, Dh) in bfloat16.

q and v may be what `BlockOps.qk_norm_rope` makes of them for this attention, which takes no others then.
`BlockOps.attention_quantize` takes its place."""
Rotary = tuple[torch.Tensor, torch.Tensor]
Quantized = tuple[torch.Tensor, torch.Tensor | None]
"""Rows (M, K) and their scales (M, 1); None for the latter if nothing is quantised."""
Projected: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""QKV, or without V, which is beside it as attention takes it: see `reference.qkv_linear`."""
EPS = 1e-6


def qkv_linears(attn: nn.Module, *, text: bool = False) -> list[nn.Linear]:
    """The QKV projections of a `FluxAttention`, whether diffusers' `fuse_qkv_projections` was applied before or not."""
    if attn.fused_projections:
        return [attn.to_added_qkv if text else attn.to_qkv]
    return [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj] if text else [attn.to_q, attn.to_k, attn.to_v]


def rows(x: torch.Tensor) -> torch.Tensor:
    """(B, S, D) -> (B * S, D); a view if the batch is one or the memory contiguous."""
    return x.reshape(-1, x.shape[-1])


def without_values(projected: Projected) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `BlockOps.qk_norm_rope` takes of a projection: the rows, and what is written of V already."""
    if isinstance(projected, torch.Tensor):
        return projected, {}
    qk, values, largest = projected
    return qk, {"values": values, "largest": largest}


class Pending(NamedTuple):
    """A stream (B, S, D) whose last gated residual is not added yet: it is `residual + gate * y`.

    Attributes:
        residual, y: (B, S, D).
        modulation: (B, modulation_width) of the block that made `y`, whole. The gate alone would be an output of
            compiled code that is a view of an input, to be made again from it behind the graph that all blocks share.
        gate: which of the modulation's vectors of D is the gate.
    """

    residual: torch.Tensor
    y: torch.Tensor
    modulation: torch.Tensor
    gate: int


Stream: TypeAlias = torch.Tensor | Pending
"""(B, S, D) on its way from block to block."""


def sizes_of(x: Stream) -> torch.Size:
    """(B, S)."""
    return (x.residual if isinstance(x, Pending) else x).shape[:2]


def gate_of(x: Pending) -> torch.Tensor:
    """(B, D), a view."""
    width = x.y.shape[-1]
    return x.modulation.narrow(-1, x.gate * width, width)


def add_pending(x: Pending) -> torch.Tensor:
    """The stream as one tensor (B, S, D); computed in float32 and rounded once, like the norms' kernel."""
    return torch.addcmul(x.residual, gate_of(x)[:, None], x.y)


class _ModulatedBlock(nn.Module):
    """What both blocks share: AdaLN Linears and the modulation made from them or set from outside.

    Attributes:
        modulation: None, or (B, `modulation_width`): every shift, scale and gate of this block for the current step.
            While it is set, `temb` is not looked at. It is a plain attribute, not a buffer, because it is a view into
            one static tensor for all blocks that is refreshed between steps, under a captured CUDA graph too.
        fused_residuals: streams come and go as `Pending`: the norm at the beginning adds what the block before left
            over. Hooks in front of the first and behind the last block, see `fuse.py`, make and add them. Not with
            `BlockOps.residual_linear`, which leaves nothing over.
        eps: of the norms of streams.
        INTO_STREAM: the Linears whose output a gate lets into a stream, where there is one stream.
        GATES: the arguments that are streams, and the `Pending.gate` with which each leaves the block.
    """

    GATES: ClassVar[dict[str, int]]
    INTO_STREAM: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, adaln: Sequence[nn.Module], attention: Attention, ops: BlockOps, *, fused_residuals: bool
    ) -> None:
        super().__init__()
        if fused_residuals and ops.residual_linear is not None:
            raise ValueError(
                "fused_residuals is for what a block leaves to be added, and residual_linear leaves nothing"
            )
        self.fused_residuals = fused_residuals
        self.eps = EPS
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

    def count_in(self, unit: float) -> None:
        """From here on the stream, of which there is one, holds its values divided by `unit`; see `fuse.STREAM_UNIT`.

        What a Linear adds is divided by it, exactly for a power of two, and a norm divides by the deviation anyway.
        """
        self.eps = EPS / unit**2
        for linear in map(self.get_submodule, self.INTO_STREAM):
            linear.weight_scale /= unit
            linear.bias /= unit

    def _norm(
        self, x: Stream, shift: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stream as rows (B * S, D), what is pending added, and its modulated norm, quantised: q and scale."""
        if isinstance(x, Pending):
            return self._norm_sum(rows(x.residual), rows(x.y), gate_of(x), shift, scale)
        return self._norm_sum(rows(x), None, None, shift, scale)

    def _norm_sum(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        shift: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows x, `gate * y` added where there is a y, and the modulated norm of that, quantised: q and scale."""
        if y is None:
            return x, *self.ops.layernorm_modulate(x, shift, scale, self.eps)
        return self.ops.residual_layernorm_modulate(x, y, gate, shift, scale, self.eps)

    def _attend(self, *heads: torch.Tensor) -> Quantized:
        """What `BlockOps.qk_norm_rope` gives -> what attention makes of it, quantised rows (B * S, D)."""
        if self.ops.attention_quantize is not None:
            attended: Quantized = self.ops.attention_quantize(*heads)
        else:
            attended = self.ops.quantize(rows(self.attention(*heads).flatten(2)))
        return attended

    def _project_back(
        self, linear: nn.Module, quantized: Sequence[torch.Tensor | None], residual: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A Linear into a stream: its rows (B * S, D), and what `gate` lets in, None if the GEMM has added it."""
        if self.ops.residual_linear is None:
            return residual, linear.forward_quantized(*quantized)
        return linear.forward_residual(*quantized, residual, gate), None

    def _leave(
        self, residual: torch.Tensor, y: torch.Tensor | None, modulation: torch.Tensor, stream: str, sizes: torch.Size
    ) -> Stream:
        """A stream from rows (B * S, D), its last gated residual, if any is left, added or left to the next block."""
        if y is None:
            return residual.unflatten(0, sizes)
        x = Pending(residual.unflatten(0, sizes), y.unflatten(0, sizes), modulation, self.GATES[stream])
        return x if self.fused_residuals else x.residual + gate_of(x)[:, None] * x.y


class FusedFluxTransformerBlock(_ModulatedBlock):
    """A double-stream block: `FluxTransformerBlock` with merged QKV GEMMs and fused quantisation."""

    GATES: ClassVar[dict[str, int]] = {"hidden_states": 5, "encoder_hidden_states": 11}

    def __init__(self, block: nn.Module, *, attention: Attention, ops: BlockOps, fused_residuals: bool = False) -> None:
        super().__init__([block.norm1, block.norm1_context], attention, ops, fused_residuals=fused_residuals)
        attn = block.attn
        self.to_qkv = ops.linear(qkv_linears(attn))
        self.to_added_qkv = ops.linear(qkv_linears(attn, text=True))
        up, down = ops.gelu_linear or ops.linear, ops.residual_linear or ops.linear
        self.to_out, self.to_add_out = down([attn.to_out[0]]), down([attn.to_add_out])
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.norm_added_q, self.norm_added_k = attn.norm_added_q, attn.norm_added_k
        self.ff_in, self.ff_out = up([block.ff.net[0].proj]), down([block.ff.net[2]])
        self.ff_context_in, self.ff_context_out = up([block.ff_context.net[0].proj]), down([block.ff_context.net[2]])

    def forward(
        self,
        hidden_states: Stream,
        encoder_hidden_states: Stream,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Stream, Stream]:
        """Image (B, S, D) and text (B, T, D) streams -> (text, image), as diffusers' block returns them."""
        modulation = self._modulation(temb, joint_attention_kwargs)
        return self.forward_modulated(hidden_states, encoder_hidden_states, modulation, image_rotary_emb)

    def forward_modulated(
        self, image: Stream, text: Stream, modulation: torch.Tensor, rotary: Rotary
    ) -> tuple[Stream, Stream]:
        """The block as a function of tensors, or of `Pending`: `modulation` is (B, modulation_width)."""
        image_vectors, text_vectors = (half.chunk(6, dim=-1) for half in modulation.chunk(2, dim=-1))
        image_rows, qkv = self._project(self.to_qkv, image, image_vectors)
        text_rows, text_qkv = self._project(self.to_added_qkv, text, text_vectors)
        weights = (self.norm_q.weight, self.norm_k.weight)
        text_weights = (self.norm_added_q.weight, self.norm_added_k.weight)
        heads = self.ops.qk_norm_rope(qkv, *weights, *rotary, EPS, text_qkv, *text_weights)

        quantized = [None if x is None else x.unflatten(0, (len(qkv), -1)) for x in self._attend(*heads)]
        tokens = text_qkv.shape[1]
        text_attended, image_attended = (
            [None if x is None else rows(x[:, part]) for x in quantized]
            for part in (slice(0, tokens), slice(tokens, None))
        )
        text_sum = self._project_back(self.to_add_out, text_attended, text_rows, text_vectors[2])
        image_sum = self._project_back(self.to_out, image_attended, image_rows, image_vectors[2])
        image_ends = self._feed_forward(self.ff_in, self.ff_out, *image_sum, image_vectors)
        text_ends = self._feed_forward(self.ff_context_in, self.ff_context_out, *text_sum, text_vectors)
        return (
            self._leave(*text_ends, modulation, "encoder_hidden_states", sizes_of(text)),
            self._leave(*image_ends, modulation, "hidden_states", sizes_of(image)),
        )

    def _project(
        self, linear: nn.Module, x: Stream, vectors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B * S, D) of a stream, and its QKV (B, S, 3 * D)."""
        residual, q, q_scale = self._norm(x, *vectors[:2])
        return residual, linear.forward_quantized(q, q_scale).unflatten(0, sizes_of(x))

    def _feed_forward(
        self,
        up: nn.Module,
        down: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor | None,
        vectors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A stream's rows through norm and MLP; x and y come and go as `_project_back` returns them."""
        x, q, q_scale = self._norm_sum(x, y, *vectors[2:5])
        if self.ops.gelu_linear is None:
            activated = self.ops.gelu(up.forward_quantized(q, q_scale))
        else:
            activated = up.forward_gelu(q, q_scale)
        return self._project_back(down, activated, x, vectors[5])


class GroupedFluxTransformerBlock(_ModulatedBlock):
    """A double-stream block whose streams are one, text first: a norm or a GEMM of both is one launch.

    The streams keep weights, shifts, scales and gates of their own (grouped GEMMs). `hidden_states` is the joint stream
    on the way in and out, and `encoder_hidden_states` goes along untouched, as in single blocks that are `chained`.
    """

    GATES: ClassVar[dict[str, int]] = {}
    INTO_STREAM: ClassVar[tuple[str, ...]] = ("to_out", "ff_out")

    def __init__(self, block: nn.Module, *, attention: Attention, ops: BlockOps) -> None:
        assert ops.grouped is not None and ops.gelu_linear is not None, "what grouped GEMMs need, `triton_ops` checks"
        # Text first, as everywhere here.
        super().__init__([block.norm1_context, block.norm1], attention, ops, fused_residuals=False)
        attn, grouped = block.attn, ops.grouped

        def both(operation: Callable[..., Any], linear: Any, text: Any, image: Any) -> GroupedRowwiseFloat8Linear:
            return GroupedRowwiseFloat8Linear(linear(text), linear(image), operation=operation)

        self.to_qkv = both(grouped.linear, ops.linear, qkv_linears(attn, text=True), qkv_linears(attn))
        self.to_out = both(grouped.residual_linear, ops.linear, [attn.to_add_out], [attn.to_out[0]])
        up = [block.ff_context.net[0].proj], [block.ff.net[0].proj]
        self.ff_in = both(grouped.gelu_linear, ops.gelu_linear, *up)
        self.ff_out = both(grouped.residual_linear, ops.linear, [block.ff_context.net[2]], [block.ff.net[2]])
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.norm_added_q, self.norm_added_k = attn.norm_added_q, attn.norm_added_k

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The joint stream (B, T + S, D) and text (B, T, D) -> (text, joint stream)."""
        modulation = self._modulation(temb, joint_attention_kwargs)
        tokens = encoder_hidden_states.shape[1]
        return encoder_hidden_states, self.forward_modulated(hidden_states, tokens, modulation, image_rotary_emb)

    def forward_modulated(self, x: torch.Tensor, tokens: int, modulation: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """The block as a function of tensors; the first `tokens` of x (B, T + S, D) are text's."""
        assert self.ops.grouped is not None
        norm = self.ops.grouped.layernorm_modulate
        # Each (B, 2, D).
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unflatten(-1, (2, 6, -1)).unbind(2)
        qkv, beside = without_values(self.to_qkv.forward_grouped(*norm(x, shift, scale, tokens, self.eps), tokens))
        weights = (self.norm_q.weight, self.norm_k.weight)
        text_weights = (self.norm_added_q.weight, self.norm_added_k.weight)
        streams = qkv[:, tokens:], *weights, *rotary, EPS, qkv[:, :tokens], *text_weights
        attended, attended_scale = self._attend(*self.ops.qk_norm_rope(*streams, **beside))
        assert attended_scale is not None, "grouped GEMMs are float8's"
        attended, attended_scale = attended.unflatten(0, x.shape[:2]), attended_scale.unflatten(0, x.shape[:2])
        x = self.to_out.forward_grouped(attended, attended_scale, x, gate, tokens)
        activated = self.ff_in.forward_grouped(*norm(x, mlp_shift, mlp_scale, tokens, self.eps), tokens)
        return self.ff_out.forward_grouped(*activated, x, mlp_gate, tokens)


class FusedFluxSingleTransformerBlock(_ModulatedBlock):
    """A single-stream block: `FluxSingleTransformerBlock` with one or two GEMMs in front of attention and MLP.

    Attributes:
        merged_projections: QKV and MLP as one GEMM (3072 -> 21504 in FLUX.1), not with `BlockOps.gelu_linear`.
        chained: `hidden_states` is the joint stream, text first, on the way in and out, and `encoder_hidden_states`
            goes along untouched, as the reminder of how many text tokens there are. Otherwise the block concatenates
            the two streams first and takes them apart at its end, as diffusers' does. `fused_residuals` needs it.
    """

    GATES: ClassVar[dict[str, int]] = {"hidden_states": 2}
    INTO_STREAM: ClassVar[tuple[str, ...]] = ("proj_out",)

    def __init__(
        self,
        block: nn.Module,
        *,
        attention: Attention,
        ops: BlockOps,
        merged_projections: bool = False,
        chained: bool = False,
        fused_residuals: bool = False,
    ) -> None:
        if fused_residuals and not chained:
            raise ValueError("fused_residuals needs chained: a residual that is not added yet cannot be taken apart")
        if merged_projections and ops.gelu_linear is not None:
            raise ValueError("merged_projections has QKV in the GEMM whose every output gelu_linear would activate")
        super().__init__([block.norm], attention, ops, fused_residuals=fused_residuals)
        qkv = qkv_linears(block.attn)
        self.merged_projections, self.chained = merged_projections, chained
        self.to_qkv = (ops.qkv_linear or ops.linear)([*qkv, block.proj_mlp] if merged_projections else qkv)
        up = ops.gelu_linear or ops.linear
        self.proj_mlp: Any = None if merged_projections else up([block.proj_mlp])
        self.proj_out = (ops.residual_linear or ops.linear)([block.proj_out])
        self.norm_q, self.norm_k = block.attn.norm_q, block.attn.norm_k
        self.qkv_width = sum(linear.out_features for linear in qkv)

    def forward(
        self,
        hidden_states: Stream,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, Stream]:
        """Image (B, S, D) and text (B, T, D) streams -> (text, image), or the joint stream: see `chained`."""
        modulation = self._modulation(temb, joint_attention_kwargs)
        x = hidden_states if self.chained else torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = self.forward_modulated(x, modulation, image_rotary_emb)
        tokens = encoder_hidden_states.shape[1]
        if self.chained:
            return encoder_hidden_states, x
        assert not isinstance(x, Pending), "fused_residuals is refused where streams are taken apart"
        return x[:, :tokens], x[:, tokens:]

    def forward_modulated(self, x: Stream, modulation: torch.Tensor, rotary: Rotary) -> Stream:
        """The joint stream (B, T + S, D) through the block, as a function of tensors, or of `Pending`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        sizes = sizes_of(x)
        residual, q, q_scale = self._norm(x, shift, scale)
        if self.ops.qkv_linear is None:
            projected = self.to_qkv.forward_quantized(q, q_scale)
        else:
            projected = self.to_qkv.forward_qkv(q, q_scale, sizes[0])
        if self.ops.attention_quantize is not None:
            heads = self._heads(projected, sizes, rotary)
            bound, beside = self.proj_mlp.bound, self.proj_mlp.out_features
            quantized = self.ops.attention_quantize(*heads, q_scale, bound, beside)
            self.proj_mlp.forward_gelu_beside(q, q_scale, *quantized)
        elif self.ops.gelu_linear is not None:
            quantized = self.proj_mlp.forward_gelu(q, q_scale, self._attended(projected, sizes, rotary))
        else:
            if self.proj_mlp is None:
                mlp, projected = projected[:, self.qkv_width :], projected[:, : self.qkv_width]
            else:
                mlp = self.proj_mlp.forward_quantized(q, q_scale)
            quantized = self.ops.gelu_concat(self._attended(projected, sizes, rotary), mlp)
        ends = self._project_back(self.proj_out, quantized, residual, gate)
        return self._leave(*ends, modulation, "hidden_states", sizes)

    def _heads(self, projected: Projected, sizes: torch.Size, rotary: Rotary) -> tuple[torch.Tensor, ...]:
        """QKV as rows (B * S, 3 * D), or without V, which is beside it -> what attention takes."""
        qkv, beside = without_values(projected)
        streams = qkv.unflatten(0, sizes), self.norm_q.weight, self.norm_k.weight, *rotary, EPS
        heads: tuple[torch.Tensor, ...] = self.ops.qk_norm_rope(*streams, **beside)
        return heads

    def _attended(self, qkv: torch.Tensor, sizes: torch.Size, rotary: Rotary) -> torch.Tensor:
        """QKV as rows (B * S, 3 * D) -> what attention makes of them, rows (B * S, D), not quantised yet."""
        return rows(self.attention(*self._heads(qkv, sizes, rotary)).flatten(2))

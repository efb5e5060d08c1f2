"""Which implementation a fused block uses for each operation: chosen by name, never by what happens to be there.

`REFERENCE` quantises in plain PyTorch for Inductor to fuse; `triton_ops()` swaps in the kernels; `EXACT` does not
quantise at all and exists to test the blocks' wiring against diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fluxfast.kernels import reference
from fluxfast.kernels.linear import (
    DenseLinear,
    RowwiseFloat8EpilogueLinear,
    RowwiseFloat8GeluLinear,
    RowwiseFloat8Linear,
    RowwiseFloat8QkvLinear,
    RowwiseFloat8ResidualLinear,
    stack_linears,
)
from fluxfast.kernels.rowwise import quantize_rowwise

Op = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedOps:
    """The operations of a double block whose streams are one, (B, T + S, D); see their references, `grouped_...`.

    `linear` is of QKV: `reference.grouped_linear`, or `grouped_qkv_linear` where there is a `BlockOps.qkv_linear`.
    """

    layernorm_modulate: Op
    linear: Op
    gelu_linear: Op
    residual_linear: Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOps:
    """The operations of a fused block; rows are (M, D), per-sample vectors (B, D).

    Attributes:
        linear: (linears) -> module with `forward_quantized(q, scale)`.
        quantize: (..., D) -> (q, scale). gelu: (rows) -> (q, scale). gelu_concat: (attention, mlp) -> (q, scale).
        layernorm_modulate: (rows, shift, scale, eps) -> (q, scale).
        residual_layernorm_modulate: (residual, y, gate, shift, scale, eps) -> (new residual, q, scale).
        qk_norm_rope: see `reference.qk_norm_rope_quantize`, and `reference.hadamard` for what may follow; v is as the
            attention takes it.
        gelu_linear: (linears) -> module with `forward_gelu(q, scale, left)`, for the Linears in front of a GELU. None:
            they are of `linear`, and `gelu` or `gelu_concat` follows.
        residual_linear: (linears) -> module with `forward_residual(q, scale, residual, gate)`, for the Linears whose
            output a gate lets into a stream. None: they are of `linear`, and the norm behind them adds it.
        attention_quantize: see `reference.coded_attention_quantize`; takes what `qk_norm_rope` gives. None: the block's
            attention, then `quantize` or what quantises it beside the MLP.
        grouped: for double blocks whose two streams are one. None: each has its own GEMMs and norms.
        qkv_linear: (linears) -> module with `forward_qkv(q, scale, samples)`, whose GEMM writes V as attention takes
            it; `qk_norm_rope` takes the rest, and `values` and `largest` by name, see `reference.qkv_linear`. None: QKV
            are of `linear`.
    """

    linear: Op
    quantize: Op
    gelu: Op
    gelu_concat: Op
    layernorm_modulate: Op
    residual_layernorm_modulate: Op
    qk_norm_rope: Op
    gelu_linear: Op | None = None
    residual_linear: Op | None = None
    attention_quantize: Op | None = None
    grouped: GroupedOps | None = None
    qkv_linear: Op | None = None


REFERENCE = BlockOps(
    linear=RowwiseFloat8Linear.from_linears,
    quantize=quantize_rowwise,
    gelu=reference.gelu_quantize,
    gelu_concat=reference.gelu_concat_quantize,
    layernorm_modulate=reference.layernorm_modulate_quantize,
    residual_layernorm_modulate=reference.residual_layernorm_modulate_quantize,
    qk_norm_rope=reference.qk_norm_rope_quantize,
)


def epilogue_linears(kind: type[RowwiseFloat8EpilogueLinear], **operations: Op) -> Op:
    """(linears) -> module of this kind, for `BlockOps`; the operations are `gemm`'s, or their references."""
    return lambda linears: kind(*stack_linears(linears), **operations)


def with_values(norm_rope: Op, operation: Op) -> dict[str, Op]:
    """What of `BlockOps` is another where `operation`, the GEMM of QKV, writes V; both are kernels or references."""

    def qk_norm_rope(*args: Any, values: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *norm_rope(*args), values, largest

    linear = epilogue_linears(RowwiseFloat8QkvLinear, operation=operation)
    return {"qk_norm_rope": qk_norm_rope, "qkv_linear": linear}


def triton_ops(
    *,
    quantize: bool = True,
    qk_rope: bool = True,
    quantize_rows: bool = True,
    hadamard: bool = False,
    transposed_v: bool = False,
    gelu_epilogue: bool = False,
    residual_epilogue: bool = False,
    attention_epilogue: bool = False,
    grouped: bool = False,
    value_epilogue: bool = False,
) -> BlockOps:
    """`REFERENCE` with Triton kernels instead.

    Args:
        quantize: for what is quantised behind GELU, concatenation or norm.
        qk_rope: for QK norm and RoPE.
        quantize_rows: for what is quantised as it is, the attention output of the double blocks. Inductor makes two
            kernels of it: the row maxima, then the codes with the two streams apart.
        hadamard: `qk_rope` with the Hadamard transform of q and k in front of the cast.
        transposed_v: `hadamard`, with q and v as `flash.coded_attention` takes them.
        gelu_epilogue: for GELU and its quantisation, in quack's GEMM in front.
        residual_epilogue: for gated residuals, in quack's GEMMs in front.
        attention_epilogue: for the attention's output, in `flash.coded_attention_quantize`.
        grouped: for both streams of a double block together, in quack's grouped GEMMs.
        value_epilogue: for V in e4m3 and transposed, in quack's GEMM of QKV.

    Raises:
        ImportError: if Triton, or quack for an epilogue, is not installed.
        ValueError: for `hadamard` without `qk_rope`, whose kernel it is in, and for `transposed_v` without both; for
            `attention_epilogue` without `transposed_v` or with a row that GELU's kernel would quantise as a whole; for
            `grouped` without both other epilogues; for `value_epilogue` without `attention_epilogue` and `grouped`.
    """
    if (hadamard and not qk_rope) or (transposed_v and not hadamard):
        raise ValueError("hadamard is done by the kernel of qk_rope, and v transposed beside both: ask for all of them")
    if attention_epilogue and not (transposed_v and gelu_epilogue):
        raise ValueError("attention_epilogue is for v transposed, and leaves room for what gelu_epilogue writes beside")
    if grouped and not (gelu_epilogue and residual_epilogue):
        raise ValueError("grouped GEMMs are those of gelu_epilogue and residual_epilogue: ask for both")
    if value_epilogue and not (attention_epilogue and grouped):
        raise ValueError("value_epilogue is for v as attention_epilogue takes it, in grouped GEMMs: ask for both")
    from fluxfast.kernels import activations, norms, qkv

    changes: dict[str, Any] = {}
    if quantize:
        changes.update(
            gelu=activations.gelu_quantize,
            gelu_concat=activations.gelu_concat_quantize,
            layernorm_modulate=norms.layernorm_modulate_quantize,
            residual_layernorm_modulate=norms.residual_layernorm_modulate_quantize,
        )
    if qk_rope:
        plain = qkv.qk_norm_rope_hadamard_quantize if hadamard else qkv.qk_norm_rope_quantize
        changes.update(qk_norm_rope=qkv.qk_norm_rope_hadamard_quantize_transposed if transposed_v else plain)
    if attention_epilogue:
        from fluxfast.kernels import flash

        changes.update(qk_norm_rope=qkv.qk_norm_rope_hadamard_quantize_mixed)
        changes.update(attention_quantize=flash.coded_attention_quantize)
    if quantize_rows:
        changes.update(quantize=activations.quantize_rows)
    if gelu_epilogue or residual_epilogue:
        from fluxfast.kernels import gemm

        if gelu_epilogue:
            operations = {"operation": gemm.gelu_linear_quantize, "beside": gemm.gelu_linear_quantize_beside}
            changes.update(gelu_linear=epilogue_linears(RowwiseFloat8GeluLinear, **operations))
        if residual_epilogue:
            operation = gemm.residual_linear
            changes.update(residual_linear=epilogue_linears(RowwiseFloat8ResidualLinear, operation=operation))
        if grouped:
            changes.update(
                grouped=GroupedOps(
                    layernorm_modulate=norms.grouped_layernorm_modulate_quantize,
                    linear=gemm.grouped_linear,
                    gelu_linear=gemm.grouped_gelu_linear_quantize,
                    residual_linear=gemm.grouped_residual_linear,
                )
            )
        if value_epilogue:
            from fluxfast.kernels import projections

            changes.update(with_values(qkv.qk_norm_rope_hadamard_quantize_without_values, projections.qkv_linear))
            changes["grouped"] = dataclasses.replace(changes["grouped"], linear=projections.grouped_qkv_linear)
    return dataclasses.replace(REFERENCE, **changes)


def _exact_layernorm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, None]:
    return reference.layernorm_modulate_value(x, shift, scale, eps).to(x.dtype), None


def _exact_residual_layernorm(
    residual: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    residual = reference.gated_residual(residual, y, gate)
    return residual, *_exact_layernorm(residual, shift, scale, eps)


EXACT = BlockOps(
    linear=DenseLinear.from_linears,
    quantize=lambda x: (x, None),
    gelu=lambda x: (F.gelu(x, approximate="tanh"), None),
    gelu_concat=lambda attn_out, mlp: (reference.gelu_concat(attn_out, mlp).to(mlp.dtype), None),
    layernorm_modulate=_exact_layernorm,
    residual_layernorm_modulate=_exact_residual_layernorm,
    qk_norm_rope=lambda qkv, *args: tuple(part.to(qkv.dtype) for part in reference.qk_norm_rope(qkv, *args)),
)

"""What each fused kernel computes, in plain PyTorch: the specification, and what Inductor gets to fuse without Triton.

Every function computes in float32 from its inputs and rounds once, at the end. diffusers in bfloat16 rounds after every
operation; Inductor drops those intermediate roundings too, so the difference is not a change of model.

Rows are tokens. A per-sample vector such as `shift` has shape (B, D); row r of M rows belongs to sample r // (M // B).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fluxfast.kernels.rowwise import AMAX_FLOOR, E4M3, E4M3_MAX, cast_e4m3, quantize_rowwise

Quantized = tuple[torch.Tensor, torch.Tensor]

PADDING = 16
"""Tokens among which `transposed_values` changes the order, and of which it has a multiple."""
SUM_ROWS = 8
"""Behind a head's channels: a row of ones, and zeros up to what tensor cores multiply with."""
TOP_CODE = 126
"""e4m3's of 448; the next is NaN."""
CODES_A_BINADE = 8
"""Three bits of mantissa."""
LARGEST_BINADE = 256
"""Of a probability before it is scaled: up to there, half precision tells its codes apart."""


def code_scale(dim: int) -> float:
    """What `coded_attention` wants queries of this head size multiplied by: a product is then a number of codes."""
    return CODES_A_BINADE * math.log2(math.e) * dim**-0.5


def per_sample(x: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (M, D) and vectors (B, D) as float32 (B, M // B, D) and (B, 1, D), so that they broadcast.

    Raises:
        ValueError: if M is not a multiple of B.
    """
    if len(x) % len(vector):
        raise ValueError(f"{len(x)} rows cannot be shared evenly by {len(vector)} samples: M must be a multiple of B")
    return x.float().unflatten(0, (len(vector), len(x) // len(vector))), vector.float()[:, None]


def gelu_concat(attn_out: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    """[attn_out, gelu_tanh(mlp)] along the last axis: (M, D), (M, H) -> float32 (M, D + H)."""
    return torch.cat([attn_out.float(), F.gelu(mlp.float(), approximate="tanh")], dim=-1)


def layernorm_modulate_value(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """layer_norm(x) * (1 + scale) + shift, without affine weights: (M, D), (B, D), (B, D) -> float32 (M, D)."""
    normed, scale = per_sample(F.layer_norm(x.float(), x.shape[-1:], eps=eps), scale)
    return (normed * (1 + scale) + shift.float()[:, None]).flatten(0, 1)


def gated_residual(residual: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """residual + gate * y, rounded once to the type of `residual`: (M, D), (M, D), (B, D) -> (M, D)."""
    value, gate = per_sample(y, gate)
    return (residual.float() + (gate * value).flatten(0, 1)).to(residual.dtype)


def norm_rope(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the head dimension, then rotary embedding of interleaved pairs.

    Args:
        x: (B, S, H, Dh). weight: (Dh,). cos, sin: (S, Dh), each angle twice in a row, as `FluxPosEmbed` returns them.

    Returns:
        float32 (B, S, H, Dh); the convention of diffusers' `apply_rotary_emb(use_real_unbind_dim=-1)`.
    """
    x = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos[:, None].float() + turned * sin[:, None].float()


def qk_norm_rope(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    text_qkv: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised, rotated q and k and plain v of one or two streams, text first: float32 (B, S_txt + S_img, H, Dh)."""
    head_dim = norm_q.shape[0]
    text_tokens = 0 if text_qkv is None else text_qkv.shape[1]
    streams = [(qkv, norm_q, norm_k, slice(text_tokens, None))]
    if text_qkv is not None:
        streams.insert(0, (text_qkv, text_norm_q, text_norm_k, slice(0, text_tokens)))
    parts = []
    for stream, weight_q, weight_k, tokens in streams:
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in stream.chunk(3, dim=-1))
        q, k = (norm_rope(part, w, cos[tokens], sin[tokens], eps) for part, w in ((q, weight_q), (k, weight_k)))
        parts.append((q, k, v.float()))
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Mixes the channels of a head by the orthonormal Hadamard matrix of order 64.

    Products of two vectors so treated are what they were, and a channel that is large in both, whose rounding would be
    most of a product's error, is spread over 64. FlashAttention-3's paper (arXiv 2407.08608) calls it incoherent
    processing and flips signs at random first, lest equal channels end up in one; q and k have no such channels.

    Args:
        x: (..., Dh), Dh a multiple of 64. As (8, Dh / 64, 8) it is mixed along the first and the last axis.

    Returns:
        (..., Dh) in another order of channels: what was (8, Dh / 8) is (Dh / 8, 8).
    """
    x = x.unflatten(-1, (2, 2, 2, -1, 2, 2, 2))
    for axis in (-7, -6, -5, -3, -2, -1):
        first, second = x.unbind(axis)
        x = torch.stack([first + second, first - second], dim=axis)
    return (x / 8).flatten(-7).unflatten(-1, (8, -1)).transpose(-1, -2).flatten(-2)


def gelu_quantize(x: torch.Tensor) -> Quantized:
    """Reference of `activations.gelu_quantize`."""
    return quantize_rowwise(F.gelu(x.float(), approximate="tanh"))


def quantize_rows(x: torch.Tensor) -> Quantized:
    """Reference of `activations.quantize_rows`."""
    return quantize_rowwise(x)


def gelu_concat_quantize(attn_out: torch.Tensor, mlp: torch.Tensor) -> Quantized:
    """Reference of `activations.gelu_concat_quantize`."""
    return quantize_rowwise(gelu_concat(attn_out, mlp))


def residual_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """Reference of `gemm.residual_linear`."""
    return gated_residual(residual, scaled_product(q, scale, weight, weight_scale, bias), gate)


def gated_gelu_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reference of `dense.gated_gelu_linear`."""
    gate, up = F.linear(x.float(), weight.float()).unflatten(-1, (-1, 2)).unbind(-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def residual_dense_linear(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Reference of `dense.residual_dense_linear`."""
    return (residual.float() + F.linear(x.float(), weight.float())).to(residual.dtype)


def scaled_product(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """A row-wise float8 Linear without a rounding: (M, K), (M, 1), (N, K), (1, N), (N,) -> float32 (M, N)."""
    return (q.float() @ weight.float().t()) * scale * weight_scale + bias.float()


def gelu_linear_quantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bound: torch.Tensor,
    left: torch.Tensor | None = None,
) -> Quantized:
    """Reference of `gemm.gelu_linear_quantize`."""
    y = scaled_product(q, scale, weight, weight_scale, bias)
    value = F.gelu(y, approximate="tanh") if left is None else gelu_concat(left, y)
    scale = scale * bound[0] + bound[1]
    if left is not None:
        scale = torch.maximum(scale, quantize_rowwise(left)[1])
    return cast_e4m3(value / scale), scale


def gelu_linear_quantize_beside(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    codes: torch.Tensor,
    out_scale: torch.Tensor,
) -> None:
    """Reference of `gemm.gelu_linear_quantize_beside`."""
    value = F.gelu(scaled_product(q, scale, weight, weight_scale, bias), approximate="tanh")
    codes[:, codes.shape[1] - len(weight) :] = cast_e4m3(value / out_scale)


def grouped(
    operation: Callable[..., Any], text_tokens: int, joint: Sequence[torch.Tensor], both: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """An operation on rows, for the text's tokens and for the image's, whose weights and vectors are others.

    Args:
        text_tokens: T.
        joint: its first arguments, (B, T + S, ...), text first. both: the rest, (2, ...), text first.

    Returns:
        What it returns for the rows of each, together: (B, T + S, ...).
    """
    found = []
    for group, tokens in enumerate((slice(0, text_tokens), slice(text_tokens, None))):
        out = operation(*(x[:, tokens].flatten(0, 1) for x in joint), *(x[group] for x in both))
        found.append((out,) if isinstance(out, torch.Tensor) else out)
    joined = []
    for text, image in zip(*found, strict=True):
        x = text.new_empty((*joint[0].shape[:2], text.shape[-1]))
        x[:, :text_tokens], x[:, text_tokens:] = (y.unflatten(0, (len(x), -1)) for y in (text, image))
        joined.append(x)
    return tuple(joined)


def grouped_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    text_tokens: int,
) -> torch.Tensor:
    """Reference of `gemm.grouped_linear`."""
    return grouped(scaled_product, text_tokens, (q, scale), (weight, weight_scale, bias))[0].to(torch.bfloat16)


def qkv_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    samples: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `projections.qkv_linear`."""
    y = scaled_product(q, scale, weight, weight_scale, bias).unflatten(0, (samples, -1))
    qk, values, largest = _with_values(y)
    return qk.flatten(0, 1), values, largest


def grouped_qkv_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `projections.grouped_qkv_linear`."""
    return _with_values(grouped(scaled_product, text_tokens, (q, scale), (weight, weight_scale, bias))[0])


def _with_values(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """QKV (B, S, 3 * H * 128) as `projections.qkv_linear` gives it."""
    *qk, v = qkv.chunk(3, dim=-1)
    v = cast_e4m3(v.unflatten(-1, (-1, 128)))
    return torch.cat(qk, dim=-1).to(torch.bfloat16), transposed_values(v, mixed=True), largest_value(v)


def largest_value(v: torch.Tensor) -> torch.Tensor:
    """Of each sample (B, ...) in e4m3, the largest magnitude of what is not NaN, (B,) float32."""
    return v.float().abs().nan_to_num().flatten(1).amax(1)


def grouped_gelu_linear_quantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bound: torch.Tensor,
    text_tokens: int,
) -> Quantized:
    """Reference of `gemm.grouped_gelu_linear_quantize`."""
    both = (weight, weight_scale, bias, bound)
    codes, out_scale = grouped(gelu_linear_quantize, text_tokens, (q, scale), both)
    return codes, out_scale


def grouped_residual_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    text_tokens: int,
) -> torch.Tensor:
    """Reference of `gemm.grouped_residual_linear`."""

    def add(q, scale, residual, weight, weight_scale, bias, gate):
        return residual_linear(q, scale, weight, weight_scale, bias, residual, gate)

    both = (weight, weight_scale, bias, gate.transpose(0, 1))
    return grouped(add, text_tokens, (q, scale, residual), both)[0]


def grouped_layernorm_modulate_quantize(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, text_tokens: int, eps: float = 1e-6
) -> Quantized:
    """Reference of `norms.grouped_layernorm_modulate_quantize`."""
    operation = functools.partial(layernorm_modulate_quantize, eps=eps)
    q, q_scale = grouped(operation, text_tokens, (x,), (shift.transpose(0, 1), scale.transpose(0, 1)))
    return q, q_scale


def layernorm_modulate_quantize(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> Quantized:
    """Reference of `norms.layernorm_modulate_quantize`."""
    return quantize_rowwise(layernorm_modulate_value(x, shift, scale, eps))


def layernorm_modulate_quantize_with_value(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `norms.layernorm_modulate_quantize_with_value`."""
    value = layernorm_modulate_value(x, shift, scale, eps)
    return *quantize_rowwise(value), value.to(x.dtype)


def residual_layernorm_modulate_quantize(
    residual: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `norms.residual_layernorm_modulate_quantize`."""
    residual = gated_residual(residual, y, gate)
    return residual, *layernorm_modulate_quantize(residual, shift, scale, eps)


def qk_norm_rope_quantize(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    text_qkv: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qkv.qk_norm_rope_quantize`."""
    parts = qk_norm_rope(qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    return tuple(cast_e4m3(part) for part in parts)


def qk_norm_rope_hadamard_quantize(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    text_qkv: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qkv.qk_norm_rope_hadamard_quantize`."""
    q, k, v = qk_norm_rope(qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    return cast_e4m3(hadamard(q)), cast_e4m3(hadamard(k)), cast_e4m3(v)


def qk_norm_rope_hadamard_quantize_transposed(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    text_qkv: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qkv.qk_norm_rope_hadamard_quantize_transposed`."""
    q, k, v = qk_norm_rope(qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q = hadamard(q) * code_scale(q.shape[-1])
    return cast_e4m3(q), cast_e4m3(hadamard(k)), transposed_values(cast_e4m3(v))


def qk_norm_rope_hadamard_quantize_mixed(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    text_qkv: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qkv.qk_norm_rope_hadamard_quantize_mixed`."""
    q, k, v = qk_norm_rope(qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q, v = hadamard(q) * code_scale(q.shape[-1]), cast_e4m3(v)
    return cast_e4m3(q), cast_e4m3(hadamard(k)), transposed_values(v, mixed=True), largest_value(v)


def qk_norm_rope_hadamard_quantize_without_values(
    qk: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    text_qk: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `qkv.qk_norm_rope_hadamard_quantize_without_values`."""

    def with_v(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, x.shape[-1] // 2))

    text_qkv = None if text_qk is None else with_v(text_qk)
    q, k, _ = qk_norm_rope(with_v(qk), norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q = hadamard(q) * code_scale(q.shape[-1])
    return cast_e4m3(q), cast_e4m3(hadamard(k))


def transposed_shape(batch: int, tokens: int, heads: int, dim: int) -> tuple[int, int, int, int]:
    """Of `transposed_values`."""
    return batch, heads, dim + SUM_ROWS, -(-tokens // PADDING) * PADDING


def _token_order(places: int, device: torch.device) -> torch.Tensor:
    """Which token stands where in `transposed_values`, tokens past the end included."""
    place = torch.arange(places, device=device)
    inner = place % PADDING
    return place - inner + inner % 2 * 8 + inner // 2


def _channel_order(dim: int, device: torch.device) -> torch.Tensor:
    """Which channel stands where in `transposed_values` with `mixed`."""
    place = torch.arange(dim, device=device)
    inner = place % 16
    return place - inner + inner % 8 // 2 * 4 + inner // 8 * 2 + inner % 2


def transposed_values(v: torch.Tensor, *, mixed: bool = False) -> torch.Tensor:
    """V as `flash.coded_attention` multiplies with it: channels in front of tokens.

    Args:
        v: (B, S, H, Dh) float8_e4m3fn.
        mixed: of every 16 channels too the order is another, 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15: a thread holds
            outputs of two neighbours and of the two 8 further, and writes codes of four neighbours. Dh is a multiple
            of 16.

    Returns:
        (B, H, Dh + 8, S'), S' the next multiple of 16. Row Dh is one for every token, the seven behind it are zero, and
        so is everything past the last token. Of every 16 tokens the order is 0 8 1 9 2 10 3 11 4 12 5 13 6 14 7 15:
        a thread of a tensor core holds probabilities of two neighbours and of the two 8 further, and multiplies four
        neighbours. Of a product's rows it holds two that are 8 apart, which is why they stand side by side.
    """
    tokens, dim = v.shape[1], v.shape[3]
    rows = torch.zeros(transposed_shape(*v.shape), device=v.device)
    channels = _channel_order(dim, v.device) if mixed else torch.arange(dim, device=v.device)
    rows[:, :, :dim, :tokens] = v.float().permute(0, 2, 3, 1)[:, :, channels]
    rows[:, :, dim, :tokens] = 1
    return rows[..., _token_order(rows.shape[-1], v.device)].to(E4M3)


def coded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Reference of `flash.coded_attention`: one scale a row, where the kernel may have had smaller ones on its way."""
    return _coded_attention(query, key, value).to(torch.bfloat16)


def coded_attention_quantize(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    largest: torch.Tensor,
    scale: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    beside: int = 0,
) -> Quantized:
    """Reference of `flash.coded_attention_quantize`; the columns beside are zeros."""
    batch, tokens, _, dim = query.shape
    out = torch.empty(query.shape, device=query.device)
    out[..., _channel_order(dim, query.device)] = _coded_attention(query, key, value)
    unit = (largest.clamp(min=AMAX_FLOOR) / E4M3_MAX).repeat_interleave(tokens)[:, None]
    if scale is not None and bound is not None:
        unit = torch.fmax(unit, scale * bound[0] + bound[1])
    codes = cast_e4m3(out.view(batch * tokens, -1) / unit)
    return torch.cat([codes.float(), codes.new_zeros((len(codes), beside), dtype=torch.float32)], -1).to(E4M3), unit


def _coded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Before it is rounded: float32 (B, S, H, Dh), channels in the order of `value`."""
    tokens, dim = query.shape[1], query.shape[3]
    rows = torch.empty_like(value, dtype=torch.float32)
    rows[..., _token_order(value.shape[-1], value.device)] = value.float()
    q, k, v = query.float().transpose(1, 2), key.float().transpose(1, 2), rows[:, :, :dim, :tokens]
    scores = (q @ k.transpose(-1, -2)).half().float()
    binade = (scores.amax(-1, keepdim=True) / CODES_A_BINADE).ceil().clamp(min=-LARGEST_BINADE)
    places = scores + torch.where(binade <= LARGEST_BINADE, TOP_CODE - CODES_A_BINADE * binade, torch.nan)
    codes = places.clamp(min=0).round().to(torch.uint8).view(E4M3).float()
    probabilities = torch.where(places.isnan(), torch.nan, codes)
    out = probabilities @ v.transpose(-1, -2) / probabilities.sum(-1, keepdim=True)
    return out.transpose(1, 2).contiguous()


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `group_norm.group_norm_silu`.

    The moments of the channels first, then those of the groups: of `F.group_norm` Inductor makes a reduction that reads
    NHWC memory once for every channel of a group.
    """

    def of_channels(vector: torch.Tensor) -> torch.Tensor:
        return vector.float().view(-1, x.shape[1], *(1 for _ in x.shape[2:]))

    value = x.float() if x_bias is None else x.float() + of_channels(x_bias)
    variance, mean = (
        moment.unflatten(1, (groups, -1)) for moment in torch.var_mean(value.flatten(2), dim=2, correction=0)
    )
    group_mean = mean.mean(2, keepdim=True)
    group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
    scale = torch.rsqrt(group_variance + eps).expand_as(mean).flatten(1) * weight.float()
    y = (value - of_channels(group_mean.expand_as(mean).flatten(1))) * of_channels(scale) + of_channels(bias)
    return (F.silu(y) if silu else y).to(x.dtype)

"""QK RMSNorm + RoPE + concatenation of the text and image streams + e4m3 cast, in front of attention in fp8.

Traffic at FLUX's size (4352 tokens, 24 heads x 128): 80 MB of qkv read, 40 MB of e4m3 written, a floor of 28 us at 4.3
TB/s; cos and sin (4.5 MB in float32) stay in the L2 cache. The Hadamard transform adds nothing to that: a thread mixes
the eight neighbours that it has loaded, then each head goes through shared memory, for it to mix eight that were far
apart. `coded_attention` wants V transposed: that is a kernel of its own then, through shared memory too, or done by the
GEMM in front (`projections.qkv_linear`), which leaves Q and K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from fluxfast.kernels.device import magnitude_bits, require_runnable, to_e4m3
from fluxfast.kernels.reference import PADDING, SUM_ROWS, code_scale, transposed_shape
from fluxfast.kernels.rowwise import E4M3

HEADS_PER_PROGRAM = 8
NUM_WARPS = 4
TRANSPOSED_TOKENS = 64
"""A program's of the kernel that transposes."""


@triton.jit
def _norm_rope(x, weight, cos, sin, eps, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """RMSNorm and rotation of interleaved pairs of (GROUP, HEAD_DIM) in float32, as all arguments are."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps) * weight
    even, odd = tl.split(tl.reshape(x, [GROUP, HEAD_DIM // 2, 2]))
    turned = tl.reshape(tl.join(-odd, even), [GROUP, HEAD_DIM])
    return x * cos + turned * sin


@triton.jit
def _mix_eight(x):
    """The Hadamard matrix of order 8, unscaled, along the last three of five axes, each of length 2."""
    for _ in tl.static_range(3):
        first, second = tl.split(x)
        # The next of the three axes comes last; after three rounds they stand as before.
        x = tl.permute(tl.join(first + second, first - second), (0, 1, 4, 2, 3))
    return x


@triton.jit
def _hadamard(x, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """`reference.hadamard` of (GROUP, HEAD_DIM)."""
    x = _mix_eight(tl.reshape(x, [GROUP, HEAD_DIM // 8, 2, 2, 2]))
    x = tl.permute(tl.reshape(x, [GROUP, 8, HEAD_DIM // 8]), (0, 2, 1))
    x = _mix_eight(tl.reshape(x, [GROUP, HEAD_DIM // 8, 2, 2, 2]))
    return tl.reshape(x, [GROUP, HEAD_DIM]) * 0.125


@triton.jit
def _one_stream(
    qkv, weight_q_ptr, weight_k_ptr, cos, sin, q, k, v, offsets, mask, dims, eps,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HADAMARD: tl.constexpr, Q_SCALE: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """One token of one stream: `qkv` points at its values, WIDTH each, q, k, v at its heads in the outputs."""
    value_q = tl.load(qkv + offsets, mask=mask, other=0.0).to(tl.float32)
    value_k = tl.load(qkv + WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
    if WITH_V:
        value_v = tl.load(qkv + 2 * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
    weight_q = tl.load(weight_q_ptr + dims).to(tl.float32)
    weight_k = tl.load(weight_k_ptr + dims).to(tl.float32)
    turned_q = _norm_rope(value_q, weight_q, cos, sin, eps, GROUP, HEAD_DIM)
    turned_k = _norm_rope(value_k, weight_k, cos, sin, eps, GROUP, HEAD_DIM)
    if HADAMARD:
        turned_q, turned_k = _hadamard(turned_q, GROUP, HEAD_DIM), _hadamard(turned_k, GROUP, HEAD_DIM)
    if Q_SCALE != 1:
        turned_q *= Q_SCALE
    tl.store(q + offsets, to_e4m3(turned_q), mask=mask)
    tl.store(k + offsets, to_e4m3(turned_k), mask=mask)
    if WITH_V:
        tl.store(v + offsets, to_e4m3(value_v), mask=mask)


@triton.jit
def _qk_norm_rope_kernel(
    text_ptr,
    image_ptr,
    text_norm_q,
    text_norm_k,
    norm_q,
    norm_k,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    largest_ptr,
    text_batch_stride,
    text_stride,
    image_batch_stride,
    image_stride,
    cos_stride,
    sin_stride,
    text_tokens,
    tokens,
    eps: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HADAMARD: tl.constexpr,
    Q_SCALE: tl.constexpr,
    WITH_V: tl.constexpr,
    WITH_LARGEST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tokens
    token = program % tokens
    if WITH_LARGEST:  # noqa: SIM102 - decided when the kernel is compiled
        # For the kernel behind this one, which finds the maximum.
        if (token == 0) & (tl.program_id(1) == 0):
            tl.store(largest_ptr + sample, 0)
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    # Weights, cos and sin are read once a head, in the layout of q: as (HEAD_DIM,) they would go through shared memory.
    dims = tl.broadcast_to(tl.arange(0, HEAD_DIM)[None, :], [GROUP, HEAD_DIM])
    offsets = heads[:, None] * HEAD_DIM + dims
    mask = (heads < HEADS)[:, None]
    cos = tl.load(cos_ptr + token * cos_stride + dims).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + dims).to(tl.float32)

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    q = q_ptr + program * WIDTH
    k = k_ptr + program * WIDTH
    v = v_ptr + program * WIDTH
    # Two inlined bodies, not a selected pointer: each keeps what the compiler knows of its pointer's alignment.
    if token < text_tokens:
        text = text_ptr + sample * text_batch_stride + token * text_stride
        _one_stream(
            text, text_norm_q, text_norm_k, cos, sin, q, k, v, offsets, mask, dims, eps,
            WIDTH, GROUP, HEAD_DIM, HADAMARD, Q_SCALE, WITH_V,
        )  # fmt: skip
    else:
        image = image_ptr + sample * image_batch_stride + (token - text_tokens) * image_stride
        _one_stream(
            image, norm_q, norm_k, cos, sin, q, k, v, offsets, mask, dims, eps,
            WIDTH, GROUP, HEAD_DIM, HADAMARD, Q_SCALE, WITH_V,
        )  # fmt: skip


@triton.jit
def _transpose_v_kernel(
    text_ptr,
    image_ptr,
    out_ptr,
    largest_ptr,
    text_batch_stride,
    text_stride,
    image_batch_stride,
    image_stride,
    text_tokens,
    tokens,
    padded,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SUMS: tl.constexpr,
    PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    WITH_LARGEST: tl.constexpr,
):
    """V of one head and some tokens, and the rows behind it: see `reference.transposed_values`.

    WITH_LARGEST: its channels are mixed, and of each sample the largest magnitude is found, in the bits of a float32.
    """
    lane = tl.program_id(1).to(tl.int64)
    sample, head = lane // HEADS, lane % HEADS
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inner = place % PAD
    token = place - inner + inner % 2 * 8 + inner // 2
    dims = 2 * HEADS * HEAD_DIM + head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    is_text, exists = (token < text_tokens)[:, None], (token < tokens)[:, None]
    text = text_ptr + sample * text_batch_stride + token[:, None].to(tl.int64) * text_stride + dims[None, :]
    image = image_ptr + sample * image_batch_stride + (token - text_tokens)[:, None].to(tl.int64) * image_stride
    # No program has two streams to load but the one with the border.
    v = tl.load(text, mask=is_text & exists, other=0.0).to(tl.float32)
    v += tl.load(image + dims[None, :], mask=exists & (is_text == 0), other=0.0).to(tl.float32)
    out = out_ptr + lane * (HEAD_DIM + SUMS) * padded + place[None, :]
    inside = (place < padded)[None, :]
    codes = to_e4m3(v)
    channel = tl.arange(0, HEAD_DIM)
    if WITH_LARGEST:
        bits = tl.where(v != v, 0, magnitude_bits(codes.to(tl.float32)))
        tl.atomic_max(largest_ptr + sample, tl.max(bits), sem="relaxed")
        channel = channel // 16 * 16 + channel % 4 // 2 * 8 + channel % 16 // 4 * 2 + channel % 2
    tl.store(out + channel[:, None] * padded, tl.trans(codes), mask=inside)
    row = tl.arange(0, SUMS)[:, None]
    ones = tl.where((row == 0) & (token < tokens)[None, :], 1.0, 0.0)
    tl.store(out + (HEAD_DIM + row) * padded, to_e4m3(ones), mask=inside)


def _check(
    qkv: torch.Tensor,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    text: tuple[torch.Tensor | None, ...],
    *,
    hadamard: bool,
    parts: int,
) -> None:
    if any(t is None for t in text) != all(t is None for t in text):
        raise ValueError("text_qkv, text_norm_q and text_norm_k are given together or not at all")
    tokens = qkv.shape[1] + (0 if text[0] is None else text[0].shape[1])
    if cos.shape != (tokens, head_dim) or sin.shape != (tokens, head_dim):
        raise ValueError(
            f"cos and sin must be ({tokens}, {head_dim}) for text and image tokens together, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    least = 64 if hadamard else 2
    if qkv.shape[2] % (parts * head_dim) or (head_dim & (head_dim - 1)) or head_dim < least:
        raise ValueError(
            f"qkv of width {qkv.shape[2]} is not {parts} x heads x head_dim with head_dim {head_dim} a power of 2, "
            f"at least {least}"
        )
    if text[0] is not None and (text[0].shape[0] != qkv.shape[0] or text[0].shape[2] != qkv.shape[2]):
        raise ValueError(f"text_qkv {tuple(text[0].shape)} does not match qkv {tuple(qkv.shape)}")


def _launch(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    text_qkv: torch.Tensor | None,
    text_norm_q: torch.Tensor | None,
    text_norm_k: torch.Tensor | None,
    *,
    hadamard: bool,
    parts: int = 3,
    coded: bool = False,
    with_largest: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Q and K, V if it is one of the parts, and its largest; `coded` is for `coded_attention`, with V transposed."""
    head_dim = norm_q.shape[0]
    _check(qkv, head_dim, cos, sin, (text_qkv, text_norm_q, text_norm_k), hadamard=hadamard, parts=parts)
    text_tokens = 0 if text_qkv is None else text_qkv.shape[1]
    # Without text the text pointers are never read.
    text = qkv if text_qkv is None else text_qkv
    text_norm_q = norm_q if text_norm_q is None else text_norm_q
    text_norm_k = norm_k if text_norm_k is None else text_norm_k
    require_runnable(qkv, text, norm_q, norm_k, text_norm_q, text_norm_k, cos, sin)
    batch, tokens, heads = qkv.shape[0], text_tokens + qkv.shape[1], qkv.shape[2] // (parts * head_dim)
    outputs = _outputs(qkv, tokens, head_dim, parts=parts, transposed=coded)
    # Without V its pointer is never written to.
    q, k, v = outputs[0], outputs[1], outputs[-1]
    largest = qkv.new_empty(batch, dtype=torch.int32) if with_largest else None
    wrap_triton(_qk_norm_rope_kernel)[(batch * tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        text,
        qkv,
        text_norm_q,
        text_norm_k,
        norm_q,
        norm_k,
        cos,
        sin,
        q,
        k,
        v,
        q if largest is None else largest,
        text.stride(0),
        text.stride(1),
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        sin.stride(0),
        text_tokens,
        tokens,
        eps,
        heads,
        HEADS_PER_PROGRAM,
        head_dim,
        hadamard,
        code_scale(head_dim) if coded else 1,
        not coded,
        with_largest,
        num_warps=NUM_WARPS,
    )
    if coded and parts == 3:
        padded = v.shape[-1]
        wrap_triton(_transpose_v_kernel)[(triton.cdiv(padded, TRANSPOSED_TOKENS), batch * heads)](
            text,
            qkv,
            v,
            v if largest is None else largest,
            text.stride(0),
            text.stride(1),
            qkv.stride(0),
            qkv.stride(1),
            text_tokens,
            tokens,
            padded,
            heads,
            head_dim,
            SUM_ROWS,
            PADDING,
            TRANSPOSED_TOKENS,
            with_largest,
            num_warps=NUM_WARPS,
        )
    return outputs if largest is None else (*outputs, largest.view(torch.float32))


def _outputs(
    qkv: torch.Tensor, tokens: int, head_dim: int, *, parts: int = 3, transposed: bool = False
) -> tuple[torch.Tensor, ...]:
    """q, k and v, or the first two, of both streams together, not written yet."""
    shape = (qkv.shape[0], tokens, qkv.shape[2] // (parts * head_dim), head_dim)
    shapes = (shape, shape, transposed_shape(*shape) if transposed else shape)
    return tuple(qkv.new_empty(own, dtype=E4M3) for own in shapes[:parts])


@triton_op("fluxfast::qk_norm_rope_quantize", mutates_args={})
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
    """q, k, v for FlashAttention-3 from the outputs of the QKV GEMMs of one or two streams.

    Args:
        qkv: (B, S, 3 * H * Dh) of the image stream (of the joint stream in a single block); batch and token axes may be
            strided. text_qkv: (B, S_txt, 3 * H * Dh) or None.
        norm_q, norm_k, text_norm_q, text_norm_k: (Dh,) RMSNorm weights; Dh a power of two.
        cos, sin: (S_txt + S, Dh) as `FluxPosEmbed` returns them: each angle twice in a row, text tokens first.

    Returns:
        q, k, v (B, S_txt + S, H, Dh) float8_e4m3fn, unscaled: magnitudes past 448 and infinities in v saturate at 448,
        NaN stays NaN; an infinity in q or k, which RMSNorm divides by itself, makes its channel and the one that RoPE
        turns with it NaN, and so every product with the head.

    Raises:
        ValueError: for shapes that do not fit and tensors that Triton cannot reach.
    """
    arguments = (qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q, k, v = _launch(*arguments, hadamard=False)
    return q, k, v


@triton_op("fluxfast::qk_norm_rope_hadamard_quantize", mutates_args={})
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
    """As `qk_norm_rope_quantize`, q and k behind a Hadamard transform of their channels, see `reference.hadamard`.

    Dh is a power of two, 64 at least. An infinity in q or k makes 64 channels NaN.
    """
    arguments = (qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q, k, v = _launch(*arguments, hadamard=True)
    return q, k, v


@triton_op("fluxfast::qk_norm_rope_hadamard_quantize_transposed", mutates_args={})
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
    """As `qk_norm_rope_hadamard_quantize`, for `coded_attention`: q is multiplied by `reference.code_scale` in front of
    the cast, and v is `reference.transposed_values`."""
    arguments = (qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q, k, v = _launch(*arguments, hadamard=True, coded=True)
    return q, k, v


@triton_op("fluxfast::qk_norm_rope_hadamard_quantize_mixed", mutates_args={})
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
    """As `qk_norm_rope_hadamard_quantize_transposed`, for `coded_attention_quantize`.

    v is `reference.transposed_values(v, mixed=True)`, and behind it comes the largest magnitude in each sample's, of
    what is not NaN, (B,) float32.
    """
    arguments = (qkv, norm_q, norm_k, cos, sin, eps, text_qkv, text_norm_q, text_norm_k)
    q, k, v, largest = _launch(*arguments, hadamard=True, coded=True, with_largest=True)
    return q, k, v, largest


@triton_op("fluxfast::qk_norm_rope_hadamard_quantize_without_values", mutates_args={})
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
    """q and k as of `qk_norm_rope_hadamard_quantize_transposed`, where the GEMM has written V already.

    qk and text_qk have no V: (B, S, 2 * H * Dh).
    """
    arguments = (qk, norm_q, norm_k, cos, sin, eps, text_qk, text_norm_q, text_norm_k)
    q, k = _launch(*arguments, hadamard=True, parts=2, coded=True)
    return q, k


@qk_norm_rope_hadamard_quantize_without_values.register_fake
def _(qk, norm_q, norm_k, cos, sin, eps=1e-6, text_qk=None, text_norm_q=None, text_norm_k=None):
    return _outputs(qk, cos.shape[0], norm_q.shape[0], parts=2)


@qk_norm_rope_hadamard_quantize_mixed.register_fake
def _(qkv, norm_q, norm_k, cos, sin, eps=1e-6, text_qkv=None, text_norm_q=None, text_norm_k=None):
    outputs = _outputs(qkv, cos.shape[0], norm_q.shape[0], transposed=True)
    return *outputs, qkv.new_empty(len(qkv), dtype=torch.float32)


@qk_norm_rope_hadamard_quantize_transposed.register_fake
def _(qkv, norm_q, norm_k, cos, sin, eps=1e-6, text_qkv=None, text_norm_q=None, text_norm_k=None):
    return _outputs(qkv, cos.shape[0], norm_q.shape[0], transposed=True)


@qk_norm_rope_quantize.register_fake
@qk_norm_rope_hadamard_quantize.register_fake
def _(qkv, norm_q, norm_k, cos, sin, eps=1e-6, text_qkv=None, text_norm_q=None, text_norm_k=None):
    return _outputs(qkv, cos.shape[0], norm_q.shape[0])

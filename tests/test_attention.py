"""FA3's processor against the stock one, with its numerics in plain PyTorch in place of the kernel."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxPosEmbed
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast import attention
from fluxfast.attention import (
    E4M3,
    E4M3_MAX,
    Fa3Fp8Processor,
    fa3_fp8,
    fa3_fp8_cast_inside,
    fa3_fp8_split_tail,
    reference_fp8_attention,
    to_e4m3,
)

HEADS, HEAD_DIM, TEXT, IMAGE, BATCH = 2, 128, 6, 16, 2
DIM = HEADS * HEAD_DIM
OPS = [(fa3_fp8, E4M3), (fa3_fp8_split_tail, E4M3), (fa3_fp8_cast_inside, torch.bfloat16)]


def cast_inside(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    assert query.dtype == torch.bfloat16
    return reference_fp8_attention(query.to(E4M3), key.to(E4M3), value.to(E4M3))


def cast_outside(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    assert query.dtype == key.dtype == value.dtype == E4M3
    return reference_fp8_attention(query, key, value)


def make_attention(double: bool) -> FluxAttention:
    """The attention of a double block, or of a single one, with seeded weights in bfloat16."""
    torch.manual_seed(0)
    kind = {"added_kv_proj_dim": DIM, "context_pre_only": False} if double else {"pre_only": True}
    module = FluxAttention(query_dim=DIM, heads=HEADS, dim_head=HEAD_DIM, out_dim=DIM, bias=True, eps=1e-6, **kind)
    return module.to(torch.bfloat16).requires_grad_(False)


def arguments(double: bool) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    text, image = (torch.randn(BATCH, n, DIM, generator=generator).bfloat16() for n in (TEXT, IMAGE))
    places = torch.randint(9, (TEXT + IMAGE, 3), generator=generator).float()
    rotary = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(places)
    if double:
        return {"hidden_states": image, "encoder_hidden_states": text, "image_rotary_emb": rotary}
    return {"hidden_states": torch.cat([text, image], dim=1), "image_rotary_emb": rotary}


def relative_l2(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def test_cast_saturates_and_keeps_nan() -> None:
    """Past 448 lies 448, not NaN; a NaN stays one, so that it is still seen in the image."""
    cast = to_e4m3(torch.tensor([0.0, 1.0, -1e4, 449.0, torch.inf, torch.nan])).float()
    assert cast[:5].tolist() == [0.0, 1.0, -E4M3_MAX, E4M3_MAX, E4M3_MAX] and cast[5].isnan()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("op", [cast_outside, cast_inside])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_processor_agrees_with_the_stock_one(double: bool, op, fused: bool) -> None:
    """Within fp8's error of diffusers' own processor, and not closer than fp8 can be."""
    module = make_attention(double)
    wanted = FluxAttnProcessor()(module, **arguments(double))
    if fused:
        module.fuse_projections()
    got = Fa3Fp8Processor(op, cast_outside=op is cast_outside)(module, **arguments(double))
    for ours, theirs in zip(*((x if double else (x,)) for x in (got, wanted)), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert 1e-4 < relative_l2(ours, theirs) < 0.1


def test_both_casts_are_the_same_numbers() -> None:
    """Where nothing saturates, casting outside only moves the cast: the same bits come out."""
    module = make_attention(double=False)
    outs = [Fa3Fp8Processor(op, op is cast_outside)(module, **arguments(False)) for op in (cast_outside, cast_inside)]
    assert torch.equal(*outs)


def test_mask_is_refused() -> None:
    """A mask that would be ignored is an error."""
    with pytest.raises(ValueError, match="fa3_fp8 takes no attention mask"):
        Fa3Fp8Processor()(make_attention(False), attention_mask=torch.ones(1), **arguments(False))


@pytest.mark.parametrize(("op", "dtype"), OPS)
def test_fake_has_the_real_shape_and_dtype(op, dtype: torch.dtype) -> None:
    """What the compiler is told: bfloat16, the query's shape, contiguous whatever the query's strides."""
    with FakeTensorMode():
        query = torch.empty(BATCH, HEADS, IMAGE, HEAD_DIM, dtype=dtype).transpose(1, 2)
        out = op(query, query, query)
    assert out.shape == query.shape and out.dtype == torch.bfloat16 and out.is_contiguous()


@pytest.mark.parametrize(("op", "dtype"), OPS)
def test_export_sees_one_node(op, dtype: torch.dtype) -> None:
    """The kernel is opaque: an exported program has one call of it and nothing of its inside."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return op(x, x, x)

    query = torch.empty(BATCH, IMAGE, HEADS, HEAD_DIM, dtype=dtype, device="meta")
    targets = [n.target for n in torch.export.export(Module(), (query,)).graph.nodes if n.op == "call_function"]
    assert targets == [op._opoverload]


def test_a_cpu_refuses_the_op() -> None:
    """No silent fallback: the op has no kernel for a CPU."""
    query = torch.zeros(1, 1, 1, HEAD_DIM, dtype=E4M3)
    with pytest.raises(NotImplementedError, match="fluxfast::fa3_fp8"):
        fa3_fp8(query, query, query)


@pytest.mark.parametrize("returned", [lambda out: out, lambda out: (out, None)], ids=["tensor", "tuple"])
def test_launch_counts_and_takes_both_return_conventions(monkeypatch: pytest.MonkeyPatch, returned) -> None:
    """Older builds of FA3 return (out, softmax_lse); every launch counts."""
    monkeypatch.setattr(attention, "_kernel", lambda: lambda q, k, v: returned(q))
    before, query = attention.COUNT.launches, torch.zeros(1)
    assert attention._launch(query, query, query) is query and attention.COUNT.launches == before + 1


H200_SMS = 132


@pytest.mark.parametrize(
    ("tokens", "tail"),
    [
        (4352, (128, 5)),  # 816 tiles: six waves of 132 and 24 tiles, which 120 thread blocks share in a fifth of one
        (4301, (77, 5)),  # the last tile of a head need not be full
        (4224, (0, 1)),  # six waves and nothing left
        (4608, (384, 7)),  # 864 tiles: 72 are left, 504 parts in four waves of a seventh
        (5504, (0, 1)),  # 1032 tiles: 108 of the last 132 are busy
        (512, (0, 1)),  # less than one wave
    ],
)
def test_tail_is_what_would_begin_another_wave(tokens: int, tail: tuple[int, int]) -> None:
    """FLUX.1's sizes on an H200, counted by hand; one launch where a second saves too little."""
    assert attention.tail_of(1, tokens, 24, H200_SMS) == tail


def test_split_tail_writes_every_row_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch takes whole waves, the second the rest over all keys; no row of the output is left as it was."""
    launches = []

    def kernel(query, key, value, *, out, num_splits):
        launches.append((query.shape[1], key.shape[1], num_splits))
        out.copy_(query.float() + num_splits)

    query = torch.randn(1, 40 * attention.TILE - 5, 2, 128).to(E4M3)
    monkeypatch.setattr(attention, "_kernel_into", lambda: kernel)
    monkeypatch.setattr(attention, "processors", lambda: 66)
    before = attention.COUNT.launches, attention.COUNT.looked, attention.COUNT.split
    out = fa3_fp8_split_tail._init_fn(query, query, query)
    rows, splits = attention.tail_of(1, query.shape[1], 2, 66)
    assert launches == [(query.shape[1] - rows, query.shape[1], 1), (rows, query.shape[1], splits)] and splits > 1
    assert torch.equal(out[:, :-rows], (query[:, :-rows].float() + 1).bfloat16())
    assert torch.equal(out[:, -rows:], (query[:, -rows:].float() + splits).bfloat16())
    assert (attention.COUNT.launches, attention.COUNT.looked, attention.COUNT.split) == tuple(n + 1 for n in before)
    assert attention.has_tail(query.shape[1], 2)


def test_split_tail_without_a_tail_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one launch is as good, it is the stock one."""
    query = torch.randn(1, 256, 2, 128).to(E4M3)
    monkeypatch.setattr(attention, "_kernel", lambda: lambda q, k, v: q)
    monkeypatch.setattr(attention, "processors", lambda: 132)
    before = attention.COUNT.looked, attention.COUNT.split
    assert fa3_fp8_split_tail._init_fn(query, query, query) is query
    assert (attention.COUNT.looked, attention.COUNT.split) == (before[0] + 1, before[1])
    assert not attention.has_tail(256, 2)

"""T5's fused blocks against transformers', on a CPU, where the operations compute as their references do."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from fake_hopper import triton_on_a_cpu
from torch import nn
from transformers import T5Config, T5EncoderModel

from fluxfast import t5
from fluxfast.compilation import lay_out_position_bias, position_biases_in_order, text_encoder_layers
from perf_tests.harness.memory import weight_bytes


def encoder(**change: Any) -> T5EncoderModel:
    """Three blocks, heads whose sizes together are not the width."""
    torch.manual_seed(0)
    shape = {"d_model": 48, "d_ff": 80, "d_kv": 16, "num_heads": 4, "num_layers": 3, "vocab_size": 100}
    made = T5EncoderModel(T5Config(**(shape | {"feed_forward_proj": "gated-gelu"} | change)))
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "tokens", "padding"), [(1, 1, 0), (2, 7, 0), (1, 130, 0), (3, 20, 5)])
def test_fused_blocks_compute_what_transformers_do(
    monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, padding: int, attention: str
) -> None:
    """Embeddings of every length, with and without a mask; hidden states of every layer, which transformers records."""
    triton_on_a_cpu(monkeypatch)
    plain = encoder(attn_implementation=attention)
    fused = copy.deepcopy(plain)
    t5.fuse(fused)
    ids = torch.randint(2, 100, (batch, tokens))
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens - padding :] = 0
    given = {"attention_mask": mask} if padding else {}
    want, got = (model(ids, output_hidden_states=True, **given) for model in (plain, fused))
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    lay_out_position_bias(fused)
    torch.testing.assert_close(fused(ids, **given)[0], got.last_hidden_state)


def test_fused_blocks_hold_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes in the same type, the originals gone, and still blocks of T5 to whatever looks for them."""
    triton_on_a_cpu(monkeypatch)
    model = encoder().bfloat16()
    bytes_before, count = weight_bytes(model), len(text_encoder_layers(model))
    assert t5.with_one_projection(model) == 0
    merged = ("q", "k", "v", "wi_0", "wi_1")
    originals = [weakref.ref(p) for name, p in model.named_parameters() if name.split(".")[-2] in merged]
    t5.fuse(model)
    assert len(originals) == 5 * count and not any(original() is not None for original in originals)
    assert weight_bytes(model) == bytes_before and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == count == t5.with_one_projection(model) == 3
    assert not any(p.requires_grad for p in model.parameters())
    lay_out_position_bias(model)
    assert position_biases_in_order(model) == 1


@pytest.mark.parametrize("change", [{"feed_forward_proj": "gated-silu"}, {"feed_forward_proj": "relu"},
                                    {"feed_forward_proj": "gelu_new"}])  # fmt: skip
def test_another_feed_forward_is_refused(change: dict[str, str]) -> None:
    """Of an activation that the epilogue does not compute, or without a gate."""
    model = encoder(**change)
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=f"gated GELU in its tanh form .*, got '{change['feed_forward_proj']}' with"):
        t5.fuse(model)
    assert [*model.state_dict()] == before


def test_exact_gelu_is_refused() -> None:
    """GELU by the error function is another one, gate or not."""
    with pytest.raises(ValueError, match="with 'gelu': load another level"):
        model = encoder()
        model.config.dense_act_fn = "gelu"
        t5.fuse(model)


def test_bias_is_refused() -> None:
    """It would be lost: the sentence names the first Linear that has one."""
    model = encoder()
    model.encoder.block[1].layer[0].SelfAttention.o = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"1 have one, encoder\.block\.1\.layer\.0\.SelfAttention\.o among them"):
        t5.fuse(model)
    assert t5.with_one_projection(model) == 0


def test_other_blocks_are_refused() -> None:
    """What is no block of T5's would be left as it is, and what is fused has no Linears to fuse."""
    model = encoder()
    model.encoder.block[1] = nn.Identity()
    with pytest.raises(ValueError, match="the 3 blocks that transformers makes of T5, got 2 of them, 0 fused before"):
        t5.fuse(model)
    model = encoder()
    t5.fuse(model)
    with pytest.raises(ValueError, match="got 3 of them, 3 fused before"):
        t5.fuse(model)


def test_several_types_are_refused() -> None:
    """As transformers loads T5 in float16."""
    model = encoder()
    model.encoder.block[0].layer[-1].DenseReluDense.wo.half()
    with pytest.raises(
        ValueError, match=r"one type, got torch\.float16 and torch\.float32: load .* in torch\.bfloat16"
    ):
        t5.fuse(model)


def test_training_is_refused() -> None:
    """There is no dropout in an epilogue."""
    with pytest.raises(ValueError, match=r"no dropout: call eval\(\)"):
        t5.fuse(encoder().train())

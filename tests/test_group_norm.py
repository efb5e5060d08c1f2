"""The fused GroupNorm + SiLU and its reference against float64, and the decoder that is built on it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from micro_flux import micro_vae
from test_kernels import CUDA, DEVICE, implementations, needs_kernels, normal, operation, poisoned
from torch import nn

from fluxfast.decoder import FusedGroupNorm, GemmAttnProcessor, fuse_norms, norms, use_gemms_for_attention
from fluxfast.levels import get_level
from fluxfast.proof import decoder_facts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
__all__ = ["poisoned"]

EPS = 1e-6


def nhwc(batch: int, channels: int, *spatial: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return normal(batch, *spatial, channels, dtype=dtype).movedim(-1, 1)


def vectors(channels: int, count: int = 3) -> list[torch.Tensor]:
    """Weight, bias and the bias of the convolution in front."""
    return [1 + normal(channels) / 4, *(normal(channels) for _ in range(count - 1))]


def exact(x, weight, bias, groups, silu, x_bias=None):
    x = x.double() if x_bias is None else x.double() + x_bias.double().view(-1, *(1 for _ in x.shape[2:]))
    y = F.group_norm(x.contiguous(), groups, weight.double(), bias.double(), EPS)
    return F.silu(y) if silu else y


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, atol: float = 2e-5) -> None:
    rtol = 2**-8 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def lost_to_closeness(x, groups, x_bias=None) -> float:
    """What rounding the inputs to float32 costs where a group's values lie close together and far from zero."""
    x = x.double() if x_bias is None else x.double() + x_bias.double().view(-1, *(1 for _ in x.shape[2:]))
    x = x.reshape(x.shape[0], groups, -1)
    spread = (x.var(-1, correction=0) + EPS).sqrt()
    return float(8 * 2**-24 * (x.abs().amax(-1) / spread).max())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps a tile and several tiles a sample, the last ones incomplete, at sizes that a CPU can do."""
    pytest.importorskip("triton")
    from fluxfast.kernels import group_norm

    monkeypatch.setattr(group_norm, "STEP_ELEMENTS", 256)
    monkeypatch.setattr(group_norm, "MAX_TILES", 5)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "spatial"),
    [(1, 128, 32, (9, 7)), (2, 80, 16, (5, 5)), (3, 6, 3, (1, 1)), (1, 512, 32, (3, 11)), (2, 24, 8, (37,))],
)
def test_group_norm(kind, small_tiles, batch, channels, groups, spatial, silu, dtype):
    """Odd sizes, one pixel, groups of 2, 3, 4, 5 and 16 channels, a batch: the float64 value, rounded once."""
    x, (weight, bias, x_bias) = nhwc(batch, channels, *spatial, dtype=dtype), vectors(channels)
    for optional in ((), (x_bias,)):
        y = operation(kind, "group_norm_silu")(x, weight, bias, groups, EPS, silu, *optional)
        assert y.dtype == dtype and y.movedim(1, -1).is_contiguous()
        atol = 2e-5 + lost_to_closeness(x, groups, *optional)
        assert_rounded_once(y, exact(x, weight, bias, groups, silu, *optional), atol=atol)


@implementations
def test_group_norm_of_whole_tiles(kind):
    """The launch as FLUX.1's decoder gets it, the last tile one pixel short."""
    x, (weight, bias, _) = nhwc(1, 128, 31, 33), vectors(128)
    got = operation(kind, "group_norm_silu")(x, weight, bias, 32, EPS, True)
    assert_rounded_once(got, exact(x, weight, bias, 32, True))


@implementations
def test_group_norm_far_from_zero(kind, small_tiles):
    """A mean of a thousand standard deviations costs what float32 has to lose, not what E[x^2] - E[x]^2 would."""
    x, (weight, bias, _) = nhwc(2, 16, 23, 19, dtype=torch.float32) + 1000.0, vectors(16)
    got = operation(kind, "group_norm_silu")(x, weight, bias, 4, EPS, False)
    assert_rounded_once(got, exact(x, weight, bias, 4, False), atol=1e-3)


@implementations
def test_group_norm_of_a_constant(kind, small_tiles):
    """A group without variance is its bias: no rounding of the mean is blown up by 1 / sqrt(eps)."""
    x, (weight, bias, _) = nhwc(1, 12, 11, 13), vectors(12)
    x[:, 3:6] = 1003.0
    got = operation(kind, "group_norm_silu")(x, weight, bias, 4, EPS, False)
    assert torch.equal(got[:, 3:6], bias[3:6].view(1, 3, 1, 1).expand(1, 3, 11, 13))


@implementations
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_group_norm_of_special_values(kind, small_tiles, special):
    """A NaN or an infinity makes its group of its sample NaN, and no other."""
    x, (weight, bias, _) = nhwc(2, 12, 11, 13), vectors(12)
    x[1, 4, 10, 12] = special
    y = operation(kind, "group_norm_silu")(x, weight, bias, 4, EPS, True)
    assert y[1, 3:6].isnan().all()
    y[1, 3:6] = 0
    assert y.isfinite().all()


@needs_kernels
def test_triton_group_norm_repeats(small_tiles):
    """The same bits in every run."""
    x, (weight, bias, x_bias) = nhwc(2, 80, 17, 19), vectors(80)
    first, second = (operation("triton", "group_norm_silu")(x, weight, bias, 16, EPS, True, x_bias) for _ in range(2))
    assert torch.equal(first, second)


@needs_kernels
def test_triton_group_norm_traces():
    """It passes opcheck, compiles as one graph and exports, with the same values as eagerly."""
    op = operation("triton", "group_norm_silu")
    x, (weight, bias, x_bias) = nhwc(2, 16, 5, 3), vectors(16)
    arguments = (x, weight, bias, 4, EPS, True, x_bias)
    checks = ["test_schema", "test_faketensor"] + (["test_aot_dispatch_dynamic"] if CUDA else [])
    torch.library.opcheck(op, arguments, test_utils=checks)
    expected = op(*arguments)

    class Calls(torch.nn.Module):
        def forward(self, x, weight, bias, x_bias):
            return op(x, weight, bias, 4, EPS, True, x_bias)

    tensors = (x, weight, bias, x_bias)
    compiled = torch.compile(Calls(), fullgraph=True, backend="inductor" if CUDA else "eager")
    exported = torch.export.export(Calls(), tensors).module()
    assert all(torch.equal(call(*tensors), expected) for call in (compiled, exported))


@needs_kernels
def test_triton_group_norm_refuses_what_does_not_fit():
    """Other memory orders, vectors, groups and types raise before anything is launched."""
    op, x, (weight, bias, _) = operation("triton", "group_norm_silu"), nhwc(1, 8, 4, 4), vectors(8)
    for arguments, words in (
        ((x.contiguous(), weight, bias, 4), "channels_last"),
        ((x, weight, bias, 3), "multiple of 3 groups"),
        ((x, weight[1:], bias, 4), "expected"),
        ((x.half(), weight, bias, 4), "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*arguments, EPS, True)


@needs_kernels
def test_triton_group_norm_of_nothing():
    """An empty batch has an empty result."""
    x, (weight, bias, _) = nhwc(0, 8, 4, 4), vectors(8)
    assert operation("triton", "group_norm_silu")(x, weight, bias, 4, EPS, True).shape == (0, 8, 4, 4)


@pytest.fixture
def decoders():
    """The micro decoder in NHWC and float32, as it is and with fused norms, and latents."""
    pytest.importorskip("triton")
    stock = micro_vae().decoder.to(memory_format=torch.channels_last).requires_grad_(False)
    for module in stock.modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d):
            module.bias.normal_(std=0.3)
    fused = copy.deepcopy(stock)
    fuse_norms(fused)
    use_gemms_for_attention(fused)
    return stock, fused, torch.randn(2, 16, 3, 5)


def test_decoder_has_no_norm_left(decoders):
    """As many norms as before, all fused; no activation but theirs; every bias in front of a norm is the norm's."""
    stock, fused, _ = decoders
    assert len(norms(fused)) == len(norms(stock)) == 2 * 10 + 2
    assert all(isinstance(norm, FusedGroupNorm) for norm in norms(fused))
    assert sum(norm.silu for norm in norms(fused)) == 2 * 10 + 1
    assert not [module for module in fused.modules() if isinstance(module, nn.SiLU)]
    assert sum(norm.x_bias is not None for norm in norms(fused)) == 10
    parameters = [sum(p.numel() for p in decoder.parameters()) for decoder in (stock, fused)]
    assert parameters[0] == parameters[1]


@implementations
def test_decoder_draws_the_same_image(kind, decoders):
    """Convolutions, upsampling and attention hand every norm NHWC memory, and the image is the stock decoder's."""
    stock, fused, latents = decoders
    for norm in norms(fused):
        norm.operation = operation(kind, "group_norm_silu")
    decoder, latents = fused.to(DEVICE), latents.to(DEVICE)
    torch.testing.assert_close(decoder(latents), stock.to(DEVICE)(latents), rtol=1e-4, atol=1e-4)


def test_decoder_is_proven(decoders):
    """A norm that was left out, one of another level, and a SiLU that would be applied twice, are noticed."""
    stock, fused, _ = decoders
    fast, plain = get_level("fast_decode"), get_level("fast_encode")
    assert [(f.observed, f.expected) for f in decoder_facts(fused, fast)] == [(22, 22), (0, 0), (1, 1), (0, 0)]
    assert [(f.observed, f.expected) for f in decoder_facts(stock, plain)] == [(0, 0), (0, 0), (0, 0)]
    fused.conv_act = nn.SiLU()
    assert [f.holds for f in decoder_facts(fused, fast)] == [True, False, True, True]
    fused.conv_norm_out = stock.conv_norm_out
    assert [f.observed for f in decoder_facts(fused, fast)] == [21, 1, 1, 0]
    assert not decoder_facts(stock, fast)[0].holds and not decoder_facts(fused, plain)[0].holds
    assert [decoder_facts(stock, fast)[-2].observed, decoder_facts(fused, plain)[-2].holds] == [0, False]


def test_decoder_is_one_graph_and_exports(decoders):
    """With the norms in it as what they are: one node each."""
    _, fused, latents = decoders
    exported = torch.export.export(fused, (latents,))
    for graph in (exported.graph, dynamo_graph(fused, latents)):
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert sum("group_norm_silu" in target for target in targets) == 22
        stock = ("aten.group_norm", "native_group_norm", "aten.silu", "function group_norm", "function silu")
        assert not [target for target in targets if any(name in target for name in stock)]


def dynamo_graph(module: nn.Module, x: torch.Tensor) -> torch.fx.Graph:
    """The one graph that Dynamo makes of `module`."""
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph.graph)
        return lambda *args: (x,)

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    (graph,) = seen
    return graph


@pytest.mark.parametrize("is_fused", [False, True])
def test_attention_as_gemms_is_the_stock_attention(is_fused):
    """Against diffusers' processor in float64, residual, norm and fused projections included; NHWC stays NHWC."""
    attn = micro_vae().decoder.mid_block.attentions[0].double().requires_grad_(False)
    attn.fuse_projections(fuse=is_fused)
    attn.set_processor(FusedAttnProcessor2_0() if is_fused else AttnProcessor2_0())
    x = torch.randn(2, attn.group_norm.num_channels, 3, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = attn(x)
    attn.set_processor(GemmAttnProcessor())
    # The scores are float32 by design.
    torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-5)
    assert attn(x).is_contiguous(memory_format=torch.channels_last)


def test_attention_of_several_heads_is_refused():
    """Their scores would not be one matrix."""
    decoder = micro_vae().decoder
    decoder.mid_block.attentions[0].heads = 2
    with pytest.raises(ValueError, match="got 2 heads"):
        use_gemms_for_attention(decoder)


def test_decoders_that_cannot_be_fused_are_refused(decoders):
    """Another activation, or one that also sees a time step, raises instead of drawing another image."""
    stock, _, _ = decoders
    stock.conv_act = nn.ReLU()
    with pytest.raises(ValueError, match="ReLU"):
        fuse_norms(stock)
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=2)
    with pytest.raises(ValueError, match="time embedding"):
        fuse_norms(block)

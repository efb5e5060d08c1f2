"""Upsampling as one convolution of the small image, against nearest-neighbour doubling and a 3x3 convolution."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from micro_flux import micro_vae
from torch import nn

from fluxfast.levels import get_level
from fluxfast.proof import decoder_facts, memory_format_facts
from fluxfast.upsampling import SubpixelUpsample, upsamplings, use_subpixels

SHAPES = [(1, 8, 8, 4, 4), (2, 5, 7, 3, 11), (2, 7, 3, 9, 5), (1, 4, 6, 1, 1), (2, 4, 6, 1, 1), (2, 3, 2, 1, 6)]
"""Batch, channels in and out, height, width."""


def make_upsample(inner: int, outer: int, dtype: torch.dtype = torch.float64, **arguments) -> Upsample2D:
    upsample = Upsample2D(inner, use_conv=True, out_channels=outer, **arguments)
    return upsample.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)


def nhwc(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def exact(upsample: Upsample2D, x: torch.Tensor) -> torch.Tensor:
    """The 3x3 form in float64, written out."""
    conv = getattr(upsample, "conv", None) or upsample.Conv2d_0
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(F.interpolate(x.double(), scale_factor=2.0), conv.weight.double(), bias, padding=1)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"name": "Conv2d_0"}])
@pytest.mark.parametrize(("batch", "inner", "outer", "height", "width"), SHAPES)
def test_subpixels_are_the_upsampling(batch, inner, outer, height, width, arguments):
    """Odd sizes, a batch, one pixel, other channels out than in: float64's rounding apart the same, in one piece."""
    upsample, x = make_upsample(inner, outer, **arguments), nhwc(batch, inner, height, width)
    y = SubpixelUpsample(upsample)(x)
    torch.testing.assert_close(y, exact(upsample, x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, SubpixelUpsample(upsample)(x.contiguous()))


def test_every_tap_is_where_it_was():
    """One pixel through a convolution of nine different powers of two: no sum of taps is another's."""
    upsample, x = make_upsample(1, 1, bias=False), torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    upsample.conv.weight.copy_(2.0 ** torch.arange(9).view(1, 1, 3, 3))
    x[0, 0, 1, 2] = 1
    assert torch.equal(SubpixelUpsample(upsample)(x), exact(upsample, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_that_of_the_3x3_form(dtype):
    """Taps summed in float32 and rounded once: no more than half as much again of the stock module's error."""
    upsample, x = make_upsample(96, 64, dtype), nhwc(2, 96, 9, 7, dtype=dtype)
    want = exact(upsample, x)
    stock, ours = ((module(x).double() - want).norm() for module in (upsample, SubpixelUpsample(upsample)))
    assert 0 < ours <= 1.5 * stock


def test_taps_are_rounded_once():
    """In bfloat16 256 + 1 + 1 is 258; rounded after every sum it would be 256."""
    upsample = make_upsample(1, 1, torch.bfloat16)
    upsample.conv.weight.copy_(torch.tensor([[0.0, 0, 0], [0, 256, 1], [0, 1, 0]]))
    summed = SubpixelUpsample(upsample).conv.weight
    assert summed.dtype == torch.bfloat16
    assert summed[0, 0].tolist() == [[0, 0], [0, 258]]


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 6)])
def test_special_values_go_where_they_went(special, place):
    """A NaN or an infinity spoils the same output pixels, at corners too, and no other sample."""
    upsample, x = make_upsample(3, 4), nhwc(2, 3, 5, 7)
    x[(1, 2, *place)] = special
    y, want = SubpixelUpsample(upsample)(x), exact(upsample, x)
    assert torch.equal(y.isfinite(), want.isfinite())
    assert y[0].isfinite().all() and not y[1].isfinite().all()


def test_state_is_sixteen_ninths():
    """Four 2x2 kernels for a 3x3 one, the bias four times, in the module's dtype and NHWC; the stock is untouched."""
    upsample = make_upsample(6, 10, torch.bfloat16)
    before = copy.deepcopy(upsample.state_dict())
    state = SubpixelUpsample(upsample).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"conv.weight": (40, 6, 2, 2), "conv.bias": (40,)}
    assert sum(t.numel() * t.element_size() for t in state.values()) == 2 * (16 * 6 * 10 + 4 * 10)
    assert state["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad or p.is_meta for p in SubpixelUpsample(upsample).parameters())
    assert all(torch.equal(before[name], value) for name, value in upsample.state_dict().items())


@pytest.mark.parametrize(
    ("upsample", "words"),
    [
        (Upsample2D(4), "got no convolution"),
        (Upsample2D(4, use_conv_transpose=True), "got a ConvTranspose2d"),
        (Upsample2D(4, use_conv=True, norm_type="ln_norm"), "got a LayerNorm in front"),
        (Upsample2D(4, use_conv=True, norm_type="rms_norm", eps=1e-6), "got a RMSNorm in front"),
        (Upsample2D(4, use_conv=True, interpolate=False), "got interpolate=False"),
        (Upsample2D(4, use_conv=True, kernel_size=5, padding=2), r"kernel_size=\(5, 5\), padding=\(2, 2\)$"),
        (Upsample2D(4, use_conv=True, padding=0), r"got padding=\(0, 0\)$"),
    ],
)
def test_other_forms_are_refused(upsample, words):
    """What is not nearest doubling and a plain 3x3 convolution raises instead of drawing another image."""
    with pytest.raises(ValueError, match=words):
        SubpixelUpsample(upsample)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stride": 2}, r"got stride=\(2, 2\)$"),
        ({"dilation": 2}, r"got dilation=\(2, 2\)$"),
        ({"groups": 2}, "got groups=2$"),
        ({"padding_mode": "reflect"}, "got padding_mode=reflect$"),
    ],
)
def test_other_convolutions_are_refused(arguments, words):
    """diffusers makes none of them, but a module can be given one."""
    upsample = make_upsample(4, 4)
    upsample.conv = nn.Conv2d(4, 4, 3, **({"padding": 1} | arguments))
    with pytest.raises(ValueError, match=words):
        SubpixelUpsample(upsample)


def test_other_sizes_are_refused():
    """The output's size is given by the input's."""
    with pytest.raises(ValueError, match=r"output_size=\(5, 5\)"):
        SubpixelUpsample(make_upsample(4, 4))(nhwc(1, 4, 3, 3), (5, 5))


@pytest.fixture
def decoders():
    """The micro decoder in NHWC, as it is and with sub-pixel upsampling."""
    torch.manual_seed(0)
    stock = micro_vae().decoder.to(memory_format=torch.channels_last).requires_grad_(False)
    for module in stock.modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d):
            module.bias.normal_(std=0.3)
    ours = copy.deepcopy(stock)
    use_subpixels(ours)
    return stock, ours


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_decoder_draws_the_same_image(decoders, dtype, tolerance):
    """A whole AutoencoderKL decoder of four levels, a batch of latents that are not square."""
    stock, ours = copy.deepcopy(decoders[0]).to(dtype), copy.deepcopy(decoders[0]).to(dtype)
    use_subpixels(ours)
    latents = torch.randn(2, 16, 3, 5, dtype=dtype)
    image = ours(latents)
    assert image.shape == (2, 3, 24, 40)
    torch.testing.assert_close(image, stock(latents), rtol=tolerance, atol=tolerance)


def test_decoder_is_proven(decoders):
    """All upsamplings or none: one that was left out, one in another level and weights in NCHW are noticed."""
    stock, ours = decoders
    on, off = get_level("subpixel_upsampling"), get_level("no_host_waits")
    counts = [(d, level, decoder_facts(d, level)[-1]) for d in decoders for level in (off, on)]
    assert [(fact.observed, fact.expected) for *_, fact in counts] == [(0, 0), (0, 3), (3, 0), (3, 3)]
    assert all(fact.holds for decoder in decoders for fact in memory_format_facts(decoder, on))
    upsamplings(ours)[0].conv.to(memory_format=torch.contiguous_format)
    assert not memory_format_facts(ours, on)[0].holds
    ours.up_blocks[1].upsamplers[0] = stock.up_blocks[1].upsamplers[0]
    assert decoder_facts(ours, on)[-1].observed == 2


def test_decoder_with_another_upsampling_is_left_alone(decoders):
    """A refusal comes before the first change."""
    stock, _ = decoders
    stock.up_blocks[2].upsamplers[0].interpolate = False
    with pytest.raises(ValueError, match="interpolate=False"):
        use_subpixels(stock)
    assert [type(module) for module in upsamplings(stock)] == [Upsample2D] * 3


def test_subpixels_export():
    """As one convolution and views around one copy, for a package as well."""
    module, x = SubpixelUpsample(make_upsample(4, 6, torch.float32)), nhwc(2, 4, 3, 5, dtype=torch.float32)
    exported = torch.export.export(module, (x,))
    targets = [str(n.target) for n in exported.run_decompositions().graph.nodes if n.op == "call_function"]
    assert sum("convolution" in target for target in targets) == sum("clone" in target for target in targets) == 1
    assert not [target for target in targets if any(name in target for name in ("cat", "stack", "upsample", "index"))]
    assert torch.equal(exported.module()(x), module(x))

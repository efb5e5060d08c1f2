"""The VAE decoder's upsampling as one convolution of the small image: sub-pixel convolution, exact algebra.

Nearest-neighbour doubling shows a 3x3 convolution every pixel of the small image in up to four of its taps. Taps that
meet the same pixel can be summed beforehand, which leaves 2x2 of them for each of the four positions of an output pixel
in its 2x2 square: 4 products for 9, and the doubled image is never in memory.
"""

from __future__ import annotations

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn


class SubpixelUpsample(nn.Module):
    """Nearest-neighbour doubling and the 3x3 convolution behind it, as one 2x2 convolution with 4 times the channels.

    Taps are summed in float32, or wider if the weights are, and rounded once to the weights' dtype.

    Args:
        upsample: with a plain 3x3 convolution; its weights are left as they are.

    Raises:
        ValueError: for any other form of `upsample`.
    """

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        conv = _plain_convolution(upsample)
        weight, bias = conv.weight.detach(), conv.bias
        summed = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Columns, then rows in front of them: (row phase, column phase, out, in, 2, 2).
        summed = _phases(_phases(summed, 3), 3).flatten(0, 2).to(weight.dtype)
        self.conv = nn.Conv2d(
            conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=bias is not None, device="meta"
        )
        self.conv.weight = nn.Parameter(
            summed.contiguous(memory_format=torch.channels_last), requires_grad=conv.weight.requires_grad
        )
        if bias is not None:
            self.conv.bias = nn.Parameter(bias.detach().repeat(4), requires_grad=bias.requires_grad)

    def forward(self, x: torch.Tensor, output_size: None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, out channels, 2 H, 2 W) in channels_last memory.

        Raises:
            ValueError: for an `output_size`, as the size is always doubled.
        """
        if output_size is not None:
            raise ValueError(f"sub-pixel upsampling doubles both sides, got output_size={output_size}")
        # (B, H + 1, W + 1, row phase, column phase, channels): row i of the convolution sees rows i - 1 and i of the
        # image, so output row 2 i is in it and output row 2 i + 1 in the next.
        y = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (2, 2, self.conv.out_channels // 4))
        # Of every two neighbouring rows the one whose place among them is the phase; then of columns. These are views,
        # so that the copy, for which Inductor writes one kernel, is all that there is to do.
        y = y.unfold(1, 2, 1).diagonal(dim1=3, dim2=6)
        y = y.unfold(2, 2, 1).diagonal(dim1=3, dim2=6)
        y = y.permute(0, 1, 4, 2, 5, 3).contiguous().flatten(3, 4).flatten(1, 2)
        return y.permute(0, 3, 1, 2)


def _phases(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Three taps along `dim` -> (2, ...): the two that are left for an output's even and odd positions."""
    first, middle, last = weight.unbind(dim)
    even, odd = (first, middle + last), (first + middle, last)
    return torch.stack([torch.stack(even, dim), torch.stack(odd, dim)])


def _plain_convolution(upsample: Upsample2D) -> nn.Conv2d:
    conv = getattr(upsample, "conv" if upsample.name == "conv" else "Conv2d_0")
    if not isinstance(conv, nn.Conv2d):
        found = "no convolution" if conv is None else f"a {type(conv).__name__}"
    elif upsample.norm is not None:
        found = f"a {type(upsample.norm).__name__} in front"
    elif not upsample.interpolate:
        found = "interpolate=False"
    else:
        plain = {
            "kernel_size": (3, 3),
            "stride": (1, 1),
            "padding": (1, 1),
            "dilation": (1, 1),
            "groups": 1,
            "padding_mode": "zeros",
        }
        found = ", ".join(
            f"{name}={getattr(conv, name)}" for name, value in plain.items() if getattr(conv, name) != value
        )
    if found:
        raise ValueError(f"sub-pixel upsampling is for nearest doubling and a plain 3x3 convolution, got {found}")
    return conv


def upsamplings(decoder: nn.Module) -> list[nn.Module]:
    """Every upsampling of a decoder, of either form."""
    return [module for module in decoder.modules() if isinstance(module, Upsample2D | SubpixelUpsample)]


def use_subpixels(decoder: nn.Module) -> None:
    """Put a `SubpixelUpsample` in the place of every `Upsample2D` of a decoder.

    Raises:
        ValueError: for one that has another form than nearest doubling and a plain 3x3 convolution; nothing is changed.
    """
    found = {name: module for name, module in decoder.named_modules() if isinstance(module, Upsample2D)}
    for name, module in {name: SubpixelUpsample(module) for name, module in found.items()}.items():
        decoder.set_submodule(name, module)

"""The VAE decoder's norms, each one operation with the SiLU behind it and the bias in front of it."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class FusedGroupNorm(nn.Module):
    """Triton's GroupNorm + SiLU with the weights of a `torch.nn.GroupNorm`.

    Args:
        norm: with affine weights.
        silu: whether a SiLU follows.
        conv: the convolution in front, which gives up its bias to this norm; None leaves it alone.

    Raises:
        ImportError: if Triton is not installed.
    """

    def __init__(self, norm: nn.GroupNorm, *, silu: bool, conv: nn.Conv2d | None = None) -> None:
        super().__init__()
        from fluxfast.kernels.group_norm import group_norm_silu

        self.operation = group_norm_silu
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.x_bias = None if conv is None else conv.bias
        if conv is not None:
            conv.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) in channels_last memory -> the same."""
        return self.operation(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, self.x_bias)


def norms(decoder: nn.Module) -> list[nn.Module]:
    """Every GroupNorm of a decoder, fused or not."""
    return [module for module in decoder.modules() if isinstance(module, nn.GroupNorm | FusedGroupNorm)]


def fuse_norms(decoder: nn.Module) -> None:
    """Put a `FusedGroupNorm` in the place of every GroupNorm and nothing in that of its SiLU.

    Args:
        decoder: of an `AutoencoderKL`, its convolutions in channels_last.

    Raises:
        ValueError: for another activation than SiLU, and for blocks that look at a time step.
    """
    # diffusers makes a block's activation once and calls it after both norms, and on the time embedding if it has one.
    for module in [*decoder.modules()]:
        if isinstance(module, ResnetBlock2D):
            _require_silu(module.nonlinearity)
            if module.time_emb_proj is not None:
                raise ValueError("a residual block with a time embedding: its activation is not its norms' alone")
            module.norm1 = FusedGroupNorm(module.norm1, silu=True)
            module.norm2 = FusedGroupNorm(module.norm2, silu=True, conv=module.conv1)
            module.nonlinearity = nn.Identity()
        elif isinstance(module, Attention) and module.group_norm is not None:
            module.group_norm = FusedGroupNorm(module.group_norm, silu=False)
    _require_silu(decoder.conv_act)
    decoder.conv_norm_out = FusedGroupNorm(decoder.conv_norm_out, silu=True)
    decoder.conv_act = nn.Identity()


def _require_silu(activation: nn.Module) -> None:
    if not isinstance(activation, nn.SiLU):
        raise ValueError(f"the fused norms end in SiLU, and this decoder has {type(activation).__name__}")

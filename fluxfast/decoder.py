"""The VAE decoder made faster: each norm one operation with the SiLU behind it, its attention two GEMMs."""

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


class GemmAttnProcessor:
    """One-head attention over the pixels of a feature map, as two GEMMs around a softmax.

    The decoder's head dimension of 512 is beyond cuDNN's and FlashAttention's; PyTorch's memory-efficient kernel, which
    is left, ran at 140 TFLOP/s on an H200. The scores are float32, as in that kernel, and lie in memory: 1 GiB for
    1024x1024.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) -> the same, in the same memory format; the decoder leaves diffusers' other arguments empty."""
        x = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states)
        x = x.flatten(2).transpose(1, 2)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        scores = _float32_product(query, key.transpose(1, 2)) * attn.scale
        x = attn.to_out[0](torch.bmm(scores.softmax(-1).to(value.dtype), value))
        x = x.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor


def _float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def attentions(decoder: nn.Module) -> list[Attention]:
    """Every attention of a decoder."""
    return [module for module in decoder.modules() if isinstance(module, Attention)]


def norms(decoder: nn.Module) -> list[nn.Module]:
    """Every GroupNorm of a decoder, fused or not."""
    return [module for module in decoder.modules() if isinstance(module, nn.GroupNorm | FusedGroupNorm)]


def use_gemms_for_attention(decoder: nn.Module) -> None:
    """Give every attention of a decoder a `GemmAttnProcessor`.

    Raises:
        ValueError: for more than one head, whose scores would need as much memory each, and for norms of q and k.
    """
    for attn in attentions(decoder):
        if attn.heads != 1 or attn.norm_q is not None or attn.norm_k is not None or attn.spatial_norm is not None:
            raise ValueError(f"attention as two GEMMs is for one head without norms of q and k, got {attn.heads} heads")
        attn.set_processor(GemmAttnProcessor())


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

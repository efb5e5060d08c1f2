"""bfloat16 convolutions on a processor for which oneDNN has none: computed in float32.

oneDNN convolves bfloat16 from AVX-512 on. Below it ATen falls back to im2col and its own matrix product: 16 s for 64 to
64 channels of 256x256, where float32 through oneDNN takes 0.08 s (profiled on two cores, AVX2, torch 2.13.0). Of a call
of the eager tiny pipeline, 33 to 69 s there, 95 % was this fallback; with this module the call takes 1.8 s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fluxfast.dispatcher import override_on_cpu

FALLBACK = "_slow_conv2d_forward"
"""ATen's convolution where no library has one: plain, not transposed, not dilated, of one group."""


def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def replace_slow_bfloat16() -> torch.library.Library:
    """Route ATen's bfloat16 fallback through oneDNN in float32, for the rest of this process; once.

    Both add in float32 and round the result to bfloat16. Other dtypes keep their kernel.

    Returns:
        What holds the replacement; it lives as long as this does.
    """
    native = torch.library.get_kernel(f"aten::{FALLBACK}", "CPU")

    def convolve(
        keys: torch._C.DispatchKeySet,
        x: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: Sequence[int],
        bias: torch.Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
    ) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            return native.call_boxed(keys, x, weight, kernel_size, bias, stride, padding)
        wide = None if bias is None else bias.float()
        return torch.ops.aten.mkldnn_convolution(x.float(), weight.float(), wide, padding, stride, (1, 1), 1).bfloat16()

    return override_on_cpu(FALLBACK, convolve, with_keyset=True)

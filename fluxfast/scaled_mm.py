"""Float8 matrix products on a processor for which oneDNN has only its reference: computed in float32.

PyTorch multiplies float8 matrices through oneDNN where a processor has AMX. Without AMX for float16 oneDNN has no
kernel for them but its reference: 3.1 s for 320 x 256 x 768, where float32 takes 0.02 s (two cores of an Intel Xeon
with AMX for bfloat16, torch 2.13.0); two calls of the tiny pipeline at `float8` took nine minutes. Without AMX PyTorch
itself multiplies in float32 what the matrices stand for, which is what is done here.
"""

from __future__ import annotations

import functools

import torch

from fluxfast.dispatcher import override_on_cpu


def is_slow() -> bool:
    """Whether PyTorch would leave float8 products to oneDNN's reference on this processor."""
    return bool(torch.cpu._is_amx_tile_supported()) and not torch.cpu._is_amx_fp16_supported()


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`torch._scaled_mm` of CPU tensors: (M, K) and (K, N) in float8, scales of a tensor or (M, 1) and (1, N)."""
    if a.device.type != "cpu":
        return NotImplemented
    product = (a.float() @ b.float()) * (scale_a * scale_b)
    product = product if bias is None else product + bias.float()
    product = product if scale_result is None else product * scale_result
    return product.to(out_dtype or a.dtype)


@functools.cache
def replace_reference() -> torch.library.Library:
    """Multiply in float32 for the rest of this process, eagerly and in what Inductor compiles or packages; once.

    Returns:
        What holds the eager replacement; it lives as long as this does.
    """
    from torch._inductor import decomposition

    # A package calls PyTorch's kernel past the dispatcher, so that it must not hold such a call.
    decomposition.decompositions[torch.ops.aten._scaled_mm.default] = multiply
    decomposition.fast_random_decomps.cache_clear()
    return override_on_cpu("_scaled_mm", multiply)

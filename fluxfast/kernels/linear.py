"""Linear layers with e4m3 weights and one scale a row, as plain buffers that `torch._scaled_mm` takes.

Plain tensors export, package and load everywhere that tensor subclasses do not (AOTI's constants among them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fluxfast.kernels.rowwise import AMAX_FLOOR, E4M3_MAX, dequantize_rowwise, quantize_rowwise


def stack_linears(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of several Linears over the same input, as one (sum N, K) weight and one (sum N,) bias.

    Raises:
        TypeError: for anything but `nn.Linear` with a plain weight (a weight quantised before has lost its bits).
        ValueError: if only some of them have a bias, or their inputs differ in width.
    """
    for linear in linears:
        if not isinstance(linear, nn.Linear) or type(linear.weight.data) is not torch.Tensor:
            kind = type(getattr(linear, "weight", linear)).__name__
            raise TypeError(f"expected nn.Linear with a plain weight, got {type(linear).__name__} with {kind}")
    if len({linear.in_features for linear in linears}) != 1 or len({linear.bias is None for linear in linears}) != 1:
        raise ValueError(f"these Linears cannot be stacked: {[str(linear) for linear in linears]}")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


class RowwiseFloat8Linear(nn.Module):
    """y = x @ w.T + b with x and w in e4m3, one float32 scale a row of each, output in bfloat16.

    Scales as `rowwise.quantize_rowwise` defines them: torchao's `PerRow()`, without its rounding of eager scales to
    bfloat16. K and N must be multiples of 16, which is what cuBLAS asks for.

    Attributes:
        weight: (N, K) float8_e4m3fn. weight_scale: (1, N) float32. bias: (N,) bfloat16 or None.
        bias_in_gemm: False adds the bias after the GEMM, because Inductor's TMA templates for `_scaled_mm` take none.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, bias_in_gemm: bool = True) -> None:
        super().__init__()
        if weight.dim() != 2 or weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(f"float8 GEMMs need multiples of 16 in and out, got a weight of {tuple(weight.shape)}")
        q, scale = quantize_rowwise(weight.detach())
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale", scale.t().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.bfloat16))
        self.out_features, self.in_features = weight.shape
        self.bias_in_gemm = bias_in_gemm

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear], *, bias_in_gemm: bool = True) -> RowwiseFloat8Linear:
        """One GEMM for one or several Linears over the same input, outputs side by side."""
        return cls(*stack_linears(linears), bias_in_gemm=bias_in_gemm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) of any floating type -> (..., N) bfloat16, quantised in plain PyTorch, for Inductor to fuse."""
        q, scale = quantize_rowwise(x.reshape(-1, self.in_features))
        return self.forward_quantized(q, scale).unflatten(0, x.shape[:-1])

    def forward_quantized(self, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(M, K) e4m3 with row scales (M, 1) -> (M, N) bfloat16."""
        y = torch._scaled_mm(
            q,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias if self.bias_in_gemm else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y if self.bias is None or self.bias_in_gemm else y + self.bias

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias_in_gemm={self.bias_in_gemm}"


class RowwiseFloat8EpilogueLinear(RowwiseFloat8Linear):
    """A `RowwiseFloat8Linear` whose GEMM does more than to add a bias, of which it has one, zeros if need be.

    Attributes:
        operation: of `gemm`, or its reference.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, operation: Callable[..., Any]) -> None:
        super().__init__(weight, weight.new_zeros(len(weight)) if bias is None else bias)
        self.operation = operation


class RowwiseFloat8ResidualLinear(RowwiseFloat8EpilogueLinear):
    """Adds its gated output to a residual stream."""

    def forward_residual(
        self, q: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """(M, K) e4m3 with row scales (M, 1), (M, N) and (B, N) -> residual + gate * output, like the residual."""
        return self.operation(q, scale, self.weight, self.weight_scale, self.bias, residual, gate)


class RowwiseFloat8QkvLinear(RowwiseFloat8EpilogueLinear):
    """Gives Q and K of its output, and V as attention takes it."""

    def forward_qkv(
        self, q: torch.Tensor, scale: torch.Tensor, samples: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B * S, K) e4m3 with row scales (B * S, 1) of B samples -> what `reference.qkv_linear` returns."""
        return self.operation(q, scale, self.weight, self.weight_scale, self.bias, samples)


class RowwiseFloat8GeluLinear(RowwiseFloat8EpilogueLinear):
    """Gives GELU of its output, quantised with a scale that is known before the product is.

    An output is at most the largest magnitude of its row of inputs times the sum of the magnitudes of its row of
    weights, plus its bias (Hoelder's inequality), and GELU enlarges nothing. No code of a row with scale s is past
    448 s, so s * bound[0] + bound[1] is a scale with which nothing saturates. It is a loose one, 50 times the largest
    output of the row on the shipped checkpoint; e4m3 has 15 binades in which that loses nothing.

    Attributes:
        bound: (2,) float32: the largest sum of magnitudes of a row of weights; the largest magnitude of a bias / 448,
            not zero.
        beside: the operation that writes beside codes that are there, or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        operation: Callable[..., Any],
        beside: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(weight, bias, operation=operation)
        self.beside = beside
        sums = dequantize_rowwise(self.weight, self.weight_scale.t()).abs().sum(dim=1)
        offset = self.bias.float().abs().max().clamp(min=AMAX_FLOOR) / E4M3_MAX
        self.register_buffer("bound", torch.stack([sums.max(), offset]))

    def forward_gelu(
        self, q: torch.Tensor, scale: torch.Tensor, left: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, K) e4m3 with row scales (M, 1) -> codes (M, D + N) and scales (M, 1) of [left, gelu(output)].

        `left` is (M, D) of any floating type, or None for D = 0.
        """
        return self.operation(q, scale, self.weight, self.weight_scale, self.bias, self.bound, left)

    def forward_gelu_beside(
        self, q: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, out_scale: torch.Tensor
    ) -> None:
        """Write the last N columns of codes (M, D + N), of scales (M, 1) that are at least the bound's."""
        assert self.beside is not None, "of the operations that a level has, attention_epilogue is with gelu_epilogue"
        self.beside(q, scale, self.weight, self.weight_scale, self.bias, codes, out_scale)


class GroupedRowwiseFloat8Linear(nn.Module):
    """The text's Linear and the image's as one grouped GEMM over both streams' tokens, with what its epilogue does.

    Attributes:
        weight: (2, N, K) float8_e4m3fn, the text's first. weight_scale: (2, N) float32. bias: (2, N) bfloat16.
        bound: (2, 2) float32, of each one's `RowwiseFloat8GeluLinear`; None if they are other Linears.
        operation: one of `gemm`'s grouped ones, or its reference.
    """

    def __init__(self, text: nn.Module, image: nn.Module, *, operation: Callable[..., Any]) -> None:
        """Of two Linears of one kind, quantised."""
        super().__init__()
        both = (text, image)
        if len({linear.weight.shape for linear in both}) != 1:
            raise ValueError(f"expected two Linears of one size, got {text} and {image}")
        self.register_buffer("weight", torch.stack([linear.weight for linear in both]))
        self.register_buffer("weight_scale", torch.cat([linear.weight_scale for linear in both]))
        zeros = text.weight_scale[0].to(torch.bfloat16).zero_()
        self.register_buffer("bias", torch.stack([zeros if x.bias is None else x.bias for x in both]))
        bounds = [linear.bound for linear in both if isinstance(linear, RowwiseFloat8GeluLinear)]
        self.register_buffer("bound", torch.stack(bounds) if bounds else None)
        self.out_features, self.in_features = self.weight.shape[1:]
        self.operation = operation

    def forward_grouped(self, q: torch.Tensor, scale: torch.Tensor, *args: Any) -> Any:
        """(B, T + S, K) e4m3 with row scales (B, T + S, 1), and what else the operation takes -> what it returns."""
        extra = () if self.bound is None else (self.bound,)
        return self.operation(q, scale, self.weight, self.weight_scale, self.bias, *extra, *args)

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


ROWWISE_FLOAT8 = RowwiseFloat8Linear | GroupedRowwiseFloat8Linear
"""Modules of ours with row-wise float8 weights, to tell them by."""


class DenseLinear(nn.Module):
    """The unquantised stand-in with the same interface, for the reference mode of the fused blocks."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear]) -> DenseLinear:
        """One GEMM for one or several Linears over the same input, outputs side by side."""
        return cls(*stack_linears(linears))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N) in the type of the weight."""
        return F.linear(x, self.weight, self.bias)

    def forward_quantized(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """As `forward`; `scale` is None, or this raises ValueError."""
        if scale is not None:
            raise ValueError("an unquantised Linear got a scale: the block's operations and its Linears do not match")
        return self.forward(x)

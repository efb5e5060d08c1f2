"""What depends on the call but not on the latents: computed once, outside of the transformer and of its CUDA graph.

A stage stands in front of `transformer.forward` and writes into tensors at fixed addresses, which the transformer's
parts read. It recognises a tensor by being the same object, unwritten since: a comparison of values would have to wait
for the device in every step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import nn

from fluxfast.kernels.modulation import PrecomputedModulation
from fluxfast.steps import blocks_of


class StagedModulation:
    """Keeps the blocks' modulation in step with a pipeline's loop.

    The table of all steps is computed before the first step, and again as soon as the scheduler's timesteps, the
    pooled text, the guidance or the batch are other ones; FluxPipeline makes them anew in every call. A step finds its
    row by the value of its timestep, on the device; for a timestep that is not the scheduler's the result is NaN.

    Args:
        pipeline: with fused blocks. Its transformer's time and text embedding and output norm are replaced.

    Attributes:
        fills: tables computed.
    """

    def __init__(self, pipeline: FluxPipeline) -> None:
        transformer = pipeline.transformer
        self.pipeline = pipeline
        self.embed = transformer.time_text_embed
        transformer.time_text_embed = NoEmbedding(self.embed)
        transformer.norm_out = ModulatedNormOut(transformer.norm_out)
        self.tables = PrecomputedModulation([*blocks_of(transformer), transformer.norm_out])
        self.fills = 0
        self._made_of: list[tuple[torch.Tensor | None, int]] = []
        self._keys: torch.Tensor | None = None
        self._forward = transformer.forward
        transformer.forward = self

    def __call__(self, **kwargs: Any) -> Any:
        """`transformer.forward` with its modulation set; takes keywords, as FluxPipeline gives them."""
        timestep, pooled, guidance = kwargs["timestep"], kwargs["pooled_projections"], kwargs.get("guidance")
        made_of = [_identity(x) for x in (self.pipeline.scheduler.timesteps, pooled, guidance)]
        if not _same(made_of, self._made_of) or self.tables.current is None:
            self.fill(self.pipeline.scheduler.timesteps, timestep.dtype, pooled, guidance)
            self._made_of = made_of
        self.tables.select_where(self._keys == timestep[0])
        return self._forward(**kwargs)

    @torch.no_grad()
    def fill(
        self, timesteps: torch.Tensor, dtype: torch.dtype, pooled: torch.Tensor, guidance: torch.Tensor | None
    ) -> None:
        """Compute the table.

        Args:
            timesteps: (steps,) of the scheduler, 0 to 1000, float32.
            dtype: of the latents, in which FluxPipeline hands a timestep to the transformer.
            pooled: (batch, pooled width). guidance: (batch,) or None.
        """
        steps, batch = len(timesteps), len(pooled)
        # The roundings of FluxPipeline's loop and of FluxTransformer2DModel.forward, in their order.
        self._keys = timesteps.to(dtype) / 1000
        moments = (self._keys.to(dtype) * 1000).repeat_interleave(batch)
        arguments = [moments]
        if guidance is not None:
            arguments.append((guidance.to(dtype) * 1000).repeat(steps))
        self.tables.fill(self.embed(*arguments, pooled.repeat(steps, 1)).unflatten(0, (steps, batch)))
        self.fills += 1


class NoEmbedding(nn.Module):
    """In place of the time and text embedding, which it keeps: nothing in the loop reads what it would compute."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, *args: Any) -> None:
        """None, so that a reader that was overlooked fails."""


class ModulatedNormOut(nn.Module):
    """The transformer's `AdaLayerNormContinuous` with its modulation set from outside, as `blocks._ModulatedBlock`."""

    def __init__(self, norm_out: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm_out.norm, norm_out.linear
        self.modulation_width = self.linear.out_features
        self.modulation: torch.Tensor | None = None

    def compute_modulation(self, temb: torch.Tensor) -> torch.Tensor:
        """(B, D) time-and-text embedding -> (B, 2 D)."""
        return self.linear(nn.functional.silu(temb))

    def forward(self, x: torch.Tensor, temb: None) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        assert self.modulation is not None, "the modulation is filled before the first step"
        scale, shift = self.modulation.chunk(2, dim=-1)
        return self.norm(x) * (1 + scale)[:, None] + shift[:, None]


def _identity(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return tensor, 0 if tensor is None else tensor._version


def _same(a: list[tuple[torch.Tensor | None, int]], b: list[tuple[torch.Tensor | None, int]]) -> bool:
    return len(a) == len(b) and all(x is y and v == w for (x, v), (y, w) in zip(a, b, strict=True))

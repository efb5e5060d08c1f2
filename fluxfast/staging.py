"""What depends on the call but not on the latents: computed once, outside of the transformer and of its CUDA graph.

A stage stands in front of `transformer.forward` and writes into tensors at fixed addresses, which the transformer's
parts read. It recognises a tensor by being the same object, unwritten since: a comparison of values would have to wait
for the device in every step.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import nn

from fluxfast.kernels.modulation import PrecomputedModulation
from fluxfast.loop import LoopPipeline
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
        made_from = (self.pipeline.scheduler.timesteps, timestep.dtype, pooled, guidance)
        if not _same([_identity(x) for x in (made_from[0], pooled, guidance)], self._made_of):
            self.use(self.compute(*made_from), *made_from)
        self.tables.select(self._keys == timestep[0])
        return self._forward(**kwargs)

    def restart(self) -> None:
        """Compute the table again in the next step, whatever it was made of: that is how a loop's graph holds it."""
        self._made_of = []

    def use(
        self,
        table: torch.Tensor,
        timesteps: torch.Tensor,
        dtype: torch.dtype,
        pooled: torch.Tensor,
        guidance: torch.Tensor | None,
    ) -> None:
        """Take what `compute` made of the same arguments, for as long as the scheduler has these timesteps."""
        self.tables.use(table)
        self._keys = timesteps.to(dtype) / 1000
        self._made_of = [_identity(x) for x in (timesteps, pooled, guidance)]

    @torch.no_grad()
    def compute(
        self, timesteps: torch.Tensor, dtype: torch.dtype, pooled: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """The table of all steps, (steps, batch, total width).

        Args:
            timesteps: (steps,) of the scheduler, 0 to 1000, float32.
            dtype: of the latents, in which FluxPipeline hands a timestep to the transformer.
            pooled: (batch, pooled width). guidance: (batch,) or None.
        """
        steps, batch = len(timesteps), len(pooled)
        # The roundings of FluxPipeline's loop and of FluxTransformer2DModel.forward, in their order.
        moments = (timesteps.to(dtype) / 1000 * 1000)[:, None].expand(-1, batch).flatten()
        arguments = [moments]
        if guidance is not None:
            arguments.append((guidance.to(dtype) * 1000).repeat(steps))
        self.fills += 1
        return self.tables.compute(self.embed(*arguments, pooled.repeat(steps, 1)).unflatten(0, (steps, batch)))


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


class StagedRotary:
    """Keeps RoPE's tables, cos and sin of every token, for each resolution that was drawn.

    diffusers makes them in float64 in every forward. Here FluxPipeline's text and image ids are made once per length
    and resolution, so that the tables of a pair of ids are known by the ids' identity.

    Args:
        pipeline: its transformer's `pos_embed` and its own makers of ids are replaced. The tables are shown in front of
            every forward, or of the whole loop where that is one function: they stay outside of its graph.

    Attributes:
        fills: tables computed.
    """

    KEPT = 8
    """Pairs of ids whose tables are kept, 4.5 MB each at 1024x1024; the oldest go first."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self.embed = pipeline.transformer.pos_embed
        self.tables = pipeline.transformer.pos_embed = StaticTables()
        self.fills = 0
        self._known: dict[tuple[int, ...], tuple[list[tuple[torch.Tensor | None, int]], Tables]] = {}
        self._ids: dict[Hashable, torch.Tensor] = {}
        owner: Any = pipeline if isinstance(pipeline, LoopPipeline) else pipeline.transformer
        method = "denoise" if isinstance(pipeline, LoopPipeline) else "forward"
        self._forward = getattr(owner, method)
        setattr(owner, method, self)
        self._encode_prompt, self._image_ids = pipeline.encode_prompt, pipeline._prepare_latent_image_ids
        pipeline.encode_prompt, pipeline._prepare_latent_image_ids = self.encode_prompt, self.image_ids

    def __call__(self, **kwargs: Any) -> Any:
        """`transformer.forward` or `denoise` with the tables of its ids set; takes keywords, as the pipeline does."""
        text, image = kwargs["txt_ids"], kwargs["img_ids"]
        made_of = [_identity(text), _identity(image)]
        key = (id(text), id(image))
        if key not in self._known or not _same(self._known[key][0], made_of):
            self._known[key] = (made_of, self.embed(torch.cat([text, image])))
            self.fills += 1
            if len(self._known) > self.KEPT:
                del self._known[next(iter(self._known))]
        self.tables.show(self._known[key][1])
        return self._forward(**kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """FluxPipeline's, with the same text ids for every prompt of a length: they are zeros."""
        embeddings, pooled, ids = self._encode_prompt(*args, **kwargs)
        key = (ids.shape, ids.dtype, ids.device)
        if key not in self._ids:
            if ids.any():
                raise ValueError("FluxPipeline's text ids are no longer all zero: StagedRotary has to be told of it")
            self._ids[key] = ids
        return embeddings, pooled, self._ids[key]

    def image_ids(self, *args: Any) -> torch.Tensor:
        """FluxPipeline's, made once for (rows, columns, device, dtype); a batch's samples share them."""
        key = args[1:]
        if key not in self._ids:
            self._ids[key] = self._image_ids(*args)
        return self._ids[key]


Tables = tuple[torch.Tensor, torch.Tensor]


class StaticTables(nn.Module):
    """In place of `FluxPosEmbed`: the tables that were shown last, at one address for each number of tokens.

    Two resolutions may have as many tokens, and then share a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._static: dict[int, Tables] = {}
        self._shown: dict[int, Tables] = {}

    def show(self, tables: Tables) -> None:
        """Make these the tables of their number of tokens; cos and sin are (tokens, head_dim) each."""
        tokens = len(tables[0])
        if tokens not in self._static:
            self._static[tokens] = (tables[0].clone(), tables[1].clone())
        elif self._shown[tokens] is not tables:
            torch._foreach_copy_(self._static[tokens], tables)
        self._shown[tokens] = tables

    def forward(self, ids: torch.Tensor) -> Tables:
        """(tokens, 3) -> cos and sin."""
        return self._static[len(ids)]


def _identity(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return tensor, 0 if tensor is None else tensor._version


def _same(a: list[tuple[torch.Tensor | None, int]], b: list[tuple[torch.Tensor | None, int]]) -> bool:
    return len(a) == len(b) and all(x is y and v == w for (x, v), (y, w) in zip(a, b, strict=True))

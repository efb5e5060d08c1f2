"""Every AdaLN shift, scale and gate of all blocks and steps in one pass, before the denoising loop.

In FLUX.1 the modulation Linears hold 27 % of the weights (6.5 GB in bfloat16) and depend on the time step, the pooled
text and the guidance only. In the loop they are 76 matrix-vector products a step, pure bandwidth; here one product a
layer serves all steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import nn

from fluxfast.kernels.blocks import _ModulatedBlock


class PrecomputedModulation:
    """One static tensor that the blocks read their modulation from, and the table of all steps that refreshes it.

    Usage: `compute` and `use` before the loop, whenever prompt, steps, guidance or batch change; `select` before each
    step. A table for another batch size gives the blocks other tensors; those of one batch size are kept, so a CUDA
    graph that was captured with them stays right.

    Attributes:
        current: (B, total width) in the type of the modulation Linears; each block holds a view of its columns.
        table: (steps, B, total width).
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks: list[_ModulatedBlock] = list(blocks)
        self.current: torch.Tensor | None = None
        self.table: torch.Tensor | None = None
        self._static: dict[Hashable, torch.Tensor] = {}

    @torch.no_grad()
    def compute(self, tembs: torch.Tensor) -> torch.Tensor:
        """(steps, B, D) embeddings of all steps -> their table, (steps, B, total width)."""
        flat = tembs.flatten(0, 1)
        table = torch.cat([block.compute_modulation(flat) for block in self.blocks], dim=-1)
        return table.unflatten(0, tembs.shape[:2])

    @torch.no_grad()
    def use(self, table: torch.Tensor) -> None:
        """Let the blocks read from a table that `compute` made."""
        self.table = table
        like = table[0]
        current = self._static.setdefault((like.shape, like.dtype, like.device), torch.empty_like(like))
        if current is not self.current:
            self.current = current
            widths = [block.modulation_width for block in self.blocks]
            for block, view in zip(self.blocks, self.current.split(widths, dim=-1), strict=True):
                block.modulation = view

    def select(self, matches: torch.Tensor) -> None:
        """Copy one step's modulation (2.1 MB for FLUX.1) over `current`, without asking the device which.

        It is the first step whose entry in `matches`, (steps,) of bool, is true. If there is none everything becomes
        NaN: a wrong modulation would draw a plausible wrong image.

        Raises:
            ValueError: before `use`.
        """
        if self.table is None or self.current is None:
            raise ValueError("the modulation of no step is known yet: call use() first")
        step = matches.int().argmax().view(1)
        self.current.copy_(self.table.index_select(0, step)[0].masked_fill(~matches.any(), float("nan")))

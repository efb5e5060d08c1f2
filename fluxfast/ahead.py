"""A host that runs ahead of the device: prompts encoded without waiting, and the count that shows it.

`FluxPipeline.encode_prompt` copies token ids, and zeros for the text ids, from pageable memory and waits for each copy,
the last time until both encoders are done. Drawing the noise and launching the loop's graph come after that, while
nothing runs. Before it, diffusers asks every module for hooks to learn which device it is on: milliseconds for FLUX.1.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from PIL import Image

from fluxfast.loop import LoopPipeline

logger = logging.getLogger(__name__)
KEPT_BLOCKS = 2
"""Of an image's memory, kept by Pillow: the last image's, which its user may still have, and that of the one before."""


class AheadPipeline(LoopPipeline):
    """A LoopPipeline that waits for the device once a call: for the bytes of its image.

    Attributes:
        encoded: prompts, or lists of them, encoded by this class.
    """

    encoded: int = 0
    _text_ids: dict[Hashable, torch.Tensor]

    @classmethod
    def of(cls, pipeline: FluxPipeline) -> Self:
        """Made of the components of `pipeline`, as `LoopPipeline.of`."""
        own = super().of(pipeline)
        own._text_ids = {}
        # For the whole process. Otherwise each image's memory is new, and its 1000 page faults cost 2 ms.
        allocator = Image.core  # type: ignore[attr-defined]
        allocator.set_blocks_max(max(KEPT_BLOCKS, allocator.get_blocks_max()))
        return own

    @property
    def _execution_device(self) -> torch.device:
        """Where the transformer is. Hooks that move modules, diffusers' offloading, have no place among CUDA graphs."""
        return next(self.transformer.parameters()).device

    def encode_prompt(
        self,
        prompt: str | list[str],
        prompt_2: None = None,
        device: torch.device | None = None,
        max_sequence_length: int = 512,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """FluxPipeline's, bit for bit, for one image a prompt, without LoRA scales and textual inversions.

        T5 takes ten times as long as CLIP: it is launched first, and CLIP's tokens are made while it runs.

        Returns:
            Embeddings (batch, max_sequence_length, T5's width), pooled ones (batch, CLIP's width), and the text ids
            (max_sequence_length, 3), which are zeros, made once.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device = device or self._execution_device
        tokens = self._tokens(self.tokenizer_2, prompts, max_sequence_length, device)
        embeddings = self.text_encoder_2(tokens, output_hidden_states=False)[0]
        tokens = self._tokens(self.tokenizer, prompts, self.tokenizer_max_length, device)
        pooled = self.text_encoder(tokens, output_hidden_states=False).pooler_output
        self.encoded += 1
        key = (max_sequence_length, device, self.text_encoder.dtype)
        if key not in self._text_ids:
            self._text_ids[key] = torch.zeros(max_sequence_length, 3, device=device, dtype=self.text_encoder.dtype)
        return embeddings.to(self.text_encoder_2.dtype), pooled.to(self.text_encoder.dtype), self._text_ids[key]

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """Refused: their tokens are looked for in every prompt, which costs the host more than making the tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a pipeline with no_host_waits looks for no textual inversions in its prompts: load another level"
        )

    def _tokens(self, tokenizer: Any, prompts: list[str], length: int, device: torch.device) -> torch.Tensor:
        """(batch, length) token ids on the device; a prompt that is cut is named in a warning."""
        made = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if made.attention_mask[:, -1].any():  # at least one fills its row, and may have been longer
            whole = tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
            if whole.shape[1] > length:
                logger.warning(
                    "only the first %d tokens of a prompt are used, and this was cut: %s",
                    length,
                    tokenizer.batch_decode(whole[:, length - 1 : -1]),
                )
        tokens: torch.Tensor = made.input_ids
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def waits(call: Callable[[], Any]) -> int:
    """How often the host waits for a CUDA device during `call`, as far as torch's synchronisation debug mode sees it.

    It sees copies, `item` and what else of torch synchronises a stream; not what a library does by itself.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in told)

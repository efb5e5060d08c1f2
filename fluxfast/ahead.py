"""A host that runs ahead of the device: prompts encoded without waiting, all else beside T5, and what shows both.

`FluxPipeline.encode_prompt` copies token ids, and zeros for the text ids, from pageable memory and waits for each copy,
the last time until both encoders are done. Drawing the noise and launching the loop's graph come after that, while
nothing runs. Before it, diffusers asks every module for hooks to learn which device it is on: milliseconds for FLUX.1.

What the loop reads beside T5's embeddings does not depend on them: CLIP's, and the modulation of all steps, which is
made of those.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from PIL import Image

from fluxfast.loop import LoopPipeline

logger = logging.getLogger(__name__)
KEPT_BLOCKS = 2
"""Of an image's memory, kept by Pillow: the last image's, which its user may still have, and that of the one before."""
HELD_CYCLES = 1_000_000_000
"""Of the device's clock, for which T5 is held up to see what does not wait for it: half a second at 2 GHz, which a host
with other things to do needs less of."""


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
        with self.beside_t5():
            tokens = self._tokens(self.tokenizer, prompts, self.tokenizer_max_length, device)
            pooled = self.text_encoder(tokens, output_hidden_states=False).pooler_output.to(self.text_encoder.dtype)
        self.encoded += 1
        key = (max_sequence_length, device, self.text_encoder.dtype)
        if key not in self._text_ids:
            self._text_ids[key] = torch.zeros(max_sequence_length, 3, device=device, dtype=self.text_encoder.dtype)
        return embeddings.to(self.text_encoder_2.dtype), pooled, self._text_ids[key]

    def beside_t5(self) -> contextlib.AbstractContextManager[None]:
        """Where what does not depend on T5 is launched: behind it."""
        return contextlib.nullcontext()

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


class ConcurrentPipeline(AheadPipeline):
    """An AheadPipeline whose device works on CLIP and the modulation while it works on T5.

    T5 on 256 tokens leaves more than half of the memory's bandwidth, and reading 6.5 GB of weights is all that FLUX.1's
    modulation of four steps takes.

    Attributes:
        stream: of what runs beside T5; None without CUDA.
        beside: pieces of work that were launched there, two a call.
    """

    stream: torch.cuda.Stream | None = None
    beside: int = 0
    _held_cycles: int = 0
    _ended: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @classmethod
    def of(cls, pipeline: FluxPipeline) -> Self:
        """Made of the components of `pipeline`, as `LoopPipeline.of`."""
        own = super().of(pipeline)
        own.stream = torch.cuda.Stream() if own._execution_device.type == "cuda" else None
        return own

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As AheadPipeline's; whatever reads it in the current stream waits for both encoders."""
        if self.stream is not None:
            # For the arguments of `modulate`, and because the last call may still read here what this one writes there.
            self.stream.wait_stream(torch.cuda.current_stream())
            if self._held_cycles:
                torch.cuda._sleep(self._held_cycles)
        return super().encode_prompt(*args, **kwargs)

    def modulate(
        self, timesteps: torch.Tensor, dtype: torch.dtype, pooled: torch.Tensor, guidance: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The table of all steps as `denoise` takes it; nothing where the blocks compute their own."""
        if self.modulation is None:
            return {}
        with self.beside_t5():
            return {"modulation": self.compute_modulation(timesteps, dtype, pooled, guidance)}

    def compute_modulation(self, *made_from: Any) -> torch.Tensor:
        """`StagedModulation.compute`, in a place of its own for a CUDA graph."""
        assert self.modulation is not None
        return self.modulation.compute(*made_from)

    @contextlib.contextmanager
    def beside_t5(self) -> Iterator[None]:
        """Launch on `stream`; the stream that was current waits for it behind what it has to do already."""
        self.beside += 1
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        t5_ended = current.record_event(torch.cuda.Event(enable_timing=True))
        with torch.cuda.stream(self.stream):
            yield
        ended = self.stream.record_event(torch.cuda.Event(enable_timing=True))
        current.wait_event(ended)
        self._ended = ended, t5_ended

    @contextlib.contextmanager
    def t5_held_up(self) -> Iterator[None]:
        """Calls within have nothing but their T5 delayed, by `HELD_CYCLES`: what waits for it shows in `overlaps`."""
        self._held_cycles = HELD_CYCLES
        try:
            yield
        finally:
            self._held_cycles = 0

    def overlaps(self) -> bool:
        """Whether the last call's work beside T5 had ended when T5 had; waits for both."""
        if self._ended is None:
            return False
        torch.cuda.synchronize()
        ended, t5_ended = self._ended
        return ended.elapsed_time(t5_ended) > 0


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

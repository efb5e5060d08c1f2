"""Times a pipeline call and its stages without disturbing it. Used by the worker alone; imports torch.

On CUDA a mark is an event in the stream, read only after the call; on a CPU it is `time.perf_counter`. The wall time of
the whole call is kept on both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

Mark = Any
"""A `torch.cuda.Event`, or seconds."""


@dataclasses.dataclass
class Round:
    """One timed call. Seconds."""

    sample_s: float
    wall_s: float
    stages_s: dict[str, float]


class Clock:
    """Marks moments on the device's own clock.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.kind: Literal["cuda_event", "wall"] = "cuda_event" if device == "cuda" else "wall"

    def mark(self) -> Mark:
        """Now, in the stream's order."""
        if self.kind == "wall":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until everything that was queued is done."""
        if self.kind == "cuda_event":
            torch.cuda.synchronize()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks, after `wait`."""
        return end - start if self.kind == "wall" else start.elapsed_time(end) / 1e3


class StageClock:
    """Wraps the stages of a pipeline so that every call leaves marks.

    Stages: `text_encode`, `step_0` ... `step_N` (one transformer forward each) or, where the loop is one CUDA graph,
    `denoise` for all of them, `decode`, `postprocess`, and `image_encode` where an image is edited. What lies between
    them (noise, scheduler, host work) is the whole call less their sum.

    Attributes:
        first_step_output: of the latest call, the first denoising step's output.
        decoded: of the latest call, what the VAE gave, before conversion to uint8.
    """

    def __init__(self, pipeline: Any, clock: Clock, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.clock = clock
        self.first_step_output: torch.Tensor | None = None
        self.decoded: torch.Tensor | None = None
        self._marks: list[tuple[str, Mark, Mark]] = []
        self._steps = 0
        pipeline.encode_prompt = self._timed(pipeline.encode_prompt, lambda: "text_encode")
        if hasattr(pipeline, "denoise"):
            pipeline.denoise = self._timed(pipeline.denoise, lambda: "denoise", self._keep_loop)
        else:
            pipeline.transformer.forward = self._timed(pipeline.transformer.forward, self._step_name, self._keep_step)
        pipeline.vae.encode = self._timed(pipeline.vae.encode, lambda: "image_encode")
        pipeline.vae.decode = self._timed(pipeline.vae.decode, lambda: "decode")
        postprocess = pipeline.image_processor.postprocess

        def keep_and_convert(image: torch.Tensor, **kwargs: Any) -> Any:
            self.decoded = spoil(image)
            return postprocess(self.decoded, **kwargs)

        pipeline.image_processor.postprocess = self._timed(keep_and_convert, lambda: "postprocess")

    def round(self, call: Callable[[], Any], after: Callable[[float], None]) -> tuple[Any, Round]:
        """One timed call.

        Args:
            call: the whole `pipeline(...)` call.
            after: runs inside the timed region with the call's own seconds; the latency fault, else nothing.
        """
        self._marks.clear()
        self._steps = 0
        self.clock.wait()
        wall, start = time.perf_counter(), self.clock.mark()
        output = call()
        self.clock.wait()
        after(time.perf_counter() - wall)
        end = self.clock.mark()
        self.clock.wait()
        wall_s = time.perf_counter() - wall
        stages = {name: self.clock.seconds(a, b) for name, a, b in self._marks}
        return output, Round(self.clock.seconds(start, end), wall_s, stages)

    def _step_name(self) -> str:
        self._steps += 1
        return f"step_{self._steps - 1}"

    def _keep_step(self, output: Any) -> None:
        if self._steps == 1:
            self.first_step_output = output[0]

    def _keep_loop(self, output: Any) -> None:
        self.first_step_output = output[1]

    def _timed(
        self, function: Callable[..., Any], name: Callable[[], str], keep: Callable[[Any], None] = lambda output: None
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            stage, start = name(), self.clock.mark()
            output = function(*args, **kwargs)
            self._marks.append((stage, start, self.clock.mark()))
            keep(output)
            return output

        return timed

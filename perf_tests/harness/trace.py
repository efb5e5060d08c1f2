"""One call under torch's profiler, as a file that Perfetto opens. Used by the worker alone; imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def write_trace(pipeline: Any, call: Callable[[], object], path: Path) -> None:
    """Profile `call` into a chrome trace in which the pipeline's stages are named as in `Measurement.stages_s`.

    The pipeline keeps the wrappers that name its stages, so nothing may be timed after this.

    Args:
        pipeline: a `FluxPipeline`, warm.
        call: one whole call of it.
        path: ends in `.json.gz`; open it at ui.perfetto.dev or in chrome://tracing.
    """
    step = iter(range(1 << 20))
    for owner, method, name in (
        (pipeline, "encode_prompt", lambda: "text_encode"),
        (pipeline.transformer, "forward", lambda: f"step_{next(step)}"),
        (pipeline.vae, "decode", lambda: "decode"),
        (pipeline.image_processor, "postprocess", lambda: "postprocess"),
    ):
        setattr(owner, method, _named(getattr(owner, method), name))
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
    with profile(activities=activities) as recorded:
        call()
        if has_gpu:
            torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))


def _named(function: Callable[..., Any], name: Callable[[], str]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name()):
            return function(*args, **kwargs)

    return named

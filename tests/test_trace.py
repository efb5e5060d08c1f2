"""The trace that a worker writes after it has timed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from perf_tests.harness.trace import write_trace


def test_trace_names_stages_and_operators(tmp_path: Path) -> None:
    """A gzipped chrome trace, as Perfetto reads it: the stages of one call and torch's own operators."""
    pipeline = SimpleNamespace(
        encode_prompt=lambda: torch.ones(4, 4),
        transformer=SimpleNamespace(forward=lambda x: x @ x),
        vae=SimpleNamespace(decode=lambda x: x + 1),
        image_processor=SimpleNamespace(postprocess=lambda x: x * 2),
    )

    def call() -> None:
        x = pipeline.encode_prompt()
        for _ in range(2):
            x = pipeline.transformer.forward(x)
        pipeline.image_processor.postprocess(pipeline.vae.decode(x))

    write_trace(pipeline, call, tmp_path / "trace.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    named = {event.get("name") for event in events if event.get("ph") == "X"}
    assert {"text_encode", "step_0", "step_1", "decode", "postprocess", "aten::mm", "aten::mul"} <= named
    assert "step_2" not in named

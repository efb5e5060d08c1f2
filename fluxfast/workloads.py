"""What is generated: checkpoint, prompt and sampling parameters, as frozen data. Imports only the standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One `pipeline(...)` call, repeated.

    Attributes:
        id: name on the command line.
        checkpoint: "tiny" (shipped, trained), "synthetic" or "synthetic-dev" (full shape, random weights), a Hub id
            pinned to a revision ("black-forest-labs/FLUX.1-schnell@<40-hex>"), or a local folder.
        prompt: what is drawn.
        height, width: of the image, pixels.
        num_inference_steps: denoising steps.
        guidance_scale: distilled guidance; 0.0 for schnell.
        max_sequence_length: T5 tokens.
        seed: of the CPU generator that draws the initial noise; made anew for every call.
        compile_scope: "blocks" compiles each of the two block classes once; "full" the whole transformer as one graph.
        warmup_rounds, rounds: untimed and timed calls a process.
    """

    id: str
    checkpoint: str
    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    seed: int = 42
    compile_scope: Literal["blocks", "full"] = "blocks"
    warmup_rounds: int = 3
    rounds: int = 10

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of every field: two results compare only if theirs are equal."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `pipeline(...)`, without the generator (the package draws it from `seed`)."""
        return {
            "prompt": self.prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }


TINY = Workload(
    id="tiny",
    checkpoint="tiny",
    prompt=(
        "a large matte green triangle at the left, a large glossy orange circle at the right and a medium flat purple "
        "square at the bottom on a horizontally striped mint background"
    ),
    height=256,
    width=256,
    num_inference_steps=4,
    guidance_scale=0.0,
    max_sequence_length=64,
    warmup_rounds=2,
    rounds=10,
)

SCHNELL = Workload(
    id="schnell",
    checkpoint="synthetic",
    prompt="A cat playing with a ball of yarn",
    height=1024,
    width=1024,
    num_inference_steps=4,
    guidance_scale=0.0,
    max_sequence_length=256,
)
"""The workload of flux-fast's published numbers."""

DEV = dataclasses.replace(
    SCHNELL,
    id="dev",
    checkpoint="synthetic-dev",
    num_inference_steps=28,
    guidance_scale=3.5,
    max_sequence_length=512,
)

WORKLOADS: dict[str, Workload] = {workload.id: workload for workload in (TINY, SCHNELL, DEV)}


def get_workload(id: str) -> Workload:
    """The workload called `id`.

    Raises:
        ValueError: naming the known workloads.
    """
    if id not in WORKLOADS:
        raise ValueError(f"unknown workload {id!r}; known workloads: {', '.join(WORKLOADS)}")
    return WORKLOADS[id]

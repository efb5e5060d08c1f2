"""What is generated: checkpoint, prompt and sampling parameters, as frozen data. Imports only the standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any, Literal

RANDOM = ("synthetic-2", "synthetic-2-dev")
"""Checkpoints of random weights: the full shape, and images that are noise.

Where the weights change, so does the number: a baseline of others has errors of its own, and must not compare.
"""

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})", re.ASCII)
"""A Hub checkpoint is pinned to a commit: a branch moves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One `pipeline(...)` call, repeated.

    Attributes:
        id: name on the command line.
        checkpoint: "tiny" (shipped, trained), one of `RANDOM` (full shape, random weights), a Hub id pinned to a
            revision ("black-forest-labs/FLUX.1-schnell@<40-hex>"), or a local folder's absolute path.
        prompt: what is drawn.
        height, width: of the image, pixels.
        num_inference_steps: denoising steps.
        guidance_scale: distilled guidance; 0.0 for schnell.
        max_sequence_length: T5 tokens.
        seed: of the CPU generator that draws the initial noise; made anew for every call.
        compile_scope: "blocks" compiles each of the two block classes once; "full" the whole transformer as one graph.
        warmup_rounds, rounds: untimed and timed calls a process.
        input_image: name of the drawing (`fluxfast.input_images`) that FLUX.1-Kontext edits, at `height` x `width`;
            None for the text-to-image pipeline.
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
    input_image: str | None = None

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of every field: two results compare only if theirs are equal.

        A None is left out, so that a field that came later does not part a workload without it from its baselines.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def has_random_weights(self) -> bool:
        """Whether the image is noise, which no image metric may judge."""
        return self.checkpoint in RANDOM

    @property
    def is_full_size(self) -> bool:
        """Whether the transformer is known to have FLUX.1's 12 billion parameters."""
        return self.has_random_weights or self.checkpoint.startswith("black-forest-labs/FLUX.1-")

    @property
    def tokens(self) -> int:
        """Of the transformer's joint sequence: text, the image, and the image that is edited."""
        image = (self.height // 16) * (self.width // 16)
        return self.max_sequence_length + image * (1 if self.input_image is None else 2)

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
    checkpoint="synthetic-2",
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
    checkpoint="synthetic-2-dev",
    num_inference_steps=28,
    guidance_scale=3.5,
    max_sequence_length=512,
)

KONTEXT = dataclasses.replace(
    DEV,
    id="kontext",
    prompt="Turn the red ball into a ball of blue yarn",
    guidance_scale=2.5,
    input_image="still_life_1",
)
"""FLUX.1-Kontext-dev has FLUX.1-dev's shape; the edited image doubles the image tokens. Guidance: its model card's."""

REVISIONS = {
    "schnell": "black-forest-labs/FLUX.1-schnell@741f7c3ce8b383c54771c7003378a50191e9efe9",
    "dev": "black-forest-labs/FLUX.1-dev@3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    "kontext": "black-forest-labs/FLUX.1-Kontext-dev@24e9dedc4ef646698dc8eb4e18ae2cec3c9fea0d",
}
"""The released weights of the workloads whose own are random."""


def on_hub(workload: Workload) -> Workload:
    """The same work with the released weights, as a workload of its own: its images are judged."""
    return dataclasses.replace(workload, id=f"{workload.id}-hub", checkpoint=REVISIONS[workload.id])


def full_graph(workload: Workload) -> Workload:
    """The same work with the whole transformer compiled as one graph, as a workload of its own."""
    return dataclasses.replace(workload, id=f"{workload.id}-full", compile_scope="full")


_REGIONAL = (TINY, SCHNELL, DEV, KONTEXT, *map(on_hub, (SCHNELL, DEV, KONTEXT)))
WORKLOADS: dict[str, Workload] = {workload.id: workload for workload in (*_REGIONAL, *map(full_graph, _REGIONAL))}


def get_workload(id: str) -> Workload:
    """The workload called `id`, or "WORKLOAD@CHECKPOINT": a known one with another checkpoint.

    That checkpoint is a pinned Hub id ("dev@owner/name@<40-hex>") or the absolute path of a local folder.

    Raises:
        ValueError: naming the known workloads, or what a checkpoint may be.
    """
    name, is_changed, checkpoint = id.partition("@")
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; known workloads: {', '.join(WORKLOADS)}")
    if not is_changed:
        return WORKLOADS[name]
    if not (HUB_NAME.fullmatch(checkpoint) or checkpoint.startswith("/")):
        raise ValueError(
            f"workload {id!r}: expected owner/name@<40-hex revision> or the absolute path of a folder behind {name}@, "
            f"got {checkpoint!r}"
        )
    return dataclasses.replace(WORKLOADS[name], id=id, checkpoint=checkpoint)

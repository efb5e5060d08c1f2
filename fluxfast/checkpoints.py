"""Checkpoint name -> a plain diffusers pipeline. Safetensors only, and never the network."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import FluxKontextPipeline, FluxPipeline

from fluxfast.errors import CheckpointError
from fluxfast.synthetic import make_synthetic
from fluxfast.workloads import HUB_NAME, RANDOM, Workload

TINY = Path(__file__).parent / "assets" / "tiny_flux"
CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
"""The parts of a FluxPipeline. Without its config.json transformers loads a text encoder with random weights."""

Pipeline: TypeAlias = FluxPipeline | FluxKontextPipeline


def pipeline_class(workload: Workload) -> type[Pipeline]:
    """Of diffusers: the one that draws from text, or the one that edits an image."""
    return FluxPipeline if workload.input_image is None else FluxKontextPipeline


def load(checkpoint: str, dtype: torch.dtype, device: str, kind: type[Pipeline] = FluxPipeline) -> Pipeline:
    """A pipeline on `device`.

    Args:
        checkpoint: as in `Workload.checkpoint`.
        dtype: of all weights.
        device: "cpu" or "cuda".
        kind: `pipeline_class` of the workload.

    Raises:
        CheckpointError: naming the missing or damaged file, or how to fetch the checkpoint.
    """
    if checkpoint in RANDOM:
        pipeline = make_synthetic(checkpoint, dtype, device, tokenizers=TINY)
        # Both kinds have the same parts.
        pipeline = kind(**pipeline.components)
    else:
        folder = find(checkpoint, kind)
        pipeline = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline


def find(checkpoint: str, kind: type[Pipeline] = FluxPipeline) -> Path:
    """The local folder of a checkpoint, every file of it looked at.

    Raises:
        CheckpointError: as `resolve` and `check_folder`.
    """
    folder = resolve(checkpoint)
    try:
        check_folder(folder, kind.__name__)
    except CheckpointError as error:
        if hub := HUB_NAME.fullmatch(checkpoint):
            raise CheckpointError(f"{error}; `{_fetch(**hub.groupdict())}` fetches what is missing") from None
        raise
    return folder


def _fetch(repo: str, revision: str) -> str:
    """The command that fetches a pipeline, without the copy of the transformer in Black Forest Labs' own format."""
    return f'hf download {repo} --revision {revision} --exclude "flux1-*"'


def resolve(checkpoint: str) -> Path:
    """The local folder of a checkpoint.

    Raises:
        CheckpointError: if there is none, saying how to get it.
    """
    if checkpoint == "tiny":
        return TINY
    hub = HUB_NAME.fullmatch(checkpoint)
    if hub is None:
        folder = Path(checkpoint)
        if folder.is_dir():
            return folder
        known = ", ".join(("tiny", *RANDOM))
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no folder and none of {known}, and not of the form "
            "owner/name@<40-hex revision>: give one of these"
        )
    from huggingface_hub import try_to_load_from_cache

    # Looks at the disk only. Not `snapshot_download`: it refuses a snapshot without the files that `_fetch` leaves out.
    index = try_to_load_from_cache(hub["repo"], "model_index.json", revision=hub["revision"])
    if not isinstance(index, str):
        raise CheckpointError(
            f"checkpoint {checkpoint} is not in the local Hugging Face cache, and a timed process does not download: "
            f"run `{_fetch(**hub.groupdict())}` first (where its licence has to be accepted, accept it on "
            f"https://huggingface.co/{hub['repo']} and run `hf auth login`)"
        )
    return Path(index).parent


def check_folder(folder: Path, kind: str = "FluxPipeline") -> None:
    """Look at every file of a pipeline folder before diffusers does.

    Args:
        kind: name of the pipeline's class.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or not safetensors.
    """
    index = folder / "model_index.json"
    entries = _read_json(index)
    if (found := entries.get("_class_name")) != kind:
        raise CheckpointError(
            f"checkpoint file {index} does not describe a {kind} but {found!r}: name a checkpoint of this workload's "
            "kind, or fetch it again"
        )
    for name, config in CONFIGS.items():
        part = folder / name
        if name not in entries or not part.is_dir():
            listed = "lists it" if name in entries else "does not list it"
            raise CheckpointError(f"checkpoint folder {folder}: {name}/ is missing, and {index.name} {listed}")
        for path in sorted({part / config, *part.glob("*.json")}):
            _read_json(path)
        if config == "config.json":
            for path in _weight_files(part):
                _check_safetensors(path)


def _weight_files(part: Path) -> Iterator[Path]:
    """The safetensors files that the part's index or convention asks for; existence is checked by the reader."""
    indices = sorted(part.glob("*.safetensors.index.json"))
    if indices:
        shards = _read_json(indices[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"checkpoint file {indices[0]} maps no weights: fetch the checkpoint again")
        yield from (part / name for name in sorted(set(shards.values())))
        return
    files = sorted(part.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"checkpoint folder {part}: no .safetensors file; only safetensors weights are loaded")
    yield from files


def _check_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing: fetch the checkpoint again") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged ({error}): fetch the checkpoint again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"checkpoint file {path} has {size} bytes, its header says {expected}: fetch the checkpoint again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing: fetch the checkpoint again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint file {path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {path} holds no JSON object: fetch the checkpoint again")
    return value

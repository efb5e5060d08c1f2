"""Checkpoint name -> a plain diffusers `FluxPipeline`. Safetensors only, and never the network."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from fluxfast.errors import CheckpointError
from fluxfast.synthetic import SYNTHETIC, make_synthetic

TINY = Path(__file__).parent / "assets" / "tiny_flux"
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


def load(checkpoint: str, dtype: torch.dtype, device: str) -> FluxPipeline:
    """A `FluxPipeline` on `device`.

    Args:
        checkpoint: as in `Workload.checkpoint`.
        dtype: of all weights.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: naming the missing or damaged file, or how to fetch the checkpoint.
    """
    if checkpoint in SYNTHETIC:
        pipeline = make_synthetic(checkpoint, dtype, device, tokenizers=TINY)
    else:
        folder = resolve(checkpoint)
        check_folder(folder)
        pipeline = FluxPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline


def resolve(checkpoint: str) -> Path:
    """The local folder of a checkpoint.

    Raises:
        CheckpointError: if there is none, saying how to get it.
    """
    if checkpoint == "tiny":
        return TINY
    hub = _HUB.fullmatch(checkpoint)
    if hub is None:
        folder = Path(checkpoint)
        if folder.is_dir():
            return folder
        known = ", ".join(("tiny", *SYNTHETIC))
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no folder and none of {known}, and not of the form "
            "owner/name@<40-hex revision>: give one of these"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub["repo"], revision=hub["revision"], local_files_only=True))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"checkpoint {checkpoint} is not in the local Hugging Face cache, and a timed process does not download: "
            f"run `hf download {hub['repo']} --revision {hub['revision']}` first"
        ) from None


def check_folder(folder: Path) -> None:
    """Look at every file of a pipeline folder before diffusers does.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or not safetensors.
    """
    index = folder / "model_index.json"
    for name, entry in _read_json(index).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise CheckpointError(f"checkpoint folder {folder}: {name}/ is missing, and {index.name} lists it")
        for path in sorted(part.glob("*.json")):
            _read_json(path)
        if entry[1].endswith(("Model", "ModelWithProjection", "KL", "2DModel")):
            for path in _weight_files(part):
                _check_safetensors(path)


def _weight_files(part: Path) -> Iterator[Path]:
    """The safetensors files that the part's index or convention asks for; existence is checked by the reader."""
    indices = sorted(part.glob("*.safetensors.index.json"))
    if indices:
        yield from (part / name for name in sorted(set(_read_json(indices[0])["weight_map"].values())))
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
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing: fetch the checkpoint again") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged ({error}): fetch the checkpoint again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        raise CheckpointError(
            f"checkpoint file {path} has {size} bytes, its header says {expected}: fetch the checkpoint again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing: fetch the checkpoint again") from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {path} holds no JSON object: fetch the checkpoint again")
    return value

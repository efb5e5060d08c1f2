"""A checkpoint that is not whole is one sentence with the file's name, before any library looks at it."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch

from fluxfast.checkpoints import TINY, check_folder, load, resolve
from fluxfast.errors import CheckpointError

WEIGHTS = Path("text_encoder/model.safetensors")
REVISION = "0123456789abcdef" * 2 + "01234567"
HUB = f"black-forest-labs/FLUX.1-schnell@{REVISION}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped checkpoint, its two large parts as links: 1.3 MB to damage."""
    shutil.copytree(TINY, tmp_path, ignore=shutil.ignore_patterns("transformer", "vae", "*.png"), dirs_exist_ok=True)
    for name in ("transformer", "vae"):
        (tmp_path / name).symlink_to(TINY / name)
    return tmp_path


def refused(folder: Path) -> str:
    """What `load` says about `folder`: one line, one sentence."""
    with pytest.raises(CheckpointError) as caught:
        load(str(folder), torch.float32, "cpu")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_whole_folders_pass(folder: Path) -> None:
    """The control of the refusals below, and the shipped checkpoint itself."""
    check_folder(folder)
    check_folder(TINY)


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 500, 0.5, -1])
def test_truncated_weights_are_refused(folder: Path, kept: float) -> None:
    """Cut in the length, in the header, in the data, or by one byte."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert str(path) in refused(folder) and "fetch the checkpoint again" in refused(folder)


def test_appended_bytes_are_refused(folder: Path) -> None:
    """Too long is as wrong as too short."""
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"x")
    assert str(folder / WEIGHTS) in refused(folder)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}q\x00." * 20,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        struct.pack("<Q", 2**63) + b"{}",
        safetensors(b"{not json}"),
        safetensors(b"\xff\xff\xff\xff"),
        safetensors([1, 2]),
        safetensors("text"),
        safetensors({"weight": 3}),
        safetensors({"weight": {"dtype": "F32", "shape": [1]}}),
        safetensors({"weight": {"dtype": "F32", "shape": [1], "data_offsets": []}}),
        safetensors({"weight": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}),
    ],
    ids=["pickle", "lfs", "length", "json", "utf8", "list", "string", "entry", "offsets", "empty", "text"],
)
def test_what_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    """A pickle, an LFS pointer, headers that are no headers: none reaches a loader, none is a stray exception."""
    (folder / WEIGHTS).write_bytes(content)
    assert str(folder / WEIGHTS) in refused(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    """Only safetensors are loaded: a pickle in their place does not help."""
    (folder / WEIGHTS).rename(folder / "text_encoder" / "pytorch_model.bin")
    assert f"{folder / 'text_encoder'}: no .safetensors file" in refused(folder)


def test_missing_shard_is_refused(folder: Path) -> None:
    """A shard that the index names has to be there."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_index_without_a_map_is_refused(folder: Path, content: str) -> None:
    """JSON that is no index of shards is named, too."""
    path = folder / "text_encoder" / "model.safetensors.index.json"
    path.write_text(content)
    assert str(path) in refused(folder)


def test_missing_part_is_refused(folder: Path) -> None:
    """A folder that model_index.json lists."""
    shutil.rmtree(folder / "text_encoder_2")
    assert "text_encoder_2/ is missing, and model_index.json lists it" in refused(folder)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_missing_json_is_refused(folder: Path, name: str) -> None:
    """The index and each part's configuration."""
    (folder / name).unlink()
    assert name.rpartition("/")[2] in refused(folder)


@pytest.mark.parametrize("name", ["model_index.json", "text_encoder/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"null", b"\xff\xfe{}"])
def test_bad_json_is_refused(folder: Path, name: str, content: bytes) -> None:
    """Empty, cut, no object, no text."""
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(folder)


@pytest.mark.parametrize("content", ["{}", '{"transformer": []}', '{"_class_name": "FluxPipeline"}'])
def test_index_that_lists_no_pipeline_is_refused(folder: Path, content: str) -> None:
    """An object that is no index of a FluxPipeline."""
    (folder / "model_index.json").write_text(content)
    assert "model_index.json" in refused(folder)


@pytest.mark.parametrize("name", ["tinny", "/no/such/folder", "owner/name", "owner/name@main", HUB[:-1], HUB + "0"])
def test_unknown_name_lists_what_is_known(name: str) -> None:
    """A Hub id is pinned to 40 hex digits: a branch moves."""
    with pytest.raises(CheckpointError, match=r"none of tiny, synthetic-2, synthetic-2-dev, .*@<40-hex revision>"):
        resolve(name)


def test_hub_checkpoint_that_is_not_here_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command to run, and not one packet on the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(CheckpointError, match=f"hf download black-forest-labs/FLUX.1-schnell --revision {REVISION}"):
        load(HUB, torch.float32, "cpu")


def test_hub_checkpoint_that_is_here_loads_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned snapshot of the cache, and not one packet; files that the pipeline does not need may be missing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(TINY)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert load(HUB, torch.float32, "cpu").transformer.config.num_layers > 0


def test_interrupted_download_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The missing file, and the command that fetches it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no .safetensors file.*`hf download .*{REVISION} --exclude"):
        load(HUB, torch.float32, "cpu")


def no_network(*args: object, **kwargs: object) -> None:
    raise AssertionError(f"network used: {args}")

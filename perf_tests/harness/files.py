"""Reading files as if hostile, writing them whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import stat
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

MAX_JSON_BYTES = 64 << 20
MAX_PNG_BYTES = 64 << 20
MAX_NPY_BYTES = 64 << 20
MAX_PIXELS = 4096 * 4096

Model = TypeVar("Model", bound=BaseModel)
Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""RGB, uint8, (height, width, 3)."""


class StoreError(Exception):
    """A file that cannot be trusted, in one sentence: what was observed, what was expected, what to do.

    It may quote the file, so it is shown as `printable` text.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """One line that only says something: a terminal obeys control characters, and CI a line that begins with `::`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def read_bytes(path: Path, limit: int, error: type[StoreError]) -> bytes:
    """A regular file's content; a link, device, pipe or more than `limit` bytes is an `error`."""
    try:
        # O_NONBLOCK: opening a pipe that no one writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path}: not a regular file; put the file itself there")
            raw = file.read(limit + 1)
    except (OSError, ValueError) as bad:
        raise error(f"{path}: cannot be read ({bad}); restore the file or measure again") from bad
    if len(raw) > limit:
        raise error(f"{path}: more than {limit} bytes, which is the most that is read; restore the file")
    return raw


def load_json(
    raw: bytes, path: Path, error: type[StoreError], remedy: str = "restore the file or measure again"
) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinity; anything else is an `error` that names the remedy."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return number

    try:
        document = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        dump_json(document)
    except (ValueError, RecursionError) as bad:
        raise error(f"{path}: not JSON as it was written ({bad}); {remedy}") from bad
    if not isinstance(document, dict):
        raise error(f"{path}: expected a JSON object, found {type(document).__name__}; {remedy}")
    return document


def read_model(path: Path, model: type[Model], remedy: str, error: type[StoreError] = StoreError) -> Model:
    """A JSON file that holds a `model`.

    Args:
        remedy: what to do if it does not.

    Raises:
        StoreError (or `error`): it cannot be read, is not JSON as `load_json` wants it, or is not a `model`.
    """
    raw = read_bytes(path, MAX_JSON_BYTES, error)
    load_json(raw, path, error, remedy)
    try:
        return model.model_validate_json(raw)
    except ValidationError as bad:
        first = bad.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise error(f"{path} is damaged at {where}: {first['msg']}; {remedy}") from bad


def dump_json(document: Any) -> bytes:
    """The one form in which a document is written; ValueError or TypeError for what is not finite JSON."""
    return json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"


def canonical_digest(document: Any) -> str:
    """sha256 of the document, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_png(
    path: Path, sha256: str | None = None, error: type[StoreError] = StoreError, max_pixels: int = MAX_PIXELS
) -> Picture:
    """An RGB PNG.

    Raises:
        StoreError (or `error`): unreadable, a link, not an RGB PNG, above `max_pixels`, or not of that sha256.
    """
    raw = read_bytes(path, MAX_PNG_BYTES, error)
    observed = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and observed != sha256:
        raise error(
            f"{path}: sha256 is {observed[:16]}..., expected {sha256[:16]}...: the image was replaced or damaged; "
            "restore it or measure again"
        )
    return decode_png(raw, path, error, max_pixels)


def decode_png(raw: bytes, path: Path, error: type[StoreError], max_pixels: int = MAX_PIXELS) -> Picture:
    """`read_png` of bytes; `path` is only named in errors."""
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            # Asked before a pixel is decoded: a few kB of PNG can claim gigabytes.
            if image.width * image.height > max_pixels:
                raise error(f"{path}: {image.width}x{image.height} pixels, at most {max_pixels} are read")
            if image.mode != "RGB":
                raise error(f"{path}: PNG mode is {image.mode!r}, expected 'RGB'; write it from an RGB image")
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as bad:
        raise error(f"{path}: not a whole PNG ({bad}); restore it or measure again") from bad


def read_floats(path: Path, error: type[StoreError]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The one float32 array of a `.npy` file, of whatever shape; anything else is an `error`."""
    raw = read_bytes(path, MAX_NPY_BYTES, error)
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as bad:
        raise error(f"{path}: not a whole .npy file ({bad}); measure again") from bad
    kind = array.dtype if isinstance(array, np.ndarray) else "an archive"
    if kind != np.float32:
        raise error(f"{path}: holds {kind}, expected an array of float32; measure again")
    return array


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) against other writers; OSError if it cannot be locked.

    The kernel lets go of the lock when its holder dies, however it dies. Temporary files that are there once it is
    held were left by a killed writer and are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def write_new(path: Path, raw: bytes) -> None:
    """Make `path` appear whole, or raise FileExistsError; another OSError if it could not be written."""
    _write(path, raw, os.link)


def write_over(path: Path, raw: bytes) -> None:
    """As `write_new`, replacing what is there."""
    _write(path, raw, os.replace)


def _write(path: Path, raw: bytes, publish: Any) -> None:
    # Same folder: neither a link nor a rename crosses file systems. The name ends neither in .json nor in .png, so
    # no reader, and none of pytest-benchmark's globs, takes it for a file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # Until the folder is on the disk, a power cut can still lose the new name.
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A folder on one machine as bytes, and as a folder on another."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from perf_tests.harness.files import write_new


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there; none if there is no such folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them below `folder`; no name leads out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        path = folder.joinpath(*(part for part in PurePosixPath(name).parts if part not in ("/", "//", "..")))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, raw)


def gather(place: Path, files: Mapping[str, bytes]) -> None:
    """Make a cell's folder appear whole; one that is there already, from a machine taken for lost, stays."""
    incoming = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_tree(incoming, files)
        if not place.exists():
            incoming.rename(place)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)

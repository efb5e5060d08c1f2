"""One suite a GPU: two timed runs side by side measure each other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO


class GpuBusy(RuntimeError):
    """Another suite holds the GPU."""


def default_folder() -> Path:
    """Where leases lie: private to the user. Other users' processes are found by NVML, not here."""
    return Path.home() / ".cache" / "fluxfast-perf" / "leases"


@contextlib.contextmanager
def gpu_lease(
    uuid: str | None,
    folder: Path | None = None,
    *,
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Iterator[None]:
    """Hold the GPU called `uuid` for the body of the `with`; None (no GPU) holds nothing.

    The kernel's lock decides, so the lease of a process that died, however it died, is free at once; the pid in the
    file only serves the messages.

    Args:
        wait_s: how long to wait for another suite to finish, seconds.
        say: gets one line when the wait begins and when a dead owner's lease is taken over.

    Raises:
        GpuBusy: naming the owner, when it still holds the GPU after `wait_s`.
    """
    if uuid is None:
        yield
        return
    path = _private(default_folder() if folder is None else folder) / f"{re.sub(r'[^A-Za-z0-9.-]', '_', uuid)}.lock"
    # "a+": opening must not wipe the owner out of a file that another process holds.
    with path.open("a+", encoding="utf-8") as file:
        _lock(file, uuid, path, wait_s, say)
        if dead := _owner(file):
            say(f"GPU {uuid}: process {dead['pid']} ended without giving its lease back; taken over")
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"pid": os.getpid(), "since": since, "command": shlex.join(sys.argv)}, file)
        file.flush()
        try:
            yield
        finally:
            # The file stays: deleting it would let a waiter lock a name that nobody else can see.
            file.truncate(0)


def _lock(file: TextIO, uuid: str, path: Path, wait_s: float, say: Callable[[str], None]) -> None:
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file)
            holder = (
                f"process {owner['pid']} ({owner['command']}) since {owner['since']}" if owner else "another process"
            )
            if time.monotonic() >= deadline:
                raise GpuBusy(
                    f"GPU {uuid} is held by {holder}, and two suites on one GPU measure each other: "
                    f"wait for it, stop it, or choose another GPU (lease {path})"
                ) from None
            if not told:
                say(f"GPU {uuid} is held by {holder}; waiting up to {wait_s:.0f} s")
                told = True
            time.sleep(0.2)
        else:
            return


def _owner(file: TextIO) -> dict[str, Any] | None:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:  # empty, or caught while its owner writes
        return None
    return owner if isinstance(owner, dict) else None


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} must be a folder of your own that no one else can write to; remove it or run chmod 700 on it"
        )
    return folder

"""A process whose whole family dies with it, and with us.

The process and everything it starts (Inductor's compile pool too) form one process group, led by a *keeper*: a shell
that does nothing but read a pipe whose other end only we hold.

* At the end of the `with`, whatever ended it, the group is killed. The keeper still leads it then, so its number cannot
  have passed to a stranger.
* If we die, `kill -9` included, the pipe closes and the keeper kills the group. `PR_SET_PDEATHSIG` would end only the
  process itself: Inductor's pool looks for its parent once in 60 s.
* The group is not the terminal's: Ctrl-C reaches us alone.

A process that leaves the group on purpose (setsid) is not followed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

KILL_GRACE_S: Final = 10.0
"""A process that SIGKILL does not end in this time sits in a driver call; it is left, its `returncode` None."""
STACK_DUMP_GRACE_S: Final = 2.0
"""Between SIGABRT, at which faulthandler writes the stacks, and SIGKILL."""


@contextlib.contextmanager
def process_group(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `argv` with stdin closed and both outputs into `log`; kill it and its descendants at the end of the `with`.

    Raises:
        OSError: if it cannot be started.
    """
    keeper = subprocess.Popen(
        ("sh", "-c", "read -r _; kill -KILL 0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=keeper.pid,
            )
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(keeper.pid, signal.SIGKILL)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_GRACE_S)


def dump_stacks(process: subprocess.Popen[bytes]) -> None:
    """Have a hanging Python with PYTHONFAULTHANDLER=1 write its stacks to its log, which ends it or soon will.

    Faulthandler's handler is C code: it works even while a native call holds the GIL.
    """
    # A core file of 34 GB of weights would take longer than the kill and fill the disk. Not all systems have prlimit.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STACK_DUMP_GRACE_S)

"""Runs pytest in forks of one process that has imported what the suite needs: a second and a half saved each time.

Not in forks of the caller: OpenMP threads that another test started do not survive a fork.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.communicate)

    def run(self, arguments: Sequence[str], tmp: Path) -> tuple[int, str]:
        """Exit status of `pytest ARGUMENTS`, and what it printed."""
        log = tmp / "log.txt"
        request = {"arguments": arguments, "log": str(log), "path": os.environ.get("PYTHONPATH", "")}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        text = log.read_text()
        log.unlink()
        return status, text


server = functools.cache(Server)


def _run_here(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path += [path for path in request["path"].split(os.pathsep) if path]
    try:
        return int(pytest.main(request["arguments"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 99
            try:
                status = _run_here(json.loads(line))
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    importlib.import_module("perf_tests.harness.session")
    _serve()

"""Leases: one suite a GPU."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from perf_tests.harness import runner
from perf_tests.harness.lease import GpuBusy, gpu_lease

HOLDER = """
import pathlib, sys, time
from perf_tests.harness.lease import gpu_lease
with gpu_lease("GPU-1", pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lease(tmp_path: pathlib.Path) -> None:
    """A second suite on a GPU is told who holds it; the lease of a killed one is taken over."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=runner.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    said: list[str] = []
    with (
        pytest.raises(GpuBusy, match=f"GPU-1 is held by process {holder.pid}"),
        gpu_lease("GPU-1", tmp_path, wait_s=0.3, say=said.append),
    ):
        pass
    with gpu_lease("GPU-2", tmp_path), gpu_lease(None, tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with gpu_lease("GPU-1", tmp_path, say=said.append):
        assert json.loads((tmp_path / "GPU-1.lock").read_text())["pid"] == os.getpid()
    assert "waiting up to" in said[0] and f"process {holder.pid} ended without" in said[1]
    assert (tmp_path / "GPU-1.lock").read_text() == ""


def test_lease_folder_must_be_private(tmp_path: pathlib.Path) -> None:
    """A folder that others can write to holds no lease."""
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod 700"), gpu_lease("GPU-1", tmp_path):
        pass

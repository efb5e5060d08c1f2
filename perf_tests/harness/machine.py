"""The machine a run is for, asked in processes of their own, and what of the ladder is chosen on it. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fluxfast.levels import get_level
from perf_tests.harness import gpu
from perf_tests.harness.runner import ROOT
from perf_tests.harness.schema import Environment


def ask_machine() -> dict[str, Any]:
    """What this machine can run, from a process that may import torch: `device`, `capability`, `levels`.

    Raises:
        ValueError: with what that process said, if it could not tell.
    """
    answer: dict[str, Any] = json.loads(_last_line_of("fluxfast", "levels", "--json"))
    return answer


def ask_environment() -> Environment:
    """What a worker that is started now would say it runs on.

    Raises:
        ValueError: with what the process that was asked said, if it could not tell.
    """
    line = _last_line_of("perf_tests.harness.environment")
    try:
        return Environment.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"this machine's environment cannot be read from {line[:80]!r}") from error


def default_workload(machine: Mapping[str, Any]) -> str:
    """The full shape on a Hopper GPU, the shipped tiny checkpoint elsewhere."""
    return "schnell" if machine["capability"] == [9, 0] else "tiny"


def first_gpu() -> int | str:
    """The GPU that workers will use, as NVML knows it."""
    return gpu.first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))


def git_sha() -> str:
    """Of the checkout; "nogit" outside one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "nogit"


def chosen_levels(asked: str | None, available: Sequence[str], unavailable: Mapping[str, str]) -> list[str]:
    """The levels of a comma-separated list in the order of `available`; all of those for None.

    Raises:
        ValueError: a level that is unknown, that this machine cannot run, or that is not among `available`.
    """
    if asked is None:
        return list(available)
    names = [get_level(name.strip()).id for name in asked.split(",")]
    for name in names:
        if name in unavailable:
            raise ValueError(f"--levels {name}: {unavailable[name]}")
        if name not in available:
            raise ValueError(f"--levels {name}: not on this run's ladder; choose from {', '.join(available)}")
    return [level for level in available if level in names]


def _last_line_of(*module: str) -> str:
    command = [sys.executable, "-m", *module]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"`{' '.join(command)}` failed with exit status {asked.returncode}: {last}")
    return asked.stdout.strip().splitlines()[-1]

"""The machine a run is for, asked in processes of their own, and what of the ladder is chosen on it. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fluxfast.levels import LEVELS, get_level
from perf_tests.harness import gpu
from perf_tests.harness.cpu import cpu_slug
from perf_tests.harness.runner import NVML_ORDER, ROOT
from perf_tests.harness.schema import Environment

WHOLE_LADDER = "ladder"
RECORDED = "recorded"
"""Words of `--levels`: the ladder, and what the machine's baseline holds, on the ladder or beside it."""


def ask_machine(workload: str | None = None) -> dict[str, Any]:
    """What this machine can run, from a process that may import torch: `device`, `capability`, `cpu_capability`,
    `levels`.

    And `workload` with `why_workload`: the one that was asked for, or this machine's default.

    Raises:
        ValueError: with what that process said, if it could not tell or the workload's checkpoint is not here.
    """
    chosen = [] if workload is None else ["--workload", workload]
    answer: dict[str, Any] = json.loads(_last_line_of("fluxfast", "levels", "--json", *chosen))
    return answer


def slug_of(asked: Mapping[str, Any], gpus: Sequence[int | str]) -> str:
    """The machine a baseline belongs to: `h200-700w`, or `cpu-avx2` where workers find no GPU.

    Args:
        asked: `ask_machine`'s answer.
        gpus: those that workers will use.

    Raises:
        ValueError: the GPUs are of several kinds, or only NVML finds one.
        GpuError: as `gpu.slug`.
    """
    if asked["device"] != "cuda":
        if unused := _unused_gpu():
            raise ValueError(
                f"this machine is {unused!r} and its torch finds no GPU: install a CUDA build of torch that its driver "
                "can run, or hide the GPU with an empty CUDA_VISIBLE_DEVICES to measure the processor"
            )
        return cpu_slug(asked["cpu_capability"])
    slugs = {own: gpu.slug(own) for own in gpus}
    if None in slugs.values():
        raise ValueError(
            "torch finds a GPU and NVML does not, so nothing tells which machine this is: expected an NVIDIA driver "
            "with libnvidia-ml.so.1; install it"
        )
    if len(set(slugs.values())) > 1:
        told = ", ".join(f"{own} is {slug}" for own, slug in slugs.items())
        raise ValueError(
            f"--gpus {len(gpus)}: expected GPUs of one kind, and {told}: name such in CUDA_VISIBLE_DEVICES, or take one"
        )
    return str(slugs[gpus[0]])


def _unused_gpu() -> str | None:
    """The slug of a GPU that NVML finds and CUDA_VISIBLE_DEVICES does not hide."""
    try:
        own = first_gpu()
    except gpu.GpuError:
        return None
    return gpu.slug(own)


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


def first_gpu() -> int | str:
    """The GPU that workers will use, as NVML knows it."""
    return gpu.first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))


def first_gpus(count: int) -> list[int | str]:
    """The GPUs that workers will use side by side, as NVML knows them.

    Raises:
        GpuError: fewer are visible.
    """
    return gpu.visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count)


def git_sha() -> str:
    """Of the checkout; "nogit" outside one, or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "nogit"
    return found.stdout.strip() or "nogit"


def words_of(asked: str | None) -> list[str]:
    """Of a comma-separated list of levels; of None, the ladder."""
    return [WHOLE_LADDER] if asked is None else [word.strip() for word in asked.split(",")]


def chosen_levels(
    asked: str | None,
    ladder: Sequence[str],
    runnable: Sequence[str],
    unavailable: Mapping[str, str],
    held: Collection[str] | None = None,
) -> list[str]:
    """The levels of a comma-separated list, lowest first; `ladder` for None, and for the word itself in the list.

    Args:
        held: what the word `RECORDED` stands for, without what is unavailable, which has a verdict of its own; None
            where nothing is compared with a baseline.

    Raises:
        ValueError: a level that is unknown, that this machine cannot run, or that is not among `runnable`; none at all.
    """
    names: list[str] = []
    for word in words_of(asked):
        if word == RECORDED:
            if held is None:
                raise ValueError(
                    f"--levels {RECORDED}: it is what a baseline holds, and nothing is compared with one here, as "
                    "`pytest perf_tests --benchmark-compare` does; name levels"
                )
            if gone := [level for level in held if level not in LEVELS]:
                raise ValueError(
                    f"--levels {RECORDED}: the baseline holds {', '.join(gone)}, which this checkout does not have; "
                    "name levels, or record anew"
                )
            names += [level for level in held if level not in unavailable]
        else:
            names += ladder if word == WHOLE_LADDER else [get_level(word).id]
    if not names:
        raise ValueError(
            f"--levels {asked}: no baseline holds a level that this machine can run; name levels, or '{WHOLE_LADDER}'"
        )
    for name in names:
        if name in unavailable:
            raise ValueError(f"--levels {name}: {unavailable[name]}")
        if name not in runnable:
            raise ValueError(f"--levels {name}: not in this run; choose from {', '.join(runnable)}")
    return [level for level in LEVELS if level in names]


def _last_line_of(*module: str) -> str:
    command = [sys.executable, "-m", *module]
    variables = {**os.environ, **NVML_ORDER}
    asked = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"`{' '.join(command)}` failed with exit status {asked.returncode}: {last}")
    return asked.stdout.strip().splitlines()[-1]

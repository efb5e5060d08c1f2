"""A pytest plugin (`-p fake_machine`): perf_tests on a machine with made-up GPUs or none, and made-up workers."""

from __future__ import annotations

import errno
import itertools
import time
import types
from pathlib import Path
from typing import Any

import pytest
from baseline_samples import ENVIRONMENT
from suite_samples import UNAVAILABLE, put, sample

from fluxfast.levels import LEVELS
from perf_tests.harness import gpu, lease, runner, suite
from perf_tests.harness.lease import GpuBusy
from perf_tests.harness.schema import Counters, Result
from perf_tests.harness.store import read_result
from perf_tests.harness.stored_run import RERUN

MACHINE = {
    "device": "cpu",
    "cpu_capability": "",  # the samples' slug is `cpu`
    "workload": "tiny",
    "why_workload": "made up",
    "levels": {level: UNAVAILABLE.get(level) for level in LEVELS},
}
BREAKS = {
    "disk": OSError(errno.ENOSPC, "No space left on device", "log.txt"),
    "busy": GpuBusy("GPU-1 is held by process 7"),
    "bug": RuntimeError("a mistake"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--breaks", choices=BREAKS, help="what the first worker of a confirmation or the second one meets")
    parser.addoption("--slow", help="a level that takes twice its time")
    parser.addoption("--hot", help="LEVEL:PROCESS that is throttled, but not on its rerun")
    parser.addoption("--torch", help="version of torch that a worker would say")
    parser.addoption("--cards", help="slugs of this machine's GPUs, comma-separated")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before the suite's own `pytest_configure`, which asks the machine."""
    started = itertools.count(1)
    option = config.option

    def run_level(level: str, workload: str, process: int, folder: Path, *, cache: Path, **more: Any) -> Result:
        number = next(started)
        cache.mkdir(exist_ok=True)
        if option.breaks and ("confirm" in folder.parts if option.slow else number == 2):
            raise BREAKS[option.breaks]
        result = sample(level, process, 2.0 if level == option.slow else 1.0)
        if option.hot == f"{level}:{process}" and folder.name != RERUN:
            result = result.model_copy(update={"counters": Counters(thermal_violation_ns=5)})
        put(folder, result)
        (folder / level / str(process) / "gpu").write_text(str(more["gpu"]))
        (folder / level / str(process) / "cache").write_text(str(cache))
        if option.cards:
            time.sleep(0.05)  # or the first lane would have done all before the second begins
        return read_result(folder / level / str(process) / "result.json")

    suite.runner = types.SimpleNamespace(run_level=run_level, new_run_folder=runner.new_run_folder)
    cards = option.cards.split(",") if option.cards else []
    suite.ask_machine = lambda workload: {**MACHINE, "device": "cuda" if cards else "cpu"}
    suite.ask_environment = lambda: ENVIRONMENT.model_copy(update={"torch": option.torch or ENVIRONMENT.torch})
    suite.first_gpus = lambda count: list(range(count))
    gpu.slug = lambda own=0: cards[own] if cards else None
    lease.default_folder = lambda: option.cache / "leases"

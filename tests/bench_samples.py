"""`bench` with made-up workers: what it would write, in milliseconds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from baseline_samples import ENVIRONMENT
from suite_samples import UNAVAILABLE, put, sample

from fluxfast.levels import get_level
from fluxfast.workloads import get_workload
from perf_tests.bench import cli
from perf_tests.harness.progress import TRACE_FILE
from perf_tests.harness.schema import Result
from perf_tests.harness.store import read_result

STAGES = {"text_encode": 0.1, "step_0": 0.2, "step_1": 0.3, "decode": 0.15, "postprocess": 0.05}
"""Shares of a call; the rest of it is in no stage."""


class FakeWorkers:
    """A `runner.run_level` that stores good results, but those of `broken`, and remembers what it was asked for."""

    def __init__(self, *broken: Result, interrupt_at: tuple[str, int] | None = None, is_tracing: bool = True) -> None:
        self.broken = {(result.level, result.process): result for result in broken}
        self.interrupt_at = interrupt_at
        self.is_tracing = is_tracing
        self.ran: list[tuple[str, int]] = []

    def __call__(self, level: str, workload: str, process: int, folder: Path, **options: Any) -> Result:
        options["on_progress"](level, process, "load", "", 0.0)
        if (level, process) == self.interrupt_at:
            raise KeyboardInterrupt
        self.ran.append((level, process))
        place = folder / level / str(process)
        assert not place.exists()
        put(folder, self.broken.get((level, process)) or staged(level, process))
        if options["is_traced"] and self.is_tracing:
            (place / TRACE_FILE).write_bytes(b"a trace")
        return read_result(place / "result.json")


def staged(level: str, process: int = 0) -> Result:
    """A good result with its stages; of a level beside the ladder, with the seconds of the one below."""
    base = sample(get_level(level).parent if level == "flux_fast" else level, process)
    assert base.measurement is not None
    stages = {name: [share * s for s in base.measurement.samples_s] for name, share in STAGES.items()}
    measurement = base.measurement.model_copy(update={"stages_s": stages})
    return base.model_copy(update={"level": level, "fields": get_level(level).fields(), "measurement": measurement})


def on_this_machine(patch: pytest.MonkeyPatch, **environment: Any) -> None:
    """The machine of `suite_samples`, without asking a process."""
    levels = {level: None for level in ("fp32", "bf16", "aoti", "flux_fast")} | UNAVAILABLE

    def asked(workload: str | None) -> dict[str, Any]:
        return {
            "device": "cpu", "cpu_capability": "", "levels": levels, "workload": get_workload(workload or "tiny").id,
        }  # fmt: skip

    patch.setattr(cli, "ask_machine", asked)
    patch.setattr(cli, "ask_environment", lambda: ENVIRONMENT.model_copy(update=environment))


def bench(workers: FakeWorkers, *arguments: str | Path) -> int:
    """Exit status of `python -m fluxfast bench ARGUMENTS`."""
    return cli.main([str(argument) for argument in arguments], run_level=workers)


def read_rows(folder: Path) -> dict[str, dict[str, str]]:
    """Level -> column -> cell of `bench.csv`."""
    with (folder / cli.CSV_FILE).open(encoding="utf-8", newline="") as file:
        return {row["level"]: row for row in csv.DictReader(file)}


def numbers(row: dict[str, str], names: Sequence[str]) -> list[float]:
    return [float(row[name]) for name in names]

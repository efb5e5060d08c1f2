"""Measures levels within a given number of minutes, the most telling first, and prints one short table last.

    python -m tools.measure_levels --minutes 25 --out results/levels [--levels merged_projections,bf16]
                                   [--workload schnell] [--level-s 240] [--processes 2] [--cache .cache] [--trace]
                                   [--alone]

For rungs that no baseline knows yet: every level runs in a fresh worker as the suite runs it, its parent with it unless
`--alone`, each under a time limit of its own. Results lie in `--out` as they come, the table is rewritten after each,
and what the minutes do not reach is named. With `--cache` compiled code is kept: give the same folder again for warm
starts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxfast.levels import BEYOND, FLUX_FAST, GEMM_SEARCH, get_level
from fluxfast.workloads import Workload, get_workload
from perf_tests.harness import fidelity, gpu, lease, runner, sanity
from perf_tests.harness.files import write_over
from perf_tests.harness.machine import ask_machine
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES, Deadlines, ProgressPrinter
from perf_tests.harness.schema import Measurement, Result

RUNGS = [level.id for level in BEYOND if level is not GEMM_SEARCH]
FIRST = (RUNGS[0], "bf16", RUNGS[-1], *RUNGS[1:-1], FLUX_FAST.id, "fp32")
"""The rung that the others stand on, what errors are against, the whole stack; then what each rung is worth. The search
of GEMMs is left out, for which no time has been enough yet."""
TABLE_FILE = "table.md"
LEAST_S = 20.0
"""A worker that has less than this left is not started: importing torch alone takes a good part of it."""


class OutOfTime(Exception):
    """A level's time is up; raised where the runner reports progress, so that the runner ends the worker."""


@dataclasses.dataclass
class Measured:
    """What came of one level: results of its processes, or why there is none.

    Attributes:
        results: one a finished process.
        why_not: of the last process that gave no measurement.
        wall_s: of each process from start to end, seconds.
    """

    results: list[Result] = dataclasses.field(default_factory=list)
    why_not: str | None = None
    wall_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def measurements(self) -> list[Measurement]:
        return [result.measurement for result in self.results if result.measurement]


def plan(levels: Sequence[str], *, alone: bool = False) -> list[str]:
    """The levels in their order, each followed by its parent unless that came before; fp32, the slowest, last.

    Args:
        alone: without parents that are not among the levels.
    """
    wanted = [id for level in levels for id in (level, None if alone else get_level(level).parent) if id is not None]
    return sorted(dict.fromkeys(wanted), key=lambda id: id == "fp32")


def measure(
    levels: Sequence[str],
    workload: str,
    folder: Path,
    *,
    minutes: float,
    level_s: float,
    deadlines: Deadlines,
    unavailable: dict[str, str],
    processes: int = 1,
    cache: Path | None = None,
    is_traced: bool = False,
    worker_command: Sequence[str] = runner.WORKER_COMMAND,
    on_result: Callable[[dict[str, Measured]], None] = lambda measured: None,
) -> dict[str, Measured]:
    """Run workers until the levels or the minutes are through.

    Args:
        levels: as `plan` gives them. folder: of the run; must hold no results yet.
        level_s: the longest that one worker may take, seconds.
        on_result: called after each worker with everything so far.

    Returns:
        Level -> what came of it, all levels included.
    """
    end = time.monotonic() + 60 * minutes
    measured = {level: Measured(why_not=unavailable.get(level)) for level in levels}
    jobs = [(level, process) for process in range(processes) for level in levels if level not in unavailable]
    printer = ProgressPrinter(deadlines, len(jobs))
    for level, process in jobs:
        started = time.monotonic()
        limit = min(level_s, end - started)
        if limit < LEAST_S:
            measured[level].why_not = measured[level].why_not or f"not started: {max(0, end - started):.0f} s were left"
            continue

        def watch(
            level: str, process: int, stage: Any, detail: str, elapsed_s: float, until: float = started + limit
        ) -> None:
            printer(level, process, stage, detail, elapsed_s)
            if time.monotonic() > until:
                raise OutOfTime(f"stopped in stage {stage!r} {detail}".strip())

        own = measured[level]
        try:
            result = runner.run_level(
                level, workload, process, folder,
                deadlines=deadlines, cache=cache, is_traced=is_traced, on_progress=watch, worker_command=worker_command,
            )  # fmt: skip
            own.results.append(result)
            if result.failure:
                own.why_not = f"{result.failure.kind.value}: {result.failure.message}"
        except OutOfTime as stopped:
            own.why_not = f"{stopped} after {time.monotonic() - started:.0f} s"
        own.wall_s.append(time.monotonic() - started)
        printer.close()
        on_result(measured)
    on_result(measured)
    return measured


def table(measured: dict[str, Measured], folder: Path, workload: Workload) -> str:
    """Markdown: a row a level, milliseconds, medians over all rounds and processes."""
    reference = next((id for id in ("fp32", "bf16") if id in measured and measured[id].measurements), None)
    error = f"one-step error to {reference}" if reference else "one-step error"
    columns = ("level", "whole call", "parent / it", "a step", "text encoding", "decode", "postprocess", error,
               "peak GiB", "compile s", "process s", "proofs")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(_row(id, measured, folder, reference, workload)) + " |" for id in measured]
    return "\n".join(lines) + "\n"


def _row(
    id: str, measured: dict[str, Measured], folder: Path, reference: str | None, workload: Workload
) -> Iterator[str]:
    own = measured[id].measurements
    yield f"`{id}`"
    if not own:
        why = (measured[id].why_not or "not run").splitlines()[0][:160]
        yield why.replace("|", "/")
        return
    parent = measured.get(get_level(id).parent or "")
    call = _median(own, lambda m: m.samples_s)
    yield _ms(call)
    yield f"{_median(parent.measurements, lambda m: m.samples_s) / call:.3f}" if parent and parent.measurements else "-"
    yield _ms(statistics.median(s for m in own for s in sanity.step_seconds(workload, m.stages_s)))
    for name in ("text_encode", "decode", "postprocess"):
        yield _ms(_median(own, lambda m, name=name: m.stages_s[name]))
    yield _error(id, reference, measured, folder)
    yield f"{max(m.peak_memory_bytes for m in own) / 2**30:.1f}"
    yield f"{max(m.apply_s + m.warmup_s for m in own):.0f}"
    yield f"{max(measured[id].wall_s):.0f}"
    proofs = [proof for m in own for proof in m.proofs]
    yield f"{sum(proof.holds for proof in proofs)} of {len(proofs)}" + (" *" if measured[id].why_not else "")


def _median(own: list[Measurement], samples: Callable[[Measurement], list[float]]) -> float:
    return statistics.median(value for m in own for value in samples(m))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _error(id: str, reference: str | None, measured: dict[str, Measured], folder: Path) -> str:
    if reference is None or id == reference:
        return "-"
    paths = []
    for level in (id, reference):
        first = next(result for result in measured[level].results if result.measurement)
        paths.append(folder / level / str(first.process) / first.measurement.step_output)
    if not all(path.is_file() for path in paths):
        return "-"
    try:
        return f"{fidelity.relative_l2(*(np.load(path, allow_pickle=False) for path in paths)):.5f}"
    except ValueError:
        return "not finite"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="for everything, the last worker's end included")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a new folder of this run")
    parser.add_argument("--levels", default=",".join(FIRST), help="comma-separated, most valuable first: %(default)s")
    parser.add_argument("--workload", default="schnell")
    parser.add_argument("--level-s", type=float, default=300.0, help="the longest one worker may take (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="rounds over all levels, a fresh process each")
    parser.add_argument("--cache", type=Path, help="compiled code of Inductor and Triton, kept between runs")
    parser.add_argument("--trace", action="store_true", help="profile one more call of each; see tools.kernel_table")
    parser.add_argument("--alone", action="store_true", help="the levels that are named, without their parents")
    options = parser.parse_args()
    try:
        levels = plan([get_level(name.strip()).id for name in options.levels.split(",")], alone=options.alone)
        workload = get_workload(options.workload)
        machine = ask_machine(options.workload)
    except ValueError as error:
        parser.error(str(error))
    is_gpu = machine["device"] == "cuda"
    uuid = str(gpu.first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))) if is_gpu else None
    folder = runner.new_run_folder(options.out, options.workload.partition("@")[0])

    def save(measured: dict[str, Measured]) -> None:
        write_over(folder / TABLE_FILE, table(measured, folder, workload).encode())

    with lease.gpu_lease(uuid) if is_gpu else contextlib.nullcontext():
        measured = measure(
            levels,
            options.workload,
            folder,
            minutes=options.minutes,
            level_s=options.level_s,
            deadlines=GPU_DEADLINES if is_gpu else CPU_DEADLINES,
            unavailable={id: why for id, why in machine["levels"].items() if why and id in levels},
            processes=options.processes,
            cache=options.cache,
            is_traced=options.trace,
            on_result=save,
        )
    print(f"\n{folder}\n{table(measured, folder, workload)}", flush=True)
    for id, own in measured.items():
        if own.why_not and own.measurements:
            print(f"* {id}: a process gave no measurement: {own.why_not}")
    return 0 if any(own.measurements for own in measured.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

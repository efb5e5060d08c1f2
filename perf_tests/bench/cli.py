"""`python -m fluxfast bench`: a ladder, or part of it, into a folder. No torch.

Exit status: 0; 1 if a level or a trace is missing; 2 for bad input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxfast.levels import LADDER, LEVELS
from fluxfast.workloads import WORKLOADS, get_workload
from perf_tests.bench import plot, table
from perf_tests.bench.workers import TRACED_PROCESS, Workers, refuse_other_environment
from perf_tests.harness import gpu, runner
from perf_tests.harness.cpu import is_cpu
from perf_tests.harness.files import StoreError, locked, write_over
from perf_tests.harness.lease import GpuBusy
from perf_tests.harness.machine import (
    ask_environment,
    ask_machine,
    chosen_levels,
    first_gpu,
    git_sha,
    slug_of,
)
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES, TRACE_FILE
from perf_tests.harness.replay import open_run
from perf_tests.harness.schema import Result
from perf_tests.harness.session import Session
from perf_tests.harness.stored_run import RunFacts, read_facts, refuse_other_workload

CSV_FILE, PLOT_FILE, IMAGES = "bench.csv", "bench.png", "images"
BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str], run_level: Callable[..., Result] = runner.run_level) -> int:
    """Measure, then write table, plot and images; one sentence on stderr for whatever is wrong."""
    options = _parser().parse_args(arguments)
    if options.replay:
        return _draw_stored(options)
    try:
        facts = _stored_facts(options) if options.resume else _new_facts(options)
        folder = options.resume or _new_folder(options.output)
        # A run that has traces gets them for the rest as well.
        options.trace |= any(folder.glob(f"*/{TRACED_PROCESS}/{TRACE_FILE}"))
        session = _session(folder, facts, options, run_level)
    except (ValueError, StoreError, gpu.GpuError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        with locked(folder):
            print(f"measuring {', '.join(facts.levels)} and their references into {folder}", file=sys.stderr)
            rows = table.rows(session)
            _write(session, rows)
            _copy_images(session, rows)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is kept: go on with --resume {folder}", file=sys.stderr)
        return INTERRUPTED
    except (StoreError, GpuBusy, OSError) as error:
        print(f"error: {error}; what was measured is kept: go on with --resume {folder}", file=sys.stderr)
        return BAD_INPUT
    missing = _missing(session, rows, options.trace)
    _report(session, rows, missing)
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxfast bench",
        description=f"Measure levels, each in fresh processes, into {CSV_FILE}, {PLOT_FILE} and {IMAGES}/. The folder "
        "is a run that `pytest perf_tests --benchmark-compare --replay FOLDER` judges as well.",
    )
    parser.add_argument(
        "--levels",
        help=f"comma-separated, of {', '.join(LEVELS)}; default: the ladder. bf16, fp32 and what lies directly below a "
        "level come along, as references",
    )
    parser.add_argument(
        "--workload",
        help=f"one of {', '.join(WORKLOADS)}; default: tiny, and on a Hopper GPU schnell-hub or, without its weights, "
        "schnell",
    )
    parser.add_argument("--processes", type=int, help="fresh processes a level; default: 3 on a GPU, 1 on a CPU")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: a new one in results/")
    folder.add_argument("--resume", type=Path, metavar="FOLDER", help="run only what has no measurement there yet")
    folder.add_argument("--replay", type=Path, metavar="FOLDER", help="table and plot of a stored run; runs nothing")
    parser.add_argument(
        "--trace", action="store_true", help=f"a profile of each level for Perfetto: LEVEL/0/{TRACE_FILE}; not timed"
    )
    parser.add_argument("--cache", type=Path, default=runner.ROOT / ".cache", help="compiled code, kept between runs")
    return parser


def _draw_stored(options: argparse.Namespace) -> int:
    """Table and plot of a run that was measured elsewhere, as on the machine with the GPU."""
    try:
        if options.levels or options.processes or options.workload or options.trace:
            raise ValueError(f"--replay {options.replay} measures nothing: leave every other option away")
        session = open_run(options.replay, None)
        refuse_other_workload(options.replay, read_facts(options.replay), session.workload, session.results)
        rows = table.rows(session)
        _write(session, rows)
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    missing = _missing(session, rows, is_traced=False)
    _report(session, rows, missing)
    return 1 if missing else 0


def _new_facts(options: argparse.Namespace) -> RunFacts:
    machine = ask_machine(options.workload)
    is_gpu = machine["device"] == "cuda"
    workload = get_workload(machine["workload"])
    unavailable = {level: why for level, why in machine["levels"].items() if why}
    processes = options.processes if options.processes is not None else 3 if is_gpu else 1
    if processes < 1:
        raise ValueError(f"--processes is {processes}, expected at least 1")
    runnable = [level for level in LEVELS if level not in unavailable]
    ladder = [level.id for level in LADDER if level.id in runnable]
    return RunFacts(
        slug=slug_of(machine, [first_gpu()] if is_gpu else ()),
        workload=workload.id,
        workload_digest=workload.digest,
        levels=chosen_levels(options.levels, ladder, runnable, unavailable),
        unavailable=unavailable,
        processes=processes,
    )


def _stored_facts(options: argparse.Namespace) -> RunFacts:
    folder, facts = options.resume, read_facts(options.resume)
    if options.levels is not None or options.processes is not None:
        raise ValueError(f"--resume {folder} measures what that run lacks: leave --levels and --processes away")
    if options.workload not in (None, facts.workload):
        raise ValueError(
            f"--workload {options.workload}: the run in {folder} is of {facts.workload!r}; start a new one"
        )
    refuse_other_workload(folder, facts, get_workload(facts.workload), {})  # results: `workers.kept`
    refuse_other_environment(folder, facts, ask_environment())
    return facts


def _new_folder(output: Path | None) -> Path:
    if output is None:
        return runner.new_run_folder(runner.ROOT / "results", git_sha())
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: not an empty folder; name a new one, or go on with --resume {output}")
    output.mkdir(parents=True, exist_ok=True)
    return output


def _session(folder: Path, facts: RunFacts, options: argparse.Namespace, run_level: Callable[..., Result]) -> Session:
    is_gpu = not is_cpu(facts.slug)
    workload = get_workload(facts.workload)
    return Session(
        folder=folder,
        workload=workload,
        levels=facts.levels,
        unavailable=facts.unavailable,
        processes=facts.processes,
        slug=facts.slug,
        baseline=None,
        baseline_folder=folder,
        is_compared=False,
        measure=Workers(
            workload=workload,
            deadlines=GPU_DEADLINES if is_gpu else CPU_DEADLINES,
            gpu=str(first_gpu()) if is_gpu else None,
            cache=options.cache,
            is_traced=options.trace,
            run_level=run_level,
        ),
    )


def _write(session: Session, rows: Sequence[table.Row]) -> None:
    absent = {level.id: session.unavailable[level.id] for level in LADDER if level.id in session.unavailable}
    notes = [f"not on this machine: {level} ({why})" for level, why in absent.items()]
    notes += [f"* {row.level} was disturbed: {row.disturbed}" for row in rows if row.disturbed]
    notes += [f"{row.level} without {row.without}" for row in rows if row.without]
    write_over(session.folder / CSV_FILE, table.to_csv(rows))
    write_over(session.folder / PLOT_FILE, plot.draw(rows, session.workload, notes))


def _copy_images(session: Session, rows: Sequence[table.Row]) -> None:
    (session.folder / IMAGES).mkdir(exist_ok=True)
    for row in rows:
        if row.error is None:
            image = session.image_path(row.level, 0).read_bytes()
            write_over(session.folder / IMAGES / f"{row.level}.png", image)


def _missing(session: Session, rows: Sequence[table.Row], is_traced: bool) -> list[str]:
    """What was asked for and is not there, a sentence each."""
    sentences = []
    for row in rows:
        if row.error is not None:
            sentences.append(f"{row.level} failed: {row.error}")
        elif is_traced and not (path := session.image_path(row.level, 0).with_name(TRACE_FILE)).is_file():
            sentences.append(f"{row.level} left no trace: {path} is missing; its log is {path.with_name('log.txt')}")
    return sentences


def _report(session: Session, rows: Sequence[table.Row], missing: Sequence[str]) -> None:
    print(f"{'level':20}{'median s':>10}{'low s':>10}{'high s':>10}{'to bf16':>9}{'to parent':>11}  parent")
    for row in rows:
        numbers = (row.median_s, row.low_s, row.high_s)
        cells = "".join(f"{'-' if number is None else f'{number:.4g}':>10}" for number in numbers)
        ratios = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.speedup_to_bf16, row.speedup_to_parent)]
        print(f"{row.level:20}{cells}{ratios[0]:>9}{ratios[1]:>11}  {row.parent or '-'}")
    print(f"\n{session.folder / CSV_FILE}\n{session.folder / PLOT_FILE}")
    if session.measure is not None:
        print(session.folder / IMAGES)
    for sentence in missing:
        print(f"error: {sentence}", file=sys.stderr)
    if any(row.error for row in rows):
        print(f"run what failed again with --resume {session.folder}", file=sys.stderr)

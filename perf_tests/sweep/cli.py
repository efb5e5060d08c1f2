"""`python -m perf_tests sweep`: levels x workloads x versions over a Ray cluster, or one by one without Ray."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Final

from fluxfast.levels import LADDER, get_level
from fluxfast.workloads import get_workload
from perf_tests.bisect import versions
from perf_tests.bisect.environments import Recipe, recipe_here
from perf_tests.harness.culprit import AXES
from perf_tests.harness.files import StoreError
from perf_tests.harness.runner import ROOT
from perf_tests.harness.session import with_references
from perf_tests.sweep.cells import AS_INSTALLED, Cell, Node, Record, all_cells, choose_kinds
from perf_tests.sweep.dispatch import stored_sweep
from perf_tests.sweep.driver import Sweep, describe_runs
from perf_tests.sweep.pools import open_pool

DONE: Final = 0
INCOMPLETE: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(prog="python -m perf_tests sweep", description=__doc__)
    own.add_argument(
        "--ray", choices=("auto", "local"), required=True, help="the running cluster, or one of this machine"
    )
    own.add_argument(
        "--levels", metavar="A,B", help="of the ladder, references come along; default: all that the machines can run"
    )
    own.add_argument("--workloads", metavar="A,B", default="tiny")
    own.add_argument("--axis", choices=AXES, help="the component whose --versions are swept")
    own.add_argument("--versions", metavar="A,B", help="default: what is installed")
    own.add_argument("--index-url", help="where nightlies lie, beside the usual index")
    own.add_argument("--base-env", action="store_true", help="install the component alone, over this Python's packages")
    own.add_argument("--processes", type=int, default=1, help="fresh processes a level")
    own.add_argument("--out", type=Path, help="default: a new folder below results/sweep; a folder goes on")
    own.add_argument("--cache", type=Path, default=ROOT / ".cache", help="on every machine")
    return own


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if every cell has a result, 1 if not, 2 after one sentence if it cannot be asked."""
    asked = parser().parse_args(arguments)
    try:
        workloads, names, levels, recipe = _plan(asked)
        folder = (asked.out or ROOT / "results" / "sweep" / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}").resolve()
        begun = stored_sweep(folder)
        if asked.axis and begun.axis not in (None, asked.axis):
            raise ValueError(f"{folder} holds a sweep over {begun.axis}, asked is {asked.axis}: choose another --out")
        pool = open_pool(asked.ray, _say)
    except (ValueError, OSError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        nodes = pool.nodes()
        kinds = choose_kinds(workloads, nodes, begun.begun_on())
        folder.mkdir(parents=True, exist_ok=True)
        of_kind = {name: next(node for node in nodes if node.kind == kind) for name, kind in kinds.items()}
        cells = _runnable(all_cells(workloads, names, _with_references(levels, of_kind), asked.processes), of_kind)
        _say(f"{len(cells)} cells on {sum(node.slots for node in nodes)} slot(s) of {len(nodes)} machine(s): {folder}")
        runs = describe_runs(folder, cells, levels, of_kind, asked.processes)
        records = Sweep(folder, cells, kinds, recipe, asked.cache.resolve(), _say).run(pool)
    except KeyboardInterrupt:
        _say(f"stopped; the same command with --out {folder} goes on from here")
        return INTERRUPTED
    except OSError as error:
        print(f"error: {error}; --out has to be a folder that can be written, with space left", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        pool.close()
    return _tell(records, runs)


def _plan(asked: argparse.Namespace) -> tuple[list[str], list[str], list[str], Recipe | None]:
    workloads = list(dict.fromkeys(get_workload(name.strip()).id for name in asked.workloads.split(",")))
    if odd := [name for name in workloads if ".." in PurePath(name).parts]:
        raise ValueError(
            f"--workloads {odd[0]}: its results lie below --out by that name; name its folder without '..'"
        )
    levels = [get_level(name.strip()).id for name in asked.levels.split(",")] if asked.levels else []
    if bool(asked.axis) != bool(asked.versions):
        raise ValueError("--axis and --versions go together: the component, and which of its versions")
    if asked.processes < 1:
        raise ValueError(f"--processes is {asked.processes}, expected at least 1")
    ladder = [level.id for level in LADDER]
    if odd := [level for level in levels if level not in ladder]:
        raise ValueError(f"--levels {odd[0]}: not on the ladder; choose from {', '.join(ladder)}")
    chosen = [level for level in ladder if not levels or level in levels]
    if not asked.versions:
        return workloads, [AS_INSTALLED], chosen, None
    recipe = recipe_here(asked.axis, index_url=asked.index_url, over_base=asked.base_env)
    swept = dict.fromkeys(versions.parse(name) for name in asked.versions.split(","))
    return workloads, [str(version) for version in swept], chosen, recipe


def _with_references(levels: Sequence[str], nodes: Mapping[str, Node]) -> list[str]:
    """`levels` and what a replay needs to judge them: fp32, bf16 and the nearest level below each.

    Raises:
        ValueError: for a workload whose machines can run none of `levels`.
    """
    needed = {*levels}
    for name, node in nodes.items():
        runnable = [id for id in levels if id not in node.unavailable]
        if not runnable:
            raise ValueError(f"{name}: {node.kind} can run none of {', '.join(levels)}: {node.unavailable[levels[0]]}")
        needed |= {*with_references(runnable, node.unavailable)}
    return [level.id for level in LADDER if level.id in needed]


def _runnable(cells: Sequence[Cell], nodes: Mapping[str, Node]) -> list[Cell]:
    """Without the levels that the chosen machines cannot run, which is said."""
    for name, node in nodes.items():
        for level in dict.fromkeys(cell.level for cell in cells):
            if level in node.unavailable:
                _say(f"{name}: {level} is left out on {node.kind}: {node.unavailable[level]}")
    return [cell for cell in cells if cell.level not in nodes[cell.workload].unavailable]


def _tell(records: Sequence[Record], runs: Sequence[Path]) -> int:
    lost = [record for record in records if any(attempt.outcome == "lost" for attempt in record.attempts)]
    unrun = [record for record in records if record.unrun is not None]
    for record in lost:
        where = ", ".join(f"{attempt.outcome} on {attempt.node}" for attempt in record.attempts)
        print(f"{record.version} {record.workload} {record.level} #{record.process}: {where}")
    for record in unrun:
        print(f"{record.version} {record.workload} {record.level} #{record.process}: no result: {record.unrun}")
    print(f"{len(records) - len(unrun)} of {len(records)} cells have a result; {len(lost)} lost a machine on the way")
    shares = [1 - own.worker_s / own.seconds for record in records for own in record.attempts if own.worker_s]
    if shares:
        print(f"the sweep's own share of a cell's time: median {statistics.median(shares):.1%}, most {max(shares):.1%}")
    for run in runs:
        print(f"judge: pytest perf_tests --benchmark-compare --replay {run}")
    return INCOMPLETE if unrun else DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Hands cells to machines, gathers results, gives the cells of a lost machine to another. Knows nothing of Ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from fluxfast.workloads import get_workload
from perf_tests.bisect.environments import Recipe
from perf_tests.harness import store
from perf_tests.harness.files import dump_json, write_new, write_over
from perf_tests.harness.progress import RESULT_FILE
from perf_tests.harness.stored_run import RUN_FILE, RunFacts
from perf_tests.sweep.cells import AS_INSTALLED, Attempt, Cell, Node, Record
from perf_tests.sweep.work import Delivery, Order

MAX_LOST: Final = 3
"""A cell that took so many machines with it is given up."""
SWEEP_FILE: Final = "sweep.json"


class NodeLost(Exception):
    """The machine that ran a cell is gone, or the process on it that stood between it and us."""


class Pool(Protocol):
    """Where cells run."""

    def nodes(self) -> Sequence[Node]:
        """The machines that are there now."""

    def start(self, node: Node, order: Order) -> object:
        """Begin a cell on a machine with a free slot; a ticket."""

    def finished(self, tickets: Sequence[object]) -> object:
        """Wait until one of them is done."""

    def take(self, ticket: object) -> Delivery:
        """What came of it.

        Raises:
            NodeLost: nothing did.
        """

    def close(self) -> None:
        """Let go of the machines."""


class Sweep:
    """One sweep into `folder`.

    Args:
        cells: all of it; those whose result is in the folder already are not run again.
        kinds: workload -> kind of machine.
        recipe: of the environments of the versions.
        say: gets a line of progress.
    """

    def __init__(
        self,
        folder: Path,
        cells: Sequence[Cell],
        kinds: Mapping[str, str],
        recipe: Recipe | None,
        cache: Path,
        say: Callable[[str], None],
        worker_command: Sequence[str] | None = None,
    ) -> None:
        self._folder = folder
        self._kinds = kinds
        self._recipe = recipe
        self._cache = cache
        self._say = say
        self._worker_command = worker_command
        self.records = {
            cell: Record(workload=cell.workload, version=cell.version, level=cell.level, process=cell.process)
            for cell in cells
        }
        self._waiting = [cell for cell in cells if not (folder / cell.path / RESULT_FILE).exists()]
        self._running: dict[object, tuple[Cell, Node, float]] = {}

    def run(self, pool: Pool) -> list[Record]:
        """Run every cell; one record each. A pool that shrinks is used as far as it goes."""
        while self._waiting or self._running:
            nodes = pool.nodes()
            self._start_what_fits(pool, nodes)
            if not self._running:
                for cell in self._waiting:
                    why = f"no machine of kind {self._kinds[cell.workload]!r} is left"
                    self._note(cell, unrun=f"{why}; the same command goes on when there is one")
                break
            ticket = pool.finished(list(self._running))
            self._end(*self._running.pop(ticket), pool, ticket)
        return list(self.records.values())

    def _start_what_fits(self, pool: Pool, nodes: Sequence[Node]) -> None:
        busy = [node.id for _, node, _ in self._running.values()]
        free = {node.id: node.slots - busy.count(node.id) for node in nodes}
        for cell in list(self._waiting):
            fitting = [n for n in nodes if n.kind == self._kinds[cell.workload] and free[n.id] > 0]
            if not fitting:
                continue
            # Not where it was lost before, if there is another.
            lost_on = [attempt.node for attempt in self.records[cell].attempts]
            node = min(fitting, key=lambda n: (lost_on.count(n.id), -free[n.id]))
            free[node.id] -= 1
            self._waiting.remove(cell)
            recipe = None if cell.version == AS_INSTALLED else self._recipe
            order = Order(cell, node.slug, recipe, self._cache, self._worker_command)
            self._say(f"{cell.path}: on {node.id} ({node.kind})")
            self._running[pool.start(node, order)] = (cell, node, time.monotonic())

    def _end(self, cell: Cell, node: Node, since: float, pool: Pool, ticket: object) -> None:
        def attempt(outcome: Literal["measured", "failed", "lost"], said: str, worker_s: float = 0.0) -> None:
            own = Attempt(
                node=node.id,
                kind=node.kind,
                outcome=outcome,
                said=said,
                seconds=time.monotonic() - since,
                worker_s=worker_s,
            )
            self._say(f"{cell.path}: {outcome} on {node.id} after {own.seconds:.0f} s{': ' if said else ''}{said}")
            self._note(cell, attempts=[*self.records[cell].attempts, own])

        try:
            delivery = pool.take(ticket)
        except NodeLost as error:
            attempt("lost", str(error))
            if len(self.records[cell].attempts) < MAX_LOST:
                self._waiting.insert(0, cell)
            else:
                self._note(cell, unrun=f"lost with {MAX_LOST} machines")
            return
        if delivery.unrun is not None:
            attempt("failed", delivery.unrun)
            self._note(cell, unrun=delivery.unrun)
            return
        place = self._folder / cell.path
        gather(place, delivery.files)
        failure = store.read_result(place / RESULT_FILE).failure
        attempt("failed" if failure else "measured", failure.message if failure else "", delivery.worker_s)

    def _note(self, cell: Cell, **change: object) -> None:
        self.records[cell] = self.records[cell].model_copy(update=change)
        records = [record.model_dump(mode="json") for record in self.records.values()]
        write_over(self._folder / SWEEP_FILE, dump_json({"sweep_schema": 1, "cells": records}))


def gather(place: Path, files: Mapping[str, bytes]) -> None:
    """Make a cell's folder appear whole; one that is there already, from a machine taken for lost, stays."""
    place.parent.mkdir(parents=True, exist_ok=True)
    incoming = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    incoming.mkdir()
    for name, raw in files.items():
        write_new(incoming / Path(name).name, raw)
    if not place.exists():
        incoming.rename(place)


def describe_runs(folder: Path, cells: Sequence[Cell], nodes: Mapping[str, Node], processes: int) -> list[Path]:
    """Write `run.json` for each version and workload, so that `pytest perf_tests --replay` judges it.

    Args:
        nodes: workload -> a machine of its kind.
    """
    runs: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        runs.setdefault((cell.version, cell.workload), []).append(cell.level)
    written = []
    for (version, name), levels in runs.items():
        workload, node = get_workload(name), nodes[name]
        facts = RunFacts(
            slug=node.slug,
            workload=name,
            workload_digest=workload.digest,
            levels=list(dict.fromkeys(levels)),
            unavailable=dict(node.unavailable),
            processes=processes,
        )
        path = folder / version / name
        path.mkdir(parents=True, exist_ok=True)
        write_over(path / RUN_FILE, facts.model_dump_json(indent=1).encode())
        written.append(path)
    return written

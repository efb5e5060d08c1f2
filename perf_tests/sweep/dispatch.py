"""Hands cells to machines, gives those of a lost machine to another. Knows neither Ray nor what a cell is for."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from perf_tests.harness.files import dump_json, read_model, write_over
from perf_tests.sweep.cells import Attempt, Cell, Node, Record, SweepFile
from perf_tests.sweep.work import Delivery

MAX_LOST: Final = 3
"""A cell that took so many machines with it is given up."""
SWEEP_FILE: Final = "sweep.json"

Outcome = Literal["measured", "failed", "lost"]


class NodeLost(Exception):
    """The machine that ran a cell is gone, or the process on it that stood between it and us."""


class Work(Protocol):
    """A cell and how it is run; it travels to the machine."""

    def run(self) -> Delivery:
        """Run it there."""


class Pool(Protocol):
    """Where cells run."""

    def nodes(self) -> Sequence[Node]:
        """The machines that are there now."""

    def start(self, node: Node, work: Work) -> object:
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


def stored_sweep(folder: Path) -> SweepFile:
    """What `sweep.json` holds of an earlier part; nothing if there was none.

    Raises:
        StoreError: if it is damaged.
    """
    path = folder / SWEEP_FILE
    return read_model(path, SweepFile, "choose another folder") if path.exists() else SweepFile()


class Dispatch(abc.ABC):
    """Cells on their way through a pool. What they are for is a subclass's.

    Args:
        folder: gets `sweep.json`, written after every attempt.
        records: of every cell; one that is dispatched must be there.
        kinds: workload -> kind of machine.
        say: gets a line of progress.
        axis: the component whose versions are swept.
    """

    def __init__(
        self,
        folder: Path,
        records: Mapping[Cell, Record],
        kinds: Mapping[str, str],
        say: Callable[[str], None],
        axis: str | None = None,
    ) -> None:
        self._axis = axis
        self._folder = folder
        self._kinds = kinds
        self._say = say
        self.records = dict(records)
        self._waiting: list[Cell] = []
        self._running: dict[object, tuple[Cell, Node, float]] = {}

    @abc.abstractmethod
    def _work(self, cell: Cell, node: Node) -> Work:
        """What the machine gets."""

    @abc.abstractmethod
    def _receive(self, cell: Cell, delivery: Delivery) -> tuple[Outcome, str]:
        """Store what came; its outcome and what is to be said of it."""

    def _tried_on(self, cell: Cell) -> list[str]:
        """Machines that the cell is not given to again if there is another: those it was lost on."""
        return [attempt.node for attempt in self.records[cell].attempts]

    def _give_up(self, cell: Cell, why: str) -> None:
        self._note(cell, unrun=why)

    def _dispatch(self, pool: Pool, cells: Sequence[Cell]) -> list[Cell]:
        """Run the cells; those that no machine of their kind is left for. A pool that shrinks is used as it goes."""
        self._waiting = list(cells)
        while self._waiting or self._running:
            self._start_what_fits(pool, pool.nodes())
            if not self._running:
                break
            ticket = pool.finished(list(self._running))
            self._end(*self._running.pop(ticket), pool, ticket)
        return self._waiting

    def _start_what_fits(self, pool: Pool, nodes: Sequence[Node]) -> None:
        busy = [node.id for _, node, _ in self._running.values()]
        free = {node.id: node.slots - busy.count(node.id) for node in nodes}
        for cell in list(self._waiting):
            fitting = [n for n in nodes if n.kind == self._kinds[cell.workload] and free[n.id] > 0]
            if not fitting:
                continue
            tried_on = self._tried_on(cell)
            node = min(fitting, key=lambda n: (tried_on.count(n.id), -free[n.id]))
            free[node.id] -= 1
            self._waiting.remove(cell)
            self._say(f"{cell.path}: on {node.id} ({node.kind})")
            self._running[pool.start(node, self._work(cell, node))] = (cell, node, time.monotonic())

    def _end(self, cell: Cell, node: Node, since: float, pool: Pool, ticket: object) -> None:
        def attempt(outcome: Outcome, said: str, worker_s: float = 0.0) -> None:
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
            lost = [own for own in self.records[cell].attempts if own.outcome == "lost"]
            if len(lost) % MAX_LOST:
                self._waiting.insert(0, cell)
            else:
                self._give_up(cell, f"lost with {len(lost)} machines")
            return
        if delivery.unrun is not None:
            attempt("failed", delivery.unrun)
            self._give_up(cell, delivery.unrun)
            return
        attempt(*self._receive(cell, delivery), delivery.worker_s)

    def _note(self, cell: Cell, **change: object) -> None:
        self.records[cell] = self.records[cell].model_copy(update=change)
        document = SweepFile(axis=self._axis, cells=list(self.records.values()))
        write_over(self._folder / SWEEP_FILE, dump_json(document.model_dump(mode="json")))

"""What a sweep measures, where, and what became of it. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from pydantic import Field

from perf_tests.harness.runner import schedule
from perf_tests.harness.schema import Strict

AS_INSTALLED = "as_installed"
"""Stands for the versions of the running Python."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One worker process.

    Attributes:
        version: of the component that is swept, or `AS_INSTALLED`.
    """

    workload: str
    version: str
    level: str
    process: int

    @property
    def path(self) -> str:
        """Where its result lies below the sweep's folder; the first two parts are a run that `--replay` judges."""
        return f"{self.version}/{self.workload}/{self.level}/{self.process}"


@dataclasses.dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        id: as the pool calls it.
        kind: GPU and power limit, or the processor; cells of one comparison stay on one kind.
        slug: of its baselines.
        slots: worker processes at a time: its GPUs, or one.
        unavailable: level -> why it cannot run there.
    """

    id: str
    kind: str
    slug: str
    slots: int
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Attempt(Strict):
    """One try at a cell."""

    node: str
    kind: str
    outcome: Literal["measured", "failed", "lost"]
    """`failed`: the worker's result says why. `lost`: the node went away and there is no result."""
    said: str
    seconds: float
    """From the order to the gathered result."""
    worker_s: float = 0.0
    """Of these, in the worker itself."""


class Record(Strict):
    """One cell in `sweep.json`."""

    workload: str
    version: str
    level: str
    process: int
    attempts: list[Attempt] = Field(default_factory=list)
    unrun: str | None = None
    """Why it was given up without a result."""

    @classmethod
    def of(cls, cell: Cell) -> Record:
        """Of a cell that was not tried yet."""
        return cls(workload=cell.workload, version=cell.version, level=cell.level, process=cell.process)


class SweepFile(Strict):
    """`sweep.json`."""

    sweep_schema: Literal[1] = 1
    axis: str | None = None
    """The component whose versions are swept."""
    cells: list[Record] = Field(default_factory=list)

    def begun_on(self) -> dict[str, set[str]]:
        """Workload -> kinds of machine that were given a cell of it."""
        kinds: dict[str, set[str]] = {}
        for record in self.cells:
            kinds.setdefault(record.workload, set()).update(attempt.kind for attempt in record.attempts)
        return kinds


def all_cells(workloads: Sequence[str], versions: Sequence[str], levels: Sequence[str], processes: int) -> list[Cell]:
    """Every cell; within a workload the versions take turns, so that a drift of the machines meets them alike."""
    return [
        Cell(workload=workload, version=version, level=level, process=process)
        for workload in workloads
        for level, process in schedule(levels, processes)
        for version in versions
    ]


def choose_kinds(
    workloads: Sequence[str], nodes: Sequence[Node], begun_on: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """Workload -> kind of machine. Levels and versions of a workload are compared, so they share it.

    Each workload goes where the fewest wait for a slot, and goes on where it was begun.

    Args:
        begun_on: of those that were begun already.

    Raises:
        ValueError: there is no machine, or none of the kind that a workload was begun on.
    """
    slots: dict[str, int] = {}
    for node in nodes:
        slots[node.kind] = slots.get(node.kind, 0) + node.slots
    if not slots:
        raise ValueError("the cluster has no machine that answers: start one with `ray start`")
    waiting = dict.fromkeys(slots, 0)
    chosen = {}
    for workload in workloads:
        own = begun_on.get(workload)
        fitting = sorted(slots.keys() & own if own else slots)
        if own and not fitting:
            raise ValueError(
                f"{workload} was begun on {' or '.join(sorted(own))} and there is only {', '.join(sorted(slots))}: "
                "what two kinds of machine say is not compared; go on where there is one of the first kind, or choose "
                "another folder"
            )
        kind = min(fitting, key=lambda kind: ((waiting[kind] + 1) / slots[kind], -slots[kind]))
        waiting[kind] += 1
        chosen[workload] = kind
    return chosen

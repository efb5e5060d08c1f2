"""A pool of one machine and no Ray: a cell runs when its result is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from perf_tests.sweep.cells import Node
from perf_tests.sweep.dispatch import Work
from perf_tests.sweep.work import Delivery, Machine


class SerialPool:
    """This machine, one cell at a time."""

    def __init__(self, machine: Machine) -> None:
        self._node = Node("this machine", machine.kind, machine.slug, 1, machine.unavailable)

    def nodes(self) -> Sequence[Node]:
        """This one."""
        return [self._node]

    def start(self, node: Node, work: Work) -> object:
        """Nothing begins yet."""
        self._work = work
        return object()

    def finished(self, tickets: Sequence[object]) -> object:
        """The only one."""
        return tickets[0]

    def take(self, ticket: object) -> Delivery:
        """Run it."""
        return self._work.run()

    def close(self) -> None:
        """Nothing is held."""

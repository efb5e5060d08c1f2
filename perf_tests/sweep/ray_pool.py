"""The machines of a Ray cluster. Imported only where Ray is asked for and installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from perf_tests.harness.runner import ROOT
from perf_tests.sweep.cells import Node
from perf_tests.sweep.dispatch import NodeLost, Work
from perf_tests.sweep.work import Delivery, Machine, describe_machine

SAID_LOST: Final = (
    "NodeDiedError",
    "WorkerCrashedError",
    "ObjectLostError",
    "TaskUnschedulableError",
    "LocalRayletDiedError",
    "OutOfMemoryError",
    "OutOfDiskError",
    "RuntimeEnvSetupError",
    "RaySystemError",
)
"""Ray's ways to say that the machine, or Ray's process on it, went away; an error of our own is none of them."""
LOST: Final = tuple(getattr(ray.exceptions, name) for name in SAID_LOST if hasattr(ray.exceptions, name))
"""Those of them that the installed Ray has."""


class RayPool:
    """Every machine of a cluster, with the checkout at the same path on each.

    Args:
        address: of the cluster; None starts one on this machine.
    """

    def __init__(self, address: str | None) -> None:
        ray.init(
            address=address,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
            # Tasks are functions of this package, which need not be installed there.
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        self._known: dict[str, Node] = {}

    def close(self) -> None:
        """Leave the cluster; stop it if it was started here."""
        ray.shutdown()

    def nodes(self) -> Sequence[Node]:
        """Machines that are alive; a new one is asked what it is."""
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        new = {id: self._task(id, resources, _describe) for id, resources in alive.items() if id not in self._known}
        for id, asked in new.items():
            try:
                machine: Machine = ray.get(asked)
            except LOST:
                continue
            slots = int(alive[id].get("GPU", 0)) or 1
            self._known[id] = Node(id, machine.kind, machine.slug, slots, machine.unavailable)
        return [self._known[id] for id in alive if id in self._known]

    def start(self, node: Node, work: Work) -> object:
        """Begin a cell; Ray gives it one GPU, or all processors of a machine without one."""
        resources: dict[str, float] = next((own["Resources"] for own in ray.nodes() if own["NodeID"] == node.id), {})
        return self._task(node.id, resources, _run, work)

    def finished(self, tickets: Sequence[object]) -> object:
        """The first one that is done."""
        done, _ = ray.wait(list(tickets), num_returns=1)
        return done[0]

    def take(self, ticket: object) -> Delivery:
        """Its files.

        Raises:
            NodeLost: if the machine is gone.
        """
        try:
            delivery: Delivery = ray.get(ticket)
        except LOST as error:
            raise NodeLost(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        return delivery

    def _task(self, node: str, resources: dict[str, float], function: Any, *arguments: object) -> Any:
        gpus = 1 if resources.get("GPU") else 0
        cpus = 0 if gpus else int(resources.get("CPU", 1))
        # Retries are ours: they are recorded, and stay on one kind of machine.
        remote = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=0)(function)
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
        placed = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return remote.options(scheduling_strategy=placed).remote(own, *arguments)


def _describe(environment: dict[str, str | None]) -> Machine:
    _become(environment)
    return describe_machine()


def _run(environment: dict[str, str | None], work: Work) -> Delivery:
    _become(environment)
    return work.run()


def _become(environment: dict[str, str | None]) -> None:
    """Undo what Ray sets for its tasks: with its OMP_NUM_THREADS a worker would time another number of threads."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

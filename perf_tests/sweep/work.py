"""What happens on a machine of the pool: it says what it is, and runs one worker. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fluxfast.levels import LADDER
from perf_tests.bisect.environments import BuildError, Recipe, build
from perf_tests.harness import gpu, lease, runner
from perf_tests.harness.cpu import cpu_name, is_cpu
from perf_tests.harness.files import locked
from perf_tests.harness.machine import ask_machine, first_gpu, slug_of
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES
from perf_tests.sweep.cells import Cell

WORKER = ("-m", "perf_tests.harness.worker")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a node says of itself; see `cells.Node`."""

    kind: str
    slug: str
    unavailable: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Order:
    """A cell of a sweep and how it is run.

    Attributes:
        slug: of the machine that runs it.
        recipe: of the environment of another version; None for the running Python.
        cache: folder on the node, for environments and compiled code.
        worker_command: stands in for the worker in tests.
    """

    cell: Cell
    slug: str
    recipe: Recipe | None
    cache: Path
    worker_command: Sequence[str] | None = None

    def run(self) -> Delivery:
        """See `run_cell`."""
        return run_cell(self)


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What came of a cell: the files of its folder, by their paths there, or why it could not be started.

    Attributes:
        worker_s: how long the bare worker took, seconds; the rest of a cell's time is the sweep's own.
    """

    files: dict[str, bytes]
    unrun: str | None = None
    worker_s: float = 0.0


def describe_machine() -> Machine:
    """What this machine is and can run; asks torch, in a process of its own."""
    asked = ask_machine()
    slug = slug_of(asked, [first_gpu()] if asked["device"] == "cuda" else ())
    ladder = {level.id for level in LADDER}
    kind = f"{cpu_name()}, {slug}" if is_cpu(slug) else slug
    return Machine(kind, slug, {level: why for level, why in asked["levels"].items() if why and level in ladder})


def run_cell(order: Order) -> Delivery:
    """One fresh worker; its folder comes back as bytes, since the caller may be on another machine.

    What keeps the machine from running it, such as a full disk or a GPU that is held, is why the cell has no result.
    """
    try:
        return _run_cell(order)
    except (BuildError, OSError, lease.GpuBusy, gpu.GpuError) as error:
        return Delivery({}, str(error))


def _run_cell(order: Order) -> Delivery:
    cell, is_gpu = order.cell, not is_cpu(order.slug)
    command = order.worker_command or (str(_interpreter(order)), *WORKER)
    with (
        tempfile.TemporaryDirectory(prefix="fluxfast-sweep-") as folder,
        lease.gpu_lease(str(first_gpu()) if is_gpu else None),
    ):
        since = time.monotonic()
        runner.run_level(
            cell.level,
            cell.workload,
            cell.process,
            Path(folder),
            deadlines=GPU_DEADLINES if is_gpu else CPU_DEADLINES,
            cache=order.cache / cell.version,
            worker_command=command,
        )
        worker_s = time.monotonic() - since
        out = Path(folder, cell.level, str(cell.process))
        return Delivery({path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}, worker_s=worker_s)


def _interpreter(order: Order) -> Path:
    """Of the cell's environment, made by the first cell that needs it; its neighbours on the machine wait."""
    if order.recipe is None:
        return Path(sys.executable)
    name = f"{order.recipe.component}-{order.cell.version}"
    with locked(order.cache / "locks" / name):
        return build(order.recipe, order.cell.version, order.cache / "environments" / name)

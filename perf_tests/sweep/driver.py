"""A sweep: every cell is one worker process, whose results are gathered into runs that `--replay` judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fluxfast.workloads import get_workload
from perf_tests.bisect.environments import Recipe
from perf_tests.harness import store
from perf_tests.harness.files import write_over
from perf_tests.harness.progress import RESULT_FILE
from perf_tests.harness.stored_run import RUN_FILE, RunFacts
from perf_tests.sweep.cells import AS_INSTALLED, Cell, Node, Record
from perf_tests.sweep.dispatch import Dispatch, Outcome, Pool, stored_sweep
from perf_tests.sweep.gather import gather
from perf_tests.sweep.work import Delivery, Order


class Sweep(Dispatch):
    """One sweep into `folder`.

    Args:
        cells: all of it; those whose result is in the folder already are not run again.
        kinds: workload -> kind of machine.
        recipe: of the environments of the versions.
        say: gets a line of progress.

    Raises:
        StoreError: if the `sweep.json` of an earlier part is damaged.
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
        begun = stored_sweep(folder)
        known = {Cell(own.workload, own.version, own.level, own.process): own for own in begun.cells}
        records = {cell: known.get(cell, Record.of(cell)).model_copy(update={"unrun": None}) for cell in cells}
        super().__init__(folder, known | records, kinds, say, recipe.component if recipe else begun.axis)
        self._cells = list(records)
        self._recipe = recipe
        self._cache = cache
        self._worker_command = worker_command

    def run(self, pool: Pool) -> list[Record]:
        """Run every cell; one record each. A pool that shrinks is used as far as it goes."""
        missing = [cell for cell in self._cells if not (self._folder / cell.path / RESULT_FILE).exists()]
        for cell in self._dispatch(pool, missing):
            why = f"no machine of kind {self._kinds[cell.workload]!r} is left"
            self._give_up(cell, f"{why}; the same command goes on when there is one")
        return [self.records[cell] for cell in self._cells]

    def _work(self, cell: Cell, node: Node) -> Order:
        recipe = None if cell.version == AS_INSTALLED else self._recipe
        return Order(cell, node.slug, recipe, self._cache, self._worker_command)

    def _receive(self, cell: Cell, delivery: Delivery) -> tuple[Outcome, str]:
        place = self._folder / cell.path
        try:
            gather(place, delivery.files)
            failure = store.read_result(place / RESULT_FILE).failure
        except (OSError, store.ResultError) as error:
            self._give_up(cell, str(error))
            return "failed", str(error)
        return ("failed", failure.message) if failure else ("measured", "")


def describe_runs(
    folder: Path, cells: Sequence[Cell], levels: Sequence[str], nodes: Mapping[str, Node], processes: int
) -> list[Path]:
    """Write `run.json` for each version and workload, so that `pytest perf_tests --replay` judges it.

    Args:
        levels: that were asked for; `cells` has their references too.
        nodes: workload -> a machine of its kind.
    """
    written = []
    for version, name in dict.fromkeys((cell.version, cell.workload) for cell in cells):
        workload, node = get_workload(name), nodes[name]
        facts = RunFacts(
            slug=node.slug,
            workload=name,
            workload_digest=workload.digest,
            levels=[level for level in levels if level not in node.unavailable],
            unavailable=dict(node.unavailable),
            processes=processes,
        )
        path = folder / version / name
        path.mkdir(parents=True, exist_ok=True)
        write_over(path / RUN_FILE, facts.model_dump_json(indent=1).encode())
        written.append(path)
    return written

"""Several versions at once, on the machines of a pool: those of one kind, since times do not travel between kinds."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from perf_tests.bisect import environments, oracle
from perf_tests.bisect.environments import Recipe
from perf_tests.bisect.machines import BASELINES, RUNS, Build, Ended, Judge, NoMachine
from perf_tests.bisect.order import JUDGED_FILE, Order
from perf_tests.bisect.state import Judged, Kind, Question, State
from perf_tests.harness.files import canonical_digest
from perf_tests.sweep.cells import Cell, Node, Record, choose_kinds
from perf_tests.sweep.dispatch import Dispatch, Outcome, Pool, stored_sweep
from perf_tests.sweep.gather import gather, read_tree
from perf_tests.sweep.work import Delivery, describe_machine


@dataclasses.dataclass(frozen=True, order=True)
class Trial(Cell):
    """One run of the suite; `process` is its number among the runs of its version."""

    @property
    def path(self) -> str:
        """Where its run lies below the search's folder."""
        return f"{RUNS}/{self.version}/{self.process}"


class Several(Dispatch):
    """The pool's machines of one kind. All judge by one baseline, recorded on one of them.

    Args:
        folder: of the search; runs are gathered there.
        kind: of `kind_of_search`.
        cache: folder on each machine, for environments.
        say: gets a line of progress.
        build, judge, record: from `environments` and `oracle`; they run on the machine.

    Raises:
        StoreError: if the `sweep.json` of an earlier part of the search is damaged.
    """

    def __init__(
        self,
        folder: Path,
        question: Question,
        recipe: Recipe,
        pool: Pool,
        kind: str,
        cache: Path,
        say: Callable[[str], None],
        *,
        build: Build = environments.build,
        judge: Judge = oracle.judge,
        record: Judge = oracle.record,
    ) -> None:
        known: dict[Cell, Record] = {trial_of(own): own for own in stored_sweep(folder).cells}
        super().__init__(folder, known, {_workload(question): kind}, say)
        self._question, self._recipe, self._pool, self._kind = question, recipe, pool, kind
        # Searches do not share environments: each removes those that it has done with.
        self._there = cache / "bisect" / canonical_digest([str(folder), question.model_dump(mode="json")])[:16]
        self._build, self._judge, self._record = build, judge, record
        self._kept: Collection[str] = ()

    def width(self) -> int:
        """A version for each slot: a GPU, or a machine without one."""
        slots = sum(node.slots for node in self._pool.nodes() if node.kind == self._kind)
        if not slots:
            raise self._no_machine()
        return slots

    def keep_only(self, versions: Collection[str]) -> None:
        """Each machine removes the others when it is next given a version."""
        self._kept = tuple(versions)

    def judge(self, versions: Sequence[str], ended: Ended) -> None:
        """At the same time, as far as there are machines."""
        self._try(versions, ended)

    def record(self, version: str, ended: Ended) -> None:
        """On one machine; the baseline goes to the search's folder and from there to every machine."""
        self._say(f"{self._question.axis} {version}: recording the baseline to judge by")
        self._try([version], functools.partial(self._recorded, ended), is_recording=True)

    def close(self) -> None:
        """Let go of the pool."""
        self._pool.close()

    def _try(self, versions: Sequence[str], ended: Ended, *, is_recording: bool = False) -> None:
        level = oracle.split_test(self._question.test)[1]
        trials = []
        for version in versions:
            number = int(oracle.new_folder(self._folder / RUNS / version).name)
            trials.append(Trial(_workload(self._question), version, level, number))
            self.records.setdefault(trials[-1], Record.of(trials[-1]))
        self._ended, self._is_recording = ended, is_recording
        if self._dispatch(self._pool, trials):
            raise self._no_machine()

    def _recorded(self, ended: Ended, version: str, run: Judged | str) -> None:
        if isinstance(run, Judged) and run.kind is Kind.GOOD:
            place = self._folder / BASELINES
            shutil.rmtree(place, ignore_errors=True)  # left by a recording that did not come to its end
            gather(place, read_tree(Path(run.folder) / BASELINES))
        ended(version, run)

    def _work(self, cell: Cell, node: Node) -> Order:
        return Order(
            question=self._question,
            version=cell.version,
            recipe=self._recipe,
            place=self._folder / cell.path,
            folder=self._there,
            kept=self._kept,
            baselines={} if self._is_recording else read_tree(self._folder / BASELINES),
            build=self._build,
            run_suite=self._record if self._is_recording else self._judge,
        )

    def _receive(self, cell: Cell, delivery: Delivery) -> tuple[Outcome, str]:
        place = self._folder / cell.path
        gather(place, delivery.files)
        run = Judged.model_validate_json((place / JUDGED_FILE).read_bytes())
        self._ended(cell.version, run)
        return ("measured", run.kind.value) if run.kind in (Kind.GOOD, Kind.BAD) else ("failed", run.why)

    def _tried_on(self, cell: Cell) -> list[str]:
        """A version is best judged again on another machine: both may be a little off, but not alike."""
        own = [record for record in self.records.values() if record.version == cell.version]
        return [attempt.node for record in own for attempt in record.attempts]

    def _give_up(self, cell: Cell, why: str) -> None:
        super()._give_up(cell, why)
        self._ended(cell.version, why)

    def _no_machine(self) -> NoMachine:
        return NoMachine(
            f"no machine of kind {self._kind!r} is left, and one search stays on one kind; "
            "the same command goes on when there is one"
        )


def kind_of_search(folder: Path, state: State, nodes: Sequence[Node]) -> str:
    """The kind of machine that judges: the one the search was begun on, else the one with the most slots.

    Raises:
        ValueError: if a search was begun on a kind that is not there.
        StoreError: as `stored_sweep`.
    """
    begun_on = {kind for kinds in stored_sweep(folder).begun_on().values() for kind in kinds}
    if not begun_on and (state.is_recorded or state.judged):  # without a pool: here
        begun_on = {describe_machine().kind}
    search = f"the search in {folder}"
    return choose_kinds([search], nodes, {search: begun_on})[search]


def trial_of(record: Record) -> Trial:
    """The run that a record is of."""
    return Trial(record.workload, record.version, record.level, record.process)


def _workload(question: Question) -> str:
    return question.workload or "default"

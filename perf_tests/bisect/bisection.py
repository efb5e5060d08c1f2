"""The loop: ask `search` what to judge, have it judged, write it down. Resumes after any end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from perf_tests.bisect import oracle
from perf_tests.bisect.machines import Machines
from perf_tests.bisect.search import Contradiction, Found, Measure, bounds, next_step
from perf_tests.bisect.state import Judged, Kind, State, save

INCONCLUSIVE_RUNS: Final = 3
"""So many disturbed runs of one version, and it is left out until the search is asked again."""


class Bisection:
    """One search.

    Args:
        state: as loaded; written to `folder` after every run.
        say: gets a line of progress.
        machines: that judge; asked before every step how many versions it may hold.
    """

    def __init__(self, state: State, folder: Path, say: Callable[[str], None], machines: Machines) -> None:
        self.state = state
        self._folder = folder
        self._say = say
        self._machines = machines
        self._confirmations = 1 if oracle.split_test(state.question.test)[0] == oracle.NOISELESS else 2

    def run(self) -> Contradiction | Found:
        """Search to the end.

        Raises:
            NoMachine: what was judged until then is stored.
        """
        question = self.state.question
        while isinstance(step := self._next(), Measure):
            versions = [question.versions[at] for at in step.at]
            self._say(
                f"{question.axis} {', '.join(versions)}: "
                f"{len(self.state.votes())} of {len(question.versions)} versions judged so far"
            )
            if question.against == "good" and not self.state.is_recorded:
                assert versions[0] == question.versions[0], "the search begins with the good version"
                self._machines.record(versions[0], self._recorded)
            else:
                self._machines.judge(versions, self._judged)
        return step

    def _next(self) -> Measure | Contradiction | Found:
        """What is to be done, once the environments that it does not need are gone."""
        versions = self.state.question.versions
        closed = {versions.index(version) for version in self.state.left_out}
        votes = self.state.votes()
        step = next_step(len(versions), votes, closed, confirmations=self._confirmations)
        if isinstance(step, Measure):  # an answer that stands in the state needs no machine
            width = self._machines.width()
            step = next_step(len(versions), votes, closed, width=width, confirmations=self._confirmations)
        needed = {*bounds(votes), *(step.at if isinstance(step, Measure) else ())}
        self._machines.keep_only({versions[at] for at in needed})
        return step

    def _recorded(self, version: str, run: Judged | str) -> None:
        if isinstance(run, Judged) and run.kind is Kind.GOOD:
            self._keep(self.state.model_copy(update={"is_recorded": True}))
        else:
            self._judged(version, run)

    def _judged(self, version: str, run: Judged | str) -> None:
        name = f"{self.state.question.axis} {version}"
        if isinstance(run, str):
            self._say(f"{name}: left out: {run}")
            self._keep(self.state.with_closed(version, run))
            return
        self._say(f"{name}: {run.kind.value}: {run.why}")
        state = self.state.with_judged(version, run)
        disturbed = [run for run in state.judged[version] if run.kind is Kind.INCONCLUSIVE]
        if run.kind is Kind.UNUSABLE:
            state = state.with_closed(version, run.why)
        elif run.kind is Kind.INCONCLUSIVE and len(disturbed) % INCONCLUSIVE_RUNS == 0:
            state = state.with_closed(version, f"inconclusive {len(disturbed)} times, the last time: {run.why}", False)
        self._keep(state)

    def _keep(self, state: State) -> None:
        self.state = state
        save(self._folder, state)

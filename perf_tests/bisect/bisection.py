"""The loop: ask `search` what to judge, judge it, write it down. Ends with an answer and resumes after any end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from perf_tests.bisect import environments, oracle
from perf_tests.bisect.environments import BuildError, Recipe
from perf_tests.bisect.search import Contradiction, Found, Measure, bounds, next_step
from perf_tests.bisect.state import Judged, Kind, Question, State, save

INCONCLUSIVE_RUNS: Final = 3
"""So many disturbed runs of one version, and it is left out."""

Build = Callable[[Recipe, str, Path], Path]
Judge = Callable[[Question, Path, Path], Judged]


class Bisection:
    """One search.

    Args:
        state: as loaded; written to `folder` after every run.
        say: gets a line of progress.
        build, judge, record: from `environments` and `oracle`.
    """

    def __init__(
        self,
        state: State,
        folder: Path,
        recipe: Recipe,
        say: Callable[[str], None],
        *,
        build: Build = environments.build,
        judge: Judge = oracle.judge,
        record: Judge = oracle.record,
    ) -> None:
        self.state = state
        self._folder = folder
        self._recipe = recipe
        self._say = say
        self._build, self._judge, self._record = build, judge, record
        self._confirmations = 1 if oracle.split_test(state.question.test)[0] == oracle.NOISELESS else 2

    @property
    def next(self) -> Measure | Contradiction | Found:
        """What is to be done; a `Measure` only while the search goes on."""
        versions = self.state.question.versions
        closed = {versions.index(version) for version in self.state.closed}
        return next_step(len(versions), self.state.votes(), closed, confirmations=self._confirmations)

    def run(self) -> Contradiction | Found:
        """Search to the end."""
        while isinstance(step := self.next, Measure):
            version = self.state.question.versions[step.at]
            self._keep(self._try(version))
            self._remove_environments()
        return step

    def _keep(self, state: State) -> None:
        self.state = state
        save(self._folder, state)

    def _try(self, version: str) -> State:
        """The state after one more attempt at a version."""
        question = self.state.question
        self._say(
            f"{question.axis} {version}: {len(self.state.votes())} of {len(question.versions)} versions judged so far"
        )
        try:
            python = self._build(self._recipe, version, self._environment(version))
        except BuildError as error:
            self._say(f"{question.axis} {version}: left out: {error}")
            return self.state.with_closed(version, str(error))
        runs = self._folder / "runs" / version
        if question.against == "good" and not self.state.is_recorded:
            assert version == question.versions[0], "the search begins with the good version"
            self._say(f"{question.axis} {version}: recording the baseline to judge by, into {runs}")
            recorded = self._record(question, python, runs)
            if recorded.kind is not Kind.GOOD:
                return self._after(version, recorded)
            self._keep(self.state.model_copy(update={"is_recorded": True}))
        self._say(f"{question.axis} {version}: judging, into {runs}")
        return self._after(version, self._judge(question, python, runs))

    def _after(self, version: str, run: Judged) -> State:
        self._say(f"{self.state.question.axis} {version}: {run.kind.value}: {run.why}")
        state = self.state.with_judged(version, run)
        disturbed = [run for run in state.judged[version] if run.kind is Kind.INCONCLUSIVE]
        if run.kind is Kind.UNUSABLE:
            return state.with_closed(version, run.why)
        if run.kind is Kind.INCONCLUSIVE and len(disturbed) >= INCONCLUSIVE_RUNS:
            return state.with_closed(version, f"inconclusive {len(disturbed)} times, the last time: {run.why}")
        return state

    def _environment(self, version: str) -> Path:
        return self._folder / "environments" / version

    def _remove_environments(self) -> None:
        """All but those of the bracket: a CUDA build of torch takes gigabytes."""
        versions = self.state.question.versions
        kept = {versions[at] for at in bounds(self.state.votes())}
        if isinstance(step := self.next, Measure):
            kept.add(versions[step.at])
        for folder in (self._folder / "environments").glob("*/"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

"""Where versions are judged: here, one after another, or (`several`) on a pool of machines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final, Protocol

from perf_tests.bisect import environments, oracle
from perf_tests.bisect.environments import BuildError, NoSuchVersionError, Recipe
from perf_tests.bisect.state import Judged, Kind, Question

BASELINES: Final = "baselines"
ENVIRONMENTS: Final = "environments"
RUNS: Final = "runs"

Build = Callable[[Recipe, str, Path], Path]
Judge = Callable[[Question, Path, Path], Judged]
Ended = Callable[[str, Judged | str], None]
"""(version, its run or why it cannot be judged); called as soon as that is known."""


class NoMachine(Exception):
    """No machine is left that could judge: one sentence."""


class Machines(Protocol):
    """Where versions are judged."""

    def width(self) -> int:
        """How many versions at a time, now.

        Raises:
            NoMachine: none.
        """

    def keep_only(self, versions: Collection[str]) -> None:
        """From now on no other version's environment is needed: a CUDA build of torch takes gigabytes."""

    def judge(self, versions: Sequence[str], ended: Ended) -> None:
        """One run of the suite in the environment of each version.

        Raises:
            NoMachine: before all of them ended.
        """

    def record(self, version: str, ended: Ended) -> None:
        """Record the baseline to judge by, with the good version.

        Raises:
            NoMachine: before it ended.
        """

    def close(self) -> None:
        """Let go of them."""


def not_judged(error: BuildError | OSError, folder: Path) -> Judged | str:
    """How a try at a version ends that came to no run: as inconclusive, unless there can never be an environment."""
    if isinstance(error, NoSuchVersionError):
        return str(error)
    return Judged(kind=Kind.INCONCLUSIVE, why=str(error), folder=str(folder))


class Here:
    """This machine and no pool.

    Args:
        folder: of the search.
        say: gets a line of progress.
        build, judge, record: from `environments` and `oracle`.
    """

    def __init__(
        self,
        folder: Path,
        question: Question,
        recipe: Recipe,
        say: Callable[[str], None],
        *,
        build: Build = environments.build,
        judge: Judge = oracle.judge,
        record: Judge = oracle.record,
    ) -> None:
        self._folder, self._question, self._recipe, self._say = folder, question, recipe, say
        self._build, self._judge, self._record = build, judge, record

    def width(self) -> int:
        """One."""
        return 1

    def keep_only(self, versions: Collection[str]) -> None:
        """Remove all others now."""
        environments.prune(self._folder / ENVIRONMENTS, versions)

    def judge(self, versions: Sequence[str], ended: Ended) -> None:
        """One after another."""
        for version in versions:
            self._try(version, "judging", self._judge, ended)

    def record(self, version: str, ended: Ended) -> None:
        """Into the folder of the search."""
        self._try(version, "recording the baseline to judge by", self._record, ended)

    def close(self) -> None:
        """Nothing is held."""

    def _try(self, version: str, doing: str, run: Judge, ended: Ended) -> None:
        runs = self._folder / RUNS / version
        try:
            python = self._build(self._recipe, version, self._folder / ENVIRONMENTS / version)
            self._say(f"{self._question.axis} {version}: {doing}, into {runs}")
            said: Judged | str = run(self._question, python, runs)
        except (BuildError, OSError) as error:
            said = not_judged(error, runs)
        ended(version, said)

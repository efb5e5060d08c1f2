"""What a bisect knows, in one JSON file: the question, every judged run, every version that cannot be judged."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Literal

from pydantic import Field

from perf_tests.harness.files import StoreError, dump_json, read_model, write_over
from perf_tests.harness.schema import Finite, Seconds, Strict

STATE_FILE = "state.json"
Against = Literal["good", "committed", "none"]


class Kind(enum.StrEnum):
    """What one run of the suite says about a version."""

    GOOD = "good"
    BAD = "bad"
    INCONCLUSIVE = "inconclusive"
    UNUSABLE = "unusable"


class Judged(Strict):
    """One run of the suite in one version's environment."""

    kind: Kind
    why: str
    """The verdict's outcome, rule and message, or why there is none."""
    numbers: dict[str, Finite] = Field(default_factory=dict)
    """The verdict's."""
    samples_s: dict[str, list[list[Seconds]]] = Field(default_factory=dict)
    """Level -> the samples of each process, seconds."""
    facts: dict[str, int] = Field(default_factory=dict)
    """What was counted in the level's first process."""
    folder: str
    """Of the stored run and its log."""


class Question(Strict):
    """What is asked; a state file answers only this."""

    axis: str
    versions: list[str]
    """From good to bad, both included."""
    test: str
    against: Against
    over_base: bool
    bad_is_error: bool
    workload: str | None
    processes: int | None
    index_url: str | None
    pre: bool
    baseline_folder: str | None = None
    """Of the baseline to judge against; None if there is none."""


class State(Strict):
    """The file."""

    state_schema: Literal[1] = 1
    question: Question
    is_recorded: bool = False
    """Whether the good version's baseline is in its folder."""
    judged: dict[str, list[Judged]] = Field(default_factory=dict)
    closed: dict[str, str] = Field(default_factory=dict)
    """Version -> why it is not judged (again)."""
    closed_now: dict[str, str] = Field(default_factory=dict, exclude=True)
    """The same, until the search is asked again: not stored."""

    @property
    def left_out(self) -> dict[str, str]:
        """Version -> why it is not judged (again), for good or for now."""
        return {**self.closed, **self.closed_now}

    def with_judged(self, version: str, run: Judged) -> State:
        """This and one more run."""
        return self.model_copy(update={"judged": {**self.judged, version: [*self.judged.get(version, []), run]}})

    def with_closed(self, version: str, why: str, is_final: bool = True) -> State:
        """This, with a version that is not tried again, for good or for now."""
        name = "closed" if is_final else "closed_now"
        return self.model_copy(update={name: {**getattr(self, name), version: why}})

    def votes(self) -> dict[int, list[bool]]:
        """Position of a version -> its conclusive runs, True for bad."""
        return {
            self.question.versions.index(version): votes
            for version, runs in self.judged.items()
            if (votes := [run.kind is Kind.BAD for run in runs if run.kind in (Kind.GOOD, Kind.BAD)])
        }


def load(folder: Path, question: Question) -> State:
    """The state of this question, a new one if the folder has none.

    Raises:
        StoreError: if the file cannot be read, or answers another question.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return State(question=question)
    state = read_model(path, State, "remove the folder to start again")
    other = [name for name, value in question if getattr(state.question, name) != value]
    if other:
        raise StoreError(
            f"{path} holds a bisect with another {', '.join(other)}: choose another --state folder, or remove this one"
        )
    if odd := [version for version in (*state.judged, *state.closed) if version not in question.versions]:
        raise StoreError(f"{path} holds version {odd[0]}, which is not searched; remove the folder to start again")
    return state


def save(folder: Path, state: State) -> None:
    """Write the file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_over(folder / STATE_FILE, dump_json(state.model_dump(mode="json")))

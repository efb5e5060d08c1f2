"""One finished run as the history keeps it: read from its folder, where `verdicts.json` says what it was judged to be.

Everything in the history comes through `read_night`, so that a rebuild gives what the nights themselves gave.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from perf_tests.harness.files import dump_json, read_model, write_over
from perf_tests.harness.obstacles import measured, obstacle
from perf_tests.harness.policy import Policy
from perf_tests.harness.replay import open_run
from perf_tests.harness.schema import SCHEMA, Moment, Outcome, Result, Strict, Verdict
from perf_tests.harness.session import Session
from perf_tests.harness.store import ResultError

VERDICTS_FILE = "verdicts.json"
RUN_DATE = re.compile(r"([0-9]{8}T[0-9]{6}Z)-")


class Judged(Strict):
    """What one test said."""

    test: str
    """`test_latency`, ..."""
    verdict: Verdict
    excuse: str | None = None
    """The issue of a quarantine row that let it pass."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        ratio, limit = (self.verdict.numbers.get(name) for name in ("ratio", "limit"))
        if not (ratio is None or 1e-18 < ratio < 1e18) or not (limit is None or 0 <= limit < 1e18):
            raise ValueError(f"a ratio of {ratio} with a limit of {limit} cannot be")
        return self


class RunRecord(Strict):
    """`verdicts.json`: what a finished run was judged to be, and against what."""

    record_schema: Literal[1] = SCHEMA
    date: Moment
    baseline: str | None
    """File name; None if there was none."""
    exit_status: Annotated[int, Field(ge=0, le=255)]
    judged: list[Judged]

    @model_validator(mode="after")
    def _judged_once(self) -> Self:
        pairs = [f"{own.test}[{own.verdict.level}]" for own in self.judged]
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"{next(pair for pair in pairs if pairs.count(pair) > 1)} is judged twice")
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelNight:
    """One level of one run.

    Attributes:
        medians_s: one a process, seconds.
        value: what the gate compares: seconds, or the ratio to another level of the same run; None if not measured.
        unit: "s" or "of bf16".
        ratio, limit: of the latency verdict: over the baseline of that night; None if there was none.
        mark: why this number is no evidence of speed (`injected`, `failed`, `void`, ...); None if it is.
        judged: what the tests said.
    """

    level: str
    medians_s: list[float]
    value: float | None
    unit: str
    ratio: float | None
    limit: float | None
    fields: dict[str, Any]
    environment: dict[str, Any] | None
    mark: str | None
    judged: list[Judged]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Night:
    """One run. `run` is the name of its folder, `exit_status` pytest's, None if it left no `verdicts.json`."""

    run: str
    date: str
    slug: str
    workload: str
    workload_digest: str
    method: str
    baseline: str | None
    exit_status: int | None
    levels: list[LevelNight]


def write_record(folder: Path, baseline: str | None, exit_status: int, judged: Sequence[Judged]) -> None:
    """Write `verdicts.json`; a run that is judged again keeps its date.

    Raises:
        ResultError: if it cannot be written.
    """
    known = read_record(folder) if (folder / VERDICTS_FILE).exists() else None
    try:
        record = RunRecord(
            date=known.date if known else _date(folder),
            baseline=baseline,
            exit_status=exit_status,
            judged=list(judged),
        )
        write_over(folder / VERDICTS_FILE, dump_json(record.model_dump(mode="json")))
    except (OSError, ValueError) as error:
        raise ResultError(f"{folder / VERDICTS_FILE} cannot be written ({error})") from error


def read_record(folder: Path) -> RunRecord:
    """`verdicts.json` of a run.

    Raises:
        ResultError: one sentence.
    """
    replay = f"`pytest perf_tests --replay {folder} --benchmark-compare --history {folder.parent / 'history.db'}`"
    return read_model(folder / VERDICTS_FILE, RunRecord, f"make it again with {replay}", ResultError)


def read_night(folder: Path) -> Night:
    """A finished run.

    Raises:
        StoreError: if it is partial, damaged or of another schema.
    """
    session = open_run(folder, None)
    return night_of(session, read_record(folder) if (folder / VERDICTS_FILE).exists() else None)


def night_of(session: Session, record: RunRecord | None) -> Night:
    """A run as the history keeps it; `record` is its `verdicts.json`, None if it left none.

    Raises:
        ResultError: if no one can tell when it was.
    """
    folder = session.folder.resolve()
    judged = record.judged if record else []
    first = next(iter(session.results.values()))[0]
    return Night(
        run=folder.name,
        date=record.date if record else _date(folder),
        slug=session.slug,
        workload=session.workload.id,
        workload_digest=first.workload_digest,
        method=first.method,
        baseline=record.baseline if record else None,
        exit_status=record.exit_status if record else None,
        levels=[
            _level(level, session, [own for own in judged if own.verdict.level == level]) for level in session.results
        ],
    )


def _level(level: str, session: Session, judged: list[Judged]) -> LevelNight:
    results, policy = session.results, session.policy
    latency = next((own.verdict for own in judged if own.test == "test_latency"), None)
    numbers = latency.numbers if latency else {}
    divisor = policy.divisor(level)
    mark = _mark(results[level], judged) or (divisor in results and _mark(results[divisor], []) and f"no {divisor}")
    environment = next((result.environment for result in results[level] if result.environment), None)
    return LevelNight(
        level=level,
        medians_s=_medians(results[level]),
        value=_value(level, results, policy),
        unit=f"of {divisor}" if divisor else "s",
        ratio=numbers.get("ratio"),
        limit=numbers.get("limit"),
        fields=results[level][0].fields,
        environment=environment.model_dump(mode="json") if environment else None,
        mark=mark or None,
        judged=judged,
    )


def _mark(results: Sequence[Result], judged: Sequence[Judged]) -> str | None:
    if injected := sorted({result.injection for result in results if result.injection}):
        return f"injected {', '.join(injected)}"
    if failure := next((result.failure for result in results if result.failure), None):
        return f"failed: {failure.kind.value}"
    found = obstacle(results[0].level, results, None, clocked=True)
    outcomes = {own.verdict.outcome for own in judged if own.test == "test_latency"}
    if Outcome.VOID in {*outcomes, found and found.outcome}:
        return "void"
    if Outcome.INCOMPARABLE in outcomes:
        return "incomparable"
    proofs = [proof for measurement in measured(results) for proof in measurement.proofs]
    return None if all(proof.holds for proof in proofs) else "not proven"


def _medians(results: Sequence[Result]) -> list[float]:
    return [statistics.median(measurement.samples_s) for measurement in measured(results)]


def _value(level: str, results: Mapping[str, Sequence[Result]], policy: Policy) -> float | None:
    """The geometric mean of what the gate compares, process by process."""
    own, divisor = np.log(_medians(results[level])), policy.divisor(level)
    if divisor is not None:
        over = np.log(_medians(results.get(divisor, [])))
        own = own[: len(over)] - over[: len(own)]
    return float(np.exp(own.mean())) if len(own) else None


def _date(folder: Path) -> str:
    """Of a folder that the runner named; of another, when its `run.json` was written."""
    named = RUN_DATE.match(folder.resolve().name)
    try:
        if named:
            moment = datetime.datetime.strptime(named[1], "%Y%m%dT%H%M%SZ")
        else:
            moment = datetime.datetime.fromtimestamp((folder / "run.json").stat().st_mtime, datetime.UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ResultError(f"{folder}: when it ran cannot be told ({error}); name it as another run is named") from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)  # %Y does not pad


def night_folders(results: Path) -> list[Path]:
    """Every folder of a run below `results`, oldest name first.

    Raises:
        ResultError: if there is no such folder.
    """
    if not os.path.isdir(results):  # False where is_dir() raises: a name that no folder can have
        raise ResultError(f"{results} is not a folder: name the folder that holds the runs with --results")
    return sorted(path.parent for path in results.glob("*/run.json") if not path.parent.is_symlink())

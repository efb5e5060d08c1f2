"""The folder of one run, read strictly: `run.json` and one result a level and process. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fluxfast.levels import LEVELS
from fluxfast.workloads import Workload
from perf_tests.harness import store
from perf_tests.harness.files import read_model
from perf_tests.harness.progress import RESULT_FILE
from perf_tests.harness.schema import ErrorKind, Result, Strict

RUN_FILE = "run.json"
RERUN = "rerun"
"""Folder of what was measured once more, laid out as the run itself."""
REFERENCES = {"fp32", "bf16"}
"""Levels that every run measures and every machine can."""


class RunFacts(Strict):
    """What a replay needs to know beside the results: `run.json`."""

    slug: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    workload: str
    workload_digest: str
    levels: Annotated[list[str], Field(min_length=1)]
    unavailable: dict[str, str]
    processes: Annotated[int, Field(ge=1)]


def read_facts(folder: Path) -> RunFacts:
    """`run.json` of a stored run.

    Raises:
        ResultError: one sentence.
    """
    path = folder / RUN_FILE
    if not path.exists():
        raise store.ResultError(f"{path} is not there: name the folder of one run, as in results/<run>")
    facts = read_model(path, RunFacts, "measure again", store.ResultError)
    if odd := [level for level in (*facts.levels, *facts.unavailable) if level not in LEVELS]:
        raise store.ResultError(f"{path} holds levels {', '.join(odd)}, which this checkout does not have")
    named = [*facts.levels, *facts.unavailable]
    if odd := sorted({level for level in named if named.count(level) > 1} | {*facts.unavailable} & REFERENCES):
        raise store.ResultError(f"{path} names {', '.join(odd)} twice, or a reference as unavailable; measure again")
    return facts


def refuse_other_workload(
    folder: Path, facts: RunFacts, workload: Workload, results: Mapping[str, Sequence[Result]]
) -> None:
    """Refuse a run of a workload that has only its name in common with `workload`, that of this checkout.

    Its steps and warm-ups are not those that it would be judged, drawn or gone on with. What only reads, as report and
    history do, takes an old run as it is.

    Raises:
        ResultError: one sentence.
    """
    if facts.workload_digest != workload.digest:
        raise store.ResultError(
            f"{folder} is of workload {facts.workload!r} with digest {facts.workload_digest}, in this checkout it is "
            f"{workload.digest}: the workload was changed; measure again, or go back to a checkout that measured it"
        )
    for result in itertools.chain.from_iterable(results.values()):
        if (result.workload, result.workload_digest) != (workload.id, workload.digest):
            raise store.ResultError(
                f"{folder}: level {result.level!r}, process {result.process} is of workload {result.workload!r} with "
                f"digest {result.workload_digest}, the run of {workload.id!r} with {workload.digest}; measure again"
            )


def read_run(folder: Path, levels: Sequence[str], processes: int | None = None) -> dict[str, list[Result]]:
    """The results of a stored run, `processes` of each level, in their order.

    Raises:
        ResultError: if one is missing, lies in another's place or cannot be read.
    """
    results = {}
    for level in levels:
        paths = _result_paths(folder, level)
        if not paths or (processes is not None and len(paths) != processes):
            raise store.ResultError(
                f"run {folder} holds {len(paths)} of {processes or 'at least 1'} results of level {level!r}: it is "
                "partial; measure again, or judge the rest with `pytest perf_tests --replay RUN --levels LEVEL,...`"
            )
        results[level] = [_read_result(folder, level, path) for path in paths]
    return results


def with_reruns(results: Mapping[str, Sequence[Result]], folder: Path) -> dict[str, list[Result]]:
    """`results` of the run in `folder`, those of processes that were measured once more replaced (`is_replaced`).

    Raises:
        ResultError: if one lies in another's place, cannot be read, or is of a process that the run does not have.
    """
    merged = {}
    for level, own in results.items():
        first = {result.process: result for result in own}
        paths = _result_paths(folder / RERUN, level)
        again = {result.process: result for result in (_read_result(folder / RERUN, level, path) for path in paths)}
        if odd := again.keys() - first.keys():
            raise store.ResultError(
                f"run {folder} is damaged: it holds a rerun of level {level!r}, process {min(odd)}, and of that level "
                f"itself only process {', '.join(map(str, first))}; measure again"
            )
        merged[level] = [again[at] if is_replaced(own, again.get(at)) else own for at, own in first.items()]
    return merged


def rerun_of(result: Result, folder: Path) -> Result | None:
    """What the process of `result`, of the run in `folder`, gave when it was measured once more; None if it was not.

    Raises:
        ResultError: as `with_reruns`.
    """
    path = folder / RERUN / result.level / str(result.process) / RESULT_FILE
    return _read_result(folder / RERUN, result.level, path) if path.exists() else None


def is_replaced(result: Result, rerun: Result | None) -> bool:
    """Whether `rerun` stands for the process; of what `with_reruns` chose, whether that is of the rerun.

    A rerun that Ctrl-C or a neighbour's memory ended takes no measurement away: a disturbed one is void, and no level
    is red for it. Any other failure is the code's, and counts.
    """
    if rerun is None:
        return False
    is_of_the_machine = rerun.failure is not None and rerun.failure.kind in (ErrorKind.INTERRUPTED, ErrorKind.OOM)
    return result.measurement is None or not is_of_the_machine


def _result_paths(folder: Path, level: str) -> list[Path]:
    paths = [path for path in (folder / level).glob(f"*/{RESULT_FILE}") if path.parent.name.isdecimal()]
    return sorted(paths, key=lambda path: int(path.parent.name))


def _read_result(folder: Path, level: str, path: Path) -> Result:
    if path.parent.resolve() != folder.resolve() / level / path.parent.name:
        raise store.ResultError(f"{path} leads out of the run {folder}; put the result itself there")
    result = store.read_result(path)
    if (result.level, str(result.process)) != (level, path.parent.name):
        raise store.ResultError(f"{path} is of level {result.level!r}, process {result.process}; measure again")
    return result

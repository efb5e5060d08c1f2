"""Results and baselines as files: read strictly, written atomically. No torch.

A baseline `baselines/<slug>/NNNN_<tag>.json` is stock pytest-benchmark JSON (so `--benchmark-compare`, histograms and
`pytest-benchmark compare` work on it) plus a `fluxfast` block, which the gate reads, and `fluxfast_digest`. The tag is
the workload's id, with an optional `.note`. pytest-benchmark skips a file that it cannot read and compares with an
older one; here every defect is an error. The digest shows damage, not who wrote the file.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fluxfast.workloads import Workload
from perf_tests.harness.files import (
    MAX_JSON_BYTES,
    MAX_PNG_BYTES,
    Picture,
    StoreError,
    canonical_digest,
    decode_png,
    dump_json,
    load_json,
    locked,
    read_bytes,
    read_png,
    write_new,
    write_over,
)
from perf_tests.harness.schema import SCHEMA, Baseline, Result, Strict

MIN_PROCESSES = 5  # GPU timings are bimodal between processes; of five, all but one in sixteen hold both even modes
STOCK_KEYS = ("machine_info", "commit_info", "benchmarks", "datetime", "version")
NUMBERED = re.compile(r"(\d{4})_([a-z0-9][a-z0-9_-]*(?:\.[a-z0-9_-]+)?)\.json", re.ASCII)
LEVEL_ID = re.compile(r"[a-z0-9][a-z0-9_]*")
IMAGE_PATH = re.compile(r"reference/[a-z0-9][a-z0-9._-]*\.png")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
RECORD = (
    "restore the file from version control, or remove it and record a new one with "
    "`pytest perf_tests --record-baseline`"
)
MEASURE = "measure again"

Model = TypeVar("Model", bound=Strict)


class BaselineError(StoreError):
    """A baseline that cannot be read, made, written or updated: observed, expected, what to do."""


class ResultError(StoreError):
    """A worker's result or image that cannot be read: observed, expected, what to do."""


def read_baseline(path: Path) -> Baseline:
    """The `fluxfast` block of a baseline file, after every check.

    Raises:
        BaselineError: whatever is wrong with the file or its reference image; nothing else is raised.
    """
    return _checked(read_bytes(path, MAX_JSON_BYTES, BaselineError), path)


def find_baseline(folder: Path, workload_id: str) -> Path | None:
    """The newest baseline of a workload in a slug's folder, already read once; None if there is none.

    Raises:
        BaselineError: if the newest is unreadable (an older one is never taken instead), is of another workload or
            slug than its place says, or if the folder holds a `.json` file that is not named like a baseline.
    """
    own = [(number, path) for number, path in _numbered(folder) if _workload_of(path) == workload_id]
    if not own:
        return None
    newest = max(number for number, _ in own)
    first, *others = [path for number, path in own if number == newest]
    if others:
        raise BaselineError(f"{first}: {others[0].name} has the same number, so neither is the newest; renumber one")
    _check_place(first, read_baseline(first))
    return first


def write_baseline(
    folder: Path,
    tag: str,
    baseline: Baseline,
    stock: Mapping[str, Any],
    images: Mapping[str, bytes],
    refuse: Callable[[Path | None], None] | None = None,
) -> Path:
    """Write `<folder>/NNNN_<tag>.json` under the next free number, and its images beside it.

    The file appears under its name whole or not at all (temporary file, fsync, hard link, which refuses to overwrite,
    fsync of the folder). A lock on the folder makes numbers unique among concurrent writers and dies with its holder.

    Args:
        folder: `baselines/<slug>`, made if missing.
        tag: the workload's id, or `<id>.<note>`.
        baseline: the block; its `reference_image` must be among `images` or already in the folder.
        stock: the other keys, from `recording.stock_json` or pytest-benchmark.
        images: path relative to the folder (`reference/<name>.png`) -> PNG bytes.
        refuse: called with the newest baseline of the workload once no one else can write; raises BaselineError if
            this one must not follow it.

    Returns:
        Path of the new file.

    Raises:
        BaselineError: if the reader would refuse the file, an image exists with other content, or writing failed.
    """
    try:
        document: dict[str, Any] = {**stock, "fluxfast": baseline.model_dump(mode="json")}
        raw = dump_json({**document, "fluxfast_digest": canonical_digest(document)})
        with locked(folder):
            if refuse is not None:
                refuse(find_baseline(folder, baseline.workload["id"]))
            for name, png in images.items():
                _write_image(folder, name, png)
            number = max((number for number, _ in _numbered(folder)), default=0) + 1
            path = folder / f"{number:04}_{tag}.json"
            if not NUMBERED.fullmatch(path.name):
                raise BaselineError(f"{path}: expected a number up to 9999 and a tag like 'tiny' or 'tiny.note'")
            _check_place(path, _checked(raw, path))
            write_new(path, raw)
    except (OSError, TypeError, ValueError, RecursionError) as bad:
        raise BaselineError(f"baseline {tag!r} cannot be written to {folder} ({bad}); nothing was recorded") from bad
    return path


def write_result(path: Path, result: Result) -> None:
    """Write one worker's result; an existing one is replaced whole.

    Raises:
        ResultError: if a file name inside it would leave the folder, or writing failed.
    """
    _check_result(result, path)
    try:
        write_over(path, dump_json(result.model_dump(mode="json")))
    except (OSError, TypeError, ValueError, RecursionError) as bad:
        raise ResultError(f"{path}: the result cannot be written ({bad})") from bad


def read_result(path: Path) -> Result:
    """One worker's result.

    Raises:
        ResultError: whatever is wrong with the file; nothing else is raised.
    """
    document = load_json(read_bytes(path, MAX_JSON_BYTES, ResultError), path, ResultError)
    _check_schema(document.get("result_schema"), path, MEASURE, ResultError)
    result = _validate(Result, document, path, MEASURE, ResultError)
    _check_result(result, path)
    return result


def result_image(path: Path, result: Result) -> Picture:
    """The image that the result at `path` names: uint8, (height, width, 3), its sha256 checked.

    Raises:
        ResultError: if there is none, or it is not the file that was measured.
    """
    _check_result(result, path)
    if result.measurement is None:
        raise ResultError(f"{path}: level {result.level!r} failed and has no image; see its failure")
    return read_png(path.parent / result.measurement.image, result.measurement.image_sha256, ResultError)


def _checked(raw: bytes, path: Path) -> Baseline:
    document = load_json(raw, path, BaselineError, RECORD)
    block = document.get("fluxfast")
    if not isinstance(block, dict):
        raise BaselineError(f"{path}: no 'fluxfast' block, so it is a plain pytest-benchmark file; {RECORD}")
    # Before digest and keys: the number tells what those mean.
    _check_schema(block.get("baseline_schema"), path, RECORD, BaselineError)
    expected = {*STOCK_KEYS, "fluxfast", "fluxfast_digest"}
    if odd := set(document) ^ expected:
        raise BaselineError(f"{path}: keys missing or unknown: {', '.join(sorted(odd))}; {RECORD}")
    digest = canonical_digest({key: value for key, value in document.items() if key != "fluxfast_digest"})
    # Byte for byte and not only by value: the 17th digit of a sample can change without changing the float.
    if document["fluxfast_digest"] != digest or raw != dump_json(document):
        raise BaselineError(f"{path}: content differs from its digest, so it was edited or damaged; {RECORD}")
    baseline = _validate(Baseline, block, path, RECORD, BaselineError)
    _check_block(baseline, path)
    _check_stock(document["benchmarks"], baseline, path)
    if baseline.reference_image is not None:
        read_png(path.parent / baseline.reference_image, baseline.reference_sha256, BaselineError)
    return baseline


def _check_block(baseline: Baseline, path: Path) -> None:
    """What the schema cannot say of one field alone."""
    if odd := [level for level in baseline.levels if not LEVEL_ID.fullmatch(level)]:
        raise BaselineError(f"{path}: level ids {odd} are not lower-case words; {RECORD}")
    if not isinstance(baseline.workload.get("id"), str):
        raise BaselineError(f"{path}: the workload has no id; {RECORD}")
    if baseline.source == "recorded" and (lacking := _lacking(baseline)):
        raise BaselineError(f"{path}: a recorded baseline {lacking}; {RECORD}")
    if ((image := baseline.reference_image) is None) != (baseline.reference_sha256 is None):
        raise BaselineError(f"{path}: expected both or neither of reference_image and reference_sha256; {RECORD}")
    if image is not None and not IMAGE_PATH.fullmatch(image):
        raise BaselineError(f"{path}: reference_image {image!r} is not 'reference/<name>.png'; {RECORD}")


def _lacking(baseline: Baseline) -> str | None:
    """What `recording.baseline_from_results` would not have left out."""
    if baseline.environment is None:
        return "needs its environment, found null"
    try:
        workload = Workload(**baseline.workload)
        rounds = int(workload.rounds)
    except (TypeError, ValueError) as bad:
        return f"needs a whole workload ({bad})"
    if workload.digest != baseline.workload_digest:
        return f"has workload_digest {baseline.workload_digest!r}, that of its workload is {workload.digest!r}"
    for level, own in baseline.levels.items():
        needed = {
            f"{MIN_PROCESSES} processes": len(own.processes) >= MIN_PROCESSES,
            f"{rounds} rounds a process": min(len(p.samples_s) for p in own.processes) >= rounds,
            "proofs": own.proofs,
            "peak memory": own.peak_memory_bytes,
            "weight bytes": own.transformer_weight_bytes,
            "a step error": own.step_error or own.fields.get("dtype") == "float32",  # which is what others differ from
        }
        if not all(needed.values()):
            return f"needs {next(name for name in needed if not needed[name])} of level {level!r}"
    return None


def _check_stock(benchmarks: Any, baseline: Baseline, path: Path) -> None:
    """The stock part, which `--benchmark-compare` reads, tells the same as the block, which the gate reads."""
    try:
        found = [(entry["param"], entry["name"].partition("[")[2], entry["stats"]) for entry in benchmarks]
        same = sorted(level for level, _, _ in found) == sorted(baseline.levels)
        for level, bracketed, stats in found if same else ():
            samples = level_samples(baseline, level)
            same = same and bracketed == f"{level}]" and stats["data"] == samples
            same = same and (stats["min"], stats["median"]) == (min(samples), statistics.median(samples))
    except (KeyError, TypeError, AttributeError) as bad:
        raise BaselineError(f"{path}: 'benchmarks' is not pytest-benchmark's ({bad!r}); {RECORD}") from bad
    if not same:
        raise BaselineError(f"{path}: 'benchmarks' and 'fluxfast' hold different levels or samples; {RECORD}")


def level_samples(baseline: Baseline, level: str) -> list[float]:
    """Samples of a level's processes one after the other, seconds: what stands in the stock `stats.data`."""
    return list(itertools.chain.from_iterable(process.samples_s for process in baseline.levels[level].processes))


def _check_schema(observed: Any, path: Path, action: str, error: type[StoreError]) -> None:
    if type(observed) is int and observed > SCHEMA:
        raise error(f"{path}: schema {observed} is newer than {SCHEMA}, which this checkout reads; update the checkout")
    if type(observed) is not int or observed != SCHEMA:
        raise error(f"{path}: schema {observed!r} is older than {SCHEMA}, which this checkout reads; {action}")


def _check_place(path: Path, baseline: Baseline) -> None:
    observed, named = (baseline.workload["id"], baseline.slug), (_workload_of(path), path.parent.name)
    if observed != named:
        raise BaselineError(f"{path}: content is of workload, slug {observed}, its place says {named}; {RECORD}")


def _check_result(result: Result, path: Path) -> None:
    if (result.measurement is None) == (result.failure is None):
        raise ResultError(f"{path}: expected exactly one of 'measurement' and 'failure'; {MEASURE}")
    if result.measurement is not None:
        for name in (result.measurement.image, result.measurement.step_output):
            if not PLAIN_NAME.fullmatch(name):
                raise ResultError(f"{path}: {name!r} is not the plain name of a file beside the result; {MEASURE}")


def _validate(model: type[Model], document: Any, path: Path, action: str, error: type[StoreError]) -> Model:
    try:
        return model.model_validate_json(json.dumps(document))
    except ValidationError as bad:
        first = bad.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or model.__name__
        raise error(f"{path}: {where}: {first['msg']}; {action}") from bad


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Every baseline file of a folder, by number. A stray `.json` is an error: it may be the newest, renamed."""
    paths = sorted(path for path in folder.glob("*.json")) if folder.is_dir() else []
    for path in paths:
        if not NUMBERED.fullmatch(path.name):
            raise BaselineError(f"{path}: expected a name like 0001_tiny.json; rename or remove it")
    return [(int(path.name[:4]), path) for path in paths]


def _workload_of(path: Path) -> str:
    return path.name[5:].split(".")[0]


def _write_image(folder: Path, name: str, png: bytes) -> None:
    path = folder / name
    if not IMAGE_PATH.fullmatch(name):
        raise BaselineError(f"image name {name!r} is not 'reference/<name>.png'; nothing was recorded")
    decode_png(png, path, BaselineError)
    path.parent.mkdir(exist_ok=True)
    try:
        write_new(path, png)
    except FileExistsError:
        if read_bytes(path, MAX_PNG_BYTES, BaselineError) != png:
            raise BaselineError(f"{path}: exists with other content; name the new image otherwise") from None

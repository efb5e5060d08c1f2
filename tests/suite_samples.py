"""Made-up stored runs: `perf_tests --replay` judges them without torch, a machine or a wait."""

from __future__ import annotations

import hashlib
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baseline_samples import ENVIRONMENT
from PIL import Image
from suite_server import server

from fluxfast.levels import LADDER, get_level
from fluxfast.workloads import TINY
from perf_tests.harness.schema import Counters, ErrorKind, Failure, Measurement, Proof, Result
from perf_tests.harness.store import write_result
from perf_tests.harness.stored_run import RunFacts

LEVELS = tuple(level.id for level in LADDER if level.id != "fa3_fp8")
UNAVAILABLE = {"fa3_fp8": "fa3_fp8: needs compute capability 9.0; found cpu"}
SPEED_S = {level: 0.8 * 0.8**number for number, level in enumerate(LEVELS)}
SIDE = 128


def picture(shift: int = 0) -> Any:
    """A scene of `SIDE` px: a disc and a box on a shaded ground; `shift` moves both, as another seed would."""
    y, x = np.mgrid[:SIDE, :SIDE]
    scene = np.stack([90 + x // 3, 120 + y // 4, 150 - x // 4], axis=2)
    scene[(x - 40 - shift) ** 2 + (y - 44) ** 2 < 24**2] = (210, 60, 40)
    scene[(abs(x - 88 + shift) < 18) & (abs(y - 90 + shift) < 14)] = (40, 90, 200)
    return scene.astype(np.uint8)


def png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def step_output(level: str) -> Any:
    """fp32's, and beside it an error as the level's format makes."""
    exact = np.sin(np.arange(256.0)).reshape(1, 16, 16)
    fields = get_level(level).fields()
    size = 0.0 if level == "fp32" else 0.005 if fields["quantization"] == "none" else 0.03
    return (exact + size * np.cos(np.arange(256.0) ** 2).reshape(1, 16, 16)).astype(np.float32)


def sample(level: str, process: int = 0, scale: float = 1.0) -> Result:
    """One good worker's result."""
    # A quiet machine: processes differ by a few tenths of a per cent, and not alike at every level.
    seconds = SPEED_S[level] * scale * (1 + 0.001 * ((3 * process + LEVELS.index(level)) % 5))
    return Result(
        level=level, workload=TINY.id, workload_digest=TINY.digest, process=process, fields=get_level(level).fields(),
        unavailable={}, environment=ENVIRONMENT, counters=Counters(),
        measurement=Measurement(
            clock="wall", samples_s=[seconds * (1 + 0.002 * round) for round in range(TINY.rounds)],
            wall_s=[seconds] * TINY.rounds, stages_s={}, load_s=1.0, apply_s=1.0, warmup_s=1.0,
            peak_memory_bytes=600_000_000, transformer_weight_bytes=18_000_000, inductor_config={}, image="image.png",
            proofs=[Proof(field="dtype", what="parameters", observed=377, expected=377)], image_sha256="0" * 64,
            step_output="step_output.npy",
        ),
    )  # fmt: skip


def put(folder: Path, result: Result, image: Any = None) -> None:
    """Store a result and what it names in `folder/level/process`."""
    place = folder / result.level / str(result.process)
    place.mkdir(parents=True, exist_ok=True)
    if result.measurement is not None:
        raw = png(picture() if image is None else image)
        (place / "image.png").write_bytes(raw)
        np.save(place / "step_output.npy", step_output(result.level))
        named = result.measurement.model_copy(update={"image_sha256": hashlib.sha256(raw).hexdigest()})
        result = result.model_copy(update={"measurement": named})
    write_result(place / "result.json", result)


def write_run(folder: Path, processes: int = 1, levels: Sequence[str] = LEVELS, **change: Any) -> Path:
    """A complete stored run; `change` goes into its `run.json`."""
    facts = RunFacts(
        slug="cpu", workload=TINY.id, workload_digest=TINY.digest, levels=list(levels), unavailable=UNAVAILABLE,
        processes=processes,
    ).model_copy(update=change)  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(facts.model_dump_json())
    for level in levels:
        for process in range(processes):
            put(folder, sample(level, process))
    return folder


def changed(level: str, process: int = 0, scale: float = 1.0, result: Any = None, **measured: Any) -> Result:
    """A result with other facts: of the result as a dict, of its measurement by name."""
    base = sample(level, process, scale)
    assert base.measurement is not None
    return base.model_copy(update={"measurement": base.measurement.model_copy(update=measured), **(result or {})})


def failed(level: str, kind: ErrorKind = ErrorKind.OOM, process: int = 0) -> Result:
    """A result of a worker that gave no measurement."""
    failure = Failure(
        kind=kind, stage="apply", message=f"the {kind.value} that was asked for.", exit_status=10,
        log_tail="the last line of its log", command=f"python -m perf_tests.harness.worker --level {level}",
    )  # fmt: skip
    return sample(level, process).model_copy(update={"measurement": None, "failure": failure})


class Ran:
    """One finished `pytest perf_tests`: exit status, text, and outcome by test from its JUnit XML."""

    def __init__(self, status: int, text: str, junit: Path) -> None:
        self.status = status
        self.text = text
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.properties: dict[str, dict[str, str]] = {}
        root = ElementTree.parse(junit).getroot() if junit.exists() else ElementTree.Element("none")
        self.suite_properties = [dict(found.items()) for found in root.iterfind("testsuite/properties/property")]
        for case in root.iter("testcase"):
            name = case.get("name", "")
            told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            self.outcomes[name] = "passed" if told is None else told.tag
            self.messages[name] = "" if told is None else f"{told.get('message')} {told.text}"
            self.properties[name] = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}

    def of(self, outcome: str) -> set[str]:
        """Tests with this outcome, less those of the level that is not available."""
        return {name for name, own in self.outcomes.items() if own == outcome and "fa3_fp8" not in name}


def run_suite(tmp: Path, *options: str | Path, paths: Sequence[str] = ("perf_tests",)) -> Ran:
    """`pytest perf_tests` in a process of its own, its baselines and results below `tmp`."""
    junit = tmp / "junit.xml"
    junit.unlink(missing_ok=True)
    arguments = [
        *paths, "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio", "-q", f"--junitxml={junit}",
        f"--baselines={tmp / 'baselines'}", f"--results={tmp / 'results'}", *map(str, options),
    ]  # fmt: skip
    return Ran(*server().run(arguments, tmp), junit)

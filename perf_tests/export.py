"""`python -m perf_tests export`: a stored run as records of the PyTorch OSS benchmark database, version 3.

One record a metric and level, as `pytorch/test-infra` uploads them to the table `oss_ci_benchmark_v3` behind
hud.pytorch.org. The upload adds what only CI knows (commit, workflow, job), and keeps our runners and dependencies.
What was not measured has no record: the table cannot hold "no number", and a 0 would be drawn as one.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from perf_tests.harness.files import StoreError, dump_json, printable, write_over
from perf_tests.harness.obstacles import measured
from perf_tests.harness.replay import ROOT, ReadOnlySession, judge, open_run
from perf_tests.harness.schema import PACKAGES, Environment, Outcome, Result, Verdict

FLOAT32_MAX = 3.4028234663852886e38
Float32 = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)]
UInt32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Extra = dict[str, str]
"""The table's `Map(String, String)`."""


class Table(BaseModel):
    """Types and names of the table's columns: clickhouse_db_schema/oss_ci_benchmark_v3/schema.sql in test-infra."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Benchmark(Table):
    """What was run."""

    name: str
    mode: str
    dtype: str
    extra_info: Extra


class Model(Table):
    """What it was run on."""

    name: str
    type: str
    backend: str
    origins: list[str]
    extra_info: Extra


class Metric(Table):
    """One number a process. `target_value` is left out where there is no baseline."""

    name: str
    benchmark_values: Annotated[list[Float32], Field(min_length=1)]
    target_value: Float32 | None = None
    extra_info: Extra


class Runner(Table):
    """The machine."""

    name: str
    type: str
    cpu_info: str
    cpu_count: UInt32
    gpu_info: str = ""
    gpu_count: UInt32 = 0
    extra_info: Extra


class Dependency(Table):
    """A package that was used."""

    version: str


class Record(Table):
    """One row, without what the upload adds."""

    benchmark: Benchmark
    model: Model
    runners: list[Runner]
    dependencies: dict[str, Dependency]
    metric: Metric


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0; 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m perf_tests export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of one run, results/<run>")
    parser.add_argument("--baselines", type=Path, default=ROOT / "baselines", help="whose medians are the targets")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmark_v3.json in the run's folder")
    asked = parser.parse_args(arguments)
    output = asked.output or asked.run / "benchmark_v3.json"
    try:
        session = open_run(asked.run, asked.baselines)
        rows, left = export(session)
        if not rows:
            raise StoreError(f"{asked.run}: nothing to export: {'; '.join(left)}")
        try:
            write_over(output, dump_json([row.model_dump(exclude_none=True) for row in rows]))
        except OSError as error:
            raise StoreError(f"{output} cannot be written ({error.strerror}); name another with -o") from error
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sentence in left:
        print(f"left out: {printable(sentence)}", file=sys.stderr)
    print(f"{len(rows)} records in {output}", file=sys.stderr)
    return 0


def export(session: ReadOnlySession) -> tuple[list[Record], list[str]]:
    """Records of every level that was measured soundly, and a sentence on each that was left out."""
    rows: list[Record] = []
    left = []
    verdicts = judge(session)
    for level in session.levels:
        if why := _unfit(session.results[level], verdicts[level]):
            left.append(f"{level}: {why}")
            continue
        is_void = verdicts[level]["test_latency"].outcome is Outcome.VOID
        if is_void:
            left.append(f"{level}: latency, because the machine was disturbed")
        said = {test: verdict.outcome.value for test, verdict in verdicts[level].items()}
        rows += [
            _record(session, level, metric, said)
            for metric in _metrics(session, level)
            if not (is_void and metric.name.startswith("latency"))
        ]
    return rows, left


def _unfit(results: Sequence[Result], verdicts: dict[str, Verdict]) -> str | None:
    """Why no number of this level is one of an undamaged, complete optimisation; None if they are."""
    if injected := next((result.injection for result in results if result.injection), None):
        return f"the fault {injected} was injected on purpose"
    if broken := next((verdict for verdict in verdicts.values() if verdict.outcome is Outcome.ERROR), None):
        return f"error ({broken.rule})"
    if not any(result.environment for result in results):
        return "what it was measured on is not known"
    proofs = (proof for measurement in measured(results) for proof in measurement.proofs)
    return next((f"field {proof.field!r} did not take effect" for proof in proofs if not proof.holds), None)


def _metrics(session: ReadOnlySession, level: str) -> Iterator[Metric]:
    own = measured(session.results[level])
    known = session.baseline.levels.get(level) if session.baseline else None
    expected = statistics.median(statistics.median(p.samples_s) for p in known.processes) if known else None
    # Seconds of another CPU are no target; the gate compares ratios there.
    target = expected if session.policy.relative_to is None else None
    yield _metric("latency(s)", [statistics.median(m.samples_s) for m in own], target, statistic="median of rounds")
    peak = max(known.peak_memory_bytes, default=None) if known else None
    yield _metric("peak_memory(MiB)", [m.peak_memory_bytes / 2**20 for m in own], peak and peak / 2**20)
    yield _metric("transformer_weights(MiB)", [m.transformer_weight_bytes / 2**20 for m in own], None)
    for name in ("load_s", "apply_s", "warmup_s"):
        yield _metric(f"{name.removesuffix('_s')}_time(s)", [getattr(m, name) for m in own], None)
    stored = session.stored_reference()
    scores = [] if session.workload.has_random_weights else session.image_scores(level, stored)
    for metric in dict.fromkeys(metric for score in scores for metric in score):
        # PSNR has no value for identical images.
        yield _metric(metric, [score[metric] for score in scores if metric in score], None)


def _metric(name: str, values: list[float], target: float | None, **extra: str) -> Metric:
    return Metric(name=name, benchmark_values=values, target_value=target, extra_info=extra)


def _record(session: ReadOnlySession, level: str, metric: Metric, said: dict[str, str]) -> Record:
    results, workload = session.results[level], session.workload
    environment = next(result.environment for result in results if result.environment)
    fields = results[0].fields
    return Record(
        benchmark=Benchmark(
            name="fluxfast-perf",
            mode="inference",
            dtype=_dtype(fields),
            extra_info={
                "device": "cpu" if environment.cuda is None else "cuda",
                "arch": _arch(environment),
                "compile": str(fields.get("compile_mode", "none") != "none").lower(),
                "level": level,
                "method": results[0].method,
                "workload_digest": results[0].workload_digest,
                **{f"field.{name}": _text(value) for name, value in fields.items()},
                **said,
            },
        ),
        model=Model(
            name=f"FLUX.1 {workload.id} {level}",
            type="diffusion pipeline",
            backend="aoti" if fields.get("packaging") == "aoti" else "",
            origins=["diffusers"],
            extra_info={"checkpoint": workload.checkpoint, "size": f"{workload.width}x{workload.height}"},
        ),
        runners=[_runner(environment, session.slug)],
        dependencies={
            name: Dependency(version=version)
            for name in PACKAGES
            if (version := getattr(environment, name)) is not None
        },
        metric=metric,
    )


def _dtype(fields: dict[str, Any]) -> str:
    quantization = fields.get("quantization", "none")
    return str(fields.get("dtype", "")) if quantization == "none" else _text(quantization)


def _text(value: Any) -> str:
    return re.sub(r"^(True|False)$", lambda found: found[0].lower(), str(value))


def _arch(environment: Environment) -> str:
    return environment.device_name if environment.cuda is not None else environment.cpu_name


def _runner(environment: Environment, slug: str) -> Runner:
    is_gpu = environment.cuda is not None
    extra = {"platform": environment.platform, "python": environment.python}
    extra |= {
        name: str(value)
        for name in ("cuda", "driver", "power_limit_w", "capability")
        if (value := getattr(environment, name)) is not None
    }
    return Runner(
        name="cuda" if is_gpu else "cpu",
        type=slug,
        cpu_info=environment.cpu_name,
        cpu_count=environment.cpu_threads,
        gpu_info=environment.device_name if is_gpu else "",
        gpu_count=int(is_gpu),
        extra_info=extra,
    )

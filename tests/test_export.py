"""Records for the PyTorch OSS benchmark database, held against its table and one written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_samples import LEVELS, RUN, replace, stored_run, write_baseline
from suite_samples import changed, failed

from fluxfast.levels import FIELDS
from fluxfast.workloads import TINY
from perf_tests import export
from perf_tests.harness.replay import open_run
from perf_tests.harness.schema import METHOD, Counters, ErrorKind, Proof

EXTRA = {str: str}
COLUMNS = {
    "benchmark": {"name": str, "mode": str, "dtype": str, "extra_info": EXTRA},
    "model": {"name": str, "type": str, "backend": str, "origins": [str], "extra_info": EXTRA},
    "inputs": {str: {"dtype": str, "extra_info": EXTRA}},
    "dependencies": {str: {"repo": str, "branch": str, "sha": str, "version": str, "extra_info": EXTRA}},
    "metric": {"name": str, "benchmark_values": [float], "target_value": float, "extra_info": EXTRA},
    "runners": [
        {
            "name": str, "type": str, "cpu_info": str, "cpu_count": int, "mem_info": str, "avail_mem_in_gb": int,
            "gpu_info": str, "gpu_count": int, "gpu_mem_info": str, "avail_gpu_mem_in_gb": int, "extra_info": EXTRA,
        }
    ],
}  # fmt: skip
"""What a record may hold of the table `oss_ci_benchmark_v3` (its schema.sql in pytorch/test-infra); the upload adds
timestamp, repo, commit, workflow and job."""

BY_HAND = {
    "benchmark": {
        "name": "fluxfast-perf",
        "mode": "inference",
        "dtype": "bfloat16",
        "extra_info": {
            "device": "cpu",
            "arch": "a cpu",
            "compile": "true",
            "level": "compile",
            "method": METHOD,
            "workload_digest": TINY.digest,
            "field.dtype": "bfloat16",
            "field.compile_mode": "max-autotune",
            "field.fused_projections": "false",
            "field.memory_format": "contiguous",
            "field.attention": "sdpa",
            "field.quantization": "none",
            "field.inductor_flags": "false",
            "field.packaging": "jit",
            "test_structure": "pass",
            "test_latency": "pass",
            "test_image": "pass",
            "test_step_error": "pass",
            "test_memory": "pass",
        },
    },
    "model": {
        "name": "FLUX.1 tiny compile",
        "type": "diffusion pipeline",
        "backend": "",
        "origins": ["diffusers"],
        "extra_info": {"checkpoint": "tiny", "size": "256x256"},
    },
    "runners": [
        {
            "name": "cpu",
            "type": "cpu",
            "cpu_info": "a cpu",
            "cpu_count": 2,
            "gpu_info": "",
            "gpu_count": 0,
            "extra_info": {"platform": "linux", "python": "3.11.0"},
        }
    ],
    "dependencies": {
        "torch": {"version": "2.13.0"},
        "torchao": {"version": "0.18.0"},
        "diffusers": {"version": "0.42.1"},
        "transformers": {"version": "5.0.0"},
    },
    "metric": {
        "name": "peak_memory(MiB)",
        "benchmark_values": [600_000_000 / 2**20],
        "target_value": 600_000_000 / 2**20,
        "extra_info": {},
    },
}


def fits(value: Any, column: Any) -> bool:
    """Whether a value of JSON can be inserted into a column."""
    if isinstance(column, list):
        return isinstance(value, list) and all(fits(item, column[0]) for item in value)
    if isinstance(column, dict):
        is_map = str in column
        known = isinstance(value, dict) and (is_map or value.keys() <= column.keys())
        return known and all(fits(item, column[str if is_map else name]) for name, item in value.items())
    if column is float:
        return type(value) in (int, float) and abs(value) < 3.4e38
    return type(value) is column and (column is str or 0 <= value < 1 << 32)


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    write_baseline(tmp_path)
    stored_run(tmp_path)
    return tmp_path


def exported(tmp: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, left = export.export(open_run(tmp / "results" / RUN, tmp / "baselines"))
    return [row.model_dump(exclude_none=True) for row in rows], left


def test_record_written_by_hand(tmp: Path) -> None:
    """The whole record of one metric, as the columns' documentation asks for it."""
    rows, left = exported(tmp)
    (found,) = [
        row
        for row in rows
        if (row["metric"]["name"], row["benchmark"]["extra_info"]["level"]) == ("peak_memory(MiB)", "compile")
    ]
    # The optimisations that came after the record was written are off.
    later = {f"field.{field}": "false" for field in FIELDS} | BY_HAND["benchmark"]["extra_info"]
    assert found == BY_HAND | {"benchmark": BY_HAND["benchmark"] | {"extra_info": later}}
    assert left == []


def test_every_record_fits_the_table(tmp: Path) -> None:
    """Names and types of every column; the file is a list of them, as the upload reads it."""
    path = tmp / "out.json"
    assert export.main([str(tmp / "results" / RUN), "--baselines", str(tmp / "baselines"), "-o", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {row["benchmark"]["extra_info"]["level"] for row in rows} == set(LEVELS)
    for row in rows:
        assert {"benchmark", "model", "metric"} <= row.keys()
        assert fits(row, COLUMNS), row
    assert not fits({"metric": {"benchmark_values": ["1"]}}, COLUMNS)
    assert not fits({"metric": {"value": 1.0}}, COLUMNS)
    latency = [row["metric"] for row in rows if row["metric"]["name"] == "latency(s)"]
    assert "target_value" not in latency[0], "seconds of another CPU are no target"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (failed("compile", ErrorKind.OOM), "error (oom)"),
        (changed("compile", result={"injection": "latency=+30%"}), "injected on purpose"),
        (changed("compile", proofs=[Proof(field="dtype", what="x", observed=0, expected=2)]), "did not take effect"),
        (changed("compile", result={"environment": None}), "what it was measured on is not known"),
    ],
    ids=["failed", "injected", "not proven", "no environment"],
)
def test_an_error_has_no_record(tmp: Path, result: Any, said: str) -> None:
    """Neither as 0 nor as anything else; the other levels are there, and what was left out is said."""
    replace(tmp / "results" / RUN, result)
    rows, left = exported(tmp)
    assert len(left) == 1
    assert left[0].startswith("compile: ")
    assert said in left[0]
    assert {row["benchmark"]["extra_info"]["level"] for row in rows} == set(LEVELS) - {"compile"}
    positive = [row["metric"]["benchmark_values"] for row in rows if "(" in row["metric"]["name"]]
    assert all(value > 0 for values in positive for value in values)


def test_what_is_left_out_is_said_on_one_line(tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name in a result cannot begin a line of its own, which CI would obey."""
    replace(tmp / "results" / RUN, changed("compile", result={"injection": "x\n::error::evil"}))
    assert export.main([str(tmp / "results" / RUN), "--baselines", str(tmp / "baselines")]) == 0
    assert "left out: compile: the fault x?::error::evil was" in capsys.readouterr().err


def test_disturbed_level_has_no_latency(tmp: Path) -> None:
    """Its bytes count all the same."""
    replace(tmp / "results" / RUN, changed("compile", result={"counters": Counters(foreign_pids=[7])}))
    rows, left = exported(tmp)
    names = {row["metric"]["name"] for row in rows if row["benchmark"]["extra_info"]["level"] == "compile"}
    assert "latency(s)" not in names
    assert "peak_memory(MiB)" in names
    assert left == ["compile: latency, because the machine was disturbed"]


def test_nothing_to_export_is_an_error(tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No empty file that an upload would take for a run."""
    for level in LEVELS:
        replace(tmp / "results" / RUN, failed(level))
    out = tmp / "out.json"
    assert export.main([str(tmp / "results" / RUN), "--baselines", str(tmp / "baselines"), "-o", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not out.exists()

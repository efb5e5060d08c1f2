"""The measuring tool keeps to its minutes, keeps what it got, and names what it did not reach."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxfast.levels import get_level
from fluxfast.workloads import TINY
from perf_tests.harness.progress import Deadlines
from tools import measure_levels
from tools.measure_levels import FIRST, Measured, measure, plan, table

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
DEADLINES = Deadlines(load_s=20, apply_s=20, warmup_s=20, measure_s=20, finish_s=20)


def run(folder: Path, levels: list[str], *behave: str, **options: Any) -> dict[str, Measured]:
    """The stand-in worker at the level `compile` and others."""
    settings = {"minutes": 1.0, "level_s": 30.0, "deadlines": DEADLINES, "unavailable": {}} | options
    return measure(levels, "tiny", folder, worker_command=(*FAKE, *behave), **settings)


def test_parents_are_measured_too() -> None:
    """Each level comes with its parent, once, and the default begins with the rung that the others stand on."""
    assert plan(["bf16", "compile", "fused_qkv"]) == ["bf16", "compile", "fused_qkv", "fp32"]
    assert plan(["compile", "fp32", "flux_fast"], alone=True) == ["compile", "flux_fast", "fp32"]
    chosen = plan(FIRST)
    assert chosen[0] == "float8_rowwise" and len(chosen) == len(set(chosen))
    assert all(get_level(level).parent in (None, *chosen) for level in FIRST)


def test_every_level_is_in_the_table(tmp_path: Path) -> None:
    """Every level has its row, with the parent's time over the level's, and the error of its output."""
    saved: list[int] = []
    measured = run(
        tmp_path, ["compile", "bf16", "fa3_fp8"], unavailable={"fa3_fp8": "no Hopper"},
        on_result=lambda known: saved.append(sum(len(own.results) for own in known.values())),
    )  # fmt: skip
    for level, values in (("bf16", [1.0, 0.0]), ("compile", [1.0, 0.1])):
        np.save(tmp_path / level / "0" / "step.npy", np.array(values, np.float32))
    lines = table(measured, tmp_path, TINY).splitlines()
    assert saved == [1, 2, 2] and "error to bf16" in lines[0]
    assert (
        lines[2].startswith("| `compile` | 100.0 | 1.000 | 20.0 | 10.0 | 30.0 | 10.0 |") and "| 0.10000 |" in lines[2]
    )
    assert lines[3].startswith("| `bf16` | 100.0 | - |") and lines[4] == "| `fa3_fp8` | no Hopper |"


def test_worker_that_overstays_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row says in which stage, and the level after it still gets its turn."""
    monkeypatch.setattr(measure_levels, "LEAST_S", 0.1)
    measured = run(tmp_path, ["compile", "bf16"], "--hang-in", "apply", level_s=5.0)
    assert all(own.why_not and "stopped in stage 'apply'" in own.why_not for own in measured.values())
    assert all((tmp_path / level / "0" / "result.json").is_file() for level in measured)


def test_level_without_time_left_is_named(tmp_path: Path) -> None:
    """Nothing is started that could not end."""
    measured = run(tmp_path, ["compile"], minutes=0.1)
    assert "`compile` | not started: 6 s were left" in table(measured, tmp_path, TINY)
    assert not list(tmp_path.iterdir())


def test_failure_keeps_its_reason(tmp_path: Path) -> None:
    """A step that did not apply is in the table in its own words."""
    measured = run(tmp_path, ["compile"], "--behave", "step-not-applied")
    assert "step_not_applied: " in table(measured, tmp_path, TINY) and "0 of 57 blocks" in table(
        measured, tmp_path, TINY
    )

"""Several runs as one: all processes, nothing else, and refusal of what does not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_samples import LEVELS, put, run_suite, sample, write_run

from perf_tests.harness.replay import open_run
from perf_tests.merge import main


def merge(*runs: Path, out: Path) -> int:
    return main([*map(str, runs), "-o", str(out)])


def test_processes_are_numbered_on(tmp_path: Path) -> None:
    """In the order of the runs, with their files; a disturbed process is the one that was measured again."""
    one, other, out = write_run(tmp_path / "one", 2), write_run(tmp_path / "other", 1), tmp_path / "new" / "out"
    put(one, sample("bf16", 1, 2.0))
    put(other / "rerun", sample("aoti", 0, 3.0))
    assert merge(one, other, out=out) == 0
    both = open_run(out, None)
    assert both.processes == 3 and set(both.results) == set(LEVELS)
    expected = [("bf16", 0, 1.0), ("bf16", 1, 2.0), ("bf16", 0, 1.0)]
    for index, (level, process, scale) in [*enumerate(expected), (2, ("aoti", 0, 3.0))]:
        own = both.results[level][index]
        assert own.process == index
        assert own.measurement.samples_s == sample(level, process, scale).measurement.samples_s
        assert both.image(level, index).shape == (128, 128, 3) and len(both.step_output(level, index))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_baseline_is_recorded_of_two_runs(tmp_path: Path) -> None:
    """Three processes and two make the five that a baseline needs."""
    out = tmp_path / "out"
    assert merge(write_run(tmp_path / "one", 3), write_run(tmp_path / "other", 2), out=out) == 0
    ran = run_suite(tmp_path, "--replay", out, "--record-baseline")
    assert ran.status == 0 and "0001_tiny.json" in ran.text, ran.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slug": "h200-700w"}, "differ in slug: 'h200-700w' and 'cpu'"),
        ({"levels": ["bf16"]}, "differ in levels"),
        ({"unavailable": {"fa3_fp8": "no FA3"}}, "differ in unavailable"),
    ],
    ids=str,
)
def test_other_runs_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine or other levels are another run."""
    other = write_run(tmp_path / "other", **change)
    assert merge(write_run(tmp_path / "one"), other, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and not (tmp_path / "out").exists()


def test_another_environment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what differs: processes of two torches have no common median."""
    other = write_run(tmp_path / "other")
    for level in LEVELS:
        result = sample(level)
        put(other, result.model_copy(update={"environment": result.environment.model_copy(update={"torch": "9.9"})}))
    assert merge(write_run(tmp_path / "one"), other, out=tmp_path / "out") == 2
    assert "different environments: torch '9.9' and" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run, one named twice, a partial one, no run, and a folder that is there: nothing is written."""
    one, partial, empty = write_run(tmp_path / "one"), write_run(tmp_path / "partial", processes=2), tmp_path / "empty"
    (partial / "aoti" / "1" / "result.json").unlink()
    empty.mkdir()
    for runs, out, words in (
        ((one,), "out", "two different runs"),
        ((one, tmp_path / "empty" / ".." / "one"), "out", "two different runs"),
        ((one, partial), "out", "1 of 2 results of level 'aoti'"),
        ((one, empty), "out", "run.json is not there"),
        ((one, partial), "empty", "exists already"),
    ):
        assert merge(*runs, out=tmp_path / out) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "one", "partial"]

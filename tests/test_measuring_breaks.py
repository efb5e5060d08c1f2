"""A run that cannot measure says why once and starts no worker again."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite_samples import Ran, run_suite, write_run

from perf_tests.harness.machine import git_sha

INTERRUPTED = 2


def run_live(tmp: Path, *options: str | Path) -> Ran:
    """`pytest perf_tests` that measures, with made-up workers."""
    return run_suite(tmp, "-p", "fake_machine", f"--cache={tmp / 'cache'}", *options)


def test_made_up_workers_are_a_green_run(tmp_path: Path) -> None:
    """What the tests below break is whole, and lies in the history."""
    ran = run_live(tmp_path)
    assert ran.status == 0, ran.text
    assert (tmp_path / "results" / "history.db").exists()


def test_a_machine_that_is_not_known_yet_is_no_other_one(tmp_path: Path) -> None:
    """pytest-benchmark compares machines before the first worker tells its packages: no warning in each run."""
    assert run_live(tmp_path, "--record-baseline").status == 0
    ran = run_live(tmp_path, "--benchmark-compare")
    assert ran.status == 0 and "Comparing against benchmarks from: 0001_tiny.json" in ran.text, ran.text
    assert "machine_info is different" not in ran.text


def test_a_disturbed_process_is_measured_again(tmp_path: Path) -> None:
    """It alone, as the terminal says; run and replay are green."""
    ran = run_live(tmp_path, "--hot=compile:1", "--processes=3")
    assert ran.status == 0, ran.text
    assert "measuring fp32, bf16, " in ran.text and " in 3 process(es) each, into " in ran.text
    (run,) = (tmp_path / "results").glob("*/run.json")
    rerun = run.with_name("rerun")
    assert f"measuring once more: compile #1, into {rerun}\n" in ran.text
    assert [str(path.parent.relative_to(rerun)) for path in rerun.rglob("result.json")] == ["compile/1"]
    again = run_suite(tmp_path, "--replay", run.parent)
    assert (again.status, again.outcomes) == (0, ran.outcomes), again.text


def test_what_ends_one_gpu_ends_the_run(tmp_path: Path) -> None:
    """One sentence of the worker that could not go on; the three others on two GPUs end, and none is started again."""
    ran = run_live(tmp_path, "--breaks=disk", "--cards=h200-700w,h200-700w", "--gpus=2")
    assert ran.status == INTERRUPTED, ran.text
    assert "measuring ended with: [Errno 28] No space left" in ran.text and "Traceback" not in ran.text
    assert len(ran.outcomes) == len(ran.of("failure")) == 1
    assert len(list((tmp_path / "results").glob("*/*/*/result.json"))) <= 3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("--breaks=disk", "measuring ended with: [Errno 28] No space left on device: 'log.txt'; --results, --cache"),
        ("--breaks=busy", "measuring ended with: GPU-1 is held by process 7"),
        ("results", "File exists"),
        ("cache", "File exists"),
    ],
)
def test_what_ends_the_measuring_ends_the_run(tmp_path: Path, how: str, said: str) -> None:
    """One red test with one sentence, one folder, and nothing in the history."""
    if not how.startswith("-"):
        (tmp_path / how).write_text("a file")
    ran = run_live(tmp_path, *([how] if how.startswith("-") else []))
    assert ran.status == INTERRUPTED, ran.text
    assert len(ran.outcomes) == len(ran.of("failure")) == 1
    assert said in ran.text
    assert "Traceback" not in ran.text and "raise " not in ran.text and "During handling" not in ran.text
    assert how == "results" or len(list((tmp_path / "results").iterdir())) == 1


def test_a_mistake_of_the_suite_has_one_traceback(tmp_path: Path) -> None:
    """Not one a test, each after hours of measuring."""
    ran = run_live(tmp_path, "--breaks=bug")
    assert ran.status == INTERRUPTED
    assert ran.text.count("RuntimeError: a mistake") <= 3 and "raise " in ran.text
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_what_ends_a_confirmation_ends_the_run(tmp_path: Path) -> None:
    """The verdicts before it are shown."""
    recorded = run_suite(tmp_path, "--replay", write_run(tmp_path / "run5", 5), "--record-baseline")
    assert recorded.status == 0, recorded.text
    ran = run_live(tmp_path, "--slow=aoti", "--breaks=disk", "--benchmark-compare")
    assert ran.status == INTERRUPTED, ran.text
    assert ran.of("failure") == {"test_latency[aoti]"}
    assert "No space left" in ran.text and "Traceback" not in ran.text
    assert "test_image[fp32]" in ran.text


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that was copied to a machine without git."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_sha() == "nogit"

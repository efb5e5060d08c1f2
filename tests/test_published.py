"""The published H100 numbers: the files are what the tool writes, and a run on that machine is judged by them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from suite_samples import LEVELS, changed, put, run_suite, write_run

from fluxfast.levels import get_level
from fluxfast.workloads import WORKLOADS
from perf_tests.harness.store import find_baseline, read_baseline
from tools import published_baselines
from tools.published_baselines import IDS, SECONDS, SLUG

ROOT = Path(__file__).parents[1]
WORKLOAD = WORKLOADS["schnell-hub"]
OF_WORKLOAD = {"workload": WORKLOAD.id, "workload_digest": WORKLOAD.digest}


@pytest.mark.parametrize("id", IDS)
def test_committed_files_are_the_tools(id: str) -> None:
    """One sample a level, marked as published, of the workload as it is today: run the tool again if it changed."""
    path = find_baseline(ROOT / "baselines" / SLUG, id)
    assert path is not None
    stored = read_baseline(path)
    assert stored == published_baselines.published(id)
    assert stored.source == "published" and "huggingface/flux-fast" in stored.source_note
    assert [[p.samples_s for p in level.processes] for level in stored.levels.values()] == [
        [[seconds]] for seconds in SECONDS.values()
    ]


def test_tool_writes_the_same_bytes(tmp_path: Path) -> None:
    """The files can be made again."""
    for path in published_baselines.write(tmp_path):
        assert path.read_bytes() == (ROOT / "baselines" / SLUG / path.name).read_bytes()


def test_only_equal_recipes_are_mapped() -> None:
    """flux-fast casts to e4m3 within the attention op, so none of its float8 rows is a level of this ladder."""
    assert all(get_level(level).attention == "sdpa" for level in SECONDS)


def h100_run(tmp: Path, slow: str = "") -> Path:
    """A stored run of that machine, faster than what is published, but for one level."""
    run = write_run(tmp / "run", slug=SLUG, workload=WORKLOAD.id, workload_digest=WORKLOAD.digest)
    for level in LEVELS:
        put(run, changed(level, scale=4.0 if level == slow else 1.0, result=OF_WORKLOAD))
    shutil.copytree(ROOT / "baselines" / SLUG, tmp / "baselines" / SLUG)
    return run


def test_run_on_that_machine(tmp_path: Path) -> None:
    """Latency and counts pass where a number is published; what is not published says so and how to record it."""
    ran = run_suite(tmp_path, "--replay", h100_run(tmp_path), "--benchmark-compare")
    assert ran.status == 1 and "Traceback" not in ran.text
    for level in LEVELS:
        outcome = "pass" if level in SECONDS else "no_baseline"
        for test in ("latency", "structure", "step_error"):
            assert ran.properties[f"test_{test}[{level}]"]["verdict"] == outcome, ran.messages[f"test_{test}[{level}]"]
        for test in ("image", "memory"):
            assert ran.properties[f"test_{test}[{level}]"]["verdict"] == "no_baseline"
            assert (
                f"pytest perf_tests --workload {WORKLOAD.id} --record-baseline" in ran.messages[f"test_{test}[{level}]"]
            )
    assert "holds no memory of level 'compile'" in ran.messages["test_memory[compile]"]
    assert "has no level 'aoti'" in ran.messages["test_latency[aoti]"]


def test_slower_than_published(tmp_path: Path) -> None:
    """Red beyond the margin, in the words of an upper bound; a faster level is never an improvement."""
    ran = run_suite(
        tmp_path,
        "--replay",
        h100_run(tmp_path, slow="compile"),
        "--benchmark-compare",
        paths=("perf_tests/test_latency.py",),
    )
    assert ran.properties["test_latency[compile]"]["verdict"] == "regressed"
    message = ran.messages["test_latency[compile]"]
    assert "the published baseline of 'h100-700w' says 0.716 s" in message
    assert "bound from above only (huggingface/flux-fast" in message
    assert ran.properties["test_latency[bf16]"]["verdict"] == "pass"


def test_random_weights_are_not_judged_by_it(tmp_path: Path) -> None:
    """The numbers are of released weights of FLUX.1-schnell: `dev` on that machine has no baseline."""
    run = h100_run(tmp_path)
    other = WORKLOADS["dev"]
    for level in LEVELS:
        put(run, changed(level, result={"workload": other.id, "workload_digest": other.digest}))
    facts = (run / "run.json").read_text().replace(WORKLOAD.id, other.id).replace(WORKLOAD.digest, other.digest)
    (run / "run.json").write_text(facts)
    ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare", paths=("perf_tests/test_latency.py",))
    assert {ran.properties[f"test_latency[{level}]"]["verdict"] for level in LEVELS} == {"no_baseline"}

"""What is beside the ladder: measured by name, in one run with it, judged like any level."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from suite_samples import LEVELS, SPEED_S, changed, put, run_suite, sample, write_run
from test_session import Machine, session

from fluxfast.levels import LADDER, get_level
from perf_tests.harness.machine import chosen_levels
from perf_tests.harness.store import read_baseline

BESIDE = "flux_fast"
IDS = [level.id for level in LADDER]
ALL = [*IDS, BESIDE]


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up machine runs it a little slower than its parent."""
    monkeypatch.setitem(SPEED_S, BESIDE, SPEED_S["aoti"] * 1.05)
    monkeypatch.setattr("suite_samples.LEVELS", (*LEVELS, BESIDE))


def test_only_its_name_brings_it_in() -> None:
    """The default is the ladder; `ladder` and names combine, in the order of the levels."""
    assert chosen_levels(None, IDS, ALL, {}) == IDS
    assert chosen_levels(f"{BESIDE},bf16", IDS, ALL, {}) == ["bf16", BESIDE]
    assert chosen_levels(f"{BESIDE}, ladder", IDS, ALL, {}) == ALL
    with pytest.raises(ValueError, match=f"--levels {BESIDE}: needs Hopper"):
        chosen_levels(BESIDE, IDS, IDS, {BESIDE: "needs Hopper"})
    with pytest.raises(ValueError, match=f"--levels {BESIDE}: not in this run; choose from fp32"):
        chosen_levels(BESIDE, IDS, IDS, {})


def test_all_that_the_baseline_holds() -> None:
    """A word of its own: what was recorded and can run, with the ladder or without; refused if nothing is compared."""
    assert chosen_levels("recorded", IDS, ALL, {}, ["bf16", BESIDE]) == ["bf16", BESIDE]
    assert chosen_levels("ladder, recorded", IDS, ALL, {}, [BESIDE]) == ALL
    assert chosen_levels("ladder,recorded", IDS, IDS, {BESIDE: "needs Hopper"}, [BESIDE]) == IDS
    assert chosen_levels("ladder,recorded", IDS, ALL, {}, []) == IDS
    with pytest.raises(ValueError, match=f"--levels {BESIDE}: not in this run"):
        chosen_levels("recorded", IDS, IDS, {}, ["bf16", BESIDE])
    with pytest.raises(ValueError, match="the baseline holds renamed, which this checkout does not have"):
        chosen_levels("recorded", IDS, ALL, {}, ["bf16", "renamed"])
    with pytest.raises(ValueError, match="no baseline holds a level that this machine can run"):
        chosen_levels("recorded", IDS, IDS, {BESIDE: "needs Hopper"}, [BESIDE])
    with pytest.raises(ValueError, match="--levels recorded: no baseline holds a level"):
        chosen_levels("recorded", IDS, ALL, {}, [])
    with pytest.raises(ValueError, match="nothing is compared with one here"):
        chosen_levels("ladder,recorded", IDS, ALL, {})


def test_its_references_come_along(tmp_path: Path) -> None:
    """bf16, fp32 and its parent are measured with it, and once more to confirm it."""
    machine = Machine()
    own = session(tmp_path, machine, [BESIDE])
    own.structure(BESIDE)
    assert {level for level, _ in machine.calls[0][0]} == {"fp32", "bf16", get_level(BESIDE).parent, BESIDE}
    own.confirm(BESIDE)
    assert {level for level, _ in machine.calls[1][0]} == {"bf16", get_level(BESIDE).parent, BESIDE}


def test_default_run_has_no_test_of_it(tmp_path: Path) -> None:
    """It is neither measured nor skipped where nobody asked for it."""
    ran = run_suite(tmp_path, "--replay", write_run(tmp_path / "run"), paths=("perf_tests/test_structure.py",))
    assert ran.status == 0, ran.text
    assert set(ran.outcomes) == {f"test_structure[{level}]" for level in IDS}


def test_recorded_and_judged_in_one_run_with_the_ladder(tmp_path: Path) -> None:
    """A run of both becomes a baseline, is green against it, red if it is slower, and tells both ratios."""
    levels = (*LEVELS, BESIDE)
    recorded = run_suite(
        tmp_path, "--replay", write_run(tmp_path / "run5", 5, levels), "--record-baseline",
    )  # fmt: skip
    assert recorded.status == 0, recorded.text
    run = write_run(tmp_path / "run", 1, levels)
    ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare")
    assert ran.status == 0, ran.text
    assert len([name for name in ran.of("passed") if BESIDE in name]) == 5
    medians = {level: statistics.median(sample(level).measurement.samples_s) for level in ("bf16", "aoti", BESIDE)}
    over_bf16, over_parent = (medians[level] / medians[BESIDE] for level in ("bf16", "aoti"))
    assert f"x{over_bf16:.3f} of bf16, x{over_parent:.3f} of aoti" in ran.text
    put(run, sample(BESIDE, 0, 1.4))
    ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare", paths=("perf_tests/test_latency.py",))
    assert ran.of("failure") == {f"test_latency[{BESIDE}]"}
    put(run, changed(BESIDE, transformer_weight_bytes=1))
    ran = run_suite(
        tmp_path, "--replay", run, f"--levels=bf16,float8,{BESIDE}", "--benchmark-compare",
        paths=("perf_tests/test_memory.py",),
    )  # fmt: skip
    assert ran.of("failure") == {f"test_memory[{BESIDE}]"}
    assert ran.of("passed") == {"test_memory[bf16]", "test_memory[float8]"}


def test_what_only_came_along_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that no test judged stays out of the baseline, and its child is judged without it."""
    child = "flux_fast_gemm_search"
    assert get_level(child).parent == BESIDE
    monkeypatch.setitem(SPEED_S, child, SPEED_S[BESIDE] * 0.9)
    levels = (*LEVELS, BESIDE, child)
    monkeypatch.setattr("suite_samples.LEVELS", levels)
    chosen = f"--levels={','.join((*LEVELS, child))}"
    asked = ("--replay", write_run(tmp_path / "run5", 5, levels), chosen)
    ran = run_suite(tmp_path, *asked, "--record-baseline")
    assert ran.status == 0, ran.text
    (path,) = (tmp_path / "baselines" / "cpu").glob("*.json")
    assert set(read_baseline(path).levels) == {*LEVELS, child}
    ran = run_suite(tmp_path, *asked, "--benchmark-compare", "--update-baseline")
    assert ran.status == 0 and "baseline unchanged" in ran.text, ran.text
    slow = write_run(tmp_path / "run", 1, levels)
    put(slow, sample(child, 0, 1.4))
    ran = run_suite(tmp_path, "--replay", slow, chosen, "--benchmark-compare")
    assert ran.of("failure") == {f"test_latency[{child}]"}
    assert "Over its parent" not in ran.messages[f"test_latency[{child}]"]


def test_recorded_level_that_was_lost_is_red(tmp_path: Path) -> None:
    """Whoever asks for all that the baseline holds learns of a level that the machine cannot run any more."""
    levels = (*LEVELS, BESIDE)
    recorded = run_suite(
        tmp_path, "--replay", write_run(tmp_path / "run5", 5, levels), "--record-baseline",
        "--levels", f"ladder,{BESIDE}",
    )  # fmt: skip
    assert recorded.status == 0, recorded.text
    run = write_run(tmp_path / "run", 3)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"unavailable": facts["unavailable"] | {BESIDE: "needs Hopper"}}))
    for words, told in (("ladder", False), ("ladder,recorded", True)):
        ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare", "--levels", words)
        assert (f"test_latency[{BESIDE}]" in ran.outcomes) == told, ran.text
        assert (ran.status != 0) == told and ("needs Hopper" in ran.text) == told, ran.text
    again = run_suite(tmp_path, "--replay", run, "--record-baseline", "--levels", "ladder,recorded")
    assert again.status == 4 and "needs Hopper" in again.text, "refused before anything is measured"

"""What may become a baseline, what an update may change, and that stock pytest-benchmark reads the file."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from baseline_samples import (
    ENVIRONMENT,
    LEVELS,
    sample_baseline,
    sample_failure,
    sample_result,
    sample_run,
    write_sample,
)

from perf_tests.harness import record
from perf_tests.harness.policy import policy_for
from perf_tests.harness.recording import machine_info, stock_json
from perf_tests.harness.schema import AnnotatedStep, Baseline, Counters, Outcome, Proof, Result, Verdict
from perf_tests.harness.store import BaselineError, read_baseline
from perf_tests.harness.updating import _moved, add_night, update_baseline

LIMITS = dict.fromkeys(LEVELS, 0.06)
CPU = {level: policy_for("cpu").divisor(level) for level in LEVELS}
DAY = datetime.date(2026, 11, 24)
PREFIX = "perf_tests/test_latency.py::test_latency"


def measured(**change: Any) -> Result:
    """A good result of level bf16 whose measurement is changed."""
    good = sample_result()
    assert good.measurement is not None
    return good.model_copy(update={"measurement": good.measurement.model_copy(update=change)})


NO_PROOF = [Proof(field="dtype", what="bfloat16 weights", observed=6, expected=7)]
OTHER_PROOF = [Proof(field="dtype", what="bfloat16 weights", observed=8, expected=8)]
UNFIT = {
    "failed": (sample_result(measurement=None, failure=sample_failure()), "failed (oom)"),
    "injected": (sample_result(injection="latency=+5%"), "the injection 'latency=+5%'"),
    "throttled": (sample_result(counters=Counters(thermal_violation_ns=1)), "is void: thermal_violation_ns rose by 1"),
    "slowed": (sample_result(counters=Counters(hw_slowdown_ns=1)), "is void: hw_slowdown_ns rose by 1"),
    "braked": (sample_result(counters=Counters(power_brake_ns=1)), "is void: power_brake_ns rose by 1"),
    "shared": (
        sample_result(counters=Counters(foreign_pids=[77])),
        "is void: another process used the same GPU (pid 77)",
    ),
    "few rounds": (measured(samples_s=[0.2]), "holds 1 of 3 rounds"),
    "no proof": (measured(proofs=NO_PROOF), "a proof that does not hold"),
    "other proof": (measured(proofs=OTHER_PROOF), "proofs differ between its processes"),
    "other level": (sample_result("fp32"), "is of level 'fp32'"),
    "other workload": (sample_result(workload_digest="x"), "has method, workload"),
    "other method": (sample_result(method="x"), "has method, workload"),
    "other torch": (sample_result(environment=ENVIRONMENT.model_copy(update={"torch": "2"})), "another environment"),
    "no environment": (sample_result(environment=None), "another environment"),
    "other fields": (sample_result(fields={"dtype": "float32"}), "fields differ between its processes"),
    "twice": (sample_result(process=1), "expected at least 5 different ones"),
    "NaN": (measured(samples_s=[float("nan"), 0.2, 0.2]), "level 'bf16': samples_s.0 is nan"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("place", [0, 4])
def test_an_unfit_result_never_becomes_a_baseline(kind: str, place: int) -> None:
    """First or last of its level, it spoils the run, and the message names it."""
    run = sample_run()
    result, message = UNFIT[kind]
    if kind != "twice":
        result = result.model_copy(update={"process": place})
    run["bf16"][place] = result
    with pytest.raises(BaselineError) as raised:
        sample_baseline(run)
    assert message in str(raised.value)
    assert kind == "NaN" or "can never become a baseline" in str(raised.value)


def test_a_partial_run_never_becomes_a_baseline() -> None:
    """A level missing, one too many, too few processes, nothing at all."""
    run = sample_run()
    for odd in (
        {level: run[level] for level in ("fp32", "bf16")},
        {**run, "aoti": run["bf16"]},
        {**run, "bf16": run["bf16"][:4]},
        {**run, "bf16": []},
    ):
        with pytest.raises(BaselineError, match="can never become a baseline"):
            sample_baseline(odd)
    with pytest.raises(BaselineError, match="holds no result"):
        sample_baseline({level: [] for level in LEVELS})


def test_a_gpu_run_needs_counters() -> None:
    """Without them no one can tell that it was not throttled; a counter that the GPU does not have is no obstacle."""
    run = sample_run()
    assert sample_baseline(run, slug="h200-700w").slug == "h200-700w"
    run["bf16"][2] = sample_result(process=2, counters=None)
    assert sample_baseline(run).slug == "cpu"
    with pytest.raises(BaselineError, match="no NVML counters"):
        sample_baseline(run, slug="h200-700w")


def test_a_power_cap_is_no_obstacle() -> None:
    """A loaded H100 or H200 is always at its power limit."""
    run = sample_run()
    run["bf16"][0] = sample_result(counters=Counters(power_violation_ns=10**9))
    assert sample_baseline(run).levels["bf16"].processes[0].counters == Counters(power_violation_ns=10**9)


def test_nothing_moved_changes_nothing() -> None:
    """Within a third of the limit the old baseline stays as it is, slower or faster."""
    old = sample_baseline()
    new = sample_baseline(sample_run({"bf16": 1.019, "compile": 0.981}))
    assert update_baseline(old, new, LIMITS, None) == (old, [])


QUIET = {"ratio": 1.001, "low": 0.99, "high": 1.01, "limit": 0.005}


def test_a_night_is_kept_however_far_it_is() -> None:
    """Only the latest thirty, none twice, none of the baseline's own run."""
    old = sample_baseline()
    nights = {"fp32": (0.0, None), "bf16": (0.01, 0.002), "compile": (-0.1, -0.1)}
    updated = add_night(old, nights)
    assert [own.nights for own in updated.levels.values()] == [[], [0.01], [-0.1]]
    assert [own.loop_nights for own in updated.levels.values()] == [[], [0.002], [-0.1]]
    assert add_night(updated, nights) == updated
    for index in range(40):
        updated = add_night(updated, {"bf16": (index / 1e4, index / 1e5), "fp32": (0.002, None)})
    assert updated.levels["bf16"].nights == [index / 1e4 for index in range(10, 40)]
    assert updated.levels["bf16"].loop_nights == [index / 1e5 for index in range(10, 40)]
    assert (updated.levels["fp32"].nights, updated.levels["fp32"].loop_nights) == ([0.002], [])


def with_loops(base: Baseline, scale: float = 1.0) -> Baseline:
    """The same, with loops of bf16 that take so many times 0.2 s."""
    own = base.levels["bf16"]
    processes = [process.model_copy(update={"loop_s": [0.2 * scale]}) for process in own.processes]
    return base.model_copy(update={"levels": base.levels | {"bf16": own.model_copy(update={"processes": processes})}})


def test_a_slower_loop_is_not_taken_without_a_reason() -> None:
    """Though the call around it was faster by chance, and is stored with it."""
    old = with_loops(sample_baseline())
    new = with_loops(sample_baseline(sample_run({"bf16": 0.99})), 1.008)
    loops = {"bf16": math.log1p(0.005)}
    with pytest.raises(BaselineError, match=r"slower, or built otherwise, than the baseline: bf16 x1\.0080"):
        update_baseline(old, new, LIMITS, None, loop_limits=loops)
    updated, (line,) = update_baseline(old, new, LIMITS, "it is meant", loop_limits=loops)
    assert updated.levels["bf16"].processes == new.levels["bf16"].processes and "its loop x1.0080" in line
    assert [step.ratio for step in updated.steps] == [pytest.approx(1.008)]
    assert update_baseline(old, new, LIMITS, None)[0] == old, "a third of the call's limit is not reached"


def test_a_faster_loop_is_taken() -> None:
    """As an improvement of the loop alone advises; the call has not moved."""
    old, new = with_loops(sample_baseline()), with_loops(sample_baseline(), 0.975)
    updated, (line,) = update_baseline(old, new, LIMITS, None, loop_limits={"bf16": math.log1p(0.005)})
    assert updated.levels["bf16"].processes == new.levels["bf16"].processes and "its loop x0.9750" in line
    assert [step.ratio for step in updated.steps] == [pytest.approx(0.975)]


def test_noise_of_a_call_is_no_movement_beside_its_loop() -> None:
    """A call moves from the end of its own interval on; alone, from a third of its limit."""
    parts = {"call_limit": 0.005, "call_ratio": 1.01, "call_high": 1.04, "loop_limit": 0.006}
    verdicts = {"bf16": parts | {"limit": 0.006}, "fp32": {"limit": 0.005, "ratio": 1.01, "high": 1.04}, "compile": {}}

    def latency(level: str) -> Verdict:
        return Verdict(outcome=Outcome.PASS, level=level, rule="interval", message="", numbers=verdicts[level])

    session: Any = types.SimpleNamespace(latency=latency)
    limits, loops = record._limits(session, sample_baseline()), record._loop_limits(session, sample_baseline())
    assert limits["bf16"] == pytest.approx(3 * math.log(1.04 / 1.01)) and limits["compile"] == math.inf
    assert limits["fp32"] == pytest.approx(math.log1p(0.005)) and loops == {"bf16": pytest.approx(math.log1p(0.006))}


def test_a_witness_whose_loop_moved_says_so() -> None:
    """The call hides it, and what is added would be another machine's."""
    numbers = {f"{part}_{name}": value for part in ("call", "loop") for name, value in QUIET.items()}
    quiet = Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="", numbers=numbers)
    assert _moved(quiet) is None
    moved = quiet.model_copy(update={"numbers": numbers | {"loop_ratio": 0.975, "loop_low": 0.97, "loop_high": 0.98}})
    assert "x0.9750" in str(_moved(moved))


def test_only_what_moved_is_rewritten() -> None:
    """A faster level needs no reason and is annotated; its fidelity stays; the others are untouched."""
    old = sample_baseline()
    new = sample_baseline(sample_run({"bf16": 1.01, "compile": 0.9}), fidelity={"compile": {"ssim": [0.5] * 5}})
    updated, lines = update_baseline(old, new, LIMITS, None, today=DAY)
    assert updated.levels["bf16"] == old.levels["bf16"]
    assert updated.levels["compile"].processes == new.levels["compile"].processes
    assert updated.levels["compile"].fidelity == old.levels["compile"].fidelity
    assert lines == ["compile: 0.100901 s -> 0.0908113 s, x0.9000 (a third of its limit is 2.00%)"]
    (step,) = updated.steps
    assert step == AnnotatedStep(level="compile", date="2026-11-24", ratio=step.ratio, reason="faster; no reason given")
    assert math.isclose(step.ratio, 0.9)


def test_loosening_needs_a_reason() -> None:
    """Slower is refused with its size; with a reason it is taken, whole, and the list of steps grows."""
    old = sample_baseline().model_copy(
        update={"steps": [AnnotatedStep(level="fp32", date="2026-01-01", ratio=0.5, reason="before")]}
    )
    new = sample_baseline(sample_run({"compile": 1.1}), fidelity={"compile": {"ssim": [0.9] * 5}})
    for nothing in (None, "", "  "):
        with pytest.raises(BaselineError, match=r"slower, .* compile x1\.1000; .*--reason"):
            update_baseline(old, new, LIMITS, nothing)
    updated, _ = update_baseline(old, new, LIMITS, "new driver", today=DAY)
    assert updated.levels["compile"].fidelity == {"ssim": [0.9] * 5}
    assert [step.reason for step in updated.steps] == ["before", "new driver"]


def test_a_level_that_is_built_otherwise_needs_a_reason() -> None:
    """Other effective fields or proofs are another level under the old name, even if it is as fast."""
    run = sample_run()
    for place, result in enumerate(run["compile"]):
        run["compile"][place] = result.model_copy(update={"fields": {**result.fields, "attention": "fa3_fp8"}})
    with pytest.raises(BaselineError, match="built otherwise"):
        update_baseline(sample_baseline(), sample_baseline(run), LIMITS, None)
    _, lines = update_baseline(sample_baseline(), sample_baseline(run), LIMITS, "FA3 arrived")
    assert lines[0].endswith("attention sdpa -> fa3_fp8")


def test_what_came_after_the_baseline_is_not_built_otherwise() -> None:
    """A field that is off and a fact that holds need no reason; a fact that is gone does."""
    run, old = sample_run(), sample_baseline()
    more = Proof(field="attention", what="tails", observed=0, expected=0)
    for place, result in enumerate(run["compile"]):
        assert result.measurement is not None
        proofs = [*result.measurement.proofs, more]
        measurement = result.measurement.model_copy(update={"proofs": proofs})
        run["compile"][place] = result.model_copy(update={"measurement": measurement})
    own = old.levels["compile"]
    fields = {name: value for name, value in own.fields.items() if name != "gemm_search"}
    level = own.model_copy(update={"fields": fields})
    older = old.model_copy(update={"levels": {**old.levels, "compile": level}})
    updated, lines = update_baseline(older, sample_baseline(run), LIMITS, None)
    assert updated == older and lines == []
    with pytest.raises(BaselineError, match=r"built otherwise, .* compile x1\.0000"):
        update_baseline(sample_baseline(run), older, LIMITS, None)


def test_on_a_cpu_ratios_count_and_runs_do_not_mix() -> None:
    """A machine twice as slow changes nothing; if one level moved against bf16, all are of the new run."""
    old = sample_baseline()
    slow = sample_baseline(sample_run(dict.fromkeys(LEVELS, 2.0)))
    assert update_baseline(old, slow, LIMITS, None, divisors=CPU) == (old, [])
    new = sample_baseline(sample_run({"fp32": 2.0, "bf16": 2.0, "compile": 1.8}))
    updated, lines = update_baseline(old, new, LIMITS, None, divisors=CPU)
    assert [line.split(":")[0] for line in lines] == ["compile"]
    assert all(updated.levels[level].processes == new.levels[level].processes for level in LEVELS)


def test_a_slower_bf16_needs_a_reason_on_a_cpu_too() -> None:
    """It divides the others and is itself judged over fp32, so it is no level that never moves."""
    new = sample_baseline(sample_run({"bf16": 1.045}))
    with pytest.raises(BaselineError, match=r"slower, .* bf16 x1\.0450; .*--reason"):
        update_baseline(sample_baseline(), new, LIMITS, None, divisors=CPU)


def test_what_the_confirmation_denied_is_not_stored() -> None:
    """Neither its time nor, where levels cannot be stored apart, that of another; no reason changes that."""
    old, new = sample_baseline(), sample_baseline(sample_run({"compile": 3.0}))
    for reason in (None, "why"):
        kept = update_baseline(old, new, LIMITS, reason, divisors=CPU, unsettled=["compile"])
        assert kept == (old, ["compile: kept as it was, since the confirmation did not agree"])
    new = sample_baseline(sample_run({"fp32": 0.9, "compile": 3.0}))
    updated, _ = update_baseline(old, new, LIMITS, None, unsettled=["compile"])
    assert [updated.levels[level] == old.levels[level] for level in LEVELS] == [False, True, True]
    for options in ({"divisors": CPU}, {"accepted": ["compile"]}):
        with pytest.raises(BaselineError, match=r"levels compile looked slower .* measure again"):
            update_baseline(old, new, LIMITS, "why", unsettled=["compile"], **options)


@pytest.mark.parametrize("divisors", [None, CPU])
def test_what_was_red_is_taken_with_its_reason_and_nothing_else(divisors: dict[str, str | None] | None) -> None:
    """An accepted image replaces that level's, whatever its time did; the others keep theirs, on a CPU too."""
    old = sample_baseline()
    new = sample_baseline(fidelity={level: {"ssim": [0.9] * 5} for level in LEVELS})
    with pytest.raises(BaselineError, match=r"slower, .* compile x1\.0000; .*--reason"):
        update_baseline(old, new, LIMITS, None, accepted={"compile"})
    updated, lines = update_baseline(old, new, LIMITS, "a new kernel", accepted={"compile"}, divisors=divisors)
    assert [updated.levels[level].fidelity["ssim"][0] for level in LEVELS] == [0.99, 0.99, 0.9]
    assert [(step.level, step.reason) for step in updated.steps] == [("compile", "a new kernel")]
    assert [line.split(":")[0] for line in lines] == ["compile"] and lines[0].endswith("ssim 0.99 -> 0.9")


def test_less_memory_is_taken_without_a_reason() -> None:
    """The peak of that level alone, beside a level that became faster or not."""
    run = sample_run({"compile": 0.9})
    for level, results in run.items():
        peak = {"peak_memory_bytes": 900}
        run[level] = [r.model_copy(update={"measurement": r.measurement.model_copy(update=peak)}) for r in results]
    old, new = sample_baseline(), sample_baseline(run)
    updated, lines = update_baseline(old, new, LIMITS, None, leaner=["bf16", "compile"])
    assert [updated.levels[level].peak_memory_bytes[0] for level in LEVELS] == [1000, 900, 900]
    assert updated.levels["bf16"].processes == old.levels["bf16"].processes
    assert lines[0] == "bf16: peak memory in bytes 1000 -> 900" and len(lines) == 2


@pytest.mark.parametrize("field", ["slug", "workload_digest", "method", "source", "fidelity_method"])
def test_baselines_that_do_not_compare_are_not_mixed(field: str) -> None:
    """Another machine, workload or method is a new baseline, not an update."""
    value: Any = {} if field == "fidelity_method" else "published" if field == "source" else "other"
    with pytest.raises(BaselineError, match=f"{field} is .* do not compare"):
        update_baseline(sample_baseline(), sample_baseline().model_copy(update={field: value}), LIMITS, "why")


def test_an_update_needs_every_level() -> None:
    """A level missing from baseline or limits is not passed over, nor one of the run where times do not mix."""
    whole = sample_baseline()
    part = whole.model_copy(update={"levels": {"bf16": whole.levels["bf16"]}})
    for old, new, limits, over in (
        (part, whole, LIMITS, None),
        (whole, whole, {"bf16": 0.1}, None),
        (whole, part, LIMITS, CPU),
    ):
        with pytest.raises(BaselineError, match="fp32"):
            update_baseline(old, new, limits, "why", divisors=over)


def test_what_cannot_be_measured_any_more_stays() -> None:
    """A package that is gone takes no level out of an updated baseline; the line says so."""
    old, new = sample_baseline(), sample_baseline(sample_run({"bf16": 0.9}))
    new = new.model_copy(update={"levels": {level: own for level, own in new.levels.items() if level != "compile"}})
    updated, lines = update_baseline(old, new, LIMITS, None)
    assert list(updated.levels) == list(LEVELS)
    assert updated.levels["compile"] == old.levels["compile"] and updated.levels["bf16"] != old.levels["bf16"]
    assert lines[0] == "compile: kept as it was, since it was not measured"


def test_an_updated_baseline_is_written_and_read(tmp_path: Path) -> None:
    """Update, write under the next number, read back."""
    path = write_sample(tmp_path / "cpu")
    new = sample_baseline(sample_run({"compile": 0.5}))
    updated, _ = update_baseline(read_baseline(path), new, LIMITS, None)
    assert read_baseline(write_sample(tmp_path / "cpu", "tiny", updated)) == updated


def run_tool(arguments: list[str], folder: Path) -> str:
    """Output of a Python module's command line; it must succeed."""
    # Under xdist pytest-benchmark would take this pytest for another of its workers and turn itself off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_pytest_benchmark_compare_reads_our_files(tmp_path: Path) -> None:
    """The stock command tabulates two baselines by level, and draws them if pygal is there."""
    folder = tmp_path / "cpu"
    write_sample(folder)
    write_sample(folder, "tiny", sample_baseline(sample_run({"compile": 0.5})))
    arguments = ["pytest_benchmark", "--storage", str(folder), "compare", "--columns=min,median", "--sort=fullname"]
    drawing = ["--histogram=plot"] if importlib.util.find_spec("pygal") else []
    shown = run_tool([*arguments, "--csv=out.csv", *drawing], tmp_path)
    rows = (tmp_path / "out.csv").read_text()
    assert all(f"{PREFIX}[{level}]" in rows for level in LEVELS)
    assert "0.05" in rows
    assert "test_latency[compile] (0002_tiny" in shown
    assert bool(list(tmp_path.glob("plot*.svg"))) == bool(drawing)


def test_a_stock_run_compares_with_our_file(tmp_path: Path) -> None:
    """`--benchmark-compare` takes the newest file, pairs by level, and its own gate sees a slower one."""
    write_sample(tmp_path / "cpu")
    (tmp_path / "perf_tests").mkdir()
    (tmp_path / "perf_tests" / "test_latency.py").write_text(
        "import time, pytest\n"
        f"@pytest.mark.parametrize('level', {LEVELS})\n"
        "def test_latency(benchmark, level):\n"
        "    benchmark.pedantic(time.sleep, args=({'fp32': 0.01, 'bf16': 0.01, 'compile': 0.3}[level],), rounds=1)\n"
    )
    arguments = ["pytest", "-p", "no:cacheprovider", "--rootdir=.", "perf_tests", "--benchmark-storage=./cpu"]
    shown = run_tool([*arguments, "--benchmark-compare"], tmp_path)
    assert "Comparing against benchmarks from: 0001_tiny.json" in shown
    assert all(f"test_latency[{level}] (0001_tiny" in shown for level in LEVELS)
    failing = [*arguments, "--benchmark-compare=0001", "--benchmark-compare-fail=median:10%"]
    with pytest.raises(AssertionError, match=r"test_latency\[compile\] \(0001_tiny\) - Field 'median' has failed"):
        run_tool(failing, tmp_path)


def test_the_stock_part_is_what_pytest_benchmark_saves() -> None:
    """Same keys, and statistics of all samples by pytest-benchmark's own class."""
    stock = stock_json(sample_baseline())
    assert set(stock) == {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    entry = stock["benchmarks"][1]
    assert (entry["name"], entry["fullname"], entry["param"]) == ("test_latency[bf16]", f"{PREFIX}[bf16]", "bf16")
    assert {"group", "params", "extra_info", "options", "stats"} < set(entry)
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 15
    assert json.loads(json.dumps(stock)) == stock


def test_machine_info_names_the_machine_and_not_the_moment() -> None:
    """Two runs on one machine have equal machine_info, so that pytest-benchmark has nothing to warn of."""
    assert machine_info("cpu", ENVIRONMENT) == machine_info("cpu", copy.deepcopy(ENVIRONMENT))
    assert machine_info("h200-700w", None) == {"node": "h200-700w", "machine": "h200-700w", "cpu": {"brand_raw": None}}


def test_a_published_baseline_needs_no_environment(tmp_path: Path) -> None:
    """Numbers from elsewhere come with a note instead."""
    update = {"source": "published", "source_note": "a paper", "environment": None}
    published = Baseline.model_validate(sample_baseline().model_copy(update=update).model_dump())
    assert read_baseline(write_sample(tmp_path / "cpu", "tiny.published", published)) == published

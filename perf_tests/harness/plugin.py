"""The suite as a pytest plugin: options, what it refuses, the `suite` fixture, the end of a run. No torch."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fluxfast.levels import LADDER, get_level
from fluxfast.workloads import get_workload
from perf_tests.harness import faults, gpu, lease, record, runner, store
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES, ProgressPrinter
from perf_tests.harness.quarantine import load_quarantine
from perf_tests.harness.recording import machine_info
from perf_tests.harness.schema import Outcome, Result, Verdict
from perf_tests.harness.session import RUN_FILE, Session

LEVELS = [level.id for level in LADDER]
SUITE_FILES = ("test_latency.py", "test_fidelity.py", "test_structure.py", "test_memory.py")
ROOT = Path(__file__).resolve().parents[2]
QUARANTINE = ROOT / "perf_tests" / "quarantine.toml"
INCONCLUSIVE = 9
"""Exit status of a run without a red test in which a level could not be judged: throttled or shared, twice."""

SUITE = pytest.StashKey["Suite"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("fluxfast", "FLUX performance suite")
    group.addoption("--workload", help="default: schnell on a Hopper GPU, tiny elsewhere")
    group.addoption("--levels", help="comma-separated; default: every level that this machine can run")
    group.addoption("--processes", type=int, help="fresh processes a level; default: 3 on a GPU, 1 on a CPU, 5 to record")
    group.addoption("--results", type=Path, default=ROOT / "results", help="folder of runs")
    group.addoption("--cache", type=Path, default=ROOT / ".cache", help="compiled code, kept between runs")
    group.addoption("--baselines", type=Path, default=ROOT / "baselines", help="folder of baselines")
    group.addoption("--replay", type=Path, help="judge a stored run again, without a machine")
    group.addoption("--record-baseline", action="store_true", help="store this run as a new baseline if nothing is red")
    group.addoption("--update-baseline", action="store_true", help="rewrite what moved beyond a third of its limit")
    group.addoption("--reason", help="why --update-baseline may accept something slower")
    group.addoption("--inject", action="append", default=[], metavar="LEVEL:FAULT", help="break a level on purpose")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Point pytest-benchmark at this machine's baselines before it looks for them."""
    config.addinivalue_line("markers", "fluxfast: part of the performance suite")
    if not _asks_for_suite(config):
        return
    _refuse_what_disables_timing(config)
    try:
        config.stash[SUITE] = Suite(config)
    except (ValueError, store.StoreError, gpu.GpuError) as error:
        raise pytest.UsageError(str(error)) from None


def _asks_for_suite(config: pytest.Config) -> bool:
    folder = ROOT / "perf_tests"
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    return any(path == folder or folder in path.parents for path in paths)


def _refuse_what_disables_timing(config: pytest.Config) -> None:
    option = config.option
    if getattr(option, "numprocesses", None) or getattr(option, "dist", "no") != "no":
        raise pytest.UsageError(
            "perf_tests cannot run under xdist (-n): levels would share the machine while they are timed, and "
            "pytest-benchmark turns itself off; run without -n"
        )
    for name in ("benchmark_disable", "benchmark_skip"):
        if getattr(option, name, False):
            raise pytest.UsageError(
                f"--{name.replace('_', '-')} with perf_tests would measure nothing and be green; leave it away"
            )


class Suite:
    """What the test bodies use.

    Raises:
        ValueError, StoreError, GpuError: one sentence, before anything is measured.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.config = config
        # pytest has this option already, for its own strict mode; given by hand it means ours too.
        self.is_strict = "--strict" in config.invocation_params.args
        self.voids: list[Verdict] = []
        self.verdicts: dict[str, Verdict] = {}
        self.quarantine = load_quarantine(QUARANTINE, datetime.datetime.now(datetime.UTC).date())
        run = _read_run_file(option.replay) if option.replay else None
        machine = None if run else ask_machine()
        is_gpu = run["slug"] != gpu.CPU_SLUG if run else machine["device"] == "cuda"
        is_hopper = bool(machine) and machine["capability"] == [9, 0]
        workload = get_workload(option.workload or (run["workload"] if run else "schnell" if is_hopper else "tiny"))
        unavailable = run["unavailable"] if run else {k: v for k, v in machine["levels"].items() if v and k in LEVELS}
        available = [level for level in (run["levels"] if run else LEVELS) if level not in unavailable]
        self.expected = _chosen_levels(option.levels, available, unavailable)
        self.injections = _injections(option.inject, self.expected)
        visible = gpu.first_visible(os.environ.get("CUDA_VISIBLE_DEVICES")) if is_gpu else 0
        slug = run["slug"] if run else gpu.slug(visible)
        is_recording = option.record_baseline or option.update_baseline
        processes = option.processes or (5 if is_recording else 3 if is_gpu else 1)
        if processes < 1:
            raise ValueError(f"--processes is {processes}, expected at least 1")
        folder = option.baselines / slug
        is_compared = bool(option.benchmark_compare)
        path = store.find_baseline(folder, workload.id) if folder.is_dir() else None
        self._point_benchmark_at(path, folder)
        self.session = Session(
            folder=option.replay or option.results,
            workload=workload,
            levels=self.expected,
            unavailable=unavailable,
            processes=processes,
            slug=slug,
            baseline=store.read_baseline(path) if path and (is_compared or option.update_baseline) else None,
            baseline_folder=folder,
            is_compared=is_compared,
            measure=None if option.replay else self._measure,
        )
        self._deadlines = GPU_DEADLINES if is_gpu else CPU_DEADLINES
        self._gpu = str(visible) if is_gpu else None

    def start(self) -> None:
        """Make the run's folder; nothing is written before the first test needs it."""
        if self.session.measure is not None:
            self.session.folder = runner.new_run_folder(self.session.folder, _git_sha())

    def show(self, level: str, benchmark: Any) -> None:
        """Give a level's samples to the stock `benchmark` fixture: table, JSON, histogram, compare."""
        self.require_available(level)
        results = self.session.results[level]
        measured = [result.measurement for result in results if result.measurement]
        benchmark._mode = "external"
        stats = benchmark._make_stats(iterations=1)
        for measurement in measured:
            for sample in measurement.samples_s:
                stats.update(sample)
        if not measured:
            benchmark.stats = None
            return
        benchmark.extra_info.update(
            fields=results[0].fields,
            unavailable=results[0].unavailable,
            process_medians_s=[sorted(m.samples_s)[len(m.samples_s) // 2] for m in measured],
            peak_memory_bytes=[m.peak_memory_bytes for m in measured],
            warmup_s=[m.warmup_s for m in measured],
        )

    def require_available(self, level: str) -> None:
        """Skip, with the reason, what this machine cannot run or the user left out."""
        if level in self.session.unavailable:
            pytest.skip(self.session.unavailable[level])
        if level not in self.expected:
            pytest.skip(f"level {level!r} is not among --levels")

    def require_image_workload(self) -> None:
        """Skip image metrics where the weights are random: they would judge noise."""
        if self.session.workload.checkpoint.startswith("synthetic"):
            pytest.skip("the synthetic checkpoint draws noise; images are judged with --workload tiny")

    def require(self, verdict: Verdict) -> None:
        """Turn a verdict into the outcome of the running test."""
        request = self.request
        self.verdicts[request.node.nodeid] = verdict
        request.node.user_properties += [("verdict", verdict.outcome.value), ("rule", verdict.rule)]
        request.node.user_properties += [(name, value) for name, value in verdict.numbers.items()]
        if verdict.rule == "step_not_applied" and request.node.name.partition("[")[0] != "test_structure":
            pytest.skip(f"not judged: a step had no effect, and test_structure is red for it. {verdict.message[:300]}")
        if verdict.outcome is Outcome.VOID:
            self.voids.append(verdict)
            pytest.skip(verdict.explain())
        is_stale = verdict.outcome is Outcome.IMPROVED
        if is_stale and not self.is_strict:
            warnings.warn(f"baseline is stale: {verdict.explain()}", stacklevel=2)
        if verdict.ok and not (is_stale and self.is_strict):
            return
        if row := self.quarantine.get(request.node.nodeid):
            pytest.xfail(row.excuse(verdict))
        pytest.fail(verdict.explain(), pytrace=False)

    def _measure(self, levels: Sequence[str], processes: int, folder: Path) -> dict[str, list[Result]]:
        """Run workers, with progress on the terminal; Ctrl-C keeps what was measured."""
        folder.mkdir(parents=True, exist_ok=True)
        capture = self.config.pluginmanager.getplugin("capturemanager")
        results: dict[str, list[Result]] = {level: [] for level in levels}
        with capture.global_and_fixture_disabled(), lease.gpu_lease(self._gpu):
            print(f"\nmeasuring {', '.join(levels)} in {processes} process(es) each, into {folder}", file=sys.stderr)
            printer = ProgressPrinter(self._deadlines, len(levels) * processes)
            try:
                for level, process in runner.schedule(levels, processes):
                    result = runner.run_level(
                        level,
                        self.session.workload.id,
                        process,
                        folder,
                        deadlines=self._deadlines,
                        cache=self.config.option.cache,
                        inject=self.injections.get(level),
                        on_progress=printer,
                    )
                    results[level].append(result)
            finally:
                printer.close()
        return results

    def _point_benchmark_at(self, path: Path | None, folder: Path) -> None:
        option = self.config.option
        # pytest-benchmark makes the folder it is given, even to compare: give it ours only if it is there.
        if folder.is_dir() and option.benchmark_storage == "file://./.benchmarks":
            option.benchmark_storage = str(folder)
        if path is not None and option.benchmark_compare is True:
            option.benchmark_compare = path.name[:4]

    request: Any = None


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """A stable description: pytest-benchmark fails on machine descriptions that differ in a clock rate."""
    return machine_info(gpu.slug(), None)


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    """The run, measured when the first test asks."""
    own = request.config.stash[SUITE]
    if "level" in request.fixturenames:
        own.require_available(request.getfixturevalue("level"))
    own.request = request
    if not own.session.measured() and own.session.measure and own.session.folder == request.config.option.results:
        own.start()
    yield own


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Refuse to be green on nothing, then store the run if that was asked for."""
    own = session.config.stash.get(SUITE, None)
    if own is None or session.config.option.collectonly or exitstatus not in (0, 1):
        return
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    missing = sorted(set(own.expected) - own.session.measured())
    judged = {node.partition("[")[2].rstrip("]") for node in own.verdicts}
    unjudged = sorted(set(own.expected) - judged)
    if exitstatus == 0 and (missing or unjudged):
        reporter.write_line(
            f"\nnot green: levels {', '.join(missing or unjudged)} were expected on this machine and not "
            f"{'measured' if missing else 'judged'}; narrow with --levels, not with -k or node ids", red=True
        )  # fmt: skip
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif exitstatus == 0 and own.voids:
        reporter.write_line("\ninconclusive: the machine was disturbed twice; see the skipped tests", yellow=True)
        session.exitstatus = INCONCLUSIVE
    option = session.config.option
    if option.record_baseline or option.update_baseline:
        if session.exitstatus != 0:
            reporter.write_line("\nno baseline was written: the run is not green", red=True)
            return
        try:
            for line in record.store_run(own.session, update=option.update_baseline, reason=option.reason):
                reporter.write_line(line)
        except store.StoreError as error:
            reporter.write_line(f"\nno baseline was written: {error}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Where the run lies, and every verdict in a line."""
    own = config.stash.get(SUITE, None)
    if own is None or not own.verdicts:
        return
    terminalreporter.section("fluxfast verdicts")
    for node, verdict in own.verdicts.items():
        terminalreporter.write_line(f"{verdict.outcome.value:12} {node.rpartition('::')[2]:32} {verdict.message[:200]}")
    terminalreporter.write_line(f"run: {own.session.folder} (judge it again with --replay)")


def ask_machine() -> dict[str, Any]:
    """What this machine can run, from a process that may import torch.

    Raises:
        ValueError: with what that process said, if it could not tell.
    """
    command = [sys.executable, "-m", "fluxfast", "levels", "--json"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"`{' '.join(command)}` failed with exit status {asked.returncode}: {last}")
    answer: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    return answer


def _chosen_levels(asked: str | None, available: Sequence[str], unavailable: dict[str, str]) -> list[str]:
    if asked is None:
        return list(available)
    names = [get_level(name.strip()).id for name in asked.split(",")]
    for name in names:
        if name in unavailable:
            raise ValueError(f"--levels {name}: {unavailable[name]}")
        if name not in available:
            raise ValueError(f"--levels {name}: not on this run's ladder; choose from {', '.join(available)}")
    return [level for level in available if level in names]


def _injections(specs: Sequence[str], levels: Sequence[str]) -> dict[str, str]:
    injections = {}
    for spec in specs:
        level, _, fault = spec.partition(":")
        if level not in levels:
            raise ValueError(f"--inject {spec!r}: expected LEVEL:FAULT with one of {', '.join(levels)}")
        injections[level] = faults.parse(fault).spec
    return injections


def _read_run_file(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--replay {folder}: no readable {RUN_FILE} there ({error}); name a run's folder") from None
    keys = {"slug", "workload", "workload_digest", "levels", "unavailable", "processes"}
    if facts.keys() != keys:
        raise ValueError(f"--replay {folder}: {RUN_FILE} has keys {sorted(facts)}, expected {sorted(keys)}")
    return facts


def _git_sha() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "nogit"

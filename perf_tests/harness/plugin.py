"""The suite as a pytest plugin: options, what it refuses, the `suite` fixture, the end of a run. No torch."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fluxfast.workloads import WORKLOADS
from perf_tests.bisect import printed
from perf_tests.harness import culprit, gpu, record, store, usage
from perf_tests.harness.files import StoreError
from perf_tests.harness.lease import GpuBusy
from perf_tests.harness.machine import RECORDED, WHOLE_LADDER
from perf_tests.harness.obstacles import measured
from perf_tests.harness.recording import machine_info
from perf_tests.harness.schema import Environment, Outcome, Verdict
from perf_tests.harness.session import REFERENCE_LEVEL, Session
from perf_tests.harness.suite import ROOT, Suite
from perf_tests.history import night
from perf_tests.history import store as history

INCONCLUSIVE = 9
"""Exit status of a run without a red test in which a level could not be judged: throttled or shared, twice."""
ACCEPTABLE = frozenset(
    {"interval", "ladder", "unconfirmed", "limit", "baseline", "weights", "peak", "facts", "changed"}
)
"""Rules that compare with the baseline, so that `--update-baseline --reason` may accept what they say."""

SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("fluxfast", "FLUX performance suite")
    group.addoption(
        "--workload",
        help=f"one of {', '.join(WORKLOADS)} (-hub: released weights, -full: the transformer compiled as one graph), "
        "or WORKLOAD@CHECKPOINT; default: on a Hopper GPU schnell-hub if its weights are in the local cache, else "
        "schnell; tiny elsewhere",
    )
    group.addoption(
        "--levels",
        help=f"comma-separated; '{WHOLE_LADDER}', the default, is every level of the ladder that this machine can run; "
        "levels beside the ladder, as flux_fast, are measured by name, or to record or update what the baseline holds; "
        f"'{RECORDED}' is all that the baseline holds",
    )
    group.addoption(
        "--processes", type=int, help="fresh processes a level; default: 3 on a GPU, 1 on a CPU, 5 to record"
    )
    group.addoption(
        "--gpus",
        type=int,
        default=1,
        help="run workers on so many GPUs of one kind side by side, the first of CUDA_VISIBLE_DEVICES; default: 1",
    )
    group.addoption("--results", type=Path, default=ROOT / "results", help="folder of runs")
    group.addoption("--cache", type=Path, default=ROOT / ".cache", help="compiled code, kept between runs")
    group.addoption(
        "--fresh-compiles",
        action="store_true",
        help="every process compiles anew and leaves nothing in --cache, so that limits hold what compiling varies",
    )
    group.addoption("--baselines", type=Path, default=ROOT / "baselines", help="folder of baselines")
    group.addoption("--quarantine", type=Path, default=usage.FOLDER / "quarantine.toml", help="excused tests")
    group.addoption("--history", type=Path, help="SQLite file that runs append to; default: history.db below --results")
    group.addoption("--replay", type=Path, help="judge a stored run again, without a machine")
    group.addoption("--record-baseline", action="store_true", help="store this run as a new baseline if nothing is red")
    group.addoption(
        "--partial-baseline", action="store_true", help="record only --levels, into a --baselines folder of your own"
    )
    group.addoption(
        "--update-baseline",
        action="store_true",
        help="rewrite what moved beyond a third of its limit; with --levels that the baseline lacks, add these",
    )
    group.addoption(
        "--add-night",
        action="store_true",
        help="if nothing is red, keep how far each level is from the baseline as a night in which nothing changed; "
        "with --replay, of a stored run",
    )
    group.addoption("--reason", help="why --update-baseline may accept something slower")
    group.addoption("--require-machine", metavar="SLUG", help="refuse any other than this one, as h200-700w")
    group.addoption("--inject", action="append", default=[], metavar="LEVEL:FAULT", help="break a level on purpose")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the options, and point pytest-benchmark at this machine's baselines before it looks for them."""
    usage.refuse_swallowed_path(config)
    if not usage.asked_for(config, config.args):
        return
    usage.refuse_what_disables_timing(config)
    usage.refuse_contradictions(config.option)
    try:
        config.stash[SUITE] = own = Suite(config)
    except (OSError, ValueError, StoreError, gpu.GpuError) as error:
        raise pytest.UsageError(str(error)) from None
    usage.refuse_other_machine(config.option.require_machine, own.session.slug)


class Judge:
    """What a test body uses: the run, and how a verdict becomes the outcome of this test."""

    def __init__(self, own: Suite, node: pytest.Item) -> None:
        self._own = own
        self._node = node

    @property
    def session(self) -> Session:
        """The run, measured when the first test asks for a verdict."""
        return self._own.session

    def show(self, level: str, benchmark: Any) -> None:
        """Give a level's samples to the stock `benchmark` fixture: table, JSON, histogram, compare."""
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
            process_medians_s=[statistics.median(m.samples_s) for m in measured],
            peak_memory_bytes=[m.peak_memory_bytes for m in measured],
            warmup_s=[m.warmup_s for m in measured],
        )

    def require_image_workload(self) -> None:
        """Skip image metrics where the weights are random: they would judge noise."""
        if self.session.workload.has_random_weights:
            pytest.skip("random weights draw noise; images are judged with --workload tiny or released weights (-hub)")

    def require(self, verdict: Verdict) -> None:
        """Turn a verdict into the outcome of this test."""
        own, node, option = self._own, self._node, self._own.config.option
        own.verdicts[node.nodeid] = verdict
        node.user_properties += [("verdict", verdict.outcome.value), ("rule", verdict.rule), *verdict.numbers.items()]
        if verdict.rule == "step_not_applied" and node.name.partition("[")[0] != "test_structure":
            pytest.skip(f"not judged: a step had no effect, and test_structure is red for it. {verdict.message[:300]}")
        if verdict.outcome is Outcome.VOID:
            pytest.skip(verdict.explain())
        if verdict.outcome is Outcome.IMPROVED and not option.update_baseline:
            if own.is_strict:
                pytest.fail(verdict.explain(), pytrace=False)
            warnings.warn(f"baseline is stale: {verdict.explain()}", stacklevel=2)
        if verdict.ok:
            return
        if option.update_baseline and option.reason and verdict.rule in ACCEPTABLE:
            own.accepted.append(verdict)
            pytest.xfail(f"to be accepted ({option.reason}): {verdict.explain()}")
        if option.record_baseline and verdict.outcome is Outcome.INCOMPARABLE and verdict.rule != "unavailable":
            own.accepted.append(verdict)
            pytest.xfail(f"not compared, since a new baseline is recorded: {verdict.explain()}")
        if row := own.quarantine.get(node.nodeid):
            pytest.xfail(row.excuse(verdict))
        commands = self._bisects(verdict)
        node.user_properties += [(printed.PROPERTY, command) for command in commands]
        told = ["Packages moved since the baseline; to find the version:", *commands] if commands else []
        if rest := culprit.unsearched(verdict, self._was, self.session.environment):
            told.append(rest)
        pytest.fail("\n".join([verdict.explain(), *told]), pytrace=False)

    @property
    def _was(self) -> Environment | None:
        """The environment of the baseline."""
        return self.session.baseline.environment if self.session.baseline else None

    def _bisects(self, verdict: Verdict) -> list[str]:
        session = self.session
        was = culprit.versions_of(self._was)
        now = culprit.versions_of(session.environment)
        if not now and session.measure is not None:  # no worker came far enough to tell; it is this Python
            now = culprit.installed_versions()
        return culprit.bisect_commands(self._node.name, session.workload.id, verdict, was, now)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a level of this run."""
    if (own := metafunc.config.stash.get(SUITE, None)) and {"level", "suite"} <= set(metafunc.fixturenames):
        metafunc.parametrize("level", own.shown)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Remember what was taken out, so that a run without it is not green."""
    for item in items:
        if own := item.config.stash.get(SUITE, None):
            own.deselected.add(item.name)


@pytest.fixture(scope="session")
def named_machine(request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]) -> None:
    """What the JUnit XML is of: a verdict says nothing about another machine or workload."""
    own = request.config.stash[SUITE].session
    record_testsuite_property("slug", own.slug)
    record_testsuite_property("workload", own.workload.id)


@pytest.fixture
def suite(request: pytest.FixtureRequest, named_machine: None) -> Judge:
    """The run; skips, with the reason, what this machine cannot run or the user left out."""
    own = request.config.stash[SUITE]
    if "level" in request.fixturenames:
        level = request.getfixturevalue("level")
        if level not in own.expected and not own.lost(level):
            pytest.skip(own.session.unavailable.get(level, f"level {level!r} is not among --levels"))
    return Judge(own, request.node)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A damaged file is a sentence, not a traceback; what ends the measuring is one, and ends the run."""
    own = pyfuncitem.config.stash.get(SUITE, None)
    try:
        if own and (lost := own.lost(str(pyfuncitem.funcargs.get("level")))):
            Judge(own, pyfuncitem).require(lost)
        return (yield)
    except StoreError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    except Exception as error:
        if own is None or error is not own.session.error:
            raise
        pyfuncitem.session.shouldstop = "measuring ended, and nothing can be judged without it"
        if not isinstance(error, (OSError, GpuBusy, gpu.GpuError)):
            raise
        where = "; --results, --cache and the temporary folder have to be folders that can be written, with space left"
        said = f"measuring ended with: {error}{where if isinstance(error, OSError) else ''}"
        raise pytest.fail.Exception(said, pytrace=False) from None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Refuse to be green on nothing, then store the run if that was asked for."""
    own = session.config.stash.get(SUITE, None)
    if own is None or session.config.option.collectonly:
        return
    if exitstatus == pytest.ExitCode.INTERRUPTED and own.session.error and own.verdicts:
        _remember(own, exitstatus, session.config.pluginmanager.getplugin("terminalreporter"))
    if exitstatus not in (0, 1):
        return
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if exitstatus == 0 and (reason := own.not_green()):
        reporter.write_line(f"\n{reason}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif exitstatus == 0 and own.voids:
        reporter.write_line("\ninconclusive: what was disturbed stayed so; see the skipped tests", yellow=True)
        session.exitstatus = INCONCLUSIVE
    if own.is_writing:
        _record(own, session, reporter)
    if own.verdicts and (session.config.option.history or not session.config.option.replay):
        _remember(own, int(session.exitstatus), reporter)


def _record(own: Suite, session: pytest.Session, reporter: Any) -> None:
    """Store the run as a baseline or as a night of one, or say why not."""
    try:
        if reason := "the run is not green" if session.exitstatus != 0 else own.not_recordable():
            raise store.BaselineError(reason)
        option = session.config.option
        accepted = {verdict.level for verdict in own.accepted}
        lines = (
            record.store_night(own.session)
            if option.add_night
            else record.store_run(
                own.session, update=option.update_baseline, reason=option.reason, accepted=accepted, added=own.added
            )
        )
        reporter.write_line("\n" + "\n".join(lines))
    except StoreError as error:
        reporter.write_line(f"\nno baseline was written: {error}", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def _remember(own: Suite, exit_status: int, reporter: Any) -> None:
    """Leave the verdicts beside the results and add the night to the history; no failure of either costs the run."""
    option, folder = own.config.option, own.session.folder
    if option.replay and (folder / night.VERDICTS_FILE).exists() and not own.is_whole:
        reporter.write_line("\nnot in the history: only a replay of all tests, compared, replaces what a night said")
        return
    try:
        night.write_record(folder, own.baseline_name, exit_status, own.judged())
        history.append(option.history or option.results / history.NAME, [night.read_night(folder)])
    except StoreError as error:
        reporter.write_line(f"\nnot in the history: {error}", yellow=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Where the run lies, and every verdict in a line."""
    own = config.stash.get(SUITE, None)
    if own is None or not own.verdicts:
        return
    terminalreporter.section("fluxfast verdicts")
    for node, verdict in own.verdicts.items():
        terminalreporter.write_line(f"{verdict.outcome.value:12} {node.rpartition('::')[2]:32} {verdict.message[:200]}")
    for line in speeds(own.session):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"run: {own.session.folder} (judge it again with --replay)")


def speeds(session: Session) -> list[str]:
    """One line a measured level: median of its processes' medians, and how much faster that is than bf16 and parent."""
    medians = {
        level: statistics.median(statistics.median(m.samples_s) for m in measured(results))
        for level, results in session.results.items()
        if measured(results)
    }
    lines = []
    for level, own_s in medians.items():
        over = dict.fromkeys((REFERENCE_LEVEL, session.policy.parents.get(level)))
        against = [f"x{medians[other] / own_s:.3f} of {other}" for other in over if other in medians and other != level]
        lines.append(f"{level:16}{own_s:8.4f} s  {', '.join(against)}")
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    """A baseline's own description: pytest-benchmark's holds a clock rate, which differs from run to run."""
    own = config.stash.get(SUITE, None)
    return None if own is None else machine_info(own.session.slug, own.session.environment)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> Generator[None, object, object]:
    """Keep pytest-benchmark's warning about another environment from ending the run, or from being there every time.

    It compares every key, before anything is measured: of a new run only the machine's name is known then, and a file
    lacks what came later. Verdicts name the packages that moved.
    """
    own, saved = config.stash.get(SUITE, None), compared_benchmark["machine_info"]
    if own is not None and own.session.baseline and saved["node"] == machine_info["node"]:
        now = own.session.environment
        if now is None or not now.changes(own.session.baseline.environment):
            machine_info.clear()
            machine_info.update(saved)
    try:
        return (yield)
    except ValueError:  # it names the storage relative to the working directory, and that may lie elsewhere
        benchmarksession.logger.warning("Benchmark machine_info is different from the baseline's.")
        return None

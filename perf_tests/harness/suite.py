"""What one `pytest perf_tests` works with: options read, the machine asked, workers run. No torch."""

from __future__ import annotations

import contextlib
import datetime
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fluxfast.levels import DEFAULTS, LADDER, LEVELS, get_level
from fluxfast.workloads import get_workload
from perf_tests.harness import faults, lease, runner, store
from perf_tests.harness.cpu import is_cpu
from perf_tests.harness.lanes import Gpu, Job, run_jobs
from perf_tests.harness.machine import (
    RECORDED,
    ask_environment,
    ask_machine,
    chosen_levels,
    first_gpus,
    git_sha,
    slug_of,
    words_of,
)
from perf_tests.harness.obstacles import obstacle
from perf_tests.harness.policy import policy_for
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES, OnProgress, ProgressPrinter, Turn
from perf_tests.harness.quarantine import load_quarantine
from perf_tests.harness.recordable import (
    levels_to_record,
    refuse_other_measurement,
    refuse_to_add_night,
    refuse_to_record,
    why_lost,
)
from perf_tests.harness.recording import MIN_PROCESSES
from perf_tests.harness.replay import tests_of
from perf_tests.harness.schema import Outcome, Result, Verdict
from perf_tests.harness.session import Session, with_references
from perf_tests.harness.stored_run import RERUN, RunFacts, read_facts, refuse_other_workload
from perf_tests.harness.usage import FOLDER, asked_for
from perf_tests.history.night import Judged

ROOT = Path(__file__).resolve().parents[2]
COMPILED_FIRST = "compiled_first"
"""Folder of a run whose workers filled the cache; nothing reads their times."""


class Suite:
    """One run and what was said about it.

    Attributes:
        added: levels that `--update-baseline` is about to add to a baseline that lacks all that are named.
        expected: levels that have to be measured and judged, or the run is not green.
        verdicts: of the tests so far, by node id.
        baseline_name: file that judges this run; None if none does.
        accepted: verdicts that `--update-baseline --reason` is about to accept.
        deselected: names of tests that `-k`, `--deselect` or the like took out.

    Raises:
        ValueError, StoreError, GpuError: one sentence, before anything is measured.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.config = config
        # pytest has this option already, for its own strict mode; given by hand or PYTEST_ADDOPTS it means ours too.
        self.is_strict = bool(option.strict)
        self.is_recording = option.record_baseline or option.update_baseline
        self.is_writing = self.is_recording or option.add_night
        self.verdicts: dict[str, Verdict] = {}
        self.accepted: list[Verdict] = []
        self.deselected: set[str] = set()
        self.quarantine = load_quarantine(option.quarantine, datetime.datetime.now(datetime.UTC).date())
        self._why_workload = ""
        facts = read_facts(option.replay) if option.replay else self._new_facts(option)
        if option.workload not in (None, facts.workload):
            raise ValueError(f"--workload {option.workload}: the stored run {option.replay} is of {facts.workload!r}")
        workload = get_workload(facts.workload)
        runnable = facts.levels if option.replay else [level for level in LEVELS if level not in facts.unavailable]
        folder = option.baselines / facts.slug
        path = store.find_baseline(folder, workload.id) if folder.is_dir() else None
        is_compared = bool(option.benchmark_compare)
        self._is_judging = is_compared or self.is_recording
        self._ran_on: dict[Job, Gpu] = {}
        baseline = store.read_baseline(path) if path and self._is_judging else None
        # What someone published is no baseline of ours to go on from.
        held = baseline.levels.keys() if baseline and baseline.source == "recorded" else set()
        if option.levels is None and self.is_recording:
            chosen = levels_to_record(facts.levels, runnable, held, is_update=option.update_baseline)
        else:
            compared_with = held if self._is_judging else None
            chosen = chosen_levels(option.levels, facts.levels, runnable, facts.unavailable, compared_with)
        self.added = chosen if option.update_baseline and held and held.isdisjoint(chosen) else []
        # The references of what is added tell whether the machine is as it was, so they are judged like any level.
        self.expected = with_references(chosen, facts.unavailable) if self.added else chosen
        if self.is_recording:
            refuse_to_record(option, facts, path, held, added=self.added, expected=self.expected)
        if option.update_baseline and baseline:
            now = ask_environment() if self.added and not option.replay else None
            refuse_other_measurement(path, baseline, facts, now)
        self.injections = _injections(option.inject, self.expected)
        # Files or node ids say which tests are wanted; a folder says all.
        self._is_whole = any(FOLDER not in path.parents for path in asked_for(config, config.args))
        if option.add_night:
            refuse_to_add_night(facts, baseline if held else None, None if option.replay else ask_environment())
        if self.is_writing and not (option.partial_baseline or self._is_whole):
            raise ValueError(
                "a baseline, and a night of one, is of a run in which every test judged: name no files or node ids to "
                "record"
            )
        self.baseline_name = path.name if path and self._is_judging else None
        _point_benchmark_at(option, path)
        is_gpu = not is_cpu(facts.slug)
        self._deadlines = GPU_DEADLINES if is_gpu else CPU_DEADLINES
        self._gpus = first_gpus(option.gpus) if is_gpu and not option.replay else []
        self.session = Session(
            folder=option.replay or option.results,
            workload=workload,
            levels=chosen,
            unavailable=facts.unavailable,
            processes=facts.processes,
            slug=facts.slug,
            baseline=baseline,
            baseline_folder=folder,
            # A machine's first baseline has nothing to be compared with, nor has a level that it is about to get.
            is_compared=is_compared and not (option.record_baseline or self.added),
            measure=None if option.replay else self._measure,
        )
        if option.replay:
            refuse_other_workload(option.replay, facts, workload, self.session.results)  # and a partial run
        else:
            self.session.make_folder = lambda: runner.new_run_folder(option.results, git_sha())

    @property
    def shown(self) -> list[str]:
        """Levels that have tests: the ladder, and what was asked for or stored beside it."""
        own = {level.id for level in LADDER} | {*self.expected}
        if self._asks_for_recorded and self.session.baseline:
            own |= self.session.baseline.levels.keys()
        return [level for level in LEVELS if level in own]

    @property
    def _asks_for_recorded(self) -> bool:
        return RECORDED in words_of(self.config.option.levels)

    @property
    def voids(self) -> list[Verdict]:
        """What could not be judged."""
        return [verdict for verdict in self.verdicts.values() if verdict.outcome is Outcome.VOID]

    def lost(self, level: str) -> Verdict | None:
        """The verdict on a level that the baseline holds and this machine cannot run, unless it was not asked for."""
        session, why = self.session, self.session.unavailable.get(level)
        if why is None or session.baseline is None or level not in session.baseline.levels:
            return None
        if self.config.option.levels and not self._asks_for_recorded:
            return None
        message = why_lost(level, session.slug, why)
        return Verdict(outcome=Outcome.INCOMPARABLE, level=level, rule="unavailable", message=message)

    def not_green(self) -> str | None:
        """Why a run without a red test is red all the same."""
        judged = {verdict.level for verdict in self.verdicts.values()}
        if unjudged := [level for level in self.expected if level not in judged]:
            return (
                f"not green: levels {', '.join(unjudged)} were expected on this machine and not judged; narrow with "
                "--levels, not with -k or node ids"
            )
        if missing := self.session.unmeasured():
            found = obstacle(missing[0], self.session.results[missing[0]], None, clocked=False)
            assert found is not None
            return f"not green: {', '.join(missing)} gave no measurement. {found.explain()}"
        if self._is_judging and (left := self._left_out()):
            tests = "; ".join(f"{test} of {', '.join(levels)}" for test, levels in left.items())
            return (
                f"not green: left out were {tests}. A run that is compared or recorded judges every test of every "
                "level: leave -k, -m, --deselect, --ignore and --lf away, or name the files of perf_tests to run"
            )
        return None

    @property
    def is_whole(self) -> bool:
        """Whether the run is compared and every test of every level said something."""
        return self._is_judging and self._is_whole and not self._left_out()

    def _left_out(self) -> dict[str, list[str]]:
        """Test -> expected levels that it gave no verdict on, though not only other files were asked for."""
        said = {node.rpartition("::")[2] for node in self.verdicts}
        left = {
            test: [
                level
                for level in self.expected
                if (name := f"{test}[{level}]") not in said and (self._is_whole or name in self.deselected)
            ]
            for test in tests_of(self.session.workload)
        }
        return {test: levels for test, levels in left.items() if levels}

    def not_recordable(self) -> str | None:
        """Why a green run may not become a baseline: quarantine excuses a test, not a number."""
        red = [node for node, verdict in self.verdicts.items() if not verdict.ok and verdict not in self.accepted]
        return f"{red[0]} is quarantined and {self.verdicts[red[0]].outcome.value}" if red else None

    def judged(self) -> list[Judged]:
        """What each test said, as the run's folder keeps it."""
        return [
            Judged(
                test=node.rpartition("::")[2].partition("[")[0],
                verdict=verdict,
                excuse=None if verdict.ok or node not in self.quarantine else self.quarantine[node].issue,
            )
            for node, verdict in self.verdicts.items()
        ]

    def _new_facts(self, option: Any) -> RunFacts:
        machine = ask_machine(option.workload)
        is_gpu = machine["device"] == "cuda"
        workload = get_workload(machine["workload"])
        self._why_workload = machine["why_workload"]
        unavailable = {level: why for level, why in machine["levels"].items() if why}
        if option.gpus > 1 and not is_gpu:
            raise ValueError(f"--gpus {option.gpus}: expected so many GPUs, and workers find none here; leave it away")
        slug = slug_of(machine, first_gpus(option.gpus) if is_gpu else ())
        processes = option.processes
        if processes is None:
            processes = MIN_PROCESSES if self.is_recording else policy_for(slug).usual_processes
        least = MIN_PROCESSES if self.is_recording else 1
        if processes < least:
            raise ValueError(f"--processes is {processes}, expected at least {least}")
        return RunFacts(
            slug=slug,
            workload=workload.id,
            workload_digest=workload.digest,
            levels=[level.id for level in LADDER if level.id not in unavailable],
            unavailable=unavailable,
            processes=processes,
        )

    @contextlib.contextmanager
    def _compiled_code(self) -> Iterator[Path]:
        """The folder of a process's compiled code; with `--fresh-compiles` one of its own in it, removed after it."""
        if not self.config.option.fresh_compiles:
            yield self.config.option.cache
            return
        self.config.option.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fresh-", dir=self.config.option.cache) as own:
            yield Path(own)

    def _measure(self, jobs: Sequence[Job], folder: Path) -> dict[Job, Result]:
        """Run workers, with progress on the terminal; Ctrl-C keeps what was measured."""

        capture = self.config.pluginmanager.getplugin("capturemanager")
        lanes: Sequence[Gpu] = self._gpus if len(self._gpus) > 1 else [None]
        with contextlib.ExitStack() as held:
            held.enter_context(capture.global_and_fixture_disabled())
            for own in self._gpus:
                held.enter_context(lease.gpu_lease(str(own)))
            where = f" on GPUs {', '.join(map(str, lanes))}" if len(lanes) > 1 else ""
            print(
                f"\nworkload {self.session.workload.id} ({self._why_workload})\n"
                f"measuring {_told(jobs, folder)}{where}, into {folder}",
                file=sys.stderr,
            )
            if compiling := self._compiling_first(jobs, folder):
                print(f"compiling {_told(compiling, folder)} first, while no one measures", file=sys.stderr)
                self._run(compiling, folder / COMPILED_FIRST, lanes)  # the same again, and judged, where one fails
            return self._run(jobs, folder, lanes)

    def _compiling_first(self, jobs: Sequence[Job], folder: Path) -> list[Job]:
        """Workers that fill the cache for a baseline measured on several GPUs, one for each level that compiles.

        Compilers in twelve threads slow down what is measured beside them, by 3 to 9 % where it was seen.
        """
        if not self.is_recording or len(self._gpus) < 2 or self.config.option.fresh_compiles:
            return []
        if folder != self.session.folder:  # measured once more, or confirmed
            return []
        levels = dict.fromkeys(level for level, _ in jobs if get_level(level).compile_mode != "none")
        return [(level, 0) for level in levels]

    def _run(self, jobs: Sequence[Job], folder: Path, lanes: Sequence[Gpu]) -> dict[Job, Result]:
        # Where a GPU is too hot, it may be so the second time.
        disturbed_on = dict(self._ran_on) if folder.name == RERUN else {}

        def run_job(level: str, process: int, own: Gpu, on_progress: OnProgress, turn: Turn | None) -> Result:
            self._ran_on[level, process] = own
            with self._compiled_code() as cache:
                return runner.run_level(
                    level,
                    self.session.workload.id,
                    process,
                    folder,
                    deadlines=self._deadlines,
                    cache=cache,
                    inject=self.injections.get(level),
                    gpu=own,
                    on_progress=on_progress,
                    turn=turn,
                )

        with contextlib.closing(ProgressPrinter(self._deadlines, len(jobs))) as printer:
            # Without a GPU, imports would take the processor from what compiles.
            return run_jobs(jobs, lanes, run_job, printer, is_ahead=bool(self._gpus), elsewhere=disturbed_on)


def _told(jobs: Sequence[Job], folder: Path) -> str:
    if folder.name == RERUN:
        return f"once more: {', '.join(f'{level} #{process}' for level, process in jobs)}"
    levels = dict.fromkeys(level for level, _ in jobs)
    return f"{', '.join(levels)} in {len(jobs) // len(levels)} process(es) each"


def _point_benchmark_at(option: Any, path: Path | None) -> None:
    """Let pytest-benchmark show the baseline that the gate judges by; without one it has nothing to compare with."""
    if not option.benchmark_compare:
        return
    if path is None:
        option.benchmark_compare = []
        return
    asked = option.benchmark_compare
    if asked is not True and not path.name.startswith(str(asked)):
        raise ValueError(f"--benchmark-compare={asked}: only the newest baseline judges, and that is {path}")
    option.benchmark_compare = path.name[:4]
    # pytest-benchmark makes the folder it is given, even to compare: it gets ours only if it is there.
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = str(path.parent)


def _injections(specs: Sequence[str], levels: Sequence[str]) -> dict[str, str]:
    injections = {}
    for spec in specs:
        level, _, fault = spec.partition(":")
        if level not in levels:
            raise ValueError(f"--inject {spec!r}: expected LEVEL:FAULT with one of {', '.join(levels)}")
        if level in injections:
            raise ValueError(f"--inject {spec!r}: {level!r} has a fault already; a level takes one, leave one away")
        parsed = faults.parse(fault)
        if parsed.field and get_level(level).fields()[parsed.field] == DEFAULTS[parsed.field]:
            raise ValueError(f"--inject {spec!r}: level {level!r} does not have {parsed.field}, so nothing would break")
        injections[level] = parsed.spec
    return injections

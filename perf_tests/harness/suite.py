"""What one `pytest perf_tests` works with: options read, the machine asked, workers run. No torch."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fluxfast.levels import LADDER, get_level
from fluxfast.workloads import get_workload
from perf_tests.harness import faults, gpu, lease, runner, store
from perf_tests.harness.progress import CPU_DEADLINES, GPU_DEADLINES, ProgressPrinter
from perf_tests.harness.quarantine import load_quarantine
from perf_tests.harness.recording import MIN_PROCESSES
from perf_tests.harness.schema import Outcome, Result, Verdict
from perf_tests.harness.session import Session
from perf_tests.harness.stored_run import RunFacts, read_facts
from perf_tests.history.night import Judged

LEVELS = [level.id for level in LADDER]
ROOT = Path(__file__).resolve().parents[2]


class Suite:
    """One run and what was said about it.

    Attributes:
        expected: levels that have to be measured and judged, or the run is not green.
        verdicts: of the tests so far, by node id.
        baseline_name: file that judges this run; None if none does.
        accepted: verdicts that `--update-baseline --reason` is about to accept.

    Raises:
        ValueError, StoreError, GpuError: one sentence, before anything is measured.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.config = config
        # pytest has this option already, for its own strict mode; given by hand it means ours too.
        self.is_strict = "--strict" in config.invocation_params.args
        self.is_recording = option.record_baseline or option.update_baseline
        self.verdicts: dict[str, Verdict] = {}
        self.accepted: list[Verdict] = []
        self.quarantine = load_quarantine(option.quarantine, datetime.datetime.now(datetime.UTC).date())
        facts = read_facts(option.replay) if option.replay else self._new_facts(option)
        if option.workload not in (None, facts.workload):
            raise ValueError(f"--workload {option.workload}: the stored run {option.replay} is of {facts.workload!r}")
        workload = get_workload(facts.workload)
        self.expected = _chosen_levels(option.levels, facts.levels, facts.unavailable)
        if self.is_recording and (option.inject or (left := set(facts.levels) - set(self.expected))):
            why = "--inject" if option.inject else f"--levels without {', '.join(sorted(left))}"
            raise ValueError(f"a baseline holds the whole ladder, unbroken: leave {why} away to record or update one")
        self.injections = _injections(option.inject, self.expected)
        folder = option.baselines / facts.slug
        path = store.find_baseline(folder, workload.id) if folder.is_dir() else None
        is_compared = bool(option.benchmark_compare)
        self.baseline_name = path.name if path and is_compared else None
        _point_benchmark_at(option, path)
        is_gpu = facts.slug != gpu.CPU_SLUG
        self._deadlines = GPU_DEADLINES if is_gpu else CPU_DEADLINES
        self._gpu = str(_first_gpu()) if is_gpu else None
        self.session = Session(
            folder=option.replay or option.results,
            workload=workload,
            levels=self.expected,
            unavailable=facts.unavailable,
            processes=facts.processes,
            slug=facts.slug,
            baseline=store.read_baseline(path) if path and (is_compared or option.update_baseline) else None,
            baseline_folder=folder,
            is_compared=is_compared,
            measure=None if option.replay else self._measure,
        )
        if option.replay:
            self.session.results  # noqa: B018  # a partial run is refused here and not test by test
        else:
            self.session.make_folder = lambda: runner.new_run_folder(option.results, _git_sha())

    @property
    def voids(self) -> list[Verdict]:
        """What could not be judged."""
        return [verdict for verdict in self.verdicts.values() if verdict.outcome is Outcome.VOID]

    def not_green(self) -> str | None:
        """Why a run without a red test is red all the same."""
        missing = self.session.unmeasured()
        judged = {verdict.level for verdict in self.verdicts.values()}
        unjudged = [level for level in self.expected if level not in judged]
        if not (missing or unjudged):
            return None
        return (
            f"not green: levels {', '.join(missing or unjudged)} were expected on this machine and not "
            f"{'measured' if missing else 'judged'}; narrow with --levels, not with -k or node ids"
        )

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
        machine = ask_machine()
        is_gpu = machine["device"] == "cuda"
        workload = get_workload(option.workload or ("schnell" if machine["capability"] == [9, 0] else "tiny"))
        unavailable = {level: why for level, why in machine["levels"].items() if why and level in LEVELS}
        processes = option.processes
        if processes is None:
            processes = MIN_PROCESSES if self.is_recording else 3 if is_gpu else 1
        least = MIN_PROCESSES if self.is_recording else 1
        if processes < least:
            raise ValueError(f"--processes is {processes}, expected at least {least}")
        return RunFacts(
            slug=gpu.slug(_first_gpu() if is_gpu else 0),
            workload=workload.id,
            workload_digest=workload.digest,
            levels=[level for level in LEVELS if level not in unavailable],
            unavailable=unavailable,
            processes=processes,
        )

    def _measure(self, levels: Sequence[str], processes: int, folder: Path) -> dict[str, list[Result]]:
        """Run workers, with progress on the terminal; Ctrl-C keeps what was measured."""
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


def _first_gpu() -> Any:
    return gpu.first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))


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


def _git_sha() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "nogit"

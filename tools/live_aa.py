"""Two ladders of the same code on one machine, judged against each other; by default five times. Then one slowed down.

    python -m tools.live_aa [--times 5] [--slow fused_qkv] [--medians tests/data/process_medians.json]

A: record a baseline from five fresh processes a level into a temporary folder, then run the suite against it, `--times`
times: all have to be green. B: once more with an injected slow-down of `--slow` by twice its smallest visible change:
its latency test has to be red by both rules, and no other test. Exits 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from fluxfast.levels import LADDER
from perf_tests.harness.store import read_result
from perf_tests.harness.stored_run import RUN_FILE, read_facts

ROOT = Path(__file__).resolve().parents[1]


class Suite:
    """The suite with folders of its own: `baselines` and `results` below `folder`."""

    def __init__(self, folder: Path, workload: str, baselines: Path | None) -> None:
        self.results, self.junit = folder / "results", folder / "junit.xml"
        baselines = baselines or folder / "baselines"
        self.options = [f"--workload={workload}", f"--baselines={baselines}", f"--results={self.results}"]

    def run(self, name: str, *options: str) -> tuple[int, str, dict[str, str], dict[str, str]]:
        """Exit status, output, message by red test, and the smallest visible change by latency test."""
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "perf_tests", "-q", f"--junitxml={self.junit}", *self.options]
        done = subprocess.run(
            [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(f"{name}: exit status {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
        red, visible = {}, {}
        for case in ElementTree.parse(self.junit).iter("testcase"):
            test = case.get("name", "")
            if (failure := case.find("failure")) is not None:
                red[test] = failure.text or ""
            for one in case.iter("property"):
                if one.get("name") == "smallest_visible":
                    visible[test] = one.get("value", "")
        for line in done.stdout.splitlines():
            if "test_latency[" in line and line.startswith(("pass", "improved", "regressed", "void", "error")):
                print("  " + line[:230], flush=True)
        return done.returncode, done.stdout, red, visible


def process_medians(results: Path) -> dict[str, dict[str, list[float]]]:
    """Slug -> level -> the median of every process of every undisturbed run below `results`, seconds."""
    medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for facts in sorted(results.glob(f"*/{RUN_FILE}")):
        slug = read_facts(facts.parent).slug
        for level in LADDER:
            for path in sorted(facts.parent.rglob(f"{level.id}/*/result.json")):
                result = read_result(path)
                if result.measurement and not result.injection:
                    medians[slug][level.id].append(statistics.median(result.measurement.samples_s))
    return medians


def slow_down(suite: Suite, level: str, visible: str) -> bool:
    """Whether twice the smallest visible change is red at `level`, by both rules, and nowhere else."""
    percent = 200 * float(visible)
    _, _, red, _ = suite.run(
        f"{level} slowed by {percent:.1f} %", "--inject", f"{level}:latency=+{percent:.1f}%", "--benchmark-compare"
    )
    for test, message in red.items() or [("no test", "the slow-down was not seen")]:
        print(f"  {test}: {message}", flush=True)
    own = red.get(f"test_latency[{level}]", "")
    return list(red) == [f"test_latency[{level}]"] and "Fired: interval and ladder" in own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--workload", default="tiny")
    parser.add_argument("--baselines", type=Path, help="judge against these instead of recording first")
    parser.add_argument("--slow", choices=[level.id for level in LADDER], default="fused_qkv")
    parser.add_argument("--medians", type=Path, help="write the process medians of all runs there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), options.workload, options.baselines)
        if options.baselines is None:
            status, text, *_ = suite.run("baseline recorded", "--record-baseline")
            if status:
                print(text[-3000:])
                return 1
        green, visible = 0, {}
        for index in range(options.times):
            status, _, red, visible = suite.run(f"run {index + 1}", "--benchmark-compare")
            green += status == 0
            for test, message in red.items():
                print(f"  {test}: {message}")
        print(f"{green} of {options.times} runs green")
        if options.medians:
            options.medians.parent.mkdir(exist_ok=True)
            options.medians.write_text(json.dumps(process_medians(suite.results), indent=1) + "\n")
        is_seen = slow_down(suite, options.slow, visible[f"test_latency[{options.slow}]"])
    return int(green < options.times or not is_seen)


if __name__ == "__main__":
    raise SystemExit(main())

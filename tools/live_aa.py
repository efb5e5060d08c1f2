"""Two ladders of the same code on one machine, judged against each other; by default five times.

    python tools/live_aa.py [--times 5] [--workload tiny]

Each time: record a baseline from five fresh processes a level into a temporary folder, then run the suite against it.
Prints one line a time and a Markdown table of the verdicts; exits 1 if any run was not green.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def suite(*arguments: str) -> tuple[int, str, float]:
    """Exit status, output and seconds of one run of the suite."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "perf_tests", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--workload", default="tiny")
    parser.add_argument("--baselines", type=Path, help="judge against these instead of recording first")
    options = parser.parse_args()
    red = 0
    with tempfile.TemporaryDirectory() as folder:
        baselines = options.baselines or Path(folder)
        common = ("--workload", options.workload, "--baselines", str(baselines))
        if options.baselines is None:
            status, text, seconds = suite(*common, "--record-baseline")
            print(f"baseline recorded in {seconds:.0f} s, exit status {status}", flush=True)
            if status:
                print(text[-3000:])
                return 1
        for index in range(options.times):
            status, text, seconds = suite(*common, "--benchmark-compare")
            red += status != 0
            print(f"run {index + 1}: exit status {status}, {seconds:.0f} s", flush=True)
            for line in re.findall(r"^(?:pass|improved|regressed|void|error).*test_latency\[.*$", text, re.M):
                print("  " + line[:170], flush=True)
    print(f"{options.times - red} of {options.times} runs green")
    return int(red > 0)


if __name__ == "__main__":
    raise SystemExit(main())

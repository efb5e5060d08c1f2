"""How often `history.changes` reports a change that is not there, and finds one that is; see docs/history.md."""

from __future__ import annotations

import argparse

import numpy as np

from perf_tests.history.changes import find_changes
from perf_tests.history.store import Point

SERIES = 400
FIRST_NIGHT = np.datetime64("2026-01-01")
YEARS = {"60 nights": 60, "1 year": 365, "3 years": 1095}


def points(logs: np.ndarray) -> list[Point]:
    return [
        Point(f"run{i}", f"{FIRST_NIGHT + i}T00:00:00Z", "cpu", "tiny", "compile", float(np.exp(log)), "s", None,
              None, None, "", None, "")
        for i, log in enumerate(logs)
    ]  # fmt: skip


def noise(random: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Of standard deviation about 1."""
    if kind == "normal":
        return random.standard_normal(count)
    if kind == "heavy-tailed":
        return random.standard_t(4, count) / np.sqrt(2)
    return random.standard_normal(count) + 12 * (random.random(count) < 0.02)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    random = np.random.default_rng(20261124)
    for kind in ("normal", "heavy-tailed", "one night in fifty 12 sd off"):
        for name, count in YEARS.items():
            found = [len(find_changes(points(0.01 * noise(random, kind, count)), [], {})) for _ in range(SERIES)]
            print(f"| {kind} | {name} | {sum(map(bool, found))} of {SERIES} series |")
    for size in (1.0, 1.5, 2.0, 3.0):
        hits = 0
        for _ in range(SERIES):
            logs = noise(random, "normal", 365)
            logs[300:] += size
            hits += any(abs((np.datetime64(c.date) - np.datetime64("2026-01-01")).astype(int) - 300) <= 14
                        for c in find_changes(points(0.01 * logs), [], {}))  # fmt: skip
        print(f"| a step of {size} sd, 65 nights old, in a year | found within 14 nights in {hits} of {SERIES} |")
    hits = 0
    for _ in range(SERIES):
        logs = noise(random, "normal", 365) + np.linspace(0, 3, 365)
        hits += bool(find_changes(points(0.01 * logs), [], {}))
    print(f"| creep of 3 sd over a year | found in {hits} of {SERIES} |")


if __name__ == "__main__":
    main()

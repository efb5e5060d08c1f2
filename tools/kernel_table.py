"""GPU time by kernel in a worker's trace, as a Markdown table: where a call's milliseconds go.

    python -m tools.kernel_table results/levels/<run>/bf16/0/trace.json.gz [--top 30]

A trace holds one call (`python -m tools.measure_levels --trace`, `python -m fluxfast bench --trace`). Kernels that run
at the same time on several streams are all counted, so their sum may exceed the time that the GPU was busy.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
MAX_NAME = 90


@dataclasses.dataclass(frozen=True)
class Row:
    """All launches of one kernel: how often, and for how many milliseconds together."""

    name: str
    count: int
    ms: float


def rows(events: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a kernel name, copies and fills included, longest first.

    Args:
        events: of a chrome trace; durations in microseconds.
    """
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in KERNEL_CATEGORIES:
            found.setdefault(event["name"], []).append(event["dur"] / 1e3)
    return sorted((Row(name, len(ms), sum(ms)) for name, ms in found.items()), key=lambda row: -row.ms)


def busy_and_span_ms(events: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Milliseconds in which at least one kernel ran, and from the first kernel's start to the last one's end."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in KERNEL_CATEGORIES)
    busy, until = 0.0, -float("inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e3, (until - spans[0][0]) / 1e3 if spans else 0.0


def table(events: Sequence[Mapping[str, Any]], top: int) -> str:
    """Markdown: the `top` longest kernels, the rest in one row, the sums below."""
    own = rows(events)
    busy, span = busy_and_span_ms(events)
    shown, rest = own[:top], own[top:]
    if rest:
        shown = [*shown, Row(f"{len(rest)} others", sum(row.count for row in rest), sum(row.ms for row in rest))]
    lines = ["| kernel | launches | ms |", "|---|---:|---:|"]
    lines += [f"| {_short(row.name)} | {row.count} | {row.ms:.2f} |" for row in shown]
    gaps = f"{busy:.1f} ms busy in {span:.1f} ms from the first kernel to the end of the last"
    return "\n".join(lines) + f"\n\n{sum(row.count for row in own)} launches, {gaps}.\n"


def _short(name: str) -> str:
    name = " ".join(name.split()).replace("|", "/")
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace, gzipped or not.

    Raises:
        ValueError: if the file is no trace, or holds no GPU kernel.
    """
    try:
        raw = path.read_bytes()
        events = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["traceEvents"]
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no chrome trace can be read from it ({error}); trace the level again") from error
    if not any(event.get("cat") in KERNEL_CATEGORIES for event in events):
        raise ValueError(f"{path}: the trace holds no GPU kernel; trace the level on a machine with a GPU")
    return events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="trace.json.gz of a worker")
    parser.add_argument("--top", type=int, default=30, help="kernels with a row of their own (%(default)s)")
    options = parser.parse_args()
    try:
        print(table(read_events(options.trace), options.top))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

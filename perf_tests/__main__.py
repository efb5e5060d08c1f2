"""Command line of the suite beside `pytest perf_tests`: `python -m perf_tests COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("perf_tests.bench.cli", "measure levels into one table, one plot and their images"),
    "bisect": ("perf_tests.bisect.cli", "find the version of a package that made a test red"),
    "export": ("perf_tests.export", "a run as records of the PyTorch OSS benchmark database"),
    "history": ("perf_tests.history.cli", "list nights, show where levels changed, rebuild"),
    "issues": ("perf_tests.issues", "open a GitHub issue for each new regression, close it when green"),
    "report": ("perf_tests.report.cli", "a run as one HTML page, and as Markdown"),
    "sweep": ("perf_tests.sweep.cli", "levels x workloads x versions over the GPUs of a Ray cluster"),
}
"""Name -> the module whose `main(arguments) -> exit status` runs it, and what it does in a line."""


def main() -> int:
    """Run one command; 2 after one sentence on stderr if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        try:
            command = importlib.import_module(COMMANDS[name][0])
        except ModuleNotFoundError as error:
            print(
                f"error: {name!r} needs the package {error.name!r}, which is not installed; "
                "install the extra it belongs to: pip install -e '.[perf]'",
                file=sys.stderr,
            )
            return 2
        status: int = command.main(sys.argv[2:])
        return status
    listed = "".join(f"\n  {known:10}{does}" for known, (_, does) in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: python -m perf_tests COMMAND ...{listed}")
        return 0
    print(f"error: unknown command {name!r}; known commands:{listed}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())

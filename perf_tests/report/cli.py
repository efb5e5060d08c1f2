"""`python -m perf_tests report`: a stored run as one HTML page, and as Markdown and annotations for CI."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from perf_tests.harness.files import StoreError, printable, write_over
from perf_tests.harness.replay import ROOT
from perf_tests.history import store


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when written, whatever the verdict; 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m perf_tests report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of one run, results/<run>")
    parser.add_argument("--history", type=Path, help=f"default: {store.NAME} beside the run, if it is there")
    parser.add_argument("--baselines", type=Path, default=ROOT / "baselines", help="folder of baselines")
    parser.add_argument("-o", "--output", type=Path, help="default: report.html in the run's folder")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a job summary too, at most 1 MiB")
    parser.add_argument("--annotations", action="store_true", help="print ::error lines for red tests, for GitHub")
    asked = parser.parse_args(arguments)
    output = asked.output or asked.run / "report.html"
    beside = os.path.join(os.path.dirname(os.path.abspath(asked.run)), store.NAME)
    try:
        from perf_tests.report.gather import build_report
        from perf_tests.report.html import render_html
        from perf_tests.report.markdown import error_lines, render_markdown

        history = asked.history or (Path(beside) if os.path.exists(beside) else None)
        report = build_report(asked.run, asked.baselines, history)
        _write(output, render_html(report, output))
        if asked.markdown:
            _write(asked.markdown, render_markdown(report))
    except (StoreError, ImportError) as error:
        missing = "; install the extra: pip install -e '.[report]'" if isinstance(error, ImportError) else ""
        print(f"error: {error}{missing}", file=sys.stderr)
        return 2
    for line in error_lines(report) if asked.annotations else ():
        print(printable(line))  # the names of files need not be text
    print(f"{report.headline}\n{output}", file=sys.stderr)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        # A lone surrogate cannot be written as it is, and nothing of a report may be lost for one.
        write_over(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); name another place") from error

"""The same report as Markdown for a job summary, and red tests as annotations."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from perf_tests.harness.replay import FILES
from perf_tests.report.html import templates
from perf_tests.report.model import Report

LIMIT_BYTES = 1 << 20
"""Of one step's summary on GitHub; a longer one is not shown at all."""
LIMIT_ANNOTATIONS = 10
"""Error annotations of one step that GitHub shows."""
SECTION = "\n## "
CLOSE = "</pre></details>"
CUT = "\n\n*Cut here: GitHub shows at most 1 MiB. The HTML report has the rest.*\n"


def render_markdown(report: Report) -> str:
    """At most `LIMIT_BYTES` of UTF-8: sections that no longer fit are left out from the end, and it says so."""
    text = templates(cell=_cell).get_template("summary.md.jinja").render(report=report)
    # The name of a file need not be text; `_cut` counts what will be written.
    return _cut(text.encode(errors="backslashreplace").decode(), LIMIT_BYTES)


def _cell(value: object) -> Markup:
    """Text that Markdown and HTML take for nothing but text, on one line."""
    line = " ".join(str(value).split())
    return escape(re.sub(r"([\\`*_{}\[\]()#+!|~@])", r"\\\1", line))


def _cut(text: str, limit: int) -> str:
    if len(text.encode()) <= limit:
        return text
    room = limit - len(CUT.encode())
    kept = ""
    for number, section in enumerate(text.split(SECTION)):
        whole = kept + (SECTION if number else "") + section
        if len(whole.encode()) > room:
            # The findings come first and are what matters: as much of this section as fits, whole lines.
            part = whole.encode()[: room - len(CLOSE)].decode(errors="ignore").rpartition("\n")[0]
            return part + (CLOSE if part.count("<pre>") > part.count("</pre>") else "") + CUT
        kept = whole
    raise AssertionError("a text longer than the limit has a section that does not fit")


def error_lines(report: Report) -> list[str]:
    """GitHub's workflow commands, one a red finding; more than GitHub shows are counted in the last."""
    red = [(name, finding) for name, finding in report.groups if finding.is_red]
    lines = [
        f"::error file={FILES[finding.test]},title={_property(name)}::{_data(finding.verdict.explain()[:4000])}"
        for name, finding in red
    ]
    if len(lines) > LIMIT_ANNOTATIONS:
        left = len(lines) - (LIMIT_ANNOTATIONS - 1)
        lines[LIMIT_ANNOTATIONS - 1 :] = [f"::error title=more::{left} more findings are red, see the summary"]
    return lines


def _data(text: str) -> str:
    """A workflow command ends at the line's end: without this, a log could hold the next command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

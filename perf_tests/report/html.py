"""A report as one HTML page without a network: styles, script and pictures are in it.

Everything from a run passes through Jinja's autoescape; what is not escaped is the project's own style and script.
Should something slip through, the page's Content-Security-Policy runs no script but that one.
"""

from __future__ import annotations

import base64
import hashlib
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from perf_tests.report import charts
from perf_tests.report.model import Report

FOLDER = Path(__file__).parent


def templates(**filters: Callable[..., Any]) -> jinja2.Environment:
    """Jinja for the templates of this folder: autoescape always on, a misspelt name is an error."""
    own = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own.filters |= {
        "seconds": seconds,
        "percent": percent,
        "change": change,
        "times": times,
        "number": number,
        "mebibytes": mebibytes,
    }
    own.filters |= {"moment": lambda date: date.replace("T", " ").replace("Z", " UTC"), **filters}
    return own


def render_html(report: Report, target: Path) -> str:
    """The page.

    Args:
        target: where it will lie; links to files of the run are relative to it.
    """
    own = templates(link=lambda path: _link(path, target), inside=lambda path: str(path.relative_to(report.run)))
    script = own.get_template("page.js").render().encode()
    return own.get_template("page.html.jinja").render(
        report=report,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        stage_names=list(dict.fromkeys(name for stages in report.stages for name in stages.seconds)),
        script_sha256=base64.b64encode(hashlib.sha256(script).digest()).decode(),
    )


def _link(path: Path, target: Path) -> str:
    # quote() leaves no colon, so that no name of a file can be a URL of its own scheme.
    return urllib.parse.quote(os.fsencode(os.path.relpath(path.resolve(), target.resolve().parent)))


def seconds(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def percent(ratio: float | None) -> str:
    """1.02 as "+2.00 %"; nothing for None."""
    return "" if ratio is None else f"{100 * (ratio - 1):+z.2f} %"


def change(by: float | None) -> str:
    """0.02 as "+2.00 %"; nothing for None."""
    return "" if by is None else percent(1 + by)


def times(ratio: float | None) -> str:
    """A factor; nothing for None."""
    return "" if ratio is None else f"×{ratio:.3f}"


def number(value: float | None) -> str:
    """Four significant digits; nothing for None."""
    return "" if value is None else f"{value:.4g}"


def mebibytes(value: float | None) -> str:
    """Of bytes; nothing for None."""
    return "" if value is None else f"{value / 2**20:.1f} MiB"

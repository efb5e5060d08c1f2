"""One GitHub issue for each regression, opened once and closed when its test is green again, through the `gh` client.

    python -m perf_tests issues junit.xml --pool h200-700w/nightly --url https://.../actions/runs/1

What is open is asked of GitHub, by label and title, so that nothing has to be kept between nights. A test that was
skipped (void, unavailable, not among the levels) or did not run says nothing: its issue stays as it is. `gh` reads its
token itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

LABEL = "perf-regression"
MOST_OPEN = 500
"""Open issues that are read; a pool with more of them has another problem."""
LONGEST = 60_000
"""Bytes of a message; GitHub takes 65,536 characters in a body, Linux 131,072 bytes in one argument of a command."""

State = Literal["red", "green", "silent"]


class GhError(Exception):
    """`gh` is not there or refused: what it said, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One test of a run: its name with parameters, its module, what it says, and its message if red.

    A module that could not be imported is a red case with its dotted path as name, pytest's own failure one with
    the name `internal`.
    """

    name: str
    module: str
    state: State
    message: str = ""


def read_cases(path: Path) -> list[Case]:
    """The tests of a JUnit XML file that pytest wrote.

    Raises:
        ValueError: if it cannot be read or holds no test, because then no issue may be closed.
    """
    try:
        found = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: not the JUnit XML of a run ({error}); give the file of --junitxml") from error
    if not found:
        raise ValueError(f"{path}: holds no test, so nothing was measured; look at the run first")
    return [_case(one) for one in found]


def _case(element: ElementTree.Element) -> Case:
    name, module = element.get("name", ""), element.get("classname", "")
    for kind in ("failure", "error"):
        if (told := element.find(kind)) is not None:
            message = f"{told.get('message')}\n\n{told.text or ''}".strip()
            return Case(name=name, module=module, state="red", message=message)
    return Case(name=name, module=module, state="silent" if element.find("skipped") is not None else "green")


def gh(*arguments: str) -> str:
    """Output of one `gh` command.

    Raises:
        GhError: if it failed.
    """
    try:
        done = subprocess.run(["gh", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GhError("the GitHub client `gh` is not installed; install it on the runner") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise GhError(f"`gh {' '.join(arguments[:2])}` failed: {last}; check its token and the label {LABEL!r}")
    return done.stdout


def title(pool: str, name: str) -> str:
    """How an issue is found again: by the machine and the test."""
    return f"[{pool}] {name}"


def body(case: Case, url: str) -> str:
    """The message as a code block that nothing in it can end: neither HTML nor a mention acts."""
    message = case.message.encode()[:LONGEST].decode(errors="ignore")
    fence = "```"
    while fence in message:
        fence += "`"
    return f"Red in {url}\n\n{fence}\n{message}\n{fence}\n\nIt is closed by the first night in which it is green.\n"


def update(cases: list[Case], pool: str, url: str) -> list[str]:
    """Open what is newly red, close what is green again; a line for each.

    Raises:
        GhError: if `gh` failed; what was done before stays done and is not repeated by the next run.
    """
    listed = gh(
        "issue", "list", "--state", "open", "--label", LABEL, "--json", "number,title", "--limit", str(MOST_OPEN)
    )
    known: list[dict[str, Any]] = json.loads(listed)
    numbers = {str(issue["title"]): str(issue["number"]) for issue in known}
    red: dict[str, Case] = {}
    for case in cases:
        if case.state == "red":
            red.setdefault(case.name, case)
    lines = []
    for name, case in red.items():
        if title(pool, name) not in numbers:
            made = gh("issue", "create", "--title", title(pool, name), "--label", LABEL, "--body", body(case, url))
            lines.append(f"opened {made.strip()} for {name}")
    for name in sorted(_green(cases) - set(red)):
        if number := numbers.get(title(pool, name)):
            gh("issue", "close", number, "--comment", f"Green in {url}")
            lines.append(f"closed #{number} for {name}")
    return lines


def _green(cases: list[Case]) -> set[str]:
    """Names of the green tests, and of what they show to be sound: the modules they come from, and pytest itself."""
    names = set()
    for case in cases:
        if case.state == "green":
            parts = case.module.split(".")
            names |= {case.name, "internal", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))}
    return names


def main(arguments: list[str]) -> int:
    """Run the command; 2 after one sentence on stderr if something is wrong with input or `gh`."""
    parser = argparse.ArgumentParser(prog="python -m perf_tests issues", description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path, help="what `pytest perf_tests --junitxml` wrote")
    parser.add_argument("--pool", required=True, help="machine and row of the night, part of each title")
    parser.add_argument("--url", required=True, help="of the run, for bodies and comments")
    options = parser.parse_args(arguments)
    try:
        for line in update(read_cases(options.junit), options.pool, options.url):
            print(line)
    except (GhError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

"""One GitHub issue for each regression, opened once and closed when its tests are green again, through the `gh` client.

    python -m perf_tests issues junit.xml --pool h200-700w/nightly --url https://.../actions/runs/1

A regression is a test with the verdict `regressed` or `error`; those of one level that say the same are one issue. What
is red for another reason (no baseline, a file that cannot be read, a broken import), and a night that left no tests or
ran on another machine, is one issue of the pool: its night could not be judged.

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

from perf_tests.bisect.printed import COMMAND

LABEL = "perf-regression"
MOST_OPEN = 500
"""Open issues that are read; a pool with more of them has another problem."""
LONGEST = 60_000
"""Bytes of a message; GitHub takes 65,536 characters in a body, Linux 131,072 bytes in one argument of a command."""

REGRESSIONS = ("regressed", "error")
"""Verdicts that have an issue of their own."""
UNJUDGED = "night could not be judged"
"""Stands where an issue's title has its tests."""

State = Literal["red", "unjudged", "green", "silent"]


class GhError(Exception):
    """`gh` is not there or refused: what it said, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One test of a run: its name with the level, what it says, and its message if it failed.

    It is `unjudged` if it failed without the verdict of a regression: a module that cannot be imported is one such.
    """

    name: str
    state: State
    message: str = ""


def read_cases(path: Path, slug: str) -> list[Case]:
    """The tests of a JUnit XML file that the suite wrote on the machine `slug`.

    Raises:
        ValueError: if it cannot be read, holds no test or is of another machine, because then no issue may be closed.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: not the JUnit XML of a run ({error}); give the file of --junitxml") from error
    slugs = {_properties(suite).get("slug") for suite in root.iter("testsuite")} - {None}
    if slugs - {slug}:
        raise ValueError(
            f"{path}: of the machine {', '.join(map(str, slugs))}, expected {slug!r}, the first part of --pool; look "
            "at its driver and the runner's label"
        )
    cases = [_case(one) for one in root.iter("testcase")]
    if not slugs:  # the first test of the suite writes it: none of them ran, so what is green is not of the suite
        cases = [case for case in cases if case.state != "green"]
    if not cases:
        raise ValueError(f"{path}: holds no test, so nothing was measured; look at the run first")
    return cases


def _properties(element: ElementTree.Element) -> dict[str | None, str | None]:
    return {one.get("name"): one.get("value") for one in element.iterfind("properties/property")}


def _case(element: ElementTree.Element) -> Case:
    name = element.get("name", "")
    for kind in ("failure", "error"):
        if (told := element.find(kind)) is not None:
            state: State = "red" if _properties(element).get("verdict") in REGRESSIONS else "unjudged"
            return Case(name=name, state=state, message=(told.text or told.get("message") or "").strip())
    return Case(name=name, state="silent" if element.find("skipped") is not None else "green")


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


def title(pool: str, names: str) -> str:
    """How an issue is found again: by the machine and the tests."""
    return f"[{pool}] {names}"


def merged(cases: list[Case]) -> dict[str, Case]:
    """The first of the tests of one level that say the same, by the names of all of them: `test_a, test_b[level]`."""
    unique: dict[str, Case] = {}
    for case in cases:  # pytest writes a test twice that fails and then breaks its teardown
        unique.setdefault(case.name, case)
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in unique.values():
        # The command to bisect names the test.
        said = [line for line in case.message.splitlines() if not line.startswith(" ".join(COMMAND))]
        groups.setdefault((case.name.partition("[")[2], "\n".join(said)), []).append(case)
    return {
        ", ".join(case.name.partition("[")[0] for case in own) + (level and f"[{level}"): own[0]
        for (level, _), own in groups.items()
    }


def tests_of(names: str) -> set[str]:
    """The tests that such a name stands for."""
    tests, bracket, level = names.partition("[")
    return {f"{test}{bracket}{level}" for test in tests.split(", ")}


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
    start = title(pool, "")
    numbers = {one["title"].removeprefix(start): str(one["number"]) for one in known if one["title"].startswith(start)}
    told = set().union(*map(tests_of, numbers))
    cases = [*cases, *_night(cases)]
    lines = []
    for names, case in merged([case for case in cases if case.state == "red" and case.name not in told]).items():
        made = gh("issue", "create", "--title", title(pool, names), "--label", LABEL, "--body", body(case, url))
        lines.append(f"opened {made.strip()} for {names}")
    failed = {case.name for case in cases if case.state in ("red", "unjudged")}
    green = {case.name for case in cases if case.state == "green"} - failed
    for names, number in numbers.items():
        if tests_of(names) <= green:
            gh("issue", "close", number, "--comment", f"Green in {url}")
            lines.append(f"closed #{number} for {names}")
    return lines


def _night(cases: list[Case]) -> list[Case]:
    """The night itself as a case: red with all that could not be judged, green if something was and all could be."""
    if unjudged := merged([case for case in cases if case.state == "unjudged"]):
        message = "\n\n".join(f"{names}: {case.message}" for names, case in unjudged.items())
        return [Case(name=UNJUDGED, state="red", message=message)]
    is_judged = any(case.state in ("red", "green") for case in cases)
    return [Case(name=UNJUDGED, state="green")] if is_judged else []


def main(arguments: list[str]) -> int:
    """Run the command; 2 after one sentence on stderr if something is wrong with input or `gh`."""
    parser = argparse.ArgumentParser(prog="python -m perf_tests issues", description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path, help="what `pytest perf_tests --junitxml` wrote")
    parser.add_argument("--pool", required=True, help="machine/row of the night, part of each title: h200-700w/nightly")
    parser.add_argument("--url", required=True, help="of the run, for bodies and comments")
    options = parser.parse_args(arguments)
    status = 0
    try:
        try:
            cases = read_cases(options.junit, options.pool.partition("/")[0])
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            cases, status = [Case(name="the run", state="unjudged", message=str(error))], 2
        for line in update(cases, options.pool, options.url):
            print(line)
    except GhError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status

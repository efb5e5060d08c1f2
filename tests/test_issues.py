"""Issues of regressions, with a `gh` that keeps its issues in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

GH = """#!{python}
import json, pathlib, sys
store = pathlib.Path({store!r})
issues = json.loads(store.read_text())
verb, rest = sys.argv[2], sys.argv[3:]
if verb == "list":
    print(json.dumps([{{"number": i, "title": one["title"]}} for i, one in enumerate(issues) if one["open"]]))
elif verb == "create":
    told = dict(zip(rest[::2], rest[1::2]))
    issues.append({{"title": told["--title"], "body": told["--body"], "label": told["--label"], "open": True}})
    print(f"https://example.test/issues/{{len(issues) - 1}}")
elif verb == "close":
    issues[int(rest[0])]["open"] = False
store.write_text(json.dumps(issues))
"""
RED = '<testcase name="{}"><failure message="regressed [x]">text</failure></testcase>'
GREEN = '<testcase name="{}"/>'
SKIPPED = '<testcase name="{}"><skipped message="void"/></testcase>'


class GitHub:
    """A repository's issues, and the command run against them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "issues.json"
        self.store.write_text("[]")
        client = folder / "bin" / "gh"
        client.parent.mkdir()
        client.write_text(GH.format(python=sys.executable, store=str(self.store)))
        client.chmod(0o755)

    def night(self, *cases: str, pool: str = "h200-700w/nightly", path: str | None = None) -> tuple[int, str]:
        junit = self.folder / "junit.xml"
        junit.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        command = [sys.executable, "-m", "perf_tests", "issues", str(junit), "--pool", pool, "--url", "https://run"]
        variables = {"PATH": str(self.folder / "bin") if path is None else path}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    @property
    def issues(self) -> list[dict[str, object]]:
        return json.loads(self.store.read_text())


@pytest.fixture
def github(tmp_path: Path) -> GitHub:
    return GitHub(tmp_path)


def test_opened_once_and_closed_when_green(github: GitHub) -> None:
    """Two red nights make one issue, a skipped one leaves it, a green one closes it, the next red one opens another."""
    name = "test_latency[float8]"
    for case, is_open in ((RED, [True]), (RED, [True]), (SKIPPED, [True]), (GREEN, [False]), (RED, [False, True])):
        status, text = github.night(case.format(name), GREEN.format("test_memory[float8]"))
        assert status == 0, text
        assert [issue["open"] for issue in github.issues] == is_open
    assert {issue["title"] for issue in github.issues} == {f"[h200-700w/nightly] {name}"}
    assert {issue["label"] for issue in github.issues} == {"perf-regression"}


def test_a_doubled_test_makes_one_issue(github: GitHub) -> None:
    """pytest writes a test twice that fails and then breaks its teardown; red twice or once, it is red."""
    github.night(RED.format("test_latency[aoti]"), RED.format("test_latency[aoti]"))
    assert [issue["open"] for issue in github.issues] == [True]
    github.night(RED.format("test_latency[aoti]"), GREEN.format("test_latency[aoti]"))
    assert [issue["open"] for issue in github.issues] == [True]


BROKEN, WHOLE = "import nothing_like_it", "def test_it(): pass"


@pytest.mark.parametrize(
    ("here", "is_open"),
    [(WHOLE, False), (BROKEN, True), (None, True), ("import pytest; pytest.skip(allow_module_level=True)", True)],
    ids=["green", "still broken", "not run", "skipped"],
)
def test_a_module_that_can_be_imported_again(github: GitHub, here: str | None, is_open: bool) -> None:
    """The issue of a collection error is closed once a test of that module is green; another module's says nothing."""
    assert github.night(*collected(github.folder, test_here=BROKEN, test_there=WHOLE))[0] == 0
    assert [issue["title"] for issue in github.issues] == ["[h200-700w/nightly] perf.test_here"]
    github.night(*collected(github.folder, test_here=here, test_there=WHOLE))
    assert [issue["open"] for issue in github.issues] == [is_open]


def collected(folder: Path, **modules: str | None) -> list[str]:
    """The cases of a night with these modules, as pytest itself writes them."""
    (folder / "perf").mkdir(exist_ok=True)
    for name, content in modules.items():
        (folder / "perf" / f"{name}.py").unlink(missing_ok=True)
        if content:
            (folder / "perf" / f"{name}.py").write_text(content)
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", ".", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, "--junitxml", "own.xml", "perf"]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return [ElementTree.tostring(case, "unicode") for case in ElementTree.parse(folder / "own.xml").iter("testcase")]


def test_pools_do_not_close_each_other(github: GitHub) -> None:
    """Green on one machine says nothing about another."""
    github.night(RED.format("test_latency[aoti]"))
    github.night(GREEN.format("test_latency[aoti]"), pool="h100-700w/nightly")
    assert [issue["open"] for issue in github.issues] == [True]


@pytest.mark.parametrize("letter", ["x", "\N{BOX DRAWINGS LIGHT VERTICAL}"])
def test_a_message_cannot_leave_its_block(github: GitHub, letter: str) -> None:
    """Backquotes, HTML and mentions of a log stay text, and the body stays below the limits of GitHub and Linux."""
    hostile = "&#10;```&#10;@everyone &lt;img src=x&gt;" + letter * 70_000
    github.night(f'<testcase name="t"><failure message="{hostile}"/></testcase>')
    body = str(github.issues[0]["body"])
    fence = body.split("\n")[2]
    assert fence == "````" and body.count(fence) == 2 and len(body) < 65_536


@pytest.mark.parametrize(("junit", "said"), [("", "holds no test"), ("<testcase", "not the JUnit XML")])
def test_a_run_without_tests_closes_nothing(github: GitHub, junit: str, said: str) -> None:
    """A file that says nothing is one sentence, status 2."""
    github.night(RED.format("t"))
    status, text = github.night(junit)
    assert status == 2 and said in text and "Traceback" not in text
    assert [issue["open"] for issue in github.issues] == [True]


def test_without_the_client(github: GitHub) -> None:
    """A runner without `gh` says so."""
    status, text = github.night(RED.format("t"), path="/nowhere")
    assert status == 2 and "`gh` is not installed" in text


def test_unknown_command_names_the_known_ones() -> None:
    """`python -m perf_tests` with a word it does not know."""
    done = subprocess.run([sys.executable, "-m", "perf_tests", "dance"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "known commands" in done.stderr and "issues" in done.stderr

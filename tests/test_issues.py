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
VERDICT = '<testcase name="{}"><properties><property name="verdict" value="{}"/></properties>{}</testcase>'
RED = VERDICT.format("{}", "regressed", '<failure message="regressed [x]">{}</failure>')
"""Name, text."""
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

    def night(
        self, *cases: str, pool: str = "h200-700w/nightly", slug: str = "h200-700w", path: str | None = None
    ) -> tuple[int, str]:
        junit = self.folder / "junit.xml"
        machine = f'<properties><property name="slug" value="{slug}"/></properties>' if slug else ""
        junit.write_text(f"<testsuites><testsuite>{machine}{''.join(cases)}</testsuite></testsuites>")
        return self.issues_of(junit, pool, path)

    def issues_of(self, junit: Path, pool: str, path: str | None = None) -> tuple[int, str]:
        command = [sys.executable, "-m", "perf_tests", "issues", str(junit), "--pool", pool, "--url", "https://run"]
        variables = {"PATH": str(self.folder / "bin") if path is None else path}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    @property
    def open(self) -> list[object]:
        """Titles, without the pool."""
        return [str(issue["title"]).partition("] ")[2] for issue in self.issues if issue["open"]]

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
        status, text = github.night(case.format(name, "slower"), GREEN.format("test_memory[float8]"))
        assert status == 0, text
        assert [issue["open"] for issue in github.issues] == is_open
    assert {issue["title"] for issue in github.issues} == {f"[h200-700w/nightly] {name}"}
    assert {issue["label"] for issue in github.issues} == {"perf-regression"}


def test_a_doubled_test_makes_one_issue(github: GitHub) -> None:
    """pytest writes a test twice that fails and then breaks its teardown; red twice or once, it is red."""
    github.night(RED.format("test_latency[aoti]", "slower"), RED.format("test_latency[aoti]", "broken teardown"))
    assert [issue["open"] for issue in github.issues] == [True]
    github.night(RED.format("test_latency[aoti]", "slower"), GREEN.format("test_latency[aoti]"))
    assert [issue["open"] for issue in github.issues] == [True]


CRASH = "error [aoti] (oom): no memory left"
TESTS = ("test_image", "test_step_error", "test_latency", "test_memory", "test_structure")


def test_tests_of_a_level_that_say_the_same_are_one_issue(github: GitHub) -> None:
    """Two levels that crash are two issues, also of tests that print a command each; closed when all five are green."""
    bisect = "python -m perf_tests bisect --axis torch --good 1 --bad 2 --test"
    crashed = [
        RED.format(f"{test}[{level}]", f"{CRASH} of {level}&#10;{bisect} {test}[{level}]")
        for test in TESTS
        for level in ("aoti", "float8")
    ]
    github.night(*crashed)
    both = [f"{', '.join(TESTS)}[{level}]" for level in ("aoti", "float8")]
    assert github.open == both
    github.night(*crashed)
    assert github.open == both
    aoti, float8 = ([GREEN.format(f"{test}[{level}]") for test in TESTS] for level in ("aoti", "float8"))
    github.night(*float8, *aoti[1:])
    assert github.open == both[:1], "a test that did not run"
    github.night(*float8, *aoti[1:], SKIPPED.format(f"{TESTS[0]}[aoti]"))
    assert github.open == both[:1], "a test that was skipped"
    github.night(*float8, *aoti)
    assert github.open == []


def test_a_level_that_says_two_things_is_two_issues(github: GitHub) -> None:
    """And what says something else on a later night is known by its test."""
    github.night(RED.format("test_latency[aoti]", "slower"), RED.format("test_memory[aoti]", "more"))
    assert github.open == ["test_latency[aoti]", "test_memory[aoti]"]
    github.night(*(RED.format(f"{test}[aoti]", CRASH) for test in TESTS))
    assert github.open[2:] == ["test_image, test_step_error, test_structure[aoti]"]


@pytest.mark.parametrize(
    "case",
    [
        *(VERDICT.format("test_memory[aoti]", said, "<failure/>") for said in ("no_baseline", "incomparable")),
        '<testcase name="test_latency[bf16]"><failure message="measuring ended with: [Errno 2]"/></testcase>',
    ],
    ids=["no_baseline", "incomparable", "no verdict"],
)
def test_what_is_no_verdict_on_speed_is_one_issue_of_the_pool(github: GitHub, case: str) -> None:
    """Opened beside the regressions, once; closed by a night that is judged, not by one in which nothing is."""
    github.night(case, case.replace("test_", "test_other_"), RED.format("test_latency[fp32]", "slower"))
    both = ["test_latency[fp32]", "night could not be judged"]
    assert github.open == both
    github.night(case, GREEN.format("test_latency[float8]"))
    github.night(SKIPPED.format("test_memory[aoti]"))
    assert github.open == both
    github.night(RED.format("test_latency[fp32]", "slower"))
    assert github.open == both[:1]


BROKEN, WHOLE = "import nothing_like_it", "def test_it(): pass"


def test_a_module_that_cannot_be_imported(github: GitHub) -> None:
    """No regression of a test: the night was not judged whole, also where no test ran."""
    for here, there, slug in ((BROKEN, WHOLE, "h200-700w"), (BROKEN, BROKEN, "")):
        assert github.night(*collected(github.folder, test_here=here, test_there=there), slug=slug)[0] == 0
        assert github.open == ["night could not be judged"]
        assert "nothing_like_it" in str(github.issues[0]["body"])
    github.night(*collected(github.folder, test_here=WHOLE, test_there=WHOLE))
    assert github.open == []


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
    github.night(RED.format("test_latency[aoti]", "slower"))
    github.night(GREEN.format("test_latency[aoti]"), pool="h100-700w/nightly", slug="h100-700w")
    assert [issue["open"] for issue in github.issues] == [True]


@pytest.mark.parametrize(("slug", "said"), [("cpu", "of the machine cpu, expected 'h200-700w'"), ("", "holds no test")])
def test_another_machine_closes_nothing(github: GitHub, slug: str, said: str) -> None:
    """A pool whose driver is not loaded measures its CPU: green there says nothing of the GPU."""
    github.night(RED.format("test_latency[aoti]", "slower"))
    status, text = github.night(GREEN.format("test_latency[aoti]"), slug=slug)
    assert status == 2 and said in text
    assert github.open == ["test_latency[aoti]", "night could not be judged"]
    assert said in str(github.issues[1]["body"])


@pytest.mark.parametrize("letter", ["x", "\N{BOX DRAWINGS LIGHT VERTICAL}"])
def test_a_message_cannot_leave_its_block(github: GitHub, letter: str) -> None:
    """Backquotes, HTML and mentions of a log stay text, and the body stays below the limits of GitHub and Linux."""
    hostile = "&#10;```&#10;@everyone &lt;img src=x&gt;" + letter * 70_000
    github.night(RED.format("t", hostile))
    body = str(github.issues[0]["body"])
    fence = body.split("\n")[2]
    assert fence == "````" and body.count(fence) == 2 and len(body) < 65_536


@pytest.mark.parametrize(
    ("junit", "said"), [(None, "No such file"), ("<testsuite/>", "holds no test"), ("<testcase", "not the JUnit XML")]
)
def test_a_run_without_tests_closes_nothing(github: GitHub, junit: str | None, said: str) -> None:
    """A file that says nothing, or none, is one sentence, status 2, and a night that could not be judged."""
    github.night(RED.format("t", "slower"))
    own = github.folder / "own.xml"
    if junit:
        own.write_text(junit)
    status, text = github.issues_of(own, "h200-700w/nightly")
    assert status == 2 and said in text and "Traceback" not in text
    assert github.open == ["t", "night could not be judged"]


def test_without_the_client(github: GitHub) -> None:
    """A runner without `gh` says so."""
    status, text = github.night(RED.format("t", "slower"), path="/nowhere")
    assert status == 2 and "`gh` is not installed" in text


def test_unknown_command_names_the_known_ones() -> None:
    """`python -m perf_tests` with a word it does not know."""
    done = subprocess.run([sys.executable, "-m", "perf_tests", "dance"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "known commands" in done.stderr and "issues" in done.stderr

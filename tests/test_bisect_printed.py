"""`bisect --junit`: the command that a red run printed is the question."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from perf_tests.bisect import cli
from perf_tests.bisect.printed import asked_by, printed_questions
from perf_tests.harness.culprit import bisect_commands
from perf_tests.harness.schema import Outcome, Verdict

WAS = {"torch": "2.13.0.dev20260901", "diffusers": "0.42.1"}
NOW = {"torch": "2.13.0.dev20260920", "diffusers": "0.43.0"}


def red_run(tmp: Path, *commands: str) -> Path:
    """JUnit XML as the suite writes it: commands as properties; the text has them too, and what a worker logged."""
    logged = ["python -m perf_tests bisect --help", "python -m perf_tests bisect 'it", "python -m perf_tests bisectx"]
    text = escape("\n".join(["regressed [float8] (interval): slower.", *logged, "Packages moved:", *commands]))
    told = "".join(f'<property name="bisect" value={quoteattr(command)}/>' for command in commands)
    case = f"<properties>{told}</properties><failure message='m'>{text}</failure>"
    path = tmp / "junit.xml"
    path.write_text(f'<testsuite><testcase name="t">{case}</testcase></testsuite>')
    return path


def printed() -> list[str]:
    """What the suite prints for a nightly of torch and a release of diffusers."""
    verdict = Verdict(outcome=Outcome.REGRESSED, level="float8", rule="interval", message="slower")
    return bisect_commands("test_latency[float8]", "schnell", verdict, WAS, NOW)


def test_what_was_printed_is_what_is_asked(tmp_path: Path) -> None:
    """Every command once, in its order, as the command line reads it; the index is the caller's."""
    torch, diffusers = printed_questions(red_run(tmp_path, *printed(), *printed()))
    asked = cli.parser().parse_args([*torch, "--index-url", "https://index"])
    assert (asked.axis, asked.good, asked.bad) == ("torch", WAS["torch"], NOW["torch"])
    assert (asked.test, asked.workload, asked.pre) == ("test_latency[float8]", "schnell", True)
    assert asked.index_url == "https://index"
    assert cli.parser().parse_args(diffusers).axis == "diffusers"


def test_the_first_question_is_taken(tmp_path: Path) -> None:
    """With the caller's options behind it, which win."""
    question = asked_by(red_run(tmp_path, *printed()), ["--workload", "tiny"])
    assert question is not None and cli.parser().parse_args(question).workload == "tiny"
    assert cli.parser().parse_args(question).axis == "torch"


def test_nothing_moved_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A red run that printed no command has none to ask."""
    assert cli.main(["--junit", str(red_run(tmp_path))]) == cli.NO_ANSWER
    assert "nothing to search" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "<testsuite"])
def test_a_file_that_is_no_junit(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    """Missing or cut: one sentence, status 2."""
    path = tmp_path / "junit.xml"
    if content:
        path.write_text(content)
    assert cli.main(["--junit", str(path)]) == cli.BAD_INPUT
    assert "not the JUnit XML of a run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["python -m perf_tests bisectx --axis torch", "python -m perf_tests bisect 'it"])
def test_another_command_is_none(tmp_path: Path, command: str) -> None:
    """Only the suite's own, and whole."""
    with pytest.raises(ValueError, match="no command of the suite"):
        printed_questions(red_run(tmp_path, command))


@pytest.mark.parametrize(("commands", "status"), [(printed(), 0), ([], 1), (None, 2)], ids=["red", "green", "no file"])
def test_read_before_anything_is_installed(tmp_path: Path, commands: list[str] | None, status: int) -> None:
    """By a Python without packages."""
    junit = tmp_path / "none.xml" if commands is None else red_run(tmp_path, *commands)
    command = [sys.executable, "-S", "-m", "perf_tests.bisect.printed", str(junit)]
    done = subprocess.run(command, cwd=cli.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert len(done.stdout.splitlines()) == len(commands or [])


def test_a_printed_command_is_judged_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is run as it stands: an unknown test or option in a JUnit file is refused."""
    hostile = "python -m perf_tests bisect --axis torch --good 1 --bad 2 --test 'test_latency[$(touch x)]'"
    assert cli.main(["--junit", str(red_run(tmp_path, hostile)), "--versions", "1,2"]) == cli.BAD_INPUT
    assert "unknown level" in capsys.readouterr().err

"""The scripts of the nightly workflow, run with made-up programs in place of those that reach a network."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from suite_samples import LEVELS, put, sample, write_run

from fluxfast.workloads import get_workload
from perf_tests.bisect.cli import parser
from perf_tests.harness import replay
from perf_tests.history.store import points, rebuild

WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "nightly.yml"


def steps(job: str) -> dict[str, dict[str, Any]]:
    """Of a job, by name."""
    return {step["name"]: step for step in yaml.safe_load(WORKFLOW.read_text())["jobs"][job]["steps"] if "name" in step}


def rows() -> list[dict[str, str]]:
    """Of what a night measures."""
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["measure"]["strategy"]["matrix"]["include"]


def run(folder: Path, job: str, step: str, programs: dict[str, str], **variables: str) -> CompletedProcess[str]:
    """A step's script, as a runner runs it: in a shell that ends at the first error, in `folder`."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GITHUB_RUN_ID": "7", **variables}
    told = steps(job)[step]
    command = ["bash", "-e", *(["-o", "pipefail"] if told.get("shell") == "bash" else []), "-c", told["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_missing_row_has_its_issue_and_costs_the_other_none(tmp_path: Path) -> None:
    """The job is red; all rows are told, the missing one without a file."""
    programs = {"gh": '[ "$5" != night-nightly ]', "python3": 'echo "$@"'}
    step = "Open what is newly red, close what is green again"
    ended = run(tmp_path, "issues", step, programs, POOL="h200-700w", RUN_URL="https://run")
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        f"-m perf_tests issues night-{row}/junit.xml --pool h200-700w/{row} --url https://run"
        for row in ("nightly", "nightly-tiny", "stable", "stable-tiny")
    ]
    assert [row["row"] for row in rows()] == ["nightly", "nightly-tiny", "stable", "stable-tiny"]


def fake_python(folder: Path, body: str) -> None:
    python = folder / ".tox" / "nightly" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\n{body}\n")
    python.chmod(0o755)


def variables(folder: Path) -> dict[str, str]:
    state = folder / "state"
    state.mkdir()
    return {"STATE": str(state), "GITHUB_STEP_SUMMARY": str(folder / "summary"), "ENVIRONMENT": "nightly"}


def test_nightlies_are_installed_before_the_measuring(tmp_path: Path) -> None:
    """In a step of their own, through the environment that a person would run; what follows installs nothing."""
    (tox := tmp_path / ".venv" / "bin" / "tox").parent.mkdir(parents=True)
    for program in (tox, tox.with_name("pip")):
        program.write_text('#!/bin/bash\necho "$(basename $0) $@"\n')
        program.chmod(0o755)
    ended = run(tmp_path, "measure", "Install", {"python3": ""}, ENVIRONMENT="nightly")
    assert ended.stdout.splitlines()[-1] == "tox run -e nightly -- --version"
    fake_python(tmp_path, 'echo "$@"')
    told = {**variables(tmp_path), "GPU_POOL": "h200-700w", "LEVELS": "bf16"}
    words = run(tmp_path, "measure", "Measure and judge", {}, **told).stdout.split()
    assert words[:5] == ["-m", "pytest", "perf_tests", "--require-machine", "h200-700w"]
    assert words[-3:] == ["--levels", "bf16", "--benchmark-compare"] and "--workload" not in words
    words = run(tmp_path, "measure", "Measure and judge", {}, **told, WORKLOAD="tiny").stdout.split()
    assert words[-5:] == ["--workload", "tiny", "--levels", "bf16", "--benchmark-compare"]


def test_images_are_judged_every_night() -> None:
    """By a row of each environment whose workload's images are more than noise."""
    judged = {
        row["environment"]
        for row in rows()
        if "test_image" in replay.tests_of(get_workload(row.get("workload", "schnell")))
    }
    assert judged == {row["environment"] for row in rows()}


def test_steps_end_before_their_job() -> None:
    """So that a night which takes too long still leaves something; what keeps it runs whatever happened."""
    measure = yaml.safe_load(WORKFLOW.read_text())["jobs"]["measure"]
    own = steps("measure")
    assert sum(step.get("timeout-minutes", 0) for step in own.values()) < measure["timeout-minutes"]
    assert "timeout-minutes" in own["Measure and judge"]
    assert {step["if"] for step in list(own.values())[2:]} == {"${{ always() }}"}


def test_a_night_without_a_run_says_so(tmp_path: Path) -> None:
    """One line of the summary; nothing is reported."""
    told = variables(tmp_path)
    assert run(tmp_path, "measure", "Keep what rebuilds the history", {}, **told).returncode == 0
    ended = run(tmp_path, "measure", "Report", {}, **told)
    assert ended.returncode == 1
    (line,) = (tmp_path / "summary").read_text().splitlines()
    assert "no run was left" in line


@pytest.mark.parametrize("broken", ["report", "export", ""])
def test_what_cannot_be_told_costs_nothing_else(tmp_path: Path, broken: str) -> None:
    """A run is reported and exported, each whatever becomes of the other; an export that fails is no red night."""
    fake_python(tmp_path, f'echo "$3 $4" >> told; [ "$3" != "{broken}" ]')
    for name in ("20260901T000000Z-a-1", "20260902T000000Z-a-1"):
        (tmp_path / "results" / name).mkdir(parents=True)
    ended = run(tmp_path, "measure", "Report", {}, **variables(tmp_path))
    newest = "results/20260902T000000Z-a-1"
    assert (tmp_path / "told").read_text().splitlines() == [f"report {newest}", f"export {newest}"]
    assert ended.returncode == (broken == "report")
    assert (tmp_path / "summary").exists() == bool(broken)


def test_the_history_is_rebuilt_from_what_is_kept(tmp_path: Path) -> None:
    """The numbers of each night without its images stay on the pool, longer than an artifact does."""
    told = variables(tmp_path)
    night = write_run(tmp_path / "results" / "20260901T000000Z-a-1")
    put(night / "rerun", sample("compile"))
    (tmp_path / "state" / "history-nightly.sqlite").write_text("nights")
    ended = run(tmp_path, "measure", "Keep what rebuilds the history", {}, **told)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "history.sqlite").read_text() == "nights"
    kept = tmp_path / "state" / "runs" / "nightly"
    assert {path.name for path in kept.rglob("*") if path.is_file()} == {"run.json", "result.json"}
    assert (kept / night.name / "rerun" / "compile" / "0" / "result.json").exists()
    assert rebuild(tmp_path / "again.sqlite", kept) == (1, [])
    assert {point.level for point in points(tmp_path / "again.sqlite")} == set(LEVELS)


@pytest.mark.parametrize("red", ["nightly", "nightly-tiny", ""])
def test_nothing_is_built_without_a_question(tmp_path: Path, red: str) -> None:
    """Green after a line; the question is the first row's that has one, and read with what every Python has."""
    summary, output = tmp_path / "summary", tmp_path / "output"
    told = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
    programs = {"gh": "exit 1", "python3": f'[ "$*" = "-m perf_tests.bisect.printed {red}/junit.xml" ]'}
    ended = run(tmp_path, "bisect", "Look for a question", programs, **told)
    assert ended.returncode == 0
    assert summary.exists() != output.exists()
    assert not red or output.read_text() == f"row={red}\n"
    found = steps("bisect")["Find the first bad version"]
    assert found["if"] == "${{ steps.question.outputs.row }}" and '--junit "$ROW/junit.xml"' in found["run"]


def test_tokens_are_where_they_are_needed() -> None:
    """Not in the environment of packages that were built last night."""
    for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values():
        assert "GH_TOKEN" not in job.get("env", {})
        for step in job["steps"]:
            assert ("GH_TOKEN" in step.get("env", {})) == ("gh run" in step.get("run", ""))


TOX = """python=.tox/perf-gpu/bin/python
mkdir -p "$(dirname $python)"
printf '#!/bin/bash\nprintf "%%s\\n" "$@"\nexit 1\n' > $python
chmod +x $python"""
VENV = f"""mkdir -p .venv/bin
printf '#!/bin/bash\n' > .venv/bin/pip
cat > .venv/bin/tox <<'END'
#!/bin/bash
{TOX}
END
chmod +x .venv/bin/*"""


def test_bisect_goes_on_in_the_folder_of_its_night(tmp_path: Path) -> None:
    """What it has of this night stays, an earlier one's is removed, and its exit status is the job's."""
    state, summary = tmp_path / "state", tmp_path / "summary"
    for night in ("6", "7"):
        (state / "bisect" / night / "environments").mkdir(parents=True)
    told = {"STATE": str(state), "GITHUB_STEP_SUMMARY": str(summary), "NIGHTLY_INDEX_URL": "https://nightly"}
    told["ROW"] = "nightly-tiny"
    ended = run(tmp_path, "bisect", "Find the first bad version", {"python3": VENV}, **told)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [folder.name for folder in (state / "bisect").iterdir()] == ["7"]
    words = summary.read_text().split()
    assert words[:5] == ["-m", "perf_tests", "bisect", "--junit", "nightly-tiny/junit.xml"]
    question = ["--axis", "torch", "--good", "1", "--bad", "2", "--test", "t"]
    asked = parser().parse_args([*question, *words[5:]])
    assert (asked.state, asked.index_url) == (state / "bisect" / "7", "https://nightly")
    assert asked.history == state / "history-perf-gpu.sqlite"


def test_rows_share_no_history() -> None:
    """Two environments in one trend would be one noisy level; workloads have trends of their own in one file."""
    used = re.findall(r"--history (\S+)", "".join(step.get("run", "") for step in steps("measure").values()))
    assert len(used) == 2 and set(used) == {'"$STATE/history-$ENVIRONMENT.sqlite"'}

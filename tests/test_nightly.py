"""The scripts of the nightly workflow, run with made-up programs in place of those that reach a network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "nightly.yml"


def script(job: str) -> str:
    """Of the job's last step."""
    text: str = yaml.safe_load(WORKFLOW.read_text())["jobs"][job]["steps"][-1]["run"]
    return text


def run(folder: Path, job: str, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A job's script, as a runner runs it: in a shell that ends at the first error, in `folder`."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GITHUB_RUN_ID": "7", **variables}
    command = ["bash", "-e", "-o", "pipefail", "-c", script(job)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_missing_row_does_not_cost_the_others_issues(tmp_path: Path) -> None:
    """The job is red, and the row that is there has its issues."""
    programs = {"gh": '[ "$5" != night-nightly ]', "python3": 'echo "$@"'}
    ended = run(tmp_path, "issues", programs, POOL="h200-700w", RUN_URL="https://run")
    assert ended.returncode == 1
    assert ended.stdout == "-m perf_tests issues night-stable/junit.xml --pool h200-700w/stable --url https://run\n"

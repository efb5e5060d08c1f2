"""The scripts of the nightly workflow, run with made-up programs in place of those that reach a network."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

from perf_tests.bisect.cli import parser

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
    variables = {"STATE": str(state), "GITHUB_STEP_SUMMARY": str(summary), "NIGHTLY_INDEX_URL": "https://nightly"}
    ended = run(tmp_path, "bisect", {"gh": "", "python3": VENV}, **variables)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [folder.name for folder in (state / "bisect").iterdir()] == ["7"]
    words = summary.read_text().split()
    assert words[:5] == ["-m", "perf_tests", "bisect", "--junit", "night/junit.xml"]
    question = ["--axis", "torch", "--good", "1", "--bad", "2", "--test", "t"]
    asked = parser().parse_args([*question, *words[5:]])
    assert (asked.state, asked.index_url) == (state / "bisect" / "7", "https://nightly")
    assert asked.history == state / "history-perf-gpu.sqlite"


def test_rows_share_no_history() -> None:
    """Two rows a night in one trend would be one noisy level."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["measure"]["steps"]
    used = re.findall(r"--history (\S+)", "".join(step.get("run", "") for step in steps))
    assert len(used) == 2 and set(used) == {'"$STATE/history-$ENVIRONMENT.sqlite"'}

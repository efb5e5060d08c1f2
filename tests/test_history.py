"""The history: what a night leaves, what keeps a number out of the trends, and that it can always be made again."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from history_samples import level_night, night, nights
from report_samples import RUN, replace, stored_run
from suite_samples import changed, failed, run_suite

from perf_tests import export
from perf_tests.harness.quarantine import LONGEST
from perf_tests.harness.schema import AnnotatedStep, Counters, Outcome, Proof, Verdict
from perf_tests.harness.store import ResultError
from perf_tests.history import changes, cli, store
from perf_tests.history.night import Judged, read_night, read_record, write_record
from perf_tests.history.store import HistoryError, append, points, rebuild
from perf_tests.report import cli as report_cli
from tools import simulate_changes


def judge(run: Path, *verdicts: Verdict) -> None:
    """Give a run its `verdicts.json`."""
    write_record(run, "0001_tiny.json", 0, [Judged(test="test_latency", verdict=verdict) for verdict in verdicts])


def test_corrupt_history_does_not_cost_the_run(tmp_path: Path) -> None:
    """The run stays green, its verdicts lie beside its results, and the message says how to rebuild."""
    run, path = stored_run(tmp_path), tmp_path / "results" / "history.db"
    path.write_bytes(b"not SQLite at all" * 100)
    structure = ("perf_tests/test_structure.py",)
    ran = run_suite(tmp_path, "--replay", run, "--history", path, paths=structure)
    assert ran.status == 0, ran.text
    assert "not in the history" in ran.text
    assert "history --rebuild" in ran.text
    assert {own.test for own in read_record(run).judged} == {"test_structure"}
    assert read_record(run).date == "2026-09-01T01:02:03Z"
    held, left = rebuild(path, tmp_path / "results")
    assert (held, len(left)) == (1, 1)
    assert path.with_name("history.db.damaged").read_bytes().startswith(b"not SQLite")
    assert [point.outcomes for point in points(path)] == ["test_structure=pass"] * 4


def test_replay_leaves_nothing_unless_asked(tmp_path: Path) -> None:
    """A replay measures nothing, so it is no night of its own."""
    run = stored_run(tmp_path)
    assert run_suite(tmp_path, "--replay", run, paths=("perf_tests/test_structure.py",)).status == 0
    assert not (run / "verdicts.json").exists()
    assert not (tmp_path / "results" / "history.db").exists()


def test_what_is_kept_of_a_level(tmp_path: Path) -> None:
    """Process medians, what the gate compares, its ratio and limit, environment, fields, and every test's outcome."""
    run = stored_run(tmp_path, 2)
    numbers = {"ratio": 1.25, "limit": 0.05}
    judge(run, Verdict(outcome=Outcome.REGRESSED, level="compile", rule="interval", message="slow", numbers=numbers))
    append(tmp_path / "h.db", [read_night(run)])
    (point,) = points(tmp_path / "h.db", level="compile")
    assert (point.run, point.date, point.slug, point.unit) == (RUN, "2026-09-01T01:02:03Z", "cpu", "of bf16")
    assert point.value == pytest.approx(0.8, rel=0.01)
    assert (point.ratio, point.limit, point.outcomes, point.mark) == (1.25, 0.05, "test_latency=regressed", None)
    assert store.documents(tmp_path / "h.db")[point.environment or ""]["torch"] == "2.13.0"
    with sqlite3.connect(tmp_path / "h.db") as connection:
        (medians,) = connection.execute("SELECT medians_s FROM level WHERE level = 'compile'").fetchone()
        assert connection.execute("SELECT message FROM verdict").fetchone() == ("slow",)
    assert medians.count(",") == 1, "two processes"


@pytest.mark.parametrize(
    ("result", "mark"),
    [
        (changed("compile", result={"injection": "latency=+30%"}), "injected latency=+30%"),
        (failed("compile"), "failed: oom"),
        (changed("compile", result={"counters": Counters(foreign_pids=[7])}), "void"),
        (changed("compile", proofs=[Proof(field="dtype", what="x", observed=1, expected=2)]), "not proven"),
    ],
    ids=["injected", "failed", "void", "not proven"],
)
def test_no_evidence_of_speed_is_kept_but_in_no_trend(tmp_path: Path, result: object, mark: str) -> None:
    """Such a level is listed with its mark and left out of trends."""
    run = stored_run(tmp_path)
    replace(run, result)
    levels = {level.level: level for level in read_night(run).levels}
    assert levels["compile"].mark == mark
    assert levels["fused_qkv"].mark is None
    append(tmp_path / "h.db", [read_night(run)])
    assert [own.level for own in changes.trend(points(tmp_path / "h.db"))] == ["bf16", "fp32", "fused_qkv"]


def test_a_fault_in_the_divisor_keeps_out_what_it_divides(tmp_path: Path) -> None:
    """With bf16 slowed down on purpose every ratio to it is wrong."""
    run = stored_run(tmp_path)
    replace(run, changed("bf16", result={"injection": "latency=+30%"}))
    assert {level.level: level.mark for level in read_night(run).levels} == {
        "fp32": "no bf16", "bf16": "injected latency=+30%", "compile": "no bf16", "fused_qkv": "no bf16"
    }  # fmt: skip


def test_rebuild_gives_the_same_and_says_what_it_left_out(tmp_path: Path) -> None:
    """A night that is judged is the same however it came in; a partial run is named, nights without a folder stay."""
    run = stored_run(tmp_path)
    judge(run, Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="fine"))
    append(tmp_path / "one.db", [read_night(run)])
    partial = tmp_path / "results" / "20260902T010203Z-abc-2"
    partial.mkdir()
    (partial / "run.json").write_bytes((run / "run.json").read_bytes())
    append(tmp_path / "two.db", [night(0, [level_night("bf16", 1.0)])])
    held, left = rebuild(tmp_path / "two.db", tmp_path / "results")
    assert held == 1
    assert len(left) == 1
    assert "20260902T010203Z-abc-2" in left[0]
    assert points(tmp_path / "two.db", run=RUN) == points(tmp_path / "one.db")
    assert len(points(tmp_path / "two.db")) == 5


def test_one_malformed_night_costs_only_itself(tmp_path: Path) -> None:
    """A test judged twice, and a folder whose name is no text: both are left out, older nights and the file stay."""
    run, path = stored_run(tmp_path), tmp_path / "h.db"
    judge(run, Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="fine"))
    twice = shutil.copytree(run, run.with_name("20260902T010203Z-abc-2")) / "verdicts.json"
    record = json.loads(twice.read_text())
    twice.write_text(json.dumps({**record, "judged": record["judged"] * 2}))
    shutil.copytree(run, run.with_name(os.fsdecode(b"20260903T010203Z-\xff")))
    append(path, [night(0, [level_night("bf16", 1.0)])])
    held, left = rebuild(path, tmp_path / "results")
    assert held == 1
    assert "test_latency[bf16] is judged twice" in left[0]
    assert "20260903T010203Z-? does not fit" in left[1]
    assert len(left) == 2
    assert {point.run for point in points(path)} == {RUN, "20260101T030000Z-abc-0"}
    assert not list(tmp_path.glob("*damaged*"))


def test_nothing_is_lost_while_a_damaged_history_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each damaged file is kept under a name of its own; until the new one is whole the old one keeps its place."""
    stored_run(tmp_path)
    path = tmp_path / "h.db"
    for content in (b"first" * 900, b"second" * 900):
        path.write_bytes(content)
        with monkeypatch.context() as patched:
            patched.setattr(store, "_set_aside", lambda path: (_ for _ in ()).throw(OSError("no room")))
            with pytest.raises(HistoryError, match="no room"):
                rebuild(path, tmp_path / "results")
        assert path.read_bytes() == content
        assert rebuild(path, tmp_path / "results")[0] == 1
        assert {point.run for point in points(path)} == {RUN}
    kept = {file.name: file.read_bytes()[:5] for file in tmp_path.glob("*.db*")}
    assert (kept.pop("h.db.damaged"), kept.pop("h.db.damaged.2")) == (b"first", b"secon")
    assert kept.keys() == {"h.db"}


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    """A pipe and a link to a damaged file stay as they are."""
    stored_run(tmp_path)
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_bytes(b"damaged" * 900)
    link.symlink_to(target)
    for path, said in ((pipe, "not a regular file"), (link, "a link to a damaged history")):
        with pytest.raises(HistoryError, match=said):
            rebuild(path, tmp_path / "results")
    assert link.readlink() == target
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "results", "target"]


def test_first_append_that_fails_leaves_no_file(tmp_path: Path) -> None:
    """An empty file would be taken for a damaged history."""
    with pytest.raises(HistoryError, match="does not fit the history"):
        append(tmp_path / "h.db", [night(0, [level_night("bf16", 1.0)], exit_status=10**30)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("old", "new"), [("{", '{"exit_status": 1,'), ('"exit_status": 0', '"exit_status": NaN')])
def test_verdicts_are_read_as_strictly_as_results(tmp_path: Path, old: str, new: str) -> None:
    """A key twice and what is no number: the sentence says how to make the file again."""
    run = stored_run(tmp_path)
    judge(run, Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="fine"))
    path = run / "verdicts.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ResultError, match=r"verdicts.json: not JSON as it was written .*make it again with `pytest"):
        read_record(run)


NUMBERS = {"ratio": 1.0, "limit": 0.05}


@pytest.mark.parametrize(
    "change",
    [
        {"date": "2026-02-30T00:00:00Z"},
        {"date": "9999-99-99T99:99:99Z"},
        {"date": "0000-01-01T00:00:00Z"},
        {"exit_status": 10**30},
        *({"numbers": NUMBERS | odd} for odd in ({"ratio": 0}, {"ratio": -1.0}, {"ratio": 5e-324}, {"limit": -1.0})),
    ],
    ids=str,
)
def test_verdicts_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A day that is none, a ratio that no two times have: a rebuild leaves that run out and says so."""
    run = stored_run(tmp_path)
    judge(run, Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="fine", numbers=NUMBERS))
    path = run / "verdicts.json"
    record = json.loads(path.read_text())
    record["judged"][0]["verdict"]["numbers"] = change.get("numbers", NUMBERS)
    path.write_text(json.dumps(record | {name: value for name, value in change.items() if name != "numbers"}))
    held, left = rebuild(tmp_path / "h.db", tmp_path / "results")
    assert held == 0
    assert [sentence for sentence in left if "verdicts.json is damaged at" in sentence] == left != []


def test_folder_named_by_no_time_is_left_out(tmp_path: Path) -> None:
    """The other runs are in the history all the same."""
    run = stored_run(tmp_path)
    shutil.copytree(run, run.with_name("20269999T999999Z-x"))
    held, left = rebuild(tmp_path / "h.db", tmp_path / "results")
    assert held == 1
    assert "20269999T999999Z-x: when it ran cannot be told" in left[0]


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE level SET mark = CAST(x'61ff' AS TEXT)",
        "UPDATE document SET json = CAST(x'7b22ff223a317d' AS TEXT)",
        "UPDATE document SET json = '[]'",
        "UPDATE run SET date = '2026-13-01T00:00:00Z'",
        "UPDATE level SET ratio = 0",
        "UPDATE level SET value = -1",
    ],
)
def test_spoilt_row_is_a_damaged_history(tmp_path: Path, spoil: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names the rebuild, and the rebuild mends it."""
    run = stored_run(tmp_path)
    judge(run, Verdict(outcome=Outcome.PASS, level="bf16", rule="interval", message="fine", numbers=NUMBERS))
    path = tmp_path / "h.db"
    append(path, [read_night(run)])
    with sqlite3.connect(path) as connection:
        connection.execute(spoil)
    assert cli.main(["--history", str(path), "--changes"]) == 2
    error = capsys.readouterr().err
    assert "history --rebuild" in error
    assert error.count("\n") == 1
    assert rebuild(path, tmp_path / "results")[0] == 1
    assert cli.main(["--history", str(path), "--changes"]) == 0


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "NUL"])
def test_name_that_no_file_can_have(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence of every command that reads a run or a history."""
    path = str(tmp_path / name)
    for main, arguments in (
        (report_cli.main, [path]),
        (export.main, [path]),
        (cli.main, ["--history", path]),
        (cli.main, ["--history", path, "--rebuild", "--results", str(tmp_path)]),
        (cli.main, ["--results", path, "--rebuild"]),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_locked_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the wait it is one sentence, and nothing was added."""
    monkeypatch.setattr(store, "WAIT_S", 0.05)
    path = tmp_path / "h.db"
    append(path, [night(0, [level_night("bf16", 1.0)])])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(HistoryError, match=r"locked; the results are safe; wait .* --rebuild"):
        append(path, [night(1, [level_night("bf16", 1.0)])])
    holder.close()
    assert len(points(path)) == 1


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """Neither an append nor a rebuild adds tables to it or moves it away."""
    path = tmp_path / "h.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    stored_run(tmp_path)
    for act in (lambda: append(path, []), lambda: rebuild(path, tmp_path / "results")):
        with pytest.raises(HistoryError, match="not a history of this suite"):
            act()
    assert path.read_bytes() == before


def test_empty_file_can_be_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk leaves one: the message names the rebuild, and the rebuild makes a history of the runs."""
    stored_run(tmp_path)
    path = tmp_path / "h.db"
    path.touch()
    assert cli.main(["--history", str(path)]) == 2
    assert "an empty file; the results are safe; rebuild it with `python -m" in capsys.readouterr().err
    assert cli.main(["--history", str(path), "--results", str(tmp_path / "results"), "--rebuild"]) == 0
    assert {point.run for point in points(path)} == {RUN}


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + b"\xff" * 4000, "folder"])
def test_unreadable_history_is_a_sentence(tmp_path: Path, content: bytes | str, capsys: object) -> None:
    """An empty file, a broken header, a folder: exit status 2 and no traceback."""
    path = tmp_path / "h.db"
    path.mkdir() if isinstance(content, str) else path.write_bytes(content)
    assert cli.main(["--history", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_list_filters_and_hides_control_characters(tmp_path: Path, capsys: object) -> None:
    """One line a night, or a level; a filter that nothing fits says so."""
    path = tmp_path / "h.db"
    append(path, nights(3, ["bf16", "compile"]))
    append(path, [night(3, [level_night("bf16", 1.0, mark="injected \x1b[2J")])])
    said = []
    for options in ([], ["--level=compile", "--until=2026-01-02"], ["--outcome=regressed"], ["--last=1"]):
        assert cli.main(["--history", str(path), *options]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in said] == [5, 3, 1, 2]
    assert said[2] == ["no night fits"]
    assert "bf16 (injected ?[2J)" in said[3][1]


def test_change_is_found_with_what_moved(tmp_path: Path) -> None:
    """A step well above the noise is dated to its night, and the package that moved there is named."""
    path = tmp_path / "h.db"
    append(path, nights(90, ["compile"], {"compile": {60: 1.03}}, noise=0.003))
    (change,) = changes.find_changes(points(path), [], store.documents(path))
    assert (change.date, change.known, change.moved) == ("2026-03-02", None, ["torch 2.13.0 -> 2.14.0"])
    assert change.ratio == pytest.approx(1.03, abs=0.005)


def test_creep_adds_up(tmp_path: Path) -> None:
    """Ten steps that no night could show are found together, and their sum is told."""
    path = tmp_path / "h.db"
    append(path, nights(120, ["compile"], {"compile": {day: 1.005 for day in range(20, 110, 9)}}))
    found = changes.find_changes(points(path), [], {})
    assert found
    assert 1.03 < (changes.creep(points(path), found) or 0) < 1.06


def test_annotated_step_explains_one_change(tmp_path: Path) -> None:
    """A step accepted some days later explains the change before it, not a second one, nor one long before."""
    path = tmp_path / "h.db"
    append(path, nights(120, ["compile"], {"compile": {40: 1.05, 80: 1.05}}))
    first = changes.find_changes(points(path), [], {})
    assert len(first) == 2
    step = AnnotatedStep(level="compile", date="2026-03-26", ratio=1.05, reason="new kernel")
    found = changes.find_changes(points(path), [step], {})
    assert [change.known for change in found] == [None, "new kernel"]
    late = step.model_copy(update={"date": "2026-05-01"})
    assert LONGEST.days < 40
    assert [change.known for change in changes.find_changes(points(path), [late], {})] == [None, None]


def test_quiet_and_odd_nights_are_no_change(tmp_path: Path) -> None:
    """Noise, and single nights far off, the last one too; under twenty nights nothing is said."""
    path = tmp_path / "h.db"
    quiet = nights(100, ["compile"])
    odd = [night(day, [level_night("compile", 1.5)]) for day in (17, 50, 99)]
    append(path, [*quiet, *odd])
    assert changes.find_changes(points(path), [], {}) == []
    assert changes.find_changes(points(path)[:19], [], {}) == []


def test_simulated_series_are_ones_that_the_history_takes() -> None:
    """`tools.simulate_changes` makes its own points."""
    series = simulate_changes.points(np.repeat([0.0, 0.1], 30) + 0.01 * np.sin(np.arange(60)))
    assert [change.run for change in changes.find_changes(series, [], {})] == ["run30"]

"""A search over several machines: a pool that is made up, in which each order really runs. Nothing is installed."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from perf_tests.bisect import cli
from perf_tests.bisect.bisection import Bisection
from perf_tests.bisect.environments import NoSuchVersionError, Recipe
from perf_tests.bisect.machines import Here, NoMachine
from perf_tests.bisect.search import Found
from perf_tests.bisect.several import Several, kind_of_search
from perf_tests.bisect.state import Judged, Kind, Question, State, load
from perf_tests.harness.files import StoreError
from perf_tests.sweep.cells import Node
from perf_tests.sweep.dispatch import SWEEP_FILE, NodeLost, Work
from perf_tests.sweep.work import Delivery, Machine

NAMES = [f"2.{minor}.0" for minor in range(10, 40)]
KIND = "h200-700w"
QUIET: Callable[[str], None] = lambda line: None  # noqa: E731


def asked(folder: Path, test: str = "test_latency[float8]", against: str = "good") -> Question:
    return Question(
        axis="torch", versions=NAMES, test=test, against=against, over_base=False, bad_is_error=False, workload="tiny",
        processes=None, index_url=None, pre=False, baseline_folder=str(folder / "baselines"),
    )  # fmt: skip


class Suite:
    """Stands in for environments and suite on every machine; versions from `first_bad` are bad."""

    def __init__(self, first_bad: str = "2.23.0", missing: Sequence[str] = ()) -> None:
        self.first_bad, self.missing = first_bad, missing
        self.runs: list[str] = []
        self.environments: list[set[str]] = []

    def build(self, _: Recipe, version: str, folder: Path) -> Path:
        if version in self.missing:
            raise NoSuchVersionError("cannot be installed (status 1): no such version")
        folder.mkdir(parents=True, exist_ok=True)
        self.environments.append({path.name for path in folder.parent.iterdir()})
        return folder

    def record(self, question: Question, python: Path, root: Path) -> Judged:
        self.runs.append(f"record {python.name}")
        write(Path(str(question.baseline_folder), KIND, "0001_tiny.json"), "recorded")
        return Judged(kind=Kind.GOOD, why="", folder=str(write(root / "1" / "log.txt", "recorded").parent))

    def judge(self, question: Question, python: Path, root: Path) -> Judged:
        assert Path(str(question.baseline_folder), KIND, "0001_tiny.json").read_text() == "recorded"
        self.runs.append(python.name)
        folder = write(root / "1" / "results" / "bf16" / "result.json", python.name).parents[2]
        kind = Kind.BAD if python.name >= self.first_bad else Kind.GOOD
        return Judged(kind=kind, why=f"see {folder}/log.txt", folder=str(folder))

    @property
    def stand_ins(self) -> Mapping[str, Any]:
        return {"build": self.build, "judge": self.judge, "record": self.record}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class MadeUpPool:
    """Machines on paper; those in `dies` are lost with their first order. The last one started is done first."""

    def __init__(self, nodes: Sequence[Node], dies: Sequence[str] = ()) -> None:
        self.there = {node.id: node for node in nodes}
        self.dies = dies
        self.open: dict[object, tuple[str, Work]] = {}
        self.most: dict[str, int] = {}

    def nodes(self) -> list[Node]:
        return list(self.there.values())

    def start(self, node: Node, work: Work) -> object:
        ticket = object()
        self.open[ticket] = (node.id, work)
        running = [id for id, _ in self.open.values()]
        self.most[node.id] = max(self.most.get(node.id, 0), running.count(node.id))
        return ticket

    def finished(self, tickets: Sequence[object]) -> object:
        return tickets[-1]

    def take(self, ticket: object) -> Delivery:
        node, work = self.open.pop(ticket)
        if node in self.dies:
            self.there.pop(node, None)
            raise NodeLost("the power went")
        return work.run()

    def close(self) -> None:
        self.there.clear()


def nodes(ids: str, kind: str = KIND, slots: int = 1) -> list[Node]:
    return [Node(id, kind, kind, slots) for id in ids]


def bisect(tmp: Path, suite: Suite, pool: MadeUpPool) -> Bisection:
    state = load(tmp, asked(tmp))
    kind = kind_of_search(tmp, state, pool.nodes())
    several = Several(tmp, state.question, RECIPE, pool, kind, tmp / "cache", QUIET, **suite.stand_ins)
    return Bisection(state, tmp, QUIET, several)


RECIPE = Recipe(component="torch")
ANSWER = Found(last_good=12, first_bad=13, between=(), good_again=())


def attempts(tmp: Path) -> dict[str, list[tuple[str, str]]]:
    """Run -> (machine, outcome) of each attempt, from `sweep.json`."""
    cells = json.loads((tmp / SWEEP_FILE).read_text())["cells"]
    return {
        f"{cell['version']}/{cell['process']}": [(own["node"], own["outcome"]) for own in cell["attempts"]]
        for cell in cells
    }


def test_every_slot_judges_by_the_one_recorded_baseline(tmp_path: Path) -> None:
    """One machine records, then each slot has a version; runs are gathered whole, and verdicts name their place."""
    suite, pool = Suite(), MadeUpPool([*nodes("a", slots=3), *nodes("b")])
    search = bisect(tmp_path, suite, pool)
    assert search.run() == ANSWER
    assert suite.runs[0] == "record 2.10.0" and suite.runs[1:3] == ["2.39.0", "2.10.0"]
    assert pool.most == {"a": 3, "b": 1}
    assert (tmp_path / "baselines" / KIND / "0001_tiny.json").read_text() == "recorded"
    for version, runs in search.state.judged.items():
        for run in runs:
            assert Path(run.folder).parent == tmp_path / "runs" / version and run.why == f"see {run.folder}/log.txt"
            assert (Path(run.folder) / "results" / "bf16" / "result.json").read_text() == version
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_version_is_judged_again_on_another_machine(tmp_path: Path) -> None:
    """Two votes that confirm each other are not of one card."""
    search = bisect(tmp_path, Suite(), MadeUpPool(nodes("abcd")))
    search.run()
    ran = attempts(tmp_path)
    for version in ("2.22.0", "2.23.0"):
        assert len(search.state.judged[version]) == 2
        assert len({node for name, own in ran.items() if name.startswith(version) for node, _ in own}) == 2


def test_lost_machines_version_is_judged_elsewhere(tmp_path: Path) -> None:
    """On the same kind of machine; the attempt is recorded, the vote counts once and the other kind stays idle."""
    pool = MadeUpPool([*nodes("abc"), *nodes("xy", "h100-700w")], dies="b")
    search = bisect(tmp_path, Suite(), pool)
    assert search.run() == ANSWER
    ran = attempts(tmp_path)
    (lost,) = [own for own in ran.values() if len(own) > 1]
    assert lost[0] == ("b", "lost") and lost[1][0] in "ac" and lost[1][1] == "measured"
    assert {node for own in ran.values() for node, _ in own} == set("abc")
    assert sum(map(len, search.state.judged.values())) == len(ran) - 1, "all but the recording are votes"


def test_version_that_takes_three_machines_with_it_is_left_out(tmp_path: Path) -> None:
    """And so is one that cannot be installed; the search goes around both."""
    suite, pool = Suite(missing=["2.17.0"]), MadeUpPool(nodes("abcdefg"))
    take = pool.take

    def lose(ticket: object) -> Delivery:
        if pool.open[ticket][1].version == "2.23.0":
            del pool.there[pool.open.pop(ticket)[0]]
            raise NodeLost("the power went")
        return take(ticket)

    pool.take = lose
    search = bisect(tmp_path, suite, pool)
    assert search.run() == Found(last_good=12, first_bad=14, between=(13,), good_again=())
    assert len(pool.there) == 4
    assert search.state.closed["2.23.0"] == "lost with 3 machines"
    assert set(search.state.closed) == {"2.17.0", "2.23.0"}


def test_search_goes_on_when_there_are_machines_again(tmp_path: Path) -> None:
    """With the last machine it ends in a sentence; the same state goes on with another number of them."""
    first, pool = Suite(), MadeUpPool(nodes("ab"))
    take = pool.take

    def lose_all(ticket: object) -> Delivery:
        if len(first.runs) >= 6:
            pool.there.clear()
            pool.open.pop(ticket)
            raise NodeLost("the power went")
        return take(ticket)

    pool.take = lose_all
    with pytest.raises(NoMachine, match=f"no machine of kind '{KIND}' is left"):
        bisect(tmp_path, first, pool).run()
    second = Suite()
    assert bisect(tmp_path, second, MadeUpPool(nodes("wxyz"))).run() == ANSWER
    assert not any(run.startswith("record") for run in second.runs)
    again = set(first.runs) & set(second.runs)
    assert again <= {"2.22.0", "2.23.0"}, "only what is confirmed is judged a second time"
    state = load(tmp_path, asked(tmp_path))
    assert len(state.judged["2.22.0"]) == len(state.judged["2.23.0"]) == 2


def test_a_pools_search_goes_on_without_it(tmp_path: Path) -> None:
    """The state is the same: what one machine does with it needs no pool."""
    assert bisect(tmp_path, Suite(), MadeUpPool(nodes("abc"))).run() == ANSWER
    suite, state = Suite(), load(tmp_path, asked(tmp_path))
    here = Here(tmp_path, state.question, RECIPE, QUIET, **suite.stand_ins)
    assert Bisection(state, tmp_path, QUIET, here).run() == ANSWER
    assert suite.runs == []


def test_machines_keep_the_environments_of_bracket_and_step(tmp_path: Path) -> None:
    """Each is gigabytes: with four at a time at most six lie on a machine."""
    suite = Suite()
    bisect(tmp_path, suite, MadeUpPool(nodes("a", slots=4))).run()
    assert max(map(len, suite.environments)) <= 6
    (left,) = tmp_path.glob("cache/bisect/*/environments")
    assert {"2.22.0", "2.23.0"} <= {path.name for path in left.iterdir()}


def test_search_stays_on_its_kind_of_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most slots at first, then the kind it was begun on, which may be this machine's; any other is refused."""
    new = State(question=asked(tmp_path))
    mixed = [*nodes("a"), *nodes("xy", "h100-700w")]
    assert kind_of_search(tmp_path, new, mixed) == "h100-700w"
    begun = new.model_copy(update={"is_recorded": True})
    monkeypatch.setattr("perf_tests.bisect.several.describe_machine", lambda: Machine(KIND, KIND, {}))
    assert kind_of_search(tmp_path, begun, mixed) == KIND
    bisect(tmp_path, Suite(), MadeUpPool(nodes("ab"))).run()
    assert kind_of_search(tmp_path, load(tmp_path, asked(tmp_path)), mixed) == KIND
    with pytest.raises(ValueError, match=f"begun on {KIND} and there is only h100-700w: what two kinds"):
        kind_of_search(tmp_path, begun, nodes("xy", "h100-700w"))
    with pytest.raises(ValueError, match="no machine that answers"):
        kind_of_search(tmp_path, new, [])


@pytest.mark.parametrize("content", ["{", '{"sweep_schema": 1, "cells": [{}]}'])
def test_damaged_record_of_machines_is_refused(tmp_path: Path, content: str) -> None:
    """It says which kind the search was begun on, so it is not passed over."""
    write(tmp_path / SWEEP_FILE, content)
    with pytest.raises(StoreError, match=SWEEP_FILE):
        kind_of_search(tmp_path, State(question=asked(tmp_path)), nodes("a"))


def test_without_ray_versions_are_judged_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says so and answers; another kind of machine is then refused, with and without Ray."""
    machine = Machine("a cpu", "cpu", {})
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "perf_tests.sweep.ray_pool", raising=False)
    monkeypatch.setattr("perf_tests.sweep.pools.describe_machine", lambda: machine)
    monkeypatch.setattr(cli, "describe_machine", lambda: machine)
    monkeypatch.setattr(cli, "Several", functools.partial(Several, **Suite().stand_ins))
    options = ["--axis", "torch", "--versions", ",".join(NAMES), "--good", NAMES[0], "--bad", NAMES[-1]]
    options += ["--test", "test_latency[float8]", "--state", str(tmp_path / "s")]
    with_ray = ["--ray", "local", "--cache", str(tmp_path / "cache")]
    assert cli.main([*options, *with_ray]) == cli.FOUND
    told = capsys.readouterr()
    assert "Ray is not installed" in told.err and "up to 1 version(s) at a time on a cpu" in told.err
    assert "first bad: torch 2.23.0" in told.out
    assert cli.main(options) == cli.FOUND
    machine = Machine("another cpu", "cpu", {})
    for more in ([], with_ray):
        capsys.readouterr()
        assert cli.main([*options, *more]) == cli.BAD_INPUT
        assert "was begun on a cpu and there is only another cpu" in capsys.readouterr().err.splitlines()[-1]

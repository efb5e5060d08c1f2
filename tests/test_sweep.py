"""Cells and machines, with a pool that is made up; and once on a local Ray cluster, a node of which is killed."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from perf_tests.harness.cpu import cpu_name
from perf_tests.harness.lease import GpuBusy
from perf_tests.harness.progress import CPU_DEADLINES
from perf_tests.harness.replay import open_run
from perf_tests.harness.runner import run_level
from perf_tests.harness.stored_run import read_facts, read_run
from perf_tests.sweep import cli
from perf_tests.sweep.cells import AS_INSTALLED, Cell, Node, all_cells, choose_kinds
from perf_tests.sweep.dispatch import SWEEP_FILE, NodeLost
from perf_tests.sweep.driver import Sweep
from perf_tests.sweep.gather import gather
from perf_tests.sweep.serial import SerialPool
from perf_tests.sweep.work import Delivery, Machine, Order, describe_machine

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
LEVELS = ("fp32", "bf16", "compile")
CELLS = all_cells(["tiny"], [AS_INSTALLED], LEVELS, 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a worker leaves."""
    folder = tmp_path_factory.mktemp("worker")
    run_level("bf16", "tiny", 0, folder, deadlines=CPU_DEADLINES, worker_command=FAKE_WORKER)
    return {path.name: path.read_bytes() for path in (folder / "bf16" / "0").iterdir()}


class MadeUpPool:
    """Machines on paper; `dies` machines are lost with the first cell that they get."""

    def __init__(self, nodes: Sequence[Node], files: dict[str, bytes], dies: Sequence[str] = ()) -> None:
        self.there = {node.id: node for node in nodes}
        self.files, self.dies = files, dies
        self.most: dict[str, int] = {}
        self.ran: list[tuple[str, Cell]] = []
        self._open: dict[object, tuple[str, Order]] = {}

    def nodes(self) -> list[Node]:
        return list(self.there.values())

    def start(self, node: Node, order: Order) -> object:
        ticket = object()
        self._open[ticket] = (node.id, order)
        self.most[node.id] = max(self.most.get(node.id, 0), sum(own == node.id for own, _ in self._open.values()))
        return ticket

    def finished(self, tickets: Sequence[object]) -> object:
        return tickets[0]

    def take(self, ticket: object) -> Delivery:
        node, order = self._open.pop(ticket)
        if node in self.dies:
            self.there.pop(node, None)
            raise NodeLost("the power went")
        self.ran.append((node, order.cell))
        result = json.loads(self.files["result.json"]) | {"level": order.cell.level, "process": order.cell.process}
        return Delivery({**self.files, "result.json": json.dumps(result).encode()})

    def close(self) -> None:
        pass


def node(id: str, kind: str = "h200-700w", slots: int = 1) -> Node:
    return Node(id, kind, kind, slots)


def sweep(tmp: Path, pool: MadeUpPool, cells: Sequence[Cell] = CELLS) -> Sweep:
    own = Sweep(tmp, cells, {"tiny": "h200-700w"}, None, tmp / "cache", lambda line: None)
    own.run(pool)
    return own


def test_every_slot_works_and_none_twice(tmp_path: Path, files: dict[str, bytes]) -> None:
    """One worker a GPU at a time; every cell is measured once and lies in its place."""
    pool = MadeUpPool([node("a", slots=2), node("b")], files)
    records = sweep(tmp_path, pool).records
    assert pool.most == {"a": 2, "b": 1}
    assert sorted(cell for _, cell in pool.ran) == sorted(CELLS)
    assert {attempt.outcome for record in records.values() for attempt in record.attempts} == {"measured"}
    assert len(json.loads((tmp_path / SWEEP_FILE).read_text())["cells"]) == len(CELLS)


def test_lost_machines_cells_run_elsewhere_on_the_same_kind(tmp_path: Path, files: dict[str, bytes]) -> None:
    """The attempt that was lost is recorded; the other kind stays idle."""
    pool = MadeUpPool([node("a"), node("b"), node("other", "h100-700w")], files, dies=["a"])
    records = sweep(tmp_path, pool).records
    (lost,) = [record for record in records.values() if len(record.attempts) > 1]
    assert [(attempt.node, attempt.outcome) for attempt in lost.attempts] == [("a", "lost"), ("b", "measured")]
    assert lost.attempts[0].said == "the power went"
    assert {where for where, _ in pool.ran} == {"b"}


def test_no_machine_of_the_kind_is_left(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Each cell says so, what was measured stays, and the same sweep goes on from there."""
    pool = MadeUpPool([node("a", slots=2), node("other", "h100-700w")], files, dies=["a"])
    first = sweep(tmp_path, pool)
    assert all("no machine of kind 'h200-700w' is left" in str(record.unrun) for record in first.records.values())
    gather(tmp_path / CELLS[0].path, files)
    pool = MadeUpPool([node("b")], files)
    sweep(tmp_path, pool)
    assert sorted(cell for _, cell in pool.ran) == sorted(CELLS[1:])


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`(pool, *options)`: the command into one folder."""

    def run(pool: MadeUpPool, *options: str) -> int:
        monkeypatch.setattr(cli, "open_pool", lambda *_: pool)
        return cli.main(["--ray", "auto", "--levels", "fp32,bf16", "--out", str(tmp_path / "out"), *options])

    return run


def test_sweep_goes_on_where_it_was_begun(
    tmp_path: Path, files: dict[str, bytes], on: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first kind of machine or not at all, and every attempt stays on record."""
    out = tmp_path / "out"
    assert on(MadeUpPool([node("a"), node("b", slots=2)], files, dies="b"), "--levels", "fp32,bf16,compile") == 0
    begun = (out / SWEEP_FILE).read_bytes()
    assert on(MadeUpPool([node("c", "h100-700w")], files), "--processes", "2") == cli.BAD_INPUT
    assert "tiny was begun on h200-700w and there is only h100-700w" in capsys.readouterr().err
    assert (out / SWEEP_FILE).read_bytes() == begun and read_facts(out / AS_INSTALLED / "tiny").slug == "h200-700w"
    pool = MadeUpPool([node("c", "h100-700w", 9), node("d")], files)
    assert on(pool, "--processes", "2") == 0
    assert {cell.process for _, cell in pool.ran} == {1} and {where for where, _ in pool.ran} == {"d"}
    records = json.loads((out / SWEEP_FILE).read_text())["cells"]
    assert records[:3] == json.loads(begun)["cells"] and len(records) == 5
    assert any(own["outcome"] == "lost" for record in records for own in record["attempts"])
    assert "4 of 4 cells have a result; 1 lost a machine" in capsys.readouterr().out


def test_folder_of_another_axis_is_refused(
    files: dict[str, bytes], on: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """1.0 of one component is not 1.0 of another one."""
    pool = MadeUpPool([node("a")], files)
    assert on(pool, "--base-env", "--axis", "torchao", "--versions", "1.0") == 0
    assert on(pool) == 0
    assert on(pool, "--base-env", "--axis", "diffusers", "--versions", "1.0") == cli.BAD_INPUT
    assert "holds a sweep over torchao, asked is diffusers" in capsys.readouterr().err


def test_cell_that_takes_every_machine_with_it_is_given_up(tmp_path: Path, files: dict[str, bytes]) -> None:
    """After three machines."""
    pool = MadeUpPool([node(id) for id in "abcde"], files, dies="abcde")
    (record,) = sweep(tmp_path, pool, cells=CELLS[:1]).records.values()
    assert len({attempt.node for attempt in record.attempts}) == 3
    assert record.unrun == "lost with 3 machines"
    assert len(pool.there) == 2


def test_gathered_whole_or_not_at_all(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A name cannot leave the folder, and a second delivery changes nothing."""
    place = tmp_path / "run" / "bf16" / "0"
    gather(place, {**files, "../../escaped": b"x", "/below/root": b"y"})
    assert not (tmp_path / "run" / "escaped").exists() and (place / "escaped").exists()
    assert (place / "below" / "root").read_bytes() == b"y"
    gather(place, {"result.json": b"other"})
    assert (place / "result.json").read_bytes() == files["result.json"]


def test_workloads_go_where_the_fewest_wait() -> None:
    """Each to one kind of machine."""
    nodes = [node("a", slots=8), node("b", "h100-700w", 4)]
    assert choose_kinds(["tiny"], nodes, {}) == {"tiny": "h200-700w"}
    assert sorted(choose_kinds(["x", "y", "z"], nodes, {}).values()) == ["h100-700w", "h200-700w", "h200-700w"]
    assert choose_kinds(["x", "y"], nodes, {"x": {"h100-700w"}}) == {"x": "h100-700w", "y": "h200-700w"}


def test_version_that_cannot_be_installed_is_said(tmp_path: Path, files: dict[str, bytes]) -> None:
    """The cell has no result and is not tried again."""
    pool = MadeUpPool([node("a")], files)
    pool.take = lambda ticket: Delivery({}, "cannot be installed (status 1): no such version")
    (record,) = sweep(tmp_path, pool, cells=CELLS[:1]).records.values()
    assert record.unrun == record.attempts[0].said == "cannot be installed (status 1): no such version"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), GpuBusy("GPU 0 is held")])
def test_machine_that_cannot_run_a_cell_fails_that_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The others are measured, and the record says why it was not."""

    def run(level: str, *arguments: object, **options: object) -> object:
        if level == "bf16":
            raise error
        return run_level(level, *arguments, **options)

    monkeypatch.setattr("perf_tests.sweep.work.runner.run_level", run)
    own = Sweep(tmp_path, CELLS[:2], {"tiny": "a cpu"}, None, tmp_path / "cache", lambda line: None, FAKE_WORKER)
    fp32, bf16 = own.run(SerialPool(Machine("a cpu", "cpu", {})))
    assert fp32.attempts[0].outcome == "measured" and bf16.attempts[0].outcome == "failed"
    assert bf16.unrun == bf16.attempts[0].said == str(error)


def test_result_that_cannot_be_kept_fails_its_cell(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A disk that is full here, or a result that is none; nothing half remains."""
    (tmp_path / AS_INSTALLED / "tiny").mkdir(parents=True)
    (tmp_path / AS_INSTALLED / "tiny" / "bf16").write_text("in the way")
    own = sweep(tmp_path, MadeUpPool([node("a")], files))
    by_level = {record.level: record for record in own.records.values()}
    assert "bf16" in str(by_level["bf16"].unrun) and by_level["bf16"].attempts[0].outcome == "failed"
    assert by_level["compile"].unrun is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_cluster_without_a_machine_is_a_sentence(
    files: dict[str, bytes], on: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what to start."""
    assert on(MadeUpPool([], files)) == cli.BAD_INPUT
    assert "no machine that answers" in capsys.readouterr().err


def test_levels_that_no_machine_can_run_are_refused(
    on: Callable[..., int], files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """References alone answer nothing."""
    pool = MadeUpPool([dataclasses.replace(node("a"), unavailable={"fa3_fp8": "no Hopper"})], files)
    assert on(pool, "--levels", "fa3_fp8") == cli.BAD_INPUT and not pool.ran
    assert "tiny: h200-700w can run none of fa3_fp8: no Hopper" in capsys.readouterr().err


def test_machine_tells_of_the_ladder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else the package can build is no test of the suite, and a replay would refuse it."""
    levels = {"bf16": None, "fa3_fp8": "no Hopper", "flux_fast": "no Hopper"}
    monkeypatch.setattr(
        "perf_tests.sweep.work.ask_machine", lambda: {"device": "cpu", "cpu_capability": "AVX2", "levels": levels}
    )
    machine = describe_machine()
    assert machine.unavailable == {"fa3_fp8": "no Hopper"}
    assert (machine.slug, machine.kind) == ("cpu-avx2", f"{cpu_name()}, cpu-avx2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workloads", "huge"), "huge"),
        (("--levels", "int4"), "int4"),
        (("--levels", "flux_fast"), "not on the ladder"),
        (("--versions", "1.0"), "--axis and --versions go together"),
        (("--processes", "0"), "at least 1"),
        (("--axis", "torch", "--versions", "../../ESC"), "'../../ESC' is not a version"),
        (("--axis", "torch", "--versions", "2.11.0,/tmp/x"), "'/tmp/x' is not a version"),
        (("--axis", "torch", "--versions", "2.11.0,,"), "'' is not a version"),
        (("--workloads", "tiny@/../../ESC"), "without '..'"),
        (("--out", __file__), "File exists: '" + __file__ + "'; --out has to be a folder"),
        (("--out", f"{__file__}/below"), "Not a directory"),
    ],
)
def test_bad_input_is_a_sentence(
    options: Sequence[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
) -> None:
    """Status 2 before any cell runs."""
    pool = MadeUpPool([node("a")], files)
    monkeypatch.setattr(cli, "open_pool", lambda *_: pool)
    assert cli.main(["--ray", "local", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not pool.ran


def test_without_ray_cells_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says so, and each run it leaves is one that `--replay` reads."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "perf_tests.sweep.ray_pool", raising=False)
    monkeypatch.setattr(
        "perf_tests.sweep.pools.describe_machine", lambda: Machine("a cpu", "cpu", {"fa3_fp8": "no Hopper"})
    )
    monkeypatch.setattr("perf_tests.sweep.work.WORKER", FAKE_WORKER[1:])
    out = tmp_path / "out"
    options = ["--ray", "local", "--levels", "fa3_fp8,float8", "--processes", "2"]
    assert cli.main([*options, "--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
    told = capsys.readouterr()
    assert "Ray is not installed" in told.err and "fa3_fp8 is left out on a cpu: no Hopper" in told.err
    assert "8 of 8 cells have a result; 0 lost a machine" in told.out
    run = out / AS_INSTALLED / "tiny"
    assert read_facts(run).levels == ["float8"]
    # References came along, and without FA3 float8 stands over channels_last.
    assert list(open_run(run, None).results) == ["fp32", "bf16", "channels_last", "float8"]
    assert len(read_run(run, ["bf16"], 2)["bf16"]) == 2

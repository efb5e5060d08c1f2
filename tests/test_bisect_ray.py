"""A search on a local Ray cluster of two nodes. Skipped where Ray is not installed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from perf_tests.bisect.bisection import Bisection
from perf_tests.bisect.environments import Recipe
from perf_tests.bisect.search import Found
from perf_tests.bisect.several import Several, kind_of_search
from perf_tests.bisect.state import Judged, Kind, Question, State
from perf_tests.sweep.dispatch import stored_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: `pip install -e '.[sweep]'`")

MEETING_S = 60.0


def test_both_nodes_judge_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither end is judged before the other one's run has begun, on another node; the runs are gathered."""
    from ray.cluster_utils import Cluster

    from perf_tests.sweep import ray_pool
    from perf_tests.sweep.work import Machine

    # Functions of this function: Ray sends them as they are, where a module of the tests could not be imported.
    def build(_: Recipe, version: str, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def judge(_: Question, python: Path, root: Path) -> Judged:
        version, since = python.name, time.monotonic()
        (root / "1").mkdir(parents=True)
        (root / "1" / "log.txt").write_text(version)
        (tmp_path / f"{version} has begun").touch()
        while len(list(tmp_path.glob("* has begun"))) % 2 and time.monotonic() < since + MEETING_S:
            time.sleep(0.05)
        kind = Kind.BAD if version >= "1.2" else Kind.GOOD
        if time.monotonic() >= since + MEETING_S:
            kind = Kind.UNUSABLE
        return Judged(kind=kind, why="met", folder=str(root / "1"))

    monkeypatch.setattr(ray_pool, "_describe", lambda environment: Machine("a cpu", "cpu", {}))
    question = Question(
        axis="torch", versions=["1.0", "1.1", "1.2", "1.3"], test="test_structure[bf16]", against="none",
        over_base=False, bad_is_error=False, workload="tiny", processes=None, index_url=None, pre=False,
    )  # fmt: skip
    state, said = State(question=question), list[str]()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    pool = ray_pool.RayPool(cluster.address)
    try:
        kind = kind_of_search(tmp_path, state, pool.nodes())
        recipe, cache = Recipe(component="torch"), tmp_path / "cache"
        several = Several(tmp_path, question, recipe, pool, kind, cache, said.append, build=build, judge=judge)
        search = Bisection(state, tmp_path, said.append, several)
        assert search.run() == Found(last_good=1, first_bad=2, between=(), good_again=()), said
    finally:
        pool.close()
        cluster.shutdown()
    nodes = [[own.node for own in record.attempts] for record in stored_sweep(tmp_path).cells]
    assert len(nodes) == 4 and nodes[0] != nodes[1] and nodes[2] != nodes[3], said
    assert {path.read_text() for path in tmp_path.glob("runs/*/1/log.txt")} == set(question.versions)

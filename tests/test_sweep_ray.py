"""A sweep on a local Ray cluster, one node of which is killed in the middle. Skipped where Ray is not installed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from perf_tests.harness.stored_run import read_run
from perf_tests.sweep.cells import AS_INSTALLED, all_cells
from perf_tests.sweep.driver import Sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: `pip install -e '.[sweep]'`")

SLOW_WORKER = (sys.executable, str(Path(__file__).with_name("slow_worker.py")))
LEVELS = ("fp32", "bf16", "compile")


def test_every_way_in_which_ray_loses_a_machine() -> None:
    """Names that the installed Ray does not have are passed over; a task's own error is none of them."""
    from perf_tests.sweep.ray_pool import LOST

    for name in ("OutOfMemoryError", "OutOfDiskError", "RuntimeEnvSetupError", "RaySystemError", "NodeDiedError"):
        assert getattr(ray.exceptions, name) in LOST
    assert not issubclass(ray.exceptions.RayTaskError, LOST)


def test_killed_nodes_cells_are_measured_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell has one result; the lost attempt names its node; no node had two workers at a time."""
    from ray.cluster_utils import Cluster

    from perf_tests.sweep import ray_pool
    from perf_tests.sweep.work import Machine

    monkeypatch.setattr(ray_pool, "_describe", lambda environment: Machine("a cpu", "cpu", {}))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    cells = all_cells(["tiny"], [AS_INSTALLED], LEVELS, 2)
    said: list[str] = []
    pool = ray_pool.RayPool(cluster.address)
    try:
        assert len(pool.nodes()) == 2
        killer: list[threading.Timer] = []

        def say(line: str) -> None:
            said.append(line)
            if not killer and f"on {doomed.node_id}" in line:
                killer.append(threading.Timer(1.0, cluster.remove_node, (doomed,)))
                killer[0].start()

        sweep = Sweep(tmp_path, cells, {"tiny": "a cpu"}, None, tmp_path / "cache", say, SLOW_WORKER)
        records = sweep.run(pool)
    finally:
        pool.close()
        cluster.shutdown()
    outcomes = [[(attempt.node, attempt.outcome) for attempt in record.attempts] for record in records]
    assert all(own[-1][1] == "measured" for own in outcomes), said
    lost = [own for own in outcomes if len(own) > 1]
    assert [own[0] for own in lost] == [(doomed.node_id, "lost")], said
    results = read_run(tmp_path / AS_INSTALLED / "tiny", LEVELS, 2)
    assert sum(map(len, results.values())) == len(cells)

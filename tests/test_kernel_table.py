"""Where a trace says the GPU's time goes."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from tools.kernel_table import busy_and_span_ms, main, read_events, rows, table

EVENTS = [
    {"cat": "kernel", "name": "gemm", "ts": 0, "dur": 2000},
    {"cat": "kernel", "name": "gemm", "ts": 5000, "dur": 1000},
    {"cat": "kernel", "name": "a|b" + "x" * 200, "ts": 1000, "dur": 2000},
    {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 5200, "dur": 100},
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
    {"name": "process_name", "ph": "M"},
]


def test_launches_are_summed_by_name() -> None:
    """CPU events are none of them."""
    assert [(row.name[:4], row.count, row.ms) for row in rows(EVENTS)] == [
        ("gemm", 2, 3.0),
        ("a|bx", 1, 2.0),
        ("Memc", 1, 0.1),
    ]


def test_overlap_is_busy_once() -> None:
    """0-3 ms and 5-6 ms, a copy within the latter."""
    assert busy_and_span_ms(EVENTS) == (4.0, 6.0)


def test_table_names_what_it_leaves_out() -> None:
    """Two kernels are under one row; no name can break the table."""
    text = table(EVENTS, top=1)
    assert "| gemm | 2 | 3.00 |\n| 2 others | 2 | 2.10 |" in text
    assert "4 launches, 4.0 ms busy in 6.0 ms" in text
    assert "a/bx" in table(EVENTS, top=2) and "x" * 100 not in table(EVENTS, top=2)


def test_reads_a_gzipped_trace(tmp_path: Path) -> None:
    """As the worker writes it."""
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    assert read_events(path) == EVENTS


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"traceEvents": []}', None])
def test_no_trace_is_one_sentence(
    raw: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, damaged, or made on a CPU."""
    path = tmp_path / "trace.json"
    if raw is not None:
        path.write_bytes(raw)
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert "trace the level" in capsys.readouterr().err

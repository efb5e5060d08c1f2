"""The numbers of `bench`: medians, intervals, stages, the plot that shows them and the time left."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from baseline_samples import ENVIRONMENT
from bench_samples import STAGES, FakeWorkers, bench, numbers, on_this_machine, read_rows, staged
from matplotlib.text import Text
from suite_samples import LEVELS, picture, put

from fluxfast.levels import LEVELS as ALL_LEVELS
from fluxfast.workloads import SCHNELL, TINY
from perf_tests.bench import plot, table
from perf_tests.bench.interval import PROCESSES, ROUNDS, interval, of_rounds
from perf_tests.bench.progress import BarPrinter, readable
from perf_tests.harness import fidelity
from perf_tests.harness.policy import policy_for
from perf_tests.harness.progress import CPU_DEADLINES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder of two processes a level."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    with pytest.MonkeyPatch.context() as patch:
        on_this_machine(patch)
        assert bench(FakeWorkers(), "--processes", "2", "-o", folder) == 0
    return folder


def test_csv_reads_back_what_was_measured(run: Path) -> None:
    """Columns are the documented ones; a level's own samples give its row again, to the last bit."""
    rows = read_rows(run)
    assert list(rows) == list(LEVELS) and tuple(rows["bf16"]) == table.COLUMNS
    for level, row in rows.items():
        samples = np.array(row["samples_s"].split(), float)
        measured = [staged(level, process).measurement for process in (0, 1)]
        assert samples.tolist() == [s for m in measured if m for s in m.samples_s]
        medians = np.median(samples.reshape(2, -1), axis=1)
        assert float(row["median_s"]) == pytest.approx(np.sqrt(medians.prod()), rel=1e-12)
        assert numbers(row, ["processes", "samples"]) == [2, 2 * TINY.rounds]
        assert numbers(row, ["min_s", "max_s"]) == [samples.min(), samples.max()]
        low_s, median_s, high_s = numbers(row, ["low_s", "median_s", "high_s"])
        assert low_s < median_s < high_s and row["interval_of"] == PROCESSES


def test_speed_ups_are_ratios_of_medians(run: Path) -> None:
    """To bf16, and to the nearest measured level below: fa3_fp8 does not run here."""
    rows = read_rows(run)
    seconds = {level: float(row["median_s"]) for level, row in rows.items()}
    assert rows["float8"]["parent"] == "channels_last"
    assert float(rows["float8"]["speedup_to_parent"]) == seconds["channels_last"] / seconds["float8"]
    assert float(rows["fp32"]["speedup_to_bf16"]) == seconds["bf16"] / seconds["fp32"] < 1
    assert rows["fp32"]["parent"] == rows["fp32"]["speedup_to_parent"] == ""


def test_stages_are_parts_of_the_call(run: Path) -> None:
    """Each stage has its share, steps are summed, and what is in no stage is the rest."""
    row = read_rows(run)["compile"]
    (middle,) = numbers(row, ["median_s"])
    text, steps, decode, post, rest = numbers(row, [f"{stage}_s" for stage in table.STAGES])
    assert [text, decode, post] == pytest.approx([STAGES[n] * middle for n in ("text_encode", "decode", "postprocess")])
    assert [steps, rest] == pytest.approx([0.5 * middle, 0.2 * middle])
    assert numbers(row, ["step_s"])[0] == pytest.approx(0.25 * middle, rel=0.02)


def test_loop_in_one_graph_counts_as_its_steps() -> None:
    """A bar without them would be all encoder and decoder; a step is an equal part of the loop."""
    base = staged("bf16").measurement
    assert base is not None
    stages = {"text_encode": [0.1] * TINY.rounds, "denoise": [0.4] * TINY.rounds, "decode": [0.2] * TINY.rounds}
    cells = table._stage_cells([base.model_copy(update={"stages_s": stages})], SCHNELL)
    assert (cells["steps_s"], cells["step_s"]) == pytest.approx((0.4, 0.1))


def test_level_that_dwarfs_the_rest_leaves_the_axis() -> None:
    """fp32 takes eight times as long as bf16 on a GPU; the others' bars stay readable, and two levels stay whole."""
    rows = [
        table.Row(level=f"l{i}", workload="tiny", workload_digest="", slug="cpu", max_s=s)
        for i, s in enumerate((6.5, 0.9, 0.6))
    ]
    assert plot._end_s(rows) == pytest.approx(1.03 * 0.9)
    assert plot._end_s(rows[1:]) == pytest.approx(1.03 * 0.9)
    assert plot._end_s(rows[:2]) == pytest.approx(1.03 * 6.5)


def test_memory_versions_and_compile_time(run: Path) -> None:
    """Bytes, versions and build times are the worker's; compilation leaves the warm calls out."""
    row = read_rows(run)["bf16"]
    assert (row["peak_memory_bytes"], row["transformer_weight_bytes"]) == ("600000000", "18000000")
    assert (row["torch"], row["driver"], row["cpu_threads"]) == (ENVIRONMENT.torch, "", "2")
    (middle,) = numbers(row, ["median_s"])
    assert float(row["compile_s"]) == pytest.approx(2.0 - TINY.warmup_rounds * middle)


def test_image_scores_are_the_worst_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSIM and FLIP against bf16 are those of the process that drew worst; bf16 has none against itself."""
    on_this_machine(monkeypatch)
    folder = tmp_path / "run"
    bench(FakeWorkers(), "--levels", "compile", "--processes", "2", "-o", folder)
    put(folder, staged("compile", 1), picture(6))
    bench(FakeWorkers(), "--resume", folder)
    rows, scores = read_rows(folder), fidelity.compare(picture(6), picture())
    assert numbers(rows["compile"], ["ssim", "flip_worst_tile"]) == [scores.ssim, scores.flip_worst_tile]
    assert rows["bf16"]["ssim"] == rows["fp32"]["step_error"] == ""
    assert 0 < float(rows["bf16"]["step_error"]) < 0.1


@pytest.mark.parametrize("count", range(2, 40))
def test_interval_of_rounds_covers_as_it_says(count: int) -> None:
    """Order statistics: the stated confidence is the binomial one, and 95 % wherever so few rounds can give it."""
    found = of_rounds([float(number) for number in range(count, 0, -1)])
    assert found is not None and found.interval_of == ROUNDS
    rank = int(found.low_s)
    assert found.high_s == count + 1 - rank
    heads = np.array(
        list(itertools.accumulate(np.full(count, 0.5), lambda p, _: np.convolve(p, [0.5, 0.5]), initial=np.ones(1)))[-1]
    )
    assert found.confidence == pytest.approx(heads[rank : count - rank + 1].sum())
    assert (found.confidence >= 0.95) == (count >= 6)
    assert rank == 1 or heads[rank + 1 : count - rank].sum() < 0.95  # no narrower pair would do


def test_one_round_has_no_interval() -> None:
    """A single number says nothing of its spread."""
    assert of_rounds([1.0]) is None


def test_interval_of_processes_covers() -> None:
    """Student's interval over processes holds the true median in at least 95 of 100 made-up runs."""
    noise = np.random.default_rng(5).normal(0, 0.003, size=(400, 3, 3))
    policy, hits = policy_for("h200-700w"), 0
    for levels in noise:
        run = {name: [[float(np.exp(y))] for y in logs] for name, logs in zip(("a", "b", "c"), levels, strict=True)}
        found = interval("a", run, policy)
        assert found is not None
        hits += found.low_s <= 1.0 <= found.high_s
    assert 0.93 < hits / len(noise) <= 1


def overlaps(own: Any) -> list[tuple[str, str]]:
    """Pairs of texts that share a pixel, and texts that leave the picture."""
    own.canvas.draw()
    texts = [text for text in own.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    outside = [(name, "outside") for name, box in boxes if not np.all(own.bbox.get_points()[0] <= box.min)]
    outside += [(name, "outside") for name, box in boxes if not np.all(box.max <= own.bbox.get_points()[1])]
    return outside + [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_plot_has_no_text_over_text(count: int) -> None:
    """Long names, failed and disturbed rows and notes each have a place of their own."""
    gpu = ENVIRONMENT.model_copy(
        update={
            "device_name": "NVIDIA H200 NVL with a long name",
            "power_limit_w": 700,
            "driver": "580.159.04",
            "cuda": "13.0",
            "triton": "3.6.0",
            "fa3": "fa3-fwd 0.0.3",
            "torch": "2.14.0.dev20261124+cu130",
        }
    )
    common = {"workload": "schnell", "workload_digest": "0" * 16, "slug": "h200-700w", "environment": gpu}
    good = {
        "median_s": 0.8129,
        "low_s": 0.8,
        "high_s": 0.83,
        "confidence": 0.95,
        "min_s": 0.79,
        "max_s": 0.95,
        "processes": 3,
        "samples": 30,
        "speedup_to_bf16": 11.234,
        "speedup_to_parent": 1.05,
        "parent": max((level.parent or "" for level in ALL_LEVELS.values()), key=len),
        "disturbed": "pid 7",
        "text_encode_s": 0.05,
        "steps_s": 0.6,
        "decode_s": 0.08,
        "postprocess_s": 0.02,
        "other_s": 0.06,
    }
    rows = [
        table.Row(
            level=max(ALL_LEVELS, key=len),
            **common,
            **({"error": "step_not_applied: no"} if number % 3 == 1 else good),
        )
        for number in range(count)
    ]
    notes = ["not on this machine: fa3_fp8 (needs compute capability 9.0; " + "found something else " * 12 + ")"] * 3
    assert overlaps(plot.figure(rows, SCHNELL, notes)) == []


def test_plot_says_on_what() -> None:
    """Device, power limit, workload and versions are in the picture, and the medians it draws are the rows'."""
    gpu = ENVIRONMENT.model_copy(update={"device_name": "NVIDIA H200", "power_limit_w": 700, "driver": "580.1"})
    row = table.Row(
        level="bf16",
        workload="tiny",
        workload_digest="0",
        slug="h200-700w",
        environment=gpu,
        median_s=0.25,
        min_s=0.2,
        max_s=0.3,
    )
    own = plot.figure([row], TINY, [])
    said = " ".join(text.get_text() for text in own.findobj(Text))
    for fact in ("NVIDIA H200, 700 W", "tiny", "256x256", "4 steps", "driver 580.1", "torch 2.13.0", "0.250 s"):
        assert fact in said
    assert [bar.get_width() for bar in own.axes[0].patches] == [0.25]


def test_time_left_comes_from_finished_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown before the first; then the mean of the level's own workers, or of all, less what this one has run."""
    now = [0.0]
    jobs = [("fp32", 0), ("bf16", 0), ("bf16", 1)]
    printer = BarPrinter(CPU_DEADLINES, jobs, {}, clock=lambda: now[0])
    printer("fp32", 0, "load", "", 0.0)
    now[0] = 40.0
    printer("bf16", 0, "load", "", 0.0)
    now[0] = 50.0
    printer("bf16", 0, "measure", "round 2/10", 3.0)
    now[0] = 81.0
    printer("bf16", 0, "measure", "round 2/10", 20.0)
    now[0] = 90.0
    printer("bf16", 1, "load", "", 0.0)
    now[0] = 150.0
    printer("bf16", 1, "warmup", "", 0.0)
    first, second, third, late, last, over = capsys.readouterr().err.splitlines()
    assert first == "............ time left: known after the first worker [1/3] fp32 #0 load 0 s of at most 180 s"
    assert second.startswith("####........ about 80 s left [2/3] bf16 #0")
    assert "about 70 s left" in third and "measure 3 s of at most 300 s round 2/10" in third
    assert late.startswith("####........ slower than those before; then 40 s [2/3]")
    assert last.startswith("########.... about 50 s left [3/3]")
    assert over.startswith("########.... last worker, slower than those before [3/3]")


def test_time_left_knows_an_earlier_part(capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run estimates from the start, from what is kept."""
    BarPrinter(CPU_DEADLINES, [("bf16", 1)], {"bf16": [120.0]}, clock=lambda: 0.0)("bf16", 1, "load", "", 0.0)
    assert "about 2 min left" in capsys.readouterr().err


def test_readable_durations() -> None:
    """Seconds, minutes, hours."""
    assert [readable(s) for s in (0.4, 89, 600, 7200)] == ["0 s", "89 s", "10 min", "2.0 h"]

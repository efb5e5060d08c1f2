"""The ladder as one picture: a bar a level, made of its stages, with median, spread and speed-ups. No torch."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fluxfast.workloads import Workload
from perf_tests.bench.table import STAGES, Row
from perf_tests.harness.schema import PACKAGES, Environment

WHOLE = "whole call"
"""What a bar is made of where a worker told no stages."""
COLOURS = dict(zip((*STAGES, WHOLE), ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#56B4E9"), strict=True))
"""Okabe and Ito's, which differ for colour-blind eyes and in grey."""
NAMES = {
    "text_encode": "text encoding",
    "steps": "denoising steps",
    "decode": "decoding",
    "postprocess": "postprocessing",
    "other": "rest",
}
BARS_IN, ROW_IN = 6.4, 0.46
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 2.5, 4.4, 1.3, 1.1
WIDTH_IN = LEFT_IN + BARS_IN + RIGHT_IN
NOTE_IN = 0.17
"""Height of one line of the notes."""
TABLE_X = tuple(1 + inches / BARS_IN for inches in (0.85, 1.65, 2.5))
PARENT_X = 1 + 2.6 / BARS_IN
"""Right edges of median and speed-ups, and the left edge of the parent's name, in widths of the bars' axes."""
DPI = 150
DWARFING = 3.0
"""A level that is so many times slower than every other, as fp32 on a GPU, leaves the axis and not the others' bars."""


def draw(table: Sequence[Row], workload: Workload, notes: Sequence[str]) -> bytes:
    """`figure` as PNG."""
    file = io.BytesIO()
    figure(table, workload, notes).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def figure(table: Sequence[Row], workload: Workload, notes: Sequence[str]) -> Figure:
    """The picture of a run.

    Args:
        table: at least one row, lowest level first.
        notes: sentences below the bars: what was not measured, and why.
    """
    lines = [line for note in notes for line in textwrap.wrap(note, 165)]
    height_in = TOP_IN + ROW_IN * len(table) + BOTTOM_IN + NOTE_IN * len(lines)
    own = Figure(figsize=(WIDTH_IN, height_in))
    FigureCanvasAgg(own)
    bottom = (BOTTOM_IN + NOTE_IN * len(lines)) / height_in
    axes = own.add_axes((LEFT_IN / WIDTH_IN, bottom, BARS_IN / WIDTH_IN, ROW_IN * len(table) / height_in))
    axes.set(ylim=(len(table) - 0.5, -0.5), xlabel="seconds a whole pipeline(...) call", axisbelow=True)
    axes.set_yticks(range(len(table)), [row.level for row in table])
    axes.grid(axis="x", color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    end_s = _end_s(table)
    for place, row in enumerate(table):
        _draw_row(axes, place, row)
        if row.min_s is not None and row.min_s > end_s:
            _write(axes, 0.985, place, "»", ha="right", fontsize=14, weight="bold", color="white")
    axes.set_xlim(0, end_s)
    for x, heading in zip(TABLE_X, ("median", "to bf16", "to parent"), strict=True):
        _write(axes, x, -0.7, heading, ha="right", fontsize=9, weight="bold")
    _draw_legend(own, table, bottom - 0.55 / height_in)
    _draw_title(own, table, workload, height_in)
    own.text(0.02, 0.1 / height_in, "\n".join(lines), fontsize=8, va="bottom", color="#444444", linespacing=1.3)
    return own


def _end_s(table: Sequence[Row]) -> float:
    """Where the axis ends, seconds: behind the slowest round, or the second slowest level's if one dwarfs all."""
    slowest = sorted(row.max_s for row in table if row.max_s is not None) or [1.0]
    is_dwarfing = len(slowest) > 2 and slowest[-1] > DWARFING * slowest[-2]
    return 1.03 * slowest[-2 if is_dwarfing else -1]


def _draw_row(axes: Any, place: int, row: Row) -> None:
    if row.median_s is None:
        kind = (row.error or "not measured").partition(":")[0]
        _write(axes, 0.01, place, f"failed: {kind}", color="#B00020")
        return
    # Medians of parts do not add up to the whole's median: the bar is as long as that, and parts have their shares.
    stages = row.stages() or {WHOLE: row.median_s}
    left = 0.0
    for stage, seconds in stages.items():
        width = seconds / sum(stages.values()) * row.median_s
        axes.barh(place, width, 0.62, left, color=COLOURS[stage])
        left += width
    axes.hlines(place, row.min_s, row.max_s, color="black", linewidth=0.8)
    if row.low_s is not None:
        axes.hlines(place, row.low_s, row.high_s, color="black", linewidth=3.5)
    axes.plot(row.median_s, place, marker="|", markersize=15, markeredgewidth=1.6, color="black")
    speed_ups = (_times(row.speedup_to_bf16), _times(row.speedup_to_parent))
    texts = (f"{row.median_s:#.3g} s" + ("*" if row.disturbed else ""), *speed_ups)
    for x, text in zip(TABLE_X, texts, strict=True):
        _write(axes, x, place, text, ha="right")
    if row.parent:
        _write(axes, PARENT_X, place, f"({row.parent})", fontsize=8, color="#444444")


def _write(axes: Any, x: float, place: float, text: str, **style: Any) -> None:
    """Text beside the bars: `x` in widths of the axes, `place` in rows."""
    axes.text(x, place, text, transform=axes.get_yaxis_transform(), va="center", **style)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _draw_legend(own: Figure, table: Sequence[Row], top: float) -> None:
    present = {stage for row in table for stage in row.stages()}
    handles: list[Any] = [Patch(color=COLOURS[stage], label=NAMES[stage]) for stage in STAGES if stage in present]
    confidence = [row.confidence for row in table if row.confidence is not None]
    handles.append(Line2D([], [], color="black", marker="|", markersize=12, linestyle="", label="median"))
    if confidence:
        handles.append(Line2D([], [], color="black", linewidth=3.5, label=f"{100 * min(confidence):.0f} % interval"))
    handles.append(Line2D([], [], color="black", linewidth=0.8, label="fastest to slowest round"))
    own.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.015, top),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.4,
    )


def _draw_title(own: Figure, table: Sequence[Row], workload: Workload, height_in: float) -> None:
    environment = next((row.environment for row in table if row.environment), None)
    what = (
        f"workload {workload.id}, checkpoint {workload.checkpoint}: {workload.width}x{workload.height}, "
        f"{workload.num_inference_steps} steps, {workload.max_sequence_length} text tokens, {_counts(table)}"
    )
    lines = [what] if environment is None else [what, *textwrap.wrap(versions(environment), 120)]
    title = "FLUX.1 ladder" if environment is None else f"FLUX.1 ladder on {device(environment)}"
    own.text(0.02, 1 - 0.12 / height_in, title, fontsize=14, weight="bold", va="top")
    own.text(0.02, 1 - 0.45 / height_in, "\n".join(lines), fontsize=9, va="top", color="#222222", linespacing=1.35)


def _counts(table: Sequence[Row]) -> str:
    pairs = sorted({(row.processes, row.samples) for row in table if row.processes and row.samples})
    return " or ".join(
        f"{samples} calls in {processes} process{'es' * (processes > 1)}" for processes, samples in pairs
    )


def device(environment: Environment) -> str:
    """The GPU and its power limit, or the processor and its threads."""
    if environment.power_limit_w is None:
        return f"{environment.cpu_name}, {environment.cpu_threads} threads"
    return f"{environment.device_name}, {environment.power_limit_w} W"


def versions(environment: Environment) -> str:
    """Every version that is known, in a line."""
    named = ("driver", "cuda", *PACKAGES, "python")
    facts = environment.model_dump()
    return ", ".join(f"{name} {facts[name]}" for name in named if facts[name] is not None)

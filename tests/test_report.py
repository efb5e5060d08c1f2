"""The report: what the tests say, safe with whatever a run's folder holds, and readable in a browser."""

from __future__ import annotations

import dataclasses
import hashlib
import html.parser
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from history_samples import night, nights
from report_samples import LEVELS, RUN, replace, stored_run, write_baseline
from suite_samples import changed, failed, run_suite

from fluxfast.levels import get_level
from perf_tests import export
from perf_tests.harness.replay import judge, open_run
from perf_tests.harness.schema import AnnotatedStep, ErrorKind, Outcome
from perf_tests.history import store
from perf_tests.history.night import read_night
from perf_tests.report import cli, markdown
from perf_tests.report.gather import build_report, find_traces
from perf_tests.report.html import render_html
from perf_tests.report.markdown import error_lines, render_markdown
from perf_tests.report.model import Report
from perf_tests.report.nights import read_nights

EVIL = "</script></style></pre><script>alert(1)</script><img src=http://evil/ onerror=alert(2)>|`[x](http://evil/)"


class Page(html.parser.HTMLParser):
    """What of a page could run or load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    """A folder with a baseline and a quiet run to change."""
    write_baseline(tmp_path)
    stored_run(tmp_path)
    return tmp_path


def build(tmp: Path, history: Path | None = None) -> Report:
    return build_report(tmp / "results" / RUN, tmp / "baselines", history)


def run(tmp: Path, *options: str | Path) -> int:
    return cli.main([str(tmp / "results" / RUN), "--baselines", str(tmp / "baselines"), *map(str, options)])


def red_run(tmp: Path) -> Path:
    """One level slower, one drawn wrongly, one that failed."""
    folder = tmp / "results" / RUN
    replace(folder, changed("fused_qkv", scale=1.4))
    replace(folder, changed("compile"), 5)
    replace(folder, failed("fp32", ErrorKind.HANG))
    return folder


def test_says_what_pytest_says_and_the_night_is_in_the_history(tmp: Path) -> None:
    """Every verdict of the report is that of `pytest perf_tests --replay`, which appended the night when asked."""
    folder, history = red_run(tmp), tmp / "results" / "history.db"
    options = ("--replay", folder, "--benchmark-compare", "--history", history)
    ran = run_suite(tmp, *options)
    assert ran.status == 1, ran.text
    said = {
        f"{test}[{level}]": (verdict.outcome.value, verdict.rule)
        for level, row in judge(open_run(folder, tmp / "baselines")).items()
        for test, verdict in row.items()
    }
    told = {name: (own["verdict"], own["rule"]) for name, own in ran.properties.items() if "verdict" in own}
    assert said == told
    outcomes = {
        (point.level, *pair.split("=")) for point in store.points(history) for pair in point.outcomes.split(",")
    }
    assert {(name.partition("[")[2][:-1], name.partition("[")[0], said[name][0]) for name in said} == outcomes
    report = build(tmp, history)
    assert report.state == "red"
    assert report.nights.has_this
    assert not any(finding.then for finding in report.bad)


def test_green_report_and_what_moved(tmp: Path) -> None:
    """A quiet run is green; the package that differs from the baseline's is named first."""
    folder = tmp / "results" / RUN
    for level in LEVELS:
        environment = changed(level).environment.model_copy(update={"torch": "2.14.0"})
        replace(folder, changed(level, result={"environment": environment}))
    report = build(tmp)
    assert (report.state, report.headline) == ("green", "Green: 20 tests")
    assert [(fact.name, fact.baseline, fact.run) for fact in report.moved] == [("torch", "2.13.0", "2.14.0")]
    assert "torch 2.13.0 → 2.14.0" in render_html(report, tmp / "r.html")
    assert "torch 2.13.0 → 2.14.0" in render_markdown(report)
    assert [rung.step and round(rung.step, 1) for rung in report.rungs] == [None, 0.8, 0.8, 0.8]
    assert all(rung.smallest_visible and rung.limit and rung.smallest_visible > rung.limit for rung in report.rungs)


def test_rungs_past_the_ladder_are_in_its_table(tmp_path: Path) -> None:
    """In the order in which they stand, behind what they stand on, with the field that they add."""
    folder = stored_run(tmp_path)
    facts = json.loads((folder / "run.json").read_text())
    more = ["channels_last", "float8_rowwise", "fused_quantize"]
    (folder / "run.json").write_text(json.dumps(facts | {"levels": facts["levels"] + more}))
    for level in more:
        replace(folder, changed("compile", result={"level": level, "fields": get_level(level).fields()}))
    report = build(tmp_path)
    assert [rung.adds for rung in report.rungs[len(LEVELS) :]] == ["memory_format", "quantization", "fused_quantize"]
    assert "| fused\\_quantize | fused\\_quantize | " in render_markdown(report)


def test_red_report_shows_the_worst_image_and_leaves_the_run_alone(tmp: Path) -> None:
    """Image, reference and map of every measured level; no file is added to the run."""
    folder = red_run(tmp)
    before = sorted(folder.rglob("*"))
    report = build(tmp)
    shown = {own.level: own for own in report.comparisons}
    assert shown["fp32"].problem == "not measured, so there is no image"
    assert shown["compile"].reference == "bf16 of this run"
    assert len({shown["compile"].image, shown["compile"].other, shown["compile"].difference}) == 3
    assert shown["fused_qkv"].other == shown["compile"].other, "one picture, embedded once"
    assert {finding.level for finding in report.red} == set(LEVELS), "bf16 because it is divided by fp32"
    assert sorted(folder.rglob("*")) == before


def test_hostile_text_is_text(tmp: Path) -> None:
    """HTML and Markdown in every string of a run: one script, the page's own; nothing loads from elsewhere."""
    folder = tmp / "results" / RUN
    result = failed("compile")
    failure = result.failure.model_copy(update={"message": EVIL, "log_tail": f"a\n\n{EVIL}", "stage": EVIL})
    environment = result.environment.model_copy(update={"torch": EVIL, "platform": EVIL})
    replace(folder, result.model_copy(update={"failure": failure, "environment": environment, "injection": EVIL}))
    stages = {EVIL: [0.1], f"step_{EVIL}": [0.2]}
    replace(
        folder, changed("fused_qkv", result={"environment": environment, "unavailable": {"x": EVIL}}, stages_s=stages)
    )
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "unavailable": {"fa3_fp8": EVIL}}))
    (folder / 'javascript:alert(1)"trace.json').write_text("{}")
    history = tmp / "h.db"
    store.append(history, [*nights(30, [EVIL, "bf16"]), night(30, [], run=EVIL)])
    step = AnnotatedStep(level="bf16", date="2026-01-05", ratio=1.1, reason=EVIL)
    trends = read_nights(history, read_night(folder), [step])
    report = dataclasses.replace(build(tmp, history), nights=trends)
    assert [mark.kind for mark in trends.trends[0].marks] == ["step"]
    assert trends.trends[-1].level == EVIL
    page = render_html(report, tmp / "r.html")
    found = Page(page)
    assert len(found.of("script")) == len(found.of("style")) == 1
    assert not found.of("img")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    links = [attributes["href"] or "" for attributes in found.of("a")]
    assert all(link.startswith("#") or re.fullmatch(r"results/[\w%/.-]+", link) for link in links)
    assert "evil" not in "".join(re.findall(r"<style>.*</style>", page, re.S))
    text = render_markdown(report)
    outside = re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert "<script" not in text
    assert "<img" not in text
    assert "[x](" not in outside


def big_png(side: int) -> bytes:
    """A PNG that claims `side` x `side` pixels and holds none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_huge_image_is_a_finding(tmp: Path) -> None:
    """30,000 pixels a side are refused before one is decoded; the rest of the report stands."""
    place = tmp / "results" / RUN / "compile" / "0"
    raw = big_png(30_000)
    (place / "image.png").write_bytes(raw)
    stored = json.loads((place / "result.json").read_text())
    stored["measurement"]["image_sha256"] = hashlib.sha256(raw).hexdigest()
    (place / "result.json").write_text(json.dumps(stored))
    report = build(tmp)
    finding = report.findings["compile"]["test_image"]
    assert finding.verdict.outcome is Outcome.ERROR
    assert "900000000 pixels" in finding.verdict.message
    assert report.findings["compile"]["test_latency"].verdict.ok
    assert "900000000 pixels" in render_html(report, tmp / "r.html")


def spoil_schema(folder: Path) -> None:
    path = folder / "bf16" / "0" / "result.json"
    path.write_text(path.read_text().replace('"result_schema": 1', '"result_schema": 2'))


def spoil_path(folder: Path) -> None:
    path = folder / "bf16" / "0" / "result.json"
    path.write_text(path.read_text().replace('"image.png"', '"../../../secret.png"'))


def lead_out(folder: Path) -> None:
    folder.joinpath("bf16", "0").rename(folder.parent / "elsewhere")
    folder.joinpath("bf16", "0").symlink_to(folder.parent / "elsewhere")


def doubled(folder: Path, key: str = "slug") -> None:
    path = folder / "run.json"
    path.write_text(path.read_text().replace("{", f'{{"{key}": "h200-700w", ', 1))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "name the folder of one run"),
        (
            lambda folder: shutil.rmtree(folder / "compile"),
            "the rest with `pytest perf_tests --replay RUN --levels",
        ),
        (spoil_schema, "schema 2 is newer than 1"),
        (spoil_path, "not the plain name of a file"),
        (lead_out, "leads out of the run"),
        (lambda folder: (folder / "run.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: (folder / "run.json").write_text("{}"), "damaged at slug"),
        (doubled, "'slug' twice"),
        (lambda folder: doubled(folder, r"\n::error::\u001b[2J"), "damaged at ?::error::?[2J"),
    ],
    ids=[
        "missing",
        "empty",
        "partial",
        "schema",
        "escaping path",
        "link",
        "not a run",
        "no facts",
        "doubled",
        "hostile",
    ],
)
def test_unusable_folder_is_a_sentence(tmp: Path, spoil: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, one line, no file."""
    spoil(tmp / "results" / RUN)
    assert run(tmp, "-o", tmp / "r.html") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp / "r.html").exists()


def test_output_replaces_a_link_and_never_its_target(tmp: Path) -> None:
    """A hostile run may hold `report.html` as a link to something of the user's; traces behind links are not listed."""
    folder, precious = tmp / "results" / RUN, tmp / "precious"
    precious.write_text("kept")
    (folder / "report.html").symlink_to(precious)
    (folder / "trace.json").symlink_to(precious)
    (folder / "own_trace.json").write_text("{}")
    assert run(tmp) == 0
    assert precious.read_text() == "kept"
    assert not (folder / "report.html").is_symlink()
    assert find_traces(folder) == [folder / "own_trace.json"]


def test_trends_without_ruptures(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be installed the nights are drawn all the same, and a note says what is missing."""
    monkeypatch.setitem(sys.modules, "ruptures", None)
    store.append(tmp / "h.db", nights(30, ["bf16"]))
    report = build(tmp, tmp / "h.db")
    assert [(trend.level, trend.nights) for trend in report.nights.trends] == [("bf16", 30)]
    assert "Trends are drawn without changes: change points need ruptures" in render_markdown(report)
    assert "<polyline" in render_html(report, tmp / "r.html")


def test_trace_whose_name_is_no_text_is_linked(tmp: Path) -> None:
    """A folder of someone else's may hold any byte but NUL and the slash."""
    folder = tmp / "results" / RUN
    (folder / os.fsdecode(b"trace\xff.json")).write_text("{}")
    assert run(tmp, "--markdown", tmp / "m.md") == 0
    assert 'href="trace%FF.json"' in (folder / "report.html").read_text()


IMPOSSIBLE = [
    ("samples_s", [1e308] * 3), ("samples_s", [5e-324] * 3), ("samples_s", [1e39] * 3), ("load_s", 1e308),
    ("stages_s", {"decode": [1e308, 1e308]}), ("peak_memory_bytes", 10**400), ("peak_memory_bytes", 10**60),
    ("cpu_threads", -1), ("cpu_threads", 2**33), ("observed", 10**400), ("dtype", "bfloat61"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=str)
def test_numbers_that_no_machine_has_are_a_sentence(
    tmp: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report and export refuse the result, a rebuild leaves the run out."""
    path = tmp / "results" / RUN / "compile" / "0" / "result.json"
    stored = json.loads(path.read_text())
    for part in (stored["measurement"], stored["environment"], stored["measurement"]["proofs"][0], stored["fields"]):
        if name in part:
            part[name] = value
    path.write_text(json.dumps(stored))
    assert run(tmp) == export.main([str(tmp / "results" / RUN), "--baselines", str(tmp / "baselines")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("error: ") and name in line for line in said)
    assert store.rebuild(tmp / "h.db", tmp / "results")[0] == 0


def test_unreadable_history_costs_only_the_trends(tmp: Path) -> None:
    """The page is written and says how to rebuild."""
    (tmp / "results" / "history.db").write_bytes(b"garbage" * 1000)
    assert run(tmp) == 0
    assert "history --rebuild" in (tmp / "results" / RUN / "report.html").read_text()


def test_markdown_stays_within_githubs_limit(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a log: cut at a line, closed, and it says so."""
    folder = tmp / "results" / RUN
    failure = failed("compile").failure.model_copy(update={"log_tail": "é < line\n" * 200_000})
    replace(folder, failed("compile").model_copy(update={"failure": failure}))
    report = build(tmp)
    text = render_markdown(report)
    assert 900_000 < len(text.encode()) <= 1 << 20
    assert text.endswith(markdown.CUT)
    assert text.count("<pre>") == text.count("</pre>")
    assert "Every" not in text
    monkeypatch.setattr(markdown, "LIMIT_BYTES", 1 << 30)
    assert "## Environment" in render_markdown(report)


def test_annotations_are_one_line_each(tmp: Path) -> None:
    """A log cannot begin a workflow command of its own; more than GitHub shows are counted."""
    folder = red_run(tmp)
    result = failed("bf16")
    failure = result.failure.model_copy(update={"log_tail": "\r\n::set-env name=PATH::evil 100%"})
    replace(folder, result.model_copy(update={"failure": failure}))
    report = build(tmp)
    lines = error_lines(report)
    assert all(line.startswith("::error file=perf_tests/test_") and "\n" not in line for line in lines)
    assert "%0D%0A::set-env name=PATH::evil 100%25" in "".join(lines)
    row = {
        str(number): dataclasses.replace(finding, verdict=finding.verdict.model_copy(update={"message": f"{number}"}))
        for number, finding in enumerate(report.red * 5)
    }
    many = error_lines(dataclasses.replace(report, findings={"all": row}))
    assert len(many) == markdown.LIMIT_ANNOTATIONS
    assert many[-1].endswith(f"{len(row) - 9} more findings are red, see the summary")


def test_report_of_twenty_levels_is_quick_and_small(tmp: Path) -> None:
    """A tenth of the three years that docs/history.md measures, in a tenth of its 3 MiB."""
    history, levels = tmp / "h.db", [*LEVELS, *(f"gone_{i}" for i in range(20 - len(LEVELS)))]
    store.append(history, nights(110, levels, {"gone_1": {90: 1.1}}))
    start = time.process_time()
    page = render_html(build(tmp, history), tmp / "r.html")
    assert time.process_time() - start < 5
    assert page.count("<svg") == 20
    assert len(page.encode()) < 3 * 2**20 / 10


def chromium() -> Iterator[str]:
    yield from filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


@pytest.mark.skipif(not any(chromium()), reason="no Chromium on PATH to show the page in")
def test_page_in_chromium(tmp: Path) -> None:
    """Opened from a file, the page runs its script and logs nothing; a hostile name in it runs nothing."""
    red_run(tmp)
    history = tmp / "h.db"
    store.append(history, nights(30, ["bf16", EVIL]))
    page = tmp / "page.html"
    assert run(tmp, "-o", page, "--history", history) == 0
    command = [
        next(chromium()), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", f"--user-data-dir={tmp / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in ran.stderr
    found = Page(ran.stdout)
    assert [own["style"] for own in found.of("div") if "compare" in (own["class"] or "").split()] == ["--at: 50%;"] * 3
    assert len(found.of("script")) == 1

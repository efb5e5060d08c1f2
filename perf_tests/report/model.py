"""What a report says, as data: HTML and Markdown show the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from perf_tests.harness.schema import Outcome, Verdict
from perf_tests.report.nights import Nights
from perf_tests.report.pictures import Comparison, Shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One test's verdict. `excuse` is the quarantine's issue; `then` what the night itself said, if that differs."""

    test: str
    level: str
    verdict: Verdict
    excuse: str | None = None
    then: str | None = None

    @property
    def is_red(self) -> bool:
        """Whether this turns the night red."""
        return not self.verdict.ok and self.verdict.outcome is not Outcome.VOID and self.excuse is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One level of the ladder chart, on the ladder or past it.

    Attributes:
        seconds: geometric mean of the process medians; None if a process failed.
        share: of the slowest level, 0 to 1, for the bar.
        step: time over the parent's; 0.8 is a fifth less.
        ratio, low, high, limit, smallest_visible: of the whole call, over the baseline, the last two less one; None if
            it was not compared.
        loop_visible: the smallest visible change of the denoising loop, less one; None where loops are not judged.
        setup_s: `load_s`, `apply_s`, `warmup_s`, medians of the processes.
    """

    level: str
    adds: str
    outcome: Outcome | None
    seconds: float | None = None
    share: float = 0.0
    step: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    smallest_visible: float | None = None
    loop_visible: float | None = None
    setup_s: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int | None = None

    @property
    def expected_share(self) -> float | None:
        """Where the baseline expects the bar to end; None without a baseline."""
        return self.share / self.ratio if self.ratio else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """Where one level's time goes: (stage, median seconds, share of the largest sum), in order."""

    level: str
    parts: list[tuple[str, float, float]]

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds."""
        return {name: seconds for name, seconds, _ in self.parts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the environment."""

    name: str
    baseline: str
    run: str
    moved: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is shown. `state` is `green`, `red` or `inconclusive`."""

    run: Path
    date: str
    slug: str
    workload: dict[str, Any]
    state: str
    headline: str
    notes: list[str]
    tests: list[str]
    findings: dict[str, dict[str, Finding]]
    unavailable: dict[str, str]
    rungs: list[Rung]
    stages: list[Stages]
    nights: Nights
    comparisons: list[Comparison]
    pictures: dict[str, Shown]
    facts: list[Fact]
    has_baseline: bool
    traces: list[Path]

    @property
    def bad(self) -> list[Finding]:
        """Findings that are not a plain pass, red ones first."""
        own = [finding for row in self.findings.values() for finding in row.values()]
        return sorted((f for f in own if f.verdict.outcome is not Outcome.PASS), key=lambda f: not f.is_red)

    @property
    def groups(self) -> list[tuple[str, Finding]]:
        """`bad`, one row where several tests of a level say the same: their names, and the first of them."""
        rows: dict[tuple[object, ...], list[Finding]] = {}
        for finding in self.bad:
            verdict = finding.verdict
            key = finding.level, verdict.outcome, verdict.message, finding.excuse, finding.then
            rows.setdefault(key, []).append(finding)
        return [(f"{', '.join(f.test for f in own)}[{own[0].level}]", own[0]) for own in rows.values()]

    @property
    def red(self) -> list[Finding]:
        """Findings that turn the night red."""
        return [finding for finding in self.bad if finding.is_red]

    @property
    def moved(self) -> list[Fact]:
        """What differs from the baseline's environment."""
        return [fact for fact in self.facts if fact.moved]

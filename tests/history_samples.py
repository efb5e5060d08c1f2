"""Made-up histories: nights of any number and length, without runs behind them."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from baseline_samples import ENVIRONMENT

from fluxfast.workloads import TINY
from perf_tests.harness.schema import METHOD, Outcome, Verdict
from perf_tests.history.night import Judged, LevelNight, Night

FIRST = datetime.datetime(2026, 1, 1, 3, 0)
TESTS = ("test_structure", "test_latency", "test_image", "test_step_error", "test_memory")


@functools.cache
def judged(level: str, outcome: Outcome = Outcome.PASS) -> list[Judged]:
    """Five tests, of which the one of latency says `outcome`."""
    return [
        Judged(
            test=test,
            verdict=Verdict(
                outcome=outcome if test == "test_latency" else Outcome.PASS, level=level, rule="interval", message="..."
            ),
        )
        for test in TESTS
    ]


def level_night(level: str, value: float, **change: Any) -> LevelNight:
    """A sound level, judged against a baseline that says 1."""
    own = {
        "level": level, "medians_s": [value], "value": value, "unit": "of bf16", "ratio": value, "limit": 0.05,
        "fields": {"dtype": "bfloat16"}, "environment": ENVIRONMENT.model_dump(mode="json"), "mark": None,
        "judged": judged(level),
    }  # fmt: skip
    return LevelNight(**{**own, **change})


def night(number: int, levels: Sequence[LevelNight], **change: Any) -> Night:
    """The `number`-th night after 2026-01-01."""
    moment = FIRST + datetime.timedelta(days=number)
    own = {
        "run": f"{moment:%Y%m%dT%H%M%SZ}-abc-{number}", "date": f"{moment:%Y-%m-%dT%H:%M:%SZ}", "slug": "cpu",
        "workload": TINY.id, "workload_digest": TINY.digest, "method": METHOD, "baseline": "0001_tiny.json",
        "exit_status": 0, "levels": list(levels),
    }  # fmt: skip
    return Night(**{**own, **change})


def nights(
    count: int, levels: Sequence[str], moves: Mapping[str, Mapping[int, float]] | None = None, noise: float = 0.01
) -> list[Night]:
    """Quiet nights; `moves` holds level -> night -> ratio by which the level is slower from that night on.

    torch moves with every change, as it would with a nightly that brings one.
    """
    random = np.random.default_rng(7)
    moved = {level: dict((moves or {}).get(level, {})) for level in levels}
    days = sorted(day for own in moved.values() for day in own)
    made = []
    for number in range(count):
        version = sum(day <= number for day in days)
        environment = ENVIRONMENT.model_copy(update={"torch": f"2.{13 + version}.0"}).model_dump(mode="json")
        own = []
        for level in levels:
            ratio = np.prod([by for day, by in moved[level].items() if day <= number])
            own.append(
                level_night(level, float(ratio * np.exp(noise * random.standard_normal())), environment=environment)
            )
        made.append(night(number, own))
    return made

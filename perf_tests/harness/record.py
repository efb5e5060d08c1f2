"""A finished run -> a baseline file. No torch."""

from __future__ import annotations

import dataclasses
import math

from perf_tests.harness import fidelity, recording, store, updating
from perf_tests.harness.schema import Baseline
from perf_tests.harness.session import EXACT_LEVEL, REFERENCE_LEVEL, Session


def baseline_of(session: Session) -> tuple[Baseline, bytes]:
    """The baseline that this run would be, and its reference image.

    Raises:
        BaselineError: if a result is failed, void, injected, or missing.
    """
    results = session.results
    png = (session.folder / REFERENCE_LEVEL / "0" / "image.png").read_bytes()
    scores = {level: session.image_scores(level) for level in results}
    baseline = recording.baseline_from_results(
        results,
        levels=list(results),
        workload=dataclasses.asdict(session.workload),
        slug=session.slug,
        fidelity={
            level: {metric: [score[metric] for score in own] for metric in own[0] if not metric.startswith("psnr")}
            for level, own in scores.items()
        },
        step_errors={level: session.step_errors(level) for level in results if level != EXACT_LEVEL},
        fidelity_method=fidelity.METHOD,
        reference_png=png,
    )
    return baseline, png


def store_run(session: Session, *, update: bool, reason: str | None) -> list[str]:
    """Write a new baseline file, or one with what moved; lines for the terminal.

    Raises:
        BaselineError: saying why the run cannot be a baseline.
    """
    new, png = baseline_of(session)
    lines = []
    if update:
        if session.baseline is None:
            raise store.BaselineError("there is no baseline to update; record one with --record-baseline")
        limits = {level: session.latency(level).numbers.get("limit") or math.inf for level in session.results}
        new, lines = updating.update_baseline(
            session.baseline, new, limits, reason, relative_to=session.policy.relative_to
        )
        if not lines:
            return ["baseline unchanged: nothing moved beyond a third of its limit"]
    assert new.reference_image is not None
    path = store.write_baseline(
        session.baseline_folder, session.workload.id, new, recording.stock_json(new), {new.reference_image: png}
    )
    return [*lines, f"baseline written: {path}"]

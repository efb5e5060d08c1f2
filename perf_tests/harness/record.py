"""A finished run -> a baseline file. No torch."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fluxfast.levels import LADDER, LEVELS
from perf_tests.harness import fidelity, recording, store, updating
from perf_tests.harness.files import MAX_PNG_BYTES, read_bytes
from perf_tests.harness.schema import Baseline, Outcome
from perf_tests.harness.session import EXACT_LEVEL, REFERENCE_LEVEL, Session

NIGHT = ["--benchmark-compare", "--add-night"]


def baseline_of(session: Session, stored: Any, levels: Sequence[str]) -> tuple[Baseline, dict[str, bytes]]:
    """The baseline that this run would be, and its reference image by name; none where random weights draw noise.

    Args:
        levels: of the run, to go into it.
        stored: the image that later runs will find stored: uint8, (height, width, 3).

    Raises:
        StoreError: if a result is failed, void, injected, or missing.
    """
    if broken := session.unmeasured():
        raise store.BaselineError(f"level {broken[0]!r} was not measured; {recording.UNACCEPTABLE}")
    results = {level: session.results[level] for level in levels}
    png, scores = None, {}
    if not session.workload.has_random_weights:
        png = read_bytes(session.image_path(REFERENCE_LEVEL, 0), MAX_PNG_BYTES, store.ResultError)
        scores = {level: session.image_scores(level, stored) for level in results}
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
    return baseline, {baseline.reference_image: png} if baseline.reference_image and png else {}


def recorded_levels(session: Session) -> list[str]:
    """Levels that go into a baseline: those that have tests.

    A level beside the ladder brings its parent along, of which no test said a word. A part of the ladder keeps the
    references that its levels are judged by, unless their times were disturbed.
    """
    if has_ladder(session):
        return list(session.levels)
    return [level for level in session.results if level in session.levels or not disturbed(session, level)]


def has_ladder(session: Session) -> bool:
    """Whether the run is of the whole ladder, as far as the machine can run it."""
    return {level.id for level in LADDER} - session.unavailable.keys() <= set(session.levels)


def disturbed(session: Session, level: str) -> str | None:
    """What was against the times of a level, None if they stand."""
    found = (recording.void_reason(result.counters) for result in session.results[level])
    return next((reason for reason in found if reason), None)


def store_run(
    session: Session, *, update: bool, reason: str | None, accepted: Collection[str] = (), added: Collection[str] = ()
) -> list[str]:
    """Write a new baseline file, or one with what moved or is `added`; lines for the terminal.

    Args:
        accepted: levels with a red verdict that was let pass for `reason`.
        added: levels that the baseline lacks and this run is of; what it holds is then left as it is.

    Raises:
        StoreError: saying why the run cannot be a baseline.
    """
    if not update:
        stored = None if session.workload.has_random_weights else session.image(REFERENCE_LEVEL, 0)
        new, images = baseline_of(session, stored, recorded_levels(session))
        options = ["--record-baseline"] if has_ladder(session) else ["--record-baseline", "--partial-baseline"]
        path = _write(session, new, images, options)
        left = {level: disturbed(session, level) for level in session.results if level not in new.levels}
        lines = [f"baseline written: {path}"] + [
            f"{level}: not in it, since it was disturbed ({why}); add it with --levels {level} --update-baseline"
            for level, why in left.items()
            if why
        ]
        held = () if session.baseline is None else session.baseline.levels
        return lines + [
            f"{level}: not in it any more: {session.unavailable.get(level, 'it is not a level of this run')}"
            for level in held
            if level not in new.levels and not left.get(level)
        ]
    assert session.baseline is not None  # `Suite` refused
    options = ["--update-baseline", *([] if reason is None else ["--reason", reason])]
    if added:
        new, _ = baseline_of(session, session.stored_reference(), recorded_levels(session))
        witnesses = {level: session.latency(level) for level in new.levels if level in session.baseline.levels}
        extended, lines = updating.extend_baseline(session.baseline, new, added, witnesses)
        return [*lines, f"baseline written: {_write(session, extended, {}, options, added)}"]
    new, _ = baseline_of(session, session.stored_reference(), session.levels)
    updated, lines = updating.update_baseline(
        session.baseline,
        new,
        _limits(session, new),
        reason,
        accepted=accepted,
        leaner=[level for level in session.levels if session.memory(level).outcome is Outcome.IMPROVED],
        loop_limits=_loop_limits(session, new),
        unsettled=[level for level in session.levels if session.latency(level).rule == "confirmation"],
        divisors={level: session.policy.divisor(level) for level in session.baseline.levels},
    )
    if updated == session.baseline:
        return [*lines, "baseline unchanged: nothing moved beyond a third of its limit"]
    # The reference image stays the old one, which lies there already.
    return [*lines, f"baseline written: {_write(session, updated, {}, options)}"]


def store_night(session: Session) -> list[str]:
    """Write the baseline with this green run as one of its nights; lines for the terminal.

    Raises:
        StoreError: saying why the run is none.
    """
    old, nights = session.baseline, _nights(session)
    assert old is not None  # `Suite` refused
    for result in (result for level in nights for result in session.results[level]):
        if result.injection:
            raise store.BaselineError(f"{result.level!r} was broken on purpose ({result.injection}): that is no night")
        if result.environment and (why := updating.no_night(old, result.environment)):
            raise store.BaselineError(f"{result.level!r}: {why}")
    told = {level: session.latency(level) for level in session.levels if level not in nights}
    lines = [f"{level}: no night of it, since it is {own.outcome.value} ({own.rule})" for level, own in told.items()]
    updated = updating.add_night(old, nights)
    new = [level for level in nights if updated.levels[level] != old.levels[level]]
    if not new:
        return [*lines, "baseline unchanged: it has this night, or is of this run"] if nights else lines
    return [*lines, f"baseline written: {_write(session, updated, {}, NIGHT)}, with this night of {len(new)} level(s)"]


def _limits(session: Session, new: Baseline) -> dict[str, float]:
    """Level -> latency limit as a log ratio; a level without one (not judged) has not moved.

    Where the denoising loop is judged beside the call, noise of the rest of a call is no movement: there a call moves
    from the end of its own interval on.
    """
    limits = {}
    for level in new.levels:
        numbers = session.latency(level).numbers
        own = numbers.get("call_limit", numbers.get("limit"))
        limits[level] = math.inf if own is None else math.log1p(own)
        ratio, high = numbers.get("call_ratio"), numbers.get("call_high")
        if ratio is not None and high is not None:
            limits[level] = max(limits[level], 3 * math.log(high / ratio))
    return limits


def _loop_limits(session: Session, new: Baseline) -> dict[str, float]:
    """Level -> limit of its denoising loop as a log ratio, where that is judged."""
    limits = {level: session.latency(level).numbers.get("loop_limit") for level in new.levels}
    return {level: math.log1p(limit) for level, limit in limits.items() if limit is not None}


def _nights(session: Session) -> dict[str, tuple[float, float | None]]:
    """Level -> log ratios to the baseline of call and loop, of the levels that passed without a second look."""
    verdicts = {level: session.latency(level) for level in session.levels}
    return {
        level: (math.log(ratio), None if (loop := verdict.numbers.get("loop_ratio")) is None else math.log(loop))
        for level, verdict in verdicts.items()
        if (verdict.outcome, verdict.rule) == (Outcome.PASS, "interval") and (ratio := verdict.numbers.get("ratio"))
    }


def _write(
    session: Session,
    baseline: Baseline,
    images: dict[str, bytes],
    options: Sequence[str],
    added: Collection[str] = (),
) -> Path:
    """Write what this run makes of the baseline that judged it; `options` are what it was asked with."""

    def refuse_other(newest: Path | None) -> None:
        now = None if newest is None else store.read_baseline(newest)
        if now == session.baseline:
            return
        held = set() if now is None else now.levels.keys() - session.unavailable.keys()
        told = [level for level in LEVELS if level in held and level not in session.levels]
        words = ["--baselines", str(session.baseline_folder.parent), *options]
        if added and (rest := [level for level in added if level not in held]):
            words = ["--replay", str(session.folder), "--levels", ",".join(rest), *words]
            action = "add to it with"
        elif added:
            words = ["--workload", session.workload.id, *words]
            action = f"it holds {', '.join(added)} by now; to measure what it holds again, run"
        elif "--partial-baseline" in options or options == NIGHT or not told:
            words = ["--replay", str(session.folder), "--levels", ",".join(session.levels), *words]
            action = "judge this run by it with"
        else:
            words = ["--workload", session.workload.id, *words]
            action = f"it holds {', '.join(told)}, so measure again with"
        raise store.BaselineError(
            f"{newest or session.baseline_folder / 'nothing'} is the newest baseline of {session.workload.id!r} now "
            f"and was not when this run began: {action} `{shlex.join(['pytest', 'perf_tests', *words])}`"
        )

    stock = recording.stock_json(baseline)
    return store.write_baseline(
        session.baseline_folder, session.workload.id, baseline, stock, images, refuse=refuse_other
    )

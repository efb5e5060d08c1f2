"""Which levels a recording takes, and what is refused before it measures: what the run could never write. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fluxfast.levels import LADDER, LEVELS
from perf_tests.harness.machine import RECORDED, words_of
from perf_tests.harness.obstacles import record_command
from perf_tests.harness.policy import policy_for
from perf_tests.harness.schema import Baseline, Environment
from perf_tests.harness.session import with_references
from perf_tests.harness.stored_run import RunFacts
from perf_tests.harness.updating import no_night, other_environment
from perf_tests.harness.usage import COMMITTED


def levels_to_record(
    ladder: Sequence[str], runnable: Sequence[str], held: Collection[str], *, is_update: bool
) -> list[str]:
    """The levels of a recording that names none: to update, those of the baseline, and else these and the ladder.

    A run of which the baseline holds none, as a stored one of what is to be added, stays as it is.
    """
    own = [level for level in runnable if level in held]
    return own if is_update and own else [level for level in LEVELS if level in {*ladder, *own}]


def refuse_to_record(
    option: Any,
    facts: RunFacts,
    path: Path | None,
    held: Collection[str],
    *,
    added: Sequence[str],
    expected: Sequence[str],
) -> None:
    """Say before measuring what the run could never write, and the command that can.

    Args:
        path: the newest baseline.
        held: its levels, if it was recorded.
        added, expected: of the `Suite`.

    Raises:
        ValueError: one sentence.
    """
    if option.inject:
        raise ValueError("a baseline is of unbroken levels: leave --inject away to record or update one")
    if "@" in facts.workload:
        raise ValueError(f"a baseline belongs to a workload by its name, and {facts.workload!r} takes other weights")
    if option.partial_baseline:
        return
    divisor = policy_for(facts.slug).relative_to
    chosen = added or expected
    runnable = [level for level in LEVELS if level not in facts.unavailable]
    ladder = [level.id for level in LADDER if level.id in runnable]
    known = [level for level in runnable if level in held]
    anew = f"`{record_command(chosen, known, _start(option, facts, {*ladder, *known, *chosen}))}`"
    new = [level for level in chosen if level not in held]
    needed = known if option.update_baseline else [level for level in runnable if level in {*ladder, *known}]
    left = [level for level in needed if level not in chosen]
    lost = [level for level in held if level in facts.unavailable]
    asks_for_all = option.levels is None or RECORDED in words_of(option.levels)
    if lost and (asks_for_all or (left and not added) or (option.update_baseline and divisor)):
        raise ValueError(why_lost(lost[0], facts.slug, facts.unavailable[lost[0]]))
    if option.record_baseline:
        if left:
            raise ValueError(
                "a baseline holds the whole ladder and what the one before held beside it, and this run is without "
                f"{', '.join(left)}: record all with {anew}"
            )
    elif not held:
        found = f"{path} holds published numbers" if path else f"there is no baseline of {facts.workload!r}"
        raise ValueError(f"{found}, and --update-baseline changes what was recorded: record one with {anew}")
    elif new and divisor:
        raise ValueError(
            f"on {facts.slug!r} a time is a ratio to {divisor!r} of the same run, so {', '.join(new)} cannot be "
            f"added to another run's in {path}: record all with {anew}"
        )
    elif added:
        _refuse_to_add(option, known, added, expected, anew)
    elif new:
        start = _start(option, facts, with_references(new, facts.unavailable))
        raise ValueError(
            f"{path} lacks {', '.join(new)} and holds other levels of this run: add what is new by itself with "
            f"`{start} --levels {','.join(new)} --update-baseline`"
        )
    elif left:
        reason = "" if option.reason is None else f" --reason {shlex.quote(option.reason)}"
        raise ValueError(
            f"an update is of every level that {path} holds, and this run is without {', '.join(left)}: update all "
            f"with `{_start(option, facts, known)} --update-baseline{reason}`"
        )
    elif divisor and (gone := [level for level in held if level not in LEVELS]):
        raise ValueError(
            f"on {facts.slug!r} only times of one run compare, and {path} holds {', '.join(gone)}, which this "
            f"checkout does not have: record all others with {anew}"
        )


def _refuse_to_add(option: Any, known: Sequence[str], added: Sequence[str], expected: Sequence[str], anew: str) -> None:
    names = ", ".join(added)
    if option.reason:
        raise ValueError(
            f"--reason says why something slower is accepted, and adding {names} accepts nothing: leave it away"
        )
    if not set(known) & set(expected):
        raise ValueError(
            f"the baseline holds none of {', '.join(expected)}, by which a run that adds {names} tells "
            f"whether the machine is as it was: record all with {anew}"
        )


def refuse_other_measurement(
    path: Path | None, baseline: Baseline, facts: RunFacts, environment: Environment | None
) -> None:
    """Before what is measured could not stand in the file of the others.

    Args:
        environment: of this machine now, if levels are to be added; None if that is known not to matter.

    Raises:
        ValueError: one sentence.
    """
    told = other_environment(baseline, environment) if environment else None
    if facts.workload_digest != baseline.workload_digest:
        told = (
            f"workload {facts.workload!r} has digest {facts.workload_digest}, and had {baseline.workload_digest} when "
            "it was recorded"
        )
    if told:
        raise ValueError(f"{path}: {told}; undo that, or record a new baseline of all levels with --record-baseline")


def refuse_to_add_night(facts: RunFacts, baseline: Baseline | None, environment: Environment | None) -> None:
    """Before a run is measured that could be no night of the baseline.

    Args:
        baseline: the newest, if it was recorded.
        environment: of this machine now; None for a stored run, whose results say it.

    Raises:
        ValueError: one sentence.
    """
    if baseline is None:
        raise ValueError(
            f"--add-night adds to a recorded baseline, and there is none of {facts.workload!r}: record one"
        )
    usual = policy_for(facts.slug).usual_processes
    if facts.processes != usual:
        raise ValueError(
            f"a night is of {usual} process(es) a level on {facts.slug!r}, as its noise is reckoned, and this run of "
            f"{facts.processes}: leave --processes away, or give another run"
        )
    if environment is not None and (told := no_night(baseline, environment)):
        raise ValueError(told)


def why_lost(level: str, slug: str, why: str) -> str:
    """The sentence on a level that the baseline holds and that cannot be measured any more."""
    return (
        f"level {level!r} was measured for the baseline of {slug!r} and cannot run there now: {why}. Install what it "
        "needs or, if this machine is to do without it, remove the baseline and record one."
    )


def _start(option: Any, facts: RunFacts, levels: Collection[str]) -> str:
    """How a command for `levels` begins: with the same workload and baselines, and the stored run if that has them."""
    words = ["pytest", "perf_tests"]
    if option.replay and {*levels} <= {*facts.levels}:
        words += ["--replay", str(option.replay)]
    elif option.replay or option.workload:
        words += ["--workload", facts.workload]
    if option.baselines.resolve() != COMMITTED:
        words += ["--baselines", str(option.baselines)]
    return shlex.join(words)

"""What a finished search says, as text. Pure."""

from __future__ import annotations

import statistics

from perf_tests.bisect.search import Contradiction, Found
from perf_tests.bisect.state import Judged, Kind, State

NUMBERS = ("ratio", "low", "high", "limit", "smallest_visible", "confirmed_ratio", "observed", "expected")
"""Those of a verdict that are worth a line."""


def describe(state: State, step: Contradiction | Found) -> str:
    """The answer with both sample sets, or why there is none."""
    question = state.question
    judged, left_out = state.votes(), state.left_out
    heading = (
        f"{question.axis}, {len(question.versions)} versions from {question.versions[0]} to {question.versions[-1]}, "
        f"{question.test}: {len(judged)} judged in {sum(map(len, judged.values()))} runs, {len(left_out)} left out"
    )
    said = _contradiction(state, step) if isinstance(step, Contradiction) else _found(state, step)
    why_not = [f"  {version}: {why}" for version, why in left_out.items()]
    return "\n".join([heading, *said, *(["left out:", *why_not] if why_not else [])])


def _found(state: State, found: Found) -> list[str]:
    versions, axis = state.question.versions, state.question.axis
    good, bad = versions[found.last_good], versions[found.first_bad]
    lines = [f"last good: {axis} {good}", *_evidence(state, good, Kind.GOOD)]
    lines += [f"first bad: {axis} {bad}", *_evidence(state, bad, Kind.BAD), *_other_facts(state, good, bad)]
    if found.between:
        between = ", ".join(versions[at] for at in found.between)
        lines.append(f"The change came with one of {between}, {bad}: what lies between could not be judged.")
    if found.good_again:
        again = ", ".join(versions[at] for at in found.good_again)
        lines.append(f"Good again: {again}. More than one change lies between the ends; this is the first one seen.")
    return lines


def _contradiction(state: State, step: Contradiction) -> list[str]:
    question = state.question
    version, name = question.versions[step.at], "bad" if step.at else "good"
    runs = [run for run in state.judged.get(version, []) if run.kind in (Kind.GOOD, Kind.BAD)]
    if not runs:
        advice = "name another version there"
        if version in state.closed_now:
            advice += ", or ask again, which tries it again"
        elif not question.bad_is_error:
            advice += ", or search for the error itself with --bad-is error"
        return [f"no answer: --{name} {version} cannot be judged, so there is nothing to search; {advice}"]
    found = ", ".join(run.kind.value for run in runs)
    advice = "name another version, or look at what else differs from the run that was red"
    if "smallest_visible" in runs[-1].numbers and step.at:
        advice += f"; the smallest visible change was {runs[-1].numbers['smallest_visible']:.1%}, --processes lowers it"
    return [
        f"no answer: --{name} {version} was judged {found}, so there is nothing to search between the two; {advice}",
        *_evidence(state, version, runs[-1].kind),
    ]


def _evidence(state: State, version: str, kind: Kind) -> list[str]:
    """Every conclusive run of a version, and the samples of those that say `kind`."""
    runs = [run for run in state.judged[version] if run.kind in (Kind.GOOD, Kind.BAD)]
    lines = []
    if version in state.left_out:
        times = "once" if len(runs) == 1 else f"{len(runs)} times"
        lines.append(f"  judged {times} and could not be confirmed: {state.left_out[version]}")
    for run in runs:
        lines.append(f"  {run.kind.value}: {run.why}")
        told = [f"{name} {run.numbers[name]:.6g}" for name in NUMBERS if name in run.numbers]
        lines += [f"    {', '.join(told)}"] if told else []
        lines += _samples(run) if run.kind is kind else []
        lines.append(f"    run: {run.folder}")
    return lines


def _samples(run: Judged) -> list[str]:
    lines = [] if run.samples_s else ["    no samples: nothing was measured"]
    for level, processes in run.samples_s.items():
        medians = " ".join(f"{statistics.median(own):.4f}" for own in processes)
        calls = sum(map(len, processes))
        lines.append(f"    {level}: medians {medians} s ({len(processes)} process(es), {calls} calls)")
    return lines


def _other_facts(state: State, good: str, bad: str) -> list[str]:
    """What was counted differently in the two."""
    before, after = (next((run.facts for run in state.judged[version] if run.facts), {}) for version in (good, bad))
    if not before or not after:
        return []
    return [
        f"  counted differently: {what}: {before.get(what)} -> {after.get(what)}"
        for what in {**before, **after}
        if before.get(what) != after.get(what)
    ]

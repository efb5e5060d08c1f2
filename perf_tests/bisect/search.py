"""Which versions to judge next, from what was judged so far. Pure: positions and votes, no environments.

A binary search whose memory is a list of votes a version, so that a wrong vote can be outvoted. Versions are positions
0 (good) to count - 1 (bad). Both ends are judged first. Then the middle of the bracket is, again and again: 64 versions
take 2 + 6. At the end both sides of the boundary are judged again until one side leads by `confirmations`; if a vote
turns, the bracket opens again and the search goes on.

Where `width` versions can be judged at once, the bracket is cut into width + 1 parts a round: with 4, 64 versions take
one round for the ends and three for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Final

MAX_VOTES: Final = 5
"""Odd: after so many votes one side leads, and the version is taken as it then stands."""

Votes = Mapping[int, Sequence[bool]]
"""Position -> one entry a judged run, True for bad."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """Judge these versions (again), each once, all at the same time if there are machines for it."""

    at: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contradiction:
    """An end is not what it was said to be, or could not be judged: there is nothing to search."""

    at: int


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer: every version between the two could not be judged.

    Attributes:
        good_again: versions beyond `first_bad` that were judged good; there is more than one change then.
    """

    last_good: int
    first_bad: int
    between: tuple[int, ...]
    good_again: tuple[int, ...]


def next_step(
    count: int, votes: Votes, closed: Collection[int] = (), *, width: int = 1, confirmations: int = 2
) -> Measure | Contradiction | Found:
    """What to do next; the same votes always give the same step, so a stored search resumes, with another width too.

    Args:
        count: how many versions there are, at least 2.
        votes: judged runs so far.
        closed: versions that cannot be judged (any more): not installable, not runnable, never conclusive. One that
            has votes keeps them.
        width: how many versions a step may hold, at least 1.
        confirmations: lead in votes that the two versions of the answer need; 1 for a test without noise.
    """
    lead = _leads(votes)

    def is_settled(at: int) -> bool:
        return at in closed or abs(lead.get(at, 0)) >= confirmations or len(votes.get(at, ())) >= MAX_VOTES

    ends = []
    for end, sign in ((0, 1), (count - 1, -1)):
        if lead.get(end, 0) * sign > 0:
            continue
        if not is_settled(end):
            ends.append(end)
        elif not ends:
            return Contradiction(end)
    if ends:
        return Measure(tuple(ends[:width]))
    last_good, first_bad = _bracket(lead)
    ties = [at for at in lead if at < first_bad and lead[at] == 0 and not is_settled(at)][:width]
    untried = [at for at in range(last_good + 1, first_bad) if at not in lead and at not in closed]
    if ties or untried:
        return Measure((*ties, *_cuts(last_good, first_bad, untried, width - len(ties))))
    if unsure := [at for at in (first_bad, last_good) if not is_settled(at)]:
        return Measure(tuple(unsure[:width]))
    return Found(
        last_good=last_good,
        first_bad=first_bad,
        between=tuple(range(last_good + 1, first_bad)),
        good_again=tuple(sorted(at for at in lead if at > first_bad and lead[at] > 0)),
    )


def bounds(votes: Votes) -> tuple[int, ...]:
    """The versions that the search may come back to: its last good and first bad one so far, or what there is."""
    lead = _leads(votes)
    has_both = any(value < 0 for value in lead.values()) and lead.get(0, 0) > 0
    return _bracket(lead) if has_both else tuple(lead)


def _leads(votes: Votes) -> dict[int, int]:
    """Position -> votes for good less votes for bad."""
    return {at: list(own).count(False) - list(own).count(True) for at, own in votes.items() if own}


def _bracket(lead: Mapping[int, int]) -> tuple[int, int]:
    first_bad = min(at for at in lead if lead[at] < 0)
    return max(at for at in lead if at < first_bad and lead[at] > 0), first_bad


def _cuts(last_good: int, first_bad: int, untried: Collection[int], number: int) -> list[int]:
    """The untried versions nearest to where `number` cuts divide the bracket into equal parts."""
    left = set(untried)
    for cut in range(1, number + 1):
        place = last_good + (first_bad - last_good) * cut / (number + 1)
        if left:
            left.remove(min(left, key=lambda at: (abs(at - place), at)))
    return sorted(set(untried) - left)

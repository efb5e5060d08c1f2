"""The search for the first bad version, simulated: noise, gaps, two culprits, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from perf_tests.bisect.search import MAX_VOTES, Contradiction, Found, Measure, bounds, next_step


def search(
    count: int,
    bad: Collection[int],
    *,
    gaps: Collection[int] = (),
    wrong: float = 0.0,
    confirmations: int = 2,
    width: int = 1,
    seed: int = 0,
    rounds: list[tuple[int, ...]] | None = None,
) -> tuple[Any, dict[int, list[bool]]]:
    """The last step, and every vote; a run is wrong with probability `wrong`. Each step is put into `rounds`."""
    chance, votes, closed = random.Random(seed), {}, set()
    for _ in range(1000):
        step = next_step(count, votes, closed, width=width, confirmations=confirmations)
        if not isinstance(step, Measure):
            return step, votes
        assert len(step.at) == len(set(step.at)) <= width
        if rounds is not None:
            rounds.append(step.at)
        for at in step.at:
            if at in gaps:
                closed.add(at)
            else:
                votes.setdefault(at, []).append((at in bad) != (chance.random() < wrong))
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("culprit", range(1, 64))
def test_64_versions_take_at_most_8(culprit: int) -> None:
    """Both ends included, wherever the culprit is."""
    found, votes = search(64, range(culprit, 64))
    assert found == Found(last_good=culprit - 1, first_bad=culprit, between=(), good_again=())
    assert len(votes) <= 8
    assert sum(map(len, votes.values())) <= 10, "two more runs confirm the boundary"


def test_exact_test_is_judged_once_a_version() -> None:
    """Counts need no confirmation."""
    _, votes = search(64, range(20, 64), confirmations=1)
    assert {len(own) for own in votes.values()} == {1}


@pytest.mark.parametrize("width", [1, 4])
def test_gaps_are_stepped_around_and_named(width: int) -> None:
    """Of 40 versions a third cannot be installed; those beside the culprit are in the answer."""
    gaps = {at for at in range(1, 39) if at % 3 == 0} | {20, 22, 23}
    found, votes = search(40, range(23, 40), gaps=gaps, width=width)
    assert found == Found(last_good=19, first_bad=25, between=(20, 21, 22, 23, 24), good_again=())
    assert not set(votes) & gaps


def test_everything_between_may_be_missing() -> None:
    """The ends are then the answer."""
    found, votes = search(40, [39], gaps=range(1, 39))
    assert (found.last_good, found.first_bad, len(found.between)) == (0, 39, 38)
    assert set(votes) == {0, 39}


def test_two_culprits_that_add_up() -> None:
    """A second regression after the first does not hide it."""
    found, _ = search(40, range(11, 40))
    assert found.first_bad == 11


def test_culprit_mended_and_back_again() -> None:
    """Bad, good, bad: one true boundary is found, and what was seen to be good beyond it is said."""
    bad = {*range(17, 21), *range(30, 40)}
    found, votes = search(40, bad)
    assert found.first_bad in bad and found.last_good not in bad
    assert found.first_bad == found.last_good + 1
    votes = {0: [False], 39: [True, True], 19: [True, True], 25: [False], 18: [False, False]}
    assert next_step(40, votes) == Found(last_good=18, first_bad=19, between=(), good_again=(25,))


@pytest.mark.parametrize("width", [1, 4])
def test_noise_is_outvoted(width: int) -> None:
    """One run in twenty is wrong, a tenth of 40 versions is missing: confirming finds what one look misses."""
    right = {1: 0, 2: 0}
    for confirmations in right:
        for seed in range(400):
            culprit = 1 + seed % 39
            gaps = set(random.Random(seed).sample(range(1, 39), 4))
            noise = {"gaps": gaps, "wrong": 0.05, "seed": seed}
            found, _ = search(40, range(culprit, 40), **noise, confirmations=confirmations, width=width)
            is_right = isinstance(found, Found) and found.last_good < culprit <= found.first_bad
            right[confirmations] += is_right and set(found.between) <= gaps
    assert right[2] >= 380, right
    assert right[1] < 340, "without confirmation the noise would show"


@pytest.mark.parametrize(("bad", "end"), [(range(40), 0), ((), 39)], ids=["good is bad", "bad is good"])
@pytest.mark.parametrize("width", [1, 4])
def test_ends_are_confirmed_first(bad: Collection[int], end: int, width: int) -> None:
    """Nothing but the ends is judged, and the wrong one is judged twice."""
    found, votes = search(40, bad, width=width)
    assert found == Contradiction(end)
    assert set(votes) <= {0, 39} and len(votes[end]) == 2


def test_end_that_cannot_be_judged() -> None:
    """There is nothing to search from."""
    assert search(40, range(9, 40), gaps=[0]) == (Contradiction(0), {})


def test_confirmation_that_cannot_be_had() -> None:
    """A version with a vote that is closed later keeps the vote, and the search ends."""
    assert next_step(3, {0: [False], 2: [True], 1: [True]}, {0, 1}) == Found(
        last_good=0, first_bad=1, between=(), good_again=()
    )


def test_bounds_are_what_the_search_may_come_back_to() -> None:
    """Their environments are kept."""
    assert bounds({}) == ()
    assert bounds({0: [False]}) == (0,)
    assert bounds({0: [False], 39: [True], 20: [True], 10: [False]}) == (10, 20)


@pytest.mark.parametrize("culprit", range(1, 64))
def test_four_machines_search_64_versions_in_five_rounds(culprit: int) -> None:
    """Both ends, three rounds that leave a fifth each, and one for the two votes that confirm: at most 12 versions."""
    rounds: list[tuple[int, ...]] = []
    found, votes = search(64, range(culprit, 64), width=4, rounds=rounds)
    assert found == Found(last_good=culprit - 1, first_bad=culprit, between=(), good_again=())
    assert rounds[0] == (0, 63)
    assert set(rounds[-1]) == {culprit - 1, culprit}
    assert len(rounds) <= 5 and len(votes) <= 12
    assert sum(map(len, votes.values())) <= 14


def test_more_machines_than_versions() -> None:
    """Everything between is judged at once."""
    rounds: list[tuple[int, ...]] = []
    search(6, range(3, 6), width=9, rounds=rounds)
    assert rounds == [(0, 5), (1, 2, 3, 4), (3, 2)]


def test_tie_takes_one_machine_and_the_bracket_the_others() -> None:
    """A version that was judged both ways is asked again while the search goes on beside it."""
    votes = {0: [False], 39: [True], 10: [False, True], 20: [True]}
    assert next_step(40, votes, width=4) == Measure((10, 5, 9, 15))


def one_at_a_time(
    count: int, votes: Mapping[int, Sequence[bool]], closed: Collection[int], confirmations: int
) -> int | None:
    """The order of a search on one machine, written down a second time: stored searches go on by it. None: ended."""
    lead = {at: own.count(False) - own.count(True) for at, own in votes.items() if own}

    def is_settled(at: int) -> bool:
        return at in closed or abs(lead[at]) >= confirmations or len(votes[at]) >= MAX_VOTES

    for end, sign in ((0, 1), (count - 1, -1)):
        if end not in lead:
            return None if end in closed else end
        if lead[end] * sign <= 0:
            return None if is_settled(end) else end
    first_bad = min(at for at in lead if lead[at] < 0)
    last_good = max(at for at in lead if at < first_bad and lead[at] > 0)
    if ties := [at for at in lead if at < first_bad and lead[at] == 0 and not is_settled(at)]:
        return ties[0]
    middle = (last_good + first_bad) / 2
    if untried := [at for at in range(last_good + 1, first_bad) if at not in lead and at not in closed]:
        return min(untried, key=lambda at: abs(at - middle))
    return next((at for at in (first_bad, last_good) if not is_settled(at)), None)


def test_one_machine_keeps_its_order() -> None:
    """For 2000 states with any votes and gaps, a step of width 1 is the one that it always was."""
    chance = random.Random(0)
    for _ in range(2000):
        count, confirmations = chance.randint(2, 20), chance.randint(1, 3)
        tried = chance.sample(range(count), chance.randint(0, count))
        votes = {at: chance.choices((True, False), k=chance.randint(0, MAX_VOTES)) for at in tried}
        if chance.random() < 0.8:  # mostly past the ends, where the search is
            votes |= {0: [False], count - 1: [True]}
        closed = set(chance.sample(range(count), chance.randint(0, count // 2)))
        step = next_step(count, votes, closed, width=1, confirmations=confirmations)
        expected = one_at_a_time(count, votes, closed, confirmations)
        assert (step.at if isinstance(step, Measure) else None) == (None if expected is None else (expected,))

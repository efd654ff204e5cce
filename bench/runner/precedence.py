"""Which job comes before which: first numbers first, wherever the run ends no later for it.

The longest remaining path first ends a run earliest, and shows its first number last: what a job is worth to
somebody who waits for numbers does not enter it. Here what is nearest to a number comes first wherever the
run then ends hardly later (`SHARE`); elsewhere only as much as takes that share of it.

Source: R. L. Graham 1969, "Bounds on multiprocessing timing anomalies", theorem 1: on P equal slots no order
of jobs ends later than W / P + (1 - 1 / P) C, with W their work and C their longest chain.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import NamedTuple

SHARE = 0.02
"""By what share of the whole a run may end later, so that its first numbers come early."""

_TIER = 1e12
"""Seconds: more than any run takes, so that no preference among equals reaches from one tier into another."""


class Turn(IntEnum):
    """What a job is to somebody who waits for numbers."""

    CLEAN = 0
    """A number of images that no attack has moved: it comes first of all."""
    VERDICT = 1
    """Any other number."""
    TRAINING = 2
    """What numbers are of; long trainings decide when a run ends."""
    REST = 3
    """What a number is made from, or a job that leads to none."""


class Left(NamedTuple):
    """What is left of a run."""

    graph: Mapping[int, Sequence[int]]
    """Every job, by a number, with those that it needs, which come before it; also jobs that are over."""
    seconds: Sequence[float]
    """The time of each job."""
    ways: Mapping[int, float]
    """The longest way from each to the end, itself included, in seconds."""
    over: frozenset[int]
    """The jobs that are over."""
    turns: Sequence[Turn]
    """What each job is."""
    networks: Sequence[Hashable]
    """The network that each job is about; None: none."""


def precedence(left: Left, past: float, slots: int) -> dict[int, float]:
    """Return a value for each job; of those that are ready, the one with the smallest comes first.

    Values that differ by some seconds are of jobs that are about as near to a number, or to the end.

    Args:
        left: What is left of the run.
        past: Seconds since the run began.
        slots: How many equal slots do it, 1 or more; 0: they are unequal, and nobody knows when it ends.

    Returns:
        Seconds, negative or not.
    """
    waiting = {number: -left.ways[number] for number in left.graph if number not in left.over}
    verdicts = sorted(
        (left.turns[number], _cost(left, number), number)
        for number in waiting
        if left.turns[number] <= Turn.VERDICT
    )
    if not verdicts:
        return waiting
    chain, work = (
        max(left.ways[number] for number in waiting),
        sum(left.seconds[number] for number in waiting),
    )
    early = SHARE * (past + max(chain, work / max(slots, 1)))
    nearest = _nearest(left, waiting, verdicts)
    # Graham's bound spares the two trials in most runs.
    if slots and (
        (1 - 1 / slots) * chain <= early or _end(left, nearest, slots) <= _end(left, waiting, slots) + early
    ):
        waiting = nearest
        verdicts = [each for each in verdicts if each[0] is Turn.CLEAN]
    return waiting | _brought_forward(left, verdicts, early)


def _end(left: Left, values: Mapping[int, float], slots: int) -> float:
    """Return in how many seconds equal slots are done that take the first ready job each time."""
    waits: dict[int, int] = {}
    after: dict[int, list[int]] = defaultdict(list)
    for number in values:
        needs = [need for need in left.graph[number] if need in values]
        waits[number] = len(needs)
        for need in needs:
            after[need].append(number)
    ready = [(value, number) for number, value in values.items() if not waits[number]]
    heapify(ready)
    busy: list[tuple[float, int]] = []
    now = 0.0
    while ready or busy:
        while ready and len(busy) < slots:
            number = heappop(ready)[1]
            heappush(busy, (now + left.seconds[number], number))
        now, number = heappop(busy)
        for each in after[number]:
            waits[each] -= 1
            if not waits[each]:
                heappush(ready, (values[each], each))
    return now


def _below(left: Left, number: int, also: Callable[[int], bool]) -> Iterator[int]:
    """Yield a job, and below it those that are not over and for which `also` holds, each once."""
    seen, stack = {number}, [number]
    while stack:
        job = stack.pop()
        yield job
        more = [need for need in left.graph[job] if need not in seen and need not in left.over and also(need)]
        seen.update(more)
        stack += more


def _cost(left: Left, verdict: int) -> float:
    """Return the seconds of work that are left for a number, its trainings aside."""
    below = _below(left, verdict, lambda need: left.turns[need] is not Turn.TRAINING)
    return sum(left.seconds[job] for job in below)


def _nearest(
    left: Left, waiting: Mapping[int, float], verdicts: Sequence[tuple[Turn, float, int]]
) -> dict[int, float]:
    """Return values by which what is nearest to a number comes first, after the trainings of all."""
    found: dict[int, float] = {}
    first: dict[Hashable, float] = {}
    for _, cost, verdict in verdicts:
        first.setdefault(left.networks[verdict], cost)
        # What several numbers need is taken for the cheapest of them.
        for job in _below(left, verdict, lambda need: need not in found):
            found.setdefault(job, cost)
    soonest = min(first.values())
    for job in waiting:
        if left.turns[job] is Turn.TRAINING:
            found[job] = -_TIER - left.ways[job]
        elif job not in found:
            # It leads to no number, and comes after the first one of what it is about.
            found[job] = max(left.seconds[job], first.get(left.networks[job], soonest))
    return found


def _brought_forward(
    left: Left, verdicts: Sequence[tuple[Turn, float, int]], most: float
) -> dict[int, float]:
    """Return values of what comes first of all: clean numbers, and as much as `most` seconds allow.

    A training comes along where a clean number of its network fits: it only loads weights, say.
    """
    found: dict[int, float] = {}
    spent = 0.0
    for turn, _, verdict in verdicts:
        clean = turn is Turn.CLEAN
        whole = list(_below(left, verdict, lambda need: need not in found))
        own = [job for job in whole if left.turns[job] is not Turn.TRAINING]
        takes, needed = (sum(left.seconds[job] for job in each) for each in (own, whole))
        if clean and spent + needed <= most:
            own, takes = whole, needed
        elif not clean and spent + takes > most:
            break
        spent += takes
        tier = 3 if clean else 2
        found.update(dict.fromkeys(own, -tier * _TIER + spent))
    return found

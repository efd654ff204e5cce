"""The number of a condition as soon as it is judged, as a table of it alone has it. Imports no torch."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.console import condition_name
from bench.report.render import words
from bench.results import metrics
from bench.results.conditions import Condition
from bench.results.metrics import METRICS, Metric
from bench.results.outcomes import FrameOf, Rows, arrays
from bench.suite.layout import asked_of, idle_of


class Number(NamedTuple):
    """What a condition has come to."""

    name: str
    """The condition."""
    text: str
    """The number with its interval, its metric and how many examples it is of."""

    def __str__(self) -> str:
        """Return both as one line."""
        return f"{self.name}: {self.text}"


class Numbers:
    """Gives the numbers of conditions by the key of their evaluation.

    Accuracy where there is a radius, the median distance where an attack moves as little as it can. A random
    defense counts by the share of its draws, and refusals as everywhere. Attacks that were run as one have
    one number.

    Args:
        conditions: The conditions of the plan.
        outcomes: Gives the outcomes of an evaluation.
    """

    def __init__(self, conditions: Iterable[Condition], outcomes: FrameOf) -> None:
        known = list(conditions)
        self._outcomes = outcomes
        self._idle = idle_of(known)
        self._by_job: dict[str, dict[object, Condition]] = {}
        for each in known:
            self._by_job.setdefault(each.job, {}).setdefault(each.radius, each)

    def of(self, job: str) -> list[Number]:
        """Return the numbers of an evaluation, one for each radius at which it is read.

        Args:
            job: The key of the evaluation, which is done.
        """
        if job not in self._by_job or (rows := self._rows(job)) is None:
            return []
        return [self._number(each, rows) for each in self._by_job[job].values()]

    def _rows(self, job: str) -> Rows | None:
        frame = self._outcomes(job)
        return None if frame is None else arrays(frame)

    def _number(self, condition: Condition, rows: Rows) -> Number:
        facts = condition.facts
        free = facts.kind == "minimum-norm" and not facts.idle
        chosen = METRICS["distance" if free and condition.radius is None else "accuracy"]
        idle = self._idle.get(asked_of(condition), ()) if free else ()
        clean = next((found for each in idle if (found := self._rows(each.job)) is not None), None)
        name = _name(condition)
        if idle and clean is None:
            # A table would have another number later.
            return Number(name, f"judged; its {chosen.name} waits for the clean images")
        if free and clean is None and condition.radius is not None:
            return Number(name, f"judged; its {chosen.name} needs the clean images, which no task asks about")
        if clean is not None and condition.radius is not None:
            rows = metrics.within(rows, clean, condition.radius)
        return Number(name, _text(chosen, rows, clean))


def _text(chosen: Metric, rows: Rows, clean: Rows | None) -> str:
    found = metrics.estimate(chosen, {0: [metrics.score(chosen, rows, clean)]})
    if found is None:
        return f"no example counts for {chosen.name}"
    what = "median distance" if chosen.summary == "median" else chosen.name
    unit = "%" if chosen.unit == "percent" else ""
    interval = words.interval(found, chosen.unit)
    between = f" [{interval}]" if interval else ""
    return f"{what} {words.number(found.value, chosen.unit)}{unit}{between}, n {found.n}"


def _name(condition: Condition) -> str:
    member = condition.facts.member
    if member is None:
        return condition_name(condition.coordinates)
    return condition_name({**condition.coordinates, "attack": f"{len(member.of)} attacks as one"})


def quiet(_: str) -> list[Number]:
    """Return no number, where nobody asks for any.

    Args:
        _: The key of an evaluation.
    """
    return []


NumbersOf = Callable[[str], list[Number]]
"""Gives the numbers of an evaluation by its key."""

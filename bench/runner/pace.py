"""How far an attack is inside its shard: the passes that the referee sees, told every few seconds.

Counted where an attack asks, by whole numbers of points: no device waits for it, and no result depends on it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bench.runner.training import Progress
from bench.suite.jobs import Craft

EVERY = 5.0
"""Seconds between two tellings."""


class Pace:
    """Adds up the points that an attack asks about, and tells now and then how many passes they are.

    Args:
        progress: Told ``{"done": 12.5, "of": 40, "unit": "passes"}``, both for each example, `of` at most.
        examples: How many examples are attacked, 1 or more.
        most: The passes that the attack declares for each, 1 or more.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, progress: Progress, examples: int, most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._examples, self._most, self._clock = progress, examples, most, clock
        self._points = 0
        self._next = clock() + EVERY

    def __call__(self, points: int) -> None:
        """Note that an attack asks.

        Args:
            points: About how many points.
        """
        self._points += points
        if (now := self._clock()) >= self._next:
            self._next = now + EVERY
            told: Mapping[str, Any] = {
                "done": round(self._points / self._examples, 1),
                "of": self._most,
                "unit": "passes",
            }
            self._progress(told)


def unheard(_: int) -> None:
    """Do nothing about an attack's questions.

    Args:
        _: How many points it asks about.
    """


_HEARD: ContextVar[Callable[[int], None]] = ContextVar("heard", default=unheard)


def heard() -> Callable[[int], None]:
    """Return what is to be told of an attack's questions in this block."""
    return _HEARD.get()


@contextmanager
def telling(job: Craft, progress: Progress | None) -> Iterator[None]:
    """Tell in the block how far the attack of a job is.

    Args:
        job: The job.
        progress: Told the facts; None: nobody.
    """
    if progress is None:
        yield
        return
    run = job.attack_run
    most = run.attack.entry.passes(run.attack.params) * (run.view.draws if run.view else 1)
    token = _HEARD.set(Pace(progress, max(job.stop - job.start, 1), most))
    try:
        yield
    finally:
        _HEARD.reset(token)

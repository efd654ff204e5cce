"""Flags of a defense, whatever attacks it."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bench.report.checks.evidence import Evidence
from bench.report.checks.flags import Flag, Level
from bench.results.metrics import binomial_p, is_correct
from bench.results.outcomes import Rows

CHANCE = 0.01
"""Significance level."""

REFUSED: Sequence[tuple[float, Level]] = ((0.5, "alarm"), (0.2, "doubt"), (0.05, "note"))
"""The shares of refused clean images that raise a flag, and its levels."""


MEASURED = ("at-chance", "refuses-clean")
"""Codes of an examination of which the outcomes tell more: on all examples."""


def defense_flags(seen: Sequence[Evidence]) -> list[Flag]:
    """Return the flags that a defense raises by itself.

    Args:
        seen: The evidence of conditions in which it is scored.

    Returns:
        The flags, each once, in the order of the checks.
    """
    return list(dict.fromkeys(flag for check in _CHECKS for flag in check(seen)))


def _clean(seen: Sequence[Evidence]) -> list[Rows]:
    """Return the answers to unmoved images that are known of the cell's defenses, each once."""
    every = [each.rows if each.condition.facts.idle else each.clean for each in seen]
    return list({id(rows): rows for rows in every if rows is not None}.values())


def _at_chance(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for rows in _clean(seen):
        n = len(rows["truth"])
        guess = float(np.unique(rows["truth"], return_counts=True)[1].max() / n) if n else 1.0
        right = int(is_correct(rows).sum())
        # Of few examples even right answers alone would not show it.
        if guess**n < CHANCE and binomial_p(right, n, guess) > CHANCE:
            yield Flag(
                "at-chance",
                f"{right} of {n} clean images are answered rightly; whoever always answers the most frequent "
                f"class gets {round(guess * n)}",
            )


def _fitted_on_scored(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if any(each.condition.facts.trained_on_them for each in seen):
        yield Flag("fitted-on-scored", "the defense was fitted on the split that it is scored on")


def _refuses(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for rows in _clean(seen):
        count, n = int(rows["rejected"].sum()), len(rows["rejected"])
        level = next((level for share, level in REFUSED if _above(count, n, share)), None)
        if level is not None:
            yield Flag("refuses-clean", f"{count} of {n} clean images are refused", level)


def _above(count: int, n: int, share: float) -> bool:
    """Return whether a share is above another one by more than chance (exact binomial test)."""
    return binomial_p(count, n, share) < CHANCE


def _examined(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for found in {id(each.examination): each.examination for each in seen if each.examination}.values():
        for code, level, message in found["found"]:
            if level != "note" and code not in MEASURED:
                yield Flag("examination", f"{code}: {message}", level)


_CHECKS: Sequence[Callable[[Sequence[Evidence]], Iterable[Flag]]] = (
    _at_chance,
    _fitted_on_scored,
    _refuses,
    _examined,
)

"""The outcomes that flags are raised from."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.results.conditions import Condition
from bench.results.metrics import Mask
from bench.results.outcomes import OWN_SOURCE, Rows

ITERATES = 1.5
"""Gradients of an example above which an attack takes more than one step."""


@dataclass(frozen=True)
class Evidence:
    """A condition whose evaluation is done, with its outcomes."""

    condition: Condition
    rows: Rows
    """The outcomes as they are stored."""
    validated: Rows
    """The outcomes as they read at the condition's radius."""
    clean: Rows | None
    """The answers of the same defense to the unmoved images; None where they are not needed or not there."""
    trial: Mapping[str, Any] | None = None
    """What the attack's trial found; None where there was none."""
    examination: Mapping[str, Any] | None = None
    """What the defense's examination found; None where there was none."""
    invalid: Mapping[str, tuple[int, float | None]] | None = None
    """Why moves were invalid: by reason how many, and by how much at most; None where nobody noted it."""


def coordinates(condition: Condition, *without: str) -> tuple[tuple[str, Hashable], ...]:
    """Return the coordinates of a condition as a value to group by.

    Args:
        condition: The condition.
        without: Coordinates to leave out, with all below them (``inference`` and ``inference.cycles``).

    Returns:
        Names and values, in order of their names.
    """
    return tuple(
        (name, value)
        for name, value in sorted(condition.coordinates.items())
        if name.partition(".")[0] not in without
    )


def title(condition: Condition) -> str:
    """Return the name of a condition's attack with its view: ``pgd (e2e_last)``.

    Args:
        condition: The condition.

    Returns:
        The name; without a view, that of the attack alone.
    """
    return condition.attack if condition.view is None else f"{condition.attack} ({condition.view})"


def differed(every: Sequence[Rows]) -> tuple[int, int]:
    """Return how many answers differed when they were asked again.

    Args:
        every: Outcomes.

    Returns:
        How many differed, and how many were asked again.
    """
    answers = np.concatenate([rows["differs"] for rows in every]) if every else np.empty(0)
    return int(np.nansum(answers)), int((~np.isnan(answers)).sum())


def is_random(seen: Sequence[Evidence]) -> bool:
    """Return whether a defense is random, by its declaration or by what was seen.

    Args:
        seen: Evidence of one defense.

    Returns:
        Whether two answers to one image may differ.
    """
    return any(each.condition.facts.random for each in seen) or differed([each.rows for each in seen])[0] > 0


def is_own_source(evidence: Evidence) -> bool:
    """Return whether the images of a transfer were crafted on the weights of the defense itself.

    Args:
        evidence: The evidence of a condition.

    Returns:
        Whether it is known to be so.
    """
    known = evidence.rows.get(OWN_SOURCE)
    return evidence.condition.facts.source is not None and known is not None and bool((known > 0).any())


def iterates(evidence: Evidence) -> bool:
    """Return whether an attack takes more than one step with a gradient; so it is where nobody counted.

    Args:
        evidence: The evidence of a condition.
    """
    counted = evidence.rows.get("backwards")
    return counted is None or float(counted.mean()) / evidence.condition.facts.averaged > ITERATES


def failed(rows: Rows) -> Mask:
    """Return the examples on which an attack failed although the defense was right without a refusal.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,).
    """
    return np.asarray((rows["label"] == rows["truth"]) & ~rows["rejected"], np.bool_)

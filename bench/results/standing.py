"""Outcomes of attacks that were run as one, each on what stood against those before it (worst mode)."""

from collections.abc import Iterable, Sequence

import numpy as np

from bench.results.conditions import Condition, Member
from bench.results.metrics import Mask
from bench.results.outcomes import RAISED, Frame, Rows, beginning, select

FOUND_BY = "found_by"
"""The note of the attack that broke an example: its place, or -1."""


def columns(members: Iterable[Member]) -> set[str]:
    """Return the columns of outcomes that tell what some of the attacks did.

    Args:
        members: The attacks.
    """
    return {name for each in members for name in (FOUND_BY, _passes(each))}


def _passes(member: Member) -> str:
    return f"forwards.{member.label}"


def saw(rows: Frame, member: Member) -> Mask:
    """Return which examples stood when an attack's turn came, so that it saw them: bool (N,).

    Args:
        rows: Outcomes of N examples.
        member: The attack.
    """
    # The look at its image counts, so that an attack that asks for nothing has a pass, too.
    return np.asarray(np.asarray(rows[_passes(member)]) > 0, np.bool_)


def broke(rows: Frame, member: Member) -> Mask:
    """Return which examples an attack broke, bool (N,).

    Args:
        rows: Outcomes of N examples.
        member: The attack.
    """
    return np.asarray(np.asarray(rows[FOUND_BY]) == member.place, np.bool_)


def raised(rows: Frame) -> dict[str, Mask]:
    """Return on which examples attacks raised that were run with others as one.

    There they moved nothing, and the others went on: whether they would have broken an example is not known.

    Args:
        rows: Outcomes of N examples.

    Returns:
        By the label of each attack that raised anywhere: bool (N,).
    """
    masks = {
        name.removeprefix(RAISED): np.asarray(values > 0, np.bool_)
        for name, values in beginning(rows, RAISED).items()
    }
    return {label: mask for label, mask in masks.items() if mask.any()}


def left(rows: Rows, members: Sequence[Member]) -> Rows:
    """Return the outcomes of some of the attacks: of the examples that any of them saw.

    What another attack broke later, these left standing: it counts as right.

    Args:
        rows: Outcomes of all the attacks together, with `columns`.
        members: Some of the attacks, at least one.
    """
    seen, own = (np.any([ask(rows, each) for each in members], axis=0) for ask in (saw, broke))
    label = np.where(own, rows["label"], rows["truth"])
    return select({**rows, "label": label, "rejected": rows["rejected"] & own}, seen)


def apart(conditions: Iterable[Condition]) -> bool:
    """Return whether some conditions are a part of attacks that were run as one, and not all of them.

    Args:
        conditions: The conditions of a cell.
    """
    every: dict[str, set[str]] = {}
    shown: dict[str, set[str]] = {}
    for each in conditions:
        if (member := each.facts.member) is not None:
            every.setdefault(each.job, set()).update(member.of)
            shown.setdefault(each.job, set()).add(member.label)
    return every != shown

"""What a flag is, and which there are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["note", "doubt", "alarm"]
"""A ``note`` says what a reader should know; a ``doubt``, why the number may be too high; an ``alarm``, that
it cannot be quoted until the reason is found."""

LEVELS: tuple[Level, ...] = ("note", "doubt", "alarm")
"""The levels, the gravest last."""

CODES: Mapping[str, Level] = {
    "blind-beats-seeing": "doubt",
    "surrogate-beats-exact": "doubt",
    "one-step-beats-many": "alarm",
    "grows-with-radius": "doubt",
    "unbounded-fails": "doubt",
    "view-differs": "alarm",
    "probabilities": "doubt",
    "ties": "doubt",
    "margin-grew": "doubt",
    "lost-successes": "doubt",
    "short-moves": "doubt",
    "still-rising": "doubt",
    "no-gradient-asked": "doubt",
    "flat-gradient": "doubt",
    "saturated-loss": "doubt",
    "attack-raised": "doubt",
    "above-clean": "doubt",
    "trial": "doubt",
    "examination": "doubt",
    "at-chance": "alarm",
    "fitted-on-scored": "alarm",
    "refuses-clean": "doubt",
    "answers-differ": "alarm",
    "unluckiest-answer": "note",
    "invalid-moves": "doubt",
    "not-finite": "doubt",
    "out-of-reach": "note",
    "source-is-victim": "note",
    "unequal-examples": "note",
}
"""The codes of all flags, with their usual levels; `docs/flags.md` has a section for each."""


@dataclass(frozen=True)
class Flag:
    """A reason to doubt a number, or a whole table."""

    code: str
    """One of `CODES`."""
    message: str
    """What was found, in a sentence with its counts."""
    graver: Level | None = None
    """The level, where it is not the usual one of the code."""

    @property
    def level(self) -> Level:
        """How grave it is."""
        return self.graver or CODES[self.code]

    @property
    def advice(self) -> str:
        """Where the documentation says what it may mean, and what to do."""
        return f"docs/flags.md#{self.code}"


def worst_level(flags: Iterable[Flag]) -> Level | None:
    """Return the gravest level among flags.

    Args:
        flags: The flags.

    Returns:
        The level; None where there is no flag.
    """
    return max((each.level for each in flags), key=LEVELS.index, default=None)

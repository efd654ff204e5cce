"""What the gate says: a finding for each condition and each row's worst case, and one status for all.

The statistics are in `statistics.py`, the rules in `judge.py`; what a report looks like is decided in
`render`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bench.gate.statistics import Loss

Verdict: TypeAlias = Literal["held", "regressed", "undecided", "not comparable", "incomplete"]
"""What is known of the loss: within the tolerance for certain, above it for certain, or neither; or why
nothing is known: another question was asked, or something that is needed was not measured."""

Tier: TypeAlias = Literal["critical", "advisory"]
"""Whether a finding decides the exit status, or is only told."""

STATUS: Mapping[Verdict, int] = {
    "held": 0,
    "regressed": 1,
    "not comparable": 3,
    "incomplete": 4,
    "undecided": 5,
}
"""The exit status of each verdict; 2 is a wrong use, as in every command."""

WORST_FIRST: Sequence[Verdict] = ("regressed", "not comparable", "incomplete", "undecided", "held")
"""Of several verdicts the first of these is the whole's."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is compared. Two are the same if and only if kind and coordinates are."""

    kind: Literal["condition", "worst case"]
    """A condition (defense, attack, view, read-out, threat), or the worst case of a row: all attacks on one
    defense under one threat, the clean images included, of the examples that all of them saw."""
    coordinates: Mapping[str, Any]
    """The coordinates that tell it from others, without the seed (`bench.results.conditions.COORDINATES`)."""
    name: str
    """The same in words, such as ``cnnf, last, pgd (e2e_last), digits, linf 0.1``; no two share one."""
    radius: float | None = None
    """The radius at which distances of a minimum-norm attack are read; None for any other subject."""

    @property
    def _identity(self) -> tuple[str, frozenset[tuple[str, str]]]:
        # By what is written: a name may be rounded, and 1, 1.0 and true are equal.
        return self.kind, frozenset((name, repr(value)) for name, value in self.coordinates.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subject) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@dataclass(frozen=True)
class Flip:
    """An example that the baseline held and that is broken now; of several draws, in most of them each."""

    index: int
    """Its place in the data set."""
    truth: int
    """Its class."""
    attack: str
    """The attack that it was found by, with its view."""
    seed: int
    """The seed of the training and of the attack."""
    before: int
    """What the defense answered in the baseline; -1 for an answer that is not finite. Of several draws these
    are the first one's."""
    after: int
    """What it answers now."""
    refused: tuple[bool, bool] = (False, False)
    """Whether it refused the image, before and now."""
    shares: tuple[float, float] | None = None
    """The share of the draws of a random defense in which the example was held in the baseline, and is held
    against this attack now; None where there is one draw."""


@dataclass(frozen=True)
class Floor:
    """The least accuracy that a policy allows, and what is known of it."""

    least: float
    """The least share, in [0, 1]."""
    low: float
    """The lower Clopper-Pearson bound of the accuracy, in [0, 1]."""
    high: float
    """The upper one."""

    @property
    def verdict(self) -> Verdict:
        """``held`` where the accuracy is above the floor for certain, ``regressed`` where it is below it."""
        if self.low >= self.least:
            return "held"
        return "regressed" if self.high < self.least else "undecided"


@dataclass(frozen=True)
class Finding:
    """What is known of a subject."""

    subject: Subject
    verdict: Verdict
    reason: str
    """Why, in one sentence with its numbers."""
    tier: Tier = "critical"
    loss: Loss | None = None
    """The paired loss; None where nothing could be compared."""
    p: float | None = None
    """Its p-value after Holm's correction over all subjects; None where nothing could be compared."""
    needed: int | None = None
    """How many examples would decide, if the loss and the churn stay as they are; None where the verdict is
    not ``undecided``, or where no number would (the loss is the tolerance itself)."""
    detectable: float | None = None
    """The least true loss, as a share, that so many examples show as a regression in 8 of 10 checks; None
    where no loss is large enough for that, or where nothing could be compared."""
    floor: Floor | None = None
    replayed: bool = False
    """Whether it speaks of stored images alone."""
    suspicious: tuple[str, ...] = ()
    """Sentences about a gain that is too good, and flags that the baseline does not have."""
    flips: tuple[Flip, ...] = ()
    """Examples that were held and are broken now, in the order of their index."""


@dataclass(frozen=True)
class Replayed:
    """What stored adversarial images say about the weights of today."""

    images: int
    """How many images were shown again, those that no attack had moved included."""
    examples: int
    """How many examples they are of, each of one defense and one threat."""
    still_broken: int
    """Examples that the baseline lost to a stored image and that are lost to one now."""
    mended: int
    """Examples that the baseline lost and that no stored image breaks now; a new search may."""
    flips: tuple[Flip, ...]
    """Examples that the baseline held against everything and that a stored image breaks now."""
    beyond: int | None = None
    """How many examples stored images, or attacks begun at them, break that today's own attacks do not break,
    of the worst cases; None where nothing was attacked."""


@dataclass(frozen=True)
class Check:
    """The whole report of `bench check` and `bench compare`."""

    suite: str
    """The name of the task file, for annotations."""
    before: str
    """What is compared with: the baseline's folder, or the first results folder."""
    after: str
    """The results folder of today."""
    tolerance: float
    """The loss that is allowed, as a share."""
    alpha: float
    """The level of significance, and of the intervals (1 - alpha)."""
    findings: tuple[Finding, ...]
    replayed: Replayed | None = None
    replay_only: bool = False
    """Whether nothing but stored images was asked, so that `findings` speak of these alone."""
    notes: tuple[str, ...] = ()
    """Sentences about what may matter: other code, other versions, damage."""
    lines: Mapping[str, int] | None = None
    """The line of the task file that asks for each subject, by its name; None where there is no file."""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the critical findings; ``incomplete`` where there is none to look at."""
        found = {each.verdict for each in self.findings if each.tier == "critical"}
        return next((each for each in WORST_FIRST if each in found), "incomplete")

    @property
    def suspicious(self) -> bool:
        """Whether a critical finding is too good, or has flags that the baseline does not have."""
        return any(each.suspicious for each in self.findings if each.tier == "critical")

    def status(self, *, fail_on_gain: bool = False) -> int:
        """Return the exit status.

        Args:
            fail_on_gain: Whether a suspicious gain counts as a regression.

        Returns:
            0 held, 1 regressed, 3 not comparable, 4 incomplete, 5 undecided.
        """
        if fail_on_gain and self.suspicious:
            return STATUS["regressed"]
        return STATUS[self.verdict]

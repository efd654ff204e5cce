"""The conditions of a benchmark, as a manifest records them.

A condition has coordinates, which say what it is (data, threat, defense, attack, ...), and facts, which say
what a report must know of it. Tables are cut along coordinates alone: a fact that is added changes no table.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from operator import itemgetter
from typing import Any, Literal

QUESTION = ("data", "norm", "radius")
"""What is asked. A table pins these coordinates or shows them; it never merges them."""

CHOICE = ("attack", "view", "target")
"""What the attacker chooses: settled example by example, by the worst."""

COORDINATES = (*QUESTION, "defense", "attack", "view", "readout", "seed", "target")
"""What every condition has. Parameters that are set at inference time follow as ``inference.<name>``."""


@dataclass(frozen=True)
class Member:
    """An attack that was run with others as one, each on what stood against those before it (worst mode)."""

    label: str
    """What its notes are called by: ``forwards.<label>`` are the passes that it spent on an example."""
    place: int
    """Its place among the others: what the note ``found_by`` says of the examples that it broke."""
    of: tuple[str, ...]
    """The labels of all, in the order of their places."""


@dataclass(frozen=True)
class Facts:
    """What is known of a condition beside its coordinates."""

    attack_run: str
    """The key of the attack that was run: conditions that differ in the read-out alone share it."""
    use: str
    """The registered name of the attack."""
    access: Literal["none", "decision", "score", "gradient"]
    """What the attack sees of the model that it attacks."""
    idle: bool
    """Whether the attack leaves every image as it is."""
    kind: Literal["fixed-budget", "minimum-norm"]
    """Whether the attack stays within a radius, or looks for the least distance."""
    source: str | None
    """The defense on which the images were crafted, if it is another one (a transfer attack)."""
    exact: bool
    """Whether the view that was attacked is exactly what is scored."""
    n: int
    """Number of examples that are asked for."""
    random: bool
    """Whether two answers of the defense to the same image may differ."""
    flags: tuple[str, ...]
    """Sentences of the attack and of the defense about their own settings."""
    draws: int = 1
    """How often the defense was asked about each image, where it is random."""
    member: Member | None = None
    """Its part in what was run, where that is several attacks in one; None: it was run alone."""
    precision: str = "float32"
    """What the attack searched in; float32 judged what it found."""
    averaged: int = 1
    """How many answers of the attacked view are averaged at each point; each is a pass of its own."""
    loss: str | None = None
    """The loss that the attack climbs, where it has a choice and took another one than the cross-entropy."""
    trained_on_them: bool = False
    """Whether the defense was fitted on the split that it is scored on."""
    added: bool = False
    """Whether `bench doctor --fix` added it to the suite."""
    trial: str | None = None
    """The key of the attack's trial; None: it was not asked for."""
    examinations: tuple[str, ...] = ()
    """The keys of the defense's examinations, the one that says most first."""
    examination: str | None = None
    """The key of the one that was asked for; None: none was, or the manifest is older than this fact."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Facts":
        """Return the facts of a manifest's entry; names that are not known here are left out.

        Args:
            given: The names and values, as JSON has them.

        Returns:
            The facts.

        Raises:
            KeyError: A fact is missing that every condition has (`FACTS`).
        """
        # A suite may have ten thousand conditions, and each of its tables reads them.
        values = dict(zip(FACTS, _values(given), strict=True))
        values |= {"flags": tuple(values["flags"]), "draws": given.get("draws", 1)}
        values["precision"] = given.get("precision", "float32")
        values["averaged"] = given.get("averaged", 1)
        values["loss"] = given.get("loss")
        values["trained_on_them"] = given.get("trained_on_them", False)
        values["added"] = given.get("added", False)
        values |= {"trial": given.get("trial"), "examinations": tuple(given.get("examinations", ()))}
        values["examination"] = given.get("examination")
        if (member := given.get("member")) is not None:
            values["member"] = Member(member["label"], member["place"], tuple(member["of"]))
        return cls(**values)


FACTS = tuple(field.name for field in fields(Facts) if field.default is MISSING)
"""The names of the facts that every condition has, in the order in which a manifest has them."""

_values = itemgetter(*FACTS)


@dataclass(frozen=True)
class Condition:
    """A point of the benchmark, and the key of the evaluation that has its outcomes."""

    coordinates: Mapping[str, Any]
    """The values of `COORDINATES`, and of ``inference.<name>``; a radius of None is no limit."""
    facts: Facts
    job: str

    @property
    def data(self) -> str:
        """The name of the data set in the task file."""
        return str(self.coordinates["data"])

    @property
    def norm(self) -> str:
        """The norm of the threat: ``linf``, ``l2``, ``l1`` or ``l0``."""
        return str(self.coordinates["norm"])

    @property
    def radius(self) -> float | None:
        """The radius of the threat; None where there is no limit."""
        radius: float | None = self.coordinates["radius"]
        return radius

    @property
    def attack(self) -> str:
        """The name of the attack in the task file."""
        return str(self.coordinates["attack"])

    @property
    def view(self) -> str | None:
        """What the attack looked at; None where it looked at nothing."""
        view: str | None = self.coordinates["view"]
        return view

    @property
    def seed(self) -> int:
        """The seed of the training and of the attack."""
        return int(self.coordinates["seed"])

    @property
    def target(self) -> int | str | None:
        """The label to reach, as an offset from the true class, or ``random``; None where there is none."""
        target: int | str | None = self.coordinates["target"]
        return target


@dataclass(frozen=True)
class Skip:
    """A condition that cannot be, and why."""

    coordinates: Mapping[str, Any]
    reason: str


def conditions_of(manifest: Mapping[str, Any]) -> list[Condition]:
    """Return the conditions that a manifest lists, in its order.

    Args:
        manifest: The manifest of a suite, as JSON has it.

    Returns:
        The conditions.
    """
    return [
        Condition(each["coordinates"], Facts.read(each["facts"]), each["job"])
        for each in manifest["conditions"]
    ]


def skips_of(manifest: Mapping[str, Any]) -> list[Skip]:
    """Return the conditions that cannot be, in a manifest's order.

    Args:
        manifest: The manifest of a suite, as JSON has it.

    Returns:
        The skipped conditions with their reasons.
    """
    return [Skip(each["coordinates"], each["reason"]) for each in manifest["skips"]]

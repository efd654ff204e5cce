"""Measured conditions, from a results folder or a baseline: what was asked, and each example's outcome."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.errors import InputError
from bench.report import checks
from bench.report.checks import Evidence
from bench.results import metrics
from bench.results.conditions import Condition, Facts, conditions_of
from bench.results.manifest import Outcomes, read, stale
from bench.results.outcomes import Rows, arrays
from bench.results.store import Store

if TYPE_CHECKING:
    from bench.suite.planner import Plan, PlannedCondition

Coordinates = tuple[tuple[str, Hashable], ...]
"""The coordinates of a condition as a value to look up by (`bench.report.checks.coordinates`)."""


@dataclass(frozen=True)
class Question:
    """What was asked in a condition: two outcomes are comparable if and only if all of this is equal."""

    data: str
    """The digest of the examples: name, split, form, order and content."""
    n: int
    """How many of them were attacked."""
    norm: str
    radius: float | None
    attack: Mapping[str, Any]
    """The attack's identity: name, version, parameters, and the version of the library that does the work."""
    source: str | None
    """What the task file calls the defense that a transfer was crafted on."""
    view: Any
    """The view's name and parameters, as keys have them; None for an attack that looks at nothing."""
    exact: bool
    """Whether a success on the view is a success."""
    target: int | str | None
    readout: str
    inference: Mapping[str, Any]
    """Parameters of the defense that are set at inference time."""
    draws: int = 1
    """How often a random defense was asked about each image."""
    precision: str = "float32"
    """What the attack searched in."""

    @classmethod
    def of(cls, described: Mapping[str, Any], facts: Facts) -> "Question":
        """Return the question of a described evaluation (`bench.runner.worker.describe`).

        Args:
            described: The description, as its `job.json` has it.
            facts: What the manifest knows of the condition.
        """
        attack_run = described["attack_run"]
        return cls(
            data=attack_run["data"]["digest"],
            n=facts.n,
            norm=attack_run["norm"],
            radius=attack_run["radius"],
            attack=attack_run["attack"],
            source=facts.source,
            view=attack_run["view"],
            exact=attack_run["exact"],
            target=attack_run["target"],
            readout=described["readout"],
            inference=described["victim"]["inference"],
            draws=described.get("draws", 1),
            precision=attack_run.get("precision", "float32"),
        )

    def differences(self, other: "Question") -> list[str]:
        """Return in words how another question differs.

        Args:
            other: The question of today.

        Returns:
            A phrase for each difference, such as ``n: 500 in the baseline, 100 now``; none for the same
            question.
        """
        found = []
        for name, before in vars(self).items():
            now = getattr(other, name)
            if before == now:
                continue
            if name == "data":
                found.append("data: other examples than the baseline's")
            elif isinstance(before, Mapping) and isinstance(now, Mapping):
                found += [f"{name}.{each}" for each in _differ(before, now)]
            else:
                found.append(f"{name}: {_plain(before)} in the baseline, {_plain(now)} now")
        return found


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value}"


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterable[str]:
    """Yield the entries in which two mappings differ, by their dotted names."""
    for name in dict.fromkeys((*before, *now)):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differ(one, other, f"{above}{name}.")
        elif one != other:
            yield f"{above}{name}: {_plain(one)} in the baseline, {_plain(other)} now"


@dataclass(frozen=True)
class Measured:
    """A condition with its outcomes."""

    condition: Condition
    question: Question
    rows: Rows
    """The outcomes, in ascending order of ``index``."""
    network: str | None = None
    """What the network computes with, as a digest: weights, code, settings at inference time; None where
    nobody can tell."""
    flags: tuple[tuple[str, str], ...] = ()
    """The flags that its outcomes raise, by themselves and beside the other attacks of its row: the sentence
    and the code of each."""

    @property
    def codes(self) -> set[str]:
        """The codes of its flags."""
        return {code for _, code in self.flags}


@dataclass(frozen=True)
class Missing:
    """A condition without outcomes."""

    condition: Condition
    question: Question | None
    """What would have been asked; None where nobody can tell."""
    reason: str
    """Why there are none."""


@dataclass(frozen=True)
class Measurements:
    """All conditions of a suite, measured or not."""

    place: str
    """The folder, for messages."""
    measured: Mapping[Coordinates, Measured]
    missing: Mapping[Coordinates, "Missing"] = field(default_factory=dict)
    """Conditions without outcomes."""
    notes: tuple[str, ...] = ()
    """Sentences about what may matter."""

    @property
    def asked(self) -> dict[Coordinates, tuple[Condition, Question | None]]:
        """Every condition, measured or not, with its question."""
        every: list[Measured | Missing] = [*self.measured.values(), *self.missing.values()]
        return {place_of(each.condition): (each.condition, each.question) for each in every}


def place_of(condition: Condition) -> Coordinates:
    """Return what tells a condition from the others of its suite."""
    return checks.coordinates(condition)


def row_of(condition: Condition) -> Coordinates:
    """Return what the conditions of one row share: the question's data and threat, and who is asked.

    Args:
        condition: The condition.

    Returns:
        All coordinates but those that the attacker chooses, and the seed.
    """
    return checks.coordinates(condition, "attack", "view", "target", "seed")


def victim_of(condition: Condition) -> Coordinates:
    """Return who is asked about which data set, whatever the threat and the attack are."""
    return checks.coordinates(condition, "attack", "view", "target", "norm", "radius")


def from_results(root: Path, suite: Path) -> Measurements:
    """Read the outcomes of a results folder.

    Args:
        root: The results folder.
        suite: The task file that it was made from, for messages.

    Returns:
        Every condition of its manifest.

    Raises:
        InputError: The folder has no manifest.
    """
    manifest, store = read(root, suite), Store(root)

    def described(condition: Condition, whole: bool) -> Mapping[str, Any] | None:
        return store.job("evaluate", condition.job) if whole else None

    found = _read(root, conditions_of(manifest), described)
    return replace(found, notes=(*found.notes, *stale(manifest, suite, root)))


def from_plan(root: Path, plan: "Plan") -> Measurements:
    """Read the outcomes of a plan's conditions.

    Args:
        root: The results folder.
        plan: The plan.

    Returns:
        Every condition of the plan.
    """
    # What a results folder says is read without torch.
    from bench.runner.worker import describe

    jobs = {each.job.key: each.job for each in plan.conditions}
    known = cache(describe)

    def described(condition: Condition, whole: bool) -> Mapping[str, Any]:
        return known(jobs[condition.job])

    return _read(root, [condition_of(each) for each in plan.conditions], described)


def condition_of(planned: "PlannedCondition") -> Condition:
    """Return a condition of a plan as a manifest has it."""
    return Condition(planned.coordinates, Facts.read(planned.facts), planned.job.key)


def network_of(described: Mapping[str, Any], receipt: Mapping[str, Any] | None) -> str | None:
    """Return a digest of what a network computes with: equal digests are one network, to the last bit.

    Args:
        described: The description of an evaluation (`bench.runner.worker.describe`).
        receipt: Its receipt.

    Returns:
        The digest; None where the receipt does not tell the weights.
    """
    victim = described["victim"]
    weights = (receipt or {}).get("inputs", {}).get(victim["train"]["key"])
    if weights is None:
        return None
    # A parameter that names code is a pair: how it is written, and the digests of the modules.
    named = {
        name: value[1]
        for name, value in victim["train"]["defense"]["params"].items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], Mapping)
    }
    code = {
        name: digest
        for name, digest in (receipt or {}).get("sources", {}).items()
        if not name.startswith("attacks.")
    }
    told = [
        weights,
        victim["inference"],
        described["readout"],
        victim["train"]["defense"]["use"],
        named,
        code,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(
    root: Path,
    conditions: Iterable[Condition],
    described: Callable[[Condition, bool], Mapping[str, Any] | None],
) -> Measurements:
    """Return conditions with their outcomes.

    Args:
        root: The results folder.
        conditions: The conditions.
        described: Returns the description of a condition's evaluation, told whether it is whole; None where
            nobody can tell.

    Raises:
        InputError: Attacks were run as one.
    """
    conditions = list(conditions)
    if any(each.facts.member for each in conditions):
        raise InputError(
            f"{root}: in worst mode each attack sees only what stood against those before it, and a check "
            "compares attacks one by one: leave out worst"
        )
    outcomes, store = Outcomes(root), Store(root)
    measured: dict[Coordinates, Measured] = {}
    missing: dict[Coordinates, Missing] = {}
    for condition in conditions:
        frame = outcomes(condition.job)
        told = described(condition, frame is not None)
        question = None if told is None else Question.of(told, condition.facts)
        if frame is None or question is None or told is None:
            reason = outcomes.damaged.get(condition.job, "it was not run, or failed")
            missing[place_of(condition)] = Missing(condition, question, reason)
        else:
            network = network_of(told, store.receipt("evaluate", condition.job))
            measured[place_of(condition)] = Measured(condition, question, arrays(frame), network)
    return Measurements(str(root), flagged(measured), missing, tuple(outcomes.faults))


def flagged(measured: Mapping[Coordinates, Measured]) -> dict[Coordinates, Measured]:
    """Return measured conditions with the flags that their outcomes raise.

    Args:
        measured: The conditions, without flags.

    Returns:
        The same, each with its own flags and those of its row.
    """
    still = {victim_of(each.condition): each.rows for each in measured.values() if each.condition.facts.idle}
    rows: dict[Coordinates, dict[Coordinates, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for each in measured.values():
        rows[row_of(each.condition)][checks.coordinates(each.condition, "seed")].append(each)
    found: dict[Coordinates, Measured] = {}
    for cells in rows.values():
        evidence = [
            tuple(_evidence(each, still.get(victim_of(each.condition))) for each in cell)
            for cell in cells.values()
        ]
        for cell, seen, beside in zip(cells.values(), evidence, checks.compared([evidence])[0], strict=True):
            flags = [*checks.defense_flags(seen), *checks.cell_flags(seen), *beside]
            said = tuple((each.message, each.code) for each in flags)
            for each in cell:
                found[place_of(each.condition)] = replace(each, flags=said)
    return {place: found[place] for place in measured}


def _evidence(measured: Measured, clean: Rows | None) -> Evidence:
    return Evidence(measured.condition, measured.rows, measured.rows, clean)


def clean_rows(measurements: Iterable[Measured]) -> dict[Coordinates, Rows]:
    """Return the answers to unmoved images by who is asked, seed included.

    Args:
        measurements: Measured conditions.

    Returns:
        The rows of those in which nothing is attacked; of several, those with most examples.
    """
    found: dict[Coordinates, Rows] = {}
    for each in sorted(measurements, key=lambda one: len(one.rows["index"])):
        if each.condition.facts.idle:
            found[victim_of(each.condition)] = each.rows
    return found


def held(measured: Measured, clean: Mapping[Coordinates, Rows], radius: float | None) -> metrics.PerExample:
    """Return 1 for each example that is held in a condition, and 0 for each that is broken.

    Of a random defense with several draws it is the share of them in which the example is held.

    Args:
        measured: The condition.
        clean: The answers to unmoved images (`clean_rows`).
        radius: The radius at which the distances of a minimum-norm attack are read; None for other attacks.

    Returns:
        The examples and their values.
    """
    if radius is None:
        return metrics.score(metrics.METRICS["accuracy"], measured.rows, None)
    rows, still = measured.rows, clean.get(victim_of(measured.condition))
    if still is not None:
        rows, still = metrics.shared(rows, still)
    return metrics.PerExample(rows["index"], metrics.held_at(rows, still, radius))


def distances(measured: Measured, clean: Mapping[Coordinates, Rows]) -> metrics.PerExample:
    """Return how far each image was moved to break the defense (`metrics.least_distance`).

    Args:
        measured: A condition of a minimum-norm attack.
        clean: The answers to unmoved images.
    """
    still = clean.get(victim_of(measured.condition))
    return metrics.score(metrics.METRICS["distance"], measured.rows, still)


MAJORITY = 0.5
"""Where examples are named or counted, one is held if a random defense holds it in more draws than this."""


@dataclass(frozen=True)
class Finders:
    """Which attack breaks each example of a worst case."""

    index: Any
    """Places in the data set (N,), ascending."""
    number: Any
    """The position of the attack among those of the worst case, int64 (N,); -1 where none breaks it."""
    held: Any
    """How often the example is held against that attack, or against the strongest, in [0, 1], (N,)."""


def found_by(attacks: Sequence[Measured], values: Sequence[metrics.PerExample]) -> Finders:
    """Return which of the attacks of a worst case finds a failure at each example.

    It is the one that the example is held against least often: of several the first, and unmoved images
    before all, since nothing has to be found where the defense is wrong without an attack.

    Args:
        attacks: The conditions of one worst case and one seed, at least one.
        values: The values of each (`held`).

    Returns:
        The attacks, of the examples that any of them saw.
    """
    index = np.unique(np.concatenate([each.index for each in values]))
    table = np.full((len(values), len(index)), np.inf)
    for line, each in zip(table, values, strict=True):
        line[np.searchsorted(index, each.index)] = each.values
    order = np.array(sorted(range(len(attacks)), key=lambda at: not attacks[at].condition.facts.idle))
    held = table.min(0)
    return Finders(index, np.where(held > MAJORITY, -1, order[table[order].argmin(0)]), held)


def worst_of(parts: Sequence[metrics.PerExample]) -> metrics.PerExample:
    """Return the least value of each example over several attacks, each of which may lack some examples.

    For what stored images prove: that an example breaks, by whichever of them. A worst case that is compared
    is of the examples that all attacks saw (`metrics.settle`).

    Args:
        parts: The values of each attack, at least one.

    Returns:
        The values of the examples that any attack has.
    """
    index = np.unique(np.concatenate([each.index for each in parts]))
    values = np.full(len(index), np.nan)
    for each in parts:
        at = np.searchsorted(index, each.index)
        values[at] = np.fmin(values[at], each.values)
    return metrics.PerExample(index, values)

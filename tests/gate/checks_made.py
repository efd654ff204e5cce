"""Checks made by hand, for what reads them: no number in them was measured."""

from dataclasses import replace
from typing import Any

from bench.gate.statistics import Loss
from bench.gate.verdicts import Check, Finding, Flip, Floor, Replayed, Subject


def subject(attack: str = "pgd", **changes: Any) -> Subject:
    """Return a condition; without an attack, the worst case of its row."""
    at = {"data": "digits", "norm": "linf", "radius": 8 / 255, "defense": "cnnf", "readout": "last"}
    if attack:
        at |= {"attack": attack, "view": None if attack == "clean" else "e2e_last", "target": None}
    at |= changes
    by = f"{attack} ({at['view']})" if attack and at["view"] else attack or "worst case"
    name = f"{at['defense']}, {by}, {at['readout']}, {at['data']} {at['norm']} 8/255"
    return Subject("condition" if attack else "worst case", at, name)


def loss(n: int = 500, before: float = 0.9, lost: float = 1, gained: float = 0, **ends: float) -> Loss:
    """Return a loss; its interval is as wide as asked for, else two points either way."""
    value = (lost - gained) / n
    given = {"p": 0.5, "low": value - 0.02, "high": value + 0.02} | ends
    return Loss(n, before, before - value, lost, gained, **given)


def flips(n: int, attack: str = "pgd (e2e_last)") -> tuple[Flip, ...]:
    """Return examples that broke, of class 0 to 9."""
    return tuple(Flip(7 * each, each % 10, attack, 0, each % 10, (each + 3) % 10) for each in range(n))


HELD = Finding(
    subject("clean"),
    "held",
    "The loss is at most 0.7 points (99 % interval).",
    loss=loss(before=0.982, lost=1, gained=2, low=-0.011, high=0.0068),
    p=1.0,
    detectable=0.021,
)
REGRESSED = Finding(
    subject("pgd"),
    "regressed",
    "22 of 500 examples were lost and 0 gained: a loss of 4.4 points, above the tolerance of 1 point.",
    loss=loss(before=0.612, lost=22, gained=0, p=4.8e-7, low=0.0241, high=0.0735),
    p=3.3e-6,
    detectable=0.026,
    flips=flips(22),
)
UNDECIDED = Finding(
    subject("apgd"),
    "undecided",
    "A loss of 1.0 points, of which the 99 % interval reaches to 3.4 points.",
    loss=loss(before=0.584, lost=9, gained=4, p=0.18, low=-0.0094, high=0.0341),
    p=0.54,
    needed=6200,
    detectable=0.029,
    floor=Floor(0.6, 0.5281, 0.6174),
    flips=flips(9, "apgd (e2e_last)"),
)
WORST = Finding(
    subject(""),
    "regressed",
    "23 of 500 examples were lost and 1 gained: a loss of 4.4 points, above the tolerance of 1 point.",
    loss=loss(before=0.574, lost=23, gained=1, p=1.5e-6, low=0.0224, high=0.0752),
    p=8.9e-6,
    detectable=0.027,
    floor=Floor(0.6, 0.4741, 0.5859),
    flips=flips(23),
)
INCOMPLETE = Finding(
    subject("spsa"), "incomplete", "3 of 500 outcomes are missing: the evaluation of seed 0 has a hole."
)
OTHER = Finding(
    subject("cw", norm="l2", radius=None),
    "not comparable",
    "The settings differ: steps was 40 and is 20.",
    tier="advisory",
)
GAIN = Finding(
    subject("square"),
    "held",
    "The loss is at most -6.1 points (99 % interval): it is a gain.",
    loss=loss(before=0.63, lost=2, gained=52, p=1e-12, low=-0.1432, high=-0.0611),
    p=1e-11,
    detectable=0.031,
    suspicious=("A gain of 10.0 points, with no change of the attack that explains it.",),
)
REPLAYED = Replayed(1024, 256, 201, 14, flips(3), beyond=2)


def check(*findings: Finding, **changes: Any) -> Check:
    """Return a check of a task file, which asks for each finding on a line of its own from 12."""
    made = Check(
        suite="tasks.yaml",
        before="robustness",
        after="results",
        tolerance=0.01,
        alpha=0.01,
        findings=findings,
        lines={each.subject.name: line for line, each in enumerate(findings, 12)},
    )
    return replace(made, **changes)


EVERYTHING = check(
    HELD,
    UNDECIDED,
    REGRESSED,
    OTHER,
    GAIN,
    INCOMPLETE,
    WORST,
    replayed=REPLAYED,
    notes=("Other code: the defense cnnf has another digest.", "torch was 2.6.0 and is 2.8.0."),
)

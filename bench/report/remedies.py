"""What `bench doctor --fix` adds to a suite for a better grade, and about how long the attacks of it take.

A report imports no attack, so that their passes are declared here, too; a test holds these to the attacks'.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bench.report.checks import Evidence

ATTACKS: Mapping[str, dict[str, Any]] = {
    "doctor-margin": {"use": "pgd", "loss": "margin", "steps": 100, "restarts": 2},
    "doctor-apgd": {"use": "apgd", "steps": 100},
    "doctor-square": {"use": "square", "queries": 1000},
}
"""What is added, by the names that it has in the suite."""

NORMS = ("linf", "l2")
"""The norms that these attacks are made for."""

DRAWS = 8
"""How many answers of a random defense are averaged at each point."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "flags": tuple(ATTACKS),
    "attack": ("doctor-margin",),
    "second": ("doctor-margin", "doctor-apgd"),
    "blind": ("doctor-square",),
}
"""Which attacks settle what is missing, by its kind (`bench.report.grades.Kind`)."""

SETTLED = frozenset(
    {
        "blind-beats-seeing",
        "surrogate-beats-exact",
        "one-step-beats-many",
        "grows-with-radius",
        "unbounded-fails",
        "margin-grew",
        "lost-successes",
        "short-moves",
        "still-rising",
        "no-gradient-asked",
        "flat-gradient",
        "saturated-loss",
        "probabilities",
        "attack-raised",
        "trial",
    }
)
"""Flags that say that an attack is weak: another one beside it may settle them."""


class Passes(NamedTuple):
    """How often an attack asks about each example, at most."""

    forwards: int
    backwards: int


PASSES: Mapping[str, Passes] = {
    "doctor-margin": Passes(200, 200),
    "doctor-apgd": Passes(100, 100),
    "doctor-square": Passes(1001, 0),
}
"""The passes of the attacks that are added."""

BLIND = ("decision", "score")
"""What attacks see that follow no gradient."""

Pace = Callable[[Evidence], tuple[float, float] | None]
"""Gives the seconds that an attack took and the passes that it made, both ways; None where nobody knows."""

ENOUGH = 3
"""How many attacks of a kind are looked at: their passes are no column that every table reads."""


def seconds(names: Collection[str], attacks: Sequence[Evidence], pace: Pace) -> float | None:
    """Return about how long attacks take that are added for a row: a pass takes as long as those before.

    Passes are counted as declared, as if no example fell early. A backward pass counts as much as a forward
    one, so that an attack without gradients is rather over-estimated where none was run before.

    Args:
        names: Of the attacks (`ATTACKS`).
        attacks: The evidence of the row.
        pace: What they took.

    Returns:
        Seconds on what the attacks ran on; None where all are there, or nothing is known.
    """
    done = {each.condition.attack for each in attacks}
    found = {name: PASSES[name] for name in names if name not in done}
    examples = _examples(attacks)
    if not found or not examples:
        return None
    total = 0.0
    for each in found.values():
        own = [one for one in attacks if (one.condition.facts.access in BLIND) == (not each.backwards)]
        rate = _rate(own, pace)
        if rate is None:
            rate = _rate(attacks, pace)
        if rate is None:
            return None
        total += sum(each) * rate * examples
    return total


def _examples(attacks: Sequence[Evidence]) -> int:
    """Return how many examples are attacked once more: at each threat with each seed, in each draw."""
    asked: dict[tuple[object, ...], int] = {}
    for each in (one.condition for one in attacks):
        if each.norm in NORMS and each.radius is not None:
            size = each.facts.n * (DRAWS if each.facts.random else 1)
            name = (each.data, each.norm, each.radius, each.seed)
            asked[name] = max(size, asked.get(name, 0))
    return sum(asked.values())


def _rate(attacks: Sequence[Evidence], pace: Pace) -> float | None:
    """Return the seconds of a pass over an example, by the first attacks of which they are known."""
    took = passes = 0.0
    known = 0
    for each in attacks:
        # A transfer looked at another network.
        if each.condition.facts.source is None and (told := pace(each)) is not None:
            took, passes, known = took + told[0], passes + told[1], known + 1
        if known == ENOUGH:
            break
    return took / passes if took and passes else None

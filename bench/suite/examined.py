"""Which defenses of a plan are examined, and how: by the conditions that attack them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from bench.protocols import Threat
from bench.suite.jobs import Evaluate, Examination
from bench.suite.schema import ANSWERS, ViewUse

FALLBACK = Threat("linf", 0.1)
"""What is assumed of a defense that no task attacks within a radius in linf or l2."""

NORMS = ("linf", "l2")
"""The norms in which defenses are examined."""

Name: TypeAlias = tuple[str, str, str, str, str]
"""A defense as it is scored: data, label, settings at inference time, read-out; and the norm, where that is
one of `NORMS`."""


class Asked(Protocol):
    """A condition of a plan."""

    @property
    def coordinates(self) -> Mapping[str, Any]:
        """What a table may show of it."""

    @property
    def job(self) -> Evaluate:
        """Its evaluation."""


def name_of(condition: Asked) -> Name:
    """Return which defense a condition scores at which norm, whatever its seed and its radius.

    Args:
        condition: A condition of a plan.
    """
    at = condition.coordinates
    inference = {name: value for name, value in at.items() if name.startswith("inference.")}
    norm = at["norm"] if _bounded(condition) else ""
    return str(at["data"]), str(at["defense"]), repr(inference), str(at["readout"]), norm


def _bounded(condition: Asked) -> bool:
    threat = condition.job.crafts[0].attack_run.threat
    radius = condition.coordinates["radius"]
    return threat.norm in NORMS and radius is not None and math.isfinite(radius)


def examinations(conditions: Iterable[Asked], *, whole: bool) -> dict[Name, Examination]:
    """Return the examination of each defense that is scored.

    It is examined with its first seed, in the largest ball of each norm in which the file attacks it: what
    hides at a small radius shows at a larger one.

    Args:
        conditions: The conditions of a plan, in its order, each attack by itself.
        whole: Whether a defense is attacked in its examination, too.

    Returns:
        The examinations, by what is scored.
    """
    grouped: dict[Name, list[Asked]] = defaultdict(list)
    every: dict[Name, list[Asked]] = defaultdict(list)
    for each in conditions:
        name = name_of(each)
        grouped[name].append(each)
        every[(*name[:4], "")].append(each)
    found: dict[Name, Examination] = {}
    for name in grouped:
        group = every[(*name[:4], "")]
        first = min(each.coordinates["seed"] for each in group)
        same = [each for each in group if each.coordinates["seed"] == first]
        found[name] = _examination(same, name[4], whole=whole)
    return found


def _examination(group: Sequence[Asked], norm: str, *, whole: bool) -> Examination:
    """Return the examination of a defense by the conditions that score it, in a norm if there is one."""
    bounded = [each for each in group if _bounded(each)]
    within = [each for each in bounded if not norm or each.coordinates["norm"] == norm]
    # The first norm stands for what has no ball of its own.
    within = [each for each in within if each.coordinates["norm"] == within[0].coordinates["norm"]]
    radius = max((float(each.coordinates["radius"]) for each in within), default=FALLBACK.radius)
    victim = group[0].job.victim
    looked: dict[str, ViewUse] = {}
    for run in (each.job.crafts[0].attack_run for each in group):
        if run.source == victim and run.view is not None and not run.view.use.startswith(ANSWERS):
            looked.setdefault(f"{run.view.use} {run.view.params}", run.view)
    return Examination(
        victim=victim,
        readout=group[0].job.readout,
        data=group[0].job.crafts[0].attack_run.data,
        threat=Threat(within[0].coordinates["norm"], radius) if within else FALLBACK,
        views=tuple(looked.values()),
        whole=whole,
    )

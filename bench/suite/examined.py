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

Name: TypeAlias = tuple[str, str, str]
"""A defense as it is scored: its label, its settings at inference time, its read-out."""


class Asked(Protocol):
    """A condition of a plan."""

    @property
    def coordinates(self) -> Mapping[str, Any]:
        """What a table may show of it."""

    @property
    def job(self) -> Evaluate:
        """Its evaluation."""


def name_of(condition: Asked) -> Name:
    """Return which defense a condition scores, whatever its seed.

    Args:
        condition: A condition of a plan.
    """
    at = condition.coordinates
    inference = {name: value for name, value in at.items() if name.startswith("inference.")}
    return str(at["defense"]), repr(inference), str(at["readout"])


def examinations(conditions: Iterable[Asked], *, whole: bool) -> dict[Name, Examination]:
    """Return the examination of each defense that is scored.

    It is examined with its first seed, within the first bounded threat in linf or l2.

    Args:
        conditions: The conditions of a plan, in its order, each attack by itself.
        whole: Whether a defense is attacked in its examination, too.

    Returns:
        The examinations, by what is scored.
    """
    grouped: dict[Name, dict[int, list[Asked]]] = defaultdict(lambda: defaultdict(list))
    for each in conditions:
        grouped[name_of(each)][each.coordinates["seed"]].append(each)
    return {name: _examination(seeds[min(seeds)], whole=whole) for name, seeds in grouped.items()}


def _examination(group: Sequence[Asked], *, whole: bool) -> Examination:
    """Return the examination of a defense by the conditions that score it."""
    runs = [each.job.crafts[0].attack_run for each in group]
    bounded = [run for run in runs if run.threat.norm in ("linf", "l2") and math.isfinite(run.threat.radius)]
    chosen = bounded[0] if bounded else runs[0]
    victim = group[0].job.victim
    looked: dict[str, ViewUse] = {}
    for run in runs:
        if run.source == victim and run.view is not None and not run.view.use.startswith(ANSWERS):
            looked.setdefault(f"{run.view.use} {run.view.params}", run.view)
    return Examination(
        victim=victim,
        readout=group[0].job.readout,
        data=chosen.data,
        threat=chosen.threat if bounded else FALLBACK,
        views=tuple(looked.values()),
        whole=whole,
    )

"""Measured conditions made by hand, for tests of what is concluded from them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench.gate.measurements import Measured, Measurements, Missing, Question, flagged, place_of
from bench.results.conditions import Condition, Facts


def measured(
    attack: str,
    held: Sequence[int],
    *,
    seed: int = 0,
    network: str | None = None,
    distances: Sequence[float] | None = None,
    invalid: int = 0,
    flat: int = 0,
    params: dict[str, Any] | None = None,
    **changes: Any,
) -> Measured:
    """Return a condition whose examples are held where `held` says 1: ``clean`` moves nothing."""
    idle = attack == "clean"
    kind = "minimum-norm" if idle or distances is not None else "fixed-budget"
    coordinates = {
        "data": "digits",
        "norm": "linf",
        "radius": None if distances is not None else 0.1,
        "defense": "model",
        "attack": attack,
        "view": None if idle else "logits",
        "readout": "label",
        "seed": seed,
        "target": None,
    } | {name: value for name, value in changes.items() if name not in ("digest", "source")}
    n = len(held)
    facts = Facts(
        attack_run=f"run-{attack}-{seed}",
        use="none" if idle else attack,
        access="none" if idle else "gradient",
        idle=idle,
        kind=kind,  # type: ignore[arg-type]
        source=changes.get("source"),
        exact=True,
        n=n,
        random=False,
        flags=(),
    )
    condition = Condition(coordinates, facts, f"job-{attack}-{seed}-{coordinates['defense']}")
    question = Question(
        data=changes.get("digest", "0" * 64),
        n=n,
        norm=coordinates["norm"],
        radius=coordinates["radius"],
        attack={"use": facts.use, "version": 1, "params": params or {}},
        source=facts.source,
        view=None if idle else ["logits", {}],
        exact=True,
        target=None,
        readout="label",
        inference={},
    )
    right = np.asarray(held, bool)
    moved = np.zeros(n) if idle else np.full(n, 0.1) if distances is None else np.asarray(distances, float)
    rows = {
        "index": np.arange(n),
        "target": np.full(n, np.nan),
        "truth": np.arange(n) % 10,
        "label": np.where(right, np.arange(n) % 10, (np.arange(n) + 1) % 10),
        "rejected": np.zeros(n, bool),
        "distance": moved,
        "invalid": np.arange(n) < invalid,
        "score": np.ones(n),
        "differs": np.full(n, np.nan),
        "flat": (np.arange(n) < flat).astype(float),
    }
    return Measured(condition, question, rows, network)


def all_of(every: Iterable[Measured], missing: Iterable[Measured] = ()) -> Measurements:
    """Return measurements of these conditions; those of `missing` were not run."""
    there = {place_of(each.condition): each for each in every}
    gone = {
        place_of(each.condition): Missing(each.condition, each.question, "it was not run") for each in missing
    }
    return Measurements("somewhere", flagged(there), gone)


def held(n: int, *broken: int) -> list[int]:
    """Return n values of 1, with 0 at some places."""
    values = [1] * n
    for each in broken:
        values[each] = 0
    return values

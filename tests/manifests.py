"""Manifests and outcomes written by hand: what tables are cut from, with a truth that is known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

CHECKS = ("trial", "examinations")
"""Facts that name the jobs that say whether to believe a condition."""


def condition(job: str, **changes: Any) -> dict[str, Any]:
    """Return a condition of a manifest: PGD through `first` on `cnn`, unless said otherwise."""
    made = {
        "coordinates": {
            "data": "digits",
            "norm": "linf",
            "radius": 0.1,
            "defense": "cnn",
            "attack": "pgd",
            "view": "first",
            "readout": "last",
            "seed": 0,
            "target": None,
        },
        "facts": {
            "attack_run": job,
            "use": "pgd",
            "access": "gradient",
            "idle": False,
            "kind": "fixed-budget",
            "source": None,
            "exact": True,
            "n": 10,
            "random": False,
            "flags": [],
        },
        "job": job,
    }
    return but(made, **changes)


def but(given: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a condition with other coordinates, facts, or another job."""
    made: dict[str, Any] = {
        "coordinates": dict(given["coordinates"]),
        "facts": dict(given["facts"]),
        "job": given["job"],
    }
    for name, value in changes.items():
        factual = name in made["facts"] or name in CHECKS
        place = made if name == "job" else made["facts"] if factual else made["coordinates"]
        assert name in (*place, *CHECKS) or "." in name, name
        place[name] = value
    return made


def skip(reason: str, **changes: Any) -> dict[str, Any]:
    """Return a condition that cannot be."""
    return {"coordinates": condition("", **changes)["coordinates"], "reason": reason}


def clean(job: str, **changes: Any) -> dict[str, Any]:
    """Return a condition in which nothing is attacked."""
    nothing = {"attack": "clean", "use": "none", "view": None, "access": "none", "idle": True}
    return condition(job, **{**nothing, **changes})


def rows(stood: ArrayLike, *, moved: bool = True, **changes: ArrayLike) -> pd.DataFrame:
    """Return outcomes of the examples 0, 1, ...: which of them the defense stood."""
    held = np.asarray(stood, bool)
    n = len(held)
    given: dict[str, Any] = {
        "index": np.arange(n),
        "target": [None] * n,
        "truth": np.full(n, 3),
        "label": np.where(held, 3, 5),
        "rejected": np.zeros(n, bool),
        "score": np.linspace(1, 0.5, n).astype(np.float32),
        "distance": np.full(n, 0.1 if moved else 0.0),
        "invalid": np.zeros(n, bool),
        "differs": [None] * n,
    }
    return pd.DataFrame({**given, **changes})


def manifest(
    conditions: Sequence[Mapping[str, Any]],
    table: Mapping[str, Any],
    skips: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """Return a manifest with one table, called ``T``, without grades unless it asks for them."""
    shown = {"grades": False, **table}
    return {"conditions": list(conditions), "skips": list(skips), "tables": {"T": shown}, **more}


def first(n: int, count: int) -> np.ndarray[Any, Any]:
    """Return a mask: the first `count` of `n`."""
    return np.arange(n) < count


PAPER = {
    "title": "Robust accuracy on CIFAR-10",
    "rows": ["defense", "readout"],
    "columns": {
        "Clean": {"attack": "clean"},
        "PGD (first)": {"attack": "pgd", "view": "first"},
        "PGD (e2e)": {"attack": "pgd", "view": "e2e_{readout}"},
        "SPSA (first)": {"attack": "spsa", "view": "first"},
        "SPSA (e2e)": {"attack": "spsa", "view": "e2e_{readout}"},
        "Transfer": {"attack": "transfer"},
    },
    "extra": ["Min", "Worst"],
}
"""A table of the CNN-F paper's form."""


def paper(n: int = 360, seeds: Sequence[int] = (0, 1, 2)) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Return a suite of that form with outcomes drawn at random: a manifest, and rows by job."""
    draw = np.random.default_rng(0)
    rates = {
        "clean": 0.97,
        "pgd first": 0.66,
        "pgd e2e": 0.69,
        "spsa first": 0.83,
        "spsa e2e": 0.8,
        "transfer": 0.85,
    }
    conditions, skips, outcomes = [], [], {}
    for defense, readouts in {"cnn": ["last"], "cnnf": ["last", "avg"]}.items():
        for readout in readouts:
            for seed in seeds:
                ease = draw.uniform(size=n)
                for name, rate in rates.items():
                    attack, _, way = name.partition(" ")
                    view = None if attack == "clean" else f"e2e_{readout}" if way == "e2e" else "first"
                    shared = {
                        "defense": defense,
                        "readout": readout,
                        "seed": seed,
                        "attack": attack,
                        "view": view,
                    }
                    # A feed-forward net has one pass: its views share a job.
                    way = "first" if defense == "cnn" and way == "e2e" else way
                    job = f"{attack}-{way}-{defense}-{readout}-{seed}"
                    size = n // 6 if attack == "spsa" else n
                    facts: dict[str, Any] = {"use": attack, "n": size}
                    if attack == "transfer":
                        facts |= {"source": "cnn", "use": "pgd", "exact": False}
                        shared["view"] = "cnn:first"
                        if defense == "cnn":
                            skips.append(skip("the source is its own victim", **shared))
                            continue
                    if attack == "clean":
                        facts |= {"use": "none", "access": "none", "idle": True}
                    if attack == "spsa":
                        facts["access"] = "score"
                    facts["exact"] = attack == "clean" or (
                        attack != "transfer" and (way == "e2e" or defense == "cnn")
                    )
                    conditions.append(condition(job, **shared, **facts))
                    if job not in outcomes:
                        stood = ease + 0.05 * draw.normal(size=n) < rate
                        outcomes[job] = rows(stood[:size], moved=attack != "clean")
    return manifest(conditions, PAPER, skips, data={"digits": {"name": "digits"}}), outcomes

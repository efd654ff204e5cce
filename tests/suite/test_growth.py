"""What a plan costs grows with its jobs and no faster: counted in calls, which no busy machine changes."""

import cProfile
import math
import pstats
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.results.conditions import COORDINATES, Skip
from bench.results.manifest import write
from bench.results.store import ARTEFACTS, Store
from bench.runner import outstanding
from bench.suite import planner, resolve
from bench.suite.jobs import Evaluate, FittedDefense, Train, below, modules_of
from bench.suite.layout import _Known, _Pool, columns_read, matches

FASTER = 1.1
"""How much faster than the jobs the calls may grow: the logarithm in n log n, between these sizes."""


def suite(folder: Path, **sizes: int) -> Path:
    """Write a suite of given sizes: of everything that a task file can have more of."""
    defenses = {
        f"d{number}": {"use": "toy/linear", "epochs": 1 + number}
        for number in range(sizes.get("defenses", 2))
    }
    attacks = {f"a{number}": {"use": "pgd", "steps": 1 + number} for number in range(sizes.get("attacks", 2))}
    radii = [0.001 * (1 + number) for number in range(sizes.get("radii", 2))]
    tasks = [
        {
            "data": "digits",
            "threat": {"norm": "linf", "radius": [radius + 0.005 * number for radius in radii]},
            "views": ["logits"],
            "readouts": ["plain"],
            "seeds": list(range(sizes.get("seeds", 1))),
        }
        for number in range(sizes.get("tasks", 1))
    ]
    shards = sizes.get("shards", 1)
    path = folder / "suite.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "data": {"digits": {"name": "digits", "split": "test", "size": 2 * shards, "shard": 2}},
                "defenses": defenses,
                "attacks": attacks,
                "tasks": tasks,
                "tables": {
                    "listed": {
                        "title": "T",
                        "rows": ["defense", "radius"],
                        "columns": ["attack"],
                        "mean_over": ["seed"],
                    },
                    "named": {
                        "title": "T",
                        "where": {"radius": radii[0]},
                        "rows": {f"row {name}": {"defense": name} for name in defenses},
                        "columns": {f"column {name}": {"attack": name} for name in attacks},
                        "mean_over": ["seed"],
                    },
                },
            }
        )
    )
    return path


def calls(work: Callable[[], Any]) -> int:
    """Return how many functions are called, those that are written in C included."""
    profile = cProfile.Profile()
    profile.enable()
    work()
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def costs(folder: Path, **sizes: int) -> tuple[int, dict[str, int]]:
    """Return the number of jobs of a suite, and the calls of each step before anything runs."""
    folder.mkdir()
    made: dict[str, Any] = {}
    store = Store(folder / "results")
    for kind in ARTEFACTS:
        store.folder(kind, "").mkdir(parents=True)
    path = suite(folder, **sizes)

    def step(name: str, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            made[name] = work()

        return run

    steps = {
        "load": step("suite", lambda: resolve.load(path)),
        "plan": step("plan", lambda: planner.make(made["suite"])),
        "graph": step("graph", lambda: made["plan"].graph()),
        "manifest": step("manifest", lambda: made["plan"].manifest()),
        "tables": step("tables", lambda: columns_read(made["manifest"], made["manifest"]["tables"])),
        "write": step("write", lambda: write(store, made["manifest"])),
        "state": step("state", lambda: outstanding.examine(made["plan"], store)),
    }
    found = {name: calls(work) for name, work in steps.items()}
    assert len(made["state"].todo) == len(made["graph"])
    return len(made["graph"]), found


@pytest.mark.parametrize(
    "more",
    [{"seeds": 40}, {"radii": 80}, {"shards": 80}, {"tasks": 80}, {"defenses": 60}, {"attacks": 60}],
    ids=lambda more: next(iter(more)),
)
def test_twice_the_jobs_take_twice_the_calls(more: dict[str, int], tmp_path: Path) -> None:
    costs(tmp_path / "warm", seeds=2)
    few, before = costs(tmp_path / "once", **more)
    many, after = costs(tmp_path / "twice", **{name: 2 * size for name, size in more.items()})
    assert 1.9 < many / few < 2.1
    grown = {name: after[name] / before[name] for name in before}
    assert all(ratio < many / few * FASTER for ratio in grown.values()), grown


def test_a_way_down_may_be_longer_than_the_stack(tmp_path: Path) -> None:
    plan = planner.make(resolve.load(suite(tmp_path)))
    (first, *_) = plan.conditions
    train, long = first.job.victim.train, 3 * sys.getrecursionlimit()
    for seed in range(1, long):
        train = Train(train.defense, train.data, seed, (("base", train),))
        # Each key needs the one before.
        assert train.key
    job = Evaluate(FittedDefense(train), first.job.crafts, first.job.readout)
    deep = replace(plan, conditions=(replace(first, job=job, checks=()),))
    assert len(deep.graph()) == long + 2
    assert len(list(below(job))) == long + 2
    assert modules_of(job) == modules_of(first.job)
    assert train.foreign == {"toys"}
    assert len(outstanding.trainings(job)) == long
    state = outstanding.examine(deep, Store(tmp_path / "results"))
    assert state.todo.keys() == set(deep.graph())
    assert all(set(state.todo[each]) == set(each.needs) for each in state.todo)


TEXTS = ["1", "0.1", "1/10", "true", "None", "a", "b", None]
NUMBERS = [*TEXTS, 0, 1, 0.1, 2, math.inf]
FLAGS = [*TEXTS, True, False]


def test_what_is_looked_up_is_what_a_comparison_of_all_finds() -> None:
    draws = random.Random(0)
    # No parameter is both a number and a flag.
    values = {name: FLAGS if name == "view" else NUMBERS for name in COORDINATES}
    points = [
        Skip({name: draws.choice(some) for name, some in values.items()}, str(number))
        for number in range(300)
    ]
    pool = _Pool("T", [], points, _Known(points))
    found = 0
    for _ in range(1000):
        selection: dict[str, Any] = {}
        for name in draws.sample(COORDINATES, draws.randrange(4)):
            asked = [*values[name], "absent", 0.1 + 1e-12]
            several = draws.random() < 0.3
            selection[name] = draws.choices(asked, k=draws.randrange(4)) if several else draws.choice(asked)
        expected = [
            each
            for each in points
            if all(matches(chosen, each.coordinates[name]) for name, chosen in selection.items())
        ]
        assert pool.at(selection) == ((), tuple(expected)), selection
        found += 0 < len(expected) < len(points)
    assert found > 300

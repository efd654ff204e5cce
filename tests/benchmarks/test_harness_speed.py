"""What the harness costs: from craft to outcomes beside bare passes, planning, and starting up."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import autograd
from torch.nn.functional import cross_entropy

from bench.data.spec import load
from bench.registry import discover
from bench.results.store import Store
from bench.runner import train, worker
from bench.runner.context import WorkerContext, prepare
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Evaluate, Train

BENCH = [sys.executable, "-m", "bench.cli"]
SUITE: dict[str, Any] = {
    "data": {"digits": {"name": "digits", "split": "test", "resize": 28, "size": 256, "shard": 256}},
    "defenses": {"cnn": {"use": "cnn", "training": "standard", "epochs": 2, "batch": 32}},
    "attacks": {"pgd": {"use": "pgd", "steps": 40}},
    # So small a radius breaks nothing, so that no example is dropped.
    "tasks": [{"data": "digits", "threat": {"norm": "linf", "radius": 1e-6}, "views": ["first"]}],
}


def suite(folder: Path, **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


def test_pgd_from_craft_to_outcomes_over_bare_passes(tmp_path: Path, race: Any) -> None:
    plan = planner.make(resolve.load(suite(tmp_path)))
    context = WorkerContext(tmp_path / "results", tmp_path, None, "cpu", {})
    prepare(context)
    store = Store(context.store)
    store.open()
    jobs = {type(job): job for job in plan.graph()}
    for kind in (Train, Craft, Evaluate):
        worker.do(jobs[kind], context)
    network = train.fitted(jobs[Evaluate].victim, context, store).network
    split = load(plan.suite.data["digits"])
    answers = network(split.images).argmax(1)
    x, y = split.images[answers == split.labels], split.labels[answers == split.labels]
    # Wrong images are dropped at once, so that only the right ones are comparable work.
    assert len(x) > 0.9 * len(split), "train longer: too many images are wrong before the attack"

    def bare() -> None:
        z = x.clone().requires_grad_()
        for _ in range(40):
            autograd.grad(cross_entropy(network(z), y, reduction="sum"), z)

    def harness() -> None:
        for kind in (Craft, Evaluate):
            store.discard(jobs[kind].kind, jobs[kind].key)
            worker.do(jobs[kind], context)

    race(
        {"bare passes": bare, "craft and evaluate": harness},
        over={"PGD-40 from craft to outcomes over 40 bare passes": ("craft and evaluate", "bare passes")},
        rounds=9,
    )


def test_planning_ten_thousand_cells(tmp_path: Path, benchmark: Any) -> None:
    discover()
    threat = {"norm": "linf", "radius": [0.1 * tenths for tenths in range(1, 11)]}
    task = {**SUITE["tasks"][0], "seeds": list(range(1000)), "threat": threat}
    path = suite(tmp_path, tasks=[task])
    plan = benchmark.pedantic(lambda: planner.make(resolve.load(path)), rounds=3, warmup_rounds=1)
    assert len(plan.conditions) == 10_000


@pytest.mark.parametrize("words", [["--help"], ["report", "suite.yaml"], ["run", "suite.yaml"]], ids=" ".join)
def test_starting_up(tmp_path: Path, benchmark: Any, words: list[str]) -> None:
    table = {"title": "T", "rows": ["defense"], "columns": ["attack"]}
    suite(tmp_path, tables={1: table})
    subprocess.run(
        [*BENCH, "run", "suite.yaml", "--executor", "inline"], cwd=tmp_path, check=True, capture_output=True
    )

    def start() -> None:
        subprocess.run([*BENCH, *words], cwd=tmp_path, check=True, capture_output=True)

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
    benchmark.extra_info["torch"] = torch.__version__

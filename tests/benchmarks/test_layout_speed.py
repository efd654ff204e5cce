"""Whether channels_last or torch.compile makes a step of an attack faster, for the networks of tasks.yaml.

A step is a forward pass of a view and the gradient of its loss at the images. Nothing is trained: the time of
a pass does not depend on the weights.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Race
from torch import Tensor

from bench.protocols import Split, View
from bench.runner.context import WorkerContext, load
from bench.runner.craft import look
from bench.runner.train import build
from bench.suite import planner, resolve
from bench.suite.jobs import AttackRun

TASKS = Path(__file__).parents[2] / "tasks.yaml"
CPU = torch.device("cpu")
CASES = [
    *((name, how) for name in ("cnn", "cnnf", "sdim", "standard") for how in ("channels_last", "compile")),
    # torch.compile warns of the gradients that the search inside takes, and warnings are errors here.
    ("apinet", "channels_last"),
]


@pytest.fixture(scope="module")
def runs() -> dict[str, AttackRun]:
    """Return for each defense of tasks.yaml a run that looks at it by gradients in pixel space."""
    found: dict[str, AttackRun] = {}
    for each in planner.make(resolve.load(TASKS)).conditions:
        run = each.job.crafts[0].attack_run
        entry = run.attack.entry
        if entry.access == "gradient" and entry.space == "pixel" and run.source is not None and run.exact:
            found.setdefault(each.coordinates["defense"], run)
    return found


def step(ask: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Return what an attack's step asks of a network."""

    def taken() -> Tensor:
        z = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (gradient,) = torch.autograd.grad(ask(z).double().square().sum(), z)
        return gradient

    return taken


@pytest.mark.parametrize(("name", "how"), CASES)
def test_layout(name: str, how: str, runs: dict[str, AttackRun], race: Race, tmp_path: Path) -> None:
    run = runs[name]
    assert run.source is not None
    context = WorkerContext(tmp_path, TASKS.parent, None, "cpu", {})
    split: Split = load(run.data, context)
    x = split.images[:64].contiguous()
    model: Any = build(run.source.train, context).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    plain: View = look(run, model, split, CPU)
    if how == "channels_last":
        other = other.to(memory_format=torch.channels_last)
        changed = look(run, other, split, CPU).logits
        shown = x.contiguous(memory_format=torch.channels_last)
    else:
        shown = x
        changed = torch.compile(look(run, other, split, CPU).logits)
    before, after = step(plain.logits, x), step(changed, shown)
    found, expected = after(), before()
    assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
    race(
        {"plain": before, "changed": after},
        over={f"{how} over plain, {name}, 64 images": ("changed", "plain")},
        rounds=21,
        # The processor's time, since one thread computes: other work on the machine decides less.
        clock=time.process_time,
    )

"""What Defense-GAN's projection costs beside one image and one restart at a time, in time and in memory."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, autograd
from torch.nn.functional import conv_transpose2d, cross_entropy
from torch.optim import SGD

from attacks.latent_backtracking import latent_backtracking
from bench.noise import Noise
from bench.protocols import Images, Shape, Threat
from bench.registry import DEFENSES
from defenses.defensegan import DefenseGan
from defenses.nets.defensegan.projection import ROWS, project

SHAPE, RESTARTS = Shape(1, 28, 28, 10), 10


def defense(width: float, steps: int, **params: Any) -> DefenseGan:
    """Return the released networks with fresh weights: their passes cost what trained ones' cost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: DefenseGan = DEFENSES["defensegan"].make(
            SHAPE, width=width, restarts=RESTARTS, steps=steps, starts="fixed", **params
        )
    return model.eval().requires_grad_(False)


def batch(n: int) -> Images:
    return torch.rand(n, *SHAPE[:3], generator=torch.Generator().manual_seed(0))


class Loop:
    """The released algorithm by torch's own layers and optimiser, an image and a restart after the other."""

    def __init__(self, model: DefenseGan) -> None:
        self.model = model
        self.linear, *self.maps = (model.generator[place] for place in (0, 3, 5, 7))

    def draw(self, z: Tensor) -> Images:
        h: Tensor = self.linear(z).relu().view(len(z), -1, 4, 4)
        for layer, side in zip(self.maps, (7, 14, 28), strict=True):
            h = conv_transpose2d(h, layer.weight, layer.bias, stride=2, padding=2, output_padding=1)
            h = h[:, :, :side, :side]
            h = h.sigmoid() if side == 28 else h.relu()
        return h

    def error(self, x: Images) -> Tensor:
        """Return the best error of each image."""
        found = []
        descent = self.model.descent
        for image, starts in zip(x, self.model._starts(x), strict=True):
            best = torch.inf
            for start in starts:
                z = start[None].clone().requires_grad_()
                optimiser = SGD([z], lr=descent.lr, momentum=descent.momentum)
                for _ in range(descent.steps):
                    loss = (self.draw(z)[0] - image).square().mean()
                    best = min(best, loss.item())
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                with torch.no_grad():
                    best = min(best, (self.draw(z)[0] - image).square().mean().item())
            found.append(best)
        return torch.tensor(found)


@pytest.mark.parametrize(("width", "steps"), [(1.0, 8), (0.25, 20)])
def test_inference_against_a_restart_at_a_time(width: float, steps: int, race: Any) -> None:
    """The cost is linear in the steps, of which there are 200 when it counts."""
    model, x = defense(width, steps), batch(6)
    loop = Loop(model)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = model.project(x).error

    def alone() -> None:
        found["alone"] = torch.cat(
            [
                torch.stack([_one(model, each[None], start) for start in model._starts(x)[0]]).amin(0)
                for each in x
            ]
        )

    def looped() -> None:
        found["loop"] = loop.error(x)

    race(
        {"Defense-GAN": ours, "its own passes": alone, "a loop": looped},
        over={
            f"width {width}: an image and a restart at a time by torch's layers and SGD, over Defense-GAN": (
                "a loop",
                "Defense-GAN",
            ),
            f"width {width}: an image and a restart at a time by Defense-GAN's own passes, over it": (
                "its own passes",
                "Defense-GAN",
            ),
        },
        rounds=3,
    )
    assert torch.allclose(found["ours"], found["loop"], rtol=1e-3)
    assert torch.allclose(found["ours"], found["alone"], rtol=1e-3)


def _one(model: DefenseGan, x: Images, start: Tensor) -> Tensor:
    return project(model.generator, x, start[None, None], model.descent).error


def test_views_cost(race: Any) -> None:
    model, x, y = defense(0.25, 50), batch(4), torch.zeros(4, dtype=torch.int64)

    def gradient(name: str, **params: Any) -> Tensor:
        z = x.clone().requires_grad_()
        return autograd.grad(cross_entropy(getattr(model, name)(**params).logits(z), y), z)[0]

    race(
        {
            "answer": lambda: model.decide(x, "label"),
            "bpda": lambda: gradient("bpda"),
            "backtrack": lambda: gradient("backtrack", steps=10),
        },
        over={
            "10 restarts, 50 steps: a gradient by bpda over an answer": ("bpda", "answer"),
            "10 restarts, 50 steps: a gradient by backtracking 10 steps over an answer": (
                "backtrack",
                "answer",
            ),
        },
        rounds=3,
    )


def test_codes_that_follow_their_images_against_inverting_anew(race: Any) -> None:
    model, x, threat = defense(0.25, 20), batch(4), Threat("l2")
    y = model.decide(x, "label").label
    found: dict[int, Mapping[str, Tensor]] = {}

    def walk(refresh: int) -> None:
        found[refresh] = latent_backtracking(
            model.inversion(),
            x,
            y,
            threat,
            Noise("speed", torch.arange(len(x))),
            backtracks=5,
            steps=20,
            searches=1,
            lr=1e-5,  # Nothing breaks: a success is another inversion.
            abort=False,
            refresh=refresh,
        ).notes

    race(
        {"every image": lambda: walk(1), "every tenth": lambda: walk(10)},
        over={
            "20 steps of backtracking: an inversion each over one each tenth": ("every image", "every tenth")
        },
        rounds=3,
    )
    assert all(notes["failed"].all() for notes in found.values())
    assert (found[1]["inversions"] > 5 * found[10]["inversions"]).all()


PEAK = """
import sys
from pathlib import Path
import torch
def peak():
    # Of the kernel's counters the one that begins anew with a program.
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in each)
    return int(line.split()[1])
torch.set_num_threads(1)
from bench.protocols import Shape
from defenses.defensegan import DefenseGan
n, rows = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = DefenseGan(Shape(1, 28, 28, 10), restarts=10, steps=1, starts="fixed").eval().requires_grad_(False)
model.rows = rows
with torch.no_grad():
    model.generator(torch.zeros(1, 128))
    x = torch.rand(n, 1, 28, 28)
    before = peak()
    model.project(x)
print((peak() - before) * 1024)
"""


def test_memory_is_that_of_a_chunk_however_many_images_there_are(memory: Any, benchmark: Any) -> None:
    """By how much a process grows at its peak, weights and images apart."""
    sizes: dict[str, int] = {}

    def measure() -> None:
        for n, rows in ((16, ROWS["cpu"]), (64, ROWS["cpu"]), (64, 10**6)):
            said = subprocess.run(
                [sys.executable, "-c", PEAK, str(n), str(rows)], check=True, capture_output=True, text=True
            )
            chunk = "one chunk" if rows > 10**5 else f"chunks of {rows} points"
            sizes[f"{n} images, 10 restarts, in {chunk}"] = int(said.stdout)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    memory({f"peak of a process, Defense-GAN on {name}": size for name, size in sizes.items()})
    few, many, everything = sizes.values()
    # A start, a best point and an error are kept of every point: 3 times 128 values of 640.
    assert many - few < 2**20 * 8
    assert everything > 2 * many

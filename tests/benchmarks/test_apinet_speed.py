"""What API-Net's inference costs beside the passes that it cannot do without, in time and in memory."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from bench.protocols import Images, Shape
from bench.registry import DEFENSES, bind
from defenses.apinet import ROWS, ApiNet

STEPS, CLASSES = 8, 10
SHAPE = Shape(1, 28, 28, CLASSES)


@pytest.fixture(scope="module")
def model() -> ApiNet:
    """Return API-Net at the paper's settings for MNIST, on SmallCNN with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = DEFENSES["madry"].make(SHAPE, net="smallcnn")
    last = [each for each in base.modules() if isinstance(each, nn.Linear)][-1]
    nn.init.normal_(last.weight, std=0.1)  # It starts at zero, where there is no gradient to follow.
    entry = DEFENSES["apinet"]
    given = bind(entry, {"base": "base", "eps_ap": "12/255", "inner_step_size": 0.01})
    made: ApiNet = entry.make(SHAPE, **{**given, "base": base})
    return made.eval().requires_grad_(False)


def batch(n: int) -> Images:
    return torch.rand(n, *SHAPE[:3], generator=torch.Generator().manual_seed(0))


def passes(model: ApiNet, x: Images, c: int, forwards: int = 0) -> None:
    """Ask the base about all images of a class: 8 forward and backward passes, and more forward passes."""
    z, label = x.clone().requires_grad_(), torch.full((len(x),), c)
    for _ in range(STEPS):
        autograd.grad(cross_entropy(model.base.network(z), label, reduction="sum"), z)
    with torch.no_grad():
        for _ in range(forwards):
            model.base.network(x)


def test_inference_costs_its_forward_and_backward_passes_and_little_more(model: ApiNet, race: Any) -> None:
    x = batch(64)

    def bare() -> None:
        for c in range(CLASSES):
            passes(model, x, c)

    def least() -> None:
        for c in range(CLASSES):
            passes(model, x, c, forwards=1)

    race(
        {"80 passes": bare, "80 passes and 10 answers": least, "API-Net": lambda: model.decide(x, "label")},
        over={
            "API-Net, 10 classes and 8 steps, over 10 x 8 bare forward and backward passes": (
                "API-Net",
                "80 passes",
            ),
            "API-Net over the same and the 10 forward passes that read its answers": (
                "API-Net",
                "80 passes and 10 answers",
            ),
        },
    )


def test_views_cost(model: ApiNet, race: Any) -> None:
    x = batch(16)

    def gradient(view: Callable[[], Any]) -> Tensor:
        z = x.clone().requires_grad_()
        return autograd.grad(cross_entropy(view().logits(z), torch.zeros(len(x), dtype=torch.int64)), z)[0]

    race(
        {
            "answer": lambda: model.decide(x, "label"),
            "bpda": lambda: gradient(model.bpda),
            "unrolled": lambda: gradient(model.unrolled),
        },
        over={
            "a gradient by bpda over an answer": ("bpda", "answer"),
            "a gradient by unrolling over an answer": ("unrolled", "answer"),
        },
        rounds=3,
    )


class Held:
    """The most bytes of distinct storages that autograd holds at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> "Kept":
        return Kept(self, tensor)

    def measure(self, run: Callable[[], object]) -> int:
        gc.collect()
        with saved_tensors_hooks(self.pack, lambda kept: kept.tensor):
            run()
        return self.most


class Kept:
    """A saved tensor; counts its storage from the first holder to the last."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor
        self.storage = tensor.untyped_storage().data_ptr()
        if held.storages.get(self.storage, 0) == 0:
            held.now += tensor.untyped_storage().nbytes()
            held.most = max(held.most, held.now)
        held.storages[self.storage] = held.storages.get(self.storage, 0) + 1

    def __del__(self) -> None:
        self.held.storages[self.storage] -= 1
        if self.held.storages[self.storage] == 0:
            self.held.now -= self.tensor.untyped_storage().nbytes()


def test_memory_is_that_of_a_chunk_however_many_images_there_are(
    model: ApiNet, memory: Any, benchmark: Any
) -> None:
    """What autograd holds at most while API-Net answers, by its saved tensors."""

    def at_once(x: Images) -> None:
        z = x.repeat(CLASSES, 1, 1, 1).requires_grad_()
        label = torch.arange(CLASSES).repeat_interleave(len(x))
        autograd.grad(cross_entropy(model.base.network(z), label, reduction="sum"), z)

    few, many, sizes = batch(32), batch(64), {}

    def measure() -> None:
        sizes["API-Net on 32 images"] = Held().measure(lambda: model.decide(few, "label"))
        sizes["API-Net on 64 images"] = Held().measure(lambda: model.decide(many, "label"))
        sizes["one step of all classes' 640 points at once"] = Held().measure(lambda: at_once(many))

    benchmark.pedantic(measure, rounds=1, iterations=1)
    memory({f"saved for a backward pass at most, {name}": size for name, size in sizes.items()})
    alone, company, everything = sizes.values()
    # Chunks are parts of one tensor of all points, and of their classes: these are more, and nothing else.
    points = CLASSES * (len(many) - len(few))
    assert company - alone == points * (few[0].numel() * few.element_size() + 8)
    assert everything > 0.9 * CLASSES * len(many) / ROWS["cpu"] * alone

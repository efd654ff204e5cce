"""What ABS's inference costs beside loops over classes and images, and what it holds in memory."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from bench.protocols import Images, Shape
from defenses.abs import CPU_ROWS, Abs, clipped, latents

CLASSES, GRID = 10, 1000
SHAPE = Shape(1, 28, 28, CLASSES)


@pytest.fixture(scope="module")
def model() -> Abs:
    """Return ABS at the released settings, but for a smaller grid, with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Abs(SHAPE, grid=GRID)
    return made.eval().requires_grad_(False)


def batch(n: int) -> Images:
    return torch.rand(n, *SHAPE[:3], generator=torch.Generator().manual_seed(0))


class Loop:
    """The same inference by torch's layers and its Adam, a class after the other, as the released code."""

    def __init__(self, model: Abs, *, frozen: bool = True) -> None:
        self.model = model
        self.decoders = [self.spawn(number).requires_grad_(not frozen) for number in range(CLASSES)]
        self.codes = latents(GRID, model.latent).float()
        with torch.no_grad():
            self.drawn = [self.images(decoder, self.codes) for decoder in self.decoders]

    def apart(self, number: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for conv, norm, plan in self.model.networks.decoder.layers():
            weight = conv.weight.unflatten(0, (CLASSES, -1))[number]
            one = nn.ConvTranspose2d(len(weight), plan.outputs, plan.kernel, plan.stride, plan.padding)
            assert conv.bias is not None
            one.load_state_dict({"weight": weight, "bias": conv.bias.view(CLASSES, -1)[number]})
            layers.append(one)
            if norm is not None:
                # Fresh normalisations are the same for all classes.
                layers += [nn.BatchNorm2d(plan.outputs), nn.ELU()]
        return nn.Sequential(*layers).eval()

    def images(self, decoder: nn.Module, codes: Tensor) -> Tensor:
        drawn: Tensor = decoder(codes[:, :, None, None]).sigmoid()
        return drawn

    def objective(self, drawn: Tensor, codes: Tensor, x: Tensor) -> Tensor:
        return ((x - drawn).square().flatten(1).sum(1) + codes.square().sum(1) / 2) / x[0].numel()

    def logits(self, x: Images) -> Tensor:
        """Return logits (N, K) of a batch of images, a class after the other."""
        found = []
        for decoder, drawn in zip(self.decoders, self.drawn, strict=True):
            far = torch.cdist(x.flatten(1), drawn.flatten(1)).square() + self.codes.square().sum(1) / 2
            z = self.codes[far.argmin(1)].clone().requires_grad_()
            optimiser = Adam([z], lr=self.model.rate)
            for _ in range(self.model.steps):
                optimiser.zero_grad()
                self.objective(self.images(decoder, z), z, x).sum().backward()
                optimiser.step()
                z.data = clipped(z.data, self.model.radius)
            with torch.no_grad():
                found.append(-self.objective(self.images(decoder, z), z, x))
        return torch.stack(found, 1)


def test_inference_against_loops_over_classes_and_images(model: Abs, race: Any) -> None:
    loop, x = Loop(model), batch(8)
    answers: dict[str, Tensor] = {}

    def ours() -> None:
        logits = model.decide(x, "label").logits
        assert logits is not None
        answers["ours"] = logits

    def classes() -> None:
        answers["classes"] = loop.logits(x)

    def both() -> None:
        answers["both"] = torch.cat([loop.logits(each[None]) for each in x])

    race(
        {"ABS": ours, "a class after the other": classes, "an image and a class after the other": both},
        over={
            "8 images: a class after the other by torch's layers and Adam, over ABS": (
                "a class after the other",
                "ABS",
            ),
            "8 images: one image and one class after the other, over ABS": (
                "an image and a class after the other",
                "ABS",
            ),
        },
        rounds=3,
    )
    for name in ("classes", "both"):
        assert torch.allclose(answers["ours"], answers[name], rtol=1e-3, atol=1e-6), name


def test_inference_of_many_images_against_a_loop_over_classes(model: Abs, race: Any) -> None:
    """The released code leaves the weights' gradients on, and they are computed in every step."""
    x = batch(32)
    loop, released = Loop(model), Loop(model, frozen=False)
    race(
        {
            "ABS": lambda: model.decide(x, "label"),
            "a class after the other": lambda: loop.logits(x),
            "the same with gradients of the weights": lambda: released.logits(x),
        },
        over={
            "32 images: a class after the other by torch's layers and Adam, over ABS": (
                "a class after the other",
                "ABS",
            ),
            "32 images: the same with gradients of the weights, as released, over ABS": (
                "the same with gradients of the weights",
                "ABS",
            ),
        },
        rounds=3,
    )


def test_views_cost(model: Abs, race: Any) -> None:
    x, y = batch(8), torch.zeros(8, dtype=torch.int64)

    def gradient(name: str, **params: Any) -> Tensor:
        z = x.clone().requires_grad_()
        return autograd.grad(cross_entropy(getattr(model, name)(**params).logits(z), y), z)[0]

    race(
        {
            "answer": lambda: model.decide(x, "label"),
            "envelope": lambda: gradient("envelope"),
            "backtrack": lambda: gradient("backtrack", steps=10),
        },
        over={
            "a gradient by the envelope theorem over an answer": ("envelope", "answer"),
            "a gradient by backtracking 10 steps over an answer": ("backtrack", "answer"),
        },
        rounds=3,
    )


class Held:
    """The most bytes of distinct storages that autograd holds at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.holders: dict[int, int] = {}

    def measure(self, run: Any) -> int:
        gc.collect()
        with saved_tensors_hooks(lambda tensor: Kept(self, tensor), lambda kept: kept.tensor):
            run()
        return self.most


class Kept:
    """A saved tensor; counts its storage from the first holder to the last."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor
        self.place = tensor.untyped_storage().data_ptr()
        if held.holders.get(self.place, 0) == 0:
            held.now += tensor.untyped_storage().nbytes()
            held.most = max(held.most, held.now)
        held.holders[self.place] = held.holders.get(self.place, 0) + 1

    def __del__(self) -> None:
        self.held.holders[self.place] -= 1
        if self.held.holders[self.place] == 0:
            self.held.now -= self.tensor.untyped_storage().nbytes()


def test_memory_is_that_of_a_block_however_many_images_there_are(
    model: Abs, memory: Any, benchmark: Any
) -> None:
    """What autograd holds at most while ABS answers, by its saved tensors; and the grid, kept for good."""
    sizes: dict[str, int] = {}
    steps, model.steps = model.steps, 2

    def measure() -> None:
        for n in (12, 128, 256):
            sizes[f"{n} images"] = Held().measure(lambda n=n: model.decide(batch(n), "label"))
        rows, model.rows = model.rows, 10**6
        sizes["256 images in one block"] = Held().measure(lambda: model.decide(batch(256), "label"))
        model.rows = rows
        sizes["128 images, backtracking 10 steps"] = Held().measure(
            lambda: model.backtrack().logits(batch(128).requires_grad_())
        )

    benchmark.pedantic(measure, rounds=1, iterations=1)
    model.steps = steps
    assert model._grid is not None
    kept = model._grid.images.nbytes
    assert kept == CLASSES * GRID * 784 * 4
    memory(
        {f"saved for a backward pass at most, ABS on {name}": size for name, size in sizes.items()}
        | {f"images of the grid, {GRID} latents": kept, "the same of 8,000": 8 * kept}
    )
    few, block, many, everything, _ = sizes.values()
    # A block's shares of weights and codes lie in tensors that are saved whole.
    weights = sum(each.nbytes for each in model.networks.folded().weights)
    assert abs(many - block) <= 256 * 8 * 4 * CLASSES
    assert few <= block
    assert everything - weights > 0.9 * CLASSES * 256 / CPU_ROWS * (block - weights)

"""The networks of CNN-F and their training: sizes, counts, weights, schedules, and what training repeats."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from asking import ask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from bench import Images, InputError, Shape, Split, Threat, Use, View, objective
from bench.noise import Noise
from bench.protocols import Batch
from bench.testing import check_defense
from defenses.cnn import Cnn
from defenses.cnnf import CnnF
from defenses.nets import training
from defenses.nets.cnnf import architectures
from defenses.nets.cnnf.operators import Linear
from defenses.nets.cnnf.training import PGD

DIGIT = Shape(1, 16, 16, 10)
SMALL: dict[str, Any] = {"width": 0.25, "hidden": (24, 12), "batch": 16}


class FakeEpoch:
    """An epoch of a `FakeFitting`: a seeded order, noise by image and epoch, and a list of losses."""

    def __init__(self, split: Split, number: int) -> None:
        self.split, self.number = split, number
        self.losses: list[Tensor] = []

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(self.number))
        whole = len(order) // size * size if drop_last else len(order)
        for rows in order[:whole].split(size):
            noise = Noise(("epoch", self.number), self.split.index[rows])
            yield Batch(self.split.images[rows], self.split.labels[rows], noise)

    def report(self, loss: Tensor) -> None:
        assert not loss.requires_grad
        self.losses.append(loss)


class FakeFitting:
    """Epochs that can stop early and go on in another training, and an inner attack that is given."""

    def __init__(
        self, split: Split, inner: Callable[..., Images] | None = None, stop: int | None = None
    ) -> None:
        self.device = torch.device("cpu")
        self.parts: dict[str, nn.Module] = {}
        self.split, self.inner, self.stop = split, inner, stop
        self.done = 0
        self.saved: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.epochs_seen: list[FakeEpoch] = []
        self.rates: list[float] = []

    def attack(self, use: Use) -> Callable[..., Images]:
        assert use == PGD
        assert self.inner is not None
        return self.inner

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        return len(self.split) // size if drop_last else -(-len(self.split) // size)

    def epochs(self, count: int, model: nn.Module, *optimisers: torch.optim.Optimizer) -> Iterator[FakeEpoch]:
        (optimiser,) = optimisers
        if self.saved is not None:
            model.load_state_dict(self.saved[0])
            optimiser.load_state_dict(self.saved[1])
        while self.done < (count if self.stop is None else self.stop):
            epoch = FakeEpoch(self.split, self.done)
            self.epochs_seen.append(epoch)
            yield epoch
            self.done += 1
            self.rates.append(optimiser.param_groups[0]["lr"])
            self.saved = copy.deepcopy((model.state_dict(), optimiser.state_dict()))


@pytest.fixture
def split() -> Split:
    """Return 40 images of two stripes: upright for label 0, lying for label 1, noisy."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(40, 1, 16, 16, generator=generator)
    labels = torch.arange(40) % 2
    images[labels == 0, :, :, 6:10] += 0.6
    images[labels == 1, :, 6:10, :] += 0.6
    return Split(images, labels, torch.arange(40), "stripes")


def climb(view: View, x: Images, y: Tensor, threat: Threat, noise: Noise) -> Images:
    """Take two signed steps from a uniform start: an inner attack of the fewest lines."""
    z = threat.project(x, x + noise.uniform(tuple(x.shape[1:]), -threat.radius, threat.radius))
    for _ in range(2):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(view, view.logits(z), y).sum(), z)
        z = threat.project(x, z.detach() + 0.05 * gradient.sign())
    return z


def unique_parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in set(model.parameters()))


# --- networks -----------------------------------------------------------------------------------------


def test_the_papers_nets_have_the_papers_parameters() -> None:
    grey, colour = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10)
    assert unique_parameters(architectures.build("b2", grey, ind=2)) == 3_298_962
    assert unique_parameters(architectures.build("wrn-40-2", colour, ind=5)) == 2_240_842
    # By hand: 1x1 instead of 3x3 in the first of B.2; and B.1 with its 12,544 inputs to FC 128.
    assert unique_parameters(architectures.build("b2", grey, first_kernel=1)) == 3_298_962 - 16 * 8
    b1 = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 14 * 14 * 128 + 128 + 128 * 10 + 10
    assert unique_parameters(architectures.build("b1", grey)) == b1
    # Feedback has no parameters of its own: the weights are tied.
    assert unique_parameters(CnnF(grey)) == unique_parameters(Cnn(grey)) == 3_298_962


def test_narrow_nets_can_be_asked_for() -> None:
    convolutions = 9 * (8 + 8 * 16 + 16 * 16 + 16 * 32) + 8 + 16 + 16 + 32
    full = 32 * 4 * 4 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert unique_parameters(Cnn(DIGIT, width=0.5, hidden=(128, 64))) == convolutions + full == 82_778


@pytest.mark.parametrize(
    ("net", "shape", "ind"),
    [
        ("b1", Shape(1, 14, 18, 3), 0),
        ("b1", Shape(5, 2, 2, 7), 1),
        ("b2", Shape(3, 12, 20, 3), 0),
        ("b2", Shape(2, 4, 4, 11), 2),
        ("wrn-40-2", Shape(1, 28, 28, 4), 0),
        ("wrn-40-2", Shape(4, 8, 12, 2), 6),
    ],
)
def test_nets_work_on_any_size_that_fits(net: architectures.Net, shape: Shape, ind: int) -> None:
    hidden = None if net == "wrn-40-2" else (6,)
    model = CnnF(shape, net=net, ind=ind, cycles=1, width=0.125, hidden=hidden).requires_grad_(False)
    x = torch.rand(2, *shape[:3])
    for view in (model.first(), model.e2e_last()):
        logits = view.logits(x)
        assert logits.shape == (2, shape.classes)
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("params", "shape", "message"),
    [
        ({"net": "b1"}, Shape(1, 27, 28, 10), "net b1: sides of images must be divisible by 2, found 27x28"),
        ({}, Shape(1, 28, 30, 10), "net b2: sides of images must be divisible by 4, found 28x30"),
        ({"net": "wrn-40-2"}, Shape(3, 2, 32, 10), "net wrn-40-2: sides .* divisible by 4, found 2x32"),
        ({"ind": 3}, DIGIT, "net b2: ind must be between 0 .* and 2, found 3"),
        ({"net": "b1"}, DIGIT, "net b1: ind must be between 0 .* and 1, found 2"),
        ({"net": "wrn-40-2", "ind": 7}, DIGIT, "net wrn-40-2: ind must be between 0 .* and 6, found 7"),
        ({"net": "wrn-40-2", "hidden": (5,)}, DIGIT, "has no hidden fully connected layers"),
        ({"net": "b1", "ind": 0, "first_kernel": 1}, DIGIT, "only net b2 has a choice of first_kernel"),
    ],
)
def test_what_does_not_fit_is_refused_before_and_while_building(
    params: dict[str, Any], shape: Shape, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CnnF(shape, **params)
    with pytest.raises(InputError, match=message):
        ask("cnnf", shape, **params)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("cnnf", {"cycles": -1}, "cycles: expected a number of 0 or more, found -1"),
        ("cnnf", {"eta": 1.5}, "eta: expected a number of 1 or less, found 1.5"),
        ("cnnf", {"width": 0}, "width: expected a number above 0, found 0"),
        ("cnnf", {"hidden": (5, 0)}, "hidden: expected a number of 1 or more, found 0"),
        ("cnn", {"clip": 0.0}, "clip: expected a number above 0, found 0"),
        ("cnn", {"epochs": 0}, "epochs: expected a number of 1 or more, found 0"),
        ("cnn", {"radius": -0.1}, "radius: expected a number of 0 or more, found -0.1"),
        ("cnn", {"lr": 0.0}, "lr: expected a number above 0, found 0"),
    ],
)
def test_impossible_trainings_are_refused_by_the_plan(
    name: str, params: dict[str, Any], message: str
) -> None:
    ask(name, DIGIT)
    with pytest.raises(InputError, match=message):
        ask(name, DIGIT, **params)


def test_weights_load_strictly_whatever_is_served() -> None:
    torch.manual_seed(0)
    fitted = CnnF(DIGIT, **SMALL, cycles=1)
    served = CnnF(DIGIT, **SMALL, cycles=3, eta=0.3)
    x = torch.rand(3, 1, 16, 16)
    assert not torch.equal(served.network(x), fitted.network(x))
    served.load_state_dict(fitted.state_dict(), strict=True)
    assert torch.equal(served.network(x), fitted.network(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        served.load_state_dict(dict(list(fitted.state_dict().items())[1:]), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        CnnF(DIGIT, **SMALL | {"width": 0.5}).load_state_dict(fitted.state_dict(), strict=True)


def test_initial_weights_have_the_papers_spread() -> None:
    torch.manual_seed(0)
    model = Cnn(Shape(1, 28, 28, 10))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 4:
            expected = (2 / (9 * parameter.shape[0])) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.25)
        else:
            assert parameter.abs().max().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "shape", "params"),
    [
        ("cnn", DIGIT, SMALL),
        ("cnnf", DIGIT, SMALL),
        ("cnnf", DIGIT, {"net": "b1", "ind": 0, "cycles": 2, "width": 0.25, "hidden": (9,)}),
        ("cnnf", Shape(3, 8, 8, 5), {"net": "wrn-40-2", "ind": 5, "cycles": 2, "width": 0.25}),
    ],
)
def test_both_are_what_they_declare(name: str, shape: Shape, params: dict[str, Any]) -> None:
    check_defense(name, shape, epochs=2, **params)


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["b1", "b2", "wrn-40-2"])
def test_a_gpu_answers_like_a_cpu(net: architectures.Net) -> None:
    hidden = None if net == "wrn-40-2" else (6,)
    model = CnnF(DIGIT, net=net, ind=0, cycles=2, width=0.125, hidden=hidden).double().requires_grad_(False)
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    here = model.sum().logits(x)
    there = model.cuda().sum().logits(x.cuda()).cpu()
    assert torch.allclose(here, there, rtol=1e-8, atol=1e-10)


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Cnn, CnnF])
def test_standard_training_learns(make: type[Cnn | CnnF], split: Split) -> None:
    torch.manual_seed(0)
    model = make(DIGIT, **SMALL, training="standard", epochs=20, drop_last=False)
    fitting = FakeFitting(split)
    model.fit(split, fitting)
    means = [float(torch.stack(epoch.losses).mean()) for epoch in fitting.epochs_seen]
    assert [len(epoch.losses) for epoch in fitting.epochs_seen] == [3] * 20
    assert means[-1] < 0.2 * means[0]
    assert fitting.rates == [1e-3] * 20
    assert (model.decide(split.images, "last").label == split.labels).float().mean() > 0.9


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("make", [Cnn, CnnF])
def test_adversarial_training_learns_and_repeats_bit_for_bit(
    make: type[Cnn | CnnF], clean: bool, split: Split
) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make(DIGIT, **SMALL, epochs=4, clean=clean, augment=True)
        fitting = FakeFitting(split, climb)
        model.fit(split, fitting)
        results.append((model.state_dict(), [torch.stack(each.losses) for each in fitting.epochs_seen]))
    (weights, losses), (weights_again, losses_again) = results
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert all(map(torch.equal, losses, losses_again))
    assert [len(each) for each in losses] == [2] * 4  # 40 images in batches of 16: the last 8 are dropped.
    assert losses[-1].mean() < losses[0].mean()
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("kind", ["adversarial", "standard"])
def test_a_training_that_was_stopped_goes_on_exactly(kind: Any, split: Split) -> None:
    torch.manual_seed(0)
    whole = CnnF(DIGIT, **SMALL, epochs=3, training=kind)
    first = copy.deepcopy(whole)
    whole.fit(split, FakeFitting(split, climb))

    fitting = FakeFitting(split, climb, stop=1)
    first.fit(split, fitting)
    fitting.stop = None
    second = CnnF(DIGIT, **SMALL, epochs=3, training=kind)
    second.fit(split, fitting)
    weights = whole.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in second.state_dict().items())


def test_the_learning_rate_falls_polynomially_in_every_step(split: Split) -> None:
    model = Cnn(DIGIT, **SMALL, epochs=4)
    fitting = FakeFitting(split, climb)
    model.fit(split, fitting)
    # Two steps in each of four epochs; noted at the end of an epoch.
    expected = [0.05 * (1 - step / 8) ** 0.9 for step in (1, 3, 5, 7)]
    assert fitting.rates == pytest.approx(expected)
    assert model.recipe.rate(0, 8) == 0.05


def test_a_step_is_sgd_on_clipped_gradients(split: Split) -> None:
    torch.manual_seed(0)
    model = Cnn(DIGIT, **SMALL, epochs=1, clip=0.3, lr=0.2, momentum=0.8, weight_decay=0.01)
    before = copy.deepcopy(model)
    few = Split(split.images[:16], split.labels[:16], split.index[:16], "few")
    model.fit(few, FakeFitting(few, lambda view, x, y, threat, noise: x))
    cross_entropy(before.network(few.images), few.labels).backward()
    gradients = [each.grad for each in before.parameters() if each.grad is not None]
    norm = torch.stack([each.norm() for each in gradients]).norm()
    assert norm > 0.3
    for old, new, gradient in zip(before.parameters(), model.parameters(), gradients, strict=True):
        expected = old - 0.2 * (gradient * 0.3 / norm + 0.01 * old)
        assert torch.allclose(new, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "twice"),
    [
        ({}, True),
        ({"double_decay": False}, False),
        ({"cycles": 0}, False),
        ({"training": "standard"}, False),
    ],
)
def test_only_tied_weights_with_a_feedback_decay_twice(params: dict[str, Any], twice: bool) -> None:
    model = CnnF(DIGIT, **SMALL, **params)
    groups = model.recipe.optimiser_of(model).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {id(each): name for name, each in model.named_parameters()}
    assert {group["weight_decay"] for group in groups} <= {5e-4, 1e-3}
    doubled = {
        names[id(each)] for group in groups if group["weight_decay"] == 1e-3 for each in group["params"]
    }
    full = {
        f"network.{name}.weight" for name, each in model.network.named_modules() if isinstance(each, Linear)
    }
    assert len(full) == 3
    assert doubled == (full if twice else set())


@pytest.mark.parametrize("make", [Cnn, CnnF])
def test_the_inner_attack_sees_the_first_pass_of_a_frozen_network(
    make: type[Cnn | CnnF], split: Split
) -> None:
    torch.manual_seed(0)
    model = make(DIGIT, **SMALL, epochs=1, radius=0.07)
    calls = []

    def look(view: View, x: Images, y: Tensor, threat: Threat, noise: Noise) -> Images:
        assert not view.exact
        assert not model.network.training
        assert not any(each.requires_grad for each in model.parameters())
        assert threat == Threat("linf", 0.07)
        assert torch.equal(view.logits(x), model.network(x))
        calls.append(len(x))
        return x

    model.fit(split, FakeFitting(split, look))
    assert calls == [16, 16]
    assert all(each.requires_grad for each in model.parameters())


def test_a_network_thaws_after_an_attack_that_fails() -> None:
    network = architectures.build("b2", DIGIT, width=0.125, hidden=(3,)).train()
    network.layers[0].requires_grad_(False)

    def fail(view: View, *_: object) -> Images:
        assert not network.training
        assert not any(each.requires_grad for each in network.parameters())
        raise ZeroDivisionError

    x, y = torch.rand(1, 1, 16, 16), torch.tensor([0])
    with pytest.raises(ZeroDivisionError):
        training.craft(fail, network, x, y, Threat("linf", 0.1), Noise("a", torch.arange(1)))
    assert network.training
    assert [each.requires_grad for each in network.layers[0].parameters()] == [False]
    assert all(each.requires_grad for each in network.layers[1:].parameters())


def test_augmentation_cuts_every_image_out_of_its_padded_self() -> None:
    x = torch.rand(40, 2, 6, 8)
    shown = training.augmented(x, Noise("a", torch.arange(40)))
    assert shown.shape == x.shape
    found = set()
    for image, cut in zip(x, shown, strict=True):
        places = [
            (flipped, top, left)
            for flipped in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(
                cut, pad(image.flip(2) if flipped else image, [4] * 4)[:, top : top + 6, left : left + 8]
            )
        ]
        assert len(places) == 1
        found |= set(places)
    # 40 draws of 2 x 9 x 9 places: few are equal, and each side of each choice comes up.
    assert len(found) > 25
    assert {flipped for flipped, _, _ in found} == {False, True}
    assert len({top for _, top, _ in found}) > 6
    # Drawn by image: the company does not matter.
    assert torch.equal(training.augmented(x[7:9], Noise("a", torch.arange(7, 9))), shown[7:9])

"""Plain classifiers: their networks, schedules, the three objectives, and what their training repeats."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import mpmath
import pytest
import torch
from asking import ask
from torch import Tensor, autograd, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import batch_norm, conv2d, cross_entropy, kl_div, linear, log_softmax, relu, softmax

from bench import Images, InputError, Shape, Split, Threat, TrainingError, Use, View, objective
from bench.noise import Noise
from bench.registry import DEFENSES, bind
from bench.runner.training import Trainer
from bench.suite.jobs import Train
from bench.testing import check_defense
from defenses.madry import PGD, Madry
from defenses.nets import classifiers, objectives
from defenses.nets.objectives import Ascent, ascend, divergence
from defenses.nets.resnet import ResNet18
from defenses.nets.smallcnn import lenet, smallcnn
from defenses.nets.training import Recipe, craft, frozen, staged, train
from defenses.standard import Standard
from defenses.trades import Trades
from suites import TASK, Ran, suite

GREY, COLOUR, TINY = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10), Shape(1, 16, 16, 2)
CLASSIFIERS: dict[str, Any] = {"standard": Standard, "madry": Madry, "trades": Trades}
NETS: dict[str, dict[str, Any]] = {
    "smallcnn": {"net": "smallcnn", "width": 0.125},
    "lenet": {"net": "lenet", "width": 0.5},
    "resnet18": {"net": "resnet18", "width": 0.0625},
    "b2": {"net": "b2", "width": 0.25, "hidden": (12, 7)},
}
QUICK: dict[str, Any] = {"epochs": 3, "batch": 16, "augment": False, "lr": 0.05, "warmup": 0}
"""Some epochs on a few images."""


FEW: dict[str, dict[str, Any]] = {
    "standard": {},
    "madry": {"inner": Use("pgd", {**PGD.params, "steps": 2})},
    "trades": {"steps": 2},
}
"""Attacks of two steps."""


def noise(count: int, key: str = "a") -> Noise:
    return Noise(key, torch.arange(count))


def images(count: int, shape: Shape, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape[:3], generator=generator, dtype=dtype)


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def linear_net(shape: Shape, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    size = shape.channels * shape.height * shape.width
    return nn.Sequential(nn.Flatten(), nn.Linear(size, shape.classes)).double()


def stripes(count: int = 40) -> Split:
    """Return noisy images of two stripes: upright for label 0, lying for label 1."""
    generator = torch.Generator().manual_seed(0)
    shown = 0.3 * torch.rand(count, 1, 16, 16, generator=generator)
    labels = torch.arange(count) % 2
    shown[labels == 0, :, :, 6:10] += 0.6
    shown[labels == 1, :, 6:10, :] += 0.6
    return Split(shown, labels, torch.arange(count), "stripes")


def trainer(split: Split, keep: Path | None = None, **more: Any) -> Trainer:
    return Trainer(split, "key", torch.device("cpu"), keep=keep, **more)


# --- networks -----------------------------------------------------------------------------------------


def test_the_networks_have_the_parameters_of_their_papers() -> None:
    assert parameters(ResNet18(COLOUR)) == 11_173_962
    # By hand, convolution after convolution, then the linear layers with their biases.
    full = 32 * 9 + 32 + 32 * 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 64 * 9 + 64
    assert parameters(smallcnn(GREY)) == full + 1024 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10 == 312_202
    classic = 6 * 25 + 6 + 16 * 6 * 25 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10
    assert parameters(lenet(GREY)) == classic == 61_706
    # Three channels of 32x32 without padding: the same but for the first convolution.
    assert parameters(lenet(COLOUR)) == classic + 2 * 6 * 25
    assert parameters(classifiers.build("wrn-40-2", COLOUR)) == 2_240_842
    assert parameters(classifiers.build("b2", GREY)) == 3_298_962


def test_maps_shrink_as_the_papers_say() -> None:
    def sizes(network: nn.Module, shape: Shape, kinds: tuple[type[nn.Module], ...]) -> list[list[int]]:
        found: list[list[int]] = []
        for module in network.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda _, __, out: found.append(list(out.shape[1:])))
        network(images(2, shape))
        return found

    pools = (nn.Conv2d, nn.MaxPool2d)
    assert [each[1] for each in sizes(smallcnn(GREY), GREY, pools)] == [26, 24, 12, 10, 8, 4]
    assert [each[1] for each in sizes(lenet(GREY), GREY, pools)] == [28, 14, 10, 5]
    assert [each[1] for each in sizes(lenet(COLOUR), COLOUR, pools)] == [28, 14, 10, 5]
    stages = sizes(ResNet18(COLOUR, width=0.125), COLOUR, (type(ResNet18(COLOUR).blocks[0]),))
    assert stages == [[8, 32, 32]] * 2 + [[16, 16, 16]] * 2 + [[32, 8, 8]] * 2 + [[64, 4, 4]] * 2


def test_resnet18_equals_its_literal_form() -> None:
    torch.manual_seed(0)
    network = ResNet18(Shape(2, 12, 20, 7), width=0.125).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for each in (module.weight, module.bias, module.running_mean, module.running_var):
                assert each is not None
                nn.init.uniform_(each.data, 0.5, 1.5)
    state = iter([value for name, value in network.state_dict().items() if "num_batches" not in name])

    def convolved(x: Tensor, stride: int, border: int) -> Tensor:
        weight, scale, shift, mean, variance = (next(state) for _ in range(5))
        x = conv2d(x, weight, stride=stride, padding=border)
        return batch_norm(x, mean, variance, scale, shift, eps=1e-5)

    x = images(3, Shape(2, 12, 20, 7), dtype=torch.float64)
    out = convolved(x, 1, 1).relu()
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            inner = convolved(convolved(out, stride, 1).relu(), 1, 1)
            shortcut = out if stride == 1 else convolved(out, stride, 0)
            out = relu(inner + shortcut)
    expected = linear(out.mean((2, 3)), next(state), next(state))
    assert next(state, None) is None
    assert torch.allclose(network.eval()(x), expected, rtol=1e-10, atol=1e-12)


def test_smallcnn_starts_blind() -> None:
    torch.manual_seed(0)
    network = smallcnn(GREY)
    x, y = images(4, GREY), torch.tensor([1, 2, 3, 4])
    z = x.clone().requires_grad_()
    logits = network(z)
    (gradient,) = autograd.grad(cross_entropy(logits, y), z)
    assert not logits.any()
    assert not gradient.any()
    # So that an attack from the image itself stays there, and its convolutions are Kaiming's.
    attack = trainer(stripes()).attack(Use("pgd", {"steps": 3, "start": "zero", "keep": "last"}))
    assert torch.equal(craft(attack, network, x, y, Threat("linf", 0.1), noise(4)), x)
    for name in ("conv2", "conv3", "conv4"):
        weight = network.get_submodule(name).get_parameter("weight")
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.03)


def test_smallcnn_drops_half_of_its_units_in_training_mode_alone() -> None:
    torch.manual_seed(0)
    network = smallcnn(GREY)
    nn.init.normal_(network.get_submodule("fc3").get_parameter("weight"))
    kept = []
    network.get_submodule("drop").register_forward_hook(
        lambda _, given, out: kept.append((out[given[0] > 0] > 0).float().mean().item())
    )
    x = images(20, GREY)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    assert kept[:2] == pytest.approx([0.5, 0.5], abs=0.05)
    assert kept[2:] == [1, 1]


@pytest.mark.parametrize(
    ("net", "shape", "width"),
    [
        ("smallcnn", Shape(3, 16, 19, 4), 0.1),
        ("lenet", Shape(2, 12, 40, 3), 0.3),
        ("resnet18", Shape(1, 1, 5, 2), 0.01),
        ("b1", Shape(1, 8, 8, 3), 0.1),
    ],
)
def test_networks_work_on_any_size_that_fits(net: classifiers.Net, shape: Shape, width: float) -> None:
    network = classifiers.build(net, shape, width=width).eval()
    logits = network(images(2, shape))
    assert logits.shape == (2, shape.classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("params", "shape", "message"),
    [
        ({"net": "smallcnn"}, Shape(1, 28, 15, 10), "net smallcnn: sides .* at least 16, found 28x15"),
        ({"net": "lenet"}, Shape(1, 11, 28, 10), "net lenet: sides .* at least 12, found 11x28"),
        ({"net": "b2"}, Shape(1, 28, 30, 10), "net b2: sides .* divisible by 4, found 28x30"),
        ({"hidden": (5,)}, GREY, r"only nets b1 and b2 have a choice of hidden, found \[5\]"),
        ({"net": "wrn-40-2", "hidden": (5,)}, COLOUR, "has no hidden fully connected layers"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_and_while_building(
    params: dict[str, Any], shape: Shape, message: str
) -> None:
    for name, make in CLASSIFIERS.items():
        with pytest.raises(InputError, match=message):
            make(shape, **params)
        with pytest.raises(InputError, match=message):
            ask(name, shape, **params)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("standard", {"epochs": 0}, "epochs: expected a number of 1 or more, found 0"),
        ("madry", {"batch": 0}, "batch: expected a number of 1 or more, found 0"),
        ("madry", {"batch": 1}, "net resnet18: batch must be at least 2, as batch normalisation .* found 1"),
        ("standard", {"width": 0.0}, "width: expected a number above 0, found 0"),
        ("standard", {"net": "b2", "hidden": (5, 0)}, "hidden: expected a number of 1 or more, found 0"),
        ("standard", {"lr": 0.0}, "lr: expected a number above 0, found 0"),
        ("standard", {"lr": float("nan")}, "lr: expected a finite number, found nan"),
        ("standard", {"momentum": -0.1}, "momentum: expected a number of 0 or more, found -0.1"),
        ("standard", {"weight_decay": -1.0}, "weight_decay: expected a number of 0 or more, found -1"),
        ("standard", {"warmup": -1}, "warmup: expected a number of 0 or more, found -1"),
        ("standard", {"clip": 0.0}, "clip: expected a number above 0, found 0"),
        ("standard", {"clip": -1.0}, "clip: expected a number above 0, found -1"),
        ("madry", {"milestones": (50, 40)}, r"milestones must .* rise, found \[50, 40\]"),
        ("madry", {"milestones": (0,)}, "milestones: expected a number of 1 or more, found 0"),
        ("madry", {"radius": -0.1}, "radius: expected a number of 0 or more, found -0.1"),
        ("trades", {"beta": -1.0}, "beta: expected a number of 0 or more, found -1"),
        ("trades", {"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ("trades", {"step_size": 0.0}, "step_size: expected a number above 0, found 0"),
    ],
)
def test_impossible_trainings_are_refused_by_the_plan(
    name: str, params: dict[str, Any], message: str
) -> None:
    ask(name, COLOUR)
    with pytest.raises(InputError, match=message):
        ask(name, COLOUR, **params)


def test_the_defaults_are_those_of_the_released_codes() -> None:
    pgd = {"steps": 7, "step_size": 0.007, "start": "uniform", "keep": "last", "drop": False}
    settings = {name: bind(DEFENSES[name], {}) for name in CLASSIFIERS}
    shared = {
        "net": "resnet18",
        "batch": 128,
        "drop_last": False,
        "augment": True,
        "optimiser": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "clip": None,
    }
    for each in settings.values():
        assert {name: each[name] for name in shared} == shared
    apinet = {"epochs": 90, "milestones": (40, 50), "warmup": 3, "weight_decay": 5e-4}
    for name in ("standard", "madry"):
        assert {key: settings[name][key] for key in apinet} == apinet
    assert settings["madry"]["inner"] == Use("pgd", pgd) == PGD
    assert settings["madry"]["radius"] == 8 / 255
    trades = {"epochs": 76, "milestones": (74,), "warmup": 0, "weight_decay": 2e-4}
    trades |= {"radius": 0.031, "beta": 6, "steps": 10, "step_size": 0.007, "start": "gaussian"}
    trades |= {"attack_mode": "eval", "detach_target": False, "clean_forwards": 2}
    assert {key: settings["trades"][key] for key in trades} == trades


# --- schedules and the loop ---------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_at_milestones_between_epochs() -> None:
    steps = 7
    apinet = staged(90, (40, 50), 3)
    by_epoch = [apinet(epoch * steps, 90 * steps) for epoch in range(90)]
    expected = [1 / 3, 5 / 9, 7 / 9] + [1.0] * 37 + [0.1] * 10 + [0.01] * 40
    assert by_epoch == pytest.approx(expected, rel=1e-12)
    # All steps of an epoch have its rate.
    assert [apinet(step, 90 * steps) for step in range(90 * steps)] == [
        rate for rate in by_epoch for _ in range(steps)
    ]
    # The TRADES code counts epochs from 1, and lowers the rate in the 75th: the last two of 76.
    trades = staged(76, (74,))
    assert [trades(epoch, 76) for epoch in range(76)] == pytest.approx([1.0] * 74 + [0.1] * 2)


class Epochs:
    """A `Fitting` of nothing but batches that are given, that notes what was reported."""

    parts: ClassVar[Mapping[str, nn.Module]] = {}

    def __init__(self, sizes: list[int], shape: Shape) -> None:
        self.device = torch.device("cpu")
        self.sizes, self.shape = sizes, shape
        self.number = 0
        self.reported: list[Tensor] = []

    def attack(self, use: Use) -> Any:
        return trainer(stripes()).attack(use)

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        return len(self.sizes)

    def epochs(self, count: int, model: nn.Module, *optimisers: torch.optim.Optimizer) -> Iterator["Epochs"]:
        (self.optimiser,) = optimisers
        for self.number in range(count):
            yield self

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor, Noise]]:
        for position, count in enumerate(self.sizes):
            y = torch.arange(count) % self.shape.classes
            yield images(count, self.shape, seed=position), y, noise(count)

    def report(self, loss: Tensor) -> None:
        self.reported.append(loss)


def test_small_batches_are_left_out_and_the_mean_loss_is_told() -> None:
    model = linear_net(TINY).float()
    fitting = Epochs([4, 3, 1], TINY)
    seen, told = [], []

    def loss(x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        assert model.training
        seen.append(len(x))
        return cross_entropy(model(x), y)

    train(model, fitting, loss, Recipe(epochs=2, batch=4, lr=0.01), fewest=2, ended=told.append)
    assert seen == [4, 3, 4, 3]
    assert isinstance(fitting.optimiser, torch.optim.Adam)
    assert [each.item() for each in told] == pytest.approx(
        [(fitting.reported[0] + fitting.reported[1]).item() / 2, (sum(fitting.reported[2:]) / 2).item()]  # type: ignore[union-attr]
    )
    assert not model.training


def test_an_epoch_of_nothing_but_small_batches_is_an_error() -> None:
    fitting = Epochs([1, 1], TINY)
    model = linear_net(TINY).float()
    with pytest.raises(InputError, match="no batch has the 2 images that batch normalisation needs"):
        train(model, fitting, lambda *_: pytest.fail("no step"), Recipe(epochs=1, batch=1, lr=1.0), fewest=2)
    # A single training image, in a batch that could hold more.
    alone = Standard(COLOUR, net="resnet18", width=0.06, epochs=1, milestones=())
    split = Split(torch.rand(1, *COLOUR[:3]), torch.tensor([0]), torch.arange(1), "alone")
    with pytest.raises(InputError, match="nothing would be learned: batch is 128"):
        alone.fit(split, Trainer(split, "key", torch.device("cpu")))


def test_every_step_has_the_rate_of_its_epoch() -> None:
    model = linear_net(TINY).float()
    fitting = Epochs([2, 2, 2], TINY)
    rates = []

    def loss(x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        rates.append(fitting.optimiser.param_groups[0]["lr"])
        return cross_entropy(model(x), y)

    recipe = Recipe(epochs=3, batch=2, lr=0.5, optimiser="sgd", schedule=staged(3, (1, 2)))
    train(model, fitting, loss, recipe)
    assert rates == pytest.approx([0.5] * 3 + [0.05] * 3 + [0.005] * 3)


def test_a_step_is_momentum_on_clipped_gradients_with_decay() -> None:
    model = Standard(
        TINY, **NETS["lenet"], **QUICK | {"epochs": 1, "lr": 0.2}, clip=0.05, weight_decay=0.01, momentum=0.7
    )
    before = copy.deepcopy(model)
    fitting = Epochs([6, 6], TINY)
    model.fit(stripes(), fitting)
    speed = [torch.zeros_like(each) for each in before.parameters()]
    for x, y, _ in fitting.batches(6):
        before.zero_grad()
        cross_entropy(before.network(x), y).backward()
        gradients = [each.grad for each in before.parameters() if each.grad is not None]
        norm = torch.stack([each.norm() for each in gradients]).norm()
        assert norm > 0.05
        with torch.no_grad():
            for each, gradient, moved in zip(before.parameters(), gradients, speed, strict=True):
                moved.mul_(0.7).add_(gradient * 0.05 / norm + 0.01 * each)
                each.sub_(0.2 * moved)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("inside", ["eval", "train"])
def test_freezing_restores_the_mode_of_every_module(inside: Any) -> None:
    network = ResNet18(TINY, width=0.0625).train()
    network.norm.eval()
    network.linear.requires_grad_(False)
    with frozen(network, inside):
        assert all(each.training is (inside == "train") for each in network.modules())
        assert not any(each.requires_grad for each in network.parameters())
    assert [name for name, each in network.named_modules() if not each.training] == ["norm"]
    assert [name for name, each in network.named_parameters() if not each.requires_grad] == [
        "linear.weight",
        "linear.bias",
    ]


# --- objectives (1.7, 1.8) ----------------------------------------------------------------------------


def test_the_standard_objective_is_the_cross_entropy() -> None:
    network = linear_net(TINY)
    x, y = images(5, TINY, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    assert objectives.standard(network)(x, y, noise(5)) == cross_entropy(network(x), y)


@pytest.mark.parametrize("start", ["uniform", "zero"])
def test_pgd_on_a_linear_model_ends_with_no_less_loss_than_at_its_start(start: str) -> None:
    # The loss is convex and every move follows the gradient's signs: no step can lose.
    network, threat = linear_net(Shape(1, 6, 6, 5)), Threat("linf", 0.1)
    x, y = images(30, Shape(1, 6, 6, 5), dtype=torch.float64), torch.arange(30) % 5
    view = View(network, exact=False)
    losses = []
    for steps in (1, 2, 5, 20):
        # Each run draws the same start, and goes on from where a shorter one ends.
        attack = trainer(stripes()).attack(
            Use("pgd", {"steps": steps, "step_size": 0.02, "start": start, "keep": "last", "drop": False})
        )
        z = craft(attack, network, x, y, threat, Noise("a", torch.arange(30), dtype=torch.float64))
        losses.append(objective(view, network(z), y).detach())
    drawn = Noise("a", torch.arange(30), dtype=torch.float64).uniform((1, 6, 6), -0.1, 0.1)
    first = x if start == "zero" else threat.project(x, x + drawn)
    losses.insert(0, objective(view, network(first), y).detach())
    for less, more in pairwise(losses):
        assert (more >= less - 1e-12).all()
    assert (losses[-1] > losses[0]).all()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_is_crafted_stays_in_ball_and_box_and_carries_no_gradient(mode: Any) -> None:
    torch.manual_seed(0)
    network = ResNet18(TINY, width=0.0625)
    x, y = images(8, TINY), torch.arange(8) % 2
    x[:, :, :4] = 0
    x[:, :, 12:] = 1
    attack = trainer(stripes()).attack(PGD)
    threat = Threat("linf", 0.02)
    z = craft(attack, network, x, y, threat, noise(8), mode=mode)
    climbed = ascend(
        network, x, noise(8), Ascent(threat, steps=7, step_size=0.007, start="gaussian", mode=mode)
    )
    for made in (z, climbed):
        assert not made.requires_grad
        assert (made - x).abs().max() <= 0.02 + 1e-7
        # 7 steps of 0.007 cross the ball: somewhere they reach its surface.
        assert (made - x).abs().max() > 0.0199
        assert made.min() >= 0
        assert made.max() <= 1
    assert all(each.grad is None and each.requires_grad for each in network.parameters())
    assert network.training


def test_no_gradient_flows_through_what_the_attack_made() -> None:
    torch.manual_seed(0)
    network = classifiers.build("lenet", TINY, width=0.5)
    x, y = images(6, TINY), torch.arange(6) % 2

    def through(view: View, x: Images, y: Tensor, threat: Threat, noise: Noise) -> Images:
        # As careless as it can be: its images depend on the weights, and autograd knows.
        (weight,) = [each for name, each in network.named_parameters() if name == "conv1.weight"]
        return (x * (1 + weight.mean())).clamp(0, 1)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(autograd.grad(loss, list(network.parameters())))

    made = craft(through, network, x, y, Threat("linf", 1.0), noise(6))
    loss = objectives.madry(network, through, Threat("linf", 1.0), mode="eval")(x, y, noise(6))
    expected = cross_entropy(network(made.detach()), y)
    assert loss.item() == expected.item()
    assert all(map(torch.equal, gradients(loss), gradients(expected)))
    # With the real attack too.
    attack = trainer(stripes()).attack(PGD)
    made = craft(attack, network, x, y, Threat("linf", 0.1), noise(6))
    loss = objectives.madry(network, attack, Threat("linf", 0.1), mode="eval")(x, y, noise(6))
    assert all(map(torch.equal, gradients(loss), gradients(cross_entropy(network(made), y))))


def test_divergence_is_kullback_and_leiblers() -> None:
    torch.manual_seed(0)
    one, other = (3 * torch.randn(20, 6, dtype=torch.float64) for _ in range(2))
    expected = kl_divergence(Categorical(logits=one), Categorical(logits=other))
    assert torch.allclose(divergence(one, other), expected, rtol=1e-10, atol=1e-13)
    assert autograd.gradcheck(divergence, (one.requires_grad_(), other.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_divergence_from_itself_and_its_gradient_are_exactly_zero(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    logits = scale * torch.randn(50, 10, dtype=dtype)
    other = logits.clone().requires_grad_()
    value = divergence(logits, other)
    (gradient,) = autograd.grad(value.sum(), other)
    assert not value.any()
    assert not gradient.any()
    # The usual way leaves rounding, whose signs a step would follow.
    if scale == 1:
        usual = kl_div(log_softmax(other, 1), softmax(logits, 1), reduction="sum")
        assert autograd.grad(usual, other)[0].any()


@pytest.mark.parametrize("lead", [1e-6, 1.0, 20.0, 60.0, 90.0, 1e3, 1e6])
@pytest.mark.parametrize("offset", [0.0, -400.0, 1e6])
def test_divergence_and_its_gradients_are_exact_in_float32(lead: float, offset: float) -> None:
    """Against arbitrary precision: two predictions that are nearly equal, alike, and quite different."""
    draw = torch.Generator().manual_seed(0)
    for difference in (1e-6, 1e-2, 1.0, 30.0, lead):
        one = lead * torch.rand(4, 5, generator=draw, dtype=torch.float64)
        one[::2, 0] += lead
        two = one + difference * torch.rand(4, 5, generator=draw, dtype=torch.float64)
        target, other = ((each + offset).float().requires_grad_() for each in (one, two))
        value = divergence(target, other)
        found = torch.cat([value[:, None], *autograd.grad(value.sum(), (target, other))], 1)
        for row, got_all in enumerate(found.tolist()):
            wanted = by_mpmath(target[row].tolist(), other[row].tolist())
            for got, true in zip(got_all, wanted, strict=True):
                if 2.0**-126 < abs(true) < 3.4e38:
                    assert abs(got - true) <= 1e-5 * abs(true)
                elif abs(true) > 2.0**-149:
                    assert got != 0


def by_mpmath(target: list[float], other: list[float]) -> list[mpmath.mpf]:
    """Return KL, its gradient to the target's logits, and to the other's."""
    with mpmath.workdps(150):
        logs = []
        for row in (target, other):
            high = max(range(len(row)), key=row.__getitem__)
            below = [mpmath.mpf(value) - mpmath.mpf(row[high]) for value in row]
            rest = mpmath.fsum(mpmath.exp(value) for k, value in enumerate(below) if k != high)
            logs.append([value - mpmath.log1p(rest) for value in below])
        p, q = ([mpmath.exp(value) for value in each] for each in logs)
        ratios = [one - two for one, two in zip(*logs, strict=True)]
        kl = mpmath.fsum(weight * ratio for weight, ratio in zip(p, ratios, strict=True))
        first = [weight * (ratio - kl) for weight, ratio in zip(p, ratios, strict=True)]
        return [kl, *first, *(two - one for one, two in zip(p, q, strict=True))]


def test_a_class_that_neither_prediction_has_adds_nothing_to_their_divergence() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(6, 4).requires_grad_(), torch.randn(6, 4).requires_grad_()
    expected = divergence(one, other)
    masked = [
        torch.cat([each.detach(), torch.full((6, 2), -torch.inf)], 1).requires_grad_()
        for each in (one, other)
    ]
    found = divergence(*masked)
    assert torch.allclose(found, expected)
    for ours, theirs in zip(
        autograd.grad(found.sum(), masked), autograd.grad(expected.sum(), (one, other)), strict=True
    ):
        assert torch.allclose(ours[:, :4], theirs)
        assert not ours[:, 4:].any()
    # One that the other has alone takes from its classes; one that the target has alone is infinitely missed.
    alone = torch.tensor([[3.0, 1.0, -torch.inf]]), torch.tensor([[1.0, 2.0, 0.5]]).requires_grad_()
    value = divergence(*alone)
    p, q = (each.detach().double().softmax(1) for each in alone)
    assert torch.allclose(value.double(), (p * (p / q).log())[:, :2].sum(1))
    assert torch.allclose(autograd.grad(value.sum(), alone[1])[0].double(), q - p)
    assert divergence(alone[1], alone[0]).isposinf()


class Still(Noise):
    """No noise at all."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros_like(super().normal(shape))


@pytest.mark.parametrize("net", ["lenet", "resnet18", "b2"])
def test_at_the_image_itself_there_is_nothing_to_climb(net: str) -> None:
    torch.manual_seed(0)
    network = classifiers.build(**NETS[net], shape=TINY)
    x = images(8, TINY)
    still = Still("a", torch.arange(8))
    settings: dict[str, Any] = {"steps": 3, "step_size": 0.01, "start": "gaussian"}
    assert torch.equal(ascend(network, x, still, Ascent(Threat("linf", 0.1), **settings)), x)
    moved = ascend(network, x, noise(8), Ascent(Threat("linf", 0.1), **settings))
    assert ((moved - x).abs().flatten(1).amax(1) > 0.005).all()


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_the_ascent_equals_the_released_loop(start: Any) -> None:
    torch.manual_seed(0)
    network = classifiers.build("resnet18", TINY, width=0.0625).double()
    network.train()(images(16, TINY, seed=3, dtype=torch.float64))  # Running statistics of some kind.
    x = images(5, TINY, dtype=torch.float64)
    draws = Noise("a", torch.arange(5), dtype=torch.float64)
    made = ascend(network, x, draws, Ascent(Threat("linf", 0.03), steps=4, step_size=0.02, start=start))

    draws = Noise("a", torch.arange(5), dtype=torch.float64)
    network.eval()
    if start == "gaussian":
        z = x.detach() + 0.001 * draws.normal((1, 16, 16))
    else:
        z = (x + draws.uniform((1, 16, 16), -0.03, 0.03)).clamp(0, 1)
    for _ in range(4):
        z.requires_grad_()
        loss = kl_div(log_softmax(network(z), 1), softmax(network(x), 1), reduction="sum")
        z = z.detach() + 0.02 * torch.sign(autograd.grad(loss, [z])[0].detach())
        z = torch.min(torch.max(z, x - 0.03), x + 0.03)
        z = torch.clamp(z, 0.0, 1.0)
    assert torch.allclose(made, z, rtol=0, atol=1e-12)


def test_the_ascent_on_a_linear_model_never_loses() -> None:
    # The divergence is convex in the second prediction's logits.
    network = linear_net(Shape(1, 6, 6, 5))
    x = images(30, Shape(1, 6, 6, 5), dtype=torch.float64)

    def climbed(steps: int) -> Tensor:
        draws = Noise("a", torch.arange(30), dtype=torch.float64)
        z = ascend(
            network, x, draws, Ascent(Threat("linf", 0.1), steps=steps, step_size=0.02, start="uniform")
        )
        return divergence(network(x), network(z)).detach()

    values = [climbed(steps) for steps in (1, 2, 4, 8, 16)]
    for less, more in pairwise(values):
        assert (more >= less - 1e-12).all()
    assert (values[-1] > values[0]).all()


def test_the_ascent_of_an_image_depends_on_no_other_and_on_no_caller() -> None:
    torch.manual_seed(0)
    network = classifiers.build("lenet", TINY, width=0.5)
    x = images(9, TINY)
    settings: dict[str, Any] = {"steps": 3, "step_size": 0.01, "start": "uniform"}
    with torch.no_grad():
        every = ascend(network, x, noise(9), Ascent(Threat("linf", 0.1), **settings))
    rows = torch.tensor([7, 2])
    some = ascend(network, x[rows], Noise("a", rows), Ascent(Threat("linf", 0.1), **settings))
    assert torch.allclose(some, every[rows], rtol=0, atol=1e-6)


def trades(network: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "beta": 6.0,
        "detach_target": False,
        "clean_forwards": 2,
    }
    ascent = Ascent(Threat("linf", 0.05), steps=2, step_size=0.02, start="gaussian")
    return objectives.trades(network, ascent, **settings | changes)


def test_trades_without_its_second_term_is_the_cross_entropy() -> None:
    torch.manual_seed(0)
    network = classifiers.build("b1", TINY, width=0.125, hidden=(5,))
    x, y = images(6, TINY), torch.arange(6) % 2
    loss, plain = trades(network, beta=0.0)(x, y, noise(6)), cross_entropy(network(x), y)
    assert loss.item() == plain.item()
    for one, other in zip(
        *(autograd.grad(each, list(network.parameters())) for each in (loss, plain)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_trades_is_the_sum_it_is_defined_as(detach: bool, forwards: int) -> None:
    torch.manual_seed(0)
    network = classifiers.build("resnet18", TINY, width=0.0625).double()
    x, y = images(6, TINY, dtype=torch.float64), torch.arange(6) % 2
    draws = [Noise("a", torch.arange(6), dtype=torch.float64) for _ in range(2)]
    z = ascend(network, x, draws[1], Ascent(Threat("linf", 0.05), steps=2, step_size=0.02, start="gaussian"))
    loss = trades(network, detach_target=detach, clean_forwards=forwards)(x, y, draws[0])

    target = softmax(network(x), 1)
    if detach:
        target = target.detach()
    # As in the released code, but for `size_average`, which is gone from torch.
    robust = kl_div(log_softmax(network(z), 1), target, reduction="sum") / 6
    expected = cross_entropy(network(x), y) + 6 * robust
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    weights = list(network.parameters())
    for one, other in zip(autograd.grad(loss, weights), autograd.grad(expected, weights), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)


def test_detaching_the_target_changes_the_gradient_alone() -> None:
    torch.manual_seed(0)
    network = classifiers.build("lenet", TINY, width=0.5)
    x, y = images(6, TINY), torch.arange(6) % 2
    one, other = (trades(network, beta=50.0, detach_target=each)(x, y, noise(6)) for each in (False, True))
    assert one.item() == other.item()
    weight = next(network.parameters())
    assert not torch.equal(*(autograd.grad(each, weight)[0] for each in (one, other)))


# --- batch normalisation while attacking --------------------------------------------------------------


def counted(network: nn.Module) -> tuple[int, Tensor]:
    """Return how often batch normalisation has moved its running statistics, and one of them."""
    norm = next(each for each in network.modules() if isinstance(each, nn.BatchNorm2d))
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    return int(norm.num_batches_tracked), norm.running_mean.clone()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_only_an_attack_in_training_mode_moves_running_statistics(mode: Any) -> None:
    torch.manual_seed(0)
    network = ResNet18(TINY, width=0.0625)
    x, y = images(8, TINY), torch.arange(8) % 2
    attack = trainer(stripes()).attack(PGD)
    count, mean = counted(network)
    craft(attack, network, x, y, Threat("linf", 0.02), noise(8), mode=mode)
    ascend(
        network,
        x,
        noise(8),
        Ascent(Threat("linf", 0.02), steps=3, step_size=0.01, start="uniform", mode=mode),
    )
    after, moved = counted(network)
    # PGD looks once in each of 7 steps; the ascent once at the image and once in each of 3.
    assert after - count == (0 if mode == "eval" else 7 + 1 + 3)
    assert torch.equal(mean, moved) is (mode == "eval")


@pytest.mark.parametrize(
    ("name", "params", "moves"),
    [
        ("standard", {}, 1),
        ("madry", {}, 1),
        ("madry", {"attack_mode": "train"}, 1 + 7),
        ("trades", {"steps": 2}, 3),
        ("trades", {"steps": 2, "clean_forwards": 1}, 2),
        ("trades", {"steps": 2, "attack_mode": "train"}, 3 + 1 + 2),
    ],
)
def test_a_step_moves_running_statistics_as_often_as_the_code_does(
    name: str, params: dict[str, Any], moves: int
) -> None:
    torch.manual_seed(0)
    model = CLASSIFIERS[name](TINY, **NETS["resnet18"], **QUICK | {"epochs": 2}, **params)
    model.fit(stripes(), trainer(stripes()))
    # 40 images in batches of 16: three steps in each of two epochs.
    assert counted(model.network)[0] == 6 * moves


# --- the defenses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("net", ["lenet", "resnet18", "b2", "wrn-40-2"])
def test_each_is_what_it_declares(name: str, net: str) -> None:
    params = NETS.get(net, {"net": net, "width": 0.125})
    check_defense(name, Shape(3, 16, 16, 5), epochs=2, **params)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_smallcnn_is_what_it_declares_once_it_sees(name: str) -> None:
    # Untrained, its logits are 0 and no gradient leads anywhere.
    with pytest.raises(AssertionError, match="gradient of zero for 6 of 6 images"):
        check_defense(name, TINY, **NETS["smallcnn"])

    def seeing(model: Any) -> None:
        nn.init.normal_(model.network.fc3.weight)

    check_defense(name, TINY, prepare=seeing, epochs=2, **NETS["smallcnn"])


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("net", ["smallcnn", "lenet", "resnet18", "b2"])
def test_training_learns(name: str, net: str) -> None:
    torch.manual_seed(0)
    settings = {**QUICK, "epochs": 12, "optimiser": "adam", "lr": 0.01, "batch": 20}
    if name != "standard":
        settings |= {"radius": 0.05}
    split, losses = stripes(), []
    model = CLASSIFIERS[name](TINY, **NETS[net], **settings | FEW[name])
    model.fit(split, trainer(split, progress=lambda facts: losses.append(facts["loss"])))
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    assert (model.decide(split.images, "label").label == split.labels).float().mean() > 0.9


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("net", ["smallcnn", "resnet18"])
def test_training_repeats_and_goes_on_bit_for_bit(
    name: str, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout and batch normalisation, augmentation and warm-up: all of it is to be repeated.
    settings = {**NETS[net], **QUICK, "epochs": 4, "augment": True, "warmup": 2, "milestones": (3,)}
    settings |= FEW[name]

    def made() -> Any:
        torch.manual_seed(0)
        return CLASSIFIERS[name](TINY, **settings)

    split = stripes()
    whole = made()
    before = copy.deepcopy(whole.state_dict())
    whole.fit(split, trainer(split))
    assert not any(map(torch.equal, whole.parameters(), [before[key] for key, _ in whole.named_parameters()]))
    again = made()
    again.fit(split, trainer(split))

    save = Trainer._save

    def dies(self: Trainer, done: int, *rest: Any) -> None:
        save(self, done, *rest)
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        made().fit(split, trainer(split, tmp_path))
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = CLASSIFIERS[name](TINY, **settings)
    resumed.fit(split, fitting := trainer(split, tmp_path))
    assert fitting.resumed == 2
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(resumed.state_dict()[key], value)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_loss_that_is_no_number_stops_the_training(name: str) -> None:
    torch.manual_seed(0)
    model = CLASSIFIERS[name](TINY, **NETS["lenet"], **QUICK | {"lr": 1e30})
    with pytest.raises(TrainingError, match=r"the loss of epoch \d, step \d is (nan|inf)"):
        model.fit(stripes(), trainer(stripes()))


def test_madry_asks_for_its_inner_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look(view: View, x: Images, y: Tensor, threat: Threat, noise: Noise) -> Images:
        assert not view.exact
        asked.append((len(x), threat))
        return x

    inner = Use("pgd", {"steps": 2})
    monkeypatch.setattr(Trainer, "attack", lambda self, use: look if use == inner else None)
    model = Madry(TINY, **NETS["lenet"], **QUICK | {"epochs": 1}, radius=0.07, inner=inner, drop_last=True)
    model.fit(stripes(), trainer(stripes()))
    assert asked == [(16, Threat("linf", 0.07))] * 2


# --- starting from another defense --------------------------------------------------------------------


def test_training_starts_from_the_weights_of_another_defense() -> None:
    torch.manual_seed(0)
    split = stripes()
    first = Madry(TINY, **NETS["resnet18"], **QUICK)
    first.fit(split, trainer(split))
    given = copy.deepcopy(first.state_dict())
    # A step that goes nowhere: what is left is where it started, but for the running statistics.
    still = {**QUICK, "epochs": 1, "lr": 1e-30, "weight_decay": 0.0}
    model = Trades(TINY, **NETS["resnet18"], **still, initial=first)  # type: ignore[arg-type]
    assert parameters(model) == parameters(first)
    assert not torch.equal(next(model.parameters()), next(first.parameters()))
    model.fit(split, trainer(split, parts={"initial": first}))
    for name, value in model.named_parameters():
        assert torch.equal(value, given[name])
    for name, value in first.state_dict().items():
        assert torch.equal(value, given[name])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"net": "resnet18", "width": 0.125}, r"conv.weight is \(4, 1, 3, 3\), expected \(8, 1, 3, 3\)"),
        ({"net": "lenet"}, "a Madry has other weights than net lenet of this width: .* is missing"),
    ],
)
def test_weights_of_another_form_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trades(TINY, **params, initial=Madry(TINY, **NETS["resnet18"]))  # type: ignore[arg-type]


def test_a_suite_trains_what_another_starts_from_and_says_what_steps_do_not_reach(tmp_path: Path) -> None:
    shared = {"net": "b1", "width": 0.125, "hidden": [8], "epochs": 1, "batch": 256, "augment": False}
    defenses = {
        "plain": {"use": "standard", **shared},
        "madry": {"use": "madry", **shared, "initial": "plain", "radius": 0.1},
        "trades": {"use": "trades", **shared, "initial": "madry", "steps": 2, "radius": 0.02},
    }
    ran = Ran(suite(tmp_path, defenses, {"clean": {"use": "none"}}, [{**TASK, "views": ["logits"]}]))
    assert not ran.failed
    jobs = {job.defense.name: job for job in ran.plan.graph() if isinstance(job, Train)}
    assert [name for name, _ in jobs["trades"].parts] == ["initial"]
    flags = {cell.coordinates["defense"]: cell.facts["flags"] for cell in ran.plan.conditions}
    assert flags["plain"] == []
    assert [re.sub("^madry: ", "", each) for each in flags["madry"]] == [
        "7 inner steps of 0.007 reach 0.049, less than the radius 0.1"
    ]
    assert [re.sub("^trades: ", "", each) for each in flags["trades"]] == [
        "2 inner steps of 0.007 reach 0.014, less than the radius 0.02"
    ]
    # Every setting is written down beside the weights, whether it was asked for or not.
    job = json.loads((ran.store.folder("train", jobs["trades"].key) / "job.json").read_text())
    settings = job["defense"]["params"]
    assert settings["steps"] == 2
    assert settings["attack_mode"] == "eval"
    assert settings["start"] == "gaussian"
    assert settings["step_size"] == 0.007
    assert settings["milestones"] == [74]


def test_an_inner_attack_without_a_length_of_its_own_raises_no_doubt() -> None:
    flags = DEFENSES["madry"].flags
    assert flags is not None
    assert flags(radius=0.3, inner={"use": "pgd", "steps": 7, "step_size": None}) is None
    assert flags(radius=0.3, inner={"use": "fgsm"}) is None
    assert flags(radius=76.5 / 255, inner={"use": "pgd", "steps": 40, "step_size": 0.01}) is None

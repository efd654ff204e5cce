"""Defenses that are not robust but look so, each a disguise in front of one trained network; and sound ones.

Digits at 16x16 on the grid of 8-bit greys, linf 0.1. The network in each is the same: an attacker who sees it
breaks most of its images.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.nn.functional import batch_norm, cross_entropy, interpolate, one_hot

from bench.doctor.patient import Patient, Sight
from bench.protocols import Decision, Images, Split, Threat, View
from bench.registry import DefenseEntry, ViewEntry, view

THREAT = Threat("linf", 0.1)


@cache
def digits() -> tuple[Split, Split]:
    """Return 1,200 training images and 597 test images, in an order of their own."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    grey = (interpolate(small, size=16, mode="bilinear").clamp(0, 1) * 255).round() / 255
    truth = torch.tensor(labels)[order]
    cut = 1200
    return tuple(  # type: ignore[return-value]
        Split(grey[rows], truth[rows], torch.arange(len(truth))[rows], "digits")
        for rows in (slice(cut), slice(cut, None))
    )


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


@cache
def trained(
    make: Callable[[], nn.Module] = small_net,
    *,
    seed: int = 0,
    radius: float = 0.0,
    epochs: int = 12,
    on: int = 0,
) -> nn.Module:
    """Return a network trained on digits; with a radius, on images that 5 steps of PGD moved."""
    torch.manual_seed(seed)
    net, split = make(), digits()[on]
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(split)).split(64):
            x, y = split.images[rows], split.labels[rows]
            z = x + radius * (2 * torch.rand_like(x) - 1)
            for _ in range(5 if radius else 0):
                z.requires_grad_()
                (gradient,) = grad(cross_entropy(net(z), y), z)
                z = THREAT.project(x, (z + radius / 3 * gradient.sign()).detach())
            optimiser.zero_grad()
            cross_entropy(net(z.clamp(0, 1)), y).backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


class Plain(nn.Module):
    """A network, scored by its arg-max and seen as it is; what is planted changes one or both."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = trained() if net is None else net

    def plain(self, x: Images) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = self.net(x)
        return logits

    def scored(self, x: Images) -> Tensor:
        """Return the logits that are scored."""
        return self.plain(x)

    def seen(self, x: Images) -> Tensor:
        """Return the logits that an attack sees."""
        return self.scored(x)

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(self.seen)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self.scored(x))


def entry_of(kind: type[nn.Module], random: bool = False) -> DefenseEntry:
    """Return what would be registered of a class."""
    views = {}
    for attribute, method in inspect.getmembers(kind, inspect.isfunction):
        if (declared := getattr(method, "__view__", None)) is not None:
            views[declared["name"]] = ViewEntry(make=method, version=1, method=attribute, **declared)
    return DefenseEntry(
        name=kind.__name__, make=kind, version=1, readouts=("label",), views=views, aliases={},
        inference=frozenset(), random=random, learns=False, flags=None, check_params=None,
    )  # fmt: skip


def patient(model: nn.Module, *, n: int = 48, random: bool = False, **more: Any) -> Patient:
    """Return a defense with test images to examine it on."""
    train, test = digits()
    entry = entry_of(type(model), random)
    given = {"train": train, "threat": THREAT, **more}
    return Patient(
        model=model.eval().requires_grad_(False), entry=entry,
        sights=[Sight(each) for each in entry.views.values()], readout="label", images=test.images[:n],
        labels=test.labels[:n], classes=10, random=random, **given,
    )  # fmt: skip


# --- what is seen is not what is scored --------------------------------------------------------------


class OtherView(Plain):
    """Another network is seen."""

    def seen(self, x: Images) -> Tensor:
        return trained(mlp)(x)


class RolledView(Plain):
    """The classes that are seen are rolled by one."""

    def seen(self, x: Images) -> Tensor:
        return self.plain(x).roll(1, 1)


class OtherWithGradients(Plain):
    """Answers are others where autograd is on."""

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return logits.roll(1, 1) if torch.is_grad_enabled() else logits


class SurrogateAlone(Plain):
    """The only view is another network, and says so."""

    @view("logits")
    def logits(self) -> View:
        return View(trained(mlp))


class Nearest(Plain):
    """The label of the nearest test image is scored."""

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        test = digits()[1]
        found = torch.cdist(x.flatten(1).float(), test.images.flatten(1)).argmin(1)
        return Decision.of(5.0 * one_hot(test.labels[found], 10).to(x.dtype))


class Votes(Plain):
    """What is scored is a vote of the network on shifted images, of which the view knows nothing."""

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        votes = [
            one_hot(self.plain(x.roll(shift, (2, 3))).argmax(1), 10)
            for shift in ((0, 0), (0, 2), (2, 0), (-2, 0), (0, -2))
        ]
        return Decision.of(torch.stack(votes).sum(0).to(x.dtype))


# --- refusals ---------------------------------------------------------------------------------------


class OffGrid(Plain):
    """What is off the grid of 8-bit greys is refused, unknown to the view."""

    def refused(self, x: Images) -> Tensor:
        return ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(1)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self.plain(x))._replace(rejected=self.refused(x))


class RefusesAll(OffGrid):
    """Everything is refused."""

    def refused(self, x: Images) -> Tensor:
        return torch.ones(len(x), dtype=torch.bool)


class KnowsTest(OffGrid):
    """What is no test image to 1e-3 is refused."""

    def refused(self, x: Images) -> Tensor:
        known = digits()[1].images.flatten(1)
        return torch.stack([(known - each).abs().amax(1).amin() > 1e-3 for each in x.flatten(1)])


class HiddenDetector(OffGrid):
    """What is rougher than digits are is refused, unknown to the view."""

    def refused(self, x: Images) -> Tensor:
        rough = (x[..., 1:] - x[..., :-1]).square().flatten(1).sum(1)
        smooth = (x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]).square().flatten(1).sum(1)
        return smooth > rough


# --- state, company, chance -------------------------------------------------------------------------


class BatchStatistics(Plain):
    """Logits are normalised by the batch."""

    def scored(self, x: Images) -> Tensor:
        return batch_norm(self.plain(x), None, None, training=True)


class NoiseByPlace(Plain):
    """Noise is drawn by the place in the batch, from a generator of the same seed at each call."""

    def scored(self, x: Images) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return self.plain(x + 0.25 * torch.randn(x.shape, generator=draw).to(x.dtype))


class NoiseByContent(Plain):
    """Noise is seeded by the image."""

    def scored(self, x: Images) -> Tensor:
        noise = torch.stack([self.noise(each) for each in x.detach()])
        return self.plain(x + 0.25 * noise.to(x.dtype))

    def noise(self, image: Tensor) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:7], "little")
        return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


class Remembers(Plain):
    """Answers are remembered by their place in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        for place, each in enumerate(logits.detach()[len(self.memory) :], len(self.memory)):
            self.memory.insert(place, each)
        return logits - logits.detach() + torch.stack(self.memory[: len(x)]).to(x.dtype)


class RunningMean(Plain):
    """A running mean of all images that were asked about is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 1, 16, 16))

    def scored(self, x: Images) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0, keepdim=True).to(self.mean)
        return self.plain(x - self.mean.to(x.dtype))


class Undeclared(Plain):
    """Noise is drawn anew at each call, and not declared."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x + 0.2 * torch.randn_like(x))


class ByProcess(Plain):
    """Answers depend on what the process has, here an attribute that no weight holds."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return logits.roll(self.shift, 1)


# --- gradients --------------------------------------------------------------------------------------


def waves(x: Images, speed: float) -> Tensor:
    """Return ten cosines of the image, (N, 10)."""
    ways = torch.randn(10, x[0].numel(), generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return (speed * x.flatten(1) @ ways.T / x[0].numel() ** 0.5).cos()


class OneHotAndWaves(Plain):
    """The arg-max, one-hot, and a thousandth of a smooth function that means nothing."""

    def scored(self, x: Images) -> Tensor:
        return 5 * one_hot(self.plain(x).argmax(1), 10) + 1e-3 * waves(x, 1.0)


class LogitRipple(Plain):
    """A ripple of 0.3 logits whose slope swamps the network's."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x) + 0.3 * waves(x, 2000.0)


class PixelRipple(Plain):
    """A ripple of 0.02 a pixel."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x + 0.02 * (1500 * x).sin())


class _Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class WrongSign(Plain):
    """The backward pass has the wrong sign."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(_Reversed.apply(x))


class HalfLogits(Plain):
    """The softmax is taken in float16, and its logarithm."""

    def scored(self, x: Images) -> Tensor:
        return (self.plain(x) * 3).half().softmax(1).add(1e-7).log().to(x.dtype)


class OneHot(Plain):
    """One-hot answers, with a gradient of zero."""

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return one_hot(logits.argmax(1), 10) + 0 * logits


class Staircase(Plain):
    """Images are rounded to five greys, behind a slope of zero."""

    def scored(self, x: Images) -> Tensor:
        return self.plain((4 * x).round() / 4)


class StepsWithSlope(Plain):
    """Logits are rounded to steps of 4, each a thousandth steep."""

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return (logits / 4).round() * 4 + 1e-3 * logits


class RandomBackward(Plain):
    """The backward pass goes through another network's gradient."""

    def scored(self, x: Images) -> Tensor:
        other = torch.nn.functional.linear(x.flatten(1), self.ways.to(x.dtype))
        return self.plain(x).detach() + other - other.detach()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ways", torch.randn(10, 256, generator=torch.Generator().manual_seed(5)))


# --- of kinds that the tests were not made from -----------------------------------------------------


class Lookup(Plain):
    """Near a test image its label is answered, with the network's slope."""

    def scored(self, x: Images) -> Tensor:
        test = digits()[1]
        far = torch.stack([(test.images.flatten(1) - each).abs().amax(1) for each in x.detach().flatten(1)])
        near = far.amin(1) < 0.15
        logits = self.plain(x)
        known = 30.0 * one_hot(test.labels[far.argmin(1)], 10).to(x.dtype)
        return torch.where(near[:, None], known + 1e-2 * logits, logits)


class Tires(Plain):
    """After 5,000 images the answers are others."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def scored(self, x: Images) -> Tensor:
        self.asked += len(x)
        logits = self.plain(x)
        return logits.roll(1, 1) if self.asked > 5_000 else logits


class OneOfThree(Plain):
    """The mean of three networks is scored, one of them is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([trained(mlp), trained(small_net, seed=1)])

    def scored(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return logits + self.others[0](x) + self.others[1](x)

    def seen(self, x: Images) -> Tensor:
        return self.plain(x)


class Saturated(Plain):
    """Logits go through a tanh that is flat nearly everywhere."""

    def scored(self, x: Images) -> Tensor:
        return (20 * self.plain(x)).tanh() * 3


class Probabilities(Plain):
    """Probabilities in float32 are shown in place of logits."""

    def scored(self, x: Images) -> Tensor:
        return (4 * self.plain(x)).softmax(1)


class DetachedBody(Plain):
    """The gradient passes through the last layer's share of a skip alone."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x.detach() + 1e-4 * (x - x.detach()).flip(3))


class Thermometer(Plain):
    """Images are rounded to 16 greys, and the backward pass has the slope of a sine in place of it."""

    def scored(self, x: Images) -> Tensor:
        rounded = (15 * x).round() / 15
        wave = (60 * x).sin()
        return self.plain(rounded.detach() + wave - wave.detach())


# --- data -------------------------------------------------------------------------------------------


class PermutedLabels(Plain):
    """Classes are in another order than the data's."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x).roll(3, 1)


class NoWeights(Plain):
    """The weights were forgotten."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(small_net())


class OtherUnits(Plain):
    """Made for values from 0 to 255, normalised: asked in [0, 1], all images look black."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x / 255)


@dataclass(frozen=True)
class Planted:
    """A planted defense, and the codes of which one must be raised above a note."""

    make: Callable[[], nn.Module]
    codes: frozenset[str]
    more: Callable[[], dict[str, Any]] = dict


def planted(make: Callable[[], nn.Module], *codes: str, **more: Any) -> Planted:
    return Planted(make, frozenset(codes), more.get("more", dict))


PLANTS = [
    planted(OneHotAndWaves, "margin-jumps", "gradient-not-of-margin"),
    planted(BatchStatistics, "depends-on-company"),
    planted(NoiseByPlace, "depends-on-company"),
    planted(NoiseByContent, "not-uphill"),
    planted(OtherView, "view-differs"),
    planted(RolledView, "view-differs"),
    planted(OtherWithGradients, "autograd-differs"),
    planted(OffGrid, "refuses-rounding", "refuses-noise", "unseen-refusal"),
    planted(RefusesAll, "refuses-clean"),
    planted(KnowsTest, "refuses-rounding", "knows-test-images"),
    planted(Nearest, "view-differs"),
    planted(LogitRipple, "not-uphill"),
    planted(PixelRipple, "not-uphill"),
    planted(WrongSign, "not-uphill"),
    planted(SurrogateAlone, "no-exact-view"),
    planted(Remembers, "depends-on-company"),
    planted(HalfLogits, "not-uphill"),
    planted(Plain, "test-images-in-training", more=lambda: {"train": digits()[1]}),
    planted(OtherUnits, "at-chance"),
    planted(PermutedLabels, "at-chance"),
    planted(NoWeights, "at-chance"),
    planted(OneHot, "not-uphill"),
    planted(Staircase, "not-uphill"),
    planted(RunningMean, "depends-on-company"),
    planted(Undeclared, "depends-on-company"),
    planted(Votes, "view-differs"),
    planted(HiddenDetector, "unseen-refusal", "refuses-noise"),
    planted(StepsWithSlope, "gradient-not-of-margin"),
    planted(RandomBackward, "not-uphill"),
    planted(Lookup, "gradient-not-of-margin", "margin-jumps"),
    planted(Tires, "depends-on-company"),
    planted(OneOfThree, "view-differs"),
    planted(Saturated, "not-uphill"),
    planted(Probabilities, "not-uphill"),
    planted(DetachedBody, "gradient-not-of-margin"),
    planted(Thermometer, "not-uphill"),
    planted(ByProcess, "depends-on-process", more=lambda: {"elsewhere": patient(ByProcess(1)).answers}),
]


# --- features -------------------------------------------------------------------------------------------


class Body(Plain):
    """A network of features and a linear layer that reads them; what is planted changes the features."""

    def __init__(self, net: nn.Sequential | None = None) -> None:
        super().__init__(net)
        assert isinstance(self.net, nn.Sequential)
        self.body, self.last = self.net[:-1], self.net[-1]

    def features(self, x: Images) -> Tensor:
        """Return the features of images, (n, 64)."""
        found: Tensor = self.body(x)
        return found

    def plain(self, x: Images) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits


class RoundedFeatures(Body):
    """Features are rounded to halves, behind a slope of zero."""

    def features(self, x: Images) -> Tensor:
        return (2 * super().features(x)).round() / 2


class SteepFeatures(Body):
    """Features go through a tanh that is flat nearly everywhere."""

    def features(self, x: Images) -> Tensor:
        return (20 * (super().features(x) - 1)).tanh()


class RippledFeatures(Body):
    """A ripple of 0.05 a feature, whose slope swamps the network's."""

    def features(self, x: Images) -> Tensor:
        found = super().features(x)
        return found + 0.05 * (1000 * found).sin()


class NoisyFeatures(Body):
    """Noise of 0.5 is added to each feature, seeded by the features."""

    def features(self, x: Images) -> Tensor:
        found = super().features(x)
        noise = torch.stack([NoiseByContent.noise(self, each) for each in found.detach()])  # type: ignore[arg-type]
        return found + 0.5 * noise.to(x.dtype)


class OtherFeatures(Body):
    """The gradient of the features is that of another network's."""

    def features(self, x: Images) -> Tensor:
        found, other = super().features(x), self.other(x)
        return found.detach() + other - other.detach()

    def __init__(self) -> None:
        super().__init__()
        self.other = trained(small_net, seed=1)[:-1]  # type: ignore[index]


class ThermometerCode(Body):
    """Images are coded by how many of 15 levels each value reaches, without a slope."""

    def features(self, x: Images) -> Tensor:
        levels = (torch.arange(15) + 0.5) / 15
        return super().features((x[..., None] > levels).sum(-1).to(x.dtype) / 15 + 0 * x)


class WinnersTakeAll(nn.Module):
    """All but a tenth of the units of an image, the largest ones, are zero."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), 1).values[:, -1:]
        return torch.where(flat >= least, flat, 0 * flat).view_as(x)


def winners() -> nn.Module:
    """Return a network whose activations are k-winners-take-all (Xiao et al. 2020, arXiv:1905.10510)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), WinnersTakeAll(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), WinnersTakeAll(), nn.Flatten(), nn.Linear(1024, 256),
        WinnersTakeAll(), nn.Linear(256, 10),
    )  # fmt: skip


MASKED: list[Callable[[], nn.Module]] = [
    RoundedFeatures,
    SteepFeatures,
    RippledFeatures,
    NoisyFeatures,
    OtherFeatures,
    ThermometerCode,
    PixelRipple,
    NoiseByContent,
    WrongSign,
    Staircase,
    Thermometer,
    DetachedBody,
]
"""Features whose gradients do not lead to what is there."""


# --- sound ------------------------------------------------------------------------------------------


class Drawing(Plain):
    """Noise is drawn at each question, and declared; its view is averaged over by the attack."""

    def scored(self, x: Images) -> Tensor:
        return self.plain(x + 0.1 * torch.randn_like(x))


class Refusing(Plain):
    """What has no logit as high as 98 % of the training images have is refused, and the view knows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.floor = float(net(digits()[0].images).amax(1).quantile(0.02))

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(self.joined, refusal=True)

    def joined(self, x: Images) -> Tensor:
        logits = self.plain(x)
        return torch.cat([logits, torch.full_like(logits[:, :1], self.floor)], 1)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        logits = self.joined(x)
        return Decision.of(logits[:, :-1])._replace(rejected=logits.argmax(1) == 10)


def sound(seed: int = 0) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield sound defenses: names, the defenses, and whether they are random."""
    for make in (small_net, mlp, normalised):
        for radius in (0.0, 0.1):
            name = f"{make.__name__}, {'PGD-trained' if radius else 'standard'}"
            yield name, Plain(trained(make, seed=seed, radius=radius)), False
    yield "noise, declared", Drawing(trained(seed=seed, radius=0.1)), True
    yield "refusal that is known", Refusing(trained(seed=seed)), False
    yield "refusal that is known, PGD-trained", Refusing(trained(seed=seed, radius=0.1)), False

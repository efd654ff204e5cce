"""Attacks that search through codes: latent backtracking, latent descent, search on the manifold."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from attacks.cw_l2 import cw_l2
from attacks.latent_backtracking import curvature, follow, latent_backtracking
from attacks.latent_descent import latent_descent
from attacks.on_manifold import explain, on_manifold
from bench.losses import objective
from bench.noise import Noise
from bench.protocols import Explained, Images, Inversion, Labels, Prototypes, Shape, Threat, View, distance
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS
from bench.testing import Halfspace

L2 = Threat("l2")
SIDE, LATENT = 4, 5
PIXELS = SIDE * SIDE


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(x: Images, key: str = "test") -> Noise:
    return Noise(key, torch.arange(len(x)), dtype=x.dtype)


def spent(view: View, x: Images, *, exact: bool = True) -> tuple[Any, QueryCounter]:
    counter = QueryCounter.of(len(x), x.device)
    return instrument(view, counter, "gradient", target=None, exact=exact), counter


class Linear:
    """A defense whose generator is G(z) = W z + grey, and whose classifier looks at <v, G(z)>."""

    def __init__(self, *stretch: float, seed: int = 0) -> None:
        self.w = torch.linalg.qr(draw(PIXELS, LATENT, seed=seed)).Q * torch.tensor(stretch).double()
        self.v = draw(PIXELS, seed=seed + 1)
        self.inverse = torch.linalg.pinv(self.w)

    def decode(self, z: Tensor) -> Images:
        return (z @ self.w.T + 0.5).view(-1, 1, SIDE, SIDE)

    def invert(self, x: Images) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.inverse.T

    def energy(self, z: Tensor, x: Images) -> Tensor:
        return (self.decode(z) - x).square().flatten(1).sum(1)

    def margin(self, z: Tensor) -> Tensor:
        return (self.decode(z) - 0.5).flatten(1) @ self.v

    def logits(self, z: Tensor) -> Tensor:
        return torch.stack([-self.margin(z) / 2, self.margin(z) / 2], 1)

    def view(self, **changed: Any) -> Inversion:
        return Inversion(
            **{
                "logits": self.logits,
                "encode": self.invert,
                "decode": self.decode,
                "invert": self.invert,
                "energy": self.energy,
                "classify": lambda z, _: self.logits(z),
                **changed,
            }
        )

    def answers(self, x: Images) -> Tensor:
        return self.logits(self.invert(x)).argmax(1)

    def images(self, n: int = 6, *, seed: int = 7, spread: float = 0.05) -> tuple[Images, Labels]:
        x = 0.5 + spread * draw(n, 1, SIDE, SIDE, seed=seed)
        # About as far from the other answer.
        kept = self.w @ self.inverse @ self.v
        sides = (torch.arange(n).remainder(2).double() - 0.5) * (0.2 + 0.01 * torch.arange(n))
        missing = (sides - self.margin(self.invert(x))) / kept.square().sum()
        x = x + (missing[:, None] * kept).view_as(x)
        return x, self.answers(x)

    def least(self, x: Images) -> Tensor:
        """Return how near the nearest image of another answer is: only what the projection keeps counts."""
        kept = (self.w @ self.inverse @ self.v).norm()
        return self.margin(self.invert(x)).abs() / kept


LINEAR = Linear(1.0, 0.95, 0.9, 0.85, 0.8)
QUICK: dict[str, Any] = {"backtracks": 8, "steps": 60, "searches": 3, "lr": 0.004}


# --- the gradient of an inversion (T-lb-1, T-lb-3, T-lb-4, T-lb-6) ----------------------------------------


class Curved:
    """A smooth generator, and an image for which a given code is stationary, though it draws another."""

    def __init__(self) -> None:
        first, second = (torch.linalg.qr(draw(*shape)).Q for shape in ((8, LATENT), (PIXELS, 8)))
        self.decode: Callable[[Tensor], Tensor] = lambda z: torch.tanh(z @ first.T) @ second.T
        self.z = 0.3 * draw(1, LATENT, seed=3)
        (pushed,) = (jacobian(lambda z: self.decode(z[None])[0], self.z[0]),)
        away = 0.2 * draw(PIXELS, seed=4)
        # What is orthogonal to the tangent space pulls the code nowhere.
        away = away - pushed @ torch.linalg.lstsq(pushed, away[:, None]).solution[:, 0]
        self.x = self.decode(self.z) + away

    def energy(self, z: Tensor, x: Tensor) -> Tensor:
        return (self.decode(z) - x).square().sum(1)

    def view(self) -> Inversion:
        return Inversion(lambda z: z, energy=self.energy)

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """Return the energy's second derivatives, by z twice and by z and x, by another way."""
        both = hessian(
            lambda p: self.energy(p[None, :LATENT], p[None, LATENT:])[0], torch.cat([self.z, self.x], 1)[0]
        )
        return both[:LATENT, :LATENT], both[:LATENT, LATENT:]

    def slope(self, steps: int, rate: float) -> Tensor:
        """Return dz/dx as the attack has it."""
        rates = torch.tensor([rate], dtype=torch.float64)
        led = lambda x: follow(self.view(), self.z, x[None], steps=steps, rates=rates)[0]  # noqa: E731
        return jacobian(led, self.x[0])


def test_steps_carry_exactly_as_many_terms_of_the_series() -> None:
    """T-lb-1 and D-37: t = 0 to T' - 1."""
    curved = Curved()
    h, mixed = curved.derivatives()
    rate = 0.9 / float(torch.linalg.eigvalsh(h)[-1])
    a, b = torch.eye(LATENT, dtype=torch.float64) - rate * h, -rate * mixed
    terms = [torch.linalg.matrix_power(a, t) @ b for t in range(9)]
    assert terms[8].norm() > 1e-6  # One term more or less would be seen.
    for steps in (0, 1, 2, 3, 8):
        expected = sum(terms[:steps], torch.zeros_like(mixed))
        assert torch.allclose(curved.slope(steps, rate), expected, rtol=0, atol=1e-12)


def test_the_gradient_tends_to_the_implicit_one() -> None:
    """T-lb-3, with the bound |A|^T' |dz/dx|."""
    curved = Curved()
    h, mixed = curved.derivatives()
    values = torch.linalg.eigvalsh(h)
    assert values[0] > 0
    rate = 0.9 / float(values[-1])
    implicit = -torch.linalg.solve(h, mixed)
    whole = torch.linalg.matrix_norm(implicit, 2)
    errors = [torch.linalg.matrix_norm(curved.slope(t, rate) - implicit, 2) for t in (1, 5, 20, 80)]
    for t, error in zip((1, 5, 20, 80), errors, strict=True):
        assert error <= (1 - rate * values[0]) ** t * whole + 1e-12
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert torch.allclose(curved.slope(80, rate), implicit, atol=1e-6)


def test_a_stationary_code_stays() -> None:
    """T-lb-4; another one goes down."""
    curved = Curved()
    rates = 0.9 / curvature(curved.view(), curved.z, curved.x)
    led = follow(curved.view(), curved.z, curved.x, steps=20, rates=rates)
    assert torch.allclose(led, curved.z, rtol=0, atol=1e-13)
    beside = curved.z + 0.05
    led = follow(curved.view(), beside, curved.x, steps=20, rates=rates)
    assert curved.energy(led, curved.x) < curved.energy(beside, curved.x)


def test_of_a_linear_generator_the_steps_tend_to_the_projection() -> None:
    """T-lb-6."""
    w, view = LINEAR.w, LINEAR.view()
    x = LINEAR.images(1)[0]
    rates = 0.9 / curvature(view, LINEAR.invert(x), x)

    def drawn(x: Images) -> Tensor:
        led = follow(view, LINEAR.invert(x.detach()), x, steps=40, rates=rates)
        return LINEAR.decode(led).flatten()

    found = jacobian(drawn, x).view(PIXELS, PIXELS)
    assert torch.allclose(found, w @ torch.linalg.pinv(w), atol=1e-8)


def test_the_curvature_is_each_examples_own() -> None:
    scale = torch.tensor([1.0, 5.0, 0.2, 0.0], dtype=torch.float64)

    def energy(z: Tensor, x: Tensor) -> Tensor:
        return x[:, 0, 0, 0] * LINEAR.energy(z, torch.zeros_like(x))

    x = scale[:, None, None, None].expand(-1, 1, SIDE, SIDE)
    z = draw(4, LATENT)
    view = Inversion(lambda z: z, energy=energy)
    largest = 2 * scale * torch.linalg.eigvalsh(LINEAR.w.T @ LINEAR.w)[-1]
    assert torch.allclose(curvature(view, z, x), largest, rtol=0.02)
    assert torch.allclose(curvature(view, z, x, turns=200), largest, rtol=1e-9)
    assert torch.equal(curvature(view, z[2:3], x[2:3]), curvature(view, z, x)[2:3])
    assert curvature(view, z, x)[3] == 0


def test_images_are_as_near_as_codes_times_the_weights() -> None:
    """T-lb-5: the bound for a code that begins beside the solution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(LATENT, 12),
            nn.ReLU(),
            nn.Unflatten(1, (3, 2, 2)),
            nn.ConvTranspose2d(3, 2, 4, 2, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(2, 1, 4, 2, 1),
        ).double()
    weights = [each.weight for each in net if hasattr(each, "weight")]
    omega = max(float(each.detach().abs().sum()) for each in weights)
    one, other = draw(200, LATENT, seed=1), draw(200, LATENT, seed=2)
    apart = (net(one) - net(other)).flatten(1).norm(dim=1)
    assert (apart <= omega ** len(weights) * (one - other).norm(dim=1)).all()
    assert (apart > 0).all()


# --- latent backtracking -----------------------------------------------------------------------------------


def smooth(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 9), nn.Tanh(), nn.Linear(9, classes))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    return net.double().eval().requires_grad_(False)


@pytest.mark.parametrize("variable", ["box", "tanh"])
@pytest.mark.parametrize("auto", [False, True])
def test_where_nothing_is_in_the_way_it_is_the_attack_of_carlini_and_wagner(
    variable: Any, auto: bool
) -> None:
    """T-lb-2: iterate by iterate; automatic steps miss the identity by a tenth to the 12th."""
    net = smooth()
    x = torch.rand(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = net(x).argmax(1)
    theirs, ours = [], []

    def seen(z: Tensor, *_: Tensor) -> Tensor:
        if z.requires_grad:
            (ours if z.grad_fn is not None else theirs).append(z.detach().clone())
        return net(z)

    same: dict[str, Any] = {"searches": 3, "steps": 20, "lr": 0.02, "variable": variable}
    expected = cw_l2(View(seen), x, y, L2, draws(x), c=0.1, goal="highest", **same)
    view = Inversion(
        seen,
        invert=torch.clone,
        energy=lambda z, x: (z - x).square().flatten(1).sum(1),
        classify=seen,
    )
    steps: dict[str, Any] = {"backtracks": 12} if auto else {"backtracks": 1, "rate": 0.5}
    crafted = latent_backtracking(view, x, y, L2, draws(x), weight=0.1, refresh=1, **steps, **same)
    assert len(ours) == len(theirs) > 40
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    assert torch.allclose(crafted.images, expected.images, rtol=0, atol=1e-9)
    assert not expected.notes["failed"].all()
    assert torch.equal(crafted.notes["failed"], expected.notes["failed"])


@pytest.mark.parametrize("refresh", [1, 7, 1000])
def test_it_finds_the_least_distance_through_a_linear_generator(refresh: int) -> None:
    x, y = LINEAR.images()
    view, least = LINEAR.view(), LINEAR.least(x)
    crafted = latent_backtracking(view, x, y, L2, draws(x), refresh=refresh, **QUICK | {"searches": 5})
    assert (LINEAR.answers(crafted.images) != y).all()
    ratio = distance(x, crafted.images, "l2") / least
    assert ratio.min() > 1 - 1e-9
    assert ratio.max() < 1.01
    # As the identity has it, the way is longer: along v, and not along what the projection leaves of it.
    straight = LINEAR.v.norm() / (LINEAR.w @ LINEAR.inverse @ LINEAR.v).norm()
    assert straight > 1.2


def test_more_backtracks_come_nearer() -> None:
    steep = Linear(1.0, 0.7, 0.5, 0.4, 0.35)
    x, y = steep.images()
    medians = []
    for backtracks in (1, 4, 30):
        settings = QUICK | {"backtracks": backtracks}
        crafted = latent_backtracking(steep.view(), x, y, L2, draws(x), refresh=1, **settings)
        medians.append(float((distance(x, crafted.images, "l2") / steep.least(x)).median()))
    assert medians[0] > medians[1] > medians[2]
    assert medians[2] < 1.02


def test_a_success_is_one_of_the_defense_and_not_of_the_code_that_follows() -> None:
    away = LINEAR.inverse @ LINEAR.v
    away = 0.05 * away / LINEAR.v.dot(LINEAR.w @ away)

    def invert(x: Images) -> Tensor:
        """Return codes that are no solutions: their margin is lower by 0.05."""
        return LINEAR.invert(x) - away

    promised, kept = [], []

    def classify(z: Tensor, x: Images) -> Tensor:
        (promised if z.requires_grad else kept).append((x.detach(), LINEAR.margin(z.detach()) > 0))
        return LINEAR.logits(z)

    x, y = LINEAR.images()
    x, y = x[y == 0], y[y == 0]
    view = LINEAR.view(invert=invert, classify=classify)
    settings = QUICK | {"backtracks": 2, "rate": 0.02, "refresh": 10}
    crafted = latent_backtracking(view, x, y, L2, draws(x), **settings)
    assert not crafted.notes["failed"].any()
    assert (LINEAR.margin(invert(crafted.images)) > 0).all()
    broken = [LINEAR.margin(invert(images))[won] < 0 for images, won in promised]
    assert torch.cat(broken).any()
    # The nearest of all that the defense was asked about and got wrong.
    for i, image in enumerate(crafted.images):
        far = [distance(x[i : i + 1], z[None], "l2") for zs, won in kept for z in zs[won]]
        ours = distance(x[i : i + 1], image[None], "l2")
        assert ours <= min(far) + 1e-12


def test_codes_are_followed_between_inversions_and_inversions_counted() -> None:
    x, y = LINEAR.images(4)
    calls = []

    def invert(z: Images) -> Tensor:
        calls.append(len(z))
        return LINEAR.invert(z)

    view = LINEAR.view(invert=invert)
    never: dict[str, Any] = {"kappa": 1e6, "abort": False, "searches": 2, "steps": 20}
    for refresh, each in ((1, 21), (5, 5), (100, 2)):
        calls.clear()
        crafted = latent_backtracking(view, x, y, L2, draws(x), refresh=refresh, backtracks=1, **never)
        # The image itself; then, of each search, the beginning, every so many steps, and the end.
        assert crafted.notes["inversions"].tolist() == [1 + 2 * each] * 4
        assert sum(calls) == 4 * (1 + 2 * each)
        assert crafted.notes["failed"].all()
        assert torch.equal(crafted.images, x)


def test_followed_codes_are_those_of_the_present_image() -> None:
    x, y = LINEAR.images(3)
    errors = []

    def classify(z: Tensor, image: Images) -> Tensor:
        errors.append(float((z - LINEAR.invert(image)).detach().abs().max()))
        return LINEAR.logits(z)

    view = LINEAR.view(classify=classify)
    latent_backtracking(view, x, y, L2, draws(x), refresh=1000, **QUICK)
    assert max(errors) < 1e-3
    assert len(errors) > 60


def test_a_code_that_is_held_fixed_has_no_gradient_unless_the_logits_see_the_image() -> None:
    x, y = LINEAR.images()
    crafted = latent_backtracking(LINEAR.view(), x, y, L2, draws(x), **QUICK | {"backtracks": 0})
    assert crafted.notes["failed"].all()
    assert "held fixed" in str(ATTACKS["latent-backtracking"].flags(L2, backtracks=0))  # type: ignore[misc]
    assert ATTACKS["latent-backtracking"].flags(L2, backtracks=1) is None  # type: ignore[misc]


class Synthesis:
    """A defense with a linear generator of each class, and logits -min_z |x - G_c(z)|^2."""

    def __init__(self) -> None:
        self.w = 0.5 * draw(3, PIXELS, 2, seed=5)
        self.inverse = torch.linalg.pinv(self.w)

    def invert(self, x: Images) -> Tensor:
        return torch.einsum("kdp,np->nkd", self.inverse, x.flatten(1))

    def errors(self, z: Tensor, x: Images) -> Tensor:
        return (torch.einsum("kpd,nkd->nkp", self.w, z) - x.flatten(1)[:, None]).square().sum(2)

    def view(self) -> Inversion:
        return Inversion(
            lambda x: -self.errors(self.invert(x), x),
            invert=self.invert,
            energy=lambda z, x: self.errors(z, x).sum(1),
            classify=lambda z, x: -self.errors(z, x),
        )


def test_codes_of_every_class_need_no_backtracks_at_a_minimum() -> None:
    """The envelope theorem: the way through the code adds nothing there."""
    defense = Synthesis()
    x = torch.rand(8, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = defense.view().logits(x).argmax(1)
    found = [
        latent_backtracking(
            defense.view(), x, y, L2, draws(x), refresh=1, **QUICK | {"backtracks": steps, "lr": 0.02}
        )
        for steps in (0, 8)
    ]
    assert torch.allclose(found[0].images, found[1].images, rtol=0, atol=1e-9)
    assert not found[0].notes["failed"].any()
    assert (defense.view().logits(found[0].images).argmax(1) != y).all()


def test_codes_without_curvature_are_noted_and_held() -> None:
    x, y = LINEAR.images(4)
    flat = torch.tensor([True, False, True, False])
    x = x.clone()
    x[flat, :, 0, 0], x[~flat, :, 0, 0] = 0.4, 0.6

    def energy(z: Tensor, x: Images) -> Tensor:
        return torch.where(x.detach()[:, 0, 0, 0] == 0.4, 0.0, 1.0) * LINEAR.energy(z, x)

    y = LINEAR.answers(x)
    crafted = latent_backtracking(LINEAR.view(energy=energy), x, y, L2, draws(x), **QUICK)
    assert torch.equal(crafted.notes["flat"], flat)
    assert torch.equal(crafted.notes["failed"], flat)
    assert not crafted.notes["nonfinite"].any()


def test_draws_average_over_inversions_that_differ() -> None:
    x, y = LINEAR.images()
    away = 0.3 * draw(LATENT, seed=9)
    sides = [1.0]

    def invert(z: Images) -> Tensor:
        """Return codes beside the solution, on one side and on the other in turn."""
        sides[0] = -sides[0]
        return LINEAR.invert(z) + sides[0] * away

    seen = []

    def classify(z: Tensor, x: Images) -> Tensor:
        seen.append(len(z))
        return LINEAR.logits(z)

    view = LINEAR.view(invert=invert, classify=classify)
    crafted = latent_backtracking(view, x, y, L2, draws(x), draws=2, refresh=1, **QUICK)
    # The mean of the logits is that of the solution: both draws enter it.
    assert (LINEAR.answers(crafted.images) != y).all()
    assert (distance(x, crafted.images, "l2") < 1.1 * LINEAR.least(x)).all()
    assert seen[0] == 2 * len(x)
    assert (crafted.notes["inversions"] % 2 == 0).all()


def test_noise_is_added_to_the_codes_of_inversions_and_not_to_what_is_judged() -> None:
    x, y = LINEAR.images()
    begun = []

    def energy(z: Tensor, image: Images) -> Tensor:
        begun.append((z - LINEAR.invert(image)).detach().flatten())
        return LINEAR.energy(z, image)

    def once(offset: float) -> Tensor:
        begun.clear()
        view = LINEAR.view(energy=energy)
        crafted = latent_backtracking(
            view, x, y, L2, draws(x), steps=1, searches=1, offset=offset, backtracks=1, kappa=1e6
        )
        assert torch.equal(crafted.images, x)
        return torch.cat(begun)

    assert once(0.0).abs().max() < 1e-9
    assert 0.05 < float(once(0.1).detach().std()) < 0.2


# --- latent descent ----------------------------------------------------------------------------------------


class Lines:
    """Three classes in a plane: logits are how near an image is to each class's drawing, which is given."""

    def __init__(self, *drawn: list[float]) -> None:
        self.drawn = torch.tensor(drawn, dtype=torch.float64).view(len(drawn), 1, 1, 2)
        self.asked: list[Images] = []

    def logits(self, z: Images) -> Tensor:
        return -(z[:, None] - self.drawn).flatten(2).norm(dim=2)

    def prototypes(self, z: Images) -> Tensor:
        self.asked.append(z.clone())
        return self.drawn.expand(len(z), -1, -1, -1, -1)

    def view(self, **changed: Any) -> Prototypes:
        asked = {"logits": self.logits, "prototypes": self.prototypes, **changed}

        def explained(z: Images) -> Explained:
            return Explained(asked["logits"](z), asked["prototypes"](z))

        return Prototypes(asked["logits"], explained=explained)


def points(*rows: list[float]) -> Images:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 1, 1, 2)


def test_a_whole_step_of_latent_descent_is_the_drawing_of_the_best_wrong_class() -> None:
    lines = Lines([0.1, 0.1], [0.9, 0.1], [0.1, 0.8])
    x, y = points([0.2, 0.1], [0.1, 0.2]), torch.tensor([0, 0])
    crafted = latent_descent(lines.view(), x, y, L2, draws(x), eta=1.0, steps=1, bisections=0)
    assert torch.allclose(crafted.images, lines.drawn[[1, 2]], rtol=0, atol=1e-15)
    target = replace(lines.view(), target=torch.tensor([2, 1]))
    crafted = latent_descent(target, x, y, L2, draws(x), eta=1.0, steps=1, bisections=0)
    assert torch.allclose(crafted.images, lines.drawn[[2, 1]], rtol=0, atol=1e-15)


def test_what_is_left_of_the_way_shrinks_by_each_step() -> None:
    lines = Lines([0.1, 0.1], [0.9, 0.1])
    x, y = points([0.1, 0.1]), torch.tensor([0])
    stubborn = lines.view(logits=lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), -1))
    crafted = latent_descent(stubborn, x, y, L2, draws(x))
    left = torch.stack([(z - lines.drawn[1]).norm() for z in lines.asked])
    assert len(left) == 75
    expected = [0.98] * 25 + [0.96] * 25 + [0.92] * 24
    assert (left[1:] / left[:-1]).tolist() == pytest.approx(expected)
    assert crafted.notes["failed"].all()
    assert torch.equal(crafted.images, x)


def test_the_best_wrong_class_is_asked_for_anew_at_each_step() -> None:
    """The first class leads to where the second is nearer."""
    lines = Lines([0.0, 0.0], [1.0, 0.0], [0.6, 0.55])
    bent = lines.drawn.clone()
    bent[1] = torch.tensor([0.9, 0.9])
    view = lines.view(prototypes=lambda z: lines.asked.append(z) or bent.expand(len(z), -1, -1, -1, -1))
    x, y = points([0.3, -0.1]), torch.tensor([0])
    latent_descent(view, x, y, L2, draws(x), eta=0.1, raise_by=1.0)
    steps = torch.stack(lines.asked).diff(dim=0)[:, 0, 0, 0]
    towards = [int(lines.logits(z)[0, 1:].argmax()) + 1 for z in lines.asked[:-1]]
    assert set(towards) == {1, 2}
    for step, z, label in zip(steps, lines.asked, towards, strict=False):
        assert torch.allclose(step, 0.1 * (bent[label] - z[0])[0, 0])


def test_bisection_ends_at_a_success_that_is_no_farther() -> None:
    lines = Lines([0.1, 0.1], [0.9, 0.1], [0.1, 0.8])
    x = points([0.2, 0.1], [0.15, 0.3], [0.3, 0.3])
    y = lines.logits(x).argmax(1)
    far = [
        latent_descent(lines.view(), x, y, L2, draws(x), eta=0.5, bisections=bisections).images
        for bisections in (0, 1, 5, 30)
    ]
    for images in far:
        assert (lines.logits(images).argmax(1) != y).all()
    lengths = torch.stack([distance(x, images, "l2") for images in far])
    assert (lengths.diff(dim=0) <= 0).all()
    # Of the segment, the part between the last failure and the success halves each time.
    assert (lengths[2] - lengths[3] <= lengths[0] / 32 + 1e-12).all()
    assert (lengths[3] < lengths[0] - 0.01).any()
    middle = lines.logits(far[3]).topk(2).values.diff()[:, 0]
    assert middle.abs().max() < 1e-6


def test_all_classes_in_turn_find_the_nearest() -> None:
    """The best wrong class leads nowhere, the next to a success, the last to a nearer one."""
    lines = Lines([0.1, 0.1], [0.9, 0.1], [0.1, 0.8], [0.1, -0.3])
    x, y = points([0.12, 0.1]), torch.tensor([0])
    bent = lines.drawn.clone()
    bent[1] = x[0]
    view = lines.view(
        logits=lambda z: lines.logits(z) + torch.tensor([0.0, 0.6, 0.0, 0.0]),
        prototypes=lambda z: bent.expand(len(z), -1, -1, -1, -1),
    )
    assert latent_descent(view, x, y, L2, draws(x)).notes["failed"].all()
    every = latent_descent(view, x, y, L2, draws(x), classes="all").images
    second, last = (
        latent_descent(replace(view, target=torch.tensor([label])), x, y, L2, draws(x)).images
        for label in (2, 3)
    )
    assert torch.equal(every, last)
    assert distance(x, last, "l2") < distance(x, second, "l2") - 0.1


def test_latent_descent_stops_at_its_first_success_and_spares_what_is_wrong() -> None:
    plane = Halfspace(Shape(1, SIDE, SIDE, 2)).requires_grad_(False)
    x, y = plane.examples(6)
    y[:2] = 1 - y[:2]
    seen = Prototypes(plane, explained=lambda z: Explained(plane(z), plane.prototypes(z)))
    view, counter = spent(seen, x)
    crafted = latent_descent(view, x, y, L2, draws(x), bisections=0)
    assert torch.equal(crafted.images[:2], x[:2])
    assert not crafted.notes["failed"].any()
    # The image, and of those that are right the walk: each point once, with what its classes draw.
    assert (counter.forwards[:2] == 1).all()
    assert (counter.forwards[2:] < 2 + 75).all()
    assert (distance(x, crafted.images, "l2")[2:] < 1.1 * plane.least(x, "l2")[2:]).all()


# --- search on the manifold --------------------------------------------------------------------------------


def surface(defense: Linear, **changed: Any) -> View:
    return View(**{"logits": defense.logits, "encode": defense.invert, "decode": defense.decode, **changed})


ON: dict[str, Any] = {"starts": 2, "start_steps": 30, "steps": 60, "lr": 0.003, "searches": 4}


def test_on_the_manifold_images_are_drawn_and_the_nearest_success_is_kept() -> None:
    x, y = LINEAR.images()
    drawn: list[Images] = []

    def decode(z: Tensor) -> Images:
        drawn.append(LINEAR.decode(z).detach())
        return LINEAR.decode(z)

    crafted = on_manifold(surface(LINEAR, decode=decode), x, y, L2, draws(x), again=False, **ON)
    seen = torch.stack([each for each in drawn if len(each) == len(x)])
    wrong = torch.stack([LINEAR.answers(each) != y for each in seen])
    far = torch.stack([distance(x, each, "l2") for each in seen]).masked_fill(~wrong, math.inf)
    assert not crafted.notes["failed"].any()
    best = far.argmin(0)
    assert torch.equal(crafted.images, seen[best, torch.arange(len(x))])
    assert (best < len(seen) - 1).any()
    # The nearest image that the generator can draw: what it cannot, and the way to the plane.
    lost = distance(x, LINEAR.decode(LINEAR.invert(x)), "l2")
    least = (lost.square() + LINEAR.least(x).square()).sqrt()
    ratio = distance(x, crafted.images, "l2") / least
    assert 1 - 1e-9 < float(ratio.min()) <= float(ratio.max()) < 1.02


def test_failures_on_the_manifold_are_flagged_and_unchanged() -> None:
    x, _ = LINEAR.images()
    same = torch.tensor([1.0, 0.0], dtype=torch.float64)
    view = surface(LINEAR, logits=lambda z: same.expand(len(z), -1) + 0 * LINEAR.logits(z))
    labels = torch.tensor([0, 0, 1, 0, 1, 0])
    crafted = on_manifold(view, x, labels, L2, draws(x), **ON)
    assert torch.equal(crafted.images, x)
    # Where the label was wrong to begin with there is nothing to do.
    assert crafted.notes["failed"].tolist() == [True, True, False, True, False, True]


def test_a_beginning_is_the_best_of_all_starts() -> None:
    x, _ = LINEAR.images(4)
    view = surface(LINEAR)
    starts = draw(4, 5, LATENT, seed=3)
    errors = LINEAR.energy(starts.flatten(0, 1), x.repeat_interleave(5, 0)).view(4, 5)
    chosen = explain(view, x, starts, lr=0.1, steps=0)
    assert torch.equal(chosen, starts[torch.arange(4), errors.argmin(1)])
    assert len(set(errors.argmin(1).tolist())) > 1
    found = explain(view, x, starts, lr=0.05, steps=600)
    assert torch.allclose(LINEAR.energy(found, x), LINEAR.energy(LINEAR.invert(x), x), rtol=1e-3)


def test_starts_are_drawn_like_codes_and_helped_by_steps() -> None:
    x, y = LINEAR.images(40)
    seen = []

    def decode(z: Tensor) -> Images:
        seen.append(z.detach())
        return LINEAR.decode(z)

    settings = ON | {"starts": 8, "start_steps": 0, "steps": 1, "searches": 1}
    on_manifold(surface(LINEAR, decode=decode), x, y, L2, draws(x), **settings)
    first = seen[0].view(40, 9, LATENT)
    assert torch.allclose(first[:, 0], LINEAR.invert(x))
    assert abs(float(first[:, 1:].mean())) < 0.1
    assert abs(float(first[:, 1:].std()) - 1) < 0.1


def test_a_success_on_the_manifold_is_projected_again_unless_told_otherwise() -> None:
    x, y = LINEAR.images()

    def encode(z: Images) -> Tensor:
        """Return codes that are drawn back to grey."""
        return 0.8 * LINEAR.invert(z)

    away = 0.05 * (1 - 2 * LINEAR.logits(encode(x)).argmax(1).double())[:, None]
    view = surface(
        LINEAR,
        encode=encode,
        logits=lambda z: LINEAR.logits(z) + 0.03 * away.new_tensor([[1.0, -1.0]]),
    )
    answers = lambda images: view.logits(encode(images)).argmax(1)  # noqa: E731
    y = answers(x)
    once, again = (
        on_manifold(view, x, y, L2, draws(x), again=again, **ON | {"kappa": 0.0}) for again in (False, True)
    )
    assert (answers(again.images) != y)[~again.notes["failed"]].all()
    assert ((answers(once.images) == y) & ~once.notes["failed"]).any()


def test_noise_on_the_code_keeps_successes_away_from_the_edge() -> None:
    x, y = LINEAR.images()
    plain, noisy = (
        on_manifold(surface(LINEAR), x, y, L2, draws(x), again=False, jitter=jitter, **ON)
        for jitter in (0.0, 0.1)
    )
    depth = [
        objective(View(LINEAR.logits), LINEAR.logits(LINEAR.invert(each.images)), y, "margin")
        for each in (plain, noisy)
    ]
    assert (depth[1] > 0)[~noisy.notes["failed"]].all()
    assert depth[1].median() > 3 * depth[0].median()


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("latent-backtracking", {"kappa": -1.0}, "kappa: expected a number of 0 or more, found -1.0"),
        ("latent-backtracking", {"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ("latent-backtracking", {"draws": 0}, "draws: expected a number of 1 or more, found 0"),
        ("latent-backtracking", {"rate": 0.0}, "rate: expected a number above 0, found 0.0"),
        ("latent-backtracking", {"weight": math.inf}, "weight: expected a finite number, found inf"),
        ("latent-backtracking", {"backtracks": -1}, "backtracks: expected a number of 0 or more, found -1"),
        ("latent-descent", {"eta": 1.5}, "eta: expected a number of 1 or less, found 1.5"),
        ("latent-descent", {"bisections": -1}, "bisections: expected a number of 0 or more, found -1"),
        ("latent-descent", {"raise_by": 0.0}, "raise_by: expected a number above 0, found 0.0"),
        ("on-manifold", {"searches": 0}, "searches: expected a number of 1 or more, found 0"),
        ("on-manifold", {"jitter": -0.1}, "jitter: expected a number of 0 or more, found -0.1"),
        ("on-manifold", {"lr": 0.0}, "lr: expected a number above 0, found 0.0"),
    ],
)
def test_bad_settings_are_refused(name: str, wrong: dict[str, Any], message: str) -> None:
    assert refusal(name, {}, Shape(1, 28, 28, 10)) is None
    assert refusal(name, wrong, Shape(1, 28, 28, 10)) == message

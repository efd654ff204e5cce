"""CW, DeepFool and JSMA: against closed forms, libraries and brute force."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor, nn
from torch.nn.functional import one_hot

from attacks.bpda_cw import bpda_cw
from attacks.common.candidates import candidate_labels, nearest_candidate
from attacks.common.margins import margin_shortfall
from attacks.common.penalty_search import PenaltySearch
from attacks.cw_l2 import cw_l2
from attacks.cw_linf import cw_linf
from attacks.deepfool import deepfool
from attacks.fab import fab, fab_t
from attacks.jsma import best_pair, jsma
from attacks.pgd import pgd
from attacks.threshold_cw import threshold_cw
from bench.losses import eot, objective
from bench.noise import Noise
from bench.protocols import Crafted, Images, Labels, Shape, Threat, View
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS
from bench.testing import Halfspace

L2, L0 = Threat("l2"), Threat("l0")
QUICK: dict[str, Any] = {"steps": 60, "searches": 6, "c": 0.1}


def draws(x: Images) -> Noise:
    return Noise("test", torch.arange(len(x)), dtype=x.dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def instrumented(view: View, n: int) -> tuple[View, QueryCounter]:
    counter = QueryCounter.of(n, torch.device("cpu"))
    return instrument(view, counter, "gradient", target=view.target, exact=True), counter


def far(x: Images, crafted: Crafted) -> Tensor:
    return L2.distance(x, crafted.images)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


class Linear(nn.Module):
    """Logits that are linear in the image, so that label k begins at a plane."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Images) -> Tensor:
        # Summed in one order, whatever the batch.
        return (x[:, None] * self.weight).flatten(2).sum(2) + self.bias

    def distances(self, x: Images, y: Labels) -> Tensor:
        """Return how far each label is, (N, K), where the box does not matter; infinite for the truth."""
        z = self(x)
        gap = z.gather(1, y[:, None]) - z
        away = (self.weight[None] - self.weight[y][:, None]).flatten(2).norm(dim=2)
        return torch.where(one_hot(y, len(self.weight)).bool(), math.inf, gap / away)


def planes(classes: int = 6, n: int = 12, *, seed: int = 0) -> tuple[Linear, Images, Labels]:
    """Return a maximum of linear functions of quite different slopes, and images near the grey one."""
    draw = seeded(seed)
    slope = 10 ** torch.empty(classes, 1, 1, 1, dtype=torch.float64).uniform_(-1, 0.5, generator=draw)
    weight = slope * torch.randn(classes, 2, 4, 3, generator=draw, dtype=torch.float64)
    apart = torch.empty(classes, dtype=torch.float64).uniform_(0.2, 0.4, generator=draw)
    level = -apart * (weight - weight[:1]).flatten(1).norm(dim=1)
    x = 0.5 + 0.03 * torch.randn(n, 2, 4, 3, generator=draw, dtype=torch.float64)
    model = Linear(weight, level - 0.5 * weight.flatten(1).sum(1))
    return model, x, model(x).argmax(1)


def smooth(classes: int = 5, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(120, classes))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    return net.double().eval().requires_grad_(False)


NET = smooth()
X = 0.2 + 0.6 * torch.rand(12, 2, 5, 4, generator=seeded(), dtype=torch.float64)
Y = NET(X).argmax(1)


def constant(logits: list[float]) -> Callable[[Tensor], Tensor]:
    """Return a model that answers the same to everything, with a gradient of 0."""
    return lambda z: 0 * z.flatten(1).sum(1)[:, None] + torch.tensor(logits, dtype=z.dtype)


# --- closed forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("towards", [False, True])
@pytest.mark.parametrize(
    ("attack", "most", "params"),
    [
        (cw_l2, 1.01, {"steps": 150, "c": 0.1, "searches": 7}),
        (cw_l2, 1.01, {"steps": 150, "c": 0.1, "searches": 7, "goal": "highest"}),
        (cw_l2, 1.01, {"steps": 200, "lr": 0.05, "c": 0.1, "searches": 8, "variable": "tanh"}),
        (deepfool, 1.025, {}),
    ],
    ids=["box", "highest", "tanh", "deepfool"],
)
def test_the_least_distance_to_a_half_space(attack: Any, most: float, params: Any, towards: bool) -> None:
    plane = Halfspace(Shape(2, 4, 4, 2))
    x, y = plane.examples(8)
    view = View(plane, target=1 - y if towards else None)
    crafted = attack(view, x, y, L2, draws(x), **params)
    ratio = far(x, crafted) / plane.least(x, "l2")
    assert (plane(crafted.images).argmax(1) != y).all()
    assert not crafted.notes["failed"].any()
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= most


@pytest.mark.parametrize("seed", range(3))
def test_the_least_distance_among_several_classes(seed: int) -> None:
    model, x, y = planes(seed=seed)
    every = model.distances(x, y)
    least, nearest = every.min(1)
    z = model(x).scatter(1, y[:, None], -math.inf)
    assert (z.argmax(1) != nearest).any(), "the likeliest class is always the nearest"
    for attack, most, params in ((cw_l2, 1.01, {"steps": 150, "searches": 8}), (deepfool, 1.025, {})):
        crafted = attack(View(model), x, y, L2, draws(x), **params)
        ratio = far(x, crafted) / least
        assert ratio.min() >= 1 - 1e-9
        assert ratio.max() <= most, attack
    goal = (y + 1) % 6
    # Far goals are behind other classes' planes, so that the distance to one plane is a bound only.
    crafted = cw_l2(View(model, target=goal), x, y, L2, draws(x), steps=150, searches=8)
    reached = ~crafted.notes["failed"]
    assert (model(crafted.images).argmax(1) == goal)[reached].all()
    assert (far(x, crafted) >= every.gather(1, goal[:, None])[:, 0] - 1e-9)[reached].all()


def test_two_classes_and_a_refusal() -> None:
    """Labels 0 and 1 and a refusal that begins at once: what is accepted lies behind it."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64).view(3, 1, 1, 2)
    model = Linear(weight, torch.tensor([0.0, -0.75, -0.05]).double())
    x, y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    view = View(model, refusal=True)
    assert candidate_labels(view, model(x), y).tolist() == [[1]]
    for attack, params in ((cw_l2, QUICK), (deepfool, {})):
        crafted = attack(view, x, y, L2, draws(x), **params)
        assert model(crafted.images).argmax(1).item() == 1
        assert far(x, crafted).item() == pytest.approx(0.25, rel=0.025)


def test_the_nearest_rival_is_the_nearest_plane_and_the_way_ends_on_it() -> None:
    model, x, y = planes()
    every = model.distances(x, y)
    z = x.clone().requires_grad_()
    logits = model(z)
    order = candidate_labels(View(model), logits, y)
    assert order.shape == (12, 5)
    assert (order != y[:, None]).all()
    assert (logits.gather(1, order).diff(dim=1) <= 0).all()
    step = nearest_candidate(View(model), z, logits, y, order)
    assert torch.equal(step.label, every.argmin(1))
    assert apart(step.length, every.min(1).values) < 1e-9
    assert apart(step.unit.flatten(1).norm(dim=1), torch.ones(12).double()) < 1e-9
    way = step.length[:, None, None, None] * step.unit
    assert objective(View(model), model(x + way), y, "margin").abs().max() < 1e-9


# --- CW in l2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_confidence_is_reached_and_costs_what_it_must(variable: Any) -> None:
    plane = Halfspace(Shape(2, 4, 4, 2))
    x, y = plane.examples(6, margin=1.0)
    x = x.clamp(0.25, 0.75)
    params: Any = {"steps": 200, "searches": 8, "lr": 0.01 if variable == "box" else 0.05, "c": 0.1}
    before = torch.zeros(6, dtype=torch.float64)
    for kappa in (0.0, 0.5, 1.0):
        crafted = cw_l2(View(plane), x, y, L2, draws(x), kappa=kappa, variable=variable, **params)
        gain = objective(View(plane), plane(crafted.images), y, "margin")
        assert (gain >= kappa).all()
        # The box does not matter: every unit of the margin costs 1 / |w|.
        need = (plane.margin(x).abs() + kappa) / plane.weight.double().norm()
        assert (far(x, crafted) / need).max() <= 1.01
        assert (far(x, crafted) >= before).all()
        before = far(x, crafted)


def test_a_margin_below_the_confidence_is_no_success() -> None:
    """The margin stops growing at 1."""

    def logits(z: Tensor) -> Tensor:
        margin = (4 * z.flatten(1)[:, 0] - 3).clamp_max(1)
        return torch.stack([torch.zeros_like(margin), margin], 1)

    x = torch.tensor([0.5, 0.8]).double().view(2, 1, 1, 1)
    y = torch.zeros(2, dtype=torch.int64)
    for kappa, failed in ((0.0, [False, False]), (0.9, [False, False]), (1.5, [True, True])):
        crafted = cw_l2(View(logits), x, y, L2, draws(x), kappa=kappa, **QUICK)
        assert crafted.notes["failed"].tolist() == failed
        if failed[0]:
            assert torch.equal(crafted.images, x)
        else:
            assert crafted.images.flatten().tolist() == pytest.approx(
                [(3 + kappa) / 4, max(0.8, (3 + kappa) / 4)], abs=5e-3
            )


@pytest.mark.parametrize("attack", [cw_l2, deepfool], ids=["cw", "deepfool"])
def test_a_constant_added_to_the_logits_changes_nothing(attack: Any) -> None:
    params = QUICK if attack is cw_l2 else {}
    one = attack(View(NET), X, Y, L2, draws(X), **params).images
    for level in (-1000.0, -300.0, 500.0):
        other = attack(View(lambda z, c=level: NET(z) + c), X, Y, L2, draws(X), **params).images
        assert apart(one, other) < 1e-6


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_logits_that_are_all_negative_or_far_apart(variable: Any) -> None:
    """As of log-likelihoods: -(500, 300, 800) at the image, and gaps of 700 with the slopes to match."""
    direction = torch.randn(1, 2, 4, 3, generator=seeded(1))
    weight = torch.cat([0 * direction, -direction, direction])
    x = 0.48 + 0.04 * torch.rand(4, 2, 4, 3, generator=seeded(2))
    y = torch.ones(4, dtype=torch.int64)
    for level, scale in (((-500.0, -300.0, -800.0), 200.0), ((-700.0, 0.0, -1400.0), 700.0)):
        model = Linear(scale * weight, torch.zeros(3))
        model.bias = torch.tensor(level) - model(torch.full_like(x[:1], 0.5))[0]
        assert (model(x) < 400).all()
        params: Any = {"searches": 8, "steps": 60 if variable == "box" else 150}
        view, _ = instrumented(View(model), 4)
        crafted = cw_l2(view, x, y, L2, draws(x), variable=variable, **params)
        assert (model(crafted.images).argmax(1) != y).all()
        least = model.distances(x, y).min(1).values
        assert (far(x, crafted) / least).max() < 1.02
        assert (far(x, deepfool(view, x, y, L2, draws(x))) / least).max() < 1.025


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("variable", "slope"), [("box", 1.0), ("box", 1e-4), ("tanh", 1.0), ("tanh", 1e-4)])
def test_black_and_white_pixels_move(variable: Any, slope: float, dtype: torch.dtype) -> None:
    """Every pixel is exactly 0 or 1; with a slope of 1e-4 Adam's 1e-8 would swallow tanh's gradient."""
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=dtype).view(1, 1, 2, 2)
    weight = slope * torch.stack([torch.zeros_like(x[0]), 1 - 2 * x[0]])
    model = Linear(
        weight,
        torch.tensor([0.0, -slope], dtype=dtype)
        - torch.stack([0 * slope * x.sum(), (weight[1] * x[0]).sum()]),
    )
    y = torch.tensor([0])
    params: Any = (
        {"steps": 1000, "searches": 2, "c": 3 / slope}
        if variable == "tanh"
        else {"searches": 5, "steps": 100, "c": 1 / slope}
    )
    crafted = cw_l2(View(model), x, y, L2, draws(x), variable=variable, **params)
    assert not crafted.notes["failed"].any()
    # Four pixels share a way of 1.
    assert apart(crafted.images, x + 0.25 * (1 - 2 * x)) < 0.02


def corner(need: float) -> tuple[View, Images, Labels]:
    """Return an image of black and white, wrong once its four pixels have moved by `need` in all."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)

    def logits(z: Tensor) -> Tensor:
        moved = ((z - x) * (1 - 2 * x)).sum((1, 2, 3))
        return torch.stack([0 * moved, moved - need], 1)

    return View(logits), x, torch.tensor([0])


def test_tanh_has_time_to_leave_black_and_its_gradient_is_not_swallowed() -> None:
    """A loss that stands still at first is no reason to stop; Adam adds 1e-8 to a gradient of 1e-10."""
    view, x, y = corner(1.0)
    slow = cw_l2(view, x, y, L2, draws(x), variable="tanh", searches=1, steps=600, c=3.0)
    assert apart(slow.images, x + 0.25 * (1 - 2 * x)) < 0.02
    view, x, y = corner(1.6e-4)
    small = cw_l2(view, x, y, L2, draws(x), variable="tanh", searches=1, steps=1000, c=1.2e-4, abort=False)
    assert not small.notes["failed"].any()
    assert far(x, small).item() < 1.5e-4


def test_a_success_that_does_not_last_is_none_of_the_constants() -> None:
    """Adam's first step crosses a plane 0.02 away with any constant, and comes back where it is too small."""
    weight = torch.ones(2, 1, 5, 5, dtype=torch.float64) * torch.tensor([0, 1]).view(2, 1, 1, 1)
    model = Linear(weight, torch.tensor([0.0, -12.6]).double())
    x, y = torch.full((1, 1, 5, 5), 0.5, dtype=torch.float64), torch.tensor([0])
    crafted = cw_l2(View(model), x, y, L2, draws(x), steps=200, searches=8)
    assert 0.02 <= far(x, crafted).item() <= 0.0204


def test_failures_are_unchanged_and_said_to_be_failed() -> None:
    """Example 0 cannot be won, 1 is wrong already, 2 can be won."""
    model, x, y = planes(n=3)
    y[1] = (y[1] + 1) % 6

    asked = torch.zeros(3)

    class Stubborn:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __call__(self, z: Tensor) -> Tensor:
            asked[self.rows] += 1
            answer = model(z)
            return torch.where((self.rows == 0)[:, None], 0 * answer + 9.0 * one_hot(y[:1], 6), answer)

        def select(self, rows: Tensor) -> "Stubborn":
            return Stubborn(self.rows[rows])

    tanh = {"steps": 150, "lr": 0.05, "variable": "tanh"}
    for attack, params in ((cw_l2, QUICK), (cw_l2, QUICK | tanh), (deepfool, {}), (jsma, {})):
        threat = L0 if attack is jsma else L2
        asked.zero_()
        crafted = attack(View(Stubborn(torch.arange(3))), x, y, threat, draws(x), **params)
        assert crafted.notes["failed"].tolist() == [True, False, False]
        assert torch.equal(crafted.images[:2], x[:2])
        assert (model(crafted.images[2:]).argmax(1) != y[2:]).all()
        # What is wrong already is asked once.
        assert asked[1] == 1


def test_the_nearest_of_all_successes_is_kept() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def logits(z: Tensor) -> Tensor:
        answer: Tensor = NET(z)
        if len(z) == len(X):
            seen.append((z.detach().clone(), answer.detach()))
        return answer

    crafted = cw_l2(View(logits), X, Y, L2, draws(X), abort=False, lr=0.05, c=1.0, steps=30, searches=4)
    ways = torch.stack([L2.distance(X, z) for z, _ in seen])
    wins = torch.stack([answer.argmax(1) != Y for _, answer in seen])
    assert len(seen) == 1 + 4 * 31
    assert wins[-1].any()
    assert apart(far(X, crafted), ways.masked_fill(~wins, math.inf).amin(0)) < 1e-12
    assert not torch.equal(crafted.images, seen[-1][0])


def test_no_example_decides_for_another() -> None:
    """Alone, in company, and beside one that is lost: the same images, for the same passes."""
    view, counter = instrumented(View(NET), len(X))
    whole = cw_l2(view, X, Y, L2, draws(X), **QUICK).images
    assert counter.forwards.unique().numel() > 3, "every example took as long"
    for rows in (torch.arange(12).flip(0), torch.tensor([3]), torch.tensor([7, 1])):
        view, spent = instrumented(View(NET), len(rows))
        part = cw_l2(view, X[rows], Y[rows], L2, draws(X).select(rows), **QUICK).images
        assert apart(part, whole[rows]) < 1e-9
        assert torch.equal(spent.forwards, counter.forwards[rows])

    class Beside:
        def __init__(self, lost: Tensor) -> None:
            self.lost = lost

        def __call__(self, z: Tensor) -> Tensor:
            return torch.where(self.lost[:, None], z.flatten(1)[:, :1] * 1e6 * one_hot(Y[:1], 5), NET(z))

        def select(self, rows: Tensor) -> "Beside":
            return Beside(self.lost[rows])

    beside = cw_l2(View(Beside(torch.arange(12) == 0)), X, Y, L2, draws(X), **QUICK).images
    assert apart(beside[1:], whole[1:]) < 1e-9


def test_an_example_stops_when_its_own_loss_has_not_fallen() -> None:
    """A gradient of 0 keeps the loss where it is: one tenth of the run is spent in each search."""
    x, y = X[:2], torch.tensor([0, 0])
    for abort, passes in ((True, 20), (False, 101)):
        view, counter = instrumented(View(constant([1.0, 0.0])), 2)
        crafted = cw_l2(view, x, y, L2, draws(x), steps=100, searches=3, abort=abort, goal="highest")
        assert crafted.notes["failed"].all()
        assert (counter.forwards == 1 + 3 * passes).all()


def test_the_constant_grows_tenfold_then_is_bisected_and_ends_at_the_least_that_won(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Tensor] = []

    def descend(self: Any, here: Any, c: Tensor, nearest: Any, missing: Any, won: Tensor, _: Any) -> None:
        tried.append(c.clone())
        won[here.rows] = c >= torch.tensor([0.3, 1e99])

    monkeypatch.setattr(PenaltySearch, "_descend", descend)
    x, y = X[:2], Y[:2]
    cw_l2(View(NET), x, y, L2, draws(x), searches=5, goal="highest")
    assert torch.stack(tried)[:, 0].tolist() == pytest.approx([1e-3, 1e-2, 0.1, 1, 0.55])
    tried.clear()
    cw_l2(View(NET), x, y, L2, draws(x), searches=10, goal="highest")
    first, second = torch.stack(tried).T
    assert first[8:].tolist() == pytest.approx([0.296875, 0.325])
    assert second.tolist() == pytest.approx([10.0 ** (k - 3) for k in range(9)] + [1e10])


def test_one_descent_through_tanh_equals_foolbox() -> None:
    import foolbox

    # The last of our iterates is looked at too; theirs is not.
    params: Any = {"c": 2.0, "searches": 1, "steps": 39, "lr": 0.05, "variable": "tanh", "goal": "highest"}
    ours = cw_l2(View(NET), X, Y, L2, draws(X), abort=False, **params)
    model = foolbox.PyTorchModel(NET, bounds=(0, 1), device="cpu")
    library = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1, steps=40, stepsize=0.05, initial_const=2.0, abort_early=False
    )
    images, _, success = library(model, X, Y, epsilons=None)
    assert success.all()
    assert not ours.notes["failed"].any()
    assert apart(ours.images, images) < 1e-5


def test_where_the_nearest_class_cannot_be_won_the_highest_is_tried() -> None:
    """Label 2 is near where logits are linear, but stops short; label 1 is far, and there."""

    def logits(z: Tensor) -> Tensor:
        a, b = z.flatten(1).T
        return torch.stack([0 * a, b - 0.9, (20 * (a - 0.5) - 2).clamp_max(-1)], 1)

    x, y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    z = x.clone().requires_grad_()
    answer = logits(z)
    assert (
        nearest_candidate(View(logits), z, answer, y, candidate_labels(View(logits), answer, y)).label.item()
        == 2
    )
    crafted = cw_l2(View(logits), x, y, L2, draws(x), **QUICK)
    assert far(x, crafted).item() == pytest.approx(0.4, rel=0.01)


def test_losses_of_several_draws_are_averaged_and_the_mean_answers() -> None:
    logits = torch.tensor([[[0.0, 3.0]], [[0.0, -1.0]], [[0.0, 1.0]]])
    y = torch.tensor([0])
    # Margins 3, -1 and 1: what they lack to 2 is 0, 3 and 1.
    assert margin_shortfall(View(NET), logits, y, 2.0).item() == pytest.approx(4 / 3)
    assert margin_shortfall(View(NET), logits[1], y, 2.0).item() == 3
    plane = Halfspace(Shape(2, 4, 4, 2))
    x, labels = plane.examples(4)
    turn = iter(range(10**6))

    def shaken(z: Tensor) -> Tensor:
        return plane(z) + torch.tensor([1.0, -1.0]) * (-1) ** next(turn)

    view, _ = instrumented(eot(View(shaken), 4), 4)
    for attack, threat, most in ((cw_l2, L2, 1.05), (deepfool, L2, 1.025), (jsma, L0, 1.0)):
        crafted = attack(view, x, labels, threat, draws(x), **(QUICK if attack is cw_l2 else {}))
        assert (plane(crafted.images).argmax(1) != labels).all()
        least = plane.least(x, threat.norm)
        assert (threat.distance(x, crafted.images) / least).max() <= most


# --- DeepFool ------------------------------------------------------------------------------------------


def test_one_step_is_enough_where_logits_are_linear() -> None:
    model, x, y = planes()
    least = model.distances(x, y).min(1).values
    for params, factor in (({}, 1.02), ({"overshoot": 0.1}, 1.1)):
        view, counter = instrumented(View(model), len(x))
        crafted = deepfool(view, x, y, L2, draws(x), **params)  # type: ignore[arg-type]
        assert (counter.forwards == 2).all()
        # One for each of the five other labels.
        assert (counter.backwards == 5).all()
        assert (objective(View(model), model(crafted.images), y, "margin") > 0).all()
        assert apart(far(x, crafted), factor * least) < 1e-9


def test_a_tie_on_the_boundary_is_no_success_and_is_left_by_a_push() -> None:
    """The margin is 0 on the plane, where the arg-max may be either: without overshoot the way ends there."""
    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([1])

    def logits(z: Tensor) -> Tensor:
        return torch.stack([0 * z.flatten(), z.flatten() - 0.25], 1)

    assert deepfool(View(logits), x, y, L2, draws(x), overshoot=0.0, steps=1).notes["failed"].all()
    pushed = deepfool(View(logits), x, y, L2, draws(x), overshoot=0.0)
    assert not pushed.notes["failed"].any()
    assert 0.25 < far(x, pushed).item() < 0.25 + 2e-6


class Rounded(nn.Module):
    """A network whose logits are whole numbers, with the gradients of those that were rounded."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Images) -> Tensor:
        exact: Tensor = self.scale * self.net(x)
        return exact + (exact.round() - exact).detach()


@pytest.mark.parametrize(
    "attack", [deepfool, fab, fab_t, cw_l2, threshold_cw, bpda_cw], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("kind", ["whole numbers", "float32", "beyond the boundary by a bit"])
def test_no_attack_stands_still_on_a_tie_or_in_the_last_bit(attack: Any, kind: str) -> None:
    """Ties are where a gradient ends, and the last bit is where steps of the rest of a way do."""
    net, x = smooth(seed=1).float(), X.float()
    model = Rounded(net, 3.0) if kind == "whole numbers" else net
    y = model(x).argmax(1)
    if kind == "beyond the boundary by a bit":
        found, right = deepfool(View(model), x, y, L2, draws(x)).images, y
        for _ in range(40):
            middle = (x + found) / 2
            held = (model(middle).argmax(1) == right)[:, None, None, None]
            x, found = torch.where(held, middle, x), torch.where(held, found, middle)
        x, y = found, model(found).argmax(1)
    brief: dict[str, Any] = {
        deepfool: {},
        fab: {"steps": 30},
        fab_t: {"steps": 30},
        cw_l2: {"steps": 200, "searches": 4, "c": 0.1},
        threshold_cw: {"steps": 200, "searches": 4, "c": 0.1},
        bpda_cw: {"steps": 60, "searches": 4, "step_size": 0.02},
    }[attack]
    crafted = attack(View(model), x, y, L2, draws(x), **brief)
    assert not crafted.notes["failed"].any()
    assert (model(crafted.images).argmax(1) != y).all()
    if kind == "beyond the boundary by a bit" and attack in (
        deepfool,
        fab,
        fab_t,
    ):  # Others' steps are of one length.
        assert far(x, crafted).max() < 1e-4


def test_an_image_that_is_wrong_by_a_tie_is_wrong_already() -> None:
    """Logits that are all the same, as of a dead network: the arg-max is the first label."""
    x, y = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([1, 0])
    crafted = deepfool(View(lambda z: z.flatten(1) * torch.zeros(1, 3, dtype=z.dtype)), x, y, L2, draws(x))
    assert crafted.notes["failed"].tolist() == [False, True]
    assert torch.equal(crafted.images, x)


def test_every_step_overshoots_on_a_parabola() -> None:
    """Newton's steps on z^2 = 0.04 from 0.8, worked out by hand."""
    x, y = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64), torch.tensor([0])

    def logits(z: Tensor) -> Tensor:
        a = z.flatten()
        return torch.stack([a**2 - 0.04, 0 * a], 1)

    z, steps = 0.8, 0
    while z**2 >= 0.04:
        z, steps = z - 1.05 * (z * z - 0.04) / (2 * z), steps + 1
    assert steps > 2
    crafted = deepfool(View(logits), x, y, L2, draws(x), overshoot=0.05, steps=steps)
    assert crafted.images.item() == pytest.approx(z)
    assert deepfool(View(logits), x, y, L2, draws(x), overshoot=0.05, steps=steps - 1).notes["failed"].all()


def test_deepfool_equals_foolbox() -> None:
    import foolbox

    ours = deepfool(View(NET), X, Y, L2, draws(X))
    assert not ours.notes["failed"].any()
    assert (objective(View(NET), NET(ours.images), Y, "margin") > 0).all()
    model = foolbox.PyTorchModel(NET, bounds=(0, 1), device="cpu")
    library = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=None, overshoot=0.02)
    # It adds 1e-4 to the length of each step.
    steps = L2.distance(ours.images, library(model, X, Y, epsilons=None)[0]) / 1.02e-4
    assert (steps < 3.01).all()


def test_values_that_leave_the_box_take_no_part() -> None:
    """Half of the slope is at black pixels that would become darker: with it the way ends half way."""
    x = torch.tensor([0.0, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    weight = torch.tensor([[0.0, 0.0], [-1.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2)
    model = Linear(weight, torch.tensor([0.0, -0.8]).double())
    crafted = deepfool(View(model), x, torch.tensor([0]), L2, draws(x))
    assert crafted.images.flatten().tolist() == pytest.approx([0, 0.5 + 1.02 * 0.3])


def test_only_candidates_are_gone_for() -> None:
    model, x, y = planes()
    every = model.distances(x, y)
    likeliest = model(x).scatter(1, y[:, None], -math.inf).argmax(1)
    view, counter = instrumented(View(model), len(x))
    crafted = deepfool(view, x, y, L2, draws(x), candidates=1, overshoot=1e-6)
    # Farther than to another label, where that comes first.
    goal = every.gather(1, likeliest[:, None])[:, 0]
    assert (far(x, crafted) <= goal * (1 + 1e-5)).all()
    assert (far(x, crafted) > every.min(1).values * 1.01).any()
    assert (counter.backwards == counter.forwards - 1).all()


@pytest.mark.parametrize("attack", [deepfool, cw_l2, jsma], ids=["deepfool", "cw-l2", "jsma"])
def test_gradients_that_are_zero_or_nan_are_no_success(attack: Any) -> None:
    """Example 0 has no gradient, 1 NaN logits, 2 a NaN gradient, 3 is sound."""

    class Broken:
        def __init__(self, kind: Tensor) -> None:
            self.kind = kind

        def __call__(self, z: Tensor) -> Tensor:
            margins = []
            for kind, a in zip(self.kind.tolist(), z.flatten(1), strict=True):
                pole = (a - a.detach()).sum().sqrt()  # 0, with an infinite slope.
                sound = a.sum() - 1.5
                margins.append([0 * sound - 1, math.nan * sound, 0 * pole - 1, sound][kind])
            margin = torch.stack(margins)
            return torch.stack([-margin, margin], 1)

        def select(self, rows: Tensor) -> "Broken":
            return Broken(self.kind[rows])

    x, y = torch.full((4, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    threat = L0 if attack is jsma else L2
    params = QUICK if attack is cw_l2 else {}
    crafted = attack(View(Broken(torch.arange(4))), x, y, threat, draws(x), **params)
    assert crafted.notes["failed"].tolist() == [True, True, True, False]
    assert torch.equal(crafted.images[:3], x[:3])
    if attack is cw_l2:
        assert crafted.notes["nonfinite"].tolist() == [False, True, True, False]


# --- CW in linf ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_below_its_constant_cw_in_linf_is_pgd_on_the_margin(exact: bool) -> None:
    threat = Threat("linf", 0.05)
    params: Any = {"steps": 7, "step_size": 0.0125, "restarts": 3, "drop": exact}
    view = View(NET, exact=exact)
    ours = cw_linf(view, X, Y, threat, draws(X), **params)
    theirs = pgd(view, X, Y, threat, draws(X), loss="margin", **params)
    assert objective(View(NET), NET(ours.images), Y, "margin").abs().max() < 50
    assert apart(ours.images, theirs.images) < 1e-9
    assert apart(ours.images, X) > 0.04


def test_beyond_its_constant_there_is_no_gradient() -> None:
    plane = Halfspace(Shape(1, 4, 4, 2))
    x, y = plane.examples(4, margin=0.5)
    threat = Threat("linf", 0.3)
    params: Any = {"steps": 30, "start": "zero", "drop": False}
    pushed = {
        k: objective(
            View(plane),
            plane(cw_linf(View(plane, exact=False), x, y, threat, draws(x), k=k, **params).images),
            y,
            "margin",
        )
        for k in (0.0, 1.0, 50.0)
    }
    step = 2.5 * 0.3 / 30 * float(plane.weight.detach().abs().sum())
    for k in (0.0, 1.0):
        assert ((pushed[k] >= k - 1e-9) & (pushed[k] <= k + step)).all()
    assert (pushed[50.0] > 1 + step).all()
    crafted = cw_linf(View(plane, exact=False), x, 1 - y, threat, draws(x), k=0.4, **params)
    assert crafted.notes["flat"].all()
    assert torch.equal(crafted.images, x)
    assert not cw_linf(View(plane, exact=False), x, y, threat, draws(x), k=0.4, **params).notes["flat"].any()


# --- JSMA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("towards", [False, True])
def test_jsma_changes_as_few_pixels_as_can_be_on_a_half_space(towards: bool) -> None:
    plane = Halfspace(Shape(3, 5, 4, 2))
    for margin in (0.5, 3.0, 5.0):
        x, y = plane.examples(8, margin=margin)
        crafted = jsma(View(plane, target=1 - y if towards else None), x, y, L0, draws(x))
        assert (plane(crafted.images).argmax(1) != y).all()
        assert torch.equal(L0.distance(x, crafted.images), plane.least(x, "l0"))


def brute_force(gain: Tensor, loss: Tensor, free: Tensor) -> float:
    """Return the best product of one row's pairs, looking at all of them; minus infinity without any."""
    best = -math.inf
    for p in range(len(gain)):
        for q in range(p):
            up, down = gain[p] + gain[q], loss[p] + loss[q]
            if free[p] and free[q] and up > 0 and down > 0:
                best = max(best, float(up * down))
    return best


@pytest.mark.parametrize("kind", ["normal", "opposed", "ties", "few"])
def test_the_best_pair_is_the_best_of_all(kind: str) -> None:
    draw = seeded(3)
    gain, loss = torch.randn(2, 20, 24, generator=draw, dtype=torch.float64)
    if kind == "opposed":
        loss = 1 - gain + 1e-3 * loss  # Nobody outdoes anybody.
    if kind == "ties":
        gain, loss = gain.round(), loss.round()
    free = torch.rand(20, 24, generator=draw) < (0.08 if kind == "few" else 0.8)
    pair, found = best_pair(gain, loss, free)
    for row in range(20):
        best = brute_force(gain[row], loss[row], free[row])
        assert found[row] == (best > -math.inf)
        if found[row]:
            p, q = pair[row]
            assert p != q
            assert free[row, pair[row]].all()
            score = (gain[row, p] + gain[row, q]) * (loss[row, p] + loss[row, q])
            assert score.item() == pytest.approx(best, abs=1e-12)
    assert found.any()
    if kind == "few":
        assert not found.all()


@pytest.mark.parametrize("theta", [1.0, 0.3, -1.0])
def test_jsma_as_published_step_by_step(theta: float) -> None:
    """Against the algorithm written out: the whole Jacobian, every pair of pixels."""
    sign = math.copysign(1, theta)
    for i in range(6):
        x, y = X[i : i + 1], Y[i : i + 1]
        goal = (y + 1) % 5
        z, walked = x.clone(), []
        for _ in range(int(0.5 * x[0, 0].numel() / 2)):
            if NET(z).argmax(1) == goal:
                break
            jacobian = torch.autograd.functional.jacobian(lambda a: NET(a)[0], z).reshape(5, -1) * sign
            own = jacobian[goal[0]]
            others = own - jacobian.sum(0)
            room = (z < 1 if theta > 0 else z > 0).flatten()
            # All channels of a pixel move, those that have room.
            own, others, room = ((room * each).view(2, -1).sum(0) for each in (own, others, room))
            score, best = -math.inf, None
            for p in range(x[0, 0].numel()):
                for q in range(p + 1, x[0, 0].numel()):
                    up, down = own[p] + own[q], others[p] + others[q]
                    if room[p] and room[q] and up > 0 and down > 0 and up * down > score:
                        score, best = float(up * down), (p, q)
            if best is None:
                break
            for place in best:
                z.view(2, -1)[:, place] = (z.view(2, -1)[:, place] + theta).clamp(0, 1)
            walked.append(best)
        view = View(NET, target=goal)
        crafted = jsma(view, x, y, L0, draws(x), theta=theta, gamma=0.5, both=False)
        won = bool(NET(z).argmax(1) == goal)
        assert crafted.notes["failed"].item() != won
        if won and walked:
            # One of the last pair may have been put back.
            differ = (crafted.images != z)[0].any(0).flatten().nonzero().flatten().tolist()
            assert len(differ) <= 1
            assert set(differ) <= set(walked[-1])
            assert NET(crafted.images).argmax(1) == goal


def test_jsma_tries_every_target_and_keeps_the_fewest_changes() -> None:
    """Label 1 is the likeliest and needs all six values; label 2 needs two; a pair for 3 moves it nowhere."""
    flat = torch.tensor([[0.0] * 6, [0.11] * 6, [1.0, 1.0, 0, 0, 0, 0], [-1.0] * 6])
    model = Linear(flat.double().view(4, 1, 2, 3), torch.tensor([0.0, -0.3, -1.5, -5.0]).double())
    x, y = torch.zeros(1, 1, 2, 3, dtype=torch.float64), torch.tensor([0])
    model.bias[1] = -0.6
    view, _ = instrumented(View(model), 1)
    crafted = jsma(view, x, y, L0, draws(x))
    assert model(crafted.images).argmax(1).item() == 2
    assert crafted.images.flatten().tolist() == [1, 1, 0, 0, 0, 0]
    towards = jsma(replace(View(model), target=torch.tensor([1])), x, y, L0, draws(x))
    assert towards.notes["failed"].item() or L0.distance(x, towards.images).item() > 2


def test_jsma_changes_no_more_than_its_share_and_goes_one_way() -> None:
    free = jsma(View(NET), X, Y, L0, draws(X), both=False)
    need = L0.distance(X, free.images)
    assert not free.notes["failed"].any()
    assert (free.images >= X).all()
    assert (jsma(View(NET), X, Y, L0, draws(X), both=False, theta=-1.0).images <= X).all()
    # Either way is as good as one on the whole.
    assert L0.distance(X, jsma(View(NET), X, Y, L0, draws(X)).images).mean() <= need.mean()
    few = jsma(View(NET), X, Y, L0, draws(X), both=False, gamma=0.05)
    assert (L0.distance(X, few.images) <= 2).all()
    assert few.notes["failed"].any()


# --- input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("cw-l2", {"kappa": -1.0}, "kappa: expected a number of 0 or more, found -1.0"),
        ("cw-l2", {"kappa": math.inf}, "kappa: expected a finite number, found inf"),
        ("cw-l2", {"searches": 0}, "searches: expected a number of 1 or more, found 0"),
        ("cw-l2", {"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ("cw-l2", {"c": 0.0}, "c: expected a number above 0, found 0.0"),
        ("cw-l2", {"lr": -0.1}, "lr: expected a number above 0, found -0.1"),
        ("cw-linf", {"k": -1.0}, "k: expected a number of 0 or more, found -1.0"),
        ("cw-linf", {"restarts": 0}, "restarts: expected a number of 1 or more, found 0"),
        ("cw-linf", {"step_size": 0.0}, "step_size: expected a number above 0, found 0.0"),
        ("deepfool", {"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ("deepfool", {"candidates": 0}, "candidates: expected a number of 1 or more, found 0"),
        ("deepfool", {"overshoot": -0.1}, "overshoot: expected a number of 0 or more, found -0.1"),
        ("jsma", {"theta": 0.0}, "theta must be a move above 0 and at most 1, or below 0, not 0"),
        ("jsma", {"theta": 1.5}, "theta must be a move above 0 and at most 1, or below 0, not 1.5"),
        ("jsma", {"gamma": 0.0}, "gamma: expected a number above 0, found 0.0"),
        ("jsma", {"gamma": 0.01}, "gamma of 0.01 leaves fewer than 2 of 64 pixels to change"),
    ],
)
def test_wrong_settings_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    assert refusal(name, {}, Shape(1, 8, 8, 10)) is None
    assert refusal(name, params, Shape(1, 8, 8, 10)) == message


def test_settings_that_go_nowhere_are_doubted() -> None:
    flags = {name: ATTACKS[name].flags for name in ("cw-l2", "cw-linf")}
    l2, linf = flags["cw-l2"], flags["cw-linf"]
    assert l2 is not None
    assert linf is not None
    assert "hardly move in 100 steps of 0.01, but in 500" in (
        l2(L2, steps=100, lr=0.01, variable="tanh") or ""
    )
    assert l2(L2, steps=500, lr=0.01, variable="tanh") is None
    assert l2(L2, steps=100, lr=0.01, variable="box") is None
    threat = Threat("linf", 0.1)
    assert linf(threat, steps=2, step_size=0.01, restarts=1, start="uniform") is not None
    assert linf(threat, steps=2, step_size=None, restarts=2, start="zero") is not None
    assert linf(threat, steps=2, step_size=None, restarts=2, start="uniform") is None

"""Attacks: against closed forms on a half-space, against two libraries, and in what they spend."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor, nn

from attacks.common import projected_ascent
from attacks.fgsm import fgsm
from attacks.pgd import pgd
from attacks.spsa import estimate, spsa, spsa_released
from bench.losses import objective
from bench.noise import Noise
from bench.protocols import Crafted, Images, Labels, Shape, Threat, View
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS
from bench.testing import Halfspace, check_attack

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("none", "linf", {}),
    ("none", "l2", {}),
    ("none", "l1", {}),
    ("none", "l0", {}),
    ("fgsm", "linf", {}),
    ("pgd", "linf", {}),
    ("pgd", "l2", {}),
    ("pgd", "linf", {"loss": "margin", "restarts": 10, "start": "uniform"}),
    ("pgd", "l2", {"loss": "dlr", "restarts": 3, "drop": False}),
    ("pgd", "linf", {"start": "zero", "keep": "last", "drop": False}),
    ("spsa", "linf", {"steps": 40}),
    ("spsa-released", "linf", {"steps": 40}),
    ("square", "linf", {"queries": 300}),
    # Its bumps cannot follow weights that are drawn pixel by pixel.
    ("square", "l2", {"queries": 500, "within": 2.0}),
    ("boundary", "l2", {"steps": 800, "spherical_step": 0.1, "source_step": 0.05, "within": 1.5}),
    ("bpda-cw", "l2", {"steps": 60, "searches": 3, "step_size": 0.03}),
    ("bpda-cw", "l2", {"steps": 40, "searches": 3, "step_size": 0.04, "schedule": "falling"}),
    ("nes", "l2", {"steps": 30, "searches": 3, "step_size": 0.04, "sigma": 0.05}),
    # It cannot move a value to the other side of grey but by wrapping it around.
    ("localsearch", "l0", {"rounds": 20, "within": math.inf}),
    ("localsearch", "l0", {"rounds": 20, "within": math.inf, "score": "probability"}),
    ("cw-l2", "l2", {"steps": 50, "searches": 6, "c": 0.1}),
    (
        "cw-l2",
        "l2",
        {"steps": 100, "searches": 4, "lr": 0.1, "c": 1.0, "variable": "tanh", "goal": "highest"},
    ),
    ("cw-linf", "linf", {}),
    ("latent-backtracking", "l2", {"backtracks": 2, "steps": 40, "searches": 3, "lr": 0.02}),
    (
        "latent-backtracking",
        "l2",
        {"backtracks": 1, "rate": 0.5, "draws": 2, "steps": 40, "searches": 3, "lr": 0.02},
    ),
    ("latent-descent", "l2", {}),
    ("latent-descent", "l2", {"classes": "all"}),
    ("on-manifold", "l2", {"starts": 1, "start_steps": 20, "steps": 40, "searches": 4}),
    ("threshold-cw", "l2", {"steps": 50, "searches": 6, "c": 0.1}),
    ("feature-matching", "linf", {"steps": 40}),
    ("feature-matching", "l2", {"steps": 40}),
    ("feature-matching", "l2", {"steps": 40, "guide": "centre", "start": "uniform"}),
    ("logit-matching", "linf", {"steps": 40}),
    ("logit-matching", "l2", {"steps": 40, "classes": 1}),
    ("deepfool", "l2", {}),
    ("deepfool", "l2", {"steps": 100, "candidates": 10, "overshoot": 0.05}),
    ("jsma", "l0", {}),
    ("apgd", "linf", {}),
    ("apgd", "l2", {"loss": "dlr", "restarts": 2}),
    ("apgd-t", "linf", {"restarts": 2}),
    ("apgd-t", "l2", {}),
    ("fab", "linf", {"steps": 20}),
    ("fab", "l2", {"steps": 20}),
    ("fab", "l1", {"steps": 20, "restarts": 2}),
    ("fab-t", "linf", {"steps": 20, "restarts": 2}),
    ("fab-t", "l2", {"steps": 20}),
    ("fab-t", "l1", {"steps": 20}),
    ("sequence", "linf", {"of": [{"use": "fgsm"}, {"use": "fab", "steps": 20}, {"use": "pgd"}]}),
    ("sequence", "l2", {"of": [{"use": "pgd"}, {"use": "square", "queries": 20}]}),
    ("sequence", "l1", {"of": [{"use": "fab", "steps": 20}]}),
    ("sequence", "l0", {"of": [{"use": "jsma"}]}),
    ("fast-worst", "linf", {}),
    ("fast-worst", "l2", {}),
    ("autoattack", "linf", {}),
    ("autoattack", "l2", {"version": "rand"}),
]


@pytest.mark.parametrize(("name", "norm", "params"), ROWS, ids=lambda value: str(value))
def test_an_attack_keeps_to_the_rules(name: str, norm: Any, params: dict[str, Any]) -> None:
    check_attack(name, norm, **params)


def test_every_attack_has_a_row_for_every_norm() -> None:
    # Adapters of libraries have their own: tests/test_libraries.py.
    # What shows stored images has none here: tests/gate/test_replay.py.
    entries = [
        each for each in map(ATTACKS.__getitem__, ATTACKS) if each.library is None and each.starts != "stored"
    ]
    ours = [entry for entry in entries if entry.module.startswith("attacks.")]
    wanted = {(entry.name, norm) for entry in ours for norm in entry.norms}
    assert wanted == {(name, norm) for name, norm, _ in ROWS if name in {entry.name for entry in ours}}


# --- a small smooth network, and its trajectories ------------------------------------------------------


def smooth(classes: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a small network without kinks: libraries and we walk the same way for many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 5 * 4, classes)
        )
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    return net.to(dtype).eval().requires_grad_(False)


def images(n: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Images:
    return torch.rand(n, 2, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(x: Images, key: str = "test") -> Noise:
    return Noise(key, torch.arange(len(x)), dtype=x.dtype, shard="shard")


class Given:
    """Draws that were made elsewhere."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)

    def uniform(self, *_: object) -> Tensor:
        return self.tensors.pop(0)

    signs = uniform

    def select(self, rows: Tensor) -> "Given":
        return self

    shared = lambda self: self  # noqa: E731 - the same draws for all


NET, X = smooth(), images()
Y = NET(X).argmax(1)
LINF, L2 = Threat("linf", 0.04), Threat("l2", 0.2)  # Break about half of these images.
PLAIN: dict[str, Any] = {"start": "zero", "keep": "last", "drop": False}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# --- equal to the libraries, where those are right ------------------------------------------------------


def test_fgsm_equals_torchattacks_and_foolbox() -> None:
    import foolbox
    import torchattacks

    ours = fgsm(View(NET), X, Y, LINF, draws(X)).images
    assert apart(ours, torchattacks.FGSM(NET, eps=0.04)(X, Y)) < 1e-6
    model = foolbox.PyTorchModel(NET, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)(model, X, Y, epsilons=0.04)[1]
    assert apart(ours, theirs) < 1e-6


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_pgd_from_the_image_equals_torchattacks_and_foolbox(threat: Threat) -> None:
    import foolbox
    import torchattacks

    step = threat.radius / 7
    ours = pgd(View(NET), X, Y, threat, draws(X), steps=20, step_size=step, **PLAIN).images
    theirs, attack = {
        "linf": (torchattacks.PGD, foolbox.attacks.LinfPGD),
        "l2": (torchattacks.PGDL2, foolbox.attacks.L2PGD),
    }[threat.norm]
    one = theirs(NET, eps=threat.radius, alpha=step, steps=20, random_start=False)(X, Y)
    assert apart(ours, one) < 1e-6
    model = foolbox.PyTorchModel(NET, bounds=(0, 1), device="cpu")
    other = attack(abs_stepsize=step, steps=20, random_start=False)(model, X, Y, epsilons=threat.radius)[1]
    assert apart(ours, other) < 1e-6
    assert apart(ours, X) > threat.radius / 10


def test_pgd_from_a_random_point_equals_torchattacks() -> None:
    import torchattacks

    torch.manual_seed(3)
    start = torch.empty_like(X).uniform_(-0.04, 0.04)
    torch.manual_seed(3)
    theirs = torchattacks.PGD(NET, eps=0.04, alpha=0.01, steps=20, random_start=True)(X, Y)
    settings = PLAIN | {"start": "uniform"}
    ours = pgd(View(NET), X, Y, LINF, Given(start), steps=20, step_size=0.01, **settings).images
    assert apart(ours, theirs) < 1e-6


def test_pgd_in_l2_from_a_random_point_equals_torchattacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchattacks

    torch.manual_seed(3)
    normal, share = torch.empty_like(X).normal_(), torch.empty(len(X), 1, 1, 1, dtype=X.dtype).uniform_(0, 1)
    unit = normal / normal.flatten(1).norm(dim=1)[:, None, None, None]
    monkeypatch.setattr(projected_ascent, "_start", lambda x, *_: (x + 0.2 * share * unit).clamp(0, 1))
    torch.manual_seed(3)
    theirs = torchattacks.PGDL2(NET, eps=0.2, alpha=0.04, steps=20, random_start=True)(X, Y)
    ours = pgd(View(NET), X, Y, L2, draws(X), steps=20, step_size=0.04, keep="last", drop=False).images
    assert apart(ours, theirs) < 1e-6


def test_spsa_as_released_equals_torchattacks() -> None:
    import torchattacks

    torch.manual_seed(5)
    signs = [torch.empty(16, 1, *X.shape[1:], dtype=X.dtype).bernoulli_() * 2 - 1 for _ in range(7)]
    torch.manual_seed(5)
    attack = torchattacks.SPSA(
        NET, eps=0.02, delta=0.005, lr=0.005, nb_iter=7, nb_sample=16, max_batch_size=16
    )
    theirs = attack(X, Y)
    given = Given(*(each.transpose(0, 1) for each in signs))
    threat = Threat("linf", 0.02)
    ours = spsa_released(View(NET), X, Y, threat, given, samples=16, loss="margin").images
    assert apart(ours, theirs) < 1e-6
    assert apart(ours, X) > 0.015


# --- PGD: what it keeps and what it spends ------------------------------------------------------------


def instrumented(view: View, n: int, *, exact: bool = True) -> tuple[View, QueryCounter]:
    counter = QueryCounter.of(n, torch.device("cpu"))
    return instrument(view, counter, "gradient", target=None, exact=exact), counter


def walk(threat: Threat, steps: int, **params: Any) -> list[Images]:
    """Return every iterate of the undropped walk, the start included."""
    params = PLAIN | params
    first = projected_ascent._start(X, threat, draws(X), params["start"])
    step = 2.5 * threat.radius / steps
    return [first] + [
        pgd(View(NET), X, Y, threat, draws(X), steps=t, step_size=step, **params).images
        for t in range(1, steps + 1)
    ]


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_pgd_keeps_the_first_adversarial_iterate_else_the_highest_loss(threat: Threat, start: Any) -> None:
    iterates = torch.stack(walk(threat, 10, start=start))
    logits = torch.stack([NET(z) for z in iterates])
    losses = torch.stack([objective(View(NET), each, Y) for each in logits])
    wrong = logits.argmax(2) != Y
    view, counter = instrumented(View(NET), len(X))
    found = pgd(view, X, Y, threat, draws(X), steps=10, start=start).images
    for i in range(len(X)):
        broken = bool(wrong[:, i].any())
        at = int(wrong[:, i].int().argmax()) if broken else int(losses[:, i].argmax())
        assert apart(found[i], iterates[at, i]) < 1e-9
        # Where the start alone was a success, the image itself is asked too.
        assert counter.forwards[i] == (at + 1 + (start == "uniform" and at == 0) if broken else 11)
        # The pass that shows it to be broken may serve the others' gradients.
        assert 0 <= counter.backwards[i] - (at if broken else 10) <= (1 if broken else 0)
    assert wrong.any(0).sum() in range(1, len(X))


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_pgd_pushes_to_the_end_on_a_surrogate(threat: Threat) -> None:
    iterates = torch.stack(walk(threat, 10))
    losses = torch.stack([objective(View(NET), NET(z), Y) for z in iterates])
    view, counter = instrumented(View(NET), len(X), exact=False)
    found = pgd(view, X, Y, threat, draws(X), steps=10, start="zero").images
    best = iterates[losses.argmax(0), torch.arange(len(X))]
    assert apart(found, best) < 1e-9
    assert (counter.forwards == 11).all()
    assert (counter.backwards == 10).all()


def test_pgd_spends_one_forward_pass_beside_its_steps_and_none_where_it_cannot_matter() -> None:
    threat = Threat("linf", 1e-6)
    for params, forwards in (({}, 41), (PLAIN, 40), (PLAIN | {"restarts": 2}, 82), ({"restarts": 2}, 82)):
        view, counter = instrumented(View(NET), len(X))
        pgd(view, X, Y, threat, draws(X), **params)
        assert (counter.forwards == forwards).all()
        assert (counter.backwards == 40 * params.get("restarts", 1)).all()


@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_pgd_leaves_what_is_wrong_already_where_it_is(start: Any) -> None:
    y = torch.where(torch.arange(len(X)) < 5, (Y + 1) % 5, Y)
    crafted = pgd(View(NET), X, y, Threat("linf", 0.01), draws(X), start=start)
    assert torch.equal(crafted.images[:5], X[:5])
    assert (crafted.images[5:] != X[5:]).flatten(1).any(1).all()


def test_pgd_without_dropping_keeps_a_success_before_a_higher_loss() -> None:
    def logits(z: Tensor) -> Tensor:
        """Answer 1 for values in (0.6, 0.7), else 0; the cross-entropy of 0 grows all the way."""
        a = z.flatten(1)[:, 0]
        one = torch.where((a > 0.6) & (a < 0.7), 0.1, -9.0)
        crowd = (9 * a - 9)[:, None].expand(-1, 200)
        return torch.cat([torch.zeros_like(a)[:, None], one[:, None], crowd], 1)

    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    settings: dict[str, Any] = {"steps": 10, "step_size": 0.04, "start": "zero", "drop": False}
    for exact, ends in ((True, 0.66), (False, 0.9)):
        view = View(logits, exact=exact)
        found = pgd(view, x, y, Threat("linf", 0.4), draws(x), **settings).images
        assert found.item() == pytest.approx(ends)


def test_one_step_of_the_radius_from_the_image_is_fgsm() -> None:
    one = pgd(View(NET), X, Y, LINF, draws(X), steps=1, step_size=LINF.radius, **PLAIN).images
    assert torch.equal(one, fgsm(View(NET), X, Y, LINF, draws(X)).images)


def test_fgsm_is_optimal_on_a_half_space_and_takes_a_fraction() -> None:
    plane = Halfspace(Shape(1, 4, 4, 2))
    x, y = plane.examples(6)
    x = 0.2 + 0.6 * x
    moves = {
        part: plane.margin(fgsm(View(plane), x, y, LINF, draws(x), fraction=part).images) - plane.margin(x)
        for part in (0.5, 1.0)
    }
    most = 0.04 * plane.weight.double().abs().sum() * torch.where(y == 1, -1, 1)
    for part, move in moves.items():
        assert torch.allclose(move, part * most)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_random_starts_are_uniform_in_the_ball(threat: Threat) -> None:
    x = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64)
    move = (projected_ascent._start(x, threat, draws(x), "uniform") - x) / threat.radius
    # In l2, the share of the ball's volume within the point's distance.
    shares = move.flatten() / 2 + 0.5 if threat.norm == "linf" else move.flatten(1).norm(dim=1) ** 4
    grid = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    below = (shares[:, None] < grid).double().mean(0)
    assert apart(below, grid) < 4 * 0.5 / math.sqrt(len(shares))
    assert move.mean(0).abs().max() < 4 / math.sqrt(len(x))


@pytest.mark.parametrize(("scale", "norm"), [(1.0, "linf"), (1.0, "l2"), (1e-30, "l2")])
def test_gradients_that_say_nothing_move_nothing_and_are_noted(scale: float, norm: Any) -> None:
    """Example 0 has no gradient, 1 one that is NaN in one pixel, 2 a sound one, 3 NaN logits."""

    def logits(z: Tensor) -> Tensor:
        a = z.flatten(1)
        zero = a[1, 0] - 0.5
        pole = torch.where(zero == 0, 0 * zero, 1 / zero)  # 0, but its gradient is 0 times infinity.
        rows = [a[0] * 0, torch.stack([pole - a[1, 1], pole]), a[2] * torch.tensor([-1, 1]), a[3] * math.nan]
        return scale * torch.stack(rows)

    x = torch.tensor([0.5, 0.4]).expand(4, 2).reshape(4, 1, 1, 2).clone()
    y = torch.tensor([0, 0, 0, 0])
    view = View(logits, exact=False)
    for attack in (pgd, fgsm) if norm == "linf" else (pgd,):
        settings: dict[str, Any] = PLAIN | {"steps": 3} if attack is pgd else {}
        crafted = attack(view, x, y, Threat(norm, 0.1), draws(x), **settings)
        move = (crafted.images - x).flatten(1)
        assert crafted.notes["flat"].tolist() == [True, False, False, False]
        assert crafted.notes["nonfinite"].tolist() == [False, True, False, True]
        assert (move[[0, 3]] == 0).all()
        assert move[1].tolist() == pytest.approx([0, 0.1])
        length = 0.1 * math.sqrt(2) if norm == "linf" else 0.1
        assert float(move[2].norm()) == pytest.approx(length)


# --- PGD: restarts --------------------------------------------------------------------------------------


def broken(crafted: Crafted, net: nn.Module = NET, y: Labels = Y) -> Tensor:
    return net(crafted.images).argmax(1) != y


def test_restarts_see_survivors_only_and_break_no_fewer() -> None:
    spent, won = [], []
    for restarts in (1, 2, 5, 12):
        view, counter = instrumented(View(NET), len(X))
        won.append(broken(pgd(view, X, Y, LINF, draws(X), steps=4, step_size=0.02, restarts=restarts)))
        spent.append(counter.forwards)
    for (fewer, cheaper), (more, dearer) in pairwise(zip(won, spent, strict=True)):
        assert (more | ~fewer).all()
        assert torch.equal(dearer[fewer], cheaper[fewer])
        assert (dearer[~fewer] > cheaper[~fewer]).all()
    assert (spent[-1][~won[-1]] == 12 * 5).all()


def test_restarts_side_by_side_are_restarts_one_after_another() -> None:
    noise = draws(X)
    alone = [pgd(View(NET), X, Y, LINF, noise, steps=5, keep="last", drop=False).images for _ in range(10)]
    losses = torch.stack([objective(View(NET), NET(z), Y) for z in alone])
    surrogate = View(NET, exact=False)
    together = pgd(surrogate, X, Y, LINF, draws(X), steps=5, keep="last", restarts=10).images
    assert apart(together, torch.stack(alone)[losses.argmax(0), torch.arange(len(X))]) < 1e-9


# --- X-1 to X-6 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [pgd, spsa], ids=lambda attack: attack.__name__)
def test_successes_survive_being_asked_again_alone(attack: Callable[..., Crafted]) -> None:
    found: dict[int, bool] = {}

    def logits(z: Tensor) -> Tensor:
        return NET(z)

    crafted = attack(View(logits), X, Y, LINF, draws(X), steps=20)
    for i, z in enumerate(crafted.images):
        found[i] = bool(NET(z[None]).argmax() != Y[i])
    # What a walk of the same kind meets on its way is not lost.
    assert sum(found.values()) >= 5
    assert (LINF.distance(X, crafted.images) <= LINF.radius + 1e-9).all()


def test_on_a_network_without_tricks_bpda_and_the_mean_of_draws_change_nothing() -> None:
    views = {
        "plain": View(NET),
        "bpda": View(lambda z: NET(z + (z.clone() - z).detach())),
        "three equal draws": View(lambda z: torch.stack([NET(z)] * 3)),
        "shifted": View(lambda z: NET(z) - 500),
    }
    found = {name: pgd(view, X, Y, LINF, draws(X), restarts=2).images for name, view in views.items()}
    for name in views:
        assert apart(found[name], found["plain"]) < 1e-6, name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_wider_ball_and_more_steps_break_no_fewer(norm: Any) -> None:
    radii = torch.linspace(0.005, 0.08, 8).tolist()
    if norm == "l2":
        radii = [5 * radius for radius in radii]
    by_radius = [int(broken(pgd(View(NET), X, Y, Threat(norm, r), draws(X))).sum()) for r in radii]
    assert by_radius == sorted(by_radius)
    assert by_radius[0] < by_radius[-1]
    threat = LINF if norm == "linf" else L2
    by_steps = [
        broken(pgd(View(NET), X, Y, threat, draws(X), steps=steps, step_size=threat.radius / 8))
        for steps in (1, 2, 4, 8, 16, 32)
    ]
    for fewer, more in pairwise(by_steps):
        assert (more | ~fewer).all()
    assert by_steps[0].sum() < by_steps[-1].sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_pgd_crosses_a_plane_at_105_percent_of_the_least_radius_and_never_at_95(norm: Any, loss: Any) -> None:
    plane = Halfspace(Shape(3, 6, 5, 2), seed=4).requires_grad_(False)
    # Far from the box's sides the least radius is the margin over the dual norm of the weights.
    x = 0.3 + 0.4 * plane.examples(3)[0]
    least = plane.margin(x).abs() / plane.weight.double().flatten().norm(p=1 if norm == "linf" else 2)
    assert torch.allclose(plane.least(x, norm), least)
    for i in range(3):
        one, label = x[i : i + 1], plane(x[i : i + 1]).argmax(1)
        for share, crosses in ((1.05, True), (0.95, False)):
            threat = Threat(norm, share * float(least[i]))
            found = pgd(View(plane), one, label, threat, draws(one), loss=loss).images
            assert bool(plane(found).argmax(1) != label) == crosses


@pytest.mark.parametrize("attack", [pgd, spsa], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize(("scale", "level"), [(1.0, -300.0), (700 / 3, 0.0), (700 / 3, -5000.0)])
def test_margin_losses_beat_negative_logits_and_huge_gaps_where_cross_entropy_goes_blind(
    attack: Callable[..., Crafted], scale: float, level: float
) -> None:
    plane = Halfspace(Shape(3, 5, 4, 4)).requires_grad_(False)
    x, y = plane.examples(8)
    x = x.float()
    view, _ = instrumented(View(lambda z: scale * plane(z) + level), len(x))
    assert scale == 1 or (scale * plane.margin(x).abs() > 690).all()
    threat = Threat("linf", 1.2 * float(plane.least(x, "linf").max()))
    for loss in ("margin", "dlr"):
        crafted = attack(view, x, y, threat, draws(x), loss=loss)
        assert broken(crafted, plane, y).all()
        assert not crafted.notes["flat"].any()
    blind = attack(view, x, y, threat, draws(x), loss="ce", **({"start": "zero"} if attack is pgd else {}))
    assert blind.notes["flat"].all() == (scale > 1)
    assert (scale > 1) == torch.equal(blind.images, x)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "spsa", "spsa-released"])
def test_a_network_with_states_and_mixed_modes_is_left_as_it_was(name: str) -> None:
    class Counting(nn.Module):
        """Keeps what it saw last, as a network with feedback does; answers from a fresh state."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(smooth(dtype=torch.float32), nn.BatchNorm1d(5), nn.Dropout(0.5))
            self.state: Tensor | None = None

        def forward(self, z: Images) -> Tensor:
            self.state = self.net[0](z)
            return self.net[1:](self.state)

    model = Counting().eval()
    model.net[2].train()
    model.net[1].requires_grad_(False)
    model.net[2].p = 0.0
    x, y = images(dtype=torch.float32), Y
    before = model(x)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    returned = ATTACKS[name].make(View(model), x, y, LINF, draws(x))
    assert not torch.equal(returned.images, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(x), before)


def test_targets_are_reached_not_just_any_wrong_label() -> None:
    def flat(z: Images) -> Tensor:
        """Return ten times the mean of each fifth of the pixels: every label is in reach."""
        return 10 * z.flatten(1).unflatten(1, (5, 8)).mean(2)

    y = flat(X).argmax(1)
    target = (y + 2) % 5
    for attack in (pgd, spsa):
        for loss in ("ce", "margin", "dlr"):
            view = replace(View(flat), target=target)
            found = attack(view, X, y, Threat("linf", 0.5), draws(X), loss=loss, steps=60).images
            assert (flat(found).argmax(1) == target).all()


def test_a_refusal_is_no_success_and_no_goal() -> None:
    """Between the labels lies a wide land of refusals: who stops at the first change stops there."""
    plane = Halfspace(Shape(3, 5, 4, 2)).requires_grad_(False)
    x, y = plane.examples(8)

    def logits(z: Tensor) -> Tensor:
        margin = plane.margin(z)
        return torch.stack([-margin, margin, 2 - margin.abs() / 10], 1)

    beyond = torch.where(y == 1, -1, 1) * 2.5
    radius = 1.3 * float((plane.margin(x) - beyond).abs().max() / plane.weight.abs().sum())
    for loss in ("ce", "margin", "dlr"):
        found = pgd(View(logits, refusal=True), x, y, Threat("linf", radius), draws(x), loss=loss).images
        assert (logits(found).argmax(1) == 1 - y).all()


# --- SPSA -----------------------------------------------------------------------------------------------


def linear(weight: Tensor) -> View:
    """Return a view whose margin loss for label 0 is <w, z>."""
    return View(
        lambda z: torch.stack([torch.zeros(len(z), dtype=z.dtype), (z * weight).flatten(1).sum(1)], 1)
    )


def margin(view: View, y: Labels) -> Callable[[Images], Tensor]:
    return lambda points: objective(view, view.logits(points), y, "margin")


def guess(view: View, x: Images, samples: int, *, box: bool, delta: float = 0.01, **noise: Any) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    given = noise.get("noise") or draws(x)
    return estimate(margin(view, y), x, given, samples=samples, delta=delta, box=box)


def test_the_estimate_has_no_bias_on_a_linear_loss_also_at_the_sides_of_the_box() -> None:
    weight = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([0.0, 1.0, 0.005, 0.5], dtype=torch.float64).repeat(4).view(1, 1, 4, 4)
    x = x.repeat(200, 1, 1, 1)
    for box in (True, False):
        error = guess(linear(weight), x, 200, box=box).mean(0) - weight
        # Each entry's variance is the squared rest of the gradient, scaled by at most 2 at the sides.
        assert error.abs().max() < 4 * 2 * float(weight.norm()) / math.sqrt(200 * 200)


def test_the_estimate_s_error_falls_with_the_root_of_the_samples() -> None:
    weight = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.full((64, 1, 8, 8), 0.5, dtype=torch.float64)
    errors = [(guess(linear(weight), x, n, box=True) - weight).flatten(1).norm(dim=1) for n in (50, 800)]
    assert float(errors[0].mean() / errors[1].mean()) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("side", "channels", "samples"), [(28, 1, 128), (32, 3, 128), (8, 1, 5 * 64)])
def test_the_estimate_points_where_theory_says(side: int, channels: int, samples: int) -> None:
    size = channels * side * side
    weight = torch.randn(channels, side, side, generator=torch.Generator().manual_seed(2))
    x = torch.full((24, channels, side, side), 0.5)
    found = guess(linear(weight), x, samples, box=True).flatten(1)
    cosine = torch.cosine_similarity(found, weight.flatten()[None]).mean()
    assert float(cosine) == pytest.approx(1 / math.sqrt(1 + (size - 1) / samples), abs=0.02)
    if samples >= 5 * size:
        assert cosine > 0.9


def test_the_estimate_follows_the_gradient_of_a_network() -> None:
    z = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(View(NET), NET(z), Y, "margin").sum(), z)
    found = estimate(margin(View(NET), Y), X, draws(X), samples=1000, delta=1e-4, box=True)
    assert torch.cosine_similarity(found.flatten(1), gradient.flatten(1)).min() > 0.97


def test_directions_are_each_image_s_own_or_the_shard_s_and_probes_keep_to_the_box_or_not() -> None:
    x = (
        torch.rand(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
        .round(decimals=1)
        .repeat(3, 1, 1, 1)
    )
    y = NET(x.double()).argmax(1)
    seen: list[Tensor] = []

    def logits(z: Tensor) -> Tensor:
        seen.append(z)
        return NET(z.double()).to(z.dtype)

    def noise() -> Noise:
        return Noise("test", torch.arange(3), shard="shard")

    threat = Threat("linf", 0.05)
    own = spsa(View(logits, exact=False), x, y, threat, noise(), steps=3, samples=8).images
    assert not torch.equal(own[0], own[1])
    assert all(((z >= 0) & (z <= 1)).all() for z in seen)
    seen.clear()
    shared = spsa_released(View(logits), x, y, threat, noise(), samples=8).images
    assert torch.allclose(shared[0], shared[1], atol=1e-6)
    assert apart(torch.cat(seen).clamp(0, 1), torch.cat(seen)) == pytest.approx(0.005, abs=1e-6)
    assert len(seen) == 7


def test_spsa_drops_what_is_broken_and_spends_what_it_says() -> None:
    view, counter = instrumented(View(NET), len(X))
    crafted = spsa(view, X, Y, LINF, draws(X), steps=10, samples=20)
    won = broken(crafted)
    assert won.sum() in range(3, len(X))
    assert (counter.forwards[~won] == 10 * 40 + 11).all()
    assert (counter.forwards[won] < 10 * 40 + 11).all()
    assert (counter.forwards % 41 == torch.where(won, 1.0, 1.0)).all()
    assert (counter.backwards == 0).all()
    wrong = spsa(View(NET), X, (Y + 1) % 5, LINF, draws(X), steps=2, samples=4)
    assert torch.equal(wrong.images, X)


# --- settings -------------------------------------------------------------------------------------------


def flag(name: str, threat: Threat, **params: Any) -> str | None:
    entry = ATTACKS[name]
    assert entry.flags is not None
    return entry.flags(threat, **entry.schema(**params).model_dump())


def test_settings_that_cannot_reach_the_radius_are_doubted() -> None:
    radius = Threat("linf", 0.1)
    assert flag("spsa-released", radius) == "7 steps of 0.005 reach 0.035, less than the radius 0.1"
    assert flag("spsa", radius) is None
    assert flag("spsa", radius, steps=9) == "9 steps of 0.01 reach 0.09, less than the radius 0.1"
    assert (
        flag("pgd", radius, steps=7, step_size=0.01) == "7 steps of 0.01 reach 0.07, less than the radius 0.1"
    )
    assert flag("pgd", radius) is None
    assert "one run" in str(flag("pgd", radius, start="zero", restarts=3))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pgd", {"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ("pgd", {"restarts": -1}, "restarts: expected a number of 1 or more, found -1"),
        ("pgd", {"step_size": -0.1}, "step_size: expected a number above 0, found -0.1"),
        ("fgsm", {"fraction": 1.5}, "fraction: expected a number of 1 or less, found 1.5"),
        ("spsa", {"samples": 0}, "samples: expected a number of 1 or more, found 0"),
        ("spsa-released", {"delta": 0.0}, "delta: expected a number above 0, found 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    assert refusal(name, {}, Shape(1, 28, 28, 10)) is None
    assert refusal(name, params, Shape(1, 28, 28, 10)) == message


# --- check_attack must notice a broken attack ----------------------------------------------------------


def noop(view: View, x: Images, *_: Any) -> Images:
    return x.clone()


def backwards(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Crafted:
    return pgd(replace(view, logits=lambda z: -view.logits(z)), x, y, threat, noise, drop=False)


def timid(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Crafted:
    return pgd(view, x, y, replace(threat, radius=threat.radius / 2), noise)


def greedy(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Crafted:
    return pgd(view, x, y, replace(threat, radius=threat.radius * 1.1), noise, drop=False, start="zero")


def lax(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    return x + 1.01 * (fgsm(view, x, y, threat, noise).images - x)


def forgetful(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    torch.rand(1)
    return pgd(view, x, y, threat, noise).images


def restless(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    generator = torch.Generator()
    generator.seed()
    step = torch.rand(x.shape, generator=generator, dtype=x.dtype) * threat.radius / 100
    return threat.project(x, pgd(view, x, y, threat, noise).images + step)


def crowded(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    share = 1 - 0.01 * torch.arange(len(x), dtype=x.dtype)[:, None, None, None]
    return x + share * (fgsm(view, x, y, threat, noise).images - x)


def poisoned(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(view, view.logits(z), y).sum(), z)
    return threat.project(x, x + threat.radius * gradient / gradient.abs())


def leaking(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    z = x.clone().requires_grad_()
    objective(view, view.logits(z), y).sum().backward()
    assert z.grad is not None
    return threat.project(x, x + threat.radius * z.grad.sign())


def writing(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    return x.copy_(pgd(view, x, y, threat, noise).images)


def wide(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    return pgd(view, x, y, threat, noise).images.double().flatten(1)


def mislabelled(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Crafted:
    return Crafted(pgd(view, x, y, threat, noise).images, {"label": y})


@pytest.mark.parametrize(
    ("attack", "complaint"),
    [
        (noop, "left 8 of 8 images on their side of the plane"),
        (backwards, "left 8 of 8 images on their side of the plane"),
        (timid, "images on their side of the plane"),
        (greedy, "left the budget by"),
        (lax, "left the box by|left the budget by"),
        (forgetful, "torch's global random state"),
        (restless, "when asked again with the same draws"),
        (crowded, "examples end elsewhere"),
        (poisoned, "not finite, where logits are NaN"),
        (leaking, "gradients on the parameters"),
        (writing, "changed the images or the labels that it was given"),
        (wide, "returned torch.float64"),
        (mislabelled, "the note 'label' has the name of an outcome"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_attack_does_not_pass(
    attack: Callable[..., Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = replace(ATTACKS["fgsm"], name="broken", make=attack, check_params=None)
    monkeypatch.setitem(ATTACKS._entries, "broken", entry)
    with pytest.raises(AssertionError, match=complaint):
        check_attack("broken", "linf")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fgsm", "pgd", "spsa"])
def test_a_gpu_finds_what_a_cpu_finds(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        net = smooth().to(device)
        noise = Noise("test", torch.arange(len(X)), dtype=X.dtype, device=device)
        returned = ATTACKS[name].make(View(net), X.to(device), Y.to(device), LINF, noise)
        found.append(returned.images.cpu())
    assert apart(*found) < 1e-6

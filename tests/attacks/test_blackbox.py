"""Attacks that see scores or answers alone, and the search that BPDA and NES share: against closed forms,
independent loops and libraries.
"""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor, nn

from attacks import boundary as walks
from attacks import square as squares
from attacks.boundary import boundary
from attacks.bpda_cw import bpda_cw
from attacks.common import signed_penalty
from attacks.localsearch import localsearch
from attacks.nes import estimate, nes
from attacks.square import square
from bench.losses import objective
from bench.noise import Noise
from bench.protocols import Decision, Images, Labels, Shape, Threat, View
from bench.referee.instruments import QueryCounter, answers_only, instrument
from bench.registry import Access
from bench.testing import Halfspace


def network(classes: int = 5, *, seed: int = 0) -> nn.Module:
    """Return a small network of images (2, 8, 8)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(384, classes))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def images(n: int = 16, *, seed: int = 0, shape: tuple[int, ...] = (2, 8, 8)) -> Images:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def draws(x: Images, key: str = "test") -> Noise:
    return Noise(key, torch.arange(len(x)), dtype=x.dtype)


def instrumented(
    view: View, n: int, access: Access = "score", *, exact: bool = True
) -> tuple[View, QueryCounter]:
    counter = QueryCounter.of(n, torch.device("cpu"))
    return instrument(view, counter, access, target=None, exact=exact), counter


NET, X = network(), images()
Y = NET(X).argmax(1)


def broken(z: Images, y: Labels = Y) -> Tensor:
    return NET(z).argmax(1) != y


def refused(name: str, message: str, **params: Any) -> None:
    assert refusal(name, {}, Shape(1, 28, 28, 10)) is None
    assert refusal(name, params, Shape(1, 28, 28, 10)) == message


# --- Square ---------------------------------------------------------------------------------------------


def bump_of(side: int) -> Tensor:
    return squares._bump(side, torch.float64, torch.device("cpu"))


def asked(
    threat: Threat, queries: int = 60, *, x: Images = X, net: nn.Module = NET, **params: Any
) -> tuple[list[Images], Images]:
    """Return every point that an attack asks for where nothing ends it early, and what it returns."""
    seen: list[Images] = []

    def logits(z: Images) -> Tensor:
        seen.append(z.clone())
        return net(z)

    found = square(View(logits, exact=False), x, Y, threat, draws(x), queries=queries, **params).images
    assert torch.equal(seen[0], x)
    return seen[1:], found


def test_the_squares_shrink_by_the_published_schedule() -> None:
    """Halved after 10, 50, 200, ... of 10,000 proposals; for other numbers the schedule is stretched."""
    ends = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for i, end in enumerate(ends):
        for queries in (10_000, 5_000):
            at = end * queries // 10_000
            assert squares.shrinking(at, queries) == 2.0**-i
            assert squares.shrinking(at + 1, queries) == 2.0 ** -(i + 1)
    # Places drawn are the same: only the sides differ. The last of 30, or the 30th of 10,000.
    _, stretched = asked(Threat("linf", 0.05), 30)
    _, early = asked(Threat("linf", 0.05), 30, rescale=False)
    _, late = asked(Threat("linf", 0.05), 30, p_init=0.8 / 2, rescale=False)
    assert not torch.equal(stretched, early)
    assert not torch.equal(early, late)


def test_in_linf_every_proposal_repaints_one_square_of_the_best_so_far() -> None:
    threat = Threat("linf", 0.05)
    points, found = asked(threat)
    up, down = (X + 0.05).clamp(0, 1), (X - 0.05).clamp(0, 1)
    stripes = points[0]
    assert ((stripes == up) | (stripes == down)).all()
    ups = (stripes > X) | (X == 1)
    assert (ups.all(2) | ~ups.any(2)).all(), "a column goes one way"
    assert 0.3 < ups.float().mean() < 0.7
    best, score = points[0], objective(View(NET), NET(points[0]), Y, "margin")
    corners = []
    for query, point in enumerate(points[1:], 1):
        assert ((point == up) | (point == down)).all()
        side = max(round(math.sqrt(0.8 * squares.shrinking(query, 60) * 64)), 1)
        moved = (point != best).any(1)
        for i in range(len(X)):
            if moved[i].any():
                rows, columns = moved[i].any(1).nonzero(), moved[i].any(0).nonzero()
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side
                corners.append((query, int(rows.min()), int(columns.min())))
                for channel in range(2):
                    inside = point[i, channel][moved[i]]
                    colours = (inside == up[i, channel][moved[i]]).float().mean()
                    # Inside the square a channel goes one way, whatever was there before.
                    assert colours in (0, 1)
        better = (now := objective(View(NET), NET(point), Y, "margin")) > score
        best = torch.where(better[:, None, None, None], point, best)
        score = torch.where(better, now, score)
    assert torch.equal(found, best)
    # Places are each image's own, and the last row and column have their turn.
    last = [corner for corner in corners if corner[0] == 59]
    assert len({corner[1:] for corner in last}) > 4
    assert {corner[1] for corner in corners} == set(range(8)) == {corner[2] for corner in corners}


def test_the_bumps_in_l2_are_those_of_torchattacks() -> None:
    import torchattacks

    library = torchattacks.Square(nn.Linear(1, 1))
    library.device = "cpu"
    for side in (1, 3, 5, 6, 25):
        torch.manual_seed(1)  # Its coin says: no turn.
        ours, theirs = bump_of(side).float(), library.eta(side)
        assert torch.allclose(ours, theirs, atol=1e-6) or torch.allclose(ours, theirs.T, atol=1e-6)


def pushed(x: Images, z: Images, radius: float, side: int, corners: list[int], bump: Tensor) -> Images:
    """Return the l2 proposal of algorithm 3 for one image, channel by channel."""
    r1, c1, r2, c2 = corners
    move = (z - x).clone()
    left = max(radius**2 - float((move**2).sum()), 0.0)
    result = move.clone()
    for k in range(len(x)):
        one = torch.zeros_like(move[k], dtype=torch.bool)
        one[r1 : r1 + side, c1 : c1 + side] = True
        both = one.clone()
        both[r2 : r2 + side, c2 : c2 + side] = True
        old = move[k][one].view(side, side)
        new = bump[k] + old / max(float(old.norm()), 1e-12)
        length = math.sqrt(float((move[k][both] ** 2).sum()) + left / len(x))
        result[k][both] = 0
        result[k][one] = (new / new.norm() * length).flatten()
    return (x + radius * result / result.norm()).clamp(0, 1)


def test_in_l2_every_proposal_is_algorithm_3() -> None:
    threat = Threat("l2", 0.8)
    x, net = X.double(), deepcopy(NET).double()
    points, found = asked(threat, x=x, net=net)
    noise = draws(x)
    assert torch.equal(points[0], squares._tiles(x, 0.8, noise))
    places, signs = noise.uniform((squares.BLOCK, 4)), noise.signs((squares.BLOCK, 3))
    best, score = points[0], objective(View(net), net(points[0]), Y, "margin")
    for query, point in enumerate(points[1:], 1):
        at = query - 1
        side = max(round(math.sqrt(0.8 * squares.shrinking(query, 60) * 64)), 3) | 1
        assert (threat.distance(x, point) <= 0.8 + 1e-9).all()
        for i in range(0, len(x), 5):
            corners = [int(u * (8 - side + 1)) for u in places[i, at]]
            bump = bump_of(side)
            turned = bump.T if signs[i, at, 0] > 0 else bump
            wanted = pushed(x[i], best[i], 0.8, side, corners, signs[i, at, 1:, None, None] * turned)
            assert torch.allclose(point[i], wanted, atol=1e-9)
        better = (now := objective(View(net), net(point), Y, "margin")) > score
        best = torch.where(better[:, None, None, None], point, best)
        score = torch.where(better, now, score)
    assert torch.equal(found, best)


def test_tiles_cover_the_image_with_bumps_of_the_whole_radius() -> None:
    x = torch.full((3, 2, 28, 30), 0.5, dtype=torch.float64)
    move = squares._tiles(x, 1.0, draws(x)) - x
    assert torch.allclose(move.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (move[:, :, 1:26] != 0).all()
    assert (move[:, :, [0, 26, 27]] == 0).all()
    bump = bump_of(5)
    tile = move[0, 0, 1:6, 0:5] / move[0, 0, 1:6, 0:5].norm()
    assert any(torch.allclose(tile, sign * each) for sign in (-1, 1) for each in (bump, bump.T))


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.02), ("l2", 0.3)])
def test_square_breaks_about_as_many_as_torchattacks(norm: Any, radius: float) -> None:
    import torchattacks

    x = images(64, seed=1)
    y = NET(x).argmax(1)
    ours = square(View(NET), x, y, Threat(norm, radius), draws(x), queries=60).images
    name = {"linf": "Linf", "l2": "L2"}[norm]
    theirs = torchattacks.Square(NET, norm=name, eps=radius, n_queries=59)(x, y)
    # Of 64: two standard deviations of the difference of two counts are at most 11.
    assert 10 < (count := int(broken(ours, y).sum())) < 60
    assert count >= int(broken(theirs, y).sum()) - 11


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_drops_what_is_broken_counts_its_queries_and_leaves_wrong_images(norm: Any) -> None:
    threat = Threat(norm, 0.03 if norm == "linf" else 0.3)
    y = torch.where(torch.arange(len(X)) < 3, (Y + 1) % 5, Y)
    view, counter = instrumented(View(NET), len(X))
    found = square(view, X, y, threat, draws(X), queries=80).images
    won = broken(found, y)
    assert torch.equal(found[:3], X[:3])
    assert (counter.forwards[:3] == 1).all()
    assert won[3:].sum() in range(2, len(X) - 3)
    assert (counter.forwards[~won] == 81).all()
    assert (counter.forwards[3:][won[3:]] < 81).all()
    assert (counter.backwards == 0).all()
    # Alone, with the same draws, an example spends what it spent in company.
    for i in (3, 9):
        view, alone = instrumented(View(NET), 1)
        noise = Noise("test", torch.tensor([i]), dtype=X.dtype)
        again = square(view, X[i : i + 1], y[i : i + 1], threat, noise, queries=80).images
        assert alone.forwards == counter.forwards[i]
        assert torch.allclose(again[0], found[i], atol=1e-6)


@pytest.mark.parametrize(("scale", "level"), [(1.0, -300.0), (700 / 3, 0.0), (700 / 3, -5000.0)])
def test_square_is_right_on_negative_logits_and_huge_gaps_and_never_writes_into_them(
    scale: float, level: float
) -> None:
    plane = Halfspace(Shape(3, 5, 4, 4)).requires_grad_(False)
    x, y = plane.examples(8)
    answers: list[tuple[Tensor, Tensor]] = []

    def logits(z: Images) -> Tensor:
        answer = scale * plane(z) + level
        answers.append((answer, answer.clone()))
        return answer

    view = View(logits, centred=False)
    threat = Threat("linf", 1.3 * float(plane.least(x, "linf").max()))
    found = square(view, x, y, threat, draws(x), queries=200).images
    assert (plane(found).argmax(1) != y).all()
    assert all(torch.equal(answer, copy) for answer, copy in answers)


def test_square_reaches_targets_and_averages_the_answers_of_a_random_defense() -> None:
    def fifths(z: Images) -> Tensor:
        return 10 * z.flatten(1)[:, :125].unflatten(1, (5, 25)).mean(2)

    y = fifths(X).argmax(1)
    target = (y + 2) % 5
    view = replace(View(fifths), target=target)
    found = square(view, X, y, Threat("linf", 0.5), draws(X), queries=300).images
    assert (fifths(found).argmax(1) == target).all()
    several = View(lambda z: torch.stack([NET(z) - 1, NET(z) + 1]))
    threat = Threat("linf", 0.02)
    one, other = (square(view, X, Y, threat, draws(X), queries=40).images for view in (View(NET), several))
    assert torch.equal(one, other)


def test_square_refuses_settings_that_cannot_be() -> None:
    refused("square", "queries: expected a number of 1 or more, found 0", queries=0)
    refused("square", "p_init: expected a number of 1 or less, found 1.5", p_init=1.5)


# --- the search of BPDA and NES -------------------------------------------------------------------------


def lone(net: Any, x: Images, y: int, pull: Any = None, **params: Any) -> tuple[list[Images], Images | None]:
    """Return every iterate of the search for one image, by plain loops, and the nearest success."""
    pull = pull or net
    lam, low, high = params["weight"], 0.0, math.inf
    walked, best, least = [], None, math.inf
    for _ in range(params["searches"]):
        z, ever = x.clone(), False
        for t in range(1, params["steps"] + 2):
            walked.append(z.clone())
            u = z.clone().requires_grad_()
            wrong = torch.cat([net(u[None])[0, :y], net(u[None])[0, y + 1 :]]).max() - net(u[None])[0, y]
            if wrong > 0:
                ever = True
                if (far := float((z - x).norm())) < least:
                    best, least = z.clone(), far
            if t > params["steps"]:
                break
            slope = torch.zeros_like(z)
            if wrong < 0:
                logits = pull(u[None])[0]
                others = torch.cat([logits[:y], logits[y + 1 :]]).max()
                (slope,) = torch.autograd.grad(logits[y] - others, u)
            share = t if params["schedule"] == "growing" else params["steps"] - t + 1
            eta = params["step_size"] * share / params["steps"]
            z = (z - eta * torch.sign(2 * (z - x) + lam * slope)).clamp(0, 1)
        high, low = (min(high, lam), low) if ever else (high, max(low, lam))
        lam = lam * 10 if math.isinf(high) else (low + high) / 2
    return walked, best


SEARCH: dict[str, Any] = {
    "steps": 12,
    "step_size": 0.03,
    "schedule": "growing",
    "searches": 4,
    "weight": 0.02,
}


@pytest.mark.parametrize("schedule", ["growing", "falling"])
def test_bpda_cw_on_the_identity_is_signed_descent_on_the_objective_of_cw(schedule: Any) -> None:
    net, x = deepcopy(NET).double(), X.double()[:6]
    params = SEARCH | {"schedule": schedule}
    seen: list[Images] = []

    def logits(z: Images) -> Tensor:
        seen.append(z.detach().clone())
        return net(z)

    crafted = bpda_cw(View(logits), x, Y[:6], Threat("l2"), draws(x), **params)
    walks = [lone(net, x[i], int(Y[i]), **params) for i in range(6)]
    # The image itself is asked first, once for all searches.
    assert len(seen) == 1 + 4 * 13
    for i, (walk, best) in enumerate(walks):
        for ours, theirs in zip(seen[1:], walk, strict=True):
            assert torch.allclose(ours[i], theirs, atol=1e-9)
        assert best is not None
        assert torch.allclose(crafted.images[i], best, atol=1e-9)
    # lambda was another for different images.
    assert len({tuple(round(float(z[i].sum()), 6) for z in seen[14:]) for i in range(6)}) == 6


def test_steps_of_bpda_cw_grow_as_printed_or_fall() -> None:
    grown = [signed_penalty.length_at(t, 500, 0.04, "growing") for t in (1, 250, 500)]
    assert grown == pytest.approx([0.04 / 500, 0.02, 0.04])
    fallen = [signed_penalty.length_at(t, 500, 0.04, "falling") for t in range(1, 501)]
    assert fallen == pytest.approx(
        [signed_penalty.length_at(t, 500, 0.04, "growing") for t in range(500, 0, -1)]
    )


def test_bpda_cw_takes_the_gradient_where_the_defense_looks() -> None:
    """Through a view that differentiates its defense as the identity, the slope is the classifier's there."""
    net, x = deepcopy(NET).double(), X.double()[:3]

    def cleaned(z: Images) -> Images:
        return (z * 8).round() / 8

    view = View(lambda z: net(z + (cleaned(z) - z).detach()))
    crafted = bpda_cw(view, x, Y[:3], Threat("l2"), draws(x), **SEARCH)
    for i in range(3):
        y = int(net(cleaned(x[i : i + 1])).argmax())
        if y != Y[i]:
            assert torch.equal(crafted.images[i], x[i])
            continue
        defended = lambda z: net(z + (cleaned(z) - z).detach())  # noqa: E731
        _, best = lone(defended, x[i], y, **SEARCH)
        assert torch.allclose(crafted.images[i], x[i] if best is None else best, atol=1e-9)


def test_lambda_is_searched_for_each_example_and_the_nearest_success_is_kept() -> None:
    """One value; label 1 from 0.2 away on, with slopes that need a small, a large and an endless lambda."""
    slopes = torch.tensor([10.0, 0.05, 1e-7], dtype=torch.float64)

    def logits(z: Images) -> Tensor:
        margin = (z.flatten(1)[:, 0] - 0.7) * slopes.repeat(len(z) // 3)
        return torch.stack([torch.zeros_like(margin), margin], 1)

    x = torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.int64)
    far = {}
    for searches in (1, 2, 3, 6):
        params: dict[str, Any] = {"steps": 200, "step_size": 0.02, "searches": searches, "weight": 0.25}
        crafted = bpda_cw(View(logits), x, y, Threat("l2"), draws(x), schedule="falling", **params)
        far[searches] = crafted.images.flatten() - 0.5
        assert torch.equal(crafted.notes["failed"], far[searches] == 0)
    # It goes on while 2 * 0.2 < lambda * slope: from the first search, from the third (25), never.
    assert [bool(far[n][0] > 0.2) for n in far] == [True] * 4
    assert [bool(far[n][1] > 0.2) for n in far] == [False, False, True, True]
    assert not any(far[n][2] for n in far)
    assert (far[6][:2] < 0.2 + 0.005).all()
    for fewer, more in ((1, 2), (2, 3), (3, 6)):
        assert (far[more][0] <= far[fewer][0]).all()


@pytest.mark.parametrize("attack", [bpda_cw, nes], ids=lambda attack: attack.__name__)
def test_the_search_leaves_wrong_images_notes_what_failed_and_counts(attack: Any) -> None:
    x = X[:6]
    y = torch.where(torch.arange(6) < 2, (Y[:6] + 1) % 5, Y[:6])
    view, counter = instrumented(View(NET), 6, "gradient" if attack is bpda_cw else "score")
    params: dict[str, Any] = {"steps": 5, "searches": 2, "step_size": 1e-4}
    if attack is nes:
        params["samples"] = 8
    crafted = attack(view, x, y, Threat("l2"), draws(x), **params)
    assert torch.equal(crafted.images, x)
    assert crafted.notes["failed"].tolist() == [False] * 2 + [True] * 4
    assert (counter.forwards[:2] == 1).all()
    each = 1 if attack is bpda_cw else 9
    assert (counter.forwards[2:] == 1 + 2 * (5 * each + 1)).all()
    assert (counter.backwards[2:] == (10 if attack is bpda_cw else 0)).all()


def test_kappa_asks_for_a_margin_and_costs_distance() -> None:
    far = []
    for kappa in (0.0, 0.5, 1.0):
        crafted = bpda_cw(View(NET), X, Y, Threat("l2"), draws(X), steps=60, step_size=0.05, kappa=kappa)
        won = ~crafted.notes["failed"]
        assert won.sum() > 10
        assert (objective(View(NET), NET(crafted.images), Y, "margin")[won] >= kappa).all()
        far.append(Threat("l2").distance(X, crafted.images)[won].median())
    assert far == sorted(far)
    assert far[0] < far[2]


def guessed(loss: Any, z: Images, samples: int, sigma: float = 0.1) -> Tensor:
    return estimate(loss, z, draws(z), samples=samples, sigma=sigma)


def test_the_estimate_of_nes_has_no_bias_on_a_linear_loss_and_its_variance_falls_as_1_over_n() -> None:
    weight = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.full((400, 1, 6, 6), 0.5, dtype=torch.float64)
    spread = {}
    for samples in (10, 40, 160):
        error = guessed(lambda p: (p * weight).flatten(1).sum(1), z, samples) - weight
        spread[samples] = float(error.square().mean())
        # n / 2 independent pairs, each with a variance of |w|^2 + w_i^2.
        wanted = float((weight.square().sum() + weight.square()).mean()) * 2 / samples
        assert spread[samples] == pytest.approx(wanted, rel=0.06)
        assert float(error.mean(0).abs().max()) < 4.5 * math.sqrt(wanted / 400)
    assert spread[10] / spread[160] == pytest.approx(16, rel=0.1)


def test_opposite_probes_cancel_constant_and_even_terms_exactly_and_not_odd_ones() -> None:
    z = torch.full((2000, 1, 1, 1), 0.25, dtype=torch.float64)

    def power(k: int, about: float) -> Any:
        return lambda p: (p.flatten(1)[:, 0] - about) ** k

    for k in (0, 2, 4):
        assert guessed(power(k, 0.25), z, 10).abs().max() < 1e-12
    # The mean of the estimate on a cube is 3 z^2 + 3 sigma^2.
    found = guessed(power(3, 0.0), z, 200, sigma=0.5)
    assert float(found.mean()) == pytest.approx(3 * 0.25**2 + 3 * 0.5**2, rel=0.01)


def test_the_estimate_of_nes_is_the_same_in_parts_and_follows_a_network_s_gradient() -> None:
    z = X.double()[:4].requires_grad_()
    net = deepcopy(NET).double()
    (gradient,) = torch.autograd.grad(objective(View(net), net(z), Y[:4], "margin").sum(), z)
    found = guessed(lambda p: objective(View(net), net(p), Y[:4], "margin"), z.detach(), 4000, sigma=1e-3)
    # An expected cosine of 1 / sqrt(1 + (D - 1) / pairs), of 128 values.
    cosine = torch.cosine_similarity(found.flatten(1), gradient.flatten(1))
    assert float(cosine.mean()) == pytest.approx(1 / math.sqrt(1 + 127 / 2000), abs=0.01)
    assert ((found.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1) - 1).abs() < 0.15).all()


def test_nes_finds_what_bpda_cw_finds_a_little_farther() -> None:
    params: dict[str, Any] = {"steps": 40, "step_size": 0.04, "searches": 4}
    x = X[:8]
    near = bpda_cw(View(NET), x, Y[:8], Threat("l2"), draws(x), **params)
    seen = nes(View(NET), x, Y[:8], Threat("l2"), draws(x), samples=100, sigma=0.02, **params)
    assert not (near.notes["failed"] | seen.notes["failed"]).any()
    one, other = (Threat("l2").distance(x, each.images).median() for each in (near, seen))
    assert one < other < 2 * one


@pytest.mark.parametrize(
    ("name", "message", "params"),
    [
        ("bpda-cw", "steps: expected a number of 1 or more, found 0", {"steps": 0}),
        ("bpda-cw", "searches: expected a number of 1 or more, found 0", {"searches": 0}),
        ("bpda-cw", "weight: expected a number above 0, found 0.0", {"weight": 0.0}),
        ("bpda-cw", "kappa: expected a number of 0 or more, found -1.0", {"kappa": -1.0}),
        ("nes", "samples come in pairs: their number must be even, not 5", {"samples": 5}),
        ("nes", "sigma: expected a number above 0, found 0.0", {"sigma": 0.0}),
        ("localsearch", "t: expected a number of 1 or more, found 0", {"t": 0}),
        ("localsearch", "r: expected a number above 0, found -1.0", {"r": -1.0}),
        ("boundary", "directions: expected a number of 1 or more, found 0", {"directions": 0}),
        ("boundary", "step_adaptation: expected a number above 1, found 1.0", {"step_adaptation": 1.0}),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, message: str, params: dict[str, Any]) -> None:
    refused(name, message, **params)


# --- LocalSearch ----------------------------------------------------------------------------------------


def plain_localsearch(net: Any, x: Images, y: int, noise: Noise, rounds: int, **params: Any) -> Images | None:
    """Return the first success for one image, pixel by pixel, with the random orders of `noise`."""
    r, p, d, t = (params[name] for name in "rpdt")
    height, width = x.shape[1:]
    z = x.clone()
    near = [(i, j) for i in range(height) for j in range(width)]
    tried = height * width // 10
    for _ in range(rounds):
        order = noise.uniform((height * width,))[0]
        near = sorted(near, key=lambda at: float(order[at[0] * width + at[1]]))[:tried]
        score = {}
        for i, j in near:
            probe = z.clone()
            for k in range(len(x)):
                v = float(z[k, i, j]) - 0.5
                probe[k, i, j] = 0.5 + max(-0.5, min(0.5, p * math.copysign(1, v) if v else 0.0))
            logits = net(probe[None])[0]
            score[i, j] = float(logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).max())
        chosen = sorted(near, key=score.__getitem__)[:t]
        for i, j in chosen:
            for k in range(len(x)):
                v = r * (float(z[k, i, j]) - 0.5)
                z[k, i, j] = 0.5 + (v - 1 if v > 0.5 else v + 1 if v < -0.5 else v)
        if net(z[None]).argmax() != y:
            return z
        near = [
            (i, j)
            for i in range(height)
            for j in range(width)
            if any(abs(i - a) <= d and abs(j - b) <= d for a, b in chosen)
        ]
        tried = 128
    return None


@pytest.mark.parametrize("params", [{"d": 5, "t": 5}, {"d": 1, "t": 2, "r": 1.3}, {"d": 2, "t": 3, "p": 0.2}])
def test_localsearch_is_what_a_plain_loop_does(params: dict[str, Any]) -> None:
    params = {"r": 1.5, "p": 10.0} | params
    net, x = deepcopy(NET).double(), X.double()[:8]
    x = torch.where(x < 0.2, 0.0, x)  # Black pixels wrap around, grey ones stay.
    x[:, :, 3, 3] = 0.5
    y = net(x).argmax(1)
    crafted = localsearch(View(net), x, y, Threat("l0"), draws(x), rounds=30, **params)
    for i in range(8):
        noise = Noise("test", torch.tensor([i]), dtype=torch.float64)
        wanted = plain_localsearch(net, x[i], int(y[i]), noise, 30, **params)
        assert bool(crafted.notes["failed"][i]) == (wanted is None)
        assert torch.allclose(crafted.images[i], x[i] if wanted is None else wanted, atol=1e-9)
    assert (~crafted.notes["failed"]).sum() >= 2


def bright(z: Images) -> Tensor:
    """Answer 1 where ten of the pixels are far from black, as a digit classifier might."""
    margin = 40 * ((z.amax(1) > 0.6).flatten(1).to(z.dtype).sum(1) - 9.5) + z.flatten(1).sum(1)
    return torch.stack([-margin, margin], 1) / 2


def test_localsearch_accumulates_changes_keeps_probes_in_the_box_and_counts() -> None:
    x = 0.1 * images(4, shape=(2, 12, 12), seed=3)
    y = torch.zeros(4, dtype=torch.int64)
    seen: list[Images] = []

    def logits(z: Images) -> Tensor:
        seen.append(z)
        return bright(z)

    view, counter = instrumented(View(logits), 4)
    # Probes of black pixels are black: the ranking is by the small part of the margin.
    crafted = localsearch(view, x, y, Threat("l0"), draws(x), r=1.5, t=5)
    assert all(((z >= 0) & (z <= 1)).all() for z in seen)
    assert not crafted.notes["failed"].any()
    changed = (crafted.images != x).any(1).flatten(1).sum(1)
    assert (changed >= 10).all()
    assert torch.equal(Threat("l0").distance(x, crafted.images), changed.double())
    # 14 probes first (a tenth of 144), then 128; and a look after each round.
    assert (((counter.forwards - 1 - 15) % 129) == 0).all()


def test_localsearch_by_margin_ranks_where_the_published_probability_is_blind() -> None:
    """A gap of 700 nats: in the softmax every probe scores 1, and which pixels are changed is chance."""

    def logits(z: Images) -> Tensor:
        margin = 200 * z.flatten(1)[:, ::10].sum(1) - 200 * 20 * 0.7 - 700
        return torch.stack([-margin, margin], 1) / 2

    x = torch.full((6, 1, 14, 14), 0.7)
    y = torch.zeros(6, dtype=torch.int64)
    far = {}
    for score in ("margin", "probability"):
        found = localsearch(View(logits), x, y, Threat("l0"), draws(x), t=1, rounds=60, score=score)
        far[score] = int((~found.notes["failed"]).sum())
    assert far["margin"] >= 5
    assert far["probability"] == 0


def test_localsearch_leaves_failures_and_wrong_images_unchanged() -> None:
    y = torch.where(torch.arange(len(X)) < 4, (Y + 1) % 5, Y)
    view, counter = instrumented(View(NET), len(X))
    crafted = localsearch(view, X, y, Threat("l0"), draws(X), rounds=1, t=1)
    failed = crafted.notes["failed"]
    assert not failed[:4].any()
    assert failed.sum() > 3
    assert torch.equal(crafted.images[:4], X[:4])
    assert torch.equal(crafted.images[failed], X[failed])
    assert broken(crafted.images, y)[~failed].all()
    assert counter.forwards.tolist() == [1] * 4 + [1 + 6 + 1] * 12


# --- Boundary -------------------------------------------------------------------------------------------


def answers(net: Any, classes: int = 5) -> View:
    """Return what an attacker sees who sees answers alone."""
    return View(lambda z: nn.functional.one_hot(net(z).argmax(1), classes).to(z.dtype), centred=False)


def test_the_walk_never_goes_back_and_every_iterate_is_adversarial(monkeypatch: pytest.MonkeyPatch) -> None:
    trail: list[tuple[Tensor, Tensor]] = []
    original = walks._Walk.step

    def step(walk: Any, *args: Any) -> None:
        original(walk, *args)
        trail.append((walk.z.clone(), walk.distance.clone()))

    monkeypatch.setattr(walks._Walk, "step", step)
    x = X[:6]
    crafted = boundary(answers(NET), x, Y[:6], Threat("l2"), draws(x), steps=300)
    assert len(trail) == 300
    for (z, far), (_, farther) in zip(trail[1:], trail, strict=False):
        assert (far <= farther).all()
        assert broken(z, Y[:6]).all()
        assert torch.allclose(Threat("l2").distance(x.double(), z.double()), far)
    assert torch.equal(crafted.images, trail[-1][0])
    assert trail[-1][1].median() < 0.8 * trail[0][1].median()


def test_proposals_are_orthogonal_on_the_sphere_and_a_step_nearer() -> None:
    x = torch.full((5, 1, 6, 6), 0.5, dtype=torch.float64)
    away = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 30
    walk = walks._Walk.begin(torch.arange(5), x, torch.zeros(5), x + away, 0.2, 0.05)
    walk.spherical = walk.spherical * torch.arange(1, 6)
    candidate, beside = walk.propose(draws(x).normal((1, 6, 6)))
    radius = away.flatten(1).norm(dim=1)
    assert torch.allclose((beside - x).flatten(1).norm(dim=1), radius)
    cosine = torch.cosine_similarity((beside - x).flatten(1), away.flatten(1))
    assert torch.allclose(cosine, 1 / (1 + (0.2 * torch.arange(1, 6)) ** 2).sqrt().double())
    assert torch.allclose(candidate - x, 0.95 * (beside - x))


def test_lengths_follow_the_measured_successes() -> None:
    """Windows of 100 and 30; 0.2 to 0.5 on the sphere, towards the image 0.1 to 0.25, or 0.2 to 0.5."""
    x = torch.zeros(6, 1, 1, 1)
    rates = torch.tensor([0.12, 0.19, 0.3, 0.5, 0.51, 0.9])
    for conditional, wanted in (
        (False, [1, 1, 1.5, 1.5, 1.5, 1.5]),
        (True, [1 / 1.5] * 2 + [1, 1, 1.5, 1.5]),
    ):
        walk = walks._Walk.begin(torch.arange(6), x, torch.zeros(6), x, 1.0, 1.0)
        for _ in range(29):
            walks._note(walk.towards, walk.stepped, torch.arange(6), torch.arange(6) >= 0)
        walk.adapt(1.5, conditional)
        assert (walk.source == 1).all(), "the window is not full"
        walk.towards[:] = rates[:, None]
        walk.stepped[:] = 30
        walk.adapt(1.5, conditional)
        assert walk.source.tolist() == pytest.approx(wanted)
        assert torch.equal(walk.stepped == 0, walk.source != 1)
        assert (walk.spherical == 1).all()
        walk.source[:] = 1
        walk.stepped[:] = 0
        walk.sphere[:] = rates[:, None]
        walk.sphered[:] = torch.tensor([100, 100, 100, 100, 100, 99])
        walk.adapt(1.5, conditional)
        assert walk.spherical.tolist() == pytest.approx([1 / 1.5, 1 / 1.5, 1, 1, 1.5, 1])
        assert torch.equal(walk.source, walk.spherical)


def test_windows_forget_the_oldest() -> None:
    window, count = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for value in (True, True, True, False, False):
        walks._note(window, count, torch.tensor([1]), torch.tensor([value]))
    assert window.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert count.tolist() == [0, 5]


def test_boundary_ends_no_farther_than_foolbox() -> None:
    import foolbox

    x = images(48, seed=5)
    y = NET(x).argmax(1)
    ours = boundary(answers(NET), x, y, Threat("l2"), draws(x), steps=600).images
    model = foolbox.PyTorchModel(NET, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    theirs = foolbox.attacks.BoundaryAttack(steps=600).run(model, x, foolbox.criteria.Misclassification(y))
    one, other = (Threat("l2").distance(x, z) for z in (ours, theirs))
    assert broken(ours, y).all()
    assert float(one.median()) < 1.1 * float(other.median())


def shade(z: Images) -> Tensor:
    """Answer 1 where an image is not dark, as any noise is not."""
    bright = z.flatten(1).mean(1) - 0.3
    return torch.stack([-bright, bright], 1)


def test_one_example_without_a_start_takes_nobody_down() -> None:
    """Noise is never dark: what is bright has no start. Foolbox raises for the whole batch."""
    import foolbox

    x, y = 0.3 * images(8), torch.zeros(8, dtype=torch.int64)
    x[5], y[5] = x[5] + 0.7, 1
    view, counter = instrumented(answers(shade, 2), 8, "decision")
    params: dict[str, Any] = {"steps": 60, "starts": 20}
    crafted = boundary(view, x, y, Threat("l2"), draws(x), **params)
    assert crafted.notes["failed"].tolist() == [i == 5 for i in range(8)]
    assert torch.equal(crafted.images[5], x[5])
    assert counter.forwards[5] == 21
    others = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    assert (shade(crafted.images[others]).argmax(1) == 1).all()
    noise = draws(x).select(others)
    alone = boundary(answers(shade, 2), x[others], y[others], Threat("l2"), noise, **params)
    assert torch.allclose(crafted.images[others], alone.images, atol=1e-6)
    model = foolbox.PyTorchModel(Shade().eval(), bounds=(0, 1), device="cpu")
    start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=50)
    attack = foolbox.attacks.BoundaryAttack(init_attack=start, steps=60)
    with (
        pytest.raises(ValueError, match="init_attack failed"),
        pytest.warns(UserWarning, match="failed to draw"),
    ):
        attack.run(model, x, foolbox.criteria.Misclassification(y))


class Shade(nn.Module):
    """`shade` as a module."""

    def forward(self, z: Images) -> Tensor:
        return shade(z)


def test_boundary_counts_its_queries_and_leaves_wrong_images() -> None:
    y = torch.where(torch.arange(len(X)) < 3, (Y + 1) % 5, Y)
    view, counter = instrumented(answers(NET), len(X), "decision")
    crafted = boundary(view, X, y, Threat("l2"), draws(X), steps=40)
    assert torch.equal(crafted.images[:3], X[:3])
    assert not crafted.notes["failed"].any()
    assert (counter.forwards[:3] == 1).all()
    # The image, one draw or more, up to 49 blends, and 40 steps of which 4 are measured on the sphere.
    spent = counter.forwards[3:] - 1 - 44
    assert (spent >= 2).all()
    assert (spent < 70).all()


def test_a_step_of_foolbox_1_tries_up_to_so_many_directions() -> None:
    x = X[:6]
    spent, far = {}, {}
    for directions in (1, 5):
        view, counter = instrumented(answers(NET), 6, "decision")
        crafted = boundary(
            view, x, Y[:6], Threat("l2"), draws(x), steps=60, directions=directions, conditional=True
        )
        spent[directions], far[directions] = counter.forwards, Threat("l2").distance(x, crafted.images)
    assert (spent[5] > spent[1]).all()
    assert (spent[5] <= 5 * 66 + 1100).all()
    assert far[5].median() < far[1].median()


def test_boundary_with_a_refusal_has_acceptance_in_its_goal() -> None:
    """Between the labels lies a land of refusals: an answer that is refused is no success."""
    plane = Halfspace(Shape(1, 4, 4, 2)).requires_grad_(False)
    x, y = plane.examples(6, margin=1.0)

    def decided(z: Images) -> Tensor:
        margin = plane.margin(z)
        label = torch.where(margin.abs() < 0.5, 2, (margin > 0).long())
        return nn.functional.one_hot(label, 3).to(z.dtype)

    params: dict[str, Any] = {"steps": 400, "spherical_step": 0.1, "source_step": 0.05}
    aware = boundary(View(decided, refusal=True, centred=False), x, y, Threat("l2"), draws(x), **params)
    assert (decided(aware.images).argmax(1) == 1 - y).all()
    plain = boundary(answers(plane, 2), x, y, Threat("l2"), draws(x), **params)
    assert (decided(plain.images).argmax(1) == 2).all(), "who ignores refusals stops among them"
    assert (Threat("l2").distance(x, aware.images) > Threat("l2").distance(x, plain.images)).all()


def test_a_farther_proposal_is_refused_though_it_is_adversarial(monkeypatch: pytest.MonkeyPatch) -> None:
    x = 0.2 * images(3)
    y = torch.zeros(3, dtype=torch.int64)
    far = torch.ones_like(x)
    monkeypatch.setattr(walks._Walk, "propose", lambda walk, _: (far[walk.rows], far[walk.rows]))
    found = boundary(answers(shade, 2), x, y, Threat("l2"), draws(x), steps=5).images
    assert (shade(found).argmax(1) == 1).all()
    assert (found != far).flatten(1).all(1).all()


def test_a_success_of_the_last_step_counts() -> None:
    x = 0.5 * torch.ones(2, 1, 2, 2)
    plane = View(lambda z: torch.stack([0.6 - z.flatten(1).mean(1), z.flatten(1).mean(1) - 0.6], 1))
    y = torch.zeros(2, dtype=torch.int64)
    crafted = bpda_cw(plane, x, y, Threat("l2"), draws(x), steps=1, step_size=0.2, searches=1)
    assert torch.allclose(crafted.images, torch.full_like(x, 0.7))


def test_boundary_starts_from_a_guide_where_noise_is_refused() -> None:
    def decide(z: Images) -> Decision:
        # Noise has a spread within an image of about 0.3; images here are even.
        label = (z.flatten(1).mean(1) > 0.5).long()
        spread = z.flatten(1).std(1)
        return Decision(label, spread > 0.2, -spread)

    y = torch.arange(6) % 2
    x = torch.where(y == 1, 0.8, 0.3)[:, None, None, None].expand(-1, 1, 6, 6).clone().double()
    x += 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The black and the white image are both wrong for someone; the white one is farther from class 0.
    guides = torch.stack([torch.full((1, 6, 6), level) for level in (0.1, 0.9)])
    found = {}
    for name, given in (("none", None), ("both", guides)):
        asked = answers_only(decide, 2, given)
        view = instrument(asked, QueryCounter.of(6, torch.device("cpu")), "decision", target=None, exact=True)
        noise = Noise("guided", torch.arange(6), dtype=torch.float64)
        found[name] = boundary(view, x, y, Threat("l2"), noise, steps=200, starts=5)
    assert found["none"].notes["failed"].all()
    assert torch.equal(found["none"].images, x)
    answer = decide(found["both"].images)
    assert not found["both"].notes["failed"].any()
    assert (answer.label != y).all()
    assert not answer.rejected.any()
    # It went on from the guide, towards the image.
    far = Threat("l2").distance(x, guides[1 - y].double())
    assert (Threat("l2").distance(x, found["both"].images) < 0.95 * far).all()

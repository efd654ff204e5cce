"""Attacks that see scores or answers alone, and the search that BPDA and NES share: against closed forms,
independent loops and libraries.
"""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import square as squares
from attacks.square import square
from bench.errors import InputError
from bench.losses import objective
from bench.noise import Noise
from bench.protocols import Images, Labels, Shape, Threat, View
from bench.referee import Meter, watch
from bench.registry import ATTACKS, Access
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


def watched(view: View, n: int, access: Access = "score", *, final: bool = True) -> tuple[View, Meter]:
    meter = Meter.of(n, torch.device("cpu"))
    return watch(view, meter, access, target=None, final=final), meter


NET, X = network(), images()
Y = NET(X).argmax(1)


def broken(z: Images, y: Labels = Y) -> Tensor:
    return NET(z).argmax(1) != y


def refused(name: str, message: str, **params: Any) -> None:
    entry = ATTACKS[name]
    assert entry.check is not None
    entry.check(entry.schema().model_dump(), Shape(1, 28, 28, 10))
    with pytest.raises(InputError, match=message):
        entry.check(entry.schema(**params).model_dump(), Shape(1, 28, 28, 10))


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

    found = square(View(logits, final=False), x, Y, threat, draws(x), queries=queries, **params).images
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
    view, meter = watched(View(NET), len(X))
    found = square(view, X, y, threat, draws(X), queries=80).images
    won = broken(found, y)
    assert torch.equal(found[:3], X[:3])
    assert (meter.forwards[:3] == 1).all()
    assert won[3:].sum() in range(2, len(X) - 3)
    assert (meter.forwards[~won] == 81).all()
    assert (meter.forwards[3:][won[3:]] < 81).all()
    assert (meter.backwards == 0).all()
    # Alone, with the same draws, an example spends what it spent in company.
    for i in (3, 9):
        view, alone = watched(View(NET), 1)
        noise = Noise("test", torch.tensor([i]), dtype=X.dtype)
        again = square(view, X[i : i + 1], y[i : i + 1], threat, noise, queries=80).images
        assert alone.forwards == meter.forwards[i]
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
    refused("square", "queries must be 1 or more, not 0", queries=0)
    refused("square", "p_init must be a share above 0 and at most 1, not 1.5", p_init=1.5)

"""Attacks that begin at stored images, where the harness gives some, in place of starts of their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.cw_linf import cw_linf
from attacks.pgd import pgd
from bench import Images, Threat, View
from bench.noise import Noise
from bench.registry import ATTACKS, discover

ATTACKERS = pytest.mark.parametrize("attack", [pgd, apgd, cw_linf])
LINF = Threat("linf", 0.1)


def net() -> nn.Module:
    draw = torch.Generator().manual_seed(3)
    made = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 4)).double()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 3
    return made.requires_grad_(False)


def images(n: int = 12) -> Images:
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def draws(n: int) -> Noise:
    return Noise("warm", torch.arange(n))


class Watched:
    """A network that keeps what it was asked about."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.asked = network, list[Tensor]()

    def __call__(self, z: Tensor) -> Tensor:
        self.asked.append(z.detach().clone())
        answer: Tensor = self.network(z)
        return answer


def corner(x: Images, threat: Threat) -> Images:
    """Return a corner of each ball, the same way for each pixel at an even place."""
    move = torch.ones_like(x)
    move[..., ::2] = -1
    return threat.project(x, x + 2 * threat.radius * move)


@ATTACKERS
def test_the_first_points_of_the_walk_are_the_stored_ones_brought_into_the_ball(attack: Any) -> None:
    x, network = images(), Watched(net())
    y = network(x).argmax(1)
    far = x + 3 * (corner(x, LINF) - x)
    network.asked.clear()
    attack(View(network, exact=False, starts=far), x, y, LINF, draws(len(x)), steps=3)
    began = next(points for points in network.asked if not torch.equal(points, x))
    assert torch.equal(began, LINF.project(x, far))


@ATTACKERS
def test_a_stored_success_is_found_again_at_once_and_returned_as_it_is(attack: Any) -> None:
    x, network = images(), net()
    y = network(x).argmax(1)
    cold = attack(View(network), x, y, Threat("linf", 0.3), draws(len(x)), steps=40).images
    broken = network(cold).argmax(1) != y
    assert int(broken.sum()) >= 3
    watched = Watched(network)
    view = View(watched, starts=cold[broken])
    warm = attack(view, x[broken], y[broken], Threat("linf", 0.3), draws(int(broken.sum())), steps=40)
    assert torch.equal(warm.images, cold[broken])
    # The stored images, and the clean ones, which are left unmoved if they are wrong themselves.
    assert len(watched.asked) == 2


@ATTACKERS
def test_restarts_from_one_point_are_one_walk(attack: Any) -> None:
    x, network = images(), net()
    y = network(x).argmax(1)
    many, one = Watched(network), Watched(network)
    stored = corner(x, LINF)
    several = attack(View(many, exact=False, starts=stored), x, y, LINF, draws(len(x)), steps=5, restarts=4)
    single = attack(View(one, exact=False, starts=stored), x, y, LINF, draws(len(x)), steps=5)
    assert torch.equal(several.images, single.images)
    assert sum(map(len, many.asked)) == sum(map(len, one.asked))


@ATTACKERS
def test_examples_that_are_dropped_take_their_starts_with_them(attack: Any) -> None:
    x, network = images(24), net()
    y = network(x).argmax(1)
    threat = Threat("linf", 0.15)
    stored = corner(x, threat)
    together = attack(View(network, starts=stored), x, y, threat, draws(24), steps=12).images
    broken = network(together).argmax(1) != y
    assert 0 < int(broken.sum()) < 24, "some are dropped and some go on"
    for row in range(24):
        only = torch.tensor([row])
        alone = attack(
            View(network, starts=stored[only]), x[only], y[only], threat, Noise("warm", only), steps=12
        ).images
        assert torch.allclose(alone, together[only], atol=1e-12)


def test_pgd_leaves_what_is_wrong_already_where_it_is() -> None:
    x, network = images(), net()
    y = (network(x).argmax(1) + 1) % 4
    left = pgd(View(network, starts=corner(x, LINF)), x, y, LINF, draws(len(x)), steps=3)
    wrong = network(corner(x, LINF)).argmax(1) != y
    assert wrong.any()
    assert torch.equal(left.images[wrong], x[wrong])


def test_a_view_takes_starts_along_when_examples_are_chosen() -> None:
    stored = images()
    rows = torch.tensor([7, 2])
    chosen = replace(View(net()), starts=stored).select(rows)
    assert chosen.starts is not None
    assert torch.equal(chosen.starts, stored[rows])
    assert View(net()).select(rows).starts is None


def test_attacks_that_begin_at_stored_images_say_so() -> None:
    discover()
    assert [name for name in ATTACKS if ATTACKS[name].starts == "any"] == [
        "apgd",
        "cw-linf",
        "fast-worst",
        "pgd",
    ]

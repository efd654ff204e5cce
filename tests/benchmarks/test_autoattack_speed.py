"""Auto-PGD, FAB and AutoAttack against torchattacks' parts, at equal settings and on the same robust network.

The network is a small one, trained on digits against an adversary in seconds. `BENCH_ROBUST`, as
``package.module:function``, names a function that returns another: the network, images (N, C, H, W) in
[0, 1], their labels, and the linf radius to attack with.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torchattacks
from scenes import keeping
from sklearn.datasets import load_digits
from torch import Tensor, autograd, nn
from torch.nn.functional import cross_entropy

from attacks.apgd import apgd
from attacks.apgd_t import apgd_t
from attacks.autoattack import autoattack
from attacks.fab import fab, fab_t
from bench.noise import Noise
from bench.protocols import Crafted, Images, Labels, Threat, View

THEIRS = {"linf": "Linf", "l2": "L2"}


class Setting(NamedTuple):
    """What is attacked."""

    net: nn.Module
    x: Images
    y: Labels
    radius: float

    def threat(self, norm: Any) -> Threat:
        """Return a threat that is as hard in either norm, roughly."""
        size = self.x[0].numel()
        return Threat(norm, self.radius * (1 if norm == "linf" else 0.35 * size**0.5))

    def standing(self, z: Images) -> Tensor:
        with torch.no_grad():
            right: Tensor = self.net(z).argmax(1) == self.y
        return right

    def draws(self) -> Noise:
        return Noise("speed", torch.arange(len(self.x)))

    def first(self, n: int) -> "Setting":
        return self._replace(x=self.x[:n], y=self.y[:n])

    def view(self) -> View:
        return View(self.net)


@pytest.fixture(scope="module")
def robust() -> Setting:
    if named := os.environ.get("BENCH_ROBUST"):
        module, _, function = named.partition(":")
        return Setting(*getattr(importlib.import_module(module), function)())
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = trained(x[:1400], y[:1400], radius=0.15)
    return Setting(net, x[1400:1656], y[1400:1656], 0.15)


def trained(x: Images, y: Labels, *, radius: float) -> nn.Module:
    """Return a network that learned from five steps of PGD on each batch (Madry et al. 2018)."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    threat, optimiser = Threat("linf", radius), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(64):
            clean, labels = x[rows], y[rows]
            z = threat.project(clean, clean + (2 * torch.rand_like(clean) - 1) * radius)
            for _ in range(5):
                z.requires_grad_()
                (gradient,) = autograd.grad(cross_entropy(net(z), labels), z)
                z = threat.project(clean, z.detach() + radius / 2 * gradient.sign())
            optimiser.zero_grad()
            cross_entropy(net(z), labels).backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


def library(attack: Any, setting: Setting, rows: Tensor | slice = slice(None)) -> Images:
    """Return what a library's attack finds; it seeds torch's global state."""
    with torch.random.fork_rng(devices=[]):
        found: Images = attack(setting.x[rows], setting.y[rows])
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd", "apgd-t"])
def test_apgd_against_torchattacks(norm: str, name: str, robust: Setting, race: Any) -> None:
    robust = robust.first(256 if name == "apgd" else 64)
    threat, found = robust.threat(norm), dict[str, Images]()
    ours: Callable[..., Crafted]
    if name == "apgd":
        ours, theirs = apgd, torchattacks.APGD
    else:
        ours, theirs = apgd_t, torchattacks.APGDT
    other = theirs(robust.net, norm=THEIRS[norm], eps=threat.radius, steps=100)

    def we() -> None:
        found["we"] = ours(robust.view(), robust.x, robust.y, threat, robust.draws()).images

    def they() -> None:
        found["they"] = library(other, robust)

    ratio = f"torchattacks' {name} over ours, {norm}, 100 steps, {len(robust.x)} images"
    race({"ours": we, "torchattacks": they}, over={ratio: ("torchattacks", "ours")}, rounds=3)
    stand = {who: int(robust.standing(z).sum()) for who, z in found.items()}
    assert stand["we"] <= stand["they"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_where_nothing_breaks_against_torchattacks(norm: str, robust: Setting, race: Any) -> None:
    kept = robust.standing(robust.x)
    held = robust._replace(x=robust.x[kept], y=robust.y[kept], radius=robust.radius / 1e4)
    threat = held.threat(norm)
    other = torchattacks.APGD(held.net, norm=THEIRS[norm], eps=threat.radius, steps=100)
    found: dict[str, Images] = {}
    race(
        keeping(
            found,
            {
                "ours": lambda: apgd(held.view(), held.x, held.y, threat, held.draws()).images,
                "torchattacks": lambda: library(other, held),
            },
        ),
        over={f"torchattacks' apgd over ours, {norm}, where nothing breaks": ("torchattacks", "ours")},
        rounds=15,
    )
    for name, images in found.items():
        assert held.standing(images).all(), f"{name} broke an example: there was less to do"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_against_torchattacks(norm: str, robust: Setting, race: Any) -> None:
    half = robust.first(128)
    threat, found = Threat(norm), dict[str, Images]()  # type: ignore[arg-type]
    # Whatever it finds is within its radius: it returns nothing else.
    other = torchattacks.FAB(half.net, norm=THEIRS[norm], eps=1e9, steps=100)

    def we() -> None:
        found["we"] = fab(half.view(), half.x, half.y, threat, half.draws()).images

    def they() -> None:
        found["they"] = library(other, half)

    ratio = f"torchattacks' fab over ours, {norm}, 100 steps, {len(half.x)} images"
    race({"ours": we, "torchattacks": they}, over={ratio: ("torchattacks", "ours")}, rounds=3)
    right = half.standing(half.x)
    far = {who: float(threat.distance(half.x, z)[right].median()) for who, z in found.items()}
    assert not half.standing(found["we"]).any()
    assert far["we"] <= far["they"] * 1.001


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_fab_within_a_radius_against_torchattacks(norm: str, robust: Setting, race: Any) -> None:
    half = robust.first(128)
    threat, found = half.threat(norm), dict[str, Images]()
    other = torchattacks.FAB(half.net, norm=THEIRS[norm], eps=threat.radius, steps=20, multi_targeted=True)

    def we() -> None:
        found["we"] = fab_t(half.view(), half.x, half.y, threat, half.draws(), steps=20).images

    def they() -> None:
        found["they"] = library(other, half)

    ratio = (
        f"torchattacks' fab-t over ours, {norm}, 20 steps, 9 classes, within a radius, {len(half.x)} images"
    )
    race({"ours": we, "torchattacks": they}, over={ratio: ("torchattacks", "ours")}, rounds=3)
    far = {who: threat.distance(half.x, z) > threat.radius + 1e-6 for who, z in found.items()}
    stand = {who: int((half.standing(z) | far[who]).sum()) for who, z in found.items()}
    assert stand["we"] <= stand["they"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_against_the_official_order_of_torchattacks_parts(
    norm: str, robust: Setting, race: Any
) -> None:
    """torchattacks' own AutoAttack takes 10 steps, not 100; its parts are handed the official budgets."""
    robust = robust.first(64)
    threat, found = robust.threat(norm), dict[str, Images]()
    given: dict[str, Any] = {"norm": THEIRS[norm], "eps": threat.radius, "n_restarts": 1}
    parts = [
        torchattacks.APGD(robust.net, steps=100, **given),
        torchattacks.APGDT(robust.net, steps=100, **given),
        torchattacks.FAB(robust.net, steps=100, multi_targeted=True, **given),
        torchattacks.Square(robust.net, n_queries=5000, p_init=0.8, **given),
    ]

    def we() -> None:
        found["we"] = autoattack(robust.view(), robust.x, robust.y, threat, robust.draws()).images

    def they() -> None:
        found["they"] = in_order(parts, robust)

    ratio = f"the official order of torchattacks' parts over autoattack, {norm}, {len(robust.x)} images"
    race({"ours": we, "torchattacks": they}, over={ratio: ("torchattacks", "ours")}, rounds=2)
    stand = {who: int(robust.standing(z).sum()) for who, z in found.items()}
    assert stand["we"] <= stand["they"]


def in_order(parts: Sequence[Any], setting: Setting) -> Images:
    """Run attack after attack on what still stands."""
    images, standing = setting.x.clone(), setting.standing(setting.x)
    for part in parts:
        rows = standing.nonzero().squeeze(1)
        z = library(part, setting, rows)
        with torch.no_grad():
            won = setting.net(z).argmax(1) != setting.y[rows]
        images[rows[won]] = z[won]
        standing[rows[won]] = False
    return images

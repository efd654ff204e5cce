"""Evaluations that are broken on purpose: one network behind disguises, and attacks that do nothing.

The network is the same everywhere, and not robust. Each plant is what somebody once did by mistake.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.nn.functional import batch_norm, cross_entropy, one_hot

from bench import (
    Decision,
    Fitting,
    Images,
    Labels,
    Randomness,
    Shape,
    Split,
    Threat,
    View,
    attack,
    defense,
    view,
)
from bench.losses import objective, succeeded

RADIUS = 0.1


class _Reversed(Function):
    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return -gradient


@defense("toy/planted", readouts=("label",), version=1)
class Planted(nn.Module):
    """A small network on digits; `plant` is what is wrong with how it is asked."""

    def __init__(
        self, shape: Shape, *, plant: str = "nothing", epochs: int = 12, robust: bool = False
    ) -> None:
        super().__init__()
        pixels = shape.channels * shape.height * shape.width
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 10))
        self.other = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.Tanh(), nn.Linear(32, 10))
        self.plant, self.epochs, self.robust = plant, epochs, robust

    def fit(self, train: Split, fitting: Fitting) -> None:
        optimiser = torch.optim.Adam(self.parameters(), lr=4e-3)
        threat = Threat("linf", RADIUS)
        for epoch in fitting.epochs(self.epochs, self, optimiser):
            for x, y, _ in epoch.batches(64):
                z = x
                for _ in range(5 if self.robust else 0):
                    z = z.clone().requires_grad_()
                    (slope,) = grad(cross_entropy(self.net(z), y), z)
                    z = threat.project(x, (z + RADIUS / 3 * slope.sign()).detach())
                loss = cross_entropy(self.net(z), y) + cross_entropy(self.other(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                epoch.report(loss)

    def scored(self, x: Images) -> Tensor:
        """Return the logits that are scored."""
        match self.plant:
            case "batch statistics" if len(x) > 1:
                return batch_norm(self.net(x), None, None, training=True)
            case "noise by place":
                draw = torch.Generator().manual_seed(0)
                return self.net(x + 0.25 * torch.randn(x.shape, generator=draw).to(x))
            case "wrong sign":
                return self.net(_Reversed.apply(x))
            case "one-hot":
                return one_hot(self.net(x).argmax(1), 10) + 0 * self.net(x)
            case "permuted labels":
                return self.net(x).roll(1, 1)
            case "probabilities":
                return self.net(x).softmax(1)
            case "whole numbers":
                logits = self.net(x) / 2
                return logits + (logits.round() - logits).detach()
            case "not finite":
                moved = (x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3
                return torch.where(moved[:, None], torch.nan, self.net(x))
        return self.net(x)

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        match self.plant:
            case "view of another network":
                return View(self.other)
            case "rolled view":
                return View(lambda x: self.net(x).roll(1, 1))
        return View(self.scored)

    @torch.no_grad()
    def decide(self, x: Images, readout: str) -> Decision:
        found = Decision.of(self.scored(x))
        match self.plant:
            case "detector that the view lacks":
                off = (x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3
                return found._replace(rejected=off)
            case "refuses everything":
                return found._replace(rejected=torch.ones_like(found.rejected))
        return found


# --- attacks -------------------------------------------------------------------------------------------


def _climb(view: View, x: Images, y: Labels, threat: Threat, steps: int, way: float = 1.0) -> Images:
    z = x
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (slope,) = grad(objective(view, view.logits(z), y, "margin").sum(), z)
        z = threat.project(x, z + way * 2.5 * threat.radius / steps * slope.sign())
    return z.detach()


def _random_start(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    return threat.project(x, x + threat.radius * noise.uniform(x.shape[1:], -1, 1))


def _wrong_sign(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    return _climb(view, x, y, threat, 20, way=-1.0)


def _first_ten(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    few = torch.arange(min(10, len(x)))
    return torch.cat([_climb(view.select(few), x[:10], y[:10], threat, 20), x[10:]])


def _l2_radius(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    z = _climb(view, x, y, threat, 20)
    move = z - x
    return x + move * (threat.radius / move.flatten(1).norm(dim=1).clamp_min(1e-9))[:, None, None, None]


def _wrong_already(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    with torch.no_grad():
        wrong = succeeded(view, view.logits(x), y)
    z = x.clone()
    rows = wrong.nonzero().flatten()
    if len(rows):
        z[rows] = _climb(view.select(rows), x[rows], y[rows], threat, 20)
    return z


def _returns_a_start(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Climb, and return what a restart of no steps would: the last of several."""
    _climb(view, x, y, threat, 40)
    return _random_start(view, x, y, threat, noise)


ATTACKS: dict[str, Callable[..., Images]] = {
    "toy/random-start": _random_start,
    "toy/wrong-sign": _wrong_sign,
    "toy/first-ten": _first_ten,
    "toy/l2-radius": _l2_radius,
    "toy/wrong-already": _wrong_already,
    "toy/last-restart": _returns_a_start,
}

for _name, _function in ATTACKS.items():
    attack(_name, norms={"linf"}, version=1)(_function)

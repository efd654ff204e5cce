"""Evaluations that a second author broke, from the specification of the flags and without their code.

One network behind every disguise, as `planted` has it; the mistakes are others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.nn.functional import cross_entropy, one_hot

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
    objective,
    succeeded,
    view,
)

RADIUS = 0.12


class Altered(Function):
    """Pass images forwards, and another gradient backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def _half_cut(x: Tensor) -> Tensor:
    seen = (torch.arange(x.shape[-1]) >= 6).float()
    return x * seen + (x * (1 - seen)).detach()


def _cosines(x: Tensor) -> Tensor:
    """Round cosine coefficients, straight through for the first row of them alone."""
    n = torch.arange(8.0)
    base = torch.cos(torch.pi * (n[None] + 0.5) * n[:, None] / 8) / 2
    base[0] /= 2**0.5
    exact = base @ x @ base.T
    rounded = (exact / 0.4).round() * 0.4
    straight = exact[..., :1, :] + (rounded[..., :1, :] - exact[..., :1, :]).detach()
    return base.T @ torch.cat([straight, rounded[..., 1:, :].detach()], 2) @ base


IN_FRONT: dict[str, Callable[[Tensor], Tensor]] = {
    "rounds": lambda x: (x * 4).round() / 4,
    "ripple": lambda x: x + 0.03 * torch.sin(300 * x),
    "contrast": lambda x: ((x - 0.45) * 20 + 0.5).clamp(0, 1),
    "square root": torch.sqrt,
    "cosines": _cosines,
    "half of the gradient": _half_cut,
    "reversed gradient": lambda x: Altered.apply(x, torch.neg),
    "gradient of noise": lambda x: Altered.apply(x, torch.randn_like),
    "turned gradient": lambda x: Altered.apply(x, lambda g: g.transpose(2, 3).flip(2)),
}
"""What stands in front of the network, in training too."""


class Broken(nn.Module):
    """A network of digits, and one mistake, by its name."""

    def __init__(
        self, shape: Shape, *, case: str = "none", epochs: int = 12, radius: float = 0.0, sigma: float = 0.1
    ) -> None:
        super().__init__()
        size = shape.channels * shape.height * shape.width
        drop = 0.5 if case == "dropout" else 0.0
        self.nets = nn.ModuleList(
            nn.Sequential(
                *(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Dropout(drop)),
                *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, shape.classes)),
            )
            for _ in range(5 if case == "ensemble" else 1)
        )
        self.case, self.epochs, self.radius, self.sigma = case, epochs, radius, sigma
        self.register_buffer("bank", torch.zeros(600, size))
        self.register_buffer("names", torch.zeros(600, dtype=torch.int64))
        self.register_buffer("cut", torch.zeros(()))
        self.bank: Tensor
        self.names: Tensor
        self.cut: Tensor

    def fit(self, train: Split, fitting: Fitting) -> None:
        optimiser = torch.optim.Adam(self.parameters(), lr=2e-3)
        self.train()
        for epoch in fitting.epochs(self.epochs, self, optimiser):
            for x, y, _ in epoch.batches(64):
                losses = [cross_entropy(net(self._shown(net, x, y)), y) for net in self.nets]
                loss = torch.stack(losses).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                epoch.report(loss)
        self.eval()
        self.bank.copy_(train.images.flatten(1)[:600])
        self.names.copy_(train.labels[:600])
        with torch.no_grad():
            if self.case == "far":
                self.cut.copy_(self._far(train.images[600:900]).quantile(0.7))
            if self.case == "sound refusal":
                self.cut.copy_(self.bare(train.images).softmax(1).amax(1).quantile(0.02))

    def _shown(self, net: nn.Module, x: Images, y: Labels) -> Images:
        z = x
        for _ in range(5 if self.radius else 0):
            z = z.detach().requires_grad_()
            (slope,) = grad(cross_entropy(net(z), y), z)
            step = (z + 0.4 * self.radius * slope.sign() - x).clamp(-self.radius, self.radius)
            z = (x + step).clamp(0, 1).detach()
        if self.case == "vote":
            z = z + 0.25 * torch.randn_like(z)
        return IN_FRONT.get(self.case, lambda z: z)(z)

    def bare(self, x: Images) -> Tensor:
        out: Tensor = self.nets[0](IN_FRONT.get(self.case, lambda z: z)(x))
        return out

    def _far(self, x: Images) -> Tensor:
        return torch.cdist(x.flatten(1), self.bank).amin(1)

    def scored(self, x: Images) -> Tensor:
        """Return the logits that are scored."""
        match self.case:
            case "hot":
                return 1000 * self.bare(x)
            case "probabilities":
                return self.bare(x).softmax(1)
            case "clamped":
                return self.bare(x).clamp(-1, 1) + 1e-6 * self.bare(x).detach()
            case "ensemble":
                return torch.stack([net(x).softmax(1) for net in self.nets[1:]]).mean(0).log()
            case "rounds unseen":
                return self.bare((x * 5).round() / 5)
            case "noise undeclared":
                return self.bare(x + 0.3 * torch.randn_like(x))
            case "sound noise":
                return self.bare(x + self.sigma * torch.randn_like(x))
            case "vote":
                votes = [self.bare(x + 0.25 * torch.randn_like(x)).argmax(1) for _ in range(31)]
                return one_hot(torch.stack(votes), 10).sum(0).float().add(1e-3).log()
            case "company":
                return self.bare((x - 0.5 * x.mean(0, keepdim=True) + 0.15).clamp(0, 1))
            case "shifts":
                moved = [self.bare(x.roll((i, j), (2, 3))) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                return torch.stack([each.softmax(1) for each in moved]).mean(0).log()
            case "neighbour":
                return one_hot(self.names[torch.cdist(x.flatten(1), self.bank).argmin(1)], 10).float()
            case "scaled twice":
                return self.bare(x / 255)
        return self.bare(x)

    def refused(self, x: Images, logits: Tensor) -> Tensor:
        match self.case:
            case "far":
                return self._far(x) > self.cut
            case "off the grid":
                return ((x * 16).round() / 16 - x).abs().flatten(1).amax(1) > 1e-4
            case "unsure":
                return logits.softmax(1).amax(1) < 0.95
            case "sound refusal":
                return logits.softmax(1).amax(1) < self.cut
        return torch.zeros(len(x), dtype=torch.bool)

    def decide(self, x: Images, readout: str) -> Decision:
        decision = Decision.of(self.scored(x))
        assert decision.logits is not None
        return decision._replace(rejected=self.refused(x, decision.logits))

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        if self.case == "sound refusal":
            return View(self._with_refusal, refusal=True)
        return View(self.seen)

    def _with_refusal(self, x: Images) -> Tensor:
        logits = self.bare(x).log_softmax(1)
        return torch.cat([logits, self.cut.log().expand(len(logits), 1)], 1)

    def seen(self, x: Images) -> Tensor:
        """Return what the attacker is shown as the logits that are scored."""
        match self.case:
            case "rolled":
                return self.bare(x).roll(1, 1)
            case "vote":
                return self.bare(x + 0.25 * torch.randn_like(x))
            case "dropout":
                self.nets.train()
                logits = self.bare(x)
                self.nets.eval()
                return logits
            case "ensemble" | "rounds unseen" | "shifts" | "neighbour":
                return self.bare(x)
        return self.scored(x)


RANDOM = {"vote", "sound noise"}
defense("toy/second", readouts=("label",), version=1, random=lambda params: params["case"] in RANDOM)(Broken)


def _slope(view: View, z: Images, y: Labels) -> Tensor:
    z = z.detach().requires_grad_()
    (slope,) = grad(objective(view, view.logits(z), y, "ce").sum(), z)
    return slope


def _anywhere(x: Images, threat: Threat, noise: Randomness) -> Images:
    return threat.project(x, x + noise.uniform(tuple(x.shape[1:]), -threat.radius, threat.radius))


def _every(x: Images, places: Tensor, one: Images, other: Images) -> Images:
    return torch.where(places.view(-1, 1, 1, 1), one, other)


Step = Callable[[View, Images, Labels, Threat, Images], Images]


def _plain(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    return threat.project(x, z + threat.radius / 10 * _slope(view, z, y).sign())


def _in_255(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    radius = threat.radius / 255
    return (x + (z + radius / 10 * _slope(view, z, y).sign() - x).clamp(-radius, radius)).clamp(0, 1)


def _into_l2(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    move = z + threat.radius / 10 * _slope(view, z, y).sign() - x
    length = move.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + move * (threat.radius / length).clamp(max=1)).clamp(0, 1)


def _by_batch(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    slope = _slope(view, z, y)
    return threat.project(x, z + threat.radius / 4 * slope / slope.abs().max())


def _over_nothing(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    moved = (z - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return threat.project(x, z + threat.radius / 10 * _slope(view, z, y).sign() * moved / moved)


def _twice_softmax(view: View, z: Images, y: Labels, threat: Threat, x: Images) -> Images:
    z = z.detach().requires_grad_()
    loss = cross_entropy((100 * view.logits(z)).softmax(1), y, reduction="sum")
    return threat.project(x, z + threat.radius / 10 * grad(loss, z)[0].sign())


STEPS: dict[str, Step] = {
    "255": _in_255,
    "l2-ball": _into_l2,
    "other-label": lambda view, z, y, threat, x: _plain(view, z, (y + 1) % 10, threat, x),
    "descends": lambda view, z, y, threat, x: threat.project(
        x, z - threat.radius / 10 * _slope(view, z, y).sign()
    ),
    "unprojected": lambda view, z, y, threat, x: z + threat.radius / 10 * _slope(view, z, y).sign(),
    "by-batch": _by_batch,
    "over-nothing": _over_nothing,
    "flees-its-answer": lambda view, z, y, threat, x: _plain(view, z, view.logits(z).argmax(1), threat, x),
    "all-alike": lambda view, z, y, threat, x: threat.project(
        x, z + threat.radius / 10 * _slope(view, z, y).sum(0, keepdim=True).sign()
    ),
    "no-sign": lambda view, z, y, threat, x: threat.project(
        x, z + threat.radius / 10 * _slope(view, z, y).abs().sign()
    ),
    "to-class-0": lambda view, z, y, threat, x: threat.project(
        x, z - threat.radius / 10 * _slope(view, z, torch.zeros_like(y)).sign()
    ),
    "softmax-of-softmax": _twice_softmax,
    "tiny-steps": lambda view, z, y, threat, x: threat.project(
        x, z + threat.radius / 1000 * _slope(view, z, y).sign()
    ),
    "only-up": lambda view, z, y, threat, x: _plain(view, z, y, threat, x).maximum(x),
}
"""Steps that are wrong; the attack takes forty of them."""

STARTS_ANYWHERE = {"tiny-steps", "other-label"}

Finish = Callable[[View, Images, Labels, Images, Images], Images]

ENDS: dict[str, Finish] = {
    "returns-its-start": lambda view, x, y, start, z: start,
    "first-half": lambda view, x, y, start, z: _every(x, torch.arange(len(x)) < len(x) // 2, z, x),
    "skips-a-quarter": lambda view, x, y, start, z: _every(x, torch.arange(len(x)) % 4 == 3, x, z),
    "mask-inverted": lambda view, x, y, start, z: _every(x, succeeded(view, view.logits(z), y), x, z),
    "four-bits": lambda view, x, y, start, z: (z * 16).round() / 16,
    "moves-exchanged": lambda view, x, y, start, z: (x + (z - x).roll(1, 0)).clamp(0, 1),
}
"""What becomes of the images of a plain attack at its end."""


def _walk(name: str) -> Callable[..., Images]:
    step, end = STEPS.get(name, _plain), ENDS.get(name)
    anywhere = name in STARTS_ANYWHERE or name in ENDS

    def walk(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        z = start = _anywhere(x, threat, noise) if anywhere else x
        for _ in range(40):
            z = step(view, z, y, threat, x).detach()
        return z if end is None else end(view, x, y, start, z)

    walk.__doc__ = f"Attack by forty steps, with one mistake: {name}."
    return walk


for _name in (*STEPS, *ENDS):
    attack(f"toy/second-{_name}", norms={"linf"}, version=1)(_walk(_name))


@attack("toy/second-sound", norms={"linf"}, version=1)
def momentum(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Climb with momentum and keep the best point (Dong et al. 2018, MI-FGSM)."""
    z = best = x
    top = objective(view, view.logits(x), y, "margin").detach()
    pace = torch.zeros_like(x)
    for _ in range(40):
        slope = _slope(view, z, y)
        pace = 0.9 * pace + slope / slope.abs().flatten(1).mean(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        z = threat.project(x, z + threat.radius / 10 * pace.sign()).detach()
        margin = objective(view, view.logits(z), y, "margin").detach()
        best = _every(x, margin > top, z, best)
        top = top.maximum(margin)
    return best

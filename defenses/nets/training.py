"""How the networks of CNN-F and their feed-forward twins are trained (Huang et al. 2020, section 3)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import SGD, Adam, Optimizer

from bench import Attack, Crafted, Fitting, Images, InputError, Labels, Randomness, Threat, Use, View
from defenses.nets.layers import Linear

PGD = Use("pgd", {"steps": 7, "step": 0.0355, "start": "uniform", "keep": "last", "drop": False})
"""The inner attack on Fashion-MNIST: always seven steps from a uniform start, the last iterate."""

Loss = Callable[[Images, Images | None, Labels], Tensor]
"""The loss of clean images, the same images attacked (None in standard training), and labels."""


@dataclass(frozen=True)
class Recipe:
    """What a training is told; the meaning of each field stands with the defenses' parameters."""

    training: Literal["adversarial", "standard"]
    epochs: int
    batch: int
    drop_last: bool
    augment: bool
    lr: float | None
    weight_decay: float
    momentum: float
    clip: float
    radius: float
    inner: Use

    def optimiser(self, network: nn.Module, *, double_decay: bool = False) -> Optimizer:
        """Return SGD or Adam; `double_decay` is for the weights of fully connected layers."""
        doubled = {id(each.weight) for each in network.modules() if isinstance(each, Linear) and double_decay}
        groups = [
            {
                "params": [each for each in network.parameters() if (id(each) in doubled) is twice],
                "weight_decay": self.weight_decay * (2 if twice else 1),
            }
            for twice in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        if self.training == "standard":
            return Adam(groups, lr=self.rate(0, 1))
        return SGD(groups, lr=self.rate(0, 1), momentum=self.momentum)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step: falling polynomially to 0, constant in standard training."""
        if self.training == "standard":
            return 1e-3 if self.lr is None else self.lr
        return float((0.05 if self.lr is None else self.lr) * (1 - step / total) ** 0.9)


def check(params: Mapping[str, Any]) -> None:
    """Raise `InputError` where a training cannot be run so."""
    for name in ("epochs", "batch"):
        if params[name] < 1:
            raise InputError(f"{name} must be at least 1, found {params[name]}")
    for name in ("weight_decay", "momentum", "clip", "radius"):
        if not params[name] >= 0:
            raise InputError(f"{name} must not be negative, found {params[name]}")
    if params["lr"] is not None and not params["lr"] > 0:
        raise InputError(f"lr must be positive, found {params['lr']}")


def train(
    model: nn.Module,
    network: nn.Module,
    fitting: Fitting,
    recipe: Recipe,
    loss: Loss,
    *,
    double_decay: bool = False,
) -> None:
    """Train `model`, whose first pass is `network`, epoch by epoch; each step depends on its number alone."""
    optimiser = recipe.optimiser(network, double_decay=double_decay)
    attack = fitting.attack(recipe.inner) if recipe.training == "adversarial" else None
    threat = Threat("linf", recipe.radius)
    steps = fitting.steps(recipe.batch, drop_last=recipe.drop_last)
    model.train()
    for epoch in fitting.epochs(recipe.epochs, model, optimiser):
        batches = epoch.batches(recipe.batch, drop_last=recipe.drop_last)
        for step, (x, y, noise) in enumerate(batches, epoch.number * steps):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step, recipe.epochs * steps)
            clean = augmented(x, noise) if recipe.augment else x
            attacked = None if attack is None else craft(attack, network, clean, y, threat, noise)
            value = loss(clean, attacked, y)
            optimiser.zero_grad()
            value.backward()
            if recipe.training == "adversarial":
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
            optimiser.step()
            epoch.report(value.detach())
    model.eval()


def craft(
    attack: Attack, network: nn.Module, x: Images, y: Labels, threat: Threat, noise: Randomness
) -> Images:
    """Attack the network's plain forward pass, in evaluation mode and without gradients of parameters."""
    with frozen(network):
        made = attack(View(network, final=False), x, y, threat, noise)
    return made.images if isinstance(made, Crafted) else made


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode with fixed parameters, and back."""
    training = network.training
    flags = [(each, each.requires_grad) for each in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train(training)
        for each, flag in flags:
            each.requires_grad_(flag)


def augmented(x: Images, noise: Randomness, border: int = 4) -> Images:
    """Flip each image with chance 1/2, then cut it out of itself with a black border of 4 pixels.

    Black is -1 to the network, as in the released code, whose border is added before scaling.
    """
    count, _, height, width = x.shape
    flipped = noise.integers((), 2).bool()
    top, left = noise.integers((2,), 2 * border + 1).unbind(1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    columns = torch.where(flipped[:, None], width + 2 * border - 1 - columns, columns)
    image = torch.arange(count, device=x.device)[:, None, None]
    cut = pad(x, [border] * 4)[image, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()

"""Training as SDIM and its twin have it: Adam, and the weights of the epoch with the lowest mean loss."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bench import Fitting, Images, InputError, Labels, Split
from defenses.nets.training import augmented

Keep: TypeAlias = Literal["best", "last"]


class Kept(nn.Module):
    """A network in training beside a copy of it as it was after its best epoch.

    Both, and the loss of that epoch, are one state, so that a training that is resumed forgets nothing.
    """

    least: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.best = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("least", torch.tensor(torch.inf))

    def offer(self, loss: Tensor) -> None:
        """Copy the network if no epoch's mean loss was lower."""
        if loss < self.least:
            self.least.copy_(loss)
            self.best.load_state_dict(self.network.state_dict())

    def settle(self) -> None:
        """Give the network the weights of its best epoch."""
        self.network.load_state_dict(self.best.state_dict())


def check(params: Mapping[str, Any], least_epochs: int = 1) -> None:
    """Raise `InputError` where a training cannot be run so."""
    if params["epochs"] < least_epochs:
        raise InputError(f"epochs must be at least {least_epochs}, found {params['epochs']}")
    if params["batch"] < 2:
        raise InputError(
            f"batch must be at least 2, as batch normalisation needs two images, found {params['batch']}"
        )
    if not params["lr"] > 0:
        raise InputError(f"lr must be positive, found {params['lr']}")


def train(
    network: nn.Module,
    loss: Callable[[Images, Labels], Tensor],
    train: Split,
    fitting: Fitting,
    *,
    epochs: int,
    batch: int,
    lr: float,
    augment: bool,
    keep: Keep,
) -> None:
    """Train a network that has batch normalisation, and leave it in evaluation mode.

    Adam at a constant rate, without decay. A last batch of one image is left out: its deviation is 0.
    """
    if len(train) < 2 and epochs:
        raise InputError(
            f"expected at least 2 training images, as batch normalisation needs two, found {len(train)}"
        )
    kept = Kept(network) if keep == "best" else None
    optimiser = Adam(network.parameters(), lr=lr)
    network.train()
    for epoch in fitting.epochs(epochs, kept or network, optimiser):
        losses: list[Tensor] = []
        for x, y, noise in epoch.batches(batch):
            if len(x) < 2:
                continue
            value = loss(augmented(x, noise) if augment else x, y)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(value.detach())
            epoch.report(losses[-1])
        if kept is not None:
            kept.offer(torch.stack(losses).mean())
    if kept is not None:
        kept.settle()
    network.eval()

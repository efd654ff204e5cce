"""Training as SDIM and its twin have it: Adam, and the weights of the epoch with the lowest mean loss."""

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bench import Fitting, InputError, Shape, Split
from defenses.nets import training as trainings
from defenses.nets.sdim.encoder import check_shape

Keep: TypeAlias = Literal["best", "last"]


class Kept(nn.Module):
    """A network in training beside a copy of it as it was after its best epoch.

    Both, and the loss of that epoch, are one state, so that a training that is resumed forgets nothing.

    Args:
        network: the network in training.
    """

    least: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.best = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("least", torch.tensor(torch.inf))

    def offer(self, loss: Tensor) -> None:
        """Copy the network if no epoch's mean loss was lower.

        Args:
            loss: the mean training loss of the epoch that has ended, a scalar.
        """
        if loss < self.least:
            self.least.copy_(loss)
            self.best.load_state_dict(self.network.state_dict())

    def settle(self) -> None:
        """Give the network the weights of its best epoch."""
        self.network.load_state_dict(self.best.state_dict())


def check_params(params: Mapping[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the data does not fit the encoder, or a batch batch normalisation.

    Args:
        params: those of `sdim` or `sdim-twin`, defaults filled in.
        shape: channels, height, width and classes of the data.
    """
    check_shape(shape)
    if params["batch"] < 2:
        raise InputError(
            f"batch must be at least 2, as batch normalisation needs two images, found {params['batch']}"
        )


def train(
    network: nn.Module,
    split: Split,
    fitting: Fitting,
    objective: trainings.Objective,
    recipe: trainings.Recipe,
    keep: Keep,
) -> None:
    """Train a network that has batch normalisation, and leave it in evaluation mode.

    A last batch of one image is left out: its deviation is 0.

    Args:
        network: the network to train.
        split: the training images, of which there must be two or more.
        fitting: batches and draws.
        objective: the loss of a batch.
        recipe: epochs, batches, optimiser and schedule.
        keep: the weights that stay: of the ``best`` epoch, by its mean training loss, or of the ``last``.

    Raises:
        InputError: there are fewer than two training images.
    """
    if len(split) < 2 and recipe.epochs:
        raise InputError(
            f"expected at least 2 training images, as batch normalisation needs two, found {len(split)}"
        )
    if keep == "last":
        trainings.train(network, fitting, objective, recipe, fewest=2)
        return
    kept = Kept(network)
    trainings.train(kept, fitting, objective, recipe, fewest=2, ended=kept.offer)
    kept.settle()

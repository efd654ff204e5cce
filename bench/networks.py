"""What a network of the user's own must be: a map from images in [0, 1] to logits, with its normalisation.

A task file and a call from Python are refused by the same sentences.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.errors import InputError
from bench.protocols import Decision, Images, View
from bench.registry import view


def check_normalisation(
    mean: float | Sequence[float], std: float | Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation that a network's input is normalised with, as lists.

    Args:
        mean: One number, or one for each channel, in [0, 1]: the units of the images.
        std: One number, or one for each channel, above 0, in the same units.
        channels: The number of channels of an image.

    Returns:
        `mean` and `std`, each a list of 1 or `channels` numbers.

    Raises:
        InputError: A list has another length, or a number is out of its range.
    """
    means, stds = ([each] if isinstance(each, float | int) else list(each) for each in (mean, std))
    for name, values in (("mean", means), ("std", stds)):
        if len(values) not in (1, channels):
            raise InputError(
                f"{name}: expected a number, or one for each of {channels} channels, found {values}"
            )
    if wrong := [value for value in means if not 0 <= value <= 1]:
        raise InputError(f"mean: expected values in [0, 1], the units of the images, found {wrong[0]:g}")
    if wrong := [value for value in stds if not 0 < value < math.inf]:
        raise InputError(f"std: expected values above 0, found {wrong[0]:g}")
    return means, stds


@torch.no_grad()
def check_network(network: nn.Module, x: Images, where: str, classes: int | None = None) -> int:
    """Try a network on a few images, and return the number of its classes.

    Args:
        network: A map from images (N, C, H, W) in [0, 1] to logits (N, K), in evaluation mode.
        x: The images to try, float32 (N, C, H, W), on the network's device.
        where: What the network is called in messages.
        classes: The number of classes that the data has, K; None where the network alone says it.

    Returns:
        The number of classes, K.

    Raises:
        InputError: The network does not take the images, or returns no logits (N, K) of floating point.
    """
    form = f"images of shape {tuple(x.shape[1:])}"
    try:
        logits = network(x)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where}: the network does not take {form}: {reason}") from error
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{where}: expected the network to return logits, found a {type(logits).__name__}; "
            "wrap it in a module that returns the tensor"
        )
    if not logits.is_floating_point():
        raise InputError(f"{where}: expected logits of floating point, found {logits.dtype}")
    if classes is None:
        if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            raise InputError(
                f"{where}: expected logits of shape ({len(x)}, classes) for {len(x)} {form}, "
                f"found {tuple(logits.shape)}"
            )
        return logits.shape[1]
    if logits.shape != (len(x), classes):
        raise InputError(
            f"{where}: the data has {classes} classes: expected logits of shape "
            f"({len(x)}, {classes}) for {len(x)} {form}, found {tuple(logits.shape)}"
        )
    return classes


class Classifier(nn.Module):
    """A network as a defense: its input is normalised, and it is attacked and scored through its logits.

    Args:
        network: A map from normalised images to logits (N, K).
        mean: One number, or one for each channel, in [0, 1].
        std: One number, or one for each channel, above 0.
        channels: The number of channels of an image.

    Raises:
        InputError: The mean or the standard deviation does not fit the channels or its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        channels: int,
    ) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), check_normalisation(mean, std, channels), strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.network = network

    def forward(self, x: Images) -> Tensor:
        """Return the network's logits (N, K) of images in [0, 1]."""
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        """Look at the logits."""
        return View(self)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer by the logits' arg-max."""
        return Decision.of(self(x))

"""Plain classifiers: networks by name, and what the defenses that train them share."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from bench import Decision, Fitting, Images, InputError, Part, Shape, Split, View, view
from defenses.nets import smallcnn, training
from defenses.nets.cnnf import architectures
from defenses.nets.resnet import ResNet18
from defenses.nets.training import Objective, Recipe

Net: TypeAlias = Literal["smallcnn", "lenet", "resnet18", "b1", "b2", "wrn-40-2"]

_LEAST: dict[Net, int] = {
    "smallcnn": smallcnn.SMALLCNN_LEAST,
    "lenet": smallcnn.LENET_LEAST,
    "resnet18": 1,
}
"""The shortest side that an image may have; the other nets are CNN-F's."""


def check_net(net: Net, shape: Shape, *, hidden: Sequence[int] | None = None) -> None:
    """Raise `InputError` where a network cannot be built so; the arguments are those of `build`."""
    if net == "b1" or net == "b2" or net == "wrn-40-2":
        architectures.check_net(net, shape, hidden=hidden)
        return
    if hidden is not None:
        raise InputError(
            f"net {net}: only nets b1 and b2 have a choice of hidden, found {list(hidden)}; width scales all"
        )
    if min(shape.height, shape.width) < _LEAST[net]:
        raise InputError(
            f"net {net}: sides of images must be at least {_LEAST[net]}, found {shape.height}x{shape.width}"
        )


def build(net: Net, shape: Shape, *, width: float = 1.0, hidden: Sequence[int] | None = None) -> nn.Module:
    """Build a network by name, untrained.

    Args:
        net: the architecture: SmallCNN, LeNet, ResNet18 in its CIFAR form, or one of CNN-F's.
        shape: channels, height, width and classes of the data.
        width: factor of channels and hidden units, above 0.
        hidden: units of the hidden linear layers of CNN-F's nets, each 1 or more; None takes the paper's.

    Returns:
        A network of images (N, C, H, W) in [0, 1] to logits (N, K). CNN-F's nets scale images to [-1, 1]
        themselves, the others take them as they are.

    Raises:
        InputError: the images' sides or `hidden` do not go with the architecture.
    """
    check_net(net, shape, hidden=hidden)
    match net:
        case "smallcnn":
            return smallcnn.smallcnn(shape, width=width)
        case "lenet":
            return smallcnn.lenet(shape, width=width)
        case "resnet18":
            return ResNet18(shape, width=width)
        case _:
            return architectures.build(net, shape, width=width, hidden=hidden)


def check_params(params: Mapping[str, Any], shape: Shape) -> None:
    """Raise `InputError` where a classifier's network or training cannot be as asked.

    Args:
        params: those of `standard`, `madry` or `trades`, defaults filled in.
        shape: channels, height, width and classes of the data.
    """
    check_net(params["net"], shape, hidden=params["hidden"])
    training.check_milestones(params["milestones"])
    if params["net"] == "resnet18" and params["batch"] < 2:
        raise InputError(
            f"net resnet18: batch must be at least 2, as batch normalisation needs two images, "
            f"found {params['batch']}"
        )


def unreached(steps: int, step_size: float, radius: float) -> str | None:
    """Return a sentence where an inner attack's steps are too short for its radius, else None.

    Args:
        steps: number of steps, 1 or more.
        step_size: length of a step, in the units of `radius`.
        radius: linf radius that the steps should be able to reach.
    """
    if (reach := steps * step_size) >= radius * (1 - 1e-6):
        return None
    return f"{steps} inner steps of {step_size:g} reach {reach:.4g}, less than the radius {radius:.4g}"


class Classifier(nn.Module):
    """A network that answers by its logits' arg-max; a subclass says what it is trained for.

    Args:
        shape: channels, height, width and classes of the data.
        recipe: epochs, batches, optimiser and schedule of the training.
        net: the architecture, see `build`.
        width: factor of channels and hidden units, above 0.
        hidden: units of the hidden linear layers of CNN-F's nets; None takes the paper's.
        initial: a defense of the same network whose weights training starts from; None starts afresh.
    """

    def __init__(
        self,
        shape: Shape,
        recipe: Recipe,
        *,
        net: Net,
        width: float,
        hidden: Sequence[int] | None,
        initial: nn.Module | Part | None,
    ) -> None:
        super().__init__()
        self.network = build(net, shape, width=width, hidden=hidden)
        self.recipe = recipe
        self.continues = initial is not None
        if isinstance(initial, nn.Module):
            self._expect(initial, net)

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train on the split, from the weights of `initial` if there is one.

        Args:
            train: the training images; they come through `fitting`.
            fitting: batches, draws and parts of the training.
        """
        if self.continues:
            self.load_state_dict(fitting.parts["initial"].state_dict())
        fewest = training.fewest_of(self)
        training.train(self, fitting, self.objective(fitting), self.recipe, fewest=fewest)

    def objective(self, fitting: Fitting) -> Objective:
        """Return what is minimised: the loss of a batch.

        Args:
            fitting: gives the inner attack, where there is one.
        """
        raise NotImplementedError

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        """Return the view of the logits (N, K)."""
        return View(self.network)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the logits' arg-max.

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``label``, the only one.
        """
        return Decision.of(self.network(x))

    def _expect(self, initial: nn.Module, net: Net) -> None:
        """Raise `InputError` where another defense's weights are not of the same form."""
        own, given = (
            {name: tuple(value.shape) for name, value in each.state_dict().items()}
            for each in (self, initial)
        )
        odd = next((name for name in {**own, **given} if own.get(name) != given.get(name)), None)
        if odd is not None:
            raise InputError(
                f"initial: a {type(initial).__name__} has other weights than net {net} of this width: "
                f"{odd} is {given.get(odd, 'missing')}, expected {own.get(odd, 'none of that name')}"
            )

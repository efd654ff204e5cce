"""Adversarial training on attacked images alone (Madry et al. 2018, arXiv:1706.06083)."""

from collections.abc import Mapping
from typing import Any, Literal

from bench import (
    Count,
    Fitting,
    NonNegative,
    NonNegativeCount,
    Part,
    Positive,
    Shape,
    Threat,
    Use,
    defense,
)
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, check_params, unreached
from defenses.nets.training import Mode, Objective, Recipe, staged

PGD = Use("pgd", {"steps": 7, "step_size": 0.007, "start": "uniform", "keep": "last", "drop": False})
"""The inner attack of API-Net on CIFAR-10 and SVHN."""


def flags(*, radius: float, inner: Mapping[str, Any], **_: object) -> str | None:
    """Return a sentence where the inner attack's steps do not reach the radius, else None.

    Args:
        radius: linf radius of the inner attack.
        inner: the inner attack with its parameters, as a suite writes it.
        _: the other parameters.
    """
    # An attack without a fixed step scales it with the radius.
    if not inner.get("steps") or not inner.get("step_size"):
        return None
    return unreached(inner["steps"], inner["step_size"], radius)


@defense("madry", readouts=("label",), version=1, check_params=check_params, flags=flags)
class Madry(Classifier):
    """A network trained with the cross-entropy of what an attack makes of each batch.

    Defaults are the settings of API-Net's code for ResNet18 on CIFAR-10. For MNIST API-Net has `radius`
    76.5/255, 40 inner steps of 0.01, and no `augment`.

    Source: Madry et al. 2018, arXiv:1706.06083, equation 2.1, with the inner maximum by PGD.

    Args:
        shape: channels, height, width and classes of the data.
        net: the architecture: ``smallcnn``, ``lenet``, ``resnet18`` in its CIFAR form, or one of CNN-F's.
        width: factor of channels and hidden units, above 0.
        hidden: units of the hidden linear layers of CNN-F's nets, each 1 or more; None takes the paper's.
        initial: a defense of the same network whose weights training starts from; None starts afresh.
        epochs: passes over the training images, 1 or more.
        batch: images of a step, 1 or more (2 for ``resnet18``, which has batch normalisation).
        drop_last: leave out the last batch of an epoch if it is not full.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        optimiser: ``sgd`` or ``adam``.
        lr: learning rate, above 0.
        milestones: epochs done after which the rate falls to a tenth, each 1 or more and rising.
        warmup: first epochs in which the rate rises from a third of `lr`, 0 or more.
        momentum: momentum of SGD, 0 or more.
        weight_decay: factor of the L2 penalty, 0 or more.
        clip: norm that the gradients of a step are clipped to, above 0; None does not clip.
        radius: linf radius of the inner attack, in [0, 1] units, 0 or more.
        inner: the attack on each training batch; by default PGD of 7 steps of 0.007 from a uniform start,
            of which the last iterate is taken.
        attack_mode: mode of batch normalisation and dropout while the network is attacked: ``eval`` as
            released by CNN-F, API-Net and TRADES; ``train`` as ME-Net, where each attack step also moves the
            running statistics.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: Net = "resnet18",
        width: Positive = 1.0,
        hidden: tuple[Count, ...] | None = None,
        initial: Part | None = None,
        epochs: Count = 90,
        batch: Count = 128,
        drop_last: bool = False,
        augment: bool = True,
        optimiser: Literal["sgd", "adam"] = "sgd",
        lr: Positive = 0.1,
        milestones: tuple[Count, ...] = (40, 50),
        warmup: NonNegativeCount = 3,
        momentum: NonNegative = 0.9,
        weight_decay: NonNegative = 5e-4,
        clip: Positive | None = None,
        radius: NonNegative = 8 / 255,
        inner: Use = PGD,
        attack_mode: Mode = "eval",
    ) -> None:
        recipe = Recipe(
            epochs=epochs,
            batch=batch,
            drop_last=drop_last,
            augment=augment,
            optimiser=optimiser,
            lr=lr,
            schedule=staged(epochs, milestones, warmup),
            momentum=momentum,
            weight_decay=weight_decay,
            clip=clip,
        )
        super().__init__(shape, recipe, net=net, width=width, hidden=hidden, initial=initial)
        self.threat = Threat("linf", radius)
        self.inner, self.attack_mode = inner, attack_mode

    def objective(self, fitting: Fitting) -> Objective:
        """Return the cross-entropy of attacked images.

        Args:
            fitting: gives the inner attack.
        """
        attack = fitting.attack(self.inner)
        return objectives.madry(self.network, attack, self.threat, mode=self.attack_mode)

"""Adversarial training on attacked images alone (Madry et al. 2018, arXiv:1706.06083)."""

from collections.abc import Mapping
from typing import Any, Literal

from bench import Fitting, Part, Shape, Threat, Use, defense
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, fits, unreached
from defenses.nets.training import Mode, Objective, Recipe, staged

PGD = Use("pgd", {"steps": 7, "step": 0.007, "start": "uniform", "keep": "last", "drop": False})
"""The inner attack of API-Net on CIFAR-10 and SVHN."""


def doubts(*, radius: float, inner: Mapping[str, Any], **_: object) -> str | None:
    """Return a sentence where the inner attack's steps do not reach the radius."""
    # An attack without a fixed step scales it with the radius.
    if not inner.get("steps") or not inner.get("step"):
        return None
    return unreached(inner["steps"], inner["step"], radius)


@defense("madry", readouts=("label",), version=1, check=fits, doubts=doubts)
class Madry(Classifier):
    """A network trained with the cross-entropy of what an attack makes of each batch.

    Defaults are the settings of API-Net's code for ResNet18 on CIFAR-10: `inner` within `radius`, which
    is PGD of 7 steps of 0.007 from a uniform start, last iterate. MNIST: radius 76.5/255 and 40 inner
    steps of 0.01; the paper of API-Net has no `augment` there. `attack_mode` is the mode of batch
    normalisation and dropout while the network is attacked: evaluation as released by CNN-F, API-Net
    and TRADES; ``train`` as ME-Net, where each attack step also moves the running statistics.

    All else is as in `standard`.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: Net = "resnet18",
        width: float = 1.0,
        hidden: tuple[int, ...] | None = None,
        initial: Part | None = None,
        epochs: int = 90,
        batch: int = 128,
        drop_last: bool = False,
        augment: bool = True,
        optimiser: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.1,
        milestones: tuple[int, ...] = (40, 50),
        warmup: int = 3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        clip: float | None = None,
        radius: float = 8 / 255,
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
        """Return the cross-entropy of attacked images."""
        attack = fitting.attack(self.inner)
        return objectives.madry(self.network, attack, self.threat, mode=self.attack_mode)

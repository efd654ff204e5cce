"""A plain classifier, trained on clean images: what every defense has to beat."""

from typing import Literal

from bench import Fitting, Part, Shape, defense
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, fits
from defenses.nets.training import Objective, Recipe, staged


@defense("standard", readouts=("label",), version=1, check=fits)
class Standard(Classifier):
    """A network trained with the cross-entropy of clean images.

    Defaults are the settings of API-Net's code for ResNet18 on CIFAR-10. `net` is SmallCNN, LeNet,
    ResNet18 in its CIFAR form, or one of CNN-F's (`hidden` is theirs). SGD or Adam at `lr`, a tenth of
    it after each of the `milestones` (in epochs done), rising from a third of it in the first `warmup`
    epochs; gradients clipped to the norm `clip`, if there is one; `augment` flips and crops. `initial`
    names a defense of the same network whose weights training starts from.
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

    def objective(self, fitting: Fitting) -> Objective:
        """Return the cross-entropy of clean images."""
        return objectives.standard(self.network)

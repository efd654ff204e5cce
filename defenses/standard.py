"""A plain classifier, trained on clean images: what every defense has to beat."""

from typing import Literal

from bench import Count, Fitting, NonNegative, NonNegativeCount, Part, Positive, Shape, defense
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, check_params
from defenses.nets.training import Objective, Recipe, staged


@defense("standard", readouts=("label",), version=1, check_params=check_params)
class Standard(Classifier):
    """A network trained with the cross-entropy of clean images.

    Defaults are the settings of API-Net's code for ResNet18 on CIFAR-10.

    Source: Dong et al. 2020, "API-Net", ECCV, and its authors' code.

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
        """Return the cross-entropy of clean images.

        Args:
            fitting: not asked for anything.
        """
        return objectives.standard(self.network)

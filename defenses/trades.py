"""TRADES: clean accuracy traded for stability of the prediction (Zhang et al. 2019, arXiv:1901.08573)."""

from typing import Literal

from bench import (
    Count,
    Fitting,
    NonNegative,
    NonNegativeCount,
    Part,
    Positive,
    Shape,
    Threat,
    defense,
)
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, check_params, unreached
from defenses.nets.objectives import Ascent, Start
from defenses.nets.training import Mode, Objective, Recipe, staged


def flags(*, radius: float, steps: int, step_size: float, **_: object) -> str | None:
    """Return a sentence where the inner steps do not reach the radius, else None.

    Args:
        radius: linf radius of the ascent.
        steps: number of ascents.
        step_size: length of an ascent.
        _: the other parameters.
    """
    return unreached(steps, step_size, radius)


@defense("trades", readouts=("label",), version=1, check_params=check_params, flags=flags)
class Trades(Classifier):
    """A network trained for CE(x) + `beta` · KL(p(x) || p(x')), where x' is a point at which the KL is large.

    Defaults are the settings of the TRADES code on CIFAR-10, except for `net`, which there is WRN-34-10. On
    MNIST the code has `net` smallcnn, `radius` 0.3, 40 steps of 0.01, `lr` 0.01, no decay, no `augment`, and
    100 epochs with `milestones` 54, 74, 89. API-Net's code has, for its tables (D-25), `start` uniform, 7
    steps, `radius` 8/255, `clean_forwards` 1, and the optimiser and schedule of `standard`.

    Source: Zhang et al. 2019, arXiv:1901.08573, equation 5 and algorithm 1; the authors' code.

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
        radius: linf radius of the ascent, in [0, 1] units, 0 or more.
        beta: weight of the divergence, 0 or more; the paper's 1 / lambda.
        steps: signed ascents of the divergence, 1 or more.
        step_size: length of an ascent, in [0, 1] units, above 0.
        start: where the ascent starts: ``gaussian`` at x plus 0.001 N(0, 1), ``uniform`` in the ball.
        attack_mode: mode of batch normalisation and dropout during the ascent: ``eval`` as released, or
            ``train``.
        detach_target: hold the clean prediction of the divergence fixed; in both codes a gradient flows
            into it.
        clean_forwards: passes of the clean images in training mode: 2 as in the TRADES code, one for each
            term, or 1 as in API-Net's.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: Net = "resnet18",
        width: Positive = 1.0,
        hidden: tuple[Count, ...] | None = None,
        initial: Part | None = None,
        epochs: Count = 76,
        batch: Count = 128,
        drop_last: bool = False,
        augment: bool = True,
        optimiser: Literal["sgd", "adam"] = "sgd",
        lr: Positive = 0.1,
        milestones: tuple[Count, ...] = (74,),
        warmup: NonNegativeCount = 0,
        momentum: NonNegative = 0.9,
        weight_decay: NonNegative = 2e-4,
        clip: Positive | None = None,
        radius: NonNegative = 0.031,
        beta: NonNegative = 6.0,
        steps: Count = 10,
        step_size: Positive = 0.007,
        start: Start = "gaussian",
        attack_mode: Mode = "eval",
        detach_target: bool = False,
        clean_forwards: Literal[1, 2] = 2,
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
        self.ascent = Ascent(Threat("linf", radius), steps, step_size, start, attack_mode)
        self.beta = beta
        self.detach_target, self.clean_forwards = detach_target, clean_forwards

    def objective(self, fitting: Fitting) -> Objective:
        """Return the cross-entropy of clean images plus `beta` times the divergence.

        Args:
            fitting: not asked for anything.
        """
        return objectives.trades(
            self.network,
            self.ascent,
            beta=self.beta,
            detach_target=self.detach_target,
            clean_forwards=self.clean_forwards,
        )

"""How CNN-F and its feed-forward twin are trained (Huang et al. 2020, arXiv:2007.09200, section 3)."""

from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor, nn

from bench import Fitting, Images, Labels, Split, Threat, Use
from defenses.nets import training as trainings
from defenses.nets.cnnf.feedback import Network
from defenses.nets.training import Recipe, constant, polynomial

Training: TypeAlias = Literal["adversarial", "standard"]

PGD = Use("pgd", {"steps": 7, "step_size": 0.0355, "start": "uniform", "keep": "last", "drop": False})
"""The inner attack on Fashion-MNIST: always seven steps from a uniform start, the last iterate."""

RATES: dict[Training, float] = {"adversarial": 0.05, "standard": 1e-3}
"""The learning rates of the released code."""


def feedback_recipe(training: Training, settings: Recipe) -> Recipe:
    """Return the recipe of adversarial or of standard training.

    Args:
        training: ``adversarial`` has SGD and a rate that falls polynomially to 0; ``standard`` has Adam at a
            constant rate, without clipping and without doubled decay.
        settings: epochs, batch, rate and what else both have; its optimiser and schedule are not looked at.

    Returns:
        The settings, with what the training decides.
    """
    if training == "adversarial":
        return replace(settings, optimiser="sgd", schedule=polynomial)
    return replace(settings, optimiser="adam", schedule=constant, clip=None, double_decay=())


class FeedbackTrained(nn.Module):
    """What CNN-F and its twin share: a network, a recipe, and one loss of clean and attacked images.

    Args:
        network: the network to train.
        recipe: how it is trained, see `feedback_recipe`.
        inner: the attack on each batch; None trains on clean images alone.
        radius: linf radius of that attack, in [0, 1] units of the images.
    """

    def __init__(self, network: Network, recipe: Recipe, *, inner: Use | None, radius: float) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.inner = inner
        self.threat = Threat("linf", radius)

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train on the split, or on its images attacked anew in every step.

        The inner attack sees the network's first pass alone.

        Args:
            train: the training images; they come through `fitting`.
            fitting: batches, draws and the inner attack.
        """
        attack = None if self.inner is None else fitting.attack(self.inner)
        objective = trainings.attacked(self.network, self.loss, attack, self.threat)
        trainings.train(self, fitting, objective, self.recipe)

    def loss(self, clean: Images, attacked: Images | None, y: Labels) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            clean: images (N, C, H, W) in [0, 1].
            attacked: the same images, attacked; None in standard training.
            y: labels (N,).
        """
        raise NotImplementedError

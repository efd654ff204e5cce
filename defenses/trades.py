"""TRADES: clean accuracy traded for stability of the prediction (Zhang et al. 2019, arXiv:1901.08573)."""

from typing import Literal

from bench import Fitting, Part, Shape, Threat, defense
from defenses.nets import objectives
from defenses.nets.classifiers import Classifier, Net, fits, unreached
from defenses.nets.objectives import Start
from defenses.nets.training import Mode, Objective, Recipe, staged


def doubts(*, radius: float, steps: int, step: float, **_: object) -> str | None:
    """Return a sentence where the inner steps do not reach the radius."""
    return unreached(steps, step, radius)


@defense("trades", readouts=("label",), version=1, check=fits, doubts=doubts)
class Trades(Classifier):
    """A network trained for CE(x) + `beta` · KL(p(x) || p(x')), x' being where the KL is large.

    Defaults are the settings of the TRADES code on CIFAR-10, `net` apart, which there is WRN-34-10:
    `steps` ascents of `step` within `radius`, starting at x plus 0.001 N(0, 1). Its clean images pass
    twice in training mode (`clean_forwards`), once for each term. On MNIST: `net` smallcnn, `radius`
    0.3, 40 steps of 0.01, `lr` 0.01, no decay, no `augment`, 100 epochs with `milestones` 54, 74, 89.

    As in API-Net's code, for its tables (D-25): `start` uniform, 7 steps, `radius` 8/255,
    `clean_forwards` 1, and optimiser and schedule as in `standard`. Both codes let the gradient flow
    into the clean prediction of the KL unless `detach_target`. `attack_mode` is as in `madry`, all else
    as in `standard`.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: Net = "resnet18",
        width: float = 1.0,
        hidden: tuple[int, ...] | None = None,
        initial: Part | None = None,
        epochs: int = 76,
        batch: int = 128,
        drop_last: bool = False,
        augment: bool = True,
        optimiser: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.1,
        milestones: tuple[int, ...] = (74,),
        warmup: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        clip: float | None = None,
        radius: float = 0.031,
        beta: float = 6.0,
        steps: int = 10,
        step: float = 0.007,
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
        self.threat = Threat("linf", radius)
        self.beta, self.steps, self.step, self.start = beta, steps, step, start
        self.attack_mode = attack_mode
        self.detach_target, self.clean_forwards = detach_target, clean_forwards

    def objective(self, fitting: Fitting) -> Objective:
        """Return the cross-entropy of clean images and `beta` times the divergence."""
        return objectives.trades(
            self.network,
            self.threat,
            beta=self.beta,
            steps=self.steps,
            step=self.step,
            start=self.start,
            mode=self.attack_mode,
            detach_target=self.detach_target,
            clean_forwards=self.clean_forwards,
        )

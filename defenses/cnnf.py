"""CNN-F: a network that reconsiders through a generative feedback (Huang et al. 2020, arXiv:2007.09200)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import (
    Decision,
    Fitting,
    Images,
    InputError,
    Labels,
    Shape,
    Split,
    Threat,
    Use,
    View,
    defense,
    view,
)
from defenses.nets import training as trainings
from defenses.nets.cnnf import architectures
from defenses.nets.cnnf.feedback import Cycle
from defenses.nets.cnnf.losses import adversarial_loss, standard_loss
from defenses.nets.cnnf.operators import Rule


def fits(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the network, its inference or its training cannot be as asked."""
    architectures.check(
        params["net"],
        shape,
        ind=params["ind"],
        width=params["width"],
        hidden=params["hidden"],
        first_kernel=params["first_kernel"],
    )
    trainings.check(params)
    if params["cycles"] < 0:
        raise InputError(f"cycles must not be negative, found {params['cycles']}")
    if not 0 <= params["eta"] <= 1:
        raise InputError(f"eta must be between 0 and 1, found {params['eta']}")


@defense("cnnf", readouts=("last", "avg"), served=("cycles", "eta"), version=1, check=fits)
class CnnF(nn.Module):
    """A network whose logits are fed back `cycles` times, to the features at `ind`, by steps of `eta`.

    Defaults are the paper's for net B.2 on Fashion-MNIST. WRN-40-2 on CIFAR-10: 2 cycles, `ind` 5,
    `clean_weight` 0.05, 500 epochs, radius 0.0315, inner steps of 0.01, `augment`, `drop_last` off. Net
    B.1: standard training, `ind` 0, 30 epochs. Radius and step are in [0, 1] units, half of what the
    released code writes for [-1, 1].

    Adversarial training has SGD with `momentum`, gradients clipped to the norm `clip` and a learning
    rate that falls polynomially (power 0.9) from `lr`, by default 0.05; standard training has Adam at a
    constant `lr`, by default 0.001. `clean` and `clean_weight` say whether and how much clean images
    count beside attacked ones; `reconstruction` weighs the distance of fed back features to the clean
    ones, at `ind` and, unless `taps` is ``input``, behind the blocks above it. `double_decay`: the
    released code decays fully connected weights twice, as their transposes are parameters too (D-39).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: architectures.Net = "b2",
        width: float = 1.0,
        hidden: tuple[int, ...] | None = None,
        first_kernel: Literal[1, 3] = 3,
        cycles: int = 1,
        eta: float = 0.1,
        ind: int = 2,
        training: Literal["adversarial", "standard"] = "adversarial",
        epochs: int = 200,
        batch: int = 256,
        drop_last: bool = True,
        augment: bool = False,
        lr: float | None = None,
        weight_decay: float = 5e-4,
        double_decay: bool = True,
        momentum: float = 0.9,
        clip: float = 0.5,
        radius: float = 0.1,
        inner: Use = trainings.PGD,
        clean: bool = True,
        clean_weight: float = 0.1,
        reconstruction: float = 0.1,
        taps: Literal["all", "input"] = "all",
    ) -> None:
        super().__init__()
        self.network = architectures.build(
            net, shape, ind=ind, width=width, hidden=hidden, first_kernel=first_kernel
        )
        self.recipe = trainings.feedback_recipe(
            training=training,
            epochs=epochs,
            batch=batch,
            drop_last=drop_last,
            augment=augment,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip=clip,
            double_decay=double_decay and cycles > 0,
        )
        self.inner = inner if training == "adversarial" else None
        self.threat = Threat("linf", radius)
        self.cycles, self.rule = cycles, Rule(eta)
        self.clean, self.clean_weight = clean, clean_weight
        self.reconstruction, self.taps = reconstruction, taps

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train all passes at once; the inner attack sees the first pass alone."""
        attack = None if self.inner is None else fitting.attack(self.inner)
        objective = trainings.attacked(self.network, self.loss, attack, self.threat)
        trainings.train(self, fitting, objective, self.recipe)

    def loss(self, clean: Images, attacked: Images | None, y: Labels) -> Tensor:
        """Return the loss of a batch; without attacked images, that of standard training."""
        count = None if self.taps == "all" else 1
        if attacked is None:
            first, *later = self._passes(clean)
            return standard_loss(
                [each.logits for each in (first, *later)],
                y,
                first.taps[:count],
                [each.taps[:count] for each in later],
                reconstruction=self.reconstruction,
            )
        # Nothing in the network joins images: two batches are one, without the copies of cutting it.
        cleans = self._passes(clean, cycles=self.cycles if self.clean else 0)
        attackeds = self._passes(attacked)
        return adversarial_loss(
            [each.logits for each in cleans] if self.clean else [],
            [each.logits for each in attackeds],
            y,
            cleans[0].taps[:count],
            [each.taps[:count] for each in attackeds[1:]],
            clean_weight=self.clean_weight,
            reconstruction=self.reconstruction,
        )

    @view("first", ignores=("cycles", "eta"))
    def first(self) -> View:
        """Look at the first pass, which is a plain network."""
        return View(self.network)

    @view("e2e_last", reads=("last",))
    def e2e_last(self) -> View:
        """Look at the last pass, with exact gradients through all of them."""
        return View(lambda x: self._logits(x)[-1])

    @view("e2e_avg", reads=("avg",))
    def e2e_avg(self) -> View:
        """Look at the mean of all passes' logits, with exact gradients.

        The released attack looks at the last pass whatever the read-out (D-11): that is `e2e_last`.
        """
        return View(lambda x: torch.stack(self._logits(x)).mean(0))

    @view("sum", reads=("avg",))
    def sum(self) -> View:
        """Look at all passes: logits (T, N, K), so that losses are added up, not logits."""
        return View(lambda x: torch.stack(self._logits(x)))

    @view("bpda", reads=("last",))
    def bpda(self, *, temperature: float = 0.1, head: Literal["max", "tanh"] = "max") -> View:
        """Look at the last pass; backwards, masks are sigmoids and signs are smooth (BPDA).

        A unit's mask becomes the sigmoid of f g / `temperature`, a pool's choice that of g (max - min) /
        `temperature`; the sign that normalisation leaves of WRN-40-2's head becomes u / max|u|, or
        tanh(u / `temperature`). Not of the paper: an adaptive attacker's view (Athalye et al. 2018,
        arXiv:1802.00420).
        """
        if not temperature > 0:
            raise InputError(f"view bpda: temperature must be positive, found {temperature}")
        rule = self.rule._replace(temperature=temperature, head=head)
        return View(lambda x: self._logits(x, rule)[-1])

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer by the last pass's logits, or by the mean of all."""
        passes = self._logits(x)
        return Decision.of(passes[-1] if readout == "last" else torch.stack(passes).mean(0))

    def _logits(self, x: Images, rule: Rule | None = None) -> list[Tensor]:
        if self.cycles == 0:
            return [self.network(x)]
        return [each.logits for each in self.network.cycles(x, self.cycles, rule or self.rule)]

    def _passes(self, x: Images, cycles: int | None = None) -> list[Cycle]:
        return list(self.network.cycles(x, self.cycles if cycles is None else cycles, self.rule))

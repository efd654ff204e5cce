"""The feed-forward twins of CNN-F (Huang et al. 2020, arXiv:2007.09200): its layers without feedback."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench import Decision, Fitting, Images, Labels, Shape, Split, Threat, Use, View, defense, view
from defenses.nets import training as trainings
from defenses.nets.cnnf import architectures
from defenses.nets.cnnf.losses import adversarial_loss


def fits(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the network or its training cannot be as asked."""
    architectures.check(
        params["net"],
        shape,
        width=params["width"],
        hidden=params["hidden"],
        first_kernel=params["first_kernel"],
    )
    trainings.check(params)


@defense(
    "cnn",
    readouts=("last",),
    version=1,
    aliases=dict.fromkeys(("e2e_last", "e2e_avg", "sum", "bpda", "logits"), "first"),
    check=fits,
)
class Cnn(nn.Module):
    """A plain network of CNN-F's layers, trained as usual or on attacked images.

    Defaults are the paper's for net B.2 on Fashion-MNIST. WRN-40-2 on CIFAR-10: 500 epochs, radius
    0.0315, inner steps of 0.01, `augment`, `drop_last` off. Net B.1: standard training, 30 epochs.
    Radius and step are in [0, 1] units, half of what the released code writes for [-1, 1].

    Adversarial training has SGD with `momentum`, gradients clipped to the norm `clip` and a learning
    rate that falls polynomially (power 0.9) from `lr`, by default 0.05; standard training has Adam at a
    constant `lr`, by default 0.001. The paper does not state the loss of the adversarially trained
    twin: here it is the cross-entropy of the attacked images alone (Madry et al. 2018,
    arXiv:1706.06083), which the released trainer computes without cycles and clean images; with
    `clean`, that of clean images counts beside it by `clean_weight`, as it does for CNN-F.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: architectures.Net = "b2",
        width: float = 1.0,
        hidden: tuple[int, ...] | None = None,
        first_kernel: Literal[1, 3] = 3,
        training: Literal["adversarial", "standard"] = "adversarial",
        epochs: int = 200,
        batch: int = 256,
        drop_last: bool = True,
        augment: bool = False,
        lr: float | None = None,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        clip: float = 0.5,
        radius: float = 0.1,
        inner: Use = trainings.PGD,
        clean: bool = False,
        clean_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.network = architectures.build(net, shape, width=width, hidden=hidden, first_kernel=first_kernel)
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
        )
        self.inner = inner if training == "adversarial" else None
        self.threat = Threat("linf", radius)
        self.clean, self.clean_weight = clean, clean_weight

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train on the split, or on its images attacked anew in every step."""
        attack = None if self.inner is None else fitting.attack(self.inner)
        objective = trainings.attacked(self.network, self.loss, attack, self.threat)
        trainings.train(self, fitting, objective, self.recipe)

    def loss(self, clean: Images, attacked: Images | None, y: Labels) -> Tensor:
        """Return the loss of a batch; without attacked images, that of standard training."""
        if attacked is None:
            return cross_entropy(self.network(clean), y)
        cleans = [self.network(clean)] if self.clean else []
        return adversarial_loss(cleans, [self.network(attacked)], y, clean_weight=self.clean_weight)

    @view("first", reads=("last",))
    def first(self) -> View:
        """Look at the logits."""
        return View(self.network)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer by the logits' arg-max."""
        return Decision.of(self.network(x))

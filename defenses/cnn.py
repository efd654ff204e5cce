"""The feed-forward twins of CNN-F (Huang et al. 2020, arXiv:2007.09200): its layers without feedback."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench import (
    Count,
    Decision,
    Images,
    Labels,
    NonNegative,
    Positive,
    Shape,
    Use,
    View,
    defense,
    view,
)
from defenses.nets.cnnf import architectures
from defenses.nets.cnnf.losses import adversarial_loss
from defenses.nets.cnnf.training import PGD, RATES, FeedbackTrained, Training, feedback_recipe
from defenses.nets.training import Recipe


@defense(
    "cnn",
    readouts=("last",),
    version=1,
    aliases=dict.fromkeys(("e2e_last", "e2e_avg", "sum", "bpda", "logits"), "first"),
    check_params=architectures.check_params,
)
class Cnn(FeedbackTrained):
    """A plain network of CNN-F's layers, trained on clean or on attacked images.

    The paper does not state the loss of the adversarially trained twin. Here it is the cross-entropy of the
    attacked images alone (Madry et al. 2018, arXiv:1706.06083), which the released trainer computes without
    cycles and clean images.

    Defaults are the paper's for net B.2 on Fashion-MNIST. For WRN-40-2 on CIFAR-10 the paper has 500 epochs,
    radius 0.0315, inner steps of 0.01, `augment`, and `drop_last` off; for net B.1 standard training of
    30 epochs.

    Source: Huang et al. 2020, arXiv:2007.09200, section 3 and appendix; the authors' code.

    Args:
        shape: channels, height, width and classes of the data.
        net: the architecture: ``b1`` and ``b2`` of the appendix, or ``wrn-40-2``.
        width: factor of the number of channels, above 0.
        hidden: units of each hidden fully connected layer; None takes the paper's, (128,) for ``b1`` and
            (1000, 128) for ``b2``. ``wrn-40-2`` has none.
        first_kernel: kernel side of the first convolution of ``b2``: 3 as released, 1 as printed (D-03).
        training: ``adversarial`` has SGD, clipped gradients and a polynomially falling rate (power 0.9);
            ``standard`` has Adam at a constant rate.
        epochs: passes over the training images, 1 or more.
        batch: images of a step, 1 or more.
        drop_last: leave out the last batch of an epoch if it is not full.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        lr: learning rate, above 0; None takes the released code's, 0.05 in adversarial training and 0.001
            in standard training.
        weight_decay: factor of the L2 penalty, 0 or more.
        momentum: momentum of SGD, 0 or more.
        clip: norm that the gradients of a step are clipped to in adversarial training, above 0.
        radius: linf radius of the inner attack, in [0, 1] units (half of what the released code writes for
            [-1, 1]), 0 or more.
        inner: the attack on each training batch; its step size is in [0, 1] units.
        clean: let clean images count beside attacked ones, as they do for CNN-F.
        clean_weight: weight of the clean images' cross-entropy, 0 or more; read with `clean`.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: architectures.Net = "b2",
        width: Positive = 1.0,
        hidden: tuple[Count, ...] | None = None,
        first_kernel: Literal[1, 3] = 3,
        training: Training = "adversarial",
        epochs: Count = 200,
        batch: Count = 256,
        drop_last: bool = True,
        augment: bool = False,
        lr: Positive | None = None,
        weight_decay: NonNegative = 5e-4,
        momentum: NonNegative = 0.9,
        clip: Positive = 0.5,
        radius: NonNegative = 0.1,
        inner: Use = PGD,
        clean: bool = False,
        clean_weight: NonNegative = 0.1,
    ) -> None:
        recipe = Recipe(
            epochs=epochs,
            batch=batch,
            drop_last=drop_last,
            augment=augment,
            lr=RATES[training] if lr is None else lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip=clip,
        )
        super().__init__(
            architectures.build(net, shape, width=width, hidden=hidden, first_kernel=first_kernel),
            feedback_recipe(training, recipe),
            inner=inner if training == "adversarial" else None,
            radius=radius,
        )
        self.clean, self.clean_weight = clean, clean_weight

    def loss(self, clean: Images, attacked: Images | None, y: Labels) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            clean: images (N, C, H, W) in [0, 1].
            attacked: the same images, attacked; None in standard training.
            y: labels (N,).
        """
        if attacked is None:
            return cross_entropy(self.network(clean), y)
        cleans = [self.network(clean)] if self.clean else []
        return adversarial_loss(cleans, [self.network(attacked)], y, clean_weight=self.clean_weight)

    @view("first", exact_for=("last",))
    def first(self) -> View:
        """Return the view of the logits (N, K)."""
        return View(self.network)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the logits' arg-max.

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``last``, the only one.
        """
        return Decision.of(self.network(x))

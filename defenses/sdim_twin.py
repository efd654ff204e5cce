"""The discriminative counterpart of SDIM: the same encoder, a logit for each class, cross-entropy."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench import Decision, Fitting, Images, Labels, Shape, Split, View, defense, view
from defenses.nets import training as trainings
from defenses.nets.sdim import best_epoch, encoder


def fits(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the network or its training cannot be as asked."""
    encoder.check(params["n"], params["width"], shape)
    best_epoch.check(params)


@defense("sdim-twin", readouts=("label",), version=1, check=fits)
class SdimTwin(nn.Module):
    """ResNet 8n+2 with an output for each class, trained as SDIM is, on the cross-entropy.

    Defaults are the paper's on MNIST; `n` 3 and `augment` on CIFAR-10 and SVHN. `width` scales all
    channels; `head` ``linear`` is as printed, ``two-layer`` as released (D-14).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        n: int = 1,
        width: float = 1.0,
        head: encoder.Head = "two-layer",
        epochs: int = 500,
        batch: int = 128,
        lr: float = 1e-3,
        augment: bool = False,
        keep: best_epoch.Keep = "best",
    ) -> None:
        super().__init__()
        encoder.check(n, width, shape)
        self.network = encoder.Encoder(shape.channels, shape.classes, n=n, width=width, head=head)
        self.recipe = trainings.Recipe(epochs=epochs, batch=batch, lr=lr, augment=augment)
        self.keep = keep

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train on the split."""
        best_epoch.train(
            self.network, train, fitting, lambda x, y, _: self.loss(x, y), self.recipe, self.keep
        )
        self.eval()

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return cross_entropy(self.network(x), y)

    @view("logits", reads=("label",))
    def logits(self) -> View:
        """Look at the logits."""
        return View(self.network)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer by the logits' arg-max."""
        return Decision.of(self.network(x))

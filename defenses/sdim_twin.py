"""The discriminative counterpart of SDIM: the same encoder, a logit for each class, cross-entropy."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench import (
    Count,
    Decision,
    Fitting,
    Images,
    Labels,
    Positive,
    Shape,
    Split,
    View,
    defense,
    view,
)
from defenses.nets import training as trainings
from defenses.nets.sdim import best_epoch, encoder


@defense("sdim-twin", readouts=("label",), version=1, check_params=best_epoch.check_params)
class SdimTwin(nn.Module):
    """ResNet 8n+2 with an output for each class, trained as SDIM is, on the cross-entropy.

    Defaults are the paper's on MNIST; on CIFAR-10 and SVHN it has `n` 3 and `augment`.

    Source: the discriminative counterpart in "Supervised Deep InfoMax" (anonymous submission, 2019).

    Args:
        shape: channels, height, width and classes of the data; images are 32x32.
        n: blocks of each of the encoder's four stages, 1 or more.
        width: factor of all channels, above 0.
        head: the encoder's last layers: ``two-layer`` as released, ``linear`` as printed (D-14).
        epochs: passes over the training images, 1 or more.
        batch: images of a step, 2 or more.
        lr: learning rate of Adam, above 0.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        keep: the weights that stay: of the ``best`` epoch, by its mean training loss, or of the ``last``.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        n: Count = 1,
        width: Positive = 1.0,
        head: encoder.Head = "two-layer",
        epochs: Count = 500,
        batch: Count = 128,
        lr: Positive = 1e-3,
        augment: bool = False,
        keep: best_epoch.Keep = "best",
    ) -> None:
        super().__init__()
        encoder.check_shape(shape)
        self.network = encoder.Encoder(shape.channels, shape.classes, n=n, width=width, head=head)
        self.recipe = trainings.Recipe(epochs=epochs, batch=batch, lr=lr, augment=augment)
        self.keep = keep

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train on the split.

        Args:
            train: the training images.
            fitting: batches and draws.
        """
        best_epoch.train(
            self.network, train, fitting, lambda x, y, _: self.loss(x, y), self.recipe, self.keep
        )
        self.eval()

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Return the mean cross-entropy of a batch, a scalar.

        Args:
            x: images (N, C, 32, 32) in [0, 1].
            y: labels (N,).
        """
        return cross_entropy(self.network(x), y)

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        """Return the view of the logits (N, K)."""
        return View(self.network)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the logits' arg-max.

        Args:
            x: images (N, C, 32, 32) in [0, 1].
            readout: ``label``, the only one.
        """
        return Decision.of(self.network(x))

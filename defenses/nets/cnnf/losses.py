"""The losses that CNN-F and its feed-forward twins are trained with (Huang et al. 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

from bench import Labels


def adversarial_loss(
    clean: Sequence[Tensor],
    attacked: Sequence[Tensor],
    y: Labels,
    features: Sequence[Tensor] = (),
    reconstructions: Sequence[Sequence[Tensor]] = (),
    *,
    clean_weight: float,
    reconstruction: float = 0.0,
) -> Tensor:
    """Return the loss of adversarial training, with the divisions of the released code (D-09).

    Args:
        clean: the logits v_0, ..., v_k of clean images, each (N, K); none: only attacked ones count.
        attacked: the same of attacked images.
        y: labels (N,).
        features: those of the clean images' first pass at every tap; gradients flow into them too.
        reconstructions: what the attacked images' feedbacks 1, ..., k gave there.
        clean_weight: weight of the clean images' cross-entropy, 0 or more.
        reconstruction: weight of the distance, 0 or more.
    """
    passes = len(attacked)
    total = torch.stack([cross_entropy(each, y) for each in attacked]).sum()
    if clean:
        total = total + clean_weight * torch.stack([cross_entropy(each, y) for each in clean]).sum()
        total = total / 2
    return total / passes + reconstruction * _distance(features, reconstructions)


def standard_loss(
    logits: Sequence[Tensor],
    y: Labels,
    features: Sequence[Tensor],
    reconstructions: Sequence[Sequence[Tensor]],
    *,
    reconstruction: float,
) -> Tensor:
    """Return the loss of standard training: cross-entropy and reconstruction, averaged over passes (D-08).

    Args:
        logits: the logits v_0, ..., v_k, each (N, K).
        y: labels (N,).
        features: those of the first pass at every tap.
        reconstructions: what the feedbacks 1, ..., k gave there.
        reconstruction: weight of the distance, 0 or more.
    """
    entropy = torch.stack([cross_entropy(each, y) for each in logits]).mean()
    return entropy + reconstruction * _distance(features, reconstructions)


def _distance(features: Sequence[Tensor], reconstructions: Sequence[Sequence[Tensor]]) -> Tensor | float:
    """Return the mean over passes, taps and elements of squared differences; 0 without a later pass."""
    # By the norm, whose gradient is one product; that of a mean comes in a layout that CPUs are slow in.
    terms = [
        vector_norm(back - feature).square() / feature.numel()
        for each in reconstructions
        for back, feature in zip(each, features, strict=True)
    ]
    return torch.stack(terms).mean() if terms else 0.0

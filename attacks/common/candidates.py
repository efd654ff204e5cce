"""The labels that an attack may go for, and how near each is where logits are taken as linear."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, autograd

from bench import Images, Labels, View, objective


def candidate_labels(view: View, logits: Tensor, y: Labels, most: int | None = None) -> Tensor:
    """Return the labels that would be a win, the likeliest first.

    Args:
        view: The view; with a target of its own, that is the one candidate. A refusal is none.
        logits: Its logits (N, K), or (draws, N, K), whose mean counts.
        y: The labels (N,), which are no candidates.
        most: How many are returned at most, at least 1; None: all.

    Returns:
        int64 (N, L). In place of a class that cannot be, at minus infinity, stands the likeliest once more.
    """
    if view.target is not None:
        return view.target[:, None]
    # Nothing is as low as the truth is put.
    least = torch.finfo(logits.dtype).min
    scores = mean_logits(logits).detach()
    classes = scores[:, :-1] if view.refusal else scores
    known = classes.nan_to_num(least, neginf=least).scatter(1, y[:, None], -math.inf)
    order = known.argsort(dim=1, descending=True, stable=True)[:, :-1]
    order = torch.where(classes.gather(1, order).isneginf(), order[:, :1], order)
    return order[:, :most]


class LinearStep(NamedTuple):
    """The shortest way to another label, as far as logits are linear."""

    label: Labels
    """Which of the labels it leads to, (N,)."""
    length: Tensor
    """Its l2 length, float64 (N,); infinite where no gradient says where to go."""
    unit: Images
    """Its direction, of length 1, (N, C, H, W), which also a way of no length has."""


def nearest_candidate(view: View, z: Images, logits: Tensor, y: Labels, labels: Tensor) -> LinearStep:
    """Return the shortest way to where another label wins (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599,
    eq. 8).

    Pixels that would leave the box take no part: with them the way would end short of its goal.

    Args:
        view: The view.
        z: Where to go from, (N, C, H, W), with gradients on.
        logits: The view's at `z`, (N, K) or (draws, N, K), with their graph, which is used up.
        y: The labels (N,).
        labels: The candidates, (N, L): a backward pass for each.

    Returns:
        The way to the nearest candidate.
    """
    logits = mean_logits(logits)
    label = labels[:, 0]
    length = torch.full((len(z),), math.inf, dtype=torch.float64, device=z.device)
    unit = torch.zeros_like(z)
    for place, candidate in enumerate(labels.unbind(1)):
        # While the truth (or a refusal) is the highest, this is what the candidate lacks to it.
        gap = objective(replace(view, target=candidate), logits, y, "margin")
        more = place + 1 < labels.shape[1]
        (gradient,) = autograd.grad(gap.sum(), z, retain_graph=more)
        held = ((z <= 0) & (gradient < 0)) | ((z >= 1) & (gradient > 0))
        gradient = gradient.masked_fill(held, 0)
        size = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        way = gap.detach().double().abs() / size
        towards = (gradient.double() / size[:, None, None, None]).to(z.dtype)
        # False for NaN, and for no gradient: that is infinitely far.
        nearer = (way < length) & towards.isfinite().flatten(1).all(1)
        label = torch.where(nearer, candidate, label)
        length = torch.where(nearer, way, length)
        unit = torch.where(nearer[:, None, None, None], towards, unit)
    return LinearStep(label, length, unit)


def mean_logits(logits: Tensor) -> Tensor:
    """Return (N, K) logits: of a view that answers several times, (draws, N, K), their mean, which
    decides."""
    return logits.mean(0) if logits.dim() == 3 else logits

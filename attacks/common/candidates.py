"""The labels that an attack may go for, and how near each is where logits are taken as linear."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, autograd

from bench import Images, Labels, View, objective


def candidate_labels(view: View, logits: Tensor, y: Labels, most: int | None = None) -> Tensor:
    """Return the labels (N, C) that would be a win, likeliest first, `most` of them; a target is alone.

    In place of a class that cannot be, at minus infinity, stands the likeliest once more.
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


class Step(NamedTuple):
    """The shortest way to another label, as far as logits are linear."""

    label: Labels
    """Which of the labels it leads to, (N,)."""
    length: Tensor
    """Its l2 length, float64 (N,); infinite where no gradient says where to go."""
    unit: Images
    """Its direction, of length 1, (N, C, H, W), which also a way of no length has."""


def nearest_candidate(view: View, z: Images, logits: Tensor, y: Labels, labels: Tensor) -> Step:
    """Return the shortest way from `z` to where one of `labels` (N, C) wins (Moosavi-Dezfooli et al. 2016,
    arXiv:1511.04599, eq. 8). `logits` are the view's at `z`, with their graph, which is used up.

    Pixels that would leave the box take no part: with them the way would end short of its goal.
    """
    logits = mean_logits(logits)
    label = labels[:, 0]
    length = torch.full((len(z),), math.inf, dtype=torch.float64, device=z.device)
    unit = torch.zeros_like(z)
    for place, rival in enumerate(labels.unbind(1)):
        # While the truth (or a refusal) is the highest, this is what the rival lacks to it.
        gap = objective(replace(view, target=rival), logits, y, "margin")
        more = place + 1 < labels.shape[1]
        (gradient,) = autograd.grad(gap.sum(), z, retain_graph=more)
        held = ((z <= 0) & (gradient < 0)) | ((z >= 1) & (gradient > 0))
        gradient = gradient.masked_fill(held, 0)
        size = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        way = gap.detach().double().abs() / size
        towards = (gradient.double() / size[:, None, None, None]).to(z.dtype)
        # False for NaN, and for no gradient: that is infinitely far.
        nearer = (way < length) & towards.isfinite().flatten(1).all(1)
        label = torch.where(nearer, rival, label)
        length = torch.where(nearer, way, length)
        unit = torch.where(nearer[:, None, None, None], towards, unit)
    return Step(label, length, unit)


def mean_logits(logits: Tensor) -> Tensor:
    """Return (N, K) logits: of a view that answers several times, their mean, which decides."""
    return logits.mean(0) if logits.dim() == 3 else logits

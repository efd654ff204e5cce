"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2), in l2."""

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess
from attacks.common.candidates import candidate_labels, nearest_candidate
from attacks.common.minimum_step import MinimumStep
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    NonNegative,
    Randomness,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)


@attack("deepfool", norms={"l2"}, version=1, kind="minimum-norm")
def deepfool(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 50,
    overshoot: NonNegative = 0.02,
    candidates: Count | None = None,
) -> Crafted:
    """Go straight to the nearest of the other classes, as if logits were linear, until the label changes.

    Each step is cut to the box; one that is too short to arrive beyond the boundary, as at a tie, is made as
    long as it takes (`MinimumStep`).

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        steps: How many steps are taken at most; 50, as in the authors' code.
        overshoot: By what share each step is made longer; 0.02 in the paper.
        candidates: How many of the likeliest wrong classes of the image itself are gone for, a backward pass
            for each at every step; None: all.

    Returns:
        The first success of each image, else the image, with the note ``failed``, where the label did not
        change.
    """
    nearest, least = NearestSuccess(x, threat), MinimumStep(x)
    rows, here, labels, z = torch.arange(len(x), device=x.device), view, y, x
    classes: Tensor | None = None
    for t in range(steps + 1):
        last = t == steps
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = here.logits(z)
        won = succeeded(here, logits, labels)
        if t > 0:
            # At a tie the arg-max may be either; only the image itself may be wrong by one.
            won &= objective(here, logits.detach(), labels, "margin") > 0
        nearest.offer(rows, z, won)
        if last or won.all():
            break
        if classes is None:
            classes = candidate_labels(here, logits, labels, candidates)
        way = nearest_candidate(here, z, logits, labels, classes)
        going = (~won & way.length.isfinite()).nonzero().squeeze(1)
        length = least(rows, (1 + overshoot) * way.length).to(z.dtype)
        z = (z.detach() + length[:, None, None, None] * way.unit).clamp(0, 1)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, here, labels = rows[going], here.select(going), labels[going]
            classes, z = classes[going], z[going]
    return nearest.crafted()

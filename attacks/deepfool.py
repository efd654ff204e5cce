"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2), in l2."""

from typing import Any

import torch
from torch import Tensor

from attacks.common.best_so_far import MinimumStep, NearestSuccess
from attacks.common.candidates import candidate_labels, nearest_candidate
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)


def _check(params: dict[str, Any], shape: Shape) -> None:
    if params["steps"] < 1:
        raise InputError(f"steps must be 1 or more, not {params['steps']}")
    if params["candidates"] is not None and params["candidates"] < 1:
        raise InputError(f"candidates must be 1 or more, or null for all, not {params['candidates']}")
    if not params["overshoot"] >= 0:
        raise InputError(f"overshoot must be 0 or more, not {params['overshoot']:g}")


@attack("deepfool", norms={"l2"}, version=1, budget="distance", check_params=_check)
def deepfool(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int | None = None,
) -> Crafted:
    """Go straight to the nearest of the other classes, as if logits were linear, until the label changes.

    `candidates` are the likeliest wrong classes of the image itself (null: all). Each step is made longer
    by `overshoot` and cut to the box; one that is too short to arrive beyond the boundary, as at a tie, is
    made as long as it takes (`Push`).

    Notes: ``failed``, where the label did not change; the image is the clean one.
    """
    nearest, push = NearestSuccess(x, threat), MinimumStep(x)
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
        step = nearest_candidate(here, z, logits, labels, classes)
        going = (~won & step.length.isfinite()).nonzero().squeeze(1)
        length = push(rows, (1 + overshoot) * step.length).to(z.dtype)
        z = (z.detach() + length[:, None, None, None] * step.unit).clamp(0, 1)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, here, labels = rows[going], here.take(going), labels[going]
            classes, z = classes[going], z[going]
    return nearest.crafted()

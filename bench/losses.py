"""What an attacker maximises, and when it has won: the one place that knows refusal and targets.

Success means: accepted, and wrong (or, with a target, accepted and the target). A refusal is never a
success.
"""

import math
from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.protocols import Labels, View

Loss: TypeAlias = Literal["ce", "margin", "dlr"]


def succeeded(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return bool (N,): whether the view's answer is a win. Logits that are not finite are none."""
    label = logits.argmax(1)
    if view.target is not None:
        won = label == view.target
    else:
        won = label != y
    if view.refusal:
        won = won & (label != logits.shape[1] - 1)
    return won & logits.isfinite().all(1)


def objective(view: View, logits: Tensor, y: Labels, loss: Loss = "ce") -> Tensor:
    """Return (N,): larger is nearer to success.

    ``ce``: cross-entropy with the truth (minus that with the target); with a refusal, the log of the
    probability of an accepted wrong label. ``margin``: the best goal's logit minus the best of the
    others (Carlini and Wagner 2017, arXiv:1608.04644), positive exactly on success. ``dlr``: the
    margin over the gap between the first and the third logit (Croce and Hein 2020, arXiv:2003.01690,
    eq. 6; eq. 7 with a target); below three classes there is no third, and it is the margin.
    """
    classes = logits.shape[1]
    goal = torch.zeros_like(logits, dtype=torch.bool)
    if view.target is not None:
        goal[torch.arange(len(goal), device=goal.device), view.target] = True
    else:
        goal |= True
        goal[torch.arange(len(goal), device=goal.device), y] = False
    if view.refusal:
        goal[:, -1] = False
    match loss:
        case "ce":
            if view.target is not None:
                return -cross_entropy(logits, view.target, reduction="none")
            if not view.refusal:
                return cross_entropy(logits, y, reduction="none")
            return logits.masked_fill(~goal, -math.inf).logsumexp(1) - logits.logsumexp(1)
        case "margin":
            return _margin(logits, goal)
        case "dlr":
            margin = _margin(logits, goal)
            if classes < 3:
                return margin
            top = logits.sort(dim=1, descending=True).values
            if view.target is not None and classes > 3:
                scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
            else:
                scale = top[:, 0] - top[:, 2]
            return margin / scale.clamp_min(1e-12)
        case _:
            assert_never(loss)


def _margin(logits: Tensor, goal: Tensor) -> Tensor:
    best = logits.masked_fill(~goal, -math.inf).amax(1)
    return best - logits.masked_fill(goal, -math.inf).amax(1)

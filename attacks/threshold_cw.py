"""The l2 attack of Carlini and Wagner (2017, arXiv:1608.04644) that also wants to be accepted.

For a defense that refuses what lies below a threshold of its class, as SDIM does: what is missing to the
threshold is added to what is missing to the class.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from attacks import cw_l2
from attacks.common.margins import margins, shortfall
from attacks.common.penalty_search import PenaltySearch, Variable
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    NonNegative,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    succeeded,
)


@attack("threshold-cw", norms={"l2"}, version=1, kind="minimum-norm", flags=cw_l2.flags, cost=cw_l2.cost)
def threshold_cw(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    kappa: NonNegative = 0.0,
    room: NonNegative = 0.0,
    searches: Count = 9,
    steps: Count = 1000,
    lr: Positive = 0.01,
    c: Positive = 1e-3,
    variable: Variable = "box",
    goal: cw_l2.Goal = "nearest",
    abort: bool = False,
) -> Crafted:
    """Minimise |z - x|^2 + c * [max(kappa - margin, 0) + max(threshold + room - the goal's logit, 0)].

    The margin is that among the classes alone; the threshold is the view's refusal, its last column. On a
    view that never refuses it is `cw-l2`.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        kappa: The wanted lead over the other classes, in units of the logits.
        room: The wanted lead over the threshold, in units of the logits.
        searches: How many descents there are, as in `cw-l2`.
        steps: How many steps of Adam each descent takes, from the image.
        lr: Adam's learning rate, in units of the variable.
        c: The first constant.
        variable: What is moved, as in `cw-l2`.
        goal: Which wrong label is gone for, as in `cw-l2`.
        abort: Whether a descent may end before its steps, as in `cw-l2`; off, as the threshold that is seen
            is that of the class that leads, and what is missing may rise where the goal begins to.

    Returns:
        The nearest point of each image that is wrong (or the target) and accepted, else the image, with the
        notes of `cw-l2`.
    """

    def lacks(here: View, logits: Tensor, y: Labels) -> Tensor:
        over_classes, over_threshold = leads(here, logits, y)
        return (shortfall(kappa, over_classes) + shortfall(room, over_threshold)).mean(0)

    def has(here: View, logits: Tensor, y: Labels) -> Tensor:
        over_classes, over_threshold = (each.mean(0) for each in leads(here, logits, y))
        return succeeded(here, logits, y) & (over_classes >= kappa) & (over_threshold >= room)

    search = PenaltySearch(searches, steps, lr, c, variable, abort)
    return cw_l2.LeastMove(search, lacks, has, goal).run(view, x, y, threat)


def leads(view: View, logits: Tensor, y: Labels) -> tuple[Tensor, Tensor]:
    """Return by how much the best goal leads the other classes, and by how much the refusal.

    Args:
        view: The view that answered.
        logits: Its logits, (N, K) or (draws, N, K).
        y: The labels (N,).

    Returns:
        (draws, N) each. Where nothing is refused the goal leads the refusal by infinity.
    """
    if not view.refusal:
        over_classes = margins(view, logits, y)
        return over_classes, torch.full_like(over_classes, math.inf)
    named = (y if view.target is None else view.target)[:, None]
    no_goal = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device).scatter_(1, named, True)
    if view.target is not None:
        no_goal = ~no_goal
    no_goal[:, -1] = False
    over_classes = margins(replace(view, refusal=False), logits[..., :-1], y)
    return over_classes, margins(view, logits.masked_fill(no_goal, -math.inf), y)

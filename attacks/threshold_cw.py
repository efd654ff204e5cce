"""The l2 attack of Carlini and Wagner (2017, arXiv:1608.04644) that also wants to be accepted.

For a defense that refuses what lies below a threshold of its class, as SDIM does: what is missing to the
threshold is added to what is missing to the class.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attacks import cw_l2
from attacks.common.margins import below, margins
from attacks.common.penalty_search import PenaltySearch, Variable
from bench import Crafted, Images, InputError, Labels, Randomness, Shape, Threat, View, attack, succeeded


def _check(params: dict[str, Any], shape: Shape) -> None:
    cw_l2.check(params, shape)
    if not 0 <= params["room"] < math.inf:
        raise InputError(f"room must be a margin of 0 or more, not {params['room']:g}")


@attack("threshold-cw", norms={"l2"}, version=1, budget="distance", doubts=cw_l2.doubts, check_params=_check)
def threshold_cw(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    kappa: float = 0.0,
    room: float = 0.0,
    searches: int = 9,
    steps: int = 1000,
    lr: float = 0.01,
    c: float = 1e-3,
    variable: Variable = "box",
    goal: cw_l2.Goal = "nearest",
    abort: bool = False,
) -> Crafted:
    """Minimise |z - x|^2 + c * [max(kappa - margin, 0) + max(threshold + room - the goal's logit, 0)].

    The margin is that among the classes alone; the threshold is the view's refusal, its last column. Kept is
    the nearest point that is wrong (or the target) and accepted, by `kappa` over the other classes and by
    `room` over the threshold. On a view that never refuses it is `cw-l2`, whose other settings, notes and
    search it has; but `abort` is off, as the threshold that is seen is that of the class that leads, and what
    is missing may rise where the goal begins to.
    """

    def lacks(here: View, logits: Tensor, y: Labels) -> Tensor:
        over_classes, over_threshold = leads(here, logits, y)
        return (below(kappa, over_classes) + below(room, over_threshold)).mean(0)

    def has(here: View, logits: Tensor, y: Labels) -> Tensor:
        over_classes, over_threshold = (each.mean(0) for each in leads(here, logits, y))
        return succeeded(here, logits, y) & (over_classes >= kappa) & (over_threshold >= room)

    descent = PenaltySearch(searches, steps, lr, c, variable, abort)
    return cw_l2.least_move(view, x, y, threat, descent, lacks, has, goal=goal)


def leads(view: View, logits: Tensor, y: Labels) -> tuple[Tensor, Tensor]:
    """Return by how much the best goal leads the other classes, and by how much the refusal, (draws, N) each.

    Where nothing is refused it leads the refusal by infinity.
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

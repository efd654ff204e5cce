"""The l2 attack of Carlini and Wagner (2017, arXiv:1608.04644, section VI-A)."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess
from attacks.common.candidates import candidate_labels, nearest_candidate
from attacks.common.margins import lack
from attacks.common.penalty_search import PenaltySearch, Variable
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

Goal: TypeAlias = Literal["nearest", "highest"]
"""Which wrong label is gone for: the nearest where logits are linear, or at each step the highest."""


def check(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` for settings that cannot be."""
    for name in ("searches", "steps"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    for name in ("lr", "c"):
        if not 0 < params[name] < math.inf:
            raise InputError(f"{name} must be a number above 0, not {params[name]:g}")
    if not 0 <= params["kappa"] < math.inf:
        raise InputError(f"kappa must be a margin of 0 or more, not {params['kappa']:g}")


def doubts(threat: Threat, *, steps: int, lr: float, variable: str, **_: object) -> str | None:
    """Return what is odd about settings with which some pixels cannot move."""
    # From atanh(1 - 1e-6) = 7.25 to where a hundredth of the box is left takes a way of 5.
    if variable == "tanh" and steps * lr < 5:
        return (
            f"through tanh, black and white pixels hardly move in {steps} steps of {lr:g}, "
            f"but in {5 / lr:.0f}"
        )
    return None


@attack("cw-l2", norms={"l2"}, version=1, budget="distance", doubts=doubts, check_params=check)
def cw_l2(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    kappa: float = 0.0,
    searches: int = 9,
    steps: int = 1000,
    lr: float = 0.01,
    c: float = 1e-3,
    variable: Variable = "box",
    goal: Goal = "nearest",
    abort: bool = True,
) -> Crafted:
    """Minimise |z - x|^2 + c * max(kappa - margin, 0) with Adam; keep the nearest point whose margin, in
    units of the logits, reaches `kappa`.

    `c` is searched for each example: from the given value times 10 until a success, then bisected, in
    `searches` descents of `steps` steps from the image. Without a target, the margin is that of the
    highest wrong logit (``goal="highest"``, as published), or of the class that is nearest at the image
    where logits are taken as linear; where that fails, the highest is tried. Any wrong label counts.
    With `abort`, each example's descent ends at a tenth of the steps over which its loss has not fallen.

    Notes: ``failed``, where no margin reached `kappa`: the image is the clean one; ``nonfinite``, where a
    gradient was not finite.
    """

    def lacks(here: View, logits: Tensor, y: Labels) -> Tensor:
        return lack(here, logits, y, kappa)

    def has(here: View, logits: Tensor, y: Labels) -> Tensor:
        return succeeded(here, logits, y) & (objective(here, logits, y, "margin") >= kappa)

    descent = PenaltySearch(searches, steps, lr, c, variable, abort)
    return least_move(view, x, y, threat, descent, lacks, has, goal=goal)


Lacks: TypeAlias = Callable[[View, Tensor, Labels], Tensor]
"""``lacks(view, logits, y)``: what logits (n, K) lack to what is wanted, (n,), never below 0."""

Has: TypeAlias = Callable[[View, Tensor, Labels], Tensor]
"""``has(view, logits, y)``: which of them have what is wanted, bool (n,)."""


def least_move(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    descent: PenaltySearch,
    lacks: Lacks,
    has: Has,
    *,
    goal: Goal,
) -> Crafted:
    """Go down on |z - x|^2 + c * what is lacking; keep the nearest point that has what is wanted."""
    nearest = NearestSuccess(x, threat)
    choose = goal == "nearest" and view.target is None
    labels: Labels | None = None

    def missing(here: View, z: Images, y: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = here.logits(z)
        aimed = here if labels is None else replace(here, target=labels[rows])
        return lacks(aimed, logits, y), has(here, logits.detach(), y)

    z = x.detach().requires_grad_(choose)
    with torch.set_grad_enabled(choose):
        logits = view.logits(z)
    everyone = torch.arange(len(x), device=x.device)
    nearest.offer(everyone, z, has(view, logits.detach(), y))
    if choose:
        labels = nearest_candidate(view, z, logits, y, candidate_labels(view, logits, y)).label
    broken = descent.run(view, x, y, nearest, everyone[nearest.failed], missing)
    if choose:
        labels = None
        broken |= descent.run(view, x, y, nearest, everyone[nearest.failed], missing)
    return nearest.crafted(nonfinite=broken)

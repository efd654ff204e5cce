"""The l2 attack of Carlini and Wagner (2017, arXiv:1608.04644, section VI-A)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess
from attacks.common.candidates import candidate_labels, nearest_candidate
from attacks.common.margins import margin_shortfall
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
    objective,
    succeeded,
)

Goal: TypeAlias = Literal["nearest", "highest"]
"""Which wrong label is gone for: the nearest where logits are linear, or at each step the highest."""


def flags(threat: Threat, *, steps: int, lr: float, variable: str, **_: object) -> str | None:
    """Return what is odd about settings with which some pixels cannot move.

    Args:
        threat: The threat model.
        steps: How many steps each descent takes.
        lr: Adam's learning rate.
        variable: What is moved.
    """
    # From atanh(1 - 1e-6) = 7.25 to where a hundredth of the box is left takes a way of 5.
    if variable == "tanh" and steps * lr < 5:
        return (
            f"through tanh, black and white pixels hardly move in {steps} steps of {lr:g}, "
            f"but in {5 / lr:.0f}"
        )
    return None


def cost(*, searches: int, steps: int, goal: Goal, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        searches: How many descents there are.
        steps: How many steps each descent takes.
        goal: Whether the nearest class is gone for first, and then the highest.
    """
    return 1 + (2 if goal == "nearest" else 1) * searches * (steps + 1)


@attack("cw-l2", norms={"l2"}, version=1, kind="minimum-norm", flags=flags, cost=cost)
def cw_l2(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    kappa: NonNegative = 0.0,
    searches: Count = 9,
    steps: Count = 1000,
    lr: Positive = 0.01,
    c: Positive = 1e-3,
    variable: Variable = "box",
    goal: Goal = "nearest",
    abort: bool = True,
) -> Crafted:
    """Minimise |z - x|^2 + c * max(kappa - margin, 0) with Adam, and keep the nearest point with that margin.

    The constant c is searched for each example: from the given value times 10 until a success, then bisected.
    Any wrong label counts.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        kappa: The wanted margin, in units of the logits: the paper's confidence.
        searches: How many descents there are, each with constants that the ones before have taught; 9, as in
            the authors' code.
        steps: How many steps of Adam each descent takes, from the image.
        lr: Adam's learning rate, in units of the variable.
        c: The first constant.
        variable: ``box``: the pixels are moved, and cut to the box after each step; ``tanh``: w is, for
            pixels (tanh w + 1) / 2, as published.
        goal: Without a target, whose margin it is: ``highest``: the highest wrong logit's, as published;
            ``nearest``: that of the class that is nearest at the image where logits are taken as linear, and
            where that fails the highest's.
        abort: Whether each example's descent ends at a tenth of the steps over which its loss has not fallen.

    Returns:
        The nearest point of each image, else the image, with the notes ``failed``, where no margin reached
        `kappa`, and ``nonfinite``, where a gradient was not finite.
    """

    def lacks(here: View, logits: Tensor, y: Labels) -> Tensor:
        return margin_shortfall(here, logits, y, kappa)

    def has(here: View, logits: Tensor, y: Labels) -> Tensor:
        return succeeded(here, logits, y) & (objective(here, logits, y, "margin") >= kappa)

    search = PenaltySearch(searches, steps, lr, c, variable, abort)
    return LeastMove(search, lacks, has, goal).run(view, x, y, threat)


Lacks: TypeAlias = Callable[[View, Tensor, Labels], Tensor]
"""``lacks(view, logits, y)``: what logits (n, K) lack to what is wanted, (n,), never below 0."""

Has: TypeAlias = Callable[[View, Tensor, Labels], Tensor]
"""``has(view, logits, y)``: which of them have what is wanted, bool (n,)."""


@dataclass(frozen=True)
class LeastMove:
    """The search for the nearest point that has what is wanted."""

    search: PenaltySearch
    """The descents on |z - x|^2 + c * what is lacking."""
    lacks: Lacks
    """What is lacking."""
    has: Has
    """What is wanted."""
    goal: Goal
    """Which wrong label is gone for."""

    def run(self, view: View, x: Images, y: Labels, threat: Threat) -> Crafted:
        """Search, for the nearest class first if that is the goal, then for the highest.

        Args:
            view: What is looked through, with gradients.
            x: Images (N, C, H, W) in [0, 1].
            y: Their labels (N,).
            threat: Its norm measures what is kept.

        Returns:
            The nearest points, with the notes ``failed`` and ``nonfinite``.
        """
        nearest = NearestSuccess(x, threat)
        choose = self.goal == "nearest" and view.target is None
        labels: Labels | None = None

        def missing(here: View, z: Images, y: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = here.logits(z)
            aimed = here if labels is None else replace(here, target=labels[rows])
            return self.lacks(aimed, logits, y), self.has(here, logits.detach(), y)

        z = x.detach().requires_grad_(choose)
        with torch.set_grad_enabled(choose):
            logits = view.logits(z)
        everyone = torch.arange(len(x), device=x.device)
        nearest.offer(everyone, z, self.has(view, logits.detach(), y))
        if choose:
            labels = nearest_candidate(view, z, logits, y, candidate_labels(view, logits, y)).label
        broken = self.search.run(view, x, y, nearest, everyone[nearest.failed], missing)
        if choose:
            labels = None
            broken |= self.search.run(view, x, y, nearest, everyone[nearest.failed], missing)
        return nearest.crafted(nonfinite=broken)

"""Least distance by signed steps (Chen, Xie and Zhu, eq. 20 and 21): |z - x|^2 + lambda F, where F is what is
missing to success, each example with a lambda of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import GradientNotes, NearestSuccess, finite
from attacks.common.margins import shortfall
from attacks.common.penalty_search import PenaltyConstant
from bench import Crafted, Images, Labels, Randomness, Threat, View, objective, succeeded

Schedule: TypeAlias = Literal["growing", "falling"]
"""Whether steps grow to their full length, or fall from it."""

Slope: TypeAlias = Callable[[View, Images, Labels, Randomness], tuple[Tensor, Tensor]]
"""``slope(view, z, y, noise)``: the gradient of F at points (n, C, H, W), and whether they have won, (n,)."""


def lacks(view: View, logits: Tensor, y: Labels, kappa: float) -> tuple[Tensor, Tensor]:
    """Return F, and which points have won.

    Args:
        view: The view that answered.
        logits: Its logits, (n, K) or (draws, n, K).
        y: The labels (n,).
        kappa: The wanted margin, in units of the logits, at least 0.

    Returns:
        How far each margin is below `kappa`, (n,), and whether the point is a success by as much, bool (n,).
    """
    margin = objective(view, logits, y, "margin")
    return shortfall(kappa, margin), succeeded(view, logits, y) & (margin >= kappa)


def length_at(t: int, steps: int, step_size: float, schedule: Schedule) -> float:
    """Return how long a step is, in units of [0, 1].

    Args:
        t: Which step, from 1 to `steps`.
        steps: How many there are.
        step_size: The full length.
        schedule: Whether it is reached at the end, or the steps fall from it.
    """
    return step_size * (t if schedule == "growing" else steps - t + 1) / steps


@dataclass(frozen=True, kw_only=True)
class SignedSearch:
    """Descents by signed steps, with lambda found for each example by binary search."""

    steps: int
    """How many steps a descent has, at least 1."""
    step_size: float
    """The full length of a step, in units of [0, 1]."""
    schedule: Schedule
    """How the lengths change."""
    searches: int
    """How many descents, at least 1."""
    weight: float
    """The first lambda, above 0."""
    kappa: float
    """The wanted margin, in units of the logits, at least 0."""

    def run(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, slope: Slope
    ) -> Crafted:
        """Go down from the image, descent after descent; an image that has won already stays where it is.

        Args:
            view: What is looked through.
            x: Images (N, C, H, W) in [0, 1].
            y: Their labels (N,).
            threat: Its norm measures what is kept.
            noise: Draws of each example's own, for `slope`.
            slope: The gradient of F.

        Returns:
            The nearest success of all iterates, with the notes ``failed``, ``flat``, where the first gradient
            of F was exactly zero, and ``nonfinite``, where one was not finite; neither moves a pixel.
        """
        nearest, notes = NearestSuccess(x, threat), GradientNotes(x)
        with torch.no_grad():
            _, won = lacks(view, view.logits(x), y, self.kappa)
        nearest.offer(torch.arange(len(x), device=x.device), x, won)
        rows = (~won).nonzero().squeeze(1)
        here, clean, labels, draws = view.select(rows), x[rows], y[rows], noise.select(rows)
        constant = PenaltyConstant(clean[:, 0, 0, 0], self.weight)
        for search in range(self.searches if len(rows) else 0):
            ever, z = torch.zeros_like(rows, dtype=torch.bool), clean
            for t in range(1, self.steps + 1):
                gradient, won = slope(here, z, labels, draws)
                nearest.offer(rows, z, won)
                ever |= won
                notes.see(rows, gradient[None], first=search == 0 and t == 1)
                pull = constant.value[:, None, None, None] * finite(gradient)
                length = length_at(t, self.steps, self.step_size, self.schedule)
                z = (z - length * (2 * (z - clean) + pull).sign()).clamp(0, 1)
            with torch.no_grad():
                _, won = lacks(here, here.logits(z), labels, self.kappa)
            nearest.offer(rows, z, won)
            constant.learn(ever | won)
        return nearest.crafted(**notes.columns())

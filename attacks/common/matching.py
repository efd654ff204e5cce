"""Matching a guide: what a network makes of an image is drawn towards what it makes of a guide's image.

A guide is an image of another class that the defense accepts. Whoever looks like it from inside is
accepted too, by any rule of refusal that looks at the same thing, so that no such rule need be known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import BestIterate, GradientNotes
from attacks.common.candidates import candidate_labels
from attacks.common.projected_ascent import ProjectedAscent, Start
from bench import Crafted, Features, Images, InputError, Labels, Randomness, Shape, Threat, View, succeeded

Look: TypeAlias = Callable[[View, Images], tuple[Tensor, Tensor]]
"""``look(view, z)``: what is matched, (..., N, D), and the logits."""

Aim: TypeAlias = Callable[[View, Labels], Tensor]
"""``aim(view, labels)``: what to match, (N, D), for the guides of these classes; `view` is the examples'."""

TYPICAL = 9
"""How many other classes there are in most data sets: the guess where a cost has to be told without the
data."""


def check_params(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where there are not as many other classes as are to be tried.

    Args:
        params: The attack's parameters; ``classes`` is looked at.
        shape: The data's.
    """
    if params["classes"] is not None and not params["classes"] < shape.classes:
        raise InputError(
            f"classes must be 1 to {shape.classes - 1}, the others than the true one, not {params['classes']}"
        )


def cost(*, classes: int | None, steps: int, **_: object) -> int:
    """Return how many forward passes a matching makes over each example, at most.

    Args:
        classes: How many classes are tried; None: all of them, taken for 9.
        steps: How many steps each turn has.
    """
    # The ranking; of each turn the guide, the iterates with the start, a start that is put back, the result.
    return 1 + (TYPICAL if classes is None else classes) * (steps + 4)


@dataclass(frozen=True, kw_only=True)
class GuideMatching:
    """The climb of -||look(z) - aim||^2, towards one class's guide after another, the likeliest first."""

    look: Look
    """What is matched."""
    aim: Aim
    """What it is to match."""
    classes: int | None
    """How many classes are tried at most, at least 1; None: all."""
    steps: int
    """How many steps each climb has, at least 1."""
    step_size: float | None
    """Their length, in units of [0, 1]; None: 4 radius / steps."""
    start: Start
    """Where each climb begins."""

    def run(self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
        """Climb, turn after turn.

        An iterate that is wrong is better than one that is not; of both kinds the one is kept that is nearest
        to its guide. Where winning here is winning (``view.exact``), an example is done at its first success.

        Args:
            view: A view of features, with gradients.
            x: Images (N, C, H, W) in [0, 1].
            y: Their labels (N,).
            threat: A ball in linf or l2.
            noise: Draws of each example's own, for the starts.

        Returns:
            The images, with the notes of the ascent, and ``guide``, the class whose guide the image was drawn
            to, -1 for none.
        """
        with torch.no_grad():
            ranked = candidate_labels(view, view.logits(x), y, self.classes)
        ascent = ProjectedAscent(steps=self.steps, length=self.step_size, reach=4, start=self.start)
        best, notes, guide = BestIterate(x), GradientNotes(x), torch.full((len(x),), -1, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        for turn in ranked.unbind(1):
            if len(rows) == 0:
                break
            here, clean, labels = view.select(rows), x[rows], y[rows]
            with torch.no_grad():
                goal = self.aim(here, turn[rows])

            def evaluate(
                seen: View, z: Images, truth: Labels, among: Tensor, goal: Tensor = goal
            ) -> tuple[Tensor, Tensor]:
                found, logits = self.look(seen, z)
                wanted = goal[among].repeat(len(z) // max(len(among), 1), 1)
                return _closeness(found, wanted, succeeded(seen, logits.detach(), truth)), logits

            crafted = ascent.run(here, clean, labels, threat, noise.select(rows), evaluate)
            everyone = torch.arange(len(rows), device=x.device)
            with torch.no_grad():
                losses, logits = evaluate(here, crafted.images, labels, everyone)
            better = best.offer(rows, crafted.images, losses)
            guide[rows] = torch.where(better, turn[rows], guide[rows])
            notes.flat[rows] |= crafted.notes["flat"]
            notes.nonfinite[rows] |= crafted.notes["nonfinite"]
            if view.exact:
                rows = rows[~succeeded(here, logits, labels)]
        return Crafted(best.images, {**notes.columns(), "guide": guide})


def _closeness(found: Tensor, wanted: Tensor, wrong: Tensor) -> Tensor:
    """Return (N,): larger is nearer; any that is wrong is above all that are not, and climbs the same way."""
    far = (found - wanted).square().sum(-1)
    if far.dim() == 2:  # Several answers: the mean of their losses.
        far = far.mean(0)
    return torch.where(wrong, 1 / (1 + far), -far)


def guides_of(view: View, labels: Labels, like: Images) -> Images:
    """Return the guide of each label.

    Args:
        view: A view of features.
        labels: The labels, (N,).
        like: Images whose dtype and device are taken.

    Returns:
        (N, C, H, W).

    Raises:
        InputError: Where the view has none to show.
    """
    if not isinstance(view, Features) or view.guides is None:
        raise InputError(
            "this view has no guides, images of each class that the defense accepts: they are kept when a "
            "defense is fitted with its thresholds"
        )
    return view.guides.to(like)[labels]

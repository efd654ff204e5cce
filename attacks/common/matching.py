"""Matching a guide: what a network makes of an image is drawn towards what it makes of a guide's image.

A guide is an image of another class that the defense accepts. Whoever looks like it from inside is
accepted too, by any rule of refusal that looks at the same thing, so that no such rule need be known.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attacks.common.candidates import candidate_labels
from attacks.common.projected_ascent import Start, projected_ascent
from bench import Crafted, Features, Images, InputError, Labels, Randomness, Shape, Threat, View, succeeded

Look: TypeAlias = Callable[[View, Images], tuple[Tensor, Tensor]]
"""``look(view, z)``: what is matched, (..., N, D), and the logits."""

Aim: TypeAlias = Callable[[View, Labels], Tensor]
"""``aim(view, labels)``: what to match, (N, D), for the guides of these classes; `view` is the examples'."""


def check(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where an attack that matches guides cannot go."""
    if params["steps"] < 1:
        raise InputError(f"steps must be 1 or more, not {params['steps']}")
    if params["step"] is not None and not params["step"] > 0:
        raise InputError(f"step must be a length above 0, not {params['step']:g}")
    if params["classes"] is not None and not 0 < params["classes"] < shape.classes:
        raise InputError(
            f"classes must be 1 to {shape.classes - 1}, the others than the true one, not {params['classes']}"
        )


def doubts(threat: Threat, *, steps: int, step: float | None, **_: object) -> str | None:
    """Return what is odd about steps that cannot reach the radius."""
    if step is not None and (reach := steps * step) < threat.radius:
        return f"{steps} steps of {step:g} reach {reach:g}, less than the radius {threat.radius:g}"
    return None


def match(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    look: Look,
    aim: Aim,
    *,
    classes: int | None,
    steps: int,
    step: float | None,
    start: Start,
) -> Crafted:
    """Climb -||look(z) - aim||^2, towards one class's guide after another, the likeliest first.

    An iterate that is wrong is better than one that is not; of both kinds the one is kept that is nearest
    to its guide. Where winning here is winning (``view.final``), an example is done at its first success.
    Notes: those of the ascent, and ``guide``, the class whose guide the image was drawn to.
    """
    with torch.no_grad():
        ranked = candidate_labels(view, view.logits(x), y, classes)
    best = _Best(x)
    rows = torch.arange(len(x), device=x.device)
    for turn in ranked.unbind(1):
        if len(rows) == 0:
            break
        here, clean, labels = view.take(rows), x[rows], y[rows]
        with torch.no_grad():
            goal = aim(here, turn[rows])

        def ask(
            seen: View, z: Images, truth: Labels, among: Tensor, goal: Tensor = goal
        ) -> tuple[Tensor, Tensor]:
            found, logits = look(seen, z)
            wanted = goal[among].repeat(len(z) // max(len(among), 1), 1)
            return _nearness(found, wanted, succeeded(seen, logits.detach(), truth)), logits

        crafted = projected_ascent(
            here,
            clean,
            labels,
            threat,
            noise.take(rows),
            ask,
            steps=steps,
            length=4 * threat.radius / steps if step is None else step,
            start=start,
        )
        everyone = torch.arange(len(rows), device=x.device)
        with torch.no_grad():
            losses, logits = ask(here, crafted.images, labels, everyone)
        best.offer(rows, crafted, losses, turn[rows])
        if view.final:
            rows = rows[~succeeded(here, logits, labels)]
    return Crafted(best.images, best.notes)


def _nearness(found: Tensor, wanted: Tensor, wrong: Tensor) -> Tensor:
    """Return (N,): larger is nearer; any that is wrong is above all that are not, and climbs the same way."""
    far = (found - wanted).square().sum(-1)
    if far.dim() == 2:  # Several answers: the mean of their losses.
        far = far.mean(0)
    return torch.where(wrong, 1 / (1 + far), -far)


class _Best:
    """The best image of each example over all turns, and what is noted of it."""

    def __init__(self, x: Images) -> None:
        self.images = x.clone()
        self._losses = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        guide = torch.full((len(x),), -1, device=x.device)
        self.notes = {"flat": no, "nonfinite": no.clone(), "guide": guide}

    def offer(self, rows: Tensor, crafted: Crafted, losses: Tensor, guide: Labels) -> None:
        """Take what a turn made of the examples `rows` where it is better; a loss of NaN never is."""
        better = losses > self._losses[rows]
        self.images[rows] = torch.where(better[:, None, None, None], crafted.images, self.images[rows])
        self._losses[rows] = torch.where(better, losses.double(), self._losses[rows])
        self.notes["guide"][rows] = torch.where(better, guide, self.notes["guide"][rows])
        for name in ("flat", "nonfinite"):
            self.notes[name][rows] |= crafted.notes[name]


def guides_of(view: View, labels: Labels, like: Images) -> Images:
    """Return the guide image of each label; raise `InputError` where the view has none to show."""
    if not isinstance(view, Features) or view.guides is None:
        raise InputError(
            "this view has no guides, images of each class that the defense accepts: they are kept when a "
            "defense is fitted with its thresholds"
        )
    return view.guides.to(like)[labels]

"""Fast adaptive boundary attack (Croce and Hein 2020, arXiv:1907.02044), in linf, l2 and l1.

It moves as little as it can: step by step to the nearest decision boundary as it looks from the point,
drawn towards the clean image, and back towards it from every success.

Two attacks on one search, in one file for it: `fab` looks at the boundaries of all classes at every step,
`fab-t` at one class's at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess, finite
from attacks.common.candidates import candidate_labels
from attacks.common.minimum_step import MinimumStep
from attacks.common.starts import surface
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    Norm,
    Randomness,
    Share,
    Threat,
    View,
    attack,
    lengths,
    objective,
    succeeded,
)

SLACK = 1e-3
"""How far beyond the boundary's estimate the final search looks, as a share of the way: what lies on it to
the last bit is an adversarial image in one batch and none in another."""

ORDER: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}

SECANTS = 3
"""How often the final search cuts the way (section 3.3)."""

Overshoot: TypeAlias = Annotated[float, Field(ge=1, allow_inf_nan=False)]
"""A factor that must reach the boundary."""


def cost(*, steps: int, restarts: int = 1, classes: int = 1, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        steps: How many steps each walk takes.
        restarts: How many walks there are for each class, or for all of them at once.
        classes: How many classes are gone for, one at a time.
    """
    return 1 + classes * restarts * (2 * steps + 1 + SECANTS)


@attack("fab", norms={"linf", "l2", "l1"}, version=1, kind="minimum-norm", cost=cost)
def fab(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 100,
    restarts: Count = 1,
    alpha_max: Share = 0.1,
    eta: Overshoot = 1.05,
    beta: Share = 0.9,
) -> Crafted:
    """Step to the boundary of the wrong class that looks nearest, each time: a gradient for every class.

    The first restart begins at the image, the others at a random point half as far as the nearest success.
    Within a radius, if one is given, an example is done.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        steps: How many steps each restart takes; 100, as in AutoAttack.
        restarts: How many walks there are.
        alpha_max: The largest share, from 0 to 1, that the clean image's own projection has in a step (eq.
            9); 0.1 in the paper.
        eta: By what factor, 1 or more, a step goes beyond the boundary; 1.05 in the paper.
        beta: What is left, from 0 to 1, of the way from the image to a success, when the walk goes back from
            it; 0.9 in the paper.

    Returns:
        The nearest success of each image, else the image, with the note ``failed``.
    """
    search = _BoundarySearch(view, x, y, threat, noise, _Settings(steps, alpha_max, eta, beta))
    for restart in range(restarts):
        search.run(search.candidates(None), wander=restart > 0)
    return search.nearest.crafted()


@attack("fab-t", norms={"linf", "l2", "l1"}, version=1, kind="minimum-norm", cost=cost)
def fab_t(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 100,
    restarts: Count = 1,
    classes: Count = 9,
    alpha_max: Share = 0.1,
    eta: Overshoot = 1.05,
    beta: Share = 0.9,
) -> Crafted:
    """Step to the boundary of one class only, for each of the likeliest wrong classes in turn
    (Croce and Hein 2020, arXiv:2003.01690, section 5): a gradient in each step, however many classes.

    They are ranked by the logits of the clean image; any wrong answer is a success. Else as `fab`.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        steps: How many steps each walk takes; 100, as in AutoAttack.
        restarts: How many walks there are for each class.
        classes: How many classes are gone for at most; 9, as in AutoAttack.
        alpha_max: The largest share, from 0 to 1, that the clean image's own projection has in a step.
        eta: By what factor, 1 or more, a step goes beyond the boundary.
        beta: What is left, from 0 to 1, of the way from the image to a success, when the walk goes back.

    Returns:
        The nearest success of each image, else the image, with the note ``failed``.
    """
    search = _BoundarySearch(view, x, y, threat, noise, _Settings(steps, alpha_max, eta, beta))
    for towards in search.candidates(classes).split(1, dim=1):
        for restart in range(restarts):
            search.run(towards, wander=restart > 0)
    return search.nearest.crafted()


@dataclass(frozen=True)
class _Settings:
    """What the walks of a search have in common."""

    steps: int
    alpha_max: float
    eta: float
    beta: float


class _BoundarySearch:
    """The search for the nearest adversarial image of each example, run after run."""

    def __init__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, settings: _Settings
    ) -> None:
        self.view, self.x, self.y, self.threat, self.noise = view, x, y, threat, noise
        self.settings = settings
        self.nearest = NearestSuccess(x, threat)
        with torch.no_grad():
            self.logits: Tensor = view.logits(x)
        self.margin = objective(view, self.logits, y, "margin")
        self.nearest.offer(torch.arange(len(x), device=x.device), x, succeeded(view, self.logits, y))

    def candidates(self, count: int | None) -> Tensor:
        """Return the classes to aim at, (N, L)."""
        return candidate_labels(self.view, self.logits, self.y, count)

    def run(self, classes: Tensor, *, wander: bool) -> None:
        """Walk towards the classes (N, L), and search the last stretch."""
        # Where there is no radius, an example is done if it moved by nothing: it was wrong already.
        enough = self.threat.radius if math.isfinite(self.threat.radius) and self.view.exact else 0.0
        everyone = (self.nearest.distance > enough).nonzero().squeeze(1)
        if len(everyone) == 0:
            return
        found, least = NearestSuccess(self.x[everyone], self.threat), MinimumStep(everyone)
        rows, here = everyone, torch.arange(len(everyone), device=everyone.device)
        view, x, y, classes = self.view.select(rows), self.x[rows], self.y[rows], classes[rows]
        z = self._start(rows) if wander else x
        for _ in range(self.settings.steps):
            z = self._step(view, x, z, y, classes, partial(least, here))
            with torch.no_grad():
                won = succeeded(view, view.logits(z), y)
            found.offer(here, z, won)
            z = torch.where(won[:, None, None, None], x + self.settings.beta * (z - x), z)
            if enough and len(standing := (found.distance[here] > enough).nonzero().squeeze(1)) < len(here):
                here, view, classes = here[standing], view.select(standing), classes[standing]
                x, y, z = x[standing], y[standing], z[standing]
                if len(here) == 0:
                    break
        self._polish(everyone, found, enough)
        self.nearest.offer(everyone, found.images, ~found.failed)

    def _start(self, rows: Tensor) -> Images:
        """Return a random point half as far as the nearest success, or the radius, or the box is wide."""
        x = self.x[rows]
        width = x[0].numel() ** (1 / ORDER[self.threat.norm])
        reach = self.nearest.distance[rows].clamp_max(min(self.threat.radius, width)).to(x.dtype)
        move = surface(x, self.threat.norm, self.noise.select(rows))
        return (x + reach[:, None, None, None] / 2 * move).clamp(0, 1)

    def _step(
        self, view: View, x: Images, z: Images, y: Labels, classes: Tensor, least: Callable[[Tensor], Tensor]
    ) -> Images:
        """Return the next point (algorithm 1): beyond the plane by `eta`, drawn to the clean image's own
        projection the more, the nearer that lies.
        """
        norm = self.threat.norm
        margin, slope = _nearest_plane(view, z, y, classes, norm)
        points, clean = z.flatten(1), x.flatten(1)
        # What is missing at either point: the plane through both is the one linearised at `z`.
        missing = torch.cat(
            [_lacking(margin, slope, norm, least), -margin - (slope * (clean - points)).sum(1)]
        )
        moves = crossing(torch.cat([points, clean]), torch.cat([slope, slope]), missing, norm)
        here, there = moves.chunk(2)
        length, other = (lengths(move, norm) for move in (here, there))
        share = (length / (length + other).clamp_min(1e-12)).clamp_max(self.settings.alpha_max)[:, None]
        eta = self.settings.eta
        moved: Tensor = (1 - share) * (points + eta * here) + share * (clean + eta * there)
        return moved.clamp_(0, 1).view_as(z)

    def _polish(self, rows: Tensor, found: NearestSuccess, enough: float) -> None:
        """Search the way from the clean image to the nearest success for where the margin is zero: three
        times by the secant (section 3.3).
        """
        far = (~found.failed & (found.distance > enough)).nonzero().squeeze(1)
        if len(rows := rows[far]) == 0:
            return
        view, x, y, way = self.view.select(rows), self.x[rows], self.y[rows], found.images[far] - self.x[rows]

        def ask(share: Tensor) -> tuple[Tensor, Tensor]:
            z = (x + share[:, None, None, None] * way).clamp_(0, 1)
            with torch.no_grad():
                logits = view.logits(z)
            won = succeeded(view, logits, y)
            found.offer(far, z, won)
            return objective(view, logits, y, "margin"), won

        low, high = torch.zeros_like(self.margin[rows]), torch.ones_like(self.margin[rows])
        below, (above, _) = self.margin[rows], ask(high)
        for _ in range(SECANTS):
            root = low - below / (above - below) * (high - low)
            share = torch.minimum(root.nan_to_num(1.0).clamp(0, 1) * (1 + SLACK), high)
            margin, won = ask(share)
            low, below = torch.where(won, low, share), torch.where(won, below, margin)
            high, above = torch.where(won, share, high), torch.where(won, margin, above)


def _lacking(margin: Tensor, slope: Tensor, norm: Norm, least: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what margins (N,) lack to 0, or to where the least move leads that gets on: what has not won
    does not stand still on the boundary.
    """
    size = lengths(slope, DUAL[norm])
    away = (-margin / size).masked_fill(margin > 0, math.inf)
    nudge = least(away).to(margin.dtype)
    return torch.where(away < nudge, nudge * size, -margin)


def _nearest_plane(view: View, z: Images, y: Labels, classes: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the margin (N,) and its gradient (N, D) at `z` for the one of `classes` (N, L) whose boundary,
    linearised, is nearest. What is not finite says nothing: a boundary that is out of reach.
    """
    z = z.detach().requires_grad_()
    margins = _margins(view, view.logits(z), y, classes)
    near = margin = z.new_full((len(z),), math.inf)
    slope = torch.zeros_like(z).flatten(1)
    last = margins.shape[1] - 1
    for place, level in enumerate(margins.detach().unbind(1)):
        # Towards one of them at a time: each example's gradient needs a backward pass for each class.
        chosen = torch.zeros_like(margins)
        chosen[:, place] = 1.0
        (gradient,) = autograd.grad(margins, z, chosen, retain_graph=place < last)
        gradient = finite(gradient.flatten(1))
        away = level.abs() / lengths(gradient, DUAL[norm])
        nearer = away < near  # Never where it is not a number.
        near, margin = torch.where(nearer, away, near), torch.where(nearer, level, margin)
        slope = torch.where(nearer[:, None], gradient, slope)
    return finite(margin), slope


def _margins(view: View, logits: Tensor, y: Labels, classes: Tensor) -> Tensor:
    """Return (N, L): the logit of each of `classes` less the best of the answers that are no win."""
    if view.target is not None:
        return objective(view, logits, y, "margin")[:, None]
    if logits.dim() == 3:
        return torch.stack([_margins(view, each, y, classes) for each in logits]).mean(0)
    held = logits.gather(1, y[:, None])
    if view.refusal:
        held = torch.maximum(held, logits[:, -1:])
    return logits.gather(1, classes) - held


def crossing(points: Tensor, slope: Tensor, missing: Tensor, norm: Norm) -> Tensor:
    """Return the shortest moves in the box that gain what is missing, to first order.

    Args:
        points: Where to move from, (N, D), in [0, 1].
        slope: What each value gains when it is moved by 1, (N, D).
        missing: What the moves are to gain, (N,).
        norm: In which norm they are the shortest.

    Returns:
        (N, D); where the box is too small for the gain, the moves that come nearest.
    """
    gain, need = slope.abs(), missing.abs()[:, None]
    forward = (slope > 0) ^ (missing < 0)[:, None]
    room = torch.where(forward, 1 - points, points).masked_fill(gain == 0, 0.0)
    size = _in_order(gain, room, need) if norm == "l1" else _together(gain, room, need, norm)
    return torch.where(forward, size, -size)


def _together(gain: Tensor, room: Tensor, need: Tensor, norm: Norm) -> Tensor:
    """Return how far each value moves in linf or l2: min(t speed, room), with the t that gains the need.

    The gain is concave in t, so that Newton's iteration from below is exact once it has seen which values
    the box stops.
    """
    most = gain * room
    enough = most.sum(1, keepdim=True) > need
    pace = gain if norm == "linf" else gain.square()
    stopped = room == 0
    while True:
        left = need - most.masked_fill(~stopped, 0.0).sum(1, keepdim=True)
        t = left / pace.masked_fill(stopped, 0.0).sum(1, keepdim=True)
        size = t.expand_as(gain) if norm == "linf" else t * gain
        more = (size > room) & ~stopped & enough
        if not more.any():
            return torch.where(enough, torch.minimum(size, room), room)
        stopped |= more


def _in_order(gain: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return how far each value moves in l1: the steepest first, each as far as it can or need be."""
    gain, order = gain.sort(dim=1, descending=True)
    room = room.gather(1, order)
    most = gain * room
    before = most.cumsum(1) - most
    size = ((need - before) / gain.clamp_min(torch.finfo(gain.dtype).tiny)).clamp_min(0)
    return torch.zeros_like(size).scatter_(1, order, torch.minimum(size, room))

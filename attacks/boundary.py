"""Boundary attack (Brendel, Rauber and Bethge 2018, arXiv:1712.04248): a walk along the boundary, by answers.

With a read-out that refuses, to be accepted is a part of its goal.

The rules are those of foolbox 3, or of foolbox 1 and 2; written anew, because a batch of foolbox fails as
a whole where one example has no start, and shares its draws.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from bench import (
    Count,
    Crafted,
    Features,
    Images,
    Labels,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    succeeded,
)

BLENDS = 50
"""How many blends of an image with noise are tried, at equal distances."""

EVERY = 10
"""Success is measured in each of so many steps."""

BLOCK = 8
"""Proposals whose draws are made together: it decides which draws they are, and enters the results."""

CONVERGED = 1e-7
"""The length of the step towards the image at which an example is done."""


def cost(*, steps: int, directions: int, starts: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most, beside those for a view's guides.

    Args:
        steps: How many steps the walk has.
        directions: How many proposals a step tries at most.
        starts: How many draws are tried as a start.
    """
    tried = steps * directions
    return 1 + starts + BLENDS + tried + tried // EVERY


Factor: TypeAlias = Annotated[float, Field(gt=1, allow_inf_nan=False)]
"""A factor that changes something."""


@attack("boundary", norms={"l2"}, version=1, access="decision", kind="minimum-norm", cost=cost)
def boundary(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 25_000,
    directions: Count = 1,
    spherical_step: Positive = 0.01,
    source_step: Positive = 0.01,
    step_adaptation: Factor = 1.5,
    conditional: bool = False,
    starts: Count = 1000,
) -> Crafted:
    """Walk along the boundary: to a random side on the sphere around the image, then towards the image.

    A proposal is accepted if it is adversarial and nearer. The walk starts from a blend with the first
    uniform draw that is adversarial. Where none is, as with a read-out that refuses noise, it starts from a
    blend with the nearest of the view's guides that is: accepted images, one of each class. Defaults are
    foolbox 3's.

    Args:
        view: The answers of the read-out; nothing else is asked for.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        steps: How many steps the walk has.
        directions: How many proposals a step tries at most.
        spherical_step: The first length of the move on the sphere, relative to the distance.
        source_step: The first length of the move towards the image, relative to the distance.
        step_adaptation: By what factor, above 1, both lengths are multiplied or divided where too many or too
            few proposals succeed.
        conditional: Whether steps towards the image are measured, and asked for, only where the move on the
            sphere is adversarial (foolbox 1 and 2).
        starts: How many uniform draws are tried as a start.

    Returns:
        The nearest adversarial image of each walk, with the note ``failed``, where no start was adversarial:
        those images are returned unchanged.
    """
    images = x.clone()
    right = (~_won(view, x, y)).nonzero().squeeze(1)
    failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    found, begun = _start(view.select(right), x[right], y[right], noise.select(right), starts)
    failed[right] = ~found
    rows = right[found]
    images[rows] = begun[found]
    walk = _Walk.begin(rows, x[rows], y[rows], images[rows], spherical_step, source_step)
    view, noise = view.select(rows), noise.select(rows)
    passes, ways = 0, x
    while len(walk.rows):
        if passes % BLOCK == 0:
            ways = noise.normal((BLOCK, *x.shape[1:])).to(x.dtype)
        walk.step(view, ways[:, passes % BLOCK], directions, step_adaptation, conditional)
        # Waits for the device: how many examples go on.
        standing = ((walk.taken < steps) & (walk.source >= CONVERGED)).nonzero().squeeze(1)
        if len(standing) < len(walk.rows):
            images[walk.rows] = walk.z
            walk, view, noise = walk.select(standing), view.select(standing), noise.select(standing)
            ways = ways[standing]
        passes += 1
    return Crafted(images, {"failed": failed})


def _won(view: View, z: Images, y: Labels) -> Tensor:
    with torch.no_grad():
        return succeeded(view, view.logits(z), y)


def _start(view: View, x: Images, y: Labels, noise: Randomness, starts: int) -> tuple[Tensor, Images]:
    """Return whether an adversarial start was found, (n,), and its blend with `x` that is nearest to `x`."""
    far, found = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(starts):
        rows = (~found).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        far[rows] = noise.select(rows).uniform(tuple(x.shape[1:])).to(x.dtype)
        found[rows] = _won(view.select(rows), far[rows], y[rows])
    rows = (~found).nonzero().squeeze(1)
    if len(rows) and isinstance(view, Features) and view.guides is not None:
        found[rows], far[rows] = _guided(view.select(rows), x[rows], y[rows], view.guides.to(x))
    near, done = far.clone(), ~found
    for share in torch.linspace(0, 1, BLENDS + 1)[1:-1].tolist():
        rows = (~done).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        blend = torch.lerp(x[rows], far[rows], share)
        done[rows] = won = _won(view.select(rows), blend, y[rows])
        near[rows[won]] = blend[won]
    return found, near


def _guided(view: View, x: Images, y: Labels, guides: Images) -> tuple[Tensor, Images]:
    """Return whether a guide (K, C, H, W) is adversarial, (n,), and the nearest that is, else `x`."""
    far, least = x.clone(), torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    for guide in guides:
        length = _length(guide - x)
        nearer = _won(view, guide.expand_as(x), y) & (length < least)
        far = torch.where(nearer[:, None, None, None], guide, far)
        least = torch.where(nearer, length, least)
    return least.isfinite(), far


@dataclass
class _Walk:
    """The examples that go on, and what is known of each; all are (n, ...)."""

    rows: Tensor
    x: Images
    y: Labels
    z: Images
    """Adversarial, and never farther than it was."""
    distance: Tensor
    spherical: Tensor
    source: Tensor
    taken: Tensor
    """Steps taken."""
    tried: Tensor
    """Proposals tried in this step."""
    sphere: Tensor
    """Which of the last 100 measured moves on the sphere were adversarial, and how many there were."""
    sphered: Tensor
    towards: Tensor
    """The same of 30 steps towards the image."""
    stepped: Tensor

    @classmethod
    def begin(cls, rows: Tensor, x: Images, y: Labels, z: Images, spherical: float, source: float) -> "_Walk":
        """Return the walk before its first step."""

        def every(value: float) -> Tensor:
            return torch.full((len(x),), value, dtype=x.dtype, device=x.device)

        def measured(size: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(x), size, dtype=x.dtype, device=x.device), torch.zeros_like(rows)

        return cls(
            rows,
            x,
            y,
            z,
            _length(z - x),
            every(spherical),
            every(source),
            torch.zeros_like(rows),
            torch.zeros_like(rows),
            *measured(100),
            *measured(30),
        )

    def select(self, rows: Tensor) -> "_Walk":
        """Return the walk of some of the examples."""
        return _Walk(*(getattr(self, each.name)[rows] for each in fields(self)))

    def step(self, view: View, way: Tensor, directions: int, adaptation: float, conditional: bool) -> None:
        """Try one proposal of each example; accept it where it is adversarial and nearer."""
        candidate, beside = self.propose(way)
        due = ((self.taken + 1) % EVERY == 0).nonzero().squeeze(1)
        measured = due
        won = torch.zeros_like(self.rows, dtype=torch.bool)
        asked = torch.arange(len(won), device=won.device)
        if len(due):
            around = _won(view.select(due), beside[due], self.y[due])
            _note(self.sphere, self.sphered, due, around)
            if conditional:
                measured = due[around]
                asked = (~won.scatter(0, due[~around], True)).nonzero().squeeze(1)
        here = view if len(asked) == len(won) else view.select(asked)
        won[asked] = _won(here, candidate[asked], self.y[asked])
        if len(due):
            _note(self.towards, self.stepped, measured, won[measured])
            self.adapt(adaptation, conditional)
        length = _length(candidate - self.x)
        won &= length < self.distance
        self.z = torch.where(won[:, None, None, None], candidate, self.z)
        self.distance = torch.where(won, length, self.distance)
        self.tried += 1
        over = won | (self.tried >= directions)
        self.taken += over
        self.tried.masked_fill_(over, 0)

    def propose(self, way: Tensor) -> tuple[Images, Images]:
        """Return a proposal for each example, and the point on the sphere, to the side `way`, before it."""
        away = (self.z - self.x).flatten(1)
        radius = self.distance.to(away.dtype).clamp_min(torch.finfo(away.dtype).tiny)[:, None]
        side = way.flatten(1)
        side = side - (side * away).sum(1, keepdim=True) / radius**2 * away
        spherical, source = self.spherical[:, None], self.source[:, None]
        side *= spherical * radius / _length(side).to(away.dtype)[:, None]
        # Pythagoras: back on the sphere.
        beside = self.x + ((away + side) / (1 + spherical**2).sqrt()).view_as(self.x)
        beside = beside.clamp(0, 1)
        # The box, and rounding, may have taken it off the sphere, which counts as a part of the step.
        left = _length(beside - self.x).to(away.dtype)[:, None]
        share = ((source - 1) * radius + left).clamp_min(0) / left
        candidate = beside + (self.x - beside) * share[..., None, None]
        return candidate.clamp(0, 1), beside

    def adapt(self, factor: float, conditional: bool) -> None:
        """Change the lengths where a full window has too many or too few successes, and empty it."""
        change = _change(self.sphere, self.sphered, 0.2, 0.5, factor)
        self.spherical, self.source = self.spherical * change, self.source * change
        low, high = (0.2, 0.5) if conditional else (0.1, 0.25)
        self.source = self.source * _change(self.towards, self.stepped, low, high, factor)


def _note(window: Tensor, count: Tensor, rows: Tensor, values: Tensor) -> None:
    """Put values (n,) in the windows of `rows`, in place of their oldest."""
    window[rows, count[rows] % window.shape[1]] = values.to(window.dtype)
    count[rows] += 1


def _change(window: Tensor, count: Tensor, low: float, high: float, factor: float) -> Tensor:
    """Return by what a length is multiplied, (n,), and empty the windows where it is not 1."""
    mean = window.mean(1)
    full = count >= window.shape[1]
    up, down = full & (mean > high), full & (mean < low)
    count.masked_fill_(up | down, 0)
    one = torch.ones_like(mean)
    return torch.where(up, one * factor, torch.where(down, one / factor, one))


def _length(move: Tensor) -> Tensor:
    """Return the l2 norm of each of (n, ...), in float64."""
    length: Tensor = torch.linalg.vector_norm(move.flatten(1), dim=1, dtype=torch.float64)
    return length

"""Projected ascent of any loss in a ball: what PGD is, and what attacks with losses or steps of their own
share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import BestIterate, GradientNotes, finite
from bench import Crafted, Images, Labels, Norm, Randomness, Threat, View, lengths, objective, succeeded
from bench import Loss as LossName

Evaluate: TypeAlias = Callable[[View, Images, Labels, Tensor], tuple[Tensor, Tensor]]
"""``evaluate(view, z, y, rows)``: the losses (copies * n,), larger is nearer to success, and the logits of
points (copies * n, C, H, W), copy after copy, of the examples `rows` (n,) of the batch; `view` is theirs."""

Direction: TypeAlias = Callable[[Tensor, Tensor | None, Threat], tuple[Tensor, Tensor | None]]
"""``direction(gradient, memory, threat)``: where to go from the iterates, (copies, n, C, H, W), as a move
that is multiplied by the length of a step; and what is remembered until the next step, (copies, n, ...), or
None. `gradient` is the loss's, (copies, n, C, H, W), with 0 where it is not finite; `memory` is what was
returned at the step before, for the examples that are left, and None at the first step of a restart."""

Start: TypeAlias = Literal["uniform", "zero"]
"""Where a walk begins: at a point drawn uniformly from the ball, or at the image itself."""

Keep: TypeAlias = Literal["best", "last"]
"""What a walk returns: its best iterate, or its last."""


def steepest(gradient: Tensor, memory: Tensor | None, threat: Threat) -> tuple[Tensor, Tensor | None]:
    """Return the steepest move of length 1: the sign in linf, the gradient at length 1 in l2.

    Args:
        gradient: Finite gradients (copies, n, ...); where one is 0, so is its move.
        memory: Nothing is remembered.
        threat: Its norm decides.

    Returns:
        The moves, of the gradient's shape, and `memory` as it was.
    """
    if threat.norm == "linf":
        return gradient.sign(), memory
    # Twice, because the squares of a saturated softmax's gradient are smaller than any float.
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        size = lengths(gradient.flatten(0, 1), norm).view(gradient.shape[:2])
        gradient = gradient / size.clamp_min(torch.finfo(size.dtype).tiny)[..., None, None, None]
    return gradient, memory


def loss_of(loss: LossName) -> Evaluate:
    """Return how an ascent evaluates one of the harness's losses (`bench.objective`).

    Args:
        loss: Its name.
    """

    def evaluate(view: View, z: Images, y: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = view.logits(z)
        return objective(view, logits, y, loss), logits

    return evaluate


@dataclass(frozen=True, kw_only=True)
class ProjectedAscent:
    """Projected steps up a loss, restarted, of which the best iterate is kept.

    Where winning here is winning (``view.exact``), an example is dropped at its first adversarial iterate
    (the image itself, where that and its start are wrong), and further restarts see the survivors only; with
    ``drop=False`` it goes on to the end, and no failure replaces a success. Otherwise the iterate with the
    highest loss is kept, the start and the last included.
    """

    steps: int
    """How many steps a walk has, at least 1."""
    length: float | None = None
    """What a direction is multiplied by, in units of [0, 1]; None: what `reach` says."""
    reach: float = 2.5
    """How many radii all steps are long together, where they have no length of their own; 2.5 as in the
    authors' MNIST challenge of PGD."""
    restarts: int = 1
    """How many walks there are, at least 1."""
    start: Start = "uniform"
    """Where they begin."""
    keep: Keep = "best"
    """Whether a walk's best iterate is kept, or its last."""
    drop: bool = True
    """Whether a success ends an example where winning here is winning."""
    direction: Direction = steepest
    """Where a step goes."""

    def run(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, evaluate: Evaluate
    ) -> Crafted:
        """Climb.

        Args:
            view: What is looked through, with gradients; its `starts`, if it has some, take the place of all
                own ones, and there is one walk from each.
            x: Images (N, C, H, W) in [0, 1].
            y: Their labels (N,).
            threat: A ball in linf or l2.
            noise: Draws of each example's own, for the starts.
            evaluate: The loss to climb.

        Returns:
            The images, with the notes ``flat``, where the gradient at the first step of a restart was
            exactly zero, and ``nonfinite``, where a gradient was not finite; neither moves a pixel.
        """
        stop = self.drop and view.exact
        length = self.reach * threat.radius / self.steps if self.length is None else self.length
        record, notes = BestIterate(x), GradientNotes(x)
        at_start = torch.zeros_like(record.won)
        rows = torch.arange(len(x), device=x.device)
        # From one point there is one walk.
        restarts = self.restarts if view.starts is None else 1
        for copies in _groups(restarts, stop):
            if len(rows) == 0:
                break
            here, clean, labels, draws = view.select(rows), x[rows], y[rows], noise.select(rows)
            everyone = torch.arange(len(rows), device=x.device)
            if here.starts is None:
                z = torch.stack([_start(clean, threat, draws, self.start) for _ in range(copies)])
            else:
                z = threat.project(clean, here.starts)[None]
            memory: Tensor | None = None
            for t in range(self.steps + 1):
                last = t == self.steps
                if last and self.keep == "last" and restarts == 1 and not stop:
                    record.images = z[0]  # Nothing to choose from: its loss need not be asked.
                    break
                z.requires_grad_(not last)
                with torch.set_grad_enabled(not last):
                    losses, logits = evaluate(here, z.flatten(0, 1), labels, rows)
                won = succeeded(here, logits, labels) & view.exact
                if self.keep == "best" or last:
                    _offer(record, rows, z, losses, won)
                elif stop:
                    _offer(record, rows, z, losses.masked_fill(~won, -math.inf), won)
                broken = won.view(copies, -1).any(0)
                if t == 0:
                    at_start[rows] |= broken
                # The one place where a step waits for the device: how many examples are left.
                standing = (~broken).nonzero().squeeze(1) if stop else everyone
                if last or len(standing) == 0:
                    rows = rows[standing]
                    break
                (gradient,) = autograd.grad(losses.sum(), z)
                z = z.detach()
                if len(standing) < len(rows):
                    rows, here = rows[standing], here.select(standing)
                    clean, labels = clean[standing], labels[standing]
                    z, gradient = z[:, standing], gradient[:, standing]
                    memory = None if memory is None else memory[:, standing]
                notes.see(rows, gradient, first=t == 0)
                move, memory = self.direction(finite(gradient), memory, threat)
                moved = (z + length * move).flatten(0, 1)
                z = threat.project(clean.expand_as(z).flatten(0, 1), moved).view_as(z)
        if stop and (self.start == "uniform" or view.starts is not None):
            # Asked afterwards and of these alone, so that nothing is spent where nothing breaks.
            record.put_back(at_start.nonzero().squeeze(1), view, x, y)
        return Crafted(record.images, notes.columns())


def _offer(record: BestIterate, rows: Tensor, z: Tensor, losses: Tensor, won: Tensor) -> None:
    """Offer (copies, n, ...) iterates of the examples `rows`, with losses and successes (copies * n,)."""
    chunks = losses.detach().chunk(len(z)), won.chunk(len(z))
    for iterate, loss, win in zip(z.detach(), *chunks, strict=True):
        record.offer(rows, iterate, loss, win)


def _groups(restarts: int, stop: bool) -> list[int]:
    """Return how many restarts walk side by side, group after group.

    The first restart finds most of what breaks, so that it goes alone where examples are dropped. The
    sizes depend on no batch: an example's result is the same in whatever company it is attacked.
    """
    alone = 1 if stop else 0
    return [1] * alone + [min(left, 8) for left in range(restarts - alone, 0, -8)]


def _start(x: Images, threat: Threat, noise: Randomness, start: str) -> Images:
    """Return where to start: `x` itself, or a point drawn uniformly from the ball, then clipped."""
    if start == "zero":
        return x
    shape, radius = tuple(x.shape[1:]), threat.radius
    if threat.norm == "linf":
        return threat.project(x, x + noise.uniform(shape, -radius, radius))
    normal = noise.normal(shape)
    # The volume within r grows with r to the power of the dimension.
    share = noise.uniform(()) ** (1 / math.prod(shape))
    length = lengths(normal, "l2").clamp_min(1e-12)
    return threat.project(x, x + normal * (radius * share / length)[:, None, None, None])

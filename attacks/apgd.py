"""Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, algorithm 1), in the linf and the l2 ball.

Projected ascent with momentum whose steps begin at twice the radius. At a few checkpoints, each example
whose walk has stopped to gain halves its step and goes back to its best point.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import BestIterate, GradientNotes, finite
from attacks.common.projected_ascent import steepest
from attacks.common.starts import surface
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    Loss,
    Randomness,
    Share,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

MOMENTUM = 0.75
"""The share of a step that is the gradient's; the rest repeats the last move (eq. 3)."""


@attack("apgd", norms={"linf", "l2"}, version=1, starts="any")
def apgd(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 100,
    restarts: Count = 1,
    loss: Loss = "ce",
    rho: Share = 0.75,
) -> Crafted:
    """Climb a loss in steps that choose their own length.

    At a checkpoint an example's step is halved if no more than `rho` of its steps since the last one
    raised its loss, or if the step was kept there and its highest loss has not grown since.

    Where winning here is winning (``view.exact``), an image that is wrong already is left unmoved, an
    example is dropped at its first adversarial iterate, and further restarts see the survivors only;
    else each keeps the iterate with the highest loss.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps each restart takes; 100, as in AutoAttack.
        restarts: How many walks there are, each from a random point of the ball's surface.
        loss: What is climbed, as in `bench.objective`.
        rho: The share of steps, from 0 to 1, that must raise the loss between two checkpoints; 0.75 in the
            paper.

    Returns:
        The images, in the ball and the box, with the notes ``flat``, where the gradient at a start was
        exactly zero, and ``nonfinite``, where a gradient was not finite; neither moves a pixel.
    """
    walks = Walks(view, x, y, threat, noise, Settings(steps, loss, rho))
    with torch.no_grad():
        walks.begin(view.logits(x))
    # From one point there is one walk.
    for _ in range(restarts if view.starts is None else 1):
        walks.climb()
    return walks.crafted()


def checkpoints(steps: int) -> list[int]:
    """Return after how many steps the walks are judged.

    That is after 22 % of them, then in windows each 3 % shorter than the one before, at least 6 % (section
    3.2.1).

    Args:
        steps: How many steps a walk has, at least 1.
    """
    at, window, found = 22, 22, set()
    while at <= 100:
        found.add(-(-at * steps // 100))
        window = max(window - 3, 6)
        at += window
    return sorted(found)


@dataclass(frozen=True)
class Settings:
    """What the walks of an attack have in common."""

    steps: int
    """How many steps a walk has, at least 1."""
    loss: Loss
    """What is climbed."""
    rho: float
    """The share of steps that must raise the loss between two checkpoints."""


class Progress:
    """How each example's walk gains, and how long its steps are.

    Args:
        x: The images (N, C, H, W), for their number, dtype and device.
        length: How long the first steps are, in the threat's units.
        rho: The share of steps that must raise the loss between two checkpoints.
    """

    def __init__(self, x: Images, length: float, rho: float) -> None:
        self._rho = rho
        self._rises = x.new_zeros(len(x))
        self.length = torch.full_like(self._rises, length)
        self.best = self._before = torch.full_like(self._rises, -math.inf)
        # To begin with a loss is no rise.
        self._last = -self.best
        # The first checkpoint has none before it: there the second condition cannot hold.
        self._halved = self._rises == 0

    def learn(self, losses: Tensor) -> Tensor:
        """Take the losses (N,), of the start and after each step; return bool (N,), where none was higher."""
        better = losses > self.best
        self._rises = self._rises + (losses > self._last)
        self._last = losses.nan_to_num(-math.inf)
        self.best = torch.where(better, losses, self.best)
        return better

    def judge(self, window: int) -> Tensor:
        """At a checkpoint after `window` steps: halve where it is due, and return where, bool (N,).

        These walks go on from their best points.
        """
        seldom = self._rises <= self._rho * window
        stuck = ~self._halved & (self.best <= self._before)
        self._halved = seldom | stuck
        self.length = torch.where(self._halved, self.length / 2, self.length)
        self._last = torch.where(self._halved, self.best, self._last)
        self._before, self._rises = self.best, torch.zeros_like(self._rises)
        return self._halved

    def select(self, rows: Tensor) -> "Progress":
        """Return the progress of the examples `rows` only."""
        part = object.__new__(Progress)
        part.__dict__.update(
            {name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        )
        return part


class Walks:
    """Walks of the examples that stand, and what is known of each.

    Args:
        view: What is looked through, with gradients.
        x: Images (N, C, H, W) in [0, 1].
        y: Their labels (N,).
        threat: A ball in linf or l2.
        noise: Draws of each example's own, for the starts.
        settings: What the walks have in common.
    """

    def __init__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, settings: Settings
    ) -> None:
        self._view, self._x, self._y, self._threat, self._noise = view, x, y, threat, noise
        self._settings = settings
        self.record, self.notes = BestIterate(x), GradientNotes(x)

    def begin(self, logits: Tensor) -> None:
        """Take note of the images that are won unmoved, by their logits, if winning here is winning."""
        self.record.won |= succeeded(self._view, logits, self._y) & self._view.exact

    def crafted(self) -> Crafted:
        """Return the images and the notes."""
        return Crafted(self.record.images, self.notes.columns())

    def climb(self, towards: Labels | None = None) -> None:
        """Walk once from a random point of the ball's surface (or where the view says), with all that stand.

        Args:
            towards: The class (N,) whose loss is climbed; None: the goal's own. A success is one of the view
                in any case.
        """
        record, threat, settings = self.record, self._threat, self._settings
        if len(rows := record.standing) == 0:
            return
        view, x, y, noise = self._view.select(rows), self._x[rows], self._y[rows], self._noise.select(rows)
        towards = None if towards is None else towards[rows]
        begin = view.starts
        if begin is None:
            begin = x + threat.radius * surface(x, threat.norm, noise)
        z = old = threat.project(x, begin)
        best = best_uphill = z
        progress = Progress(x, 2 * threat.radius, settings.rho)
        marks, mark = checkpoints(settings.steps), 0
        for t in range(settings.steps + 1):
            last = t == settings.steps
            z = z.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                logits = view.logits(z)
                aim = view if towards is None else replace(view, target=towards)
                losses = objective(aim, logits, y, settings.loss)
            won = succeeded(view, logits, y) & view.exact
            # The one place where a step waits for the device: how many examples are left.
            if len(standing := (~won).nonzero().squeeze(1)) == 0:
                record.win(rows, z.detach())
                return
            gradient = z if last else autograd.grad(losses.sum(), z)[0]
            z, losses = z.detach(), losses.detach()
            if len(standing) < len(rows):
                record.win(rows[won], z[won])
                rows, view, progress = rows[standing], view.select(standing), progress.select(standing)
                towards = None if towards is None else towards[standing]
                x, y, z, old, best, best_uphill, losses, gradient = (
                    each[standing] for each in (x, y, z, old, best, best_uphill, losses, gradient)
                )
            better = progress.learn(losses)[:, None, None, None]
            best = torch.where(better, z, best)
            if last:
                break
            self.notes.see(rows, gradient[None], first=t == 0)
            uphill = steepest(finite(gradient)[None], None, threat)[0][0]
            best_uphill = torch.where(better, uphill, best_uphill)
            if t in marks:
                halved = progress.judge(t - mark)[:, None, None, None]
                z, uphill, mark = torch.where(halved, best, z), torch.where(halved, best_uphill, uphill), t
            moved = threat.project(x, z.addcmul(progress.length[:, None, None, None], uphill))
            if t > 0:
                moved = threat.project(x, z.lerp(moved, MOMENTUM).add(z - old, alpha=1 - MOMENTUM))
            z, old = moved, z
        record.offer(rows, best, progress.best)

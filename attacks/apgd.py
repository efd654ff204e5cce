"""Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, algorithm 1), in the linf and the l2 ball.

Projected ascent with momentum whose steps begin at twice the radius. At a few checkpoints, each example
whose walk has stopped to gain halves its step and goes back to its best point.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, autograd

from attacks.common.projected_ascent import direction
from attacks.common.starts import surface
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Loss,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    lengths,
    objective,
    succeeded,
)

MOMENTUM = 0.75
"""The share of a step that is the gradient's; the rest repeats the last move (eq. 3)."""


def check(params: dict[str, Any], shape: Shape) -> None:
    """Refuse counts below 1, and a share of steps that is none."""
    for name in ("steps", "restarts", "classes"):
        if params.get(name, 1) < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    if not 0 <= params["rho"] <= 1:
        raise InputError(f"rho must be a share from 0 to 1, not {params['rho']:g}")


@attack("apgd", norms={"linf", "l2"}, version=1, check_params=check)
def apgd(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = "ce",
    rho: float = 0.75,
) -> Crafted:
    """Climb `loss` in `steps` steps that choose their own length.

    At a checkpoint an example's step is halved if no more than `rho` of its steps since the last one
    raised its loss, or if the step was kept there and its highest loss has not grown since.

    Where winning here is winning (``view.final``), an image that is wrong already is left unmoved, an
    example is dropped at its first adversarial iterate, and further restarts see the survivors only;
    else each keeps the iterate with the highest loss. Notes: ``flat``, where the gradient at a start
    was exactly zero, and ``nonfinite``, where a gradient was not finite; neither moves a pixel.
    """
    record = Record(x)
    with torch.no_grad():
        record.wrong(view, view.logits(x), y)
    for _ in range(restarts):
        climb(record, view, x, y, threat, noise, steps=steps, loss=loss, rho=rho)
    return record.crafted()


def checkpoints(steps: int) -> list[int]:
    """Return after how many steps the walks are judged: 22 % of them, then in windows each 3 % shorter than
    the one before, at least 6 % (section 3.2.1).
    """
    at, window, found = 22, 22, set()
    while at <= 100:
        found.add(-(-at * steps // 100))
        window = max(window - 3, 6)
        at += window
    return sorted(found)


class Record:
    """What is known of each example after some walks: its best image, and whether that is a success."""

    def __init__(self, x: Images) -> None:
        def no() -> Tensor:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)

        self.images = x.clone()
        self.losses = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        self.won, self.flat, self.nonfinite = no(), no(), no()

    @property
    def standing(self) -> Tensor:
        """The positions of the examples that were not won."""
        return (~self.won).nonzero().squeeze(1)

    def wrong(self, view: View, logits: Tensor, y: Labels) -> None:
        """Take note of the images that are won unmoved, if winning here is winning."""
        self.won |= succeeded(view, logits, y) & view.final

    def win(self, rows: Tensor, images: Images) -> None:
        """Take successes."""
        self.images[rows], self.won[rows] = images, True

    def note(self, rows: Tensor, gradient: Tensor, *, first: bool) -> None:
        """Note gradients that say nothing."""
        peak = lengths(gradient, "linf")
        self.nonfinite[rows] |= ~(peak < math.inf)
        if first:
            self.flat[rows] |= peak == 0

    def offer(self, rows: Tensor, images: Images, losses: Tensor) -> None:
        """Take the images of examples without a success where their losses are higher."""
        higher = losses > self.losses[rows]
        self.images[rows] = torch.where(higher[:, None, None, None], images, self.images[rows])
        self.losses[rows] = torch.where(higher, losses.double(), self.losses[rows])

    def crafted(self) -> Crafted:
        """Return the images and the notes."""
        return Crafted(self.images, {"flat": self.flat, "nonfinite": self.nonfinite})


class Progress:
    """How each example's walk gains, and how long its steps are."""

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
        """Take the losses, of the start and after each step; return bool (N,), where none was higher."""
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

    def take(self, rows: Tensor) -> "Progress":
        """Return the progress of the examples `rows` only."""
        part = object.__new__(Progress)
        part.__dict__.update(
            {name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        )
        return part


def climb(
    record: Record,
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int,
    loss: Loss,
    rho: float,
    towards: Labels | None = None,
) -> None:
    """Walk once from a random point of the ball's surface, with every example that stands, and record.

    The loss is that of the goal, or of the class `towards` (N,); a success is one of `view` in any case.
    """
    if len(rows := record.standing) == 0:
        return
    view, x, y, noise = view.take(rows), x[rows], y[rows], noise.take(rows)
    towards = None if towards is None else towards[rows]
    z = old = threat.project(x, x + threat.radius * surface(x, threat.norm, noise))
    best = best_uphill = z
    progress = Progress(x, 2 * threat.radius, rho)
    marks, mark = checkpoints(steps), 0
    for t in range(steps + 1):
        last = t == steps
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = view.logits(z)
            aim = view if towards is None else replace(view, target=towards)
            losses = objective(aim, logits, y, loss)
        won = succeeded(view, logits, y) & view.final
        # The one place where a step waits for the device: how many examples are left.
        if len(standing := (~won).nonzero().squeeze(1)) == 0:
            record.win(rows, z.detach())
            return
        gradient = z if last else autograd.grad(losses.sum(), z)[0]
        z, losses = z.detach(), losses.detach()
        if len(standing) < len(rows):
            record.win(rows[won], z[won])
            rows, view, progress = rows[standing], view.take(standing), progress.take(standing)
            towards = None if towards is None else towards[standing]
            x, y, z, old, best, best_uphill, losses, gradient = (
                each[standing] for each in (x, y, z, old, best, best_uphill, losses, gradient)
            )
        better = progress.learn(losses)[:, None, None, None]
        best = torch.where(better, z, best)
        if last:
            break
        record.note(rows, gradient, first=t == 0)
        uphill = direction(gradient[None], threat)[0]
        best_uphill = torch.where(better, uphill, best_uphill)
        if t in marks:
            halved = progress.judge(t - mark)[:, None, None, None]
            z, uphill, mark = torch.where(halved, best, z), torch.where(halved, best_uphill, uphill), t
        moved = threat.project(x, z.addcmul(progress.length[:, None, None, None], uphill))
        if t > 0:
            moved = threat.project(x, z.lerp(moved, MOMENTUM).add(z - old, alpha=1 - MOMENTUM))
        z, old = moved, z
    record.offer(rows, best, progress.best)

"""Projected ascent of any loss in a ball: what PGD is, and what attacks with losses of their own share."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, autograd

from bench import Crafted, Images, Labels, Norm, Randomness, Threat, View, lengths, succeeded

Ask: TypeAlias = Callable[[View, Images, Labels, Tensor], tuple[Tensor, Tensor]]
"""``ask(view, z, y, rows)``: the losses (copies * n,), larger is nearer to success, and the logits of points
(copies * n, C, H, W), copy after copy, of the examples `rows` (n,) of the batch; `view` is theirs."""

Start: TypeAlias = Literal["uniform", "zero"]
Keep: TypeAlias = Literal["best", "last"]


def projected_ascent(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    ask: Ask,
    *,
    steps: int,
    length: float,
    restarts: int = 1,
    start: Start = "uniform",
    keep: Keep = "best",
    drop: bool = True,
) -> Crafted:
    """Climb the loss of `ask` in `steps` projected steps of `length`.

    Where winning here is winning (``view.final``), an example is dropped at its first adversarial
    iterate (the image itself, where that and its start are wrong), and further restarts see the
    survivors only; ``drop=False`` goes on to the end, and no failure replaces a success. Otherwise the
    iterate with the highest loss is kept, the start and the last included; with ``keep="last"``, each
    restart's last.

    Notes: ``flat``, where the gradient at the first step of a restart was exactly zero, and
    ``nonfinite``, where a gradient was not finite; neither moves a pixel.
    """
    stop = drop and view.final
    record = _Record(x)
    rows = torch.arange(len(x), device=x.device)
    for copies in _groups(restarts, stop):
        if len(rows) == 0:
            break
        here, clean, labels, draws = view.take(rows), x[rows], y[rows], noise.take(rows)
        everyone = torch.arange(len(rows), device=x.device)
        z = torch.stack([_start(clean, threat, draws, start) for _ in range(copies)])
        for t in range(steps + 1):
            last = t == steps
            if last and keep == "last" and restarts == 1 and not stop:
                record.images = z[0]  # Nothing to choose from: its loss need not be asked.
                break
            z.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                losses, logits = ask(here, z.flatten(0, 1), labels, rows)
            won = succeeded(here, logits, labels) & view.final
            if keep == "best" or last:
                record.offer(rows, z, losses, won)
            elif stop:
                record.offer(rows, z, losses.masked_fill(~won, -math.inf), won)
            broken = won.view(copies, -1).any(0)
            if t == 0:
                record.at_start[rows] |= broken
            # The one place where a step waits for the device: how many examples are left.
            standing = (~broken).nonzero().squeeze(1) if stop else everyone
            if last or len(standing) == 0:
                rows = rows[standing]
                break
            (gradient,) = autograd.grad(losses.sum(), z)
            z = z.detach()
            if len(standing) < len(rows):
                rows, here = rows[standing], here.take(standing)
                clean, labels = clean[standing], labels[standing]
                z, gradient = z[:, standing], gradient[:, standing]
            record.note(rows, gradient, first=t == 0)
            moved = (z + length * direction(gradient, threat)).flatten(0, 1)
            z = threat.project(clean.expand_as(z).flatten(0, 1), moved).view_as(z)
    if stop and start == "uniform":
        record.put_back(view, x, y)
    return Crafted(record.images, {"flat": record.flat, "nonfinite": record.nonfinite})


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


def direction(gradient: Tensor, threat: Threat) -> Tensor:
    """Return the steepest move of length 1 for each of (copies, N, ...); where the gradient is 0, none."""
    # An entry that is not finite says nothing of where to go.
    gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
    if threat.norm == "linf":
        return gradient.sign()
    # Twice, because the squares of a saturated softmax's gradient are smaller than any float.
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        size = lengths(gradient.flatten(0, 1), norm).view(gradient.shape[:2])
        gradient = gradient / size.clamp_min(torch.finfo(size.dtype).tiny)[..., None, None, None]
    return gradient


class _Record:
    """What is known of each example: its best iterate (a success first, then the higher loss), and notes."""

    def __init__(self, x: Images) -> None:
        def no() -> Tensor:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)

        self.images = x.clone()
        self.losses = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        self.won, self.at_start, self.flat, self.nonfinite = no(), no(), no(), no()

    def offer(self, rows: Tensor, z: Tensor, losses: Tensor, won: Tensor) -> None:
        """Take what is better of (copies, n, ...) iterates of the examples `rows`; a loss of NaN never is."""
        chunks = losses.detach().chunk(len(z)), won.chunk(len(z))
        for iterate, loss, win in zip(z.detach(), *chunks, strict=True):
            better = torch.where(win == self.won[rows], loss > self.losses[rows], win)
            self.images[rows] = torch.where(better[:, None, None, None], iterate, self.images[rows])
            self.losses[rows] = torch.where(better, loss.double(), self.losses[rows])
            self.won[rows] |= win

    def note(self, rows: Tensor, gradient: Tensor, *, first: bool) -> None:
        """Note gradients (copies, n, ...) that say nothing."""
        peak = lengths(gradient.flatten(0, 1), "linf").view(gradient.shape[:2])
        self.nonfinite[rows] |= ~(peak < math.inf).all(0)
        if first:
            self.flat[rows] |= (peak == 0).any(0)

    def put_back(self, view: View, x: Images, y: Labels) -> None:
        """Where a random start alone was a success, return the image itself if that is wrong too.

        Asked afterwards and of these alone, so that nothing is spent where nothing breaks.
        """
        rows = self.at_start.nonzero().squeeze(1)
        if len(rows):
            here = view.take(rows)
            with torch.no_grad():
                wrong = succeeded(here, here.logits(x[rows]), y[rows])
            self.images[rows[wrong]] = x[rows[wrong]]

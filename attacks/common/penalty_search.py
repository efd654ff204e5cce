"""Least distance by descent on |z - x|^2 + c * what is missing to success, with a constant c for each example
(Carlini and Wagner 2017, arXiv:1608.04644, sections V and VI).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess, by_example, finite
from attacks.common.optimisers import Adam
from bench import Images, Labels, View

Missing: TypeAlias = Callable[[View, Images, Labels, Tensor], tuple[Tensor, Tensor]]
"""``missing(view, z, y, rows)``: what points (n, C, H, W) of the examples `rows` lack to success, (n,), with
its graph, never below 0, and whether they have it, bool (n,); `view` is theirs."""

Variable: TypeAlias = Literal["box", "tanh"]
"""What is moved: the pixels, cut to the box after each step; or w, for pixels (tanh w + 1) / 2."""

_MOST = 1e10
"""The largest constant, as in the authors' code."""


class PenaltyConstant:
    """The binary search for each example's own constant (Carlini and Wagner 2017, arXiv:1608.04644).

    From `start`, ten times larger until a success, then bisected between the largest failure and the
    smallest success.

    Args:
        like: One value for each example, (N,); its dtype and device are taken.
        start: The first constant, above 0.
    """

    def __init__(self, like: Tensor, start: float) -> None:
        self.value = torch.full((len(like),), start, dtype=like.dtype, device=like.device)
        """The constants to try next, (N,)."""
        self.low = torch.zeros_like(self.value)
        """The largest that failed, (N,); 0 before any has."""
        self.high = torch.full_like(self.value, math.inf)
        """The smallest that won, (N,); infinite before any has."""

    def learn(self, won: Tensor) -> None:
        """Take into account which examples, bool (N,), had a success with `value`; move on."""
        self.high = torch.where(won, torch.minimum(self.high, self.value), self.high)
        self.low = torch.where(won, self.low, torch.maximum(self.low, self.value))
        between = (self.low + self.high) / 2
        self.value = torch.where(self.high.isinf(), self.value * 10, between)


@dataclass(frozen=True)
class PenaltySearch:
    """The descents, each with the constants that the ones before have taught."""

    searches: int
    """How many descents, at least 1."""
    steps: int
    """How many steps of Adam in each, at least 1."""
    lr: float
    """Adam's learning rate, in units of the variable."""
    c: float
    """The first constant, above 0."""
    variable: Variable
    """What is moved."""
    abort: bool
    """Whether an example's descent ends at a tenth of its steps that has no lower mean loss than the last."""

    def run(
        self, view: View, x: Images, y: Labels, nearest: NearestSuccess, rows: Tensor, missing: Missing
    ) -> Tensor:
        """Search for some examples of a batch.

        A constant has won if there was a success in the last tenth of its descent. With ten searches or more
        the last one takes the smallest constant that has won, as in the authors' code.

        Args:
            view: The view of the whole batch.
            x: Its images (N, C, H, W).
            y: Their labels (N,).
            nearest: Where successes go.
            rows: The examples to search for, int64 (n,).
            missing: What points lack to success.

        Returns:
            bool (N,), where a gradient was not finite: there it is taken as 0.
        """
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        here = _Part(view.select(rows), x[rows], y[rows], rows)
        constant = PenaltyConstant(here.x.flatten(1)[:, 0], self.c)
        for search in range(self.searches):
            if search >= 9 and search == self.searches - 1:
                constant.value = constant.high.clamp_max(_MOST)
            won = torch.zeros_like(broken)
            if len(rows):
                self._descend(here, constant.value, nearest, missing, won, broken)
            constant.learn(won[rows])
        return broken

    def _descend(
        self, here: "_Part", c: Tensor, nearest: NearestSuccess, missing: Missing, won: Tensor, broken: Tensor
    ) -> None:
        """Go down once with the constants `c` (n,), and note what was `won` and `broken` (N,)."""
        w, adam = _inside(here.x, self.variable), Adam(here.x, self.lr)
        tenth = max(self.steps // 10, 1)
        # From black at w = -7.25 to where pixels move at all: a loss that stands still says nothing before.
        patience = 5 / self.lr if self.variable == "tanh" else 0
        # Kept here, and handed on when an example ends: no step need look its row up.
        best, least = here.x, torch.full_like(c, math.inf)
        before, loss, lasts, odd = least, torch.zeros_like(c), won[here.rows], broken[here.rows]

        def settle() -> None:
            nearest.offer(here.rows, best, least.isfinite())
            won[here.rows], broken[here.rows] = lasts, odd

        for t in range(self.steps + 1):
            last = t == self.steps
            z, slope = _outside(w, self.variable)
            z.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                lack, has = missing(here.view, z, here.y, here.rows)
            way = z.detach() - here.x
            far = way.flatten(1).square().sum(1)
            nearer = has & (far < least)
            best = torch.where(by_example(nearer, best), z.detach(), best)
            least = torch.where(nearer, far, least)
            # Adam's first step is as long with any constant: a success that does not last shows nothing.
            lasts = has if t % tenth == 0 and t <= self.steps - tenth else lasts | has
            if last:
                break
            (gradient,) = autograd.grad(lack.sum(), z)
            odd = odd | ~gradient.flatten(1).sum(1).isfinite()
            gradient = 2 * way + by_example(c, way) * finite(gradient)
            # Adam's steps do not depend on the scale, but for the 1e-8 that it adds: at pixels that are black
            # a gradient by w is a millionth of that by z, and would be swallowed.
            w = w - adam.step(by_example(1e5 / c.clamp_min(1), w) * gradient * slope)
            if self.variable == "box":
                w = w.clamp(0, 1)
            loss = loss + far + c * lack.detach()
            if self.abort and t % tenth == tenth - 1:
                # False where it is NaN. The one place where a search waits for the device.
                going = ((loss < 0.9999 * before) | (t < patience)).nonzero().squeeze(1)
                before, loss = loss, torch.zeros_like(loss)
                if len(going) == 0:
                    break
                if len(going) < len(loss):
                    settle()
                    here, c, w, adam = here.select(going), c[going], w[going], adam.select(going)
                    best, least, lasts, odd = best[going], least[going], lasts[going], odd[going]
                    before, loss = before[going], loss[going]
        settle()


class _Part(NamedTuple):
    """The examples that are still looked at."""

    view: View
    x: Images
    y: Labels
    rows: Tensor

    def select(self, places: Tensor) -> Self:
        return type(self)(self.view.select(places), *(each[places] for each in self[1:]))


def _inside(x: Images, variable: Variable) -> Tensor:
    """Return the variable at the images; a little inside of black and white, where tanh never gets."""
    return x if variable == "box" else torch.atanh((2 * x - 1) * (1 - 1e-6))


def _outside(w: Tensor, variable: Variable) -> tuple[Images, Tensor | float]:
    """Return pixels of their own, and how fast they follow the variable."""
    if variable == "box":
        return w.detach(), 1.0
    # (tanh w + 1) / 2, whose slope written with tanh would be 0 to float32 beyond w = 9, for good.
    z = torch.sigmoid(2 * w)
    return z, 2 * z * torch.sigmoid(-2 * w)

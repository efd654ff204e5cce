"""What an attacker maximises, and when it has won: the one place that knows refusal and targets.

Success means: accepted, and wrong (or, with a target, accepted and the target). A refusal is never a
success. Logits of several points for each example come copy after copy, (copies * N, K), beside
labels (N,): the answers are then (copies * N,) in the same order. A view that answers several times,
at random or pass after pass, gives (T, copies * N, K): losses are averaged over T, and the answer is
that of the mean logits.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from bench.protocols import Labels, Narrowing, View, answered

Loss: TypeAlias = Literal["ce", "margin", "dlr"]


_LOWEST = -1e300
"""Stands for minus infinity in sums of exponentials."""


def succeeded(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return bool (copies * N,): whether each answer is a win. What is not `answered` is none."""
    if logits.dim() == 3:
        logits = logits.mean(0)
    label = logits.argmax(1)
    won = label != _copied(y, logits) if view.target is None else label == _copied(view.target, logits)
    if view.refusal:
        won &= label != logits.shape[1] - 1
    return won & answered(logits)


def objective(view: View, logits: Tensor, y: Labels, loss: Loss = "ce") -> Tensor:
    """Return (copies * N,): larger is nearer to success. Computed in float64, for logits of any dtype.

    ``ce``: cross-entropy with the truth (minus that with the target); with a refusal, the log of the
    probability of an accepted wrong label. ``margin``: the best goal's logit minus the best of the
    others (Carlini and Wagner 2017, arXiv:1608.04644, f_6 with its sign turned); positive means
    success. ``dlr``: the margin over the gap between the highest logit and the third class (Croce and Hein
    2020, arXiv:2003.01690, eq. 6), or with a target the mean of the third and the fourth (eq. 7, which it
    equals until the example is broken). A refusal may be the highest but is no class, else the margin
    would be divided by itself where the best goal comes third behind it; for the same reason it is the
    plain margin with fewer than three classes, or four with a target. A class at minus infinity is none.
    """
    losses = _losses(view, logits.flatten(0, -2).double(), y, loss).view(logits.shape[:-1])
    return (losses.mean(0) if logits.dim() == 3 else losses).to(logits.dtype)


def _losses(view: View, logits: Tensor, y: Labels, loss: Loss) -> Tensor:
    """Return the loss of each row of logits (copies * N, K)."""
    match loss:
        case "ce":
            # From a probability that rounds to 1, as the truth's does in float32 where it leads by 16.6, no
            # gradient comes back; from leads it does, however far one is behind.
            if view.target is not None:
                return logsigmoid(-_behind(logits, view.target))
            if not view.refusal:
                return -logsigmoid(-_behind(logits, y))
            goals = _goals(view, logits, y)
            return logsigmoid(_level(logits, goals) - _level(logits, ~goals))
        case "margin":
            return _margin(logits, _goals(view, logits, y))
        case "dlr":
            goals = _goals(view, logits, y)
            classes = logits.shape[1] - view.refusal
            places = slice(2, 3) if view.target is None else slice(2, 4)
            if classes < places.stop:
                return _margin(logits, goals)
            ratio: Tensor = _Ratio.apply(logits, goals, classes, places)
            return ratio
        case _:
            assert_never(loss)


def eot(view: View, draws: int) -> View:
    """Return a view that answers `draws` times: losses are averaged over the defense's own randomness.

    Expectation over transformation (Athalye et al. 2018, arXiv:1707.07397): the gradient of the mean loss
    is the mean of the gradients; the mean of the logits would be another defense's. Each point costs
    `draws` passes. With 1 it is the view itself.
    """
    return view if draws == 1 else replace(view, logits=_Repeated(view.logits, draws))


class _Repeated:
    """A callable that asks another several times: (N, ...) points to (draws, N, K) logits."""

    def __init__(self, ask: Callable[[Tensor], Tensor], draws: int) -> None:
        self._ask, self._draws = ask, draws

    def __call__(self, z: Tensor) -> Tensor:
        answers = [self._ask(z) for _ in range(self._draws)]
        # What answers several times of itself (the passes of a loop) has a first axis already.
        return torch.cat(answers) if answers[0].dim() == 3 else torch.stack(answers)

    def take(self, rows: Tensor) -> "_Repeated":
        """Return the callable for some of the examples."""
        ask = self._ask.take(rows) if isinstance(self._ask, Narrowing) else self._ask
        return _Repeated(ask, self._draws)


def _copied(labels: Labels, logits: Tensor) -> Labels:
    """Return the label of each row of logits that come copy after copy."""
    copies = len(logits) // max(len(labels), 1)
    return labels if copies == 1 else labels.repeat(copies)


def _goals(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return bool (copies * N, K): the answers that would be a win."""
    named = _copied(y if view.target is None else view.target, logits)
    goals = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, named[:, None], True)
    if view.target is None:
        goals = ~goals
    if view.refusal:
        goals[:, -1] = False
    return goals


def _only(logits: Tensor, among: Tensor) -> Tensor:
    """Return the logits, minus infinity outside `among`."""
    return logits.masked_fill(~among, -math.inf)


def _behind(logits: Tensor, labels: Labels) -> Tensor:
    """Return how far the logit of each row's label is behind the logsumexp of the others."""
    named = _copied(labels, logits)[:, None]
    # Of minus infinity alone the gradient of logsumexp would be no number.
    wide = logits.clamp_min(_LOWEST)
    return wide.scatter(1, named, _LOWEST).logsumexp(1) - wide.gather(1, named).squeeze(1)


def _level(logits: Tensor, among: Tensor) -> Tensor:
    """Return the logsumexp of each row's logits `among`."""
    return logits.clamp_min(_LOWEST).masked_fill(~among, _LOWEST).logsumexp(1)


def _margin(logits: Tensor, goals: Tensor) -> Tensor:
    return _only(logits, goals).amax(1) - _only(logits, ~goals).amax(1)


class _Ratio(Function):
    """The margin over the gap between the highest logit and the mean of the classes at `places`.

    Its gradient is written out: where logits are very different or nearly equal, the two terms of the
    quotient's differ by less than their rounding. Where there is no gap, or one to minus infinity, it is the
    plain margin.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, goals: Tensor, classes: int, places: slice) -> Tensor:
        (goal, best), (rest, worst) = (_only(logits, each).max(1) for each in (goals, ~goals))
        ahead = goal > rest
        first, second = (torch.where(ahead, *each)[:, None] for each in ((best, worst), (worst, best)))
        top, next_ = logits.gather(1, first), logits.gather(1, second)
        low, at = (each[:, places] for each in logits[:, :classes].topk(places.stop, dim=1))
        gap = (top - low).mean(1, keepdim=True)
        plain = (gap < 1e-12) | gap.isinf()
        gap = gap.masked_fill(plain, 1.0)
        sign = torch.where(ahead, 1.0, -1.0)[:, None].to(logits)
        margin = sign * (top - next_)
        # Which of them is the second itself: what it does to the gap is what it does to the margin.
        same, share = at == second, 1 / low.shape[1]
        up = torch.where(plain, 1.0, (next_ - low).mean(1, keepdim=True) / gap)
        down = torch.where(plain, 1.0, (top - low).masked_fill(same, 0.0).sum(1, keepdim=True) * share / gap)
        under = (margin * share / gap).expand_as(low).masked_fill(same | plain, 0.0)
        slope = torch.zeros_like(logits).scatter_add_(1, at, under)
        slope.scatter_add_(1, first, sign * up).scatter_add_(1, second, -sign * down)
        ctx.save_for_backward(slope / gap)
        return (margin / gap).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None

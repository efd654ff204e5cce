"""The loss that an attacker maximises, and the test of its success, with refusals and targets.

No other module knows what a refusal or a target means for an attack. An untargeted attack succeeds where the
answer is accepted and wrong, a targeted one where the answer is accepted and is the target. A refusal is
never a success.

Letters in shapes: N examples, K columns of logits (the last one a refusal where `View.refusal` is true).
Logits of several points for each example come copy after copy, (copies * N, K), beside labels (N,); results
are (copies * N,) in the same order. A view that gives T answers to each point (random draws, or passes of a
network with feedback) returns (T, copies * N, K): losses are averaged over T, and a success is read from the
mean logits.
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
"""The losses of `objective`: cross-entropy, margin of logits, difference of logits ratio."""


_LOWEST = -1e300
"""The value that replaces minus infinity in sums of exponentials."""


def succeeded(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return where the answer of a view is a success of the attack.

    Args:
        view: The view, which says whether there is a target and whether the last column is a refusal.
        logits: Logits of the view: (copies * N, K) or (T, copies * N, K).
        y: True labels (N,).

    Returns:
        bool (copies * N,). False where the logits name no class (see `bench.answered`).
    """
    if logits.dim() == 3:
        logits = logits.mean(0)
    label = logits.argmax(1)
    won = label != _copied(y, logits) if view.target is None else label == _copied(view.target, logits)
    if view.refusal:
        won &= label != logits.shape[1] - 1
    return won & answered(logits)


def objective(view: View, logits: Tensor, y: Labels, loss: Loss = "ce") -> Tensor:
    """Return the loss that an attacker maximises: larger is nearer to success.

    The loss is computed in float64, whatever the dtype of the logits. A column at minus infinity counts as no
    class.

    - ``ce``: the cross-entropy with the true label, or minus the cross-entropy with the target. With a
      refusal: the logarithm of the probability of an accepted wrong label.
    - ``margin``: the largest logit among the goals minus the largest among the other columns (Carlini and
      Wagner 2017, arXiv:1608.04644, f_6 with the opposite sign and without its floor). A positive margin is a
      success.
    - ``dlr``: the margin divided by the gap between the largest logit and the third largest of a class (Croce
      and Hein 2020, arXiv:2003.01690, eq. 6); with a target, between the largest and the mean of the third
      and the fourth (eq. 7, which it equals until the example is broken). A refusal may be the largest logit
      and is never the third: otherwise the margin is divided by itself where the best goal comes third behind
      a refusal. For the same reason the loss is the plain margin with fewer than three classes, or four with
      a target.

    Args:
        view: The view, which says whether there is a target and whether the last column is a refusal.
        logits: Logits of the view: (copies * N, K) or (T, copies * N, K).
        y: True labels (N,).
        loss: ``ce``, ``margin`` or ``dlr``.

    Returns:
        Losses (copies * N,), in the dtype of `logits`.
    """
    losses = _losses(view, logits.flatten(0, -2).double(), y, loss).view(logits.shape[:-1])
    return (losses.mean(0) if logits.dim() == 3 else losses).to(logits.dtype)


def _losses(view: View, logits: Tensor, y: Labels, loss: Loss) -> Tensor:
    """Return the loss of each row of logits (copies * N, K), in float64."""
    match loss:
        case "ce":
            # A probability that rounds to 1 has no gradient: in float32 the true label's does where its logit
            # leads by 16.6. The lead itself has a gradient, however large it is.
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
    """Return a view that answers each question several times, for a defense whose answers are random.

    Expectation over transformation (Athalye et al. 2018, arXiv:1707.07397): `objective` averages the losses
    over the answers, so that the gradient is the mean of their gradients. The loss of the mean logits would
    belong to another defense.

    Args:
        view: The view.
        draws: Answers to each question, 1 or more; each costs one pass.

    Returns:
        A view whose logits are (draws, N, K), or (draws * T, N, K) where the view itself gives T answers;
        with ``draws=1`` the view itself.
    """
    return view if draws == 1 else replace(view, logits=_Repeated(view.logits, draws))


class _Repeated:
    """A callable that asks another one `draws` times: points (N, ...) -> logits (draws, N, K)."""

    def __init__(self, ask: Callable[[Tensor], Tensor], draws: int) -> None:
        self._ask, self._draws = ask, draws

    def __call__(self, z: Tensor) -> Tensor:
        answers = [self._ask(z) for _ in range(self._draws)]
        # A view that gives several answers itself (the passes of a loop) has a first axis already.
        return torch.cat(answers) if answers[0].dim() == 3 else torch.stack(answers)

    def select(self, rows: Tensor) -> "_Repeated":
        """Return the callable for the examples at `rows`."""
        ask = self._ask.select(rows) if isinstance(self._ask, Narrowing) else self._ask
        return _Repeated(ask, self._draws)


def _copied(labels: Labels, logits: Tensor) -> Labels:
    """Return the label of each row of logits that come copy after copy: (copies * N,)."""
    copies = len(logits) // max(len(labels), 1)
    return labels if copies == 1 else labels.repeat(copies)


def _goals(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return bool (copies * N, K): the columns that would be a success."""
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
    """Return how far the logit of each row's label lies below the logsumexp of the other columns."""
    named = _copied(labels, logits)[:, None]
    # The gradient of logsumexp is NaN where every entry is minus infinity.
    wide = logits.clamp_min(_LOWEST)
    return wide.scatter(1, named, _LOWEST).logsumexp(1) - wide.gather(1, named).squeeze(1)


def _level(logits: Tensor, among: Tensor) -> Tensor:
    """Return the logsumexp of those logits of each row that lie in `among`."""
    return logits.clamp_min(_LOWEST).masked_fill(~among, _LOWEST).logsumexp(1)


def _margin(logits: Tensor, goals: Tensor) -> Tensor:
    return _only(logits, goals).amax(1) - _only(logits, ~goals).amax(1)


class _Ratio(Function):
    """The margin divided by the gap between the largest logit and the mean of the classes at `places`.

    The gradient is written out. Autograd subtracts the two terms of the quotient's derivative, and where
    logits are far apart or nearly equal their difference is below the rounding of either. Without a gap, or
    with a gap to minus infinity, the value is the plain margin.
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
        # Where a class at `places` is the second itself, it changes the gap as it changes the margin.
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

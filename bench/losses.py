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
from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.protocols import Labels, Narrowing, View, answered

Loss: TypeAlias = Literal["ce", "margin", "dlr"]


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
    """Return (copies * N,): larger is nearer to success.

    ``ce``: cross-entropy with the truth (minus that with the target); with a refusal, the log of the
    probability of an accepted wrong label. ``margin``: the best goal's logit minus the best of the
    others (Carlini and Wagner 2017, arXiv:1608.04644, f_6 with its sign turned); positive means
    success. ``dlr``: the margin over the gap between the highest logit and the third class (Croce and Hein
    2020, arXiv:2003.01690, eq. 6), or with a target the mean of the third and the fourth (eq. 7, which it
    equals until the example is broken). A refusal may be the highest but is no class, else the margin
    would be divided by itself where the best goal comes third behind it; for the same reason it is the
    plain margin with fewer than three classes, or four with a target.
    """
    if logits.dim() == 3:
        return objective(view, logits.flatten(0, 1), y, loss).view(logits.shape[:2]).mean(0)
    match loss:
        case "ce":
            if view.target is not None:
                return -cross_entropy(logits, _copied(view.target, logits), reduction="none")
            if not view.refusal:
                return cross_entropy(logits, _copied(y, logits), reduction="none")
            return _only(logits, _goals(view, logits, y)).logsumexp(1) - logits.logsumexp(1)
        case "margin":
            return _margin(view, logits, y)
        case "dlr":
            return _margin(view, logits, y) / _spread(view, logits)
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


def _margin(view: View, logits: Tensor, y: Labels) -> Tensor:
    goals = _goals(view, logits, y)
    return _only(logits, goals).amax(1) - _only(logits, ~goals).amax(1)


def _spread(view: View, logits: Tensor) -> Tensor | float:
    """Return what the margin is divided by: a gap of the logits, so that their scale does not matter."""
    classes = logits[:, :-1] if view.refusal else logits
    third = slice(2, 3) if view.target is None else slice(2, 4)
    if classes.shape[1] < third.stop:
        return 1.0
    low = classes.topk(third.stop, dim=1).values[:, third].mean(1)
    return (logits.amax(1) - low).clamp_min(1e-12)

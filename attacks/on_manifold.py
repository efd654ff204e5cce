"""Search on the manifold (Athalye et al. 2018, arXiv:1802.00420, section 5.4): the image is G(z)."""

import math
from typing import Any

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess, PenaltyConstant
from attacks.common.margins import lack
from attacks.common.optimisers import Adam
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

TOGETHER = 1024
"""Codes that are decoded at once while a beginning is sought; they bound the memory, and change no result."""


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "searches"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    for name in ("starts", "start_steps", "kappa", "jitter"):
        if not 0 <= params[name] < math.inf:
            raise InputError(f"{name} must be 0 or more, not {params[name]:g}")
    for name in ("lr", "weight"):
        if not 0 < params[name] < math.inf:
            raise InputError(f"{name} must be a number above 0, not {params[name]:g}")


@attack("on-manifold", norms={"l2"}, version=1, space="latent", budget="distance", check_params=_check)
def on_manifold(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    starts: int = 4,
    start_steps: int = 200,
    steps: int = 500,
    lr: float = 0.1,
    searches: int = 5,
    weight: float = 1.0,
    kappa: float = 0.0,
    jitter: float = 0.0,
    again: bool = True,
) -> Crafted:
    """Minimise |G(z) - x|^2 + c * max(kappa - margin, 0) over the code z with Adam; keep the nearest G(z).

    It begins at the code that draws `x` best: of the view's own, and of `starts` that are drawn from
    N(0, I), each after `start_steps` steps of Adam on |G(z) - x|^2 alone. c starts at `weight` and is found
    for each example by `searches` of a binary search, each of `steps` steps. With `again`, a success is one
    only if the code that the view gives G(z) is wrong too. With `jitter`, the margin is that of z with noise
    of this deviation, and a success is one with and without.

    Note: ``failed``; such images are unchanged, and so are those whose own code is wrong already.
    """
    nearest = NearestSuccess(x, threat)
    begun = view.encode(x).detach()
    with torch.no_grad():
        wrong = succeeded(view, view.logits(begun), y)
    nearest.offer(torch.arange(len(x), device=x.device), x, wrong)
    rows = (~wrong).nonzero().squeeze(1)
    if len(rows) == 0:
        return nearest.crafted()
    here, clean, labels, draws = view.take(rows), x[rows], y[rows], noise.take(rows)
    begin = explain(here, clean, _starts(begun[rows], draws, starts), lr=lr, steps=start_steps)
    shape = tuple(begin.shape[1:])
    constant = PenaltyConstant(clean[:, 0, 0, 0], weight)
    for _ in range(searches):
        z, adam, ever = begin, Adam(begin, lr), torch.zeros_like(rows, dtype=torch.bool)
        for t in range(steps + 1):
            last = t == steps
            z = z.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                image, logits = here.decode(z), here.logits(z)
                won = succeeded(here, logits, labels)
                if jitter:
                    logits = here.logits(z + jitter * draws.normal(shape))
                    won &= succeeded(here, logits, labels)
                missing = lack(here, logits, labels, kappa)
                loss = (image - clean).square().flatten(1).sum(1) + constant.value * missing
            won &= objective(here, logits.detach(), labels, "margin") >= kappa
            ever |= won
            if again:
                won &= threat.distance(clean.double(), image.double()) < nearest.distance[rows]
                won = _again(here, image.detach(), labels, won)
            nearest.offer(rows, image, won)
            if not last:
                (gradient,) = autograd.grad(loss.sum(), z)
                z = z - adam.step(torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
        constant.learn(ever)
    return nearest.crafted()


def _again(view: View, images: Images, y: Labels, won: Tensor) -> Tensor:
    """Return which of those that have `won` still have with the code that the view gives their image."""
    asked = won.nonzero().squeeze(1)
    if len(asked) == 0:
        return won
    view, still = view.take(asked), won.clone()
    with torch.no_grad():
        still[asked] = succeeded(view, view.logits(view.encode(images[asked])), y[asked])
    return still


def _starts(own: Tensor, noise: Randomness, count: int) -> Tensor:
    """Return (N, 1 + count, ...): the view's own codes, then draws from N(0, I)."""
    if count == 0:
        return own[:, None]
    return torch.cat([own[:, None], noise.normal((count, *own.shape[1:]))], dim=1)


def explain(view: View, x: Images, starts: Tensor, *, lr: float, steps: int) -> Tensor:
    """Return the code (N, ...) that draws each image best, of all that Adam passes from `starts` (N, S, ...).

    A start is given up when its error has not fallen for a tenth of the steps.
    """
    count = starts.shape[1]
    owners = torch.arange(len(x), device=x.device).repeat_interleave(count)
    parts = zip(starts.flatten(0, 1).split(TOGETHER), owners.split(TOGETHER), strict=True)
    found = [_descend(view, x[whose], z, lr, steps) for z, whose in parts]
    codes, errors = (torch.cat(each).unflatten(0, (-1, count)) for each in zip(*found, strict=True))
    best: Tensor = codes[torch.arange(len(x), device=x.device), errors.argmin(1)]
    return best


def _descend(view: View, x: Images, z: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return, for each row, the code with the least |G(z) - x|^2, and that."""
    codes, errors = z.clone(), torch.full_like(x[:, 0, 0, 0], math.inf)
    rows, adam, tenth = torch.arange(len(z), device=z.device), Adam(z, lr), max(steps // 10, 1)
    before = errors.clone()
    for t in range(steps + 1):
        last = t == steps
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            error = (view.decode(z) - x).square().flatten(1).sum(1)
        now = error.detach()
        better = now < errors[rows]
        codes[rows] = torch.where(better.view(-1, *[1] * (z.dim() - 1)), z.detach(), codes[rows])
        errors[rows] = torch.where(better, now, errors[rows])
        if last:
            break
        (gradient,) = autograd.grad(error.sum(), z)
        z = z.detach() - adam.step(gradient)
        if t % tenth == 0:
            going = (now < 0.9999 * before).nonzero().squeeze(1)
            before = now
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows, x, z, before, adam = rows[going], x[going], z[going], before[going], adam.take(going)
    return codes, errors

"""Search on the manifold (Athalye et al. 2018, arXiv:1802.00420, section 5.4): the image is G(z)."""

import math

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import BestIterate, NearestSuccess, finite
from attacks.common.margins import margin_shortfall
from attacks.common.optimisers import Adam
from attacks.common.penalty_search import PenaltyConstant
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    NonNegative,
    NonNegativeCount,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

TOGETHER = 1024
"""Codes that are decoded at once while a beginning is sought; they bound the memory, and change no result."""


def cost(
    *, starts: int, start_steps: int, steps: int, searches: int, jitter: float, again: bool, **_: object
) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        starts: How many drawn codes it may begin at.
        start_steps: How many steps each has towards the image.
        steps: How many steps each descent takes.
        searches: How many descents there are.
        jitter: The deviation of noise on codes.
        again: Whether a success is asked about again.
    """
    each = 2 + (jitter > 0) + 2 * again
    return 2 + (1 + starts) * (start_steps + 1) + searches * (steps + 1) * each


@attack("on-manifold", norms={"l2"}, version=1, space="latent", kind="minimum-norm", cost=cost)
def on_manifold(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    starts: NonNegativeCount = 4,
    start_steps: NonNegativeCount = 200,
    steps: Count = 500,
    lr: Positive = 0.1,
    searches: Count = 5,
    weight: Positive = 1.0,
    kappa: NonNegative = 0.0,
    jitter: NonNegative = 0.0,
    again: bool = True,
) -> Crafted:
    """Minimise |G(z) - x|^2 + c * max(kappa - margin, 0) over the code z with Adam; keep the nearest G(z).

    It begins at the code that draws `x` best, of the view's own and of some that are drawn from N(0, I), each
    after a few steps of Adam on |G(z) - x|^2 alone.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        starts: How many codes are drawn to begin at, beside the view's own.
        start_steps: How many steps of Adam each of them has towards the image.
        steps: How many steps of Adam each descent takes.
        lr: Adam's learning rate, in units of the codes.
        searches: How many descents there are: c is found for each example by a binary search.
        weight: The first c.
        kappa: The wanted margin, in units of the logits.
        jitter: The standard deviation of normal noise on the code whose margin counts, in units of the codes;
            a success is one with the noise and without.
        again: Whether a success is one only if the code that the view gives G(z) is wrong too.

    Returns:
        The nearest success of each image, with the note ``failed``; such images are unchanged, and so are
        those whose own code is wrong already.
    """
    nearest = NearestSuccess(x, threat)
    begun = view.encode(x).detach()
    with torch.no_grad():
        wrong = succeeded(view, view.logits(begun), y)
    nearest.offer(torch.arange(len(x), device=x.device), x, wrong)
    rows = (~wrong).nonzero().squeeze(1)
    if len(rows) == 0:
        return nearest.crafted()
    here, clean, labels, draws = view.select(rows), x[rows], y[rows], noise.select(rows)
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
                missing = margin_shortfall(here, logits, labels, kappa)
                loss = (image - clean).square().flatten(1).sum(1) + constant.value * missing
            won &= objective(here, logits.detach(), labels, "margin") >= kappa
            ever |= won
            if again:
                won &= threat.distance(clean.double(), image.double()) < nearest.distance[rows]
                won = _again(here, image.detach(), labels, won)
            nearest.offer(rows, image, won)
            if not last:
                (gradient,) = autograd.grad(loss.sum(), z)
                z = z - adam.step(finite(gradient))
        constant.learn(ever)
    return nearest.crafted()


def _again(view: View, images: Images, y: Labels, won: Tensor) -> Tensor:
    """Return which of those that have `won` still have with the code that the view gives their image."""
    asked = won.nonzero().squeeze(1)
    if len(asked) == 0:
        return won
    view, still = view.select(asked), won.clone()
    with torch.no_grad():
        still[asked] = succeeded(view, view.logits(view.encode(images[asked])), y[asked])
    return still


def _starts(own: Tensor, noise: Randomness, count: int) -> Tensor:
    """Return (N, 1 + count, ...): the view's own codes, then draws from N(0, I)."""
    if count == 0:
        return own[:, None]
    return torch.cat([own[:, None], noise.normal((count, *own.shape[1:]))], dim=1)


def explain(view: View, x: Images, starts: Tensor, *, lr: float, steps: int) -> Tensor:
    """Return the code that draws each image best, of all that Adam passes.

    A start is given up when its error has not fallen for a tenth of the steps.

    Args:
        view: What decodes, with gradients.
        x: The images (N, C, H, W).
        starts: The codes to begin at, (N, S, ...).
        lr: Adam's learning rate, in units of the codes.
        steps: How many steps each start has.

    Returns:
        (N, ...).
    """
    count = starts.shape[1]
    owners = torch.arange(len(x), device=x.device).repeat_interleave(count)
    parts = zip(starts.flatten(0, 1).split(TOGETHER), owners.split(TOGETHER), strict=True)
    found = [_descend(view, x[whose], z, lr, steps) for z, whose in parts]
    codes = torch.cat([best.images for best in found]).unflatten(0, (-1, count))
    closeness = torch.cat([best.losses for best in found]).unflatten(0, (-1, count))
    best: Tensor = codes[torch.arange(len(x), device=x.device), closeness.argmax(1)]
    return best


def _descend(view: View, x: Images, z: Tensor, lr: float, steps: int) -> BestIterate:
    """Return, for each row, the code with the least |G(z) - x|^2; its loss is minus that."""
    best = BestIterate(z)
    rows, adam, tenth = torch.arange(len(z), device=z.device), Adam(z, lr), max(steps // 10, 1)
    before = torch.full_like(x[:, 0, 0, 0], math.inf)
    for t in range(steps + 1):
        last = t == steps
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            error = (view.decode(z) - x).square().flatten(1).sum(1)
        now = error.detach()
        best.offer(rows, z.detach(), -now)
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
                rows, x, z, before, adam = rows[going], x[going], z[going], before[going], adam.select(going)
    return best

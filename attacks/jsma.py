"""The Jacobian-based saliency map attack (Papernot et al. 2016, arXiv:1511.07528, algorithms 2 and 3).

Pixels that may go either way are those of Wiyatno and Xu (2018, arXiv:1808.07945).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess, finite
from attacks.common.candidates import candidate_labels, mean_logits
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    PositiveShare,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    lengths,
    succeeded,
)


def _check_params(params: dict[str, Any], shape: Shape) -> None:
    if not 0 < abs(params["theta"]) <= 1:
        raise InputError(f"theta must be a move above 0 and at most 1, or below 0, not {params['theta']:g}")
    pixels = shape.height * shape.width
    if params["gamma"] * pixels < 2:
        raise InputError(f"gamma of {params['gamma']:g} leaves fewer than 2 of {pixels} pixels to change")


def cost(*, gamma: float, **_: object) -> int:
    """Return about how many forward passes it makes over each example, at most, on images as large as
    MNIST's.

    Args:
        gamma: The share of the pixels that may change.
    """
    # A pass for each pair, and one for each of what is put back; towards each of nine other classes.
    return 1 + 9 * (int(gamma * 28 * 28 / 2) + 3)


@attack("jsma", norms={"l0"}, version=2, kind="minimum-norm", check_params=_check_params, cost=cost)
def jsma(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    theta: float = 1.0,
    gamma: PositiveShare = 1.0,
    both: bool = True,
) -> Crafted:
    """Change the two pixels that say most for a target and against the others, until the label changes.

    Without a target all of them are tried, the likeliest first, and the fewest changes are kept. All channels
    of a pixel move, each to its own side: the distance counts them as one. When a pair has won, one of the
    two is put back if the other is enough.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        theta: By how much a value moves, in units of [0, 1], cut to the box: up where it is above 0, else
            down; with `both` its sign says nothing. From -1 to 1, but not 0.
        gamma: The share of the pixels, above 0 and at most 1, that may change towards one target.
        both: Whether a value may go up or down and counts by what it gains, its gradient times the way it
            has; else all go one way, and count by their gradients, as published.

    Returns:
        The success of each image with the fewest changes, else the image, with the note ``failed``, where no
        target was reached.
    """
    nearest = NearestSuccess(x, threat)
    everyone = torch.arange(len(x), device=x.device)
    with torch.no_grad():
        logits = view.logits(x)
    nearest.offer(everyone, x, succeeded(view, logits, y))
    pairs = int(gamma * x[0, 0].numel() / 2)
    for target in candidate_labels(view, logits, y).unbind(1):
        # One change cannot be outdone by a search that makes two.
        rows = everyone[nearest.distance > 1]
        _go_for(_Part(view.select(rows), x[rows], y[rows], target[rows], rows), nearest, theta, both, pairs)
    return nearest.crafted()


class _Part(NamedTuple):
    """The examples that are still looked at, with a target each."""

    view: View
    x: Images
    y: Labels
    target: Labels
    rows: Tensor

    def select(self, places: Tensor) -> "_Part":
        return _Part(self.view.select(places), *(each[places] for each in self[1:]))


def _go_for(here: _Part, nearest: NearestSuccess, theta: float, both: bool, pairs: int) -> None:
    """Change pair after pair; an example is done when it has won, or cannot win with fewer changes."""
    z = before = here.x
    pair = torch.zeros(len(z), 2, dtype=torch.int64, device=z.device)
    for t in range(pairs + 1):
        if len(here.rows) == 0:
            return
        last = t == pairs
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = mean_logits(here.view.logits(z))
        won = succeeded(here.view, logits, here.y)
        nearest.offer(here.rows, z, won)
        _put_back(here, nearest, z, before, pair, won)
        if last:
            return
        (own,) = autograd.grad(logits.gather(1, here.target[:, None]).sum(), z, retain_graph=True)
        (every,) = autograd.grad(logits.sum(), z)
        z = z.detach()
        moved, gain, loss, free = _moves(here.x, z, own, every - own, theta, both)
        pair, found = best_pair(gain, loss, free)
        changed = lengths(z - here.x, "l0")
        going = (~won & found & (changed < nearest.distance[here.rows])).nonzero().squeeze(1)
        here, before, pair, moved = here.select(going), z[going], pair[going], moved[going]
        z = torch.where(_at(pair, before), moved, before)


def _put_back(
    here: _Part, nearest: NearestSuccess, z: Images, before: Images, pair: Tensor, won: Tensor
) -> None:
    """Offer what has won without one of the last pair's two changes."""
    places = won.nonzero().squeeze(1)
    if len(places) == 0:
        return
    part = here.select(places)
    for one in pair[places].split(1, dim=1):
        less = torch.where(_at(one, part.x), before[places], z.detach()[places])
        with torch.no_grad():
            nearest.offer(part.rows, less, succeeded(part.view, part.view.logits(less), part.y))


def _at(places: Tensor, like: Images) -> Tensor:
    """Return bool (n, 1, H, W): the pixels at `places` (n, ...) of images."""
    pixels = torch.zeros_like(like[:, 0], dtype=torch.bool)
    return pixels.flatten(1).scatter_(1, places, True).view_as(pixels)[:, None]


def _moves(
    x: Images, z: Images, own: Tensor, others: Tensor, theta: float, both: bool
) -> tuple[Images, Tensor, Tensor, Tensor]:
    """Return where each value would go; what each pixel's add to the target and take from the others, (n, D),
    to first order; and whether the pixel is free to go, in any channel.
    """
    sign = torch.where(own >= others, 1, -1) if both else torch.full_like(z, math.copysign(1, theta))
    moved = (z + sign * abs(theta)).clamp(0, 1)
    way = moved - z if both else sign
    # A value that has moved does not come back.
    free = (moved != z) & ((z - x) * sign >= 0) & own.isfinite() & others.isfinite()
    gain, loss = (finite(each * way).masked_fill(~free, 0.0).sum(1).flatten(1) for each in (own, -others))
    return torch.where(free, moved, z), gain, loss, free.any(1).flatten(1)


def best_pair(gain: Tensor, loss: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two places that maximise the product of summed gain and summed loss, both above 0.

    Who has two others above it in both is in no best pair that could not do without it: a few dozen
    places are left of thousands, and pairs of these are looked at instead of all.

    Args:
        gain: What each place adds to the target, (n, D).
        loss: What it takes from the others, (n, D).
        free: Which places may be taken, bool (n, D).

    Returns:
        The places, int64 (n, 2), and whether there are such, bool (n,).
    """
    order = gain.masked_fill(~free, -math.inf).argsort(dim=1, descending=True, stable=True)
    sorted_ = loss.masked_fill(~free, -math.inf).gather(1, order)
    nothing = torch.full_like(sorted_[:, :1], -math.inf)
    highest = torch.cat([nothing, sorted_.cummax(1).values], 1)
    second = torch.cat([nothing, torch.minimum(sorted_, highest[:, :-1]).cummax(1).values], 1)
    candidate = sorted_ > second[:, :-1]
    most = max(int(candidate.sum(1).max()), 2)
    places = order.gather(1, (~candidate).byte().argsort(dim=1, stable=True)[:, :most])
    there = candidate.sum(1, keepdim=True) > torch.arange(most, device=gain.device)
    pair, found = torch.zeros_like(places[:, :2]), torch.zeros_like(free[:, 0])
    rows = max(2**22 // most**2, 1)
    for at in range(0, len(gain), rows):
        chunk = slice(at, at + rows)
        up, down = (each[chunk].gather(1, places[chunk]) for each in (gain, loss))
        up, down = up[:, :, None] + up[:, None], down[:, :, None] + down[:, None]
        able = there[chunk, :, None] & there[chunk, None] & (up > 0) & (down > 0)
        able &= ~torch.eye(most, dtype=torch.bool, device=gain.device)
        score = (up * down).masked_fill(~able, -math.inf).flatten(1)
        best = score.argmax(1)
        both = torch.stack([best // most, best % most], 1)
        pair[chunk] = places[chunk].gather(1, both)
        found[chunk] = able.flatten(1).any(1)
    return pair, found

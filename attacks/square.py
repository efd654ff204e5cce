"""Square attack (Andriushchenko, Croce, Flammarion and Hein 2020, arXiv:1912.00049), in linf and l2.

Random search on scores: a proposal repaints one square of the image, and is kept if it raises the loss.
"""

import math
from functools import cache

import torch
from torch import Tensor

from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    Loss,
    PositiveShare,
    Randomness,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The proposals, of 10,000, after which the share of an image that a square covers is halved (section 5)."""

BLOCK = 64
"""Proposals whose draws are made together: it decides which draws they are, and enters the results."""


def cost(*, queries: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        queries: How many points are asked for, the image itself beside.
    """
    return 1 + queries


@attack("square", norms={"linf", "l2"}, version=1, access="score", cost=cost)
def square(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    queries: Count = 5000,
    p_init: PositiveShare = 0.8,
    loss: Loss = "margin",
    rescale: bool = True,
) -> Crafted:
    """Ask for one point after the other, the first striped or tiled, the others with a square repainted.

    The image itself is asked first, beside the count, and is left unmoved if it is wrong. Where winning here
    is winning (``view.exact``), an example is dropped at its first success; otherwise the search goes on for
    the highest loss.

    Args:
        view: What the attack looks through; its logits are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        queries: How many points are asked for at most; 5000, as in AutoAttack.
        p_init: The share of the image, above 0 and at most 1, that a square covers at first, less and less
            later; 0.8, as in AutoAttack.
        loss: What is climbed, as in `bench.objective`; the margin in the paper.
        rescale: Whether the schedule of shares, for 10,000 queries, is stretched to `queries`.

    Returns:
        The images, in the ball and the box.
    """
    images, rows = x.clone(), torch.arange(len(x), device=x.device)
    with torch.no_grad():
        wrong = succeeded(view, view.logits(x), y) & view.exact
    clean, z, labels = x, x, y
    best = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    start, search = (_stripes, _repainted) if threat.norm == "linf" else (_tiles, _pushed)
    proposal = start(x, threat.radius, noise)
    places = signs = torch.empty(0)
    for query in range(queries + 1):
        # Waits for the device: how many examples are left.
        if len(standing := (~wrong).nonzero().squeeze(1)) < len(rows):
            images[rows] = z
            rows, view, noise = rows[standing], view.select(standing), noise.select(standing)
            clean, z, labels, best = clean[standing], z[standing], labels[standing], best[standing]
            proposal = proposal[standing]
            if query > 1:
                places, signs = places[standing], signs[standing]
        if query == queries or len(rows) == 0:
            break
        if query > 0:
            if (at := (query - 1) % BLOCK) == 0:
                places, signs = noise.uniform((BLOCK, 4)), noise.signs((BLOCK, 1 + x.shape[1]))
            share = p_init * shrinking(query, queries if rescale else 10_000)
            side = round(math.sqrt(share * x.shape[2] * x.shape[3]))
            proposal = search(clean, z, threat.radius, side, places[:, at], signs[:, at])
        with torch.no_grad():
            logits = view.logits(proposal)
        losses = objective(view, logits, labels, loss).double()
        wrong = succeeded(view, logits, labels) & view.exact
        # The first is taken as it is, also where it does worse than the image: it is where the search starts.
        better = wrong | (losses > best) | (query == 0)
        z = torch.where(better[:, None, None, None], proposal, z)
        best = torch.where(better, losses.nan_to_num(-math.inf), best)
    images[rows] = z
    return Crafted(images, {})


def shrinking(query: int, queries: int) -> float:
    """Return the share of its first size that a square has.

    Args:
        query: Which query it is for, from 1.
        queries: For how many the schedule is stretched.
    """
    at = query * 10_000 // queries
    return 0.5 ** sum(at > each for each in HALVED_AT)


def _stripes(x: Images, radius: float, noise: Randomness) -> Images:
    """Return `x` with every column of every channel moved by the radius, up or down."""
    n, channels, _, width = x.shape
    signs = noise.signs((channels * width,)).to(x.dtype).view(n, channels, 1, width)
    return (x + radius * signs).clamp(0, 1)


def _repainted(x: Images, z: Images, radius: float, side: int, place: Tensor, sign: Tensor) -> Images:
    """Return `z` with a square where each channel is as far from `x` as it may be, on one side."""
    height, width = x.shape[2:]
    side = min(max(side, 1), height, width)
    inside = (
        _span(place[:, 0], height, side)[:, None, :, None] & _span(place[:, 1], width, side)[:, None, None]
    )
    painted = torch.add(x, sign[:, 1:, None, None], alpha=radius).clamp_(0, 1)
    return torch.where(inside, painted, z)


def _span(place: Tensor, length: int, side: int) -> Tensor:
    """Return which of `length` positions lie in a span of `side` at a place in [0, 1), (n, length)."""
    begin = _begin(place, length, side)[:, None]
    at = torch.arange(length, device=place.device)
    return (at >= begin) & (at < begin + side)


def _begin(place: Tensor, length: int, side: int) -> Tensor:
    return (place * (length - side + 1)).long()


def _tiles(x: Images, radius: float, noise: Randomness) -> Images:
    """Return `x` moved by the radius along a tiling of bumps, each with a sign and a turn of its own."""
    n, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    bump = _bump(side, x.dtype, x.device)
    turn = noise.signs((rows, columns, 1, 1)) > 0
    tiles = torch.where(turn, bump.T, bump)[:, None]  # (n, 1, rows, columns, side, side)
    tiles = tiles * noise.signs((channels, rows, columns, 1, 1)).to(x.dtype)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    move = torch.zeros_like(x)
    move[:, :, top : top + rows * side, left : left + columns * side] = tiles.transpose(3, 4).reshape(
        n, channels, rows * side, columns * side
    )
    return _moved(x, move.flatten(1), radius)


def _pushed(x: Images, z: Images, radius: float, side: int, place: Tensor, sign: Tensor) -> Images:
    """Return `z` with a bump in one square, paid for by another square and by what is left of the budget
    (algorithm 3): each channel's new norm in the square is what both squares had, and its share of the rest.
    """
    channels, height, width = x.shape[1:]
    side = min(max(side, 3) | 1, _odd(height), _odd(width))  # An odd one has a middle.
    move = (z - x).flatten(2)  # (n, channels, height * width)
    to, off = (
        _window(place[:, i], place[:, i + 1], (height, width), side).expand(-1, channels, -1) for i in (0, 2)
    )
    left = (radius**2 - move.square().sum((1, 2))).clamp_min(0)
    old, other = move.gather(2, to), move.scatter(2, to, 0.0).gather(2, off)
    had = old.square().sum(2) + other.square().sum(2)
    length = (had + left[:, None] / channels).sqrt()
    bump = _bump(side, x.dtype, x.device)
    turned = torch.where(sign[:, :1, None] > 0, bump.T, bump).flatten(1)[:, None]
    new = turned * sign[:, 1:, None] + _unit(old)
    return _moved(
        x, move.scatter(2, off, 0.0).scatter(2, to, _unit(new) * length[..., None]).flatten(1), radius
    )


def _odd(length: int) -> int:
    """Return the largest odd side that fits."""
    return length - 1 + length % 2


def _window(row: Tensor, column: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Return where, in a flattened channel, the values of each example's square are: (n, 1, side * side)."""
    height, width = size
    step = torch.arange(side, device=row.device)
    rows = _begin(row, height, side)[:, None] + step
    columns = _begin(column, width, side)[:, None] + step
    return (rows[:, :, None] * width + columns[:, None]).flatten(1)[:, None]


def _unit(values: Tensor) -> Tensor:
    """Return values (..., D) at length 1; where they are 0, 0."""
    length: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values / length.clamp_min(1e-12)


def _moved(x: Images, move: Tensor, radius: float) -> Images:
    return (x + (_unit(move) * radius).view_as(x)).clamp_(0, 1)


@cache
def _bump(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return eta (eq. 2), of length 1: a half above 0 and one below, highest in their middles."""
    halves = [_rectangle(side // 2, side), -_rectangle(side - side // 2, side)]
    return _unit(torch.cat(halves).flatten()).view(side, side).to(device, dtype)


def _rectangle(height: int, width: int) -> Tensor:
    """Return sums of 1 / k^2, of length 1, where k counts the rings from the middle outwards."""
    rows, columns = (torch.arange(size, dtype=torch.float64) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None]).long()
    rings = max(height, width) // 2 + 1
    outside = (torch.arange(1, rings + 1, dtype=torch.float64) ** -2).flip(0).cumsum(0).flip(0)
    return _unit(outside[ring].flatten()).view(height, width)

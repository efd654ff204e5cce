"""Latent descent (Chen, Xie and Zhu, eq. 22): towards what another class would draw of the image."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess
from attacks.common.candidates import candidate_labels
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    NonNegativeCount,
    Positive,
    PositiveShare,
    Prototypes,
    Randomness,
    Threat,
    attack,
    succeeded,
)


def cost(*, steps: int, bisections: int, classes: str, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most; with all classes, of ten.

    Args:
        steps: How many steps a walk has.
        bisections: How often the way to a success is halved.
        classes: Whether the best wrong class is gone for, or all.
    """
    return 1 + (9 if classes == "all" else 1) * (steps + 1 + bisections)


@attack(
    "latent-descent",
    norms={"l2"},
    version=1,
    access="score",
    space="prototypes",
    kind="minimum-norm",
    cost=cost,
)
def latent_descent(
    view: Prototypes,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    eta: PositiveShare = 0.02,
    steps: Count = 75,
    raise_every: Count = 25,
    raise_by: Positive = 2.0,
    bisections: NonNegativeCount = 5,
    classes: Literal["best", "all"] = "best",
) -> Crafted:
    """Walk towards what another class c would draw of the image: z <- (1 - eta) z + eta G_c(z).

    The walk ends at its first success, which is then drawn back towards the image by bisection.

    Args:
        view: What the attack looks through; logits and prototypes are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        eta: The share of the way, above 0 and at most 1, that a step goes at first.
        steps: How many steps are taken at most.
        raise_every: After how many steps `eta` is raised.
        raise_by: What it is multiplied by; it stays at most 1.
        bisections: How often the way between the image and a success is halved.
        classes: Without a target, ``best``: c is the best wrong class at each step; ``all``: every wrong
            class in its turn, and the nearest success is kept.

    Returns:
        The nearest success of each image, else the image, with the note ``failed``.
    """
    nearest = NearestSuccess(x, threat)
    with torch.no_grad():
        logits = view.logits(x)
    nearest.offer(torch.arange(len(x), device=x.device), x, succeeded(view, logits, y))
    rows = nearest.failed.nonzero().squeeze(1)
    here, clean, labels = view.select(rows), x[rows], y[rows]
    paces = [min(eta * raise_by ** (t // raise_every), 1) for t in range(steps)]
    every = candidate_labels(here, logits[..., rows, :], labels).unbind(1) if classes == "all" else [None]
    for goals in every if len(rows) else []:
        z, won = _walk(here, clean, labels, goals, paces)
        nearest.offer(rows, z, won)
        draw_back(here, Ways(clean, labels, z, won, rows), nearest, bisections)
    return nearest.crafted()


def _walk(
    view: Prototypes, x: Images, y: Labels, goals: Labels | None, paces: list[float]
) -> tuple[Images, Tensor]:
    """Return where walks from `x` end, at their first success if they have one, and which do, (n,)."""
    ends, wins = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows, z = torch.arange(len(x), device=x.device), x
    for pace in paces:
        with torch.no_grad():
            # One search for both, though what has won needs no prototypes.
            logits, drawn = view.explained(z)
        won = succeeded(view, logits, y)
        ends[rows], wins[rows] = z, won
        standing = (~won).nonzero().squeeze(1)
        if len(standing) == 0:
            return ends, wins
        if len(standing) < len(rows):
            rows, view, y, z = rows[standing], view.select(standing), y[standing], z[standing]
            logits, drawn = logits[..., standing, :], drawn[standing]
        towards = candidate_labels(view, logits, y, 1)[:, 0] if goals is None else goals[rows]
        z = z + pace * (drawn[torch.arange(len(z), device=z.device), towards] - z)
    with torch.no_grad():
        ends[rows], wins[rows] = z, succeeded(view, view.logits(z), y)
    return ends, wins


class Ways(NamedTuple):
    """Where walks led from and to, of the examples `rows` of a batch."""

    x: Images
    y: Labels
    z: Images
    won: Tensor
    """Which of the ends are successes, bool (n,)."""
    rows: Tensor


def draw_back(view: Prototypes, ways: Ways, nearest: NearestSuccess, bisections: int) -> None:
    """Bisect the ways to successes, and offer every success on them.

    Args:
        view: What is looked through, for the examples of the ways.
        ways: The ways; those to no success are left.
        nearest: Where successes go.
        bisections: How often each way is halved.
    """
    found = ways.won.nonzero().squeeze(1)
    low, y, high, _, rows = (each[found] for each in ways)
    view = view.select(found)
    for _ in range(bisections if len(found) else 0):
        middle = (low + high) / 2
        with torch.no_grad():
            hit = succeeded(view, view.logits(middle), y)
        nearest.offer(rows, middle, hit)
        side = hit[:, None, None, None]
        low, high = torch.where(side, low, middle), torch.where(side, middle, high)

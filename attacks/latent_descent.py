"""Latent descent (Chen, Xie and Zhu, eq. 22): towards what another class would draw of the image."""

from typing import Any, Literal

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess
from attacks.common.candidates import candidate_labels
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Prototypes,
    Randomness,
    Shape,
    Threat,
    attack,
    succeeded,
)


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "raise_every"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    if not 0 < params["eta"] <= 1:
        raise InputError(f"eta must be above 0 and at most 1, not {params['eta']:g}")
    if not params["raise_by"] > 0:
        raise InputError(f"raise_by must be above 0, not {params['raise_by']:g}")
    if params["bisections"] < 0:
        raise InputError(f"bisections must be 0 or more, not {params['bisections']}")


@attack(
    "latent-descent",
    norms={"l2"},
    version=1,
    access="score",
    space="prototypes",
    budget="distance",
    check_params=_check,
)
def latent_descent(
    view: Prototypes,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    eta: float = 0.02,
    steps: int = 75,
    raise_every: int = 25,
    raise_by: float = 2.0,
    bisections: int = 5,
    classes: Literal["best", "all"] = "best",
) -> Crafted:
    """Take `steps` steps z <- (1 - eta) z + eta G_c(z), where G_c(z) is what class c draws of z.

    c is the best wrong class at each step, or the target; with ``classes="all"`` every wrong class in
    its turn, and the nearest success is kept. `eta` is multiplied by `raise_by` every `raise_every`
    steps. The walk ends at its first success, which is then drawn back towards the image by bisection.

    Note: ``failed``.
    """
    nearest = NearestSuccess(x, threat)
    with torch.no_grad():
        logits = view.logits(x)
    nearest.offer(torch.arange(len(x), device=x.device), x, succeeded(view, logits, y))
    rows = nearest.failed.nonzero().squeeze(1)
    here, clean, labels = view.take(rows), x[rows], y[rows]
    paces = [min(eta * raise_by ** (t // raise_every), 1) for t in range(steps)]
    every = candidate_labels(here, logits[..., rows, :], labels).unbind(1) if classes == "all" else [None]
    for goals in every if len(rows) else []:
        z, won = _walk(here, clean, labels, goals, paces)
        nearest.offer(rows, z, won)
        halve(here, clean, labels, z, won, rows, nearest, bisections)
    return nearest.crafted()


def _walk(
    view: Prototypes, x: Images, y: Labels, goals: Labels | None, paces: list[float]
) -> tuple[Images, Tensor]:
    """Return where walks from `x` end, at their first success if they have one, and which do, (n,)."""
    ends, wins = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows, z = torch.arange(len(x), device=x.device), x
    for pace in [*paces, None]:
        with torch.no_grad():
            logits = view.logits(z)
        won = succeeded(view, logits, y)
        ends[rows], wins[rows] = z, won
        standing = (~won).nonzero().squeeze(1)
        if pace is None or len(standing) == 0:
            break
        if len(standing) < len(rows):
            rows, view, y, z = rows[standing], view.take(standing), y[standing], z[standing]
            logits = logits[..., standing, :]
        towards = candidate_labels(view, logits, y, 1)[:, 0] if goals is None else goals[rows]
        with torch.no_grad():
            drawn = view.prototypes(z)
        z = z + pace * (drawn[torch.arange(len(z), device=z.device), towards] - z)
    return ends, wins


def halve(
    view: Prototypes,
    x: Images,
    y: Labels,
    z: Images,
    won: Tensor,
    rows: Tensor,
    nearest: NearestSuccess,
    bisections: int,
) -> None:
    """Bisect between `x` and the successes `z` (`won`) of the examples `rows`; offer every success."""
    found = won.nonzero().squeeze(1)
    view, low, high, y, rows = view.take(found), x[found], z[found], y[found], rows[found]
    for _ in range(bisections if len(found) else 0):
        middle = (low + high) / 2
        with torch.no_grad():
            hit = succeeded(view, view.logits(middle), y)
        nearest.offer(rows, middle, hit)
        side = hit[:, None, None, None]
        low, high = torch.where(side, low, middle), torch.where(side, middle, high)

"""Least distance by signed steps (Chen, Xie and Zhu, eq. 20 and 21): |z - x|^2 + lambda F, where F is what is
missing to success, each example with a lambda of its own.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import NearestSuccess, PenaltyConstant
from attacks.common.margins import below
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Randomness,
    Threat,
    View,
    lengths,
    objective,
    succeeded,
)

Schedule: TypeAlias = Literal["growing", "falling"]

Ask: TypeAlias = Callable[[View, Images, Labels, Randomness], tuple[Tensor, Tensor]]
"""``ask(view, z, y, noise)``: the gradient of F at points (n, C, H, W), and whether they have won, (n,)."""


def check(params: dict[str, Any]) -> None:
    """Refuse settings of the search that cannot be."""
    for name in ("steps", "searches"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    for name in ("step", "weight"):
        if not params[name] > 0:
            raise InputError(f"{name} must be above 0, not {params[name]:g}")
    if params["kappa"] < 0:
        raise InputError(f"kappa must be 0 or more, not {params['kappa']:g}")


def shortfall_and_success(view: View, logits: Tensor, y: Labels, kappa: float) -> tuple[Tensor, Tensor]:
    """Return F, how far the margin is below `kappa`, and whether each point has won by as much, (n,)."""
    margin = objective(view, logits, y, "margin")
    return below(kappa, margin), succeeded(view, logits, y) & (margin >= kappa)


def step_length(t: int, steps: int, step: float, schedule: Schedule) -> float:
    """Return how long step `t` is, from 1 to `steps`: `step` at the end, or at the beginning."""
    return step * (t if schedule == "growing" else steps - t + 1) / steps


def signed_descent(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    ask: Ask,
    *,
    steps: int,
    step: float,
    schedule: Schedule,
    searches: int,
    weight: float,
    kappa: float,
) -> Crafted:
    """Go down `searches` times from the image, with lambda at `weight` first, then by binary search.

    The nearest success of all iterates is kept; an image that has won already stays where it is.
    Notes: ``failed``, ``flat``, where the first gradient of F was exactly zero, and ``nonfinite``, where
    one was not finite; neither moves a pixel.
    """
    nearest = NearestSuccess(x, threat)
    flat, nonfinite = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for _ in range(2))
    with torch.no_grad():
        _, won = shortfall_and_success(view, view.logits(x), y, kappa)
    nearest.offer(torch.arange(len(x), device=x.device), x, won)
    rows = (~won).nonzero().squeeze(1)
    here, clean, labels, draws = view.take(rows), x[rows], y[rows], noise.take(rows)
    constant = PenaltyConstant(clean[:, 0, 0, 0], weight)
    for search in range(searches if len(rows) else 0):
        ever, z = torch.zeros_like(rows, dtype=torch.bool), clean
        for t in range(1, steps + 1):
            gradient, won = ask(here, z, labels, draws)
            nearest.offer(rows, z, won)
            ever |= won
            peak = lengths(gradient, "linf")
            nonfinite[rows] |= ~peak.isfinite()
            if search == 0 and t == 1:
                flat[rows] = peak == 0
            slope = constant.value[:, None, None, None] * gradient.nan_to_num(0.0, 0.0, 0.0)
            z = z - step_length(t, steps, step, schedule) * (2 * (z - clean) + slope).sign()
            z = z.clamp(0, 1)
        with torch.no_grad():
            _, won = shortfall_and_success(here, here.logits(z), labels, kappa)
        nearest.offer(rows, z, won)
        constant.learn(ever | won)
    return nearest.crafted(flat=flat, nonfinite=nonfinite)

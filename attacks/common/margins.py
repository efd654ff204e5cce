"""The margin by which a class wins or loses, draw by draw where a view answers several times."""

import torch
from torch import Tensor

from bench import Labels, View, objective


def margins(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return the margin of each answer: the best goal's logit less the best other one.

    Args:
        view: The view that answered; its target and refusal decide what is a goal.
        logits: Its logits (copies * N, K), or (draws, copies * N, K).
        y: The labels (N,).

    Returns:
        (draws, copies * N), one draw unless the view gives several.
    """
    draws = len(logits) if logits.dim() == 3 else 1
    return objective(view, logits.flatten(0, -2), y, "margin").view(draws, -1)


def margin_shortfall(view: View, logits: Tensor, y: Labels, kappa: float) -> Tensor:
    """Return what margins lack to `kappa` (Carlini and Wagner 2017, arXiv:1608.04644, f_6 and section VIII).

    Args:
        view: The view that answered.
        logits: Its logits (copies * N, K), or (draws, copies * N, K).
        y: The labels (N,).
        kappa: The wanted margin, in units of the logits, at least 0.

    Returns:
        (copies * N,), at least 0: the mean over draws, where a draw that has the margin adds nothing.
    """
    return shortfall(kappa, margins(view, logits, y)).mean(0)


def shortfall(wanted: float, margin: Tensor) -> Tensor:
    """Return how far margins are below what is wanted, or 0.

    On the boundary itself it has a gradient: a tie is no success, and would be left by nothing else.

    Args:
        wanted: The wanted margin, in units of the logits.
        margin: Margins of any shape.

    Returns:
        Of the shape of `margin`, at least 0.
    """
    return torch.where(margin > wanted, 0.0, wanted - margin)

"""The margin by which a class wins or loses, draw by draw where a view answers several times."""

import torch
from torch import Tensor

from bench import Labels, View, objective


def margins(view: View, logits: Tensor, y: Labels) -> Tensor:
    """Return (draws, copies * N): the margin of each answer, one draw unless the view gives several."""
    draws = len(logits) if logits.dim() == 3 else 1
    return objective(view, logits.flatten(0, -2), y, "margin").view(draws, -1)


def lack(view: View, logits: Tensor, y: Labels, kappa: float) -> Tensor:
    """Return (copies * N,): what the margin lacks to `kappa`, the mean over draws (Carlini and Wagner 2017,
    arXiv:1608.04644, f_6 with confidence, section VIII); a draw that has it adds nothing.
    """
    return below(kappa, margins(view, logits, y)).mean(0)


def below(wanted: float, margin: Tensor) -> Tensor:
    """Return how far margins are below what is wanted, or 0; with a gradient on the boundary itself, where a
    tie is no success and would be left by nothing else.
    """
    return torch.where(margin > wanted, 0.0, wanted - margin)

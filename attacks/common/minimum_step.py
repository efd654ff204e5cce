"""The least move that still leads on, for attacks that step to a boundary as it looks from where they are."""

import torch
from torch import Tensor

LEAST = 1e-6
"""The first least move: a few units of a pixel's last place."""


class MinimumStep:
    """The least that each example is moved, so that none stands still on a boundary.

    At a tie the way to the boundary has no length, and near it one that is lost in rounding. The least move
    doubles each time that it is needed.

    Args:
        like: A tensor with a row for each example, (N, ...).
    """

    def __init__(self, like: Tensor) -> None:
        self._least = torch.full((len(like),), LEAST, dtype=torch.float64, device=like.device)

    def __call__(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Return how long the next steps are.

        Args:
            rows: Positions of the examples, int64 (n,).
            lengths: How long their steps would be, (n,), in the norm and the units of the attack.

        Returns:
            float64 (n,): these lengths, or the least ones.
        """
        least = self._least[rows]
        short = lengths < least
        self._least[rows] = torch.where(short, 2 * least, least)
        return torch.where(short, least, lengths.double())

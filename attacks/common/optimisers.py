"""Optimisers with a state by example, so that examples can be dropped on the way."""

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1), with its published decay rates and epsilon.

    Args:
        like: What is moved, (N, ...).
        lr: The learning rate, above 0: about the length of a step of each value.
    """

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor) -> Tensor:
        """Return the move that follows from one more gradient (N, ...), to its side."""
        self.t += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.t)
        return self.lr * mean / ((self.square / (1 - 0.999**self.t)).sqrt() + 1e-8)

    def select(self, rows: Tensor) -> "Adam":
        """Return the state of the examples at `rows`, int64 (n,), only."""
        part = Adam(self.mean[rows], self.lr)
        part.t, part.mean, part.square = self.t, self.mean[rows], self.square[rows]
        return part

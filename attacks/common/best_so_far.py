"""What attacks that move as little as they can have in common: the nearest success, and the search for
the constant that weighs success against distance.
"""

import math

import torch
from torch import Tensor

from bench import Crafted, Images, Threat

LEAST = 1e-6
"""The first push: a few units of a pixel's last place."""


class NearestSuccess:
    """The nearest adversarial image that was seen of each example; a failure never replaces a success."""

    def __init__(self, x: Images, threat: Threat) -> None:
        self._x, self._threat = x, threat
        self.images = x.clone()
        self.distance = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        """How far it is, (N,), in the threat's norm; infinite where none was seen."""

    @property
    def failed(self) -> Tensor:
        """bool (N,): no success was seen, and the image is the clean one."""
        return self.distance.isinf()

    def offer(self, rows: Tensor, z: Images, won: Tensor) -> Tensor:
        """Take the images `z` (n, C, H, W) of the examples `rows` that are adversarial (`won`) and nearer
        than what was seen; return which were taken, (n,).
        """
        z = z.detach()
        length = self._threat.distance(self._x[rows].double(), z.double())
        nearer = won & (length < self.distance[rows])
        self.images[rows] = torch.where(nearer[:, None, None, None], z, self.images[rows])
        self.distance[rows] = torch.where(nearer, length, self.distance[rows])
        return nearer

    def crafted(self, **notes: Tensor) -> Crafted:
        """Return the images, failures unchanged and noted as ``failed``, with more notes by example."""
        return Crafted(self.images, {"failed": self.failed, **notes})


class MinimumStep:
    """The least that each example is moved, so that none stands still on a boundary: at a tie the way to it
    has no length, and near it one that is lost in rounding. It doubles each time that it is needed.
    """

    def __init__(self, like: Tensor) -> None:
        self._least = torch.full((len(like),), LEAST, dtype=torch.float64, device=like.device)

    def __call__(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Return float64 (n,): the lengths of the next steps of the examples `rows`."""
        least = self._least[rows]
        short = lengths < least
        self._least[rows] = torch.where(short, 2 * least, least)
        return torch.where(short, least, lengths.double())


class PenaltyConstant:
    """The binary search for each example's own constant (Carlini and Wagner 2017, arXiv:1608.04644).

    From `start`, ten times larger until a success, then bisected between the largest failure and the
    smallest success.
    """

    def __init__(self, like: Tensor, start: float) -> None:
        self.value = torch.full((len(like),), start, dtype=like.dtype, device=like.device)
        """The constants to try next, (N,)."""
        self.low = torch.zeros_like(self.value)
        self.high = torch.full_like(self.value, math.inf)

    def learn(self, won: Tensor) -> None:
        """Take into account which examples, bool (N,), had a success with `value`; move on."""
        self.high = torch.where(won, torch.minimum(self.high, self.value), self.high)
        self.low = torch.where(won, self.low, torch.maximum(self.low, self.value))
        between = (self.low + self.high) / 2
        self.value = torch.where(self.high.isinf(), self.value * 10, between)

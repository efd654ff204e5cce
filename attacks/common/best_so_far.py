"""Records that an attack keeps of each example: the best iterate, the nearest success, odd gradients."""

import math

import torch
from torch import Tensor

from bench import Crafted, Images, Labels, Threat, View, lengths, succeeded


class BestIterate:
    """The best iterate that was seen of each example: a success before any failure, then the higher loss.

    Args:
        start: What each example has before anything is offered, (N, ...): its image, or its code.
    """

    def __init__(self, start: Tensor) -> None:
        self.images = start.clone()
        """The best iterates, of the shape of `start`."""
        self.losses = torch.full((len(start),), -math.inf, dtype=torch.float64, device=start.device)
        """Their losses, float64 (N,); minus infinity where nothing was taken."""
        self.won = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        """Which of them are successes, bool (N,)."""

    @property
    def standing(self) -> Tensor:
        """The positions of the examples without a success, int64."""
        return (~self.won).nonzero().squeeze(1)

    def offer(self, rows: Tensor, z: Tensor, losses: Tensor, won: Tensor | None = None) -> Tensor:
        """Take the iterates that are better than what is known of their examples.

        Args:
            rows: Positions of the examples in the batch, int64 (n,).
            z: An iterate of each, (n, ...).
            losses: Their losses, (n,), larger is better; a failure whose loss is NaN is never taken.
            won: Which of them are successes, bool (n,); None: none is.

        Returns:
            Which were taken, bool (n,).
        """
        if won is None:
            better = losses > self.losses[rows]
        else:
            better = torch.where(won == self.won[rows], losses > self.losses[rows], won)
            self.won[rows] |= won
        self.images[rows] = torch.where(by_example(better, z), z, self.images[rows])
        self.losses[rows] = torch.where(better, losses.double(), self.losses[rows])
        return better

    def win(self, rows: Tensor, images: Images) -> None:
        """Take successes (n, C, H, W) of the examples `rows` (n,), whatever is known of these."""
        self.images[rows], self.won[rows] = images, True

    def put_back(self, rows: Tensor, view: View, x: Images, y: Labels) -> None:
        """Return examples to their images where those are successes already.

        Args:
            rows: The examples in question, int64 (n,); no others are asked about.
            view: The view of the whole batch.
            x: The batch's images (N, C, H, W).
            y: Their labels (N,).
        """
        if len(rows):
            here = view.select(rows)
            with torch.no_grad():
                wrong = succeeded(here, here.logits(x[rows]), y[rows])
            self.images[rows[wrong]] = x[rows[wrong]]


class NearestSuccess:
    """The nearest adversarial image that was seen of each example; a failure never replaces a success.

    Args:
        x: The clean images (N, C, H, W), which are returned where no success was seen.
        threat: Its norm measures; its radius is nothing here.
    """

    def __init__(self, x: Images, threat: Threat) -> None:
        self._x, self._threat = x, threat
        self.images = x.clone()
        """The nearest successes (N, C, H, W); clean images where there is none."""
        self.distance = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        """How far they are, float64 (N,), in the threat's norm; infinite where none was seen."""

    @property
    def failed(self) -> Tensor:
        """bool (N,): no success was seen, and the image is the clean one."""
        return self.distance.isinf()

    def offer(self, rows: Tensor, z: Images, won: Tensor) -> Tensor:
        """Take the adversarial images that are nearer than what is known of their examples.

        Args:
            rows: Positions of the examples in the batch, int64 (n,).
            z: An image of each, (n, C, H, W).
            won: Which of them are adversarial, bool (n,).

        Returns:
            Which were taken, bool (n,).
        """
        z = z.detach()
        length = self._threat.distance(self._x[rows].double(), z.double())
        nearer = won & (length < self.distance[rows])
        self.images[rows] = torch.where(by_example(nearer, z), z, self.images[rows])
        self.distance[rows] = torch.where(nearer, length, self.distance[rows])
        return nearer

    def crafted(self, **notes: Tensor) -> Crafted:
        """Return the images, with the note ``failed`` and further `notes` (N,)."""
        return Crafted(self.images, {"failed": self.failed, **notes})


class GradientNotes:
    """Which examples had gradients that say nothing of where to go.

    Args:
        x: The batch's images (N, C, H, W).
    """

    def __init__(self, x: Images) -> None:
        self.flat = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        """bool (N,): a first gradient was exactly zero."""
        self.nonfinite = torch.zeros_like(self.flat)
        """bool (N,): a gradient was not finite."""

    def see(self, rows: Tensor, gradient: Tensor, *, first: bool) -> None:
        """Note what gradients are like.

        Args:
            rows: Positions of the examples in the batch, int64 (n,).
            gradient: One or more for each, (copies, n, ...).
            first: Whether these are the first of a walk; only then zero is worth a note.
        """
        peak = lengths(gradient.flatten(0, 1), "linf").view(gradient.shape[:2])
        self.nonfinite[rows] |= ~(peak < math.inf).all(0)
        if first:
            self.flat[rows] |= (peak == 0).any(0)

    def columns(self) -> dict[str, Tensor]:
        """Return the notes ``flat`` and ``nonfinite``."""
        return {"flat": self.flat, "nonfinite": self.nonfinite}


def by_example(values: Tensor, like: Tensor) -> Tensor:
    """Return a value for each example with as many axes as what belongs to the examples.

    Args:
        values: (n,).
        like: (n, ...).

    Returns:
        (n, 1, ...).
    """
    return values.view(-1, *[1] * (like.dim() - 1))


def finite(gradient: Tensor) -> Tensor:
    """Return a gradient with 0 for entries that are not finite, which say nothing of where to go."""
    return torch.nan_to_num(gradient, 0.0, 0.0, 0.0)

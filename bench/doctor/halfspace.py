"""A half-space: a linear classifier on which the nearest adversarial image is known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.protocols import Decision, Fitting, Images, Labels, Norm, Shape, Split, View
from bench.registry import view

MARGIN = 3.0
"""Mean margin, in logits, of images that `placed` returns: no cross-entropy in float32 saturates there."""

FARTHEST = 0.7
"""The share of the way from a corner of the box to the plane at which images are placed at most."""

HALVINGS = 20
"""How often the interval of possible shifts is halved for images at a given distance."""


class Halfspace(nn.Module):
    """A linear classifier whose least adversarial distances are known in closed form.

    It answers label 1 where <w, x> + b > 0, label 0 elsewhere, and no other label ever. Its plane goes
    through the grey image (every pixel 0.5).

    Args:
        shape: The form of an image, and the number of classes (at least 2).
        seed: The seed of the weights: of magnitude uniform in [0.2, 1], of either sign.
        smooth: Whether the sign is the same in each quarter of an image, negative in the upper right alone.
    """

    def __init__(self, shape: Shape, *, seed: int = 0, smooth: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        size = torch.empty(shape[:3]).uniform_(0.2, 1.0, generator=draw)
        sign = torch.empty(shape[:3]).bernoulli_(0.5, generator=draw) * 2 - 1
        if smooth:
            sign = torch.ones(shape[:3])
            sign[:, : shape.height // 2, shape.width // 2 :] = -1
        self.weight = nn.Parameter(size * sign)
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())
        self.classes = shape.classes

    def margin(self, x: Images) -> Tensor:
        """Return the signed margin <w, x> + b.

        Args:
            x: Images (N, C, H, W) in any floating-point type.

        Returns:
            The margin of each image, (N,): above 0 for label 1.
        """
        # Example by example, in one order: a matrix product may sum otherwise in another batch.
        return (x * self.weight.to(x.dtype)).flatten(1).sum(1) + self.bias.to(x.dtype)

    def forward(self, x: Images) -> Tensor:
        """Return logits: half the margin for label 1, minus that for label 0, the others far below.

        Args:
            x: Images (N, C, H, W) in any floating-point type.

        Returns:
            Logits (N, K).
        """
        half = self.margin(x) / 2
        others = [torch.full_like(half, -20.0 - each) for each in range(self.classes - 2)]
        return torch.stack([-half, half, *others], dim=1)

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        """Return the view of the logits (N, K), which the read-out ``label`` is the arg-max of."""
        return View(self)

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Learn nothing.

        Args:
            train: Not looked at.
            fitting: Not looked at.
        """

    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer with the arg-max of the logits.

        Args:
            x: Images (N, C, H, W).
            readout: Not looked at: there is one answer.

        Returns:
            A label for each image, none of them refused.
        """
        return Decision.of(self(x))

    @torch.no_grad()
    def least(self, x: Images, norm: Norm) -> Tensor:
        """Return how far each image is from the nearest point of the box [0, 1] that lies on the plane.

        Args:
            x: Images (N, C, H, W) in [0, 1].
            norm: The norm of the distance; ``l0`` counts pixels, whose channels move as one.

        Returns:
            The exact distances, float64 (N,); infinite where the box keeps an image from the plane.
        """
        reach = self.reach(x, norm)
        return reach.ceil() if norm == "l0" else reach

    @torch.no_grad()
    def reach(self, x: Images, norm: Norm) -> Tensor:
        """Return the least distances as `least` does, where in ``l0`` the last pixel counts by its share.

        Args:
            x: Images (N, C, H, W) in [0, 1].
            norm: The norm of the distance; ``l0`` counts pixels, whose channels move as one.

        Returns:
            Distances, float64 (N,), continuous in `x`; infinite where the box keeps an image from the plane.
        """
        gain, need, room, _ = self._needs(x)
        match norm:
            case "linf" | "l2":
                speed = torch.ones_like(gain) if norm == "linf" else gain
                move = torch.minimum(_duration(gain, need, room, speed) * speed, room)
                distance = torch.linalg.vector_norm(move, math.inf if norm == "linf" else 2, dim=1)
            case "l1":
                # The heaviest pixels first, each as far as it goes: what it costs is convex in the gain.
                order = gain.argsort(1, descending=True)
                gained, moved = (_before(_along(each, order)) for each in (gain * room, room))
                distance = (moved + (need - gained) / _along(gain, order)).amax(1)
            case "l0":
                # A pixel counts once, however many of its channels move.
                pixels = (gain * room).unflatten(1, x.shape[1:]).sum(1).flatten(1)
                each = pixels.sort(1, descending=True).values
                distance = ((need - _before(each)) / each.clamp_min(1e-300)).clamp(0, 1).sum(1)
        return torch.where((gain * room).sum(1) < need[:, 0], math.inf, distance)

    @torch.no_grad()
    def prototypes(self, x: Images) -> Tensor:
        """Return what each class would draw of images, as a `Prototypes` view shows it.

        Labels 0 and 1 draw the image itself on their own side of the plane, and from the other side the
        nearest image (in l2) with a margin of 0.5; every other class draws the image itself.

        Args:
            x: Images (N, C, H, W) in [0, 1].

        Returns:
            Images (N, K, C, H, W).
        """
        gain, need, room, sign = self._needs(x)
        move = sign * torch.minimum(_duration(gain, need + 0.5, room, gain) * gain, room)
        across = x + move.view_as(x).to(x.dtype)
        above = (self.margin(x) > 0)[:, None, None, None]
        drawn = [torch.where(above, across, x), torch.where(above, x, across)]
        return torch.stack([*drawn, *[x] * (self.classes - 2)], dim=1)

    def _needs(self, x: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what each pixel gains by a move of 1 (N, D), what is needed in all (N, 1), how much room the
        box leaves each, and to which side.
        """
        margin, start = self.margin(x.double())[:, None], x.double().flatten(1)
        weight = self.weight.detach().double().flatten().expand_as(start)
        up = (weight > 0) ^ (margin > 0)
        return weight.abs(), margin.abs(), torch.where(up, 1 - start, start), torch.where(up, 1.0, -1.0)

    @torch.no_grad()
    def examples(self, n: int, *, seed: int = 0, margin: float = 3.0) -> tuple[Images, Labels]:
        """Return images at a margin from the plane, on either side in turn, with some pixels black or white.

        Args:
            n: The number of images, at least 1.
            seed: The seed of the draws.
            margin: The margin |<w, x> + b| of each image, above 0, before values are clamped to [0, 1].

        Returns:
            Images, float64 (n, C, H, W) in [0, 1], and their labels, int64 (n,): 0 and 1 in turn.
        """
        draw = torch.Generator().manual_seed(seed)
        kind = torch.empty(n, *self.weight.shape).uniform_(generator=draw)
        x = torch.empty_like(kind).uniform_(0.25, 0.75, generator=draw).double()
        inside = kind >= 0.1
        x = torch.where(inside, x, (kind < 0.05).double())
        labels = torch.arange(n) % 2
        weight = self.weight.detach().double() * inside
        missing = (labels * 2 - 1) * margin - self.margin(x)
        x = x + weight * (missing / weight.square().flatten(1).sum(1))[:, None, None, None]
        return x.clamp(0, 1), labels


def _duration(gain: Tensor, need: Tensor, room: Tensor, speed: Tensor) -> Tensor:
    """Return the t (N, 1) at which moves of min(t * speed, room) have gained what is needed.

    For some t that is the best move, and what it gains is concave in t.
    """
    order = (room / speed).argsort(1)
    gained = _before(_along(gain * room, order))
    rate = _along(gain * speed, order).flip(1).cumsum(1).flip(1)
    return ((need - gained) / rate).amax(1, keepdim=True)


def _along(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, order)


def _before(values: Tensor) -> Tensor:
    """Return, at each place, the sum of what comes before it."""
    return values.cumsum(1) - values


@dataclass(frozen=True)
class Placed:
    """A half-space, and images on either side of it at one distance from it."""

    plane: Halfspace
    """The half-space."""
    images: Images
    """Images, float64 (N, C, H, W) in [0, 1]."""
    labels: Labels
    """Their labels, int64 (N,): 0 and 1 in turn."""
    least: Tensor
    """Their least distances, float64 (N,)."""


@torch.no_grad()
def placed(
    shape: Shape,
    norm: Norm,
    distance: float,
    n: int,
    *,
    margin: float = MARGIN,
    smooth: bool = False,
    seed: int = 0,
) -> Placed:
    """Return a half-space with images whose least adversarial distance is given.

    Images on the plane are shifted away from it, every value by as much as the box allows, until they are as
    far as they should be. Then weights and bias are scaled, which moves no distance, so that the mean margin
    is as it should be, whatever the norm, the form and the distance.

    Args:
        shape: The form of an image, and the number of classes (at least 2).
        norm: The norm of the distance; ``l0`` counts pixels.
        distance: The least distance, above 0, in ``l0`` a whole number. Where the box is too small for it,
            images lie at most at `FARTHEST` of the way between a corner of the box and the plane.
        n: The number of images, at least 1.
        margin: The mean margin of the images, in logits, above 0.
        smooth: Whether the weights have one sign in each quarter of an image.
        seed: The seed of weights and images.

    Returns:
        The half-space, the images, their labels and their exact distances.
    """
    plane = Halfspace(shape, seed=seed, smooth=smooth)
    x, y = plane.examples(n, seed=seed, margin=0.0)
    away = plane.weight.double().sign() * (2.0 * y - 1)[:, None, None, None]
    corners = ((away[:2] + 1) / 2).clamp(0, 1)
    most = FARTHEST * float(plane.least(corners, norm).min())
    # To count half a pixel less leaves room on both sides of a whole number.
    wanted = min(distance, max(1.0, math.floor(most))) - 0.5 if norm == "l0" else min(distance, most)
    low, high = (torch.full((n, 1, 1, 1), math.log(each)).double() for each in (wanted / x[0].numel() / 4, 1))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        near = plane.reach((x + middle.exp() * away).clamp(0, 1), norm)[:, None, None, None] < wanted
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    x = (x + high.exp() * away).clamp(0, 1)
    scale = margin / plane.margin(x).abs().mean()
    plane.weight.mul_(scale)
    plane.bias.mul_(scale)
    return Placed(plane, x, y, plane.least(x, norm))

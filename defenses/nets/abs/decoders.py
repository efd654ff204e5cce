"""The decoders of ABS as they answer in evaluation: normalisations folded, and fast on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad, pixel_shuffle

from defenses.nets.abs.activations import Elu, activated
from defenses.nets.abs.architectures import Plan


class Phases(NamedTuple):
    """The official decoder's last two layers on grids of a quarter and of a sixteenth of the pixels.

    A transposed convolution of stride 2 and kernel 5, and one of stride 1 and kernel 4 behind it, are slow
    on a CPU, the first in groups slower still. As plain convolutions they are faster: the first gives, for
    each cell q of 2x2 pixels, the pixels 2q + p as planes of their own, and the second reads those and
    gives the pixels 4Q + r of cells of 4x4. The first layer's 25 pixels are 12 cells and a half: what stands
    in the other half is the activation of the bias alone, whose share of the image is taken off in `level`.
    """

    inner: Tensor
    """(K, outputs * 4, inputs, 3, 3)."""
    bias: Tensor
    """(K, outputs * 4)."""
    outer: Tensor
    """(K, channels * 16, outputs * 4, 4, 4)."""
    inner_back: Tensor
    """(K, inputs, outputs * 4, 3, 3): from the gradient at cells of 2x2 to the one below."""
    outer_back: Tensor
    """(K, outputs * 4, channels, 5, 5): from the gradient at pixels to the one at cells of 2x2."""
    level: Tensor
    """(K, channels, 28, 28)."""

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        """Return this form of two layers' weights, (K, inputs, outputs, kernel, kernel), and biases.

        Args:
            weights: of the two layers, each (K, inputs, outputs, kernel, kernel).
            biases: of the two layers, each (K, outputs).
        """
        first, second = weights
        # Which tap k of a kernel joins pixels: 1 where it does. Pixel 2q + p is made of q + t - 2.
        p, t, k = torch.meshgrid(*map(torch.arange, (2, 3, 5)), indexing="ij")
        upon = (k == p + 2 * (2 - t)).to(first)
        # Pixel 4Q + r is made of pixel 2 (2Q + t - 2) + p.
        r, p, t, k = torch.meshgrid(*map(torch.arange, (4, 2, 4, 4)), indexing="ij")
        over = (k == r - 2 * (t - 2) - p).to(first)
        # Pixel 2q + p has its share in pixel 2q + t.
        p, t, k = torch.meshgrid(*map(torch.arange, (2, 5, 4)), indexing="ij")
        down = (k == t - p).to(first)
        inner = torch.einsum("ptk,qul,gickl->gcpqitu", upon, upon, first).flatten(1, 3)
        outer = torch.einsum("rptk,squl,gcokl->gorscpqtu", over, over, second).flatten(4, 6).flatten(1, 3)
        outer_back = torch.einsum("ptk,qul,gcokl->gcpqotu", down, down, second).flatten(1, 3)
        bias = biases[0].repeat_interleave(4, dim=1)
        # The odd pixels of the last row and column of cells.
        beyond = first.new_zeros(2, 2, CELLS, CELLS)
        beyond[1, :, -1] = beyond[:, 1, :, -1] = 1
        stray = Elu.apply(bias)[:, :, None, None] * beyond.flatten(0, 1).repeat(biases[0].shape[1], 1, 1)
        share = conv2d(stray.flatten(0, 1)[None], outer.flatten(0, 1), stride=2, padding=2, groups=len(first))
        share = pixel_shuffle(share, 4)[0].unflatten(0, (len(first), -1))
        inner_back = inner.transpose(1, 2).flip(3, 4).contiguous()
        return cls(inner, bias, outer, inner_back, outer_back, biases[1][:, :, None, None] - share)

    def __call__(self, h: Tensor, classes: slice) -> Tensor:
        """Return (N, G * channels, 28, 28) of (N, G * inputs, 11, 11), for the G classes of the slice."""
        count = classes.stop - classes.start
        inner, bias, outer, inner_back, outer_back, level = (each[classes].flatten(0, 1) for each in self)
        h = _Linear.apply(
            h,
            lambda each: conv2d(each, inner, bias, padding=2, groups=count),
            lambda back: conv2d(back, inner_back, groups=count),
        )
        # A row and a column more, so that the last cell has its pixels.
        h = _Linear.apply(
            Elu.apply(h),
            lambda each: pixel_shuffle(conv2d(each, outer, stride=2, padding=2, groups=count), 4),
            lambda back: conv2d(pad(back, (0, 1, 0, 1)), outer_back, stride=2, groups=count),
        )
        return h + level


CELLS = 13
"""Of 2x2 pixels, along a side of the official decoder's third layer."""


class _Linear(torch.autograd.Function):
    """A map that is linear up to a constant, with its transpose given, where autograd's own is slower."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return what the map makes of `h`."""
        ctx.back = back
        return there(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return what its transpose makes of the gradient."""
        return ctx.back(gradients[0]), None, None


class Folded(NamedTuple):
    """Decoders as they answer in evaluation, normalisations folded into the weights; no gradient to these."""

    weights: tuple[Tensor, ...]
    """A layer's: (K, inputs, outputs, kernel, kernel)."""
    biases: tuple[Tensor, ...]
    """A layer's: (K, outputs)."""
    plans: tuple[Plan, ...]
    activation: str
    gain: float
    phases: Phases | None
    """The last two layers once more, of the official decoder."""

    def __call__(self, codes: Tensor, classes: slice) -> Tensor:
        """Return images (N, G, C, H, W) in [0, 1] of codes (N, G, latent), for the G classes of the slice."""
        count = classes.stop - classes.start
        plain = len(self.plans) - (0 if self.phases is None else 2)
        h = codes.flatten(1)[:, :, None, None]
        for place, (_, _, stride, padding) in enumerate(self.plans[:plain]):
            kernel, level = self.weights[place][classes].flatten(0, 1), self.biases[place][classes].flatten()
            h = conv_transpose2d(h, kernel, level, stride, padding, groups=count)
            if place < len(self.plans) - 1:
                h = activated(h, self.activation)
        if self.phases is not None:
            h = self.phases(h, classes)
        images: Tensor = (self.gain * h).sigmoid().unflatten(1, (count, -1))
        return images


def blocks(images: int, classes: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of images and classes with at most `rows` codes, of few classes where images are many.

    Args:
        images: number of images.
        classes: number of classes.
        rows: codes that are decoded at once, 1 or more.
    """
    tall = max(1, min(images, rows))
    wide = max(1, min(classes, rows // tall))
    for top in range(0, images, tall):
        for left in range(0, classes, wide):
            yield slice(top, min(top + tall, images)), slice(left, min(left + wide, classes))

"""Nets B.1 and B.2 of CNN-F's appendix (Huang et al. 2020): convolutions, then fully connected layers."""

from collections.abc import Sequence

from bench import Shape
from defenses.nets.cnnf.feedback import Network, Tap
from defenses.nets.cnnf.operators import (
    EPSILON,
    AdaPool,
    AdaReLU,
    Conv,
    FeedbackNorm,
    Flatten,
    Layer,
    Linear,
    Norm,
)
from defenses.nets.common import scaled_width


def b1(
    shape: Shape,
    *,
    ind: int = 0,
    width: float = 1.0,
    hidden: Sequence[int] = (128,),
    epsilon: float = EPSILON,
) -> Network:
    """Build net B.1: convolutions of 32 and 64 channels, the second pooled instead of rectified (D-02).

    What the paper leaves open is as in net B.2: padding 1, cells of 2x2, biases in every layer. Sides of
    images must be even.

    Args:
        shape: channels, height, width and classes of the data.
        ind: where the feedback ends: 0 is the pixels, 1 is after the first convolution's block.
        width: factor of the number of channels, above 0.
        hidden: units of the hidden fully connected layers.
        epsilon: added to the mean square before the root, above 0.
    """
    layers: list[Layer] = [
        *(Conv(shape.channels, first := scaled_width(32, width)), Norm(first, epsilon), AdaReLU()),
        FeedbackNorm(epsilon),
        *(Conv(first, second := scaled_width(64, width)), Norm(second, epsilon), AdaPool()),
        FeedbackNorm(epsilon),
        *_head((second, shape.height // 2, shape.width // 2), hidden, shape.classes),
    ]
    return Network(layers, start=_starts(layers)[ind])


def b2(
    shape: Shape,
    *,
    ind: int = 2,
    width: float = 1.0,
    hidden: Sequence[int] = (1000, 128),
    first_kernel: int = 3,
    epsilon: float = EPSILON,
) -> Network:
    """Build net B.2: convolutions of 16, 32, 32 and 64 channels, the last two pooled.

    Sides of images must be divisible by 4.

    Args:
        shape: channels, height, width and classes of the data.
        ind: where the feedback ends: 0 is the pixels, 1 or 2 is after that convolution's block.
        width: factor of the number of channels, above 0.
        hidden: units of the hidden fully connected layers.
        first_kernel: kernel side of the first convolution, 3 in the released code and 1 in print (D-03).
        epsilon: added to the mean square before the root, above 0.
    """
    layers: list[Layer] = []
    taps: list[Tap] = []
    channels = shape.channels
    for number, full in enumerate((16, 32, 32, 64)):
        outputs = scaled_width(full, width)
        layers += [Conv(channels, outputs, 3 if number else first_kernel), Norm(outputs, epsilon), AdaReLU()]
        if number >= 2:
            # What the AdaReLU gives, and the feedback behind its mask.
            taps.append(Tap(forward=len(layers), feedback=len(layers) - 1))
            layers.append(AdaPool())
        layers.append(FeedbackNorm(epsilon))
        channels = outputs
    layers += _head((channels, shape.height // 4, shape.width // 4), hidden, shape.classes)
    return Network(layers, start=_starts(layers)[ind], taps=taps)


def _head(planes: tuple[int, int, int], hidden: Sequence[int], classes: int) -> list[Layer]:
    channels, height, width = planes
    layers: list[Layer] = [Flatten(channels, height, width)]
    units = channels * height * width
    for outputs in hidden:
        layers += [Linear(units, outputs), AdaReLU()]
        units = outputs
    return [*layers, Linear(units, classes)]


def _starts(layers: Sequence[Layer]) -> list[int]:
    """Return where each convolution's block begins."""
    return [place for place, layer in enumerate(layers) if isinstance(layer, Conv)]

"""WRN-40-2 (Zagoruyko and Komodakis 2016, arXiv:1605.07146) as CNN-F has it: no batch normalisation."""

from torch import Tensor
from torch.nn.functional import relu

from bench import Shape
from defenses.nets.cnnf.feedback import Network, Tap
from defenses.nets.cnnf.operators import (
    EPSILON,
    AdaReLU,
    AveragePool,
    Conv,
    FeedbackNorm,
    Flatten,
    Gate,
    Gates,
    Layer,
    Linear,
    Norm,
    Rule,
    Seen,
    State,
    normalise,
)
from defenses.nets.common import scaled_width

BLOCKS = 6
"""Basic blocks of each of the three groups: 40 layers are 3 * 2 * 6 + 4 (D-04)."""


class Block(Layer):
    """A residual block of two convolutions, each after normalisation, bias and AdaReLU.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: 1 or 2.
        epsilon: added to the mean square before the root, above 0.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.norm1, self.norm2 = Norm(inputs, epsilon), Norm(outputs, epsilon)
        self.conv1, self.conv2 = Conv(inputs, outputs, 3, stride), Conv(outputs, outputs)
        self.unit = AdaReLU()
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else Conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride)."""
        rectified = relu(self.norm1(x))
        inner = relu(self.norm2(self.conv1(rectified)))
        return self._sum(x, rectified, inner)

    def advance(self, x: Tensor, seen: Seen, rule: Rule) -> tuple[Tensor, State]:
        """Return the output, and the gates of both units."""
        seen1, seen2 = seen if isinstance(seen, tuple) else (None, None)
        rectified, gate1 = self.unit.advance(self.norm1(x), seen1, rule)
        inner, gate2 = self.unit.advance(self.norm2(self.conv1(rectified)), seen2, rule)
        assert isinstance(gate1, Gate)
        assert isinstance(gate2, Gate)
        return self._sum(x, rectified, inner), Gates(gate1, gate2)

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return the feedback at the input, and what both units have seen."""
        assert isinstance(state, Gates)
        gate1, gate2 = state
        back, _ = self.conv2.feedback(u, None, rule)
        seen2 = normalise(back, self.epsilon)
        back, _ = self.unit.feedback(seen2, gate2, rule)
        back, _ = self.conv1.feedback(back, None, rule)
        seen1 = normalise(back, self.epsilon)
        if self.shortcut is None:
            back, _ = self.unit.feedback(seen1, gate1, rule)
            return u + back, (seen1, seen2)
        seen1 = seen1 + self.shortcut.feedback(u, None, rule)[0]
        back, _ = self.unit.feedback(seen1, gate1, rule)
        return back, (seen1, seen2)

    def _sum(self, x: Tensor, rectified: Tensor, inner: Tensor) -> Tensor:
        kept = x if self.shortcut is None else self.shortcut(rectified)
        out: Tensor = kept + self.conv2(inner)
        return out


def wrn_40_2(shape: Shape, *, ind: int = 5, width: float = 1.0, epsilon: float = EPSILON) -> Network:
    """Build WRN-40-2: groups of 32, 64 and 128 channels, and an average over the whole plane.

    Sides of images must be divisible by 4.

    Args:
        shape: channels, height, width and classes of the data.
        ind: where the feedback ends: 0 is the pixels, 1 to 6 the output of that block of the first group.
        width: factor of the number of channels, above 0.
        epsilon: added to the mean square before the root, above 0.
    """
    channels = scaled_width(16, width)
    layers: list[Layer] = [Conv(shape.channels, channels)]
    taps: list[Tap] = []
    for full, stride in ((32, 1), (64, 2), (128, 2)):
        outputs = scaled_width(full, width)
        for number in range(BLOCKS):
            layers.append(Block(channels, outputs, 1 if number else stride, epsilon))
            channels = outputs
        # The output of a group, and the feedback there.
        taps.append(Tap(forward=len(layers), feedback=len(layers)))
    plane = shape.height // 4, shape.width // 4
    layers += [
        *(Norm(channels, epsilon), AdaReLU(), FeedbackNorm(epsilon, constant=True)),
        *(AveragePool(*plane), Flatten(channels, 1, 1), Linear(channels, shape.classes)),
    ]
    return Network(layers, start=1 + ind if ind else 0, taps=taps)

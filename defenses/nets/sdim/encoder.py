"""ResNet 8n+2, the encoder of SDIM and of its discriminative twin (He et al. 2016, arXiv:1512.03385)."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from bench import Images, InputError, Shape
from defenses.nets.common import scaled_width

Head: TypeAlias = Literal["two-layer", "linear"]

CHANNELS = (32, 64, 128, 256)
"""Of the four stages, whose strides are 1, 2, 2 and 2."""

SIDES = (32, 16, 8, 4)
"""Of the four stages' maps."""


class Maps(NamedTuple):
    """What an encoder makes of images."""

    second: Tensor
    """(N, 64 * width, 16, 16), the output of the second stage."""
    last: Tensor
    """(N, 256 * width, 4, 4), the output of the last stage."""
    code: Tensor
    """(N, outputs)."""


class Block(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation, and a shortcut without parameters (option A).

    Where the shape changes, the shortcut takes every second pixel and puts the missing channels, all
    zero, half before and half behind its own.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        before = (outputs - inputs) // 2
        self.missing = before, outputs - inputs - before

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride)."""
        inner = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        if any(self.missing):
            kept = pad(kept, (0, 0, 0, 0, *self.missing))
        return relu(inner + kept)


class Encoder(nn.Module):
    """ResNet 8n+2: a 3x3 convolution, four stages of `n` blocks, the mean over the last map, and a head.

    Weights of convolutions and linear layers start as Kaiming et al. have them (normal, 2 / inputs).

    Args:
        channels: channels of the images.
        outputs: dimensions of the code, or the number of classes.
        n: blocks of each stage, 1 or more.
        width: factor of all channels and of the head's hidden units, above 0.
        head: ``two-layer`` is linear, batch normalisation, ReLU, linear, as released; ``linear`` is one
            layer, as printed (D-14).
    """

    def __init__(self, channels: int, outputs: int, *, n: int, width: float, head: Head) -> None:
        super().__init__()
        self.outputs = outputs
        self.widths = [scaled_width(each, width) for each in CHANNELS]
        first, *_, units = self.widths
        self.conv = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.stages = nn.ModuleList()
        inputs = first
        for number, planes in enumerate(self.widths):
            blocks = [Block(inputs, planes, 2 if number else 1)]
            blocks += [Block(planes, planes, 1) for _ in range(n - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = planes
        if head == "linear":
            self.head = nn.Sequential(nn.Linear(units, outputs))
        else:
            self.head = nn.Sequential(
                nn.Linear(units, units), nn.BatchNorm1d(units), nn.ReLU(), nn.Linear(units, outputs)
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def maps(self, x: Images) -> Maps:
        """Return the maps and the code of images; nothing is normalised.

        Args:
            x: images (N, C, 32, 32) in [0, 1].
        """
        x = relu(self.norm(self.conv(x)))
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return Maps(outputs[1], x, self.head(torch.mean(x, (2, 3))))

    def forward(self, x: Images) -> Tensor:
        """Return the code (N, outputs) of images (N, C, 32, 32) in [0, 1]."""
        return self.maps(x).code


def check_shape(shape: Shape) -> None:
    """Raise `InputError` where the encoder's maps would not be those of the paper.

    Args:
        shape: channels, height, width and classes of the data.
    """
    found = [(shape.height, shape.width)]
    for _ in SIDES[1:]:
        height, wide = found[-1]
        found.append(((height + 1) // 2, (wide + 1) // 2))
    # Images of 28x28 end in 4x4 too, but their maps before it are others than the paper's.
    if found != [(side, side) for side in SIDES]:
        raise InputError(
            "the encoder takes images of 32x32, so that its maps are 32x32, 16x16, 8x8 and at last 4x4; "
            f"found images whose maps are {', '.join(f'{height}x{wide}' for height, wide in found[:-1])} "
            f"and at last {found[-1][0]}x{found[-1][1]}; set resize: 32 on the data"
        )

"""ResNet18 in its form for small images (He et al. 2016, arXiv:1512.03385)."""

from torch import Tensor, nn
from torch.nn.functional import relu

from bench import Images, Shape
from defenses.nets.common import scaled_width


class ResNet18(nn.Module):
    """A 3x3 convolution of 64 channels, then four stages of two blocks, mean over the map, a linear layer.

    The stages have 64, 128, 256 and 512 channels and strides 1, 2, 2 and 2; no first pooling, so that
    32x32 images leave a map of 4x4. Images are taken as they are, in [0, 1].

    Args:
        shape: channels, height, width and classes of the data.
        width: factor of the number of channels, above 0.
    """

    def __init__(self, shape: Shape, *, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled_width(64, width)
        self.conv = nn.Conv2d(shape.channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        blocks = []
        for full, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            outputs = scaled_width(full, width)
            blocks += [Block(channels, outputs, stride), Block(outputs, outputs)]
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, shape.classes)

    def forward(self, x: Images) -> Tensor:
        """Return logits (N, K).

        Args:
            x: images (N, C, H, W) in [0, 1].
        """
        features = self.blocks(relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut, which is 1x1 where shapes change.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride), rounded up."""
        inner = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(inner + self.shortcut(x))

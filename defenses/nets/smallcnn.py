"""The two networks for MNIST: SmallCNN (Zhang et al. 2019, arXiv:1901.08573) and LeNet."""

from collections import OrderedDict

from torch import nn

from bench import Shape
from defenses.nets.common import scaled_width

SMALLCNN_LEAST = 16
LENET_LEAST = 12
"""The shortest side of an image that each leaves something of: four 3x3 or two 5x5 kernels, two pools."""


def smallcnn(shape: Shape, *, width: float = 1.0) -> nn.Sequential:
    """Build SmallCNN of the TRADES code: 32, 32, pool, 64, 64, pool, then linear 200, 200 and classes.

    All kernels are 3x3 without padding, so that images of 28x28 leave 4x4. Convolutions start from
    Kaiming's normal distribution with biases of PyTorch's default; the last layer starts at zero: before
    the first step, logits and input gradients are exactly 0, and an attack does not move.

    Args:
        shape: channels, height, width and classes of the data.
        width: factor of channels and hidden units, above 0.
    """
    first, second, units = (scaled_width(each, width) for each in (32, 64, 200))
    height, breadth = (((side - 4) // 2 - 4) // 2 for side in (shape.height, shape.width))
    last = nn.Linear(units, shape.classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape.channels, first, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, first, 3),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(first, second, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(second, second, 3),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * height * breadth, units),
            relu5=nn.ReLU(),
            drop=nn.Dropout(0.5),
            fc2=nn.Linear(units, units),
            relu6=nn.ReLU(),
            fc3=last,
        )
    )
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network


def lenet(shape: Shape, *, width: float = 1.0) -> nn.Sequential:
    """Build LeNet: 5x5 convolutions of 6 and 16 channels, each pooled, then linear 120, 84 and classes.

    As in ME-Net's code for 32x32, without padding. API-Net does not say what its LeNet on MNIST is
    (D-41): on images whose shorter side is less than 32, the first convolution is padded by 2 pixels, so
    that 28x28 leaves the same 5x5 as 32x32.

    Args:
        shape: channels, height, width and classes of the data.
        width: factor of channels and hidden units, above 0.
    """
    first, second = (scaled_width(each, width) for each in (6, 16))
    third, fourth = (scaled_width(each, width) for each in (120, 84))
    border = 2 if min(shape.height, shape.width) < 32 else 0
    height, breadth = (((side + 2 * border - 4) // 2 - 4) // 2 for side in (shape.height, shape.width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape.channels, first, 5, padding=border),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * height * breadth, third),
            relu3=nn.ReLU(),
            fc2=nn.Linear(third, fourth),
            relu4=nn.ReLU(),
            fc3=nn.Linear(fourth, shape.classes),
        )
    )

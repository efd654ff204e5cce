"""The classifiers A to F of Defense-GAN (Samangouei et al. 2018, arXiv:1805.06605), as released."""

from typing import Literal, TypeAlias

from torch import nn

from bench import Shape
from defenses.nets.common import scaled_width

Letter: TypeAlias = Literal["A", "B", "C", "D", "E", "F"]


def build(net: Letter, shape: Shape, *, width: float = 1.0) -> nn.Sequential:
    """Build a classifier of images (N, C, H, W) in [0, 1], untrained.

    Dropout has the rates of the paper. The released code hands them to a function that takes them as the
    share to keep, so that 0.2 drops 80 percent (D-45). Kernels start as Gaussian ones of norm 1 for each
    output, biases as 0.

    Args:
        net: the classifier.
        shape: channels, height, width and classes of the data.
        width: factor of the hidden layers' channels and units, above 0.
    """
    few, many, flat, wide = (scaled_width(each, width) for each in (64, 128, 128, 200))
    size = shape.channels * shape.height * shape.width
    layers: list[nn.Module]
    match net:
        case "A" | "C":
            front = (
                nn.Conv2d(shape.channels, few, 5, padding=2)
                if net == "A"
                else nn.Conv2d(shape.channels, many, 3, padding=1)
            )
            rows, columns = ((side - 5) // 2 + 1 for side in (shape.height, shape.width))
            layers = [
                *(front, nn.ReLU()),
                *(nn.Conv2d(front.out_channels, few, 5, stride=2), nn.ReLU()),
                *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(few * rows * columns, flat), nn.ReLU()),
                *(nn.Dropout(0.5), nn.Linear(flat, shape.classes)),
            ]
        case "B" | "F":
            # Stride 2 and padding 3 halve a side; 6x6 with stride 2 and 5x5 have no padding.
            rows, columns = ((side // 2 - 6) // 2 + 1 - 4 for side in (shape.height, shape.width))
            layers = [
                *(nn.Conv2d(shape.channels, few, 8, stride=2, padding=3), nn.ReLU()),
                *(nn.Conv2d(few, many, 6, stride=2), nn.ReLU()),
                *(nn.Conv2d(many, many, 5), nn.ReLU(), nn.Flatten()),
                nn.Linear(many * rows * columns, shape.classes),
            ]
            if net == "B":
                layers = [nn.Dropout(0.2), *layers[:-2], nn.Dropout(0.5), *layers[-2:]]
        case "D" | "E":
            drop = [nn.Dropout(0.5)] if net == "D" else []
            layers = [
                *(nn.Flatten(), nn.Linear(size, wide), nn.ReLU(), *drop),
                *(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, shape.classes)),
            ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight)
            flattened = layer.weight.data.flatten(1)
            flattened /= (flattened.square().sum(1, keepdim=True) + 1e-7).sqrt()
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)

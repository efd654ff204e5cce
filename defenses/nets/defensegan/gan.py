"""Generators and critics of Defense-GAN, and the losses of a WGAN with a gradient penalty."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, autograd, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench import Images, InputError, Shape
from defenses.nets.common import channels_last, scaled_width
from defenses.nets.defensegan import dcgan
from defenses.nets.defensegan.deconvolution import Deconvolution

Architecture: TypeAlias = Literal["released", "supplement"]

SIDES: dict[Architecture, int] = {"released": 28, "supplement": dcgan.SIDE}
"""Of the images that a generator draws, which are square."""


class Rows(nn.Module):
    """Vectors to maps that lie channel by channel within a pixel, as convolutions on a CPU want them.

    Args:
        channels: channels of a map.
        side: of a map, which is square.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.channels, self.side = channels, side

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels * side * side) to (N, channels, side, side)."""
        return channels_last(x.view(-1, self.channels, self.side, self.side))


class Unit(nn.Module):
    """From [-1, 1] to [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (x + 1) / 2."""
        return (x + 1) / 2


def check_shape(architecture: Architecture, shape: Shape) -> None:
    """Raise `InputError` where a generator's images are not of the data's size.

    Args:
        architecture: of the generator.
        shape: channels, height, width and classes of the data.
    """
    side = SIDES[architecture]
    if (shape.height, shape.width) != (side, side):
        raise InputError(
            f"architecture: the {architecture} generator draws images of {side}x{side}, the data's are "
            f"{shape.height}x{shape.width}; set resize: {side} where the data is named"
            + "".join(f", or architecture: {other}" for other in SIDES if _fits(other, shape))
        )


def _fits(architecture: Architecture, shape: Shape) -> bool:
    return (shape.height, shape.width) == (SIDES[architecture],) * 2


def generator(architecture: Architecture, channels: int, *, latent: int, width: float) -> nn.Sequential:
    """Build a generator, untrained.

    Args:
        architecture: ``released`` is that of the code for MNIST (28x28, no batch normalisation),
            ``supplement`` that of Chen, Xie and Zhu (32x32), whose layers start from PyTorch's defaults, as
            their start is not stated.
        channels: channels of the images.
        latent: dimensions of a latent, 1 or more.
        width: factor of the number of channels, above 0.

    Returns:
        A network of latents (N, latent) to images (N, channels, H, W) in [0, 1].
    """
    if architecture == "supplement":
        return nn.Sequential(*dcgan.decoder(latent, channels, width), Unit())
    first, second, third = (scaled_width(each, width) for each in (256, 128, 64))
    network = nn.Sequential(
        nn.Linear(latent, first * 16),
        nn.ReLU(),
        Rows(first, 4),
        # Released as 4 -> 8, of which the last row and column are then cut: this is what is left.
        nn.ConvTranspose2d(first, second, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.ConvTranspose2d(second, third, 5, stride=2, padding=2, output_padding=1),
        nn.ReLU(),
        Deconvolution(third, channels, 5),
        nn.Sigmoid(),
    )
    return _started(network)


def critic(architecture: Architecture, channels: int, *, width: float) -> nn.Sequential:
    """Build a critic, untrained.

    Args:
        architecture: that of the generator.
        channels: channels of the images.
        width: factor of the number of channels, above 0.

    Returns:
        A network of images in the architecture's own units (`native`) to (N, 1).
    """
    if architecture == "supplement":
        return dcgan.encoder(channels, 1, width)
    first, second, third = (scaled_width(each, width) for each in (64, 128, 256))
    network = nn.Sequential(
        nn.Conv2d(channels, first, 5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(first, second, 5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(second, third, 5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(third * 16, 1),
    )
    return _started(network)


def native(architecture: Architecture, x: Images) -> Tensor:
    """Return images in the units that the critic and its gradient penalty are made for.

    Args:
        architecture: ``released`` has [0, 1], ``supplement`` [-1, 1].
        x: images (N, C, H, W) in [0, 1].
    """
    return x if architecture == "released" else 2 * x - 1


def _started(network: nn.Sequential) -> nn.Sequential:
    """Draw the start that is released: uniform with std sqrt(4 / (fan in + fan out)), half the variance in
    fully connected layers; biases are 0. A stride of 2 divides a convolution's fan out by 4, and a
    transposed one's fan in.
    """
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            fan_in, fan_out = layer.in_channels * taps, layer.out_channels * taps
            forward = isinstance(layer, nn.Conv2d)
            variance = 4 / ((fan_in + fan_out / 4) if forward else (fan_in / 4 + fan_out))
        elif isinstance(layer, nn.Linear):
            variance = 2 / (layer.in_features + layer.out_features)
        else:
            continue
        bound = math.sqrt(3 * variance)
        nn.init.uniform_(layer.weight, -bound, bound)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return network


def penalty(judge: nn.Module, real: Tensor, fake: Tensor, along: Tensor) -> Tensor:
    """Return the gradient penalty E (||grad D(x)|| - 1)^2, a scalar that can be differentiated.

    The norm is that of an example's full gradient (Gulrajani et al. 2017, arXiv:1704.00028, equation 3), not
    of one of its axes (D-26).

    Args:
        judge: the critic.
        real: images (N, C, H, W) in the critic's units.
        fake: as many images of the generator.
        along: how far x lies on the way from `real` to `fake`, (N, 1, 1, 1) in [0, 1].
    """
    x = torch.lerp(real, fake, along).detach().requires_grad_()
    (gradient,) = autograd.grad(judge(x).sum(), x, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    value: Tensor = (norms - 1).square().mean()
    return value


def critic_loss(judge: nn.Module, real: Tensor, fake: Tensor, along: Tensor, weight: float) -> Tensor:
    """Return E D(fake) - E D(real) + `weight` times the gradient penalty, a scalar.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, equation 3.

    Args:
        judge: the critic.
        real: images (N, C, H, W) in the critic's units.
        fake: as many images of the generator.
        along: where the penalty is taken, see `penalty`.
        weight: of the penalty, 0 or more.
    """
    # One pass for both: nothing in a critic joins images.
    of_real, of_fake = judge(torch.cat((real, fake))).split([len(real), len(fake)])
    gap: Tensor = of_fake.mean() - of_real.mean()
    return gap + weight * penalty(judge, real, fake, along)


@torch.no_grad()
def fused(network: nn.Module) -> nn.Module:
    """Return a generator in its evaluation form, for many passes: the same map with fewer layers.

    Batch normalisation is folded into the transposed convolution before it, and one on a single pixel is
    a matrix product.

    Args:
        network: the generator; one that is no chain of layers is returned as it is.
    """
    if not isinstance(network, nn.Sequential):
        return network
    layers: list[nn.Module] = []
    for layer in network:
        last = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(last, nn.ConvTranspose2d):
            layers[-1] = fuse_conv_bn_eval(last, layer, transpose=True)
        else:
            layers.append(layer)
    if len(layers) > 1 and isinstance(layers[0], nn.Unflatten) and isinstance(layers[1], nn.ConvTranspose2d):
        first = layers[1]
        side = first.kernel_size[0]
        assert first.bias is not None
        matrix = nn.Linear(first.in_channels, first.out_channels * side * side, device="meta")
        matrix.weight = nn.Parameter(first.weight.flatten(1).t().contiguous())
        matrix.bias = nn.Parameter(first.bias.repeat_interleave(side * side))
        layers[:2] = [matrix, Rows(first.out_channels, side)]
    return nn.Sequential(*layers).eval().requires_grad_(False)

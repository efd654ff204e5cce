"""The networks of Chen, Xie and Zhu's supplement, on 32x32 images: of a GAN, and of autoencoders.

Generator and decoder are one stack, critic and encoder another.
"""

from torch import nn

from defenses.nets.common import scaled_width
from defenses.nets.defensegan.deconvolution import Deconvolution

SIDE = 32
"""Of the images: of a side of 28, three convolutions of stride 2 leave 3, too little for the last kernel."""


def decoder(latent: int, channels: int, width: float = 1.0) -> nn.Sequential:
    """Build a network of latents (N, latent) to images (N, channels, 32, 32) in [-1, 1].

    Transposed convolutions 1 -> 4 -> 8 -> 16 -> 32, each but the last with batch normalisation and a
    ReLU, and a tanh.

    Args:
        latent: dimensions of a latent, 1 or more.
        channels: channels of the images.
        width: factor of the channels 1024, 512 and 256, above 0.
    """
    first, second, third = (scaled_width(each, width) for each in (1024, 512, 256))
    return nn.Sequential(
        nn.Unflatten(1, (latent, 1, 1)),
        nn.ConvTranspose2d(latent, first, 4),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.ConvTranspose2d(first, second, 4, stride=2, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.ConvTranspose2d(second, third, 4, stride=2, padding=1),
        nn.BatchNorm2d(third),
        nn.ReLU(),
        Deconvolution(third, channels, 4),
        nn.Tanh(),
    )


def encoder(channels: int, outputs: int, width: float = 1.0) -> nn.Sequential:
    """Build a network of images (N, channels, 32, 32) to (N, outputs).

    Convolutions 32 -> 16 -> 8 -> 4 -> 1, each with a leaky ReLU (0.2) and without batch normalisation,
    then a fully connected layer.

    Args:
        channels: channels of the images.
        outputs: 1 for a critic, the latent's dimensions for an encoder.
        width: factor of the channels 256, 512, 1024 and 128, above 0.
    """
    first, second, third, fourth = (scaled_width(each, width) for each in (256, 512, 1024, 128))
    return nn.Sequential(
        nn.Conv2d(channels, first, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(second, third, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(third, fourth, 4),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(fourth, outputs),
    )

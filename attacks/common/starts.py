"""Random points to start from."""

import torch
from torch import Tensor

from bench import Images, Norm, Randomness, lengths


def surface(x: Images, norm: Norm, noise: Randomness) -> Tensor:
    """Return a random move of length 1 for each image (Croce and Hein 2020, arXiv:2003.01690).

    Args:
        x: The images (N, C, H, W).
        norm: In linf the move is drawn from the cube, else from a normal distribution, and stretched to the
            surface of the unit ball.
        noise: Draws of each image's own.

    Returns:
        (N, C, H, W).
    """
    shape = tuple(x.shape[1:])
    move = noise.uniform(shape, -1, 1) if norm == "linf" else noise.normal(shape)
    return move / lengths(move, norm).clamp_min(torch.finfo(move.dtype).tiny)[:, None, None, None]

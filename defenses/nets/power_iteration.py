"""Power iteration: how sharply a function curves, from products of its Hessian with vectors alone."""

import torch
from torch import Tensor, autograd


def largest_curvature(slope: Tensor, z: Tensor, start: Tensor, *, turns: int) -> Tensor:
    """Return, for each row, the Hessian's largest eigenvalue in size, or a little less.

    It is the length of the Hessian times a unit vector, after some turns of making a vector of it.

    Args:
        slope: The gradient of a sum over rows, (N, ...), with its graph, which is kept.
        z: What it is the gradient to, (N, ...).
        start: The vectors to start from, (N, ...).
        turns: How many turns are made, one more aside: the first makes the start a direction.

    Returns:
        (N,), at least 0.
    """
    vector = start
    length: Tensor = torch.linalg.vector_norm(vector.flatten(1), dim=1)
    for _ in range(turns + 1):
        unit = length.clamp_min(torch.finfo(length.dtype).tiny).view(-1, *[1] * (z.dim() - 1))
        (vector,) = autograd.grad(slope, z, vector / unit, retain_graph=True)
        length = torch.linalg.vector_norm(vector.flatten(1), dim=1)
    return length

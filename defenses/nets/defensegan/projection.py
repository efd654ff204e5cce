"""Projection on the range of a generator: the latent that explains an image best, by gradient descent."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, autograd, nn

from bench import Images
from defenses.nets.power_iteration import largest_curvature

ROWS = {"cpu": 64, "cuda": 5120}
"""Points (an image and a restart each) that pass the generator at once. They bound the memory and change no
result; on a CPU, few enough that what a layer leaves is still near when the next one wants it."""

ROUNDING = 1e-6
"""How far a mean squared error may end above its start and still count as rounding."""

Keep = Literal["best", "released"]


class Descent(NamedTuple):
    """How a latent is sought: `steps` of gradient descent with `momentum`."""

    steps: int = 200
    lr: float = 10.0
    momentum: float = 0.7
    decay: bool = False
    """A tenth of `lr` for the last fifth of the steps: configured, but inactive, as released (D-28)."""
    keep: Keep = "best"


class Projection(NamedTuple):
    """What a projection found for each image."""

    latent: Tensor
    """(N, d), never NaN where images and starts are not."""
    error: Tensor
    """(N,): the mean squared error of the image it draws, over pixels, in [0, 1] units."""
    diverged: Tensor
    """bool (N, R): restarts that ended higher than they began, or not finite."""


def project(
    generator: nn.Module, x: Images, starts: Tensor, descent: Descent, *, rows: int | None = None
) -> Projection:
    """Return, for images (N, C, H, W), the best latent of all restarts from `starts` (N, R, d).

    Source: Samangouei et al. 2018, arXiv:1805.06605, equation 5, and the released code. Each restart descends
    its own image's squared error. With D = C H W,

        L(z) = sum over images i and restarts r of mean over pixels of (G(z_ir) - x_i)^2
        v <- momentum v + dL/dz,   z <- z - lr v

    is what the released code does. The mean over pixels makes the step on ||G(z) - x||^2 one of lr / D; the
    sum over images and restarts makes the gradient of z_ir its own mean squared error's and nothing else's
    (a mean over N R of them would divide every step by N R). So all restarts of all images are rows of
    one batch, and whose company a row is in does not matter. Near a solution it is stable while
    lr (2 / D) s^2 < 2 (1 + momentum), where s is the largest singular value of G's Jacobian.

    `keep` of the descent: ``best`` is the best point of all `steps` + 1, the start and the end included.
    ``released`` is, as in the released code, each restart's point before its last step, and of these the
    best; a restart that is not finite there stands with its best point.

    Args:
        generator: latents (M, d) to images (M, C, H, W); it must not change with a call (evaluation mode),
            and its parameters want no gradient.
        x: images (N, C, H, W) in [0, 1].
        starts: where the descents begin, (N, R, d).
        descent: steps, rate, momentum and which point is kept.
        rows: points that pass the generator at once; None takes what `ROWS` says for the device.
    """
    restarts = starts.shape[1]
    points = starts.flatten(0, 1)
    owners = torch.arange(len(x), device=x.device).repeat_interleave(restarts)
    size = rows or ROWS.get(x.device.type, ROWS["cuda"])
    found = [
        _descend(generator, x[whose], z, descent)
        for z, whose in zip(points.split(size), owners.split(size), strict=True)
    ]
    latent, error, diverged = (
        torch.cat(each).unflatten(0, (-1, restarts)) for each in zip(*found, strict=True)
    )
    choice = error.argmin(1)
    image = torch.arange(len(x), device=x.device)
    return Projection(latent[image, choice], error[image, choice], diverged)


def _descend(generator: nn.Module, x: Images, z: Tensor, descent: Descent) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents (M, d) kept of rows, their errors (M,) and which rows diverged (M,)."""
    pixels = x[0].numel()
    velocity = torch.zeros_like(z)
    best, least = z, torch.full((len(z),), torch.inf, dtype=z.dtype, device=z.device)
    first = error = before = least
    last = z
    for step in range(descent.steps + 1):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            drawn = generator(z)
        difference = drawn.detach() - x
        before, error = error, difference.square().flatten(1).sum(1) / pixels
        first = error if step == 0 else first
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[:, None], z.detach(), best)
        if step == descent.steps:
            break
        (gradient,) = autograd.grad(drawn, z, difference.mul_(2 / pixels))
        last, z = z.detach(), z.detach()
        lr = descent.lr * (0.1 if descent.decay and step >= 0.8 * descent.steps else 1)
        velocity = torch.add(gradient, velocity, alpha=descent.momentum)
        z = torch.sub(z, velocity, alpha=lr)
    diverged = ~(error <= first + ROUNDING)
    if descent.keep == "released":
        finite = before.isfinite()
        best, least = torch.where(finite[:, None], last, best), torch.where(finite, before, least)
    return best, least, diverged


def curvature(generator: nn.Module, z: Tensor, x: Images, *, turns: int = 10) -> Tensor:
    """Return, for each row, how sharply ||G(z) - x||^2 curves: the Hessian's largest eigenvalue, (N,).

    By power iteration: the length of the Hessian times a unit vector, which after `turns` turns is the
    largest eigenvalue in size, or a little less. Every row starts from the same vector.

    Args:
        generator: latents (N, d) to images (N, C, H, W).
        z: latents (N, d).
        x: images (N, C, H, W) in [0, 1].
        turns: turns of the power iteration, 0 or more.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(z.shape[1], generator=draw).to(z).expand_as(z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        energy = (generator(z) - x.detach()).square().sum()
        (slope,) = autograd.grad(energy, z, create_graph=True)
    return largest_curvature(slope, z, start, turns=turns)


def backtrack(generator: nn.Module, z: Tensor, x: Images, *, steps: int, rate: Tensor) -> Tensor:
    """Return z after `steps` steps z - rate grad ||G(z) - x||^2, with their gradient to x.

    Chen, Xie and Zhu, theorem 1. With z a solution at x it stays about there, and carries the first
    `steps` terms of dz/dx = sum over t = 0, 1, ... of B A^t, where A = I - rate H (D-37) and energies are
    squared norms (D-38).

    Args:
        generator: latents (N, d) to images (N, C, H, W).
        z: latents (N, d), at which the descent begins.
        x: images (N, C, H, W) in [0, 1].
        steps: number of steps, 0 or more.
        rate: of each image's steps on ||G(z) - x||^2, (N,).
    """
    graph = torch.is_grad_enabled()
    for _ in range(steps):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = (generator(z) - x).square().sum()
            (gradient,) = autograd.grad(energy, z, create_graph=graph)
        z = z - rate[:, None] * gradient
        if not graph:
            z = z.detach()
    return z

"""Natural evolution strategies (Ilyas et al. 2018, arXiv:1804.08598) on the objective of Chen, Xie and Zhu
(supplement, eq. 20): the search of `bpda-cw` on a gradient that is estimated from scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attacks.common.signed_penalty import Schedule, SignedSearch, lacks
from bench import (
    Count,
    Crafted,
    Images,
    InputError,
    Labels,
    NonNegative,
    Positive,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
)


def _check_params(params: dict[str, Any], shape: Shape) -> None:
    if params["samples"] % 2:
        raise InputError(f"samples come in pairs: their number must be even, not {params['samples']}")


def cost(*, samples: int, steps: int, searches: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        samples: How many probes each gradient takes.
        steps: How many steps each descent takes.
        searches: How many descents there are.
    """
    return 1 + searches * (steps * (samples + 1) + 1)


@attack(
    "nes",
    norms={"l2"},
    version=1,
    access="score",
    kind="minimum-norm",
    check_params=_check_params,
    cost=cost,
)
def nes(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    samples: Count = 50,
    sigma: Positive = 0.25,
    steps: Count = 500,
    step_size: Positive = 0.02,
    schedule: Schedule = "growing",
    searches: Count = 5,
    weight: Positive = 0.25,
    kappa: NonNegative = 0.0,
) -> Crafted:
    """Go down |z - x|^2 + lambda F as `bpda-cw` does, on gradients of F that are estimated from probes.

    Probes come in pairs, a normal draw and its opposite, and may leave the box. The printed deviation of 0.5
    is 0.25 here if it is meant for images in [-1, 1].

    Args:
        view: What the attack looks through; its logits are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        samples: How many probes each gradient takes, an even number.
        sigma: The standard deviation of the probes (D-35), in units of [0, 1].
        steps: How many steps each descent takes.
        step_size: The full length of a step, in units of [0, 1].
        schedule: ``growing``: steps grow to the full length, as printed; ``falling``: they fall from it
            (D-34).
        searches: How many descents there are: lambda is found for each example by a binary search.
        weight: The first lambda.
        kappa: The wanted margin, in units of the logits.

    Returns:
        The nearest success of each image, else the image, with the notes ``failed``, ``flat``, where the
        first estimate was exactly zero, and ``nonfinite``, where one was not finite.
    """

    def slope(here: View, z: Images, labels: Labels, draws: Randomness) -> tuple[Tensor, Tensor]:
        def lacking(points: Images) -> Tensor:
            return lacks(here, here.logits(points), labels, kappa)[0]

        with torch.no_grad():
            _, won = lacks(here, here.logits(z), labels, kappa)
            return estimate(lacking, z, draws, samples=samples, sigma=sigma), won

    search = SignedSearch(
        steps=steps, step_size=step_size, schedule=schedule, searches=searches, weight=weight, kappa=kappa
    )
    return search.run(view, x, y, threat, noise, slope)


def estimate(
    loss: Callable[[Images], Tensor], z: Images, noise: Randomness, *, samples: int, sigma: float
) -> Tensor:
    """Return an estimate of a loss's gradient, made of probes: the mean of L(z + sigma u) u / sigma.

    Normal draws u come with their opposites.

    Args:
        loss: Answers (copies * N,) to points (copies * N, C, H, W) that come copy after copy.
        z: Where the gradient is wanted, (N, C, H, W).
        noise: Draws of each example's own.
        samples: How many probes are made, an even number.
        sigma: Their standard deviation, in units of [0, 1].

    Returns:
        (N, C, H, W).
    """
    total = torch.zeros_like(z).flatten(1)
    # Bounds memory; by nothing but the size of an image, so that company changes no draw.
    together = max(1, 2**14 // z[0].numel())
    for left in range(samples // 2, 0, -together):
        ways = noise.normal((min(left, together), *z.shape[1:]))  # (N, pairs, C, H, W)
        across = sigma * ways.transpose(0, 1)
        probes = torch.stack([z + across, z - across])
        up, down = loss(probes.flatten(0, 2)).view(2, -1, len(z))
        total += ((up - down).T.unsqueeze(1) @ ways.flatten(2)).squeeze(1)
    return total.view_as(z) / (samples * sigma)

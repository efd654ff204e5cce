"""Natural evolution strategies (Ilyas et al. 2018, arXiv:1804.08598) on the objective of Chen, Xie and Zhu
(supplement, eq. 20): the search of `bpda-cw` on a gradient that is estimated from scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attacks.common.signed_penalty import Schedule, shortfall_and_success, signed_descent
from bench import Crafted, Images, InputError, Labels, Randomness, Shape, Threat, View, attack


def _check(params: dict[str, Any], shape: Shape) -> None:
    signed_penalty.check(params)
    if params["samples"] < 2 or params["samples"] % 2:
        raise InputError(f"samples come in pairs: their number must be even, not {params['samples']}")
    if not params["sigma"] > 0:
        raise InputError(f"sigma must be above 0, not {params['sigma']:g}")


@attack("nes", norms={"l2"}, version=1, access="score", budget="distance", check_params=_check)
def nes(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    samples: int = 50,
    sigma: float = 0.25,
    steps: int = 500,
    step: float = 0.02,
    schedule: Schedule = "growing",
    searches: int = 5,
    weight: float = 0.25,
    kappa: float = 0.0,
) -> Crafted:
    """Go down |z - x|^2 + lambda F as `bpda-cw` does; each gradient of F is estimated from `samples` probes.

    They come in pairs, a normal draw of standard deviation `sigma` (D-35) and its opposite, and may
    leave the box. The printed 0.5 is 0.25 here if it is meant for images in [-1, 1].

    Notes: ``failed``, ``flat``, where the first estimate was exactly zero, and ``nonfinite``.
    """

    def ask(here: View, z: Images, labels: Labels, draws: Randomness) -> tuple[Tensor, Tensor]:
        def lack(points: Images) -> Tensor:
            return shortfall_and_success(here, here.logits(points), labels, kappa)[0]

        with torch.no_grad():
            _, won = shortfall_and_success(here, here.logits(z), labels, kappa)
            return estimate(lack, z, draws, samples=samples, sigma=sigma), won

    return signed_descent(
        view,
        x,
        y,
        threat,
        noise,
        ask,
        steps=steps,
        step=step,
        schedule=schedule,
        searches=searches,
        weight=weight,
        kappa=kappa,
    )


def estimate(
    loss: Callable[[Images], Tensor], z: Images, noise: Randomness, *, samples: int, sigma: float
) -> Tensor:
    """Return the gradient of `loss` at `z`, (N, C, H, W), without asking for one.

    The mean over the `samples` of L(z + sigma u) u / sigma, where normal draws u come with their
    opposites. `loss` answers (copies * N,) to points that come copy after copy.
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

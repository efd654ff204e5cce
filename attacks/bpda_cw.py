"""The attack of Chen, Xie and Zhu on Defense-GAN with the gradient of its identity (supplement, eq. 21).

It looks through any view of pixels; through one that differentiates its defense as the identity
(``bpda``), this is backward pass differentiable approximation (Athalye et al. 2018, arXiv:1802.00420).
"""

from typing import Any

import torch
from torch import Tensor, autograd

from attacks.common.signed_penalty import Schedule, shortfall_and_success, signed_descent
from bench import Crafted, Images, Labels, Randomness, Shape, Threat, View, attack


def _check(params: dict[str, Any], shape: Shape) -> None:
    signed_penalty.check(params)


@attack("bpda-cw", norms={"l2"}, version=1, budget="distance", check_params=_check)
def bpda_cw(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 500,
    step: float = 0.02,
    schedule: Schedule = "growing",
    searches: int = 5,
    weight: float = 0.25,
    kappa: float = 0.0,
) -> Crafted:
    """Go down |z - x|^2 + lambda F in `steps` signed steps, F being how far the margin is below `kappa`.

    Steps grow to `step` as printed, or fall from it (D-34). lambda starts at `weight` and is found for
    each example by `searches` of a binary search. The printed 0.04, and a `weight` of 1, are 0.02 and
    0.25 here if they are meant for images in [-1, 1].

    Notes: ``failed``, ``flat``, where the first gradient was exactly zero, and ``nonfinite``.
    """

    def ask(here: View, z: Images, labels: Labels, _: Randomness) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            lack, won = shortfall_and_success(here, here.logits(z), labels, kappa)
        return autograd.grad(lack.sum(), z)[0], won

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

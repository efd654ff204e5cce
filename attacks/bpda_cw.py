"""The attack of Chen, Xie and Zhu on Defense-GAN with the gradient of its identity (supplement, eq. 21).

It looks through any view of pixels; through one that differentiates its defense as the identity
(``bpda``), this is backward pass differentiable approximation (Athalye et al. 2018, arXiv:1802.00420).
"""

import torch
from torch import Tensor, autograd

from attacks.common.signed_penalty import Schedule, SignedSearch, lacks
from bench import Count, Crafted, Images, Labels, NonNegative, Positive, Randomness, Threat, View, attack


@attack("bpda-cw", norms={"l2"}, version=1, kind="minimum-norm")
def bpda_cw(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 500,
    step_size: Positive = 0.02,
    schedule: Schedule = "growing",
    searches: Count = 5,
    weight: Positive = 0.25,
    kappa: NonNegative = 0.0,
) -> Crafted:
    """Go down |z - x|^2 + lambda F by signed steps, F being how far the margin is below what is wanted.

    The printed step of 0.04, and a `weight` of 1, are 0.02 and 0.25 here if they are meant for images in
    [-1, 1].

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        steps: How many steps each descent takes.
        step_size: The full length of a step, in units of [0, 1].
        schedule: ``growing``: steps grow to the full length, as printed; ``falling``: they fall from it
            (D-34).
        searches: How many descents there are: lambda is found for each example by a binary search.
        weight: The first lambda.
        kappa: The wanted margin, in units of the logits.

    Returns:
        The nearest success of each image, else the image, with the notes ``failed``, ``flat``, where the
        first gradient was exactly zero, and ``nonfinite``, where one was not finite.
    """

    def slope(here: View, z: Images, labels: Labels, _: Randomness) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            lacking, won = lacks(here, here.logits(z), labels, kappa)
        return autograd.grad(lacking.sum(), z)[0], won

    search = SignedSearch(
        steps=steps, step_size=step_size, schedule=schedule, searches=searches, weight=weight, kappa=kappa
    )
    return search.run(view, x, y, threat, noise, slope)

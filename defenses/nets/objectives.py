"""What plain classifiers are trained for: clean images, attacked ones (Madry et al.), or both (TRADES)."""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, autograd, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from bench import Attack, Images, Labels, Randomness, Threat
from defenses.nets.training import Mode, Objective, attacked, frozen

NOISE = 0.001
"""Standard deviation of the Gaussian start, in [0, 1] units."""

Start: TypeAlias = Literal["gaussian", "uniform"]


class Ascent(NamedTuple):
    """How TRADES looks for a point at which the prediction differs: by signed steps up the divergence."""

    threat: Threat
    """The linf ball around the clean image that steps are projected on."""
    steps: int
    """Number of steps, 0 or more."""
    step_size: float
    """Length of a step, in [0, 1] units of the images."""
    start: Start
    """``gaussian``: x plus 0.001 N(0, 1), which as released is not projected; ``uniform``: in the ball."""
    mode: Mode = "eval"
    """Mode of batch normalisation and dropout meanwhile."""


def standard(network: nn.Module) -> Objective:
    """Return the objective of standard training, the cross-entropy of the images as they come.

    Args:
        network: images (N, C, H, W) to logits (N, K).
    """
    return lambda x, y, noise: cross_entropy(network(x), y)


def madry(network: nn.Module, attack: Attack, threat: Threat, *, mode: Mode) -> Objective:
    """Return the cross-entropy of attacked images alone (Madry et al. 2018, arXiv:1706.06083, equation 2.1).

    Args:
        network: images (N, C, H, W) to logits (N, K).
        attack: makes the images; no gradient flows through what it makes.
        threat: norm and radius of the attack.
        mode: mode of batch normalisation and dropout while the network is attacked.
    """

    def loss(x: Images, z: Images | None, y: Labels) -> Tensor:
        return cross_entropy(network(x if z is None else z), y)

    return attacked(network, loss, attack, threat, mode=mode)


def trades(
    network: nn.Module,
    ascent: Ascent,
    *,
    beta: float,
    detach_target: bool,
    clean_forwards: Literal[1, 2],
) -> Objective:
    """Return CE(x) + beta · mean KL(p(x) || p(x')) (Zhang et al. 2019, arXiv:1901.08573, equation 5).

    Args:
        network: images (N, C, H, W) to logits (N, K).
        ascent: how x' is found, see `ascend`.
        beta: weight of the divergence, 0 or more.
        detach_target: hold p(x) of the divergence fixed.
        clean_forwards: with 2, the divergence has a forward pass of the clean images to itself, after that
            of x': it moves running statistics once more, and drops other units out.
    """

    def objective(x: Images, y: Labels, noise: Randomness) -> Tensor:
        z = ascend(network, x, noise, ascent)
        clean = network(x)
        other = network(z)
        target = network(x) if clean_forwards == 2 else clean
        if detach_target:
            target = target.detach()
        return cross_entropy(clean, y) + beta * divergence(target, other).mean()

    return objective


def ascend(network: nn.Module, x: Images, noise: Randomness, ascent: Ascent) -> Images:
    """Return points of the ball at which KL(p(x) || p(x')) is large, by projected signed steps.

    The prediction of x is made once: the released code makes it anew in every step, and without dropout and
    running statistics it is the same.

    Args:
        network: images (N, C, H, W) to logits (N, K).
        x: the clean images (N, C, H, W) in [0, 1].
        noise: draws for these images.
        ascent: ball, steps and start.

    Returns:
        Images (N, C, H, W), in the ball and the box but for a Gaussian start without a step.
    """
    shape, threat = tuple(x.shape[1:]), ascent.threat
    if ascent.start == "gaussian":
        z = x + NOISE * noise.normal(shape)
    else:
        z = threat.project(x, x + noise.uniform(shape, -threat.radius, threat.radius))
    with frozen(network, ascent.mode):
        with torch.no_grad():
            target = network(x)
        for _ in range(ascent.steps):
            with torch.enable_grad():
                z.requires_grad_()
                # Summed, not averaged: an image's steps do not depend on how many there are.
                (gradient,) = autograd.grad(divergence(target, network(z)).sum(), z)
            z = threat.project(x, z.detach() + ascent.step_size * gradient.sign())
    return z


def divergence(target: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(other)) of each row, (N,) in nats.

    Value and gradients are exact however far a class leads, where those of softmaxes end with the digits of
    1. With equal logits the value and the gradient to `other` are zero to the last bit, as on paper: what
    is left by rounding would steer a signed step as well as anything.

    Args:
        target: logits (N, K) of the first distribution.
        other: logits (N, K) of the second.
    """
    found: Tensor = _Divergence.apply(target, other)
    return found


class _Divergence(autograd.Function):
    """The divergence with its gradients written out: p (log p/q - KL) to the target, q - p to the other."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, other: Tensor) -> Tensor:
        below, beside = (each.double() - each.amax(1, keepdim=True).double() for each in (target, other))
        # Differences first, sums after: what many digits of two probabilities share is in neither.
        gap = torch.where(below == beside, 0.0, below - beside)
        total = below.exp().sum(1, keepdim=True)
        shift = (_grown(below, beside, gap).sum(1, keepdim=True) / total).log1p()
        p, q = below - total.log(), beside - total.log() - shift
        apart = gap + shift
        to_other = _grown(p, q, apart)
        # A class that the target does not have weighs nothing.
        ratio = apart.masked_fill(p.isneginf(), 0.0)
        # The differences add up to 0: with them no term is below 0, and small ones keep their digits.
        value = (p.exp() * ratio + to_other).sum(1)
        to_target = p.exp() * (ratio - value[:, None])
        # The leader's is what the others' add up to: its own terms are larger than their difference.
        leader = target.argmax(1, keepdim=True)
        for slope in (to_target, to_other):
            slope.scatter_(1, leader, 0.0).scatter_(1, leader, -slope.sum(1, keepdim=True))
        ctx.save_for_backward(to_target.to(target.dtype), to_other.to(other.dtype))
        return value.to(target.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        to_target, to_other = ctx.saved_tensors
        return gradient[:, None] * to_target, gradient[:, None] * to_other


def _grown(low: Tensor, high: Tensor, gap: Tensor) -> Tensor:
    """Return exp(high) - exp(low), of which `gap` is low - high."""
    return torch.maximum(low, high).exp() * gap.sign() * torch.expm1(-gap.abs())

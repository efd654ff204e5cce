"""What plain classifiers are trained for: clean images, attacked ones (Madry et al.), or both (TRADES)."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, autograd, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from bench import Attack, Images, Labels, Randomness, Threat
from defenses.nets.training import Mode, Objective, attacked, frozen

NOISE = 0.001
"""Standard deviation of the Gaussian start, in [0, 1] units."""

Start: TypeAlias = Literal["gaussian", "uniform"]


def standard(network: nn.Module) -> Objective:
    """Return the cross-entropy of the images as they come."""
    return lambda x, y, noise: cross_entropy(network(x), y)


def madry(network: nn.Module, attack: Attack, threat: Threat, *, mode: Mode) -> Objective:
    """Return the cross-entropy of attacked images alone (Madry et al. 2018, arXiv:1706.06083).

    The network is in `mode` while it is attacked; no gradient flows through what the attack makes.
    """

    def loss(x: Images, z: Images | None, y: Labels) -> Tensor:
        return cross_entropy(network(x if z is None else z), y)

    return attacked(network, loss, attack, threat, mode=mode)


def trades(
    network: nn.Module,
    threat: Threat,
    *,
    beta: float,
    steps: int,
    step: float,
    start: Start,
    mode: Mode,
    detach_target: bool,
    clean_forwards: Literal[1, 2],
) -> Objective:
    """Return CE(x) + beta · mean KL(p(x) || p(x')) (Zhang et al. 2019, arXiv:1901.08573, equation 5).

    x' is `ascend`'s. With two `clean_forwards`, the divergence has a forward pass of the clean images to
    itself, after that of x': it moves running statistics once more, and drops other units out.
    """

    def objective(x: Images, y: Labels, noise: Randomness) -> Tensor:
        z = ascend(network, x, threat, noise, steps=steps, step=step, start=start, mode=mode)
        clean = network(x)
        other = network(z)
        target = network(x) if clean_forwards == 2 else clean
        if detach_target:
            target = target.detach()
        return cross_entropy(clean, y) + beta * divergence(target, other).mean()

    return objective


def ascend(
    network: nn.Module,
    x: Images,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int,
    step: float,
    start: Start,
    mode: Mode = "eval",
) -> Images:
    """Climb KL(p(x) || p(x')) by signed steps, each projected on the linf ball and the box.

    The start is x plus 0.001 N(0, 1), which as released is not projected, or a point drawn uniformly
    from the ball. The prediction of x is made once: the released code makes it anew in every step, and
    without dropout and running statistics it is the same.
    """
    shape = tuple(x.shape[1:])
    if start == "gaussian":
        z = x + NOISE * noise.normal(shape)
    else:
        z = threat.project(x, x + noise.uniform(shape, -threat.radius, threat.radius))
    with frozen(network, mode):
        with torch.no_grad():
            target = network(x)
        for _ in range(steps):
            with torch.enable_grad():
                z.requires_grad_()
                # Summed, not meant: an image's steps do not depend on how many there are.
                (gradient,) = autograd.grad(divergence(target, network(z)).sum(), z)
            z = threat.project(x, z.detach() + step * gradient.sign())
    return z


def divergence(target: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(other)) of logits (N, K): (N,).

    Value and gradients are exact however far a class leads, where those of softmaxes end with the digits of
    1; with equal logits the value and the gradient to `other` are zero to the last bit, as on paper: what
    is left by rounding would steer a signed step as well as anything.
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

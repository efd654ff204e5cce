"""Simultaneous perturbation stochastic approximation (Uesato et al. 2018, arXiv:1802.05666).

Two attacks on one estimate, in one file for it: `spsa`, strong enough to be a control for masked gradients,
and `spsa-released`, the settings of the CNN-F code (D-12). They are two names, not one with an option,
because the second draws its directions for a whole shard: whose stream an attack draws from decides
how its work may be cut, and is known before its parameters are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.common.best_so_far import BestIterate, finite
from attacks.common.flags import unreachable
from attacks.common.optimisers import Adam
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    Loss,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    lengths,
    objective,
    succeeded,
)


def _flags(threat: Threat, *, steps: int, lr: float, **_: object) -> str | None:
    # Adam's steps are hardly ever longer than its learning rate.
    return unreachable(threat, steps, lr)


def cost(*, steps: int, samples: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        steps: How many steps it takes.
        samples: How many pairs of probes each of them takes.
    """
    return 1 + steps * (2 * samples + 1)


@attack("spsa", norms={"linf"}, version=1, access="score", flags=_flags, cost=cost)
def spsa(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 100,
    samples: Count = 128,
    delta: Positive = 0.01,
    lr: Positive = 0.01,
    loss: Loss = "margin",
) -> Crafted:
    """Climb a loss by Adam, on gradients that are estimated from pairs of probes.

    Each image has directions of its own, and probes stay in the box. Where winning here is winning
    (``view.exact``), an example is dropped at its first adversarial iterate; otherwise the iterate with
    the highest loss is kept.

    Args:
        view: What the attack looks through; its logits are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps are taken; 100 in the paper.
        samples: How many pairs of probes each gradient takes.
        delta: How far a probe is from the iterate, in units of [0, 1]; 0.01 in the paper.
        lr: Adam's learning rate, in units of [0, 1]; 0.01 in the paper.
        loss: What is climbed, as in `bench.objective`; the margin in the paper.

    Returns:
        The images, in the ball and the box, with the note ``flat``, where the first estimate was exactly
        zero.
    """
    rows, best = torch.arange(len(x), device=x.device), BestIterate(x)
    flat = torch.zeros_like(best.won)
    clean, z, adam = x, x, Adam(x, lr)
    first = torch.ones_like(x[:, 0, 0, 0])
    for t in range(steps + 1):
        with torch.no_grad():
            logits = view.logits(z)
        won = succeeded(view, logits, y) & view.exact
        best.offer(rows, z, objective(view, logits, y, loss), won)
        if view.exact and len(standing := (~won).nonzero().squeeze(1)) < len(rows):
            rows, view, noise, y = rows[standing], view.select(standing), noise.select(standing), y[standing]
            clean, z, adam = clean[standing], z[standing], adam.select(standing)
        if t == steps or len(rows) == 0:
            break
        gradient = estimate(_asked(view, y, loss), z, noise, samples=samples, delta=delta, box=True)
        if t == 0:
            peak = lengths(gradient, "linf")
            flat[rows] = peak == 0
            first[rows] = torch.where(peak == 0, 1.0, peak.clamp_min(torch.finfo(peak.dtype).tiny))
        # In units of the first: Adam's steps do not depend on the scale, but for the 1e-8 that it adds, in
        # which the cross-entropy's gradient would be lost where the truth leads.
        z = threat.project(clean, z + adam.step(gradient / first[rows][:, None, None, None]))
    return Crafted(best.images, {"flat": flat})


@attack(
    "spsa-released",
    norms={"linf"},
    version=1,
    access="score",
    rng="shard",
    flags=_flags,
    cost=cost,
)
def spsa_released(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 7,
    samples: Count = 128,
    delta: Positive = 0.005,
    lr: Positive = 0.005,
    loss: Loss = "ce",
) -> Crafted:
    """Climb as the CNN-F code does: directions shared by the shard, probes out of the box, the last iterate.

    The code's 0.01 for `delta` and `lr` are in units of [-1, 1], hence half of that here; it cuts shards of
    64.

    Args:
        view: What the attack looks through; its logits are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws that the whole shard shares.
        steps: How many steps are taken.
        samples: How many pairs of probes each gradient takes.
        delta: How far a probe is from the iterate, in units of [0, 1].
        lr: Adam's learning rate, in units of [0, 1].
        loss: What is climbed, as in `bench.objective`.

    Returns:
        The images, in the ball and the box, with the note ``flat``, where the first estimate was exactly
        zero.
    """
    flat = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    directions, z, adam, asked = noise.shared(), x, Adam(x, lr), _asked(view, y, loss)
    for t in range(steps):
        gradient = estimate(asked, z, directions, samples=samples, delta=delta, box=False)
        if t == 0:
            flat = (gradient == 0).flatten(1).all(1)
        z = threat.project(x, z + adam.step(gradient))
    return Crafted(z, {"flat": flat})


def _asked(view: View, y: Labels, loss: Loss) -> Callable[[Images], Tensor]:
    """Return the loss of points (copies * N, C, H, W), (copies * N,)."""

    def asked(points: Images) -> Tensor:
        return objective(view, view.logits(points), y, loss)

    return asked


def estimate(
    loss: Callable[[Images], Tensor],
    z: Images,
    noise: Randomness,
    *,
    samples: int,
    delta: float,
    box: bool,
) -> Tensor:
    """Return an estimate of a loss's gradient, made of pairs of probes (Spall 1992, doi:10.1109/9.119632).

    It is the mean over random signs v of (L(z + delta v) - L(z - delta v)) / (2 delta) v.

    Args:
        loss: Answers (copies * N,) to points (copies * N, C, H, W) that come copy after copy.
        z: Where the gradient is wanted, (N, C, H, W).
        noise: Draws of each example's own, or of the shard.
        samples: How many pairs of probes are made.
        delta: How far a probe is from `z`, in units of [0, 1].
        box: Whether probes are clipped to [0, 1] and 2 delta is the way that is left to each pixel, so that
            the estimate stays without bias on a linear loss.

    Returns:
        (N, C, H, W), with 0 where it is not finite.
    """
    below, above = z - delta, z + delta
    if box:
        below, above = below.clamp(0, 1), above.clamp(0, 1)
    middle, way = (above + below) / 2, above - below
    total = torch.zeros_like(z).flatten(1)
    # Bounds memory; by nothing but the size of an image, so that company changes no draw.
    together = max(1, 2**14 // z[0].numel())
    for left in range(samples, 0, -together):
        signs = noise.signs((min(left, together), *z.shape[1:]))  # (N, or 1 for all, pairs, C, H, W)
        probes = torch.empty(2, signs.shape[1], *z.shape, dtype=z.dtype, device=z.device)
        for side, value in zip(probes, (0.5, -0.5), strict=True):
            torch.addcmul(middle, way, signs.transpose(0, 1), value=value, out=side)
        if box:
            probes.clamp_(0, 1)  # Rounding may pass a side by its last bit.
        with torch.no_grad():
            up, down = loss(probes.flatten(0, 2)).view(2, -1, len(z))
        total += ((up - down).T.unsqueeze(1) @ signs.flatten(2)).squeeze(1)
    return finite(total.view_as(z) / (samples * way))

"""Simultaneous perturbation stochastic approximation (Uesato et al. 2018, arXiv:1802.05666).

Two attacks on one estimate: `spsa`, strong enough to be a control for masked gradients, and
`spsa-released`, the settings of the CNN-F code (D-12). They are two names, not one with an option,
because the second draws its directions for a whole shard: whose stream an attack draws from decides
how its work may be cut, and is known before its parameters are.
"""

import math
from typing import Any

import torch
from torch import Tensor

from attacks.common.optimisers import Adam
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Loss,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    lengths,
    objective,
    succeeded,
)


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "samples"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    for name in ("delta", "lr"):
        if not params[name] > 0:
            raise InputError(f"{name} must be above 0, not {params[name]:g}")


def _doubts(threat: Threat, *, steps: int, lr: float, **_: object) -> str | None:
    # Adam's steps are hardly ever longer than its learning rate.
    if (reach := steps * lr) < threat.radius:
        return f"{steps} steps of {lr:g} reach {reach:g}, less than the radius {threat.radius:g}"
    return None


@attack("spsa", norms={"linf"}, version=1, access="score", doubts=_doubts, check_params=_check)
def spsa(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 100,
    samples: int = 128,
    delta: float = 0.01,
    lr: float = 0.01,
    loss: Loss = "margin",
) -> Crafted:
    """Climb `loss` by Adam, on gradients estimated from `samples` pairs of probes `delta` to either side.

    Each image has directions of its own, and probes stay in the box. Where winning here is winning
    (``view.final``), an example is dropped at its first adversarial iterate; otherwise the iterate with
    the highest loss is kept. Note: ``flat``, where the first estimate was exactly zero.
    """
    rows = torch.arange(len(x), device=x.device)
    images, flat = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    highest = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    clean, z, adam = x, x, Adam(x, lr)
    first = torch.ones_like(x[:, 0, 0, 0])
    for t in range(steps + 1):
        with torch.no_grad():
            logits = view.logits(z)
        losses = objective(view, logits, y, loss).double()
        won = succeeded(view, logits, y) & view.final
        better = won | (losses > highest[rows])
        images[rows] = torch.where(better[:, None, None, None], z, images[rows])
        highest[rows] = torch.where(better, losses, highest[rows])
        if view.final and len(standing := (~won).nonzero().squeeze(1)) < len(rows):
            rows, view, noise, y = rows[standing], view.take(standing), noise.take(standing), y[standing]
            clean, z, adam = clean[standing], z[standing], adam.take(standing)
        if t == steps or len(rows) == 0:
            break
        gradient = estimate(view, z, y, noise, samples=samples, delta=delta, loss=loss, box=True)
        if t == 0:
            peak = lengths(gradient, "linf")
            flat[rows] = peak == 0
            first[rows] = torch.where(peak == 0, 1.0, peak.clamp_min(torch.finfo(peak.dtype).tiny))
        # In units of the first: Adam's steps do not depend on the scale, but for the 1e-8 that it adds, in
        # which the cross-entropy's gradient would be lost where the truth leads.
        z = threat.project(clean, z + adam.step(gradient / first[rows][:, None, None, None]))
    return Crafted(images, {"flat": flat})


@attack(
    "spsa-released",
    norms={"linf"},
    version=1,
    access="score",
    keyed="shard",
    doubts=_doubts,
    check_params=_check,
)
def spsa_released(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 7,
    samples: int = 128,
    delta: float = 0.005,
    lr: float = 0.005,
    loss: Loss = "ce",
) -> Crafted:
    """Climb as the CNN-F code does: directions shared by the shard, probes out of the box, the last iterate.

    Its 0.01 for `delta` and `lr` are in units of [-1, 1], hence half of that here; it cuts shards of 64.
    Note: ``flat``, where the first estimate was exactly zero.
    """
    flat = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    directions, z, adam = noise.shared(), x, Adam(x, lr)
    for t in range(steps):
        gradient = estimate(view, z, y, directions, samples=samples, delta=delta, loss=loss, box=False)
        if t == 0:
            flat = (gradient == 0).flatten(1).all(1)
        z = threat.project(x, z + adam.step(gradient))
    return Crafted(z, {"flat": flat})


def estimate(
    view: View,
    z: Images,
    y: Labels,
    noise: Randomness,
    *,
    samples: int,
    delta: float,
    loss: Loss,
    box: bool,
) -> Tensor:
    """Return the gradient of `loss` at `z`, (N, C, H, W), without asking for one.

    The mean over random signs v of (L(z + delta v) - L(z - delta v)) / (2 delta) v (Spall 1992,
    doi:10.1109/9.119632). With `box`, probes are clipped to [0, 1] and 2 delta is the way that is left
    to each pixel, so that the estimate stays without bias on a linear loss. Where it is not finite, 0.
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
            losses = objective(view, view.logits(probes.flatten(0, 2)), y, loss)
        up, down = losses.view(2, -1, len(z))
        total += ((up - down).T.unsqueeze(1) @ signs.flatten(2)).squeeze(1)
    return torch.nan_to_num(total.view_as(z) / (samples * way), 0.0, 0.0, 0.0)

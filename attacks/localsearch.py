"""LocalSearch (Narodytska and Kasiviswanathan 2017, arXiv:1612.06299), with the settings of foolbox 1 and 2.

Greedy search on scores for few pixels: where a black or white pixel would help most, pixels are changed.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from attacks.common.best_so_far import NearestSuccess
from bench import (
    Count,
    Crafted,
    Images,
    Labels,
    NonNegativeCount,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

Score: TypeAlias = Literal["margin", "probability"]

PROBES = 128
"""How many pixels of a neighbourhood are tried, at most."""


def cost(*, rounds: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        rounds: How many rounds there are.
    """
    return 1 + rounds * (PROBES + 1)


@attack("localsearch", norms={"l0"}, version=1, access="score", kind="minimum-norm", cost=cost)
def localsearch(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    r: Positive = 1.5,
    p: Positive = 10.0,
    d: NonNegativeCount = 5,
    t: Count = 5,
    rounds: Count = 150,
    score: Score = "margin",
) -> Crafted:
    """Change a few pixels in each round, those that hurt the truth most when they are probed.

    Values are taken as in [-0.5, 0.5]. First a tenth of the pixels is probed, at random, then those near the
    last changed, never more than 128. Changes add up until a success. Letters are the paper's.

    Args:
        view: What the attack looks through; its logits are asked for, without gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        r: What a change multiplies all channels of a pixel by; what leaves the range comes in from the other
            side.
        p: What a probe sets them to: so many times their sign, clipped.
        d: How far, in pixels to each side, the pixels may be from the last changed that are probed next.
        t: How many pixels are changed in each round.
        rounds: How many rounds there are.
        score: What tells how the truth is hurt: its ``margin``, or its ``probability`` as published, which is
            blind where it is 1.

    Returns:
        The first success of each image, else the image, with the note ``failed``, where no round led to one.
    """
    nearest, rows = NearestSuccess(x, threat), torch.arange(len(x), device=x.device)
    height, width = x.shape[2:]
    near = torch.ones(len(x), height * width, dtype=torch.bool, device=x.device)
    tried = max(min(height * width // 10, PROBES), 1)
    z, labels = x, y
    for done in range(rounds + 1):
        with torch.no_grad():
            won = succeeded(view, view.logits(z), labels)
        nearest.offer(rows, z, won)
        # Waits for the device: how many examples are left.
        if len(standing := (~won).nonzero().squeeze(1)) < len(rows):
            rows, view, noise = rows[standing], view.select(standing), noise.select(standing)
            z, labels, near = z[standing], labels[standing], near[standing]
        if done == rounds or len(rows) == 0:
            break
        # In a random order, which also decides between equal gains.
        order = noise.uniform((height * width,)).masked_fill(~near, 2.0)
        pixels = order.argsort(dim=1)[:, :tried]
        among = near.gather(1, pixels)
        gains = _gains(view, z, labels, pixels, p, score).masked_fill(~among, -torch.inf)
        best = gains.argsort(dim=1, descending=True, stable=True)[:, :t]
        chosen = torch.zeros_like(near).scatter(1, pixels.gather(1, best), among.gather(1, best))
        chosen = chosen.view(-1, 1, height, width)
        z = torch.where(chosen, _from_the_other_side(r * (z - 0.5)) + 0.5, z)
        near = max_pool2d(chosen.to(x.dtype), 2 * d + 1, stride=1, padding=d).flatten(1) > 0
        tried = min(PROBES, height * width, t * (2 * d + 1) ** 2)
    return nearest.crafted()


def _from_the_other_side(values: Tensor) -> Tensor:
    """Return values that left [-0.5, 0.5] on one side coming in from the other."""
    back = values - (values > 0.5).to(values.dtype) + (values < -0.5).to(values.dtype)
    return back.clamp(-0.5, 0.5)


def _gains(view: View, z: Images, y: Labels, pixels: Tensor, p: float, score: Score) -> Tensor:
    """Return how near to success each example is with one of its `pixels` (n, M) probed, (n, M)."""
    probe = ((z - 0.5).sign() * p).clamp(-0.5, 0.5) + 0.5
    # Bounds memory; by nothing but the size of an image.
    together = max(1, 2**14 // z[0].numel())
    parts = []
    for few in pixels.T.split(together):  # (copies, n)
        at = torch.zeros(*few.shape, z[0, 0].numel(), dtype=torch.bool, device=z.device)
        at = at.scatter_(2, few[..., None], True).view(*few.shape, 1, *z.shape[2:])
        with torch.no_grad():
            logits = view.logits(torch.where(at, probe, z).flatten(0, 1))
        parts.append(_gain(view, logits, y, score).view(few.shape))
    # What is not a number is never chosen before what is.
    return torch.cat(parts).T.nan_to_num(-torch.finfo(z.dtype).max)


def _gain(view: View, logits: Tensor, y: Labels, score: Score) -> Tensor:
    if score == "margin":
        return objective(view, logits, y, "margin")
    log = objective(view, logits, y, "ce")
    # The log of what is to grow, or minus the log of what is to shrink.
    return log.exp() if view.refusal or view.target is not None else -(-log).exp()

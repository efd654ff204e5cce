"""What an attack may return: images in the box and within the threat."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.protocols import Crafted, Images, Norm, Threat, distance, shrink

ROUNDING = 1e-6
"""Rounding allowed in each value, in units of the pixel range [0, 1]; beyond it a move is `invalid`."""


OUT_OF_BOX, OUT_OF_BUDGET = "out of the box", "out of the budget"
"""Reasons why a move is invalid that have a length."""


class Validated(NamedTuple):
    """The images that the defense is shown, after the checks of the referee."""

    images: Images
    """Images (N, C, H, W) within the threat and in [0, 1]."""
    invalid: Tensor
    """True where the move was not allowed, so that the clean image stands in its place: bool (N,)."""
    because: Mapping[str, int]
    """The number of examples for each reason why a move was not allowed."""
    by: Mapping[str, float]
    """How far the worst of them left the box (in pixel values) or the ball (in its norm), by reason."""


def validate(x: Images, returned: object, threat: Threat) -> Validated:
    """Check what an attack returned, and project overshoots of the size of rounding back.

    A move is not allowed where the image is not finite, leaves [0, 1], or leaves the ball of the threat. With
    another shape or dtype no move of the shard is allowed.

    Args:
        x: Clean images (N, C, H, W).
        returned: What the attack returned: images or `Crafted`.
        threat: The norm and the radius.

    Returns:
        The images to show, where moves were not allowed, and why.

    Raises:
        TypeError: The attack returned something that is no tensor of images.
    """
    z = returned.images if isinstance(returned, Crafted) else returned
    if not isinstance(z, Tensor):
        raise TypeError(f"the attack returned a {type(z).__name__}, not a tensor of images")
    if z.shape != x.shape:
        return _nothing(x, f"shape {tuple(z.shape)}, not {tuple(x.shape)}")
    if z.dtype != x.dtype:
        return _nothing(x, f"{z.dtype}, not {x.dtype}")
    z = z.detach().to(x.device)
    wide, start = z.double(), x.double()
    finite = wide.isfinite().flatten(1).all(1)
    wide = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), wide, start)
    outside = torch.maximum(-wide, wide - 1).flatten(1).amax(1)
    left_box = finite & (outside > ROUNDING)
    invalid = ~finite | left_box
    because = {"not finite": int((~finite).sum()), OUT_OF_BOX: int(left_box.sum())}
    by = {OUT_OF_BOX: _most(outside, left_box)}
    if math.isfinite(threat.radius):
        further = distance(start, wide, threat.norm) - threat.radius
        beyond = further > leeway(threat.norm, x[0].numel())
        because[OUT_OF_BUDGET] = int((beyond & ~invalid).sum())
        by[OUT_OF_BUDGET] = _most(further, beyond & ~invalid)
        invalid |= beyond
        if threat.norm == "linf":
            wide = start + (wide - start).clamp(-threat.radius, threat.radius)
        elif threat.norm != "l0":
            wide = shrink(start, wide, threat.norm, threat.radius)
    wide = wide.clamp(0, 1)
    keep = invalid.view(-1, *[1] * (x.dim() - 1))
    why = {reason: count for reason, count in because.items() if count}
    return Validated(
        torch.where(keep, x, wide.to(x.dtype)), invalid, why, {name: by[name] for name in by if name in why}
    )


def _most(lengths: Tensor, chosen: Tensor) -> float:
    """Return the greatest of some lengths (N,); 0 where none is chosen."""
    return float(lengths[chosen].max()) if chosen.any() else 0.0


def leeway(norm: Norm, size: int) -> float:
    """Return the most that an error of `ROUNDING` in every value can add to a distance.

    Args:
        norm: The norm of the distance.
        size: Number of values of an image, 1 or more.

    Returns:
        The length, 0 or more.
    """
    return ROUNDING * {"linf": 1, "l2": math.sqrt(size), "l1": size, "l0": 0}[norm]


def _nothing(x: Images, reason: str) -> Validated:
    """Return the clean images: no move of the shard is allowed."""
    return Validated(x, torch.ones(len(x), dtype=torch.bool, device=x.device), {reason: len(x)}, {})

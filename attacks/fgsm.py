"""Fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)."""

from typing import Any

import torch
from torch import autograd

from bench import Crafted, Images, InputError, Labels, Randomness, Shape, Threat, View, attack, objective


def _check(params: dict[str, Any], shape: Shape) -> None:
    if not 0 < params["fraction"] <= 1:
        raise InputError(f"fraction must be above 0 and at most 1, not {params['fraction']:g}")


@attack("fgsm", norms={"linf"}, version=1, check_params=_check)
def fgsm(
    view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, fraction: float = 1.0
) -> Crafted:
    """Take one step of `fraction` of the radius along the sign of the cross-entropy's gradient.

    Notes: ``flat``, where the gradient was exactly zero, and ``nonfinite``, where it was not finite;
    neither moves a pixel.
    """
    z = x.clone().requires_grad_()
    (gradient,) = autograd.grad(objective(view, view.logits(z), y).sum(), z)
    peak = gradient.abs().flatten(1).amax(1)
    # Where an entry is not finite it says nothing of the direction.
    step = fraction * threat.radius * torch.nan_to_num(gradient, 0.0, 0.0, 0.0).sign()
    return Crafted(threat.project(x, x + step), notes={"flat": peak == 0, "nonfinite": ~peak.isfinite()})

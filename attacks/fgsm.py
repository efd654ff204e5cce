"""Fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)."""

import torch
from torch import autograd

from bench import Crafted, Images, Labels, Randomness, Threat, View, attack, objective


@attack("fgsm", norms={"linf"}, version=1)
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

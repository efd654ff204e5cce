"""Fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)."""

import torch
from torch import autograd

from attacks.common.best_so_far import GradientNotes, finite
from bench import Crafted, Images, Labels, PositiveShare, Randomness, Threat, View, attack, objective


@attack("fgsm", norms={"linf"}, version=1)
def fgsm(
    view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, fraction: PositiveShare = 1.0
) -> Crafted:
    """Take one step along the sign of the cross-entropy's gradient.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        fraction: The length of the step, as a share of the radius, above 0 and at most 1.

    Returns:
        The images, in the ball and the box, with the notes ``flat``, where the gradient was exactly zero, and
        ``nonfinite``, where it was not finite; neither moves a pixel.
    """
    z, notes = x.clone().requires_grad_(), GradientNotes(x)
    (gradient,) = autograd.grad(objective(view, view.logits(z), y).sum(), z)
    notes.see(torch.arange(len(x), device=x.device), gradient[None], first=True)
    step = fraction * threat.radius * finite(gradient).sign()
    return Crafted(threat.project(x, x + step), notes.columns())

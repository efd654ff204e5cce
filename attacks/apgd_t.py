"""Targeted Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, sections 4.2 and 5): one class after another."""

import torch
from torch import Tensor

from attacks.apgd import Settings, Walks
from attacks.common.candidates import candidate_labels
from bench import Count, Crafted, Images, Labels, Loss, Randomness, Share, Threat, View, attack


def cost(*, steps: int, classes: int, restarts: int = 1, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        steps: How many steps a walk has.
        classes: How many classes are gone for.
        restarts: How many walks there are for each.
    """
    return 1 + classes * restarts * (steps + 1)


@attack("apgd-t", norms={"linf", "l2"}, version=1, cost=cost)
def apgd_t(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 100,
    restarts: Count = 1,
    classes: Count = 9,
    loss: Loss = "dlr",
    rho: Share = 0.75,
) -> Crafted:
    """Climb, as `apgd` does, the targeted loss of each of the likeliest wrong classes in turn.

    They are ranked by the logits of the clean image; any wrong answer is a success. With a target of the
    harness's, that one alone.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps each walk takes; 100, as in AutoAttack.
        restarts: How many walks there are for each class.
        classes: How many classes are gone for at most; 9, as in AutoAttack.
        loss: What is climbed, as in `bench.objective`; the targeted DLR loss in AutoAttack.
        rho: The share of steps, from 0 to 1, that must raise the loss between two checkpoints.

    Returns:
        The images, in the ball and the box, with the notes of `apgd`.
    """
    walks = Walks(view, x, y, threat, noise, Settings(steps, loss, rho))
    with torch.no_grad():
        logits: Tensor = view.logits(x)
    walks.begin(logits)
    for towards in candidate_labels(view, logits, y, classes).T:
        for _ in range(restarts):
            walks.climb(towards)
    return walks.crafted()

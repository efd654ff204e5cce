"""Targeted Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, sections 4.2 and 5): one class after another."""

import torch
from torch import Tensor

from attacks.apgd import Record, check, climb
from attacks.common.candidates import candidate_labels
from bench import Crafted, Images, Labels, Loss, Randomness, Threat, View, attack


@attack("apgd-t", norms={"linf", "l2"}, version=1, check_params=check)
def apgd_t(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 100,
    restarts: int = 1,
    classes: int = 9,
    loss: Loss = "dlr",
    rho: float = 0.75,
) -> Crafted:
    """Climb, as `apgd` does, the targeted `loss` of each of the `classes` likeliest wrong classes in turn.

    They are ranked by the logits of the clean image; any wrong answer is a success. With a target of the
    harness's, that one alone. Notes: as `apgd`'s.
    """
    record = Record(x)
    with torch.no_grad():
        logits: Tensor = view.logits(x)
    record.wrong(view, logits, y)
    for towards in candidate_labels(view, logits, y, classes).T:
        for _ in range(restarts):
            climb(
                record,
                view,
                x,
                y,
                threat,
                noise,
                steps=steps,
                loss=loss,
                rho=rho,
                towards=towards,
            )
    return record.crafted()

"""Feature matching: an image whose features are those of an accepted image of another class.

After Sabour et al. 2016 (arXiv:1511.05122), "Adversarial manipulation of deep representations"; against a
defense that refuses by the likelihood of its features it is the attack that knows of the refusal (Tramer
et al. 2020, arXiv:2002.08347).
"""

from typing import Literal

import torch
from torch import Tensor

from attacks.common.matching import check, doubts, guides_of, match
from attacks.common.projected_ascent import Start
from bench import Crafted, Features, Images, InputError, Labels, Randomness, Threat, View, attack


@attack(
    "feature-matching", norms={"linf", "l2"}, version=1, space="features", doubts=doubts, check_params=check
)
def feature_matching(
    view: Features,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    guide: Literal["image", "centre"] = "image",
    classes: int | None = None,
    steps: int = 200,
    step: float | None = None,
    start: Start = "zero",
) -> Crafted:
    """Climb -||E(z) - E(guide)||^2 in `steps` projected steps (by default 4 radius / steps long).

    `guide` is the image of a class that the defense keeps as accepted, or the ``centre`` of the class, its
    typical features. One class after another is tried, those with the best logits first, `classes` of them
    (by default all); with a target, that alone.

    Of a turn's iterates, and then of all turns, the one is kept that is nearest to its guide, a wrong answer
    before a right one: a view of features shows no refusal, and what lies deepest among the other class's
    images is what it accepts. Where winning here is winning (``view.final``), an example is done at its first
    wrong answer.
    """

    def look(seen: View, z: Images) -> tuple[Tensor, Tensor]:
        assert isinstance(seen, Features)
        with torch.no_grad():
            logits = seen.logits(z.detach())
        return seen.features(z), logits

    def aim(seen: View, labels: Labels) -> Tensor:
        assert isinstance(seen, Features)
        if guide == "image":
            return seen.features(guides_of(seen, labels, x))
        if seen.centres is None:
            raise InputError("guide: centre: this view has no centres; guide: image needs none")
        return seen.centres.to(x)[labels]

    return match(view, x, y, threat, noise, look, aim, classes=classes, steps=steps, step=step, start=start)

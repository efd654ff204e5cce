"""Feature matching: an image whose features are those of an accepted image of another class.

After Sabour et al. 2016 (arXiv:1511.05122), "Adversarial manipulation of deep representations"; against a
defense that refuses by the likelihood of its features it is the attack that knows of the refusal (Tramer
et al. 2020, arXiv:2002.08347).
"""

from typing import Literal

from torch import Tensor

from attacks.common import flags
from attacks.common.matching import GuideMatching, check_params, cost, guides_of
from attacks.common.projected_ascent import Start
from bench import (
    Count,
    Crafted,
    Features,
    Images,
    InputError,
    Labels,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
)


@attack(
    "feature-matching",
    norms={"linf", "l2"},
    version=1,
    space="features",
    flags=flags.of_ascent,
    check_params=check_params,
    cost=cost,
)
def feature_matching(
    view: Features,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    guide: Literal["image", "centre"] = "image",
    classes: Count | None = None,
    steps: Count = 200,
    step_size: Positive | None = None,
    start: Start = "zero",
) -> Crafted:
    """Climb -||E(z) - E(guide)||^2 in projected steps, towards the guide of one class after another.

    Of a turn's iterates, and then of all turns, the one is kept that is nearest to its guide, a wrong answer
    before a right one: a view of features shows no refusal, and what lies deepest among the other class's
    images is what it accepts. Where winning here is winning (``view.exact``), an example is done at its first
    wrong answer.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        guide: ``image``: the image of a class that the defense keeps as accepted; ``centre``: the centre of
            the class, its typical features.
        classes: How many classes are tried at most, those with the best logits first; None: all. With a
            target, that alone.
        steps: How many steps each class has.
        step_size: The length of a step, in the threat's norm and units; None: 4 radius / steps.
        start: ``zero``: from the image itself; ``uniform``: from a point drawn uniformly from the ball.

    Returns:
        The images, in the ball and the box, with the notes ``flat`` and ``nonfinite``, as PGD's, and
        ``guide``, the class whose guide the image was drawn to.

    Raises:
        InputError: Where the view has no guides, or no centres.
    """

    def look(seen: View, z: Images) -> tuple[Tensor, Tensor]:
        assert isinstance(seen, Features)
        found = seen.described(z)
        return found.features, found.logits.detach()

    def aim(seen: View, labels: Labels) -> Tensor:
        assert isinstance(seen, Features)
        if guide == "image":
            return seen.described(guides_of(seen, labels, x)).features
        if seen.centres is None:
            raise InputError("guide: centre: this view has no centres; guide: image needs none")
        return seen.centres.to(x)[labels]

    matching = GuideMatching(
        look=look, aim=aim, classes=classes, steps=steps, step_size=step_size, start=start
    )
    return matching.run(view, x, y, threat, noise)

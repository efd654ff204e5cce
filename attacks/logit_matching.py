"""Logit matching: an image whose logits are those of an accepted image of another class.

As feature matching, on the other end of the network (Tramer et al. 2020, arXiv:2002.08347).
"""

from torch import Tensor

from attacks.common import flags
from attacks.common.matching import GuideMatching, check_params, cost, guides_of
from attacks.common.projected_ascent import Start
from bench import Count, Crafted, Features, Images, Labels, Positive, Randomness, Threat, View, attack


@attack(
    "logit-matching",
    norms={"linf", "l2"},
    version=1,
    space="features",
    flags=flags.of_ascent,
    check_params=check_params,
    cost=cost,
)
def logit_matching(
    view: Features,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    classes: Count | None = None,
    steps: Count = 200,
    step_size: Positive | None = None,
    start: Start = "zero",
) -> Crafted:
    """Climb -||Z(z) - Z(guide)||^2 in projected steps, towards the guide of one class after another.

    Guides, turns and what is kept are those of `feature-matching`. Where the view is centred, as most are,
    the level of the logits is not to be seen: Z is then the logits less their mean.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        classes: How many classes are tried at most, those with the best logits first; None: all. With a
            target, that alone.
        steps: How many steps each class has.
        step_size: The length of a step, in the threat's norm and units; None: 4 radius / steps.
        start: ``zero``: from the image itself; ``uniform``: from a point drawn uniformly from the ball.

    Returns:
        The images, in the ball and the box, with the notes of `feature-matching`.

    Raises:
        InputError: Where the view has no guides.
    """

    def look(seen: View, z: Images) -> tuple[Tensor, Tensor]:
        logits = seen.logits(z)
        # A class that cannot be, at minus infinity, is nothing to match.
        masked = logits.isneginf()
        shown = logits.masked_fill(masked, 0.0)
        if seen.centred:
            # What the harness takes off has no gradient; the mean that is taken off here has.
            level = shown.sum(-1, keepdim=True) / (~masked).sum(-1, keepdim=True)
            shown = (shown - level).masked_fill(masked, 0.0)
        return shown, logits

    def aim(seen: View, labels: Labels) -> Tensor:
        found, _ = look(seen, guides_of(seen, labels, x))
        return found.mean(0) if found.dim() == 3 else found

    matching = GuideMatching(
        look=look, aim=aim, classes=classes, steps=steps, step_size=step_size, start=start
    )
    return matching.run(view, x, y, threat, noise)

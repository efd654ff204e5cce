"""Logit matching: an image whose logits are those of an accepted image of another class.

As feature matching, on the other end of the network (Tramer et al. 2020, arXiv:2002.08347).
"""

from torch import Tensor

from attacks.common.matching import check, doubts, guides_of, match
from attacks.common.projected_ascent import Start
from bench import Crafted, Features, Images, Labels, Randomness, Threat, View, attack


@attack(
    "logit-matching", norms={"linf", "l2"}, version=1, space="features", doubts=doubts, check_params=check
)
def logit_matching(
    view: Features,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    classes: int | None = None,
    steps: int = 200,
    step: float | None = None,
    start: Start = "zero",
) -> Crafted:
    """Climb -||Z(z) - Z(guide)||^2 in `steps` projected steps (by default 4 radius / steps long).

    Guides, turns and what is kept are those of `feature-matching`. Where the view is centred, as most are,
    the level of the logits is not to be seen: Z is then the logits less their mean.
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

    return match(view, x, y, threat, noise, look, aim, classes=classes, steps=steps, step=step, start=start)

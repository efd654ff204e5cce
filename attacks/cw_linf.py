"""The margin of Carlini and Wagner (2017, arXiv:1608.04644, f_6), climbed in the linf ball as Madry et al.
(2018, arXiv:1706.06083) do with their confidence of 50.
"""

from torch import Tensor

from attacks.common import flags
from attacks.common.margins import margin_shortfall
from attacks.common.projected_ascent import Keep, ProjectedAscent, Start
from bench import Count, Crafted, Images, Labels, NonNegative, Positive, Randomness, Threat, View, attack


@attack("cw-linf", norms={"linf"}, version=1, starts="any", flags=flags.of_ascent)
def cw_linf(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 40,
    step_size: Positive | None = None,
    restarts: Count = 1,
    k: NonNegative = 50.0,
    start: Start = "uniform",
    keep: Keep = "best",
    drop: bool = True,
) -> Crafted:
    """Climb -max(k - margin, 0) as PGD does; the margin is the best wrong logit minus the right one.

    Beyond a margin of `k` there is no gradient and an example stays where it is. Where an example is
    dropped at its first success, or margins stay below `k`, it is PGD with ``loss="margin"``.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps each restart takes.
        step_size: The length of a step, in units of [0, 1]; None: 2.5 radius / steps.
        restarts: How many walks there are, each from a start of its own.
        k: The wanted margin, in units of the logits; 50, as Madry et al. have it.
        start: ``uniform``: a point drawn uniformly from the ball; ``zero``: the image itself.
        keep: ``best``: the best iterate of all; ``last``: the best of the restarts' last ones.
        drop: False goes on to the end where an example could be dropped; no failure replaces a success.

    Returns:
        The images, in the ball and the box, with the notes ``flat`` and ``nonfinite``, as PGD's.
    """

    def evaluate(here: View, z: Images, labels: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = here.logits(z)
        return -margin_shortfall(here, logits, labels, k), logits

    ascent = ProjectedAscent(
        steps=steps,
        length=step_size,
        restarts=restarts,
        start=start,
        keep=keep,
        drop=drop,
    )
    return ascent.run(view, x, y, threat, noise, evaluate)

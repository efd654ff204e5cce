"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083), in the linf and the l2 ball."""

from attacks.common import flags
from attacks.common.projected_ascent import Keep, ProjectedAscent, Start, loss_of
from bench import Count, Crafted, Images, Labels, Loss, Positive, Randomness, Threat, View, attack


@attack("pgd", norms={"linf", "l2"}, version=1, starts="any", flags=flags.of_ascent)
def pgd(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: Count = 40,
    step_size: Positive | None = None,
    restarts: Count = 1,
    loss: Loss = "ce",
    start: Start = "uniform",
    keep: Keep = "best",
    drop: bool = True,
) -> Crafted:
    """Climb a loss in projected steps of one length, from a random point of the ball.

    Where winning here is winning (``view.exact``), an example is dropped at its first adversarial iterate
    (the image itself, where that and its start are wrong), and further restarts see the survivors only.
    Otherwise the iterate with the highest loss is kept, the start and the last included.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps each restart takes; 40, as the paper does on MNIST.
        step_size: The length of a step, in the threat's norm and units; None: 2.5 radius / steps, the
            rule of the authors' MNIST challenge.
        restarts: How many walks there are, each from a start of its own.
        loss: What is climbed, as in `bench.objective`: the cross-entropy, the margin, DLR.
        start: ``uniform``: a point drawn uniformly from the ball; ``zero``: the image itself.
        keep: ``best``: the best iterate of all; ``last``: the best of the restarts' last ones.
        drop: False goes on to the end where an example could be dropped; no failure replaces a success.

    Returns:
        The images, in the ball and the box, with the notes ``flat``, where the gradient at the first step of
        a restart was exactly zero, and ``nonfinite``, where a gradient was not finite; neither moves a pixel.
    """
    ascent = ProjectedAscent(
        steps=steps,
        length=step_size,
        restarts=restarts,
        start=start,
        keep=keep,
        drop=drop,
    )
    return ascent.run(view, x, y, threat, noise, loss_of(loss))

"""An attack of one's own: the momentum iterative method (Dong et al. 2018, arXiv:1710.06081), algorithm 1.

A projected ascent whose step is another: restarts, the best iterate and what is noted come with it. For a
task file, put it into the folder ``attacks/`` of a clone, or into an installed package whose entry point in
the group ``bench.plugins`` is called ``mylab``; or import it and call ``bench.run(..., executor="inline")``.
For ``bench.evaluate(..., attack=mi_fgsm)`` an import is enough.
"""

from torch import Tensor

from attacks.common.projected_ascent import ProjectedAscent, loss_of
from bench import Count, Crafted, Images, Labels, NonNegative, Randomness, Threat, View, attack


@attack("mylab/mi-fgsm", norms={"linf"}, version=1)
def mi_fgsm(
    view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *,
    steps: Count = 10, restarts: Count = 1, decay: NonNegative = 1.0,
) -> Crafted:  # fmt: skip
    """Climb the cross-entropy by the sign of its gradients' running sum, each at length 1 in l1.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        steps: How many steps each restart takes; 10 in the paper.
        restarts: How many walks there are. One goes from the image by steps of radius / steps, as in the
            paper; more go from random points of the ball, by 2.5 times that, so that they can cross it.
        decay: What is left of the sum at each step; 1.0 in the paper.

    Returns:
        The images, with the notes of a projected ascent.
    """

    def direction(gradient: Tensor, memory: Tensor | None, threat: Threat) -> tuple[Tensor, Tensor]:
        size = gradient.abs().sum((-3, -2, -1), keepdim=True).clamp_min(1e-30)
        total = gradient / size if memory is None else decay * memory + gradient / size
        return total.sign(), total

    ascent = ProjectedAscent(
        steps=steps,
        reach=1 if restarts == 1 else 2.5,
        restarts=restarts,
        start="zero" if restarts == 1 else "uniform",
        direction=direction,
    )
    return ascent.run(view, x, y, threat, noise, loss_of("ce"))


if __name__ == "__main__":
    import torch
    from sklearn.datasets import load_digits

    from bench import evaluate

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
    y = torch.tensor(digits.target)
    # The nearest mean image as a linear classifier.
    means = torch.stack([x[y == label].flatten(1).mean(0) for label in range(10)])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = 10 * means, -5 * (means**2).sum(1)
    for restarts in (1, 5):
        print(evaluate(model, x[:100], y[:100], attack=mi_fgsm, radius="8/255", restarts=restarts))

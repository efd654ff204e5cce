"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083), in the linf and the l2 ball."""

from typing import Any

from torch import Tensor

from attacks.common.projected_ascent import Keep, Start, projected_ascent
from bench import (
    Crafted,
    Images,
    InputError,
    Labels,
    Loss,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    objective,
)


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "restarts"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    if params["step"] is not None and not params["step"] > 0:
        raise InputError(f"step must be a length above 0, not {params['step']:g}")


def _doubts(
    threat: Threat, *, steps: int, step: float | None, restarts: int, start: str, **_: object
) -> str | None:
    if step is not None and (reach := steps * step) < threat.radius:
        return f"{steps} steps of {step:g} reach {reach:g}, less than the radius {threat.radius:g}"
    if restarts > 1 and start == "zero":
        return f"{restarts} restarts from the image itself are one run, {restarts} times"
    return None


@attack("pgd", norms={"linf", "l2"}, version=1, doubts=_doubts, check_params=_check)
def pgd(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 40,
    step: float | None = None,
    restarts: int = 1,
    loss: Loss = "ce",
    start: Start = "uniform",
    keep: Keep = "best",
    drop: bool = True,
) -> Crafted:
    """Climb `loss` in `steps` projected steps of length `step` (by default 2.5 radius / steps).

    Where winning here is winning (``view.final``), an example is dropped at its first adversarial
    iterate (the image itself, where that and its start are wrong), and further restarts see the
    survivors only; ``drop=False`` goes on to the end, and no failure replaces a success. Otherwise the
    iterate with the highest loss is kept, the start and the last included; with ``keep="last"``, each
    restart's last.

    Notes: ``flat``, where the gradient at the first step of a restart was exactly zero, and
    ``nonfinite``, where a gradient was not finite; neither moves a pixel.
    """

    def ask(here: View, z: Images, labels: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = here.logits(z)
        return objective(here, logits, labels, loss), logits

    length = 2.5 * threat.radius / steps if step is None else step
    return projected_ascent(
        view,
        x,
        y,
        threat,
        noise,
        ask,
        steps=steps,
        length=length,
        restarts=restarts,
        start=start,
        keep=keep,
        drop=drop,
    )

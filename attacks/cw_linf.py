"""The margin of Carlini and Wagner (2017, arXiv:1608.04644, f_6), climbed in the linf ball as Madry et al.
(2018, arXiv:1706.06083) do with their confidence of 50.
"""

from typing import Any

from torch import Tensor

from attacks.common.margins import lack
from attacks.common.projected_ascent import Keep, Start, projected_ascent
from bench import Crafted, Images, InputError, Labels, Randomness, Shape, Threat, View, attack


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "restarts"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    if params["step"] is not None and not params["step"] > 0:
        raise InputError(f"step must be a length above 0, not {params['step']:g}")
    if not params["k"] >= 0:
        raise InputError(f"k must be a margin of 0 or more, not {params['k']:g}")


def _doubts(
    threat: Threat, *, steps: int, step: float | None, restarts: int, start: str, **_: object
) -> str | None:
    if step is not None and (reach := steps * step) < threat.radius:
        return f"{steps} steps of {step:g} reach {reach:g}, less than the radius {threat.radius:g}"
    if restarts > 1 and start == "zero":
        return f"{restarts} restarts from the image itself are one run, {restarts} times"
    return None


@attack("cw-linf", norms={"linf"}, version=1, doubts=_doubts, check_params=_check)
def cw_linf(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int = 40,
    step: float | None = None,
    restarts: int = 1,
    k: float = 50.0,
    start: Start = "uniform",
    keep: Keep = "best",
    drop: bool = True,
) -> Crafted:
    """Climb -max(k - margin, 0) as PGD does; the margin is the best wrong logit minus the right one.

    Beyond a margin of `k` there is no gradient and an example stays where it is. Where an example is
    dropped at its first success, or margins stay below `k`, it is PGD with ``loss="margin"``.

    Notes: ``flat`` and ``nonfinite``, as PGD's.
    """

    def ask(here: View, z: Images, labels: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = here.logits(z)
        return -lack(here, logits, labels, k), logits

    return projected_ascent(
        view,
        x,
        y,
        threat,
        noise,
        ask,
        steps=steps,
        length=2.5 * threat.radius / steps if step is None else step,
        restarts=restarts,
        start=start,
        keep=keep,
        drop=drop,
    )

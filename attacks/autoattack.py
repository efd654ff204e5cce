"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690), with the settings of its authors and no others."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attacks import apgd_t as targeted
from attacks import fab as boundaries
from attacks import square as squares
from attacks.apgd import apgd
from attacks.apgd_t import apgd_t
from attacks.common.best_so_far import BestIterate
from attacks.fab import fab, fab_t
from attacks.square import square
from bench import (
    Crafted,
    Images,
    Labels,
    Randomness,
    Threat,
    View,
    attack,
    eot,
    objective,
    succeeded,
)

Version: TypeAlias = Literal["standard", "plus", "rand"]

DRAWS = 20
"""How often ``rand`` asks a random defense for each loss."""

_SQUARE = partial(square, queries=5000, p_init=0.8, loss="margin", rescale=False)

VERSIONS: dict[Version, dict[str, partial[Crafted]]] = {
    "standard": {
        "apgd-ce": partial(apgd, steps=100, loss="ce"),
        "apgd-t": partial(apgd_t, steps=100, classes=9),
        "fab-t": partial(fab_t, steps=100, classes=9),
        "square": _SQUARE,
    },
    "plus": {
        "apgd-ce": partial(apgd, steps=100, loss="ce", restarts=5),
        "apgd-dlr": partial(apgd, steps=100, loss="dlr", restarts=5),
        "fab": partial(fab, steps=100, restarts=5),
        "square": _SQUARE,
        "apgd-t": partial(apgd_t, steps=100, classes=9),
        "fab-t": partial(fab_t, steps=100, classes=9),
    },
    "rand": {
        "apgd-ce": partial(apgd, steps=100, loss="ce"),
        "apgd-dlr": partial(apgd, steps=100, loss="dlr"),
    },
}
"""The members of each version, in their order."""


_COSTS: dict[Callable[..., Crafted], Callable[..., int]] = {
    apgd: lambda *, steps, restarts=1, **_: restarts * (steps + 1) + 1,
    apgd_t: targeted.cost,
    fab: boundaries.cost,
    fab_t: boundaries.cost,
    square: squares.cost,
}


def cost(*, version: Version) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        version: Which members run.
    """
    passes = (1 + _COSTS[member.func](**member.keywords) for member in VERSIONS[version].values())
    return 1 + sum(passes) * (DRAWS if version == "rand" else 1)


@attack("autoattack", norms={"linf", "l2"}, version=1, cost=cost)
def autoattack(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    version: Version = "standard",
) -> Crafted:
    """Run one attack after the other on the examples that still stand.

    A member's images count as the view answers when it is asked again. Where winning here is not winning
    (``view.exact`` is false) nothing stands or falls: every member sees every example, and the image with the
    highest margin is kept.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.
        version: ``standard``: `apgd` with cross-entropy, `apgd-t`, `fab-t`, `square`. ``plus``: five
            restarts, and the untargeted forms as well. ``rand``, for random defenses: `apgd` with
            cross-entropy and with DLR, each loss the mean of 20 draws.

    Returns:
        The images, in the ball and the box, with notes. ``found_by``: the position of the member that found
        the image, from 0; -1 where none did, or the image was wrong already. ``passes.NAME``: what each
        member spent on the example, forward and backward passes together. ``flat`` and ``nonfinite``, as
        `apgd`'s, of any member.
    """
    members = VERSIONS[version]
    best, device = BestIterate(x), x.device
    found_by = torch.full((len(x),), -1, device=device)
    says = {note: torch.zeros(len(x), dtype=torch.bool, device=device) for note in ("flat", "nonfinite")}
    spent = {name: torch.zeros(len(x), dtype=torch.float64, device=device) for name in members}
    with torch.no_grad():
        done = succeeded(view, view.logits(x), y) & view.exact
    for position, (name, member) in enumerate(members.items()):
        if len(rows := (~done).nonzero().squeeze(1)) == 0:
            break
        here, clean, labels = view.select(rows), x[rows], y[rows]
        seen = replace(here, logits=_Counted(here, spent[name], rows))
        if version == "rand":
            seen = eot(seen, DRAWS)
        crafted = member(seen, clean, labels, threat, noise.select(rows).spawn(name))
        # What looks for the nearest adversarial image may have found one that is too far.
        z = threat.project(clean, crafted.images)
        with torch.no_grad():
            logits = here.logits(z)
        won = succeeded(here, logits, labels) & view.exact
        better = best.offer(rows, z, objective(here, logits, labels, "margin"), won)
        found_by[rows] = torch.where(won if view.exact else better, position, found_by[rows])
        done[rows] = won
        for note in says.keys() & crafted.notes.keys():
            says[note][rows] |= crafted.notes[note]
    passes = {f"passes.{name}": each for name, each in spent.items()}
    return Crafted(best.images, {"found_by": found_by, **says, **passes})


class _Counted:
    """A view's logits; counts the passes, forward and backward, that each example is asked for."""

    def __init__(self, view: View, passes: Tensor, rows: Tensor) -> None:
        self._view, self._passes, self._rows = view, passes, rows

    def __call__(self, z: Tensor) -> Tensor:
        answer = self._view.logits(z)
        self._count(len(z))
        if answer.requires_grad:
            answer.register_hook(lambda _: self._count(len(z)))
        return answer

    def _count(self, points: int) -> None:
        self._passes[self._rows] += points / len(self._rows)

    def select(self, rows: Tensor) -> "_Counted":
        """Return the callable for some of the examples."""
        return _Counted(self._view.select(rows), self._passes, self._rows[rows])

"""One attack after another, each on what stood against those before it: an attack made of attacks.

The survivors of every attack are the only examples that the next one sees, so that an example costs no more
passes once it is broken. Which examples are broken does not depend on the order: each member draws what it
draws where it is run alone, and an attack that is ``rng="example"`` gives an example the same image in any
company.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from attacks.common.best_so_far import BestIterate, by_example
from bench import (
    BoundAttack,
    Crafted,
    Images,
    InputError,
    Labels,
    Needs,
    NonNegativeCount,
    Randomness,
    Shape,
    Threat,
    Use,
    View,
    attack,
    bound,
    labels_of,
    objective,
    succeeded,
)

Uses: TypeAlias = Sequence[Use | Mapping[str, Any]]
"""Attacks with their settings, as the attack is called with them or as a task file writes them."""

ROUNDING = 1e-6
"""How far a value may lie beyond ball and box, in units of [0, 1]: what the harness allows, too."""

_SIGHT = ("none", "decision", "score", "gradient")
"""What attacks ask of a view, the least first."""

_UNITED = ("flat", "nonfinite", "raised", "saturated")
"""Notes that hold of an example if they hold of it in any member."""


def cost(*, of: Uses, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        of: The attacks; each image that one of them returns is looked at once more.
    """
    return 1 + sum(1 + each.entry.passes(each.params) for each in map(bound, of))


def flags(threat: Threat, *, of: Uses, **_: object) -> str | None:
    """Return what is odd about the settings of its members.

    Args:
        threat: The threat model.
        of: The attacks.
    """
    said = [
        f"{label}: {sentence}"
        for label, each in zip(labels_of(of), map(bound, of), strict=True)
        if (sentence := each.entry.said("flags", each.entry.given(threat), **each.params))
    ]
    return "; ".join(said) or None


def unfit(params: Mapping[str, Any], shape: Shape) -> str | None:
    """Return why conditions on such data are left out: the first reason of a member.

    Args:
        params: Its parameters.
        shape: The form of the images, and the number of classes.
    """
    reasons = (each.entry.said("unfit", each.params, shape) for each in map(bound, params["of"]))
    return next((reason for reason in reasons if reason), None)


def check_params(params: Mapping[str, Any], shape: Shape) -> None:
    """Raise `InputError` where members cannot be, or do not fit the data or each other.

    Args:
        params: Its parameters.
        shape: The form of the images, and the number of classes.
    """
    members = [bound(each) for each in params["of"]]
    for label, member in zip(labels_of(params["of"]), members, strict=True):
        try:
            member.entry.check(member.params, shape)
            member.entry.passes(member.params)
        except InputError as error:
            raise InputError(f"of: {label}: {error}") from None
    streams = [member.stream for member in members]
    for place, stream in enumerate(streams):
        if stream in streams[:place]:
            raise InputError(
                f"of: {members[place].entry.name} stands twice with the same settings, with which it would "
                "draw the same and break nothing more; leave one out, or give it restarts"
            )
    order = params.get("order")
    if order is not None and sorted(order) != list(range(len(members))):
        raise InputError(
            f"order: expected each of 0 to {len(members) - 1} once, the places in `of`, found {list(order)}"
        )


def needs(*, of: Uses, **_: object) -> Needs:
    """Return what a view, the data and the harness must offer, so that every member can run.

    Args:
        of: The attacks.

    Raises:
        InputError: No view offers it.
    """
    members = [bound(each).entry for each in of]
    for each in members:
        if each.name == "sequence":
            raise InputError("of: a sequence within a sequence; list its attacks in one")
        if each.starts == "stored":
            raise InputError(f"of: {each.name} shows a baseline's images: bench check does")
        if each.space != "pixel":
            raise InputError(f"of: {each.name} searches {each.space} space, and a sequence images alone")
    norms = reduce(frozenset.intersection, (frozenset(each.norms) for each in members))
    access = max((each.access for each in members), key=_SIGHT.index)
    channels = {each.channels for each in members} - {None}
    blind = ", ".join(each.name for each in members if each.access == "decision")
    if not norms or len(channels) > 1:
        what = "norm" if not norms else "number of channels"
        raise InputError(
            f"of: there is no {what} that all of {', '.join(each.name for each in members)} know"
        )
    if access == "none":
        raise InputError("of: none of its attacks looks at anything, so that nobody sees what stands")
    if access != "decision" and blind:
        raise InputError(f"of: {blind} and the others look through views of different kinds")
    limits = [each.time_limit for each in members]
    return Needs(
        norms=norms,
        access=access,
        rng="shard" if any(each.rng == "shard" for each in members) else "example",
        least_classes=max(each.least_classes for each in members),
        channels=next(iter(channels), None),
        square=any(each.square for each in members),
        targeted=all(each.targeted for each in members),
        time_limit=None if None in limits else sum(filter(None, limits)),
    )


@attack(
    "sequence",
    norms={"linf", "l2", "l1", "l0"},
    version=1,
    cost=cost,
    flags=flags,
    unfit=unfit,
    check_params=check_params,
    needs=needs,
    neutral={"order": None},
)
def sequence(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    of: Annotated[list[Use], Field(min_length=1)],
    order: list[NonNegativeCount] | None = None,
) -> Crafted:
    """Run one attack after another, each on what stood against those before it.

    An image that is wrong already is left unmoved. A member that moves as little as it can is given no
    radius, as where it runs alone; what it finds beyond the radius is none. Where winning here is not winning
    (``view.exact`` is false) nothing stands or falls: every member sees every example, and the image with the
    highest margin is kept.

    Args:
        view: What the attacks look through.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own; a member's depend on what it is, and not on its place.
        of: The attacks with their settings, at least one; a sequence is none of them.
        order: The places in `of`, from 0, in the order in which they run; None: as they stand.

    Returns:
        The images, in the ball and the box, with notes. ``found_by``: the place in `of` of the attack that
        broke the example, from 0; -1 where none did, or the image was wrong already. ``forwards.NAME`` and
        ``backwards.NAME``: what each attack spent on the example, the look at its image included; 0 where it
        did not see it. A question that a view answers several times counts once. ``flat``, ``nonfinite``,
        ``raised``, ``saturated``: as of any member. What else a member notes: ``NAME.note``.
    """
    members = [_Member(label, bound(use), x) for label, use in zip(labels_of(of), of, strict=True)]
    best = BestIterate(x)
    found_by = torch.full((len(x),), -1, device=x.device)
    notes: dict[str, Tensor] = {}
    with torch.no_grad():
        done = succeeded(view, view.logits(x), y) & view.exact
    for place in range(len(of)) if order is None else order:
        if len(rows := (~done).nonzero().squeeze(1)) == 0:
            break
        member, here, clean, labels = members[place], view.select(rows), x[rows], y[rows]
        returned = member.run(here, rows, clean, labels, threat, noise.select(rows))
        z = _lawful(clean, returned.images.detach(), threat)
        member.forwards[rows] += 1
        with torch.no_grad():
            logits = here.logits(z)
        won = succeeded(here, logits, labels) & view.exact
        better = best.offer(rows, z, objective(here, logits, labels, "margin"), won)
        found_by[rows] = torch.where(won if view.exact else better, place, found_by[rows])
        done[rows] = won
        _take(notes, returned.notes, member.label, rows, len(x))
    spent: dict[str, Tensor] = {}
    for member in members:
        spent |= {f"forwards.{member.label}": member.forwards, f"backwards.{member.label}": member.backwards}
    return Crafted(best.images, {"found_by": found_by, **notes, **spent})


@dataclass
class _Member:
    """One of the attacks, and what it spent on each example of the batch."""

    label: str
    attack: BoundAttack
    x: Images

    def __post_init__(self) -> None:
        self.forwards, self.backwards = (
            torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device) for _ in range(2)
        )

    def run(
        self, view: View, rows: Tensor, x: Images, y: Labels, threat: Threat, noise: Randomness
    ) -> Crafted:
        """Attack the examples `rows`, whose view, images, labels and draws are given."""
        returned = self.attack(
            replace(view, logits=_Counted(view.logits, self, rows), starts=None),
            x.clone(),
            y.clone(),
            self.attack.entry.given(threat),
            noise.spawn(self.attack.stream),
        )
        crafted = returned if isinstance(returned, Crafted) else Crafted(returned, {})
        if crafted.images.shape != x.shape:
            found = tuple(crafted.images.shape)
            raise ValueError(f"{self.label} returned images of the shape {found} for {tuple(x.shape)}")
        return crafted


class _Counted:
    """A view's logits; counts the passes, forward and backward, that each example is asked for."""

    def __init__(self, ask: Callable[[Tensor], Tensor], member: _Member, rows: Tensor) -> None:
        self._ask, self._member, self._rows = ask, member, rows

    def __call__(self, z: Tensor) -> Tensor:
        answer = self._ask(z)
        share = len(z) / len(self._rows)
        self._member.forwards[self._rows] += share
        if answer.requires_grad:
            answer.register_hook(lambda _: self._backward(share))
        return answer

    def _backward(self, share: float) -> None:
        self._member.backwards[self._rows] += share

    def select(self, rows: Tensor) -> "_Counted":
        """Return the callable for some of the examples."""
        return _Counted(
            getattr(self._ask, "select", lambda _: self._ask)(rows), self._member, self._rows[rows]
        )


def _lawful(x: Images, z: Images, threat: Threat) -> Images:
    """Return images in ball and box, and the clean one where more than rounding was missing to that."""
    finite = z.isfinite().flatten(1).all(1)
    z = torch.where(by_example(finite, x), z.to(x.dtype), x)
    if threat.norm in ("linf", "l2"):
        near = threat.project(x, z)
        inside = (z - near).flatten(1).abs().amax(1) <= ROUNDING
    else:
        near = z.clamp(0, 1)
        room = ROUNDING * (x[0].numel() if threat.norm == "l1" else 0)
        inside = (z - near).flatten(1).abs().amax(1) <= ROUNDING
        inside &= threat.distance(x.double(), near.double()) <= threat.radius + room
    return torch.where(by_example(finite & inside, x), near, x)


def _take(notes: dict[str, Tensor], found: Mapping[str, Tensor], label: str, rows: Tensor, size: int) -> None:
    """Keep what a member notes of the examples `rows` among the notes of a batch of a size."""
    for name, values in found.items():
        united = name in _UNITED
        kept = notes.setdefault(name if united else f"{label}.{name}", values.new_zeros(size))
        kept[rows] = kept[rows] | values if united else values

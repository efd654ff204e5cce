"""One attack after another, each on what stood against those before it: an attack made of attacks.

The survivors of every attack are the only examples that the next one sees, so that an example costs no more
passes once it is broken. Which examples are broken does not depend on the order: each member draws what it
draws where it is run alone, and an attack that is ``rng="example"`` gives an example the same image in any
company.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from attacks.common.in_turn import Member, in_turn
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
)

Uses: TypeAlias = Sequence[Use | Mapping[str, Any]]
"""Attacks with their settings, as the attack is called with them or as a task file writes them."""

_SIGHT = ("none", "decision", "score", "gradient")
"""What attacks ask of a view, the least first."""


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
    highest margin is kept. Where a member raises, its examples stay as they were, and the others go on; what
    is no fault of its own (a limit of time, a full memory, a signal) ends all.

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
        ``raised``, ``saturated``: as of any member. ``raised.NAME``: the attack raised when it was run on the
        example. What else a member notes: ``NAME.note``.

    Raises:
        Exception: A member's own, where each that was run raised.
    """
    members = [
        Member(label, attack.stream, partial(_alone, attack), may_raise=True)
        for label, attack in zip(labels_of(of), map(bound, of), strict=True)
    ]
    return in_turn(members, range(len(of)) if order is None else order, view, x, y, threat, noise)


def _alone(
    attack: BoundAttack, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness
) -> Images | Crafted:
    """Run a member as where it is alone: from its own starts, no radius if it moves as little as it can."""
    return attack(replace(view, starts=None), x, y, attack.entry.given(threat), noise)

"""Attacks in turn, each on what stood against those before it: what an attack made of attacks is made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from traceback import clear_frames
from typing import TypeAlias

import torch
from torch import Tensor

from attacks.common.best_so_far import BestIterate, by_example
from bench import (
    Crafted,
    Images,
    Labels,
    Randomness,
    Threat,
    View,
    beyond_the_code,
    objective,
    remark,
    succeeded,
)

Run: TypeAlias = Callable[[View, Images, Labels, Threat, Randomness], Images | Crafted]
"""An attack with its settings."""

ROUNDING = 1e-6
"""How far a value may lie beyond ball and box, in units of [0, 1]: what the harness allows, too."""

_UNITED = ("flat", "nonfinite", "raised", "saturated")
"""Notes that hold of an example if they hold of it in any member."""


@dataclass(frozen=True)
class Member:
    """One of several attacks."""

    label: str
    """What its notes are called by; no two members have the same."""
    stream: str
    """What its draws are keyed by: what the attack is, wherever it stands."""
    run: Run
    """The attack."""
    may_raise: bool = False
    """Whether the others go on where it raised: it is an attack of its own, and no part of one."""


def in_turn(
    members: Sequence[Member],
    order: Iterable[int],
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
) -> Crafted:
    """Run attacks one after another, each on what stood against those before it.

    An image that is wrong already is left unmoved. What misses ball or box by more than rounding is no
    success. Where winning here is not winning (``view.exact`` is false) nothing stands or falls: every member
    sees every example, and the image with the highest margin is kept.

    Where a member that `may_raise` raised, or returned what is no answer, the examples that it was run on
    stay as they were, and the others go on. What is not its own fault (`beyond_the_code`) ends all.

    Args:
        members: The attacks.
        order: Their places in the order in which they run.
        view: What the attacks look through.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.

    Returns:
        The images, in the ball and the box, with notes. ``found_by``: the place of the member that broke the
        example; -1 where none did, or the image was wrong already. ``forwards.LABEL`` and
        ``backwards.LABEL``: what each member spent on the example, the look at its image included; 0 where it
        did not see it. A question that a view answers several times counts once. ``flat``, ``nonfinite``,
        ``raised``, ``saturated``: as of any member. ``raised.LABEL``, of members that may: it raised when it
        was run on the example, which counts as seen. What else a member notes: ``LABEL.note``.

    Raises:
        Exception: A member's own, where it may not raise, or where each that was run raised: nothing was
            attacked, so that nothing may look robust.
    """
    best = BestIterate(x)
    found_by = torch.full((len(x),), -1, device=x.device)
    notes: dict[str, Tensor] = {}
    spent = {each.label: Spent(x) for each in members}
    raised = {each.label: torch.zeros_like(y, dtype=torch.bool) for each in members if each.may_raise}
    last: Exception | None = None
    answered = False
    with torch.no_grad():
        done = succeeded(view, view.logits(x), y) & view.exact
    for place in order:
        if len(rows := (~done).nonzero().squeeze(1)) == 0:
            break
        member, here, clean, labels = members[place], view.select(rows), x[rows], y[rows]
        passes = spent[member.label]
        seen = replace(here, logits=Counted(here.logits, passes, rows))
        draws = noise.select(rows).spawn(member.stream)
        crafted, error = _tried(member, seen, clean, labels, threat, draws)
        last, answered = error or last, answered or error is None
        passes.forwards[rows] += 1
        with torch.no_grad():
            # Also of what raised: a device that is lost, or a network that answers no more, ends all here.
            logits = here.logits(crafted.images)
        if error is not None:
            raised[member.label][rows] = True
            continue
        z = crafted.images
        won = succeeded(here, logits, labels) & view.exact
        better = best.offer(rows, z, objective(here, logits, labels, "margin"), won)
        found_by[rows] = torch.where(won if view.exact else better, place, found_by[rows])
        done[rows] = won
        _take(notes, crafted.notes, member.label, rows, len(x))
    if last is not None and not answered:
        raise last
    notes |= {f"raised.{label}": rows for label, rows in raised.items()}
    for label, passes in spent.items():
        notes |= {f"forwards.{label}": passes.forwards, f"backwards.{label}": passes.backwards}
    return Crafted(best.images, {"found_by": found_by, **notes})


def _tried(
    member: Member, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness
) -> tuple[Crafted, Exception | None]:
    """Run a member; return its lawful images with its notes, or the clean ones and what it raised."""
    try:
        # What switches gradients off, and raises, does so for nobody else.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            returned = member.run(view, x.clone(), y.clone(), threat, noise)
        crafted = returned if isinstance(returned, Crafted) else Crafted(returned, {})
        if crafted.images.shape != x.shape:
            found, asked = tuple(crafted.images.shape), tuple(x.shape)
            raise ValueError(f"{member.label} returned images of the shape {found} for {asked}")
        for name, note in crafted.notes.items():
            if note.shape != y.shape:
                raise ValueError(f"{member.label}'s note {name!r} has the shape {tuple(note.shape)}")
        return Crafted(lawful(x, crafted.images.detach(), threat), crafted.notes), None
    except Exception as error:
        if (cause := beyond_the_code(error)) not in (None, error):
            raise cause from error
        if cause is error or not member.may_raise:
            raise
        # Its frames hold what it computed, and the next one needs the memory.
        clear_frames(error.__traceback__)
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        remark(f"{member.label} raised, and {len(x)} examples stay as they were before it: {said}")
        return Crafted(x, {}), error


class Spent:
    """The passes that a member spent on each example.

    Args:
        x: The batch's images (N, C, H, W).
    """

    def __init__(self, x: Images) -> None:
        self.forwards, self.backwards = (
            torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2)
        )


class Counted:
    """A view's logits; counts the passes, forward and backward, that each example is asked for.

    Args:
        ask: The logits.
        spent: What is counted on, of the whole batch.
        rows: Positions in the batch of the examples that are asked about, int64 (n,).
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], spent: Spent, rows: Tensor) -> None:
        self._ask, self._spent, self._rows = ask, spent, rows

    def __call__(self, z: Tensor) -> Tensor:
        """Return the logits of points (copies * n, C, H, W)."""
        answer = self._ask(z)
        share = len(z) / len(self._rows)
        self._spent.forwards[self._rows] += share
        if answer.requires_grad:
            answer.register_hook(lambda _: self._backward(share))
        return answer

    def _backward(self, share: float) -> None:
        self._spent.backwards[self._rows] += share

    def select(self, rows: Tensor) -> "Counted":
        """Return the callable for some of the examples."""
        return Counted(narrowed(self._ask, rows), self._spent, self._rows[rows])


def narrowed(ask: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a view's callable for some of its examples, where it knows examples.

    Args:
        ask: The callable.
        rows: Positions of the examples, int64 (n,).
    """
    found: Callable[[Tensor], Tensor] = getattr(ask, "select", lambda _: ask)(rows)
    return found


def lawful(x: Images, z: Images, threat: Threat) -> Images:
    """Return images in ball and box, and the clean one where more than rounding was missing to that.

    Args:
        x: Clean images (N, C, H, W).
        z: Moved images, of the same shape.
        threat: The norm and the radius.
    """
    finite = z.isfinite().flatten(1).all(1)
    z = torch.where(by_example(finite, x), z.to(x.dtype), x)
    near = threat.project(x, z) if threat.norm in ("linf", "l2") else z.clamp(0, 1)
    inside = (z - near).flatten(1).abs().amax(1) <= ROUNDING
    if threat.norm in ("l1", "l0"):
        room = ROUNDING * (x[0].numel() if threat.norm == "l1" else 0)
        inside &= threat.distance(x.double(), near.double()) <= threat.radius + room
    return torch.where(by_example(finite & inside, x), near, x)


def _take(notes: dict[str, Tensor], found: Mapping[str, Tensor], label: str, rows: Tensor, size: int) -> None:
    """Keep what a member notes of the examples `rows` among the notes of a batch of a size."""
    for name, values in found.items():
        united = name in _UNITED
        kept = notes.setdefault(name if united else f"{label}.{name}", values.new_zeros(size))
        kept[rows] = kept[rows] | values if united else values

"""An attack on a half-space: where it brings images whose least distance is known, which rules it breaks."""

import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from bench.doctor.halfspace import Halfspace
from bench.noise import Noise
from bench.protocols import (
    Crafted,
    Decision,
    Described,
    Explained,
    Features,
    Images,
    Inversion,
    Labels,
    Norm,
    Prototypes,
    Threat,
    View,
)
from bench.referee.instruments import QueryCounter, Watching, answers_only, instrument, no_access_view
from bench.referee.validation import ROUNDING
from bench.registry import AttackEntry
from bench.results.outcomes import RESERVED

Rule: TypeAlias = Literal["weights", "flags", "draws", "given", "form", "finite", "box", "budget", "notes"]
"""What an attack may break: a network's weights, its flags and modes, global random states, the images and
labels that it was given; the form of what it returns, its finiteness, the box, the budget, its notes."""


class Fault(NamedTuple):
    """A rule that an attack broke in one call."""

    rule: Rule
    """Which rule."""
    sentence: str
    """What it did."""


class Attempt(NamedTuple):
    """What came of one call of an attack."""

    crafted: Crafted
    """What it returned."""
    faults: tuple[Fault, ...]
    """The rules that it broke, in the order in which they are looked at."""

    @property
    def usable(self) -> bool:
        """Whether what was returned are finite images of the form that was given."""
        return not {each.rule for each in self.faults} & {"form", "finite"}


@dataclass
class Ground:
    """An attack with its settings, on a half-space."""

    entry: AttackEntry
    """The attack."""
    params: Mapping[str, Any]
    """A value for every parameter, as it is called with."""
    norm: Norm
    """The norm it is tried in."""
    plane: Halfspace
    """The half-space."""
    x: Images
    """Images, float64 (N, C, H, W)."""
    y: Labels
    """Their labels, int64 (N,)."""
    tick: Callable[[], None] = lambda: None
    """Called at every question, and may raise where time is over."""
    watch: Watching | None = None
    """Sees what is asked and answered; None: nobody does."""
    least: Tensor = field(init=False)
    """The least distances of the images, float64 (N,)."""

    def __post_init__(self) -> None:
        self.least = self.plane.least(self.x, self.norm)

    @property
    def name(self) -> str:
        """The attack, as messages say it."""
        return f"attack {self.entry.name!r}"

    @property
    def guides(self) -> Images:
        """An image of each class that the half-space names, black ones for the others."""
        found = self.x.new_zeros(self.plane.classes, *self.x.shape[1:])
        found[:2] = self.plane.examples(2, margin=8.0)[0]
        return found

    def view(self, rows: Tensor, *, towards: bool, exact: bool, nan: bool) -> View:
        """Return what the attack would be handed in a run.

        Args:
            rows: Positions of the examples, int64 (n,).
            towards: Whether the other label is its target.
            exact: Whether a success on the view is a success.
            nan: Whether all logits are NaN.
        """
        counter = QueryCounter.of(len(rows), torch.device("cpu"))
        if self.entry.blind:
            return no_access_view(counter)

        def logits(z: Tensor) -> Tensor:
            self.tick()
            answer: Tensor = self.plane(z)
            return answer * math.nan if nan else answer

        if self.entry.access == "decision":
            seen = answers_only(lambda z: Decision.of(logits(z)), self.plane.classes)
        elif self.entry.space == "inversion":
            seen = Inversion(
                logits,
                invert=torch.clone,
                energy=lambda z, x: (z - x).square().flatten(1).sum(1),
                classify=lambda z, _: logits(z),
            )
        elif self.entry.space == "features":
            seen = Features(
                logits,
                described=lambda z: Described(found := logits(z), found[:, :2]),
                centres=torch.tensor([[6.0, -6.0], [-6.0, 6.0]] + [[0.0, 0.0]] * (self.plane.classes - 2)),
                guides=self.guides,
            )
        elif self.entry.space == "prototypes":
            seen = Prototypes(logits, explained=lambda z: Explained(logits(z), self.plane.prototypes(z)))
        elif self.entry.space == "latent":
            # Codes whose images cannot leave the box.
            seen = View(
                lambda z: logits(z.sigmoid()), encode=lambda x: x.logit(eps=1e-6), decode=torch.sigmoid
            )
        else:
            seen = View(logits)
        target = 1 - self.y[rows] if towards else None
        return instrument(seen, counter, self.entry.access, target=target, exact=exact, watch=self.watch)

    def run(
        self,
        radius: float,
        *,
        rows: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        towards: bool = False,
        exact: bool = True,
        nan: bool = False,
    ) -> Attempt:
        """Attack some of the examples, and look whether what it returns is lawful and nothing else changed.

        Args:
            radius: The radius; infinite for an attack that moves as little as it can.
            rows: Positions of the examples, int64 (n,); None for all.
            dtype: The dtype of the images.
            towards: Whether the other label is its target.
            exact: Whether a success on the view is a success.
            nan: Whether all logits are NaN.

        Returns:
            The images, and the rules that it broke.
        """
        rows = torch.arange(len(self.y)) if rows is None else rows
        x, y = self.x[rows].to(dtype), self.y[rows]
        given = x.clone(), y.clone()
        noise = Noise("check", rows, dtype=dtype, shard="check" if self.entry.rng == "shard" else None)
        threat = Threat(self.norm, radius)
        view = self.view(rows, towards=towards, exact=exact, nan=nan)
        # Whatever it turns off is on again for the next call.
        with torch.enable_grad(), untouched(self.plane) as changed:
            returned = self.entry.make(view, x, y, threat, noise, **self.params)
        faults = [
            Fault(rule, f"{self.name} changed something that is not its own: {what}")
            for rule, what in changed
        ]
        if not (torch.equal(x, given[0]) and torch.equal(y, given[1])) or x.requires_grad:
            faults.append(Fault("given", f"{self.name} changed the images or the labels that it was given"))
        crafted = returned if isinstance(returned, Crafted) else Crafted(returned, {})
        when = "where logits are NaN" if nan else f"at radius {radius:.3g}"
        return Attempt(crafted, (*faults, *unlawful(crafted, given[0], threat, self.name, when)))

    def held(self, images: Images) -> Tensor:
        """Return which images are still on their side of the plane, bool (n,).

        Args:
            images: What became of the first n examples, (n, C, H, W).
        """
        with torch.no_grad():
            answers: Labels = self.plane(images).argmax(1)
        return answers.eq(self.y[: len(images)])

    def farther(self, images: Images) -> Tensor:
        """Return how many times as far as it needed to each image went, float64 (n,).

        Args:
            images: What became of the first n examples, (n, C, H, W).
        """
        n = len(images)
        # From the images as they were given: to l0 a rounding is a change.
        given = self.x[:n].to(images.dtype).double()
        return Threat(self.norm).distance(given, images.double()) / self.least[:n]

    def gained(self, images: Images) -> Tensor:
        """Return which share of the way to the plane each image went, float64 (n,): below 0 away from it.

        Args:
            images: What became of the first n examples, (n, C, H, W).
        """
        with torch.no_grad():
            before, after = (self.plane.margin(each.double()) for each in (self.x[: len(images)], images))
        return ((before - after) / before).clamp_max(1)

    def apart(self, radius: float, n: int) -> float:
        """Return how far some examples end from where they end in other company, or in another order.

        Args:
            radius: The radius; infinite for an attack that moves as little as it can.
            n: How many examples, the first ones: 4 or more.
        """
        return apart(lambda rows: self.run(radius, rows=rows, dtype=torch.float64).crafted.images, n)


def apart(attacked: Callable[[Tensor], Images], n: int) -> float:
    """Return how far some examples end from where they end in other company, or in another order.

    Args:
        attacked: Attacks examples (m,) and returns their images (m, C, H, W).
        n: How many examples, the first ones: 4 or more.
    """
    everyone = torch.arange(n)
    whole = attacked(everyone)
    cuts = (everyone.flip(0), everyone[:3], everyone[3:])
    return max(float((attacked(rows) - whole[rows]).abs().max()) for rows in cuts)


def unlawful(crafted: Crafted, x: Images, threat: Threat, name: str, when: str) -> Iterator[Fault]:
    """Look at form, finiteness, box and budget of returned images, and at the form of notes.

    Args:
        crafted: What an attack returned.
        x: The images that it was given, (N, C, H, W).
        threat: The norm and the radius that it was given.
        name: The attack, for the sentences.
        when: In which case, for the sentences.

    Yields:
        The rules that it broke; none after a form that cannot be looked at.
    """
    z = crafted.images
    if not isinstance(z, Tensor):
        yield Fault("form", f"{name} returned a {type(z).__name__}, not a tensor of images")
        return
    if (z.shape, z.dtype, z.device) != (x.shape, x.dtype, x.device):
        yield Fault(
            "form",
            f"{name} returned {z.dtype} {tuple(z.shape)} on {z.device} for {x.dtype} {tuple(x.shape)} "
            f"on {x.device}",
        )
        return
    if z.requires_grad:
        yield Fault("form", f"{name} returned images that still hold a graph")
        return
    if not z.isfinite().all():
        yield Fault("finite", f"{name} returned images that are not finite, {when}")
        return
    outside = float(torch.maximum(-z, z - 1).max())
    if outside > ROUNDING:
        yield Fault("box", f"{name} left the box by {outside:.3g}, {when}")
    far = float(threat.distance(x.double(), z.double()).max()) - threat.radius
    room = 0.0 if threat.norm == "l0" else ROUNDING * (1 if threat.norm == "linf" else x[0].numel() ** 0.5)
    if far > room:
        yield Fault("budget", f"{name} left the budget by {far:.3g}, {when}")
    for note, column in crafted.notes.items():
        if note in RESERVED:
            yield Fault("notes", f"{name}: the note {note!r} has the name of an outcome")
        if not isinstance(column, Tensor) or column.shape != (len(x),):
            said = f"{name}: the note {note!r} must be a tensor (N,), one value for each example"
            yield Fault("notes", said)


@contextmanager
def untouched(model: nn.Module, *, draws: bool = False) -> Iterator[list[tuple[Rule, str]]]:
    """Find out what is changed in the block of what is not its own.

    Args:
        model: A network that is asked in the block.
        draws: Whether global random states may be other ones after it.

    Yields:
        A list, filled at the end of the block: the rules that were broken, and what has changed.
    """

    def state() -> dict[tuple[Rule, str], object]:
        tensors = [*model.parameters(), *model.buffers()]
        numbers = np.random.get_state(legacy=False)
        return {
            ("weights", "weights or buffers"): [
                (each.data_ptr(), each.double().sum().item()) for each in tensors
            ],
            ("flags", "gradients on the parameters"): [each.grad is None for each in tensors],
            ("flags", "requires_grad of the parameters"): [each.requires_grad for each in tensors],
            ("flags", "training or evaluation mode"): [each.training for each in model.modules()],
            ("flags", "whether autograd is on"): torch.is_grad_enabled(),
            ("draws", "torch's global random state"): None
            if draws
            else torch.get_rng_state().numpy().tobytes(),
            ("draws", "numpy's global random state"): None if draws else pickle.dumps(numbers),
            ("draws", "Python's global random state"): None if draws else random.getstate(),
        }

    before, changed = state(), list[tuple[Rule, str]]()
    yield changed
    # As texts: a sum that is NaN equals itself.
    changed += [what for what, after in state().items() if str(after) != str(before[what])]

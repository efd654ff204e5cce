"""A fitted defense with the images it is examined on: how tests ask it, look through its views and attack it.

Letters in shapes: N examples, C channels, H rows, W columns, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.losses import eot
from bench.noise import Noise, seed_of
from bench.protocols import Images, Labels, Split, Threat, View
from bench.referee.answers import CHUNK, ask
from bench.referee.freezing import frozen
from bench.referee.instruments import QueryCounter, instrument
from bench.referee.validation import validate
from bench.registry import DefenseEntry, ViewEntry, bind, bound

DRAWS = 8
"""Answers that a view of a random defense averages over."""

STEPS = 20
"""Steps of the PGD that other attacks are compared with."""

Columns = Mapping[str, Tensor]
"""Answers of a read-out, as `bench.runner.evaluate.ask` returns them."""


@dataclass(frozen=True)
class Sight:
    """A view of a defense, with the parameters that it is called with."""

    entry: ViewEntry
    """What is declared of the view."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters; what is left out has its default."""

    @property
    def smooth(self) -> bool:
        """Whether it is of images, with gradients."""
        return self.entry.space == "pixel" and self.entry.gradient


@dataclass(frozen=True, eq=False)
class Patient:
    """A fitted defense under examination."""

    model: nn.Module
    """The fitted defense."""
    entry: DefenseEntry
    """What is declared of it."""
    sights: Sequence[Sight]
    """The views to examine, the one to attack through first."""
    readout: str
    """The read-out that is scored."""
    images: Images
    """Clean images, float32 (N, C, H, W) in [0, 1], on the CPU."""
    labels: Labels
    """Their true labels, int64 (N,)."""
    threat: Threat
    """What an attack may do: a norm of linf or l2, and a finite radius."""
    classes: int
    """K, without a refusal."""
    random: bool = False
    """Whether the defense is declared random."""
    train: Split | None = None
    """The images that it was fitted to, where they are there."""
    held: Tensor | None = None
    """The examples that all attacks of the row left unbroken, bool (N,); None where nobody knows."""
    elsewhere: Callable[[Images], Columns] | None = None
    """Asks the same defense in another process; None where there is none."""
    kept: dict[Any, Images] = field(default_factory=dict)
    """Images of attacks that were run already, by their settings."""

    def __post_init__(self) -> None:
        if self.readout not in self.entry.readouts:
            raise ValueError(f"{self.entry.name} has no read-out {self.readout!r}")

    @cached_property
    def device(self) -> torch.device:
        """The device of the defense."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    @cached_property
    def first(self) -> Columns:
        """The answers to the clean images when they were asked about first."""
        with self.still("clean"):
            return self.answers(self.images)

    @cached_property
    def exact(self) -> Sight | None:
        """The first view of images, with gradients, whose arg-max is what is scored."""
        return next((each for each in self.sights if each.smooth and self.is_exact(each)), None)

    @cached_property
    def attacked(self) -> Sight | None:
        """The view to attack through: an exact one, else any with gradients of images."""
        return self.exact or next((each for each in self.sights if each.smooth), None)

    @cached_property
    def knows(self) -> bool:
        """Whether an exact view of images knows of a refusal."""
        seen = (each for each in self.sights if self.is_exact(each) and each.entry.space == "pixel")
        return any(self.verdict(each, self.images[:1])[1].shape[1] > self.classes for each in seen)

    @property
    def smooth(self) -> list[Sight]:
        """The views of images with gradients that read what is scored; without any, all with gradients."""
        found = [each for each in self.sights if each.smooth]
        return [each for each in found if self.is_exact(each)] or found

    def is_exact(self, sight: Sight) -> bool:
        """Return whether a view's arg-max is declared to be what is scored.

        Args:
            sight: The view.
        """
        return self.readout in sight.entry.exact_for

    @contextmanager
    def still(self, *words: object) -> Iterator[None]:
        """Keep the defense as it is in the block: evaluation mode, no gradients of weights, seeded draws.

        Args:
            *words: What the global generators are seeded by.

        Yields:
            Nothing.
        """
        with frozen(self.model, seed=seed_of("doctor", *words)):
            yield

    def few(self, n: int) -> "Patient":
        """Return the same defense with the first n images.

        Args:
            n: How many, 1 or more.
        """
        held = None if self.held is None else self.held[:n]
        return replace(self, images=self.images[:n], labels=self.labels[:n], held=held, kept={})

    def answers(self, z: Images) -> Columns:
        """Ask the read-out, without gradients.

        Args:
            z: Images (n, C, H, W) on the CPU.

        Returns:
            Columns of n answers.
        """
        with torch.no_grad():
            return ask(self.model, z, self.readout, self.device)

    def broken(self, z: Images, rows: Tensor | None = None) -> Tensor:
        """Return where the read-out accepts an image and answers wrongly.

        Args:
            z: Images (n, C, H, W) on the CPU.
            rows: Of which examples, int64 (n,); None for all, in their order.

        Returns:
            bool (n,).
        """
        answers = self.answers(z)
        y = self.labels if rows is None else self.labels[rows]
        return (answers["label"] != y) & ~answers["rejected"]

    def view(self, sight: Sight, n: int | None = None, *, draws: int | None = None) -> View:
        """Return a view as an attack gets it: counted, centred, cut into chunks.

        Args:
            sight: The view.
            n: For how many examples; None for all.
            draws: Answers to average over; None: `DRAWS` of a random defense, 1 of any other.

        Returns:
            The view.
        """
        return self.shown(self.bare(sight), sight, n, draws=draws)

    def bare(self, sight: Sight) -> View:
        """Return a view as the defense gives it.

        Args:
            sight: The view.
        """
        seen: View = getattr(self.model, sight.entry.method)(**bind(sight.entry, sight.params))
        return seen

    def shown(self, seen: View, sight: Sight, n: int | None = None, *, draws: int | None = None) -> View:
        """Return a view that the defense gave, or a part of one, as an attack gets it.

        Args:
            seen: What the defense gave.
            sight: The view that it is, or is a part of.
            n: As in `view`.
            draws: As in `view`.

        Returns:
            The view: counted, centred if `seen` is, cut into chunks.
        """
        counter = QueryCounter.of(len(self.labels) if n is None else n, self.device)
        made = instrument(
            seen,
            counter,
            "gradient",
            target=None,
            exact=self.is_exact(sight) and not self.random,
            chunk=CHUNK[self.device.type],
        )
        return eot(made, draws or (DRAWS if self.random else 1))

    def verdict(self, sight: Sight, z: Images) -> tuple[Labels, Tensor]:
        """Return what a view answers, without gradients.

        Args:
            sight: The view.
            z: Images (n, C, H, W) on the CPU.

        Returns:
            The classes, int64 (n,), where K is a refusal; and the logits, (n, K) or (n, K + 1).
        """
        view = self.view(sight, len(z))
        with torch.no_grad():
            logits = view.logits(view.encode(z.to(self.device)))
        logits = (logits.mean(0) if logits.dim() == 3 else logits).cpu()
        return logits.argmax(1), logits

    def attack(
        self,
        use: Mapping[str, Any],
        *,
        rows: Tensor | None = None,
        threat: Threat | None = None,
        scale: float = 1.0,
        draws: int | None = None,
    ) -> Images:
        """Attack some of the examples through the view to attack through.

        What the referee does not allow is the clean image.

        Args:
            use: The attack and its settings, as a task file writes them.
            rows: The examples, int64 (n,); None for all.
            threat: What the attack may do; None: the patient's threat.
            scale: What the view's logits are multiplied by, above 0.
            draws: As in `view`.

        Returns:
            Images (n, C, H, W) on the CPU.
        """
        assert self.attacked is not None
        rows = torch.arange(len(self.labels)) if rows is None else rows
        x, y = self.images[rows].to(self.device), self.labels[rows].to(self.device)
        threat = threat or self.threat
        found = bound(use)
        with self.still(found.stream, rows.tolist()):
            view = self.view(self.attacked, len(rows), draws=draws)
            if scale != 1:
                view = replace(view, logits=Scaled(view.logits, scale))
            noise = Noise(("doctor", found.stream), rows, device=self.device)
            returned = found(view, x.clone(), y.clone(), threat, noise)
        return validate(x, returned, threat).images.cpu()

    def climbed(self, loss: str, *, scale: float = 1.0) -> Images:
        """Return the images of a short PGD through the view to attack through, run once.

        Args:
            loss: The loss that is climbed, as in `bench.objective`.
            scale: What the view's logits are multiplied by, above 0.

        Returns:
            Images (N, C, H, W) on the CPU.
        """
        if (loss, scale) not in self.kept:
            use = {"use": "pgd", "steps": STEPS, "loss": loss}
            self.kept[loss, scale] = self.attack(use, scale=scale)
        return self.kept[loss, scale]

    def within(self, radius: float) -> Threat:
        """Return the patient's threat with another radius.

        Args:
            radius: The radius, in the threat's units.
        """
        return Threat(self.threat.norm, radius)


class Scaled:
    """A callable whose answers are multiplied by a number.

    Args:
        call: The callable.
        scale: The number.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], scale: float) -> None:
        self._call, self._scale = call, scale

    def __call__(self, z: Tensor) -> Tensor:
        """Return the scaled answers to points."""
        return self._call(z) * self._scale

    def select(self, rows: Tensor) -> "Scaled":
        """Return the callable for the examples at `rows`."""
        return Scaled(self._call.select(rows), self._scale)  # type: ignore[attr-defined]


def steps_away(x: Images, threat: Threat, *words: object) -> Images:
    """Return images moved to a random place of the ball's corners, in the box.

    Args:
        x: Images (n, C, H, W) on the CPU.
        threat: The ball, in linf or l2.
        *words: What the draws are seeded by.

    Returns:
        Images (n, C, H, W).
    """
    noise = Noise(("doctor", *words), torch.arange(len(x)))
    shape = tuple(x.shape[1:])
    if threat.norm == "linf":
        return threat.project(x, x + threat.radius * noise.signs(shape))
    move = noise.normal(shape)
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, 1, 1, 1)
    return threat.project(x, x + threat.radius * move / length)

"""What authors of attacks and defenses call in their own tests: `check_attack`, `check_planted` and
`check_defense`.

The first and the last raise AssertionError with a sentence. `check_attack` plays on a `Halfspace`, where
the nearest wrong image is known exactly, and through the same watch as in a run; `check_planted` counts
what is found where a wrong image is known to be.
"""

import copy
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, autograd, nn

from bench.losses import objective
from bench.noise import Noise
from bench.protocols import (
    Crafted,
    Decision,
    Described,
    Epoch,
    Explained,
    Features,
    Fitting,
    Images,
    Inversion,
    Labels,
    Norm,
    Prototypes,
    Shape,
    Split,
    Stateful,
    Threat,
    View,
)
from bench.registry import ATTACKS, DEFENSES, AttackEntry, DefenseEntry, ViewEntry, bind, discover, view
from bench.results.outcomes import RESERVED
from bench.runner.referee import QueryCounter, answers_only, instrument, no_access_view, reseed
from bench.runner.training import Trainer

ROUNDING = 1e-6
"""How far, per value, an image may lie beyond the box or the budget."""


FEW = 5
"""How many epochs a defense is fitted for, unless `epochs` is said."""


class Halfspace(nn.Module):
    """A linear classifier whose least adversarial distances are known in closed form.

    It answers label 1 where <w, x> + b > 0, label 0 elsewhere, and no other label ever. Its plane goes
    through the grey image (every pixel 0.5).

    Args:
        shape: The form of an image, and the number of classes (at least 2).
        seed: The seed of the weights: of magnitude uniform in [0.2, 1], of either sign.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        size = torch.empty(shape[:3]).uniform_(0.2, 1.0, generator=draw)
        sign = torch.empty(shape[:3]).bernoulli_(0.5, generator=draw) * 2 - 1
        self.weight = nn.Parameter(size * sign)
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())
        self.classes = shape.classes

    def margin(self, x: Images) -> Tensor:
        """Return the signed margin <w, x> + b.

        Args:
            x: Images (N, C, H, W) in any floating-point type.

        Returns:
            The margin of each image, (N,): above 0 for label 1.
        """
        # Example by example, in one order: a matrix product may sum otherwise in another batch.
        return (x * self.weight.to(x.dtype)).flatten(1).sum(1) + self.bias.to(x.dtype)

    def forward(self, x: Images) -> Tensor:
        """Return logits: half the margin for label 1, minus that for label 0, the others far below.

        Args:
            x: Images (N, C, H, W) in any floating-point type.

        Returns:
            Logits (N, K).
        """
        half = self.margin(x) / 2
        others = [torch.full_like(half, -20.0 - each) for each in range(self.classes - 2)]
        return torch.stack([-half, half, *others], dim=1)

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        """Return the view of the logits (N, K), which the read-out ``label`` is the arg-max of."""
        return View(self)

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Learn nothing.

        Args:
            train: Not looked at.
            fitting: Not looked at.
        """

    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer with the arg-max of the logits.

        Args:
            x: Images (N, C, H, W).
            readout: Not looked at: there is one answer.

        Returns:
            A label for each image, none of them refused.
        """
        return Decision.of(self(x))

    @torch.no_grad()
    def least(self, x: Images, norm: Norm) -> Tensor:
        """Return how far each image is from the nearest point of the box [0, 1] that lies on the plane.

        Args:
            x: Images (N, C, H, W) in [0, 1].
            norm: The norm of the distance; ``l0`` counts pixels, whose channels move as one.

        Returns:
            The exact distances, float64 (N,); infinite where the box keeps an image from the plane.
        """
        gain, need, room, _ = self._needs(x)
        match norm:
            case "linf" | "l2":
                speed = torch.ones_like(gain) if norm == "linf" else gain
                move = torch.minimum(_duration(gain, need, room, speed) * speed, room)
                distance = torch.linalg.vector_norm(move, math.inf if norm == "linf" else 2, dim=1)
            case "l1":
                # The heaviest pixels first, each as far as it goes: what it costs is convex in the gain.
                order = gain.argsort(1, descending=True)
                gained, moved = (_before(_along(each, order)) for each in (gain * room, room))
                distance = (moved + (need - gained) / _along(gain, order)).amax(1)
            case "l0":
                # A pixel counts once, however many of its channels move.
                pixels = (gain * room).unflatten(1, x.shape[1:]).sum(1).flatten(1)
                best = pixels.sort(1, descending=True).values.cumsum(1)
                distance = (best < need).sum(1).double() + 1
        return torch.where((gain * room).sum(1) < need[:, 0], math.inf, distance)

    @torch.no_grad()
    def prototypes(self, x: Images) -> Tensor:
        """Return what each class would draw of images, as a `Prototypes` view shows it.

        Labels 0 and 1 draw the image itself on their own side of the plane, and from the other side the
        nearest image (in l2) with a margin of 0.5; every other class draws the image itself.

        Args:
            x: Images (N, C, H, W) in [0, 1].

        Returns:
            Images (N, K, C, H, W).
        """
        gain, need, room, sign = self._needs(x)
        move = sign * torch.minimum(_duration(gain, need + 0.5, room, gain) * gain, room)
        across = x + move.view_as(x).to(x.dtype)
        above = (self.margin(x) > 0)[:, None, None, None]
        drawn = [torch.where(above, across, x), torch.where(above, x, across)]
        return torch.stack([*drawn, *[x] * (self.classes - 2)], dim=1)

    def _needs(self, x: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what each pixel gains by a move of 1 (N, D), what is needed in all (N, 1), how much room the
        box leaves each, and to which side.
        """
        margin, start = self.margin(x.double())[:, None], x.double().flatten(1)
        weight = self.weight.detach().double().flatten().expand_as(start)
        up = (weight > 0) ^ (margin > 0)
        return weight.abs(), margin.abs(), torch.where(up, 1 - start, start), torch.where(up, 1.0, -1.0)

    @torch.no_grad()
    def examples(self, n: int, *, seed: int = 0, margin: float = 3.0) -> tuple[Images, Labels]:
        """Return images at a margin from the plane, on either side in turn, with some pixels black or white.

        Args:
            n: The number of images, at least 1.
            seed: The seed of the draws.
            margin: The margin |<w, x> + b| of each image, above 0, before values are clamped to [0, 1].

        Returns:
            Images, float64 (n, C, H, W) in [0, 1], and their labels, int64 (n,): 0 and 1 in turn.
        """
        draw = torch.Generator().manual_seed(seed)
        kind = torch.empty(n, *self.weight.shape).uniform_(generator=draw)
        x = torch.empty_like(kind).uniform_(0.25, 0.75, generator=draw).double()
        inside = kind >= 0.1
        x = torch.where(inside, x, (kind < 0.05).double())
        labels = torch.arange(n) % 2
        weight = self.weight.detach().double() * inside
        missing = (labels * 2 - 1) * margin - self.margin(x)
        x = x + weight * (missing / weight.square().flatten(1).sum(1))[:, None, None, None]
        return x.clamp(0, 1), labels


def _duration(gain: Tensor, need: Tensor, room: Tensor, speed: Tensor) -> Tensor:
    """Return the t (N, 1) at which moves of min(t * speed, room) have gained what is needed.

    For some t that is the best move, and what it gains is concave in t.
    """
    order = (room / speed).argsort(1)
    gained = _before(_along(gain * room, order))
    rate = _along(gain * speed, order).flip(1).cumsum(1).flip(1)
    return ((need - gained) / rate).amax(1, keepdim=True)


def _along(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, order)


def _before(values: Tensor) -> Tensor:
    """Return, at each place, the sum of what comes before it."""
    return values.cumsum(1) - values


def check_attack(name: str, norm: Norm, /, *, within: float = 1.2, **params: Any) -> None:
    """Check an attack on a half-space, where the nearest adversarial image is known.

    The attack must cross the plane with `within` times the radius that is needed; one that moves as little as
    it can must stop within as many times the least distance. Both hold towards a given label, too, and where
    the attack may not stop early. In every case, also with 0.8 times the least radius and on NaN logits:
    images come back finite, of the given shape and type, in the box and in the budget; the images given,
    gradients, flags and random states outside are left alone; the same draws give the same images. An attack
    that is ``rng="example"`` gives an example the same image in any company and order.

    Args:
        name: The registered name.
        norm: The norm to try it in.
        within: How many times the needed radius or the least distance is allowed, at least 1. A greedy or a
            random search may need more than 1.2; ``math.inf`` for one that cannot follow a plane and need not
            cross it.
        **params: Parameters of the attack, where its defaults will not do.

    Raises:
        AssertionError: The attack does not do one of these; the sentence says which.
        InputError: There is no such attack, or it has no such parameter.
    """
    discover()
    entry = ATTACKS[name]
    _expect(norm in entry.norms, f"attack {name!r} is made for {sorted(entry.norms)}, not for {norm!r}")
    trial = _Trial(entry, norm, bind(entry, params), within)
    enough = scarce = math.inf
    if entry.kind == "fixed-budget":
        enough, scarce = within * float(trial.least.max()), 0.8 * float(trial.least.min())
    crafted = trial.run(enough)
    again = float((trial.run(enough).images - crafted.images).abs().max())
    _expect(
        again == 0, f"attack {name!r} moved otherwise (by {again:.3g}) when asked again with the same draws"
    )
    if not entry.blind and math.isfinite(within):
        trial.crosses(crafted, f"with {within:g} times the radius that is needed")
        if entry.targeted:
            trial.crosses(trial.run(enough, towards=True), "towards a given label")
        pushed = trial.run(enough, exact=False)
        if entry.kind == "fixed-budget":
            trial.crosses(pushed, "where it may not stop early")
            trial.run(scarce)
    if entry.access in ("gradient", "score"):
        trial.run(enough, nan=True)
    if entry.rng == "example":
        trial.independent(enough)


class _Trial:
    """An attack, and the half-space that it is tried on."""

    def __init__(self, entry: AttackEntry, norm: Norm, params: Mapping[str, Any], within: float) -> None:
        self.entry, self.norm, self.params, self.within = entry, norm, params, within
        self.name = f"attack {entry.name!r}"
        self.plane = Halfspace(Shape(3, 5, 4, max(2, entry.least_classes)))
        self.x, self.y = self.plane.examples(8)
        self.least = self.plane.least(self.x, norm)

    def view(self, rows: Tensor, *, towards: bool, exact: bool, nan: bool) -> View:
        """Return what the attack would be handed in a run."""
        counter = QueryCounter.of(len(rows), torch.device("cpu"))
        if self.entry.blind:
            return no_access_view(counter)

        def logits(z: Tensor) -> Tensor:
            answer: Tensor = self.plane(z)
            return answer * math.nan if nan else answer

        if self.entry.access == "decision":
            seen = answers_only(lambda z: self.plane.decide(z, "label"), self.plane.classes)
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
                centres=torch.tensor([[6.0, -6.0], [-6.0, 6.0]]),
                guides=self.plane.examples(2, margin=8.0)[0],
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
        return instrument(seen, counter, self.entry.access, target=target, exact=exact)

    def run(
        self,
        radius: float,
        *,
        rows: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        towards: bool = False,
        exact: bool = True,
        nan: bool = False,
    ) -> Crafted:
        """Attack some of the examples, and see that what it returns is lawful and nothing else changed."""
        rows = torch.arange(len(self.y)) if rows is None else rows
        x, y = self.x[rows].to(dtype), self.y[rows]
        given = x.clone(), y.clone()
        noise = Noise("check", rows, dtype=dtype, shard="check" if self.entry.rng == "shard" else None)
        threat = Threat(self.norm, radius)
        with _untouched(self.plane, self.name):
            returned = self.entry.make(
                self.view(rows, towards=towards, exact=exact, nan=nan), x, y, threat, noise, **self.params
            )
        _expect(
            torch.equal(x, given[0]) and torch.equal(y, given[1]) and not x.requires_grad,
            f"{self.name} changed the images or the labels that it was given",
        )
        crafted = returned if isinstance(returned, Crafted) else Crafted(returned, {})
        self.lawful(crafted, x, threat, "where logits are NaN" if nan else f"at radius {radius:.3g}")
        return crafted

    def lawful(self, crafted: Crafted, x: Images, threat: Threat, when: str) -> None:
        """Expect images of the given form, in the box and in the budget, and notes by example."""
        z = crafted.images
        form = (z.shape, z.dtype, z.device)
        _expect(
            form == (x.shape, x.dtype, x.device),
            f"{self.name} returned {z.dtype} {tuple(z.shape)} on {z.device} for {x.dtype} {tuple(x.shape)} "
            f"on {x.device}",
        )
        _expect(not z.requires_grad, f"{self.name} returned images that still hold a graph")
        _expect(bool(z.isfinite().all()), f"{self.name} returned images that are not finite, {when}")
        outside = float(torch.maximum(-z, z - 1).max())
        _expect(outside <= ROUNDING, f"{self.name} left the box by {outside:.3g}, {when}")
        far = float(threat.distance(x.double(), z.double()).max()) - threat.radius
        room = (
            0.0 if threat.norm == "l0" else ROUNDING * (1 if threat.norm == "linf" else x[0].numel() ** 0.5)
        )
        _expect(far <= room, f"{self.name} left the budget by {far:.3g}, {when}")
        for note, column in crafted.notes.items():
            _expect(note not in RESERVED, f"{self.name}: the note {note!r} has the name of an outcome")
            _expect(
                isinstance(column, Tensor) and column.shape == (len(x),),
                f"{self.name}: the note {note!r} must be a tensor (N,), one value for each example",
            )

    def crosses(self, crafted: Crafted, when: str) -> None:
        """Expect every image beyond the plane, and no farther than it need be."""
        held = self.plane(crafted.images).argmax(1) == self.y
        # From the images as they were given: to l0 a rounding is a change.
        given = self.x.to(crafted.images.dtype).double()
        distance = Threat(self.norm).distance(given, crafted.images.double())
        _expect(
            not held.any(),
            f"{self.name} left {int(held.sum())} of {len(held)} images on their side of the plane, {when}",
        )
        ratio = float((distance / self.least).max())
        if self.entry.kind == "minimum-norm":
            _expect(
                ratio <= self.within, f"{self.name} went {ratio:.3g} times as far as it needed to, {when}"
            )

    def independent(self, radius: float) -> None:
        """Expect an example to end where it ends, in whatever company and order it is attacked."""
        whole = self.run(radius, dtype=torch.float64).images
        everyone = torch.arange(len(whole))
        for rows in (everyone.flip(0), everyone[:3], everyone[3:]):
            apart = float((self.run(radius, rows=rows, dtype=torch.float64).images - whole[rows]).abs().max())
            _expect(
                apart <= ROUNDING,
                f'{self.name} is declared rng="example", but examples end elsewhere, by {apart:.3g}, when '
                "they are attacked in another order or company",
            )


def check_defense(
    name: str,
    shape: Shape,
    *,
    prepare: Callable[[Any], None] | None = None,
    unfitted: str | None = None,
    **params: Any,
) -> None:
    """Check a defense on random images, untrained, and then fitted to a few images.

    Its views answer finite logits (N, K), with one column more for a refusal, and the same with and without
    autograd; where a gradient is declared, it is finite, and zero for no image; pixel views encode and decode
    to the image itself; a view that reads a read-out agrees with it. Read-outs return a label, a refusal and
    a score for each image. Weights that were saved and restored answer alike. Unless the defense is declared
    random, asking twice, or in another company and order, changes nothing. Asking leaves weights, gradients,
    flags, random states and the images as they were.

    A fit that is broken off after every epoch, and gone on with by a defense that was built anew, ends with
    the weights of one that was not, to the bit; and these alone, in a defense that was built anew, answer as
    the fitted one does.

    Args:
        name: The registered name.
        shape: The form of an image, and the number of classes.
        prepare: Called with the untrained module first, where that cannot answer: to set thresholds, say.
        unfitted: The reason why no fit can be tried; None: it is tried.
        **params: Parameters of the defense; a module for a part. Each `fitting.epochs` is given 5 epochs, or
            ``epochs``, where that parameter is named; a fit of one epoch is broken off at its end alone.

    Raises:
        AssertionError: The defense does not do one of these; the sentence says which.
        InputError: There is no such defense, or it has no such parameter.
    """
    discover()
    entry = DEFENSES[name]
    exam = _Exam(entry, shape, params)
    if prepare is not None:
        prepare(exam.model)
    exam.declared()
    for readout in entry.readouts:
        exam.readout(readout)
    for view_entry in entry.views.values():
        exam.view(view_entry)
    exam.restored()
    if unfitted is None:
        exam.resumed()
        exam.learned()


class _Exam:
    """A defense, and the images that it is asked about."""

    def __init__(self, entry: DefenseEntry, shape: Shape, params: Mapping[str, Any]) -> None:
        self.entry, self.shape = entry, shape
        self.name = f"defense {entry.name!r}"
        self.parts = {key: value for key, value in params.items() if isinstance(value, nn.Module)}
        self.given = bind(entry, {**params, **dict.fromkeys(self.parts, "part")})
        self.random = entry.draws({**self.given, **self.parts})
        self.most = params.get("epochs", FEW)
        self.model = self.built(0)
        self.x = torch.empty(6, *shape[:3]).uniform_(generator=torch.Generator().manual_seed(0))

    def made(self, *, halved: bool = False) -> Any:
        """Return the defense as its constructor leaves it, with copies of its parts, `halved` or as given."""
        parts = copy.deepcopy(self.parts)
        if halved:
            for part in parts.values():
                for value in part.state_dict().values():
                    # In place, also where it is expanded or frozen; whole numbers count, or choose.
                    value.mul_(0.5) if value.is_floating_point() else None
        return self.entry.make(self.shape, **{**self.given, **parts})

    def built(self, seed: int) -> Any:
        """Return the defense as a run would build it to be asked."""
        with _drawing(seed):
            return self.made(halved=seed > 0).eval().requires_grad_(False)

    def fitted(self, keep: Path | None = None) -> Any:
        """Return the defense fitted to a few images; with a folder, broken off after each epoch."""
        train = self.examples()
        while True:
            fitting = _Fitting(train, self.parts, self.most, keep)
            with _drawing(0):
                model = self.made()
                try:
                    model.fit(train, fitting)
                except _Killed:
                    continue
            return model.eval().requires_grad_(False)

    def examples(self) -> Split:
        """Return some images of each class: noise around an image of its own."""
        classes, form = self.shape.classes, tuple(self.shape[:3])
        labels = torch.arange(max(2 * classes, 8)) % classes
        draw = torch.Generator().manual_seed(1)
        centres = torch.empty(classes, *form).uniform_(generator=draw)
        noise = torch.empty(len(labels), *form).uniform_(-0.2, 0.2, generator=draw)
        return Split((centres[labels] + noise).clamp(0, 1), labels, torch.arange(len(labels)), "check")

    @contextmanager
    def asking(self, model: Any = None) -> Iterator[None]:
        """See that asking changes nothing; where the defense draws, the same draws every time."""
        given, asked = self.x.clone(), self.model if model is None else model
        with torch.random.fork_rng(devices=[]), _untouched(asked, self.name, draws=self.random):
            if self.random:
                torch.manual_seed(0)
            yield
        _expect(torch.equal(self.x, given), f"{self.name} changed the images that it was given")

    def declared(self) -> None:
        """Expect what is declared to be there."""
        entry = self.entry
        missing = entry.inference - set(self.given)
        _expect(
            not missing, f"{self.name} declares inference={sorted(missing)}, which are no parameters of it"
        )
        for alias, name in entry.aliases.items():
            _expect(
                name in entry.views, f"{self.name}: {alias!r} is another name of {name!r}, which is no view"
            )
        for each in entry.views.values():
            unread = each.exact_for - set(entry.readouts)
            _expect(
                not unread,
                f"{self.name}: view {each.name!r} is exact for {sorted(unread)}, which are no read-outs",
            )
            fixed = each.ignores - entry.inference
            _expect(
                not fixed,
                f"{self.name}: view {each.name!r} ignores {sorted(fixed)}, not set at inference time",
            )

    def ask(self, readout: str, x: Images, model: Any = None) -> Decision:
        """Return a read-out's answer, as a run would ask for it."""
        model = self.model if model is None else model
        with self.asking(model), torch.no_grad():
            answer: Decision = model.decide(x, readout)
        return answer

    def readout(self, readout: str) -> None:
        """Check what a read-out answers."""
        where = f"{self.name}, read-out {readout!r}"
        n, classes = len(self.x), self.shape.classes
        answer = self.ask(readout, self.x)
        label, rejected, score, logits, *_ = answer
        for what, column, kind in (("label", label, torch.int64), ("rejected", rejected, torch.bool)):
            _expect(
                column.dtype == kind and column.shape == (n,),
                f"{where}: {what} is {column.dtype} {tuple(column.shape)}, not {kind} ({n},)",
            )
        _expect(
            bool(((label >= 0) & (label < classes)).all()),
            f"{where}: a label is none of the {classes} classes; a refusal still has its arg-max",
        )
        _expect(
            score.is_floating_point() and score.shape == (n,) and bool(score.isfinite().all()),
            f"{where}: score is not a finite number for each image",
        )
        if logits is not None:
            _expect(
                logits.shape == (n, classes) and bool((logits.argmax(1) == label).all()),
                f"{where}: logits are not (N, K) with the label as their arg-max",
            )
        self.alike(answer, self.ask(readout, self.x), f"{where} answers otherwise when asked twice")
        if not self.random:
            for rows in (torch.arange(n).flip(0), torch.arange(1)):
                self.alike(
                    Decision(label[rows], rejected[rows], score[rows]),
                    self.ask(readout, self.x[rows]),
                    f"{where} answers otherwise in another order or company",
                )

    def view(self, entry: ViewEntry) -> None:
        """Check what an attacker sees through a view."""
        where = f"{self.name}, view {entry.name!r}"
        with self.asking():
            seen: View = getattr(self.model, entry.method)()
            points = seen.encode(self.x)
            shown = seen.decode(points)
        if entry.space == "pixel":
            _expect(
                torch.equal(points, self.x) and torch.equal(shown, self.x),
                f"{where} is in pixels, but its encode or decode changes the image",
            )
        _expect(shown.shape == self.x.shape, f"{where} decodes to {tuple(shown.shape)}, not to images")
        logits = self.looked(seen, points)
        columns = self.shape.classes + seen.refusal
        _expect(
            logits.dim() in (2, 3) and logits.shape[-2:] == (len(points), columns),
            f"{where} answers {tuple(logits.shape)}, not ({len(points)}, {columns}), nor several of these",
        )
        _expect(bool(logits.isfinite().all()), f"{where} answers logits that are not finite")
        answer = (logits.mean(0) if logits.dim() == 3 else logits).argmax(1)
        if entry.space == "pixel" and not self.random:
            for readout in entry.exact_for:
                label, rejected, *_ = self.ask(readout, self.x)
                read = torch.where(rejected, self.shape.classes, label) if seen.refusal else label
                _expect(
                    bool((answer == read).all()),
                    f"{where} is declared to read {readout!r}, which answers {read.tolist()}, "
                    f"not {answer.tolist()}",
                )
        if not self.random:
            rows = torch.arange(len(points)).flip(0)
            same = _close(self.looked(seen, points[rows]), logits[..., rows, :])
            _expect(same, f"{where} answers otherwise in another order")
        if entry.gradient:
            self.steered(seen, points, answer, logits, where)

    def looked(self, seen: View, points: Tensor) -> Tensor:
        """Return the logits of a view without autograd."""
        with self.asking(), torch.no_grad():
            return seen.logits(points)

    def steered(self, seen: View, points: Tensor, answer: Labels, logits: Tensor, where: str) -> None:
        """Expect a gradient that leads somewhere, from the same logits."""
        z = points.detach().clone().requires_grad_()
        with self.asking():
            traced = seen.logits(z)
            _expect(traced.requires_grad, f"{where} is declared to have a gradient, and has none")
            (gradient,) = autograd.grad(objective(seen, traced, answer, "margin").sum(), z)
        _expect(_close(traced.detach(), logits), f"{where} answers otherwise with autograd than without")
        _expect(bool(gradient.isfinite().all()), f"{where} has a gradient that is not finite")
        dead = int((gradient == 0).flatten(1).all(1).sum())
        _expect(dead == 0, f"{where} has a gradient of zero for {dead} of {len(points)} images")

    def restored(self) -> None:
        """Expect saved weights to answer alike in a defense that was built with another seed."""
        twin = self.built(0)
        untrained = self.built(0).state_dict()
        _expect(
            all(torch.equal(value, untrained[key]) for key, value in twin.state_dict().items()),
            f"{self.name}: built twice with the same seeds, it is not the same: it draws from a generator "
            "that no seed of torch, numpy or Python reaches",
        )
        self.same(self.model, self.reborn(self.model), "saved and restored weights answer otherwise")

    def resumed(self) -> None:
        """Expect a fit that was broken off after each epoch to end as one that was not."""
        self.learnt = self.fitted()
        with tempfile.TemporaryDirectory() as folder:
            broken = self.fitted(Path(folder))
        weights = broken.state_dict()
        for key, value in self.learnt.state_dict().items():
            _expect(bool(value.isfinite().all()), f"{self.name}: fitted, its {key} is not finite")
            _expect(
                torch.equal(value, weights[key]),
                f"{self.name}: a fit that was broken off and gone on with ends with another {key}: what "
                "changes while it trains must all be given to fitting.epochs (schedules, means of weights, "
                "scalers), and every draw come from the epoch's noise or a global generator",
            )
        self.same(self.learnt, broken, "a fit that was broken off and gone on with answers otherwise")

    def learned(self) -> None:
        """Expect what was learned to be in the weights and buffers."""
        sentence = (
            "fitted, its weights and buffers alone answer otherwise: what fit learns must be among them"
        )
        self.same(self.learnt, self.reborn(self.learnt), sentence)

    def reborn(self, model: Any) -> Any:
        """Return a defense that was built with another seed, with the saved weights of this one."""
        weights = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
        other = self.built(1)
        other.load_state_dict(load(save(weights)), strict=True)
        return other

    def same(self, one: Any, other: Any, sentence: str) -> None:
        """Expect two defenses to answer alike through every read-out and view."""
        for readout in self.entry.readouts:
            first, second = (self.ask(readout, self.x, each) for each in (one, other))
            self.alike(first, second, f"{self.name}, read-out {readout!r}: {sentence}")
        for entry in self.entry.views.values():
            logits = []
            for model in (one, other):
                with self.asking(model), torch.no_grad():
                    seen: View = getattr(model, entry.method)()
                    logits.append(seen.logits(seen.encode(self.x)))
            _expect(_close(*logits), f"{self.name}, view {entry.name!r}: {sentence}")

    def alike(self, one: Decision, other: Decision, sentence: str) -> None:
        """Expect two decisions to be equal, up to the rounding of their numbers."""
        same = torch.equal(one.label, other.label) and torch.equal(one.rejected, other.rejected)
        _expect(same and _close(one.score, other.score), sentence)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4)


class _Killed(BaseException):
    """Ends a fit as a kill would: nothing that means to mend errors sees it."""


class _Fitting(Trainer):
    """What a fit is given; with a folder, the fit is broken off as soon as an epoch is kept there."""

    def __init__(self, train: Split, parts: Mapping[str, nn.Module], most: int, keep: Path | None) -> None:
        super().__init__(train, "check", torch.device("cpu"), parts=copy.deepcopy(dict(parts)), keep=keep)
        self._most, self._kept = most, False

    def epochs(self, count: int, model: Stateful, *parts: Stateful) -> Iterator[Epoch]:
        for epoch in super().epochs(min(count, self._most), model, *parts):
            self._end()
            yield epoch
        self._end()

    def _save(self, done: int, parts: Mapping[str, Stateful]) -> None:
        super()._save(done, parts)
        self._kept = self._keep is not None

    def _end(self) -> None:
        if self._kept:
            raise _Killed


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Seed every generator, as a run does for a job, and leave their states as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            reseed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def _untouched(model: nn.Module, name: str, *, draws: bool = False) -> Iterator[None]:
    """Expect weights, gradients, flags and, unless it `draws`, random states as they were."""

    def state() -> dict[str, object]:
        tensors = [*model.parameters(), *model.buffers()]
        return {
            "weights or buffers": [(each.data_ptr(), each.double().sum().item()) for each in tensors],
            "gradients on the parameters": [each.grad is None for each in tensors],
            "requires_grad of the parameters": [each.requires_grad for each in tensors],
            "training or evaluation mode": [each.training for each in model.modules()],
            "whether autograd is on": torch.is_grad_enabled(),
            "torch's global random state": None if draws else torch.get_rng_state().tolist(),
            "numpy's global random state": None if draws else str(np.random.get_state()),
            "Python's global random state": None if draws else random.getstate(),
        }

    before = state()
    yield
    for what, after in state().items():
        _expect(str(after) == str(before[what]), f"{name} changed something that is not its own: {what}")


def _expect(holds: bool, sentence: str) -> None:
    """Raise AssertionError, also where Python leaves assert statements out."""
    if not holds:
        raise AssertionError(sentence)


# --- planted adversarial examples -----------------------------------------------------------------------


class Planted:
    """Images, each with a binary classifier of its own that is known to be wrong at one place of its ball.

    The binarisation test (Zimmermann et al. 2022, arXiv:2206.13991): on the features of a fixed random
    network, each head is solved so that its score is -1 at the image and at random points on the ball's
    surface, and `lead` at one more of them. An attack that reports nothing there has failed, not the
    network. A step along the first gradient is too coarse to get there, and so is half the radius.

    Args:
        norm: The norm of the balls.
        cases: The number of images, at least 1.
        classes: The number of labels, at least 2.
        lead: How far the planted label leads at the planted point, above 0.
        seed: The seed of images, network and points.
    """

    def __init__(
        self, norm: Norm, cases: int = 40, *, classes: int = 2, lead: float = 0.15, seed: int = 0
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0, "l0": 6.0}[norm])
        # Where pixels go all the way, the network changes as much on its way as in the other balls.
        self.net = _rough(draw, 0.5 if norm == "l0" else 4.0)
        self.x = torch.empty(cases, 1, 8, 8).uniform_(0.35, 0.65, generator=draw)
        self.y = torch.arange(cases) % 2
        self.classes = classes
        self.points = torch.stack([self.surface(draw) for _ in range(32)], 1)
        """Random points on the surface of each ball, (N, 32, C, H, W); the first is the planted one."""
        start = self.net(self.x.double())
        ways = self.net(self.points.flatten(0, 1).double()).view(cases, 32, -1) - start[:, None]
        rise = torch.zeros(cases, 32, 1, dtype=torch.float64)
        rise[:, 0] = 1 + lead
        # The shortest of all heads that rise so: the others' rows are orthogonal to it.
        head = ways.mT @ torch.linalg.solve(ways @ ways.mT, rise)
        self.start, self.head = start, head.squeeze(2)

    def surface(self, draw: torch.Generator) -> Images:
        """Return a random point on the surface of each image's ball; in l1 and l0, six pixels differ.

        Args:
            draw: Where the draws come from.

        Returns:
            Images (N, 1, 8, 8).
        """
        x, radius = self.x, self.threat.radius
        signs = torch.randint(2, x.shape, generator=draw) * 2.0 - 1
        if self.threat.norm == "linf":
            return x + radius * signs
        if self.threat.norm == "l2":
            move = torch.randn(x.shape, generator=draw)
            unit: Tensor = move / torch.linalg.vector_norm(move, dim=(1, 2, 3), keepdim=True)
            return x + radius * unit
        few = torch.rand(x.shape, generator=draw).flatten(1).argsort(1).argsort(1).view(x.shape) < 6
        return torch.where(few, x + radius / 6 * signs if self.threat.norm == "l1" else (signs + 1) / 2, x)

    def score(self, z: Images, rows: Tensor) -> Tensor:
        """Return how much the heads of some examples are for the other label.

        Args:
            z: Points (n, 1, 8, 8), one for each example.
            rows: Positions of the examples, int64 (n,).

        Returns:
            Scores, float64 (n,): above 0 for the other label.
        """
        way: Tensor = self.net(z.double()) - self.start[rows]
        rise: Tensor = (way * self.head[rows]).sum(1)
        return rise - 1

    def view(self) -> View:
        """Return the view of logits (N, K): the score, minus the score, and what lies far below both."""
        return View(_Heads(self, torch.arange(len(self.x))))


def _rough(draw: torch.Generator, spread: float) -> nn.Sequential:
    """Return a random network whose gradients change on their way, the more the larger its first weights."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Flatten()
    ).double()
    for layer, size in ((net[0], spread), (net[2], 0.5)):
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=size, generator=draw)
        assert layer.bias is not None
        nn.init.uniform_(layer.bias, -1, 1, generator=draw)
    return net.requires_grad_(False)


class _Heads:
    """The heads of some of the examples, as a view's callable."""

    def __init__(self, planted: Planted, rows: Tensor) -> None:
        self._planted, self._rows = planted, rows

    def select(self, rows: Tensor) -> "_Heads":
        return _Heads(self._planted, self._rows[rows])

    def __call__(self, z: Images) -> Tensor:
        copies, rest = divmod(len(z), max(len(self._rows), 1))
        _expect(
            rest == 0,
            f"{len(z)} points were asked about for {len(self._rows)} examples: narrow the view with "
            "view.select, or check the attack with alone=True",
        )
        rows = self._rows.repeat(copies)
        planted = self._planted
        # Label 1 leads where the score's sign says so: of every second example it is the true one.
        lead = planted.score(z, rows) * (1 - 2.0 * planted.y[rows])
        others = [torch.full_like(lead, -20.0 - each) for each in range(planted.classes - 2)]
        return torch.stack([-lead, lead, *others], 1).to(z.dtype)


def check_planted(name: str, norm: Norm, /, *, cases: int = 40, alone: bool = False, **params: Any) -> float:
    """Return the share of planted adversarial examples that an attack finds.

    For each image an adversarial one is known to lie in the ball, where half of the radius does not reach it
    (see `Planted`). An attack that uses gradients should find 95 % of them; what it returns outside the ball
    or the box is not found.

    Args:
        name: The registered name.
        norm: The norm to try it in.
        cases: The number of images, at least 1.
        alone: Whether it is shown one image at a time, for attacks that keep lists of their own of what is
            left to do.
        **params: Parameters of the attack, where its defaults will not do.

    Returns:
        The share that is found, in [0, 1].

    Raises:
        InputError: There is no such attack, or it has no such parameter.
    """
    discover()
    entry = ATTACKS[name]
    planted = Planted(norm, cases, classes=max(2, entry.least_classes))
    threat = planted.threat if entry.kind == "fixed-budget" else Threat(norm)
    found = 0
    for rows in torch.arange(cases).split(1 if alone else cases):
        x, y, view = planted.x[rows], planted.y[rows], planted.view().select(rows)
        noise = Noise("planted", rows, shard="planted" if entry.rng == "shard" else None)
        returned = entry.make(view, x.clone(), y.clone(), threat, noise, **bind(entry, params))
        z = returned.images if isinstance(returned, Crafted) else returned
        distance = planted.threat.distance(x.double(), z.double())
        near = distance <= planted.threat.radius + ROUNDING * x[0].numel() ** 0.5
        inside = ((z >= -ROUNDING) & (z <= 1 + ROUNDING)).flatten(1).all(1)
        with torch.no_grad():
            found += int((near & inside & (view.logits(z).argmax(1) != y)).sum())
    return found / cases

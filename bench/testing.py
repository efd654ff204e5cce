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

from bench.doctor.ground import Attempt, Ground, untouched
from bench.doctor.halfspace import Halfspace
from bench.doctor.plants import Planted
from bench.losses import objective
from bench.noise import Noise
from bench.protocols import (
    Crafted,
    Decision,
    Epoch,
    Images,
    Labels,
    Norm,
    Shape,
    Split,
    Stateful,
    Threat,
    View,
)
from bench.referee.freezing import reseed
from bench.referee.validation import ROUNDING
from bench.registry import ATTACKS, DEFENSES, DefenseEntry, ViewEntry, bind, discover
from bench.runner.training import Trainer

__all__ = ["Halfspace", "Planted", "check_attack", "check_defense", "check_planted"]

FEW = 5
"""How many epochs a defense is fitted for, unless `epochs` is said."""


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
    plane = Halfspace(Shape(3, 5, 4, max(2, entry.least_classes)))
    ground = Ground(entry, bind(entry, params), norm, plane, *plane.examples(8))
    enough = scarce = math.inf
    if entry.kind == "fixed-budget":
        enough, scarce = within * float(ground.least.max()), 0.8 * float(ground.least.min())
    crafted = _lawful(ground.run(enough))
    again = float((_lawful(ground.run(enough)).images - crafted.images).abs().max())
    _expect(
        again == 0, f"attack {name!r} moved otherwise (by {again:.3g}) when asked again with the same draws"
    )
    if not entry.blind and math.isfinite(within):
        _crosses(ground, crafted, within, f"with {within:g} times the radius that is needed")
        if entry.targeted:
            _crosses(ground, _lawful(ground.run(enough, towards=True)), within, "towards a given label")
        pushed = _lawful(ground.run(enough, exact=False))
        if entry.kind == "fixed-budget":
            _crosses(ground, pushed, within, "where it may not stop early")
            _lawful(ground.run(scarce))
    if entry.access in ("gradient", "score"):
        _lawful(ground.run(enough, nan=True))
    if entry.rng == "example":
        apart = ground.apart(enough, len(ground.y))
        _expect(
            apart <= ROUNDING,
            f'attack {name!r} is declared rng="example", but examples end elsewhere, by {apart:.3g}, when '
            "they are attacked in another order or company",
        )


def _lawful(attempt: Attempt) -> Crafted:
    """Expect that no rule was broken, and return what was crafted."""
    for each in attempt.faults:
        raise AssertionError(each.sentence)
    return attempt.crafted


def _crosses(ground: Ground, crafted: Crafted, within: float, when: str) -> None:
    """Expect every image beyond the plane, and no farther than it need be."""
    held = ground.held(crafted.images)
    _expect(
        not held.any(),
        f"{ground.name} left {int(held.sum())} of {len(held)} images on their side of the plane, {when}",
    )
    ratio = float(ground.farther(crafted.images).max())
    if ground.entry.kind == "minimum-norm":
        _expect(ratio <= within, f"{ground.name} went {ratio:.3g} times as far as it needed to, {when}")


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
    with untouched(model, draws=draws) as changed:
        yield
    for _, what in changed:
        raise AssertionError(f"{name} changed something that is not its own: {what}")


def _expect(holds: bool, sentence: str) -> None:
    """Raise AssertionError, also where Python leaves assert statements out."""
    if not holds:
        raise AssertionError(sentence)


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
        found += int(planted.found(z, rows, ROUNDING).sum())
    return found / cases

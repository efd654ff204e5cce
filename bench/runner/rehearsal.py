"""Rehearsals: what a training, a pass and an answer of a network take here, before a job has shown it.

A network is trained for a few steps on a few images, and asked a few times through each view. Only times are
kept: no weight, no image and no result.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.errors import OvertimeError
from bench.noise import Noise, seed_of
from bench.protocols import Batch, Epoch, Split, Stateful
from bench.referee.answers import decided
from bench.referee.freezing import reseed, seeded
from bench.runner.context import WorkerContext, device_name, load
from bench.runner.craft import look
from bench.runner.isolation import isolated
from bench.runner.limits import limited
from bench.runner.train import build
from bench.runner.training import Pass, Trainer
from bench.suite.jobs import AttackRun, Craft, Evaluate, Examination, Job, Train, Trial

SPAN = 0.1
"""Seconds after which a measurement takes no further step. A step that is longer is waited for."""

LIMIT = 4.0
"""Seconds that the rehearsal of a network may take."""

IMAGES = 256
"""The most images that are used."""


@dataclass(frozen=True)
class Rehearsal:
    """A question of what a network costs; it leaves no result."""

    train: Train
    """The training of the network."""
    runs: tuple[AttackRun, ...] = ()
    """Attacks on it, one for each view and kind of access."""
    readouts: tuple[str, ...] = ()
    """Its read-outs that are asked."""
    limit: float = LIMIT
    """Seconds after which it is broken off; what is known by then counts."""

    kind = "rehearsal"

    @property
    def key(self) -> str:
        """The key of the training."""
        return self.train.key


def rehearsals(jobs: Iterable[Job]) -> list[Rehearsal]:
    """Return the questions whose answers tell what jobs cost: one for each network, whatever its seed.

    Args:
        jobs: Jobs of a plan.

    Returns:
        The questions, in the order of the jobs.
    """
    trains: dict[str, Train] = {}
    runs: dict[str, dict[str, AttackRun]] = {}
    readouts: dict[str, dict[str, None]] = {}
    for job in jobs:
        match job:
            case Train():
                network = job
            case Craft():
                if (run := job.attack_run).source is None:
                    continue
                network = run.source.train
                runs.setdefault(_name(network), {}).setdefault(sight(run), run)
            case Evaluate():
                network = job.victim.train
                readouts.setdefault(_name(network), {})[job.readout] = None
            case Trial() | Examination():
                continue
        trains.setdefault(_name(network), network)
    return [
        Rehearsal(train, tuple(runs.get(name, {}).values()), tuple(readouts.get(name, {})))
        for name, train in trains.items()
    ]


def sight(run: AttackRun) -> str:
    """Return what decides, beside the network, how long a pass of an attack takes.

    Args:
        run: The attack.

    Returns:
        Its access, its view and the settings of the network at inference time.
    """
    seen = run.view.label if run.view else ""
    return f"{run.attack.entry.access} {seen} {run.source.inference if run.source else ()}"


def _name(train: Train) -> str:
    """Return what networks of one make have in common."""
    return f"{train.defense.identity} {train.data.key}"


def rehearse(question: Rehearsal, context: WorkerContext) -> dict[str, Any]:
    """Measure what a network costs on the device of this process.

    Args:
        question: The network, with the views and the read-outs to ask about.
        context: The surroundings.

    Returns:
        ``device``, its name; ``train``, the seconds of the whole training; ``runs``, seconds of one pass over
        one example by the key of the attack run; ``readouts``, seconds of an answer to one example. What
        failed, or was not reached within the question's limit, is not there.
    """
    device = torch.device(context.device)
    found: dict[str, Any] = {"device": device_name(context.device), "runs": {}, "readouts": {}}
    seed = seed_of(question.train.key)
    # Code of a user may raise anything; the job itself will say it. The limit comes before the isolation,
    # which would take its alarm for a change of the network's.
    with suppress(Exception), limited(question.limit), isolated(), seeded(seed, device):
        model = build(question.train, context)
        _ask(question, model, context, found)
        with _apart():
            _fit(question.train, model.requires_grad_(True), context, found)
        # What needs thresholds, or whatever else a fit finds.
        _ask(question, model, context, found)
    return found


def _ask(question: Rehearsal, model: Any, context: WorkerContext, found: dict[str, Any]) -> None:
    """Time a pass through each view and an answer by each read-out, where that was not done before."""
    model.eval().requires_grad_(False)
    for run in question.runs:
        if run.key not in found["runs"]:
            with _apart():
                found["runs"][run.key] = _pass(run, model, context)
    for readout in question.readouts:
        if readout not in found["readouts"]:
            with _apart():
                found["readouts"][readout] = _answer(question, model, readout, context)


@contextmanager
def _apart() -> Iterator[None]:
    """Keep the failure of one measurement from the others; only the limit ends them all."""
    try:
        yield
    except OvertimeError:
        raise
    except Exception:  # noqa: BLE001 - a network that has hardly learned may refuse to answer
        return


def _answer(question: Rehearsal, model: Any, readout: str, context: WorkerContext) -> float:
    """Return the seconds of an answer by a read-out to one example."""
    device = torch.device(context.device)
    data = question.runs[0].data if question.runs else question.train.data
    split = _few(load(data, context))

    def once(count: int) -> float:
        begun = _now(device)
        with torch.no_grad():
            decided(model, split.images[:count], readout, device)
        return _now(device) - begun

    return _each(once, min(len(split), data.spec.shard))


def _pass(run: AttackRun, model: Any, context: WorkerContext) -> float:
    """Return the seconds of a pass over one example as an attack makes it, backwards too if it may."""
    device, gradient = torch.device(context.device), run.attack.entry.access == "gradient"
    split = _few(load(run.data, context))
    assert run.source is not None
    if run.source.inference:
        model = build(run.source.train, context, inference=dict(run.source.inference)).eval()
    view = look(run, model.requires_grad_(False), split, device)

    def once(count: int) -> float:
        point = view.encode(split.images[:count].to(device)).detach().requires_grad_(gradient)
        begun = _now(device)
        if not gradient:
            # An attack without gradients draws each point about which it asks.
            noise = Noise(run.key, split.index[:count], device=device)
            point = point + noise.uniform(tuple(point.shape[1:]), 0.0, 1e-6)
        with torch.set_grad_enabled(gradient):
            logits = view.logits(point)
            if gradient and logits.requires_grad:
                torch.autograd.grad(logits.sum(), point, allow_unused=True)
        return _now(device) - begun

    return _each(once, min(len(split), run.data.spec.shard))


def _each(once: Callable[[int], float], most: int) -> float:
    """Return the seconds for each example, with as many examples as `SPAN` allows."""
    # The first call loads kernels, reserves memory, and works out what a network keeps between questions.
    once(1)
    count, spent = min(8, most), 0.0
    while True:
        took = once(count)
        spent += took
        if count == most or spent + 4 * took > SPAN:
            return took / count
        count = min(4 * count, most)


def _now(device: torch.device) -> float:
    """Return the time at which all that was asked of a device is done, in seconds since some moment.

    On a processor it is the time of this process alone, so that what else runs there does not count.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _few(split: Split) -> Split:
    return replace(
        split, images=split.images[:IMAGES], labels=split.labels[:IMAGES], index=split.index[:IMAGES]
    )


def _fit(train: Train, model: Any, context: WorkerContext, found: dict[str, Any]) -> None:
    """Note the seconds that a training takes, by a few steps of each of its phases."""
    device = torch.device(context.device)
    split = load(train.data, context)
    parts = {name: build(part, context) for name, part in train.parts}
    trainer = _Steps(split, train.key, device, parts)
    model.train()
    begun = _now(device)
    try:
        model.fit(trainer.split, trainer)
    finally:
        rest = _now(device) - begun - trainer.spent
        if trainer.whole:
            # What is in no epoch (calibration, say) looks at all images once.
            found["train"] = trainer.whole + rest * trainer.share


class _Steps(Trainer):
    """A `Fitting` that ends each phase after a few steps, and works out what the whole would have taken.

    Args:
        split: All training images.
        key: The key of the training.
        device: Where it is trained.
        parts: Defenses that it is built on, not fitted.
    """

    def __init__(self, split: Split, key: str, device: torch.device, parts: dict[str, Any]) -> None:
        super().__init__(_few(split), key, device, parts=parts)
        self.count = len(split)
        self.share = len(split) / len(self.split)
        self.whole = 0.0
        """Seconds of all phases, as far as they are known."""
        self.spent = 0.0
        """Seconds that were spent in them here."""

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        """Return how many batches an epoch of the whole training has.

        Args:
            size: images of a batch, 1 or more.
            drop_last: leave out a last batch that is not full.
        """
        whole = self.count // size if drop_last else math.ceil(self.count / size)
        return max(whole, 1)

    def epochs(self, count: int, model: Stateful, *parts: Stateful) -> Iterator[Epoch]:
        """Yield one epoch, a short one.

        Args:
            count: epochs of this phase.
            model: what is trained.
            parts: what else changes.
        """
        self._phase += 1
        self.stream = (self.key, self._phase)
        if count:
            reseed(seed_of(*self.stream, "torch", 0))
            epoch = _Short(self, 0)
            begun = _now(self.device)
            yield epoch
            took = _now(self.device) - begun
            self.spent += took
            self.whole += count * (took * self.share if epoch.whole is None else epoch.whole)


class _Short(Pass):
    """An epoch of as many steps as `SPAN` allows."""

    _fitting: _Steps
    whole: float | None = None
    """Seconds of the whole epoch; None where its images do not come from `batches`."""

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield a few batches, and time them.

        Args:
            size: images of a batch, 1 or more.
            drop_last: leave out a last batch that is not full.
        """
        fitting, device = self._fitting, self._fitting.device
        steps = fitting.steps(size, drop_last=drop_last)
        # Drawn as in an epoch, from fewer images: some come twice.
        rows: Tensor = torch.arange(min(size, fitting.count)) % len(fitting.split)
        (batch, *_) = super().batches(len(fitting.split))
        begun = marked = _now(device)
        for step in range(steps):
            yield Batch(batch.images[rows], batch.labels[rows], batch.noise.select(rows))
            now = _now(device)
            if step == 0 and steps > 1:
                # The first step loads kernels and reserves memory.
                self.whole, marked = steps * (now - begun), now
            else:
                self.whole = steps * (now - marked) / max(step, 1)
            if now - begun > SPAN and step > 0:
                return

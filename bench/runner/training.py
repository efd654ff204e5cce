"""What a defense's `fit` is given: batches, draws, the inner attack, and epochs that survive a kill."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import DamagedError, InputError, TrainingError
from bench.noise import Noise, seed_of
from bench.protocols import Attack, Batch, Epoch, Randomness, Split, Stateful, Use
from bench.referee.freezing import reseed
from bench.registry import bound
from bench.results import durable
from bench.runner import states

Progress = Callable[[Mapping[str, Any]], None]
"""Told how far a job is: ``{"done": 3, "of": 30, "loss": 0.41}``, and of an attack ``{"done": 3.5, "of": 40,
"unit": "passes"}``; or what a person should know: ``{"note": "a sentence"}``.
"""


class Pass:
    """One epoch: an `Epoch` over a split in a seeded order.

    Args:
        fitting: the training that it belongs to.
        number: how many epochs come before it in its phase, from 0.
    """

    def __init__(self, fitting: "Trainer", number: int) -> None:
        self.number = number
        self._fitting = fitting
        self._losses: list[Tensor] = []

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield the split in this epoch's order; each image's draws are its own in this epoch.

        Args:
            size: images of a batch, 1 or more.
            drop_last: leave out a last batch that is not full, unless it is the only one.
        """
        fitting, split = self._fitting, self._fitting.split
        generator = torch.Generator().manual_seed(seed_of(*fitting.stream, "order", self.number))
        order = torch.randperm(len(split), generator=generator)
        for step in range(fitting.steps(size, drop_last=drop_last)):
            rows = order[step * size : (step + 1) * size]
            noise: Randomness = Noise(
                (*fitting.stream, "epoch", self.number), split.index[rows], device=fitting.device
            )
            there = rows.to(fitting.images.device)
            yield Batch(
                fitting.images[there].to(fitting.device),
                fitting.labels[there].to(fitting.device),
                noise,
            )

    def report(self, loss: Tensor) -> None:
        """Note a step's loss; it is looked at when the epoch ends, so that a GPU need not wait.

        Args:
            loss: a scalar.
        """
        self._losses.append(loss.detach())

    def mean(self) -> float:
        """Return the mean loss of the steps, NaN where there was none.

        Raises:
            TrainingError: a step's loss is not finite.
        """
        if not self._losses:
            return math.nan
        losses = torch.stack(self._losses).double()
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).nonzero()[0])
            raise TrainingError(
                f"the loss of epoch {self.number + 1}, step {step + 1} is {losses[step].item()}; "
                "a smaller learning rate or a tighter gradient clip may help"
            )
        return float(losses.mean())


class Trainer:
    """The `Fitting` of a job: what a defense's `fit` is given.

    Args:
        split: the training images and labels.
        key: the job's key, from which all draws come.
        device: where the defense is trained.
        parts: fitted defenses that this one is built on, by parameter.
        keep: the folder in which the states of an unfinished training lie; None keeps none.
        code: digests of the modules of the defense; states of other code are not gone on with.
        progress: told how far the training is.
    """

    def __init__(
        self,
        split: Split,
        key: str,
        device: torch.device,
        *,
        parts: Mapping[str, nn.Module] | None = None,
        keep: Path | None = None,
        code: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.split = split
        self.key = key
        self.device = device
        self.parts = parts or {}
        self.images = split.images
        self.labels = split.labels
        if device.type == "cuda":
            self.images, self.labels = split.images.to(device), split.labels.to(device)
        self._keep = keep
        self._code = dict(code or {})
        self._phase = -1
        self.stream: tuple[object, ...] = (key,)
        self._progress = progress or (lambda _: None)
        self.resumed = 0
        self.notes: list[str] = []
        """What was found on the way that a person should know: damaged states."""

    def attack(self, use: Use) -> Attack:
        """Return a registered attack with its parameters bound.

        Args:
            use: the attack's name and parameters.
        """
        return bound(use)

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        """Return how many batches an epoch has; at least one, however small the split.

        Args:
            size: images of a batch, 1 or more.
            drop_last: leave out a last batch that is not full.
        """
        whole = len(self.split) // size if drop_last else math.ceil(len(self.split) / size)
        return max(whole, 1)

    def note(self, sentence: str) -> None:
        """Keep a sentence for the receipt, and say it.

        Args:
            sentence: what a person should know.
        """
        self.notes.append(sentence)
        self._progress({"note": sentence})

    def epochs(self, count: int, model: Stateful, *parts: Stateful) -> Iterator[Epoch]:
        """Yield the epochs still to do; after each, what is needed to go on is saved.

        A training of several phases calls this once for each, and always in the same order.

        Args:
            count: epochs of this phase.
            model: what is trained.
            parts: what else changes in training: any torch optimiser, schedules of rates, scalers, means of
                weights, whatever has a `state_dict` and a `load_state_dict`.

        Raises:
            InputError: a part has no state, or one that cannot be kept.
            TrainingError: a loss is not finite.
        """
        self._phase += 1
        self.stream = (self.key, *([self._phase] if self._phase else []))
        every = _named(model, *parts)
        done = self._restore(count, every)
        self.resumed += done
        for number in range(done, count):
            # An epoch depends on its start and its number alone, so that a resumed training is the same.
            reseed(seed_of(*self.stream, "torch", number))
            epoch = Pass(self, number)
            yield epoch
            loss = epoch.mean()
            self._save(number + 1, every)
            self._progress({"done": number + 1, "of": count, "loss": loss})
        # And so does what comes after it.
        reseed(seed_of(*self.stream, "torch", "end"))

    def _files(self, phase: int) -> tuple[Path, Path]:
        """Return where the last epoch of a phase is kept, and the one before it."""
        assert self._keep is not None
        name = f"epoch{phase or ''}"
        return self._keep / f"{name}.safetensors", self._keep / f"{name}.before.safetensors"

    def _save(self, done: int, parts: Mapping[str, Stateful]) -> None:
        if self._keep is None:
            return
        newest, before = self._files(self._phase)
        kept = {name: each.state_dict() for name, each in parts.items()}
        told = {"key": self.key, "phase": self._phase, "done": done, "code": self._code}
        for _ in range(3):
            # Another run of the same training may have ended, and swept the folder, meanwhile.
            with suppress(FileNotFoundError):
                durable.folder(self._keep)
                if not states.write(newest, before, told, kept) and newest.is_file():
                    durable.remove(newest)
                    self.note(f"epoch {done} could not be read back; the one before it is kept")
                return

    def _restore(self, count: int, parts: Mapping[str, Stateful]) -> int:
        """Load the last epoch that is whole and of this training; return how many of `count` are done."""
        if self._keep is None:
            return 0
        done, found = 0, []
        for path in self._files(self._phase):
            if not done and os.path.lexists(path):
                try:
                    done = self._load(path, parts)
                except DamagedError as error:
                    found.append(f"{path.name} {error}")
                    durable.remove(path)
        if found:
            goes_on = f"goes on from epoch {done}" if done else "starts anew"
            self.note(f"{', '.join(found)}: the training {goes_on}")
        if done < count:
            # Later phases begin with what comes now.
            for path in self._keep.glob("epoch*.safetensors"):
                if int(path.name.partition(".")[0].removeprefix("epoch") or "0") > self._phase:
                    durable.remove(path)
        return done

    def _load(self, path: Path, parts: Mapping[str, Stateful]) -> int:
        told, kept = states.read(path, self.device)
        if (told["key"], told["phase"]) != (self.key, self._phase):
            raise DamagedError("is of another training")
        if told["code"] != self._code:
            # Half of it would be another training's.
            raise DamagedError("is of code that changed since")
        if kept.keys() != parts.keys():
            raise DamagedError("is of other parts")
        start = {name: deepcopy(each.state_dict()) for name, each in parts.items()}
        try:
            for name, each in parts.items():
                each.load_state_dict(kept[name])
        except Exception as error:  # noqa: BLE001 - whatever keeps a state from fitting
            for name, each in parts.items():
                each.load_state_dict(start[name])
            raise DamagedError(f"does not fit ({str(error).partition(chr(10))[0]})") from None
        return int(told["done"])


def _named(*parts: Stateful) -> dict[str, Stateful]:
    """Return what is kept of a training under names that say what it is."""
    named: dict[str, Stateful] = {}
    for position, part in enumerate(parts):
        if not isinstance(part, Stateful):
            raise InputError(
                f"fitting.epochs: expected things with a state_dict and a load_state_dict after the count, "
                f"found a {type(part).__qualname__}"
            )
        named[f"{type(part).__qualname__}{position}" if position else "model"] = part
    return named

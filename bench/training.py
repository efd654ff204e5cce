"""What a defense's `fit` is given: batches, draws, the inner attack, and epochs that survive a kill."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.errors import TrainingError
from bench.noise import Noise, seed_of
from bench.protocols import Attack, Batch, Epoch, Randomness, Split, Use
from bench.registry import ATTACKS, arguments

Progress = Callable[[Mapping[str, Any]], None]
"""Told how far a job is: ``{"done": 3, "of": 30, "loss": 0.41}``."""


class Pass:
    """One epoch: an `Epoch` over a split in a seeded order."""

    def __init__(self, fitting: "Trainer", number: int) -> None:
        self.number = number
        self._fitting = fitting
        self._losses: list[Tensor] = []

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield the split in this epoch's order; each image's draws are its own in this epoch."""
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
        """Note a step's loss; it is looked at when the epoch ends, so that a GPU need not wait."""
        self._losses.append(loss.detach())

    def mean(self) -> float:
        """Return the mean loss; raise if a step's was not finite."""
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
    """The `Fitting` of a job."""

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

    def attack(self, use: Use) -> Attack:
        """Return a registered attack with its parameters bound."""
        entry = ATTACKS[use.use]
        bound: Attack = partial(entry.make, **arguments(entry, use.params))
        return bound

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        """Return how many batches an epoch has; at least one, however small the split."""
        whole = len(self.split) // size if drop_last else math.ceil(len(self.split) / size)
        return max(whole, 1)

    def note(self, sentence: str) -> None:
        """Keep a sentence for the receipt, and say it."""
        self.notes.append(sentence)
        self._progress({"note": sentence})

    def epochs(self, count: int, model: nn.Module, *optimisers: Optimizer) -> Iterator[Epoch]:
        """Yield the epochs still to do; after each, what is needed to go on is saved.

        A training of several phases calls this once for each, and always in the same order.
        """
        self._phase += 1
        self.stream = (self.key, *([self._phase] if self._phase else []))
        done = self._restore(model, optimisers)
        self.resumed += done
        for number in range(done, count):
            # An epoch depends on its start and its number alone, so that a resumed training is the same.
            torch.manual_seed(seed_of(*self.stream, "torch", number))
            epoch = Pass(self, number)
            yield epoch
            loss = epoch.mean()
            self._save(number + 1, model, optimisers)
            self._progress({"done": number + 1, "of": count, "loss": loss})

    @property
    def _checkpoint(self) -> Path:
        assert self._keep is not None
        return self._keep / f"epoch{self._phase or ''}.safetensors"

    def _save(self, done: int, model: nn.Module, optimisers: tuple[Optimizer, ...]) -> None:
        if self._keep is None:
            return
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        plain: dict[str, Any] = {"done": done, "code": self._code, "optimisers": []}
        for position, optimiser in enumerate(optimisers):
            state = optimiser.state_dict()
            kept: dict[str, Any] = {"groups": state["param_groups"], "plain": []}
            for parameter, values in state["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimiser.{position}.{parameter}.{name}"] = value
                    else:
                        kept["plain"].append([parameter, name, value])
            plain["optimisers"].append(kept)
        self._keep.mkdir(parents=True, exist_ok=True)
        draft = self._keep / f"draft-{os.getpid()}.safetensors"
        whole = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        with contextlib.suppress(FileNotFoundError):
            # Another run of the same training may have ended, and swept the folder, meanwhile.
            save_file(whole, draft, {"plain": json.dumps(plain)})
            draft.replace(self._checkpoint)

    def _restore(self, model: nn.Module, optimisers: tuple[Optimizer, ...]) -> int:
        if self._keep is None or not self._checkpoint.is_file():
            return 0
        try:
            with safe_open(self._checkpoint, "pt", device=str(self.device)) as file:
                plain = json.loads(file.metadata()["plain"])
                if plain["code"] != self._code:
                    # Half of it would be another training's.
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            # Cut short by a full disk or altered: the training starts anew.
            return 0
        model.load_state_dict(
            {
                name.removeprefix("model."): value
                for name, value in tensors.items()
                if name.startswith("model.")
            }
        )
        for position, (optimiser, kept) in enumerate(zip(optimisers, plain["optimisers"], strict=True)):
            state: dict[int, dict[str, Any]] = {}
            for name, value in tensors.items():
                head, _, rest = name.partition(".")
                if head == "optimiser" and rest.startswith(f"{position}."):
                    _, parameter, entry = rest.split(".", 2)
                    state.setdefault(int(parameter), {})[entry] = value
            for parameter, entry, value in kept["plain"]:
                state.setdefault(parameter, {})[entry] = value
            optimiser.load_state_dict({"state": state, "param_groups": kept["groups"]})
        return int(plain["done"])

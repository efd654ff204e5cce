"""The crafting job: attacks a shard through a view, and keeps the images that the referee accepts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.context import CHUNK, Desk, load
from bench.evaluate import decided
from bench.jobs import Attempt, Craft
from bench.limits import limited, out_of_memory
from bench.losses import eot
from bench.noise import Noise, seed_of
from bench.outcomes import OUTCOME_COLUMNS
from bench.protocols import Crafted, Decision, Images, Labels, Split, View
from bench.referee import Meter, answers_only, blindfold, guides, judge, undisturbed, watch
from bench.registry import arguments
from bench.store import Store
from bench.train import fitted


def craft(job: Craft, desk: Desk, store: Store) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Attack a shard through its view, and have the referee check the images.

    Args:
        job: The shard and the attack.
        desk: The surroundings of the job.
        store: The results folder, with the training of the network that is attacked.

    Returns:
        The function that writes the images to a path, and entries for the receipt.
    """
    attempt = job.attempt
    model = fitted(attempt.source, desk, store) if attempt.source else None
    plain, facts = attacked(job, model, load(attempt.data, desk), torch.device(desk.device))
    return lambda path: save_file(plain, path), facts


def attacked(
    job: Craft, model: Any, split: Split, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Attack the shard of `split` that `job` names; return what is kept of it, on the CPU, and facts of it.

    `model` is the fitted network that the attack looks at, None for an attack that looks at none.
    """
    rows = slice(job.start, job.stop)
    x, y = split.images[rows].to(device), split.labels[rows].to(device)
    made = attack(job, model, x, y, split)
    judged = judge(x, made.images, job.attempt.threat)
    moved = (judged.images != x).flatten(1).any(1)
    target = made.target if made.target is not None else torch.full_like(y, -1)
    tensors = {
        "index": split.index[rows],
        "target": target,
        "moved": moved,
        "images": judged.images[moved],
        "void": judged.void,
        "forwards": made.meter.forwards,
        "backwards": made.meter.backwards,
        **{f"note.{name}": value for name, value in made.notes.items()},
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    facts = {
        "examples": len(y),
        "void": int(judged.void.sum()),
        "void_because": dict(judged.because),
        "queries_per_example": {
            "forwards": float(made.meter.forwards.mean()),
            "backwards": float(made.meter.backwards.mean()),
        },
        "chunk": made.chunk,
    }
    return plain, facts


def unmoved(job: Craft, split: Split) -> dict[str, Tensor]:
    """Return what `attacked` returns of an attack that does nothing and looks at nothing."""
    rows = slice(job.start, job.stop)
    still = torch.zeros(job.stop - job.start, dtype=torch.bool)
    passes = torch.zeros(len(still), dtype=torch.float64)
    return {
        "index": split.index[rows],
        "target": torch.full((len(still),), -1),
        "moved": still,
        "images": split.images[:0],
        "void": still,
        "forwards": passes,
        "backwards": passes,
    }


@dataclass(frozen=True)
class Made:
    """What an attack returned, and what it cost."""

    images: object
    """The returned value itself: images, `Crafted`, or anything that the referee refuses."""
    notes: Mapping[str, Tensor]
    """A tensor (N, ...) for each note, by its name."""
    target: Labels | None
    """Labels to reach, int64 (N,); None for an untargeted attack."""
    meter: Meter
    """The passes of each example."""
    chunk: int | None
    """The most points that were computed at once, where memory was short; None otherwise."""


def attack(job: Craft, model: Any, x: Images, y: Labels, split: Split) -> Made:
    """Run an attack on a shard; where memory is short, again with chunks of half the size.

    With smaller chunks activations are computed again in the backward pass, which saves memory and costs
    time. The second run begins at the clean images, with the same draws.

    Args:
        job: The shard and the attack.
        model: The fitted network that is attacked; None for an attack without access.
        x: Clean images (N, C, H, W), on the device.
        y: Their labels (N,).
        split: The data set of the shard.

    Returns:
        What the attack returned, and what it cost.

    Raises:
        ValueError: A note of the attack has a name of the harness's own columns, or another length than N.
        OvertimeError: The attack took longer than its limit.
    """
    chunk: int | None = CHUNK[x.device.type]
    recompute = False
    while True:
        try:
            return _attack(job, model, x, y, split, chunk, recompute)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or chunk is None or chunk <= 1:
                raise
            chunk, recompute = max(min(chunk, len(x)) // 2, 1), True
            if x.is_cuda:
                torch.cuda.empty_cache()


def _attack(
    job: Craft, model: Any, x: Images, y: Labels, split: Split, chunk: int | None, recompute: bool
) -> Made:
    attempt, index = job.attempt, split.index[job.start : job.stop]
    entry = attempt.attack.entry
    meter = Meter.of(len(y), x.device)
    target = _targets(attempt, y, index)
    modules = [model] if model is not None else []
    seen: list[View] = []

    def ask() -> None:
        for each in seen:
            each.logits(each.encode(x[:2]))

    with undisturbed(*modules, seed=seed_of(job.key), ask=ask):
        view = blindfold(meter)
        if attempt.source is not None and attempt.view is not None:
            seen.append(look(attempt, model, split, x.device))
            view = watch(
                seen[0],
                meter,
                entry.access,
                target=target,
                final=attempt.final,
                chunk=chunk,
                recompute=recompute,
            )
            view = eot(view, attempt.view.draws)
        noise = Noise(
            attempt.key,
            index,
            device=x.device,
            shard=job.key if entry.keyed == "shard" else None,
        )
        with limited(attempt.time_limit):
            returned = entry.make(
                view, x.clone(), y.clone(), attempt.threat, noise, **arguments(entry, attempt.attack.params)
            )
    notes = dict(returned.notes) if isinstance(returned, Crafted) else {}
    if taken := sorted(set(notes) & set(OUTCOME_COLUMNS)):
        raise ValueError(f"the attack's notes {taken} have names that the referee's own columns have")
    for name, note in notes.items():
        if note.shape[:1] != y.shape:
            raise ValueError(
                f"the attack's note {name!r} has {tuple(note.shape)} entries for {len(y)} images"
            )
    return Made(returned, notes, target, meter, chunk if recompute else None)


def _targets(attempt: Attempt, y: Labels, index: Tensor) -> Labels | None:
    if attempt.target is None:
        return None
    assert attempt.source is not None
    classes = attempt.source.train.data.shape.classes
    if attempt.target == "random":
        drawn = Noise((attempt.key, "target"), index, device=y.device).integers((), classes - 1)
        return (y + 1 + drawn) % classes
    return (y + attempt.target) % classes


def look(attempt: Attempt, model: Any, split: Split, device: torch.device) -> View:
    """Return the view through which an attack looks, as the defense makes it.

    Args:
        attempt: The attack with its source, its view and their settings.
        model: The fitted network.
        split: The data set; a view of decisions looks in it for images that the read-out accepts.
        device: The device of the network.

    Returns:
        The view, before it passes through `watch`.

    Raises:
        TypeError: The method of the defense returned no `View`.
    """
    assert attempt.source is not None
    assert attempt.view is not None
    entry = attempt.source.train.defense.entry
    if attempt.view.use.startswith("decision:"):
        readout = attempt.view.use.removeprefix("decision:")
        classes = attempt.source.train.data.shape.classes

        def decide(z: Images) -> Decision:
            return decided(model, z, readout, device)

        return answers_only(decide, classes, guides(decide, split.images, split.labels, classes).to(device))
    found = entry.view(attempt.view.use)
    assert found is not None
    seen = getattr(model, found.method)(**arguments(found, attempt.view.params))
    if not isinstance(seen, View):
        raise TypeError(f"view {found.name!r} of {entry.name} is a {type(seen).__name__}, not a View")
    return seen

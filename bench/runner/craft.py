"""The crafting job: attacks a shard through a view, and keeps the images that the referee accepts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.errors import InputError
from bench.losses import eot
from bench.noise import Noise, seed_of
from bench.protocols import Crafted, Decision, Images, Labels, Split, View
from bench.registry import bind, bound, needing
from bench.results import replays
from bench.results.outcomes import OUTCOME_COLUMNS, WATCHED
from bench.results.store import Store
from bench.runner.context import CHUNK, WorkerContext, load
from bench.runner.evaluate import decided
from bench.runner.limits import limited, out_of_memory
from bench.runner.referee import (
    QueryCounter,
    Validated,
    answers_only,
    frozen,
    guides,
    instrument,
    no_access_view,
    validate,
)
from bench.runner.train import fitted, forget_fitted
from bench.runner.watch import Watch
from bench.suite.jobs import AttackRun, Craft, Starts


def craft(job: Craft, context: WorkerContext, store: Store) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Attack a shard through its view, and have the referee check the images.

    Args:
        job: The shard and the attack.
        context: The surroundings of the job.
        store: The results folder, with the training of the network that is attacked.

    Returns:
        The function that writes the images to a path, and entries for the receipt.
    """
    attack_run = job.attack_run
    model = fitted(attack_run.source, context, store) if attack_run.source else None
    split = load(attack_run.data, context)
    try:
        plain, facts = attacked(job, model, split, torch.device(context.device))
    except BaseException:
        # An attack reaches more of a network than the referee can put back.
        forget_fitted()
        raise
    return lambda path: save_file(plain, path), facts


def attacked(
    job: Craft, model: Any, split: Split, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Attack a shard.

    Args:
        job: The shard and the attack.
        model: The fitted network that the attack looks at; None for an attack that looks at none.
        split: The data set of the shard.
        device: The device of the attack.

    Returns:
        What is kept of the shard, tensors on the CPU, and facts for the receipt.
    """
    rows = slice(job.start, job.stop)
    x, y = split.images[rows].to(device), split.labels[rows].to(device)
    made = attack(job, model, x, y, split)
    validated = made.validated
    moved = (validated.images != x).flatten(1).any(1)
    target = made.target if made.target is not None else torch.full_like(y, -1)
    tensors = {
        "index": split.index[rows],
        "target": target,
        "moved": moved,
        "images": validated.images[moved],
        "invalid": validated.invalid,
        "forwards": made.counter.forwards,
        "backwards": made.counter.backwards,
        **{f"note.{name}": value for name, value in made.notes.items()},
        **{f"watch.{name}": value for name, value in made.watched.items()},
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    facts = {
        "examples": len(y),
        "invalid": int(validated.invalid.sum()),
        "invalid_because": dict(validated.because),
        "queries_per_example": {
            "forwards": float(made.counter.forwards.mean()),
            "backwards": float(made.counter.backwards.mean()),
        },
        "chunk": made.chunk,
    }
    return plain, facts


def unmoved(job: Craft, split: Split) -> dict[str, Tensor]:
    """Return what is kept of a shard that no attack has moved.

    Args:
        job: The shard.
        split: Its data set.

    Returns:
        The tensors that `attacked` returns of an attack that does nothing and looks at nothing.
    """
    rows = slice(job.start, job.stop)
    still = torch.zeros(job.stop - job.start, dtype=torch.bool)
    passes = torch.zeros(len(still), dtype=torch.float64)
    return {
        "index": split.index[rows],
        "target": torch.full((len(still),), -1),
        "moved": still,
        "images": split.images[:0],
        "invalid": still,
        "forwards": passes,
        "backwards": passes,
    }


@dataclass(frozen=True)
class Made:
    """What an attack returned, and what it cost."""

    validated: Validated
    """The images that the defense is shown, after the checks of the referee."""
    notes: Mapping[str, Tensor]
    """A tensor (N, ...) for each note, by its name."""
    watched: Mapping[str, Tensor]
    """What the referee saw of it, by the names of columns; empty where the attack looked at nothing."""
    target: Labels | None
    """Labels to reach, int64 (N,); None for an untargeted attack."""
    counter: QueryCounter
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
        ValueError: A note of the attack has a name of the harness's own columns, or cannot be a column.
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
    attack_run, index = job.attack_run, split.index[job.start : job.stop]
    # In another process an entry is what is registered, whatever its parameters are.
    entry = needing(attack_run.attack.entry, attack_run.attack.params)
    counter = QueryCounter.of(len(y), x.device)
    target = _targets(attack_run, y, index)
    modules = [model] if model is not None else []

    def ask() -> None:
        seen = look(attack_run, model, split, x.device)
        # Many at once, as the attack did: what a network keeps may depend on the number of images.
        seen.logits(seen.encode(x[:chunk]))

    starts = None if attack_run.starts is None else stored(attack_run.starts, x, index)
    with frozen(*modules, seed=seed_of(job.key), ask=ask):
        view, watch = replace(no_access_view(counter), starts=starts), None
        if attack_run.source is not None and attack_run.view is not None:
            looked = look(attack_run, model, split, x.device)
            watch = Watch(x, y, attack_run.threat, target=target, refusal=looked.refusal)
            given = partial(
                instrument, looked, target=target, exact=attack_run.exact, starts=starts, chunk=chunk
            )
            view = given(counter=counter, access=entry.access, recompute=recompute, watch=watch)
            view = eot(view, attack_run.view.draws)
            # What the referee asks for itself is no pass of the attack.
            apart = given(counter=QueryCounter.of(len(y), x.device), access="score")
            apart = eot(apart, attack_run.view.draws)
        noise = draws(job, index, x.device)
        with limited(attack_run.time_limit):
            returned = entry.make(
                view, x.clone(), y.clone(), attack_run.threat, noise, **bind(entry, attack_run.attack.params)
            )
        validated = validate(x, returned, attack_run.threat)
        watched = {} if watch is None else watch.columns(apart, validated.images)
    notes = dict(returned.notes) if isinstance(returned, Crafted) else {}
    if taken := sorted(set(notes) & {*OUTCOME_COLUMNS, *WATCHED}):
        raise ValueError(f"the attack's notes {taken} have names that the referee's own columns have")
    for name, note in notes.items():
        _check_note(name, note, len(y))
    return Made(validated, notes, watched, target, counter, chunk if recompute else None)


def draws(job: Craft, index: Tensor, device: torch.device) -> Noise:
    """Return the draws of an attack on a shard.

    Args:
        job: The shard and the attack.
        index: The index of each example in its data set: int64 (N,).
        device: The device of the draws.

    Returns:
        Streams of N examples; of an attack made of attacks, each member's are those that it has alone.
    """
    run = job.attack_run
    shard = job.key if run.attack.entry.rng == "shard" else None
    noise = Noise(run.key, index, device=device, shard=shard)
    if not run.members:
        return noise
    alone = {
        bound({"use": member.attack.name, **member.attack.params}).stream: draws(
            Craft(member, job.start, job.stop), index, device
        )
        for member in run.members
    }
    return MemberNoise(run.key, index, alone, device=device)


class MemberNoise(Noise):
    """The draws of an attack made of attacks, whose members draw what they draw where they are run alone.

    So the examples that they break do not depend on their order, nor on what else is in the sequence.

    Args:
        key: What its own streams are seeded by.
        index: Index of each example in its data set: int64 (N,).
        alone: The streams of each member's own run, by the name that it is spawned under.
        device: Device of the draws.
    """

    def __init__(
        self, key: object, index: Tensor, alone: Mapping[str, Noise], *, device: torch.device
    ) -> None:
        super().__init__(key, index, device=device)
        self._alone = alone

    def spawn(self, name: str) -> Self:
        """Return the streams of a member at their beginning; of any other name, streams of its own.

        Args:
            name: Name of the streams.

        Returns:
            Streams of N examples.
        """
        part = super().spawn(name)
        if name in self._alone:
            own = self._alone[name]
            part._stream, part._shard = own._stream.clone(), own._shard
        return part


def stored(starts: Starts, x: Images, index: Tensor) -> Images:
    """Return the stored images at which an attack begins.

    Args:
        starts: The file and the run in it.
        x: Clean images (N, C, H, W): what is shown of an example that was not moved.
        index: The index of each example in its data set: int64 (N,).

    Returns:
        Images (N, C, H, W) on the device of `x`.

    Raises:
        InputError: The file was changed, or has no image of one of the examples.
    """
    found = replays.load(starts.path, starts.run, starts.digest)
    rows = {place: row for row, place in enumerate(found.index.tolist())}
    if not rows.keys() >= set(index.tolist()):
        raise InputError(f"{starts.path}: stored images are of other examples than those that are attacked")
    at = torch.tensor([rows[place] for place in index.tolist()])
    moved = torch.from_numpy(found.moved)
    place = moved.cumsum(0) - 1
    z = x.clone()
    chosen = moved[at]
    z[chosen.to(x.device)] = torch.from_numpy(found.images)[place[at[chosen]]].to(x)
    return z


_STORED = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.float32, torch.float64}
)
"""Dtypes that a column of outcomes can hold."""


def _check_note(name: str, note: object, n: int) -> None:
    """Raise where a note cannot become a column of `n` outcomes."""
    if not isinstance(note, Tensor):
        raise TypeError(f"the attack's note {name!r} is a {type(note).__name__}, and not a tensor")
    if note.shape != (n,):
        raise ValueError(
            f"the attack's note {name!r} has the shape {tuple(note.shape)} for {n} images, not ({n},)"
        )
    if note.dtype not in _STORED:
        raise ValueError(f"the attack's note {name!r} is of {note.dtype}, which no table holds")


def _targets(attack_run: AttackRun, y: Labels, index: Tensor) -> Labels | None:
    if attack_run.target is None:
        return None
    assert attack_run.source is not None
    classes = attack_run.source.train.data.shape.classes
    if attack_run.target == "random":
        drawn = Noise((attack_run.key, "target"), index, device=y.device).integers((), classes - 1)
        return (y + 1 + drawn) % classes
    return (y + attack_run.target) % classes


def look(attack_run: AttackRun, model: Any, split: Split, device: torch.device) -> View:
    """Return the view through which an attack looks, as the defense makes it.

    Args:
        attack_run: The attack with its source, its view and their settings.
        model: The fitted network.
        split: The data set; a view of decisions looks in it for images that the read-out accepts.
        device: The device of the network.

    Returns:
        The view, before it passes through `instrument`.

    Raises:
        TypeError: The method of the defense returned no `View`.
    """
    assert attack_run.source is not None
    assert attack_run.view is not None
    entry = attack_run.source.train.defense.entry
    if attack_run.view.use.startswith("decision:"):
        readout = attack_run.view.use.removeprefix("decision:")
        classes = attack_run.source.train.data.shape.classes

        def decide(z: Images) -> Decision:
            return decided(model, z, readout, device)

        return answers_only(decide, classes, guides(decide, split.images, split.labels, classes).to(device))
    found = entry.view(attack_run.view.use)
    assert found is not None
    seen = getattr(model, found.method)(**bind(found, attack_run.view.params))
    if not isinstance(seen, View):
        raise TypeError(f"view {found.name!r} of {entry.name} is a {type(seen).__name__}, not a View")
    return seen

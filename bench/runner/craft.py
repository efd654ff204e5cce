"""The crafting job: attacks a shard through a view, and keeps the images that the referee accepts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.errors import InputError, out_of_memory
from bench.losses import eot, succeeded
from bench.noise import Noise, seed_of
from bench.protocols import Crafted, Decision, Images, Labels, Split, View
from bench.referee.answers import CHUNK, decided
from bench.referee.freezing import frozen, seeded
from bench.referee.instruments import QueryCounter, answers_only, guides, instrument, no_access_view
from bench.referee.precision import Claims, check_bfloat16, copied, in_bfloat16
from bench.referee.validation import Validated, leeway, validate
from bench.referee.watch import Watch
from bench.registry import bind, bound, needing
from bench.remarks import listening
from bench.results import replays
from bench.results.outcomes import RESERVED
from bench.results.store import Store
from bench.runner.context import WorkerContext, load
from bench.runner.interrupts import raise_if_asked
from bench.runner.limits import limited
from bench.runner.pace import heard
from bench.runner.preflight import try_gradient
from bench.runner.train import fitted, forget_fitted
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
    # Who sees answers alone may be guided by any image of the set.
    guided = attack_run.view is not None and attack_run.view.use.startswith("decision:")
    split = load(attack_run.data, context, None if guided else job.stop)
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
    with listening() as remarks:
        made = searched(job, model, Examples(x, y, split.index[rows]), split)
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
        **({"invalid_by": dict(validated.by)} if validated.by else {}),
        "queries_per_example": {
            "forwards": float(made.counter.forwards.mean()),
            "backwards": float(made.counter.backwards.mean()),
        },
        "chunk": made.chunk,
        **({"precision": made.coarse} if made.coarse else {}),
        **({"notes": remarks} if remarks else {}),
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
class Examples:
    """Examples that are attacked."""

    images: Images
    """Clean images (N, C, H, W), on the device of the attack."""
    labels: Labels
    """Their labels, int64 (N,), there too."""
    index: Tensor
    """The index of each in its data set, int64 (N,), on the CPU."""

    def at(self, rows: Tensor) -> "Examples":
        """Return some of the examples.

        Args:
            rows: Their positions, int64 (n,), on the device of the images.
        """
        return Examples(self.images[rows], self.labels[rows], self.index[rows.cpu()])


@dataclass(frozen=True)
class Made:
    """What an attack returned, and what it cost."""

    images: object
    """The returned value itself: images, `Crafted`, or anything that the referee refuses."""
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
    chunk: int | None = None
    """The most points that were computed at once, where memory was short; None otherwise."""
    claimed: Tensor | None = None
    """True where a search in bfloat16 took the example for broken: bool (N,)."""
    confirmed: Tensor | None = None
    """True where the view answers the returned image wrongly in float32: bool (N,)."""
    coarse: Mapping[str, Any] = field(default_factory=dict)
    """What a receipt says of a search in bfloat16; empty of one in float32."""


def searched(job: Craft, model: Any, examples: Examples, split: Split) -> Made:
    """Run an attack on a shard, in the precision of the job.

    A search in bfloat16 draws what one in float32 draws. An example that it took for broken, and whose image
    float32 answers rightly, is searched again in float32, which does for it what a run in float32 does.

    Args:
        job: The shard and the attack.
        model: The fitted network that is attacked; None for an attack without access.
        examples: The examples of the shard.
        split: The data set of the shard.

    Returns:
        What the attack returned, and what it cost in both searches.

    Raises:
        ValueError: The attack returned images or notes of another form when it searched again.
        OvertimeError: The attack took longer than its limit.
    """
    run = job.attack_run
    exact = replace(job, attack_run=replace(run, precision="float32"))
    begun = monotonic()
    first = attack(exact, model, examples, split, coarse=run.precision != "float32")
    if first.claimed is None or first.confirmed is None:
        return first
    disputed = first.claimed & ~first.confirmed
    facts = {
        "search": "bfloat16",
        "claimed": int(first.claimed.sum()),
        "searched_again": int(disputed.sum()),
        "broken_unnoticed": int((first.confirmed & ~first.claimed).sum()),
        # Those of both searches are in the columns of the outcomes.
        "passes": {name: float(getattr(first.counter, name).sum()) for name in ("forwards", "backwards")},
    }
    rows = disputed.nonzero().flatten()
    if len(rows) == 0:
        return replace(first, coarse=facts)
    if run.time_limit is not None:
        # A limit is that of the shard, and not of each search.
        left = max(run.time_limit - (monotonic() - begun), 0.01)
        exact = replace(exact, attack_run=replace(exact.attack_run, time_limit=left))
    again = attack(exact, model, examples.at(rows), split)
    joined = _joined(first, again, rows)
    validated = validate(examples.images, joined.images, run.threat)
    return replace(joined, validated=validated, coarse=facts)


def _joined(first: Made, again: Made, rows: Tensor) -> Made:
    """Return what two searches made, the second of the examples at `rows` alone."""
    images, more = _images(first), _images(again)
    alike = first.notes.keys() == again.notes.keys() and more.dtype == images.dtype
    if not alike or more.shape != (len(rows), *images.shape[1:]):
        raise ValueError("the attack returned images or notes of another form when it searched again")
    counter = first.counter
    for passes, added in (
        (counter.forwards, again.counter.forwards),
        (counter.backwards, again.counter.backwards),
    ):
        passes[rows] += added
    notes = {name: _placed(note, again.notes[name], rows) for name, note in first.notes.items()}
    watched = {name: _placed(values, again.watched[name], rows) for name, values in first.watched.items()}
    chunks = [each for each in (first.chunk, again.chunk) if each is not None]
    images = _placed(images, more, rows)
    return replace(first, images=images, notes=notes, watched=watched, chunk=min(chunks, default=None))


def _images(made: Made) -> Tensor:
    """Return the images that an attack returned; what they are is the referee's to judge."""
    returned = made.images.images if isinstance(made.images, Crafted) else made.images
    if not isinstance(returned, Tensor):
        raise TypeError(f"the attack returned a {type(returned).__name__}, not a tensor of images")
    return returned


def _placed(values: Tensor, others: Tensor, rows: Tensor) -> Tensor:
    """Return values with others at some rows."""
    found = values.detach().clone()
    found[rows.to(found.device)] = others.detach().to(found)
    return found


def attack(job: Craft, model: Any, examples: Examples, split: Split, *, coarse: bool = False) -> Made:
    """Run an attack on examples; where memory is short, again with chunks of half the size.

    With smaller chunks activations are computed again in the backward pass, which saves memory and costs
    time. The second run begins at the clean images, with the same draws.

    Args:
        job: The shard and the attack.
        model: The fitted network that is attacked; None for an attack without access.
        examples: Those of the shard, or some of them.
        split: The data set of the shard.
        coarse: Whether the network is asked in bfloat16.

    Returns:
        What the attack returned, and what it cost.

    Raises:
        ValueError: A note of the attack has a name of the harness's own columns, or cannot be a column.
        OvertimeError: The attack took longer than its limit.
    """
    x = examples.images
    chunk: int | None = CHUNK[x.device.type]
    recompute = False
    while True:
        try:
            run = _coarse_attack if coarse else _attack
            made = run(job, model, examples, split, chunk, recompute)
            return replace(made, chunk=chunk if recompute else None)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or chunk is None or chunk <= 1:
                raise
            chunk, recompute = max(min(chunk, len(x)) // 2, 1), True
            if x.is_cuda:
                torch.cuda.empty_cache()


def _attack(
    job: Craft, model: Any, examples: Examples, split: Split, chunk: int | None, recompute: bool
) -> Made:
    """Run an attack on examples in float32."""
    x, run = examples.images, job.attack_run
    modules = [model] if model is not None else []

    def ask() -> None:
        seen = look(run, model, split, x.device)
        # Many at once, as the attack did: what a network keeps may depend on the number of images.
        seen.logits(seen.encode(x[:chunk]))

    with frozen(*modules, seed=seed_of(job.key), ask=ask):
        if model is not None and run.view is not None:
            with seeded(seed_of(job.key), x.device):
                try_gradient(run, look(run, model, split, x.device), x)
        instrumented = partial(instrument, exact=run.exact, chunk=chunk, recompute=recompute)
        return _made(job, model, examples, split, instrumented, _judge(run, model, split, chunk))


def _coarse_attack(
    job: Craft, model: Any, examples: Examples, split: Split, chunk: int | None, recompute: bool
) -> Made:
    """Run an attack on examples in bfloat16, and have float32 answer about the images that it returned."""
    x, y, run = examples.images, examples.labels, job.attack_run
    target, twin = _targets(run, examples), copied(model)
    size = leeway(run.threat.norm, x[0].numel())
    claims = Claims(look(run, twin, split, x.device), x, y, run.threat, size, target)
    instrumented = partial(instrument, exact=run.exact, chunk=chunk, recompute=recompute)
    seed = seed_of(job.key)

    def ask() -> None:
        for each in (model, twin):
            seen = look(run, each, split, x.device)
            seen.logits(seen.encode(x[:chunk]))

    with frozen(model, twin, seed=seed, ask=ask):
        with seeded(seed, x.device):
            _try_bfloat16(run, look(run, twin, split, x.device), x[:2])
        judge = _judge(run, model, split, chunk)
        made = _made(job, twin, examples, split, partial(instrumented, claims=claims), judge)
        seen = judge(x, target)
        confirmed = succeeded(seen, seen.logits(seen.encode(made.validated.images)), y)
    return replace(made, claimed=claims.claimed, confirmed=confirmed)


def _try_bfloat16(run: AttackRun, view: View, few: Images) -> None:
    """Refuse a view that cannot be asked in bfloat16, or to which that makes no difference."""
    gradient = run.attack.entry.access == "gradient"

    def asked() -> Tensor:
        with torch.set_grad_enabled(gradient):
            z = view.encode(few.clone()).detach().requires_grad_(gradient)
            logits = in_bfloat16(view.logits)(z)
            if gradient and logits.requires_grad:
                torch.autograd.grad(logits.float().sum(), z, allow_unused=True)
        return logits

    check_bfloat16(asked)


def _judge(
    run: AttackRun, model: Any, split: Split, chunk: int | None
) -> Callable[[Images, Labels | None], View]:
    """Return what makes the view for the referee's own questions, which are no passes of the attack."""

    def view(x: Images, target: Labels | None) -> View:
        assert run.view is not None
        uncounted = QueryCounter.of(len(x), x.device)
        seen = look(run, model, split, x.device)
        seen = instrument(seen, uncounted, "score", target=target, exact=run.exact, chunk=chunk)
        return eot(seen, run.view.draws)

    return view


def _made(
    job: Craft,
    model: Any,
    examples: Examples,
    split: Split,
    instrumented: Callable[..., View],
    judge: Callable[[Images, Labels | None], View],
) -> Made:
    """Run an attack on examples, on networks that are frozen already.

    Args:
        job: The shard and the attack.
        model: The network that is looked at.
        examples: The examples.
        split: The data set.
        instrumented: `instrument` with all but the view, the counter, the access, target, starts and watch.
        judge: Makes the view for the referee's own questions.
    """
    run, x, y, device = job.attack_run, examples.images, examples.labels, examples.images.device
    # In another process an entry is what is registered, whatever its parameters are.
    entry = needing(run.attack.entry, run.attack.params)
    counter, target = QueryCounter.of(len(y), device, heard()), _targets(run, examples)
    starts = None if run.starts is None else stored(run.starts, x, examples.index)
    view, watch = replace(no_access_view(counter), starts=starts), None
    if run.source is not None and run.view is not None:
        seen = look(run, model, split, device)
        watch = Watch(x, y, run.threat, target=target, refusal=seen.refusal)
        given = partial(instrumented, target=target, starts=starts, watch=watch)
        view = eot(given(seen, counter, entry.access), run.view.draws)
    noise = draws(job, examples.index, device)
    with limited(run.time_limit):
        returned = entry.make(view, x.clone(), y.clone(), run.threat, noise, **bind(entry, run.attack.params))
    # An attack made of attacks goes on where one of them raised, and that may have hidden a signal.
    raise_if_asked()
    validated = validate(x, returned, run.threat)
    watched = {} if watch is None else watch.columns(judge(x, target), validated.images)
    notes = dict(returned.notes) if isinstance(returned, Crafted) else {}
    if taken := sorted(set(notes) & RESERVED):
        raise ValueError(f"the attack's notes {taken} have names that the referee's own columns have")
    for name, note in notes.items():
        _check_note(name, note, len(y))
    return Made(returned, validated, notes, watched, target, counter)


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


def _targets(attack_run: AttackRun, examples: Examples) -> Labels | None:
    y, index = examples.labels, examples.index
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
        name = attack_run.source.train.defense.called
        raise TypeError(f"view {found.name!r} of {name} is a {type(seen).__name__}, not a View")
    return seen

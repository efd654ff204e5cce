"""What attacks and defenses are made of: images, threats, views, decisions, and the two protocols.

Nothing here knows of tasks, files or tables. An attack sees a `View`; a judge asks for a `Decision`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Images: TypeAlias = Tensor
"""float32 (N, C, H, W) in [0, 1]; each defense normalises for itself."""

Labels: TypeAlias = Tensor
"""int64 (N,)."""

Norm: TypeAlias = Literal["linf", "l2", "l1", "l0"]


class Shape(NamedTuple):
    """What a defense is built for: the form of one image, and the number of classes."""

    channels: int
    height: int
    width: int
    classes: int


@dataclass(frozen=True)
class Threat:
    """How far an input may move: a norm, and a radius in [0, 1] units (infinite: as little as possible)."""

    norm: Norm
    radius: float = math.inf

    def distance(self, x: Images, z: Images) -> Tensor:
        """Return the distance of each example, (N,), in this threat's norm."""
        return distance(x, z, self.norm)

    def project(self, x: Images, z: Images) -> Images:
        """Return the nearest point to `z` in the ball around `x` (linf and l2), then in the box.

        The box step only moves pixels towards `x`, so that it cannot leave the ball.
        """
        if math.isinf(self.radius):
            return z.clamp(0, 1)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(z, x - self.radius), x + self.radius).clamp_(0, 1)
        if self.norm == "l2":
            return shrink(x, z, self.norm, self.radius).clamp_(0, 1)
        raise NotImplementedError(f"projection on the {self.norm} ball")


def distance(x: Images, z: Images, norm: Norm) -> Tensor:
    """Return the distance between `x` and `z` per example, (N,); `l0` counts pixels that differ."""
    return lengths(z - x, norm)


def lengths(moves: Tensor, norm: Norm) -> Tensor:
    """Return the length of each of `moves` (N, ...), (N,).

    In `l0` those of images (N, C, H, W) count pixels, whose channels move as one; others count values.
    """
    if norm == "linf":
        # vector_norm takes 13 to 20 times as long for the same bits.
        return moves.flatten(1).abs().amax(1)
    if norm == "l0":
        moved = (moves != 0).any(1) if moves.dim() == 4 else moves != 0
        return moved.flatten(1).sum(1).to(moves.dtype)
    order: dict[Norm, float] = {"l2": 2, "l1": 1}
    found: Tensor = torch.linalg.vector_norm(moves.flatten(1), order[norm], dim=1)
    return found


def shrink(x: Images, z: Images, norm: Norm, radius: float) -> Images:
    """Return `z` drawn towards `x` on a straight line until it is within `radius`."""
    move = z - x
    length = lengths(move, norm).clamp_min(torch.finfo(z.dtype).tiny)
    return x + move * (radius / length).clamp_max(1).view(-1, *[1] * (x.dim() - 1))


def answered(logits: Tensor) -> Tensor:
    """Return bool (N,): whether each row of logits (N, K) is an answer. Minus infinity is a class that cannot
    be; NaN, plus infinity, or minus infinity for every class are none.
    """
    return logits.amax(-1).isfinite()


def identity(x: Tensor) -> Tensor:
    """Return `x`."""
    return x


@runtime_checkable
class Narrowing(Protocol):
    """A callable that knows which examples the rows of its argument belong to."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """Answer for each row."""
        ...

    def take(self, rows: Tensor, /) -> Self:
        """Return the callable for the examples at `rows` only."""
        ...


@dataclass(frozen=True)
class View:
    """What an attacker may look through: points of some space, and the logits they earn.

    `logits` takes (N, ...) points and returns (N, K) scores. Where an attack looks at several points
    for each example, it stacks them along the first axis, copy after copy: (copies * N, ...).
    """

    logits: Callable[[Tensor], Tensor]
    encode: Callable[[Images], Tensor] = identity
    """Where to start: images to points."""
    decode: Callable[[Tensor], Images] = identity
    """What the defense will be shown: points to images."""
    refusal: bool = False
    """The last column is a refusal: the defender's, never a goal."""
    centred: bool = True
    """False where the level of the logits matters, so that no constant may be taken off."""
    target: Labels | None = None
    """The label to reach for each example, set by the harness; None: any wrong one."""
    final: bool = True
    """Set by the harness: True where winning here is winning, so that an attack may stop at its first
    success. False on a surrogate (the first pass, another network): there it pushes to the end."""

    answers: ClassVar[tuple[str, ...]] = ("logits",)
    """The callables that cost queries; a subclass adds its own."""

    def take(self, rows: Tensor) -> Self:
        """Return this view for the examples `rows` only (their positions, int64)."""
        narrowed: dict[str, Any] = {
            name: call.take(rows)
            for name in self.answers
            if isinstance(call := getattr(self, name), Narrowing)
        }
        if self.target is not None:
            narrowed["target"] = self.target[rows]
        return replace(self, **narrowed)


def _missing(*_: Tensor) -> Tensor:
    raise NotImplementedError


@dataclass(frozen=True)
class Inversion(View):
    """A view in the space ``inversion``: a generative defense that explains an image by a latent code.

    Latent backtracking and latent descent ask for this surface; a defense that inverts a generator
    offers it. `encode` and `decode` are the inversion and the generator as maps of the whole batch.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "energy", "classify")

    invert: Callable[[Images], Tensor] = _missing
    """The code that explains an image best: (N, C, H, W) -> (N, ...)."""
    energy: Callable[[Tensor, Images], Tensor] = _missing
    """How badly a code explains an image: (N,), differentiable in both."""
    classify: Callable[[Tensor, Images], Tensor] = _missing
    """Logits (N, K) of a code and its image."""


@dataclass(frozen=True)
class Features(View):
    """A view in the space ``features``: of pixels, that also shows what a network makes of an image.

    Attacks that match the features of another image ask for this surface.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "features")

    features: Callable[[Images], Tensor] = _missing
    """The features of each image: (N, C, H, W) -> (N, D), differentiable."""
    centres: Tensor | None = None
    """The features that are typical of each class, (K, D), where the defense has learned such."""
    guides: Images | None = None
    """An image of each class that the defense accepts, (K, C, H, W), where it has kept such."""


@dataclass(frozen=True)
class Prototypes(View):
    """A view in the space ``prototypes``: of pixels, that also shows what each class would draw.

    Latent descent asks for this surface: it moves an image towards another class's drawing of it.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "prototypes")

    prototypes: Callable[[Images], Tensor] = _missing
    """Every class's nearest image, no gradient: (N, C, H, W) -> (N, K, C, H, W), in [0, 1]."""


class Decision(NamedTuple):
    """What a defense answers: one label per input, or a refusal."""

    label: Labels
    """The arg-max, also where the input is refused."""
    rejected: Tensor
    """bool (N,)."""
    score: Tensor
    """float (N,), higher is surer; lets thresholds be redrawn later."""
    logits: Tensor | None = None
    """float (N, K), what the label was read from, if there is such a thing."""
    thresholds: Tensor | None = None
    """float (K,), for a read-out that refuses by class: an answer is refused where its logit is below its
    class's threshold."""

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """Return the arg-max of logits (N, K), nothing refused, scored by the softmax's maximum."""
        return cls(
            label=logits.argmax(1),
            rejected=torch.zeros(len(logits), dtype=torch.bool, device=logits.device),
            score=logits.softmax(1).amax(1),
            logits=logits,
        )


class Crafted(NamedTuple):
    """Images, and what the attack notes of each: columns (N,) such as `failed` or `found_by`."""

    images: Images
    notes: Mapping[str, Tensor]


class Randomness(Protocol):
    """Draws that an attack or a training may make; see `bench.noise.Noise`."""

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (N, *shape) numbers, uniform in [low, high)."""
        ...

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Return (N, *shape) standard normal numbers."""
        ...

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Return (N, *shape) numbers that are -1 or 1 with equal chance."""
        ...

    def integers(self, shape: tuple[int, ...], bound: int) -> Tensor:
        """Return (N, *shape) int64 numbers in [0, bound)."""
        ...

    def shared(self) -> "Randomness":
        """Return draws (1, *shape) that the whole shard shares; only for attacks ``keyed="shard"``."""
        ...

    def take(self, rows: Tensor) -> "Randomness":
        """Return the draws of the examples `rows` only; what the others draw changes nothing here."""
        ...

    def apart(self, name: str) -> "Randomness":
        """Return streams of their own for a part of an attack, `name`: how much the others draw is nothing
        to it, and it always starts at the same place.
        """
        ...


class Attack(Protocol):
    """A function from images to images, looking through a view."""

    def __call__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, /
    ) -> Images | Crafted:
        """Return images (N, C, H, W) within `threat` of `x` that the view gets wrong, if it can."""
        ...


@dataclass(frozen=True)
class Use:
    """A registered thing with its parameters: as a defense's own parameter, its inner attack."""

    use: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A parameter that names another defense of the suite: one to start from, or to contain."""

    defense: str


@dataclass(frozen=True)
class Split:
    """Examples to learn from: images, labels, and each example's index in its data set."""

    images: Images
    labels: Labels
    index: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


class Batch(NamedTuple):
    """A step of an epoch: images and labels on the training's device, and draws for them."""

    images: Images
    labels: Labels
    noise: Randomness


class Epoch(Protocol):
    """One pass over the training images."""

    number: int
    """From 0."""

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield the split in a seeded order of this epoch's own."""
        ...

    def report(self, loss: Tensor) -> None:
        """Note a step's loss, a scalar; raise `TrainingError` at the epoch's end if any was not finite."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """What a training goes on with after an interruption: a network, an optimiser, a schedule, a scaler."""

    def state_dict(self) -> Any:
        """Return what it has become: dicts, lists, tuples, sets, tensors, arrays, numbers, texts."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Become what `state_dict` returned."""
        ...


class Fitting(Protocol):
    """What a training is given beside its images."""

    device: torch.device
    parts: Mapping[str, nn.Module]
    """Fitted defenses, under the name of the parameter that asked for them."""

    def attack(self, use: Use) -> Attack:
        """Return a registered attack, its parameters bound: the inner attack of adversarial training."""
        ...

    def epochs(self, count: int, model: Stateful, *parts: Stateful) -> Iterator[Epoch]:
        """Yield the epochs still to do: state is restored before the first and saved after each.

        Everything that changes while it trains must be given: optimisers, schedules of rates, scalers, means.
        """
        ...

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        """Return how many batches of `size` an epoch has."""
        ...

    def note(self, sentence: str) -> None:
        """Say what a reader of the numbers should know of the training; it is kept in the receipt."""
        ...


class Defense(Protocol):
    """A network that can be fitted, looked through and asked; an `nn.Module` with three more methods.

    Constructed with the data's `Shape` and keyword-only hyperparameters. Its views are methods under
    `@view`; each returns a `View`.
    """

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Learn from `train`, or load what was learned."""
        ...

    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer; deterministic, with internal state reset, whatever was asked before."""
        ...

"""The contract between the harness and the attacks and defenses that it runs.

The module defines the data that both sides exchange (`Images`, `Labels`, `Threat`, `View`, `Decision`) and
the protocols that a contributor implements: `Attack` and `Defense`. It knows no task file, no stored result
and no table. An attack sees a `View` of a network, never the network itself. The score of a defense comes
from its `Decision`.

Letters in shapes: N examples, C channels, H rows, W columns, K classes, D features, T answers to the same
point (random draws, or passes of a network with feedback).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Images: TypeAlias = Tensor
"""Images: float32 (N, C, H, W), every value in [0, 1]. A defense normalises them for itself."""

Labels: TypeAlias = Tensor
"""Class labels: int64 (N,), every value in [0, K)."""

Norm: TypeAlias = Literal["linf", "l2", "l1", "l0"]
"""The norm that measures a move. ``l0`` counts the pixels that differ; the channels of a pixel count once."""


class Shape(NamedTuple):
    """The shape of one image and the number of classes: what a defense is constructed for."""

    channels: int
    """C: 1 for grey images, 3 for colour."""
    height: int
    """H, in pixels."""
    width: int
    """W, in pixels."""
    classes: int
    """K, without a refusal."""


@dataclass(frozen=True)
class Threat:
    """A threat model: the norm, and the largest distance that an attack may move an image."""

    norm: Norm
    """The norm in which moves are measured."""
    radius: float = math.inf
    """The radius of the ball around the clean image, 0 or more. One unit is the full range of a pixel value
    in ``linf``, ``l2`` and ``l1``, and one pixel in ``l0``. Infinite: the attack looks for the smallest move
    that succeeds.
    """

    def distance(self, x: Images, z: Images) -> Tensor:
        """Return the distance between each clean image and its moved image, in the norm of this threat.

        Args:
            x: Clean images (N, C, H, W).
            z: Moved images, of the same shape.

        Returns:
            Distances (N,), in the dtype of `z - x`.
        """
        return distance(x, z, self.norm)

    def project(self, x: Images, z: Images) -> Images:
        """Project each image of `z` on the ball around its clean image, then clamp it to [0, 1].

        Clamping moves a value only towards `x`, which lies in [0, 1], so that the result stays in the ball.
        With an infinite radius the images are only clamped. In ``linf`` and ``l2`` the first part is the
        nearest point of the ball.

        Args:
            x: Clean images (N, C, H, W), the centres of the balls.
            z: Images to project, of the same shape.

        Returns:
            Images (N, C, H, W) in the ball and in [0, 1].

        Raises:
            NotImplementedError: The norm is ``l1`` or ``l0`` and the radius is finite.
        """
        if math.isinf(self.radius):
            return z.clamp(0, 1)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(z, x - self.radius), x + self.radius).clamp_(0, 1)
        if self.norm == "l2":
            return shrink(x, z, self.norm, self.radius).clamp_(0, 1)
        raise NotImplementedError(f"projection on the {self.norm} ball")


def distance(x: Images, z: Images, norm: Norm) -> Tensor:
    """Return the distance between each example of `x` and its counterpart in `z`.

    Args:
        x: Tensors (N, ...), usually clean images (N, C, H, W).
        z: Tensors of the same shape.
        norm: The norm. For images ``l0`` counts pixels.

    Returns:
        Distances (N,), as `lengths` returns them.
    """
    return lengths(z - x, norm)


def lengths(moves: Tensor, norm: Norm) -> Tensor:
    """Return the length of each move in a norm.

    Args:
        moves: Differences (N, ...), usually of images (N, C, H, W).
        norm: The norm. In ``l0`` a move of four dimensions (N, C, H, W) counts the pixels with a channel that
            differs from 0; a move of any other shape counts its values that differ from 0.

    Returns:
        Lengths (N,), in the dtype of `moves`.
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
    """Move each example of `z` towards `x` on a straight line until its distance is at most `radius`.

    In ``l2`` this is the projection on the ball. In ``l1`` the result lies in the ball and is not its nearest
    point.

    Args:
        x: Centres (N, ...).
        z: Points of the same shape.
        norm: The norm of the ball: ``linf``, ``l2`` or ``l1``.
        radius: The radius of the ball, finite and 0 or more.

    Returns:
        Points (N, ...). A point that is in the ball already keeps its place up to rounding.
    """
    move = z - x
    length = lengths(move, norm).clamp_min(torch.finfo(z.dtype).tiny)
    return x + move * (radius / length).clamp_max(1).view(-1, *[1] * (x.dim() - 1))


def answered(logits: Tensor) -> Tensor:
    """Return whether each row of logits names a class.

    Minus infinity rules a class out. A row with NaN or plus infinity, or with minus infinity for every class,
    names none.

    Args:
        logits: Logits (..., K).

    Returns:
        bool (...).
    """
    return logits.amax(-1).isfinite()


def identity(x: Tensor) -> Tensor:
    """Return the argument: the map between images and points of a view in pixel space.

    Args:
        x: Any tensor.

    Returns:
        `x` itself.
    """
    return x


@runtime_checkable
class Narrowing(Protocol):
    """A callable that can be restricted to some of its examples.

    The callables of a `View` that the harness hands to an attack are of this kind: they count passes for each
    example, and so must know to which example each row of their argument belongs.
    """

    def __call__(self, z: Tensor, /) -> Tensor:
        """Return the answer for each row.

        Args:
            z: Points (copies * N, ...), copy after copy; N is the number of examples of this callable.

        Returns:
            One answer for each row of `z`.
        """
        ...

    def select(self, rows: Tensor, /) -> Self:
        """Return the callable for some of the examples.

        Args:
            rows: Positions of the examples among those of this callable: int64 (n,), each in [0, N).

        Returns:
            A callable of the same kind for n examples, in the order of `rows`.
        """
        ...


@dataclass(frozen=True)
class View:
    """The part of a defense that an attack may see: points of a space, and the logits of these points.

    A defense returns a view from each of its methods under `@view`. The harness wraps it before an attack
    sees it: the wrapped view counts the passes of each example, subtracts the maximum from each row of logits
    (unless `centred` is false), answers in the dtype of the points, and gives gradients only to an attack
    that is declared with ``access="gradient"``.

    The space ``pixel`` has images as its points. In another space (``inversion``, say) an attack begins at
    `encode(x)`, searches among points, and returns `decode(point)`.
    """

    logits: Callable[[Tensor], Tensor]
    """Logits of points: (N, ...) -> (N, K), or (T, N, K) for T answers to each point. An attack that asks
    about several points for each example stacks them along the first axis, copy after copy: (copies * N, ...)
    -> (copies * N, K). Differentiable, unless the view is declared with ``gradient=False``.
    """
    encode: Callable[[Images], Tensor] = identity
    """The point at which an attack starts: images (N, C, H, W) -> points (N, ...)."""
    decode: Callable[[Tensor], Images] = identity
    """The image that the defense is shown: points (N, ...) -> images (N, C, H, W)."""
    refusal: bool = False
    """True where the last of the K columns of `logits` is a refusal, which is never a success of the attack.
    """
    centred: bool = True
    """False where the level of the logits has a meaning, so that no constant may be subtracted from a row."""
    target: Labels | None = None
    """Labels (N,) that the attack shall reach, set by the harness; None for an untargeted attack."""
    exact: bool = True
    """Set by the harness. True where a success on this view is a success against the read-out that scores the
    defense, so that an attack may stop at its first success. False on a surrogate (the first pass of a
    network with feedback, another network) and on a random defense, where a success may be the luck of a
    draw: there an attack uses all of its steps.
    """
    starts: Images | None = None
    """Images (N, C, H, W) to begin at, set by the harness: what an earlier run left. None where an
    attack chooses its own starts. Only an attack that is declared with ``starts`` is given any.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits",)
    """Names of the callables whose calls count as passes. A subclass adds its own."""

    def select(self, rows: Tensor) -> Self:
        """Return this view for some of the examples.

        An attack that drops the examples it has broken calls this together with `select` of its draws.

        Args:
            rows: Positions of the examples: int64 (n,), each in [0, N).

        Returns:
            A view of the same class for n examples, its target and starts included.
        """
        narrowed: dict[str, Any] = {
            name: call.select(rows)
            for name in self.answers
            if isinstance(call := getattr(self, name), Narrowing)
        }
        if self.target is not None:
            narrowed["target"] = self.target[rows]
        if self.starts is not None:
            narrowed["starts"] = self.starts[rows]
        return replace(self, **narrowed)


def _missing(*_: Tensor) -> Tensor:
    raise NotImplementedError


@dataclass(frozen=True)
class Inversion(View):
    """A view in the space ``inversion``, of a defense that explains images by latent codes of a generator.

    Here `encode` inverts the generator for a batch, and `decode` is the generator. Attacks that search among
    latent codes (latent backtracking, latent descent by energy) are declared with ``space="inversion"``.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "energy", "classify")

    invert: Callable[[Images], Tensor] = _missing
    """The code that explains an image best: images (N, C, H, W) -> codes (N, ...)."""
    energy: Callable[[Tensor, Images], Tensor] = _missing
    """The misfit between a code and an image, lower is better: codes (N, ...), images (N, C, H, W) -> (N,).
    Differentiable in both.
    """
    classify: Callable[[Tensor, Images], Tensor] = _missing
    """Logits of a code and its image: codes (N, ...), images (N, C, H, W) -> (N, K)."""


class Described(NamedTuple):
    """What a network makes of a batch of images."""

    logits: Tensor
    """Logits of the images, (N, K)."""
    features: Tensor
    """Their features, (N, D)."""


def _undescribed(_: Images) -> Described:
    raise NotImplementedError


@dataclass(frozen=True)
class Features(View):
    """A view in the space ``features``: of images, with the features that the network computes.

    Attacks that match the features of another image are declared with ``space="features"``.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "described")

    described: Callable[[Images], Described] = _undescribed
    """The logits of images (N, C, H, W) and the features that they are read from, differentiable. Both come
    from one pass, and count as one.
    """
    centres: Tensor | None = None
    """The typical features of each class, (K, D), where the defense has learned such; None otherwise."""
    guides: Images | None = None
    """One image of each class that the defense accepts, (K, C, H, W), where it has such; None otherwise."""


class Explained(NamedTuple):
    """What an analysis by synthesis finds in a batch of images."""

    logits: Tensor
    """Logits of the images, (N, K)."""
    prototypes: Tensor
    """The prototype of each class that is nearest to each image, (N, K, C, H, W), values in [0, 1]."""


def _unexplained(_: Images) -> Explained:
    raise NotImplementedError


@dataclass(frozen=True)
class Prototypes(View):
    """A view in the space ``prototypes``: of images, with the prototype of each class that is nearest.

    Latent descent, which moves an image towards the prototype of another class, is declared with
    ``space="prototypes"``.
    """

    answers: ClassVar[tuple[str, ...]] = ("logits", "explained")

    explained: Callable[[Images], Explained] = _unexplained
    """The logits of images (N, C, H, W) and their prototypes, without gradient. One search finds both, so
    that it counts as one pass.
    """


class Decision(NamedTuple):
    """The answer of a defense to a batch: a label for each image, or a refusal."""

    label: Labels
    """The predicted class, int64 (N,), given for a refused image too."""
    rejected: Tensor
    """True where the image is refused: bool (N,)."""
    score: Tensor
    """The confidence in each answer: float (N,), higher is surer. A table can move the threshold of a refusal
    along it. NaN marks an image without an answer, which counts as broken.
    """
    logits: Tensor | None = None
    """The logits from which the label was read, float (N, K); None where there are none."""
    thresholds: Tensor | None = None
    """Thresholds of a read-out that refuses by class, float (K,): an answer is refused where its logit is
    below the threshold of its class. None for any other read-out.
    """

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """Return a decision that accepts every image: the arg-max of logits, scored by the softmax's maximum.

        Args:
            logits: Logits (N, K).

        Returns:
            The decision for N images.
        """
        return cls(
            label=logits.argmax(1),
            rejected=torch.zeros(len(logits), dtype=torch.bool, device=logits.device),
            score=logits.softmax(1).amax(1),
            logits=logits,
        )


class Crafted(NamedTuple):
    """The images of an attack, with notes about each of them."""

    images: Images
    """Images (N, C, H, W), in the order of the examples."""
    notes: Mapping[str, Tensor]
    """A tensor (N,) for each note, by its name (``failed``, ``found_by``); each becomes a column of the
    outcomes. The names of the harness's own columns (``label``, ``distance``, ...) are refused.
    """


class Randomness(Protocol):
    """The source of every random number of an attack or a training; `bench.noise.Noise` implements it.

    The draws of an example depend on the job, on the index of the example in its data set and on how often it
    has drawn before. They do not depend on the other examples, so that the size of a batch and the order of
    examples change no result. An attack that draws from a global generator of torch, numpy or Python loses
    this property.
    """

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw from the uniform distribution on [low, high).

        Args:
            shape: Shape of the draws of one example.
            low: Lower end of the interval, included.
            high: Upper end of the interval, excluded.

        Returns:
            Numbers (N, *shape).
        """
        ...

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw from the standard normal distribution.

        Args:
            shape: Shape of the draws of one example.

        Returns:
            Numbers (N, *shape).
        """
        ...

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Draw -1 or 1 with equal probability.

        Args:
            shape: Shape of the draws of one example.

        Returns:
            Numbers (N, *shape).
        """
        ...

    def integers(self, shape: tuple[int, ...], bound: int) -> Tensor:
        """Draw whole numbers from [0, bound) with equal probability.

        Args:
            shape: Shape of the draws of one example.
            bound: Upper end of the interval, excluded: 1 or more.

        Returns:
            int64 (N, *shape).
        """
        ...

    def shared(self) -> "Randomness":
        """Return a stream that all examples of the shard share.

        Only an attack that is declared with ``rng="shard"`` may ask for it: its result depends on the cut
        into shards.

        Returns:
            A source of draws for one example: its methods return (1, *shape).
        """
        ...

    def select(self, rows: Tensor) -> "Randomness":
        """Return the source of draws for some of the examples; their streams continue where they are.

        Args:
            rows: Positions of the examples: int64 (n,), each in [0, N).

        Returns:
            A source of draws for n examples. The draws of one example never change those of another.
        """
        ...

    def spawn(self, name: str) -> "Randomness":
        """Return independent streams of the same examples for one part of an attack.

        A part with streams of its own always begins at the same place, however much the other parts have
        drawn.

        Args:
            name: Name of the part. Equal names give equal streams.

        Returns:
            A source of draws for the same N examples, at its beginning.
        """
        ...


class Attack(Protocol):
    """A function that moves images so that a network answers them wrongly.

    `@attack` registers it. Its keyword-only parameters are its settings: their names, types and defaults are
    what a task file may set. The rules:

    - Every random number comes from `noise`.
    - The loss and the success come from `bench.objective` and `bench.succeeded`, which know targets and
      refusals.
    - An attack stops early for an example only where `view.exact` is true.
    - The verdict is the harness's: `validate` checks range, distance and finiteness of the returned images,
      and the read-out of the defense decides whether an image is broken. A move that is not allowed makes the
      example `invalid`.
    - An exception fails the job, so that the table has a hole and no wrong number.
    """

    def __call__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, /
    ) -> Images | Crafted:
        """Return an image for each example, moved so that the view answers wrongly if possible.

        Args:
            view: The view of the network, for these N examples; it counts every pass.
            x: Clean images (N, C, H, W), a copy that the attack may overwrite.
            y: True labels (N,), a copy that the attack may overwrite.
            threat: The norm and the radius. An attack that looks for the smallest move gets an infinite
                radius.
            noise: The source of random numbers for these N examples.

        Returns:
            Images (N, C, H, W) in [0, 1] of the dtype of `x`, in the order of the examples; or `Crafted`,
            images with notes. An example that the attack cannot break keeps any image within the threat, its
            clean one for instance.
        """
        ...


@dataclass(frozen=True)
class Use:
    """A registered attack with its settings, as a parameter of a defense: its inner attack."""

    use: str
    """The name in the registry."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The settings that differ from the defaults, by name."""


@dataclass(frozen=True)
class Part:
    """A parameter that names another defense of the suite, fitted before: to start from, or to contain."""

    defense: str
    """The name of that defense in the suite."""


@dataclass(frozen=True)
class Split:
    """The examples of a data set that a job works on."""

    images: Images
    """Images (N, C, H, W), on the CPU."""
    labels: Labels
    """Labels (N,), on the CPU."""
    index: Tensor
    """Index of each example in its data set: int64 (N,)."""
    digest: str
    """Digest of name, order and content of the examples."""

    def __len__(self) -> int:
        return len(self.labels)


class Batch(NamedTuple):
    """One step of an epoch."""

    images: Images
    """Images (n, C, H, W), on the device of the training."""
    labels: Labels
    """Labels (n,), on the device of the training."""
    noise: Randomness
    """Random numbers for these n images in this epoch."""


class Epoch(Protocol):
    """One pass over the training images."""

    number: int
    """The number of the epoch in its phase of the training, from 0."""

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield the training images in an order that the job and the number of the epoch decide.

        Args:
            size: Number of images in a batch, 1 or more.
            drop_last: True leaves out the last batch where it is smaller than `size` and not the only one.

        Yields:
            The batches, on the device of the training.
        """
        ...

    def report(self, loss: Tensor) -> None:
        """Note the loss of one step; at the end of the epoch a loss that is not finite ends the training.

        Args:
            loss: The loss of the step, a scalar tensor on any device.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """State that a training needs in order to continue: a network, an optimiser, a schedule, a scaler."""

    def state_dict(self) -> Any:
        """Return the state.

        Returns:
            The state, made of dicts, lists, tuples, sets, tensors, arrays, numbers and texts.
        """
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore a state.

        Args:
            state: A value that `state_dict` returned, its tensors on the device of the training.

        Returns:
            Anything; the harness ignores it.
        """
        ...


class Fitting(Protocol):
    """The services of the harness for one training: resumable epochs, draws, parts and inner attacks."""

    device: torch.device
    """The device of the training. The defense is there already."""
    parts: Mapping[str, nn.Module]
    """Fitted defenses, by the name of the parameter (of type `Part`) that asked for each."""

    def attack(self, use: Use) -> Attack:
        """Return a registered attack with its settings bound: the inner attack of adversarial training.

        Args:
            use: The value of a parameter of type `Use`.

        Returns:
            The attack, to be called with a view, images, labels, a threat and random numbers.
        """
        ...

    def epochs(self, count: int, model: Stateful, *parts: Stateful) -> Iterator[Epoch]:
        """Yield the epochs that are still to do.

        The state of the model and of every part is restored before the first epoch and saved after each.
        Whatever changes during the training must be given, else a resumed training ends at another network. A
        training of several phases calls this once for each phase, always in the same order.

        Args:
            count: Number of epochs of this phase, 0 or more.
            model: The network, usually ``self``.
            *parts: Optimisers, schedules of learning rates, gradient scalers, averages of weights.

        Yields:
            The epochs, in order of their numbers.

        Raises:
            InputError: A part has no `state_dict` or no `load_state_dict`.
            TrainingError: A loss of the last epoch was not finite.
        """
        ...

    def steps(self, size: int, *, drop_last: bool = False) -> int:
        """Return the number of batches in an epoch, for a schedule of learning rates.

        Args:
            size: Number of images in a batch, 1 or more.
            drop_last: As in `Epoch.batches`.

        Returns:
            The number of batches, 1 or more.
        """
        ...

    def note(self, sentence: str) -> None:
        """Record a sentence that a reader of the results should know, in the log and in the receipt.

        Args:
            sentence: One sentence on one line.
        """
        ...


class Defense(Protocol):
    """A network that can be fitted, attacked and scored: an `nn.Module` with two more methods and its views.

    `@defense` registers the class. It is constructed with the `Shape` of the data and keyword-only settings:
    their names, types and defaults are what a task file may set. Each view is a method under `@view` that
    returns a `View`. The rules:

    - Images come in [0, 1]; the network normalises them for itself.
    - Everything that `fit` learns is a parameter or a buffer. The harness builds the network a second time,
      with the stored weights, and refuses one that answers otherwise.
    - A threshold is set in `fit`, from training images. No checkpoint is chosen on test images.
    - No weight and no buffer changes while the network is asked.
    """

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Learn from the training images, or load what was learned elsewhere.

        Args:
            train: The training images, their labels and their indices.
            fitting: Epochs, batches, random numbers, the fitted parts and the inner attack.
        """
        ...

    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer a batch of images by one of the read-outs.

        The answer to an image depends on the image alone: not on the others in the batch, nor on earlier
        questions. Only a defense that is declared with ``random`` may answer differently when it is asked
        again.

        Args:
            x: Images (N, C, H, W) in [0, 1], on the device of the network.
            readout: Name of a read-out, one of those that the class declares.

        Returns:
            The decision for N images.
        """
        ...

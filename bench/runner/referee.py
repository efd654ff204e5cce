"""The referee between an attack and the view that it looks through, which checks what the attack returns.

During an attack the referee counts the passes of each example, centres logits, refuses what the access of the
attack does not include, and cuts large batches into chunks. After it, the referee checks range, distance and
finiteness of the images. Around it, modes, gradients, weights and global random states are restored.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from bench.errors import InputError
from bench.protocols import (
    Crafted,
    Features,
    Images,
    Labels,
    Norm,
    Threat,
    View,
    distance,
    identity,
    shrink,
)
from bench.registry import Access
from bench.runner.isolation import random_states
from bench.runner.precision import Claims, full_products, in_bfloat16
from bench.runner.snapshots import Snapshot

ROUNDING = 1e-6
"""Rounding allowed in each value, in units of the pixel range [0, 1]; beyond it a move is `invalid`."""


LOGITS = ("logits", "described", "explained")
"""The callables of a view that answer logits of its points, alone or with more."""


class Watching(Protocol):
    """Whoever sees in passing what an attack asks about, and what it is answered."""

    def through(self, rows: Tensor, z: Tensor, /) -> Tensor:
        """Return points (copies * n, ...) of examples `rows` (n,) by a name that their gradient passes."""
        ...

    def asked(self, rows: Tensor, z: Tensor, logits: Tensor, plain: Tensor, /) -> None:
        """Look at points (copies * n, ...) of the examples `rows` (n,) and at their logits.

        An attack gets `logits`, and the network gave them as `plain`.
        """
        ...


@dataclass
class QueryCounter:
    """The passes that an attack has spent on each example."""

    forwards: Tensor
    """Forward passes, float64 (N,)."""
    backwards: Tensor
    """Backward passes, float64 (N,)."""

    @classmethod
    def of(cls, n: int, device: torch.device) -> Self:
        """Return a counter at zero.

        Args:
            n: Number of examples.
            device: Device of the counts.

        Returns:
            The counter.
        """
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2)))


def centred(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Subtract the maximum of each row of logits, in float64; the maximum is a constant to autograd.

    Logits that are log-likelihoods may lie in the hundreds of thousands, where float32 loses their
    differences.

    Args:
        logits: Logits (..., K).
        dtype: Dtype of the result; None for that of `logits`.

    Returns:
        Logits (..., K) whose largest value in each row is 0.
    """
    wide = logits.double()
    return (wide - wide.detach().amax(-1, keepdim=True)).to(logits.dtype if dtype is None else dtype)


class Instrumented:
    """A callable of a view that counts passes, centres logits and knows to which examples its rows belong.

    It answers in the dtype of the points, whatever the network computes in. An attack never sees half
    precision, whose gradients and estimates are too coarse.

    Args:
        call: The callable of the defense: points (n, ...) -> answers (n, ...), or (T, n, K), or a named
            tuple of answers (n, ...) of which the first are logits.
        counter: The counter of all examples of the shard.
        rows: Positions in the shard of the examples of this callable: int64 (N,).
        access: What the attack may use; gradients flow only with ``gradient``.
        centre: Whether the maximum of each row is subtracted.
        chunk: The most points that are computed at once, 1 or more; None for all.
        recompute: Whether activations are computed again in the backward pass, to save memory.
        watch: Sees what is asked and answered, where the answers are logits; None: nobody does.
        claims: Told of every answer that may be taken for a success; None where nobody asks.
    """

    def __init__(  # noqa: PLR0913 - what a callable is given on its way to an attack
        self,
        call: Callable[..., Any],
        counter: QueryCounter,
        rows: Tensor,
        *,
        access: Access,
        centre: bool,
        chunk: int | None,
        recompute: bool,
        watch: Watching | None = None,
        claims: Claims | None = None,
    ) -> None:
        self._call, self._counter, self._rows = call, counter, rows
        self._watch, self._claims = watch, claims
        self._access, self._centre, self._chunk, self._recompute = access, centre, chunk, recompute

    def select(self, rows: Tensor) -> Self:
        """Return the callable for some of the examples.

        Args:
            rows: Positions of the examples among those of this callable: int64 (n,).

        Returns:
            A callable that counts on the same counter.
        """
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[rows.to(self._rows.device)]
        return part

    def __call__(self, *points: Tensor) -> Any:
        """Return the answers to points, computed in chunks, and count the passes.

        Args:
            *points: Tensors with the same first axis (copies * N, ...), copy after copy.

        Returns:
            The answers, centred if asked for, in the dtype of the first argument: a tensor, or a named tuple
            of tensors whose first are logits.
        """
        plain = self._answered(*points)
        answer = self._entered(plain, points[0].dtype)
        logits, own = (each[0] if isinstance(each, tuple) else each for each in (answer, plain))
        if self._watch is not None:
            self._watch.asked(self._rows, points[0], logits.detach(), own.detach())
        if self._claims is not None:
            self._claims.note(self._rows, points[0], logits)
        return answer

    def _answered(self, *points: Tensor) -> Any:
        n = len(points[0])
        self._count(self._counter.forwards, n)
        if self._access != "gradient":
            with torch.no_grad():
                return self._chunked(*points)
        if self._watch is not None:
            points = (self._watch.through(self._rows, points[0]), *points[1:])
        answer = self._chunked(*points)
        parts = [each for each in (answer if isinstance(answer, tuple) else (answer,)) if each.requires_grad]
        if len(parts) == 1:
            parts[0].register_hook(lambda _: self._count(self._counter.backwards, n))
        elif parts:
            # Once, whichever of its parts a gradient comes from.
            register_multi_grad_hook(parts, lambda _: self._count(self._counter.backwards, n), mode="any")
        return answer

    def _entered(self, answer: Any, dtype: torch.dtype) -> Any:
        """Centre the answer and cast it, in one conversion; of several answers, the first are logits."""
        if isinstance(answer, tuple):
            logits, *others = answer
            return type(answer)(self._entered(logits, dtype), *(each.to(dtype) for each in others))
        if not dtype.is_floating_point:
            # Points may be whole numbers: entries of a code book, say.
            return centred(answer) if self._centre else answer
        if self._centre:
            return centred(answer, dtype)
        return answer.to(dtype) if answer.is_floating_point() else answer

    def _count(self, passes: Tensor, n: int) -> None:
        copies, rest = divmod(n, max(len(self._rows), 1))
        if rest:
            # A library that drops examples by itself: the rows are shared out evenly.
            passes[self._rows] += n / len(self._rows)
        else:
            passes[self._rows] += copies

    def _chunked(self, *points: Tensor) -> Any:
        n, size = len(points[0]), self._chunk
        if size is None or n <= size:
            return self._asked(*points)
        parts = zip(*(each.split(size) for each in points), strict=True)
        answers = [self._asked(*part) for part in parts]
        if isinstance(answers[0], tuple):
            return type(answers[0])(*(torch.cat(each) for each in zip(*answers, strict=True)))
        # Logits of several draws are (draws, N, K); everything else has the examples first.
        return torch.cat(answers, dim=1 if answers[0].dim() == 3 else 0)

    def _asked(self, *points: Tensor) -> Any:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(self._call, *points, use_reentrant=False)
        return self._call(*points)


def instrument(  # noqa: PLR0913 - what a view is given on its way to an attack
    view: View,
    counter: QueryCounter,
    access: Access,
    *,
    target: Labels | None,
    exact: bool,
    starts: Images | None = None,
    chunk: int | None = None,
    recompute: bool = False,
    watch: Watching | None = None,
    claims: Claims | None = None,
) -> View:
    """Return a view for an attack: counted, centred, cut into chunks, with gradients only if allowed.

    Args:
        view: The view as the defense returns it.
        counter: The counter, at zero; its length is the number of examples.
        access: What the attack may use.
        target: Labels to reach, int64 (N,); None for an untargeted attack.
        exact: Whether a success on the view is a success against the read-out.
        starts: Images (N, C, H, W) to begin at; None where the attack chooses its own.
        chunk: The most points that are computed at once, 1 or more; None for all.
        recompute: Whether activations are computed again in the backward pass, to save memory.
        watch: Sees what is asked and answered; None: nobody does.
        claims: Told of every answer of logits; with it, answers are computed in bfloat16.

    Returns:
        A view of the same kind for N examples.
    """
    rows = torch.arange(len(counter.forwards), device=counter.forwards.device)
    kind = _counting(type(view))
    instrumented: dict[str, Any] = {
        name: Instrumented(
            _computed(getattr(view, name), in_half=claims is not None and name in view.answers),
            counter,
            rows,
            access=access,
            centre=view.centred and name in (*LOGITS, "classify"),
            # `encode` and `decode` are not cut: codes (N, K, D) look like logits of several draws.
            chunk=chunk if name in view.answers else None,
            recompute=recompute and name in view.answers,
            watch=watch if name in LOGITS else None,
            claims=claims if name in LOGITS else None,
        )
        for name in kind.answers
        if getattr(view, name) is not identity
    }
    given = {each.name: getattr(view, each.name) for each in fields(view)}
    return kind(**{**given, **instrumented, "target": target, "exact": exact, "starts": starts})


def _computed(call: Callable[..., Tensor], *, in_half: bool) -> Callable[..., Tensor]:
    """Return a callable of a view as it is, or computed in bfloat16."""
    return in_bfloat16(call) if in_half else call


def _counting(kind: type[View]) -> type[View]:
    """Return a subclass of a view's class whose maps between images and points are counted too."""
    maps = [each.name for each in fields(kind) if each.name in ("encode", "decode", "invert")]
    return type(kind.__name__, (kind,), {"answers": tuple(dict.fromkeys((*kind.answers, *maps)))})


def no_access_view(counter: QueryCounter) -> View:
    """Return the view of an attack that is declared with ``access="none"``: asking it for logits raises.

    Args:
        counter: The counter, which stays at zero.

    Returns:
        The view.
    """

    def refuse(_: Tensor) -> Tensor:
        raise PermissionError('an attack declared access="none" asked for logits')

    return View(logits=refuse)


def answers_only(decide: Callable[[Images], Any], classes: int, guides: Images | None = None) -> View:
    """Return the answers of a read-out as a view, for attacks that see decisions only.

    Args:
        decide: The read-out: images (N, C, H, W) -> `Decision`.
        classes: K.
        guides: An image of each class that the read-out accepts, (K, C, H, W), at which attacks can start.

    Returns:
        A view without gradient whose logits (N, K + 1) are one-hot; the last column is a refusal.
    """

    def logits(z: Images) -> Tensor:
        with torch.no_grad():
            decision = decide(z)
        answer = torch.where(decision.rejected, classes, decision.label)
        return torch.nn.functional.one_hot(answer, classes + 1).to(z.dtype)

    return Features(logits=logits, refusal=True, centred=False, guides=guides)


GUIDES = 32
"""The most images of each class that are tried in the search for one that is accepted."""


@torch.no_grad()
def guides(decide: Callable[[Images], Any], images: Images, labels: Labels, classes: int) -> Images:
    """Return the first image of each class that a read-out answers correctly and accepts.

    Args:
        decide: The read-out: images (N, C, H, W) -> `Decision`.
        images: Images (M, C, H, W) to choose from.
        labels: Their labels (M,).
        classes: K.

    Returns:
        Images (K, C, H, W); a black one where none of the first `GUIDES` images of the class is accepted.
    """
    found = images.new_zeros(classes, *images.shape[1:])
    for label in range(classes):
        own = images[labels == label][:GUIDES]
        if len(own):
            decision = decide(own)
            right = ((decision.label == label) & ~decision.rejected).nonzero().flatten().cpu()
            if len(right):
                found[label] = own[right[0]]
    return found


class Validated(NamedTuple):
    """The images that the defense is shown, after the checks of the referee."""

    images: Images
    """Images (N, C, H, W) within the threat and in [0, 1]."""
    invalid: Tensor
    """True where the move was not allowed, so that the clean image stands in its place: bool (N,)."""
    because: Mapping[str, int]
    """The number of examples for each reason why a move was not allowed."""


def validate(x: Images, returned: object, threat: Threat) -> Validated:
    """Check what an attack returned, and project overshoots of the size of rounding back.

    A move is not allowed where the image is not finite, leaves [0, 1], or leaves the ball of the threat. With
    another shape or dtype no move of the shard is allowed.

    Args:
        x: Clean images (N, C, H, W).
        returned: What the attack returned: images or `Crafted`.
        threat: The norm and the radius.

    Returns:
        The images to show, where moves were not allowed, and why.

    Raises:
        TypeError: The attack returned something that is no tensor of images.
    """
    z = returned.images if isinstance(returned, Crafted) else returned
    if not isinstance(z, Tensor):
        raise TypeError(f"the attack returned a {type(z).__name__}, not a tensor of images")
    if z.shape != x.shape:
        return _nothing(x, f"shape {tuple(z.shape)}, not {tuple(x.shape)}")
    if z.dtype != x.dtype:
        return _nothing(x, f"{z.dtype}, not {x.dtype}")
    z = z.detach().to(x.device)
    wide, start = z.double(), x.double()
    finite = wide.isfinite().flatten(1).all(1)
    wide = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), wide, start)
    outside = torch.maximum(-wide, wide - 1).flatten(1).amax(1)
    invalid = ~finite | (outside > ROUNDING)
    because = {"not finite": int((~finite).sum()), "out of the box": int((finite & invalid).sum())}
    if math.isfinite(threat.radius):
        beyond = distance(start, wide, threat.norm) - threat.radius > leeway(threat.norm, x[0].numel())
        because["out of the budget"] = int((beyond & ~invalid).sum())
        invalid |= beyond
        if threat.norm == "linf":
            wide = start + (wide - start).clamp(-threat.radius, threat.radius)
        elif threat.norm != "l0":
            wide = shrink(start, wide, threat.norm, threat.radius)
    wide = wide.clamp(0, 1)
    keep = invalid.view(-1, *[1] * (x.dim() - 1))
    why = {reason: count for reason, count in because.items() if count}
    return Validated(torch.where(keep, x, wide.to(x.dtype)), invalid, why)


def leeway(norm: Norm, size: int) -> float:
    """Return the most that an error of `ROUNDING` in every value can add to a distance.

    Args:
        norm: The norm of the distance.
        size: Number of values of an image, 1 or more.

    Returns:
        The length, 0 or more.
    """
    return ROUNDING * {"linf": 1, "l2": math.sqrt(size), "l1": size, "l0": 0}[norm]


def _nothing(x: Images, reason: str) -> Validated:
    """Return the clean images: no move of the shard is allowed."""
    return Validated(x, torch.ones(len(x), dtype=torch.bool, device=x.device), {reason: len(x)})


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed the global random states of torch, numpy and Python in the block, and restore them after it.

    Args:
        seed: The seed, any integer of 64 bits.
        *devices: Devices whose random states are seeded and restored; those that are no GPU change nothing.

    Yields:
        Nothing.
    """
    with random_states(sorted({each.index or 0 for each in devices if each.type == "cuda"})):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed every global source of random numbers: torch's, numpy's and Python's.

    Args:
        seed: The seed, any integer of 64 bits.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def frozen(*modules: nn.Module, seed: int, ask: Callable[[], object] | None = None) -> Iterator[None]:
    """Freeze networks in the block: evaluation mode, no gradients of parameters, seeded global random states.

    After the block modes, flags and random states are restored, and so is every weight or buffer that
    changed. A change is an error, since later numbers would belong to another network. With `ask`, replaced
    parameters, modules and hooks are found and put back as well; a network may replace its own.

    Args:
        *modules: The networks.
        seed: Seed of the global random states.
        ask: Asks the networks and does nothing else. It tells a network that changes itself from an attack
            that changes it. Without it, every change counts as the network's own.

    Yields:
        Nothing.

    Raises:
        InputError: A network changes its own weights or buffers whenever it is asked, or has weights that are
            not made yet.
        RuntimeError: The attack changed a network, or products of float32 numbers are reduced (TF32).
    """
    every = [module for each in modules for module in each.modules()]
    modes = [(module, module.training) for module in every]
    named = [pair for each in modules for pair in (*each.named_parameters(), *each.named_buffers())]
    if lazy := [name for name, tensor in named if is_lazy(tensor)]:
        raise InputError(
            f"the network has weights that are not made yet ({', '.join(lazy[:4])}); ask it once before"
        )
    tensors = [tensor for _, tensor in named]
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    # Values are compared, since a write through `.data` leaves no other trace.
    before = [(name, tensor, tensor.detach().clone()) for name, tensor in named]
    snapshots = Snapshot.of(modules) if ask is not None else []
    own: list[str] = []
    changed: list[str] = []
    with seeded(seed, *(tensor.device for tensor in tensors)):
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        for module in modules:
            module.eval()
        try:
            with full_products():
                yield
        finally:
            replaced = _restored(snapshots)
            own = changed = _put_back(before)
            if (changed or replaced) and ask is not None:
                # A network that cannot be asked does not answer for the change.
                with torch.no_grad(), contextlib.suppress(Exception):
                    ask()
                by_itself = _restored(snapshots)
                replaced = [each for each in replaced if each not in by_itself]
                own = _put_back(before)
            for module, mode in modes:
                module.training = mode
            for tensor, flag in flags:
                tensor.requires_grad_(flag)
                tensor.grad = None
    if own:
        raise InputError(
            f"the network changes its own weights or buffers ({', '.join(own[:4])}) whenever it is asked, so "
            "that its answers depend on what was asked before; they must stay as they are in evaluation mode"
        )
    if changed or replaced:
        what = "weights or buffers of the network" if changed else "the network"
        raise RuntimeError(f"the attack changed {what} it looked at ({', '.join((*changed, *replaced)[:4])})")


def _restored(snapshots: Sequence[Snapshot]) -> list[str]:
    """Put back what was replaced in networks; return a phrase for each difference."""
    return [phrase for each in snapshots for phrase in each.restore()]


def _put_back(before: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Undo changes of tensors; return the names of those that had changed."""
    changed = [(name, tensor, value) for name, tensor, value in before if not _equal(tensor, value)]
    for _, tensor, value in changed:
        # Other jobs of this process may use the same network.
        if tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device:
            tensor.data.copy_(value)
        else:
            tensor.data = value.clone()
    return [name for name, _, _ in changed]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())

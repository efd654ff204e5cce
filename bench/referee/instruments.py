"""The referee between an attack and the view that it looks through, which checks what the attack returns.

During an attack the referee counts the passes of each example, centres logits, refuses what the access of the
attack does not include, and cuts large batches into chunks. After it, the referee checks range, distance and
finiteness of the images. Around it, modes, gradients, weights and global random states are restored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

from bench.protocols import (
    Features,
    Images,
    Labels,
    View,
    identity,
)
from bench.referee.precision import Claims, in_bfloat16
from bench.registry import Access

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


def _unheard(_: int) -> None:
    """Do nothing about a question."""


@dataclass
class QueryCounter:
    """The passes that an attack has spent on each example."""

    forwards: Tensor
    """Forward passes, float64 (N,)."""
    backwards: Tensor
    """Backward passes, float64 (N,)."""
    heard: Callable[[int], None] = field(default=_unheard, compare=False)
    """Told of each question the number of its points, at once: the counts themselves lie on a device."""

    @classmethod
    def of(cls, n: int, device: torch.device, heard: Callable[[int], None] = _unheard) -> Self:
        """Return a counter at zero.

        Args:
            n: Number of examples.
            device: Device of the counts.
            heard: Told of each question the number of its points.

        Returns:
            The counter.
        """
        forwards, backwards = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
        return cls(forwards, backwards, heard)


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
        self._counter.heard(n)
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

"""Stands between an attack and the view it looks through, and judges what the attack returns.

During an attack: counts passes by example, centres logits, refuses what the attack's access does not
include, computes big batches in chunks. After it: budget, box and finiteness. Around it: flags,
gradients and torch's random state are left as they were found.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.errors import InputError
from bench.isolation import random_states
from bench.protocols import (
    Crafted,
    Features,
    Images,
    Labels,
    Threat,
    View,
    distance,
    identity,
    shrink,
)
from bench.registry import Access

ROUNDING = 1e-6
"""Overshoot per value, absolute, that is rounding and is projected back; beyond it a move is void."""


@dataclass
class Meter:
    """Passes spent, by example: float64 (N,)."""

    forwards: Tensor
    backwards: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> Self:
        """Return a meter at zero."""
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2)))


def centred(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Subtract each row's maximum, in float64: classifiers that answer with log-likelihoods in the
    hundreds of thousands lose their float32 differences otherwise. To autograd it is a constant.

    The result is of `dtype`, or of that of the logits.
    """
    wide = logits.double()
    return (wide - wide.detach().amax(-1, keepdim=True)).to(logits.dtype if dtype is None else dtype)


class Watched:
    """A view's callable under watch; knows which examples its rows are.

    It answers in its points' dtype, whatever a network computes in: attacks never see half precision, which
    holds neither their gradients nor their estimates.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        meter: Meter,
        rows: Tensor,
        *,
        access: Access,
        centre: bool,
        chunk: int | None,
        recompute: bool,
    ) -> None:
        self._call, self._meter, self._rows = call, meter, rows
        self._access, self._centre, self._chunk, self._recompute = access, centre, chunk, recompute

    def take(self, rows: Tensor) -> Self:
        """Return the callable for some of the examples."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[rows.to(self._rows.device)]
        return part

    def __call__(self, *points: Tensor) -> Tensor:
        """Answer, in chunks if there are many; count."""
        n = len(points[0])
        self._count(self._meter.forwards, n)
        if self._access != "gradient":
            with torch.no_grad():
                return self._entered(self._chunked(*points), points[0].dtype)
        answer = self._chunked(*points)
        if answer.requires_grad:
            answer.register_hook(lambda gradient: self._count(self._meter.backwards, n))
        return self._entered(answer, points[0].dtype)

    def _entered(self, answer: Tensor, dtype: torch.dtype) -> Tensor:
        """Centre an answer and cast it, once."""
        if not dtype.is_floating_point:
            return centred(answer) if self._centre else answer  # Codes that are numbers of entries, say.
        if self._centre:
            return centred(answer, dtype)
        return answer.to(dtype) if answer.is_floating_point() else answer

    def _count(self, passes: Tensor, n: int) -> None:
        copies, rest = divmod(n, max(len(self._rows), 1))
        if rest:
            # A library that keeps its own list of survivors: shared out evenly.
            passes[self._rows] += n / len(self._rows)
        else:
            passes[self._rows] += copies

    def _chunked(self, *points: Tensor) -> Tensor:
        n, size = len(points[0]), self._chunk
        if size is None or n <= size:
            return self._asked(*points)
        parts = zip(*(each.split(size) for each in points), strict=True)
        answers = [self._asked(*part) for part in parts]
        # Logits of several draws are (draws, N, K); everything else has the examples first.
        return torch.cat(answers, dim=1 if answers[0].dim() == 3 else 0)

    def _asked(self, *points: Tensor) -> Tensor:
        if self._recompute and torch.is_grad_enabled():
            answer: Tensor = checkpoint(self._call, *points, use_reentrant=False)
            return answer
        return self._call(*points)


def watch(
    view: View,
    meter: Meter,
    access: Access,
    *,
    target: Labels | None,
    final: bool,
    chunk: int | None = None,
    recompute: bool = False,
) -> View:
    """Return a view that an attack may be handed."""
    rows = torch.arange(len(meter.forwards), device=meter.forwards.device)
    kind = _counting(type(view))
    watched: dict[str, Any] = {
        name: Watched(
            getattr(view, name),
            meter,
            rows,
            access=access,
            centre=view.centred and name in ("logits", "classify"),
            # Codes may be (N, K, D), which would be taken for logits of several draws.
            chunk=chunk if name in view.answers else None,
            recompute=recompute and name in view.answers,
        )
        for name in kind.answers
        if getattr(view, name) is not identity
    }
    given = {each.name: getattr(view, each.name) for each in fields(view)}
    return kind(**{**given, **watched, "target": target, "final": final})


def _counting(kind: type[View]) -> type[View]:
    """Return a view of this kind whose maps between images and points are narrowed, and so counted, too."""
    maps = [each.name for each in fields(kind) if each.name in ("encode", "decode", "invert")]
    return type(kind.__name__, (kind,), {"answers": tuple(dict.fromkeys((*kind.answers, *maps)))})


def blindfold(meter: Meter) -> View:
    """Return what an attack without access sees: nothing."""

    def refuse(_: Tensor) -> Tensor:
        raise PermissionError('an attack declared access="none" asked for logits')

    return View(logits=refuse)


def answers_only(decide: Callable[[Images], Any], classes: int, guides: Images | None = None) -> View:
    """Return the read-out itself as a view: one-hot answers, the last column a refusal.

    `guides` (K, C, H, W) are images that it accepts, for attacks that need a place to start from.
    """

    def logits(z: Images) -> Tensor:
        with torch.no_grad():
            decision = decide(z)
        answer = torch.where(decision.rejected, classes, decision.label)
        return torch.nn.functional.one_hot(answer, classes + 1).to(z.dtype)

    return Features(logits=logits, refusal=True, centred=False, guides=guides)


GUIDES = 32
"""How many images of a class are asked about, at most, for one that is accepted."""


@torch.no_grad()
def guides(decide: Callable[[Images], Any], images: Images, labels: Labels, classes: int) -> Images:
    """Return of each class the first of `images` that a read-out gets right and accepts, (K, C, H, W).

    A black one where there is none among the class's first `GUIDES`.
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


class Judged(NamedTuple):
    """What the defense will be shown."""

    images: Images
    void: Tensor
    """bool (N,): the move was not allowed, and the clean image stands in its place."""
    because: Mapping[str, int]
    """What was wrong with how many of them."""


def judge(x: Images, returned: object, threat: Threat) -> Judged:
    """Check what an attack returned against box, budget and finiteness; project rounding back.

    Where the shape or the dtype is another one, no move was made for any example: all are void. What is no
    tensor raises, and the job fails.
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
    void = ~finite | (outside > ROUNDING)
    because = {"not finite": int((~finite).sum()), "out of the box": int((finite & void).sum())}
    if math.isfinite(threat.radius):
        # What an error of ROUNDING in every value can add to a distance.
        size = x[0].numel()
        room = ROUNDING * {"linf": 1, "l2": math.sqrt(size), "l1": size, "l0": 0}[threat.norm]
        beyond = distance(start, wide, threat.norm) - threat.radius > room
        because["out of the budget"] = int((beyond & ~void).sum())
        void |= beyond
        if threat.norm == "linf":
            wide = start + (wide - start).clamp(-threat.radius, threat.radius)
        elif threat.norm != "l0":
            wide = shrink(start, wide, threat.norm, threat.radius)
    wide = wide.clamp(0, 1)
    keep = void.view(-1, *[1] * (x.dim() - 1))
    why = {reason: count for reason, count in because.items() if count}
    return Judged(torch.where(keep, x, wide.to(x.dtype)), void, why)


def _nothing(x: Images, reason: str) -> Judged:
    """Return the clean images: none of the moves can be shown."""
    return Judged(x, torch.ones(len(x), dtype=torch.bool, device=x.device), {reason: len(x)})


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Fork the global random states (torch's, numpy's, Python's) under `seed`, and put them back."""
    with random_states(sorted({each.index or 0 for each in devices if each.type == "cuda"})):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed every global source of random numbers: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def undisturbed(*modules: nn.Module, seed: int, ask: Callable[[], object] | None = None) -> Iterator[None]:
    """Fork the global random states under `seed`, freeze parameters, and put everything back.

    What changes a weight or a buffer fails: its later numbers would be another network's. With `ask`, which
    asks the network and nothing else, an attack that did is told from a network that does so itself;
    without it, nobody but the network was at work.
    """
    every = [module for each in modules for module in each.modules()]
    modes = [(module, module.training) for module in every]
    named = [pair for each in modules for pair in (*each.named_parameters(), *each.named_buffers())]
    tensors = [tensor for _, tensor in named]
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    # Compared by value: a write through `.data` leaves no other trace.
    before = [(name, tensor, tensor.detach().clone()) for name, tensor in named]
    with seeded(seed, *(tensor.device for tensor in tensors)):
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            changed = _put_back(before)
            own = changed
            if changed and ask is not None:
                with torch.no_grad():
                    ask()
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
    if changed:
        raise RuntimeError(
            f"the attack changed weights or buffers of the network it looked at ({', '.join(changed[:4])})"
        )


def _put_back(before: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Undo what was written into tensors; return the names of those that were."""
    changed = [(name, tensor, value) for name, tensor, value in before if not _equal(tensor, value)]
    for _, tensor, value in changed:
        # Other jobs of this process may look at the same network.
        tensor.data.copy_(value)
    return [name for name, _, _ in changed]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same; what is not a number equals itself."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())

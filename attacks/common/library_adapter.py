"""What the adapters of attack libraries share: a view as a library's model, and a guard around the call.

A library decides nothing here. What it returns is checked for finiteness, brought back into the ball and
the box in float64, and asked again; where a whole batch brings it down, each example is tried alone.
`docs/libraries.md` lists the faults of the libraries by id (T1 to F13), and which line here is for which.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import torch
from pydantic import Field
from torch import Tensor, autograd, nn

from attacks.common.best_so_far import GradientNotes, by_example
from attacks.common.flags import unreachable
from bench import (
    BenchError,
    Count,
    Crafted,
    Images,
    InputError,
    Labels,
    Needs,
    NonNegative,
    Norm,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

TIME_LIMIT = 3600.0
"""Seconds that a shard may take unless a suite says otherwise: some of these attacks may never end (F7)."""

LINF: frozenset[Norm] = frozenset({"linf"})
L2: frozenset[Norm] = frozenset({"l2"})
L1: frozenset[Norm] = frozenset({"l1"})
L0: frozenset[Norm] = frozenset({"l0"})

ROUNDING = 1e-6
"""How far, per value, images may lie outside the box."""

SIGNED = {"theta"}
"""Numbers that may be below 0: JSMA's pixels may become darker."""

SATURATED = 24 * math.log(2)
"""The lead of the truth from which its probability rounds to 1 in float32, and a softmax's loss loses its
gradient: what is left of it points elsewhere (T23, F15)."""

PUSHES = 18
"""How often what ends on a boundary to the last bit is pushed on: by a millionth of its way, then by twice as
much, and in the end by an eighth (T24, F16)."""

LOWEST = 1e4
"""How far below a row's highest logit others may stay above 0: a larger lift would round margins (T2)."""


class LibraryModel(nn.Module):
    """A view as a library asks a model: float32 logits (n, K) of its own, arg-max wrong where ours is a win.

    A refusal is no class of a library's. Without targets it is folded into the true label `y`, whose logit
    becomes the higher of the two: another class then leads exactly where it would be accepted (F5). That
    takes examples of one label, since a library asks about them in any order and number. With targets the
    refusal stays, as one more class that is not the target.

    Args:
        view: The view, for the examples that the library is shown.
        like: Images whose dtype the view is asked in, on their device.
        label: The true label of all of them, where a refusal is folded into it; else None.
        lift: Whether all logits must be above 0.
    """

    def __init__(self, view: View, like: Images, *, label: int | None, lift: bool) -> None:
        super().__init__()
        self._view, self._dtype, self._label, self._lift = view, like.dtype, label, lift
        # torchattacks looks for the device of the first parameter.
        self.place = nn.Parameter(torch.empty(0, device=like.device), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return float32 logits (n, K) of points (n, C, H, W)."""
        # A defense may search with gradients of its own: foolbox asks with autograd off (F4).
        with torch.enable_grad():
            logits = self._view.logits(z.to(self._dtype))
            if logits.dim() == 3:
                # The answer of a view that draws is that of the mean logits.
                logits = logits.mean(0)
            if self._view.refusal and self._label is not None:
                classes, refusal = logits[:, :-1], logits[:, -1:]
                own = torch.arange(classes.shape[1], device=z.device) == self._label
                logits = torch.where(own, torch.maximum(classes, refusal), classes)
            # Of a class that cannot be, at minus infinity, libraries make 0 times infinity (T22, F14).
            high = logits.detach().amax(1, keepdim=True)
            logits = torch.where(logits.isneginf(), high - LOWEST, logits)
            if self._lift:
                # torchattacks' margins take a masked 0 for a logit (T1).
                low = logits.detach().amin(1, keepdim=True)
                logits = logits - low.clamp_min(-LOWEST) + 1
            logits = logits.float()
        return logits if torch.is_grad_enabled() else logits.detach()


Call: TypeAlias = Callable[[nn.Module, Images, Labels, Labels | None, int], Tensor]
"""``call(model, x, y, target, seed)``: a library's images for float32 images in [0, 1]; `seed` for its own
random states, where it has them."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What stands around a library's attack."""

    access: str
    """What the attack asks for: ``gradient``, ``score`` or ``decision``."""
    kind: Literal["fixed-budget", "minimum-norm"]
    """Whether it has a radius, or moves as little as it can."""
    lift: bool
    """Whether the logits that it sees must be above 0 (T1)."""
    softmax: bool = False
    """Whether its loss is one of float32 probabilities."""

    def run(self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, call: Call) -> Crafted:
        """Run a library's attack.

        Examples that are wrong already are left as they are, unless this is a surrogate and the attack has a
        radius. One that moves as little as it can returns successes only; one with a radius its last try,
        too.

        Args:
            view: What the library is shown as a model.
            x: Images (N, C, H, W) in [0, 1].
            y: Their labels (N,).
            threat: The norm and the radius that the result is brought back into.
            noise: Draws for the library's seeds.
            call: The library's attack.

        Returns:
            The images, with notes. ``failed``, where no adversarial image was found (with a radius: where
            there is no try at all); ``raised``, where the library raised an exception on the example alone;
            ``nonfinite``, where the gradient at the image or the library's own image was not finite;
            ``flat``, where that gradient was exactly zero, for attacks that ask for gradients. ``saturated``,
            for those with a softmax of their own in the loss: where at the image the truth leads by more than
            float32 probabilities tell.

        Raises:
            InputError: Where images lie outside the box.
            Exception: The library's own, where it raised on every example and did not just give up.
        """
        if len(x) and bool(((x < -ROUNDING) | (x > 1 + ROUNDING)).any()):
            # Libraries clamp it to the box, a move beyond any budget (T12).
            raise InputError(f"images must be in [0, 1], these reach from {x.min():g} to {x.max():g}")
        probe = _Probe(view, x, y, gradient=self.access == "gradient")
        least = self.kind == "minimum-norm"
        waiting = ~probe.won if view.exact or least else torch.ones_like(probe.won)
        images, raised = x.clone(), torch.zeros_like(probe.won)
        errors: list[Exception] = []
        for rows in _groups(view, y, waiting.nonzero().squeeze(1)):
            for some, found in self._called(view, x, y, rows, noise, call, errors):
                if found is None:
                    raised[some] = True
                else:
                    images[some] = found.detach().to(x)
        if errors and bool(raised[waiting].all()) and not all(map(_gave_up, errors)):
            # A mistake of the settings, say: nothing was attacked, so that nothing may look robust.
            raise errors[-1]
        broken = ~images.isfinite().flatten(1).all(1)
        images = torch.where(by_example(broken | raised, x), x, _projected(x, images, threat))
        failed = waiting & (broken | raised)
        if least and len(rows := waiting.nonzero().squeeze(1)):
            # Whatever the library says of its success (T10, T19, F6, F13).
            images[rows], won = _pushed(view.select(rows), x[rows], images[rows], y[rows])
            failed[rows] = ~won
            images = torch.where(by_example(failed, x), x, images)
        notes = {"failed": failed, "raised": raised, "nonfinite": probe.gradient.nonfinite | broken}
        if self.access == "gradient":
            notes["flat"] = probe.gradient.flat
        if self.softmax:
            notes["saturated"] = probe.saturated
        return Crafted(images, notes)

    def _called(
        self,
        view: View,
        x: Images,
        y: Labels,
        rows: Tensor,
        noise: Randomness,
        call: Call,
        errors: list[Exception],
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Yield rows with their images: all at once or, where that fails, one by one; None where it
        raised."""
        for some in (rows, *(rows.split(1) if len(rows) > 1 else ())):
            here = view.select(some)
            label = int(y[some[0]]) if view.refusal and view.target is None else None
            model = LibraryModel(here, x, label=label, lift=self.lift).eval()
            # A shard's own seeds: libraries set the global random state to them (T7).
            seed = int(noise.integers((), 2**31 - 1)[0])
            start = x[some].float().clamp(0, 1)  # foolbox asserts the box to the last bit (F2).
            try:
                with warnings.catch_warnings(), torch.enable_grad():
                    warnings.simplefilter("ignore")
                    found = call(model, start, y[some].clone(), here.target, seed)
                if found.shape != start.shape:
                    raise ValueError(f"the library returned {tuple(found.shape)} for {tuple(start.shape)}")
            except BenchError:
                raise  # The time limit: not the library's.
            except Exception as error:
                if _out_of_memory(error):
                    raise  # Done again in smaller chunks.
                errors.append(error)
                if len(rows) == 1 or some is not rows:
                    yield some, None
                continue
            yield some, found
            if some is rows:
                return


def _pushed(view: View, x: Images, z: Images, y: Labels) -> tuple[Images, Tensor]:
    """Return images and whether each is a success: those that are none are moved on along their way."""
    z, won = z.clone(), torch.zeros_like(y, dtype=torch.bool)
    way, rows = z - x, torch.arange(len(x), device=x.device)
    for push in range(-1, PUSHES):
        farther = 1 + 1e-6 * 2**push if push >= 0 else 1.0
        tried = z[rows] if push < 0 else (x[rows] + farther * way[rows]).clamp(0, 1)
        here = view.select(rows)
        with torch.no_grad():
            hit = succeeded(here, here.logits(tried), y[rows])
        z[rows[hit]], won[rows[hit]] = tried[hit], True
        rows = rows[~hit]
        rows = rows[(way[rows] != 0).flatten(1).any(1)]
        if len(rows) == 0:
            break
    return z, won


class _Probe:
    """What the view says of the images themselves, and its gradient there."""

    def __init__(self, view: View, x: Images, y: Labels, *, gradient: bool) -> None:
        z = x.clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = view.logits(z)
        self.won = succeeded(view, logits, y)
        # Towards a target a softmax has its gradient where the truth leads.
        behind = objective(view, logits.detach(), y, "margin") < -SATURATED
        self.saturated = behind & (view.target is None)
        self.gradient = GradientNotes(x)
        if gradient:
            (slope,) = autograd.grad(objective(view, logits, y).sum(), z)
            self.gradient.see(torch.arange(len(x), device=x.device), slope[None], first=True)


def _groups(view: View, y: Labels, rows: Tensor) -> Iterable[Tensor]:
    """Return which examples a library is shown at once: all, or those of one label (see `Seen`)."""
    if len(rows) == 0:
        return []
    if not view.refusal or view.target is not None:
        return [rows]
    return [rows[y[rows] == label] for label in y[rows].unique()]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _gave_up(error: Exception) -> bool:
    """Return whether a library says by an exception that it found nothing to start or to go on from (F7)."""
    said = ("init_attack failed", "Gradient vanished")
    return isinstance(error, AssertionError) or any(words in str(error) for words in said)


def _projected(x: Images, z: Images, threat: Threat) -> Images:
    """Return the images in the ball and the box, by float64: libraries overshoot by rounding (T11, F11)."""
    start, wide = x.double(), z.double()
    move = wide - start
    if threat.norm == "linf":
        near = (start + move.clamp(-threat.radius, threat.radius)).clamp(0, 1).to(x.dtype)
        return torch.where((near.double() - start).abs() > threat.radius, near.nextafter(x), near)
    if threat.norm != "l0":
        length = threat.distance(start, wide).clamp_min(1e-12)
        move = move * by_example((threat.radius / length).clamp_max(1), move)
    return (start + move).clamp(0, 1).to(x.dtype)


# --- parameters ----------------------------------------------------------------------------------------


def parameter(name: str, default: Any, kind: Any) -> inspect.Parameter:
    """Return a keyword of a library's class as a parameter of the attack.

    Numbers are bounded: whole ones, counts all of them, are 1 or more; others, a confidence, a length or a
    share, are finite and 0 or more. Libraries take any, and do as it says.

    Args:
        name: The keyword.
        default: Its default.
        kind: Its type, with its members bounded where it is an optional.
    """
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_bounded(kind, name in SIGNED)
    )


def _bounded(kind: Any, signed: bool) -> Any:
    """Return a type with the bounds of its numbers."""
    if kind is int:
        return Count
    if kind is float:
        return Annotated[float, Field(allow_inf_nan=False)] if signed else NonNegative
    if get_origin(kind) in (Union, UnionType):
        members = tuple(_bounded(each, signed) for each in get_args(kind))
        return Union[members]  # noqa: UP007 - built at run time
    return kind


def unreachable_with(threat: Threat, params: Mapping[str, Any], steps: str, length: str) -> str | None:
    """Return what is odd about steps that cannot reach the radius, where an attack has such parameters.

    Args:
        threat: The threat model.
        params: The attack's parameters.
        steps: Which of them is the number of steps.
        length: Which of them is their length.
    """
    if steps not in params or not isinstance(params.get(length), int | float):
        return None
    return unreachable(threat, params[steps], params[length])


COUNTS = (
    "binary_search_steps",
    "eot_iter",
    "m",
    "max_iterations",
    "n_queries",
    "n_restarts",
    "noise_batch_size",
    "num_iter_set",
    "popsize",
    "population",
    "repeats",
    "restarts",
    "steps",
)
"""Names that the libraries give to counts of passes, each made for every one of the others."""


def cost(**params: Any) -> int:
    """Return how many forward passes an attack makes over each example, as far as its parameters tell.

    Args:
        params: The attack's parameters.

    Returns:
        The product of those that are counts (`COUNTS`), and one pass more for what comes before or after.
    """
    counts = (params.get(name) for name in COUNTS)
    return 1 + math.prod(each for each in counts if isinstance(each, int))


# --- registration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LibraryAttack(Needs):
    """An attack of a library: a row of an adapter's table."""

    about: str
    """Its docstring: a sentence, and where it was published."""
    cost: Callable[..., int] | None = field(default=cost, kw_only=True)
    rng: Literal["example", "shard"] = field(default="shard", kw_only=True)
    time_limit: float | None = field(default=TIME_LIMIT, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How the attacks of a library become the harness's."""

    library: str
    """The installed distribution, and the first part of their names."""
    module: str
    """The module that registers them."""
    signature: Callable[[str], Iterable[inspect.Parameter]]
    """``signature(name)``: an attack's parameters; imports the library."""
    prepare: Callable[[str, Threat, Mapping[str, Any]], Call]
    """``prepare(name, threat, params)``: the library's attack as a call."""
    flags: Callable[[str, Threat, Mapping[str, Any]], str | None]
    """``flags(name, threat, params)``: what is odd about its settings."""
    lift: bool
    """Whether logits must be above 0 (T1)."""
    softmax: frozenset[str]
    """Names of the attacks whose loss is one of float32 probabilities, with `loss` unless that is another."""
    check_params: Callable[[str, Mapping[str, Any]], None] | None = None
    """``check_params(name, params)``: raises `InputError` for parameters that do not fit each other."""
    unfit: Callable[[str, Mapping[str, Any], Shape], str | None] | None = None
    """``unfit(name, params, shape)``: why an attack is left out on such data."""

    def register(self, name: str, row: LibraryAttack) -> None:
        """Register one of the library's attacks.

        Args:
            name: Its name in the library.
            row: What it is, and what it needs.
        """

        def adapted(
            view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, **params: Any
        ) -> Crafted:
            softmax = name in self.softmax and params.get("loss", "ce") in ("ce", "crossentropy")
            guard = Guard(access=row.access, kind=row.kind, lift=self.lift, softmax=softmax)
            return guard.run(view, x, y, threat, noise, self.prepare(name, threat, params))

        adapted.__doc__, adapted.__module__ = row.about, self.module
        needs = row.declared() | {
            "flags": lambda threat, **params: self.flags(name, threat, params),
            "check_params": partial(self._check, name),
            "unfit": partial(self.unfit, name) if self.unfit else None,
        }
        attack(
            f"{self.library}/{name}",
            version=1,
            library=self.library,
            signature=partial(self.signature, name),
            **needs,
        )(adapted)

    def _check(self, name: str, params: Mapping[str, Any], shape: Shape) -> None:
        if self.check_params:
            self.check_params(name, params)

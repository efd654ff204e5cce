"""What the adapters of attack libraries share: a view as a library's model, and a guard around the call.

A library decides nothing here. What it returns is checked for finiteness, brought back into the ball and
the box in float64, and asked again; where a whole batch brings it down, each example is tried alone.
`docs/libraries.md` lists the faults of the libraries by id (T1 to F13), and which line here is for which.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, autograd, nn

from bench import (
    BenchError,
    Crafted,
    Images,
    InputError,
    Labels,
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
    """

    def __init__(self, view: View, like: Images, *, label: int | None, lift: bool) -> None:
        super().__init__()
        self._view, self._dtype, self._label, self._lift = view, like.dtype, label, lift
        # torchattacks looks for the device of the first parameter.
        self.place = nn.Parameter(torch.empty(0, device=like.device), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return logits of points (n, C, H, W)."""
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


def craft(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    call: Call,
    *,
    access: str,
    budget: Literal["radius", "distance"],
    lift: bool,
    softmax: bool = False,
) -> Crafted:
    """Run a library's attack behind the guard.

    Examples that are wrong already are left as they are, unless this is a surrogate and the attack has a
    radius. One that moves as little as it can returns successes only; one with a radius its last try, too.

    Notes: ``failed``, where no adversarial image was found (with a radius: where there is no try at all);
    ``raised``, where the library raised an exception on the example alone; ``nonfinite``, where the
    gradient at the image or the library's own image was not finite; ``flat``, where that gradient was
    exactly zero. The last two for attacks that ask for gradients. ``saturated``, for those with a `softmax`
    of their own in the loss: where at the image the truth leads by more than float32 probabilities tell.
    """
    if len(x) and bool(((x < -ROUNDING) | (x > 1 + ROUNDING)).any()):
        # Libraries clamp it to the box, a move beyond any budget (T12).
        raise InputError(f"images must be in [0, 1], these reach from {x.min():g} to {x.max():g}")
    probe = _Probe(view, x, y, gradient=access == "gradient")
    waiting = ~probe.won if view.final or budget == "distance" else torch.ones_like(probe.won)
    images, raised = x.clone(), torch.zeros_like(probe.won)
    errors: list[Exception] = []
    for rows in _groups(view, y, waiting.nonzero().squeeze(1)):
        for some, found in _guarded(view, x, y, rows, noise, call, lift, errors):
            if found is None:
                raised[some] = True
            else:
                images[some] = found.detach().to(x)
    if errors and bool(raised[waiting].all()) and not all(map(_gave_up, errors)):
        # A mistake of the settings, say: nothing was attacked, so that nothing may look robust.
        raise errors[-1]
    broken = ~images.isfinite().flatten(1).all(1)
    images = torch.where(_wide(broken | raised), x, _projected(x, images, threat))
    failed = waiting & (broken | raised)
    if budget == "distance" and len(rows := waiting.nonzero().squeeze(1)):
        # Whatever the library says of its success (T10, T19, F6, F13).
        images[rows], won = _pushed(view.take(rows), x[rows], images[rows], y[rows])
        failed[rows] = ~won
        images = torch.where(_wide(failed), x, images)
    notes = {"failed": failed, "raised": raised, "nonfinite": probe.nonfinite | broken}
    if access == "gradient":
        notes["flat"] = probe.flat
    if softmax:
        notes["saturated"] = probe.saturated
    return Crafted(images, notes)


def _pushed(view: View, x: Images, z: Images, y: Labels) -> tuple[Images, Tensor]:
    """Return images and whether each is a success: those that are none are moved on along their way."""
    z, won = z.clone(), torch.zeros_like(y, dtype=torch.bool)
    way, rows = z - x, torch.arange(len(x), device=x.device)
    for push in range(-1, PUSHES):
        farther = 1 + 1e-6 * 2**push if push >= 0 else 1.0
        tried = z[rows] if push < 0 else (x[rows] + farther * way[rows]).clamp(0, 1)
        here = view.take(rows)
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
        self.flat = self.nonfinite = torch.zeros_like(self.won)
        if gradient:
            (slope,) = autograd.grad(objective(view, logits, y).sum(), z)
            peak = slope.abs().flatten(1).amax(1)
            self.flat, self.nonfinite = peak == 0, ~peak.isfinite()


def _groups(view: View, y: Labels, rows: Tensor) -> Iterable[Tensor]:
    """Return which examples a library is shown at once: all, or those of one label (see `Seen`)."""
    if len(rows) == 0:
        return []
    if not view.refusal or view.target is not None:
        return [rows]
    return [rows[y[rows] == label] for label in y[rows].unique()]


def _guarded(
    view: View,
    x: Images,
    y: Labels,
    rows: Tensor,
    noise: Randomness,
    call: Call,
    lift: bool,
    errors: list[Exception],
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Yield rows with their images: all at once or, where that fails, one by one; None where it raised."""
    for some in (rows, *(rows.split(1) if len(rows) > 1 else ())):
        here = view.take(some)
        label = int(y[some[0]]) if view.refusal and view.target is None else None
        model = LibraryModel(here, x, label=label, lift=lift).eval()
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


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _gave_up(error: Exception) -> bool:
    """Return whether a library says by an exception that it found nothing to start or to go on from (F7)."""
    said = ("init_attack failed", "Gradient vanished")
    return isinstance(error, AssertionError) or any(words in str(error) for words in said)


def _wide(column: Tensor) -> Tensor:
    return column.view(-1, 1, 1, 1)


def _projected(x: Images, z: Images, threat: Threat) -> Images:
    """Return the images in the ball and the box, by float64: libraries overshoot by rounding (T11, F11)."""
    start, wide = x.double(), z.double()
    move = wide - start
    if threat.norm == "linf":
        near = (start + move.clamp(-threat.radius, threat.radius)).clamp(0, 1).to(x.dtype)
        return torch.where((near.double() - start).abs() > threat.radius, near.nextafter(x), near)
    if threat.norm != "l0":
        length = threat.distance(start, wide).clamp_min(1e-12)
        move = move * _wide((threat.radius / length).clamp_max(1))
    return (start + move).clamp(0, 1).to(x.dtype)


# --- parameters ----------------------------------------------------------------------------------------


def parameter(name: str, default: Any, kind: Any) -> inspect.Parameter:
    """Return a keyword of a library's constructor as a parameter of the attack."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def reach(threat: Threat, params: Mapping[str, Any], steps: str, step: str) -> str | None:
    """Return a doubt where so many steps of that length cannot reach the radius."""
    if steps not in params or not isinstance(params.get(step), int | float):
        return None
    length = params[steps] * params[step]
    if length >= threat.radius:
        return None
    return (
        f"{params[steps]} steps of {params[step]:g} reach {length:g}, less than the radius {threat.radius:g}"
    )


# --- registration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What an attack of a library is, and what it needs: a row of an adapter's table."""

    about: str
    norms: frozenset[Norm]
    access: Literal["gradient", "score", "decision"] = "gradient"
    budget: Literal["radius", "distance"] = "radius"
    least_classes: int = 2
    channels: int | None = None
    square: bool = False
    targeted: bool = True


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An attack of a library, under a name of the harness."""

    library: str
    module: str
    name: str
    needs: Needs
    signature: Callable[[str], Iterable[inspect.Parameter]]
    """``signature(name)``: its parameters; imports the library."""
    call: Callable[..., Tensor]
    """``call(name, threat, params, model, x, y, target, seed)``: see `Call`."""
    doubts: Callable[[str, Threat, Mapping[str, Any]], str | None]
    lift: bool
    """Whether logits must be above 0 (T1)."""
    softmax: frozenset[str]
    """Names of the attacks whose loss is one of float32 probabilities, with `loss` unless that is another."""
    check: Callable[[str, Mapping[str, Any]], None] | None = None
    unfit: Callable[[str, Mapping[str, Any], Shape], str | None] | None = None

    def register(self) -> None:
        """Register it."""
        needs = self.needs

        def adapted(
            view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, **params: Any
        ) -> Crafted:
            call = partial(self.call, self.name, threat, params)
            return craft(
                view,
                x,
                y,
                threat,
                noise,
                call,
                access=needs.access,
                budget=needs.budget,
                lift=self.lift,
                softmax=self.name in self.softmax and params.get("loss", "ce") in ("ce", "crossentropy"),
            )

        adapted.__doc__, adapted.__module__ = needs.about, self.module
        attack(
            f"{self.library}/{self.name}",
            norms=set(needs.norms),
            version=1,
            access=needs.access,
            keyed="shard",
            budget=needs.budget,
            least_classes=needs.least_classes,
            channels=needs.channels,
            square=needs.square,
            targeted=needs.targeted,
            time_limit=TIME_LIMIT,
            library=self.library,
            signature=partial(self.signature, self.name),
            doubts=lambda threat, **params: self.doubts(self.name, threat, params),
            check_params=self._checked,
            unfit=partial(self.unfit, self.name) if self.unfit else None,
        )(adapted)

    def _checked(self, params: dict[str, Any], shape: Shape) -> None:
        for name, value in params.items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
            if isinstance(value, float) and not (math.isfinite(value) and (value >= 0 or name in SIGNED)):
                # A confidence, a step, a share: the libraries take any, and do as it says.
                raise InputError(f"{name} must be a number of 0 or more, not {value:g}")
        if self.check:
            self.check(self.name, params)

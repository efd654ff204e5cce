"""The binarisation test: attacks on heads of a network's own features, each known to be wrong somewhere.

Zimmermann, Brendel, Tramer and Carlini 2022 (arXiv:2206.13991). The last layer of the network is replaced by
one head for each image, which tells points well inside its ball from one point at its edge. So an adversarial
image is there, and an attack that does not find it is too weak for these features.

Letters in shapes: N examples, M inner points of each, D features, T answers to each point.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.doctor.chance import level_of
from bench.doctor.findings import Finding
from bench.doctor.patient import STEPS, Patient, Sight, steps_away
from bench.noise import Noise
from bench.protocols import Images, Threat, View
from bench.referee.validation import validate
from bench.registry import bound

IMAGES = 24
"""How many images have a head."""

FEWEST = 8
"""So many heads, at least, must tell the points apart: of fewer a share says nothing."""

INNER = 64
"""Inner points of each image, beside the image itself: half of them corners."""

WITHIN = 0.95
"""The radius of the ball of the inner points, as a share of the radius: the paper's gap of 0.05."""

CLOSE = 0.999
"""How near the boundary of a head is to the point at the edge: as a share of the way from the middle between
both sides, as in the paper.
"""

TRIES = 32
"""Random draws of each image, half of them corners, that an attack is compared with."""

ALIKE = 1e-4
"""The largest difference between the outputs of a layer and logits that still are its outputs, as a share of
the largest logit.
"""


class Call(NamedTuple):
    """A call of a layer in a pass of a network."""

    layer: nn.Module
    """The layer."""
    place: int
    """How many calls of the same layer came before it in the pass."""


@dataclass(frozen=True)
class Reading:
    """A callable of points that answers the features that their logits are read from.

    The layer is watched during a call and at no other time.
    """

    ask: Callable[[Tensor], Tensor]
    """The callable of the view: points (n, ...) -> logits (n, K)."""
    call: Call
    """The call whose argument are the features."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return the features of points, (n, D), differentiable."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, given: tuple[Any, ...], __: Any) -> None:
            seen.append(given[0])

        with self.call.layer.register_forward_hook(hook):
            self.ask(z)
        return seen[self.call.place].flatten(1)


def penultimate(model: nn.Module, ask: Callable[[Tensor], Tensor], z: Images, classes: int) -> Call | None:
    """Return the call of a linear layer whose outputs are the logits.

    They may differ by one positive factor, and by a constant for each image, as those of a log-softmax do; a
    logit of a refusal may stand behind them. What counts as such a layer is a module that holds K x D weights
    for D features: a `nn.Linear`, one of somebody's own, or a convolution as large as its image.

    Args:
        model: The network; layers that are no part of it are not found.
        ask: The callable of the view: points (n, ...) -> logits.
        z: Points (n, ...), 2 or more.
        classes: K, without a refusal.

    Returns:
        The last such call of a pass; None where there is none.
    """
    calls: list[tuple[Call, Tensor]] = []
    counts: dict[nn.Module, int] = {}

    def hook(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        place = counts.get(layer, 0)
        counts[layer] = place + 1
        features = given[0] if given else None
        if not isinstance(features, Tensor) or not isinstance(output, Tensor):
            return
        if len(output) != len(z) or len(features) != len(z) or output[0].numel() != classes:
            return
        if classes * features[0].numel() in _sizes(layer):
            calls.append((Call(layer, place), output.flatten(1)))

    with ExitStack() as hooks:
        for layer in model.modules():
            hooks.enter_context(layer.register_forward_hook(hook))
        with torch.no_grad():
            logits = ask(z)
    if logits.dim() != 2 or len(logits) != len(z) or logits.shape[1] < classes:
        return None
    return next((call for call, output in reversed(calls) if _same(output, logits[:, :classes])), None)


def _sizes(layer: nn.Module) -> set[int]:
    """Return how many values the weights of a module itself have."""
    # Where weights are parametrized, they are an attribute alone.
    weights = [*layer.parameters(recurse=False), getattr(layer, "weight", None)]
    return {each.numel() for each in weights if isinstance(each, Tensor)}


def _same(output: Tensor, logits: Tensor) -> bool:
    """Return whether logits (n, K) are outputs (n, K), up to a factor and a constant for each row."""
    a, b = (each.double() - each.double().mean(1, keepdim=True) for each in (output, logits))
    factor = (a * b).sum() / a.square().sum()
    # What is not finite is not the same.
    return bool(factor > 0) and bool((b - factor * a).abs().amax() <= ALIKE * b.abs().amax())


@dataclass(frozen=True)
class Heads:
    """A head for each of N examples: scores of features, above 0 for those of the point at the edge."""

    ways: Tensor
    """What features are multiplied by, float64 (N, D)."""
    edges: Tensor
    """The features of the points at the edge, float64 (N, D)."""
    there: Tensor
    """Where the points can be told apart, bool (N,)."""
    close: float = CLOSE
    """How near the boundary is to the edge, in [0, 1)."""

    @classmethod
    def of(cls, inner: Tensor, edges: Tensor, close: float = CLOSE) -> "Heads":
        """Return the heads with the widest margin between inner points and the point at the edge.

        The shortest w with w (e - f) >= 1 for all inner features f: a problem of least distance, solved
        exactly by nonnegative least squares (Lawson and Hanson 1974, Solving least squares problems, 23.4).

        Args:
            inner: Features of inner points, (N, M, D).
            edges: Features of the points at the edge, (N, D).
            close: As the attribute.

        Returns:
            The heads.
        """
        inner, edges = inner.double().cpu(), edges.double().cpu()
        ways = torch.stack([_widest(edge - own) for own, edge in zip(inner, edges, strict=True)])
        made = cls(ways, edges, torch.ones(len(edges), dtype=torch.bool), close)
        outer = made.scores(edges, torch.arange(len(edges)))
        within = torch.stack([made.scores(each, torch.arange(len(edges))) for each in inner.unbind(1)])
        return replace(made, there=(outer > 0) & (within < 0).all(0))

    def scores(self, features: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of features.

        Args:
            features: Features (..., n, D) of points.
            rows: Whose head is asked, int64 (n,).

        Returns:
            Scores, float64 (..., n): -1 and less for inner points, but for what is close.
        """
        ways, edges = (each.to(features.device)[rows] for each in (self.ways, self.edges))
        risen = ((features.double() - edges) * ways).sum(-1)
        return risen + (1 - self.close) / 2


def _widest(gaps: Tensor) -> Tensor:
    """Return the shortest w (D,) with gaps (M, D) times w at least 1; zeros where there is none."""
    from scipy.optimize import nnls

    size = float(gaps.norm(dim=1).mean())
    if not 0 < size < math.inf:
        return torch.zeros_like(gaps[0])
    # All solutions lie where the gaps do, which is small.
    base, corner = torch.linalg.qr((gaps / size).T)
    joined = torch.cat([corner, corner.new_ones(1, corner.shape[1])])
    target = joined.new_zeros(len(joined))
    target[-1] = 1
    found, _ = nnls(joined.numpy(), target.numpy(), maxiter=100 * len(joined))
    residual = joined @ torch.from_numpy(found) - target
    if residual[-1] == 0:
        return torch.zeros_like(gaps[0])
    way: Tensor = base @ (-residual[:-1] / residual[-1]) / size
    return way


@dataclass(frozen=True)
class Binary:
    """The logits of the heads: of the inner points, and of the point at the edge."""

    ask: Callable[[Tensor], Tensor]
    """Features of points: (copies * n, ...) -> (copies * n, D), or (T, copies * n, D)."""
    heads: Heads
    """The heads of all examples."""
    rows: Tensor
    """Whose points are asked about, int64 (n,)."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return the logits of points (copies * n, ...), copy after copy: (copies * n, 2), or (T, ...)."""
        rows = self.rows.repeat(len(z) // max(len(self.rows), 1))
        scores = self.heads.scores(self.ask(z), rows)
        return torch.stack([-scores, scores], -1) / 2

    def select(self, rows: Tensor) -> "Binary":
        """Return the logits of some of these examples.

        Args:
            rows: Positions among these, int64 (m,).
        """
        ask = self.ask.select(rows)  # type: ignore[attr-defined]
        return Binary(ask, self.heads, self.rows[rows])


def inner_points(x: Images, threat: Threat) -> Images:
    """Return points of the ball of `WITHIN` of the radius, in the box, and the image itself.

    Half of them are drawn uniformly, and half at corners, as the point at the edge is: otherwise a head could
    tell that one by the size of its move, which any other corner has, too.

    Args:
        x: Images (N, C, H, W) on the CPU.
        threat: The ball, in linf or l2.

    Returns:
        Images (N, M + 1, C, H, W).
    """
    small = Threat(threat.norm, WITHIN * threat.radius)
    return torch.stack([x, *_drawn(x, small, INNER, "inner")], 1)


def edge_points(x: Images, threat: Threat) -> Images:
    """Return a corner of the ball of each image, in the box; in l2 a point of its surface.

    Args:
        x: Images (N, C, H, W) on the CPU.
        threat: The ball, in linf or l2.

    Returns:
        Images (N, C, H, W).
    """
    return steps_away(x, threat, "edge")


def _drawn(x: Images, threat: Threat, many: int, word: str) -> Iterator[Images]:
    """Yield images moved to random points of the ball, in the box, in turn anywhere and to its corners."""
    shape = tuple(x.shape[1:])
    noise = Noise(("doctor", word), torch.arange(len(x)))
    for place in range(many // 2):
        if threat.norm == "linf":
            move = noise.uniform(shape, -threat.radius, threat.radius)
        else:
            # The volume within r grows with r to the power of the dimension.
            share = noise.uniform(()) ** (1 / math.prod(shape))
            normal = noise.normal(shape)
            length = torch.linalg.vector_norm(normal.flatten(1), dim=1)
            move = normal * (threat.radius * share / length).view(-1, 1, 1, 1)
        yield threat.project(x, x + move)
        yield steps_away(x, threat, word, place)


@dataclass(frozen=True)
class Trained:
    """The heads of a patient's images, and what to ask about them."""

    patient: Patient
    """The defense with the images that have a head."""
    features: View
    """The features, as an attack gets them."""
    heads: Heads
    """The heads."""

    def won(self, z: Images) -> Tensor:
        """Return where images are adversarial.

        Args:
            z: Images (N, C, H, W), one for each example, on the CPU.

        Returns:
            bool (N,).
        """
        found = features_of(self.features, z.to(self.patient.device))
        return (self.heads.scores(found, torch.arange(len(z), device=found.device)) > 0).cpu()

    def attacked(self) -> Images:
        """Return what the examination's short PGD finds on the heads, images (N, C, H, W) on the CPU."""
        patient, device = self.patient, self.patient.device
        x = patient.images.to(device)
        rows = torch.arange(len(x), device=device)
        view = View(Binary(self.features.logits, self.heads, rows), exact=not patient.random)
        noise = Noise(("doctor", "binarized", "pgd"), rows, device=device)
        found = bound({"use": "pgd", "steps": STEPS, "loss": "margin"})
        returned = found(view, x.clone(), torch.zeros_like(rows), patient.threat, noise)
        return validate(x, returned, patient.threat).images.cpu()

    def guessed(self) -> Tensor:
        """Return where one of `TRIES` random draws is adversarial, bool (N,)."""
        x = self.patient.images
        won = torch.zeros(len(x), dtype=torch.bool)
        for z in _drawn(x, self.patient.threat, TRIES, "guess"):
            won |= self.won(z)
        return won


def features_of(view: View, z: Images) -> Tensor:
    """Return features without gradients, the mean of several answers: (n, D).

    Args:
        view: The features, as an attack gets them.
        z: Images (n, C, H, W) on the view's device.
    """
    with torch.no_grad():
        found: Tensor = view.logits(z)
    return found.mean(0) if found.dim() == 3 else found


def trained(patient: Patient, view: View) -> Trained:
    """Give each image of a patient a head.

    Args:
        patient: The defense.
        view: Its features, as an attack gets them.

    Returns:
        The heads, with what to ask about them.
    """
    x, device = patient.images, patient.device
    inner = inner_points(x, patient.threat)
    found = features_of(view, inner.flatten(0, 1).to(device)).view(len(x), INNER + 1, -1)
    edges = features_of(view, edge_points(x, patient.threat).to(device))
    # Of what is random nothing is known to a thousandth: its boundary is in the middle.
    return Trained(patient, view, Heads.of(found, edges, 0.0 if patient.random else CLOSE))


def binarized(patient: Patient) -> Iterator[Finding]:
    """Attack heads on the network's own features, where adversarial images are known to be.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    assert patient.attacked is not None
    few = patient.few(min(IMAGES, len(patient.labels)))
    with patient.still("binarized"):
        found = _found(few, patient.attacked)
    yield Finding("binarized", "untested", found) if isinstance(found, str) else found


def _found(patient: Patient, sight: Sight) -> Finding | str:
    """Return what was found, or why nothing could be."""
    name, seen, x = sight.entry.name, patient.bare(sight), patient.images.to(patient.device)
    call = penultimate(patient.model, seen.logits, x, patient.classes)
    if call is None:
        return f"the logits of view {name!r} are not those of a linear layer of the network"
    reading = replace(seen, logits=Reading(seen.logits, call), centred=False, refusal=False)
    view = patient.shown(reading, sight)
    with torch.enable_grad():
        if not view.logits(x.clone().requires_grad_()).requires_grad:
            return f"no gradient of view {name!r} passes the features"
    made = trained(patient, view)
    there = made.heads.there & made.won(edge_points(patient.images, patient.threat))
    n = int(there.sum())
    if n < FEWEST:
        return f"a head on the features tells its points apart for {n} of {len(there)} images alone"
    won, guessed = (int((each & there).sum()) for each in (made.won(made.attacked()), made.guessed()))
    level = level_of(n - won, n)
    said = (
        f"view {name!r}: new heads on the features put adversarial images within the radius of {n} images; "
        f"PGD-{STEPS} finds {won} of them, and {TRIES} random draws {guessed}"
    )
    if guessed >= won:
        if level not in ("doubt", "alarm"):
            return f"{said}, which is too easy"
        level = "alarm"
    return Finding("binarized", level, said, None if level == "quiet" else "weak-on-features", 0.01)

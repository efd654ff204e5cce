"""Tests of what gradients promise: that they lead uphill, and that they are the gradients of the margin."""

from collections.abc import Iterator

import torch
from torch import Tensor, autograd

from bench.doctor.chance import at_least, at_most, level_of
from bench.doctor.findings import Finding, Level
from bench.doctor.patient import Patient, Sight, steps_away
from bench.losses import objective
from bench.noise import Noise, seed_of
from bench.protocols import Images, Labels, View
from bench.referee.freezing import reseed

SCALES = (64, 16, 4)
"""The steps of `uphill` are the radius divided by these."""

SOUND = 0.95
"""The share of steps along the gradient that lead uphill, at least, with a sound view."""

RARE = 1e-3
"""The probability by chance below which `uphill` finds something."""

OFF = 0.5
"""The largest relative difference between what a short step gains and what its gradient promises."""

ERRORS = 4.0
"""Standard errors of a sum of slopes that a change of the margin may be away from it."""

PART = 0.1
"""The least share of a margin's change that gradients on the way must make up; at most they make up its
inverse. Surrogates of masks and of inner searches make up 0.3 and more.
"""

PLACES = 16
"""Places on a path at which gradients are taken."""

HALVINGS = 16
"""How often the segment around a change of the answer is halved."""

JUMP = 0.1
"""The least jump of a margin where the answer changes, as a share of what it changes along the path."""


def margins(view: View, z: Images, y: Labels) -> Tensor:
    """Return margins without gradients, float64 (n,): above 0 where the view answers wrongly.

    Args:
        view: The view.
        z: Images (n, C, H, W) on the view's device.
        y: True labels (n,).
    """
    with torch.no_grad():
        found: Tensor = objective(view, view.logits(z).double(), y, "margin")
    return found


def steepness(view: View, z: Images, y: Labels) -> tuple[Tensor, Tensor]:
    """Return margins (n,) and their gradients (n, C, H, W).

    Args:
        view: The view.
        z: Images (n, C, H, W) on the view's device.
        y: True labels (n,).
    """
    z = z.detach().clone().requires_grad_()
    with torch.enable_grad():
        found = objective(view, view.logits(z).double(), y, "margin")
        (gradient,) = autograd.grad(found.sum(), z)
    return found.detach(), gradient


def uphill(patient: Patient) -> Iterator[Finding]:
    """Step along the gradient and against it, and see which is higher; and how much higher, as promised.

    Half of the images are taken as they are, half with noise. Each image counts once for a length of step: a
    sound view leads uphill from at least `SOUND` of them, so that fewer have the stated probability.

    Args:
        patient: The defense.

    Yields:
        What was found, for each view of images with gradients.
    """
    for sight in patient.smooth:
        with patient.still("uphill", sight.entry.name):
            yield from _uphill(patient, sight)


def _uphill(patient: Patient, sight: Sight) -> Iterator[Finding]:
    n, name, radius = len(patient.labels), sight.entry.name, patient.threat.radius
    noisy = steps_away(patient.images, patient.within(radius / 2), "uphill")
    half = (torch.arange(n) % 2 == 0).view(-1, 1, 1, 1)
    z, y = torch.where(half, patient.images, noisy).to(patient.device), patient.labels.to(patient.device)
    view = patient.view(sight)

    def same_draws() -> None:
        # A random defense is asked with the same draws each time, so that only the step makes a difference.
        reseed(seed_of("doctor", "uphill", name))

    same_draws()
    _, gradient = steepness(view, z, y)
    flat = int((gradient == 0).flatten(1).all(1).sum())
    direction = gradient.sign() if patient.threat.norm == "linf" else _unit(gradient)
    rises, promised = {}, 0
    for scale in SCALES:
        up, down = ((z + way * radius / scale * direction).clamp(0, 1) for way in (1, -1))
        same_draws()
        gain = margins(view, up, y)
        same_draws()
        gain = gain - margins(view, down, y)
        rises[scale] = int((gain > 0).sum())
        if scale == SCALES[0]:
            promise = (gradient * (up - down)).flatten(1).sum(1).double()
            promised = int(((gain - promise).abs() <= OFF * promise.abs()).sum())
    worst = min(rises.values())
    said = (
        f"view {name!r}: a step along the gradient leads higher than one against it for "
        f"{', '.join(f'{k}' for k in rises.values())} of {n} images (radius / 64, 16, 4)"
        f"{f'; {flat} gradients are 0' if flat else ''}"
    )
    # Three lengths of step are looked at, so that each has a third of the probability.
    if at_most(worst, n, SOUND) >= RARE / len(SCALES):
        yield Finding("uphill", "quiet", said)
    else:
        coin = at_least(worst, n, 0.5) > RARE
        yield Finding("uphill", "alarm" if coin else "doubt", said, "not-uphill", RARE)
    off = n - promised
    said = f"view {name!r}: {off} of {n} short steps gain otherwise than their gradients promise"
    # Masks, inner searches and gradients that stand in for others are so by design: alone it is no doubt.
    level: Level = "quiet" if _surely(off, n) == "quiet" else "note"
    yield Finding("slope", level, said, "rough-slope" if level == "note" else None)


def _surely(k: int, n: int) -> Level:
    """Return how heavy it is that k of n examples are off; a stray one is a kink that was met by accident."""
    level = level_of(k, n)
    return "quiet" if level == "note" else level


def _unit(moves: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(moves.flatten(1), dim=1).clamp_min(1e-30)
    unit: Tensor = moves / length.view(-1, 1, 1, 1)
    return unit


def _ends(patient: Patient) -> tuple[Images, Images, Labels, Tensor]:
    """Return images, an image of another class for each, their labels, and the rows: all on the device."""
    y = patient.labels
    order = torch.arange(len(y)).roll(1)
    for shift in range(2, len(y)):
        same = y[order] == y
        if not same.any():
            break
        order = torch.where(same, torch.arange(len(y)).roll(shift), order)
    rows = (y[order] != y).nonzero().flatten()
    ends = patient.images[rows], patient.images[order[rows]], y[rows]
    a, b, c = (each.to(patient.device) for each in ends)
    return a, b, c, rows


def path(patient: Patient) -> Iterator[Finding]:
    """Add up gradients on the way from each image to one of another class: they must make up the change.

    The gradient theorem, at `PLACES` places on a straight line, each drawn within its part. Exact gradients
    are off by some per cent, gradients of something else by all. What makes up less than `PART` of the
    change, more than its inverse, or is of the other sign, counts, if it is farther from the change than
    `ERRORS` standard errors, by how much the slopes of neighbouring places differ.

    Args:
        patient: The defense.

    Yields:
        What was found, for each view of images with gradients.
    """
    a, b, y, rows = _ends(patient)
    if not len(rows):
        yield Finding("path", "untested", "all images are of one class")
        return
    for sight in patient.smooth:
        with patient.still("path", sight.entry.name):
            view = patient.view(sight, len(rows))
            places = Noise(("doctor", "path"), rows).uniform((PLACES,)).to(a)
            slopes = []
            for place in range(PLACES):
                at = ((place + places[:, place]) / PLACES).view(-1, 1, 1, 1)
                _, gradient = steepness(view, a + at * (b - a), y)
                slopes.append((gradient * (b - a)).flatten(1).sum(1).double())
            change = margins(view, b, y) - margins(view, a, y)
        along = torch.stack(slopes)
        summed = along.mean(0)
        share = summed / change
        # Where slopes go up and down along the way, few places say little: on a network that hardly learned.
        error = (along.diff(dim=0).square().sum(0) / 2).sqrt() / PLACES
        beyond = (summed - change).abs() > ERRORS * error
        off = int((~((share > PART) & (share < 1 / PART)) & (change != 0) & beyond).sum())
        said = (
            f"view {sight.entry.name!r}: on {off} of {len(rows)} ways to an image of another class the "
            "gradients do not make up the change of the margin"
        )
        level = _surely(off, len(rows))
        yield Finding("path", level, said, None if level == "quiet" else "gradient-not-of-margin", 0.01)


def jump(patient: Patient) -> Iterator[Finding]:
    """Close in on where the answer changes between two images: a margin that jumps there has no slope to see.

    Args:
        patient: The defense.

    Yields:
        What was found, for each view of images with gradients.
    """
    a, b, y, rows = _ends(patient)
    for sight in patient.smooth if len(rows) else ():
        with patient.still("jump", sight.entry.name):
            view = patient.view(sight, len(rows))
            low, high = (torch.full((len(rows), 1, 1, 1), end, device=a.device) for end in (0.0, 1.0))
            first, last = margins(view, a, y), margins(view, b, y)
            below, above = first, last
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                at = margins(view, a + middle * (b - a), y)
                over = at > 0
                high, above = torch.where(over.view(-1, 1, 1, 1), middle, high), torch.where(over, at, above)
                low, below = torch.where(over.view(-1, 1, 1, 1), low, middle), torch.where(over, below, at)
        crosses = (first < 0) & (last > 0)
        jumps = crosses & (above - below > JUMP * (last - first))
        k, n = int(jumps.sum()), int(crosses.sum())
        said = f"view {sight.entry.name!r}: the margin jumps at {k} of {n} places where the answer changes"
        level = _surely(k, n)
        yield Finding("jump", level, said, None if level == "quiet" else "margin-jumps", 0.01)

"""A worst case at a fraction of AutoAttack's passes, in linf and l2: a sequence whose settings are frozen.

What costs little and breaks most goes first, and each part sees only what stood against those before it. The
parts are from several papers, each cited where it stands; their numbers were tuned on two networks for MNIST
(docs/performance.md) and are no parameters. `autoattack` stays the last word.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, autograd

from attacks.apgd import Settings, Walks
from attacks.common.best_so_far import BestIterate, GradientNotes, finite
from attacks.common.candidates import candidate_labels, mean_logits
from attacks.common.in_turn import Member, Run, in_turn, narrowed
from attacks.common.projected_ascent import steepest
from attacks.common.starts import surface
from attacks.fab import DUAL, fab_t
from attacks.fab import cost as boundary_cost
from attacks.square import square
from bench import (
    Crafted,
    Images,
    Labels,
    Loss,
    Norm,
    Randomness,
    Threat,
    View,
    attack,
    lengths,
    objective,
    succeeded,
)

RHO = 0.75
"""As in Auto-PGD."""

MARGIN_STEPS = 20
"""Steps of the first walk, up the margin."""

CANDIDATES = 9
"""Wrong classes that are ranked by a linear estimate."""

CLASSES: dict[Norm, int] = {"linf": 5, "l2": 2}
"""How many of them are gone for, the nearest first."""

TARGET_STEPS = 25
"""Steps of the walk to each."""

ENTROPY_STEPS, PROBABILITY_STEPS = 40, 30
"""Steps up the cross-entropy, and up the margin of probabilities."""

STARTS, MORE_STARTS, START_STEPS, DIRECTED_STEPS = 4, 8, 7, 25
"""Directed starts, and further ones of what nearly fell; steps towards each; steps of the walk from there."""

CLOSE = 0.1
"""The share of its clean margin that is left at most of what nearly fell."""

NEAR, FAR = (5.0, 3.0, 2.0, 1.4, 1.0), (7.0, 4.0, 2.5, 1.6, 1.0)
"""Radii of balls, the largest first, as multiples of the radius that is attacked."""

SHRINKING: tuple[tuple[tuple[float, ...], Loss], ...] = (
    (NEAR, "margin"),
    (NEAR, "ce"),
    (FAR, "margin"),
    (FAR, "ce"),
    (NEAR, "margin"),
)
"""Of each walk in ever smaller balls, in l2: the balls, and what is climbed."""

SHRINKING_STEPS = (8, 8, 8, 8, 12)
"""Steps in each ball."""

BOUNDARY_STEPS, BOUNDARY_BACK, BOUNDARY_CLASSES = 20, 0.5, 4
"""Of the search along the boundary, in l2: steps for each class, what a success keeps of its way; how many
classes are gone for."""

QUERIES = 3000
"""Points that Square asks for, where it is asked at all."""

SPREAD = 1e-3
"""Difference between the largest logit and the mean of all, below which a network tells nothing apart."""


def cost() -> int:
    """Return how many forward passes it makes over each example, at most."""
    # Each with the look at its image; the first ones are the image's own and the stored one's.
    parts = [1, 1, MARGIN_STEPS + 2, 1 + CLASSES["linf"] * (TARGET_STEPS + 1) + 1]
    starts = (STARTS + MORE_STARTS) * (START_STEPS + DIRECTED_STEPS + 1)
    linf = PROBABILITY_STEPS + 2 + ENTROPY_STEPS + 2 + starts + 1 + (1 + QUERIES) + 2
    l2 = 1 + boundary_cost(steps=BOUNDARY_STEPS, classes=BOUNDARY_CLASSES)
    l2 += len(SHRINKING) * (sum(steps + 1 for steps in SHRINKING_STEPS) + 1)
    return sum(parts) + max(linf, l2) + 1 + (1 + QUERIES) + 1


@attack("fast-worst", norms={"linf", "l2"}, version=2, starts="any", cost=cost)
def fast_worst(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
    """Find nearly what AutoAttack finds at a fraction of its passes.

    In turn: stored images, where there are any; a short walk up the margin; in l2, walks in ever smaller
    balls, and a search along the boundary; walks to the classes that a linear estimate ranks first; in linf,
    one up the margin of probabilities, one up the cross-entropy, and walks up the margin from directed
    starts, more where it nearly fell; and Square, only there and where the gradient or the logits tell
    nothing. Where winning here is not winning (``view.exact`` is false), every part sees every example, and
    the image with the highest margin is kept.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: The norm, and the radius in units of [0, 1].
        noise: Draws of each example's own.

    Returns:
        The images, in the ball and the box, with the notes of `sequence`, whose members are here called
        ``stored``, ``margin``, ``shrinking-1`` to ``shrinking-5`` and ``boundary`` (l2), ``targets``,
        ``probabilities``, ``entropy`` and ``directed`` (all in linf), and ``search``.
    """
    wide: list[tuple[str, Run]] = [
        (f"shrinking-{number}", partial(_shrinking, factors=factors, loss=loss))
        for number, (factors, loss) in enumerate(SHRINKING, 1)
    ]
    parts: list[tuple[str, Run]] = [
        ("margin", partial(_climb, steps=MARGIN_STEPS, loss="margin")),
        *([] if threat.norm == "linf" else [*wide, ("boundary", _boundary)]),
        ("targets", _targets),
    ]
    if threat.norm == "linf":
        probabilities = partial(_climb, steps=PROBABILITY_STEPS, loss="margin", of=_Probabilities)
        parts.append(("probabilities", probabilities))
        parts.append(("entropy", partial(_climb, steps=ENTROPY_STEPS, loss="ce")))
        parts.append(("directed", _directed))
    parts.append(("search", _search))
    if view.starts is not None:
        parts.insert(0, ("stored", _stored))
    members = [Member(name, name, run) for name, run in parts]
    return in_turn(members, range(len(members)), view, x, y, threat, noise)


def _stored(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Return the stored images, brought into the ball."""
    assert view.starts is not None
    return threat.project(x, view.starts)


def _climb(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    steps: int,
    loss: Loss,
    of: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]] = lambda logits: logits,
) -> Crafted:
    """Walk once, as Auto-PGD does, up a loss of the logits or of what `of` makes of them."""
    seen = replace(view, logits=of(view.logits), starts=None)
    walks = Walks(seen, x, y, threat, noise, Settings(steps, loss, RHO))
    walks.climb()
    return walks.crafted()


class _Probabilities:
    """The probabilities that logits stand for: their margin is the loss of PMA (arXiv:2411.15210)."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self._logits = logits

    def __call__(self, z: Tensor) -> Tensor:
        # In float64, where probabilities near 1 still have a gradient.
        return self._logits(z).double().softmax(-1)

    def select(self, rows: Tensor) -> "_Probabilities":
        """Return the callable for some of the examples."""
        return _Probabilities(narrowed(self._logits, rows))


def _targets(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
    """Walk to one class after another, the one that looks nearest first."""
    walks = Walks(replace(view, starts=None), x, y, threat, noise, Settings(TARGET_STEPS, "dlr", RHO))
    for towards in ranked(view, x, y, threat.norm)[:, : CLASSES[threat.norm]].T:
        walks.climb(towards)
    return walks.crafted()


def ranked(view: View, x: Images, y: Labels, norm: Norm) -> Tensor:
    """Return the likeliest wrong classes in the order in which a linear network would reach them.

    The distance to class t is (f_y - f_t) / |grad (f_y - f_t)|, in the dual norm (MALT, arXiv:2407.02240).

    Args:
        view: The view, with gradients.
        x: Images (N, C, H, W).
        y: Their labels (N,).
        norm: ``linf`` or ``l2``.

    Returns:
        int64 (N, L), L at most `CANDIDATES`.
    """
    z = x.clone().requires_grad_()
    logits = mean_logits(view.logits(z))
    labels = candidate_labels(view, logits, y, CANDIDATES)
    ways = []
    for place, label in enumerate(labels.unbind(1)):
        gap = logits.gather(1, y[:, None]).squeeze(1) - logits.gather(1, label[:, None]).squeeze(1)
        more = place + 1 < labels.shape[1]
        (gradient,) = autograd.grad(gap.sum(), z, retain_graph=more)
        ways.append(gap.detach().double() / lengths(gradient, DUAL[norm]).double())
    # A class without a slope cannot be reached; it comes last.
    order = torch.stack(ways, 1).nan_to_num(torch.inf, torch.inf, torch.inf).argsort(dim=1, stable=True)
    return labels.gather(1, order)


def _directed(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
    """Walk up the margin from several directed starts, and from more where the margin nearly fell.

    There Square is asked, too: an image whose margin is all but gone is the likeliest to be robust by luck.
    """
    record, notes = BestIterate(x), GradientNotes(x)

    def walk(rows: Tensor) -> None:
        if len(rows) == 0:
            return
        walks = _from_start(view.select(rows), x[rows], y[rows], threat, noise.select(rows))
        record.offer(rows, walks.record.images, walks.record.losses, walks.record.won)
        notes.flat[rows] |= walks.notes.flat
        notes.nonfinite[rows] |= walks.notes.nonfinite

    for _ in range(STARTS):
        walk(record.standing)
    with torch.no_grad():
        clean = objective(view, view.logits(x), y, "margin").double()
    close = record.losses > CLOSE * clean
    for _ in range(MORE_STARTS):
        walk((close & ~record.won).nonzero().squeeze(1))
    rows = (close & ~record.won).nonzero().squeeze(1)
    if len(rows):
        here, draws = view.select(rows), noise.select(rows)
        z = square(here, x[rows], y[rows], threat, draws, queries=QUERIES).images
        with torch.no_grad():
            logits = here.logits(z)
        won = succeeded(here, logits, y[rows]) & view.exact
        record.offer(rows, z, objective(here, logits, y[rows], "margin"), won)
    return Crafted(record.images, notes.columns())


def _from_start(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Walks:
    """Walk up the margin from a directed start."""
    seen = replace(view, starts=directed_start(view, x, y, threat, noise))
    walks = Walks(seen, x, y, threat, noise, Settings(DIRECTED_STEPS, "margin", RHO))
    walks.climb()
    return walks


def directed_start(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Return points of the ball in random directions of the logits (the idea is A3's, arXiv:2203.05154).

    They are where a few steps lead that raise a weighted sum of the logits: weights from [-1, 1], but for the
    true class from [-0.5, 0.1], and for one wrong class 0.8. The figures were not checked with the paper.

    Args:
        view: The view, with gradients.
        x: Images (N, C, H, W).
        y: Their labels (N,).
        threat: A ball in linf or l2.
        noise: Draws of each example's own.

    Returns:
        Images (N, C, H, W) in the ball and the box.
    """
    z = threat.project(x, x + threat.radius * surface(x, threat.norm, noise))
    weights: Tensor | None = None
    for _ in range(START_STEPS):
        z = z.detach().requires_grad_()
        logits = mean_logits(view.logits(z))
        if weights is None:
            labels = candidate_labels(view, logits, y, CANDIDATES)
            chosen = labels.gather(1, noise.integers((1,), labels.shape[1]))
            weights = noise.uniform((logits.shape[1],), -1, 1).to(logits)
            weights = weights.scatter(1, y[:, None], noise.uniform((1,), -0.5, 0.1).to(logits))
            weights = weights.scatter(1, chosen, 0.8)
        (gradient,) = autograd.grad((weights * logits.nan_to_num(0.0, 0.0, 0.0)).sum(), z)
        uphill = steepest(finite(gradient)[None], None, threat)[0][0]
        z = threat.project(x, z.detach() + threat.radius * uphill)
    return z.detach()


def _shrinking(
    view: View,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    factors: tuple[float, ...],
    loss: Loss,
) -> Crafted:
    """Walk in ever smaller balls, the last of which is the threat's, each time from where the last walk led.

    What lies behind a plateau on which no loss has a slope is found from outside the ball (the idea is that
    of Croce and Hein 2021 for l1, arXiv:2103.01208; balls and steps are ours).
    """
    # Far from the image a wrong answer is no success, and the walk goes on to the highest loss.
    seen = replace(view, starts=None, exact=False)
    for factor, steps in zip(factors, SHRINKING_STEPS, strict=True):
        if factor == 1:
            seen = replace(seen, exact=view.exact)
        ball = replace(threat, radius=factor * threat.radius)
        walks = Walks(seen, x, y, ball, noise, Settings(steps, loss, RHO))
        walks.climb()
        found = walks.crafted()
        seen = replace(seen, starts=found.images)
    return found


def _boundary(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
    """Step along the boundaries of the likeliest classes, also out of the ball (FAB, arXiv:1907.02044)."""
    view = replace(view, starts=None)
    found = fab_t(
        view, x, y, threat, noise, steps=BOUNDARY_STEPS, classes=BOUNDARY_CLASSES, beta=BOUNDARY_BACK
    )
    # Of what is too far the nearest point of the ball.
    return Crafted(threat.project(x, found.images), {})


def _search(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
    """Search by scores where gradients or logits tell nothing, and leave the other images as they are."""
    notes = GradientNotes(x)
    z = x.clone().requires_grad_()
    logits = view.logits(z)
    (gradient,) = autograd.grad(objective(view, logits, y, "margin").sum(), z)
    everyone = torch.arange(len(x), device=x.device)
    notes.see(everyone, gradient[None], first=True)
    scores = mean_logits(logits).detach()
    alike = scores.amax(1) - scores.mean(1) < SPREAD
    images = x.clone()
    if len(rows := (notes.flat | notes.nonfinite | alike).nonzero().squeeze(1)):
        found = square(view.select(rows), x[rows], y[rows], threat, noise.select(rows), queries=QUERIES)
        images[rows] = found.images
    return Crafted(images, notes.columns())

"""Latent backtracking (Chen, Xie and Zhu, theorem 1): a gradient through the inversion of a generator."""

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess, by_example
from attacks.common.margins import margin_shortfall
from attacks.common.penalty_search import PenaltySearch, Variable
from bench import (
    Count,
    Crafted,
    Images,
    Inversion,
    Labels,
    NonNegative,
    NonNegativeCount,
    Positive,
    Randomness,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)
from defenses.nets.power_iteration import largest_curvature

FLAT = 1e-12
"""A curvature below this is none: nothing says where the code would go."""


def _flags(threat: Threat, *, backtracks: int, **_: object) -> str | None:
    if backtracks == 0:
        return "with 0 backtracks codes are held fixed: a defense that sees nothing but them has no gradient"
    return None


def cost(*, steps: int, searches: int, backtracks: int, draws: int, **_: object) -> int:
    """Return how many forward passes it makes over each example, at most.

    Args:
        steps: How many steps each descent takes.
        searches: How many descents there are.
        backtracks: How many steps codes are led by.
        draws: How often each inversion is made.
    """
    # At every image the codes are led and classified, and may be inverted, with an energy for the rate.
    return draws * (3 + searches * (steps + 1) * (backtracks + 1 + 3))


@attack(
    "latent-backtracking",
    norms={"l2"},
    version=1,
    space="inversion",
    kind="minimum-norm",
    flags=_flags,
    cost=cost,
)
def latent_backtracking(
    view: Inversion,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    backtracks: NonNegativeCount = 20,
    rate: Positive | None = None,
    refresh: Count = 10,
    steps: Count = 100,
    searches: Count = 5,
    weight: Positive = 1.0,
    lr: Positive = 0.01,
    kappa: NonNegative = 0.0,
    variable: Variable = "box",
    abort: bool = True,
    draws: Count = 1,
    offset: NonNegative = 0.0,
) -> Crafted:
    """Minimise |z - x|^2 + lambda * max(kappa - margin, 0), where the margin follows the code of `z`.

    The code is led some steps down the energy at the present image, and the gradient goes through these
    steps. The code that they end at, held fixed, is where the next image's begin; the defense's own inversion
    takes its place now and then, and wherever it promises a nearer success. A success is one of the defense
    itself: by an inversion of that image.

    Args:
        view: What the attack looks through, with gradients.
        x: Images, float (N, C, H, W) in [0, 1].
        y: Their labels, int64 (N,).
        threat: Its norm measures the move; without a radius the move is as short as can be.
        noise: Draws of each example's own.
        backtracks: How many steps the code is led by; 0 holds it fixed.
        rate: The length of these steps; None: 0.9 over the energy's largest curvature there, for each
            example.
        refresh: After how many images the defense inverts again.
        steps: How many steps of Adam each descent takes.
        searches: How many descents there are: lambda is found for each example by a binary search.
        weight: The first lambda.
        lr: Adam's learning rate, in units of the variable.
        kappa: The wanted margin, in units of the logits.
        variable: ``box``: the pixels are moved, and cut to the box after each step; ``tanh``: w is, for
            pixels (tanh w + 1) / 2.
        abort: Whether each example's descent ends at a tenth of the steps over which its loss has not fallen.
        draws: How often every inversion is made; margins are averaged over them, and a success is one of the
            mean logits.
        offset: The standard deviation of normal noise on each code from an inversion, in units of the codes.

    Returns:
        The nearest success of each image, else the image, with notes. ``failed``; ``flat``, where the energy
        had no curvature at a code, so that it was held fixed; ``nonfinite``, where a gradient was not finite;
        ``inversions``, how often the defense inverted.
    """
    nearest = NearestSuccess(x, threat)
    codes = _Codes(x, noise, backtracks=backtracks, rate=rate, draws=draws, offset=offset)

    def won(here: Inversion, z: Images, y: Labels, rows: Tensor) -> Tensor:
        """Ask the defense itself."""
        return has(here, codes.invert(here, z, rows), y)

    def has(here: View, logits: Tensor, y: Labels) -> Tensor:
        return succeeded(here, logits, y) & (objective(here, logits.detach(), y, "margin") >= kappa)

    def missing(here: View, z: Images, y: Labels, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(here, Inversion)
        seen, hit = z.detach(), torch.zeros_like(rows, dtype=torch.bool)
        if not z.requires_grad:  # The last image of a search: nothing follows it.
            return torch.zeros_like(seen[:, 0, 0, 0]), won(here, seen, y, rows)
        # A search begins at the image itself: the code that another ended with says nothing of it.
        begins = (seen == x[rows]).flatten(1).all(1)
        due = (begins | (codes.age[rows] >= refresh)).nonzero().squeeze(1)
        hit[due] = won(here.select(due), seen[due], y[due], rows[due])
        logits = codes.follow(here, z, rows)
        promised = has(here, logits, y) & (codes.age[rows] > 0)
        near = threat.distance(x[rows].double(), seen.double()) < nearest.distance[rows]
        # What would not be kept tells of lambda only, and is not asked about.
        hit |= promised & ~near
        hopeful = (promised & near).nonzero().squeeze(1)
        hit[hopeful] = won(here.select(hopeful), seen[hopeful], y[hopeful], rows[hopeful])
        codes.age[rows] += 1
        # Codes that are held fixed have no graph, and Adam asks for a gradient.
        return margin_shortfall(here, logits, y, kappa) + 0 * z.flatten(1).sum(1), hit

    everyone = torch.arange(len(x), device=x.device)
    nearest.offer(everyone, x, won(view, x, y, everyone))
    search = PenaltySearch(searches, steps, lr, weight, variable, abort)
    broken = search.run(view, x, y, nearest, everyone[nearest.failed], missing)
    return nearest.crafted(flat=codes.flat, nonfinite=broken, inversions=codes.inversions)


class _Codes:
    """The codes of each example, (N, draws, ...), and how they follow its image."""

    def __init__(
        self, x: Images, noise: Randomness, *, backtracks: int, rate: float | None, draws: int, offset: float
    ) -> None:
        self._noise, self._backtracks, self._rate = noise, backtracks, rate
        self._draws, self._offset = draws, offset
        self._codes = self._rates = torch.empty(0)
        self.age = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        """How many images ago the defense inverted."""
        self.inversions = torch.zeros_like(self.age)
        self.flat = torch.zeros_like(self.age, dtype=torch.bool)

    def invert(self, view: Inversion, z: Images, rows: Tensor) -> Tensor:
        """Take the defense's own codes of images `z` of the examples `rows`; return their logits.

        With several draws they are (draws, n, K).
        """
        if len(rows) == 0:
            return z.new_empty(0, 2)
        found = torch.stack([view.invert(z).detach() for _ in range(self._draws)])
        images = self._copied(z)
        with torch.no_grad():
            logits = view.classify(found.flatten(0, 1), images)
        if self._offset:
            drawn = self._noise.select(rows).normal(tuple(found.transpose(0, 1).shape[1:]))
            found = found + self._offset * drawn.transpose(0, 1)
        if self._backtracks:
            rates = self._paces(view, found.flatten(0, 1), images, rows)
            self._rates = self._put(self._rates, rows, rates.view(self._draws, -1))
        self._codes = self._put(self._codes, rows, found)
        self.age[rows] = 0
        self.inversions[rows] += self._draws
        return self._by_draw(logits)

    def follow(self, view: Inversion, z: Images, rows: Tensor) -> Tensor:
        """Lead the codes to the images `z`; return their logits, with the gradient to `z`."""
        images = self._copied(z)
        found = self._codes[rows].transpose(0, 1)
        rates = self._rates[rows].T.flatten() if self._backtracks else z.new_empty(0)
        led = follow(view, found.flatten(0, 1), images, steps=self._backtracks, rates=rates)
        self._codes[rows] = led.detach().view_as(found).transpose(0, 1)
        return self._by_draw(view.classify(led, images))

    def _paces(self, view: Inversion, codes: Tensor, images: Images, rows: Tensor) -> Tensor:
        """Return the length of a step for each code, (draws * n,); 0 where nothing says how long."""
        if self._rate is not None:
            return torch.full_like(images[:, 0, 0, 0], self._rate)
        steepest = curvature(view, codes, images)
        flat = steepest < FLAT
        self.flat[rows] |= flat.view(self._draws, -1).any(0)
        return torch.where(flat, 0.0, 0.9 / steepest)

    def _put(self, kept: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """Return (N, draws, ...) with (draws, n, ...) values at `rows`."""
        if len(kept) == 0:
            kept = values.new_zeros(len(self.age), *values.transpose(0, 1).shape[1:])
        kept[rows] = values.transpose(0, 1)
        return kept

    def _copied(self, z: Images) -> Images:
        return z if self._draws == 1 else z.repeat(self._draws, 1, 1, 1)

    def _by_draw(self, logits: Tensor) -> Tensor:
        return logits if self._draws == 1 else logits.unflatten(0, (self._draws, -1))


def follow(view: Inversion, codes: Tensor, x: Images, *, steps: int, rates: Tensor) -> Tensor:
    """Return codes after some steps down the energy at images, with their gradient to these.

    From a solution they stay there, and carry the first `steps` terms, t = 0 to `steps` - 1 (D-37), of
    dz/dx = sum over t of A^t B, where A = I - rate d2E/dz2 and B = -rate d2E/dz dx.

    Args:
        view: What has the energy.
        codes: Where they begin, (N, ...); held fixed.
        x: The images (N, C, H, W).
        steps: How many steps they are led by.
        rates: How long each code's steps are, (N,).

    Returns:
        (N, ...).
    """
    z = codes.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = autograd.grad(view.energy(z, x).sum(), z, create_graph=True)
        z = z - by_example(rates, z) * slope
    return z


def curvature(view: Inversion, codes: Tensor, x: Images, *, turns: int = 20) -> Tensor:
    """Return the largest curvature of each example's energy at its code, by power iteration.

    It is that of the energy's own Hessian, as a view shows no generator: the Gauss-Newton one where the
    generator is piecewise linear. Every example starts from the same vector.

    Args:
        view: What has the energy.
        codes: The codes (N, ...).
        x: Their images (N, C, H, W).
        turns: How many turns are made.

    Returns:
        (N,), at least 0.
    """
    start = torch.randn(codes.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.enable_grad():
        z = codes.detach().requires_grad_()
        (slope,) = autograd.grad(view.energy(z, x.detach()).sum(), z, create_graph=True)
    return largest_curvature(slope, z, start.to(codes).expand_as(codes), turns=turns)

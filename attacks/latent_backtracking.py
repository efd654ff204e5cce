"""Latent backtracking (Chen, Xie and Zhu, theorem 1): a gradient through the inversion of a generator."""

import math
from typing import Any

import torch
from torch import Tensor, autograd

from attacks.common.best_so_far import NearestSuccess
from attacks.common.margins import lack
from attacks.common.penalty_search import PenaltySearch, Variable
from bench import (
    Crafted,
    Images,
    InputError,
    Inversion,
    Labels,
    Randomness,
    Shape,
    Threat,
    View,
    attack,
    objective,
    succeeded,
)

TURNS = 20
"""Of the power iteration."""

FLAT = 1e-12
"""A curvature below this is none: nothing says where the code would go."""


def _check(params: dict[str, Any], shape: Shape) -> None:
    for name in ("steps", "searches", "refresh", "draws"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {params[name]}")
    for name in ("backtracks", "offset", "kappa"):
        if not 0 <= params[name] < math.inf:
            raise InputError(f"{name} must be 0 or more, not {params[name]:g}")
    for name in ("rate", "lr", "weight"):
        if params[name] is not None and not 0 < params[name] < math.inf:
            raise InputError(f"{name} must be a number above 0, not {params[name]:g}")


def _doubts(threat: Threat, *, backtracks: int, **_: object) -> str | None:
    if backtracks == 0:
        return "with 0 backtracks codes are held fixed: a defense that sees nothing but them has no gradient"
    return None


@attack(
    "latent-backtracking",
    norms={"l2"},
    version=1,
    space="inversion",
    budget="distance",
    doubts=_doubts,
    check_params=_check,
)
def latent_backtracking(
    view: Inversion,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    backtracks: int = 20,
    rate: float | None = None,
    refresh: int = 10,
    steps: int = 100,
    searches: int = 5,
    weight: float = 1.0,
    lr: float = 0.01,
    kappa: float = 0.0,
    variable: Variable = "box",
    abort: bool = True,
    draws: int = 1,
    offset: float = 0.0,
) -> Crafted:
    """Minimise |z - x|^2 + lambda * max(kappa - margin, 0), where the margin follows the code of `z`.

    The code is led `backtracks` steps down the energy at the present image, and the gradient goes through
    these steps. They are of length `rate`, or 0.9 over the energy's largest curvature there, for each
    example. The code that they end at, held fixed, is where the next image's begin; the defense's own
    inversion takes its place every `refresh` images, and wherever it promises a nearer success. A success
    is one of the defense itself: by an inversion of that image. With `draws`, every inversion is made as
    often, margins are averaged over them, and a success is one of the mean logits. `offset` is the
    deviation of noise on each code from an inversion.

    lambda starts at `weight` and is found for each example by `searches` of a binary search, each of
    `steps` steps of Adam on the pixels, or through tanh (`variable`).

    Notes: ``failed``; ``flat``, where the energy had no curvature at a code, so that it was held fixed;
    ``nonfinite``, where a gradient was not finite; ``inversions``, how often the defense inverted.
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
        hit[due] = won(here.take(due), seen[due], y[due], rows[due])
        logits = codes.follow(here, z, rows)
        promised = has(here, logits, y) & (codes.age[rows] > 0)
        near = threat.distance(x[rows].double(), seen.double()) < nearest.distance[rows]
        # What would not be kept tells of lambda only, and is not asked about.
        hit |= promised & ~near
        hopeful = (promised & near).nonzero().squeeze(1)
        hit[hopeful] = won(here.take(hopeful), seen[hopeful], y[hopeful], rows[hopeful])
        codes.age[rows] += 1
        # Codes that are held fixed have no graph, and Adam asks for a gradient.
        return lack(here, logits, y, kappa) + 0 * z.flatten(1).sum(1), hit

    everyone = torch.arange(len(x), device=x.device)
    nearest.offer(everyone, x, won(view, x, y, everyone))
    descent = PenaltySearch(searches, steps, lr, weight, variable, abort)
    broken = descent.run(view, x, y, nearest, everyone[nearest.failed], missing)
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
            drawn = self._noise.take(rows).normal(tuple(found.transpose(0, 1).shape[1:]))
            found = found + self._offset * drawn.transpose(0, 1)
        if self._backtracks:
            rates = self._paces(view, found.flatten(0, 1), images, rows)
            self._rates = self._put(self._rates, rows, rates.view(self._draws, -1))
        self._codes = self._put(self._codes, rows, found)
        self.age[rows] = 0
        self.inversions[rows] += self._draws
        return self._apart(logits)

    def follow(self, view: Inversion, z: Images, rows: Tensor) -> Tensor:
        """Lead the codes to the images `z`; return their logits, with the gradient to `z`."""
        images = self._copied(z)
        found = self._codes[rows].transpose(0, 1)
        rates = self._rates[rows].T.flatten() if self._backtracks else z.new_empty(0)
        led = follow(view, found.flatten(0, 1), images, steps=self._backtracks, rates=rates)
        self._codes[rows] = led.detach().view_as(found).transpose(0, 1)
        return self._apart(view.classify(led, images))

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

    def _apart(self, logits: Tensor) -> Tensor:
        return logits if self._draws == 1 else logits.unflatten(0, (self._draws, -1))


def follow(view: Inversion, codes: Tensor, x: Images, *, steps: int, rates: Tensor) -> Tensor:
    """Return codes (N, ...) after `steps` steps down the energy at images `x`, with their gradient to `x`.

    From a solution they stay there, and carry the first `steps` terms, t = 0 to `steps` - 1 (D-37), of
    dz/dx = sum over t of A^t B, where A = I - rate d2E/dz2 and B = -rate d2E/dz dx. `rates` (N,).
    """
    z = codes.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = autograd.grad(view.energy(z, x).sum(), z, create_graph=True)
        z = z - rates.view(-1, *[1] * (z.dim() - 1)) * slope
    return z


def curvature(view: Inversion, codes: Tensor, x: Images, *, turns: int = TURNS) -> Tensor:
    """Return the largest curvature of each example's energy at its code, (N,), by power iteration.

    Of the energy's own Hessian, as a view shows no generator; it is the Gauss-Newton one where the
    generator is piecewise linear. Every example starts from the same vector.
    """
    start = torch.randn(codes.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(codes).expand_as(codes)
    with torch.enable_grad():
        z = codes.detach().requires_grad_()
        (slope,) = autograd.grad(view.energy(z, x.detach()).sum(), z, create_graph=True)
    length: Tensor = torch.linalg.vector_norm(vector.flatten(1), dim=1)
    # One turn more: the first makes the start a direction.
    for _ in range(turns + 1):
        unit = length.clamp_min(torch.finfo(length.dtype).tiny).view(-1, *[1] * (z.dim() - 1))
        (vector,) = autograd.grad(slope, z, vector / unit, retain_graph=True)
        length = torch.linalg.vector_norm(vector.flatten(1), dim=1)
    return length

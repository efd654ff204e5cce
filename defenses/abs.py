"""ABS: analysis by synthesis, by an autoencoder for each class (Schott et al. 2018, arXiv:1805.09190)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, autograd, nn
from torch.optim import Adam

from bench import (
    ContentPath,
    Count,
    Decision,
    Explained,
    Fitting,
    Images,
    InputError,
    Inversion,
    NonNegative,
    NonNegativeCount,
    Positive,
    Prototypes,
    Shape,
    Split,
    View,
    defense,
    view,
)
from defenses.nets.abs import architectures, autoencoders, decoders, released

MULTIPLIERS = (1.0, 0.96, 1.001, 1.06, 0.98, 0.96, 1.03, 1.0, 1.0, 1.0)
"""Of Binary ABS, for the ten digits: what each class's objective is multiplied by (D-32)."""

SHARPNESS, FLOOR = 440.0, 3.9e-5
"""Constants of the confidence, those of the released class (D-30)."""

SEED = 1234
"""Of the latents that every search begins from."""

CPU_ROWS, GPU_ROWS = 128, 8192
"""How many codes (images times classes) are decoded at once, unless a model's `rows` says otherwise. On a
CPU more gain nothing; autograd holds some 8 MB for them with the official decoder, eight times that with
the other."""


def check_params(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the data does not fit the autoencoders, or a released file the settings.

    Args:
        params: the parameters of `abs`, defaults filled in, with absolute paths.
        shape: channels, height, width and classes of the data.
    """
    architectures.check_shape(params["architecture"], shape)
    if params["decoders"] is None:
        return
    for name, value in (("architecture", "official"), ("latent", architectures.LATENT), ("width", 1)):
        if params[name] != value:
            raise InputError(f"decoders: the released files need {name}: {value}, found {params[name]}")
    for file in released.released(params["decoders"], shape.classes):
        released.decoder_state(file, shape.channels)


class Found(NamedTuple):
    """What explains each image best, class by class."""

    codes: Tensor
    """(N, K, latent)."""
    losses: Tensor
    """(N, K): the objective there."""


class Grid(NamedTuple):
    """The latents that every search begins from, and what each class draws of them."""

    key: tuple[object, ...]
    """What it was made of: with other weights it is made anew."""
    codes: Tensor
    """(G, latent)."""
    images: Tensor
    """(K, G, D)."""
    squares: Tensor
    """(K, G): the squared length of each image."""


@defense(
    "abs",
    readouts=("label",),
    inference=("grid", "steps", "rate", "radius", "clip", "keep", "objective", "binary"),
    version=1,
    check_params=check_params,
)
class Abs(nn.Module):
    """An image is of the class whose decoder draws it best: logits are -min_z l_c(z; x).

    l_c(z; x) = (|x - G_c(z)|^2 + `beta` |z|^2 / 2) / D for D values of an image. The search for z begins at
    the best of `grid` latents, the same for all images and classes; `steps` updates by Adam follow, each
    clipped to a sphere.

    Each class's autoencoder is trained on its own images to maximise the evidence lower bound with a squared
    distance, by Adam. That training is not published; `epochs` and `batch` give on MNIST the 29,000
    iterations that the released files count.

    Source: Schott et al. 2018, arXiv:1805.09190, sections 3 and 4; the authors' code; for `supplement` the
    supplement of Chen, Xie and Zhu.

    Args:
        shape: channels, height, width and classes of the data.
        architecture: of the autoencoders: ``official`` as released, for 28x28, or ``supplement`` of the
            study that attacks ABS, for 32x32.
        latent: dimensions of a code, 1 or more.
        width: factor of the number of channels, above 0.
        epochs: passes over the training images of the largest class, 1 or more.
        batch: images of each class in a step, 1 or more.
        lr: learning rate of the training, above 0.
        beta: weight of the divergence in training and of |z|^2 / 2 in the search, 0 or more.
        decoders: the authors' files, one for each class in its order; nothing is trained then.
        grid: latents that a search may begin from, 1 or more.
        steps: updates of the search, 0 or more; with 0 the best of the grid is taken.
        rate: rate of Adam in the search, above 0.
        radius: of the sphere that codes are clipped to, above 0.
        clip: ``fixed``, or ``released`` with the lost sign of the released code (D-31).
        keep: ``last`` scores the last code of the search, as released; ``best`` the best of all.
        objective: ``elbo``, or ``reconstruction`` without the term of |z|^2, in inference only (D-33).
        binary: show images to the autoencoders as 0 and 1, by a threshold at 0.5, and on ten classes weigh
            their objectives (`MULTIPLIERS`, D-32): Binary ABS.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        architecture: architectures.Architecture = "official",
        latent: Count = architectures.LATENT,
        width: Positive = 1.0,
        epochs: Count = 274,
        batch: Count = 64,
        lr: Positive = 1e-3,
        beta: NonNegative = 1.0,
        decoders: tuple[ContentPath, ...] | None = None,
        grid: Count = 8000,
        steps: NonNegativeCount = 49,
        rate: Positive = 0.05,
        radius: Positive = 5.0,
        clip: Literal["fixed", "released"] = "fixed",
        keep: Literal["last", "best"] = "last",
        objective: Literal["elbo", "reconstruction"] = "elbo",
        binary: bool = False,
    ) -> None:
        super().__init__()
        self.networks = autoencoders.Autoencoders(
            shape, architecture, latent=latent, width=width, encode=decoders is None
        )
        self.classes, self.latent = shape.classes, latent
        self.epochs, self.batch, self.lr, self.beta = epochs, batch, lr, beta
        self.decoders = None if decoders is None else released.released(decoders, shape.classes)
        self.grid, self.steps, self.rate, self.radius = grid, steps, rate, radius
        self.clip, self.keep, self.objective, self.binary = clip, keep, objective, binary
        self.rows: int | None = None
        """How many codes are decoded at once; None: `CPU_ROWS` or `GPU_ROWS`. Changes no result."""
        # An attribute, and no buffer: it is made of the weights, and is no weight itself.
        self._grid: Grid | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images of the grid behind: a copy makes its own."""
        return {**self.__dict__, "_grid": None}

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train the autoencoders side by side, each on its class, or load the released decoders.

        An epoch shows every image once; a class with fewer images than the largest shows some again.

        Args:
            train: the training images.
            fitting: epochs and notes.

        Raises:
            InputError: a class has no training image.
        """
        if self.decoders is not None:
            for sentence in self.networks.fill(self.decoders):
                fitting.note(sentence)
            self.eval()
            return
        members = [(train.labels == number).nonzero().flatten() for number in range(self.classes)]
        for number, rows in enumerate(members):
            if len(rows) == 0:
                raise InputError(
                    f"abs: class {number} has no training image, and needs some for its autoencoder; "
                    "take more training images"
                )
        optimiser = Adam(self.parameters(), lr=self.lr)
        steps = math.ceil(max(map(len, members)) / self.batch)
        self.train()
        for epoch in fitting.epochs(self.epochs, self, optimiser):
            orders = [rows[torch.randperm(len(rows))] for rows in members]
            for step in range(steps):
                place = torch.arange(step * self.batch, (step + 1) * self.batch)
                picks = torch.stack([order[place % len(order)] for order in orders], dim=1)
                noise = torch.randn(self.batch, self.classes, self.latent)
                optimiser.zero_grad()
                loss = self._learn(train.images[picks].to(fitting.device), noise.to(fitting.device))
                optimiser.step()
                epoch.report(loss)
        self.eval()

    def _learn(self, x: Tensor, noise: Tensor) -> Tensor:
        """Add up the gradients of a batch (N, K, C, H, W); return its mean loss per pixel."""
        total = torch.zeros((), device=x.device)
        # A block holds all images of its classes, so that normalisation sees a whole batch.
        wide = max(1, self._rows(x) // len(x))
        for left in range(0, self.classes, wide):
            classes = slice(left, min(left + wide, self.classes))
            losses = self.networks.losses(x[:, classes], noise[:, classes], classes, beta=self.beta)
            # The mean over images, the sum over classes, whose weights are not shared.
            loss = losses.mean(0).sum()
            loss.backward()
            total += loss.detach()
        return total / (self.classes * x[0, 0].numel())

    @view("envelope", exact_for=("label",))
    def envelope(self, *, steps: NonNegativeCount | None = None, scale: float = 1.0) -> View:
        """Return the view of the logits with the gradient of the minimum by the envelope theorem.

        The gradient is that of the objective with the code held fixed, -2 (x - G_c(z)) / D, which is exact
        where z is a minimum. With `binary` it goes straight through the threshold.

        Args:
            steps: how long the attacker searches for the code, with the correct clip whatever the defender's,
                0 or more; None takes the defender's own code.
            scale: factor of the logits, which are of the order of 0.01: 440, the sharpness of the confidence,
                makes cross-entropies of them, D squared distances.
        """

        def logits(x: Images) -> Tensor:
            shown = self._shown(x.detach())
            if not (torch.is_grad_enabled() and x.requires_grad):
                return scale * self._scored(self.search(shown).losses)
            found, sought = self._both(shown, steps)
            slopes = (-2 * scale / x[0].numel()) * (shown[:, None] - self._drawn(sought.codes))
            slopes *= self._multipliers(x)[:, None, None, None]
            return _Sloped.apply(x, scale * self._scored(found.losses), slopes)  # type: ignore[no-any-return]

        return View(logits)

    @view("backtrack", exact_for=("label",))
    def backtrack(
        self, *, steps: NonNegativeCount = 10, rate: Positive | None = None, scale: float = 1.0
    ) -> View:
        """Return the view of the logits with a gradient through some steps of the search.

        From the defender's own code, held fixed, steps of gradient descent follow, without clip or momentum,
        and the objective there is differentiated, the way through the code included. Source: Chen, Xie and
        Zhu, theorem 1.

        Args:
            steps: steps of descent, 0 or more; with 0 the view is `envelope`.
            rate: rate of the descent, above 0; None takes 0.9 / lambda_max of each image and class, by power
                iteration on the Gauss-Newton Hessian.
            scale: factor of the logits, see `envelope`.
        """

        def logits(x: Images) -> Tensor:
            shown = self._shown(x.detach())
            found = self.search(shown)
            values = scale * self._scored(found.losses)
            if not (torch.is_grad_enabled() and x.requires_grad):
                return values
            slopes = self._backtracked(shown, found.codes, steps, rate)
            slopes *= -scale * self._multipliers(x)[:, None, None, None]
            return _Sloped.apply(x, values, slopes)  # type: ignore[no-any-return]

        return View(logits)

    @view("inversion", space="inversion", exact_for=("label",))
    def inversion(self, *, scale: float = 1.0) -> View:
        """Return the view of the codes (N, K, latent), one of each class, and of the logits that they earn.

        The energy is the objective summed over classes. Points are images, with the logits of `envelope`.

        Args:
            scale: factor of the logits, see `envelope`.
        """
        return Inversion(
            self.envelope(scale=scale).logits,
            invert=lambda x: self.search(self._shown(x.detach())).codes,
            energy=lambda codes, x: self._objectives(codes, self._through(x)).sum(1),
            classify=lambda codes, x: scale * self._scored(self._objectives(codes, self._through(x))),
        )

    @view("prototypes", space="prototypes", exact_for=("label",))
    def prototypes(self) -> View:
        """Return the view of what each class draws of an image (N, K, C, H, W), with `envelope`'s logits."""

        def explained(x: Images) -> Explained:
            found = self.search(self._shown(x.detach()))
            return Explained(self._scored(found.losses), self._drawn(found.codes))

        return Prototypes(self.envelope().logits, explained=explained)

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the logits' arg-max, scored by its confidence.

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``label``, the only one.
        """
        logits = self._scored(self.search(self._shown(x)).losses)
        return Decision.of(logits)._replace(score=confidences(logits).amax(1))

    def search(
        self, shown: Images, *, clip: Literal["fixed", "released"] | None = None, steps: int | None = None
    ) -> Found:
        """Return the codes that the search ends at, and the objective there, without gradients.

        Args:
            shown: what the autoencoders see, (N, C, H, W) in [0, 1].
            clip: how codes are clipped; None takes the defender's own.
            steps: updates of the search, 0 or more; None takes the defender's own.
        """
        (found,) = self._search(shown, (self.steps if steps is None else steps,), clip or self.clip)
        return found

    def _both(self, shown: Images, steps: int | None) -> tuple[Found, Found]:
        """Return what the defender finds, and what an attacker finds who searches for `steps` steps."""
        if steps is None:
            found = self.search(shown)
            return found, found
        if self.clip != "fixed":
            return self.search(shown), self.search(shown, clip="fixed", steps=steps)
        # One search passes through both ends.
        ends = sorted({self.steps, steps})
        by_end = dict(zip(ends, self._search(shown, ends, "fixed"), strict=True))
        return by_end[self.steps], by_end[steps]

    @torch.no_grad()
    def _search(self, shown: Images, ends: Sequence[int], clip: Literal["fixed", "released"]) -> list[Found]:
        """Search for max(`ends`) steps; return what is found after each of `ends`, in ascending order."""
        network = self.networks.folded()
        found = [Found(codes := self._nearest(network, shown), codes.new_empty(codes.shape[:2]))]
        found += [Found(codes.clone(), codes.new_empty(codes.shape[:2])) for _ in ends[1:]]
        for rows, classes in self._blocks(shown):
            parts = self._descend(network, shown[rows], codes[rows, classes], classes, ends, clip)
            for whole, part in zip(found, parts, strict=True):
                whole.codes[rows, classes] = part.codes
                whole.losses[rows, classes] = part.losses
        return found

    def _descend(
        self,
        network: decoders.Folded,
        shown: Images,
        codes: Tensor,
        classes: slice,
        ends: Sequence[int],
        clip: Literal["fixed", "released"],
    ) -> list[Found]:
        """Run Adam from `codes` (N, G, latent), each image and class for itself."""
        found = []
        best: Found | None = None
        first, second = torch.zeros_like(codes), torch.zeros_like(codes)
        for step in range(ends[-1] + 1):
            last = step == ends[-1]
            with torch.set_grad_enabled(not last):
                z = codes.detach().requires_grad_(not last)
                drawn = network(z, classes)
            here = Found(codes, self._objective(drawn.detach(), codes, shown[:, None]))
            if best is None or self.keep == "last":
                best = here
            else:
                better = here.losses < best.losses
                best = Found(
                    torch.where(better[..., None], here.codes, best.codes),
                    torch.where(better, here.losses, best.losses),
                )
            if step in ends:
                found.append(best)
            if not last:
                # The objective's own gradient, by hand; the decoder's, by autograd.
                outer = (drawn.detach() - shown[:, None]) * (2 / shown[0].numel())
                (gradient,) = autograd.grad(drawn, z, outer)
                gradient = gradient.add(codes, alpha=self._weight / shown[0].numel())
                first = first.lerp(gradient, 0.1)
                second = second.mul(0.999).addcmul_(gradient, gradient, value=0.001)
                size = (second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                codes = codes.addcdiv(first, size, value=-self.rate / (1 - 0.9 ** (step + 1)))
                codes = clipped(codes, self.radius, clip)
        return found

    def _nearest(self, network: decoders.Folded, shown: Images) -> Tensor:
        """Return the latent of the grid with the least objective, (N, K, latent)."""
        grid = self._prepared(network)
        flat = shown.flatten(1)
        level = grid.squares + self._weight / 2 * grid.codes.square().sum(1)
        best = torch.empty(len(flat), self.classes, dtype=torch.int64, device=flat.device)
        for rows, classes in decoders.blocks(len(flat), self.classes, max(1, NEAREST // len(grid.codes))):
            for number in range(classes.start, classes.stop):
                scores = distances(flat[rows], grid.images[number], level[number])
                best[rows, number] = scores.argmin(1)
        return grid.codes[best]

    def _prepared(self, network: decoders.Folded) -> Grid:
        """Return the grid and its images, made anew after a change of weights, device or `grid`."""
        weights = (*network.weights, *network.biases)
        # Class by class, so that decoders that change places are seen.
        flat = [each.flatten(1) for each in weights]
        sums = [each.sum(1, dtype=torch.float64) for each in flat]
        sizes = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in flat]
        made_of = torch.cat([*sums, *sizes]).tolist()
        key = (self.grid, weights[0].device, weights[0].dtype, *made_of)
        if self._grid is None or self._grid.key != key:
            # The old one goes first: both together may not fit.
            self._grid = None
            codes = latents(self.grid, self.latent).to(weights[0])
            blocks = self._blocks(codes)
            images: Tensor | None = None
            for rows, classes in blocks:
                count = classes.stop - classes.start
                drawn = network(codes[rows, None].expand(-1, count, -1), classes).flatten(2)
                if images is None:
                    images = drawn.new_empty(self.classes, len(codes), drawn.shape[2])
                images[classes, rows] = drawn.transpose(0, 1)
            assert images is not None
            self._grid = Grid(key, codes, images, torch.linalg.vector_norm(images, dim=2).square())
        return self._grid

    def _backtracked(self, shown: Images, codes: Tensor, steps: int, rate: float | None) -> Tensor:
        """Return the gradients of the objectives through `steps` steps of the search, (N, K, C, H, W)."""
        network = self.networks.folded()
        slopes = shown.new_empty(len(shown), self.classes, *shown.shape[1:])
        for rows, classes in self._blocks(shown):
            z = codes[rows, classes]
            pace = self._paces(network, z, classes) if rate is None else rate
            with torch.enable_grad():
                x = shown[rows, None].repeat(1, z.shape[1], 1, 1, 1).requires_grad_()
                z = z.requires_grad_()
                for _ in range(steps):
                    losses = self._objective(network(z, classes), z, x)
                    (gradient,) = autograd.grad(losses.sum(), z, create_graph=True)
                    z = z - pace * gradient
                losses = self._objective(network(z, classes), z, x)
                (slopes[rows, classes],) = autograd.grad(losses.sum(), x)
        return slopes

    def _paces(self, network: decoders.Folded, codes: Tensor, classes: slice) -> Tensor:
        """Return 0.9 / lambda_max of each image's and class's objective, (N, G, 1); 0 where G_c is flat."""
        with torch.enable_grad():
            z = codes.detach().requires_grad_()
            images = network(z, classes)
            probe = torch.zeros_like(images, requires_grad=True)
            (pulled,) = autograd.grad(images, z, probe, create_graph=True)
        # The same start everywhere: an image's pace depends on nobody else.
        start = torch.randn(self.latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vector = (start / start.norm()).to(codes).expand_as(codes)
        curvature = torch.zeros_like(codes[..., :1])
        for _ in range(POWER):
            (pushed,) = autograd.grad(pulled, probe, vector, retain_graph=True)
            (product,) = autograd.grad(images, z, pushed, retain_graph=True)
            curvature = product.norm(dim=2, keepdim=True)
            vector = product / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
        largest = (2 * curvature + self._weight) / images[0, 0].numel()
        return torch.where(curvature < 1e-12, 0.0, 0.9 / largest)

    @torch.no_grad()
    def _drawn(self, codes: Tensor) -> Tensor:
        """Return the images (N, K, C, H, W) of codes (N, K, latent)."""
        network = self.networks.folded()
        parts: dict[int, list[Tensor]] = {}
        for rows, classes in self._blocks(codes):
            parts.setdefault(rows.start, []).append(network(codes[rows, classes], classes))
        return torch.cat([torch.cat(each, dim=1) for each in parts.values()])

    def _objectives(self, codes: Tensor, x: Images) -> Tensor:
        """Return the objective (N, K) of codes of all classes, differentiable in both."""
        drawn = self.networks.folded()(codes, slice(0, self.classes))
        return self._objective(drawn, codes, x[:, None])

    def _objective(self, drawn: Tensor, codes: Tensor, x: Tensor) -> Tensor:
        """Return (|x - G(z)|^2 + beta |z|^2 / 2) / D, (N, G)."""
        distance = (x - drawn).square().flatten(2).sum(2)
        losses: Tensor = (distance + self._weight / 2 * codes.square().sum(2)) / drawn[0, 0].numel()
        return losses

    @property
    def _weight(self) -> float:
        return self.beta if self.objective == "elbo" else 0.0

    def _scored(self, losses: Tensor) -> Tensor:
        """Return logits of objectives, (N, K)."""
        return -losses * self._multipliers(losses)

    def _multipliers(self, like: Tensor) -> Tensor:
        weighed = self.binary and self.classes == len(MULTIPLIERS)
        return like.new_tensor(MULTIPLIERS) if weighed else like.new_ones(self.classes)

    def _shown(self, x: Images) -> Images:
        """Return what the autoencoders see."""
        return (x >= 0.5).to(x.dtype) if self.binary else x

    def _through(self, x: Images) -> Images:
        """Return the same, with a gradient straight through the threshold."""
        return x + (self._shown(x) - x).detach() if self.binary else x

    def _blocks(self, like: Tensor) -> Iterator[tuple[slice, slice]]:
        """Cut what is asked of all classes into what is decoded at once."""
        return decoders.blocks(len(like), self.classes, self._rows(like))

    def _rows(self, like: Tensor) -> int:
        return self.rows or (CPU_ROWS if like.device.type == "cpu" else GPU_ROWS)


NEAREST = 1 << 22
"""How many distances between images and latents are held at once: 16 MB."""

POWER = 20
"""Steps of the power iteration."""


class _Sloped(autograd.Function):
    """Logits (N, K) that were computed without autograd, and their gradients (N, K, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Images, values: Tensor, slopes: Tensor) -> Tensor:
        """Return the values."""
        ctx.save_for_backward(slopes)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return what the slopes make of the logits' gradient."""
        (slopes,) = ctx.saved_tensors
        return torch.einsum("nk,nkchw->nchw", gradients[0], slopes), None, None


def distances(x: Tensor, images: Tensor, squares: Tensor) -> Tensor:
    """Return squared distances |x - r|^2 as |x|^2 + |r|^2 - 2 x.r, (N, G).

    Args:
        x: flat images (N, D).
        images: flat images r (G, D).
        squares: |r|^2, (G,); terms of the objective that belong to r alone may be added.
    """
    return torch.addmm(squares, x, images.T, alpha=-2).add_(x.square().sum(1)[:, None])


def latents(count: int, size: int) -> Tensor:
    """Return `count` latents (count, size) in float64: of count / 0.9 draws of N(0, I), the most likely.

    They are those of the released code with numpy's old generator seeded by 1234. The density of N(0, I)
    falls with the norm, so that the least likely are the longest; their order stays that of the draws.

    Args:
        count: number of latents, 1 or more.
        size: dimensions of a latent, 1 or more.
    """
    drawn = np.random.RandomState(SEED).standard_normal((int(count / (1.0 - 0.1)), size))
    lengths = np.square(drawn).sum(1)
    return torch.from_numpy(drawn[lengths <= np.sort(lengths)[count - 1]])


def clipped(codes: Tensor, radius: float, clip: Literal["fixed", "released"] = "fixed") -> Tensor:
    """Return codes with those beyond a sphere drawn back to it.

    Args:
        codes: codes (..., latent).
        radius: of the sphere, above 0.
        clip: ``fixed``, or ``released``: as sqrt(z^2 radius^2 / |z|^2), which loses the signs of what it
            clips (D-31).
    """
    lengths: Tensor = torch.linalg.vector_norm(codes, dim=-1, keepdim=True)
    if clip == "released":
        return torch.where(lengths > radius, codes.abs() * (radius / lengths), codes)
    return codes * (radius / lengths).clamp_max(1)


def confidences(logits: Tensor) -> Tensor:
    """Return (exp(a l_c) + e) / sum over classes of the same, (N, K); a = 440, e = 3.9e-5 (D-30).

    It is computed in float64: below -0.06 a float32 would lose the first term in the second.

    Args:
        logits: logits (N, K).
    """
    weights = (SHARPNESS * logits.double()).exp() + FLOOR
    shares: Tensor = (weights / weights.sum(1, keepdim=True)).to(logits.dtype)
    return shares

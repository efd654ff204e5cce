"""Defense-GAN: classify what a generator draws of an image (Samangouei et al. 2018, arXiv:1805.06605)."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from bench import (
    Decision,
    Fitting,
    Images,
    InputError,
    Inversion,
    Labels,
    Part,
    Shape,
    Split,
    View,
    defense,
    view,
    view_of,
)
from defenses.nets.common import straight
from defenses.nets.defensegan import classifiers, gan
from defenses.nets.defensegan.projection import Descent, Keep, Projection, backtrack, curvature, project
from defenses.nets.training import frozen

BETAS = (0.5, 0.9)
"""Adam's decay rates when the GAN is trained."""

PORTIONS = 20
"""Into how many parts the projection of the training images is cut; a kill loses one at most."""

SERVED = ("restarts", "steps", "lr", "momentum", "decay", "keep", "spread", "starts")
"""The parameters of the projection, which training the GAN does not depend on."""


def fits(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where networks, training or projection cannot be as asked."""
    gan.check(params["architecture"], shape, latent=params["latent"], width=params["width"])
    for name in ("restarts", "steps", "iterations", "critic_steps", "batch", "classifier_epochs"):
        if params[name] < 1:
            raise InputError(f"{name} must be 1 or more, found {params[name]}")
    for name in ("lr", "gan_lr", "classifier_lr", "net_width"):
        if not 0 < params[name] < math.inf:
            raise InputError(f"{name} must be above 0, found {params[name]:g}")
    if not 0 <= params["momentum"] < 1:
        raise InputError(f"momentum must be at least 0 and below 1, found {params['momentum']:g}")
    if not params["penalty"] >= 0:
        raise InputError(f"penalty must not be negative, found {params['penalty']:g}")
    if params["classifier"] is not None and params["trained_on"] == "reconstructions":
        raise InputError(
            "trained_on: reconstructions is for the defense's own net, and classifier names another defense, "
            "which is taken as it is"
        )


@defense(
    "defensegan",
    readouts=("label",),
    served=SERVED,
    random=lambda params: bool(params["starts"] == "fresh"),
    version=1,
    aliases={"logits": "bpda"},
    check=fits,
)
class DefenseGan(nn.Module):
    """A classifier that sees G(z*) in the place of x, where z* = argmin ||G(z) - x||^2.

    G is the generator of a WGAN with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028), trained
    for `iterations` steps of the generator, each before `critic_steps` steps of the critic; every one of
    these sees a new `batch`. `architecture` is the released code's, for 28x28, or that of the supplement
    of Chen, Xie and Zhu, for 32x32. `generator` takes that of another `defensegan` of the suite.

    z* is sought by `steps` gradient steps with `momentum` from each of `restarts` starts (`project` says
    on what): all may be served with other values than trained. Starts are drawn anew at each question
    (`starts: fresh`, as released: the answers are random), or are the same for every image and question
    (``fixed``): then the answer is a function of the image. Their spread is sqrt(1 / latent) as
    released, or 1 as the latents that the GAN is trained on (D-27). `keep: best` takes the best point of all;
    ``released`` is without the last step and without a memory.

    The classifier is the defense's own `net`, trained on the originals, or on the generator's
    reconstructions of them; or it is any other defense of the suite, by the view `through`.

    Defaults are the released code's for MNIST, whose generator is trained on the first 50,000 images.
    """

    seed: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        architecture: gan.Architecture = "released",
        latent: int = 128,
        width: float = 1.0,
        generator: Part | None = None,
        iterations: int = 200_000,
        critic_steps: int = 5,
        penalty: float = 10.0,
        gan_lr: float = 1e-4,
        batch: int = 50,
        classifier: Part | None = None,
        through: str = "logits",
        net: classifiers.Letter = "A",
        net_width: float = 1.0,
        trained_on: Literal["originals", "reconstructions"] = "originals",
        classifier_epochs: int = 10,
        classifier_lr: float = 1e-3,
        restarts: int = 10,
        steps: int = 200,
        lr: float = 10.0,
        momentum: float = 0.7,
        decay: bool = False,
        keep: Keep = "best",
        spread: Literal["released", "prior"] = "released",
        starts: Literal["fresh", "fixed"] = "fresh",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.form = {"architecture": architecture, "latent": latent, "width": width}
        self.architecture, self.latent, self.width = architecture, latent, width
        self.iterations, self.critic_steps, self.penalty = iterations, critic_steps, penalty
        self.gan_lr, self.batch = gan_lr, batch
        self.trained_on = trained_on
        self.classifier_epochs, self.classifier_lr = classifier_epochs, classifier_lr
        self.restarts, self.starts = restarts, starts
        self.spread = 1.0 if spread == "prior" else latent**-0.5
        self.descent = Descent(steps, lr, momentum, decay, keep)
        self.rows: int | None = None
        """Points that pass the generator at once; None: what `ROWS` says for the device."""
        self.taken = generator is not None
        self.generator = (
            gan.generator(architecture, shape.channels, latent=latent, width=width)
            if generator is None
            else self._generator_of(generator)
        )
        self.through: str | None = None
        if classifier is None:
            self.classifier: nn.Module = classifiers.build(net, shape, width=net_width)
        else:
            assert isinstance(classifier, nn.Module)
            self.classifier, self.through = classifier, through
            self._surface()
        # The starts themselves are not kept, so that any number of them may be served.
        self.register_buffer("seed", torch.randint(2**31, ()))

    def _generator_of(self, other: object) -> nn.Sequential:
        """Return the generator of another `DefenseGan`."""
        if not isinstance(other, DefenseGan):
            raise InputError(f"generator: expected another defensegan, found a {type(other).__name__}")
        for name, value in self.form.items():
            if (found := other.form[name]) != value:
                raise InputError(f"{name} is {value}, but that of the generator's own defense is {found}")
        if other.shape[:3] != self.shape[:3]:
            raise InputError(
                f"generator: expected one of images {tuple(self.shape[:3])}, found {tuple(other.shape[:3])}"
            )
        return other.generator

    def _surface(self) -> Callable[[Images], Tensor]:
        """Return what gives the classifier's logits (N, K) for images."""
        if self.through is None:
            return self.classifier
        try:
            seen = view_of(self.classifier, self.through)
        except InputError as error:
            raise InputError(f"classifier, through: {error}") from None
        if isinstance(seen, Inversion) or seen.encode is not View.encode:
            raise InputError(f"through: expected a view of pixels, found {self.through!r}, one of codes")
        if seen.refusal:
            raise InputError(
                f"through: the view {self.through!r} has a column for refusals, which is no class"
            )
        return seen.logits

    # --- training ------------------------------------------------------------------------------------

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Train the generator, unless it was taken; then the classifier, unless that is another defense."""
        if not self.taken:
            self._fit_generator(fitting)
        if self.through is None:
            drawn = None
            if self.trained_on == "reconstructions":
                drawn = self._reconstructions(train, fitting)
            self._fit_classifier(train, drawn, fitting)
        self.eval()

    def _fit_generator(self, fitting: Fitting) -> None:
        """Train generator and critic; the critic is not kept. What is reported is the critic's loss."""
        critic = gan.critic(self.architecture, self.shape.channels, width=self.width).to(fitting.device)
        if fitting.device.type == "cpu":
            critic.to(memory_format=torch.channels_last)
        both = nn.ModuleDict({"generator": self.generator, "critic": critic}).train()
        of_generator, of_critic = (
            Adam(network.parameters(), self.gan_lr, BETAS) for network in (self.generator, critic)
        )
        steps = fitting.steps(self.batch, drop_last=True)
        total = self.iterations * self.critic_steps
        for epoch in fitting.epochs(math.ceil(total / steps), both, of_generator, of_critic):
            batches = epoch.batches(self.batch, drop_last=True)
            for step, (x, _, _) in zip(range(epoch.number * steps, total), batches, strict=False):
                if step % self.critic_steps == 0:
                    _descend(of_generator, -critic(self._fakes(x)).mean())
                with torch.no_grad():
                    fake = self._fakes(x)
                along = torch.rand(len(x), 1, 1, 1, device=x.device)
                real = gan.native(self.architecture, x)
                loss = gan.critic_loss(critic, real, fake, along, self.penalty)
                _descend(of_critic, loss)
                epoch.report(loss.detach())

    def _fakes(self, x: Images) -> Tensor:
        """Return as many images of the generator as `x` has, in the critic's units."""
        z = torch.randn(len(x), self.latent, device=x.device)
        return gan.native(self.architecture, self.generator(z))

    def _reconstructions(self, train: Split, fitting: Fitting) -> Images:
        """Return what the generator draws of the training images, (N, C, H, W); reports their errors.

        The images are done in portions, an epoch each, so that a killed training goes on where it was.
        """
        drawn = _Drawn(train.images.to(fitting.device))
        size = math.ceil(len(train) / PORTIONS)
        for epoch in fitting.epochs(math.ceil(len(train) / size), drawn):
            rows = slice(epoch.number * size, (epoch.number + 1) * size)
            found = self.project(drawn.images[rows])
            drawn.images[rows] = self._draw(found.latent)
            epoch.report(found.error.mean())
        return drawn.images

    def _fit_classifier(self, train: Split, drawn: Images | None, fitting: Fitting) -> None:
        """Train the defense's own net on the training images, or on what was drawn of them."""
        optimiser = Adam(self.classifier.parameters(), self.classifier_lr)
        self.classifier.train()
        for epoch in fitting.epochs(self.classifier_epochs, self.classifier, optimiser):
            batches = (
                (each[:2] for each in epoch.batches(self.batch))
                if drawn is None
                else _shuffled(drawn, train.labels, self.batch)
            )
            for x, y in batches:
                loss = cross_entropy(self.classifier(x), y)
                _descend(optimiser, loss)
                epoch.report(loss.detach())

    # --- the projection --------------------------------------------------------------------------------

    def project(self, x: Images) -> Projection:
        """Return the latents that explain images (N, C, H, W) best; warn where a descent did not descend."""
        with frozen(self.generator):
            found = project(gan.fused(self.generator), x, self._starts(x), self.descent, rows=self.rows)
        if found.diverged.all(1).any():
            warnings.warn(
                f"defensegan: of some images every restart ended above its start; lr {self.descent.lr:g} is "
                "too large for this generator (the best point that was passed is kept)",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def _starts(self, x: Images) -> Tensor:
        """Return where the descents begin, (N, restarts, latent)."""
        if self.starts == "fresh":
            drawn = torch.randn(len(x), self.restarts, self.latent)
        else:
            # One by one, so that the first are the same however many there are.
            draw = torch.Generator().manual_seed(int(self.seed))
            drawn = torch.stack([torch.randn(self.latent, generator=draw) for _ in range(self.restarts)])
            drawn = drawn.expand(len(x), -1, -1)
        return (self.spread * drawn).to(x)

    @torch.no_grad()
    def _draw(self, latent: Tensor) -> Images:
        """Return the images of latents (N, d), no gradient."""
        with frozen(self.generator):
            images: Tensor = self.generator(latent)
        return images

    # --- what is asked ---------------------------------------------------------------------------------

    @view("bpda", reads=("label",))
    def bpda(self) -> View:
        """Look at classifier(G(z*)); backwards, the projection is the identity (BPDA).

        Without that no gradient passes it (D-42). Athalye et al. 2018, arXiv:1802.00420.
        """
        classify = self._surface()
        return View(lambda x: classify(straight(self._draw(self.project(x.detach()).latent), x)))

    @view("backtrack")
    def backtrack(self, *, steps: int = 10, rate: float | None = None) -> View:
        """Look at classifier(G(z)), z some steps of descent on from z*, with their gradient to the image.

        Latent backtracking: Chen, Xie and Zhu, theorem 1. `steps` is T', `rate` the step on ||G(z) - x||^2;
        without one, it is for each image 0.9 over the largest curvature there, found by power iteration.
        Memory grows with the steps.
        """
        if steps < 1:
            raise InputError(f"view backtrack: steps must be 1 or more, found {steps}")
        if rate is not None and not rate > 0:
            raise InputError(f"view backtrack: rate must be above 0, found {rate:g}")
        classify = self._surface()

        def logits(x: Images) -> Tensor:
            z = self.project(x.detach()).latent
            if rate is None:
                rates = 0.9 / curvature(self.generator, z, x).clamp_min(torch.finfo(x.dtype).tiny)
            else:
                rates = torch.full_like(z[:, 0], rate)
            return classify(self.generator(backtrack(self.generator, z, x, steps=steps, rate=rates)))

        return View(logits)

    @view("inversion", space="inversion")
    def inversion(self) -> Inversion:
        """Look at the projection itself: z*, the energy ||G(z) - x||^2 (D-38), and classifier(G(z))."""
        logits = self._on_manifold()
        return Inversion(
            logits,
            encode=self._encode,
            decode=self.generator,
            invert=self._encode,
            energy=lambda z, x: (self.generator(z) - x).square().flatten(1).sum(1),
            classify=lambda z, _: logits(z),
        )

    @view("latent", space="latent")
    def latent_(self) -> View:
        """Search among the generator's own images: the point is z, its image G(z)."""
        return View(self._on_manifold(), encode=self._encode, decode=self.generator)

    @view("classifier", ignores=SERVED)
    def alone(self) -> View:
        """Look at the classifier alone, on the image itself."""
        return View(self._surface())

    def _encode(self, x: Images) -> Tensor:
        return self.project(x.detach()).latent

    def _on_manifold(self) -> Callable[[Tensor], Tensor]:
        classify = self._surface()
        return lambda z: classify(self.generator(z))

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Answer by the classifier's arg-max on G(z*)."""
        return Decision.of(self._surface()(self._draw(self.project(x).latent)))


class _Drawn(nn.Module):
    """Images that are replaced portion by portion; a module, so that they are saved with the epoch."""

    images: Tensor

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.register_buffer("images", images.clone())


def _shuffled(images: Images, labels: Labels, size: int) -> Iterator[tuple[Images, Labels]]:
    """Yield batches in an order drawn from torch's global state, which is an epoch's own."""
    for rows in torch.randperm(len(labels)).split(size):
        yield images[rows.to(images.device)], labels[rows.to(labels.device)].to(images.device)


def _descend(optimiser: Optimizer, loss: Tensor) -> None:
    """Take a step; no gradient is computed or left but for the optimiser's own parameters."""
    parameters = [each for group in optimiser.param_groups for each in group["params"]]
    for parameter, gradient in zip(parameters, autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad()

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
    Count,
    Decision,
    Fitting,
    Images,
    InputError,
    Inversion,
    Labels,
    NonNegative,
    Part,
    Positive,
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


def check_params(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the data does not fit the generator, or settings not each other.

    Args:
        params: the parameters of `defensegan`, defaults filled in.
        shape: channels, height, width and classes of the data.
    """
    gan.check_shape(params["architecture"], shape)
    if params["momentum"] >= 1:
        raise InputError(f"momentum must be at least 0 and below 1, found {params['momentum']:g}")
    if params["classifier"] is not None and params["trained_on"] == "reconstructions":
        raise InputError(
            "trained_on: reconstructions is for the defense's own net, and classifier names another defense, "
            "which is taken as it is"
        )


@defense(
    "defensegan",
    readouts=("label",),
    inference=SERVED,
    random=lambda params: bool(params["starts"] == "fresh"),
    version=1,
    aliases={"logits": "bpda"},
    check_params=check_params,
)
class DefenseGan(nn.Module):
    """A classifier that sees G(z*) in the place of x, where z* = argmin ||G(z) - x||^2.

    G is the generator of a WGAN with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028). z* is sought
    by gradient descent with momentum from several starts, see `defenses.nets.defensegan.projection.project`.

    Defaults are the released code's for MNIST, whose generator is trained on the first 50,000 images.

    Source: Samangouei et al. 2018, arXiv:1805.06605, equation 5 and algorithm; the authors' code; for
    `supplement` the supplement of Chen, Xie and Zhu.

    Args:
        shape: channels, height, width and classes of the data.
        architecture: of generator and critic: ``released``, for 28x28, or ``supplement``, for 32x32.
        latent: dimensions of a latent, 1 or more.
        width: factor of the generator's and the critic's channels, above 0.
        generator: another `defensegan` of the suite whose generator is taken; None trains one.
        iterations: steps of the generator, 1 or more.
        critic_steps: steps of the critic before each of the generator's, 1 or more; each sees a new batch.
        penalty: weight of the gradient penalty, 0 or more.
        gan_lr: learning rate of Adam for generator and critic, above 0.
        batch: images of a step, 1 or more, for GAN and classifier.
        classifier: another defense of the suite that classifies, taken as it is; None trains `net`.
        through: the view of that defense that is looked through.
        net: the defense's own classifier: A to F of the paper.
        net_width: factor of its hidden layers' channels and units, above 0.
        trained_on: what it is trained on: ``originals``, or the generator's ``reconstructions`` of them.
        classifier_epochs: passes of its training, 1 or more.
        classifier_lr: learning rate of Adam in its training, above 0.
        restarts: starts of the descent for each image, 1 or more; may differ at inference from training.
        steps: steps of the descent, 1 or more; may differ at inference.
        lr: rate of the descent on the mean squared error over pixels, above 0; may differ at inference.
        momentum: momentum of the descent, 0 to below 1; may differ at inference.
        decay: take a tenth of `lr` for the last fifth of the steps: configured, but inactive, as released
            (D-28); may differ at inference.
        keep: ``best`` takes the best point of all; ``released`` is without the last step and without a
            memory; may differ at inference.
        spread: standard deviation of the starts: ``released`` is sqrt(1 / latent), ``prior`` is 1 as for the
            latents that the GAN is trained on (D-27); may differ at inference.
        starts: ``fresh`` draws starts at each question, as released, so that answers are random; ``fixed``
            has the same for every image and question. May differ at inference.
    """

    seed: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        architecture: gan.Architecture = "released",
        latent: Count = 128,
        width: Positive = 1.0,
        generator: Part | None = None,
        iterations: Count = 200_000,
        critic_steps: Count = 5,
        penalty: NonNegative = 10.0,
        gan_lr: Positive = 1e-4,
        batch: Count = 50,
        classifier: Part | None = None,
        through: str = "logits",
        net: classifiers.Letter = "A",
        net_width: Positive = 1.0,
        trained_on: Literal["originals", "reconstructions"] = "originals",
        classifier_epochs: Count = 10,
        classifier_lr: Positive = 1e-3,
        restarts: Count = 10,
        steps: Count = 200,
        lr: Positive = 10.0,
        momentum: NonNegative = 0.7,
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
        """Train the generator, unless it was taken; then the classifier, unless that is another defense.

        Args:
            train: the training images.
            fitting: batches and draws.
        """
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
        """Return the latents that explain images best; warn where a descent did not descend.

        Args:
            x: images (N, C, H, W) in [0, 1].
        """
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

    @view("bpda", exact_for=("label",))
    def bpda(self) -> View:
        """Return the view of classifier(G(z*)), with the identity as the projection's gradient (BPDA).

        Without that no gradient passes it (D-42). Source: Athalye et al. 2018, arXiv:1802.00420.
        """
        classify = self._surface()
        return View(lambda x: classify(straight(self._draw(self.project(x.detach()).latent), x)))

    @view("backtrack")
    def backtrack(self, *, steps: Count = 10, rate: Positive | None = None) -> View:
        """Return the view of classifier(G(z)), z some steps on from z*, with their gradient to the image.

        Latent backtracking; memory grows with the steps. Source: Chen, Xie and Zhu, theorem 1.

        Args:
            steps: steps of descent, 1 or more, the paper's T'.
            rate: rate of a step on ||G(z) - x||^2, above 0; None takes for each image 0.9 over the largest
                curvature there, found by power iteration.
        """
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
        """Return the view of the projection itself: z*, ||G(z) - x||^2 (D-38), and classifier(G(z))."""
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
        """Return the view in which a point is a latent z, and its image G(z)."""
        return View(self._on_manifold(), encode=self._encode, decode=self.generator)

    @view("classifier", ignores=SERVED)
    def alone(self) -> View:
        """Return the view of the classifier alone, on the image itself."""
        return View(self._surface())

    def _encode(self, x: Images) -> Tensor:
        return self.project(x.detach()).latent

    def _on_manifold(self) -> Callable[[Tensor], Tensor]:
        classify = self._surface()
        return lambda z: classify(self.generator(z))

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the classifier's arg-max on G(z*).

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``label``, the only one.
        """
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

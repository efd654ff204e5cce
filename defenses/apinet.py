"""API-Net: each class may first move the image its way (Dong et al. 2020, "API-Net", ECCV)."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, autograd, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from bench import (
    Count,
    Crafted,
    Decision,
    Fitting,
    Images,
    InputError,
    Inversion,
    Labels,
    NonNegative,
    NonNegativeCount,
    Part,
    Positive,
    Randomness,
    Shape,
    Share,
    Split,
    Threat,
    Use,
    View,
    defense,
    view,
    view_of,
)
from defenses.nets import training as trainings
from defenses.nets.common import straight

PGD = Use("pgd", {"steps": 7, "step_size": 0.007, "start": "uniform", "keep": "last", "drop": False})
"""The inner attack on CIFAR-10 and SVHN: always seven steps from a uniform start, the last iterate."""

NOISE = 0.001
"""Standard deviation of the start's noise, in units of [0, 1]."""

SLACK = 1.02
"""How far a scaled step's inner steps reach, over `eps_ap`: 8 steps of 0.007 over 14/255."""

ROWS = {"cpu": 256, "cuda": 2048}
"""Points (an image and a class each) that pass the base at once. It bounds memory and changes no result."""

EXACT = 1 - 1e-6
"""Of a radius: what is nearer is there."""

Surrogate: TypeAlias = Literal["straight-through", "tanh"]
Order: TypeAlias = Literal["after", "before"]


def flags(
    *,
    eps_ap: float,
    inner_steps: int,
    inner_step_size: float | None,
    epochs: int,
    radius: float,
    inner: Mapping[str, Any],
    **_: object,
) -> str | None:
    """Return a sentence where steps do not reach their radius, in inference (D-21) or in training; else None.

    Args:
        eps_ap: radius of the inner maximum.
        inner_steps: steps of the inner maximum.
        inner_step_size: length of a step; None scales it.
        epochs: passes of training; with 0 there is none.
        radius: radius of the inner attack.
        inner: the inner attack with its parameters, as a suite writes it.
        _: the other parameters.
    """
    found = []
    if inner_step_size is not None and (reach := inner_steps * inner_step_size) < eps_ap * EXACT:
        found.append(
            f"{inner_steps} inner steps of {inner_step_size:g} reach {reach:.4g}, "
            f"less than eps_ap {eps_ap:.4g} (inner_step_size: null scales them)"
        )
    # An attack without a step of its own scales it.
    steps, step_size = inner.get("steps"), inner.get("step_size")
    if epochs and steps and step_size and (reach := steps * step_size) < radius * EXACT:
        found.append(
            f"{steps} training steps of {step_size:g} reach {reach:.4g}, less than radius {radius:.4g}"
        )
    return "; ".join(found) or None


@defense(
    "apinet",
    readouts=("label",),
    inference=("eps_ap", "inner_steps", "inner_step_size", "start"),
    random=lambda params: bool(params["start"] == "noise"),
    version=2,
    flags=flags,
)
class ApiNet(nn.Module):
    """A classifier p(y|z) that is asked, for each class c, at the z near x which that class likes best.

    ``l_c(x) = max log p(c|z)`` over z in [0, 1] within `eps_ap` of x (linf); the answer is the arg-max
    of l, its probabilities are softmax(l). The maximum is sought by signed gradient steps in evaluation mode.
    A question costs C (inner_steps + 1) forward passes and C inner_steps backward passes for C classes.

    Training goes on from the base's weights, which the paper's recipe has made by Madry et al.'s adversarial
    training: images are attacked by `inner` on the base, each class's z is found for them, and the
    cross-entropy of l follows with the z held fixed (D-40).

    Defaults are the paper's for CIFAR-10. For SVHN it has `eps_ap` 12/255; for MNIST `eps_ap` 12/255,
    `inner_step_size` 0.01, `radius` 0.3 and 40 inner attack steps of 0.01; for CIFAR-10 and SVHN `augment`.

    Source: Dong et al. 2020, "API-Net", ECCV; its authors' code.

    Args:
        shape: channels, height, width and classes of the data.
        base: any defense of the suite that has a view with one logit for each class and a gradient.
        through: the name of that view.
        eps_ap: linf radius of the inner maximum, in [0, 1] units, 0 to 1; may differ at inference from
            training.
        inner_steps: steps of the inner maximum, 1 or more; may differ at inference.
        inner_step_size: length of a step, in [0, 1] units, above 0; None scales it with the radius:
            1.02 `eps_ap` / `inner_steps`, which is 0.007 at 14/255 and 8 steps (D-21); may differ at
            inference.
        start: where the steps start: ``noise`` at x plus 0.001 N(0, 1), not projected, ``zero`` at x itself;
            may differ at inference.
        epochs: passes over the training images, 0 or more; with 0 the base stays as it is.
        batch: images of a step, 1 or more.
        drop_last: leave out the last batch of an epoch if it is not full.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        lr: learning rate of SGD, above 0.
        momentum: momentum of SGD, 0 or more.
        weight_decay: factor of the L2 penalty, 0 or more.
        radius: linf radius of the inner attack in training, in [0, 1] units, 0 or more.
        inner: the attack on each training batch.
        class_batches: let each class's points be a batch to batch normalisation, as released; else all
            classes' points are one.
        extra_forwards: pass clean and then attacked images in training mode too, as released, which moves
            batch normalisation's running statistics and nothing else (D-22).
        extra_order: when they pass: ``after`` the classes, as released, so that the last updates are those
            of images as they come, or ``before`` them (D-50).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        base: Part,
        through: str = "logits",
        eps_ap: Share = 14 / 255,
        inner_steps: Count = 8,
        inner_step_size: Positive | None = 0.007,
        start: Literal["noise", "zero"] = "noise",
        epochs: NonNegativeCount = 40,
        batch: Count = 128,
        drop_last: bool = False,
        augment: bool = False,
        lr: Positive = 0.001,
        momentum: NonNegative = 0.9,
        weight_decay: NonNegative = 5e-4,
        radius: NonNegative = 8 / 255,
        inner: Use = PGD,
        class_batches: bool = True,
        extra_forwards: bool = True,
        extra_order: Order = "after",
    ) -> None:
        super().__init__()
        assert isinstance(base, nn.Module)
        self.shape = shape
        self.base: nn.Module = base
        self.through = through
        self.eps_ap, self.steps, self.start = eps_ap, inner_steps, start
        self.step_size = SLACK * eps_ap / inner_steps if inner_step_size is None else inner_step_size
        self.recipe = trainings.Recipe(
            epochs=epochs,
            batch=batch,
            drop_last=drop_last,
            augment=augment,
            optimiser="sgd",
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        self.radius, self.inner = radius, inner
        self.class_batches = class_batches
        self.extra_forwards, self.extra_order = extra_forwards, extra_order
        self.rows: int | None = None
        """Points that are computed at once; None: what `ROWS` says for the device."""
        self._surface()

    # --- the base ------------------------------------------------------------------------------------

    def _surface(self) -> View:
        """Return the base's view; raise `InputError` where API-Net cannot stand on it."""
        try:
            seen = view_of(self.base, self.through)
        except InputError as error:
            raise InputError(f"base, through: {error}") from None
        if isinstance(seen, Inversion):
            raise InputError(f"through: expected a view of pixels, found {self.through!r}, one of codes")
        if seen.refusal:
            raise InputError(f"through: expected a logit by class, found {self.through!r}, which refuses")
        if not seen.centred:
            raise InputError(
                f"through: expected logits that a softmax reads, found {self.through!r}, whose level matters"
            )
        return seen

    def _logits(self, z: Images) -> Tensor:
        logits = self._surface().logits(z)
        if logits.shape != (len(z), self.shape.classes):
            raise InputError(
                f"through: expected logits ({len(z)}, {self.shape.classes}), "
                f"found {tuple(logits.shape)} in view {self.through!r} of the base"
            )
        return logits

    def log_p(self, z: Images, classes: Labels) -> Tensor:
        """Return log p(c|z) of each point and its class, (M,) in nats.

        Args:
            z: points (M, C, H, W).
            classes: the class of each, (M,).
        """
        return self._logits(z).log_softmax(1).gather(1, classes[:, None]).squeeze(1)

    def slope(self, z: Images, classes: Labels, *, again: bool = False) -> tuple[Tensor, Tensor]:
        """Return log p(c|z), (M,), and its gradient by z, (M, C, H, W).

        Args:
            z: points (M, C, H, W).
            classes: the class of each, (M,).
            again: keep the graph, so that the gradient can be differentiated.

        Raises:
            InputError: the base's view has no gradient.
        """
        with torch.enable_grad():
            z = z if again else z.detach().requires_grad_()
            values = self.log_p(z, classes)
            if not values.requires_grad:
                raise InputError(f"through: view {self.through!r} of the base has no gradient")
            (gradient,) = autograd.grad(values.sum(), z, create_graph=again)
        return values.detach(), gradient

    # --- inference -----------------------------------------------------------------------------------

    def _points(self, x: Images) -> tuple[Images, Labels]:
        """Return each image once for each class, class after class, (C * N, ...), and the classes."""
        classes = torch.arange(self.shape.classes, device=x.device).repeat_interleave(len(x))
        return x.repeat(self.shape.classes, 1, 1, 1), classes

    def chunk(self, x: Tensor) -> int:
        """Return how many points pass the base at once.

        Args:
            x: points on the device where they are computed.
        """
        return self.rows or ROWS["cuda" if x.is_cuda else "cpu"]

    def _starts(self, points: Images) -> Images:
        """Return where to start; the noise is torch's global generator's, all drawn at once."""
        if self.start == "zero":
            return points
        return torch.randn_like(points).mul_(NOISE).add_(points)

    def box(self, points: Images) -> tuple[Images, Images]:
        """Return the least and the greatest z: in the ball around each point, and in [0, 1].

        Args:
            points: images (M, C, H, W) in [0, 1].
        """
        return (points - self.eps_ap).clamp(min=0), (points + self.eps_ap).clamp(max=1)

    def climb(self, z: Images, points: Images, classes: Labels, *, steps: int) -> Images:
        """Return points after signed steps up log p(c|z), within the box around each.

        Args:
            z: where the steps start, (M, C, H, W).
            points: the images around which z stays, (M, C, H, W).
            classes: the class of each, (M,).
            steps: number of steps.
        """
        low, high = self.box(points)
        for _ in range(steps):
            _, gradient = self.slope(z, classes)
            z = torch.add(z, gradient.sign_(), alpha=self.step_size).clamp_(low, high)
        return z

    @torch.no_grad()
    def solve(self, x: Images) -> Images:
        """Return the z that each class likes best, class after class, (classes * N, C, H, W).

        Every point walks alone: its end does not depend on its company. No graph leads back to x.

        Args:
            x: images (N, C, H, W) in [0, 1].
        """
        points, classes = self._points(x.detach())
        size = self.chunk(x)
        parts = (each.split(size) for each in (self._starts(points), points, classes))
        with trainings.frozen(self.base):
            return torch.cat([self.climb(*part, steps=self.steps) for part in zip(*parts, strict=True)])

    def scores(self, z: Images) -> Tensor:
        """Return l, (N, classes), of the points that the classes like best; differentiable in them, once.

        Args:
            z: points as `solve` gives them, (classes * N, C, H, W).
        """
        classes = torch.arange(self.shape.classes, device=z.device)
        values: Tensor = _Answers.apply(z, classes.repeat_interleave(len(z) // self.shape.classes), self)
        return values.view(self.shape.classes, -1).T

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision for the class of the greatest l.

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``label``, the only one.
        """
        return Decision.of(self.scores(self.solve(x)))

    # --- views ---------------------------------------------------------------------------------------

    @view("base", ignores=("eps_ap", "inner_steps", "inner_step_size", "start"))
    def base_view(self) -> View:
        """Return the view of the base alone: z = x, in both passes (the paper's FBDA, its strategy 2)."""
        return View(self._logits)

    @view("bpda", exact_for=("label",))
    def bpda(self) -> View:
        """Return the view of l, with the gradients of log p(c|z) at the z found, as if each z were x.

        The paper's strategy 1.

        By the envelope theorem that is the gradient of l where the inner maxima are exact and no z is at
        the edge of [0, 1].
        """

        def logits(x: Images) -> Tensor:
            points, _ = self._points(x)
            return self.scores(self.solve(x) + (points - points.detach()))

        return View(logits)

    @view("unrolled", exact_for=("label",))
    def unrolled(self, *, surrogate: Surrogate = "straight-through", temperature: Positive = 0.1) -> View:
        """Return the view of l, differentiated through every inner step, with smooth signs backwards.

        Each step is made anew in the backward pass, chunk by chunk: what is kept is the path of every z, not
        activations. The base must be differentiable twice. Not of the paper: an adaptive attacker's view.

        Args:
            surrogate: the derivative of sign(g): 1 (``straight-through``) or that of tanh(g / `temperature`)
                (``tanh``).
            temperature: width of the tanh, above 0.
        """
        softness = None if surrogate == "straight-through" else temperature

        def logits(x: Images) -> Tensor:
            points, classes = self._points(x)
            z = self._starts(points)
            for _ in range(self.steps):
                z = _Step.apply(z, points, classes, self, softness)
            return self.scores(z)

        return View(logits)

    # --- training ------------------------------------------------------------------------------------

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Go on training the base, through l; with no epochs, only try it on two images.

        Args:
            train: the training images.
            fitting: batches, draws and the inner attack.

        Raises:
            InputError: the base has no gradient, no weights, or logits of another number of classes.
        """
        tried = train.images[:2].to(fitting.device)
        with trainings.frozen(self.base):
            self.slope(tried, torch.zeros(len(tried), dtype=torch.int64, device=tried.device))
        if self.recipe.epochs == 0:
            self.eval()
            return
        if not any(each.requires_grad for each in self.base.parameters()):
            raise InputError("base: it has no weights to train; epochs: 0 takes it as it is")
        attack, threat = fitting.attack(self.inner), Threat("linf", self.radius)

        def objective(x: Images, y: Labels, noise: Randomness) -> Tensor:
            with trainings.frozen(self.base):
                made = attack(View(self._logits, exact=False), x, y, threat, noise)
            attacked = made.images if isinstance(made, Crafted) else made
            return self.loss(x, attacked.detach(), y)

        trainings.train(self, fitting, objective, self.recipe, fewest=trainings.fewest_of(self.base))

    def loss(self, clean: Images, attacked: Images, y: Labels) -> Tensor:
        """Return the cross-entropy of l, with each class's z found for the attacked images and held fixed.

        Args:
            clean: images (N, C, H, W) in [0, 1].
            attacked: the same images, attacked.
            y: labels (N,).
        """
        z = self.solve(attacked)
        if self.extra_order == "before":
            self._pass(clean, attacked)
        classes = torch.arange(self.shape.classes, device=z.device).repeat_interleave(len(y))
        size = len(y) if self.class_batches else len(z)
        batches = zip(z.split(size), classes.split(size), strict=True)
        values = torch.cat([self.log_p(*each) for each in batches])
        if self.extra_order == "after":
            self._pass(clean, attacked)
        return cross_entropy(values.view(self.shape.classes, -1).T, y)

    @torch.no_grad()
    def _pass(self, *batches: Images) -> None:
        """Show the base images that have no weight in the loss (D-22)."""
        if self.extra_forwards:
            for each in batches:
                self._logits(each)


class _Answers(autograd.Function):
    """log p(c|z) of points (M, C, H, W) and classes (M,).

    The gradient is made at once and kept, so that memory holds the activations of one chunk only.
    """

    @staticmethod
    def forward(ctx: Any, z: Images, classes: Labels, model: ApiNet) -> Tensor:
        size = model.chunk(z)
        values, gradients = [], []
        with trainings.frozen(model.base):
            for part in zip(z.split(size), classes.split(size), strict=True):
                if ctx.needs_input_grad[0]:
                    value, gradient = model.slope(*part)
                    gradients.append(gradient)
                else:
                    value = model.log_p(*part)
                values.append(value)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return weight[:, None, None, None] * gradient, None, None


class _Step(autograd.Function):
    """One inner step of points (M, C, H, W), made again to be differentiated.

    That is what torch.utils.checkpoint does, which would make it twice: its forward pass holds a
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Images, points: Images, classes: Labels, model: ApiNet, softness: float | None
    ) -> Images:
        ctx.save_for_backward(z, points, classes)
        ctx.model, ctx.softness = model, softness
        parts = (each.split(model.chunk(z)) for each in (z, points, classes))
        with trainings.frozen(model.base):
            return torch.cat([model.climb(*part, steps=1) for part in zip(*parts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Images) -> tuple[Images, Images, None, None, None]:
        model: ApiNet = ctx.model
        parts = (each.split(model.chunk(weight)) for each in (*ctx.saved_tensors, weight))
        with trainings.frozen(model.base):
            made = [_pulled(model, ctx.softness, *part) for part in zip(*parts, strict=True)]
        by_z, by_point = map(torch.cat, zip(*made, strict=True))
        return by_z, by_point, None, None, None


def _pulled(
    model: ApiNet, softness: float | None, z: Images, points: Images, classes: Labels, weight: Images
) -> tuple[Tensor, ...]:
    """Return the gradients of <weight, step> by z and by the point it walks around."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        _, gradient = model.slope(z, classes, again=True)
        soft = gradient if softness is None else (gradient / softness).tanh()
        here, sign, around = (each.detach().requires_grad_() for each in (z, soft, points))
        moved = (here + model.step_size * straight(gradient.sign(), sign)).clamp(*model.box(around))
        by_z, by_sign, by_point = autograd.grad(moved, (here, sign, around), weight)
        curved = None
        if soft.requires_grad:
            (curved,) = autograd.grad(soft, z, by_sign, allow_unused=True)
    if curved is None:
        # A softmax is curved: the way back to z is cut somewhere in the base.
        raise InputError(
            f"view unrolled: the base cannot be differentiated twice through {model.through!r}; "
            "bpda needs one gradient only"
        )
    return by_z + curved, by_point

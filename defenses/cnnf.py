"""CNN-F: a network that reconsiders through a generative feedback (Huang et al. 2020, arXiv:2007.09200)."""

from typing import Literal

import torch
from torch import Tensor

from bench import (
    Count,
    Decision,
    Images,
    Labels,
    NonNegative,
    NonNegativeCount,
    Positive,
    Shape,
    Share,
    Use,
    View,
    defense,
    view,
)
from defenses.nets.cnnf import architectures
from defenses.nets.cnnf.feedback import Cycle
from defenses.nets.cnnf.losses import adversarial_loss, standard_loss
from defenses.nets.cnnf.operators import Linear, Rule
from defenses.nets.cnnf.training import PGD, RATES, FeedbackTrained, Training, feedback_recipe
from defenses.nets.training import Recipe


@defense(
    "cnnf",
    readouts=("last", "avg"),
    inference=("cycles", "eta"),
    version=1,
    check_params=architectures.check_params,
)
class CnnF(FeedbackTrained):
    """A network whose logits are fed back to earlier features, which are then classified again.

    Each cycle moves the features at `ind` by `eta` towards what a generative feedback makes of the logits,
    and passes them up again. All passes are trained at once.

    Defaults are the paper's for net B.2 on Fashion-MNIST. For WRN-40-2 on CIFAR-10 the paper has 2 cycles,
    `ind` 5, `clean_weight` 0.05, 500 epochs, radius 0.0315, inner steps of 0.01, `augment`, and `drop_last`
    off; for net B.1 standard training, `ind` 0 and 30 epochs.

    Source: Huang et al. 2020, arXiv:2007.09200, algorithm 1, section 3 and appendix; the authors' code.

    Args:
        shape: channels, height, width and classes of the data.
        net: the architecture: ``b1`` and ``b2`` of the appendix, or ``wrn-40-2``.
        width: factor of the number of channels, above 0.
        hidden: units of each hidden fully connected layer; None takes the paper's, (128,) for ``b1`` and
            (1000, 128) for ``b2``. ``wrn-40-2`` has none.
        first_kernel: kernel side of the first convolution of ``b2``: 3 as released, 1 as printed (D-03).
        cycles: feedbacks after the first pass, 0 or more; may differ at inference from training.
        eta: share of the way that features move to their feedback, 0 to 1; may differ at inference.
        ind: where the feedback ends: 0 is the pixels, else the block whose output it reaches; up to 1 for
            ``b1``, 2 for ``b2`` and 6 for ``wrn-40-2``.
        training: ``adversarial`` has SGD, clipped gradients and a polynomially falling rate (power 0.9);
            ``standard`` has Adam at a constant rate.
        epochs: passes over the training images, 1 or more.
        batch: images of a step, 1 or more.
        drop_last: leave out the last batch of an epoch if it is not full.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        lr: learning rate, above 0; None takes the released code's, 0.05 in adversarial training and 0.001
            in standard training.
        weight_decay: factor of the L2 penalty, 0 or more.
        double_decay: let fully connected weights decay twice in adversarial training with cycles, as
            released: their transposes are parameters there too (D-39).
        momentum: momentum of SGD, 0 or more.
        clip: norm that the gradients of a step are clipped to in adversarial training, above 0.
        radius: linf radius of the inner attack, in [0, 1] units (half of what the released code writes for
            [-1, 1]), 0 or more.
        inner: the attack on each training batch; it sees the first pass alone, and its step size is in
            [0, 1] units.
        clean: let clean images count beside attacked ones in adversarial training.
        clean_weight: weight of the clean images' cross-entropy, 0 or more.
        reconstruction: weight of the mean squared distance between fed back and clean features, 0 or more.
        taps: where that distance is measured: ``input`` at `ind` alone, ``all`` also behind the blocks
            above it.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        net: architectures.Net = "b2",
        width: Positive = 1.0,
        hidden: tuple[Count, ...] | None = None,
        first_kernel: Literal[1, 3] = 3,
        cycles: NonNegativeCount = 1,
        eta: Share = 0.1,
        ind: NonNegativeCount = 2,
        training: Training = "adversarial",
        epochs: Count = 200,
        batch: Count = 256,
        drop_last: bool = True,
        augment: bool = False,
        lr: Positive | None = None,
        weight_decay: NonNegative = 5e-4,
        double_decay: bool = True,
        momentum: NonNegative = 0.9,
        clip: Positive = 0.5,
        radius: NonNegative = 0.1,
        inner: Use = PGD,
        clean: bool = True,
        clean_weight: NonNegative = 0.1,
        reconstruction: NonNegative = 0.1,
        taps: Literal["all", "input"] = "all",
    ) -> None:
        recipe = Recipe(
            epochs=epochs,
            batch=batch,
            drop_last=drop_last,
            augment=augment,
            lr=RATES[training] if lr is None else lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip=clip,
            double_decay=(Linear,) if double_decay and cycles > 0 else (),
        )
        super().__init__(
            architectures.build(net, shape, ind=ind, width=width, hidden=hidden, first_kernel=first_kernel),
            feedback_recipe(training, recipe),
            inner=inner if training == "adversarial" else None,
            radius=radius,
        )
        self.cycles, self.rule = cycles, Rule(eta)
        self.clean, self.clean_weight = clean, clean_weight
        self.reconstruction, self.taps = reconstruction, taps

    def loss(self, clean: Images, attacked: Images | None, y: Labels) -> Tensor:
        """Return the loss of a batch over all passes, a scalar.

        Args:
            clean: images (N, C, H, W) in [0, 1].
            attacked: the same images, attacked; None in standard training.
            y: labels (N,).
        """
        count = None if self.taps == "all" else 1
        if attacked is None:
            first, *later = self._passes(clean)
            return standard_loss(
                [each.logits for each in (first, *later)],
                y,
                first.taps[:count],
                [each.taps[:count] for each in later],
                reconstruction=self.reconstruction,
            )
        # Nothing in the network joins images: two batches are one, without the copies of cutting it.
        cleans = self._passes(clean, cycles=self.cycles if self.clean else 0)
        attackeds = self._passes(attacked)
        return adversarial_loss(
            [each.logits for each in cleans] if self.clean else [],
            [each.logits for each in attackeds],
            y,
            cleans[0].taps[:count],
            [each.taps[:count] for each in attackeds[1:]],
            clean_weight=self.clean_weight,
            reconstruction=self.reconstruction,
        )

    @view("first", ignores=("cycles", "eta"))
    def first(self) -> View:
        """Return the view of the first pass, a plain network: logits (N, K)."""
        return View(self.network)

    @view("e2e_last", exact_for=("last",))
    def e2e_last(self) -> View:
        """Return the view of the last pass's logits (N, K), with exact gradients through all passes."""
        return View(lambda x: self._logits(x)[-1])

    @view("e2e_avg", exact_for=("avg",))
    def e2e_avg(self) -> View:
        """Return the view of the mean of all passes' logits (N, K), with exact gradients.

        The released attack looks at the last pass whatever the read-out (D-11): that is `e2e_last`.
        """
        return View(lambda x: torch.stack(self._logits(x)).mean(0))

    @view("sum", exact_for=("avg",))
    def sum(self) -> View:
        """Return the view of all passes' logits (T, N, K): an attack adds up losses, not logits."""
        return View(lambda x: torch.stack(self._logits(x)))

    @view("bpda", exact_for=("last",))
    def bpda(self, *, temperature: Positive = 0.1, head: Literal["max", "tanh"] = "max") -> View:
        """Return the view of the last pass's logits, with smooth masks and signs in the backward pass.

        A unit's mask becomes the sigmoid of f g / `temperature`, a pool's choice that of g (max - min) /
        `temperature`. Not of the paper: an adaptive attacker's view (BPDA, Athalye et al. 2018,
        arXiv:1802.00420).

        Args:
            temperature: width of the sigmoids, above 0; small ones are close to the hard masks.
            head: what the sign that normalisation leaves of WRN-40-2's head becomes: u / max|u| (``max``) or
                tanh(u / `temperature`) (``tanh``).
        """
        rule = self.rule._replace(temperature=temperature, head=head)
        return View(lambda x: self._logits(x, rule)[-1])

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the decision by the arg-max of the last pass's logits, or of the mean of all.

        Args:
            x: images (N, C, H, W) in [0, 1].
            readout: ``last``, or ``avg`` for the mean of all passes' logits.
        """
        passes = self._logits(x)
        return Decision.of(passes[-1] if readout == "last" else torch.stack(passes).mean(0))

    def _logits(self, x: Images, rule: Rule | None = None) -> list[Tensor]:
        if self.cycles == 0:
            return [self.network(x)]
        return [each.logits for each in self.network.cycles(x, self.cycles, rule or self.rule)]

    def _passes(self, x: Images, cycles: int | None = None) -> list[Cycle]:
        return list(self.network.cycles(x, self.cycles if cycles is None else cycles, self.rule))

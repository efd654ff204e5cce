"""SDIM: Supervised Deep InfoMax, a generative classifier of a code that refuses what is unlikely."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import (
    ContentPath,
    Count,
    Decision,
    Described,
    Features,
    Fitting,
    Images,
    InputError,
    Labels,
    NonNegative,
    NonNegativeCount,
    Positive,
    Shape,
    Split,
    View,
    defense,
    view,
)
from defenses.nets import training as trainings
from defenses.nets import weights as files
from defenses.nets.sdim import best_epoch, encoder, infomax

SHARES = (0.01, 0.02)
"""Which percentiles of the training images' log-likelihoods `reject-1` and `reject-2` refuse below."""


def check_params(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the data does not fit the network, or a file of weights the settings.

    Args:
        params: the parameters of `sdim`, defaults filled in, with absolute paths.
        shape: channels, height, width and classes of the data.
    """
    best_epoch.check_params(params, shape)
    loaded = params["weights"] is not None
    if not params["epochs"] and not loaded:
        raise InputError("epochs: 0 is for weights:, which there are none of; expected 1 or more")
    if params["thresholds"] == "weights":
        if not loaded:
            raise InputError("thresholds: those of weights: are asked for, and there are no weights")
        if params["epochs"]:
            raise InputError(
                f"thresholds: those of the weights are for epochs: 0, found {params['epochs']}: "
                "trained on, they are another network's"
            )
    if loaded:
        file = Path(params["weights"])
        files.check(file)
        if params["thresholds"] == "weights":
            _thresholds_of(file, shape.classes)


def _thresholds_of(file: Path, classes: int) -> Tensor:
    """Return the thresholds (2, K) in a file of weights; raise where it has none."""
    state = files.read(file)
    found = state.get("thresholds")
    if found is None or not state.get("calibrated", torch.ones(())):
        raise InputError(
            f"weights: {file} has no thresholds; thresholds: fit takes them from the training images"
        )
    if found.shape != (len(SHARES), classes) or not found.isfinite().all():
        raise InputError(
            f"weights: {file}: expected finite thresholds of shape {(len(SHARES), classes)}, "
            f"found shape {tuple(found.shape)}"
        )
    return files.cast(file, "thresholds", found, torch.empty(found.shape))


@defense(
    "sdim",
    readouts=("plain", "reject-1", "reject-2"),
    aliases={"plain": "logits", "reject": "reject-1", "accept": "accept-1"},
    version=2,
    check_params=check_params,
)
class Sdim(nn.Module):
    """A classifier by the likelihood of an image's code, with an encoder that also keeps mutual information.

    Logits are log-likelihoods in nats, of a code under a Gaussian for each class. The read-outs `reject-1`
    and `reject-2` refuse an image whose best logit lies below the 1st or the 2nd percentile of its class: of
    the training images that the network gets right, in evaluation mode, not augmented.

    Defaults are those of the code by the paper's first author, on MNIST; on CIFAR-10 and SVHN it has `n` 3
    and `augment`. The parameters `critic`, `head`, `margin`, `negatives` and `scale_loss` have the paper's
    choice beside the code's (D-13 to D-16, D-48).

    Source: "Supervised Deep InfoMax" (anonymous submission, 2019), its loss and its tables 1 and 8; the first
    author's code as it was at submission.

    Args:
        shape: channels, height, width and classes of the data; images are 32x32.
        n: blocks of each of the encoder's four stages, 1 or more: ResNet 8n+2.
        width: factor of all channels, above 0.
        features: dimensions of the code, 1 or more.
        head: the encoder's last layers: ``two-layer`` as released, ``linear`` as printed (D-14).
        covariance: of a class's Gaussian: ``diagonal`` as released, or ``isotropic`` (D-13).
        critic: what scores pairs of local maps and codes: ``dot`` as released, ``concat`` as printed (D-15).
        negatives: pairs that do not belong together: ``all`` of a batch or those of one ``shuffle``; None
            takes all for ``dot`` and a shuffle for ``concat`` (D-48).
        margin: the classes that the margin term is averaged over: ``code`` all, ``paper`` the wrong ones.
        margin_gap: how far below the true class the wrong ones should be, 0 or more, in the loss's units.
        scale_loss: divide log-likelihoods by `features` in the supervised terms, as released (D-16).
        mi_weight: weight of J_MI, the paper's alpha, 0 or more.
        nll_weight: weight of J_NLL, the paper's beta, 0 or more.
        margin_weight: weight of J_LM, the paper's gamma, 0 or more.
        epochs: passes over the training images, 1 or more; 0 with `weights` trains nothing.
        batch: images of a step, 2 or more.
        lr: learning rate of Adam, above 0.
        augment: flip and crop training images, see `defenses.nets.training.augmented`.
        keep: the weights that stay: of the ``best`` epoch, by its mean training loss, or of the ``last``.
        weights: a file of this defense's (or its network's) state to start from; None starts afresh.
        thresholds: where thresholds come from: ``fit`` takes them from the training images, ``weights`` from
            the file, which is for `epochs` 0.
    """

    thresholds: Tensor
    calibrated: Tensor
    guides: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        n: Count = 1,
        width: Positive = 1.0,
        features: Count = 64,
        head: encoder.Head = "two-layer",
        covariance: infomax.Covariance = "diagonal",
        critic: infomax.CriticName = "dot",
        negatives: infomax.Negatives | None = None,
        margin: infomax.MarginForm = "code",
        margin_gap: NonNegative = 10.0,
        scale_loss: bool = True,
        mi_weight: NonNegative = 1.0,
        nll_weight: NonNegative = 1.0,
        margin_weight: NonNegative = 1.0,
        epochs: NonNegativeCount = 500,
        batch: Count = 128,
        lr: Positive = 1e-3,
        augment: bool = False,
        keep: best_epoch.Keep = "best",
        weights: ContentPath | None = None,
        thresholds: Literal["fit", "weights"] = "fit",
    ) -> None:
        super().__init__()
        encoder.check_shape(shape)
        self.network = infomax.Infomax(
            encoder.Encoder(shape.channels, features, n=n, width=width, head=head),
            shape.classes,
            covariance=covariance,
            critic=critic,
            negatives=negatives,
        )
        self.margin, self.margin_gap = margin, margin_gap
        self.scale = float(features) if scale_loss else 1.0
        self.mi_weight, self.nll_weight, self.margin_weight = mi_weight, nll_weight, margin_weight
        self.recipe = trainings.Recipe(epochs=epochs, batch=batch, lr=lr, augment=augment)
        self.keep = keep
        self.weights, self.thresholds_from = weights, thresholds
        self.rows = 1024
        """Training images at once, where thresholds are taken; changes no result."""
        self.register_buffer("thresholds", torch.zeros(len(SHARES), shape.classes))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("guides", torch.zeros(shape.classes, *shape[:3]))

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Load what `weights` names, train, and take the thresholds.

        Args:
            train: the training images.
            fitting: batches and draws.

        Raises:
            InputError: a class has no training image that could give its threshold, or the file of weights
                does not fit.
        """
        if self.thresholds_from == "fit":
            self._expect_every_class(train.labels)
        if self.weights is not None:
            self._load(Path(self.weights), fitting)
        best_epoch.train(
            self.network, train, fitting, lambda x, y, _: self.loss(x, y), self.recipe, self.keep
        )
        self.eval()
        if self.thresholds_from == "fit":
            self.calibrate(train.images, train.labels)

    def _expect_every_class(self, labels: Labels) -> None:
        """Raise `InputError` for a class without an image: before a training, not after it."""
        missing = sorted(set(range(self.thresholds.shape[1])) - set(labels.tolist()))
        if missing:
            raise InputError(
                f"class {missing[0]} has no threshold: there is no training image of it; add some, or leave "
                "the class out"
            )

    def _load(self, file: Path, fitting: Fitting) -> None:
        prefix = "network." if any(name.startswith("network.") for name in files.read(file)) else ""
        for sentence in files.fill(self.network, file, prefix):
            fitting.note(sentence)
        if self.thresholds_from == "weights":
            self.thresholds.copy_(_thresholds_of(file, self.thresholds.shape[1]))
            guides = files.read(file).get("guides")
            if guides is not None and guides.shape == self.guides.shape:
                self.guides.copy_(files.cast(file, "guides", guides, self.guides))
            self.calibrated.fill_(True)

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Return J_MI + J_NLL + J_LM of a batch, each with its weight, a scalar.

        The supervised terms are those of log-likelihoods over the code's dimensions (D-16).

        Args:
            x: images (N, C, 32, 32) in [0, 1], two or more.
            y: labels (N,).
        """
        maps = self.network.encoder.maps(x)
        likelihoods = self.network.likelihoods(maps.code) / self.scale
        information = infomax.information_loss(self.network.critic(maps))
        nll = infomax.likelihood_loss(likelihoods, y)
        lacking = infomax.margin_loss(likelihoods, y, self.margin_gap, self.margin)
        return self.mi_weight * information + self.nll_weight * nll + self.margin_weight * lacking

    @torch.no_grad()
    def calibrate(self, images: Images, labels: Labels) -> None:
        """Take each class's thresholds from images, and keep its likeliest image as a guide.

        Attacks that match features take the guide.

        Args:
            images: images (N, C, 32, 32) in [0, 1], on any device.
            labels: labels (N,).

        Raises:
            InputError: of a class no image is there, or none is classified correctly.
        """
        self._expect_every_class(labels)
        device = self.thresholds.device
        likelihoods = torch.cat([self.network(each.to(device)) for each in images.split(self.rows)])
        labels = labels.to(device)
        for row, share in enumerate(SHARES):
            for label, threshold in infomax.thresholds(likelihoods, labels, share):
                if threshold is None:
                    count = int((labels == label).sum())
                    raise InputError(
                        f"class {label} has no threshold: none of its {count} training images is classified "
                        "correctly; train longer (epochs), with more width, or on more images"
                    )
                self.thresholds[row, label] = threshold
        for label, best in enumerate(infomax.likeliest(likelihoods, labels)):
            self.guides[label] = images[best]
        self.calibrated.fill_(True)

    @view("logits", exact_for=("plain",))
    def logits(self) -> View:
        """Return the view of the log-likelihoods (N, K), in nats."""
        return View(self.network)

    @view("scaled", exact_for=("plain",))
    def scaled(self) -> View:
        """Return the view of the log-likelihoods over the code's dimensions, the scale of the training.

        In nats the gaps are so large that the cross-entropy's gradient is 0 in float32.
        """
        return View(lambda x: self.network(x) / self.network.features)

    @view("features", space="features", exact_for=("plain",))
    def features(self) -> View:
        """Return the view of the log-likelihoods and of the code (N, features) that they are of."""
        kept = bool(self.calibrated) and bool(self.guides.any())

        def described(x: Images) -> Described:
            code = self.network.encoder(x)
            return Described(self.network.likelihoods(code), code)

        return Features(
            self.network,
            described=described,
            centres=self.network.means,
            guides=self.guides if kept else None,
        )

    @view("reject-1", exact_for=("reject-1",))
    def reject_1(self) -> View:
        """Return the view of the log-likelihoods and, as the refusal's logit, the best class's threshold."""
        return self._reject(0)

    @view("reject-2", exact_for=("reject-2",))
    def reject_2(self) -> View:
        """Return the view of the log-likelihoods and, as the refusal's logit, the best class's threshold."""
        return self._reject(1)

    @view("accept-1")
    def accept_1(self) -> View:
        """Return the view of how far each log-likelihood is above its class's threshold.

        An image is accepted as a class where that is positive. The arg-max is not the answer's, and the
        level matters.
        """
        return self._accept(0)

    @view("accept-2")
    def accept_2(self) -> View:
        """Return the view of how far each log-likelihood is above its class's threshold.

        An image is accepted as a class where that is positive. The arg-max is not the answer's, and the
        level matters.
        """
        return self._accept(1)

    def _reject(self, row: int) -> View:
        floor = self._floor(row)

        def logits(x: Images) -> Tensor:
            likelihoods: Tensor = self.network(x)
            return torch.cat((likelihoods, floor.to(x.dtype)[likelihoods.argmax(1), None]), 1)

        return View(logits, refusal=True)

    def _accept(self, row: int) -> View:
        floor = self._floor(row)
        return View(lambda x: self.network(x) - floor.to(x.dtype), centred=False)

    def _floor(self, row: int) -> Tensor:
        """Return one percentile's thresholds, (K,)."""
        if not self.calibrated:
            raise InputError(
                "these weights of sdim have no thresholds, so that nothing can be refused or accepted: fit "
                "the defense, with weights: and epochs: 0 if it is trained"
            )
        return self.thresholds[row]

    @torch.no_grad()
    def decide(self, x: Images, readout: str, /) -> Decision:
        """Return the likeliest class; refuse where its likelihood lies below the class's threshold.

        Args:
            x: images (N, C, 32, 32) in [0, 1].
            readout: ``plain`` never refuses; ``reject-1`` and ``reject-2`` have the thresholds of the 1st and
                the 2nd percentile.
        """
        likelihoods: Tensor = self.network(x)
        best, label = likelihoods.max(1)
        if readout == "plain":
            return Decision(label, torch.zeros_like(label, dtype=torch.bool), best, likelihoods)
        floor = self._floor(0 if readout == "reject-1" else 1)
        above = best - floor[label]
        return Decision(label, best < floor[label], above, likelihoods, floor)

"""The network of SDIM: an encoder, class-conditional Gaussians of its code, and two critics to choose from.

Both critics, and the terms of the loss, as functions of what they are defined on.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from bench import Images, Labels
from defenses.nets.sdim.encoder import Encoder, Maps

CriticName: TypeAlias = Literal["dot", "concat"]
Negatives: TypeAlias = Literal["all", "shuffle"]
Covariance: TypeAlias = Literal["diagonal", "isotropic"]
MarginForm: TypeAlias = Literal["code", "paper"]


class Pairs(NamedTuple):
    """Scores of pairs of a local map and a code, at each position: (pairs, positions)."""

    own: Tensor
    """Of an image's own map and code."""
    foreign: Tensor
    """Of one image's map and another's code."""


class Projection(nn.Module):
    """A net of 1x1 convolutions beside a shortcut that starts near the identity, layer-normalised.

    Args:
        inputs: channels of the map.
        units: dimensions of the projection.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, units, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(units)
        self.conv2 = nn.Conv2d(units, units, 1)
        self.shortcut = nn.Conv2d(inputs, units, 1, bias=False)
        self.norm = nn.LayerNorm(units)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01)
            for each in range(min(inputs, units)):
                self.shortcut.weight[each, each] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, positions, units) of a map (N, inputs, H, W)."""
        out = self.conv2(relu(self.norm1(self.conv1(x)))) + self.shortcut(x)
        normal: Tensor = self.norm(out.flatten(2).transpose(1, 2))
        return normal


class DotCritic(nn.Module):
    """Encode and dot, as released (D-15): the product of both projections, of the second stage's map.

    Args:
        encoder: gives the sizes of maps and codes.
        negatives: ``all`` other codes of a batch, or those of one ``shuffle``.
    """

    def __init__(self, encoder: Encoder, negatives: Negatives) -> None:
        super().__init__()
        units = encoder.widths[-1]
        self.code = Projection(encoder.outputs, units)
        self.local = Projection(encoder.widths[1], units)
        self.negatives = negatives

    def forward(self, maps: Maps) -> Pairs:
        """Return the scores of all pairs of a batch, or of those of one shuffle.

        Args:
            maps: maps and codes of a batch of two images or more.
        """
        code = self.code(maps.code[:, :, None, None]).squeeze(1)
        scores = torch.einsum("iu,jpu->ijp", code, self.local(maps.second))
        own = torch.einsum("iip->ip", scores)
        if self.negatives == "all":
            return Pairs(own, off_diagonal(scores))
        return Pairs(own, scores[torch.arange(len(own), device=own.device), others(len(own), own.device)])


class ConcatCritic(nn.Module):
    """Concatenate and convolve, as printed (table 8): three 1x1 convolutions of the last map and the code.

    Args:
        encoder: gives the sizes of maps and codes.
        negatives: ``all`` other maps of a batch, or those of one ``shuffle``.
    """

    def __init__(self, encoder: Encoder, negatives: Negatives) -> None:
        super().__init__()
        units = encoder.widths[-1]
        self.net = nn.Sequential(
            *(nn.Conv2d(units + encoder.outputs, units, 1), nn.ReLU()),
            *(nn.Conv2d(units, units, 1), nn.ReLU()),
            nn.Conv2d(units, 1, 1),
        )
        self.negatives = negatives

    def score(self, local: Tensor, code: Tensor) -> Tensor:
        """Return (N, positions) of maps (N, channels, H, W) and codes (N, features), pair by pair."""
        spread = code[:, :, None, None].expand(-1, -1, *local.shape[2:])
        scores: Tensor = self.net(torch.cat((local, spread), 1)).flatten(1)
        return scores

    def forward(self, maps: Maps) -> Pairs:
        """Return the scores of one shuffle of the local maps, or of all pairs of a batch.

        Args:
            maps: maps and codes of a batch of two images or more.
        """
        local, code = maps.last, maps.code
        count = len(code)
        if self.negatives == "shuffle":
            foreign = self.score(local[others(count, code.device)], code)
            return Pairs(self.score(local, code), foreign)
        # All codes against the first map, then against the second, and so on.
        scores = self.score(local.repeat_interleave(count, 0), code.repeat(count, 1))
        scores = scores.view(count, count, -1)
        return Pairs(torch.einsum("iip->ip", scores), off_diagonal(scores))


class Infomax(nn.Module):
    """The encoder, the critic, and for each class a Gaussian of the code: means and log deviations.

    The table of Gaussians starts as N(0, 1), as torch's embeddings do.

    Args:
        encoder: images to codes and maps.
        classes: the number of classes.
        covariance: ``diagonal`` gives a class a deviation for each dimension, ``isotropic`` one for all
            (D-13).
        critic: what scores pairs of local maps and codes: ``dot`` as released, ``concat`` as printed (D-15).
        negatives: pairs that do not belong together: ``all`` of a batch, or those of one ``shuffle``; None
            takes all for ``dot`` and a shuffle for ``concat`` (D-48).
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        covariance: Covariance,
        critic: CriticName,
        negatives: Negatives | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.critic: DotCritic | ConcatCritic
        if critic == "dot":
            self.critic = DotCritic(encoder, negatives or "all")
        else:
            self.critic = ConcatCritic(encoder, negatives or "shuffle")
        self.features = encoder.outputs
        columns = 2 * self.features if covariance == "diagonal" else self.features + 1
        self.gaussians = nn.Embedding(classes, columns)

    def forward(self, x: Images) -> Tensor:
        """Return log p(code | class), (N, K) in nats, without a bound above.

        Args:
            x: images (N, C, 32, 32) in [0, 1].
        """
        return self.likelihoods(self.encoder(x))

    @property
    def means(self) -> Tensor:
        """The mean of each class's Gaussian, (K, features)."""
        return self.gaussians.weight[:, : self.features]

    def likelihoods(self, code: Tensor) -> Tensor:
        """Return the log density (N, K), in nats, of codes (N, features) under each class.

        Args:
            code: codes (N, features).
        """
        mean, deviation = self.gaussians.weight.tensor_split([self.features], 1)
        # Isotropic: one column for all dimensions.
        deviation = deviation.expand_as(mean)
        distance = (code[:, None] - mean).square() * torch.exp(-2 * deviation)
        return -0.5 * distance.sum(2) - deviation.sum(1) - 0.5 * math.log(2 * math.pi) * self.features


def others(count: int, device: torch.device) -> Tensor:
    """Return, for each of at least two images, another one: a random permutation in one cycle.

    A plain permutation leaves one image in place on average, which would count a pair of its own as
    foreign.

    Args:
        count: number of images, 2 or more.
        device: where the result shall lie.

    Returns:
        int64 (count,), drawn from torch's global generator.
    """
    order = torch.randperm(count)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner.to(device)


def off_diagonal(scores: Tensor) -> Tensor:
    """Return (B * (B - 1), P) of scores (B, B, P): those of unequal first and second place.

    Args:
        scores: of all pairs, (B, B, P).
    """
    count, _, positions = scores.shape
    # Without the first, every B + 1 of the flat list end in one of the diagonal.
    rest = scores.reshape(count * count, positions)[1:]
    return rest.view(count - 1, count + 1, positions)[:, :-1].flatten(0, 1)


def information_loss(pairs: Pairs) -> Tensor:
    """Return J_MI, minus the Jensen-Shannon bound of mutual information; 0 for scores of 0.

    The mean over foreign pairs of softplus(-u) + u - log 2, less that over own pairs of log 2 -
    softplus(-u) (Hjelm et al. 2019, arXiv:1808.06670, equation 4).

    Args:
        pairs: scores of pairs that belong together, and of pairs that do not.

    Returns:
        A scalar, never below -2 log 2.
    """
    foreign = softplus(pairs.foreign).mean() - math.log(2)
    own = math.log(2) - softplus(-pairs.own).mean()
    return foreign - own


def likelihood_loss(likelihoods: Tensor, y: Labels) -> Tensor:
    """Return J_NLL, minus the mean log-likelihood of the true class; without a bound below.

    Args:
        likelihoods: log-likelihoods (N, K).
        y: labels (N,).
    """
    return -likelihoods.gather(1, y[:, None]).mean()


def margin_loss(likelihoods: Tensor, y: Labels, gap: float, form: MarginForm) -> Tensor:
    """Return J_LM: the mean square of what wrong classes lack of being `gap` below the true one.

    Args:
        likelihoods: log-likelihoods (N, K).
        y: labels (N,).
        gap: how far below the true class the wrong ones should be, 0 or more.
        form: ``paper`` averages over the wrong classes; ``code`` over all, of which the true one adds
            gap^2 / K.
    """
    lacking = relu(likelihoods + gap - likelihoods.gather(1, y[:, None])).square()
    if form == "code":
        return lacking.mean()
    wrong = torch.ones_like(lacking).scatter_(1, y[:, None], 0)
    return (lacking * wrong).sum() / wrong.sum()


def likeliest(likelihoods: Tensor, y: Labels) -> list[int]:
    """Return for each class the index of its likeliest image among those that are classified correctly.

    Args:
        likelihoods: log-likelihoods (N, K).
        y: labels (N,).
    """
    right = (likelihoods.argmax(1) == y)[:, None]
    own = right & (y[:, None] == torch.arange(likelihoods.shape[1], device=y.device))
    return [int(each) for each in likelihoods.masked_fill(~own, -math.inf).argmax(0)]


def thresholds(likelihoods: Tensor, y: Labels, share: float) -> Iterator[tuple[int, Tensor | None]]:
    """Yield for each class the log-likelihood that `share` of its correctly classified images lie below.

    Args:
        likelihoods: log-likelihoods (N, K).
        y: labels (N,).
        share: a share of the images, from 0 to below 1.

    Yields:
        The class, and of the ascending likelihoods of its n correct images that at int(share * n), without
        interpolation; None where there are none.
    """
    right = likelihoods.argmax(1) == y
    for label in range(likelihoods.shape[1]):
        own = likelihoods[right & (y == label), label].sort().values
        yield label, own[int(share * len(own))] if len(own) else None

"""What confidence scores tell: the order in which answers would be refused, at every threshold at once.

A higher score is a surer answer. Equal scores stand and fall together, since no threshold parts them.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]

ALLOWED = 5
"""Percent of the right answers, or of the clean images, that the threshold of `fpr_at_95` refuses at most."""


class Curve(NamedTuple):
    """The risk-coverage curve (El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017)."""

    coverage: Numbers
    """Shape (N,): the share of the examples that are accepted, 1/N to 1, the surest first."""
    risk: Numbers
    """Shape (N,): the selective risk, which is the share of wrong answers among those that are accepted."""


def risk_coverage(sure: Numbers, wrong: Numbers) -> Curve:
    """Return the selective risk at every coverage.

    Args:
        sure: Shape (N,), N > 0: the score of each answer; no NaN.
        wrong: Shape (N,): 1 where the answer is wrong, 0 where it is right.

    Returns:
        The curve. Within equal scores it is the mean over all orders, so that the order of the examples does
        not matter.
    """
    _, place, sizes = np.unique(-sure, return_inverse=True, return_counts=True)
    shares = np.bincount(place, wrong) / sizes
    accepted = np.arange(1, len(sure) + 1)
    return Curve(accepted / len(sure), np.cumsum(np.repeat(shares, sizes)) / accepted)


def aurc(sure: Numbers, wrong: Numbers) -> float:
    """Return the area under the risk-coverage curve: the mean of the selective risk over all coverages.

    Args:
        sure: Shape (N,), N > 0: the score of each answer; no NaN.
        wrong: Shape (N,): 1 where the answer is wrong, 0 where it is right.

    Returns:
        The area, in [0, 1].
    """
    return float(risk_coverage(sure, wrong).risk.mean())


def least_aurc(wrong: Numbers) -> float:
    """Return the area under the risk-coverage curve of scores that put every wrong answer last.

    The excess of an area over it is E-AURC (Geifman, Uziel and El-Yaniv 2019).

    Args:
        wrong: Shape (N,), N > 0: 1 where the answer is wrong, 0 where it is right.

    Returns:
        The area, in [0, 1]: no order of the same answers has a smaller one.
    """
    return aurc(-wrong, wrong)


def aurc_influence(sure: Numbers, wrong: Numbers) -> Numbers:
    """Return the influence of each example on the area under the risk-coverage curve.

    Args:
        sure: Shape (N,), N > 0: the score of each answer; no NaN.
        wrong: Shape (N,): 1 where the answer is wrong, 0 where it is right.

    Returns:
        Shape (N,), of mean 0: the area's derivative by the weight of the example (Hampel 1974).
    """
    _, place, sizes = np.unique(-sure, return_inverse=True, return_counts=True)
    accepted = np.cumsum(sizes)
    risk = np.cumsum(np.bincount(place, wrong)) / accepted
    # Of all thresholds, those at which the example is accepted: of its own score and of smaller ones.
    share = np.cumsum((sizes / accepted)[::-1])[::-1]
    weighed = np.cumsum((sizes / accepted * risk)[::-1])[::-1]
    own = risk[place] - float((sizes * risk).sum()) / len(sure)
    return np.asarray(own + wrong * share[place] - weighed[place], np.float64)


def least_influence(wrong: Numbers) -> Numbers:
    """Return the influence of each example on the least area that its error rate allows.

    Args:
        wrong: Shape (N,), N > 0: 1 where the answer is wrong, 0 where it is right.

    Returns:
        Shape (N,), of mean 0. For many examples that area is r + (1 - r) log(1 - r), r the share of wrong
        answers, whose derivative by r is -log(1 - r).
    """
    rate = float(wrong.mean())
    # Where all are wrong, no example differs from the rate.
    slope = 0.0 if rate == 1 else -float(np.log1p(-rate))
    return slope * (wrong - rate)


def placements(values: Numbers, among: Numbers) -> Numbers:
    """Return the share of other scores that lie below each score; equal ones count by half.

    Args:
        values: Shape (M,): scores; no NaN.
        among: Shape (K,), K > 0: the others; no NaN.

    Returns:
        Shape (M,), in [0, 1]. Their mean is the AUROC of `values` as positives and `among` as negatives
        (Mann and Whitney 1947; Bamber 1975).
    """
    ordered = np.sort(among)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(below / (2 * len(ordered)), np.float64)


def threshold(positive: Numbers, below: int) -> float:
    """Return the threshold at which some of the positives are refused at most.

    Args:
        positive: Shape (M,), M > 0: the scores of what should be accepted; no NaN.
        below: How many of them may lie below the threshold; below 0 the threshold is -inf.

    Returns:
        The greatest threshold that allows it; scores that equal it are accepted.
    """
    if below < 0:
        return -np.inf
    return float(np.sort(positive)[below]) if below < len(positive) else np.inf


def accepted_share(values: Numbers, least: float) -> float:
    """Return the share of scores that a threshold accepts.

    Args:
        values: Shape (K,), K > 0: scores; no NaN.
        least: The threshold; a score that equals it is accepted, so that -inf accepts everything.

    Returns:
        The share, in [0, 1].
    """
    return float((values >= least).mean())


def fpr_at_95(positive: Numbers, negative: Numbers) -> float:
    """Return the false-positive rate at the greatest threshold whose true-positive rate is at least 95 %.

    Args:
        positive: Shape (M,), M > 0: the scores of what should be accepted; no NaN.
        negative: Shape (K,), K > 0: the scores of what should be refused; no NaN.

    Returns:
        The share of the negatives that are accepted (Liang, Li and Srikant 2018).
    """
    return accepted_share(negative, threshold(positive, len(positive) * ALLOWED // 100))

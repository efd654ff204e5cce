"""Metrics: rules that turn outcomes into a value for each example, and values into estimates.

NaN means that an example does not count. The worst over attacks is taken example by example, seeds are
averaged last, and intervals count the examples of one seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from inspect import signature
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.errors import InputError, did_you_mean
from bench.results import ranking
from bench.results.outcomes import BROKEN_SHARE, Frame, Rows, select

Values: TypeAlias = NDArray[np.float64]
"""Shape (N,): a value for each example; NaN where the example does not count. Of a metric of all examples
together shape (N, 2): what its statistic needs of each."""

Mask: TypeAlias = NDArray[np.bool_]
On: TypeAlias = Literal["every", "common"]
"""The examples of a worst case: all that any of its attacks saw, or those that every one saw."""

CONFIDENCE = 0.95
"""Confidence level of the intervals in tables."""

ROUNDING = 1e-6
"""Tolerance for a distance at the radius that it is read at: images are float32, radii are numbers like
8/255."""


# --- rules for one example ---------------------------------------------------------------------------


def is_correct(rows: Frame) -> Mask:
    """Return whether the defense was right on the image that it was shown.

    A refusal is right where the image was moved (a distance above 0, not invalid), and wrong elsewhere.
    After an invalid move the defense was shown the clean image. An answer that is not finite (label -1) is
    wrong.

    Args:
        rows: Outcomes of N examples: ``label``, ``truth``, ``distance``, ``invalid``, ``rejected``.

    Returns:
        Shape (N,).
    """
    label = np.asarray(rows["label"])
    right = label == np.asarray(rows["truth"])
    moved = (np.asarray(rows["distance"]) > 0) & ~np.asarray(rows["invalid"], np.bool_)
    held = np.where(np.asarray(rows["rejected"], np.bool_), moved, right)
    return np.asarray(held & (label >= 0), np.bool_)


def is_refused(rows: Rows) -> Mask:
    """Return whether the defense refused to answer; an answer that is not finite (label -1) is no refusal.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,). Accepted and right, accepted and wrong, and refused are all examples, each once.
    """
    return np.asarray(rows["rejected"] & (rows["label"] >= 0), np.bool_)


def is_wrong(rows: Rows) -> Mask:
    """Return whether the label is another than the true one, whether or not the defense refused.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,): also true where the answer is not finite.
    """
    return np.asarray(rows["label"] != rows["truth"], np.bool_)


def confidence(rows: Rows) -> Values:
    """Return how sure the defense is of each answer.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,): the score, -inf where there is none (NaN), so that no threshold accepts it sooner than
        another answer.
    """
    return np.where(np.isnan(rows["score"]), -math.inf, rows["score"])


def held_share(rows: Rows) -> Values:
    """Return how often the defense was right on the image that it was shown.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,): of a random defense that was asked several times the share of its draws, else 1 or 0.
    """
    return 1 - rows[BROKEN_SHARE] if BROKEN_SHARE in rows else is_correct(rows).astype(np.float64)


def goal_reached(rows: Rows) -> Mask:
    """Return whether the label is what the attacker wants, whether or not the defense refused.

    The attacker wants the target, or any wrong label where there is none. An answer that is not finite is
    neither.

    Args:
        rows: Outcomes of N examples.

    Returns:
        Shape (N,).
    """
    untargeted = np.isnan(rows["target"])
    goal = np.where(untargeted, rows["label"] != rows["truth"], rows["label"] == rows["target"])
    return np.asarray(goal & (rows["label"] >= 0), np.bool_)


def within(rows: Rows, clean: Rows, radius: float) -> Rows:
    """Read the outcomes of a minimum-norm attack at a radius.

    Where the attack moved an image further than the radius it failed, and the answer to the clean image
    counts.

    Args:
        rows: Outcomes of the attack.
        clean: Outcomes of the same defense on unmoved images.
        radius: The radius, in the norm of ``distance``.

    Returns:
        Outcomes of the examples that are in both.
    """
    rows, clean = shared(rows, clean)
    near = rows["distance"] <= radius + ROUNDING
    if BROKEN_SHARE in rows:
        # A defense that was asked once about the clean image has an answer, and no share.
        clean = {**clean, BROKEN_SHARE: 1 - held_share(clean)}

    def read(values: NDArray[Any], still: NDArray[Any]) -> NDArray[Any]:
        return np.where(near.reshape(-1, *[1] * (values.ndim - 1)), values, still)

    return {name: read(values, clean.get(name, values)) for name, values in rows.items()}


def shared(rows: Rows, other: Rows) -> tuple[Rows, Rows]:
    """Return two sets of outcomes on the examples that are in both.

    Args:
        rows: Outcomes, in ascending order of ``index``.
        other: Outcomes of the same data set, in the same order.

    Returns:
        The rows of each, in ascending order of ``index``.
    """
    _, here, there = np.intersect1d(rows["index"], other["index"], assume_unique=True, return_indices=True)
    return select(rows, here), select(other, there)


def least_distance(rows: Rows, clean: Rows | None = None) -> Values:
    """Return how far each image was moved to break the defense.

    Args:
        rows: Outcomes of N examples.
        clean: Outcomes of the same defense on the same examples, unmoved; None where there are none.

    Returns:
        Shape (N,): the distance, infinite where the defense was right; 0 where it is wrong on the clean
        image.
    """
    moved = np.where(rows["invalid"], 0.0, rows["distance"])
    least = np.where(is_correct(rows), math.inf, moved)
    return least if clean is None else np.where(is_correct(clean), least, 0.0)


def held_at(rows: Rows, clean: Rows | None, radius: float) -> Values:
    """Return how often the defense holds an image against an attack that moves as little as it can.

    Args:
        rows: Outcomes of N examples.
        clean: Outcomes of the same defense on the same examples, unmoved; None where there are none.
        radius: The radius that the attacker has, in the norm of ``distance``; may be infinite.

    Returns:
        Shape (N,): 0 or 1, of a random defense with several draws the share of them. An image that had to
        be moved further than the radius is held; one that breaks unmoved is not.
    """
    moved = np.where(rows["invalid"], 0.0, rows["distance"])
    held = np.where(moved > radius + ROUNDING, 1.0, held_share(rows))
    return held if clean is None else np.minimum(held, held_share(clean))


# --- metrics by name ---------------------------------------------------------------------------------

Score: TypeAlias = Callable[..., Values]
"""A metric's function: it gets an attack's rows and the rows of the same examples unmoved (or None), and
returns a value for each example.

A metric of a class has the keyword `label`, too.
"""

Statistic: TypeAlias = Callable[[Values, NDArray[np.int64]], tuple[float, float, float] | None]
"""A number of all examples together, such as an area: it gets what is known of each example, (N, 2), and the
places of the examples in the data set, (N,), and returns the number with both ends of its interval; None
where it is not defined. An example with several targets is there several times.
"""

Unit: TypeAlias = Literal["percent", "distance", "number", "millions"]
"""The unit in which a number is printed."""

Summary: TypeAlias = Literal["share", "mean", "median", "constant", "rank"]
"""How the values of examples become one number: the mean of values in [0, 1] (share) or of any values
(mean), their median, the value that all of them have (constant), or a statistic of their order (rank)."""

_UNITS: Mapping[Summary, Unit] = {
    "share": "percent",
    "mean": "number",
    "median": "distance",
    "constant": "number",
    "rank": "percent",
}


@dataclass(frozen=True)
class Metric:
    """A number that a table may show."""

    name: str
    """What task files call it."""
    says: str
    """What is counted, for captions."""
    score: Score
    """The function."""
    worst: Literal["least", "greatest"] | None
    """Which value an attacker prefers; None where there is no worst over attacks."""
    clean: Literal["needed", "used", "unused"]
    """Whether the defense's answers to unmoved images are needed, used where they are there, or not used."""
    summary: Summary
    unit: Unit
    reads: tuple[str, ...]
    """The columns of outcomes that it reads beside those that every table reads."""
    by_class: bool
    """Whether it is of one class, which the table names."""
    draws: bool = False
    """Whether an example's value is its mean over the draws of a random defense; else the first draw's."""
    label: int | None = None
    """That class."""
    statistic: Statistic | None = None
    """What becomes of all examples together, where the summary is a rank."""

    def of(self, label: int | None) -> "Metric":
        """Return the metric of one class.

        Args:
            label: The class, from 0; None where the table names none.

        Returns:
            The metric with its class.

        Raises:
            InputError: No class is given.
        """
        if label is None:
            raise InputError(f"{self.name} is of a class: say which, such as class: 3")
        return replace(self, score=partial(self.score, label=label), label=label)

    def lacks(self, rows: Rows) -> str | None:
        """Return what is missing from outcomes that the metric reads.

        Args:
            rows: Outcomes.

        Returns:
            What is missing, in words; None where nothing is.
        """
        for name in self.reads:
            if name not in rows:
                return f"no {name}: the read-out gives none, or the outcomes are older than the column"
            if self.label is not None and self.label >= rows[name].shape[1]:
                return f"no class {self.label}: there are {rows[name].shape[1]}"
        return None


METRICS: dict[str, Metric] = {}
"""What a table's `metric` may name."""


def metric(  # noqa: PLR0913 - all that tables and captions know of a metric
    name: str,
    says: str,
    *,
    worst: Literal["least", "greatest"] | None,
    clean: Literal["needed", "used", "unused"] = "unused",
    summary: Summary = "share",
    unit: Unit | None = None,
    reads: tuple[str, ...] = (),
    draws: bool = False,
    statistic: Statistic | None = None,
) -> Callable[[Score], Score]:
    """Register a function as a metric; tables and their captions need to know no more of it.

    A function with the keyword `label` is a metric of one class, which the table has to name.

    Args:
        name: What task files call it.
        says: What is counted, for captions.
        worst: Which value an attacker prefers; None where there is no worst over attacks.
        clean: Whether the answers to unmoved images are needed, used where they are there, or not used.
        summary: How the values of examples become one number.
        unit: The unit in which the number is printed; None for the usual one of its summary.
        reads: Columns of outcomes that it reads beside those that every table reads.
        draws: Whether an example's value is its mean over the draws of a random defense; else the first
            draw's.
        statistic: What becomes of all examples together, where the summary is a rank; else None.

    Returns:
        A decorator that leaves the function as it is.
    """

    def register(score: Score) -> Score:
        by_class = "label" in signature(score).parameters
        METRICS[name] = Metric(
            name,
            says,
            score,
            worst,
            clean,
            summary,
            unit or _UNITS[summary],
            reads,
            by_class,
            draws,
            statistic=statistic,
        )
        return score

    return register


def named(name: str) -> Metric:
    """Return a metric by its name.

    Args:
        name: What task files call it.

    Returns:
        The metric.

    Raises:
        InputError: There is no such metric.
    """
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}")
    return METRICS[name]


@metric("accuracy", "right on the adversarial input alone, as the papers count", worst="least", draws=True)
def accuracy(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense is right under attack; its answer to the clean image does not matter.

    Of a random defense with several draws it is the share of them in which it is right.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return held_share(rows)


@metric(
    "robust",
    "right on the clean input and on the adversarial one",
    worst="least",
    clean="needed",
    draws=True,
)
def robust(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense is right on the clean image and under attack.

    Of a random defense with several draws it is the lesser of both shares: of two images, the attacker
    submits the one that is right less often.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    assert clean is not None
    return np.minimum(held_share(rows), held_share(clean))


@metric(
    "success",
    "accepted answers that the attacker wants, among the examples that are right when clean",
    worst="greatest",
    clean="needed",
)
def success(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the attacker gets an accepted answer that it wants.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): NaN where the defense is wrong on the clean image.
    """
    assert clean is not None
    won = goal_reached(rows) & ~rows["rejected"]
    return np.where(is_correct(clean), won.astype(np.float64), math.nan)


@metric("rejection", "refused inputs", worst=None)
def rejection(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense refuses, rightly or wrongly.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return is_refused(rows).astype(np.float64)


@metric("coverage", "accepted inputs", worst=None)
def coverage(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense answers, rightly or wrongly.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return 1 - is_refused(rows).astype(np.float64)


@metric("accepted_right", "right answers that are accepted: refusals count as wrong", worst="least")
def accepted_right(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense answers and is right, on the input that it was shown alone.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return (~is_refused(rows) & ~is_wrong(rows)).astype(np.float64)


@metric("accepted_wrong", "wrong answers that are accepted", worst="greatest")
def accepted_wrong(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense answers and is wrong, whatever an attacker wants.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return (~is_refused(rows) & is_wrong(rows)).astype(np.float64)


@metric(
    "robust_accepted",
    "right and accepted on the clean input and on the adversarial one: refusals count as wrong",
    worst="least",
    clean="needed",
)
def robust_accepted(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense answers, and is right, on the clean image and under attack.

    `robust` is the same with refusals of moved images counted as right.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    assert clean is not None
    return np.minimum(accepted_right(rows, None), accepted_right(clean, None))


@metric("detection", "refused inputs, among those whose answer is what the attacker wants", worst=None)
def detection(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where the defense refuses an answer that the attacker wants.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): NaN where the answer is another one.
    """
    return np.where(goal_reached(rows), rows["rejected"].astype(np.float64), math.nan)


@metric("selective", "right answers, among the accepted ones", worst=None)
def selective(rows: Rows, clean: Rows | None) -> Values:
    """Return 1 where an accepted answer is right.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): NaN where the defense refuses.
    """
    return np.where(is_refused(rows), math.nan, (~is_wrong(rows)).astype(np.float64))


@metric(
    "distance",
    "median distance that breaks the defense, over all examples (∞: fewer than half are broken)",
    worst="least",
    clean="used",
    summary="median",
)
def distance(rows: Rows, clean: Rows | None) -> Values:
    """Return the distance that breaks the defense.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): infinite where it is not broken, 0 where it is wrong on the clean image.
    """
    return least_distance(rows, clean)


@metric(
    "top5",
    "the true class is among the five with the largest logits",
    worst="least",
    reads=("logits",),
)
def top5(rows: Rows, clean: Rows | None) -> Values:
    """Return whether the true class is among the five with the largest logits.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): 1 or 0. Equal logits of other classes count as larger; a true one that is not finite
        counts as wrong.
    """
    logits = rows["logits"]
    own = logits[np.arange(len(logits)), rows["truth"]]
    others = (logits >= own[:, None]).sum(axis=1) - 1
    return np.asarray(np.isfinite(own) & (others < 5), np.float64)


@metric(
    "class_accuracy",
    "right on the adversarial input alone, of the examples of one class",
    worst="least",
    draws=True,
)
def class_accuracy(rows: Rows, clean: Rows | None, *, label: int) -> Values:
    """Return whether the defense was right, for the examples of one class.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.
        label: The class.

    Returns:
        Shape (N,): as `accuracy`; NaN for examples of other classes.
    """
    return np.where(rows["truth"] == label, held_share(rows), math.nan)


@metric(
    "logit",
    "the read-out's logit of a class, its mean over examples",
    worst=None,
    summary="mean",
    reads=("logits",),
)
def logit(rows: Rows, clean: Rows | None, *, label: int) -> Values:
    """Return the logit of a class.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.
        label: The class.

    Returns:
        Shape (N,).
    """
    return np.asarray(rows["logits"][:, label], np.float64)


@metric(
    "threshold",
    "the logit below which the read-out refuses a class",
    worst=None,
    summary="constant",
    reads=("thresholds",),
)
def threshold(rows: Rows, clean: Rows | None, *, label: int) -> Values:
    """Return the logit below which the read-out refuses a class.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.
        label: The class.

    Returns:
        Shape (N,).
    """
    return np.asarray(rows["thresholds"][:, label], np.float64)


@metric(
    "top",
    "the largest logit, its mean over examples; of a targeted attack, over those that reach their target",
    worst=None,
    summary="mean",
    reads=("logits",),
)
def top(rows: Rows, clean: Rows | None) -> Values:
    """Return the largest logit.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): NaN where the attack has a target and did not reach it.
    """
    failed = ~np.isnan(rows["target"]) & ~goal_reached(rows)
    return np.where(failed, math.nan, rows["logits"].max(1))


@metric(
    "classwise",
    "classes whose logit is below their threshold, as a share of all classes",
    worst=None,
    reads=("logits", "thresholds"),
)
def classwise(rows: Rows, clean: Rows | None) -> Values:
    """Return the share of classes whose logit is below their threshold.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,): in [0, 1]; NaN where the answer is not finite.
    """
    below = (rows["logits"] < rows["thresholds"]).mean(1)
    return np.where(rows["label"] < 0, math.nan, below)


@metric(
    "parameters",
    "parameters of the defense, parts included, in millions",
    worst=None,
    summary="constant",
    unit="millions",
    reads=("parameters",),
)
def parameters(rows: Rows, clean: Rows | None) -> Values:
    """Return the number of parameters of the defense, its parts included.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N,).
    """
    return rows["parameters"]


# --- metrics of all examples together, from their scores ------------------------------------------------


def _area(
    values: Values, index: NDArray[np.int64], area: float, influence: Values
) -> tuple[float, float, float]:
    """Return an area of the risk-coverage plane with its interval.

    Args:
        values: Shape (N, 2): what is known of each example.
        index: Shape (N,): the places of the examples.
        area: The area, in [0, 1].
        influence: Shape (N,): the influence of each example on it.
    """
    variance = _variance(influence / len(values), index)
    return (area, *_rank_interval(area, variance, len(np.unique(index))))


def _variance(parts: Values, index: NDArray[np.int64]) -> float:
    """Return the infinitesimal jackknife's variance of a statistic.

    Args:
        parts: Shape (N,): the share of each row in how far the statistic is from its mean.
        index: Shape (N,): the place of the row's example: rows of one example stand and fall together.
    """
    _, place = np.unique(index, return_inverse=True)
    return float(np.square(np.bincount(place, parts)).sum())


def _rank_interval(value: float, variance: float, n: int) -> tuple[float, float]:
    """Return Wilson's interval for a statistic in [0, 1], with the n that its variance is worth.

    A normal interval has no width where all answers are alike, and misses errors that are rare. So it is
    never taken for more than `n` examples: where a statistic is better known than a share of them, the
    interval is wider than it has to be.

    Args:
        value: The statistic, in [0, 1].
        variance: Its variance.
        n: The most examples that it may be worth.
    """
    known = value * (1 - value) / variance if variance > 0 and 0 < value < 1 else n
    return wilson(value, min(n, known))


def _aurc(values: Values, index: NDArray[np.int64]) -> tuple[float, float, float]:
    sure, wrong = values.T
    return _area(values, index, ranking.aurc(sure, wrong), ranking.aurc_influence(sure, wrong))


def _excess_aurc(values: Values, index: NDArray[np.int64]) -> tuple[float, float, float]:
    sure, wrong = values.T
    # No order is better than the best one, but for rounding.
    excess = max(ranking.aurc(sure, wrong) - ranking.least_aurc(wrong), 0.0)
    influence = ranking.aurc_influence(sure, wrong) - ranking.least_influence(wrong)
    return _area(values, index, excess, influence)


class _Sides(NamedTuple):
    """What a detector parts: the scores of both sides, and the places of their examples."""

    positive: Values
    """What should be accepted."""
    here: NDArray[np.int64]
    negative: Values
    """What should be refused."""
    there: NDArray[np.int64]


def _failures(values: Values, index: NDArray[np.int64]) -> _Sides:
    """Return the sides of a detector of wrong answers."""
    sure, wrong = values[:, 0], values[:, 1] > 0
    return _Sides(sure[~wrong], index[~wrong], sure[wrong], index[wrong])


def _against_clean(values: Values, index: NDArray[np.int64]) -> _Sides:
    """Return the sides of a detector of adversarial images."""
    return _Sides(values[:, 0], index, values[:, 1], index)


_Parted: TypeAlias = Callable[[Values, NDArray[np.int64]], _Sides]


def _auroc(parted: _Parted, values: Values, index: NDArray[np.int64]) -> tuple[float, float, float] | None:
    """Return the AUROC; None where one of both sides is empty."""
    positive, here, negative, there = parted(values, index)
    if not len(positive) or not len(negative):
        return None
    above, below = ranking.placements(positive, negative), 1 - ranking.placements(negative, positive)
    area = min(max(float(above.mean()), 0.0), 1.0)
    # The variance is DeLong's (1988), of examples that may be on both sides (Obuchowski 1997). Of independent
    # sides it is at most area (1 - area) by example of the smaller one (van Dantzig 1951), which Wilson's
    # interval takes: DeLong's has no width where the sides are parted.
    parts = np.concatenate([(above - area) / len(above), (below - area) / len(below)])
    variance = _variance(parts, np.concatenate([here, there]))
    return (area, *_rank_interval(area, variance, min(len(np.unique(here)), len(np.unique(there)))))


def _fpr95(parted: _Parted, values: Values, index: NDArray[np.int64]) -> tuple[float, float, float] | None:
    """Return the FPR at 95 % TPR; None where one of both sides is empty."""
    positive, here, negative, there = parted(values, index)
    if not len(positive) or not len(negative):
        return None
    # The threshold is uncertain, and so is the share above it: each has half of what may be missed
    # (Bonferroni), however they depend on each other.
    half = (1 + CONFIDENCE) / 2
    n, share = len(np.unique(here)), ranking.ALLOWED / 100
    spread = NormalDist().inv_cdf(0.5 + half / 2) * math.sqrt(n * share * (1 - share))
    several = len(positive) / n
    fewest = math.floor((n * share - spread) * several)
    most = math.ceil((n * share + spread) * several)
    widest = ranking.accepted_share(negative, ranking.threshold(positive, fewest))
    least = ranking.accepted_share(negative, ranking.threshold(positive, most))
    n = len(np.unique(there))
    value = ranking.fpr_at_95(positive, negative)
    return value, wilson(least, n, half)[0], wilson(widest, n, half)[1]


def _graded(rows: Rows) -> Values:
    """Return the confidence in each answer, and 1 where it is wrong: (N, 2)."""
    return np.stack([confidence(rows), is_wrong(rows).astype(np.float64)], 1)


def _adversarial(rows: Rows, clean: Rows | None) -> Values:
    """Return the confidence in the clean answer and in the adversarial one: (N, 2).

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved.

    Returns:
        NaN where nothing was to be won, or the attack did not move the image to an answer that it wants.
    """
    assert clean is not None
    moved = (rows["distance"] > 0) & ~rows["invalid"]
    counted = ~is_wrong(clean) & moved & goal_reached(rows)
    return np.where(counted[:, None], np.stack([confidence(clean), confidence(rows)], 1), math.nan)


@metric(
    "aurc",
    "area under the risk-coverage curve: the share of wrong answers among those accepted by the score, its "
    "mean over all coverages",
    worst="greatest",
    summary="rank",
    statistic=_aurc,
)
def aurc(rows: Rows, clean: Rows | None) -> Values:
    """Return what the area under the risk-coverage curve needs (Geifman and El-Yaniv 2017).

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence, and 1 where the answer is wrong. What the read-out refused counts, too:
        the score alone decides.
    """
    return _graded(rows)


@metric(
    "excess_aurc",
    "what the area under the risk-coverage curve exceeds that of the best order of the same answers by",
    worst=None,
    summary="rank",
    statistic=_excess_aurc,
)
def excess_aurc(rows: Rows, clean: Rows | None) -> Values:
    """Return what the excess area needs: E-AURC (Geifman, Uziel and El-Yaniv 2019).

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence, and 1 where the answer is wrong.
    """
    return _graded(rows)


@metric(
    "auroc",
    "AUROC of the score as a detector of wrong answers: how often a right one has the higher score",
    worst=None,
    summary="rank",
    statistic=partial(_auroc, _failures),
)
def auroc(rows: Rows, clean: Rows | None) -> Values:
    """Return what the AUROC of misclassification detection needs (Hendrycks and Gimpel 2017).

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence, and 1 where the answer is wrong.
    """
    return _graded(rows)


@metric(
    "fpr95",
    "wrong answers that the score accepts at the threshold that accepts 95 % of the right ones",
    worst=None,
    summary="rank",
    statistic=partial(_fpr95, _failures),
)
def fpr95(rows: Rows, clean: Rows | None) -> Values:
    """Return what the FPR at 95 % TPR of misclassification detection needs; positives are right answers.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence, and 1 where the answer is wrong.
    """
    return _graded(rows)


@metric(
    "adversarial_auroc",
    "AUROC of the score as a detector of adversarial images, those that turned a right answer into one that "
    "the attacker wants, against the same images unmoved",
    worst=None,
    clean="needed",
    summary="rank",
    statistic=partial(_auroc, _against_clean),
)
def adversarial_auroc(rows: Rows, clean: Rows | None) -> Values:
    """Return what the AUROC of adversarial detection needs (successes against clean: Lee et al. 2018).

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence on the clean image and on the adversarial one; NaN where the attack did
        not succeed. Whether the read-out refused does not matter: the score alone decides.
    """
    return _adversarial(rows, clean)


@metric(
    "adversarial_fpr95",
    "adversarial images that the score accepts at the threshold that accepts 95 % of the same images unmoved",
    worst=None,
    clean="needed",
    summary="rank",
    statistic=partial(_fpr95, _against_clean),
)
def adversarial_fpr95(rows: Rows, clean: Rows | None) -> Values:
    """Return what the FPR at 95 % TPR of adversarial detection needs; positives are clean images.

    Args:
        rows: Outcomes of N examples under attack.
        clean: Outcomes of the same examples unmoved, or None.

    Returns:
        Shape (N, 2): the confidence on the clean image and on the adversarial one; NaN where the attack did
        not succeed.
    """
    return _adversarial(rows, clean)


# --- from rows to estimates --------------------------------------------------------------------------


@dataclass(frozen=True)
class PerExample:
    """The examples that count, and the value of each."""

    index: NDArray[np.int64]
    """Shape (M,): the places of the examples in the data set, ascending."""
    values: Values
    """Shape (M,), of a metric of all examples together (M, 2): without NaN."""


def score(chosen: Metric, rows: Rows, clean: Rows | None) -> PerExample:
    """Return the value of each example that counts.

    Args:
        chosen: The metric.
        rows: Outcomes under attack.
        clean: Outcomes of the same defense on unmoved images, or None.

    Returns:
        The values; where the metric uses `clean`, of the examples that are in both.
    """
    if chosen.clean == "unused" or clean is None:
        values = chosen.score(rows, None)
    else:
        rows, clean = shared(rows, clean)
        values = chosen.score(rows, clean)
    counted = ~np.isnan(values.reshape(len(values), -1)).any(1)
    return PerExample(rows["index"][counted], values[counted])


def common(indices: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the places that are in all of several sets.

    Args:
        indices: Sets of places, each (N,) and ascending; at least one.

    Returns:
        The places, ascending.
    """
    first, *others = indices
    # As a rule every attack saw the same examples.
    return first if all(np.array_equal(first, each) for each in others) else reduce(np.intersect1d, indices)


def settle(chosen: Metric, attacks: Sequence[PerExample], on: On = "common") -> PerExample:
    """Return the worst value of each example over several attacks.

    Args:
        chosen: The metric, which says which value is the worst.
        attacks: The values of each attack, at least one.
        on: ``every``: each example is settled by the attacks that saw it; ``common``: those that some attack
            did not see are left out.

    Returns:
        The values, in ascending order of the index.
    """
    if len(attacks) == 1:
        return attacks[0]
    seen = common([each.index for each in attacks])
    if on == "every":
        seen = reduce(np.union1d, [each.index for each in attacks])
    # What is worse than nothing: minus infinity, infinity, or a right answer of infinite confidence.
    nothing = -math.inf if chosen.worst == "greatest" and chosen.statistic is None else math.inf
    found = np.full((len(seen), *attacks[0].values.shape[1:]), nothing)
    if chosen.statistic is not None:
        found[..., 1] = 0.0
    for each in attacks:
        _, at, there = np.intersect1d(seen, each.index, assume_unique=True, return_indices=True)
        found[at] = _worse(chosen, np.stack([found[at], each.values[there]]))
    return PerExample(seen, found)


def _worse(chosen: Metric, values: Values) -> Values:
    """Return the worst of several attacks: (A, N, ...) -> (N, ...)."""
    if chosen.statistic is not None:
        return _worst_graded(values)
    return np.asarray(values.max(0) if chosen.worst == "greatest" else values.min(0))


def _worst_graded(values: Values) -> Values:
    """Return the worst answer to each example, graded: (A, N, 2) of several attacks -> (N, 2).

    A wrong answer is worse the surer it is, a right one the less sure, and any wrong one is worse than a
    right one. Whatever the other examples are, the area under the risk-coverage curve is greatest so: what
    takes the place of a less harmful answer leaves no fewer wrong ones among the first k, for every k.
    """
    sure, wrong = values[..., 0], values[..., 1] > 0
    broken = wrong.any(0)
    surest = np.where(wrong, sure, -math.inf).max(0)
    return np.stack([np.where(broken, surest, sure.min(0)), broken.astype(np.float64)], 1)


@dataclass(frozen=True)
class Estimate:
    """A number with its statistical uncertainty."""

    value: float
    """A proportion in [0, 1], a distance (infinite: fewer than half were broken), or a plain number."""
    low: float | None
    """The lower end of the 95 % interval of the examples of one seed; None where there is no interval."""
    high: float | None
    """The upper end."""
    n: int
    """Number of examples of one seed (the smallest, where seeds differ)."""
    std: float | None
    """Sample standard deviation over seeds (n - 1); None for fewer than two seeds."""
    seeds: int
    """Number of seeds that were averaged."""


def estimate(chosen: Metric, seeds: Mapping[int, Sequence[PerExample]]) -> Estimate | None:
    """Average over seeds.

    Args:
        chosen: The metric, which says how examples are summarised.
        seeds: By seed, the values that are pooled within it: several where targets are averaged.

    Returns:
        The estimate; None where a seed has no example that counts, or too few kinds of them.
    """
    pooled = [np.concatenate([each.values for each in parts]) for parts in seeds.values()]
    n = min(len(reduce(np.union1d, [each.index for each in parts])) for parts in seeds.values())
    if n == 0:
        return None
    if chosen.statistic is not None:
        places = [np.concatenate([each.index for each in parts]) for parts in seeds.values()]
        return _of_all(chosen.statistic, pooled, places, n)
    middle = np.median if chosen.summary == "median" else np.mean
    single = [float(middle(each)) for each in pooled]
    low, high = _interval(chosen.summary, pooled, single, n)
    return Estimate(fmean(single), low, high, n, _spread(single), len(single))


def _spread(single: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds; None for fewer than two, or where one is infinite."""
    return stdev(single) if len(single) > 1 and all(map(math.isfinite, single)) else None


def _of_all(
    statistic: Statistic, pooled: Sequence[Values], places: Sequence[NDArray[np.int64]], n: int
) -> Estimate | None:
    """Return a number of all examples together: of several seeds the means of it and of its ends."""
    found = [statistic(values, index) for values, index in zip(pooled, places, strict=True)]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    single, low, high = zip(*known, strict=True)
    return Estimate(fmean(single), fmean(low), fmean(high), n, _spread(single), len(single))


def _interval(
    summary: Summary, pooled: Sequence[Values], single: Sequence[float], n: int
) -> tuple[float | None, float | None]:
    """Return the interval of the `n` examples of one seed; of several seeds, the mean of their ends."""
    # An example with several targets, or draws, is still one example. Values between 0 and 1 whose mean is p
    # have a variance of at most p (1 - p), so that Wilson's interval is at least as wide as it has to be. One
    # by their own variance, or a bootstrap of examples, is narrower where few examples differ from the
    # others, and then misses those that are rare and always broken.
    match summary:
        case "share":
            return wilson(fmean(single), n)
        case "median":
            ends = [median_interval(each) for each in pooled]
        case "mean" if n > 1:
            ends = [mean_interval(each, n) for each in pooled]
        case _:
            return None, None
    low, high = (fmean(end) for end in zip(*ends, strict=True))
    return low, high


def wilson(p: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the score interval of Wilson (1927) for a proportion.

    Args:
        p: The proportion, in [0, 1].
        n: The number of examples, above 0, or of how many the proportion is worth.
        confidence: The confidence level, in (0, 1).

    Returns:
        Both ends, in [0, 1].
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the end is exact; rounding must not put it beside the estimate.
    return min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)


def median_interval(values: Values, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return an interval for a median between two order statistics, with ranks by the normal approximation.

    Args:
        values: Shape (n,), n > 0, in any order.
        confidence: The confidence level, in (0, 1).

    Returns:
        Both ends, each of them one of the values.
    """
    n = len(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(n) / 2
    ordered = np.sort(values)
    low = max(math.floor(n / 2 - half), 1)
    high = min(math.ceil(n / 2 + half) + 1, n)
    return float(ordered[low - 1]), float(ordered[high - 1])


def mean_interval(values: Values, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the normal interval of a mean.

    Args:
        values: Shape (m,): the values.
        n: The number of examples behind them, above 1; fewer than m where an example has several targets.
        confidence: The confidence level, in (0, 1).

    Returns:
        Both ends.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle, half = float(values.mean()), z * float(values.std(ddof=1)) / math.sqrt(n)
    return middle - half, middle + half


# --- comparisons -----------------------------------------------------------------------------------


def mcnemar_p(one: Values, other: Values) -> float:
    """Return the p-value of a one-sided exact McNemar test that one attack breaks more than another.

    An example counts once, for the attack that broke it in more seeds, however many seeds there are;
    examples that both broke equally often do not count.

    Args:
        one: Shape (N,): how often the first attack broke each example, as a mean over seeds in [0, 1].
        other: Shape (N,): the same of the second attack, on the same examples.

    Returns:
        The probability, if both are equally strong, that the first wins at least as many examples as it did.
    """
    wins, losses = int((one > other).sum()), int((one < other).sum())
    return _upper_tail(wins, wins + losses)


def _upper_tail(wins: int, n: int) -> float:
    """Return the probability of at least `wins` heads in `n` tosses of a fair coin."""
    if 2 * wins <= n:
        return 1.0 if wins == 0 else 1 - _upper_tail(n - wins + 1, n)
    # Whole numbers are exact: each term follows from the one before, and there is one division at the end.
    term = total = math.comb(n, wins)
    for k in range(wins, n):
        term = term * (n - k) // (k + 1)
        total += term
    return float(total / 2**n)


def binomial_p(count: int, n: int, share: float) -> float:
    """Return the p-value of a one-sided exact binomial test that a share is greater than another one.

    It is below 1 - c exactly where the lower Clopper-Pearson bound of confidence c is above `share`.

    Args:
        count: How many of `n` were seen, 0 to `n`.
        n: How many there are, 0 or more.
        share: The share to be exceeded, in (0, 1).

    Returns:
        The probability of at least `count` of `n`, if the share is `share`.
    """
    if count <= 0:
        return 1.0
    first = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    first += count * math.log(share) + (n - count) * math.log1p(-share)
    k = np.arange(count, n, dtype=np.float64)
    # Each term follows from the one before it.
    ratios = np.log((n - k) / (k + 1)) + math.log(share) - math.log1p(-share)
    terms = np.exp(first + np.concatenate([[0.0], np.cumsum(ratios)]))
    return min(1.0, float(terms.sum()))

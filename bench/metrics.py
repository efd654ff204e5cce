"""What an outcome is worth: rules that turn rows into values per example, and values into estimates.

A value belongs to one example; NaN means that the example does not count. Attackers are settled
example by example, seeds are averaged last, and intervals count the examples of one seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.errors import InputError, did_you_mean
from bench.outcomes import Frame, Rows, take

Values: TypeAlias = NDArray[np.float64]
"""(N,) one value for each example; NaN: it does not count."""

Mask: TypeAlias = NDArray[np.bool_]

CONFIDENCE = 0.95
"""Of the intervals in tables."""

ROUNDING = 1e-6
"""A distance may exceed the radius it is read at by this much: float32 images, radii like 8/255."""


# --- rules for one row -------------------------------------------------------------------------------


def is_correct(rows: Frame) -> Mask:
    """Return (N,): whether the defense stood. A refusal is right where the input was moved, else wrong.

    A move is a distance above 0. A void move was not made: the defense was shown the clean image. An
    answer that was not finite (label -1) has not held.
    """
    label = np.asarray(rows["label"])
    right = label == np.asarray(rows["truth"])
    moved = (np.asarray(rows["distance"]) > 0) & ~np.asarray(rows["void"], np.bool_)
    stood = np.where(np.asarray(rows["rejected"], np.bool_), moved, right)
    return np.asarray(stood & (label >= 0), np.bool_)


def reached(rows: Rows) -> Mask:
    """Return (N,): whether the answer is where the attacker wants it, refused or not.

    That is the target, or any wrong label without one. An answer that is not finite is nowhere.
    """
    untargeted = np.isnan(rows["target"])
    goal = np.where(untargeted, rows["label"] != rows["truth"], rows["label"] == rows["target"])
    return np.asarray(goal & (rows["label"] >= 0), np.bool_)


def within(rows: Rows, clean: Rows, radius: float) -> Rows:
    """Read outcomes of an attack that moves as little as it can at a radius: (rows both saw).

    Where it moved further than `radius` it has failed, and the defense is shown the clean image.
    """
    rows, clean = shared(rows, clean)
    near = rows["distance"] <= radius + ROUNDING

    def read(values: NDArray[Any], still: NDArray[Any]) -> NDArray[Any]:
        return np.where(near.reshape(-1, *[1] * (values.ndim - 1)), values, still)

    return {name: read(values, clean.get(name, values)) for name, values in rows.items()}


def shared(rows: Rows, other: Rows) -> tuple[Rows, Rows]:
    """Return both on the examples that both hold."""
    _, here, there = np.intersect1d(rows["index"], other["index"], assume_unique=True, return_indices=True)
    return take(rows, here), take(other, there)


def least_distance(rows: Rows, clean: Rows | None = None) -> Values:
    """Return (N,) how far each input was moved to break the defense; infinite where it stood.

    Where `clean` rows of the same examples are given, one that is wrong unmoved is broken at 0.
    """
    moved = np.where(rows["void"], 0.0, rows["distance"])
    least = np.where(is_correct(rows), math.inf, moved)
    return least if clean is None else np.where(is_correct(clean), least, 0.0)


# --- metrics by name ---------------------------------------------------------------------------------

Score: TypeAlias = Callable[..., Values]
"""From an attack's rows, and the rows of the same examples unmoved (or None), to a value for each example.

A metric of a class is called with the keyword `label`, too.
"""

Unit: TypeAlias = Literal["percent", "distance", "number", "millions"]
"""In which a number is printed."""

Summary: TypeAlias = Literal["share", "mean", "median", "constant"]
"""How examples become one number: the mean of values in [0, 1], of any values, their median, or what is
the same for all of them."""

_UNITS: Mapping[Summary, Unit] = {
    "share": "percent",
    "mean": "number",
    "median": "distance",
    "constant": "number",
}


@dataclass(frozen=True)
class Metric:
    """A number that a table may show."""

    name: str
    says: str
    """What is counted, for captions."""
    score: Score
    worst: Literal["least", "greatest"] | None
    """Which value an attacker prefers; None where several attacks have no worst."""
    clean: Literal["needed", "used", "unused"]
    """Whether the same row's answers to unmoved images are needed, used where they are there, or not."""
    summary: Summary
    unit: Unit
    reads: tuple[str, ...]
    """The columns of outcomes that it looks at beside those that every table reads."""
    by_class: bool
    """Whether it is of one class, which the table names."""
    label: int | None = None
    """That class."""

    def of(self, label: int | None) -> "Metric":
        """Return the metric of a class; raise `InputError` where none is given."""
        if label is None:
            raise InputError(f"{self.name} is of a class: say which, such as class: 3")
        return replace(self, score=partial(self.score, label=label), label=label)

    def lacks(self, rows: Rows) -> str | None:
        """Return what these rows do not have that it looks at, in words."""
        for name in self.reads:
            if name not in rows:
                return f"no {name}: the read-out gives none, or the outcomes are older than the column"
            if self.label is not None and self.label >= rows[name].shape[1]:
                return f"no class {self.label}: there are {rows[name].shape[1]}"
        return None


METRICS: dict[str, Metric] = {}
"""What a table's `metric` may name."""


def metric(
    name: str,
    says: str,
    *,
    worst: Literal["least", "greatest"] | None,
    clean: Literal["needed", "used", "unused"] = "unused",
    summary: Summary = "share",
    unit: Unit | None = None,
    reads: tuple[str, ...] = (),
    by_class: bool = False,
) -> Callable[[Score], Score]:
    """Register a function as a metric; tables and their captions need to know no more of it."""

    def register(score: Score) -> Score:
        METRICS[name] = Metric(
            name, says, score, worst, clean, summary, unit or _UNITS[summary], reads, by_class
        )
        return score

    return register


def named(name: str) -> Metric:
    """Return a metric by its name."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}")
    return METRICS[name]


@metric("accuracy", "right on the adversarial input alone, as the papers count", worst="least")
def accuracy(rows: Rows, clean: Rows | None) -> Values:
    """Count what stood; what the defense answers to the clean image is not looked at."""
    return is_correct(rows).astype(np.float64)


@metric("robust", "right on the clean input and on the adversarial one", worst="least", clean="needed")
def robust(rows: Rows, clean: Rows | None) -> Values:
    """Count what stood with doing nothing among the attacker's choices."""
    assert clean is not None
    return (is_correct(rows) & is_correct(clean)).astype(np.float64)


@metric(
    "success",
    "accepted answers that the attacker wants, among the examples that are right when clean",
    worst="greatest",
    clean="needed",
)
def success(rows: Rows, clean: Rows | None) -> Values:
    """Count wins over the examples where there is something to win."""
    assert clean is not None
    won = reached(rows) & ~rows["rejected"]
    return np.where(is_correct(clean), won.astype(np.float64), math.nan)


@metric("rejection", "refused inputs", worst=None)
def rejection(rows: Rows, clean: Rows | None) -> Values:
    """Count refusals, right or wrong."""
    return rows["rejected"].astype(np.float64)


@metric("detection", "refused inputs, among those whose answer is what the attacker wants", worst=None)
def detection(rows: Rows, clean: Rows | None) -> Values:
    """Count refusals where it matters."""
    return np.where(reached(rows), rows["rejected"].astype(np.float64), math.nan)


@metric("selective", "right answers, among the accepted ones", worst=None)
def selective(rows: Rows, clean: Rows | None) -> Values:
    """Count right answers where one is given."""
    right = (rows["label"] == rows["truth"]).astype(np.float64)
    return np.where(rows["rejected"], math.nan, right)


@metric(
    "distance",
    "median distance that breaks the defense, over all examples (∞: fewer than half are broken)",
    worst="least",
    clean="used",
    summary="median",
)
def distance(rows: Rows, clean: Rows | None) -> Values:
    """Take the distance of what broke; what stood counts as infinitely far."""
    return least_distance(rows, clean)


@metric(
    "logit",
    "the read-out's logit of a class, its mean over examples",
    worst=None,
    summary="mean",
    reads=("logits",),
    by_class=True,
)
def logit(rows: Rows, clean: Rows | None, *, label: int) -> Values:
    """Take what the label was read from."""
    return np.asarray(rows["logits"][:, label], np.float64)


@metric(
    "threshold",
    "the logit below which the read-out refuses a class",
    worst=None,
    summary="constant",
    reads=("thresholds",),
    by_class=True,
)
def threshold(rows: Rows, clean: Rows | None, *, label: int) -> Values:
    """Take what the read-out compares a class's logit with, whatever it is shown."""
    return np.asarray(rows["thresholds"][:, label], np.float64)


@metric(
    "top",
    "the largest logit, its mean over examples; of a targeted attack, over those that reach their target",
    worst=None,
    summary="mean",
    reads=("logits",),
)
def top(rows: Rows, clean: Rows | None) -> Values:
    """Take the logit of the answer; a target that was not reached does not count."""
    failed = ~np.isnan(rows["target"]) & ~reached(rows)
    return np.where(failed, math.nan, rows["logits"].max(1))


@metric(
    "classwise",
    "classes whose logit is below their threshold, as a share of all classes",
    worst=None,
    reads=("logits", "thresholds"),
)
def classwise(rows: Rows, clean: Rows | None) -> Values:
    """Ask every class whether it would refuse; what the read-out does is `rejection`."""
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
    """Take the size of what was asked."""
    return rows["parameters"]


# --- from rows to estimates --------------------------------------------------------------------------


@dataclass(frozen=True)
class PerExample:
    """The examples that count, ascending, and the value of each."""

    index: NDArray[np.int64]
    values: Values


def score(chosen: Metric, rows: Rows, clean: Rows | None) -> PerExample:
    """Return what each example is worth; with `clean` rows, on the examples that both hold."""
    if chosen.clean == "unused" or clean is None:
        values = chosen.score(rows, None)
    else:
        rows, clean = shared(rows, clean)
        values = chosen.score(rows, clean)
    counted = ~np.isnan(values)
    return PerExample(rows["index"][counted], values[counted])


def settle(chosen: Metric, attacks: Sequence[PerExample]) -> PerExample:
    """Return the worst value of each example that every attack saw."""
    if len(attacks) == 1:
        return attacks[0]
    seen = reduce(np.intersect1d, [each.index for each in attacks])
    values = np.stack([each.values[np.searchsorted(each.index, seen)] for each in attacks])
    return PerExample(seen, values.max(0) if chosen.worst == "greatest" else values.min(0))


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of its chance."""

    value: float
    """A proportion in [0, 1], a distance (infinite: fewer than half were broken), or a plain number."""
    low: float | None
    high: float | None
    """95 % interval, from the examples of one seed; None where there is none to give."""
    n: int
    """Examples of one seed (the smallest number, where seeds differ)."""
    std: float | None
    """Sample standard deviation over seeds; None for fewer than two."""
    seeds: int


def estimate(chosen: Metric, seeds: Mapping[int, Sequence[PerExample]]) -> Estimate | None:
    """Average over seeds; what a seed has several of (targets) is pooled within it.

    Returns None where a seed has no example that counts.
    """
    pooled = [np.concatenate([each.values for each in parts]) for parts in seeds.values()]
    n = min(len(reduce(np.union1d, [each.index for each in parts])) for parts in seeds.values())
    if n == 0:
        return None
    middle = np.median if chosen.summary == "median" else np.mean
    single = [float(middle(each)) for each in pooled]
    low, high = _interval(chosen.summary, pooled, single, n)
    finite = all(math.isfinite(each) for each in single)
    spread = stdev(single) if finite and len(single) > 1 else None
    return Estimate(fmean(single), low, high, n, spread, len(single))


def _interval(
    summary: Summary, pooled: Sequence[Values], single: Sequence[float], n: int
) -> tuple[float | None, float | None]:
    """Return the interval of the `n` examples of one seed; several seeds' ends are averaged."""
    # The targets of an example are not examples more: n is that of the examples.
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


def wilson(p: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of Wilson (1927) for a proportion `p` of `n` > 0 examples."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the end is exact; rounding must not put it beside the estimate.
    return min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)


def median_interval(values: Values, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval for a median between two order statistics (normal ranks)."""
    n = len(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(n) / 2
    ordered = np.sort(values)
    low = max(math.floor(n / 2 - half), 1)
    high = min(math.ceil(n / 2 + half) + 1, n)
    return float(ordered[low - 1]), float(ordered[high - 1])


def mean_interval(values: Values, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the normal interval of a mean, with `n` > 1 examples behind the values."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle, half = float(values.mean()), z * float(values.std(ddof=1)) / math.sqrt(n)
    return middle - half, middle + half


# --- comparisons -----------------------------------------------------------------------------------


def mcnemar_p(one: Values, other: Values) -> float:
    """Return p of a one-sided exact McNemar test that `one` breaks more than `other` by chance.

    Both give, for the same examples, how often each was broken (its mean over seeds): an example
    speaks for the side that broke it more often, once, however many seeds there are.
    """
    wins, losses = int((one > other).sum()), int((one < other).sum())
    return _upper_tail(wins, wins + losses)


def _upper_tail(wins: int, n: int) -> float:
    """Return the chance of at least `wins` heads in `n` tosses of a fair coin."""
    if 2 * wins <= n:
        return 1.0 if wins == 0 else 1 - _upper_tail(n - wins + 1, n)
    # Exact in whole numbers: each term follows from the last, and one division ends it.
    term = total = math.comb(n, wins)
    for k in range(wins, n):
        term = term * (n - k) // (k + 1)
        total += term
    return float(total / 2**n)

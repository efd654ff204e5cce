"""Statistics of paired outcomes: a test and an interval for the loss between two measurements of one set of
examples, and what a number of examples can show."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

LARGEST_DENOMINATOR = 20_000
"""The most seeds times draws that a value may be the mean of."""

MOST_EXAMPLES = 10_000_000
"""Where the search for a number of examples ends."""

ROUNDING = 1e-12
"""What a net loss must exceed the tolerance by: a difference of means misses an equal number by less."""

EXACT_COST = 5_000_000
"""The most magnitudes times places in the window for which the sign-flip test is exact, a second's work;
beyond it the approximation is within a hundredth of the p-value."""

TAIL = math.sqrt(math.log(2e20) / 2)
"""Half the window in roots of the sum of squares: by Hoeffding (1963) at most 1e-20 lies outside."""


@dataclass(frozen=True)
class Loss:
    """The net loss between two measurements of the same examples."""

    n: int
    """The number of examples."""
    before: float
    """The share of them that was held before, in [0, 1]; of several seeds their mean."""
    after: float
    """The share that is held now."""
    lost: float
    """The examples that were held and are broken now; of several seeds their mean, maybe a fraction."""
    gained: float
    """The examples that were broken and are held now."""
    p: float
    """The two-sided mid-p value of no change."""
    low: float
    """The lower end of the paired interval of the loss, a share; a negative loss is a gain."""
    high: float
    """The upper end."""

    @property
    def value(self) -> float:
        """The net loss as a share of the examples."""
        return (self.lost - self.gained) / self.n

    @property
    def churn(self) -> float:
        """The share of the examples that changed, either way."""
        return (self.lost + self.gained) / self.n


def paired_loss(before: NDArray[np.float64], after: NDArray[np.float64], *, alpha: float) -> Loss:
    """Compare two measurements of the same examples.

    The p-value is that of the sign-flip test: were nothing changed, each example's difference would have
    either sign with equal chance. It is exact, in its mid-p form: for values of 0 and 1 it is the mid-p
    McNemar test (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91). The interval
    is the score interval of Tango (1998, Statistics in Medicine 17:891). Of values between 0 and 1 it takes
    the sums of the losses and of the gains: a difference d of at most 1 has E d^2 <= E |d|, so that it is at
    least as wide as it has to be.

    Args:
        before: The value of each example before, float of double precision, shape (N,), N >= 1: 1 where it
            was held, 0 where it was broken, or a mean of such over seeds or draws, a multiple of 1/S.
        after: The values now, of the same examples in the same order.
        alpha: The interval's level of error, two-sided, in (0, 1).

    Returns:
        The loss. Its p-value is never 0: what is smaller than the least float, 2e-308, is given as that.

    Raises:
        ValueError: The arrays are of other shapes, empty, or not finite numbers in [0, 1]; no S up to
            20,000 fits; or `alpha` is not in (0, 1).
    """
    _check_share("alpha", alpha, above=True)
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.ndim != 1 or old.shape != new.shape or not old.size:
        raise ValueError(f"expected two arrays of one shape (N,), N >= 1, found {old.shape} and {new.shape}")
    scale = _denominator(np.unique(np.concatenate([old, new])))
    was, now = (np.rint(values * scale).astype(np.int64) for values in (old, new))
    difference = was - now
    n = len(difference)
    lost = int(difference[difference > 0].sum()) / scale
    gained = -int(difference[difference < 0].sum()) / scale
    low, high = _score_interval(lost, gained, n, alpha)
    return Loss(
        n=n,
        before=int(was.sum()) / (scale * n),
        after=int(now.sum()) / (scale * n),
        lost=lost,
        gained=gained,
        p=_sign_flip(difference),
        low=low,
        high=high,
    )


def _check_share(name: str, value: float, *, above: bool = False) -> None:
    if not (0 < value < 1 if above else 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number in {'(0, 1)' if above else '[0, 1]'}, found {value}")


def _denominator(values: NDArray[np.float64]) -> int:
    """Return the least S of which all values are multiples of 1/S."""
    if not np.isfinite(values).all() or values[0] < 0 or values[-1] > 1:
        raise ValueError(f"expected values in [0, 1], found {values[0]} to {values[-1]}")
    common = 1
    for value in values.tolist():
        near = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
        # Two such fractions are at least 2.5e-9 apart; a mean in double precision is off by far less.
        if abs(value - float(near)) <= 1e-12:
            common = math.lcm(common, near.denominator)
        if abs(value - float(near)) > 1e-12 or common > LARGEST_DENOMINATOR:
            raise ValueError(
                f"expected values that are multiples of 1/S for one S up to {LARGEST_DENOMINATOR} (means "
                f"over S seeds or draws, in double precision), found {value!r}"
            )
    return common


def _sign_flip(difference: NDArray[np.int64]) -> float:
    """Return the two-sided mid-p value of whole differences under independent fair signs."""
    total = abs(int(difference.sum()))
    sizes, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    if total == 0:
        return 1.0
    unit = int(np.gcd.reduce(sizes))
    sizes, total = sizes // unit, total // unit
    if total == int(sizes @ counts):
        # All signs agree: one pattern of 2^m is as extreme, at either end, and half of it counts.
        return max(math.exp(-int(counts.sum()) * math.log(2)), sys.float_info.min)
    # By tilting, the signs are made unfair so that the total that was found is the expected one. There, in
    # the middle, the distribution is known to a small relative error, and so is the tail, however small.
    tilt = _tilt(sizes, counts, total)
    # The logarithm of how much likelier a pattern with this total is with fair signs.
    weight = float(counts @ (np.logaddexp(sizes * tilt, -sizes * tilt) - math.log(2))) - tilt * total
    width = min(int(sizes @ counts) + 1, 2 * math.ceil(TAIL * math.sqrt(float(sizes**2 @ counts))) + 1)
    if len(sizes) * width <= EXACT_COST:
        logarithm = weight + math.log(2 * _tilted_tail(sizes, counts, total, tilt, width))
    else:
        logarithm = math.log(2) + _saddlepoint(sizes, counts, weight, tilt)
    return min(max(math.exp(max(logarithm, -1000.0)), sys.float_info.min), 1.0)


def _tilt(sizes: NDArray[np.int64], counts: NDArray[np.int64], total: int) -> float:
    """Return half the log odds of a sign, for a difference of 1, at which the total is the expected one."""

    def excess(tilt: float) -> float:
        return float(sizes * counts @ np.tanh(sizes * tilt)) - total

    # At the upper end less than 1 is missing to all signs being positive, and the total is 2 short or more.
    return float(optimize.brentq(excess, 0, math.log(sizes @ counts) / 2 + 1))


def _tilted_tail(
    sizes: NDArray[np.int64], counts: NDArray[np.int64], total: int, tilt: float, width: int
) -> float:
    """Return half the share at the total plus the shares above it, each divided by the same large weight.

    The distribution of the tilted total is the product of its binomials' characteristic functions, at as many
    frequencies as there are places in the window (Kolassa 2006, Series Approximation Methods, on tilting).
    """
    up = special.expit(2 * sizes * tilt)
    whole = int(sizes @ counts)
    place = (whole + total) // 2
    frequency = np.arange(width // 2 + 1, dtype=np.int64)
    circle = np.exp(-2j * np.pi / width * np.arange(width))
    product = circle[-(frequency * place) % width]
    for size, count, share in zip(sizes.tolist(), counts.tolist(), up.tolist(), strict=True):
        product *= (1 - share + share * circle[frequency * size % width]) ** count
    shares = np.fft.irfft(product, n=width)
    above = np.arange(min(whole - place, width // 2) + 1)
    tail = shares[above] * np.exp(-2 * tilt * above)
    return float(tail.sum() - tail[0] / 2)


def _saddlepoint(sizes: NDArray[np.int64], counts: NDArray[np.int64], weight: float, tilt: float) -> float:
    """Return the logarithm of the one-sided mid-p value, by Lugannani and Rice (1980).

    Without a correction for continuity it is the mid-p value that the formula comes near to.
    """
    root = math.sqrt(-2 * weight)
    steep = tilt * math.sqrt(float(sizes**2 * counts @ (1 / np.cosh(np.minimum(sizes * tilt, 300.0)) ** 2)))
    # Near the middle the correction is a difference of large numbers, and itself without effect.
    correction = (1 / steep - 1 / root) / math.sqrt(2 * math.pi) if root > 1e-2 else 0.0
    return weight + math.log(float(special.erfcx(root / math.sqrt(2))) / 2 + correction)


def _score_interval(lost: float, gained: float, n: int, alpha: float) -> tuple[float, float]:
    """Return Tango's (1998) score interval of the loss; `lost` and `gained` may be fractions.

    The limits solve (loss - net)^2 = z^2 variance(loss) / n. With his variance, of the likeliest shares where
    the loss is given, that is a cubic after the root loss = net, which is none of the limits, is divided out.
    (Yang, Sun and Hardin 2013, Statistics in Medicine 32:1336, solve it as a quartic.) Its three roots
    are real; the outer ones are the limits.
    """
    k = n / float(special.ndtri(alpha / 2)) ** 2
    net, churn = (lost - gained) / n, (lost + gained) / n
    # x^3 - spread x - k net (1 - churn) = 0, by Viete; x lies around the net loss and k + 1 times as wide.
    spread = 1 + k * (churn - net**2)
    angle = math.acos(min(max(math.sqrt(6.75 / spread**3) * k * net * (1 - churn), -1.0), 1.0)) / 3
    low, high = (
        net + (2 * math.sqrt(spread / 3) * math.cos(angle + turn) - net) / (k + 1)
        for turn in (2 * math.pi / 3, 0.0)
    )
    return max(low, -1.0), min(high, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several, by Holm's (1979) step-down method.

    Args:
        p_values: One for each hypothesis, in [0, 1].

    Returns:
        The adjusted ones in the same order: what is below alpha among them is significant, and the chance of
        one false alarm or more among all is at most alpha.

    Raises:
        ValueError: A value is not in [0, 1].
    """
    for value in p_values:
        _check_share("p-value", value)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def verdict_of(
    loss: Loss, p_adjusted: float, *, tolerance: float, alpha: float
) -> Literal["held", "regressed", "undecided"]:
    """Say what is known of a loss.

    Args:
        loss: The paired loss, its interval at 1 - `alpha`.
        p_adjusted: Its p-value, adjusted for the number of subjects, in [0, 1].
        tolerance: The loss that is allowed, a share, in [0, 1).
        alpha: The level of significance, in (0, 1).

    Returns:
        ``regressed`` where the p-value is below `alpha` and the net loss above the tolerance (at either of
        them exactly it is not); ``held`` where the interval ends at the tolerance or below; else
        ``undecided``.
    """
    if p_adjusted < alpha and loss.value - tolerance > ROUNDING:
        return "regressed"
    return "held" if loss.high <= tolerance else "undecided"


def is_gain(loss: Loss, p_adjusted: float, tolerance: float, alpha: float) -> bool:
    """Return whether a gain is as certain as a regression would have to be.

    Args:
        loss: The paired loss.
        p_adjusted: Its p-value, adjusted for the number of subjects, in [0, 1].
        tolerance: The loss that is allowed, a share, in [0, 1).
        alpha: The level of significance, in (0, 1).

    Returns:
        True where the p-value is below `alpha` and the net gain above the tolerance.
    """
    return p_adjusted < alpha and -loss.value - tolerance > ROUNDING


def clopper_pearson(value_sum: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson (1934) for a share.

    Args:
        value_sum: The sum of the examples' values, in [0, n]; a fraction is rounded down for the lower end
            and up for the upper one, which can only widen the interval.
        n: The number of examples, at least 1.
        confidence: The two-sided level of confidence, in (0, 1).

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_share("confidence", confidence, above=True)
    if n < 1 or not 0 <= value_sum <= n:
        raise ValueError(f"expected a sum of n values in [0, 1], n >= 1, found {value_sum} of {n}")
    # A sum of thirds misses its whole number by a few last digits.
    whole = round(value_sum, 6)
    below, above = math.floor(whole), math.ceil(whole)
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(below, n - below + 1, tail)) if below > 0 else 0.0
    high = float(special.betainccinv(above + 1, n - above, tail)) if above < n else 1.0
    return low, high


def needed_examples(loss: Loss, *, tolerance: float, alpha: float, subjects: int = 1) -> int | None:
    """Say how many examples would decide what so many leave undecided, if the shares stay as they are.

    Of means over several seeds or draws the sums are counted as whole examples, which asks for too many
    rather than too few.

    Args:
        loss: An undecided loss.
        tolerance: The loss that is allowed, a share, in [0, 1).
        alpha: The level of significance and of the interval, in (0, 1).
        subjects: How many subjects are tested together, at least 1: a loss has to be significant at `alpha`
            divided by so many, which is Holm's correction at its strictest.

    Returns:
        The least number above the loss's own; None where 10 million do not decide, as where the net loss
        is the tolerance itself.
    """
    lost, gained = loss.lost / loss.n, loss.gained / loss.n
    margin = loss.value - tolerance
    if abs(margin) <= ROUNDING:
        return None

    def decides(n: int) -> bool:
        if margin > 0:
            return float(_mid_p(n * lost, n * gained)) * subjects < alpha
        return _score_interval(n * lost, n * gained, n, alpha)[1] <= tolerance

    if not decides(MOST_EXAMPLES):
        return None
    few, enough = loss.n, MOST_EXAMPLES
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if decides(middle) else (middle, enough)
    return enough


def _mid_p(lost: NDArray[Any] | float, gained: NDArray[Any] | float) -> NDArray[np.float64]:
    """Return McNemar's two-sided mid-p value where more is lost than gained; counts may be fractions.

    The tail of the fair binomial is an incomplete beta function, which goes on between whole numbers.
    """
    lost, gained = np.asarray(lost, dtype=np.float64), np.asarray(gained, dtype=np.float64)
    beyond = np.where(gained > 0, special.betainc(lost + 1, np.maximum(gained, 1e-300), 0.5), 0.0)
    return np.asarray(special.betainc(lost, gained + 1, 0.5) + beyond)


def detectable_loss(
    n: int, churn: float, *, tolerance: float, alpha: float, power: float = 0.8, subjects: int = 1
) -> float | None:
    """Return the least true loss that so many examples show as ``regressed`` with a given chance.

    Each example is lost with chance churn/2 + loss, gained with churn/2, independently, and counts 1 or 0.
    The chance is summed over the outcomes, not approximated. Means over several seeds or draws vary less, so
    that for them it is at least this.

    Args:
        n: The number of examples, at least 1.
        churn: The share of examples that changes without a net effect, both ways together, in [0, 1]: of an
            observed loss, ``loss.churn - abs(loss.value)``.
        tolerance: The loss that is allowed, a share, in [0, 1).
        alpha: The level of significance, in (0, 1).
        power: The chance, in (0, 1).
        subjects: How many subjects are tested together, at least 1, as in `needed_examples`.

    Returns:
        The loss, a share; None where no loss is shown with that chance.

    Raises:
        ValueError: An argument is out of its range.
    """
    for name, value in (("alpha", alpha), ("power", power)):
        _check_share(name, value, above=True)
    for name, value in (("churn", churn), ("tolerance", tolerance)):
        _check_share(name, value)
    if n < 1 or subjects < 1:
        raise ValueError(f"expected at least 1 example and 1 subject, found {n} and {subjects}")

    def missing(loss: float) -> float:
        lost, gained = churn / 2 + loss, churn / 2
        return power - _chance_of_regressed(n, lost, gained, tolerance=tolerance, alpha=alpha / subjects)

    if missing(1 - churn) > 0:
        return None
    # A loss of nothing regresses in at most alpha; where that is more than `power`, nothing has to be lost.
    if missing(0) <= 0:
        return 0.0
    return float(optimize.brentq(missing, 0, 1 - churn, xtol=1e-9))


def _chance_of_regressed(n: int, lost: float, gained: float, *, tolerance: float, alpha: float) -> float:
    """Return the chance of a mid-p value below `alpha` and a net loss above the tolerance."""
    if lost + gained <= 0:
        return 0.0
    changed = stats.binom(n, min(lost + gained, 1.0))
    # Numbers of changed examples outside have a chance of 1e-13 together.
    number = np.arange(int(changed.ppf(5e-14)), int(changed.isf(5e-14)) + 1)
    net = math.floor(n * (tolerance + ROUNDING)) + 1
    least = np.maximum(_least_significant(n, alpha)[number], (number + net + 1) // 2)
    shown = stats.binom.sf(least - 1, number, lost / (lost + gained))
    return float(changed.pmf(number) @ shown)


@lru_cache(maxsize=8)
def _least_significant(n: int, alpha: float) -> NDArray[np.int64]:
    """Return for 0 to n changed examples how many of them have to be lost for a mid-p below `alpha`."""
    # Of many subjects with equally many examples it is asked again and again.
    changed = np.arange(n + 1)
    least = np.asarray(stats.binom.isf(alpha / 2, changed, 0.5), dtype=np.int64)
    # The mid-p value lies between two tails, so that the least number is this one or the next.
    for _ in range(2):
        ends = np.minimum(least, changed)
        least = least + ((least <= changed) & (_mid_p(ends, changed - ends) >= alpha))
    return least

"""The statistics of the tests: exact binomial tails, and levels that follow from lower bounds of shares.

scipy's distributions take a second to import, which no plan needs: they are imported where they are used.
"""

from bench.doctor.findings import Level

CONFIDENCE = 0.98
"""Two-sided confidence of the intervals: a lower end is too high with a probability of 1 %."""

SHARE = 0.05
"""A share of examples that is surely above this is a doubt."""

MOST = 0.25
"""A share of examples that is surely above this is an alarm."""


def at_most(wins: int, n: int, share: float) -> float:
    """Return the probability of so few wins in n independent trials.

    Args:
        wins: How many were won, in [0, n].
        n: How many trials there were, 0 or more.
        share: The probability of winning each, in [0, 1].

    Returns:
        The exact binomial lower tail.
    """
    from scipy import stats

    return float(stats.binom.cdf(wins, n, share))


def at_least(wins: int, n: int, share: float) -> float:
    """Return the probability of so many wins in n independent trials.

    Args:
        wins: How many were won, in [0, n].
        n: How many trials there were, 0 or more.
        share: The probability of winning each, in [0, 1].

    Returns:
        The exact binomial upper tail.
    """
    from scipy import stats

    return float(stats.binom.sf(wins - 1, n, share))


def fewer(table: list[list[int]]) -> float:
    """Return the probability that the second of two samples falls behind the first one so far by chance.

    Args:
        table: For both samples how many are of a kind, and how many are not, 0 or more each.

    Returns:
        The p-value of Fisher's exact test, one-sided.
    """
    from scipy import stats

    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def surely(k: int, n: int) -> float:
    """Return the share that k of n examples are surely above.

    It is the lower Clopper-Pearson bound, at 1 % one-sided.

    Args:
        k: How many examples, in [0, n].
        n: Out of how many, 1 or more.

    Returns:
        The share, in [0, 1].
    """
    from scipy import stats

    return float(stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="exact").low)


def level_of(k: int, n: int) -> Level:
    """Return how heavy it is that k of n examples are what they should not be.

    The lower Clopper-Pearson bound of the share decides, at 1 % one-sided: above `MOST` it is an alarm, above
    `SHARE` a doubt, else a note; where k is 0, nothing was found. So a defense of which `SHARE` of all images
    are such gives a doubt with a probability of at most 1 %.

    Args:
        k: How many examples, in [0, n].
        n: Out of how many, 0 or more.

    Returns:
        The level.
    """
    if k == 0:
        return "quiet"
    low = surely(k, n)
    return "alarm" if low > MOST else "doubt" if low > SHARE else "note"

"""The flag of a worst case over several answers of a random defense."""

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np

from bench.report.checks.evidence import Evidence, differed
from bench.report.checks.flags import Flag
from bench.results.metrics import Metric, held_share, is_correct
from bench.results.outcomes import Rows


def union_flags(unions: Sequence[Sequence[Evidence]], metric: Metric) -> Iterable[Flag]:
    """Return the flag of a number that is the worst of several answers of a random defense.

    Args:
        unions: The evidence that is settled example by example: one union for each seed, and for each target
            where targets are averaged.
        metric: What is counted.

    Returns:
        One flag (``unluckiest-answer``), or none.
    """
    joined = [_answers(seen, metric) for seen in unions]
    most = max(map(len, joined), default=0)
    every = [rows for answers in joined for rows in answers]
    changed, asked = differed(every)
    declared = any(each.condition.facts.random for seen in unions for each in seen)
    unasked = any(np.isnan(rows["differs"]).all() for rows in every)
    if most < 2 or not (changed or (declared and unasked)):
        return
    draws = min(each.condition.facts.draws for seen in unions for each in seen)
    each_of = "answers" if draws == 1 else f"means over {draws} draws"
    said = f"an example counts by the unluckiest of {most} {each_of}"
    said += f", and {changed} of {asked} differed when asked again" if asked else " of a random defense"
    if metric.name in ("accuracy", "robust") and (draws > 1 or not unasked):
        points = 100 * float(np.mean([_luck(answers, draws) for answers in joined]))
        if points < 0.05:
            return
        said += f": chance alone may take up to {points:.1f} points"
    yield Flag("unluckiest-answer", said)


def _answers(seen: Sequence[Evidence], metric: Metric) -> list[Rows]:
    """Return the rows that the worst is taken over: of each attack, and of unmoved images if they count."""
    found = {each.condition.job: each.validated for each in seen}
    if metric.clean != "unused":
        known = {id(each.rows) for each in seen}
        still = {id(each.clean): each.clean for each in seen if each.clean is not None}
        return [*found.values(), *(rows for name, rows in still.items() if name not in known)]
    return list(found.values())


def _luck(answers: Sequence[Rows], draws: int) -> float:
    """Return an upper bound of the share of examples that the worst of several answers loses to chance.

    Let p_j be the probability that answer j is right. The loss is the mean over examples of
    min_j p_j - prod_j p_j. It is at most the mean of sum_j p_j (1 - p_j), which is estimated by how often a
    right answer was wrong when asked again, and at most the least mean less the mean of the worst.

    Of means m_j over K draws the loss of an example is E max_j (p_j - m_j), and at most the root of the sum
    of their variances; the mean of roots is at most the root of the mean. m_j (1 - m_j) / (K - 1) estimates
    a variance without bias.
    """
    index = reduce(np.intersect1d, [rows["index"] for rows in answers])
    held = np.stack([held_share(rows)[np.searchsorted(rows["index"], index)] for rows in answers])
    if draws == 1:
        fell = sum(
            float((is_correct(rows) * rows["differs"])[~np.isnan(rows["differs"])].mean()) for rows in answers
        )
    else:
        fell = float(np.sqrt((held * (1 - held)).sum(0).mean() / (draws - 1)))
    return min(fell, float(held.mean(1).min() - held.min(0).mean()))

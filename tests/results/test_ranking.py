"""Rank statistics of scores: by hand, by brute force, by scikit-learn, and in the limit of many examples."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from bench.results import ranking

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)

# Few different scores, so that many are equal; without a score (-inf) is one of them.
SCORES = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 3.0])


def graded(most: int):
    """Draw scores with right (0) and wrong (1) answers."""
    return st.lists(st.tuples(SCORES, st.sampled_from([0.0, 1.0])), min_size=1, max_size=most).map(
        lambda pairs: tuple(np.array(each) for each in zip(*pairs, strict=True))
    )


def area(order, wrong):
    """Return the area of one order, by its definition."""
    return np.mean([np.mean([wrong[each] for each in order[: k + 1]]) for k in range(len(order))])


def test_the_curve_by_hand():
    found = ranking.risk_coverage(np.array([0.2, 0.9, 0.5, 0.7]), np.array([1.0, 0, 1, 0]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert found.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert ranking.aurc(np.array([0.2, 0.9, 0.5, 0.7]), np.array([1.0, 0, 1, 0])) == pytest.approx(5 / 24)


@quick
@given(graded(6))
def test_among_equal_scores_it_is_the_mean_over_all_orders(drawn):
    sure, wrong = drawn
    orders = [
        each
        for each in permutations(range(len(sure)))
        if all(sure[one] >= sure[two] for one, two in pairwise(each))
    ]
    assert ranking.aurc(sure, wrong) == pytest.approx(np.mean([area(each, wrong) for each in orders]))


@quick
@given(graded(6))
def test_no_order_has_less_than_the_least_area(drawn):
    _, wrong = drawn
    least = min(area(each, wrong) for each in permutations(range(len(wrong))))
    assert ranking.least_aurc(wrong) == pytest.approx(least)


@quick
@given(graded(30), st.randoms(use_true_random=False))
def test_the_area_depends_on_ranks_alone_and_not_on_the_order_of_examples(drawn, chance):
    sure, wrong = drawn
    value = ranking.aurc(sure, wrong)
    assert ranking.least_aurc(wrong) - 1e-12 <= value <= 1
    mixed = chance.sample(range(len(sure)), len(sure))
    assert ranking.aurc(sure[mixed], wrong[mixed]) == pytest.approx(value)
    assert ranking.aurc(np.arctan(sure), wrong) == pytest.approx(value)
    assert ranking.risk_coverage(sure, wrong).risk[-1] == pytest.approx(wrong.mean())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_areas_of_many_examples_have_their_closed_forms(rate):
    # The best order has r + (1 - r) log(1 - r) (Geifman, Uziel and El-Yaniv 2019, eq. 2), equal scores r.
    wrong = (np.arange(200_000) < rate * 200_000).astype(float)
    assert ranking.least_aurc(wrong) == pytest.approx(rate + (1 - rate) * math.log1p(-rate), abs=1e-4)
    assert ranking.aurc(np.zeros(len(wrong)), wrong) == pytest.approx(rate)
    # The worst order has the mean of min(1, r / c): r (1 - log r).
    assert ranking.aurc(wrong, wrong) == pytest.approx(rate * (1 - math.log(rate)), abs=1e-4)


def weighed(sure, wrong, weights):
    """Return the area, and the least of the same error rate, where examples have weights."""
    accepted = sure[:, None] <= sure[None, :]
    kept = (weights * accepted).sum(1)
    risk = (weights * wrong * accepted).sum(1) / kept
    rate = float((weights * wrong).sum())
    least = rate + (1 - rate) * math.log1p(-rate) if rate < 1 else 1.0
    return float((weights * risk).sum()), least


@quick
@given(graded(12))
def test_the_influence_of_an_example_is_the_derivative_by_its_weight(drawn):
    sure, wrong = drawn
    n, step = len(sure), 1e-6
    found = ranking.aurc_influence(sure, wrong), ranking.least_influence(wrong)
    assert [each.mean() for each in found] == pytest.approx([0, 0], abs=1e-12)
    for place in range(n):
        slopes = []
        for sign in (1, -1):
            weights = np.full(n, (1 - sign * step) / n)
            weights[place] += sign * step
            slopes.append(weighed(sure, wrong, weights))
        slope = [(up - down) / (2 * step) for up, down in zip(*slopes, strict=True)]
        assert found[0][place] == pytest.approx(slope[0], abs=1e-6)
        if 0 < wrong.mean() < 1:
            assert found[1][place] == pytest.approx(slope[1], abs=1e-5)


sides = st.tuples(st.lists(SCORES, min_size=1, max_size=60), st.lists(SCORES, min_size=1, max_size=60))


def finite(values):
    """Return scores of the same order that scikit-learn takes."""
    return np.arctan(np.array(values))


@quick
@given(sides)
def test_the_mean_placement_is_scikit_learns_auroc(drawn):
    positive, negative = map(np.array, drawn)
    theirs = roc_auc_score(
        np.r_[np.ones(len(positive)), np.zeros(len(negative))], finite([*drawn[0], *drawn[1]])
    )
    assert ranking.placements(positive, negative).mean() == pytest.approx(theirs)
    assert 1 - ranking.placements(negative, positive).mean() == pytest.approx(theirs)


@quick
@given(sides)
def test_fpr_at_95_is_the_first_of_scikit_learns_curve(drawn):
    positive, negative = map(np.array, drawn)
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    fpr, tpr, _ = roc_curve(labels, finite([*drawn[0], *drawn[1]]), drop_intermediate=False)
    theirs = fpr[np.argmax(tpr >= 0.95 - 1e-12)]
    assert ranking.fpr_at_95(positive, negative) == pytest.approx(theirs)


@pytest.mark.parametrize("n", [1, 19, 20, 39, 40, 100, 200])
def test_the_threshold_accepts_95_percent_and_is_the_greatest_that_does(n):
    positive = np.arange(n, dtype=float)
    least = ranking.threshold(positive, n * ranking.ALLOWED // 100)
    assert 100 * (positive >= least).sum() >= 95 * n
    assert 100 * (positive > least).sum() < 95 * n
    assert ranking.threshold(positive, -1) == -math.inf
    assert ranking.threshold(positive, n) == math.inf


def test_two_normal_distributions_have_the_auroc_and_fpr_of_the_binormal_model():
    from scipy import stats

    # Quantiles in place of draws: AUROC is Phi(d / sqrt 2), FPR at 95 % TPR is Phi(1.645 - d).
    grid = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    for d in (0.0, 1.0, 2.5):
        assert ranking.placements(grid + d, grid).mean() == pytest.approx(
            stats.norm.cdf(d / math.sqrt(2)), abs=1e-4
        )
        assert ranking.fpr_at_95(grid + d, grid) == pytest.approx(
            stats.norm.sf(d + stats.norm.ppf(0.05)), abs=2e-4
        )

"""The gate's statistics against published numbers, other implementations, enumeration and simulation."""

import math
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from bench.gate import statistics
from bench.gate.statistics import (
    Loss,
    clopper_pearson,
    detectable_loss,
    holm,
    is_gain,
    needed_examples,
    paired_loss,
    verdict_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "ci.md"
TOLERANCE, ALPHA = 0.01, 0.01
# Nothing is written beside the tests, and every run tries the same examples.
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@cache
def pairs(lost: int, gained: int, n: int, alpha: float = ALPHA) -> Loss:
    """The loss of `n` examples, all broken but those that are lost or gained."""
    before, after = np.zeros(n), np.zeros(n)
    before[:lost] = 1
    after[lost : lost + gained] = 1
    return paired_loss(before, after, alpha=alpha)


def mcnemar(lost: int, gained: int) -> float:
    """The mid-p McNemar test as a textbook has it: the exact p-value less the chance of what was found."""
    least, m = min(lost, gained), lost + gained
    exact = 2 * stats.binom.cdf(least, m, 0.5)
    return float(min(exact - stats.binom.pmf(least, m, 0.5), 1.0)) if lost != gained else 1.0


# The test.


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.05, [5, 7, 9, 14, 22]), (0.01, [7, 10, 12, 18, 26]), (0.001, [10, 13, 16, 22, 31])],
)
def test_the_least_number_of_lost_examples_that_fails(alpha, expected):
    found = [
        next(lost for lost in range(gained, 99) if pairs(lost, gained, 200).p < alpha)
        for gained in (0, 1, 2, 5, 10)
    ]
    assert found == expected


def test_of_one_seed_it_is_the_mid_p_mcnemar_test():
    for lost, gained in [(1, 0), (3, 3), (7, 1), (1, 7), (16, 6), (40, 20), (520, 400), (2000, 1900)]:
        assert pairs(lost, gained, 4000).p == pytest.approx(mcnemar(lost, gained), rel=1e-9)


def test_published_examples_of_the_test_and_of_the_interval():
    # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8: airway
    # reactivity (Bentur et al. 2009) and response to treatment (Cavo et al. 2012), as their package has them.
    bentur, cavo = pairs(7, 1, 21, 0.05), pairs(16, 6, 161, 0.05)
    assert (round(bentur.low, 3), round(bentur.high, 3)) == (0.026, 0.517)
    assert (round(cavo.low, 4), round(cavo.high, 4)) == (0.0054, 0.1240)
    assert round(cavo.p, 6) == 0.034690
    # PropCIs::scoreci.mp(25, 28, 618, 0.90) in R.
    other = pairs(28, 25, 618, 0.1)
    assert (round(other.low, 4), round(other.high, 4)) == (-0.0148, 0.0247)


def enumerated(difference: list[int]) -> float:
    """The two-sided mid-p value from all patterns of signs."""
    sizes = [abs(each) for each in difference if each]
    found = abs(sum(difference))
    totals = [
        sum(map(math.prod, zip(signs, sizes, strict=True))) for signs in product((-1, 1), repeat=len(sizes))
    ]
    upper = sum(total > found for total in totals) + sum(total == found for total in totals) / 2
    return min(1.0, 2 * upper / len(totals))


@quick
@given(st.integers(1, 7), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=11))
def test_the_sign_flip_test_is_the_share_of_all_patterns_of_signs(scale, values):
    before, after = (
        np.array([min(each, scale) / scale for each in side]) for side in zip(*values, strict=True)
    )
    loss = paired_loss(before, after, alpha=0.05)
    assert loss.p == pytest.approx(
        enumerated(np.rint((before - after) * scale).astype(int).tolist()), rel=1e-9
    )
    assert loss.value == pytest.approx((before - after).mean(), abs=1e-12)
    assert loss.churn == pytest.approx(np.abs(before - after).mean(), abs=1e-12)
    assert (loss.before, loss.after) == pytest.approx((before.mean(), after.mean()), abs=1e-12)


def convolved(difference: np.ndarray) -> float:
    """The same for many examples, by plain convolution: exact where the value is not tiny."""
    distribution = np.ones(1)
    for size, count in zip(*np.unique(np.abs(difference[difference != 0]), return_counts=True), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, spread)
    place = (len(distribution) - 1 + abs(int(difference.sum()))) // 2
    return float(2 * distribution[place + 1 :].sum() + distribution[place])


@pytest.mark.parametrize(("scale", "n"), [(2, 4000), (3, 2500), (20, 700), (97, 60)])
def test_of_many_examples_it_is_the_plain_convolution(scale, n):
    noise = np.random.default_rng(scale)
    for shift in (0, 1, 2, 4):
        values = np.clip(noise.integers(0, scale + 1, (2, n)), 0, scale)
        values[0, : shift * int(n**0.5) // 2] = scale
        found = paired_loss(values[0] / scale, values[1] / scale, alpha=0.05).p
        assert found == pytest.approx(convolved(values[0] - values[1]), rel=1e-6)


def test_a_tail_that_is_far_out_is_right_to_the_last_digits():
    # 1e-200 is beyond every sum of chances that are not tilted.
    lost, gained = 2000, 600
    expected = stats.binom.logsf(lost, lost + gained, 0.5)
    half = stats.binom.logpmf(lost, lost + gained, 0.5) - math.log(2)
    expected = np.logaddexp(expected, half) + math.log(2)
    assert expected < -350
    assert math.log(pairs(lost, gained, 3000).p) == pytest.approx(expected, abs=1e-6)
    assert pairs(100, 0, 100).p == pytest.approx(2.0**-100)


@pytest.mark.parametrize("gained", [0, 1, 1000])
def test_no_p_value_is_zero(gained):
    assert pairs(99_000, gained, 100_000).p == sys.float_info.min


@pytest.mark.parametrize(("scale", "changed"), [(1000, 100), (1000, 104), (4096, 35), (100, 12_000)])
@pytest.mark.parametrize("pull", [0.5, 2.0, 3.5])
def test_where_exactness_costs_too_much_the_approximation_agrees(monkeypatch, scale, changed, pull):
    noise = np.random.default_rng(changed)
    difference = noise.integers(1, scale + 1, changed) * noise.choice([-1, 1], changed)
    spread = math.sqrt(float((difference**2).sum()))
    for at in range(changed):
        if difference.sum() >= pull * spread:
            break
        difference[at] = abs(difference[at])
    sizes, counts = np.unique(np.abs(difference), return_counts=True)
    cost = len(sizes) * 2 * statistics.TAIL * math.sqrt(float(sizes**2 @ counts))
    # At the border, on either side of it.
    assert 0.5 < cost / statistics.EXACT_COST < 2
    monkeypatch.setattr(statistics, "EXACT_COST", math.inf)
    exact = statistics._sign_flip(difference)
    monkeypatch.setattr(statistics, "EXACT_COST", 0)
    assert statistics._sign_flip(difference) == pytest.approx(exact, rel=1e-2)
    assert 1e-5 < exact < 0.7


@quick
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.integers(2, 9))
def test_scale_and_direction_and_order_do_not_matter(values, factor):
    difference = np.array(values)
    p = statistics._sign_flip(difference)
    assert 0 < p <= 1
    for same in (-difference, difference[::-1], difference * factor, np.append(difference, [0] * 5)):
        assert statistics._sign_flip(same) == p


def test_another_denominator_is_the_same_loss():
    before, after = np.array([1, 1, 1, 0, 0.5] * 20), np.array([0.5, 1, 0, 0, 0.5] * 20)
    one = paired_loss(before, after, alpha=ALPHA)
    more = paired_loss(np.append(before, 1 / 7), np.append(after, 1 / 7), alpha=ALPHA)
    assert one.p == more.p
    assert (one.lost, one.gained) == (more.lost, more.gained) == (30, 0)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([], [], "one shape"),
        ([1.0], [1.0, 0.0], "one shape"),
        ([[1.0]], [[1.0]], "one shape"),
        ([math.nan], [1.0], "in \\[0, 1\\]"),
        ([1.1], [1.0], "in \\[0, 1\\]"),
        ([1.0], [-0.1], "in \\[0, 1\\]"),
        ([math.sqrt(0.5)], [1.0], "multiples of 1/S"),
        ([1 / 20_011], [1.0], "multiples of 1/S"),
        ([1 / 149, 1 / 151], [1.0, 1.0], "multiples of 1/S"),
        ([float(np.float32(1 / 3))], [1.0], "double precision"),
    ],
)
def test_values_that_are_none_are_refused(before, after, says):
    with pytest.raises(ValueError, match=says):
        paired_loss(np.array(before), np.array(after), alpha=ALPHA)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, math.nan])
def test_a_level_that_is_none_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        pairs(1, 0, 5, alpha)


# The interval.


def score(loss: float, lost: float, gained: float, n: int) -> float:
    """Tango's statistic as his paper has it, with the likeliest share of gains found by a search."""

    def minus_likelihood(share: float) -> float:
        chances = share + loss, share, 1 - 2 * share - loss
        counts = lost, gained, n - lost - gained
        return -sum(
            count * math.log(chance) if chance > 0 else -math.inf
            for count, chance in zip(counts, chances, strict=True)
            if count
        )

    least, most = max(0.0, -loss), (1 - loss) / 2
    found = optimize.minimize_scalar(
        minus_likelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-12}
    )
    share = min([float(found.x), least, most], key=minus_likelihood)
    variance = n * (2 * share + loss - loss**2)
    return (lost - gained - n * loss) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("lost", "gained", "n"),
    [
        (0, 0, 44),
        (1, 0, 44),
        (7, 1, 21),
        (2, 9, 50),
        (30, 10, 500),
        (0, 12, 20),
        (5, 5, 10),
        (20 / 3, 4 / 3, 90),
    ],
)
@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.001])
def test_the_interval_is_what_the_score_test_does_not_reject(lost, gained, n, alpha):
    z = stats.norm.isf(alpha / 2)
    low, high = statistics._score_interval(lost, gained, n, alpha)
    assert -1 <= low < (lost - gained) / n + 1e-12
    assert (lost - gained) / n < high + 1e-12
    # On either side of each end the test's answer is another one; the net loss itself is never rejected.
    for end, outward in ((low, -1), (high, 1)):
        assert abs(score(end - outward * 1e-6, lost, gained, n)) < z
        if abs(end + outward * 1e-6) < 1:
            assert abs(score(end + outward * 1e-6, lost, gained, n)) > z


def test_the_interval_does_not_collapse_where_nothing_changed():
    for n in (1, 44, 657, 100_000):
        z2 = stats.norm.isf(0.005) ** 2
        loss = pairs(0, 0, n)
        assert loss.high == pytest.approx(z2 / (n + z2), rel=1e-12)
        assert loss.low == pytest.approx(-loss.high, rel=1e-12)
        assert loss.p == 1.0


def test_the_interval_reaches_the_end_where_all_is_lost():
    z2 = stats.norm.isf(0.005) ** 2
    loss, gain = pairs(50, 0, 50), pairs(0, 50, 50)
    assert loss.high == 1.0
    assert loss.low == pytest.approx((50 - z2) / (50 + z2), rel=1e-12)
    assert (gain.low, gain.high) == pytest.approx((-1, -loss.low))


@quick
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400), st.sampled_from([0.1, 0.01, 1e-4]))
def test_the_interval_has_its_symmetries(lost, gained, rest, alpha):
    n = lost + gained + rest or 1
    low, high = statistics._score_interval(lost, gained, n, alpha)
    other = statistics._score_interval(gained, lost, n, alpha)
    assert other == pytest.approx((-high, -low), abs=1e-12)
    wider = statistics._score_interval(lost, gained, n, alpha / 10)
    assert wider[0] <= low + 1e-12
    assert high - 1e-12 <= wider[1]


def test_of_several_seeds_the_interval_covers_at_least_as_often():
    covered = 0
    runs, truth = 400, 0.05
    noise = np.random.default_rng(3)
    for _ in range(runs):
        before, after = seeds(noise, 400, 0.05, scale=3)
        loss = paired_loss(before, after, alpha=0.05)
        # Every example's chance falls by this share of itself: the mean of a beta(1/2, 1/2) is a half.
        covered += loss.low <= truth / 2 <= loss.high
    assert covered >= stats.binom.ppf(1e-4, runs, 0.95)


# Several hypotheses.


def test_holms_method_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_p_value_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="p-value"):
        holm([0.5, value])


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(1e-6, 1))
def test_holms_method_rejects_what_the_step_down_rule_rejects(p_values, alpha):
    adjusted = holm(p_values)
    left = sorted(p_values)
    rejected = 0
    while rejected < len(left) and min(1.0, left[rejected] * (len(left) - rejected)) < alpha:
        rejected += 1
    assert sum(value < alpha for value in adjusted) == rejected
    assert all(
        raw <= value <= min(1.0, raw * len(left)) for raw, value in zip(p_values, adjusted, strict=True)
    )
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


# The verdict.


def a_loss(lost: float, gained: float, n: int, high: float = 0.5) -> Loss:
    return Loss(n=n, before=0.5, after=0.5, lost=lost, gained=gained, p=0.5, low=-0.5, high=high)


@pytest.mark.parametrize(
    ("loss", "p", "expected"),
    [
        (a_loss(30, 0, 1000), 0.001, "regressed"),
        (a_loss(30, 0, 1000), 0.01, "undecided"),
        (a_loss(10, 0, 1000), 0.001, "undecided"),
        # Thirds that come to the tolerance exactly, and miss it by a last digit.
        (a_loss(56 / 3, 26 / 3, 1000), 0.001, "undecided"),
        (a_loss(10 + 1 / 3, 0, 1000), 0.001, "regressed"),
        (a_loss(0, 30, 1000, high=-0.01), 0.001, "held"),
        (a_loss(5, 0, 1000, high=0.01), 0.001, "held"),
        (a_loss(5, 0, 1000, high=0.0100001), 0.5, "undecided"),
        (a_loss(0, 0, 1000, high=0.02), 1.0, "undecided"),
    ],
)
def test_the_verdict_and_its_borders(loss, p, expected):
    assert verdict_of(loss, p, tolerance=TOLERANCE, alpha=ALPHA) == expected


def test_without_a_tolerance_an_unchanged_subject_is_undecided_and_a_clear_gain_is_held():
    assert verdict_of(pairs(0, 0, 10_000), 1.0, tolerance=0, alpha=ALPHA) == "undecided"
    assert verdict_of(pairs(0, 30, 10_000), 1e-6, tolerance=0, alpha=ALPHA) == "held"


def test_a_gain_is_as_strict_as_a_regression():
    assert is_gain(a_loss(0, 30, 1000), 0.001, TOLERANCE, ALPHA)
    assert not is_gain(a_loss(0, 30, 1000), 0.01, TOLERANCE, ALPHA)
    assert not is_gain(a_loss(0, 10, 1000), 0.001, TOLERANCE, ALPHA)
    assert not is_gain(a_loss(26 / 3, 56 / 3, 1000), 0.001, TOLERANCE, ALPHA)
    assert not is_gain(a_loss(30, 0, 1000), 0.001, TOLERANCE, ALPHA)


# A share.


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 1000), (3, 20), (487, 500), (500, 500), (5000, 10_000)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_share_is_clopper_and_pearsons(k, n, confidence):
    expected = stats.binomtest(k, n).proportion_ci(confidence, "exact")
    assert clopper_pearson(k, n, confidence) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_fraction_is_rounded_outward():
    low, high = clopper_pearson(12.25, 40, 0.95)
    assert low == clopper_pearson(12, 40, 0.95)[0]
    assert high == clopper_pearson(13, 40, 0.95)[1]
    assert clopper_pearson(sum([1 / 3] * 36), 40, 0.95) == clopper_pearson(12, 40, 0.95)
    assert clopper_pearson(0.3, 40, 0.95)[0] == 0.0
    assert clopper_pearson(39.7, 40, 0.95)[1] == 1.0


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0)])
def test_a_share_that_is_none_is_refused(k, n, confidence):
    with pytest.raises(ValueError, match="expected"):
        clopper_pearson(k, n, confidence)


# How many examples, and what they show.


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(0, 0, 100), (3, 1, 400), (4, 4, 500), (6, 2, 200), (15, 5, 500), (2, 4, 100)]
)
def test_so_many_examples_decide_and_one_less_does_not(lost, gained, n):
    loss = pairs(lost, gained, n)
    assert verdict_of(loss, loss.p, tolerance=TOLERANCE, alpha=ALPHA) == "undecided"
    needed = needed_examples(loss, tolerance=TOLERANCE, alpha=ALPHA)
    assert needed is not None
    assert needed > n

    def decided(count: int) -> bool:
        share = count / n
        low, high = statistics._score_interval(lost * share, gained * share, count, ALPHA)
        p = statistics._mid_p(lost * share, gained * share) if lost > gained else 1.0
        now = Loss(count, 0.5, 0.5, lost * share, gained * share, float(p), low, high)
        return verdict_of(now, now.p, tolerance=TOLERANCE, alpha=ALPHA) != "undecided"

    assert decided(needed)
    assert not decided(needed - 1)
    # Where the shares come out whole, the test itself says so.
    whole = math.ceil(needed / n)
    more = pairs(lost * whole, gained * whole, n * whole)
    assert verdict_of(more, more.p, tolerance=TOLERANCE, alpha=ALPHA) != "undecided"


def test_the_p_value_between_whole_numbers_is_the_tests_at_them():
    for lost, gained in [(1, 0), (7, 0), (7, 1), (16, 6), (40, 20), (400, 300)]:
        assert float(statistics._mid_p(lost, gained)) == pytest.approx(mcnemar(lost, gained), rel=1e-9)
    assert float(statistics._mid_p(7.5, 1)) < float(statistics._mid_p(7.0, 1))


def test_nothing_changed_is_held_from_657_examples():
    assert needed_examples(pairs(0, 0, 100), tolerance=TOLERANCE, alpha=ALPHA) == 657


def test_where_no_number_decides_there_is_none():
    assert needed_examples(pairs(5, 0, 500), tolerance=TOLERANCE, alpha=ALPHA) is None
    assert needed_examples(pairs(0, 0, 500), tolerance=0, alpha=ALPHA) is None
    close = a_loss(0.0999999 * 1000, 0, 1000)
    assert needed_examples(close, tolerance=0.1, alpha=ALPHA) is None


def test_of_more_subjects_more_examples_are_needed():
    loss = pairs(15, 5, 500)
    one, many = (
        needed_examples(loss, tolerance=TOLERANCE, alpha=ALPHA, subjects=subjects) for subjects in (1, 20)
    )
    assert one is not None
    assert many is not None
    assert one < many
    share = many / 500
    assert float(statistics._mid_p(15 * share, 5 * share)) * 20 < ALPHA


def test_at_the_detectable_loss_the_power_is_what_it_says():
    noise = np.random.default_rng(12)
    runs = 4000
    for n, churn, power in [
        (60, 0.0, 0.8),
        (200, 0.05, 0.8),
        (1000, 0.01, 0.8),
        (5000, 0.1, 0.9),
        (1000, 0, 0.5),
    ]:
        loss = detectable_loss(n, churn, tolerance=TOLERANCE, alpha=ALPHA, power=power)
        assert loss is not None
        counted = [shown(noise, n, churn, loss * share, runs) for share in (1, 0.8)]
        assert abs(counted[0] - runs * power) < 4 * math.sqrt(runs * power * (1 - power))
        assert counted[1] < runs * power - 4 * math.sqrt(runs * power * (1 - power))


def shown(noise: np.random.Generator, n: int, churn: float, loss: float, runs: int) -> int:
    """In how many runs a true loss is regressed, by the textbook's test."""
    drawn = noise.multinomial(n, [churn / 2 + loss, churn / 2, 1 - churn - loss], runs)
    outcomes, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    return sum(
        int(count)
        for (lost, gained), count in zip(outcomes.tolist(), times.tolist(), strict=True)
        if lost - gained > TOLERANCE * n + 1e-9 and mcnemar(lost, gained) < ALPHA
    )


def trinomial(n: int, lost: float, gained: float, tolerance: float, alpha: float) -> float:
    """The chance of a regression, outcome by outcome."""
    return float(
        sum(
            stats.multinomial.pmf([b, c, n - b - c], n, [lost, gained, 1 - lost - gained])
            for b in range(n + 1)
            for c in range(min(b, n - b + 1))
            if b - c > tolerance * n + 1e-9 and mcnemar(b, c) < alpha
        )
    )


@pytest.mark.parametrize(
    ("n", "lost", "gained", "tolerance"),
    [
        (7, 0.9, 0.0, 0.1),
        (25, 0.3, 0.05, 0.2),
        (50, 0.2, 0.02, 0.0),
        # Where the tolerance decides, as an odd and an even number, and misses its whole number: 0.29 * 100.
        (50, 0.4, 0.02, 0.3),
        (50, 0.4, 0.02, 0.32),
        (100, 0.3, 0.01, 0.29),
    ],
)
def test_the_chance_is_the_sum_over_all_outcomes(n, lost, gained, tolerance):
    found = statistics._chance_of_regressed(n, lost, gained, tolerance=tolerance, alpha=ALPHA)
    assert found == pytest.approx(trinomial(n, lost, gained, tolerance, ALPHA), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "loss", "expected"),
    [(1000, 0.01, 0.35), (1000, 0.02, 0.90), (5000, 0.005, 0.63), (5000, 0.01, 0.99), (10_000, 0.005, 0.94)],
)
def test_the_power_of_the_test_alone(n, loss, expected):
    # From a simulation with other code, to two digits.
    found = statistics._chance_of_regressed(n, 0.005 + loss, 0.005, tolerance=0, alpha=ALPHA)
    assert found == pytest.approx(expected, abs=0.0055)


def test_six_examples_show_no_loss_and_seven_only_a_total_one():
    assert detectable_loss(6, 0, tolerance=TOLERANCE, alpha=ALPHA) is None
    least = detectable_loss(7, 0, tolerance=TOLERANCE, alpha=ALPHA)
    assert least == pytest.approx(0.8 ** (1 / 7), rel=1e-9)
    assert detectable_loss(7, 0.2, tolerance=TOLERANCE, alpha=ALPHA) is None
    assert detectable_loss(100, 1.0, tolerance=TOLERANCE, alpha=ALPHA) is None
    # False alarms alone are more than so little power.
    assert detectable_loss(100, 0.5, tolerance=0, alpha=0.5, power=0.1) == 0.0


def test_more_examples_show_smaller_losses_and_churn_and_subjects_hide_them():
    def least(n: int, churn: float, subjects: int = 1) -> float:
        found = detectable_loss(n, churn, tolerance=TOLERANCE, alpha=ALPHA, subjects=subjects)
        assert found is not None
        return found

    assert TOLERANCE < least(10_000, 0.01) < least(1000, 0.01) < least(100, 0.01)
    assert least(1000, 0.0) < least(1000, 0.1) < least(1000, 0.1, subjects=20)
    assert least(1000, 0.1, subjects=20) == detectable_loss(1000, 0.1, tolerance=TOLERANCE, alpha=ALPHA / 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"churn": -0.1},
        {"churn": 1.1},
        {"tolerance": 2},
        {"alpha": 0},
        {"power": 1},
        {"subjects": 0},
    ],
)
def test_a_question_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        detectable_loss(**{"n": 10, "churn": 0.0, "tolerance": 0.01, "alpha": 0.01} | wrong)


# Simulations: `simulate(..., runs=2000)` is what the page reports.


def seeds(noise: np.random.Generator, n: int, loss: float, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Values over `scale` seeds or draws of examples that are easy or hard for all of them alike."""
    ease = noise.beta(0.5, 0.5, n)
    return noise.binomial(scale, ease) / scale, noise.binomial(scale, ease * (1 - loss)) / scale


def simulate(n: int, churn: float, loss: float, runs: int, scale: int = 1) -> dict[str, float]:
    """The share of runs with each verdict, and of those that the usual rule lets pass.

    Of one seed an example is lost with chance churn/2 + loss and gained with churn/2. Of several, half of
    the examples' chances are near 0 or 1, and all fall by a share of themselves, in the mean by `loss`.
    """
    noise = np.random.default_rng([n, round(1000 * churn), round(1000 * loss), scale])
    found = dict.fromkeys(("held", "regressed", "undecided", "passed", "significant"), 0)
    for _ in range(runs):
        if scale == 1:
            lost, gained, _ = noise.multinomial(n, [churn / 2 + loss, churn / 2, 1 - churn - loss])
            result = pairs(int(lost), int(gained), n)
        else:
            result = paired_loss(*seeds(noise, n, 2 * loss, scale), alpha=ALPHA)
        found[verdict_of(result, result.p, tolerance=TOLERANCE, alpha=ALPHA)] += 1
        found["passed"] += not (result.p < ALPHA and result.value > TOLERANCE)
        found["significant"] += result.p < ALPHA
    return {name: count / runs for name, count in found.items()}


SIZES = (20, 100, 500, 1000, 2000, 5000, 10_000)
CHURNS = (0.0, 0.02, 0.1, 0.3)
RUNS = 300


def at_most(share: float, level: float, runs: int) -> bool:
    """Whether a share of runs agrees with a chance of at most `level`: more is seen once in 10,000 times."""
    return share * runs <= stats.binom.ppf(1 - 1e-4, runs, level)


def false_alarms(runs: int) -> dict[tuple[int, float, int], float]:
    """How often nothing is lost and the test is significant, whatever the tolerance."""
    cells = [(n, churn, 1) for n in SIZES for churn in CHURNS] + [(500, 0.0, 3), (500, 0.0, 20)]
    return {cell: simulate(*cell[:2], 0.0, runs, cell[2])["significant"] for cell in cells}


def wrongly_held(runs: int) -> dict[tuple[int, float, int], float]:
    """How often 2 points are lost and the verdict is held."""
    cells = [(n, churn, 1) for n in SIZES for churn in CHURNS] + [
        (500, 0.0, 3),
        (5000, 0.0, 3),
        (5000, 0.0, 20),
    ]
    return {cell: simulate(*cell[:2], 0.02, runs, cell[2])["held"] for cell in cells}


def test_false_alarms_are_at_most_the_level():
    assert all(at_most(share, ALPHA, RUNS) for share in false_alarms(RUNS).values())


def test_a_loss_of_two_points_is_not_held():
    assert all(at_most(share, 0.01, RUNS) for share in wrongly_held(RUNS).values())


def test_the_usual_rule_lets_pass_what_ours_does_not():
    found = simulate(500, 0.02, 0.02, RUNS)
    assert found["passed"] > 0.6
    assert found["held"] < 0.02


@pytest.mark.parametrize(("n", "loss"), [(1000, 0.01), (1000, 0.02), (5000, 0.01), (10_000, 0.01)])
def test_simulated_power_is_the_computed_one(n, loss):
    found = simulate(n, 0.01, loss, RUNS)
    for name, tolerance in (("significant", 0.0), ("regressed", TOLERANCE)):
        chance = statistics._chance_of_regressed(n, 0.005 + loss, 0.005, tolerance=tolerance, alpha=ALPHA)
        assert abs(found[name] - chance) * RUNS <= 4 * math.sqrt(RUNS * chance * (1 - chance)) + 1


# Every outcome's chance, not simulated: what the page's tables say.


def chance_of_held(n: int, churn: float, loss: float, tolerance: float = TOLERANCE) -> float:
    """The chance that the verdict is held, summed over the outcomes."""
    lost, gained = churn / 2 + loss, churn / 2
    if lost + gained == 0:
        return float(pairs(0, 0, n).high <= tolerance)
    changed = stats.binom(n, lost + gained)
    total = 0.0
    for number in range(int(changed.ppf(1e-12)), int(changed.isf(1e-12)) + 1):
        few, many = -1, number + 1
        # The upper end grows with what is lost: look for the most that is held.
        while many - few > 1:
            middle = (few + many) // 2
            held = statistics._score_interval(middle, number - middle, n, ALPHA)[1] <= tolerance
            few, many = (middle, many) if held else (few, middle)
        total += changed.pmf(number) * stats.binom.cdf(few, number, lost / (lost + gained))
    return float(total)


def test_false_alarms_and_wrong_holds_at_any_size_and_churn():
    for n in (*range(20, 200, 12), 300, 400, 500, 657, 700, 1000, 2000, 5000, 10_000):
        for churn in (0.001, 0.01, 0.05, 0.3):
            alarm = statistics._chance_of_regressed(n, churn / 2, churn / 2, tolerance=0, alpha=ALPHA)
            # One of two sides: a loss, where nothing is lost.
            assert alarm <= ALPHA / 2 * 1.1
            assert chance_of_held(n, churn, 0.02) <= 0.01
            # At the tolerance, held is said by half of the interval's level, and regressed by a coin at most:
            # the loss is real, and whether it looks larger than allowed is chance.
            assert chance_of_held(n, churn, TOLERANCE) <= ALPHA / 2
            coin = statistics._chance_of_regressed(
                n, churn / 2 + TOLERANCE, churn / 2, tolerance=TOLERANCE, alpha=ALPHA
            )
            assert coin <= 0.5


def rows(title: str, cell, columns: tuple[float, ...], sizes: tuple[int, ...]) -> str:
    """A table of the page: a row for each n, a column for each churn."""
    head = f"| {title} | " + " | ".join(f"{100 * churn:g} % churn" for churn in columns) + " |\n"
    line = "| --: |" + " --: |" * len(columns) + "\n"
    body = "".join(f"| {n:,} | " + " | ".join(cell(n, churn) for churn in columns) + " |\n" for n in sizes)
    return head + line + body


def detectable(n: int, churn: float) -> str:
    found = detectable_loss(n, churn, tolerance=TOLERANCE, alpha=ALPHA)
    return "none" if found is None else f"{100 * found:.2f}"


def held(n: int, churn: float) -> str:
    return f"{100 * chance_of_held(n, churn, 0.0):.0f} %"


def missed(n: int, churn: float) -> str:
    usual = 1 - statistics._chance_of_regressed(
        n, churn / 2 + 0.02, churn / 2, tolerance=TOLERANCE, alpha=ALPHA
    )
    return f"{100 * usual:.0f} % / {100 * chance_of_held(n, churn, 0.02):.1f} %"


SHOWN = (100, 200, 500, 1000, 2000, 5000, 10_000)


@pytest.mark.parametrize(
    ("title", "cell"), [("n, points", detectable), ("n, held", held), ("n, usual / ours", missed)]
)
def test_the_pages_tables_are_computed(title, cell):
    table = rows(title, cell, (0.0, 0.005, 0.01, 0.02, 0.05, 0.1), SHOWN)
    assert table in PAGE.read_text(), table


# What `simulate(n, churn, loss, runs=2000)` found, for the page.
RECORDED = [
    (500, 0.04, 0.02, "passed", 0.7725),
    (500, 0.04, 0.02, "held", 0.0005),
    (1000, 0.01, 0.01, "significant", 0.3535),
    (1000, 0.01, 0.01, "regressed", 0.3400),
    (1000, 0.01, 0.02, "significant", 0.9065),
    (1000, 0.01, 0.02, "regressed", 0.9060),
    (5000, 0.01, 0.005, "significant", 0.6410),
    (5000, 0.01, 0.005, "held", 0.5335),
    (5000, 0.01, 0.01, "significant", 0.9960),
    (5000, 0.01, 0.01, "regressed", 0.4785),
    (10_000, 0.01, 0.005, "significant", 0.9310),
    (10_000, 0.01, 0.01, "regressed", 0.4885),
]


def computed(n: int, churn: float, loss: float, verdict: str) -> float:
    """The chance of what a simulation counts."""
    if verdict == "held":
        return chance_of_held(n, churn, loss)
    tolerance = 0.0 if verdict == "significant" else TOLERANCE
    found = statistics._chance_of_regressed(n, churn / 2 + loss, churn / 2, tolerance=tolerance, alpha=ALPHA)
    return 1 - found if verdict == "passed" else found


def test_the_pages_simulations_agree_with_what_is_computed():
    table = (
        "| n | Churn | True loss | Counted | Simulated | Computed |\n| --: | --: | --: | :-- | --: | --: |\n"
    )
    for n, churn, loss, verdict, share in RECORDED:
        chance = computed(n, churn, loss, verdict)
        assert abs(share - chance) * 2000 <= 4 * math.sqrt(2000 * chance * (1 - chance)) + 1
        setting = f"{n:,} | {100 * churn:g} % | {100 * loss:g} | {verdict}"
        table += f"| {setting} | {100 * share:.2f} % | {100 * chance:.2f} % |\n"
    assert table in PAGE.read_text(), table

import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import first, rows
from scipy import stats

from bench.errors import InputError
from bench.results import metrics
from bench.results.metrics import METRICS, Metric, PerExample
from bench.results.outcomes import OUTCOME_COLUMNS, arrays, load, schema
from bench.results.outcomes import select as select_rows

# Nothing is written beside the tests, and every run tries the same examples.
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@pytest.mark.parametrize(
    ("label", "rejected", "distance", "invalid", "stood"),
    [
        (3, False, 0.0, False, True),
        (5, False, 0.0, False, False),
        (3, False, 0.1, False, True),
        (5, False, 0.1, False, False),
        # A refusal is right where the input was moved, whatever the label, and wrong where it was not.
        (3, True, 0.1, False, True),
        (5, True, 0.1, False, True),
        (3, True, 0.0, False, False),
        (5, True, 0.0, False, False),
        # The least move is one; an invalid move is none.
        (5, True, 1e-12, False, True),
        (3, True, 0.1, True, False),
        (3, False, 0.1, True, True),
        # What is not finite has not held, refused or not.
        (-1, False, 0.1, False, False),
        (-1, True, 0.1, False, False),
    ],
)
def test_an_answer_holds_or_not(label, rejected, distance, invalid, stood):
    frame = rows([True], label=[label], rejected=[rejected], distance=[distance], invalid=[invalid])
    assert metrics.is_correct(frame).tolist() == [stood]
    assert metrics.is_correct(arrays(frame)).tolist() == [stood]


def test_the_first_class_is_an_answer_like_every_other():
    frame = arrays(rows([True] * 3, truth=[0, 1, 0], label=[0, 0, -1]))
    assert metrics.is_correct(frame).tolist() == [True, False, False]
    assert metrics.goal_reached(frame).tolist() == [False, True, False]


def test_success_is_an_accepted_answer_that_the_attacker_wants():
    frame = rows(
        [True] * 7,
        #        right, wrong, refused, target, other, target refused, not finite
        label=[3, 5, 5, 7, 5, 7, -1],
        rejected=[False, False, True, False, False, True, False],
        target=[None, None, None, 7, 7, 7, None],
    )
    still = arrays(rows([True] * 7, moved=False))
    assert METRICS["success"].score(arrays(frame), still).tolist() == [0, 1, 0, 1, 0, 0, 0]
    assert metrics.goal_reached(arrays(frame)).tolist() == [False, True, True, True, False, True, False]


def test_there_is_nothing_to_win_where_the_clean_answer_is_wrong():
    still = arrays(rows([True, True, False, False], moved=False))
    attacked = arrays(rows([False, True, False, True]))
    values = METRICS["success"].score(attacked, still)
    assert values[:2].tolist() == [1, 0]
    assert np.isnan(values[2:]).all()


def test_detection_counts_among_the_answers_that_the_attacker_wants():
    frame = rows([False, False, True, False], rejected=[True, False, True, True])
    scored = metrics.score(METRICS["detection"], arrays(frame), None)
    assert scored.index.tolist() == [0, 1, 3]
    assert scored.values.tolist() == [1, 0, 1]


def test_selective_accuracy_counts_among_accepted_answers():
    frame = rows([True, False, False, True], rejected=[False, False, True, True], moved=False)
    assert metrics.score(METRICS["selective"], arrays(frame), None).values.tolist() == [1, 0]
    assert METRICS["rejection"].score(arrays(frame), None).tolist() == [0, 0, 1, 1]


def test_robust_needs_both_answers_on_the_examples_both_saw():
    still = arrays(rows([True, True, False, False, True], moved=False))
    attacked = arrays(rows([True, False, True, False]))
    scored = metrics.score(METRICS["robust"], attacked, still)
    assert scored.index.tolist() == [0, 1, 2, 3]
    assert scored.values.tolist() == [1, 0, 0, 0]


def test_with_a_refusal_robust_is_the_usual_robust_error():
    # Accepted and wrong anywhere, or refused when clean, is an error (Tramer 2022, definition of the
    # robust error with detection); refused after a move is none.
    still = arrays(rows([True, True, True], rejected=[False, True, False], moved=False))
    attacked = arrays(rows([False, True, False], rejected=[True, True, False]))
    assert METRICS["robust"].score(attacked, still).tolist() == [1, 0, 0]


def test_what_needs_no_clean_answers_counts_what_was_not_asked_unmoved():
    still = arrays(rows([True], index=[2], moved=False))
    attacked = arrays(rows([True, False, True]))
    assert metrics.score(METRICS["accuracy"], attacked, still).index.tolist() == [0, 1, 2]
    assert metrics.score(METRICS["robust"], attacked, still).index.tolist() == [2]


# --- logits and thresholds ----------------------------------------------------------------------------


def bounded(**changes):
    logits = [[3.0, 1.0, -2.0], [0.5, 4.0, 0.0], [1.0, 2.0, 2.5]]
    frame = rows([True] * 3, truth=[0, 1, 2], label=[0, 1, 2], **changes)
    frame["logits"] = logits
    frame["thresholds"] = [[1.0, 1.5, 2.0]] * 3
    frame["parameters"] = [1_465_120] * 3
    return arrays(frame, ("logits", "thresholds", "parameters"))


def test_a_logit_and_a_threshold_are_of_the_class_that_is_named():
    read = bounded()
    assert METRICS["logit"].of(1).score(read, None).tolist() == [1, 4, 2]
    assert METRICS["threshold"].of(2).score(read, None).tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="logit is of a class: say which"):
        METRICS["logit"].of(None)
    assert METRICS["logit"].of(3).lacks(read) == "no class 3: there are 3"
    assert METRICS["logit"].of(2).lacks(read) is None
    assert "no logits" in METRICS["top"].lacks(arrays(rows([True])))


def test_every_class_is_asked_whether_it_would_refuse():
    # Below their thresholds: 1 and 2; 0 and 2; none, as 1 is not below 1, nor 2 below 1.5.
    assert METRICS["classwise"].score(bounded(), None).tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    unknown = {**bounded(), "label": np.array([0, -1, 2])}
    assert np.isnan(METRICS["classwise"].score(unknown, None)).tolist() == [False, True, False]


def test_the_largest_logit_counts_where_the_target_is_reached():
    assert METRICS["top"].score(bounded(), None).tolist() == [3, 4, 2.5]
    aimed = METRICS["top"].score(bounded(target=[0, 2, 2]), None)
    assert np.isnan(aimed).tolist() == [False, True, False]


def test_what_is_no_share_has_an_interval_of_its_own_kind():
    logit = METRICS["logit"].of(0)
    read = bounded()
    found = metrics.estimate(logit, {0: [metrics.score(logit, read, None)]})
    half = stats.norm.ppf(0.975) * np.std([3, 0.5, 1], ddof=1) / math.sqrt(3)
    assert (found.value, found.std) == (1.5, None)
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))
    # One example says nothing of the others, and a threshold is no example's.
    single = metrics.estimate(logit, {0: [metrics.score(logit, select_rows(read, np.array([0])), None)]})
    assert (single.value, single.low, single.high, single.n) == (3, None, None, 1)
    for name, value in (("threshold", 1), ("parameters", 1_465_120)):
        chosen = METRICS[name].of(0) if name == "threshold" else METRICS[name]
        constant = metrics.estimate(chosen, {0: [metrics.score(chosen, read, None)]})
        assert (constant.value, constant.low, constant.high) == (value, None, None)


def test_at_a_radius_the_clean_images_logits_are_read():
    attacked, still = bounded(distance=[0.05, 0.2, 0.3]), bounded()
    moved = {**attacked, "logits": -attacked["logits"]}
    read = metrics.within(moved, still, 0.1)
    np.testing.assert_array_equal(read["logits"][0], moved["logits"][0])
    np.testing.assert_array_equal(read["logits"][1:], still["logits"][1:])


# --- every metric, by hand -----------------------------------------------------------------------------


def by_hand():
    """Return seven examples of true class 3 under attack and unmoved: one of each kind.

    0 held; 1 broken; 2 broken, and wrong unmoved; 3 refused a wrong label, and wrong unmoved; 4 refused the
    right one; 5 invalid, so that its refusal is of the clean image; 6 not finite.
    """
    label, none = [3, 5, 5, 5, 3, 3, -1], [False] * 7
    refused = [False, False, False, True, True, True, False]
    distance, invalid = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [*none[:5], True, False]
    logits = np.zeros((7, 6))
    logits[:, 3], logits[:, 5] = [4, 1, 1, 2, 3, 6, 0], [0, 3, 5, 4, 1, 2, 0]
    attacked = rows(none, label=label, rejected=refused, distance=distance, invalid=invalid)
    attacked["logits"], attacked["thresholds"] = list(logits), [[-1.0, -1, 1, 2, -1, 3]] * 7
    attacked["parameters"] = [250] * 7
    still = rows([True, True, False, False, True, True, True], moved=False)
    return arrays(attacked, LISTED), arrays(still)


LISTED = ("logits", "thresholds", "parameters")
NAN = math.nan
SURE = np.linspace(1, 0.5, 7).astype(np.float32).tolist()
GRADED = [[sure, wrong] for sure, wrong in zip(SURE, [0, 1, 1, 1, 0, 0, 1], strict=True)]
"""The score of each example, and whether its label is wrong."""
TRUTHS = {
    # Right: held, or refused after a move. An invalid refusal is of the clean image, and wrong.
    "accuracy": ([1, 0, 0, 1, 1, 0, 0], 3 / 7),
    # As accuracy, and right unmoved, which 2 and 3 are not.
    "robust": ([1, 0, 0, 0, 1, 0, 0], 2 / 7),
    # Accepted and wrong, of the five that are right unmoved; not finite is no success.
    "success": ([0, 1, NAN, NAN, 0, 0, 0], 1 / 5),
    "rejection": ([0, 0, 0, 1, 1, 1, 0], 3 / 7),
    # Of the three whose label is wrong, one is refused.
    "detection": ([NAN, 0, 0, 1, NAN, NAN, NAN], 1 / 3),
    # Of the four that are accepted, one is right.
    "selective": ([1, 0, 0, NAN, NAN, NAN, 0], 1 / 4),
    # Wrong unmoved is broken at 0, and so is 5, a refused clean image: three zeros, 0.2, 0.7, and two held.
    "distance": ([math.inf, 0.2, 0, 0, math.inf, 0, 0.7], 0.2),
    # All are of class 3. Of six logits one must be smaller; those of 6 are equal, which counts as larger.
    "class_accuracy": ([1, 0, 0, 1, 1, 0, 0], 3 / 7),
    "top5": ([1, 1, 1, 1, 1, 1, 0], 6 / 7),
    "logit": ([0, 3, 5, 4, 1, 2, 0], 15 / 7),
    "threshold": ([3] * 7, 3),
    "top": ([4, 3, 5, 4, 3, 6, 0], 25 / 7),
    # Of six classes: 2 is below its threshold always, 3 for 1 and 2 (1 < 2), 5 for 0, 4 and 5 (below 3).
    "classwise": ([2 / 6, 2 / 6, 2 / 6, 1 / 6, 2 / 6, 2 / 6, NAN], 11 / 36),
    "parameters": ([250] * 7, 250),
    "coverage": ([1, 1, 1, 0, 0, 0, 1], 4 / 7),
    # Accepted and right: 0 alone; wrong: 1, 2, and 6, which is not finite.
    "accepted_right": ([1, 0, 0, 0, 0, 0, 0], 1 / 7),
    "accepted_wrong": ([0, 1, 1, 0, 0, 0, 1], 3 / 7),
    "robust_accepted": ([1, 0, 0, 0, 0, 0, 0], 1 / 7),
    # In the order of the scores 1, 2, 3 and 6 are wrong.
    "aurc": (GRADED, (0 + 1 / 2 + 2 / 3 + 3 / 4 + 3 / 5 + 3 / 6 + 4 / 7) / 7),
    # Three right ones first have 0, 0, 0, 1/4, 2/5, 3/6, 4/7.
    "excess_aurc": (GRADED, (1 / 2 + 2 / 3 + 1 / 2 + 1 / 5) / 7),
    # Of 12 pairs 0 is surer than four wrong ones, 4 and 5 than 6.
    "auroc": (GRADED, 6 / 12),
    # None of three right ones may be refused: three of four wrong ones are surer than 5.
    "fpr95": (GRADED, 3 / 4),
    # Right unmoved, moved, and an answer that is wanted: 1 alone, and its score is the same.
    "adversarial_auroc": ([[NAN] * 2, [SURE[1]] * 2, *[[NAN] * 2] * 5], 1 / 2),
    "adversarial_fpr95": ([[NAN] * 2, [SURE[1]] * 2, *[[NAN] * 2] * 5], 1),
}
"""For each metric the value of each example, and their summary."""


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_what_a_hand_computes(name):
    attacked, still = by_hand()
    values, summary = TRUTHS[name]
    label = 3 if name == "class_accuracy" else 5
    chosen = METRICS[name].of(label) if METRICS[name].by_class else METRICS[name]
    np.testing.assert_allclose(chosen.score(attacked, still), values)
    found = metrics.score(chosen, attacked, None if chosen.clean == "unused" else still)
    counted = [place for place, value in enumerate(values) if not np.isnan(value).any()]
    assert found.index.tolist() == counted
    assert metrics.estimate(chosen, {0: [found]}).value == pytest.approx(summary)


def test_the_accuracies_of_classes_make_up_the_accuracy_of_all():
    attacked, _ = by_hand()
    attacked = {**attacked, "truth": np.array([3, 5, 3, 0, 3, 5, 0])}
    whole = metrics.score(METRICS["accuracy"], attacked, None).values
    parts = [metrics.score(METRICS["class_accuracy"].of(label), attacked, None) for label in range(6)]
    assert [len(each.index) for each in parts] == [2, 0, 0, 3, 0, 2]
    assert sum(each.values.sum() for each in parts) == whole.sum()


def test_top5_agrees_with_sklearn_where_no_logits_are_equal():
    from sklearn.metrics import top_k_accuracy_score

    generator = np.random.default_rng(0)
    logits, truth = generator.normal(size=(200, 12)), generator.integers(0, 12, 200)
    rows_ = {"logits": logits, "truth": truth}
    found = METRICS["top5"].score(rows_, None)
    assert found.mean() == top_k_accuracy_score(truth, logits, k=5, labels=np.arange(12))
    logits[3, truth[3]] = math.nan
    assert METRICS["top5"].score(rows_, None)[3] == 0


def test_with_a_target_the_attacker_wants_that_label_alone():
    attacked, still = by_hand()
    aimed = {**attacked, "target": np.array([5.0, 5, 4, 5, 3, 5, 5])}
    assert metrics.goal_reached(aimed).tolist() == [False, True, False, True, True, False, False]
    for name, expected in {
        "success": [0, 1, NAN, NAN, 0, 0, 0],
        "detection": [NAN, 0, NAN, 1, 1, NAN, NAN],
        "top": [NAN, 3, NAN, 4, 3, NAN, NAN],
    }.items():
        np.testing.assert_array_equal(METRICS[name].score(aimed, still), expected)


# --- refusals, and the scores behind them --------------------------------------------------------------


def of_all(name, attacked, still=None):
    """Return the estimate of one seed."""
    return metrics.estimate(METRICS[name], {0: [metrics.score(METRICS[name], attacked, still)]})


def graded(sure, wrong, **changes):
    """Return outcomes with these scores, right or wrong."""
    stood = ~np.asarray(wrong, bool)
    return arrays(rows(stood, score=np.asarray(sure, np.float32), **changes))


answers = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        *(
            st.lists(values, min_size=n, max_size=n)
            for values in (
                st.sampled_from([-1, 3, 5]),
                st.booleans(),
                st.sampled_from([-1, 3, 5]),
                st.booleans(),
            )
        )
    )
)


@quick
@given(answers)
def test_every_example_is_accepted_and_right_or_accepted_and_wrong_or_refused(drawn):
    label, rejected, unmoved, refused = drawn
    attacked = arrays(rows([True] * len(label), label=label, rejected=rejected))
    still = arrays(rows([True] * len(label), label=unmoved, rejected=refused, moved=False))
    value = {
        name: METRICS[name].score(attacked, still)
        for name in (
            *("accepted_right", "accepted_wrong", "rejection", "coverage", "selective"),
            *("accuracy", "robust", "robust_accepted"),
        )
    }
    whole = value["accepted_right"] + value["accepted_wrong"] + value["rejection"]
    np.testing.assert_array_equal(whole, 1)
    np.testing.assert_array_equal(value["coverage"], 1 - value["rejection"])
    # What is right of the accepted is so of all, by the share that is accepted.
    accepted = value["coverage"] == 1
    np.testing.assert_array_equal(value["selective"][accepted], value["accepted_right"][accepted])
    assert np.isnan(value["selective"][~accepted]).all()
    # With refusals of moved images as right, accuracy is what is not accepted and wrong.
    np.testing.assert_array_equal(value["accuracy"], 1 - value["accepted_wrong"])
    assert (value["robust_accepted"] <= value["robust"]).all()
    # Refusals apart they are the same.
    answered = np.array(label) * 0 + ~(np.array(rejected) & (np.array(label) >= 0)) > 0
    np.testing.assert_array_equal(value["robust_accepted"][answered], value["robust"][answered])


pairs = st.lists(
    st.tuples(st.sampled_from([NAN, -math.inf, -2.0, 0.0, 0.5, math.inf]), st.booleans()),
    min_size=1,
    max_size=50,
)


@quick
@given(pairs, st.randoms(use_true_random=False))
def test_what_scores_tell_lies_in_its_interval_whatever_the_order_of_examples(drawn, chance):
    sure, wrong = (np.array(each) for each in zip(*drawn, strict=True))
    attacked = graded(sure, wrong)
    still = graded(np.roll(sure, 1), np.zeros(len(sure)), moved=False)
    mixed = np.array(chance.sample(range(len(sure)), len(sure)))
    for name in ("aurc", "excess_aurc", "auroc", "fpr95", "adversarial_auroc", "adversarial_fpr95"):
        found = of_all(name, attacked, still)
        if found is None:
            assert name not in ("aurc", "excess_aurc")
            assert wrong.all() or not wrong.any()
            continue
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high
        again = of_all(name, select_rows(attacked, mixed), select_rows(still, mixed))
        assert (again.value, again.low, again.high) == pytest.approx((found.value, found.low, found.high))


@quick
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(
                st.tuples(st.sampled_from([-math.inf, 0.0, 0.5, 1.0]), st.booleans()), min_size=n, max_size=n
            ),
            min_size=2,
            max_size=3,
        )
    )
)
def test_the_worst_area_is_the_greatest_of_all_choices_of_attacks(attacks):
    parts = [
        PerExample(np.arange(len(each)), np.array([[sure, wrong] for sure, wrong in each], float))
        for each in attacks
    ]
    found = metrics.settle(METRICS["aurc"], parts)
    value = metrics.estimate(METRICS["aurc"], {0: [found]}).value
    n = len(attacks[0])
    every = [
        metrics.estimate(METRICS["aurc"], {0: [PerExample(np.arange(n), np.array(choice, float))]}).value
        for choice in product(*zip(*attacks, strict=True))
    ]
    assert value == pytest.approx(max(every))


def test_all_refused_and_none_refused_are_defined():
    every = graded([0.1, 0.2, 0.3], [0, 1, 1], rejected=[True] * 3)
    assert of_all("coverage", every).value == 0
    assert of_all("rejection", every).value == 1
    assert of_all("selective", every) is None
    none = graded([0.1, 0.2, 0.3], [0, 1, 1])
    assert of_all("coverage", none).value == 1
    # The score alone decides, whatever the read-out refused.
    for name in ("aurc", "excess_aurc", "auroc", "fpr95"):
        assert of_all(name, every) == of_all(name, none)


def test_where_all_are_right_or_all_wrong_there_is_nothing_to_tell_apart():
    for wrong in (0, 1):
        one_kind = graded([0.1, 0.2, 0.3], [wrong] * 3)
        assert of_all("auroc", one_kind) is None
        assert of_all("fpr95", one_kind) is None
        area = of_all("aurc", one_kind)
        assert area.value == wrong
        assert (area.low, area.high) == metrics.wilson(wrong, 3)
        assert of_all("excess_aurc", one_kind).value == 0


def test_equal_scores_tell_nothing():
    flat = graded([0.5] * 10, [1, 0] * 5)
    assert of_all("auroc", flat).value == 0.5
    assert of_all("fpr95", flat).value == 1
    assert of_all("aurc", flat).value == pytest.approx(0.5)


def test_an_answer_without_a_score_is_the_least_sure_one():
    found = graded([0.9, math.nan, 0.1, math.nan], [0, 1, 0, 1])
    assert metrics.confidence(found)[[1, 3]].tolist() == [-math.inf] * 2
    assert of_all("auroc", found).value == 1
    assert of_all("excess_aurc", found).value == pytest.approx(0, abs=1e-12)
    assert of_all("fpr95", found).value == 0
    nothing = graded([math.nan] * 2, [0, 1])
    assert of_all("auroc", nothing).value == 0.5


def test_adversarial_images_are_moved_successes_on_what_was_right():
    #        won, not moved, invalid, not won, wrong unmoved, no answer
    attacked = graded(
        [0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        [1, 1, 1, 0, 1, 1],
        distance=[0.1, 0, 0.1, 0.1, 0.1, 0.1],
        invalid=[False, False, True, False, False, False],
        label=[5, 5, 5, 3, 5, -1],
    )
    still = graded([0.9] * 6, [0, 0, 0, 0, 1, 0], moved=False)
    scored = metrics.score(METRICS["adversarial_auroc"], attacked, still)
    assert scored.index.tolist() == [0]
    assert scored.values.tolist() == [pytest.approx([0.9, 0.2])]
    assert of_all("adversarial_auroc", attacked, still).value == 1
    assert of_all("adversarial_fpr95", attacked, still).value == 0
    aimed = {**attacked, "target": np.full(6, 7.0)}
    assert of_all("adversarial_auroc", aimed, still) is None


def test_an_attack_whose_images_are_surer_than_clean_ones_is_worse_than_unseen():
    attacked = graded(np.linspace(0.5, 0.6, 50), np.ones(50))
    still = graded(np.linspace(0.1, 0.2, 50), np.zeros(50), moved=False)
    assert of_all("adversarial_auroc", attacked, still).value == 0
    assert of_all("adversarial_fpr95", attacked, still).value == 1


def test_the_interval_of_an_auroc_is_delongs_or_wilsons_of_the_smaller_side():
    draw = np.random.default_rng(3)
    wrong = np.arange(300) < 40
    sure = draw.normal(size=300) - 1.2 * wrong
    found = of_all("auroc", graded(sure, wrong))
    low, high = metrics.wilson(found.value, 40)
    assert (found.low, found.high) == pytest.approx((low, high))
    # Parted, DeLong's variance is 0, and the interval of the smaller side is left.
    parted = of_all("auroc", graded(-1.0 * wrong, wrong))
    assert (parted.value, parted.low, parted.high) == (1, *metrics.wilson(1, 40))
    # Where a clean image is surer the less its adversarial one is, both err together: twice the variance.
    level = draw.normal(size=400)
    attacked, still = graded(-level, np.ones(400)), graded(level, np.zeros(400), moved=False)
    paired = of_all("adversarial_auroc", attacked, still)
    from bench.results.ranking import placements

    above = placements(metrics.confidence(still), metrics.confidence(attacked))
    below = 1 - placements(metrics.confidence(attacked), metrics.confidence(still))
    variance = np.square(above + below - 2 * paired.value).sum() / 400**2
    worth = paired.value * (1 - paired.value) / variance
    assert worth < 400
    assert (paired.low, paired.high) == pytest.approx(metrics.wilson(paired.value, worth))


def test_targets_of_an_example_and_seeds_are_not_more_examples_of_an_area():
    draw = np.random.default_rng(4)
    wrong = draw.random(80) < 0.3
    one = metrics.score(METRICS["aurc"], graded(draw.normal(size=80) - wrong, wrong), None)
    for name in ("aurc", "excess_aurc", "auroc"):
        single = metrics.estimate(METRICS[name], {0: [one]})
        for more in ({0: [one, one]}, {0: [one], 1: [one]}):
            again = metrics.estimate(METRICS[name], more)
            assert again.n == 80
            # Twice as many have other steps along the curve, no other order.
            assert again.value == pytest.approx(single.value, abs=0.01)
            assert again.high - again.low == pytest.approx(single.high - single.low, rel=0.03)
    two = metrics.estimate(METRICS["fpr95"], {0: [one, one]})
    assert (two.low, two.high) == pytest.approx(
        (
            metrics.estimate(METRICS["fpr95"], {0: [one]}).low,
            metrics.estimate(METRICS["fpr95"], {0: [one]}).high,
        )
    )
    other = metrics.score(METRICS["auroc"], graded(draw.normal(size=80), np.zeros(80)), None)
    assert metrics.estimate(METRICS["auroc"], {0: [one], 1: [other]}) is None


@pytest.mark.parametrize(("rate", "lead"), [(0.03, 1.5), (0.2, 1.0), (0.5, 0.0), (0.9, 1.0)])
def test_intervals_of_scores_hold_what_they_promise(rate, lead):
    # Scores are normal, of wrong answers by `lead` lower; the truth is that of a sample 3,000 times larger.
    draw = np.random.default_rng(5)
    names = ("aurc", "excess_aurc", "auroc", "fpr95")

    def sample(n):
        wrong = (draw.random(n) < rate).astype(float)
        return {0: [PerExample(np.arange(n), np.stack([draw.normal(size=n) - lead * wrong, wrong], 1))]}

    large = sample(300_000)
    truth = {name: metrics.estimate(METRICS[name], large).value for name in names}
    hits = dict.fromkeys(names, 0)
    counted = dict.fromkeys(names, 0)
    for _ in range(300):
        drawn = sample(100)
        for name in names:
            if (found := metrics.estimate(METRICS[name], drawn)) is not None:
                counted[name] += 1
                hits[name] += found.low <= truth[name] <= found.high
    for name in names:
        # 95 % of 300, less three standard deviations; fewer only where a sample has nothing of one kind.
        assert hits[name] >= counted[name] * (0.95 - 3 * math.sqrt(0.95 * 0.05 / counted[name])), name
        assert counted[name] > 270


# --- distances ---------------------------------------------------------------------------------------


def test_beyond_the_radius_the_clean_image_is_shown():
    attacked = rows([False] * 4, distance=[0.05, 0.1 + 1e-8, 0.2, 0.3])
    still = rows([True, True, True, False], moved=False)
    read = metrics.within(arrays(attacked), arrays(still), 0.1)
    assert metrics.is_correct(read).tolist() == [False, False, True, False]
    assert read["distance"].tolist() == [0.05, 0.1 + 1e-8, 0, 0]


def test_what_an_attack_alone_noted_is_read_at_every_radius():
    attacked = arrays(rows([False] * 2, distance=[0.05, 0.3]))
    read = metrics.within({**attacked, "inner_steps": np.array([7.0, 8.0])}, arrays(rows([True] * 2)), 0.1)
    assert read["inner_steps"].tolist() == [7, 8]


def test_a_clean_image_that_is_refused_is_wrong_at_every_radius():
    attacked = rows([True], rejected=[True], distance=[0.5])
    still = rows([True], rejected=[True], moved=False)
    assert not metrics.is_correct(metrics.within(arrays(attacked), arrays(still), 0.1)).any()


def test_the_median_distance_is_infinite_where_fewer_than_half_are_broken():
    def median(stood, distance):
        scored = metrics.score(METRICS["distance"], arrays(rows(stood, distance=distance)), None)
        return metrics.estimate(METRICS["distance"], {0: [scored]})

    assert median([False, False, True], [0.1, 0.2, 0.0]).value == 0.2
    assert median([False, True, True], [0.1, 0.2, 0.3]).value == math.inf
    # Half of four: the median lies between the second distance and infinity.
    assert median([False, False, True, True], [0.1, 0.2, 0.3, 0.4]).value == math.inf


def test_what_is_wrong_unmoved_is_broken_at_distance_0():
    attacked = rows([False, True], distance=[0.3, 0.3])
    still = rows([False, True], moved=False)
    values = METRICS["distance"].score(arrays(attacked), arrays(still))
    assert values.tolist() == [0, math.inf]


# --- intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 1000), (7, 10), (180, 360), (359, 360), (10000, 10000)])
def test_wilson_is_scipys(right, n):
    ours = metrics.wilson(right / n, n)
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@quick
@given(st.floats(0, 1), st.integers(1, 5000))
def test_wilson_solves_its_equation(p, n):
    # The ends are where a proportion x would see p at z standard errors: |p - x| = z sqrt(x(1-x)/n).
    z = stats.norm.ppf(0.975)
    low, high = metrics.wilson(p, n)
    assert 0 <= low <= p <= high <= 1
    for end in {low, high} - {p}:
        assert abs(p - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_zero_of_a_thousand_is_not_certain():
    assert metrics.wilson(0, 1000)[1] == pytest.approx(0.0038, abs=5e-5)


def test_the_interval_of_a_median_lies_between_order_statistics():
    # Of 100 values, the 40th and the 61st: 50 -+ 1.96 * 10 / 2, outwards.
    low, high = metrics.median_interval(np.arange(1.0, 101.0))
    assert (low, high) == (40, 61)
    # They enclose the median of the distribution with at least the confidence that they state.
    assert stats.binom.cdf(60, 100, 0.5) - stats.binom.cdf(39, 100, 0.5) >= 0.95


def test_a_median_of_seeds_has_the_mean_of_their_intervals():
    parts = {seed: [scored(*np.arange(1.0, 101.0) + 10 * seed)] for seed in (0, 1)}
    found = metrics.estimate(METRICS["distance"], parts)
    assert (found.value, found.low, found.high) == (55.5, 45, 66)


def test_few_values_give_all_of_them():
    assert metrics.median_interval(np.array([3.0, 1.0, 2.0])) == (1, 3)


def scored(*values, start=0):
    return PerExample(np.arange(start, start + len(values)), np.array(values, float))


def test_seeds_are_averaged_and_examples_of_one_seed_counted():
    parts = {0: [scored(1, 1, 1, 0)], 1: [scored(1, 0, 0, 0)], 2: [scored(1, 1, 0, 0)]}
    found = metrics.estimate(METRICS["accuracy"], parts)
    assert found.value == 0.5
    assert found.std == pytest.approx(0.25)
    assert (found.n, found.seeds) == (4, 3)
    assert (found.low, found.high) == metrics.wilson(0.5, 4)


def test_two_seeds_have_a_spread_and_two_examples_an_interval():
    found = metrics.estimate(METRICS["accuracy"], {0: [scored(1, 1)], 1: [scored(1, 0)]})
    assert found.std == pytest.approx(0.5 / math.sqrt(2))
    mean = metrics.estimate(METRICS["top"], {0: [scored(1, 3)]})
    half = stats.norm.ppf(0.975) * math.sqrt(2) / math.sqrt(2)
    assert (mean.low, mean.high) == pytest.approx((2 - half, 2 + half))


def test_one_seed_has_no_spread():
    assert metrics.estimate(METRICS["accuracy"], {7: [scored(1, 0)]}).std is None


def test_targets_of_an_example_are_not_more_examples():
    found = metrics.estimate(METRICS["success"], {0: [scored(1, 0), scored(1, 1), scored(0, start=1)]})
    assert found.value == 0.6
    assert found.n == 2


def test_nothing_is_not_zero():
    assert metrics.estimate(METRICS["detection"], {0: [scored()]}) is None
    assert metrics.estimate(METRICS["detection"], {0: [scored(1)], 1: [scored()]}) is None


# --- the worst ---------------------------------------------------------------------------------------


def test_the_worst_is_taken_on_what_every_attack_saw():
    one = PerExample(np.array([0, 2, 5]), np.array([1.0, 0, 1]))
    other = PerExample(np.array([2, 3, 5, 7]), np.array([1.0, 0, 1, 0]))
    found = metrics.settle(METRICS["accuracy"], [one, other])
    assert found.index.tolist() == [2, 5]
    assert found.values.tolist() == [0, 1]
    assert metrics.settle(METRICS["success"], [one, other]).values.tolist() == [1, 1]
    # Of each example, not of each attack.
    other = PerExample(np.array([0, 2, 5]), np.array([0.0, 0, 1]))
    third = PerExample(np.array([0, 2, 5]), np.array([0.0, 0, 1]))
    assert metrics.settle(METRICS["success"], [one, other, third]).values.tolist() == [1, 0, 1]
    assert metrics.settle(METRICS["accuracy"], [one, other, third]).values.tolist() == [0, 0, 1]


def test_what_an_attacker_prefers_and_how_examples_become_one_number():
    told = {name: (each.worst, each.clean, each.summary, each.unit) for name, each in METRICS.items()}
    assert told == {
        "accuracy": ("least", "unused", "share", "percent"),
        "robust": ("least", "needed", "share", "percent"),
        "success": ("greatest", "needed", "share", "percent"),
        "rejection": (None, "unused", "share", "percent"),
        "detection": (None, "unused", "share", "percent"),
        "selective": (None, "unused", "share", "percent"),
        "distance": ("least", "used", "median", "distance"),
        "class_accuracy": ("least", "unused", "share", "percent"),
        "top5": ("least", "unused", "share", "percent"),
        "logit": (None, "unused", "mean", "number"),
        "threshold": (None, "unused", "constant", "number"),
        "top": (None, "unused", "mean", "number"),
        "classwise": (None, "unused", "share", "percent"),
        "parameters": (None, "unused", "constant", "millions"),
        "coverage": (None, "unused", "share", "percent"),
        "accepted_right": ("least", "unused", "share", "percent"),
        "accepted_wrong": ("greatest", "unused", "share", "percent"),
        "robust_accepted": ("least", "needed", "share", "percent"),
        "aurc": ("greatest", "unused", "rank", "percent"),
        "excess_aurc": (None, "unused", "rank", "percent"),
        "auroc": (None, "unused", "rank", "percent"),
        "fpr95": (None, "unused", "rank", "percent"),
        "adversarial_auroc": (None, "needed", "rank", "percent"),
        "adversarial_fpr95": (None, "needed", "rank", "percent"),
    }


masks = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=5)
)


@quick
@given(masks)
def test_the_worst_is_at_most_every_attack_and_robust_at_most_clean(attacks):
    still = arrays(rows(attacks[0], moved=False))
    every = [arrays(rows(each)) for each in attacks[1:]]
    for name in ("accuracy", "robust"):
        parts = [metrics.score(METRICS[name], each, still) for each in every]
        worst = metrics.settle(METRICS[name], parts).values.mean()
        assert worst <= min(each.values.mean() for each in parts)
        if name == "robust":
            assert worst <= metrics.is_correct(still).mean()


# --- comparisons -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (0, 4), (1, 4), (5, 0), (3, 4), (60, 30), (700, 600), (30, 60)]
)
def test_beats_is_the_one_sided_exact_mcnemar_test(wins, losses):
    one = np.r_[np.ones(wins), np.zeros(losses), np.ones(9), np.zeros(9)]
    other = np.r_[np.zeros(wins), np.ones(losses), np.ones(9), np.zeros(9)]
    expected = stats.binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1
    assert metrics.mcnemar_p(one, other) == pytest.approx(expected, rel=1e-9)


def test_an_example_speaks_once_however_many_seeds_there_are():
    assert metrics.mcnemar_p(np.array([1 / 3, 1.0]), np.zeros(2)) == 0.25


# --- metrics by name, outcomes as stored -------------------------------------------------------------


def test_a_metric_is_added_by_name():
    @metrics.metric("sure", "examples scored above 0.9", worst="greatest", clean="used", reads=("logits",))
    def sure(rows, clean):
        return (rows["score"] > 0.9).astype(float)

    @metrics.metric("lead", "the lead of a class", worst=None, summary="mean", unit="distance")
    def lead(rows, clean, *, label):
        return rows["score"] - label

    try:
        found = metrics.score(metrics.named("sure"), arrays(rows([True] * 3)), None)
        assert found.values.tolist() == [1, 0, 0]
        assert metrics.named("sure") == Metric(
            "sure",
            "examples scored above 0.9",
            sure,
            "greatest",
            "used",
            "share",
            "percent",
            ("logits",),
            False,
        )
        assert metrics.named("lead") == Metric(
            "lead", "the lead of a class", lead, None, "unused", "mean", "distance", (), True
        )
    finally:
        del METRICS["sure"], METRICS["lead"]


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        metrics.named("accuracyy")


def test_rows_come_back_in_order_with_nan_for_null(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = rows([True, False, True], index=[5, 1, 3], differs=[None, True, False], flat=[False, True, False])
    for name in ("logits", "l0", "l2", "linf", "forwards", "backwards", "parameters"):
        frame[name] = [[0.5, 1.5], [1.5, 2.5], [3, 4]] if name == "logits" else [1, 2, 3]
    frame["thresholds"] = [None] * 3
    known = schema()
    fields = [known.field(name) if name in known.names else pa.field(name, pa.bool_()) for name in frame]
    pq.write_table(pa.Table.from_pandas(frame, schema=pa.schema(fields)), tmp_path / "outcomes.parquet")
    read = load(tmp_path / "outcomes.parquet")
    assert read["index"].tolist() == [1, 3, 5]
    assert metrics.is_correct(read).tolist() == [False, True, True]
    assert read["flat"].tolist() == [1, 0, 0]
    assert read["differs"][:2].tolist() == [1, 0]
    assert np.isnan(read["differs"][2])
    assert np.isnan(read["target"]).all()
    for name, values in arrays(frame).items():
        np.testing.assert_array_equal(values, read[name])
    assert set(known.names) == set(OUTCOME_COLUMNS)
    # Logits stay on the disk unless they are asked for; what is null, or not there, is left out.
    assert not {"logits", "parameters"} & set(read)
    more = load(tmp_path / "outcomes.parquet", ("logits", "thresholds", "parameters", "absent"))
    assert more["logits"].tolist() == [[1.5, 2.5], [3, 4], [0.5, 1.5]]
    assert more["parameters"].tolist() == [2, 3, 1]
    assert not {"thresholds", "absent"} & set(more)


def test_an_example_may_stand_once():
    with pytest.raises(ValueError, match="example 4 twice"):
        arrays(rows(first(3, 1), index=[4, 2, 4]))


def test_reading_tables_needs_neither_torch_nor_scipy():
    code = (
        "import sys, bench.report.tables, bench.report.render, bench.suite.layout; "
        "heavy = {'torch', 'scipy', 'pandas', 'matplotlib', 'jinja2', 'pyarrow', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_binomial_test_is_scipys():
    for n in (0, 1, 7, 100, 5000):
        for count in {0, 1, n // 100, n // 2, n} - set(range(n + 1, 9)):
            for share in (0.01, 0.2, 0.5, 0.9):
                expected = stats.binom.sf(count - 1, n, share)
                assert metrics.binomial_p(count, n, share) == pytest.approx(expected, rel=1e-9, abs=1e-300)

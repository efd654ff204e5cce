from statistics import stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import PAPER, clean, condition, first, manifest, paper, rows, skip
from pydantic import ValidationError

from bench.errors import InputError
from bench.quantities import DASH
from bench.report import published, render, tables
from bench.report.tables import unexamined
from bench.results import metrics
from bench.results.conditions import FACTS, conditions_of
from bench.suite import planner, resolve
from bench.suite.layout import arrange
from bench.suite.tables import Table
from suites import TASK
from suites import suite as written_suite

quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)

TWO = {
    "title": "Two columns",
    "rows": ["defense", "readout"],
    "columns": {"Clean": {"attack": "clean"}, "A": {"attack": "a"}, "B": {"attack": "b"}},
    "extra": ["Min", "Worst"],
}
"""A clean column, two attacks, and what follows from them."""


def suite(a, b, still=None, *, seeds=1, **changes):
    """Return a manifest and outcomes: `a` and `b` say for each seed which examples stood."""
    conditions, outcomes = [], {}
    for seed in range(seeds):
        for name, stood in (("a", a[seed]), ("b", b[seed])):
            conditions.append(condition(f"{name}{seed}", attack=name, seed=seed, n=len(stood)))
            outcomes[f"{name}{seed}"] = rows(stood)
        n = len(a[seed])
        conditions.append(clean(f"clean{seed}", seed=seed, n=n))
        outcomes[f"clean{seed}"] = rows(first(n, n) if still is None else still[seed], moved=False)
    return manifest(conditions, {**TWO, **changes}), outcomes


def cut(given, outcomes):
    return tables.cut(given, "T", outcomes.get, unexamined)


def values(rendered, row=0):
    return [each.estimate and each.estimate.value for each in rendered.rows[row].cells]


# --- what cells hold -------------------------------------------------------------------------------


def test_cells_of_one_seed():
    rendered = cut(*suite([first(10, 6)], [first(10, 8)], [first(10, 9)]))
    assert rendered.columns == ("Clean", "A", "B", "Min", "Worst")
    assert rendered.rows[0].label == ("cnn", "last")
    assert values(rendered) == [0.9, 0.6, 0.8, 0.6, 0.6]
    assert rendered.rows[0].cells[1].estimate.std is None
    assert [each.weakest for each in rendered.rows[0].cells] == [False, True, False, False, False]
    assert rendered.question == {"data": "digits", "norm": "linf", "radius": "0.1"}


def test_min_averages_first_and_worst_settles_examples_first():
    # Each attack breaks another half: the least average is a half, and nothing stands both.
    half = first(10, 5)
    rendered = cut(*suite([half, half], [~half, ~half], seeds=2))
    assert values(rendered) == [1, 0.5, 0.5, 0.5, 0]


def test_min_has_the_spread_of_its_column_and_worst_its_own():
    a = [first(10, 6), first(10, 2)]
    b = [first(10, 5), first(10, 5)]
    rendered = cut(*suite(a, b, seeds=2))
    lowest, worst = rendered.rows[0].cells[3:]
    assert lowest.estimate == rendered.rows[0].cells[1].estimate
    assert lowest.estimate.std == pytest.approx(stdev([0.6, 0.2]))
    assert worst.estimate.value == pytest.approx((0.5 + 0.2) / 2)
    assert worst.estimate.std == pytest.approx(stdev([0.5, 0.2]))
    assert rendered.seeds == 2


def test_worst_settles_each_example_by_the_attacks_that_saw_it():
    rendered = cut(*suite([first(20, 10)], [first(5, 4)]))
    cells = rendered.rows[0].cells
    # Of the ten that stood, one of the five that the second attack saw fell to it.
    assert values(rendered) == [1, 0.5, 0.8, 0.5, 0.45]
    assert [each.estimate.n for each in cells] == [20, 20, 5, 20, 20]
    # How many each column saw stands below it.
    assert cells[4].notes == ()
    assert [flag.code for flag in rendered.flags] == ["unequal-examples"]


def test_worst_may_stand_on_the_examples_that_all_saw():
    rendered = cut(*suite([first(20, 10)], [first(5, 4)], worst_on="common"))
    assert values(rendered) == [1, 0.5, 0.8, 0.5, 0.8]
    assert [each.estimate.n for each in rendered.rows[0].cells] == [20, 20, 5, 20, 5]


def test_accuracy_does_not_look_at_the_clean_answer_and_robust_does():
    a, b, still = [first(10, 10)], [first(10, 9)], [first(10, 7)]
    assert values(cut(*suite(a, b, still))) == [0.7, 1, 0.9, 0.9, 0.9]
    assert values(cut(*suite(a, b, still, metric="robust"))) == [0.7, 0.7, 0.7, 0.7, 0.7]


def test_success_has_a_max():
    given, outcomes = suite(
        [first(10, 6)], [first(10, 2)], [first(10, 8)], metric="success", extra=["Max", "Worst"]
    )
    rendered = cut(given, outcomes)
    # Of the eight that are right when clean, A breaks two and B six.
    assert values(rendered) == [0, 0.25, 0.75, 0.75, 0.75]
    assert rendered.rows[0].cells[2].weakest


def test_a_cell_without_a_pinned_attack_takes_the_worst_and_leaves_doing_nothing_out():
    given, outcomes = suite([first(10, 5)], [~first(10, 5)], [first(10, 0)])
    given["tables"]["T"] |= {"columns": {"All": {}}, "extra": []}
    assert values(cut(given, outcomes)) == [0]
    outcomes["b0"] = rows(first(10, 5))
    assert values(cut(given, outcomes)) == [0.5]


def test_targets_are_settled_by_the_worst_or_averaged():
    conditions = [condition(f"t{t}", target=t, attack="a") for t in (1, 2)] + [clean("c")]
    outcomes = {
        "t1": rows(first(10, 5), target=[5] * 10),
        "t2": rows(~first(10, 5), target=[5] * 10),
        "c": rows(first(10, 10), moved=False),
    }
    table = {"title": "x", "rows": ["defense"], "columns": {"A": {"attack": "a"}}, "metric": "success"}
    assert values(cut(manifest(conditions, table), outcomes)) == [1]
    rendered = cut(manifest(conditions, {**table, "mean_over": ["seed", "target"]}), outcomes)
    assert values(rendered) == [0.5]
    assert rendered.rows[0].cells[0].estimate.n == 10


def test_a_mean_over_some_of_the_targets_is_no_number():
    conditions = [condition(f"t{t}", target=t, attack="a") for t in (1, 2)]
    outcomes = {"t1": rows(first(10, 5))}
    table = {"title": "x", "rows": ["defense"], "columns": {"A": {"attack": "a"}}}
    cell = cut(manifest(conditions, table), outcomes).rows[0].cells[0]
    assert (cell.estimate.value, cell.bound) == (0.5, "≤")
    cell = cut(manifest(conditions, {**table, "mean_over": ["seed", "target"]}), outcomes).rows[0].cells[0]
    assert (cell.estimate, cell.hole) == (None, "not run")


def test_every_job_is_read_once():
    given, outcomes = paper()
    asked = []

    def read(job):
        asked.append(job)
        return outcomes.get(job)

    tables.cut(given, "T", read, unexamined)
    assert sorted(asked) == sorted(set(asked))
    assert set(asked) == tables.jobs(given, "T")


def test_jobs_hold_the_clean_ones_that_a_metric_needs():
    given, _ = suite([first(4, 1)], [first(4, 1)], columns={"A": {"attack": "a"}}, extra=[])
    assert tables.jobs(given, "T") == {"a0"}
    given["tables"]["T"]["metric"] = "robust"
    assert tables.jobs(given, "T") == {"a0", "clean0"}


def test_the_unmoved_images_are_those_of_the_task_that_asked_for_most():
    conditions = [condition("a", attack="a"), clean("few", n=4), clean("many", attack="still", n=10)]
    table = {"title": "x", "rows": ["defense"], "columns": {"A": {"attack": "a"}}, "metric": "robust"}
    given = manifest(conditions, table)
    outcomes = {
        "a": rows(first(10, 8)),
        "few": rows(first(4, 1), moved=False),
        "many": rows(first(10, 7), moved=False),
    }
    assert tables.jobs(given, "T") == {"a", "many"}
    estimate = cut(given, outcomes).rows[0].cells[0].estimate
    assert (estimate.value, estimate.n) == (0.7, 10)
    # Where they are not there, fewer are better than none.
    del outcomes["many"]
    estimate = cut(given, outcomes).rows[0].cells[0].estimate
    assert (estimate.value, estimate.n) == (0.25, 4)


masks = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=6, max_size=6)
)


@quick
@given(masks, st.sampled_from(["accuracy", "robust"]))
def test_worst_min_and_clean_are_in_order(drawn, metric):
    a, b, still = (np.array(drawn[at : at + 2]) for at in (0, 2, 4))
    cells = values(cut(*suite(a, b, still, seeds=2, metric=metric)))
    unmoved, one, other, lowest, worst = cells
    assert lowest == min(one, other)
    assert worst <= lowest
    expected = np.mean(
        [(x & y & (z | (metric == "accuracy"))).mean() for x, y, z in zip(a, b, still, strict=True)]
    )
    assert worst == pytest.approx(expected)
    if metric == "robust":
        assert max(one, other) <= unmoved


@quick
@given(st.sets(st.integers(0, 5)))
def test_a_hole_is_never_a_number(missing):
    given, outcomes = suite([first(10, 5)] * 2, [first(10, 4)] * 2, seeds=2)
    names = sorted(outcomes)
    for place in missing:
        del outcomes[names[place]]
    row = cut(given, outcomes).rows[0]
    for heading, cell in zip(("Clean", "A", "B"), row.cells, strict=False):
        seeds = [seed for seed in (0, 1) if f"{heading.lower()}{seed}" in outcomes]
        assert (cell.estimate is None) == (not seeds)
        assert (cell.hole == "not run") == (not seeds)
        assert ("1 of 2 seeds" in cell.notes) == (len(seeds) == 1)
        if seeds:
            assert cell.estimate.value == {"Clean": 1, "A": 0.5, "B": 0.4}[heading]
    lowest = row.cells[3]
    here = [cell for cell in row.cells[1:3] if cell.estimate]
    assert (lowest.bound == "≤") == (len(here) == 1)
    assert (lowest.hole == "not run") == (not here)
    # Means over different seeds have no least one.
    differ = len(here) == 2 and len({cell.lacking for cell in here}) == 2
    assert (lowest.hole == tables.DASH) == differ
    assert not differ or not any(cell.weakest for cell in row.cells)
    assert (lowest.estimate is None) == (differ or not here)


# --- holes -------------------------------------------------------------------------------------------


def test_a_missing_column_bounds_min_and_worst():
    given, outcomes = suite([first(10, 6)], [first(10, 2)])
    del outcomes["b0"]
    clean_, a, b, lowest, worst = cut(given, outcomes).rows[0].cells
    assert (b.estimate, b.hole, b.notes) == (None, "not run", ())
    for cell in (lowest, worst):
        assert (cell.estimate.value, cell.bound, cell.notes) == (0.6, "≤", ("without B (not run)",))
    # Which column is the weakest is not known.
    assert not any(each.weakest for each in (clean_, a, b))


def test_worst_takes_the_seeds_that_are_whole():
    given, outcomes = suite([first(10, 6), first(10, 8)], [first(10, 7), first(10, 5)], seeds=2)
    del outcomes["b0"]
    worst = cut(given, outcomes).rows[0].cells[4]
    assert (worst.estimate.value, worst.bound, worst.notes) == (0.5, "", ("1 of 2 seeds",))


def test_worst_without_a_whole_seed_takes_those_that_lack_least():
    a, b = [first(10, 6)] * 2, [first(10, 7)] * 2
    given, outcomes = suite(a, b, seeds=2)
    given["conditions"] += [condition(f"c{seed}", attack="c", seed=seed) for seed in (0, 1)]
    given["tables"]["T"]["columns"] = {**TWO["columns"], "C": {"attack": "c"}}
    del outcomes["b1"]
    worst = cut(given, outcomes).rows[0].cells[-1]
    assert (worst.estimate.value, worst.bound) == (0.6, "≤")
    assert worst.notes == ("1 of 2 seeds", "without C (not run)")


def test_a_combination_that_no_task_asks_for_is_a_dash():
    given, outcomes = suite([first(10, 6)], [first(10, 2)])
    given["conditions"].append(condition("other", attack="a", defense="cnnf"))
    outcomes["other"] = rows(first(10, 5))
    rendered = cut(given, outcomes)
    still, a, b, lowest, worst = rendered.rows[1].cells
    assert [each.hole for each in (still, a, b)] == [DASH, "", DASH]
    # What nobody asked for is not missing.
    assert (lowest.bound, worst.bound, worst.estimate.value) == ("", "", 0.5)


def test_a_skip_is_a_dash_with_its_reason():
    given, outcomes = suite([first(10, 6)], [first(10, 2)])
    skipped = skip("the source is its own victim", attack="b", defense="cnnf")
    given["conditions"].append(condition("other", attack="a", defense="cnnf"))
    given["skips"].append(skipped)
    outcomes["other"] = rows(first(10, 5))
    cell = cut(given, outcomes).rows[1].cells[2]
    assert (cell.hole, cell.notes) == (DASH, ("the source is its own victim",))


def test_robust_without_the_clean_run_is_a_hole():
    given, outcomes = suite([first(10, 6)], [first(10, 2)], metric="robust")
    del outcomes["clean0"]
    cell = cut(given, outcomes).rows[0].cells[1]
    assert (cell.hole, cell.notes) == ("not run", ("not run: the clean images",))
    given["conditions"] = [each for each in given["conditions"] if not each["facts"]["idle"]]
    given["tables"]["T"]["columns"] = {"A": {"attack": "a"}}
    given["tables"]["T"]["extra"] = []
    cell = cut(given, outcomes).rows[0].cells[0]
    assert (cell.hole, cell.notes) == (DASH, ("no task asks about the unmoved images here (use: none)",))


def test_a_rate_of_nothing_is_a_hole():
    given, outcomes = suite([first(10, 10)], [first(10, 10)], metric="detection", extra=[])
    cell = cut(given, outcomes).rows[0].cells[1]
    assert (cell.estimate, cell.hole, cell.notes) == (None, DASH, ("no example counts",))


# --- facts -------------------------------------------------------------------------------------------


def test_a_fact_that_is_not_known_here_changes_no_table():
    """Facts are no coordinates: a new one has neither to be shown nor to be pinned."""
    given, outcomes = paper(n=60)
    before = render.joined([cut(given, outcomes)], "json")
    needed = tables.jobs(given, "T")
    for place, each in enumerate(given["conditions"]):
        each["facts"]["passes"] = place
        each["facts"]["origin"] = {"seed": place}
    tables.check(given, "T")
    assert tables.jobs(given, "T") == needed
    assert render.joined([cut(given, outcomes)], "json") == before


def test_a_coordinate_that_is_not_known_here_must_be_shown_or_pinned():
    given, _ = paper()
    for place, each in enumerate(given["conditions"]):
        each["coordinates"]["inference.cycles"] = place % 2
    assert "hides inference.cycles: [0, 1]" in refusal(given)


def test_what_does_nothing_is_known_by_the_fact_and_by_no_name():
    """An attack that declares to do nothing gives the clean answers, whatever it is called; no other does."""
    given, outcomes = suite([first(10, 6)], [first(10, 9)], [first(10, 8)], metric="robust")
    expected = values(cut(given, outcomes))
    for each in given["conditions"]:
        idle = each["facts"]["idle"]
        each["facts"]["use"] = "mylab/unmoved" if idle else "none"
        each["facts"]["access"] = "gradient"
    assert values(cut(given, outcomes)) == expected == [0.8, 0.6, 0.8, 0.6, 0.6]


def test_every_plan_tells_the_facts_that_tables_need(tmp_path):
    path = written_suite(
        tmp_path, {"net": {"use": "toy/linear"}}, {"clean": {"use": "none"}, "fgsm": {"use": "fgsm"}}, [TASK]
    )
    given = planner.make(resolve.load(path)).manifest()
    assert {tuple(sorted(each["facts"])) for each in given["conditions"]} == {
        tuple(sorted((*FACTS, "examinations")))
    }
    assert {each.coordinates["attack"] for each in conditions_of(given) if each.facts.idle} == {"clean"}


# --- radii -------------------------------------------------------------------------------------------


def minimal(distance, stood=None):
    distance = np.asarray(distance, float)
    return rows(np.zeros(len(distance), bool) if stood is None else stood, distance=distance)


def test_an_attack_without_a_radius_is_read_at_any():
    conditions = [
        condition("free", attack="cw", radius=None, kind="minimum-norm", n=4),
        clean("still", radius=None, n=4),
    ]
    outcomes = {"free": minimal([0.05, 0.1, 0.2, 0.3]), "still": rows([True, True, True, False], moved=False)}
    table = {
        "title": "x",
        "rows": ["defense"],
        "where": {"attack": "cw"},
        "columns": ["radius"],
        "radii": ["0.01", 0.1, "1/2"],
    }
    rendered = cut(manifest(conditions, table), outcomes)
    assert rendered.columns == ("0.01", "0.1", "0.5")
    # The last example is wrong when clean, and is broken at every radius.
    assert values(rendered) == [0.75, 0.25, 0]
    assert [each.flags for each in rendered.rows[0].cells] == [(), (), ()]


def test_an_attack_without_a_radius_in_a_cell_with_one_needs_the_clean_answers():
    conditions = [condition("free", attack="cw", kind="minimum-norm", radius=0.1)]
    table = {"title": "x", "rows": ["defense"], "columns": {"CW": {"attack": "cw"}}}
    cell = cut(manifest(conditions, table), {"free": minimal([0.05, 0.2])}).rows[0].cells[0]
    assert (cell.estimate, cell.hole) == (None, DASH)
    assert tables.jobs(manifest([*conditions, clean("still")], table), "T") == {"free", "still"}


def test_the_worst_of_attacks_without_a_radius_is_the_least_distance():
    conditions = [
        condition(name, attack=name, norm="l2", radius=None, kind="minimum-norm", n=3)
        for name in ("cw", "deepfool")
    ]
    outcomes = {
        "cw": minimal([0.1, 0.4, 0.3], [False, False, True]),
        "deepfool": minimal([0.2, 0.2, 0.9]),
    }
    table = {
        "title": "x",
        "rows": ["defense"],
        "columns": {"CW": {"attack": "cw"}, "DeepFool": {"attack": "deepfool"}},
        "metric": "distance",
        "extra": ["Min", "Worst"],
    }
    rendered = cut(manifest(conditions, table), outcomes)
    assert values(rendered) == [0.4, 0.2, 0.2, 0.2]
    assert rendered.units == ("distance",) * 4
    outcomes["cw"] = minimal([0.1, 0.4, 0.3], [False, True, True])
    cell = cut(manifest(conditions, table), outcomes).rows[0].cells[0]
    assert cell.estimate.value == np.inf
    assert cell.notes == ("33.3 % of the examples were broken",)


# --- selections --------------------------------------------------------------------------------------


def test_rows_and_columns_by_name_and_by_coordinate():
    conditions = [
        condition(f"{defense}{radius}", defense=defense, radius=radius)
        for defense in ("cnn", "cnnf")
        for radius in (0.1, 8 / 255)
    ]
    outcomes = {each["job"]: rows(first(10, 5)) for each in conditions}
    table = {
        "title": "x",
        "rows": {"Ours": {"defense": "cnnf"}, "Plain": {"defense": "cnn"}},
        "columns": ["radius"],
    }
    rendered = cut(manifest(conditions, table), outcomes)
    assert [row.label for row in rendered.rows] == [("Ours",), ("Plain",)]
    assert rendered.columns == ("0.1", "8/255")
    table = {
        "title": "x",
        "rows": ["radius"],
        "columns": {"Ours": {"defense": "cnnf"}, "Plain": {"defense": "cnn"}},
    }
    rendered = cut(manifest(conditions, table), outcomes)
    assert [row.label for row in rendered.rows] == [("0.1",), ("8/255",)]
    assert rendered.heads == ("radius",)


@pytest.mark.parametrize("written", ["8/255", 8 / 255, "16/510"])
def test_a_radius_is_a_number_or_a_fraction(written):
    conditions = [condition("a", radius=8 / 255), condition("b", radius=0.1)]
    table = {
        "title": "x",
        "where": {"radius": written},
        "rows": ["defense"],
        "columns": {"A": {"attack": "pgd"}},
    }
    assert arrange(manifest(conditions, table), "T").jobs() == {"a"}


@pytest.mark.parametrize("written", [None, "inf", float("inf")])
def test_no_radius_is_null_or_infinite(written):
    conditions = [condition("a", radius=None, kind="minimum-norm"), condition("b", radius=0.1)]
    table = {
        "title": "x",
        "where": {"radius": written},
        "rows": ["defense"],
        "columns": {"A": {"attack": "pgd"}},
    }
    assert arrange(manifest(conditions, table), "T").jobs() == {"a"}


def test_a_list_is_any_of_its_values_and_a_placeholder_is_the_rows():
    given, _ = paper()
    given["tables"]["T"]["columns"] = {"PGD": {"attack": ["pgd"], "view": ["first", "e2e_{readout}"]}}
    layout = arrange(given, "T")
    places = {row.label: {each.view for each in row.slots[0].conditions} for row in layout.rows}
    assert places[("cnnf", "avg")] == {"first", "e2e_avg"}
    assert places[("cnnf", "last")] == {"first", "e2e_last"}


def test_served_parameters_are_coordinates():
    conditions = [
        condition(f"c{cycles}", defense="cnnf", **{"inference.cycles": cycles}) for cycles in (0, 2)
    ]
    table = {"title": "x", "rows": ["defense", "inference.cycles"], "columns": {"PGD": {"attack": "pgd"}}}
    rendered = cut(manifest([*conditions, condition("plain")], table), {})
    assert [row.label for row in rendered.rows] == [("cnnf", "0"), ("cnnf", "2"), ("cnn", DASH)]


def test_columns_may_have_metrics_of_their_own():
    conditions = [clean("c")]
    outcomes = {"c": rows(first(10, 9), rejected=~first(10, 8), moved=False)}
    columns = {
        "Accuracy": {"attack": "clean"},
        "Rejected": {"attack": "clean", "metric": "rejection"},
        "Accuracy of the rest": {"attack": "clean", "metric": "selective"},
    }
    rendered = cut(manifest(conditions, {"title": "x", "rows": ["defense"], "columns": columns}), outcomes)
    assert values(rendered) == [0.8, 0.2, 1]
    assert [each.estimate.n for each in rendered.rows[0].cells] == [10, 10, 8]


# --- refusals ----------------------------------------------------------------------------------------


def refusal(given):
    with pytest.raises(InputError) as caught:
        tables.check(given, "T")
    return str(caught.value)


def test_a_table_that_hides_a_readout_is_refused():
    given, _ = paper()
    given["tables"]["T"]["rows"] = ["defense"]
    given["tables"]["T"]["columns"] = {"PGD": {"attack": "pgd", "view": "first"}}
    assert refusal(given).startswith("table 'T' hides readout: ['avg', 'last']")


def test_a_readout_hides_between_columns_too():
    conditions = [condition("a", attack="a", readout="last"), condition("b", attack="b", readout="avg")]
    table = {**TWO, "rows": ["defense"], "columns": {"A": {"attack": "a"}, "B": {"attack": "b"}}, "extra": []}
    assert refusal(manifest(conditions, table)).startswith("table 'T' hides readout: ['avg', 'last']")


@pytest.mark.parametrize(
    ("name", "one", "other", "shown"),
    [
        ("data", "digits", "mnist", "['digits', 'mnist']"),
        ("norm", "linf", "l2", "['l2', 'linf']"),
        ("radius", 0.1, 0.2, "[0.1, 0.2]"),
        ("radius", 0.1, None, "[0.1, None]"),
        ("inference.cycles", 2, 1, "[1, 2]"),
        ("defense", "cnn", "cnnf", "['cnn', 'cnnf']"),
    ],
)
def test_a_question_or_a_choice_of_the_defender_is_never_merged(name, one, other, shown):
    conditions = [condition("a", **{name: one}), condition("b", **{name: other})]
    table = {"title": "x", "rows": ["readout"], "columns": {"PGD": {"attack": "pgd"}}}
    assert refusal(manifest(conditions, table)).startswith(f"table 'T' hides {name}: {shown}")
    # In sight, or pinned, it is neither.
    tables.check(manifest(conditions, {**table, "rows": [name]}), "T")
    tables.check(manifest(conditions, {**table, "where": {name: one}}), "T")


def test_questions_of_different_rows_must_be_in_sight():
    conditions = [condition("a", defense="cnn", radius=0.1), condition("b", defense="cnnf", radius=0.2)]
    table = {"title": "x", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}}
    assert refusal(manifest(conditions, table)).startswith("table 'T' hides radius: [0.1, 0.2]")


def test_read_outs_of_different_defenses_may_have_different_names():
    conditions = [
        condition("a", defense="cnn", readout="last"),
        condition("b", defense="sdim", readout="logits"),
    ]
    table = {"title": "x", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}}
    tables.check(manifest(conditions, table), "T")


def test_unmoved_images_have_no_radius():
    conditions = [condition("a"), clean("c1", radius=0.2), clean("c2", radius=None, norm="l2")]
    table = {
        "title": "x",
        "rows": ["defense"],
        "columns": {"PGD": {"attack": "pgd"}, "Clean": {"attack": "clean"}},
    }
    tables.check(manifest(conditions, table), "T")


def test_seeds_that_are_not_averaged_must_be_in_sight():
    conditions = [condition("a", seed=0), condition("b", seed=1)]
    table = {"title": "x", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}, "mean_over": []}
    assert refusal(manifest(conditions, table)).startswith("table 'T' hides seed: [0, 1]")
    tables.check(manifest(conditions, {**table, "rows": ["seed"]}), "T")


def test_min_and_worst_are_of_one_question():
    conditions = [condition("a", radius=0.1), condition("b", radius=0.2)]
    table = {"title": "x", "rows": ["defense"], "columns": ["radius"], "extra": ["Min", "Worst"]}
    assert refusal(manifest(conditions, table)).startswith(
        "table 'T': Min and Worst would merge radius: [0.1, 0.2]"
    )


def test_a_metric_without_a_worst_needs_one_attack():
    conditions = [condition("a", attack="a"), condition("b", attack="b")]
    table = {"title": "x", "rows": ["defense"], "columns": {"All": {}}, "metric": "rejection"}
    assert "column 'All': rejection has no worst over attack: ['a', 'b']" in refusal(
        manifest(conditions, table)
    )


def test_unknown_values_and_coordinates_name_the_nearest():
    given, _ = paper()
    given["tables"]["T"]["columns"] = {"PGD": {"attack": "pdg"}}
    assert refusal(given) == "table 'T': column 'PGD': attack: no condition has 'pdg'; did you mean 'pgd'?"
    given["tables"]["T"] = {**PAPER, "where": {"inference.cyclez": 1}}
    assert refusal(given).startswith("table 'T': where: unknown coordinate 'inference.cyclez'")
    given["tables"]["T"] = {**PAPER, "rows": ["defense", "readout", "inference.cycles"]}
    assert refusal(given).startswith("table 'T': rows: unknown coordinate 'inference.cycles'")
    given["tables"]["T"] = {**PAPER, "rows": {"CNN-F": {"defense": "cnff"}}, "columns": ["attack", "view"]}
    assert refusal(given) == "table 'T': row 'CNN-F': defense: no condition has 'cnff'; did you mean 'cnnf'?"
    given["tables"]["T"] = {**PAPER, "columns": {"PGD": {"view": "e3e_{readout}"}}}
    assert "column 'PGD': view: no condition has 'e3e_last'; did you mean 'e2e_last'?" in refusal(given)
    with pytest.raises(InputError, match="no table 'U'"):
        arrange(given, "U")


def test_a_place_that_selects_nothing_is_refused():
    conditions = [condition("a", data="digits"), condition("b", data="mnist", norm="l2")]
    table = {
        "title": "x",
        "where": {"data": "digits", "norm": "l2"},
        "rows": ["defense"],
        "columns": ["attack"],
    }
    assert "where: no condition has all of" in refusal(manifest(conditions, table))
    columns = {"A": {"norm": "l2"}}
    table = {"title": "x", "where": {"data": "digits"}, "rows": ["defense"], "columns": columns}
    assert refusal(manifest(conditions, table)) == "table 'T': no condition is in a row and in a column"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accuracyy"}, "unknown metric 'accuracyy'; did you mean 'accuracy'?"),
        ({"columns": {"A": {"attack": "a", "metric": "robustness"}}}, "unknown metric 'robustness'"),
        ({"rows": ["defence"]}, "rows: unknown coordinate 'defence'; did you mean 'defense'?"),
        (
            {"columns": {"A": {"attackk": "a"}}},
            "columns: unknown coordinate 'attackk'; did you mean 'attack'?",
        ),
        ({"where": {"metric": "robust"}}, "where: unknown coordinate 'metric'"),
        ({"columns": {"A": {"view": "e2e_{inference.x}"}}}, "{inference.x} is no coordinate of every row"),
        ({"columns": {"A": "pgd"}}, "expected a selection such as {attack: pgd}, found 'pgd'"),
        ({"metric": "success", "extra": ["Min"]}, "an attacker wants the Max of success, not the Min"),
        ({"metric": "rejection", "extra": ["Worst"]}, "rejection has no Worst over attacks"),
        ({"columns": {"Min": {"attack": "a"}}, "extra": ["Min"]}, "a column is called 'Min'"),
        (
            {"mean_over": ["target"], "worst_over": ["target"]},
            "target is both in mean_over and in worst_over",
        ),
        ({"mean_over": ["readout"]}, "seed"),
        ({"figure": {"x": "radius"}}, "'radius' is a coordinate of neither rows nor columns"),
        ({"columns": {}}, "rows and columns need an entry each"),
        ({"radii": ["8/0"]}, "expected a number or a fraction like 8/255, found '8/0'"),
        ({"columnz": {}}, "Extra inputs are not permitted"),
    ],
)
def test_a_table_is_checked_before_there_are_cells(change, message):
    with pytest.raises(ValidationError) as caught:
        Table.model_validate({**TWO, "extra": [], **change})
    assert message in str(caught.value)


def test_a_table_survives_its_manifest():
    for written in (
        PAPER,
        {**TWO, "mean_over": ["seed", "target"], "radii": ["8/255"], "columns": {0.1: {}}},
    ):
        table = Table.model_validate(written)
        assert Table.model_validate(table.model_dump(mode="json")) == table
    assert Table.model_validate({**TWO, "mean_over": ["seed", "target"]}).worst_over == ["attack", "view"]


# --- published numbers -------------------------------------------------------------------------------


def compared(**changes):
    given, outcomes = paper(n=30, seeds=[0])
    given["tables"]["T"]["published"] = {
        "table": "cnnf/3",
        "columns": {"Clean": "clean", "PGD (first)": "pgd_first", "Min": "min"},
        "rows": {"cnn, last": "CNN", "cnnf, avg": "CNN-F (avg)"},
        "differences": ["Twelve times narrower"],
        **changes,
    }
    given["data"]["digits"]["name"] = "cifar10"
    for each in (*given["conditions"], *given["skips"]):
        each["coordinates"]["radius"] = 0.0315
    return given, outcomes


def test_published_numbers_stand_beside_ours():
    rendered = cut(*compared())
    rows_ = {row.label: row.published for row in rendered.rows}
    assert rows_[("cnnf", "last")] == ()
    quotes = dict(zip(rendered.columns, rows_[("cnnf", "avg")], strict=True))
    assert (quotes["PGD (first)"].value, quotes["PGD (first)"].std) == (48.72, 0.64)
    assert quotes["Min"].value == 48.72
    assert quotes["Transfer"] is None
    assert rendered.source == "Adversarial accuracy on CIFAR-10 (cnnf/3)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "cnnf/33"}, "no table 'cnnf/33'; did you mean 'cnnf/3'?"),
        ({"columns": {"PGD": "pgd_first"}}, "published: columns: no 'PGD' here"),
        ({"columns": {"Clean": "cleanx"}}, "cnnf/3 has no 'cleanx'; did you mean 'clean'?"),
        ({"rows": {"cnn, last": "CNM"}}, "cnnf/3 has no 'CNM'; did you mean 'CNN'?"),
        ({"rows": {"cnn, lost": "CNN"}}, "published: rows: no 'cnn, lost' here; did you mean 'cnn, last'?"),
    ],
)
def test_what_is_not_published_cannot_be_named(change, message):
    given, _ = compared(**change)
    assert message in refusal(given)


@pytest.mark.parametrize(("name", "value"), [("radius", 0.1), ("norm", "l2")])
def test_other_questions_are_not_compared(name, value):
    given, _ = compared()
    for each in (*given["conditions"], *given["skips"]):
        each["coordinates"][name] = value
    assert "published: cnnf/3 is about cifar-10, linf, 8/255, and row 'cnn, last' about" in refusal(given)
    given, _ = compared()
    given["data"]["digits"]["name"] = "cifar10-jpeg"
    assert "about cifar10-jpeg, linf" in refusal(given)


PAPERS = published.papers()


@pytest.mark.parametrize("key", ["cnnf/2", "cnnf/3", "cnnf/4", "cnnf/5"])
def test_the_published_min_is_that_of_the_attack_columns(key):
    for row in PAPERS[key]["rows"].values():
        attacks = [row[name] for name in row if name not in ("clean", "min") and row[name] is not None]
        assert row["min"] in attacks
        assert row["min"]["mean"] == min(each["mean"] for each in attacks)


@pytest.mark.parametrize("key", PAPERS)
def test_published_tables_are_whole(key):
    paper_ = PAPERS[key]
    percent = paper_.get("unit") == "percent"
    for name, row in paper_["rows"].items():
        assert set(row) <= set(paper_.get("columns", row)), name
        for column, number in row.items():
            if number is not None and percent:
                assert 0 <= number["mean"] <= 100, (name, column)
                assert number["std"] is None or number["std"] >= 0


# --- figures -----------------------------------------------------------------------------------------


def test_a_figures_axis_has_numbers():
    conditions = [condition("a", radius=0.1), condition("b", radius=None, kind="minimum-norm")]
    table = {"title": "x", "rows": ["defense"], "columns": ["radius"], "figure": {"x": "radius"}}
    assert (
        refusal(manifest(conditions, table))
        == f"table 'T': figure: {DASH!r} has no number for radius, but None"
    )
    tables.check(manifest(conditions[:1], table), "T")


def test_wilson_is_of_one_seed_however_many_there_are():
    one = cut(*suite([first(50, 20)], [first(50, 25)])).rows[0].cells[1].estimate
    many = cut(*suite([first(50, 20)] * 5, [first(50, 25)] * 5, seeds=5)).rows[0].cells[1].estimate
    assert (one.low, one.high) == (many.low, many.high) == metrics.wilson(0.4, 50)
    assert many.std == 0


# --- rows and columns that count something of their own ----------------------------------------------


def validated(logits, **changes):
    frame = rows([True] * len(logits), moved=False, truth=[0] * len(logits), **changes)
    frame["label"] = [int(np.argmax(each)) for each in logits]
    frame["logits"] = logits
    frame["thresholds"] = [[2.0, 1.5, 1.0]] * len(logits)
    frame["parameters"] = [1_250_794] * len(logits)
    return frame


LOGITS = {
    "title": "Logits of one image",
    "rows": {
        "1st percentile": {"attack": "clean", "metric": "threshold"},
        "Original": {"attack": "clean"},
        "DeepFool": {"attack": "deepfool"},
    },
    "columns": {"class 0": {"class": 0}, "class 2": {"class": 2}},
    "metric": "logit",
}


def test_a_row_may_count_something_else_and_a_column_name_a_class():
    skipped = skip("deepfool is planned: later", attack="deepfool")
    given = manifest([clean("c", n=1)], LOGITS, [skipped])
    rendered = cut(given, {"c": validated([[482.5, -644.5, -440.75]])})
    assert values(rendered) == [2, 1]
    assert values(rendered, 1) == [482.5, -440.75]
    assert [each.hole for each in rendered.rows[2].cells] == [DASH, DASH]
    assert rendered.rows[2].cells[0].notes == ("deepfool is planned: later",)
    assert rendered.units == ("number", "number")
    assert rendered.rows[1].cells[0].estimate.low is None


def test_a_class_is_for_the_metrics_of_a_class():
    # As in a table of targets: the threshold of a class stands above the largest logit of what aims at it.
    table = {
        "title": "x",
        "rows": {"Threshold": {"attack": "clean", "metric": "threshold"}, "CW": {"attack": "cw"}},
        "columns": {f"class {label}": {"class": label, "target": [label, None]} for label in (1, 2)},
        "metric": "top",
    }
    conditions = [condition(f"t{target}", attack="cw", target=target, n=1) for target in (1, 2)]
    outcomes = {
        "c": validated([[9.0, 1.0, 0.0]]),
        "t1": validated([[1.0, 7.0, 0.0]], target=[1]),
        "t2": validated([[5.0, 1.0, 0.0]], target=[2]),
    }
    rendered = cut(manifest([*conditions, clean("c", n=1)], table), outcomes)
    assert values(rendered) == [1.5, 1]
    assert values(rendered, 1) == [7, None]
    assert rendered.rows[1].cells[1].notes == ("no example counts",)


def test_what_the_outcomes_do_not_have_is_a_hole_with_its_reason():
    given = manifest([clean("c", n=1)], {**LOGITS, "rows": {"Original": {"attack": "clean"}}})
    cell = cut(given, {"c": rows([True], moved=False)}).rows[0].cells[0]
    assert (cell.estimate, cell.hole) == (None, DASH)
    assert cell.notes == ("no logits: the read-out gives none, or the outcomes are older than the column",)
    cell = cut(given, {"c": validated([[1.0, 2.0]])}).rows[0].cells[1]
    assert cell.notes == ("no class 2: there are 2",)


def test_only_the_columns_that_a_metric_looks_at_are_read():
    asked = []

    class Instrumented(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    frame = Instrumented(validated([[1.0, 2.0, 3.0]]).items())
    for metric, names in (("accuracy", set()), ("classwise", {"logits", "thresholds"})):
        asked.clear()
        table = {"title": "x", "rows": ["defense"], "columns": {"All": {"attack": "clean"}}, "metric": metric}
        cut(manifest([clean("c")], table), {"c": frame})
        assert set(asked) & {"logits", "thresholds", "parameters"} == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"All": {}}}, "threshold is of a class: say which, such as class: 3"),
        (
            {"columns": {"All": {"class": 1, "metric": "accuracy"}}},
            "row '1st percentile', column 'All': both say a metric",
        ),
        (
            {"rows": {"All": {}}, "metric": "accuracy"},
            "column 'class 0': accuracy is of no class, and class: was given",
        ),
        (
            {"columns": {"A": {}, "B": {"metric": "top"}}, "rows": {"a": {"class": 1}}, "metric": "accuracy"},
            "row 'a': accuracy, top is of no class, and class: was given",
        ),
        (
            {"columns": {"0": {}}, "rows": {"a": {"class": 0}, "b": {"metric": "rejection"}}},
            "column '0' would hold numbers of several units: number, percent",
        ),
        ({"columns": {"x": {"class": "three"}}}, "class: expected a whole number from 0, found 'three'"),
        ({"columns": {"x": {"class": -1}}}, "class: expected a whole number from 0, found -1"),
        ({"columns": ["metric"]}, "columns: unknown coordinate 'metric'"),
        ({"rows": {"a": {"metric": "logits"}}}, "unknown metric 'logits'; did you mean 'logit'?"),
    ],
)
def test_a_measure_that_cannot_be_is_refused(changes, message):
    skipped = skip("later", attack="deepfool")
    assert message in refusal(manifest([clean("c")], {**LOGITS, **changes}, [skipped]))


def test_a_cell_may_be_the_least_of_averages_as_papers_print():
    # Each view breaks another half: the least average is a half, and nothing stands both.
    half = first(10, 5)
    conditions = [condition("base", view="base"), condition("bpda", view="bpda"), clean("c")]
    outcomes = {"base": rows(half), "bpda": rows(~half), "c": rows(first(10, 10), moved=False)}
    table = {"title": "x", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}, "extra": ["Worst"]}
    assert values(cut(manifest(conditions, table), outcomes)) == [0, 0]
    given = manifest(conditions, {**table, "min_over": ["view"]})
    assert values(cut(given, outcomes)) == [0.5, 0]
    del outcomes["bpda"]
    cell = cut(given, outcomes).rows[0].cells[0]
    assert (cell.estimate.value, cell.bound) == (0.5, "≤")
    assert cell.notes == ("without pgd (bpda) (not run)",)
    twice = {**table, "min_over": ["view"], "worst_over": ["view"]}
    assert "view is both in min_over and in worst_over" in refusal(manifest(conditions, twice))


def test_a_table_of_nothing_but_planned_attacks_is_dashes():
    skips = [
        skip("lbt is planned: later", attack="lbt", radius=None, norm="l2", defense=name)
        for name in ("abs", "defensegan")
    ]
    table = {
        "title": "x",
        "where": {"attack": "lbt"},
        "rows": ["defense"],
        "columns": ["radius"],
        "radii": [0.5, 1.5],
        "figure": {"x": "radius"},
    }
    given = manifest([clean("c")], table, skips)
    tables.check(given, "T")
    rendered = cut(given, {})
    assert rendered.columns == ("0.5", "1.5")
    assert {each.hole for row in rendered.rows for each in row.cells} == {DASH}
    assert tables.jobs(given, "T") == set()
    assert rendered.question == {"data": "digits", "norm": "l2"}

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import but, clean, condition, first, manifest, rows
from scipy import stats

from bench.report import checks, tables
from bench.report.tables import unexamined
from bench.results.conditions import conditions_of
from bench.results.outcomes import arrays

DOCS = Path(__file__).parents[2] / "docs"
N = 200


def flagged(conditions, outcomes, columns=("attack", "view"), **table):
    """Return the flags of each column of a table with one row, those of the row first, and the table."""
    given = {"title": "x", "rows": ["readout"], "columns": list(columns), **table}
    rendered = tables.cut(manifest(conditions, given), "T", outcomes.get, unexamined)
    assert len(rendered.rows) == 1
    named = {
        heading: (*rendered.rows[0].flags, *cell.flags)
        for heading, cell in zip(rendered.columns, rendered.rows[0].cells, strict=True)
    }
    return named, rendered


def codes(flags):
    return {heading: [flag.code for flag in found] for heading, found in flags.items()}


# --- one cell --------------------------------------------------------------------------------------


def test_a_quiet_cell_raises_no_doubt():
    flags, rendered = flagged(
        [condition("a"), clean("c")], {"a": rows(first(N, 90)), "c": rows(first(N, 190), moved=False)}
    )
    assert codes(flags) == {"pgd, first": [], "clean": []}
    assert rendered.flags == ()


def test_void_moves_are_counted_over_seeds_and_once_for_the_table():
    conditions = [condition(f"a{seed}", seed=seed) for seed in (0, 1)]
    # A second view that is the same job: its moves are the same moves.
    conditions += [but(each, view="e2e") for each in conditions]
    invalid = first(N, 3)
    outcomes = {"a0": rows(first(N, 90), invalid=invalid), "a1": rows(first(N, 90), invalid=first(N, 2))}
    flags, rendered = flagged(conditions, outcomes)
    assert codes(flags) == {"pgd, first": ["invalid-moves"], "pgd, e2e": ["invalid-moves"]}
    assert flags["pgd, first"][0].message.startswith("5 of 400 moves were invalid")
    assert [cell.invalid for cell in rendered.rows[0].cells] == [5, 5]
    assert rendered.invalid == 5


def test_void_moves_say_why_by_attack_over_seeds_and_by_how_much_at_most():
    conditions = [condition(f"a{seed}", seed=seed) for seed in (0, 1)]
    conditions.append(condition("s", attack="spsa"))
    void = {job: rows(first(N, 90), invalid=first(N, 3)) for job in ("a0", "a1", "s")}
    why = {
        "a0": {"out of the budget": [2, 0.02], "not finite": [1, None]},
        "a1": {"out of the budget": [1, 0.031], "out of the box": [2, 0.25]},
        "s": {"shape (1, 7, 8), not (1, 8, 8)": [3, None]},
    }

    def found(kind, key):
        return {"invalid": why[key]} if kind == "evaluate" else None

    given = {"title": "x", "rows": ["readout"], "columns": {"Both": {"attack": ["pgd", "spsa"]}}}
    rendered = tables.cut(manifest(conditions, given), "T", void.get, found)
    (flag,) = [each for each in rendered.rows[0].cells[0].flags if each.code == "invalid-moves"]
    assert flag.message == (
        "9 of 600 moves were invalid: the clean image was shown; pgd (first): 3 outside the ball (by up to "
        "0.031 in linf), 1 not finite, 2 outside the box [0, 1] (by up to 0.25); spsa (first): 3 of shape "
        "(1, 7, 8), not (1, 8, 8)"
    )


def test_answers_that_are_not_finite_count_as_broken_and_say_so():
    label = np.where(first(N, 4), -1, 3)
    flags, rendered = flagged([condition("a")], {"a": rows(first(N, N), label=label)})
    assert rendered.rows[0].cells[0].estimate.value == (N - 4) / N
    assert flags["pgd, first"][0] == checks.Flag(
        "not-finite", "4 of 200 answers were not finite, and count as broken"
    )


def test_answers_that_differ_are_counted_among_those_asked_twice():
    differs = [True, False, True, *[None] * (N - 3)]
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), differs=differs)})
    assert flags["pgd, first"][0].message == "2 of 3 answers differed when asked again"
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), differs=[False] * N)})
    assert flags["pgd, first"] == ()


@pytest.mark.parametrize("note", ["flat", "nonfinite"])
@pytest.mark.parametrize(("count", "found"), [(2, []), (3, ["flat-gradient"])])
def test_more_than_one_in_a_hundred_without_a_gradient(note, count, found):
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), **{note: first(N, count)})})
    assert codes(flags)["pgd, first"] == found


@pytest.mark.parametrize(("count", "found"), [(2, []), (3, ["saturated-loss"])])
def test_more_than_one_in_a_hundred_held_where_a_softmax_was_saturated(count, found):
    # The first held, of which some were saturated; of the others, that were broken, it does not matter.
    saturated = np.concatenate([first(N, count)[:90], np.ones(N - 90, bool)])
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), saturated=saturated)})
    assert codes(flags)["pgd, first"] == found
    if found:
        assert "on 3 of 200 examples that held" in flags["pgd, first"][0].message


def test_examples_on_which_a_library_broke_down_are_said_whatever_their_number():
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), raised=first(N, 1))})
    assert flags["pgd, first"][0].code == "attack-raised"
    assert flags["pgd, first"][0].message == f"the attack broke down on 1 of {N} examples"
    flags, _ = flagged([condition("a")], {"a": rows(first(N, 90), raised=first(N, 0))})
    assert flags["pgd, first"] == ()


def test_an_attack_that_cannot_reach_its_radius():
    flag = "7 steps of 0.01 cannot cross a radius of 0.1"
    conditions = [condition(f"a{seed}", seed=seed, flags=[flag]) for seed in (0, 1)]
    flags, _ = flagged(conditions, {"a0": rows(first(N, 90)), "a1": rows(first(N, 90))})
    assert flags["pgd, first"] == (checks.Flag("out-of-reach", flag),)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"radius": None, "kind": "minimum-norm"}, ["unbounded-fails"]),
        ({"radius": None, "kind": "minimum-norm", "access": "decision"}, ["unbounded-fails"]),
        ({"radius": None, "kind": "minimum-norm", "access": "none", "idle": True}, []),
        ({"radius": 1.0}, ["unbounded-fails"]),
        ({"radius": 1.0, "norm": "l2"}, []),
        ({"radius": 0.5}, []),
        # It was crafted on something else, or looks at something else: nothing says that it must win.
        ({"radius": 1.0, "source": "cnn"}, []),
        ({"radius": 1.0, "exact": False}, []),
        ({"radius": 1.0, "access": "score"}, []),
    ],
)
def test_an_attack_without_a_limit_must_win(changes, found):
    flags, _ = flagged([condition("a", **changes)], {"a": rows(first(N, 7))})
    assert codes(flags)["pgd, first"] == found
    if found:
        assert flags["pgd, first"][0].message == "without any limit, 7 of 200 attempts failed"
    flags, _ = flagged([condition("a", **changes)], {"a": rows(first(N, 0))})
    assert flags["pgd, first"] == ()


def test_without_a_limit_a_refusal_or_another_label_than_the_target_is_a_failure():
    free = {"radius": None, "kind": "minimum-norm"}
    refused = rows(first(N, 0), rejected=first(N, 5))
    assert codes(flagged([condition("a", **free)], {"a": refused})[0])["pgd, first"] == ["unbounded-fails"]
    other = rows(first(N, 0), target=[6] * N)
    assert codes(flagged([condition("a", target=3, **free)], {"a": other})[0])["pgd, first"] == [
        "unbounded-fails"
    ]


def watched(held, **columns):
    """Return outcomes with what the referee saw of an attack, which is in order unless said otherwise."""
    n = len(held)
    won = np.where(held, -1.0, 1.0)
    seen = {
        "zero_gradients": np.zeros(n),
        "probed": np.ones(n),
        "lost_success": np.zeros(n),
        "view_margin_clean": np.full(n, -2.0),
        "view_margin": won,
        "backwards": np.full(n, 40.0),
    }
    return rows(held, **{**seen, **columns})


HELD = first(N, 100)
FEW, MANY = first(N, 1), first(N, 3)
"""One and three of the hundred that held."""


@pytest.mark.parametrize(
    ("code", "columns", "exact"),
    [
        ("flat-gradient", lambda some: {"zero_gradients": np.where(some, 0.5, 0.49)}, False),
        ("short-moves", lambda some: {"probed": np.where(some, 0.49, 0.5)}, False),
        ("lost-successes", lambda some: {"lost_success": some.astype(float)}, True),
        ("no-gradient-asked", lambda some: {"backwards": np.where(some, 0.0, 1.0)}, False),
        ("view-differs", lambda some: {"view_margin": np.where(HELD & ~some, -1.0, 1.0)}, True),
    ],
)
def test_what_the_referee_saw_of_an_attack(code, columns, exact):
    def found(held, some, **changes):
        flags, _ = flagged([condition("a", **changes)], {"a": watched(held, **columns(some))})
        return [(flag.code, flag.level) for flag in flags["pgd, first"]]

    level = checks.CODES[code]
    assert found(HELD, MANY) == [(code, level)]
    assert found(HELD, FEW) == ([(code, "note")] if code == "view-differs" else [])
    assert found(HELD, MANY, exact=False) == ([] if exact else [(code, level)])
    # What happened to examples that were broken decides nothing, and on a random defense chance may.
    if code != "view-differs":
        assert found(~HELD, MANY) == []
    assert found(HELD, MANY, random=True) == ([] if exact else [(code, level)])


def test_what_nobody_saw_is_no_flag():
    nothing = dict.fromkeys(["zero_gradients", "probed", "lost_success", "view_margin_clean", "view_margin"])
    blank = {name: np.full(N, np.nan) for name in nothing}
    assert flagged([condition("a")], {"a": watched(HELD, **blank)})[0]["pgd, first"] == ()


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "doubt"),
        ({"access": "score"}, "note"),
        # Twenty draws of one step are one step.
        ({"averaged": 20}, "doubt"),
        ({"averaged": 40}, None),
        ({"kind": "minimum-norm", "radius": None}, None),
    ],
)
def test_an_attack_that_was_not_done_when_it_ended(changes, level):
    made = condition("a")
    made["facts"] |= changes
    for held, pace, expected in (
        (HELD, first(N, 51) * 0.51, level),
        (HELD, first(N, 50) * 0.51, None),
        (HELD, first(N, 100) * 0.5, None),
        (~HELD, first(N, 100) * 1.0, None),
        (first(N, 4), np.ones(N), None),
        (HELD, np.where(first(N, 5), 0.51, np.nan), level),
        (HELD, np.full(N, np.nan), None),
    ):
        flags, _ = flagged([made], {"a": watched(held, end_pace=pace)})
        found = [flag.level for flag in flags["pgd, first"] if flag.code == "still-rising"]
        assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "doubt"),
        ({"loss": "margin"}, "note"),
        ({"access": "score"}, "note"),
        ({"access": "decision"}, None),
    ],
)
def test_probabilities_in_place_of_logits(changes, level):
    made = condition("a")
    made["facts"] |= changes
    for column, expected in (
        (np.ones(N), level),
        (np.where(first(N, N - 1), 1.0, 0.0), None),
        (np.where(first(N, 3), 1.0, np.nan), level),
        (np.full(N, np.nan), None),
    ):
        flags, _ = flagged([made], {"a": watched(HELD, probabilities=column)})
        assert [flag.level for flag in flags["pgd, first"] if flag.code == "probabilities"] == [expected] * (
            expected is not None
        )


@pytest.mark.parametrize(("count", "found"), [(2, []), (3, ["ties"])])
def test_labels_that_the_order_of_classes_decides(count, found):
    for moved, given in ((True, condition("a")), (False, clean("a"))):
        flags, _ = flagged([given], {"a": rows(HELD, moved=moved, tied=first(N, count))})
        assert [flag.code for flags in flags.values() for flag in flags] == found
    # Ties that went against the defense, or that were refused, decide nothing in its favour.
    assert codes(flagged([condition("a")], {"a": rows(~HELD, tied=MANY)})[0]) == {"pgd, first": []}
    refused = rows(HELD, tied=MANY, rejected=MANY)
    assert codes(flagged([condition("a")], {"a": refused})[0]) == {"pgd, first": []}
    unknown = rows(HELD, tied=np.full(N, np.nan))
    assert codes(flagged([condition("a")], {"a": unknown})[0]) == {"pgd, first": []}


def test_images_from_the_victim_s_own_weights_are_no_transfer_and_no_blind_attack():
    """A blind attack that breaks what PGD left makes a doubt; one on the same weights is not blind."""
    strong, weak = rows(first(N, 50)), watched(HELD)
    conditions = [condition("a"), condition("b", attack="t", view="o:first", source="o", exact=False)]
    for own, expected in ((None, ["blind-beats-seeing"]), (0, ["blind-beats-seeing"]), (1, [])):
        seen = {**strong, **({} if own is None else {"own_source": np.full(N, float(own))})}
        flags, _ = flagged(conditions, {"a": weak, "b": seen})
        assert codes(flags)["pgd, first"] == expected
        assert ("source-is-victim" in codes(flags)["t, o:first"]) is bool(own)


def test_an_attack_that_walks_away_from_success():
    for away, found in ((70, []), (80, ["margin-grew"])):
        # Of a hundred that held, so many end with a margin that is worse; nobody else changes it.
        margin = np.where(first(N, away), -3.0, np.where(HELD, -1.0, 1.0))
        flags, _ = flagged([condition("a")], {"a": watched(HELD, view_margin=margin)})
        assert codes(flags)["pgd, first"] == found


def test_the_view_is_asked_about_clean_images_too():
    # The defense is right on all clean images, and its view wrong on three.
    margin = np.where(MANY, 0.5, -2.0)
    outcomes = {"a": watched(HELD, view_margin_clean=margin), "c": rows(first(N, N), moved=False)}
    flags, _ = flagged([condition("a"), clean("c")], outcomes)
    assert codes(flags) == {"pgd, first": ["view-differs"], "clean": []}
    assert "of 200 clean images 3 are successes on the view" in flags["pgd, first"][0].message


@pytest.mark.parametrize(
    ("right", "found"), [(200, []), (60, []), (59, ["at-chance"]), (40, ["at-chance"]), (0, ["at-chance"])]
)
def test_clean_answers_that_are_no_better_than_a_guess(right, found):
    # Five classes, of forty each: who always says the same is right on forty of two hundred.
    truth = np.arange(N) % 5
    still = rows(first(N, right), truth=truth, moved=False)
    still["label"] = np.where(first(N, right), truth, (truth + 1) % 5)
    found_, _ = flagged([clean("c")], {"c": still})
    assert (
        stats.binomtest(60, N, 0.2, "greater").pvalue < 0.01 < stats.binomtest(53, N, 0.2, "greater").pvalue
    )
    assert codes(found_)["clean"] == (found if right < 54 else [])


@pytest.mark.parametrize(
    ("refused", "level"), [(10, None), (20, "note"), (60, "doubt"), (120, "alarm"), (200, "alarm")]
)
def test_a_defense_that_refuses_what_is_clean(refused, level):
    still = rows(first(N, N), rejected=first(N, refused), moved=False)
    flags, _ = flagged([clean("c")], {"c": still})
    levels = [flag.level for flag in flags["clean"] if flag.code == "refuses-clean"]
    assert levels == ([] if level is None else [level])


# --- comparisons -------------------------------------------------------------------------------------

SEEING = condition("see")
BLIND = {
    "score": condition("blind", attack="spsa", use="spsa", access="score"),
    "decision": condition("blind", attack="boundary", use="boundary", access="decision"),
    "transfer": condition("blind", attack="transfer", view="cnn:first", source="cnn", exact=False),
}


def least(n, share=0.01):
    """Return how many of `n` survivors are more than 1 % of them by more than chance."""
    return next(wins for wins in range(n) if stats.binom.sf(wins - 1, n, share) < 0.01)


@pytest.mark.parametrize("kind", BLIND)
def test_a_blind_attack_that_breaks_what_a_seeing_one_left_marks_both(kind):
    blind = BLIND[kind]
    name = f"{blind['coordinates']['attack']}, {blind['coordinates']['view']}"
    enough = least(100)
    for wins, found in ((enough - 1, []), (enough, ["blind-beats-seeing"])):
        # It breaks half of what the other one broke too: that excuses nothing.
        outcomes = {"see": rows(first(N, 100)), "blind": rows(first(N, 150) & ~first(N, wins))}
        flags, _ = flagged([SEEING, blind], outcomes, extra=["Min", "Worst"])
        assert codes(flags) == dict.fromkeys(["pgd, first", name, "Min", "Worst"], found)
        assert {flag.level for each in flags.values() for flag in each} <= {"doubt"}
    message = flags[name][0].message
    assert f"breaks {enough} of the 100 examples that pgd (first) leaves; the other way round 50" in message
    assert flags["pgd, first"] == flags[name]


def test_what_another_seeing_attack_breaks_is_a_note_on_the_weak_one():
    weak = condition("weak", attack="apgd", use="apgd")
    outcomes = {"weak": rows(first(N, 180)), "see": rows(first(N, 100)), "blind": rows(first(N, 120))}
    flags, _ = flagged([weak, SEEING, BLIND["score"]], outcomes, extra=["Min"])
    assert codes(flags) == {
        "apgd, first": ["blind-beats-seeing"],
        "pgd, first": [],
        "spsa, first": [],
        "Min": [],
    }
    assert flags["apgd, first"][0].level == "note"
    del outcomes["see"]
    flags, _ = flagged([weak, BLIND["score"]], outcomes)
    assert codes(flags)["spsa, first"] == ["blind-beats-seeing"]
    assert flags["spsa, first"][0].level == "doubt"


def test_an_attack_that_the_table_does_not_show_counts():
    outcomes = {"see": rows(first(N, 100)), "blind": rows(first(N, 50))}
    flags, _ = flagged([SEEING, BLIND["score"]], outcomes, where={"attack": "pgd"})
    assert codes(flags) == {"pgd, first": ["blind-beats-seeing"]}
    del outcomes["blind"]
    flags, _ = flagged([SEEING, BLIND["score"]], outcomes, where={"attack": "pgd"})
    assert codes(flags) == {"pgd, first": []}


def test_attacks_of_worst_mode_are_not_compared_since_each_saw_what_others_left():
    outcomes = {"see": rows(first(N, 100)), "blind": rows(first(N, 50))}
    of = ["pgd", "spsa"]
    members = [
        but(each, member={"label": each["coordinates"]["attack"], "place": place, "of": of})
        for place, each in enumerate(
            {**given, "facts": {**given["facts"], "member": None}} for given in (SEEING, BLIND["score"])
        )
    ]
    asked = {"see": members[0], "blind": members[1]}
    evidence = [
        [checks.Evidence(each, found, found, None)]
        for name, given in asked.items()
        for each in conditions_of({"conditions": [given]})
        for found in [arrays(outcomes[name])]
    ]
    assert checks.compared([evidence]) == [[[], []]]
    alone = [
        [replace(seen, condition=replace(seen.condition, facts=replace(seen.condition.facts, member=None)))]
        for (seen,) in evidence
    ]
    assert all(checks.compared([alone])[0])


def test_a_random_defense_is_compared_by_the_difference():
    """Where answers differ by chance, each attack breaks some of what another one left."""
    one, other = (np.random.default_rng(seed).random(N) < 0.5 for seed in (1, 2))
    conditions = [but(each, random=True) for each in (SEEING, BLIND["score"])]
    assert not any(codes(flagged(conditions, {"see": rows(one), "blind": rows(other)})[0]).values())
    outcomes = {"see": rows(first(N, 100)), "blind": rows(first(N, 80))}
    assert codes(flagged(conditions, outcomes)[0])["spsa, first"] == ["blind-beats-seeing"]


def test_one_step_that_beats_many_is_an_alarm():
    conditions = [condition("one", attack="fgsm", use="fgsm"), SEEING]
    counts = {"one": {"backwards": np.ones(N)}, "see": {"backwards": np.full(N, 40.0)}}
    for stood, found in ((94, []), (93, ["one-step-beats-many"])):
        outcomes = {
            "one": rows(first(N, stood), **counts["one"]),
            "see": rows(first(N, 100), **counts["see"]),
        }
        flags, _ = flagged(conditions, outcomes)
        assert codes(flags) == {"fgsm, first": found, "pgd, first": found}
    assert flags["pgd, first"][0].level == "alarm"
    # A step that finds what many steps find is as it should be, and so is one that finds less.
    outcomes["one"] = rows(first(N, 150), **counts["one"])
    assert not any(codes(flagged(conditions, outcomes)[0]).values())


def test_an_attack_that_mends_what_was_wrong():
    outcomes = {"a": rows(first(N, 190)), "c": rows(first(N, 180), moved=False)}
    flags, _ = flagged([condition("a"), clean("c")], outcomes)
    assert codes(flags) == {"pgd, first": ["above-clean"], "clean": []}
    assert (
        flags["pgd, first"][0].message
        == "pgd (first) makes 10 of 200 wrong answers right, and 0 right ones wrong"
    )
    # A refusal of a moved image is right, and of a clean one wrong: the label alone counts here.
    refuses = {
        "a": rows(first(N, 180), rejected=~first(N, 180)),
        "c": rows(first(N, 180), rejected=~first(N, 180), moved=False),
    }
    found = codes(flagged([condition("a"), clean("c")], refuses)[0])
    assert found == {"pgd, first": ["refuses-clean"], "clean": ["refuses-clean"]}


def test_quiet_numbers_are_flagged_once_in_a_hundred_tables_at_most():
    """A table of a hundred numbers: four defenses, 25 attacks, all as strong as each other, by chance."""
    conditions = [
        condition(f"{d}-{a}", defense=f"d{d}", attack=f"a{a}", access="gradient" if a % 2 else "score")
        for d in range(4)
        for a in range(25)
    ]
    table = {"title": "x", "rows": ["defense"], "columns": ["attack"]}
    draw, wrong, tables_ = np.random.default_rng(7), 0, 60
    for _ in range(tables_):
        outcomes = {}
        for d in range(4):
            held = draw.random(N) < 0.5
            for a in range(25):
                # Of what the others left, each breaks one in a hundred.
                outcomes[f"{d}-{a}"] = rows(held & (draw.random(N) > 0.01))
        made = tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined)
        wrong += any(flag.level != "note" for row in made.rows for cell in row.cells for flag in cell.flags)
    # Below 1 % each: more than four of sixty have a probability of 0.0003.
    assert wrong <= 4


def test_attacks_are_compared_on_the_examples_that_both_saw():
    # On all examples the blind attack looks stronger; on its own fifty it is not.
    outcomes = {"see": rows(~first(N, 50)), "blind": rows(first(50, 0))}
    flags, rendered = flagged([SEEING, but(BLIND["score"], n=50)], outcomes)
    assert rendered.rows[0].cells[0].estimate.value > rendered.rows[0].cells[1].estimate.value
    assert flags["spsa, first"] == ()


def test_seeds_do_not_make_one_example_speak_twice():
    # Three examples more, in each of five seeds: fifteen wins if seeds were examples, and three as it is.
    conditions, outcomes = [], {}
    for seed in range(5):
        conditions += [but(each, seed=seed, job=f"{each['job']}{seed}") for each in (SEEING, BLIND["score"])]
        outcomes |= {f"see{seed}": rows(first(N, 100)), f"blind{seed}": rows(first(N, 97))}
    assert not any(codes(flagged(conditions, outcomes)[0]).values())


def test_other_radii_are_not_compared():
    blind = but(BLIND["score"], radius=0.3)
    outcomes = {"see": rows(first(N, 150)), "blind": rows(first(N, 10))}
    assert not any(codes(flagged([SEEING, blind], outcomes, ("attack", "radius"))[0]).values())


def test_a_surrogate_that_beats_the_exact_view():
    conditions = [condition("first", view="first", exact=False), condition("e2e", view="e2e", exact=True)]
    outcomes = {"first": rows(first(N, 90)), "e2e": rows(first(N, 110))}
    flags, _ = flagged(conditions, outcomes)
    assert codes(flags) == {
        "pgd, first": ["surrogate-beats-exact"],
        "pgd, e2e": ["surrogate-beats-exact"],
    }
    # Another attack's exact view says nothing about this one's.
    conditions[1] = but(conditions[1], attack="fgsm")
    assert not any(codes(flagged(conditions, outcomes)[0]).values())


def test_robustness_that_grows_with_the_radius():
    conditions = [condition(f"r{radius}", radius=radius) for radius in (0.3, 0.1, 0.2)]
    outcomes = {"r0.1": rows(first(N, 120)), "r0.2": rows(first(N, 80)), "r0.3": rows(first(N, 100))}
    flags, _ = flagged(conditions, outcomes, ["radius"])
    assert codes(flags) == {"0.3": ["grows-with-radius"], "0.1": [], "0.2": []}
    assert (
        "at radius 0.3 than at 0.2: 20 of 200 only at the smaller, 0 only at the larger"
        in flags["0.3"][0].message
    )
    outcomes["r0.3"] = rows(first(N, 83))
    assert not any(codes(flagged(conditions, outcomes, ["radius"])[0]).values())


def test_targets_are_taken_together_before_attacks_are_compared():
    conditions = [but(SEEING, target=target, job=f"see{target}") for target in (1, 2)]
    # Each target breaks a half; together they break what the blind attack breaks, and more.
    outcomes = {
        "see1": rows(first(N, 100), target=[4] * N),
        "see2": rows(~first(N, 100), target=[5] * N),
        "blind": rows(first(N, 60)),
    }
    assert not any(codes(flagged([*conditions, BLIND["score"]], outcomes)[0]).values())


def test_columns_on_different_examples_are_named_with_their_numbers():
    conditions = [condition("a", n=200), condition("b", attack="spsa", access="score", n=50)]
    _, rendered = flagged(conditions, {"a": rows(first(200, 90)), "b": rows(first(50, 30))})
    assert [flag.code for flag in rendered.flags] == ["unequal-examples"]
    assert rendered.flags[0].message.endswith("n = 200 (pgd, first); 50 (spsa, first)")


def test_data_sets_of_different_sizes_are_no_doubt():
    conditions = [condition("a", data="mnist", n=100), condition("b", data="svhn", n=260)]
    _, rendered = flagged(conditions, {"a": rows(first(100, 90)), "b": rows(first(260, 30))}, ["data"])
    assert rendered.flags == ()


# --- advice ------------------------------------------------------------------------------------------


def test_every_doubt_stands_in_the_documentation_and_no_other():
    sections = re.findall(
        r"^## `?([a-z-]+)`?$", (DOCS / "flags.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(sections) == sorted(checks.CODES)
    assert checks.Flag("invalid-moves", "x").advice == "docs/flags.md#invalid-moves"


def test_no_flag_is_raised_under_an_unknown_code():
    sources = (each.read_text(encoding="utf-8") for each in Path(checks.__file__).parent.glob("*.py"))
    raised = {code for source in sources for code in re.findall(r"Flag\(\s*\"([a-z-]+)\"", source)}
    assert raised == set(checks.CODES)

import re
from pathlib import Path

import numpy as np
import pytest
from manifests import but, clean, condition, first, manifest, rows
from scipy import stats

from bench.report import checks, tables

DOCS = Path(__file__).parents[2] / "docs"
N = 200


def flagged(conditions, outcomes, columns=("attack", "view"), **table):
    """Return the flags of each column of a table with one row, and those of the table."""
    given = {"title": "x", "rows": ["readout"], "columns": list(columns), **table}
    rendered = tables.cut(manifest(conditions, given), "T", outcomes.get)
    assert len(rendered.rows) == 1
    named = {
        heading: cell.flags for heading, cell in zip(rendered.columns, rendered.rows[0].cells, strict=True)
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


# --- comparisons -------------------------------------------------------------------------------------

SEEING = condition("see")
BLIND = {
    "score": condition("blind", attack="spsa", use="spsa", access="score"),
    "decision": condition("blind", attack="boundary", use="boundary", access="decision"),
    "transfer": condition("blind", attack="transfer", view="cnn:first", source="cnn", exact=False),
}


def least(n):
    """Return how many wins in a row are not chance."""
    chances = ((wins, stats.binomtest(wins, wins, alternative="greater").pvalue) for wins in range(1, n))
    return next(wins for wins, chance in chances if chance < 0.01)


@pytest.mark.parametrize("kind", BLIND)
def test_a_blind_attack_that_beats_a_seeing_one(kind):
    blind = BLIND[kind]
    few, many = 100 - least(N) + 1, 100 - least(N)
    for stood, found in ((few, []), (many, ["blind-beats-seeing"])):
        outcomes = {"see": rows(first(N, 100)), "blind": rows(first(N, stood))}
        flags, _ = flagged([SEEING, blind], outcomes)
        assert codes(flags)["pgd, first"] == []
        assert codes(flags)[f"{blind['coordinates']['attack']}, {blind['coordinates']['view']}"] == found
    message = flags[f"{blind['coordinates']['attack']}, {blind['coordinates']['view']}"][0].message
    assert f"breaks {least(N)} of 200 examples that pgd (first) does not; the other way round 0" in message


def test_a_blind_attack_that_breaks_others_is_no_doubt():
    outcomes = {"see": rows(first(N, 100)), "blind": rows(~first(N, 100))}
    assert not any(codes(flagged([SEEING, BLIND["score"]], outcomes)[0]).values())


def test_a_blind_attack_is_held_against_the_strongest_that_sees():
    weak = condition("weak", attack="fgsm", use="fgsm")
    outcomes = {"weak": rows(first(N, 180)), "see": rows(first(N, 100)), "blind": rows(first(N, 120))}
    assert not any(codes(flagged([weak, SEEING, BLIND["score"]], outcomes)[0]).values())
    del outcomes["see"]
    assert codes(flagged([weak, BLIND["score"]], outcomes)[0])["spsa, first"] == ["blind-beats-seeing"]


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
    assert codes(flags) == {"pgd, first": ["surrogate-beats-exact"], "pgd, e2e": []}
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


def test_no_doubt_is_raised_under_an_unknown_code():
    source = Path(checks.__file__).read_text(encoding="utf-8")
    raised = set(re.findall(r"Flag\(\s*\"([a-z-]+)\"", source))
    assert raised == set(checks.CODES)

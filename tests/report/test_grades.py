"""Grades: what stands behind a row, and what is missing for a better one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import clean, condition, first, manifest, rows

from bench.registry import ATTACKS, discover
from bench.report import remedies, render, tables
from bench.report.checks import Evidence
from bench.report.tables import OutcomeReader, RenderedTable
from bench.results.conditions import conditions_of
from bench.results.metrics import METRICS
from bench.suite.layout import arrange
from bench.suite.resolve import resolve

N = 2000
SOUND = {"worst": "quiet", "found": [], "tests": 18, "untested": [], "whole": True}
TRIED = {
    "worst": "note",
    "found": [["far", "note", "farther than needed"]],
    "late": [],
    "crossed": 1.0,
    "planted": 0.95,
}
CHECKS = {"trial": "t", "examinations": ["whole", "look"]}


def evidence() -> dict[str, Any]:
    """Return all that an A needs: conditions, outcomes, and what trials and examinations found."""
    steps = np.full(N, 40.0)
    conditions = [
        clean("c", n=N),
        condition("a", n=N, **CHECKS),
        condition("b", n=N, attack="apgd", use="apgd", **CHECKS),
        condition("s", n=N, attack="square", access="score", **CHECKS),
    ]
    outcomes = {
        "c": rows(first(N, 1900), moved=False),
        "a": rows(first(N, 900), backwards=steps),
        "b": rows(first(N, 890), backwards=steps),
        "s": rows(first(N, 1200)),
    }
    found = {("trial", "t"): TRIED, ("examination", "whole"): SOUND}
    return {"conditions": conditions, "outcomes": outcomes, "found": found}


def cut(given: dict[str, Any], **table: Any) -> RenderedTable:
    asked = {"title": "x", "rows": ["defense"], "columns": ["attack"], "grades": True, **table}
    made = manifest(given["conditions"], asked)
    return tables.cut(made, "T", given["outcomes"].get, lambda *name: given["found"].get(name))


def graded(given: dict[str, Any], **table: Any) -> tuple[str, str]:
    (row,) = cut(given, **table).rows
    assert row.grade is not None
    return row.grade.letter, row.grade.said


def without(given: dict[str, Any], *jobs: str) -> dict[str, Any]:
    return {**given, "conditions": [each for each in given["conditions"] if each["job"] not in jobs]}


def test_all_the_evidence_is_an_a() -> None:
    assert graded(evidence()) == ("A", "")


def test_evidence_that_the_table_leaves_out_counts() -> None:
    assert graded(evidence(), columns={"PGD": {"attack": "pgd"}, "APGD": {"attack": "apgd"}})[0] == "A"


@pytest.mark.parametrize(
    ("lacks", "missing"),
    [
        ({"jobs": ("s",)}, "for a grade of B: an attack without gradients"),
        ({"jobs": ("a", "b")}, "for a grade of B: an iterative attack with gradients of what is scored"),
        (
            {"found": ("trial", "t")},
            "for a grade of B: a trial of its attack where the answer is known; a trial of its attack "
            "without gradients",
        ),
        (
            {"found": ("examination", "whole")},
            "for a grade of B: a whole examination of the defense (bench doctor)",
        ),
    ],
)
def test_what_no_number_can_be_believed_without_is_a_c(lacks: dict[str, Any], missing: str) -> None:
    given = without(evidence(), *lacks.get("jobs", ()))
    given["found"].pop(lacks.get("found"), None)
    assert graded(given) == ("C", missing)


def test_a_look_is_no_whole_examination() -> None:
    given = evidence()
    del given["found"]["examination", "whole"]
    given["found"]["examination", "look"] = {**SOUND, "whole": False}
    assert graded(given)[0] == "C"


def test_one_step_is_no_iterative_attack() -> None:
    given = evidence()
    for job in "ab":
        given["outcomes"][job]["backwards"] = 1.0
    assert graded(given) == ("C", "for a grade of B: an iterative attack with gradients of what is scored")


def test_a_surrogate_or_a_transfer_is_no_attack_on_what_is_scored() -> None:
    for change in ({"exact": False}, {"source": "other"}):
        given = evidence()
        given["conditions"] = [
            condition(each["job"], **{**each["coordinates"], **each["facts"], **change})
            if each["job"] in "ab"
            else each
            for each in given["conditions"]
        ]
        letter, said = graded(given)
        assert letter == "C"
        assert "an iterative attack with gradients of what is scored" in said


def test_one_kind_of_attack_few_examples_or_an_unfinished_examination_is_a_b() -> None:
    one = without(evidence(), "b")
    second = "a second attack with gradients of what is scored, with another loss"
    assert graded(one) == ("B", f"for a grade of A: {second}")
    late = evidence()
    late["found"]["examination", "whole"] = {**SOUND, "late": ["blind"]}
    assert graded(late) == ("B", "for a grade of A: more time for the examination: there was none for blind")


def changed(given: dict[str, Any], jobs: str, **facts: Any) -> dict[str, Any]:
    """Return the same where some conditions have other facts."""
    conditions = [
        {**each, "facts": {**each["facts"], **facts}} if each["job"] in jobs else each
        for each in given["conditions"]
    ]
    return {**given, "conditions": conditions}


@pytest.mark.parametrize(
    ("trial", "letter", "missing"),
    [
        ({"late": ["plants"], "planted": None}, "C", "a trial of its attack where the answer is known"),
        ({"late": ["nan"]}, "A", ""),
        ({"planted": None}, "A", ""),
        ({"crossed": 0.0}, "C", "an attack without gradients that stands its trial"),
    ],
)
def test_what_a_trial_had_no_time_to_show_proves_nothing(
    trial: dict[str, Any], letter: str, missing: str
) -> None:
    given = evidence()
    given["found"]["trial", "t"] = {**TRIED, **trial}
    found, said = graded(given)
    assert (found, missing in said) == (letter, True)


@pytest.mark.parametrize(("n", "letter"), [(49, "C"), (50, "A")])
def test_attacks_on_few_examples_are_no_evidence(n: int, letter: str) -> None:
    found, said = graded(changed(evidence(), "ab", n=n))
    assert found == letter
    assert ("on 50 examples or more" in said) == (letter == "C")


@pytest.mark.parametrize(
    ("use", "loss", "letter"),
    [
        ("torchattacks/PGD", None, "B"),
        ("foolbox/LinfBasicIterativeAttack", None, "B"),
        ("torchattacks/APGD", None, "A"),
        ("pgd", "margin", "A"),
    ],
)
def test_pgd_of_a_library_is_no_second_attack(use: str, loss: str | None, letter: str) -> None:
    assert graded(changed(evidence(), "b", use=use, loss=loss))[0] == letter


def test_a_table_without_an_accuracy_is_a_b() -> None:
    """Its interval is not known, so that nobody knows whether there are enough examples."""
    letter, said = graded(evidence(), metric="success", extra=[])
    assert letter == "B"
    assert said == "for a grade of A: a column with the accuracy under attack, and its interval"


def test_few_examples_are_a_b() -> None:
    given = evidence()
    given["outcomes"] = {job: frame[::20] for job, frame in given["outcomes"].items()}
    letter, said = graded(given)
    assert letter == "B"
    assert said.startswith("for a grade of A: more examples: the interval of the lowest accuracy spans")


def test_only_accuracy_under_attack_says_how_many_examples_are_needed() -> None:
    """Refusals of 0 % have a narrow interval, and are no accuracy."""
    given = evidence()
    given["outcomes"] = {job: frame[::20] for job, frame in given["outcomes"].items()}
    columns = {
        "Refused": {"attack": "pgd", "metric": "rejection"},
        "PGD": {"attack": "pgd"},
        "APGD": {"attack": "apgd"},
    }
    assert graded(given, columns=columns)[0] == "B"


def test_at_several_threats_the_least_evidence_decides() -> None:
    given = evidence()
    given["conditions"].append(condition("far", n=N, radius=0.2, **CHECKS))
    given["outcomes"]["far"] = rows(first(N, 800), backwards=np.full(N, 40.0))
    columns = {"near": {"attack": "pgd", "radius": 0.1}, "far": {"attack": "pgd", "radius": 0.2}}
    assert graded(given, columns=columns) == ("C", "for a grade of B: an attack without gradients")


def test_a_doubt_is_a_c_and_an_alarm_a_d_and_both_are_named() -> None:
    given = evidence()
    given["found"]["trial", "t"] = {**TRIED, "worst": "doubt", "found": [["weak", "doubt", "lags"]]}
    letter, said = graded(given)
    assert letter == "C"
    assert said.startswith("for a grade of B: mend what these doubts name: trial; a trial of its attack")
    given["found"]["examination", "whole"] = {**SOUND, "found": [["not-uphill", "alarm", "goes down"]]}
    assert graded(given) == ("D", "for a grade of C: mend what these alarms name: examination")


def test_findings_become_flags_notes_do_not_and_what_outcomes_tell_better_is_left_out() -> None:
    given = evidence()
    given["found"]["trial", "t"] = {**TRIED, "found": [*TRIED["found"], ["weak", "alarm", "crossed 0 of 8"]]}
    given["found"]["examination", "whole"] = {
        **SOUND,
        "found": [["rough-slope", "note", "x"], ["at-chance", "alarm", "x"], ["not-uphill", "doubt", "y"]],
    }
    (row,) = cut(given, extra=["Worst"]).rows
    assert [(flag.code, flag.level, flag.message) for flag in row.flags] == [
        ("examination", "doubt", "not-uphill: y")
    ]
    trials = [[flag.message for flag in cell.flags if flag.code == "trial"] for cell in row.cells]
    said = "{} (first): weak: crossed 0 of 8"
    every = [said.format(name) for name in ("pgd", "apgd", "square")]
    assert trials == [[], *([each] for each in every), every]


def test_a_row_of_several_defenses_has_no_grade_and_its_cells_have_the_flags() -> None:
    given = evidence()
    given["conditions"].append(condition("o", n=N, defense="other", examinations=["bad"]))
    given["outcomes"]["o"] = rows(first(N, 900))
    given["found"]["examination", "bad"] = {**SOUND, "found": [["not-uphill", "alarm", "y"]]}
    table = cut(given, rows=["norm"], columns=["defense"], where={"attack": "pgd"})
    (row,) = table.rows
    assert row.grade is None
    assert row.flags == ()
    assert [[flag.code for flag in cell.flags] for cell in row.cells] == [[], ["examination"]]
    assert "Grade" not in render.joined([table], "markdown")


def test_a_table_of_clean_images_has_no_grade() -> None:
    given = evidence()
    assert "Grade" not in render.joined([cut(given, where={"attack": "clean"})], "markdown")


def test_grades_are_printed_with_what_is_missing_and_can_be_left_out() -> None:
    given = without(evidence(), "s")
    text = render.joined([cut(given)], "markdown")
    assert "| Grade |" in text
    assert "| C¹ |" in text
    assert "1. for a grade of B: an attack without gradients" in text
    assert "Grade" not in render.joined([cut(given, grades=False)], "markdown")
    assert ",grade," in render.joined([cut(given)], "csv").partition("\n")[0]


def test_flags_of_the_defense_stand_in_every_format() -> None:
    given = evidence()
    given["outcomes"]["c"] = rows(first(N, 1900), moved=False, rejected=np.ones(N, bool))
    for form in ("markdown", "csv", "json", "latex"):
        for table in (cut(given), cut(given, grades=False)):
            assert "refuses-clean" in render.joined([table], form), form
    assert "refuses-clean" in cut(given).alarms


def test_grading_needs_no_more_jobs_than_the_table() -> None:
    given = evidence()
    made = manifest(given["conditions"], {"title": "x", "rows": ["defense"], "columns": ["attack"]})
    assert arrange(made, "T").jobs() == {"c", "a", "b", "s"}


# --- how long it takes ---------------------------------------------------------------------------------


def timed(given: dict[str, Any], seconds: dict[str, float], **columns: Any) -> dict[str, Any]:
    """Return evidence whose attacks took some seconds for 40 passes both ways over each example."""
    steps = np.full(N, 40.0)
    rows_of = {
        job: frame.assign(forwards=steps, backwards=steps, **columns)
        for job, frame in given["outcomes"].items()
    }
    found = {("evaluate", job): {"crafting": {"seconds": took}} for job, took in seconds.items()}
    return {**given, "outcomes": rows_of, "found": {**given["found"], **found}}


def test_a_pass_takes_as_long_as_those_that_were_made() -> None:
    # PGD: 80 passes over 2,000 examples in 16 s are a ten-thousandth each; Square makes 1,001 over as many.
    given = timed(without(evidence(), "s", "b"), {"a": 16.0})
    (row,) = cut(given).rows
    assert row.grade is not None
    (blind,) = row.grade.missing
    assert (blind.kind, blind.seconds) == ("blind", pytest.approx(1001 * N * 1e-4))
    assert row.grade.said == "for a grade of B: an attack without gradients"
    assert row.grade.told == f"{row.grade.said} (bench doctor --fix: about 3 min 20 s)"


def test_attacks_of_the_same_family_tell_more() -> None:
    """Square's own passes, and not PGD's, say how long another one without gradients takes."""
    found = remedies.seconds
    given = timed(evidence(), {"a": 16.0, "s": 1.6})
    seen = [each for each in known(given) if each.condition.attack in ("pgd", "square")]
    pace = {"a": (16.0, 80.0 * N), "s": (1.6, 80.0 * N)}
    assert found(["doctor-square"], seen, lambda each: pace[each.condition.job]) == pytest.approx(
        1001 * N * 1e-5
    )
    assert found(["doctor-apgd"], seen, lambda each: pace[each.condition.job]) == pytest.approx(
        200 * N * 1e-4
    )


def test_every_seed_threat_and_draw_counts_and_what_is_there_does_not() -> None:
    given = evidence()
    seen = [each for each in known(given) if each.condition.job == "a"]
    once = remedies.seconds(["doctor-square"], seen, lambda _: (1.0, 1e6))
    assert once is not None

    def also(**changes: Any) -> list[Evidence]:
        at = {name: value for name, value in changes.items() if name in seen[0].condition.coordinates}
        facts = replace(seen[0].condition.facts, **{name: changes[name] for name in changes.keys() - at})
        where = {**seen[0].condition.coordinates, **at}
        return [replace(seen[0], condition=replace(seen[0].condition, coordinates=where, facts=facts))]

    def took(attacks: list[Evidence]) -> float | None:
        return remedies.seconds(["doctor-square"], attacks, lambda _: (1.0, 1e6))

    assert took([*seen, *also(seed=1)]) == pytest.approx(2 * once)
    assert took([*seen, *also(radius=0.2)]) == pytest.approx(2 * once)
    assert took([*seen, *also(attack="apgd", view="e2e")]) == pytest.approx(once)
    assert took([*seen, *also(norm="l0")]) == pytest.approx(once)
    assert took(also(random=True)) == pytest.approx(8 * once)
    assert took([*seen, *also(attack="doctor-square")]) is None


def test_where_nothing_is_known_no_time_is_said() -> None:
    given = without(evidence(), "s")
    assert "(bench doctor --fix" not in cut(given).rows[0].grade.told  # type: ignore[union-attr]
    # Of a transfer the passes are another network's, and packed without them nobody knows.
    packed = timed(given, {"a": 1.0, "b": 1.0})
    packed["outcomes"] = {job: frame.drop(columns="forwards") for job, frame in packed["outcomes"].items()}
    assert "(bench doctor --fix" not in cut(packed).rows[0].grade.told  # type: ignore[union-attr]


def test_times_stand_on_the_screen_and_in_no_file_of_a_run() -> None:
    table = cut(timed(without(evidence(), "s"), {"a": 0.1, "b": 0.1}))
    assert "(bench doctor --fix: less than 10 s)" in " ".join(render.joined([table], "text").split())
    for form in ("markdown", "csv", "latex"):
        assert "doctor --fix" not in render.joined([table], form)  # type: ignore[arg-type]


def test_passes_are_those_that_the_attacks_declare() -> None:
    discover()
    assert remedies.PASSES.keys() == remedies.ATTACKS.keys()
    for name, use in remedies.ATTACKS.items():
        params = {word: value for word, value in use.items() if word != "use"}
        made = resolve(ATTACKS[use["use"]], params, Path())
        passes = remedies.PASSES[name]
        assert made.entry.passes(made.params) == passes.forwards
        assert (made.entry.access == "gradient") == (passes.backwards > 0)
        assert passes.backwards in (0, passes.forwards)


def known(given: dict[str, Any]) -> list[Evidence]:
    """Return the evidence of what is attacked."""
    made = manifest(given["conditions"], {"title": "x", "rows": ["defense"], "columns": ["attack"]})
    layout = arrange(made, "T")
    reader = OutcomeReader(layout, given["outcomes"].get, lambda *name: given["found"].get(name))
    accuracy = METRICS["accuracy"]
    found = [reader.look(each, accuracy) for each in conditions_of(made) if not each.facts.idle]
    return [each for each in found if isinstance(each, Evidence)]

"""Rejection judged whole: numbers that a hand computes, which read-outs and attacks count, and every form."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from manifests import clean, condition, rows

from bench import cli
from bench.report import rejection
from bench.report.render.records import records
from bench.results.metrics import wilson
from suites import TASK, Ran, suite

N = 10
ASKED = {"readout": "reject", "n": N}


def graded(label: list[int], refused: list[int], score: Any, **changes: Any) -> pd.DataFrame:
    """Return outcomes of images of class 3, some of them refused."""
    rejected = np.isin(np.arange(len(label)), refused)
    return rows(
        [True] * len(label), label=label, rejected=rejected, score=np.asarray(score, float), **changes
    )


FALLING = np.linspace(1, 0.1, N)


def hand(**more: Any) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Return a defense that refuses: unmoved, attacked through its logits, and through its refusals."""
    conditions = [
        clean("clean", **ASKED),
        condition("blunt", view="logits", exact=False, attack="pgd", **ASKED),
        condition("keen", view="reject", exact=True, attack="margin", **ASKED),
    ]
    outcomes = {
        # Nine right, of which the least sure is refused; the most sure is wrong.
        "clean": graded([5, *[3] * 9], [9], FALLING, moved=False),
        # All broken; of the first four the score stays above.
        "blunt": graded([5] * 10, list(range(4, 10)), np.where(np.arange(10) < 4, FALLING, 0.0)),
        # Seven broken and accepted, one refused, two right.
        "keen": graded([*[5] * 8, 3, 3], [7], [*[0.9] * 7, 0.05, 0.5, 0.4]),
    }
    return {"data": {"digits": {}}, "skips": [], "tables": {}, "conditions": conditions, **more}, outcomes


def judged(manifest: dict[str, Any], outcomes: dict[str, Any], **options: Any) -> list[rejection.Readout]:
    return rejection.readouts(manifest, outcomes.get, **options)


def cells(found: rejection.Readout, outcomes: dict[str, Any], part: str) -> dict[tuple[str, str], Any]:
    """Return the records of one of the tables, by row and column."""
    (table,) = [each for each in rejection.cut(found, outcomes.get) if each.key == f"{found.name}, {part}"]
    return {(each.get("attack", each.get("row")), each["column"]): each for each in records(table)}


def test_what_is_answered_is_what_a_hand_counts() -> None:
    manifest, outcomes = hand()
    (found,) = judged(manifest, outcomes)
    assert found.name == "digits, cnn (reject)"
    told = cells(found, outcomes, "answers")
    expected = {
        "clean": [90, 80, 10, 10, 80, 80],
        # Right when clean and accepted are 1 to 8: of those 4 to 8 are refused under attack.
        "pgd": [40, 0, 40, 60, 50, 0],
        # 8 stays right; 9 was refused clean; 7 is refused.
        "margin": [90, 20, 70, 10, 20, 10],
    }
    values = {
        attack: [told[attack, heading]["value"] for heading in rejection.ANSWERS] for attack in expected
    }
    assert values == expected
    low, high = wilson(0.4, N)
    assert told["pgd", "Coverage"]["low"] == pytest.approx(100 * low, abs=1e-5)
    assert told["pgd", "Coverage"]["high"] == pytest.approx(100 * high, abs=1e-5)


def test_the_worst_case_is_of_all_attacks_and_of_those_that_know() -> None:
    manifest, outcomes = hand()
    (found,) = judged(manifest, outcomes)
    told = cells(found, outcomes, "worst case")
    every, adaptive = "every attack (2), linf 0.1", "adaptive (1), linf 0.1"
    headings = [each for each in rejection.WORST if each != "AURC"]
    values = {row: [told[row, heading]["value"] for heading in headings] for row in (every, adaptive)}
    # 0 to 6 are accepted and wrong under one of both; 8 and 9 are refused under the first.
    assert values == {every: [0, 70, 20, 0], adaptive: [20, 70, 20, 10]}
    assert told[every, "AURC"]["value"] == 100
    # Seven wrong, then two right, then a wrong one.
    risks = [*[1] * 7, 7 / 8, 7 / 9, 8 / 10]
    assert told[adaptive, "AURC"]["value"] == pytest.approx(10 * sum(risks), abs=1e-5)
    assert found.adaptive == ("margin (reject)",)


def test_what_scores_tell_is_what_a_hand_counts() -> None:
    manifest, outcomes = hand()
    (found,) = judged(manifest, outcomes)
    told = cells(found, outcomes, "scores")
    # The most sure one of ten is wrong: at each coverage k / 10 the risk is 1 / k.
    harmonic = sum(1 / k for k in range(1, 11)) / 10
    assert told["clean", "AURC"]["value"] == pytest.approx(100 * harmonic, abs=1e-5)
    # At the best it would come last.
    assert told["clean", "E-AURC"]["value"] == pytest.approx(100 * (harmonic - 0.01), abs=1e-5)
    assert told["clean", "AUROC (wrong)"]["value"] == 0
    assert told["clean", "FPR95 (wrong)"]["value"] == 100
    assert told["clean", "AUROC (advers.)"]["note"] == "no example counts"
    assert told["pgd", "AURC"]["value"] == 100
    assert told["pgd", "AUROC (wrong)"]["note"] == "answers of one kind alone: nothing to tell apart"
    # Of the nine that were right, 1 to 3 keep their score and the others have 0.
    ours, theirs = FALLING[1:], np.r_[FALLING[1:4], np.zeros(6)]
    above = (ours[:, None] > theirs).mean() + (ours[:, None] == theirs).mean() / 2
    assert told["pgd", "AUROC (advers.)"]["value"] == pytest.approx(100 * above, abs=1e-4)
    # Of nine none may be refused: the threshold is 0.1, which three of nine reach.
    assert told["pgd", "FPR95 (advers.)"]["value"] == pytest.approx(100 / 3, abs=1e-4)
    # 1 to 7 were broken: 1 to 6 with a score of 0.9, 7 with one below all clean ones.
    ours, theirs = FALLING[1:8], np.array([*[0.9] * 6, 0.05])
    above = (ours[:, None] > theirs).mean() + (ours[:, None] == theirs).mean() / 2
    assert told["margin", "AUROC (advers.)"]["value"] == pytest.approx(100 * above, abs=1e-4)
    assert told["margin", "AUROC (advers.)"]["n"] == 7


def test_defenses_that_refuse_nothing_are_left_out_unless_their_table_is_asked_for() -> None:
    manifest, outcomes = hand()
    plain = {"defense": "other", "n": N}
    manifest["conditions"] += [
        clean("clean-plain", defense="cnn", readout="plain", n=N),
        clean("clean-other", **plain),
        condition("other", **plain),
    ]
    outcomes["clean-plain"] = rows([True] * N, moved=False)
    outcomes["clean-other"] = rows([True] * N, moved=False)
    outcomes["other"] = rows([False] * N)
    assert [each.name for each in judged(manifest, outcomes)] == [
        "digits, cnn (reject)",
        "digits, cnn (plain)",
    ]
    (only,) = judged(manifest, outcomes, jobs={"other"})
    assert (only.name, only.refuses, only.adaptive) == ("digits, other (last)", False, ())
    assert "digits, other (last): nothing was refused; the score alone is judged." in rejection.legend([only])
    # Unmoved images come along, whatever was asked for.
    told = cells(only, outcomes, "answers")
    assert told["clean", "Refused"]["value"] == 0
    assert told["pgd", "Accepted wrong"]["value"] == 100
    (some,) = judged(manifest, outcomes, jobs={"keen"})
    assert {row for row, _ in cells(some, outcomes, "answers")} == {"clean", "margin"}
    del outcomes["clean"], outcomes["blunt"], outcomes["keen"]
    assert judged(manifest, outcomes) == []


def test_it_says_where_nobody_tried_to_be_accepted_and_where_refusals_do_not_follow_the_score() -> None:
    manifest, outcomes = hand()
    assert judged(manifest, outcomes)[0].follows
    outcomes["keen"]["score"] = 0.95  # Also where it is refused; clean images are accepted at 0.2.
    (found,) = judged(manifest, outcomes)
    assert not found.follows
    below = "an accepted answer has a lower score than a refused one"
    assert any(below in each for each in rejection.legend([found]))
    assert any(
        "adaptive, through a view" in each and "margin (reject)" in each for each in rejection.legend([found])
    )
    for each in outcomes.values():
        each["rejected"] = each["score"] < 0.35
    manifest["conditions"] = manifest["conditions"][:2]
    (found,) = judged(manifest, outcomes)
    assert found.follows
    said = rejection.legend([found])
    assert not any(below in each for each in said)
    assert any("nobody tried to be accepted" in each for each in said)
    # What has no score is refused by nothing.
    outcomes["blunt"].loc[0, ["score", "rejected"]] = [math.nan, False]
    outcomes["blunt"].loc[1, ["score", "rejected"]] = [math.nan, True]
    assert judged(manifest, outcomes)[0].follows


def test_a_read_out_that_answers_alone_and_blind_attacks_know_nothing() -> None:
    manifest, outcomes = hand()
    manifest["conditions"].append(condition("noise", attack="noise", view=None, access="none", **ASKED))
    outcomes["noise"] = graded([3] * N, [], FALLING)
    (found,) = judged(manifest, outcomes)
    assert found.adaptive == ("margin (reject)",)
    assert ("every attack (3), linf 0.1", "Accepted wrong") in cells(found, outcomes, "worst case")


def test_unmoved_images_are_those_of_the_task_that_asked_for_most() -> None:
    manifest, outcomes = hand()
    manifest["conditions"].insert(0, clean("few", norm="l2", radius=None, readout="reject", n=3))
    outcomes["few"] = outcomes["clean"][:3]
    (found,) = judged(manifest, outcomes)
    told = cells(found, outcomes, "answers")
    assert told["clean", "Coverage"]["n"] == N
    assert told["clean", "Coverage"]["norm"] == "linf"


def test_targets_are_averaged_in_the_tables_and_the_worst_in_the_worst_case() -> None:
    manifest, outcomes = hand()
    manifest["conditions"].pop()
    for target in (1, 4):
        manifest["conditions"].append(
            condition(f"aimed-{target}", attack="aimed", view="reject", target=target, **ASKED)
        )
        right = [3] * 5
        label = [7] * 5 + right if target == 1 else right + [7] * 5
        outcomes[f"aimed-{target}"] = graded(label, [], FALLING, target=[7] * N)
    (found,) = judged(manifest, outcomes)
    assert cells(found, outcomes, "answers")["aimed", "Accepted wrong"]["value"] == 50
    worst = cells(found, outcomes, "worst case")
    assert worst["adaptive (1), linf 0.1", "Accepted wrong"]["value"] == 100


def test_what_was_not_run_is_a_hole_and_worst_mode_has_a_worst_case_alone() -> None:
    manifest, outcomes = hand()
    del outcomes["blunt"]
    (found,) = judged(manifest, outcomes)
    assert cells(found, outcomes, "answers")["pgd", "Coverage"]["note"] == "not run"
    assert (
        cells(found, outcomes, "worst case")["every attack (2), linf 0.1", "Accepted wrong"]["bound"] == "≥"
    )
    manifest, outcomes = hand()
    one, other = manifest["conditions"][1:]
    one["job"] = other["job"] = "both"
    one["coordinates"]["view"], one["facts"]["exact"] = "reject", True
    for place, each in enumerate((one, other)):
        each["facts"]["member"] = {"label": f"m{place}", "place": place, "of": ["m0", "m1"]}
        outcomes["blunt"][f"forwards.m{place}"] = 1.0
    outcomes["both"] = outcomes["blunt"].assign(found_by=0)
    (found,) = judged(manifest, outcomes)
    alone = cells(found, outcomes, "answers")["pgd", "Coverage, of those that stood"]
    assert "worst mode knows no coverage" in alone["note"]
    assert [each.name for each in rejection.curves(found, outcomes.get)] == ["clean"]
    worst = cells(found, outcomes, "worst case")
    for row in ("every attack (2), linf 0.1", "adaptive (2), linf 0.1"):
        assert worst[row, "Accepted wrong"]["value"] == 40
        assert "worst mode knows no aurc" in worst[row, "AURC"]["note"]


def test_a_curve_is_the_mean_over_seeds_and_has_the_read_outs_own_point() -> None:
    manifest, outcomes = hand()
    first, second = rejection.curves(judged(manifest, outcomes)[0], outcomes.get)[:2]
    assert (first.name, second.name) == ("clean", "pgd (logits), linf 0.1")
    at = np.searchsorted(first.coverage, [0.1, 0.5, 1.0])
    assert first.risk[at] == pytest.approx([1, 1 / 5, 1 / 10])
    assert first.coverage[0] == pytest.approx(0.1)  # Below one of ten there is nothing.
    assert first.at == pytest.approx((0.9, 1 / 9))
    assert second.at == pytest.approx((0.4, 1))
    third = rejection.curves(judged(manifest, outcomes)[0], outcomes.get)[2]
    assert third.name == "margin (reject), linf 0.1, adaptive"
    manifest["conditions"].append(clean("again", seed=1, **ASKED))
    outcomes["again"] = graded([3] * N, [], FALLING, moved=False)
    first = rejection.curves(judged(manifest, outcomes)[0], outcomes.get)[0]
    assert first.risk[at] == pytest.approx([1 / 2, 1 / 10, 1 / 20])
    assert first.at is None  # In one seed nothing is refused.


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("rejection")
    tables = {"one": {"title": "One", "rows": ["defense", "readout"], "columns": {"PGD": {"attack": "pgd"}}}}
    tables["one"]["where"] = {"defense": "net", "view": "logits"}
    path = suite(
        folder,
        {"net": {"use": "toy/linear"}, "trapped": {"use": "toy/trapped"}},
        {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 5}},
        [
            {**TASK, "defenses": ["net"], "views": ["logits"], "readouts": ["plain"]},
            {**TASK, "defenses": ["trapped"], "views": ["logits", "reject"]},
        ],
        tables=tables,
    )
    made = Ran(path)
    assert not made.failed, made.failed
    (made.store.root / "manifest.json").write_text(json.dumps(made.plan.manifest()))
    return made


def test_the_command_writes_every_form(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def report(*words: object) -> tuple[int, str, str]:
        where = [str(ran.plan.suite.path), "--results", str(ran.store.root)]
        monkeypatch.setattr(sys, "argv", ["bench", "report", *where, "--rejection", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, _ = report()
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "trapped (reject), worst case" in out
    assert "digits, net" not in out
    told = json.loads(report("--format", "json")[1])
    (known,), cells = told["readouts"], told["tables"]
    assert known["readout"] == "digits, trapped (reject)"
    assert (known["refuses"], known["adaptive"]) == (True, ["pgd (reject)"])
    assert not known["follows_score"]  # Two pixels decide, and the score is the softmax's.
    curve = known["curves"][0]
    assert (curve["attack"], curve["coverage"][-1]) == ("clean", 1)
    (wrong,) = [
        each["value"]
        for each in cells[0]["cells"]
        if (each["attack"], each["column"]) == ("clean", "Accepted wrong")
    ]
    # Unmoved none of these is refused, so that the risk at full coverage is what is accepted and wrong.
    assert 100 * curve["risk"][-1] == pytest.approx(wrong, abs=1e-4)
    assert [each["table"].rpartition(", ")[2] for each in cells] == ["answers", "worst case", "scores"]
    lines = report("--format", "csv")[1].splitlines()
    assert lines[0].startswith("table,attack,view,norm,radius,column,value")
    assert len(lines) == 1 + sum(len(each["cells"]) for each in cells)
    assert "| pgd | reject | linf | 0.1 |" in report("--format", "markdown")[1]
    assert r"\begin{tabular}" in report("--format", "latex")[1]
    assert report("--out", tmp_path / "rejection.txt")[0] == 0
    assert (tmp_path / "rejection.txt").read_text() == out.rstrip("\n") + "\n"
    for form in ("svg", "png"):
        assert report("--format", form, "--out", tmp_path / f"one.{form}")[0] == 0
        assert report("--format", form, "--out", tmp_path / f"two.{form}")[0] == 0
        assert (tmp_path / f"one.{form}").read_bytes() == (tmp_path / f"two.{form}").read_bytes()
    assert "selective risk (%)" in (tmp_path / "one.svg").read_text()
    assert "digits, net (" in report("--table", "one")[1]
    code, _, err = report("--format", "svg")
    assert (code, "--out FILE" in err) == (2, True)
    code, _, err = report("--cost")
    assert (code, "reports of their own" in err) == (2, True)


def test_where_nothing_was_refused_it_says_what_to_ask_for(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = ran.plan.manifest()
    kept = [each for each in manifest["conditions"] if each["coordinates"]["defense"] == "net"]
    from bench.report import reports

    monkeypatch.setattr(reports, "read", lambda *_: {**manifest, "conditions": kept})
    where = [str(ran.plan.suite.path), "--results", str(ran.store.root)]
    monkeypatch.setattr(sys, "argv", ["bench", "report", *where, "--rejection"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "no read-out refused anything there; name a table" in capsys.readouterr().err

"""What attacks cost: passes that can be counted by hand, and the time that receipts say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cli
from bench.report import attack_cost
from bench.report.attack_cost import Cost
from bench.results.manifest import Outcomes
from suites import TASK, Ran, suite

ATTACKS = {
    "clean": {"use": "none"},
    "fgsm": {"use": "fgsm"},
    "pgd": {"use": "pgd", "steps": 5, "keep": "last", "drop": False},
    "some": {"use": "fgsm", "targets": [1, 4]},
    "spsa": {"use": "spsa-released", "steps": 3, "samples": 4},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("cost")
    tables = {
        "one": {"title": "One", "rows": ["defense", "readout"], "columns": {"FGSM": {"attack": "fgsm"}}}
    }
    path = suite(
        folder,
        {"net": {"use": "toy/linear"}},
        ATTACKS,
        [{**TASK, "views": ["scaled"], "seeds": [0, 1]}],
        tables=tables,
    )
    made = Ran(path)
    assert not made.failed
    return made


def costs(ran: Ran, **options: Any) -> dict[str, Cost]:
    manifest = ran.plan.manifest()
    found = attack_cost.spent(
        manifest, Outcomes(ran.store.root), lambda key: ran.store.receipt("evaluate", key), **options
    )
    return {each.at["attack"]: each for each in found}


def test_passes_are_those_of_each_image_and_target(ran: Ran) -> None:
    found = costs(ran)
    assert set(found) == {"fgsm", "pgd", "some", "spsa"}  # Doing nothing costs nothing.
    assert (found["fgsm"].forwards, found["fgsm"].most, found["fgsm"].backwards) == (1, 1, 1)
    assert (found["pgd"].forwards, found["pgd"].backwards) == (5, 5)
    assert (found["some"].forwards, found["some"].backwards) == (1, 1)
    assert (found["spsa"].forwards, found["spsa"].backwards) == (3 * 4 * 2, 0)
    # 60 images, two seeds, and for one attack two targets; both read-outs ask about the same crafts.
    assert {name: each.n for name, each in found.items()} == {
        "fgsm": 120,
        "pgd": 120,
        "some": 240,
        "spsa": 120,
    }
    assert next(iter(found)) == "spsa"  # The dearest first.


def test_seconds_are_those_of_the_crafts_of_each_attempt_once(ran: Ran) -> None:
    crafts = [job for job in ran.plan.graph() if job.kind == "craft"]
    pgd = [job for job in crafts if job.attack_run.attack.name == "pgd"]
    seconds = sum(ran.store.receipt("craft", job.key)["seconds"] for job in pgd)
    assert costs(ran)["pgd"].seconds == pytest.approx(seconds / 120, abs=1e-5)


def test_some_jobs_only_and_holes_are_left_out(ran: Ran) -> None:
    conditions = ran.plan.manifest()["conditions"]
    conditions = [each for each in conditions if each["coordinates"]["attack"] == "pgd"]
    assert set(costs(ran, jobs={conditions[0]["job"]})) == {"pgd"}
    found = attack_cost.spent(ran.plan.manifest(), lambda _: None, lambda _: None)
    assert found == []


def test_the_command_writes_every_form(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (ran.store.root / "manifest.json").write_text(json.dumps(ran.plan.manifest()))

    def report(*words: object) -> tuple[int, str, str]:
        where = [str(ran.plan.suite.path), "--results", str(ran.store.root)]
        monkeypatch.setattr(sys, "argv", ["bench", "report", *where, "--cost", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, _ = report()
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "pgd linf 0.1" in out
    records = json.loads(report("--format", "json")[1])
    assert {each["attack"]: each["forwards"] for each in records}["pgd"] == 5
    code, out, _ = report("--format", "csv", "--table", "one")
    assert [line.split(",")[4] for line in out.splitlines()] == ["attack", "fgsm"]
    assert "| digits | net | fgsm linf 0.1 |" in report("--format", "markdown")[1]
    assert report("--out", tmp_path / "cost.txt")[0] == 0
    assert "backward" in (tmp_path / "cost.txt").read_text()
    code, _, err = report("--format", "latex")
    assert (code, "costs are written as text, markdown, csv or json" in err) == (2, True)


def cost(use: str | None, forwards: float, backwards: float, **at: Any) -> Cost:
    n = at.pop("n", 20)
    place = {"data": "digits", "norm": "linf", "radius": 0.1, "defense": "net", "view": "scaled"}
    return Cost({**place, "attack": use, **at}, n, forwards, forwards, backwards, None, "cpu", use)


def test_a_quick_verdict_is_told_with_the_share_of_passes_that_it_took() -> None:
    whole = cost("autoattack", 8000, 1000, attack="last-word")
    found = attack_cost.fractions([whole, cost("fast-worst", 360, 190), cost("pgd", 40, 40)])
    said = (
        "fast-worst linf 0.1 on net (digits, scaled): 4.5 % of the forward and 19.0 % of the backward passes"
    )
    assert found == [f"{said} of last-word."]
    for form in ("text", "markdown"):
        out = attack_cost.written([whole, cost("fast-worst", 360, 190)], form)
        assert "4.5 % of the forward and 19.0 % of the backward passes" in " ".join(out.split())


@pytest.mark.parametrize("other", [{"defense": "else"}, {"radius": 0.2}, {"view": "plain"}, {"n": 30}])
def test_passes_over_other_images_or_networks_are_not_compared(other: dict[str, Any]) -> None:
    assert not attack_cost.fractions([cost("autoattack", 8000, 1000, **other), cost("fast-worst", 360, 190)])


def test_what_was_run_with_others_as_one_has_no_share() -> None:
    ran_as_one = cost(None, 8000, 1000, attack="autoattack")
    assert not attack_cost.fractions([ran_as_one, cost("fast-worst", 360, 190)])

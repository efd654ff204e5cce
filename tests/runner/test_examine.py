"""Trials and examinations as jobs: which are planned, what they leave, and that no number waits for them."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import called_by

from bench.api import fixing, packing, running, verifying
from bench.errors import InputError, OvertimeError
from bench.report import reports, tables
from bench.results import manifest as manifests
from bench.results import pack
from bench.results.manifest import Outcomes
from bench.results.store import Store
from bench.suite import planner, resolve
from bench.suite.jobs import Examination, Trial
from suites import TASK, Ran, suite

VIEWS = ["logits", None]

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
TABLE = {
    "title": "x",
    "rows": ["defense", "readout"],
    "where": {"view": VIEWS},
    "columns": {"PGD": {"attack": "pgd"}},
    "extra": ["Min", "Worst"],
}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 5}, "wrong": {"use": "toy/wrong-sign"}}


def written(folder: Path, **more: Any) -> Path:
    (folder / "mynet.py").write_text(NETWORK)
    defenses = {"net": {"use": "toy/linear"}, "own": {"use": "module", "build": "mynet:build"}}
    task = {**TASK, "attacks": list(ATTACKS)}
    return suite(folder, defenses, ATTACKS, [task], **{"doctor": "plugins", "tables": {"1": TABLE}, **more})


def checks(path: Path) -> dict[str, set[tuple[str, Any]]]:
    """Return the kinds of checks that are planned, by defense: trials by attack, examinations by depth."""
    found: dict[str, set[tuple[str, Any]]] = {}
    for each in planner.make(resolve.load(path)).conditions:
        for job in each.checks:
            told = job.attack.name if isinstance(job, Trial) else job.whole
            found.setdefault(str(each.coordinates["defense"]), set()).add((job.kind, told))
    return found


TRIALS = {("trial", "pgd"), ("trial", "toy/wrong-sign")}


def test_code_of_other_people_is_examined_whole_and_ours_is_looked_at(tmp_path: Path) -> None:
    # What tests register is of other people, too.
    assert checks(written(tmp_path))["own"] == {*TRIALS, ("examination", True)}
    ours = suite(tmp_path, {"cnn": {"use": "standard"}}, {"pgd": {"use": "pgd"}}, [TASK], doctor="plugins")
    assert checks(ours)["cnn"] == {("trial", "pgd"), ("examination", False)}


def test_all_or_none_are_examined_as_the_file_says(tmp_path: Path) -> None:
    ours = {"cnn": {"use": "standard"}}
    every = suite(tmp_path, ours, {"pgd": {"use": "pgd"}}, [TASK], doctor="all")
    assert checks(every)["cnn"] == {("trial", "pgd"), ("examination", True)}
    assert checks(written(tmp_path, doctor="none")) == {}
    with pytest.raises(InputError, match=r"suite.yaml:\d+: doctor: .*'some'"):
        resolve.load(written(tmp_path, doctor="some"))


def test_a_trial_is_shared_by_defenses_and_an_examination_by_attacks_and_seeds(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("tasks:\n- ", "tasks:\n- seeds: [3, 5]\n  "))
    plan = planner.make(resolve.load(path))
    jobs = [job for job in plan.graph() if isinstance(job, Trial | Examination)]
    assert sorted(job.kind for job in jobs) == ["examination"] * 3 + ["trial"] * 2
    assert {job.victim.train.seed for job in jobs if isinstance(job, Examination)} == {3}


def test_settings_threat_and_form_are_in_the_key_of_a_trial_and_no_label_is(tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        attack = {"use": "pgd", "steps": changes.pop("steps", 5)}
        task = {**TASK, "threat": {"norm": "linf", "radius": changes.pop("radius", 0.1)}, "views": ["logits"]}
        attacks = {changes.pop("label", "a"): attack}
        path = suite(tmp_path, {"d": {"use": "toy/linear"}}, attacks, [task], doctor="plugins")
        condition = planner.make(resolve.load(path)).conditions[0]
        found: str = condition.facts["trial"]
        return found

    assert key() == key(label="b")
    assert len({key(), key(steps=6), key(radius=0.2)}) == 3


def test_a_defense_is_examined_in_the_largest_ball_of_each_norm(tmp_path: Path) -> None:
    tasks = [
        {**TASK, "threat": {"norm": norm, "radius": radii}, "views": ["logits"], "readouts": ["plain"]}
        for norm, radii in (("linf", [0.01, 0.2, 0.1]), ("l2", [0.5]))
    ]
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd"}}
    path = suite(tmp_path, {"d": {"use": "toy/linear"}}, attacks, tasks, doctor="all")
    plan = planner.make(resolve.load(path))
    jobs = {job.key: job for job in plan.graph() if isinstance(job, Examination)}
    found = {
        (each.coordinates["norm"], each.coordinates["radius"]): jobs[each.facts["examinations"][0]].threat
        for each in plan.conditions
    }
    assert {at: (threat.norm, threat.radius) for at, threat in found.items()} == {
        **{("linf", radius): ("linf", 0.2) for radius in (0.01, 0.1, 0.2)},
        ("l2", 0.5): ("l2", 0.5),
    }


def test_worst_mode_tries_each_attack_by_itself(tmp_path: Path) -> None:
    path = written(tmp_path, worst=True)
    assert checks(path)["own"] == {*TRIALS, ("examination", True)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = Ran(written(tmp_path_factory.mktemp("examined")))
    assert not ran.failed, ran.failed[0].error
    return ran


def test_what_was_found_stands_in_receipts_and_whole_beside_them(done: Ran) -> None:
    outcomes = Outcomes(done.store.root)
    for each in done.plan.conditions:
        facts = each.facts
        if (key := facts.get("trial")) is not None:
            found = outcomes.found("trial", key)
            whole = json.loads(done.store.artefact("trial", key).read_text())
            assert found is not None
            assert found["worst"] == whole["worst"]
            assert (found["worst"] in ("doubt", "alarm")) == (each.coordinates["attack"] == "wrong")
            assert (found["crossed"] == 1) == (each.coordinates["attack"] == "pgd")
        examined = [outcomes.found("examination", key) for key in facts["examinations"]]
        assert [each is None for each in examined] == [False, True], "a whole one, and so no look"
    assert outcomes.found("trial", "0" * 32) is None


def test_a_damaged_finding_is_none_and_is_made_again(done: Ran, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.copytree(done.store.root, root)
    key = next(each.facts["trial"] for each in done.plan.conditions if "trial" in each.facts)
    (root / "trial" / key / "findings.json").write_text("{}")
    outcomes = Outcomes(root)
    assert outcomes.found("trial", key) is None
    assert outcomes.damaged_checks == {key: f"trial {key}: findings.json is cut short or altered"}
    again = Ran(done.plan.suite.path, root)
    assert [each.job.kind for each in again.done] == ["trial"]
    assert Outcomes(root).found("trial", key) is not None


def test_a_check_that_fails_costs_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("bench.runner.examine.try_attack", broken)
    monkeypatch.setattr("bench.runner.examine.examine", broken)
    ran = Ran(written(tmp_path))
    assert {each.job.kind for each in ran.failed} == {"trial", "examination"}
    outcomes = Outcomes(ran.store.root)
    assert all(outcomes(each.job.key) is not None for each in ran.plan.conditions)


def test_a_run_whose_checks_fail_has_all_its_numbers_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("bench.runner.examine.try_attack", broken)
    monkeypatch.chdir(tmp_path)
    bench = called_by(monkeypatch, capsys)
    found = bench("run", written(tmp_path).name, "--executor", "inline")
    assert found.code == 0
    assert "2 trials and examinations failed: the rows are without this evidence" in found.said
    assert "not run" not in found.said


def test_an_attack_that_hangs_where_it_is_tried_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.runner.examine.TRIAL_LIMIT", 0.01)
    monkeypatch.setattr("bench.runner.examine.try_attack", lambda *_, **__: time.sleep(60))
    ran = Ran(
        suite(tmp_path, {"d": {"use": "toy/linear"}}, {"pgd": {"use": "pgd"}}, [TASK], doctor="plugins")
    )
    (failed,) = [each for each in ran.failed if each.job.kind == "trial"]
    assert isinstance(failed.error, OvertimeError)


def test_what_was_found_is_among_what_a_table_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = called_by(monkeypatch, capsys)
    path = written(tmp_path)
    assert bench("run", path.name, "--executor", "inline").code == 0
    root = tmp_path / "results" / "suite"
    told = json.loads((root / "tables" / "table-1.manifest.json").read_text())
    stored = {(kind, each.name) for kind in ("trial", "examination") for each in (root / kind).iterdir()}
    # The other attack stands in no column.
    named = {(each["kind"], key) for key, each in told["checks"].items()}
    assert named < stored
    assert bench("verify", path.name).code == 0
    key = next(key for kind, key in named if kind == "trial")
    shutil.rmtree(root / "trial" / key)
    found = bench("verify", path.name)
    assert found.code == 4
    assert f"trial {key}, which it was made from, is not there now" in found.said


def test_show_tells_how_an_attack_fared_where_it_was_tried_and_the_row_s_grade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = called_by(monkeypatch, capsys)
    columns = {"PGD": {"attack": "pgd"}, "Wrong": {"attack": "wrong"}}
    path = written(tmp_path, tables={"1": {**TABLE, "columns": columns}})
    assert bench("run", path.name, "--executor", "inline").code == 0
    said = bench("show", path.name, "--row", "net, plain", "--column", "PGD").said
    assert "tried where the answer is known: 100% brought across a plane" in said
    assert "grade of the row: D; for a grade of C: mend what these alarms name" in said
    wrong = json.loads(bench("show", path.name, "--row", "net, plain", "--column", "Wrong", "--json").out)
    assert "trial" in {each["code"] for each in wrong["flags"]}
    assert wrong["conditions"][0]["trial"]["crossed"] == 0
    assert wrong["grade"] == "D"


def test_in_worst_mode_the_trial_of_every_member_counts(tmp_path: Path) -> None:
    ran = Ran(written(tmp_path, worst=True))
    assert not ran.failed
    outcomes = Outcomes(ran.store.root)
    table = {**TABLE, "columns": {"All": {}}, "where": {"view": ["logits"]}, "extra": []}
    manifest = {**ran.plan.manifest(), "tables": {"1": table}}
    for row in tables.cut(manifest, "1", outcomes, outcomes.found).rows:
        (cell,) = row.cells
        (flag,) = [each for each in cell.flags if each.code == "trial"]
        assert flag.message.startswith("wrong (logits): does-not-cross")


def test_findings_are_packed_read_and_verified(done: Ran, tmp_path: Path) -> None:
    root = kept(done, tmp_path / "suite")
    packing.packed(root)
    packed = pack.opened(root)
    kinds = sorted({packed.kind(key) for key in packed.keys})
    assert kinds == ["evaluate", "examination", "trial"]
    assert not any((root / kind).exists() for kind in kinds)
    before, after = Outcomes(done.store.root), Outcomes(root)
    for each in done.plan.conditions:
        for kind, key in [("trial", each.facts.get("trial")), ("examination", each.facts["examinations"][0])]:
            if key is not None:
                assert before.found(kind, key) == after.found(kind, key) is not None
    assert not Ran(done.plan.suite.path, root).done
    store = Store(root)
    store.discard("trial", next(key for key in packed.keys if packed.kind(key) == "trial"))
    assert [each.job.kind for each in Ran(done.plan.suite.path, root).done] == ["trial"]


def kept(done: Ran, root: Path) -> Path:
    """Return a copy of the results folder, with its manifest."""
    shutil.copytree(done.store.root, root)
    project = running.planned(done.plan.suite.path, root, None)
    manifests.write(project.store, project.manifest)
    return root


def test_a_check_that_was_deleted_is_missed_by_its_name(done: Ran, tmp_path: Path) -> None:
    root, path = kept(done, tmp_path / "suite"), done.plan.suite.path
    assert reports.reported(root, path, None).notes == []
    facts = next(each.facts for each in done.plan.conditions if each.coordinates["attack"] == "pgd")
    shutil.rmtree(root / "trial" / facts["trial"])
    (note,) = reports.reported(root, path, None).notes
    assert note.startswith(f"trial {facts['trial']} (of pgd) is not there: what it would find is not in the")
    assert "make it with: bench run " in note
    (root / "failed").mkdir()
    Store(root).failure_file(facts["trial"]).write_text("{}")
    (note,) = reports.reported(root, path, None).notes
    assert f"(of pgd) failed (see {root / 'failed'}" in note
    # One examination is all that each defense has; what nobody asked for is not missed.
    for each in (root / "examination").iterdir():
        shutil.rmtree(each)
    _, *notes = reports.reported(root, path, None).notes
    asked = {each.facts["examination"] for each in done.plan.conditions}
    assert len(notes) == len(asked)
    assert {each.split()[1] for each in notes} == asked
    assert all("(of net/" in each or "(of own/" in each for each in notes)


def test_where_nobody_asked_for_checks_none_is_missed(tmp_path: Path) -> None:
    ran = Ran(written(tmp_path, doctor="none"))
    assert all("examination" not in each.facts for each in ran.plan.conditions)
    root = kept(ran, tmp_path / "suite")
    assert reports.reported(root, ran.plan.suite.path, None).notes == []


def test_a_better_examination_than_the_one_that_was_asked_for_will_do(done: Ran, tmp_path: Path) -> None:
    root = kept(done, tmp_path / "suite")
    told = json.loads((root / "manifest.json").read_text())
    for each in told["conditions"]:
        each["facts"]["examination"] = each["facts"]["examinations"][1]
    manifests.write(Store(root), told)
    assert reports.reported(root, done.plan.suite.path, None).notes == []


@pytest.mark.parametrize("kind", ["trial", "examination"])
@pytest.mark.parametrize("named", [True, False], ids=["in the manifest", "in its line alone"])
def test_an_altered_check_of_a_pack_is_named_by_its_kind(
    done: Ran, tmp_path: Path, kind: str, named: bool
) -> None:
    root = kept(done, tmp_path / "suite")
    packing.packed(root)
    key = next(each for each in pack.opened(root).keys if pack.opened(root).kind(each) == kind)
    lines = (root / pack.RECEIPTS).read_text().splitlines()
    lines = [
        each.replace('"seconds": ', '"seconds": 1') if f'"key": "{key}"' in each[:60] else each
        for each in lines
    ]
    (root / pack.RECEIPTS).write_text("\n".join(lines) + "\n")
    if not named:
        (root / "manifest.json").write_text("{}")
    (wrong,) = [each for each in verifying.verified(root).wrong if key in each]
    assert wrong.startswith(f"{kind} {key}")
    assert "its line in receipts.jsonl is cut short or altered" in wrong
    if named:
        assert " (of " in wrong
        notes = reports.reported(root, done.plan.suite.path, None).notes
        assert any(each.startswith(f"{kind} {key}: ") for each in notes)


# --- what is added -----------------------------------------------------------------------------------


def added(folder: Path) -> running.Project:
    return running.planned(folder / "suite.yaml", folder / "results", None)


def test_what_a_row_lacks_is_added_once_and_counts_where_it_is_shown(tmp_path: Path) -> None:
    path = written(tmp_path)
    Ran(path)
    said = fixing.add(added(tmp_path))
    assert any(each.startswith("table 1, net, plain: ") and "doctor-square" in each for each in said), said
    told = yaml.safe_load((tmp_path / "results" / "added.yaml").read_text())
    project = added(tmp_path)
    extra = [each for each in project.plan.conditions if each.facts.get("added")]
    assert {each.coordinates["attack"] for each in extra} <= set(told["attacks"])
    assert all(len(each["threat"]["radius"]) == 1 for each in told["tasks"])
    # Asked again, nothing more is needed of what is planned already.
    fixing.add(project)
    assert yaml.safe_load((tmp_path / "results" / "added.yaml").read_text()) == told


def test_an_added_attack_is_in_min_and_worst_and_in_no_column(tmp_path: Path) -> None:
    path = written(tmp_path)
    Ran(path)
    fixing.add(added(tmp_path))
    project = added(tmp_path)
    work = running.Run(project, running.Options(_inline), None)
    work.do()
    (table,), _ = work.tables()
    assert list(table.columns) == ["PGD", "Min", "Worst"]
    assert "doctor-square (logits)" in table.added
    for row in table.rows:
        pgd, least, worst = (cell.estimate for cell in row.cells)
        assert pgd is not None
        assert least is not None
        assert worst is not None
        assert worst.value <= least.value <= pgd.value
        own, *over = (set(cell.jobs) for cell in row.cells)
        extra = {each.job.key for each in project.plan.conditions if each.facts.get("added")}
        assert all(own < jobs <= own | extra for jobs in over), "what is counted is named"
    root = tmp_path / "results"
    assert reports.reported(root, path, None).notes == []
    with (root / "added.yaml").open("a") as file:
        file.write("# By hand.\n")
    (said,) = reports.reported(root, path, None).notes
    assert re.search(r"added\.yaml changed since this was planned; .*: bench run ", said)


def _inline(context: Any, listener: Any) -> Any:
    from bench.runner.executors.inline import Inline

    return Inline(context, listener, "cpu")


def test_what_the_suite_does_not_ask_for_any_more_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path)
    Ran(path)
    fixing.add(added(tmp_path))
    assert added(tmp_path).plan.suite.added.tasks
    path.write_text(path.read_text().replace("radius: 0.1", "radius: 0.2"))
    left = added(tmp_path).plan
    assert not left.suite.added.tasks
    assert not any(each.facts.get("added") for each in left.conditions)


def test_what_was_added_stays_out_of_worst_mode(tmp_path: Path) -> None:
    Ran(written(tmp_path))
    fixing.add(added(tmp_path))
    plan = running.planned(tmp_path / "suite.yaml", tmp_path / "results", None, worst=True).plan
    members = {str(each.coordinates["attack"]) for each in plan.conditions if each.facts.get("member")}
    assert members == {"pgd", "wrong"}


def test_what_was_added_must_fit_the_suite(tmp_path: Path) -> None:
    path = written(tmp_path)
    place = tmp_path / "added.yaml"
    given = yaml.safe_load(path.read_text())
    task = {**given["tasks"][0], "defenses": ["net"], "attacks": ["pgd"]}
    place.write_text(yaml.safe_dump({"attacks": {"pgd": {"use": "pgd"}}, "tasks": [task]}))
    with pytest.raises(InputError, match=r"added.yaml:\d+: attacks.pgd: .* has an attack of this name"):
        resolve.extended(resolve.load(path), place)
    place.write_text("attacks: [")
    with pytest.raises(InputError, match=r"added.yaml: .*bench doctor .* --fix"):
        resolve.extended(resolve.load(path), place)
    place.write_text(yaml.safe_dump({"doctor": ["gone"]}))
    assert resolve.extended(resolve.load(path), place).added.doctor == []

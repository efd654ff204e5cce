"""What messages call jobs: by the labels of the suite, which enter no key."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.api import running
from bench.errors import InputError
from bench.report.firsthand import quiet
from bench.runner.estimates import Estimates
from bench.runner.outstanding import State
from bench.runner.progress import Display
from bench.runner.titles import defense_title, title, whole_title
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial
from bench.suite.planner import Plan
from suites import TASK, Ran, suite

MODULES = 25
NETS = "import torch\nfrom torch import nn\n\ndef build():\n    raise ValueError('no such weights')\n"
ATTACKS = {"clean": {"use": "none"}, "quick": {"use": "pgd", "steps": 2}, "long": {"use": "pgd", "steps": 9}}


def written(folder: Path, **more: Any) -> Path:
    """Write a suite of as many networks of one function as one asks for, none like another."""
    (folder / "nets.py").write_text(NETS)
    defenses = {
        f"net-{number}": {"use": "module", "build": "nets:build", "mean": number / 100, "std": 1.0}
        for number in range(MODULES)
    }
    return suite(folder, defenses, ATTACKS, [TASK], **more)


def made(path: Path) -> Plan:
    return planner.make(resolve.load(path))


def words(plan: Plan, kind: type[Job]) -> dict[str, list[str]]:
    """Return the titles of a plan's jobs of a kind, by the label of the defense."""
    found: dict[str, list[str]] = {}
    for each in plan.conditions:
        for job in (each.job.victim.train, *each.job.crafts, each.job, *each.checks):
            if isinstance(job, kind):
                found.setdefault(str(each.coordinates["defense"]), []).append(title(job))
    return found


@pytest.mark.parametrize("kind", [Train, Craft, Evaluate, Examination])
def test_a_title_names_the_defense_by_its_label(tmp_path: Path, kind: type[Job]) -> None:
    plan = made(written(tmp_path, doctor="all"))
    found = words(plan, kind)
    assert len(found) == MODULES
    for label, titles in found.items():
        # What shows a clean image looks at no network.
        looking = [each for each in titles if not each.startswith("clean [")]
        assert looking
        assert all(f" {label}/" in each or f" {label}, " in each for each in looking), titles
        assert not any("module" in each for each in titles)


def test_a_title_names_the_attack_by_its_label(tmp_path: Path) -> None:
    plan = made(written(tmp_path, doctor="all"))
    for each in plan.conditions:
        attack = str(each.coordinates["attack"])
        assert title(each.job).endswith(f" about {attack}")
        assert title(each.job.crafts[0]).startswith(f"{attack} ")
        assert [title(job) for job in each.checks if isinstance(job, Trial)] == (
            [] if attack == "clean" else [f"try {attack}, linf"]
        )


def test_attacks_that_run_as_one_are_all_named(tmp_path: Path) -> None:
    (plan,) = [made(written(tmp_path, worst=True))]
    crafted = {title(each.job.crafts[0]) for each in plan.conditions if each.facts.get("member")}
    assert "quick + long on net-3/logits [0:25]" in crafted


def test_labels_travel_to_other_processes_and_enter_no_key(tmp_path: Path) -> None:
    plan = made(written(tmp_path))
    before = [each.job.key for each in plan.conditions]
    path = tmp_path / "suite.yaml"
    path.write_text(path.read_text().replace("net-", "other-").replace("quick", "short"))
    renamed = made(path)
    assert [each.job.key for each in renamed.conditions] == before
    jobs = list(renamed.graph())
    assert [title(each) for each in pickle.loads(pickle.dumps(jobs))] == [title(each) for each in jobs]
    assert any("other-3" in title(each) for each in jobs)


def test_each_failure_of_a_kind_says_whose_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(written(tmp_path))
    assert len(ran.failed) == MODULES
    display = Display(None, State(todo=dict(ran.plan.graph())), Estimates(), ("cpu",), quiet)
    for done in ran.failed:
        display.ended(done)
        assert isinstance(done.error, InputError)
    said = [str(done.error) for done in ran.failed]
    for number in range(MODULES):
        assert sum(each.startswith(f"defense net-{number} (nets:build): ") for each in said) == 1
    mendable = running.Run.mendable(cast(Any, SimpleNamespace(failures=ran.failed)))
    assert {each.partition(": its code")[0] for each in mendable} == {
        f"train net-{number}, seed 0: defense net-{number} (nets:build)" for number in range(MODULES)
    }
    records = [json.loads(each.read_text()) for each in (ran.store.root / "failed").iterdir()]
    assert {each["job"]["title"] for each in records} == {
        f"train net-{number}, seed 0" for number in range(MODULES)
    }


def test_a_part_of_a_defense_has_its_own_label(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    defenses = {
        "base": {"use": "module", "build": "nets:build"},
        "guarded": {"use": "apinet", "base": "base", "epochs": 0},
    }
    plan = made(suite(tmp_path, defenses, ATTACKS, [{**TASK, "defenses": ["guarded"]}]))
    trains = {defense_title(job) for job in plan.graph() if isinstance(job, Train)}
    assert trains == {"defense base (nets:build)", "defense guarded"}


def test_a_whole_title_leads_to_the_files_of_a_job(tmp_path: Path) -> None:
    job = made(written(tmp_path)).conditions[0].job
    assert whole_title(job) == f"ask net-0/label about clean (evaluate {job.key[:8]})"


def test_the_costs_of_a_plan_are_listed_by_label(tmp_path: Path) -> None:
    project = running.planned(written(tmp_path), tmp_path / "results", None)
    found = running.costs(project, running.prospect(project, None))
    assert set(found["defense"]) == {f"net-{number}" for number in range(MODULES)}
    assert set(found["attack"]) == set(ATTACKS)

"""Rehearsals: what is measured before anything has run, in a worker, and what estimates make of it."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.api import running
from bench.runner import executors, rehearsal
from bench.runner.budget import Row
from bench.runner.context import WorkerContext, device_name
from bench.runner.estimates import Estimates
from bench.runner.executors.protocol import Asked
from bench.runner.rehearsal import Rehearsal, rehearsals, rehearse
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Evaluate, Train
from suites import TASK, suite

DEFENSES = {"cnn": {"use": "standard", "net": "b2", "width": 0.25, "epochs": 3, "batch": 16}}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 4}, "spsa": {"use": "spsa", "steps": 2}}
TABLE = {
    "title": "T",
    "rows": ["defense"],
    "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}, "SPSA": {"attack": "spsa"}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return suite(tmp_path, DEFENSES, ATTACKS, [{**TASK, "seeds": [0, 1]}], tables={"t": TABLE})


def asked(path: Path) -> tuple[planner.Plan, list[Rehearsal], WorkerContext]:
    plan = planner.make(resolve.load(path))
    # Enough on a busy machine, where torch loads parts of itself for seconds.
    questions = [replace(each, limit=300.0) for each in rehearsals(plan.graph())]
    return plan, questions, WorkerContext(path.parent / "r", path.parent, None, "cpu", {})


def test_each_network_is_rehearsed_once_whatever_its_seeds(path: Path) -> None:
    plan, questions, context = asked(path)
    (question,) = questions
    assert {run.attack.name for run in question.runs} == {"pgd", "spsa"}
    answer = rehearse(question, context)
    assert answer["device"] == device_name("cpu")
    assert answer["runs"].keys() == {run.key for run in question.runs}
    assert answer["readouts"].keys() == set(question.readouts)
    assert all(each > 0 for each in (answer["train"], *answer["runs"].values(), *answer["readouts"].values()))
    costs = Estimates()
    costs.rehearse(question, answer)
    for job in plan.graph():
        assert costs.rehearsed(job)
        if isinstance(job, Train):
            assert costs.seconds(job) == pytest.approx(answer["train"])
        elif isinstance(job, Craft) and job.attack_run.attack.name == "pgd":
            of = next(run for run in question.runs if run.attack.name == "pgd")
            assert costs.seconds(job) == pytest.approx((job.stop - job.start) * 4 * answer["runs"][of.key])


def test_a_training_s_time_is_that_of_its_steps_times_their_number(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves by a second at each look, a step takes one and the whole is known."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(rehearsal, "_now", lambda device: float(next(ticks)))
    monkeypatch.setattr(rehearsal, "SPAN", 5.0)
    _, (question,), context = asked(path)
    found = rehearse(question, context)
    steps = -(-question.train.data.count // 16)
    # Two looks beside the epoch: before the fit and after it.
    assert found["train"] == pytest.approx(3 * steps, rel=0.05)


def test_a_network_that_fails_is_left_to_its_jobs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def build():\n    raise ValueError('no')\n")
    path = suite(tmp_path, {"net": {"use": "module", "build": "own:build"}}, ATTACKS, [TASK])
    plan, (question,), context = asked(path)
    assert rehearse(question, context) == {"device": device_name("cpu"), "runs": {}, "readouts": {}}
    costs = Estimates()
    costs.rehearse(question, rehearse(question, context))
    assert all(costs.seconds(job) > 0 for job in plan.graph())


def test_a_rehearsal_that_takes_too_long_ends_at_its_limit_and_its_process_lives(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import time\nfrom torch import nn\n"
        "class Slow(nn.Module):\n"
        "    def forward(self, x):\n        time.sleep(60)\n        return x.flatten(1)[:, :10]\n"
    )
    path = suite(tmp_path, {"net": {"use": "module", "build": "own:Slow"}}, ATTACKS, [TASK])
    project = running.planned(path, tmp_path / "r", None)
    project.store.open()
    (question,) = rehearsals(project.plan.graph())
    options = running.Options(executors.ready("process", Asked(["cpu"], 1)))
    with running._started(options.start, running._context(project, options), lambda *_: None) as pool:
        for _ in range(2):
            answer = pool.submit(0, replace(question, limit=0.3)).result(timeout=100)
            assert answer == {"device": device_name("cpu"), "runs": {}, "readouts": {}}


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_plan_says_what_it_costs_and_when_it_ends(path: Path, executor: Any) -> None:
    project = running.planned(path, path.parent / "r", None)
    project.store.open()
    options = running.Options(executors.ready(executor, Asked(["cpu"], 1)))
    found = running.prospect(project, None, options)
    assert set(found.devices) == {device_name("cpu")}
    assert found.seconds is not None
    # One slot does one job after the other.
    assert found.end == pytest.approx(found.seconds)
    costs = running.costs(project, found)
    assert costs["table"] == {"t": pytest.approx(found.seconds)}
    assert costs["defense"].keys() == {"cnn"}
    assert costs["attack"].keys() == {"clean", "pgd", "spsa"}
    crafted = {job for job in found.state.todo if isinstance(job, Craft) and job.attack_run.source is None}
    shared = sum(map(found.estimates.seconds, crafted))
    assert sum(costs["defense"].values()) + shared == pytest.approx(found.seconds)
    trained = sum(found.estimates.seconds(job) for job in found.state.todo if isinstance(job, Train))
    assert sum(costs["attack"].values()) + trained == pytest.approx(found.seconds)
    out = io.StringIO()
    running.show_plan(Console(file=out, width=200), project, found)
    said = out.getvalue()
    for words in ("of device time", f"on 1 x {device_name('cpu')}", "device-seconds", "spsa"):
        assert words in said
    # Nothing was done.
    assert not (path.parent / "r" / "train").exists()


def test_a_budget_takes_the_first_seed_and_names_the_second(path: Path) -> None:
    project = running.planned(path, path.parent / "r", None)
    project.store.open()
    rows = running.rows_of(project, ["t"])
    assert [(row.table, row.name, row.seed, len(row.evaluations)) for row in rows] == [
        ("t", "cnn", 0, 3),
        ("t", "cnn", 1, 3),
    ]
    options = running.Options(executors.ready("inline", Asked(["cpu"], 1)))
    whole = running.prospect(project, None, options)
    assert whole.seconds is not None
    assert running.affordable(project, None, running.prospect(project, None, options), 1e6).left == ()
    nothing = running.affordable(project, None, running.prospect(project, None, options), 1e-6)
    assert not nothing.wanted
    assert "no row fits" in nothing.left[-1]
    first: Row = rows[0]
    assert all(isinstance(each, Evaluate) for each in first.evaluations)
    work = running.Run(project, options, wanted={each.key for each in first.evaluations})
    work.do()
    assert not work.failures
    killed = running.kills(project)
    assert killed is not None
    assert killed.keys() == {each.job.key for each in project.plan.conditions}
    assert all(0 <= each <= 60 for each in killed.values())

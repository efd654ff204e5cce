"""How long jobs take: learned from receipts, guessed from parameters, longest way first."""

from pathlib import Path
from typing import Any

import pytest

from bench.runner.estimates import Estimates, examples, passes
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Train
from bench.suite.planner import Plan
from suites import TASK, suite


def planned(folder: Path) -> Plan:
    defenses = {"linear": {"use": "toy/linear"}}
    attacks = {"pgd": {"use": "pgd", "steps": 10}, "spsa": {"use": "spsa", "steps": 5, "samples": 16}}
    return planner.make(resolve.load(suite(folder, defenses, attacks, [{**TASK, "views": ["logits"]}])))


def crafts(of: Plan, name: str) -> list[Craft]:
    return [job for job in of.graph() if isinstance(job, Craft) and job.attack_run.attack.name == name]


def test_what_was_measured_is_expected_again_for_as_much_work(tmp_path: Path) -> None:
    costs = Estimates()
    assert not costs.informed
    first, *others = sorted(crafts(planned(tmp_path), "pgd"), key=lambda job: job.start)
    costs.learn(first, {"seconds": 5.0})
    for job in others:
        assert costs.seconds(job) == 5.0 * examples(job) / examples(first)


def test_an_attack_that_was_never_seen_is_judged_by_its_passes(tmp_path: Path) -> None:
    crossed = planned(tmp_path)
    pgd, spsa = crafts(crossed, "pgd")[0], crafts(crossed, "spsa")[0]
    assert (passes(pgd), passes(spsa)) == (10, 1 + 5 * (2 * 16 + 1))
    costs = Estimates()
    costs.learn(pgd, {"seconds": 1.0})
    assert costs.seconds(spsa) == 16.6 * examples(spsa) / examples(pgd)


@pytest.mark.parametrize(
    ("params", "said"),
    [({}, 100), ({"queries": 7}, 14), ({"queries": 7, "rounds": 3}, 21), ({"rounds": 0}, 1)],
)
def test_an_attack_tells_its_passes_whatever_its_parameters_are_called(
    params: dict[str, int], said: int, tmp_path: Path
) -> None:
    attacks = {"it": {"use": "toy/queries", **params}}
    task = {**TASK, "views": ["logits"]}
    crossed = planner.make(resolve.load(suite(tmp_path, {"linear": {"use": "toy/linear"}}, attacks, [task])))
    assert {passes(job) for job in crafts(crossed, "toy/queries")} == {said}


def test_a_training_s_passes_are_those_of_its_inner_attack_too(tmp_path: Path) -> None:
    def trained(**inner: Any) -> int:
        defenses = {"cnn": {"use": "cnn", "epochs": 3, "inner": inner}}
        path = suite(tmp_path, defenses, {"clean": {"use": "none"}}, [TASK])
        (job,) = [each for each in planner.make(resolve.load(path)).graph() if isinstance(each, Train)]
        return passes(job)

    assert trained(use="pgd", steps=7) == 3 * (1 + 7)
    assert trained(use="pgd", steps=7, restarts=2) == 3 * (1 + 14)
    assert trained(use="toy/queries", queries=5) == 3 * (1 + 10)


def test_another_attack_on_the_same_defense_tells_more_than_the_same_one_elsewhere(tmp_path: Path) -> None:
    defenses = {"linear": {"use": "toy/linear"}, "opaque": {"use": "toy/opaque"}}
    attacks = {"pgd": {"use": "pgd", "steps": 10}, "cw": {"use": "cw-l2", "steps": 10, "searches": 3}}
    task = {**TASK, "defenses": ["linear", "opaque"], "threat": {"norm": "l2", "radius": 1}}
    crossed = planner.make(resolve.load(suite(tmp_path, defenses, attacks, [{**task, "views": ["logits"]}])))
    on = {
        job.attack_run.source.train.defense.name: job
        for job in crafts(crossed, "pgd")
        if job.attack_run.source
    }
    (cw,) = [job for job in crafts(crossed, "cw-l2") if job.start == 0][:1]
    assert (len(on), passes(cw)) == (2, 1 + 2 * 3 * 11)
    assert cw.attack_run.source is not None
    costs = Estimates()
    for name, job in on.items():
        costs.learn(job, {"seconds": 1.0 if name == cw.attack_run.source.train.defense.name else 99.0})
    seen = on[cw.attack_run.source.train.defense.name]
    assert costs.seconds(cw) == 6.7 * examples(cw) / examples(seen)

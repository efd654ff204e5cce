"""The time left, by a clock that jumps over real receipts (`receipts.json` says where they are from)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.runner.estimates import Estimates
from bench.runner.placement import Step, length, simulate
from bench.runner.rehearsal import rehearsals, sight
from bench.suite import planner, resolve
from bench.suite.jobs import Job, Train
from bench.suite.planner import Plan

ROOT = Path(__file__).parents[2]
RECEIPTS = json.loads((Path(__file__).parent / "receipts.json").read_text())
SUITES = ("tasks.yaml", "suites/mnist.yaml")
DEVICES: dict[str, tuple[float, ...]] = {
    "one": (1.0,),
    "two": (1.0, 1.0),
    "four": (1.0, 1.0, 1.0, 1.0),
    "unequal": (1.0, 3.0, 3.0),
    "very unequal": (1.0, 2.0, 4.0, 8.0),
}
"""The speed of each slot; receipts and rehearsals are divided by it."""


def names(plan: Plan) -> dict[Job, str]:
    """Return what a job is called in the receipts: coordinates, so that no version of anything matters."""
    found: dict[Job, str] = {}
    for each in plan.conditions:
        at = " ".join(f"{name}={value}" for name, value in each.coordinates.items() if value is not None)
        found.setdefault(each.job, at)
        for craft in each.job.crafts:
            found.setdefault(craft, f"{at} [{craft.start}:{craft.stop}]")
        label, seed = each.coordinates["defense"], each.coordinates["seed"]
        found.setdefault(each.job.victim.train, f"train {label}, seed {seed}")
    for job in plan.graph():
        if isinstance(job, Train):
            found.setdefault(job, f"train {job.defense.name}, seed {job.seed}")
    return found


@dataclass
class Recorded:
    """A suite's jobs with the seconds that they took."""

    graph: dict[Job, tuple[Job, ...]]
    seconds: dict[Job, float]
    rehearsals: dict[str, Any]
    names: dict[Job, str]

    def informed(self, speeds: tuple[float, ...]) -> Estimates:
        """Return estimates that know the rehearsals, on each kind of device."""
        found = Estimates()
        for question in rehearsals(self.graph):
            # A network that is not in the suite any more, or was not then, was not rehearsed.
            told: dict[str, Any] = self.rehearsals.get(self.names[question.train]) or {
                "train": None,
                "runs": {},
                "readouts": {},
            }
            for speed in dict.fromkeys(speeds):
                runs = {run.key: told["runs"].get(sight(run)) for run in question.runs}
                answer = {
                    "device": str(speed),
                    "train": told["train"] and told["train"] / speed,
                    "runs": {key: each / speed for key, each in runs.items() if each},
                    "readouts": {name: each / speed for name, each in told["readouts"].items()},
                }
                found.rehearse(question, answer)
        return found


@pytest.fixture(scope="module", params=SUITES)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    plan = planner.make(resolve.load(ROOT / request.param))
    called, receipts = names(plan), RECEIPTS[request.param]
    graph = plan.graph()
    # Trials and examinations came after the recorded runs: they have no name there.
    known = {job: needs for job, needs in graph.items() if called.get(job) in receipts["seconds"]}
    # Else the suite has changed so much that runs of it must be recorded anew.
    assert len(known) >= 0.9 * len(receipts["seconds"])
    seconds = {job: receipts["seconds"][called[job]] for job in known}
    return Recorded(known, seconds, receipts["rehearsals"], called)


def at(steps: list[Step[Job]], share: float) -> float:
    """Return when so much of the work was done."""
    whole = share * sum(step.ended - step.begun for step in steps)
    low, high = 0.0, max(step.ended for step in steps)
    for _ in range(60):
        now = (low + high) / 2
        done = sum(min(step.ended, now) - step.begun for step in steps if step.begun < now)
        low, high = (now, high) if done < whole else (low, now)
    return high


def told(recorded: Recorded, steps: list[Step[Job]], speeds: tuple[float, ...], now: float) -> float:
    """Return the time left that a run would show, which knows what had ended and which epochs were done."""
    costs = recorded.informed(speeds)
    ended = {step.job for step in steps if step.ended <= now}
    for step in steps:
        if step.job in ended:
            receipt = {"seconds": step.ended - step.begun, "device": str(speeds[step.slot])}
            costs.learn(step.job, receipt)
    running = {step.slot: (step.job, now - step.begun) for step in steps if step.begun <= now < step.ended}
    for step in steps:
        if isinstance(step.job, Train) and running.get(step.slot, (None,))[0] == step.job:
            epochs, took = max(int(step.job.defense.params.get("epochs") or 1), 1), step.ended - step.begun
            if done := int(epochs * (now - step.begun) / took):
                costs.progress(step.job, str(speeds[step.slot]), took * done / epochs, done / epochs)
    rest = {job: needs for job, needs in recorded.graph.items() if job not in ended}
    return length(rest, costs, [str(speed) for speed in speeds], running)


def ran(recorded: Recorded, speeds: tuple[float, ...]) -> list[Step[Job]]:
    """Return a run whose placement knows rehearsals first, and then receipts."""
    costs, steps = recorded.informed(speeds), []
    devices = [str(speed) for speed in speeds]
    for step in simulate(
        recorded.graph, costs, devices, lambda job, speed: recorded.seconds[job] / float(speed)
    ):
        costs.learn(step.job, {"seconds": step.ended - step.begun, "device": devices[step.slot]})
        steps.append(step)
    assert {step.job for step in steps} == recorded.graph.keys()
    return steps


@pytest.mark.parametrize("devices", DEVICES)
def test_after_a_tenth_of_the_work_the_time_left_is_within_one_and_a_half(
    recorded: Recorded, devices: str
) -> None:
    speeds = DEVICES[devices]
    steps = ran(recorded, speeds)
    now, end = at(steps, 0.1), max(step.ended for step in steps)
    assert 1 / 1.5 <= told(recorded, steps, speeds, now) / (end - now) <= 1.5


def test_an_end_that_was_expected_from_full_knowledge_is_the_end(recorded: Recorded) -> None:
    costs = Estimates()
    for job, seconds in recorded.seconds.items():
        costs.progress(job, "1.0", seconds, 1.0)
    steps = list(simulate(recorded.graph, costs, ["1.0"] * 2, lambda job, _: recorded.seconds[job]))
    assert length(recorded.graph, costs, ["1.0"] * 2) == pytest.approx(max(step.ended for step in steps))

"""What a run says of its numbers, and of how far it is, while it works."""

import io
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from bench.api import running
from bench.report.firsthand import Numbers
from bench.report.tables import cut, unexamined
from bench.results.conditions import conditions_of
from bench.results.manifest import Outcomes
from bench.runner import pace, progress
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.executors.inline import ready
from bench.runner.executors.protocol import Asked
from bench.runner.outstanding import State
from bench.runner.pace import Pace
from bench.runner.progress import Display
from bench.suite.jobs import Craft, Evaluate
from suites import TASK, Ran, suite

NET: dict[str, Any] = {"net": {"use": "standard", "net": "b2", "epochs": 1, "batch": 30, "augment": False}}
ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "pgd": {"use": "pgd", "steps": 2},
    "deepfool": {"use": "deepfool"},
}
TASKS: list[dict[str, Any]] = [
    {**TASK, "attacks": ["pgd", "clean"]},
    {"data": "digits", "threat": {"norm": "l2"}, "attacks": ["deepfool", "clean"]},
]
TABLES: dict[str, Any] = {
    "t": {
        "title": "T",
        "rows": ["defense"],
        "columns": {
            "Clean": {"attack": "clean", "norm": "linf", "radius": 0.1},
            "PGD": {"attack": "pgd"},
            "DeepFool": {"attack": "deepfool", "metric": "distance"},
        },
    }
}


def test_each_number_is_that_of_a_table_and_is_said_at_once(tmp_path: Path) -> None:
    path = suite(tmp_path, NET, ATTACKS, TASKS, tables=TABLES)
    project = running.planned(path, tmp_path / "results", None)
    out = io.StringIO()
    options = running.Options(ready(Asked()), console=Console(file=out, width=60))
    run = running.Run(project, options)
    run.do()
    assert not run.failures
    lines = [line for line in out.getvalue().splitlines() if " n 60" in line]
    # Clean numbers come before any attack has ended, though pgd stands first in the file.
    order = [line.split()[1].partition("/")[0] for line in lines]
    assert order[0] == "clean"
    assert order.index("clean") < order.index("pgd")
    table = cut(project.manifest, "t", Outcomes(project.store.root), unexamined)
    told = {name: next(line for line in lines if f" {name}" in line) for name in ("clean", "pgd", "deepfool")}
    for name, cell, scale in zip(told, table.rows[0].cells, (100, 100, 1), strict=True):
        assert cell.estimate is not None
        form = ".1f" if scale == 100 else ".3g"
        value, low, high = (
            f"{scale * each:{form}}" for each in (cell.estimate.value, cell.estimate.low, cell.estimate.high)
        )
        what, unit = ("accuracy", "%") if scale == 100 else ("median distance", "")
        assert f"{what} {value}{unit} [{low}–{high}], n 60" in told[name]  # noqa: RUF001 - as tables write it


def test_what_needs_the_clean_images_says_so_until_they_are_judged(tmp_path: Path) -> None:
    path = suite(tmp_path, NET, ATTACKS, TASKS[1:])
    ran = Ran(path)
    conditions = conditions_of(json.loads(json.dumps(ran.plan.manifest())))
    (key,) = {each.job for each in conditions if each.attack == "deepfool"}

    def without(job: str) -> Any:
        return Outcomes(ran.store.root)(job) if job == key else None

    (waiting,) = Numbers(conditions, without).of(key)
    assert "waits for the clean images" in waiting.text
    (known,) = Numbers(conditions, Outcomes(ran.store.root)).of(key)
    assert "median distance" in known.text
    assert Numbers(conditions, lambda _: None).of(key) == []
    # Where no task asks about them, a least distance is read at no radius, as in a table.
    ran = Ran(suite(tmp_path, NET, ATTACKS, [{**TASKS[1], "attacks": ["deepfool"]}]))
    (alone,) = conditions_of(json.loads(json.dumps(ran.plan.manifest())))
    at = replace(alone, coordinates={**alone.coordinates, "radius": 0.5})
    (read,) = Numbers([at], Outcomes(ran.store.root)).of(alone.job)
    assert read.text == "judged; its accuracy needs the clean images, which no task asks about"


# --- how far -----------------------------------------------------------------------------------------


def test_an_attack_tells_its_passes_as_the_referee_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "EVERY", 0.0)
    ran = Ran(suite(tmp_path, NET, {"pgd": {"use": "pgd", "steps": 7, "drop": False}}, [TASK]))
    assert not ran.failed
    told = [each for each in ran.said if each.get("unit") == "passes"]
    shards = [each for each in ran.plan.graph() if isinstance(each, Craft)]
    for shard in shards:
        asked = ran.store.receipt("craft", shard.key)
        assert asked is not None
        most = shard.attack_run.attack.entry.passes(shard.attack_run.attack.params)
        assert {"done": asked["queries_per_example"]["forwards"], "of": most, "unit": "passes"} in told
    done = [each["done"] for each in told]
    assert sum(one <= other for one, other in pairwise(done)) >= len(done) - len(shards)


def test_passes_are_told_every_few_seconds_and_no_more() -> None:
    now, told = 0.0, []
    paced = Pace(told.append, 10, 40, lambda: now)
    for _ in range(120):
        now += 0.5
        paced(5)
    assert [each["done"] for each in told] == [5.0 * count for count in range(1, 13)]
    assert {each["of"] for each in told} == {40}


class Work:
    """A job that has nothing but a key."""

    key = "k"


def shown_at(seconds: float, spent: float, said: dict[str, Any] | None = None) -> tuple[Display, Any, str]:
    """Return a display whose one job was to take some seconds and has taken others, and what it says."""
    out = io.StringIO()
    job = cast(Any, Work())
    costs = cast(
        Estimates,
        SimpleNamespace(
            informed=True,
            learned=1,
            rehearsed=lambda _: True,
            seconds=lambda *_: seconds,
            progress=lambda *told: given.append(told),
        ),
    )
    given: list[Any] = []
    display = Display(Console(file=out, width=60), State(todo={job: ()}), costs, ("cpu",), lambda _: [])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "title", lambda _: "pgd on net [0:60]")
        display.started(job, 0)
        display._now[0].begun = time.monotonic() - spent
        if said is not None:
            display.said(0, said)
        with display:
            time.sleep(1.3)
    return display, given, out.getvalue()


PASSES = {"done": 12.4, "of": 40, "unit": "passes"}


def test_what_takes_longer_than_twice_its_guess_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 1e9)
    _, given, out = shown_at(20.0, 50.0, PASSES)
    assert out.count("longer than expected (about 20 s)") == 1
    assert "12 of at most 40 passes" in out
    # From now on its own pace tells more than the guess: 12.4 of 40 in 50 s.
    ((_, where, spent, share),) = given
    assert (where, share) == (device_name("cpu"), 0.31)
    assert spent == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize(("seconds", "spent"), [(20.0, 35.0), (0.5, 3.0)], ids=["not yet", "too short"])
def test_what_is_hardly_late_says_nothing(
    seconds: float, spent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 1e9)
    assert shown_at(seconds, spent)[2] == ""


def test_before_its_time_is_up_the_passes_change_no_guess() -> None:
    """They are at most so many: an attack that is done with most examples early asks fewer."""
    assert shown_at(100.0, 50.0, PASSES)[1] == []


def test_a_heartbeat_in_a_pipe_says_how_far_and_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.HEARTBEAT == 60.0
    monkeypatch.setattr(progress, "HEARTBEAT", 0.5)
    _, _, out = shown_at(100.0, 30.0, PASSES)
    (line,) = set(out.splitlines())
    assert line.startswith("at work: pgd on net [0:60] (3")
    assert "12 of at most 40 passes" in line
    assert "left" in line


def test_a_number_stands_above_the_bars_of_a_terminal(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, NET, {"clean": {"use": "none"}}, [TASK]))
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    numbers = Numbers(conditions_of(ran.plan.manifest()), ran.store.outcomes)
    todo: Any = dict(ran.plan.graph())
    with Display(console, State(todo=todo), Estimates(), ("cpu",), numbers.of) as display:
        for done in ran.done:
            display.ended(done)
    assert sum(isinstance(each, Evaluate) for each in todo) == 1
    assert "clean on net/label" in out.getvalue()
    assert "accuracy" in out.getvalue()

"""What the author of an attack or a defense declares is asked carefully: faults are told in a sentence."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import InputError
from bench.registry import ATTACKS, DEFENSES, AttackEntry
from bench.runner.estimates import Estimates
from bench.suite import planner, resolve
from suites import TASK, suite


def planned(folder: Path) -> planner.Plan:
    path = suite(
        folder,
        {"linear": {"use": "toy/linear"}},
        {"it": {"use": "toy/queries"}},
        [{**TASK, "views": ["logits"], "readouts": ["plain"]}],
    )
    return planner.make(resolve.load(path))


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("gone")


def declared(monkeypatch: pytest.MonkeyPatch, **hooks: Any) -> AttackEntry:
    entry = replace(ATTACKS["toy/queries"], **hooks)
    monkeypatch.setitem(ATTACKS._entries, "toy/queries", entry)
    return entry


COST = "returned {}; expected a whole number from 0 to 1e+15"


@pytest.mark.parametrize(
    ("hook", "function", "what"),
    [
        ("cost", lambda **_: "many", COST.format("'many'")),
        ("cost", lambda **_: None, COST.format("None")),
        ("cost", lambda **_: 10**400, COST.format("a whole number of 1329 bits")),
        ("cost", lambda **_: -1, COST.format("-1")),
        ("cost", lambda **_: float("nan"), COST.format("nan")),
        ("cost", lambda **_: float("inf"), COST.format("inf")),
        ("cost", lambda **_: True, COST.format("True")),
        ("cost", broken, "raised KeyError: 'gone'"),
        ("cost", lambda: 1, "raised TypeError: "),
        ("flags", broken, "raised KeyError: 'gone'"),
        ("flags", lambda threat, **_: 3, "returned 3, and neither a sentence nor None"),
        ("unfit", broken, "raised KeyError: 'gone'"),
        ("check_params", broken, "raised KeyError: 'gone'"),
        ("check_params", lambda params, shape: "too few", "returned 'too few', and must raise InputError"),
    ],
)
def test_a_hook_of_an_attack_that_fails_is_told_with_its_place(
    hook: str, function: Callable[..., Any], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared(monkeypatch, **{hook: function})
    sentence = rf"toys\.py:\d+: attack 'toy/queries': its {hook} {re.escape(what)}"
    with pytest.raises(InputError, match=sentence):
        planned(tmp_path)


@pytest.mark.parametrize(
    ("hook", "what"), [("flags", "KeyError"), ("check_params", "KeyError"), ("random", "KeyError")]
)
def test_a_hook_of_a_defense_that_fails_is_told_with_its_place(
    hook: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooks: dict[str, Any] = {hook: broken}
    monkeypatch.setitem(DEFENSES._entries, "toy/linear", replace(DEFENSES["toy/linear"], **hooks))
    with pytest.raises(InputError, match=rf"toys\.py:\d+: defense 'toy/linear': its {hook} raised {what}"):
        planned(tmp_path)


@pytest.mark.parametrize("told", [0, 7, np.int64(7)])
def test_a_cost_that_is_a_whole_number_is_taken(
    told: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared(monkeypatch, cost=lambda **_: told)
    graph = planned(tmp_path).graph()
    assert all(Estimates().seconds(job) > 0 for job in graph)


def test_counts_of_any_size_make_an_estimate() -> None:
    entry = replace(ATTACKS["toy/queries"], cost=None)
    assert entry.passes({"steps": 10**400}) == 10**15
    assert entry.passes({"steps": 3, "restarts": 2}) == 6


def test_a_hook_that_says_nothing_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    declared(
        monkeypatch,
        flags=lambda threat, **_: threat.radius > 1 and "too far",
        check_params=lambda params, shape: True,
    )
    assert planned(tmp_path).conditions[0].facts["flags"] == []

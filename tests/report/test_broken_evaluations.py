"""Broken evaluations are flagged in the table that prints their numbers, and sound ones are not."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import planted
import pytest
from published_nets import weights

from bench.report import tables
from bench.report.checks import LEVELS
from bench.report.tables import unexamined
from bench.results.outcomes import Stored
from suites import TASK, Ran, suite

ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "fgsm": {"use": "fgsm"},
    "pgd": {"use": "pgd", "steps": 40},
}
"""What most people run."""

FULL: dict[str, Any] = {
    **ATTACKS,
    "margin": {"use": "pgd", "steps": 40, "loss": "margin"},
    "apgd": {"use": "apgd", "steps": 40, "loss": "dlr"},
    "square": {"use": "square", "queries": 300},
}

PLANTS = {
    "view of another network": "view-differs",
    "rolled view": "view-differs",
    "detector that the view lacks": "view-differs",
    "refuses everything": "refuses-clean",
    "batch statistics": "answers-differ",
    "noise by place": "answers-differ",
    "wrong sign": "margin-grew",
    "one-hot": "flat-gradient",
    "permuted labels": "at-chance",
    "not finite": "not-finite",
    "probabilities": "probabilities",
    "whole numbers": "ties",
}


def cut(path: Path, attacks: Iterable[str], table: dict[str, Any] | None = None) -> tables.RenderedTable:
    """Run a suite, and cut a table with a column for each attack."""
    ran = Ran(path)
    assert not ran.failed, ran.failed[0].error

    def stored(key: str) -> Stored | None:
        file = ran.store.artefact("evaluate", key)
        return Stored.of(file) if file.exists() else None

    asked = {"title": "x", "rows": ["defense"], "columns": {each: {"attack": each} for each in attacks}}
    manifest = {**ran.plan.manifest(), "tables": {"T": {**asked, **(table or {})}}}
    return tables.cut(manifest, "T", stored, unexamined)


def flags(table: tables.RenderedTable, *levels: str) -> dict[str, set[str]]:
    """Return the codes of the flags of these levels in each column, those of the row among them."""
    (row,) = table.rows
    return {
        heading: {flag.code for flag in (*row.flags, *cell.flags) if flag.level in levels}
        for heading, cell in zip(table.columns, row.cells, strict=True)
    }


@pytest.mark.parametrize("plant", PLANTS)
def test_a_defense_that_is_not_what_it_seems_is_flagged_beside_its_number(plant: str, tmp_path: Path) -> None:
    defenses = {"d": {"use": "toy/planted", "plant": plant}}
    task = {**TASK, "defenses": ["d"], "attacks": list(ATTACKS), "views": ["logits"]}
    table = cut(suite(tmp_path, defenses, ATTACKS, [task]), ATTACKS, {"extra": ["Min"]})
    found = flags(table, "doubt", "alarm")
    assert PLANTS[plant] in found["fgsm"] | found["pgd"], found
    assert PLANTS[plant] in found["Min"], "what is said of its columns is said of the least of them"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("toy/random-start", "no-gradient-asked"),
        ("toy/wrong-sign", "margin-grew"),
        ("toy/first-ten", "no-gradient-asked"),
        ("toy/l2-radius", "lost-successes"),
        ("toy/wrong-already", "no-gradient-asked"),
        ("toy/last-restart", "lost-successes"),
    ],
)
def test_an_attack_that_does_not_attack_is_flagged_without_another_beside_it(
    name: str, code: str, tmp_path: Path
) -> None:
    attacks = {"clean": {"use": "none"}, "own": {"use": name}}
    task = {**TASK, "defenses": ["d"], "attacks": list(attacks), "views": ["logits"]}
    table = cut(suite(tmp_path, {"d": {"use": "toy/planted"}}, attacks, [task]), attacks)
    assert code in flags(table, "doubt", "alarm")["own"]


def test_a_defense_that_is_scored_on_what_it_was_fitted_on(tmp_path: Path) -> None:
    defenses = {"d": {"use": "toy/planted", "epochs": 2}}
    task = {**TASK, "defenses": ["d"], "attacks": ["clean"]}
    path = suite(tmp_path, defenses, {"clean": {"use": "none"}}, [task])
    assert flags(cut(path, ["clean"]), "alarm")["clean"] == set()
    path.write_text(path.read_text().replace("split: test", "split: train"))
    assert flags(cut(path, ["clean"]), "alarm")["clean"] == {"fitted-on-scored"}


def test_a_transfer_from_the_victim_s_own_weights_under_another_name(tmp_path: Path) -> None:
    """The file that only one of them names makes another training, and the same network."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{number / 10}")
    means = [f"{number}.txt" for number in range(10)]
    defenses = {
        "d": {"use": "toy/files", "means": means},
        "again": {"use": "toy/files", "means": means, "one": "0.txt"},
        "other": {"use": "toy/files", "means": means[::-1]},
    }
    attacks = {
        name: {"use": "pgd", "steps": 3, "source": {"defense": name, "view": "logits"}}
        for name in ("again", "other")
    }
    task = {**TASK, "defenses": ["d"], "attacks": list(attacks)}
    table = cut(suite(tmp_path, defenses, attacks, [task]), attacks)
    found = flags(table, "note")
    assert "source-is-victim" in found["again"]
    assert "source-is-victim" not in found["other"]


@pytest.mark.parametrize("robust", [False, True])
def test_a_sound_evaluation_raises_nothing_above_a_note(robust: bool, tmp_path: Path) -> None:
    defenses = {"d": {"use": "toy/planted", "robust": robust, "epochs": 20}}
    task = {**TASK, "defenses": ["d"], "attacks": list(FULL), "views": ["logits"]}
    table = cut(suite(tmp_path, defenses, FULL, [task]), FULL)
    (cells,) = (row.cells for row in table.rows)
    assert cells[0].estimate is not None
    assert cells[0].estimate.value > 0.85
    found = flags(table, *LEVELS[1:])
    assert not any(found.values()), found


@pytest.mark.parametrize(("name", "radius"), [("mnist-adv-a", 0.2), ("mnist-certified-0.1", 0.1)])
def test_sound_networks_of_other_people_raise_nothing_above_a_note(
    name: str, radius: float, tmp_path: Path
) -> None:
    defenses = {"d": {"use": "toy/published", "weights": str(weights(name))}}
    data = {"mnist": {"name": "mnist", "split": "test"}}
    threat = {"norm": "linf", "radius": radius}
    task = {"data": "mnist", "limit": 100, "threat": threat, "attacks": list(FULL), "views": ["logits"]}
    found = flags(cut(suite(tmp_path, defenses, FULL, [task], data=data), FULL), *LEVELS[1:])
    assert not any(found.values()), found


def test_all_planted_attacks_are_tried() -> None:
    tried = test_an_attack_that_does_not_attack_is_flagged_without_another_beside_it.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in tried} == set(planted.ATTACKS)

"""The papers' suites: what they plan at full size, and that every table of them runs in miniature."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bench.api import running
from bench.report import render, tables
from bench.report.tables import unexamined
from bench.results.manifest import Outcomes
from suites import Ran

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "suites"
NAMES = ("sdim", "apinet", "breakdgm")

LITTLE: dict[str, dict[str, Any]] = {
    "standard": {"width": 0.05, "epochs": 1, "batch": 32},
    "madry": {"width": 0.05, "epochs": 1, "batch": 32},
    "trades": {"width": 0.05, "epochs": 1, "batch": 32, "steps": 1},
    # Every class needs an image that is right, so that it has a threshold: small, but trained.
    "sdim": {
        "width": 0.12, "epochs": 30, "batch": 8, "lr": 0.005, "n": 1, "augment": False,
        "covariance": "diagonal", "margin": "code", "scale_loss": True,
    },
    "sdim-twin": {"width": 0.06, "epochs": 1, "batch": 32, "n": 1},
    "apinet": {"epochs": 1, "batch": 32, "inner_steps": 1},
    "defensegan": {
        "width": 0.02, "net_width": 0.1, "latent": 4, "iterations": 1, "critic_steps": 1, "batch": 8,
        "classifier_epochs": 1, "restarts": 1, "steps": 2,
    },
    "abs": {"width": 0.05, "epochs": 1, "batch": 8, "grid": 8, "steps": 2},
}  # fmt: skip
"""What makes a defense small enough for a test: its form stays, its numbers mean nothing."""

FEW = {"steps": 1, "restarts": 1, "samples": 2, "searches": 1, "rounds": 1, "directions": 1, "starts": 2}
"""The same for an attack."""


def small(document: Mapping[str, Any], photographs: int) -> dict[str, Any]:
    """Return a suite with the same defenses, attacks, tasks and tables, on a few digits.

    `photographs` is the side of what stands for CIFAR-10 and SVHN.
    """
    data: dict[str, Any] = {}
    for name, given in document["data"].items():
        kept = {key: given[key] for key in ("only", "order", "size") if key in given and "only" in given}
        side = given.get("resize") or {"mnist": 28, "fashion-mnist": 28}.get(given["name"], photographs)
        colours = {"channels": 3} if given["name"] in ("cifar10", "svhn") else {}
        data[name] = {"name": "digits", "resize": side, "shard": 4, **colours, **kept}
        data[f"{name}-few"] = {"name": "digits", "split": "train", "resize": side, "size": 40, **colours}
    defenses = {name: _less(given, LITTLE[given["use"]]) for name, given in document["defenses"].items()}
    attacks = {
        name: given if "planned" in given else _less(given, FEW)
        for name, given in document["attacks"].items()
    }
    tasks = [
        {**task, "fit": f"{task['data']}-few", "limit": 1 if "first" in task["data"] else 3}
        for task in document["tasks"]
    ]
    return {
        "data": data,
        "defenses": defenses,
        "attacks": attacks,
        "tasks": tasks,
        "tables": document["tables"],
    }


def _less(given: Mapping[str, Any], less: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(given)
    for name, value in less.items():
        if name in given and not (name == "epochs" and given[name] == 0):
            kept[name] = value
    # What need not be written has its default otherwise.
    if given["use"] in LITTLE:
        kept |= {name: value for name, value in less.items() if name not in ("epochs", "steps")}
    if "inner" in given:
        kept["inner"] = _less(given["inner"], FEW)
    return kept


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the plans and manifests of the suites, made where no data are."""
    folder = tmp_path_factory.mktemp("no data here")
    return {name: running.planned(SUITES / f"{name}.yaml", folder / name, folder) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_a_paper_is_planned_without_its_data(name: str, planned: dict[str, Any]) -> None:
    plan, manifest = planned[name].plan, planned[name].manifest
    keys = {
        "sdim": {"1", "2", "3", "4", "5", "6", "7", "9", "fig4", "fig5"},
        "apinet": {"1", "2", "3", "4", "5", "fig2-cifar", "fig2-svhn", "fig3-cifar", "fig3-svhn"},
        "breakdgm": {"fig1", "D"},
    }
    assert keys[name] <= set(manifest["tables"])
    known = {cell.job.key for cell in plan.conditions}
    for key in manifest["tables"]:
        assert tables.jobs(manifest, key) <= known
        # Every cell has a condition or a reason, or nobody asks for it.
        rendered = tables.cut(manifest, key, lambda _: None, unexamined)
        assert {each.hole for row in rendered.rows for each in row.cells} <= {"not run", "–"}  # noqa: RUF001


@pytest.mark.parametrize("name", NAMES)
def test_what_is_skipped_says_why(name: str, planned: dict[str, Any]) -> None:
    manifest = planned[name].manifest
    reasons = {skip["reason"] for skip in manifest["skips"]}
    missing = {attack: given["use"] for attack, given in manifest["attacks"].items() if given.get("planned")}
    for attack, use in missing.items():
        own = [skip["reason"] for skip in manifest["skips"] if skip["coordinates"]["attack"] == attack]
        assert own, attack
        assert all(each.startswith(f"{use} is planned: it comes with") for each in own)
    others = {each for each in reasons if "is planned" not in each}
    assert others <= {"the source is its own victim"} | {
        f"sdim{twin} has no read-out {readout!r}" for twin, readout in (("", "label"), ("-twin", "plain"))
    }


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_stand_where_the_paper_has_the_row(name: str, planned: dict[str, Any]) -> None:
    manifest = planned[name].manifest
    compared = {key for key, table in manifest["tables"].items() if table["published"]}
    expected = {"sdim": set("12345679"), "apinet": set("12345"), "breakdgm": set()}
    assert compared == expected[name]
    for key in compared:
        rendered = tables.cut(manifest, key, lambda _: None, unexamined)
        quotes = [quote for row in rendered.rows for quote in row.published if quote is not None]
        assert quotes
        # What the paper calls otherwise would be missing in silence.
        unknown = {row.label for row in rendered.rows if not any(row.published)}
        own = {"Trades (its own recipe)", "FashionMNIST (augmented)", "CIFAR-10 (scaled)", "SVHN (scaled)"}
        assert {label for (label,) in unknown} <= own


def test_the_first_image_shares_the_training_of_its_data_set(planned: dict[str, Any]) -> None:
    plan = planned["sdim"].plan
    trainings = {
        cell.job.victim.train.key
        for cell in plan.conditions
        if cell.coordinates["defense"] == "sdim-10" and "mnist" in cell.coordinates["data"]
    }
    # On MNIST, and on Fashion-MNIST where MNIST is what lies outside.
    assert len(trainings) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_runs_and_every_table_is_printed(name: str, tmp_path: Path) -> None:
    document = yaml.safe_load((SUITES / f"{name}.yaml").read_text())
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(small(document, 8 if name == "apinet" else 32), sort_keys=False))
    ran = Ran(path)
    assert [str(each.error) for each in ran.failed] == []
    # So that a paper's numbers are set beside ours, as they would be.
    manifest = {**ran.plan.manifest(), "data": document["data"]}
    for key, table in document["tables"].items():
        outcomes = Outcomes(ran.store.root)
        rendered = tables.cut(manifest, str(key), outcomes, outcomes.found)
        cells = [cell for row in rendered.rows for cell in row.cells]
        assert not [each for each in cells if each.hole == "not run"]
        Console(file=io.StringIO(), width=80).print(render.to_text(rendered))
        for form in ("markdown", "csv", "latex", "json"):
            assert render.joined([rendered], form)
        if "figure" in table:
            render.draw(rendered, tmp_path / "figure.svg")
    numbers = {"sdim": ("1", "Parameters"), "apinet": ("1", "PGD-40"), "breakdgm": ("released", "PGD")}
    key, heading = numbers[name]
    outcomes = Outcomes(ran.store.root)
    rendered = tables.cut(manifest, key, outcomes, outcomes.found)
    assert all(row.cells[rendered.columns.index(heading)].estimate is not None for row in rendered.rows)

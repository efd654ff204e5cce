"""Keys: every field of every job changes them, or is declared not to; labels never do."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.data import spec as datasets
from bench.data.spec import DataSpec
from bench.protocols import Shape, Threat
from bench.registry import discover
from bench.suite import planner, resolve
from bench.suite.jobs import (
    SCHEME,
    AttackRun,
    Craft,
    Data,
    Evaluate,
    Examination,
    FittedDefense,
    Keyed,
    Starts,
    Train,
    Trial,
    key_of,
)
from bench.suite.planner import Plan
from bench.suite.resolve import Resolved
from bench.suite.schema import ViewUse

DATA: dict[str, Any] = {"digits": {"name": "digits", "split": "test", "size": 60, "shard": 25}}
DEFENSES: dict[str, Any] = {
    "linear": {"use": "toy/linear", "epochs": 1, "inference": {"threshold": [0.3, 0.4]}},
    "other": {"use": "toy/linear", "epochs": 2},
    "top": {"use": "toy/stacked", "base": "linear"},
}
ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "pgd": {"use": "pgd", "steps": 3, "targets": "next", "time_limit": 5},
    "transfer": {"use": "pgd", "steps": 3, "source": {"defense": "other", "view": "logits"}},
}
TASKS: list[dict[str, Any]] = [
    {"data": "digits", "threat": {"norm": "linf", "radius": ["1/10", 0.2]}, "views": ["logits"]},
    {
        "data": "digits",
        "fit": "digits",
        "threat": {"norm": "l2", "radius": 1},
        "defenses": ["top"],
        "attacks": ["pgd"],
        "views": [{"use": "logits", "draws": 2}],
        "seeds": [1],
    },
]
TABLES: dict[str, Any] = {"t": {"title": "T", "rows": ["defense"], "columns": ["attack"]}}


def made(folder: Path, **changes: Any) -> Plan:
    path = folder / "suite.yaml"
    suite = {"data": DATA, "defenses": DEFENSES, "attacks": ATTACKS, "tasks": TASKS, "tables": TABLES}
    path.write_text(yaml.safe_dump({**suite, **changes}, sort_keys=False))
    return planner.make(resolve.load(path))


def keys(plan: Plan) -> set[str]:
    return {job.key for job in plan.graph()}


# Every field ---------------------------------------------------------------------------------------


def retold(resolved: Resolved[Any], **identity: Any) -> Resolved[Any]:
    return replace(resolved, identity={**resolved.identity, **identity})


Change = Callable[[Any], Any]

CHANGES: dict[type[Keyed], dict[str, list[Change]]] = {
    Data: {
        "spec": [lambda job: job.spec.model_copy(update={"size": 59})],
        "digest": [lambda job: "0" * 64],
        "shape": [lambda job: Shape(3, 8, 8, 10)],
        "count": [lambda job: job.count + 1],
    },
    Train: {
        "defense": [
            lambda job: retold(job.defense, use="another"),
            lambda job: retold(job.defense, version=job.defense.identity["version"] + 1),
            lambda job: retold(job.defense, params={**job.defense.identity["params"], "scale": 2.0}),
        ],
        "data": [lambda job: replace(job.data, digest="0" * 64)],
        "seed": [lambda job: job.seed + 1],
        "parts": [
            lambda job: (),
            lambda job: tuple(("another", part) for _, part in job.parts),
            lambda job: tuple((name, replace(part, seed=part.seed + 1)) for name, part in job.parts),
        ],
    },
    FittedDefense: {
        "train": [lambda job: replace(job.train, seed=job.train.seed + 1)],
        "inference": [lambda job: (), lambda job: (("threshold", 0.9),), lambda job: (("another", 0.3),)],
    },
    AttackRun: {
        "attack": [
            lambda job: retold(job.attack, use="another"),
            lambda job: retold(job.attack, version=job.attack.identity["version"] + 1),
            lambda job: retold(job.attack, library="torchattacks==3.5.1"),
            lambda job: retold(job.attack, params={**job.attack.identity["params"], "steps": 4}),
        ],
        "threat": [
            lambda job: Threat("l2", job.threat.radius),
            lambda job: Threat(job.threat.norm, 2 * job.threat.radius),
            lambda job: Threat(job.threat.norm, float("inf")),
            # Nothing is rounded: an experiment in the third digit, or the last, is another one.
            lambda job: Threat(job.threat.norm, job.threat.radius + 1e-3),
            lambda job: Threat(job.threat.norm, job.threat.radius + 1e-12),
        ],
        "data": [lambda job: replace(job.data, digest="0" * 64)],
        "seed": [lambda job: job.seed + 1],
        "source": [
            lambda job: None,
            lambda job: replace(job.source, inference=(("threshold", 0.9),)),
            lambda job: replace(job.source, train=replace(job.source.train, seed=7)),
        ],
        "view": [
            lambda job: None,
            lambda job: ViewUse(use="code"),
            lambda job: ViewUse(use="logits", temperature=0.5),
            lambda job: ViewUse(use="logits", draws=2),
        ],
        "exact": [lambda job: not job.exact],
        "target": [lambda job: None, lambda job: 2, lambda job: "random"],
        "time_limit": [lambda job: None, lambda job: 6.0],
        "precision": [lambda job: "bf16-search"],
        "starts": [lambda job: None, lambda job: replace(job.starts, digest="1" * 64)],
    },
    Craft: {
        "attack_run": [lambda job: replace(job.attack_run, seed=job.attack_run.seed + 1)],
        "start": [lambda job: job.start + 1],
        "stop": [lambda job: job.stop + 1],
    },
    Evaluate: {
        "victim": [lambda job: replace(job.victim, inference=(("threshold", 0.9),))],
        "crafts": [lambda job: job.crafts[:-1], lambda job: job.crafts[::-1]],
        "readout": [lambda job: "another"],
        "draws": [lambda job: 2, lambda job: 20],
    },
    Trial: {
        "attack": [
            lambda job: retold(job.attack, use="another"),
            lambda job: retold(job.attack, version=job.attack.identity["version"] + 1),
            lambda job: retold(job.attack, params={**job.attack.identity["params"], "steps": 4}),
        ],
        "threat": [
            lambda job: Threat("l2", job.threat.radius),
            lambda job: Threat(job.threat.norm, 2 * job.threat.radius),
            lambda job: Threat(job.threat.norm, float("inf")),
        ],
        "shape": [lambda job: Shape(3, 8, 8, 10), lambda job: Shape(1, 8, 8, 9)],
    },
    Examination: {
        "victim": [lambda job: replace(job.victim, inference=(("threshold", 0.9),))],
        "readout": [lambda job: "another"],
        "data": [lambda job: replace(job.data, digest="0" * 64)],
        "threat": [
            lambda job: Threat("l2", job.threat.radius),
            lambda job: Threat(job.threat.norm, 2 * job.threat.radius),
        ],
        "views": [lambda job: (), lambda job: (ViewUse(use="logits", temperature=0.5),)],
        "whole": [lambda job: not job.whole],
    },
}
"""For each field of a job, other values that it may have."""

OUTSIDE = {
    # The digest covers them: `test_every_field_of_a_data_set_changes_its_digest`.
    (Data, "spec"),
    (Data, "shape"),
    (Data, "count"),
    # A shard is complete or absent: no result depends on how long it might have taken.
    (AttackRun, "time_limit"),
}
"""Fields that change no key, and why."""


STARTS = Starts(Path("robustness/replay.safetensors"), "0" * 32, "0" * 64)


def test_where_stored_images_lie_enters_no_key(tmp_path: Path) -> None:
    job = example(AttackRun, tmp_path)
    assert isinstance(job, AttackRun)
    moved = Starts(Path("elsewhere.safetensors"), "1" * 32, STARTS.digest)
    assert replace(job, starts=moved).key == job.key


def example(kind: type[Keyed], folder: Path) -> Keyed:
    """Return a job whose fields all say something: it has parts, a source that is served, a target."""
    cells = made(folder).conditions
    evaluate = next(
        cell.job
        for cell in cells
        if (cell.coordinates["defense"], cell.coordinates["attack"], cell.coordinates["seed"])
        == ("linear", "pgd", 0)
        and cell.job.victim.inference
    )
    top = next(cell.job.victim.train for cell in cells if cell.coordinates["defense"] == "top")
    craft = evaluate.crafts[0]
    found: dict[type[Keyed], Keyed] = {
        Data: top.data,
        Train: top,
        FittedDefense: evaluate.victim,
        AttackRun: replace(craft.attack_run, source=evaluate.victim, starts=STARTS),
        Craft: craft,
        Evaluate: evaluate,
        Trial: Trial(craft.attack_run.attack, craft.attack_run.threat, top.data.shape),
        Examination: Examination(
            evaluate.victim,
            evaluate.readout,
            top.data,
            craft.attack_run.threat,
            (ViewUse(use="logits"),),
            whole=False,
        ),
    }
    return found[kind]


def test_every_kind_of_job_is_looked_at() -> None:
    assert set(CHANGES) == set(Keyed.__subclasses__())


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_every_field_of_a_job_changes_its_key(kind: type[Any], tmp_path: Path) -> None:
    assert set(CHANGES[kind]) == {each.name for each in fields(kind)}, "a new field, or one that is gone"
    job = example(kind, tmp_path)
    for field, changes in CHANGES[kind].items():
        found = {job.key}
        for number, change in enumerate(changes):
            value = change(job)
            assert value != getattr(job, field), f"{field}: change {number} changes nothing"
            found.add(replace(job, **{field: value}).key)  # type: ignore[type-var]
        assert len(found) == (1 if (kind, field) in OUTSIDE else 1 + len(changes)), field


def test_jobs_of_two_kinds_never_share_a_key(tmp_path: Path) -> None:
    identity = example(Craft, tmp_path).identity
    kinds = [kind.__name__.lower() for kind in CHANGES]
    assert len({key_of({"scheme": SCHEME, "kind": kind, **identity}) for kind in kinds}) == len(kinds)
    for kind in CHANGES:
        job = example(kind, tmp_path)
        assert job.key == key_of({"scheme": SCHEME, "kind": kind.__name__.lower(), **job.identity})


SPECS: dict[str, list[dict[str, Any]]] = {
    "name": [{"name": "mnist"}],
    "split": [{"split": "train"}],
    "size": [{"size": 30}, {"size": None, "only": None}],
    "only": [{"only": None}, {"only": [1]}],
    "order": [{"order": "published"}],
    "resize": [{"resize": 16}, {"resize": 8}],
    "channels": [{"channels": 3}],
    "shard": [{"shard": 7}],
    "shorter": [{"shorter": 6}, {"shorter": 7}],
    "crop": [{"crop": 6}, {"crop": 7}],
    "interpolation": [
        {"shorter": 6, "interpolation": "bilinear"},
        {"shorter": 6, "interpolation": "bicubic"},
    ],
}

OUTSIDE_OF_DATA = {"shard"}  # How the work is cut; crafts have their slices in their keys.


def test_every_field_of_a_data_set_changes_its_digest() -> None:
    discover()
    assert set(SPECS) == set(DataSpec.model_fields)
    base = {"name": "digits", "split": "test", "size": 20, "only": [1, 2]}
    for field, changes in SPECS.items():
        found = [datasets.digest(DataSpec.model_validate({**base, **each})) for each in ({}, *changes)]
        assert len(set(found)) == (1 if field in OUTSIDE_OF_DATA else len(found)), field


# Parts and radii through a suite ----------------------------------------------------------------------


def trained(plan: Plan, use: str) -> Train:
    (job,) = {job for job in plan.graph() if isinstance(job, Train) and job.defense.name == use}
    return job


def test_a_training_s_key_holds_the_content_of_its_parts(tmp_path: Path) -> None:
    def top(**base: Any) -> Train:
        defenses = {"base": {"use": "toy/linear", **base}, "top": {"use": "toy/stacked", "base": "base"}}
        task = {**TASKS[0], "defenses": ["top"]}
        plan = made(tmp_path, defenses=defenses, attacks={"clean": {"use": "none"}}, tasks=[task])
        return trained(plan, "toy/stacked")

    assert top(epochs=1).defense.identity == top(epochs=2).defense.identity
    assert top(epochs=1).key != top(epochs=2).key
    assert top(epochs=1).key == top(epochs=1).key


@pytest.mark.parametrize("radius", [0.101, 0.1001, 0.1 + 1e-15])
def test_a_radius_enters_keys_as_it_is(radius: float, tmp_path: Path) -> None:
    def crafts(radius: float) -> set[str]:
        tasks = [{**TASKS[0], "attacks": ["pgd"], "threat": {"norm": "linf", "radius": radius}}]
        return {job.key for job in made(tmp_path, tasks=tasks).graph() if isinstance(job, Craft | Evaluate)}

    assert crafts(radius).isdisjoint(crafts(0.1))
    assert crafts(0.1) == crafts(0.1)


# Labels -----------------------------------------------------------------------------------------------


def relabelled(value: Any, names: dict[str, str]) -> Any:
    """Return a suite's part with every label renamed, as a key of a mapping and as a value."""
    if isinstance(value, dict):
        return {names.get(key, key): relabelled(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [relabelled(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_no_label_of_a_task_file_enters_a_key(tmp_path: Path) -> None:
    suite = {"data": DATA, "defenses": DEFENSES, "attacks": ATTACKS, "tasks": TASKS}
    # None of these is the name of anything registered but the data set's, whose own name is no label.
    names = {label: f"my {label}" for label in ("linear", "other", "top", "clean", "transfer")}
    changed = relabelled(suite, names)
    changed["attacks"] = {
        "mine" if name == "pgd" else name: each for name, each in changed["attacks"].items()
    }
    changed["data"] = {"numbers": DATA["digits"]}
    for task in changed["tasks"]:
        task["data"] = "numbers"
        task |= {"fit": "numbers"} if "fit" in task else {}
        task |= {"attacks": ["mine"]} if "attacks" in task else {}
    changed["tables"] = {"renamed": {**TABLES["t"], "title": "Another"}}
    assert "my linear" in json.dumps(changed["defenses"]["my top"])
    before, after = made(tmp_path), made(tmp_path, **changed)
    assert {cell.coordinates["defense"] for cell in after.conditions} == {"my linear", "my other", "my top"}
    assert [cell.job.key for cell in after.conditions] == [cell.job.key for cell in before.conditions]
    assert keys(after) == keys(before)


def test_a_part_under_another_label_is_not_trained_again(tmp_path: Path) -> None:
    twice = {**DEFENSES, "same": DEFENSES["linear"], "twin": {"use": "toy/stacked", "base": "same"}}
    assert keys(made(tmp_path, defenses=twice, tasks=TASKS[:1])) == keys(made(tmp_path, tasks=TASKS[:1]))

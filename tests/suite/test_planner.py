"""Cells, jobs and keys: what is shared, what is skipped, what a name depends on."""

import hashlib
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import InputError
from bench.protocols import Shape
from bench.results import manifest
from bench.results.conditions import conditions_of, skips_of
from bench.results.store import Store
from bench.suite import planner, resolve
from bench.suite.jobs import SCHEME, Craft, Evaluate, Train, key_of
from bench.suite.planner import Plan, Planner, Point, Request, Sight
from bench.suite.resolve import Resolved
from bench.suite.schema import ViewUse

BASE: dict[str, Any] = {
    "data": {"digits": {"name": "digits", "split": "test", "shard": 120}},
    "defenses": {"cnn": {"use": "cnn", "epochs": 1}, "cnnf": {"use": "cnnf", "epochs": 1, "cycles": 2}},
    "attacks": {
        "clean": {"use": "none"},
        "pgd": {"use": "pgd", "steps": 3},
        "transfer": {"use": "pgd", "steps": 3, "source": {"defense": "cnn", "view": "first"}},
    },
    "tasks": [
        {
            "data": "digits",
            "threat": {"norm": "linf", "radius": "1/10"},
            "views": ["first", "e2e_{readout}"],
        }
    ],
}


def made(folder: Path, **changes: Any) -> Plan:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return planner.make(resolve.load(path))


def jobs(plan: Plan, kind: type) -> list[Any]:
    return [job for job in plan.graph() if isinstance(job, kind)]


def crafts(plan: Plan, **coordinates: Any) -> set[str]:
    return {
        craft.key
        for cell in plan.conditions
        if all(cell.coordinates[name] == value for name, value in coordinates.items())
        for craft in cell.job.crafts
    }


def test_pgd_on_first_is_crafted_once_for_both_readouts(tmp_path: Path) -> None:
    plan = made(tmp_path)
    last = crafts(plan, defense="cnnf", attack="pgd", view="first", readout="last")
    average = crafts(plan, defense="cnnf", attack="pgd", view="first", readout="avg")
    assert last == average
    assert len(last) == 3  # 360 images in shards of 120


def test_a_feed_forward_nets_e2e_is_its_first(tmp_path: Path) -> None:
    plan = made(tmp_path)
    assert crafts(plan, defense="cnn", attack="pgd", view="first") == crafts(
        plan, defense="cnn", attack="pgd", view="e2e_last"
    )


def test_a_views_parameters_do_not_reach_an_alias(tmp_path: Path) -> None:
    views = ["first", {"use": "bpda", "temperature": 0.2}]
    plan = made(tmp_path, tasks=[{**BASE["tasks"][0], "views": views, "attacks": ["pgd"]}])
    seen = {(cell.coordinates["defense"], cell.coordinates["view"]) for cell in plan.conditions}
    assert ("cnnf", "bpda(temperature=0.2)") in seen
    assert crafts(plan, defense="cnn", view="bpda(temperature=0.2)") == crafts(
        plan, defense="cnn", view="first"
    )


def test_an_attack_may_stop_early_only_where_winning_is_winning(tmp_path: Path) -> None:
    plan = made(tmp_path)
    exact = {
        (cell.coordinates["defense"], cell.coordinates["view"], cell.coordinates["readout"]): cell.facts[
            "exact"
        ]
        for cell in plan.conditions
        if cell.coordinates["attack"] == "pgd"
    }
    assert exact["cnn", "first", "last"]
    assert not exact["cnnf", "first", "last"]
    assert exact["cnnf", "e2e_last", "last"]
    assert exact["cnnf", "e2e_avg", "avg"]
    assert not any(
        cell.facts["exact"] for cell in plan.conditions if cell.coordinates["attack"] == "transfer"
    )


def test_e2e_last_scored_on_avg_is_another_craft_than_on_last(tmp_path: Path) -> None:
    task = {**BASE["tasks"][0], "views": ["e2e_last"], "attacks": ["pgd"]}
    plan = made(tmp_path, tasks=[task])
    own = crafts(plan, defense="cnnf", readout="last")
    assert own.isdisjoint(crafts(plan, defense="cnnf", readout="avg"))


def test_clean_is_crafted_once_for_all_defenses(tmp_path: Path) -> None:
    plan = made(tmp_path)
    assert crafts(plan, attack="clean", defense="cnn") == crafts(plan, attack="clean", defense="cnnf")


def test_a_source_that_is_its_own_victim_is_skipped_with_its_reason(tmp_path: Path) -> None:
    plan = made(tmp_path)
    own = [skip for skip in plan.skips if skip.coordinates["attack"] == "transfer"]
    assert {skip.coordinates["defense"] for skip in own} == {"cnn"}
    assert {skip.reason for skip in own} == {"the source is its own victim"}


def test_served_parameters_share_the_training_and_ignored_ones_the_crafts(tmp_path: Path) -> None:
    defenses = {"cnnf": {"use": "cnnf", "epochs": 1, "cycles": 2, "inference": {"cycles": [0, 1, 2]}}}
    attacks = {name: BASE["attacks"][name] for name in ("clean", "pgd")}
    plan = made(tmp_path, defenses=defenses, attacks=attacks)
    assert len(jobs(plan, Train)) == 1
    per_cycles = [
        crafts(plan, attack="pgd", view="first", **{"inference.cycles": cycles}) for cycles in (0, 1, 2)
    ]
    assert per_cycles[0] == per_cycles[1] == per_cycles[2]
    e2e = [
        crafts(plan, attack="pgd", view="e2e_last", **{"inference.cycles": cycles}) for cycles in (0, 1, 2)
    ]
    assert len(set.union(*e2e)) == 9
    # Serving what was trained is the same as serving nothing.
    plain = made(tmp_path, defenses={"cnnf": {"use": "cnnf", "epochs": 1, "cycles": 2}}, attacks=attacks)
    assert e2e[2] == crafts(plain, attack="pgd", view="e2e_last")


def test_targets_are_coordinates_of_the_craft(tmp_path: Path) -> None:
    attacks = {"others": {"use": "pgd", "targets": "others"}, "random": {"use": "pgd", "targets": "random"}}
    plan = made(tmp_path, attacks=attacks)
    found = {cell.coordinates["target"] for cell in plan.conditions}
    assert found == {*range(1, 10), "random"}
    assert crafts(plan, target=1).isdisjoint(crafts(plan, target=2))


def test_some_targets_may_be_named_by_their_offsets(tmp_path: Path) -> None:
    plan = made(tmp_path, attacks={"pgd": {"use": "pgd", "targets": [9, 2, 2]}})
    assert {cell.coordinates["target"] for cell in plan.conditions} == {2, 9}
    whole = made(tmp_path, attacks={"pgd": {"use": "pgd", "targets": "others"}})
    assert crafts(plan, target=9) == crafts(whole, target=9)
    with pytest.raises(InputError, match=r"suite.yaml:\d+: .*10 is no offset .* 10 classes they are 1 to 9"):
        made(tmp_path, attacks={"pgd": {"use": "pgd", "targets": [1, 10]}})
    with pytest.raises(InputError, match=r"targets.*: expected a number of 1 or more, found 0"):
        made(tmp_path, attacks={"pgd": {"use": "pgd", "targets": [0]}})


def test_an_attack_that_images_do_not_fit_is_skipped_with_its_reason(tmp_path: Path) -> None:
    attacks = {"colour": {"use": "toy/colour"}, "square": {"use": "toy/square"}}
    plan = made(tmp_path, attacks=attacks)
    assert {skip.reason for skip in plan.skips} == {"toy/colour is made for 3 channels, these have 1"}
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"square"}


def test_gradients_are_not_asked_of_a_view_that_has_none(tmp_path: Path) -> None:
    attacks = {"climbs": {"use": "pgd"}, "samples": {"use": "spsa"}}
    task = {**BASE["tasks"][0], "readouts": ["plain"], "views": ["opaque"]}
    plan = made(tmp_path, defenses={"net": {"use": "toy/opaque"}}, attacks=attacks, tasks=[task])
    assert {skip.reason for skip in plan.skips} == {"pgd needs gradients, view 'opaque' has none"}
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"samples"}


def test_nor_is_anything_but_answers_asked_of_answers(tmp_path: Path) -> None:
    task = {**BASE["tasks"][0], "threat": {"norm": "l2", "radius": 1}, "readouts": ["plain"]}
    attacks = {"climbs": {"use": "pgd"}, "samples": {"use": "square"}, "walks": {"use": "boundary"}}
    given: dict[str, Any] = {"defenses": {"net": {"use": "toy/opaque"}}, "attacks": attacks}
    plan = made(tmp_path, **given, tasks=[{**task, "views": ["decision:plain"]}])
    assert {skip.reason for skip in plan.skips} == {
        "pgd needs gradients, view 'decision:plain' shows answers alone",
        "square needs scores, view 'decision:plain' shows answers alone",
    }
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"walks"}
    # Beside a view of their own kind, answers are for others.
    plan = made(tmp_path, **given, tasks=[{**task, "views": ["decision:plain", "opaque"]}])
    assert {(cell.coordinates["attack"], cell.coordinates["view"]) for cell in plan.conditions} == {
        ("samples", "opaque"),
        ("walks", "decision:plain"),
    }


def test_a_time_limit_is_the_suites_or_the_attacks_and_no_part_of_a_key(tmp_path: Path) -> None:
    def limits(**attack: Any) -> tuple[set[float | None], set[str]]:
        plan = made(tmp_path, attacks={"it": attack})
        return {craft.attack_run.time_limit for craft in jobs(plan, Craft)}, crafts(plan)

    free, keys = limits(use="pgd")
    assert free == {None}
    assert limits(use="pgd", time_limit="1/2") == ({0.5}, keys)
    assert limits(use="toy/square")[0] == {7.0}
    assert limits(use="toy/square", time_limit=9)[0] == {9.0}
    for never in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match="time_limit"):
            limits(use="pgd", time_limit=never)


def test_a_limit_takes_a_prefix_and_a_second_way_to_ask_is_refused(tmp_path: Path) -> None:
    task = BASE["tasks"][0]
    plan = made(tmp_path, tasks=[{**task, "limit": 130}])
    slices = {(craft.start, craft.stop) for craft in jobs(plan, Craft)}
    assert slices == {(0, 120), (120, 130)}
    with pytest.raises(InputError, match="second time"):
        made(tmp_path, tasks=[task, {**task, "limit": 130}])


def test_a_view_of_another_space_is_skipped(tmp_path: Path) -> None:
    plan = made(
        tmp_path,
        defenses={"linear": {"use": "toy/linear"}},
        attacks={"pgd": {"use": "pgd"}},
        tasks=[{**BASE["tasks"][0], "views": ["logits", "code"]}],
    )
    assert {cell.coordinates["view"] for cell in plan.conditions} == {"logits"}
    assert {skip.reason for skip in plan.skips} == {"pgd searches pixel space, view 'code' is inversion"}


def test_a_planned_attack_is_skipped_wherever_it_would_stand(tmp_path: Path) -> None:
    reason = "it comes with the minimal attacks"
    attacks = {
        "clean": {"use": "none"},
        "cw": {"use": "not-yet", "planned": reason, "kappa": 500, "targets": "others"},
        "boundary": {"use": "not-either", "planned": reason, "iterations": 5000},
    }
    tasks = [
        {**BASE["tasks"][0], "threat": {"norm": "l2"}, "attacks": ["cw"]},
        {"data": "digits", "threat": {"norm": "l2"}, "attacks": ["clean", "boundary"]},
    ]
    plan = made(tmp_path, attacks=attacks, tasks=tasks)
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"clean"}
    assert {skip.reason for skip in plan.skips} == {
        f"not-yet is planned: {reason}",
        f"not-either is planned: {reason}",
    }
    cw = [skip.coordinates for skip in plan.skips if skip.coordinates["attack"] == "cw"]
    assert {(each["norm"], each["radius"]) for each in cw} == {("l2", None)}
    assert {each["target"] for each in cw} == set(range(1, 10))
    assert {each["view"] for each in cw} == {"first", "e2e_last", "e2e_avg"}
    # What it will look through is the attack's to say, where the task does not.
    assert {each.coordinates["view"] for each in plan.skips if each.coordinates["attack"] == "boundary"} == {
        None
    }
    assert plan.manifest()["attacks"]["cw"] == {
        "use": "not-yet",
        "planned": reason,
        "params": {"kappa": 500},
    }


def test_a_readout_that_a_defense_does_not_have_is_skipped(tmp_path: Path) -> None:
    plan = made(tmp_path, tasks=[{**BASE["tasks"][0], "attacks": ["pgd"], "readouts": ["avg"]}])
    assert {cell.coordinates["defense"] for cell in plan.conditions} == {"cnnf"}
    assert {(skip.coordinates["defense"], skip.reason) for skip in plan.skips} == {
        ("cnn", "cnn has no read-out 'avg'")
    }


def test_an_attack_that_needs_a_radius_is_skipped_without_one(tmp_path: Path) -> None:
    plan = made(tmp_path, tasks=[{**BASE["tasks"][0], "threat": {"norm": "linf"}}])
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"clean"}
    assert "pgd needs a radius" in {skip.reason for skip in plan.skips}


def test_an_attack_without_a_radius_is_run_once_for_all_radii(tmp_path: Path) -> None:
    threat = {"norm": "l2", "radius": [0.5, 1.0]}
    plan = made(
        tmp_path,
        defenses={"linear": {"use": "toy/linear"}},
        attacks={"minimal": {"use": "toy/minimal"}},
        tasks=[{"data": "digits", "threat": threat, "views": ["logits"], "readouts": ["plain"]}],
    )
    assert len(plan.conditions) == 2
    assert len({cell.job.key for cell in plan.conditions}) == 1


def test_keys_depend_on_what_decides_the_result_and_on_nothing_else(tmp_path: Path) -> None:
    def keys(**changes: Any) -> set[str]:
        return {cell.job.key for cell in made(tmp_path, **changes).conditions}

    same = keys()
    names = {"clean": "classic", "pgd": "attack", "transfer": "t"}
    renamed = {names[name]: attack for name, attack in BASE["attacks"].items()}
    assert keys(attacks=renamed) == same
    resolved = {**BASE["attacks"], "pgd": {"use": "pgd", "steps": 3, "restarts": 1, "loss": "ce"}}
    assert keys(attacks=resolved) == same
    task = BASE["tasks"][0]
    assert keys(tasks=[{**task, "threat": {"norm": "linf", "radius": 0.1}}]) == same
    assert keys(tasks=[{**task, "threat": {"norm": "linf", "radius": 0.11}}]) != same
    assert keys(tasks=[{**task, "seeds": [1]}]).isdisjoint(same)
    smaller = {"digits": {**BASE["data"]["digits"], "resize": 16}}
    assert keys(data=smaller).isdisjoint(same)


def test_the_key_scheme_is_frozen() -> None:
    # If this fails, every stored result gets another name: raise SCHEME and say so in the changelog.
    assert (
        key_of({"scheme": SCHEME, "kind": "train", "b": [1, 2.5], "a": None})
        == "1147e3b4e42442c959d764de9423b85e"
    )


def test_a_parameter_may_name_several_files_which_enter_by_content_and_in_order(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"0.{number}")
    (tmp_path / "again.txt").write_text("0.1")

    def plan(*names: str) -> Plan:
        means = {"means": [f"{name}.txt" for name in names]} if names else {}
        defenses = {"files": {"use": "toy/files", **means}}
        task = {**BASE["tasks"][0], "views": ["logits"]}
        return made(tmp_path, defenses=defenses, attacks={"clean": {"use": "none"}}, tasks=[task])

    def key(*names: str) -> str:
        (cell,) = plan(*names).conditions
        return cell.job.key

    assert key("0", "1") == key("0", "again")
    assert len({key("0", "1"), key("1", "0"), key("0"), key("0", "1", "2"), key()}) == 5
    first = plan("0", "1")
    assert first.suite.defenses["files"].params["means"] == [str(tmp_path / f"{n}.txt") for n in (0, 1)]
    assert set(first.manifest()["files"]) == {"0.txt", "1.txt"}
    assert plan().manifest()["files"] == {}
    with pytest.raises(InputError, match=r"means: no such file: .*9\.txt"):
        plan("0", "9")


def test_a_parameter_that_names_code_enters_by_content(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef build():\n    return torch.nn.Flatten()\n")
    defenses = {"mine": {"use": "module", "build": "mine:build"}}
    task = {**BASE["tasks"][0], "views": None}
    attacks = {"clean": BASE["attacks"]["clean"]}
    before = jobs(made(tmp_path, defenses=defenses, tasks=[task], attacks=attacks), Train)[0].key
    (tmp_path / "mine.py").write_text(
        "import torch\n# a comment\ndef build():\n    return torch.nn.Flatten()\n"
    )
    assert jobs(made(tmp_path, defenses=defenses, tasks=[task], attacks=attacks), Train)[0].key == before
    (tmp_path / "mine.py").write_text("import torch\ndef build():\n    return torch.nn.Flatten(1)\n")
    assert jobs(made(tmp_path, defenses=defenses, tasks=[task], attacks=attacks), Train)[0].key != before


def test_what_a_plan_writes_is_what_tables_read(tmp_path: Path) -> None:
    tables = {"t": {"title": "T", "rows": ["defense"], "columns": ["attack"]}}
    plan = made(tmp_path, tables=tables)
    store = Store(tmp_path / "results")
    store.open()
    manifest.write(store, plan.manifest())
    read = manifest.read(store.root, plan.suite.path)
    assert manifest.stale(read, plan.suite.path, store.root) == []
    found = conditions_of(read)
    assert {each.job for each in found} == {job.key for job in jobs(plan, Evaluate)}
    assert len({tuple(each.coordinates.items()) for each in found}) == len(found) > 10
    assert [(each.coordinates, each.reason) for each in skips_of(read)] == [
        (dict(skip.coordinates), skip.reason) for skip in plan.skips
    ]
    assert skips_of(read)
    assert (read["suite"], read["file"]) == (plan.suite.name, "suite.yaml")
    assert read["tables"]["t"]["rows"] == ["defense"]
    assert read["data"]["digits"]["shard"] == 120
    for kind, things in (("defenses", plan.suite.defenses), ("attacks", plan.suite.attacks)):
        assert read[kind] == {name: json.loads(json.dumps(each.identity)) for name, each in things.items()}


def test_a_manifest_holds_the_digests_of_all_code_and_files_that_defenses_name(tmp_path: Path) -> None:
    codes = {"mine": "return torch.nn.Flatten()", "yours": "return torch.nn.Flatten(1)"}
    for name, line in codes.items():
        (tmp_path / f"{name}.py").write_text(f"import torch\ndef build():\n    {line}\n")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"0.{number}")
    defenses = {name: {"use": "module", "build": f"{name}:build"} for name in codes}
    defenses |= {f"files{number}": {"use": "toy/files", "means": [f"{number}.txt"]} for number in range(2)}
    task = {**BASE["tasks"][0], "views": None}
    attacks = {"clean": BASE["attacks"]["clean"]}

    def told() -> dict[str, Any]:
        return made(tmp_path, defenses=defenses, tasks=[task], attacks=attacks).manifest()

    before = told()
    assert before["files"] == {
        f"{number}.txt": hashlib.sha256(f"0.{number}".encode()).hexdigest() for number in range(2)
    }
    assert set(codes) <= set(before["sources"])
    (tmp_path / "yours.py").write_text("import torch\ndef build():\n    return torch.nn.Identity()\n")
    after = told()
    changed = {name for name, digest in before["sources"].items() if after["sources"][name] != digest}
    assert changed == {"yours"}


def test_parts_are_edges_of_the_graph(tmp_path: Path) -> None:
    plan = made(
        tmp_path,
        defenses={"linear": {"use": "toy/linear"}, "top": {"use": "toy/stacked", "base": "linear"}},
        attacks={"clean": {"use": "none"}},
        tasks=[{**BASE["tasks"][0], "views": None, "defenses": ["top"]}],
    )
    trainings = jobs(plan, Train)
    top = next(job for job in trainings if job.defense.name == "toy/stacked")
    assert [part.defense.name for part in plan.graph()[top]] == ["toy/linear"]


def test_a_source_learns_from_training_images_even_where_its_victim_learns_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import torch\ndef build():\n    return torch.nn.Flatten()\n")
    plan = made(
        tmp_path,
        defenses={**BASE["defenses"], "own": {"use": "module", "build": "own:build"}},
        tasks=[{**BASE["tasks"][0], "defenses": ["own"], "attacks": ["transfer"]}],
    )
    splits = {job.defense.name: job.data.spec.split for job in jobs(plan, Train)}
    assert splits == {"module": "test", "cnn": "train"}


def test_two_labels_of_one_data_set_keep_their_own_shards(tmp_path: Path) -> None:
    data = {
        "a": {"name": "digits", "size": 40, "shard": 20},
        "b": {"name": "digits", "size": 40, "shard": 10},
    }
    tasks = [{**BASE["tasks"][0], "data": name, "attacks": ["clean"]} for name in data]
    plan = made(tmp_path, data=data, tasks=tasks)
    sizes = {
        cell.coordinates["data"]: {craft.stop - craft.start for craft in cell.job.crafts}
        for cell in plan.conditions
    }
    assert sizes == {"a": {20}, "b": {10}}


def test_served_values_and_inner_attacks_are_checked_like_all_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cycles"):
        made(
            tmp_path,
            defenses={"cnnf": {"use": "cnnf", "inference": {"cycles": [-1]}}},
            attacks={"c": {"use": "none"}},
        )
    for inner, sentence in (
        ({"use": "pgd", "steps": 0}, r"defenses\.cnn\.inner\.steps: expected a number of 1 or more, found 0"),
        # What only the data tells is asked of the attack itself.
        ({"use": "jsma", "gamma": 0.01}, r"inner attack jsma: gamma of 0\.01 leaves fewer than 2"),
    ):
        with pytest.raises(InputError, match=sentence):
            made(tmp_path, defenses={"cnn": {"use": "cnn", "inner": inner}}, attacks={"c": {"use": "none"}})


def test_a_defense_that_the_images_sides_do_not_fit_is_told_of_resize(tmp_path: Path) -> None:
    task = {**BASE["tasks"][0], "views": ["logits"]}

    def asked(defense: dict[str, Any], **data: Any) -> Plan:
        return made(
            tmp_path,
            data={"digits": {**BASE["data"]["digits"], **data}},
            defenses={"cnn": {"use": "standard", "epochs": 1, **defense}},
            attacks={"clean": {"use": "none"}},
            tasks=[task],
        )

    with pytest.raises(
        InputError, match=r"at least 16, found 8x8; `resize: 16` under data makes them 16x16$"
    ):
        asked({"net": "smallcnn"})
    assert asked({"net": "smallcnn"}, resize=16).conditions
    # Where no side helps, none is named.
    with pytest.raises(InputError, match=r"batch must be at least 2, as batch normalisation .* found 1$"):
        asked({"net": "resnet18", "batch": 1})


def test_jobs_travel_to_other_processes_with_their_keys(tmp_path: Path) -> None:
    import pickle

    plan = made(tmp_path)
    for job in plan.graph():
        assert pickle.loads(pickle.dumps(job)).key == job.key


def test_ten_thousand_cells_are_planned_in_little_time(tmp_path: Path) -> None:
    task = {**BASE["tasks"][0], "seeds": list(range(460)), "threat": {"norm": "linf", "radius": [0.1, 0.2]}}
    begun = time.process_time()
    plan = made(tmp_path, tasks=[task])
    json.dumps(plan.manifest())
    spent = time.process_time() - begun
    assert len(plan.conditions) >= 10_000
    assert len(jobs(plan, Evaluate)) > 5_000
    # Measured at about a second (tests/benchmarks); ten times that is a mistake of the planner's.
    assert spent < 15


def test_source_digests_do_not_count_comments_or_docstrings(tmp_path: Path) -> None:
    from bench.results.fingerprint import code_digest

    path = tmp_path / "code.py"
    path.write_text('"""One."""\nA = 1\n"""Three."""\ndef f():\n    """Two."""\n    return 1\n')
    before = code_digest(path)
    path.write_text('"""Other."""\n\nA = 1\n"""Fourth."""\n\ndef f():  # why\n    return 1\n\n')
    assert code_digest(path) == before
    for other in ("A = 1\ndef f():\n    return 2\n", "A = 'text'\ndef f():\n    return 1\n"):
        path.write_text(other)
        assert code_digest(path) != before


def test_planning_imports_no_attack_library() -> None:
    code = (
        "import sys, bench.suite.planner, bench.registry; bench.registry.discover(); "
        "print([m for m in ('torchattacks', 'foolbox', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Rules -------------------------------------------------------------------------------------------------


def request(folder: Path, attack: str, view: Any = "logits", **changes: Any) -> Request:
    """Return a request that nothing speaks against, but for what `changes` says."""
    attacks = {attack: {"use": attack}}
    task = {**BASE["tasks"][0], "threat": {"norm": "linf", "radius": 0.1}, "views": None}
    defenses = {"linear": {"use": "toy/linear"}, "opaque": {"use": "toy/opaque"}}
    path = folder / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"data": BASE["data"], "defenses": defenses, "attacks": attacks, "tasks": [task]})
    )
    suite = resolve.load(path)
    crossing = Planner(suite, None)
    digits = crossing.data(suite.data["digits"], "here")
    form = {name: changes.pop(name) for name in Shape._fields if name in changes}
    data = replace(digits, shape=digits.shape._replace(**form))
    victim = replace(crossing.train(changes.pop("defense", "linear"), digits, digits, 0), data=data)
    point = Point(
        data="digits", norm="linf", radius=0.1, defense="linear", attack=attack, view="logits",
        readout="plain", seed=0, target=None, inference={},
    )  # fmt: skip
    resolved = suite.attacks[attack]
    assert isinstance(resolved, Resolved)
    choice = ViewUse(use=view) if isinstance(view, str) else view
    return Request(replace(point, **changes), resolved, victim, data, data, 60, choice)


RULED = [
    (planner.only_stored, "replay", {}, "replay shows a baseline's images: bench check does"),
    (planner.unknown_readout, "pgd", {"readout": "avg"}, "toy/linear has no read-out 'avg'"),
    (planner.other_norm, "pgd", {"norm": "l0"}, "pgd is made for l2, linf"),
    (planner.missing_radius, "pgd", {"radius": math.inf}, "pgd needs a radius"),
    (planner.too_few_classes, "toy/many", {"classes": 3}, "toy/many needs 4 classes, there are 3"),
    (planner.other_channels, "toy/colour", {}, "toy/colour is made for 3 channels, these have 1"),
    (planner.not_square, "toy/square", {"width": 9}, "toy/square needs square images, these are 8x9"),
    (planner.untargeted, "toy/aimless", {"target": 1}, "toy/aimless reaches for no target"),
    (planner.unfit_data, "toy/many", {"height": 99}, "toy/many: 99 pixels are too many for 1 steps"),
]


@pytest.mark.parametrize(
    ("rule", "attack", "changes", "reason"), RULED, ids=lambda each: getattr(each, "__name__", "")
)
def test_a_rule_refuses_what_it_is_named_for(
    rule: Any, attack: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    asked = request(tmp_path, attack, **changes)
    assert rule(asked) == reason
    assert planner.refusal(planner.RULES, asked) == reason
    # It alone speaks, so that leaving it out would let the request pass.
    assert planner.refusal([each for each in planner.RULES if each is not rule], asked) is None


def test_every_rule_is_tried() -> None:
    assert [rule for rule, *_ in RULED] == list(planner.RULES)
    assert [rule for rule, *_ in VIEW_RULED] == list(planner.VIEW_RULES)


VIEW_RULED = [
    (planner.own_source, "pgd", "linear", "logits", True, "the source is its own victim"),
    (
        planner.unknown_answers,
        "boundary",
        "linear",
        "decision:avg",
        False,
        "toy/linear has no read-out 'avg'",
    ),
    (
        planner.answers_alone,
        "spsa",
        "linear",
        "decision:plain",
        False,
        "spsa needs scores, view 'decision:plain' shows answers alone",
    ),
    (planner.unknown_view, "pgd", "linear", "latent", False, "toy/linear has no view 'latent'"),
    (
        planner.other_space,
        "pgd",
        "linear",
        "code",
        False,
        "pgd searches pixel space, view 'code' is inversion",
    ),
    (planner.no_gradient, "pgd", "opaque", "opaque", False, "pgd needs gradients, view 'opaque' has none"),
]


@pytest.mark.parametrize(
    ("rule", "attack", "defense", "use", "transfers", "reason"),
    VIEW_RULED,
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_rule_about_views_refuses_what_it_is_named_for(
    rule: Any, attack: str, defense: str, use: str, transfers: bool, reason: str, tmp_path: Path
) -> None:
    asked = request(tmp_path, attack, use, defense=defense)
    assert asked.choice is not None
    sight = Sight(asked, asked.victim, {}, asked.choice, transfers)
    assert rule(sight) == reason
    assert planner.refusal(planner.VIEW_RULES, sight) == reason
    others = [each for each in planner.VIEW_RULES if each is not rule]
    assert planner.refusal(others, sight) is None


def test_no_rule_speaks_against_what_can_be(tmp_path: Path) -> None:
    asked = request(tmp_path, "pgd")
    assert planner.refusal(planner.RULES, asked) is None
    assert asked.choice is not None
    assert planner.refusal(planner.VIEW_RULES, Sight(asked, asked.victim, {}, asked.choice, False)) is None


def test_a_cell_says_whether_its_attack_does_anything(tmp_path: Path) -> None:
    attacks = {"clean": {"use": "none"}, "same": {"use": "toy/common"}, "pgd": {"use": "pgd"}}
    plan = made(
        tmp_path, attacks=attacks, tasks=[{**BASE["tasks"][0], "threat": {"norm": "linf", "radius": 0.1}}]
    )
    assert {(cell.coordinates["attack"], cell.facts["idle"]) for cell in plan.conditions} == {
        ("clean", True), ("same", False), ("pgd", False),
    }  # fmt: skip

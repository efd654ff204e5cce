"""What a plan crosses, fills in, shares and refuses: one thing at a time, by what the task file says."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_planner import request

from bench import ContentPath
from bench.data.source import Places
from bench.errors import InputError
from bench.protocols import Shape, Threat
from bench.registry import DEFENSES, SOURCES, SourceEntry
from bench.suite import planner, resolve
from bench.suite.jobs import AttackRun, Job, Train
from bench.suite.planner import Plan, PlannedCondition, Sight
from bench.suite.schema import ViewUse
from suites import TASK, suite

LINEAR = {"linear": {"use": "toy/linear"}}
PGD = {"pgd": {"use": "pgd", "steps": 2}}
CLEAN = {"clean": {"use": "none"}}


def crossed(
    folder: Path,
    defenses: Mapping[str, Any] = LINEAR,
    attacks: Mapping[str, Any] = PGD,
    /,
    root: Path | None = None,
    data: Mapping[str, Any] | None = None,
    **task: Any,
) -> Plan:
    """Plan one task on the digits, through the plain read-out unless said otherwise."""
    asked = {**TASK, "readouts": ["plain"], **task}
    path = suite(folder, dict(defenses), dict(attacks), [asked], **({"data": dict(data)} if data else {}))
    return planner.make(resolve.load(path), root)


def line(folder: Path, text: str) -> str:
    """Return how a message names the only line of the task file that is so written."""
    lines = (folder / "suite.yaml").read_text().splitlines()
    (number,) = (number for number, found in enumerate(lines, 1) if found == text)
    return f"suite.yaml:{number}"


def runs(plan: Plan, *coordinates: str) -> dict[Any, AttackRun]:
    """Return the attack run of each condition, by coordinates that tell them apart."""
    found: dict[Any, AttackRun] = {}
    for cell in plan.conditions:
        name = tuple(cell.coordinates[each] for each in coordinates)
        assert name not in found
        (found[name if len(name) > 1 else name[0]],) = {craft.attack_run for craft in cell.job.crafts}
    return found


def only(plan: Plan) -> PlannedCondition:
    (cell,) = plan.conditions
    return cell


def declares(monkeypatch: pytest.MonkeyPatch, name: str, **hooks: Any) -> None:
    monkeypatch.setitem(DEFENSES._entries, name, replace(DEFENSES[name], **hooks))


def parameters(**given: tuple[Any, Any]) -> Callable[[], list[inspect.Parameter]]:
    """Return what declares parameters by their types and defaults."""
    return lambda: [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in given.items()
    ]


# What is looked at --------------------------------------------------------------------------------------


def test_every_attack_looks_through_the_view_of_its_condition_with_all_its_parameters(tmp_path: Path) -> None:
    views = ["logits", {"use": "scaled", "temperature": 5}, {"use": "scaled", "draws": 3}, "reject"]
    plan = crossed(
        tmp_path, views=views, readouts=["plain", "reject"], threat={"norm": "l2", "radius": [0.5, 2]}
    )
    found = runs(plan, "view", "readout", "radius")
    assert len(found) == 16
    expected = {
        "logits": (ViewUse(use="logits"), "plain"),
        "scaled(temperature=5)": (ViewUse(use="scaled", temperature=5.0), None),
        "scaled(draws=3)": (ViewUse(use="scaled", draws=3, temperature=2.0), None),
        "reject": (ViewUse(use="reject"), "reject"),
    }
    for (view, readout, radius), run in found.items():
        chosen, exact_for = expected[view]
        assert run.view == chosen
        assert run.exact is (exact_for == readout)
        assert run.threat == Threat("l2", radius)
    for cell in plan.conditions:
        assert cell.job.readout == cell.coordinates["readout"]
        assert cell.job.identity["readout"] == cell.coordinates["readout"]
        assert cell.facts["exact"] is cell.job.crafts[0].attack_run.exact


def test_the_parameters_of_a_view_enter_as_json_by_the_names_that_people_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pydantic has an attribute of its own that is called `copy`, so that the field has another name.
    views = dict(DEFENSES["toy/linear"].views)
    views["scaled"] = replace(
        views["scaled"], signature=parameters(copy=(float, 2.0), sizes=(tuple[int, ...], (1, 2)))
    )
    declares(monkeypatch, "toy/linear", views=views)
    run = runs(crossed(tmp_path, views=[{"use": "scaled", "copy": 3}]), "attack")["pgd"]
    assert run.view is not None
    assert run.view.params == {"copy": 3.0, "sizes": [1, 2]}


def test_where_a_task_names_no_view_an_attack_looks_through_all_of_its_space(tmp_path: Path) -> None:
    attacks = {**PGD, "code": {"use": "toy/code"}, **CLEAN}
    every = {("pgd", "logits"), ("pgd", "scaled"), ("pgd", "reject"), ("code", "code"), ("clean", None)}
    plan = crossed(tmp_path, LINEAR, attacks)
    assert {(cell.coordinates["attack"], cell.coordinates["view"]) for cell in plan.conditions} == every
    assert not plan.skips
    # A task's views may be for attacks by answers alone: then they are what this one is refused for.
    plan = crossed(tmp_path, LINEAR, PGD, views=["decision:plain"])
    assert [skip.coordinates["view"] for skip in plan.skips] == ["decision:plain"]
    plan = crossed(tmp_path, LINEAR, PGD, views=["decision:plain", "scaled"])
    assert only(plan).coordinates["view"] == "scaled"
    assert not plan.skips


def test_an_attack_by_decisions_looks_at_the_answers_of_the_read_out_unless_the_task_says_which(
    tmp_path: Path,
) -> None:
    attacks = {"answers": {"use": "toy/answers"}}

    def seen(*views: str) -> dict[Any, AttackRun]:
        more = {"views": list(views)} if views else {}
        return runs(
            crossed(tmp_path, LINEAR, attacks, readouts=["plain", "reject"], **more), "view", "readout"
        )

    own = {("decision:plain", "plain"): True, ("decision:reject", "reject"): True}
    for found in (seen(), seen("logits")):
        assert {name: run.exact for name, run in found.items()} == own
    found = seen("decision:reject", "logits")
    assert {name: run.exact for name, run in found.items()} == {
        ("decision:reject", "plain"): False,
        ("decision:reject", "reject"): True,
    }
    for (view, _), run in found.items():
        assert run.view == ViewUse(use=view)
        assert run.source is not None
        assert run.source.train.defense.name == "toy/linear"


def test_an_attack_that_looks_at_nothing_is_exact_and_has_no_view(tmp_path: Path) -> None:
    cell = only(crossed(tmp_path, LINEAR, CLEAN))
    (run,) = {craft.attack_run for craft in cell.job.crafts}
    assert (run.source, run.view, run.exact) == (None, None, True)
    assert (cell.facts["exact"], cell.facts["source"], cell.coordinates["view"]) == (True, None, None)


def test_a_transfer_is_crafted_on_its_source_with_the_seed_that_it_names(tmp_path: Path) -> None:
    defenses = {**LINEAR, "other": {"use": "toy/linear", "epochs": 1}}
    source = {"defense": "other", "view": {"use": "scaled", "temperature": 4}}
    attacks = {
        "same": {"use": "pgd", "source": source},
        "fifth": {"use": "pgd", "source": {**source, "seed": 5}},
    }
    plan = crossed(tmp_path, defenses, attacks, defenses=["linear"], views=["logits"], seeds=[0, 1])
    assert {
        (cell.coordinates["view"], cell.facts["source"], cell.facts["exact"]) for cell in plan.conditions
    } == {("other:scaled", "other", False)}
    for (attack, seed), run in runs(plan, "attack", "seed").items():
        assert run.source is not None
        assert run.source.train.defense is plan.suite.defenses["other"]
        assert run.source.train.seed == (5 if attack == "fifth" else seed)
        assert run.seed == seed
        assert run.view == ViewUse(use="scaled", temperature=4.0)


# What is trained, on what ------------------------------------------------------------------------------


def trainings(plan: Plan) -> dict[str, Train]:
    return {job.defense.name: job for job in plan.graph() if isinstance(job, Train)}


def test_defenses_are_fitted_on_what_a_task_names(tmp_path: Path) -> None:
    data = {
        "digits": {"name": "digits", "size": 60, "shard": 25},
        "few": {"name": "digits", "split": "train", "size": 20},
    }
    plan = crossed(tmp_path, LINEAR, CLEAN, data=data, fit="few")
    assert trainings(plan)["toy/linear"].data.spec == plan.suite.data["few"]
    assert only(plan).job.crafts[0].attack_run.data.spec == plan.suite.data["digits"]


@pytest.mark.parametrize("learner", ["victim", "source", "part", "part of the source"])
def test_whoever_learns_is_fitted_on_training_images(
    learner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network around another one may have nothing to learn itself.
    declares(monkeypatch, "toy/stacked", learns=False)
    defenses = {
        "files": {"use": "toy/files"},
        **LINEAR,
        "top": {"use": "toy/stacked", "base": "linear"},
    }
    victim, source = {
        "victim": ("linear", "files"),
        "source": ("files", "linear"),
        "part": ("top", "files"),
        "part of the source": ("files", "top"),
    }[learner]
    attacks = {"transfer": {"use": "pgd", "source": {"defense": source, "view": "logits"}}}
    plan = crossed(tmp_path, defenses, attacks, defenses=[victim])
    assert {name: job.data.spec.split for name, job in trainings(plan).items()} == {
        "toy/files": "test",
        "toy/linear": "train",
        **({"toy/stacked": "test"} if "top" in (victim, source) else {}),
    }


OTHER = {
    "digits": {"name": "digits", "size": 60, "shard": 25},
    "large": {"name": "digits", "split": "train", "resize": 16},
}


def test_images_of_another_form_are_no_training_images(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, LINEAR, CLEAN, data=OTHER, fit="large")
    assert str(caught.value) == (
        f"{line(tmp_path, '- data: digits')}: tasks[0]: digits has images (1, 8, 8), "
        "but the defenses are fitted on (1, 16, 16)"
    )


def test_what_nothing_is_fitted_on_may_have_any_form(tmp_path: Path) -> None:
    plan = crossed(tmp_path, {"files": {"use": "toy/files"}}, CLEAN, data=OTHER, fit="large")
    assert trainings(plan)["toy/files"].data.spec == plan.suite.data["digits"]


def test_data_lie_in_the_root_or_beside_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Places] = []

    def recorded(split: str, places: Places) -> Any:
        seen.append(places)
        return SOURCES["digits"].make(split, places)

    entry = SourceEntry(name="recorded", make=recorded, version=1)
    monkeypatch.setitem(SOURCES._entries, "recorded", entry)
    data = {"digits": {"name": "recorded", "size": 60}}
    crossed(tmp_path, LINEAR, CLEAN, data=data, root=tmp_path / "root")
    assert len(seen) >= 6, "digest, form and number, of what is attacked and of what is fitted on"
    assert set(map(repr, seen)) == {repr(Places(tmp_path / "root", tmp_path))}


# Where something is wrong ------------------------------------------------------------------------------


def test_data_that_cannot_be_are_told_by_their_own_place(tmp_path: Path) -> None:
    data = {
        "digits": {"name": "digits", "size": 60},
        "many": {"name": "digits", "split": "train", "size": 99999},
    }
    said = r"has \d+ examples, size asks for 99999$"
    with pytest.raises(InputError, match=said) as caught:
        crossed(tmp_path, LINEAR, CLEAN, data=data, fit="many")
    assert str(caught.value).startswith(f"{line(tmp_path, '  many:')}: data.many: digits train has")
    with pytest.raises(InputError, match=said) as caught:
        crossed(tmp_path, LINEAR, CLEAN, data={"digits": data["many"]})
    assert str(caught.value).startswith(f"{line(tmp_path, '  digits:')}: data.digits: digits train has")


def test_a_training_split_that_cannot_be_is_told_by_the_data_that_it_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(split: str, places: Places) -> Any:
        if split == "train":
            raise InputError("no training images")
        return SOURCES["digits"].make(split, places)

    entry = SourceEntry(name="untrained", make=untrained, version=1)
    monkeypatch.setitem(SOURCES._entries, "untrained", entry)
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, LINEAR, CLEAN, data={"digits": {"name": "untrained"}})
    assert str(caught.value) == f"{line(tmp_path, '  digits:')}: data.digits: no training images"


def test_parameters_that_do_not_fit_are_told_by_their_own_place(tmp_path: Path) -> None:
    # The second of two, so that each is asked.
    attacks = {**PGD, "few": {"use": "jsma", "gamma": 0.01}}
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, LINEAR, attacks)
    assert str(caught.value).startswith(
        f"{line(tmp_path, '  few:')}: attacks.few: gamma of 0.01 leaves fewer"
    )
    defenses = {**LINEAR, "cnn": {"use": "cnn", "inner": {"use": "jsma", "gamma": 0.01}}}
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, defenses, CLEAN, readouts=None)
    place = f"{line(tmp_path, '  cnn:')}: defenses.cnn: inner attack jsma: gamma of 0.01 leaves fewer"
    assert str(caught.value).startswith(place)


def refused(params: Mapping[str, Any], shape: Shape) -> None:
    """Refuse a threshold above a half, and images whose sides are no multiple of 32."""
    if params["threshold"] > 0.5:
        raise InputError("threshold is too high")
    if shape.height % 32 or shape.width % 32:
        raise InputError("sides must be multiples of 32")


def test_values_set_after_fitting_are_checked_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declares(monkeypatch, "toy/linear", check_params=refused)
    data = {"digits": {"name": "digits", "size": 60, "resize": 32}}
    defenses = {
        "first": {"use": "toy/linear"},
        "served": {"use": "toy/linear", "inference": {"threshold": [0.3, 0.9]}},
    }
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, defenses, CLEAN, data=data)
    assert str(caught.value) == f"{line(tmp_path, '  served:')}: defenses.served: threshold is too high"
    defenses["served"]["inference"]["threshold"] = [0.3, 0.5]
    assert len(crossed(tmp_path, defenses, CLEAN, data=data).conditions) == 3


@pytest.mark.parametrize(("resize", "side"), [(None, 32), (70, 64), (90, 96), (200, 224)])
def test_the_side_nearest_to_the_images_that_a_defense_takes_is_named(
    resize: int | None, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declares(monkeypatch, "toy/linear", check_params=refused)
    data = {"digits": {"name": "digits", "size": 60, **({"resize": resize} if resize else {})}}
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, LINEAR, CLEAN, data=data)
    assert str(caught.value) == (
        f"{line(tmp_path, '  linear:')}: defenses.linear: sides must be multiples of 32; "
        f"`resize: {side}` under data makes them {side}x{side}"
    )


def test_an_offset_beyond_the_classes_is_told_by_its_own_place(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        crossed(tmp_path, LINEAR, {"pgd": {"use": "pgd", "targets": [1, 10]}})
    assert str(caught.value) == (
        f"{line(tmp_path, '    targets:')}: attacks.pgd.targets: 10 is no offset from the true class: "
        "with 10 classes they are 1 to 9"
    )


def test_a_second_way_to_ask_is_told_by_the_later_task(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    later = {"limit": 30, **task}
    path = suite(tmp_path, LINEAR, PGD, [task, later])
    with pytest.raises(InputError) as caught:
        planner.make(resolve.load(path))
    assert str(caught.value) == (
        f"{line(tmp_path, '- limit: 30')}: tasks[1]: asks pgd on linear (digits) a second time, "
        "in another way (n = 60 and 30); give one of them a name of its own"
    )


# Rules at their edges ----------------------------------------------------------------------------------


def test_as_many_classes_as_an_attack_needs_are_enough(tmp_path: Path) -> None:
    assert planner.too_few_classes(request(tmp_path, "toy/many", classes=4)) is None


@pytest.mark.parametrize(
    ("attack", "use", "reason"),
    [
        ("boundary", "decision:avg", "toy/linear has no read-out 'avg'"),
        ("boundary", "decision:plain", None),
        # Others are refused by `answers_alone`, and views of the defense by `unknown_view`.
        ("pgd", "decision:avg", None),
        ("boundary", "logits", None),
    ],
)
def test_answers_are_looked_for_where_an_attack_needs_no_more(
    attack: str, use: str, reason: str | None, tmp_path: Path
) -> None:
    asked = request(tmp_path, attack, use)
    assert asked.choice is not None
    assert planner.unknown_answers(Sight(asked, asked.victim, {}, asked.choice, False)) == reason


def test_a_request_counts_the_classes_that_its_victim_was_made_for(tmp_path: Path) -> None:
    asked = request(tmp_path, "toy/many", classes=3)
    ten = request(tmp_path, "toy/many", classes=10)
    # Images of three classes, and a network for ten; and the other way round.
    assert planner.too_few_classes(replace(asked, victim=ten.victim)) is None
    assert planner.too_few_classes(replace(ten, victim=asked.victim)) is not None


def test_the_views_of_what_is_looked_at_count_and_not_those_of_the_victim(tmp_path: Path) -> None:
    asked = request(tmp_path, "spsa")
    source = request(tmp_path, "spsa", defense="opaque").victim
    for train, reason in ((source, None), (asked.victim, "toy/linear has no view 'opaque'")):
        sight = Sight(asked, train, {}, ViewUse(use="opaque"), transfers=train is source)
        assert planner.refusal(planner.VIEW_RULES, sight) == reason


def test_answers_are_known_by_how_their_name_begins(tmp_path: Path) -> None:
    asked = request(tmp_path, "boundary")
    for use, answers in (("decision:plain", "plain"), ("decision:a:b", "a:b"), ("indecision:plain", None)):
        assert Sight(asked, asked.victim, {}, ViewUse(use=use), False).answers == answers


# What is said of a condition ---------------------------------------------------------------------------

DRAWING = {
    "still": {"use": "toy/linear"},
    "coin": {"use": "toy/random"},
    "on still": {"use": "toy/stacked", "base": "still"},
    "on noisy": {"use": "toy/stacked", "base": "noisy"},
    "noisy": {"use": "toy/noisy"},
    "deep": {"use": "toy/stacked", "base": "on noisy"},
}


def test_a_condition_says_whether_its_answers_are_drawn_by_the_defense_or_a_part(tmp_path: Path) -> None:
    plan = crossed(tmp_path, DRAWING, CLEAN)
    assert {cell.coordinates["defense"]: cell.facts["random"] for cell in plan.conditions} == {
        "still": False,
        "coin": True,
        "on still": False,
        "on noisy": True,
        "noisy": True,
        "deep": True,
    }


def test_a_success_against_a_random_defense_is_a_draw_so_that_no_attack_stops_at_it(tmp_path: Path) -> None:
    """The view is what is scored all the same, which is what tables ask."""
    views = ["logits", {"use": "logits", "draws": 4}]
    found = crossed(tmp_path, DRAWING, PGD, views=views).conditions
    told = {(cell.coordinates["defense"], cell.coordinates["view"]): cell for cell in found}
    for (defense, view), cell in told.items():
        (run,) = {craft.attack_run for craft in cell.job.crafts}
        assert run.exact is (not cell.facts["random"]), (defense, view)
        assert cell.facts["exact"] is (defense != "coin")
    answers = {"answers": {"use": "toy/answers"}}
    for cell in crossed(tmp_path, DRAWING, answers, readouts=["plain"]).conditions:
        assert cell.job.crafts[0].attack_run.exact is (not cell.facts["random"])
        assert cell.facts["exact"]


def test_coordinates_have_one_order_in_which_manifests_are_compared(tmp_path: Path) -> None:
    defenses = {"linear": {"use": "toy/linear", "inference": {"threshold": [0.4, 0.6]}}}
    for cell in crossed(tmp_path, defenses, PGD).conditions:
        assert list(cell.coordinates) == [
            "data", "norm", "radius", "defense", "attack", "view", "readout", "seed", "target",
            "inference.threshold",
        ]  # fmt: skip


def test_whether_a_defense_draws_may_depend_on_what_is_set_after_fitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declares(monkeypatch, "toy/linear", random=lambda params: params["threshold"] > 0.5)
    defenses = {"linear": {"use": "toy/linear", "inference": {"threshold": [0.4, 0.6]}}}
    views = [{"use": "reject", "draws": 4}]
    plan = crossed(tmp_path, defenses, PGD, views=views)
    told = {cell.coordinates["inference.threshold"]: cell.facts for cell in plan.conditions}
    assert {threshold: facts["random"] for threshold, facts in told.items()} == {0.4: False, 0.6: True}
    said = "4 draws of linear, whose answers do not differ, are one"
    assert {threshold: facts["flags"] for threshold, facts in told.items()} == {0.4: [said], 0.6: []}


def test_what_is_certain_is_the_same_craft_as_ever_and_what_is_drawn_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defenses = {"linear": {"use": "toy/linear", "inference": {"threshold": [0.4, 0.6]}}}

    def found() -> dict[Any, AttackRun]:
        plan = crossed(tmp_path, defenses, PGD, views=["reject"], readouts=["reject"])
        return runs(plan, "inference.threshold")

    before = found()
    declares(monkeypatch, "toy/linear", random=lambda params: params["threshold"] > 0.5)
    now = found()
    assert now[0.4].key == before[0.4].key
    assert now[0.6].key == replace(before[0.6], exact=False).key != before[0.6].key


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_draws_of_what_does_not_draw_are_a_doubt(draws: int, tmp_path: Path) -> None:
    defenses = {name: DRAWING[name] for name in ("still", "noisy", "on noisy")}
    plan = crossed(tmp_path, defenses, PGD, views=[{"use": "logits", "draws": draws}])
    said = f"{draws} draws of still, whose answers do not differ, are one"
    assert {cell.coordinates["defense"]: cell.facts["flags"] for cell in plan.conditions} == {
        "still": [said] if draws > 1 else [],
        "noisy": [],
        "on noisy": [],
    }


def test_what_is_looked_at_draws_or_not_whoever_is_attacked(tmp_path: Path) -> None:
    source = {"defense": "still", "view": {"use": "logits", "draws": 2}}
    attacks = {"transfer": {"use": "pgd", "source": source}, **CLEAN}
    plan = crossed(tmp_path, DRAWING, attacks, defenses=["noisy"])
    assert {cell.coordinates["attack"]: cell.facts["flags"] for cell in plan.conditions} == {
        "transfer": ["2 draws of still, whose answers do not differ, are one"],
        "clean": [],
    }


def test_a_doubt_of_the_defense_knows_its_parameters_as_they_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags(*, threshold: float, epochs: int, **_: Any) -> str | None:
        return f"threshold {threshold} after {epochs} epochs" if threshold > 0.5 else None

    declares(monkeypatch, "toy/linear", flags=flags)
    defenses = {"mine": {"use": "toy/linear", "epochs": 7, "inference": {"threshold": [0.4, 0.6]}}}
    plan = crossed(tmp_path, defenses, CLEAN)
    assert {cell.coordinates["inference.threshold"]: cell.facts["flags"] for cell in plan.conditions} == {
        0.4: [],
        0.6: ["mine: threshold 0.6 after 7 epochs"],
    }


# Graph and manifest ------------------------------------------------------------------------------------


def test_the_graph_of_some_conditions_holds_them_and_what_they_need_alone(tmp_path: Path) -> None:
    defenses = {**LINEAR, "top": {"use": "toy/stacked", "base": "linear"}}
    plan = crossed(tmp_path, defenses, {**PGD, **CLEAN}, views=["logits"])

    def below(job: Job) -> set[Job]:
        return {job}.union(*(below(each) for each in job.needs))

    for cell in plan.conditions:
        graph = plan.graph({cell.job.key})
        assert set(graph) == below(cell.job)
        assert all(graph[job] == job.needs for job in graph)
    assert set(plan.graph()) == set().union(*(below(cell.job) for cell in plan.conditions))
    assert plan.graph(set()) == {}


def test_a_file_that_a_defense_names_by_itself_is_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "mean.txt"
    named.write_text("0.5")
    declares(monkeypatch, "toy/files", signature=parameters(one=(ContentPath | None, str(named))))
    plan = crossed(tmp_path, {"files": {"use": "toy/files"}}, CLEAN)
    assert plan.manifest()["files"] == {str(named): hashlib.sha256(b"0.5").hexdigest()}


def test_a_manifest_is_the_plain_json_that_it_is_read_back_as(tmp_path: Path) -> None:
    data = {"digits": {"name": "digits", "size": 40, "only": [3, 5]}}
    tables = {"t": {"title": "T", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}}}
    path = suite(tmp_path, LINEAR, {**PGD, **CLEAN}, [{**TASK}], data=data, tables=tables)
    told = planner.make(resolve.load(path)).manifest()
    assert told["data"]["digits"]["only"] == [3, 5]
    assert json.loads(json.dumps(told)) == told

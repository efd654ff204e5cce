"""`precision` in a task file: in keys where it is not float32, refused where it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import InputError
from bench.gate.measurements import Question
from bench.report import tables
from bench.report.render.words import caption
from bench.report.tables import unexamined
from bench.results.conditions import conditions_of
from bench.runner.worker import describe
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Job, Train
from bench.suite.planner import Plan

TASKS = Path(__file__).parents[2] / "tasks.yaml"
COARSE = "bf16-search"
BASE: dict[str, Any] = {
    "data": {"digits": {"name": "digits", "split": "test", "size": 60, "shard": 25}},
    "defenses": {"linear": {"use": "toy/linear", "epochs": 1}},
    "attacks": {
        "clean": {"use": "none"},
        "pgd": {"use": "pgd", "steps": 3},
        "fgsm": {"use": "fgsm"},
    },
    "tasks": [
        {
            "data": "digits",
            "threat": {"norm": "linf", "radius": "1/10"},
            "views": ["logits"],
            "readouts": ["plain"],
        }
    ],
    "tables": {"t": {"title": "T", "rows": ["defense"], "columns": ["attack"]}},
}


def made(folder: Path, **changes: Any) -> Plan:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return planner.make(resolve.load(path))


def attacks(**changes: Any) -> dict[str, Any]:
    return {name: {**use, **changes.get(name, {})} for name, use in BASE["attacks"].items()}


def crafts(plan: Plan) -> dict[str, set[str]]:
    """Return the keys of the crafts of each attack."""
    return {each.coordinates["attack"]: {craft.key for craft in each.job.crafts} for each in plan.conditions}


def test_no_key_of_the_repositorys_tasks_changes_where_float32_is_said(tmp_path: Path) -> None:
    text, path = TASKS.read_text(encoding="utf-8"), tmp_path / "tasks.yaml"
    found = []
    for head in ("", "precision: float32\n"):
        path.write_text(head + text, encoding="utf-8")
        plan = planner.make(resolve.load(path))
        found.append(({job.key for job in plan.graph()}, plan.manifest()["conditions"]))
    assert len(found[0][0]) > 200
    assert found[0] == found[1]


def test_no_key_changes_where_nothing_is_said_or_float32_is(tmp_path: Path) -> None:
    plain, said = (
        made(tmp_path),
        made(tmp_path, precision="float32", attacks=attacks(pgd={"precision": "float32"})),
    )
    assert [each.job.key for each in plain.conditions] == [each.job.key for each in said.conditions]
    assert plain.manifest()["conditions"] == said.manifest()["conditions"]
    for each in plain.conditions:
        assert "precision" not in each.job.crafts[0].attack_run.identity
        assert "precision" not in each.facts


def test_the_precision_is_in_the_key_of_images_that_were_searched_for(tmp_path: Path) -> None:
    plain, coarse = made(tmp_path), made(tmp_path, precision=COARSE)
    before, now = crafts(plain), crafts(coarse)
    assert before["clean"] == now["clean"], "who looks at nothing searches nothing"
    for name in ("pgd", "fgsm"):
        assert not before[name] & now[name]

    def trainings(plan: Plan) -> set[Job]:
        return {job for job in plan.graph() if isinstance(job, Train)}

    assert trainings(plain) == trainings(coarse)
    for job in coarse.graph():
        if isinstance(job, Craft):
            searched = not job.attack_run.attack.entry.blind
            assert (describe(job)["attack_run"].get("precision") == COARSE) == searched


def test_an_attack_says_otherwise_than_its_file(tmp_path: Path) -> None:
    plain = crafts(made(tmp_path))
    of_file = crafts(made(tmp_path, precision=COARSE, attacks=attacks(fgsm={"precision": "float32"})))
    of_attack = crafts(made(tmp_path, attacks=attacks(pgd={"precision": COARSE})))
    assert of_file == of_attack
    assert of_file["fgsm"] == plain["fgsm"]
    assert of_file["pgd"] != plain["pgd"]


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ({"use": "none", "precision": COARSE}, "none cannot be searched in bfloat16: it looks at nothing"),
        ({"use": "spsa"}, None),
        ({"use": "spsa-released"}, "it draws for a whole shard, so that no example can be searched again"),
        ({"use": "toy/common"}, None),
        ({"use": "torchattacks/FGSM"}, "torchattacks computes by itself"),
        ({"use": "on-manifold"}, "it searches latent space"),
        ({"use": "latent-backtracking"}, "it searches inversion space"),
        ({"use": "pgd", "precision": "bf16"}, "precision: expected float32 or bf16-search, found 'bf16'"),
    ],
    ids=lambda value: value["use"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_or_left_alone(
    use: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    given = {**BASE, "attacks": {"odd": use}, "precision": COARSE}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    if said is None:
        resolve.load(path)
        return
    with pytest.raises(InputError, match=rf"suite.yaml:\d+: attacks.odd.*{said}"):
        resolve.load(path)


def test_attacks_of_one_worst_case_search_alike(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attacks: worst mode .* pgd in bf16-search, fgsm in float32"):
        made(tmp_path, worst=True, attacks=attacks(pgd={"precision": COARSE}))
    (coarse,) = {
        each.job.crafts[0].attack_run.precision
        for each in made(tmp_path, worst=True, precision=COARSE).conditions
        if each.coordinates["attack"] != "clean"
    }
    assert coarse == COARSE


def test_the_caption_names_the_attacks_that_searched_in_bfloat16(tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        return " ".join(
            caption(tables.cut(made(tmp_path, **changes).manifest(), "t", lambda key: None, unexamined))
        )

    assert "bfloat16" not in said()
    assert "Searched in bfloat16, judged in float32: pgd, fgsm." in said(precision=COARSE)
    only = said(attacks=attacks(fgsm={"precision": COARSE}))
    assert "Searched in bfloat16, judged in float32: fgsm." in only


def test_outcomes_of_two_precisions_are_not_compared(tmp_path: Path) -> None:
    def question(plan: Plan) -> Question:
        (asked,) = [each for each in plan.conditions if each.coordinates["attack"] == "pgd"]
        (condition,) = [each for each in conditions_of(plan.manifest()) if each.attack == "pgd"]
        return Question.of(describe(asked.job), condition.facts)

    before, now = question(made(tmp_path)), question(made(tmp_path, precision=COARSE))
    assert before.differences(now) == ["precision: float32 in the baseline, bf16-search now"]

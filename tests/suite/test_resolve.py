"""A suite is checked before anything runs, and each complaint names its place and the nearest right thing."""

import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bench.api import running
from bench.errors import InputError
from bench.runner.worker import describe
from bench.suite import planner, resolve
from bench.suite.jobs import Train

GOOD = """
data:
  digits: {name: digits, split: test, shard: 120}
defenses:
  linear: {use: toy/linear, epochs: 1}
attacks:
  clean: {use: none}
  pgd: {use: pgd, steps: 3}
tasks:
  - data: digits
    threat: {norm: linf, radius: 8/255}
    views: [logits]
tables:
  1:
    title: A table
    rows: [defense, readout]
    columns: [attack]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_a_good_suite_is_read(tmp_path: Path) -> None:
    suite = resolve.load(write(tmp_path, GOOD))
    assert suite.model.tasks[0].threat.radius == [8 / 255]
    assert suite.attacks["pgd"].params["steps"] == 3
    assert suite.attacks["pgd"].params["restarts"] == 1
    assert list(suite.model.tables) == ["1"]


BAD = [
    # what is replaced, by what, and what the message must contain
    ("steps: 3", "restart: 3", ["suite.yaml:8", "attacks.pgd.restart", "did you mean 'restarts'"]),
    ("use: pgd,", "use: pgdd,", ["suite.yaml:8", "unknown attack 'pgdd'", "did you mean 'pgd'"]),
    ("use: pgd,", "use: mylab/pgd,", ["suite.yaml:8", "unknown attack 'mylab/pgd'", "entry point 'mylab'"]),
    ("use: toy/linear", "use: toy/liner", ["suite.yaml:5", "did you mean 'toy/linear'"]),
    ("norm: linf", "norm: l7", ["suite.yaml:11", "tasks[0].threat.norm", "l7"]),
    (
        "{norm: linf, radius: 8/255}",
        "{norm: l0}\n    attacks: [pgd]",
        ["suite.yaml:11", "made for", "linf", "not 'l0'"],
    ),
    ("radius: 8/255", "radius: -1", ["suite.yaml:11", "tasks[0].threat.radius", "above 0", "-1"]),
    ("radius: 8/255", "radius: 8/0", ["suite.yaml:11", "8/0", "fraction"]),
    ("radius: 8/255", "radius: 1e999999999", ["suite.yaml:11", "expected a number", "1e999999999"]),
    ("radius: 8/255", "radius: 1/1e-99999999", ["suite.yaml:11", "expected a number", "1/1e-99999999"]),
    ("radius: 8/255", "radius: 1_0e0_999999999", ["suite.yaml:11", "expected a number", "1_0e0_999999999"]),
    ("radius: 8/255", "radius: true", ["suite.yaml:11", "number"]),
    ("views: [logits]", "views: [logit]", ["suite.yaml:12", "no view 'logit'", "did you mean 'logits'"]),
    ("    views: [logits]", "    veiws: [logits]", ["suite.yaml:12", "did you mean 'views'"]),
    ("- data: digits", "- data: digit", ["suite.yaml:10", "unknown data 'digit'", "did you mean 'digits'"]),
    ("steps: 3", "steps: three", ["suite.yaml:8", "attacks.pgd.steps", "three"]),
    ("steps: 3", "steps: yes", ["suite.yaml:8", "attacks.pgd.steps", "whole number"]),
    ("steps: 3", "targets: [true]", ["suite.yaml:8", "attacks.pgd.targets", "whole number"]),
    ("views: [logits]", "limit: yes", ["suite.yaml:12", "tasks[0].limit", "whole number"]),
    ("views: [logits]", "seeds: [0, no]", ["suite.yaml:12", "tasks[0].seeds[1]", "whole number"]),
    ("[logits]", "[{use: logits, draws: yes}]", ["suite.yaml:12", "tasks[0].views[0].draws", "whole number"]),
    ("name: digits", "name: digitz", ["suite.yaml:3", "did you mean 'digits'"]),
    ("tasks:\n", "tasks: []\nother:\n", ["suite.yaml"]),
    ("epochs: 1}", "epochs: 1, inference: {treshold: 1}}", ["suite.yaml:5", "did you mean 'threshold'"]),
    ("epochs: 1}", "epochs: 1, inference: {threshold: much}}", ["suite.yaml:5", "much"]),
    (
        "use: toy/linear, epochs: 1",
        "use: module, build: 'a:b', weights: ~nosuch/x.pt",
        ["suite.yaml:5", "no user of th"],
    ),
    (
        "use: toy/linear, epochs: 1",
        f"use: module, build: 'a:b', weights: {'x' * 300}",
        ["suite.yaml:5", "no such file"],
    ),
    (
        "name: digits",
        "name: image-folder, path: ~nosuch/x",
        ["suite.yaml:3", "no user of that name: ~nosuch/x"],
    ),
    ("name: digits", f"name: image-folder, path: {'x' * 300}", ["suite.yaml:3", "no such folder"]),
    ("columns: [attack]", "columns: [atack]", ["atack", "did you mean 'attack'"]),
    (
        "defenses:\n  linear",
        "defenses:\n  linear: {use: toy/linear}\n  linear",
        ["suite.yaml:6", "stands twice", "line 5"],
    ),
    ("steps: 3", "steps: !!python/object/apply:os.system [ls]", ["suite.yaml:8", "python/object"]),
    ("tasks:", "tasks: [", ["suite.yaml:", "not plain YAML"]),
    ("pgd: {use: pgd,", "pgd: {use: pgd, source: {defense: liner, view: logits},", ["did you mean 'linear'"]),
    (
        "clean: {use: none}",
        "clean: {use: none, source: {defense: linear, view: logits}}",
        ["no use for a source"],
    ),
    (
        "rows: [defense, readout]",
        "rows: [defense]",
        ["suite.yaml", "table '1' hides readout: ['plain', 'reject']"],
    ),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=[new[:30] for _, new, _ in BAD])
def test_bad_input_gets_one_clear_message(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        running.planned(write(tmp_path, GOOD.replace(old, new, 1)), tmp_path / "results", None)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_missing_suite_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"no such file; did you mean 'suite\.yaml'"):
        resolve.load(tmp_path / "suit.yaml")


def test_the_inner_attack_is_checked_and_filled_in(tmp_path: Path) -> None:
    text = GOOD.replace(
        "linear: {use: toy/linear, epochs: 1}",
        "linear: {use: cnn, training: adversarial, epochs: 1, inner: {use: pgd, steps: 2, step_size: 1/40}}",
    ).replace("views: [logits]", "views: [first]")
    suite = resolve.load(write(tmp_path, text))
    inner = suite.defenses["linear"].params["inner"]
    assert inner["step_size"] == 1 / 40
    assert inner["loss"] == "ce"
    with pytest.raises(InputError, match=r"inner\.stepz: unknown key; did you mean 'steps?'"):
        resolve.load(write(tmp_path, text.replace("steps: 2", "stepz: 2")))
    with pytest.raises(InputError, match="unknown attack 'pgx'"):
        resolve.load(write(tmp_path, text.replace("{use: pgd, steps: 2", "{use: pgx, steps: 2")))


def test_parts_must_exist_and_not_go_round(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 1}", "epochs: 1}\n  top: {use: toy/stacked, base: linear}")
    assert resolve.load(write(tmp_path, text)).defenses["top"].params["base"] == "linear"
    with pytest.raises(InputError, match="did you mean 'linear'"):
        resolve.load(write(tmp_path, text.replace("base: linear", "base: linera")))
    with pytest.raises(InputError, match="circle"):
        resolve.load(write(tmp_path, text.replace("base: linear", "base: top")))


def test_a_chain_of_defenses_is_planned_or_refused_in_a_sentence(tmp_path: Path) -> None:
    first = "linear: {use: toy/linear, epochs: 1}"

    def chain(length: int) -> Path:
        names = ["linear", *(f"d{number}" for number in range(1, length))]
        links = [f"  {name}: {{use: toy/stacked, base: {below}}}" for below, name in pairwise(names)]
        return write(tmp_path, GOOD.replace(first, "\n".join([first, *links])))

    def all_of_it() -> set[str]:
        deepest = planner.make(resolve.load(chain(resolve.DEEPEST)))
        trains = [job for job in deepest.graph() if isinstance(job, Train)]
        # Each by itself: of several together the first would bring the others.
        return {str(describe(pickle.loads(pickle.dumps(each)))["key"]) for each in trains}

    def called(depth: int) -> set[str]:
        return called(depth - 1) if depth else all_of_it()

    # Whoever plans or sends a job has used some of the stack.
    assert len(called(3 * sys.getrecursionlimit() // 10)) == resolve.DEEPEST
    with pytest.raises(InputError, match=r"d100 is built on more than 99 defenses, each on the next"):
        resolve.load(chain(resolve.DEEPEST + 1))


PLANNED = GOOD.replace(
    "  pgd: {use: pgd, steps: 3}",
    "  pgd: {use: pgd, steps: 3}\n"
    "  cw: {use: not-yet, planned: it comes with the minimal attacks, kappa: 500, targets: next}",
)


def test_an_attack_may_be_planned_and_keeps_its_settings(tmp_path: Path) -> None:
    planned = resolve.load(write(tmp_path, PLANNED)).attacks["cw"]
    assert isinstance(planned, resolve.Planned)
    assert (planned.name, planned.reason) == ("not-yet", "it comes with the minimal attacks")
    assert planned.identity["params"] == {"kappa": 500}


def test_what_is_there_is_not_planned_and_what_is_not_there_must_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attacks\.cw\.planned: fgsm is there now; take this key out"):
        resolve.load(write(tmp_path, PLANNED.replace("not-yet", "fgsm")))
    with pytest.raises(InputError, match="unknown attack 'not-yet'"):
        resolve.load(write(tmp_path, PLANNED.replace("planned: it comes with the minimal attacks, ", "")))
    with pytest.raises(InputError, match="planned"):
        resolve.load(write(tmp_path, PLANNED.replace("it comes with the minimal attacks", '""')))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps: 3", "steps: 3, step: 0.01", "step is called step_size now"),
        ("use: toy/linear", "use: toy/linear, serve: {threshold: 0.5}", "serve is called inference now"),
    ],
)
def test_an_older_task_file_is_told_what_a_word_is_called_now(
    old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=sentence):
        resolve.load(write(tmp_path, GOOD.replace(old, new, 1)))

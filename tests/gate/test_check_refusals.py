"""What the gate refuses: each in one sentence, with exit status 2, and nothing that was there is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import InputError
from bench.gate import baseline
from bench.results.seals import seal
from suites import TASK, Ran, suite

DEFENSES = {"model": {"use": "toy/linear"}}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}, "fgsm": {"use": "fgsm"}}
TASKS = [{**TASK, "views": ["logits"]}]
FILES = (baseline.INDEX, baseline.OUTCOMES, baseline.REPLAY)


def bench(*words: Any) -> Any:
    """Run the command line in this process; what it refuses is raised as `InputError`."""
    return CliRunner().invoke(app, list(map(str, words)))


def refused(found: Any) -> str:
    """Return the one sentence of a refusal, which `bench.cli.main` ends with 2."""
    assert isinstance(found.exception, InputError), found.output
    (line,) = str(found.exception).splitlines()
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    path = suite(folder, DEFENSES, ATTACKS, TASKS)
    assert not Ran(path).failed
    saved = bench("baseline", "save", path, "--out", folder / "robustness", "--results", folder / "results")
    assert saved.exit_code == 0, saved.output
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of a suite with results and a baseline."""
    return Path(shutil.copytree(made, tmp_path / "gate"))


@pytest.fixture
def check(folder: Path) -> Callable[..., Any]:
    def run(*more: Any) -> Any:
        places = ("--baseline", folder / "robustness", "--results", folder / "results")
        return bench("check", folder / "suite.yaml", *places, "--executor", "inline", *more)

    return run


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    path = folder / "robustness" / baseline.INDEX
    told = json.loads(path.read_text())
    edit(told)
    path.write_text(json.dumps(seal(told) if sealed else told))


def test_equal_weights_are_held_by_images_alone(check):
    found = check("--replay")
    assert found.exit_code == 0, found.output


PLACES = [
    ("suite",),
    ("versions", "torch"),
    ("data", 0),
    ("attacks", 1, "params", "steps"),
    ("conditions", 0, "question", "n"),
    ("conditions", 1, "network"),
    ("conditions", 1, "coordinates", "radius"),
    ("conditions", 1, "job"),
    ("conditions", 1, "facts", "idle"),
    ("runs", 0, "stop"),
    ("history", 0, "reason"),
    ("history", 0, "numbers"),
    ("files", baseline.OUTCOMES),
    ("digest",),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_an_edited_index_is_refused(folder, place):
    def edit(told: Any) -> None:
        *way, last = place
        for each in way:
            told = told[each]
        told[last] = "edited"

    rewrite(folder, edit, sealed=False)
    with pytest.raises(InputError, match=r"edited by hand, or not whole; take it from git"):
        baseline.read(folder / "robustness")


def everywhere(told: Any, way: tuple[Any, ...] = ()) -> Any:
    items = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    for name, value in items:
        yield (*way, name)
        yield from everywhere(value, (*way, name))


def test_no_value_that_a_program_sealed_raises_anything_else(folder):
    root = folder / "robustness"
    whole = json.loads((root / baseline.INDEX).read_text())
    for place in everywhere(whole):
        for value in (None, "x", -1, [], {}, 1e308):

            def edit(told: Any, place: Any = place, value: Any = value) -> None:
                *way, last = place
                for each in way:
                    told = told[each]
                told[last] = value

            (root / baseline.INDEX).write_text(json.dumps(whole))
            rewrite(folder, edit)
            try:
                baseline.read(root, replays=True)
            except InputError as error:
                assert str(root) in str(error)  # noqa: PT017 - many of these edits change no meaning


def test_a_condition_that_was_cut_out_is_missed(folder):
    rewrite(folder, lambda told: told["conditions"].pop())
    with pytest.raises(InputError, match="other conditions"):
        baseline.read(folder / "robustness")


def test_a_share_that_is_none_is_refused(folder):
    rewrite(folder, lambda told: told["history"][0].update(numbers={"a": [1.5, 10]}))
    with pytest.raises(InputError, match=r"1\.5 of 10 examples"):
        baseline.read(folder / "robustness")


@pytest.mark.parametrize("how", ["truncated", "empty", "gone", "a folder", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_and_named(folder, check, name, how):
    path = folder / "robustness" / name
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"truncated": content[:-9], "empty": b"", "noise": b"\xff\xfe\0" * 99}[how])
    assert str(path) in refused(check("--replay"))


def test_a_newer_baseline_is_refused(folder, check):
    rewrite(folder, lambda told: told.update(format=2))
    assert "made by a newer Crossfire" in refused(check("--replay"))


def test_images_of_another_run_are_refused(folder, check):
    path = folder / "robustness" / baseline.REPLAY
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert "not the file that baseline.json names" in refused(check("--replay"))


def test_a_second_save_loses_nothing(folder):
    root = folder / "robustness"
    before = {name: (root / name).read_bytes() for name in FILES}
    said = refused(
        bench("baseline", "save", folder / "suite.yaml", "--out", root, "--results", folder / "results")
    )
    assert "bench baseline accept" in said
    assert {name: (root / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("words", [["save", "--out"], ["accept", "--reason", "x", "--baseline"]])
def test_a_missing_result_is_no_baseline(folder, words):
    shutil.rmtree(next((folder / "results" / "evaluate").iterdir()))
    root = folder / ("other" if words[0] == "save" else "robustness")
    before = {path.name: path.read_bytes() for path in root.glob("*")}
    said = refused(
        bench("baseline", words[0], folder / "suite.yaml", *words[1:], root, "--results", folder / "results")
    )
    assert "to do before a baseline can be saved: bench run" in said
    assert {path.name: path.read_bytes() for path in root.glob("*")} == before


def test_a_blank_reason_is_none(folder):
    root = folder / "robustness"
    found = bench("baseline", "accept", folder / "suite.yaml", "--reason", " \n", "--baseline", root)
    assert "expected why the numbers may be others" in refused(found)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"tolerance": -1}, "expected a number of 0 or more, found -1"),
        ({"tolerance": "abc"}, "expected a number or a fraction"),
        ({"tolerance": 1e9}, "expected a number of 100 or less"),
        ({"tolerance": "nan"}, "expected a number"),
        ({"tolerance": float("nan")}, "expected a decimal number"),
        ({"tolerence": 1}, "did you mean 'tolerance'?"),
        ({"alpha": 0}, "expected a number above 0"),
        ({"floors": {"modle": 50}}, "unknown defense 'modle'; did you mean 'model'?"),
        ({"floors": {"model": 101}}, "expected a number of 100 or less"),
        ({"tiers": {"critical": [{"atack": "pgd"}]}}, "unknown coordinate 'atack'; did you mean 'attack'?"),
        ({"tiers": {"advisory": [{"attack": "pdg"}]}}, "no condition has 'pdg'; did you mean 'pgd'?"),
        ({"tiers": {"critical": []}}, "expected at least 1 entry"),
        ({"tiers": {"critical": [{}]}}, "expected coordinates such as {attack: spsa}"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_at_its_line(folder, check, policy, said):
    path = folder / "suite.yaml"
    lines = len(path.read_text().splitlines())
    path.write_text(path.read_text() + "check: " + yaml.safe_dump(policy, default_flow_style=True))
    line = refused(check("--replay"))
    assert line.startswith(f"{path.name}:{lines + 1}: check.")
    assert said in line


# --- what is answered, but never with 0 --------------------------------------------------------------


def changed(folder: Path, edit: Callable[[Any], Any]) -> None:
    path = folder / "suite.yaml"
    document = yaml.safe_load(path.read_text())
    edit(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda suite: suite["attacks"]["pgd"].update(steps=4), "attack.params.steps: 3 in the baseline, 4"),
        (lambda suite: suite["data"]["digits"].update(size=50), "data: other examples than the baseline's"),
        (lambda suite: suite["data"]["digits"].update(split="train"), "data: other examples"),
        (
            lambda suite: suite["tasks"][0]["threat"].update(radius=0.2),
            "radius: 0.1 in the baseline, 0.2 now",
        ),
        (lambda suite: suite["tasks"][0].update(seeds=[1]), "nothing asks for it any more"),
        (lambda suite: suite["attacks"].pop("fgsm"), "nothing asks for it any more"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--replay"]], ids=["attacks", "images alone"])
def test_another_question_is_not_comparable_and_says_how(folder, check, tmp_path, edit, said, words):
    changed(folder, edit)
    found = check(*words, "--json", tmp_path / "found.json")
    assert found.exit_code == 3, found.output
    assert said in (tmp_path / "found.json").read_text()


def test_nothing_critical_is_never_green(folder, check):
    changed(folder, lambda suite: suite.update(check={"tiers": {"advisory": ["model"]}}))
    assert check("--replay").exit_code == 4


def test_without_images_a_check_attacks_and_says_so(folder, check):
    (folder / "robustness" / baseline.REPLAY).unlink()
    found = check()
    assert found.exit_code == 0, found.output
    assert "no images to show again" in found.output


@pytest.mark.parametrize("option", ["--junit", "--json", "--markdown", "--badge"])
def test_a_form_that_cannot_be_written_is_refused_before_any_work(
    check: Callable[..., Any], folder: Path, option: str
) -> None:
    before = sorted((folder / "results").rglob("*"))
    assert refused(check(option, folder / "nowhere" / "x")).startswith(f"{option} {folder}")
    assert sorted((folder / "results").rglob("*")) == before

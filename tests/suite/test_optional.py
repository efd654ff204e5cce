"""Attacks of libraries that may be absent: dashes with their reason, and all other numbers the same."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import InputError
from bench.suite import resolve
from suites import TASK, suite

pytest.importorskip("torchattacks")
pytest.importorskip("foolbox")

NET: dict[str, Any] = {"net": {"use": "standard", "net": "b2", "epochs": 2, "batch": 30, "augment": False}}
PGD: dict[str, Any] = {"steps": 5, "random_start": False, "optional": True}
ATTACKS: dict[str, Any] = {
    "ours": {"use": "pgd", "steps": 5, "step_size": 0.03, "start": "zero", "keep": "last"},
    "theirs": {"use": "torchattacks/PGD", "alpha": 0.03, **PGD},
    "others": {"use": "foolbox/LinfPGD", "abs_stepsize": 0.03, **PGD},
}
TABLE: dict[str, Any] = {
    "title": "PGD three times",
    "rows": ["defense"],
    "columns": {name: {"attack": name} for name in ATTACKS},
}
WITHOUT = """\
import sys
sys.modules["torchattacks"] = sys.modules["foolbox"] = None
sys.argv = ["bench", "run", "suite.yaml", "--results", "without", "--executor", "inline"]
from bench.cli import main
main()
"""


def cells(folder: Path) -> dict[str, dict[str, str]]:
    (path,) = (folder / "tables").glob("*.csv")
    with path.open() as file:
        return {row["column"]: row for row in csv.DictReader(file)}


def test_three_implementations_give_one_number_and_dashes_where_they_are_absent(tmp_path: Path) -> None:
    path = suite(tmp_path, NET, ATTACKS, [TASK], tables={"t": TABLE})
    for words in (
        ["-m", "bench", "run", path.name, "--results", "with", "--executor", "inline"],
        ["-c", WITHOUT],
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    there, absent = cells(tmp_path / "with"), cells(tmp_path / "without")
    # An attack from the image itself draws nothing.
    assert there["ours"]["value"] == there["theirs"]["value"] == there["others"]["value"] != ""
    assert absent["ours"]["value"] == there["ours"]["value"]
    said = " ".join(done.stdout.split())
    for name, why in (("theirs", "torchattacks is not installed"), ("others", "foolbox cannot be imported")):
        assert absent[name]["value"] == ""
        assert why in said
    assert said.count("crossfire-bench[libraries]") == 2


def test_the_three_of_the_main_table_have_the_same_settings() -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "tasks.yaml").read_text())
    asked = {name: document["attacks"][f"pgd-{name}"] for name in ("ours", "torchattacks", "foolbox")}
    sizes = [asked["ours"]["step_size"], asked["torchattacks"]["alpha"], asked["foolbox"]["abs_stepsize"]]
    assert len(set(sizes)) == 1
    assert len({each["steps"] for each in asked.values()}) == 1
    assert asked["ours"]["start"] == "zero"
    assert not asked["torchattacks"]["random_start"]
    assert not asked["foolbox"]["random_start"]
    assert not asked["ours"].get("optional")
    assert asked["torchattacks"]["optional"]
    assert asked["foolbox"]["optional"]


def test_a_name_that_is_none_is_an_error_however_optional(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchattacks/PDG"):
        resolve.load(suite(tmp_path, NET, {"a": {"use": "torchattacks/PDG", "optional": True}}, [TASK]))

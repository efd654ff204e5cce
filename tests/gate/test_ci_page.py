"""docs/ci.md says what is so: the statuses, the template's task file, inputs and options."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.gate.verdicts import STATUS, WORST_FIRST
from bench.pytest_plugin import pytest_addoption

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def rows(heads: str) -> list[list[str]]:
    """Return the cells of the table with these headings."""
    (table,) = re.findall(rf"^\| {re.escape(heads)} \|\n\|[-: |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def tables() -> list[list[list[str]]]:
    found = re.findall(r"^\| \w+ \| default \| meaning \|\n\|[-: |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in found
    ]


def block(name: str) -> Any:
    (text,) = re.findall(rf"^```yaml\n# file: {re.escape(name)}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text)


def test_the_statuses_are_listed() -> None:
    listed = {row[1]: int(row[0]) for row in rows("Status | Verdict | Meaning")}
    assert listed == {**STATUS, "usage": 2}
    assert f"*{', '.join(WORST_FIRST)}*" in PAGE


def test_the_task_file_is_that_of_the_template() -> None:
    assert block("tasks.yaml") == yaml.safe_load((ROOT / "examples" / "ci" / "tasks.yaml").read_text())


def test_the_inputs_of_the_action_are_listed() -> None:
    action = yaml.safe_load((ROOT / ".github" / "actions" / "robustness" / "action.yml").read_text())
    listed = [name for row in tables()[0] for name in re.findall(r"`([\w-]+)`", row[0])]
    assert sorted(listed) == sorted(action["inputs"])
    used = block(".github/workflows/robustness.yml")["jobs"]["robustness"]["steps"][-1]
    assert set(used["with"]) <= set(action["inputs"])


def test_the_options_of_the_plugin_are_listed() -> None:
    parser = pytest.Parser(_ispytest=True)
    pytest_addoption(parser)
    (group,) = (each for each in parser._groups if each.name == "robustness")
    known = {name for option in group.options for name in option.names()}
    listed = {row[0].strip("`").split()[0] for row in tables()[1]}
    assert listed == known - {"--robustness-baseline"}

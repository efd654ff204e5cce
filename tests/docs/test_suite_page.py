"""docs/suite.md lists every key of a task file, with its default, as the models that check it have them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from bench.suite.policy import Policy, Tiers
from bench.suite.schema import AttackUse, DefenseUse, Origin, SuiteModel, Task, Threats, ViewUse
from bench.suite.tables import Comparison, Figure, Table

PAGE = Path(__file__).parents[2] / "docs" / "suite.md"
MODELS: dict[str, type[BaseModel]] = {
    "## What stands in it": SuiteModel,
    "### `defenses`": DefenseUse,
    "### `attacks`": AttackUse,
    "`source`:": Origin,
    "### `tasks`": Task,
    "`threat`:": Threats,
    "A view is a name, or a mapping:": ViewUse,
    "### `tables`": Table,
    "`figure`:": Figure,
    "`published`:": Comparison,
    "### `check`": Policy,
    "`tiers`:": Tiers,
}
"""By the line above a table of keys: the model that it lists."""


def listed(text: str) -> dict[str, dict[str, str]]:
    """Return the tables of keys of a page: by the nearest line of `MODELS` above it, a default by its key."""
    found: dict[str, dict[str, str]] = {}
    above = ""
    for line in text.splitlines():
        if line in MODELS or line.startswith("#"):
            above = line
        cells = [each.strip() for each in line.strip("|").split("|")]
        if above in MODELS and line.startswith("|") and cells[0] != "key" and not cells[0].startswith(":"):
            rows = found.setdefault(above, {})
            assert cells[0] not in rows, f"{above}: {cells[0]} stands twice"
            assert cells[2], f"{above}: {cells[0]} has no meaning"
            rows[cells[0]] = cells[1]
    return found


def meanings(text: str) -> dict[str, dict[str, str]]:
    """Return what the tables of keys of a page say, by the nearest line of `MODELS` above them."""
    found: dict[str, dict[str, str]] = {}
    above = ""
    for line in text.splitlines():
        if line in MODELS or line.startswith("#"):
            above = line
        if above in MODELS and line.startswith("| "):
            key, _, meaning = (each.strip() for each in line.strip("|").split("|"))
            found.setdefault(above, {})[key] = meaning
    return found


def agrees(said: str, default: Any) -> bool:
    """Return whether a default is written as it is; words stand for what no YAML says."""
    if default is None or default in ([], {}, [math.inf], Policy(), Tiers()):
        return re.fullmatch(r"[\w' ]+|the `train` split", said) is not None
    return said.startswith("`") and bool(yaml.safe_load(said.strip("`")) == default)


TABLES = listed(PAGE.read_text(encoding="utf-8"))


def test_every_model_has_its_table() -> None:
    assert set(TABLES) == set(MODELS)


@pytest.mark.parametrize("above", MODELS)
def test_a_table_lists_the_keys_of_its_model(above: str) -> None:
    model, rows = MODELS[above], dict(TABLES[above])
    others = rows.pop("any other", None)
    assert (others is not None) == (model.model_config.get("extra") == "allow")
    assert set(rows) == {f"`{name}`" for name in model.model_fields}
    for name, info in model.model_fields.items():
        said = rows[f"`{name}`"]
        assert (said == "*required*") == info.is_required(), name
        assert info.is_required() or agrees(said, info.default), f"{name}: {said} for {info.default!r}"


def meant(text: str) -> str:
    """Return a meaning without what only a page has: links, and where on it more stands."""
    bare = re.sub(r", see \*[^*]+\* below", "", re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text))
    return " ".join(bare.split()).rstrip(".")


@pytest.mark.parametrize("above", MODELS)
def test_a_key_means_on_the_page_what_its_model_and_the_schema_say(above: str) -> None:
    model, said = MODELS[above], meanings(PAGE.read_text(encoding="utf-8"))[above]
    for name, info in model.model_fields.items():
        ours = meant(said[f"`{name}`"])
        assert info.description is not None, name
        assert f"{ours[0].upper()}{ours[1:]}" == " ".join(info.description.split()).rstrip("."), name


def test_no_model_of_a_task_file_is_left_out() -> None:
    """Every object of the JSON Schema that has keys of its own is listed; `data` has a page of its own."""
    schema = SuiteModel.model_json_schema()
    objects = {name for name, each in schema["$defs"].items() if each.get("properties")}
    assert objects | {"SuiteModel"} == {model.__name__ for model in MODELS.values()}


def test_a_key_that_is_missing_or_too_much_is_seen() -> None:
    rows = listed(
        "## What stands in it\n\n| key | default | meaning |\n| :-- | :-- | :-- |\n| `dat` | none | x |\n"
    )
    assert rows == {"## What stands in it": {"`dat`": "none"}}
    assert not agrees("`[1]`", [0])
    assert not agrees("none", "none")
    assert not agrees("`accuracy`", None)

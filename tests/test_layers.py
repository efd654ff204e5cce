"""The direction of imports is a test, and every component has its row and its words."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from bench.registry import Entry

ROOT = Path(__file__).parent.parent


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run(
        [lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, found.stdout


def test_every_module_of_the_harness_has_its_layer() -> None:
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = [each for each in config["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    placed = {name.strip() for layer in layers["layers"] for name in re.split("[|:]", layer)}
    modules = {path.stem for path in (ROOT / "bench").glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "bench").glob("*/__init__.py")}
    assert placed == {f"bench.{name}" for name in modules | packages}


def test_every_attack_and_defense_has_a_file_of_its_own() -> None:
    from bench.registry import ATTACKS, DEFENSES

    for registry, folder in ((ATTACKS, "attacks"), (DEFENSES, "defenses")):
        ours = [registry[name] for name in registry if registry[name].module.startswith(f"{folder}.")]
        files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        # What is a folder of its own registers itself from anywhere in it; shared ones register nothing.
        folders = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")} - {"common", "nets"}
        assert {entry.module.split(".")[1] for entry in ours} == files | folders


def names(entry: Entry) -> list[str]:
    return [info.alias or name for name, info in entry.schema.model_fields.items()]


def test_every_parameter_of_a_defense_and_of_its_views_is_documented() -> None:
    from bench.registry import DEFENSES, discover

    discover()
    ours = [DEFENSES[name] for name in DEFENSES if DEFENSES[name].module.startswith("defenses.")]
    assert len(ours) == 11
    for entry in ours:
        for each in (entry, *entry.views.values()):
            text = inspect.getdoc(each.make) or ""
            missing = [name for name in names(each) if f"\n    {name}: " not in text]
            assert not missing, f"{each.name} of {entry.name}: {missing}"

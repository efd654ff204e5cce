"""The direction of imports is a test, and every component has its row and its words."""

import subprocess
import sys
from pathlib import Path

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
    placed = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
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

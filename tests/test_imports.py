"""Files beside the task file are run where a defense means them, and for nobody else."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.errors import InputError
from bench.results import fingerprint

TRIED = ("uarray", "cython", "numba", "torch", "cupy", "IPython")
"""Names that torch, scipy, pandas and others try to import, and do without."""

LIBRARY = """
import importlib.util
found = []
for name in {tried!r}:
    if importlib.util.find_spec(name) is not None:
        found.append(name)
try:
    import beside
    found.append("beside")
except ImportError:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A suite's folder: a named module, what it imports at once, later and by name, and what nobody means."""
    home = tmp_path / "suite"
    (home / "parts").mkdir(parents=True)
    (home / "mine.py").write_text(
        "import importlib\nimport beside\n"
        "def build():\n"
        "    import later\n"
        "    from parts import layers\n"
        "    return beside.VALUE, later.VALUE, layers.VALUE, importlib.import_module('by_name').VALUE\n"
    )
    for number, name in enumerate(["beside", "later", "parts/layers", "by_name"]):
        (home / f"{name}.py").write_text(f"VALUE = {number}\n")
    for name in TRIED:
        (home / f"{name}.py").write_text(f"open({str(tmp_path / name)!r}, 'w')\n")
    before = dict(sys.modules)
    yield home
    fingerprint.importable(tmp_path)
    assert not {"mine", "beside", "later", "parts", "by_name"} & set(sys.modules) - set(before)


def test_modules_find_their_neighbours_at_once_later_and_by_name(folder: Path) -> None:
    digests = fingerprint.code_digests("mine:build", folder)
    assert list(digests) == ["beside", "later", "mine", "parts.layers"]
    module = importlib.import_module("mine")
    assert module.build() == (0, 1, 2, 3)


def test_libraries_find_none_of_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "alibrary.py").write_text(LIBRARY.format(tried=("uarray", "cython", "later")))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    fingerprint.importable(folder)
    assert importlib.import_module("alibrary").found == []
    for name in ("uarray", "mine", "beside"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_another_suite_s_modules_of_the_same_names_are_its_own(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.py").write_text("def build():\n    return 'other'\n")
    first = fingerprint.code_digests("mine:build", folder)
    assert importlib.import_module("mine").build() == (0, 1, 2, 3)
    assert list(fingerprint.code_digests("mine:build", other)) == ["mine"]
    assert importlib.import_module("mine").build() == "other"
    assert fingerprint.code_digests("mine:build", folder) == first
    assert importlib.import_module("mine").build() == (0, 1, 2, 3)


def test_a_virtual_environment_in_the_folder_is_not_the_user_s_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = folder / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "installed_thing.py").write_text("import more\n")
    monkeypatch.syspath_prepend(packages)
    (folder / "mine.py").write_text("import installed_thing, beside\n")
    assert list(fingerprint.code_digests("mine:build", folder)) == ["beside", "mine"]


def test_a_plan_and_a_run_execute_only_what_a_defense_names(folder: Path, tmp_path: Path) -> None:
    (folder / "mynet.py").write_text(
        "import scipy.stats\nfrom torch import nn\n"
        "def build():\n    import later\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    suite = folder / "suite.yaml"
    suite.write_text(
        "data: {d: {name: digits, size: 20}}\n"
        "defenses: {mine: {use: module, build: 'mynet:build'}}\n"
        "attacks: {clean: {use: none}, a: {use: torchattacks/FGSM}, b: {use: foolbox/LinfPGD, steps: 1}}\n"
        "tasks: [{data: d, threat: {norm: linf, radius: 0.1}}]\n"
    )
    environment = {**os.environ, "BENCH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for command in (["plan"], ["run", "--executor", "inline"]):
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", command[0], str(suite), *command[1:], "--results", "r"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not [name for name in TRIED if (tmp_path / name).exists()]


@pytest.mark.parametrize("top", ["defenses", "attacks", "bench", "torch"])
def test_a_module_of_a_folder_that_a_package_hides_is_refused(top: str, tmp_path: Path) -> None:
    (tmp_path / top).mkdir()
    (tmp_path / top / "mynet.py").write_text("class Net: ...\n")
    (tmp_path / "usernet.py").write_text(f"from {top}.mynet import Net\n")
    (tmp_path / "later.py").write_text("import usernet\n")
    whose = "another" if top == "torch" else "Crossfire's own"
    said = f"module '{top}.mynet' cannot be .*mynet.py: '{top}' is the name of {whose} package"
    for named in (f"{top}.mynet:Net", "usernet:Net", "later:usernet"):
        with pytest.raises(InputError, match=said):
            fingerprint.code_digests(named, tmp_path)


def test_modules_of_packages_are_found_beside_a_folder_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "standard.py").write_text("")
    (tmp_path / "mine.py").write_text("from defenses.standard import Standard\nfrom torch import nn\n")
    assert "mine" in fingerprint.code_digests("mine:build", tmp_path)

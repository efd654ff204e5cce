"""The notebook and the gallery of `examples/` run as they stand, from any folder and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

path = sys.argv[1]
notebook = nbformat.read(path, as_version=4)
assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without its outputs"
client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}})
done = client.execute()
kinds = {kind for cell in done.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
assert {"image/png", "text/html"} <= kinds, kinds
"""


def done(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_OFFLINE": "1", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_says_something(path: Path, tmp_path: Path) -> None:
    ran = done("-W", "error", str(path), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "%" in ran.stdout
    assert (path.read_text().partition("\n")[0]).startswith('"""')


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    ran = done("-c", EXECUTE, str(path), str(EXAMPLES), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_there_is_a_gallery() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == {
        "first_look.ipynb",
        "least_distance.py",
        "mi_fgsm.py",
        "own_attack.py",
        "own_network.py",
        "task_file.py",
    }

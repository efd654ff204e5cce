"""The code of the documentation's guide runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_guides_python_runs_on_what_the_readmes_task_file_leaves(tmp_path: Path) -> None:
    """Write the README's files, run its task file, and read the results from Python as the guide says."""
    for text in [*blocks(ROOT / "README.md", "python"), *blocks(ROOT / "README.md", "yaml")]:
        head, _, body = text.partition("\n")
        if head in ("# file: mynets.py", "# file: mine.yaml"):
            (tmp_path / head.removeprefix("# file: ")).write_text(body)
    code = "\n".join(blocks(ROOT / "docs" / "own-model.md", "python"))
    facts = """
assert len(result.frame) == len(y) and result.images.shape == x.shape
assert len(table) and {"Clean", "PGD", "SPSA"} <= {*map(str, table.columns), *map(str, table.to_numpy().flat)}
assert len(outcomes) and len(images.images)
assert defense.eval()(x).shape == (len(x), 10)
"""
    for command in (
        ["-m", "bench.cli", "run", "mine.yaml", "--executor", "inline"],
        ["-c", code + facts],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

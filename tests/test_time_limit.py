"""The limit of time that every test has."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

HANGS = """
from bench.runner.limits import limited

def test_hangs():
    with limited(1000):
        while True:
            pass
"""


def test_a_test_that_hangs_fails_though_it_has_an_alarm_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGS)
    options = ["-c", str(REPOSITORY / "pyproject.toml"), "-o", "timeout=2"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "+ Timeout +" in said
    assert "in test_hangs" in said

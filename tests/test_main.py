"""The command line is there under the package's name too."""

import subprocess
import sys


def test_the_package_is_run_as_the_command_line() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "report" in found.stdout
    assert "bench" in found.stdout

"""What a number was made with: the commit, the versions of the libraries, the processor."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder is of, with a mark if something was changed since; None outside one.

    Args:
        folder: Any folder.
    """
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@cache
def versions() -> dict[str, str]:
    """Return the versions of everything that a number may depend on.

    Returns:
        The versions of Python and of the libraries, by name.
    """
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("crossfire-bench", "torch", "torchvision", "numpy")},
    }


@cache
def processor() -> str:
    """Return the model of this machine's processor.

    Returns:
        The model, or the architecture where the model is not known.
    """
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

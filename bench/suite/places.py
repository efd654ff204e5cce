"""Where the results of a task file lie, unless somebody says otherwise."""

from pathlib import Path

from bench.errors import InputError
from bench.suite import yaml_source


def results_folder(suite: Path, given: Path | None = None) -> Path:
    """Return the results folder of a task file.

    Args:
        suite: The task file, which need not be there any more.
        given: The folder that was asked for.

    Returns:
        `given`; or what the file's key ``results`` says, relative to the file; or ``results/<suite>`` in the
        working directory where the file lies in it or below, and else beside the file.
    """
    if given is not None:
        return given
    folder = suite.resolve().parent
    try:
        document = yaml_source.read(suite).data if suite.is_file() else {}
    except InputError:
        # Whoever reads the file says so.
        document = {}
    said = document.get("results") if isinstance(document, dict) else None
    if isinstance(said, str):
        return _near(folder / Path(said).expanduser())
    here = Path.cwd()
    home = Path("results") if folder.is_relative_to(here) else folder / "results"
    return home / suite.stem


def _near(place: Path) -> Path:
    """Return a path relative to the working directory where it lies below."""
    resolved = place.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved

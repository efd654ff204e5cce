"""Where Crossfire's own attacks and defenses lie: beside `bench`, whatever else has their names.

A folder `attacks/` in the working directory, or beside a script, comes first on the import path; it is the
user's, and neither runs as ours nor is taken for it where code is looked at.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from bench.errors import InputError

OURS = frozenset({"attacks", "defenses"})
"""Packages whose modules are followed wherever a component imports them."""

HOME = Path(__file__).parent.parent
"""The folder that `bench` lies in, and ours with it."""


def spec_of(package: str) -> ModuleSpec:
    """Return where one of our packages lies, importing nothing.

    Args:
        package: one of `OURS`.

    Returns:
        Its specification, with the folder beside `bench`.

    Raises:
        InputError: the folder is not there.
    """
    found = PathFinder.find_spec(package, [str(HOME)])
    if found is None:
        raise InputError(f"{HOME / package}: Crossfire's own {package} are not there; install it anew")
    return found


def imported(package: str) -> ModuleType:
    """Import one of our packages under its own name.

    Args:
        package: one of `OURS`.

    Returns:
        The package beside `bench`.

    Raises:
        InputError: another module of this name was imported before.
    """
    spec = spec_of(package)
    if package not in sys.modules:
        module = module_from_spec(spec)
        sys.modules[package] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
    found = sys.modules[package]
    places = [Path(each).resolve() for each in getattr(found, "__path__", ())]
    if (HOME / package).resolve() not in places:
        place = next(iter(places), getattr(found, "__file__", None))
        raise InputError(
            f"{place} was imported as {package!r}, the name of Crossfire's own; call it something else"
        )
    return found

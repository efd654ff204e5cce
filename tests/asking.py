"""Ask of a defense's parameters what a plan asks before anything runs."""

from typing import Any

from pydantic import ValidationError

from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import DEFENSES, Entry, bind, discover
from bench.suite.yaml_source import complaint


def ask(name: str, shape: Shape, **params: Any) -> None:
    """Raise `InputError` where a plan would: by a parameter's type, or by `check_params`."""
    discover()
    entry = DEFENSES[name]
    resolved = typed(entry, **params)
    if entry.check_params is not None:
        entry.check_params(resolved, shape)


def typed(entry: Entry, **params: Any) -> dict[str, Any]:
    """Return the parameters filled in; raise `InputError` where a type does not take one."""
    try:
        return bind(entry, params)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{problem['loc'][0]}: {complaint(problem)}") from None

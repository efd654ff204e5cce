"""What a plan says of an attack's settings that cannot be."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import ATTACKS
from bench.suite.yaml_source import complaint


def refusal(name: str, params: Mapping[str, Any], shape: Shape) -> str | None:
    """Return the message for an attack's parameters on such data, None where nothing is wrong."""
    entry = ATTACKS[name]
    try:
        values = entry.schema.model_validate(dict(params)).model_dump(by_alias=True)
    except ValidationError as error:
        (problem,) = error.errors()
        return f"{problem['loc'][0]}: {complaint(problem)}"
    if entry.check_params is not None:
        try:
            entry.check_params(values, shape)
        except InputError as error:
            return str(error)
    return None

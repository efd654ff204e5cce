"""What a task file says of its gate: `check:`, the rules by which `bench check` decides."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bench.quantities import fraction
from bench.suite.names import Name
from bench.suite.tables import Selection


def _chosen(value: object) -> object:
    """Return the selection that a bare name of a defense is short for; refuse one that selects everything."""
    if value == {}:
        raise ValueError("expected coordinates such as {attack: spsa}, or the name of a defense, found {}")
    return {"defense": value} if isinstance(value, str) else value


Choice = Annotated[Selection, BeforeValidator(_chosen, json_schema_input_type=dict[str, Any] | str)]
"""Coordinates that a subject must have, such as ``{attack: spsa}``; a bare name is that of a defense."""

_Percent = Annotated[float, Field(ge=0, le=100)]
Percent = Annotated[_Percent, BeforeValidator(fraction, json_schema_input_type=_Percent | str)]
"""A number from 0 to 100."""

_Level = Annotated[float, Field(gt=0, le=0.5)]
Level = Annotated[_Level, BeforeValidator(fraction, json_schema_input_type=_Level | str)]
"""A level of significance, above 0 and up to a half."""


class Tiers(BaseModel):
    """Which subjects decide, and which are only told of."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"critical": [{"attack": "pgd"}]}]},
    )

    critical: Annotated[list[Choice], Field(min_length=1)] | None = None
    """A list of what decides the exit status: names of defenses, or coordinates such as `{attack: pgd}`."""
    advisory: list[Choice] = []
    """A list of what is only told of."""


class Policy(BaseModel):
    """The rules of `bench check`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"tolerance": 1.0, "alpha": 0.01}]},
    )

    tolerance: Percent = 1.0
    """The net loss that is allowed, in points of accuracy, from 0 to 100."""
    alpha: Level = 0.01
    """The level of significance of the tests, above 0, up to 0.5; intervals are at 1 - `alpha`."""
    tiers: Tiers = Tiers()
    """Which subjects decide, see below."""
    floors: dict[Name, Percent] = {}
    """By the name of a defense, the least accuracy in percent that the worst case of each of its rows may
    have."""

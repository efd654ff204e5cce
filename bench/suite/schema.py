"""The form of a task file: pydantic models of what stands in it, unresolved.

What the names in it mean is `resolve.py`'s; the tables' models are `layout.py`'s.
"""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from bench.protocols import Norm
from bench.quantities import fraction
from bench.registry import WHOLE, Count, NonNegativeCount
from bench.suite.names import FileName, Name, Sentence
from bench.suite.policy import Policy
from bench.suite.reach import too_long
from bench.suite.tables import Table


class Model(BaseModel):
    """Base of what stands in a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


_Above = Annotated[float, Field(gt=0)]

Radius = Annotated[_Above, BeforeValidator(fraction, json_schema_input_type=_Above | str)]
"""A radius above 0, in the norm's own unit; pixels are in [0, 1]."""

Seconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(fraction, json_schema_input_type=_Above | str),
]
"""A finite time above 0."""


class Threats(Model):
    """A norm and one radius or several; none: as little as possible."""

    norm: Norm
    radius: Annotated[
        list[Radius],
        BeforeValidator(_listed, json_schema_input_type=Radius | list[Radius]),
        Field(min_length=1),
    ] = [math.inf]

    @field_validator("radius")
    @classmethod
    def _in_units(cls, radii: list[float], info: ValidationInfo) -> list[float]:
        # How far images may be apart in other norms, only their form tells: the planner asks.
        for radius in radii if info.data.get("norm") == "linf" else ():
            if (said := too_long("radius", radius, 1.0, "linf")) is not None:
                raise ValueError(said)
        return radii


class ViewUse(BaseModel):
    """``{use: bpda, temperature: 0.1}``; a bare name is short for no parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    draws: Annotated[Count, WHOLE] = 1
    """How often each point is asked; losses are averaged over the answers (EOT)."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters beside the name."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """What a table calls it: the name, and what is not as usual."""
        said = self.params | ({"draws": self.draws} if self.draws > 1 else {})
        return self.use + (
            f"({', '.join(f'{name}={value}' for name, value in said.items())})" if said else ""
        )


def _view(value: object) -> object:
    return {"use": value} if isinstance(value, str) else value


ViewChoice = Annotated[ViewUse, BeforeValidator(_view, json_schema_input_type=str | ViewUse)]


ANSWERS = "decision:"
"""The view of a read-out's answers, before its name: all that an attack by decisions sees."""

AVERAGED = ("latent", "pixel")
"""Spaces where all that an attack asks for is logits, so that their loss can be averaged over draws."""

UNSEEN = ("latent", "inversion")
"""Spaces whose points are codes, from which another image is made than the one they are made from."""

Precision = Literal["float32", "bf16-search"]
"""What an attack searches in: float32; or bfloat16, and float32 judges what was found."""

T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1)]
"""One or more; nothing at all means every one there is."""


class Origin(Model):
    """Where a transferred attack is crafted: on another defense, through one of its views."""

    defense: str
    view: ViewChoice
    seed: Literal["same"] | Annotated[NonNegativeCount, WHOLE] = "same"


class DefenseUse(BaseModel):
    """A defense with its parameters; some may have other values at inference time."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    inference: dict[str, Any] = {}


class AttackUse(BaseModel):
    """An attack with its parameters; crafted on the victim unless it has a source."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: Name
    planned: Sentence | None = None
    """Why `use` is not registered yet: its conditions are skipped, its other parameters are not looked at."""
    source: Origin | None = None
    targets: (
        Literal["none", "others", "next", "random"]
        | Annotated[list[Annotated[Count, WHOLE]], Field(min_length=1)]
    ) = "none"
    """The labels to reach: offsets from the true class, or a word for them."""
    time_limit: Seconds | None = None
    """Seconds that one shard may take; then it is stopped, and leaves a hole."""
    precision: Precision | None = None
    """What it searches in; None: as the file says."""


class Task(Model):
    """A block of conditions: everything it names is crossed."""

    data: str
    fit: str | None = None
    threat: Threats
    defenses: Several[str] | None = None
    attacks: Several[str] | None = None
    views: Several[ViewChoice] | None = None
    readouts: Several[str] | None = None
    limit: Annotated[Count, WHOLE] | None = None
    seeds: list[Annotated[NonNegativeCount, WHOLE]] = Field(default=[0], min_length=1)
    worst: bool | None = None
    """Whether each attack sees only what stood against those before it; None: as the file says."""


class SuiteModel(Model):
    """A task file as it is written."""

    data: dict[Name, Any]
    defenses: dict[Name, DefenseUse]
    attacks: dict[Name, AttackUse]
    tasks: list[Task] = Field(min_length=1)
    tables: dict[FileName, Table] = {}
    worst: bool = False
    """Whether tasks run in worst mode, unless they say otherwise."""
    check: Policy = Policy()
    """The rules of `bench check`."""
    doctor: Literal["plugins", "all", "none"] = "plugins"
    """Which defenses a run examines whole (`bench doctor`): those with code of other people, all, or none; of
    others it looks at answers and gradients alone. With ``none``, attacks are not tried either."""
    draws: Annotated[int, Field(ge=1, le=1000), WHOLE] = 1
    """How often a random defense is asked about each final image; others are asked once."""
    time_limit: Seconds | None = None
    """Seconds that any one job may take, a training, a shard or an evaluation; then it fails."""
    precision: Precision = "float32"
    """What attacks search in, unless they say otherwise; verdicts are always float32's."""


def expanded(choice: ViewUse, readout: str) -> ViewUse:
    """Return a view with ``{readout}`` filled in: ``e2e_{readout}`` is one name for each read-out.

    Args:
        choice: the view as a task writes it.
        readout: the read-out that is scored.
    """
    return choice.model_copy(update={"use": choice.use.replace("{readout}", readout)})

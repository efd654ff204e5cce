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

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _seeds(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100:
        several = ", ".join(map(str, range(value)))
        meant = f"; {value} seeds are [{several}], the seed {value} alone is [{value}]"
        if value > 5:
            meant = f"; several seeds are [0, 1, 2], the seed {value} alone is [{value}]"
        raise ValueError(f"expected a list of seeds, found {value}{meant if value else '; write [0]'}")
    return value


def _seconds(value: object) -> object:
    try:
        return fraction(value)
    except ValueError:
        raise ValueError(f"expected seconds, such as 600, found {value!r}") from None


_Above = Annotated[float, Field(gt=0)]

Radius = Annotated[_Above, BeforeValidator(fraction, json_schema_input_type=_Above | str)]
"""A radius above 0, in the norm's own unit; pixels are in [0, 1]."""

Seconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(_seconds, json_schema_input_type=_Above | str),
]
"""A finite time above 0."""


class Threats(Model):
    """A norm and one radius or several; none: as little as possible."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"norm": "linf", "radius": "8/255"}]})

    norm: Norm = Field(examples=["linf"])
    """`linf`, `l2`, `l1` or `l0`."""
    radius: Annotated[
        list[Radius],
        BeforeValidator(_listed, json_schema_input_type=Radius | list[Radius]),
        Field(min_length=1, examples=["8/255"]),
    ] = [math.inf]
    """A number or a fraction above 0, or a list of them, in units of [0, 1] (`8/255`, and not 8). One that no
    two images are apart is refused: above 1 in `linf`, above the root of the number of values in `l2`.
    Without one, or with `inf`, only attacks run that move as little as they can."""

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

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"use": "logits", "draws": 20}]},
    )
    use: str
    """A view of the defense."""
    draws: Annotated[Count, WHOLE] = 1
    """How often each point is asked, so that losses are averaged over a defense's own randomness."""

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

    model_config = ConfigDict(json_schema_extra={"examples": [{"defense": "standard", "view": "logits"}]})

    defense: str
    """A defense of the file."""
    view: ViewChoice
    """One of its views, as in a task."""
    seed: Literal["same"] | Annotated[NonNegativeCount, WHOLE] = "same"
    """The seed of its training: `same` as the victim's, or a number."""


class DefenseUse(BaseModel):
    """A defense with its parameters; some may have other values at inference time."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"use": "standard", "epochs": 5}]},
    )
    use: str
    """A registered defense."""
    inference: dict[str, Any] = Field(default={}, examples=[{"eps_ap": [0.05, 0.1]}])
    """Parameters that are set after training, `{eps_ap: [0.05, 0.1]}`; a list makes a setting of each value,
    and several lists all combinations."""


class AttackUse(BaseModel):
    """An attack with its parameters; crafted on the victim unless it has a source."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"use": "pgd", "steps": 40}]},
    )
    use: Name
    """A registered attack."""
    planned: Sentence | None = None
    """Why `use` is not written yet: its conditions are skipped with this reason."""
    optional: bool = False
    """Whether its conditions are skipped with the reason where the library that it is of is not installed."""
    source: Origin | None = None
    """On which defense images are crafted, to be scored on the defense of the task: a transfer."""
    targets: (
        Literal["none", "others", "next", "random"]
        | Annotated[list[Annotated[Count, WHOLE]], Field(min_length=1)]
    ) = "none"
    """`none`: any wrong label will do. The label to reach: `next`, `random`, `others` (each in turn), or a
    list of offsets from the true class."""
    time_limit: Seconds | None = None
    """Seconds that one shard may take."""
    precision: Precision | None = None
    """What it searches in."""


class Task(Model):
    """A block of conditions: everything it names is crossed."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"data": "digits", "threat": {"norm": "linf", "radius": "8/255"}}]}
    )

    data: str
    """The data set that is attacked."""
    fit: str | None = None
    """The data set of the file that defenses are trained on, where it is not the train split of the same
    form."""
    threat: Threats
    """The norm, and one radius or several."""
    defenses: Several[str] | None = Field(default=None, examples=[["standard"]])
    """Which are attacked."""
    attacks: Several[str] | None = Field(default=None, examples=[["clean", "pgd"]])
    """Which attack; of those that are named here, each must be made for the norm."""
    views: Several[ViewChoice] | None = Field(default=None, examples=[["logits"]])
    """What attacks look through. `e2e_{readout}` stands for a view of each read-out, `decision:plain` for
    the answers of one; attacks that see answers alone take the scored read-out's where none is named."""
    readouts: Several[str] | None = Field(default=None, examples=[["plain"]])
    """Which answers are scored."""
    limit: Annotated[Count, WHOLE] | None = None
    """How many examples: the first of the data set's order."""
    seeds: Annotated[list[Annotated[NonNegativeCount, WHOLE]], BeforeValidator(_seeds)] = Field(
        default=[0], min_length=1, examples=[[0, 1, 2]]
    )
    """Seeds of trainings and attacks."""
    worst: bool | None = None
    """Whether each attack of a row sees only what stood against those before it."""


class SuiteModel(Model):
    """A task file as it is written."""

    data: dict[Name, Any] = Field(examples=[{"digits": {"name": "digits", "split": "test"}}])
    """Data sets, by name: Data."""
    defenses: dict[Name, DefenseUse] = Field(examples=[{"standard": {"use": "standard"}}])
    """Defenses, by name."""
    attacks: dict[Name, AttackUse] = Field(
        examples=[{"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 40}}]
    )
    """Attacks, by name."""
    tasks: list[Task] = Field(
        min_length=1,
        examples=[[{"data": "digits", "threat": {"norm": "linf", "radius": "8/255"}}]],
    )
    """A list of what is run."""
    tables: dict[FileName, Table] = Field(
        default={}, examples=[{"mine": {"title": "Mine", "rows": ["defense"], "columns": ["attack"]}}]
    )
    """Tables, by key."""
    worst: bool = False
    """Whether tasks run in worst mode."""
    check: Policy = Policy()
    """The rules by which `bench check` decides."""
    doctor: Literal["plugins", "all", "none"] = "plugins"
    """Which defenses a run examines whole: `plugins`, `all` or `none`."""
    draws: Annotated[int, Field(ge=1, le=1000), WHOLE] = 1
    """How often a random defense is asked about each final image, from 1 to 1,000."""
    time_limit: Seconds | None = Field(default=None, examples=[600])
    """Seconds that any one job may take."""
    precision: Precision = "float32"
    """What attacks search in, `float32` or `bf16-search`."""
    results: Sentence | None = Field(default=None, examples=["../results/mine"])
    """The results folder, relative to the file; `--results` of a command wins."""


class Addition(Model):
    """What `bench doctor --fix` adds to a suite: a file in the results folder."""

    attacks: dict[Name, AttackUse] = {}
    tasks: list[Task] = []
    doctor: list[str] = []
    """The defenses that are examined whole."""


def expanded(choice: ViewUse, readout: str) -> ViewUse:
    """Return a view with ``{readout}`` filled in: ``e2e_{readout}`` is one name for each read-out.

    Args:
        choice: the view as a task writes it.
        readout: the read-out that is scored.
    """
    return choice.model_copy(update={"use": choice.use.replace("{readout}", readout)})

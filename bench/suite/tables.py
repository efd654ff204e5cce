"""What a task file says of its tables: the models that check it.

Which conditions of a suite stand where in a table is decided in `layout.py`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bench.errors import did_you_mean
from bench.quantities import format_value, fraction
from bench.results.conditions import CHOICE, COORDINATES
from bench.results.metrics import METRICS, Metric, On
from bench.suite.names import Name, Sentence

MEASURE = ("metric", "class")
"""What a row or a column may say beside coordinates: what is counted there, and of which class."""

Scalar: TypeAlias = bool | int | float | str | None


def _selection(value: object) -> object:
    if not isinstance(value, Mapping):
        # pydantic makes a complaint with its place of a ValueError alone.
        raise ValueError(f"expected a selection such as {{attack: pgd}}, found {value!r}")  # noqa: TRY004
    return value


Selection = Annotated[dict[str, Scalar | list[Scalar]], BeforeValidator(_selection)]
"""Coordinates and the value that each must have. A list means: any of these values."""


def _axis(value: object) -> object:
    if isinstance(value, str):
        return [value]
    # From Python code headings may be numbers.
    return {str(heading): each for heading, each in value.items()} if isinstance(value, Mapping) else value


_Axis: TypeAlias = list[str] | dict[Name, Selection]
Axis = Annotated[_Axis, BeforeValidator(_axis, json_schema_input_type=_Axis | str)]
"""Names of coordinates (a row for each combination of their values), or headings and what each selects."""

Radius = Annotated[float, Field(ge=0), BeforeValidator(fraction, json_schema_input_type=float | str)]


class Model(BaseModel):
    """Base of what a table says."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Comparison(Model):
    """Numbers of a paper to print beside ours."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"table": "cnnf/3"}]})

    table: str
    """The key of a published table, such as `cnnf/3` (`bench/report/published.yaml`)."""
    columns: dict[str, str] = {}
    """By our heading, the paper's name of the column."""
    rows: dict[str, str] = {}
    """By our row, `cnnf, last`, the paper's name of it."""
    differences: list[Sentence] = []
    """What is known to be different from the paper, in sentences."""


class Figure(Model):
    """A table that is a set of curves: what runs along the horizontal axis."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"x": "radius"}]})

    x: str
    """The coordinate of the horizontal axis, one of rows or columns."""
    xlabel: Sentence | None = None
    """What stands at the horizontal axis."""
    ylabel: Sentence | None = None
    """What stands at the vertical axis."""


class Table(Model):
    """How a numbered table is cut."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"title": "Mine", "rows": ["defense"], "columns": ["attack"]}]}
    )

    title: Sentence = Field(examples=["My network"])
    """What stands above it."""
    where: Selection = Field(default={}, examples=[{"data": "digits"}])
    """A selection that holds for the whole table."""
    rows: Axis = Field(examples=[["defense"]])
    """Coordinates, `[defense, readout]`: a row for each combination of their values; or a selection for each
    heading, `CNN-F (avg): {defense: cnnf, readout: avg}`."""
    columns: Axis = Field(examples=[["attack"]])
    """The same of columns. `{readout}` in a value of a selection is the row's."""
    extra: list[Literal["Min", "Max", "Worst"]] = []
    """Further columns: `Min`, or `Max` of a metric that attackers want large; `Worst`."""
    mean_over: list[Literal["seed", "target"]] = ["seed"]
    """Of `seed` and `target`, what is averaged."""
    min_over: list[Literal["attack", "view"]] = []
    """Of `attack` and `view`, what is averaged one by one: the cell is the least of these averages, as
    papers print it."""
    worst_over: list[Literal["attack", "view", "target"]] = ["attack", "view", "target"]
    """What is settled example by example, by the worst. Unless it is said: those that `mean_over` and
    `min_over` leave. Each stands in one of the three, or is one value in each cell."""
    worst_on: On = "every"
    """The examples of a worst case: `every` one that any of its attacks saw, settled by those that did, or
    `common`: those alone that all saw."""
    metric: str = "accuracy"
    """What is counted: metrics. A heading's selection may have a `metric` of its own, and the `class` of
    `class_accuracy`, `logit` and `threshold`."""
    radii: list[Radius] = []
    """Radii at which the distances of attacks that move as little as they can are read, each as a coordinate
    `radius`."""
    published: Comparison | None = None
    """Numbers of a paper beside ours."""
    figure: Figure | None = None
    """The table as curves, for `--format svg`, `png` and `pdf`; without it, `.figure()` of Python draws
    bars."""
    grades: bool = True
    """Whether a column says how much stands behind each row: grades."""
    bold: Literal["weakest"] | None = "weakest"
    """The attack column that is worst for the defender is bold; `null`: none is."""

    @model_validator(mode="before")
    @classmethod
    def _mean_comes_first(cls, given: object) -> object:
        if isinstance(given, Mapping) and "worst_over" not in given:
            other = [*given.get("mean_over", ["seed"]), *given.get("min_over", [])]
            given = {**given, "worst_over": [name for name in CHOICE if name not in other]}
        return given

    @model_validator(mode="after")
    def _check(self) -> "Table":
        ways: dict[str, Sequence[str]] = {
            "mean_over": self.mean_over,
            "min_over": self.min_over,
            "worst_over": self.worst_over,
        }
        for one, other in combinations(ways, 2):
            for both in set(ways[one]) & set(ways[other]):
                raise ValueError(f"{both} is both in {one} and in {other}")
        for heading in self.extra:
            if heading in self.columns:
                raise ValueError(f"a column is called {heading!r}, and so is an extra one")
        for axis in (self.rows, self.columns):
            if not axis:
                raise ValueError("rows and columns need an entry each")
        for selection in ({"metric": self.metric}, *_selections(self.rows), *_selections(self.columns)):
            name, label = selection.get("metric", self.metric), selection.get("class", 0)
            if name not in METRICS:
                listed = did_you_mean(str(name), METRICS, listed="bench list metrics")
                raise ValueError(f"unknown metric {name!r}{listed}")
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise ValueError(f"class: expected a whole number from 0, found {label!r}")
        self._check_names()
        self._check_extra(METRICS[self.metric])
        return self

    def _check_names(self) -> None:
        for place, names in (
            ("where", self.where),
            *(("rows", each) for each in _named(self.rows)),
            *(("columns", each) for each in _named(self.columns)),
        ):
            measured = MEASURE if place != "where" and isinstance(getattr(self, place), dict) else ()
            for name in names:
                if "." not in name and name not in (*COORDINATES, *measured):
                    known = [*COORDINATES, "inference.<parameter>"]
                    raise ValueError(f"{place}: unknown coordinate {name!r}{did_you_mean(name, known)}")
        for heading, selection in self.columns.items() if isinstance(self.columns, dict) else ():
            for name in placeholders(selection):
                if not all(name in scalars(each) for each in self._contexts()):
                    raise ValueError(f"columns: {heading!r}: {{{name}}} is no coordinate of every row")
        shown = names_of(self.rows) | names_of(self.columns)
        if self.figure is not None and self.figure.x not in shown:
            near = did_you_mean(self.figure.x, shown)
            raise ValueError(
                f"figure: x: {self.figure.x!r} is a coordinate of neither rows nor columns{near}"
            )

    def _contexts(self) -> Iterator[Mapping[str, Any]]:
        """Yield for each row (or for all) the coordinates that a placeholder may name."""
        if isinstance(self.rows, dict):
            yield from ({**self.where, **selection} for selection in self.rows.values())
        else:
            yield {**self.where, **dict.fromkeys(self.rows)}

    def _check_extra(self, metric: Metric) -> None:
        for heading in self.extra:
            if metric.worst is None:
                raise ValueError(f"extra: {metric.name} has no {heading} over attacks")
            if heading != "Worst" and heading != {"least": "Min", "greatest": "Max"}[metric.worst]:
                right = "Max" if heading == "Min" else "Min"
                raise ValueError(f"extra: an attacker wants the {right} of {metric.name}, not the {heading}")


def _selections(axis: list[str] | dict[str, Any]) -> list[Mapping[str, Any]]:
    return list(axis.values()) if isinstance(axis, dict) else []


def _named(axis: list[str] | dict[str, Any]) -> list[Iterable[str]]:
    return list(axis.values()) if isinstance(axis, dict) else [axis]


def names_of(axis: list[str] | dict[str, Any]) -> set[str]:
    """Return the coordinates that an axis names, in any of its rows or columns.

    Args:
        axis: The `rows` or the `columns` of a table.

    Returns:
        The names; also ``metric`` and ``class`` where an entry of the axis has its own.
    """
    return {name for names in _named(axis) for name in names}


def scalars(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a selection that fixes a coordinate to one value.

    Args:
        selection: Coordinates and the value, or the list of values, that each must have.

    Returns:
        The coordinates with a single value.
    """
    return {name: value for name, value in selection.items() if not isinstance(value, list)}


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(selection: Mapping[str, Any]) -> set[str]:
    """Return the coordinates that a selection takes from its row: ``readout`` of ``e2e_{readout}``.

    Args:
        selection: What a column selects.

    Returns:
        The names between braces, in any of its values.
    """
    values = [value if isinstance(value, list) else [value] for value in selection.values()]
    texts = [each for group in values for each in group if isinstance(each, str)]
    return {name for text in texts for name in _PLACEHOLDER.findall(text)}


def resolved(selection: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a selection with its placeholders replaced by the values of a row.

    Args:
        selection: What a column selects.
        row: The coordinates that the row fixes.

    Returns:
        The selection, without placeholders.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(each) for each in value]
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: format_value(row[found[1]]), value)
        return value

    return {name: fill(value) for name, value in selection.items()}

"""What a table says, and which cells stand where: rows, columns and squares, before any outcome is read.

A table that would hide a choice of the defender's, or put different questions into one number, is
refused here, so that a plan finds it before anything runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bench.checks import FACTS, Cell
from bench.errors import InputError, did_you_mean
from bench.metrics import METRICS, Metric, Unit
from bench.names import Name, Sentence
from bench.quantities import fraction, spell

QUESTION = ("data", "norm", "radius")
"""What is asked: pinned or in sight, never merged."""

CHOICE = ("attack", "view", "target")
"""The attacker's: settled example by example, by the worst."""

MEASURE = ("metric", "class")
"""What a row or a column may say beside coordinates: what is counted there, and of which class."""

COORDINATES = (*QUESTION, "defense", "attack", "view", "readout", "seed", "target")
"""What every cell has; served parameters come as ``serve.<name>``."""

Scalar: TypeAlias = bool | int | float | str | None


def _selection(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a selection such as {{attack: pgd}}, found {value!r}")  # noqa: TRY004
    return value


Selection = Annotated[dict[str, Scalar | list[Scalar]], BeforeValidator(_selection)]
"""Coordinates and the value that each must have; a list: any of them."""


def _axis(value: object) -> object:
    if isinstance(value, str):
        return [value]
    # From Python code headings may be numbers.
    return {str(heading): each for heading, each in value.items()} if isinstance(value, Mapping) else value


_Axis: TypeAlias = list[str] | dict[Name, Selection]
Axis = Annotated[_Axis, BeforeValidator(_axis, json_schema_input_type=_Axis | str)]
"""Names of coordinates (a row for each combination), or headings and what each selects."""

Radius = Annotated[float, Field(ge=0), BeforeValidator(fraction, json_schema_input_type=float | str)]


class Model(BaseModel):
    """Base of what a table says."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(Model):
    """Numbers of a paper to print beside ours."""

    table: str
    """Its key in the published numbers, such as ``cnnf/3``."""
    columns: dict[str, str] = {}
    """Our headings and theirs, where they are called otherwise."""
    rows: dict[str, str] = {}
    """Our rows (``cnnf, last``) and theirs, where they are called otherwise."""
    differences: list[Sentence] = []
    """What is known to be different, in sentences."""


class Figure(Model):
    """A table that is a set of curves: what runs along the horizontal axis."""

    x: str
    """A coordinate of the columns (a curve for each row), or of the rows (a curve for each column)."""
    xlabel: Sentence | None = None
    ylabel: Sentence | None = None


class Table(Model):
    """How a numbered table is cut."""

    title: Sentence
    where: Selection = {}
    rows: Axis
    columns: Axis
    """A row or a column may also name a `metric` of its own, and the `class` that it is of."""
    extra: list[Literal["Min", "Max", "Worst"]] = []
    mean_over: list[Literal["seed", "target"]] = ["seed"]
    min_over: list[Literal["attack", "view"]] = []
    """What is averaged by itself: a square is the least of these averages, as papers print it."""
    worst_over: list[Literal["attack", "view", "target"]] = ["attack", "view", "target"]
    metric: str = "accuracy"
    radii: list[Radius] = []
    """Radii at which attacks without one are read, through their distances."""
    published: Comparison | None = None
    figure: Figure | None = None
    bold: Literal["weakest"] | None = "weakest"

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
                raise ValueError(f"unknown metric {name!r}{did_you_mean(str(name), METRICS)}")
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
                    known = [*COORDINATES, "serve.<parameter>"]
                    raise ValueError(f"{place}: unknown coordinate {name!r}{did_you_mean(name, known)}")
        for heading, selection in self.columns.items() if isinstance(self.columns, dict) else ():
            for name in placeholders(selection):
                if not all(name in _scalars(each) for each in self._contexts()):
                    raise ValueError(f"columns: {heading!r}: {{{name}}} is no coordinate of every row")
        if self.figure is not None and self.figure.x not in {
            name for axis in (self.rows, self.columns) for names in _named(axis) for name in names
        }:
            raise ValueError(f"figure: x: {self.figure.x!r} is a coordinate of neither rows nor columns")

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


def _scalars(selection: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in selection.items() if not isinstance(value, list)}


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(selection: Mapping[str, Any]) -> set[str]:
    """Return the coordinates that a selection takes from its row: ``readout`` of ``e2e_{readout}``."""
    values = [value if isinstance(value, list) else [value] for value in selection.values()]
    texts = [each for group in values for each in group if isinstance(each, str)]
    return {name for text in texts for name in _PLACEHOLDER.findall(text)}


def _filled(selection: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(each) for each in value]
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: spell(row[found[1]]), value)
        return value

    return {name: fill(value) for name, value in selection.items()}


# --- which cells stand where -------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The cells of a square, those that cannot be, and what is counted."""

    cells: tuple[Cell, ...]
    skips: tuple[Cell, ...]
    metric: Metric

    @property
    def attacks(self) -> tuple[Cell, ...]:
        """The cells in which something is attacked; doing nothing is a metric's business."""
        return tuple(cell for cell in self.cells if cell["use"] != "none")


@dataclass(frozen=True)
class Column:
    """A column: its heading, and what it fixes."""

    heading: str
    at: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A row: its headings, what it fixes, and its squares."""

    label: tuple[str, ...]
    at: Mapping[str, Any]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Layout:
    """A table, arranged."""

    key: str
    table: Table
    heads: tuple[str, ...]
    """Headings of the row labels: coordinates, or one empty text for rows with names."""
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    nothing: Mapping[frozenset[Any], tuple[Cell, ...]]
    """The cells in which nothing is attacked, by who is asked about what, the largest first."""

    def unmoved(self, cell: Cell) -> tuple[Cell, ...]:
        """Return the cells that ask the same defense about the same images unmoved, the largest first."""
        return self.nothing.get(_asked_of(cell), ())

    def needs_unmoved(self, cell: Cell, metric: Metric) -> bool:
        """Return whether a cell's number cannot be told without the answers to unmoved images."""
        return metric.clean == "needed" or (cell["budget"] == "distance" and cell["radius"] is not None)

    def jobs(self) -> set[str]:
        """Return the jobs that the table reads."""
        found = set()
        for line in self.lines:
            for place in line.places:
                for cell in place.cells:
                    found.add(str(cell["job"]))
                    if place.metric.clean == "used" or self.needs_unmoved(cell, place.metric):
                        found |= {str(each["job"]) for each in self.unmoved(cell)[:1]}
        return found

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of outcomes that its metrics look at beside those that every table reads."""
        places = [place for line in self.lines for place in line.places]
        return tuple(dict.fromkeys(name for place in places for name in place.metric.reads))

    @property
    def units(self) -> tuple[Unit, ...]:
        """In which the numbers of each column are printed."""
        return tuple(place.metric.unit for place in self.lines[0].places)


def _asked_of(cell: Cell) -> frozenset[Any]:
    """Return who is asked about what: all coordinates but the threat and the attack."""
    left_out = ("norm", "radius", *CHOICE)
    return frozenset(
        (name, _token(value))
        for name, value in cell.items()
        if name not in FACTS and value is not None and name.partition(".")[0] not in left_out
    )


def _token(value: Any) -> Any:
    """Return a value to look up by."""
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def arrange(manifest: Mapping[str, Any], key: str) -> Layout:
    """Arrange a table of a manifest; raise `InputError` where it asks for what is not there, or hides."""
    tables = manifest["tables"]
    if key not in tables:
        raise InputError(f"no table {key!r}{did_you_mean(key, tables)}")
    try:
        table = Table.model_validate(tables[key])
    except ValidationError as error:
        raise InputError(f"table {key!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    cells, skips = (_read_at(manifest[kind], table.radii) for kind in ("cells", "skips"))
    every = _Cells(f"table {key!r}", cells, skips, _known([*cells, *skips]))
    shown = every.where(table.where, "where")
    if not shown.cells and not shown.skips:
        raise InputError(f"table {key!r}: where: no cell has all of {table.where}")
    lines = _lines(shown, table)
    columns = _columns(shown, table, [at for _, at, _ in lines])
    arranged = [
        Line(label, at, tuple(_place(key, table, label, at, column, rest) for column in columns))
        for label, at, rest in lines
    ]
    if isinstance(table.rows, list):
        arranged = [line for line in arranged if any(each.cells or each.skips for each in line.places)]
    if not arranged:
        raise InputError(f"table {key!r}: no cell is in a row and in a column")
    layout = Layout(
        key=key,
        table=table,
        heads=tuple(table.rows) if isinstance(table.rows, list) else ("",),
        columns=tuple(columns),
        lines=tuple(arranged),
        nothing=_nothing(every.cells),
    )
    _refuse_hiding(layout)
    _refuse_merging(layout)
    _refuse_mixing(layout)
    _refuse_idle_classes(layout)
    return layout


def _nothing(cells: Iterable[Cell]) -> dict[frozenset[Any], tuple[Cell, ...]]:
    found: dict[frozenset[Any], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell["use"] == "none":
            found[_asked_of(cell)].append(cell)
    return {asked: tuple(sorted(same, key=lambda each: -int(each["n"]))) for asked, same in found.items()}


def _read_at(cells: Sequence[Cell], radii: Sequence[float]) -> list[Cell]:
    """Return the cells, those of attacks without a radius once for each of `radii`."""
    if not radii:
        return list(cells)
    found: list[Cell] = []
    for cell in cells:
        # A cell that is skipped says nothing of its attack but where it would stand.
        free = cell["radius"] is None and ("reason" in cell or _free(cell))
        found += [{**cell, "radius": radius} for radius in radii] if free else [cell]
    return found


def _free(cell: Cell) -> bool:
    return bool(cell["budget"] == "distance" or cell["use"] == "none")


def _chosen(selection: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in selection.items() if name not in MEASURE}


def _place(
    key: str, table: Table, label: tuple[str, ...], at: Mapping[str, Any], column: Column, rest: "_Cells"
) -> Place:
    """Return a square's cells, and its metric: the row's or the column's own, else the table's."""
    where = f"table {key!r}: row {', '.join(label)!r}, column {column.heading!r}"
    for name in MEASURE:
        if name in at and name in column.at:
            raise InputError(f"{where}: both say a {name}")
    own = {**at, **column.at}
    metric = METRICS[str(own.get("metric", table.metric))]
    try:
        # Beside a metric of a class there may be one that has no use for it: `_refuse_idle_classes`.
        metric = metric.of(own.get("class")) if metric.by_class else metric
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    cells, skips = rest.at(_filled(_chosen(column.at), {**table.where, **at}))
    return Place(cells, skips, metric)


@dataclass(frozen=True)
class _Cells:
    """Cells and skips to choose from."""

    table: str
    cells: Sequence[Cell]
    skips: Sequence[Cell]
    known: Mapping[str, Sequence[Any]]
    """The values of each coordinate, in the whole suite."""

    def at(self, selection: Mapping[str, Any]) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
        wanted = [
            (name, {_token(value) for value in self.known.get(name, ()) if _matches(chosen, value)})
            for name, chosen in selection.items()
        ]

        def fits(cell: Cell) -> bool:
            return all(_token(cell.get(name)) in tokens for name, tokens in wanted)

        return tuple(filter(fits, self.cells)), tuple(filter(fits, self.skips))

    def where(self, selection: Mapping[str, Any], place: str) -> "_Cells":
        self.check([selection], place)
        cells, skips = self.at(selection)
        return replace(self, cells=cells, skips=skips)

    def check(self, selections: Sequence[Mapping[str, Any]], place: str) -> None:
        """Raise where a name is no coordinate, or where no cell has a value.

        The selections are one and the same, filled in for each row: a value that a placeholder gives
        need not exist for every row.
        """
        for name in distinct(name for selection in selections for name in selection):
            self.check_name(name, place)
            asked = [selection[name] for selection in selections if name in selection]
            wanted = [each for value in asked for each in (value if isinstance(value, list) else [value])]
            missing = [each for each in wanted if not any(_same(each, value) for value in self.known[name])]
            if missing and (len(selections) == 1 or len(missing) == len(wanted)):
                options = did_you_mean(spell(missing[0]), map(spell, self.known[name]))
                raise InputError(f"{self.table}: {place}: {name}: no cell has {spell(missing[0])!r}{options}")

    def check_name(self, name: str, place: str) -> None:
        if name not in self.known:
            raise InputError(
                f"{self.table}: {place}: unknown coordinate {name!r}{did_you_mean(name, self.known)}"
            )


def _known(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*COORDINATES, *(name for cell in cells for name in cell if name not in FACTS)])
    return {name: list({_token(value := cell.get(name)): value for cell in cells}.values()) for name in names}


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return values without repetitions, in the order in which they come."""
    return list({repr(value): value for value in values}.values())


def _matches(chosen: Any, value: Any) -> bool:
    return any(_same(each, value) for each in chosen) if isinstance(chosen, list) else _same(chosen, value)


def _same(chosen: Any, value: Any) -> bool:
    if isinstance(chosen, bool) or isinstance(value, bool) or chosen is None:
        return chosen is value
    if isinstance(value, str):
        return str(chosen) == value
    try:
        number = fraction(chosen)
    except ValueError:
        return False
    if not isinstance(number, int | float) or not isinstance(value, int | float):
        return value is None and number == math.inf
    return math.isclose(number, value, rel_tol=1e-9)


def _lines(shown: _Cells, table: Table) -> list[tuple[tuple[str, ...], dict[str, Any], _Cells]]:
    """Return for each row its label, the coordinates it fixes, and the cells that it may show."""
    if isinstance(table.rows, dict):
        return [
            ((heading,), _scalars(selection), shown.where(_chosen(selection), f"row {heading!r}"))
            for heading, selection in table.rows.items()
        ]
    for name in table.rows:
        shown.check_name(name, "rows")
    groups: dict[tuple[Any, ...], tuple[list[Cell], list[Cell]]] = defaultdict(lambda: ([], []))
    for side, cells in enumerate((shown.cells, shown.skips)):
        for cell in cells:
            groups[tuple(_token(cell.get(name)) for name in table.rows)][side].append(cell)
    found = []
    for cells, skips in groups.values():
        at = {name: (*cells, *skips)[0].get(name) for name in table.rows}
        found.append((tuple(map(spell, at.values())), at, replace(shown, cells=cells, skips=skips)))
    return found


def _columns(shown: _Cells, table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    if isinstance(table.columns, list):
        for name in table.columns:
            shown.check_name(name, "columns")
        # Columns that hold nothing but skips are shown only where there is nothing else.
        asked_for = shown.cells or shown.skips
        fixed = distinct({name: cell.get(name) for name in table.columns} for cell in asked_for)
        return [Column(_heading(at), at) for at in fixed]
    found = []
    for heading, selection in table.columns.items():
        column = Column(heading, selection)
        asked = [_filled(_chosen(selection), {**table.where, **row}) for row in rows]
        shown.check(asked if placeholders(selection) else asked[:1], f"column {heading!r}")
        found.append(column)
    return found


def _heading(at: Mapping[str, Any]) -> str:
    return ", ".join(spell(value) for value in at.values() if value is not None) or spell(None)


# --- what a table may not do -------------------------------------------------------------------------


def _asked(cell: Cell, name: str) -> bool:
    """Return whether a coordinate of a cell means anything: an image that stays needs no threat."""
    return not (cell["use"] == "none" and name in ("norm", "radius"))


def _values(cells: Iterable[Cell], name: str) -> list[Any]:
    return distinct(cell.get(name) for cell in cells if _asked(cell, name))


def _refuse_hiding(layout: Layout) -> None:
    table = layout.table
    settled = {*table.mean_over, *table.min_over, *table.worst_over}
    named = {
        place: {name for names in _named(axis) for name in names}
        for place, axis in (("rows", table.rows), ("columns", table.columns))
    }
    every = [cell for line in layout.lines for place in line.places for cell in place.cells]
    for name in dict.fromkeys(name for cell in every for name in cell if name not in FACTS):
        kind = name.partition(".")[0]
        if kind in settled:
            continue
        groups = [place.cells for line in layout.lines for place in line.places]
        if kind not in CHOICE and kind != "seed" and name not in named["columns"]:
            groups += [tuple(cell for place in line.places for cell in place.cells) for line in layout.lines]
        if name in QUESTION and name not in named["rows"] | named["columns"]:
            groups.append(tuple(every))
        for group in groups:
            if len(values := _values(group, name)) > 1:
                raise InputError(
                    f"table {layout.key!r} hides {name}: {_listed(values)}; "
                    "pin it in where, or show it in rows or columns"
                )


def _refuse_merging(layout: Layout) -> None:
    """Refuse a worst case where there is none: over a metric that has none, or over other questions."""
    for line in layout.lines:
        for column, place in zip(layout.columns, line.places, strict=True):
            for name in CHOICE if place.metric.worst is None else ():
                if name not in layout.table.mean_over and len(values := _values(place.attacks, name)) > 1:
                    raise InputError(
                        f"table {layout.key!r}: column {column.heading!r}: {place.metric.name} has no worst "
                        f"over {name}: {_listed(values)}; pin it"
                    )
        if layout.table.extra and (several := merged(layout, line)) is not None:
            name, values = several
            raise InputError(
                f"table {layout.key!r}: {' and '.join(layout.table.extra)} would merge {name}: "
                f"{_listed(values)}; they take the worst of one question to one defense"
            )


def _refuse_mixing(layout: Layout) -> None:
    """Refuse a column of percents and logits: nobody could read it."""
    for number, column in enumerate(layout.columns):
        units = distinct(line.places[number].metric.unit for line in layout.lines)
        if len(units) > 1:
            raise InputError(
                f"table {layout.key!r}: column {column.heading!r} would hold numbers of several units: "
                f"{', '.join(units)}"
            )


def _refuse_idle_classes(layout: Layout) -> None:
    """Refuse a class that no metric of its row or column is of."""
    rows = [(f"row {', '.join(line.label)!r}", line.at, line.places) for line in layout.lines]
    columns = [
        (f"column {column.heading!r}", column.at, tuple(line.places[number] for line in layout.lines))
        for number, column in enumerate(layout.columns)
    ]
    for where, at, places in (*rows, *columns):
        if "class" in at and not any(place.metric.by_class for place in places):
            names = ", ".join(distinct(place.metric.name for place in places))
            raise InputError(f"table {layout.key!r}: {where}: {names} is of no class, and class: was given")


def merged(layout: Layout, line: Line) -> tuple[str, list[Any]] | None:
    """Return what keeps a row's attacks from being compared: another radius, another read-out."""
    attacked = [
        cell for place in line.places if place.metric.name == layout.table.metric for cell in place.attacks
    ]
    for name in dict.fromkeys(name for cell in attacked for name in cell if name not in FACTS):
        values = _values(attacked, name)
        if name.partition(".")[0] not in (*CHOICE, "seed") and len(values) > 1:
            return name, values
    return None


def _listed(values: Sequence[Any]) -> list[Any]:
    """Return values in order: numbers as numbers, None last."""
    return sorted(values, key=lambda value: (value is None, isinstance(value, str), value))

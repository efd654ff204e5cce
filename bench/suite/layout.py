"""Which conditions stand where in a table: rows, columns and slots, before any outcome is read.

A table that would hide a choice of the defender, or merge different questions into one number, is refused
here, so that a plan finds it before anything runs.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import ValidationError

from bench.errors import InputError, did_you_mean
from bench.quantities import format_value, fraction
from bench.results import standing
from bench.results.conditions import CHOICE, COORDINATES, QUESTION, Condition, Skip, conditions_of, skips_of
from bench.results.metrics import METRICS, Metric, Unit
from bench.suite import yaml_source
from bench.suite.tables import MEASURE, Table, names_of, placeholders, resolved, scalars

_Point = TypeVar("_Point", Condition, Skip)


@dataclass(frozen=True)
class Slot:
    """The conditions behind a cell of a table, those that cannot be, and what is counted there."""

    conditions: tuple[Condition, ...]
    skips: tuple[Skip, ...]
    metric: Metric

    @property
    def attacks(self) -> tuple[Condition, ...]:
        """The conditions in which something is attacked; unmoved images are a metric's business."""
        return tuple(each for each in self.conditions if not each.facts.idle)

    @property
    def apart(self) -> bool:
        """Whether it shows some of the attacks that were run as one: of those examples that stood before."""
        return standing.apart(self.conditions)


@dataclass(frozen=True)
class Column:
    """A column: its heading, and the coordinates that it fixes."""

    heading: str
    at: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The column in words, for messages."""
        return f"column {self.heading!r}"


@dataclass(frozen=True)
class TableRow:
    """A row: its headings, the coordinates that it fixes, and a slot for each column."""

    label: tuple[str, ...]
    at: Mapping[str, Any]
    slots: tuple[Slot, ...]

    @property
    def name(self) -> str:
        """The row in words, for messages."""
        return f"row {', '.join(self.label)!r}"


@dataclass(frozen=True)
class Layout:
    """A table whose conditions were found."""

    key: str
    table: Table
    heads: tuple[str, ...]
    """Headings of the row labels: coordinates, or one empty text for rows with names."""
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    idle: Mapping[frozenset[Any], tuple[Condition, ...]]
    """The conditions of attacks that move nothing, those with most examples first: by data, defense,
    read-out, seed and settings at inference time, as `asked_of` gives them."""
    attacked: Mapping[frozenset[Any], tuple[Condition, ...]]
    """All conditions of the suite in which something is attacked, by the same and the threat."""

    @property
    def slots(self) -> list[Slot]:
        """All slots, row by row."""
        return [slot for row in self.rows for slot in row.slots]

    def unmoved(self, condition: Condition) -> tuple[Condition, ...]:
        """Return the conditions that ask the same defense about the same images, unmoved.

        Args:
            condition: A condition of the table.

        Returns:
            The conditions in which nothing is attacked, those with most examples first.
        """
        return self.idle.get(asked_of(condition), ())

    def beside(self, row: TableRow) -> tuple[Condition, ...]:
        """Return the attacks on what a row shows, at the same threats, that are in none of its columns.

        Args:
            row: A row of the table.

        Returns:
            The conditions.
        """
        shown = [each for slot in row.slots for each in slot.conditions]
        keys = dict.fromkeys(_threatened(each) for each in shown if not each.facts.idle)
        known = {(each.job, each.radius) for each in shown}
        every = (each for key in keys for each in self.attacked.get(key, ()))
        return tuple(each for each in every if (each.job, each.radius) not in known)

    def added(self, row: TableRow) -> tuple[Condition, ...]:
        """Return the attacks that `bench doctor --fix` added for what a row shows, and that no column has.

        Args:
            row: A row of the table.

        Returns:
            The conditions; they count in the columns over all attacks.
        """
        return tuple(each for each in self.beside(row) if each.facts.added)

    def needs_unmoved(self, condition: Condition, metric: Metric) -> bool:
        """Return whether a number depends on the answers to unmoved images.

        Args:
            condition: A condition of the table.
            metric: What is counted.

        Returns:
            Whether the metric needs them, or the condition is a least distance that is read at a radius.
        """
        at_radius = condition.facts.kind == "minimum-norm" and condition.radius is not None
        return metric.clean == "needed" or at_radius

    def _uses_unmoved(self, condition: Condition, metric: Metric) -> bool:
        return metric.clean == "used" or self.from_zero or self.needs_unmoved(condition, metric)

    @property
    def from_zero(self) -> bool:
        """Whether it is a figure over radii, whose curves begin with the clean images."""
        return self.table.figure is not None and self.table.figure.x == "radius"

    def jobs(self) -> set[str]:
        """Return the keys of the evaluations that the table reads."""
        found = set()
        for slot in self.slots:
            for condition in slot.conditions:
                found.add(condition.job)
                if self._uses_unmoved(condition, slot.metric):
                    found |= {each.job for each in self.unmoved(condition)[:1]}
        if self.table.extra:
            found |= {each.job for row in self.rows for each in self.added(row)}
        return found

    def reads_by_job(self) -> dict[str, set[str]]:
        """Return what is read of each evaluation beside the columns that every table reads.

        Returns:
            The names of columns by the key of the evaluation; nothing of those of which no more is read.
        """
        found: dict[str, set[str]] = {}
        for slot in self.slots:
            for condition in slot.conditions if slot.metric.reads else ():
                # The largest of the unmoved ones may be missing: then the next one is read.
                unmoved = self.unmoved(condition) if self._uses_unmoved(condition, slot.metric) else ()
                for each in (condition, *unmoved):
                    found.setdefault(each.job, set()).update(slot.metric.reads)
            for condition in slot.conditions if slot.apart else ():
                if (member := condition.facts.member) is not None:
                    found.setdefault(condition.job, set()).update(standing.columns([member]))
        return found

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of outcomes that are read of any evaluation beside those that every table reads."""
        return tuple(dict.fromkeys(name for names in self.reads_by_job().values() for name in sorted(names)))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The unit in which the numbers of each column are printed."""
        return tuple(slot.metric.unit for slot in self.rows[0].slots)


def _kind(name: str) -> str:
    """Return a coordinate's name without what is below it: ``inference`` of ``inference.cycles``."""
    return name.partition(".")[0]


def asked_of(condition: Condition) -> frozenset[Any]:
    """Return who is asked about what: all coordinates but the threat and the attack."""
    left_out = ("norm", "radius", *CHOICE)
    return frozenset(
        (name, _token(value))
        for name, value in condition.coordinates.items()
        if value is not None and _kind(name) not in left_out
    )


def _threatened(condition: Condition) -> frozenset[Any]:
    """Return who is asked about what, under which threat."""
    return asked_of(condition) | {("norm", condition.norm), ("radius", condition.radius)}


def _token(value: Any) -> Any:
    """Return a value to look up by."""
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def arrange(manifest: Mapping[str, Any], key: str) -> Layout:
    """Find the conditions of each cell of a table.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        key: The table's key in the task file.

    Returns:
        The layout of the table.

    Raises:
        InputError: The table asks for what is not there, hides a coordinate, or merges questions.
    """
    tables = manifest["tables"]
    if key not in tables:
        raise InputError(f"no table {key!r}{did_you_mean(key, tables)}")
    try:
        table = Table.model_validate(tables[key])
    except ValidationError as error:
        said = f"table {key!r}: {yaml_source.sentence(Table, error)}"
        raise InputError(f"{said}; where another version wrote it, bench plan writes it anew") from None
    conditions = _read_at(conditions_of(manifest), table.radii)
    skips = [replaced for each in skips_of(manifest) for replaced in _at_radii(each, table.radii)]
    every = _Pool(f"table {key!r}", conditions, skips, _Known([*conditions, *skips]))
    shown = every.where(table.where, "where")
    if not shown.conditions and not shown.skips:
        raise InputError(f"table {key!r}: where: no condition has all of {table.where}")
    bands = _bands(shown, table)
    columns = _columns(shown, table, [at for _, at, _ in bands])
    rows = [
        TableRow(label, at, tuple(_slot(key, table, label, at, column, rest) for column in columns))
        for label, at, rest in bands
    ]
    if isinstance(table.rows, list):
        rows = [row for row in rows if any(each.conditions or each.skips for each in row.slots)]
    if not rows:
        raise InputError(f"table {key!r}: no condition is in a row and in a column")
    layout = Layout(
        key=key,
        table=table,
        heads=tuple(table.rows) if isinstance(table.rows, list) else ("",),
        columns=tuple(columns),
        rows=tuple(rows),
        idle=idle_of(every.conditions),
        attacked=_attacked(every.conditions),
    )
    _refuse_hiding(layout)
    _refuse_merging(layout)
    _refuse_mixing(layout)
    _refuse_idle_classes(layout)
    return layout


def columns_read(manifest: Mapping[str, Any], keys: Iterable[str]) -> dict[str, set[str]]:
    """Return what some tables read of each evaluation beside the columns that every table reads.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        keys: The keys of the tables in the task file.

    Returns:
        The names of columns by the key of the evaluation.

    Raises:
        InputError: A table is not one that can be printed.
    """
    found: dict[str, set[str]] = {}
    for key in keys:
        for job, names in arrange(manifest, key).reads_by_job().items():
            found.setdefault(job, set()).update(names)
    return found


def idle_of(conditions: Iterable[Condition]) -> dict[frozenset[Any], tuple[Condition, ...]]:
    """Return the conditions in which nothing is attacked, those with most examples first.

    Args:
        conditions: Any conditions.

    Returns:
        The conditions by what each asks (`asked_of`).
    """
    found: dict[frozenset[Any], list[Condition]] = defaultdict(list)
    for condition in conditions:
        if condition.facts.idle:
            found[asked_of(condition)].append(condition)
    return {asked: tuple(sorted(same, key=lambda each: -each.facts.n)) for asked, same in found.items()}


def _attacked(conditions: Iterable[Condition]) -> dict[frozenset[Any], tuple[Condition, ...]]:
    found: dict[frozenset[Any], list[Condition]] = defaultdict(list)
    for condition in conditions:
        if not condition.facts.idle:
            found[_threatened(condition)].append(condition)
    return {asked: tuple(same) for asked, same in found.items()}


def _read_at(conditions: Sequence[Condition], radii: Sequence[float]) -> list[Condition]:
    """Return the conditions, those of attacks without a radius once for each of `radii`."""
    found: list[Condition] = []
    for each in conditions:
        free = each.facts.kind == "minimum-norm" or each.facts.idle
        found += _at_radii(each, radii) if free else [each]
    return found


def _at_radii(point: _Point, radii: Sequence[float]) -> list[_Point]:
    """Return a point without a radius once for each of `radii`, and any other as it is."""
    if not radii or point.coordinates["radius"] is not None:
        return [point]
    return [replace(point, coordinates={**point.coordinates, "radius": radius}) for radius in radii]


def _chosen(selection: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in selection.items() if name not in MEASURE}


def _slot(
    key: str, table: Table, label: tuple[str, ...], at: Mapping[str, Any], column: Column, rest: "_Pool"
) -> Slot:
    """Return a slot; its metric is the row's or the column's own, else the table's."""
    where = f"table {key!r}: row {', '.join(label)!r}, {column.name}"
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
    conditions, skips = rest.at(resolved(_chosen(column.at), {**table.where, **at}))
    return Slot(conditions, skips, metric)


class _Known:
    """The values of each coordinate, in the whole suite."""

    def __init__(self, points: Sequence[Condition | Skip]) -> None:
        names = dict.fromkeys([*COORDINATES, *(name for each in points for name in each.coordinates)])
        self.values = {
            name: list({_token(value := each.coordinates.get(name)): value for each in points}.values())
            for name in names
        }
        self._meant: dict[tuple[str, str], frozenset[Any]] = {}
        self._parts: dict[str, tuple[set[str], list[Any]]] = {}

    def tokens(self, name: str, chosen: Any) -> frozenset[Any]:
        """Return the values of a coordinate that a selection means; found once, for all rows and columns."""
        # By what is written: 1, 1.0 and true are equal, and not the same.
        asked = (name, repr(chosen))
        if asked not in self._meant:
            texts, others = self._split(name)
            # A text is looked up: a table that names every defense would compare each with all others.
            meant = {str(each) for each in _listing(chosen) if not isinstance(each, bool | None)} & texts
            self._meant[asked] = frozenset(meant).union(
                _token(each) for each in others if matches(chosen, each)
            )
        return self._meant[asked]

    def _split(self, name: str) -> tuple[set[str], list[Any]]:
        """Return the values of a coordinate that are texts, and the others."""
        if name not in self._parts:
            values = self.values.get(name, ())
            others = [each for each in values if not isinstance(each, str)]
            self._parts[name] = {each for each in values if isinstance(each, str)}, others
        return self._parts[name]


class _Points(Generic[_Point]):
    """Conditions or skips, in their order, that are looked up by their coordinates."""

    def __init__(self, points: Sequence[_Point]) -> None:
        self.points: Sequence[_Point] = points
        self._places: dict[str, dict[Any, list[int]]] = {}

    def at(self, wanted: Sequence[tuple[str, frozenset[Any]]]) -> tuple[_Point, ...]:
        """Return the points with one of the wanted values of each coordinate."""
        if not wanted:
            return tuple(self.points)
        # A table has as many cells as points, or more: no cell may look at all of them.
        some = [[self._with(name).get(token, ()) for token in tokens] for name, tokens in wanted]
        fewest = min(some, key=lambda places: sum(map(len, places)))
        candidates = (self.points[place] for place in sorted(chain.from_iterable(fewest)))
        return tuple(
            each
            for each in candidates
            if all(_token(each.coordinates.get(name)) in tokens for name, tokens in wanted)
        )

    def _with(self, name: str) -> Mapping[Any, list[int]]:
        """Return the positions of the points with each value of a coordinate."""
        if name not in self._places:
            found: dict[Any, list[int]] = defaultdict(list)
            for place, each in enumerate(self.points):
                found[_token(each.coordinates.get(name))].append(place)
            self._places[name] = dict(found)
        return self._places[name]


@dataclass(frozen=True)
class _Pool:
    """Conditions and skips to choose from."""

    table: str
    conditions: Sequence[Condition]
    skips: Sequence[Skip]
    known: _Known

    @cached_property
    def _points(self) -> tuple[_Points[Condition], _Points[Skip]]:
        return _Points(self.conditions), _Points(self.skips)

    def at(self, selection: Mapping[str, Any]) -> tuple[tuple[Condition, ...], tuple[Skip, ...]]:
        wanted = [(name, self.known.tokens(name, chosen)) for name, chosen in selection.items()]
        conditions, skips = self._points
        return conditions.at(wanted), skips.at(wanted)

    def where(self, selection: Mapping[str, Any], place: str) -> "_Pool":
        self.check([selection], place)
        conditions, skips = self.at(selection)
        return replace(self, conditions=conditions, skips=skips)

    def check(self, selections: Sequence[Mapping[str, Any]], place: str) -> None:
        """Raise where a name is no coordinate, or where no condition has a value.

        The selections are one and the same, filled in for each row: a value that a placeholder gives
        need not exist for every row.
        """
        for name in distinct(name for selection in selections for name in selection):
            self.check_name(name, place)
            asked = [selection[name] for selection in selections if name in selection]
            wanted = [each for value in asked for each in _listing(value)]
            missing = [each for each in wanted if not self.known.tokens(name, each)]
            if missing and (len(selections) == 1 or len(missing) == len(wanted)):
                sought = format_value(missing[0])
                options = did_you_mean(sought, map(format_value, self.known.values[name]))
                raise InputError(f"{self.table}: {place}: {name}: no condition has {sought!r}{options}")

    def check_name(self, name: str, place: str) -> None:
        if name not in self.known.values:
            options = did_you_mean(name, self.known.values)
            raise InputError(f"{self.table}: {place}: unknown coordinate {name!r}{options}")


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return values without repetitions, in the order in which they come.

    Args:
        values: Anything with a `repr` that tells its value; it need not be hashable.

    Returns:
        Each value once.
    """
    return list({repr(value): value for value in values}.values())


def matches(chosen: Any, value: Any) -> bool:
    """Return whether a coordinate has a value that a selection asks for.

    Args:
        chosen: A value, or a list of which any will do; numbers may be written as fractions.
        value: The value of the coordinate; a radius of None is no limit.
    """
    return any(_same(each, value) for each in _listing(chosen))


def _listing(chosen: Any) -> list[Any]:
    return chosen if isinstance(chosen, list) else [chosen]


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


_Band: TypeAlias = tuple[tuple[str, ...], dict[str, Any], _Pool]
"""A row before its columns: its label, the coordinates that it fixes, and what it may show."""


def _bands(shown: _Pool, table: Table) -> list[_Band]:
    """Return a band for each row."""
    if isinstance(table.rows, dict):
        return [
            ((heading,), scalars(selection), shown.where(_chosen(selection), f"row {heading!r}"))
            for heading, selection in table.rows.items()
        ]
    for name in table.rows:
        shown.check_name(name, "rows")
    groups: dict[tuple[Any, ...], tuple[list[Condition], list[Skip]]] = defaultdict(lambda: ([], []))
    for condition in shown.conditions:
        groups[tuple(_token(condition.coordinates.get(name)) for name in table.rows)][0].append(condition)
    for skip in shown.skips:
        groups[tuple(_token(skip.coordinates.get(name)) for name in table.rows)][1].append(skip)
    found = []
    for conditions, skips in groups.values():
        coordinates = conditions[0].coordinates if conditions else skips[0].coordinates
        at = {name: coordinates.get(name) for name in table.rows}
        band = replace(shown, conditions=conditions, skips=skips)
        found.append((tuple(map(format_value, at.values())), at, band))
    return found


def _columns(shown: _Pool, table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    if isinstance(table.columns, list):
        for name in table.columns:
            shown.check_name(name, "columns")
        # Columns that hold nothing but skips are shown only where there is nothing else.
        asked_for: Sequence[Condition | Skip] = shown.conditions or shown.skips
        fixed = distinct({name: each.coordinates.get(name) for name in table.columns} for each in asked_for)
        return [Column(_heading(at), at) for at in fixed]
    found = []
    for heading, selection in table.columns.items():
        column = Column(heading, selection)
        asked = [resolved(_chosen(selection), {**table.where, **row}) for row in rows]
        shown.check(asked if placeholders(selection) else asked[:1], column.name)
        found.append(column)
    return found


def _heading(at: Mapping[str, Any]) -> str:
    told = ", ".join(format_value(value) for value in at.values() if value is not None)
    return told or format_value(None)


# --- what a table may not do -------------------------------------------------------------------------


def _values(conditions: Iterable[Condition], name: str) -> list[Any]:
    """Return the values of a coordinate, as far as it means anything: unmoved images have no threat."""
    return distinct(
        each.coordinates.get(name)
        for each in conditions
        if not (each.facts.idle and name in ("norm", "radius"))
    )


def _names(conditions: Iterable[Condition]) -> list[str]:
    """Return the names of all coordinates of some conditions."""
    return list(dict.fromkeys(name for each in conditions for name in each.coordinates))


def _refuse_hiding(layout: Layout) -> None:
    table = layout.table
    settled = {*table.mean_over, *table.min_over, *table.worst_over}
    rows, columns = names_of(table.rows), names_of(table.columns)
    every = [condition for slot in layout.slots for condition in slot.conditions]
    for name in _names(every):
        kind = _kind(name)
        if kind in settled:
            continue
        groups = [slot.conditions for slot in layout.slots]
        if kind not in CHOICE and kind != "seed" and name not in columns:
            groups += [tuple(each for slot in row.slots for each in slot.conditions) for row in layout.rows]
        if name in QUESTION and name not in rows | columns:
            groups.append(tuple(every))
        for group in groups:
            if len(values := _values(group, name)) > 1:
                raise InputError(
                    f"table {layout.key!r} hides {name}: {_listed(values)}; "
                    f"{_shown_or_pinned(table, name, _listed(values)[0])}"
                )


def _shown_or_pinned(table: Table, name: str, value: Any) -> str:
    """Return what a table may say of a coordinate that it hides, as its lines would be."""
    pinned = f"pin it (where: {{{name}: {format_value(value)}}}), or show it in rows or columns"
    if isinstance(table.rows, list) and name not in table.rows:
        return f"{pinned} (rows: [{', '.join([*table.rows, name])}])"
    return pinned


def _refuse_merging(layout: Layout) -> None:
    """Refuse a worst case where there is none: over a metric that has none, or over other questions."""
    for row in layout.rows:
        for column, slot in zip(layout.columns, row.slots, strict=True):
            for name in CHOICE if slot.metric.worst is None else ():
                if name not in layout.table.mean_over and len(values := _values(slot.attacks, name)) > 1:
                    raise InputError(
                        f"table {layout.key!r}: {column.name}: {slot.metric.name} has no worst "
                        f"over {name}: {_listed(values)}; pin it"
                    )
        if layout.table.extra and (several := merged(layout, row)) is not None:
            name, values = several
            raise InputError(
                f"table {layout.key!r}: {' and '.join(layout.table.extra)} would merge {name}: "
                f"{_listed(values)}; they take the worst of one question to one defense"
            )


def _refuse_mixing(layout: Layout) -> None:
    """Refuse a column of percents and logits: nobody could read it."""
    for number, column in enumerate(layout.columns):
        units = distinct(row.slots[number].metric.unit for row in layout.rows)
        if len(units) > 1:
            raise InputError(
                f"table {layout.key!r}: {column.name} would hold numbers of several units: {', '.join(units)}"
            )


def _refuse_idle_classes(layout: Layout) -> None:
    """Refuse a class that no metric of its row or column is of."""
    rows = [(row.name, row.at, row.slots) for row in layout.rows]
    columns = [
        (column.name, column.at, tuple(row.slots[number] for row in layout.rows))
        for number, column in enumerate(layout.columns)
    ]
    for where, at, slots in (*rows, *columns):
        if "class" in at and not any(slot.metric.by_class for slot in slots):
            names = ", ".join(distinct(slot.metric.name for slot in slots))
            raise InputError(f"table {layout.key!r}: {where}: {names} is of no class, and class: was given")


def merged(layout: Layout, row: TableRow) -> tuple[str, list[Any]] | None:
    """Return what keeps the attacks of a row from being compared, such as another radius.

    Args:
        layout: The table.
        row: One of its rows.

    Returns:
        The name of a coordinate and its values; None where all attacks ask one defense one question.
    """
    attacked = [
        condition
        for slot in row.slots
        if slot.metric.name == layout.table.metric
        for condition in slot.attacks
    ]
    for name in _names(attacked):
        values = _values(attacked, name)
        if _kind(name) not in (*CHOICE, "seed") and len(values) > 1:
            return name, values
    return None


def _listed(values: Sequence[Any]) -> list[Any]:
    """Return values in order: numbers as numbers, None last."""
    return sorted(values, key=lambda value: (value is None, isinstance(value, str), value))

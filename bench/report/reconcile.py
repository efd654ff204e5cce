"""Printed numbers beside ours: which of them answer the same question, and what is known to differ.

A printed number is compared with ours only where data, threat, defense (with its architecture), attack and
metric agree (`settings.yaml`); where they do not, it is said which of them differs.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, TypeAlias

from bench.console import count
from bench.errors import InputError, did_you_mean
from bench.quantities import format_value, fraction
from bench.report import tables
from bench.report.published import Quote, near, papers, plain, quote
from bench.report.render.words import SCALES
from bench.report.tables import RenderedTable, TableCell
from bench.results.conditions import Condition
from bench.results.metrics import METRICS, Unit
from bench.results.outcomes import FrameOf
from bench.results.store import Store
from bench.suite.layout import Layout, TableRow, arrange, distinct
from bench.suite.tables import Comparison

JobOf: TypeAlias = Callable[[str], Mapping[str, Any] | None]
"""Gives the description of a stored evaluation (its `job.json`) by its key, None where there is none."""

_RESEMBLES = 2
"""How many columns of the same name make a published table resemble one of ours, given a row of the same."""


@dataclass(frozen=True)
class Line:
    """A printed number and ours."""

    row: tuple[str, ...]
    column: str
    paper_row: str
    paper_column: str
    printed: Quote
    cell: TableCell
    unit: Unit
    """The unit in which ours is printed; that of the printed number, too."""
    reasons: tuple[str, ...] = ()
    """What differs, so that the two do not answer the same question; none where they are compared."""
    known: tuple[str, ...] = ()
    """The entries of the register that move this number."""

    @property
    def compared(self) -> bool:
        """Whether both answer the same question, and ours is there."""
        return not self.reasons and self.cell.estimate is not None

    @property
    def difference(self) -> float | None:
        """Ours less the printed one, in the unit of the column; None where they are not compared."""
        if self.reasons or self.cell.estimate is None or not math.isfinite(self.cell.estimate.value):
            return None
        return SCALES[self.unit] * self.cell.estimate.value - self.printed.value

    @property
    def within(self) -> bool | None:
        """Whether the printed number lies in our interval; None where there is none, or ours is a bound."""
        known = self.cell.estimate
        if self.reasons or self.cell.bound or known is None or known.low is None or known.high is None:
            return None
        scale = SCALES[self.unit]
        # Ours are binary fractions times 100: an end that is printed alike is one.
        low, high = round(scale * known.low, 9), round(scale * known.high, 9)
        return low <= self.printed.value <= high


@dataclass(frozen=True)
class Reconciled:
    """One of our tables with a published one."""

    paper: str
    """The key of the published table."""
    title: str
    lines: tuple[Line, ...]
    """The numbers that both have, row by row."""
    known: Mapping[str, str]
    """What is known to differ, by its id in the register, of the numbers that are compared."""
    differences: tuple[str, ...]
    """What the task file says beside that."""
    said: str = ""
    """Why there is no line."""


@dataclass(frozen=True)
class Reconciliation:
    """One of our tables with everything that was published of it."""

    table: RenderedTable
    found: tuple[Reconciled, ...]
    said: str = ""
    """Why there is none."""


def jobs_of(store: Store, outcomes: FrameOf) -> JobOf:
    """Return what gives the descriptions of the evaluations of a results folder.

    Args:
        store: The results folder.
        outcomes: Gives the rows of an evaluation, or None where there are none that count.
    """
    return lambda key: None if outcomes(key) is None else store.job("evaluate", key)


@cache
def _settings() -> dict[str, Any]:
    import yaml

    text = files("bench.report").joinpath("settings.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def asked_papers(name: str) -> list[str]:
    """Return the keys of the published tables that a name means.

    Args:
        name: A table of a paper (``cnnf/3``), or a paper (``cnnf``): all of its tables.

    Raises:
        InputError: There is no such paper or table.
    """
    known = papers()
    found = [key for key in known if name in (key, key.partition("/")[0])]
    if not found:
        names = [*known, *dict.fromkeys(key.partition("/")[0] for key in known)]
        raise InputError(f"--paper {name}: no such paper or table{did_you_mean(name, names)}")
    return found


def reconcile(
    manifest: Mapping[str, Any], key: str, outcomes: FrameOf, job_of: JobOf, asked: Sequence[str] = ()
) -> Reconciliation:
    """Put what papers printed beside one of our tables.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        key: The table's key in the task file.
        outcomes: Gives the rows of an evaluation by its key, or None where there are none.
        job_of: Gives the descriptions of stored evaluations, which say what was trained on.
        asked: Keys of published tables; none: the one that the task file names, else those that have rows and
            columns of the same names.

    Returns:
        The numbers, or the reason why there is none.

    Raises:
        InputError: The table cannot be cut.
    """
    ours = _Ours(
        manifest, arrange(manifest, key), tables.cut(manifest, key, outcomes, tables.unexamined), job_of
    )
    named = ours.layout.table.published
    if asked:
        return Reconciliation(ours.rendered, tuple(_with(ours, each) for each in asked))
    if named is not None:
        return Reconciliation(ours.rendered, (_with(ours, named.table),))
    found = [_with(ours, each) for each in papers() if _resembles(ours, each)]
    said = (
        "" if found else "no published table has rows and columns of these names, so that nothing is compared"
    )
    return Reconciliation(ours.rendered, tuple(found), said)


@dataclass(frozen=True)
class _Ours:
    """One of our tables, and what is known of its numbers."""

    manifest: Mapping[str, Any]
    layout: Layout
    rendered: RenderedTable
    job_of: JobOf

    @cached_property
    def labels(self) -> dict[str, int]:
        """The places of the rows, by their headings as a task file names them."""
        return {", ".join(row.label): place for place, row in enumerate(self.layout.rows)}

    @cached_property
    def headings(self) -> dict[str, int]:
        """The places of the columns, extra ones last."""
        names = [*(column.heading for column in self.layout.columns), *self.layout.table.extra]
        return {name: place for place, name in enumerate(names)}

    def conditions(self, row: TableRow, column: int) -> tuple[Condition, ...]:
        """Return what stands behind a cell; behind an extra one all that is attacked in its row."""
        if column < len(row.slots):
            slot = row.slots[column]
            return slot.attacks or slot.conditions
        counted = (each for each in row.slots if each.metric.name == self.layout.table.metric)
        return tuple(condition for slot in counted for condition in slot.attacks)

    def metric(self, row: TableRow, column: int) -> str:
        """Return what is counted in a cell."""
        return row.slots[column].metric.name if column < len(row.slots) else self.layout.table.metric


def _with(ours: _Ours, key: str) -> Reconciled:
    """Put a published table beside ours."""
    paper, named = papers()[key], ours.layout.table.published
    comparison = named if named is not None and named.table == key else None
    title, differences = str(paper["title"]), tuple(comparison.differences if comparison else ())
    if not paper["rows"]:
        return Reconciled(key, title, (), {}, differences, f"{key} has curves, and no printed number")
    if key not in _settings()["tables"]:
        return Reconciled(key, title, (), {}, differences, f"{key} is no table of results")
    lines = tuple(_lines(ours, key, comparison))
    cited = set(re.findall(r"D-\d\d", " ".join(differences)))
    known = {
        each: text
        for each, text in _settings()["register"].items()
        if each not in cited and any(each in line.known for line in lines if line.compared)
    }
    said = "" if lines else f"{key} has no number whose row and column have the names of ours"
    return Reconciled(key, title, lines, known, differences, said)


def _resembles(ours: _Ours, key: str) -> bool:
    if key not in _settings()["tables"]:
        return False
    rows, columns = _names_of(key)
    alike = [name for name in ours.headings if any(plain(each) == plain(name) for each in columns)]
    # One of both may have a setting in brackets; where both have, and differ, they are of other tables.
    same = any(
        plain(name) in (plain(each), _outside(each)) or _outside(name) == plain(each)
        for name in ours.labels
        for each in rows
    )
    return len(alike) >= _RESEMBLES and same


def _names_of(key: str) -> tuple[list[str], list[str]]:
    paper = papers()[key]
    columns = paper.get("columns") or distinct(name for row in paper["rows"].values() for name in row)
    return list(paper["rows"]), list(columns)


def _candidates(
    ours: Iterable[str], theirs: Sequence[str], given: Mapping[str, str] | None
) -> dict[str, list[str]]:
    """Return by each of our names those of the paper that may mean it: as given, or as it is spelled."""
    found: dict[str, list[str]] = {}
    for name in ours:
        if given is not None:
            alike = [each for each in theirs if each == given.get(name, name)]
        else:
            alike = [each for each in theirs if plain(each) == plain(name)]
            if not alike:
                # What stands in brackets is a setting, which is compared for itself.
                alike = [each for each in theirs if _outside(each) == _outside(name)]
        if alike:
            found[name] = alike
    return found


def _outside(name: str) -> str:
    return plain(re.sub(r"\([^)]*\)", "", name))


def _lines(ours: _Ours, key: str, comparison: Comparison | None) -> Iterator[Line]:
    """Yield what both tables have; of several rows that may be meant, the one that is most like ours."""
    rows, columns = _names_of(key)
    row_names = _candidates(ours.labels, rows, comparison.rows if comparison else None)
    column_names = _candidates(ours.headings, columns, comparison.columns if comparison else None)
    for label, meant in row_names.items():
        found = [list(_row(ours, key, label, each, column_names)) for each in meant]
        yield from min(
            found, key=lambda lines: (len({each for line in lines for each in line.reasons}), -len(lines))
        )


def _row(
    ours: _Ours, key: str, label: str, theirs: str, columns: Mapping[str, Sequence[str]]
) -> Iterator[Line]:
    printed, place = papers()[key]["rows"][theirs], ours.labels[label]
    row, rendered = ours.layout.rows[place], ours.rendered.rows[place]
    for heading, names in columns.items():
        number = quote(printed.get(names[0]))
        if number is None:
            continue
        column = ours.headings[heading]
        line = Line(
            rendered.label,
            heading,
            theirs,
            names[0],
            number,
            rendered.cells[column],
            ours.rendered.units[column],
        )
        expected = _expected(key, theirs, names[0])
        reasons = tuple(_reasons(ours, row, column, expected))
        yield replace(line, reasons=reasons, known=tuple(_known(key, theirs, names[0])))


def _known(key: str, row: str, column: str) -> Iterator[str]:
    """Yield the entries of the register that move a printed number."""
    for each, where in _settings()["tables"][key]["known"].items():
        if row in where.get("rows", [row]) and column in where.get("columns", [column]):
            yield each


# --- what must agree ---------------------------------------------------------------------------------


def _expected(key: str, row: str, column: str) -> dict[str, Any]:
    """Return what a printed number is about."""
    paper, setting = papers()[key], _settings()["tables"][key]
    found: dict[str, Any] = {
        "data": paper.get("dataset"),
        "norm": paper.get("norm"),
        "eps": paper.get("eps"),
        "defense": {},
    }
    for level in (setting, setting.get("rows", {}).get(row, {}), setting.get("columns", {}).get(column, {})):
        found |= {
            name: each for name, each in level.items() if name not in ("defense", "rows", "columns", "known")
        }
        found["defense"] = {**found["defense"], **level.get("defense", {})}
    return found


def _reasons(ours: _Ours, row: TableRow, column: int, expected: Mapping[str, Any]) -> list[str]:
    """Return what differs between a cell of ours and a printed number, each difference once."""
    counted = ours.metric(row, column)
    found = (
        [] if expected.get("metric") in (None, counted) else [_differs("metric", counted, expected["metric"])]
    )
    if METRICS[counted].unit == "millions":
        # A count of parameters is of no data and of no attack.
        expected = {**expected, "data": None, "norm": None, "eps": None}
    for condition in ours.conditions(row, column):
        found += _of_data(ours, condition, expected)
        found += _of_threat(condition, expected)
        found += _of_defense(ours, condition, expected)
        found += _of_attack(ours, condition, expected)
    return distinct(found)


def _of_data(ours: _Ours, condition: Condition, expected: Mapping[str, Any]) -> Iterator[str]:
    theirs = expected["data"]
    if theirs is None:
        return
    data = ours.manifest.get("data", {}).get(condition.data, {"name": condition.data})
    size = expected.get("resize")
    if plain(data["name"]) != plain(theirs):
        yield _differs("data", _shown_data(data), theirs)
        return
    if data.get("resize") != size:
        yield _differs("data", _shown_data(data), f"{theirs} {_size(size)}")
    if data.get("split", "test") != "test" or (data.get("only") and not expected.get("subset")):
        yield _differs("data", _shown_data(data), f"all of the test images of {theirs}")
    trained = (((ours.job_of(condition.job) or {}).get("victim") or {}).get("train") or {}).get("data")
    wanted = expected.get("train", theirs)
    if trained is not None and (
        plain(trained["name"]) != plain(wanted) or trained.get("only") or trained.get("size") is not None
    ):
        yield _differs("training data", _shown_data(trained), f"all of {wanted}")


def _shown_data(data: Mapping[str, Any]) -> str:
    found = str(data["name"])
    if data.get("size") is not None:
        found = f"{count(data['size'], 'image')} of {found}"
    if data.get("only"):
        found += f", classes {', '.join(map(str, data['only']))} alone"
    return f"{found} {_size(data['resize'])}" if data.get("resize") else found


def _size(resize: int | None) -> str:
    return "as they are" if resize is None else f"at {resize}x{resize}"


def _of_threat(condition: Condition, expected: Mapping[str, Any]) -> Iterator[str]:
    if condition.facts.idle:
        return
    if expected["norm"] not in (None, condition.norm):
        yield _differs("norm", condition.norm, expected["norm"])
    if expected["eps"] is not None and not near(condition.radius, fraction(expected["eps"])):
        ours = "none" if condition.radius is None else format_value(condition.radius)
        yield _differs("radius", ours, expected["eps"])


def _of_attack(ours: _Ours, condition: Condition, expected: Mapping[str, Any]) -> Iterator[str]:
    if condition.facts.idle:
        return
    if not _agrees(condition.facts.use, expected.get("attack")):
        yield _differs("attack", condition.facts.use, _first(expected["attack"]))
        return
    named = ours.manifest.get("attacks", {}).get(condition.coordinates["attack"], {})
    steps = named.get("params", {}).get("steps")
    if steps is not None and not _agrees(steps, expected.get("steps")):
        yield _differs("attack", f"{steps} steps", f"{_first(expected['steps'])} steps")


def _of_defense(ours: _Ours, condition: Condition, expected: Mapping[str, Any]) -> Iterator[str]:
    if not _agrees(condition.coordinates["readout"], expected.get("readout")):
        yield _differs("read-out", condition.coordinates["readout"], _first(expected["readout"]))
    known = _defense(ours, condition)
    # A defense of another kind comes first: its parameters are no matter then.
    for name, theirs in sorted(expected["defense"].items(), key=lambda each: each[0] != "use"):
        if name not in known:
            # What a part is made of is known of stored results alone; another defense lacks the parameter.
            continue
        if not _agrees(known[name], theirs):
            what = "defense" if name == "use" else "architecture"
            label = "" if name == "use" else f"{name} "
            yield _differs(what, f"{label}{_word(known[name])}", f"{label}{_word(_first(theirs))}")
            if name == "use":
                return


def _defense(ours: _Ours, condition: Condition) -> dict[str, Any]:
    """Return a defense with its parameters, those of its parts, and those that are set at inference time."""
    trained = ((ours.job_of(condition.job) or {}).get("victim") or {}).get("train") or {}
    named = trained.get("defense") or ours.manifest.get("defenses", {}).get(
        condition.coordinates["defense"], {}
    )
    found = {"use": named["use"], **named.get("params", {})} if named else {}
    for part, each in trained.get("parts", {}).items():
        found |= {f"{part}.{name}": value for name, value in each["defense"]["params"].items()}
    inference = {
        name.removeprefix("inference."): value
        for name, value in condition.coordinates.items()
        if name.startswith("inference.")
    }
    return {**found, **inference}


def _agrees(ours: Any, theirs: Any) -> bool:
    """Return whether one of ours is what the paper has, or one of what is taken for it."""
    if theirs is None:
        return True
    for each in theirs if isinstance(theirs, list) else [theirs]:
        other = fraction(each) if isinstance(each, str) and isinstance(ours, int | float) else each
        if ours == other or (isinstance(ours, float) and near(ours, other)):
            return True
    return False


def _first(theirs: Any) -> Any:
    return theirs[0] if isinstance(theirs, list) else theirs


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "unset" if value is None else format_value(value)


def _differs(what: str, ours: object, theirs: object) -> str:
    return f"{what}: {ours} here, {theirs} in the paper"

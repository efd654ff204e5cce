"""From outcomes to squares: a table's cells are read, settled, averaged, compared and doubted.

What a table says and which cell stands where is `layout.py`'s; how squares look is `render.py`'s. A
square is a number only if what it counts was done: everything else is a hole that says why.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import numpy as np

from bench import checks, metrics
from bench.checks import Cell, Flag, Seen
from bench.errors import InputError, did_you_mean
from bench.layout import Column, Comparison, Layout, Line, Place, arrange, distinct, merged
from bench.layout import Table as Table
from bench.metrics import Estimate, Metric, Scored, Unit
from bench.outcomes import Frame, Rows, arrays
from bench.quantities import DASH, fraction, spell

Outcomes: TypeAlias = Callable[[str], Frame | None]
"""Gives the rows of an evaluation by its job's key, None where there is a hole."""

NOT_RUN = "not run"


@dataclass(frozen=True)
class Square:
    """An entry of a table."""

    estimate: Estimate | None
    hole: str = ""
    """What stands in place of a number: ``not run``, or a dash where nothing was asked."""
    bound: Literal["", "≤", "≥"] = ""
    """Set where attacks are missing: they could only make it worse."""
    weakest: bool = False
    """Whether no attack column of its row is worse for the defender."""
    void: int = 0
    """Moves that were void, over all seeds."""
    notes: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class Quote:
    """A published number, in the unit it was printed in."""

    value: float
    std: float | None


@dataclass(frozen=True)
class Row:
    """A row of squares."""

    label: tuple[str, ...]
    at: Mapping[str, Any]
    """The coordinates that it fixes."""
    squares: tuple[Square, ...]
    published: tuple[Quote | None, ...] = ()
    """A paper's numbers for the same columns; empty where there are none."""


@dataclass(frozen=True)
class Grid:
    """A table, cut: everything that its text, its file and its figure need."""

    key: str
    table: Table
    metric: Metric
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    """Headings of the squares, extra ones last."""
    at: tuple[Mapping[str, Any], ...]
    """The coordinates that each column fixes; none for extra ones."""
    units: tuple[Unit, ...]
    """In which the numbers of each column are printed."""
    rows: tuple[Row, ...]
    question: Mapping[str, str]
    """Data, norm and radius, where they are the same for the whole table."""
    seeds: int
    """The most that a square has."""
    void: int
    """Moves that were void, over the whole table; a job that several squares share counts once."""
    flags: tuple[Flag, ...] = ()
    """Doubts about the table as a whole."""
    source: str = ""
    """Title and key of the published table beside ours."""


def check(manifest: Mapping[str, Any], key: str) -> None:
    """Raise `InputError` where a table cannot be cut, whatever the outcomes will be."""
    layout = arrange(manifest, key)
    _axis_values(layout)
    _published(layout, manifest)


def jobs(manifest: Mapping[str, Any], key: str) -> set[str]:
    """Return the keys of the evaluations that a table reads."""
    return arrange(manifest, key).jobs()


def cut(manifest: Mapping[str, Any], key: str, outcomes: Outcomes) -> Grid:
    """Read what a table needs, each job once, and settle its squares."""
    layout = arrange(manifest, key)
    quotes = _published(layout, manifest)
    book = _Book(layout, outcomes)
    cut_lines = [_line(layout, line, book) for line in layout.lines]
    behind = [seen for line in cut_lines for seen in line.seen]
    risen = iter(checks.of_grid(behind))
    rows = []
    for line, made in zip(layout.lines, cut_lines, strict=True):
        doubted = [
            replace(square, flags=(*square.flags, *next(risen)))
            for square in made.squares[: len(layout.columns)]
        ]
        squares = (*doubted, *made.squares[len(layout.columns) :])
        rows.append(Row(line.label, line.at, squares, quotes.get(line.label, ())))
    places = [place for line in layout.lines for place in line.places]
    every = [cell for place in places for cell in place.cells]
    every = every or [cell for place in places for cell in place.skips]
    metric = metrics.METRICS[layout.table.metric]
    extra = layout.table.extra
    return Grid(
        key=key,
        table=layout.table,
        metric=metric,
        heads=layout.heads,
        columns=(*(column.heading for column in layout.columns), *extra),
        at=(*(column.at for column in layout.columns), *({} for _ in extra)),
        units=(*layout.units, *(metric.unit for _ in extra)),
        rows=tuple(rows),
        question=_question(every),
        seeds=max((each.estimate.seeds for row in rows for each in row.squares if each.estimate), default=0),
        void=checks.voids({each.cell["job"]: each for seen in behind for each in seen}.values()),
        flags=tuple(_unequal(layout)),
        source=_source(layout.table.published),
    )


# --- squares -----------------------------------------------------------------------------------------


class _Book:
    """The outcomes that a table reads, each job once."""

    def __init__(self, layout: Layout, outcomes: Outcomes) -> None:
        self._layout = layout
        self._outcomes = outcomes
        self._rows: dict[str, Rows | None] = {}

    def rows(self, job: str) -> Rows | None:
        if job not in self._rows:
            frame = self._outcomes(job)
            self._rows[job] = None if frame is None else arrays(frame, self._layout.reads)
        return self._rows[job]

    def look(self, cell: Cell, metric: Metric) -> Seen | str:
        """Return what is known of a cell, or why it has no number."""
        rows = self.rows(cell["job"])
        if rows is None:
            return NOT_RUN
        if (lacking := metric.lacks(rows)) is not None:
            return lacking
        needed = self._layout.needs_unmoved(cell, metric)
        clean = None
        if needed or metric.clean == "used":
            unmoved = self._layout.unmoved(cell)
            found = (self.rows(each["job"]) for each in unmoved)
            clean = next((each for each in found if each is not None), None)
            if clean is None and needed:
                return f"{NOT_RUN}: the clean images" if unmoved else "no task asks for the attack none here"
        judged = rows
        if clean is not None and cell["budget"] == "distance" and cell["radius"] is not None:
            judged = metrics.within(rows, clean, cell["radius"])
        return Seen(cell, rows, judged, clean)


@dataclass(frozen=True)
class _CutLine:
    squares: tuple[Square, ...]
    """Of the columns, then of the extra ones."""
    seen: tuple[tuple[Seen, ...], ...]
    """The cells behind each column's square."""


def _line(layout: Layout, line: Line, book: _Book) -> _CutLine:
    table = layout.table
    squares: list[Square] = []
    seen: list[tuple[Seen, ...]] = []
    for place in line.places:
        square, behind = _square(place, table, book)
        squares.append(square)
        seen.append(behind)
    doubts = checks.of_row(seen)
    squares = [
        replace(square, flags=(*square.flags, *flags)) for square, flags in zip(squares, doubts, strict=True)
    ]
    attacked = [
        position
        for position, place in enumerate(line.places)
        if place.attacks and place.metric.name == table.metric
    ]
    metric = metrics.METRICS[table.metric]
    named = {layout.columns[each].heading: squares[each] for each in attacked}
    if table.bold == "weakest" and metric.worst is not None and merged(layout, line) is None:
        weakest = _weakest(metric, list(named.values()))
        for position in attacked:
            estimate = squares[position].estimate
            if estimate is not None and math.isclose(estimate.value, weakest, abs_tol=1e-12):
                squares[position] = replace(squares[position], weakest=True)
    for heading in table.extra:
        if heading == "Worst":
            parts = {layout.columns[each].heading: line.places[each].attacks for each in attacked}
            squares.append(_settled(parts, metric, (), book)[0])
        else:
            squares.append(_best(metric, named))
    return _CutLine(tuple(squares), tuple(seen))


def _square(place: Place, table: Table, book: _Book) -> tuple[Square, tuple[Seen, ...]]:
    """Settle a square; return it with what stands behind it."""
    reasons = distinct(skip["reason"] for skip in place.skips)
    # Doing nothing stands for itself only: beside attacks it is the metric's business.
    cells = place.attacks or place.cells
    if not cells:
        return Square(None, DASH, notes=tuple(reasons)), ()
    groups: dict[tuple[Any, ...], dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        groups[tuple(cell[name] for name in table.min_over)][checks.title(cell)].append(cell)
    settled = [_settled(parts, place.metric, table.mean_over, book) for parts in groups.values()]
    square, seen = settled[0][0], tuple(each for _, behind in settled for each in behind)
    if len(settled) > 1:
        named = {", ".join(parts): each for parts, (each, _) in zip(groups.values(), settled, strict=True)}
        square = _best(place.metric, named)
    return (
        replace(
            square,
            void=checks.voids(seen),
            notes=(*square.notes, *reasons),
            flags=(*checks.of_square(seen), *square.flags),
        ),
        seen,
    )


def _settled(
    parts: Mapping[str, Sequence[Cell]], metric: Metric, mean_over: Sequence[str], book: _Book
) -> tuple[Square, tuple[Seen, ...]]:
    """Take the worst over `parts` example by example, within each seed, then average over seeds.

    A seed counts if every part is there. If there is no such seed, what is there bounds the number.
    """
    seeds = sorted({cell["seed"] for cells in parts.values() for cell in cells})
    looks: dict[int, dict[str, list[Seen | str]]] = {seed: {} for seed in seeds}
    for seed in seeds:
        for name, cells in parts.items():
            same = {(cell["job"], cell["radius"]): cell for cell in cells if cell["seed"] == seed}
            looks[seed][name] = [book.look(cell, metric) for cell in same.values()] or [NOT_RUN]
    seen = tuple(
        look
        for named in looks.values()
        for found in named.values()
        for look in found
        if isinstance(look, Seen)
    )
    lacking = {
        seed: [name for name, found in named.items() if any(isinstance(look, str) for look in found)]
        for seed, named in looks.items()
    }
    there = {
        seed: [look for found in named.values() for look in found if isinstance(look, Seen)]
        for seed, named in looks.items()
    }
    complete = [seed for seed in seeds if not lacking[seed]]
    # A worst case of less is a bound; a mean over some of the targets is nothing.
    bounded = metric.worst is not None and "target" not in mean_over
    partial = [seed for seed in seeds if there[seed] and bounded]
    fewest = min((len(lacking[seed]) for seed in partial), default=0)
    usable = complete or [seed for seed in partial if len(lacking[seed]) == fewest]
    if not usable:
        reasons = distinct(
            look
            for named in looks.values()
            for found in named.values()
            for look in found
            if isinstance(look, str)
        )
        hole = NOT_RUN if not reasons or any(each.startswith(NOT_RUN) for each in reasons) else DASH
        return Square(None, hole, notes=tuple(each for each in reasons if each != hole)), seen
    unions = {seed: _unions(there[seed], mean_over) for seed in usable}
    scored = {seed: [_scored(union, metric) for union in parts_] for seed, parts_ in unions.items()}
    estimate = metrics.estimate(metric, scored)
    notes = [f"{len(usable)} of {len(seeds)} seeds"] if len(usable) < len(seeds) else []
    if not complete:
        missing = distinct(name for seed in usable for name in lacking[seed])
        notes.append(f"without {', '.join(missing)} ({NOT_RUN})")
    if estimate is None:
        return Square(None, DASH, notes=(*notes, "no example counts")), seen
    if math.isinf(estimate.value):
        shares = [np.isfinite(each.values).mean() for parts_ in scored.values() for each in parts_]
        notes.append(f"{100 * float(np.mean(shares)):.1f} % of the examples were broken")
    bound: Literal["", "≤", "≥"] = "" if complete else _bound(metric)
    flags = checks.of_union([union for parts_ in unions.values() for union in parts_], metric)
    return Square(estimate, bound=bound, notes=tuple(notes), flags=tuple(flags)), seen


def _bound(metric: Metric) -> Literal["≤", "≥"]:
    return "≥" if metric.worst == "greatest" else "≤"


def _unions(seen: Iterable[Seen], mean_over: Sequence[str]) -> list[list[Seen]]:
    """Return what is settled together of one seed; each target by itself, where targets are averaged."""
    groups: dict[Any, list[Seen]] = defaultdict(list)
    for each in seen:
        groups[each.cell["target"] if "target" in mean_over else None].append(each)
    return list(groups.values())


def _scored(union: Iterable[Seen], metric: Metric) -> Scored:
    return metrics.settle(metric, [metrics.score(metric, each.judged, each.clean) for each in union])


def _weakest(metric: Metric, squares: Sequence[Square]) -> float:
    """Return the value that an attacker likes best; NaN where that is not known, or there is no choice."""
    values = [each.estimate.value for each in squares if each.estimate is not None]
    unknown = any(each.hole == NOT_RUN or each.bound for each in squares)
    if unknown or len(values) < 2:
        return math.nan
    return max(values) if metric.worst == "greatest" else min(values)


def _best(metric: Metric, columns: Mapping[str, Square]) -> Square:
    """Return the attack column that is worst for the defender, after its seeds were averaged."""
    there = [square for square in columns.values() if square.estimate is not None]
    missing = [heading for heading, square in columns.items() if square.hole == NOT_RUN]
    if not there:
        return Square(None, NOT_RUN if missing else DASH)

    def value(square: Square) -> float:
        assert square.estimate is not None
        return -square.estimate.value if metric.worst == "greatest" else square.estimate.value

    best = min(there, key=value)
    notes = [*best.notes, *([f"without {', '.join(missing)} ({NOT_RUN})"] if missing else [])]
    bound = _bound(metric) if missing or any(square.bound for square in there) else ""
    # Doubts about its attacks stand on the column; that it joins answers goes with the number.
    flags = tuple(flag for flag in best.flags if flag.code == "unluckiest-answer")
    return Square(best.estimate, bound=bound, notes=tuple(notes), flags=flags)


# --- the table as a whole ----------------------------------------------------------------------------


def _question(cells: Sequence[Cell]) -> dict[str, str]:
    """Return what is asked, as far as it is the same for all cells; unmoved images have no threat."""
    found = {}
    for name in ("data", "norm", "radius"):
        asked = [cell[name] for cell in cells if name == "data" or cell.get("use") != "none"]
        values = distinct(asked)
        if len(values) == 1:
            found[name] = spell(values[0]) if values[0] is not None else "none"
    return found


def _unequal(layout: Layout) -> Iterable[Flag]:
    """Doubt a table whose columns ask for different numbers of examples of one data set."""
    asked: dict[str, dict[str, int]] = defaultdict(dict)
    for line in layout.lines:
        for column, place in zip(layout.columns, line.places, strict=True):
            for cell in place.cells:
                known = asked[cell["data"]]
                known[column.heading] = max(known.get(column.heading, 0), int(cell["n"]))
    for columns in asked.values():
        yield from checks.unequal(columns)


def _axis_values(layout: Layout) -> None:
    """Raise where a figure's horizontal axis has something on it that is no number."""
    figure = layout.table.figure
    if figure is None:
        return
    axes: list[Sequence[Line | Column]] = [layout.columns, layout.lines]
    for axis in axes:
        if any(figure.x in each.at for each in axis):
            for each in axis:
                if position(each.at, figure.x) is None:
                    name = each.heading if isinstance(each, Column) else ", ".join(each.label)
                    raise InputError(
                        f"table {layout.key!r}: figure: {name!r} has no number for {figure.x}, "
                        f"but {each.at.get(figure.x)!r}"
                    )
            return


def position(at: Mapping[str, Any], x: str) -> float | None:
    """Return where a row or column lies on a figure's horizontal axis."""
    try:
        value = fraction(at.get(x))
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# --- published numbers -------------------------------------------------------------------------------


@cache
def _papers() -> dict[str, Any]:
    """Return the numbers that papers printed, by table."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = files("bench").joinpath("published.yaml").read_text(encoding="utf-8")
    return dict(yaml.load(text, Loader=loader))


def _paper(comparison: Comparison) -> dict[str, Any]:
    papers = _papers()
    if comparison.table not in papers:
        raise InputError(f"published: no table {comparison.table!r}{did_you_mean(comparison.table, papers)}")
    return dict(papers[comparison.table])


def _source(comparison: Comparison | None) -> str:
    return f"{_paper(comparison)['title']} ({comparison.table})" if comparison is not None else ""


def _published(
    layout: Layout, manifest: Mapping[str, Any]
) -> dict[tuple[str, ...], tuple[Quote | None, ...]]:
    """Return a paper's numbers for each of our rows that it has."""
    comparison = layout.table.published
    if comparison is None:
        return {}
    try:
        paper = _paper(comparison)
        return _quotes(layout, comparison, paper, manifest)
    except InputError as error:
        raise InputError(f"table {layout.key!r}: {error}") from None


def _quotes(
    layout: Layout, comparison: Comparison, paper: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[tuple[str, ...], tuple[Quote | None, ...]]:
    headings = [*(column.heading for column in layout.columns), *layout.table.extra]
    labels = {", ".join(line.label): line for line in layout.lines}
    columns = paper.get("columns") or distinct(name for row in paper["rows"].values() for name in row)
    for ours, theirs, mine, known in (
        ("columns", comparison.columns, headings, columns),
        ("rows", comparison.rows, labels, paper["rows"]),
    ):
        for heading, name in theirs.items():
            if heading not in mine:
                raise InputError(f"published: {ours}: no {heading!r} here{did_you_mean(heading, mine)}")
            if name not in known:
                raise InputError(
                    f"published: {ours}: {comparison.table} has no {name!r}{did_you_mean(name, known)}"
                )
    found: dict[tuple[str, ...], tuple[Quote | None, ...]] = {}
    for label, line in labels.items():
        row = paper["rows"].get(comparison.rows.get(label, label))
        if row is not None:
            _refuse_other_question(comparison.table, paper, line, manifest)
            found[line.label] = tuple(
                _quote(row.get(comparison.columns.get(heading, heading))) for heading in headings
            )
    return found


def _quote(number: Mapping[str, Any] | None) -> Quote | None:
    if number is None or number.get("mean") is None:
        return None
    return Quote(float(number["mean"]), None if number.get("std") is None else float(number["std"]))


def _refuse_other_question(
    key: str, paper: Mapping[str, Any], line: Line, manifest: Mapping[str, Any]
) -> None:
    """Refuse to print a paper's numbers beside another data set's, or another threat's."""
    for place in line.places:
        for cell in place.cells:
            data = manifest.get("data", {}).get(cell["data"], {}).get("name", cell["data"])
            mismatch = "dataset" in paper and _plain(data) != _plain(paper["dataset"])
            if cell["use"] != "none":
                mismatch |= "norm" in paper and cell["norm"] != paper["norm"]
                # Papers round: 8/255 is also printed as 0.031.
                mismatch |= "eps" in paper and not _near(cell["radius"], fraction(paper["eps"]))
            if mismatch:
                theirs = ", ".join(str(paper[name]) for name in ("dataset", "norm", "eps") if name in paper)
                raise InputError(
                    f"published: {key} is about {theirs}, and row {', '.join(line.label)!r} about "
                    f"{data}, {cell['norm']}, {spell(cell['radius'])}"
                )


def _near(radius: float | None, other: object) -> bool:
    return radius is not None and isinstance(other, int | float) and math.isclose(radius, other, rel_tol=0.02)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

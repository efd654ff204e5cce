"""From outcomes to the cells of a table: outcomes are read, settled, averaged, compared and flagged.

Which condition stands where is decided in `layout.py`; how cells look, in `render`. A cell is a number only
if what it counts was run. Every other cell is a hole that gives its reason.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np

from bench.errors import InputError
from bench.quantities import DASH, format_value, fraction
from bench.report import checks, published
from bench.report.checks import Evidence, Flag
from bench.report.grades import Grade, grade
from bench.report.published import Quote
from bench.results import metrics, standing
from bench.results.conditions import Condition, Skip
from bench.results.metrics import Estimate, Metric, On, PerExample, Unit
from bench.results.outcomes import Frame, FrameOf, Rows, arrays
from bench.suite.layout import Column, Layout, Slot, TableRow, arrange, distinct, merged
from bench.suite.tables import Table

NOT_RUN = "not run"

BROKE_DOWN = "it raised on"
"""How the reason begins why one of several attacks that were run as one has no number."""

OF_THOSE = ", of those that stood"
"""What the heading of a column says where its attacks saw only what others had left."""

Bound: TypeAlias = Literal["", "≤", "≥"]
"""Set where attacks are missing: they could only make the number worse for the defender."""


@dataclass(frozen=True)
class TableCell:
    """An entry of a table."""

    estimate: Estimate | None
    """The number; None where there is none."""
    hole: str = ""
    """What stands in place of a number: ``not run``, or a dash where nothing was asked."""
    bound: Bound = ""
    weakest: bool = False
    """Whether no attack column of its row is worse for the defender."""
    invalid: int = 0
    """Moves that were invalid, over all seeds."""
    notes: tuple[str, ...] = ()
    """Remarks such as ``2 of 3 seeds``."""
    flags: tuple[Flag, ...] = ()
    lacking: tuple[int, ...] = ()
    """The seeds that were asked for and not run."""
    jobs: tuple[str, ...] = ()
    """The keys of the evaluations that it counts."""


@dataclass(frozen=True)
class RenderedRow:
    """A row of cells."""

    label: tuple[str, ...]
    at: Mapping[str, Any]
    """The coordinates that it fixes."""
    cells: tuple[TableCell, ...]
    published: tuple[Quote | None, ...] = ()
    """A paper's numbers for the same columns; empty where there are none."""
    flags: tuple[Flag, ...] = ()
    """Flags of the defense that it shows, whatever attacks it."""
    grade: Grade | None = None
    """How much stands behind it; None where it attacks nothing, or shows several defenses."""
    unmoved: TableCell | None = None
    """What counts on the clean images, where the table is a figure over radii and they were asked about."""


@dataclass(frozen=True)
class RenderedTable:
    """A table with its numbers: everything that its text, its file and its figure need."""

    key: str
    table: Table
    """What the task file says of it."""
    metric: Metric
    """The table's metric; a row or a column may have its own."""
    heads: tuple[str, ...]
    """Headings of the row labels: coordinates, or one empty text for rows with names."""
    columns: tuple[str, ...]
    """Headings of the cells, extra ones last."""
    at: tuple[Mapping[str, Any], ...]
    """The coordinates that each column fixes; none for extra ones."""
    units: tuple[Unit, ...]
    """The unit in which the numbers of each column are printed."""
    rows: tuple[RenderedRow, ...]
    question: Mapping[str, str]
    """Data, norm and radius, where they are the same for the whole table."""
    seeds: int
    """The largest number of seeds of a cell."""
    worst: bool
    """Whether attacks were run as one, each on what stood against those before it."""
    invalid: int
    """Moves that were invalid, over the whole table; a job that several cells share counts once."""
    coarse: tuple[str, ...] = ()
    """The attacks that searched in bfloat16, by their names in the task file."""
    added: tuple[str, ...] = ()
    """The attacks that `bench doctor --fix` added, and that columns over attacks count."""
    flags: tuple[Flag, ...] = ()
    """Flags of the table as a whole."""
    source: str = ""
    """Title and key of the published table beside ours."""

    @property
    def alarms(self) -> list[str]:
        """The codes of its flags that are alarms, each once."""
        rows = (flag for row in self.rows for flag in row.flags)
        cells = (flag for row in self.rows for cell in row.cells for flag in cell.flags)
        every = (*self.flags, *rows, *cells)
        return list(dict.fromkeys(flag.code for flag in every if flag.level == "alarm"))


def check(manifest: Mapping[str, Any], key: str) -> None:
    """Refuse a table that cannot be cut, whatever the outcomes will be.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        key: The table's key in the task file.

    Raises:
        InputError: The table is not one that can be printed.
    """
    layout = arrange(manifest, key)
    _axis_values(layout)
    published.quotes(layout, manifest)


def jobs(manifest: Mapping[str, Any], key: str) -> set[str]:
    """Return the keys of the evaluations that a table reads.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        key: The table's key in the task file.

    Returns:
        The keys.

    Raises:
        InputError: The table is not one that can be printed.
    """
    return arrange(manifest, key).jobs()


FoundOf: TypeAlias = Callable[[str, str], Mapping[str, Any] | None]
"""Gives what a trial, an examination or the referee of an evaluation found, by the kind and the key of the
job; None where there was none."""


def unexamined(kind: str, key: str) -> None:
    """Give nothing, for what counts on outcomes alone and shows no flag: a `FoundOf`.

    Args:
        kind: Not looked at.
        key: Not looked at.
    """


def cut(manifest: Mapping[str, Any], key: str, outcomes: FrameOf, found: FoundOf) -> RenderedTable:
    """Read the outcomes of a table, each evaluation once, and compute its cells.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        key: The table's key in the task file.
        outcomes: Gives the rows of an evaluation by its key, or None where there are none.
        found: Gives what trials and examinations found.

    Returns:
        The table with its numbers.

    Raises:
        InputError: The table is not one that can be printed.
    """
    layout = arrange(manifest, key)
    quotes = published.quotes(layout, manifest)
    reader = OutcomeReader(layout, outcomes, found)
    settled = [_row(layout, row, reader) for row in layout.rows]
    behind = [seen for row in settled for seen in row.seen]
    beside = [_beside(layout, row, reader) for row in layout.rows]
    flags = checks.compared([row.seen for row in settled], beside)
    rows = [
        _rendered(
            layout,
            row,
            replace(made, cells=_keyed(layout, row, _flagged(layout, row, made.cells, more))),
            hidden,
            quotes,
            reader,
        )
        for row, made, more, hidden in zip(layout.rows, settled, flags, beside, strict=True)
    ]
    metric = metrics.METRICS[layout.table.metric]
    extra = layout.table.extra
    return RenderedTable(
        key=key,
        table=layout.table,
        metric=metric,
        heads=layout.heads,
        columns=(*_headings(layout), *extra),
        at=(*(column.at for column in layout.columns), *({} for _ in extra)),
        units=(*layout.units, *(metric.unit for _ in extra)),
        rows=tuple(rows),
        question=_question(layout),
        seeds=max((each.estimate.seeds for row in rows for each in row.cells if each.estimate), default=0),
        worst=any(each.facts.member for slot in layout.slots for each in slot.conditions),
        invalid=checks.invalid_moves({each.condition.job: each for seen in behind for each in seen}.values()),
        coarse=_coarse(layout),
        added=_counted_too(layout),
        flags=tuple(_unequal(layout)),
        source=published.title_of(layout.table.published),
    )


def _rendered(
    layout: Layout,
    row: TableRow,
    made: "_SettledRow",
    beside: Sequence[Evidence],
    quotes: Mapping[tuple[str, ...], tuple[Quote | None, ...]],
    reader: "OutcomeReader",
) -> RenderedRow:
    """Return a row with the flags of its defense and its grade, where it shows one defense."""
    printed = RenderedRow(
        row.label, row.at, made.cells, quotes.get(row.label, ()), unmoved=_unmoved(layout, row, reader)
    )
    seen = [each for cell in made.seen for each in cell]
    if len({checks.coordinates(each.condition, *_OF_ATTACKS) for each in seen}) != 1:
        own = [(), *(tuple(checks.defense_flags(cell)) for cell in made.seen)][1:]
        cells = [
            replace(cell, flags=(*more, *cell.flags))
            for cell, more in zip(made.cells[: len(own)], own, strict=True)
        ]
        return replace(printed, cells=(*cells, *made.cells[len(own) :]))
    flags = checks.defense_flags(seen)
    every = [*flags, *(flag for cell in made.cells for flag in cell.flags)]
    graded = grade([*seen, *beside], every, _span(layout, row, made.cells), reader.pace)
    return replace(printed, flags=tuple(flags), grade=graded)


_OF_ATTACKS = ("norm", "radius", "attack", "view", "target", "seed")
"""Coordinates in which the conditions of one defense may differ."""


def _span(layout: Layout, row: TableRow, cells: Sequence[TableCell]) -> float | None:
    """Return the width of the interval of a row's lowest accuracy under attack."""
    counted = [bool(slot.attacks) and slot.metric.name in ROBUST for slot in row.slots]
    counted += [layout.table.metric in ROBUST for _ in layout.table.extra]
    found = [
        (each.estimate.value, each.estimate.high - each.estimate.low)
        for each, counts in zip(cells, counted, strict=True)
        if counts and each.estimate is not None and each.estimate.low is not None
        if each.estimate.high is not None
    ]
    return min(found)[1] if found else None


ROBUST = ("accuracy", "robust")
"""The metrics that a defender wants high under attack."""


def _keyed(layout: Layout, row: TableRow, cells: Sequence[TableCell]) -> tuple[TableCell, ...]:
    """Return the cells of a row with the keys of what they count; those over columns count all attacks."""
    own = [slot.attacks or slot.conditions for slot in row.slots]
    every = [each for slot in row.slots if slot.metric.name == layout.table.metric for each in slot.attacks]
    every += layout.added(row) if every and layout.table.extra else ()
    behind = [*own, *(every for _ in layout.table.extra)]
    return tuple(
        replace(cell, jobs=tuple(dict.fromkeys(each.job for each in conditions)))
        for cell, conditions in zip(cells, behind, strict=True)
    )


def _unmoved(layout: Layout, row: TableRow, reader: "OutcomeReader") -> TableCell | None:
    """Return what a figure over radii shows at radius 0, where the clean images were asked about."""
    metric = metrics.METRICS[layout.table.metric]
    if not layout.from_zero or metric.summary != "share":
        return None
    clean = [each for slot in row.slots for one in slot.attacks for each in layout.unmoved(one)[:1]]
    found = list({each.job: each for each in clean}.values())
    cell = worst_case({"clean": tuple(found)}, metric, reader, on=layout.table.worst_on)[0] if found else None
    return cell if cell is not None and cell.estimate is not None else None


def _beside(layout: Layout, row: TableRow, reader: "OutcomeReader") -> list[Evidence]:
    """Return what is known of attacks on a row's defense that the table does not show."""
    metric = metrics.METRICS["accuracy"]
    found = (reader.look(each, metric) for each in layout.beside(row))
    return [each for each in found if isinstance(each, Evidence)]


def _flagged(
    layout: Layout, row: TableRow, cells: Sequence[TableCell], compared: Sequence[Sequence[Flag]]
) -> tuple[TableCell, ...]:
    """Return the cells of a row with the flags of comparisons; those over columns inherit all but notes."""
    width = len(layout.columns)
    found = [
        replace(cell, flags=(*cell.flags, *flags))
        for cell, flags in zip(cells[:width], compared, strict=True)
    ]
    attacks = [cell for cell, slot in zip(found, row.slots, strict=True) if slot.attacks]
    graver = [flag for cell in attacks for flag in cell.flags if flag.level != "note"]
    inherited = [
        cell if cell.estimate is None else replace(cell, flags=tuple(distinct([*cell.flags, *graver])))
        for cell in cells[width:]
    ]
    return (*found, *inherited)


def _coarse(layout: Layout) -> tuple[str, ...]:
    """Return the attacks of a table that searched in bfloat16."""
    behind = (each for slot in layout.slots for each in slot.conditions)
    return tuple(dict.fromkeys(each.attack for each in behind if each.facts.precision != "float32"))


def _headings(layout: Layout) -> list[str]:
    """Return the headings of the columns; some of several attacks that were run as one count what stood."""
    found = []
    for place, column in enumerate(layout.columns):
        apart = any(row.slots[place].apart for row in layout.rows)
        found.append(f"{column.heading}{OF_THOSE}" if apart else column.heading)
    return found


# --- cells -------------------------------------------------------------------------------------------


class OutcomeReader:
    """Reads the outcomes of a table, each evaluation once."""

    def __init__(self, layout: Layout, outcomes: FrameOf, found: FoundOf) -> None:
        self._layout = layout
        self._outcomes = outcomes
        self._found = found
        self._frames: dict[str, Frame | None] = {}
        self._rows: dict[str, Rows | None] = {}

    def rows(self, job: str) -> Rows | None:
        """Return the outcomes of an evaluation.

        Args:
            job: Its key.

        Returns:
            The rows; None where there are none.
        """
        if job not in self._rows:
            frame = self._frames[job] = self._outcomes(job)
            self._rows[job] = None if frame is None else arrays(frame, self._layout.reads)
        return self._rows[job]

    def look(self, condition: Condition, metric: Metric) -> Evidence | str:
        """Return what is known of a condition.

        Args:
            condition: The condition.
            metric: What is counted.

        Returns:
            The evidence, or the reason why the condition has no number.
        """
        rows = self.rows(condition.job)
        if rows is None:
            return NOT_RUN
        if count := _raised_on(condition, rows):
            return f"{BROKE_DOWN} {count} of {len(rows['index'])} examples"
        # An attack that breaks an example ends its search, so that nobody has looked for the least distance,
        # nor for the surest wrong answer.
        if condition.facts.member is not None and (
            metric.worst is None or metric.summary in ("median", "rank")
        ):
            return f"worst mode knows no {metric.name}: an attack sees only what stands"
        if (lacking := metric.lacks(rows)) is not None:
            return lacking
        unmoved = self._layout.unmoved(condition)
        # Whatever is counted, flags need them.
        found = (self.rows(each.job) for each in unmoved)
        clean = next((each for each in found if each is not None), None)
        if clean is None and self._layout.needs_unmoved(condition, metric):
            return (
                f"{NOT_RUN}: the clean images"
                if unmoved
                else "no task asks about the unmoved images here (use: none)"
            )
        validated = rows
        if clean is not None and condition.facts.kind == "minimum-norm" and condition.radius is not None:
            validated = metrics.within(rows, clean, condition.radius)
        return Evidence(
            condition, rows, validated, clean, *self._checked(condition), self._invalid(condition.job, rows)
        )

    def pace(self, evidence: Evidence) -> tuple[float, float] | None:
        """Return what an attack took: seconds, and passes over all examples both ways; None: nobody knows.

        Args:
            evidence: The evidence of its condition.
        """
        job = evidence.condition.job
        told = (self._found("evaluate", job) or {}).get("crafting") or {}
        frame, seconds = self._frames.get(job), told.get("seconds")
        if frame is None or not seconds:
            return None
        try:
            passes = sum(
                float(np.asarray(frame[name], np.float64).sum()) for name in ("forwards", "backwards")
            )
        except KeyError:
            # Packed without it.
            return None
        return float(seconds), passes

    def _invalid(self, job: str, rows: Rows) -> Mapping[str, Any] | None:
        """Return why moves were invalid; receipts of older versions do not say."""
        return (self._found("evaluate", job) or {}).get("invalid") if rows["invalid"].any() else None

    def _checked(self, condition: Condition) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """Return what the trial of a condition's attack and the examination of its defense found."""
        facts = condition.facts
        trial = None if facts.trial is None else self._found("trial", facts.trial)
        examined = (self._found("examination", each) for each in facts.examinations)
        return trial, next((each for each in examined if each is not None), None)


def _raised_on(condition: Condition, rows: Rows) -> int:
    """Return on how many examples an attack raised that was run with others as one."""
    member = condition.facts.member
    mask = standing.raised(rows).get(member.label) if member is not None else None
    return 0 if mask is None else int(mask.sum())


SOME = (
    "worst mode knows no worst case over some of a row's attacks: what these would have broken is not known"
)


@dataclass(frozen=True)
class _SettledRow:
    cells: tuple[TableCell, ...]
    """The cells of the columns, then of the extra ones."""
    seen: tuple[tuple[Evidence, ...], ...]
    """The evidence behind the cell of each column."""


def _row(layout: Layout, row: TableRow, reader: OutcomeReader) -> _SettledRow:
    table = layout.table
    cells: list[TableCell] = []
    seen: list[tuple[Evidence, ...]] = []
    for slot in row.slots:
        cell, behind = settled_cell(slot, table, reader)
        cells.append(cell)
        seen.append(behind)
    metric = metrics.METRICS[table.metric]
    attacked = [
        place for place, slot in enumerate(row.slots) if slot.attacks and slot.metric.name == table.metric
    ]
    named = {layout.columns[place].heading: cells[place] for place in attacked}
    added = _added(layout, row) if attacked and table.extra else {}
    apart = any(row.slots[place].apart for place in attacked)
    if table.bold == "weakest" and not apart and metric.worst is not None and merged(layout, row) is None:
        weakest = _weakest(metric, list(named.values()))
        for place in attacked:
            estimate = cells[place].estimate
            if estimate is not None and math.isclose(estimate.value, weakest, abs_tol=1e-12):
                cells[place] = replace(cells[place], weakest=True)
    for heading in table.extra:
        if heading == "Worst":
            parts = {layout.columns[place].heading: row.slots[place].attacks for place in attacked}
            parts |= added
            if standing.apart(each for conditions in parts.values() for each in conditions):
                cells.append(TableCell(None, DASH, notes=(SOME,)))
            else:
                cells.append(worst_case(parts, metric, reader, on=table.worst_on)[0])
        elif apart:
            cells.append(_incomparable(heading))
        else:
            more = {
                name: worst_case({name: conditions}, metric, reader, on=table.worst_on)[0]
                for name, conditions in added.items()
            }
            cells.append(_best(metric, {**named, **more}))
    return _SettledRow(tuple(cells), tuple(seen))


def _counted_too(layout: Layout) -> tuple[str, ...]:
    """Return the attacks that were added to the suite, and that a table counts."""
    shown = [each for slot in layout.slots for each in slot.conditions if each.facts.added]
    extra = [each for row in layout.rows for each in layout.added(row)] if layout.table.extra else []
    return tuple(dict.fromkeys(checks.title(each) for each in (*shown, *extra)))


def _added(layout: Layout, row: TableRow) -> dict[str, tuple[Condition, ...]]:
    """Return what `bench doctor --fix` added for a row, by the names of attacks and views."""
    found: dict[str, tuple[Condition, ...]] = {}
    for each in layout.added(row):
        found[checks.title(each)] = (*found.get(checks.title(each), ()), each)
    return found


def settled_cell(slot: Slot, table: Table, reader: OutcomeReader) -> tuple[TableCell, tuple[Evidence, ...]]:
    """Settle a slot: the worst over its attacks, the mean over its seeds, with flags of its own outcomes.

    Args:
        slot: The slot.
        table: What the task file says of its table.
        reader: Gives the outcomes.

    Returns:
        The cell, and the evidence behind it.
    """
    reasons = distinct(skip.reason for skip in slot.skips)
    # Unmoved images stand for themselves only: beside attacks they are the metric's business.
    conditions = slot.attacks or slot.conditions
    if not conditions:
        return TableCell(None, DASH, notes=tuple(reasons)), ()
    groups: dict[tuple[Any, ...], dict[str, list[Condition]]] = defaultdict(lambda: defaultdict(list))
    for each in conditions:
        groups[tuple(each.coordinates[name] for name in table.min_over)][checks.title(each)].append(each)
    settled = [
        worst_case(parts, slot.metric, reader, on=table.worst_on, mean_over=table.mean_over)
        for parts in groups.values()
    ]
    cell, seen = settled[0][0], tuple(each for _, behind in settled for each in behind)
    if len(settled) > 1 and any(
        standing.apart(each for conditions in parts.values() for each in conditions)
        for parts in groups.values()
    ):
        cell = _incomparable(f"least over {' and '.join(table.min_over)}")
    elif len(settled) > 1:
        named = {", ".join(parts): each for parts, (each, _) in zip(groups.values(), settled, strict=True)}
        cell = _best(slot.metric, named)
    return (
        replace(
            cell,
            invalid=checks.invalid_moves(_once(seen)),
            notes=(*cell.notes, *_saw(seen, table.worst_on), *reasons),
            # Of attacks that were run as one each was tried by itself.
            flags=(*checks.trial_flags(seen), *checks.cell_flags(_once(seen)), *cell.flags),
        ),
        seen,
    )


def _incomparable(what: str) -> TableCell:
    """Return the cell of what compares attacks, where each saw only what the others had left."""
    return TableCell(None, DASH, notes=(f"worst mode knows no {what}: each attack saw only what stood",))


def _once(seen: Sequence[Evidence]) -> list[Evidence]:
    """Return evidence with that of attacks that were run as one but once, under the flags of all of them."""
    found: dict[object, Evidence] = {}
    for place, each in enumerate(seen):
        name: object = place if each.condition.facts.member is None else each.condition.job
        if (known := found.setdefault(name, each)) is not each:
            flags = dict.fromkeys((*known.condition.facts.flags, *each.condition.facts.flags))
            facts = replace(known.condition.facts, flags=tuple(flags))
            found[name] = replace(known, condition=replace(known.condition, facts=facts))
    return list(found.values())


def _together(union: Sequence[Evidence], asked: Mapping[str, Collection[str]]) -> list[Evidence]:
    """Return what is settled together, with attacks that were run as one as one: all, or what some left.

    Args:
        union: The evidence.
        asked: The labels of the members that are asked for, by their job; those without evidence raised.
    """
    found = [each for each in union if each.condition.facts.member is None]
    runs: dict[str, dict[str, Evidence]] = defaultdict(dict)
    for each in union:
        if (member := each.condition.facts.member) is not None:
            runs[each.condition.job][member.label] = each
    for shown in runs.values():
        first, members = next(iter(shown.values())), [each.condition.facts.member for each in shown.values()]
        known = [each for each in members if each is not None]
        # What raised broke nothing there; what it broke elsewhere is broken.
        whole = len(asked[first.condition.job]) == len(known[0].of)
        found.append(first if whole else replace(first, validated=standing.left(first.validated, known)))
    return found


@dataclass(frozen=True)
class _Looked:
    """What is known of the parts of a worst case, within one seed."""

    parts: Mapping[str, Sequence[Evidence | str]]
    """By the name of each part: the evidence, or the reasons why there is none."""

    @property
    def there(self) -> list[Evidence]:
        return [look for found in self.parts.values() for look in found if isinstance(look, Evidence)]

    @property
    def reasons(self) -> list[str]:
        return [look for found in self.parts.values() for look in found if isinstance(look, str)]

    @property
    def lacking(self) -> list[str]:
        return [name for name, found in self.parts.items() if any(isinstance(look, str) for look in found)]


def worst_case(
    parts: Mapping[str, Sequence[Condition]],
    metric: Metric,
    reader: OutcomeReader,
    *,
    on: On,
    mean_over: Sequence[str] = (),
) -> tuple[TableCell, tuple[Evidence, ...]]:
    """Take the worst over attacks example by example, within each seed, then average over seeds.

    A seed counts if every part was run. If there is no such seed, the number is a bound from the seeds that
    lack the fewest parts.

    Args:
        parts: The conditions that are settled together, under the names of their attacks.
        metric: What is counted.
        reader: Gives the outcomes.
        on: The examples that count.
        mean_over: ``target`` in it averages over targets instead of taking the worst of them.

    Returns:
        The cell, and the evidence of all seeds.
    """
    looked = _look(parts, metric, reader)
    seen = tuple(look for each in looked.values() for look in each.there)
    complete = [seed for seed, each in looked.items() if not each.lacking]
    # A worst case over fewer attacks is a bound; a mean over fewer targets is nothing.
    bounded = metric.worst is not None and "target" not in mean_over
    partial = [seed for seed, each in looked.items() if each.there and bounded]
    fewest = min((len(looked[seed].lacking) for seed in partial), default=0)
    usable = complete or [seed for seed in partial if len(looked[seed].lacking) == fewest]
    if not usable:
        reasons = distinct(reason for each in looked.values() for reason in each.reasons)
        hole = (
            NOT_RUN
            if not reasons or any(each.startswith((NOT_RUN, BROKE_DOWN)) for each in reasons)
            else DASH
        )
        said = tuple(each for each in reasons if each != hole)
        return TableCell(None, hole, notes=said, flags=tuple(_raised_flags(parts, reader))), seen
    asked: dict[str, set[str]] = defaultdict(set)
    for each in chain.from_iterable(parts.values()):
        if (member := each.facts.member) is not None:
            asked[each.job].add(member.label)
    unions = {
        seed: [_together(union, asked) for union in _unions(looked[seed].there, mean_over)] for seed in usable
    }
    scored = {seed: [_scored(union, metric, on) for union in joined] for seed, joined in unions.items()}
    estimate = metrics.estimate(metric, scored)
    notes = [f"{len(usable)} of {len(looked)} seeds"] if len(usable) < len(looked) else []
    if not complete:
        missing = distinct(name for seed in usable for name in looked[seed].lacking)
        notes.append(f"without {', '.join(missing)} ({NOT_RUN})")
    notes += _draws_note(seen, metric)
    if estimate is None:
        counts = any(len(each.index) for joined in scored.values() for each in joined)
        reason = "answers of one kind alone: nothing to tell apart" if counts else "no example counts"
        return TableCell(None, DASH, notes=(*notes, reason)), seen
    if math.isinf(estimate.value):
        shares = [np.isfinite(each.values).mean() for joined in scored.values() for each in joined]
        notes.append(f"{100 * float(np.mean(shares)):.1f} % of the examples were broken")
    union_flags = checks.union_flags([union for joined in unions.values() for union in joined], metric)
    flags = (*union_flags, *_raised_flags(parts, reader))
    short = _short(seen, usable)
    notes += [f"without {label} on the examples on which it raised" for label in short]
    bound: Bound = _bound(metric) if (short or not complete) and metric.worst is not None else ""
    lacking = tuple(seed for seed in looked if seed not in usable)
    return TableCell(estimate, bound=bound, notes=tuple(notes), flags=flags, lacking=lacking), seen


def _raised_flags(parts: Mapping[str, Sequence[Condition]], reader: OutcomeReader) -> Iterable[Flag]:
    """Flag the attacks of a worst case that raised where they were run with others as one."""
    found: dict[str, dict[object, tuple[int, int]]] = defaultdict(dict)
    for each in chain.from_iterable(parts.values()):
        if (rows := reader.rows(each.job)) is not None and (count := _raised_on(each, rows)):
            found[checks.title(each)][each.job, each.facts.member] = count, len(rows["index"])
    for name, counted in found.items():
        count, n = (sum(numbers) for numbers in zip(*counted.values(), strict=True))
        yield checks.member_raised(name, count, n)


def _short(seen: Iterable[Evidence], seeds: Collection[int]) -> list[str]:
    """Return the members of sequences that raised anywhere, in seeds that count."""
    alone = [each for each in seen if each.condition.facts.member is None and each.condition.seed in seeds]
    return distinct(label for each in alone for label in standing.raised(each.rows))


def _draws_note(seen: Iterable[Evidence], metric: Metric) -> list[str]:
    """Return what is said of a number that stands on several answers to each image."""
    draws = max((each.condition.facts.draws for each in seen), default=1)
    if draws == 1:
        return []
    return [f"mean over {draws} draws of a random defense" if metric.draws else f"the first of {draws} draws"]


def _look(
    parts: Mapping[str, Sequence[Condition]], metric: Metric, reader: OutcomeReader
) -> dict[int, _Looked]:
    """Return what is known of each part, by seed in ascending order."""
    seeds = sorted({each.seed for conditions in parts.values() for each in conditions})
    looked = {}
    for seed in seeds:
        found: dict[str, list[Evidence | str]] = {}
        for name, conditions in parts.items():
            # Attacks that were run as one share a job, and each is a part of it.
            same = {
                (each.job, each.radius, each.facts.member): each for each in conditions if each.seed == seed
            }
            found[name] = [reader.look(each, metric) for each in same.values()] or [NOT_RUN]
        looked[seed] = _Looked(found)
    return looked


def _bound(metric: Metric) -> Bound:
    return "≥" if metric.worst == "greatest" else "≤"


def _unions(seen: Iterable[Evidence], mean_over: Sequence[str]) -> list[list[Evidence]]:
    """Return what is settled together of one seed; each target by itself, where targets are averaged."""
    groups: dict[Any, list[Evidence]] = defaultdict(list)
    for each in seen:
        groups[each.condition.target if "target" in mean_over else None].append(each)
    return list(groups.values())


def _scored(union: Iterable[Evidence], metric: Metric, on: On) -> PerExample:
    return metrics.settle(metric, [metrics.score(metric, each.validated, each.clean) for each in union], on)


def _saw(seen: Sequence[Evidence], on: On) -> list[str]:
    """Return how many examples each attack of a worst case saw, where that is not the same."""
    counts: dict[int, list[str]] = defaultdict(list)
    for each in seen:
        counts[len(each.rows["index"])].append(checks.title(each.condition))
    if len(counts) < 2 or on == "common":
        return []
    parts = (f"{n} by {', '.join(distinct(names))}" for n, names in sorted(counts.items(), reverse=True))
    return [f"examples were seen: {'; '.join(parts)}"]


def _weakest(metric: Metric, cells: Sequence[TableCell]) -> float:
    """Return the value that an attacker likes best; NaN where that is not known, or there is no choice."""
    values = [each.estimate.value for each in cells if each.estimate is not None]
    unknown = any(each.hole == NOT_RUN or each.bound for each in cells) or _of_other_seeds(cells)
    if unknown or len(values) < 2:
        return math.nan
    return max(values) if metric.worst == "greatest" else min(values)


def _of_other_seeds(cells: Iterable[TableCell]) -> bool:
    """Return whether numbers are means over different seeds, of which none can be called the least."""
    return len({each.lacking for each in cells if each.estimate is not None}) > 1


def _best(metric: Metric, columns: Mapping[str, TableCell]) -> TableCell:
    """Return the attack column that is worst for the defender, after its seeds were averaged."""
    there = [cell for cell in columns.values() if cell.estimate is not None]
    missing = [heading for heading, cell in columns.items() if cell.hole == NOT_RUN]
    if not there:
        return TableCell(None, NOT_RUN if missing else DASH)

    def value(cell: TableCell) -> float:
        assert cell.estimate is not None
        return -cell.estimate.value if metric.worst == "greatest" else cell.estimate.value

    if _of_other_seeds(there):
        short = ", ".join(heading for heading, cell in columns.items() if cell.lacking)
        return TableCell(
            None, DASH, notes=(f"not all seeds of {short} were run, and others have other seeds",)
        )
    best = min(there, key=value)
    notes = [*best.notes, *([f"without {', '.join(missing)} ({NOT_RUN})"] if missing else [])]
    bound = _bound(metric) if missing or any(cell.bound for cell in there) else ""
    # Flags of its attacks stand on the column; that it is a worst of several answers goes with the number.
    flags = tuple(flag for flag in best.flags if flag.code == "unluckiest-answer")
    return TableCell(best.estimate, bound=bound, notes=tuple(notes), flags=flags)


# --- the table as a whole ----------------------------------------------------------------------------


def _question(layout: Layout) -> dict[str, str]:
    """Return what is asked, as far as it is the same for all conditions; unmoved images have no threat."""
    every: list[Condition | Skip] = [each for slot in layout.slots for each in slot.conditions]
    every = every or [each for slot in layout.slots for each in slot.skips]
    attacked = [each for each in every if isinstance(each, Skip) or not each.facts.idle]
    found = {}
    for name, asked in (("data", every), ("norm", attacked), ("radius", attacked)):
        values = distinct(each.coordinates[name] for each in asked)
        if len(values) == 1:
            found[name] = format_value(values[0]) if values[0] is not None else "none"
    return found


def _unequal(layout: Layout) -> Iterable[Flag]:
    """Flag a table whose columns ask for different numbers of examples of one data set."""
    asked: dict[str, dict[str, int]] = defaultdict(dict)
    for row in layout.rows:
        for column, slot in zip(layout.columns, row.slots, strict=True):
            for condition in slot.conditions:
                known = asked[condition.data]
                known[column.heading] = max(known.get(column.heading, 0), condition.facts.n)
    for columns in asked.values():
        yield from checks.unequal(columns)


def _axis_values(layout: Layout) -> None:
    """Raise where a figure's horizontal axis has something on it that is no number."""
    figure = layout.table.figure
    if figure is None:
        return
    axes: list[Sequence[TableRow | Column]] = [layout.columns, layout.rows]
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
    """Return the place of a row or column on the horizontal axis of a figure.

    Args:
        at: The coordinates that it fixes.
        x: The coordinate of the axis.

    Returns:
        The value; None where it is no finite number.
    """
    try:
        value = fraction(at.get(x))
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

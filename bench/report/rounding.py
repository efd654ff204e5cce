"""Tables whose images are rounded to 8 bits, as files of images hold them: which successes are left.

What a defense answers to a rounded image is asked elsewhere (`bench.api.rounding`), since that needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from bench.escaping import in_markdown, shown
from bench.quantities import DASH
from bench.report.render import words
from bench.report.render.markdown import pipes
from bench.report.render.records import csv_lines, numbers
from bench.report.render.text import printed
from bench.report.tables import NOT_RUN, OutcomeReader, TableCell, settled_cell, unexamined
from bench.results.conditions import Condition
from bench.results.metrics import METRICS, Mask, is_correct, wilson
from bench.results.outcomes import BROKEN_SHARE, FrameOf, Rows
from bench.results.standing import broke
from bench.suite.layout import Layout, Slot, arrange

if TYPE_CHECKING:
    from rich.console import Group

Answers: TypeAlias = Rows
"""What a defense answered to the rounded images of an evaluation: ``label`` and ``rejected``, (N,), in
ascending order of the examples."""

AskedOf: TypeAlias = Callable[[Condition], Answers | str]
"""Gives the answers to the rounded images of a condition, or why there are none."""


class Left(NamedTuple):
    """What is left of an attack."""

    right: int
    """How many examples are right on the rounded images."""
    found: int
    """How many the attack moved and broke."""
    kept: int
    """How many of these the rounded image breaks, too."""


def left_of(before: Rows, after: Rows) -> Left:
    """Count what is left of an attack.

    Args:
        before: Its outcomes.
        after: The same, with the answers to the rounded images.
    """
    was, now = _broken(before), _broken(after)
    return Left(int(is_correct(after).sum()), int(was.sum()), int((was & now).sum()))


def _broken(rows: Rows) -> Mask:
    """Return which examples were moved and broken."""
    moved = (rows["distance"] > 0) & ~rows["invalid"]
    return np.asarray(moved & ~is_correct(rows), np.bool_)


@dataclass(frozen=True)
class RoundedCell:
    """A cell of a table, and the same where its images are rounded."""

    table: str
    """The key of the table."""
    row: tuple[str, ...]
    """The label of the row."""
    column: str
    """The heading of the column."""
    scored: TableCell
    """Accuracy under attack, from stored outcomes."""
    rounded: TableCell
    """The same on the rounded images; a hole where nobody could be asked."""
    found: int = 0
    """How many examples its attacks moved and broke, over all seeds; one counts for each attack."""
    kept: int = 0
    """How many of these the rounded image breaks, too."""
    reason: str = ""
    """Why there is no number on rounded images; nothing where there is one."""

    @property
    def surviving(self) -> tuple[float, float, float] | None:
        """The share of successes that are left, with both ends of its Wilson interval; None: no success."""
        if self.reason or not self.found:
            return None
        return self.kept / self.found, *wilson(self.kept / self.found, self.found)


class _Reader(OutcomeReader):
    """Reads outcomes with the answers to rounded images in place of the stored ones."""

    def __init__(self, layout: Layout, outcomes: FrameOf, answers: Mapping[str, Answers]) -> None:
        super().__init__(layout, outcomes, unexamined)
        self._answers = answers

    def rows(self, job: str) -> Rows | None:
        """Return the outcomes of an evaluation; None where there are none.

        Args:
            job: Its key.
        """
        rows = super().rows(job)
        if rows is None or job not in self._answers:
            return rows
        # The rounded image was asked about once.
        kept = {name: values for name, values in rows.items() if name != BROKEN_SHARE}
        return {**kept, **self._answers[job]}


def cells(
    manifest: Mapping[str, Any], keys: Iterable[str], outcomes: FrameOf, ask: AskedOf
) -> list[RoundedCell]:
    """Return the cells of tables in which something is attacked, as scored and on rounded images.

    Args:
        manifest: The manifest of a suite, as JSON has it.
        keys: The keys of the tables.
        outcomes: Gives the rows of an evaluation by its key, or None where there are none.
        ask: Gives the answers to rounded images; is asked once about each evaluation.

    Returns:
        Table by table, row by row. A cell counts accuracy, whatever the table does.
    """
    known: dict[str, Answers | str] = {}
    found = []
    for key in keys:
        layout = arrange(manifest, key)
        for row in layout.rows:
            for column, slot in zip(layout.columns, row.slots, strict=True):
                # Images that no attack moves are no business of rounding.
                if slot.attacks or not slot.conditions:
                    where = key, row.label, column.heading
                    found.append(_cell(where, layout, slot, outcomes, lambda each: _once(each, known, ask)))
    return found


def _once(condition: Condition, known: dict[str, Answers | str], ask: AskedOf) -> Answers | str:
    if condition.job not in known:
        known[condition.job] = ask(condition)
    return known[condition.job]


def _cell(
    where: tuple[str, tuple[str, ...], str], layout: Layout, slot: Slot, outcomes: FrameOf, ask: AskedOf
) -> RoundedCell:
    own = replace(slot, metric=METRICS["accuracy"])
    scored, seen = settled_cell(own, layout.table, OutcomeReader(layout, outcomes, unexamined))
    if scored.estimate is None:
        reason = "; ".join(scored.notes) or (NOT_RUN if scored.hole == NOT_RUN else "nothing is asked")
        return RoundedCell(*where, scored, TableCell(None, DASH), reason=reason)
    answers: dict[str, Answers] = {}
    # Of seeds that were not run there is nothing to ask.
    for each in (evidence.condition for evidence in seen):
        said = ask(each)
        if isinstance(said, str):
            return RoundedCell(*where, scored, TableCell(None, DASH), reason=said)
        answers[each.job] = said
    cell, again = settled_cell(own, layout.table, _Reader(layout, outcomes, answers))
    left = []
    for before, after in zip(seen, again, strict=True):
        mask: Any = slice(None)
        if (member := before.condition.facts.member) is not None:
            mask = broke(before.rows, member)
        pair = ({name: values[mask] for name, values in each.validated.items()} for each in (before, after))
        left.append(left_of(*pair))
    return RoundedCell(
        *where, scored, cell, sum(each.found for each in left), sum(each.kept for each in left)
    )


# --- how it is written ---------------------------------------------------------------------------------

_HEADS = ("row", "column", "n", "as scored", "rounded", "survive")

_SAYS = (
    "Accuracy (%) under attack with its 95 % interval: as scored, and where the images are rounded to 8 bits "
    "(k/255), which may move them beyond the radius by up to 1/510 in every value. Survive: of the examples "
    "that were moved and broken, those that the rounded image breaks, too; one counts for each attack."
)


def written(found: Sequence[RoundedCell], form: Literal["text", "markdown", "csv", "json"]) -> str:
    """Write cells on rounded images as one text.

    Args:
        found: The cells, in the order in which they are written.
        form: The format.

    Returns:
        The text, with a line end at its end.
    """
    match form:
        case "text":
            return printed(text(found))
        case "json":
            return json.dumps([_record(each) for each in found], indent=1, ensure_ascii=False) + "\n"
        case "csv":
            return csv_lines([_record(each) for each in found])
        case "markdown":
            parts = []
            for key, own in _by_table(found).items():
                table = pipes(_HEADS, 2, ([*map(in_markdown, _line(each))] for each in own))
                parts += [f"### {in_markdown(f'Table {key}, rounded to 8 bits')}", "", table, ""]
                parts += [f"- {in_markdown(said)}" for said in _reasons(own)]
                parts += [""] * bool(_reasons(own))
            return "\n".join([*parts, _SAYS, ""])


def text(found: Sequence[RoundedCell]) -> Group:
    """Return what rich prints on a terminal of 80 columns: a table for each table.

    Args:
        found: The cells, in the order in which they are printed.
    """
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for key, own in _by_table(found).items():
        grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for position, heading in enumerate(_HEADS):
            grid.add_column(heading, justify="left" if position < 2 else "right", overflow="fold")
        for each in own:
            grid.add_row(*(Text(shown(cell)) for cell in _line(each)))
        title = Text(shown(f"Table {key}, rounded to 8 bits"), style="bold")
        parts += [Padding(title, (1, 0, 1, 0)), grid]
        parts += [Text(shown(said), style="dim") for said in _reasons(own)]
    return Group(*parts, Text(_SAYS, style="dim"))


def _by_table(found: Iterable[RoundedCell]) -> dict[str, list[RoundedCell]]:
    tables: dict[str, list[RoundedCell]] = {}
    for each in found:
        tables.setdefault(each.table, []).append(each)
    return tables


def _line(each: RoundedCell) -> list[str]:
    estimate = each.scored.estimate
    left = each.surviving
    share = DASH
    if not each.reason:
        share = f"{each.kept} of {each.found}"
    if left is not None:
        share += f" [{100 * left[1]:.0f}{DASH}{100 * left[2]:.0f}]"
    return [
        ", ".join(each.row),
        each.column,
        DASH if estimate is None else str(estimate.n),
        _value(each.scored),
        _value(each.rounded),
        share,
    ]


def _value(cell: TableCell) -> str:
    if cell.estimate is None:
        return cell.hole
    interval = words.interval(cell.estimate, "percent")
    return words.value(cell, "percent") + (f" [{interval}]" if interval else "")


def _reasons(found: Iterable[RoundedCell]) -> list[str]:
    """Return why cells have no number on rounded images, each reason once with all of its cells."""
    cells: dict[str, list[str]] = {}
    for each in found:
        if each.reason:
            cells.setdefault(each.reason, []).append(f"{', '.join(each.row)} / {each.column}")
    return [f"{DASH} {'; '.join(names)}: {reason}" for reason, names in cells.items()]


def _record(each: RoundedCell) -> dict[str, Any]:
    left = each.surviving
    share = dict(zip(("survive", "survive_low", "survive_high"), left or (None, None, None), strict=True))
    rounded = {f"rounded_{name}": value for name, value in numbers(each.rounded, "percent").items()}
    return {
        "table": each.table,
        "row": ", ".join(each.row),
        "column": each.column,
        **numbers(each.scored, "percent"),
        **rounded,
        "found": None if each.reason else each.found,
        "kept": None if each.reason else each.kept,
        **{name: None if value is None else round(100 * value, 6) for name, value in share.items()},
        "reason": each.reason,
    }

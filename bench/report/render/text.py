"""Tables on a terminal."""

from collections.abc import Iterable, Sequence
from io import StringIO
from textwrap import wrap
from typing import TYPE_CHECKING

from bench.escaping import shown
from bench.quantities import DASH
from bench.report.checks import Flag, worst_level
from bench.report.render import words
from bench.report.tables import RenderedTable, TableCell
from bench.results.metrics import Unit

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

_STYLES = {"note": "", "doubt": "yellow", "alarm": "bold red"}
"""How the marks of flags look, by the gravest level."""

_GRADES = {"A": "green", "D": "bold red"}
"""How grades look; those between are plain."""

WIDTH = 80
"""Columns of a terminal that hold a table of eight columns."""


def to_text(table: RenderedTable) -> "Group":
    """Return what rich prints on a terminal.

    Args:
        table: The table.

    Returns:
        The table with its caption and footnotes; eight columns fit into `WIDTH`.
    """
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    notes = words.Footnotes()
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    # Labels go below each other, as the lines of a cell do: that leaves room for columns.
    grid.add_column(_narrow(words.headings(table), 9))
    for heading in table.columns:
        grid.add_column(_narrow([heading], 8), justify="right")
    graded = words.graded(table)
    if graded:
        grid.add_column(words.GRADE, justify="right")
    for row in table.rows:
        cells = (_cell(cell, unit, notes) for cell, unit in zip(row.cells, table.units, strict=True))
        label, printed = _narrow(row.label, 9), [*cells]
        marks = _marks(notes.of_row(row, graded=graded))
        if graded:
            letter = row.grade.letter if row.grade else DASH
            printed.append(Text.assemble((letter, _GRADES.get(letter, "")), (marks, _style(row.flags))))
        else:
            label.append(marks, _style(row.flags))
        grid.add_row(label, *printed)
        if row.published:
            quotes = ("\n".join(each) if each else DASH for each in words.quotes(table, row))
            grid.add_row("published", *quotes, style="dim italic")
        grid.add_section()
    grid.add_row("n", *words.counts(table), style="dim")
    flags = words.flag_lines(table)
    said = " ".join([*words.caption(table, "below"), *words.published_lines(table)])
    below = [Text(shown(said), style="dim")]
    below += [Text(shown(each), style="yellow") for each in flags]
    below += [Text(f"{words.raised([mark])} {shown(each)}") for mark, each in enumerate(notes.texts, 1)]
    if flags or any(cell.flags for row in words.inherited(table).rows for cell in row.cells):
        below.append(Text("What each flag means, and what to do: docs/flags.md", style="dim"))
    title = Text(shown(f"Table {table.key}: {table.table.title}"), style="bold")
    return Group(Padding(title, (1, 0, 1, 0)), grid, *below)


def _cell(cell: TableCell, unit: Unit, notes: words.Footnotes) -> "Text":
    from rich.text import Text

    marks = _marks(notes.marks(cell))
    if cell.estimate is None:
        return Text.assemble((cell.hole, "dim"), marks)
    value = f"{cell.bound}{words.number(cell.estimate.value, unit)}"
    parts = [(value, "bold" if cell.weakest else ""), (marks, _style(cell.flags))]
    if cell.estimate.std is not None:
        parts.append((f"\n{words.PLUS_MINUS}{words.number(cell.estimate.std, unit)}", ""))
    if short := words.interval(cell.estimate, unit, short=True):
        parts.append((f"\n{short}", "dim"))
    return Text.assemble(*parts)


def _marks(numbers: Sequence[int]) -> str:
    """Return marks of footnotes; several would make a column wide, so that they are broken between."""
    if len(numbers) < 2:
        return words.raised(numbers)
    return "\n" + " ".join(words.raised([number]) for number in numbers)


def _style(flags: Iterable[Flag]) -> str:
    level = worst_level(flags)
    return "" if level is None else _STYLES[level]


def _narrow(parts: Iterable[str], width: int) -> "Text":
    """Return headings below each other, broken between words."""
    from rich.text import Text

    broken = (wrap(shown(each), width, break_long_words=False, break_on_hyphens=False) for each in parts)
    return Text("\n".join(line for lines in broken for line in lines))


def printed(page: "RenderableType") -> str:
    """Return what rich would print, as plain text.

    Args:
        page: Anything that rich prints.

    Returns:
        The text without colours, `WIDTH` columns wide.
    """
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None, highlight=False).print(page)
    return out.getvalue()

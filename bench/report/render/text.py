"""Tables on a terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

_STYLES = {"note": "", "doubt": "yellow", "alarm": "bold red"}
"""How the marks of flags look, by the gravest level."""

_GRADES = {"A": "green", "D": "bold red"}
"""How grades look; those between are plain."""

WIDTH = 80
"""Columns of a terminal that hold a table of eight columns."""


@dataclass(frozen=True)
class _Line:
    """A row of a grid."""

    label: "Text"
    cells: "Sequence[Text]"
    style: str = ""
    last: bool = False
    """Whether a line goes below it."""


@dataclass(frozen=True)
class Stacked:
    """A grid whose columns stand in several blocks, one below the other, where it is too wide.

    Nothing is cut at any width: what is too wide alone is broken.
    """

    corner: "Text"
    """The headings of the labels."""
    heads: "Sequence[Text]"
    lines: "Sequence[_Line]"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield the blocks."""
        blocks: list[list[int]] = [[]]
        for place in range(len(self.heads)):
            if blocks[-1] and _width(self._grid([*blocks[-1], place])) > options.max_width:
                blocks.append([])
            blocks[-1].append(place)
        for number, block in enumerate(blocks):
            if number:
                yield ""
            yield self._grid(block)

    @property
    def width(self) -> int:
        """How many columns of a terminal it takes in one block."""
        return _width(self._grid(range(len(self.heads))))

    def _grid(self, places: "Iterable[int]") -> "Table":
        from rich import box
        from rich.table import Table

        grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column(self.corner, overflow="fold")
        places = list(places)
        for place in places:
            grid.add_column(self.heads[place], justify="right", overflow="fold")
        for line in self.lines:
            cells = [line.cells[place] for place in places]
            grid.add_row(line.label, *cells, style=line.style, end_section=line.last)
        return grid


def _width(grid: "Table") -> int:
    """Return how many columns of a terminal a grid takes where nothing in it is broken."""
    from rich.console import Console
    from rich.measure import Measurement

    endless = Console(width=100_000, color_system=None)
    return Measurement.get(endless, endless.options, grid).maximum


def to_text(table: RenderedTable) -> "Group":
    """Return what rich prints on a terminal.

    Args:
        table: The table.

    Returns:
        The table with its caption and footnotes; eight columns fit into `WIDTH`, and where they do not, they
        stand in blocks below each other.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    notes = words.Footnotes(timed=True)
    graded = words.graded(table)
    blank = [Text()] if graded else []
    lines: list[_Line] = []
    for row in table.rows:
        cells = [_cell(cell, unit, notes) for cell, unit in zip(row.cells, table.units, strict=True)]
        label, marks = _narrow(row.label, 9), _marks(notes.of_row(row, graded=graded))
        if graded:
            letter = row.grade.letter if row.grade else DASH
            cells.append(Text.assemble((letter, _GRADES.get(letter, "")), (marks, _style(row.flags))))
        else:
            label.append(marks, _style(row.flags))
        lines.append(_Line(label, cells))
        if row.published:
            quotes = [Text("\n".join(each) if each else DASH) for each in words.quotes(table, row)]
            lines.append(_Line(Text("published"), [*quotes, *blank], "dim italic"))
        lines[-1] = replace(lines[-1], last=True)
    lines.append(_Line(Text("n"), [*(Text(each) for each in words.counts(table)), *blank], "dim"))
    # Labels go below each other, as the lines of a cell do: that leaves room for columns.
    heads = [_narrow([heading], 8) for heading in (*table.columns, *([words.GRADE] if graded else []))]
    grid = Stacked(_narrow(words.headings(table), 9), heads, lines)
    flags = words.flag_lines(table)
    said = " ".join([*words.caption(table, "below"), *words.published_lines(table)])
    below = [Text(shown(said), style="dim")]
    below += [Text(shown(each), style="yellow") for each in flags]
    below += [Text(f"{words.raised([mark])} {shown(each)}") for mark, each in enumerate(notes.texts, 1)]
    if flags or any(cell.flags for row in words.inherited(table).rows for cell in row.cells):
        below.append(
            Text("What a flag means, and what to do: bench explain CODE (docs/flags.md)", style="dim")
        )
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
        The text without colours, `WIDTH` columns wide, or as wide as its widest table: no file is narrow.
    """
    from rich.console import Console

    out = StringIO()
    parts = getattr(page, "renderables", ())
    width = max([WIDTH, *(each.width for each in parts if isinstance(each, Stacked))])
    Console(file=out, width=width, color_system=None, highlight=False).print(page)
    return out.getvalue()

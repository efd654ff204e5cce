"""Tables in Markdown, as GitHub shows it."""

from collections.abc import Iterable, Sequence

from bench.escaping import in_markdown
from bench.quantities import DASH
from bench.report.render import words
from bench.report.tables import RenderedRow, RenderedTable, TableCell
from bench.results.metrics import Unit


def to_markdown(table: RenderedTable) -> str:
    """Write a table with its caption; its notes and flags become footnotes.

    Args:
        table: The table.

    Returns:
        The Markdown, with a line end at its end.
    """
    notes = words.Footnotes()
    lines: list[Sequence[str]] = []
    blank = [""] * words.graded(table)
    for row in table.rows:
        cells = (_cell(cell, unit, notes) for cell, unit in zip(row.cells, table.units, strict=True))
        lines.append([*_label(table, row, notes), *cells, *_grade(table, row, notes)])
        if row.published:
            quotes = (f"*{' '.join(each)}*" if each else DASH for each in words.quotes(table, row))
            lines.append(["*published*", *[""] * (len(row.label) - 1), *quotes, *blank])
    lines.append(["n", *[""] * (len(table.heads) - 1), *words.counts(table), *blank])
    last = [words.GRADE] if words.graded(table) else []
    heads = [in_markdown(each) for each in (*words.headings(table), *table.columns, *last)]
    parts = [
        f"### {in_markdown(f'Table {table.key}: {table.table.title}')}",
        pipes(heads, len(table.heads), lines),
        in_markdown(" ".join([*words.caption(table), *words.published_lines(table)])),
        "\n".join(f"- {in_markdown(each)}" for each in words.flag_lines(table)),
        "\n".join(f"{mark}. {in_markdown(each)}" for mark, each in enumerate(notes.texts, 1)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _label(table: RenderedTable, row: RenderedRow, notes: words.Footnotes) -> list[str]:
    """Return the labels of a row, with the marks of its flags where no grade has them."""
    *first, last = map(in_markdown, row.label)
    return [*first, last if words.graded(table) else last + words.raised(notes.of_row(row, graded=False))]


def _grade(table: RenderedTable, row: RenderedRow, notes: words.Footnotes) -> list[str]:
    if not words.graded(table):
        return []
    return [(row.grade.letter if row.grade else DASH) + words.raised(notes.of_row(row, graded=True))]


def _cell(cell: TableCell, unit: Unit, notes: words.Footnotes) -> str:
    marks = words.raised(notes.marks(cell))
    if cell.estimate is None:
        return in_markdown(cell.hole) + marks
    value = words.value(cell, unit)
    value = f"**{value}**" if cell.weakest else value
    ends = words.interval(cell.estimate, unit)
    return f"{value}{marks}<br>[{ends}]" if ends else f"{value}{marks}"


def pipes(heads: Sequence[str], labels: int, lines: Iterable[Sequence[str]]) -> str:
    """Write a table between pipes.

    Args:
        heads: The headings, already escaped.
        labels: The number of columns on the left that are text; all others are aligned to the right.
        lines: The rows, already escaped.

    Returns:
        The lines, without a line end at their end.
    """
    rule = [":--"] * labels + ["--:"] * (len(heads) - labels)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))

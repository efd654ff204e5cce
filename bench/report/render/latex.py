"""Tables in LaTeX, narrow enough for a page of one column: what a cell has stands on lines of its own."""

import re
from collections.abc import Sequence
from textwrap import wrap

from bench.escaping import shown
from bench.quantities import DASH
from bench.report.render import words
from bench.report.tables import RenderedTable, TableCell
from bench.results.metrics import Unit

_LATEX = str.maketrans(
    {
        **{each: f"\\{each}" for each in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "`": r"\textasciigrave{}",
        # After a line's end, these would be its arguments.
        "[": "{[}",
        "*": "{*}",
        DASH: "--",
        words.PLUS_MINUS: r"$\pm$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        words.MINUS: "$-$",
        "∞": r"$\infty$",
    }
)


def _escaped(text: str) -> str:
    return shown(text, keep="").translate(_LATEX)


def to_latex(table: RenderedTable) -> str:
    """Write a `table` environment with its caption; its notes and flags stand below.

    Args:
        table: The table.

    Returns:
        The LaTeX, with a line end at its end.
    """
    import pandas as pd

    notes = words.Footnotes()
    lines: list[list[str]] = []
    bold: list[tuple[int, int]] = []
    for row in table.rows:
        bold += [(len(lines), len(table.heads) + at) for at, cell in enumerate(row.cells) if cell.weakest]
        cells = (_cell(cell, unit, notes) for cell, unit in zip(row.cells, table.units, strict=True))
        *first, last = map(_escaped, row.label)
        lines.append([*first, last + _marks(notes.of_row(row, graded=False)), *cells])
        blank = [""] * len(row.label)
        for written in (_spread, _interval):
            more = [written(cell, unit) for cell, unit in zip(row.cells, table.units, strict=True)]
            if any(more):
                lines.append([*blank, *(f"{{\\scriptsize {each}}}" if each else "" for each in more)])
        if row.published:
            quotes = (" ".join(each) if each else DASH for each in words.quotes(table, row))
            lines.append([r"\quad published", *blank[1:], *map(_escaped, quotes)])
    lines.append(["n", *[""] * (len(table.heads) - 1), *map(_escaped, words.counts(table))])
    heads = [*map(_escaped, words.headings(table)), *map(_heading, table.columns)]
    frame = pd.DataFrame(lines, columns=pd.Index(heads))
    # Cells are escaped where they are made: marks and signs are LaTeX already.
    css = pd.DataFrame("", index=frame.index, columns=frame.columns)
    for line, at in bold:
        css.iat[line, at] = "textbf:--rwrap"
    said = [f"{table.table.title.rstrip('.')}.", *words.caption(table, "below", grades=False)]
    said += words.published_lines(table)
    text = (
        frame.style.apply(lambda _: css, axis=None)
        .hide(axis="index")
        .to_latex(
            hrules=True,
            caption=_escaped(" ".join(said)),
            label="tab:" + re.sub("[^A-Za-z0-9./:_-]", "-", table.key),
            position="t",
            position_float="centering",
            column_format="l" * len(table.heads) + "r" * len(table.columns),
        )
    )
    narrow = "\\small\\setlength{\\tabcolsep}{3pt}\n\\begin{tabular}"
    text = _PACKAGES + text.replace("\\begin{tabular}", narrow)
    # The line of counts is apart.
    rows, rule, end = text.rpartition("\\bottomrule")
    head, _, counts = rows.rstrip("\n").rpartition("\n")
    text = f"{head}\n\\midrule\n{counts}\n{rule}{end}"
    below = [_escaped(each) for each in words.flag_lines(table)]
    below += [f"\\textsuperscript{{{mark}}} {_escaped(each)}" for mark, each in enumerate(notes.texts, 1)]
    if not below:
        return text
    tail = "\\par\\smallskip\\raggedright\\footnotesize\n" + "\\\\\n".join(below)
    return text.replace("\\end{table}", f"{tail}\n\\end{{table}}")


_PACKAGES = "% Packages: \\usepackage{booktabs}, \\usepackage[T1]{fontenc}\n"


def _heading(text: str) -> str:
    """Return a heading that is broken between words, so that it is no wider than its numbers."""
    parts = [_escaped(each) for each in wrap(text, 8, break_long_words=False, break_on_hyphens=False)]
    lines = r"\\".join(parts)
    return lines if len(parts) == 1 else f"\\shortstack[r]{{{lines}}}"


def _cell(cell: TableCell, unit: Unit, notes: words.Footnotes) -> str:
    return _escaped(words.value(cell, unit, spread=False)) + _marks(notes.marks(cell))


def _marks(numbers: Sequence[int]) -> str:
    return f"\\textsuperscript{{{','.join(map(str, numbers))}}}" if numbers else ""


def _spread(cell: TableCell, unit: Unit) -> str:
    std = cell.estimate.std if cell.estimate is not None else None
    return "" if std is None else _escaped(f"{words.PLUS_MINUS}{words.number(std, unit)}")


def _interval(cell: TableCell, unit: Unit) -> str:
    return "" if cell.estimate is None else _escaped(words.interval(cell.estimate, unit, short=True))

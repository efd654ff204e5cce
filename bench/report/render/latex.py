"""Tables in LaTeX (package: booktabs)."""

import re
from collections.abc import Sequence

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
        if row.published:
            quotes = (" ".join(each) if each else DASH for each in words.quotes(table, row))
            blank = [""] * (len(row.label) - 1)
            lines.append([r"\quad published", *blank, *map(_escaped, quotes)])
    heads = [_escaped(each) for each in (*words.headings(table), *table.columns)]
    frame = pd.DataFrame(lines, columns=pd.Index(heads))
    # Cells are escaped where they are made: marks and signs are LaTeX already.
    css = pd.DataFrame("", index=frame.index, columns=frame.columns)
    for line, at in bold:
        css.iat[line, at] = "textbf:--rwrap"
    said = [table.table.title.rstrip(".") + ".", *words.caption(table, None), *words.published_lines(table)]
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
    below = [_escaped(each) for each in words.flag_lines(table)]
    below += [f"\\textsuperscript{{{mark}}} {_escaped(each)}" for mark, each in enumerate(notes.texts, 1)]
    if not below:
        return text
    tail = "\\par\\smallskip\\raggedright\\footnotesize\n" + "\\\\\n".join(below)
    return text.replace("\\end{table}", f"{tail}\n\\end{{table}}")


def _cell(cell: TableCell, unit: Unit, notes: words.Footnotes) -> str:
    return _escaped(words.value(cell, unit)) + _marks(notes.marks(cell))


def _marks(numbers: Sequence[int]) -> str:
    return f"\\textsuperscript{{{','.join(map(str, numbers))}}}" if numbers else ""

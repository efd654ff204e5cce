"""Several tables as one text."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from bench.report.render.latex import to_latex
from bench.report.render.markdown import to_markdown
from bench.report.render.records import to_csv, to_json
from bench.report.render.text import printed, to_text
from bench.report.tables import RenderedTable

Form: TypeAlias = Literal["text", "markdown", "csv", "latex", "json"]
"""The formats of tables that are text."""


def joined(tables: Sequence[RenderedTable], form: Form) -> str:
    """Write tables as one text.

    Args:
        tables: The tables, in the order in which they are written.
        form: The format.

    Returns:
        The text, with a line end at its end.
    """
    match form:
        case "text":
            return "".join(printed(to_text(table)) for table in tables)
        case "json":
            return to_json(tables)
        case "markdown":
            return "\n".join(map(to_markdown, tables))
        case "csv":
            return "\n".join(map(to_csv, tables))
        case "latex":
            return "\n".join(map(to_latex, tables))

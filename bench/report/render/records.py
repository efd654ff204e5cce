"""Tables for programs: a record for each cell, as CSV and JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from csv import DictWriter
from io import StringIO
from json import dumps
from typing import Any

from bench.escaping import in_csv
from bench.quantities import DASH
from bench.report.checks import worst_level
from bench.report.render import words
from bench.report.tables import RenderedTable, TableCell
from bench.results.metrics import Unit


def records(table: RenderedTable) -> list[dict[str, Any]]:
    """Return a record for each cell, row by row.

    Args:
        table: The table.

    Returns:
        The records (`docs/results.md` explains their fields): proportions in percent, None where there is no
        number.
    """
    found = []
    for row in words.inherited(table).rows:
        quotes = row.published or [None] * len(table.columns)
        for heading, unit, cell, quote in zip(table.columns, table.units, row.cells, quotes, strict=True):
            found.append(
                {
                    "table": table.key,
                    **{head or "row": label for head, label in zip(table.heads, row.label, strict=True)},
                    "column": heading,
                    **numbers(cell, unit),
                    "unit": unit,
                    "invalid": cell.invalid,
                    "bound": cell.bound,
                    "weakest": cell.weakest,
                    "published": None if quote is None else quote.value,
                    "published_std": None if quote is None else quote.std,
                    "note": "; ".join(_remarks(cell)),
                    "level": worst_level(cell.flags),
                    "flags": "; ".join(map(words.sentence, cell.flags)),
                    **({"grade": row.grade and row.grade.letter} if words.graded(table) else {}),
                    "jobs": " ".join(cell.jobs),
                }
            )
    return found


def _remarks(cell: TableCell) -> list[str]:
    """Return the notes in words: a dash is what no task asks for, unless there is another reason."""
    asked = cell.hole != DASH
    hole = [cell.hole] if cell.hole and asked else []
    return [*hole, *cell.notes] if asked or cell.notes else ["not asked"]


def numbers(cell: TableCell, unit: Unit) -> dict[str, Any]:
    """Return the numbers of a cell in its unit.

    Args:
        cell: A cell of a table.
        unit: The unit of its column.

    Returns:
        ``value``, ``std``, ``low``, ``high`` (six decimals), ``n`` and ``seeds``; None where there is none.
    """
    if (known := cell.estimate) is None:
        return dict.fromkeys(("value", "std", "low", "high", "n", "seeds"))
    scale = words.SCALES[unit]
    values = {"value": known.value, "std": known.std, "low": known.low, "high": known.high}
    scaled = {name: None if each is None else round(scale * each, 6) for name, each in values.items()}
    return {**scaled, "n": known.n, "seeds": known.seeds}


def to_csv(table: RenderedTable) -> str:
    """Write one line for each cell, under a line of headings.

    Args:
        table: The table.

    Returns:
        The CSV, with a line end at its end.
    """
    return csv_lines(records(table))


def csv_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write records as CSV in which no spreadsheet runs a text.

    Args:
        lines: The records; a field that one of them lacks is left empty.

    Returns:
        The CSV, with a line end at its end.
    """
    out = StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = DictWriter(out, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: in_csv(value) for name, value in line.items()} for line in lines)
    return out.getvalue()


def to_json(tables: Iterable[RenderedTable]) -> str:
    """Write tables as a JSON list.

    Args:
        tables: The tables, in the order in which they are written.

    Returns:
        The JSON, with a line end at its end.
    """
    text = dumps([_document(table) for table in tables], indent=1, ensure_ascii=False, allow_nan=False)
    # JSON would leave some of what cannot be seen as it is.
    lawful = (each if each.isprintable() or each == "\n" else dumps(each)[1:-1] for each in text)
    return "".join(lawful) + "\n"


def _document(table: RenderedTable) -> dict[str, Any]:
    return {
        "table": table.key,
        "title": table.table.title,
        "metric": table.metric.name,
        "caption": [*words.caption(table), *words.published_lines(table)],
        "question": dict(table.question),
        "invalid": table.invalid,
        "flags": [
            {"code": flag.code, "level": flag.level, "message": flag.message, "advice": flag.advice}
            for flag in table.flags
        ],
        "rows": [
            {
                "label": list(row.label),
                "grade": row.grade.letter,
                "missing": [each.said for each in row.grade.missing],
                "seconds": [each.seconds for each in row.grade.missing],
            }
            for row in table.rows
            if row.grade is not None and table.table.grades
        ],
        "cells": [{name: _lawful(each) for name, each in record.items()} for record in records(table)],
    }


def _lawful(value: Any) -> Any:
    """Return a value that JSON knows: it knows no infinity, which means that fewer than half were broken."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""How printed numbers stand beside ours, as text, Markdown, CSV and JSON."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bench.console import count
from bench.escaping import in_markdown, shown
from bench.quantities import DASH
from bench.report.reconcile import Line, Reconciled, Reconciliation
from bench.report.render import words
from bench.report.render.markdown import pipes
from bench.report.render.records import csv_lines, numbers
from bench.report.render.text import printed

if TYPE_CHECKING:
    from rich.console import Group

_HEADS = ("row", "column", "ours", "interval", "paper", "difference", "in it")

_SAYS = (
    "Difference: ours less the paper's. In it: whether the paper's number lies in our 95 % interval, which "
    "is of our examples of one seed alone; the paper's own images and trainings are uncertain on top of that."
)


def written(found: Sequence[Reconciliation], form: Literal["text", "markdown", "csv", "json"]) -> str:
    """Write tables with what papers printed as one text.

    Args:
        found: The tables, in the order in which they are written.
        form: The format.

    Returns:
        The text, with a line end at its end.
    """
    match form:
        case "text":
            return printed(text(found))
        case "markdown":
            return "\n\n".join(part for each in found for part in _markdown(each)) + "\n"
        case "csv":
            return csv_lines([record for each in found for record in _records(each)])
        case "json":
            return json.dumps([_document(each) for each in found], indent=1, ensure_ascii=False) + "\n"


def text(found: Iterable[Reconciliation]) -> "Group":
    """Return what rich prints on a terminal of 80 columns.

    Args:
        found: The tables, in the order in which they are printed.

    Returns:
        For each published table a grid of the numbers that are compared, and sentences.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Any] = []
    for each in found:
        title = f"Table {each.table.key}: {each.table.table.title}"
        parts.append(Padding(Text(shown(title), style="bold"), (1, 0, 1, 0)))
        if each.said:
            parts.append(Text(shown(f"{_capital(each.said)}.")))
        for other in each.found:
            parts.append(Text(shown(_heading(other)), style="bold"))
            if compared := [line for line in other.lines if not line.reasons]:
                parts.append(_grid(compared))
            parts += [Text(shown(said), style="dim") for said in _sentences(other)]
            parts.append(Text(""))
    return Group(*parts)


def _grid(lines: Iterable[Line]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(_HEADS):
        grid.add_column(heading, justify="left" if place < 2 else "right", overflow="fold")
    for line in lines:
        grid.add_row(*(Text(shown(each)) for each in _cells(line)))
    return grid


def _markdown(each: Reconciliation) -> Iterator[str]:
    yield f"### {in_markdown(f'Table {each.table.key}: {each.table.table.title}')}"
    if each.said:
        yield f"{in_markdown(_capital(each.said))}."
    for other in each.found:
        yield f"**{in_markdown(_heading(other))}**"
        if compared := [line for line in other.lines if not line.reasons]:
            yield pipes(_HEADS, 2, ([*map(in_markdown, _cells(line))] for line in compared))
        yield "\n".join(_listed(said) for said in _sentences(other))


def _heading(other: Reconciled) -> str:
    return f"{other.paper}: {other.title}"


def _cells(line: Line) -> list[str]:
    known = line.cell.estimate
    difference = line.difference
    return [
        ", ".join(line.row),
        line.column,
        words.value(line.cell, line.unit),
        (words.interval(known, line.unit) if known is not None else "") or DASH,
        " ".join(filter(None, words.quoted(line.printed, line.unit))),
        DASH if difference is None else f"{line.cell.bound}{difference:+.1f}".replace("-", words.MINUS),
        {True: "yes", False: "no", None: DASH}[line.within],
    ]


def _sentences(other: Reconciled) -> list[str]:
    """Return what is to be said of a published table: why numbers do not stand beside ours, what is known."""
    if other.said:
        return [f"{_capital(other.said)}."]
    compared = [line for line in other.lines if not line.reasons]
    found = [_SAYS] if any(line.compared for line in compared) else []
    apart = [line for line in other.lines if line.reasons]
    if apart:
        every = count(len(other.lines), "number")
        found.append(f"Of {every} that both tables have, {len(apart)} are not compared, since they differ in")
        found += [f"- {reason}{where}" for reason, where in _where(other).items()]
    if lacking := [line for line in compared if line.cell.estimate is None]:
        found.append(
            f"{count(len(lacking), 'number')} of ours {'is' if len(lacking) == 1 else 'are'} not there."
        )
    if compared:
        found += [f"{_capital(text)} ({key})." for key, text in other.known.items()]
        found += [f"{text.rstrip('.')}." for text in other.differences]
    return found


def _where(other: Reconciled) -> dict[str, str]:
    """Return each reason with the rows and columns that it concerns, where these are not all."""
    rows, columns = ({getattr(line, name) for line in other.lines} for name in ("row", "column"))
    concerned: dict[str, list[Line]] = defaultdict(list)
    for line in other.lines:
        for reason in line.reasons:
            concerned[reason].append(line)
    found = {}
    for reason, lines in concerned.items():
        mine = list(dict.fromkeys(", ".join(line.row) for line in lines))
        own = list(dict.fromkeys(line.column for line in lines))
        parts = [
            *(["; ".join(mine)] if len(mine) < len(rows) else []),
            *(["; ".join(own)] if len(own) < len(columns) else []),
        ]
        found[reason] = f" ({': '.join(parts)})" if parts else ""
    return found


def _listed(said: str) -> str:
    """Return a sentence as an entry of a list, one that is an entry already as one below it."""
    text = said.removeprefix("- ")
    return f"{'  ' if text != said else ''}- {in_markdown(text)}"


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _records(each: Reconciliation) -> Iterator[dict[str, Any]]:
    for other in each.found:
        for line in other.lines:
            yield {
                "table": each.table.key,
                "row": ", ".join(line.row),
                "column": line.column,
                "paper": other.paper,
                "paper_row": line.paper_row,
                "paper_column": line.paper_column,
                "published": line.printed.value,
                "published_std": line.printed.std,
                **numbers(line.cell, line.unit),
                "unit": line.unit,
                "bound": line.cell.bound,
                "compared": line.compared,
                "difference": None if line.difference is None else round(line.difference, 6),
                "within": line.within,
                "reasons": "; ".join(line.reasons),
                "known": " ".join(line.known),
            }


def _document(each: Reconciliation) -> Mapping[str, Any]:
    found = []
    by_paper: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in _records(each):
        by_paper[record["paper"]].append(
            {name: value if _lawful(value) else str(value) for name, value in record.items()}
        )
    for other in each.found:
        found.append(
            {
                "paper": other.paper,
                "title": other.title,
                "said": other.said,
                "known": dict(other.known),
                "differences": list(other.differences),
                "numbers": by_paper[other.paper],
            }
        )
    return {"table": each.table.key, "title": each.table.table.title, "said": each.said, "published": found}


def _lawful(value: Any) -> bool:
    return not isinstance(value, float) or abs(value) != float("inf")

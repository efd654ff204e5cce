"""What every format says of a table: numbers in their units, captions, footnotes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from bench.quantities import DASH, format_value
from bench.report.checks import Flag
from bench.report.published import Quote
from bench.report.tables import NOT_RUN, RenderedRow, RenderedTable, TableCell
from bench.results.metrics import CONFIDENCE, METRICS, Estimate, Metric, Unit

PLUS_MINUS = "±"
MINUS = "\N{MINUS SIGN}"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

SCALES: Mapping[Unit, float] = {"percent": 100, "distance": 1, "number": 1, "millions": 1e-6}
"""What a value is multiplied by to be printed in its unit."""

LABELS: Mapping[str, str] = {"percent": " (%)", "millions": " (millions)"}
"""What follows the name of a metric in these units."""

_FORMS: Mapping[Unit, str] = {"percent": ".1f", "distance": ".3g", "number": ".1f", "millions": ".2f"}


def number(value: float, unit: Unit) -> str:
    """Write a value in its unit.

    Args:
        value: A proportion in [0, 1], a distance, a plain number, or a count.
        unit: Percent and plain numbers have one decimal, millions two, distances three digits.

    Returns:
        The number, with a typographic minus sign.
    """
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return f"{SCALES[unit] * value:{_FORMS[unit]}}".replace("-", MINUS)


def interval(estimate: Estimate, unit: Unit, *, short: bool = False) -> str:
    """Write the interval of an estimate.

    Args:
        estimate: The estimate.
        unit: The unit in which it is printed.
        short: Whether percent are written without decimals, rounded outwards.

    Returns:
        Both ends; an empty text where there is no interval.
    """
    if estimate.low is None or estimate.high is None:
        return ""
    if short and unit == "percent":
        # Rounding first: 0.29 * 100 is a little below 29.
        low, high = round(100 * estimate.low, 6), round(100 * estimate.high, 6)
        return f"{math.floor(low)}{DASH}{math.ceil(high)}"
    # Between numbers that may be negative a dash would be read as a sign.
    between = " to " if unit == "number" else DASH
    return f"{number(estimate.low, unit)}{between}{number(estimate.high, unit)}"


def value(cell: TableCell, unit: Unit, *, spread: bool = True) -> str:
    """Write the number of a cell with its bound, and its standard deviation over seeds.

    Args:
        cell: A cell of a table.
        unit: The unit of its column.
        spread: Whether the standard deviation is written, too.

    Returns:
        ``≤71.3 ± 0.2``, or what stands in place of a number.
    """
    if cell.estimate is None:
        return cell.hole
    found = f"{cell.bound}{number(cell.estimate.value, unit)}"
    if spread and cell.estimate.std is not None:
        found += f" {PLUS_MINUS} {number(cell.estimate.std, unit)}"
    return found


def quoted(quote: Quote, unit: Unit) -> tuple[str, str]:
    """Write a published number as it was printed.

    Args:
        quote: The number.
        unit: The unit of its column.

    Returns:
        The number, and its standard deviation with a sign before it (empty where there is none).
    """
    form = _FORMS["number"] if unit == "number" else ".2f"
    printed = f"{quote.value:{form}}".replace("-", MINUS)
    return printed, "" if quote.std is None else f"{PLUS_MINUS}{quote.std:{form}}"


def quotes(table: RenderedTable, row: RenderedRow) -> Iterator[list[str]]:
    """Yield the published numbers of a row, column by column.

    Args:
        table: The table.
        row: One of its rows, with published numbers.

    Yields:
        The number and its standard deviation; an empty list where the paper has none.
    """
    for quote, unit in zip(row.published, table.units, strict=True):
        yield [] if quote is None else list(filter(None, quoted(quote, unit)))


@dataclass
class Footnotes:
    """Sentences below a table, each once, with the marks that point at them."""

    timed: bool = False
    """Whether it is said about how long it takes to add what a grade is missing."""
    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> int:
        """Return the number of a sentence, which is kept if it is new.

        Args:
            text: The sentence.

        Returns:
            Its number, from 1.
        """
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def marks(self, cell: TableCell) -> list[int]:
        """Return the numbers of all sentences about a cell.

        Args:
            cell: A cell of the table.

        Returns:
            The numbers of its notes, then of its flags.
        """
        return sorted({self.mark(each) for each in (*cell.notes, *map(sentence, cell.flags))})

    def of_row(self, row: RenderedRow, *, graded: bool) -> list[int]:
        """Return the numbers of all sentences about a row as a whole.

        Args:
            row: A row of the table.
            graded: Whether its grade is shown.

        Returns:
            The numbers of its flags, then of what is missing for a better grade.
        """
        grade = row.grade if graded else None
        missing = [] if grade is None else [grade.told if self.timed else grade.said]
        return sorted({self.mark(each) for each in (*map(sentence, row.flags), *filter(None, missing))})


GRADE = "Grade"
"""The heading of the column of grades."""


def graded(table: RenderedTable) -> bool:
    """Return whether a table has a column of grades.

    Args:
        table: The table.
    """
    return table.table.grades and any(row.grade is not None for row in table.rows)


def inherited(table: RenderedTable) -> RenderedTable:
    """Return a table whose cells have the flags of their rows, for what shows cells alone.

    Args:
        table: The table.
    """
    rows = [
        replace(row, cells=tuple(replace(cell, flags=(*row.flags, *cell.flags)) for cell in row.cells))
        for row in table.rows
    ]
    return replace(table, rows=tuple(rows))


def sentence(flag: Flag) -> str:
    """Write a flag with its level and its code, under which `docs/flags.md` gives advice.

    Args:
        flag: The flag.

    Returns:
        The sentence, without a full stop.
    """
    return f"{flag.level}, {flag.code}: {flag.message}"


def raised(marks: Iterable[int]) -> str:
    """Write footnote marks as superscripts.

    Args:
        marks: The numbers of the footnotes.

    Returns:
        The superscripts, with dots between them.
    """
    return "\N{MIDDLE DOT}".join(str(each) for each in marks).translate(_RAISED)


def metric_of(at: Mapping[str, object], table: RenderedTable) -> Metric:
    """Return the metric of what fixes some coordinates: its own, else the table's.

    Args:
        at: What a row or a column fixes, or both.
        table: The table.
    """
    return METRICS[str(at.get("metric", table.metric.name))]


def counted(metric: Metric) -> str:
    """Write what a metric counts, with its unit.

    Args:
        metric: The metric.

    Returns:
        ``Accuracy (%): right on the adversarial input alone``, without a full stop.
    """
    said = f"{metric.name}{LABELS.get(metric.unit, '')}: {metric.says}"
    return f"{said[0].upper()}{said[1:]}"


def caption(table: RenderedTable, intervals: str | None = "in brackets", *, grades: bool = True) -> list[str]:
    """Write the caption: what is counted and averaged, and what the extra columns are.

    Args:
        table: The table.
        intervals: Where a reader finds the intervals; None where the format does not show them.
        grades: Whether the format shows grades.

    Returns:
        Sentences with their full stops.
    """
    question = ", ".join(f"{name} {said}" for name, said in pinned(table).items())
    said = [*filter(None, [question]), counted(table.metric), *_own_metrics(table)]
    said.append(_averaged(table, intervals))
    for heading in table.table.extra:
        if heading == "Worst":
            said.append(
                "Worst: the worst of all attack columns example by example, within each seed, "
                + (
                    "on the examples that all saw"
                    if table.table.worst_on == "common"
                    else "each settled by the attacks that saw it"
                )
            )
        else:
            superlative = "least" if heading == "Min" else "greatest"
            said.append(f"{heading}: the {superlative} of the attack columns, after averaging over seeds")
    if table.added:
        said.append(f"counted too, since bench doctor --fix added it: {', '.join(table.added)}")
    if grades and graded(table):
        said.append(f"{GRADE}: how much stands behind a row, from A to D (docs/flags.md)")
    if table.worst:
        said.append(
            "worst mode: each attack saw only the examples that stood against those before it, so that a "
            "column of some of them counts those examples alone"
        )
    if table.coarse:
        said.append(f"searched in bfloat16, judged in float32: {', '.join(table.coarse)}")
    cells = [cell for row in table.rows for cell in row.cells]
    if any(cell.weakest for cell in cells):
        said.append("bold: the attack column that is worst for the defender")
    if any(cell.bound for cell in cells):
        said.append("≤, ≥: attacks are missing, which could only make it worse")
    if table.invalid:
        said.append(f"{table.invalid} invalid moves in the whole table")
    return [f"{each[0].upper()}{each[1:]}." for each in said]


def pinned(table: RenderedTable) -> dict[str, str]:
    """Return what holds for the whole table: what is asked, and what its `where` says beside it.

    Args:
        table: The table.

    Returns:
        By coordinate the value, or several with "or" between them, as a task file writes them.
    """
    found = dict(table.question)
    for name, chosen in table.table.where.items():
        values = [chosen] if not isinstance(chosen, list) else chosen
        head = name.rpartition(".")[2]
        # What rows or columns show of it, everybody sees.
        if head not in found and not (len(values) > 1 and _shown(table, name)):
            found[head] = " or ".join(map(_written, values))
    return found


def _shown(table: RenderedTable, name: str) -> bool:
    return name in table.heads or any(name in each for each in (*table.at, *(row.at for row in table.rows)))


def _written(value: object) -> str:
    """Return a value of a selection; null is no limit, or none."""
    return "none" if value is None else format_value(value)


def _own_metrics(table: RenderedTable) -> list[str]:
    """Return a sentence for each metric that rows or columns have of their own."""
    found: dict[tuple[str, object], list[str]] = {}
    axes = [(at, heading) for at, heading in zip(table.at, table.columns, strict=True)]
    axes += [(row.at, ", ".join(row.label)) for row in table.rows]
    for at, heading in axes:
        if "metric" in at and at["metric"] != table.metric.name:
            found.setdefault((str(at["metric"]), at.get("class")), []).append(heading)
    return [
        f"{', '.join(headings)}: {counted(METRICS[name])}{'' if label is None else f', of class {label}'}"
        for (name, label), headings in found.items()
    ]


def _averaged(table: RenderedTable, intervals: str | None) -> str:
    spread = f"mean {PLUS_MINUS} standard deviation over {table.seeds} seeds"
    waits = any(cell.hole == NOT_RUN for row in table.rows for cell in row.cells)
    over = spread if table.seeds > 1 else "one seed" if table.seeds else "no number can be given"
    if not table.seeds and waits:
        over = "nothing was run yet"
    estimates = (cell.estimate for row in table.rows for cell in row.cells if cell.estimate is not None)
    if intervals is not None and any(each.low is not None for each in estimates):
        kind = "Wilson " if table.metric.summary == "share" else ""
        over += f"; {intervals} the {100 * CONFIDENCE:.0f} % {kind}interval of the n examples of one seed"
    return over


def flag_lines(table: RenderedTable) -> list[str]:
    """Write the flags of the table as a whole.

    Args:
        table: The table.

    Returns:
        A sentence with its full stop for each flag.
    """
    return [f"{sentence(flag)}." for flag in table.flags]


def published_lines(table: RenderedTable) -> list[str]:
    """Write where the published numbers come from, and what is known to be different.

    Args:
        table: The table.

    Returns:
        Sentences with their full stops; none where no published number is shown.
    """
    comparison = table.table.published
    if comparison is None or not any(row.published for row in table.rows):
        return []
    differences = [f"Known difference: {each.rstrip('.')}." for each in comparison.differences]
    return [f"Published: {table.source}.", *differences]


def counts(table: RenderedTable) -> list[str]:
    """Write the number of examples of each column.

    Args:
        table: The table.

    Returns:
        For each column one number, the span over rows, or an empty text where no cell has a number.
    """
    found = []
    for column in range(len(table.columns)):
        cells = [row.cells[column] for row in table.rows]
        values = sorted({cell.estimate.n for cell in cells if cell.estimate is not None})
        found.append(DASH.join(map(str, dict.fromkeys((values[0], values[-1])))) if values else "")
    return found


def headings(table: RenderedTable) -> list[str]:
    """Write the headings of the row labels.

    Args:
        table: The table.

    Returns:
        The coordinates, without ``inference.`` before them.
    """
    return [name.rpartition(".")[2] for name in table.heads]

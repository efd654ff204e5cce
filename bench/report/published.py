"""Numbers that papers printed (`published.yaml`), to stand beside ours in a table."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bench.errors import InputError, did_you_mean
from bench.quantities import format_value, fraction
from bench.suite.layout import Layout, TableRow, distinct
from bench.suite.tables import Comparison


@dataclass(frozen=True)
class Quote:
    """A published number, in the unit in which it was printed."""

    value: float
    std: float | None
    """The standard deviation that was printed with it, if any."""


Quotes = Mapping[tuple[str, ...], tuple[Quote | None, ...]]
"""By the label of a row: a paper's numbers for the columns of our table; None where it has none."""


@cache
def papers() -> dict[str, Any]:
    """Return the tables of all papers, by their keys such as ``cnnf/3``."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = files("bench.report").joinpath("published.yaml").read_text(encoding="utf-8")
    return dict(yaml.load(text, Loader=loader))


def _paper(comparison: Comparison) -> dict[str, Any]:
    known = papers()
    if comparison.table not in known:
        raise InputError(f"published: no table {comparison.table!r}{did_you_mean(comparison.table, known)}")
    return dict(known[comparison.table])


def title_of(comparison: Comparison | None) -> str:
    """Return the title and the key of a published table.

    Args:
        comparison: What the task file says of the comparison; None where there is none.

    Returns:
        The title with the key in brackets, or an empty text.
    """
    return f"{_paper(comparison)['title']} ({comparison.table})" if comparison is not None else ""


def quotes(layout: Layout, manifest: Mapping[str, Any]) -> Quotes:
    """Return the published numbers that belong beside a table.

    Args:
        layout: The table.
        manifest: The manifest of its suite, which names the data sets.

    Returns:
        The numbers of each of our rows that the paper has.

    Raises:
        InputError: The paper has no such table, row or column, or is about another data set or threat.
    """
    comparison = layout.table.published
    if comparison is None:
        return {}
    try:
        return _quotes(layout, comparison, _paper(comparison), manifest)
    except InputError as error:
        raise InputError(f"table {layout.key!r}: {error}") from None


def _quotes(
    layout: Layout, comparison: Comparison, paper: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Quotes:
    headings = [*(column.heading for column in layout.columns), *layout.table.extra]
    labels = {", ".join(row.label): row for row in layout.rows}
    columns = paper.get("columns") or distinct(name for row in paper["rows"].values() for name in row)
    for ours, theirs, mine, known in (
        ("columns", comparison.columns, headings, columns),
        ("rows", comparison.rows, labels, paper["rows"]),
    ):
        for heading, name in theirs.items():
            if heading not in mine:
                raise InputError(f"published: {ours}: no {heading!r} here{did_you_mean(heading, mine)}")
            if name not in known:
                raise InputError(
                    f"published: {ours}: {comparison.table} has no {name!r}{did_you_mean(name, known)}"
                )
    found: dict[tuple[str, ...], tuple[Quote | None, ...]] = {}
    for label, row in labels.items():
        printed = paper["rows"].get(comparison.rows.get(label, label))
        if printed is not None:
            _refuse_other_question(comparison.table, paper, row, manifest)
            found[row.label] = tuple(
                quote(printed.get(comparison.columns.get(heading, heading))) for heading in headings
            )
    return found


def quote(number: Mapping[str, Any] | None) -> Quote | None:
    """Return a number of `papers`; None where the paper has none.

    Args:
        number: Its ``mean`` and ``std``, as the file has them.
    """
    if number is None or number.get("mean") is None:
        return None
    return Quote(float(number["mean"]), None if number.get("std") is None else float(number["std"]))


def _refuse_other_question(
    key: str, paper: Mapping[str, Any], row: TableRow, manifest: Mapping[str, Any]
) -> None:
    """Refuse to print a paper's numbers beside another data set's, or another threat's."""
    for slot in row.slots:
        for condition in slot.conditions:
            data = manifest.get("data", {}).get(condition.data, {}).get("name", condition.data)
            mismatch = "dataset" in paper and plain(data) != plain(paper["dataset"])
            if not condition.facts.idle:
                mismatch |= "norm" in paper and condition.norm != paper["norm"]
                # Papers round: 8/255 is also printed as 0.031.
                mismatch |= "eps" in paper and not near(condition.radius, fraction(paper["eps"]))
            if mismatch:
                theirs = ", ".join(str(paper[name]) for name in ("dataset", "norm", "eps") if name in paper)
                raise InputError(
                    f"published: {key} is about {theirs}, and {row.name} about "
                    f"{data}, {condition.norm}, {format_value(condition.radius)}"
                )


def near(radius: float | None, other: object) -> bool:
    """Return whether two radii are the same but for the rounding of papers.

    Args:
        radius: Ours; None: no limit.
        other: The paper's.
    """
    return radius is not None and isinstance(other, int | float) and math.isclose(radius, other, rel_tol=0.02)


def plain(name: str) -> str:
    """Return a name without case, spaces and signs, so that ``CIFAR-10`` is ``cifar10``.

    Args:
        name: Of a data set, a row or a column.
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())

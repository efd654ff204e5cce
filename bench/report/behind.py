"""What stands behind a number of a table: its conditions, their settings, receipts and outcomes.

Reads a results folder; plans nothing and imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.console import condition_name, count, duration
from bench.errors import InputError, did_you_mean
from bench.quantities import DASH, format_value
from bench.report import tables
from bench.report.render import words
from bench.report.render.records import numbers
from bench.results.conditions import Condition
from bench.results.manifest import Outcomes, read
from bench.results.metrics import is_correct, is_refused
from bench.results.outcomes import arrays
from bench.results.store import Store
from bench.suite.layout import Layout, arrange, columns_read, distinct

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.report.grades import Grade
    from bench.report.tables import RenderedTable, TableCell
    from bench.results.metrics import Metric, Unit
    from bench.results.outcomes import Rows


class Asked(NamedTuple):
    """Which number is meant; what there is only one of need not be named."""

    table: str | None = None
    """The key of its table."""
    row: str | None = None
    """The label of its row: all of it, or a part that no other row has."""
    column: str | None = None
    """The heading of its column."""


class Behind(NamedTuple):
    """A cell of a table, and what it was made from."""

    root: Path
    """The results folder."""
    manifest: Mapping[str, Any]
    table: RenderedTable
    row: str
    column: str
    cell: TableCell
    unit: Unit
    grade: Grade | None
    """The grade of its row."""
    metric: Metric
    conditions: tuple[Condition, ...]
    """The conditions that it counts."""
    skipped: tuple[str, ...]
    """Why some that were asked for cannot be."""


def behind(root: Path, suite: Path, asked: Asked) -> Behind:
    """Find a number of a table, and what it was made from.

    Args:
        root: The results folder.
        suite: The task file, for messages.
        asked: Which number is meant.

    Raises:
        InputError: Nothing was run there, or several numbers may be meant.
    """
    manifest = read(root, suite)
    key = only("--table", "table", list(manifest["tables"]), asked.table)
    layout = arrange(manifest, key)
    labels = [", ".join(row.label) for row in layout.rows]
    row = labels.index(only("--row", "row", labels, asked.row))
    headings = [*(each.heading for each in layout.columns), *layout.table.extra]
    column = headings.index(only("--column", "column", headings, asked.column))
    outcomes = Outcomes(root, columns_read(manifest, [key]))
    table = words.inherited(tables.cut(manifest, key, outcomes, outcomes.found))
    slots = _slots(layout, row, column)
    return Behind(
        root,
        manifest,
        table,
        labels[row],
        table.columns[column],
        table.rows[row].cells[column],
        table.units[column],
        table.rows[row].grade,
        words.metric_of({**table.rows[row].at, **table.at[column]}, table),
        tuple(distinct_conditions(each for slot in slots for each in slot.attacks or slot.conditions)),
        tuple(distinct(skip.reason for slot in slots for skip in slot.skips)),
    )


def _slots(layout: Layout, row: int, column: int) -> list[Any]:
    """Return the slot of a cell; of an extra one, those of all attacks that it is over."""
    slots = layout.rows[row].slots
    if column < len(slots):
        return [slots[column]]
    return [each for each in slots if each.attacks and each.metric.name == layout.table.metric]


def distinct_conditions(conditions: Iterable[Condition]) -> list[Condition]:
    """Return conditions that have outcomes of their own, each once.

    Args:
        conditions: The conditions, some of which may share a job.
    """
    found = {(each.job, each.facts.member, each.radius): each for each in conditions}
    return list(found.values())


def only(option: str, kind: str, known: Sequence[str], asked: str | None) -> str:
    """Return the one of several names that is meant.

    Args:
        option: The option that says which, for messages.
        kind: What is named.
        known: All names.
        asked: The name, or a part that no other one has, letters of either case being the same; None: there
            must be one alone.

    Raises:
        InputError: No name is meant, or several are.
    """
    if asked is None:
        if len(known) == 1:
            return known[0]
        listed = ", ".join(map(repr, known)) or "none"
        raise InputError(f"{option}: say which {kind} is meant: {listed}")
    if asked in known:
        return asked
    folded = asked.casefold()
    for found in (
        [each for each in known if each.casefold() == folded],
        [each for each in known if folded in each.casefold().split(", ")],
        [each for each in known if folded in each.casefold()],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{option} {asked}: {len(found)} are meant: {', '.join(map(repr, found))}")
    raise InputError(f"{option} {asked}: there is no such {kind}{did_you_mean(asked, known)}")


def described(found: Behind) -> dict[str, Any]:
    """Return all that is known of a number, as plain JSON.

    Args:
        found: The number, and what it was made from.
    """
    return {
        "table": found.table.key,
        "row": found.row,
        "column": found.column,
        "metric": found.metric.name,
        "unit": found.unit,
        **numbers(found.cell, found.unit),
        "grade": None if found.grade is None else found.grade.letter,
        "missing": [] if found.grade is None else [each.said for each in found.grade.missing],
        "notes": list(found.cell.notes),
        "flags": [
            {"code": each.code, "level": each.level, "message": each.message} for each in found.cell.flags
        ],
        "skipped": list(found.skipped),
        "conditions": [_condition(found, each) for each in found.conditions],
    }


def _condition(found: Behind, condition: Condition) -> dict[str, Any]:
    store, manifest = Store(found.root), found.manifest
    receipt = store.receipt("evaluate", condition.job) or {}
    outcomes = Outcomes(found.root)
    rows = outcomes(condition.job)
    crafts = store.job("evaluate", condition.job)["crafts"] if receipt else []
    return {
        "name": condition_name(condition.coordinates),
        "coordinates": dict(condition.coordinates),
        "job": condition.job,
        "folder": str(store.folder("evaluate", condition.job)),
        "crafts": [str(store.folder("craft", each)) for each in crafts],
        "attack": manifest["attacks"][condition.attack],
        "trial": None if (key := condition.facts.trial) is None else outcomes.found("trial", key),
        "defense": manifest["defenses"][condition.coordinates["defense"]],
        "data": manifest["data"][condition.data],
        "outcomes": None if rows is None else _counts(arrays(rows, ("forwards", "backwards"))),
        "receipt": {name: each for name, each in receipt.items() if name in _TOLD},
    }


_TOLD = ("when", "device", "seconds", "crafting", "versions", "commit", "notes")
"""What of a receipt a person may want to know."""


def _counts(rows: Rows) -> dict[str, float]:
    moved = (rows["distance"] > 0) & ~rows["invalid"]
    found: dict[str, float] = {
        "n": len(rows["index"]),
        "right": int(is_correct(rows).sum()),
        "wrong": int((~is_correct(rows)).sum()),
        "refused": int(is_refused(rows).sum()),
        "moved": int(moved.sum()),
        "invalid": int(rows["invalid"].sum()),
    }
    if moved.any():
        found["median distance of moved"] = float(np.median(rows["distance"][moved]))
    for name, title in (("forwards", "forward passes by image"), ("backwards", "backward passes by image")):
        found[title] = float(np.mean(rows[name]))
    return found


def said(found: Behind) -> list[str]:
    """Return all that is known of a number in lines; those that begin with spaces belong to the line above.

    Args:
        found: The number, and what it was made from.
    """
    cell, told = found.cell, described(found)
    value = words.value(cell, found.unit)
    more = []
    if cell.estimate is not None:
        if interval := words.interval(cell.estimate, found.unit):
            more.append(f"[{interval}]")
        more.append(f"n {cell.estimate.n}, {count(cell.estimate.seeds, 'seed')}")
    lines = [
        f"table {found.table.key}, row {found.row}, column {found.column}",
        " ".join([value, *more]),
        f"  {words.counted(found.metric)}",
        *(f"  {each}" for each in cell.notes),
        *(f"  {words.sentence(each)} (bench explain {each.code})" for each in cell.flags),
        *(f"  skipped: {each}" for each in found.skipped),
        *_graded(found.grade),
    ]
    for condition in told["conditions"]:
        lines += ["", condition["name"], *(f"  {each}" for each in _lines(condition))]
    if not told["conditions"]:
        lines.append("  no condition stands here")
    return lines


def _graded(grade: Grade | None) -> list[str]:
    if grade is None:
        return []
    return [f"  grade of the row: {grade.letter}" + (f"; {grade.told}" if grade.told else "")]


def _tried(found: Mapping[str, Any]) -> str:
    """Return what an attack did where the answer is known."""
    shares = {"brought across a plane": found["crossed"], "of planted images found": found["planted"]}
    said = [f"{share:.0%} {what}" for what, share in shares.items() if share is not None]
    codes = [f"{level} {code}" for code, level, _ in found["found"]]
    return ", ".join([*said, *codes]) or "there was no time for it"


def _lines(condition: Mapping[str, Any]) -> list[str]:
    at, receipt = condition["coordinates"], condition["receipt"]
    size = condition["data"].get("size")
    lines = [
        f"data: {at['data']} ({condition['data']['name']} {condition['data']['split']}"
        + (f", the first {size})" if size else ")"),
        f"threat: {at['norm']}, radius {format_value(at['radius'])}",
        f"defense: {at['defense']} = {_settings(condition['defense'])}",
        f"attack: {at['attack']} = {_settings(condition['attack'])}",
    ]
    if condition["trial"] is not None:
        lines.append(f"tried where the answer is known: {_tried(condition['trial'])}")
    if condition["outcomes"] is None:
        return [*lines, "outcomes: not run"]
    counts = ", ".join(f"{name} {value:.4g}" for name, value in condition["outcomes"].items())
    lines += [f"outcomes: {counts}", f"in: {condition['folder']}"]
    if condition["crafts"]:
        lines.append(f"images in: {condition['crafts'][0]}" + _and_more(condition["crafts"]))
    if receipt:
        versions = receipt.get("versions", {})
        took = receipt.get("crafting", {}).get("seconds", 0) + receipt.get("seconds", 0)
        lines.append(
            f"made: {receipt.get('when', DASH)} on {receipt.get('device', DASH)} in {duration(took)}, "
            f"crossfire-bench {versions.get('crossfire-bench', DASH)}, torch {versions.get('torch', DASH)}"
        )
        lines += [f"note: {each}" for each in receipt.get("notes", ())]
    return lines


def _and_more(crafts: Sequence[str]) -> str:
    return f" and {len(crafts) - 1} more" if len(crafts) > 1 else ""


def _settings(identity: Mapping[str, Any]) -> str:
    """Return what a thing is called with, as a task file would write it."""
    params = ", ".join(f"{name}: {_flow(value)}" for name, value in identity.get("params", {}).items())
    library = f" of {identity['library']}" if "library" in identity else ""
    return f"{identity['use']}{library}" + (f" {{{params}}}" if params else "")


def _flow(value: Any) -> str:
    if isinstance(value, float):
        return format_value(value)
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
        # Code, by its name and the digests of its modules.
        return str(value[0])
    return value if isinstance(value, str) else json.dumps(value)

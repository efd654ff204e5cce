"""Tables and outcomes as pandas data frames, for notebooks and scripts."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from bench.console import condition_name
from bench.errors import InputError, did_you_mean
from bench.report import tables
from bench.report.render.records import numbers, records
from bench.report.tables import RenderedTable
from bench.results.conditions import Condition, Member, conditions_of
from bench.results.manifest import Outcomes, aged, read
from bench.results.metrics import is_correct
from bench.results.outcomes import LISTS, Stored
from bench.results.standing import broke, raised, saw
from bench.suite.layout import columns_read

if TYPE_CHECKING:
    import pandas as pd

ROW = "row"
"""The name of the index where rows have headings of their own."""


def read_table(root: Path, key: str) -> RenderedTable:
    """Read a table of a results folder; nothing is planned and nothing is run.

    Args:
        root: The results folder, such as ``results/mnist``.
        key: The table's key in the task file.

    Returns:
        The table with its numbers; what was not run is a hole.

    Raises:
        InputError: The folder has no manifest, or the suite has no such table.
    """
    manifest = read(root, _suite(root))
    if key not in manifest["tables"]:
        raise InputError(f"{root}: no table {key!r}{did_you_mean(key, manifest['tables'])}")
    outcomes = Outcomes(root, columns_read(manifest, [key]))
    return tables.cut(manifest, key, outcomes, outcomes.found)


def _suite(root: Path) -> Path:
    """Return the task file that a results folder is usually made from, for the commands in messages."""
    return Path(f"{root.resolve().name}.yaml")


def frame_of(table: RenderedTable) -> "pd.DataFrame":
    """Return the numbers of a table with its rows and columns.

    Args:
        table: The table.

    Returns:
        Floats in the unit of their column (proportions in percent), NaN where there is no number, and
        infinity for a median distance where fewer than half of the examples were broken. The index has a
        level for each row heading. ``attrs`` has the ``title``, and by column the ``units``. What else is
        known of each number (interval, n, flags) is in `details_of`.
    """
    import pandas as pd

    names = [head or ROW for head in table.heads]
    labels = [row.label for row in table.rows]
    index = (
        pd.MultiIndex.from_tuples(labels, names=names)
        if len(names) > 1
        else pd.Index([label for (label,) in labels], name=names[0])
    )
    values = [
        [numbers(cell, unit)["value"] for cell, unit in zip(row.cells, table.units, strict=True)]
        for row in table.rows
    ]
    frame = pd.DataFrame(values, index=index, columns=pd.Index(table.columns), dtype="float64")
    frame.attrs = {"title": table.table.title, "units": dict(zip(table.columns, table.units, strict=True))}
    return frame


def details_of(table: RenderedTable) -> "pd.DataFrame":
    """Return all that is known of the numbers of a table, with a row for each cell.

    Args:
        table: The table.

    Returns:
        The columns of the table's CSV, which `docs/results.md` explains: among them ``value``, ``std``,
        ``low``, ``high``, ``n``, ``seeds``, ``note`` and ``flags``. What is not known is a missing value.
    """
    import pandas as pd

    frame = pd.DataFrame(records(table))
    floats = ["value", "std", "low", "high", "published", "published_std"]
    return frame.astype({**dict.fromkeys(floats, "float64"), "n": "Int64", "seeds": "Int64"})


def outcomes_frame(root: Path, also: Collection[str] = ()) -> "pd.DataFrame":
    """Return the outcomes of a whole results folder, with a row for each example of each condition.

    Args:
        root: The results folder, such as ``results/mnist``.
        also: Columns of lists to read too: ``logits``, ``thresholds``. They are large, and a missing value
            where `bench pack` left them out.

    Returns:
        The coordinates of the condition (``data`` ... ``seed``, ``inference.<name>``; its target as
        ``target_offset``), its ``job``, ``correct`` (whether the defense was right on the image that it was
        shown; of a random defense with several draws, in the first of them), and the columns of its outcomes,
        which `docs/results.md` explains. A radius or a target that there is not is a missing value.
        Conditions that share a job have the same rows.
        An attack that raised where several were run as one has no rows, as one whose job failed.
        ``attrs["notes"]`` says which, and which outcomes are damaged or older than the code.

    Raises:
        InputError: There is no manifest, nothing was evaluated there yet, or `also` names no such column.
    """
    import pandas as pd

    for name in also:
        if name not in LISTS:
            raise InputError(f"also: unknown column {name!r}{did_you_mean(name, LISTS)}")
    suite = _suite(root)
    manifest = read(root, suite)
    outcomes = Outcomes(root)
    left_out = set(LISTS) - set(also)
    parts, holes = [], []
    for condition in conditions_of(manifest):
        if isinstance(stored := outcomes(condition.job), Stored):
            member = condition.facts.member
            if member is not None and member.label in (there := raised(stored)):
                count, name = int(there[member.label].sum()), condition_name(condition.coordinates)
                holes.append(f"{name}: it raised on {count} examples, and has no rows")
            else:
                parts.append(_rows(condition, stored, left_out))
    if not parts:
        raise InputError(f"{root}: nothing was evaluated there yet: bench run {manifest['file']}")
    # A note that only some attacks leave, or a parameter of only some defenses, is missing elsewhere.
    frame = pd.concat(parts, ignore_index=True)
    notes = outcomes.faults + [f"evaluate {key}: {reason}" for key, reason in outcomes.damaged.items()]
    notes += holes
    notes += [aged(outcomes.changed, suite)] if outcomes.changed else []
    frame.attrs = {"notes": notes}
    return frame


def _rows(condition: Condition, stored: Stored, left_out: set[str]) -> "pd.DataFrame":
    rows = stored.frame(left_out)
    at = {
        ("target_offset" if name == "target" else name): value
        for name, value in condition.coordinates.items()
    }
    at["radius"] = float("nan") if condition.radius is None else condition.radius
    if (member := condition.facts.member) is not None:
        rows = _own_rows(rows, member)
    told = {**at, "job": condition.job, "correct": is_correct(rows)}
    for place, (name, value) in enumerate(told.items()):
        rows.insert(place, name, value)
    return rows


_OF_THE_IMAGE = ("score", "l0", "l2", "linf", "distance")
"""Columns of outcomes that describe the image that the defense was shown."""


def _own_rows(rows: "pd.DataFrame", member: Member) -> "pd.DataFrame":
    """Return what one of several attacks that were run as one did: of the examples that stood when it came.

    An example that it did not break it left standing, whatever another attack did later; nobody has looked at
    the image that it left there.
    """
    own = broke(rows, member)
    rows = rows.assign(
        label=rows["label"].where(own, rows["truth"]),
        rejected=rows["rejected"] & own,
        invalid=rows["invalid"] & own,
        forwards=rows[f"forwards.{member.label}"],
        backwards=rows[f"backwards.{member.label}"],
    )
    for name in _OF_THE_IMAGE:
        rows[name] = rows[name].astype(float).where(own)
    return rows[saw(rows, member)].reset_index(drop=True)

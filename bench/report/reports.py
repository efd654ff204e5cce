"""What a report is made of: the tables that are asked for, and what is to be said of their numbers.

Reads a results folder; plans nothing and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bench.console import condition_name
from bench.errors import InputError, did_you_mean
from bench.report import attack_cost, rejection, tables
from bench.results.conditions import conditions_of
from bench.results.manifest import Outcomes, aged, read, stale
from bench.results.store import Store
from bench.suite.layout import columns_read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bench.report.attack_cost import Cost
    from bench.report.rejection import Readout
    from bench.report.tables import RenderedTable


def asked_tables(manifest: Mapping[str, Any], asked: list[str] | None) -> list[str]:
    """Return the keys of the tables that are asked for: all of them, unless some are named.

    Args:
        manifest: The manifest of a suite.
        asked: Keys of tables; None or none: every table.

    Raises:
        InputError: The suite has no such table.
    """
    for key in asked or ():
        if key not in manifest["tables"]:
            raise InputError(
                f"--table {key}: {manifest['suite']} has no such table{did_you_mean(key, manifest['tables'])}"
            )
    return asked or list(manifest["tables"])


def asked_jobs(manifest: Mapping[str, Any], asked: list[str] | None) -> set[str] | None:
    """Return the keys of the evaluations that the tables asked for read; None: every evaluation."""
    if not asked:
        return None
    return {job for key in asked_tables(manifest, asked) for job in tables.jobs(manifest, key)}


class Report(NamedTuple):
    """The tables that are asked for, from what is stored."""

    tables: list[RenderedTable]
    notes: list[str]
    """Sentences about what is damaged, or older than the code, the task file or the weights."""
    missing: int
    """How many of the results that the tables read are missing."""
    needed: int
    """How many they read."""


def reported(root: Path, suite: Path, asked: list[str] | None) -> Report:
    """Cut tables from what is stored.

    Args:
        root: The results folder.
        suite: The task file, for messages and to see whether it changed.
        asked: Keys of tables; None or none: every table.

    Raises:
        InputError: The folder has no manifest, or the suite has no such table.
    """
    manifest = read(root, suite)
    keys = asked_tables(manifest, asked)
    outcomes = Outcomes(root, columns_read(manifest, keys))
    cut = [tables.cut(manifest, key, outcomes) for key in keys]
    notes = stale(manifest, suite) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    notes += damages(manifest, outcomes, suite)
    needed = {job for key in keys for job in tables.jobs(manifest, key)}
    return Report(cut, notes, sum(outcomes(job) is None for job in needed), len(needed))


def damages(manifest: Mapping[str, Any], outcomes: Outcomes, suite: Path) -> list[str]:
    """Return a sentence for each damaged result that a report asked for, and for damaged files of a pack."""
    names = {each.job: condition_name(each.coordinates) for each in conditions_of(manifest)}
    return outcomes.faults + [
        f"evaluate {key} ({names[key]}): {reason}; make it again with: bench run {suite}"
        for key, reason in outcomes.damaged.items()
    ]


class CostReport(NamedTuple):
    """What attacks took."""

    costs: list[Cost]
    notes: list[str]
    """Sentences about what is damaged."""
    file: str
    """The name of the task file."""


def costs(root: Path, suite: Path, asked: list[str] | None) -> CostReport:
    """Return what the attacks of some tables took, or those of the whole suite.

    Args:
        root: The results folder.
        suite: The task file, for messages.
        asked: Keys of tables; None or none: every attack of the suite.

    Raises:
        InputError: The folder has no manifest, or the suite has no such table.
    """
    manifest, outcomes, store = read(root, suite), Outcomes(root), Store(root)
    jobs = asked_jobs(manifest, asked)
    found = attack_cost.spent(manifest, outcomes, lambda key: store.receipt("evaluate", key), jobs)
    return CostReport(found, damages(manifest, outcomes, suite), manifest["file"])


class RejectionReport(NamedTuple):
    """The read-outs whose refusals and scores are judged."""

    judged: list[Readout]
    outcomes: Outcomes
    """What they are judged by."""
    notes: list[str]
    """Sentences about what is damaged, or older than the code, the task file or the weights."""


def rejections(root: Path, suite: Path, asked: list[str] | None) -> RejectionReport:
    """Return the read-outs of some tables, or of the defenses of the whole suite that refuse something.

    Args:
        root: The results folder.
        suite: The task file, for messages and to see whether it changed.
        asked: Keys of tables; None or none: every defense that refuses something.

    Raises:
        InputError: The folder has no manifest, the suite has no such table, or nothing was refused.
    """
    manifest, outcomes = read(root, suite), Outcomes(root)
    judged = rejection.readouts(manifest, outcomes, asked_jobs(manifest, asked))
    if not judged:
        raise InputError(
            f"{root}: no read-out refused anything there; name a table to judge scores alone: --table KEY"
        )
    notes = stale(manifest, suite) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    return RejectionReport(judged, outcomes, notes + damages(manifest, outcomes, suite))

"""What a report is made of: the tables that are asked for, and what is to be said of their numbers.

Reads a results folder; plans nothing and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bench.console import condition_name
from bench.errors import InputError, did_you_mean
from bench.report import attack_cost, reconcile, tables
from bench.results.conditions import conditions_of
from bench.results.manifest import Outcomes, aged, read, stale
from bench.results.store import Store
from bench.suite.layout import columns_read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bench.report.attack_cost import Cost
    from bench.report.reconcile import Reconciliation
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


class Published(NamedTuple):
    """Tables with what papers printed."""

    tables: list[Reconciliation]
    notes: list[str]
    """Sentences about what is missing, damaged or older than the code."""


def published(root: Path, suite: Path, asked: list[str] | None, paper: list[str] | None) -> Published:
    """Put printed numbers beside those of some tables.

    Args:
        root: The results folder.
        suite: The task file, for messages.
        asked: Keys of tables; None or none: every table.
        paper: Published tables (``cnnf/3``), or papers (``cnnf``): all of their tables; None or none: those that
            a table names, or that look like it.

    Raises:
        InputError: The folder has no manifest, or there is no such table or paper.
    """
    papers = list(dict.fromkeys(key for name in paper or () for key in reconcile.asked_papers(name)))
    manifest, store = read(root, suite), Store(root)
    keys = asked_tables(manifest, asked)
    outcomes = Outcomes(root, columns_read(manifest, keys))

    def described(key: str) -> dict[str, Any] | None:
        return None if outcomes(key) is None else store.job("evaluate", key)

    found = [reconcile.reconcile(manifest, key, outcomes, described, papers) for key in keys]
    return Published(found, damages(manifest, outcomes, suite))

"""What a report is made of: the tables that are asked for, and what is to be said of their numbers.

Reads a results folder; plans nothing and imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.console import condition_name, count
from bench.errors import InputError, did_you_mean
from bench.report import attack_cost, reconcile, rejection, rounding, tables
from bench.report.provenance import Source, check_names
from bench.results.conditions import conditions_of
from bench.results.manifest import Outcomes, aged, read, stale
from bench.results.store import Store
from bench.suite.layout import columns_read
from bench.suite.places import results_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.report.attack_cost import Cost
    from bench.report.reconcile import Reconciliation
    from bench.report.rejection import Readout
    from bench.report.rounding import AskedOf, RoundedCell
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
    source: Source
    """What they were cut from."""


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
    cut = [tables.cut(manifest, key, outcomes, outcomes.found) for key in keys]
    notes = stale(manifest, suite, root) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    source = Source(root, manifest, keys, outcomes)
    needed = set().union(*source.reads.values())
    notes += [*damages(source, suite), *absences(source, suite), *unchecked(source, suite)]
    return Report(cut, notes, sum(outcomes(job) is None for job in needed), len(needed), source)


NAMED = 5
"""How many missing results are named; of more it is said how many they are."""


def damages(source: Source, suite: Path) -> list[str]:
    """Return a sentence for each damaged result that was asked for, and for damaged files of a pack.

    Args:
        source: The results folder, and what was read there.
        suite: The task file, for the command that makes them again.
    """
    names = _names(source)
    return (
        source.outcomes.faults
        + [
            f"evaluate {key} ({names[key]}): {reason}; make it again with: {_command(source, suite, key)}"
            for key, reason in source.outcomes.damaged.items()
        ]
        + [
            f"{said}; what it found is not in the table; make it again with: {_command(source, suite)}"
            for said in source.outcomes.damaged_checks.values()
        ]
    )


def absences(source: Source, suite: Path) -> list[str]:
    """Return a sentence for each of the first missing results that tables read, and one for all others.

    Args:
        source: The results folder, and the tables.
        suite: The task file, for the command that makes them.
    """
    needed = dict.fromkeys(job for key in source.keys for job in sorted(source.reads[key]))
    gone = [job for job in needed if source.outcomes(job) is None and job not in source.outcomes.damaged]
    if len(gone) == len(needed) > 1:
        return [
            f"nothing of {count(len(needed), 'result')} is there; make them with: {_command(source, suite)}"
        ]
    names = _names(source)
    said = [
        f"evaluate {key} ({names[key]}) {_why(source, key)}; make it with: {_command(source, suite, key)}"
        for key in gone[:NAMED]
    ]
    if more := len(gone) - len(said):
        every = count(more, "more result")
        said.append(
            f"{every} {'is' if more == 1 else 'are'} not there; make them with: {_command(source, suite)}"
        )
    return said


def unchecked(source: Source, suite: Path) -> list[str]:
    """Return a sentence for each of the first missing trials and examinations, and one for all others.

    What was not looked for is not found: a table without them is no quieter for it.

    Args:
        source: The results folder, and the tables.
        suite: The task file, for the command that makes them.
    """
    needed, outcomes = set().union(*source.reads.values()), source.outcomes
    gone: dict[tuple[str, str], None] = {}
    for facts in (each.facts for each in conditions_of(source.manifest) if each.job in needed):
        asked = [("trial", [facts.trial])] if facts.trial is not None else []
        if facts.examination is not None:
            # One that says more than the one that was asked for is as good.
            asked.append(("examination", [facts.examination, *facts.examinations]))
        for kind, keys in asked:
            if not any(outcomes.found(kind, key) or key in outcomes.damaged_checks for key in keys):
                gone[kind, keys[0]] = None
    names = check_names(source.manifest)
    said = [
        f"{kind} {key} ({names[kind, key]}) {_why(source, key)}: what it would find is not in the table; "
        f"make it with: {_command(source, suite)}"
        for kind, key in list(gone)[:NAMED]
    ]
    if more := len(gone) - len(said):
        every = count(more, "more trial or examination", "more trials and examinations")
        verb = "is" if more == 1 else "are"
        said.append(f"{every} {verb} not there; make them with: {_command(source, suite)}")
    return said


def _why(source: Source, key: str) -> str:
    """Return why a result is missing."""
    failed = Store(source.root).failure_file(key)
    return f"failed (see {source.root / 'failed' / failed.name})" if failed.is_file() else "is not there"


def _names(source: Source) -> dict[str, str]:
    return {each.job: condition_name(each.coordinates) for each in conditions_of(source.manifest)}


def _command(source: Source, suite: Path, job: str | None = None) -> str:
    """Return the command that makes an evaluation, or all that tables read."""
    keys = [key for key in source.keys if job is None or job in source.reads[key]]
    words = ["bench", "run", str(suite)]
    if len(keys) < len(source.manifest["tables"]):
        words += [word for key in (keys[:1] if job else keys) for word in ("--table", key)]
    if source.root.resolve() != results_folder(suite).resolve():
        words += ["--results", str(source.root)]
    return join(words)


class CostReport(NamedTuple):
    """What attacks took."""

    costs: list[Cost]
    notes: list[str]
    """Sentences about what is damaged."""
    file: str
    """The name of the task file."""
    source: Source
    """What they were read from."""


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
    source = Source(root, manifest, asked_tables(manifest, asked), outcomes)
    return CostReport(found, damages(source, suite), manifest["file"], source)


class RejectionReport(NamedTuple):
    """The read-outs whose refusals and scores are judged."""

    judged: list[Readout]
    outcomes: Outcomes
    """What they are judged by."""
    notes: list[str]
    """Sentences about what is damaged, or older than the code, the task file or the weights."""
    source: Source
    """What they were read from."""


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
    notes = stale(manifest, suite, root) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    source = Source(root, manifest, asked_tables(manifest, asked), outcomes)
    return RejectionReport(judged, outcomes, [*notes, *damages(source, suite)], source)


class RoundedReport(NamedTuple):
    """What is left of attacks where their images are rounded to 8 bits."""

    cells: list[RoundedCell]
    notes: list[str]
    """Sentences about what is damaged, or older than the code, the task file or the weights."""
    source: Source
    """What they were read from."""


def rounded(root: Path, suite: Path, asked: list[str] | None, ask: AskedOf) -> RoundedReport:
    """Return the cells of some tables as they are scored, and on images that are rounded to 8 bits.

    Args:
        root: The results folder.
        suite: The task file, for messages and to see whether it changed.
        asked: Keys of tables; None or none: every table.
        ask: Gives the answers to rounded images.

    Raises:
        InputError: The folder has no manifest, the suite has no such table, or none attacks anything.
    """
    manifest = read(root, suite)
    keys = asked_tables(manifest, asked)
    outcomes = Outcomes(root, columns_read(manifest, keys))
    found = rounding.cells(manifest, keys, outcomes, ask)
    if not found:
        raise InputError(f"{root}: no table that is asked for has a cell in which something is attacked")
    source = Source(root, manifest, keys, outcomes)
    notes = stale(manifest, suite, root) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    return RoundedReport(found, [*notes, *damages(source, suite)], source)


class Published(NamedTuple):
    """Tables with what papers printed."""

    tables: list[Reconciliation]
    notes: list[str]
    """Sentences about what is missing or damaged."""
    source: Source
    """What they were cut from."""


def published(root: Path, suite: Path, asked: list[str] | None, paper: list[str] | None) -> Published:
    """Put printed numbers beside those of some tables.

    Args:
        root: The results folder.
        suite: The task file, for messages.
        asked: Keys of tables; None or none: every table.
        paper: Published tables (``cnnf/3``), or papers (``cnnf``): all of their tables; None or none: those
            that a table names, or that look like it.

    Raises:
        InputError: The folder has no manifest, or there is no such table or paper.
    """
    papers = list(dict.fromkeys(key for name in paper or () for key in reconcile.asked_papers(name)))
    manifest, store = read(root, suite), Store(root)
    keys = asked_tables(manifest, asked)
    outcomes = Outcomes(root, columns_read(manifest, keys))
    jobs = reconcile.jobs_of(store, outcomes)
    found = [reconcile.reconcile(manifest, key, outcomes, jobs, papers) for key in keys]
    source = Source(root, manifest, keys, outcomes)
    return Published(found, [*damages(source, suite), *absences(source, suite)], source)

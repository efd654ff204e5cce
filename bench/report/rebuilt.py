"""Files of tables compared with what the stored outcomes say today, byte by byte and cell by cell."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from bench.console import count
from bench.errors import InputError
from bench.report import attack_cost, provenance, reconcile, rejection, tables
from bench.report.render import joined, reconciled
from bench.results.manifest import Outcomes, aged
from bench.results.origin import versions
from bench.results.seals import seal
from bench.results.store import Store
from bench.suite.layout import columns_read

NAMED = 5
"""How many cells of a file are named; of more it is said how many they are."""

DRAWN = ("svg", "png", "pdf")
"""Formats that are drawn, whose bytes differ with the libraries that draw: they have their digest alone."""


class Checked(NamedTuple):
    """What was found of some files of tables."""

    wrong: list[str]
    """A sentence for each difference."""
    notes: list[str]
    """What is no difference, and should be known."""
    files: int
    """How many files were rebuilt."""


class _File(NamedTuple):
    path: Path
    form: str
    keys: Sequence[str]
    options: Mapping[str, Any]
    by: str | None = None
    """The version of Crossfire that wrote it, where that is known."""


def folder(root: Path, manifest: Mapping[str, Any]) -> Checked:
    """Rebuild every file in the folder of tables of a results folder, and compare.

    Args:
        root: The results folder.
        manifest: Its manifest.
    """
    outcomes = Outcomes(root, columns_read(manifest, manifest["tables"]))
    wrong: list[str] = []
    bare: list[str] = []
    files: list[_File] = []
    for place in sorted((root / "tables").glob(f"*{provenance.SUFFIX}")):
        said, named = _told(place, root, outcomes)
        wrong += said
        files += named
    covered = {each.path for each in files}
    for key in manifest["tables"]:
        name = root / "tables" / provenance.file_name(key)
        for ending, form in provenance.ENDINGS.items():
            path = name.with_name(name.name + ending)
            if path.is_file() and path not in covered:
                bare.append(path.name)
                files.append(_File(path, form, [key], {}))
    wrong += [said for each in files for said in _compared(each, root, manifest, outcomes)]
    notes = [aged(outcomes.changed, Path(manifest["file"]))] if outcomes.changed else []
    if bare:
        alone = f"{count(len(bare), 'file')} in {root / 'tables'} without a manifest"
        notes.append(f"{alone} that says what it was made from: {', '.join(bare)}")
    return Checked(wrong, notes, len(files))


def file(place: Path, root: Path, manifest: Mapping[str, Any]) -> Checked:
    """Rebuild the files that one manifest of tables names, and compare.

    Args:
        place: The manifest beside the files.
        root: The results folder.
        manifest: The manifest of the results folder.
    """
    outcomes = Outcomes(root, columns_read(manifest, manifest["tables"]))
    wrong, files = _told(place, root, outcomes)
    wrong += [said for each in files for said in _compared(each, root, manifest, outcomes)]
    return Checked(wrong, [], len(files))


def results_of(place: Path) -> Path:
    """Return the results folder that a manifest of tables names.

    Args:
        place: The manifest.

    Raises:
        InputError: It is no manifest of tables.
    """
    told = _read(place)
    if told is None or not isinstance(told.get("results"), str):
        raise InputError(
            f"{place}: not the manifest of a table, such as bench run writes; name a results folder"
        )
    return place.parent / str(told["results"])


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _told(place: Path, root: Path, outcomes: Outcomes) -> tuple[list[str], list[_File]]:
    """Return what is wrong with a manifest of tables, and the files that it names."""
    told = _read(place)
    if told is None or not isinstance(told.get("scheme"), int):
        return [f"{place}: cut short, or no manifest of tables"], []
    if told["scheme"] != provenance.SCHEME:
        return [f"{place}: of form {told['scheme']}, and this Crossfire knows {provenance.SCHEME}"], []
    if told != seal(told):
        return [f"{place}: altered"], []
    wrong = [f"{place}: {said}" for said in _other_outcomes(told, Store(root), outcomes)]
    files = []
    for name, each in told["files"].items():
        path = place.parent / name
        if path.parent != place.parent:
            wrong.append(f"{place}: names {name!r}, which does not lie beside it")
            continue
        if not path.is_file():
            wrong.append(f"{path} is missing, which {place.name} names")
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != each["sha256"]:
            wrong.append(f"{path} is not the file that was written: {place.name} has another sha256")
        by = told["written"]["versions"].get("crossfire-bench")
        files.append(_File(path, each["format"], told["tables"], told["options"], by))
    return wrong, files


def _other_outcomes(told: Mapping[str, Any], store: Store, outcomes: Outcomes) -> Iterator[str]:
    """Yield which outcomes are not those that the files were made from; damaged ones are told elsewhere."""
    for key, made in told["outcomes"].items():
        name = f"evaluate {key} ({made['condition']})"
        receipt = store.receipt("evaluate", key)
        if receipt is None:
            yield f"{name}, which it was made from, is not there now"
        elif receipt and outcomes(key) is not None and provenance.digest_of(receipt) != made["receipt"]:
            yield f"{name} was made again since, or altered"
    for key, made in told.get("checks", {}).items():
        receipt = store.receipt(made["kind"], key)
        if receipt is None:
            yield f"{made['kind']} {key}, which it was made from, is not there now"
        elif provenance.digest_of(receipt) != made["receipt"]:
            yield f"{made['kind']} {key} was made again since, or altered"


# --- rebuilding --------------------------------------------------------------------------------------


def _compared(each: _File, root: Path, manifest: Mapping[str, Any], outcomes: Outcomes) -> list[str]:
    """Return where a file differs from what the outcomes say: one sentence for each of the first cells."""
    # Rounded images were asked about when it was written, and nothing that is stored tells the answers.
    if each.form in DRAWN or each.options.get("rounded"):
        return []
    if gone := [key for key in each.keys if key not in manifest["tables"]]:
        return [f"{each.path}: the suite has no table {gone[0]!r} now"]
    made = _made(each, root, manifest, outcomes)
    # No line end is changed on the way.
    stored = each.path.read_bytes().decode("utf-8", errors="replace")
    if stored == made:
        return []
    found = list(_cells(each.form, stored, made))
    said = [f"{each.path}: {text}" for text in found[:NAMED] or [_line(stored, made)]]
    if len(found) > NAMED:
        said.append(f"{each.path}: and {len(found) - NAMED} more")
    here = versions()["crossfire-bench"]
    other = (
        f" (written by crossfire-bench {each.by}, and this is {here})" if each.by not in (None, here) else ""
    )
    return [text + other for text in said]


def _made(each: _File, root: Path, manifest: Mapping[str, Any], outcomes: Outcomes) -> str:
    """Return the text of a file as the outcomes give it."""
    store, form = Store(root), each.form
    if each.options.get("cost") or each.options.get("rejection"):
        asked = each.options["tables"]
        jobs = {job for key in asked for job in tables.jobs(manifest, key)} if asked else None
        if each.options.get("rejection"):
            judged = Outcomes(root)
            return rejection.written(rejection.readouts(manifest, judged, jobs), judged, form)  # type: ignore[arg-type]
        costs = attack_cost.spent(manifest, outcomes, lambda key: store.receipt("evaluate", key), jobs)
        return attack_cost.written(costs, form)  # type: ignore[arg-type] # the format that was written
    if each.options.get("published"):
        papers = [key for name in each.options["paper"] for key in reconcile.asked_papers(name)]
        found = [
            reconcile.reconcile(manifest, key, outcomes, reconcile.jobs_of(store, outcomes), papers)
            for key in each.keys
        ]
        return reconciled.written(found, form)  # type: ignore[arg-type] # the format that was written
    cut = [tables.cut(manifest, key, outcomes, outcomes.found) for key in each.keys]
    return joined(cut, form)  # type: ignore[arg-type] # the format that was written


# --- which cell --------------------------------------------------------------------------------------


def _cells(form: str, stored: str, made: str) -> Iterator[str]:
    """Yield a sentence for each cell that differs; nothing where no cell tells the difference."""
    if form == "csv":
        yield from _records(_csv(stored), _csv(made))
    elif form == "json":
        yield from _records(_json(stored), _json(made))
    elif form == "markdown":
        yield from _pipes(stored, made)


def _csv(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(StringIO(text)))


def _json(text: str) -> list[dict[str, Any]]:
    try:
        return [cell for table in json.loads(text) for cell in table["cells"]]
    except (ValueError, KeyError, TypeError):
        return []


def _records(stored: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(stored) != len(made):
        return
    for theirs, ours in zip(stored, made, strict=True):
        names = list(ours)
        at = names[1 : names.index("column")] if "column" in names else []
        for name in names:
            if theirs.get(name) != ours[name]:
                row = ", ".join(str(ours[each]) for each in at)
                where = f"row {row!r}, column {ours['column']!r}: " if "column" in ours else ""
                yield f"{where}{name} is {_word(theirs.get(name))}, and {_word(ours[name])} by the outcomes"


def _pipes(stored: str, made: str) -> Iterator[str]:
    theirs, ours = stored.split("\n"), made.split("\n")
    if len(theirs) != len(ours):
        return
    heads: list[str] = []
    for line, other in zip(ours, theirs, strict=True):
        cells, others = _between(line), _between(other)
        heads = (heads or cells) if cells else []
        if line == other or not cells or len(cells) != len(others):
            continue
        for heading, cell, found in zip(heads, cells, others, strict=False):
            if cell != found:
                where = f"row {cells[0]!r}, column {heading!r}"
                yield f"{where}: {_word(found)}, and {_word(cell)} by the outcomes"


def _between(line: str) -> list[str]:
    """Return the cells of a line of a Markdown table; an escaped pipe is part of its cell."""
    if not line.startswith("| "):
        return []
    return [each.replace("\0", "\\|").strip() for each in line.replace("\\|", "\0").strip("|").split("|")]


def _line(stored: str, made: str) -> str:
    """Return the first line that differs."""
    theirs, ours = stored.split("\n"), made.split("\n")
    for number, (found, line) in enumerate(zip(theirs, ours, strict=False), 1):
        if found != line:
            return f"line {number} is {_word(found)}, and {_word(line)} by the outcomes"
    return f"{len(theirs)} lines, and {len(ours)} by the outcomes"


def _word(value: object) -> str:
    return "empty" if value is None or value == "" else repr(value) if isinstance(value, str) else str(value)

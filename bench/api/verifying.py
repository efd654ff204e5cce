"""Whether what is stored is what was stored, and whether the tables are what it says."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.console import condition_name, count
from bench.errors import InputError
from bench.report import provenance, rebuilt
from bench.results import pack
from bench.results.conditions import conditions_of
from bench.results.manifest import read
from bench.results.store import ABSENT, ARTEFACTS, Store, check_layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Verified(NamedTuple):
    """What was found."""

    wrong: list[str]
    """A sentence for each result that is damaged, and for each difference of a table."""
    notes: list[str]
    whole: list[str]
    """Sentences that sum up."""


def verified(where: Path, results: Path | None = None, data_root: Path | None = None) -> Verified:
    """Read every stored result, whatever was read before, and rebuild every table from them, bit for bit.

    Args:
        where: A task file, whose jobs are looked at; a results folder, or a folder of such, of which
            everything that is stored is; or the manifest beside the file of a table, for that file alone.
        results: The results folder of a task file or of a table; None: what the file's ``results`` says, or
            ``results/<suite>``, or what the table names.
        data_root: The folder of the data sets, for a task file; None: ``BENCH_DATA``, else the user's cache.

    Raises:
        InputError: There is nothing of this kind there, or another version of Crossfire made it.
    """
    if where.is_dir():
        found = [_folder(root) for root in _folders(where)]
        return Verified(
            [said for each in found for said in each.wrong],
            [said for each in found for said in each.notes],
            [said for each in found for said in each.whole],
        )
    if where.name.endswith(provenance.SUFFIX):
        root = results or rebuilt.results_of(where)
        tables = rebuilt.file(where, root, read(root, Path(f"{root.resolve().name}.yaml")))
        return Verified(tables.wrong, tables.notes, _said(tables))
    return _planned(where, results, data_root)


def _planned(suite: Path, results: Path | None, data_root: Path | None) -> Verified:
    """Verify the jobs of a task file, and the tables that were made from them."""
    from bench.api import running
    from bench.runner import outstanding
    from bench.runner.titles import whole_title

    project = running.planned(suite, results, data_root)
    root = project.store.shown
    if not root.is_dir():
        raise InputError(f"{root}: there is no such results folder")
    damaged = outstanding.damages(project.plan, project.store)
    wrong = [f"{whole_title(job)}: {reason}" for job, reason in damaged.items()]
    wrong += project.store.faults()
    every = count(len(project.plan.graph()), "job")
    whole = [
        f"{len(damaged)} of {every} damaged; bench run makes them again"
        if damaged
        else f"no stored result of {every} is damaged"
    ]
    if not (root / "manifest.json").is_file():
        return Verified(wrong, [], whole)
    tables = rebuilt.folder(root, read(root, suite))
    return Verified(wrong + tables.wrong, tables.notes, whole + _said(tables))


def _folders(where: Path) -> list[Path]:
    """Return the results folders that a folder is or holds."""
    if _is_results(where):
        return [where]
    found = sorted(each for each in where.iterdir() if each.is_dir() and _is_results(each))
    if not found:
        raise InputError(
            f"{where}: no results folder, and no folder of results folders: none has a manifest.json"
        )
    return found


def _is_results(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or (folder / "store.json").is_file()


def _folder(root: Path) -> Verified:
    """Verify everything that is stored in a results folder; plans nothing."""
    store, suite = Store(root), Path(f"{root.resolve().name}.yaml")
    wrong, manifest = store.faults(), None
    for name in ("store.json", "manifest.json"):
        # Another version's folder is refused, and not called damaged.
        with suppress(OSError, ValueError, KeyError, TypeError):
            check_layout(root, json.loads((root / name).read_text(encoding="utf-8"))["scheme"])
    try:
        manifest = read(root, suite)
    except InputError as error:
        wrong.append(str(error))
    names = _names(manifest)
    stored = list(_stored(store, {key: kind for kind, key in names}))
    damaged = 0
    for kind, key in stored:
        if (reason := store.damage(kind, key)) not in (None, ABSENT):
            damaged += 1
            name = f" ({names[kind, key]})" if (kind, key) in names else ""
            wrong.append(
                f"{kind} {key}{name}: {reason}; make it again with: {_command(manifest, root, suite)}"
            )
    every = count(len(stored), "stored result")
    whole = [f"{root}: {damaged} of {every} damaged" if damaged else f"{root}: none of {every} is damaged"]
    if manifest is None:
        return Verified(wrong, [], whole)
    tables = rebuilt.folder(root, manifest)
    return Verified(wrong + tables.wrong, tables.notes, whole + _said(tables))


def _stored(store: Store, kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield everything that is stored: kinds and keys.

    Args:
        store: The results folder.
        kinds: The kinds of what the manifest names, by key: an altered line of a pack does not tell its own.
    """
    packed = pack.opened(store.root)
    for kind in ARTEFACTS:
        there: set[str] = set()
        with suppress(OSError):
            # Drafts of processes that died begin with a dot.
            there = {name for name in os.listdir(store.root / kind) if not name.startswith(".")}
        for key in sorted(
            there.union(key for key in packed.keys if kinds.get(key, packed.kind(key)) == kind)
        ):
            yield kind, key


def _names(manifest: Mapping[str, Any] | None) -> dict[tuple[str, str], str]:
    """Return what a manifest names, in words, by kind and key."""
    told = manifest or {"conditions": []}
    evaluations = {("evaluate", each.job): condition_name(each.coordinates) for each in conditions_of(told)}
    return {**evaluations, **provenance.check_names(told)}


def _command(manifest: Mapping[str, Any] | None, root: Path, suite: Path) -> str:
    file = manifest["file"] if manifest is not None else suite
    return f"bench run {file} --results {root}"


def _said(tables: rebuilt.Checked) -> list[str]:
    if not tables.files:
        return ["no table was written there"]
    every = count(tables.files, "file")
    if tables.wrong:
        return [f"{every} of tables rebuilt; they are not all what the outcomes say"]
    return [f"{every} of tables rebuilt: bit for bit what the outcomes say"]

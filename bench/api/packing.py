"""Packing a results folder: what a repository keeps of it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.console import condition_name, count
from bench.errors import InputError
from bench.report.provenance import checks_of
from bench.results import pack
from bench.results.conditions import conditions_of
from bench.results.manifest import read
from bench.results.outcomes import LISTS
from bench.results.pack import Entry
from bench.results.store import ABSENT, ARTEFACTS, Store
from bench.suite.layout import columns_read

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any


class Packing(NamedTuple):
    """What was packed."""

    evaluations: int
    """How many evaluations are packed now."""
    sizes: dict[str, int]
    """The size of each file in bytes, by its name."""
    notes: list[str]
    """Sentences about what was left out, and what is not there."""


def packed(root: Path) -> Packing:
    """Pack the evaluations, trials and examinations that a manifest names, and remove their folders.

    Columns that no table of the manifest reads are left out. An evaluation that is packed already and has no
    folder stays as it is. Whenever the process dies, every evaluation is whole in its folder or in the pack.

    Args:
        root: The results folder.

    Raises:
        InputError: The folder is not one of Crossfire, nothing was evaluated there, or a result is damaged.
    """
    task_file = Path(f"{root.resolve().name}.yaml")
    manifest = read(root, task_file)
    store = Store(root)
    notes = store.open()
    names = {each.job: condition_name(each.coordinates) for each in conditions_of(manifest)}
    again = f"bench run {manifest['file']}"
    found = {key: store.damage("evaluate", key) for key in sorted(names)}
    damaged = {key: reason for key, reason in found.items() if reason not in (None, ABSENT)}
    if damaged:
        key, reason = next(iter(damaged.items()))
        more = f", and {len(damaged) - 1} more are damaged" if len(damaged) > 1 else ""
        raise InputError(
            f"{root}: evaluate {key} ({names[key]}): {reason}{more}; make it again with: {again}"
        )
    keys = [key for key, reason in found.items() if reason is None]
    if not keys:
        raise InputError(f"{root}: nothing was evaluated there yet: {again}")
    if missing := len(found) - len(keys):
        every = count(len(found), "evaluation")
        notes.append(f"{missing} of {every} are not there; {again} makes them, then pack again")
    reads = columns_read(manifest, manifest["tables"])
    entries = [_entry(store, key, reads.get(key, ())) for key in keys]
    entries += [_checked(store, kind, key) for kind, key in _checks(store, manifest)]
    before = pack.opened(store.root).keys
    pack.write(store.root, entries, manifest["scheme"])
    for each in entries:
        # Another run may have made it anew meanwhile.
        kind = str(each.job["kind"])
        if store.receipt(kind, each.key) == each.receipt:
            store.clear(kind, each.key)
    for kind in pack.KINDS:
        with suppress(OSError):
            (store.root / kind).rmdir()
    return Packing(
        len(keys),
        {name: (store.root / name).stat().st_size for name in (pack.ROWS, pack.RECEIPTS)},
        [*notes, *_left(entries, reads), *_unnamed(store, {each.key for each in entries}, before)],
    )


def _entry(store: Store, key: str, reads: Collection[str]) -> Entry:
    """Return an evaluation with the columns that are kept, from its folder or the present pack."""
    from pyarrow import parquet

    job, receipt = store.job("evaluate", key), store.receipt("evaluate", key) or {}
    place = store.folder("evaluate", key)
    if place.is_dir():
        content = (place / ARTEFACTS["evaluate"]).read_bytes()
        _same(content, receipt, ARTEFACTS["evaluate"], key)
        _same((json.dumps(job, indent=1) + "\n").encode(), receipt, "job.json", key)
        with parquet.ParquetFile(io.BytesIO(content)) as file:
            rows = file.read()
        gone: list[str] = []
    else:
        present = pack.opened(store.root)
        rows, gone = present.table(key), present.left_out(key)
    out = [name for name in LISTS if name in rows.column_names and name not in reads]
    return Entry(key, job, receipt, rows.drop_columns(out), tuple(sorted({*gone, *out})))


def _checks(store: Store, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the kinds and keys of the trials and examinations that are there and whole."""
    named = {pair for each in conditions_of(manifest) for pair in checks_of(each)}
    return sorted(each for each in named if store.damage(*each) is None)


def _checked(store: Store, kind: str, key: str) -> Entry:
    """Return a trial or an examination: what it found is in its receipt."""
    import pyarrow as pa

    return Entry(key, store.job(kind, key), store.receipt(kind, key) or {}, pa.table({}), ())


def _same(content: bytes, receipt: Mapping[str, Any], name: str, key: str) -> None:
    """Refuse content that its receipt does not name: it changed since it was looked at."""
    if hashlib.sha256(content).hexdigest() != receipt["files"][name]:
        raise InputError(f"evaluate {key}: its {name} is not the one that its receipt names; pack again")


def _left(entries: list[Entry], reads: Mapping[str, Collection[str]]) -> list[str]:
    """Return sentences about columns that are left out."""
    out = Counter(name for each in entries for name in each.left_out if name not in reads.get(each.key, ()))
    lack = sum(bool(set(each.left_out).intersection(reads.get(each.key, ()))) for each in entries)
    said = [
        f"left out the {name} of {count(n, 'evaluation')}, which no table reads" for name, n in out.items()
    ]
    if lack:
        said.append(
            f"{count(lack, 'evaluation')} lack columns that a table reads; the next run makes them again"
        )
    return said


def _unnamed(store: Store, names: Collection[str], before: Collection[str]) -> list[str]:
    """Return sentences about evaluations that the manifest does not name."""
    said = []
    if gone := set(before) - set(names):
        said.append(f"left out {count(len(gone), 'packed evaluation')} that the manifest does not name")
    with suppress(OSError):
        if others := list((store.root / "evaluate").iterdir()):
            kept = count(len(others), "evaluation")
            said.append(f"{kept} that the manifest does not name stay in {store.shown / 'evaluate'}")
    return said

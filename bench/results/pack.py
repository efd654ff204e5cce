"""Packed evaluations: all outcomes of a results folder in one file, all receipts in another.

`receipts.jsonl` has a header, then a line for each evaluation in ascending order of keys. `outcomes.parquet`
has their rows in the same order. The header holds the digest of both; each line holds its own, and that of
its rows, so that damage is known by evaluation. Trials and examinations are lines without rows.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.results import durable
from bench.results.outcomes import Stored
from bench.results.seals import seal

if TYPE_CHECKING:
    import pyarrow as pa

RECEIPTS = "receipts.jsonl"
"""The file of descriptions and receipts. A pack is what this file says: it is replaced last."""

ROWS = "outcomes.parquet"
"""The file of outcomes."""

BEFORE = "outcomes.before.parquet"
"""The outcomes that `RECEIPTS` names while it is being replaced."""

KINDS = ("evaluate", "trial", "examination")
"""The kinds of jobs whose results can be packed."""

_LEVEL = 19
"""Level of compression (zstd): twice as small as the default, at a second for 100,000 rows."""


_FRACTIONS = ("float", "double", "list<float>")
"""Types of columns whose bytes are compressed apart: the first ones repeat, the last ones hardly do."""


@dataclass(frozen=True)
class Entry:
    """An evaluation, a trial or an examination that is to be packed."""

    key: str
    job: Mapping[str, Any]
    """Its description, as `job.json` has it."""
    receipt: Mapping[str, Any]
    """Its receipt as it was written, with the digest of the file that the rows come from."""
    rows: pa.Table
    """Its rows, with the columns that are kept; none of a trial or an examination."""
    left_out: tuple[str, ...]
    """The columns that are not kept."""


class Pack:
    """The packed evaluations of a results folder.

    Args:
        receipts: The content of `RECEIPTS`; None where there is none.
        rows: The contents that may be those of its outcomes; the one that the header names counts, else the
            first.
    """

    def __init__(self, receipts: bytes | None, rows: Sequence[bytes]) -> None:
        self._receipts, self._candidates = receipts, rows
        head, _, body = (receipts or b"").partition(b"\n")
        header = _mapping(head)
        self._header = header if header is not None and header == seal(header, "pack") else {}
        self._whole = self._header.get("lines") == hashlib.sha256(body).hexdigest()
        self._lines: dict[str, dict[str, Any]] = {}
        self._kinds: dict[str, str] = {}
        for text in body.splitlines():
            line = _mapping(text)
            if line is not None and isinstance(key := line.get("key"), str):
                self._lines.setdefault(key, line if line == seal(line, "packed") else {})
                job = line.get("job")
                self._kinds.setdefault(key, str(job.get("kind")) if isinstance(job, dict) else "")
        self._columns: dict[str, pa.ChunkedArray] = {}

    @property
    def keys(self) -> list[str]:
        """The keys of the evaluations that it names, in ascending order."""
        return sorted(self._lines)

    @property
    def scheme(self) -> int | None:
        """The number of the layout that the header names; None where there is no header."""
        found = self._header.get("scheme")
        return found if isinstance(found, int) else None

    def __contains__(self, key: str) -> bool:
        """Return whether a result is named, whole or not."""
        return key in self._lines

    def kind(self, key: str) -> str:
        """Return the kind of job that left a result.

        Args:
            key: Its key, which the pack names.

        Returns:
            The kind that its line names, altered or not; that of most where it names none.
        """
        return self._kinds[key] if self._kinds[key] in KINDS else KINDS[0]

    def receipt(self, key: str) -> dict[str, Any]:
        """Return the receipt of an evaluation.

        Args:
            key: Its key, which the pack names.

        Returns:
            The receipt as it was before packing; empty where its line is altered.
        """
        return dict(self._lines[key].get("receipt", {}))

    def job(self, key: str) -> dict[str, Any]:
        """Return the description of an evaluation.

        Args:
            key: Its key, whose line is unaltered.

        Returns:
            The content of its `job.json`.
        """
        return dict(self._lines[key]["job"])

    def left_out(self, key: str) -> list[str]:
        """Return the columns of an evaluation that were not packed.

        Args:
            key: Its key, whose line is unaltered.

        Returns:
            The names of the columns.
        """
        return list(self._lines[key]["left_out"])

    def damage(self, key: str, *, read: bool = True) -> str | None:
        """Return what is wrong with an evaluation.

        Args:
            key: Its key, which the pack names.
            read: Whether its rows are compared with their digest.

        Returns:
            The reason why it does not count; None where it is whole.
        """
        if not self._lines[key]:
            return f"its line in {RECEIPTS} is cut short or altered"
        if not self._candidates:
            return f"{ROWS} is missing"
        if read and not self._exact and not self._holds(key):
            return f"its rows in {ROWS} are cut short or altered"
        return None

    def faults(self) -> list[str]:
        """Return a sentence for each of both files that is not as it was written.

        Returns:
            The sentences. Damage of an evaluation is told by `damage`: these are about bytes that belong to
            none of them, too.
        """
        found = []
        if self._receipts is not None and not self._whole:
            found.append(f"{RECEIPTS} is cut short or altered")
        if self._lines and self._candidates and self._header and not self._exact:
            found.append(f"{ROWS} is cut short or altered, or not the file that {RECEIPTS} names")
        return found

    def outcomes(self, key: str) -> Stored:
        """Return the outcomes of an evaluation.

        Args:
            key: Its key, whose line is unaltered.

        Returns:
            Its columns, without those that were left out.

        Raises:
            OSError: The file of outcomes cannot be read.
            ValueError: The same, as pyarrow says it.
        """
        return Stored(list(self._lines[key]["columns"]), lambda names: self._read(key, names))

    def table(self, key: str) -> pa.Table:
        """Return all rows and packed columns of an evaluation.

        Args:
            key: Its key, whose line is unaltered.

        Returns:
            The table.

        Raises:
            OSError: The file of outcomes cannot be read.
            ValueError: The same, as pyarrow says it.
        """
        return self._read(key, list(self._lines[key]["columns"]))

    def rows(self) -> bytes | None:
        """Return the content of the outcomes that the header names.

        Returns:
            The content; None where it is not there.
        """
        return self._chosen[0] if self._candidates and self._exact else None

    def without(self, key: str) -> bytes:
        """Return the content of `RECEIPTS` without an evaluation.

        Args:
            key: Its key.

        Returns:
            The content, with a new header.
        """
        _, _, body = (self._receipts or b"").partition(b"\n")
        kept = [text for text in body.splitlines() if (_mapping(text) or {}).get("key") != key]
        return _receipts(self.scheme or 0, self._header.get("outcomes"), kept)

    @cached_property
    def _chosen(self) -> tuple[bytes, bool]:
        """Return the outcomes, and whether they are the ones that the header names."""
        for each in self._candidates:
            if hashlib.sha256(each).hexdigest() == self._header.get("outcomes"):
                return each, True
        return self._candidates[0], False

    @property
    def _exact(self) -> bool:
        return self._chosen[1]

    def _holds(self, key: str) -> bool:
        try:
            return digest_of(self.table(key)) == str(self._lines[key]["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self, key: str, names: Iterable[str]) -> pa.Table:
        import pyarrow as pa

        line = self._lines[key]
        start, n = line["start"], line["n"]
        return pa.table({name: self._column(line["columns"][name]).slice(start, n) for name in names})

    def _column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the file, with the rows of all evaluations."""
        import pyarrow as pa
        from pyarrow import parquet

        if name not in self._columns:
            with parquet.ParquetFile(pa.BufferReader(self._chosen[0])) as file:
                self._columns[name] = file.read(columns=[name])[name]
        return self._columns[name]


def opened(root: Path) -> Pack:
    """Return the pack of a results folder; it is read once as long as its files stay.

    Args:
        root: The results folder.

    Returns:
        The pack; one that names no evaluation where nothing is packed.
    """
    return _opened(root, tuple(_stamp(root / name) for name in (RECEIPTS, ROWS, BEFORE)))


@lru_cache(maxsize=4)
def _opened(root: Path, stamps: tuple[object, ...]) -> Pack:
    receipts = _bytes(root / RECEIPTS)
    found = [_bytes(root / name) for name in (ROWS, BEFORE)] if receipts else []
    return Pack(receipts, [each for each in found if each is not None])


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _mapping(text: bytes) -> dict[str, Any] | None:
    """Return the mapping that a line holds, None for any other content."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# --- writing -----------------------------------------------------------------------------------------


def write(root: Path, entries: Iterable[Entry], scheme: int) -> None:
    """Replace the pack of a results folder.

    Whenever the process dies, the folder has the old pack or the new one. The same entries give the same
    bytes, with the same version of pyarrow.

    Args:
        root: The results folder.
        entries: The evaluations, in any order.
        scheme: The number of the folder's layout.

    Raises:
        RuntimeError: What was packed reads back otherwise.
    """
    ordered = sorted(entries, key=lambda each: each.key)
    rows = _parquet(ordered)
    receipts = _receipts(scheme, hashlib.sha256(rows).hexdigest(), _lines(ordered))
    made = Pack(receipts, [rows])
    for each in ordered:
        if made.damage(each.key) is not None or digest_of(made.table(each.key)) != digest_of(each.rows):
            raise RuntimeError(f"evaluate {each.key} reads back otherwise than it was packed")
    if (_bytes(root / RECEIPTS), _bytes(root / ROWS)) != (receipts, rows):
        named = opened(root)
        old = named.rows()
        if old is not None and old != _bytes(root / BEFORE):
            _put(root / BEFORE, old)
        _put(root / ROWS, rows)
        _put(root / RECEIPTS, receipts)
    durable.remove(root / BEFORE)


def drop(root: Path, key: str) -> None:
    """Take an evaluation out of a pack; its rows go when the folder is packed again.

    Args:
        root: The results folder.
        key: The key of the evaluation; nothing happens where the pack does not name it.
    """
    pack = opened(root)
    if key in pack:
        _put(root / RECEIPTS, pack.without(key))


def _put(path: Path, content: bytes) -> None:
    with durable.drafted(path) as draft:
        draft.write_bytes(content)


def _parquet(entries: Sequence[Entry]) -> bytes:
    """Return one file with the rows of all entries."""
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for each, names in zip(entries, _names(entries), strict=True):
        job = pa.array([each.key] * each.rows.num_rows, pa.string())
        tables.append(pa.table({"job": job, **{new: each.rows[name] for name, new in names.items()}}))
    table = pa.concat_tables(tables, promote_options="default")
    leaves = {
        name: f"{name}.list.element" if pa.types.is_list(table.schema.field(name).type) else name
        for name in table.column_names
    }
    split = [leaf for name, leaf in leaves.items() if kind_of(table, name) in _FRACTIONS]
    sink = io.BytesIO()
    parquet.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=[leaf for leaf in leaves.values() if leaf not in split],
        use_byte_stream_split=split,
        row_group_size=max(table.num_rows, 1),
        store_schema=False,
    )
    return sink.getvalue()


def _names(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Return what each column of each entry is called in the file.

    Notes of two attacks may share a name and not a type: the later one has its type in its name.
    """
    given: dict[tuple[str, str], str] = {}
    for each in entries:
        for name in each.rows.column_names:
            kind, new = kind_of(each.rows, name), name
            if (name, kind) not in given:
                while new == "job" or new in given.values():
                    new += f" ({kind})"
                given[name, kind] = new
    return [
        {name: given[name, kind_of(each.rows, name)] for name in each.rows.column_names} for each in entries
    ]


def kind_of(table: pa.Table, name: str) -> str:
    """Return the type of a column in words that do not depend on how a file names the elements of lists."""
    import pyarrow as pa

    kind = table.schema.field(name).type
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _lines(entries: Sequence[Entry]) -> list[bytes]:
    found, start = [], 0
    for each, names in zip(entries, _names(entries), strict=True):
        line = {
            "key": each.key,
            "start": start,
            "n": each.rows.num_rows,
            "columns": names,
            "left_out": list(each.left_out),
            "rows": digest_of(each.rows),
            "job": dict(each.job),
            "receipt": dict(each.receipt),
        }
        found.append(json.dumps(seal(line, "packed")).encode())
        start += each.rows.num_rows
    return found


def _receipts(scheme: int, outcomes: str | None, lines: Sequence[bytes]) -> bytes:
    body = b"".join(line + b"\n" for line in lines)
    header = {
        "scheme": scheme,
        "evaluations": len(lines),
        "outcomes": outcomes,
        "lines": hashlib.sha256(body).hexdigest(),
    }
    return json.dumps(seal(header, "pack")).encode() + b"\n" + body


def digest_of(table: pa.Table) -> str:
    """Return the digest of the values of a table, however they are stored.

    Args:
        table: Columns of numbers, of lists of numbers, or of anything that JSON can spell.

    Returns:
        A SHA-256 over names, types, which values are null, and the bytes of the others.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    spelled = hashlib.sha256()
    for name in table.column_names:
        column = table[name]
        spelled.update(json.dumps([name, kind_of(table, name), len(column)]).encode())
        spelled.update(pc.is_null(column).to_numpy().tobytes())
        if pa.types.is_list(column.type):
            spelled.update(pc.fill_null(pc.list_value_length(column), -1).to_numpy().tobytes())
            column = pc.list_flatten(column)
        if pa.types.is_primitive(column.type):
            zero = pa.scalar(0, pa.int64()).cast(column.type)
            spelled.update(pc.fill_null(column, zero).to_numpy().tobytes())
        else:
            spelled.update(json.dumps(column.to_pylist()).encode())
    return spelled.hexdigest()

"""What was found whole in a results folder, so that it is not read again while its files are as they were.

A file counts as the one that was read as long as its inode, its size, its times of modification and of change
are the same (docs/decisions/0024). The index is a cache: it may be lost, damaged or out of date at any time,
costs a second reading at most, and is locked by nobody, since a whole new file takes the old one's place.
"""

import json
import os
import shutil
import sqlite3
import zlib
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from bench.results import durable, fingerprint

NAME = "index.sqlite"
"""The file, in the results folder."""

SETTLED = 2_000_000_000
"""Nanoseconds for which a file must have been at rest when it was read.

It may be written a second time within a tick of the file system's clock; the coarsest tick is two seconds.
"""

KNOWN = os.name == "posix"
"""Whether the system tells when a file was changed last: Windows tells its creation in that place."""

Depth: TypeAlias = Literal[0, 1, 2]
"""How far a result was looked into: its receipt; whether its files are there; whether they are as made."""

RECEIPT: Depth = 0
PRESENT: Depth = 1
READ: Depth = 2

Stamps: TypeAlias = list[list[int]]
"""For a folder, its receipt and its files: inode, size, and times of modification and change, nanoseconds."""


class Entry(NamedTuple):
    """What is known of a result that was found whole."""

    depth: Depth
    """How far it was looked into."""
    stamps: Stamps
    """Of the folder and the receipt; from `PRESENT` on, of the files that the receipt names, by name."""
    receipt: dict[str, Any]
    """Its receipt, which was unaltered."""


def stamps(place: Path, receipt: Mapping[str, Any], depth: Depth) -> Stamps | None:
    """Return what tells that a result is the one that was looked at.

    Args:
        place: The folder of the result.
        receipt: Its receipt.
        depth: How far it is looked into.

    Returns:
        The stamps; None where a file is missing.
    """
    names = ["", "/receipt.json"]
    if depth > RECEIPT:
        names += [f"/{name}" for name in sorted(receipt.get("files", ()))]
    try:
        return [_stamp(f"{place}{name}") for name in names]
    except (OSError, ValueError):
        return None


def _stamp(path: str) -> list[int]:
    # The number of the device is left out: every mount of one share has its own.
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class Index:
    """The index of a results folder; with `record` and `save` it learns.

    Args:
        root: The results folder.
        afresh: Whether what is stored is ignored.
        keep: Whether what is found is recorded; else nothing is written.
    """

    def __init__(self, root: Path, *, afresh: bool = False, keep: bool = True) -> None:
        self._keep = keep and KNOWN
        self._root, self._path = root, root / NAME
        self._stored = None if afresh or not KNOWN else _opened(self._path)
        self._found: dict[tuple[str, str], bytes] = {}
        self._last: tuple[tuple[str, str] | None, Entry | None] = (None, None)
        self._since: int | None = None

    def get(self, kind: str, key: str) -> Entry | None:
        """Return what is known of a result, whether it is still true or not.

        Args:
            kind: Kind of the job.
            key: Key of the job.

        Returns:
            The entry; None where there is none, or where it is damaged.
        """
        name = (kind, key)
        if self._last[0] != name:
            self._last = name, self._get(kind, key)
        return self._last[1]

    def _get(self, kind: str, key: str) -> Entry | None:
        if (found := self._found.get((kind, key))) is not None:
            return _read(kind, key, found)
        if self._stored is None:
            return None
        try:
            row = self._stored.execute(
                "SELECT content FROM results WHERE kind = ? AND key = ?", (kind, key)
            ).fetchone()
            return None if row is None else _read(kind, key, row[0])
        except (sqlite3.Error, ValueError, TypeError, RecursionError, zlib.error):
            # One damaged entry is a reason to believe none.
            self.close()
            self._stored = None
            return None

    def begin(self) -> None:
        """Note the time, before results are looked at that are to be recorded."""
        if self._since is None and self._keep:
            self._since = _clock(self._root)

    def record(self, kind: str, key: str, entry: Entry) -> None:
        """Note a result that was found whole, unless its files had just been written when it was looked at.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            entry: What was found after `begin`; the stamps were the same before and after the look.
        """
        if self._since is not None and all(each[3] < self._since - SETTLED for each in entry.stamps):
            self._found[kind, key] = _written(kind, key, entry)
            self._last = (kind, key), entry

    def save(self, there: Mapping[str, set[str] | None]) -> None:
        """Write what was recorded, beside what others have written meanwhile.

        Two that write at once do not hinder each other; what one of them found may be lost, and is found
        again.

        Args:
            there: By kind, the keys of all results of the folder, so that entries of others are dropped; None
                where they are not known.
        """
        if not self._found:
            return
        with suppress(OSError, sqlite3.Error), durable.drafted(self._path) as draft:
            if self._stored is not None:
                shutil.copyfile(self._path, draft)
            try:
                self._fill(draft, there)
            except (sqlite3.Error, ValueError):
                durable.remove(draft)
                self._fill(draft, there)

    def close(self) -> None:
        """Let go of the file."""
        if self._stored is not None:
            self._stored.close()

    def _fill(self, draft: Path, there: Mapping[str, set[str] | None]) -> None:
        # Nobody else knows the draft; a lock on it would be one on a network share all the same.
        with closing(sqlite3.connect(f"{draft.as_uri()}?nolock=1", uri=True)) as made:
            made.execute("PRAGMA journal_mode = OFF")
            made.execute("PRAGMA synchronous = OFF")
            made.execute(
                "CREATE TABLE IF NOT EXISTS results"
                " (kind TEXT, key TEXT, content BLOB, PRIMARY KEY (kind, key)) WITHOUT ROWID"
            )
            made.execute("CREATE TABLE IF NOT EXISTS judges (digest TEXT)")
            if made.execute("SELECT digest FROM judges").fetchall() != [(_judges(),)]:
                # Another version of the code has replaced the file meanwhile.
                made.execute("DELETE FROM results")
                made.execute("DELETE FROM judges")
                made.execute("INSERT INTO judges VALUES (?)", (_judges(),))
            gone = [
                row
                for row in made.execute("SELECT kind, key FROM results")
                if (keys := there.get(row[0])) is not None and row[1] not in keys
            ]
            made.executemany("DELETE FROM results WHERE kind = ? AND key = ?", gone)
            made.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?)",
                ((*name, content) for name, content in self._found.items()),
            )
            made.commit()


def vouched(root: Path, kind: str, key: str) -> bool:
    """Return whether the index takes a result for one whose files were read and have not changed since.

    Args:
        root: The results folder.
        kind: Kind of the job.
        key: Key of the job.

    Returns:
        True where `distrust` is due if the files differ from their digests all the same.
    """
    with closing(Index(root)) as index:
        entry = index.get(kind, key)
    return (
        entry is not None
        and entry.depth == READ
        and stamps(root / kind / key, entry.receipt, READ) == entry.stamps
    )


def distrust(root: Path) -> None:
    """Throw the index away, so that the next examination reads every file.

    Args:
        root: The results folder.
    """
    durable.remove(root / NAME)


@cache
def _judges() -> str:
    """Return a digest of the code that finds a result whole: what other code found is not believed."""
    names = ("fingerprint", "index", "seals", "store", "survey")
    found = fingerprint.digests(f"bench.results.{name}" for name in names)
    return json.dumps(found, sort_keys=True)


def _opened(path: Path) -> sqlite3.Connection | None:
    """Return the stored index for reading; None where there is none of use."""
    try:
        # No lock is asked for: the file is never changed, it is replaced.
        stored = sqlite3.connect(f"{path.as_uri()}?immutable=1&mode=ro", uri=True)
    except sqlite3.Error:
        return None
    try:
        if stored.execute("SELECT digest FROM judges").fetchall() == [(_judges(),)]:
            return stored
    except (sqlite3.Error, ValueError):
        # Damaged; a digest that is no text is a ValueError.
        pass
    stored.close()
    return None


def _clock(root: Path) -> int | None:
    """Return the time by the clock of the file system in nanoseconds; None where it cannot be written to.

    A server's clock may differ from this machine's.
    """
    probe = root / f".draft{durable.mark()}"
    try:
        probe.touch()
        return os.stat(probe).st_ctime_ns
    except OSError:
        return None
    finally:
        durable.remove(probe)


def _written(kind: str, key: str, entry: Entry) -> bytes:
    content = zlib.compress(json.dumps(entry).encode(), 1)
    return _check(kind, key, content) + content


def _read(kind: str, key: str, row: bytes) -> Entry:
    check, content = row[:16], row[16:]
    if check != _check(kind, key, content):
        raise ValueError("an entry is not what was written")
    return Entry(*json.loads(zlib.decompress(content)))


def _check(kind: str, key: str, content: bytes) -> bytes:
    return blake2b(b"\0".join((kind.encode(), key.encode(), content)), digest_size=16).digest()

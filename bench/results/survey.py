"""A results folder as it is at one moment, looked at as a whole.

What is absent is known from one listing of each folder, and what was read before is not read again
(`bench.results.index`). For the moment at which a result is used there is `Store.damage`, which reads it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.results import index, pack
from bench.results.index import Depth, Entry, Index
from bench.results.store import ABSENT, ARTEFACTS, Store

_KEPT = 4096
"""How many receipts are held in memory: of a training, all that was made from it ask."""


class Survey:
    """What a results folder held when it was looked at.

    Args:
        store: The results folder.
        known: What was found in it before.
    """

    def __init__(self, store: Store, known: Index) -> None:
        self._store, self._index = store, known
        self.there = {kind: _names(store.root / kind) for kind in ARTEFACTS}
        """By kind, the names in the folder of its results; None where it cannot be listed."""
        self._packed = pack.opened(store.root)
        self.receipt = lru_cache(_KEPT)(self._receipt)

    def damage(self, kind: str, key: str, *, read: bool = True) -> str | None:
        """Return what is wrong with a stored result, as `Store.damage` does.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            read: Whether the files are as they were made; otherwise only their presence counts.

        Returns:
            The reason why the result does not count; None for a whole result.
        """
        if self._absent(kind, key):
            return ABSENT
        if self._is_packed(kind, key):
            return self._store.damage(kind, key, read=read)
        depth = index.READ if read else index.PRESENT
        if self._holds(kind, key, depth):
            return None
        self._index.begin()
        first = self._stamps(kind, key, {}, index.RECEIPT)
        receipt = self._store.receipt(kind, key) or {}
        before = self._stamps(kind, key, receipt, depth)
        reason = self._store.damage(kind, key, read=read)
        if reason is None and before is not None and first == before[:2]:
            self._note(kind, key, Entry(depth, before, receipt))
        return reason

    def _receipt(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the receipt of a result, as `Store.receipt` does.

        Args:
            kind: Kind of the job.
            key: Key of the job.

        Returns:
            The receipt; None where there is no result; an empty mapping where the receipt does not count.
        """
        if self._absent(kind, key):
            return None
        if self._is_packed(kind, key):
            return self._store.receipt(kind, key)
        known = self._index.get(kind, key)
        if known is not None and self._stamps(kind, key, {}, index.RECEIPT) == known.stamps[:2]:
            return known.receipt
        self._index.begin()
        before = self._stamps(kind, key, {}, index.RECEIPT)
        receipt = self._store.receipt(kind, key)
        if receipt and before is not None:
            self._note(kind, key, Entry(index.RECEIPT, before, receipt))
        return receipt

    def _absent(self, kind: str, key: str) -> bool:
        names = self.there[kind]
        return names is not None and key not in names and not self._is_packed(kind, key)

    def _is_packed(self, kind: str, key: str) -> bool:
        return kind in pack.KINDS and key in self._packed and key not in (self.there[kind] or ())

    def _stamps(self, kind: str, key: str, receipt: Mapping[str, Any], depth: Depth) -> index.Stamps | None:
        return index.stamps(self._store.folder(kind, key), receipt, depth)

    def _holds(self, kind: str, key: str, depth: Depth) -> bool:
        """Return whether a result was looked into as far as that, and is the same."""
        known = self._index.get(kind, key)
        if known is None or known.depth < depth:
            return False
        return self._stamps(kind, key, known.receipt, known.depth) == known.stamps

    def _note(self, kind: str, key: str, entry: Entry) -> None:
        """Record a result, if nobody has touched it while it was looked at."""
        known = self._index.get(kind, key)
        deeper = known is not None and known.depth > entry.depth and known.stamps[:2] == entry.stamps[:2]
        if not deeper and self._stamps(kind, key, entry.receipt, entry.depth) == entry.stamps:
            self._index.record(kind, key, entry)


@contextmanager
def survey(store: Store, *, afresh: bool = False) -> Iterator[Survey]:
    """Look at a results folder as a whole; what was found is kept for the next time.

    Of a store that only reads nothing is kept.

    Args:
        store: The results folder.
        afresh: Whether every file is read, whatever was found before.

    Yields:
        What the folder holds.
    """
    known = Index(store.root, afresh=afresh, keep=not store.reading)
    try:
        found = Survey(store, known)
        yield found
        if not store.reading:
            known.save(found.there)
    finally:
        known.close()


def _names(folder: Path) -> set[str] | None:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()
    except OSError:
        return None

"""Results that travel between results folders on different disks: in pieces, checked where they arrive."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.errors import DamagedError
from bench.results.store import ARTEFACTS, Store

PIECE = 8 << 20
"""The most bytes of a piece."""


def pieces(store: Store, kind: str, key: str) -> Iterator[tuple[str, bytes]]:
    """Yield a result in pieces.

    Args:
        store: The results folder that has it.
        kind: Kind of the job.
        key: Key of the job.

    Yields:
        The name of a file, and its next bytes; at least one for each file.

    Raises:
        DamagedError: The result is absent, or differs from its receipt.
    """
    folder = store.artefact(kind, key).parent
    for name in _names(kind):
        with (folder / name).open("rb") as file:
            data = file.read(PIECE)
            yield name, data
            while data := file.read(PIECE):
                yield name, data


def receive(store: Store, kind: str, key: str, arriving: Iterable[tuple[str, bytes]]) -> None:
    """Put together a result that comes in pieces, and check it against its receipt.

    Args:
        store: The results folder that gets it.
        kind: Kind of the job.
        key: Key of the job.
        arriving: What `pieces` yields.

    Raises:
        DamagedError: What arrived is not what was sent, or is no result of this job.
    """

    def write(folder: Path) -> None:
        for name, data in arriving:
            if name not in _names(kind):
                raise DamagedError(f"{kind} {key}: it came with a file {name!r}, which is none of it")
            with (folder / name).open("ab") as file:
                file.write(data)

    store.adopt(kind, key, write)


def _names(kind: str) -> tuple[str, ...]:
    return ("job.json", "receipt.json", ARTEFACTS[kind])

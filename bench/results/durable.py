"""Files that are complete after a kill or a power cut, and drafts that name their process.

The name of a draft holds the machine, the process and the start of the process, because containers may share
a host name and the numbers of processes are used again.
"""

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

FORGOTTEN = 7 * 24 * 3600.0
"""Age in seconds at which a draft of a process on another machine, which cannot be asked, is left behind."""

_OLDER = re.compile(r"\.\w+\.json\.(\d+)|draft-(\d+)\.safetensors")
"""Drafts of earlier versions, which named the number of the process alone."""

_MARKED = re.compile(r".*@.*@\d{1,10}@.*", re.DOTALL)
"""A name with the ending of `mark`."""


def mark() -> str:
    """Return the end of a draft's name, which tells this process from any other.

    Returns:
        ``@host@process@place-start-draw``.
    """
    host, place, draw = _host(), _place(), uuid4().hex[:12]
    return f"@{host}@{os.getpid()}@{place}-{_start(os.getpid())}-{draw}"


def ended(name: str) -> bool | None:
    """Return whether the process that a name is marked with has ended.

    Args:
        name: A name with the ending of `mark`.

    Returns:
        True or False for a process of this machine and container; None for one that cannot be asked, and for
        a name without a mark.
    """
    parts = name.rsplit("@", 3)
    if len(parts) != 4 or not parts[2].isdecimal() or len(parts[2]) > 10:
        return None
    _, host, pid, tail = parts
    place, _, rest = tail.partition("-")
    if host != _host() or (rest and place != _place()):
        return None
    # An earlier version wrote neither place nor start.
    return not _alive(int(pid)) or (bool(rest) and rest.partition("-")[0] != str(_start(int(pid))))


def abandoned(path: Path) -> bool:
    """Return whether a draft was left behind by a process that has ended.

    Args:
        path: A file or a folder.

    Returns:
        True for such a draft; False for one whose process may be running, and for anything that is no draft.
    """
    if (older := _OLDER.fullmatch(path.name)) is not None:
        return not _alive(int(older[1] or older[2]))
    if (gone := ended(path.name)) is not None:
        return gone
    try:
        return _MARKED.fullmatch(path.name) is not None and time.time() - path.lstat().st_mtime > FORGOTTEN
    except OSError:
        return False


def sweep(folder: Path) -> None:
    """Remove the drafts in a folder whose processes have ended.

    Args:
        folder: The folder; nothing happens where it cannot be read.
    """
    with suppress(OSError):
        for each in list(folder.iterdir()):
            if abandoned(each):
                remove(each)


@contextmanager
def drafted(place: Path) -> Iterator[Path]:
    """Yield the path of a draft; after the block the draft is on the disk and is renamed to its place.

    Args:
        place: The path of the finished file.

    Yields:
        The path to write to. If the block raises, the draft is removed.
    """
    draft = place.with_name(f".draft{mark()}")
    try:
        yield draft
        flush([draft])
        settle(draft, place)
        flush([place.parent])
    finally:
        remove(draft)


def settle(draft: Path, place: Path) -> None:
    """Rename a file to its place; a folder in that place is removed.

    Args:
        draft: The file.
        place: Its new path.
    """
    try:
        draft.replace(place)
    except OSError:
        if not place.is_dir():
            raise
        remove(place)
        draft.replace(place)


def move(source: Path, place: Path) -> None:
    """Rename a folder to its place; where that is on another disk, copy it there.

    Args:
        source: The folder.
        place: Its new path, at which nothing may lie.

    Raises:
        OSError: Something lies at the new path, or the disk refuses.
    """
    try:
        source.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = place.with_name(f".draft{mark()}")
        try:
            shutil.copytree(source, near)
            flush([*near.iterdir(), near])
            near.rename(place)
        finally:
            remove(near)


def flush(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk; all of them take hardly longer than one.

    Args:
        paths: Files and folders.
    """
    every = list(paths)
    if len(every) == 1:
        _flush(every[0])
        return
    with ThreadPoolExecutor(len(every)) as threads:
        list(threads.map(_flush, every))


def folder(path: Path) -> None:
    """Create a folder if it is missing; anything else at its path is removed.

    Args:
        path: The folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        remove(path)
        path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Remove whatever lies at a path, as far as this process may.

    Args:
        path: A file, a folder or a link; nothing happens where there is none.
    """
    with suppress(OSError):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
    with suppress(OSError):
        path.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            # Some systems cannot open folders.
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@cache
def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64]


@cache
def _place() -> str:
    """Return a digest of the start of the machine and of the container, to which process numbers belong."""
    told = []
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        told.append(os.readlink("/proc/self/ns/pid"))
    return sha256("\n".join(told).encode()).hexdigest()[:8]


def _start(pid: int) -> int:
    """Return the start of a process, in ticks since the start of the machine; 0 where it is not known."""
    try:
        # The name of the program, in brackets, may hold any character.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True

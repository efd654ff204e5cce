"""Files that a kill or a power cut leaves old or new, and drafts that tell whose they are.

A draft's name holds the machine, the process and when that began, since containers share host names, and
processes their numbers in the course of time.
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
"""Seconds after which a draft counts as left behind whose process, on another machine, cannot be asked."""

_OLDER = re.compile(r"\.\w+\.json\.(\d+)|draft-(\d+)\.safetensors")
"""Drafts of versions that named the process alone."""


def mark() -> str:
    """Return what ends the name of a draft of this process: ``@host@process@place-start-draw``."""
    host, place, draw = _host(), _place(), uuid4().hex[:12]
    return f"@{host}@{os.getpid()}@{place}-{_start(os.getpid())}-{draw}"


def abandoned(path: Path) -> bool:
    """Return whether a draft was left behind by a process that is gone; False of what is no draft."""
    if (older := _OLDER.fullmatch(path.name)) is not None:
        return not _alive(int(older[1] or older[2]))
    parts = path.name.rsplit("@", 3)
    if len(parts) != 4 or not parts[2].isdecimal() or len(parts[2]) > 10:
        return False
    _, host, pid, tail = parts
    place, _, rest = tail.partition("-")
    if host == _host() and not rest:
        # Of a version that wrote neither place nor start.
        return not _alive(int(pid))
    if host == _host() and place == _place():
        return not _alive(int(pid)) or rest.partition("-")[0] != str(_start(int(pid)))
    try:
        return time.time() - path.lstat().st_mtime > FORGOTTEN
    except OSError:
        return False


def sweep(folder: Path) -> None:
    """Remove the drafts in a folder whose processes are gone."""
    with suppress(OSError):
        for each in list(folder.iterdir()):
            if abandoned(each):
                remove(each)


@contextmanager
def drafted(place: Path) -> Iterator[Path]:
    """Yield a path to write a file to; then it is on the disk, and in its place at once."""
    draft = place.with_name(f".draft{mark()}")
    try:
        yield draft
        flush([draft])
        settle(draft, place)
        flush([place.parent])
    finally:
        remove(draft)


def settle(draft: Path, place: Path) -> None:
    """Rename a file to its place; a folder that lies there in its stead is taken away."""
    try:
        draft.replace(place)
    except OSError:
        if not place.is_dir():
            raise
        remove(place)
        draft.replace(place)


def move(source: Path, place: Path) -> None:
    """Rename a folder to its place, which must be free; where that is another disk, by way of a copy."""
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
    """Wait until files and folders are on the disk; together, which takes hardly longer than one."""
    every = list(paths)
    if len(every) == 1:
        _flush(every[0])
        return
    with ThreadPoolExecutor(len(every)) as threads:
        list(threads.map(_flush, every))


def folder(path: Path) -> None:
    """Make a folder, if it is not there; what else lies there is taken away."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        remove(path)
        path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Take away whatever lies at a path, as far as this process may."""
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
            # Some systems open no folders.
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
    """Return a digest of what process numbers are counted in: this start of the machine, this container."""
    told = []
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        told.append(os.readlink("/proc/self/ns/pid"))
    return sha256("\n".join(told).encode()).hexdigest()[:8]


def _start(pid: int) -> int:
    """Return when a process began, in ticks since the machine did; 0 where that cannot be known."""
    try:
        # The name, in brackets, may hold anything.
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

"""Leases: who is doing which job of a results folder, so that many processes share its work.

The folder is the queue. A job that is being done has a lease, a file that is created atomically and names a
worker; each worker has a file that says what it does and changes with every beat. Nothing locks, so that the
folder may be on NFS, and no clocks are compared: a worker has died if its file did not change for a while on
the clock of whoever looks, or at once if its process was on this machine and has ended.

A lease saves work and protects nothing: two workers that did one job would leave the same result
(`bench.results.store`).
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from bench.results import durable

BEAT = 2.0
"""Seconds between two changes of a worker's file."""

PATIENCE = 60.0
"""Seconds without a change after which a worker counts as dead."""

_NAME = re.compile(r"worker@[\w.-]+@\d+@[\w-]+")
"""The name of a worker."""

LEASES, WORKERS, STOP = "leases", "workers", "stop.json"
"""The folders of leases and of workers' files, and the file that asks all workers to stop."""

LOGS = "logs"
"""The folder of what workers print that have no terminal."""


class Leases:
    """The leases of one worker, which is a process that takes jobs, and what it sees of others'.

    Use it as a context manager: while it is open, its file beats; when it is closed, what it held is free.

    Args:
        root: The results folder.
        about: Returns what this worker's file shall say besides: mappings, lists, texts, numbers.
        beat: Seconds between two changes of its file, above 0.
        patience: Seconds without a change after which another worker counts as dead, above `beat`.
    """

    def __init__(
        self,
        root: Path,
        about: Callable[[], Mapping[str, Any]] = dict,
        *,
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> None:
        self.name = f"worker{durable.mark()}"
        """The name of this worker, which no other has."""
        self.inherited: dict[str, str] = {}
        """Jobs whose lease was a dead worker's until this one took it, with who that was."""
        self._root, self._about, self._beat, self._patience = root, about, beat, patience
        self._held: set[str] = set()
        self._beats: dict[str, tuple[str, float]] = {}
        self._over = threading.Event()
        self._stop = stop_asked(root)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._count = 0

    def __enter__(self) -> "Leases":
        for name in (LEASES, WORKERS):
            durable.folder(self._root / name)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything and remove this worker's file; nothing happens the second time.

        Where a signal may raise, call it also in a ``finally`` around the block: between entering and the
        block, and in the middle of leaving it, no block protects anything.
        """
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        for key in list(self._held):
            # Without a name: a signal came between its creation and our name in it.
            self._free(key, (self.name, ""))
        durable.remove(worker_file(self._root, self.name))

    @property
    def stopping(self) -> bool:
        """Whether somebody has asked everyone at this folder to stop since this worker began."""
        return stop_asked(self._root) != self._stop

    def take(self, key: str) -> bool:
        """Take the lease of a job, if nobody has it, or if whoever has it died.

        Args:
            key: The job's key.

        Returns:
            True if this worker has it now.
        """
        # Before there is a lease, so that a signal in between leaves none that is not freed.
        self._held.add(key)
        mine = self._take(key)
        if not mine:
            self._held.discard(key)
        return mine

    def _take(self, key: str) -> bool:
        place = self._root / LEASES / key
        for _ in range(2):
            if _create(place, self.name):
                return True
            owner = _owner(place)
            if owner is None:
                continue
            if owner == self.name:
                # The network lost the answer to our own request, and asked again.
                return True
            if not self._dead(owner, key) or not self._remove(place, owner):
                return False
            self.inherited[key] = _shown(owner)
        return False

    def free(self, key: str) -> None:
        """Give back the lease of a job; nothing happens if this worker does not have it any more.

        Args:
            key: The job's key.
        """
        self._free(key, (self.name,))

    def _free(self, key: str, owners: tuple[str, ...]) -> None:
        place = self._root / LEASES / key
        if _owner(place) in owners:
            durable.remove(place)
        self._held.discard(key)

    def held(self, key: str) -> bool:
        """Return whether a living worker has the lease of a job.

        Args:
            key: The job's key.

        Returns:
            False where nobody has it, or whoever has it died.
        """
        owner = _owner(self._root / LEASES / key)
        return owner is not None and not self._dead(owner, key)

    def _dead(self, owner: str, key: str) -> bool:
        if durable.ended(owner):
            return True
        # A lease whose writer died before it wrote its name is watched by itself.
        watched, said = owner or key, _read(worker_file(self._root, owner)) if owner else ""
        now = time.monotonic()
        before = self._beats.get(watched)
        if before is None or before[0] != said:
            self._beats[watched] = said, now
            return False
        return now - before[1] > self._patience

    def _remove(self, place: Path, owner: str) -> bool:
        """Remove a lease that a dead worker left; return whether this process was the one that did."""
        aside = place.with_name(f".taken{durable.mark()}")
        try:
            place.rename(aside)
        except OSError:
            return False
        if _owner(aside) != owner:
            # Another one was faster, and the lease is its own: put it back, unless the job has a new one.
            with suppress(OSError):
                os.link(aside, place)
            durable.remove(aside)
            return False
        durable.remove(aside)
        return True

    def _run(self) -> None:
        while not self._over.wait(self._beat):
            self._write()

    def _write(self) -> None:
        self._count += 1
        said: dict[str, Any] = {"beat": self._count}
        # Whatever cannot be told, the heart beats.
        with suppress(Exception):
            said |= self._about()
        # A full disk ends the run elsewhere, with a reason.
        with suppress(OSError):
            place = worker_file(self._root, self.name)
            draft = place.with_name(f".draft{durable.mark()}")
            try:
                draft.write_text(json.dumps(said), encoding="utf-8")
                draft.replace(place)
            finally:
                durable.remove(draft)


def worker_file(root: Path, name: str) -> Path:
    """Return the file of a worker.

    Args:
        root: The results folder.
        name: The worker's name.

    Returns:
        The path, whether it exists or not.
    """
    return root / WORKERS / name


@dataclass(frozen=True)
class Worker:
    """A worker at a results folder, as its file shows it."""

    name: str
    """Its name, with machine and process in it."""
    said: Mapping[str, Any]
    """What it says of itself."""
    silent: float
    """Seconds since its file last changed, by the clock of the disk."""
    dead: bool
    """Whether its process has ended, or it has been silent for longer than `PATIENCE`."""

    @property
    def shown(self) -> str:
        """Its process and machine, for people."""
        return _shown(self.name)


def workers(root: Path) -> list[Worker]:
    """Return the workers at a results folder, also those that died and left their files.

    Args:
        root: The results folder.

    Returns:
        The workers by name; none where the folder is not there.
    """
    found, now = [], _disk_time(root / WORKERS)
    for path in sorted((root / WORKERS).glob("worker@*")):
        with suppress(OSError):
            silent = max(now - path.stat().st_mtime, 0.0)
            try:
                said = json.loads(_read(path))
            except (ValueError, RecursionError):
                said = {}
            dead = bool(durable.ended(path.name)) or silent > PATIENCE
            found.append(Worker(path.name, said if isinstance(said, dict) else {}, silent, dead))
    return found


def _disk_time(folder: Path) -> float:
    """Return the time by the clock that stamps a folder's files, which may be another machine's."""
    probe = folder / f".draft{durable.mark()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        durable.remove(probe)


def sweep(root: Path, done: Callable[[str], bool]) -> None:
    """Remove the leases of jobs that are done, where whoever had them ended on this machine.

    It ended between its job and the removal of its lease. A lease of a job that is not done stays: it tells
    who died at it.

    Args:
        root: The results folder.
        done: Returns whether the result of a key is there.
    """
    with suppress(OSError):
        for place in list((root / LEASES).iterdir()):
            if (owner := _owner(place)) and durable.ended(owner) and done(place.name):
                durable.remove(place)


def ask_to_stop(root: Path) -> None:
    """Ask every worker at a results folder to stop.

    Args:
        root: The results folder.

    Raises:
        OSError: The folder cannot be written.
    """
    with durable.drafted(root / STOP) as draft:
        draft.write_text(json.dumps({"asked": uuid4().hex}) + "\n", encoding="utf-8")


def stop_asked(root: Path) -> str:
    """Return what tells one request to stop from another.

    Args:
        root: The results folder.

    Returns:
        The content of the request, empty where nobody ever asked.
    """
    return _read(root / STOP)


def _create(place: Path, owner: str) -> bool:
    """Create a lease; return whether it was not there."""
    try:
        handle = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(handle, owner.encode())
    except OSError:
        # On a full disk; a lease without a name would keep everybody waiting.
        durable.remove(place)
        raise
    finally:
        os.close(handle)
    return True


def _owner(place: Path) -> str | None:
    """Return the name in a lease: None where there is no lease, empty where it has no name, or not yet."""
    try:
        said = place.read_text(encoding="utf-8", errors="replace")
        return said if _NAME.fullmatch(said) else ""
    except FileNotFoundError:
        return None
    except OSError:
        # NFS says so of a file that was replaced while it was open.
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _shown(owner: str) -> str:
    """Return the machine and the process in a worker's name."""
    parts = owner.split("@")
    return f"process {parts[2]} on {parts[1]}" if len(parts) == 4 else "a worker"

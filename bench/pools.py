"""Where a job runs: in this process, or in one spawned process for each slot of a device."""

import contextlib
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol

import psutil
import torch

from bench import child_processes, sources
from bench.context import Desk, free_cores, prepare
from bench.errors import InputError, did_you_mean
from bench.plan import Job, foreign
from bench.registry import discover
from bench.worker import Recheck, do

Listener = Callable[[int, Mapping[str, Any]], None]
"""Told what a slot's job says of itself."""


class Pool(Protocol):
    """Slots that take one job each."""

    devices: tuple[str, ...]
    """The device of each slot."""

    def submit(self, slot: int, job: Job | Recheck) -> "Future[dict[str, Any]]":
        """Run a job in a free slot."""
        ...

    def warm(self, slot: int, job: Job) -> bool:
        """Return whether a slot can begin a job at once, without a new process."""
        ...

    def restart(self, slot: int) -> None:
        """Forget the process that died in a slot."""
        ...

    def kill(self, slot: int) -> None:
        """End what runs in a slot; its future fails."""
        ...

    def stop(self) -> None:
        """End at once, whatever is running."""
        ...


class Inline:
    """Runs each job at once, in this process."""

    def __init__(self, desk: Desk, devices: tuple[str, ...], listener: Listener) -> None:
        self.devices = devices[:1]
        self._desk = replace(desk, device=devices[0])
        self._listener = listener
        prepare(self._desk)

    def submit(self, slot: int, job: Job | Recheck) -> "Future[dict[str, Any]]":
        """Run a job; the future is done."""
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(do(job, self._desk, lambda facts: self._listener(slot, facts)))
        except Exception as error:  # noqa: BLE001 - a job's failure is its future's
            future.set_exception(error)
        return future

    def warm(self, slot: int, job: Job) -> bool:
        """Return True: there is one process."""
        return True

    def restart(self, slot: int) -> None:
        """Do nothing: there is one process."""

    def kill(self, slot: int) -> None:
        """Do nothing: nothing is running."""

    def stop(self) -> None:
        """Do nothing: nothing is running."""


HELD = 2
"""How many processes a slot holds at the most: one for our own code, and one for a module of a user."""


class Process:
    """Spawned workers for each slot, one at work; replaced when it dies.

    Jobs that run other people's code (`plan.foreign`) have a worker of their own for each such module, so
    that nothing that it does to its process reaches another's jobs.
    """

    def __init__(self, desk: Desk, devices: tuple[str, ...], listener: Listener) -> None:
        self.devices = devices
        self._desk = desk
        self._listener = listener
        self._context = get_context("spawn")
        self._held: list[dict[frozenset[str], ProcessPoolExecutor]] = [{} for _ in devices]
        self._at_work: list[frozenset[str] | None] = [None] * len(devices)
        self._ears: dict[Connection, int] = {}
        self._others = child_processes.running()
        child_processes.adopt_orphans(True)
        self._changed, self._wake = self._context.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def submit(self, slot: int, job: Job | Recheck) -> "Future[dict[str, Any]]":
        """Run a job in one of a slot's processes."""
        home = _home(job)
        self._at_work[slot] = home
        for _ in range(2):
            executor = self._held[slot].pop(home, None) or self._start(slot)
            # The last used comes last.
            self._held[slot][home] = executor
            try:
                with _deaf_children():
                    return executor.submit(_work, job)
            except BrokenProcessPool:
                # A process that died while idle: the standard library's pool is gone for good.
                del self._held[slot][home]
        raise BrokenProcessPool(f"no process can be started for {self.devices[slot]}")

    def warm(self, slot: int, job: Job) -> bool:
        """Return whether the slot holds a process for what the job runs."""
        return _home(job) in self._held[slot]

    def restart(self, slot: int) -> None:
        """Forget the process that was at work; the next job gets a new one."""
        home = self._at_work[slot]
        if home is not None and (executor := self._held[slot].pop(home, None)) is not None:
            _end(executor)

    def kill(self, slot: int) -> None:
        """Kill the process that is at work, and what it started."""
        home = self._at_work[slot]
        if home is not None and home in self._held[slot]:
            _kill(self._held[slot][home])

    def stop(self) -> None:
        """Kill the processes; what they had finished is stored."""
        for held in self._held:
            for executor in held.values():
                _end(executor)
            held.clear()
        # What they started and left behind is ours by now.
        child_processes.end(child_processes.running() - self._others)
        child_processes.adopt_orphans(False)
        self._wake.send(None)

    def _start(self, slot: int) -> ProcessPoolExecutor:
        held = self._held[slot]
        while len(held) >= HELD:
            _end(held.pop(next((home for home in held if home), frozenset())))
        ear, mouth = self._context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=self._context,
            initializer=_begin,
            initargs=(replace(self._desk, device=self.devices[slot]), mouth),
        )
        self._ears[ear] = slot
        self._wake.send(True)
        return executor

    def _listen(self) -> None:
        """Pass on what the processes say; each has a pipe of its own, so that a kill blocks none."""
        while True:
            for ready in connection.wait([self._changed, *self._ears]):
                assert isinstance(ready, Connection)
                try:
                    said = ready.recv()
                except (EOFError, OSError):
                    self._ears.pop(ready, None)
                    continue
                if ready is self._changed:
                    if said is None:
                        return
                elif ready in self._ears:
                    self._listener(self._ears[ready], said)


def _home(job: Job | Recheck) -> frozenset[str]:
    """Return whose code a job runs beside ours: it has a process of its own."""
    return foreign(job.train if isinstance(job, Recheck) else job)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Keep Ctrl-C from processes that start in the block: until they can leave it to us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(executor: ProcessPoolExecutor) -> None:
    """Kill an executor's process, and what it started."""
    for process in list((executor._processes or {}).values()):
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            child_processes.end(below)


def _end(executor: ProcessPoolExecutor) -> None:
    _kill(executor)
    executor.shutdown(wait=False, cancel_futures=True)


_DESK: Desk | None = None
_MOUTH: Connection | None = None
_CHANGED: list[str] = []
"""Modules that were edited between the plan and this process."""


def _begin(desk: Desk, mouth: Connection) -> None:
    """Set up a worker: it dies with its parent, and leaves Ctrl-C to it."""
    global _DESK, _MOUTH
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    child_processes.adopt_orphans(True)
    prepare(desk)
    discover()
    now = sources.digests(desk.sources)
    global _CHANGED
    _CHANGED = [name for name, digest in desk.sources.items() if now.get(name) != digest]
    _DESK, _MOUTH = desk, mouth


def _die_with_parent(end: Callable[[int], None] = os._exit) -> None:
    """End, with all that was started here, when the parent ends. A job may not call `os._exit`; this may."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        child_processes.end(child_processes.running())
        end(1)


def _work(job: Job | Recheck) -> dict[str, Any]:
    assert _DESK is not None
    assert _MOUTH is not None
    if _CHANGED:
        raise InputError(f"{', '.join(_CHANGED)} changed since the run was planned; start it again")
    try:
        return do(job, _DESK, _MOUTH.send)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001 - whatever keeps an error from travelling
            story = "".join(traceback.format_exception(error))
            raise RuntimeError(f"{type(error).__name__}: {error}\n{story}") from None
        raise


def slots(asked: list[str] | None, executor: str) -> tuple[str, ...]:
    """Return the device of each slot: those asked for, else every GPU, else one CPU slot a core."""
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not asked:
        asked = there or ["cpu"]
    found: list[str] = []
    for name in asked:
        if name == "cuda" and there:
            found.append("cuda:0")
        elif name in there:
            found.append(name)
        elif name == "cpu":
            # One core each, unless the user counts them out by naming it several times.
            found += ["cpu"] * (free_cores() if asked.count("cpu") == 1 and executor == "process" else 1)
        else:
            raise InputError(
                f"--device {name}: there is no such device here{did_you_mean(name, [*there, 'cpu'])}"
            )
    return tuple(found)

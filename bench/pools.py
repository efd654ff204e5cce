"""Where a job runs: in this process, or in one spawned process for each slot of a device."""

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from bench import sources
from bench.errors import InputError, did_you_mean
from bench.plan import Job
from bench.registry import discover
from bench.work import Desk, do, free_cores, prepare

Listener = Callable[[int, Mapping[str, Any]], None]
"""Told what a slot's job says of itself."""


class Pool(Protocol):
    """Slots that take one job each."""

    devices: tuple[str, ...]
    """The device of each slot."""

    def submit(self, slot: int, job: Job) -> "Future[dict[str, Any]]":
        """Run a job in a free slot."""
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

    def submit(self, slot: int, job: Job) -> "Future[dict[str, Any]]":
        """Run a job; the future is done."""
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(do(job, self._desk, lambda facts: self._listener(slot, facts)))
        except Exception as error:  # noqa: BLE001 - a job's failure is its future's
            future.set_exception(error)
        return future

    def kill(self, slot: int) -> None:
        """Do nothing: nothing is running."""

    def stop(self) -> None:
        """Do nothing: nothing is running."""


class Process:
    """A spawned worker for each slot, replaced when it dies."""

    def __init__(self, desk: Desk, devices: tuple[str, ...], listener: Listener) -> None:
        self.devices = devices
        self._desk = desk
        self._listener = listener
        self._context = get_context("spawn")
        self._executors: list[ProcessPoolExecutor | None] = [None] * len(devices)
        self._ears: dict[Connection, int] = {}
        self._changed, self._wake = self._context.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def submit(self, slot: int, job: Job) -> "Future[dict[str, Any]]":
        """Run a job in a slot's process."""
        for _ in range(2):
            executor = self._executors[slot] or self._start(slot)
            try:
                return executor.submit(_work, job)
            except BrokenProcessPool:
                # A process that died while idle: the standard library's pool is gone for good.
                self._executors[slot] = None
        raise BrokenProcessPool(f"no process can be started for {self.devices[slot]}")

    def restart(self, slot: int) -> None:
        """Forget a slot's process; the next job gets a new one."""
        executor, self._executors[slot] = self._executors[slot], None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def kill(self, slot: int) -> None:
        """Kill a slot's process."""
        executor = self._executors[slot]
        for process in list((executor._processes or {}).values()) if executor is not None else []:
            process.kill()

    def stop(self) -> None:
        """Kill the processes; what they had finished is stored."""
        for slot in range(len(self._executors)):
            self.kill(slot)
            self.restart(slot)
        self._wake.send(None)

    def _start(self, slot: int) -> ProcessPoolExecutor:
        ear, mouth = self._context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=self._context,
            initializer=_begin,
            initargs=(replace(self._desk, device=self.devices[slot]), mouth),
        )
        self._executors[slot] = executor
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


_DESK: Desk | None = None
_MOUTH: Connection | None = None
_CHANGED: list[str] = []
"""Modules that were edited between the plan and this process."""


def _begin(desk: Desk, mouth: Connection) -> None:
    """Set up a worker: it dies with its parent, and leaves Ctrl-C to it."""
    global _DESK, _MOUTH
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    prepare(desk)
    discover()
    now = sources.digests(desk.sources)
    global _CHANGED
    _CHANGED = [name for name, digest in desk.sources.items() if now.get(name) != digest]
    _DESK, _MOUTH = desk, mouth


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: Job) -> dict[str, Any]:
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

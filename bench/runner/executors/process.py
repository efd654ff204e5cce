"""The executor that runs jobs in worker processes of this machine, one at a time in each slot."""

import contextlib
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

import psutil

from bench.errors import InputError
from bench.registry import discover
from bench.results import fingerprint
from bench.runner import child_processes
from bench.runner.context import WorkerContext, prepare
from bench.runner.executors.devices import slots
from bench.runner.executors.protocol import Asked, Listener, Start
from bench.runner.occupancy import Nvml, Occupancy
from bench.runner.worker import Question, do
from bench.suite.jobs import Job, foreign


def ready(asked: Asked) -> Start:
    """Check the devices that were asked for.

    Args:
        asked: What the user asked for.

    Returns:
        What starts the executor.

    Raises:
        InputError: There is no such device here, one was named twice, or a GPU cannot be measured.
    """
    every = slots(asked)
    gpus = sorted({name for name in every if name != "cpu"})
    if asked.slots == "auto" and gpus:
        # Here, and not when work begins, so that a GPU that cannot be measured is said at once.
        return partial(Process, devices=every, occupancy=Occupancy(every, Nvml(gpus)))
    return partial(Process, devices=every)


HELD = 2
"""The most processes that a slot holds: one for Crossfire's own code, and one for a user's module."""


class Process:
    """The pool whose slots run jobs in spawned worker processes, one job at a time in each slot.

    Jobs that run code of other people (`jobs.foreign`) have a worker for each set of modules, so that what
    such code does to its process reaches no other job. A worker that dies is replaced.

    Args:
        context: The surroundings of the jobs; each worker gets the device of its slot.
        listener: Called from a thread with the number of a slot and the facts that its job reports.
        devices: The device of each slot.
        occupancy: Decides which slots are open; None: all are.
    """

    def __init__(
        self,
        context: WorkerContext,
        listener: Listener,
        devices: tuple[str, ...],
        occupancy: Occupancy | None = None,
    ) -> None:
        self.devices, self.occupancy = devices, occupancy
        self._worker_context = context
        self._listener = listener
        self._context = get_context("spawn")
        self._held: list[dict[frozenset[str], ProcessPoolExecutor]] = [{} for _ in devices]
        self._at_work: list[frozenset[str] | None] = [None] * len(devices)
        self._inboxes: dict[Connection, int] = {}
        self._before = child_processes.running()
        child_processes.adopt_orphans(True)
        self._woken, self._wake = self._context.Pipe(duplex=False)
        if occupancy is not None:
            occupancy.begin()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def submit(self, slot: int, job: Job | Question) -> "Future[dict[str, Any]]":
        """Start a job in one of the workers of a slot.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            The future of the job's receipt.

        Raises:
            BrokenProcessPool: No process can be started.
        """
        modules = modules_of(job)
        self._at_work[slot] = modules
        for _ in range(2):
            executor = self._held[slot].pop(modules, None) or self._start(slot)
            # The worker that was used last comes last.
            self._held[slot][modules] = executor
            try:
                with _interrupts_blocked():
                    return executor.submit(_work, job)
            except BrokenProcessPool:
                # The process died while idle, and its executor accepts no other job.
                del self._held[slot][modules]
        raise BrokenProcessPool(f"no process can be started for {self.devices[slot]}")

    def warm(self, slot: int, job: Job) -> bool:
        """Return whether the slot holds a worker for the code that the job runs.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            True where no process must be started.
        """
        return modules_of(job) in self._held[slot]

    def restart(self, slot: int) -> None:
        """Forget the worker that is at work in a slot; the next job gets a new one.

        Args:
            slot: Number of the slot, from 0.
        """
        modules = self._at_work[slot]
        if modules is not None and (executor := self._held[slot].pop(modules, None)) is not None:
            _end(executor)

    def kill(self, slot: int) -> None:
        """Kill the worker that is at work in a slot, with the processes that it started.

        Args:
            slot: Number of the slot, from 0.
        """
        modules = self._at_work[slot]
        if modules is not None and modules in self._held[slot]:
            _kill(self._held[slot][modules])

    def watch(self) -> list[str]:
        """Return nothing: a worker that dies is replaced when its slot gets the next job.

        Returns:
            Nothing.
        """
        return []

    def stop(self) -> None:
        """Kill all workers; what they had finished is stored."""
        if self.occupancy is not None:
            self.occupancy.close()
        for held in self._held:
            for executor in held.values():
                _end(executor)
            held.clear()
        # Processes that the workers left behind are children of this one by now.
        child_processes.end(child_processes.running() - self._before)
        child_processes.adopt_orphans(False)
        self._wake.send(None)

    def _start(self, slot: int) -> ProcessPoolExecutor:
        held = self._held[slot]
        while len(held) >= HELD:
            _end(held.pop(next((modules for modules in held if modules), frozenset())))
        inbox, outbox = self._context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=self._context,
            initializer=_begin,
            initargs=(replace(self._worker_context, device=self.devices[slot]), outbox),
        )
        self._inboxes[inbox] = slot
        self._wake.send(True)
        return executor

    def _listen(self) -> None:
        """Pass on what the workers report. Each has its own pipe, so that a killed worker blocks no other."""
        while True:
            for ready in connection.wait([self._woken, *self._inboxes]):
                assert isinstance(ready, Connection)
                try:
                    said = ready.recv()
                except (EOFError, OSError):
                    self._inboxes.pop(ready, None)
                    continue
                if ready is self._woken:
                    if said is None:
                        return
                elif ready in self._inboxes:
                    self._listener(self._inboxes[ready], said)


def modules_of(job: Job | Question) -> frozenset[str]:
    """Return the modules of other people that a job runs; each set of them has a worker.

    Args:
        job: The job.

    Returns:
        Their names.
    """
    return foreign(job.train if isinstance(job, Question) else job)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for processes that start in the block, until they ignore it for themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(executor: ProcessPoolExecutor) -> None:
    """Kill the process of an executor, with the processes that it started."""
    for process in list((executor._processes or {}).values()):
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            child_processes.end(below)


def _end(executor: ProcessPoolExecutor) -> None:
    _kill(executor)
    executor.shutdown(wait=False, cancel_futures=True)


_CONTEXT: WorkerContext | None = None
"""The surroundings of the jobs of this worker; None outside a worker."""
_OUTBOX: Connection | None = None
"""The pipe on which this worker reports; None outside a worker."""
_CHANGED: list[str] = []
"""Modules whose code changed between the plan and the start of this process."""


def _begin(context: WorkerContext, outbox: Connection) -> None:
    """Set up a worker, which ends with its parent and ignores SIGINT."""
    global _CONTEXT, _OUTBOX
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    child_processes.adopt_orphans(True)
    prepare(context)
    discover()
    now = fingerprint.digests(context.sources)
    global _CHANGED
    _CHANGED = [name for name, digest in context.sources.items() if now.get(name) != digest]
    _CONTEXT, _OUTBOX = context, outbox


def _die_with_parent(end: Callable[[int], None] = os._exit) -> None:
    """End this process, with those that it started, when its parent ends; jobs cannot call `os._exit`."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        child_processes.end(child_processes.running())
        end(1)


def _work(job: Job | Question) -> dict[str, Any]:
    assert _CONTEXT is not None
    assert _OUTBOX is not None
    if _CHANGED:
        raise InputError(f"{', '.join(_CHANGED)} changed since the run was planned; start it again")
    try:
        return do(job, _CONTEXT, _OUTBOX.send)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001 - any reason that keeps an error from being sent
            story = "".join(traceback.format_exception(error))
            raise RuntimeError(f"{type(error).__name__}: {error}\n{story}") from None
        raise

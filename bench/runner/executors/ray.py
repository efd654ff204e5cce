"""The executor on Ray: an actor for each slot, which gets one job at a time.

An actor holds a worker process as the executor `process` does, so that torch starts once and a job that
ends its process takes no actor with it. Actors that Ray cannot place yet wait for room, and the jobs of their
slots go to the others. Where a node does not see the results folder, results travel (`bench.results.travel`).
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from bench.errors import InputError
from bench.results import durable, travel
from bench.results.store import Store
from bench.runner.context import free_cores
from bench.runner.executors.process import Process, modules_of
from bench.runner.occupancy import Occupancy
from bench.runner.process_state import set_signal_handlers, signal_handlers
from bench.runner.rehearsal import Rehearsal
from bench.runner.worker import Question, Recheck
from bench.suite.jobs import Train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.runner.context import WorkerContext
    from bench.runner.executors.protocol import Asked, Listener, Start
    from bench.suite.jobs import Job

CONNECT, ANSWER = 10.0, 30.0
"""Seconds that an address has to take a connection, and to answer as a cluster does."""

ROOM = 120.0
"""Seconds until the first actor must have started."""


def ready(asked: Asked) -> Start:
    """Check what is asked of Ray; connects to nothing yet.

    Args:
        asked: What the user asked for.

    Returns:
        What starts the executor.

    Raises:
        InputError: A device or a number of slots is not one of a cluster, or the address is none.
    """
    devices = asked.devices or []
    if len(devices) > 1:
        raise InputError(
            f"--device {' --device '.join(devices)}: on Ray one kind of device is named, cpu or cuda; "
            "--slots N puts N jobs on each GPU, and --workers N says how many there are in all"
        )
    if devices and devices[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {devices[0]}: on Ray expected cpu or cuda; Ray chooses which one")
    if asked.ray_address and asked.ray_address.startswith("ray://"):
        raise InputError(
            f"--ray-address {asked.ray_address}: expected HOST:PORT of the head node (6379 where none was "
            "chosen); a run is no client of ray://"
        )
    if asked.slots is not None and devices == ["cpu"]:
        raise InputError(
            f"--slots {asked.slots}: on Ray it shares GPUs; --workers says how many there are on CPUs"
        )
    if asked.slots == "auto":
        raise InputError(
            "--slots auto: on Ray expected a number, such as --slots 4; Ray does not measure GPUs"
        )
    return partial(
        Ray,
        address=asked.ray_address,
        device=devices[0] if devices else None,
        workers=asked.workers,
        per_gpu=asked.slots or 1,
    )


@dataclass
class _Actor:
    """An actor, whether Ray has placed it or not."""

    number: int
    handle: Any
    began: Any
    """The reference of what it says when it has started."""
    node: str = ""
    shared: bool = True
    free: bool = False
    """Whether it has started and does nothing."""
    held: list[frozenset[str]] = field(default_factory=list)
    """The sets of modules that its last jobs ran."""


class Ray:
    """The pool whose slots are actors on a Ray cluster.

    Args:
        context: The surroundings of the jobs.
        listener: Called from threads with the number of a slot and the facts that its job reports.
        address: ``host:port`` of the cluster's head, or ``auto``; None: that of ``RAY_ADDRESS``, else a
            cluster of this machine that ends with the run.
        device: ``cpu`` or ``cuda``; None: GPUs where the cluster has any.
        workers: How many actors, 1 or more; None: as many as there is room for.
        per_gpu: How many actors share a GPU, 1 or more.
        shared: Whether every node sees the results folder; None: each node looks.

    Raises:
        InputError: No cluster answers, or it has no room.
    """

    def __init__(
        self,
        context: WorkerContext,
        listener: Listener,
        *,
        address: str | None = None,
        device: str | None = None,
        workers: int | None = None,
        per_gpu: int = 1,
        shared: bool | None = None,
    ) -> None:
        self._listener, self._store = listener, Store(context.store)
        self._ours = not ray.is_initialized()
        if self._ours:
            # Ray's would end the run at SIGTERM, with leases held and a story of the stack.
            handlers = signal_handlers()
            _connect(address, workers)
            set_signal_handlers(handlers)
        cluster: Any = ray
        there = cluster.cluster_resources()
        gpus = int(there.get("GPU", 0))
        if device == "cuda" and not gpus:
            where = _where()
            self._leave()
            raise InputError(f"--device cuda: no node of the Ray cluster at {where} has a GPU")
        on_gpus = device != "cpu" and gpus > 0
        number = workers or (gpus * per_gpu if on_gpus else int(there.get("CPU", 0))) or 1
        self.occupancy: Occupancy | None = None
        self.devices: tuple[str, ...] = ("cuda:0" if on_gpus else "cpu",) * number
        # Jobs on a GPU wait for it, and nodes may have fewer cores than slots.
        self._needs = {"num_gpus": 1 / per_gpu, "num_cpus": 0} if on_gpus else {"num_cpus": 1}
        self._probe = context.store / f".draft{durable.mark()}"
        self._probe.write_text("probe\n", encoding="utf-8")
        self._made = (replace(context, device=self.devices[0]), self._probe, shared)
        self._changed = threading.Condition()
        self._at_work: dict[int, _Actor] = {}
        self._notes: list[str] = []
        self._fault: InputError | None = None
        self._over = False
        self._actors = [self._actor(each) for each in range(number)]
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        try:
            self._first()
        except BaseException:
            self.stop()
            raise

    def submit(self, slot: int, job: Job | Question) -> Future[dict[str, Any]]:
        """Start a job in the actor of a slot, or in another one where that has not started.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            The future of the job's receipt.
        """
        future: Future[dict[str, Any]] = Future()

        def work() -> None:
            try:
                future.set_result(self._do(slot, job, future))
            except Exception as error:  # noqa: BLE001 - a job's failure is its future's
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def warm(self, slot: int, job: Job) -> bool:
        """Return whether the actor of a slot has a process for the code that the job runs.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            True where no process must be started.
        """
        return modules_of(job) in self._actors[slot].held

    def restart(self, slot: int) -> None:
        """Do nothing: an actor that is gone was replaced at once.

        Args:
            slot: Number of the slot, from 0.
        """

    def kill(self, slot: int) -> None:
        """Kill the actor that works for a slot; its processes end with it.

        Args:
            slot: Number of the slot, from 0.
        """
        if (actor := self._at_work.get(slot)) is not None:
            ray.kill(actor.handle)

    def watch(self) -> list[str]:
        """Say what happened to the actors.

        Returns:
            A sentence for each that was lost.

        Raises:
            InputError: Actors cannot start on the cluster.
        """
        with self._changed:
            if self._fault is not None:
                raise self._fault
            said, self._notes = self._notes, []
            return said

    def stop(self) -> None:
        """Kill all actors; a cluster of this run's own ends too."""
        with self._changed:
            self._over = True
            idle = [each for each in self._actors if each.free and not each.shared]
            self._changed.notify_all()
        with suppress(RayError):
            ray.wait(
                [each.handle.clean.remote() for each in idle], num_returns=len(idle), timeout=5
            ) if idle else ()
        for each in self._actors:
            with suppress(RayError):
                ray.kill(each.handle)
        self._keeper.join(timeout=5)
        durable.remove(self._probe)
        self._leave()

    def _leave(self) -> None:
        if self._ours:
            ray.shutdown()

    def _actor(self, number: int) -> _Actor:
        made: Any = ray.remote(Slot).options(max_restarts=0, **self._needs)
        handle: Any = made.remote(*self._made)
        return _Actor(number, handle, handle.begin.remote())

    def _first(self) -> None:
        """Wait until an actor has started."""
        end = time.monotonic() + ROOM
        with self._changed:
            while not any(each.free for each in self._actors):
                if self._fault is not None:
                    raise self._fault
                if not self._changed.wait(max(end - time.monotonic(), 0.0)):
                    wanted = ", ".join(
                        f"{value:g} {name.removeprefix('num_')}" for name, value in self._needs.items()
                    )
                    cluster: Any = ray
                    raise InputError(
                        f"the Ray cluster at {_where()} started no worker in {ROOM:g} s; each needs {wanted} "
                        f"of what is free: {cluster.available_resources()}"
                    )

    def _keep(self) -> None:
        """Note which actors have started, until the end."""
        while not self._over:
            with self._changed:
                waiting = {each.began: each for each in self._actors if each.began is not None}
            if not waiting:
                time.sleep(0.1)
                continue
            try:
                begun, _ = ray.wait(list(waiting), timeout=0.2)
            except (RayError, RuntimeError, ValueError) as error:
                # Ray was shut down meanwhile, by this process or by another.
                self._give_up(error)
                return
            for each in begun:
                self._begun(waiting[each])

    def _begun(self, actor: _Actor) -> None:
        try:
            node, shared = ray.get(actor.began)
        except RayActorError as error:
            cause = str(error).strip().splitlines()
            with self._changed:
                if "died" in str(error) and "creation task" in str(error):
                    # Its own code failed, and would fail again.
                    self._fault = InputError(f"a node of the Ray cluster cannot work: {cause[-1]}")
                    self._changed.notify_all()
            self._lost(actor)
            return
        except RayError as error:
            # It can be placed nowhere, or its environment cannot be made.
            self._give_up(error)
            return
        with self._changed:
            actor.began, actor.node, actor.shared, actor.free = None, node, shared, True
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        """Say to whoever waits for an actor that none will come, unless the run ends anyway."""
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        with self._changed:
            if not self._over and self._fault is None:
                self._fault = InputError(f"the Ray cluster cannot work: {last}")
            self._changed.notify_all()

    def _lost(self, actor: _Actor) -> None:
        """Put a new actor in the place of one that is gone."""
        with self._changed:
            if self._over or self._actors[actor.number] is not actor:
                return
            with suppress(RayError):
                self._actors[actor.number] = self._actor(actor.number)
            if actor.node:
                self._notes.append(f"a worker on {actor.node} is gone; another takes its place")

    def _take(self, slot: int) -> _Actor:
        """Wait for a free actor, that of the slot if possible, and take it."""
        with self._changed:
            while True:
                if self._over or self._fault is not None:
                    raise BrokenExecutor("the run ends")
                free = [each for each in self._actors if each.free]
                if free:
                    actor = min(free, key=lambda each: each.number != slot)
                    actor.free = False
                    self._at_work[slot] = actor
                    return actor
                self._changed.wait()

    def _give_back(self, slot: int, actor: _Actor) -> None:
        with self._changed:
            self._at_work.pop(slot, None)
            actor.free = self._actors[actor.number] is actor
            self._changed.notify_all()

    def _do(self, slot: int, job: Job | Question, future: Future[dict[str, Any]]) -> dict[str, Any]:
        while True:
            actor = self._take(slot)
            try:
                # One that went while it was idle costs the job no try.
                ray.get(actor.handle.awake.remote(), timeout=ANSWER)
            except RayError:
                with suppress(RayError):
                    ray.kill(actor.handle)
                self._lost(actor)
                self._give_back(slot, actor)
                continue
            break
        # Not before: what waits for an actor has used none of its time, and nothing that could be killed.
        future.set_running_or_notify_cancel()
        try:
            if not actor.shared:
                self._send(actor, job)
            modules = modules_of(job)
            actor.held = [*(each for each in actor.held if each != modules), modules][-2:]
            return self._heard(slot, job, actor.handle.do.options(num_returns="streaming").remote(job))
        except RayTaskError:
            # Of our own code in the actor, which lives.
            raise
        except RayError:
            # The actor is gone, or what it said last went with its node.
            self._lost(actor)
            raise BrokenExecutor(f"the worker on {actor.node} went") from None
        finally:
            self._give_back(slot, actor)

    def _heard(self, slot: int, job: Job | Question, stream: Any) -> dict[str, Any]:
        """Follow what an actor says of a job until its end; return the receipt."""
        told = (ray.get(each) for each in stream)
        for what, content in told:
            if what == "said":
                self._listener(slot, content)
            elif what == "failed":
                raise _error(*content)
            elif what == "result":
                travel.receive(self._store, job.kind, job.key, _until_end(told))
            else:
                receipt: dict[str, Any] = content
                return receipt
        raise BrokenExecutor("the worker said nothing of the end of its job")

    def _send(self, actor: _Actor, job: Job | Question) -> None:
        """Bring what a job needs to a node that does not see the results folder."""
        for kind, key in ray.get(actor.handle.lacks.remote(_needed(job))):
            parts = [(name, ray.put(data)) for name, data in travel.pieces(self._store, kind, key)]
            ray.get(actor.handle.receive.remote(kind, key, parts))


class Slot:
    """An actor: a worker process on some node, which does one job at a time.

    Args:
        context: The surroundings of the jobs, as the run's machine sees them.
        probe: A file in the results folder, by which a node that sees the folder is told.
        shared: Whether the node sees the results folder; None: it looks.
    """

    def __init__(self, context: WorkerContext, probe: Path, shared: bool | None) -> None:
        # For the process below; the order of sets must not differ from process to process.
        os.environ["PYTHONHASHSEED"] = "0"
        self._shared = probe.is_file() if shared is None else shared
        root = context.store
        if not self._shared:
            root = Path(tempfile.gettempdir()) / f"crossfire{probe.name.removeprefix('.draft')}"
        self._store = Store(root)
        if not self._shared:
            self._store.open()
        self._facts: SimpleQueue[Any] = SimpleQueue()
        self._pool = Process(
            replace(context, store=root), lambda _, facts: self._facts.put(facts), (context.device,)
        )

    def begin(self) -> tuple[str, bool]:
        """Return the node's name, and whether it sees the results folder.

        Returns:
            Both.
        """
        return socket.gethostname(), self._shared

    def awake(self) -> None:
        """Answer."""

    def lacks(self, names: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the results that are not here, or not whole.

        Args:
            names: Kinds and keys.

        Returns:
            Those of them.
        """
        return [(kind, key) for kind, key in names if self._store.damage(kind, key) is not None]

    def receive(self, kind: str, key: str, parts: list[tuple[str, Any]]) -> None:
        """Take a result that another machine has.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            parts: Names of files, and references to their next pieces.

        Raises:
            DamagedError: It is not what was sent.
        """
        self._store.clear(kind, key)
        travel.receive(self._store, kind, key, ((name, ray.get(part)) for name, part in parts))

    def do(self, job: Job | Question) -> Iterator[tuple[str, Any]]:
        """Do a job.

        Args:
            job: The job; everything that it needs is here.

        Yields:
            ``("said", facts)`` while it runs. Then ``("failed", (pickled error, text))``, or
            ``("done", receipt)``, before which come ``("result", None)`` and the pieces of the result where
            the run does not see it, with ``("", b"")`` after the last.
        """
        self._facts = SimpleQueue()
        future = self._pool.submit(0, job)
        future.add_done_callback(lambda _: self._facts.put(None))
        while (facts := self._facts.get()) is not None:
            yield "said", facts
        if (error := future.exception()) is not None:
            if isinstance(error, BrokenExecutor):
                self._pool.restart(0)
            yield "failed", (pickle.dumps(error), f"{type(error).__name__}: {error}")
            return
        if not self._shared and not isinstance(job, Question):
            yield "result", None
            yield from travel.pieces(self._store, job.kind, job.key)
            yield "", b""
        yield "done", future.result()

    def clean(self) -> None:
        """Remove what lies here of a run that is over."""
        self._pool.stop()
        if not self._shared:
            shutil.rmtree(self._store.root, ignore_errors=True)


def _until_end(told: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for name, data in told:
        if not name:
            return
        yield name, data


def _error(pickled: bytes, text: str) -> Exception:
    try:
        found = pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - its class may be known on the node alone
        return RuntimeError(text)
    return found if isinstance(found, Exception) else RuntimeError(text)


def _needed(job: Job | Question) -> list[tuple[str, str]]:
    """Return the kinds and keys of the results that a job reads."""
    found: dict[tuple[str, str], None] = {}

    def add(train: Train) -> None:
        found["train", train.key] = None
        for _, part in train.parts:
            add(part)

    # A rehearsal reads no result.
    needs = () if isinstance(job, Rehearsal) else (job.train,) if isinstance(job, Recheck) else job.needs
    for each in needs:
        if isinstance(each, Train):
            add(each)
        else:
            found[each.kind, each.key] = None
    return list(found)


def _where() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _connect(address: str | None, workers: int | None) -> None:
    """Join a cluster, or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if place == "local":
        try:
            ray.init(address="local", num_cpus=workers or free_cores(), include_dashboard=False, **settings)
        except Exception as error:  # noqa: BLE001 - Ray raises even plain ones where a process does not start
            raise InputError(f"--executor ray: no cluster starts on this machine ({_first(error)})") from None
        return
    begun, named = time.monotonic(), "--ray-address" if address else "RAY_ADDRESS:"
    try:
        host, _, port = place.rpartition(":")
        if port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
            _ask(place)
        ray.init(address=place, **settings)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise InputError(
            f"{named} {place}: no Ray cluster answered there in {time.monotonic() - begun:.1f} s "
            f"({_first(error)})"
        ) from None


def _first(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _ask(place: str) -> None:
    """Raise where something else than a cluster listens: Ray would wait for minutes, and end the process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", place]
    try:
        found = subprocess.run(command, capture_output=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError("something listens there, and does not speak as Ray does") from None
    if found.returncode:
        raise ConnectionError("what listens there is no Ray cluster")

"""The scheduler: a job starts when everything it needs is done, the longest remaining path first.

A job that failed never counts as done, so that jobs which need it do not start; the others continue.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from bench.errors import OvertimeError, disk_full
from bench.results.store import Store
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.outstanding import State, make_way, trainings
from bench.runner.placement import Placement
from bench.runner.pools import Pool
from bench.runner.worker import Recheck, describe
from bench.suite.jobs import Craft, Evaluate, Job, Train, foreign
from bench.suite.planner import Plan

GRACE = 60.0
"""Seconds beyond its limit after which the process of a job is killed: time to start, and to report."""


@dataclass(frozen=True)
class Done:
    """A job that ended."""

    job: Job
    """The job."""
    receipt: Mapping[str, Any] | None
    """Its receipt; None where it failed."""
    error: BaseException | None = None
    """What it raised; None where it succeeded."""
    slot: int = 0
    """Number of the slot in which it ran, from 0."""


def run(
    state: State,
    store: Store,
    pool: Pool,
    estimates: Estimates,
    started: Callable[[Job, int], None] | None = None,
    limit: float | None = None,
) -> Iterator[Done]:
    """Do the jobs that are to do.

    A full disk ends the run, since no other job could keep its result. A job whose process died is tried a
    second time.

    Args:
        state: The state of the plan.
        store: The results folder.
        pool: The slots to run in.
        estimates: Estimates of the time of each job; they learn from each job that ends.
        started: Called with each job and the number of its slot when it starts.
        limit: Limit of each job in seconds, above 0; None for no limit.

    Yields:
        Each job as it ends, with its error if it failed.
    """
    sorter: TopologicalSorter[Job] = TopologicalSorter(state.todo)
    sorter.prepare()
    placement = Placement(
        state.todo,
        estimates,
        [device_name(device) for device in pool.devices],
        warm=pool.warm,
        network=_network,
        process=foreign,
    )
    running: dict[Future[dict[str, Any]], tuple[Job, int]] = {}
    deadlines = _Deadlines(limit)
    tried: set[Job] = set()
    full = False
    while sorter.is_active():
        for job in sorter.get_ready():
            placement.push(job)
        while not full and (chosen := placement.pop()) is not None:
            job, slot = chosen
            if started is not None:
                started(job, slot)
            # Not earlier, so that the old result stays until its successor begins.
            make_way(job, state, store)
            future = pool.submit(slot, job)
            running[future] = job, slot
            deadlines.begin(future, job)
        if not running:
            return
        for future in deadlines.wait(running, placement.wait()):
            # Its own alarm did not end it: it runs code that no signal interrupts.
            pool.kill(running[future][1])
        for future in [each for each in running if each.done()]:
            job, slot = running.pop(future)
            deadlines.end(future)
            error = future.exception()
            if error is None:
                estimates.learn(job, future.result())
            placement.free(slot)
            if isinstance(error, BrokenProcessPool):
                pool.restart(slot)
                if (late := deadlines.overdue(future, job)) is not None:
                    error = late
                elif job not in tried:
                    # Killed from outside, perhaps for memory: a second try, in a new process.
                    tried.add(job)
                    placement.push(job)
                    continue
                else:
                    error = RuntimeError("its process ended twice without a word (killed? out of memory?)")
            if error is None:
                sorter.done(job)
                yield Done(job, future.result(), slot=slot)
            else:
                full = full or disk_full(error)
                _note(store, job, error)
                yield Done(job, None, error, slot)


class _Deadlines:
    """The times at which processes of jobs with a limit are killed."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._ends: dict[Future[dict[str, Any]], float] = {}
        self._killed: set[Future[dict[str, Any]]] = set()

    def of(self, job: Job) -> float | None:
        """Return the limit of a job in seconds, None for no limit."""
        own = job.attack_run.time_limit if isinstance(job, Craft) else None
        return min((each for each in (own, self._limit) if each is not None), default=None)

    def begin(self, future: Future[dict[str, Any]], job: Job) -> None:
        """Note the start of a job."""
        if (limit := self.of(job)) is not None:
            self._ends[future] = time.monotonic() + limit + GRACE

    def end(self, future: Future[dict[str, Any]]) -> None:
        """Forget a job that ended."""
        self._ends.pop(future, None)

    def wait(
        self, running: Iterable[Future[dict[str, Any]]], longest: float | None = None
    ) -> list[Future[dict[str, Any]]]:
        """Wait until a job ends or is overdue, or so many seconds; return the futures that are overdue."""
        left = min(self._ends.values(), default=math.inf) - time.monotonic()
        left = min(left, math.inf if longest is None else longest)
        wait(running, timeout=None if math.isinf(left) else max(left, 0.0), return_when=FIRST_COMPLETED)
        late = [each for each, end in self._ends.items() if end <= time.monotonic() and not each.done()]
        for each in late:
            self._killed.add(each)
            del self._ends[each]
        return late

    def overdue(self, future: Future[dict[str, Any]], job: Job) -> OvertimeError | None:
        """Return the error of a job whose process was killed because of its limit, None for any other."""
        if future not in self._killed:
            return None
        return OvertimeError(f"it took longer than its limit of {self.of(job):g} s; its process was killed")


def _network(job: Job) -> str | None:
    """Return the key of the network that the process of a job has loaded after it; None: it has none."""
    match job:
        case Train():
            return job.key
        case Craft():
            return job.attack_run.source.train.key if job.attack_run.source else None
        case Evaluate():
            return job.victim.train.key


def ask_again(
    plan: Plan, store: Store, pool: Pool, wanted: set[str] | None = None, limit: float | None = None
) -> dict[str, int]:
    """Discard the results of stored networks that answer differently now.

    Only networks that run code of other people are asked. What such code reads or imports from elsewhere
    enters no key, so that only its answers show whether it has changed.

    Args:
        plan: The plan.
        store: The results folder.
        pool: The slots; the first one asks.
        wanted: Keys of the evaluations to look at; None for all.
        limit: Limit of each question in seconds, above 0; None for no limit.

    Returns:
        The number of discarded results for each reason.
    """
    graph = plan.graph(wanted)
    others: dict[Train, str] = {}
    for job in [each for each in graph if isinstance(each, Train)]:
        asked = job.foreign and store.damage("train", job.key) is None
        if asked and (reason := _different(job, pool, limit)) is not None:
            others[job] = reason
    found: dict[str, int] = {}
    for made in graph:
        reason = next((others[each] for each in trainings(made) if each in others), None)
        if reason is not None and store.receipt(made.kind, made.key) is not None:
            # At once, since it must not stand in a table even if it cannot be made again.
            store.discard(made.kind, made.key)
            found[reason] = found.get(reason, 0) + 1
    return found


def _different(job: Train, pool: Pool, limit: float | None) -> str | None:
    """Return how a stored network differs from the one that is built now, None where it does not."""
    future = pool.submit(0, Recheck(job))
    try:
        said = future.result(None if limit is None else limit + GRACE)["different"]
    except (TimeoutError, BrokenProcessPool) as error:
        pool.kill(0)
        pool.restart(0)
        how = "does not end" if isinstance(error, TimeoutError) else "ends its process"
        return f"defense {job.defense.name}: it cannot be asked any more: what it runs {how}"
    return None if said is None else str(said)


def _note(store: Store, job: Job, error: BaseException) -> None:
    try:
        store.fail(job.kind, job.key, describe(job), error)
    except OSError:
        # A full disk cannot hold the note either; the last lines of the run say what happened.
        traceback.clear_frames(error.__traceback__)

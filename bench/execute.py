"""When a job runs: as soon as all it needs is done, the longest way first, on the first free slot.

A failed job is never marked done, so that nothing behind it becomes ready; the rest goes on.
"""

import heapq
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from bench import data as datasets
from bench import sources
from bench.costs import Costs
from bench.data import DataSpec
from bench.errors import OvertimeError
from bench.plan import Craft, Evaluate, Job, Plan, Train, modules_of
from bench.pools import Pool, Process
from bench.store import ABSENT, ARTEFACTS, Store
from bench.work import describe

GRACE = 60.0
"""Seconds beyond its limit after which a shard's process is killed: time to start, and to be told."""


@dataclass(frozen=True)
class Done:
    """A job that ended."""

    job: Job
    receipt: Mapping[str, Any] | None
    error: BaseException | None = None
    slot: int = 0


@dataclass
class State:
    """What a store holds of a plan."""

    done: set[Evaluate] = field(default_factory=set)
    todo: dict[Job, tuple[Job, ...]] = field(default_factory=dict)
    """Jobs to do, with those of their needs that are to do as well."""
    kept: set[Job] = field(default_factory=set)
    """Jobs that are done, and that jobs to do need."""
    redo: dict[Job, str] = field(default_factory=dict)
    """Jobs that were done and must be done again, and why."""
    fault: Callable[[Job], str | None] = lambda _: ABSENT
    """Tells why the stored result of a job does not count, as of now; None where it does."""


def examine(
    plan: Plan, store: Store, wanted: set[str] | None = None, *, trust: bool = False, verify: bool = True
) -> State:
    """Return what is done and what is to do, from the evaluations down.

    A stored result counts if its files are what its receipt says (`verify`) and the code that made it
    is what it was (unless `trust`).
    """
    state = State(fault=partial(_fault, store, trust=trust, verify=verify))
    verdicts: dict[Job, str | None] = {}

    def usable(job: Job) -> bool:
        if job not in verdicts:
            verdicts[job] = reason = state.fault(job)
            if reason is not None and reason != ABSENT:
                state.redo[job] = reason
        return verdicts[job] is None

    def need(job: Job) -> bool:
        """Return whether a job is to do, having noted what it needs."""
        if usable(job):
            state.kept.add(job)
            return False
        if job not in state.todo:
            state.todo[job] = ()
            state.todo[job] = tuple(each for each in job.needs if need(each))
        return True

    for cell in plan.cells:
        if (wanted is None or cell.job.key in wanted) and not need(cell.job):
            state.done.add(cell.job)
    return state


def make_way(job: Job, state: State, store: Store) -> None:
    """Take away what a job left that is done again, unless another run has made it anew meanwhile."""
    if job in state.redo and state.fault(job) is not None:
        store.discard(job.kind, job.key)


def fetch(state: State, folder: Path, data_root: Path | None) -> None:
    """See that the data of the jobs to do is there, or download it, before any of them starts."""
    needed: dict[str, DataSpec] = {}
    for job in state.todo:
        match job:
            case Train():
                needed[job.data.key] = job.data.spec
            case Craft():
                needed[job.attempt.data.key] = job.attempt.data.spec
            case Evaluate():
                data = job.crafts[0].attempt.data
                needed[data.key] = data.spec
    for spec in needed.values():
        datasets.prepare(spec, data_root, folder)


def _fault(store: Store, job: Job, *, trust: bool, verify: bool) -> str | None:
    """Return why a stored result does not count, None where it does."""
    reason = store.damage(job.kind, job.key, read=verify)
    receipt = store.receipt(job.kind, job.key)
    if reason is None and not receipt:
        # Taken away by another run, just now.
        reason = ABSENT
    if reason is None and not trust:
        reason = _changed(receipt or {}, job)
    return reason or _other_inputs(receipt or {}, store)


def _changed(receipt: Mapping[str, Any], job: Job) -> str | None:
    """Return which module is not what it was when a result was made."""
    made = receipt.get("sources")
    if not isinstance(made, dict):
        return "its receipt names no sources"
    now = sources.digests(modules_of(job))
    for name in sorted({*made, *now}):
        if made.get(name) != now.get(name):
            return f"{name} changed"
    return None


def _other_inputs(receipt: Mapping[str, Any], store: Store) -> str | None:
    """Return which result that a stored one was made from is there with another content by now.

    Weights that were made again on another kind of machine are another network: numbers of both must not
    stand side by side. Results that are absent (only evaluations are committed) say nothing.
    """
    for key, digest in receipt.get("inputs", {}).items():
        for kind, name in ARTEFACTS.items():
            there = store.receipt(kind, key)
            if there and there.get("files", {}).get(name) != digest:
                return f"what it was made from ({kind}) was made again, and is different"
    return None


def run(state: State, store: Store, pool: Pool, costs: Costs, started: Any = None) -> Iterator[Done]:
    """Do what is to do; yield each job as it ends, with its error if it failed."""
    sorter: TopologicalSorter[Job] = TopologicalSorter(state.todo)
    sorter.prepare()
    ways = costs.paths(state.todo)
    ready: list[tuple[float, str, Job]] = []
    running: dict[Future[dict[str, Any]], tuple[Job, int]] = {}
    deadlines: dict[Future[dict[str, Any]], float] = {}
    overdue: set[Future[dict[str, Any]]] = set()
    free = list(range(len(pool.devices)))
    tried: set[Job] = set()

    def push(job: Job) -> None:
        heapq.heappush(ready, (-ways[job], job.key, job))

    while sorter.is_active():
        for job in sorter.get_ready():
            push(job)
        while ready and free:
            job, slot = heapq.heappop(ready)[2], free.pop(0)
            if started is not None:
                started(job, slot)
            # Not before: whatever happens until then, the old result is there.
            make_way(job, state, store)
            future = pool.submit(slot, job)
            running[future] = job, slot
            if (limit := _limit(job)) is not None:
                deadlines[future] = time.monotonic() + limit + GRACE
        if not running:
            return
        left = min(deadlines.values(), default=math.inf) - time.monotonic()
        timeout = None if math.isinf(left) else max(left, 0.0)
        ended = wait(running, timeout=timeout, return_when=FIRST_COMPLETED).done
        late = [each for each, end in deadlines.items() if end <= time.monotonic() and not each.done()]
        for future in late:
            # Its own alarm did not wake it: it hangs in code that no signal interrupts.
            overdue.add(future)
            del deadlines[future]
            pool.kill(running[future][1])
        for future in ended:
            job, slot = running.pop(future)
            deadlines.pop(future, None)
            free.append(slot)
            error = future.exception()
            if isinstance(error, BrokenProcessPool) and isinstance(pool, Process):
                pool.restart(slot)
                if future in overdue:
                    error = OvertimeError(
                        f"its shard took longer than its limit of {_limit(job):g} s; its process was killed"
                    )
                elif job not in tried:
                    # Killed from outside, perhaps for memory: once more, on a new process.
                    tried.add(job)
                    push(job)
                    continue
                else:
                    error = RuntimeError("its process was killed twice (out of memory?)")
            if error is None:
                costs.learn(job, future.result())
                sorter.done(job)
                yield Done(job, future.result(), slot=slot)
            else:
                _note(store, job, error)
                yield Done(job, None, error, slot)


def _limit(job: Job) -> float | None:
    return job.attempt.time_limit if isinstance(job, Craft) else None


def _note(store: Store, job: Job, error: BaseException) -> None:
    try:
        store.fail(job.kind, job.key, describe(job), error)
    except OSError:
        # A full disk cannot hold the note either; the run's last lines say what happened.
        traceback.clear_frames(error.__traceback__)

"""The scheduler: a job starts when everything it needs is done, in the order of `bench.runner.placement`.

A job that failed never counts as done, so that jobs which need it do not start; the others continue. What
another worker at the same results folder is doing is left to it (`bench.results.leases`).
"""

import math
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from bench.errors import InputError, OvertimeError, disk_full
from bench.results.failures import TRIES, Failures
from bench.results.leases import Leases
from bench.results.store import Store
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.examine import patience
from bench.runner.executors.protocol import Pool
from bench.runner.interrupts import raise_if_asked
from bench.runner.outstanding import State, make_way, trainings
from bench.runner.placement import Placement
from bench.runner.precedence import Turn
from bench.runner.titles import defense_title, title, whole_title
from bench.runner.worker import Recheck, describe
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial, foreign
from bench.suite.planner import Plan

GRACE = 60.0
"""Seconds beyond its limit after which the process of a job is killed: time to start, and to report."""


POLL = 0.5
"""Seconds between two looks at what other workers do, and at requests to stop."""


class Stopped(KeyboardInterrupt):
    """Somebody asked every worker at the results folder to stop."""


@dataclass(frozen=True)
class Done:
    """A job that ended."""

    job: Job
    """The job."""
    receipt: Mapping[str, Any] | None
    """Its receipt; None where it failed."""
    error: BaseException | None = None
    """What it raised; None where it succeeded."""
    slot: int | None = 0
    """Number of the slot in which it ran, from 0; None where another worker did it."""


class Watcher:
    """Is told what a run does; this one does nothing about it."""

    def started(self, job: Job, slot: int) -> None:
        """Note that a job starts.

        Args:
            job: The job.
            slot: Number of its slot, from 0.
        """

    def noted(self, sentence: str) -> None:
        """Note what happened to workers and their jobs.

        Args:
            sentence: A sentence for people.
        """


@dataclass(frozen=True)
class Share:
    """What the workers at one results folder share: who does what, and what failed."""

    leases: Leases
    """Of this worker."""
    failures: Failures
    """Of the folder, as this worker sees them."""


@contextmanager
def sharing(root: Path, request: str, leases: Leases | None = None) -> Iterator[Share]:
    """Be a worker at a results folder in the block.

    Args:
        root: The results folder.
        request: Names what was asked for; workers that serve one request share it.
        leases: The leases, not yet open; None: with the usual times.

    Yields:
        What is shared. After the block no lease is held.
    """
    with leases or Leases(root) as own:
        yield Share(own, Failures(root, request, own.name))


class Scheduler:
    """Does the jobs that are to do, together with other workers at the folder.

    A disk that is full or read-only ends the run, since no other job could keep its result. A job whose
    process died is tried again, if possible elsewhere, `TRIES` times in all.

    Args:
        state: The state of the plan.
        store: The results folder.
        pool: The slots to run in.
        estimates: Estimates of the time of each job; they learn from each job that ends.
        share: What is shared with other workers.
        watcher: Is told what happens.
        limit: Limit of each job in seconds, above 0; None for no limit.
    """

    def __init__(
        self,
        state: State,
        store: Store,
        pool: Pool,
        estimates: Estimates,
        share: Share,
        watcher: Watcher | None = None,
        limit: float | None = None,
    ) -> None:
        self._occupancy = pool.occupancy
        self._state, self._store, self._pool, self._estimates = state, store, pool, estimates
        self._leases, self._failures = share.leases, share.failures
        self._watcher = watcher or Watcher()
        self._sorter: TopologicalSorter[Job] = TopologicalSorter(state.todo)
        self._placement: Placement[Job] = Placement(
            state.todo,
            estimates,
            [device_name(device) for device in pool.devices],
            warm=pool.warm,
            network=_network,
            process=foreign,
            turn=_turn,
        )
        if self._occupancy is not None:
            self._placement.close(self._occupancy.closed())
        self._running: dict[Future[dict[str, Any]], tuple[Job, int]] = {}
        self._elsewhere: set[Job] = set()
        self._deadlines = _Deadlines(limit)
        self._full = False
        self._look_again = -math.inf

    def run(self) -> Iterator[Done]:
        """Do the jobs.

        Yields:
            Each job as it ends, here or elsewhere, with its error if it failed.

        Raises:
            Stopped: Somebody asked for it.
            KeyboardInterrupt: A signal asked for it, and whatever ran then has swallowed that.
            InputError: Nothing is left that could do a job.
        """
        self._sorter.prepare()
        while self._sorter.is_active():
            raise_if_asked()
            for job in self._sorter.get_ready():
                self._offer(job)
            ended = False
            for done in self._begin():
                ended = True
                yield done
            if ended:
                # Others may be ready by it.
                continue
            if not self._running and not self._elsewhere:
                return
            yield from self._wait()
            yield from self._look()

    def _offer(self, job: Job) -> None:
        """Let a job that may begin go to a slot, or to workers elsewhere where there is no slot here."""
        if self._pool.devices:
            self._placement.push(job)
        else:
            self._elsewhere.add(job)

    def _begin(self) -> Iterator[Done]:
        """Start jobs in the free slots; yield those that others have ended meanwhile."""
        while not self._full and (chosen := self._placement.pop()) is not None:
            job, slot = chosen
            try:
                mine = self._leases.take(job.key)
            except OSError as error:
                self._placement.free(slot)
                yield self._failed(job, error)
                continue
            if not mine:
                self._elsewhere.add(job)
                self._placement.free(slot)
            elif (done := self._ended(job)) is not None:
                self._leases.free(job.key)
                self._placement.free(slot)
                yield done
            else:
                self._watcher.started(job, slot)
                # Not earlier, so that the old result stays until its successor begins.
                make_way(job, self._state, self._store)
                future = self._pool.submit(slot, job)
                self._running[future] = job, slot
                self._deadlines.begin(future, job)

    def _ended(self, job: Job) -> Done | None:
        """Return how a job ended, if this or another worker has ended it since it was found to be to do."""
        owner = self._leases.inherited.pop(job.key, None)
        # Whoever died may have ended the job before.
        if self._state.fault(job) is None:
            receipt = self._store.receipt(job.kind, job.key)
            if receipt:
                self._estimates.learn(job, receipt)
            self._sorter.done(job)
            return Done(job, receipt, slot=None)
        if (record := self._failures.final(job.key)) is not None:
            return Done(job, None, _told(record), slot=None)
        return None if owner is None else self._orphaned(job, owner)

    def _orphaned(self, job: Job, owner: str) -> Done | None:
        """Note that the worker that did a job died; return the job's failure if that was often enough."""
        why = f"{owner} died while it did this job"
        self._watcher.noted(f"{why}: {whole_title(job)} is done again")
        try:
            count = self._failures.died(job.key, _described(job), why, owner)
        except OSError as full:
            return self._failed(job, full)
        if count < TRIES:
            return None
        error = RuntimeError(f"{TRIES} workers died while they did this job; the last was {owner}")
        return self._failed(job, error)

    def _wait(self) -> Iterator[Done]:
        """Wait a while; yield the jobs that ended."""
        asked = self._placement.wait()
        for future in self._deadlines.wait(self._running, POLL if asked is None else min(asked, POLL)):
            # Its own alarm did not end it: it runs code that no signal interrupts.
            self._pool.kill(self._running[future][1])
        for future in [each for each in self._running if each.done()]:
            job, slot = self._running.pop(future)
            self._deadlines.end(future)
            error = future.exception()
            if error is None:
                self._estimates.learn(job, future.result())
            self._placement.free(slot)
            self._learn_occupancy(slot, None if error else future.result(), error)
            if isinstance(error, BrokenExecutor):
                self._pool.restart(slot)
                error = self._died(job, self._deadlines.overdue(future, job))
                if error is None:
                    self._leases.free(job.key)
                    self._placement.push(job)
                    continue
            if error is None:
                self._sorter.done(job)
                done = Done(job, future.result(), slot=slot)
            else:
                done = self._failed(job, error, slot)
            self._leases.free(job.key)
            yield done

    def _learn_occupancy(
        self, slot: int, receipt: Mapping[str, Any] | None, error: BaseException | None
    ) -> None:
        if self._occupancy is not None and self._occupancy.ended(slot, receipt, error):
            self._placement.close(self._occupancy.closed())

    def _died(self, job: Job, late: OvertimeError | None) -> BaseException | None:
        """Note that the process of a job died; return the error if it has died often enough."""
        error = late or RuntimeError("its process ended without a word (killed? out of memory?)")
        try:
            count = self._failures.died(job.key, _described(job), str(error))
        except OSError as full:
            return full
        if count < TRIES:
            self._watcher.noted(f"{whole_title(job)}: {error}; it is tried again")
            return None
        return late or RuntimeError(
            f"its process ended {count} times without a word (killed? out of memory?)"
        )

    def _failed(self, job: Job, error: BaseException, slot: int | None = None) -> Done:
        self._full = self._full or disk_full(error)
        try:
            self._failures.fail(job.key, _described(job), error)
        except OSError:
            # A disk that is full or read-only holds neither the note nor another result; the last lines of
            # the run say what happened.
            self._full = True
            traceback.clear_frames(error.__traceback__)
        return Done(job, None, error, slot)

    def _look(self) -> Iterator[Done]:
        """See what became of jobs that others took, and whether somebody asked to stop."""
        begun = time.monotonic()
        if begun < self._look_again:
            return
        if self._leases.stopping:
            raise Stopped
        for sentence in self._pool.watch():
            self._watcher.noted(sentence)
        for job in list(self._elsewhere):
            if (done := self._ended(job)) is not None:
                self._elsewhere.remove(job)
                yield done
            elif self._pool.devices and not self._leases.held(job.key):
                self._elsewhere.remove(job)
                self._placement.push(job)
        # Thousands of jobs elsewhere, on NFS, shall not keep the disk busy all the time.
        took = time.monotonic() - begun
        self._look_again = time.monotonic() + max(POLL, 4 * took)


def _described(job: Job) -> dict[str, Any]:
    """Return what a history tells of a job: what a key says, and the words of this suite."""
    return {"title": title(job), **describe(job)}


def _told(record: Mapping[str, Any]) -> BaseException:
    """Return the error of a job that failed for another worker, as far as it can be told."""
    message = str(record.get("message", record.get("error")))
    if record.get("type") == InputError.__name__:
        return InputError(message)
    return RuntimeError(f"{record.get('error')} (another worker's; its traceback is kept)")


class _Deadlines:
    """The times at which processes of jobs with a limit are killed."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._waiting: dict[Future[dict[str, Any]], float] = {}
        self._ends: dict[Future[dict[str, Any]], float] = {}
        self._killed: set[Future[dict[str, Any]]] = set()

    def of(self, job: Job) -> float | None:
        """Return the limit of a job in seconds, None for no limit."""
        own = None
        match job:
            case Craft():
                own = job.attack_run.time_limit
            case Trial() | Examination():
                own = patience(job)
        return min((each for each in (own, self._limit) if each is not None), default=None)

    def begin(self, future: Future[dict[str, Any]], job: Job) -> None:
        """Note that a job was submitted; its time begins when a process has it."""
        if (limit := self.of(job)) is not None:
            self._waiting[future] = limit

    def end(self, future: Future[dict[str, Any]]) -> None:
        """Forget a job that ended."""
        self._waiting.pop(future, None)
        self._ends.pop(future, None)

    def wait(self, running: Iterable[Future[dict[str, Any]]], most: float) -> list[Future[dict[str, Any]]]:
        """Wait until a job ends or is overdue; return the futures of those that are overdue.

        Args:
            running: The futures of the jobs that run.
            most: The most seconds to wait.
        """
        for each in [each for each in self._waiting if each.running()]:
            self._ends[each] = time.monotonic() + self._waiting.pop(each) + GRACE
        left = min(self._ends.values(), default=math.inf) - time.monotonic()
        if every := list(running):
            wait(every, timeout=max(min(left, most), 0.0), return_when=FIRST_COMPLETED)
        else:
            time.sleep(most)
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
        case Evaluate() | Examination():
            return job.victim.train.key
        case Trial():
            return None


def _turn(job: Job) -> Turn:
    """Return what a job is to somebody who waits for numbers."""
    match job:
        case Train():
            return Turn.TRAINING
        case Evaluate():
            idle = all(each.attack_run.attack.entry.idle for each in job.crafts)
            return Turn.CLEAN if idle else Turn.VERDICT
        case _:
            return Turn.REST


def ask_again(
    plan: Plan, store: Store, pool: Pool, wanted: set[str] | None = None, limit: float | None = None
) -> dict[str, int]:
    """Discard the results of stored networks that answer differently now.

    Only networks that run code of other people are asked. What such code reads or imports from elsewhere
    enters no key, so that only its answers show whether it has changed.

    Args:
        plan: The plan.
        store: The results folder.
        pool: The slots; the first one asks. Where there is none, each worker elsewhere asks for itself.
        wanted: Keys of the evaluations to look at; None for all.
        limit: Limit of each question in seconds, above 0; None for no limit.

    Returns:
        The number of discarded results for each reason.
    """
    if not pool.devices:
        return {}
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
    how = ""
    for _ in range(TRIES):
        future = pool.submit(0, Recheck(job))
        try:
            said = future.result(None if limit is None else limit + GRACE)["different"]
        except TimeoutError:
            pool.kill(0)
            pool.restart(0)
            how = "does not end"
            break
        except BrokenExecutor:
            # Once, somebody else may have killed it: no reason to discard what was finished.
            pool.restart(0)
            how = "ends its process"
        else:
            return None if said is None else str(said)
    return f"{defense_title(job)}: it cannot be asked any more: what it runs {how}"

"""Which ready job a free slot takes: the one that comes first, where it is finished earliest.

The order is that of the longest remaining path, which first numbers go before where that costs little
(`bench.runner.precedence`). Nothing here waits, reads or starts anything. A run asks with its clock; a plan
and the tests turn one of their own (`simulate`).

Source: the longest path and the choice of the device are those of HEFT (Topcuoglu, Hariri, Wu 2002,
"Performance-effective and low-complexity task scheduling for heterogeneous computing", section 4), decided
when a slot becomes free and not beforehand, since times are estimates and the jobs of another driver come and
go.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, NamedTuple, Protocol, TypeVar

from bench.runner.precedence import Left, Turn, precedence

SWITCH = 10.0
"""Difference in precedence, in seconds of work, below which a slot prefers a job for which it has a process.
"""

DEPTH = 256
"""How many ready jobs a free slot looks at. One that is slower than the others together by more than this
factor does nothing while they are busy, and loses less than a 256th of the throughput.
"""

AGAIN = 1.5
"""By how much the number of measured jobs grows before priorities are computed again, so that all that is
computed grows with n log n.
"""


class Named(Hashable, Protocol):
    """What is placed: a job, or what stands for one."""

    @property
    def key(self) -> str:
        """A name; decides between equal jobs, so that the order is one in every process."""
        ...


T = TypeVar("T", bound=Hashable)
J = TypeVar("J", bound=Named)
C = TypeVar("C", bound=Named, contravariant=True)


class Costs(Protocol[C]):
    """Estimates of the time of jobs."""

    @property
    def learned(self) -> int:
        """How many measurements they are made from."""
        ...

    def seconds(self, job: C, device: str | None = None) -> float:
        """Return the seconds that a job takes.

        Args:
            job: The job.
            device: The name of the device; None: the device about which most is known.
        """
        ...


def ordered(graph: Mapping[T, Iterable[T]]) -> dict[T, tuple[T, ...]]:
    """Return a graph whose jobs come after all that they need.

    Args:
        graph: Every job with those that it needs; needs that are no job of the graph are left out.

    Returns:
        The same jobs, in time and memory that grow with their number and that of the needs.

    Raises:
        graphlib.CycleError: A job needs itself.
    """
    sorter = TopologicalSorter(graph)
    return {
        job: tuple(need for need in graph[job] if need in graph)
        for job in sorter.static_order()
        if job in graph
    }


def paths(graph: Mapping[T, Sequence[T]], seconds: Callable[[T], float]) -> dict[T, float]:
    """Return the longest way from each job to the end, itself included.

    Args:
        graph: Every job with those that it needs, which come before it (`ordered`).
        seconds: The time of a job, 0 or more.

    Returns:
        Seconds for each job of the graph.
    """
    found = dict.fromkeys(graph, 0.0)
    for job in reversed(found):
        found[job] += seconds(job)
        for need in graph[job]:
            found[need] = max(found[need], found[job])
    return found


class _Busy(NamedTuple):
    """A job at work."""

    begun: float
    expected: float

    def end(self, now: float) -> float:
        """Return when it may end, later than `now`: what exceeds its estimate takes twice as long again.

        A slot that waits for this one to end would wait for ever if the end were always about to come.
        """
        took = max(self.expected, 1e-3)
        if now - self.begun >= took:
            took *= 2.0 ** (math.floor(math.log2((now - self.begun) / took)) + 1)
        end = self.begun + took
        return end if end > now else math.nextafter(now, math.inf)


class _Heap:
    """Ready jobs in their order; those that were taken are passed over.

    Args:
        tickets: The ticket of each job that is ready; one with another ticket was taken since.
    """

    def __init__(self, tickets: dict[int, int]) -> None:
        self._tickets = tickets
        self.entries: list[tuple[float, str, int, int]] = []

    def top(self) -> tuple[float, str, int, int] | None:
        """Return the first job without removing it; None where there is none."""
        while self.entries and self._tickets.get(self.entries[0][2]) != self.entries[0][3]:
            heappop(self.entries)
        return self.entries[0] if self.entries else None


class Placement(Generic[J]):
    """The jobs that may begin, and the slots; decides which job begins where.

    The loop of a run: `push` each job whose needs are done; `pop` until it returns None, and start each job
    in the slot that comes with it; wait for a job to end, no longer than `wait` says; `free` its slot, after
    the costs have learned from its receipt. A job that has failed may be pushed again; one that turns out to
    be done by somebody else only needs its slot freed.

    Jobs are looked at in the order of their precedence. Each is thought to go where it would end
    first, were it on a slot that is still busy; the first that would end first on a free slot begins there.
    Thus a slow slot leaves the long jobs to a fast one, and takes the first short one that the fast ones
    would come to later. Where all are free the first job begins, so that a graph without cycles is always
    done; and a slot that is thought to end soon, but does not, is waited for only until it has taken about as
    long as the job would on the free slot (`_Busy.end`).

    Among jobs whose precedence is about equal (`SWITCH`), a slot prefers one on the network that it had
    last, then one for which it has a process. It never waits for such a job: shards of one condition go to
    every slot that is free.

    Args:
        graph: Every job to do with those that it needs.
        costs: Estimates of the time of each job; they may learn meanwhile.
        devices: The name of the device of each slot, as `costs` know it.
        warm: Returns whether a slot, by its number, can begin a job without a new process.
        network: Returns what the process of a job has loaded after it; None: nothing worth keeping.
        process: Returns the kind of process that a job needs; `warm` depends on it alone.
        turn: Returns what a job is to somebody who waits for numbers.
        clock: Returns the time in seconds, never less than before.
    """

    def __init__(  # noqa: PLR0913 - all that decides where a job begins
        self,
        graph: Mapping[J, Iterable[J]],
        costs: Costs[J],
        devices: Sequence[str],
        *,
        warm: Callable[[int, J], bool] = lambda slot, job: True,
        network: Callable[[J], Hashable] = lambda job: None,
        process: Callable[[J], Hashable] = lambda job: None,
        turn: Callable[[J], Turn] = lambda job: Turn.REST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs, self._warm, self._clock = costs, warm, clock
        self._network, self._process = network, process
        within = ordered(graph)
        self._jobs = tuple(within)
        self._numbers = {job: number for number, job in enumerate(self._jobs)}
        self._graph = {
            number: tuple(self._numbers[need] for need in needs)
            for number, needs in enumerate(within.values())
        }
        self._turns = tuple(map(turn, self._jobs))
        self._about = tuple(map(network, self._jobs))
        self._begun = clock()
        self._over: set[int] = set()
        self._at: dict[int, int] = {}
        self._kinds = tuple(dict.fromkeys(devices))
        self._kind_of = tuple(self._kinds.index(name) for name in devices)
        self._free: list[list[int]] = [[] for _ in self._kinds]
        for slot, kind in enumerate(self._kind_of):
            self._free[kind].append(slot)
        self._closed: frozenset[int] = frozenset()
        self._busy: dict[int, _Busy] = {}
        self._loaded: dict[int, Hashable] = {}
        self._tickets: dict[int, int] = {}
        self._issued = 0
        self._declined = False
        self._rank()

    def push(self, job: J) -> None:
        """Add a job that may begin.

        Args:
            job: A job of the graph, none that is ready already.
        """
        number = self._numbers[job]
        # It failed, or did not begin after all.
        self._over.discard(number)
        self._issued += 1
        self._tickets[number] = self._issued
        self._enter(number)

    def pop(self) -> tuple[J, int] | None:
        """Remove and return a job that begins now, and the number of its slot, which is busy from now on.

        Returns:
            None where no job is ready, no slot is free, or each job would end earlier on a slot that is busy.
        """
        self._declined = False
        if not self._tickets or not any(self._free):
            return None
        now = self._clock()
        ends = self._ends(now)
        seen: list[tuple[float, str, int, int]] = []
        chosen: tuple[int, int] | None = None
        while chosen is None and len(seen) < DEPTH and (entry := self._all.top()) is not None:
            seen.append(heappop(self._all.entries))
            kind = self._best(entry[2], ends)
            if ends[kind][0] <= now:
                chosen = self._preferred(entry[2], kind, ends)
            else:
                heapreplace(ends[kind], ends[kind][0] + self._seconds(entry[2], kind))
        for entry in seen:
            heappush(self._all.entries, entry)
        if chosen is None:
            self._declined = True
            return None
        number, slot = chosen
        del self._tickets[number]
        job, kind = self._jobs[number], self._kind_of[slot]
        self._free[kind].remove(slot)
        self._busy[slot] = _Busy(now, self._seconds(number, kind))
        self._at[slot] = number
        self._loaded[slot] = self._network(job)
        return job, slot

    def occupy(self, slot: int, seconds: float) -> None:
        """Note that a slot works at what was not placed here.

        Args:
            slot: Number of a free slot.
            seconds: After how many seconds it may be free, 0 or more.
        """
        self._free[self._kind_of[slot]].remove(slot)
        self._busy[slot] = _Busy(self._clock(), seconds)

    def wait(self) -> float | None:
        """Return after how many seconds to ask `pop` again, even if no job has ended by then.

        Returns:
            None where only the end of a job can change the answer.
        """
        if not self._declined:
            return None
        now = self._clock()
        return min((busy.end(now) for busy in self._busy.values()), default=now) - now

    def free(self, slot: int) -> None:
        """Note that the job in a slot ended, or did not begin after all.

        Args:
            slot: Number of the slot.
        """
        del self._busy[slot]
        if (number := self._at.pop(slot, None)) is not None:
            self._over.add(number)
        if slot not in self._closed:
            self._free[self._kind_of[slot]].append(slot)
        if self._costs.learned >= AGAIN * self._ranked + 1:
            self._rank()

    def close(self, slots: Iterable[int]) -> None:
        """Say which slots take no job from now on; every other one is open, and what is at work goes on.

        Args:
            slots: Numbers of slots; of each kind of device one at least is left out.
        """
        self._closed = frozenset(slots)
        for kind, free in enumerate(self._free):
            free[:] = [
                slot
                for slot, its in enumerate(self._kind_of)
                if its == kind and slot not in self._busy and slot not in self._closed
            ]

    def _rank(self) -> None:
        """Compute all priorities anew, by what the costs know by now."""
        self._ranked = self._costs.learned
        took = [self._costs.seconds(job) for job in self._jobs]
        ways = paths(self._graph, took.__getitem__)
        left = Left(self._graph, took, ways, frozenset(self._over), self._turns, self._about)
        slots = len(self._kind_of) - len(self._closed) if len(self._kinds) == 1 else 0
        self._values = precedence(left, self._clock() - self._begun, slots)
        self._took: list[dict[int, float]] = [{} for _ in self._kinds]
        self._all = _Heap(self._tickets)
        self._by_network: dict[Hashable, _Heap] = defaultdict(lambda: _Heap(self._tickets))
        self._by_process: dict[Hashable, _Heap] = defaultdict(lambda: _Heap(self._tickets))
        for number in self._tickets:
            self._enter(number)

    def _enter(self, number: int) -> None:
        job = self._jobs[number]
        # What was over when the order was found, and is tried again, comes first.
        entry = self._values.get(number, -math.inf), job.key, number, self._tickets[number]
        heappush(self._all.entries, entry)
        heappush(self._by_process[self._process(job)].entries, entry)
        if (network := self._network(job)) is not None:
            heappush(self._by_network[network].entries, entry)

    def _seconds(self, number: int, kind: int) -> float:
        took = self._took[kind]
        if number not in took:
            took[number] = self._costs.seconds(self._jobs[number], self._kinds[kind])
        return took[number]

    def _ends(self, now: float) -> list[list[float]]:
        """Return when slots are free, for each kind of device; `now` for those that are."""
        ends = [[now] * len(free) for free in self._free]
        for slot, busy in self._busy.items():
            if slot not in self._closed:
                ends[self._kind_of[slot]].append(busy.end(now))
        for each in ends:
            heapify(each)
        return ends

    def _best(self, number: int, ends: list[list[float]]) -> int:
        """Return the kind of device on which a job would end first; of several, one that is free earlier."""
        return min(
            range(len(ends)), key=lambda kind: (ends[kind][0] + self._seconds(number, kind), ends[kind][0])
        )

    def _preferred(self, number: int, kind: int, ends: list[list[float]]) -> tuple[int, int]:
        """Return the job that begins in place of the first one, and its slot, among those about equal."""
        most = self._values.get(number, -math.inf) + SWITCH
        slots = self._free[kind]

        def near(heaps: Iterable[tuple[_Heap, int]]) -> Iterator[tuple[float, str, int, int]]:
            for heap, slot in heaps:
                top = heap.top()
                if (
                    top is not None
                    and top[0] <= most
                    and self._warm(slot, self._jobs[top[2]])
                    and (top[2] == number or self._best(top[2], ends) == kind)
                ):
                    yield top[0], top[1], top[2], slot

        same = near(
            (self._by_network[loaded], slot)
            for slot in slots
            if (loaded := self._loaded.get(slot)) in self._by_network
        )
        begun = near((heap, slot) for heap in self._by_process.values() for slot in slots)
        found = min(same, default=None) or min(begun, default=None)
        return (number, slots[0]) if found is None else (found[2], found[3])


class Step(NamedTuple, Generic[J]):
    """A job of a simulation, which ended."""

    job: J
    """The job."""
    slot: int
    """The number of its slot."""
    begun: float
    """When it began, in seconds."""
    ended: float
    """When it ended, in seconds."""


def simulate(
    graph: Mapping[J, Iterable[J]],
    costs: Costs[J],
    devices: Sequence[str],
    took: Callable[[J, str], float] | None = None,
    running: Mapping[int, tuple[J, float]] | None = None,
    turn: Callable[[J], Turn] = lambda job: Turn.REST,
) -> Iterator[Step[J]]:
    """Place the jobs of a graph on slots by a clock that jumps from one event to the next.

    Args:
        graph: Every job with those that it needs.
        costs: What the placement believes.
        devices: The name of the device of each slot, at least one.
        took: Returns the seconds that a job in truth takes on a device; None: what the costs say.
        running: Jobs of the graph that are at work already, by the number of their slot, each with the
            seconds since it began.
        turn: What each job is to somebody who waits for numbers.

    Yields:
        Each job as it ends. The costs may learn before the next one is asked for.

    Raises:
        graphlib.CycleError: A job needs itself.
    """
    now = 0.0
    truth = costs.seconds if took is None else took
    placement = Placement(graph, costs, devices, turn=turn, clock=lambda: now)
    sorter: TopologicalSorter[J] = TopologicalSorter(ordered(graph))
    sorter.prepare()
    events: list[tuple[float, int, float, J]] = []
    for slot, (job, spent) in (running or {}).items():
        end = _Busy(-spent, truth(job, devices[slot])).end(now)
        placement.occupy(slot, end)
        heappush(events, (end, slot, -spent, job))
    begun = {job for _, _, _, job in events}
    while sorter.is_active():
        for job in sorter.get_ready():
            if job not in begun:
                placement.push(job)
        while (chosen := placement.pop()) is not None:
            job, slot = chosen
            heappush(events, (now + truth(job, devices[slot]), slot, now, job))
        wait = placement.wait()
        if wait is not None and now + wait < events[0][0]:
            now += wait
            continue
        now, slot, start, job = heappop(events)
        yield Step(job, slot, start, now)
        placement.free(slot)
        sorter.done(job)


def length(
    graph: Mapping[J, Iterable[J]],
    costs: Costs[J],
    devices: Sequence[str],
    running: Mapping[int, tuple[J, float]] | None = None,
) -> float:
    """Return in how many seconds all jobs of a graph are expected to be done.

    Args:
        graph: Every job that is not done with those that it needs.
        costs: Estimates of the time of each job.
        devices: The name of the device of each slot, at least one.
        running: As for `simulate`.

    Returns:
        Seconds, 0 where there is nothing to do.
    """
    return max((step.ended for step in simulate(graph, costs, devices, running=running)), default=0.0)

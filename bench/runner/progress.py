"""What a run shows while it works: bars and a running table on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench.console import duration
from bench.errors import persons
from bench.escaping import shown
from bench.report.firsthand import NumbersOf
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.outstanding import State
from bench.runner.placement import length
from bench.runner.scheduler import Done, Watcher
from bench.runner.titles import title
from bench.suite.jobs import Craft, Evaluate, Job, Train

HEARTBEAT = 60.0
"""Seconds without a line after which one says what is at work."""

PATIENCE = 50
"""How many times as long as it took to work out the time left it is believed; at least a second."""

QUIET = 15
"""Seconds without a line after which a shard of an attack is worth one."""


LATE = 2.0
"""How many times as long as expected a job takes before that is said."""


@dataclass
class _AtWork:
    """What a slot does."""

    job: Job
    begun: float
    expected: float | None
    """Seconds that it was to take; None where nothing like it was seen."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How far it said that it is."""
    late: bool = False
    """Whether it was said that it takes longer than expected."""

    @property
    def took(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.begun

    @property
    def overdue(self) -> bool:
        """Whether it takes much longer than expected, and long enough for anybody to wonder."""
        return self.expected is not None and self.took > max(LATE * self.expected, QUIET)

    @property
    def far(self) -> str:
        """How far it is, in words; nothing where it did not say so."""
        done, of = self.facts.get("done", 0), self.facts.get("of", 0)
        if not of:
            return ""
        if self.facts.get("unit") == "passes":
            return f"{min(done, of):.0f} of at most {of} passes"
        return f"epoch {done}/{of}, loss {self.facts.get('loss', float('nan')):.3f}"

    @property
    def words(self) -> str:
        """How far it is, and whether it is late."""
        late = f"longer than expected (about {duration(self.expected or 0)})" if self.overdue else ""
        return ", ".join(each for each in (self.far, late) if each)


class Display(Watcher):
    """A live picture of a run; a context manager.

    Args:
        console: Where to show it; None: nowhere.
        state: What is to do.
        estimates: The time of each job, to say how much is left.
        devices: The device of each slot.
        numbers: Gives the numbers of conditions, by the keys of their evaluations.
        closed: Returns the slots that take no job at the moment.
    """

    def __init__(
        self,
        console: Console | None,
        state: State,
        estimates: Estimates,
        devices: tuple[str, ...],
        numbers: NumbersOf,
        closed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._closed = closed
        if console is None:
            console = Console(quiet=True)
        self._console, self._state, self._estimates, self._devices = console, state, estimates, devices
        self._numbers = numbers
        self._lock = threading.Lock()
        self._names_of = [device_name(each) for each in devices]
        self._now: dict[int, _AtWork] = {}
        self._end, self._again = 0.0, 0.0
        self._ended: set[Job] = set()
        self._never: set[Job] = set()
        """What needs a job that failed, and so does not start."""
        self._here = self._failed = 0
        self._begun = time.monotonic()
        self._spoken = 0.0
        self._told: set[str] = set()
        self._over = threading.Event()
        self._progress = Progress(
            TextColumn("[bold]jobs"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._bar = self._progress.add_task("", total=len(state.todo), left="")
        self._live = (
            Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)
            if console.is_terminal and not console.is_dumb_terminal
            else None
        )

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        else:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live:
            self._live.stop()

    def started(self, job: Job, slot: int) -> None:
        """Note that a slot begins a job.

        Args:
            job: The job.
            slot: The slot's position among `devices`.
        """
        with self._lock:
            self._forget(job)
            known = self._estimates.informed and self._estimates.rehearsed(job)
            expected = self._estimates.seconds(job, self._names_of[slot]) if known else None
            self._now[slot] = _AtWork(job, time.monotonic(), expected)
        if not self._live and isinstance(job, Train):
            self._line(f"{self._devices[slot]}: {title(job)}")

    def _forget(self, job: Job) -> None:
        """Note that a job is in no slot: it ended, or its process died, and then nobody said so."""
        self._now = {slot: each for slot, each in self._now.items() if each.job != job}

    def noted(self, sentence: str) -> None:
        """Show what happened to workers and their jobs.

        Args:
            sentence: A sentence for people.
        """
        self._line(f"note: {sentence}")

    def facts(self) -> dict[str, Any]:
        """Return what the run does now, for other terminals and machines (`bench status`)."""
        with self._lock:
            now = [
                {
                    "device": self._devices[slot],
                    "job": ", ".join(filter(None, (title(each.job), each.words))),
                    "seconds": each.took,
                }
                for slot, each in sorted(self._now.items())
            ]
            return {
                "devices": list(self._devices),
                "now": now,
                "done": self._here,
                "elsewhere": len(self._ended) - self._here - self._failed,
                "failed": self._failed,
                "jobs": len(self._state.todo),
                "left": self._left(),
            }

    def said(self, slot: int, facts: Mapping[str, Any]) -> None:
        """Note how far a slot's job says it is, or what should be known of it.

        Args:
            slot: The slot's position among `devices`.
            facts: ``done`` and ``of`` with ``loss`` (epochs) or ``unit`` (``passes``, ``of`` at most); or
                ``note``, a sentence.
        """
        if "note" in facts:
            with self._lock:
                of = title(self._now[slot].job) if slot in self._now else self._devices[slot]
            self._once(f"note: {of}: {facts['note']}")
            return
        with self._lock:
            if slot not in self._now:
                return
            now = self._now[slot]
            before, now.facts = now.facts, facts
        done, of = facts.get("done", 0), facts.get("of", 0)
        passes = facts.get("unit") == "passes"
        # A second phase of a training begins at 0 again, and nobody knows its share. Passes are at most so
        # many, and tell more than what was expected only where that has proved wrong.
        known = now.expected is None or now.took > now.expected if passes else of == before.get("of", of)
        if done and of and known:
            self._estimates.progress(now.job, self._names_of[slot], now.took, min(done / of, 1.0))
        if not self._live and of and not passes and (done == of or done % max(of // 5, 1) == 0):
            loss = facts.get("loss", float("nan"))
            self._line(f"{title(now.job)}: epoch {done}/{of}, loss {loss:.4f}")

    def ended(self, done: Done) -> None:
        """Note that a job ended.

        Args:
            done: The job, with its error if it failed.
        """
        with self._lock:
            self._forget(done.job)
            self._ended.add(done.job)
            self._failed += done.error is not None
            if done.error is not None:
                self._leave_out(done.job)
            self._here += done.error is None and done.slot is not None
            self._progress.advance(self._bar)
        if done.error is not None:
            first = str(done.error).partition("\n")[0]
            mendable = persons(done.error)
            text = mendable or f"{type(done.error).__name__}: {first}"
            head = "failed" if mendable is None else "error"
            self._once(text, f"{head}: {title(done.job)}: {text}", error=mendable is not None)
        elif isinstance(done.job, Evaluate):
            # A number stands above the bars for good.
            count = f"{len(self._ended)}/{len(self._state.todo)}"
            for said in [str(each) for each in self._numbers(done.job.key)] or [title(done.job)]:
                self._line(f"{count} {said}" + ("" if self._live else f"; {self._left()}"))
        elif not self._live and isinstance(done.job, Craft) and self.seconds() - self._spoken >= QUIET:
            # A shard of an attack is no news in itself, but an hour without a line is a worry.
            count = f"{len(self._ended)}/{len(self._state.todo)}"
            self._line(f"{count} {title(done.job)}; {self._left()}")

    def _leave_out(self, failed: Job) -> None:
        """Count what needs a job, directly or by other jobs, no more among what is to come."""
        waiting = [failed]
        while waiting:
            new = [each for each in self._above.get(waiting.pop(), ()) if each not in self._never]
            self._never.update(new)
            waiting += new

    @cached_property
    def _above(self) -> dict[Job, list[Job]]:
        """What needs a job directly, by that job."""
        found: dict[Job, list[Job]] = {}
        for job, needs in self._state.todo.items():
            for need in needs:
                found.setdefault(need, []).append(job)
        return found

    def seconds(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self._begun

    def _once(self, what: str, line: str | None = None, *, error: bool = False) -> None:
        """Print a line, unless the same was said before: many jobs may fail for one reason."""
        if what in self._told:
            if line is not None:
                self._line(line.removesuffix(what) + "the same")
            return
        self._told.add(what)
        if error:
            # What a person can mend; in a terminal it stands above the bars all the same.
            Console(stderr=True, quiet=self._console.quiet).print(
                Text(line or what, style="red"), soft_wrap=True
            )
        else:
            self._line(line or what)

    def _beat(self) -> None:
        """Say now and then what is at work, where nothing else was said."""
        while not self._over.wait(1.0):
            with self._lock:
                late = [each for each in self._now.values() if each.overdue and not each.late]
                for each in late:
                    each.late = True
                now = [
                    ", ".join(filter(None, (f"{each.took:.0f} s", each.words))) for each in self._now.values()
                ]
                titles = [title(each.job) for each in self._now.values()]
            for each in late:
                self._line(f"{title(each.job)}: {each.took:.0f} s, {each.words}")
            if now and self.seconds() - self._spoken >= HEARTBEAT:
                work = "; ".join(f"{name} ({far})" for name, far in zip(titles, now, strict=True))
                self._line(f"at work: {work}; {self._left()}")

    def _line(self, text: str) -> None:
        self._spoken = self.seconds()
        self._console.print(Text(shown(text)), soft_wrap=True)

    def _left(self) -> str:
        """Return the time left, by what jobs like those to come have taken."""
        if not self._estimates.informed:
            return "time left unknown"
        now = time.monotonic()
        if now >= self._again:
            running = {slot: (each.job, now - each.begun) for slot, each in dict(self._now).items()}
            over = self._ended | self._never
            todo = {job: needs for job, needs in self._state.todo.items() if job not in over}
            closed = self._closed()
            open_ = [slot for slot in range(len(self._devices)) if slot in running or slot not in closed]
            running = {open_.index(slot): each for slot, each in running.items()}
            # With workers elsewhere alone nobody knows here how many there will be: what one would take.
            where = [self._names_of[slot] for slot in open_] or [""]
            self._end = now + length(todo, self._estimates, where, running)
            after = time.monotonic()
            self._again = after + max(1.0, PATIENCE * (after - now))
        seconds = max(self._end - now, 0.0)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def _picture(self) -> RenderableType:
        with self._lock:
            self._progress.update(self._bar, left=self._left())
            slots = Table.grid(padding=(0, 2))
            for slot, device in enumerate(self._devices):
                if slot in self._now:
                    each = self._now[slot]
                    slots.add_row(device, Text(shown(title(each.job))), each.words, f"{each.took:.0f} s")
                else:
                    slots.add_row(device, "idle", "", "", style="dim")
            return Group(self._progress, slots)

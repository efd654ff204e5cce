"""What a run shows while it works: bars and a running table on a terminal, plain lines elsewhere."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench.errors import persons
from bench.escaping import shown
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.outstanding import State
from bench.runner.placement import length
from bench.runner.scheduler import Done, Watcher
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial

SHOWN = 8
"""How many finished conditions stay in sight."""

HEARTBEAT = 60.0
"""Seconds without a line after which one says what is at work."""

PATIENCE = 50
"""How many times as long as it took to work out the time left it is believed; at least a second."""

QUIET = 15
"""Seconds without a line after which a shard of an attack is worth one."""


def title(job: Job, names: Mapping[str, str]) -> str:
    """Return a job in a few words.

    Args:
        job: The job.
        names: What the suite calls its defenses, by the keys of their trainings.
    """

    def called(train: Train) -> str:
        return names.get(train.key, train.defense.name)

    match job:
        case Train():
            return f"train {called(job)}, seed {job.seed}"
        case Craft():
            attack_run = job.attack_run
            through = f" on {called(attack_run.source.train)}" if attack_run.source else ""
            view = f"/{attack_run.view.use}" if attack_run.view else ""
            return f"{attack_run.attack.name}{through}{view} [{job.start}:{job.stop}]"
        case Evaluate():
            return f"ask {called(job.victim.train)}/{job.readout}"
        case Trial():
            return f"try {job.attack.name}, {job.threat.norm}"
        case Examination():
            return f"examine {called(job.victim.train)}/{job.readout}"


class Display(Watcher):
    """A live picture of a run; a context manager.

    Args:
        console: Where to show it; None: nowhere.
        state: What is to do.
        estimates: The time of each job, to say how much is left.
        devices: The device of each slot.
        conditions: The names of conditions, by the keys of their evaluations.
        names: What the suite calls its defenses, by the keys of their trainings.
        closed: Returns the slots that take no job at the moment.
    """

    def __init__(
        self,
        console: Console | None,
        state: State,
        estimates: Estimates,
        devices: tuple[str, ...],
        conditions: Mapping[str, str],
        names: Mapping[str, str],
        closed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._closed = closed
        if console is None:
            console = Console(quiet=True)
        self._console, self._state, self._estimates, self._devices = console, state, estimates, devices
        self._conditions, self._names = conditions, names
        self._lock = threading.Lock()
        self._names_of = [device_name(each) for each in devices]
        self._now: dict[int, tuple[Job, float, Mapping[str, Any]]] = {}
        self._end, self._again = 0.0, 0.0
        self._ended: set[Job] = set()
        self._never: set[Job] = set()
        """What needs a job that failed, and so does not start."""
        self._here = self._failed = 0
        self._finished: deque[tuple[str, str]] = deque(maxlen=SHOWN)
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
            self._now[slot] = job, time.monotonic(), {}
        if not self._live and isinstance(job, Train):
            self._line(f"{self._devices[slot]}: {self._title(job)}")

    def _forget(self, job: Job) -> None:
        """Note that a job is in no slot: it ended, or its process died, and then nobody said so."""
        self._now = {slot: each for slot, each in self._now.items() if each[0] != job}

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
                {"device": self._devices[slot], "job": self._title(job), "seconds": time.monotonic() - begun}
                for slot, (job, begun, _) in sorted(self._now.items())
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
            facts: ``done`` and ``of`` (epochs) with ``loss``; or ``note``, a sentence.
        """
        if "note" in facts:
            with self._lock:
                of = self._title(self._now[slot][0]) if slot in self._now else self._devices[slot]
            self._once(f"note: {of}: {facts['note']}")
            return
        with self._lock:
            if slot not in self._now:
                return
            job, begun, before = self._now[slot]
            self._now[slot] = job, begun, facts
        if facts.get("done") and facts.get("of") == before.get("of", facts["of"]):
            # A second phase of a training begins at 0 again, and nobody knows its share.
            share = facts["done"] / facts["of"]
            self._estimates.progress(job, self._names_of[slot], time.monotonic() - begun, share)
        done, of = facts.get("done", 0), facts.get("of", 0)
        if not self._live and of and (done == of or done % max(of // 5, 1) == 0):
            self._line(f"{self._title(job)}: epoch {done}/{of}, loss {facts.get('loss', float('nan')):.4f}")

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
            if isinstance(done.job, Evaluate) and done.error is None:
                self._finished.append(
                    (self._conditions.get(done.job.key, done.job.key), f"{self.seconds():.0f} s")
                )
        if done.error is not None:
            first = str(done.error).partition("\n")[0]
            mendable = persons(done.error)
            text = mendable or f"{type(done.error).__name__}: {first}"
            head = "failed" if mendable is None else "error"
            self._once(text, f"{head}: {self._title(done.job)}: {text}", error=mendable is not None)
        elif not self._live and (
            isinstance(done.job, Evaluate)
            # A shard of an attack is no news in itself, but an hour without a line is a worry.
            or (isinstance(done.job, Craft) and self.seconds() - self._spoken >= QUIET)
        ):
            count = f"{len(self._ended)}/{len(self._state.todo)}"
            self._line(
                f"{count} {self._conditions.get(done.job.key) or self._title(done.job)}; {self._left()}"
            )

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

    def _title(self, job: Job) -> str:
        return title(job, self._names)

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
            if self.seconds() - self._spoken >= HEARTBEAT:
                with self._lock:
                    now = [
                        (self._title(job), time.monotonic() - begun) for job, begun, _ in self._now.values()
                    ]
                if now:
                    self._line("at work: " + "; ".join(f"{name} ({took:.0f} s)" for name, took in now))

    def _line(self, text: str) -> None:
        self._spoken = self.seconds()
        self._console.print(Text(shown(text)), soft_wrap=True)

    def _left(self) -> str:
        """Return the time left, by what jobs like those to come have taken."""
        if not self._estimates.informed:
            return "time left unknown"
        now = time.monotonic()
        if now >= self._again:
            running = {slot: (job, now - begun) for slot, (job, begun, _) in dict(self._now).items()}
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
                    job, begun, facts = self._now[slot]
                    far = (
                        f"epoch {facts['done']}/{facts['of']}, loss {facts['loss']:.3f}"
                        if facts.get("of")
                        else ""
                    )
                    slots.add_row(
                        device, Text(shown(self._title(job))), far, f"{time.monotonic() - begun:.0f} s"
                    )
                else:
                    slots.add_row(device, "idle", "", "", style="dim")
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            table.add_column("finished conditions")
            table.add_column("after", justify="right")
            for name, after in self._finished:
                table.add_row(Text(shown(name)), after)
            return Group(self._progress, slots, table) if self._finished else Group(self._progress, slots)

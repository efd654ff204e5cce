"""A run from a task file to its tables: what the command line and `bench.run` share."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unicodedata import normalize

from bench.console import condition_name, count, duration, say
from bench.errors import InputError, persons
from bench.report import render, tables
from bench.report.reports import asked_jobs, asked_tables
from bench.results.manifest import Outcomes, aged, write
from bench.results.store import Store
from bench.runner import outstanding, pools, scheduler
from bench.runner.context import WorkerContext
from bench.runner.estimates import Estimates
from bench.runner.progress import Display
from bench.suite import resolve
from bench.suite.jobs import Job, Train
from bench.suite.layout import columns_read
from bench.suite.planner import Plan, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.report.tables import RenderedTable
    from bench.runner.outstanding import State
    from bench.runner.pools import Pool
    from bench.runner.scheduler import Done

Executor = Literal["process", "inline"]
"""A process for each device slot, or everything in this one."""


class Project(NamedTuple):
    """A task file with its plan and its results folder."""

    plan: Plan
    store: Store
    manifest: dict[str, Any]


def planned(path: Path, results: Path | None, data_root: Path | None, *, worst: bool = False) -> Project:
    """Read and check a task file and its tables.

    Args:
        path: The task file.
        results: The results folder; None: ``results/<suite>``.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
        worst: Whether every task is planned in worst mode, whatever the file says.

    Returns:
        The plan, the results folder (which need not be there) and the manifest.

    Raises:
        InputError: The file cannot be read, or something in it cannot be as asked.
    """
    suite = resolve.load(path)
    if worst:
        suite = resolve.in_worst_mode(suite)
    store = Store(results or Path("results") / suite.name)
    crossed = make(suite, data_root, store.receipt)
    manifest = crossed.manifest()
    names: dict[str, str] = {}
    for key in manifest["tables"]:
        # Some file systems take letters of either case for one, and an accent for its letter's part.
        folded = normalize("NFC", normalize("NFKD", file_name(key)).casefold())
        if (other := names.setdefault(folded, key)) != key:
            where = suite.document.line("tables", key)
            raise InputError(f"{where}: tables {other!r} and {key!r} would be written to one file")
        try:
            tables.check(manifest, key)
        except InputError as error:
            raise InputError(f"{suite.document.line('tables', key)}: {error}") from None
    return Project(crossed, store, manifest)


def file_name(key: str) -> str:
    """Return the name of a table's files, without their endings."""
    return f"table-{key.replace('/', '-')}"


class Prospect(NamedTuple):
    """What is to do, and how long it may take."""

    state: State
    estimates: Estimates
    seconds: float | None
    """Seconds of work for one slot, judged by the receipts so far; None where there are none."""


def prospect(project: Project, asked: list[str] | None) -> Prospect:
    """Return what is done and what is to do, and write the manifest; runs nothing."""
    wanted = asked_jobs(project.manifest, asked)
    project.store.reads = columns_read(project.manifest, asked_tables(project.manifest, asked))
    write(project.store, project.manifest)
    state = outstanding.examine(project.plan, project.store, wanted, verify=False)
    estimates = learned(project)
    seconds = sum(estimates.seconds(job) for job in state.todo) if estimates.informed else None
    return Prospect(state, estimates, seconds)


def learned(project: Project) -> Estimates:
    """Return what jobs cost, judged by the receipts of those that are done."""
    estimates = Estimates()
    for job in project.plan.graph():
        receipt = project.store.receipt(job.kind, job.key)
        if receipt:
            estimates.learn(job, receipt)
    return estimates


class Options(NamedTuple):
    """How jobs are run."""

    devices: tuple[str, ...]
    """The device of each slot."""
    executor: Executor = "process"
    """Where jobs run."""
    data_root: Path | None = None
    """The folder of the data sets; None: ``BENCH_DATA``, else the user's cache."""
    trust: bool = False
    """Whether results count whose component's source has changed since."""
    console: Any | None = None
    """Where to say what happens, a `rich.console.Console`; None: nowhere."""


class Run:
    """The jobs of a project, and the tables that come of them.

    Args:
        project: The project; its manifest is written into its results folder, unless `record` is false.
        options: How jobs are run.
        asked: Keys of tables; None or none: every table, and conditions that no table reads.
        wanted: Keys of the evaluations to make; None: those that the tables read.
        record: Whether the results folder becomes one of this project.
    """

    def __init__(
        self,
        project: Project,
        options: Options,
        asked: list[str] | None = None,
        *,
        wanted: set[str] | None = None,
        record: bool = True,
    ) -> None:
        self.project, self.plan, self.store = project, project.plan, project.store
        self.keys = asked_tables(project.manifest, asked)
        self.store.reads = columns_read(project.manifest, self.keys)
        self.wanted = asked_jobs(project.manifest, asked) if wanted is None else wanted
        self.devices, self.executor, self.console = options.devices, options.executor, options.console
        self.data_root, self.trust = options.data_root, options.trust
        self.limit = self.plan.suite.model.time_limit
        self.ended: list[Done] = []
        self.failures: list[Done] = []
        self.begun = time.monotonic()
        self._worker_context = WorkerContext(
            self.store.root,
            self.plan.suite.folder,
            self.data_root,
            self.devices[0],
            project.manifest["sources"],
            commit_of(Path(__file__).parent),
            self.limit,
        )
        self._display: Display | None = None
        if record:
            write(self.store, project.manifest)

    def do(self) -> None:
        """Do what is to do, twice where weights came out other than those that results were made from."""
        if any(isinstance(job, Train) and job.foreign for job in self.plan.graph(self.wanted)):
            with self._pool() as pool:
                others = scheduler.ask_again(self.plan, self.store, pool, self.wanted, self.limit)
            for reason, number in others.items():
                say(self.console, f"again: {count(number, 'stored result')}: {reason}")
        for again in (False, True):
            state = outstanding.examine(self.plan, self.store, self.wanted, trust=self.trust)
            if not again or state.todo:
                say_state(self.console, self.project, state)
            if not state.todo:
                return
            outstanding.fetch(state, self.plan.suite.folder, self.data_root)
            self._run(state)
            if self.failures:
                return

    def tables(self) -> tuple[list[RenderedTable], list[str]]:
        """Cut and write the tables that are asked for; return them, and notes about how old they are."""
        outcomes = Outcomes(self.store.root, self.store.reads)
        cut = []
        for key in self.keys:
            table = tables.cut(self.project.manifest, key, outcomes)
            name = self.store.root / "tables" / file_name(key)
            self.store.write_text(name.with_name(name.name + ".csv"), render.to_csv(table))
            self.store.write_text(name.with_name(name.name + ".md"), render.to_markdown(table))
            cut.append(table)
        # With `trust`, or where a job of today's code failed.
        changed = outcomes.changed
        return cut, [aged(changed, self.plan.suite.path)] if changed else []

    def holes(self) -> int:
        """Return how many of the conditions that are asked for have no number."""
        state = outstanding.examine(self.plan, self.store, self.wanted, trust=True, verify=False)
        return sum(
            (self.wanted is None or condition.job.key in self.wanted) and condition.job not in state.done
            for condition in self.plan.conditions
        )

    def stopped(self, command: list[str]) -> str:
        """Return what is kept of a run that was stopped, and the command that goes on.

        Args:
            command: The words of the command that was given.
        """
        state = outstanding.examine(self.plan, self.store, self.wanted, verify=False)
        every = len(self.plan.graph())
        kept = f"{every - len(state.todo)} of {count(every, 'job')}"
        epochs = sum(self.store.begun(job.key) for job in state.todo)
        if epochs:
            kept += f" and the last epoch of {count(epochs, 'training')}"
        return f"stopped; {kept} kept in {self.store.shown}. Go on with: {join(command)}"

    def mendable(self) -> list[str]:
        """Return what to mend, if every failure is of a kind that the user can mend; else nothing."""
        said = [persons(done.error) for done in self.failures if done.error is not None]
        sentences = [each for each in said if each is not None]
        return sentences if len(sentences) == len(said) else []

    def _run(self, state: State) -> None:
        estimates = learned(self.project)
        planned = self.plan.conditions
        conditions = {each.job.key: condition_name(each.coordinates) for each in planned}
        names = {each.job.victim.train.key: each.coordinates["defense"] for each in planned}
        display = Display(self.console, state, estimates, self.devices, conditions, names)
        with display, self._pool() as pool:
            self._display = display
            for done in scheduler.run(state, self.store, pool, estimates, display.started, self.limit):
                display.ended(done)
                (self.ended if done.error is None else self.failures).append(done)

    @contextlib.contextmanager
    def _pool(self) -> Iterator[Pool]:
        """Start what runs jobs; end it whatever happens."""
        kind = pools.Inline if self.executor == "inline" else pools.Process
        pool = kind(self._worker_context, self.devices, self._said)
        try:
            yield pool
        finally:
            pool.stop()

    def _said(self, slot: int, facts: Mapping[str, Any]) -> None:
        if self._display is not None:
            self._display.said(slot, facts)


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder is of, with a mark if something was changed since; None outside one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


# --- what is said ------------------------------------------------------------------------------------


def say_state(console: Any | None, project: Project, state: State) -> None:
    """Say what is done and what is to do."""
    plan, store = project.plan, project.store
    ready = sum(condition.job in state.done for condition in plan.conditions)
    kept = len(state.kept - state.done) if state.todo else 0
    say(
        console,
        f"{plan.suite.path.name}: {ready} of {count(len(plan.conditions), 'condition')} done, "
        f"{len(plan.skips)} skipped; {count(len(state.todo), 'job')} to do"
        + (f", which build on {count(kept, 'stored one')}" if kept else ""),
    )
    for reason, number in Counter(state.redo.values()).items():
        say(console, f"again: {count(number, 'stored result')}: {reason}")
    for job in state.todo:
        if isinstance(job, Train) and store.begun(job.key):
            name = f"{job.defense.name}, seed {job.seed}"
            say(console, f"goes on with the training of {name}, from its last epoch")


def described(project: Project, found: Prospect) -> dict[str, Any]:
    """Return a manifest with its jobs: what each needs, its state, and the seconds that it may take."""
    graph = project.plan.graph()
    todo = {job.key for job in found.state.todo}

    def state(job: Job) -> str:
        if job.key in todo:
            return "to do"
        return "done" if project.store.receipt(job.kind, job.key) else "not needed"

    jobs = [
        {
            "kind": job.kind,
            "key": job.key,
            "needs": [each.key for each in needs],
            "state": state(job),
            "seconds": round(found.estimates.seconds(job), 1),
        }
        for job, needs in graph.items()
    ]
    return {**project.manifest, "jobs": jobs}


def show_plan(console: Any, project: Project, found: Prospect) -> None:
    """Print what is done and to do, what is skipped and why, and the flags about settings."""
    from rich.table import Table

    plan, state = project.plan, found.state
    say_state(console, project, state)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("jobs", "all", "to do"):
        table.add_column(heading, justify="left" if heading == "jobs" else "right")
    every, todo = Counter(job.kind for job in plan.graph()), Counter(job.kind for job in state.todo)
    for kind in ("train", "craft", "evaluate"):
        table.add_row(kind, str(every[kind]), str(todo[kind]))
    console.print(table)
    if state.todo and found.seconds is not None:
        took = duration(found.seconds)
        say(console, f"about {took} of work for one slot, judged by the receipts so far")
    for reason, number in Counter(skip.reason for skip in plan.skips).items():
        say(console, f"skipped: {count(number, 'condition')}: {reason}")
    for flag in flags_of(plan):
        say(console, f"flag: {flag}")


def flags_of(plan: Plan) -> list[str]:
    """Return each sentence about settings once, with the name of what is meant."""
    # A defense's flags begin with its name, whatever attacks it; an attack's are about itself.
    said = (
        flag
        if flag.startswith(f"{condition.coordinates['defense']}: ")
        else f"{condition.coordinates['attack']}: {flag}"
        for condition in plan.conditions
        for flag in condition.facts["flags"]
    )
    return list(dict.fromkeys(said))

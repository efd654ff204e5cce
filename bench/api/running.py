"""A run from a task file to its tables: what the command line and `bench.run` share."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from operator import itemgetter
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

import numpy as np

from bench import startup
from bench.console import columns, count, duration, say
from bench.errors import InputError, persons
from bench.escaping import shown
from bench.report import provenance, render, tables
from bench.report.firsthand import Numbers
from bench.report.reports import asked_jobs, asked_tables
from bench.results import leases as leasing
from bench.results import request as requests
from bench.results.conditions import conditions_of
from bench.results.leases import Leases
from bench.results.manifest import ADDED, Outcomes, aged, write
from bench.results.origin import commit_of
from bench.results.request import Request
from bench.results.store import Store
from bench.results.survey import survey
from bench.runner import costing, outstanding, scheduler
from bench.runner.budget import Chosen, Row, within
from bench.runner.context import WorkerContext, device_name
from bench.runner.estimates import Estimates
from bench.runner.placement import length
from bench.runner.progress import Display
from bench.runner.scheduler import Scheduler
from bench.runner.titles import title
from bench.suite import resolve
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial
from bench.suite.layout import arrange, columns_read
from bench.suite.places import results_folder
from bench.suite.planner import Plan, PlannedCondition, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.report.render import Form
    from bench.report.tables import RenderedTable
    from bench.results.outcomes import Frame
    from bench.runner.executors.protocol import Listener, Pool, Start
    from bench.runner.outstanding import State
    from bench.runner.scheduler import Done


class Project(NamedTuple):
    """A task file with its plan and its results folder."""

    plan: Plan
    store: Store
    manifest: dict[str, Any]
    worst: bool = False
    """Whether every task is planned in worst mode, whatever the file says."""


def planned(path: Path, results: Path | None, data_root: Path | None, *, worst: bool = False) -> Project:
    """Read and check a task file and its tables.

    Args:
        path: The task file.
        results: The results folder; None: what the file's ``results`` says, or ``results/<suite>``.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
        worst: Whether every task is planned in worst mode, whatever the file says.

    Returns:
        The plan, the results folder (which need not be there) and the manifest.

    Raises:
        InputError: The file cannot be read, or something in it cannot be as asked.
    """
    suite = resolve.load(path)
    store = Store(results_folder(path, results))
    if worst:
        suite = resolve.in_worst_mode(suite)
    # What was added is no part of the rows that are run as one.
    suite = resolve.extended(suite, store.shown / ADDED)
    crossed = make(suite, data_root, store.receipt)
    manifest = crossed.manifest()
    names: dict[str, str] = {}
    for key in manifest["tables"]:
        # Some file systems take letters of either case for one, and an accent for its letter's part.
        folded = normalize("NFC", normalize("NFKD", provenance.file_name(key)).casefold())
        if (other := names.setdefault(folded, key)) != key:
            where = suite.document.line("tables", key)
            raise InputError(f"{where}: tables {other!r} and {key!r} would be written to one file")
        try:
            tables.check(manifest, key)
        except InputError as error:
            raise InputError(f"{suite.document.line('tables', key)}: {error}") from None
    startup.end()
    return Project(crossed, store, manifest, worst)


class Prospect(NamedTuple):
    """What is to do, and how long it may take."""

    state: State
    estimates: Estimates
    seconds: float | None
    """Device-seconds of work, by receipts and rehearsals; None where there are none."""
    devices: tuple[str, ...] = ()
    """The name of the device of each slot for which an end is expected."""
    end: float | None = None
    """In how many seconds everything is expected to be done on these devices; None where nobody knows."""


def prospect(project: Project, asked: list[str] | None, options: Options | None = None) -> Prospect:
    """Return what is done, what is to do and what that may cost; does no job and writes nothing.

    Args:
        project: The project.
        asked: Keys of tables; None or none: every table, and conditions that no table reads.
        options: The devices on which an end is expected. What no receipt tells is rehearsed there, in the
            processes that would do the jobs; None: no devices, no rehearsal.
    """
    wanted = asked_jobs(project.manifest, asked)
    project.store.reads = columns_read(project.manifest, asked_tables(project.manifest, asked))
    trust = options is not None and options.trust
    state = outstanding.examine(project.plan, project.store, wanted, trust=trust, verify=False)
    estimates = learned(project)
    names: tuple[str, ...] = ()
    end = None
    if options is not None and state.todo:
        with _started(options.start, _context(project, options), lambda *_: None) as pool:
            closed = pool.occupancy.closed() if pool.occupancy is not None else ()
            names = tuple(device_name(each) for slot, each in enumerate(pool.devices) if slot not in closed)
            costing.rehearse(pool, state.todo, estimates)
        if names and estimates.informed:
            end = length(state.todo, estimates, names)
    seconds = sum(estimates.seconds(job) for job in state.todo) if estimates.informed else None
    return Prospect(state, estimates, seconds, names, end)


REHEARSED = 60.0
"""Seconds of work, as far as anybody can guess, from which on a run measures first what its jobs cost."""


def _context(project: Project, options: Options) -> WorkerContext:
    """Return the surroundings of the jobs of a project."""
    return WorkerContext(
        project.store.root,
        project.plan.suite.folder,
        options.data_root,
        "cpu",  # each slot has its own
        project.manifest["sources"],
        commit_of(Path(__file__).parent),
        project.plan.suite.model.time_limit,
    )


@contextlib.contextmanager
def _started(start: Start, context: WorkerContext, listener: Listener) -> Iterator[Pool]:
    """Start what runs jobs; end it whatever happens."""
    pool = start(context, listener)
    try:
        yield pool
    finally:
        pool.stop()


def rows_of(project: Project, keys: list[str]) -> list[Row]:
    """Return the rows of tables, one for each seed, and at last what no table reads, by defense.

    Args:
        project: The project.
        keys: Keys of tables.
    """
    jobs = {each.job.key: each.job for each in project.plan.conditions}
    checks = {each.job.key: each.checks for each in project.plan.conditions}
    found: dict[tuple[str, str, int], dict[str, Evaluate]] = {}
    for key in keys:
        layout = arrange(project.manifest, key)
        for row in layout.rows:
            name = ", ".join(row.label)
            for condition in (each for slot in row.slots for each in slot.conditions):
                cells = found.setdefault((key, name, condition.seed), {})
                for each in (condition, *layout.unmoved(condition)[:1]):
                    cells[each.job] = jobs[each.job]
    read = {job for cells in found.values() for job in cells}
    for planned in project.plan.conditions:
        if planned.job.key not in read:
            at = planned.coordinates
            found.setdefault(("", str(at["defense"]), at["seed"]), {})[planned.job.key] = planned.job
    return [
        Row(key, name, seed, tuple(cells.values()), {job: checks[job] for job in cells})
        for (key, name, seed), cells in found.items()
    ]


def learned(project: Project) -> Estimates:
    """Return what jobs cost, judged by the receipts of those that are done."""
    estimates = Estimates()
    with survey(project.store) as found:
        for job in project.plan.graph():
            if receipt := found.receipt(job.kind, job.key):
                estimates.learn(job, receipt)
    return estimates


class Options(NamedTuple):
    """How jobs are run."""

    start: Start
    """Starts what jobs run in (`bench.runner.executors.ready`)."""
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
        request: The request that this run helps with; None: it makes one of its own.

    Raises:
        InputError: A run with other code is at work in the results folder.
    """

    def __init__(
        self,
        project: Project,
        options: Options,
        asked: list[str] | None = None,
        *,
        wanted: set[str] | None = None,
        record: bool = True,
        request: Request | None = None,
    ) -> None:
        self.project, self.plan, self.store = project, project.plan, project.store
        self.keys = asked_tables(project.manifest, asked)
        self.store.reads = columns_read(project.manifest, self.keys)
        self.wanted = asked_jobs(project.manifest, asked) if wanted is None else wanted
        self.missed = self.wanted
        """Keys of the evaluations that are holes where they have no number; None: all."""
        self.start, self.console = options.start, options.console
        self.data_root, self.trust = options.data_root, options.trust
        self.limit = self.plan.suite.model.time_limit
        self.ended: list[Done] = []
        self.failures: list[Done] = []
        self.begun = time.monotonic()
        self._worker_context = _context(project, options)
        self._display: Display | None = None
        self.estimates: Estimates | None = None
        """What jobs cost, where it was found out before; None: receipts and a rehearsal say it."""
        sources = project.manifest["sources"]
        refuse_other_code(self.store, sources)
        suite = self.plan.suite
        self.request = request or Request(
            suite=suite.path.resolve(),
            digest=suite.digest,
            sources=sources,
            tables=asked or None,
            wanted=None if wanted is None else sorted(wanted),
            data_root=self.data_root.resolve() if self.data_root else None,
            trust=self.trust,
            worst=project.worst,
        )
        if record:
            write(self.store, project.manifest)
            requests.write(self.store.root, self.request)

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
            table = tables.cut(self.project.manifest, key, outcomes, outcomes.found)
            name = self.store.root / "tables" / provenance.file_name(key)
            forms: dict[Path, Form] = {
                name.with_name(name.name + ending): form for ending, form in provenance.ENDINGS.items()
            }
            for path, form in forms.items():
                self.store.write_text(path, render.joined([table], form))
            source = provenance.Source(self.store.root, self.project.manifest, [key], outcomes)
            provenance.keep(source, provenance.beside(name), forms)
            cut.append(table)
        # With `trust`, or where a job of today's code failed.
        changed = outcomes.changed
        return cut, [aged(changed, self.plan.suite.path)] if changed else []

    def holes(self) -> int:
        """Return how many of the conditions that are asked for have no number, also for want of time."""
        state = outstanding.examine(self.plan, self.store, self.missed, trust=True, verify=False)
        return sum(
            (self.missed is None or condition.job.key in self.missed)
            and (condition.job not in state.done or self._raised(condition))
            for condition in self.plan.conditions
        )

    def _raised(self, condition: PlannedCondition) -> bool:
        """Return whether an attack raised that was run with others as one, so that it has no number."""
        if (member := condition.facts.get("member")) is None:
            return False
        told = (self.store.receipt("evaluate", condition.job.key) or {}).get("members", {})
        return bool(told.get(member["label"], {}).get("raised"))

    def stopped(self, command: list[str]) -> str:
        """Return what is kept of a run that was stopped, and the command that goes on.

        Args:
            command: The words of the command that was given.
        """
        state = outstanding.examine(self.plan, self.store, self.wanted, verify=False)
        every = len(self.plan.graph(self.wanted))
        kept = f"{every - len(state.todo)} of {count(every, 'job')}"
        epochs = sum(self.store.begun(job.key) for job in state.todo)
        if epochs:
            kept += f" and the last epoch of {count(epochs, 'training')}"
        return f"stopped; {kept} kept in {self.store.shown}. Go on with: {join(command)}"

    @property
    def here(self) -> int:
        """How many jobs were done here, and not by other workers."""
        return sum(done.slot is not None for done in self.ended)

    def mendable(self) -> list[str]:
        """Return what to mend, if every failure is of a kind that the user can mend; else nothing."""
        said = [(done.job, persons(done.error)) for done in self.failures if done.error is not None]
        sentences = [f"{title(job)}: {each}" for job, each in said if each is not None]
        return sentences if len(sentences) == len(said) else []

    def _run(self, state: State) -> None:
        known = self.estimates is not None
        estimates = self.estimates or learned(self.project)
        numbers = Numbers(conditions_of(self.project.manifest), self._outcomes).of
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(self._pool())
            closed = tuple if pool.occupancy is None else pool.occupancy.closed
            devices = pool.devices
            display = Display(self.console, state, estimates, devices, numbers, closed)
            stack.enter_context(display)
            if not known and pool.devices and sum(estimates.seconds(job) for job in state.todo) > REHEARSED:
                costing.rehearse(pool, state.todo, estimates)
            self._display = display
            leases = Leases(self.store.root, lambda: {**display.facts(), "sources": self.request.sources})
            # A signal at the edges of the block below must not leave a worker that looks alive.
            stack.callback(leases.close)
            with scheduler.sharing(self.store.root, self.request.id, leases) as share:
                jobs = Scheduler(state, self.store, pool, estimates, share, display, self.limit)
                for done in jobs.run():
                    display.ended(done)
                    (self.ended if done.error is None else self.failures).append(done)

    def _outcomes(self, key: str) -> Frame | None:
        """Return the outcomes of an evaluation as they are now; None where there are none yet."""
        try:
            return self.store.outcomes(key)
        except (OSError, ValueError):
            return None

    def _pool(self) -> contextlib.AbstractContextManager[Pool]:
        return _started(self.start, self._worker_context, self._said)

    def _said(self, slot: int, facts: Mapping[str, Any]) -> None:
        if self._display is not None:
            self._display.said(slot, facts)


def refuse_other_code(store: Store, sources: Mapping[str, str]) -> None:
    """Refuse to share a results folder with a run of other code: each would discard what the other makes.

    Args:
        store: The results folder.
        sources: Digests of the code of the plan, by module.

    Raises:
        InputError: A living worker there has other code.
    """
    for worker in leasing.workers(store.root):
        theirs = worker.said.get("sources")
        if worker.dead or not isinstance(theirs, dict):
            continue
        if other := requests.changed(theirs, dict(sources)):
            raise InputError(
                f"{store.shown}: {worker.shown} is at work there with another {other[0]}; wait for it, "
                f"stop it (bench stop {store.shown}), or name another folder with --results"
            )


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
            name = f"{job.defense.called}, seed {job.seed}"
            say(console, f"goes on with the training of {name}, from its last epoch")


def described(project: Project, found: Prospect) -> dict[str, Any]:
    """Return a manifest with its jobs: what each needs, its state, and the seconds that it may take."""
    graph = project.plan.graph()
    todo = {job.key for job in found.state.todo}

    with survey(project.store) as stored:

        def state(job: Job) -> str:
            if job.key in todo:
                return "to do"
            return "done" if stored.receipt(job.kind, job.key) else "not needed"

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
    plan, state = project.plan, found.state
    say_state(console, project, state)
    every, todo = Counter(job.kind for job in plan.graph()), Counter(job.kind for job in state.todo)
    rows = [[kind, str(every[kind]), str(todo[kind])] for kind in ("train", "craft", "evaluate")]
    for kind in ("trial", "examination"):
        rows.append([kind, str(every[kind]), str(todo[kind]), f"(what it is: bench explain {kind})"])
    columns(console, ("jobs", "all", "to do"), rows)
    if state.todo and found.seconds is not None:
        say(console, f"about {duration(found.seconds)} of device time, by receipts and rehearsals")
        if found.end is not None:
            where = ", ".join(f"{n} x {name}" for name, n in Counter(found.devices).items())
            say(console, f"done in about {duration(found.end)} on {where}")
        for heading, seconds in costs(project, found).items():
            _show_costs(console, heading, seconds)
    for reason, number in Counter(skip.reason for skip in plan.skips).items():
        say(console, f"skipped: {count(number, 'condition')}: {reason}")
    for flag in flags_of(plan):
        say(console, f"flag: {flag}")


def costs(project: Project, found: Prospect) -> dict[str, dict[str, float]]:
    """Return the device-seconds that are to do, by table, by defense and by attack.

    What several tables read counts for each of them; a training counts for its defense, and for no attack.

    Args:
        project: The project.
        found: What is to do.
    """
    todo, seconds = found.state.todo, found.estimates.seconds
    keys = list(project.manifest["tables"])
    below: dict[str, set[Job]] = {key: set() for key in keys}
    for row in rows_of(project, keys):
        waiting: list[Job] = list(row.evaluations)
        while row.table and waiting:
            job = waiting.pop()
            if job in todo and job not in below[row.table]:
                below[row.table].add(job)
                waiting.extend(todo[job])
    by_defense: dict[str, float] = defaultdict(float)
    by_attack: dict[str, float] = defaultdict(float)
    for job in todo:
        match job:
            case Train():
                network = job
            case Craft():
                by_attack[job.attack_run.attack.called] += seconds(job)
                if job.attack_run.source is None:
                    continue
                network = job.attack_run.source.train
            case Evaluate():
                by_attack[job.crafts[0].attack_run.attack.called] += seconds(job)
                network = job.victim.train
            case Trial():
                by_attack[job.attack.called] += seconds(job)
                continue
            case Examination():
                network = job.victim.train
        by_defense[network.defense.called] += seconds(job)
    return {
        "table": {key: sum(map(seconds, jobs)) for key, jobs in below.items() if jobs},
        "defense": dict(sorted(by_defense.items(), key=itemgetter(1), reverse=True)),
        "attack": dict(sorted(by_attack.items(), key=itemgetter(1), reverse=True)),
    }


def _show_costs(console: Any, heading: str, seconds: Mapping[str, float]) -> None:
    if seconds:
        rows = [
            (shown(name), f"{each:.0f}" if each >= 10 else f"{each:.1f}") for name, each in seconds.items()
        ]
        columns(console, (heading, "device-seconds"), rows)


def affordable(project: Project, asked: list[str] | None, found: Prospect, budget: float) -> Chosen:
    """Choose what a run does within a budget; its keys are what `Run` takes as `wanted`.

    Args:
        project: The project.
        asked: Keys of tables; None or none: every table, and conditions that no table reads.
        found: What is to do, and the devices.
        budget: Seconds, above 0.

    Raises:
        InputError: Nobody knows on which devices, and how fast.
    """
    if found.state.todo and not found.devices:
        raise InputError("--budget goes with --executor process, inline or ray: elsewhere slots come and go")
    rows = rows_of(project, asked_tables(project.manifest, asked))
    rows = [row for row in rows if row.table or not asked]
    return within(rows, found.state.todo, found.estimates, found.devices or ("",), budget, kills(project))


def chosen(project: Project, options: Options, asked: list[str] | None, budget: float | None) -> Run:
    """Return a run of what was asked for, or of what fits into a budget; says what is left.

    Args:
        project: The project.
        options: How jobs are run.
        asked: Keys of tables; None or none: every table, and conditions that no table reads.
        budget: Seconds, above 0; None: no limit.

    Raises:
        InputError: A run with other code is at work in the results folder, or nobody knows how fast the
            devices are.
    """
    if budget is None:
        return Run(project, options, asked)
    there = prospect(project, asked, options)
    found = affordable(project, asked, there, budget)
    for sentence in found.left:
        say(options.console, sentence)
    say(options.console, f"what fits into {duration(budget)} takes about {duration(found.seconds)}")
    run = Run(project, options, asked, wanted=set(found.wanted))
    run.estimates = there.estimates
    # What a budget leaves was asked for all the same.
    run.missed = asked_jobs(project.manifest, asked)
    return run


def kills(project: Project) -> dict[str, float] | None:
    """Return how many examples each evaluation may find broken, by what its attack broke elsewhere; or None.

    Args:
        project: The project, with what its results folder holds.
    """
    outcomes = Outcomes(project.store.root)
    shares: dict[str, list[float]] = {}
    for each in project.plan.conditions:
        rows = outcomes(each.job.key) if project.store.receipt("evaluate", each.job.key) else None
        if rows is not None:
            label, truth, rejected = (np.asarray(rows[name]) for name in ("label", "truth", "rejected"))
            broken = float(np.mean((label != truth) & ~rejected.astype(bool)))
            shares.setdefault(str(each.coordinates["attack"]), []).append(broken)
    if not shares:
        return None
    # An attack that never ran may break all.
    mean = {attack: sum(each) / len(each) for attack, each in shares.items()}
    return {
        each.job.key: mean.get(str(each.coordinates["attack"]), 1.0) * each.facts["n"]
        for each in project.plan.conditions
    }


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

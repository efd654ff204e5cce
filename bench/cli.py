"""The command line. Each command imports what it needs itself, so that help and reports start at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench.errors import BenchError, InputError, persons
from bench.escaping import readable, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.execute import Done, State
    from bench.manifest import Outcomes
    from bench.plan import Plan
    from bench.pools import Pool
    from bench.progress import Display
    from bench.store import Store
    from bench.tables import RenderedTable

app = typer.Typer(
    name="bench",
    help="Cross attacks with defenses, and print tables whose numbers can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SuitePath = Annotated[Path, typer.Argument(help="The task file.", metavar="SUITE")]
Results = Annotated[
    Path | None, typer.Option("--results", help="The results folder itself (default: results/<suite>).")
]
Tables = Annotated[list[str] | None, typer.Option("--table", help="A table's key; may be repeated.")]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Where data sets lie (default: BENCH_DATA, else the user's cache)."),
]
DEFAULT = Path("tasks.yaml")


@app.command()
def run(
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", help="cpu, cuda:0, ...; may be repeated (default: every GPU, else every core)."
        ),
    ] = None,
    results: Results = None,
    executor: Annotated[
        Literal["process", "inline"],
        typer.Option("--executor", help="A process for each device slot, or everything in this one."),
    ] = "process",
    data_root: DataRoot = None,
    trust_cache: Annotated[
        bool, typer.Option("--trust-cache", help="Keep results whose component's source has changed since.")
    ] = False,
) -> None:
    """Train, attack and judge what is not done yet, then write and print the tables."""
    from bench import pools, tables
    from bench.manifest import Outcomes, aged, write

    begun = time.monotonic()
    console = _console()
    plan, store, manifest = planned(suite, results, data_root)
    keys = _keys(manifest, table)
    wanted = {job for key in keys for job in tables.jobs(manifest, key)} if table else None
    devices = pools.slots(device, executor)
    _open(store)
    write(store, manifest)
    work = _Work(console, plan, store, manifest, devices, executor, data_root, wanted, trust_cache)
    try:
        with _terminable():
            work.do()
    except KeyboardInterrupt as stop:
        _say_stopped(console, plan, store, wanted)
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    outcomes = Outcomes(store.root)
    for grid in _write_tables(manifest, store, outcomes, keys):
        _print(console, grid)
    if outcomes.changed:
        # With --trust-cache, or where a job of today's code failed.
        _say(_console(stderr=True), f"note: {aged(outcomes.changed, suite)}", "yellow")
    took = _duration(time.monotonic() - begun)
    _say(console, f"{_count(len(work.ended), 'job')} done in {took}; tables in {store.shown / 'tables'}")
    _exit_for(console, plan, store, wanted, work.failures)


class _Work:
    """What `bench run` does: jobs, until nothing is left that can be done."""

    def __init__(
        self,
        console: Any,
        plan: Plan,
        store: Store,
        manifest: Mapping[str, Any],
        devices: tuple[str, ...],
        executor: str,
        data_root: Path | None,
        wanted: set[str] | None,
        trust: bool,
    ) -> None:
        from bench.costs import Costs
        from bench.work import Desk

        self.console, self.plan, self.store, self.devices = console, plan, store, devices
        self.data_root, self.wanted, self.trust, self.executor = data_root, wanted, trust, executor
        self.limit = plan.suite.model.time_limit
        self.desk = Desk(
            store.root, plan.suite.folder, data_root, devices[0], manifest["sources"], _commit(), self.limit
        )
        self.costs = Costs()
        self.ended: list[Done] = []
        self.failures: list[Done] = []
        self._display: Display | None = None

    def do(self) -> None:
        """Do what is to do, twice where weights came out other than those that results were made from."""
        from bench import execute
        from bench.plan import Train

        if any(isinstance(job, Train) and job.foreign for job in self.plan.graph(self.wanted)):
            with self._pool() as pool:
                others = execute.ask_again(self.plan, self.store, pool, self.wanted, self.limit)
            for reason, count in others.items():
                _say(self.console, f"again: {_count(count, 'stored result')}: {reason}")
        for again in (False, True):
            state = execute.examine(self.plan, self.store, self.wanted, trust=self.trust)
            if not again or state.todo:
                _say_state(self.console, self.plan, self.store, state)
            if not state.todo:
                return
            execute.fetch(state, self.plan.suite.folder, self.data_root)
            self._run(state)
            if self.failures:
                return

    def _run(self, state: State) -> None:
        from bench import execute
        from bench.progress import Display

        _learn(self.costs, self.plan, self.store)
        cells = {cell.job.key: _cell_name(cell.coordinates) for cell in self.plan.cells}
        trains = {cell.job.victim.train.key: cell.coordinates["defense"] for cell in self.plan.cells}
        shown = Display(self.console, state, self.costs, self.devices, cells, trains)
        with shown as display, self._pool() as pool:
            self._display = display
            for done in execute.run(state, self.store, pool, self.costs, display.started, self.limit):
                display.ended(done)
                (self.ended if done.error is None else self.failures).append(done)

    @contextlib.contextmanager
    def _pool(self) -> Iterator[Pool]:
        """Start what runs jobs; end it whatever happens."""
        from bench import pools

        kind = pools.Inline if self.executor == "inline" else pools.Process
        pool = kind(self.desk, self.devices, self._said)
        try:
            yield pool
        finally:
            pool.stop()

    def _said(self, slot: int, facts: Mapping[str, Any]) -> None:
        if self._display is not None:
            self._display.said(slot, facts)


class _Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: processes ended, the terminal as it was."""

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def plan(
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    results: Results = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show cells and jobs: done, to do, and skipped with the reason. Runs nothing."""
    from bench import execute, tables
    from bench.costs import Costs
    from bench.manifest import write

    crossed, store, manifest = planned(suite, results, data_root)
    keys = _keys(manifest, table)
    wanted = {job for key in keys for job in tables.jobs(manifest, key)} if table else None
    _open(store)
    write(store, manifest)
    state = execute.examine(crossed, store, wanted, verify=False)
    costs = Costs()
    _learn(costs, crossed, store)
    seconds = sum(costs.seconds(job) for job in state.todo) if costs.informed else None
    if as_json:
        graph = crossed.graph()
        todo = {job.key for job in state.todo}
        sys.stdout.write(
            json.dumps(
                {
                    **manifest,
                    "jobs": [
                        {
                            "kind": job.kind,
                            "key": job.key,
                            "needs": [each.key for each in needs],
                            "state": "to do"
                            if job.key in todo
                            else "done"
                            if store.receipt(job.kind, job.key)
                            else "not needed",
                            "seconds": round(costs.seconds(job), 1),
                        }
                        for job, needs in graph.items()
                    ],
                },
                indent=1,
            )
            + "\n"
        )
        return
    _show_plan(_console(), crossed, store, state, seconds)


@app.command()
def report(
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    results: Results = None,
    form: Annotated[
        Literal["text", "markdown", "csv", "latex", "json", "svg", "png"],
        typer.Option("--format", help="svg and png draw the tables that are curves."),
    ] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="A file to write to.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="What the attacks took, in passes and time, in place of tables.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with 4 where a number is missing, damaged or stale."),
    ] = False,
) -> None:
    """Print tables from what is stored; plans nothing and computes nothing."""
    from bench import render, tables
    from bench.manifest import Outcomes, aged, read, stale

    root = results or Path("results") / suite.stem
    manifest = read(root, suite)
    console = _console()
    outcomes = Outcomes(root)
    if cost:
        keys = _keys(manifest, table) if table else None
        try:
            _report_cost(manifest, root, outcomes, keys, form, out)
        finally:
            for sentence in _damages(manifest, outcomes, suite):
                _say(_console(stderr=True), f"note: {sentence}", "yellow")
        return
    grids = [tables.cut(manifest, key, outcomes) for key in _keys(manifest, table)]
    notes = stale(manifest, suite) or ([aged(outcomes.changed, suite)] if outcomes.changed else [])
    notes += _damages(manifest, outcomes, suite)
    for sentence in notes:
        _say(_console(stderr=True), f"note: {sentence}", "yellow")
    if form == "text" and out is None:
        for grid in grids:
            _print(console, grid)
    elif form == "svg" or form == "png":
        if out is None or len(grids) != 1:
            raise InputError(f"--format {form} draws one table (--table KEY) into a file (--out FILE)")
        render.draw(grids[0], out)
    elif out is None:
        sys.stdout.write(render.joined(grids, form))
    else:
        _write_out(out, render.joined(grids, form))
    needed = {job for key in _keys(manifest, table) for job in tables.jobs(manifest, key)}
    missing = sum(outcomes(job) is None for job in needed)
    if strict and (missing or notes):
        said = f"strict: {missing} of {_count(len(needed), 'result')} missing, {_count(len(notes), 'note')}"
        _say(_console(stderr=True), said, "red")
        raise typer.Exit(4)


@app.command("list")
def list_(
    what: Annotated[Literal["attacks", "defenses", "data"], typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """List what is registered, with everything that a suite may say of it."""
    from bench import catalogue

    entries = catalogue.entries(what)
    if as_json:
        sys.stdout.write(json.dumps(entries, indent=1) + "\n")
    else:
        catalogue.show(_console(), entries)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="A file to write to.")] = None,
) -> None:
    """Print the JSON Schema of a task file, for editors that complete and check it."""
    from bench import catalogue

    text = json.dumps(catalogue.suite_schema(), indent=1) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        _write_out(out, text)


def main() -> None:
    """Run the command line: what a person can mend ends with one message and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        readable(stream)
    try:
        app()
    except BenchError as error:
        _say(_console(stderr=True), f"error: {error}", "red")
        sys.exit(2)
    except BrokenPipeError:
        # `bench report | head`: the reader has seen enough.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A folder that may not be written, a name that is a file, a disk that is full.
        what = persons(error) or f"{error.filename or 'a file'}: {error.strerror or error}"
        _say(_console(stderr=True), f"error: {what}", "red")
        sys.exit(2)


def entry() -> None:
    """Be the program `bench`: what users' code left running or registered decides neither end nor status."""
    if sys.argv[1:2] == ["run"] and "PYTHONHASHSEED" not in os.environ:
        # The order of sets must not differ from process to process; it is set before Python starts.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    leave = os._exit
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if any(word.endswith("inline") for word in sys.argv):
        # What ran here may have registered more to be done at the end, or threads that never end.
        leave(status)
    sys.exit(status)


def _report_cost(
    manifest: Mapping[str, Any],
    root: Path,
    outcomes: Outcomes,
    keys: list[str] | None,
    form: Literal["text", "markdown", "csv", "latex", "json", "svg", "png"],
    out: Path | None,
) -> None:
    """Print what the attacks took, of the named tables or of the whole suite."""
    from bench import attack_cost, tables
    from bench.store import Store

    if form == "latex" or form == "svg" or form == "png":
        raise InputError(f"--format {form}: costs are written as text, markdown, csv or json")
    store = Store(root)
    jobs = None if keys is None else {job for key in keys for job in tables.jobs(manifest, key)}
    costs = attack_cost.spent(manifest, outcomes, lambda key: store.receipt("evaluate", key), jobs)
    if not costs:
        raise InputError(f"{root}: nothing was attacked there yet: bench run {manifest['file']}")
    if form == "text" and out is None:
        _console().print(attack_cost.text(costs))
    elif out is None:
        sys.stdout.write(attack_cost.written(costs, form))
    else:
        _write_out(out, attack_cost.written(costs, form))


# --- helpers -----------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    class Unbroken(Console):
        def on_broken_pipe(self) -> None:
            """Go on unheard: whoever read has seen enough, and the exit status is still to come."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # What is printed are names and messages of other people's: none is markup.
    return Unbroken(stderr=stderr, markup=False, emoji=False)


def planned(path: Path, results: Path | None, data_root: Path | None) -> tuple[Plan, Store, dict[str, Any]]:
    """Read and check a suite and its tables; return its plan, its store and its manifest."""
    from unicodedata import normalize

    from bench import plan as planning
    from bench import spec, tables
    from bench.store import Store

    suite = spec.load(path)
    crossed = planning.make(suite, data_root)
    manifest = crossed.manifest()
    names: dict[str, str] = {}
    for key in manifest["tables"]:
        # Some file systems take letters of either case for one, and an accent for its letter's part.
        folded = normalize("NFC", normalize("NFKD", _file_name(key)).casefold())
        if (other := names.setdefault(folded, key)) != key:
            where = suite.document.line("tables", key)
            raise InputError(f"{where}: tables {other!r} and {key!r} would be written to one file")
        try:
            tables.check(manifest, key)
        except InputError as error:
            raise InputError(f"{suite.document.line('tables', key)}: {error}") from None
    return crossed, Store(results or Path("results") / suite.name), manifest


def _open(store: Store) -> None:
    """Open a results folder, and say what lay in the way."""
    for sentence in store.open():
        _say(_console(stderr=True), f"note: {sentence}", "yellow")


def _keys(manifest: Mapping[str, Any], asked: list[str] | None) -> list[str]:
    from bench.errors import did_you_mean

    for key in asked or ():
        if key not in manifest["tables"]:
            raise InputError(
                f"--table {key}: {manifest['suite']} has no such table{did_you_mean(key, manifest['tables'])}"
            )
    return asked or list(manifest["tables"])


def _learn(costs: Any, plan: Plan, store: Store) -> None:
    for job in plan.graph():
        receipt = store.receipt(job.kind, job.key)
        if receipt:
            costs.learn(job, receipt)


def _cell_name(coordinates: Mapping[str, Any]) -> str:
    through = f"/{coordinates['view']}" if coordinates["view"] else ""
    radius = f" at {coordinates['radius']:g}" if coordinates["radius"] is not None else ""
    victim = f"{coordinates['defense']}/{coordinates['readout']}"
    return f"{coordinates['attack']}{through} on {victim}, seed {coordinates['seed']}{radius}"


def _damages(manifest: Mapping[str, Any], outcomes: Outcomes, suite: Path) -> list[str]:
    """Return a sentence for each damaged result that a report asked for."""
    from bench.conditions import conditions_of

    names = {each.job: _cell_name(each.coordinates) for each in conditions_of(manifest)}
    return [
        f"evaluate {key} ({names[key]}): {reason}; make it again with: bench run {suite}"
        for key, reason in outcomes.damaged.items()
    ]


def _say(console: Any, text: str, style: str = "") -> None:
    """Print a sentence as it is, however long."""
    console.print(shown(text), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _say_state(console: Any, plan: Plan, store: Store, state: State) -> None:
    from collections import Counter

    from bench.plan import Train

    ready = sum(cell.job in state.done for cell in plan.cells)
    todo, skips = _count(len(state.todo), "job"), len(plan.skips)
    cells = _count(len(plan.cells), "cell")
    _say(console, f"{plan.suite.path.name}: {cells}, {ready} done, {todo} to do, {skips} skipped")
    for reason, count in Counter(state.redo.values()).items():
        _say(console, f"again: {_count(count, 'stored result')}: {reason}")
    kept = state.kept - state.done
    if kept and state.todo:
        _say(console, f"goes on from {_count(len(kept), 'stored job')} of an earlier run")
    for job in state.todo:
        if isinstance(job, Train) and store.begun(job.key):
            name = f"{job.defense.name}, seed {job.seed}"
            _say(console, f"goes on with the training of {name}, from its last epoch")


def _say_stopped(console: Any, plan: Plan, store: Store, wanted: set[str] | None) -> None:
    """Say what is kept, and the command that goes on: the one that was given."""
    from shlex import join

    from bench import execute

    state = execute.examine(plan, store, wanted, verify=False)
    every = len(plan.graph())
    kept = f"{every - len(state.todo)} of {_count(every, 'job')}"
    epochs = sum(store.begun(job.key) for job in state.todo)
    if epochs:
        kept += f" and the last epoch of {_count(epochs, 'training')}"
    _say(console, f"stopped; {kept} kept in {store.shown}. Go on with: {join(['bench', *sys.argv[1:]])}")


def _exit_for(console: Any, plan: Plan, store: Store, wanted: set[str] | None, failures: list[Done]) -> None:
    """End with 0 only if every condition that was asked for has its number."""
    from bench import execute

    holes = sum(
        (wanted is None or cell.job.key in wanted) and cell.job not in state.done
        for state in [execute.examine(plan, store, wanted, trust=True, verify=False)]
        for cell in plan.cells
    )
    if failures:
        failed = _count(len(failures), "job")
        _say(
            console,
            f'{failed} failed: what needs them reads "not run"; tracebacks in {store.shown / "failed"}',
        )
        raise typer.Exit(2 if all(persons(done.error) for done in failures if done.error) else 4)
    if holes:
        _say(console, f"{_count(holes, 'cell')} of those that were asked for have no number")
        raise typer.Exit(4)


def _show_plan(console: Any, plan: Plan, store: Store, state: State, seconds: float | None) -> None:
    from collections import Counter

    from rich.table import Table

    _say_state(console, plan, store, state)
    graph = plan.graph()
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("jobs", "all", "to do"):
        table.add_column(heading, justify="left" if heading == "jobs" else "right")
    every, todo = Counter(job.kind for job in graph), Counter(job.kind for job in state.todo)
    for kind in ("train", "craft", "evaluate"):
        table.add_row(kind, str(every[kind]), str(todo[kind]))
    console.print(table)
    if state.todo and seconds is not None:
        _say(console, f"about {_duration(seconds)} of work for one slot, judged by the receipts so far")
    reasons = Counter(skip.reason for skip in plan.skips)
    for reason, count in reasons.items():
        _say(console, f"skipped: {_count(count, 'cell')}: {reason}")
    # A defense's doubts begin with its name, whatever attacks it; an attack's are about itself.
    doubts = dict.fromkeys(
        doubt if doubt.startswith(f"{about['defense']}: ") else f"{about['attack']}: {doubt}"
        for about, facts in ((cell.coordinates, cell.facts) for cell in plan.cells)
        for doubt in facts["doubts"]
    )
    for doubt in doubts:
        _say(console, f"doubt: {doubt}")


def _write_tables(
    manifest: Mapping[str, Any], store: Store, outcomes: Outcomes, keys: list[str]
) -> list[RenderedTable]:
    from bench import render, tables

    grids = []
    for key in keys:
        grid = tables.cut(manifest, key, outcomes)
        name = store.root / "tables" / _file_name(key)
        store.write_text(name.with_name(name.name + ".csv"), render.to_csv(grid))
        store.write_text(name.with_name(name.name + ".md"), render.to_markdown(grid))
        grids.append(grid)
    return grids


def _file_name(key: str) -> str:
    return f"table-{key.replace('/', '-')}"


def _print(console: Any, grid: RenderedTable) -> None:
    from bench import render

    console.print(render.to_text(grid))


def _write_out(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None


def _commit() -> str | None:
    """Return the commit that this code is of, with a mark if it was changed since."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


if __name__ == "__main__":
    entry()

"""The command line. Each command imports what it needs itself, so that help and reports start at once."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from bench import startup
from bench.errors import BenchError, InputError, persons
from bench.escaping import readable
from bench.runner.executors import Name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.api.running import Project, Run
    from bench.gate.baseline import Accepted
    from bench.gate.verdicts import Check
    from bench.report.provenance import Source
    from bench.report.reports import Published
    from bench.report.tables import RenderedTable
    from bench.results.store import Store

F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="bench",
    help="Cross attacks with defenses, and print tables whose numbers can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(f"crossfire-bench {version('crossfire-bench')}\n")
        raise typer.Exit


@app.callback()
def bench(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Cross attacks with defenses, and print tables whose numbers can be trusted."""


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only what was asked for: no progress, no notes."),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more of what is done, and print the tracebacks of errors."),
]


class _Command(TyperCommand):
    """A command whose help has words for what is to be written, and no types of Python."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options as the documentation writes them: ``SUITE``, ``--table KEY``."""
        for heading, kind in (("Arguments", "argument"), ("Options", "option")):
            rows = []
            for each in self.get_params(ctx):
                record = each.get_help_record(ctx) if each.param_type_name == kind else None
                if record is not None:
                    name = str(each.metavar) if kind == "argument" else re.sub(r"<(\S+)>", r"\1", record[0])
                    rows.append((name, record[1]))
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage: what must be given without brackets, what may be left out in one pair."""
        return [re.sub(r"^\{(.*)\}$", r"\1", each) for each in super().collect_usage_pieces(ctx)]


def _command(group: typer.Typer, name: str | None = None) -> Callable[[F], F]:
    """Register a command that also takes --quiet and --verbose."""

    def register(function: F) -> F:
        @wraps(function)
        def called(*, quiet: bool, verbose: bool, **given: Any) -> Any:
            from bench.console import speak

            speak(quiet=quiet, verbose=verbose)
            return function(**given)

        added = {"quiet": Quiet, "verbose": Verbose}
        signature = inspect.signature(function)
        voices = [
            inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
            for each, hint in added.items()
        ]
        hints = get_type_hints(function, include_extras=True)
        kept = [
            each.replace(kind=each.KEYWORD_ONLY, annotation=hints[each.name])
            for each in signature.parameters.values()
        ]
        called.__signature__ = signature.replace(parameters=[*kept, *voices])  # type: ignore[attr-defined]
        called.__annotations__ = {**hints, **added}
        group.command(name, cls=_Command)(called)
        return function

    return register


SuitePath = Annotated[Path, typer.Argument(help="The task file.", metavar="SUITE")]
Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="The results folder (default: the file's `results:`, else results/<suite>).",
    ),
]
Tables = Annotated[
    list[str] | None, typer.Option("--table", metavar="KEY", help="A table's key; may be repeated.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", metavar="DIR", help="Where data sets lie (default: BENCH_DATA, else the user's cache)."
    ),
]
DEFAULT = Path("tasks.yaml")
BaselineDir = Annotated[Path, typer.Option("--baseline", metavar="DIR", help="The folder of the baseline.")]
Limit = Annotated[
    float, typer.Option("--limit", metavar="MIB", help="MiB that stored images may take.", min=0)
]
ROBUSTNESS = Path("robustness")
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda:0, ...; may be repeated (default: every GPU, else the CPU).",
    ),
]
Worst = Annotated[
    bool,
    typer.Option("--worst", help="Every attack of a row sees only what stood against those before it."),
]
SlotsOption = Annotated[
    str | None,
    typer.Option(
        "--slots",
        metavar="N",
        help="Jobs that share a device, or auto: as many on a GPU as it has time and memory for "
        "(default: one on a GPU, else one a core).",
    ),
]
ExecutorOption = Annotated[
    Literal["process", "inline"],
    typer.Option("--executor", help="A process for each device slot, or everything in this one."),
]
Trust = Annotated[
    bool, typer.Option("--trust-cache", help="Keep results whose component's source has changed since.")
]
FailOnGain = Annotated[
    bool, typer.Option("--fail-on-gain", help="A gain that is too good, or a new flag, ends with 1.")
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML there.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, for programs.")
]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write a comment for people there.")
]
Badge = Annotated[
    Path | None, typer.Option("--badge", metavar="FILE", help="Write a shields.io endpoint there.")
]
Format = Literal["text", "markdown", "csv", "latex", "json", "svg", "png", "pdf"]


@_command(app)
def run(  # noqa: PLR0913 - a command line's options
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    results: Results = None,
    executor: Annotated[
        Name,
        typer.Option("--executor", help="Processes here, everything in this one, or workers on a cluster."),
    ] = "process",
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="How many workers on the cluster.", min=1)
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm",
            metavar="NAME=VALUE",
            help="An option of Slurm, such as partition=gpu; may be repeated.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", metavar="HOST:PORT", help="A Ray cluster, or auto (default: one of its own)."
        ),
    ] = None,
    data_root: DataRoot = None,
    trust_cache: Trust = False,
    detached: Annotated[
        bool, typer.Option("--detach", help="Run in the background; see bench status and bench stop.")
    ] = False,
    worst: Worst = False,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Do what is worth most in this time (2h, 90min), whole rows first.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1 where a flag of a table is an alarm.")
    ] = False,
    again: Annotated[
        list[str] | None,
        typer.Option(
            "--again",
            metavar="DEFENSE[/ATTACK]",
            help="With an attack: attack and judge once more, whatever is stored; without: train once more, "
            "too. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do nothing; show what would be done, as bench plan does.")
    ] = False,
) -> None:
    """Train, attack and judge what is not done yet; print the tables.

    The tables are also written into the results folder. The same command goes on after a stop.
    """
    from bench.api import reading, running
    from bench.console import console, say
    from bench.report import reports
    from bench.runner import executors
    from bench.runner.budget import parse_duration
    from bench.runner.executors.protocol import Asked, slots_asked

    screen, seconds = _progress(), None if budget is None else parse_duration(budget)
    project = running.planned(suite, results, data_root, worst=worst)
    reports.asked_tables(project.manifest, table)
    _note(reading.remarks(project))
    if dry_run:
        _note(project.store.look())
        running.show_plan(console(), project, running.prospect(project, table))
        return
    start = executors.ready(
        executor, Asked(device, slots_asked(slots), workers, tuple(slurm or ()), ray_address)
    )
    _open(project.store)
    if again:
        say(screen, reading.again(project, again))
    if detached:
        _detach(project.store)
        return
    work = running.chosen(project, running.Options(start, data_root, trust_cache, screen), table, seconds)
    _work(work)
    cut, notes = work.tables()
    _print_tables(cut)
    _note(notes)
    _ended(work, f"; tables in {project.store.shown / 'tables'}")
    if strict:
        _refuse_alarms(cut)


def _work(work: Run) -> None:
    """Do the jobs of a run; Ctrl-C, SIGTERM and `bench stop` end it with a word."""
    from bench.console import say
    from bench.runner.interrupts import Terminated, terminable
    from bench.runner.scheduler import Stopped

    try:
        with terminable():
            work.do()
    except KeyboardInterrupt as stop:
        say(work.console, work.stopped(["bench", *sys.argv[1:]]))
        raise typer.Exit(143 if isinstance(stop, Terminated | Stopped) else 130) from None


def _ended(work: Run, more: str = "") -> None:
    """Say what was done and what failed; end with 2 or 4 where something is missing."""
    from bench.console import console, count, duration, say, voice

    screen, shown = work.console, work.store.shown
    others = len(work.ended) - work.here
    done = f"{count(work.here, 'job')} done in {duration(time.monotonic() - work.begun)}"
    say(screen, done + (f", and {others} by other workers" if others else "") + more)
    loud = screen or console(stderr=True)
    if voice().verbose:
        for each in work.failures:
            say(loud, "".join(traceback.format_exception(each.error)).rstrip())
    checks = [each for each in work.failures if each.job.kind in ("trial", "examination")]
    if checks:
        failed = count(len(checks), "trial or examination", "trials and examinations")
        say(loud, f"{failed} failed: the rows are without this evidence; tracebacks in {shown / 'failed'}")
    if len(work.failures) > len(checks):
        failed = count(len(work.failures) - len(checks), "job")
        say(loud, f'{failed} failed: what needs them reads "not run"; tracebacks in {shown / "failed"}')
        raise typer.Exit(2 if work.mendable() else 4)
    if holes := work.holes():
        say(
            screen or console(stderr=True),
            f"{count(holes, 'cell')} of those that were asked for have no number",
        )
        raise typer.Exit(4)


def _detach(store: Store) -> None:
    """Start the same command in the background."""
    from bench.api import working
    from bench.console import console, say

    words = [each for each in sys.argv[1:] if each != "--detach"]
    process, log = working.detach(words, store.root)
    if process is None:
        say(console(), f"it has ended already; what it printed: {log}")
        return
    say(console(), f"runs in the background as process {process}; it prints to {log}")
    say(console(), f"see bench status {store.shown} --watch; end it with bench stop {store.shown}")


ResultsPath = Annotated[Path, typer.Argument(help="The results folder.", metavar="RESULTS")]


@_command(app)
def worker(
    results: ResultsPath,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    executor: ExecutorOption = "process",
    data_root: DataRoot = None,
) -> None:
    """Help with the run of a results folder until nothing is left.

    The run was started by `bench run`, on this machine or on another that shares the folder.
    """
    from bench.api import running, working
    from bench.runner import executors
    from bench.runner.executors.protocol import Asked, slots_asked

    options = running.Options(
        executors.ready(executor, Asked(device, slots_asked(slots))), data_root, console=_progress()
    )
    work = working.helper(results, options)
    _work(work)
    _ended(work)


@_command(app)
def status(
    results: ResultsPath,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show who is at work in a results folder, and what is left.

    Runs and workers on this machine and on others.
    """
    from bench.api import working
    from bench.console import console

    _refuse_no_folder(results)
    if as_json:
        sys.stdout.write(json.dumps(working.status(results), indent=1) + "\n")
    elif watch:
        working.watch(console(), results)
    else:
        working.show_status(console(), working.status(results))


@_command(app)
def stop(
    results: ResultsPath,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", help="Seconds to wait for them to stop.", min=0)
    ] = 60,
) -> None:
    """Ask every run and worker at a results folder to stop.

    What is finished is kept.
    """
    from bench.api import working
    from bench.console import console, say

    _refuse_no_folder(results)
    if left := working.stop(results, wait):
        say(console(), f"asked to stop, and not yet stopped: {', '.join(left)}")
        raise typer.Exit(4)
    say(console(), "stopped; the same command goes on")


def _refuse_no_folder(results: Path) -> None:
    if not results.is_dir():
        raise InputError(f"{results}: there is no such results folder")


@_command(app)
def plan(  # noqa: PLR0913 - a command line's options
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    results: Results = None,
    data_root: DataRoot = None,
    worst: Worst = False,
    cells: Annotated[bool, typer.Option("--cells", help="A line for each condition, with its key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show what is done, to do and skipped, and what it costs.

    Conditions and jobs, why some are skipped, and costs as far as receipts say.

    Runs nothing. With --device it asks each network a few times there (at most about 10 s), and says when
    everything would be done.
    """
    from bench.api import reading, running
    from bench.console import console, say
    from bench.report import reports
    from bench.runner import executors
    from bench.runner.executors.protocol import Asked, slots_asked

    asked = Asked(device, slots_asked(slots))
    start = executors.ready("process", asked) if device or slots else None
    project = running.planned(suite, results, data_root, worst=worst)
    reports.asked_tables(project.manifest, table)
    _note(project.store.look())
    found = running.prospect(project, table, start and running.Options(start, data_root))
    if as_json:
        sys.stdout.write(json.dumps(running.described(project, found), indent=1) + "\n")
    elif cells:
        screen = console()
        for line in reading.cells(project, found.state):
            say(screen, line)
    else:
        running.show_plan(console(), project, found)
    _note(reading.remarks(project))


@_command(app)
def report(  # noqa: PLR0913 - a command line's options
    suite: SuitePath = DEFAULT,
    table: Tables = None,
    results: Results = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="svg, png and pdf draw the tables that are curves."),
    ] = "text",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A file to write to.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="What the attacks took, in passes and time, in place of tables.")
    ] = False,
    rejection: Annotated[
        bool,
        typer.Option(
            "--rejection", help="What read-outs refuse, and what their scores tell, in place of tables."
        ),
    ] = False,
    rounded: Annotated[
        bool,
        typer.Option(
            "--rounded", help="Ask the defenses again about images rounded to 8 bits, in place of tables."
        ),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="What papers printed beside ours, in place of tables.")
    ] = False,
    paper: Annotated[
        list[str] | None,
        typer.Option(
            "--paper",
            metavar="KEY",
            help="A paper's table to compare with, such as cnnf/3, or a paper; may be repeated "
            "(default: those that resemble ours).",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with 4 if a number is missing, damaged or stale, 1 at an alarm."),
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Print tables from what is stored.

    Plans nothing and computes nothing, except with --rounded.
    """
    from bench.console import console, count, say
    from bench.report import render, reports
    from bench.suite.places import results_folder

    root = results_folder(suite, results)
    if sum((cost, rejection, rounded, published or bool(paper))) > 1:
        raise InputError(
            "--cost, --rejection, --rounded and --published are reports of their own: ask for one of them"
        )
    if data_root is not None and not rounded:
        raise InputError("--data-root: goes with --rounded, the only report that asks a defense")
    if rounded:
        _report_rounded(root, suite, table, form, out, data_root)
        return
    if rejection:
        _report_rejection(root, suite, table, form, out)
        return
    if cost:
        _report_cost(root, suite, table, form, out)
        return
    if published or paper:
        _report_published(reports.published(root, suite, table, paper), paper, form, out)
        return
    found = reports.reported(root, suite, table)
    _note(found.notes)
    if form == "text" and out is None:
        _print_tables(found.tables)
    elif form == "svg" or form == "png" or form == "pdf":
        if out is None or len(found.tables) != 1:
            raise InputError(f"--format {form} draws one table (--table KEY) into a file (--out FILE)")
        render.draw(found.tables[0], out)
        _keep(found.source, out, form)
    else:
        _write_out(render.joined(found.tables, form), out)
        _keep(found.source, out, form)
    if strict and (found.missing or found.notes):
        missing, notes = count(found.needed, "result"), count(len(found.notes), "note")
        say(console(stderr=True), f"strict: {found.missing} of {missing} missing, {notes}", "red")
        raise typer.Exit(4)
    if strict:
        _refuse_alarms(found.tables)


Row = Annotated[
    str | None, typer.Option("--row", metavar="LABEL", help="Its row: the label, or a part of it.")
]
Heading = Annotated[
    str | None, typer.Option("--column", metavar="HEADING", help="Its column: the heading, or a part of it.")
]
Number = Annotated[str | None, typer.Option("--table", metavar="KEY", help="The key of its table.")]
Where = Annotated[Path, typer.Argument(help="The task file, or a results folder.", metavar="SUITE")]


@_command(app)
def show(  # noqa: PLR0913 - a command line's options
    suite: Where = DEFAULT,
    table: Number = None,
    row: Row = None,
    column: Heading = None,
    results: Results = None,
    data_root: DataRoot = None,
    rounded: Annotated[
        bool, typer.Option("--rounded", help="Also ask the defense about its images, rounded to 8 bits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show what stands behind a number of a table.

    Settings, outcomes and receipts, and where its images lie.
    """
    from bench.console import console, say
    from bench.report import behind

    root, suite = _folder(suite, results)
    found = behind.behind(root, suite, behind.Asked(table, row, column))
    left = []
    if rounded:
        from bench.api import rounding

        left = list(rounding.rounded(found, suite if suite.is_file() else None, data_root))
    if as_json:
        told = behind.described(found) | ({"rounded": [each._asdict() for each in left]} if rounded else {})
        sys.stdout.write(json.dumps(told, indent=1, default=str) + "\n")
        return
    screen = console()
    for line in (*behind.said(found), *(["", *map(str, left)] if left else [])):
        say(screen, line)


@_command(app)
def images(  # noqa: PLR0913 - a command line's options
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="A picture (.png, .svg, .pdf), or arrays (.npz).")
    ],
    suite: Where = DEFAULT,
    table: Number = None,
    row: Row = None,
    column: Heading = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="NAME=VALUE", help="A coordinate, such as seed=0; may be repeated."),
    ] = None,
    most: Annotated[
        int, typer.Option("--most", metavar="N", help="Examples in a picture.", min=1, max=100)
    ] = 8,
    results: Results = None,
    data_root: DataRoot = None,
) -> None:
    """Write the images behind a number of a table.

    Clean, as they were shown to the defense, and the difference.
    """
    from bench.api import reading, stored
    from bench.console import console, say
    from bench.report.behind import Asked

    root, suite = _folder(suite, results)
    given = dict(_pair(each) for each in where or ())
    asked = Asked(table, row, column)
    wanted: dict[str, Any] = given
    if not given or any(asked):
        wanted = reading.coordinates(root, suite, asked, given)
    shown = stored.shown(root, wanted, data_root, suite if suite.is_file() else None)
    say(console(), reading.keep_images(shown, out, most))


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--where {text}: expected NAME=VALUE, such as seed=0")
    return name, int(value) if value.isdigit() else value


def _folder(suite: Path, results: Path | None) -> tuple[Path, Path]:
    """Return the results folder of a task file, and the file; or a results folder and its usual file."""
    from bench.suite.places import results_folder

    if suite.is_dir() and results is None:
        return suite, Path(f"{suite.resolve().name}.yaml")
    return results_folder(suite, results), suite


def _print_tables(tables: Iterable[RenderedTable]) -> None:
    """Print tables on a terminal as it is wide, and into a pipe or a file as wide as they are."""
    from bench.console import console
    from bench.report import render

    screen = console()
    for each in tables:
        if screen.is_terminal:
            screen.print(render.to_text(each))
        else:
            sys.stdout.write(render.joined([each], "text"))


def _refuse_alarms(tables: Iterable[RenderedTable]) -> None:
    """End with 1 where a flag is an alarm."""
    from bench.console import console, count, say

    alarms = {(table.key, code): None for table in tables for code in table.alarms}
    if alarms:
        said = ", ".join(f"{code} in table {key}" for key, code in alarms)
        say(console(stderr=True), f"strict: {count(len(alarms), 'alarm')}: {said}", "red")
        raise typer.Exit(1)


@_command(app)
def verify(
    where: Annotated[
        Path,
        typer.Argument(
            help="The task file; or a results folder, a folder of such, or the manifest beside a table.",
            metavar="WHERE",
        ),
    ] = DEFAULT,
    results: Results = None,
    data_root: DataRoot = None,
) -> None:
    """Read every stored result, and rebuild every table from them.

    Reads whatever was read before, too, and compares tables bit for bit.
    Ends with 4 if a result is damaged, or a table is not what the outcomes say.
    """
    from bench.api import verifying
    from bench.console import console, say

    found = verifying.verified(where, results, data_root)
    for sentence in found.wrong:
        say(console(), sentence, "red")
    _note(found.notes)
    for sentence in found.whole:
        say(console(), sentence)
    if found.wrong:
        raise typer.Exit(4)


@_command(app)
def pack(
    results: Annotated[Path, typer.Argument(help="The results folder.", metavar="RESULTS")],
) -> None:
    """Pack evaluations into two files, to be committed.

    Leaves out columns that no table reads.
    """
    from bench.api import packing
    from bench.console import console, count, say

    found = packing.packed(results)
    _note(found.notes)
    sizes = ", ".join(f"{name} ({size / 1e6:.2f} MB)" for name, size in found.sizes.items())
    say(console(), f"{count(found.evaluations, 'evaluation')} packed in {results}: {sizes}")


baseline_app = typer.Typer(help="Keep results as the baseline of `bench check`.", no_args_is_help=True)
app.add_typer(baseline_app, name="baseline")


@_command(baseline_app, "save")
def baseline_save(
    suite: SuitePath = DEFAULT,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder of the baseline.")
    ] = ROBUSTNESS,
    results: Results = None,
    data_root: DataRoot = None,
    limit: Limit = 8.0,
) -> None:
    """Keep the results of a task file as its baseline.

    Every example's outcome, and stored images.
    """
    from bench.api import checking, running

    project = running.planned(suite, results, data_root)
    _open(project.store)
    _told(out, *checking.save(project, out, limit=limit))


@_command(baseline_app, "accept")
def baseline_accept(
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why the numbers may be others.")],
    suite: SuitePath = DEFAULT,
    baseline: BaselineDir = ROBUSTNESS,
    results: Results = None,
    data_root: DataRoot = None,
    limit: Limit = 8.0,
) -> None:
    """Make today's results the baseline.

    The old numbers stay in its history, with the reason.
    """
    from bench.api import checking, running

    project = running.planned(suite, results, data_root)
    _open(project.store)
    _told(baseline, *checking.accept(project, baseline, reason, limit=limit))


def _told(out: Path, accepted: Accepted, sizes: Mapping[str, int]) -> None:
    """Say what a baseline holds."""
    from bench.console import console, say

    screen = console()
    for name, (value, n) in accepted.numbers.items():
        say(screen, f"{name}: {100 * value:.1f} % of {n:.0f}")
    files = ", ".join(f"{name} ({size / 2**20:.2f} MiB)" for name, size in sizes.items())
    say(screen, f"baseline in {out}: {files}; commit it")


@_command(app)
def check(  # noqa: PLR0913 - a command line's options
    suite: SuitePath = DEFAULT,
    baseline: BaselineDir = ROBUSTNESS,
    replay: Annotated[
        bool, typer.Option("--replay", help="Show the stored images alone: seconds, and no attack.")
    ] = False,
    fail_on_gain: FailOnGain = False,
    device: DeviceOption = None,
    slots: SlotsOption = None,
    results: Results = None,
    executor: ExecutorOption = "process",
    data_root: DataRoot = None,
    trust_cache: Trust = False,
    junit: Junit = None,
    json_: Json = None,
    markdown: Markdown = None,
    badge: Badge = None,
) -> None:
    """Compare today's robustness with a baseline's.

    Example by example. Ends with 0 where it held, 1 regressed, 3 not comparable, 4 incomplete, 5 undecided.
    """
    from bench.api import checking, running
    from bench.console import console, say, voice
    from bench.runner import executors
    from bench.runner.executors.protocol import Asked, slots_asked
    from bench.runner.interrupts import Terminated, terminable
    from bench.runner.scheduler import Stopped

    written = Written(junit, json_, markdown, badge)
    screen = None if voice().quiet else console(stderr=True)
    written.refuse_nowhere()
    project = running.planned(suite, results, data_root)
    start = executors.ready(executor, Asked(device, slots_asked(slots)))
    _open(project.store)
    options = running.Options(start, data_root, trust_cache, screen)
    try:
        with terminable():
            found = checking.check(project, baseline, options, replay_only=replay)
    except KeyboardInterrupt as stop:
        say(screen, "stopped; what was done is kept, and the same command goes on")
        raise typer.Exit(143 if isinstance(stop, Terminated | Stopped) else 130) from None
    _checked(found, suite, written, fail_on_gain=fail_on_gain)


@_command(app)
def doctor(  # noqa: PLR0913 - a command line's options
    suite: SuitePath = DEFAULT,
    defense: Annotated[
        list[str] | None, typer.Option("--defense", metavar="NAME", help="A defense's name; may be repeated.")
    ] = None,
    results: Results = None,
    data_root: DataRoot = None,
    images: Annotated[
        int, typer.Option("--images", metavar="N", help="How many images of each.", min=12)
    ] = 48,
    limit: Annotated[
        float, typer.Option("--limit", metavar="SECONDS", help="Seconds for each defense.", min=1)
    ] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Add what rows need for a better grade, run it, and grade again."),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TIME", help="With --fix: what fits into this time (10min, 2h)."),
    ] = None,
) -> None:
    """Examine defenses for what makes robustness look too good.

    Asks trained defenses, and says of each finding what it means.
    Ends with 1 where something weighs more than a note, with 2 where a defense cannot be examined.
    """
    from bench.api import doctoring, running
    from bench.console import console

    project = running.planned(suite, results, data_root)
    _refuse_no_folder(project.store.shown)
    if fix:
        _refuse_beside(
            "--fix",
            {"--defense": bool(defense), "--images": images != 48, "--limit": limit != 40, "--json": as_json},
        )
        _fix(project, data_root, budget)
        return
    _refuse_beside("an examination alone", {"--budget": budget is not None})
    screen = None if as_json else console()
    try:
        found = doctoring.report(project, defense, data_root, (images, limit), screen)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(json.dumps(doctoring.described(found), indent=1) + "\n")
    if any(each.findings.failed for each in found):
        raise typer.Exit(2)
    if any(each.findings.codes for each in found):
        raise typer.Exit(1)


def _refuse_beside(what: str, given: Mapping[str, bool]) -> None:
    """Refuse options that mean nothing beside what is asked for."""
    if wrong := [name for name, there in given.items() if there]:
        raise InputError(f"{', '.join(wrong)}: goes without {what}")


def _fix(project: Project, data_root: Path | None, budget: str | None) -> None:
    """Add what rows need for a better grade, run it, and print the tables."""
    from bench.api import fixing, running
    from bench.console import say
    from bench.runner import executors
    from bench.runner.budget import parse_duration
    from bench.runner.executors.protocol import Asked

    seconds, screen = None if budget is None else parse_duration(budget), _progress()
    _open(project.store)
    for sentence in fixing.add(project):
        say(screen, sentence)
    project = running.planned(project.plan.suite.path, project.store.shown, data_root)
    say(screen, fixing.summary(project))
    start = executors.ready("process", Asked())
    work = running.chosen(project, running.Options(start, data_root, console=screen), None, seconds)
    _work(work)
    cut, notes = work.tables()
    _print_tables(cut)
    _note(notes)
    _ended(work, f"; tables in {project.store.shown / 'tables'}")


@_command(app)
def compare(  # noqa: PLR0913 - a command line's options
    before: Annotated[Path, typer.Argument(help="A results folder.", metavar="BEFORE")],
    after: Annotated[Path, typer.Argument(help="Another results folder.", metavar="AFTER")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="POINTS", help="Points of accuracy.", min=0, max=100)
    ] = 1.0,
    alpha: Annotated[
        float, typer.Option("--alpha", metavar="LEVEL", help="The level of significance.", min=1e-9, max=0.5)
    ] = 0.01,
    fail_on_gain: FailOnGain = False,
    junit: Junit = None,
    json_: Json = None,
    markdown: Markdown = None,
    badge: Badge = None,
) -> None:
    """Compare two results folders, example by example.

    By the statistics of `bench check`, and with its statuses.
    """
    from bench.gate.compare import compare as compared
    from bench.suite.policy import Policy

    written = Written(junit, json_, markdown, badge)
    written.refuse_nowhere()
    found = compared(before, after, Policy(tolerance=tolerance, alpha=alpha))
    _checked(found, None, written, fail_on_gain=fail_on_gain)


@_command(app)
def history(
    baseline: BaselineDir = ROBUSTNESS,
    form: Annotated[
        Literal["text", "markdown", "csv", "json", "svg", "png"],
        typer.Option("--format", help="svg and png draw the curves."),
    ] = "text",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A file to write to.")] = None,
) -> None:
    """Show the accuracy at every accepted baseline.

    Each with its interval, and why it was accepted.
    """
    from bench.console import console
    from bench.gate import baseline as folder
    from bench.gate import history as told

    found = folder.read(baseline)
    if form == "svg" or form == "png":
        if out is None:
            raise InputError(f"--format {form} draws into a file: --out FILE")
        told.draw(found, out, form)
    elif form == "text" and out is None:
        console().print(told.to_text(found))
    else:
        _write_out(told.written(found, form), out)


class Written(NamedTuple):
    """Where the forms of a check are written."""

    junit: Path | None
    json: Path | None
    markdown: Path | None
    badge: Path | None

    def refuse_nowhere(self) -> None:
        """Raise before any work where a form cannot be written in the end."""
        for name, path in self._asdict().items():
            if path is not None and not path.parent.is_dir():
                raise InputError(f"--{name} {path}: no such folder: {path.parent}")


def _checked(found: Check, suite: Path | None, written: Written, *, fail_on_gain: bool) -> None:
    """Print a check, write its other forms, and end with its status."""
    from bench.console import console
    from bench.gate import render

    status = found.status(fail_on_gain=fail_on_gain)
    console().print(render.to_text(found, fail_on_gain=fail_on_gain))
    if written.junit is not None:
        _write_out(render.to_junit(found, fail_on_gain=fail_on_gain), written.junit)
    if written.json is not None:
        _write_out(render.to_json(found, status), written.json)
    if written.markdown is not None:
        _write_out(render.to_markdown(found, fail_on_gain=fail_on_gain), written.markdown)
    if written.badge is not None:
        _write_out(render.to_badge(found, fail_on_gain=fail_on_gain), written.badge)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(render.to_markdown(found, fail_on_gain=fail_on_gain, limit=render.SUMMARY))
    if os.environ.get("GITHUB_ACTIONS") == "true" and suite is not None:
        for line in render.to_annotations(found, str(suite), fail_on_gain=fail_on_gain):
            sys.stdout.write(line + "\n")
    raise typer.Exit(status)


@_command(app, "list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="attacks, defenses, data, metrics or views; or the name of one.", metavar="WHAT"),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="One of them, to be shown whole.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """List attacks, defenses, data, metrics or views; or show one.

    One is shown whole, with each of its parameters.
    """
    from bench.console import console
    from bench.suite import listing

    if what is None:
        raise InputError(f"bench list: say what: {', '.join(listing.LISTS)}; or the name of one of them")
    kind = next((each for each in listing.LISTS if each == what), None)
    if kind is None or name is not None:
        found = listing.named(name or what, kind if name is not None else None)
        if name is not None and kind is None:
            raise InputError(f"bench list {what}: expected {', '.join(listing.LISTS)}, found {what!r}")
        if as_json:
            sys.stdout.write(json.dumps(found, indent=1) + "\n")
        else:
            listing.explain(console(), found)
    elif as_json:
        sys.stdout.write(json.dumps(listing.entries(kind), indent=1) + "\n")
    else:
        listing.show(console(), listing.entries(kind), kind)


@_command(app)
def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="The code of a flag or of a finding, or a word of the glossary.", metavar="CODE"),
    ] = None,
) -> None:
    """Say what a flag, a finding or a word means, and what to do.

    Flags stand below tables, findings are of `bench doctor`, and words are the glossary's. Without a code
    it lists all of them.
    """
    from rich.text import Text

    from bench import pages
    from bench.console import console, lay

    screen = console()
    if code is None:
        for heading, words in pages.grouped().items():
            lay(screen, Text(heading, style="bold"))
            lay(screen, ", ".join(words), 2)
        lay(screen, Text("what one of them means: bench explain CODE", style="dim"))
        return
    for entry in pages.explained(code):
        lay(screen, Text.assemble((entry.word, "bold"), (f", {entry.kind} (docs/{entry.page})", "dim"), "\n"))
        for line in pages.plain(entry.text):
            if line.startswith("|"):
                screen.print(Text(line.rstrip()), soft_wrap=True)
            else:
                lay(screen, line, hang=2 if line.startswith("- ") else 0)
        screen.print()


@_command(app)
def schema(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A file to write to.")] = None,
) -> None:
    """Print the JSON Schema of a task file.

    Editors complete and check a task file by it.
    """
    from bench.suite import listing

    _write_out(json.dumps(listing.suite_schema(), indent=1) + "\n", out)


def main() -> None:
    """Run the command line: what a person can mend ends with one message and exit status 2."""
    from bench.console import console, say, speak, voice

    speak(quiet=False, verbose=False)
    for stream in (sys.stdout, sys.stderr):
        readable(stream)
    try:
        app()
    except BenchError as error:
        if voice().verbose:
            say(console(stderr=True), traceback.format_exc().rstrip())
        say(console(stderr=True), f"error: {error}", "red")
        sys.exit(2)
    except BrokenPipeError:
        # `bench report | head`: the reader has seen enough.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A folder that may not be written, a name that is a file, a disk that is full.
        what = persons(error) or f"{error.filename or 'a file'}: {error.strerror or error}"
        say(console(stderr=True), f"error: {what}", "red")
        sys.exit(2)


def entry() -> None:
    """Be the program `bench`: what users' code left running or registered decides neither end nor status."""
    if sys.argv[1:2] in (["run"], ["check"], ["worker"]) and "PYTHONHASHSEED" not in os.environ:
        # The order of sets must not differ from process to process; it is set before Python starts.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    leave = os._exit
    startup.begin()
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


def _report_cost(root: Path, suite: Path, asked: list[str] | None, form: Format, out: Path | None) -> None:
    """Print what the attacks took, of the tables asked for or of the whole suite."""
    from bench.console import console
    from bench.report import attack_cost, reports

    if form == "latex" or form == "svg" or form == "png" or form == "pdf":
        raise InputError(f"--format {form}: costs are written as text, markdown, csv or json")
    found = reports.costs(root, suite, asked)
    _note(found.notes)
    if not found.costs:
        raise InputError(f"{root}: nothing was attacked there yet: bench run {found.file}")
    if form == "text" and out is None:
        console().print(attack_cost.text(found.costs))
    else:
        _write_out(attack_cost.written(found.costs, form), out)
        _keep(found.source, out, form, {"cost": True, "tables": asked or []})


def _keep(source: Source, out: Path | None, form: Format, options: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a file of tables beside it."""
    from bench.report import provenance

    if out is not None:
        provenance.keep(source, provenance.beside(out), {out: form}, options)


def _report_published(found: Published, paper: list[str] | None, form: Format, out: Path | None) -> None:
    """Print what papers printed beside ours."""
    from bench.console import console
    from bench.report.render import reconciled

    if form == "latex" or form == "svg" or form == "png" or form == "pdf":
        raise InputError(f"--format {form}: published numbers are written as text, markdown, csv or json")
    _note(found.notes)
    if form == "text" and out is None:
        console().print(reconciled.text(found.tables))
    else:
        _write_out(reconciled.written(found.tables, form), out)
        _keep(found.source, out, form, {"published": True, "paper": paper or []})


def _report_rounded(
    root: Path, suite: Path, asked: list[str] | None, form: Format, out: Path | None, data_root: Path | None
) -> None:
    """Print what is left of attacks where their images are rounded to 8 bits."""
    if form == "latex" or form == "svg" or form == "png" or form == "pdf":
        raise InputError(f"--format {form}: with --rounded expected text, markdown, csv or json")
    from bench.api.rounding import Asker
    from bench.console import console
    from bench.report import reports, rounding

    asker = Asker(root, suite if suite.is_file() else None, data_root)
    found = reports.rounded(root, suite, asked, asker)
    _note(found.notes)
    if form == "text" and out is None:
        console().print(rounding.text(found.cells))
    else:
        _write_out(rounding.written(found.cells, form), out)
        _keep(found.source, out, form, {"rounded": True})


def _report_rejection(
    root: Path, suite: Path, asked: list[str] | None, form: Format, out: Path | None
) -> None:
    """Print what is refused and what scores tell, of the tables asked for or of all that refuse."""
    from bench.console import console
    from bench.report import rejection, reports

    found = reports.rejections(root, suite, asked)
    _note(found.notes)
    if form == "svg" or form == "png" or form == "pdf":
        if out is None:
            raise InputError(f"--format {form} draws into a file: --out FILE")
        rejection.draw(found.judged, found.outcomes, out, form)
    elif form == "text" and out is None:
        console().print(rejection.text(found.judged, found.outcomes))
    else:
        _write_out(rejection.written(found.judged, found.outcomes, form), out)
        _keep(found.source, out, form, {"rejection": True, "tables": asked or []})


# --- helpers -----------------------------------------------------------------------------------------


def _open(store: Store) -> None:
    """Open a results folder, and say what lay in the way."""
    _note(store.open())


def _progress() -> Any | None:
    """Return where a run says what happens; nowhere with --quiet."""
    from bench.console import console, voice

    if voice().verbose:
        from bench.runner import progress

        progress.QUIET = 0
    return None if voice().quiet else console()


def _note(sentences: Iterable[str]) -> None:
    from bench.console import console, say, voice

    for sentence in () if voice().quiet else sentences:
        say(console(stderr=True), f"note: {sentence}", "yellow")


def _write_out(text: str, out: Path | None) -> None:
    """Write a text into a file, or print it where none is named."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None


if __name__ == "__main__":
    entry()

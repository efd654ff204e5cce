"""The door for Python to task files and results folders: what the command line does, as functions.

Each function imports what it needs itself: `table` and `outcomes` need no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bench.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import pandas as pd

    from bench.api.direct import Loaded
    from bench.api.stored import Shown
    from bench.report.table_frame import TableFrame
    from bench.runner.executors import Name as Executor
    from bench.runner.outstanding import State
    from bench.suite.jobs import Evaluate
    from bench.suite.planner import Plan

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Finished:
    """What a run left.

    Attributes:
        results: The results folder.
        tables: The tables that were asked for, by their keys.
        jobs: How many jobs were done; what was done before is not counted.
        failed: Why jobs failed, each in a sentence; tracebacks lie in the results folder.
        holes: How many of the conditions that were asked for have no number.
        notes: Sentences about results that are older than the code, and about what lay in the way.
    """

    results: Path
    tables: Mapping[str, TableFrame] = field(repr=False)
    jobs: int
    failed: tuple[str, ...]
    holes: int
    notes: tuple[str, ...]


def run(  # noqa: PLR0913 - the options of `bench run`
    suite: StrPath = "tasks.yaml",
    *,
    table: str | Sequence[str] | None = None,
    device: str | Sequence[str] | None = None,
    slots: int | Literal["auto"] | None = None,
    budget: str | float | None = None,
    results: StrPath | None = None,
    executor: Executor = "process",
    data_root: StrPath | None = None,
    trust_cache: bool = False,
    worst: bool = False,
    progress: bool = False,
) -> Finished:
    """Train, attack and judge what is not done yet, and write the tables: `bench run`.

    Jobs run in processes of their own, which do not see what the calling script or notebook has
    registered; a package's entry point, or ``executor="inline"``, makes it known.

    Args:
        suite: The task file.
        table: The key of a table, or several; None: all tables, and conditions that no table reads.
        device: ``cpu``, ``cuda:0``, ...; or several. None: every GPU, else every core.
        results: The results folder; None: what the file's ``results`` says, or ``results/<suite>``.
        slots: How many jobs share a device; ``auto``: as many on a GPU as it has time and memory for. None:
            one on a GPU, else one a core.
        budget: Seconds, or a text such as ``2h``: the run does what is worth most in it, whole rows of
            tables first. None: no limit.
        executor: ``process``: a process for each device slot; ``inline``: everything in this one; ``slurm``,
            ``ray``: workers on a cluster, as `bench run` has them without further options.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
        trust_cache: Whether results count whose component's source has changed since.
        worst: Whether every task runs in worst mode: each attack sees only what stood against those before
            it.
        progress: Whether to show on the terminal what happens, as the command line does.

    Returns:
        The tables, and what failed. A number that is missing is NaN in its table.

    Raises:
        InputError: What was given cannot be used, or each job that failed can be mended by the user.
    """
    from bench.api import running
    from bench.console import console
    from bench.report import reports
    from bench.report.table_frame import TableFrame
    from bench.runner import executors
    from bench.runner.budget import parse_duration
    from bench.runner.executors.protocol import Asked, slots_asked
    from bench.runner.titles import title

    number = slots_asked(None if slots is None else str(slots))
    seconds = parse_duration(budget) if isinstance(budget, str) else budget
    start = executors.ready(executor, Asked(_several(device), number))
    project = running.planned(
        _needed("suite", suite), _path("results", results), _path("data_root", data_root), worst=worst
    )
    asked = _several(table)
    reports.asked_tables(project.manifest, asked)
    if executor != "inline":
        _refuse_unknown_there(project.plan)
    notes = project.store.open()
    screen = console() if progress else None
    options = running.Options(start, _path("data_root", data_root), trust_cache, screen)
    with as_a_program():
        work = running.chosen(project, options, asked, seconds)
        work.do()
    cut, old = work.tables()
    if mendable := work.mendable():
        raise InputError(mendable[0])
    return Finished(
        results=project.store.shown,
        tables={each.key: TableFrame(each) for each in cut},
        jobs=work.here,
        failed=tuple(
            f"{title(done.job)}: {type(done.error).__name__}: {done.error}" for done in work.failures
        ),
        holes=work.holes(),
        notes=(*notes, *old),
    )


def _refuse_unknown_there(plan: Plan) -> None:
    """Raise where a plan needs what the calling script has registered: other processes do not know it."""
    from bench.registry import only_here
    from bench.suite.resolve import Resolved, inner

    for kind, named in (("attack", plan.suite.attacks), ("defense", plan.suite.defenses)):
        every = [each for each in named.values() if isinstance(each, Resolved)]
        inside = [part for each in every for part in inner(each)]
        for resolved in every + (inside if kind == "attack" else []):
            if only_here(resolved.entry):
                raise InputError(
                    f"{kind} {resolved.name!r} is registered in this process alone ({resolved.entry.place}), "
                    f'and jobs run in processes of their own: use executor="inline", or an installed package '
                    f"with an entry point (docs/own-{kind}.md)"
                )


@contextlib.contextmanager
def as_a_program() -> Iterator[None]:
    """Let processes start as those of `bench run` do.

    They must not run the caller's script again, which has no need of an ``if __name__ == "__main__"``, and
    the order of sets must be the same in each.
    """
    main, seed = sys.modules["__main__"], os.environ.get("PYTHONHASHSEED")
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.setdefault("PYTHONHASHSEED", "0")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if seed is None:
            del os.environ["PYTHONHASHSEED"]


class Outlook(NamedTuple):
    """What a task file asks for, and what of it is done."""

    conditions: pd.DataFrame
    """A row for each condition: its coordinates, ``n`` (examples), ``state`` (``done``, ``to do``,
    ``not asked for``, ``skipped``) and ``reason`` (why it is skipped)."""
    jobs: pd.DataFrame
    """A row for each job: ``kind``, ``key``, ``state`` (``done``, ``to do``, ``not needed``), ``seconds`` (an
    estimate)."""
    flags: tuple[str, ...]
    """Sentences about settings that cannot do what they seem to."""


def plan(
    suite: StrPath = "tasks.yaml",
    *,
    table: str | Sequence[str] | None = None,
    results: StrPath | None = None,
    data_root: StrPath | None = None,
    worst: bool = False,
) -> Outlook:
    """Return conditions and jobs of a task file: done, to do, and skipped with the reason; runs nothing.

    Args:
        suite: The task file.
        table: The key of a table, or several; None: all tables, and conditions that no table reads.
        results: The results folder; None: what the file's ``results`` says, or ``results/<suite>``.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
        worst: Whether every task is planned in worst mode: each attack sees only what stood against those
            before it.

    Raises:
        InputError: What was given cannot be used.
    """
    import pandas as pd

    from bench.api import running
    from bench.report import reports

    project = running.planned(
        _needed("suite", suite), _path("results", results), _path("data_root", data_root), worst=worst
    )
    asked = _several(table)
    reports.asked_tables(project.manifest, asked)
    project.store.look()
    found = running.prospect(project, asked)
    conditions = [
        {**condition.coordinates, "n": condition.facts["n"], "state": _state(condition.job, found.state)}
        for condition in project.plan.conditions
    ]
    conditions += [
        {**skip.coordinates, "state": "skipped", "reason": skip.reason} for skip in project.plan.skips
    ]
    return Outlook(
        pd.DataFrame(conditions),
        pd.DataFrame(running.described(project, found)["jobs"]).drop(columns="needs"),
        tuple(running.flags_of(project.plan)),
    )


def _state(job: Evaluate, state: State) -> str:
    if job in state.done:
        return "done"
    return "to do" if job in state.todo else "not asked for"


def table(results: StrPath, key: str) -> TableFrame:
    """Return a table of a results folder; nothing is planned and nothing is run.

    Args:
        results: The results folder, such as ``results/mnist``.
        key: The table's key in the task file.

    Returns:
        A data frame of the numbers, in the unit of their column (proportions in percent), NaN where there is
        none; with `to_markdown`, `figure` and `details`.

    Raises:
        InputError: The folder has no manifest, or the suite has no such table.
    """
    from bench.report.frames import read_table
    from bench.report.table_frame import TableFrame

    return TableFrame(read_table(_needed("results", results), str(key)))


def outcomes(results: StrPath, also: Collection[str] = ()) -> pd.DataFrame:
    """Return the outcomes of a results folder: a row for each example of each condition.

    Args:
        results: The results folder, such as ``results/mnist``.
        also: Columns of lists to read too: ``logits``, ``thresholds``. They are large.

    Returns:
        The coordinates of the condition, ``correct``, and the columns of `docs/results.md`.

    Raises:
        InputError: There is no manifest, or nothing was evaluated there yet.
    """
    from bench.report.frames import outcomes_frame

    return outcomes_frame(_needed("results", results), also)


def images(
    results: StrPath, *, data_root: StrPath | None = None, suite: StrPath | None = None, **where: Any
) -> Shown:
    """Return what a defense was shown under one condition, with the clean images, labels and answers.

    Args:
        results: The results folder of a run.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
        suite: The task file, where data are files beside it; None: it is looked for beside the results.
        **where: Coordinates of the condition: ``defense``, ``attack``, ``view``, ``readout``, ``radius`` (a
            number or a fraction), ``seed``, ... As many as tell it from the others.

    Returns:
        The images, the clean images, the labels and the answers, example by example; of an attack in worst
        mode, the examples that it broke.

    Raises:
        InputError: No condition or several are there, or its images are not kept there.
    """
    from bench.api import stored

    return stored.shown(
        _needed("results", results), where, _path("data_root", data_root), _path("suite", suite)
    )


def load(  # noqa: PLR0913 - what tells a fitted defense from the others
    results: StrPath,
    defense: str,
    seed: int = 0,
    *,
    data: str | None = None,
    inference: Mapping[str, Any] | None = None,
    device: str = "cpu",
    suite: StrPath | None = None,
    data_root: StrPath | None = None,
) -> Loaded:
    """Return a fitted defense of a results folder, from its stored weights.

    It is built as its task file says, and refused where its code has changed since it was fitted, or where
    it answers otherwise than it did then.

    Args:
        results: The results folder, such as ``results/mnist``.
        defense: What the task file calls the defense.
        seed: The seed of its training.
        data: The data set, as the task file calls it, that it is attacked on; None where there is one.
        inference: Its settings at inference time; None: the first that the task file names.
        device: ``cpu``, ``cuda:0``, ...
        suite: The task file; None: it is looked for beside the results, in the working directory and in
            ``suites/``.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.

    Returns:
        The defense in evaluation mode, with its views and read-outs; its parameters have no gradient.

    Raises:
        InputError: There is no such defense, or it is not fitted there, or it is another network by now.
    """
    from bench.api import stored

    wish = stored.Wish(defense, seed, data, dict(inference) if inference is not None else None, device)
    return stored.loaded(
        _needed("results", results), wish, _path("suite", suite), _path("data_root", data_root)
    )


def _path(name: str, given: StrPath | None) -> Path | None:
    return None if given is None else _needed(name, given)


def _needed(name: str, given: StrPath) -> Path:
    try:
        return Path(given)
    except TypeError:
        raise InputError(f"{name}: expected a path, found {given!r}") from None


def _several(given: str | Sequence[str] | None) -> list[str] | None:
    """Return one or several names as a list; the key of a table may be a number in a task file."""
    if given is None:
        return None
    return [str(each) for each in ([given] if isinstance(given, str | int) else given)]

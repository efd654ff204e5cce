"""`bench doctor`: examines the fitted defenses of a task file, each in a process of its own kind."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from bench.console import count, duration, say
from bench.doctor.examination import ALONE, IMAGES, LIMIT, examine
from bench.doctor.findings import Finding, Findings, Level
from bench.doctor.patient import Columns, Patient
from bench.errors import InputError, persons
from bench.escaping import shown
from bench.protocols import Images
from bench.quantities import format_value
from bench.registry import discover
from bench.results.origin import commit_of
from bench.results.store import Store
from bench.runner import outstanding
from bench.runner.context import WorkerContext, free_cores, prepare, settle
from bench.runner.examine import PATIENCE, kept, patient
from bench.runner.limits import limited
from bench.runner.worker import look_again, record
from bench.suite import resolve
from bench.suite.examined import Name, examinations, name_of
from bench.suite.jobs import Examination, Job
from bench.suite.planner import PlannedCondition

if TYPE_CHECKING:
    from bench.api.running import Project

STYLES: dict[Level, str] = {"note": "dim", "doubt": "yellow", "alarm": "red"}
"""How lines of each level are printed."""


@dataclass(frozen=True)
class Case:
    """A defense to examine: what a process must know of it."""

    defense: str
    """Its name in the task file."""
    job: Examination
    """What is examined, and through which views."""
    several: bool
    """Whether it is examined on several data sets, or in several norms."""
    held: tuple[bool, ...] | None
    """Which of the first examples all stored attacks left unbroken; None where none is stored."""

    @property
    def title(self) -> str:
        """The defense with its settings and its read-out: ``cnnf/avg``."""
        inference = self.job.victim.inference
        said = [f"{name} {format_value(value)}" for name, value in inference]
        if self.several:
            said += [
                self.job.data.spec.name,
                f"{self.job.threat.norm} {format_value(self.job.threat.radius)}",
            ]
        settings = ", ".join(said)
        return f"{self.defense}/{self.job.readout}{f' ({settings})' if settings else ''}"


class Examined(NamedTuple):
    """A defense, and what was found."""

    case: Case
    findings: Findings

    def described(self) -> dict[str, Any]:
        """Return everything for JSON."""
        job = self.case.job
        return {
            "defense": self.case.defense,
            "readout": job.readout,
            "inference": dict(job.victim.inference),
            "seed": job.victim.train.seed,
            "data": job.data.spec.name,
            "norm": job.threat.norm,
            "radius": job.threat.radius,
            **self.findings.described(),
        }


def cases(project: Project, names: Sequence[str] | None, images: int = IMAGES) -> list[Case]:
    """Return the defenses of a task file that are to be examined: each as it is asked, with its first seed.

    Args:
        project: The project.
        names: Names of defenses; None or none for all that are attacked.
        images: How many of the first examples are looked at, 1 or more.

    Returns:
        A case for each defense, its settings at inference time and its read-out.

    Raises:
        InputError: There is no such defense, none is attacked, or one is not trained.
    """
    suite = project.plan.suite
    for wanted in names or ():
        resolve.known("--defense", "defense", wanted, suite.defenses)
    asked = [
        each for each in project.plan.conditions if not names or str(each.coordinates["defense"]) in names
    ]
    if not asked:
        said = ", ".join(names) if names else "any defense"
        raise InputError(f"{suite.path}: no task attacks {said}, so that there is nothing to examine")
    found = examinations(asked, whole=True)
    # No job is wanted: what is asked for is why a result does not count.
    fault = outstanding.examine(project.plan, project.store, set()).fault
    _refuse_untrained(project, {name[1]: job for name, job in found.items()}, fault)
    grouped: dict[Name, list[PlannedCondition]] = defaultdict(list)
    for each in asked:
        if each.job.victim == found[name_of(each)].victim:
            grouped[name_of(each)].append(each)
    # What has no ball of its own is examined in that of another norm: once.
    once: dict[Examination, Name] = {}
    for name, job in found.items():
        once.setdefault(job, name)
    found = {name: job for job, name in once.items()}
    several = Counter(name[1:4] for name in found)
    return [
        Case(
            name[1],
            job,
            several[name[1:4]] > 1,
            _held(project.store, fault, images, _same(job, grouped[name])),
        )
        for name, job in found.items()
    ]


def _same(job: Examination, group: Iterable[PlannedCondition]) -> list[PlannedCondition]:
    """Return the attacks within the threat of an examination, on the same examples."""
    found = []
    for each in group:
        run = each.job.crafts[0].attack_run
        if run.threat == job.threat and run.data == job.data and run.attack.entry.kind == "fixed-budget":
            found.append(each)
    return found


def _refuse_untrained(
    project: Project, asked: Mapping[str, Examination], fault: Callable[[Job], str | None]
) -> None:
    """Raise where a training is not stored, or is of other code."""
    missing = {name: reason for name, job in asked.items() if (reason := fault(job.victim.train)) is not None}
    if missing:
        said = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
        raise InputError(
            f"{project.store.shown}: not trained there: {said}; "
            f"bench run {project.plan.suite.path} trains them"
        )


def _held(
    store: Store, fault: Callable[[Job], str | None], images: int, same: Iterable[PlannedCondition]
) -> tuple[bool, ...] | None:
    """Return which of the first examples no stored attack broke; None where no attack is stored."""
    held = np.ones(images, dtype=bool)
    seen = np.zeros(images, dtype=bool)
    for each in same:
        if fault(each.job) is not None:
            continue
        rows = store.outcomes(each.job.key)
        n = min(images, len(rows["index"]))
        label, truth = (np.asarray(rows[name])[:n] for name in ("label", "truth"))
        held[:n] &= (label == truth) | np.asarray(rows["rejected"], dtype=bool)[:n]
        seen[:n] |= not each.facts["idle"]
    return tuple(map(bool, held & seen)) if seen.any() else None


def begin(context: WorkerContext) -> None:
    """Set a process up for examinations.

    Args:
        context: The surroundings.
    """
    discover()
    prepare(context)


def _patient(case: Case, context: WorkerContext, images: int) -> Patient:
    """Build a defense in this process, as a job would."""
    settle(torch.device(context.device))
    look_again(case.job.victim.train, context)
    return patient(case.job, context, images, case.held)


def answer(case: Case, context: WorkerContext, images: int) -> Callable[[Images], Columns] | None:
    """Ask a defense in this process, for comparison with another one.

    Args:
        case: The defense.
        context: The surroundings.
        images: How many examples, 1 or more.

    Returns:
        The answers to what the test of processes asks about, as a callable; None for a random defense.
    """
    made = _patient(case, context, images)
    return None if made.random else Recorded.of(made)


@dataclass(frozen=True)
class Recorded:
    """Answers that another process gave, by image."""

    answers: dict[bytes, dict[str, torch.Tensor]]

    @classmethod
    def of(cls, made: Patient) -> Recorded:
        """Return the answers of a defense to what the test of processes asks about.

        Args:
            made: The defense.
        """
        from bench.doctor.answers import process_images

        z = process_images(made)
        with made.still("elsewhere"):
            columns = made.answers(z)
        return cls(
            {
                image.numpy().tobytes(): {name: values[row] for name, values in columns.items()}
                for row, image in enumerate(z)
            }
        )

    def __call__(self, z: Images) -> Columns:
        """Return the answers to images that were asked about."""
        rows = [self.answers[image.numpy().tobytes()] for image in z]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def examination(
    case: Case,
    context: WorkerContext,
    images: int,
    limit: float,
    elsewhere: Callable[[Images], Columns] | None,
) -> Findings:
    """Examine a defense in this process, and store what tables read of it, if that was not there.

    Args:
        case: The defense.
        context: The surroundings.
        images: How many examples, 1 or more.
        limit: Seconds of the processor, above 0.
        elsewhere: Answers of another process; None where there are none.

    Returns:
        What was found.
    """
    begun = time.perf_counter()
    made = replace(_patient(case, context, images), elsewhere=elsewhere)
    with limited(PATIENCE * limit):
        found = examine(made, limit=limit)
    job, store = case.job, Store(context.store)
    if (images, limit) == (IMAGES, LIMIT) and store.damage(job.kind, job.key) is not None:
        names = {test.name for test in ALONE}
        alone = Findings.of((each for each in found.found if each.test in names), found.seconds)
        # What was found is said all the same where nothing can be written.
        with suppress(OSError):
            record(job, context, time.perf_counter() - begun, *kept(alone, {"whole": job.whole}))
    return found


def examined(
    found: Sequence[Case], context: WorkerContext, *, images: int = IMAGES, limit: float = LIMIT
) -> Iterator[Examined]:
    """Examine defenses in processes, one on each core, and yield what was found in their order.

    Args:
        found: The defenses.
        context: The surroundings.
        images: How many examples of each, 1 or more.
        limit: Seconds of the processor for each, above 0.

    Yields:
        Each defense with what was found.

    Raises:
        InputError: Something that a defense reads changed, or its data set has no examples.
    """
    with _pool(context, 1) as other, _pool(context, min(free_cores(), len(found))) as pool:
        asked = [other.submit(answer, case, context, images) for case in found]
        running = []
        for case, there in zip(found, asked, strict=True):
            running.append(pool.submit(examination, case, context, images, limit, _given(there)))
        for case, done in zip(found, running, strict=True):
            yield Examined(case, _kept(done))


@contextmanager
def _pool(context: WorkerContext, size: int) -> Iterator[Executor]:
    pool = ProcessPoolExecutor(size, get_context("spawn"), initializer=begin, initargs=(context,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _given(there: Future[Callable[[Images], Columns] | None]) -> Callable[[Images], Columns] | None:
    """Return another process's answers; None where it gave none, which the examination will say."""
    with suppress(Exception):
        return there.result()
    return None


def _kept(done: Future[Findings]) -> Findings:
    """Return what was found; of an examination that ended otherwise, that."""
    try:
        return done.result()
    except Exception as error:  # noqa: BLE001 - code of a user may raise anything, and others are examined
        said = persons(error)
        if said is None:
            said = f"it ended with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Findings.of([Finding("examination", "untested", said)])


# --- how it is shown ---------------------------------------------------------------------------------


def table(each: Examined) -> Table:
    """Return a defense's findings as a table of at most 80 columns.

    Args:
        each: The defense with its findings.

    Returns:
        A line that says how many tests were quiet, and a line for each finding with its code and what to do.
    """
    findings = each.findings
    quiet = len({one.test for one in findings.found if one.level == "quiet"})
    untested = findings.untested
    said = f"{count(quiet, 'test')} quiet" + (f", untested: {', '.join(untested)}" if untested else "")
    made = Table(
        box=None,
        show_header=False,
        padding=(0, 1, 0, 1),
        title=Text.assemble((shown(each.case.title), "bold"), f"  {said}", f"  {duration(findings.seconds)}"),
        title_justify="left",
        title_style="",
        width=80,
    )
    for width in (5, 23, 46):
        made.add_column(width=width)
    for code, level in _heaviest(findings).items():
        advice = next(one.advice for one in findings.found if one.code == code)
        made.add_row(Text(level, style=STYLES[level]), code, advice)
    return made


def _heaviest(findings: Findings) -> dict[str, Level]:
    """Return the codes of all findings with their heaviest levels, the heaviest first."""
    found: dict[str, Level] = {}
    for level in ("alarm", "doubt", "note"):
        for one in findings.found:
            if one.code and one.level == level:
                found.setdefault(one.code, one.level)
    return found


def sentences(each: Examined) -> list[str]:
    """Return a sentence with counts for each finding with a code.

    Args:
        each: The defense with its findings.
    """
    found = each.findings.found
    untested = [f"untested, {one.test}: {one.message}" for one in found if one.level == "untested"]
    return [*(f"{one.code}: {one.message}" for one in found if one.code), *dict.fromkeys(untested)]


def report(
    project: Project,
    names: Sequence[str] | None,
    data_root: Path | None,
    most: tuple[int, float],
    console: Any | None,
) -> list[Examined]:
    """Examine defenses of a task file, and print what is found as it is found.

    Args:
        project: The project.
        names: Names of defenses; None or none for all that are attacked.
        data_root: The folder of the data sets; None for the default.
        most: How many images of each, and how many seconds for each.
        console: A `rich.console.Console`; None prints nothing.

    Returns:
        Each defense with what was found.

    Raises:
        InputError: There is no such defense, one is not trained, or there are no images.
    """
    images, limit = most
    found = cases(project, names, images)
    sources, commit = project.manifest["sources"], commit_of(Path(__file__).parent)
    context = WorkerContext(
        project.store.root, project.plan.suite.folder, data_root, "cpu", sources, commit=commit
    )
    done = []
    for each in examined(found, context, images=images, limit=limit):
        done.append(each)
        if console is not None:
            console.print(table(each))
            for sentence in sentences(each):
                say(console, f"    {sentence}", "dim")
    return done


def described(found: Sequence[Examined]) -> dict[str, Any]:
    """Return what was found for JSON.

    Args:
        found: Each defense with what was found.
    """
    return {"defenses": [each.described() for each in found]}

"""What a results folder holds of a plan, and what is still to do.

A stored result counts if its files agree with its receipt, if the code that made it is unchanged, and if the
results that it was made from are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.data import spec as datasets
from bench.data.spec import DataSpec
from bench.results import fingerprint
from bench.results.store import ABSENT, ARTEFACTS, Store
from bench.results.survey import Survey, survey
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, below, modules_of
from bench.suite.planner import Plan


@dataclass
class State:
    """What a results folder holds of a plan, and what is still to do."""

    done: set[Evaluate] = field(default_factory=set)
    """Evaluations that are done."""
    todo: dict[Job, tuple[Job, ...]] = field(default_factory=dict)
    """Jobs to do, each with those of its needs that are to do too."""
    kept: set[Job] = field(default_factory=set)
    """Jobs that are done."""
    redo: dict[Job, str] = field(default_factory=dict)
    """Jobs that were done and must be done again, with the reason."""
    fault: Callable[[Job], str | None] = lambda _: ABSENT
    """Returns why the stored result of a job does not count at the moment; None where it counts."""


def examine(
    plan: Plan,
    store: Store,
    wanted: set[str] | None = None,
    *,
    trust: bool = False,
    verify: bool = True,
    afresh: bool = False,
) -> State:
    """Find out which jobs of a plan are done and which are to do.

    A stored result counts if its files agree with its receipt, if the code that made it is unchanged, and if
    the results that it was made from are the same. What was read before is not read again while its files are
    as they were (`bench.results.index`).

    Args:
        plan: The plan.
        store: The results folder.
        wanted: Keys of the evaluations to look at; None for all.
        trust: True accepts results of code that has changed.
        verify: False compares no file with its digest.
        afresh: True reads every file that counts, whatever was read before.

    Returns:
        The jobs by their state.
    """
    state = State(fault=partial(_fault, store, trust=trust, verify=verify))
    asked = [each for each in plan.conditions if wanted is None or each.job.key in wanted]
    with survey(store, afresh=afresh) as found:
        # Thousands of jobs are made of the same modules.
        digests = cache(fingerprint.digests)
        for needed in (job for each in asked for job in (*each.checks, each.job)):
            _visit(needed, state, partial(_fault, found, trust=trust, verify=verify, digests=digests))
    for job in state.todo:
        state.todo[job] = tuple(need for need in job.needs if need in state.todo)
    state.done.update(each.job for each in asked if each.job in state.kept)
    return state


def _visit(asked: Job, state: State, fault: Callable[[Job], str | None]) -> None:
    """Note whether a job is done or to do, and below one that is to do the same of what it needs."""
    stack: list[Job] = [asked]
    while stack:
        job = stack.pop()
        if job in state.kept or job in state.todo:
            continue
        reason = fault(job)
        if reason is None:
            state.kept.add(job)
            continue
        if reason != ABSENT:
            state.redo[job] = reason
        state.todo[job] = ()
        stack.extend(reversed(job.needs))


def damages(plan: Plan, store: Store) -> dict[Job, str]:
    """Read every stored result of a plan, whatever was read before, and return those that are damaged.

    Args:
        plan: The plan.
        store: The results folder.

    Returns:
        The jobs whose stored result differs from its receipt, with the reason; those that have none are left
        out.
    """
    with survey(store, afresh=True) as found:
        said = {job: found.damage(job.kind, job.key) for job in plan.graph()}
    return {job: reason for job, reason in said.items() if reason is not None and reason != ABSENT}


def trainings(job: Job) -> frozenset[Train]:
    """Return the trainings that a job's result comes from.

    Args:
        job: Any job.

    Returns:
        The trainings, the job itself included if it is one.
    """
    return frozenset(each for each in below(job) if isinstance(each, Train))


def make_way(job: Job, state: State, store: Store) -> None:
    """Remove the old result of a job that is done again, if it still does not count.

    Another run may have made a new result meanwhile, which stays.

    Args:
        job: The job, about to start.
        state: The state of the plan.
        store: The results folder.
    """
    if job in state.redo and state.fault(job) is not None:
        store.discard(job.kind, job.key)


def fetch(state: State, folder: Path, data_root: Path | None) -> None:
    """Check that the data of the jobs to do is there, or download it, before any of them starts.

    Args:
        state: The state of the plan.
        folder: The folder of the task file.
        data_root: The folder of the data sets; None for the default.

    Raises:
        InputError: Data is missing or damaged, and cannot be downloaded.
    """
    needed: dict[str, DataSpec] = {}
    for job in state.todo:
        match job:
            case Train():
                needed[job.data.key] = job.data.spec
            case Craft():
                needed[job.attack_run.data.key] = job.attack_run.data.spec
            case Evaluate():
                data = job.crafts[0].attack_run.data
                needed[data.key] = data.spec
            case Examination():
                needed |= {each.key: each.spec for each in (job.data, job.victim.train.data)}
    for spec in needed.values():
        datasets.prepare(spec, data_root, folder)


def _fault(
    found: Store | Survey,
    job: Job,
    *,
    trust: bool,
    verify: bool,
    digests: Callable[[frozenset[str]], dict[str, str]] = fingerprint.digests,
) -> str | None:
    """Return why the stored result of a job does not count, None where it does."""
    reason = found.damage(job.kind, job.key, read=verify)
    if reason == ABSENT:
        return reason
    receipt = found.receipt(job.kind, job.key)
    if reason is None and not receipt:
        # Another run has just removed it.
        reason = ABSENT
    if reason is None and not trust:
        reason = _changed(receipt or {}, digests(modules_of(job)))
    return reason or _other_inputs(receipt or {}, found)


def _changed(receipt: Mapping[str, Any], now: Mapping[str, str]) -> str | None:
    """Return which module has changed since a result was made, None where none has."""
    made = receipt.get("sources")
    if not isinstance(made, dict):
        return "its receipt names no sources"
    for name in sorted({*made, *now}) if made != now else ():
        if made.get(name) != now.get(name):
            return f"{name} changed"
    return None


def _other_inputs(receipt: Mapping[str, Any], found: Store | Survey) -> str | None:
    """Return which input of a stored result exists with other content now, None where none does.

    Weights that were trained again on another kind of machine are another network, and numbers of both must
    not stand side by side. Inputs that are absent are no reason, since only evaluations are committed.
    """
    for key, digest in receipt.get("inputs", {}).items():
        for kind, name in ARTEFACTS.items():
            there = found.receipt(kind, key)
            if there and there.get("files", {}).get(name) != digest:
                return f"what it was made from ({kind}) was made again, and is different"
    return None

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
from bench.suite.jobs import Craft, Evaluate, Job, Train, modules_of
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
    plan: Plan, store: Store, wanted: set[str] | None = None, *, trust: bool = False, verify: bool = True
) -> State:
    """Find out which jobs of a plan are done and which are to do.

    A stored result counts if its files agree with its receipt, if the code that made it is unchanged, and if
    the results that it was made from are the same.

    Args:
        plan: The plan.
        store: The results folder.
        wanted: Keys of the evaluations to look at; None for all.
        trust: True accepts results of code that has changed.
        verify: False compares no file with its digest.

    Returns:
        The jobs by their state.
    """
    state = State(fault=partial(_fault, store, trust=trust, verify=verify))
    verdicts: dict[Job, str | None] = {}

    def usable(job: Job) -> bool:
        if job not in verdicts:
            verdicts[job] = reason = state.fault(job)
            if reason is not None and reason != ABSENT:
                state.redo[job] = reason
        return verdicts[job] is None

    def need(job: Job) -> bool:
        """Return whether a job is to do, having noted what it needs."""
        if usable(job):
            state.kept.add(job)
            return False
        if job not in state.todo:
            state.todo[job] = ()
            state.todo[job] = tuple(each for each in job.needs if need(each))
        return True

    for condition in plan.conditions:
        if (wanted is None or condition.job.key in wanted) and not need(condition.job):
            state.done.add(condition.job)
    return state


@cache
def trainings(job: Job) -> frozenset[Train]:
    """Return the trainings that a job's result comes from.

    Args:
        job: Any job.

    Returns:
        The trainings, the job itself included if it is one.
    """
    own = frozenset({job}) if isinstance(job, Train) else frozenset()
    return own.union(*(trainings(need) for need in job.needs))


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
    for spec in needed.values():
        datasets.prepare(spec, data_root, folder)


def _fault(store: Store, job: Job, *, trust: bool, verify: bool) -> str | None:
    """Return why the stored result of a job does not count, None where it does."""
    reason = store.damage(job.kind, job.key, read=verify)
    receipt = store.receipt(job.kind, job.key)
    if reason is None and not receipt:
        # Another run has just removed it.
        reason = ABSENT
    if reason is None and not trust:
        reason = _changed(receipt or {}, job)
    return reason or _other_inputs(receipt or {}, store)


def _changed(receipt: Mapping[str, Any], job: Job) -> str | None:
    """Return which module has changed since a result was made, None where none has."""
    made = receipt.get("sources")
    if not isinstance(made, dict):
        return "its receipt names no sources"
    now = fingerprint.digests(modules_of(job))
    for name in sorted({*made, *now}):
        if made.get(name) != now.get(name):
            return f"{name} changed"
    return None


def _other_inputs(receipt: Mapping[str, Any], store: Store) -> str | None:
    """Return which input of a stored result exists with other content now, None where none does.

    Weights that were trained again on another kind of machine are another network, and numbers of both must
    not stand side by side. Inputs that are absent are no reason, since only evaluations are committed.
    """
    for key, digest in receipt.get("inputs", {}).items():
        for kind, name in ARTEFACTS.items():
            there = store.receipt(kind, key)
            if there and there.get("files", {}).get(name) != digest:
                return f"what it was made from ({kind}) was made again, and is different"
    return None

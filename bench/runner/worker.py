"""The way of a job from its description to its stored result, in any process."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import torch

from bench.errors import DamagedError, InputError, OtherNetworkError
from bench.results.origin import versions
from bench.results.store import ARTEFACTS, Store
from bench.runner.context import WorkerContext, device_name, settle
from bench.runner.craft import craft
from bench.runner.evaluate import evaluate
from bench.runner.examine import examination, trial
from bench.runner.isolation import isolated
from bench.runner.limits import limited
from bench.runner.pace import telling
from bench.runner.process_state import installed
from bench.runner.rehearsal import Rehearsal, rehearse
from bench.runner.train import restored, train, unchanged
from bench.runner.training import Progress
from bench.suite.jobs import (
    AttackRun,
    Craft,
    Data,
    Evaluate,
    Examination,
    FittedDefense,
    Job,
    Train,
    Trial,
    own_modules,
)


@dataclass(frozen=True)
class Recheck:
    """A question whether a stored network is still the one that was stored; it leaves no result."""

    train: Train
    """The training of the network."""

    kind = "recheck"

    @property
    def key(self) -> str:
        """The key of the training."""
        return self.train.key


Question: TypeAlias = Recheck | Rehearsal
"""What is asked of a worker beside jobs; it leaves no result."""


def do(job: Job | Question, context: WorkerContext, progress: Progress | None = None) -> dict[str, Any]:
    """Do a job and store its result, unless another run has stored it already.

    Args:
        job: The job; everything that it needs is stored.
        context: The surroundings of the job.
        progress: Called with facts while the job runs: how far it is, and notes.

    Returns:
        The receipt of the result; for a question its answer.

    Raises:
        InputError: Something that the job reads changed since the run was planned.
        OvertimeError: The job took longer than its limit.
        DisturbedError: The job changed something that all jobs of its process share.
        DamagedError: A result that the job needs is damaged or gone.
    """
    if isinstance(job, Recheck):
        return recheck(job, context)
    if isinstance(job, Rehearsal):
        settle(torch.device(context.device))
        look_again(job.train, context)
        forget_modules(job.train)
        return rehearse(job, context)
    store = Store(context.store)
    if store.damage(job.kind, job.key) is None:
        # Another run was faster.
        return store.receipt(job.kind, job.key) or {}
    code = _code(job, context)
    begun = time.perf_counter()
    facts: dict[str, Any]
    said: list[str] = []
    settle(torch.device(context.device))
    look_again(job, context)
    forget_modules(job)
    # The limit comes first, so that its alarm does not count as a change of the job.
    with limited(context.time_limit), isolated() as state:
        match job:
            case Train():
                write, facts = train(job, context, store, code, progress)
            case Craft():
                with telling(job, progress):
                    write, facts = craft(job, context, store)
                said = facts.get("notes", [])
            case Evaluate():
                write, facts = evaluate(job, context, store)
            case Trial():
                write, facts = trial(job)
            case Examination():
                write, facts = examination(job, context)
            case _:
                assert_never(job)
    # A training says its own while it runs.
    for note in (*said, *state.notes):
        if progress is not None:
            progress({"note": note})
    return record(job, context, time.perf_counter() - begun, write, facts, state.notes)


def record(
    job: Job,
    context: WorkerContext,
    seconds: float,
    write: Callable[[Path], None],
    facts: Mapping[str, Any],
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Store the result of a job with its receipt.

    Args:
        job: The job; everything that it needs is stored.
        context: Its surroundings.
        seconds: How long it took.
        write: Writes the artefact to the path that it is given.
        facts: Entries of the receipt of this kind of job.
        notes: Sentences about what the job changed and had put back.

    Returns:
        The receipt.

    Raises:
        DamagedError: A result that the job needs is gone.
    """
    store = Store(context.store)
    code = _code(job, context)
    receipt = {
        "seconds": round(seconds, 3),
        "device": device_name(context.device),
        "threads": torch.get_num_threads() if torch.device(context.device).type == "cpu" else None,
        **facts,
        "notes": [*facts.get("notes", []), *notes],
        "versions": versions(),
        "commit": context.commit,
        **inherited(job, store, code),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    store.keep(job.kind, job.key, describe(job), receipt, write)
    return receipt


def _code(job: Job, context: WorkerContext) -> dict[str, str]:
    """Return the digests of a job's own modules."""
    return {name: digest for name, digest in context.sources.items() if name in own_modules(job)}


def recheck(job: Recheck, context: WorkerContext) -> dict[str, Any]:
    """Build a stored network again and compare its answers with those in its receipt.

    Args:
        job: The question.
        context: The surroundings of the job.

    Returns:
        ``{"different": sentence}``, with None in place of the sentence where the network is the same.

    Raises:
        InputError: Code or a file of the defense changed since the run was planned.
    """
    settle(torch.device(context.device))
    look_again(job.train, context)
    forget_modules(job.train)
    try:
        with limited(context.time_limit), isolated():
            restored(FittedDefense(job.train), context)
    except OtherNetworkError as error:
        return {"different": str(error)}
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - code of a user may raise anything; the training will say more
        return {"different": f"it cannot be built any more ({type(error).__name__}: {error})"}
    return {"different": None}


def forget_modules(job: Job) -> None:
    """Forget the user's own modules that a job's defenses name, so that the job imports them again.

    State at the top level of such a module would pass from job to job, so that the order of jobs would
    matter. Installed packages stay imported, since few can be imported twice.

    Args:
        job: The job, about to start.
    """
    for name in named_modules(job):
        if name in sys.modules and not installed(sys.modules[name]):
            del sys.modules[name]


def look_again(job: Job, context: WorkerContext) -> None:
    """Check that the code and the files of every defense that a job builds are those of the plan.

    The check comes before any of that code runs, since it may extend the import path.

    Args:
        job: The job, about to start.
        context: The surroundings of the job.

    Raises:
        InputError: Code or a file changed since the run was planned.
    """
    for each in _defenses(job):
        unchanged(each.defense, context.folder)


def named_modules(job: Job) -> set[str]:
    """Return the modules that the settings of a job's defenses name, and those that they import.

    Args:
        job: Any job.

    Returns:
        Dotted names of modules.
    """
    found: set[str] = set()
    for each in _defenses(job):
        named = each.defense.identity["params"]
        for parameter in each.defense.entry.parameters("code"):
            if named.get(parameter) is not None:
                found.update(named[parameter][1])
    return found


def _defenses(job: Job) -> Iterator[Train]:
    """Yield the trainings of all defenses that a job builds, parts of defenses included."""
    todo = [each for each in (job, *job.needs) if isinstance(each, Train)]
    while todo:
        train = todo.pop()
        yield train
        todo += [part for _, part in train.parts]


def inherited(job: Job, store: Store, code: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the origin of a job's result for its receipt: the code and the results that it was made from.

    Args:
        job: The job.
        store: The results folder.
        code: Digests of the job's own modules.

    Returns:
        ``sources``, digests by module, and ``inputs``, digests of artefacts by key; both include those of the
        jobs that it needed, as their receipts say.

    Raises:
        DamagedError: A result that the job needs was removed meanwhile.
    """
    made_by: dict[str, str] = dict(code)
    made_from: dict[str, str] = {}
    for need in job.needs:
        if not (receipt := store.receipt(need.kind, need.key)):
            raise DamagedError(f"{need.kind} {need.key}: it was taken away meanwhile")
        made_by |= receipt.get("sources", {})
        made_from |= {**receipt.get("inputs", {}), need.key: receipt["files"][ARTEFACTS[need.kind]]}
    return {"sources": dict(sorted(made_by.items())), "inputs": dict(sorted(made_from.items()))}


def describe(job: Job | AttackRun | FittedDefense) -> dict[str, Any]:
    """Return the full description of a job, as it is stored beside its result.

    Args:
        job: A job, or a part of one.

    Returns:
        A mapping for JSON: kind, key, everything that enters the key, and what the keys in it stand for.
    """
    own: dict[str, Any] = {"kind": type(job).__name__.lower(), "key": job.key, **job.identity}
    match job:
        case Train():
            own |= {"data": _described(job.data), "parts": {name: describe(part) for name, part in job.parts}}
        case FittedDefense():
            own |= {"train": describe(job.train)}
        case AttackRun():
            own |= {"data": _described(job.data), "source": describe(job.source) if job.source else None}
        case Craft():
            own |= {"attack_run": describe(job.attack_run)}
        case Evaluate():
            own |= {
                "victim": describe(job.victim),
                "attack_run": describe(job.crafts[0].attack_run),
                "slices": [[each.start, each.stop] for each in job.crafts],
            }
        case Examination():
            own |= {"victim": describe(job.victim), "data": _described(job.data)}
    return own


def _described(data: Data) -> dict[str, Any]:
    return {"digest": data.digest, **data.spec.model_dump(mode="json")}

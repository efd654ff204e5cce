"""Do a job from its description alone, wherever that is: one file and a receipt come of it."""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from bench.context import Desk, device_name, settle, versions
from bench.craft import craft
from bench.errors import DamagedError, InputError, OtherNetworkError
from bench.evaluate import evaluate
from bench.isolation import isolated
from bench.limits import limited
from bench.plan import Attempt, Craft, Data, Evaluate, Job, Served, Train, own_modules
from bench.process_state import installed
from bench.store import ARTEFACTS, Store
from bench.train import restored, train, unchanged
from bench.training import Progress


@dataclass(frozen=True)
class Recheck:
    """Ask a stored network again whether it is the one that was stored; leaves no result."""

    train: Train

    kind = "recheck"

    @property
    def key(self) -> str:
        """That of the training."""
        return self.train.key


def do(job: Job | Recheck, desk: Desk, progress: Progress | None = None) -> dict[str, Any]:
    """Do a job and store its result; return its receipt."""
    if isinstance(job, Recheck):
        return recheck(job, desk)
    store = Store(desk.store)
    if store.damage(job.kind, job.key) is None:
        # Another run was first.
        return store.receipt(job.kind, job.key) or {}
    code = {name: digest for name, digest in desk.sources.items() if name in own_modules(job)}
    begun = time.perf_counter()
    facts: dict[str, Any]
    settle(desk)
    look_again(job, desk)
    forget_modules(job)
    # The limit comes first: its alarm is none of the job's changes.
    with limited(desk.time_limit), isolated() as state:
        match job:
            case Train():
                write, facts = train(job, desk, store, code, progress)
            case Craft():
                write, facts = craft(job, desk, store)
            case Evaluate():
                write, facts = evaluate(job, desk, store)
            case _:
                assert_never(job)
    for note in state.notes:
        if progress is not None:
            progress({"note": note})
    receipt = {
        "seconds": round(time.perf_counter() - begun, 3),
        "device": device_name(desk),
        "threads": torch.get_num_threads() if torch.device(desk.device).type == "cpu" else None,
        **facts,
        "notes": [*facts.get("notes", []), *state.notes],
        "versions": versions(),
        "commit": desk.commit,
        **inherited(job, store, code),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    store.keep(job.kind, job.key, describe(job), receipt, write)
    return receipt


def recheck(job: Recheck, desk: Desk) -> dict[str, Any]:
    """Return ``{"different": sentence}`` where a stored network is no longer what it was, else None there."""
    settle(desk)
    look_again(job.train, desk)
    forget_modules(job.train)
    try:
        with limited(desk.time_limit), isolated():
            restored(Served(job.train), desk)
    except OtherNetworkError as error:
        return {"different": str(error)}
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - the code is not ours; the training will say more
        return {"different": f"it cannot be built any more ({type(error).__name__}: {error})"}
    return {"different": None}


def forget_modules(job: Job) -> None:
    """Take the user's own modules off the list of those that are imported, so that each job begins anew.

    What such a module keeps at its top level would go from job to job, and the order of jobs would matter.
    Installed packages stay: few can be imported twice.
    """
    for name in named_modules(job):
        if name in sys.modules and not installed(sys.modules[name]):
            del sys.modules[name]


def look_again(job: Job, desk: Desk) -> None:
    """Raise where code or a file of the defenses that a job builds is not what it was planned with.

    Before any of that code runs: it may put more on the import path.
    """
    for each in _defenses(job):
        unchanged(each.defense, desk.folder)


def named_modules(job: Job) -> set[str]:
    """Return the modules that the parameters of a job's defenses name, with what those import."""
    found: set[str] = set()
    for each in _defenses(job):
        named = each.defense.identity["params"]
        for parameter in each.defense.entry.parameters("code"):
            if named.get(parameter) is not None:
                found.update(named[parameter][1])
    return found


def _defenses(job: Job) -> Iterator[Train]:
    """Yield the trainings whose defenses a job builds, their parts included."""
    todo = [each for each in (job, *job.needs) if isinstance(each, Train)]
    while todo:
        train = todo.pop()
        yield train
        todo += [part for _, part in train.parts]


def inherited(job: Job, store: Store, code: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what a receipt says of a job's origin: the code, and the results, that it was made from.

    Both include those of the jobs it needed, as their own receipts tell them.
    """
    made_by: dict[str, str] = dict(code)
    made_from: dict[str, str] = {}
    for need in job.needs:
        if not (receipt := store.receipt(need.kind, need.key)):
            raise DamagedError(f"{need.kind} {need.key}: it was taken away meanwhile")
        made_by |= receipt.get("sources", {})
        made_from |= {**receipt.get("inputs", {}), need.key: receipt["files"][ARTEFACTS[need.kind]]}
    return {"sources": dict(sorted(made_by.items())), "inputs": dict(sorted(made_from.items()))}


def describe(job: Job | Attempt | Served) -> dict[str, Any]:
    """Return a job in full, as it is stored beside its result."""
    own: dict[str, Any] = {"kind": type(job).__name__.lower(), "key": job.key, **job.identity}
    match job:
        case Train():
            own |= {"data": _described(job.data), "parts": {name: describe(part) for name, part in job.parts}}
        case Served():
            own |= {"train": describe(job.train)}
        case Attempt():
            own |= {"data": _described(job.data), "source": describe(job.source) if job.source else None}
        case Craft():
            own |= {"attempt": describe(job.attempt)}
        case Evaluate():
            own |= {
                "victim": describe(job.victim),
                "attempt": describe(job.crafts[0].attempt),
                "slices": [[each.start, each.stop] for each in job.crafts],
            }
    return own


def _described(data: Data) -> dict[str, Any]:
    return {"digest": data.digest, **data.spec.model_dump(mode="json")}

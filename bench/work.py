"""The three kinds of work: fit a defense, craft a shard, ask a defense about crafted images.

A job is done from its description alone, wherever it runs, and leaves one file and a receipt.
"""

import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import data as datasets
from bench import probes, sources
from bench.errors import DamagedError, InputError, OtherNetworkError, OvertimeError, TrainingError
from bench.isolation import building, installed, isolated
from bench.losses import eot
from bench.noise import Noise, seed_of
from bench.outcomes import OUTCOME_COLUMNS, schema
from bench.plan import Attempt, Craft, Data, Evaluate, Job, Served, Train, own_modules
from bench.protocols import Crafted, Decision, Images, Labels, Split, View, answered, distance
from bench.referee import Meter, answers_only, blindfold, guides, judge, reseed, seeded, undisturbed, watch
from bench.registry import AttackEntry, DefenseEntry, arguments
from bench.spec import Filled, named_files
from bench.store import ARTEFACTS, Store
from bench.training import Progress, Trainer

CHUNK = {"cpu": 256, "cuda": 4096}
"""Images that are computed at once: what fits a processor's cache, and what fills a GPU."""

ASKED_TWICE = 32
"""How many examples of a shard are asked a second time, in another order and in other batches."""

ROUNDING = 1e-4
"""How far logits may be from those of the first ask, as a share of what they spread over, for an answer that
changed with them to count as a tie: in another batch, sums are taken in another order."""

DRIFT = 0.01
"""How far they may be for an answer to be the same that it was, on the same scale."""


@dataclass(frozen=True)
class Desk:
    """Where work is done: what a job needs and its result must not depend on."""

    store: Path
    folder: Path
    """The suite's folder, on the import path."""
    data_root: Path | None
    device: str
    sources: Mapping[str, str] = field(hash=False)
    """Digests of the code that the plan was made with: what runs must be the same."""
    commit: str | None = None
    time_limit: float | None = None
    """Seconds that any job may take; None: any time."""


@dataclass(frozen=True)
class Recheck:
    """Ask a stored network again whether it is the one that was stored; leaves no result."""

    train: Train

    kind = "recheck"

    @property
    def key(self) -> str:
        """That of the training."""
        return self.train.key


def prepare(desk: Desk) -> None:
    """Set up this process: settings of torch, the suite's folder on the import path, big buffers kept."""
    sources.importable(desk.folder)
    settle(torch.device(desk.device))
    if torch.device(desk.device).type == "cpu":
        keep_buffers()


def settle(device: torch.device) -> None:
    """Set what holds for the whole process and decides numbers, before each job."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Ten bits of mantissa are too few where margins are a hundredth, and no key would tell.
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        # Sums must not depend on how many cores the machine has.
        torch.set_num_threads(1)


@cache
def keep_buffers() -> bool:
    """Tell glibc to keep freed buffers: else every step maps and clears its pages anew.

    Returns whether it could be told.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_threshold, ceiling = -1, -2, -3, 1 << 30
    mallopt = ctypes.CDLL(None).mallopt
    # 32 MiB is the largest threshold that glibc accepts; without maps there is none.
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (trim_threshold, ceiling),
            (top_pad, 64 << 20),
            (mmap_threshold, 32 << 20),
        )
    )


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
    settle(torch.device(desk.device))
    look_again(job, desk)
    forget_modules(job)
    # The limit comes first: its alarm is none of the job's changes.
    with limited(desk.time_limit), isolated() as ground:
        match job:
            case Train():
                write, facts = train(job, desk, store, code, progress)
            case Craft():
                write, facts = craft(job, desk, store)
            case Evaluate():
                write, facts = evaluate(job, desk, store)
            case _:
                assert_never(job)
    for note in ground.notes:
        if progress is not None:
            progress({"note": note})
    receipt = {
        "seconds": round(time.perf_counter() - begun, 3),
        "device": device_name(desk),
        "threads": torch.get_num_threads() if torch.device(desk.device).type == "cpu" else None,
        **facts,
        "notes": [*facts.get("notes", []), *ground.notes],
        "versions": versions(),
        "commit": desk.commit,
        **inherited(job, store, code),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    store.keep(job.kind, job.key, describe(job), receipt, write)
    return receipt


def recheck(job: Recheck, desk: Desk) -> dict[str, Any]:
    """Return ``{"different": sentence}`` where a stored network is no longer what it was, else None there."""
    settle(torch.device(desk.device))
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


def device_name(desk: Desk) -> str:
    """Return the name of the device that a desk computes on."""
    device = torch.device(desk.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


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


@cache
def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("crossfire-bench", "torch", "torchvision", "numpy")},
    }


# --- train -------------------------------------------------------------------------------------------


def train(
    job: Train, desk: Desk, store: Store, code: Mapping[str, str], progress: Progress | None
) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Fit a defense; see that it can be built again from what is stored of it."""
    device = torch.device(desk.device)
    split = load(job.data, desk)
    with seeded(seed_of(job.key, "initial"), device):
        model = build(job, desk, fitted_parts=True)
        parts = {name: restored(Served(part), desk) for name, part in job.parts}
        trainer = Trainer(
            split, job.key, device, parts=parts, keep=store.partial(job.key), code=code, progress=progress
        )
        model.fit(split, trainer)
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TrainingError(f"the training ended with {name} not finite")
    answers = _answers(job, model.eval(), desk)
    again = _built(Served(job), desk)
    as_built = _same_state(again, weights)
    again.load_state_dict(weights, strict=True)
    if (other := probes.difference(answers, _answers(job, again, desk), alike=False)) is not None:
        raise OtherNetworkError(
            f"defense {job.defense.name}: built a second time, with the weights of the first, it is another "
            f"network: {other}. It remembers what it was asked, or what it learns or draws is no "
            "parameter or buffer of it, or it reads what the suite does not name"
        )
    facts = {
        "examples": len(split),
        "resumed_from_epoch": trainer.resumed,
        "answers": answers,
        "as_built": as_built,
        "notes": trainer.notes,
    }
    # Part of the file, so that its digest tells networks apart that have the same weights.
    told = {"answers": hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()}
    return lambda path: save_file(weights, path, told), facts


def _answers(job: Train, model: Any, desk: Desk) -> probes.Answers:
    entry = job.defense.entry
    assert isinstance(entry, DefenseEntry)
    return probes.answers(model, entry, job.data.shape, desk.device)


def build(
    job: Train, desk: Desk, *, serve: Mapping[str, Any] | None = None, fitted_parts: bool = False
) -> Any:
    """Construct a defense, untrained, on the desk's device; the parts it names are passed to it.

    The random states are left as the construction left them.
    """
    entry = job.defense.entry
    assert isinstance(entry, DefenseEntry)
    given = arguments(entry, {**job.defense.params, **(serve or {})})
    for name, part in job.parts:
        given[name] = restored(Served(part), desk) if fitted_parts else build(part, desk)
    reseed(seed_of(job.key, "initial"))
    with building():
        model = entry.make(job.data.shape, **given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"defense {entry.name} is a {type(model).__name__}, not an nn.Module")
    return model.to(desk.device)


def unchanged(filled: Filled, folder: Path) -> None:
    """Raise where a file or code that parameters name is not what the job's key was made with."""
    named = filled.identity["params"]
    for name in filled.entry.parameters("content"):
        for path, digest in zip(named_files(filled.params[name]), named_files(named[name]), strict=True):
            if "sha256:" + sources.file_digest(Path(path)) != digest:
                raise InputError(f"{path} changed since the run was planned; start it again")
    for name in filled.entry.parameters("code"):
        path = filled.params[name]
        if path is not None and sources.code_digests(path, folder) != named[name][1]:
            raise InputError(f"the code of {path} changed since the run was planned; start it again")


def restored(served: Served, desk: Desk) -> Any:
    """Return a fitted defense of the caller's own, which may go on training it.

    Raises `OtherNetworkError` where it answers otherwise than when it was stored.
    """
    store, train, plain = Store(desk.store), served.train, Served(served.train)
    weights = load_file(store.artefact("train", train.key), device=desk.device)
    receipt = store.receipt("train", train.key) or {}
    here = receipt.get("device") == device_name(desk) and receipt.get("versions") == versions()
    model = _built(plain, desk)

    def compare(when: str) -> None:
        now = _answers(train, model, desk)
        if (other := probes.difference(receipt["answers"], now, alike=not here)) is not None:
            raise OtherNetworkError(
                f"defense {train.defense.name}: {when}, it is another network than the one that was stored: "
                f"{other}. Something that decides its answers is neither in its weights nor named in the "
                "suite (a file that it reads, code elsewhere, a draw)"
            )

    if receipt["as_built"]:
        # Nothing was learned: the weights are what the constructor makes or reads.
        compare("as it is built now")
    model.load_state_dict(weights, strict=True)
    compare("with its stored weights")
    if served == plain:
        return model
    model = _built(served, desk)
    model.load_state_dict(weights, strict=True)
    return model


def _built(served: Served, desk: Desk) -> Any:
    """Build a defense anew, as it is asked, untrained and in evaluation mode."""
    with seeded(seed_of(served.train.key, "initial"), torch.device(desk.device)):
        return build(served.train, desk, serve=dict(served.serve)).eval()


def _same_state(model: Any, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a network has these weights already."""
    state = model.state_dict()
    return all(name in state and torch.equal(state[name].cpu(), value) for name, value in weights.items())


def fitted(served: Served, desk: Desk, store: Store) -> Any:
    """Return a fitted defense, frozen, to be looked at and asked.

    One of ours is shared by the jobs of a process. Of other people's code each job has an instance of its
    own: what such a network remembers must not go from job to job.
    """
    if served.train.foreign:
        return restored(served, desk).requires_grad_(False)
    weights = store.folder("train", served.train.key) / "weights.safetensors"
    return _fitted(served, desk, weights.stat().st_mtime_ns if weights.exists() else 0)


@lru_cache(maxsize=4)
def _fitted(served: Served, desk: Desk, _written: int) -> Any:
    return restored(served, desk).requires_grad_(False)


# --- craft -------------------------------------------------------------------------------------------


def craft(job: Craft, desk: Desk, store: Store) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Attack a shard through its view, and judge what comes back."""
    attempt = job.attempt
    model = fitted(attempt.source, desk, store) if attempt.source else None
    plain, facts = attacked(job, model, load(attempt.data, desk), torch.device(desk.device))
    return lambda path: save_file(plain, path), facts


def attacked(
    job: Craft, model: Any, split: Split, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Attack the shard of `split` that `job` names; return what is kept of it, on the CPU, and facts of it.

    `model` is the fitted network that the attack looks at, None for an attack that looks at none.
    """
    rows = slice(job.start, job.stop)
    x, y = split.images[rows].to(device), split.labels[rows].to(device)
    made = attack(job, model, x, y, split)
    judged = judge(x, made.images, job.attempt.threat)
    moved = (judged.images != x).flatten(1).any(1)
    target = made.target if made.target is not None else torch.full_like(y, -1)
    tensors = {
        "index": split.index[rows],
        "target": target,
        "moved": moved,
        "images": judged.images[moved],
        "void": judged.void,
        "forwards": made.meter.forwards,
        "backwards": made.meter.backwards,
        **{f"note.{name}": value for name, value in made.notes.items()},
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    facts = {
        "examples": len(y),
        "void": int(judged.void.sum()),
        "void_because": dict(judged.because),
        "queries_per_example": {
            "forwards": float(made.meter.forwards.mean()),
            "backwards": float(made.meter.backwards.mean()),
        },
        "chunk": made.chunk,
    }
    return plain, facts


def unmoved(job: Craft, split: Split) -> dict[str, Tensor]:
    """Return what `attacked` returns of an attack that does nothing and looks at nothing."""
    rows = slice(job.start, job.stop)
    still = torch.zeros(job.stop - job.start, dtype=torch.bool)
    passes = torch.zeros(len(still), dtype=torch.float64)
    return {
        "index": split.index[rows],
        "target": torch.full((len(still),), -1),
        "moved": still,
        "images": split.images[:0],
        "void": still,
        "forwards": passes,
        "backwards": passes,
    }


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `OvertimeError` in the block once it has taken so long, every second after, and at its end.

    By a signal of the main thread, where jobs run; what a signal cannot interrupt, `execute` ends from
    outside. Inside another limit the nearer one counts.
    """
    alarm = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    outer = signal.getitimer(signal.ITIMER_REAL)[0] if alarm else 0.0
    if seconds is None or not alarm or 0 < outer <= seconds:
        yield
        return
    rang: list[OvertimeError] = []

    def over(*_: object) -> None:
        rang.append(OvertimeError(f"it took longer than its limit of {seconds:g} s"))
        raise rang[-1]

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    try:
        try:
            # Again and again: a library that swallows an exception swallows one.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:
        if rang and not isinstance(error, OvertimeError):
            raise rang[-1] from error
        raise
    finally:
        # Once more: an alarm may ring on the way out of the block, before it is off.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - begun), 0.01), 1.0)
    if rang:
        # Swallowed: what was returned is what there was by then.
        raise rang[-1]


@dataclass(frozen=True)
class Made:
    """What an attack returned, and what it took."""

    images: object
    notes: Mapping[str, Tensor]
    target: Labels | None
    meter: Meter
    chunk: int | None


def attack(job: Craft, model: Any, x: Images, y: Labels, split: Split) -> Made:
    """Run an attack on a shard; where it does not fit in memory, in smaller chunks, recomputed."""
    chunk: int | None = CHUNK[x.device.type]
    recompute = False
    while True:
        try:
            return _attack(job, model, x, y, split, chunk, recompute)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or chunk is None or chunk <= 1:
                raise
            chunk, recompute = max(min(chunk, len(x)) // 2, 1), True
            if x.is_cuda:
                torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    said = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in said)


def _attack(
    job: Craft, model: Any, x: Images, y: Labels, split: Split, chunk: int | None, recompute: bool
) -> Made:
    attempt, index = job.attempt, split.index[job.start : job.stop]
    entry = attempt.attack.entry
    assert isinstance(entry, AttackEntry)
    meter = Meter.of(len(y), x.device)
    target = _targets(attempt, y, index)
    modules = [model] if model is not None else []
    seen: list[View] = []

    def ask() -> None:
        for each in seen:
            each.logits(each.encode(x[:2]))

    with undisturbed(*modules, seed=seed_of(job.key), ask=ask):
        view = blindfold(meter)
        if attempt.source is not None and attempt.view is not None:
            seen.append(look(attempt, model, split, x.device))
            view = watch(
                seen[0],
                meter,
                entry.access,
                target=target,
                final=attempt.final,
                chunk=chunk,
                recompute=recompute,
            )
            view = eot(view, attempt.view.draws)
        noise = Noise(
            attempt.key,
            index,
            device=x.device,
            shard=job.key if entry.keyed == "shard" else None,
        )
        with limited(attempt.time_limit):
            returned = entry.make(
                view, x.clone(), y.clone(), attempt.threat, noise, **arguments(entry, attempt.attack.params)
            )
    notes = dict(returned.notes) if isinstance(returned, Crafted) else {}
    if taken := sorted(set(notes) & set(OUTCOME_COLUMNS)):
        raise ValueError(f"the attack's notes {taken} have names that the referee's own columns have")
    for name, note in notes.items():
        if note.shape[:1] != y.shape:
            raise ValueError(
                f"the attack's note {name!r} has {tuple(note.shape)} entries for {len(y)} images"
            )
    return Made(returned, notes, target, meter, chunk if recompute else None)


def _targets(attempt: Attempt, y: Labels, index: Tensor) -> Labels | None:
    if attempt.target is None:
        return None
    assert attempt.source is not None
    classes = attempt.source.train.data.shape.classes
    if attempt.target == "random":
        drawn = Noise((attempt.key, "target"), index, device=y.device).integers((), classes - 1)
        return (y + 1 + drawn) % classes
    return (y + attempt.target) % classes


def look(attempt: Attempt, model: Any, split: Split, device: torch.device) -> View:
    """Return the view that an attempt looks through."""
    assert attempt.source is not None
    assert attempt.view is not None
    entry = attempt.source.train.defense.entry
    assert isinstance(entry, DefenseEntry)
    if attempt.view.use.startswith("decision:"):
        readout = attempt.view.use.removeprefix("decision:")
        classes = attempt.source.train.data.shape.classes

        def decide(z: Images) -> Decision:
            return _decided(model, z, readout, device)

        return answers_only(decide, classes, guides(decide, split.images, split.labels, classes).to(device))
    found = entry.view(attempt.view.use)
    assert found is not None
    seen = getattr(model, found.method)(**arguments(found, attempt.view.params))
    if not isinstance(seen, View):
        raise TypeError(f"view {found.name!r} of {entry.name} is a {type(seen).__name__}, not a View")
    return seen


# --- evaluate ----------------------------------------------------------------------------------------


def evaluate(job: Evaluate, desk: Desk, store: Store) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Ask a defense about crafted images; a row for each."""
    model = fitted(job.victim, desk, store)
    split = load(job.crafts[0].attempt.data, desk)
    crafted = (load_file(store.artefact("craft", each.key)) for each in job.crafts)
    columns = answers_to(job, crafted, model, split, torch.device(desk.device))
    table = table_of(columns)
    receipts = [store.receipt(each.kind, each.key) or {} for each in job.crafts]
    facts = {
        "examples": table.num_rows,
        # Crafted images are not published with a table; what they took is.
        "crafting": {
            "seconds": round(sum(each.get("seconds", 0.0) for each in receipts), 3),
            "devices": sorted({each["device"] for each in receipts if "device" in each}),
        },
    }
    return lambda path: pq.write_table(table, path, compression="zstd"), facts


def answers_to(
    job: Evaluate, crafted: Iterable[Mapping[str, Tensor]], model: Any, split: Split, device: torch.device
) -> list[dict[str, Any]]:
    """Ask a fitted defense about what `attacked` returned of each shard; return the columns of each."""
    with undisturbed(model, seed=seed_of(job.key)), torch.no_grad():
        return [
            _outcomes(job, craft_job, found, model, split, device)
            for craft_job, found in zip(job.crafts, crafted, strict=True)
        ]


def shown_images(rows: slice, crafted: Mapping[str, Tensor], split: Split) -> Images:
    """Return the images that a defense is shown: those of a shard, moved where the attack moved them."""
    if not torch.equal(crafted["index"], split.index[rows]):
        raise RuntimeError(f"crafted images are of other examples than {rows}")
    z = split.images[rows].clone()
    z[crafted["moved"]] = crafted["images"]
    return z


def _outcomes(
    job: Evaluate,
    craft_job: Craft,
    crafted: Mapping[str, Tensor],
    model: Any,
    split: Split,
    device: torch.device,
) -> dict[str, Any]:
    rows = slice(craft_job.start, craft_job.stop)
    x, truth, index = split.images[rows], split.labels[rows], split.index[rows]
    z = shown_images(rows, crafted, split)
    answers = ask(model, z, job.readout, device)
    wide = x.double(), z.double()
    target = crafted["target"].tolist()
    return {
        "index": index,
        "target": [None if each < 0 else each for each in target],
        "truth": truth,
        "label": answers["label"],
        "rejected": answers["rejected"],
        "score": answers["score"].float(),
        "logits": _listed(answers.get("logits")),
        "thresholds": _listed(answers.get("thresholds")),
        "l0": distance(*wide, "l0").long(),
        "l2": distance(*wide, "l2"),
        "linf": distance(*wide, "linf"),
        "distance": distance(*wide, craft_job.attempt.threat.norm),
        "void": crafted["void"],
        "forwards": crafted["forwards"],
        "backwards": crafted["backwards"],
        "differs": _asked_again(model, z, answers, job, craft_job, device),
        "parameters": [sum(each.numel() for each in model.parameters())] * len(truth),
        **{name.removeprefix("note."): value for name, value in crafted.items() if name.startswith("note.")},
    }


def _listed(values: Tensor | None) -> list[list[float]] | None:
    """Return (N, K) as lists for a column, up to 100 classes."""
    return None if values is None or values.shape[1] > 100 else values.float().tolist()


def ask(model: Any, images: Images, readout: str, device: torch.device) -> dict[str, Tensor]:
    """Return a read-out's answers in a fixed layout of chunks, on the CPU, each as a table keeps it."""
    decision = _decided(model, images, readout, device)
    # A defense that answers NaN to a lawful image has not held; -1 is nobody's label.
    lost = decision.score.isnan()
    if decision.logits is not None:
        lost = lost | ~answered(decision.logits)
    found = {
        "label": decision.label.long().masked_fill(lost, -1),
        "rejected": decision.rejected.bool(),
        "score": decision.score.float(),
    }
    if decision.logits is not None:
        found["logits"] = decision.logits.float()
    if decision.thresholds is not None:
        found["thresholds"] = decision.thresholds.float()
    return {name: values.detach().cpu() for name, values in found.items()}


def _decided(model: Any, images: Images, readout: str, device: torch.device) -> Decision:
    """Return a read-out's answers, chunk by chunk; where a chunk does not fit in memory, by smaller ones."""
    size, parts, start = CHUNK[device.type], [], 0
    while start < len(images):
        chunk = images[start : start + size].to(device)
        try:
            decision = model.decide(chunk, readout)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or len(chunk) == 1:
                raise
            size = max(len(chunk) // 2, 1)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if decision.label.shape != (len(chunk),):
            raise ValueError(
                f"read-out {readout!r} gave {tuple(decision.label.shape)} labels for {len(chunk)} images"
            )
        parts.append(decision)
        start += len(chunk)
    return Decision(
        label=torch.cat([each.label for each in parts]),
        rejected=torch.cat([each.rejected for each in parts]),
        score=torch.cat([each.score for each in parts]),
        logits=_joined([each.logits for each in parts]),
        # One row of thresholds for each image, so that a row of outcomes can be judged alone.
        thresholds=_joined(
            [
                None if each.thresholds is None else each.thresholds.expand(len(each.label), -1)
                for each in parts
            ]
        ),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _asked_again(
    model: Any,
    images: Images,
    first: Mapping[str, Tensor],
    job: Evaluate,
    craft_job: Craft,
    device: torch.device,
) -> list[bool | None]:
    """Return of each example whether its answer differed at a second ask, None where it was asked once.

    Asked in another order and in other company: one image alone, the others in two batches. Where a network
    cannot answer so at all, its answers depend on company. A tie that rounding decides is no difference. Of
    other people's code the last batch is asked as an attack asks: with gradients.
    """
    as_attacked = bool(job.victim.train.foreign)
    found: list[bool | None] = [None] * len(images)
    draw = torch.Generator().manual_seed(seed_of(craft_job.key, job.readout, "again"))
    rows = torch.randperm(len(images), generator=draw)[:ASKED_TWICE]
    # A lone image is asked beside itself: alone is how it was asked before.
    rest = len(rows) - 1
    batches = rows.split([1, rest * 2 // 5, rest - rest * 2 // 5]) if rest else [rows.repeat(2)]
    for batch in batches:
        if len(batch) == 0:
            continue
        before = {name: values[batch] for name, values in first.items()}
        z, now = images[batch], None
        if as_attacked and batch is batches[-1]:
            # Some cannot answer so (numpy takes no tensor with a gradient): that is no difference. A limit
            # that rings in there rings again.
            with torch.enable_grad(), contextlib.suppress(Exception):
                # No leaf: a network may write into what it is given.
                now = ask(model, z.clone().requires_grad_() * 1, job.readout, device)
        try:
            changed = _changed(before, now or ask(model, z, job.readout, device)).tolist()
        except OvertimeError:
            raise
        except Exception:  # noqa: BLE001 - it could answer before
            changed = [True] * len(batch)
        for row, differs in zip(batch.tolist(), changed, strict=True):
            found[row] = differs
    return found


def _changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """Return bool (N,): which answers are not the same: another label or refusal, or logits far from before.

    Ties that rounding decides are left out.
    """
    relabelled, refused = (before[name] != now[name] for name in ("label", "rejected"))
    if "logits" not in before:
        # A score says how near a refusal was, and nothing of labels.
        one, other = before["score"], now["score"]
        return relabelled | (refused & ((one - other).abs() > ROUNDING * one.abs()))
    one, other = (each["logits"].double().nan_to_num(0.0, 0.0, 0.0) for each in (before, now))
    apart, spread = (one - other).abs().amax(1), one.amax(1) - one.amin(1)
    return ((relabelled | refused) & (apart > ROUNDING * spread)) | (apart > DRIFT * spread)


def table_of(shards: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return the outcomes of several shards as one table."""
    return pa.concat_tables([_table(each) for each in shards], promote_options="default")


def _table(columns: Mapping[str, Any]) -> pa.Table:
    known = schema()
    arrays, fields = [], []
    for name, values in columns.items():
        plain = values.numpy() if isinstance(values, Tensor) else values
        kind = known.field(name).type if name in known.names else None
        if plain is None:
            plain = [None] * len(columns["truth"])
        arrays.append(pa.array(plain, type=kind))
        fields.append(pa.field(name, arrays[-1].type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def load(data: Data, desk: Desk) -> Split:
    """Return a data set's examples; its digest must be the one that the plan knew."""
    split = datasets.load(data.spec, desk.data_root, desk.folder)
    if split.digest != data.digest:
        raise InputError(f"the files of {data.spec.name} changed since the run was planned; start it again")
    return split


def free_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

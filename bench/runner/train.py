"""The training job: fits a defense, stores its weights, and builds the fitted network again from them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.errors import InputError, OtherNetworkError, TrainingError
from bench.noise import seed_of
from bench.referee.freezing import reseed, seeded
from bench.registry import Entry, bind
from bench.results import fingerprint
from bench.results.origin import versions
from bench.results.store import Store
from bench.runner import probes
from bench.runner.context import WorkerContext, device_name, load
from bench.runner.isolation import building
from bench.runner.preflight import FEW, blamed, try_network
from bench.runner.titles import defense_title
from bench.runner.training import Progress, Trainer
from bench.suite.jobs import FittedDefense, Train
from bench.suite.resolve import Resolved, named_files


def train(
    job: Train, context: WorkerContext, store: Store, code: Mapping[str, str], progress: Progress | None
) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Fit a defense, and check that the stored weights make the same network.

    Args:
        job: The training.
        context: The surroundings of the job.
        store: The results folder, with the trainings of the parts.
        code: Digests of the modules that the training runs; an interrupted training is resumed only with
            these.
        progress: Called with facts after each epoch, if given.

    Returns:
        The function that writes the weights to a path, and entries for the receipt.

    Raises:
        TrainingError: A weight, or the loss of a step, is not finite.
        InputError: Code of other people raises, or leaves its network in training mode.
        OtherNetworkError: The network that is built from the weights gives other answers.
    """
    device = torch.device(context.device)
    split = load(job.data, context)
    with seeded(seed_of(job.key, "initial"), device):
        with blamed(job, "while it is built"):
            model = build(job, context, fitted_parts=True)
        parts = {name: restored(FittedDefense(part), context) for name, part in job.parts}
        trainer = Trainer(
            split, job.key, device, parts=parts, keep=store.partial(job.key), code=code, progress=progress
        )
        with blamed(job, "while it is fitted"):
            model.fit(split, trainer)
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TrainingError(f"the training ended with {name} not finite")
    with blamed(job, f"where it is given images of shape {tuple(job.data.shape[:3])} in [0, 1]"):
        answers = _answers(job, model.eval(), context)
    again = _built(FittedDefense(job), context)
    as_built = _same_state(again, weights)
    again.load_state_dict(weights, strict=True)
    if (other := probes.difference(answers, _answers(job, again, context), alike=False)) is not None:
        raise OtherNetworkError(
            f"{defense_title(job)}: built a second time, with the weights of the first, it is another "
            f"network: {other}. It remembers what it was asked, or what it learns or draws is no "
            "parameter or buffer of it, or it reads what the suite does not name"
        )
    with seeded(seed_of(job.key, "tried"), device):
        # The second one, which nobody asks again: it may remember what it was asked.
        try_network(job, again, split.images[:FEW].to(device))
    facts = {
        "examples": len(split),
        "resumed_from_epoch": trainer.resumed,
        "answers": answers,
        "as_built": as_built,
        "notes": trainer.notes,
    }
    # In the file, so that its digest differs between networks with equal weights and other answers.
    told = {"answers": hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()}
    return lambda path: save_file(weights, path, told), facts


def _answers(job: Train, model: Any, context: WorkerContext) -> probes.Answers:
    entry = job.defense.entry
    return probes.answers(model, entry, job.data.shape, context.device)


def build(
    job: Train,
    context: WorkerContext,
    *,
    inference: Mapping[str, Any] | None = None,
    fitted_parts: bool = False,
) -> Any:
    """Construct a defense without its training, on the device of the job.

    The global random states are left as the construction left them.

    Args:
        job: The training.
        context: The surroundings of the job.
        inference: Settings that replace those of the training at inference time.
        fitted_parts: Whether the defenses that it contains are restored with their weights or constructed
            only.

    Returns:
        The defense, an `nn.Module`.

    Raises:
        TypeError: The registered class made something else.
    """
    entry = job.defense.entry
    given = bind(entry, {**job.defense.params, **(inference or {})})
    for name, part in job.parts:
        given[name] = restored(FittedDefense(part), context) if fitted_parts else build(part, context)
    reseed(seed_of(job.key, "initial"))
    with building():
        model = entry.make(job.data.shape, **given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{defense_title(job)} is a {type(model).__name__}, not an nn.Module")
    return model.to(context.device)


def unchanged(resolved: Resolved[Entry], folder: Path) -> None:
    """Check that the files and the code that settings name are those that the key of the job was made with.

    Args:
        resolved: A registered thing with its settings, as planned.
        folder: The folder of the task file.

    Raises:
        InputError: A file or code changed since the run was planned.
    """
    named = resolved.identity["params"]
    for name in resolved.entry.parameters("content"):
        for path, digest in zip(named_files(resolved.params[name]), named_files(named[name]), strict=True):
            if "sha256:" + fingerprint.file_digest(Path(path)) != digest:
                raise InputError(f"{path} changed since the run was planned; start it again")
    for name in resolved.entry.parameters("code"):
        path = resolved.params[name]
        if path is not None and fingerprint.code_digests(path, folder) != named[name][1]:
            raise InputError(f"the code of {path} changed since the run was planned; start it again")


def restored(fitted_defense: FittedDefense, context: WorkerContext) -> Any:
    """Build a fitted defense from its stored weights, as an instance that only the caller uses.

    Args:
        fitted_defense: The training, and the settings at inference time.
        context: The surroundings of the job.

    Returns:
        The defense, an `nn.Module` in evaluation mode, whose parameters may be trained further.

    Raises:
        OtherNetworkError: It gives other answers than at its training.
        DamagedError: The stored weights are damaged or gone.
    """
    store, train, plain = Store(context.store), fitted_defense.train, FittedDefense(fitted_defense.train)
    weights = load_file(store.artefact("train", train.key), device=context.device)
    receipt = store.receipt("train", train.key) or {}
    here = receipt.get("device") == device_name(context.device) and receipt.get("versions") == versions()
    model = _built(plain, context)

    def compare(when: str) -> None:
        now = _answers(train, model, context)
        if (other := probes.difference(receipt["answers"], now, alike=not here)) is not None:
            raise OtherNetworkError(
                f"{defense_title(train)}: {when}, it is another network than the one that was stored: "
                f"{other}. Something that decides its answers is neither in its weights nor named in the "
                "suite (a file that it reads, code elsewhere, a draw)"
            )

    if receipt["as_built"]:
        # Nothing was learned, so that the constructor alone must make the same network.
        compare("as it is built now")
    model.load_state_dict(weights, strict=True)
    compare("with its stored weights")
    if fitted_defense == plain:
        return model
    model = _built(fitted_defense, context)
    model.load_state_dict(weights, strict=True)
    return model


def _built(fitted_defense: FittedDefense, context: WorkerContext) -> Any:
    """Construct a defense without its training, with its settings at inference time, in evaluation mode."""
    with seeded(seed_of(fitted_defense.train.key, "initial"), torch.device(context.device)):
        return build(fitted_defense.train, context, inference=dict(fitted_defense.inference)).eval()


def _same_state(model: Any, weights: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters and buffers of a network equal these weights."""
    state = model.state_dict()
    return all(name in state and torch.equal(state[name].cpu(), value) for name, value in weights.items())


def fitted(fitted_defense: FittedDefense, context: WorkerContext, store: Store) -> Any:
    """Return a fitted defense without gradients of its parameters, to be attacked or scored.

    The jobs of a process share an instance of a defense of Crossfire. A defense that runs code of other
    people gets a new instance for each job, since it may remember what it was asked.

    Args:
        fitted_defense: The training, and the settings at inference time.
        context: The surroundings of the job.
        store: The results folder.

    Returns:
        The defense, an `nn.Module` in evaluation mode.

    Raises:
        OtherNetworkError: It gives other answers than at its training.
        DamagedError: The stored weights are damaged or gone.
    """
    if fitted_defense.train.foreign:
        return restored(fitted_defense, context).requires_grad_(False)
    weights = store.folder("train", fitted_defense.train.key) / "weights.safetensors"
    return _fitted(fitted_defense, context, weights.stat().st_mtime_ns if weights.exists() else 0)


def forget_fitted() -> None:
    """Build defenses anew from now on: a job that failed may have left traces in those that are shared."""
    _fitted.cache_clear()


@lru_cache(maxsize=4)
def _fitted(fitted_defense: FittedDefense, context: WorkerContext, _written: int) -> Any:
    return restored(fitted_defense, context).requires_grad_(False)

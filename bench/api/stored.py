"""What a results folder holds beside numbers: crafted images and fitted defenses, read back and checked."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.api.direct import Loaded, settings
from bench.data import spec as datasets
from bench.data.spec import DataSpec
from bench.errors import DamagedError, InputError, did_you_mean
from bench.protocols import Images, Labels, Split
from bench.quantities import format_value, fraction
from bench.registry import DefenseEntry, discover
from bench.results.conditions import Condition, conditions_of
from bench.results.manifest import read
from bench.results.standing import broke
from bench.results.store import ABSENT, Store
from bench.runner import outstanding
from bench.runner.context import WorkerContext
from bench.runner.evaluate import shown_images
from bench.runner.train import restored
from bench.runner.worker import look_again
from bench.suite import resolve
from bench.suite.jobs import FittedDefense, Train
from bench.suite.planner import Plan, Planner, make
from bench.suite.yaml_source import Document


@dataclass(frozen=True)
class Shown:
    """What a defense was shown under one condition, and what it answered; N examples, on the CPU."""

    images: Images
    """What it was shown, float32 (N, C, H, W) in [0, 1]; where a move was invalid, the clean image."""
    clean: Images
    """The images before the attack."""
    truth: Labels
    """The true labels, int64 (N,)."""
    label: Labels
    """What the defense answered, int64 (N,); -1 for an answer that is not finite."""
    rejected: Tensor
    """Whether it refused the image, bool (N,)."""
    index: Tensor
    """The index of each example in its data set, int64 (N,)."""

    def __repr__(self) -> str:
        """Return shapes and counts in a line."""
        n, refused = len(self.index), int(self.rejected.sum())
        right = int(((self.label == self.truth) & ~self.rejected).sum())
        moved = int((self.images != self.clean).flatten(1).any(1).sum())
        return (
            f"Shown(images {tuple(self.images.shape)}, {moved} of {n} moved, {right} labelled as they are, "
            f"{refused} refused)"
        )


def shown(root: Path, where: Mapping[str, Any], data_root: Path | None, suite: Path | None) -> Shown:
    """Return what a defense was shown under the one condition with these coordinates."""
    discover()
    manifest = read(root, Path(f"{root.resolve().name}.yaml"))
    return of_condition(root, manifest, _condition(conditions_of(manifest), where), data_root, suite)


def of_condition(
    root: Path, manifest: Mapping[str, Any], condition: Condition, data_root: Path | None, suite: Path | None
) -> Shown:
    """Return what a defense was shown under a condition of a manifest."""
    store = Store(root)
    if (reason := store.damage("evaluate", condition.job)) is not None:
        raise InputError(f"{root}: evaluate {condition.job}: {reason}; bench run {manifest['file']} makes it")
    job = store.job("evaluate", condition.job)
    split = _split(job["attack_run"]["data"], data_root, _suite(root, manifest, suite))
    rows = [slice(*each) for each in job["slices"]]
    try:
        crafted = [load_file(store.artefact("craft", key)) for key in job["crafts"]]
    except DamagedError as error:
        raise InputError(
            f"{root}: crafted images are not kept there ({error}); bench run {manifest['file']} makes them"
        ) from None
    images = [shown_images(part, each, split) for part, each in zip(rows, crafted, strict=True)]
    answers = store.outcomes(condition.job)
    n = len(answers["index"])
    if split.index[:n].tolist() != answers["index"].to_pylist():
        raise InputError(f"{root}: evaluate {condition.job} is of other examples than its images")
    member = condition.facts.member
    kept = torch.ones(n, dtype=torch.bool) if member is None else torch.from_numpy(broke(answers, member))
    return Shown(
        images=torch.cat(images)[kept],
        clean=split.images[:n][kept],
        truth=split.labels[:n][kept],
        label=torch.tensor(answers["label"].to_numpy())[kept],
        rejected=torch.tensor(answers["rejected"].to_numpy())[kept],
        index=split.index[:n][kept],
    )


def _condition(conditions: list[Condition], where: Mapping[str, Any]) -> Condition:
    """Return the one condition with these coordinates."""
    known = sorted({name for each in conditions for name in each.coordinates})
    for name in where:
        if name not in known:
            raise InputError(f"{name}: unknown coordinate{did_you_mean(name, known)}")
    wanted = {name: fraction(value) if name == "radius" else value for name, value in where.items()}
    for name, value in wanted.items():
        values = dict.fromkeys(each.coordinates.get(name) for each in conditions)
        if value not in values:
            raise InputError(f"{name}: no condition has {value!r}{did_you_mean(value, values)}")
    found = [each for each in conditions if wanted.items() <= each.coordinates.items()]
    if not found:
        raise InputError(f"no condition has all of {dict(where)}")
    if len({(each.job, each.facts.member) for each in found}) > 1:
        differ = {
            name: dict.fromkeys(format_value(each.coordinates.get(name)) for each in found) for name in known
        }
        said = "; ".join(f"{name}: {', '.join(values)}" for name, values in differ.items() if len(values) > 1)
        raise InputError(f"{len(found)} conditions are meant; say which ({said})")
    return found[0]


def _split(described: Mapping[str, Any], data_root: Path | None, suite: Path | None) -> Split:
    """Return the examples that a stored job names; its digest must be the one that the job knew."""
    given = {name: value for name, value in described.items() if name != "digest"}
    wanted = DataSpec.model_validate(given)
    split = datasets.load(wanted, data_root, suite.resolve().parent if suite else None)
    if split.digest != described["digest"]:
        raise InputError(f"the files of {wanted.name} changed since the images were crafted")
    return split


def _suite(root: Path, manifest: Mapping[str, Any], given: Path | None) -> Path | None:
    """Return the task file that a results folder was made from, where it lies where it usually does."""
    if given is not None:
        return given
    for path in _namesakes(root, manifest):
        if hashlib.sha256(path.read_bytes()).hexdigest() == manifest["suite_digest"]:
            return path
    return None


def _namesakes(root: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Return the files with the name of a results folder's task file, where such a file usually lies."""
    above = root.resolve().parent
    folders = (Path(), above, above.parent, Path("suites"), above.parent / "suites")
    paths: list[Path] = [folder / manifest["file"] for folder in folders]
    return [path for path in paths if path.is_file()]


def _no_suite(root: Path, manifest: Mapping[str, Any]) -> InputError:
    """Return the refusal of a results folder whose task file is not found as it was."""
    name = manifest["file"]
    if changed := _namesakes(root, manifest):
        return InputError(
            f"suite: {changed[0]} has changed since {root} was made from it; "
            f"suite={str(changed[0])!r} takes it as it is now, where the training is still the same, "
            f"and `bench run {changed[0]}` makes what is not"
        )
    return InputError(
        f"suite: {root} was made from {name}, which lies neither beside the results nor in the working "
        f"directory or in suites/; suite='.../{name}' says where it is"
    )


@dataclass(frozen=True)
class Wish:
    """Which fitted defense of a results folder is wanted."""

    defense: str
    seed: int
    data: str | None
    inference: Mapping[str, Any] | None
    device: str


def loaded(root: Path, wish: Wish, suite: Path | None, data_root: Path | None) -> Loaded:
    """Return a fitted defense from its stored weights, or refuse it."""
    manifest = read(root, Path(f"{root.resolve().name}.yaml"))
    path = _suite(root, manifest, suite)
    if path is None:
        raise _no_suite(root, manifest)
    plan = make(resolve.load(path), data_root)
    train = _training(plan, wish)
    fitted_defense = _served(plan, train, wish)
    store = Store(root)
    reason = outstanding.examine(plan, store, set()).fault(train)
    if reason is not None:
        said = "it is not fitted there" if reason == ABSENT else reason
        raise InputError(f"{root}: {wish.defense}, seed {wish.seed}: {said}; bench run {path} makes it")
    device = torch.device(wish.device)
    context = WorkerContext(store.root, plan.suite.folder, data_root, wish.device, {})
    with settings(device):
        look_again(train, context)
        model = restored(fitted_defense, context).requires_grad_(False)
    return Loaded(model, fitted_defense).eval()


def _training(plan: Plan, wish: Wish) -> Train:
    """Return the one training of a defense that is meant."""
    suite = plan.suite
    resolve.known("defense", "defense", wish.defense, suite.defenses)
    if wish.data is not None:
        resolve.known("data", "data", wish.data, suite.data)
    meant: dict[Train, str] = {}
    for condition in plan.conditions:
        if wish.data in (None, condition.coordinates["data"]):
            for train in outstanding.trainings(condition.job):
                if train.defense == suite.defenses[wish.defense]:
                    meant.setdefault(train, condition.coordinates["data"])
    seeds = sorted({train.seed for train in meant})
    if wish.seed not in seeds:
        raise InputError(f"seed: {wish.defense} is fitted with {', '.join(map(str, seeds))}, not {wish.seed}")
    found = [train for train in meant if train.seed == wish.seed]
    if len(found) > 1:
        names = ", ".join(sorted({meant[train] for train in found}))
        raise InputError(f"data: {wish.defense} is fitted for several, say which: {names}")
    return found[0]


def _served(plan: Plan, train: Train, wish: Wish) -> FittedDefense:
    """Return a training as it is asked."""
    suite, entry = plan.suite, train.defense.entry
    assert isinstance(entry, DefenseEntry)
    if wish.inference is None:
        inference = dict(suite.inference_settings[wish.defense][0])
    else:
        for name in wish.inference:
            if name not in entry.inference:
                raise InputError(
                    f"inference.{name}: {entry.name} has no such parameter to set at inference time"
                    f"{did_you_mean(name, entry.inference)}"
                )
        given = {**train.defense.params, **wish.inference}
        model = Document(suite.path, {}, {}).check(entry.schema, given, "inference")
        resolved = model.model_dump(mode="json", by_alias=True)
        inference = {name: resolved[name] for name in wish.inference}
    found: FittedDefense = Planner(suite, None).fitted(train, inference)
    return found

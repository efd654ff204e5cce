"""From the words of a task file to what they name: every name looked up, every parameter filled in.

Every complaint names its line. What follows from a suite (conditions and jobs) is `planner.py`'s.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError

from bench.data.spec import DataSpec, model_of
from bench.errors import InputError, did_you_mean
from bench.registry import (
    ATTACKS,
    DEFENSES,
    AttackEntry,
    DefenseEntry,
    Entry,
    Registry,
    UseModel,
    ViewEntry,
    discover,
    needing,
)
from bench.results import fingerprint
from bench.suite import yaml_source
from bench.suite.names import named
from bench.suite.schema import (
    ANSWERS,
    AVERAGED,
    UNSEEN,
    Addition,
    AttackUse,
    DefenseUse,
    SuiteModel,
    Task,
    ViewUse,
    expanded,
)
from bench.suite.yaml_source import Document, Place

E = TypeVar("E", bound=Entry)
E_co = TypeVar("E_co", bound=Entry, covariant=True)


@dataclass(frozen=True)
class Resolved(Generic[E_co]):
    """A registered thing with every parameter filled in, as the suite means it."""

    entry: E_co = field(compare=False, repr=False)
    params: Mapping[str, Any]
    """What the thing is called with: plain JSON, paths absolute."""
    identity: Mapping[str, Any]
    """What enters keys: name, version, parameters; files and code by the digest of their content."""
    label: str | None = field(default=None, compare=False)
    """What the suite calls it; enters no key, and None of what it does not name itself."""

    @property
    def called(self) -> str:
        """What messages call it: the suite's label, else the registered name."""
        return self.name if self.label is None else self.label

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that it and the attacks among its parameters consist of, with all that they import."""
        entries: list[Entry] = [self.entry, *(each.entry for each in inner(self))]
        return frozenset(name for each in entries for name in fingerprint.closure(each.module))


@dataclass(frozen=True)
class Planned:
    """An attack that a suite needs and that is not there: unwritten, or of a library that is absent."""

    name: str
    """The name that it will be registered under."""
    reason: str
    """Why it is not there."""
    params: Mapping[str, Any]
    """As they are written, unchecked."""
    installed: bool = True
    """Whether it is missing because nobody has written it; else because its library is not installed."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it; no job comes of it, and so no key."""
        return {"use": self.name, "planned": self.reason, "params": dict(self.params)}


def resolve(entry: E, params: Mapping[str, Any], folder: Path) -> Resolved[E]:
    """Fill in an entry's parameters.

    Args:
        entry: what is called with them.
        params: those that are given, as a task file writes them.
        folder: where relative paths start, and where named code is looked for.

    Returns:
        The entry with every parameter, and what of them enters keys.

    Raises:
        InputError: a parameter does not fit the schema, a file is not there, or a library is not installed.
    """
    try:
        model = entry.schema.model_validate(dict(params))
    except ValidationError as error:
        raise InputError(yaml_source.sentence(entry.schema, error)) from None
    plain = model.model_dump(mode="json", by_alias=True)
    identity: dict[str, Any] = {}
    for name in entry.parameters("content"):
        if plain[name] is not None:
            several = isinstance(plain[name], list)
            paths = [fingerprint.located(each, folder) for each in named_files(plain[name])]
            for path in paths:
                if not os.path.isfile(path):
                    raise InputError(f"{name}: no such file: {path}")
            digests = ["sha256:" + fingerprint.file_digest(path) for path in paths]
            resolved = [str(path.resolve()) for path in paths]
            plain[name], identity[name] = (resolved, digests) if several else (resolved[0], digests[0])
    for name in entry.parameters("code"):
        if plain[name] is not None:
            identity[name] = [plain[name], fingerprint.code_digests(plain[name], folder)]
    for name in _inner_names(entry):
        plain[name], identity[name] = _resolve_inner(plain[name], folder)
    # What a suite calls a part says nothing of it: a training's key has the part's own.
    labelled = {name for name in entry.parameters("part") if plain[name] is not None}
    kept = {
        name: identity.get(name, value)
        for name, value in plain.items()
        if name not in labelled and not (name in entry.neutral and entry.neutral[name] == value)
    }
    made_by = {"library": _installed(entry.library)} if entry.library else {}
    needed: Any = needing(entry, plain) if isinstance(entry, AttackEntry) else entry
    return Resolved(needed, plain, {"use": entry.name, "version": entry.version, "params": kept, **made_by})


def _installed(library: str) -> str:
    """Return a library and its version, as in `pip freeze`."""
    try:
        return f"{library}=={metadata.version(library)}"
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{library} is not installed; pip install 'crossfire-bench[libraries]' brings it"
        ) from None


def named_files(value: str | Sequence[str] | None) -> list[str]:
    """Return the files that a parameter names.

    Args:
        value: a path, several, or None.

    Returns:
        A list of none, one or several.
    """
    return [value] if isinstance(value, str) else list(value or ())


def _resolve_inner(value: Any, folder: Path) -> tuple[Any, Any]:
    """Return an inner attack (or a list of them, or nothing) filled in, and what enters keys."""
    if isinstance(value, list):
        pairs = [_resolve_inner(each, folder) for each in value]
        return [plain for plain, _ in pairs], [identity for _, identity in pairs]
    if value is None:
        return None, None
    inner = resolve(ATTACKS[value["use"]], {k: v for k, v in value.items() if k != "use"}, folder)
    return {"use": value["use"], **inner.params}, inner.identity


def _inner_names(entry: Entry) -> list[str]:
    """Return the parameters that hold attacks."""
    return [
        info.alias or name for name, info in entry.schema.model_fields.items() if _holds_use(info.annotation)
    ]


def _holds_use(annotation: Any) -> bool:
    return annotation is UseModel or any(_holds_use(each) for each in get_args(annotation))


def inner(resolved: Resolved[Entry]) -> list[Resolved[AttackEntry]]:
    """Return the attacks among a thing's parameters.

    Args:
        resolved: an attack or a defense.

    Returns:
        Each inner attack with its own parameters filled in, in the order of the signature.
    """
    found: list[Resolved[AttackEntry]] = []
    for name in _inner_names(resolved.entry):
        value, identity = resolved.params[name], resolved.identity["params"].get(name)
        several = isinstance(value, list)
        for place, each in enumerate(value if several else [value]):
            if each is not None:
                params = {key: value for key, value in each.items() if key != "use"}
                own = identity[place] if several and identity is not None else identity
                found.append(Resolved(needing(ATTACKS[each["use"]], params), params, own or {}))
    return found


@dataclass(frozen=True)
class Suite:
    """A checked suite: names resolved, parameters filled in."""

    document: Document
    model: SuiteModel
    data: Mapping[str, DataSpec]
    defenses: Mapping[str, Resolved[DefenseEntry]]
    attacks: Mapping[str, Resolved[AttackEntry] | Planned]
    inference_settings: Mapping[str, tuple[Mapping[str, Any], ...]]
    """For each defense, the settings at inference time; several where a list was given."""
    added: Addition = field(default_factory=Addition)
    """What `bench doctor --fix` added to the file; it is among the attacks and the tasks."""
    added_digest: str | None = None
    """The sha256 of the file of what was added; None where there is none."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.document.path

    @property
    def name(self) -> str:
        """The file's name without its ending: that of the results folder."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Where the file lies; relative paths start here, and it is on the import path of jobs."""
        return self.path.resolve().parent

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file."""
        return fingerprint.file_digest(self.path)

    def at(self, *place: str | int) -> str:
        """Return file, line and place, for messages.

        Args:
            place: the way to a value: keys and positions.
        """
        return self.document.at(*place)


def load(path: Path) -> Suite:
    """Read and check a task file.

    Args:
        path: the file; its folder is where relative paths start and own code is looked for.

    Returns:
        The suite, with every name resolved and every parameter filled in.

    Raises:
        InputError: something in it cannot be used; the message has its line.
    """
    discover()
    fingerprint.importable(path.resolve().parent)
    doc = yaml_source.read(path)
    if not isinstance(doc.data, dict):
        raise InputError(f"{doc.at()}: expected a mapping with data, defenses, attacks and tasks")
    model = doc.check(SuiteModel, doc.data)
    folder = path.resolve().parent
    return checked(
        Suite(
            document=doc,
            model=model,
            data={name: _data(doc, name, given) for name, given in model.data.items()},
            defenses={
                name: resolved(doc, ("defenses", name), DEFENSES, use, folder)
                for name, use in model.defenses.items()
            },
            attacks={name: _attack(doc, name, use, folder) for name, use in model.attacks.items()},
            inference_settings={name: _serves(doc, name, use) for name, use in model.defenses.items()},
        )
    )


def extended(suite: Suite, path: Path) -> Suite:
    """Return a suite with what `bench doctor --fix` added to it.

    Args:
        suite: the checked suite.
        path: the file of what was added; it need not be there.

    Raises:
        InputError: something in it cannot be used, or does not fit the suite any more.
    """
    if not path.is_file():
        return suite
    mended = f"; bench doctor {suite.path} --fix writes {path} anew where it is deleted"
    try:
        doc = yaml_source.read(path)
        added = _fitting(doc.check(Addition, doc.data), suite)
        if both := sorted(added.attacks.keys() & suite.attacks.keys()):
            raise InputError(f"{doc.at('attacks', both[0])}: {suite.path} has an attack of this name, too")
        made = {name: _attack(doc, name, use, suite.folder) for name, use in added.attacks.items()}
        model = suite.model.model_copy(
            update={
                "attacks": {**suite.model.attacks, **added.attacks},
                # What the file says of all attacks means those that it had.
                "tasks": [*(_spelled(task, suite) for task in suite.model.tasks), *added.tasks],
            }
        )
        digest = fingerprint.file_digest(path)
        attacks = {**suite.attacks, **made}
        return checked(replace(suite, model=model, attacks=attacks, added=added, added_digest=digest))
    except InputError as error:
        raise InputError(f"{path}: {error}{mended}") from None


def _fitting(added: Addition, suite: Suite) -> Addition:
    """Return what was added without what the suite does not ask for any more: other radii, gone defenses."""

    def asked(task: Task) -> bool:
        return any(
            each.data == task.data
            and each.threat.norm == task.threat.norm
            and {*task.threat.radius} <= {*each.threat.radius}
            and {*(task.defenses or ())} <= {*(each.defenses or suite.defenses)}
            for each in suite.model.tasks
        )

    tasks = [task for task in added.tasks if asked(task)]
    named = {name for task in tasks for name in task.attacks or ()}
    return added.model_copy(
        update={
            "tasks": tasks,
            "attacks": {name: use for name, use in added.attacks.items() if name in named},
            "doctor": [name for name in added.doctor if name in suite.defenses],
        }
    )


def _spelled(task: Task, suite: Suite) -> Task:
    """Return a task that names its attacks."""
    return task if task.attacks else task.model_copy(update={"attacks": list(suite.attacks)})


def in_worst_mode(suite: Suite) -> Suite:
    """Return a suite all of whose tasks run in worst mode, whatever the file says.

    Args:
        suite: the checked suite.
    """
    tasks = [task.model_copy(update={"worst": True}) for task in suite.model.tasks]
    return replace(suite, model=suite.model.model_copy(update={"tasks": tasks}))


def checked(suite: Suite) -> Suite:
    """Return a suite; raise `InputError` where what it names does not fit together."""
    _check_parts(suite)
    _check_attacks(suite)
    for position in range(len(suite.model.tasks)):
        _check_task(suite, position)
    return suite


def _data(doc: Document, name: str, given: Any) -> DataSpec:
    if not isinstance(given, dict):
        raise InputError(f"{doc.at('data', name)}: expected a mapping such as {{name: digits, split: test}}")
    try:
        model = model_of(str(given["name"])) if "name" in given else DataSpec
        return doc.check(model, given, "data", name)
    except InputError as error:
        text = str(error)
        raise InputError(text if doc.path.name in text else f"{doc.at('data', name)}: {text}") from None


def _attack(doc: Document, name: str, use: AttackUse, folder: Path) -> Resolved[AttackEntry] | Planned:
    if use.planned is None:
        if use.optional and use.use in ATTACKS and (reason := _lacking(ATTACKS[use.use])) is not None:
            return Planned(use.use, reason, dict(use.model_extra or {}), installed=False)
        return resolved(doc, ("attacks", name), ATTACKS, use, folder)
    if use.use in ATTACKS:
        raise InputError(f"{doc.at('attacks', name, 'planned')}: {use.use} is there now; take this key out")
    return Planned(use.use, use.planned, dict(use.model_extra or {}))


def _lacking(entry: AttackEntry) -> str | None:
    """Return that the library of an attack is not installed; None where it is, or where there is none."""
    try:
        _ = entry.schema
    except InputError as error:
        return str(error)
    return None


def resolved(
    doc: Document, place: Place, registry: Registry[E], use: DefenseUse | AttackUse, folder: Path
) -> Resolved[E]:
    """Look up what a task file, or a call, names, and fill in its parameters.

    Args:
        doc: where it stands; refusals begin with file, line and place.
        place: the way to it in the document.
        registry: the attacks, or the defenses.
        use: the name and the parameters that are given.
        folder: where relative paths start.

    Returns:
        The entry with every parameter; its label is the last word of `place`.

    Raises:
        InputError: the name is unknown, or a parameter does not fit.
    """
    try:
        entry = registry[use.use]
    except InputError as error:
        raise InputError(f"{doc.at(*place, 'use')}: {error}") from None
    given = dict(use.model_extra or {})
    try:
        schema = entry.schema
    except InputError as error:
        # What it adapts is not installed.
        raise InputError(f"{doc.at(*place, 'use')}: {error}") from None
    doc.check(schema, given, *place)
    for name in _inner_names(entry):
        value = given.get(name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _check_inner(doc, (*place, name), each)
    try:
        return replace(resolve(entry, given, folder), label=str(place[-1]))
    except InputError as error:
        raise InputError(f"{doc.at(*place)}: {error}") from None


def _check_inner(doc: Document, place: Place, value: Mapping[str, Any]) -> None:
    try:
        schema = ATTACKS[str(value.get("use"))].schema
    except InputError as error:
        raise InputError(f"{doc.at(*place, 'use')}: {error}") from None
    doc.check(schema, {k: v for k, v in value.items() if k != "use"}, *place)


def _serves(doc: Document, name: str, use: DefenseUse) -> tuple[Mapping[str, Any], ...]:
    entry = DEFENSES[use.use]
    choices: list[dict[str, Any]] = [{}]
    for parameter, given in use.inference.items():
        place = ("defenses", name, "inference", parameter)
        if parameter not in entry.inference:
            raise InputError(
                f"{doc.at(*place)}: {use.use} has no such parameter to set at inference time"
                f"{did_you_mean(parameter, entry.inference)}"
            )
        values = given if isinstance(given, list) else [given]
        if not values:
            raise InputError(f"{doc.at(*place)}: expected a value or several, found an empty list")
        resolved = []
        for value in values:
            try:
                model = entry.schema.model_validate({**(use.model_extra or {}), parameter: value})
            except ValidationError as error:
                raise InputError(f"{doc.at(*place)}: {yaml_source.complaint(error.errors()[0])}") from None
            resolved.append(model.model_dump(mode="json", by_alias=True)[parameter])
            _check_shown(doc.at(*place), resolved[-1])
        choices = [{**choice, parameter: value} for choice in choices for value in resolved]
    return tuple(choices)


def _check_shown(place: str, value: object) -> None:
    """Raise where a parameter that tables show could not be shown."""
    if isinstance(value, str):
        try:
            named(value)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None


def known(place: str, kind: str, name: str, options: Iterable[str]) -> None:
    """Check that a suite defines a name.

    Args:
        place: file, line and place of the name.
        kind: what it names, for the message.
        name: the name.
        options: those that there are.

    Raises:
        InputError: it is not among them.
    """
    options = list(options)
    if name not in options:
        raise InputError(f"{place}: unknown {kind} {name!r}{did_you_mean(name, options)}")


DEEPEST = 100
"""The most defenses in a chain in which each is built on the next.

A network holds its parts, and so does its training: whatever pickles one for another process, copies it or
names its tensors goes down the chain on the stack, which Python limits to 1,000 calls. Of these, pickling
needs five for each defense. So 100 leave half of the stack to who calls (a notebook, a cluster's worker).
"""


def _check_parts(suite: Suite) -> None:
    def follow(name: str, trail: tuple[str, ...]) -> None:
        resolved = suite.defenses[name]
        for parameter in resolved.entry.parameters("part"):
            other = resolved.params[parameter]
            if other is None:
                continue
            place = suite.at("defenses", name, parameter)
            known(place, "defense", other, suite.defenses)
            if other in (*trail, name):
                raise InputError(f"{place}: {' -> '.join((*trail, name, other))} goes round in a circle")
            if len(trail) + 2 > DEEPEST:
                top = (*trail, name)[0]
                raise InputError(
                    f"{place}: {top} is built on more than {DEEPEST - 1} defenses, each on the next"
                )
            follow(other, (*trail, name))

    for name in suite.defenses:
        follow(name, ())


def _check_attacks(suite: Suite) -> None:
    for name, use in suite.model.attacks.items():
        resolved = suite.attacks[name]
        entry = resolved.entry if isinstance(resolved, Resolved) else None
        if use.targets != "none" and entry is not None and entry.blind:
            where = suite.at("attacks", name, "targets")
            raise InputError(f"{where}: {use.use} looks at nothing, so that it has no targets")
        if entry is not None and (reason := _only_float32(suite, name, entry)) is not None:
            where = suite.at("attacks", name, *(["precision"] if use.precision else []))
            raise InputError(
                f"{where}: {use.use} cannot be searched in bfloat16: {reason}; "
                "write `precision: float32` beside it"
            )
        if use.source is None:
            continue
        place = ("attacks", name, "source")
        known(suite.at(*place, "defense"), "defense", use.source.defense, suite.defenses)
        find_view(suite, (*place, "view"), use.source.view, [use.source.defense])
        if len(suite.inference_settings[use.source.defense]) > 1:
            raise InputError(
                f"{suite.at(*place, 'defense')}: {use.source.defense} has several settings "
                "at inference time; name a defense with one"
            )
        if entry is not None and (entry.blind or entry.access == "decision"):
            raise InputError(
                f"{suite.at(*place)}: {use.use} looks through no view (access: {entry.access}), "
                "so that it has no use for a source"
            )


def _only_float32(suite: Suite, name: str, entry: AttackEntry) -> str | None:
    """Return why an attack cannot search in bfloat16, where it is asked to; None where it can, or is not."""
    own = suite.model.attacks[name].precision
    if (own or suite.model.precision) == "float32":
        return None
    if entry.blind:
        # What the file says of all attacks concerns those that ask a network.
        return "it looks at nothing" if own else None
    if entry.library is not None:
        return f"{entry.library} computes by itself"
    if entry.rng == "shard":
        return "it draws for a whole shard, so that no example can be searched again alone"
    if entry.space in UNSEEN:
        return f"it searches {entry.space} space, whose points are no images that could be judged again"
    return None


def find_view(suite: Suite, place: Place, choice: ViewUse, defenses: Sequence[str]) -> None:
    """Check that a view can be looked through.

    Args:
        suite: the suite.
        place: where the view stands in it.
        choice: the view with its parameters, ``{readout}`` filled in.
        defenses: labels of the defenses that are attacked.

    Raises:
        InputError: none of the defenses offers the view, its parameters do not fit, or it cannot be averaged.
    """
    offers: list[tuple[ViewEntry, dict[str, Any]]] = []
    names: list[str] = []
    for name in defenses:
        entry = suite.defenses[name].entry
        names += [*entry.views, *entry.aliases]
        if (found := entry.view(choice.use)) is not None:
            offers.append((found, entry.view_params(choice.use, choice.params)))
    if not offers:
        raise InputError(
            f"{suite.at(*place)}: no view {choice.use!r} in {', '.join(defenses)}"
            f"{did_you_mean(choice.use, set(names))}"
        )
    for value in choice.params.values():
        _check_shown(suite.at(*place), value)
    for found, params in offers:
        suite.document.check(found.schema, params, *place)
        if choice.draws > 1 and found.space not in AVERAGED:
            raise InputError(
                f"{suite.at(*place)}: draws: view {found.name!r} is looked at in {found.space} space, where "
                f"attacks ask for more than logits; averaged are views in {' and '.join(AVERAGED)} space"
            )


def _check_task(suite: Suite, position: int) -> None:
    task = suite.model.tasks[position]
    place: Place = ("tasks", position)
    known(suite.at(*place, "data"), "data", task.data, suite.data)
    if task.fit is not None:
        known(suite.at(*place, "fit"), "data", task.fit, suite.data)
    for name in task.defenses or ():
        known(suite.at(*place, "defenses"), "defense", name, suite.defenses)
    for name in task.attacks or ():
        known(suite.at(*place, "attacks"), "attack", name, suite.attacks)
    defenses = task.defenses or list(suite.defenses)
    readouts = {each for name in defenses for each in suite.defenses[name].entry.readouts}
    for readout in task.readouts or ():
        known(suite.at(*place, "readouts"), "read-out", readout, readouts)
    for choice in task.views or ():
        for use in {expanded(choice, readout).use for readout in task.readouts or readouts}:
            if use.startswith(ANSWERS):
                where = suite.at(*place, "views")
                known(where, "read-out", use.removeprefix(ANSWERS), readouts)
                if choice.params or choice.draws > 1:
                    raise InputError(f"{where}: {use}: answers have no parameters and are asked once")
                continue
            find_view(suite, (*place, "views"), choice.model_copy(update={"use": use}), defenses)
    norm = task.threat.norm
    for name in task.attacks or list(suite.attacks):
        resolved = suite.attacks[name]
        if isinstance(resolved, Planned):
            continue
        entry = resolved.entry
        if norm not in entry.norms and task.attacks is not None:
            made_for = sorted(entry.norms)
            raise InputError(
                f"{suite.at(*place, 'threat')}: {name} ({entry.name}) is made for {', '.join(made_for)}, not "
                f"{norm!r}; take it out of this task's attacks, or give it a task of its own in "
                f"{' or '.join(made_for)}"
            )

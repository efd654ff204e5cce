"""The suite: what tasks.yaml says, checked before anything runs.

Here every name is looked up, every parameter filled in, and every complaint names its line. What
follows from a suite (cells, jobs, keys) is `plan.py`'s.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bench import document, sources
from bench.data import DataSpec, model_of
from bench.document import Document, Place
from bench.errors import InputError, did_you_mean
from bench.names import FileName, Name, Sentence, named
from bench.protocols import Norm
from bench.registry import (
    ATTACKS,
    DEFENSES,
    AttackEntry,
    DefenseEntry,
    Entry,
    Number,
    UseModel,
    ViewEntry,
    Whole,
    discover,
)
from bench.table_models import Table


class Model(BaseModel):
    """Base of what stands in a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _radius(value: float) -> float:
    if not value > 0:
        raise ValueError(f"expected a radius above 0, found {value:g}")
    return value


Radius = Annotated[Number, AfterValidator(_radius)]


class Threats(Model):
    """A norm and one radius or several; none: as little as possible."""

    norm: Norm
    radius: Annotated[
        list[Radius],
        BeforeValidator(_listed, json_schema_input_type=Radius | list[Radius]),
        Field(min_length=1),
    ] = [math.inf]


class ViewUse(BaseModel):
    """``{use: bpda, temperature: 0.1}``; a bare name is short for no parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    draws: Annotated[Whole, Field(ge=1)] = 1
    """How often each point is asked; losses are averaged over the answers (EOT)."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters beside the name."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """What a table calls it: the name, and what is not as usual."""
        said = self.params | ({"draws": self.draws} if self.draws > 1 else {})
        return self.use + (
            f"({', '.join(f'{name}={value}' for name, value in said.items())})" if said else ""
        )


def _view(value: object) -> object:
    return {"use": value} if isinstance(value, str) else value


ViewChoice = Annotated[ViewUse, BeforeValidator(_view, json_schema_input_type=str | ViewUse)]


ANSWERS = "decision:"
"""The view of a read-out's answers, before its name: all that an attack by decisions sees."""

AVERAGED = ("latent", "pixel")
"""Spaces where all that an attack asks for is logits, so that their loss can be averaged over draws."""

T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1)]
"""One or more; nothing at all means every one there is."""


class Origin(Model):
    """Where a transferred attack is crafted: on another defense, through one of its views."""

    defense: str
    view: ViewChoice
    seed: Literal["same"] | Whole = "same"


class DefenseUse(BaseModel):
    """A defense with its parameters; what is served may differ from what was trained."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    serve: dict[str, Any] = {}


class AttackUse(BaseModel):
    """An attack with its parameters; crafted on the victim unless it has a source."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: Name
    planned: Sentence | None = None
    """Why `use` is not registered yet: its cells are skipped, its other parameters are not looked at."""
    source: Origin | None = None
    targets: (
        Literal["none", "others", "next", "random"]
        | Annotated[list[Annotated[Whole, Field(ge=1)]], Field(min_length=1)]
    ) = "none"
    """The labels to reach: offsets from the true class, or a word for them."""
    time_limit: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that one shard may take; then it is stopped, and leaves a hole."""


class Task(Model):
    """A block of cells: everything it names is crossed."""

    data: str
    fit: str | None = None
    threat: Threats
    defenses: Several[str] | None = None
    attacks: Several[str] | None = None
    views: Several[ViewChoice] | None = None
    readouts: Several[str] | None = None
    limit: Annotated[Whole, Field(ge=1)] | None = None
    seeds: list[Annotated[Whole, Field(ge=0)]] = Field(default=[0], min_length=1)


class SuiteModel(Model):
    """A task file as it is written."""

    data: dict[Name, Any]
    defenses: dict[Name, DefenseUse]
    attacks: dict[Name, AttackUse]
    tasks: list[Task] = Field(min_length=1)
    tables: dict[FileName, Table] = {}
    time_limit: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that any one job may take, a training, a shard or an evaluation; then it fails."""


@dataclass(frozen=True)
class Filled:
    """A registered thing with every parameter filled in, as the suite means it."""

    entry: Entry = field(compare=False, repr=False)
    params: Mapping[str, Any]
    """What the thing is called with: plain JSON, paths absolute."""
    identity: Mapping[str, Any]
    """What enters keys: name, version, parameters; files and code by the digest of their content."""

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name


@dataclass(frozen=True)
class Planned:
    """An attack that a suite needs and that nobody has written yet: the settings it will be run with."""

    name: str
    """The name that it will be registered under."""
    reason: str
    """Why it is not there."""
    params: Mapping[str, Any]
    """As they are written, unchecked."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it; no job comes of it, and so no key."""
        return {"use": self.name, "planned": self.reason, "params": dict(self.params)}


def fill(entry: Entry, params: Mapping[str, Any], folder: Path) -> Filled:
    """Fill in an entry's parameters; raise pydantic's error where they do not fit."""
    plain = entry.schema.model_validate(dict(params)).model_dump(mode="json", by_alias=True)
    identity: dict[str, Any] = {}
    for name in entry.parameters("content"):
        if plain[name] is not None:
            several = isinstance(plain[name], list)
            paths = [sources.located(each, folder) for each in named_files(plain[name])]
            for path in paths:
                if not os.path.isfile(path):
                    raise InputError(f"{name}: no such file: {path}")
            digests = ["sha256:" + sources.file_digest(path) for path in paths]
            resolved = [str(path.resolve()) for path in paths]
            plain[name], identity[name] = (resolved, digests) if several else (resolved[0], digests[0])
    for name in entry.parameters("code"):
        if plain[name] is not None:
            identity[name] = [plain[name], sources.code_digests(plain[name], folder)]
    for name in _inner_names(entry):
        plain[name], identity[name] = _fill_inner(plain[name], folder)
    kept = {
        name: identity.get(name, value)
        for name, value in plain.items()
        if not (name in entry.neutral and entry.neutral[name] == value)
    }
    made_by = {"library": _installed(entry.library)} if entry.library else {}
    return Filled(entry, plain, {"use": entry.name, "version": entry.version, "params": kept, **made_by})


def _installed(library: str) -> str:
    """Return a library and its version, as in `pip freeze`."""
    try:
        return f"{library}=={metadata.version(library)}"
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{library} is not installed; pip install 'crossfire-bench[libraries]' brings it"
        ) from None


def named_files(value: str | Sequence[str] | None) -> list[str]:
    """Return the files that a parameter names: none, one or several."""
    return [value] if isinstance(value, str) else list(value or ())


def _fill_inner(value: Any, folder: Path) -> tuple[Any, Any]:
    """Return an inner attack (or a list of them, or nothing) filled in, and what enters keys."""
    if isinstance(value, list):
        pairs = [_fill_inner(each, folder) for each in value]
        return [plain for plain, _ in pairs], [identity for _, identity in pairs]
    if value is None:
        return None, None
    inner = fill(ATTACKS[value["use"]], {k: v for k, v in value.items() if k != "use"}, folder)
    return {"use": value["use"], **inner.params}, inner.identity


def _inner_names(entry: Entry) -> list[str]:
    """Return the parameters that hold attacks."""
    return [
        info.alias or name for name, info in entry.schema.model_fields.items() if _holds_use(info.annotation)
    ]


def _holds_use(annotation: Any) -> bool:
    return annotation is UseModel or any(_holds_use(each) for each in get_args(annotation))


def inner(filled: Filled) -> list[tuple[AttackEntry, Mapping[str, Any]]]:
    """Return the attacks among a thing's parameters, with their own parameters filled in."""
    found: list[tuple[AttackEntry, Mapping[str, Any]]] = []
    for name in _inner_names(filled.entry):
        value = filled.params[name]
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                params = {key: value for key, value in each.items() if key != "use"}
                found.append((ATTACKS[each["use"]], params))
    return found


@dataclass(frozen=True)
class Suite:
    """A checked suite: names resolved, parameters filled in."""

    document: Document
    model: SuiteModel
    data: Mapping[str, DataSpec]
    defenses: Mapping[str, Filled]
    attacks: Mapping[str, Filled | Planned]
    serves: Mapping[str, tuple[Mapping[str, Any], ...]]
    """For each defense, the parameters it is served with; several where a list was given."""

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
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def at(self, *place: str | int) -> str:
        """Return file, line and place, for messages."""
        return self.document.at(*place)


def load(path: Path) -> Suite:
    """Read and check a task file."""
    discover()
    sources.importable(path.resolve().parent)
    doc = document.read(path)
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
                name: filled(doc, ("defenses", name), DEFENSES, use, folder)
                for name, use in model.defenses.items()
            },
            attacks={name: _attack(doc, name, use, folder) for name, use in model.attacks.items()},
            serves={name: _serves(doc, name, use) for name, use in model.defenses.items()},
        )
    )


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


def _attack(doc: Document, name: str, use: AttackUse, folder: Path) -> Filled | Planned:
    if use.planned is None:
        return filled(doc, ("attacks", name), ATTACKS, use, folder)
    if use.use in ATTACKS:
        raise InputError(f"{doc.at('attacks', name, 'planned')}: {use.use} is there now; take this key out")
    return Planned(use.use, use.planned, dict(use.model_extra or {}))


def filled(doc: Document, place: Place, registry: Any, use: DefenseUse | AttackUse, folder: Path) -> Filled:
    """Look up what `use` names in a registry, and fill in its parameters; complaints name their `place`."""
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
        return fill(entry, given, folder)
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
    for parameter, given in use.serve.items():
        place = ("defenses", name, "serve", parameter)
        if parameter not in entry.served:
            raise InputError(
                f"{doc.at(*place)}: {use.use} serves no such parameter{did_you_mean(parameter, entry.served)}"
            )
        values = given if isinstance(given, list) else [given]
        if not values:
            raise InputError(f"{doc.at(*place)}: expected a value or several, found an empty list")
        filled = []
        for value in values:
            try:
                model = entry.schema.model_validate({**(use.model_extra or {}), parameter: value})
            except ValidationError as error:
                text = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise InputError(f"{doc.at(*place)}: {text[0].lower()}{text[1:]}, found {value!r}") from None
            filled.append(model.model_dump(mode="json", by_alias=True)[parameter])
            _check_shown(doc.at(*place), filled[-1])
        choices = [{**choice, parameter: value} for choice in choices for value in filled]
    return tuple(choices)


def _check_shown(place: str, value: object) -> None:
    """Raise where a parameter that tables show could not be shown."""
    if isinstance(value, str):
        try:
            named(value)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None


def known(place: str, kind: str, name: str, options: Iterable[str]) -> None:
    """Raise where a name is not among those that a suite defines."""
    options = list(options)
    if name not in options:
        raise InputError(f"{place}: unknown {kind} {name!r}{did_you_mean(name, options)}")


def _check_parts(suite: Suite) -> None:
    def follow(name: str, trail: tuple[str, ...]) -> None:
        filled = suite.defenses[name]
        for parameter in filled.entry.parameters("part"):
            other = filled.params[parameter]
            if other is None:
                continue
            place = suite.at("defenses", name, parameter)
            known(place, "defense", other, suite.defenses)
            if other in (*trail, name):
                raise InputError(f"{place}: {' -> '.join((*trail, name, other))} goes round in a circle")
            follow(other, (*trail, name))

    for name in suite.defenses:
        follow(name, ())


def _check_attacks(suite: Suite) -> None:
    for name, use in suite.model.attacks.items():
        filled = suite.attacks[name]
        entry = filled.entry if isinstance(filled, Filled) else None
        assert entry is None or isinstance(entry, AttackEntry)
        if use.targets != "none" and entry is not None and entry.access == "none":
            where = suite.at("attacks", name, "targets")
            raise InputError(f"{where}: {use.use} looks at nothing, so that it has no targets")
        if use.source is None:
            continue
        place = ("attacks", name, "source")
        known(suite.at(*place, "defense"), "defense", use.source.defense, suite.defenses)
        find_view(suite, (*place, "view"), use.source.view, [use.source.defense])
        if len(suite.serves[use.source.defense]) > 1:
            raise InputError(
                f"{suite.at(*place, 'defense')}: {use.source.defense} is served in several ways; "
                "name a defense that is served in one"
            )
        if entry is not None and entry.access in ("none", "decision"):
            raise InputError(
                f"{suite.at(*place)}: {use.use} looks through no view (access: {entry.access}), "
                "so that it has no use for a source"
            )


def find_view(suite: Suite, place: Place, choice: ViewUse, defenses: Sequence[str]) -> None:
    """Raise where none of the defenses offers a view, or where its parameters do not fit."""
    offers: list[tuple[ViewEntry, dict[str, Any]]] = []
    names: list[str] = []
    for name in defenses:
        entry = suite.defenses[name].entry
        assert isinstance(entry, DefenseEntry)
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


def expanded(choice: ViewUse, readout: str) -> ViewUse:
    """Return a view with ``{readout}`` filled in: ``e2e_{readout}`` is one name for each read-out."""
    return choice.model_copy(update={"use": choice.use.replace("{readout}", readout)})


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
    readouts = {each for name in defenses for each in suite.defenses[name].entry.readouts}  # type: ignore[attr-defined]
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
        filled = suite.attacks[name]
        if isinstance(filled, Planned):
            continue
        entry = filled.entry
        assert isinstance(entry, AttackEntry)
        if norm not in entry.norms and task.attacks is not None:
            raise InputError(
                f"{suite.at(*place, 'threat')}: {name} ({entry.name}) is made for "
                f"{', '.join(sorted(entry.norms))}, not {norm!r}"
            )

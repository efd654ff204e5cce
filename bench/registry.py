"""Attacks, defenses and data sources by name, with the schema that their signatures declare.

A decorator reads the keyword-only arguments of a function (or of a constructor) into a pydantic
model, so that a suite is checked before anything runs. `discover` imports our own folders and the
installed plug-ins, then closes the registries.
"""

import importlib
import inspect
import json
import math
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, partial
from importlib.metadata import entry_points
from itertools import chain, count
from numbers import Integral
from types import ModuleType, UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from bench import docstrings, ours
from bench.errors import InputError, did_you_mean, nearest
from bench.protocols import (
    Crafted,
    Images,
    Labels,
    Norm,
    Part,
    Randomness,
    Shape,
    Threat,
    Use,
    View,
)
from bench.quantities import fraction

Access = Literal["gradient", "score", "decision", "none"]
"""What an attack may ask of a view: gradients, logits, the answers of the read-out, or nothing."""


def _strict_int(value: object) -> object:
    if isinstance(value, bool):
        # pydantic turns a ValueError, and no TypeError, into a complaint with its place.
        raise ValueError(f"expected a whole number, found {str(value).lower()}")  # noqa: TRY004
    return value


def _text(path: object) -> object:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


RESERVED = frozenset({"use", "planned", "source", "targets", "time_limit", "precision"})
"""Keys of a suite's attack that are not parameters of the registered one."""

RESERVED_BY_VIEWS = frozenset({"use", "draws"})
"""The same of a view."""

Check = Callable[[dict[str, Any], Shape], None]
"""``check(params, shape)``: raises `InputError` where a thing cannot work as asked."""

WHOLE = BeforeValidator(_strict_int)
"""What refuses `true` for a whole number. Stands last, ``Annotated[Count, WHOLE]``, in models of our own; in
signatures it is understood."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A parameter: a finite number above 0, or a fraction such as ``8/255``."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A parameter: a finite number of 0 or more."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A parameter: a number from 0 to 1, both included."""

PositiveShare = Annotated[float, Field(gt=0, le=1)]
"""A parameter: a number above 0, up to 1."""

Count = Annotated[int, Field(ge=1)]
"""A parameter: a whole number of 1 or more."""

NonNegativeCount = Annotated[int, Field(ge=0)]
"""A parameter: a whole number of 0 or more."""

ContentPath = Annotated[str, BeforeValidator(_text), "content"]
"""A parameter that names a file, relative to the suite's folder; its content enters the keys.

A `pathlib.Path` is as good as text.

Several: ``tuple[ContentPath, ...]``.
"""

CodePath = Annotated[str, "code"]
"""A parameter that names code, ``package.module:function``; the module's source enters the keys."""


class Schema(BaseModel):
    """Base of the models derived from signatures."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class UseModel(BaseModel):
    """``{use: pgd, steps: 7}``: a registered thing inside another's parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str


def _annotation(hint: Any) -> Any:
    """Return the hint as a suite writes it: fractions for floats, names for parts, mappings for uses."""
    if hint is Part:
        return Annotated[str, "part"]
    if hint is Use:
        return UseModel
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(inside[0], hint.__metadata__)
    if origin in (Union, UnionType):
        return Union[tuple(_annotation(each) for each in inside)]  # noqa: UP007 - built at run time
    if origin in (tuple, list, dict):
        return origin[tuple(_annotation(each) for each in inside)]
    return _bounded(hint, ())


def _bounded(base: Any, bounds: tuple[Any, ...]) -> Any:
    """Return an annotation with its bounds, which are checked after the number was read."""
    # The JSON Schema of what is read first says nothing of bounds that are checked later, unless told.
    if base is float:
        bare = Annotated[(float, *bounds)] if bounds else float
        return Annotated[(float, *bounds, BeforeValidator(fraction, json_schema_input_type=bare | str))]
    if base is int:
        return Annotated[(int, *bounds, WHOLE)]
    return Annotated[(_annotation(base), *bounds)] if bounds else base


def schema_of(function: Callable[..., Any], name: str, said: Mapping[str, str] | None = None) -> type[Schema]:
    """Derive a pydantic model from a function's keyword-only arguments.

    Args:
        function: what is called with the parameters.
        name: the registered name, for messages.
        said: what is known of each parameter, in a sentence; None: what its docstring says.

    Returns:
        A model with a field for each argument: its annotation, with bounds, and its default.

    Raises:
        InputError: an argument has no annotation.
    """
    written = function
    while isinstance(written, partial):
        written = written.func
    if not (inspect.isroutine(written) or inspect.isclass(written)):
        # An object that can be called.
        written = type(written).__call__
    hints = get_type_hints(written, include_extras=True)
    found = [
        each for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY
    ]
    for parameter in found:
        if parameter.name not in hints:
            raise InputError(f"{name}: the parameter {parameter.name!r} has no annotation, so no schema")
    said = docstrings.arguments(inspect.getdoc(function)) if said is None else said
    return schema_from([each.replace(annotation=hints[each.name]) for each in found], name, said)


def schema_from(parameters: Iterable[inspect.Parameter], name: str, said: Mapping[str, str]) -> type[Schema]:
    """Derive a pydantic model from parameters that have annotations.

    Args:
        parameters: what `inspect.signature` gives.
        name: the registered name, which the model gets.
        said: what is known of each parameter, in a sentence.

    Returns:
        A model with a field for each parameter.
    """
    fields: dict[str, Any] = {}
    for parameter in parameters:
        default = parameter.default
        if isinstance(default, Use):
            default = UseModel(use=default.use, **default.params)
        # A field of this name would hide pydantic's own attribute; the alias is what people write.
        hidden = hasattr(BaseModel, parameter.name)
        fields[parameter.name + "_" if hidden else parameter.name] = (
            _annotation(parameter.annotation),
            Field(
                default=... if default is parameter.empty else default,
                alias=parameter.name if hidden else None,
                description=said.get(parameter.name),
            ),
        )
    return create_model(name, __base__=Schema, **fields)


def marked(annotation: Any, metadata: list[Any], mark: str) -> bool:
    """Return whether an annotation carries a mark, inside an optional or a tuple too.

    Args:
        annotation: a field's annotation.
        metadata: what pydantic has taken from around it.
        mark: ``content``, ``code`` or ``part``.

    Returns:
        Whether the mark stands anywhere in it.
    """
    if mark in (*metadata, *getattr(annotation, "__metadata__", ())):
        return True
    return any(marked(each, [], mark) for each in get_args(annotation))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registered thing, and what a plan must know of it before anything is loaded."""

    name: str
    make: Callable[..., Any]
    version: int
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that stay out of keys while they have this value (added later, changing nothing)."""
    signature: Callable[[], Iterable[inspect.Parameter]] | None = None
    """The parameters, where `make` takes them as ``**params``: those of a class in a library, say. Called
    when they are asked for, so that the library is not imported before; raises `InputError` without it."""
    library: str | None = None
    """The installed distribution that does the work; its version enters keys."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        """Travel to other processes by name: what is registered there is the same code."""
        return _registered, (type(self).__name__, self.name)

    @cached_property
    def schema(self) -> type[Schema]:
        """The parameters as a pydantic model."""
        if self.signature is not None:
            found = list(self.signature())
            silent = f"What {self.library}'s own class takes by this name; its documentation does not say."
            return schema_from(
                found, self.name, {each.name: self.meanings.get(each.name) or silent for each in found}
            )
        target = self.make.__init__ if inspect.isclass(self.make) else self.make
        return schema_of(target, self.name, self.meanings)

    @cached_property
    def meanings(self) -> Mapping[str, str]:
        """What its docstrings say of each parameter; of those of a library's class, the class's own."""
        texts = [inspect.getdoc(self.make)]
        if inspect.isclass(self.make):
            texts.append(inspect.getdoc(self.make.__init__))
        if self.library is None:
            return {name: said for text in texts for name, said in docstrings.arguments(text).items()}
        return _meanings_there(self.library, self.name.rpartition("/")[2])

    @property
    def docstring(self) -> str:
        """Its whole docstring but for the section about parameters; else that of its module."""
        made: Any = self.make
        while isinstance(made, partial):
            made = made.func
        own = inspect.getdoc(self.make) if self.library is None else None
        return docstrings.without_arguments(own) or self.summary

    @property
    def module(self) -> str:
        """The module that it is defined in."""
        make = self.make
        while isinstance(make, partial):
            make = make.func
        return str(make.__module__)

    @property
    def place(self) -> str:
        """File and line, for messages."""
        code: Any = inspect.unwrap(self.make)
        while isinstance(code, partial):
            code = inspect.unwrap(code.func)
        try:
            line = inspect.getsourcelines(code)[1]
        except (OSError, TypeError):
            # Typed at a prompt, compiled, or an object that can be called.
            return self.module
        return f"{inspect.getsourcefile(code)}:{line}"

    def asked(self, hook: str, *arguments: Any, **params: Any) -> Any:
        """Call a hook that this declares, such as ``flags`` or ``cost``.

        Args:
            hook: The name of the hook, which is there.
            *arguments: What it is called with.
            **params: What it is called with by name.

        Returns:
            What it returns.

        Raises:
            InputError: It refuses what it was asked about, or it raises anything else: then the sentence says
                where it is declared.
        """
        try:
            return getattr(self, hook)(*arguments, **params)
        except InputError:
            raise
        except Exception as error:
            raise self._faulty(hook, f"raised {type(error).__name__}: {error}") from error

    def check(self, params: Mapping[str, Any], shape: Shape) -> None:
        """Ask ``check_params`` whether parameters fit each other and the data, where there is one.

        Args:
            params: Values of all parameters, by name.
            shape: The form of the images, and the number of classes.

        Raises:
            InputError: They do not, or the hook raises or returns something.
        """
        if getattr(self, "check_params", None) is not None:
            found = self.asked("check_params", dict(params), shape)
            if found is not None and found is not True:
                expected = "and must raise InputError where parameters do not fit"
                raise self._faulty("check_params", f"returned {_shown(found)}, {expected}")

    def _faulty(self, hook: str, what: str) -> InputError:
        """Return the error for a hook that does what no hook may."""
        kind = type(self).__name__.removesuffix("Entry").lower()
        return InputError(f"{self.place}: {kind} {self.name!r}: its {hook} {what}")

    def said(self, hook: str, *arguments: Any, **params: Any) -> str | None:
        """Return the sentence of a hook that returns one, such as ``flags`` or ``unfit``.

        Args:
            hook: The name of the hook.
            *arguments: What it is called with.
            **params: What it is called with by name.

        Returns:
            The sentence; None where it has none, or where there is no such hook.

        Raises:
            InputError: The hook raises, or returns something else.
        """
        if getattr(self, hook) is None:
            return None
        found = self.asked(hook, *arguments, **params)
        if isinstance(found, str) or not found:
            # False comes of `too_short and "a sentence"`.
            return found or None
        raise self._faulty(hook, f"returned {_shown(found)}, and neither a sentence nor None")

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring, or of its module's."""
        text = inspect.getdoc(self.make) or inspect.getdoc(inspect.getmodule(self.make)) or ""
        return " ".join(text.partition("\n\n")[0].split())

    def parameters(self, mark: str) -> list[str]:
        """Return the names of the parameters that carry a mark.

        Args:
            mark: ``content`` (names files), ``code`` (names code) or ``part`` (names another defense).

        Returns:
            Names as people write them, in the order of the signature.
        """
        return [
            info.alias or name
            for name, info in self.schema.model_fields.items()
            if marked(info.annotation, list(info.metadata), mark)
        ]


def _meanings_there(library: str, name: str) -> dict[str, str]:
    """Return what the docstrings of a library's class, and of its bases, say of parameters."""
    found: dict[str, str] = {}
    for module in (library, f"{library}.attacks"):
        try:
            cls = getattr(importlib.import_module(module), name.partition("-")[0], None)
        except ImportError:
            continue
        for each in reversed(inspect.getmro(cls)) if inspect.isclass(cls) else ():
            made = vars(each).get("__init__")
            found |= docstrings.arguments(each.__doc__) | docstrings.arguments(getattr(made, "__doc__", None))
    return found


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an attack declares of itself, so that a plan knows it before anything is loaded.

    The decorator `attack` takes these as its keywords, an `AttackEntry` carries them, and the adapters of
    attack libraries give one for each attack.
    """

    norms: Set[Norm]
    """The norms of its threat model; one of them is each task's."""
    access: Access = "gradient"
    """What it asks of a view."""
    space: str = "pixel"
    """The space that its points lie in; only views of this space are shown to it."""
    rng: Literal["example", "shard"] = "example"
    """Whose stream its draws come from: each image's own, or the shard's."""
    kind: Literal["fixed-budget", "minimum-norm"] = "fixed-budget"
    """Whether it needs a radius, or moves as little as it can."""
    least_classes: int = 2
    """The smallest number of classes that it can work with."""
    channels: int | None = None
    """How many channels an image must have; None: any number."""
    square: bool = False
    """Whether images must be as high as wide."""
    time_limit: float | None = None
    """Seconds that a shard may take unless a suite says otherwise; None: any time."""
    targeted: bool = True
    """Whether it reaches for a given label where it is given one."""
    flags: Callable[..., str | None] | None = None
    """``flags(threat, **params)``: a sentence where the settings cannot do what they seem to."""
    check_params: Check | None = None
    """``check_params(params, shape)``: raises `InputError` where parameters do not fit each other or the
    data. What a parameter may be by itself is said by its type."""
    unfit: Callable[[Mapping[str, Any], Shape], str | None] | None = None
    """``unfit(params, shape)``: why conditions on such data are left out, with these parameters."""
    starts: Literal["own", "any", "stored"] = "own"
    """Where it begins: at points of its own; at ``view.starts`` in their place where there are some
    (``any``); or only there (``stored``)."""
    idle: bool = False
    """Whether it leaves every image as it is: what it shows is the clean accuracy."""
    cost: Callable[..., int] | None = None
    """``cost(**params)``: how many forward passes the attack makes over each example, at most. None: the
    product of its steps, restarts, samples and searches, as far as it has such parameters."""
    needs: Callable[..., "Needs"] | None = None
    """``needs(**params)``: what it needs with these parameters, where that depends on them, as it does for an
    attack made of attacks; raises `InputError` where no view could serve. None: what it declares."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "norms", frozenset(self.norms))

    @property
    def blind(self) -> bool:
        """Whether it looks at nothing, so that it has no view, no source and no targets."""
        return self.access == "none"

    def declared(self) -> dict[str, Any]:
        """Return the needs by name, to declare something with the same ones."""
        return {each.name: getattr(self, each.name) for each in fields(Needs)}


_MOST_PASSES = 10**15
"""The most passes that an attack may say it makes: an estimate of more is a mistake."""


def _shown(value: object) -> str:
    """Return a value for a message, cut short."""
    text = f"a whole number of {value.bit_length()} bits" if _is_huge(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_huge(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value.bit_length() > 200


@dataclass(frozen=True, kw_only=True)
class AttackEntry(Entry, Needs):
    """An attack, and what it needs."""

    def given(self, threat: Threat) -> Threat:
        """Return the threat model that it is handed: one without a radius where it moves as little as it can.

        Args:
            threat: The threat model that it is judged by.
        """
        return Threat(threat.norm) if self.kind == "minimum-norm" else threat

    def passes(self, params: Mapping[str, Any]) -> int:
        """Return how many forward passes it makes over each example with these parameters, at most.

        Args:
            params: Values of all its parameters, by name.

        Returns:
            What its `cost` says; without one, the product of the counts that are called steps, restarts,
            samples and searches, 1 where it has none of them.

        Raises:
            InputError: Its `cost` raises, or returns no whole number of 0 or more.
        """
        if self.cost is not None:
            found = self.asked("cost", **params)
            whole = isinstance(found, Integral) and not isinstance(found, bool)
            if not whole or not 0 <= found <= _MOST_PASSES:
                expected = f"expected a whole number from 0 to {_MOST_PASSES:.0e}"
                raise self._faulty("cost", f"returned {_shown(found)}; {expected}")
            return max(1, int(found))
        counts = (params.get(name, 1) for name in ("steps", "restarts", "samples", "searches"))
        return min(math.prod(count for count in counts if isinstance(count, int)), _MOST_PASSES)


@dataclass(frozen=True, kw_only=True)
class ViewEntry(Entry):
    """A view that a defense offers."""

    method: str
    space: str
    ignores: frozenset[str]
    """Parameters set at inference time that change nothing here, so that crafts are shared."""
    exact_for: frozenset[str]
    """Read-outs whose answer is this view's arg-max: here a success is a success."""
    gradient: bool
    """False where no gradient flows."""


@dataclass(frozen=True, kw_only=True)
class DefenseEntry(Entry):
    """A defense, and how it can be looked at and asked."""

    readouts: tuple[str, ...]
    views: Mapping[str, ViewEntry]
    aliases: Mapping[str, str]
    """Other names of views: a feed-forward net's ``e2e_last`` is its ``first``."""
    inference: frozenset[str]
    """Parameters that may change after fitting."""
    random: bool | Callable[[Mapping[str, Any]], bool]
    """Whether two asks may differ; where that depends on the parameters, a function of them."""
    learns: bool
    """False where there is nothing to fit, so that no training images are needed."""
    flags: Callable[..., str | None] | None
    """``flags(**params)``, as set at inference time: a sentence where settings cannot do as they say."""
    check_params: Check | None
    """Raises `InputError` where parameters do not fit the data or each other, or a file is damaged."""

    def view(self, name: str) -> ViewEntry | None:
        """Return a view by its name or alias.

        Args:
            name: what a task calls it.

        Returns:
            The view, or None where there is none of this name.
        """
        return self.views.get(self.aliases.get(name, name))

    def draws(self, params: Mapping[str, Any]) -> bool:
        """Return whether two asks may differ.

        Args:
            params: all parameters, as they are at inference time.

        Returns:
            False where every ask gets the same answer.
        """
        return self.random if isinstance(self.random, bool) else bool(self.asked("random", params))

    def view_params(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters that reach a view.

        Args:
            name: a view's name or alias.
            params: those that a task gives.

        Returns:
            `params`, or none through an alias, which has none of its own.
        """
        return dict(params) if name in self.views else {}


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """Where examples come from: called with a split and `Places`; returns a `bench.data.source.Source`."""


E = TypeVar("E", bound=Entry)


def _alternatives(names: list[str]) -> str:
    """Return ``'a', 'b' or 'c'``."""
    *before, last = map(repr, names)
    return f"{', '.join(before)} or {last}" if before else last


class Registry(Generic[E]):
    """Names and what they stand for. A name is taken once.

    Args:
        kind: what is registered, for messages: ``attack``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}
        self._broken: dict[str, str] = {}
        self._contested: dict[str, str] = {}
        self._prefix: str | None = None
        self._closed = False

    def add(self, entry: E) -> None:
        """Register an entry under its name.

        Args:
            entry: what is registered.

        Raises:
            InputError: the name has an owner, lacks its plug-in's prefix, or comes after `discover`.
        """
        if self._closed:
            raise InputError(f"{self.kind} {entry.name!r} comes after the registry was closed")
        if self._prefix is not None and not entry.name.startswith(self._prefix + "/"):
            raise InputError(
                f"{entry.place}: a {self.kind} of plug-in {self._prefix!r} must be named "
                f"'{self._prefix}/...', not {entry.name!r}"
            )
        if entry.name in self._entries:
            # Neither of them is to be had, not even where the second owner's plug-in is left out for it.
            self._contested[entry.name] = (
                f"two owners of the {self.kind} name {entry.name!r}: "
                f"{self._entries[entry.name].place} and {entry.place}"
            )
            raise InputError(self._contested[entry.name])
        self._entries[entry.name] = entry

    def __getitem__(self, name: str) -> E:
        if name in self._contested:
            raise InputError(self._contested[name])
        if name not in self._entries:
            plugin = name.partition("/")[0]
            if plugin in self._broken:
                raise InputError(
                    f"{self.kind} {name!r}: plug-in {plugin!r} did not load: {self._broken[plugin]}"
                )
            raise InputError(f"unknown {self.kind} {name!r}{self._nearest(name)}")
        return self._entries[name]

    def _nearest(self, name: str) -> str:
        """Return the end of the message about a name that nobody has registered."""
        plugin, slash, rest = name.partition("/")
        there = [each for each in self._entries if each.startswith(f"{plugin}/")] if slash else []
        if slash and not there:
            near = list(dict.fromkeys(filter(None, (self._within(word) for word in (rest, plugin)))))
            meant = f"; did you mean {_alternatives(near)}? Of a plug-in" if near else ""
            return (
                f"{meant}: no installed package has the entry point {plugin!r} in the group {PLUGINS!r}, by "
                f"which every process finds it (docs/own-{self.kind}.md)"
            )
        word = rest.casefold()
        parts = [each for each in there if word and word in each.partition("/")[2].casefold()]
        if parts and not any(each.casefold() == name.casefold() for each in parts):
            # A library has one for each norm, such as L2PGD and LinfPGD: the shortest say the least else.
            return f"; did you mean {_alternatives(sorted(parts, key=lambda each: (len(each), each))[:3])}?"
        return did_you_mean(name, self._entries, listed=f"bench list {LISTED.get(self.kind, self.kind)}")

    def _within(self, word: str) -> str | None:
        """Return the name that a half of another tool's name, such as ``autoattack/apgd-ce``, is near to."""
        begun = [each for each in self._entries if word.casefold().startswith(f"{each}-")]
        return max(begun, key=len) if begun else nearest(word, self._entries, 0.7)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries


PLUGINS = "bench.plugins"
"""The group of entry points of packages that register attacks, defenses or data sources of their own."""

LISTED: Mapping[str, str] = {"attack": "attacks", "defense": "defenses", "data source": "data"}
"""What `bench list` calls each kind."""

ATTACKS: Registry[AttackEntry] = Registry("attack")
DEFENSES: Registry[DefenseEntry] = Registry("defense")
SOURCES: Registry[SourceEntry] = Registry("data source")


def _registered(kind: str, name: str) -> Entry:
    discover()
    registries: dict[str, Registry[Any]] = {
        "AttackEntry": ATTACKS,
        "DefenseEntry": DEFENSES,
        "SourceEntry": SOURCES,
    }
    entry: Entry = registries[kind][name]
    return entry


F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class attack(Needs):
    """Register a function as an attack; its keyword-only arguments are its parameters.

    The function is called as ``function(view, x, y, threat, noise, **params)`` (see `bench.Attack`) and
    returns the images, or `bench.Crafted` with notes on them. Each parameter has an annotation and a default;
    both enter the schema of a task file. Everything else is a field of `Needs`, and given by keyword.

    Args:
        name: The attack's name in task files; a plug-in's begins with the name of its entry point and a
            slash.
        version: A whole number that enters keys; it is raised when the attack's results change.
        neutral: Parameters that stay out of keys while they have this value, because they came later and
            change nothing.
        library: The installed distribution that does the work, if one does; its version enters keys.
        signature: Returns the parameters of a function that takes them as ``**params``; called when they
            are asked for, so that a library is not imported before.

    Raises:
        InputError: Where a parameter has a name that means something else in a task file, or the name of the
            attack is taken.

    Examples:
        >>> @attack("mylab/shift", norms={"linf"}, version=1, access="none")
        ... def shift(view, x, y, threat, noise, *, share: float = 1.0):
        ...     return threat.project(x, x + share * threat.radius)
    """

    name: str
    version: int = field(kw_only=True)
    neutral: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    library: str | None = field(default=None, kw_only=True)
    signature: Callable[[], Iterable[inspect.Parameter]] | None = field(default=None, kw_only=True)

    def __call__(self, function: F) -> F:
        """Register `function`, and return it unchanged."""
        taken = sorted(RESERVED & set(inspect.signature(function).parameters))
        if taken:
            raise InputError(
                f"attack {self.name!r}: {', '.join(taken)}: a suite says something else by this name"
            )
        ATTACKS.add(
            AttackEntry(
                make=function,
                **{each.name: getattr(self, each.name) for each in fields(self)},
            )
        )
        return function


def view(
    name: str,
    *,
    space: str = "pixel",
    exact_for: tuple[str, ...] = (),
    ignores: tuple[str, ...] = (),
    gradient: bool = True,
) -> Callable[[F], F]:
    """Declare a method of a defense as a view; its keyword-only arguments are the view's parameters.

    Args:
        name: the view's name in suites.
        space: what a point of the view is: ``pixel`` images, or a space that attacks name (``latent``,
            ``inversion``, ``features``, ``prototypes``).
        exact_for: read-outs whose answer is the arg-max of this view's logits, so that a success here is one.
        ignores: parameters of the defense that may change after fitting and change nothing here, so that
            crafts are shared.
        gradient: whether a gradient flows from the logits to the point.

    Returns:
        A decorator that returns the method as it is. The method returns a `View`.

    Raises:
        InputError: a parameter has a name that a suite keeps for itself.
    """

    def mark(method: F) -> F:
        taken = sorted(RESERVED_BY_VIEWS & set(inspect.signature(method).parameters))
        if taken:
            raise InputError(f"view {name!r}: {', '.join(taken)}: a suite says something else by this name")
        method.__view__ = {  # type: ignore[attr-defined]
            "name": name,
            "space": space,
            "exact_for": frozenset(exact_for),
            "ignores": frozenset(ignores),
            "gradient": gradient,
        }
        return method

    return mark


def defense(  # noqa: PLR0913 - what a defense declares of itself, each by its keyword
    name: str,
    *,
    readouts: tuple[str, ...],
    version: int,
    aliases: Mapping[str, str] | None = None,
    inference: tuple[str, ...] = (),
    random: bool | Callable[[Mapping[str, Any]], bool] = False,
    learns: bool = True,
    neutral: Mapping[str, Any] | None = None,
    flags: Callable[..., str | None] | None = None,
    check_params: Check | None = None,
) -> Callable[[C], C]:
    """Register a class as a defense; its constructor's keyword-only arguments are its parameters.

    Limits of single parameters stand in their annotations (`Count`, `Positive`, `Share`, ...).

    Args:
        name: the name in suites; a plug-in's begins with the plug-in's own and a slash.
        readouts: the ways in which the defense can be asked, for `decide`.
        version: raised by hand where results change.
        aliases: other names of views: a feed-forward net's ``e2e_last`` is its ``first``.
        inference: parameters that may have other values after fitting than the defense was trained with.
        random: whether two answers to one image may differ; where that depends on the parameters, a function
            of them.
        learns: False where there is nothing to fit, so that no training images are needed.
        neutral: parameters that stay out of keys while they have these values.
        flags: ``flags(**params)``: a sentence where the settings cannot do what they seem to, or None.
        check_params: ``check_params(params, shape)``, called by the plan before anything runs, with the
            parameters (paths absolute) and the data's shape: raises `InputError` for what only together
            cannot be.

    Returns:
        A decorator that returns the class as it is.

    Raises:
        InputError: the name is taken, or lacks the plug-in's prefix.
    """

    def register(cls: C) -> C:
        views = {}
        for attribute, method in inspect.getmembers(cls, inspect.isfunction):
            if (declared := getattr(method, "__view__", None)) is not None:
                views[declared["name"]] = ViewEntry(
                    make=method, version=version, method=attribute, **declared
                )
        DEFENSES.add(
            DefenseEntry(
                name=name,
                make=cls,
                version=version,
                neutral=neutral or {},
                readouts=readouts,
                views=views,
                aliases=aliases or {},
                inference=frozenset(inference),
                random=random,
                learns=learns,
                flags=flags,
                check_params=check_params,
            )
        )
        return cls

    return register


def view_of(model: object, name: str) -> View:
    """Return a fitted part's view with its default parameters, as an attacker would look at it.

    Args:
        model: an object of a registered defense's class.
        name: the view's name or alias.

    Returns:
        The view.

    Raises:
        InputError: the class is not registered, or has no such view.
    """
    for entry in map(DEFENSES.__getitem__, DEFENSES):
        if entry.make is type(model):
            found = entry.view(name)
            if found is None:
                names = {*entry.views, *entry.aliases}
                raise InputError(f"{entry.name} has no view {name!r}{did_you_mean(name, names)}")
            seen: View = getattr(model, found.method)()
            return seen
    raise InputError(f"{type(model).__name__} is no registered defense")


def source(name: str, *, version: int, neutral: Mapping[str, Any] | None = None) -> Callable[[F], F]:
    """Register a function or a class as a data source; its keyword-only arguments are its parameters.

    Args:
        name: what suites call it; a plug-in's begins with its prefix.
        version: raised by hand whenever its examples change; part of every key.
        neutral: parameters that stay out of keys while they have this value.

    Returns:
        A decorator for what makes a `Source` when it is called with a split and `Places`.
    """

    def register(make: F) -> F:
        SOURCES.add(SourceEntry(name=name, make=make, version=version, neutral=neutral or {}))
        return make

    return register


def import_all(package: ModuleType) -> None:
    """Import every module of a package, and every package in it, so that they register what they hold.

    Args:
        package: an imported package; each thing in it is a file, or a folder whose ``__init__`` imports what
            registers itself.
    """
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")


@cache
def discover() -> None:
    """Import our data sources, `attacks/*`, `defenses/*` and the plug-ins, then close the registries.

    A plug-in that fails is remembered with its reason, and stops a suite only if it asks for one of
    its names.

    Raises:
        InputError: another module has the name of one of our packages.
    """
    # Both are bound before either is filled: they import from each other.
    packages = [ours.imported(package) for package in sorted(ours.OURS)]
    for package in (importlib.import_module("bench.data"), *packages):
        import_all(package)
    registries: tuple[Registry[Any], ...] = (ATTACKS, DEFENSES, SOURCES)
    for point in sorted(entry_points(group=PLUGINS), key=lambda each: each.name):
        before = [dict(registry._entries) for registry in registries]
        for registry in registries:
            registry._prefix = point.name
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - whatever a plug-in does at import is its own
            for registry, entries in zip(registries, before, strict=True):
                registry._entries = entries
                registry._broken[point.name] = f"{type(error).__name__}: {error}"
        finally:
            for registry in registries:
                registry._prefix = None
    for registry in registries:
        registry._closed = True


def only_here(entry: Entry) -> bool:
    """Return whether this process alone knows an entry: no package that every process imports registers it.

    Args:
        entry: what is registered.

    Returns:
        True for what a script or a notebook has registered itself.
    """
    points = (point.module.partition(".")[0] for point in entry_points(group=PLUGINS))
    return entry.module.partition(".")[0] not in {"bench", *ours.OURS, *points}


def bind(entry: Entry, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments to call an entry's `make` with.

    Args:
        entry: what is called.
        params: its parameters as a suite writes them, or filled in.

    Returns:
        A value for every parameter; inner attacks as `Use`.

    Raises:
        pydantic.ValidationError: a parameter does not fit the schema.
    """
    model = entry.schema.model_validate(dict(params))
    values: dict[str, Any] = {}
    for name, info in entry.schema.model_fields.items():
        values[info.alias or name] = _used(getattr(model, name))
    return values


def _used(value: Any) -> Any:
    """Return a parameter's value with inner attacks as `Use`."""
    if isinstance(value, UseModel):
        return Use(value.use, dict(value.model_extra or {}))
    return [_used(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class BoundAttack:
    """A registered attack with its settings: what an attack, or a defense, that uses another one calls."""

    entry: AttackEntry
    """What is registered under its name, with what it needs with these settings."""
    params: Mapping[str, Any]
    """A value for every parameter, as plain JSON."""

    def __call__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, /
    ) -> Images | Crafted:
        """Run the attack (see `bench.Attack`)."""
        found: Images | Crafted = self.entry.make(view, x, y, threat, noise, **self._arguments)
        return found

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return bind(self.entry, self.params)

    @property
    def stream(self) -> str:
        """A name for its draws, which tells it from every other attack and from other settings of its own."""
        return json.dumps([self.entry.name, self.params], sort_keys=True)


def bound(use: Use | Mapping[str, Any]) -> BoundAttack:
    """Return a registered attack with its settings.

    Args:
        use: The name and the settings: a parameter of type `Use`, or a mapping with ``use`` and the settings
            beside it, as a task file writes them.

    Returns:
        The attack.

    Raises:
        InputError: There is no such attack.
        pydantic.ValidationError: A setting does not fit its schema.
    """
    if isinstance(use, Use):
        name, params = use.use, dict(use.params)
    else:
        params = dict(use)
        name = params.pop("use")
    entry = ATTACKS[name]
    return BoundAttack(
        needing(entry, params), entry.schema.model_validate(params).model_dump(mode="json", by_alias=True)
    )


def needing(entry: AttackEntry, params: Mapping[str, Any]) -> AttackEntry:
    """Return an attack with what it needs with these parameters.

    Args:
        entry: The attack.
        params: Its parameters.

    Returns:
        The entry itself where its needs depend on no parameter.

    Raises:
        InputError: No view could serve it.
    """
    if entry.needs is None:
        return entry
    told = entry.asked("needs", **params).declared()
    # What it asks of a view and of the data; its hooks are its own.
    return replace(entry, **{name: told[name] for name in _ASKED})


_ASKED = (
    *("norms", "access", "space", "rng", "kind", "least_classes", "channels", "square", "targeted", "starts"),
    "time_limit",
)
"""The needs that may depend on parameters."""


def labels_of(uses: Iterable[Use | Mapping[str, Any]]) -> list[str]:
    """Return a name for each of several attacks: its registered one, numbered from its second use on.

    Args:
        uses: The attacks, in their order.

    Returns:
        Names of which no two are equal: ``pgd``, ``square``, ``pgd-2``.
    """
    found: list[str] = []
    for use in uses:
        name = use.use if isinstance(use, Use) else str(use["use"])
        numbered = (f"{name}-{number}" for number in count(2))
        found.append(next(each for each in chain([name], numbered) if each not in found))
    return found

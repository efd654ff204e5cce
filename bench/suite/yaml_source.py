"""Reading a YAML file so that every complaint can name its line.

Only plain data is read: no tags, a key is text and may stand once, and what a file grows to through its
aliases is counted before anything is made of it. Pydantic's errors are turned into one sentence: where, what
was found, what was expected, the nearest right thing.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bench.console import count
from bench.errors import InputError, did_you_mean
from bench.escaping import shown
from bench.suite.names import LONGEST

Place = tuple[str | int, ...]
"""The way to a value: keys and list positions."""

M = TypeVar("M", bound=BaseModel)

SIZE = 1 << 20
"""Bytes that a file may have, and characters that it may grow to where its aliases are written out."""

VALUES = 50_000
"""Values that it may grow to; the largest of our suites has 2,000."""

DEPTH = 50
"""How deep lists and mappings may lie in each other."""

FILES = 10
"""Task files that a message lists at most."""

DIGITS = 100
"""Characters that a number may have."""

_UNSEEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML does not allow in a text: controls, lone surrogates, what is no character."""

_TURNED = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that make what follows read in another direction than it stands."""


@dataclass(frozen=True)
class Document:
    """A YAML file: its plain data, and the line of each value."""

    path: Path
    data: Any
    lines: Mapping[Place, int]

    def at(self, *place: str | int) -> str:
        """Return ``tasks.yaml:12: tasks[0].threat`` for messages.

        Args:
            place: the way to a value; none: the file.
        """
        return f"{self.line(*place)}: {dotted(place)}" if place else self.line()

    def line(self, *place: str | int) -> str:
        """Return ``tasks.yaml:12`` for messages.

        Args:
            place: the way to a value; the nearest thing on it that has a line gives it.
        """
        near = (self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines)
        return f"{self.path.name}:{next(near, 1)}"

    def check(self, model: type[M], value: Any, *place: str | int) -> M:
        """Validate a value.

        Args:
            model: what it must be.
            value: plain data.
            place: where it stands in the file.

        Returns:
            The validated model.

        Raises:
            InputError: it does not fit; the message has its line.
        """
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise InputError(self._sentence(model, error, place)) from None

    def _sentence(self, model: type[BaseModel], error: ValidationError, place: Place) -> str:
        problem = _first(error)
        way = self._way(place, problem["loc"])
        at = self.at(*(way[:-1] if problem["type"] == "missing" else way))
        return f"{at}: {_refusal(model, problem, way[-1:])}"

    def _way(self, place: Place, loc: Place) -> Place:
        """Return the place of an error, less the names of union members that pydantic puts into it."""
        way = place
        for step in loc:
            if (*way, step) in self.lines or step == loc[-1]:
                way = (*way, step)
        if len(way) > 1 and way not in self.lines and way[:-1] in self.lines:
            # A single value that is taken for a list of one has no position in the file.
            return way[:-1] if _is_member(way[-1]) or isinstance(way[-1], int) else way
        return way


_BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "of {} or more"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "of {} or less"),
}
"""For pydantic's errors about bounds: where it keeps the bound, and how a message says it."""


def sentence(model: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong with values that stand in no file: ``steps: expected ..., found 0``.

    Args:
        model: what the values were validated against.
        error: what pydantic says of them.

    Returns:
        The place, what was expected and what was found, of the error that says the most.
    """
    problem = _first(error)
    way = tuple(step for step in problem["loc"] if not _is_member(step))
    at = dotted(way[:-1] if problem["type"] == "missing" else way)
    return f"{at}: {_refusal(model, problem, way[-1:])}".removeprefix(": ")


def _first(error: ValidationError) -> ErrorDetails:
    """Return the error that says the most: a union complains once for each of its members."""
    problems = error.errors(include_url=False)
    return min(problems, key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])))


def _refusal(model: type[BaseModel], problem: ErrorDetails, key: Place) -> str:
    """Return what is wrong, where `key` is the last step of the way to it."""
    match problem["type"], key:
        case "extra_forbidden", (name,):
            keys = _keys(model, problem["loc"][:-1])
            meant = did_you_mean(name, keys)
            if meant.startswith(" (") and {"build", "arguments"} <= {*keys}:
                meant = f"; arguments of build stand in arguments: {{{name}: {_flow(problem['input'])}}}"
            return f"unknown key{meant}"
        case "missing", (name,):
            return f"missing key {name!r}{_meant(model, problem['loc'])}"
        case _:
            return complaint(problem, _example(model, problem))


def _meant(model: type[BaseModel], loc: Place) -> str:
    """Return what a key that is missing means: by an example, or by its description."""
    for info in _fields(model, loc):
        shown = [info.examples[0]] if info.examples else _examples(*_models(info.annotation))
        if shown:
            return f", such as {loc[-1]}: {_flow(shown[0])}"
        if info.description:
            said = " ".join(info.description.split()).rstrip(".")
            return f": {said[0].lower()}{said[1:]}"
    return ""


def _examples(*models: type[BaseModel]) -> list[Any]:
    """Return the examples that models have."""
    found: list[Any] = []
    for each in models:
        extra = each.model_config.get("json_schema_extra")
        examples = extra.get("examples") if isinstance(extra, dict) else None
        found += examples if isinstance(examples, list) else []
    return found


def _example(model: type[BaseModel], problem: ErrorDetails) -> str | None:
    """Return how a task file writes what was expected, from the examples of the model or of its field."""
    for info in reversed(_fields(model, problem["loc"])):
        if info.examples:
            return _flow(info.examples[0])
    named = problem.get("ctx", {}).get("class_name")
    found = _examples(*(each for each in _inside(model) if each.__name__ == named))
    return _flow(found[0]) if found else None


def _inside(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a model and all that its fields are made of."""
    found = [model]
    for each in found:
        for info in each.model_fields.values():
            found += [other for other in _models(info.annotation) if other not in found]
    return found


def _fields(model: type[BaseModel], loc: Place) -> list[FieldInfo]:
    """Return the fields that a place may be, those that lead there left out."""
    models, found = [model], list[FieldInfo]()
    for step in loc:
        fields = {info.alias or name: info for each in models for name, info in each.model_fields.items()}
        if str(step) in fields:
            found = [fields[str(step)]]
            models = list(_models(found[0].annotation)) or models
        elif not _is_member(step):
            # Inside a list or a mapping that has no model, an example of the whole is none of a part.
            found = []
    return found


def _flow(value: Any) -> str:
    """Return plain data as a task file writes it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_flow(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_member(step: str | int) -> bool:
    """Return whether a step of pydantic's way to an error is the name of a union's member."""
    return isinstance(step, str) and ("[" in step or step in {"str", "int", "float", "list"})


_KINDS = {
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of 64 bits",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "none_required": "null",
}
"""What pydantic's errors about the kind of a value mean in the words of a task file."""


def complaint(problem: ErrorDetails, example: str | None = None) -> str:
    """Return what is wrong with a value: ``expected a number of 1 or more, found 0``.

    Args:
        problem: one of `pydantic.ValidationError.errors()`, of any type but a key too many or too few.
        example: how a task file writes what was expected; None: nobody says.

    Returns:
        What was expected and what was found, without the place.
    """
    found, kind = problem["input"], problem["type"]
    more = ""
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        text = "expected a number " + words.format(f"{problem['ctx'][name]:.15g}")
    elif kind == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        text = f"expected {problem['ctx']['expected'].replace(chr(39), '')}"
        more = did_you_mean(found, choices) if choices else ""
        # What there is was said already.
        more = "" if more.startswith(" (") else more
    elif kind in ("too_short", "too_long"):
        bound = int(problem["ctx"].get("min_length") or problem["ctx"]["max_length"])
        text = f"expected at {'least' if kind == 'too_short' else 'most'} {count(bound, 'entry', 'entries')}"
    elif kind in _KINDS:
        text = f"expected {_KINDS[kind]}"
        if isinstance(found, str) and _KINDS[kind] == "a list":
            example = f"[{found}]"
        if example is not None and _KINDS[kind] in ("a list", "a mapping", "a text"):
            text += f" such as {example}"
    else:
        text = problem["msg"].removeprefix("Value error, ")
    whole = kind == "value_error" and isinstance(found, Mapping)
    said = "" if "found" in text or whole else f", found {_found(found)}"
    return f"{text[0].lower()}{text[1:]}{said}{more}"


def _found(value: object) -> str:
    """Return what was found, for a message: a mapping by its keys."""
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value))}" if value else "an empty mapping"
    return _brief(value)


def read(path: Path) -> Document:
    """Read a YAML file of plain data.

    Args:
        path: the file, UTF-8, at most `SIZE` bytes.

    Returns:
        Its data and the line of each value; an empty file is an empty mapping.

    Raises:
        InputError: it cannot be read, is no plain YAML, or is too large or too deep.
    """
    text = _text(path)
    loader = _Loader(text, path.name)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path.name}:{line}: not plain YAML: {_problem(error, text)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # An escape of a character that there is not.
        raise InputError(f"{path.name}:{loader.line + 1}: not YAML: {error}") from None
    data = loader.plain(node, ()) if node is not None else {}
    return Document(path, data, loader.lines)


_TOKEN = re.compile(r"(?:but )?(?:got|found) '[^']+'$|(?:but )?(?:got|found) <[^<>]+>$")
"""How PyYAML ends a complaint by the kind of what it found, which says nothing to who wrote it."""


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return what is wrong with a file that is no YAML, with the word that stands at the place."""
    said, mark, begun = str(error.problem), error.problem_mark, error.context_mark
    if mark is not None and _TOKEN.search(said):
        word = re.match(r"[^\s,:\[\]{}]+|\S", text[mark.index :])
        found = f"found {shown(word[0])!r}" if word else "found the end of the line or of the file"
        said = _TOKEN.sub(lambda _: found, said)
    said = said.replace("<block end>", "the next key or entry").replace("the node content", "a value")
    bracket = {"while parsing a flow sequence": "[", "while parsing a flow mapping": "{"}.get(
        str(error.context)
    )
    if begun is not None and bracket is not None:
        said += f"; the {bracket} of line {begun.line + 1} is still open"
    return said


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected a file, found a {'folder' if path.is_dir() else 'device'}")
        with path.open("rb") as file:
            content = file.read(SIZE + 1)
        text = content.decode()
    except FileNotFoundError:
        near = sorted(each.name for each in path.parent.glob("[!.]*.y*ml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file{_beside(path, near)}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path.name}:{line}: is not UTF-8: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if len(content) > SIZE:
        raise InputError(f"{path}: expected a task file of at most {SIZE >> 20} MiB")
    for unwanted in (_UNSEEN, _TURNED):
        if found := unwanted.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise InputError(f"{path.name}:{line}: U+{ord(found[0]):04X} cannot stand in a task file")
    return text


def _beside(path: Path, near: list[str]) -> str:
    """Return which task files lie where one is missing: the nearest, else all of a few, else how many."""
    where = path.parent.resolve()
    if not near:
        return f", and no other task file in {where}"
    meant = did_you_mean(path.name, near)
    if meant.startswith("; did you mean"):
        return meant
    listed = f": {', '.join(near)}" if len(near) <= FILES else ""
    return f"; {count(len(near), 'task file lies', 'task files lie')} in {where}{listed}"


class _Loader(yaml.SafeLoader):
    """Reads YAML into plain data, and notes the line of each value.

    Values and characters are counted as they are read, those behind an alias each time that it stands, so
    that a file that would grow beyond bounds is refused before it does.
    """

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.file = name
        self.lines: dict[Place, int] = {}
        self._values = self._characters = 0
        self._open: list[_Level] = []
        self._known: dict[str | None, _Level] = {}
        """What stands behind each anchor."""

    def get_event(self) -> Any:
        """Return the next event of the parser, counted."""
        event: Any = super().get_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if (tag := getattr(event, "tag", None)) is not None:
            raise InputError(f"{self.file}:{line}: not plain YAML: the tag {_brief(tag)}")
        if isinstance(event, yaml.CollectionStartEvent):
            self._count(1, 0)
            self._open.append(_Level(event.anchor, self._values, self._characters))
        elif isinstance(event, yaml.CollectionEndEvent):
            level = self._open.pop()
            values, characters = self._values - level.values + 1, self._characters - level.characters
            self._close(_Level(level.anchor, values, characters, level.height))
        elif isinstance(event, yaml.ScalarEvent):
            self._count(1, len(event.value))
            self._close(_Level(event.anchor, 1, len(event.value)))
        elif isinstance(event, yaml.AliasEvent):
            if any(each.anchor == event.anchor for each in self._open):
                raise InputError(f"{self.file}:{line}: an alias stands inside what it names")
            # An alias of nothing is the parser's to refuse.
            known = self._known.get(event.anchor, _Level(None, 0, 0))
            self._count(known.values, known.characters)
            self._close(_Level(None, 0, 0, known.height))
        self._check(line)
        return event

    def _count(self, values: int, characters: int) -> None:
        self._values += values
        self._characters += characters

    def _close(self, level: "_Level") -> None:
        if level.anchor is not None:
            self._known[level.anchor] = level
        if self._open:
            self._open[-1].height = max(self._open[-1].height, level.height + 1)

    def _check(self, line: int) -> None:
        where = f"{self.file}:{line}: "
        if self._values > VALUES or self._characters > SIZE:
            raise InputError(
                f"{where}too large: with its aliases written out the file has more than "
                + (f"{VALUES:,} values" if self._values > VALUES else f"{SIZE:,} characters")
            )
        if len(self._open) + max((each.height for each in self._open[-1:]), default=0) > DEPTH:
            raise InputError(f"{where}too deep: more than {DEPTH} lists and mappings lie in each other")

    def plain(self, node: yaml.Node, place: Place) -> Any:
        """Return a node's plain data."""
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(each, (*place, position)) for position, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            found = {}
            for name, (at, value) in self._entries(node, place).items():
                self.lines[*place, name] = at
                found[name] = self.plain(value, (*place, name))
            return found
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, f"{self.file}:{line}: {dotted(place)}".removesuffix(": "))

    def _entries(self, node: yaml.MappingNode, place: Place) -> dict[str, tuple[int, yaml.Node]]:
        """Return the keys of a mapping as they are written, with those that it takes over by ``<<``."""
        own: dict[str, tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{self.file}:{line}: not plain YAML: a key is a list or a mapping")
            name = str(key.value)
            self._check_text(name, f"{self.file}:{line}: {dotted(place)}".removesuffix(": "))
            if name in own:
                at = dotted((*place, name))
                raise InputError(f"{self.file}:{line}: {at} stands twice (first in line {own[name][0]})")
            own[name] = line, value
        taken: dict[str, tuple[int, yaml.Node]] = {}
        merges = [key for key, _ in node.value if key.tag == _MERGE]
        for line, value in [own.pop(each.value) for each in merges]:
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(each, yaml.MappingNode):
                    raise InputError(f"{self.file}:{line}: not plain YAML: << takes over mappings alone")
                for name, entry in self._entries(each, place).items():
                    if name not in own and taken.setdefault(name, entry)[1] is not entry[1]:
                        at = dotted((*place, name))
                        raise InputError(f"{self.file}:{line}: << takes {at} from two mappings; write it out")
        return {**taken, **own}

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        if kind in ("int", "float"):
            return _number(text, where)
        if kind not in ("str", "bool", "null"):
            raise InputError(f"{where}: {_brief(text)} is a {kind} in YAML; quote it if it is text")
        if kind == "str":
            self._check_text(text, where)
        return self.construct_object(node)

    def _check_text(self, text: str, where: str) -> None:
        """Raise where an escape has brought in what may not stand in the file itself."""
        if found := _UNSEEN.search(text) or _TURNED.search(text):
            raise InputError(f"{where}: U+{ord(found[0]):04X} cannot stand in a text")


@dataclass
class _Level:
    """A value that is being read, or was: its anchor, and what it grows to."""

    anchor: str | None
    values: int
    characters: int
    height: int = 0
    """How deep lists and mappings lie in it."""


_MERGE = "tag:yaml.org,2002:merge"


def _number(text: str, where: str) -> int | float:
    """Return a number as anybody would read it: YAML 1.1 takes 010 for 8, and 8:255 for 735."""
    if len(text) > DIGITS:
        raise InputError(f"{where}: expected a number of at most {DIGITS} characters, found {len(text)}")
    plain = text.replace("_", "")
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", plain):
        if not -(2**63) <= int(plain) < 2**63:
            raise InputError(f"{where}: expected a whole number of 64 bits, found {text}")
        return int(plain)
    if re.fullmatch(r"[-+]?\.inf", plain, re.IGNORECASE):
        return -math.inf if plain[0] == "-" else math.inf
    try:
        value = math.nan if re.fullmatch(r"[-+]?[0-9]+", plain) else float(plain)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: expected a decimal number, found {text}; quote it if it is text")
    return value


def _brief(value: object) -> str:
    """Return a value for a message, not all of it where it is long."""
    # As a task file writes it; so are true and false.
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 120 else f"{text[:100]} and so on ({len(text)} characters)"


def dotted(place: Place) -> str:
    """Return a place as a message has it: ``tasks[0].threat``.

    Args:
        place: the way to a value.
    """
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{_step(step)}" for step in place)
    return text.removeprefix(".")


def _step(key: str) -> str:
    """Return a key for a message: a name is short, and may be anything until it is checked."""
    return shown(key if len(key) <= 2 * LONGEST else f"{key[:LONGEST]}...", keep="")


def _keys(model: type[BaseModel], loc: Place) -> list[str]:
    """Return the keys that fit where an unknown one was found."""
    models = [model]
    for step in loc:
        hints: list[Any] = []
        for each in models:
            info = each.model_fields.get(str(step))
            if info is not None:
                hints.append(info.annotation)
        if hints:
            models = [found for hint in hints for found in _models(hint)]
    return [info.alias or name for each in models for name, info in each.model_fields.items()]


def _models(hint: Any) -> Iterator[type[BaseModel]]:
    if isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, BaseModel):
        yield hint
    for each in get_args(hint):
        yield from _models(each)

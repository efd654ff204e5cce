"""Reading a YAML file so that every complaint can name its line.

Only plain data is read (no tags that build objects), a key may stand once, and pydantic's errors are
turned into one sentence: where, what was found, what was expected, the nearest right thing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bench.errors import InputError, did_you_mean

Place = tuple[str | int, ...]
"""The way to a value: keys and list positions."""

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A YAML file: its plain data, and the line of each value."""

    path: Path
    data: Any
    lines: Mapping[Place, int]

    def at(self, *place: str | int) -> str:
        """Return ``tasks.yaml:12: tasks[0].threat`` for messages."""
        return f"{self.line(*place)}: {dotted(place)}" if place else self.line()

    def line(self, *place: str | int) -> str:
        """Return ``tasks.yaml:12``: the line of the nearest thing to `place` that has one."""
        near = (self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines)
        return f"{self.path.name}:{next(near, 1)}"

    def check(self, model: type[M], value: Any, *place: str | int) -> M:
        """Return `value` as a `model`; `place` is where it stands in the file."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise InputError(self._sentence(model, error, place)) from None

    def _sentence(self, model: type[BaseModel], error: ValidationError, place: Place) -> str:
        problems = error.errors(include_url=False)
        # A union complains once for each of its members; an unknown key says the most.
        problem = min(problems, key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])))
        way = self._way(place, problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys(model, problem["loc"][:-1])
            return f"{self.at(*way)}: unknown key{did_you_mean(way[-1], known)}"
        if problem["type"] == "missing":
            return f"{self.at(*way[:-1])}: missing key {way[-1]!r}"
        text = problem["msg"].removeprefix("Value error, ")
        found = problem["input"]
        shown = "" if "found" in text or isinstance(found, Mapping) else f", found {found!r}"
        return f"{self.at(*way)}: {text[0].lower()}{text[1:]}{shown}"

    def _way(self, place: Place, loc: Place) -> Place:
        """Return the place of an error, less the names of union members that pydantic puts into it."""
        way = place
        for step in loc:
            if (*way, step) in self.lines or step == loc[-1]:
                way = (*way, step)
        if len(way) > 1 and way not in self.lines and way[:-1] in self.lines:
            last = str(way[-1])
            return way[:-1] if "[" in last or last in {"str", "int", "float", "list"} else way
        return way


def read(path: Path) -> Document:
    """Read a YAML file of plain data."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(each.name for each in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file{did_you_mean(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, (), path.name)) if node is not None else {}
        data = loader.construct_document(node) if node is not None else {}
    except RecursionError:
        raise InputError(f"{path.name}: an alias stands inside what it names") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path.name}:{line}: not plain YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path.name}: not YAML: {error}") from None
    return Document(path, data, lines)


def dotted(place: Place) -> str:
    """Return ``tasks[0].threat``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


def _lines(node: yaml.Node, place: Place, name: str) -> Iterator[tuple[Place, int]]:
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str | int, int] = {}
        for key, value in node.value:
            step = int(key.value) if key.tag.endswith(":int") else str(key.value)
            line = key.start_mark.line + 1
            if step in seen and step != "<<":
                raise InputError(
                    f"{name}:{line}: {dotted((*place, step))} stands twice (first in line {seen[step]})"
                )
            seen[step] = line
            yield from _lines(value, (*place, step), name)
            yield (*place, step), line
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield from _lines(value, (*place, position), name)


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

"""What is registered, as a list for people and as a JSON Schema for editors."""

from importlib import metadata
from typing import Any, Literal

from pydantic import TypeAdapter
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.errors import InputError
from bench.registry import ATTACKS, DEFENSES, SOURCES, Entry, Registry, discover
from bench.suite.names import Sentence
from bench.suite.schema import AttackUse, DefenseUse, SuiteModel


def entries(what: Literal["attacks", "defenses", "data"]) -> list[dict[str, Any]]:
    """Return what is registered: names, parameters with their defaults, and what each kind declares.

    Args:
        what: which registry.

    Returns:
        A mapping of plain JSON for each name, sorted.
    """
    discover()
    match what:
        case "attacks":
            return [
                {
                    **_common(entry),
                    "norms": sorted(entry.norms),
                    "access": entry.access,
                    "space": entry.space,
                    "rng": entry.rng,
                    "kind": entry.kind,
                    "least_classes": entry.least_classes,
                    "channels": entry.channels,
                    "square": entry.square,
                    "targeted": entry.targeted,
                    "time_limit": entry.time_limit,
                    "library": entry.library,
                    "installed": _version(entry.library) if entry.library else None,
                }
                for entry in map(ATTACKS.__getitem__, ATTACKS)
            ]
        case "defenses":
            return [
                {
                    **_common(entry),
                    "views": {
                        name: {
                            "space": view.space,
                            "reads": sorted(view.exact_for),
                            "parameters": _parameters(view),
                        }
                        for name, view in entry.views.items()
                    },
                    "aliases": dict(entry.aliases),
                    "readouts": list(entry.readouts),
                    "inference": sorted(entry.inference),
                }
                for entry in map(DEFENSES.__getitem__, DEFENSES)
            ]
        case "data":
            return [_common(SOURCES[name]) for name in SOURCES]


def _common(entry: Entry) -> dict[str, Any]:
    common = {"name": entry.name, "summary": entry.summary, "version": entry.version}
    try:
        return {**common, "parameters": _parameters(entry)}
    except InputError as error:
        # The library that knows them is not there.
        return {**common, "parameters": {}, "missing": str(error)}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _parameters(entry: Entry) -> dict[str, dict[str, Any]]:
    properties = entry.schema.model_json_schema(by_alias=True).get("properties", {})
    required = {info.alias or name for name, info in entry.schema.model_fields.items() if info.is_required()}
    found = {}
    for name, info in properties.items():
        found[name] = {"type": _kind(info), "bounds": _bounds(info), "required": name in required}
        if name not in required:
            found[name]["default"] = info.get("default")
    return found


def _kind(info: dict[str, Any]) -> str:
    """Return what a parameter may be, in words: a number may also be written as a fraction."""
    choices = [each for option in info.get("anyOf", [info]) for each in option.get("enum", [])]
    if choices:
        return " | ".join(map(str, choices))
    kinds = dict.fromkeys(
        str(each.get("const") or ("attack" if "$ref" in each else each.get("type", "anything")))
        for each in info.get("anyOf", [info])
    )
    if "number" in kinds:
        kinds.pop("string", None)
    return " | ".join(kinds)


def _bounds(info: dict[str, Any]) -> str | None:
    """Return what a number must be within, in words; None where it has no bounds."""
    for each in info.get("anyOf", [info]):
        low, above, high = (each.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
        least = f"above {above:g}" if above is not None else f"{low:g}" if low is not None else None
        if high is not None:
            return f"at most {high:g}" if least is None else f"{least} to {high:g}"
        if least is not None:
            return least if above is not None else f"{least} or more"
    return None


def show(console: Console, found: list[dict[str, Any]]) -> None:
    """Print entries: a paragraph each, parameters with their defaults.

    Args:
        console: where they are printed.
        found: what `entries` returned.
    """
    for entry in found:
        lines: list[Text] = [Text(entry["summary"]), *_needs(entry)]
        for heading in ("readouts", "inference"):
            if entry.get(heading):
                lines.append(Text.assemble((f"{heading}: ", "dim"), ", ".join(entry[heading])))
        for name, view in entry.get("views", {}).items():
            also = [alias for alias, of in entry["aliases"].items() if of == name]
            text = Text.assemble(("view ", "dim"), name)
            if also:
                text.append(f" (also {', '.join(also)})")
            text.append(f", {view['space']} space")
            text.append(f", is read-out {', '.join(view['reads'])}" if view["reads"] else ", a surrogate")
            if view["parameters"]:
                text.append("; " + _signature(view["parameters"]))
            lines.append(text)
        console.print(Text(entry["name"], style="bold"))
        body: list[RenderableType] = [*lines]
        if entry["parameters"]:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            table.add_column("parameter", no_wrap=True)
            table.add_column("kind")
            table.add_column("default")
            for name, info in entry["parameters"].items():
                default = "(required)" if info["required"] else _written(info["default"])
                kind = ", ".join(filter(None, (info["type"], info["bounds"])))
                table.add_row(*map(Text, (name, kind, default)))
            body.append(table)
        console.print(Padding(Group(*body), (0, 0, 1, 2)), highlight=False)


def _needs(entry: dict[str, Any]) -> list[Text]:
    """Return what an attack needs, of its view, of the data and of what is installed."""
    if "norms" not in entry:
        return []
    classes, channels = entry["least_classes"], entry["channels"]
    data = [
        f"{classes} classes" if classes > 2 else "",
        f"{channels} channels" if channels else "",
        "square images" if entry["square"] else "",
    ]
    facts = {
        "norms": ", ".join(entry["norms"]),
        "access": entry["access"],
        "space": entry["space"],
        "kind": entry["kind"],
        "rng": entry["rng"],
        "needs": ", ".join(filter(None, data)),
        "targets": "" if entry["targeted"] else "none",
        "time limit": f"{entry['time_limit']:g} s" if entry["time_limit"] else "",
    }
    lines = [
        Text("; ").join(Text.assemble((f"{name}: ", "dim"), said) for name, said in facts.items() if said)
    ]
    if entry["library"]:
        found = f"{entry['library']} {entry['installed'] or 'not installed'}"
        lines.append(Text.assemble(("library: ", "dim"), found))
    if "missing" in entry:
        lines.append(Text(entry["missing"], style="yellow"))
    return lines


def _written(value: Any) -> str:
    """Return a default as a suite would write it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    if value is None:
        return "null"
    if isinstance(value, float) and len(str(value)) > 8:
        # Libraries count in steps of an 8-bit image.
        return f"{value * 255:g}/255" if (value * 255).is_integer() else f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _signature(parameters: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{name}: {info['type']} = {_written(info.get('default'))}" for name, info in parameters.items()
    )


_PLANNED = {
    "type": "object",
    "title": "planned",
    "description": "An attack that is not there yet: its cells are skipped, with this reason.",
    "properties": {"use": {"type": "string"}, "planned": TypeAdapter(Sentence).json_schema()},
    "required": ["use", "planned"],
}
"""The alternative to everything registered: whatever its parameters will be."""


def suite_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a task file, for editors.

    Returns:
        Plain JSON, with an alternative for each registered attack, defense and data source: its parameters
        with their bounds. Where a library that would tell them is not installed, any are taken.
    """
    discover()
    schema = SuiteModel.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Crossfire suite"
    definitions = schema["$defs"]
    definitions["DefenseUse"] = _uses(DEFENSES, DefenseUse, definitions)
    definitions["AttackUse"] = _uses(ATTACKS, AttackUse, definitions)
    definitions["AttackUse"]["oneOf"].append(_PLANNED)
    definitions["DataSpec"] = _sources(definitions)
    schema["properties"]["data"]["additionalProperties"] = {"$ref": "#/$defs/DataSpec"}
    return schema


def _uses(
    registry: Registry[Any], model: type[DefenseUse | AttackUse], definitions: dict[str, Any]
) -> dict[str, Any]:
    """Return one alternative for each registered name, so that its parameters are completed."""
    common = TypeAdapter(model).json_schema(ref_template="#/$defs/{model}")
    common.pop("$defs", None)
    # What is registered is not planned any more.
    kept = {name: info for name, info in common["properties"].items() if name not in ("use", "planned")}
    # Written once: there are more than a hundred attacks.
    definitions |= {f"{model.__name__}.{name}": info for name, info in kept.items()}
    beside = {name: {"$ref": f"#/$defs/{model.__name__}.{name}"} for name in kept}
    return {"oneOf": [_alternative("use", registry[name], beside, definitions) for name in registry]}


def _sources(definitions: dict[str, Any]) -> dict[str, Any]:
    from bench.data.spec import DataSpec

    common = DataSpec.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= common.pop("$defs", {})
    beside = {name: info for name, info in common["properties"].items() if name != "name"}
    return {"oneOf": [_alternative("name", SOURCES[name], beside, definitions) for name in SOURCES]}


def _alternative(
    word: str, entry: Entry, beside: dict[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    try:
        own = entry.schema.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    except InputError:
        # Its parameters are in a library that is not there.
        return {
            "type": "object",
            "title": entry.name,
            "description": entry.summary,
            "properties": {word: {"const": entry.name}, **beside},
            "required": [word],
        }
    definitions |= own.pop("$defs", {})
    return {
        "type": "object",
        "title": entry.name,
        "description": entry.summary,
        "properties": {word: {"const": entry.name}, **beside, **own.get("properties", {})},
        "required": [word, *own.get("required", [])],
        "additionalProperties": False,
    }

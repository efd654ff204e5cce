"""What is registered, as a list for people and as a JSON Schema for editors."""

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal, TypeAlias, get_args

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from bench.console import lay
from bench.errors import InputError, did_you_mean
from bench.pages import plain, unquoted
from bench.registry import ATTACKS, DEFENSES, SOURCES, Entry, Registry, discover
from bench.results.metrics import METRICS, Metric
from bench.suite.names import Sentence
from bench.suite.schema import AttackUse, DefenseUse, SuiteModel

What: TypeAlias = Literal["attacks", "defenses", "data", "metrics", "views"]
"""What may be listed."""


def entries(what: What) -> list[dict[str, Any]]:
    """Return what is registered: names, parameters with their defaults, and what each kind declares.

    Args:
        what: Which registry; ``metrics`` are what a table may count, ``views`` those of all defenses.

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
        case "metrics":
            return [_metric(each) for each in sorted(METRICS.values(), key=lambda each: each.name)]
        case "views":
            return _views()


def _metric(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        "summary": f"{metric.says[0].upper()}{metric.says[1:]}.",
        "unit": metric.unit,
        "summarised": metric.summary,
        "attackers_want": metric.worst,
        "clean": metric.clean,
        "by_class": metric.by_class,
        "reads": list(metric.reads),
    }


def _views() -> list[dict[str, Any]]:
    """Return the views of all defenses; those of one name that say the same are one entry."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in map(DEFENSES.__getitem__, DEFENSES):
        for name, view in entry.views.items():
            said = {
                "name": name,
                "summary": view.summary,
                "docstring": view.docstring,
                "space": view.space,
                "gradient": view.gradient,
                "parameters": _parameters(view),
                "of": [],
            }
            kept = found.setdefault((name, json.dumps(said, sort_keys=True, default=str)), said)
            exact = f" (is read-out {', '.join(sorted(view.exact_for))})" if view.exact_for else ""
            kept["of"].append(f"{entry.name}{exact}")
    return sorted(found.values(), key=lambda each: (each["name"], each["of"]))


LISTS: tuple[What, ...] = get_args(What)


def named(name: str, what: What | None = None) -> list[dict[str, Any]]:
    """Return everything of a name: attacks, defenses, data sources, metrics and views.

    Args:
        name: The name; letters of either case are the same.
        what: What it must be; None: anything.

    Returns:
        The entries, each with ``what`` it is; several where an attack and a view, say, have one name.

    Raises:
        InputError: Nothing is called so.
    """
    every = [(kind, each) for kind in ([what] if what else LISTS) for each in entries(kind)]
    found = [{"what": _KINDS[kind], **each} for kind, each in every if each["name"] == name]
    if not found:
        folded = name.casefold()
        found = [{"what": _KINDS[kind], **each} for kind, each in every if each["name"].casefold() == folded]
    if not found:
        near = did_you_mean(name, {each["name"] for _, each in every}, most=8)
        kind = f"no {_KINDS[what]}" if what else "nothing"
        where = f"bench list {what or '|'.join(LISTS)}"
        raise InputError(f"{kind} is called {name!r}{near}; names: {where}")
    return found


_KINDS: Mapping[What, str] = {
    "attacks": "attack",
    "defenses": "defense",
    "data": "data source",
    "metrics": "metric",
    "views": "view",
}


def _common(entry: Entry) -> dict[str, Any]:
    common = {
        "name": entry.name,
        "summary": entry.summary,
        "docstring": entry.docstring,
        "version": entry.version,
    }
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
        found[name] = {
            "type": _kind(info),
            "bounds": _bounds(info),
            "required": name in required,
            "description": info.get("description", ""),
        }
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


def show(console: Console, found: list[dict[str, Any]], what: What) -> None:
    """Print entries: a name and a sentence each.

    Args:
        console: Where they are printed.
        found: What `entries` returned.
        what: What was asked for.
    """
    for entry in found:
        lay(console, Text.assemble((entry["name"], "bold"), (_brief(entry), "dim")), hang=4)
        lay(console, unquoted(entry["summary"]), 2)
        if "missing" in entry:
            lay(console, Text(entry["missing"], style="yellow"), 2)
        if entry.get("of"):
            lay(console, Text.assemble(("of: ", "dim"), ", ".join(entry["of"])), 2)
    last = f"{len(found)} {what}; one of them with all its parameters: bench list NAME"
    lay(console, Text(last, style="dim"), hang=2)


def _brief(entry: dict[str, Any]) -> str:
    """Return what an attack needs, in a few words; nothing of what is none."""
    if "norms" not in entry:
        return ""
    missing = f", {entry['library']} is not installed" if entry["library"] and not entry["installed"] else ""
    return f"  {', '.join(entry['norms'])}; sees {entry['access']}; {entry['kind']}{missing}"


def explain(console: Console, found: list[dict[str, Any]]) -> None:
    """Print all of some entries: docstrings, what they declare, and each parameter with its meaning.

    Args:
        console: Where they are printed.
        found: What `named` returned.
    """
    for entry in found:
        lay(console, Text.assemble((entry["name"], "bold"), (f", {entry['what']}", "dim")))
        for line in plain(entry.get("docstring") or entry["summary"]):
            lay(console, line, 2, hang=2 if line.startswith("- ") else 0)
        lay(console, "")
        for fact in (*_needs(entry), *_facts(entry)):
            lay(console, fact, 2, hang=2)
        for name, view in entry.get("views", {}).items():
            lay(console, _view(name, view, entry["aliases"]), 2, hang=2)
        parameters = entry.get("parameters", {})
        if parameters:
            lay(console, Text("\nparameters", style="dim"), 2)
        for name, info in parameters.items():
            default = "required" if info["required"] else f"default {_written(info['default'])}"
            kind = ", ".join(filter(None, (info["type"], info["bounds"])))
            lay(console, Text.assemble((name, "bold"), f": {kind}; {default}"), 2, hang=2)
            if info["description"]:
                lay(console, unquoted(info["description"]), 6)
        if example := _example(entry):
            lay(console, Text("\nin a task file", style="dim"), 2)
            lay(console, example, 2, hang=2)
        lay(console, "")


def _view(name: str, view: dict[str, Any], aliases: Mapping[str, str]) -> Text:
    """Return a view of a defense in a line."""
    also = [alias for alias, of in aliases.items() if of == name]
    text = Text.assemble(("view ", "dim"), name)
    if also:
        text.append(f" (also {', '.join(also)})")
    text.append(f", {view['space']} space")
    text.append(f", is read-out {', '.join(view['reads'])}" if view["reads"] else ", a surrogate")
    if view["parameters"]:
        text.append("; " + _signature(view["parameters"]))
    return text


_SAID: Mapping[str, str] = {
    "readouts": "read-outs",
    "inference": "may be set after training",
    "unit": "unit",
    "attackers_want": "attackers want the",
    "of": "of",
    "space": "space",
}
"""What else an entry may have, by its heading for people; an attack's needs are `_needs`'."""


def _facts(entry: dict[str, Any]) -> list[Text]:
    found = []
    for name, heading in _SAID.items():
        value = entry.get(name)
        if value and "norms" not in entry:
            said = ", ".join(value) if isinstance(value, list) else str(value)
            found.append(Text.assemble((f"{heading}: ", "dim"), said))
    if entry.get("by_class"):
        found.append(Text("of one class: a heading or the table says class: 3"))
    if entry.get("clean") == "needed":
        found.append(Text("needs the answers to clean images: an attack {use: none} in the same tasks"))
    return found


def _example(entry: dict[str, Any]) -> str:
    """Return a line of a task file that has an entry in it."""
    required = [f"{name}: ..." for name, info in entry.get("parameters", {}).items() if info["required"]]
    label = entry["name"].rpartition("/")[2].lower()
    match entry["what"]:
        case "attack" | "defense":
            return f"{label}: {{{', '.join(['use: ' + entry['name'], *required])}}}"
        case "data source":
            return f"{label}: {{{', '.join(['name: ' + entry['name'], 'split: test', *required])}}}"
        case "metric":
            of_class = ", class: 3" if entry["by_class"] else ""
            return f"columns: {{PGD: {{attack: pgd, metric: {entry['name']}{of_class}}}}}"
        case _:
            return f"views: [{entry['name']}]"


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

"""The pages of the documentation that are made when it is built, so that they cannot go stale.

Catalogue: `bench list --json`, with what docstrings say of each parameter. API: the names that `bench`
exports. Tables, contributing and changelog: the files of the repository. A line that is a link to a section
of the README, `[README: Heading](../README.md#heading)`, stands for that section.
"""

import html
import json
import os
import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

COPIES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that become pages as they are."""

TABLES = "results/mnist/tables"
"""The tables that become the page `measured.md`."""

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
INCLUDE = re.compile(r"^\[README: ([^\]]+)\]\([^)]*\)$", re.MULTILINE)

CALLS = ("evaluate", "Result", "run", "plan", "table", "outcomes", "images", "load", "Loaded")
"""The names of `bench` that are called from Python, wherever they are made, in the order of the API page."""

ROOMS = {
    "bench.registry": "Registering",
    "bench.protocols": "What attacks and defenses are written with",
    "bench.losses": "Losses",
    "bench.data.spec.source": "Data sources",
    "bench.results.fingerprint": "Fingerprints of code",
    "bench.errors": "Errors",
}
"""Headings of the API page, in order; other modules follow under their own names."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every decision into the navigation."""
    pages = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    names = ["decisions/index.md", *(f"decisions/{name}" for name in pages)]
    for room in config.nav or []:
        for entry in room.get("Project", ()):
            if "Decisions" in entry:
                entry["Decisions"] = names
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {
        "attacks.md": attacks(),
        "defenses.md": defenses(),
        "sources.md": sources(),
        "api.md": api(),
        "measured.md": measured(),
        "decisions/index.md": decisions(),
        **{page: relinked((ROOT / name).read_text(), name, page) for name, page in COPIES.items()},
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the sections of the README, and lead links out of docs/ to pages."""
    uri = page.file.src_uri
    if page.file.generated_by is None:
        markdown = relinked(markdown, f"docs/{uri}", uri)
    return INCLUDE.sub(lambda found: relinked(section(found[1]), "README.md", uri), markdown)


def section(heading: str) -> str:
    """Return a section of the README, without its heading."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S
    )
    if found is None:
        raise PluginError(f"README.md has no section {heading!r}, which a page of docs/ includes")
    return found[1].strip()


def relinked(text: str, origin: str, page: str) -> str:
    """Return a text of the file `origin` with its relative links as the page needs them."""

    def lead(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return found[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if at.startswith(TABLES):
            name = posixpath.basename(at)
            place, anchor = "measured.md", name.removesuffix(".md") if name.startswith("table-") else ""
        elif at == "docs/decisions":
            place = "decisions/index.md"
        elif at.startswith("docs/"):
            place = at.removeprefix("docs/")
        elif at in COPIES:
            place = COPIES[at]
        elif at == "README.md":
            place = "index.md"
        else:
            # A file of the repository that is no page.
            return words
        place = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"[{words}]({place}{'#' + anchor if anchor else ''})"

    return LINK.sub(lead, text)


# The catalogue


def listed(what: str) -> list[dict[str, Any]]:
    """Return what `bench list` says."""
    command = [os.environ.get("BENCH", "bench"), "list", what, "--json"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise PluginError(
            f"{command[0]} is not there: say where it is by BENCH, or use `make docs`"
        ) from None
    except subprocess.CalledProcessError as error:
        raise PluginError(f"{' '.join(command)} failed: {error.stderr}") from error
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def documented(package: str, decorator: str) -> dict[str, griffe.Object]:
    """Return the functions or classes below a decorator, by the name that they are registered under."""
    found: dict[str, griffe.Object] = {}

    def visit(member: griffe.Object) -> None:
        for each in member.members.values():
            if each.is_alias:
                continue
            for use in getattr(each, "decorators", ()):
                name = re.match(rf"{decorator}\(\s*['\"]([^'\"]+)", str(use.value))
                if name:
                    found[name[1]] = each  # type: ignore[assignment]
            if each.is_module:
                visit(each)  # type: ignore[arg-type]

    visit(griffe.load(package, search_paths=[str(ROOT)]))  # type: ignore[arg-type]
    return found


def paper(thing: griffe.Object | None) -> str:
    """Return the first sentence of the module's docstring, where the paper stands."""
    if thing is None or thing.module.docstring is None:
        return ""
    first = plain(thing.module.docstring.value.split("\n\n")[0])
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", first)


def methods() -> set[str]:
    """Return the names that have a section in docs/methods.md."""
    return set(re.findall(r"^### `([^`]+)`$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE))


def written(value: Any) -> str:
    """Return a value as a task file would write it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value * 255:g}/255" if (value * 255).is_integer() else f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def plain(text: str) -> str:
    """Return a docstring's sentence as Markdown: code stays code, other signs are shown as they are."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def row(*cells: str) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", " ".join(each.split())) for each in cells) + " |"


def linked(entry: dict[str, Any]) -> str:
    """Return the name of an entry, leading to its section."""
    return f"[`{entry['name']}`](#{entry['name']})"


def set_to(parameters: dict[str, dict[str, Any]]) -> str:
    """Return parameters with their defaults, in one line."""
    return ", ".join(f"`{name}: {written(info.get('default'))}`" for name, info in parameters.items())


def parameters(entry: dict[str, Any]) -> Iterator[str]:
    """Yield a table of parameters, with what their docstrings say of them."""
    if entry.get("missing"):
        yield f"\n*{entry['missing']}*\n"
    if not entry["parameters"]:
        return
    rows = entry["parameters"].items()
    yield "\n| parameter | kind | default | meaning |"
    yield "| :-- | :-- | :-- | :-- |"
    for name, info in rows:
        default = "*required*" if info["required"] else f"`{written(info['default'])}`"
        yield row(f"`{name}`", info["type"], default, plain(info["description"]))
    yield ""


def facts(entry: dict[str, Any], *without: str) -> str:
    """Return whatever else an entry says of itself, in one line."""
    apart = {"name", "summary", "docstring", "version", "parameters", "missing", *without}
    said = []
    for name, value in entry.items():
        if name in apart or value in (None, False, [], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else written(value)
        said.append(f"{name.replace('_', ' ')}: {'yes' if value is True else text}")
    return " · ".join(said)


def heading(name: str, known: set[str]) -> Iterator[str]:
    """Yield the heading of an entry, and where its method is described."""
    yield f"\n### `{name}` {{ #{name.replace('/', '-').lower()} }}\n"
    if name in known:
        yield f"[Formulas, choices and differences from the paper](methods.md#{name})\n"


def attacks() -> str:
    """Return the page of attacks: a table of ours, a section for each, and tables of the libraries'."""
    known, found = methods(), documented("attacks", "attack")
    entries = listed("attacks")
    own = [each for each in entries if not each["library"]]
    lines = [
        "# Attacks\n",
        f"{len(own)} attacks of Crossfire's own, and {len(entries) - len(own)} of two libraries. This page",
        "is made from the registry: it is what `bench list attacks` prints. Words such as *access* stand in",
        "the [glossary](glossary.md).\n",
        "| attack | norms | sees | what it does |",
        "| :-- | :-- | :-- | :-- |",
    ]
    for entry in own:
        lines.append(row(linked(entry), ", ".join(entry["norms"]), entry["access"], plain(entry["summary"])))
    lines.append("\n## Crossfire's own")
    for entry in own:
        lines += heading(entry["name"], known)
        lines += [paper(found.get(entry["name"])) + "\n", plain(entry["summary"]) + "\n", facts(entry) + "\n"]
        lines += parameters(entry)
    for library in sorted({each["library"] for each in entries if each["library"]}):
        theirs = [each for each in entries if each["library"] == library]
        lines += [
            f"\n## From {library}\n",
            "Parameters are the library's own. What the adapters mend: [Libraries](libraries.md).\n",
            "| attack | norms | sees | what it does | parameters and defaults |",
            "| :-- | :-- | :-- | :-- | :-- |",
        ]
        for entry in theirs:
            norms, summary = ", ".join(entry["norms"]), plain(entry["summary"])
            settings = set_to(entry["parameters"])
            lines.append(row(f"`{entry['name']}`", norms, entry["access"], summary, settings))
    return "\n".join(lines)


def defenses() -> str:
    """Return the page of defenses: a table, and a section for each with its views."""
    known, found = methods(), documented("defenses", "defense")
    entries = listed("defenses")
    lines = [
        "# Defenses\n",
        f"{len(entries)} defenses. This page is made from the registry: it is what `bench list defenses`",
        "prints. A *view* is what an attacker may look through, a *read-out* the answer that is scored; see",
        "the [glossary](glossary.md).\n",
        "| defense | read-outs | views | what it is |",
        "| :-- | :-- | :-- | :-- |",
    ]
    for entry in entries:
        views = ", ".join(f"`{each}`" for each in entry["views"])
        lines.append(row(linked(entry), ", ".join(entry["readouts"]), views, plain(entry["summary"])))
    lines.append("\n## Each of them")
    for entry in entries:
        thing = found.get(entry["name"])
        lines += heading(entry["name"], known)
        lines += [paper(thing) + "\n", plain(entry["summary"]) + "\n", facts(entry, "views") + "\n"]
        lines += ["| view | what it offers | settings |", "| :-- | :-- | :-- |"]
        for name, view in entry["views"].items():
            lines.append(row(f"`{name}`", facts({"name": name, **view}), set_to(view["parameters"])))
        lines += parameters(entry)
    return "\n".join(lines)


def sources() -> str:
    """Return the page of data sources."""
    lines = [
        "# Data sources\n",
        "This page is made from the registry: it is what `bench list data` prints. What every source takes",
        "(`split`, `size`, `resize` and others) stands in [Data](data.md).\n",
    ]
    for entry in listed("data"):
        lines += [*heading(entry["name"], set()), plain(entry["summary"]) + "\n"]
        lines += parameters(entry)
    return "\n".join(lines)


# The other pages


def api() -> str:
    """Return the API page: every name that `bench` exports by its module, and `bench.testing`."""
    package = griffe.load("bench", search_paths=[str(ROOT)])
    paths = {
        str(name): member.target_path  # type: ignore[union-attr]
        for name in package.exports or []
        if (member := package.members.get(str(name))) is not None and member.is_alias
    }
    homes: dict[str, list[str]] = {}
    for name, path in paths.items():
        if name not in CALLS:
            homes.setdefault(path.rpartition(".")[0], []).append(path)
    lines = [
        "# API\n",
        "Everything public, as it is imported: `from bench import View`. Names load on first use, so that",
        "`import bench` is quick and needs no torch. `bench.testing` is for the tests of those who write",
        "attacks and defenses.",
    ]
    calls = [f"\n::: {paths[name]}\n" for name in CALLS if name in paths]
    if calls:
        lines += ["\n## From Python\n", *calls]
    for home in [*(each for each in ROOMS if each in homes), *sorted(set(homes) - set(ROOMS))]:
        lines.append(f"\n## {ROOMS.get(home, f'`{home}`')}\n")
        lines += [f"\n::: {path}\n" for path in homes[home]]
    lines += [
        "\n## Tests of attacks and defenses\n",
        "\n::: bench.testing\n    options: {show_root_heading: false}\n",
    ]
    return "\n".join(lines)


def measured() -> str:
    """Return the committed tables, one below the other."""
    folder = ROOT / TABLES
    lines = ["# Tables on MNIST\n"]
    readme = folder / "README.md"
    if readme.exists():
        lines.append(
            relinked(readme.read_text().replace("# ", "## ", 1), f"{TABLES}/README.md", "measured.md")
        )
    for path in sorted(folder.glob("table-*.md")):
        text = re.sub(
            r"^### (.*)$", rf"\n## \1 {{ #{path.stem} }}", path.read_text(), count=1, flags=re.MULTILINE
        )
        # Markdown would take the numbered notes for items of the list before them.
        lines.append(text.replace("\n\n1. ", "\n\n<!-- notes -->\n\n1. ", 1))
    return "\n".join(lines)


def decisions() -> str:
    """Return the list of decisions."""
    lines = [
        "# Decisions\n",
        "Why things are as they are: a page for each, with its context and consequence.\n",
    ]
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        number, _, words = title.partition(". ")
        lines.append(f"{int(number)}. [{html.escape(words)}]({path.name})")
    return "\n".join(lines)

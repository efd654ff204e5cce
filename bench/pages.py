"""The pages of documentation that come with the package: what flags and words mean, for the command line."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.errors import InputError, did_you_mean

GROUPS = {
    "flag of a table": "flags of tables",
    "finding of bench doctor": "findings of bench doctor",
    "word": "words",
}
"""By what a word is, the heading of all of them, in the order in which they are listed."""


class Entry(NamedTuple):
    """What a page says of a word."""

    word: str
    """A code of a flag or of the doctor, or a word of the glossary."""
    page: str
    """The file of the page."""
    kind: str
    """What the word is, for a heading."""
    text: str
    """Markdown."""


def folder() -> Path:
    """Return the folder of the pages: in the package, or in a clone beside it.

    Raises:
        InputError: The installation has none.
    """
    package = Path(__file__).parent
    for place in (package / "docs", package.parent / "docs"):
        if (place / "flags.md").is_file():
            return place
    raise InputError(f"{package / 'docs'}: the pages are not there; install crossfire-bench again")


@cache
def entries() -> tuple[Entry, ...]:
    """Return every code of a flag, every code of the doctor, and every word of the glossary."""
    flags, _, doctor = (folder() / "flags.md").read_text("utf-8").partition("\n# `bench doctor`")
    found = [Entry(word, "flags.md", "flag of a table", text) for word, text in _sections(flags, "##")]
    found += [
        Entry(word, "flags.md", "finding of bench doctor", text) for word, text in _sections(doctor, "###")
    ]
    glossary = (folder() / "glossary.md").read_text("utf-8")
    for words, text in re.findall(r"^(\S[^\n]*?) \{ #\S+ \}\n: {3}(.*?)(?=\n\n\S|\Z)", glossary, re.M | re.S):
        found += [Entry(word.strip(), "glossary.md", "word", text) for word in words.split(",")]
    return tuple(found)


def _sections(text: str, level: str) -> Iterator[tuple[str, str]]:
    """Yield the headings of a level that are a code, each with what stands below it."""
    pattern = rf"^{level} `([^`]+)`\n(.*?)(?=^#{{1,{len(level)}}} |\Z)"
    yield from re.findall(pattern, text, re.M | re.S)


def grouped() -> dict[str, list[str]]:
    """Return what is explained, by the heading of its group, in order, with what else each is."""
    kinds: dict[str, list[str]] = {}
    for each in entries():
        kinds.setdefault(each.word.casefold(), []).append(each.kind)
    groups: dict[str, list[str]] = {heading: [] for heading in GROUPS.values()}
    for entry in sorted(entries(), key=lambda each: each.word.casefold()):
        others = [kind.partition(" ")[0] for kind in kinds[entry.word.casefold()] if kind != entry.kind]
        also = f" (also a {' and a '.join(others)})" if others else ""
        groups[GROUPS[entry.kind]].append(f"{entry.word}{also}")
    return groups


def explained(word: str) -> list[Entry]:
    """Return what the pages say of a code or a word.

    Args:
        word: The code of a flag, a code of the doctor, or a word of the glossary; letters of either case are
            the same.

    Raises:
        InputError: No page explains it.
    """
    known = entries()
    found = [each for each in known if each.word.casefold() == word.strip().casefold()]
    if not found:
        near = did_you_mean(word, {each.word for each in known}, listed="bench explain", most=6)
        raise InputError(f"no page explains {word!r}{near}")
    return found


def unquoted(text: str) -> str:
    """Return a docstring with one backtick where reStructuredText has two.

    Args:
        text: The docstring, or a part of it.
    """
    return re.sub(r"(?<!`)``(?!`)(.+?)(?<!`)``(?!`)", r"`\1`", text)


def plain(text: str) -> list[str]:
    """Return Markdown as paragraphs and items of a list, each on one line, without its links.

    Args:
        text: Paragraphs and lists with dashes.

    Returns:
        The lines, with an empty one between paragraphs; rows of tables stay as they are.
    """
    lines: list[str] = []
    for line in unquoted(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)).strip().splitlines():
        said = line.strip()
        fresh = not lines or not lines[-1] or said.startswith(("- ", "|", "```")) or not said
        if fresh or lines[-1].startswith("|") or re.fullmatch(r"\w+:", lines[-1]):
            lines.append(said)
        else:
            lines[-1] += f" {said}"
    return lines

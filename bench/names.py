"""What people may call things, and how text of unknown origin is shown.

Names of a task file reach terminals, file names and documents. They are printable and short, which is checked
when the file is read; what else is shown (paths, messages of other people's code) is spelled out by `shown`.
What a form would take for something else than text is escaped here, too, but for LaTeX: see `render.py`.
"""

import codecs
import io
import os
import re
import sys
from typing import Annotated, TextIO

from pydantic import AfterValidator, Field

LONGEST = 100
"""Characters of a name."""

SENTENCE = 500
"""Characters of a title, a reason, a label of an axis."""

FILE_BYTES = 200
"""Bytes of a name that becomes a part of a file's: file systems take 255 for all of it."""

_NO_FILE = frozenset('\\:*?"<>|')
"""Characters that one file system or another takes for something else."""


def unprintable(text: str) -> str | None:
    """Return the first character that cannot be seen as itself, as ``U+001B``: controls, lone surrogates,
    changes of direction, spaces other than the usual one.
    """
    return next((f"U+{ord(each):04X}" for each in text if not each.isprintable()), None)


def shown(text: str, keep: str = "\n\t") -> str:
    """Return a text to print: what cannot be seen is spelled as Python would, ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )


_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<![^\s])#")
"""What Markdown, or HTML in it, would take for something else than text. Between letters _ is one."""


def in_markdown(text: str) -> str:
    """Return a text as Markdown shows it."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", shown(text, keep=""))


_FORMULA = re.compile(r"\s*[=+\-@]")


def in_csv(value: object) -> object:
    """Return a value for a cell: a text that a spreadsheet would run is led by an apostrophe (OWASP)."""
    if not isinstance(value, str) or not _FORMULA.match(value):
        return shown(value, keep="") if isinstance(value, str) else value
    try:
        float(value)
    except ValueError:
        return f"'{shown(value, keep='')}"
    return value


_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_SPELLED = {ord(each): "-" for each in "\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"}
_SPELLED |= {ord("±"): "+/-", ord("∞"): "inf", ord("≤"): "<=", ord("≥"): ">=", ord("·"): ","}
_READABLE = "crossfire-readable"


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell what a terminal cannot show: a footnote as [1], which must not become a digit of its number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    digits = str.maketrans(_RAISED, "0123456789")
    noted = re.sub(f"[{_RAISED}]+(·[{_RAISED}]+)*", lambda found: f"[{found[0].translate(digits)}]", text)
    plain = noted.translate(_SPELLED)
    return plain.encode("ascii", "backslashreplace").decode(), error.end


def readable(stream: TextIO) -> None:
    """Let a stream spell what its encoding does not have, where it would raise."""
    codecs.register_error(_READABLE, _spelled)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_READABLE)


def named(text: str) -> str:
    """Return a name; raise `ValueError` where it is none."""
    return _checked(text, "a name", LONGEST)


def said(text: str) -> str:
    """Return a sentence on one line; raise `ValueError` where it holds what cannot be printed."""
    return _checked(" ".join(text.split()), "a sentence", SENTENCE)


def _checked(text: str, what: str, longest: int) -> str:
    if not text:
        raise ValueError(f"expected {what}, found an empty text")
    if (found := unprintable(text)) is not None:
        raise ValueError(f"expected {what} of printable characters, found {found}")
    if len(text) > longest:
        raise ValueError(f"expected {what} of at most {longest} characters, found {len(text)}")
    if text != text.strip():
        raise ValueError(f"expected {what} without a space at its ends, found {text!r}")
    return text


def filed(text: str) -> str:
    """Return a name that may become a part of a file's; raise `ValueError` where it may not."""
    named(text)
    if unfit := sorted(_NO_FILE & set(text)):
        raise ValueError(f"becomes a file's name, and {unfit[0]} cannot stand there, found {text!r}")
    if (length := len(text.encode())) > FILE_BYTES:
        raise ValueError(f"becomes a file's name: expected at most {FILE_BYTES} bytes, found {length}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"becomes a file's name, which this locale ({encoding}) cannot write") from None
    return text


Name = Annotated[str, AfterValidator(named), Field(json_schema_extra={"minLength": 1, "maxLength": LONGEST})]
"""What a suite calls a thing: printable, short, on one line."""

FileName = Annotated[
    str, AfterValidator(filed), Field(json_schema_extra={"minLength": 1, "maxLength": LONGEST})
]
"""A name that becomes a part of a file's."""

Sentence = Annotated[
    str, AfterValidator(said), Field(json_schema_extra={"minLength": 1, "maxLength": SENTENCE})
]
"""A title, a reason, a label: printable, on one line; breaks of lines become spaces."""

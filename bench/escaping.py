"""How text of unknown origin is shown, so that no terminal, document or spreadsheet runs a part of it.

What LaTeX takes for its own is escaped in `render.py`, beside the rest that is written for it.
"""

import codecs
import io
import re
from typing import TextIO


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

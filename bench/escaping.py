"""How text of unknown origin is shown, so that no terminal, document or spreadsheet runs a part of it.

Text is escaped for LaTeX in `render/latex.py`.
"""

import codecs
import io
import re
from typing import TextIO


def unprintable(text: str) -> str | None:
    """Return the first character that cannot be seen as itself.

    Such are control characters, lone surrogates, changes of direction, and spaces other than the usual one.

    Args:
        text: Any text.

    Returns:
        The character as ``U+001B``; None where there is none.
    """
    return next((f"U+{ord(each):04X}" for each in text if not each.isprintable()), None)


def shown(text: str, keep: str = "\n\t") -> str:
    """Return a text to print, in which characters that cannot be seen are written as Python escapes them.

    Args:
        text: Any text.
        keep: Characters to leave as they are.

    Returns:
        The text, with ``\\x1b`` in place of an escape character.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )


_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<![^\s])#")
"""What Markdown, or HTML in it, would take for something else than text. Between letters _ is text."""


def in_markdown(text: str) -> str:
    """Escape a text, so that Markdown shows it as it is.

    Args:
        text: Any text.

    Returns:
        The text on one line.
    """
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", shown(text, keep=""))


_FORMULA = re.compile(r"\s*[=+\-@]")


def in_csv(value: object) -> object:
    """Return a value for a CSV file: a text that a spreadsheet would run begins with an apostrophe (OWASP).

    Args:
        value: Any value.

    Returns:
        The text to write; what is no text, as it is. Texts that are numbers stay numbers.
    """
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
    """Replace what an encoding lacks: a superscript 1 by [1], which must not become a digit of the number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    digits = str.maketrans(_RAISED, "0123456789")
    noted = re.sub(f"[{_RAISED}]+(·[{_RAISED}]+)*", lambda found: f"[{found[0].translate(digits)}]", text)
    plain = noted.translate(_SPELLED)
    return plain.encode("ascii", "backslashreplace").decode(), error.end


def readable(stream: TextIO) -> None:
    """Let a stream replace characters that its encoding lacks, where it would raise.

    Args:
        stream: Standard output or standard error.
    """
    codecs.register_error(_READABLE, _spelled)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_READABLE)

"""What people may call things: names that are printable and short, checked when the task file is read."""

import os
import sys
from typing import Annotated

from pydantic import AfterValidator, Field

from bench.escaping import unprintable

LONGEST = 100
"""Characters of a name."""

SENTENCE = 500
"""Characters of a title, a reason, a label of an axis."""

FILE_BYTES = 200
"""Bytes of a name that becomes a part of a file's: file systems take 255 for all of it."""

_NO_FILE = frozenset('\\:*?"<>|')
"""Characters that one file system or another takes for something else."""


def named(text: str) -> str:
    """Check a name.

    Args:
        text: what somebody calls a thing.

    Returns:
        The same text.

    Raises:
        ValueError: it is empty, longer than `LONGEST` characters, has a space at an end, or does not print.
    """
    return _checked(text, "a name", LONGEST)


def said(text: str) -> str:
    """Check a sentence.

    Args:
        text: a title, a reason or a label; breaks of lines are taken for spaces.

    Returns:
        The text on one line.

    Raises:
        ValueError: it is empty, longer than `SENTENCE` characters, or does not print.
    """
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
    """Check a name that becomes a part of a file's.

    Args:
        text: what somebody calls a thing.

    Returns:
        The same text.

    Raises:
        ValueError: it is no name, has a character that some file system does not take, is longer than
            `FILE_BYTES` bytes, or cannot be written in this locale.
    """
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

"""How the command line says things: on which console, and in which words. Imports no torch."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.escaping import shown
from bench.quantities import format_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Voice(NamedTuple):
    """How much is said."""

    quiet: bool = False
    """Whether only what was asked for is printed, and errors: no progress, no notes."""
    verbose: bool = False
    """Whether tracebacks and each shard are told of, too."""


_voice = [Voice()]


def speak(*, quiet: bool, verbose: bool) -> None:
    """Set how much this process says.

    Args:
        quiet: Whether only what was asked for is printed, and errors.
        verbose: Whether tracebacks and each shard are told of, too.
    """
    _voice[0] = Voice(quiet, verbose)


def voice() -> Voice:
    """Return how much is to be said."""
    return _voice[0]


def console(*, stderr: bool = False) -> Any:
    """Return a `rich.console.Console` that takes nothing for markup, and outlives a reader who left.

    Args:
        stderr: Whether it writes to the error stream.
    """
    from rich.console import Console

    class Unbroken(Console):
        def on_broken_pipe(self) -> None:
            """Go on unheard: whoever read has seen enough, and the exit status is still to come."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # What is printed are names and messages of other people's: none is markup.
    return Unbroken(stderr=stderr, markup=False, emoji=False)


def say(console: Any | None, text: str, style: str = "") -> None:
    """Print a sentence as it is, however long; nothing where there is no console."""
    if console is not None:
        console.print(shown(text), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def lay(console: Any, text: Any, indent: int = 0, hang: int = 0) -> None:
    """Print lines: in a pipe each whole, for `grep` and `awk`; on a terminal those that go on are indented.

    Args:
        console: Where they are printed.
        text: A string, or a `rich.text.Text`.
        indent: Columns before each line, 0 or more.
        hang: Further columns before what goes on below a line, 0 or more.
    """
    from rich.text import Text

    for line in (Text(text) if isinstance(text, str) else text).split("\n", allow_blank=True):
        room = max(console.width - indent - hang, 10)
        parts = line.wrap(console, room) if console.is_terminal else [line]
        for nth, part in enumerate(parts):
            part.rstrip()
            before = " " * (indent + (hang if nth else 0)) if part else ""
            console.print(Text(before) + part, highlight=False, soft_wrap=True)


def columns(console: Any, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without lines and without blanks at the ends: words to the left, numbers to the right.

    Args:
        console: Where it is printed.
        headings: A heading for each column: the first has words, the others numbers.
        rows: The cells of each row; one beyond the headings is a remark behind the row.
    """
    from rich.cells import cell_len
    from rich.text import Text

    width = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=False)]
    for cells in (headings, *rows):
        first, *rest = zip(cells, width, strict=False)
        line = first[0] + " " * (first[1] - cell_len(first[0]))
        line += "".join("   " + " " * (wide - cell_len(cell)) + cell for cell, wide in rest)
        line += "".join(f"   {remark}" for remark in cells[len(headings) :])
        console.print(Text(line, style="bold" if cells is headings else ""), highlight=False, soft_wrap=True)


def count(n: int, noun: str, several: str | None = None) -> str:
    """Return ``1 job`` or ``3 jobs``.

    Args:
        n: How many.
        noun: What, for one.
        several: What, for more; None: with an s.
    """
    return f"{n} {noun if n == 1 else several or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Return ``1 h 5 min``, ``2 min 3 s`` or ``4.0 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def condition_name(coordinates: Mapping[str, Any]) -> str:
    """Return a condition in a few words, such as ``pgd/first on cnn/last, seed 0 at 0.1``."""
    through = f"/{coordinates['view']}" if coordinates["view"] else ""
    radius = f" at {format_value(coordinates['radius'])}" if coordinates["radius"] is not None else ""
    victim = f"{coordinates['defense']}/{coordinates['readout']}"
    return f"{coordinates['attack']}{through} on {victim}, seed {coordinates['seed']}{radius}"

"""The command line, called in this process."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from bench import cli
from bench.console import speak


class Answer(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What was printed, in one line."""
        return " ".join((self.out + self.err).split())


Bench = Callable[..., Answer]


def called_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that calls the command line with words."""

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        finally:
            speak(quiet=False, verbose=False)
        shown = capsys.readouterr()
        return Answer(code, shown.out, shown.err)

    return call

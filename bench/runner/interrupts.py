"""Signals that ask a run to end, also where the exception that a signal raises gets lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""The signals that end a run: Ctrl-C, the request of systems, and the warning of Slurm."""


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM or USR2."""


_asked: type[KeyboardInterrupt] | None = None
"""What the last signal raised since the block began."""


@contextmanager
def terminable() -> Iterator[None]:
    """End the block on SIGTERM and USR2 as on Ctrl-C, so that processes are ended and leases freed.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Terminated: Another signal that asks for the end.
    """
    global _asked
    _asked = None

    def end(number: int, _: Any) -> None:
        global _asked
        _asked = KeyboardInterrupt if number == signal.SIGINT else Terminated
        raise _asked

    before = {each: signal.signal(each, end) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _asked = None


def raise_if_asked() -> None:
    """Raise what a signal has raised before and somebody caught: extension modules do so while they load.

    Raises:
        KeyboardInterrupt: A signal has asked this process to end, in the block of `terminable`.
    """
    if _asked is not None:
        raise _asked

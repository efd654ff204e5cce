"""Limits of a job: its time, by an alarm, and the memory of its device, by smaller batches."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.errors import OvertimeError


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `OvertimeError` in the block once it has taken so long, every second after, and at its end.

    By a signal of the main thread, where jobs run; what a signal cannot interrupt, `execute` ends from
    outside. Inside another limit the nearer one counts.
    """
    alarm = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    outer = signal.getitimer(signal.ITIMER_REAL)[0] if alarm else 0.0
    if seconds is None or not alarm or 0 < outer <= seconds:
        yield
        return
    rang: list[OvertimeError] = []

    def over(*_: object) -> None:
        rang.append(OvertimeError(f"it took longer than its limit of {seconds:g} s"))
        raise rang[-1]

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    try:
        try:
            # Again and again: a library that swallows an exception swallows one.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:
        if rang and not isinstance(error, OvertimeError):
            raise rang[-1] from error
        raise
    finally:
        # Once more: an alarm may ring on the way out of the block, before it is off.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - begun), 0.01), 1.0)
    if rang:
        # Swallowed: what was returned is what there was by then.
        raise rang[-1]


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a device's memory, or the machine's, is full."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in said)

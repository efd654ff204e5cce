"""The isolation of a job: its changes of the process are restored, and it cannot end the process."""

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.errors import DisturbedError
from bench.referee.freezing import random_states
from bench.runner.child_processes import orphans_adopted
from bench.runner.interrupts import ENDING
from bench.runner.process_state import ProcessState, changed_kernels, set_signal_handlers, signal_handlers

_RUNNING: list[ProcessState] = []
"""The state at the beginning of the job that is running in this process; empty while none is."""


@contextmanager
def building() -> Iterator[None]:
    """Restore, after the block, the settings that the construction of a network changed inside a job.

    Settings of the kind ``building`` are noted only, since nothing was computed yet (see `Setting`).

    Yields:
        Nothing.

    Raises:
        DisturbedError: The construction changed something else.
    """
    yield
    for state in _RUNNING[-1:]:
        state.restore(building=True)


@contextmanager
def isolated() -> Iterator[ProcessState]:
    """Run a job in the block; restore what it changed for the whole process, however it ends.

    An attempt to end the process (`sys.exit`, `os._exit`, a KeyboardInterrupt that no person sent) is an
    error of the job. Global random states are restored as well; drawing from them is allowed and is not
    noted.

    Yields:
        The state at the beginning, whose `notes` are complete after the block.

    Raises:
        DisturbedError: The job changed something that may have decided a number, or tried to end the process;
            or an earlier job changed what torch computes in a way that cannot be undone.
    """
    if spoilt := changed_kernels():
        raise DisturbedError(
            f"an earlier job changed {', '.join(spoilt)} in this process; start the run again"
        )
    state = ProcessState()
    with ExitStack() as stack:
        stack.callback(state.streams.close)
        stack.enter_context(orphans_adopted())
        # Only of GPUs that are in use: reading the state of a GPU starts it.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(random_states(devices))
        stack.enter_context(warnings.catch_warnings())
        sent = stack.enter_context(_interrupts())
        stack.enter_context(_no_exit())
        state.settings["signal handlers"] = signal_handlers()
        _RUNNING.append(state)
        stack.callback(_RUNNING.pop)
        try:
            yield state
        except BaseException as error:
            _restore_quietly(state)
            if isinstance(error, Exception) or sent.is_set():
                raise
            said = f": {error}" if str(error) else ""
            raise DisturbedError(f"tried to end the process ({type(error).__name__}{said})") from error
        else:
            state.restore()


def _restore_quietly(state: ProcessState) -> None:
    """Restore without an error of its own: the job has failed already, for another reason."""
    with contextlib.suppress(DisturbedError):
        state.restore()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Tell an interrupt (SIGINT, SIGTERM, USR2) that was sent from one that the code of the block raised."""
    sent = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield sent
        return
    before = {number: signal.getsignal(number) for number in ENDING}

    def interrupt(number: int, frame: Any) -> None:
        sent.set()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, interrupt)
    try:
        yield sent
    finally:
        set_signal_handlers(before)


@contextmanager
def _no_exit() -> Iterator[None]:
    """Make `os._exit` and `os.abort` raise `SystemExit` in this process; in its forks they work."""
    owner, real = os.getpid(), {name: getattr(os, name) for name in ("_exit", "abort")}

    def refuse(name: str) -> Callable[..., None]:
        def ended(*arguments: Any) -> None:
            if os.getpid() != owner:
                real[name](*arguments)
            raise SystemExit(f"os.{name}{arguments}")

        return ended

    for name in real:
        setattr(os, name, refuse(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)

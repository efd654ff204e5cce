"""The limit of a job's time, by an alarm."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bench.errors import OvertimeError
from bench.runner.process_state import installed


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `OvertimeError` in the block when its time is over, once more every second, and at its end.

    The alarm is a signal to the main thread, in which jobs run; elsewhere there is no limit. Code that no
    signal interrupts is ended by the scheduler from outside. Of two limits, one inside the other, the one
    that ends first counts. The import of an installed module is waited for: half of one would stay in the
    process, and fail later jobs.

    Args:
        seconds: The limit in seconds, above 0; None for no limit.

    Yields:
        Nothing.

    Raises:
        OvertimeError: The block took longer, even if the exception was caught inside it.
    """
    alarm = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    outer = signal.getitimer(signal.ITIMER_REAL)[0] if alarm else 0.0
    if seconds is None or not alarm or 0 < outer <= seconds:
        yield
        return
    raised: list[OvertimeError] = []

    def over(_: int, frame: FrameType | None) -> None:
        if _importing(frame):
            # It goes off again in a second.
            return
        raised.append(OvertimeError(f"it took longer than its limit of {seconds:g} s"))
        raise raised[-1]

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    try:
        try:
            # Repeated every second, since a library may catch the first exception.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:
        if raised and not isinstance(error, OvertimeError):
            raise raised[-1] from error
        raise
    finally:
        # Once more: the alarm may have gone off on the way out of the block.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - begun), 0.01), 1.0)
    if raised:
        # The block caught it, so that its result may be incomplete.
        raise raised[-1]


def _importing(frame: FrameType | None) -> bool:
    """Return whether an installed module is being imported where a frame is at work."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" and "spec" in frame.f_locals:
            name = getattr(frame.f_locals["spec"], "name", None)
            if name in sys.modules and installed(sys.modules[name]):
                return True
        frame = frame.f_back
    return False

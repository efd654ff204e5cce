"""The processes that a job starts: how to find them, and how to end them with everything below them."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process

import psutil

_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch._inductor")
"""Parts of the command lines of processes that Python and torch keep for themselves. They end with this
process.
"""


def running() -> set[psutil.Process]:
    """Return the processes below this one, at any depth.

    Returns:
        The processes, without zombies and without those that Python and torch keep for themselves.
    """
    found: set[psutil.Process] = set()
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(each.cmdline())
            if each.status() != psutil.STATUS_ZOMBIE and not any(name in line for name in _HELPERS):
                found.add(each)
    return found


def end(processes: Iterable[psutil.Process]) -> list[str]:
    """Kill processes and wait up to 3 seconds for their end.

    Args:
        processes: The processes. One that is gone already is passed over.

    Returns:
        The names of those that were killed, sorted.
    """
    names = []
    for each in (alive := list(processes)):
        with contextlib.suppress(psutil.Error):
            name = each.name()
            each.kill()
            names.append(name)
    psutil.wait_procs(alive, timeout=3)
    return sorted(names)


def adopt_orphans(wanted: bool) -> None:
    """Make this process the parent of whatever its children leave behind, or no longer (Linux only).

    A process that adopts must end what it adopts: an orphan that nobody waits for stays in the list of
    processes.

    Args:
        wanted: True to adopt orphans, False to stop.
    """
    import ctypes

    subreaper = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(subreaper, int(wanted), 0, 0, 0)


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """Adopt orphans inside the block. In a worker process nothing changes: it adopts them all its life.

    Yields:
        Nothing.
    """
    if parent_process() is not None:
        yield
        return
    adopt_orphans(True)
    try:
        yield
    finally:
        adopt_orphans(False)

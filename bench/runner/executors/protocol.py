"""What every executor offers to the scheduler: slots, each of which runs one job at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from bench.errors import InputError
from bench.runner.context import WorkerContext
from bench.runner.occupancy import Occupancy
from bench.runner.worker import Question
from bench.suite.jobs import Job

MOST_SLOTS = 256
"""The most slots of a device that a user may ask for."""

Listener: TypeAlias = Callable[[int, Mapping[str, Any]], None]
"""Called with the number of a slot and the facts that the job in it reports."""


class Pool(Protocol):
    """Slots, each of which runs one job at a time."""

    devices: tuple[str, ...]
    """The device of each slot; none where workers elsewhere do everything."""
    occupancy: Occupancy | None
    """Decides which slots are open; None: all are."""

    def submit(self, slot: int, job: Job | Question) -> "Future[dict[str, Any]]":
        """Start a job in a free slot.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            The future of the job's receipt. It is running from when a process has the job, which is when
            the job's time begins. It fails with `concurrent.futures.BrokenExecutor` where that process
            ended, whatever ended it.
        """
        ...

    def warm(self, slot: int, job: Job) -> bool:
        """Return whether a slot can begin a job at once, without a new process.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            True where no process must be started.
        """
        ...

    def restart(self, slot: int) -> None:
        """Forget the process that died in a slot, so that the next job gets a new one.

        Args:
            slot: Number of the slot, from 0.
        """
        ...

    def kill(self, slot: int) -> None:
        """Kill the process that works in a slot; its future fails.

        Args:
            slot: Number of the slot, from 0.
        """
        ...

    def watch(self) -> list[str]:
        """Look after what the slots run on; called every now and then while there is work.

        Returns:
            A sentence for each thing that happened since the last call.

        Raises:
            InputError: Nothing is left that could do a job.
        """
        ...

    def stop(self) -> None:
        """End everything at once, even what is running."""
        ...


Start: TypeAlias = Callable[[WorkerContext, Listener], Pool]
"""Starts an executor, from the surroundings of the jobs and the listener to what they report."""


class Asked(NamedTuple):
    """What a user may ask of an executor."""

    devices: list[str] | None = None
    """Names of devices (``cpu``, ``cuda``, ``cuda:1``), each once; None or empty for every GPU, or the CPU
    where there is none.
    """
    slots: int | Literal["auto"] | None = None
    """How many jobs share a device, 1 or more; ``auto``: as many on a GPU as its load and memory say; None:
    one on a GPU. On the CPU both of these mean one for each core.
    """
    workers: int | None = None
    """How many workers on a cluster, 1 or more; None: one on Slurm, and all that there is room for on Ray."""
    slurm: tuple[str, ...] = ()
    """Parameters of the workers on Slurm, each ``name=value``."""
    ray_address: str | None = None
    """Address of a Ray cluster, ``host:port`` or ``auto``; None for one of this machine's own."""


def slots_asked(text: str | None) -> int | Literal["auto"] | None:
    """Read a number of slots.

    Args:
        text: What the user wrote.

    Returns:
        A number of 1 or more, ``auto``, or None where nothing was written.

    Raises:
        InputError: It is neither.
    """
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST_SLOTS:
        return int(text)
    raise InputError(f"--slots {text}: expected auto, or a whole number from 1 to {MOST_SLOTS}")

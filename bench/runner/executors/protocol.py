"""What every executor offers to the scheduler: slots, each of which runs one job at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeAlias

from bench.runner.context import WorkerContext
from bench.runner.worker import Recheck
from bench.suite.jobs import Job

Listener: TypeAlias = Callable[[int, Mapping[str, Any]], None]
"""Called with the number of a slot and the facts that the job in it reports."""


class Pool(Protocol):
    """Slots, each of which runs one job at a time."""

    devices: tuple[str, ...]
    """The device of each slot; none where workers elsewhere do everything."""

    def submit(self, slot: int, job: Job | Recheck) -> "Future[dict[str, Any]]":
        """Start a job in a free slot.

        Args:
            slot: Number of the slot, from 0.
            job: The job.

        Returns:
            The future of the job's receipt. It fails with `concurrent.futures.BrokenExecutor` where the
            process of the job ended, whatever ended it.
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
    """Names of devices (``cpu``, ``cuda``, ``cuda:1``), each as often as it shall have slots; None or empty
    for every GPU, or the CPU where there is none.
    """
    workers: int | None = None
    """How many workers on a cluster, 1 or more; None: one on Slurm, and all that there is room for on Ray."""
    slurm: tuple[str, ...] = ()
    """Parameters of the workers on Slurm, each ``name=value``."""
    ray_address: str | None = None
    """Address of a Ray cluster, ``host:port`` or ``auto``; None for one of this machine's own."""
    slots: int | None = None
    """How many workers share a GPU on Ray, 1 or more; None: one."""

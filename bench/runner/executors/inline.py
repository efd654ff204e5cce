"""The executor that runs each job in this process, at once."""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from bench.errors import InputError
from bench.runner.context import WorkerContext, prepare
from bench.runner.executors.devices import devices
from bench.runner.executors.protocol import Asked, Listener, Start
from bench.runner.occupancy import Occupancy
from bench.runner.worker import Question, do
from bench.suite.jobs import Job


def ready(asked: Asked) -> Start:
    """Check the device that was asked for.

    Args:
        asked: What the user asked for.

    Returns:
        What starts the executor.

    Raises:
        InputError: There is no such device here, or several, or several slots, were asked for.
    """
    every = devices(asked)
    if asked.devices and len(every) > 1:
        named = " ".join(f"--device {name}" for name in asked.devices)
        raise InputError(f"{named}: inline has one slot; name one device, or use --executor process")
    if asked.slots not in (None, 1):
        raise InputError(f"--slots {asked.slots}: inline has one slot; use --executor process")
    return partial(Inline, device=every[0])


class Inline:
    """The pool with one slot, which runs each job in this process, at once.

    Args:
        context: The surroundings of the jobs.
        listener: Called with slot 0 and the facts that a job reports.
        device: The device.
    """

    def __init__(self, context: WorkerContext, listener: Listener, device: str) -> None:
        self.devices: tuple[str, ...] = (device,)
        self.occupancy: Occupancy | None = None
        self._worker_context = replace(context, device=device)
        self._listener = listener
        prepare(self._worker_context)

    def submit(self, slot: int, job: Job | Question) -> "Future[dict[str, Any]]":
        """Run a job.

        Args:
            slot: 0.
            job: The job.

        Returns:
            A future that is done.
        """
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(do(job, self._worker_context, lambda facts: self._listener(slot, facts)))
        except Exception as error:  # noqa: BLE001 - a job's failure is its future's
            future.set_exception(error)
        return future

    def warm(self, slot: int, job: Job) -> bool:
        """Return True, since no process must be started.

        Args:
            slot: 0.
            job: The job.

        Returns:
            True.
        """
        return True

    def restart(self, slot: int) -> None:
        """Do nothing: there is no other process.

        Args:
            slot: 0.
        """

    def kill(self, slot: int) -> None:
        """Do nothing: a job that was submitted has ended.

        Args:
            slot: 0.
        """

    def watch(self) -> list[str]:
        """Return nothing: there is nothing to look after.

        Returns:
            Nothing.
        """
        return []

    def stop(self) -> None:
        """Do nothing: a job that was submitted has ended."""

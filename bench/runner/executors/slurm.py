"""The executor on Slurm: one array of long-lived workers, each of which is `bench worker`.

Slurm has one job for each worker and never one for each of ours. The run that submits them has no slot: it
watches the results folder, in which the workers share the work by leases. Nothing here imports torch, since
each worker of the array unpickles a part of this module.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import submitit
import yaml
from submitit.helpers import DelayedSubmission

from bench.console import count
from bench.errors import InputError, did_you_mean
from bench.results import leases
from bench.results.failures import TRIES
from bench.results.leases import LOGS

if TYPE_CHECKING:
    from concurrent.futures import Future

    from bench.runner.context import WorkerContext
    from bench.runner.executors.protocol import Asked, Listener, Start
    from bench.runner.occupancy import Occupancy
    from bench.runner.worker import Question
    from bench.suite.jobs import Job

GRACE = 30.0
"""Seconds that a worker has to drop its jobs and free their leases; Slurm waits 90 before it kills."""

DRAIN = 60.0
"""Seconds that a worker which was told to end waits for Slurm to requeue or kill it."""

REQUEUES = 1000
"""How often a worker whose time was over is queued again."""

HOUR = 60
"""Minutes of a worker where the user gives none; after them it is queued again, and goes on."""

LAST = 3.0
"""Seconds that workers have to see that nothing is left to do; a cancelled one holds its GPU for longer."""

LOOK = 2.0
"""Seconds between two looks at the workers."""

ALONE = 10.0
"""Seconds without any worker after which none is expected to come."""

OURS = {"map_count", "num_gpus", "use_srun", "job_name"}
"""Parameters of submitit that are not the user's to give: internal, outdated, or ours."""


def ready(asked: Asked) -> Start:
    """Check what is asked of Slurm.

    Args:
        asked: What the user asked for. Devices are names on the nodes, and are not looked for here.

    Returns:
        What starts the executor.

    Raises:
        InputError: There is no such parameter, or no Slurm here.
    """
    settings = dict(_setting(each) for each in asked.slurm)
    cluster = settings.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise InputError(f"--slurm cluster={cluster}: expected slurm, or local for a try on this machine")
    if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise InputError(
            "--executor slurm: there is no Slurm here (no program srun); start the run on a login node, or "
            "try it on this machine with --slurm cluster=local"
        )
    words = [word for name in asked.devices or () for word in ("--device", name)]
    if asked.slots is not None:
        words += ["--slots", str(asked.slots)]
    return partial(Slurm, cluster=cluster, settings=settings, workers=asked.workers or 1, words=tuple(words))


def _setting(text: str) -> tuple[str, Any]:
    """Return a parameter's name and value from ``name=value``."""
    name, equals, value = text.partition("=")
    known = submitit.SlurmExecutor._valid_parameters() - OURS | {"cluster"}
    name = name.replace("-", "_")
    if not equals:
        raise InputError(f"--slurm {text}: expected NAME=VALUE, such as --slurm partition=gpu")
    if name not in known:
        raise InputError(f"--slurm {text}: unknown parameter {name!r}{did_you_mean(name, known)}")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = value
    if name == "time" and (type(found) is not int or ":" in value or found < 1):
        raise InputError(f"--slurm {text}: expected the minutes of a worker as a whole number, 1 or more")
    return name, found


class Slurm:
    """The pool without slots, whose work is done by an array of workers on Slurm.

    They are submitted when there is work, and cancelled when there is none.

    Args:
        context: The surroundings of the jobs.
        listener: Is not called: what a worker does stands in its file.
        cluster: ``slurm``, or ``local`` for processes of this machine.
        settings: Parameters of submitit.
        workers: How many workers, 1 or more.
        words: What is said to each worker on its command line.
    """

    def __init__(
        self,
        context: WorkerContext,
        listener: Listener,
        *,
        cluster: str,
        settings: dict[str, Any],
        workers: int,
        words: tuple[str, ...],
    ) -> None:
        self.devices: tuple[str, ...] = ()
        self.occupancy: Occupancy | None = None
        self._root, self._cluster, self._settings, self._workers = context.store, cluster, settings, workers
        self._words = (*words, *(("--data-root", str(context.data_root)) if context.data_root else ()))
        self._jobs: list[Any] = []
        self._over: set[str] = set()
        self._dead: set[str] = set()
        self._looked = self._seen = 0.0

    def submit(self, slot: int, job: Job | Question) -> Future[dict[str, Any]]:
        """Raise, since there is no slot.

        Args:
            slot: Number of the slot.
            job: The job.

        Raises:
            IndexError: Always.
        """
        raise IndexError(slot)

    def warm(self, slot: int, job: Job) -> bool:
        """Return False, since there is no slot.

        Args:
            slot: Number of the slot.
            job: The job.

        Returns:
            False.
        """
        return False

    def restart(self, slot: int) -> None:
        """Do nothing: there is no slot.

        Args:
            slot: Number of the slot.
        """

    def kill(self, slot: int) -> None:
        """Do nothing: there is no slot.

        Args:
            slot: Number of the slot.
        """

    def watch(self) -> list[str]:
        """Submit the workers at the first call; later say which of them died or ended.

        Returns:
            A sentence for each thing that happened.

        Raises:
            InputError: Slurm refused, or no worker is left.
        """
        now = time.monotonic()
        if not self._jobs:
            self._seen = now
            self._dead = {each.name for each in leases.workers(self._root) if each.dead}
            return [self._begin()]
        if now - self._looked < LOOK:
            return []
        self._looked, said = now, []
        # A run without slots, such as this one, does no work.
        others = [each for each in leases.workers(self._root) if each.said.get("devices")]
        for each in others:
            if each.dead and each.name not in self._dead:
                self._dead.add(each.name)
                said.append(f"{each.shown} died; others take over its jobs")
        for job in self._jobs:
            if job.job_id not in self._over and job.done():
                self._over.add(job.job_id)
                said.append(f"worker {job.job_id} has ended: {_last_words(job)}")
        if len(self._over) < len(self._jobs) or any(not each.dead for each in others):
            self._seen = now
        elif now - self._seen > ALONE:
            self._alone()
        return said

    def stop(self) -> None:
        """Cancel the workers that have not ended after a moment, queued ones too."""
        end = time.monotonic() + LAST
        while time.monotonic() < end and not all(job.done() for job in self._jobs):
            time.sleep(0.1)
        for job in self._jobs:
            if not job.done():
                with suppress(OSError, subprocess.SubprocessError):
                    job.cancel(check=False)

    def _begin(self) -> str:
        folder = self._root / LOGS / "slurm"
        try:
            executor: Any = submitit.AutoExecutor(
                folder, cluster=self._cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
            )
            executor.update_parameters(
                name=f"bench-{self._root.name}",
                timeout_min=self._settings.get("time", HOUR),
                **{f"slurm_{name}": value for name, value in self._settings.items() if name != "time"},
            )
            self._jobs = executor.submit_array([Worker(self._root, self._words)] * self._workers)
        except (OSError, ValueError, RuntimeError, submitit.core.utils.FailedJobError) as error:
            first = str(error).strip().splitlines()
            raise InputError(
                f"Slurm took no worker: {first[-1] if first else type(error).__name__}"
            ) from None
        names = ", ".join(str(job.job_id) for job in self._jobs[:3])
        more = ", ..." if len(self._jobs) > 3 else ""
        return f"{count(len(self._jobs), 'worker')} submitted ({names}{more}); they print to {folder}"

    def _alone(self) -> NoReturn:
        words = dict.fromkeys(_last_words(job) for job in self._jobs)
        raise InputError(
            f"no worker is left, and there is work: {'; '.join(words)} (all of it in "
            f"{self._root / LOGS / 'slurm'}); what is finished is kept, and the same command goes on"
        )


def _last_words(job: Any) -> str:
    """Return the last line that a worker printed."""
    for path in (job.paths.stdout, job.paths.stderr):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            # What submitit says of itself begins with its name.
            own = [line.strip() for line in lines if line.strip() and not line.startswith("submitit ")]
            if own:
                return str(own[-1])
    return f"it said nothing (Slurm: {job.state})"


class Worker:
    """A worker of the array: `bench worker` in a process of its own, started again where it is killed.

    Args:
        root: The results folder.
        words: What is said to it on its command line.
    """

    def __init__(self, root: Path, words: tuple[str, ...]) -> None:
        self._root, self._words = root, words
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Work until nothing is left to do.

        Returns:
            The exit status of the worker.
        """
        stop, code = leases.stop_asked(self._root), 0
        command = [sys.executable, "-m", "bench", "worker", str(self._root), *self._words]
        try:
            for _ in range(TRIES):
                self._process = subprocess.Popen(command)
                # A wait would hold a lock that `checkpoint`, which interrupts it, needs.
                while (found := self._process.poll()) is None:
                    time.sleep(0.2)
                code = found
                if code >= 0 or code in (-signal.SIGTERM, -signal.SIGUSR2):
                    break
            told_to_end = code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGUSR2)
            if told_to_end and leases.stop_asked(self._root) == stop:
                # Slurm signals all processes, and submitit passes over SIGTERM: what has returned by itself
                # would not be requeued.
                time.sleep(DRAIN)
            return code
        finally:
            self._end()

    def checkpoint(self) -> DelayedSubmission:
        """End the worker, whose leases are free then; called before Slurm requeues it.

        Returns:
            What is submitted in its place.
        """
        self._end()
        return DelayedSubmission(Worker(self._root, self._words))

    def _end(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
            return
        self._process.kill()

"""What jobs cost on the devices at hand, before receipts say it: rehearsals, asked of worker processes."""

import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import replace
from typing import Any

from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.executors.protocol import Pool
from bench.runner.rehearsal import LIMIT, Rehearsal, rehearsals
from bench.suite.jobs import Job

TOTAL = 10.0
"""Seconds that all rehearsals may take, the start of processes aside. Networks with most work come first."""

LATE = 5.0
"""Seconds beyond its limit after which a rehearsal is killed; the first one also waits for its process."""


def rehearse(pool: Pool, jobs: Iterable[Job], estimates: Estimates) -> int:
    """Measure what nobody knows yet of some jobs, on each device of a pool, and tell the estimates.

    Foreign code runs in the workers of the pool alone. A network that fails, or ends its process, is left to
    its own jobs to report.

    Args:
        pool: The slots to ask; none of them is at work.
        jobs: The jobs to do.
        estimates: What is known; learns.

    Returns:
        How many rehearsals were held.
    """
    todo = sorted(jobs, key=estimates.seconds, reverse=True)
    unknown = [job for job in todo if not estimates.rehearsed(job)]
    names = [device_name(device) for device in pool.devices]
    waiting = {name: rehearsals(unknown if estimates.knows(name) else todo) for name in dict.fromkeys(names)}
    running: dict[Future[dict[str, Any]], tuple[int, Rehearsal]] = {}
    # A rehearsal beside others on one device would measure all of them.
    closed = pool.occupancy.closed() if pool.occupancy is not None else ()
    free = [slot for slot in range(len(names)) if slot not in closed]
    held, end = 0, time.monotonic() + TOTAL
    while True:
        for slot in list(free):
            left = end - time.monotonic()
            if waiting[names[slot]] and left > 0:
                question = replace(waiting[names[slot]].pop(0), limit=min(LIMIT, left))
                running[pool.submit(slot, question)] = slot, question
                free.remove(slot)
        if not running:
            return held
        # A process that starts imports torch, which takes longer than most rehearsals.
        wait(running, timeout=LIMIT + LATE + (0 if held else 60), return_when=FIRST_COMPLETED)
        for future in [each for each in running if each.done()] or list(running):
            slot, question = running.pop(future)
            free.append(slot)
            killed = not future.done()
            if killed:
                pool.kill(slot)
            if not killed and future.exception() is None:
                if not held:
                    end = max(end, time.monotonic() + TOTAL - LIMIT)
                held += 1
                estimates.rehearse(question, future.result())
            elif killed or isinstance(future.exception(), BrokenExecutor):
                pool.restart(slot)

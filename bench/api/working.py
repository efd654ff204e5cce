"""Runs that are shared: workers that help, runs in the background, and what all of them do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.api import running
from bench.console import count, duration, say
from bench.errors import InputError
from bench.escaping import shown
from bench.results import leases
from bench.results import request as requests

if TYPE_CHECKING:
    from pathlib import Path

    from bench.api.running import Options, Run

STARTING = 120.0
"""Seconds that a run in the background may take until it works; importing torch may take a minute on NFS."""


def helper(results: Path, options: Options) -> Run:
    """Return a run that helps with what was last asked of a results folder.

    Args:
        results: The results folder.
        options: How jobs are run.

    Returns:
        The run, not yet begun.

    Raises:
        InputError: Nothing was asked of the folder, or the task file or the code is other than the run's.
    """
    request = requests.read(results)
    project = running.planned(
        request.suite, results, options.data_root or request.data_root, worst=request.worst
    )
    if project.plan.suite.digest != request.digest:
        raise InputError(
            f"{request.suite}: it changed since the run in {results} was started; start that run again"
        )
    if other := requests.changed(request.sources, project.manifest["sources"]):
        raise InputError(
            f"{results}: the run there was started with another {other[0]}; use one version everywhere"
        )
    project.store.open()
    trusting = options._replace(
        trust=options.trust or request.trust, data_root=options.data_root or request.data_root
    )
    wanted = None if request.wanted is None else set(request.wanted)
    return running.Run(project, trusting, request.tables, wanted=wanted, record=False, request=request)


def detach(arguments: list[str], results: Path) -> tuple[int | None, Path]:
    """Start a run that outlives this terminal.

    Args:
        arguments: The words of the command line after ``bench``, for the run.
        results: The results folder, which is there.

    Returns:
        The number of its process (None where it has ended, since nothing was to do), and the file that it
        prints to.

    Raises:
        InputError: It ended before it began to work; its last words are in the message.
    """
    folder = results / leases.LOGS
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"run-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 10**6:06}.log"
    before = {each.name for each in leases.workers(results)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + STARTING
    while time.monotonic() < end and process.poll() is None:
        if {each.name for each in leases.workers(results)} - before:
            break
        time.sleep(0.1)
    if process.poll():
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise InputError(f"the run ended with {process.returncode}: {words[-1]} (all of it in {log})")
    return None if process.returncode == 0 else process.pid, log


def stop(results: Path, patience: float) -> list[str]:
    """Ask all workers at a results folder to stop, and wait until they have.

    Args:
        results: The results folder.
        patience: Seconds to wait, 0 or more.

    Returns:
        The workers that have not stopped by then, for people.

    Raises:
        InputError: Nobody is at work there.
    """
    living = [each for each in leases.workers(results) if not each.dead]
    if not living:
        raise InputError(f"{results}: nobody is at work there")
    leases.ask_to_stop(results)
    names, end = {each.name for each in living}, time.monotonic() + patience
    while True:
        left = [each for each in leases.workers(results) if not each.dead and each.name in names]
        if not left or time.monotonic() >= end:
            return [each.shown for each in left]
        time.sleep(0.1)


def status(results: Path) -> dict[str, Any]:
    """Return what is going on at a results folder, for programs.

    Args:
        results: The results folder.

    Returns:
        ``suite`` (None where none was asked), ``workers`` (each with ``name``, ``silent`` in seconds,
        ``dead`` and what it says of itself), ``failed`` (how many jobs failed or lost a process).
    """
    try:
        suite = str(requests.read(results).suite)
    except InputError:
        suite = None
    return {
        "suite": suite,
        "workers": [
            {
                "name": each.name,
                "shown": each.shown,
                "silent": round(each.silent, 1),
                "dead": each.dead,
                **{name: value for name, value in each.said.items() if name != "sources"},
            }
            for each in leases.workers(results)
        ],
        "failed": len(list((results / "failed").glob("*.json"))),
    }


def show_status(console: Any, found: dict[str, Any]) -> None:
    """Print what is going on at a results folder.

    Args:
        console: A `rich.console.Console`.
        found: What `status` returned.
    """
    console.print(status_table(found))
    if found["failed"]:
        say(
            console,
            f"{count(found['failed'], 'job')} failed or lost a process; their histories lie in failed/",
        )


def status_table(found: dict[str, Any]) -> Table:
    """Return a table of what each worker does.

    Args:
        found: What `status` returned.

    Returns:
        A row for each slot of each worker, with the newest estimate of the time left below.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("worker", "device", "job", "since"):
        table.add_column(name, justify="right" if name == "since" else "left")
    for worker in found["workers"]:
        head = Text(shown(worker["shown"]))
        if worker["dead"]:
            table.add_row(head, "", Text("dead; others or the next run do its jobs", style="red"), "")
            continue
        devices, now = worker.get("devices", []), worker.get("now", [])
        for each in now:
            table.add_row(head, each["device"], Text(shown(each["job"])), duration(each["seconds"]))
            head = Text("")
        busy = Counter(each["device"] for each in now)
        for device in (Counter(devices) - busy).elements():
            table.add_row(head, device, Text("idle", style="dim"), "")
            head = Text("")
        if not devices:
            table.add_row(head, "", Text("watches workers elsewhere", style="dim"), "")
        done = f"{worker.get('done', 0)} here, {worker.get('elsewhere', 0)} by others"
        failed = f", {worker['failed']} failed" if worker.get("failed") else ""
        rest = f"{done}{failed} of {count(worker.get('jobs', 0), 'job')}; {worker.get('left', '')}"
        table.add_row("", "", Text(rest, style="dim"), "")
    if not found["workers"]:
        table.add_row("nobody", "", "", "")
    return table


def watch(console: Any, results: Path) -> None:
    """Show what is going on at a results folder every second, until Ctrl-C.

    Args:
        console: A `rich.console.Console`.
        results: The results folder.
    """
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(status_table(status(results)), refresh=True)
            time.sleep(1.0)

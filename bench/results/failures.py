"""The history of jobs that failed, or whose process died: a file for each, in the results folder.

It is shared by all workers at the folder: a job that failed for one of them fails for all, and a job whose
process died is tried again by any of them, a few times in all. A new run tries everything again.
"""

import json
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.results import durable

TRIES = 3
"""How often a job may lose its process before it has failed."""


class Failures:
    """The failures of a results folder, as one run sees them.

    What lay there before the run began does not count, unless it is of the same request.

    Args:
        root: The results folder.
        request: Names what was asked for; workers that serve one request share it.
        worker: The name of this worker.
    """

    def __init__(self, root: Path, request: str, worker: str) -> None:
        self._folder, self._request, self._worker = root / "failed", request, worker
        self._before: dict[str, dict[str, Any]] = {}
        with suppress(OSError):
            for path in self._folder.glob("*.json"):
                found = _read(path)
                if found.get("request") != request:
                    self._before[path.stem] = found

    def final(self, key: str) -> Mapping[str, Any] | None:
        """Return the failure of a job that shall not be tried again.

        Args:
            key: The job's key.

        Returns:
            The record, with ``error``, its ``type`` and ``message``, and ``tries``; None where there is none.
        """
        found = self._now(key)
        return found if found.get("final") else None

    def died(self, key: str, job: Mapping[str, Any], why: str, worker: str | None = None) -> int:
        """Note that a job lost its process.

        Args:
            key: The job's key.
            job: The description of the job.
            why: A sentence.
            worker: The worker that died; None: this one, whose process for the job died.

        Returns:
            How many processes the job has lost by now.
        """
        tries = [*self._tries(key), {"worker": worker or self._worker, "why": why, "when": _when()}]
        self._write(key, {"error": why, "tries": tries, "final": False, "job": job})
        return len(tries)

    def fail(self, key: str, job: Mapping[str, Any], error: BaseException) -> None:
        """Keep the traceback of a job that failed for good.

        Args:
            key: The job's key.
            job: The description of the job.
            error: What it raised.
        """
        record = {
            "error": f"{type(error).__name__}: {error}",
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "tries": self._tries(key),
            "final": True,
            "job": job,
        }
        self._write(key, record)

    def _tries(self, key: str) -> list[dict[str, Any]]:
        tries = self._now(key).get("tries")
        return tries if isinstance(tries, list) else []

    def _now(self, key: str) -> dict[str, Any]:
        """Return the record of a job, empty where it is of an earlier run."""
        found = _read(self._folder / f"{key}.json")
        return {} if found == self._before.get(key) else found

    def _write(self, key: str, record: Mapping[str, Any]) -> None:
        whole = {**record, "worker": self._worker, "request": self._request, "when": _when()}
        path = self._folder / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.drafted(path) as draft:
            draft.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _when() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

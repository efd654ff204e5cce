"""What is kept: a directory per job, complete or absent.

A result is written to a scratch directory beside its place and renamed as the last act. Its receipt
holds the digests of its files, so that one that was cut short or altered is found, and made again.
"""

import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import sources
from bench.errors import DamagedError, InputError

SCHEME = 1
"""Number of the layout of a results folder; a newer one is refused."""

ARTEFACTS = {"train": "weights.safetensors", "craft": "images.safetensors", "evaluate": "outcomes.parquet"}
"""The one file that a job of each kind leaves."""


class Store:
    """The results folder of a suite."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self) -> None:
        """Make the folder, or see that it is one of ours; sweep what dead processes left."""
        mark = self.root / "store.json"
        if mark.is_file():
            try:
                found = json.loads(mark.read_text()).get("scheme")
            except (ValueError, AttributeError):
                found = None
            if not isinstance(found, int):
                raise InputError(f"{mark}: not a results folder of Crossfire; name another with --results")
            if found > SCHEME:
                raise InputError(
                    f"{self.root}: made by a newer Crossfire (layout {found}, this one knows {SCHEME}); "
                    "upgrade, or name another folder with --results"
                )
            if found < SCHEME:
                raise InputError(
                    f"{self.root}: layout {found} is no longer read; name another with --results"
                )
        else:
            self.write_text(mark, json.dumps({"scheme": SCHEME}) + "\n")
        self._sweep()

    def folder(self, kind: str, key: str) -> Path:
        """Return where a job's result lies, or would."""
        return self.root / kind / key

    def artefact(self, kind: str, key: str) -> Path:
        """Return a job's file; raise `DamagedError` where it is not what its receipt says."""
        if (reason := self.damage(kind, key)) is not None:
            raise DamagedError(f"{kind} {key}: {reason}")
        return self.folder(kind, key) / ARTEFACTS[kind]

    def receipt(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return a job's receipt, None where there is no result."""
        try:
            receipt = json.loads((self.folder(kind, key) / "receipt.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError):
            return {}
        return receipt if isinstance(receipt, dict) else {}

    def damage(self, kind: str, key: str) -> str | None:
        """Return what is wrong with a stored result, None if it is whole."""
        receipt = self.receipt(kind, key)
        if receipt is None:
            return "absent"
        files = receipt.get("files")
        if not isinstance(files, dict) or ARTEFACTS[kind] not in files:
            return "its receipt is cut short or altered"
        for name, digest in files.items():
            path = self.folder(kind, key) / name
            if not path.is_file():
                return f"{name} is missing"
            if sources.file_digest(path) != digest:
                return f"{name} is cut short or altered"
        return None

    def keep(
        self,
        kind: str,
        key: str,
        job: Mapping[str, Any],
        receipt: Mapping[str, Any],
        write: Callable[[Path], None],
    ) -> None:
        """Store a result: `write` makes the artefact; then all of it appears at once."""
        with self._scratch(kind, key) as scratch:
            write(scratch / ARTEFACTS[kind])
            self.write_text(scratch / "job.json", json.dumps(job, indent=1) + "\n")
            files = {each.name: sources.file_digest(each) for each in sorted(scratch.iterdir())}
            self.write_text(
                scratch / "receipt.json", json.dumps({**receipt, "files": files}, indent=1) + "\n"
            )
            place = self.folder(kind, key)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                scratch.rename(place)
            except OSError:
                # Another process was first: its equal result stays.
                if self.damage(kind, key) is not None:
                    raise
        self.failure_file(key).unlink(missing_ok=True)
        shutil.rmtree(self.partial(key), ignore_errors=True)

    def discard(self, kind: str, key: str) -> None:
        """Take a result away, at once as seen from outside."""
        place = self.folder(kind, key)
        if place.exists():
            with self._scratch(kind, key) as scratch:
                place.rename(scratch / "discarded")

    def partial(self, key: str) -> Path:
        """Return the folder where a training keeps its last epoch."""
        return self.root / "partial" / key

    def failure_file(self, key: str) -> Path:
        """Return where the traceback of a failed job lies."""
        return self.root / "failed" / f"{key}.json"

    def fail(self, kind: str, key: str, job: Mapping[str, Any], error: BaseException) -> None:
        """Keep the traceback of a job that failed."""
        record = {
            "kind": kind,
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "job": job,
        }
        self.write_text(self.failure_file(key), json.dumps(record, indent=1) + "\n")

    @staticmethod
    def write_text(path: Path, text: str) -> None:
        """Write a small file so that it is never seen half written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _scratch(self, kind: str, key: str) -> Iterator[Path]:
        home = self.root / "scratch"
        home.mkdir(parents=True, exist_ok=True)
        scratch = Path(
            tempfile.mkdtemp(prefix=f"{kind}-{key[:8]}@{socket.gethostname()}@{os.getpid()}@", dir=home)
        )
        scratch.chmod(0o755)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove scratch directories whose process, on this machine, is gone."""
        for place in (self.root / "scratch").glob("*@*@*@*"):
            _, host, pid, _ = place.name.rsplit("@", 3)
            if host == socket.gethostname() and not _alive(int(pid)):
                shutil.rmtree(place, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""What is kept: a directory per job, complete or absent.

A result is written to a scratch directory beside its place and renamed as the last act. Its receipt
holds the digests of its files and its own, and is bound to its job: one that was cut short, altered or
put in another's place is found, and made again.
"""

import hashlib
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from bench import durable, sources
from bench.errors import DamagedError, InputError

SCHEME = 1
"""Number of the layout of a results folder; a newer one is refused."""

ARTEFACTS = {"train": "weights.safetensors", "craft": "images.safetensors", "evaluate": "outcomes.parquet"}
"""The one file that a job of each kind leaves."""

NEEDED = {"train": ("answers", "as_built"), "craft": (), "evaluate": ()}
"""What a receipt must hold beside its files, so that the result can be used."""

ABSENT = "absent"
"""What is wrong with a result that nothing is there of."""

FOLDERS = (*ARTEFACTS, "scratch", "partial", "failed", "tables")
"""What a results folder has below it."""


class Store:
    """The results folder of a suite."""

    def __init__(self, root: Path) -> None:
        self.shown = root
        """The folder as it was named, for messages."""
        # User code may change the working directory.
        self.root = Path(os.path.abspath(root))

    def open(self) -> list[str]:
        """Make the folder, or see that it is one of ours; sweep what dead processes left.

        Returns a sentence for each thing that lay where a folder or a file of ours belongs, and was moved.
        """
        mark, aside = self.root / "store.json", []
        if os.path.lexists(mark):
            try:
                found = json.loads(mark.read_text(encoding="utf-8")).get("scheme")
            except (ValueError, AttributeError, RecursionError, OSError):
                found = None
            if not isinstance(found, int):
                if not any((self.root / kind).is_dir() for kind in ARTEFACTS):
                    raise InputError(
                        f"{mark}: not a results folder of Crossfire; name another with --results"
                    )
                # Results lie beside it, and each says for itself whether it is whole.
                self.write_text(mark, json.dumps({"scheme": SCHEME}) + "\n")
                aside, found = [f"{mark} was damaged, and is written anew"], SCHEME
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
        aside += self._aside()
        self._sweep()
        return aside

    def folder(self, kind: str, key: str) -> Path:
        """Return where a job's result lies, or would."""
        return self.root / kind / key

    def artefact(self, kind: str, key: str) -> Path:
        """Return a job's file; raise `DamagedError` where it is not what its receipt says."""
        if (reason := self.damage(kind, key)) is not None:
            raise DamagedError(f"{kind} {key}: {reason}")
        return self.folder(kind, key) / ARTEFACTS[kind]

    def receipt(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return a job's receipt: None where nothing is there, empty where it is none or another job's."""
        place = self.folder(kind, key)
        if not os.path.lexists(place):
            return None
        receipt = _plain(place / "receipt.json")
        return receipt if receipt is not None and _sound(receipt, kind, key) else {}

    def damage(self, kind: str, key: str, *, read: bool = True) -> str | None:
        """Return what is wrong with a stored result, None if it is whole; its files are read unless told."""
        receipt, place = self.receipt(kind, key), self.folder(kind, key)
        if receipt is None:
            return ABSENT
        if not place.is_dir():
            return "what lies in its place is no folder"
        job = _plain(place / "job.json")
        if job is not None and (job.get("kind", kind), job.get("key", key)) != (kind, key):
            return "what lies in its place is the result of another job"
        if not receipt:
            there = os.path.isfile(place / "receipt.json")
            return f"its receipt is {'cut short or altered' if there else 'missing'}"
        if lacking := [name for name in NEEDED[kind] if name not in receipt]:
            return f"its receipt has no {lacking[0]!r}: it is of an older version"
        for name, digest in receipt["files"].items():
            path = place / name
            if not os.path.isfile(path):
                return f"{name} is missing"
            try:
                if read and sources.file_digest(path) != digest:
                    return f"{name} is cut short or altered"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
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
            artefact, described = scratch / ARTEFACTS[kind], scratch / "job.json"
            described.write_text(
                json.dumps({"kind": kind, "key": key, **job}, indent=1) + "\n", encoding="utf-8"
            )
            write(artefact)
            # Libraries write for the user alone; others may read as the umask says.
            shutil.copymode(described, artefact)
            files = {each.name: sources.file_digest(each) for each in (artefact, described)}
            sealed = seal({**receipt, "files": files}, kind, key)
            (scratch / "receipt.json").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
            durable.flush([*scratch.iterdir(), scratch])
            self._put(scratch, kind, key)
        durable.remove(self.failure_file(key))
        durable.remove(self.partial(key))

    def discard(self, kind: str, key: str) -> None:
        """Take away whatever lies in a result's place, at once as seen from outside."""
        place = self.folder(kind, key)
        if not os.path.lexists(place):
            return
        with self._scratch(kind, key) as scratch:
            try:
                place.rename(scratch / "discarded")
            except OSError:
                # Of another disk, or of a folder that may not be written.
                aside = place.with_name(f".draft{durable.mark()}")
                with suppress(OSError):
                    place.rename(aside)
                durable.remove(aside)

    def partial(self, key: str) -> Path:
        """Return the folder where a training keeps its last epochs."""
        return self.root / "partial" / key

    def begun(self, key: str) -> bool:
        """Return whether a training that is not done has kept an epoch."""
        return any(self.partial(key).glob("epoch*.safetensors"))

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
        with durable.drafted(path) as draft:
            draft.write_text(text, encoding="utf-8")

    @contextmanager
    def _scratch(self, kind: str, key: str) -> Iterator[Path]:
        scratch = self.root / "scratch" / f"{kind}-{key[:8]}{durable.mark()}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            durable.remove(scratch)

    def _put(self, scratch: Path, kind: str, key: str) -> None:
        """Move a whole result to its place, and what else lies there away."""
        place = self.folder(kind, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, False, True):
            try:
                durable.move(scratch, place)
                break
            except OSError:
                reason = self.damage(kind, key)
                if reason is None:
                    # Another process was first: its equal result stays.
                    return
                if last or reason == ABSENT:
                    raise
                self.discard(kind, key)
        durable.flush([place.parent])

    def _aside(self) -> Iterator[str]:
        """Move what is no folder or no file, where ours must be one, to another name."""
        wrong = [path for name in FOLDERS if os.path.lexists(path := self.root / name) and not path.is_dir()]
        if (manifest := self.root / "manifest.json").is_dir():
            wrong.append(manifest)
        for path in wrong:
            other = path.with_name(f"{path.name}.aside-{durable.mark()[-6:]}")
            path.rename(other)
            yield f"{path}: what lay there is not of Crossfire; it is {other.name} now"

    def _sweep(self) -> None:
        """Remove drafts whose process is gone, and last epochs of trainings that are done."""
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            durable.sweep(folder)
        with suppress(OSError):
            for partial in list((self.root / "partial").iterdir()):
                durable.sweep(partial)
                if (self.folder("train", partial.name) / "receipt.json").is_file():
                    durable.remove(partial)


def _plain(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's mapping, None of anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def seal(told: Mapping[str, Any], *bound: str) -> dict[str, Any]:
    """Return a JSON mapping with its own digest, which is bound to further words: what it is about.

    Digests of sources stay out of it: one that was altered is not today's, and is found by that.
    """
    content = {name: value for name, value in json.loads(json.dumps(told)).items() if name != "digest"}
    covered = {name: value for name, value in content.items() if name != "sources"}
    spelled = json.dumps([*bound, covered], sort_keys=True)
    return {**content, "digest": hashlib.sha256(spelled.encode()).hexdigest()}


def _sound(receipt: Mapping[str, Any], kind: str, key: str) -> bool:
    """Return whether a receipt is of this job and unaltered; one of an older version has no digest."""
    if not texts(receipt.get("sources", {})):
        return False
    if "digest" in receipt:
        return receipt == seal(receipt, kind, key)
    files, crafting = receipt.get("files"), receipt.get("crafting", {})
    seconds = [each.get("seconds", 0.0) for each in (receipt, crafting) if isinstance(each, dict)]
    return (
        texts(files)
        and files.keys() == {ARTEFACTS[kind], "job.json"}
        and texts(receipt.get("inputs", {}))
        and isinstance(crafting, dict)
        and all(isinstance(each, int | float) and math.isfinite(each) and each >= 0 for each in seconds)
        and isinstance(devices := crafting.get("devices", []), list)
        and all(isinstance(each, str) for each in devices)
    )


def texts(found: object) -> TypeGuard[dict[str, str]]:
    """Return whether this is a mapping of texts to texts, as JSON has it."""
    return isinstance(found, dict) and all(isinstance(each, str) for each in found.values())

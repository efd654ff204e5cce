"""The results folder of a suite: one folder for each job, complete or absent.

A result is written to a scratch folder and renamed to its place as the last act. Its receipt holds the
digests of its files and of itself, and is bound to its job. A result that was cut short, altered or moved to
another place is found by that, and is made again.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from bench.errors import DamagedError, InputError
from bench.results import durable, fingerprint, index, pack
from bench.results.leases import LEASES, WORKERS, sweep
from bench.results.outcomes import Stored
from bench.results.pack import Pack
from bench.results.seals import seal

SCHEME = 2
"""Number of the layout of a results folder. A folder with a newer one is refused."""

ARTEFACTS = {
    "train": "weights.safetensors",
    "craft": "images.safetensors",
    "evaluate": "outcomes.parquet",
    "trial": "findings.json",
    "examination": "findings.json",
}
"""The one file that a job leaves beside its description and its receipt, by kind."""

NEEDED = {
    "train": ("answers", "as_built"),
    "craft": (),
    "evaluate": (),
    "trial": ("found",),
    "examination": ("found",),
}
"""Entries of a receipt without which its result cannot be used, by kind."""

ABSENT = "absent"
"""The reason why a result does not count where there is none."""

FOLDERS = (*ARTEFACTS, "scratch", "partial", "failed", "tables", LEASES, WORKERS)
"""The folders of a results folder."""


class Store:
    """The results folder of a suite.

    An evaluation that has no folder of its own may be packed (`bench.results.pack`), and is read from there.

    Args:
        root: The folder; it need not exist.
        reads: By key of an evaluation, columns of its outcomes without which it does not count where it is
            packed: other packed ones count whatever was left out of them.
    """

    def __init__(self, root: Path, reads: Mapping[str, Collection[str]] | None = None) -> None:
        self.reads = reads or {}
        self.reading = False
        """Whether the folder is only looked at: nothing is written there, not even what was found."""
        self.shown = root
        """The folder as the user named it, for messages."""
        # The code of a job may change the working directory.
        self.root = Path(os.path.abspath(root))

    def open(self) -> list[str]:
        """Create the folder, or check that it belongs to Crossfire; remove what dead processes left.

        Returns:
            A sentence for each file or folder that lay in the place of one of ours and was moved, and for
            each damaged file of packed evaluations.

        Raises:
            InputError: The folder is not one of Crossfire, or has a layout that this version does not read.
        """
        mark, aside = self.root / "store.json", []
        if not self._marked(mark):
            if os.path.lexists(mark):
                # The results beside it are complete or not by their own receipts.
                aside = [f"{mark} was damaged, and is written anew"]
            self.write_text(mark, json.dumps({"scheme": SCHEME}) + "\n")
        aside += self._aside()
        self._sweep()
        return aside + self.faults()

    def look(self) -> list[str]:
        """Check that the folder, if it is there, belongs to Crossfire; from now on nothing is written there.

        Returns:
            A sentence for each damaged file of packed evaluations.

        Raises:
            InputError: The folder is not one of Crossfire, or has a layout that this version does not read.
        """
        self.reading = True
        if not self.root.exists():
            return []
        self._marked(self.root / "store.json")
        return self.faults()

    def _marked(self, mark: Path) -> bool:
        """Return whether the mark of the folder is whole; raise where the folder is none of ours."""
        packed = pack.opened(self.root)
        # A pack may be all that a clone has.
        check_layout(self.root, packed.scheme or SCHEME)
        found = None
        if os.path.lexists(mark):
            try:
                found = json.loads(mark.read_text(encoding="utf-8")).get("scheme")
            except (ValueError, AttributeError, RecursionError, OSError):
                found = None
            ours = packed.keys or any((self.root / kind).is_dir() for kind in ARTEFACTS)
            if not isinstance(found, int) and not ours:
                raise InputError(f"{mark}: not a results folder of Crossfire; name another with --results")
        if not isinstance(found, int):
            self._check_manifest()
            return False
        check_layout(self.root, found)
        return True

    def faults(self) -> list[str]:
        """Return what is wrong with the files of packed evaluations as a whole.

        Returns:
            A sentence for each file; `damage` says which evaluations are concerned.
        """
        return [
            f"{self.shown}: {fault}; what is whole of it counts, and bench pack {self.shown} writes it anew"
            for fault in pack.opened(self.root).faults()
        ]

    def folder(self, kind: str, key: str) -> Path:
        """Return the folder of a result, whether it exists or not.

        Args:
            kind: Kind of the job: ``train``, ``craft`` or ``evaluate``.
            key: Key of the job.

        Returns:
            The path.
        """
        return self.root / kind / key

    def artefact(self, kind: str, key: str) -> Path:
        """Return the file of a result, after a check of the whole result.

        Args:
            kind: Kind of the job.
            key: Key of the job.

        Returns:
            The path of an existing file.

        Raises:
            DamagedError: The result is absent, or differs from its receipt.
        """
        if (reason := self.damage(kind, key)) is not None:
            raise DamagedError(f"{kind} {key}: {reason}")
        if self._packed(kind, key) is not None:
            raise DamagedError(f"{kind} {key}: it is packed, and has no file of its own")
        return self.folder(kind, key) / ARTEFACTS[kind]

    def outcomes(self, key: str) -> Stored:
        """Return the outcomes of an evaluation that is whole.

        Args:
            key: Key of the evaluation.

        Returns:
            Its columns; where it is packed, without those that were left out.

        Raises:
            OSError: They cannot be read.
            ValueError: The same, as pyarrow says it.
        """
        if (packed := self._packed("evaluate", key)) is not None:
            return packed.outcomes(key)
        return Stored.of(self.folder("evaluate", key) / ARTEFACTS["evaluate"])

    def job(self, kind: str, key: str) -> dict[str, Any]:
        """Return the description of a job whose result is whole.

        Args:
            kind: Kind of the job.
            key: Key of the job.

        Returns:
            The content of its `job.json`.

        Raises:
            OSError: It cannot be read.
        """
        if (packed := self._packed(kind, key)) is not None:
            return packed.job(key)
        described: dict[str, Any] = json.loads(
            (self.folder(kind, key) / "job.json").read_text(encoding="utf-8")
        )
        return described

    def receipt(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the receipt of a result.

        Args:
            kind: Kind of the job.
            key: Key of the job.

        Returns:
            The receipt; None where there is no result; an empty mapping where the receipt is missing, altered
            or of another job.
        """
        if (packed := self._packed(kind, key)) is not None:
            return packed.receipt(key)
        place = self.folder(kind, key)
        if not os.path.lexists(place):
            return None
        receipt = _plain(place / "receipt.json")
        return receipt if receipt is not None and _sound(receipt, kind, key) else {}

    def damage(self, kind: str, key: str, *, read: bool = True) -> str | None:
        """Return what is wrong with a stored result.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            read: Whether the files are read and compared with their digests; otherwise only their presence
                counts.

        Returns:
            The reason why the result does not count (`ABSENT` where there is none); None for a whole result.
        """
        if (packed := self._packed(kind, key)) is not None:
            if (reason := packed.damage(key, read=read)) is not None:
                return reason
            lacking = sorted(set(packed.left_out(key)).intersection(self.reads.get(key, ())))
            return f"its {lacking[0]} were left out of the pack, and a table reads them" if lacking else None
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
            if read and (reason := _altered(path, digest)) is not None:
                if index.vouched(self.root, kind, key):
                    # What tells files from others has failed here, as on a failing disk.
                    index.distrust(self.root)
                return reason
        return None

    def keep(
        self,
        kind: str,
        key: str,
        job: Mapping[str, Any],
        receipt: Mapping[str, Any],
        write: Callable[[Path], None],
    ) -> None:
        """Store a result: its files are written to a scratch folder, which then appears in its place at once.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            job: Description of the job, written to ``job.json``.
            receipt: Entries of the receipt besides the digests.
            write: Writes the artefact to the path that it is given.
        """
        with self._scratch(kind, key) as scratch:
            artefact, described = scratch / ARTEFACTS[kind], scratch / "job.json"
            described.write_text(
                json.dumps({"kind": kind, "key": key, **job}, indent=1) + "\n", encoding="utf-8"
            )
            write(artefact)
            # Libraries make files that only their owner may read; the umask shall decide.
            shutil.copymode(described, artefact)
            files = {each.name: fingerprint.file_digest(each) for each in (artefact, described)}
            sealed = seal({**receipt, "files": files}, kind, key)
            (scratch / "receipt.json").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
            durable.flush([*scratch.iterdir(), scratch])
            self._put(scratch, kind, key)
        durable.remove(self.failure_file(key))
        durable.remove(self.partial(key))

    def adopt(self, kind: str, key: str, write: Callable[[Path], None]) -> None:
        """Store a result that was made elsewhere, with its own receipt.

        Args:
            kind: Kind of the job.
            key: Key of the job.
            write: Writes the files of the result into the folder that it is given.

        Raises:
            DamagedError: The files differ from their receipt, or are of another job.
        """
        with self._scratch(kind, key) as scratch:
            write(scratch)
            durable.flush([*scratch.iterdir(), scratch])
            self._put(scratch, kind, key)
        if (reason := self.damage(kind, key)) is not None:
            self.clear(kind, key)
            raise DamagedError(f"{kind} {key}: it arrived damaged: {reason}")

    def discard(self, kind: str, key: str) -> None:
        """Remove a result, also a packed one; seen from outside it disappears at once.

        Args:
            kind: Kind of the job.
            key: Key of the job.
        """
        if kind in pack.KINDS:
            pack.drop(self.root, key)
        self.clear(kind, key)

    def clear(self, kind: str, key: str) -> None:
        """Remove the folder of a result; seen from outside it disappears at once.

        Args:
            kind: Kind of the job.
            key: Key of the job.
        """
        place = self.folder(kind, key)
        if not os.path.lexists(place):
            return
        with self._scratch(kind, key) as scratch:
            try:
                place.rename(scratch / "discarded")
            except OSError:
                # The scratch folder is on another disk, or may not be written.
                aside = place.with_name(f".draft{durable.mark()}")
                with suppress(OSError):
                    place.rename(aside)
                durable.remove(aside)

    def partial(self, key: str) -> Path:
        """Return the folder in which a training keeps its last epochs.

        Args:
            key: Key of the training.

        Returns:
            The path, whether it exists or not.
        """
        return self.root / "partial" / key

    def begun(self, key: str) -> bool:
        """Return whether a training that is not done has kept an epoch.

        Args:
            key: Key of the training.

        Returns:
            True where it can be resumed.
        """
        return any(self.partial(key).glob("epoch*.safetensors"))

    def failure_file(self, key: str) -> Path:
        """Return the file of the history of a failed job (`bench.results.failures`).

        Args:
            key: Key of the job.

        Returns:
            The path, whether it exists or not.
        """
        return self.root / "failed" / f"{key}.json"

    @staticmethod
    def write_text(path: Path, text: str | Iterable[str]) -> None:
        """Write a file so that no reader ever sees a part of it.

        Args:
            path: The file; its folder is created if necessary.
            text: The content, whole or in pieces.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.drafted(path) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)

    def _check_manifest(self) -> None:
        """Refuse another layout by the manifest: a folder that was committed may have no mark."""
        scheme = (_plain(self.root / "manifest.json") or {}).get("scheme")
        if isinstance(scheme, int):
            check_layout(self.root, scheme)

    def _packed(self, kind: str, key: str) -> Pack | None:
        """Return the pack if it has a result that has no folder of its own."""
        if kind not in pack.KINDS or os.path.lexists(self.folder(kind, key)):
            return None
        packed = pack.opened(self.root)
        return packed if key in packed else None

    @contextmanager
    def _scratch(self, kind: str, key: str) -> Iterator[Path]:
        scratch = self.root / "scratch" / f"{kind}-{key[:8]}{durable.mark()}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            durable.remove(scratch)

    def _put(self, scratch: Path, kind: str, key: str) -> None:
        """Move a whole result to its place, and whatever else lies there out of the way."""
        place = self.folder(kind, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, False, True):
            try:
                durable.move(scratch, place)
                break
            except OSError:
                reason = self.damage(kind, key)
                if reason is None:
                    # Another process was faster, and its result is equal.
                    return
                if last or reason == ABSENT:
                    raise
                self.clear(kind, key)
        durable.flush([place.parent])

    def _aside(self) -> Iterator[str]:
        """Rename what is no folder, or no file, in the place of one of ours; yield a sentence for each."""
        wrong = [path for name in FOLDERS if os.path.lexists(path := self.root / name) and not path.is_dir()]
        if (manifest := self.root / "manifest.json").is_dir():
            wrong.append(manifest)
        for path in wrong:
            other = path.with_name(f"{path.name}.aside-{durable.mark()[-6:]}")
            path.rename(other)
            yield f"{path}: what lay there is not of Crossfire; it is {other.name} now"

    def _sweep(self) -> None:
        """Remove what dead processes left: drafts, and leases and kept epochs of what is done."""
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            durable.sweep(folder)
        with suppress(OSError):
            for partial in list((self.root / "partial").iterdir()):
                durable.sweep(partial)
                if (self.folder("train", partial.name) / "receipt.json").is_file():
                    durable.remove(partial)
        sweep(
            self.root,
            lambda key: any((self.folder(kind, key) / "receipt.json").is_file() for kind in ARTEFACTS),
        )


def check_layout(place: Path, scheme: int) -> None:
    """Refuse a layout that this version does not read.

    Args:
        place: The results folder or a file in it, for the message.
        scheme: The number of its layout.

    Raises:
        InputError: The layout is older or newer than `SCHEME`.
    """
    if scheme > SCHEME:
        raise InputError(
            f"{place}: made by a newer Crossfire (layout {scheme}, this one knows {SCHEME}); "
            "upgrade, or name another folder with --results"
        )
    if scheme < SCHEME:
        raise InputError(
            f"{place}: layout {scheme} is no longer read, whose files use other words; "
            "name another folder with --results"
        )


def _altered(path: Path, digest: str) -> str | None:
    """Return how a file differs from its digest, None where it does not."""
    try:
        same = fingerprint.file_digest(path) == digest
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if same else f"{path.name} is cut short or altered"


def _plain(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, None for any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _sound(receipt: Mapping[str, Any], kind: str, key: str) -> bool:
    """Return whether a receipt is unaltered and of this job; receipts of older versions have no digest."""
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
    """Return whether a value is a mapping of texts to texts.

    Args:
        found: A value as JSON has it.

    Returns:
        True for such a mapping.
    """
    return isinstance(found, dict) and all(isinstance(each, str) for each in found.values())

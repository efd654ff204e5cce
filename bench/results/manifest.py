"""What a plan leaves for reports: the manifest of a suite, and the outcomes that its conditions name."""

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.results import fingerprint
from bench.results.conditions import COORDINATES, FACTS
from bench.results.outcomes import Frame
from bench.results.seals import seal, sealed_text
from bench.results.store import ABSENT, ARTEFACTS, Store, check_layout, texts

_KINDS = {
    **dict.fromkeys(("suite", "file", "suite_digest"), str),
    **dict.fromkeys(("sources", "files", "tables", "data", "defenses", "attacks"), dict),
    **dict.fromkeys(("conditions", "skips"), list),
}


ADDED = "added.yaml"
"""The file in a results folder of what `bench doctor --fix` added to the suite."""


def write(store: Store, manifest: dict[str, Any]) -> None:
    """Write the manifest of a suite, sealed by its digest.

    Args:
        store: The results folder.
        manifest: What the plan of the suite says (`Plan.manifest`).
    """
    store.write_text(store.root / "manifest.json", chain(sealed_text(manifest), "\n"))


def read(root: Path, suite: Path) -> dict[str, Any]:
    """Return the manifest of a results folder.

    Args:
        root: The results folder.
        suite: The task file, for the command that messages name.

    Returns:
        The manifest, as JSON has it.

    Raises:
        InputError: There is none, it was altered, or another version of Crossfire made it.
    """
    path = root / "manifest.json"
    if root.is_file():
        raise InputError(f"{root}: expected a results folder, found a file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"nothing was run in {root} yet; first: bench run {suite}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it anew: bench run {suite}") from None
    scheme = manifest.get("scheme") if isinstance(manifest, dict) else None
    if not isinstance(scheme, int):
        raise InputError(f"{path}: not a manifest of Crossfire; write it anew: bench run {suite}")
    check_layout(path, scheme)
    if not _whole(manifest) or ("digest" in manifest and manifest != seal(manifest)):
        raise InputError(f"{path}: altered, or not whole; write it anew: bench run {suite}")
    return dict(manifest)


def _whole(manifest: dict[str, Any]) -> bool:
    """Return whether everything is there; a manifest of an older version has no digest that would tell."""

    def has(each: Any, name: str, known: Collection[str]) -> bool:
        return isinstance(each, dict) and isinstance(each.get(name), dict) and each[name].keys() >= set(known)

    return (
        all(isinstance(manifest.get(name), kind) for name, kind in _KINDS.items())
        and texts(manifest["sources"])
        and texts(manifest["files"])
        and all(
            has(each, "coordinates", COORDINATES) and has(each, "facts", FACTS) and "job" in each
            for each in manifest["conditions"]
        )
        and all(has(each, "coordinates", COORDINATES) and "reason" in each for each in manifest["skips"])
    )


def digest_of(path: Path) -> str | None:
    """Return the sha256 of a file; None where there is none.

    Args:
        path: The file.
    """
    return fingerprint.file_digest(path) if path.is_file() else None


def stale(manifest: dict[str, Any], suite: Path, root: Path) -> list[str]:
    """Return a sentence for each way in which a manifest is older than the files that it was made from.

    Args:
        manifest: The manifest of a results folder.
        suite: The task file.
        root: The results folder.

    Returns:
        The sentences; none where the manifest is up to date.
    """
    found, added = [], root / ADDED
    if "digest" not in manifest:
        found.append(f"the manifest has no digest that would tell damage; write it anew: bench run {suite}")
    if suite.is_file() and digest_of(suite) != manifest["suite_digest"]:
        found.append(f"{suite} changed since this was planned; bring it up to date with: bench run {suite}")
    # Manifests of older versions do not say.
    if manifest.get("added", digest_of(added)) != digest_of(added):
        found.append(f"{added} changed since this was planned; bring it up to date with: bench run {suite}")
    folder = suite.resolve().parent
    fingerprint.importable(folder)
    now = _digests(manifest["sources"])
    changed = [name for name, digest in manifest["sources"].items() if now.get(name) != digest]
    for name, digest in manifest["files"].items():
        path = folder / Path(name).expanduser()
        if not path.is_file() or fingerprint.file_digest(path) != digest:
            changed.append(name)
    return found + ([aged(changed, suite)] if changed else [])


def _digests(modules: Iterable[str]) -> dict[str, str]:
    """Return the digest of each module's code; one that is no Python any more has none, and is another."""
    found: dict[str, str] = {}
    for name in modules:
        with contextlib.suppress(InputError):
            found |= fingerprint.digests([name])
    return found


def aged(names: Iterable[str], suite: Path) -> str:
    """Return the sentence for results that were made by other code than today's.

    Args:
        names: The modules and files that changed.
        suite: The task file.

    Returns:
        One sentence with the command that brings the results up to date.
    """
    return f"{', '.join(sorted(names))} changed since; bring the numbers up to date with: bench run {suite}"


class Outcomes:
    """Gives the outcomes of an evaluation by its key, None where there are none.

    Args:
        root: The results folder.
        reads: By key of an evaluation, the columns that are read beside those that every table reads
            (`columns_read`): a packed one without them reads as missing.
    """

    def __init__(self, root: Path, reads: Mapping[str, Collection[str]] | None = None) -> None:
        self._store = Store(root, reads)
        self._now: dict[str, str] = {}
        self.changed: set[str] = set()
        """Modules whose code is not what it was when the outcomes that were asked for were made."""
        self.damaged: dict[str, str] = {}
        """Evaluations that were asked for and are damaged: what is wrong with each, by its key."""
        self.damaged_checks: dict[str, str] = {}
        """What is wrong with trials and examinations that were asked for and are damaged, by their keys."""
        self.faults = self._store.faults()
        """What is wrong with the files of packed evaluations as a whole."""

    @cache  # noqa: B019 - lives as long as a report
    def __call__(self, key: str) -> Frame | None:
        """Return the outcomes of an evaluation; a damaged one reads as missing, until it is run again.

        Args:
            key: The key of the evaluation.

        Returns:
            The outcomes, or None.
        """
        reason = self._store.damage("evaluate", key)
        if reason is None:
            try:
                rows = self._store.outcomes(key)
            except (OSError, ValueError) as error:
                # pyarrow's own errors are ValueErrors; the file may be gone since it was looked at.
                reason = f"{ARTEFACTS['evaluate']} cannot be read ({error})"
        if reason is not None:
            if reason != ABSENT:
                self.damaged[key] = reason
            return None
        self._note_age(self._store.receipt("evaluate", key))
        return rows

    @cache  # noqa: B019 - lives as long as a report
    def found(self, kind: str, key: str) -> Mapping[str, Any] | None:
        """Return what a trial of an attack, an examination of a defense or the referee of images has found.

        Args:
            kind: ``trial``, ``examination`` or ``evaluate``.
            key: The key of the job.

        Returns:
            What its receipt says (`bench.runner.examine`; of an evaluation `invalid` and `crafting`, see
            `bench.runner.evaluate`); None where it was not made, or is damaged.
        """
        if (reason := self._store.damage(kind, key)) is not None:
            if reason != ABSENT:
                self.damaged_checks[key] = f"{kind} {key}: {reason}"
            return None
        receipt = self._store.receipt(kind, key)
        self._note_age(receipt)
        if receipt is None or kind != "evaluate":
            return None if receipt is None else receipt.get("found")
        return {**receipt.get("found", {}), "crafting": receipt.get("crafting")}

    def _note_age(self, receipt: Mapping[str, Any] | None) -> None:
        """Note which modules have other code now than when a result was made."""
        made_by = (receipt or {}).get("sources", {})
        self._now |= _digests(set(made_by) - set(self._now))
        self.changed |= {name for name, digest in made_by.items() if self._now.get(name) != digest}

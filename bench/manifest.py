"""What a plan leaves for reports: the manifest of a suite, and the outcomes that its cells name."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from bench import sources
from bench.errors import InputError
from bench.layout import COORDINATES
from bench.outcomes import Frame, Stored
from bench.store import ABSENT, ARTEFACTS, SCHEME, Store, seal, texts

_KINDS = {
    **dict.fromkeys(("suite", "file", "suite_digest"), str),
    **dict.fromkeys(("sources", "files", "tables", "data", "defenses", "attacks"), dict),
    **dict.fromkeys(("cells", "skips"), list),
}


def write(store: Store, manifest: dict[str, Any]) -> None:
    """Store a suite's manifest, with its digest."""
    store.write_text(store.root / "manifest.json", json.dumps(seal(manifest), indent=1) + "\n")


def read(root: Path, suite: Path) -> dict[str, Any]:
    """Return the manifest of a results folder."""
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; nothing was run or planned there: bench run {suite}"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it anew: bench plan {suite}") from None
    scheme = manifest.get("scheme") if isinstance(manifest, dict) else None
    if not isinstance(scheme, int):
        raise InputError(f"{path}: not a manifest of Crossfire; write it anew: bench plan {suite}")
    if scheme > SCHEME:
        raise InputError(
            f"{path}: made by a newer Crossfire (scheme {scheme}, this one knows {SCHEME}); upgrade"
        )
    if not _whole(manifest) or ("digest" in manifest and manifest != seal(manifest)):
        raise InputError(f"{path}: altered, or not whole; write it anew: bench plan {suite}")
    return dict(manifest)


def _whole(manifest: dict[str, Any]) -> bool:
    """Return whether everything is there; one of an older version has no digest that would tell."""
    of_cells = {*COORDINATES, "job", "use", "access", "budget", "source", "final", "n", "doubts"}
    return (
        all(isinstance(manifest.get(name), kind) for name, kind in _KINDS.items())
        and texts(manifest["sources"])
        and texts(manifest["files"])
        and all(isinstance(each, dict) and of_cells <= each.keys() for each in manifest["cells"])
        and all(isinstance(each, dict) and "reason" in each for each in manifest["skips"])
    )


def stale(manifest: dict[str, Any], suite: Path) -> list[str]:
    """Return a sentence for each way in which the plan behind a report is not of today's files."""
    found = []
    if "digest" not in manifest:
        found.append(f"the manifest has no digest that would tell damage; write it anew: bench plan {suite}")
    if suite.is_file() and hashlib.sha256(suite.read_bytes()).hexdigest() != manifest["suite_digest"]:
        found.append(f"{suite} changed since this was planned; bring it up to date with: bench run {suite}")
    folder = suite.resolve().parent
    sources.importable(folder)
    now = _digests(manifest["sources"])
    changed = [name for name, digest in manifest["sources"].items() if now.get(name) != digest]
    for name, digest in manifest["files"].items():
        path = folder / Path(name).expanduser()
        if not path.is_file() or sources.file_digest(path) != digest:
            changed.append(name)
    return found + ([aged(changed, suite)] if changed else [])


def _digests(modules: Iterable[str]) -> dict[str, str]:
    """Return the digest of each module's code; one that is no Python any more has none, and is another."""
    found: dict[str, str] = {}
    for name in modules:
        with contextlib.suppress(InputError):
            found |= sources.digests([name])
    return found


def aged(names: Iterable[str], suite: Path) -> str:
    """Return the sentence for results that were made by other code than today's."""
    return f"{', '.join(sorted(names))} changed since; bring the numbers up to date with: bench run {suite}"


class Outcomes:
    """Gives the rows of an evaluation by its key, None where there is a hole."""

    def __init__(self, root: Path) -> None:
        self._store = Store(root)
        self._now: dict[str, str] = {}
        self.changed: set[str] = set()
        """Modules that are not what they were when the rows given so far were made."""
        self.damaged: dict[str, str] = {}
        """Evaluations that were asked for and are damaged, by their keys, and what is wrong with each."""

    @cache  # noqa: B019 - lives as long as a report
    def __call__(self, key: str) -> Frame | None:
        """Return the rows; a damaged file is a hole, and `bench run` makes it again."""
        reason = self._store.damage("evaluate", key)
        if reason is None:
            try:
                rows = Stored(self._store.folder("evaluate", key) / ARTEFACTS["evaluate"])
            except (OSError, ValueError) as error:
                # pyarrow's own errors are ValueErrors; the file may be gone since it was looked at.
                reason = f"{ARTEFACTS['evaluate']} cannot be read ({error})"
        if reason is not None:
            if reason != ABSENT:
                self.damaged[key] = reason
            return None
        made_by = (self._store.receipt("evaluate", key) or {}).get("sources", {})
        self._now |= _digests(set(made_by) - set(self._now))
        self.changed |= {name for name, digest in made_by.items() if self._now.get(name) != digest}
        return rows

"""What stands beside every file of tables: of which outcomes, code, versions and machines its numbers are.

`NAME.manifest.json` is sealed by its digest, holds those of the files beside it and of every outcome behind
them, and so is what `bench verify` needs to say whether a table is still what the outcomes say.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.console import condition_name
from bench.errors import InputError
from bench.report import tables
from bench.report.render import Form
from bench.results.conditions import Condition, conditions_of
from bench.results.manifest import Outcomes
from bench.results.origin import commit_of, processor, versions
from bench.results.seals import seal
from bench.results.store import ABSENT, ARTEFACTS, Store

SCHEME = 1
"""Number of the form of these manifests."""

SUFFIX = ".manifest.json"
"""The end of their names, which no file of tables has."""

ENDINGS: Mapping[str, Form] = {".csv": "csv", ".md": "markdown"}
"""The endings of the files of each table in a results folder, with their formats."""


@dataclass(frozen=True)
class Source:
    """What tables were cut from."""

    root: Path
    """The results folder."""
    manifest: Mapping[str, Any]
    """Its manifest."""
    keys: Sequence[str]
    """The keys of the tables."""
    outcomes: Outcomes
    """What gave the rows, so that what it found damaged is known."""

    @cached_property
    def reads(self) -> dict[str, set[str]]:
        """The keys of the evaluations that each of the tables reads, by the table's."""
        return {key: tables.jobs(self.manifest, key) for key in self.keys}


def file_name(key: str) -> str:
    """Return the name of a table's files, without their endings.

    Args:
        key: The table's key in the task file.
    """
    return f"table-{key.replace('/', '-')}"


def beside(path: Path) -> Path:
    """Return the place of the manifest of a file.

    Args:
        path: The file; for several of one name the path without their endings.
    """
    return path.with_name(path.name + SUFFIX)


def keep(
    source: Source, place: Path, files: Mapping[Path, str], options: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of files of tables; one that says the same already stays, with its time.

    Args:
        source: What the tables were cut from.
        place: The manifest (`beside`).
        files: The files, which are written already, and the format of each.
        options: How a report was asked for, where that is not by its tables and its format alone.

    Raises:
        InputError: It cannot be written.
    """
    told = describe(source, place, files, options or {})
    if _timeless(_read(place)) == _timeless(told):
        return
    try:
        Store.write_text(place, json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}") from None


def _timeless(told: Mapping[str, Any] | None) -> Any:
    """Return a manifest without when and where the files were written; None where it does not count."""
    if told is None or told != seal(told):
        return None
    return {name: value for name, value in told.items() if name not in ("written", "digest")}


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def describe(
    source: Source, place: Path, files: Mapping[Path, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the manifest of files of tables says.

    Args:
        source: What the tables were cut from.
        place: The manifest.
        files: The files, which are written already, and the format of each.
        options: How a report was asked for.

    Returns:
        The mapping (`docs/results.md` explains it), sealed.
    """
    manifest, store = source.manifest, Store(source.root)
    named = {each.job: each for each in conditions_of(manifest)}
    needed = sorted(set().union(*source.reads.values()))
    there = {job: store.receipt("evaluate", job) or {} for job in needed if source.outcomes(job) is not None}
    worst = any(named[job].facts.member is not None for job in needed)
    return seal(
        {
            "scheme": SCHEME,
            **{name: manifest[name] for name in ("suite", "file", "suite_digest")},
            "results": os.path.relpath(source.root.resolve(), place.parent.resolve()),
            "tables": list(source.keys),
            "options": dict(options),
            "mode": "worst" if worst else "each attack on all examples",
            "files": {path.name: {"format": form, "sha256": _digest(path)} for path, form in files.items()},
            "seeds": sorted({named[job].seed for job in needed}),
            **_made({job: condition_name(named[job].coordinates) for job in there}, there),
            "checks": {
                key: {"kind": kind, "receipt": digest_of(receipt)}
                for kind, key in sorted({pair for job in needed for pair in checks_of(named[job])})
                if (receipt := store.receipt(kind, key)) and source.outcomes.found(kind, key) is not None
            },
            "missing": {
                job: {
                    "condition": condition_name(named[job].coordinates),
                    "reason": source.outcomes.damaged.get(job, ABSENT),
                }
                for job in needed
                if job not in there
            },
            "written": {
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "commit": commit_of(Path(__file__).parent),
                "versions": versions(),
                "hardware": f"{processor()}, {platform.system()} {platform.machine()}",
            },
        }
    )


def checks_of(condition: Condition) -> list[tuple[str, str]]:
    """Return the kinds and keys of the jobs that say whether to believe a condition, whether made or not.

    Args:
        condition: The condition.
    """
    facts = condition.facts
    trials = [] if facts.trial is None else [("trial", facts.trial)]
    return [*trials, *(("examination", key) for key in facts.examinations)]


def check_names(manifest: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return what is tried or examined, in words, by the kind and the key of the job that does so.

    Args:
        manifest: The manifest of a suite.
    """
    found: dict[tuple[str, str], str] = {}
    for each in conditions_of(manifest):
        for kind, key in checks_of(each):
            of = (
                each.attack
                if kind == "trial"
                else f"{each.coordinates['defense']}/{each.coordinates['readout']}"
            )
            found.setdefault((kind, key), f"of {of}")
    return found


def _made(names: Mapping[str, str], receipts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how outcomes were made, by their receipts: all together, and each."""
    spelled = {job: json.dumps(each.get("versions", {}), sort_keys=True) for job, each in receipts.items()}
    made_with = sorted(set(spelled.values()))
    crafted = [each.get("crafting", {}) for each in receipts.values()]
    devices = {str(each["device"]) for each in receipts.values() if "device" in each}
    return {
        "hardware": sorted(devices | {device for each in crafted for device in each.get("devices", [])}),
        "commits": sorted({str(each["commit"]) for each in receipts.values() if each.get("commit")}),
        "versions": [json.loads(each) for each in made_with],
        "seconds": {
            "evaluating": _total(each.get("seconds") for each in receipts.values()),
            "crafting": _total(each.get("seconds") for each in crafted),
        },
        "outcomes": {
            job: {
                "condition": names[job],
                "receipt": digest_of(receipt),
                "rows": receipt.get("files", {}).get(ARTEFACTS["evaluate"]),
                "versions": made_with.index(spelled[job]),
                **{name: receipt.get(name) for name in ("commit", "device", "seconds", "when")},
            }
            for job, receipt in receipts.items()
        },
    }


def digest_of(receipt: Mapping[str, Any]) -> str:
    """Return the digest of all of a receipt, also of what its own does not cover.

    Args:
        receipt: A receipt, as JSON has it.
    """
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _total(seconds: Iterable[object]) -> float:
    return round(sum(each for each in seconds if isinstance(each, int | float)), 3)

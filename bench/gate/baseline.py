"""The baseline: a folder for git with the outcomes that today's are compared with, and images to show again.

``baseline.json`` says what was asked, under which versions, and which changes were accepted; a line is a
condition, so that a change can be read. ``outcomes.parquet`` has a row for each example and condition, with
what the worst case was found by; ``replay.safetensors`` has adversarial images (`bench.gate.replay`).
Digests tell where any of it was edited.
"""

import getpass
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import InputError
from bench.gate.judge import Reader, subjects_of
from bench.gate.measurements import Measured, Measurements, Question, found_by, place_of
from bench.results import durable, fingerprint
from bench.results.conditions import Condition, Facts
from bench.results.outcomes import WHERE_THERE
from bench.results.seals import seal

FORMAT = 1
"""Number of the form of a baseline. A newer one is refused."""

INDEX, OUTCOMES, REPLAY = "baseline.json", "outcomes.parquet", "replay.safetensors"
"""The files of a baseline."""

_COLUMNS = ("index", "target", "truth", "label", "rejected", "distance", "invalid", "score", "differs")
"""What is kept of each example; notes of attacks and shares of draws follow, where there are any."""

_LISTS = ("conditions", "runs", "history")
"""Entries of the index that have a line for each item."""


@dataclass(frozen=True)
class StoredRun:
    """Adversarial images of one attack run."""

    key: str
    """The key of the run: its name in the file of images."""
    digest: str
    """The SHA-256 of what is stored of it."""
    stop: int
    """How many examples are stored, from the first of the data set's order on."""
    conditions: tuple[int, ...]
    """The positions of the conditions that were shown these images."""


@dataclass(frozen=True)
class Accepted:
    """A baseline that somebody accepted."""

    when: str
    """In UTC, as ISO 8601 has it."""
    who: str
    reason: str
    commit: str | None
    """The commit of the working copy that the results were made in; None outside one."""
    numbers: Mapping[str, Sequence[float]]
    """By its name, the accuracy of every worst case, in [0, 1], and the number of examples."""


@dataclass(frozen=True)
class Baseline:
    """A baseline as it was read."""

    root: Path
    suite: str
    """The name of the task file."""
    measurements: Measurements
    runs: tuple[StoredRun, ...] = ()
    history: tuple[Accepted, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the libraries that its numbers were made with."""

    @property
    def images(self) -> Path:
        """The file of adversarial images."""
        return self.root / REPLAY


def author() -> str:
    """Return who runs this, for the history of a baseline."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container may know no name for its user.
        return "unknown"


def write(
    root: Path,
    measurements: Measurements,
    *,
    suite: str,
    runs: Sequence[StoredRun],
    images: bytes,
    history: Sequence[Accepted],
    versions: Mapping[str, str],
) -> None:
    """Write a baseline; the index is the last of its files, and binds the others.

    Args:
        root: The folder; it need not exist.
        measurements: Every condition of the suite, all of them measured.
        suite: The name of the task file.
        runs: What the file of images has.
        images: Its content.
        history: The accepted baselines, the oldest first; the last one is this.
        versions: Versions of what the numbers were made with.
    """
    root.mkdir(parents=True, exist_ok=True)
    every = list(measurements.measured.values())
    with durable.drafted(root / OUTCOMES) as draft:
        _write_outcomes(draft, measurements)
    with durable.drafted(root / REPLAY) as draft:
        draft.write_bytes(images)
    attacks = _numbered(each.question.attack for each in every)
    data = _numbered(each.question.data for each in every)
    told = {
        "format": FORMAT,
        "crossfire": version("crossfire-bench"),
        "suite": suite,
        "versions": dict(versions),
        "data": list(data),
        "attacks": [json.loads(each) for each in attacks],
        "conditions": [_described(each, data, attacks) for each in every],
        "runs": [vars(each) for each in runs],
        "history": [vars(each) for each in history],
        "files": {name: fingerprint.file_digest(root / name) for name in (OUTCOMES, REPLAY)},
    }
    with durable.drafted(root / INDEX) as draft:
        draft.write_text(_spelled(seal(told)), encoding="utf-8")


def _numbered(values: Any) -> dict[str, int]:
    """Return different values with a number each; mappings as their JSON."""
    spelled = (each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in values)
    return {each: number for number, each in enumerate(dict.fromkeys(spelled))}


def _described(measured: Measured, data: Mapping[str, int], attacks: Mapping[str, int]) -> dict[str, Any]:
    question = {**vars(measured.question), "data": data[measured.question.data]}
    question["attack"] = attacks[json.dumps(measured.question.attack, sort_keys=True)]
    return {
        "coordinates": dict(measured.condition.coordinates),
        "job": measured.condition.job,
        "network": measured.network,
        "facts": vars(measured.condition.facts),
        "question": question,
        "flags": [list(each) for each in measured.flags],
    }


def _spelled(told: Mapping[str, Any]) -> str:
    """Return JSON in which each condition, run and accepted change is one line."""
    parts = []
    for name, value in told.items():
        if name in _LISTS:
            lines = ",\n".join(f"  {json.dumps(each)}" for each in value)
            parts.append(f' "{name}": [\n{lines}\n ]' if value else f' "{name}": []')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _found_by(measurements: Measurements) -> list[NDArray[np.int16]]:
    """Return for each condition and example which condition the failure of the worst case was found by.

    -1 where no attack of the row breaks the example, and in conditions that are part of no worst case, or, as
    unmoved images, of several. Nothing reads it back: a check finds it in the outcomes, as this does.
    """
    numbers = {place: number for number, place in enumerate(measurements.measured)}
    found = [np.full(len(each.rows["index"]), -1, np.int16) for each in measurements.measured.values()]
    reader = Reader(measurements, measurements)
    for subject, seeds in subjects_of(measurements, measurements).pairs.items():
        radius = reader.radius(seeds) if subject.kind == "worst case" else None
        for row in (pair.before for pair in seeds.values() if subject.kind == "worst case"):
            finders = found_by(row, [reader.of(each, 0, radius) for each in row])
            members = np.array([numbers[place_of(each.condition)] for each in row])
            told = np.where(finders.number < 0, -1, members[finders.number])
            for number, each in zip(members.tolist(), row, strict=True):
                if not each.condition.facts.idle:
                    found[number][:] = told[np.searchsorted(finders.index, each.rows["index"])]
    return found


def _write_outcomes(path: Path, measurements: Measurements) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = [each.rows for each in measurements.measured.values()]
    further = [name for name in WHERE_THERE if any(name in rows for rows in every)]
    columns: dict[str, Any] = {
        "condition": np.concatenate([np.full(len(rows["index"]), at) for at, rows in enumerate(every)])
    }
    for name in (*_COLUMNS, *further):
        parts = [rows[name] if name in rows else np.full(len(rows["index"]), np.nan) for rows in every]
        columns[name] = np.concatenate(parts)
    columns["found_by"] = np.concatenate(_found_by(measurements))
    pq.write_table(pa.table(columns), path, compression="zstd")


# --- reading -----------------------------------------------------------------------------------------


def read(root: Path, *, replays: bool = False) -> Baseline:
    """Read a baseline, and refuse one that is not whole.

    Args:
        root: The folder.
        replays: Whether its images are needed.

    Returns:
        The baseline.

    Raises:
        InputError: There is none, it was edited, it is of a newer version, or it lacks what is needed.
    """
    path = root / INDEX
    told = _index(path)
    try:
        digests = {name: str(told["files"][name]) for name in (OUTCOMES, REPLAY)}
    except _MALFORMED as error:
        raise _unreadable(path, error) from None
    for name in (OUTCOMES, *([REPLAY] if replays else [])):
        if not (root / name).is_file():
            raise InputError(f"{root / name}: no such file; take it from git, or save the baseline anew")
        if fingerprint.file_digest(root / name) != digests[name]:
            raise InputError(f"{root / name}: not the file that {INDEX} names; take both from one commit")
    try:
        every = _measured(told, root / OUTCOMES)
        measured = {place_of(each.condition): each for each in every}
        runs = tuple(_run(each, len(every)) for each in told["runs"])
        history = tuple(map(_accepted, told["history"]))
        suite, made_with = str(told["suite"]), dict(told["versions"])
    except _MALFORMED as error:
        raise _unreadable(path, error) from None
    if not every:
        raise InputError(f"{path}: a baseline without a condition; save it anew after a run")
    return Baseline(root, suite, Measurements(str(root), measured), runs, history, made_with)


_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, OSError)
"""What reading raises where a program wrote something else than a baseline, and sealed it."""


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({error}); take it from git, or save it anew")


def _run(told: Mapping[str, Any], conditions: int) -> StoredRun:
    run = StoredRun(**{**told, "conditions": tuple(told["conditions"])})
    if not (isinstance(run.key, str) and isinstance(run.digest, str) and run.stop >= 1):
        raise ValueError("a run of stored images has no name, no digest or no images")
    if not all(0 <= each < conditions for each in run.conditions):
        raise ValueError("stored images are of a condition that is not there")
    return run


def _accepted(told: Mapping[str, Any]) -> Accepted:
    """Return an accepted baseline; a seal only tells that its numbers were written by a program."""
    accepted = Accepted(**told)
    texts = (accepted.when, accepted.who, accepted.reason, "" if accepted.commit is None else accepted.commit)
    if not all(isinstance(each, str) for each in texts):
        raise TypeError("its history has no text where one belongs")
    for share, n in accepted.numbers.values():
        if not (0 <= share <= 1 and 1 <= n <= 2**63):
            raise ValueError(f"its history has {share} of {n} examples")
    return accepted


def _index(path: Path) -> dict[str, Any]:
    """Return the index, which nobody has edited."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; save one after a run with: bench baseline save --out {path.parent}"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    number = told.get("format") if isinstance(told, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{path}: not a baseline of Crossfire")
    if number > FORMAT:
        raise InputError(
            f"{path}: made by a newer Crossfire (form {number}, this one knows {FORMAT}); upgrade"
        )
    if number < FORMAT or told != seal(told):
        raise InputError(
            f"{path}: edited by hand, or not whole; take it from git, or accept new numbers with: "
            'bench baseline accept --reason "..."'
        )
    found: dict[str, Any] = told
    return found


def _measured(told: Mapping[str, Any], path: Path) -> list[Measured]:
    """Return the conditions of an index with their rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    if set(columns["condition"].tolist()) != set(range(len(told["conditions"]))):
        raise ValueError(f"{OUTCOMES} is of other conditions")
    order = np.argsort(columns["condition"], kind="stable")
    cuts = np.searchsorted(columns["condition"][order], np.arange(1, len(told["conditions"])))
    parts = {name: np.split(values[order], cuts) for name, values in columns.items() if name != "condition"}
    further = [name for name in parts if name in WHERE_THERE]
    found = []
    for number, each in enumerate(told["conditions"]):
        rows: dict[str, Any] = {name: parts[name][number] for name in _COLUMNS}
        # What another condition alone has is NaN throughout.
        rows |= {name: parts[name][number] for name in further if not np.isnan(parts[name][number]).all()}
        question = {**each["question"], "data": told["data"][each["question"]["data"]]}
        question["attack"] = told["attacks"][each["question"]["attack"]]
        condition = Condition(each["coordinates"], Facts.read(each["facts"]), each["job"])
        flags = tuple((message, code) for message, code in each["flags"])
        found.append(Measured(condition, Question(**question), rows, each["network"], flags))
    return found


def now() -> str:
    """Return the time, as a history has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

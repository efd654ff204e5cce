"""The index spares readings, and changes nothing of what is said of a result."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_damage import HARMS, copied, flip, small

from bench.results import durable, fingerprint, index, seals
from bench.results import store as stores
from bench.results.index import NAME, READ, SETTLED, Entry, Index
from bench.results.store import ABSENT, ARTEFACTS, Store
from bench.results.survey import survey
from bench.runner import outstanding
from bench.suite import planner, resolve
from bench.suite.planner import Plan
from suites import TASK, Ran, suite

AT_ONCE = -(10**18)
"""In place of `SETTLED`: what was written just now is recorded, too."""

KINDS = ("train", "craft", "evaluate")
"""The kinds of jobs that the folder of these tests has."""


class Folder(NamedTuple):
    """A plan, and a results folder in which all of it is done."""

    plan: Plan
    root: Path

    @property
    def results(self) -> list[tuple[str, str]]:
        """Kind and key of every result."""
        return [(kind, each.name) for kind in KINDS for each in sorted((self.root / kind).iterdir())]

    def said(self, **options: Any) -> tuple[set[str], dict[str, str]]:
        """Return what an examination says: the keys of what is done, and what is done again and why."""
        state = outstanding.examine(self.plan, Store(self.root), **options)
        return {job.key for job in state.kept}, {job.key: why for job, why in state.redo.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = small(tmp_path_factory.mktemp("finished"))
    run = Ran(path)
    assert not run.failed
    durable.remove(run.store.root / NAME)
    return Folder(planner.make(resolve.load(path)), run.store.root)


@pytest.fixture
def known(finished: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Return a copy of the folder in which the index knows every result."""
    monkeypatch.setattr(index, "SETTLED", AT_ONCE)
    folder = Folder(finished.plan, copied(finished.root, tmp_path / "results"))
    assert not outstanding.damages(folder.plan, Store(folder.root))
    folder.said()
    assert all(index.vouched(folder.root, *each) for each in folder.results)
    ticked(folder.root)
    return folder


def ticked(root: Path) -> None:
    """Wait until the clock of the file system shows another time than that of any file."""
    last = max(os.lstat(each).st_ctime_ns for each in (root, *root.rglob("*")))
    probe = root.parent / "probe"
    while True:
        probe.touch()
        if probe.stat().st_ctime_ns > last:
            return


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that grows by each file of a result that is opened."""
    opened: list[Path] = []

    def noting(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def noted(path: Path) -> Any:
            opened.append(path)
            return read(path)

        return noted

    monkeypatch.setattr(fingerprint, "file_digest", noting(fingerprint.file_digest))
    monkeypatch.setattr(stores, "_plain", noting(stores._plain))
    return opened


# --- what is spared ------------------------------------------------------------------------------------


def test_what_was_read_and_is_as_it_was_is_not_opened_again(known: Folder, reads: list[Path]) -> None:
    done, redo = known.said()
    assert not reads
    assert done == {each.job.key for each in known.plan.conditions}
    assert not redo
    assert known.said(afresh=True) == (done, redo)
    assert {each.name for each in reads} == {"receipt.json", "job.json", "outcomes.parquet"}


def test_receipts_are_those_of_the_files(known: Folder, reads: list[Path]) -> None:
    with survey(Store(known.root)) as found:
        receipts = {each: found.receipt(*each) for each in known.results}
    assert not reads
    assert receipts == {each: Store(known.root).receipt(*each) for each in known.results}


def test_only_what_was_read_counts_as_read(
    finished: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    """A plan looks at receipts alone; a run after it reads the files."""
    monkeypatch.setattr(index, "SETTLED", AT_ONCE)
    folder = Folder(finished.plan, copied(finished.root, tmp_path / "results"))
    folder.said(verify=False)
    assert not any(each.suffix == ".parquet" for each in reads)
    reads.clear()
    folder.said(verify=False)
    assert not reads
    for _, key in folder.results:
        if (file := folder.root / "evaluate" / key / ARTEFACTS["evaluate"]).exists():
            flip(file)
    done, redo = folder.said()
    assert not done & {key for kind, key in folder.results if kind == "evaluate"}
    assert all(
        "outcomes.parquet is cut short or altered" in redo[each.job.key] for each in folder.plan.conditions
    )


def test_absence_costs_one_listing_of_each_folder(
    finished: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    asked: list[str] = []
    for name in ("stat", "lstat", "listdir", "open"):
        ask = getattr(os, name)

        def counted(path: Any, *rest: Any, ask: Any = ask, **more: Any) -> Any:
            asked.append(str(path))
            return ask(path, *rest, **more)

        monkeypatch.setattr(os, name, counted)
    with survey(Store(tmp_path)) as found:
        first = len(asked)
        for number in range(1000):
            for kind in KINDS:
                assert found.damage(kind, f"{number:032x}") == ABSENT
                assert found.receipt(kind, f"{number:032x}") is None
        assert len(asked) == first
    assert sum(Path(each).name in ARTEFACTS for each in asked) == len(ARTEFACTS)


# --- what is found all the same ------------------------------------------------------------------------


def unseen(harm: Callable[[Path], object], path: Path) -> None:
    """Harm a file, and give it its times back."""
    before = path.stat()
    harm(path)
    if path.is_file():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put an altered copy in a file's place, with its size and its times."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    unseen(flip, other)
    other.replace(path)


TRICKS: dict[str, Callable[[Path], object]] = {**HARMS, "replaced": replaced}


@pytest.mark.parametrize("harm", TRICKS)
def test_a_file_that_was_harmed_is_found_though_its_times_are_given_back(harm: str, known: Folder) -> None:
    whole = copied(known.root, known.root.parent / "whole")
    for kind, key in known.results:
        for name in (ARTEFACTS[kind], "job.json", "receipt.json"):
            place = known.root / kind / key
            aside = known.root.parent / "aside"
            shutil.copytree(place, aside, symlinks=True)
            unseen(TRICKS[harm], place / name)
            expected = Store(known.root).damage(kind, key)
            # In a receipt, a flipped digest of a source is found by comparing it with the code.
            assert expected is not None or name == "receipt.json"
            with survey(Store(known.root)) as found:
                assert found.damage(kind, key) == expected
                assert found.receipt(kind, key) == Store(known.root).receipt(kind, key)
            durable.remove(place)
            aside.rename(place)
    assert sorted(each.name for each in whole.rglob("*")) == sorted(
        each.name for each in known.root.rglob("*")
    )


def test_results_that_were_moved_are_found(known: Folder) -> None:
    for kind in KINDS:
        first, second, *_ = sorted((known.root / kind).iterdir())
        first.rename(known.root / "aside")
        second.rename(first)
        (known.root / "aside").rename(second)
        with survey(Store(known.root)) as found:
            for each in (first, second):
                assert found.damage(kind, each.name) == "what lies in its place is the result of another job"
                assert found.receipt(kind, each.name) == {}


def test_results_that_were_taken_away_are_absent(known: Folder) -> None:
    gone = [key for kind, key in known.results if kind == "evaluate"][:2]
    for key in gone:
        shutil.rmtree(known.root / "evaluate" / key)
    done, redo = known.said()
    assert not done & set(gone)
    assert not redo
    # An entry does not outlive its result: one that is put back is read.
    other = next(each for each in (known.root / "evaluate").iterdir())
    shutil.copytree(other, known.root / "evaluate" / gone[0])
    assert known.said()[1].keys() == {gone[0]}


def test_a_copy_of_a_folder_is_read(known: Folder, reads: list[Path], tmp_path: Path) -> None:
    other = Folder(known.plan, copied(known.root, tmp_path / "other"))
    assert (other.root / NAME).is_file()
    assert not any(index.vouched(other.root, *each) for each in other.results)
    reads.clear()
    assert other.said() == known.said(afresh=True)
    assert reads


def test_a_file_that_changed_without_a_trace_is_found_when_it_is_used_and_made_again(known: Folder) -> None:
    """As a failing disk does it: the bytes are others, and everything that `stat` tells is the same."""
    (kind, key), *_ = [each for each in known.results if each[0] == "evaluate"]
    store, place = Store(known.root), known.root / kind / key
    receipt = store.receipt(kind, key)
    assert receipt is not None
    flip(place / ARTEFACTS[kind])
    learns = Index(known.root)
    learns.begin()
    told = index.stamps(place, receipt, READ)
    assert told is not None
    learns.record(kind, key, Entry(READ, told, receipt))
    learns.save({})
    learns.close()
    assert key in known.said()[0], "nothing tells this file from the one that was read"
    assert "cut short or altered" in str(store.damage(kind, key))
    # What deceived once is thrown away as a whole.
    assert not (known.root / NAME).exists()
    assert known.said()[1].keys() == {key}


def test_everything_is_read_where_that_is_asked_for(known: Folder) -> None:
    """As above, but nobody uses the result."""
    kind, key = next(each for each in known.results if each[0] == "craft")
    place = known.root / kind / key
    receipt = Store(known.root).receipt(kind, key)
    assert receipt is not None
    flip(place / ARTEFACTS[kind])
    forged = Entry(READ, index.stamps(place, receipt, READ) or [], receipt)
    learns = Index(known.root)
    learns.begin()
    learns.record(kind, key, forged)
    learns.save({})
    learns.close()
    with survey(Store(known.root)) as found:
        assert found.damage(kind, key) is None
    assert {job.key for job in outstanding.damages(known.plan, Store(known.root))} == {key}
    assert not index.vouched(known.root, kind, key)


# --- when a file counts as at rest ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("later", "counts"), [(0, False), (SETTLED, False), (SETTLED + 1, True), (None, False)]
)
def test_what_was_written_just_before_it_was_read_is_read_again(
    later: int | None, counts: bool, finished: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second writing within the same tick of the clock could not be told from the first one."""
    folder = Folder(finished.plan, copied(finished.root, tmp_path / "results"))
    kind, key = folder.results[-1]
    last = max(
        os.stat(each).st_ctime_ns
        for each in [folder.root / kind / key, *(folder.root / kind / key).iterdir()]
    )
    # None: the folder cannot be written to, and has no clock that could be asked.
    monkeypatch.setattr(index, "_clock", lambda root: None if later is None else last + later)
    with survey(Store(folder.root)) as found:
        assert found.damage(kind, key) is None
    assert index.vouched(folder.root, kind, key) is counts


def test_the_clock_is_that_of_the_folder(tmp_path: Path) -> None:
    first = index._clock(tmp_path)
    (tmp_path / "file").touch()
    second = index._clock(tmp_path)
    assert first is not None
    assert second is not None
    assert first <= (tmp_path / "file").stat().st_ctime_ns <= second
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert index._clock(tmp_path / "nowhere") is None


def test_a_result_that_changes_while_it_is_looked_at_is_not_recorded(
    finished: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SETTLED", AT_ONCE)
    folder = Folder(finished.plan, copied(finished.root, tmp_path / "results"))
    kind, key = folder.results[-1]
    damage = Store.damage

    def slow(store: Store, *name: str, **options: Any) -> str | None:
        said = damage(store, *name, **options)
        flip(folder.root / kind / key / ARTEFACTS[kind])
        return said

    monkeypatch.setattr(Store, "damage", slow)
    ticked(folder.root)
    with survey(Store(folder.root)) as found:
        assert found.damage(kind, key) is None
    assert not index.vouched(folder.root, kind, key)


# --- the file itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index_is_made_anew(harm: str, known: Folder, reads: list[Path]) -> None:
    expected = known.said(afresh=True)
    known.said()
    HARMS[harm](known.root / NAME)
    assert known.said() == expected
    # A flipped bit may lie where nothing is stored.
    known.said()
    reads.clear()
    assert known.said() == expected
    assert not reads


def test_no_flipped_bit_of_the_index_makes_a_damaged_result_count(known: Folder) -> None:
    for kind, key in known.results:
        if kind == "evaluate":
            flip(known.root / kind / key / ARTEFACTS[kind])
    content = (known.root / NAME).read_bytes()
    draws = random.Random(0)
    expected = {each: Store(known.root).damage(*each) for each in known.results}
    assert {each[0] for each, reason in expected.items() if reason} == {"evaluate"}
    for _ in range(300):
        (known.root / NAME).write_bytes(content)
        flip(known.root / NAME, draws.random(), 1 << draws.randrange(8))
        with survey(Store(known.root)) as found:
            assert {each: found.damage(*each) for each in known.results} == expected


def test_an_entry_of_another_result_is_none(known: Folder) -> None:
    """The content of a row is bound to its name."""
    with closing(sqlite3.connect(known.root / NAME)) as made, made:
        (one, other, *_) = made.execute("SELECT key FROM results WHERE kind = 'evaluate'").fetchall()
        made.execute(
            "UPDATE results SET content = (SELECT content FROM results WHERE key = ?) WHERE key = ?",
            (*one, *other),
        )
    assert Index(known.root).get("evaluate", *other) is None
    assert Index(known.root).get("evaluate", *one) is not None


def test_what_other_code_found_whole_is_not_believed(
    known: Folder, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(index, "_judges", lambda: "yesterday's")
        expected = known.said()
        assert reads
        assert Index(known.root).get(*known.results[-1]) is not None
    reads.clear()
    assert known.said() == expected
    assert reads


def test_one_that_writes_for_other_code_meanwhile_is_not_merged(
    known: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, key = known.results[-1]
    mine = Index(known.root)
    entry = mine.get(kind, key)
    assert entry is not None
    with monkeypatch.context() as patched:
        patched.setattr(index, "_judges", lambda: "tomorrow's")
        known.said()
    mine.begin()
    mine.record(kind, key, entry)
    mine.save({})
    mine.close()
    with closing(Index(known.root)) as found:
        assert [each for each in known.results if found.get(*each) is not None] == [(kind, key)]


def test_nobody_waits_for_a_lock(known: Folder, reads: list[Path]) -> None:
    with closing(sqlite3.connect(known.root / NAME, timeout=0, isolation_level=None)) as holds:
        holds.execute("BEGIN EXCLUSIVE")
        known.said()
        assert not reads
        known.said(afresh=True)
        holds.execute("ROLLBACK")
    reads.clear()
    known.said()
    assert not reads


WRITER = """
import sys
from pathlib import Path
from bench.results import index
from bench.results.store import Store
from bench.results.survey import survey
index.SETTLED = -10**18
root = Path(sys.argv[1])
results = [(kind, each.name) for kind in ("craft", "evaluate", "train") for each in (root / kind).iterdir()]
for number in range(20):
    with survey(Store(root), afresh=bool(number % 2)) as found:
        # Another part each time, so that what others wrote must stay or be found again.
        for kind, key in results[number % 3 :: 3]:
            print(kind, key, found.damage(kind, key))
"""


def test_several_processes_write_at_once(known: Folder) -> None:
    damaged = {each for each in known.results if each[0] == "craft"}
    for kind, key in damaged:
        flip(known.root / kind / key / ARTEFACTS[kind])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(known.root)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for each in writers:
        said, _ = each.communicate(timeout=300)
        assert each.returncode == 0
        told = [line.split(" ", 2) for line in said.splitlines()]
        assert {(kind, key) for kind, key, reason in told if reason != "None"} == damaged
    with closing(sqlite3.connect(known.root / NAME)) as made:
        assert made.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not [each.name for each in known.root.iterdir() if "draft" in each.name]
    assert known.said() == known.said(afresh=True)


def test_an_index_that_cannot_be_written_stops_nothing(
    known: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = known.said(afresh=True)

    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    durable.remove(known.root / NAME)
    monkeypatch.setattr(durable, "drafted", full)
    assert known.said() == expected
    assert not (known.root / NAME).exists()


# --- sealed texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"a": 1},
        {
            "conditions": [],
            "skips": [{}],
            "deep": {"b": [1, {"x": None}], "a": (1, 2)},
            "sources": {"m": "1"},
        },
        {"z": [{"b": 1, "a": "ä\n\"'"}, [], [[1.5, 1e300]]], "digest": "old", "tables": {10: {2: 1, 10: 2}}},
        {"sources": ["z"], "list": ("a", "b"), "é": [True, False, {"9": 1, "10": 2}]},
    ],
)
def test_a_sealed_text_is_that_of_the_sealed_mapping(told: dict[str, Any]) -> None:
    assert "".join(seals.sealed_text(told)) == json.dumps(seals.seal(told), indent=1)


def test_verify_reads_everything_and_names_what_is_damaged(tmp_path: Path) -> None:
    path = suite(tmp_path, {"linear": {"use": "standard", "epochs": 1}}, {"clean": {"use": "none"}}, [TASK])
    ran = Ran(path)
    command = [sys.executable, "-m", "bench", "verify", path.name, "--results", str(ran.store.root)]

    def verify(code: int) -> str:
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == code, found.stderr
        return found.stdout

    assert "no stored result of 5 jobs is damaged" in verify(0)
    (file,) = ran.store.root.glob("train/*/weights.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = verify(4)
    assert "train linear, seed 0" in said
    assert "weights.safetensors is cut short or altered" in said
    assert "1 of 5 jobs damaged" in said
    file.write_bytes(whole)
    assert "no stored result" in verify(0)

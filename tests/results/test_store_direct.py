"""A results folder without a run: where things lie, what counts as whole, and what is said of the rest."""

import calendar
import errno
import hashlib
import json
import locale
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bench.errors import DamagedError, InputError, persons
from bench.results import durable, fingerprint, pack
from bench.results.failures import Failures
from bench.results.manifest import read
from bench.results.seals import seal
from bench.results.store import ABSENT, FOLDERS, SCHEME, Store, check_layout, texts

KINDS = ("train", "craft", "evaluate")
KEY = "0123456789abcdef0123456789abcdef"
NEEDED: dict[str, Any] = {"answers": [1, 2], "as_built": False}
"""What the receipt of a training must say; that of another job may."""


def opened(root: Path, **options: Any) -> Store:
    store = Store(root, **options)
    assert store.open() == []
    return store


def keep(store: Store, kind: str = "craft", key: str = KEY, text: str = "pixels", **receipt: Any) -> Path:
    """Store a result with a text in the place of its artefact; return its folder."""
    told = {"seconds": 1.5, **NEEDED, **receipt}
    store.keep(kind, key, {"about": "it"}, told, lambda path: path.write_text(text))
    return store.folder(kind, key)


def edited(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def everything(root: Path) -> list[str]:
    return sorted(str(each.relative_to(root)) for each in root.rglob("*"))


def a_draft_of_the_dead() -> str:
    """Return a draft's name whose process has ended."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _, host, _, tail = durable.mark().split("@")
    return f".draft@{host}@{dead.pid}@{tail}"


# --- what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_has_its_artefact_its_description_and_a_receipt_bound_to_it(
    kind: str, tmp_path: Path
) -> None:
    store = opened(tmp_path / "results")
    place = keep(store, kind)
    assert place == tmp_path / "results" / kind / KEY
    name = {"train": "weights.safetensors", "craft": "images.safetensors", "evaluate": "outcomes.parquet"}
    assert sorted(each.name for each in place.iterdir()) == sorted([name[kind], "job.json", "receipt.json"])
    assert store.artefact(kind, KEY) == place / name[kind]
    assert store.artefact(kind, KEY).read_text() == "pixels"
    described = {"kind": kind, "key": KEY, "about": "it"}
    assert store.job(kind, KEY) == described
    # People read and compare these two: an entry a line, and a line's end.
    assert (place / "job.json").read_text() == json.dumps(described, indent=1) + "\n"
    receipt = store.receipt(kind, KEY)
    assert receipt is not None
    assert (place / "receipt.json").read_text() == json.dumps(receipt, indent=1) + "\n"
    told = {
        "seconds": 1.5,
        **NEEDED,
        "files": {each: sha256(place / each) for each in (name[kind], "job.json")},
    }
    assert receipt == seal(told, kind, KEY)
    assert receipt != seal(told, kind, "another key")
    assert store.damage(kind, KEY) is None
    assert list((tmp_path / "results" / "scratch").iterdir()) == []


def test_a_result_ends_the_failure_and_the_kept_epochs_of_its_key_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in (KEY, "other"):
        Failures(tmp_path, "request", "worker").fail(key, {}, ValueError("no"))
        store.partial(key).mkdir(parents=True)
        (store.partial(key) / "epoch.safetensors").write_text("half")
    keep(store, "train")
    assert [each.name for each in (tmp_path / "failed").iterdir()] == ["other.json"]
    assert [each.name for each in (tmp_path / "partial").iterdir()] == ["other"]


def test_an_artefact_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.write_text("mine")
        path.chmod(0o600)

    store, before = opened(tmp_path), os.umask(0o022)
    try:
        store.keep("craft", KEY, {}, {}, private)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in store.folder("craft", KEY).iterdir()} == {0o644}


def test_the_first_of_two_equal_results_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    for text in ("one", "two"):
        store.keep("craft", "k", {}, {"seconds": 1}, lambda path, text=text: path.write_text(text))
    assert store.artefact("craft", "k").read_text() == "one"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_full_disk_keeps_what_was_there_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.raises(OSError, match="No space left") as caught:
        store.keep("craft", "k", {}, {}, full)
    assert not store.folder("craft", "k").exists()
    assert not list((tmp_path / "scratch").iterdir())
    assert "no space left on the disk" in str(persons(caught.value))


def test_a_result_is_on_the_disk_before_it_appears_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = opened(tmp_path), []
    flush, move = durable.flush, durable.move

    def flushes(paths: Any) -> None:
        every = list(paths)
        told.append({each.name if each.is_file() else each.parent.name for each in every})
        flush(every)

    def moves(source: Path, place: Path) -> None:
        told.append("appears")
        assert re.fullmatch(r"craft-01234567@.*", source.name), "a draft says whose it is"
        move(source, place)

    monkeypatch.setattr(durable, "flush", flushes)
    monkeypatch.setattr(durable, "move", moves)
    keep(store)
    assert told == [
        {"images.safetensors", "job.json", "receipt.json", "scratch"},
        "appears",
        {tmp_path.name},
    ]


def test_a_damaged_result_makes_room_and_what_stays_in_the_way_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tries, move = opened(tmp_path), [], durable.move
    place = keep(store)

    def blocked(times: int) -> Callable[[Path, Path], None]:
        def moves(source: Path, place: Path) -> None:
            tries.append(source)
            if len(tries) <= times:
                # Another process leaves a half result each time that this one has made room.
                place.mkdir(exist_ok=True)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            move(source, place)

        tries.clear()
        return moves

    (place / "images.safetensors").write_text("altered")
    monkeypatch.setattr(durable, "move", blocked(2))
    keep(store, text="anew")
    assert len(tries) == 3
    assert store.artefact("craft", KEY).read_text() == "anew"
    (place / "images.safetensors").write_text("altered")
    monkeypatch.setattr(durable, "move", blocked(3))
    with pytest.raises(FileExistsError):
        keep(store, text="anew")
    assert len(tries) == 3
    assert not list((tmp_path / "scratch").iterdir())


def test_a_disk_that_refuses_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tries = opened(tmp_path), []

    def refused(source: Path, place: Path) -> None:
        tries.append(place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "move", refused)
    with pytest.raises(OSError, match="No space left"):
        keep(store)
    assert tries == [tmp_path / "craft" / KEY]


# --- what goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [Store.discard, Store.clear])
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_is_discarded_is_gone_and_its_neighbour_stays(
    kind: str, gone: Callable[[Store, str, str], None], tmp_path: Path
) -> None:
    store = opened(tmp_path)
    keep(store, kind)
    keep(store, kind, "other")
    for _ in range(2):
        gone(store, kind, KEY)
        assert store.damage(kind, KEY) == ABSENT
        assert store.receipt(kind, KEY) is None
        assert store.damage(kind, "other") is None
    assert everything(tmp_path / "scratch") == []
    assert [each.name for each in (tmp_path / kind).iterdir()] == ["other"]


def test_nothing_is_touched_to_discard_what_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    store.discard("evaluate", KEY)
    assert not (tmp_path / "results").exists()


def test_a_link_to_nowhere_is_discarded_too(tmp_path: Path) -> None:
    store = opened(tmp_path)
    (tmp_path / "craft").mkdir()
    store.folder("craft", KEY).symlink_to("nowhere")
    assert store.receipt("craft", KEY) == {}
    store.discard("craft", KEY)
    assert not os.path.lexists(store.folder("craft", KEY))


def test_what_cannot_be_moved_to_scratch_disappears_at_once_beside_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename = opened(tmp_path), Path.rename
    place = keep(store)
    beside: list[Path] = []

    def across(self: Path, target: Path) -> Path:
        if Path(target).parent != place.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        beside.append(Path(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", across)
    store.clear("craft", KEY)
    (aside,) = beside
    # By its name a kill in between leaves a draft, which the next run sweeps.
    assert re.fullmatch(r"\.draft@.+@\d+@.+", aside.name)
    assert everything(tmp_path / "craft") == []


def test_what_may_not_be_moved_at_all_stays_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    place = keep(store)

    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        store.clear("craft", KEY)
    assert store.damage("craft", KEY) is None
    assert [each.name for each in place.parent.iterdir()] == [KEY]


# --- what is wrong with a result -----------------------------------------------------------------------


def no_folder(place: Path) -> None:
    durable.remove(place)
    place.write_text("no folder")


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "absent"),
    "a file": (no_folder, "what lies in its place is no folder"),
    "of another key": (
        lambda place: edited(place / "job.json", key="other"),
        "what lies in its place is the result of another job",
    ),
    "of another kind": (
        lambda place: edited(place / "job.json", kind="train"),
        "what lies in its place is the result of another job",
    ),
    "no receipt": (lambda place: (place / "receipt.json").unlink(), "its receipt is missing"),
    "half a receipt": (
        lambda place: (place / "receipt.json").write_text("{"),
        "its receipt is cut short or altered",
    ),
    "another receipt": (
        lambda place: edited(place / "receipt.json", seconds=9),
        "its receipt is cut short or altered",
    ),
    "a receipt of bytes": (
        lambda place: (place / "receipt.json").write_bytes(b"\xff"),
        "its receipt is cut short or altered",
    ),
    "a deep receipt": (
        lambda place: (place / "receipt.json").write_text("[" * 100_000),
        "its receipt is cut short or altered",
    ),
    "no artefact": (
        lambda place: (place / "images.safetensors").unlink(),
        "images.safetensors is missing",
    ),
    "a folder for an artefact": (
        lambda place: ((place / "images.safetensors").unlink(), (place / "images.safetensors").mkdir()),
        "images.safetensors is missing",
    ),
    "no description": (lambda place: (place / "job.json").unlink(), "job.json is missing"),
}


@pytest.mark.parametrize("read", [True, False], ids=["read", "looked at"])
@pytest.mark.parametrize("harm", HARMS)
def test_each_harm_is_told_by_its_own_words(harm: str, read: bool, tmp_path: Path) -> None:
    store = opened(tmp_path)
    harms, reason = HARMS[harm]
    harms(keep(store))
    assert store.damage("craft", KEY, read=read) == reason
    with pytest.raises(DamagedError) as caught:
        store.artefact("craft", KEY)
    assert str(caught.value) == f"craft {KEY}: {reason}"
    assert (store.receipt("craft", KEY) is None) == (harm == "absent")


@pytest.mark.parametrize("name", ["images.safetensors", "job.json"])
def test_content_counts_where_the_files_are_read(name: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    place = keep(store)
    with (place / name).open("a") as file:
        file.write(" ")
    assert store.damage("craft", KEY) == f"{name} is cut short or altered"
    assert store.damage("craft", KEY, read=True) == f"{name} is cut short or altered"
    assert store.damage("craft", KEY, read=False) is None


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    keep(store)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fingerprint, "file_digest", broken)
    assert store.damage("craft", KEY) == "images.safetensors cannot be read (Input/output error)"


@pytest.mark.parametrize("lacking", ["answers", "as_built"])
def test_the_receipt_of_a_training_says_what_later_jobs_ask_of_it(lacking: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    for kind in KINDS:
        told = {name: value for name, value in NEEDED.items() if name != lacking}
        store.keep(kind, KEY, {}, told, lambda path: path.write_text("it"))
    assert store.damage("train", KEY) == f"its receipt has no '{lacking}': it is of an older version"
    assert store.damage("craft", KEY) is None
    assert store.damage("evaluate", KEY) is None


def test_a_description_of_an_older_version_names_no_job(tmp_path: Path) -> None:
    store = opened(tmp_path)
    place = keep(store)
    (place / "job.json").write_text('{"about": "it"}\n')
    files = {name: sha256(place / name) for name in ("images.safetensors", "job.json")}
    (place / "receipt.json").write_text(json.dumps(seal({"files": files}, "craft", KEY)))
    assert store.damage("craft", KEY) is None


def test_a_receipt_counts_for_its_own_job_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in (KEY, "other"):
        keep(store, key=key)
    shutil.copy(store.folder("craft", "other") / "receipt.json", store.folder("craft", KEY) / "receipt.json")
    assert store.receipt("craft", KEY) == {}
    assert store.damage("craft", KEY) == "its receipt is cut short or altered"


def test_sources_are_not_sealed_and_are_texts(tmp_path: Path) -> None:
    store = opened(tmp_path)
    place = keep(store, sources={"toys": "today's"})
    edited(place / "receipt.json", sources={"toys": "yesterday's"})
    assert (store.receipt("craft", KEY) or {})["sources"] == {"toys": "yesterday's"}
    for wrong in ({"toys": 1}, ["toys"], None):
        edited(place / "receipt.json", sources=wrong)
        assert store.receipt("craft", KEY) == {}


OLDER: dict[str, tuple[dict[str, Any], bool]] = {
    "bare": ({}, True),
    "whole": (
        {
            "seconds": 2,
            "sources": {"toys": "0"},
            "inputs": {"train": "1"},
            "crafting": {"seconds": 0.0, "devices": ["cpu", "cuda"]},
        },
        True,
    ),
    "no time": ({"seconds": 0, "crafting": {"devices": []}}, True),
    "sources number": ({"sources": {"toys": 1}}, False),
    "sources list": ({"sources": ["toys"]}, False),
    "inputs null": ({"inputs": None}, False),
    "inputs number": ({"inputs": {"train": 1}}, False),
    "seconds text": ({"seconds": "long"}, False),
    "seconds infinite": ({"seconds": float("inf")}, False),
    "seconds negative": ({"seconds": -1e-9}, False),
    "crafting text": ({"crafting": "dear"}, False),
    "crafting null": ({"crafting": None}, False),
    "crafting seconds text": ({"crafting": {"seconds": "long"}}, False),
    "crafting seconds negative": ({"seconds": 1, "crafting": {"seconds": -1}}, False),
    "crafting seconds no number": ({"crafting": {"seconds": float("nan")}}, False),
    "devices number": ({"crafting": {"devices": 3}}, False),
    "devices text": ({"crafting": {"devices": "cpu"}}, False),
    "devices numbers": ({"crafting": {"devices": ["cpu", 3]}}, False),
}


@pytest.mark.parametrize("entries", OLDER)
def test_a_receipt_of_an_older_version_has_no_digest_and_is_looked_at_entry_by_entry(
    entries: str, tmp_path: Path
) -> None:
    store = opened(tmp_path)
    place = keep(store)
    told, sound = OLDER[entries]
    receipt = {"files": {name: sha256(place / name) for name in ("images.safetensors", "job.json")}, **told}
    (place / "receipt.json").write_text(json.dumps(receipt))
    assert store.receipt("craft", KEY) == (receipt if sound else {})
    assert store.damage("craft", KEY) == (None if sound else "its receipt is cut short or altered")


@pytest.mark.parametrize("files", [None, [], 3, {}, {"job.json": "0"}, "more", "numbers"])
def test_an_older_receipt_names_both_files_and_no_other(files: object, tmp_path: Path) -> None:
    store = opened(tmp_path)
    place = keep(store)
    named = {name: sha256(place / name) for name in ("images.safetensors", "job.json")}
    if files == "more":
        files = {**named, "../../store.json": sha256(tmp_path / "store.json")}
    elif files == "numbers":
        files = dict.fromkeys(named, 0)
    (place / "receipt.json").write_text(json.dumps({"files": files}))
    assert store.receipt("craft", KEY) == {}
    (place / "receipt.json").write_text(json.dumps({"seconds": 1}))
    assert store.receipt("craft", KEY) == {}
    (place / "receipt.json").write_text("[]")
    assert store.receipt("craft", KEY) == {}


def test_texts_are_a_mapping_of_texts() -> None:
    assert texts({})
    assert texts({"a": "b"})
    for other in (None, [], "a", {"a": 1}, {"a": "b", "c": None}):
        assert not texts(other)


# --- trainings and failures ------------------------------------------------------------------------------


def test_a_training_is_begun_where_an_epoch_is_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.partial(KEY) == tmp_path / "partial" / KEY
    assert not store.begun(KEY)
    store.partial(KEY).mkdir(parents=True)
    for other in ("draft-1.safetensors", "notes.txt", "epoch.json"):
        (store.partial(KEY) / other).write_text("other")
    assert not store.begun(KEY)
    (store.partial(KEY) / "epoch0001.safetensors").write_text("kept")
    assert store.begun(KEY)
    assert not store.begun("other")


def test_a_failure_keeps_what_was_raised_and_where_and_when(tmp_path: Path) -> None:
    store = opened(tmp_path)

    def deep_within() -> None:
        raise ValueError("seven is no radius")

    begun = time.time()
    try:
        try:
            deep_within()
        except ValueError as error:
            raise RuntimeError("no plan") from error
    except RuntimeError as error:
        Failures(tmp_path, "request", "worker").fail(KEY, {"seed": 3}, error)
    assert store.failure_file(KEY) == tmp_path / "failed" / f"{KEY}.json"
    text = store.failure_file(KEY).read_text()
    record = json.loads(text)
    assert text == json.dumps(record, indent=1) + "\n"
    assert (record["type"], record["message"], record["job"]) == ("RuntimeError", "no plan", {"seed": 3})
    assert (record["error"], record["final"], record["tries"]) == ("RuntimeError: no plan", True, [])
    assert (record["request"], record["worker"]) == ("request", "worker")
    lines = record["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "RuntimeError: no plan"
    assert "in deep_within" in record["traceback"]
    assert "ValueError: seven is no radius" in lines
    when = calendar.timegm(time.strptime(record["when"], "%Y-%m-%dT%H:%M:%SZ"))
    assert int(begun) <= when <= time.time()


def test_a_failure_has_its_time_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    try:
        monkeypatch.setenv("TZ", "FAR-9")
        time.tzset()
        begun = time.time()
        Failures(tmp_path, "request", "worker").fail(KEY, {}, ValueError("no"))
    finally:
        monkeypatch.undo()
        time.tzset()
    when = json.loads(store.failure_file(KEY).read_text())["when"]
    assert int(begun) <= calendar.timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ")) <= time.time()


def test_files_are_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    store = opened(tmp_path)
    place = keep(store, about="ε größer 0")
    # JSON may be spelled otherwise, by an editor say, and is the same.
    for path in (place / "receipt.json", tmp_path / "store.json"):
        told = json.loads(path.read_text())
        if path.name == "store.json":
            told["note"] = "ε"
        path.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert store.open() == []
        assert store.damage("craft", KEY) is None
        Store.write_text(tmp_path / "tables" / "t.md", "ε ≤ 8/255")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / "tables" / "t.md").read_bytes() == "ε ≤ 8/255".encode()


def test_a_small_file_is_written_with_its_folders_and_again(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "name.json"
    for text in ("ä: ε ≤ 8/255", "again"):
        Store.write_text(place, text)
        assert place.read_bytes() == text.encode()
        assert everything(tmp_path) == ["a", "a/b", "a/b/name.json"]


# --- the folder itself -----------------------------------------------------------------------------------


def test_a_new_folder_gets_its_mark_and_keeps_it(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "results"
    assert Store(root).open() == []
    mark = root / "store.json"
    assert mark.read_text() == f'{{"scheme": {SCHEME}}}\n'
    assert everything(root) == ["store.json"]
    before = mark.stat()
    assert Store(root).open() == []
    assert mark.stat().st_ino == before.st_ino
    assert mark.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("content", ["", "{", "[]", '{"scheme": "2"}', '{"scheme": null}', "{}"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_mark_beside_results_is_written_anew_and_said(
    kind: str, content: str, tmp_path: Path
) -> None:
    mark = tmp_path / "store.json"
    mark.write_text(content)
    with pytest.raises(InputError) as caught:
        Store(tmp_path).open()
    assert str(caught.value) == f"{mark}: not a results folder of Crossfire; name another with --results"
    assert mark.read_text() == content
    (tmp_path / kind).mkdir()
    assert Store(tmp_path).open() == [f"{mark} was damaged, and is written anew"]
    assert mark.read_text() == f'{{"scheme": {SCHEME}}}\n'
    assert Store(tmp_path).open() == []


@pytest.mark.parametrize("harm", ["[" * 100_000, b"\xff\xfe", "folder"], ids=["deep", "no text", "folder"])
def test_a_mark_that_cannot_be_read_is_no_mark(harm: str | bytes, tmp_path: Path) -> None:
    mark = tmp_path / "store.json"
    if harm == "folder":
        mark.mkdir()
    else:
        mark.write_bytes(harm.encode() if isinstance(harm, str) else harm)
    with pytest.raises(InputError, match="not a results folder of Crossfire"):
        Store(tmp_path).open()
    (tmp_path / "craft").mkdir()
    assert Store(tmp_path).open() == [f"{mark} was damaged, and is written anew"]
    assert json.loads(mark.read_text()) == {"scheme": SCHEME}


NEWER = (
    r"made by a newer Crossfire \(layout 99, this one knows 2\); "
    r"upgrade, or name another folder with --results$"
)
OLD = r"layout 1 is no longer read, whose files use other words; name another folder with --results$"


def test_a_layout_is_read_or_refused_with_an_advice(tmp_path: Path) -> None:
    check_layout(tmp_path, SCHEME)
    for scheme, said in ((99, NEWER), (1, OLD)):
        with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}: {said}"):
            check_layout(tmp_path, scheme)
    with pytest.raises(InputError, match="newer Crossfire"):
        check_layout(tmp_path, SCHEME + 1)
    with pytest.raises(InputError, match="no longer read"):
        check_layout(tmp_path, SCHEME - 1)


@pytest.mark.parametrize("place", ["store.json", "manifest.json", "damaged mark", "pack"])
def test_the_layout_of_a_folder_is_told_by_its_mark_its_manifest_or_its_pack(
    place: str, tmp_path: Path
) -> None:
    for scheme, said in ((99, NEWER), (1, OLD)):
        root = tmp_path / str(scheme)
        root.mkdir()
        if place == "pack":
            pack.write(root, [packed()], scheme)
        else:
            name = "manifest.json" if place == "damaged mark" else place
            (root / name).write_text(json.dumps({"scheme": scheme}))
        if place == "damaged mark":
            (root / "store.json").write_text("{")
            (root / "train").mkdir()
        before = everything(root)
        with pytest.raises(InputError, match=rf"^{re.escape(str(root))}: {said}"):
            Store(root).open()
        assert everything(root) == before


@pytest.mark.parametrize("manifest", ["{}", "[]", "{", '{"scheme": "1"}'])
def test_a_manifest_that_tells_no_layout_is_not_asked(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    assert Store(tmp_path).open() == []


def test_a_results_folder_of_a_newer_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"scheme": 99}')
    with pytest.raises(InputError, match="newer Crossfire"):
        Store(tmp_path).open()
    (tmp_path / "store.json").write_text("what")
    with pytest.raises(InputError, match="not a results folder"):
        Store(tmp_path).open()


@pytest.mark.parametrize("mark", [None, "what", '{"scheme": 1}'])
def test_a_results_folder_of_layout_1_is_left_alone_with_one_advice(tmp_path: Path, mark: str | None) -> None:
    manifest = '{"scheme": 1, "cells": []}'
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "evaluate" / "0123").mkdir(parents=True)
    if mark is not None:
        (tmp_path / "store.json").write_text(mark)
    before = sorted(tmp_path.rglob("*"))
    said = r"layout 1 is no longer read, whose files use other words; name another folder with --results$"
    with pytest.raises(InputError, match=said):
        Store(tmp_path).open()
    with pytest.raises(InputError, match=said):
        read(tmp_path, Path("suite.yaml"))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_whatever_lies_in_the_place_of_ours_is_moved_and_said_one_by_one(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number, name in enumerate(FOLDERS):
        place = tmp_path / name
        place.symlink_to("nowhere") if number % 2 else place.write_text(f"my {name}")
    (tmp_path / "manifest.json").mkdir()
    (tmp_path / "manifest.json" / "mine").write_text("my manifest")
    said = store.open()
    assert len(said) == len(FOLDERS) + 1 == 12
    for number, name in enumerate([*FOLDERS, "manifest.json"]):
        (aside,) = tmp_path.glob(f"{name}.aside-*")
        assert re.fullmatch(rf"{re.escape(name)}\.aside-[0-9a-f]{{6}}", aside.name)
        sentence = f"{tmp_path / name}: what lay there is not of Crossfire; it is {aside.name} now"
        assert said[number] == sentence
        assert not os.path.lexists(tmp_path / name)
        if name == "manifest.json":
            assert (aside / "mine").read_text() == "my manifest"
        elif number % 2:
            assert aside.is_symlink()
        else:
            assert aside.read_text() == f"my {name}"
    assert store.open() == []


def test_folders_and_a_manifest_of_ours_stay(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    before = everything(tmp_path)
    assert store.open() == []
    assert everything(tmp_path) == before


def test_drafts_of_the_dead_are_swept_from_every_folder_and_those_of_the_living_left(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.partial(KEY).mkdir(parents=True)
    (store.partial(KEY) / "epoch0001.safetensors").write_text("kept")
    dead, alive = a_draft_of_the_dead(), f".draft{durable.mark()}"
    places = [tmp_path, *(tmp_path / name for name in FOLDERS), store.partial(KEY)]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / dead).write_text("half")
        (place / alive).write_text("half")
    assert store.open() == []
    for place in places:
        assert not (place / dead).exists(), place
        assert (place / alive).exists(), place
    assert store.begun(KEY)


def test_scratch_of_dead_processes_is_swept_and_of_living_ones_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    dead = tmp_path / "scratch" / f"craft-x@{socket.gethostname()}@{2**22 - 7}@abc"
    alive = tmp_path / "scratch" / f"craft-x@{socket.gethostname()}@{os.getpid()}@abc"
    dead.mkdir(parents=True)
    alive.mkdir()
    store.open()
    assert not dead.exists()
    assert alive.exists()


def test_kept_epochs_are_swept_where_their_training_is_done(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in ("done", "begun", "half"):
        store.partial(key).mkdir(parents=True)
        (store.partial(key) / "epoch0001.safetensors").write_text("kept")
    for key in ("done", "half"):
        store.folder("train", key).mkdir(parents=True)
    (store.folder("train", "done") / "receipt.json").write_text("{}")
    (store.folder("train", "half") / "receipt.json").mkdir()
    store.open()
    assert [store.begun(key) for key in ("done", "begun", "half")] == [False, True, True]
    assert sorted(each.name for each in (tmp_path / "partial").iterdir()) == ["begun", "half"]


# --- packed evaluations ----------------------------------------------------------------------------------


def packed(key: str = "packed", *left_out: str) -> pack.Entry:
    """Return an evaluation of three examples, to be packed."""
    rows = pa.table({"index": np.arange(3), "l2": [0.0, 0.5, 1.5]})
    job = {"kind": "evaluate", "key": key, "about": "packed"}
    return pack.Entry(key, job, seal({"files": {}, "seconds": 2.0}, "evaluate", key), rows, left_out)


def packing(root: Path, *left_out: str, **options: Any) -> Store:
    """Return a folder with one packed evaluation."""
    store = opened(root, **options)
    pack.write(root, [packed("packed", *left_out)], SCHEME)
    return store


def test_a_packed_evaluation_is_read_as_if_it_had_a_folder(tmp_path: Path) -> None:
    store, entry = packing(tmp_path), packed()
    assert not store.folder("evaluate", "packed").exists()
    assert store.damage("evaluate", "packed") is None
    assert store.receipt("evaluate", "packed") == entry.receipt
    assert store.job("evaluate", "packed") == entry.job
    assert store.outcomes("packed")["l2"].to_pylist() == [0.0, 0.5, 1.5]
    with pytest.raises(DamagedError) as caught:
        store.artefact("evaluate", "packed")
    assert str(caught.value) == "evaluate packed: it is packed, and has no file of its own"


def test_a_key_is_packed_as_an_evaluation_alone(tmp_path: Path) -> None:
    store = packing(tmp_path)
    for kind, key in (("train", "packed"), ("craft", "packed"), ("evaluate", KEY)):
        assert store.damage(kind, key) == ABSENT
        assert store.receipt(kind, key) is None


def test_the_folder_of_an_evaluation_counts_before_its_packed_form(tmp_path: Path) -> None:
    store = packing(tmp_path)
    rows = pa.table({"index": [0], "l2": [9.0]})
    store.keep("evaluate", "packed", {"about": "anew"}, {}, lambda path: parquet.write_table(rows, path))
    assert store.outcomes("packed")["l2"].to_pylist() == [9.0]
    assert store.job("evaluate", "packed")["about"] == "anew"
    assert (store.receipt("evaluate", "packed") or {}).get("files")
    assert store.artefact("evaluate", "packed").name == "outcomes.parquet"
    (store.folder("evaluate", "packed") / "receipt.json").unlink()
    assert store.damage("evaluate", "packed") == "its receipt is missing"
    # What was packed is seen again where that folder alone goes, and gone where the result is.
    store.clear("evaluate", "packed")
    assert store.outcomes("packed")["l2"].to_pylist() == [0.0, 0.5, 1.5]
    store.discard("evaluate", "packed")
    assert store.damage("evaluate", "packed") == ABSENT


def test_discarding_another_kind_takes_nothing_out_of_a_pack(tmp_path: Path) -> None:
    store = packing(tmp_path)
    for kind in ("train", "craft"):
        store.discard(kind, "packed")
    assert store.damage("evaluate", "packed") is None


def test_a_column_that_was_left_out_counts_where_a_table_reads_it(tmp_path: Path) -> None:
    pack.write(tmp_path, [packed("packed", "thresholds", "logits")], SCHEME)
    said = "its {} were left out of the pack, and a table reads them"
    for reads, reason in (
        (None, None),
        ({}, None),
        ({"packed": ["score"], KEY: ["logits"]}, None),
        ({"packed": ["thresholds", "score"]}, said.format("thresholds")),
        ({"packed": {"thresholds", "logits"}}, said.format("logits")),
    ):
        assert opened(tmp_path, reads=reads).damage("evaluate", "packed") == reason


def test_a_harmed_pack_tells_of_its_evaluation_and_of_its_files(tmp_path: Path) -> None:
    store = packing(tmp_path)
    (tmp_path / pack.ROWS).write_bytes(b"no rows")
    store = Store(tmp_path)
    reason = f"its rows in {pack.ROWS} are cut short or altered"
    assert store.damage("evaluate", "packed") == reason
    assert store.damage("evaluate", "packed", read=False) is None
    fault = (
        f"{tmp_path}: {pack.ROWS} is cut short or altered, or not the file that {pack.RECEIPTS} names; "
        f"what is whole of it counts, and bench pack {tmp_path} writes it anew"
    )
    assert store.faults() == [fault]
    assert store.open() == [fault]
    (tmp_path / "craft").write_text("mine")
    moved, again = store.open()
    assert moved.startswith(f"{tmp_path / 'craft'}: what lay there")
    assert again == fault


def test_a_fault_names_the_folder_as_the_user_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing(tmp_path / "results")
    (tmp_path / "results" / pack.ROWS).write_bytes(b"no rows")
    monkeypatch.chdir(tmp_path)
    (fault,) = Store(Path("results")).faults()
    assert fault.startswith("results: ")
    assert fault.endswith("bench pack results writes it anew")


def test_a_pack_is_all_that_a_folder_needs_to_be_one_of_ours(tmp_path: Path) -> None:
    packing(tmp_path)
    (tmp_path / "store.json").write_text("{")
    assert Store(tmp_path).open() == [f"{tmp_path / 'store.json'} was damaged, and is written anew"]
    (tmp_path / "store.json").unlink()
    assert Store(tmp_path).open() == []
    assert json.loads((tmp_path / "store.json").read_text()) == {"scheme": SCHEME}


def test_a_relative_folder_stays_where_it_was_named_whatever_a_job_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(Path("results"))
    monkeypatch.chdir("/")
    assert store.root == tmp_path / "results"
    assert store.shown == Path("results")

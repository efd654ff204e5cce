"""A result is complete or absent; what was cut short or altered is found and made again."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.errors import InputError, persons
from bench.results.manifest import read
from bench.results.store import Store
from bench.suite.jobs import Craft, Evaluate, Train
from suites import TASK, Ran, suite

LINEAR = {"linear": {"use": "toy/linear"}}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 2}}
TASKS = [{**TASK, "readouts": ["plain"], "views": ["logits"]}]


def ran(folder: Path, **options: Any) -> Ran:
    return Ran(suite(folder, LINEAR, ATTACKS, TASKS), **options)


def files_of(run: Ran, kind: type) -> list[Path]:
    return [run.store.folder(job.kind, job.key) for job in run.plan.graph() if isinstance(job, kind)]


@pytest.mark.parametrize("harm", ["cut", "altered", "missing", "receipt"])
def test_a_damaged_evaluation_is_made_again_and_said(tmp_path: Path, harm: str) -> None:
    first = ran(tmp_path)
    place = files_of(first, Evaluate)[0]
    path = place / "outcomes.parquet"
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[:100])
    elif harm == "altered":
        path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    elif harm == "missing":
        path.unlink()
    else:
        (place / "receipt.json").write_text("{")
    again = ran(tmp_path)
    assert [type(each.job) for each in again.done] == [Evaluate]
    (reason,) = again.state.redo.values()
    assert ("receipt" if harm == "receipt" else "outcomes.parquet") in reason
    assert path.read_bytes() == whole


def test_a_damaged_craft_is_made_again_only_when_it_is_needed(tmp_path: Path) -> None:
    first = ran(tmp_path)
    for place in files_of(first, Craft):
        (place / "images.safetensors").write_bytes(b"no")
    assert not ran(tmp_path).done
    for place in files_of(first, Evaluate):
        (place / "outcomes.parquet").unlink()
    again = ran(tmp_path)
    assert not again.failed
    assert sum(isinstance(each.job, Craft) for each in again.done) == len(files_of(first, Craft))


def test_a_result_whose_source_changed_is_made_again_unless_trusted(tmp_path: Path) -> None:
    first = ran(tmp_path)
    for place in files_of(first, Train):
        receipt = json.loads((place / "receipt.json").read_text())
        assert set(receipt["sources"]) == {
            "toys",
            "bench.losses",
            "bench.networks",
            "bench.noise",
            "bench.protocols",
        }
    touched = 0
    for kind in (Train, Craft, Evaluate):
        for place in files_of(first, kind):
            receipt = json.loads((place / "receipt.json").read_text())
            if "toys" in receipt["sources"]:
                receipt["sources"]["toys"] = "yesterday's"
                (place / "receipt.json").write_text(json.dumps(receipt))
                touched += 1
    assert not ran(tmp_path, trust=True).done
    again = ran(tmp_path)
    assert len(again.done) == touched
    assert set(again.state.redo.values()) == {"toys changed"}
    assert not ran(tmp_path).done


def test_a_committed_evaluation_needs_neither_weights_nor_crafts(tmp_path: Path) -> None:
    import shutil

    first = ran(tmp_path)
    for kind in ("train", "craft"):
        shutil.rmtree(first.store.root / kind)
    assert not ran(tmp_path).done


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


def test_scratch_of_dead_processes_is_swept_and_of_living_ones_left(tmp_path: Path) -> None:
    import socket

    store = Store(tmp_path)
    store.open()
    dead = tmp_path / "scratch" / f"craft-x@{socket.gethostname()}@{2**22 - 7}@abc"
    alive = tmp_path / "scratch" / f"craft-x@{socket.gethostname()}@{os.getpid()}@abc"
    dead.mkdir(parents=True)
    alive.mkdir()
    store.open()
    assert not dead.exists()
    assert alive.exists()


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


def test_nothing_is_pickled(tmp_path: Path) -> None:
    first = ran(tmp_path)
    kinds = {path.suffix for path in first.store.root.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".parquet"}

"""A result is complete or absent; what was cut short or altered is found and made again."""

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_nothing_is_pickled(tmp_path: Path) -> None:
    first = ran(tmp_path)
    kinds = {path.suffix for path in first.store.root.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".parquet"}

"""Whatever a results folder holds is used because it is whole, or said and made again."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import InputError
from bench.report import tables
from bench.report.render import to_csv
from bench.report.tables import unexamined
from bench.results import durable, index
from bench.results.manifest import _KINDS, Outcomes, read, stale, write
from bench.results.seals import seal
from bench.results.store import FOLDERS, Store
from bench.runner import outstanding
from bench.suite.jobs import Train
from suites import TASK, Ran, suite

DEFENSES = {
    "linear": {"use": "toy/linear", "phases": 2},
    "other": {"use": "toy/linear", "phases": 2, "lr": 0.3},
    "top": {"use": "toy/stacked", "base": "linear"},
}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3, "start": "uniform"}}
TASKS = [{**TASK, "readouts": ["plain"], "views": ["logits"]}]
TABLE = {
    "title": "Accuracy",
    "rows": ["defense"],
    "columns": {name: {"attack": name} for name in ATTACKS},
}


class Interrupted(BaseException):
    """Ends a run as a kill would."""


def small(folder: Path) -> Path:
    """Write a suite with trainings, parts and attacks that draw."""
    folder.mkdir(parents=True, exist_ok=True)
    path = suite(folder, DEFENSES, ATTACKS, TASKS, tables={"t": TABLE})
    path.write_text(path.read_text().replace("size: 60", "size: 24").replace("shard: 25", "shard: 12"))
    return path


def table(run: Ran) -> str:
    """Return the run's table: its text depends on every stored outcome."""
    return to_csv(tables.cut(run.plan.manifest(), "t", Outcomes(run.store.root), unexamined))


def half_trained(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, store: Path | None = None, epochs: int = 5
) -> None:
    """Run until so many epochs are kept, and stop as a kill would."""
    from bench.runner.training import Trainer

    save, count = Trainer._save, 0

    def dies(self: Any, done: int, *rest: Any) -> None:
        nonlocal count
        save(self, done, *rest)
        count += 1
        if count >= epochs:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", dies)
        # However a run takes it, as its own end or as the job's.
        with suppress(Interrupted):
            Ran(path, store)


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def flip(path: Path, share: float = 0.5, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= bit
    path.write_bytes(content)


def swapped_for(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        durable.remove(path)
        make(path)

    return harm


def as_json(value: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(value))


HARMS: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "first bit": lambda path: flip(path, 0, 128),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": durable.remove,
    "folder": swapped_for(lambda path: (path / "deeper").mkdir(parents=True)),
    "broken link": swapped_for(lambda path: path.symlink_to("nowhere")),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "list": as_json([]),
    "deep": lambda path: path.write_text("[" * 100_000),
    "null": as_json(None),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Return the suite, a finished results folder, and its table."""
    folder = tmp_path_factory.mktemp("finished")
    path = small(folder)
    run = Ran(path)
    write(run.store, run.plan.manifest())
    assert not run.failed
    return path, run.store.root, table(run)


def files(root: Path) -> list[str]:
    return sorted(str(each.relative_to(root)) for each in root.rglob("*") if each.is_file())


def recovers(path: Path, root: Path, expected: str) -> Ran:
    """Expect the next run to make what is wanted again, and the one after it to have nothing to do."""
    again = Ran(path, root)
    assert not again.failed, again.failed
    assert table(again) == expected
    assert not Ran(path, root).done
    return again


@pytest.mark.parametrize("harm", HARMS)
def test_any_file_of_a_finished_folder_may_be_damaged(
    harm: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    # One of each kind for every harm, all of them for one.
    every = [name for name in files(whole) if name != "store.json"]
    kinds = {(name.partition("/")[0], Path(name).name): name for name in every}
    for name in every if harm == "flip" else kinds.values():
        root = copied(whole, tmp_path / "results")
        HARMS[harm](root / name)
        again = recovers(path, root, expected)
        if name.startswith("evaluate/"):
            assert [each.job.key for each in again.done] == [name.split("/")[1]]
            assert again.state.redo.keys() == {again.done[0].job}


@pytest.mark.parametrize("harm", ["flip", "zeros", "deleted", "folder", "list"])
def test_a_damaged_result_below_is_made_again_where_it_is_needed(
    harm: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    for name in ("weights.safetensors", "images.safetensors", "job.json", "receipt.json"):
        root = copied(whole, tmp_path / "results")
        shutil.rmtree(root / "evaluate")
        for place in [*(root / "train").iterdir(), *(root / "craft").iterdir()]:
            if os.path.lexists(place / name):
                HARMS[harm](place / name)
        again = recovers(path, root, expected)
        harmed = [each for each in again.state.todo if each.kind != "evaluate"]
        assert harmed
        assert set(harmed) == again.state.redo.keys()


@pytest.mark.parametrize("what", ["file", "broken link", "empty folder", "half", "foreign", "loop"])
@pytest.mark.parametrize("kind", ["train", "craft", "evaluate"])
def test_anything_may_lie_in_the_place_of_a_result(
    what: str, kind: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    # What is needed: all that was made from it goes.
    for later in {"train": ("craft", "evaluate"), "craft": ("evaluate",), "evaluate": ()}[kind]:
        shutil.rmtree(root / later)
    for place in list((root / kind).iterdir()):
        job = (place / "job.json").read_bytes()
        shutil.rmtree(place)
        if what == "file":
            place.write_text("a file")
        elif what in ("broken link", "loop"):
            place.symlink_to("nowhere" if what == "broken link" else place.name)
        else:
            place.mkdir()
        if what == "half":
            (place / "job.json").write_bytes(job)
        if what == "foreign":
            (place / "receipt.json").mkdir()
            (place / "thesis.txt").write_text("mine")
    recovers(path, root, expected)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "inputs null": lambda each: each.update(inputs=None),
    "inputs list": lambda each: each.update(inputs=[1]),
    "inputs number": lambda each: each.update(inputs={"a": 1}),
    "files list": lambda each: each.update(files=[]),
    "files number": lambda each: each.update(files=3),
    "files null": lambda each: each.update(files=dict.fromkeys(each["files"])),
    "files elsewhere": lambda each: each["files"].update({"../../store.json": "0"}),
    "no files": lambda each: each.pop("files"),
    "sources list": lambda each: each.update(sources=["toys"]),
    "sources null": lambda each: each.update(sources=None),
    "sources numbers": lambda each: each.update(sources=dict.fromkeys(each["sources"], 1)),
    "no sources": lambda each: each.pop("sources"),
    "seconds text": lambda each: each.update(seconds="long"),
    "seconds infinite": lambda each: each.update(seconds=float("inf")),
    "seconds false": lambda each: each.update(seconds=-1),
    "crafting text": lambda each: each.update(crafting="dear"),
    "crafting devices": lambda each: each.update(crafting={"devices": 3}),
}


@pytest.mark.parametrize("older", [False, True], ids=["", "without a digest"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_receipt_of_other_types_is_damage(
    edit: str, older: bool, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    for place in root.glob("*/*/receipt.json"):
        receipt = json.loads(place.read_text())
        if older:
            del receipt["digest"]
        EDITS[edit](receipt)
        place.write_text(json.dumps(receipt))
    store = Store(root)
    for kind in ("train", "craft", "evaluate"):
        for each in (root / kind).iterdir():
            assert store.damage(kind, each.name) or edit == "no sources"
    if older or "sources" in edit:
        recovers(path, root, expected)


def test_a_receipt_of_an_older_version_counts_without_its_digest(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    for place in root.glob("*/*/receipt.json"):
        receipt = json.loads(place.read_text())
        del receipt["digest"]
        place.write_text(json.dumps(receipt))
    again = Ran(path, root)
    assert not again.done
    assert table(again) == expected


@pytest.mark.parametrize("kind", ["train", "craft", "evaluate"])
def test_a_result_in_the_place_of_another_is_found(
    kind: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    first, second, *_ = sorted((root / kind).iterdir())
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    store = Store(root)
    for each in (first, second):
        assert store.damage(kind, each.name) == "what lies in its place is the result of another job"
        assert store.receipt(kind, each.name) == {}
    if kind != "evaluate":
        shutil.rmtree(root / "evaluate")
    again = recovers(path, root, expected)
    assert "what lies in its place is the result of another job" in again.state.redo.values()


def test_a_copy_of_another_result_is_found_as_well(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    first, *others = sorted((root / "evaluate").iterdir())
    for each in others:
        copied(first, each)
    again = recovers(path, root, expected)
    assert len(again.done) == len(others)


# --- trainings that are not done -----------------------------------------------------------------------


def test_any_kept_epoch_may_be_damaged(
    finished: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, expected = finished
    half_trained(path, monkeypatch, store=tmp_path / "half")
    kept = [name for name in files(tmp_path / "half") if name.startswith("partial/")]
    assert len({Path(name).name for name in kept}) == 4
    for name in kept:
        for harm in ("flip", "zeros", "deleted", "folder"):
            root = copied(tmp_path / "half", tmp_path / "results")
            HARMS[harm](root / name)
            again = recovers(path, root, expected)
            notes = [facts["note"] for facts in again.said if "note" in facts]
            read_first = ".before" not in name and name.endswith("1.safetensors")
            if read_first and harm != "deleted":
                assert len(notes) == 1
                assert Path(name).name in notes[0]


def test_kept_epochs_of_two_trainings_may_change_places(
    finished: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole, expected = finished
    states = {}
    for job in Ran(path, copied(whole, tmp_path / "whole")).plan.graph():
        if isinstance(job, Train) and job.defense.name == "toy/linear":
            root = copied(whole, tmp_path / job.key)
            shutil.rmtree(root / "train" / job.key)
            shutil.rmtree(root / "craft")
            shutil.rmtree(root / "evaluate")
            half_trained(path, monkeypatch, store=root, epochs=2)
            states[job.key] = root
    (one, first), (other, second) = states.items()
    copied(first / "partial" / one, second / "partial" / other)
    again = recovers(path, second, expected)
    assert any("is of another training" in facts.get("note", "") for facts in again.said)


# --- the folder itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "broken link"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_where_a_folder_belongs_is_moved_aside_and_said(
    name: str, what: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    durable.remove(root / name)
    (root / name).write_text("thesis") if what == "file" else (root / name).symlink_to("nowhere")
    (sentence,) = Store(root).open()
    assert sentence.startswith(f"{root / name}: what lay there is not of Crossfire; it is {name}.aside-")
    (aside,) = root.glob(f"{name}.aside-*")
    assert what != "file" or aside.read_text() == "thesis"
    recovers(path, root, expected)


def test_a_folder_where_a_file_belongs_stops_nothing(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    durable.remove(root / "manifest.json")
    (root / "manifest.json").mkdir()
    for key in [each.name for each in (root / "evaluate").iterdir()]:
        (root / "failed" / f"{key}.json" / "deep").mkdir(parents=True)
        (root / "partial" / key / "deep").mkdir(parents=True)
    shutil.rmtree(root / "evaluate")
    (root / "scratch" / "foreign" / "deep").mkdir(parents=True)
    (root / "scratch" / "a@b@c@d").write_text("mine")
    (root / "partial" / "notes.txt").write_text("mine")
    assert len(Store(root).open()) == 1
    recovers(path, root, expected)
    assert not list((root / "failed").iterdir())
    assert (root / "scratch" / "foreign" / "deep").is_dir()
    assert (root / "partial" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"scheme": "1"}', "[" * 100_000, "\udcff"])
def test_a_damaged_mark_is_refused_with_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="not a results folder of Crossfire; name another with --results"):
        Store(tmp_path).open()


def test_a_mark_that_is_a_folder_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "store.json").mkdir()
    with pytest.raises(InputError, match="not a results folder of Crossfire"):
        Store(tmp_path).open()


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another job": lambda each: each["conditions"][0].update(job=each["conditions"][1]["job"]),
    "another radius": lambda each: each["conditions"][0]["coordinates"].update(radius=0.3),
    "a condition fewer": lambda each: each["conditions"].pop(),
    "conditions null": lambda each: each.update(conditions=None),
    "no tables": lambda each: each.pop("tables"),
    "another title": lambda each: each["tables"]["t"].update(title="Robustness"),
    "a digest of nothing": lambda each: each.update(digest="0" * 64),
    "sources null": lambda each: each.update(sources=None),
    "no sources": lambda each: each.pop("sources"),
    "one key more": lambda each: each.update(more=1),
    "no scheme": lambda each: each.pop("scheme"),
}
OLDER = {
    **{f"no {name}": (lambda each, name=name: each.pop(name)) for name in _KINDS},
    **{f"{name} null": (lambda each, name=name: each.update({name: None})) for name in _KINDS},
    "a condition of text": lambda each: each.update(conditions=["pgd"]),
    "a condition without a job": lambda each: each["conditions"][0].pop("job"),
    "a condition without a radius": lambda each: each["conditions"][-1]["coordinates"].pop("radius"),
    "a condition without a fact": lambda each: each["conditions"][-1]["facts"].pop("idle"),
    "facts of text": lambda each: each["conditions"][-1].update(facts="pgd"),
    "a skip without coordinates": lambda each: each.update(skips=[{"reason": "later"}]),
    "a skip without a reason": lambda each: each.update(skips=[{"coordinates": {}}]),
}
"""What is found where no digest tells."""


@pytest.mark.parametrize("change", MANIFESTS)
def test_an_altered_manifest_is_refused_with_the_command_that_writes_it_anew(
    change: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    manifest = read(root, Path("suite.yaml"))
    MANIFESTS[change](manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"write it anew: bench run suite\.yaml"):
        read(root, Path("suite.yaml"))


@pytest.mark.parametrize("change", OLDER)
def test_a_manifest_without_a_digest_is_refused_where_it_is_not_whole(
    change: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    manifest = read(root, path)
    del manifest["digest"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert read(root, path) == manifest
    assert "the manifest has no digest that would tell damage" in stale(manifest, path, root)[0]
    OLDER[change](manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="write it anew: bench run"):
        read(root, path)


def test_a_manifest_may_be_spelled_otherwise(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    manifest = read(root, Path("suite.yaml"))
    (root / "manifest.json").write_bytes(json.dumps(manifest).replace(", ", ",\r\n").encode())
    assert read(root, Path("suite.yaml")) == manifest


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (1, r"made by a newer Crossfire .*; upgrade"),
        (-1, r"layout 1 is no longer read, .*; name another folder with --results"),
    ],
)
def test_a_manifest_of_another_layout_says_what_to_do(
    later: int, said: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    manifest = read(root, Path("suite.yaml"))
    # Whatever else that layout calls otherwise.
    manifest["points"] = manifest.pop("conditions")
    (root / "manifest.json").write_text(json.dumps({**manifest, "scheme": manifest["scheme"] + later}))
    with pytest.raises(InputError, match=said):
        read(root, Path("suite.yaml"))


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_manifest_is_refused(harm: str, finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    HARMS[harm](root / "manifest.json")
    with pytest.raises(InputError, match=r"suite\.yaml"):
        read(root, Path("suite.yaml"))


@pytest.mark.parametrize("harm", HARMS)
def test_a_report_knows_which_outcomes_are_damaged(
    harm: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    first, second, *others = sorted((root / "evaluate").iterdir())
    HARMS[harm](first / "outcomes.parquet")
    shutil.rmtree(second)
    outcomes = Outcomes(root)
    assert outcomes(first.name) is None
    assert outcomes(second.name) is None
    assert all(outcomes(each.name) is not None for each in others)
    assert outcomes.damaged.keys() == {first.name}
    assert "outcomes.parquet" in outcomes.damaged[first.name]


def test_outcomes_that_are_no_parquet_in_spite_of_their_digest_are_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    store.keep("evaluate", "k", {}, {"sources": {}}, lambda path: path.write_text("no parquet"))
    outcomes = Outcomes(tmp_path)
    assert outcomes("k") is None
    assert "outcomes.parquet cannot be read" in outcomes.damaged["k"]


# --- two at once, and other machines -------------------------------------------------------------------


def test_what_another_run_made_anew_meanwhile_is_left_alone(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    shutil.rmtree(root / "evaluate")
    for place in [*root.glob("train/*/weights.safetensors"), *root.glob("craft/*/images.safetensors")]:
        flip(place)
    plan = Ran(path, copied(whole, tmp_path / "other")).plan
    store = Store(root)
    slow = outstanding.examine(plan, store)
    assert slow.redo
    recovers(path, root, expected)
    before = {name: (root / name).stat().st_ino for name in files(root)}
    for job in slow.redo:
        outstanding.make_way(job, slow, store)
    assert {name: (root / name).stat().st_ino for name in files(root)} == before


def test_two_runs_on_a_folder_whose_every_result_is_damaged_both_end_well(tmp_path: Path) -> None:
    document = yaml.safe_load(small(tmp_path).read_text())
    document["defenses"] = {"one": {"use": "cnn", "width": 0.125, "epochs": 3, "hidden": [8]}}
    document["data"]["digits"]["size"] = 60
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**document, "tasks": [{**TASK, "seeds": [0, 1, 2]}]}))
    bench = [sys.executable, "-m", "bench.cli", "run", str(path), "--executor", "inline", "--results", "r"]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }
    assert subprocess.run(bench, check=False, **options).returncode == 0
    expected = (tmp_path / "r" / "tables" / "table-t.csv").read_bytes()
    artefacts = [*(tmp_path / "r").glob("*/*/*.safetensors"), *(tmp_path / "r").glob("evaluate/*/*.parquet")]
    for each in artefacts:
        flip(each)
    both = [subprocess.Popen(bench, **options) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert (tmp_path / "r" / "tables" / "table-t.csv").read_bytes() == expected


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    path = small(tmp_path)
    before = os.umask(0o002)
    try:
        run = Ran(path)
        write(run.store, run.plan.manifest())
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(each.stat().st_mode) for each in run.store.root.rglob("*") if each.is_file()}
    assert modes == {0o664}
    modes = {stat.S_IMODE(each.stat().st_mode) for each in run.store.root.rglob("*") if each.is_dir()}
    assert modes == {0o775}


def test_kept_epochs_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        half_trained(small(tmp_path), monkeypatch)
    finally:
        os.umask(before)
    kept = list((tmp_path / "results" / "partial").rglob("*.safetensors"))
    assert {stat.S_IMODE(each.stat().st_mode) for each in kept} == {0o640}


def test_results_on_another_disk_are_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path / "suite")
    root, disk = tmp_path / "results", tmp_path / "disk"
    for kind in ("craft", "train"):
        (disk / kind).mkdir(parents=True)
        root.mkdir(exist_ok=True)
        (root / kind).symlink_to(disk / kind)
    rename = Path.rename

    def across(self: Path, target: Path) -> Path:
        one, other = (each.parent.resolve().is_relative_to(disk) for each in (self, Path(target)))
        if one != other:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", across)
    run = Ran(path, root)
    assert not run.failed
    expected = table(run)
    for place in disk.glob("*/*/*.safetensors"):
        flip(place)
    shutil.rmtree(root / "evaluate")
    recovers(path, root, expected)
    assert not [each for each in disk.glob("*/*") if each.name.startswith(".")]


def test_drafts_are_told_apart_by_machine_process_and_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    mine = durable.mark()
    _, host, pid, tail = mine.split("@")
    place, start, draw = tail.split("-")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = {
        "mine": mine,
        "another's that lives": f"@{host}@{sleeper.pid}@{place}-{durable._start(sleeper.pid)}-{draw}",
        "a container's of the same name": f"@{host}@{dead.pid}@00000000-{start}-{draw}",
        "another machine's": f"@elsewhere@{dead.pid}@{place}-{start}-{draw}",
        "an older version's that lives": f"@{host}@{pid}@abc",
        "no draft": "@a@b@c",
        "no draft either": f"@{host}@-3@{place}-{start}-{draw}",
        "a number of no process": f"@elsewhere@{'9' * 40}@abc",
    }
    swept = {
        "dead": f"@{host}@{dead.pid}@{place}-{start}-{draw}",
        "its number is another's by now": f"@{host}@{sleeper.pid}@{place}-1-{draw}",
        "an older version's": f"@{host}@{dead.pid}@abc",
        "another machine's of long ago": f"@elsewhere@{dead.pid}@{place}-{start}-{draw}x",
    }
    try:
        for name, mark in {**kept, **swept}.items():
            (scratch / f"craft-{name}{mark}").mkdir()
        long_ago = time.time() - durable.FORGOTTEN - 1
        (old,) = scratch.glob("craft-another machine's of long ago*")
        os.utime(old, (long_ago, long_ago))
        Store(tmp_path).open()
        assert {each.name for each in scratch.iterdir()} == {
            f"craft-{name}{mark}" for name, mark in kept.items()
        }
    finally:
        sleeper.kill()
        sleeper.wait()


def test_litter_is_swept_wherever_a_kill_leaves_it(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, whole, expected = finished
    root = copied(whole, tmp_path / "results")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _, host, _, tail = durable.mark().split("@")
    before = files(root)
    (root / "partial" / "key").mkdir(parents=True)
    done = next((root / "train").iterdir()).name
    (root / "partial" / done).mkdir()
    litter = [
        root / f".manifest.json.{dead.pid}",
        root / f".store.json.{dead.pid}",
        root / "partial" / "key" / f"draft-{dead.pid}.safetensors",
        root / "partial" / done / "epoch.safetensors",
        *(
            folder / f".draft@{host}@{dead.pid}@{tail}"
            for folder in (root, root / "tables", root / "failed", root / "partial" / "key", root / "train")
        ),
    ]
    for each in litter:
        each.parent.mkdir(exist_ok=True)
        each.write_text("half")
    living = root / f".manifest.json.{os.getpid()}"
    living.write_text("half")
    recovers(path, root, expected)
    durable.remove(root / index.NAME)
    assert files(root) == sorted([*before, living.name])
    assert not (root / "partial" / done).exists()


def test_a_discard_that_is_not_allowed_fails_nothing(
    finished: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = finished
    root = copied(whole, tmp_path / "results")
    place = next((root / "craft").iterdir())

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        Store(root).discard("craft", place.name)
    assert place.is_dir()
    Store(root).discard("craft", place.name)
    assert not place.exists()


def test_a_folder_in_the_place_of_a_small_file_is_replaced(tmp_path: Path) -> None:
    for name in ("table-t.csv", ".draft"):
        place = tmp_path / "tables" / name
        (place / "foreign").mkdir(parents=True)
        Store.write_text(place, "value")
        assert place.read_text() == "value"
    assert len(list((tmp_path / "tables").iterdir())) == 2


def test_writers_of_one_process_do_not_tear_a_file(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: Store.write_text(tmp_path / "manifest.json", text), texts * 3))
    assert (tmp_path / "manifest.json").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(Path("results"))
    store.open()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.keep("craft", "k", {}, {}, lambda path: path.write_text("one"))
    assert (tmp_path / "results" / "craft" / "k").is_dir()
    assert store.shown == Path("results")
    assert seal({"a": 1}) != seal({"a": 1}, "k")

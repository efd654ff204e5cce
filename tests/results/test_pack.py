"""A packed results folder says what it said before, every byte of it counts, and no kill tears it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from manifests import clean, condition, manifest
from pyarrow import parquet
from test_damage import HARMS, copied, flip

import bench
from bench.api import packing, running
from bench.errors import DamagedError, InputError
from bench.report import attack_cost, reports
from bench.report.render import to_csv, to_markdown
from bench.results import durable, pack
from bench.results.conditions import conditions_of
from bench.results.manifest import read, write
from bench.results.outcomes import schema
from bench.results.pack import RECEIPTS, ROWS, Entry, Pack, digest_of
from bench.results.store import ABSENT, SCHEME, Store
from bench.runner import executors
from bench.runner.executors.protocol import Asked
from bench.suite.layout import columns_read
from suites import TASK, Ran, suite

TABLES = {
    "t": {
        "title": "Accuracy",
        "rows": ["defense", "readout"],
        "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}},
        "extra": ["Min", "Worst"],
    },
    "top": {
        "title": "Largest logit",
        "metric": "top",
        "rows": ["defense"],
        "where": {"readout": "plain"},
        "columns": {"PGD": {"attack": "pgd"}},
    },
}
NEW = {**TABLES, "clean": {**TABLES["top"], "columns": {"Clean": {"attack": "clean"}}}}
"""With a table that reads logits of evaluations of which no other table does."""


def small(folder: Path, tables: dict[str, Any] = TABLES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}}
    path = suite(
        folder, {"linear": {"use": "toy/linear"}}, attacks, [{**TASK, "views": ["logits"]}], tables=tables
    )
    path.write_text(path.read_text().replace("size: 60", "size: 24").replace("shard: 25", "shard: 12"))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the suite and a finished results folder."""
    path = small(tmp_path_factory.mktemp("finished"))
    run = Ran(path)
    write(run.store, run.plan.manifest())
    assert not run.failed
    return path, run.store.root


def said(root: Path, path: Path) -> str:
    """Return all that a folder says in numbers: its tables, and what its attacks cost."""
    found = reports.reported(root, path, None)
    assert not found.notes
    assert not found.missing
    costs = attack_cost.written(reports.costs(root, path, None).costs, "json")
    return "".join([*map(to_csv, found.tables), *map(to_markdown, found.tables), costs])


def content(root: Path) -> tuple[bytes, bytes]:
    return (root / RECEIPTS).read_bytes(), (root / ROWS).read_bytes()


def keys(root: Path) -> list[str]:
    return sorted({each.job for each in conditions_of(read(root, Path("suite.yaml")))})


def frames(root: Path) -> dict[str, pd.DataFrame]:
    store = Store(root)
    return {key: store.outcomes(key).frame() for key in keys(root)}


# --- the same numbers --------------------------------------------------------------------------------


def test_a_packed_folder_says_the_same_to_the_byte(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    before, shown = said(root, path), bench.outcomes(root)
    rows, receipts = frames(root), {key: Store(root).receipt("evaluate", key) for key in keys(root)}
    jobs = {key: Store(root).job("evaluate", key) for key in keys(root)}
    found = packing.packed(root)
    assert found.evaluations == len(keys(root)) == 4
    assert not (root / "evaluate").exists()
    assert said(root, path) == before
    pd.testing.assert_frame_equal(bench.outcomes(root), shown)
    store = Store(root)
    read_of = columns_read(read(root, path), TABLES)
    for key in keys(root):
        assert store.receipt("evaluate", key) == receipts[key]
        assert store.job("evaluate", key) == jobs[key]
        kept = set(rows[key]) - {"logits", "thresholds"} | read_of.get(key, set())
        frame = store.outcomes(key).frame()
        assert set(frame) == kept
        pd.testing.assert_frame_equal(frame, rows[key][[name for name in rows[key] if name in kept]])
    assert sum(map(len, read_of.values())) == 1
    # Of four evaluations a table reads logits of one.
    assert found.notes == [
        "left out the logits of 3 evaluations, which no table reads",
        "left out the thresholds of 4 evaluations, which no table reads",
    ]
    logits = bench.outcomes(root, also=["logits"]).groupby("job")["logits"].count()
    assert sorted(logits) == [0, 0, 0, 24]


def test_nothing_is_done_again_after_packing_and_its_images_are_still_found(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    where = {"attack": "pgd", "readout": "plain"}
    before = bench.images(root, suite=path, **where)
    packing.packed(root)
    again = Ran(path, root)
    assert not again.state.todo
    assert not again.state.redo
    after = bench.images(root, suite=path, **where)
    assert (after.images == before.images).all()
    assert (after.label == before.label).all()
    # A clone has neither weights nor images, and no mark.
    for name in ("train", "craft"):
        shutil.rmtree(root / name)
    (root / "store.json").unlink()
    assert not Ran(path, root).state.todo
    (root / "store.json").write_text("what")
    assert Store(root).open() == [f"{root / 'store.json'} was damaged, and is written anew"]
    with pytest.raises(DamagedError, match="packed, and has no file of its own"):
        Store(root).artefact("evaluate", keys(root)[0])


def test_the_same_results_pack_to_the_same_bytes_once_and_again(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, whole = finished
    one, other = copied(whole, tmp_path / "one"), copied(whole, tmp_path / "other")
    packing.packed(one)
    packing.packed(other)
    assert content(one) == content(other)
    stamps = [(one / name).stat().st_mtime_ns for name in (RECEIPTS, ROWS)]
    inodes = [(one / name).stat().st_ino for name in (RECEIPTS, ROWS)]
    assert packing.packed(one).evaluations == 4
    assert stamps == [(one / name).stat().st_mtime_ns for name in (RECEIPTS, ROWS)]
    assert inodes == [(one / name).stat().st_ino for name in (RECEIPTS, ROWS)]
    assert sorted(each.name for each in one.iterdir() if each.is_file()) == sorted(
        [RECEIPTS, ROWS, "manifest.json", "store.json"]
    )


def test_what_a_run_adds_beside_a_pack_is_merged_by_the_next(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    at_once, root = copied(whole, tmp_path / "once"), copied(whole, tmp_path / "results")
    packing.packed(at_once)
    *_, late = keys(root)
    (root / "evaluate" / late).rename(tmp_path / "late")
    half = packing.packed(root)
    assert half.evaluations == 3
    assert (
        half.notes[0] == "1 of 4 evaluations are not there; bench run suite.yaml makes them, then pack again"
    )
    assert reports.reported(root, path, None).missing == 1
    (root / "evaluate").mkdir()
    shutil.copytree(tmp_path / "late", root / "evaluate" / late)
    assert said(root, path) == said(whole, path)
    packing.packed(root)
    assert content(root) == content(at_once)


def test_the_folder_of_an_evaluation_counts_before_a_packed_one(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    first, *_ = keys(root)
    (root / "evaluate" / first).mkdir(parents=True)
    assert Store(root).damage("evaluate", first) == "its receipt is missing"
    # The other way round a result that is made anew replaces the packed one when it is packed.
    again = Ran(path, root)
    assert [each.job.key for each in again.done] == [first]
    receipt = Store(root).receipt("evaluate", first)
    packing.packed(root)
    assert Store(root).receipt("evaluate", first) == pack.opened(root).receipt(first) == receipt
    assert receipt != Store(whole).receipt("evaluate", first)
    assert said(root, path) == said(whole, path)


def test_packed_results_of_older_code_are_made_again(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    first, *_ = keys(root)
    receipt = root / "evaluate" / first / "receipt.json"
    told = json.loads(receipt.read_text())
    told["sources"]["toys"] = "yesterday's"
    receipt.write_text(json.dumps(told))
    packing.packed(root)
    assert any("toys changed since" in note for note in reports.reported(root, path, None).notes)
    assert not Ran(path, root, trust=True).done
    again = Ran(path, root)
    assert list(again.state.redo.values()) == ["toys changed"]
    assert [each.job.key for each in again.done] == [first]
    # The old one left the pack before its successor began.
    assert first not in pack.opened(root)
    assert said(root, path) == said(whole, path)


def test_a_packed_result_can_be_discarded(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    store = Store(root)
    first, *others = keys(root)
    store.discard("evaluate", first)
    store.discard("evaluate", "unknown")
    assert store.receipt("evaluate", first) is None
    assert store.damage("evaluate", first) == ABSENT
    assert [store.damage("evaluate", key) for key in others] == [None] * 3
    assert not store.faults()


# --- columns that were left out ----------------------------------------------------------------------


def test_a_table_that_reads_what_was_left_out_makes_it_again(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, whole = finished
    path = small(tmp_path, NEW)
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    project = running.planned(path, root, None)
    # Other tables do not miss it.
    assert not running.prospect(project, ["t", "top"]).state.todo
    reasons = running.prospect(project, None).state.redo.values()
    assert list(reasons) == ["its logits were left out of the pack, and a table reads them"]
    # As a run does before its jobs.
    write(project.store, project.manifest)
    report = reports.reported(root, path, None)
    assert (report.missing, report.needed) == (1, 4)
    assert "its logits were left out of the pack" in report.notes[0]
    assert "not run" in to_markdown(report.tables[2])
    assert packing.packed(root).notes[-1] == (
        "1 evaluation lack columns that a table reads; the next run makes them again"
    )
    work = running.Run(project, running.Options(executors.ready("inline", Asked(["cpu"]))))
    work.do()
    assert [done.job.kind for done in work.ended] == ["evaluate"]
    assert said(root, path) == said_of_a_new_run(path, tmp_path)
    expected = said(root, path)
    packing.packed(root)
    assert said(root, path) == expected
    assert not running.prospect(project, None).state.todo


def said_of_a_new_run(path: Path, folder: Path) -> str:
    run = Ran(path, folder / "new")
    write(run.store, run.plan.manifest())
    found = reports.reported(run.store.root, path, None)
    costs = reports.costs(folder / "results", path, None).costs
    tables = [*map(to_csv, found.tables), *map(to_markdown, found.tables)]
    # What it cost is told by the clock.
    return "".join([*tables, attack_cost.written(costs, "json")])


def test_lists_are_kept_for_the_clean_images_too_where_a_metric_reads_them_there() -> None:
    near = {"attack": "ddn", "kind": "minimum-norm", "norm": "l2"}
    points = [
        clean("c"),
        condition("d", **near),
        condition("p", norm="l2"),
        condition("q", norm="l2", readout="other"),
    ]
    table = {
        "title": "x",
        "metric": "logit",
        "rows": {"a": {"class": 1}},
        "where": {"readout": "last"},
        "columns": {"DDN": {"attack": "ddn"}, "PGD": {"attack": "pgd", "metric": "accuracy"}},
    }
    assert columns_read(manifest(points, table), ["T"]) == {"c": {"logits"}, "d": {"logits"}}


# --- damage ------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_wherever_it_is_and_no_altered_row_is_read(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    receipts, rows = content(root)
    truth = Pack(receipts, [rows])
    assert not truth.faults()
    digests = {key: digest_of(truth.table(key)) for key in truth.keys}
    harmed = 0
    for place in spread(len(receipts)):
        for bit in (1, 32):
            found = Pack(flipped(receipts, place, bit), [rows])
            assert found.faults(), place
    for place in spread(len(rows)):
        found = Pack(receipts, [flipped(rows, place, 1)])
        assert found.faults(), place
        for key in found.keys:
            if found.damage(key) is None:
                assert digest_of(found.table(key)) == digests[key], place
            else:
                harmed += 1
    assert harmed


def spread(size: int) -> list[int]:
    """Return every place at both ends of a file, and each 53rd between."""
    return sorted({*range(min(size, 300)), *range(0, size, 53), *range(max(0, size - 300), size)})


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


@pytest.mark.parametrize("name", [RECEIPTS, ROWS])
@pytest.mark.parametrize("harm", HARMS)
def test_any_harm_to_a_packed_folder_ends_in_the_same_tables(
    name: str, harm: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    HARMS[harm](root / name)
    report = reports.reported(root, path, None)
    assert report.notes or report.missing
    again = Ran(path, root)
    assert not again.failed
    assert not Ran(path, root).done
    packing.packed(root)
    assert said(root, path).splitlines()[0] == said(whole, path).splitlines()[0]
    assert tables(root, path) == tables(whole, path)
    assert not Store(root).faults()


def tables(root: Path, path: Path) -> list[str]:
    return [to_csv(each) for each in reports.reported(root, path, None).tables]


def altered(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    """Return a harm that edits the lines of the receipts."""

    def harm(root: Path) -> None:
        lines = [json.loads(each) for each in (root / RECEIPTS).read_text().splitlines()]
        change(lines)
        (root / RECEIPTS).write_text("".join(json.dumps(each) + "\n" for each in lines))

    return harm


EDITS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str | None]] = {
    "a line is gone": (lambda lines: lines.pop(1), ABSENT),
    "a source": (lambda lines: lines[1]["receipt"]["sources"].update(toys="x"), "its line"),
    "a time": (lambda lines: lines[1]["receipt"].update(seconds=0), "its line"),
    "a job": (lambda lines: lines[1]["job"].update(readout="other"), "its line"),
    "rows of another": (lambda lines: lines[1].update(start=lines[2]["start"]), "its line"),
    "a key": (lambda lines: lines[1].update(key=lines[2]["key"]), ABSENT),
    "only spaces": (lambda lines: None, None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_line_is_found_and_names_its_evaluation(
    edit: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    first, *_ = keys(root)
    change, expected = EDITS[edit]
    altered(change)(root)
    if expected is None:
        (root / RECEIPTS).write_text((root / RECEIPTS).read_text().replace(": ", ":  "))
    reason = Store(root).damage("evaluate", first)
    assert reason == expected or (reason or "").startswith(expected or "?")
    report = reports.reported(root, path, None)
    assert any(f"{RECEIPTS} is cut short or altered" in note for note in report.notes)
    assert report.missing >= (expected is not None)


def test_damage_that_concerns_no_row_is_mended_by_packing_again(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    before = content(root)
    # The magic number at the begin of a parquet file is read by nobody.
    flip(root / ROWS, 0)
    assert tables(root, path) == tables(whole, path)
    (note,) = reports.reported(root, path, None).notes
    assert note == (
        f"{root}: {ROWS} is cut short or altered, or not the file that {RECEIPTS} names; what is whole of it "
        f"counts, and bench pack {root} writes it anew"
    )
    assert Store(root).open() == [note]
    packing.packed(root)
    assert content(root) == before


# --- what cannot be packed ---------------------------------------------------------------------------


def test_what_cannot_be_packed_is_said_in_a_sentence(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, whole = finished
    with pytest.raises(InputError, match=r"nothing was run in .* yet; first: bench run"):
        packing.packed(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(InputError, match="not a manifest of Crossfire"):
        packing.packed(tmp_path / "foreign")
    assert [each.name for each in (tmp_path / "foreign").iterdir()] == ["manifest.json"]
    planned = copied(whole, tmp_path / "planned")
    shutil.rmtree(planned / "evaluate")
    with pytest.raises(InputError, match=r"nothing was evaluated there yet: bench run suite\.yaml"):
        packing.packed(planned)
    damaged = copied(whole, tmp_path / "damaged")
    first, second, *_ = keys(damaged)
    flip(damaged / "evaluate" / second / "outcomes.parquet")
    with pytest.raises(
        InputError, match=rf"evaluate {second} \(.*\): outcomes.parquet is cut short or altered; "
    ):
        packing.packed(damaged)
    flip(damaged / "evaluate" / first / "job.json")
    with pytest.raises(InputError, match=rf"evaluate {first} .*, and 1 more are damaged; make it again with"):
        packing.packed(damaged)
    assert (damaged / "evaluate" / first).is_dir()
    assert not (damaged / ROWS).exists()


def test_a_pack_of_another_layout_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    (root / "store.json").unlink()
    pack.write(root, entries(2), SCHEME + 1)
    with pytest.raises(InputError, match="newer Crossfire"):
        Store(root).open()
    pack.write(root, entries(2), SCHEME - 1)
    with pytest.raises(InputError, match="no longer read"):
        Store(root).open()


def test_evaluations_that_the_manifest_does_not_name_are_left_where_they_are(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")
    packing.packed(root)
    store, told = Store(root), read(root, path)
    fewer = [each for each in told["conditions"] if each["coordinates"]["readout"] == "plain"]
    write(store, {**told, "conditions": fewer})
    store.keep("evaluate", "other", {}, {}, lambda place: place.write_bytes(b"x"))
    found = packing.packed(root)
    assert found.evaluations == 2
    assert found.notes[-2:] == [
        "left out 2 packed evaluations that the manifest does not name",
        f"1 evaluation that the manifest does not name stay in {root / 'evaluate'}",
    ]
    assert store.damage("evaluate", "other") is None


# --- the format --------------------------------------------------------------------------------------


def entries(count: int, n: int = 5) -> list[Entry]:
    draw = np.random.default_rng(0)
    return [
        Entry(
            f"k{number}",
            {"a": number},
            {"files": {}},
            pa.table({"index": np.arange(n), "l2": draw.normal(size=n)}),
            (),
        )
        for number in range(count)
    ]


def test_columns_come_back_as_they_were_whatever_the_notes_of_others_are_called(tmp_path: Path) -> None:
    tables = [
        pa.table(
            {
                "index": [1, 2],
                "note": [1, None],
                "logits": pa.array([[1.0, float("nan")], None], pa.list_(pa.float32())),
            }
        ),
        pa.table({"index": [3], "note": [0.5], "job": ["mine"], "note (int64)": [True]}),
        pa.table(
            {"index": [], "note": pa.array([], pa.bool_())},
            schema=pa.schema({"index": pa.int64(), "note": pa.bool_()}),
        ),
        pa.table(
            {
                "index": [4],
                "note (double)": [7],
                "flag": [None],
                "logits": pa.array([[2.0]], pa.list_(pa.float32())),
            }
        ),
        pa.table({"index": [5, 6], "note": [2, -(2**60) - 1]}),
    ]
    given = [Entry(f"k{number}", {}, {}, table, ()) for number, table in enumerate(tables)]
    pack.write(tmp_path, reversed(given), SCHEME)
    found = pack.opened(tmp_path)
    assert found.keys == [each.key for each in given]
    for each in given:
        back = found.table(each.key)
        assert back.column_names == each.rows.column_names
        for name in back.column_names:
            kinds = [table.schema.field(name).type for table in (back, each.rows)]
            assert kinds[0] == kinds[1]
            assert str(back[name].to_pylist()) == str(each.rows[name].to_pylist())
    # Anybody can read the file: the key of each row stands in it.
    frame = parquet.read_table(tmp_path / ROWS)
    assert frame["job"].to_pylist()[:3] == ["k0", "k0", "k1"]


@pytest.mark.parametrize(
    "change",
    [
        {"index": [1, 3]},
        {"value": [0.5, 0.25]},
        {"value": [0.5, 0.0]},
        {"list": [[1.0, 2.0], None]},
        {"list": [[1.0], [2.0]]},
        {"flag": [True, False]},
        {"text": ["a", "c"]},
        {"index": pa.array([1, 2], pa.int32())},
    ],
)
def test_the_digest_of_rows_sees_every_value(change: dict[str, Any]) -> None:
    told: dict[str, Any] = {
        "index": [1, 2],
        "value": [0.5, None],
        "list": [[1.0, 2.0], []],
        "flag": [True, None],
        "text": ["a", "b"],
    }
    one = digest_of(pa.table(told))
    assert digest_of(pa.table({**told, **change})) != one
    assert digest_of(pa.table(dict(reversed(told.items())))) != one
    # However the values are cut in pieces.
    pieces = pa.concat_tables([pa.table(told).slice(0, 1), pa.table(told).slice(1)])
    assert pieces["index"].num_chunks == 2
    assert digest_of(pieces) == one


def test_a_large_folder_packs_to_less_than_a_quarter(tmp_path: Path) -> None:
    """As many numbers as a suite has, of which scores and lengths are drawn and cannot be compressed."""
    store, draw, n = Store(tmp_path), np.random.default_rng(0), 1000
    store.open()
    points = [condition(f"{number:032x}", seed=number) for number in range(30)]
    table = {"title": "x", "rows": ["defense"], "columns": {"PGD": {"attack": "pgd"}}}
    told = {
        **manifest(points, table),
        **{"scheme": SCHEME, "suite": "s", "file": "s.yaml", "suite_digest": ""},
        **{name: {} for name in ("sources", "files", "data", "defenses", "attacks")},
    }
    write(store, told)
    known = schema()
    # Of a defense that is asked once.
    known = known.remove(known.get_field_index("broken_share"))
    for point in points:
        rows = pa.table(outcome(draw, n), schema=known)
        store.keep(
            "evaluate",
            point["job"],
            {},
            {},
            lambda path, rows=rows: parquet.write_table(rows, path, compression="zstd"),
        )
    before = sum(each.stat().st_size for each in tmp_path.rglob("evaluate/*/*"))
    found = packing.packed(tmp_path)
    assert sum(found.sizes.values()) == sum((tmp_path / name).stat().st_size for name in (ROWS, RECEIPTS))
    # A score has 4 bytes, the length in l2 has 8, places and labels have 2.
    assert found.sizes[ROWS] < 30 * n * (4 + 8 + 2)
    assert sum(found.sizes.values()) < before / 4


def outcome(draw: np.random.Generator, n: int) -> dict[str, Any]:
    """Return columns of an evaluation with ten classes."""
    return {
        "index": np.arange(n),
        "target": [None] * n,
        "truth": np.arange(n) % 10,
        "label": draw.integers(0, 10, n),
        "rejected": np.zeros(n, bool),
        "score": draw.uniform(size=n).astype(np.float32),
        "logits": list(draw.normal(size=(n, 10)).astype(np.float32)),
        "thresholds": [np.arange(10, dtype=np.float32)] * n,
        "l0": np.full(n, 784),
        "l2": draw.uniform(size=n),
        "linf": np.full(n, 0.1),
        "distance": np.full(n, 0.1),
        "invalid": np.zeros(n, bool),
        "forwards": np.full(n, 40.0),
        "backwards": np.full(n, 40.0),
        "differs": [False] * 32 + [None] * (n - 32),
        "parameters": np.full(n, 10_000),
    }


def test_rows_that_would_read_back_otherwise_are_not_packed(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = finished
    root = copied(whole, tmp_path / "results")
    spelled = pack._parquet

    def lossy(given: Any) -> bytes:
        found = parquet.read_table(io.BytesIO(spelled(given)))
        place = found.column_names.index("l2")
        sink = io.BytesIO()
        parquet.write_table(
            found.set_column(place, "l2", found["l2"].cast(pa.float32()).cast(pa.float64())), sink
        )
        return sink.getvalue()

    monkeypatch.setattr(pack, "_parquet", lossy)
    with pytest.raises(RuntimeError, match="reads back otherwise than it was packed"):
        packing.packed(root)
    assert len(list((root / "evaluate").iterdir())) == 4
    assert not (root / RECEIPTS).exists()


def test_results_that_change_while_they_are_packed_are_not_lost(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run makes an evaluation anew between its packing and the removal of its folder."""
    _, whole = finished
    root = copied(whole, tmp_path / "results")
    first, *others = keys(root)
    done = pack.write

    def meanwhile(*given: Any) -> None:
        done(*given)
        receipt = root / "evaluate" / first / "receipt.json"
        told = json.loads(receipt.read_text())
        told["sources"]["toys"] = "newer"
        receipt.write_text(json.dumps(told))

    monkeypatch.setattr(pack, "write", meanwhile)
    packing.packed(root)
    assert [each.name for each in (root / "evaluate").iterdir()] == [first]
    assert (Store(root).receipt("evaluate", first) or {})["sources"]["toys"] == "newer"
    assert all(Store(root).damage("evaluate", key) is None for key in others)


# --- kills -------------------------------------------------------------------------------------------

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import pyarrow as pa
from pyarrow import parquet
from bench.api import packing
pa.set_cpu_count(1)
assert "torch" not in sys.modules
whole, place = Path(sys.argv[1]), Path(sys.argv[2])
LOUD = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
for moment in range(10_000):
    root = place / str(moment)
    shutil.copytree(whole, root)
    child = os.fork()
    if child == 0:
        count = 0
        def kill(event, details):
            global count
            writes = event == "open" and isinstance(details[1], str) and details[1] not in ("r", "rb")
            if event in LOUD or writes:
                count += 1
                if count > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        packing.packed(root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.parametrize("begun", ["folders", "mixed"])
def test_a_kill_at_any_moment_leaves_every_evaluation_whole(
    begun: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "begin")
    if begun == "mixed":
        # A pack of three with an older receipt of one, whose folder and a fourth lie beside it.
        first, *_, last = keys(root)
        (root / "evaluate" / last).rename(tmp_path / "last")
        receipt = root / "evaluate" / first / "receipt.json"
        told = json.loads(receipt.read_text())
        receipt.write_text(json.dumps({**told, "sources": {**told["sources"], "toys": "older"}}))
        packing.packed(root)
        (root / "evaluate").mkdir()
        (tmp_path / "last").rename(root / "evaluate" / last)
        shutil.copytree(whole / "evaluate" / first, root / "evaluate" / first)
    durable.remove(root / "train")
    durable.remove(root / "craft")
    expected = said(root, path)
    undisturbed = copied(root, tmp_path / "undisturbed")
    packing.packed(undisturbed)
    killed = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", KILLER, str(root), str(killed)], check=True, timeout=300)
    moments = sorted(killed.iterdir(), key=lambda each: int(each.name))
    assert len(moments) > 10
    switched = 0
    for moment in moments:
        # Before anything else reads, and so sweeps, it.
        assert said(moment, path) == expected, moment.name
        switched += (moment / RECEIPTS).exists() and content(moment)[0] == content(undisturbed)[0]
        packing.packed(moment)
        assert content(moment) == content(undisturbed)
        assert not (moment / "evaluate").exists()
        assert {each.name for each in moment.iterdir()} == {each.name for each in undisturbed.iterdir()}
        assert not list((moment / "scratch").iterdir())
    assert 0 < switched < len(moments)


SEEN: dict[str, int] = {}
"""How often something was there to be harmed."""


def histories(path: Path, whole: Path, expected: list[str]) -> type[RuleBasedStateMachine]:
    class Folder(RuleBasedStateMachine):
        """Packing, damage, losses and runs in any order."""

        def __init__(self) -> None:
            super().__init__()
            self.root = copied(whole, Path(tempfile.mkdtemp()) / "results")

        @initialize(begun=st.booleans())
        def begin(self, begun: bool) -> None:
            if begun:
                packing.packed(self.root)

        @rule()
        def pack(self) -> None:
            try:
                packing.packed(self.root)
            except InputError as error:
                refused = str(error)
            else:
                return
            assert re.search("nothing was evaluated there|make it again with", refused)

        @rule(number=st.integers(0, 100), harm=st.sampled_from(sorted(HARMS)))
        def damage_a_folder(self, number: int, harm: str) -> None:
            self.damage("evaluate/*/*", number, harm)

        @rule(
            what=st.sampled_from(["*.jsonl", "*.parquet"]),
            number=st.integers(0, 100),
            harm=st.sampled_from(sorted(HARMS)),
        )
        def damage(self, what: str, number: int, harm: str) -> None:
            found = sorted(each for each in self.root.glob(what) if each.is_file() and each.stat().st_size)
            if found:
                SEEN[what] = SEEN.get(what, 0) + 1
                HARMS[harm](found[number % len(found)])

        @rule(number=st.integers(0, 100), packed=st.booleans())
        def lose(self, number: int, packed: bool) -> None:
            key = keys(self.root)[number % 4]
            if packed:
                Store(self.root).discard("evaluate", key)
            else:
                durable.remove(self.root / "evaluate" / key)

        @rule(number=st.integers(0, 100))
        def begin_an_evaluation(self, number: int) -> None:
            (self.root / "evaluate" / keys(self.root)[number % 4]).mkdir(parents=True, exist_ok=True)

        @rule()
        def run(self) -> None:
            run = Ran(path, self.root)
            assert not run.failed
            assert tables(self.root, path) == expected
            assert not Ran(path, self.root).done

        def teardown(self) -> None:
            self.run()
            packing.packed(self.root)
            assert tables(self.root, path) == expected
            assert not Store(self.root).faults()
            shutil.rmtree(self.root.parent)

    return Folder


def test_any_history_with_packing_ends_in_the_tables_of_an_undisturbed_run(
    finished: tuple[Path, Path],
) -> None:
    path, whole = finished
    run_state_machine_as_test(
        histories(path, whole, tables(whole, path)),
        settings=settings(
            max_examples=40,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Which of them is drawn how often differs with the modules that are loaded.
    assert sum(SEEN.values()) > 10, SEEN


# --- the command -------------------------------------------------------------------------------------


def test_the_command_packs_and_a_strict_report_still_finds_damage(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = finished
    root = copied(whole, tmp_path / "results")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench.cli", *words]
        there = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=there)

    strict = ("report", str(path), "--results", str(root), "--strict")
    before = call(*strict)
    assert before.returncode == 0, before.stderr
    made = call("pack", str(root))
    assert made.returncode == 0, made.stderr
    assert f"4 evaluations packed in {root}: {ROWS} (0.0" in made.stdout
    assert "note: left out the logits of 3 evaluations, which no table reads" in made.stderr
    after = call(*strict)
    assert (after.returncode, after.stdout) == (0, before.stdout)
    flip(root / ROWS, 0.5)
    harmed = call(*strict)
    assert harmed.returncode == 4
    assert ROWS in harmed.stderr
    wrong = call("pack", str(tmp_path / "nowhere"))
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr

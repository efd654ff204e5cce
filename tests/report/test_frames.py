"""Tables and outcomes as data frames: the numbers are those of the CSV file and of the outcome files."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from manifests import clean, condition, first, manifest, paper, rows

from bench.errors import InputError
from bench.report import frames, render, tables
from bench.report.tables import unexamined
from bench.results.manifest import write
from suites import TASK, Ran, suite

TABLES = {"one": {"title": "One", "rows": ["defense", "readout"], "columns": ["attack"]}}
ATTACKS = {"clean": {"use": "none"}, "fgsm": {"use": "fgsm"}, "some": {"use": "fgsm", "targets": [1, 4]}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("frames")
    path = suite(
        folder, {"net": {"use": "toy/linear"}}, ATTACKS, [{**TASK, "views": ["scaled"]}], tables=TABLES
    )
    made = Ran(path)
    assert not made.failed
    write(made.store, made.plan.manifest())
    return made


def test_a_table_is_a_frame_with_its_rows_and_columns_in_their_units() -> None:
    conditions = [clean("c", n=10), condition("a", n=10), condition("b", attack="spsa", access="score", n=10)]
    table = {"title": "Title", "rows": ["defense", "readout"], "columns": ["attack"], "extra": ["Min"]}
    outcomes = {"c": rows(first(10, 9), moved=False), "a": rows(first(10, 4))}
    frame = frames.frame_of(tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined))
    assert frame.index.names == ["defense", "readout"]
    assert list(frame.columns) == ["clean", "pgd", "spsa", "Min"]
    assert frame.loc[("cnn", "last"), ["clean", "pgd", "Min"]].tolist() == [90, 40, 40]
    assert math.isnan(frame.loc[("cnn", "last"), "spsa"])
    assert frame.attrs["title"] == "Title"
    assert set(frame.attrs["units"].values()) == {"percent"}
    # Attributes are plain values: pandas compares them when frames are joined.
    assert len(pd.concat([frame, frame])) == 2


def test_rows_with_headings_have_one_index_and_a_median_may_be_infinite() -> None:
    table = {
        "title": "x",
        "rows": {"Ours": {"defense": "cnn"}},
        "columns": {"CW": {}},
        "metric": "distance",
    }
    given = manifest([condition("a", radius=None, kind="minimum-norm")], table)
    frame = frames.frame_of(tables.cut(given, "T", {"a": rows(first(4, 3))}.get, unexamined))
    assert (frame.index.name, frame.loc["Ours", "CW"]) == ("row", math.inf)


def test_details_are_those_of_the_csv() -> None:
    given, outcomes = paper(n=60)
    del outcomes["pgd-e2e-cnnf-avg-0"]
    table = tables.cut(given, "T", outcomes.get, unexamined)
    details = frames.details_of(table)
    written = pd.read_csv(io.StringIO(render.to_csv(table)), keep_default_na=False)
    assert list(details.columns) == list(written.columns)
    for name in ("value", "std", "low", "high", "n", "seeds"):
        there = written[name] != ""
        assert details[name].notna().tolist() == there.tolist()
        assert details[name][there].astype(float).tolist() == written[name][there].astype(float).tolist()
    assert details["flags"].tolist() == written["flags"].tolist()
    frame = frames.frame_of(table)
    np.testing.assert_array_equal(frame.to_numpy().ravel(), details["value"].to_numpy())


def test_a_table_is_read_from_a_results_folder(ran: Ran) -> None:
    frame = frames.frame_of(frames.read_table(ran.store.root, "one"))
    rows_ = ran.outcomes(attack="fgsm", readout="plain")
    share = (rows_["label"] == rows_["truth"]).mean()
    assert frame.loc[("net", "plain"), "fgsm"] == pytest.approx(100 * share)
    with pytest.raises(InputError, match="no table 'ones'; did you mean 'one'"):
        frames.read_table(ran.store.root, "ones")


def test_every_example_of_every_condition_stands_with_its_coordinates(ran: Ran) -> None:
    frame = frames.outcomes_frame(ran.store.root)
    conditions = ran.plan.manifest()["conditions"]
    assert len(frame) == sum(each["facts"]["n"] for each in conditions)
    assert frame.attrs["notes"] == []
    assert "logits" not in frame
    for each in conditions:
        at = {**each["coordinates"], "target_offset": each["coordinates"]["target"]}
        del at["target"]
        mask = pd.Series(True, index=frame.index)
        for name, value in at.items():
            mask &= frame[name].isna() if value is None else frame[name] == value
        own = frame[mask]
        stored = pd.read_parquet(ran.store.folder("evaluate", each["job"]) / "outcomes.parquet")
        assert own["job"].unique().tolist() == [each["job"]]
        for name in ("index", "truth", "label", "rejected", "invalid", "l2", "distance", "forwards"):
            assert own[name].tolist() == stored[name].tolist(), name
        assert own["target"].isna().tolist() == stored["target"].isna().tolist()
        assert own["differs"].isna().tolist() == stored["differs"].isna().tolist()
        refused = np.where(stored["rejected"], stored["distance"] > 0, stored["label"] == stored["truth"])
        assert own["correct"].tolist() == refused.tolist()


def test_lists_are_read_where_they_are_asked_for(ran: Ran) -> None:
    frame = frames.outcomes_frame(ran.store.root, also=["logits"])
    assert {len(each) for each in frame["logits"]} == {10}
    with pytest.raises(InputError, match="unknown column 'logit'; did you mean 'logits'"):
        frames.outcomes_frame(ran.store.root, also=["logit"])


def test_what_was_not_run_or_is_damaged_is_not_there_and_said(ran: Ran, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "suite"
    shutil.copytree(ran.store.root, root)
    jobs = sorted({each["job"] for each in ran.plan.manifest()["conditions"]})
    (root / "evaluate" / jobs[0] / "outcomes.parquet").write_bytes(b"PAR1")
    shutil.rmtree(root / "evaluate" / jobs[1])
    frame = frames.outcomes_frame(root)
    assert not {jobs[0], jobs[1]} & set(frame["job"])
    (note,) = frame.attrs["notes"]
    assert note.startswith(f"evaluate {jobs[0]}: outcomes.parquet is cut short or altered")
    shutil.rmtree(root / "evaluate")
    with pytest.raises(InputError, match=r"nothing was evaluated there yet: bench run suite\.yaml"):
        frames.outcomes_frame(root)
    (root / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"nothing was run in .* yet; first: bench run"):
        frames.read_table(root, "one")


def test_notes_and_parameters_that_only_some_have_are_missing_elsewhere(tmp_path: Path) -> None:
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 2}}
    defenses = {
        "net": {"use": "toy/linear"},
        "warm": {"use": "toy/linear", "inference": {"threshold": [0.2, 0.5]}},
    }
    made = Ran(suite(tmp_path, defenses, attacks, [{**TASK, "views": ["scaled"]}], tables={}))
    assert not made.failed
    write(made.store, made.plan.manifest())
    frame = frames.outcomes_frame(made.store.root)
    assert frame["flat"][frame["attack"] == "clean"].isna().all()
    assert frame["flat"][frame["attack"] == "pgd"].notna().all()
    assert frame["inference.threshold"][frame["defense"] == "net"].isna().all()
    assert set(frame["inference.threshold"][frame["defense"] == "warm"]) == {0.2, 0.5}


def test_pandas_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, bench.report.frames; print(sorted({'pandas', 'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []

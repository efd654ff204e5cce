"""Manifests of tables, and `bench verify`: planted damage of every kind is found, named and ends with 4."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Bench, called_by

from bench import cli
from bench.api import packing
from bench.report import provenance, rebuilt, tables
from bench.results.manifest import read
from bench.results.seals import seal
from bench.results.store import Store
from suites import TASK, suite

REPOSITORY = Path(__file__).parents[2]
TABLES = {
    "a/1": {
        "title": "Accuracy of a toy | of nobody",
        "rows": ["defense"],
        "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}},
        "extra": ["Min", "Worst"],
    },
    "clean": {"title": "Unmoved images", "rows": ["defense"], "columns": {"Clean": {"attack": "clean"}}},
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that calls the command line in this process."""

    return called_by(monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a suite and a finished run of it, its tables and their manifests."""
    home = tmp_path_factory.mktemp("finished")
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}}
    task = {**TASK, "views": ["logits"], "readouts": ["plain"], "seeds": [0, 1]}
    suite(home, {"linear": {"use": "toy/linear"}}, attacks, [task], tables=TABLES)
    words = ["run", str(home / "suite.yaml"), "--results", str(home / "results"), "--executor", "inline"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the finished folder, which is the working directory."""
    shutil.copytree(finished, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def manifest_of(home: Path, name: str = "table-a-1") -> dict[str, Any]:
    return dict(json.loads((home / "results" / "tables" / f"{name}.manifest.json").read_text()))


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a manifest, and seal it again."""
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), **changes}), indent=1) + "\n")


def evaluations(home: Path) -> list[Path]:
    return sorted((home / "results" / "evaluate").iterdir())


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


# --- the manifest ------------------------------------------------------------------------------------


def test_a_manifest_stands_beside_the_files_of_each_table(home: Path) -> None:
    names = {path.name for path in (home / "results" / "tables").iterdir()}
    assert names == {
        f"table-{key}{ending}" for key in ("a-1", "clean") for ending in (".csv", ".md", ".manifest.json")
    }
    told, store = manifest_of(home), Store(home / "results")
    assert told == seal(told)
    assert (told["suite"], told["file"], told["tables"], told["seeds"]) == (
        "suite",
        "suite.yaml",
        ["a/1"],
        [0, 1],
    )
    assert told["suite_digest"] == hashlib.sha256((home / "suite.yaml").read_bytes()).hexdigest()
    for name, each in told["files"].items():
        content = (home / "results" / "tables" / name).read_bytes()
        assert each["sha256"] == hashlib.sha256(content).hexdigest()
    # Every outcome that the table reads, with what its own receipt says.
    assert set(told["outcomes"]) == tables.jobs(read(home / "results", home / "suite.yaml"), "a/1")
    assert len(told["outcomes"]) == 4
    for key, each in told["outcomes"].items():
        receipt = json.loads((home / "results" / "evaluate" / key / "receipt.json").read_text())
        assert receipt == store.receipt("evaluate", key)
        assert (each["when"], each["device"]) == (receipt["when"], receipt["device"])
        content = (home / "results" / "evaluate" / key / "outcomes.parquet").read_bytes()
        assert each["rows"] == hashlib.sha256(content).hexdigest()
        assert told["versions"][each["versions"]] == receipt["versions"]
    seconds = [each["seconds"] for each in told["outcomes"].values()]
    assert told["seconds"]["evaluating"] == pytest.approx(sum(seconds), abs=1e-9)
    assert told["missing"] == {}
    assert {"python", "torch", "numpy", "crossfire-bench"} <= told["written"]["versions"].keys()


def test_a_second_run_changes_nothing_of_it(bench: Bench, home: Path) -> None:
    before = {path: path.read_bytes() for path in (home / "results" / "tables").iterdir()}
    assert bench("run", "suite.yaml", "--results", "results", "--executor", "inline").code == 0
    assert {path: path.read_bytes() for path in (home / "results" / "tables").iterdir()} == before


def test_packing_changes_no_table_and_no_manifest(bench: Bench, home: Path) -> None:
    before = {path: path.read_bytes() for path in (home / "results" / "tables").iterdir()}
    packing.packed(home / "results")
    assert not (home / "results" / "evaluate").exists()
    found = bench("verify", "results")
    assert found.code == 0, found.said
    assert bench("run", "suite.yaml", "--results", "results", "--executor", "inline").code == 0
    assert {path: path.read_bytes() for path in (home / "results" / "tables").iterdir()} == before


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "json", "latex"])
@pytest.mark.parametrize("more", [[], ["--cost"], ["--published"], ["--paper", "cnnf/3"]])
def test_what_a_report_writes_has_one_too_and_is_rebuilt(
    bench: Bench, home: Path, form: str, more: list[str]
) -> None:
    report = ("report", "suite.yaml", "--results", "results", "--format", form, "--out", "t.json", *more)
    if form == "latex" and more:
        assert bench(*report).code == 2
        return
    assert bench(*report).code == 0
    told = json.loads((home / "t.json.manifest.json").read_text())
    assert told["files"]["t.json"]["format"] == form
    assert told["results"] == "results"
    found = bench("verify", "t.json.manifest.json")
    assert (found.code, found.out) == (0, "1 file of tables rebuilt: bit for bit what the outcomes say\n")
    (home / "t.json").write_text((home / "t.json").read_text() + " ")
    assert bench("verify", "t.json.manifest.json").code == 4


def test_a_drawn_table_has_its_digest(bench: Bench, home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.report.render.draw", lambda _, out: out.write_text("<svg/>"))
        drawn = (
            "report",
            "suite.yaml",
            "--results",
            "results",
            "--table",
            "clean",
            "--format",
            "svg",
            "--out",
            "t.svg",
        )
        assert bench(*drawn).code == 0
    assert bench("verify", "t.svg.manifest.json").code == 0
    (home / "t.svg").write_text("<svg />")
    found = bench("verify", "t.svg.manifest.json")
    assert found.code == 4
    assert "t.svg is not the file that was written" in found.said


# --- what verify finds -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["results"], ["suite.yaml", "--results", "results"], ["."]])
def test_a_whole_folder_is_said_to_be_whole(bench: Bench, home: Path, words: list[str]) -> None:
    found = bench("verify", *words)
    assert (found.code, found.err) == (0, "")
    assert "4 files of tables rebuilt: bit for bit what the outcomes say" in found.out
    assert "damaged" in found.out
    del home


@pytest.mark.parametrize("name", ["outcomes.parquet", "receipt.json", "job.json"])
@pytest.mark.parametrize("words", [["results"], ["suite.yaml", "--results", "results"]])
def test_one_byte_of_an_outcome_is_found(bench: Bench, home: Path, name: str, words: list[str]) -> None:
    # In the middle of a receipt lie the digests of sources, which its own digest does not cover.
    place = evaluations(home)[1]
    flip(place / name)
    found = bench("verify", *words)
    assert found.code == 4
    assert place.name[:8] in found.out
    assert "altered" in found.out or "result of another job" in found.out
    if words == ["results"] and name == "outcomes.parquet":
        assert f"evaluate {place.name} (" in found.out
        assert "make it again with: bench run suite.yaml --results results" in found.said


@pytest.mark.parametrize("kind", ["train", "craft"])
def test_one_byte_of_weights_or_images_is_found(bench: Bench, home: Path, kind: str) -> None:
    (file, *_) = sorted((home / "results" / kind).glob("*/*.safetensors"))
    flip(file)
    found = bench("verify", "results")
    assert found.code == 4
    assert f"{kind} {file.parent.name}: {file.name} is cut short or altered" in found.said
    # The tables are cut from outcomes alone.
    assert "bit for bit" in found.out


def test_a_removed_receipt_is_found(bench: Bench, home: Path) -> None:
    place = evaluations(home)[0]
    (place / "receipt.json").unlink()
    found = bench("verify", "results")
    assert found.code == 4
    assert f"evaluate {place.name}" in found.said
    assert "its receipt is missing" in found.said


def test_a_removed_outcome_is_found_by_the_tables(bench: Bench, home: Path) -> None:
    place = evaluations(home)[0]
    shutil.rmtree(place)
    found = bench("verify", "results")
    assert found.code == 4
    assert f"evaluate {place.name}" in found.said
    assert "which it was made from, is not there now" in found.said


def test_an_exchanged_outcome_is_found_although_it_is_whole(bench: Bench, home: Path) -> None:
    place = evaluations(home)[0]
    receipt = json.loads((place / "receipt.json").read_text())
    (place / "receipt.json").write_text(
        json.dumps(seal({**receipt, "seconds": 0.5}, "evaluate", place.name), indent=1)
    )
    found = bench("verify", "results")
    assert found.code == 4
    assert f"evaluate {place.name}" in found.said
    assert "was made again since, or altered" in found.said
    # No result is damaged, and no number is another.
    assert "none of" in found.out
    assert "by the outcomes" not in found.said


def test_a_changed_cell_is_named(bench: Bench, home: Path) -> None:
    path = home / "results" / "tables" / "table-a-1.csv"
    lines = path.read_text().splitlines()
    heads, pgd = lines[0].split(","), lines[2].split(",")
    assert pgd[heads.index("column")] == "PGD"
    true = pgd[heads.index("value")]
    pgd[heads.index("value")] = "99.9"
    path.write_text("\n".join([*lines[:2], ",".join(pgd), *lines[3:]]) + "\n")
    found = bench("verify", "results")
    assert found.code == 4
    assert (
        f"table-a-1.csv: row 'linear', column 'PGD': value is '99.9', and '{true}' by the outcomes"
        in found.said
    )
    assert "table-a-1.csv is not the file that was written" in found.said
    # Without its manifest it is found all the same.
    (home / "results" / "tables" / "table-a-1.manifest.json").unlink()
    found = bench("verify", "results")
    assert found.code == 4
    assert "value is '99.9'" in found.said
    assert "2 files in results/tables without a manifest" in found.said


def test_a_changed_cell_of_markdown_and_json_is_named(bench: Bench, home: Path) -> None:
    path = home / "results" / "tables" / "table-clean.md"
    text = path.read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| linear |"))
    path.write_text(text.replace(row, row.replace("<br>", "9<br>", 1)))
    found = bench("verify", "results")
    assert found.code == 4
    assert "table-clean.md: row 'linear', column 'Clean': '" in found.said
    bench("report", "suite.yaml", "--results", "results", "--format", "json", "--out", "all.json")
    document = json.loads((home / "all.json").read_text())
    document[1]["cells"][0]["n"] += 1
    (home / "all.json").write_text(json.dumps(document, indent=1))
    found = bench("verify", "all.json.manifest.json")
    assert "row 'linear', column 'Clean': n is 61, and 60 by the outcomes" in found.said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("\n", "\r\n"), "line 1 is"),
        (lambda text: text + "\n", "lines, and"),
        (lambda _: "", "by the outcomes"),
    ],
)
def test_what_is_no_cell_is_found_too(
    bench: Bench, home: Path, change: Callable[[str], str], said: str
) -> None:
    path = home / "results" / "tables" / "table-clean.md"
    path.write_bytes(change(path.read_text()).encode())
    found = bench("verify", "results")
    assert found.code == 4
    assert "table-clean.md: " in found.said
    assert said in found.said


def test_a_file_that_is_not_text_is_found(bench: Bench, home: Path) -> None:
    (home / "results" / "tables" / "table-clean.csv").write_bytes(bytes(range(128, 256)))
    found = bench("verify", "results")
    assert found.code == 4
    assert "table-clean.csv" in found.said


def test_a_missing_file_and_an_altered_manifest_are_found(bench: Bench, home: Path) -> None:
    folder = home / "results" / "tables"
    (folder / "table-clean.md").unlink()
    flip(folder / "table-a-1.manifest.json")
    found = bench("verify", "results")
    assert found.code == 4
    assert "table-clean.md is missing, which table-clean.manifest.json names" in found.said
    assert "table-a-1.manifest.json: " in found.said


def test_a_manifest_names_no_file_elsewhere(bench: Bench, home: Path) -> None:
    place = home / "results" / "tables" / "table-clean.manifest.json"
    (home / "secret").write_text("who")
    rewrite(place, files={"../../secret": {"format": "csv", "sha256": "0"}})
    found = bench("verify", "results")
    assert found.code == 4
    assert "names '../../secret', which does not lie beside it" in found.said
    assert "who" not in found.said.replace("whole", "")


def test_many_changed_cells_are_counted(bench: Bench, home: Path) -> None:
    path = home / "results" / "tables" / "table-a-1.csv"
    path.write_text(path.read_text().replace(",percent,", ",promille,").replace(",2,", ",3,"))
    found = bench("verify", "results")
    assert found.out.count("by the outcomes") == rebuilt.NAMED
    assert "table-a-1.csv: and 3 more" in found.said


# --- other versions ----------------------------------------------------------------------------------


def test_a_table_of_another_version_says_so_where_it_differs(bench: Bench, home: Path) -> None:
    place = home / "results" / "tables" / "table-clean.manifest.json"
    written = json.loads(place.read_text())["written"]
    older = {**written, "versions": {**written["versions"], "crossfire-bench": "0.0.9"}}
    rewrite(place, written=older)
    # The same bytes, whoever wrote them.
    assert bench("verify", "results").code == 0
    path = home / "results" / "tables" / "table-clean.md"
    path.write_text(path.read_text().replace("Unmoved images", "Moved images"))
    found = bench("verify", "results")
    assert found.code == 4
    assert "(written by crossfire-bench 0.0.9, and this is " in found.said
    rewrite(place, scheme=provenance.SCHEME + 1)
    assert f"of form {provenance.SCHEME + 1}, and this Crossfire knows" in bench("verify", "results").said


@pytest.mark.parametrize("name", ["store.json", "manifest.json"])
def test_a_folder_of_another_layout_is_refused_and_not_called_damaged(
    bench: Bench, home: Path, name: str
) -> None:
    path = home / "results" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheme": 99}))
    found = bench("verify", "results")
    assert found.code == 2
    assert "made by a newer Crossfire" in found.said


def test_an_altered_manifest_of_a_folder_is_damage(bench: Bench, home: Path) -> None:
    path = home / "results" / "manifest.json"
    path.write_text(path.read_text().replace('"radius": 0.1', '"radius": 0.2', 1))
    found = bench("verify", "results")
    assert found.code == 4
    assert "manifest.json: altered, or not whole" in found.said


# --- where there is nothing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "no results folder"),
        (["nowhere"], "nowhere"),
        (["suite.yaml", "--results", "nowhere"], "there is no such results folder"),
        (["not.manifest.json"], "not the manifest of a table"),
    ],
)
def test_where_there_is_nothing_to_verify_it_ends_with_2(
    bench: Bench, home: Path, words: list[str], said: str
) -> None:
    (home / "empty").mkdir()
    (home / "not.manifest.json").write_text("{}")
    found = bench("verify", *words)
    assert found.code == 2
    assert said in found.said
    assert "Traceback" not in found.said


def test_a_folder_without_tables_says_so(bench: Bench, home: Path) -> None:
    shutil.rmtree(home / "results" / "tables")
    found = bench("verify", "results")
    assert (found.code, found.err) == (0, "")
    assert "no table was written there" in found.out


# --- packed ------------------------------------------------------------------------------------------


def test_one_byte_of_a_pack_is_found(bench: Bench, home: Path) -> None:
    packing.packed(home / "results")
    for name in ("outcomes.parquet", "receipts.jsonl"):
        content = (home / "results" / name).read_bytes()
        flip(home / "results" / name)
        for words in (["results"], ["suite.yaml", "--results", "results"]):
            found = bench("verify", *words)
            assert found.code == 4, found.said
            assert f"{name} is cut short or altered" in found.said
        (home / "results" / name).write_bytes(content)
    assert bench("verify", "results").code == 0


def test_a_line_that_was_taken_from_a_pack_is_found(bench: Bench, home: Path) -> None:
    packing.packed(home / "results")
    path = home / "results" / "receipts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    gone = json.loads(lines[2])["key"]
    found = bench("verify", "results")
    assert found.code == 4
    assert "receipts.jsonl is cut short or altered" in found.said
    assert f"evaluate {gone}" in found.said


def test_the_committed_results_are_whole_and_their_tables_what_they_say(bench: Bench) -> None:
    found = bench("verify", REPOSITORY / "results" / "mnist")
    assert found.code == 0, found.said
    assert "files of tables rebuilt: bit for bit what the outcomes say" in found.out


# --- what a report says of what is not there ---------------------------------------------------------


def test_a_report_names_what_is_missing_and_the_command_that_makes_it(bench: Bench, home: Path) -> None:
    (place,) = (
        each
        for each in evaluations(home)
        if manifest_of(home)["outcomes"][each.name]["condition"]
        == "pgd/logits on linear/plain, seed 1 at 0.1"
    )
    shutil.rmtree(place)
    report = ("report", "suite.yaml", "--results", "results")
    command = "bench run suite.yaml --table a/1 --results results"
    sentence = (
        f"note: evaluate {place.name} (pgd/logits on linear/plain, seed 1 at 0.1) is not there; "
        f"make it with: {command}"
    )
    assert sentence in bench(*report).said
    strict = bench(*report, "--strict")
    assert strict.code == 4
    # The table that does not read it says nothing.
    assert bench(*report, "--table", "clean", "--strict").err == ""
    # What it says is what to do.
    (home / "results" / "failed").mkdir(exist_ok=True)
    (home / "results" / "failed" / f"{place.name}.json").write_text("{}")
    assert f"failed (see results/failed/{place.name}.json); make it with: {command}" in bench(*report).said
    assert bench(*command.split()[1:], "--executor", "inline").code == 0
    assert bench(*report, "--strict").err == ""
    assert bench("verify", "results").code == 0


def test_a_report_names_a_damaged_outcome_with_the_exact_command(bench: Bench, home: Path) -> None:
    for place in evaluations(home)[:1]:
        flip(place / "outcomes.parquet")
    found = bench("report", "suite.yaml", "--results", "results", "--table", "a/1")
    assert (
        "outcomes.parquet is cut short or altered; make it again with: bench run suite.yaml --table a/1"
        in found.said
    )
    told_to = found.said.partition("make it again with: bench ")[2].split()[:6]
    assert bench(*told_to[:6], "--executor", "inline").code in (0, 2)


def test_where_nothing_is_there_one_sentence_says_so(bench: Bench, home: Path) -> None:
    shutil.rmtree(home / "results" / "evaluate")
    found = bench("report", "suite.yaml", "--results", "results")
    assert found.err.count("note:") == 1
    assert (
        "nothing of 4 results is there; make them with: bench run suite.yaml --results results" in found.said
    )

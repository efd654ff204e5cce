"""A first day: what new users do from README and `--help` alone, each with what it shall come to."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import Bench, called_by

import bench
from bench import pages
from bench.registry import ATTACKS, DEFENSES, SOURCES
from bench.report.checks import CODES
from bench.results.metrics import METRICS

ROOT = Path(__file__).parent.parent
NETS = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))
"""
NO_GRADIENT = NETS.replace("return self", "with torch.no_grad():\n            return self")
OTHER_SIZE = NETS.replace("return self", "assert x.shape[-1] == 32\n        return self")
SUITE: dict[str, Any] = {
    "data": {"digits": {"name": "digits", "size": 40}},
    "defenses": {"mine": {"use": "module", "build": "mynets:Net", "weights": "mine.pt"}},
    "attacks": {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}},
    "tasks": [{"data": "digits", "threat": {"norm": "linf", "radius": ["2/255", "8/255"]}}],
    "tables": {
        "main": {
            "title": "My network",
            "rows": ["defense"],
            "columns": {
                "Clean": {"attack": "clean"},
                "PGD (small)": {"attack": "pgd", "radius": "2/255"},
                "PGD": {"attack": "pgd", "radius": "8/255"},
            },
        },
        "curve": {
            "title": "A curve",
            "where": {"attack": "pgd"},
            "rows": ["defense"],
            "columns": ["radius"],
            "figure": {"x": "radius"},
        },
    },
}


TOYS = ("toy/", "mylab/", "planted/", "second/")
"""What the tests register."""


def fitted() -> dict[str, torch.Tensor]:
    """Return the weights of a linear network that is right on most digits: least squares."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.hstack([digits.data / 16, np.ones((len(digits.data), 1))])
    found = np.linalg.lstsq(pixels, np.eye(10)[digits.target], rcond=None)[0]
    weights = torch.tensor(found.T, dtype=torch.float32)
    return {"linear.weight": weights[:, :64].contiguous(), "linear.bias": weights[:, 64].contiguous()}


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write a task file, changed, with its network and its weights."""
    document = json.loads(json.dumps(SUITE))
    change(document)
    (folder / "mynets.py").write_text(NETS)
    torch.save(fitted(), folder / "mine.pt")
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def bench_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that calls the command line in this process."""

    return called_by(monkeypatch, capsys)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the suite was run."""
    folder = tmp_path_factory.mktemp("day")
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "run", str(written(folder)), "--executor", "inline"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def day(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ran)
    return ran


def test_row_3_a_network_with_permuted_labels_is_an_alarm(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    weights = fitted()
    torch.save({name: each.roll(3, 0) for name, each in weights.items()}, tmp_path / "mine.pt")
    found = bench_("run", path, "--executor", "inline", "--strict")
    assert found.code == 1
    assert "alarm, at-chance" in found.out
    assert "at-chance" in found.err
    assert "order of labels" in bench_("explain", "at-chance").out


@pytest.mark.parametrize("wrapped", ["net", "model"])
def test_row_7_a_checkpoint_with_other_things_in_it_names_its_key(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    torch.save({wrapped: fitted(), "acc": 0.9, "epoch": 3}, tmp_path / "mine.pt")
    plain = bench_("run", path, "--executor", "inline")
    assert plain.code == 0 or "key:" in plain.err
    keyed = written(tmp_path, lambda suite: suite["defenses"]["mine"].update(key=wrapped))
    torch.save({wrapped: fitted(), "acc": 0.9, "epoch": 3}, tmp_path / "mine.pt")
    assert bench_("run", keyed, "--executor", "inline").code == 0


def test_row_9_no_heading_is_cut_in_a_pipe_or_a_file(bench_: Bench, day: Path) -> None:
    environment = {"TERM": "dumb", "COLUMNS": "30", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "report", "mine.yaml"],
        cwd=day, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "…" not in done.stdout
    assert "\x1b" not in done.stdout
    (line,) = [each for each in done.stdout.splitlines() if each.split()[:1] == ["defense"]][:1]
    assert line.split()[-2:] == ["PGD", "Grade"]
    assert bench_("report", "mine.yaml", "--out", "t.txt").code == 0
    assert Path("t.txt").read_text() == done.stdout


def test_row_10_one_attack_is_shown_whole_with_every_parameter(bench_: Bench) -> None:
    for words in (["list", "attacks", "pgd"], ["list", "pgd"], ["list", "PGD"]):
        out = " ".join(bench_(*words).out.split())
        assert "Climb a loss in projected steps of one length" in out
        for name, meaning in ATTACKS["pgd"].meanings.items():
            if name in ATTACKS["pgd"].schema.model_fields:
                assert f"{name}: " in out
                assert meaning.replace("``", "`") in out
        assert "pgd: {use: pgd}" in out
    for what in ("attacks", "defenses", "data", "views"):
        for entry in json.loads(bench_("list", what, "--json").out):
            for name, info in entry["parameters"].items():
                foreign = all(each.startswith(TOYS) for each in entry.get("of", [entry["name"]]))
                assert info["description"] or foreign, f"{what} {entry['name']}: {name}"
    assert len(bench_("list", "attacks").out.splitlines()) < 500
    told = json.loads(bench_("list", "metrics", "--json").out)
    assert [each["name"] for each in told] == sorted(METRICS)
    wrong = bench_("list", "attacks", "pgdd")
    assert (wrong.code, "did you mean 'pgd'" in wrong.err) == (2, True)


def test_row_10_every_key_and_parameter_has_a_description_in_the_schema(bench_: Bench) -> None:
    schema = json.loads(bench_("schema").out)
    for name, each in schema["$defs"].items():
        objects = [each, *each.get("oneOf", ())]
        for said in objects:
            title = said.get("title", "")
            if "/" in title and not title.startswith(("foolbox/", "torchattacks/")):
                continue
            for key, info in said.get("properties", {}).items():
                told = "description" in info or "$ref" in info or "const" in info or title == "planned"
                assert told or (name, key) == ("UseModel", "use"), (name, title, key)


def test_row_11_what_stands_behind_a_number_is_shown(bench_: Bench, day: Path) -> None:
    out = bench_("show", "mine.yaml", "--table", "main", "--column", "PGD").out
    lines = list(csv.DictReader(io.StringIO(bench_("report", "mine.yaml", "--format", "csv").out)))
    (line,) = [each for each in lines if (each["table"], each["column"]) == ("main", "PGD")]
    assert line["jobs"] in out
    for said in ("steps: 3", "radius 8/255", "n 40", "build: mynets:Net", "(digits test, the first 40)"):
        assert said in out
    told = json.loads(bench_("show", "results/mine", "--table", "main", "--column", "PGD", "--json").out)
    (condition,) = told["conditions"]
    assert condition["job"] == line["jobs"]
    assert Path(condition["folder"], "outcomes.parquet").is_file()
    assert Path(condition["crafts"][0], "images.safetensors").is_file()
    rows = bench.outcomes("results/mine")
    own = rows[rows.job == line["jobs"]]
    assert 100 * own.correct.mean() == pytest.approx(float(line["value"]))
    assert condition["outcomes"]["right"] == own.correct.sum()
    # Without saying which, the choice is shown.
    assert "'Clean', 'PGD (small)', 'PGD'" in bench_("show", "mine.yaml", "--table", "main").err
    assert "did you mean 'curve'" in bench_("show", "mine.yaml", "--table", "kurve").err


def test_row_11_images_are_written_as_arrays_and_as_a_picture(bench_: Bench, day: Path) -> None:
    words = ["images", "mine.yaml", "--table", "main", "--column", "PGD"]
    assert bench_(*words, "--out", "shown.npz").code == 0
    found = np.load("shown.npz")
    known = bench.images("results/mine", attack="pgd", radius="8/255")
    for name in ("images", "clean", "truth", "label", "rejected", "index"):
        np.testing.assert_array_equal(found[name], getattr(known, name))
    assert bench_(*words, "--out", "shown.png", "--most", 3).out.startswith("3 examples of 40")
    assert Path("shown.png").read_bytes().startswith(b"\x89PNG")
    assert "expected .npz" in bench_(*words, "--out", "shown.txt").err
    assert "say which" in bench_("images", "mine.yaml", "--where", "attack=pgd", "--out", "x.npz").err


def test_images_are_asked_about_again_rounded_to_8_bits(bench_: Bench, day: Path) -> None:
    words = ["show", "mine.yaml", "--table", "main", "--column", "PGD", "--rounded"]
    told = json.loads(bench_(*words, "--json").out)["rounded"]
    (left,) = told
    shown = bench.images("results/mine", attack="pgd", radius="8/255")
    defense = bench.load("results/mine", "mine")
    answers = defense((shown.images * 255).round() / 255).argmax(1)
    moved = (shown.images != shown.clean).flatten(1).any(1)
    found = (shown.label != shown.truth) & moved
    assert left["n"] == 40
    assert left["right"] == int((answers == shown.truth).sum())
    assert left["found"] == int(found.sum()) > 0
    assert left["kept"] == int((found & (answers != shown.truth)).sum())
    said = f"rounded to 8 bits, {left['kept']} of {left['found']} that were moved and broken stay so"
    assert said in bench_(*words).out


def test_a_table_of_rounded_images_agrees_with_each_of_its_cells(bench_: Bench, day: Path) -> None:
    lines = json.loads(bench_("report", "mine.yaml", "--rounded", "--format", "json").out)
    assert {(each["table"], each["column"]) for each in lines} == {
        ("main", "PGD (small)"), ("main", "PGD"), ("curve", "2/255"), ("curve", "8/255"),
    }  # fmt: skip
    stored = {
        (each["table"], each["column"]): float(each["value"])
        for key in ("main", "curve")
        for each in csv.DictReader(
            io.StringIO(bench_("report", "mine.yaml", "--table", key, "--format", "csv").out)
        )
    }
    for line in lines:
        words = ["show", "mine.yaml", "--table", line["table"], "--column", line["column"], "--rounded"]
        (one,) = json.loads(bench_(*words, "--json").out)["rounded"]
        assert (line["found"], line["kept"]) == (one["found"], one["kept"])
        assert line["rounded_value"] == pytest.approx(100 * one["right"] / one["n"])
        assert line["value"] == stored[line["table"], line["column"]]
    # A file of it has a manifest, and is left in peace by what rebuilds tables from outcomes.
    assert bench_("report", "mine.yaml", "--rounded", "--table", "main", "--out", "rounded.txt").code == 0
    assert "8 bits" in Path("rounded.txt").read_text()
    assert bench_("verify", "rounded.txt.manifest.json").code == 0


def test_a_table_of_rounded_images_says_why_nobody_can_be_asked(
    bench_: Bench, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ran, tmp_path / "day")
    monkeypatch.chdir(tmp_path / "day")
    for path in Path("results/mine/craft").iterdir():
        (path / "images.safetensors").unlink()
    lines = json.loads(bench_("report", "mine.yaml", "--rounded", "--table", "main", "--format", "json").out)
    assert [each["rounded_value"] for each in lines] == [None, None]
    assert all("crafted images are not kept there" in each["reason"] for each in lines)
    assert all(each["value"] is not None for each in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounded", "--cost"], "reports of their own"),
        (["--rounded", "--format", "pdf", "--out", "x.pdf"], "expected text, markdown, csv or json"),
        (["--data-root", "."], "--data-root: goes with --rounded"),
    ],
)
def test_what_does_not_go_with_rounded_images_is_refused(
    words: list[str], said: str, bench_: Bench, day: Path
) -> None:
    found = bench_("report", "mine.yaml", *words)
    assert found.code == 2
    assert said in found.err


def test_row_12_every_code_is_explained_where_the_package_lies(bench_: Bench) -> None:
    for code in CODES:
        assert f"{code}, flag of a table" in bench_("explain", code).out
    assert "held" in bench_("explain").out
    assert "did you mean 'at-chance'" in bench_("explain", "at-chanse").err
    # The pages of a wheel are those of the clone.
    assert pages.folder() == ROOT / "docs"


def test_row_12_the_pages_are_in_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = (
        "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); "
        "build_meta.build_wheel(sys.argv[2])"
    )
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "bench", "docs"):
        place = ROOT / name
        files = [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.md")]
        for file in files:
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"bench/docs/{each.name}" for each in (ROOT / "docs").glob("*.md")} <= names


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_row_13_a_curve_is_drawn_in_each_format_from_radius_0(bench_: Bench, day: Path, form: str) -> None:
    words = ["report", "mine.yaml", "--table", "curve", "--format", form, "--out"]
    assert bench_(*words, f"curve.{form}").code == 0
    assert bench_(*words, f"again.{form}").code == 0
    assert Path(f"curve.{form}").read_bytes() == Path(f"again.{form}").read_bytes()
    if form == "svg":
        text = Path("curve.svg").read_text()
        for said in (">0<", "2/255", "8/255", "attack pgd", "n 40"):
            assert said in text


def test_row_14_latex_has_intervals_n_and_its_packages(bench_: Bench, day: Path) -> None:
    text = bench_("report", "mine.yaml", "--table", "main", "--format", "latex").out
    assert text.startswith(r"% Packages: \usepackage{booktabs}")
    assert re.search(r"\\scriptsize \d+--\d+", text)
    assert "\nn & 40 & 40 & 40 \\\\" in text


def test_row_15_holes_and_stale_numbers_have_a_status_of_their_own(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    bench_("run", path, "--executor", "inline", "--table", "main")
    assert bench_("report", path, "--table", "main", "--strict").code == 0
    assert bench_("run", path, "--again", "mine/pgd", "--dry-run").code == 0
    path.write_text(path.read_text() + "\n# a thought\n")
    assert bench_("report", path, "--table", "main", "--strict").code == 4
    assert bench_("report", path, "--table", "main").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda suite: suite["tasks"][0].update(limit=500), "digits has 40 examples, limit asks for 500"),
        (lambda suite: suite.pop("tables"), "no tables, so that no number is printed"),
        (
            lambda suite: (
                suite["tasks"][0].update(attacks=["pgd"]),
                suite.update(tables={"curve": {**SUITE["tables"]["curve"], "metric": "robust"}}),
            ),
            "robust needs the clean images, and no task asks about them",
        ),
    ],
    ids=["limit", "tables", "clean"],
)
def test_row_16_what_cannot_be_meant_is_said_when_the_file_is_read(
    bench_: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = bench_("plan", written(tmp_path, change))
    assert found.code == 0
    assert said in " ".join(found.err.split())
    assert bench_("plan", "mine.yaml", "-q").err == ""


def test_row_16_a_list_of_one_mean_for_three_channels_is_said(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "test.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))

    def coloured(suite: dict[str, Any]) -> None:
        suite["data"]["digits"] = {"name": "arrays", "test": "test.npz"}
        suite["defenses"]["mine"]["mean"] = [0.485]

    found = bench_("plan", written(tmp_path, coloured))
    said = " ".join(found.err.split())
    assert "mean: one number for 3 channels, found [0.485]; write 0.485 if all of them have it" in said


def test_row_17_a_plan_shows_its_cells_and_numbers_as_written(bench_: Bench, day: Path) -> None:
    lines = bench_("plan", "mine.yaml", "--cells").out.splitlines()
    assert len(lines) == 4
    assert all(each.startswith("done ") for each in lines)
    assert sum("at 8/255" in each for each in lines) == 2
    assert not any("0.0313" in each for each in lines)


def _timeless(text: str) -> str:
    """Return printed tables without how long a run, or what a grade is missing, takes."""
    return re.sub(r" \(bench doctor --fix: [^)]*\)|\d+ jobs done in .*", "", " ".join(text.split()))


def test_row_18_one_condition_is_done_again(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    first = bench_("run", path, "--executor", "inline")
    root = tmp_path / "results" / "mine"
    before = {each.parent.name: each.stat().st_mtime_ns for each in root.glob("*/*/receipt.json")}
    again = bench_("run", path, "--executor", "inline", "--again", "mine/pgd")
    assert again.code == 0
    after = {each.parent.name: each.stat().st_mtime_ns for each in root.glob("*/*/receipt.json")}
    assert after.keys() == before.keys()
    # Two radii, each a craft and an evaluation; neither clean images nor the training.
    assert sum(after[key] != before[key] for key in before) == 4
    same, told = (_timeless(each.out.partition("Table main")[2]) for each in (first, again))
    assert same == told
    whole = bench_("run", path, "--executor", "inline", "--again", "mine")
    assert "of mine taken away" in whole.out
    wrong = bench_("run", path, "--again", "mine/pdg")
    assert (wrong.code, "did you mean 'mine/pgd'" in wrong.err) == (2, True)


def test_row_19_the_usual_options_are_there(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    assert re.fullmatch(r"crossfire-bench \d+\.\d+\.\d+\S*\n", bench_("--version").out)
    for words in (["-h"], ["run", "-h"], ["baseline", "save", "-h"]):
        found = bench_(*words)
        assert (found.code, "Usage: " in found.out) == (0, True)
    dry = bench_("run", path, "--dry-run")
    assert dry.code == 0
    assert "0 of 4 conditions done" in dry.out
    assert not list((tmp_path / "results").glob("mine/*/*/receipt.json"))
    quiet = bench_("run", path, "--executor", "inline", "-q")
    assert quiet.out.lstrip().startswith("Table main")
    assert quiet.err == ""
    assert "jobs done" not in quiet.out
    (tmp_path / "mynets.py").write_text(
        NETS.replace("return self", "assert x.shape[-1] == 32\n        return self")
    )
    loud = bench_("run", path, "--executor", "inline", "-v")
    assert loud.code
    assert "Traceback" in loud.out
    assert "Traceback" in bench_("run", "none.yaml", "-v").err


def test_registries_say_what_they_are_called_in_a_list() -> None:
    for registry in (ATTACKS, DEFENSES, SOURCES):
        assert f"bench list {'data' if registry is SOURCES else registry.kind + 's'}" in registry._nearest(
            "qqqqq"
        )


def test_results_lie_beside_the_file_or_where_it_says(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    path = written(home)
    for place, results in ((home, home), (tmp_path, tmp_path), (elsewhere, home)):
        monkeypatch.chdir(place)
        assert bench_("run", path, "--executor", "inline", "--table", "main").code == 0
        assert (results / "results" / "mine" / "manifest.json").is_file()
        assert bench_("report", path, "--table", "main", "--strict").code == 0
    assert not list(elsewhere.iterdir())
    said = written(home, lambda suite: suite.update(results="../elsewhere/out"))
    assert bench_("run", said, "--executor", "inline", "-q").code == 0
    assert (elsewhere / "out" / "manifest.json").is_file()
    assert bench_("show", said, "--table", "main", "--column", "PGD").code == 0
    assert bench_("plan", said, "--results", tmp_path / "third").out.count("4 conditions done") == 1
    assert bench_("verify", said).code == 0


BAD = (
    NETS
    + """\


class NoGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Training(Net):
    def train(self, mode=True):
        return super().train(True)


class Size(Net):
    def forward(self, x):
        assert x.shape[-1] == 32, f"expected 32 pixels, found {x.shape[-1]}"
        return super().forward(x)


class OnGradient(Net):
    def forward(self, x):
        if x.requires_grad:
            raise KeyError("backbone")
        return super().forward(x)
"""
)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        ("Training", "it stays in training mode"),
        ("Size", "AssertionError: expected 32 pixels, found 8"),
        ("OnGradient", "KeyError: 'backbone'"),
    ],
)
def test_row_6_a_network_that_cannot_be_attacked_is_named_before_anything_is(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: str, says: str
) -> None:
    path = written(tmp_path, lambda suite: suite["defenses"]["mine"].update(build=f"mynets:{net}"))
    (tmp_path / "mynets.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    found = bench_("run", path.name, "--executor", "inline")
    assert found.code == 2
    said = " ".join((found.out + found.err).split())
    assert f"mynets:{net}" in said
    assert says in said
    assert "Traceback" not in said
    assert not list((tmp_path / "results").glob("*/evaluate/*/receipt.json"))


def test_row_6_where_no_gradient_flows_black_box_attacks_go_on(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(suite: dict[str, Any]) -> None:
        suite["defenses"]["mine"].update(build="mynets:NoGradient")
        suite["attacks"]["square"] = {"use": "square", "queries": 5}
        suite["doctor"] = "none"

    path = written(tmp_path, change)
    (tmp_path / "mynets.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    found = bench_("run", path.name, "--executor", "inline")
    assert found.code == 2
    said = " ".join((found.out + found.err).split())
    assert "defense mine (mynets:NoGradient): no gradient flows from the logits of view 'logits'" in said
    assert "pgd needs one" in said
    assert "square/logits on mine/label, seed 0 at 2/255: accuracy" in said
    assert "clean on mine/label" in said


def looked_at(folder: Path) -> dict[str, tuple[int, int]]:
    """Return when each file and folder was changed, and how large it is."""
    every = ((each, each.lstat()) for each in [folder, *folder.rglob("*")])
    return {
        str(each): (found.st_mtime_ns, found.st_size)
        for each, found in every
        if "__pycache__" not in str(each)
    }


@pytest.mark.parametrize("words", [(), ("--cells",), ("--json",)])
def test_row_17_a_plan_writes_nothing(bench_: Bench, day: Path, words: tuple[str, ...]) -> None:
    # What was found in an index is not kept by a plan either: it is read once more.
    (day / "results" / "mine" / "index.sqlite").unlink(missing_ok=True)
    before = looked_at(day)
    assert bench_("plan", "mine.yaml", *words).code == 0
    assert bench_("run", "mine.yaml", "--dry-run").code == 0
    assert looked_at(day) == before


def test_row_17_a_plan_makes_no_results_folder(
    bench_: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = looked_at(tmp_path)
    found = bench_("plan", "mine.yaml")
    assert found.code == 0
    assert "0 of 4 conditions done" in found.out
    assert looked_at(tmp_path) == before


def test_row_20_a_start_needs_no_scipy_and_leaves_the_garbage_collector_as_it_was(day: Path) -> None:
    script = (
        "import gc, sys, atexit; usual = gc.get_threshold();"
        "atexit.register(lambda: print('scipy.stats' in sys.modules, gc.get_threshold() == usual));"
        "sys.argv = ['bench', 'plan', 'mine.yaml']; from bench.cli import entry; entry()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=day, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False True"

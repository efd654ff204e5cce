"""The command line as its user meets it: runs, reports, wrong inputs, kills and Ctrl-C."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command import Answer, Bench, called_by

from bench.runner import progress
from suites import TASK, suite

BENCH = [sys.executable, "-m", "bench.cli"]
TABLE = {
    "title": "Robust accuracy",
    "rows": ["defense", "readout"],
    "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}},
    "extra": ["Min", "Worst"],
}
CNN = {
    "use": "cnn",
    "training": "standard",
    "net": "b2",
    "width": 0.25,
    "hidden": [16],
    "epochs": 2,
    "batch": 64,
}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 5}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Bench:
    """Return a function that calls the command line in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    return called_by(monkeypatch, capsys)


def small(folder: Path, **more: object) -> Path:
    return suite(folder, {"cnn": CNN}, ATTACKS, [{**TASK, "views": ["first"]}], tables={3: TABLE}, **more)


def test_a_run_prints_its_tables_and_writes_them(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    ran = bench("run", "suite.yaml", "--executor", "inline")
    assert ran.code == 0, ran.err
    assert "Table 3: Robust accuracy" in ran.out
    tables = tmp_path / "results" / "suite" / "tables"
    assert (tables / "table-3.csv").read_text().count("\n") == 1 + 4
    assert (tables / "table-3.md").read_text().startswith("#")
    again = bench("run", "suite.yaml", "--executor", "inline")
    assert "0 jobs to do" in again.out
    # A report says the same as the run, from what is stored alone.
    report = bench("report", "suite.yaml", "--table", "3")
    assert report.code == 0
    assert report.out.strip() in ran.out
    for form in ("markdown", "csv", "latex", "json"):
        assert bench("report", "suite.yaml", "--format", form).code == 0
    assert json.loads(bench("report", "suite.yaml", "--format", "json").out)
    out = bench("report", "suite.yaml", "--format", "csv", "--out", "t.csv")
    assert out.code == 0
    assert (tmp_path / "t.csv").read_text() == (tables / "table-3.csv").read_text()


def test_a_log_hears_of_shards_of_an_attack_only_after_some_silence(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path)
    monkeypatch.setattr(progress, "QUIET", 0)
    told = bench("run", "suite.yaml", "--executor", "inline", "--results", "told").out.splitlines()
    monkeypatch.setattr(progress, "QUIET", 3600)
    silent = bench("run", "suite.yaml", "--executor", "inline", "--results", "silent").out.splitlines()
    shards = [line for line in told if "pgd on cnn/first [0:" in line]
    assert len(shards) == 1
    assert re.match(r"\d+/\d+ pgd on cnn/first \[0:\d+\]; about \d+ s left", shards[0])
    assert not [line for line in silent if "on cnn/first [" in line]


def test_results_names_the_folder_itself_and_a_slash_becomes_a_dash(bench: Bench, tmp_path: Path) -> None:
    path = small(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["tables"] = {"sdim/7": TABLE}
    path.write_text(yaml.safe_dump(document))
    assert bench("run", "suite.yaml", "--executor", "inline", "--results", "here").code == 0
    assert (tmp_path / "here" / "tables" / "table-sdim-7.csv").is_file()
    assert bench("report", "suite.yaml", "--results", "here", "--table", "sdim/7").code == 0


def test_one_table_runs_only_its_own_cells(bench: Bench, tmp_path: Path) -> None:
    path = small(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["tables"]["clean"] = {**TABLE, "columns": {"Clean": {"attack": "clean"}}, "extra": []}
    path.write_text(yaml.safe_dump(document))
    ran = bench("run", "suite.yaml", "--executor", "inline", "--table", "clean")
    assert ran.code == 0
    crafts = list((tmp_path / "results" / "suite" / "craft").iterdir())
    assert len(crafts) == 3  # of 60 images in shards of 25, clean alone
    assert "not run" in bench("report", "suite.yaml", "--table", "3").out
    # Three crafts and an evaluation are to do; the training is there.
    assert "; 4 jobs to do, which build on 1 stored one\n" in bench("plan", "suite.yaml").out


def test_a_plan_shows_what_is_done_and_what_is_not(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    before = bench("plan", "suite.yaml")
    assert before.code == 0
    assert "suite.yaml: 0 of 2 conditions done, 0 skipped; 9 jobs to do\n" in before.out
    bench("run", "suite.yaml", "--executor", "inline")
    assert "suite.yaml: 2 of 2 conditions done, 0 skipped; 0 jobs to do\n" in bench("plan", "suite.yaml").out
    full = json.loads(bench("plan", "suite.yaml", "--json").out)
    assert {job["state"] for job in full["jobs"]} == {"done"}
    assert len(full["conditions"]) == 2


@pytest.mark.parametrize("what", ["attacks", "defenses", "data"])
def test_lists_name_everything(bench: Bench, what: str) -> None:
    from bench.registry import ATTACKS, DEFENSES, SOURCES

    shown = bench("list", what)
    assert shown.code == 0
    names = {"attacks": ATTACKS, "defenses": DEFENSES, "data": SOURCES}[what]
    for name in names:
        assert re.search(rf"^{re.escape(name)}(  |$)", shown.out, re.MULTILINE)
    entries = json.loads(bench("list", what, "--json").out)
    assert [entry["name"] for entry in entries] == list(names)


READ = [
    *(["list", what] for what in ("attacks", "defenses", "data", "metrics", "views")),
    *(["list", name] for name in ("pgd", "cnnf", "image-folder", "accuracy", "bpda")),
    ["explain"],
    *(["explain", word] for word in ("trial", "at-chance", "lease")),
    ["plan", "suite.yaml"],
]


@pytest.mark.parametrize("words", READ, ids=" ".join)
def test_what_is_read_in_a_pipe_is_neither_wrapped_nor_padded_nor_quoted(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    small(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = bench(*words).out
    monkeypatch.setenv("COLUMNS", "400")
    assert bench(*words).out == narrow
    assert narrow
    assert not [line for line in narrow.splitlines() if line != line.rstrip()]
    assert "``" not in narrow.replace("```", "")


def test_names_alone_stand_where_names_stand(bench: Bench) -> None:
    """In a pipe by `grep`, on a terminal by eye: nothing that goes on begins in the first column."""
    from rich.console import Console

    from bench.suite import listing

    for what in listing.LISTS:
        names = [entry["name"] for entry in listing.entries(what)]
        screen = Console(file=io.StringIO(), force_terminal=True, width=72, color_system=None)
        listing.show(screen, listing.entries(what), what)
        for out in (bench("list", what).out, screen.file.getvalue()):
            first = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
            assert first == [*names, str(len(names))]
        assert max(map(len, screen.file.getvalue().splitlines())) <= 72


def test_a_plan_points_to_what_its_words_mean(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    told = dict(
        re.findall(r"^(\w+) .*\((?:.*: )(bench explain \w+)\)$", bench("plan", "suite.yaml").out, re.M)
    )
    assert set(told) == {"trial", "examination"}
    for kind, command in told.items():
        assert f"{kind}, word (docs/glossary.md)" in bench(*command.split()[1:]).out


def test_what_is_explained_is_listed_in_order_with_all_that_it_is(bench: Bench) -> None:
    from bench import pages

    groups = pages.grouped()
    assert bench("explain").out.splitlines()[0::2][:3] == list(groups)
    listed = []
    for words in groups.values():
        names = [word.partition(" (also ")[0] for word in words]
        assert names == sorted(names, key=str.casefold)
        listed += names
    assert sorted(listed) == sorted(each.word for each in pages.entries())
    for words in groups.values():
        for word in words:
            name, _, also = word.partition(" (also ")
            assert bool(also) == (sum(each.casefold() == name.casefold() for each in listed) > 1)
    assert "at-chance (also a finding)" in groups["flags of tables"]
    assert "trial (also a flag)" in groups["words"]


def test_the_schema_accepts_what_runs_and_refuses_what_does_not(bench: Bench, tmp_path: Path) -> None:
    import jsonschema

    schema = json.loads(bench("schema").out)
    document = yaml.safe_load(small(tmp_path).read_text())
    document["tables"] = {str(key): table for key, table in document["tables"].items()}
    jsonschema.validate(document, schema)
    document["attacks"]["pgd"]["stepz"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stepz"):
        jsonschema.validate(document, schema)


def test_a_report_says_which_outcome_is_damaged_and_what_makes_it_again(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    whole = bench("run", "suite.yaml", "--executor", "inline").out
    root = tmp_path / "results" / "suite"
    wanted = {"attack": "pgd", "readout": "last"}
    (job,) = {
        each["job"]
        for each in json.loads((root / "manifest.json").read_text())["conditions"]
        if wanted.items() <= each["coordinates"].items()
    }
    (root / "evaluate" / job / "outcomes.parquet").write_bytes(b"PAR1")
    for more in ([], ["--format", "csv"], ["--cost"]):
        code, _, said = bench("report", "suite.yaml", *more)
        # No other attack has a cost.
        assert code == (2 if more == ["--cost"] else 0)
        assert " ".join(said.split()).startswith(
            f"note: evaluate {job} (pgd/first on cnn/last, seed 0 at 0.1): outcomes.parquet is cut short or "
            "altered; make it again with: bench run suite.yaml"
        )
    again = bench("run", "suite.yaml", "--executor", "inline").out
    assert "again: 1 stored result: outcomes.parquet is cut short or altered" in again
    assert again.split("tables in")[0].split("Robust accuracy")[1].split("1 job")[0] in whole
    assert bench("report", "suite.yaml").err == ""


def test_a_report_of_an_altered_manifest_is_refused(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    bench("run", "suite.yaml", "--executor", "inline")
    path = tmp_path / "results" / "suite" / "manifest.json"
    whole = path.read_text()
    for text in (
        whole.replace('"radius": 0.1', '"radius": 0.2', 1),
        whole[:-9],
        whole.replace("conditions", "condition"),
    ):
        path.write_text(text)
        code, _, said = bench("report", "suite.yaml")
        assert code == 2
        assert "write it anew: bench run suite.yaml" in said
    bench("run", "suite.yaml")
    assert path.read_text() == whole
    assert bench("report", "suite.yaml").code == 0


def test_what_lies_where_a_folder_of_results_belongs_is_said(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    root = tmp_path / "results" / "suite"
    root.mkdir(parents=True)
    (root / "train").write_text("thesis")
    code, _, said = bench("run", "suite.yaml", "--executor", "inline")
    assert code == 0
    assert "train: what lay there is not of Crossfire; it is train.aside-" in " ".join(said.split())


def test_a_changed_suite_or_source_is_said_above_the_table(bench: Bench, tmp_path: Path) -> None:
    path = small(tmp_path)
    bench("run", "suite.yaml", "--executor", "inline")
    assert bench("report", "suite.yaml").err == ""
    path.write_text(path.read_text() + "\n# a thought\n")
    assert "suite.yaml changed since this was planned" in bench("report", "suite.yaml").err
    manifest = tmp_path / "results" / "suite" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"attacks.pgd": "', '"attacks.pgd": "0'))
    assert "attacks.pgd changed since" in bench("report", "suite.yaml").err
    # Planning anew makes no result newer than it is.
    for receipt in (tmp_path / "results" / "suite" / "evaluate").glob("*/receipt.json"):
        receipt.write_text(receipt.read_text().replace('"attacks.pgd": "', '"attacks.pgd": "0'))
    bench("plan", "suite.yaml")
    assert "attacks.pgd changed since" in bench("report", "suite.yaml").err
    trusted = bench("run", "suite.yaml", "--executor", "inline", "--trust-cache")
    assert "0 jobs to do" in trusted.out
    assert "attacks.pgd changed since" in trusted.err


def test_an_edited_network_is_said_above_the_table_and_done_again(bench: Bench, tmp_path: Path) -> None:
    code = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "edited.py").write_text(code)
    defenses = {"mine": {"use": "module", "build": "edited:build"}}
    suite(
        tmp_path, defenses, {"clean": {"use": "none"}}, [TASK], tables={3: {**TABLE, "columns": ["attack"]}}
    )
    assert bench("run", "suite.yaml", "--executor", "inline").code == 0
    assert bench("report", "suite.yaml").err == ""
    (tmp_path / "edited.py").write_text(code.replace("Linear(64, 10)", "Linear(64, 10, bias=False)"))
    assert "edited changed since" in bench("report", "suite.yaml").err
    assert "; 2 jobs to do, which build on 3 stored ones\n" in bench("plan", "suite.yaml").out


# --- wrong inputs ------------------------------------------------------------------------------------


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2
    assert "Traceback" not in answer.err + answer.out
    for word in words:
        assert word in answer.err, answer.err


def test_wrong_words_on_the_command_line(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    refused(bench("run", "siute.yaml"), "siute.yaml", "did you mean 'suite.yaml'")
    refused(bench("run", "suite.yaml", "--device", "cuda:7"), "cuda:7", "no such device")
    refused(bench("run", "suite.yaml", "--table", "4"), "--table 4", "no such table", "3")
    refused(bench("report", "suite.yaml"), "nothing was run", "bench run suite.yaml")
    bench("run", "suite.yaml", "--executor", "inline")
    refused(bench("report", "suite.yaml", "--table", "33"), "did you mean '3'")
    refused(bench("report", "suite.yaml", "--out", "no/such/folder/t.txt"), "--out")
    refused(bench("report", "suite.yaml", "--format", "png"), "--out FILE")
    refused(bench("run", "suite.yaml", "--results", "suite.yaml"), "suite.yaml")
    (tmp_path / "results" / "suite" / "store.json").write_text('{"scheme": 7}')
    refused(bench("run", "suite.yaml"), "newer Crossfire")


def test_missing_data_says_where_it_looked_and_how_to_get_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_OFFLINE", "1")
    path = small(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["data"]["digits"] = {"name": "mnist", "size": 20}
    path.write_text(yaml.safe_dump(document))
    assert bench("plan", "suite.yaml", "--data-root", tmp_path / "none").code == 0
    refused(bench("run", "suite.yaml", "--data-root", tmp_path / "none"), "mnist", str(tmp_path / "none"))


def test_images_that_are_no_images_are_refused_with_their_index(bench: Bench, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name, value in (("a", 0.5), ("b", 1.5)):
        for split in ("train", "test"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), value, np.float32)).save(folder / "one.tiff")
            Image.fromarray(np.full((8, 8), value / 2, np.float32)).save(folder / "two.tiff")
    path = small(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["data"]["digits"] = {"name": "image-folder", "path": "pictures"}
    document["tasks"][0]["fit"] = "digits"
    path.write_text(yaml.safe_dump(document))
    refused(bench("run", "suite.yaml", "--executor", "inline"), "1.5", "[0, 1]")


def test_a_weights_file_that_is_a_pickle_is_refused_unopened(bench: Bench, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb()))
    defenses = {"mine": {"use": "module", "build": "mine:build", "weights": "weights.pt"}}
    suite(tmp_path, defenses, ATTACKS, [TASK], tables={3: TABLE})
    refused(bench("run", "suite.yaml", "--executor", "inline"), "suite.yaml:", "weights", "pickle")
    assert not (tmp_path / "exploded").exists()


# --- processes ---------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def test_help_and_reports_import_no_torch(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    bench("run", "suite.yaml", "--executor", "inline")
    for words in (["--help"], ["report", "suite.yaml"]):
        code = (
            "import sys, bench.cli\n"
            f"sys.argv = ['bench', *{words!r}]\n"
            "try:\n    bench.cli.main()\n"
            "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "assert not {'torch', 'scipy', 'matplotlib', 'torchvision'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_users_network_that_raises_is_named_leaves_holes_and_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if x.requires_grad:\n"
        "            raise ValueError('no gradients today')\n"
        "        return self.linear(x.flatten(1))\n"
    )
    suite(tmp_path, {"mine": {"use": "module", "build": "mine:Net"}}, ATTACKS, [TASK], tables={3: TABLE})
    done = subprocess.run(
        [*BENCH, "run", "suite.yaml", "--device", "cpu", "--slots", "2"],
        cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not run" in done.stdout
    assert "defense mine (mine:Net): its code raises" in done.stderr
    assert "no gradients today" in done.stderr
    records = [json.loads(each.read_text()) for each in (tmp_path / "results/suite/failed").iterdir()]
    # Its training alone: nothing was attacked.
    assert len(records) == 1
    assert all("no gradients today" in record["traceback"] for record in records)


def test_a_budget_in_which_nothing_fits_is_said_and_ends_with_4(bench: Bench, tmp_path: Path) -> None:
    small(tmp_path)
    ran = bench("run", "suite.yaml", "--executor", "inline", "--budget", "0.001s")
    said = " ".join(ran.out.split())
    assert ran.code == 4, ran.err
    assert "no row fits into" in said
    assert "2 cells of those that were asked for have no number" in said
    assert "Table 3" in said, "what there is, is shown"
    assert bench("run", "suite.yaml", "--executor", "inline", "--budget", "2h").code == 0


def started(folder: Path, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*BENCH, "run", "suite.yaml", "--device", "cpu", "--slots", "2"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        start_new_session=True, **options,
    )  # fmt: skip


def wait_for(pattern: str, folder: Path, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 100
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"nothing like {pattern} in time"
        time.sleep(0.01)


def living(group: int) -> list[str]:
    """Return the processes of a group that are left after a moment."""
    for _ in range(300):
        found = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True, check=False)
        if not found.stdout:
            return []
        time.sleep(0.1)
    return found.stdout.split()


def crash_suite(folder: Path) -> None:
    defenses = {"cnn": {**CNN, "epochs": 8}, "linear": {**CNN, "epochs": 8, "width": 0.5}}
    attacks = {**ATTACKS, "pgd": {"use": "pgd", "steps": 40, "restarts": 2}}
    suite(folder, defenses, attacks, [{**TASK, "views": ["first"], "seeds": [0, 1]}], tables={3: TABLE})


def test_kill_9_in_the_middle_changes_no_bit_of_the_tables(tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        folder.mkdir()
        crash_suite(folder)
    frozen = started(calm)
    out, _ = frozen.communicate(timeout=200)
    assert frozen.returncode == 0, out
    process = started(rough)
    wait_for("results/suite/partial/*/epoch.safetensors", rough, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # The second time only the parent is killed: its workers must not live on without it.
    process = started(rough)
    wait_for("results/suite/craft/*", rough, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert not living(process.pid)
    evaluated = {path.name for path in rough.glob("results/suite/evaluate/*")}
    process = started(rough)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "which build on" in out
    assert len(evaluated) < len(list(rough.glob("results/suite/evaluate/*")))
    for name in ("table-3.csv", "table-3.md"):
        one = (calm / "results/suite/tables" / name).read_bytes()
        assert one == (rough / "results/suite/tables" / name).read_bytes()
    # Not only the tables: every outcome and every weight.
    for path in calm.glob("results/suite/*/*/*"):
        if path.suffix in (".parquet", ".safetensors"):
            assert path.read_bytes() == (rough / path.relative_to(calm)).read_bytes()
    assert not list(rough.glob("results/suite/scratch/*"))


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    crash_suite(tmp_path)
    process = started(tmp_path)
    wait_for("results/suite/partial/*/epoch.safetensors", tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert "and the last epoch of" in out
    # The command that was given: another would start anew in another folder.
    assert "kept in results/suite. Go on with: bench run suite.yaml --device cpu --slots 2" in out


def test_a_worker_that_is_killed_is_replaced_and_its_job_done_again(tmp_path: Path) -> None:
    crash_suite(tmp_path)
    process = started(tmp_path)
    wait_for("results/suite/partial/*/epoch.safetensors", tmp_path, process)
    children = subprocess.run(
        ["pgrep", "-f", "spawn_main", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert not list(tmp_path.glob("results/suite/failed/*")), "what was lost was done again"


@pytest.mark.gpu
def test_a_run_on_a_gpu_says_so_in_its_receipts(tmp_path: Path) -> None:
    small(tmp_path)
    subprocess.run([*BENCH, "run", "suite.yaml", "--device", "cuda:0"], cwd=tmp_path, check=True, timeout=200)
    receipts = [json.loads(path.read_text()) for path in tmp_path.glob("results/suite/train/*/receipt.json")]
    assert {receipt["device"] for receipt in receipts} == {torch.cuda.get_device_name(0)}
    shutil.rmtree(tmp_path / "results")

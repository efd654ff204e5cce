"""When jobs run and where, what ends a run, and what its exit status says."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.errors import InputError
from bench.report.firsthand import quiet
from bench.results import store
from bench.results.failures import TRIES
from bench.runner import progress, scheduler
from bench.runner.context import device_name
from bench.runner.estimates import Estimates
from bench.runner.outstanding import State
from bench.runner.progress import Display
from bench.runner.scheduler import Done
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, Evaluate, Job, Train
from suites import TASK, Ran, suite

LINEAR = {"linear": {"use": "toy/linear"}}
CLEAN = {"clean": {"use": "none"}}
PGD = {"pgd": {"use": "pgd", "steps": 3}}
TABLE = {
    "title": "T",
    "rows": ["defense"],
    "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}},
}
BENCH = [sys.executable, "-m", "bench.cli"]


def simple(folder: Path) -> Path:
    """Write a suite of a network of the user's own, with a table."""
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    defenses = {"net": {"use": "module", "build": "own:build"}}
    return suite(folder, defenses, {**CLEAN, **PGD}, [TASK], tables={"t": TABLE})


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "safetensors"],
)
def test_a_full_disk_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    kept: list[str] = []
    keep = store.Store.keep

    def full(self: Any, kind: str, key: str, *rest: Any) -> None:
        if len(kept) == 2:
            raise error
        kept.append(key)
        keep(self, kind, key, *rest)

    monkeypatch.setattr(store.Store, "keep", full)
    path = suite(tmp_path, LINEAR, {**CLEAN, **PGD}, [{**TASK, "seeds": [0, 1, 2]}])
    ran = Ran(path)
    assert len(ran.failed) == 1
    assert len(ran.done) == 3
    monkeypatch.undo()
    assert not Ran(path).failed


class Dies:
    """A pool whose process dies so many times, and then answers that nothing has changed."""

    devices = ("cpu",)

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.restarts = 0

    def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
        future: Future[dict[str, Any]] = Future()
        if self.restarts < self.deaths:
            future.set_exception(BrokenProcessPool("gone"))
        else:
            future.set_result({"different": None})
        return future

    def restart(self, slot: int) -> None:
        self.restarts += 1


def test_a_network_whose_process_ends_whenever_it_is_asked_again_is_another(tmp_path: Path) -> None:
    path = simple(tmp_path)
    assert not Ran(path).failed
    made = planner.make(resolve.load(path))
    results = store.Store(tmp_path / "results")
    pool: Any = Dies(TRIES)
    found = scheduler.ask_again(made, results, pool)
    assert pool.restarts == TRIES
    ((reason, count),) = found.items()
    assert "ends its process" in reason
    assert count == len([job for job in made.graph() if isinstance(job, Train | Evaluate)]) + 3
    assert not [
        job for job in made.graph() if isinstance(job, Evaluate) and results.receipt("evaluate", job.key)
    ]


def test_a_process_that_somebody_kills_while_it_asks_costs_no_finished_result(tmp_path: Path) -> None:
    path = simple(tmp_path)
    assert not Ran(path).failed
    made = planner.make(resolve.load(path))
    results = store.Store(tmp_path / "results")
    pool: Any = Dies(TRIES - 1)
    assert scheduler.ask_again(made, results, pool) == {}
    assert pool.restarts == TRIES - 1
    assert all(results.receipt(job.kind, job.key) for job in made.graph())


# --- what a run says ---------------------------------------------------------------------------------


def display(folder: Path) -> tuple[Display, Ran, io.StringIO]:
    ran = Ran(suite(folder, LINEAR, CLEAN, [TASK]))
    out = io.StringIO()
    shown = Display(
        Console(file=out, width=200), State(todo=dict(ran.plan.graph())), Estimates(), ("cpu",), quiet
    )
    return shown, ran, out


def test_a_quiet_log_says_now_and_then_what_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 0.5)
    shown, ran, out = display(tmp_path)
    (job,) = [each for each in ran.plan.graph() if isinstance(each, Craft)][:1]
    with shown:
        shown.started(job, 0)
        time.sleep(3.5)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("at work: ") and "clean" in line for line in lines)
    time.sleep(1.5)
    assert out.getvalue().splitlines() == lines


def test_one_reason_is_said_once_and_a_note_with_its_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, ran, out = display(tmp_path)
    jobs: list[Job] = list(ran.plan.graph())
    with shown:
        shown.started(jobs[0], 0)
        shown.said(0, {"note": "weights converted"})
        for job in jobs[:2]:
            shown.ended(Done(job, None, ValueError("no way\nin detail")))
        for job in jobs[:2]:
            shown.ended(Done(job, None, InputError("images are damaged")))
    said = out.getvalue()
    assert said.count("ValueError: no way") == 1
    assert said.count(": the same") == 2
    assert "in detail" not in said
    assert "weights converted" in said
    assert capsys.readouterr().err.count("images are damaged") == 1


@pytest.mark.parametrize("where", [1, None], ids=["in another slot", "elsewhere"])
def test_the_time_left_is_told_of_a_job_that_lost_its_process(tmp_path: Path, where: int | None) -> None:
    ran = Ran(simple(tmp_path))
    costs = Estimates()
    for job in ran.plan.graph():
        costs.learn(job, {"seconds": 3.0, "device": device_name("cpu")})
    todo: Any = {job: needs for job, needs in ran.plan.graph().items()}
    shown = Display(None, State(todo=todo), costs, ("cpu", "cpu"), quiet)
    job = next(job for job, needs in todo.items() if not needs)
    shown.started(job, 0)
    # Its process dies, of which nobody tells the display, and it is done in another place.
    if where is not None:
        shown.started(job, where)
        assert [each["device"] for each in shown.facts()["now"]] == ["cpu"]
    shown.ended(Done(job, {"seconds": 3.0}, slot=where))
    facts = shown.facts()
    assert facts["now"] == []
    assert "left" in facts["left"]


def test_closed_slots_are_no_help_in_the_time_left(tmp_path: Path) -> None:
    ran = Ran(simple(tmp_path))
    costs = Estimates()
    for job in ran.plan.graph():
        costs.learn(job, {"seconds": 100.0, "device": device_name("cpu")})
    todo: Any = dict(ran.plan.graph())

    def left(slots: int, closed: tuple[int, ...]) -> str:
        shown = Display(None, State(todo=todo), costs, ("cpu",) * slots, quiet, lambda: closed)
        return str(shown.facts()["left"])

    assert left(8, tuple(range(1, 8))) == left(1, ())
    assert left(8, ()) != left(1, ())


def test_what_needs_a_job_that_failed_takes_no_time(tmp_path: Path) -> None:
    ran = Ran(simple(tmp_path))
    costs = Estimates()
    for job in ran.plan.graph():
        costs.learn(job, {"seconds": 100.0, "device": device_name("cpu")})
    todo: Any = dict(ran.plan.graph())
    trains = [job for job in todo if isinstance(job, Train)]

    def left(failed: list[Train]) -> str:
        shown = Display(None, State(todo=todo), costs, ("cpu",), quiet)
        for each in failed:
            shown.ended(Done(each, None, RuntimeError("no")))
        return str(shown.facts()["left"])

    # The images of an attack that looks at no network need none.
    without = [job for job, needs in todo.items() if not needs and job not in trains]
    assert left([]) == f"about {100 * len(todo) / 60:.0f} min left"
    assert left(trains) == f"about {100 * len(without) / 60:.0f} min left"
    assert 1 < len(without) < len(todo)


# --- exit statuses -----------------------------------------------------------------------------------


def test_a_report_is_strict_where_it_is_asked_to_be(tmp_path: Path) -> None:
    path = simple(tmp_path)
    assert bench(tmp_path, "run", path.name, "--executor", "inline").returncode == 0
    strict = ("report", path.name, "--strict")
    alarmed = bench(tmp_path, *strict)
    assert alarmed.returncode == 1
    assert "strict: 1 alarm: at-chance in table t" in alarmed.stderr, "nobody has trained the network"
    assert bench(tmp_path, "run", path.name, "--strict", "--executor", "inline").returncode == 1
    (first, *_) = sorted((tmp_path / "results" / "suite" / "evaluate").iterdir())
    whole = (first / "outcomes.parquet").read_bytes()
    for harm in ("damaged", "missing", "stale"):
        if harm == "damaged":
            (first / "outcomes.parquet").write_bytes(whole[:-10])
        elif harm == "missing":
            (first / "outcomes.parquet").unlink()
        else:
            (first / "outcomes.parquet").write_bytes(whole)
            (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text() + "\nX = 1\n")
        found = bench(tmp_path, *strict)
        assert found.returncode == 4, harm
        assert "strict:" in found.stderr
        assert bench(tmp_path, "report", path.name).returncode == 0
    assert bench(tmp_path, "run", path.name, "--executor", "inline").returncode == 0
    assert bench(tmp_path, *strict).returncode == 1


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_sigterm_is_a_stop_that_can_be_gone_on_from(tmp_path: Path, executor: str) -> None:
    defenses = {"linear": {"use": "standard", "net": "b2", "width": 0.25, "epochs": 30, "batch": 8}}
    path = suite(tmp_path, defenses, CLEAN, [{**TASK, "seeds": [0, 1]}])
    process = subprocess.Popen(
        [*BENCH, "run", path.name, "--executor", executor],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 100
    while not list(tmp_path.glob("results/suite/partial/*/*")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "stopped" in out
    assert "Traceback" not in out


def until_head(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a command whose reader goes away after one line."""
    process = subprocess.Popen(
        [*BENCH, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=100), error


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "json"])
def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path, form: str) -> None:
    path = simple(tmp_path)
    assert bench(tmp_path, "run", path.name, "--executor", "inline").returncode == 0
    code, error = until_head(["report", path.name, "--format", form], tmp_path)
    assert code == 0
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


def test_a_run_that_nobody_listens_to_ends_with_its_own_status(tmp_path: Path) -> None:
    path = simple(tmp_path)
    (tmp_path / "own.py").write_text("def build():\n    raise ValueError('no')\n")
    code, _ = until_head(["run", path.name, "--executor", "inline"], tmp_path)
    assert code == 2


# --- what outlives a job -----------------------------------------------------------------------------

OUTLIVES = {
    "atexit": "import atexit, os; atexit.register(os._exit, 0)",
    "thread": "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()",
    "excepthook": "import sys; sys.excepthook = lambda *_: sys.exit(0)",
}


@pytest.mark.parametrize("line", OUTLIVES.values(), ids=OUTLIVES)
def test_what_a_network_leaves_for_the_end_decides_no_status(tmp_path: Path, line: str) -> None:
    path = simple(tmp_path)
    (tmp_path / "own.py").write_text(f"def build():\n    {line}\n    raise ValueError('no')\n")
    ended = bench(tmp_path, "run", path.name, "--executor", "inline")
    assert ended.returncode == 2, ended.stderr
    assert "not run" in ended.stdout


def test_the_order_of_sets_is_one_in_every_process(tmp_path: Path) -> None:
    path = simple(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    names = list({f'class {n}' for n in range(10)})\n"
        "    scale = torch.tensor([1.0 + int(name[6:]) for name in names])\n"
        "    net.register_forward_hook(lambda module, x, z: z * scale)\n"
        "    return net\n"
    )
    tables = []
    for name, executor in (("a", "inline"), ("b", "inline"), ("c", "process")):
        assert bench(tmp_path, "run", path.name, "--executor", executor, "--results", name).returncode == 0
        tables.append((tmp_path / name / "tables" / "table-t.csv").read_text())
    assert tables[0] == tables[1] == tables[2]


def test_a_vendored_repository_is_found_and_two_stay_apart(tmp_path: Path) -> None:
    path = simple(tmp_path)
    defenses = {}
    for name, scale in (("one", 1.0), ("two", -1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.py").write_text(
            "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n"
            f"        self.net = nn.Linear(64, 10)\n    def forward(self, x):\n"
            f"        return {scale} * self.net(x.flatten(1))\n"
        )
        (tmp_path / f"use_{name}.py").write_text(
            "import sys\nfrom pathlib import Path\n\ndef build():\n"
            f"    sys.path.insert(0, str(Path(__file__).parent / '{name}'))\n"
            "    from models import Net\n    return Net()\n"
        )
        defenses[name] = {"use": "module", "build": f"use_{name}:build"}
    path = suite(tmp_path, defenses, CLEAN, [TASK])
    before = list(sys.path)
    ran = Ran(path)
    assert not [each.error for each in ran.failed]
    assert sys.path == before
    assert "models" not in sys.modules
    one, two = (ran.outcomes(defense=name) for name in ("one", "two"))
    assert [list(a) for a in one["logits"]] == [[-value for value in b] for b in two["logits"]]


def test_a_damaged_mark_of_a_results_folder_is_written_anew(tmp_path: Path) -> None:
    path = suite(tmp_path, LINEAR, CLEAN, [TASK])
    first = Ran(path)
    for content in (b"", b"[null]", b'{"scheme": "1"}', b"\xff\x00"):
        (tmp_path / "results" / "store.json").write_bytes(content)
        (said,) = first.store.open()
        assert "store.json was damaged" in said
        assert not Ran(path).done

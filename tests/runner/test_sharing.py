"""Several workers at one results folder: every job is done once, whatever dies."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import InputError, persons
from bench.results import durable, leases
from bench.results.failures import TRIES, Failures
from bench.results.leases import Leases
from bench.results.store import ABSENT
from bench.runner import scheduler
from bench.runner.estimates import Estimates
from bench.runner.interrupts import ENDING, Terminated, terminable
from bench.runner.outstanding import State
from bench.runner.scheduler import Done, Scheduler, Share, Stopped

BENCH = [sys.executable, "-m", "bench"]


# --- jobs that are files, so that hundreds take seconds ------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A job that writes its key into a log."""

    key: str
    needs: tuple["Toy", ...] = ()
    kind: str = "toy"


class Costless(Estimates):
    """Every job takes as long."""

    def seconds(self, job: Any, device: str | None = None) -> float:
        return 1.0

    def learn(self, job: Any, receipt: Any) -> None:
        pass


class Folder:
    """A results folder of toy jobs; `log` counts how often each was done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "done").mkdir(parents=True, exist_ok=True)
        self.log: list[tuple[str, str]] = []

    def receipt(self, kind: str, key: str) -> dict[str, Any] | None:
        return {"key": key} if (self.root / "done" / key).exists() else None

    def state(self, jobs: list[Toy]) -> State:
        left = [job for job in jobs if self.receipt(job.kind, job.key) is None]
        todo: Any = {job: tuple(need for need in job.needs if need in left) for job in left}
        return State(todo=todo, fault=lambda job: None if self.receipt(job.kind, job.key) else ABSENT)


class Slots:
    """Slots that do a toy job in a thread; `dies` are keys that lose their process so many times."""

    def __init__(self, folder: Folder, name: str, slots: int = 2, dies: dict[str, int] | None = None) -> None:
        self.devices, self.occupancy = ("cpu",) * slots, None
        self.folder, self.name, self.dies = folder, name, dies if dies is not None else {}
        self.killed: list[int] = []

    def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
        future: Future[dict[str, Any]] = Future()

        def work() -> None:
            if self.dies.get(job.key, 0) > 0:
                self.dies[job.key] -= 1
                future.set_exception(BrokenProcessPool("gone"))
                return
            assert all((self.folder.root / "done" / need.key).exists() for need in job.needs)
            self.folder.log.append((job.key, self.name))
            time.sleep(0.001)
            (self.folder.root / "done" / job.key).touch()
            future.set_result({"key": job.key})

        threading.Thread(target=work).start()
        return future

    def warm(self, slot: int, job: Any) -> bool:
        return True

    def restart(self, slot: int) -> None:
        pass

    def kill(self, slot: int) -> None:
        self.killed.append(slot)

    def watch(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass


def tree(width: int, deep: int) -> list[Toy]:
    """Return trainings, crafts that need one of them, and evaluations that need some crafts."""
    trains = [Toy(f"t{n}") for n in range(width)]
    crafts = [Toy(f"c{n}-{k}", (trains[n],)) for n in range(width) for k in range(deep)]
    asks = [Toy(f"e{n}", tuple(each for each in crafts if each.needs[0] is trains[n])) for n in range(width)]
    return [*trains, *crafts, *asks]


@pytest.fixture(autouse=True)
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL", 0.02)


def drive(folder: Folder, jobs: list[Toy], pool: Slots, request: str = "r") -> list[Done]:
    with Leases(folder.root) as own:
        share = Share(own, Failures(folder.root, request, own.name))
        state: Any = folder.state(jobs)
        some_pool: Any = pool
        some_store: Any = folder
        return list(Scheduler(state, some_store, some_pool, Costless(), share).run())


@pytest.mark.parametrize("drivers", [1, 2, 10])
def test_drivers_share_the_work_and_do_no_job_twice(tmp_path: Path, drivers: int) -> None:
    folder, jobs = Folder(tmp_path), tree(10, 12)
    found: dict[int, list[Done]] = {}

    def run(number: int) -> None:
        found[number] = drive(folder, jobs, Slots(folder, str(number)))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(drivers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert Counter(key for key, _ in folder.log) == Counter(job.key for job in jobs)
    for number, done in found.items():
        here = {each.job.key for each in done if each.slot is not None}
        assert here == {key for key, name in folder.log if name == str(number)}
        assert not [each for each in done if each.error]
    assert len({name for _, name in folder.log}) == drivers, "each of them did a part"
    assert not list((tmp_path / leases.LEASES).iterdir())


def test_a_job_that_loses_its_process_is_tried_again_and_then_a_hole_with_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "describe", lambda job: {"kind": job.kind})
    folder, jobs = Folder(tmp_path), tree(2, 2)
    dies = {"c0-0": TRIES - 1, "c1-0": TRIES}
    done = drive(folder, jobs, Slots(folder, "only", dies=dies))
    failed = {each.job.key: each.error for each in done if each.error}
    assert list(failed) == ["c1-0"]
    assert f"{TRIES} times" in str(failed["c1-0"])
    # What needs it does not start; everything else is done.
    assert {each.key for each in jobs} - {key for key, _ in folder.log} == {"c1-0", "e1"}
    record = json.loads((tmp_path / "failed" / "c1-0.json").read_text())
    assert len(record["tries"]) == TRIES
    assert record["final"] is True
    assert dies == {"c0-0": 0, "c1-0": 0}


def test_tries_are_counted_over_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "describe", lambda job: {"kind": job.kind})
    folder, jobs = Folder(tmp_path), [Toy("poison"), *tree(2, 3)]
    dies = {"poison": 1000}
    found: list[list[Done]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(drive(folder, jobs, Slots(folder, "x", slots=1, dies=dies)))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert 1000 - dies["poison"] == TRIES
    for done in found:
        assert [each.job.key for each in done if each.error] == ["poison"]
    assert len(folder.log) == len(jobs) - 1


def test_a_failure_of_one_is_the_failure_of_all(tmp_path: Path) -> None:
    jobs = tree(1, 2)
    folder = Folder(tmp_path)
    with Leases(tmp_path) as other:
        theirs = Failures(tmp_path, "other run", other.name)
        assert other.take("c0-0")
        found: list[Done] = []
        thread = threading.Thread(target=lambda: found.extend(drive(folder, jobs, Slots(folder, "here"))))
        thread.start()
        end = time.monotonic() + 50
        while ("c0-1", "here") not in folder.log and time.monotonic() < end:
            time.sleep(0.01)
        theirs.fail("c0-0", {}, InputError("epochs: too many"))
        other.free("c0-0")
        thread.join(timeout=100)
    (failed,) = [each for each in found if each.error]
    assert failed.job.key == "c0-0"
    assert isinstance(failed.error, InputError)
    assert str(failed.error) == "epochs: too many"
    assert sorted(key for key, _ in folder.log) == ["c0-1", "t0"]


def test_the_time_of_a_job_begins_when_a_process_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster a job may wait for a worker, and nothing could be killed then."""
    monkeypatch.setattr(scheduler, "GRACE", 0.1)
    monkeypatch.setattr(scheduler, "describe", lambda job: {"kind": job.kind})
    folder = Folder(tmp_path)

    class Crowded(Slots):
        """In which a job waits for longer than its limit, and then hangs until it is killed."""

        def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
            self.future: Future[dict[str, Any]] = Future()

            def work() -> None:
                time.sleep(0.6)
                self.future.set_running_or_notify_cancel()
                begun.append(time.monotonic())

            threading.Thread(target=work).start()
            return self.future

        def kill(self, slot: int) -> None:
            assert self.future.running(), "what waits is not killed"
            killed.append(time.monotonic())
            self.future.set_exception(BrokenProcessPool("killed"))

    begun: list[float] = []
    killed: list[float] = []
    pool: Any = Crowded(folder, "here", slots=1)
    some_store: Any = folder
    with Leases(folder.root) as own:
        share = Share(own, Failures(folder.root, "r", own.name))
        jobs = Scheduler(folder.state([Toy("slow")]), some_store, pool, Costless(), share, limit=0.1)
        (done,) = jobs.run()
    assert "longer than its limit of 0.1 s" in str(done.error)
    assert len(begun) == len(killed) == TRIES
    assert all(0.2 <= end - start < 5 for start, end in zip(begun, killed, strict=True))


def left_by_a_dead_worker(root: Path, key: str) -> None:
    (root / leases.LEASES).mkdir()
    dead = f"worker{durable.mark()}".replace(f"@{os.getpid()}@", "@999999999@")
    (root / leases.LEASES / key).write_text(dead)


@pytest.mark.parametrize("how", ["done", "failed"])
def test_a_job_that_a_dead_worker_had_ended_is_not_tried_again(tmp_path: Path, how: str) -> None:
    """It was killed between the end of the job and that of its lease, after others had died at the job."""
    jobs = tree(1, 1)

    class Meanwhile(Folder):
        """Where a job ends after somebody has looked what is to do."""

        def state(self, jobs: list[Toy]) -> State:
            found = super().state(jobs)
            if how == "done":
                (self.root / "done" / "t0").touch()
            else:
                failures.fail("t0", {}, InputError("epochs: too many"))
            return found

    folder, failures = Meanwhile(tmp_path), Failures(tmp_path, "r", "dead")
    for _ in range(TRIES - 1):
        failures.died("t0", {}, "gone")
    left_by_a_dead_worker(tmp_path, "t0")
    done = drive(folder, jobs, Slots(folder, "here"))
    (first,) = [each for each in done if each.job.key == "t0"]
    assert first.slot is None
    assert ("t0", "here") not in folder.log
    if how == "done":
        assert first.error is None
        assert {key for key, _ in folder.log} == {"c0-0", "e0"}
    else:
        assert isinstance(first.error, InputError)
        assert not folder.log


def test_a_disk_that_is_full_when_a_dead_worker_s_job_is_taken_over_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "describe", lambda job: {"kind": job.kind})
    folder = Folder(tmp_path)
    left_by_a_dead_worker(tmp_path, "t0")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Failures, "died", full)
    monkeypatch.setattr(Failures, "fail", full)
    (failed,) = drive(folder, tree(1, 1), Slots(folder, "here"))
    assert isinstance(failed.error, OSError)
    assert not folder.log


def test_a_disk_that_becomes_read_only_ends_the_run_at_the_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "describe", lambda job: {"kind": job.kind})
    folder, tried = Folder(tmp_path), []

    class Refused(Slots):
        def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
            tried.append(job.key)
            future: Future[dict[str, Any]] = Future()
            future.set_exception(OSError(errno.EROFS, os.strerror(errno.EROFS), "r/scratch/a"))
            return future

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Failures, "fail", refuse)
    (failed,) = drive(folder, [Toy(f"t{number}") for number in range(9)], Refused(folder, "here", slots=1))
    assert len(tried) == 1
    assert failed.error is not None
    assert persons(failed.error) == "r/scratch/a: the disk is read-only; what is finished is kept"


def test_a_request_to_stop_ends_a_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with Leases(tmp_path) as other:
        assert other.take("t0")
        raised: list[BaseException] = []

        def run() -> None:
            try:
                drive(folder, tree(1, 1), Slots(folder, "here"))
            except Stopped as stop:
                raised.append(stop)

        thread = threading.Thread(target=run)
        thread.start()
        end = time.monotonic() + 50
        while len(leases.workers(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        leases.ask_to_stop(tmp_path)
        thread.join(timeout=50)
    assert len(raised) == 1
    assert not folder.log


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_whose_exception_somebody_swallows_still_ends_a_run(tmp_path: Path, number: int) -> None:
    folder = Folder(tmp_path)

    class Swallows(Slots):
        """As extension modules do while they load."""

        def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(10)
            return super().submit(slot, job)

    jobs = tree(1, 5)
    expected = KeyboardInterrupt if number == signal.SIGINT else Terminated
    with pytest.raises(KeyboardInterrupt) as raised, terminable():
        drive(folder, jobs, Swallows(folder, "here", slots=1))
    assert raised.type is expected
    assert len(folder.log) <= 1, "the job that ran then, and no other"
    with terminable():
        drive(folder, jobs, Slots(folder, "again"))
    assert len(list((tmp_path / "done").iterdir())) == len(jobs), "what was asked is asked once"


# --- the command line ----------------------------------------------------------------------------------

SUITE: dict[str, Any] = {
    "data": {"digits": {"name": "digits", "split": "test", "size": 60, "shard": 5}},
    "defenses": {"linear": {"use": "module", "build": "own:build"}},
    "attacks": {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 5, "step_size": 0.05}},
    "tasks": [
        {"data": "digits", "views": ["logits"], "threat": {"norm": "linf", "radius": 0.1}, "seeds": [0, 1]}
    ],
    "tables": {"t": {"title": "T", "rows": "defense", "columns": "attack"}},
}
OWN = """
import torch
from torch import nn

def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def project(folder: Path, own: str = OWN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(own)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return path


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*BENCH, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: "subprocess.Popen[str]", code: int | None = 0) -> str:
    out, _ = process.communicate(timeout=200)
    assert code is None or process.returncode == code, out
    return out


def outcomes(root: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in root.glob("evaluate/*/outcomes.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    project(folder)
    ended(start(folder, "run", "suite.yaml", "--executor", "inline", "--results", "r"))
    return outcomes(folder / "r")


def done_here(out: str) -> int:
    """Return how many jobs a run says that it did itself."""
    (line,) = [line for line in out.splitlines() if " done in " in line]
    return int(line.split()[0])


def test_two_runs_and_a_worker_do_every_job_once(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    project(tmp_path)
    run = ("run", "suite.yaml", "--executor", "inline", "--results", "r")
    one = start(tmp_path, *run)
    end = time.monotonic() + 100
    while not (tmp_path / "r" / "request.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    several = [
        one,
        start(tmp_path, "worker", "r", "--executor", "inline"),
        start(tmp_path, *run),
    ]
    said = [ended(each) for each in several]
    receipts = list((tmp_path / "r").glob("*/*/receipt.json"))
    assert sum(done_here(out) for out in said if " done in " in out) == len(receipts), said
    assert outcomes(tmp_path / "r") == undisturbed
    found = subprocess.run(
        [*BENCH, "status", "r", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout)["workers"] == []


def test_a_run_in_the_background_is_seen_and_stopped(tmp_path: Path) -> None:
    slow = OWN.replace("def build", "import time\n\ndef build").replace(
        "    torch", "    time.sleep(60)\n    torch"
    )
    project(tmp_path, slow)
    begun = ended(start(tmp_path, "run", "suite.yaml", "--detach", "--results", "r", "--device", "cpu"))
    assert "runs in the background as process" in begun
    end, said = time.monotonic() + 50, ""
    while "train linear" not in said:
        assert time.monotonic() < end, said
        said = ended(start(tmp_path, "status", "r"))
    stopped = ended(start(tmp_path, "stop", "r"))
    assert "stopped" in stopped
    (log,) = (tmp_path / "r" / "logs").iterdir()
    assert "Go on with: bench run suite.yaml" in log.read_text()
    assert "nobody" in ended(start(tmp_path, "status", "r"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("worker", "nowhere"), "nowhere: no run was started in this folder"),
        (("status", "nowhere"), "nowhere: there is no such results folder"),
        (("stop", "nowhere"), "nowhere: there is no such results folder"),
        (("stop", "empty"), "empty: nobody is at work there"),
        (("worker", "other"), "not a request of this version"),
        (("run", "none.yaml", "--detach"), "none.yaml"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "request.json").write_text('{"version": 7}')
    out = ended(start(tmp_path, *words), 2)
    assert part in " ".join(out.split())
    assert "Traceback" not in out


def test_other_code_at_a_folder_where_somebody_works_is_refused(tmp_path: Path) -> None:
    project(tmp_path)
    root = tmp_path / "r"
    ended(start(tmp_path, "run", "suite.yaml", "--executor", "inline", "--results", "r"))
    sources = json.loads((root / "request.json").read_text())["sources"]
    name = sorted(sources)[0]
    with Leases(root, lambda: {"sources": {**sources, name: "0" * 64}}):
        out = ended(start(tmp_path, "run", "suite.yaml", "--executor", "inline", "--results", "r"), 2)
    assert f"with another {name}" in " ".join(out.split())
    request = json.loads((root / "request.json").read_text())
    (root / "request.json").write_text(json.dumps({**request, "sources": {**sources, name: "0" * 64}}))
    out = ended(start(tmp_path, "worker", "r"), 2)
    assert f"with another {name}" in " ".join(out.split())
    (tmp_path / "suite.yaml").write_text((tmp_path / "suite.yaml").read_text() + "\n# more\n")
    (root / "request.json").write_text(json.dumps(request))
    assert "changed since the run" in " ".join(ended(start(tmp_path, "worker", "r"), 2).split())

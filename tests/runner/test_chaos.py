"""A storm over drivers, workers and the processes of their slots: nothing is lost, and no bit is another."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

KILLS = int(os.environ.get("BENCH_KILLS", "5"))
"""How many; the large storm, a quarter of an hour of two cores: ``BENCH_KILLS=100``, with ``-s``."""

LARGE = KILLS >= 50

RUN = ("run", "suite.yaml", "--device", "cpu", "--slots", "2", "--results", "r")
WORKER = ("worker", "r", "--device", "cpu", "--slots", "1")

OWN = """
import torch
from torch import nn

def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""

LOGGED = '''
"""`bench`, which logs each job as it begins and as it ends."""

import os
from pathlib import Path

from bench.cli import main
from bench.results.store import Store
from bench.runner.executors import process
from bench.runner.worker import do
from bench.suite.jobs import Craft, Evaluate, Examination, Train, Trial


def log(what, job):
    line = f"{what} {job.key} {os.getpid()} {os.getppid()}\\n".encode()
    handle = os.open(Path(__file__).parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line)
    os.close(handle)


def logged(job, context, progress=None):
    known = isinstance(job, Train | Craft | Evaluate | Trial | Examination)
    if not known or Store(context.store).damage(job.kind, job.key) is None:
        return do(job, context, progress)
    log("begin", job)
    receipt = do(job, context, progress)
    log("end", job)
    return receipt


process.do = logged
if __name__ == "__main__":
    main()
'''


def project(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(OWN)
    (folder / "logged.py").write_text(LOGGED)
    cnn = {"use": "cnn", "training": "standard", "net": "b2", "width": 0.25, "hidden": [16], "batch": 64}
    suite: dict[str, Any] = {
        "data": {"digits": {"name": "digits", "split": "test", "size": 300 if LARGE else 30, "shard": 5}},
        "defenses": {
            "linear": {"use": "module", "build": "own:build"},
            "cnn": {**cnn, "epochs": 8 if LARGE else 3},
        },
        "attacks": {
            "clean": {"use": "none"},
            "pgd": {"use": "pgd", "steps": 40, "restarts": 10 if LARGE else 1, "step_size": 0.05},
        },
        "tasks": [
            {
                "data": "digits",
                "views": ["logits"],
                "threat": {"norm": "linf", "radius": 0.1},
                "defenses": ["linear"],
                "seeds": [0, 1],
            },
            {
                "data": "digits",
                "views": ["first"],
                "threat": {"norm": "linf", "radius": 0.1},
                "defenses": ["cnn"],
                "seeds": [0, 1] if LARGE else [0],
            },
        ],
        "tables": {"t": {"title": "T", "rows": "defense", "columns": "attack"}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))


def results(root: Path) -> dict[str, bytes]:
    """Return outcomes, adversarial images and weights by their names."""
    found = {path for kind in ("outcomes.parquet", "*.safetensors") for path in root.glob(f"*/*/{kind}")}
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


class Begun(NamedTuple):
    """A job that a process began."""

    pid: int
    parent: int


@dataclass
class Log:
    """What the processes logged of each job, by its key."""

    begun: dict[str, list[Begun]] = field(default_factory=lambda: defaultdict(list))
    ended: Counter[str] = field(default_factory=Counter)
    at_work: set[int] = field(default_factory=set)
    """The processes that do a job, their parents, and those that were killed at one."""

    @classmethod
    def read(cls, path: Path) -> "Log":
        found = cls()
        for line in path.read_text().splitlines() if path.exists() else ():
            what, key, pid, parent = line.split()
            if what == "begin":
                found.begun[key].append(Begun(int(pid), int(parent)))
                found.at_work |= {int(pid), int(parent)}
            else:
                found.ended[key] += 1
                found.at_work -= {int(pid), int(parent)}
        return found


class Storm:
    """Some drivers and workers at one folder, of which one after the other is hit."""

    def __init__(self, folder: Path, draw: random.Random, most: int, names: Collection[str]) -> None:
        self.folder, self.draw, self.most, self.names = folder, draw, most, names
        self.every: list[subprocess.Popen[bytes]] = []
        self.killed: set[int] = set()
        self.stopped = 0
        self.waiting: list[threading.Timer] = []

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"out-{len(self.every)}").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "logged.py", *words], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT
            )
        self.every.append(process)
        return process

    def living(self) -> list["subprocess.Popen[bytes]"]:
        return [each for each in self.every if each.poll() is None]

    def victim(self) -> int | None:
        """Return a driver, a worker, or the process of a slot: most often one that does a job now."""
        # Many more would only just have begun, above all on a busy machine.
        end = time.monotonic() + (60.0 if self.draw.random() < 0.7 else 0.0)
        while True:
            # One that has no slot yet, or none any more, has only just begun or is about to end.
            found = [pid for each in self.living() if (own := slots(each.pid)) for pid in (each.pid, *own)]
            if at_work := Log.read(self.folder / "log").at_work & set(found):
                return self.draw.choice(sorted(at_work))
            if time.monotonic() >= end or self.done() == 1.0:
                return self.draw.choice(found) if found else None
            time.sleep(0.02)

    def hit(self, pid: int, seconds: float | None) -> None:
        """Kill a process, or stop it for a while."""
        if seconds is None:
            self.killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            return
        self.stopped += 1
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(seconds, wake, [pid])
        timer.start()
        self.waiting.append(timer)

    def blow(self, kills: int) -> None:
        """Hit, with moments in between, until so many were killed or nothing is left to do."""
        # A lease of whoever is silent for a minute is taken over; a large storm has two such.
        sleeps = [75.0, 75.0] if LARGE else []
        while len(self.killed) < kills:
            while len(self.living()) < self.most:
                self.start(*(RUN if self.draw.random() < 0.5 or len(self.every) < 2 else WORKER))
            end, due = time.monotonic() + self.draw.uniform(0.05, 2.0), len(self.killed) / kills
            # Sooner where jobs are done faster, so that the storm lasts as long as the work.
            while time.monotonic() < end and self.done() < due:
                time.sleep(0.05)
            if self.done() == 1.0:
                return
            if (pid := self.victim()) is None:
                continue
            seconds = None
            if self.draw.random() < 0.15:
                seconds = sleeps.pop() if sleeps else self.draw.uniform(0.2, 5.0)
            with suppress(ProcessLookupError):
                self.hit(pid, seconds)

    def done(self) -> float:
        """Return the share of results that are there."""
        return sum((self.folder / "r" / each).exists() for each in self.names) / len(self.names)

    def over(self) -> None:
        """Wait until everybody has ended, or been woken and ended."""
        for timer in self.waiting:
            timer.join(timeout=100)
        for each in self.every:
            each.wait(timeout=600)

    def said(self) -> str:
        """Return what all of them printed."""
        texts = [path.read_text(errors="replace") for path in sorted(self.folder.glob("out-*"))]
        return " ".join(" ".join(texts).split())


def slots(pid: int) -> list[int]:
    """Return the processes that do jobs for a driver or worker."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            # A child that was killed is there until its parent looks.
            with suppress(psutil.Error):
                found += [child.pid] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def wake(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("calm")
    project(folder)
    command = [sys.executable, "-m", "bench", *RUN]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return results(folder / "r")


def test_a_storm_over_drivers_workers_and_slots_loses_nothing_and_does_little_twice(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    """Every job is done once, or one that was at it was killed, or slept too long, which is said."""
    project(tmp_path)
    storm = Storm(tmp_path, random.Random(KILLS), 3 if LARGE else 2, calm)
    begun = time.monotonic()
    storm.blow(KILLS)
    storm.over()
    last = storm.start(*RUN)
    last.wait(timeout=900)
    said = storm.said()
    assert last.returncode == 0, (tmp_path / f"out-{len(storm.every) - 1}").read_text()
    assert len(storm.killed) >= min(3, KILLS)
    assert "Traceback" not in said
    assert results(tmp_path / "r") == calm
    assert not list((tmp_path / "r" / "leases").iterdir()), "nobody holds anything any more"
    log = Log.read(tmp_path / "log")
    receipts = {path.parent.name for path in (tmp_path / "r").glob("*/*/receipt.json")}
    assert set(log.begun) == receipts
    again = {key: each for key, each in log.begun.items() if len(each) > 1}
    twice = {key for key, number in log.ended.items() if number > 1}
    # A process is also killed with its driver.
    unfinished = {
        key: sum(each.pid in storm.killed or each.parent in storm.killed for each in tries)
        for key, tries in again.items()
    }
    told = {key: said.count(f"{key[:8]}) is done again") + said.count(f"{key[:8]}): ") for key in again}
    sys.stdout.write(
        f"\n{len(storm.killed)} kills and {storm.stopped} stops over {len(storm.every)} drivers and workers"
        f" in {time.monotonic() - begun:.0f} s; {len(receipts)} jobs, {len(again)} begun more than once "
        f"({sum(map(len, again.values())) - len(again)} times), {len(twice)} ended more than once\n"
    )
    for key, tries in again.items():
        assert told[key], f"{key}: nobody says why it was done {len(tries)} times"
        assert unfinished[key] or storm.stopped, f"{key}: done {len(tries)} times, and nobody died"


FULL = """
set -u
bench() { "$PYTHON" -m bench "$@"; }
mount -t tmpfs -o size="$1" tmpfs r
bench run suite.yaml --device cpu --slots 2 --results r > out-0 2>&1 &
run=$!
while kill -0 $run 2> /dev/null && ! [ -e r/request.json ]; do sleep 0.1; done
bench worker r --device cpu --slots 1 > out-1 2>&1 &
worker=$!
wait $run; echo $? > code-0
wait $worker; echo $? > code-1
mount -o remount,size=1g r
ls r/*/*/receipt.json | wc -l > kept
# The disk becomes read-only in the middle of a run, as soon as nothing is being written.
bench run suite.yaml --device cpu --slots 2 --results r > out-2 2>&1 &
run=$!
before=$(cat kept)
while [ "$(ls r/*/*/receipt.json | wc -l)" -le "$before" ] && kill -0 $run 2> /dev/null; do sleep 0.1; done
until mount -o remount,ro r 2> /dev/null; do sleep 0.01; done
wait $run; echo $? > code-2
bench worker r --device cpu --slots 1 > out-3 2>&1; echo $? > code-3
mount -o remount,rw r
bench run suite.yaml --device cpu --slots 2 --results r > out-4 2>&1; echo $? > code-4
cp -r r after
"""


def own_mounts() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(not own_mounts(), reason="nobody may mount a small disk here")
def test_a_disk_that_is_full_and_one_that_is_read_only_end_everybody_in_a_sentence(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    project(tmp_path)
    (tmp_path / "r").mkdir()
    pages = sum(-(-len(each) // 4096) for each in calm.values())
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", f"{4 * pages}k"]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=800)
    said = [" ".join((tmp_path / f"out-{number}").read_text().split()) for number in range(5)]
    codes = [int((tmp_path / f"code-{number}").read_text()) for number in range(5)]
    assert codes == [2, 2, 2, 2, 0], said
    assert int((tmp_path / "kept").read_text()) > 0
    assert "no space left on the disk; what is finished is kept" in said[0]
    assert all("the disk is read-only; what is finished is kept" in each for each in said[2:4])
    # One complaint, and not one for each job.
    assert said[3].count("read-only") == 1
    assert not [each for each in said if "Traceback" in each]
    assert results(tmp_path / "after") == calm

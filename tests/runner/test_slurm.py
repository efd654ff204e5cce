"""Workers on Slurm, tried by submitit's local executor: they end cleanly, and nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_sharing import BENCH, done_here, ended, outcomes, project, start

from bench.errors import InputError
from bench.results import leases
from bench.runner import executors
from bench.runner.executors.protocol import Asked

submitit = pytest.importorskip("submitit")
RUN = ("run", "suite.yaml", "--results", "r", "--executor", "slurm", "--slurm", "cluster=local")
ONE = ("--device", "cpu", "--slots", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    project(folder)
    ended(start(folder, "run", "suite.yaml", "--executor", "inline", "--results", "r"))
    return outcomes(folder / "r")


def workers(root: Path, number: int) -> list[leases.Worker]:
    """Wait until so many workers have begun, and return them."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        found = [each for each in leases.workers(root) if each.said.get("devices") and not each.dead]
        if len(found) >= number:
            return found
        time.sleep(0.05)
    raise AssertionError(leases.workers(root))


def pid_of(worker: leases.Worker) -> int:
    return int(worker.name.split("@")[2])


def test_workers_do_everything_and_one_that_is_killed_is_replaced(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    project(tmp_path)
    run = start(tmp_path, *RUN, "--workers", "2", *ONE)
    victim = psutil.Process(pid_of(workers(tmp_path / "r", 2)[0]))
    assert "watches workers elsewhere" in ended(start(tmp_path, "status", "r"))
    for each in [*victim.children(recursive=True), victim]:
        each.kill()
    out = ended(run)
    assert "2 workers submitted" in out
    assert done_here(out) == 0, "the run that submits has no slot"
    assert outcomes(tmp_path / "r") == undisturbed
    assert not list((tmp_path / "r" / "leases").iterdir())
    assert "suite.yaml: 4 of 4" in ended(start(tmp_path, *RUN))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_worker_ends_cleanly_at_the_signals_of_slurm(
    tmp_path: Path, undisturbed: dict[str, bytes], number: int
) -> None:
    project(tmp_path)
    root = tmp_path / "r"
    first = start(tmp_path, "run", "suite.yaml", "--results", "r", "--executor", "inline")
    (worker,) = workers(root, 1)
    os.kill(pid_of(worker), number)
    assert "Go on with" in ended(first, 128 + signal.SIGTERM)
    assert not list((root / "leases").iterdir())
    assert not leases.workers(root)
    ended(start(tmp_path, "run", "suite.yaml", "--results", "r", "--executor", "inline"))
    assert outcomes(root) == undisturbed


def test_a_worker_whose_time_is_over_comes_back(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    project(tmp_path)
    root = tmp_path / "r"
    run = start(tmp_path, *RUN, *ONE)
    (worker,) = workers(root, 1)
    above = psutil.Process(pid_of(worker)).parent()
    assert above is not None
    above.send_signal(signal.SIGUSR2)
    out = ended(run)
    assert outcomes(root) == undisturbed, out
    logs = "".join(each.read_text() for each in (root / "logs" / "slurm").rglob("*.out"))
    assert "Requeued job" in logs
    assert not list((root / "leases").iterdir())


def test_a_run_whose_workers_have_all_ended_says_so_and_what_they_said(tmp_path: Path) -> None:
    project(tmp_path)
    out = ended(start(tmp_path, *RUN, "--workers", "2", "--device", "cuda:77"), 2)
    said = " ".join(out.split())
    assert "no worker is left, and there is work: error: --device cuda:77: there is no such device" in said
    assert "the same command goes on" in said
    assert "Traceback" not in out


def test_a_submitted_array_has_one_job_for_each_worker_and_the_parameters_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Slurm that notes what it is given: sbatch, sacct and scancel are scripts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" {tmp_path}/batch; echo Submitted batch job 4711',
        "srun": "true",
        "sacct": "echo 'JobID|State|NodeList'",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    project(tmp_path)
    run = subprocess.Popen(
        [*BENCH, "run", "suite.yaml", "--results", "r", "--executor", "slurm", "--workers", "3",
         "--slurm", "partition=gpu", "--slurm", "time=90", "--slurm", "gpus-per-node=2"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 100
    while not (tmp_path / "batch").exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)
    run.send_signal(signal.SIGINT)
    assert "stopped" in ended(run, 130)
    batch = (tmp_path / "batch").read_text()
    for line in ("--array=0-2%3", "--partition=gpu", "--time=90", "--gpus-per-node=2", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in batch
    assert (tmp_path / "cancelled").read_text().split() == ["4711_0", "4711_1", "4711_2"]


def test_checkpoint_ends_the_worker_and_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.runner.executors import slurm

    ended_at = tmp_path / "ended"
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(ended_at)!r}, 'w').close(), sys.exit(143)))\n"
        f"open({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(60)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(slurm.subprocess, "Popen", lambda _: popen([sys.executable, "-c", script]))
    monkeypatch.setattr(slurm, "DRAIN", 0.0)
    worker, codes = slurm.Worker(tmp_path, ()), []
    thread = threading.Thread(target=lambda: codes.append(worker()))
    thread.start()
    end = time.monotonic() + 50
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.02)
    again = worker.checkpoint()
    assert ended_at.exists(), "the worker was told, and waited for"
    thread.join(timeout=50)
    assert codes == [143]
    assert type(again.function) is slurm.Worker


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (
            Asked(slurm=("cluster=local", "partitoin=gpu")),
            "unknown parameter 'partitoin'; did you mean 'partition'",
        ),
        (Asked(slurm=("partition",)), "expected NAME=VALUE"),
        (Asked(slurm=("cluster=local", "time=2:00:00")), "minutes of a worker"),
        (Asked(slurm=("cluster=mine",)), "expected slurm, or local"),
        (Asked(slurm=("map_count=7",)), "unknown parameter 'map_count'"),
        (Asked(), "there is no Slurm here"),
    ],
)
def test_what_slurm_cannot_be_asked_is_said_in_a_sentence(given: Asked, part: str) -> None:
    with pytest.raises(InputError, match=part):
        executors.ready("slurm", given)

"""What large plans cost: how it grows, 100,000 jobs before anything runs, and a finished run of 10,000."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.registry import discover
from bench.results import durable, fingerprint
from bench.results.index import NAME, SETTLED
from bench.results.store import ARTEFACTS, Store
from bench.runner.worker import describe
from bench.suite import planner, resolve
from bench.suite.jobs import Evaluate, Job, modules_of

BENCH = [sys.executable, "-m", "bench.cli"]

STEPS = """
import json, resource, sys, time
from pathlib import Path
from bench.api import running
from bench.registry import discover
from bench.runner.placement import Placement

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

discover()
before, begun = peak(), time.perf_counter()
# What every command does first: the suite, the plan, its manifest, and a check of every table.
project = running.planned(Path(sys.argv[1]), Path(sys.argv[2]), None)
# The manifest is written; the graph, the state and its order.
found = running.prospect(project, None)
graph = project.plan.graph()
Placement(found.state.todo, found.estimates, ["cpu"])
took = time.perf_counter() - begun
print(json.dumps({"jobs": len(graph), "todo": len(found.state.todo), "seconds": took,
                  "imports": before, "peak": peak()}))
"""


def suite(folder: Path, jobs: int, shards: int = 1) -> Path:
    """Write a suite of about so many jobs: 10 defenses, 10 attacks, 10 radii, and seeds."""
    seeds = max(1, round(jobs / 1000 / (1 + shards)))
    folder.mkdir(exist_ok=True)
    path = folder / "suite.yaml"
    data = {"name": "digits", "split": "test", "resize": 28, "size": 18 * shards, "shard": 18}
    table = {
        "title": "T",
        "rows": ["defense", "radius"],
        "columns": ["attack"],
        "mean_over": ["seed"],
    }
    path.write_text(
        yaml.safe_dump(
            {
                "data": {"digits": data},
                "defenses": {f"d{number}": {"use": "cnn", "epochs": 1 + number} for number in range(10)},
                "attacks": {f"a{number}": {"use": "pgd", "steps": 1 + number} for number in range(10)},
                "tasks": [
                    {
                        "data": "digits",
                        "threat": {"norm": "linf", "radius": [0.01 * (1 + number) for number in range(10)]},
                        "views": ["first"],
                        "seeds": list(range(seeds)),
                    }
                ],
                "tables": {"all": table},
            }
        )
    )
    return path


def measured(path: Path, results: Path) -> dict[str, Any]:
    """Plan and examine in a process of its own; return its seconds and its bytes."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(path), str(results)], check=True, capture_output=True, text=True
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_twice_the_jobs(tmp_path: Path, race: Any) -> None:
    def steps(jobs: int) -> Callable[[], object]:
        path, results = suite(tmp_path / str(jobs), jobs), tmp_path / f"results-{jobs}"
        return lambda: measured(path, results)

    race(
        {"10,000 jobs": steps(10_000), "20,000 jobs": steps(20_000), "40,000 jobs": steps(40_000)},
        over={
            "plan, graph, order and state of 20,000 jobs over 10,000": ("20,000 jobs", "10,000 jobs"),
            "plan, graph, order and state of 40,000 jobs over 20,000": ("40,000 jobs", "20,000 jobs"),
        },
        rounds=3,
    )


@pytest.mark.parametrize("shards", [1, 19])
def test_a_hundred_thousand_jobs(shards: int, tmp_path: Path, benchmark: Any, memory: Any) -> None:
    path = suite(tmp_path, 100_000, shards)
    said: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: said.append(measured(path, tmp_path / "results")), rounds=3)
    assert all(each["jobs"] == each["todo"] >= 100_000 for each in said)
    name = f"100,000 jobs, {shards} shards a condition"
    benchmark.extra_info[f"{name}, seconds"] = sorted(round(each["seconds"], 2) for each in said)
    memory(
        {
            f"{name}, peak": max(each["peak"] for each in said),
            f"{name}, of it imports": max(each["imports"] for each in said),
        }
    )


def finished(path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Store a result for every job of a suite, with the outcomes of one that was run; return their number."""
    discover()
    one = root.parent / "one"
    single = yaml.safe_load(suite(one, 1).read_text())
    single["tasks"][0] |= {"defenses": ["d0"], "attacks": ["a0"], "threat": {"norm": "linf", "radius": 0.01}}
    (one / "suite.yaml").write_text(yaml.safe_dump(single))
    command = [*BENCH, "run", str(one / "suite.yaml"), "--executor", "inline"]
    command += ["--results", str(one / "results")]
    subprocess.run(command, check=True, capture_output=True)
    outcomes = next((one / "results" / "evaluate").glob("*/*.parquet")).read_bytes()
    plan, store = planner.make(resolve.load(path)), Store(root)
    store.open()
    made_from: dict[Job, dict[str, str]] = {}

    def keep(job: Job) -> None:
        if job in made_from:
            return
        inputs: dict[str, str] = {}
        for need in job.needs:
            keep(need)
            receipt = store.receipt(need.kind, need.key) or {}
            inputs |= {**made_from[need], need.key: receipt["files"][ARTEFACTS[need.kind]]}
        made_from[job] = inputs
        told = {
            "seconds": 1.0,
            "answers": "",
            "as_built": "",
            "sources": fingerprint.digests(modules_of(job)),
            "inputs": inputs,
        }
        content = outcomes if isinstance(job, Evaluate) else bytes(1000)
        store.keep(job.kind, job.key, describe(job), told, lambda file: file.write_bytes(content))

    with monkeypatch.context() as patched:
        patched.setattr(durable, "flush", lambda paths: None)
        for each in plan.graph():
            keep(each)
    time.sleep(1 + SETTLED / 1e9)
    return len(made_from)


def until(path: Path, root: Path, sentence: str) -> float:
    """Run a suite, and return after how many seconds it says a sentence."""
    begun = time.perf_counter()
    command = [*BENCH, "run", str(path), "--results", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        said = [(time.perf_counter() - begun, line) for line in run.stdout]
    assert run.returncode == 0, said
    return next(when for when, line in said if sentence in line)


def test_a_finished_run_of_ten_thousand_jobs(
    tmp_path: Path, benchmark: Any, race: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = suite(tmp_path / "suite", 10_000), tmp_path / "results"
    number = finished(path, root, monkeypatch)
    assert number >= 10_000

    def first() -> None:
        durable.remove(root / NAME)
        until(path, root, "0 jobs to do")

    said = [until(path, root, "0 jobs to do") for _ in range(2)]
    benchmark.extra_info["says that nothing is to do, seconds: first time, again"] = [
        round(each, 2) for each in said
    ]
    benchmark.extra_info["index, MiB"] = round((root / NAME).stat().st_size / 2**20, 1)
    race(
        {"without an index": first, "with one": lambda: until(path, root, "0 jobs to do")},
        over={
            "a finished run of 10,000 jobs without an index over one with it": (
                "without an index",
                "with one",
            )
        },
        rounds=3,
    )

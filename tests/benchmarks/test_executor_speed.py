"""What an executor costs for each job: a thousand that do nothing, in one slot, from lease to receipt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.results.store import Store
from bench.runner import executors, outstanding
from bench.runner.context import WorkerContext
from bench.runner.executors.protocol import Asked
from bench.suite import planner, resolve
from bench.suite.jobs import Craft
from suites import scheduled

JOBS, WARM = 1000, 20
"""Jobs that are counted, and jobs before them that start what the executor needs."""

SUITE: dict[str, Any] = {
    "data": {
        f"digits{width}": {"name": "digits", "split": "test", "size": 255, "shard": 1, "resize": width}
        for width in (8, 12, 16, 20)
    },
    "defenses": {"cnn": {"use": "cnn", "training": "standard", "epochs": 1, "batch": 32}},
    "attacks": {"none": {"use": "none"}},
    "tasks": [
        {"data": f"digits{width}", "threat": {"norm": "linf", "radius": 0.1}} for width in (8, 12, 16, 20)
    ],
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["inline", "process", "ray"])
def test_a_thousand_empty_jobs(tmp_path: Path, benchmark: Any, name: str) -> None:
    if name == "ray":
        pytest.importorskip("ray")
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    plan = planner.make(resolve.load(path))
    store = Store(tmp_path / "results")
    store.open()
    state = outstanding.examine(plan, store)
    # Shards of the attack that leaves every image as it is, which need nothing.
    jobs = [job for job in state.todo if isinstance(job, Craft)]
    assert len(jobs) >= JOBS + WARM
    context = WorkerContext(store.root, tmp_path, None, "cpu", plan.manifest()["sources"])
    # One slot of two, since one `cpu` stands for every core.
    asked = {"process": Asked(["cpu", "cpu"]), "ray": Asked(["cpu"], workers=1)}.get(name, Asked(["cpu"]))
    pool = executors.ready(name, asked)(context, lambda *_: None)
    pool.devices = pool.devices[:1]

    def run(some: list[Craft]) -> None:
        done = list(scheduled(replace(state, todo=dict.fromkeys(some, ())), store, pool))
        assert len(done) == len(some)
        assert not [each.error for each in done if each.error]

    try:
        run(jobs[:WARM])
        benchmark.pedantic(lambda: run(jobs[WARM : WARM + JOBS]), rounds=1)
    finally:
        pool.stop()
    benchmark.extra_info["milliseconds a job"] = round(1000 * benchmark.stats.stats.max / JOBS, 1)

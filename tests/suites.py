"""Small suites for the tests: written, planned, run in this process, and read back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import pyarrow.parquet as pq
import yaml

from bench.results import fingerprint
from bench.results.store import Store
from bench.runner import outstanding, scheduler
from bench.runner.context import WorkerContext
from bench.runner.estimates import Estimates
from bench.runner.executors.inline import Inline
from bench.runner.executors.protocol import Pool
from bench.runner.outstanding import State
from bench.runner.scheduler import Done, Scheduler
from bench.suite import planner, resolve
from bench.suite.planner import Plan

TASK: dict[str, Any] = {"data": "digits", "threat": {"norm": "linf", "radius": 0.1}}


def suite(
    folder: Path, defenses: dict[str, Any], attacks: dict[str, Any], tasks: list[dict[str, Any]], **more: Any
) -> Path:
    """Write a suite on 8x8 digits, 60 images of it in shards of 25."""
    data = {"digits": {"name": "digits", "split": "test", "size": 60, "shard": 25}}
    path = folder / "suite.yaml"
    document = {"data": data, "defenses": defenses, "attacks": attacks, "tasks": tasks}
    # Trials and examinations have tests of their own.
    document |= {"doctor": "none", **more}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def scheduled(
    state: State, store: Store, pool: Pool, estimates: Estimates | None = None, limit: float | None = None
) -> Iterator[Done]:
    """Do what is to do, as one worker at the folder."""
    with scheduler.sharing(store.root, uuid4().hex) as share:
        jobs = Scheduler(state, store, pool, estimates or Estimates(), share, limit=limit)
        yield from jobs.run()


class Ran:
    """A plan and what a run of it left."""

    def __init__(self, path: Path, store: Path | None = None, **options: Any) -> None:
        self.plan: Plan = planner.make(resolve.load(path))
        self.store = Store(store or path.parent / "results")
        self.store.open()
        self.state = outstanding.examine(self.plan, self.store, **options)
        context = WorkerContext(
            self.store.root, self.plan.suite.folder, None, "cpu", fingerprint.digests(self.plan.modules())
        )
        self.said: list[dict[str, Any]] = []
        self.pool = Inline(context, lambda slot, facts: self.said.append(dict(facts)), "cpu")
        self.done: list[Done] = list(scheduled(replace(self.state), self.store, self.pool))

    @property
    def failed(self) -> list[Done]:
        return [each for each in self.done if each.error is not None]

    def outcomes(self, **coordinates: Any) -> pd.DataFrame:
        """Return the rows of the one cell with these coordinates."""
        (cell,) = [
            cell
            for cell in self.plan.conditions
            if all(cell.coordinates.get(name) == value for name, value in coordinates.items())
        ]
        path = self.store.artefact("evaluate", cell.job.key)
        return pq.read_table(path).to_pandas()

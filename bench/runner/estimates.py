"""How long jobs take, learned from receipts: for the order of jobs, and the time left.

A job is a number of examples times a number of passes over each; what a pass takes is the median of the jobs
most like it that were measured.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from bench.suite.jobs import Craft, Evaluate, Job, Train
from bench.suite.resolve import inner

_GUESS = {"train": 1e-4, "craft": 2e-4, "evaluate": 1e-3}
"""Seconds for a pass over an example before anything was measured; only ratios matter."""


class Estimates:
    """Seconds that a job will take, by what was seen of jobs like it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], list[float]] = defaultdict(list)

    @property
    def informed(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self._seen)

    def learn(self, job: Job, receipt: Mapping[str, Any]) -> None:
        """Note what a job took.

        Args:
            job: what was done.
            receipt: what it left; its ``seconds`` count.
        """
        each = float(receipt.get("seconds") or 0) / max(examples(job) * passes(job), 1)
        for name in _names(job):
            self._seen[name].append(each)

    def seconds(self, job: Job) -> float:
        """Return how long a job will take.

        Args:
            job: what is to be done.

        Returns:
            Seconds: the median of the jobs most like it, for its examples and the passes it makes. Before
            anything was measured, only ratios mean something.
        """
        work = examples(job) * passes(job)
        for name in _names(job):
            if name in self._seen:
                return median(self._seen[name]) * work
        return _GUESS[job.kind] * work

    def paths(self, graph: Mapping[Job, Iterable[Job]]) -> dict[Job, float]:
        """Return the longest way from each job to the end, itself included.

        Args:
            graph: every job with those that it needs.

        Returns:
            Seconds for each job of the graph.
        """
        behind: dict[Job, list[Job]] = {job: [] for job in graph}
        for job, needs in graph.items():
            for need in needs:
                if need in behind:
                    behind[need].append(job)
        found: dict[Job, float] = {}

        def longest(job: Job) -> float:
            if job not in found:
                found[job] = self.seconds(job) + max((longest(each) for each in behind[job]), default=0.0)
            return found[job]

        for job in graph:
            longest(job)
        return found


def examples(job: Job) -> int:
    """Return how many examples a job handles.

    Args:
        job: any job.

    Returns:
        A number of 0 or more.
    """
    match job:
        case Train():
            return job.data.count
        case Craft():
            return job.stop - job.start
        case Evaluate():
            return sum(examples(craft) for craft in job.crafts)


def passes(job: Job) -> int:
    """Return about how many passes a job makes over each example, by what its parameters say.

    A network that was never attacked by SPSA still tells, by PGD's receipts, that SPSA will take longer.

    Args:
        job: any job.

    Returns:
        A number of 1 or more.
    """
    match job:
        case Train():
            within = sum(each.entry.passes(each.params) for each in inner(job.defense))
            return _count(job.defense.params, "epochs") * (1 + within)
        case Craft():
            return job.attack_run.attack.entry.passes(job.attack_run.attack.params)
        case Evaluate():
            return 1


def _count(params: Mapping[str, Any], name: str) -> int:
    value = params.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _names(job: Job) -> list[tuple[str, ...]]:
    """Return what a job is like, the closest first."""
    match job:
        case Train():
            return [
                ("train", job.defense.name, str(job.defense.identity)),
                ("train", job.defense.name),
                ("train",),
            ]
        case Craft():
            attack_run = job.attack_run
            seen = attack_run.source.train.defense.name if attack_run.source else ""
            looked = attack_run.view.use if attack_run.view else ""
            return [
                ("craft", str(attack_run.attack.identity), seen, looked),
                ("craft", attack_run.attack.name, seen),
                # What a pass takes is the defense's doing before it is the attack's.
                ("craft on", seen),
                ("craft", attack_run.attack.name),
                ("craft",),
            ]
        case Evaluate():
            return [("evaluate", job.victim.train.defense.name), ("evaluate",)]

"""What is worth doing in a limited time: whole rows before second seeds, cheap kills before dear ones.

Nothing here waits, reads or starts anything.
"""

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.console import count, duration
from bench.errors import InputError
from bench.runner.placement import Costs, length
from bench.suite.jobs import Evaluate, Job

NAMED = 3
"""How many rows that were left are named for each table."""

_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)")


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``2h``, ``1h 30min``, ``90 s`` or ``1.5 h``.

    Args:
        text: Numbers with the units ``d``, ``h``, ``min`` or ``m``, and ``s``, in this order.

    Returns:
        Seconds, above 0.

    Raises:
        InputError: It is no duration, or none above 0.
    """
    wanted = "expected a time such as 2h, 90min or '1h 30min'"
    given = text.strip().lower()
    if not given:
        raise InputError(f"--budget: {wanted}, found nothing")
    if re.fullmatch(r"-?\d+(\.\d+)?", given):
        if float(given) == 0:
            raise InputError(f"--budget {text}: {wanted}, above 0")
        raise InputError(f"--budget {text}: {wanted}; {given} of what? {given.lstrip('-')}min?")
    if given.startswith("-"):
        raise InputError(f"--budget {text}: {wanted}, above 0")
    parts = _PART.findall(given)
    units = [unit for _, unit in parts]
    ranks = [_UNITS[unit] for unit in units]
    if _PART.sub("", given).strip() or not parts or ranks != sorted(set(ranks), reverse=True):
        raise InputError(f"--budget {text}: {wanted} (units: d, h, min, s), found {text!r}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds < float("inf"):
        raise InputError(f"--budget {text}: {wanted}, above 0")
    return seconds


@dataclass(frozen=True)
class Row:
    """What one row of a table reads of one seed: the unit that is worth most when it is whole."""

    table: str
    """The key of the table; empty for what no table reads."""
    name: str
    """What the row shows, for messages."""
    seed: int
    """The seed of the networks."""
    evaluations: tuple[Evaluate, ...]
    """What its cells read."""
    checks: Mapping[str, Sequence[Job]] = field(default_factory=dict, hash=False)
    """By the key of an evaluation, the trials and the examination that are made with it."""

    @property
    def jobs(self) -> list[Job]:
        """The evaluations, and what is made with them."""
        checks = (job for each in self.evaluations for job in self.checks.get(each.key, ()))
        return [*self.evaluations, *checks]

    @property
    def said(self) -> str:
        """The row in words."""
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Chosen:
    """What fits into a budget, and what was left."""

    wanted: frozenset[str]
    """Keys of the evaluations to make, and of those that are done."""
    seconds: float
    """Seconds until the last of them is expected to end."""
    left: tuple[str, ...]
    """What was left: a sentence for each table, and one more where nothing fits."""


def within(
    rows: Sequence[Row],
    todo: Mapping[Job, Iterable[Job]],
    estimates: Costs[Job],
    devices: Sequence[str],
    budget: float,
    kills: Mapping[str, float] | None = None,
) -> Chosen:
    """Choose the most valuable work that ends within a budget.

    Whole rows of the first seed come before those of the second, and so on; single cells of rows that do not
    fit come last. Among equals, most kills (where these are not known, most cells) for each second of work
    come first: what is shared with something that was taken before, a training above all, is paid once.
    Whatever still fits after something that does not is taken too.

    Args:
        rows: The rows of the tables that are asked for, in the order of the tables.
        todo: The jobs to do, each with those of its needs that are to do too.
        estimates: Estimates of the time of each job.
        devices: The name of the device of each slot, at least one.
        budget: Seconds, above 0.
        kills: How many examples an evaluation is expected to find broken, by its key; None: nobody knows.

    Returns:
        The evaluations to make, and what was left.
    """
    packing = _Packing(todo, estimates, devices, budget, kills)
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        seeds[row.table, row.name].add(row.seed)
    waiting: dict[tuple[bool, int], list[Row]] = defaultdict(list)
    for row in rows:
        rank = sorted(seeds[row.table, row.name]).index(row.seed)
        waiting[not row.table, rank].append(row)
    left = [row for rank in sorted(waiting) for row in packing.take(waiting[rank])]
    whole = len(packing.taken_rows)
    cells = [replace(row, evaluations=(each,)) for row in left for each in row.evaluations]
    packing.take(cells)
    wanted = frozenset(each.key for row in packing.taken_rows for each in row.evaluations)
    said = [
        _left(table, rows, left, wanted)
        for table in sorted(dict.fromkeys(row.table for row in rows), key=lambda table: not table)
        if any(row.table == table for row in left)
    ]
    if not whole and left:
        cheapest = min(left, key=packing.alone)
        where = f" of table {cheapest.table}" if cheapest.table else ""
        took = duration(packing.alone(cheapest))
        said.append(
            f"no row fits into {duration(budget)}: the cheapest, {cheapest.said}{where}, takes about {took}"
        )
    return Chosen(wanted, packing.spent, tuple(said))


class _Packing:
    """Jobs that fit into a budget together."""

    def __init__(
        self,
        todo: Mapping[Job, Iterable[Job]],
        estimates: Costs[Job],
        devices: Sequence[str],
        budget: float,
        kills: Mapping[str, float] | None,
    ) -> None:
        self._todo, self._estimates, self._devices = todo, estimates, devices
        self._budget, self._kills = budget, kills
        self._taken: dict[Job, tuple[Job, ...]] = {}
        self.taken_rows: list[Row] = []
        self.spent = 0.0

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """Take those of these rows that fit, the most valuable first; return the others."""
        waiting, left = list(rows), []
        while waiting:
            new = {row: self._new(row) for row in waiting}
            row = max(waiting, key=lambda row: self._worth(row, new[row]))
            waiting.remove(row)
            together = self._taken | self._below(new[row])
            took = length(together, self._estimates, self._devices) if new[row] else self.spent
            if took <= self._budget:
                self._taken, self.spent = together, took
                self.taken_rows.append(row)
            else:
                left.append(row)
        return left

    def alone(self, row: Row) -> float:
        """Return the seconds until a row is done, if nothing else is done."""
        return length(self._below(_needed(row.jobs, self._todo, ())), self._estimates, self._devices)

    def _below(self, jobs: Iterable[Job]) -> dict[Job, tuple[Job, ...]]:
        return {job: tuple(self._todo[job]) for job in jobs}

    def _new(self, row: Row) -> list[Job]:
        return _needed(row.jobs, self._todo, self._taken)

    def _worth(self, row: Row, new: Sequence[Job]) -> float:
        """Return kills, or cells where nobody knows them, for each second of work; what is done is free."""
        if not new:
            return math.inf
        value = float(len(row.evaluations))
        if self._kills is not None:
            value = sum(self._kills.get(each.key, 0.0) for each in row.evaluations)
        return value / max(sum(self._estimates.seconds(job) for job in new), 1e-9)


def _needed(asked: Iterable[Job], todo: Mapping[Job, Iterable[Job]], taken: Container[Job]) -> list[Job]:
    """Return the jobs to do for those that are asked for, without those that are taken anyway."""
    found: dict[Job, None] = {}
    waiting = list(asked)
    while waiting:
        job = waiting.pop()
        if job in todo and job not in taken and job not in found:
            found[job] = None
            waiting.extend(todo[job])
    return list(found)


def _left(table: str, rows: Sequence[Row], left: Sequence[Row], wanted: Container[str]) -> str:
    """Return what was left of a table."""
    lost = [row for row in left if row.table == table]
    every = sum(row.table == table for row in rows)
    named = "; ".join(row.said for row in lost[:NAMED])
    more = f"; and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    cells = [each for row in lost for each in row.evaluations]
    some = sum(each.key in wanted for each in cells)
    part = f" ({some} of their {count(len(cells), 'cell')} fit all the same)" if some else ""
    head = f"table {table}" if table else "what no table reads"
    return f"{head}: {every - len(lost)} of {count(every, 'row')} fit; left: {named}{more}{part}"

"""How long jobs take, by receipts and rehearsals: for the order of jobs, the time left, the cost of a plan.

A job is a number of examples times a number of passes over each. What a pass takes is first a guess, or what
a rehearsal of the network has measured; receipts then correct it, those of jobs like it more than others.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from threading import RLock
from typing import Any, NamedTuple

from bench.doctor.examination import ALONE, IMAGES, LOOK, LOOK_IMAGES
from bench.runner.rehearsal import Rehearsal, sight
from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial
from bench.suite.resolve import inner

TRIED = 100
"""About how many images an attack is tried on, one trial with another."""

_GUESS = {"train": 1e-4, "craft": 2e-4, "evaluate": 1e-3, "trial": 1e-5, "examination": 2e-4}
"""Seconds for a pass over an example before anything was measured; only ratios matter."""

_DOUBT = {
    "train": (4.0, 2.0, 1.0, 0.25),
    "craft": (4.0, 2.0, 1.0, 1.0, 0.5, 0.25),
    "evaluate": (4.0, 2.0, 1.0, 0.25),
    "trial": (4.0, 2.0, 0.25),
    "examination": (4.0, 2.0, 1.0, 0.25),
}
"""For each level of likeness, the most general first: how many jobs it must have seen before it counts as
much as the levels above.
"""

_SMALL = 1.0
"""Seconds: a job that was to take less tells the less, since the start of any job takes some of its time."""

_WILD = 8.0
"""The most by which one job may correct others."""

Name = tuple[str, ...]
"""What jobs have in common; the first word is their kind."""


class _Seen(NamedTuple):
    """What jobs of one name took on one device, and what had been predicted; both for a job of weight 1."""

    took: float = 0.0
    predicted: float = 0.0

    def plus(self, other: "_Seen", sign: int = 1) -> "_Seen":
        return _Seen(self.took + sign * other.took, self.predicted + sign * other.predicted)


class _Like(NamedTuple):
    """What a job has in common with others."""

    names: list[Name]
    """By which receipts are told apart, the most general first."""
    rehearsed: list[Name]
    """By which rehearsals are, the closest first."""
    passes: int


class Estimates:
    """Seconds that a job will take, by what was seen of jobs like it.

    Each level of likeness (any job, its kind, its network, its view, its attack) corrects the one above it,
    by the mean of what jobs took over what had been predicted of them, and the more, the more jobs it has
    seen. A device on which no job like it ran is compared with those on which some did, by all that ran on
    both. Threads may learn and ask at the same time.
    """

    def __init__(self) -> None:
        self._seen: dict[Name, dict[str, _Seen]] = defaultdict(dict)
        self._rehearsed: dict[Name, dict[str, float]] = defaultdict(dict)
        self._going: dict[Job, tuple[str, _Seen, float]] = {}
        self._devices: dict[str, int] = defaultdict(int)
        self._ratios: dict[tuple[bool, str, str, str], float] = {}
        self._known: dict[str, _Like] = {}
        self._lock = RLock()
        self.learned = 0
        """How many measurements they are made from."""

    @property
    def informed(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self.learned)

    def rehearsed(self, job: Job) -> bool:
        """Return whether a rehearsal of its network, or a receipt of a job like it, tells what a job takes.

        Args:
            job: any job.
        """
        like = self._like(job)
        seen = any(_of(like.names[-1], measured) in self._seen for measured in (True, False))
        return seen or not like.rehearsed or like.rehearsed[0] in self._rehearsed

    def knows(self, device: str) -> bool:
        """Return whether anything was measured on a device.

        Args:
            device: its name.
        """
        return device in self._devices

    def learn(self, job: Job, receipt: Mapping[str, Any]) -> None:
        """Note what a job took.

        Args:
            job: what was done.
            receipt: what it left; its ``seconds`` and the name of its ``device`` count.
        """
        device = str(receipt.get("device") or "")
        with self._lock:
            self._forget(job)
            self._add(job, device, self._weighed(job, device, float(receipt.get("seconds") or 0)))
            self._note(device)

    def progress(self, job: Job, device: str, spent: float, share: float) -> None:
        """Note how far a job is.

        Args:
            job: what is being done.
            device: the name of the device.
            spent: seconds since it began.
            share: what part of it is done, in (0, 1].
        """
        with self._lock:
            self._forget(job)
            seen = self._weighed(job, device, spent / share)
            self._going[job] = device, seen, spent / share
            self._add(job, device, seen)
            self._note(device)

    def rehearse(self, question: Rehearsal, answer: Mapping[str, Any]) -> None:
        """Note what a rehearsal of a network measured.

        Args:
            question: the network, its views and read-outs.
            answer: what `bench.runner.rehearsal.rehearse` returned.
        """
        device, train = str(answer["device"]), question.train
        told: dict[Name, float] = {}
        if answer.get("train"):
            told["train", *_made(train)] = answer["train"] / max(examples(train) * passes(train), 1)
        runs = [run for run in question.runs if run.key in answer["runs"]]
        for run in runs:
            told["craft", *_made(train), sight(run)] = answer["runs"][run.key]
        if runs:
            # For views that could not be asked.
            told["craft", *_made(train)] = sum(answer["runs"][run.key] for run in runs) / len(runs)
        for readout, each in answer["readouts"].items():
            told["evaluate", *_made(train), readout] = each
        with self._lock:
            for name, each in told.items():
                if each > 0:
                    self._rehearsed[name][device] = each
            for kind in {name[0] for name in told}:
                every = [
                    math.log(seen[device])
                    for name, seen in self._rehearsed.items()
                    if name[0] == kind and len(name) > 1 and device in seen
                ]
                # For networks that could not be asked.
                self._rehearsed[kind,][device] = _typical(every)
            self._note(device)

    def seconds(self, job: Job, device: str | None = None) -> float:
        """Return how long a job will take.

        Args:
            job: what is to be done.
            device: the name of the device; None: the one of which most is known.

        Returns:
            Seconds for its examples and the passes it makes. Before anything was measured, only ratios mean
            something.
        """
        with self._lock:
            if device is None:
                device = max(self._devices, key=self._devices.__getitem__, default="")
            return self._seconds(job, device)

    def _seconds(self, job: Job, device: str) -> float:
        if job in self._going:
            where, _, whole = self._going[job]
            (here, measured), (there, _) = self._predicted(job, device), self._predicted(job, where)
            return whole * here / max(there, 1e-12) * self._ratio(measured, job.kind, where, device)
        predicted, measured = self._predicted(job, device)
        factor = 1.0
        # The first name is of jobs of every kind, of which guesses cannot be compared.
        levels = list(zip(self._like(job).names, _DOUBT[job.kind], strict=True))
        for name, doubt in levels if measured else levels[1:]:
            if seen := self._seen.get(_of(name, measured)):
                total = _Seen()
                for where, each in seen.items():
                    ratio = self._ratio(measured, job.kind, where, device)
                    total = total.plus(_Seen(each.took * ratio, each.predicted))
                if total.predicted > 0:
                    # A guess counts for nothing once something was measured.
                    weight = doubt if measured else 0.0
                    factor = (total.took + weight * factor) / (total.predicted + weight)
        return predicted * factor

    def _predicted(self, job: Job, device: str) -> tuple[float, bool]:
        """Return the seconds of a job by a rehearsal, and True; or by a guess, and False."""
        like = self._like(job)
        work = examples(job) * like.passes
        for name in like.rehearsed:
            if told := self._rehearsed.get(name):
                if device in told:
                    return told[device] * work, True
                where = next(iter(told))
                return told[where] * work * self._rehearsal_ratio(where, device), True
        return _GUESS[job.kind] * work, False

    def _weighed(self, job: Job, device: str, seconds: float) -> _Seen:
        """Return what a job took and what was predicted of it, over its size."""
        predicted, measured = self._predicted(job, device)
        if not measured:
            return _Seen(seconds, predicted)
        size = predicted + _SMALL
        return _Seen(min(max(seconds, predicted / _WILD), predicted * _WILD) / size, predicted / size)

    def _add(self, job: Job, device: str, seen: _Seen, sign: int = 1) -> None:
        measured = self._predicted(job, device)[1]
        for name in self._like(job).names:
            here = self._seen[_of(name, measured)]
            here[device] = here.get(device, _Seen()).plus(seen, sign)

    def _forget(self, job: Job) -> None:
        """Take back what the progress of a job has told, now that more is known."""
        if (told := self._going.pop(job, None)) is not None:
            self._add(job, told[0], told[1], -1)

    def _note(self, device: str) -> None:
        self._devices[device] += 1
        self._ratios.clear()
        self.learned += 1

    def _ratio(self, measured: bool, kind: str, known: str, device: str) -> float:
        """Return by how much a correction is larger on a device than on one that is known.

        Args:
            measured: Whether corrections of rehearsals are compared; else those of guesses.
            kind: The kind of jobs; where none of these ran on both, any kind counts.
            known: The name of the device that is known.
            device: The name of the other one.

        Returns:
            The mean over what ran on both; 1 where nothing did.
        """
        if known == device:
            return 1.0
        key = measured, kind, known, device
        if key not in self._ratios:
            logs: dict[bool, list[float]] = {True: [], False: []}
            for name, seen in self._seen.items():
                if (name[0] == "rehearsed") == measured and len(name) > 2 and {known, device} <= seen.keys():
                    here, there = seen[device], seen[known]
                    if min(*here, *there) > 0:
                        ratio = here.took / here.predicted * there.predicted / there.took
                        logs[name[1] == kind].append(math.log(ratio))
            self._ratios[key] = _typical(logs[True] or logs[False])
        return self._ratios[key]

    def _rehearsal_ratio(self, known: str, device: str) -> float:
        """Return by how much longer a pass takes on a device than on one where a rehearsal was."""
        return _typical(
            [
                math.log(told[device] / told[known])
                for told in self._rehearsed.values()
                if {known, device} <= told.keys()
            ]
        )

    def _like(self, job: Job) -> _Like:
        """Return what a job has in common with others; shards share it."""
        match job:
            case Train():
                key = job.key
            case Craft():
                key = job.attack_run.key
            case Evaluate():
                key = f"{job.victim.key} {job.readout}"
            case Trial() | Examination():
                key = job.key
        if key not in self._known:
            self._known[key] = _likeness(job)
        return self._known[key]


def _of(name: Name, measured: bool) -> Name:
    """Return the name under which corrections of rehearsals, or those of guesses, are kept."""
    return ("rehearsed" if measured else "guessed", *name)


def _typical(logs: list[float]) -> float:
    """Return the geometric mean of what these are the logarithms of; 1 of none."""
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


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
        case Trial():
            return TRIED
        case Examination():
            return IMAGES if job.whole else LOOK_IMAGES


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
            return job.draws
        case Trial():
            return job.attack.entry.passes(job.attack.params)
        case Examination():
            return sum(test.passes for test in (ALONE if job.whole else LOOK))


def _count(params: Mapping[str, Any], name: str) -> int:
    value = params.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _made(train: Train) -> tuple[str, str]:
    """Return what networks of one make have in common, whatever their seed."""
    return str(train.defense.identity), train.data.key


def _likeness(job: Job) -> _Like:
    """Return what a job has in common with others."""
    names: list[Name]
    match job:
        case Train():
            made: Name = ("train", *_made(job))
            names = [("any",), ("train",), ("train", job.defense.name), made]
            return _Like(names, [made, ("train",)], passes(job))
        case Craft():
            run = job.attack_run
            train = run.source.train if run.source else None
            make, seen = _made(train) if train else ("", ""), sight(run)
            names = [
                ("any",),
                ("craft",),
                # What a pass takes is the defense's doing before it is the attack's.
                ("craft", train.defense.name if train else ""),
                ("craft", *make, seen),
                ("craft", *make, seen, run.attack.name),
                ("craft", *make, seen, run.attack.name, str(run.attack.identity)),
            ]
            rehearsed: list[Name] = [("craft", *make, seen), ("craft", *make), ("craft",)]
            return _Like(names, rehearsed if train else [], passes(job))
        case Evaluate():
            train = job.victim.train
            made = ("evaluate", *_made(train), job.readout)
            names = [("any",), ("evaluate",), ("evaluate", train.defense.name), made]
            return _Like(names, [made, ("evaluate",)], passes(job))
        case Trial():
            made = ("trial", job.attack.name)
            return _Like([("any",), ("trial",), made], [], passes(job))
        case Examination():
            train = job.victim.train
            made = ("examination", *_made(train))
            names = [("any",), ("examination",), ("examination", train.defense.name), made]
            return _Like(names, [("craft", *_made(train)), ("craft",)], passes(job))

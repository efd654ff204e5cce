"""The kinds of work, each named by the hash of all that its result depends on.

A job is fitting a defense, crafting a shard, or asking a defense about crafted images. Two more kinds say
whether to believe these: an attack is tried where the answer is known, and a fitted defense is examined. Two
jobs with the same key are the same job: crafting depends on the view, evaluation on the read-out. Labels of a
task file enter no key.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bench.data.spec import DataSpec
from bench.ours import OURS
from bench.protocols import Shape, Threat
from bench.registry import AttackEntry, DefenseEntry, Entry
from bench.results import fingerprint
from bench.suite.resolve import Resolved, inner
from bench.suite.schema import Precision, ViewUse

SCHEME = 2
"""Number of the key scheme; part of every key."""

Target: TypeAlias = int | Literal["random"] | None
"""The label to reach, as an offset from the true class; ``random``: one drawn for each example."""


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of a result.

    Args:
        identity: all that the result depends on, as plain JSON.

    Returns:
        128 bits of the sha256 of its canonical JSON, in hexadecimal.

    Raises:
        TypeError: `identity` holds what is no JSON.
    """
    return hashlib.sha256(_CANONICAL.encode(identity).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a key")


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_plain)


class Keyed:
    """A value that equals another one with the same key."""

    # Not cached: a plan has a hundred thousand of them, and only their keys are asked for again.
    @property
    def identity(self) -> dict[str, Any]:
        """What the key is made from; what the value depends on is in it by key."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """The name: 32 hexadecimal digits."""
        return key_of({"scheme": SCHEME, "kind": type(self).__name__.lower(), **self.identity})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Data(Keyed):
    """Which examples: a data set's specification, and what tells its content."""

    spec: DataSpec
    digest: str
    """The sha256 of name, split, form, order and content (`bench.data.spec.digest`)."""
    shape: Shape
    count: int
    """How many examples there are."""

    @property
    def identity(self) -> dict[str, Any]:
        """The digest alone: it covers name, split, transform, order and content."""
        return {"digest": self.digest}


@dataclass(frozen=True, eq=False)
class Train(Keyed):
    """Fit a defense."""

    defense: Resolved[DefenseEntry]
    data: Data
    seed: int
    parts: tuple[tuple[str, "Train"], ...] = ()
    """For each parameter that names another defense, the training of that one."""

    kind = "train"

    @property
    def identity(self) -> dict[str, Any]:
        """Defense, data, seed and the trainings it starts from."""
        return {
            "defense": self.defense.identity,
            "data": self.data.key,
            "seed": self.seed,
            "parts": {name: part.key for name, part in self.parts},
        }

    @property
    def needs(self) -> tuple["Job", ...]:
        """The jobs that come first."""
        return tuple(part for _, part in self.parts)

    @cached_property
    def foreign(self) -> frozenset[str]:
        """The packages and modules of other people that this defense and its parts run.

        What they keep in their process, and what they read beside their weights, nobody has looked at.
        """
        parts = (_foreign_code(each.defense) for each in below(self) if isinstance(each, Train))
        return frozenset[str]().union(*parts)


@dataclass(frozen=True, eq=False)
class FittedDefense(Keyed):
    """A fitted defense as it is asked."""

    train: Train
    inference: tuple[tuple[str, Any], ...] = ()
    """Parameters that were replaced after fitting, sorted by name."""

    @property
    def identity(self) -> dict[str, Any]:
        """What was trained, and what was replaced after."""
        return {"train": self.train.key, "inference": dict(self.inference)}


@dataclass(frozen=True)
class Starts:
    """Stored images at which an attack begins (`bench.results.replays`)."""

    path: Path
    """The file, absolute."""
    run: str
    """The run in it."""
    digest: str
    """What the images' digest must be; alone of all this it enters keys."""


@dataclass(frozen=True, eq=False)
class AttackRun(Keyed):
    """An attack on a data set through one view; its shards are the `Craft` jobs."""

    attack: Resolved[AttackEntry]
    threat: Threat
    data: Data
    seed: int
    source: FittedDefense | None
    """What is looked at: the victim, or the defense that the attack transfers from; None: nothing is."""
    view: ViewUse | None
    exact: bool
    """Whether winning on the view is winning: else the attack pushes to the end, as it does wherever the
    defense draws."""
    target: Target
    time_limit: float | None = None
    """Seconds that a shard may take; no part of the key, since a shard is complete or absent."""
    starts: Starts | None = None
    """The stored images at which it begins; None: it chooses its own starts."""
    precision: Precision = "float32"
    """What the search is computed in; float32 judges what it finds."""

    @property
    def identity(self) -> dict[str, Any]:
        """All but the slice: draws are keyed by this, so that the cut does not matter."""
        return {
            "attack": self.attack.identity,
            "norm": self.threat.norm,
            "radius": None if math.isinf(self.threat.radius) else self.threat.radius,
            "data": self.data.key,
            "seed": self.seed,
            "source": self.source.key if self.source else None,
            "view": self._looked(),
            "exact": self.exact,
            "target": self.target,
            **({} if self.starts is None else {"starts": self.starts.digest}),
            **({} if self.precision == "float32" else {"precision": self.precision}),
        }

    @cached_property
    def members(self) -> tuple["AttackRun", ...]:
        """The runs of its attacks alone, where it is an attack made of attacks; none of any other."""
        return tuple(
            replace(self, attack=each, threat=each.entry.given(self.threat), starts=None)
            for each in inner(self.attack)
        )

    def _looked(self) -> list[Any] | None:
        if self.view is None:
            return None
        once = self.view.draws == 1
        return [self.view.use, self.view.params, *([] if once else [{"draws": self.view.draws}])]


@dataclass(frozen=True, eq=False)
class Craft(Keyed):
    """Attack one shard."""

    attack_run: AttackRun
    start: int
    """The position of the first example in the data set's order."""
    stop: int
    """The position after the last one."""

    kind = "craft"

    @property
    def identity(self) -> dict[str, Any]:
        """The attempt and the slice."""
        return {"attack_run": self.attack_run.key, "slice": [self.start, self.stop]}

    @property
    def needs(self) -> tuple["Job", ...]:
        """The training of what is looked at."""
        return (self.attack_run.source.train,) if self.attack_run.source else ()


@dataclass(frozen=True, eq=False)
class Evaluate(Keyed):
    """Ask a defense about crafted images."""

    victim: FittedDefense
    crafts: tuple[Craft, ...]
    readout: str
    draws: int = 1
    """How often a random defense is asked about each image."""

    kind = "evaluate"

    @property
    def identity(self) -> dict[str, Any]:
        """Victim, crafts and read-out, and the draws where there are several."""
        return {
            "victim": self.victim.key,
            "crafts": [craft.key for craft in self.crafts],
            "readout": self.readout,
            **({} if self.draws == 1 else {"draws": self.draws}),
        }

    @property
    def needs(self) -> tuple["Job", ...]:
        """The victim's training and every shard."""
        return (self.victim.train, *self.crafts)


TESTS = 2
"""Number of the tests by which attacks are tried and defenses examined; raised when these ask otherwise."""


@dataclass(frozen=True, eq=False)
class Trial(Keyed):
    """Try an attack, with the settings of the suite, on networks whose adversarial images are known."""

    attack: Resolved[AttackEntry]
    threat: Threat
    shape: Shape
    """The form of the suite's images, and the number of classes."""

    kind = "trial"

    @property
    def needs(self) -> tuple["Job", ...]:
        """The jobs that come first: none."""
        return ()

    @property
    def identity(self) -> dict[str, Any]:
        """Attack, threat, form, and the number of the tests."""
        return {
            "tests": TESTS,
            "attack": self.attack.identity,
            "norm": self.threat.norm,
            "radius": None if math.isinf(self.threat.radius) else self.threat.radius,
            "shape": list(self.shape),
        }


@dataclass(frozen=True, eq=False)
class Examination(Keyed):
    """Examine a fitted defense on examples of the suite, as `bench doctor` does."""

    victim: FittedDefense
    readout: str
    data: Data
    threat: Threat
    views: tuple[ViewUse, ...]
    """The views that the suite attacks through."""
    whole: bool
    """Whether it is attacked, too; otherwise it is only asked, and its gradients are compared."""

    kind = "examination"

    @property
    def identity(self) -> dict[str, Any]:
        """Victim, read-out, data, threat, views, how much is looked at, and the number of the tests."""
        return {
            "tests": TESTS,
            "victim": self.victim.key,
            "readout": self.readout,
            "data": self.data.key,
            "norm": self.threat.norm,
            "radius": self.threat.radius,
            "views": [[each.use, each.params] for each in self.views],
            "whole": self.whole,
        }

    @property
    def needs(self) -> tuple["Job", ...]:
        """The victim's training."""
        return (self.victim.train,)


Job: TypeAlias = Train | Craft | Evaluate | Trial | Examination


def _foreign(entry: Entry) -> frozenset[str]:
    """Return the package that a registered thing comes from, if it is not one of ours."""
    return frozenset({entry.module.partition(".")[0]}) - OURS


def _foreign_code(defense: Resolved[DefenseEntry]) -> frozenset[str]:
    """Return the package of a defense, if it is not one of ours, and the modules that its parameters name."""
    named = [defense.params[name] for name in defense.entry.parameters("code")]
    return _foreign(defense.entry).union(str(path).partition(":")[0] for path in named if path is not None)


def foreign(job: Job) -> frozenset[str]:
    """Return the packages and modules of other people that a job runs in its process.

    Args:
        job: any job.

    Returns:
        Names of packages, and of the modules that parameters of a defense name.
    """
    match job:
        case Train():
            inside = (_foreign(each.entry) for each in inner(job.defense))
            return job.foreign.union(*inside)
        case Craft():
            source, attack = job.attack_run.source, job.attack_run.attack
            every = (_foreign(attack.entry), *(_foreign(each.entry) for each in inner(attack)))
            return (source.train.foreign if source else frozenset()).union(*every)
        case Trial():
            return _foreign(job.attack.entry).union(*(_foreign(each.entry) for each in inner(job.attack)))
        case Evaluate() | Examination():
            return job.victim.train.foreign


def below(job: Job) -> Iterator[Job]:
    """Yield a job and all that it needs, directly or not, each once.

    Args:
        job: any job.

    Yields:
        The job, then the others; however long the way down is.
    """
    todo, seen = [job], {id(job)}
    while todo:
        each = todo.pop()
        yield each
        for need in each.needs:
            # By object: a hash asks for the key, and a planner makes every job once.
            if id(need) not in seen:
                seen.add(id(need))
                todo.append(need)


def own_modules(job: Job | AttackRun) -> frozenset[str]:
    """Return the modules that decide a job's result beside those of the jobs it needs.

    Args:
        job: any job, or an attempt, which stands for all of its shards.

    Returns:
        Dotted names: the modules of what the job uses, all that they import, and the harness's own.
    """
    return _joined(frozenset(each.modules for each in _used(job)))


def modules_of(job: Job | AttackRun) -> frozenset[str]:
    """Return the modules that decide a job's result, through all that it needs.

    Args:
        job: any job, or an attempt.

    Returns:
        Dotted names, the same object for jobs of the same modules.
    """
    parts: tuple[Job | AttackRun, ...]
    if isinstance(job, AttackRun):
        parts = (job, *(below(job.source.train) if job.source else ()))
    else:
        parts = tuple(below(job))
    return _joined(frozenset(used.modules for each in parts for used in _used(each)))


def _used(job: Job | AttackRun) -> tuple[Resolved[Entry], ...]:
    """Return the attacks and defenses that a job runs by itself."""
    match job:
        case Train():
            return (job.defense,)
        case AttackRun():
            return (job.attack, job.source.train.defense) if job.source else (job.attack,)
        case Craft():
            return _used(job.attack_run)
        case Trial():
            return (job.attack,)
        case Evaluate() | Examination():
            return (job.victim.train.defense,)


@cache
def _joined(modules: frozenset[frozenset[str]]) -> frozenset[str]:
    """Return the modules of several things together, with the harness's own."""
    return fingerprint.SHARED.union(*modules)

"""From a suite to cells, jobs and their graph. Nothing is loaded, and nothing runs.

A job is named by the hash of all that its result depends on (`key`). Two cells that need the same job
hold the same one: crafting depends on the view, evaluation on the read-out.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bench import data as datasets
from bench import sources
from bench.conditions import Skip
from bench.data import DataSpec
from bench.errors import InputError
from bench.protocols import Shape, Threat
from bench.registry import AttackEntry, DefenseEntry, Entry
from bench.spec import ANSWERS, Filled, Planned, Suite, ViewUse, expanded, inner, named_files
from bench.store import SCHEME as STORE_SCHEME

SCHEME = 1
"""Number of the key scheme; part of every key."""

Target: TypeAlias = int | Literal["random"] | None
"""The label to reach, as an offset from the true class; ``random``: one drawn for each example."""


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of a result: 128 bits of the sha256 of canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a key")


class Keyed:
    """A value that equals another if it is called the same."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the key is made from: what it depends on is in it by key."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """The name."""
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
    shape: Shape
    count: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The digest says it all: name, split, transform, order and content."""
        return {"digest": self.digest}


@dataclass(frozen=True, eq=False)
class Train(Keyed):
    """Fit a defense."""

    defense: Filled
    data: Data
    seed: int
    parts: tuple[tuple[str, "Train"], ...] = ()

    kind = "train"

    @cached_property
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
        entry = self.defense.entry
        named = [self.defense.params[name] for name in entry.parameters("code")]
        own = {str(path).partition(":")[0] for path in named if path is not None}
        return frozenset(own).union(_foreign(entry), *(part.foreign for _, part in self.parts))


@dataclass(frozen=True, eq=False)
class Served(Keyed):
    """A fitted defense as it is asked."""

    train: Train
    serve: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What was trained, and what was replaced after."""
        return {"train": self.train.key, "serve": dict(self.serve)}


@dataclass(frozen=True, eq=False)
class Attempt(Keyed):
    """An attack on a data set through one view; its shards are the `Craft` jobs."""

    attack: Filled
    threat: Threat
    data: Data
    seed: int
    source: Served | None
    view: ViewUse | None
    final: bool
    """Whether winning on the view is winning: else the attack pushes to the end."""
    target: Target
    time_limit: float | None = None
    """Seconds that a shard may take; no part of the key, since a shard is complete or absent."""

    @cached_property
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
            "final": self.final,
            "target": self.target,
        }

    def _looked(self) -> list[Any] | None:
        if self.view is None:
            return None
        once = self.view.draws == 1
        return [self.view.use, self.view.params, *([] if once else [{"draws": self.view.draws}])]


@dataclass(frozen=True, eq=False)
class Craft(Keyed):
    """Attack one shard."""

    attempt: Attempt
    start: int
    stop: int

    kind = "craft"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The attempt and the slice."""
        return {"attempt": self.attempt.key, "slice": [self.start, self.stop]}

    @property
    def needs(self) -> tuple["Job", ...]:
        """The training of what is looked at."""
        return (self.attempt.source.train,) if self.attempt.source else ()


@dataclass(frozen=True, eq=False)
class Evaluate(Keyed):
    """Ask a defense about crafted images."""

    victim: Served
    crafts: tuple[Craft, ...]
    readout: str

    kind = "evaluate"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Victim, crafts and read-out."""
        return {
            "victim": self.victim.key,
            "crafts": [craft.key for craft in self.crafts],
            "readout": self.readout,
        }

    @property
    def needs(self) -> tuple["Job", ...]:
        """The victim's training and every shard."""
        return (self.victim.train, *self.crafts)


Job: TypeAlias = Train | Craft | Evaluate


def _foreign(entry: Entry) -> frozenset[str]:
    """Return the package that a registered thing comes from, if it is not one of ours."""
    return frozenset({entry.module.partition(".")[0]}) - sources.OURS


def foreign(job: Job) -> frozenset[str]:
    """Return the packages and modules of other people that a job runs in its process."""
    match job:
        case Train():
            inside = (_foreign(entry) for entry, _ in inner(job.defense))
            return job.foreign.union(*inside)
        case Craft():
            source = job.attempt.source
            return _foreign(job.attempt.attack.entry) | (source.train.foreign if source else frozenset())
        case Evaluate():
            return job.victim.train.foreign


@dataclass(frozen=True)
class Cell:
    """A point of the benchmark."""

    coordinates: Mapping[str, Any]
    job: Evaluate
    facts: Mapping[str, Any]
    """What a table must know beside the coordinates: the fields of `bench.conditions.Facts`."""


@dataclass(frozen=True)
class Plan:
    """All cells, and the jobs below them."""

    suite: Suite
    cells: tuple[Cell, ...]
    skips: tuple[Skip, ...]

    def graph(self, wanted: set[str] | None = None) -> dict[Job, tuple[Job, ...]]:
        """Return every job below the cells (those whose jobs are `wanted`), with those it needs."""
        graph: dict[Job, tuple[Job, ...]] = {}
        todo: list[Job] = [cell.job for cell in self.cells if wanted is None or cell.job.key in wanted]
        while todo:
            job = todo.pop()
            if job not in graph:
                graph[job] = job.needs
                todo.extend(job.needs)
        return graph

    def _named(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the digests of the code and of the files that the parameters of defenses name."""
        code: dict[str, str] = {}
        files: dict[str, str] = {}
        for name, filled in self.suite.defenses.items():
            written, made = self.suite.model.defenses[name].model_extra or {}, filled.identity["params"]
            for parameter in filled.entry.parameters("code"):
                if made.get(parameter) is not None:
                    code |= made[parameter][1]
            for parameter in filled.entry.parameters("content"):
                paths = named_files(written.get(parameter, filled.params[parameter]))
                for path, digest in zip(paths, named_files(made.get(parameter)), strict=True):
                    files[path] = digest.removeprefix("sha256:")
        return code, files

    def modules(self) -> set[str]:
        """Return the modules whose code decides this plan's numbers."""
        return {name for cell in self.cells for name in modules_of(cell.job)}

    def manifest(self) -> dict[str, Any]:
        """Return what `report` needs to know: cells, skips, tables, digests of the sources."""
        model = self.suite.model
        named_code, named_files = self._named()
        return {
            "scheme": STORE_SCHEME,
            "suite": self.suite.name,
            "file": self.suite.path.name,
            "suite_digest": self.suite.digest,
            "sources": {**sources.digests(self.modules()), **named_code},
            "files": named_files,
            "conditions": [
                {"coordinates": dict(cell.coordinates), "facts": dict(cell.facts), "job": cell.job.key}
                for cell in self.cells
            ],
            "skips": [{"coordinates": dict(skip.coordinates), "reason": skip.reason} for skip in self.skips],
            "tables": {name: table.model_dump(mode="json") for name, table in model.tables.items()},
            "data": {name: spec.model_dump(mode="json") for name, spec in self.suite.data.items()},
            "defenses": {name: filled.identity for name, filled in self.suite.defenses.items()},
            "attacks": {name: filled.identity for name, filled in self.suite.attacks.items()},
        }


def own_modules(job: Job | Attempt) -> frozenset[str]:
    """Return the modules that decide a job's result beside those of the jobs it needs."""
    match job:
        case Train():
            used = [job.defense]
        case Attempt():
            used = [job.attack, *([job.source.train.defense] if job.source else [])]
        case Craft():
            return own_modules(job.attempt)
        case Evaluate():
            used = [job.victim.train.defense]
    entries = [each for filled in used for each in (filled.entry, *(entry for entry, _ in inner(filled)))]
    return frozenset(name for entry in entries for name in sources.closure(entry.module)) | sources.SHARED


@cache
def modules_of(job: Job | Attempt) -> frozenset[str]:
    """Return the modules that decide a job's result, through all that it needs."""
    if isinstance(job, Craft):
        return modules_of(job.attempt)
    needs = ((job.source.train,) if job.source else ()) if isinstance(job, Attempt) else job.needs
    return own_modules(job).union(*(modules_of(each) for each in needs))


class Planner:
    """Crosses what a suite names. Every job is made once."""

    def __init__(self, suite: Suite, data_root: Path | None) -> None:
        self.suite = suite
        self.root = data_root
        self._made: dict[Any, Any] = {}
        self.cells: dict[tuple[Any, ...], Cell] = {}
        self.skips: dict[tuple[Any, ...], Skip] = {}

    def plan(self) -> Plan:
        """Return all cells of all tasks."""
        for position in range(len(self.suite.model.tasks)):
            self._task(position)
        return Plan(self.suite, tuple(self.cells.values()), tuple(self.skips.values()))

    def _once(self, *name: Any, make: Any) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def data(self, spec: DataSpec, where: str) -> Data:
        """Return a data set with its digest."""

        def make() -> Data:
            try:
                folder = self.suite.folder
                return Data(
                    spec=spec,
                    digest=datasets.digest(spec, self.root, folder),
                    shape=datasets.shape(spec, self.root, folder),
                    count=datasets.count(spec, self.root, folder),
                )
            except InputError as error:
                raise InputError(f"{where}: {error}") from None

        return self._once("data", spec.model_dump_json(), make=make)  # type: ignore[no-any-return]

    def train(self, name: str, fit: Data, asked: Data, seed: int) -> Train:
        """Return the training of a defense and of its parts: on `fit`, if it learns at all."""
        filled = self.suite.defenses[name]
        entry = filled.entry
        assert isinstance(entry, DefenseEntry)
        data = fit if entry.learns else asked

        def make() -> Train:
            self._checked("defenses", name, filled, data.shape)
            for serve in self.suite.serves[name]:
                served = replace(filled, params={**filled.params, **serve})
                self._checked("defenses", name, served, data.shape)
            for attack, params in inner(filled):
                if attack.check is not None:
                    try:
                        attack.check(dict(params), data.shape)
                    except InputError as error:
                        where = self.suite.at("defenses", name)
                        raise InputError(f"{where}: inner attack {attack.name}: {error}") from None
            parts = tuple(
                (parameter, self.train(filled.params[parameter], fit, asked, seed))
                for parameter in entry.parameters("part")
                if filled.params[parameter] is not None
            )
            return Train(filled, data, seed, parts)

        return self._once("train", name, fit.key, asked.key, seed, make=make)  # type: ignore[no-any-return]

    def served(self, train: Train, serve: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> Served:
        """Return a defense as it is asked; what equals the training, or is ignored, is left out."""
        kept = tuple(
            (name, value)
            for name, value in sorted(serve.items())
            if name not in ignored and train.defense.params[name] != value
        )
        return self._once("served", train.key, repr(kept), make=lambda: Served(train, kept))  # type: ignore[no-any-return]

    def _checked(self, kind: str, name: str, filled: Filled, shape: Shape) -> None:
        """Raise where parameters cannot be, or do not fit the data."""
        entry = filled.entry
        assert isinstance(entry, AttackEntry | DefenseEntry)
        if entry.check is not None:
            try:
                entry.check(dict(filled.params), shape)
            except InputError as error:
                raise InputError(f"{self.suite.at(kind, name)}: {error}") from None

    def _learning(self, position: int, defense: str) -> bool:
        """Return whether anything is trained where a defense is attacked: itself, a part, or a source."""
        attacks = self.suite.model.tasks[position].attacks or list(self.suite.attacks)
        origins = [self.suite.model.attacks[name].source for name in attacks]
        todo = [defense, *(origin.defense for origin in origins if origin is not None)]
        while todo:
            filled = self.suite.defenses[todo.pop()]
            assert isinstance(filled.entry, DefenseEntry)
            if filled.entry.learns:
                return True
            todo += [filled.params[name] for name in filled.entry.parameters("part") if filled.params[name]]
        return False

    def _task(self, position: int) -> None:
        suite, task = self.suite, self.suite.model.tasks[position]
        spec = suite.data[task.data]
        asked = self.data(spec, suite.at("data", task.data))
        fit_spec = suite.data[task.fit] if task.fit else datasets.training(spec)
        where = suite.at("data", task.fit or task.data)
        n = min(task.limit or asked.count, asked.count)
        for defense in task.defenses or suite.defenses:
            entry = suite.defenses[defense].entry
            assert isinstance(entry, DefenseEntry)
            fitted = self.data(fit_spec, where) if self._learning(position, defense) else asked
            if fitted.shape[:3] != asked.shape[:3]:
                raise InputError(
                    f"{suite.at('tasks', position)}: {task.data} has images {tuple(asked.shape[:3])}, "
                    f"but the defenses are fitted on {tuple(fitted.shape[:3])}"
                )
            for attack in task.attacks or suite.attacks:
                filled = suite.attacks[attack]
                if isinstance(filled, Filled):
                    check = partial(self._checked, "attacks", attack, filled, fitted.shape)
                    self._once("check", attack, fitted.shape, make=check)
                for seed in task.seeds:
                    train = self.train(defense, fitted, asked, seed)
                    for serve in suite.serves[defense]:
                        for readout in task.readouts or entry.readouts:
                            for radius in task.threat.radius:
                                self._cells(
                                    position,
                                    asked,
                                    fitted,
                                    n,
                                    train,
                                    defense,
                                    serve,
                                    attack,
                                    readout,
                                    radius,
                                    seed,
                                )

    def _cells(
        self,
        position: int,
        data: Data,
        fit: Data,
        n: int,
        train: Train,
        defense: str,
        serve: Mapping[str, Any],
        attack: str,
        readout: str,
        radius: float,
        seed: int,
    ) -> None:
        task = self.suite.model.tasks[position]
        for target in self._targets(attack, train.data.shape.classes):
            for choice, label in self._views(task.views, attack, defense, readout):
                coordinates: dict[str, Any] = {
                    "data": task.data,
                    "norm": task.threat.norm,
                    "radius": None if math.isinf(radius) else radius,
                    "defense": defense,
                    "attack": attack,
                    "view": label,
                    "readout": readout,
                    "seed": seed,
                    "target": target,
                }
                coordinates |= {f"serve.{name}": value for name, value in serve.items()}
                made = self._cell(coordinates, data, fit, n, train, serve, attack, choice, radius, target)
                self._keep(position, coordinates, made)

    def _keep(self, position: int, coordinates: Mapping[str, Any], made: Cell | Skip) -> None:
        name = tuple(coordinates.items())
        if isinstance(made, Skip):
            self.skips[name] = made
            return
        other = self.cells.get(name)
        if other is not None and other.job != made.job:
            raise InputError(
                f"{self.suite.at('tasks', position)}: asks {made.coordinates['attack']} on "
                f"{made.coordinates['defense']} ({made.coordinates['data']}) a second time, in another way "
                f"(n = {other.facts['n']} and {made.facts['n']}); give one of them a name of its own"
            )
        self.cells[name] = made

    def _targets(self, attack: str, classes: int) -> list[Target]:
        match self.suite.model.attacks[attack].targets:
            case "none":
                return [None]
            case "next":
                return [1]
            case "random":
                return ["random"]
            case "others":
                return list(range(1, classes))
            case offsets:
                for offset in offsets:
                    if offset >= classes:
                        where = self.suite.at("attacks", attack, "targets")
                        raise InputError(
                            f"{where}: {offset} is no offset from the true class: with {classes} classes "
                            f"they are 1 to {classes - 1}"
                        )
                return list(dict.fromkeys(offsets))

    def _views(
        self, asked: list[ViewUse] | None, attack: str, defense: str, readout: str
    ) -> Iterator[tuple[ViewUse | None, str | None]]:
        """Yield the views that an attack looks through, with what each is called in a table."""
        filled = self.suite.attacks[attack]
        entry = filled.entry if isinstance(filled, Filled) else None
        victim = self.suite.defenses[defense].entry
        assert isinstance(entry, AttackEntry | None) and isinstance(victim, DefenseEntry)  # noqa: PT018
        source = self.suite.model.attacks[attack].source
        if entry is not None and entry.access == "none":
            yield None, None
        elif entry is not None and entry.access == "decision":
            answers = [each for each in asked or () if each.use.startswith(ANSWERS)]
            yield from _named(answers or [ViewUse(use=f"{ANSWERS}{readout}")], readout)
        elif source is not None:
            yield source.view, f"{source.defense}:{source.view.use}"
        elif entry is None and asked is None:
            # What an attack that nobody has written will look through is not known, unless the task says.
            yield None, None
        else:
            every = [
                ViewUse(use=name)
                for name, each in victim.views.items()
                if entry is not None and each.space == entry.space
            ]
            # A task may name views for several attacks; where none is of this one's kind, it says so.
            named = [each for each in asked or () if not each.use.startswith(ANSWERS)]
            yield from _named(named or asked or every, readout)

    def _cell(
        self,
        coordinates: Mapping[str, Any],
        data: Data,
        fit: Data,
        n: int,
        train: Train,
        serve: Mapping[str, Any],
        attack: str,
        choice: ViewUse | None,
        radius: float,
        target: Target,
    ) -> Cell | Skip:
        filled, victim_entry = self.suite.attacks[attack], train.defense.entry
        assert isinstance(victim_entry, DefenseEntry)
        if coordinates["readout"] not in victim_entry.readouts:
            return Skip(coordinates, f"{victim_entry.name} has no read-out {coordinates['readout']!r}")
        if isinstance(filled, Planned):
            return Skip(coordinates, f"{filled.name} is planned: {filled.reason}")
        entry = filled.entry
        assert isinstance(entry, AttackEntry)
        origin = self.suite.model.attacks[attack].source
        if coordinates["norm"] not in entry.norms:
            return Skip(coordinates, f"{entry.name} is made for {', '.join(sorted(entry.norms))}")
        if math.isinf(radius) and entry.budget == "radius":
            return Skip(coordinates, f"{entry.name} needs a radius")
        classes = train.data.shape.classes
        if classes < entry.least_classes:
            return Skip(coordinates, f"{entry.name} needs {entry.least_classes} classes, there are {classes}")
        form = train.data.shape
        if entry.channels not in (None, form.channels):
            return Skip(
                coordinates, f"{entry.name} is made for {entry.channels} channels, these have {form.channels}"
            )
        if entry.square and form.height != form.width:
            return Skip(
                coordinates, f"{entry.name} needs square images, these are {form.height}x{form.width}"
            )
        if target is not None and not entry.targeted:
            return Skip(coordinates, f"{entry.name} reaches for no target")
        if entry.unfit is not None and (reason := entry.unfit(filled.params, form)):
            return Skip(coordinates, f"{entry.name}: {reason}")
        looked_at, final = train, True
        if origin is not None:
            seed = coordinates["seed"] if origin.seed == "same" else origin.seed
            looked_at = self.train(origin.defense, fit, data, seed)
            if looked_at == train:
                return Skip(coordinates, "the source is its own victim")
            final, serve_there = False, self.suite.serves[origin.defense][0]
        else:
            serve_there = serve
        source: Served | None = None
        view: ViewUse | None = None
        if choice is not None:
            defense = looked_at.defense.entry
            assert isinstance(defense, DefenseEntry)
            if entry.access == "decision":
                if (readout := choice.use.removeprefix(ANSWERS)) not in defense.readouts:
                    return Skip(coordinates, f"{defense.name} has no read-out {readout!r}")
                view, source = choice, self.served(looked_at, serve_there)
                final = final and readout == coordinates["readout"]
            else:
                if choice.use.startswith(ANSWERS):
                    wanted = "gradients" if entry.access == "gradient" else "scores"
                    return Skip(
                        coordinates, f"{entry.name} needs {wanted}, view {choice.use!r} shows answers alone"
                    )
                found = defense.view(choice.use)
                if found is None:
                    return Skip(coordinates, f"{defense.name} has no view {choice.use!r}")
                if found.space != entry.space:
                    reason = (
                        f"{entry.name} searches {entry.space} space, view {choice.use!r} is {found.space}"
                    )
                    return Skip(coordinates, reason)
                if entry.access == "gradient" and not found.gradient:
                    return Skip(coordinates, f"{entry.name} needs gradients, view {choice.use!r} has none")
                given = defense.view_params(choice.use, choice.params)
                params = found.schema.model_validate(given).model_dump(mode="json", by_alias=True)
                view = ViewUse(use=found.name, draws=choice.draws, **params)
                source = self.served(looked_at, serve_there, found.ignores)
                final = final and coordinates["readout"] in found.reads
        limit = self.suite.model.attacks[attack].time_limit or entry.time_limit
        threat = Threat(coordinates["norm"], math.inf if entry.budget == "distance" else radius)
        attempt = self._once(
            "attempt",
            data.spec.shard,
            attack,
            threat,
            data.key,
            coordinates["seed"],
            source.key if source else None,
            repr(view),
            final,
            target,
            make=lambda: Attempt(
                filled, threat, data, coordinates["seed"], source, view, final, target, limit
            ),
        )
        crafts = self._once("crafts", attempt.key, data.spec.shard, n, make=lambda: _shards(attempt, n))
        victim = self.served(train, serve)
        job = self._once(
            "evaluate",
            victim.key,
            attempt.key,
            data.spec.shard,
            n,
            coordinates["readout"],
            make=lambda: Evaluate(victim, crafts, coordinates["readout"]),
        )
        doubts = [entry.doubts(threat, **filled.params)] if entry.doubts else []
        guard = train.defense.entry
        assert isinstance(guard, DefenseEntry)
        draws = 1 if view is None else view.draws
        if draws > 1 and source is not None and not _draws(source.train, dict(source.serve)):
            name = source.train.defense.name
            doubts.append(f"{draws} draws of {name}, whose answers do not differ, are one")
        if guard.doubts and (doubt := guard.doubts(**{**train.defense.params, **serve})):
            doubts.append(f"{coordinates['defense']}: {doubt}")
        facts = {
            "attempt": attempt.key,
            "use": entry.name,
            "access": entry.access,
            "idle": entry.access == "none",
            "budget": entry.budget,
            "source": origin.defense if origin else None,
            "final": final,
            "n": n,
            "random": _draws(train, serve),
            "doubts": [each for each in doubts if each],
        }
        return Cell(coordinates, job, facts)


def _draws(train: Train, serve: Mapping[str, Any]) -> bool:
    """Return whether two asks of a defense may differ, as it is served: by itself or by one of its parts."""
    entry = train.defense.entry
    assert isinstance(entry, DefenseEntry)
    own = entry.draws({**train.defense.params, **serve})
    return own or any(_draws(part, {}) for _, part in train.parts)


def _shards(attempt: Attempt, n: int) -> tuple[Craft, ...]:
    step = attempt.data.spec.shard
    return tuple(Craft(attempt, start, min(start + step, n)) for start in range(0, n, step))


def make(suite: Suite, data_root: Path | None = None) -> Plan:
    """Cross a suite into cells and jobs."""
    return Planner(suite, data_root).plan()


def _named(choices: Iterable[ViewUse], readout: str) -> Iterator[tuple[ViewUse, str]]:
    """Yield each view once, with what it is called in a table."""
    seen: set[str] = set()
    for choice in choices:
        view = expanded(choice, readout)
        if view.label not in seen:
            seen.add(view.label)
            yield view, view.label

"""From a suite to conditions and jobs: what a task names is crossed. Nothing is loaded, and nothing runs.

A combination that cannot be is a skip with its reason: the first of `RULES` and `VIEW_RULES` that speaks.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from bench.data import spec as datasets
from bench.data.spec import DataSpec
from bench.errors import InputError
from bench.protocols import Norm, Shape, Threat
from bench.registry import AttackEntry, DefenseEntry, ViewEntry
from bench.results import fingerprint
from bench.results.conditions import Skip
from bench.results.store import SCHEME as STORE_SCHEME
from bench.suite.examined import examinations, name_of
from bench.suite.jobs import (
    AttackRun,
    Craft,
    Data,
    Evaluate,
    Examination,
    FittedDefense,
    Job,
    Target,
    Train,
    Trial,
    modules_of,
)
from bench.suite.reach import diameter, odd_steps, steps_too_long, too_long
from bench.suite.resolve import Planned, Resolved, Suite, inner, named_files
from bench.suite.schema import ANSWERS, Precision, Task, ViewUse, expanded
from bench.suite.tables import Table
from bench.suite.worst import Rates, Row, joins

T = TypeVar("T")

ReceiptOf: TypeAlias = Callable[[str, str], Mapping[str, Any] | None]
"""Gives the receipt of a result by its kind and key, None where there is none."""


@dataclass(frozen=True)
class PlannedCondition:
    """A point of the benchmark."""

    coordinates: Mapping[str, Any]
    job: Evaluate
    facts: Mapping[str, Any]
    """What a table must know beside the coordinates: the fields of `bench.results.conditions.Facts`."""
    checks: tuple[Trial | Examination, ...] = ()
    """The jobs that say whether to believe it."""


@dataclass(frozen=True)
class Plan:
    """All conditions, and the jobs below them."""

    suite: Suite
    conditions: tuple[PlannedCondition, ...]
    skips: tuple[Skip, ...]

    def graph(self, wanted: set[str] | None = None) -> dict[Job, tuple[Job, ...]]:
        """Return every job below the conditions (those whose jobs are `wanted`), with those it needs."""
        graph: dict[Job, tuple[Job, ...]] = {}
        asked = [each for each in self.conditions if wanted is None or each.job.key in wanted]
        todo: list[Job] = [job for each in asked for job in (*each.checks, each.job)]
        while todo:
            job = todo.pop()
            if job not in graph:
                graph[job] = needs = job.needs
                todo.extend(needs)
        return graph

    def _named(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the digests of the code and of the files that the parameters of defenses name."""
        code: dict[str, str] = {}
        files: dict[str, str] = {}
        for name, resolved in self.suite.defenses.items():
            written, made = self.suite.model.defenses[name].model_extra or {}, resolved.identity["params"]
            for parameter in resolved.entry.parameters("code"):
                if made.get(parameter) is not None:
                    code |= made[parameter][1]
            for parameter in resolved.entry.parameters("content"):
                paths = named_files(written.get(parameter, resolved.params[parameter]))
                for path, digest in zip(paths, named_files(made.get(parameter)), strict=True):
                    files[path] = digest.removeprefix("sha256:")
        return code, files

    def modules(self) -> set[str]:
        """Return the modules whose code decides this plan's numbers."""
        # Conditions by the thousand are made of the same few sets of modules.
        return set[str]().union(*{modules_of(condition.job) for condition in self.conditions})

    def manifest(self) -> dict[str, Any]:
        """Return what `report` needs to know: conditions, skips, tables, digests of the sources."""
        model = self.suite.model
        named_code, named_files = self._named()
        return {
            "scheme": STORE_SCHEME,
            "suite": self.suite.name,
            "file": self.suite.path.name,
            "suite_digest": self.suite.digest,
            "added": self.suite.added_digest,
            "sources": {**fingerprint.digests(self.modules()), **named_code},
            "files": named_files,
            "conditions": [
                {"coordinates": each.coordinates, "facts": each.facts, "job": each.job.key}
                for each in self.conditions
            ],
            "skips": [{"coordinates": skip.coordinates, "reason": skip.reason} for skip in self.skips],
            "tables": {name: table.model_dump(mode="json") for name, table in model.tables.items()},
            "data": {name: spec.model_dump(mode="json") for name, spec in self.suite.data.items()},
            "defenses": {name: resolved.identity for name, resolved in self.suite.defenses.items()},
            "attacks": {name: resolved.identity for name, resolved in self.suite.attacks.items()},
        }


@dataclass(frozen=True)
class Point:
    """A combination that a task asks for, by the labels that the suite gives to things."""

    data: str
    norm: Norm
    radius: float
    defense: str
    attack: str
    view: str | None
    """What a table calls the view; None: the attack looks through none."""
    readout: str
    seed: int
    target: Target
    inference: Mapping[str, Any]
    """Parameters of the defense that are replaced after fitting."""

    @property
    def coordinates(self) -> dict[str, Any]:
        """What a table may show of it, in the order of the manifest; an infinite radius is None."""
        return {
            "data": self.data,
            "norm": self.norm,
            "radius": None if math.isinf(self.radius) else self.radius,
            "defense": self.defense,
            "attack": self.attack,
            "view": self.view,
            "readout": self.readout,
            "seed": self.seed,
            "target": self.target,
            **{f"inference.{name}": value for name, value in self.inference.items()},
        }


@dataclass(frozen=True)
class Request:
    """A point with what its labels stand for: all that decides whether it can be, and by which jobs."""

    point: Point
    attack: Resolved[AttackEntry]
    victim: Train
    data: Data
    """What is attacked."""
    fit: Data
    """What defenses are fitted on, where they learn."""
    n: int
    """How many examples are attacked: a prefix of `data`."""
    choice: ViewUse | None
    """The view as the task names it; None: the attack looks through none."""

    @property
    def shape(self) -> Shape:
        """The form of the images and the number of classes that the victim was made for."""
        return self.victim.data.shape


@dataclass(frozen=True)
class Sight:
    """What the attack of a request would look at: its victim, or the source that it transfers from."""

    request: Request
    train: Train
    inference: Mapping[str, Any]
    choice: ViewUse
    transfers: bool

    @property
    def attack(self) -> AttackEntry:
        """The registered attack."""
        return self.request.attack.entry

    @property
    def defense(self) -> DefenseEntry:
        """The registered defense that is looked at."""
        return self.train.defense.entry

    @property
    def answers(self) -> str | None:
        """The read-out whose answers alone the view shows; None for a view of the defense."""
        use = self.choice.use
        return use.removeprefix(ANSWERS) if use.startswith(ANSWERS) else None


class AttackedView(NamedTuple):
    """The defense and the view that an attack looks at, as they enter the key of its run."""

    source: FittedDefense | None
    view: ViewUse | None
    read: bool
    """Whether the view's answer is what is scored."""
    exact: bool
    """Whether an example is broken once the view's answer is wrong; of a random defense that is a draw."""


def lacks_readout(defense: DefenseEntry, readout: str) -> str | None:
    """Return the reason where a defense does not have a read-out."""
    return None if readout in defense.readouts else f"{defense.name} has no read-out {readout!r}"


def only_stored(request: Request) -> str | None:
    """Refuse an attack that shows stored images: a task has none."""
    entry = request.attack.entry
    return f"{entry.name} shows a baseline's images: bench check does" if entry.starts == "stored" else None


def unknown_readout(request: Request) -> str | None:
    """Refuse a read-out that the victim does not have."""
    return lacks_readout(request.victim.defense.entry, request.point.readout)


def other_norm(request: Request) -> str | None:
    """Refuse a norm that the attack is not made for."""
    entry = request.attack.entry
    if request.point.norm in entry.norms:
        return None
    return f"{entry.name} is made for {', '.join(sorted(entry.norms))}"


def missing_radius(request: Request) -> str | None:
    """Refuse an attack with a budget where the task has no radius."""
    entry = request.attack.entry
    without = math.isinf(request.point.radius) and entry.kind == "fixed-budget"
    return f"{entry.name} needs a radius" if without else None


def too_few_classes(request: Request) -> str | None:
    """Refuse data with fewer classes than the attack needs."""
    entry, classes = request.attack.entry, request.shape.classes
    enough = classes >= entry.least_classes
    return None if enough else f"{entry.name} needs {entry.least_classes} classes, there are {classes}"


def other_channels(request: Request) -> str | None:
    """Refuse images with another number of channels than the attack is made for."""
    entry, channels = request.attack.entry, request.shape.channels
    if entry.channels in (None, channels):
        return None
    return f"{entry.name} is made for {entry.channels} channels, these have {channels}"


def not_square(request: Request) -> str | None:
    """Refuse oblong images where the attack needs square ones."""
    entry, form = request.attack.entry, request.shape
    if not entry.square or form.height == form.width:
        return None
    return f"{entry.name} needs square images, these are {form.height}x{form.width}"


def untargeted(request: Request) -> str | None:
    """Refuse a target where the attack reaches for none."""
    entry = request.attack.entry
    aimless = request.point.target is not None and not entry.targeted
    return f"{entry.name} reaches for no target" if aimless else None


def unfit_data(request: Request) -> str | None:
    """Refuse data that the attack itself calls unfit, with its parameters."""
    entry = request.attack.entry
    reason = entry.said("unfit", request.attack.params, request.shape)
    return f"{entry.name}: {reason}" if reason else None


RULES: tuple[Callable[[Request], str | None], ...] = (
    only_stored,
    unknown_readout,
    other_norm,
    missing_radius,
    too_few_classes,
    other_channels,
    not_square,
    untargeted,
    unfit_data,
)
"""What is asked of every request, in this order; each returns why it cannot be, or None."""


def own_source(sight: Sight) -> str | None:
    """Refuse a transfer from the victim to itself."""
    own = sight.transfers and sight.train == sight.request.victim
    return "the source is its own victim" if own else None


def unknown_answers(sight: Sight) -> str | None:
    """Refuse the answers of a read-out that the defense does not have."""
    if sight.attack.access != "decision" or sight.answers is None:
        return None
    return lacks_readout(sight.defense, sight.answers)


def answers_alone(sight: Sight) -> str | None:
    """Refuse a view of answers to an attack that needs more of them."""
    entry = sight.attack
    if entry.access == "decision" or sight.answers is None:
        return None
    wanted = "gradients" if entry.access == "gradient" else "scores"
    return f"{entry.name} needs {wanted}, view {sight.choice.use!r} shows answers alone"


def unknown_view(sight: Sight) -> str | None:
    """Refuse a view that the defense does not offer."""
    known = sight.answers is not None or sight.defense.view(sight.choice.use) is not None
    return None if known else f"{sight.defense.name} has no view {sight.choice.use!r}"


def other_space(sight: Sight) -> str | None:
    """Refuse a view of another space than the attack searches."""
    entry, view = sight.attack, sight.defense.view(sight.choice.use)
    if view is None or view.space == entry.space:
        return None
    return f"{entry.name} searches {entry.space} space, view {sight.choice.use!r} is {view.space}"


def no_gradient(sight: Sight) -> str | None:
    """Refuse a view that no gradient flows through to an attack that needs gradients."""
    entry, view = sight.attack, sight.defense.view(sight.choice.use)
    if view is None or view.gradient or entry.access != "gradient":
        return None
    return f"{entry.name} needs gradients, view {sight.choice.use!r} has none"


VIEW_RULES: tuple[Callable[[Sight], str | None], ...] = (
    own_source,
    unknown_answers,
    answers_alone,
    unknown_view,
    other_space,
    no_gradient,
)
"""What is asked of every request that looks at something, after `RULES`."""


def refusal(rules: Iterable[Callable[[T], str | None]], asked: T) -> str | None:
    """Return the reason of the first rule that refuses.

    Args:
        rules: `RULES` or `VIEW_RULES`.
        asked: what they are asked about.

    Returns:
        The reason, or None where no rule has one.
    """
    return next((reason for rule in rules if (reason := rule(asked)) is not None), None)


class Planner:
    """Crosses what a suite names. Every job is made once."""

    def __init__(self, suite: Suite, data_root: Path | None, receipts: ReceiptOf | None = None) -> None:
        self.suite = suite
        self.root = data_root
        self._receipts = receipts or (lambda kind, key: None)
        self._worst: dict[tuple[Any, ...], bool] = {}
        self._made: dict[Hashable, Any] = {}
        self._spellings: dict[int, tuple[ViewUse | None, str]] = {}
        self.conditions: dict[tuple[Any, ...], PlannedCondition] = {}
        self.skips: dict[tuple[Any, ...], Skip] = {}

    def plan(self) -> Plan:
        """Return all conditions of all tasks."""
        for position in range(len(self.suite.model.tasks)):
            self._task(position)
        self._examine()
        self._join()
        for key, table in self.suite.model.tables.items():
            self._check_table(key, table)
        return Plan(self.suite, tuple(self.conditions.values()), tuple(self.skips.values()))

    def _once(self, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _spelled(self, view: ViewUse | None) -> str:
        """Return a view as text, spelled once: a plan has few views, and every condition asks for one."""
        # The view is kept beside it, so that no other one can come to its place in memory.
        if id(view) not in self._spellings:
            self._spellings[id(view)] = view, repr(view)
        return self._spellings[id(view)][1]

    def data(self, spec: DataSpec, where: str) -> Data:
        """Return a data set with its digest.

        Args:
            spec: which examples.
            where: file, line and place, for messages.

        Returns:
            The data set, of which nothing was loaded.

        Raises:
            InputError: the source does not know such examples.
        """

        def make() -> Data:
            folder = self.suite.folder
            try:
                return Data(
                    spec=spec,
                    digest=datasets.digest(spec, self.root, folder),
                    shape=datasets.shape(spec, self.root, folder),
                    count=datasets.count(spec, self.root, folder),
                )
            except InputError as error:
                raise InputError(f"{where}: {error}") from None

        return self._once(("data", spec.model_dump_json()), make)

    def train(self, name: str, fit: Data, asked: Data, seed: int) -> Train:
        """Return the training of a defense and of its parts.

        Args:
            name: the suite's label of the defense.
            fit: what it is fitted on, if it learns at all.
            asked: what it is attacked on; stands for `fit` where it learns nothing.
            seed: of the training and of its parts'.

        Returns:
            The training, the same object for the same arguments.

        Raises:
            InputError: its parameters, or those set at inference time, do not fit the data.
        """
        resolved = self.suite.defenses[name]
        data = fit if resolved.entry.learns else asked

        def make() -> Train:
            self._check_defense(name, data.shape)
            parts = tuple(
                (parameter, self.train(resolved.params[parameter], fit, asked, seed))
                for parameter in resolved.entry.parameters("part")
                if resolved.params[parameter] is not None
            )
            return Train(resolved, data, seed, parts)

        return self._once(("train", name, fit.key, asked.key, seed), make)

    def fitted(
        self, train: Train, inference: Mapping[str, Any], ignored: frozenset[str] = frozenset()
    ) -> FittedDefense:
        """Return a defense as it is asked.

        Args:
            train: its training.
            inference: parameters that are replaced after it.
            ignored: names that change nothing for who asks.

        Returns:
            The fitted defense; what equals the training, or is ignored, is left out.
        """
        kept = tuple(
            (name, value)
            for name, value in sorted(inference.items())
            if name not in ignored and train.defense.params[name] != value
        )
        return self._once(("inference", train.key, repr(kept)), lambda: FittedDefense(train, kept))

    def _check_defense(self, name: str, shape: Shape) -> None:
        """Raise where parameters of a defense, or those set at inference time, do not fit the data."""
        resolved = self.suite.defenses[name]
        try:
            self._checked("defenses", name, resolved, shape)
        except InputError as error:
            raise InputError(f"{error}{_other_side(resolved, shape)}") from None
        for inference in self.suite.inference_settings[name]:
            self._checked("defenses", name, replace(resolved, params={**resolved.params, **inference}), shape)
        for attack in inner(resolved):
            try:
                attack.entry.check(attack.params, shape)
                attack.entry.passes(attack.params)
            except InputError as error:
                where = self.suite.at("defenses", name)
                raise InputError(f"{where}: inner attack {attack.name}: {error}") from None

    def _checked(
        self, kind: str, name: str, resolved: Resolved[AttackEntry] | Resolved[DefenseEntry], shape: Shape
    ) -> None:
        """Raise where parameters cannot be, or do not fit the data."""
        try:
            resolved.entry.check(resolved.params, shape)
            if isinstance(resolved.entry, AttackEntry):
                # Estimates ask for it later, of many jobs.
                resolved.entry.passes(resolved.params)
        except InputError as error:
            raise InputError(f"{self.suite.at(kind, name)}: {error}") from None

    def _check_radii(self, position: int, shape: Shape) -> None:
        """Raise where a radius of a task is greater than the distance of any two images."""
        threat = self.suite.model.tasks[position].threat
        for place, radius in enumerate(threat.radius):
            said = too_long("radius", radius, diameter(threat.norm, shape), threat.norm)
            if said is not None:
                several = [place] if len(threat.radius) > 1 else []
                at = self.suite.at("tasks", position, "threat", "radius", *several)
                raise InputError(f"{at}: {said}")

    def _check_table(self, key: str, table: Table) -> None:
        """Raise where a table reads distances at a radius that is greater than any of its tasks knows."""
        asked = [
            (diameter(norm, self.data(self.suite.data[task.data], "").shape), norm)
            for task in self.suite.model.tasks
            if math.inf in task.threat.radius
            and _selects(table.where, "norm", norm := task.threat.norm)
            and _selects(table.where, "data", task.data)
        ]
        for place, radius in enumerate(table.radii if asked else ()):
            if (said := too_long("radius", radius, *max(asked))) is not None:
                raise InputError(f"{self.suite.at('tables', key, 'radii', place)}: {said}")

    def _check_steps(self, name: str, attack: Resolved[AttackEntry], norm: Norm, shape: Shape) -> None:
        """Raise where a step of an attack is longer than the distance of any two images."""
        every = (each.params for each in (attack, *inner(attack)))
        if (said := steps_too_long(every, norm, shape)) is not None:
            raise InputError(f"{self.suite.at('attacks', name)}: {said}")

    def _learning(self, task: Task, defense: str) -> bool:
        """Return whether anything is trained where a defense is attacked: itself, a part, or a source."""
        origins = [self.suite.model.attacks[name].source for name in task.attacks or self.suite.attacks]
        todo = [defense, *(origin.defense for origin in origins if origin is not None)]
        while todo:
            resolved = self.suite.defenses[todo.pop()]
            if resolved.entry.learns:
                return True
            todo += [
                resolved.params[name] for name in resolved.entry.parameters("part") if resolved.params[name]
            ]
        return False

    def _task(self, position: int) -> None:
        suite, task = self.suite, self.suite.model.tasks[position]
        asked = self.data(suite.data[task.data], suite.at("data", task.data))
        n = min(task.limit or asked.count, asked.count)
        self._check_radii(position, asked.shape)
        for defense in task.defenses or suite.defenses:
            fitted = self._fitted(position, defense, asked)
            for attack in task.attacks or suite.attacks:
                resolved = suite.attacks[attack]
                if isinstance(resolved, Resolved):
                    check = partial(self._checked, "attacks", attack, resolved, fitted.shape)
                    self._once(("check", attack, fitted.shape), check)
                    steps = partial(self._check_steps, attack, resolved, task.threat.norm, fitted.shape)
                    self._once(("steps", attack, task.threat.norm, fitted.shape), steps)
                for seed in task.seeds:
                    victim = self.train(defense, fitted, asked, seed)
                    for point, choice in self._points(position, victim, defense, attack, seed):
                        if isinstance(resolved, Planned):
                            self._keep(position, point, _planned(point, victim, resolved))
                        else:
                            request = Request(point, resolved, victim, asked, fitted, n, choice)
                            self._keep(position, point, self._condition(request))

    def _precision(self, attack: str, entry: AttackEntry) -> Precision:
        """Return what an attack searches in; one that looks at nothing searches nothing."""
        asked = self.suite.model.attacks[attack].precision or self.suite.model.precision
        return "float32" if entry.blind else asked

    def _fitted(self, position: int, defense: str, asked: Data) -> Data:
        """Return what the defenses of a task are fitted on; raise where it has other images than `asked`."""
        suite, task = self.suite, self.suite.model.tasks[position]
        if not self._learning(task, defense):
            return asked
        spec = suite.data[task.fit] if task.fit else datasets.training(suite.data[task.data])
        fitted = self.data(spec, suite.at("data", task.fit or task.data))
        if fitted.shape[:3] != asked.shape[:3]:
            raise InputError(
                f"{suite.at('tasks', position)}: {task.data} has images {tuple(asked.shape[:3])}, "
                f"but the defenses are fitted on {tuple(fitted.shape[:3])}"
            )
        return fitted

    def _points(
        self, position: int, victim: Train, defense: str, attack: str, seed: int
    ) -> Iterator[tuple[Point, ViewUse | None]]:
        """Yield every combination of the rest, with the view that it looks through."""
        task = self.suite.model.tasks[position]
        readouts = task.readouts or victim.defense.entry.readouts
        crossed = product(self.suite.inference_settings[defense], readouts, task.threat.radius)
        targets = self._targets(attack, victim.data.shape.classes)
        for inference, readout, radius in crossed:
            name = ("views", position, defense, attack, readout)
            views = self._once(name, partial(self._views, task.views, attack, defense, readout))
            for target in targets:
                for choice, label in views:
                    yield (
                        Point(
                            data=task.data,
                            norm=task.threat.norm,
                            radius=radius,
                            defense=defense,
                            attack=attack,
                            view=label,
                            readout=readout,
                            seed=seed,
                            target=target,
                            inference=inference,
                        ),
                        choice,
                    )

    def _keep(self, position: int, point: Point, made: PlannedCondition | Skip) -> None:
        # Which coordinates there are follows from the data and the defense, which are among them.
        name = tuple(made.coordinates.values())
        if isinstance(made, Skip):
            self.skips[name] = made
            return
        other, task = self.conditions.get(name), self.suite.model.tasks[position]
        worst = self.suite.model.worst if task.worst is None else task.worst
        if self._worst.setdefault(name, worst) != worst and _joins(made):
            raise InputError(
                f"{self.suite.at('tasks', position)}: asks {point.attack} on {point.defense} ({point.data}) "
                "a second time, in worst mode and out of it; give one of them a name of its own"
            )
        if other is not None and other.job != made.job:
            raise InputError(
                f"{self.suite.at('tasks', position)}: asks {point.attack} on {point.defense} ({point.data}) "
                f"a second time, in another way (n = {other.facts['n']} and {made.facts['n']}); "
                "give one of them a name of its own"
            )
        self.conditions[name] = made

    def _examine(self) -> None:
        """Have the defenses examined, as far as the file asks for it; say where a whole examination lies."""
        asked = self.suite.model.doctor
        looks = examinations(self.conditions.values(), whole=False)
        for name, each in self.conditions.items():
            look = looks[name_of(each)]
            whole = self._once(("examination", look.key), partial(replace, look, whole=True))
            named = each.coordinates["defense"] in self.suite.added.doctor
            wanted = whole if asked == "all" or named or each.job.victim.train.foreign else look
            checks = () if asked == "none" and not named else (wanted,)
            asked_for = {"examination": checks[0].key} if checks else {}
            facts = {**each.facts, "examinations": [whole.key, look.key], **asked_for}
            self.conditions[name] = replace(each, checks=(*each.checks, *checks), facts=facts)

    def _trial(self, request: Request, threat: Threat) -> Trial | None:
        """Return the trial of an attack; None where the file asks for none, or it looks at nothing."""
        entry, shape = request.attack.entry, request.shape
        wanted = self.suite.model.doctor != "none" or request.point.defense in self.suite.added.doctor
        if not wanted or entry.blind or entry.idle:
            return None
        name = ("trial", request.point.attack, threat, shape)
        return self._once(name, lambda: Trial(request.attack, threat, shape))

    def _join(self) -> None:
        """Make one of the attacks of each row that is planned in worst mode, in the order of their rates."""
        rows: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
        for name, each in self.conditions.items():
            if self._worst[name] and _joins(each):
                rest = {key: value for key, value in each.coordinates.items() if key != "attack"}
                rows[(*rest.items(), each.facts["n"])].append(name)
        rates, joined = Rates(), []
        for names in rows.values():
            planned = [self.conditions[name] for name in names]
            self._check_precision(planned)
            row = Row.of((each.job.crafts[0].attack_run.attack for each in planned), self.suite.folder)
            for each in planned:
                rates.learn(each.job.crafts[0].attack_run, self._receipts("evaluate", each.job.key))
            if len(row.places) > 1:
                job = _in_one(planned, row.attack)
                rates.learn(job.crafts[0].attack_run, self._receipts("evaluate", job.key))
                joined.append((names, row, job))
        for names, row, job in joined:
            order = rates.order(job.crafts[0].attack_run.members)
            planned = [self.conditions[name] for name in names]
            whole = _in_one(planned, row.ordered(order))
            run = whole.crafts[0].attack_run
            for name, each in zip(names, planned, strict=True):
                member = row.member(each.job.crafts[0].attack_run.attack)
                # Within the radius, whatever it does alone.
                facts = {"attack_run": run.key, "kind": "fixed-budget", "member": member}
                self.conditions[name] = replace(each, job=whole, facts={**each.facts, **facts})

    def _check_precision(self, planned: Sequence[PlannedCondition]) -> None:
        """Raise where attacks that would run as one search in different precisions."""
        found = {each.job.crafts[0].attack_run.precision: each.coordinates["attack"] for each in planned}
        if len(found) > 1:
            said = ", ".join(f"{attack} in {precision}" for precision, attack in found.items())
            raise InputError(
                f"{self.suite.at('attacks')}: worst mode runs the attacks of a row as one, and these search "
                f"differently: {said}; give them one `precision`"
            )

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
    ) -> Sequence[tuple[ViewUse | None, str | None]]:
        """Return the views that an attack looks through, with what each is called in a table."""
        resolved = self.suite.attacks[attack]
        entry = resolved.entry if isinstance(resolved, Resolved) else None
        victim = self.suite.defenses[defense].entry
        source = self.suite.model.attacks[attack].source
        if (entry is not None and entry.blind) or (entry is None and source is None and asked is None):
            # What an attack that nobody has written will look through is not known, unless the task says.
            return [(None, None)]
        if entry is not None and entry.access == "decision":
            answers = [each for each in asked or () if each.use.startswith(ANSWERS)]
            return _named(answers or [ViewUse(use=f"{ANSWERS}{readout}")], readout)
        if source is not None:
            return [(source.view, f"{source.defense}:{source.view.use}")]
        every = [
            ViewUse(use=name)
            for name, each in victim.views.items()
            if entry is not None and each.space == entry.space
        ]
        # A task may name views for several attacks; where none is of this one's kind, it says so.
        named = [each for each in asked or () if not each.use.startswith(ANSWERS)]
        return _named(named or asked or every, readout)

    def _condition(self, request: Request) -> PlannedCondition | Skip:
        """Return a request's condition with its jobs, or why it cannot be."""
        point = request.point
        if (reason := refusal(RULES, request)) is not None:
            return Skip(point.coordinates, reason)
        attacked = AttackedView(None, None, read=True, exact=True)
        if request.choice is not None:
            sight = self._sight(request, request.choice)
            if (reason := refusal(VIEW_RULES, sight)) is not None:
                return Skip(point.coordinates, reason)
            attacked = self._attacked_view(sight)
        attack_run = self._attack_run(request, attacked)
        victim = self.fitted(request.victim, point.inference)
        shard, n, readout = request.data.spec.shard, request.n, point.readout
        crafts = self._once(("crafts", attack_run.key, shard, n), lambda: _shards(attack_run, n))
        random = draws(request.victim, point.inference)
        asked = self.suite.model.draws if random else 1
        name = ("evaluate", victim.key, attack_run.key, shard, n, readout, asked)
        job = self._once(name, lambda: Evaluate(victim, crafts, readout, asked))
        entry, origin = request.attack.entry, self.suite.model.attacks[point.attack].source
        trial = self._trial(request, attack_run.threat)
        facts = {
            "attack_run": attack_run.key,
            "use": entry.name,
            "idle": entry.idle,
            "access": entry.access,
            "kind": entry.kind,
            "source": origin.defense if origin else None,
            "exact": attacked.read,
            "n": n,
            "random": random,
            "flags": _flags(request, attack_run),
            # One draw is no fact: manifests of defenses that are asked once stay as they are.
            **({} if asked == 1 else {"draws": asked}),
            **({} if attack_run.precision == "float32" else {"precision": attack_run.precision}),
            **({} if (loss := request.attack.params.get("loss")) in _ENTROPY else {"loss": loss}),
            **({"averaged": seen.draws} if (seen := attack_run.view) is not None and seen.draws > 1 else {}),
            **({"trained_on_them": True} if _trained_on(request.victim, request.data) else {}),
            **({} if trial is None else {"trial": trial.key}),
            **({"added": True} if point.attack in self.suite.added.attacks else {}),
        }
        return PlannedCondition(point.coordinates, job, facts, () if trial is None else (trial,))

    def _sight(self, request: Request, choice: ViewUse) -> Sight:
        point = request.point
        origin = self.suite.model.attacks[point.attack].source
        if origin is None:
            return Sight(request, request.victim, point.inference, choice, transfers=False)
        seed = point.seed if origin.seed == "same" else origin.seed
        train = self.train(origin.defense, request.fit, request.data, seed)
        return Sight(request, train, self.suite.inference_settings[origin.defense][0], choice, transfers=True)

    def _attacked_view(self, sight: Sight) -> AttackedView:
        """Return what is looked at, by the view's own name and with its parameters filled in."""
        readout = sight.request.point.readout
        certain = not sight.transfers and not draws(sight.train, sight.inference)
        if sight.answers is not None:
            read = not sight.transfers and sight.answers == readout
            return AttackedView(
                self.fitted(sight.train, sight.inference), sight.choice, read, read and certain
            )
        view = sight.defense.view(sight.choice.use)
        assert view is not None, "unknown_view lets only those pass that there are"
        # By what is written: 1, 1.0 and true are equal, and not the same parameter.
        name = ("view", sight.defense.name, self._spelled(sight.choice))
        resolved = self._once(name, partial(_filled_view, sight.defense, view, sight.choice))
        read = not sight.transfers and readout in view.exact_for
        source = self.fitted(sight.train, sight.inference, view.ignores)
        return AttackedView(source, resolved, read, read and certain)

    def _attack_run(self, request: Request, attacked: AttackedView) -> AttackRun:
        point, entry = request.point, request.attack.entry
        threat = entry.given(Threat(point.norm, point.radius))
        limit = self.suite.model.attacks[point.attack].time_limit or entry.time_limit
        name = (
            "attack_run",
            request.data.spec.shard,
            point.attack,
            threat,
            request.data.key,
            point.seed,
            attacked.source.key if attacked.source else None,
            self._spelled(attacked.view),
            attacked.exact,
            point.target,
        )

        def make() -> AttackRun:
            return AttackRun(
                attack=request.attack,
                threat=threat,
                data=request.data,
                seed=point.seed,
                source=attacked.source,
                view=attacked.view,
                exact=attacked.exact,
                target=point.target,
                time_limit=limit,
                precision=self._precision(point.attack, entry),
            )

        return self._once(name, make)


_ENTROPY = (None, "ce", "crossentropy")
"""What attacks call the cross-entropy, which is what is climbed where there is no choice."""

_SIDES = (16, 28, 32, 64, 96, 128, 224)
"""Sides of images that networks are usually made for."""


def _other_side(defense: Resolved[DefenseEntry], shape: Shape) -> str:
    """Return how `resize` helps, where a defense was refused for the images' sides; else an empty text."""
    for side in sorted(_SIDES, key=lambda each: abs(each - min(shape.height, shape.width))):
        try:
            defense.entry.check(defense.params, shape._replace(height=side, width=side))
        except InputError:
            continue
        return f"; `resize: {side}` under data makes them {side}x{side}"
    return ""


def _filled_view(defense: DefenseEntry, view: ViewEntry, choice: ViewUse) -> ViewUse:
    """Return a view by its own name, with every parameter."""
    given = defense.view_params(choice.use, choice.params)
    params = view.schema.model_validate(given).model_dump(mode="json", by_alias=True)
    return ViewUse(use=view.name, draws=choice.draws, **params)


def _planned(point: Point, victim: Train, attack: Planned) -> Skip:
    """Return the skip of an attack that is not there."""
    reason = f"{attack.name} is planned: {attack.reason}" if attack.installed else attack.reason
    return Skip(point.coordinates, lacks_readout(victim.defense.entry, point.readout) or reason)


def _selects(where: Mapping[str, Any], name: str, value: str) -> bool:
    """Return whether a selection of a table leaves in what has a value of a coordinate."""
    chosen = where.get(name, value)
    return value in (chosen if isinstance(chosen, list) else [chosen])


def _flags(request: Request, attack_run: AttackRun) -> list[str]:
    """Return where the settings of attack, view or victim cannot do what they seem to."""
    point, entry, guard = request.point, request.attack.entry, request.victim.defense.entry
    found = [entry.said("flags", attack_run.threat, **request.attack.params)]
    found += odd_steps(entry, request.attack.params, attack_run.threat)
    source, averaged = attack_run.source, attack_run.view.draws if attack_run.view else 1
    if averaged > 1 and source is not None and not draws(source.train, dict(source.inference)):
        name = source.train.defense.called
        found.append(f"{averaged} draws of {name}, whose answers do not differ, are one")
    if flag := guard.said("flags", **{**request.victim.defense.params, **point.inference}):
        found.append(f"{point.defense}: {flag}")
    return [each for each in found if each]


def _trained_on(victim: Train, asked: Data) -> bool:
    """Return whether a defense, or one of its parts, was fitted on the split that it is scored on."""
    own = victim.defense.entry.learns and (
        (victim.data.spec.name, victim.data.spec.split) == (asked.spec.name, asked.spec.split)
    )
    return own or any(_trained_on(part, asked) for _, part in victim.parts)


def draws(train: Train, inference: Mapping[str, Any]) -> bool:
    """Return whether two asks of a defense may differ at inference time, by itself or by one of its parts.

    Args:
        train: Its training.
        inference: Parameters that are replaced after it.
    """
    own = train.defense.entry.draws({**train.defense.params, **inference})
    return own or any(draws(part, {}) for _, part in train.parts)


def _shards(attack_run: AttackRun, n: int) -> tuple[Craft, ...]:
    step = attack_run.data.spec.shard
    return tuple(Craft(attack_run, start, min(start + step, n)) for start in range(0, n, step))


def _joins(condition: PlannedCondition) -> bool:
    """Return whether a condition's attack may be one of several on what stands."""
    # One lucky answer of a random defense would end an example for all attacks that come later.
    certain = not condition.facts["random"]
    return certain and joins(condition.job.crafts[0].attack_run, condition.coordinates["radius"])


def _in_one(planned: Sequence[PlannedCondition], attack: Resolved[AttackEntry]) -> Evaluate:
    """Return the evaluation of several attacks in one, where those alone are planned."""
    job, runs = planned[0].job, [each.job.crafts[0].attack_run for each in planned]
    limits = [each.time_limit for each in runs]
    run = replace(
        runs[0],
        attack=attack,
        threat=Threat(runs[0].threat.norm, planned[0].coordinates["radius"]),
        time_limit=None if None in limits else sum(filter(None, limits)),
    )
    return replace(job, crafts=tuple(replace(each, attack_run=run) for each in job.crafts))


def make(suite: Suite, data_root: Path | None = None, receipts: ReceiptOf | None = None) -> Plan:
    """Cross a suite into conditions and jobs.

    Args:
        suite: the checked suite.
        data_root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        receipts: gives the receipt of a result by its kind and key, None where there is none: by these,
            attacks in worst mode are put in order. None: there are no receipts.

    Returns:
        The plan. Nothing was loaded.

    Raises:
        InputError: a parameter does not fit the data, or two tasks ask for one condition in two ways.
    """
    return Planner(suite, data_root, receipts).plan()


def _named(choices: Iterable[ViewUse], readout: str) -> list[tuple[ViewUse, str]]:
    """Return each view once, with what it is called in a table."""
    found: dict[str, ViewUse] = {}
    for choice in choices:
        view = expanded(choice, readout)
        found.setdefault(view.label, view)
    return [(view, label) for label, view in found.items()]

"""An attack on a network in hand: no task file and no store; the rules, draws and referee of a suite.

A call is put into the form of a suite with one task, so that it is checked, planned, attacked and judged
by the same code, and refused by the same sentences.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from bench.console import count
from bench.data.spec import DataSpec
from bench.errors import InputError, did_you_mean
from bench.networks import Classifier, check_network
from bench.protocols import Decision, Images, Labels, Norm, Shape, Split, View
from bench.quantities import format_value
from bench.registry import (
    ATTACKS,
    DEFENSES,
    WHOLE,
    AttackEntry,
    Count,
    DefenseEntry,
    ViewEntry,
    bind,
    discover,
)
from bench.report import checks
from bench.report.checks import Evidence
from bench.report.render.words import interval, number
from bench.results import metrics
from bench.results.conditions import Condition, Facts
from bench.results.metrics import Estimate
from bench.results.outcomes import Rows, arrays
from bench.runner import process_state
from bench.runner.context import settle
from bench.runner.craft import attacked, unmoved
from bench.runner.evaluate import answers_to, shown_images, table_of
from bench.runner.referee import frozen
from bench.suite.jobs import Data, Evaluate, FittedDefense, Train
from bench.suite.planner import PlannedCondition, Planner
from bench.suite.resolve import Resolved, Suite, checked, resolved
from bench.suite.schema import AttackUse, SuiteModel
from bench.suite.yaml_source import Document, Place, dotted

if TYPE_CHECKING:
    import pandas as pd

    from bench.protocols import Attack

MODEL = "model"
"""What a call names the defense that it is given."""

EXAMPLES = "examples"
"""What a call names the images that it is given."""

TENSORS = "tensors"
"""The digest of images that no data set names: draws depend on an image's index, and not on its content."""


@dataclass(frozen=True)
class Result:
    """What an attack left: images, and a row for each example.

    Attributes:
        images: What the defense was shown, float32 (N, C, H, W) in [0, 1], on the device of the images that
            were given. Where an attack's image was invalid, this is the clean image.
        frame: A row for each example, in the order given; the columns are those of `docs/results.md`
            (``index``, ``truth``, ``label``, ``rejected``, ``invalid``, ``distance``, ``forwards``,
            ``backwards``, ...), and among them ``clean_label`` and ``clean_rejected`` (the answer to the
            clean image) and ``broken``: the opposite of robust, so true where the answer to the clean image
            or to the adversarial one is wrong; an attack that moves as little as it can is read at the
            radius. Whether the adversarial image alone is answered right is ``accuracy`` of `score`.
        attack: The attack's name.
        norm: The norm that distances are measured in.
        radius: The radius of the threat in [0, 1] units; infinite for an attack that moves as little as it
            can and was given none.
        flags: Reasons to doubt the numbers, as tables have them (`docs/flags.md`): settings that cannot do
            what they seem to, vanished gradients, invalid moves, answers that differ when asked again, ...
    """

    images: Images
    frame: "pd.DataFrame"
    attack: str
    norm: Norm
    radius: float
    flags: tuple[str, ...]
    _rows: Rows = field(repr=False)
    _clean: Rows = field(repr=False)

    @property
    def clean(self) -> Estimate:
        """The accuracy on the clean images: value in [0, 1], 95 % interval (`low`, `high`), and `n`."""
        found = metrics.estimate(
            metrics.named("accuracy"), {0: [metrics.score(metrics.named("accuracy"), self._clean, None)]}
        )
        assert found is not None
        return found

    @property
    def robust(self) -> Estimate:
        """The share that is right on the clean image and on the adversarial one, with its interval."""
        found = self.score("robust")
        assert found is not None
        return found

    def score(self, metric: str) -> Estimate | None:
        """Return a metric of a table.

        Args:
            metric: The name of a metric that is not of a class, such as ``accuracy``, ``robust``,
                ``success``, ``rejection`` or ``distance`` (the median distance that breaks the defense).

        Returns:
            The number with its 95 % interval and the number of examples; None where no example counts.

        Raises:
            InputError: There is no such metric, or the read-out gives nothing that it looks at.
        """
        chosen = metrics.named(metric)
        if chosen.by_class:
            raise InputError(f"metric: {metric} is of a class; read it from a table")
        if lacking := chosen.lacks(self._rows):
            raise InputError(f"metric: {metric}: {lacking}")
        return metrics.estimate(chosen, {0: [metrics.score(chosen, self._rows, self._clean)]})

    def __repr__(self) -> str:
        """Return shapes and counts in a line."""
        n, wrong, void = (int(each) for each in (len(self.frame), *self.frame[["broken", "invalid"]].sum()))
        return (
            f"Result({self.attack}, {self._threat}: images {tuple(self.images.shape)}, "
            f"{wrong} of {n} broken, {void} invalid, {count(len(self.flags), 'flag')})"
        )

    @property
    def _threat(self) -> str:
        return self.norm if math.isinf(self.radius) else f"{self.norm} {format_value(self.radius)}"

    def __str__(self) -> str:
        """Return robust and clean accuracy in a line, and each flag in another; tables count `accuracy`."""

        def said(found: Estimate) -> str:
            return f"{number(found.value, 'percent')} % [{interval(found, 'percent')}]"

        numbers = f"robust {said(self.robust)}, clean {said(self.clean)}, n = {self.robust.n}"
        head = f"{self.attack}, {self._threat}: {numbers}"
        return "\n".join([head, *(f"flag: {each}" for each in self.flags)])


class Loaded(nn.Module):
    """A fitted defense of a results folder, or any other, with its views and read-outs.

    Args:
        network: The defense itself: fitted, and an instance of a registered class.
        fitted_defense: The training that it comes from, and the settings at inference time.
    """

    def __init__(self, network: nn.Module, fitted_defense: FittedDefense) -> None:
        super().__init__()
        self.network = network
        self.inference = fitted_defense

    @property
    def entry(self) -> DefenseEntry:
        """What is registered of the defense."""
        entry = self.inference.train.defense.entry
        assert isinstance(entry, DefenseEntry)
        return entry

    @property
    def shape(self) -> Shape:
        """The form of one image, and the number of classes."""
        return self.inference.train.data.shape

    @property
    def views(self) -> tuple[str, ...]:
        """The names of the views that an attacker may look through."""
        return tuple(self.entry.views)

    @property
    def readouts(self) -> tuple[str, ...]:
        """The names of the answers that can be scored."""
        return self.entry.readouts

    def view(self, name: str, **params: Any) -> View:
        """Return a view.

        Args:
            name: The name of a view, or another name that the defense has for it.
            **params: The view's parameters.

        Raises:
            InputError: The defense has no such view, or the view has no such parameter.
        """
        found = self.entry.view(name)
        if found is None:
            names = {*self.entry.views, *self.entry.aliases}
            raise InputError(f"{self.entry.name} has no view {name!r}{did_you_mean(name, names)}")
        call = _Call(Path("a call"), {}, dict.fromkeys(_places({"tasks": [{"views": params}]}), 0))
        call.check(found.schema, params, "tasks", 0, "views")
        seen: View = getattr(self.network, found.method)(**bind(found, params))
        return seen

    def decide(self, x: Images, readout: str | None = None) -> Decision:
        """Return the defense's answers.

        Args:
            x: Images, float32 (N, C, H, W) in [0, 1], on the defense's device.
            readout: The answer to give; None: the first of `readouts`.

        Raises:
            InputError: The defense has no such read-out.
        """
        chosen = self.readouts[0] if readout is None else readout
        if chosen not in self.readouts:
            raise InputError(f"unknown read-out {chosen!r}{did_you_mean(chosen, self.readouts)}")
        decision: Decision = self.network.decide(x, chosen)  # type: ignore[operator]
        return decision

    def forward(self, x: Images) -> Tensor:
        """Return the logits (N, K) that the first read-out's label is read from, without a gradient.

        Args:
            x: Images, float32 (N, C, H, W) in [0, 1], on the defense's device.

        Raises:
            InputError: The read-out has no logits.
        """
        logits = self.decide(x).logits
        if logits is None:
            raise InputError(f"{self.entry.name}: read-out {self.readouts[0]!r} has no logits; use decide")
        return logits


def evaluate(  # noqa: PLR0913 - a call says all that a task file would
    model: nn.Module,
    x: Images | Split,
    y: Labels | None = None,
    *,
    attack: "str | Mapping[str, Any] | Attack" = "pgd",
    norm: Norm = "linf",
    radius: float | str | None = "8/255",
    view: str | Mapping[str, Any] | None = None,
    readout: str | None = None,
    targets: Literal["none", "next", "random"] | int = "none",
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    index: Tensor | None = None,
    seed: int = 0,
    batch: int = 500,
    progress: bool = False,
    **params: Any,
) -> Result:
    """Attack a network, judge what comes back, and ask the network about it.

    Rules, draws and referee are those of `bench run`: a defense that `bench.load` returned, attacked on a
    `Split` of the data set of its task file, gives that run's numbers. The network is asked in evaluation
    mode, on its own device, and left as it was: mode, weights, gradients and torch's settings. On a CPU one
    thread computes, so that sums do not depend on the machine. What does not fit in memory is computed in
    smaller chunks.

    Args:
        model: A map from images (N, C, H, W) to logits (N, K); or a fitted defense: what `bench.load`
            returned, or an instance of a registered class.
        x: Images, floating point (N, C, H, W) in [0, 1]; or a `Split`, which has its labels.
        y: Labels, whole numbers (N,) in [0, K); None where `x` is a `Split`.
        attack: The name of a registered attack; a mapping as in a task file, ``{"use": "pgd", "steps": 7}``;
            or a function ``(view, x, y, threat, noise)`` with keyword-only parameters.
        norm: The norm of the threat: ``linf``, ``l2``, ``l1`` or ``l0``.
        radius: The radius of the threat in [0, 1] units, above 0: a number or a fraction such as
            ``"8/255"``. None: as little as possible, for attacks that need none. An attack that moves as
            little as it can is read at the radius.
        view: The view that the attack looks through, by its name or as ``{"use": "bpda", "draws": 20}``.
            None where the defense offers one alone.
        readout: The answer that is scored. None where the defense has one alone.
        targets: ``none``: any wrong label; or the label to reach: ``next``, ``random``, or an offset from
            the true class in [1, K).
        mean: What is subtracted from images before the network sees them, in [0, 1]: one number or one for
            each channel. Only for a network that is no registered defense.
        std: What they are divided by then, above 0.
        index: The index of each example, whole numbers (N,): its draws depend on it. None: its position.
        seed: The seed of the draws, at least 0.
        batch: How many images an attack is given at once, at least 1.
        progress: Whether a bar shows how many images are done.
        **params: Parameters of the attack, such as ``steps=40``.

    Returns:
        The adversarial images, a row for each example, and the accuracies.

    Raises:
        InputError: What was given cannot be used; the sentence says what was found and what was expected.
    """
    discover()
    called, given = _named(attack)
    use = given | params | {"targets": [targets] if isinstance(targets, int) else targets}
    threat = {"norm": norm} if radius is None else {"norm": norm, "radius": radius}
    task = {"threat": threat, "views": [view], "readouts": [readout], "seeds": [seed]}
    call = _Call.of(called, use, task, batch)
    suite = call.check(SuiteModel, call.data)
    split = _split(x, y, index)
    with _as_found(model) as device:
        fitted = _fitted(model, split, device, mean, std)
        _check_labels(split, fitted.shape.classes)
        condition = _planned(call, suite, attack, fitted, split)
        with _bar(progress, len(split), called) as bar:
            done = _done(condition.job, fitted, split, device, bar)
    images = torch.cat(
        [
            shown_images(slice(shard.start, shard.stop), each, split)
            for shard, each in zip(condition.job.crafts, done.crafted, strict=True)
        ]
    )
    given_on = x.images.device if isinstance(x, Split) else x.device
    return _result(condition, done, images.to(given_on), suite.tasks[0].threat.radius[0])


# --- the call as a suite -----------------------------------------------------------------------------


class _Call(Document):
    """The arguments of a call, in the form of a suite; complaints name the argument."""

    @classmethod
    def of(cls, attack: str, use: Mapping[str, Any], task: Mapping[str, Any], batch: object) -> "_Call":
        """Write a suite with one task; what is None in it is not said."""
        said = {name: value for name, value in task.items() if value not in (None, [None])}
        data = {
            "data": {EXAMPLES: {"shard": batch}},
            "defenses": {MODEL: {"use": MODEL}},
            "attacks": {attack: dict(use)},
            "tasks": [{"data": EXAMPLES, "attacks": [attack], **said}],
        }
        return cls(Path("a call"), data, dict.fromkeys(_places(data), 0))

    def at(self, *place: str | int) -> str:
        """Return the argument that stands at a place of the suite."""
        match place:
            case ("attacks", _, "use") | ("attacks", _) | ("attacks", _, "planned"):
                return "attack"
            case ("attacks", _, *rest) | ("tasks", 0, "threat", *rest) if rest:
                named = dotted(tuple(rest))
                return "radius" if named.startswith("radius") else named
            case ("tasks", 0, "threat"):
                return "norm"
            case ("tasks", 0, "seeds", *_):
                return "seed"
            case ("tasks", 0, "views" | "readouts" as several, *rest):
                # There is one, so that its position says nothing.
                return dotted((str(several)[:-1], *(each for each in rest if each != 0)))
            case ("data", *_):
                return "batch"
            case _:
                return MODEL


def _places(value: object, place: Place = ()) -> Iterator[Place]:
    """Yield the place of everything that plain data holds."""
    yield place
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, each in inside:
        yield from _places(each, (*place, step))


def _named(attack: object) -> tuple[str, dict[str, Any]]:
    """Return what a call calls its attack, and the attack as a suite writes it."""
    if isinstance(attack, str):
        return attack, {"use": attack}
    if isinstance(attack, Mapping):
        if not isinstance(attack.get("use"), str):
            raise InputError(f"attack: expected a mapping such as {{'use': 'pgd'}}, found {dict(attack)}")
        return attack["use"], dict(attack)
    if callable(attack):
        name = getattr(attack, "__name__", type(attack).__name__)
        name = name if name.isidentifier() else "attack"
        return name, {"use": name}
    raise InputError(f"attack: expected a name, a mapping or a function, found {_kind(attack)}")


def _entry(function: Callable[..., Any], radius: float) -> AttackEntry:
    """Return a function as an attack: the registered one that it is, or one that nobody has registered."""
    for name in ATTACKS:
        if ATTACKS[name].make is function:
            return ATTACKS[name]
    try:
        inspect.signature(function).bind(*range(5))
    except TypeError as error:
        raise InputError(
            "attack: expected a function of (view, x, y, threat, noise) with keyword-only parameters: "
            f"{error}"
        ) from None
    return AttackEntry(
        name=_named(function)[0],
        make=function,
        version=1,
        norms=frozenset(get_args(Norm)),
        kind="fixed-budget" if math.isfinite(radius) else "minimum-norm",
    )


def _planned(
    call: _Call, model: SuiteModel, attack: object, fitted: Loaded, split: Split
) -> PlannedCondition:
    """Return the one condition of a call; raise where there is none, or a choice is left."""
    ((name, use),) = model.attacks.items()
    task = model.tasks[0]
    registry = {use.use: _entry(attack, task.threat.radius[0])} if callable(attack) else ATTACKS
    train = fitted.inference.train
    data = Data(_examples(call), split.digest, train.data.shape, len(split))
    suite = checked(
        Suite(
            document=call,
            model=model,
            data={EXAMPLES: data.spec},
            defenses={MODEL: train.defense},
            attacks={name: _attack(call, name, registry, use)},
            inference_settings={MODEL: (dict(fitted.inference.inference),)},
        )
    )
    plan = _Planner(suite, data, train).plan()
    if not plan.conditions:
        reasons = [skip.reason for skip in plan.skips]
        raise InputError(f"attack: {[*reasons, f'{name} can look through no view of this defense'][0]}")
    for coordinate in ("readout", "view"):
        names = sorted({str(condition.coordinates[coordinate]) for condition in plan.conditions})
        if len(names) > 1:
            raise InputError(f"{coordinate}: there are several, say which: {', '.join(names)}")
    if len(plan.conditions) > 1:
        raise InputError("targets: expected one target; call once for each offset")
    return plan.conditions[0]


def _examples(call: _Call) -> DataSpec:
    """Return what a plan must know of the examples: how many make a shard."""

    class Batch(BaseModel):
        shard: Annotated[Count, WHOLE]

    given = call.check(Batch, call.data["data"][EXAMPLES], "data", EXAMPLES)
    return DataSpec.model_construct(name=EXAMPLES, shard=given.shard)


def _attack(call: _Call, name: str, registry: Any, use: AttackUse) -> Resolved[AttackEntry]:
    """Return the attack of a call, its parameters filled in."""
    for word in ("planned", "source"):
        if getattr(use, word) is not None:
            raise InputError(f"{word}: is for task files; attack the source, and evaluate what comes back")
    return resolved(call, ("attacks", name), registry, use, Path.cwd())


class _Planner(Planner):
    """Crosses a call: its examples and its fitted defense are there already."""

    def __init__(self, suite: Suite, data: Data, train: Train) -> None:
        super().__init__(suite, None)
        self._given, self._trained = data, train

    def data(self, spec: DataSpec, where: str) -> Data:
        """Return the examples of the call."""
        return self._given

    def train(self, name: str, fit: Data, asked: Data, seed: int) -> Train:
        """Return the training of the defense that the call was given."""
        return self._trained


# --- what is attacked --------------------------------------------------------------------------------


def _fitted(model: nn.Module, split: Split, device: torch.device, mean: Any, std: Any) -> Loaded:
    """Return what a call attacks as a fitted defense; a network that is none becomes one."""
    form = tuple(split.images.shape[1:])
    if isinstance(model, Loaded):
        _no_normalisation(mean, std)
        if form != model.shape[:3]:
            raise InputError(f"x: expected images of shape {tuple(model.shape[:3])}, found {form}")
        return model
    few = split.images[:2].to(device)
    for entry in map(DEFENSES.__getitem__, DEFENSES):
        if entry.make is type(model):
            _no_normalisation(mean, std)
            with frozen(model, seed=0), torch.no_grad():
                logits = model.decide(few, entry.readouts[0]).logits  # type: ignore[operator]
            if logits is None:
                raise InputError(f"model: {entry.name} tells no logits, and so no number of classes")
            # With which parameters it was made, nobody can tell.
            unknown = replace(entry, flags=None, random=entry.random is not False)
            return _made(unknown, model, Shape(form[0], form[1], form[2], logits.shape[1]), split)
    network = Classifier(model, mean, std, form[0])
    # Not the whole module: the network may lie on several devices.
    network.mean, network.std = network.mean.to(device), network.std.to(device)
    with frozen(network, seed=0):
        classes = check_network(network, few, "model")
    declared: Any = Classifier.logits
    logits_view = ViewEntry(make=declared, version=1, method="logits", **declared.__view__)
    entry = DefenseEntry(
        name=MODEL,
        make=Classifier,
        version=1,
        readouts=("label",),
        views={"logits": logits_view},
        aliases={},
        inference=frozenset(),
        # It may draw, for all that anybody knows.
        random=True,
        learns=False,
        flags=None,
        check_params=None,
    )
    return _made(entry, network, Shape(form[0], form[1], form[2], classes), split)


def _made(entry: DefenseEntry, network: nn.Module, shape: Shape, split: Split) -> Loaded:
    """Return a network as if it had been fitted for a suite, under no parameters."""
    defense = Resolved(entry, {}, {"use": entry.name, "version": entry.version})
    data = Data(DataSpec.model_construct(name=EXAMPLES), TENSORS, shape, len(split))
    return Loaded(network, FittedDefense(Train(defense, data, 0)))


def _no_normalisation(mean: Any, std: Any) -> None:
    if (mean, std) != (0.0, 1.0):
        raise InputError("mean: a registered defense normalises for itself")


def _split(x: object, y: object, index: object) -> Split:
    """Return examples, checked, on the CPU."""
    if isinstance(x, Split):
        for name, given in (("y", y), ("index", index)):
            if given is not None:
                raise InputError(f"{name}: a Split has its own")
        return x
    if not isinstance(x, Tensor):
        raise InputError(f"x: expected a tensor of images (N, C, H, W), found {_kind(x)}")
    if x.dim() != 4 or not len(x):
        raise InputError(f"x: expected images (N, C, H, W), at least one, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"x: expected images of floating point in [0, 1], found {x.dtype}")
    images = x.detach().cpu().to(torch.float32)
    inside = (images >= 0) & (images <= 1)
    if not inside.all():
        first = (~inside).nonzero()[0].tolist()
        raise InputError(
            f"x: image {first[0]}: expected values in [0, 1], found {images[tuple(first)].item():g}"
        )
    labels = _whole("y", y, len(images))
    numbers = torch.arange(len(images)) if index is None else _whole("index", index, len(images))
    if len(numbers.unique()) < len(numbers):
        raise InputError("index: an example stands twice")
    return Split(images, labels, numbers, TENSORS)


def _whole(name: str, values: object, n: int) -> Tensor:
    """Return whole numbers (n,) as int64, on the CPU."""
    if not isinstance(values, Tensor):
        raise InputError(f"{name}: expected a tensor of whole numbers ({n},), found {_kind(values)}")
    wrong = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    if wrong or values.shape != (n,):
        raise InputError(f"{name}: expected whole numbers ({n},), found {values.dtype} {tuple(values.shape)}")
    return values.detach().cpu().long()


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _check_labels(split: Split, classes: int) -> None:
    wrong = ((split.labels < 0) | (split.labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise InputError(f"y: image {first}: expected a label below {classes}, found {split.labels[first]}")


# --- how it is done ----------------------------------------------------------------------------------


@contextmanager
def _as_found(model: object) -> Iterator[torch.device]:
    """Yield a network's device; compute with the harness's settings, and leave everything as it was found."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, found {_kind(model)}")
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    gradients = [(each, each.grad) for each in model.parameters()]
    try:
        with settings(device):
            yield device
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def settings(device: torch.device) -> Iterator[None]:
    """Compute with the harness's settings of torch in the block, and put the caller's back after it.

    Args:
        device: Where it is computed.
    """
    default = torch.get_default_device()
    before = [(setting, setting.read()) for setting in process_state.SETTINGS]
    try:
        torch.set_default_device(None)
        settle(device)
        yield
    finally:
        for setting, value in before:
            if setting.read() != value:
                setting.write(value)
        # None is not the same as the CPU: it costs nothing.
        torch.set_default_device(default if default.type != "cpu" else None)


class _Done(NamedTuple):
    """What an attack left of each shard, and the answers before and after it."""

    crafted: list[Mapping[str, Tensor]]
    invalid: Counter[str]
    clean: Any
    """A pyarrow table, as `outcomes.parquet` is one."""
    answers: Any


def _done(
    job: Evaluate, model: Loaded, split: Split, device: torch.device, bar: Callable[[int], object]
) -> _Done:
    """Attack each shard, and ask the defense about the clean and the moved images."""
    crafted: list[Mapping[str, Tensor]] = []
    invalid: Counter[str] = Counter()
    for shard in job.crafts:
        looked_at = model.network if shard.attack_run.source is not None else None
        tensors, facts = attacked(shard, looked_at, split, device)
        crafted.append(tensors)
        invalid.update(facts["invalid_because"])
        bar(shard.stop - shard.start)
    still = [unmoved(shard, split) for shard in job.crafts]
    clean, answers = (
        table_of(answers_to(job, each, model.network, split, device)) for each in (still, crafted)
    )
    return _Done(crafted, invalid, clean, answers)


@contextmanager
def _bar(shown: bool, n: int, title: str) -> Iterator[Callable[[int], object]]:
    """Show how many of `n` images are done, if at all; yield what is told of more."""
    if not shown:
        yield lambda more: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=n)
        yield lambda more: progress.advance(task, more)


def _result(condition: PlannedCondition, done: _Done, images: Images, radius: float) -> Result:
    """Return what was done as rows and numbers."""
    stored, clean = arrays(done.answers, _LATER), arrays(done.clean, _LATER)
    at_radius = condition.facts["kind"] == "minimum-norm" and math.isfinite(radius)
    rows = metrics.within(stored, clean, radius) if at_radius else stored
    frame = done.answers.to_pandas().drop(columns="parameters")
    before = done.clean.to_pandas()
    broken = ~(metrics.is_correct(rows) & metrics.is_correct(clean))
    added = {
        "clean_label": before["label"],
        "clean_rejected": before["rejected"],
        # Rows are in ascending order of the index.
        "broken": broken[np.searchsorted(rows["index"], frame["index"])],
    }
    for position, (name, values) in enumerate(added.items()):
        frame.insert(3 + position, name, values)
    point = Condition(condition.coordinates, Facts.read(condition.facts), condition.job.key)
    flags = [flag.message for flag in checks.cell_flags([Evidence(point, stored, rows, clean)])]
    reasons = [f"invalid moves: {void}, {reason}" for reason, void in sorted(done.invalid.items())]
    return Result(
        images=images,
        frame=frame,
        attack=condition.coordinates["attack"],
        norm=condition.coordinates["norm"],
        radius=radius,
        flags=(*flags, *reasons),
        _rows=rows,
        _clean=clean,
    )


_LATER = ("logits", "thresholds", "parameters")
"""Columns that some metrics read beside those that every table reads."""

"""An attack on a network in hand: no task file and no store; the rules, draws and referee of a suite.

A call is put into the form of a suite with one task (`bench.api.call`), so that it is checked, planned,
attacked and judged by the same code, and refused by the same sentences.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bench.api.call import Call, places, planned, written
from bench.api.given import (
    EXAMPLES,
    MODEL,
    TENSORS,
    check_labels,
    kind_of,
    no_normalisation,
    number_or_list,
    split_of,
)
from bench.console import count
from bench.data.spec import DataSpec
from bench.errors import InputError, did_you_mean
from bench.networks import Classifier, check_network
from bench.protocols import Decision, Images, Labels, Norm, Shape, Split, View
from bench.quantities import format_value
from bench.referee.answers import CHUNK, ROUNDING, moved
from bench.referee.freezing import frozen
from bench.referee.settings import Setting
from bench.registry import (
    DEFENSES,
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
from bench.runner.preflight import lacks_gradient, no_gradient
from bench.suite.jobs import Data, Evaluate, FittedDefense, Train
from bench.suite.planner import PlannedCondition
from bench.suite.resolve import Resolved
from bench.suite.schema import SuiteModel

if TYPE_CHECKING:
    import pandas as pd

    from bench.protocols import Attack


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
        call = Call(Path("a call"), {}, dict.fromkeys(places({"tasks": [{"views": params}]}), 0))
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
    targets: Literal["none", "next", "random"] | int | None = None,
    mean: float | str | Sequence[float | str] | Tensor = 0.0,
    std: float | str | Sequence[float | str] | Tensor = 1.0,
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
    smaller chunks. Torch's settings belong to the whole process: calls from several threads wait for each
    other, and other threads should compute nothing meanwhile.

    Args:
        model: A map from images (N, C, H, W) to logits (N, K); or a fitted defense: what `bench.load`
            returned, or an instance of a registered class.
        x: Images, floating point (N, C, H, W) in [0, 1]; or a `Split`, which has its labels.
        y: Labels, whole numbers (N,) in [0, K); None where `x` is a `Split`.
        attack: The name of a registered attack; a mapping as in a task file, ``{"use": "pgd", "steps": 7}``;
            or a function ``(view, x, y, threat, noise)`` with keyword-only parameters, which must have other
            names than the arguments of this call.
        norm: The norm of the threat: ``linf``, ``l2``, ``l1`` or ``l0``.
        radius: The radius of the threat in [0, 1] units, above 0: a number or a fraction such as
            ``"8/255"``. None: as little as possible, for attacks that need none. An attack that moves as
            little as it can is read at the radius.
        view: The view that the attack looks through, by its name or as ``{"use": "bpda", "draws": 20}``.
            None where the defense offers one alone.
        readout: The answer that is scored. None where the defense has one alone.
        targets: ``none``: any wrong label; or the label to reach: ``next``, ``random``, or an offset from
            the true class in [1, K). None: what the mapping says, else ``none``.
        mean: What is subtracted from images before the network sees them, in [0, 1]: one number or one for
            each channel, or fractions such as ``"128/255"``. Only for a network, and for no
            registered defense.
        std: What they are divided by then, above 0.
        index: The index of each example, whole numbers (N,): its draws depend on it. None: its position.
        seed: The seed of the draws, at least 0.
        batch: How many images an attack is given at once, at least 1. No draw depends on it. Logits and
            scores may differ in their last bits, since sums are computed in another order; where an attack
            drops what it has broken, passes may differ; and up to 32 images of each batch are asked again
            for ``differs``.
        progress: Whether a bar shows how many images are done.
        **params: Parameters of the attack, such as ``steps=40``.

    Returns:
        The adversarial images, a row for each example, and the accuracies.

    Raises:
        InputError: What was given cannot be used; the sentence says what was found and what was expected.
        OvertimeError: The attack took longer than its `time_limit`.
        RuntimeError: The attack changed the network.
    """
    discover()
    if targets is not None:
        params["targets"] = [targets] if isinstance(targets, int) else targets
    called, use = written(attack, params)
    threat = {"norm": norm} if radius is None else {"norm": norm, "radius": radius}
    task = {"threat": threat, "views": [view], "readouts": [readout], "seeds": [seed]}
    call = Call.of(called, use, task, batch)
    suite = call.check(SuiteModel, call.data)
    if len(suite.tasks[0].threat.radius) > 1:
        raise InputError("radius: expected one radius; call once for each")
    with _as_found(model) as device:
        split = split_of(x, y, index)
        fitted = _fitted(model, split, device, number_or_list("mean", mean), number_or_list("std", std))
        check_labels(split, fitted.shape.classes)
        condition = planned(call, suite, attack, fitted, split)
        _check_gradient(condition.job, fitted, split, device)
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


# --- what is attacked --------------------------------------------------------------------------------


def _fitted(model: nn.Module, split: Split, device: torch.device, mean: Any, std: Any) -> Loaded:
    """Return what a call attacks as a fitted defense; a network that is none becomes one."""
    form = tuple(split.images.shape[1:])
    if isinstance(model, Loaded):
        no_normalisation(mean, std)
        if form != model.shape[:3]:
            raise InputError(f"x: expected images of shape {tuple(model.shape[:3])}, found {form}")
        return model
    few = split.images[:2].to(device)
    for entry in map(DEFENSES.__getitem__, DEFENSES):
        if entry.make is type(model):
            no_normalisation(mean, std)
            with frozen(model, seed=0), torch.no_grad():
                logits, again = (model.decide(few, entry.readouts[0]).logits for _ in range(2))  # type: ignore[operator]
            if logits is None or again is None:
                raise InputError(f"model: {entry.name} tells no logits, and so no number of classes")
            # With which parameters it was made, nobody can tell.
            drawn = entry.random is not False and _differ(logits, again)
            unknown = replace(entry, flags=None, random=drawn)
            return _made(unknown, model, Shape(form[0], form[1], form[2], logits.shape[1]), split)
    network = _Network(model, mean, std, form[0])
    # Not the whole module: the network may lie on several devices.
    network.mean, network.std = network.mean.to(device), network.std.to(device)
    with frozen(network, seed=0):
        network.classes = classes = _classes(network, few)
        with torch.no_grad():
            drawn = _differ(network(few), network(few))
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
        random=drawn,
        learns=False,
        flags=None,
        check_params=None,
    )
    return _made(entry, network, Shape(form[0], form[1], form[2], classes), split)


class _Network(Classifier):
    """A network in hand, each of whose answers must have the form of the first."""

    classes: int | None = None

    def forward(self, x: Images) -> Tensor:
        """Return the network's logits (N, K) of images in [0, 1]."""
        logits: object = super().forward(x)
        if self.classes is None or (isinstance(logits, Tensor) and logits.shape == (len(x), self.classes)):
            return logits  # type: ignore[return-value] # `check_network` looks at the first.
        found = tuple(logits.shape) if isinstance(logits, Tensor) else kind_of(logits)
        raise InputError(
            f"model: expected logits of shape ({len(x)}, {self.classes}) for {len(x)} images, as at first, "
            f"found {found}"
        )


def _differ(logits: Tensor, again: Tensor) -> bool:
    """Return whether two answers (n, K) to the same images differ by more than rounding: they are drawn."""
    return bool((moved(logits, again) > ROUNDING).any())


def _classes(network: nn.Module, few: Images) -> int:
    """Return the number of classes of a network in hand, which may raise anything."""
    try:
        return check_network(network, few, "model")
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        form = tuple(few.shape[1:])
        raise InputError(f"model: the network does not take images of shape {form}: {reason}") from error


def _check_gradient(job: Evaluate, fitted: Loaded, split: Split, device: torch.device) -> None:
    """Refuse an attack by gradients on a network in hand whose logits have none."""
    attack, network = job.crafts[0].attack_run.attack, fitted.network
    if attack.entry.access != "gradient" or not isinstance(network, _Network):
        return
    with frozen(network, seed=0):
        reason = no_gradient(network, split.images[:2].to(device))
    if reason is not None:
        raise InputError(lacks_gradient("model", "logits", reason, attack.called))


def _made(entry: DefenseEntry, network: nn.Module, shape: Shape, split: Split) -> Loaded:
    """Return a network as if it had been fitted for a suite, under no parameters."""
    defense = Resolved(entry, {}, {"use": entry.name, "version": entry.version}, label=MODEL)
    data = Data(DataSpec.model_construct(name=EXAMPLES), TENSORS, shape, len(split))
    return Loaded(network, FittedDefense(Train(defense, data, 0)))


# --- how it is done ----------------------------------------------------------------------------------


_TURN = threading.RLock()
"""Held while the settings of torch are the harness's: they belong to the whole process."""


@contextmanager
def _as_found(model: object) -> Iterator[torch.device]:
    """Yield a network's device; compute with the harness's settings, and leave everything as it was found."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, found {kind_of(model)}")
    tensors = [*model.parameters(), *model.buffers()]
    device = next((each.device for each in tensors), torch.device("cpu"))
    if device.type not in CHUNK:
        raise InputError(f"model: expected a network on {' or '.join(CHUNK)}, found it on {device}")
    if any(each.is_inference() for each in tensors if not is_lazy(each)):
        raise InputError(
            "model: its weights were made under torch.inference_mode, so that nothing can be computed from "
            "them with gradients; make or copy the network outside it"
        )
    with settings(device):
        gradients = [(each, each.grad) for each in model.parameters()]
        try:
            yield device
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def settings(device: torch.device) -> Iterator[None]:
    """Compute with the harness's settings of torch in the block, and put the caller's back after it.

    One thread at a time is in such a block.

    Args:
        device: Where it is computed.
    """
    # On the CPU by itself, no such context costs nothing.
    elsewhere = torch.get_default_device().type != "cpu"
    unreadable = object()

    def read(setting: Setting) -> Any:
        # Torch's older names for what products are computed in raise where the newer ones say something else.
        try:
            return setting.read()
        except RuntimeError:
            return unreadable

    with _TURN, torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
        before = [(setting, read(setting)) for setting in process_state.SETTINGS]
        try:
            settle(device)
            yield
        finally:
            for setting, value in before:
                if value is not unreadable and read(setting) != value:
                    setting.write(value)


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
        if taken := sorted({f"note.{name}" for name in _ADDED} & tensors.keys()):
            raise InputError(
                f"attack: its {taken[0]} has the name of a column of the result; name it otherwise"
            )
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
    # Rows are in ascending order of the index.
    added = (before["label"], before["rejected"], broken[np.searchsorted(rows["index"], frame["index"])])
    for position, (name, values) in enumerate(zip(_ADDED, added, strict=True)):
        frame.insert(3 + position, name, values)
    point = Condition(condition.coordinates, Facts.read(condition.facts), condition.job.key)
    seen = [Evidence(point, stored, rows, clean)]
    flags = [flag.message for flag in (*checks.defense_flags(seen), *checks.cell_flags(seen))]
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


_ADDED = ("clean_label", "clean_rejected", "broken")
"""Columns of a result that a table has not."""

_LATER = ("logits", "thresholds", "parameters")
"""Columns that some metrics read beside those that every table reads."""

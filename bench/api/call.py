"""A call of `bench.evaluate` in the form of a suite with one task.

It is checked and planned by the code that reads task files, and refused by the same sentences.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel

from bench.api.given import EXAMPLES, MODEL, kind_of
from bench.data.spec import DataSpec
from bench.errors import InputError
from bench.protocols import Norm, Split
from bench.registry import ATTACKS, RESERVED, WHOLE, AttackEntry, Count
from bench.suite.jobs import Data, Train
from bench.suite.planner import PlannedCondition, Planner
from bench.suite.resolve import Resolved, Suite, checked, resolved
from bench.suite.schema import AttackUse, SuiteModel
from bench.suite.yaml_source import Document, Place, dotted

if TYPE_CHECKING:
    from bench.api.direct import Loaded


class Call(Document):
    """The arguments of a call, in the form of a suite; complaints name the argument."""

    @classmethod
    def of(cls, attack: str, use: Mapping[str, Any], task: Mapping[str, Any], batch: object) -> "Call":
        """Write a suite with one task; what is None in it is not said.

        Args:
            attack: What the call calls its attack.
            use: The attack as a suite writes it.
            task: The threat, the view, the read-out and the seed.
            batch: How many images make a shard.
        """
        said = {name: value for name, value in task.items() if value not in (None, [None])}
        data = {
            "data": {EXAMPLES: {"shard": batch}},
            "defenses": {MODEL: {"use": MODEL}},
            "attacks": {attack: dict(use)},
            "tasks": [{"data": EXAMPLES, "attacks": [attack], **said}],
        }
        return cls(Path("a call"), data, dict.fromkeys(places(data), 0))

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


def places(value: object, place: Place = ()) -> Iterator[Place]:
    """Yield the place of everything that plain data holds.

    Args:
        value: Plain data: mappings, lists and anything else.
        place: Where it stands itself.
    """
    yield place
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, each in inside:
        yield from places(each, (*place, step))


def written(attack: object, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what a call calls its attack, and the attack as a suite writes it.

    Args:
        attack: A name, a mapping with ``use``, or a function.
        params: What the call says of the attack beside it.

    Raises:
        InputError: The attack is none of these, or something is said twice.
    """
    if isinstance(attack, Mapping):
        if not isinstance(attack.get("use"), str):
            raise InputError(f"attack: expected a mapping such as {{'use': 'pgd'}}, found {dict(attack)}")
        called, given = attack["use"], dict(attack)
    elif isinstance(attack, str):
        called, given = attack, {"use": attack}
    elif callable(attack):
        called = _name(attack)
        given = {"use": called}
    else:
        raise InputError(f"attack: expected a name, a mapping or a function, found {kind_of(attack)}")
    if twice := sorted(given.keys() & params.keys()):
        raise InputError(f"{twice[0]}: said twice, by the attack and beside it")
    return called, {**given, **params}


def _name(attack: Callable[..., Any]) -> str:
    """Return what a function is called, or the class of another callable."""
    while isinstance(attack, functools.partial):
        attack = attack.func
    name = getattr(attack, "__name__", type(attack).__name__)
    return name if name.isidentifier() else "attack"


def _entry(function: Callable[..., Any], radius: float) -> AttackEntry:
    """Return a function as an attack: the registered one that it is, or one that nobody has registered."""
    for name in ATTACKS:
        if ATTACKS[name].make is function:
            return ATTACKS[name]
    try:
        signature = inspect.signature(function)
        signature.bind(*range(5))
    except (TypeError, ValueError) as error:
        raise InputError(
            "attack: expected a function of (view, x, y, threat, noise) with keyword-only parameters: "
            f"{error}"
        ) from None
    own = [name for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY]
    if taken := [name for name in own if name in _arguments() | RESERVED]:
        raise InputError(
            f"attack: {_name(function)}: a parameter {taken[0]!r} would never be given, since a call says "
            "something else by this name; name it otherwise"
        )
    return AttackEntry(
        name=_name(function),
        make=function,
        version=1,
        norms=frozenset(get_args(Norm)),
        kind="fixed-budget" if math.isfinite(radius) else "minimum-norm",
    )


def _arguments() -> set[str]:
    """Return the names of the arguments of `bench.evaluate`."""
    from bench.api.direct import evaluate

    found = inspect.signature(evaluate).parameters
    return {name for name, each in found.items() if each.kind is not each.VAR_KEYWORD}


def planned(
    call: Call, model: SuiteModel, attack: object, fitted: "Loaded", split: Split
) -> PlannedCondition:
    """Return the one condition of a call.

    Args:
        call: The call, as a suite.
        model: The same, checked.
        attack: The attack as it was given.
        fitted: The defense.
        split: The examples.

    Raises:
        InputError: There is none, or a choice is left.
    """
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


def _examples(call: Call) -> DataSpec:
    """Return what a plan must know of the examples: how many make a shard."""

    class Batch(BaseModel):
        shard: Annotated[Count, WHOLE]

    given = call.check(Batch, call.data["data"][EXAMPLES], "data", EXAMPLES)
    return DataSpec.model_construct(name=EXAMPLES, shard=given.shard)


def _attack(call: Call, name: str, registry: Any, use: AttackUse) -> Resolved[AttackEntry]:
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

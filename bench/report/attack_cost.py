"""What attacks cost: the passes that each image took, and the time, from stored outcomes and receipts.

Whatever a view computes counts as a pass, also a point of the latent space that is decoded and classified, or
an image that is inverted. Read-outs are asked about the same adversarial images, so they share their cost.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from bench.escaping import in_markdown, shown
from bench.quantities import DASH, format_value
from bench.report.render.markdown import pipes
from bench.report.render.records import csv_lines
from bench.report.render.text import printed
from bench.results import standing
from bench.results.conditions import Condition, conditions_of
from bench.results.outcomes import FrameOf

if TYPE_CHECKING:
    from rich.console import Group

Receipt: TypeAlias = Callable[[str], Mapping[str, Any] | None]
"""Gives the receipt of an evaluation by its job's key."""

AVERAGED = ("readout", "seed", "target")
"""Coordinates that a cost is averaged over."""


@dataclass(frozen=True)
class Cost:
    """What an attack on a defense cost, by image and target; seeds are averaged."""

    at: Mapping[str, Any]
    """The coordinates, without `AVERAGED`."""
    n: int
    """Number of attacked images; an image counts once for each target and seed."""
    forwards: float
    """Mean number of forward passes."""
    most: float
    """The most forward passes that one image took."""
    backwards: float
    """Mean number of backward passes."""
    seconds: float | None
    """Seconds of crafting by image, on `device`; None where a receipt does not say."""
    device: str
    """The devices on which it was crafted, separated by commas."""
    use: str | None = None
    """The registered name of the attack; None where it was run with others as one, on what stood."""


def spent(
    manifest: Mapping[str, Any],
    outcomes: FrameOf,
    receipt: Receipt,
    jobs: Collection[str] | None = None,
) -> list[Cost]:
    """Return what the attacks of a suite cost, by defense and attack.

    Args:
        manifest: The manifest of the suite.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
        receipt: Gives the receipt of an evaluation by its key, or None.
        jobs: The keys of the evaluations to look at; None for all.

    Returns:
        A cost for each attack that was run, data set by data set, the one with most forward passes first.
        What moves no image is left out.
    """
    groups: dict[str, dict[object, Condition]] = defaultdict(dict)
    for condition in conditions_of(manifest):
        if not condition.facts.idle and (jobs is None or condition.job in jobs):
            # One evaluation of each run of an attack: the others are asked about the same images.
            group = groups[json.dumps(_shared(condition), sort_keys=True)]
            member = condition.facts.member
            group.setdefault((condition.facts.attack_run, member and member.label), condition)
    found = [_cost(list(conditions.values()), outcomes, receipt) for conditions in groups.values()]
    order = {name: place for place, name in enumerate(manifest["data"])}
    return sorted(
        (each for each in found if each is not None),
        key=lambda each: (order[each.at["data"]], -each.forwards),
    )


def _shared(condition: Condition) -> dict[str, Any]:
    return {name: value for name, value in condition.coordinates.items() if name not in AVERAGED}


def _cost(conditions: Sequence[Condition], outcomes: FrameOf, receipt: Receipt) -> Cost | None:
    forwards, backwards, seconds, devices = [], [], [], []
    for condition in conditions:
        rows = outcomes(condition.job)
        member = condition.facts.member
        # What raised did not do what it would have cost.
        if rows is None or (member is not None and member.label in standing.raised(rows)):
            continue
        own = "" if member is None else f".{member.label}"
        forwards.append(np.asarray(rows[f"forwards{own}"], np.float64))
        backwards.append(np.asarray(rows[f"backwards{own}"], np.float64))
        crafting = (receipt(condition.job) or {}).get("crafting") or {}
        took = crafting.get("seconds")
        if member is not None and took is not None:
            # Of several attacks that were run as one: by its share of the passes.
            every = sum(float(np.asarray(rows[way], np.float64).sum()) for way in ("forwards", "backwards"))
            took *= float(forwards[-1].sum() + backwards[-1].sum()) / max(every, 1)
        seconds.append(took)
        devices += crafting.get("devices", [])
    if not forwards:
        return None
    n = sum(map(len, forwards))
    known = [each for each in seconds if each is not None]
    return Cost(
        at=_shared(conditions[0]),
        n=n,
        forwards=float(np.concatenate(forwards).mean()),
        most=float(np.concatenate(forwards).max()),
        backwards=float(np.concatenate(backwards).mean()),
        seconds=sum(known) / n if len(known) == len(seconds) else None,
        device=", ".join(dict.fromkeys(devices)),
        use=conditions[0].facts.use if conditions[0].facts.member is None else None,
    )


QUICK, WHOLE = "fast-worst", "autoattack"
"""An attack that shall come to the verdict of another one at a fraction of its passes."""


def fractions(costs: Sequence[Cost]) -> list[str]:
    """Return how many of the passes of `WHOLE` the attack `QUICK` made, where both saw the same images.

    Args:
        costs: The costs.

    Returns:
        A sentence for each pair.
    """
    found = []
    for quick in (each for each in costs if each.use == QUICK):
        for whole in (each for each in costs if each.use == WHOLE):
            if quick.n == whole.n and {**quick.at, "attack": None} == {**whole.at, "attack": None}:
                ways = (
                    ("forward", quick.forwards, whole.forwards),
                    ("backward", quick.backwards, whole.backwards),
                )
                shares = [f"{100 * some / every:.1f} % of the {way}" for way, some, every in ways if every]
                data, guard, attack, view, *_ = _line(quick)
                seen = ", ".join(filter(None, (data, view)))
                found.append(
                    f"{attack} on {guard} ({seen}): {' and '.join(shares)} passes of {whole.at['attack']}."
                )
    return found


# --- how it is written ---------------------------------------------------------------------------------

_SAYS = "Passes by image and target, the mean over n; s: seconds of crafting by image, on one slot."


def written(costs: Sequence[Cost], form: Literal["text", "markdown", "csv", "json"]) -> str:
    """Write costs as one text.

    Args:
        costs: The costs, in the order in which they are written.
        form: The format.

    Returns:
        The text, with a line end at its end.
    """
    match form:
        case "text":
            return printed(text(costs))
        case "json":
            return json.dumps([_record(each) for each in costs], indent=1) + "\n"
        case "csv":
            return csv_lines([_record(each) for each in costs])
        case "markdown":
            table = pipes(_HEADS, 4, ([*map(in_markdown, _line(each))] for each in costs))
            return "\n".join([table, "", " ".join([_SAYS, *map(in_markdown, _notes(costs))]), ""])


def text(costs: Sequence[Cost]) -> "Group":
    """Return what rich prints on a terminal of 80 columns: a table for each data set.

    Args:
        costs: The costs, in the order in which they are printed.

    Returns:
        The tables with a line of explanation.
    """
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[Padding | Table | Text] = []
    for data in dict.fromkeys(each.at["data"] for each in costs):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for position, heading in enumerate(_HEADS[1:]):
            table.add_column(heading, justify="left" if position < 3 else "right", overflow="fold")
        for cost in costs:
            if cost.at["data"] == data:
                table.add_row(*(Text(shown(each)) for each in _line(cost)[1:]))
        parts += [Padding(Text(shown(data), style="bold"), (1, 0, 1, 0)), table]
    return Group(*parts, Text(" ".join([_SAYS, *map(shown, _notes(costs))]), style="dim"))


_HEADS = ("data", "defense", "attack", "view", "n", "forward", "backward", "s")


def _line(cost: Cost) -> list[str]:
    at = cost.at
    settings = ", ".join(
        f"{name.removeprefix('inference.')} {format_value(value)}"
        for name, value in at.items()
        if name.startswith("inference.")
    )
    radius = "" if at["radius"] is None else f" {at['norm']} {format_value(at['radius'])}"
    return [
        at["data"],
        at["defense"] + (f" ({settings})" if settings else ""),
        at["attack"] + radius,
        at["view"] or "",
        str(cost.n),
        *(_count(each) for each in (cost.forwards, cost.backwards)),
        DASH if cost.seconds is None else f"{cost.seconds:.2g}",
    ]


def _count(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 100 or passes == round(passes) else f"{passes:.1f}"


def _record(cost: Cost) -> dict[str, Any]:
    """Return a cost with its coordinates as fields of one level."""
    return {**cost.at, **{name: value for name, value in asdict(cost).items() if name not in ("at", "use")}}


def _notes(costs: Sequence[Cost]) -> list[str]:
    devices = dict.fromkeys(each.device for each in costs if each.device)
    return [*fractions(costs), *([f"Crafted on: {'; '.join(devices)}."] if devices else [])]

"""What attacks cost: the passes that each image took, and the time, from what is stored.

A point of the latent space that is drawn and classified, or an image that is inverted, is a pass as well:
whatever a view was asked for. Read-outs share what was crafted, so that they share its cost.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from bench.escaping import in_csv, in_markdown, shown
from bench.layout import COORDINATES
from bench.outcomes import Frame
from bench.quantities import DASH, spell

if TYPE_CHECKING:
    from rich.console import Group

Receipt: TypeAlias = Callable[[str], Mapping[str, Any] | None]
"""Gives the receipt of an evaluation by its job's key."""

SHARED = ("readout", "seed", "target")
"""Coordinates that a cost is averaged over: read-outs are asked about the same images."""


@dataclass(frozen=True)
class Cost:
    """What an attack on a defense took, by image and target; seeds are averaged."""

    at: Mapping[str, Any]
    """The coordinates, but for read-out, seed and target."""
    n: int
    """Attacked images, each target and seed counted."""
    forwards: float
    """Mean number of forward passes."""
    most: float
    """The most that one image took."""
    backwards: float
    """Mean number of backward passes."""
    seconds: float | None
    """Seconds of crafting by image, on `device`; None where no receipt says."""
    device: str
    """Where it was crafted; several, if it was several."""


def spent(
    manifest: Mapping[str, Any],
    outcomes: Callable[[str], Frame | None],
    receipt: Receipt,
    jobs: Collection[str] | None = None,
) -> list[Cost]:
    """Return the costs of a manifest's cells in its order, or of those that `jobs` name; the dearest in
    forward passes comes first within a data set. What was not run is left out, and so is doing nothing.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for cell in manifest["cells"]:
        if cell["access"] != "none" and (jobs is None or cell["job"] in jobs):
            at = {name: value for name, value in _coordinates(cell).items() if name not in SHARED}
            # One evaluation of each attempt: the others are asked about the same images.
            # A manifest of an older version does not name it.
            attempt = cell.get("attempt") or f"{cell['seed']}, {cell['target']}"
            groups[json.dumps(at, sort_keys=True)].setdefault(attempt, cell)
    found = [_cost(list(cells.values()), outcomes, receipt) for cells in groups.values()]
    order = {name: place for place, name in enumerate(manifest["data"])}
    return sorted(
        (each for each in found if each is not None),
        key=lambda each: (order[each.at["data"]], -each.forwards),
    )


def _coordinates(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name in COORDINATES or name.startswith("serve.")}


def _cost(
    cells: Sequence[Mapping[str, Any]], outcomes: Callable[[str], Frame | None], receipt: Receipt
) -> Cost | None:
    forwards, backwards, seconds, devices = [], [], [], []
    for cell in cells:
        rows = outcomes(cell["job"])
        if rows is None:
            continue
        forwards.append(np.asarray(rows["forwards"], np.float64))
        backwards.append(np.asarray(rows["backwards"], np.float64))
        crafting = (receipt(cell["job"]) or {}).get("crafting") or {}
        seconds.append(crafting.get("seconds"))
        devices += crafting.get("devices", [])
    if not forwards:
        return None
    n = sum(map(len, forwards))
    known = [each for each in seconds if each is not None]
    at = {name: value for name, value in _coordinates(cells[0]).items() if name not in SHARED}
    return Cost(
        at=at,
        n=n,
        forwards=float(np.concatenate(forwards).mean()),
        most=float(np.concatenate(forwards).max()),
        backwards=float(np.concatenate(backwards).mean()),
        seconds=sum(known) / n if len(known) == len(seconds) else None,
        device=", ".join(dict.fromkeys(devices)),
    )


# --- how it is written ---------------------------------------------------------------------------------

_SAYS = "Passes by image and target, the mean over n; s: seconds of crafting by image, on one slot."


def written(costs: Sequence[Cost], form: Literal["text", "markdown", "csv", "json"]) -> str:
    """Return costs as one text."""
    match form:
        case "text":
            from rich.console import Console

            plain = StringIO()
            Console(file=plain, width=80, color_system=None, highlight=False).print(text(costs))
            return plain.getvalue()
        case "json":
            return json.dumps([{**each.at, **_facts(each)} for each in costs], indent=1) + "\n"
        case "csv":
            out = StringIO()
            names = list(dict.fromkeys(name for each in costs for name in (*each.at, *_facts(each))))
            writer = csv.DictWriter(out, fieldnames=names, lineterminator="\n")
            writer.writeheader()
            facts = ({**each.at, **_facts(each)} for each in costs)
            writer.writerows({name: in_csv(value) for name, value in each.items()} for each in facts)
            return out.getvalue()
        case "markdown":
            heads, rule = _HEADS, [":--"] * 4 + ["--:"] * (len(_HEADS) - 4)
            cells = (map(in_markdown, _line(each)) for each in costs)
            rows = [f"| {' | '.join(line)} |" for line in (heads, rule, *cells)]
            return "\n".join([*rows, "", " ".join([_SAYS, *map(in_markdown, _devices(costs))]), ""])


def text(costs: Sequence[Cost]) -> "Group":
    """Return what rich prints on a terminal of 80 columns: a table for each data set."""
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
    return Group(*parts, Text(" ".join([_SAYS, *map(shown, _devices(costs))]), style="dim"))


_HEADS = ("data", "defense", "attack", "view", "n", "forward", "backward", "s")


def _line(cost: Cost) -> list[str]:
    at = cost.at
    served = ", ".join(
        f"{name.removeprefix('serve.')} {spell(value)}" for name, value in at.items() if name[:6] == "serve."
    )
    radius = "" if at["radius"] is None else f" {at['norm']} {spell(at['radius'])}"
    return [
        at["data"],
        at["defense"] + (f" ({served})" if served else ""),
        at["attack"] + radius,
        at["view"] or "",
        str(cost.n),
        *(_count(each) for each in (cost.forwards, cost.backwards)),
        DASH if cost.seconds is None else f"{cost.seconds:.2g}",
    ]


def _count(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 100 or passes == round(passes) else f"{passes:.1f}"


def _facts(cost: Cost) -> dict[str, Any]:
    return {name: value for name, value in asdict(cost).items() if name != "at"}


def _devices(costs: Iterable[Cost]) -> list[str]:
    devices = dict.fromkeys(each.device for each in costs if each.device)
    return [f"Crafted on: {'; '.join(devices)}."] if devices else []

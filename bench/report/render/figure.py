"""Figures: the curves of a table whose rows or columns run along an axis, and the bars of any other."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from bench.errors import InputError
from bench.escaping import shown
from bench.quantities import DASH, format_value
from bench.report.checks import worst_level
from bench.report.published import Quote
from bench.report.render import words
from bench.report.tables import RenderedRow, RenderedTable, TableCell, position
from bench.results.metrics import CONFIDENCE, Unit
from bench.suite.tables import Figure

if TYPE_CHECKING:
    from matplotlib import figure
    from matplotlib.axes import Axes

_NORMS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$", "l0": r"$\ell_0$"}


def draw(table: RenderedTable, path: Path) -> None:
    """Write the curves of a table into a file, with the intervals as bands.

    Args:
        table: A table that names a figure.
        path: The file; its suffix is the format: svg, png or pdf. The same numbers give the same file.

    Raises:
        InputError: The table names no figure, or the file cannot be written in its format.
    """
    save(lambda: drawn(table), path, path.suffix.removeprefix("."))


def save(make: Callable[[], "figure.Figure"], path: Path, form: str) -> None:
    """Write a figure into a file; the same figure gives the same file.

    Args:
        make: Draws the figure.
        path: The file.
        form: Its format: svg, png or pdf.

    Raises:
        InputError: The file cannot be written, or not in this format.
    """
    with _deterministic():
        page = make()
        try:
            page.savefig(path, dpi=200, format=form, metadata=_TIMELESS.get(form))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be drawn: {error}") from None


_TIMELESS: Mapping[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""What keeps the time out of a file, by its format."""


def _deterministic() -> Any:
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "crossfire", "svg.fonttype": "none"})


def drawn(table: RenderedTable) -> "figure.Figure":
    """Draw the curves of a table, with the intervals as bands.

    Args:
        table: A table that names a figure.

    Returns:
        The figure, which no window shows.

    Raises:
        InputError: The table names no figure.
    """
    from matplotlib import figure

    said = table.table.figure
    if said is None:
        raise InputError(f"table {table.key!r} names no figure: figure: {{x: radius}} makes it one")
    page = figure.Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = page.subplots()
    table = words.inherited(table)
    for curve, style in zip(_curves(table), styles(), strict=False):
        _draw(axes, curve, style)
    _label(axes, table, said)
    _ticks(axes, table, said.x)
    cells = [cell for curve in _curves(table) for _, cell in curve.points]
    below = "\n".join(filter(None, [_caption(table, cells), _doubts("open marks", cells)]))
    page.supxlabel(below, fontsize="x-small", parse_math=False)
    return page


MOST_TICKS = 9
"""Values at a horizontal axis that are written out; of more, matplotlib chooses."""


def _ticks(axes: "Axes", table: RenderedTable, x: str) -> None:
    """Write the values of the horizontal axis as task files do: 8/255."""
    xs = sorted({place for curve in _curves(table) for place, _ in curve.points})
    if 0 < len(xs) <= MOST_TICKS:
        axes.set_xticks(xs, [format_value(each) for each in xs], parse_math=False, fontsize="small")
        axes.minorticks_off()
    if x == "radius":
        axes.set_xlim(left=0)


def _caption(table: RenderedTable, cells: Sequence[TableCell]) -> str:
    """Return what is asked, by which attack, and on how many examples."""
    ns = sorted({cell.estimate.n for cell in cells if cell.estimate is not None})
    n = DASH.join(map(str, dict.fromkeys((ns[0], ns[-1])))) if ns else ""
    figure = table.table.figure
    asked = {**words.pinned(table), **({"n": n} if n else {})}
    said = ", ".join(f"{name} {value}" for name, value in asked.items() if figure is None or name != figure.x)
    band = any(cell.estimate is not None and cell.estimate.low is not None for cell in cells)
    more = f"; bands: {100 * CONFIDENCE:.0f} % intervals of one seed" if band else ""
    return "\n".join(wrap(shown(said + more), 90))


def _doubted(cell: TableCell) -> bool:
    return cell.estimate is not None and worst_level(cell.flags) in ("doubt", "alarm")


def _doubts(what: str, cells: Sequence[TableCell]) -> str:
    """Say which flags are doubts or alarms; nothing where none is. Notes stand below the table alone."""
    graver = [flag for cell in cells if _doubted(cell) for flag in cell.flags if flag.level != "note"]
    named = ", ".join(dict.fromkeys(f"{each.level} {each.code}" for each in graver))
    return "\n".join(wrap(f"{what}: {named}", 80)) if graver else ""


def _label(axes: "Axes", table: RenderedTable, said: Figure) -> None:
    """Add title, axis labels and legend, none of which is read as mathematics unless it is our own."""
    axes.set_title("\n".join(wrap(shown(table.table.title), 60)), fontsize="medium", parse_math=False)
    axes.set_xlabel(said.xlabel or _axis_label(table, said.x), parse_math=said.xlabel is None)
    unit = table.metric.unit
    axes.set_ylabel(said.ylabel or table.metric.name + words.LABELS.get(unit, ""), parse_math=False)
    if unit == "percent":
        axes.set_ylim(0, 100)
    axes.grid(alpha=0.25, linewidth=0.5)
    # Of matplotlib's own making, a legend would leave out names that begin with _.
    lines = axes.get_lines()
    legend = axes.legend(lines, ["curve"] * len(lines), fontsize="small", frameon=False)
    for line, label in zip(lines, legend.get_texts(), strict=True):
        label.set(text=shown(str(line.get_label())), parse_math=False)


@dataclass(frozen=True)
class _Curve:
    name: str
    points: tuple[tuple[float, TableCell], ...]
    quotes: tuple[tuple[float, Quote], ...]
    scale: float


def _curves(table: RenderedTable) -> list[_Curve]:
    """Return a curve for each row where x runs over columns, else one for each column."""
    assert table.table.figure is not None
    at = partial(position, x=table.table.figure.x)
    found: list[_Curve] = []
    if any(at(each) is not None for each in table.at):
        places = [(x, column) for column, each in enumerate(table.at) if (x := at(each)) is not None]
        for row in table.rows:
            points = [*_unmoved(table, row), *((x, row.cells[column]) for x, column in places)]
            quotes = [(x, row.published[column]) for x, column in places] if row.published else []
            found.append(_curve(", ".join(row.label), points, quotes, table.metric.unit))
        return found
    lines: list[tuple[float, RenderedRow]] = [(x, row) for row in table.rows if (x := at(row.at)) is not None]
    others = [place for place, head in enumerate(table.heads) if head != table.table.figure.x]
    names = dict.fromkeys(tuple(row.label[place] for place in others) for _, row in lines)
    for name in names:
        own = [(x, row) for x, row in lines if tuple(row.label[place] for place in others) == name]
        for column, heading in enumerate(table.columns):
            points = [*_unmoved(table, own[0][1]), *((x, row.cells[column]) for x, row in own)]
            quotes = [(x, row.published[column]) for x, row in own if row.published]
            found.append(_curve(", ".join((*name, heading)), points, quotes, table.units[column]))
    return found


def _unmoved(table: RenderedTable, row: RenderedRow) -> list[tuple[float, TableCell]]:
    """Return the point of a curve over radii at radius 0: the clean images, where they are known."""
    over_radii = table.table.figure is not None and table.table.figure.x == "radius"
    return [(0.0, row.unmoved)] if over_radii and row.unmoved is not None else []


def _curve(
    name: str,
    points: Sequence[tuple[float, TableCell]],
    quotes: Sequence[tuple[float, Quote | None]],
    unit: Unit,
) -> _Curve:
    kept = tuple((x, quote) for x, quote in quotes if quote is not None)
    ordered = tuple(sorted(points, key=lambda point: point[0]))
    return _Curve(name, ordered, kept, words.SCALES[unit])


def styles() -> Iterator[Mapping[str, Any]]:
    """Yield colours that colour-blind readers can tell apart (Okabe and Ito), with markers of their own."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for repeat, line in enumerate(("-", "--", ":", "-.")):
        for place, colour in enumerate(colours):
            yield {"color": colour, "linestyle": line, "marker": "osD^vPX"[(place + repeat) % 7]}


def _draw(axes: "Axes", curve: _Curve, style: Mapping[str, Any]) -> None:
    """Draw a curve and its band; a hole breaks both."""
    xs = [x for x, _ in curve.points]

    def heights(name: str) -> list[float]:
        known = [None if cell.estimate is None else getattr(cell.estimate, name) for _, cell in curve.points]
        return [math.nan if each is None else curve.scale * float(each) for each in known]

    axes.plot(xs, heights("value"), label=curve.name, markersize=4, linewidth=1.4, **style)
    at = [place for place, (_, cell) in enumerate(curve.points) if _doubted(cell)]
    if at:
        values = heights("value")
        axes.scatter(
            [xs[each] for each in at], [values[each] for each in at],
            s=16, marker=style["marker"], facecolors="white", edgecolors=style["color"], zorder=3,
        )  # fmt: skip
    axes.fill_between(xs, heights("low"), heights("high"), color=style["color"], alpha=0.15, linewidth=0)
    if curve.quotes:
        axes.plot(
            [x for x, _ in curve.quotes],
            [quote.value for _, quote in curve.quotes],
            label=f"{curve.name}, published",
            color=style["color"],
            linestyle="none",
            marker="x",
        )


def _axis_label(table: RenderedTable, x: str) -> str:
    if x == "radius":
        return f"{_NORMS.get(table.question.get('norm', ''), '')} radius".strip()
    return x.rpartition(".")[2]


def bars(table: RenderedTable) -> "figure.Figure":
    """Draw a bar for each number of a table: a group for each column, a colour for each row.

    Args:
        table: A table. Numbers of another unit have axes of their own; intervals are lines on the bars.

    Returns:
        The figure, which no window shows.
    """
    from matplotlib import figure
    from matplotlib.container import BarContainer

    units = list(dict.fromkeys(table.units))
    page = figure.Figure(figsize=(5.2 * len(units), 3.6), layout="constrained")
    for unit, axes in zip(units, page.subplots(1, len(units), squeeze=False)[0], strict=True):
        places = [place for place, each in enumerate(table.units) if each == unit]
        for nth, (row, style) in enumerate(zip(table.rows, styles(), strict=False)):
            _group(axes, [row.cells[place] for place in places], unit, (nth, len(table.rows)), style["color"])
        axes.set_xticks(range(len(places)), [shown(table.columns[each]) for each in places], parse_math=False)
        axes.set_ylabel(table.metric.name + words.LABELS.get(unit, ""), parse_math=False)
        if unit == "percent":
            axes.set_ylim(0, 100)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    page.suptitle("\n".join(wrap(shown(table.table.title), 60)), fontsize="medium", parse_math=False)
    doubts = _doubts("hatched", [cell for row in table.rows for cell in row.cells])
    page.axes[0].set_xlabel(doubts, fontsize="x-small")
    handles: Any = [each for each in page.axes[0].containers if isinstance(each, BarContainer)]
    place: Any = "outside lower center"
    legend = page.legend(handles, ["row"] * len(handles), fontsize="small", frameon=False, loc=place)
    for text, row in zip(legend.get_texts(), table.rows, strict=False):
        text.set(text=shown(", ".join(row.label)), parse_math=False)
    return page


def _group(axes: "Axes", cells: Sequence[TableCell], unit: Unit, place: tuple[int, int], colour: str) -> None:
    """Draw the bars of one row, the `place[0]`-th of `place[1]`."""
    scale, width = words.SCALES[unit], 0.8 / place[1]
    found = [(at, cell.estimate) for at, cell in enumerate(cells) if cell.estimate is not None]
    kept = [(at, each) for at, each in found if math.isfinite(each.value)]
    heights = [scale * each.value for _, each in kept]

    def reach(end: float | None, value: float) -> float:
        return 0.0 if end is None or not math.isfinite(end) else scale * abs(end - value)

    ends = [
        [reach(each.low, each.value) for _, each in kept],
        [reach(each.high, each.value) for _, each in kept],
    ]
    middles = [at + (place[0] + 0.5) * width - 0.4 for at, _ in kept]
    hatches = ["///" if _doubted(cells[at]) else "" for at, _ in kept]
    axes.bar(middles, heights, width, color=colour, hatch=hatches, edgecolor="white", linewidth=0)
    axes.errorbar(middles, heights, ends, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)

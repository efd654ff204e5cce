"""Squares to text, markdown, CSV, LaTeX, JSON and figures. No number is made here."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from csv import DictWriter
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from json import dumps
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from bench.checks import Flag
from bench.escaping import in_csv, in_markdown, shown
from bench.metrics import CONFIDENCE, Estimate
from bench.quantities import DASH
from bench.tables import Grid, Quote, Row, Square, position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group
    from rich.text import Text

PLUS_MINUS = "±"
MINUS = "\N{MINUS SIGN}"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_NORMS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$", "l0": r"$\ell_0$"}


# --- numbers -----------------------------------------------------------------------------------------


_SCALES: Mapping[str, float] = {"percent": 100, "distance": 1, "number": 1, "millions": 1e-6}
_LABELS: Mapping[str, str] = {"percent": " (%)", "millions": " (millions)"}
_FORMS: Mapping[str, str] = {"percent": ".1f", "distance": ".3g", "number": ".1f", "millions": ".2f"}


def number(value: float, unit: str) -> str:
    """Write a proportion in percent with one decimal, a distance with three digits, a logit with one."""
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return f"{_SCALES[unit] * value:{_FORMS[unit]}}".replace("-", MINUS)


def interval(estimate: Estimate, unit: str, *, short: bool = False) -> str:
    """Write an interval, if there is one; a short one in whole percent, rounded outwards."""
    if estimate.low is None or estimate.high is None:
        return ""
    if short and unit == "percent":
        # Rounding first: 0.29 * 100 is a little below 29.
        low, high = round(100 * estimate.low, 6), round(100 * estimate.high, 6)
        return f"{math.floor(low)}{DASH}{math.ceil(high)}"
    # Between numbers that may be negative a dash would be read as a sign.
    between = " to " if unit == "number" else DASH
    return f"{number(estimate.low, unit)}{between}{number(estimate.high, unit)}"


def quoted(quote: Quote, unit: str) -> tuple[str, str]:
    """Write a published number and its spread, as they were printed."""
    form = _FORMS["number"] if unit == "number" else ".2f"
    value = f"{quote.value:{form}}".replace("-", MINUS)
    return value, "" if quote.std is None else f"{PLUS_MINUS}{quote.std:{form}}"


def _quotes(grid: Grid, row: Row) -> Iterable[list[str]]:
    """Yield a paper's numbers in the row's columns with their spreads; empty where it has none."""
    for quote, unit in zip(row.published, grid.units, strict=True):
        yield [] if quote is None else list(filter(None, quoted(quote, unit)))


# --- what every form says ----------------------------------------------------------------------------


@dataclass
class Footnotes:
    """Sentences below a table, each once, with the marks that point at them."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> int:
        """Return the number of a sentence."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def marks(self, square: Square) -> list[int]:
        """Return the numbers of all that is to be said about a square."""
        return [self.mark(each) for each in (*square.notes, *map(sentence, square.flags))]


def sentence(flag: Flag) -> str:
    """Write a doubt with its code, under which `docs/flags.md` gives advice."""
    return f"{flag.code}: {flag.message}"


def raised(marks: Iterable[int]) -> str:
    """Write footnote marks as superscripts."""
    return "\N{MIDDLE DOT}".join(str(each) for each in marks).translate(_RAISED)


def caption(grid: Grid, intervals: str | None = "in brackets") -> list[str]:
    """Say what the numbers count, over what, where the intervals stand, and what the extra columns are."""
    question = ", ".join(f"{name} {value}" for name, value in grid.question.items())
    counted = f"{grid.metric.name}{_LABELS.get(grid.metric.unit, '')}: {grid.metric.says}"
    spread = f"mean {PLUS_MINUS} standard deviation over {grid.seeds} seeds"
    over = spread if grid.seeds > 1 else "one seed" if grid.seeds else "nothing was run yet"
    known = any(each.estimate is not None and each.estimate.low is not None for each in _squares(grid))
    if intervals is not None and known:
        kind = "Wilson " if grid.metric.summary == "share" else ""
        over += f"; {intervals} the {100 * CONFIDENCE:.0f} % {kind}interval of the n examples of one seed"
    said = [*filter(None, [question]), counted, over]
    for heading in grid.table.extra:
        if heading == "Worst":
            said.append(
                "Worst: the worst of all attack columns example by example, within each seed, "
                "on the examples that all saw"
            )
        else:
            superlative = "least" if heading == "Min" else "greatest"
            said.append(f"{heading}: the {superlative} of the attack columns, after averaging over seeds")
    if any(square.weakest for row in grid.rows for square in row.squares):
        said.append("bold: the attack column that is worst for the defender")
    if any(square.bound for row in grid.rows for square in row.squares):
        said.append("≤, ≥: attacks are missing, which could only make it worse")
    if grid.void:
        said.append(f"{grid.void} void moves in the whole table")
    return [f"{each[0].upper()}{each[1:]}." for each in said]


def _squares(grid: Grid) -> Iterable[Square]:
    return (square for row in grid.rows for square in row.squares)


def doubts(grid: Grid) -> list[str]:
    """Say what is doubtful about the table as a whole."""
    return [f"{sentence(flag)}." for flag in grid.flags]


def published(grid: Grid) -> list[str]:
    """Say where the numbers beside ours come from, and what is known to be different."""
    comparison = grid.table.published
    if comparison is None or not any(row.published for row in grid.rows):
        return []
    differences = [f"Known difference: {each.rstrip('.')}." for each in comparison.differences]
    return [f"Published: {grid.source}.", *differences]


def counts(grid: Grid) -> list[str]:
    """Return n for each column: one number, or the span over rows."""
    found = []
    for column in range(len(grid.columns)):
        squares = [row.squares[column] for row in grid.rows]
        values = sorted({square.estimate.n for square in squares if square.estimate is not None})
        found.append(DASH.join(map(str, dict.fromkeys((values[0], values[-1])))) if values else "")
    return found


def _heads(grid: Grid) -> list[str]:
    return [name.rpartition(".")[2] for name in grid.heads]


# --- the terminal ------------------------------------------------------------------------------------


def text(grid: Grid) -> "Group":
    """Return what rich prints on a terminal: 80 columns hold a table of eight."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    notes = Footnotes()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    # Labels go below each other, as the lines of a square do: that leaves room for columns.
    table.add_column(_narrow(_heads(grid), 9))
    for heading in grid.columns:
        table.add_column(_narrow([heading], 8), justify="right")

    def square_text(square: Square, unit: str) -> Text:
        marks = raised(notes.marks(square))
        if square.estimate is None:
            return Text.assemble((square.hole, "dim"), marks)
        value = f"{square.bound}{number(square.estimate.value, unit)}"
        parts = [(value, "bold" if square.weakest else ""), (marks, "yellow" if square.flags else "")]
        if square.estimate.std is not None:
            parts.append((f"\n{PLUS_MINUS}{number(square.estimate.std, unit)}", ""))
        if short := interval(square.estimate, unit, short=True):
            parts.append((f"\n{short}", "dim"))
        return Text.assemble(*parts)

    for row in grid.rows:
        table.add_row(_narrow(row.label, 9), *map(square_text, row.squares, grid.units))
        if row.published:
            quotes = ("\n".join(each) if each else DASH for each in _quotes(grid, row))
            table.add_row("published", *quotes, style="dim italic")
        table.add_section()
    table.add_row("n", *counts(grid), style="dim")
    below = [Text(shown(" ".join([*caption(grid, "below"), *published(grid)])), style="dim")]
    below += [Text(shown(each), style="yellow") for each in doubts(grid)]
    below += [Text(f"{raised([mark])} {shown(each)}") for mark, each in enumerate(notes.texts, 1)]
    if any("-" in each.partition(":")[0] for each in (*notes.texts, *doubts(grid))):
        below.append(Text("What each doubt means, and what to do: docs/flags.md", style="dim"))
    title = Text(shown(f"Table {grid.key}: {grid.table.title}"), style="bold")
    return Group(Padding(title, (1, 0, 1, 0)), table, *below)


def _narrow(parts: Iterable[str], width: int) -> "Text":
    """Return headings below each other, broken between words."""
    from rich.text import Text

    broken = (wrap(shown(each), width, break_long_words=False, break_on_hyphens=False) for each in parts)
    return Text("\n".join(line for lines in broken for line in lines))


# --- markdown ----------------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    """Return a GitHub table with its caption, and its notes and doubts as footnotes."""
    notes = Footnotes()

    def square_text(square: Square, unit: str) -> str:
        marks = raised(notes.marks(square))
        if square.estimate is None:
            return in_markdown(square.hole) + marks
        value = f"{square.bound}{number(square.estimate.value, unit)}"
        if square.estimate.std is not None:
            value += f" {PLUS_MINUS} {number(square.estimate.std, unit)}"
        value = f"**{value}**" if square.weakest else value
        ends = interval(square.estimate, unit)
        return f"{value}{marks}<br>[{ends}]" if ends else f"{value}{marks}"

    lines = [
        [*map(in_markdown, (*_heads(grid), *grid.columns))],
        [":--"] * len(grid.heads) + ["--:"] * len(grid.columns),
    ]
    for row in grid.rows:
        lines.append([*map(in_markdown, row.label), *map(square_text, row.squares, grid.units)])
        if row.published:
            quotes = (f"*{' '.join(each)}*" if each else DASH for each in _quotes(grid, row))
            lines.append(["*published*", *[""] * (len(row.label) - 1), *quotes])
    lines.append(["n", *[""] * (len(grid.heads) - 1), *counts(grid)])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    parts = [
        f"### {in_markdown(f'Table {grid.key}: {grid.table.title}')}",
        "\n".join(rows),
        in_markdown(" ".join([*caption(grid), *published(grid)])),
        "\n".join(f"- {in_markdown(each)}" for each in doubts(grid)),
        "\n".join(f"{mark}. {in_markdown(each)}" for mark, each in enumerate(notes.texts, 1)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- for programs ------------------------------------------------------------------------------------


def records(grid: Grid) -> list[dict[str, Any]]:
    """Return one record for each square; proportions in percent, and None where there is no number."""
    found = []
    for row in grid.rows:
        quotes = row.published or [None] * len(grid.columns)
        for heading, unit, square, quote in zip(grid.columns, grid.units, row.squares, quotes, strict=True):
            found.append(
                {
                    "table": grid.key,
                    **{head or "row": label for head, label in zip(grid.heads, row.label, strict=True)},
                    "column": heading,
                    **_numbers(square, unit),
                    "unit": unit,
                    "void": square.void,
                    "bound": square.bound,
                    "weakest": square.weakest,
                    "published": None if quote is None else quote.value,
                    "published_std": None if quote is None else quote.std,
                    "note": "; ".join(_remarks(square)),
                    "flags": "; ".join(map(sentence, square.flags)),
                }
            )
    return found


def _remarks(square: Square) -> list[str]:
    """Return the notes in words: a dash is what no task asks for, unless there is another reason."""
    asked = square.hole != DASH
    hole = [square.hole] if square.hole and asked else []
    return [*hole, *square.notes] if asked or square.notes else ["not asked"]


def _numbers(square: Square, unit: str) -> dict[str, Any]:
    if (known := square.estimate) is None:
        return dict.fromkeys(("value", "std", "low", "high", "n", "seeds"))
    scale = _SCALES[unit]
    values = {"value": known.value, "std": known.std, "low": known.low, "high": known.high}
    scaled = {name: None if each is None else round(scale * each, 6) for name, each in values.items()}
    return {**scaled, "n": known.n, "seeds": known.seeds}


def csv(grid: Grid) -> str:
    """Return one line for each square, tidy."""
    lines = records(grid)
    out = StringIO()
    writer = DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: in_csv(value) for name, value in line.items()} for line in lines)
    return out.getvalue()


def _document(grid: Grid) -> dict[str, Any]:
    return {
        "table": grid.key,
        "title": grid.table.title,
        "metric": grid.metric.name,
        "caption": [*caption(grid), *published(grid)],
        "question": dict(grid.question),
        "void": grid.void,
        "flags": [{"code": flag.code, "message": flag.message, "advice": flag.advice} for flag in grid.flags],
        "squares": [{name: _lawful(each) for name, each in record.items()} for record in records(grid)],
    }


def _lawful(value: Any) -> Any:
    """Return a value that JSON knows: it knows no infinity, which is fewer than half broken."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- LaTeX -------------------------------------------------------------------------------------------

_LATEX = str.maketrans(
    {
        **{each: f"\\{each}" for each in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "`": r"\textasciigrave{}",
        # After a line's end, these would be its arguments.
        "[": "{[}",
        "*": "{*}",
        DASH: "--",
        PLUS_MINUS: r"$\pm$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        MINUS: "$-$",
        "∞": r"$\infty$",
    }
)


def _latex(text: str) -> str:
    return shown(text, keep="").translate(_LATEX)


def latex(grid: Grid) -> str:
    """Return a `table` environment (packages: booktabs)."""
    import pandas as pd

    notes = Footnotes()

    def square_text(square: Square, unit: str) -> str:
        marks = ",".join(map(str, notes.marks(square)))
        value = square.hole
        if square.estimate is not None:
            value = f"{square.bound}{number(square.estimate.value, unit)}"
            if square.estimate.std is not None:
                value += f" {PLUS_MINUS} {number(square.estimate.std, unit)}"
        return _latex(value) + (f"\\textsuperscript{{{marks}}}" if marks else "")

    headings = [*_heads(grid), *grid.columns]
    lines: list[list[str]] = []
    bold: list[tuple[int, int]] = []
    for row in grid.rows:
        bold += [
            (len(lines), len(grid.heads) + at) for at, square in enumerate(row.squares) if square.weakest
        ]
        labels = [_latex(each) for each in row.label]
        lines.append([*labels, *map(square_text, row.squares, grid.units)])
        if row.published:
            quotes = (" ".join(each) if each else DASH for each in _quotes(grid, row))
            blank = [""] * (len(row.label) - 1)
            lines.append([r"\quad published", *blank, *(_latex(each) for each in quotes)])
    frame = pd.DataFrame(lines, columns=pd.Index([_latex(each) for each in headings]))
    # Cells are escaped where they are made: marks and signs are LaTeX already.
    css = pd.DataFrame("", index=frame.index, columns=frame.columns)
    for line, at in bold:
        css.iat[line, at] = "textbf:--rwrap"
    styled = frame.style.apply(lambda _: css, axis=None).hide(axis="index")
    said = [grid.table.title.rstrip(".") + ".", *caption(grid, None), *published(grid)]
    shown = styled.to_latex(
        hrules=True,
        caption=_latex(" ".join(said)),
        label="tab:" + re.sub("[^A-Za-z0-9./:_-]", "-", grid.key),
        position="t",
        position_float="centering",
        column_format="l" * len(grid.heads) + "r" * len(grid.columns),
    )
    below = [_latex(each) for each in doubts(grid)]
    below += [f"\\textsuperscript{{{mark}}} {_latex(each)}" for mark, each in enumerate(notes.texts, 1)]
    if not below:
        return shown
    tail = "\\par\\smallskip\\raggedright\\footnotesize\n" + "\\\\\n".join(below)
    return shown.replace("\\end{table}", f"{tail}\n\\end{{table}}")


# --- several tables ----------------------------------------------------------------------------------


def joined(grids: Sequence[Grid], form: Literal["text", "markdown", "csv", "latex", "json"]) -> str:
    """Return tables as one text."""
    match form:
        case "text":
            return "".join(map(_plain, grids))
        case "json":
            text = dumps([_document(grid) for grid in grids], indent=1, ensure_ascii=False, allow_nan=False)
            # JSON would leave some of what cannot be seen as it is.
            return (
                "".join(each if each.isprintable() or each == "\n" else dumps(each)[1:-1] for each in text)
                + "\n"
            )
        case "markdown":
            return "\n".join(map(markdown, grids))
        case "csv":
            return "\n".join(map(csv, grids))
        case "latex":
            return "\n".join(map(latex, grids))


def _plain(grid: Grid) -> str:
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=80, color_system=None, highlight=False).print(text(grid))
    return out.getvalue()


# --- figures -----------------------------------------------------------------------------------------


def figure(grid: Grid, path: Path) -> None:
    """Draw the curves of a table that names a figure, with the intervals as bands; svg, png or pdf."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from bench.errors import InputError

    drawn = grid.table.figure
    if drawn is None:
        raise InputError(f"table {grid.key!r} names no figure: figure: {{x: radius}} makes it one")
    # The same numbers give the same file.
    with rc_context({"svg.hashsalt": "crossfire", "svg.fonttype": "none"}):
        page = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = page.subplots()
        for curve, style in zip(_curves(grid), _styles(), strict=False):
            _draw(axes, curve, style)
        axes.set_title("\n".join(wrap(shown(grid.table.title), 60)), fontsize="medium", parse_math=False)
        axes.set_xlabel(drawn.xlabel or _axis_label(grid, drawn.x), parse_math=drawn.xlabel is None)
        unit = grid.metric.unit
        axes.set_ylabel(drawn.ylabel or grid.metric.name + _LABELS.get(unit, ""), parse_math=False)
        if unit == "percent":
            axes.set_ylim(0, 100)
        axes.grid(alpha=0.25, linewidth=0.5)
        # Of matplotlib's own making, a legend would leave out names that begin with _.
        drawn_lines = axes.get_lines()
        legend = axes.legend(drawn_lines, ["curve"] * len(drawn_lines), fontsize="small", frameon=False)
        for line, label in zip(drawn_lines, legend.get_texts(), strict=True):
            label.set(text=shown(str(line.get_label())), parse_math=False)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        try:
            page.savefig(path, dpi=200, metadata=metadata)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be drawn: {error}") from None


@dataclass(frozen=True)
class _Curve:
    name: str
    points: tuple[tuple[float, Square], ...]
    quotes: tuple[tuple[float, Quote], ...]
    scale: float


def _curves(grid: Grid) -> list[_Curve]:
    """Return a curve for each row where x runs over columns, else one for each column."""
    assert grid.table.figure is not None
    at = partial(position, x=grid.table.figure.x)
    found: list[_Curve] = []
    if any(at(each) is not None for each in grid.at):
        places = [(x, column) for column, each in enumerate(grid.at) if (x := at(each)) is not None]
        for row in grid.rows:
            points = [(x, row.squares[column]) for x, column in places]
            quotes = [(x, row.published[column]) for x, column in places] if row.published else []
            found.append(_curve(", ".join(row.label), points, quotes, grid.metric.unit))
        return found
    lines: list[tuple[float, Row]] = [(x, row) for row in grid.rows if (x := at(row.at)) is not None]
    others = [place for place, head in enumerate(grid.heads) if head != grid.table.figure.x]
    names = dict.fromkeys(tuple(row.label[place] for place in others) for _, row in lines)
    for name in names:
        own = [(x, row) for x, row in lines if tuple(row.label[place] for place in others) == name]
        for column, heading in enumerate(grid.columns):
            points = [(x, row.squares[column]) for x, row in own]
            quotes = [(x, row.published[column]) for x, row in own if row.published]
            found.append(_curve(", ".join((*name, heading)), points, quotes, grid.units[column]))
    return found


def _curve(
    name: str,
    points: Sequence[tuple[float, Square]],
    quotes: Sequence[tuple[float, Quote | None]],
    unit: str,
) -> _Curve:
    kept = tuple((x, quote) for x, quote in quotes if quote is not None)
    ordered = tuple(sorted(points, key=lambda point: point[0]))
    return _Curve(name, ordered, kept, _SCALES[unit])


def _styles() -> Iterable[Mapping[str, Any]]:
    """Yield colours that colour-blind readers can tell apart (Okabe and Ito), with markers of their own."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for repeat, line in enumerate(("-", "--", ":", "-.")):
        for place, colour in enumerate(colours):
            yield {"color": colour, "linestyle": line, "marker": "osD^vPX"[(place + repeat) % 7]}


def _draw(axes: "Axes", curve: _Curve, style: Mapping[str, Any]) -> None:
    """Draw a curve and its band; a hole breaks both."""
    xs = [x for x, _ in curve.points]

    def heights(name: str) -> list[float]:
        known = [
            None if square.estimate is None else getattr(square.estimate, name) for _, square in curve.points
        ]
        return [math.nan if each is None else curve.scale * float(each) for each in known]

    axes.plot(xs, heights("value"), label=curve.name, markersize=4, linewidth=1.4, **style)
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


def _axis_label(grid: Grid, x: str) -> str:
    if x == "radius":
        return f"{_NORMS.get(grid.question.get('norm', ''), '')} radius".strip()
    return x.rpartition(".")[2]

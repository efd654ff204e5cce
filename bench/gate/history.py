"""The history of a baseline: accuracy and its interval at every accepted change, as a table and a picture."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from string import ascii_uppercase
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bench.console import count
from bench.escaping import in_markdown
from bench.gate.baseline import Accepted, Baseline
from bench.gate.render.phrases import brief
from bench.quantities import DASH
from bench.report.render import figure, words
from bench.report.render.markdown import pipes
from bench.report.render.records import csv_lines
from bench.report.render.text import printed
from bench.results.metrics import Estimate, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group, RenderableType
    from rich.table import Table

Form: TypeAlias = Literal["text", "markdown", "csv", "json"]
"""The formats of a history that are text."""

_SAYS = "Accuracy in percent with its 95 % Wilson interval; a dash where the baseline did not ask."

_BESIDE = 5
"""Subjects beside each other that fit into 80 columns."""

_LISTED = 12
"""How many accepted changes a picture names, the newest; the table has all."""

_WIDTH, _LINE, _CURVES = 7.2, 0.17, 3.4
"""Inches of a picture: its width, a line of its text, and the height of its curves."""


@dataclass(frozen=True)
class _Course:
    """What a worst case came to over time."""

    name: str
    estimates: tuple[Estimate | None, ...]
    """By accepted baseline, the oldest first; None where it has no such worst case."""

    @property
    def n(self) -> str:
        """The numbers of examples, in words."""
        every = [each.n for each in self.estimates if each is not None]
        return f"n = {min(every)}" if min(every) == max(every) else f"n = {min(every)} to {max(every)}"


def _courses(history: Sequence[Accepted]) -> list[_Course]:
    names = dict.fromkeys(name for each in history for name in each.numbers)
    return [_Course(name, tuple(_estimate(each, name) for each in history)) for name in names]


def _estimate(accepted: Accepted, name: str) -> Estimate | None:
    if name not in accepted.numbers:
        return None
    share, n = accepted.numbers[name]
    low, high = wilson(share, int(n))
    return Estimate(value=share, low=low, high=high, n=int(n), std=None, seeds=1)


def written(baseline: Baseline, form: Form) -> str:
    """Write the history of a baseline as one text.

    Args:
        baseline: The baseline.
        form: The format; CSV has a line for each number, JSON an entry for each accepted change.

    Returns:
        The text, with a line end at its end.
    """
    match form:
        case "text":
            return printed(to_text(baseline))
        case "markdown":
            return _markdown(baseline)
        case "csv":
            return csv_lines(list(_records(baseline.history)))
        case "json":
            return json.dumps([_document(each) for each in baseline.history], indent=1) + "\n"


def to_text(baseline: Baseline) -> "Group":
    """Return what rich prints of a history on a terminal of 80 columns.

    Args:
        baseline: The baseline.

    Returns:
        The accepted changes with their reasons, then the numbers: a row for each change, the newest last,
        and a column for each worst case.
    """
    from rich.console import Group
    from rich.text import Text

    history = baseline.history
    changes = _grid("#", "accepted", "by", "commit", "reason")
    changes.columns[0].justify = "right"
    for number, each in enumerate(history, 1):
        changes.add_row(*map(Text, (str(number), *_told(each), brief(each.reason))))
    parts: list[RenderableType] = [Text(_headline(baseline), style="bold"), Text(), changes]
    courses = _courses(history)
    for first in range(0, len(courses), _BESIDE):
        some = courses[first : first + _BESIDE]
        marks = [_letters(first + place) for place in range(len(some))]
        names = _grid("", "worst case", "n")
        for mark, course in zip(marks, some, strict=True):
            names.add_row(*map(Text, (mark, brief(course.name, 200), course.n.removeprefix("n = "))))
        parts += [Text(), names, Text(), _numbers(history, marks, some)]
    return Group(*parts, Text(_SAYS, style="dim"))


def _grid(*heads: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        grid.add_column(Text(head), overflow="fold")
    return grid


def _numbers(history: Sequence[Accepted], marks: Sequence[str], courses: Sequence[_Course]) -> "Table":
    from rich.text import Text

    grid = _grid("#", "accepted", *marks)
    for place, column in enumerate(grid.columns):
        column.justify = "left" if place == 1 else "right"
    for number, accepted in enumerate(history):
        cells = []
        for course in courses:
            if (known := course.estimates[number]) is None:
                cells.append(Text(DASH, style="dim"))
            else:
                short = words.interval(known, "percent", short=True)
                cells.append(Text.assemble(words.number(known.value, "percent"), (f" {short:>6}", "dim")))
        grid.add_row(str(number + 1), Text(_told(accepted)[0][:10]), *cells)
    return grid


def _headline(baseline: Baseline) -> str:
    folder = brief(str(baseline.root), 300)
    return f"{brief(baseline.suite, 300)}: {count(len(baseline.history), 'accepted baseline')} in {folder}"


def _short(commit: str | None) -> str:
    """Return a commit in seven digits, with its mark where something was not committed."""
    if commit is None:
        return DASH
    digits, dash, mark = brief(commit, 40).partition("-")
    return digits[:7] + dash + mark


def _told(accepted: Accepted) -> tuple[str, str, str]:
    """Return when, by whom and at which commit a change was accepted, short enough for a line."""
    when = brief(accepted.when, 40).replace("T", " ").removesuffix("Z")
    # Minutes tell changes apart; seconds do not help a reader.
    when = when[:16] if when[4:5] == "-" else when
    return when, brief(accepted.who, 14), _short(accepted.commit)


def _letters(number: int) -> str:
    """Return A, B, ... Z, AA, AB, ..."""
    above, last = divmod(number, len(ascii_uppercase))
    return (_letters(above - 1) if above else "") + ascii_uppercase[last]


def _markdown(baseline: Baseline) -> str:
    history, courses = baseline.history, _courses(baseline.history)
    changes = pipes(
        ["\\#", "accepted", "by", "commit", "reason"],
        5,
        (
            [str(at), *map(in_markdown, (*_told(each), brief(each.reason)))]
            for at, each in enumerate(history, 1)
        ),
    )
    heads = ["\\#", "accepted", *(f"{in_markdown(brief(each.name, 200))}<br>{each.n}" for each in courses)]
    numbers = pipes(heads, 2, (_line(number, history, courses) for number in range(len(history))))
    parts = [f"### {in_markdown(_headline(baseline))}", changes, *([numbers] if courses else []), _SAYS]
    return "\n\n".join(parts) + "\n"


def _line(number: int, history: Sequence[Accepted], courses: Sequence[_Course]) -> list[str]:
    cells = []
    for each in courses:
        known = each.estimates[number]
        cells.append(
            DASH
            if known is None
            else f"{words.number(known.value, 'percent')}<br>[{words.interval(known, 'percent')}]"
        )
    return [str(number + 1), in_markdown(_told(history[number])[0]), *cells]


def _records(history: Sequence[Accepted]) -> Iterator[dict[str, Any]]:
    """Yield a record for each number; of a change without one, one that has none."""
    for number, each in enumerate(history, 1):
        told = {
            "number": number,
            "when": each.when,
            "who": each.who,
            "commit": each.commit,
            "reason": each.reason,
        }
        for name in each.numbers:
            yield {**told, "subject": name, **_percent(each, name)}
        if not each.numbers:
            yield told


def _document(accepted: Accepted) -> dict[str, Any]:
    told = {name: value for name, value in vars(accepted).items() if name != "numbers"}
    numbers = [{"subject": name, **_percent(accepted, name)} for name in accepted.numbers]
    return {**told, "numbers": numbers}


def _percent(accepted: Accepted, name: str) -> dict[str, Any]:
    known = _estimate(accepted, name)
    assert known is not None
    ends = {"value": known.value, "low": known.low, "high": known.high}
    return {
        **{end: None if each is None else round(100 * each, 6) for end, each in ends.items()},
        "n": known.n,
    }


# --- the picture -------------------------------------------------------------------------------------


def draw(baseline: Baseline, path: Path, form: Literal["svg", "png"]) -> None:
    """Draw the accuracy of every worst case over the accepted changes, the newest of which are named.

    Args:
        baseline: The baseline.
        path: The file. The same history gives the same file.
        form: Its format.

    Raises:
        InputError: The file cannot be written.
    """
    figure.save(lambda: drawn(baseline), path, form)


def drawn(baseline: Baseline) -> "Figure":
    """Draw a history.

    Args:
        baseline: The baseline.

    Returns:
        The figure, which no window shows.
    """
    from matplotlib.figure import Figure

    names = [wrap(f"{brief(each.name, 200)} ({each.n})", 90) for each in _courses(baseline.history)]
    changes = list(_named(baseline.history))
    # Text does not shrink: its lines add to the height.
    heights = [
        _CURVES,
        _LINE * (1 + sum(map(len, names))),
        _LINE * (1 + sum(each.count("\n") + 1 for each in changes)),
    ]
    page = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    curves, legend, listed = page.subplots(3, height_ratios=heights)
    _curves(curves, baseline)
    for each in (legend, listed):
        each.set_axis_off()
    lines = curves.get_lines()
    key = legend.legend(lines, ["curve"] * len(lines), fontsize="small", frameon=False, loc="upper left")
    for text, name in zip(key.get_texts(), names, strict=True):
        text.set(text="\n".join(name), parse_math=False)
    listed.text(0, 1, "\n".join(changes), va="top", fontsize="small", parse_math=False)
    return page


def _named(history: Sequence[Accepted]) -> Iterator[str]:
    """Yield a text for each of the newest changes, the newest first."""
    for number in range(len(history), max(len(history) - _LISTED, 0), -1):
        accepted = history[number - 1]
        when, who, commit = _told(accepted)
        where = "no commit" if accepted.commit is None else f"commit {commit}"
        said = f"{number}: {when}, {who}, {where}: {brief(accepted.reason, 200)}"
        yield "\n".join(wrap(said, 105, subsequent_indent="      "))
    if len(history) > _LISTED:
        yield f"and {len(history) - _LISTED} before"


def _curves(axes: "Axes", baseline: Baseline) -> None:
    history, courses = baseline.history, _courses(baseline.history)
    for nth, (course, style) in enumerate(zip(courses, cycle(figure.styles()), strict=False)):
        # Beside each other, so that no interval hides another.
        aside = 0.3 * ((nth + 0.5) / len(courses) - 0.5)
        known = [(at, each) for at, each in enumerate(course.estimates, 1) if each is not None]
        heights = [None if each is None else 100 * each.value for each in course.estimates]
        xs = [at + aside for at in range(1, len(history) + 1)]
        # A gap breaks the curve.
        ys = [float("nan") if each is None else each for each in heights]
        axes.plot(xs, ys, markersize=4 if len(history) <= 40 else 2, linewidth=1.2, **style)
        axes.vlines(
            [at + aside for at, _ in known],
            [100 * (each.low or 0.0) for _, each in known],
            [100 * (each.value if each.high is None else each.high) for _, each in known],
            color=style["color"],
            alpha=0.35,
            linewidth=1.2 if len(history) <= 40 else 0.6,
        )
    step = -(-len(history) // 10)
    # Counted from the newest, which is always told.
    ticks = range(len(history), 0, -step)
    labels = [f"{at}\n{_told(history[at - 1])[0][:10]}" for at in ticks]
    axes.set_xticks(list(ticks), labels, fontsize="x-small", parse_math=False)
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy of the worst case (%)\nwith its 95 % Wilson interval", fontsize="small")
    axes.set_title("\n".join(wrap(_headline(baseline), 80)), fontsize="medium", parse_math=False)
    axes.grid(alpha=0.25, linewidth=0.5)
